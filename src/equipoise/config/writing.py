"""A recipe becomes TOML."""

from collections.abc import Mapping
from dataclasses import asdict

from equipoise.config.recipe import Recipe, recipe_fields


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
        key = f"{table}{name}"
        lines.append(f"{line}  # {helps[key]}" if equals and key in helps else line)
    return "\n".join([*lines, ""])
