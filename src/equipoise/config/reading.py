"""A name or a TOML file becomes a recipe, and a recipe TOML."""

import tomllib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from equipoise.base.errors import UserError, reason
from equipoise.config.recipe import Recipe, find_field, nearest, override_all, recipe_fields


def recipe_from_table(table: Mapping[str, Any], where: str) -> Recipe:
    """A recipe from nested tables, as TOML gives them. Raises UserError, beginning with `where`, for what is wrong."""
    values: dict[str, Any] = {}
    for name, value in table.items():
        of_section = isinstance(value, Mapping)
        values |= {f"{name}.{leaf}": one for leaf, one in value.items()} if of_section else {str(name): value}
    try:
        fields = {key: find_field(key) for key in values}
        for key, field in fields.items():
            if field.key != key:
                raise UserError(f"no recipe field is called '{key}'; write {field.key}")
        return override_all(Recipe(), [(fields[key], value) for key, value in values.items()])
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of every recipe that comes with the package, in alphabetical order."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "recipes").glob("*.toml"))}


def load_recipe(name: str | Path, /, **overrides: Any) -> Recipe:
    """The recipe called `name`: a shipped one, or a path to a TOML file, or to a run folder that holds one.

    `overrides` are fields by their own name (`epochs=3`, `lr=0.05`, `imbalance_factor=50`) or flag name
    (`data="pictures"`); `**{"optim.lr": 0.05}` works too. Raises UserError for what is unknown or refused.

    >>> equipoise.load_recipe("digits-lt", epochs=3, lr=0.05).optim.lr
    0.05
    """
    shipped = shipped_recipes()
    path = shipped.get(str(name), Path(name))
    if (path / "recipe.toml").is_file():
        path /= "recipe.toml"  # of a run folder: train the same again
    elif path.is_dir():
        raise UserError(f"{path} is a folder, not a recipe; to train on the pictures in it: --data {path}")
    elif not path.is_file() and path.suffix != ".toml":
        raise UserError(f"no recipe is called '{name}'{nearest(str(name), list(shipped))}")
    try:
        table = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError) as error:  # no UTF-8, no TOML, a date that does not exist
        raise UserError(f"{path} is no recipe that can be read ({reason(error, library=True)})") from None
    return override_all(recipe_from_table(table, str(path)), [(find_field(key), overrides[key]) for key in overrides])


def recipe_toml(recipe: Recipe) -> str:
    """The complete recipe as TOML; `load_recipe` reads it back."""
    import tomli_w

    return tomli_w.dumps(asdict(recipe))


def explained_toml(recipe: Recipe, reasons: Mapping[str, str]) -> str:
    """The same with a comment beside each field: the reason for its value, or else what it means."""
    helps = {field.key: field.help for field in recipe_fields()} | dict(reasons)
    lines, table = list[str](), ""
    for line in recipe_toml(recipe).splitlines():
        name, equals, _ = line.partition(" = ")
        table = f"{line[1:-1]}." if line.startswith("[") and not equals else table
        help = helps.get(table + name) if equals else None
        lines.append(f"{line}  # {help}" if help else line)
    return "\n".join([*lines, ""])
