"""A name or a TOML file becomes a recipe."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from equipoise.base.errors import UserError, reason
from equipoise.config.recipe import Field, Recipe, find_field, nearest, override_all


def recipe_from_table(table: Mapping[str, Any], where: str) -> Recipe:
    """A recipe from nested tables, as TOML gives them; `where` names the source in messages. Raises UserError for
    unknown sections, fields and refused values."""
    if not isinstance(table, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance] a file may hold anything
        raise UserError(f"{where}: its recipe is no table of fields")
    settings: list[tuple[Field, Any]] = []
    try:
        for name, value in table.items():
            leaves = (
                {f"{name}.{leaf}": one for leaf, one in value.items()} if isinstance(value, Mapping) else {name: value}
            )
            for key, one in leaves.items():
                field = find_field(str(key))
                if field.key != key:
                    raise UserError(f"no recipe field is called '{key}'; write {field.key}")
                settings.append((field, one))
        return override_all(Recipe(), settings)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of every recipe that comes with the package, in alphabetical order."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "recipes").glob("*.toml"))}


def load_recipe(name: str | Path, /, **overrides: Any) -> Recipe:
    """The recipe called `name`: a shipped one, or a path to a TOML file, or to a run folder that holds one.

    `overrides` are fields by their own name (`epochs=3`, `lr=0.05`, `imbalance_factor=50`) or flag name
    (`data="pictures"`); `**{"optim.lr": 0.05}` works too. Raises UserError for what is unknown or refused.
    """
    path = _recipe_file(name)
    try:
        table = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError) as error:  # no UTF-8, no TOML, a date that does not exist
        raise UserError(f"{path} is no recipe that can be read ({reason(error, library=True)})") from None
    return override_all(recipe_from_table(table, str(path)), [(find_field(key), overrides[key]) for key in overrides])


def _recipe_file(name: str | Path) -> Path:
    """The file of the recipe that a user calls `name`. Raises UserError where there is none."""
    shipped = shipped_recipes()
    path = shipped.get(str(name), Path(name))
    if (path / "recipe.toml").is_file():
        return path / "recipe.toml"  # a run folder: train the same again
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a recipe; to train on the pictures in it: --data {path}")
    if path.is_file() or path.suffix == ".toml":
        return path
    raise UserError(f"no recipe is called '{name}'{nearest(str(name), list(shipped))}")
