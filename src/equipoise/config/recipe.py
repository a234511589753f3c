"""A name or TOML file, plus overrides, becomes one frozen, validated `Recipe`.

Every field is declared once, here: its type, what it means, what it may be. The command line's flags, `--set`,
`load_recipe(**overrides)` and the TOML files all pass through the same checks, so a wrong value gets the same
sentence whichever way it came.
"""

import difflib
import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from equipoise.base.errors import UserError, reason, shown

_LARGEST_FILE = 2**18  # bytes; a complete recipe has 2,000

Method = Literal["bcl", "ce", "logit-adjusted", "supcon+la"]
Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class Setting:
    """What is known of a field beside its type. Bounds hold for each number of a tuple."""

    help: str
    flags: tuple[str, ...] = ()  # further names of its flag
    above: float | None = None  # exclusive
    at_least: float | None = None
    at_most: float | None = None
    length: int | None = None
    pattern: str | None = None  # of text, whole; `expected` says it in words
    expected: str = ""


@dataclass(frozen=True)
class Data:
    path: Annotated[
        str,
        Setting(
            "folder of class folders or of a published data set, Parquet, CIFAR archive, or 'digits' (built in)",
            flags=("data",),
        ),
    ] = "digits"
    benchmark: Annotated[
        Literal["", "imagenet-lt", "inat2018", "places-lt"],
        Setting("the published lists that say which images are meant ('': all that lie there)"),
    ] = ""
    train_list: Annotated[
        str, Setting("list file 'path label' of the training images, paths below the data folder")
    ] = ""
    val_list: Annotated[str, Setting("list file of the validation images")] = ""
    test_list: Annotated[str, Setting("list file of the test images")] = ""
    image_column: Annotated[str, Setting("Parquet: column with the image bytes ('' finds it)")] = ""
    label_column: Annotated[str, Setting("Parquet: column with the integer label ('' finds it)")] = ""
    on_bad_image: Annotated[
        Literal["error", "skip"],
        Setting("an image that cannot be read: stop, or take another of its class (when scoring: leave it out)"),
    ] = "error"
    allow_outside: Annotated[bool, Setting("read images that paths or links lead to outside the data folder")] = False
    imbalance: Annotated[
        Literal["exponential", "step"], Setting("shape of the long tail that imbalance_factor cuts")
    ] = "exponential"
    imbalance_factor: Annotated[
        float, Setting("cut a long tail: largest class / smallest class (1: train on all images)", at_least=1)
    ] = 1.0
    holdout: Annotated[
        float,
        Setting(
            "share of the training images held out for validation where there is no validation part",
            at_least=0,
            at_most=0.5,
        ),
    ] = 0.1


@dataclass(frozen=True)
class Views:
    policy: Annotated[
        Literal["digits", "cifar", "photos"],
        Setting("augmentation: of small handwriting, of 32-pixel images, of photographs"),
    ] = "photos"
    cl_views: Annotated[Literal["sim-sim", "sim-rand", "rand-rand"], Setting("views of the contrastive branch")] = (
        "sim-sim"
    )
    size: Annotated[int, Setting("side of a training image, pixels", at_least=8, at_most=1024)] = 224
    randaug: Annotated[bool, Setting("RandAugment in the classifier's view of photographs")] = True
    randaug_n: Annotated[int, Setting("RandAugment: operations a view", at_least=1, at_most=4)] = 2
    randaug_m: Annotated[float, Setting("RandAugment: magnitude", at_least=0, at_most=10)] = 10.0
    blur: Annotated[bool, Setting("Gaussian blur in sim views, p=.5, as in MoCo v2 (the authors: no)")] = False
    mean: Annotated[
        tuple[float, ...], Setting("subtracted from each channel, of 1", at_least=0, at_most=1, length=3)
    ] = (0.485, 0.456, 0.406)
    std: Annotated[tuple[float, ...], Setting("divides each channel, of 1", above=0, at_most=1, length=3)] = (
        0.229,
        0.224,
        0.225,
    )


@dataclass(frozen=True)
class Model:
    encoder: Annotated[
        str, Setting("resnet8, resnet20, resnet32 (for small images) or any name timm knows", flags=("arch",))
    ] = "resnet50"
    pretrained: Annotated[bool, Setting("start from timm's pretrained weights (fetched from its hub)")] = False
    weights: Annotated[
        str,
        Setting("start from the encoder's weights in this file instead, in timm's naming, or torchvision's ResNets"),
    ] = ""
    classifier: Annotated[Literal["cosine", "linear"], Setting("cosine with scale 30, or linear with bias")] = "cosine"
    hidden_dim: Annotated[
        int, Setting("hidden width of the two projections (0: the encoder's width)", at_least=0, at_most=65_536)
    ] = 0
    feature_dim: Annotated[
        int, Setting("width D of the contrastive features", flags=("feat-dim",), at_least=2, at_most=65_536)
    ] = 1024
    batch_norm: Annotated[
        Literal["per-rank", "synchronised", "frozen"],
        Setting("BatchNorm's statistics: of each process's images, of the whole batch, or as they start"),
    ] = "per-rank"


@dataclass(frozen=True)
class Loss:
    alpha: Annotated[float, Setting("weight of the classification loss (two-branch methods only)", at_least=0)] = 1.0
    beta: Annotated[float, Setting("weight of the contrastive loss (two-branch methods only)", at_least=0)] = 0.35
    temperature: Annotated[float, Setting("temperature of the contrastive loss", flags=("temp",), above=0)] = 0.07
    tau: Annotated[float, Setting("strength of the logit adjustment", at_least=0)] = 1.0


@dataclass(frozen=True)
class Optim:
    lr: Annotated[float, Setting("peak learning rate of SGD", flags=("learning-rate",), above=0)] = 0.1
    momentum: Annotated[float, Setting("momentum", at_least=0, at_most=0.9999)] = 0.9
    weight_decay: Annotated[float, Setting("weight decay", flags=("wd",), at_least=0)] = 5e-4
    schedule: Annotated[Literal["cosine", "step"], Setting("learning rate over the epochs")] = "cosine"
    warmup_epochs: Annotated[int, Setting("epochs of linear warm-up", at_least=0)] = 0
    milestones: Annotated[
        tuple[float, ...],
        Setting("step schedule: x0.1 from these epochs on (below 1: share of all epochs)", above=0),
    ] = ()


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a training run. Make and change one with `load_recipe(name, **overrides)`, which
    checks every value."""

    name: Annotated[
        str,
        Setting(
            "the recipe's name, part of the run folder's",
            pattern=r"[^/\\\x00-\x1f]{1,100}",
            expected="a name of up to 100 characters without /",
        ),
    ] = "custom"
    summary: Annotated[str, Setting("one line for `equipoise recipes`")] = ""
    method: Annotated[Method, Setting("what is trained: bcl, or a baseline under the same recipe")] = "bcl"
    seed: Annotated[int, Setting("everything random follows from it", at_least=0, at_most=2**31 - 1)] = 0
    epochs: Annotated[int, Setting("passes over the training images", at_least=1, at_most=1_000_000)] = 90
    batch_size: Annotated[
        int, Setting("images a step (each gives three views), over all processes", flags=("b",), at_least=2)
    ] = 256
    micro_batch: Annotated[
        int, Setting("images that pass the encoder at a time, to save memory (0: all of a process)", at_least=0)
    ] = 0
    device: Annotated[
        str,
        Setting(
            "auto takes cuda, then mps, then cpu; cuda:1 is the second GPU",
            pattern=r"auto|cpu|mps|cuda(:\d{1,3})?",
            expected="one of auto, cpu, cuda, cuda:N, mps",
        ),
    ] = "auto"
    precision: Annotated[
        Precision,
        Setting("auto takes bf16 where the device is built for it; in fp32, a GPU's convolutions are in TF32"),
    ] = "auto"
    compile: Annotated[bool, Setting("let torch compile the encoder first: minutes once; steps may be faster")] = False
    cuda_graph: Annotated[
        bool,
        Setting("launch the step of a full batch at once, on one GPU: a small network trains several times faster"),
    ] = False
    deterministic: Annotated[bool, Setting("the same bits in every run on a GPU too, which is slower there")] = False
    workers: Annotated[
        int,
        Setting("loader processes (-1: one a core; fewer for small images)", flags=("j",), at_least=-1, at_most=512),
    ] = -1
    log_every: Annotated[
        int, Setting("steps between two lines of metrics.jsonl", flags=("p", "print-freq"), at_least=1)
    ] = 20
    checkpoint_minutes: Annotated[
        float,
        Setting(
            "minutes between two checkpoints within an epoch (it ends with one, where that takes little of its time)",
            above=0,
        ),
    ] = 10.0
    data: Data = Data()
    views: Views = Views()
    model: Model = Model()
    loss: Loss = Loss()
    optim: Optim = Optim()


@dataclass(frozen=True)
class Field:
    """One leaf of a recipe: `path` is ("optim", "lr") or ("epochs",)."""

    path: tuple[str, ...]
    type: Any
    setting: Setting

    @property
    def key(self) -> str:
        return ".".join(self.path)

    @property
    def names(self) -> tuple[str, ...]:
        """The names by which it can be overridden, its own first, in the command line's spelling."""
        own = self.path[-1].replace("_", "-")
        return (own, *self.setting.flags)


def _walk(cls: type, prefix: tuple[str, ...]) -> Iterator[Field]:
    for name, hint in get_type_hints(cls, include_extras=True).items():
        if is_dataclass(hint):
            yield from _walk(hint, (*prefix, name))  # pyright: ignore[reportArgumentType] is a class here
        else:
            annotation, setting = get_args(hint)
            yield Field((*prefix, name), annotation, setting)


@cache
def recipe_fields() -> tuple[Field, ...]:
    """All fields, in the order of the file."""
    return tuple(_walk(Recipe, ()))


@cache
def _fields_by_name() -> dict[str, Field]:
    """Fields by every name a user may write: `optim.lr`, `lr`, `learning-rate`."""
    table: dict[str, Field] = {}
    for field in recipe_fields():
        for name in {field.key.replace("_", "-"), *field.names}:
            assert name not in table, f"two fields answer to {name!r}"
            table[name] = field
    return table


def find_field(name: str) -> Field:
    """The field called `name` (`optim.lr`, `lr`, `weight_decay`, `weight-decay`).

    Raises UserError with the nearest names where there is none.
    """
    field = _fields_by_name().get(name.replace("_", "-"))
    if field is None:
        raise UserError(f"no recipe field is called '{name[:80]}'{nearest(name, _field_spellings())}")
    return field


def _field_spellings() -> list[str]:
    return [spelling for field in recipe_fields() for spelling in (field.key, field.path[-1])]


def nearest(word: str, valid: list[str]) -> str:
    """'; did you mean ...?' where something valid is near, else the whole list if it is short."""
    # Of a long word every comparison would take long.
    close = list(dict.fromkeys(difflib.get_close_matches(word[:80], valid, n=3, cutoff=0.6)))
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; there are: {', '.join(valid)}" if len(valid) <= 12 else ""


def field_value(recipe: Recipe, field: Field) -> Any:
    """The value that `recipe` has at `field`."""
    value: Any = recipe
    for name in field.path:
        value = getattr(value, name)
    return value


def override(recipe: Recipe, field: Field, value: Any) -> Recipe:
    """`recipe` with `field` set to `value`, which may be text (`"0.1"`, as from a command line).

    Raises UserError naming the field and what it may be.
    """
    return _replaced(recipe, field.path, _checked(field, value))


def _replaced(node: Any, path: tuple[str, ...], value: Any) -> Any:
    head, *rest = path
    return replace(node, **{head: _replaced(getattr(node, head), tuple(rest), value) if rest else value})


def _checked(field: Field, value: Any) -> Any:
    def refuse(expected: str) -> UserError:
        return UserError(f"{field.key} must be {expected}, not {shown(value)}")

    setting, numbers = field.setting, ()
    if get_origin(field.type) is Literal:
        choices = list(get_args(field.type))
        if value not in choices:
            raise refuse(f"one of {', '.join(choices)}")
        return value
    if field.type is bool:
        converted = as_bool(value) if isinstance(value, str) else value
        if not isinstance(converted, bool):
            raise refuse("true or false")
        return converted
    if field.type is str:
        if not isinstance(value, str):
            raise refuse("text")
        if "\0" in value or value.encode(errors="replace").decode() != value:
            raise refuse("text that can be written down (UTF-8, no zero bytes)")
        if setting.pattern is not None and not re.fullmatch(setting.pattern, value):
            raise refuse(setting.expected)
        return value
    if field.type in (int, float):
        converted = _number(value, field.type)
        if converted is None:
            raise refuse("a whole number" if field.type is int else "a number")
        numbers = (converted,)
    else:  # tuple[float, ...]
        parts = value.replace(",", " ").split() if isinstance(value, str) else value
        numbers = tuple(_number(part, float) for part in parts) if isinstance(parts, list | tuple) else (None,)
        if None in numbers or (setting.length is not None and len(numbers) != setting.length):
            raise refuse(f"{'a list of' if setting.length is None else setting.length} numbers")
        converted = numbers
    for number in numbers:
        assert number is not None
        if setting.above is not None and not number > setting.above:
            raise refuse(f"above {setting.above:.12g}")
        if setting.at_least is not None and not number >= setting.at_least:
            raise refuse(f"at least {setting.at_least:.12g}")
        if setting.at_most is not None and not number <= setting.at_most:
            raise refuse(f"at most {setting.at_most:.12g}")
    return converted


def as_bool(word: str) -> bool | None:
    """What a word says, or None where it is neither a yes nor a no."""
    return {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}.get(word.lower())


def _number(value: Any, kind: type) -> float | int | None:
    """`value` as a finite number of that kind, or None. A bool is not a number; 3.0 is not a whole one."""
    if isinstance(value, bool | NoneType):
        return None
    if isinstance(value, float) and kind is int:
        return None
    try:
        number = kind(value)
        return number if math.isfinite(number) else None
    except (ValueError, TypeError, OverflowError):
        return None


def recipe_from_table(table: Mapping[str, Any], where: str) -> Recipe:
    """A recipe from nested tables, as TOML gives them; `where` names the source in messages.

    Raises UserError for unknown sections, fields and refused values.
    """
    sections = {field.path[0] for field in recipe_fields() if len(field.path) == 2}
    recipe = Recipe()
    # In a checkpoint a recipe may be anything.
    if not isinstance(table, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UserError(f"{where}: its recipe is no table of fields")
    for name, value in table.items():
        if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UserError(f"{where}: {shown(name)} is no name of a field")
        if name in sections and not isinstance(value, Mapping):
            raise UserError(f"{where}: {name} is a section; write [{name}] and its fields below it")
        if isinstance(value, Mapping) and name not in sections:
            raise UserError(f"{where}: no section is called [{name[:80]}]{nearest(name, sorted(sections))}")
        entries = value.items() if isinstance(value, Mapping) else [(None, value)]
        for leaf, leaf_value in entries:
            key = name if leaf is None else f"{name}.{leaf}"
            try:
                field = find_field(key)
                if field.key != key:
                    raise UserError(f"no recipe field is called '{key}'; write {field.key}")
                recipe = override(recipe, field, leaf_value)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
    return recipe


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of every recipe that comes with the package, in alphabetical order."""
    folder = Path(str(resources.files("equipoise.config") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load_recipe(name: str | Path, /, **overrides: Any) -> Recipe:
    """The recipe called `name`: a shipped one, or a path to a TOML file.

    `overrides` are fields by their own name (`epochs=3`, `lr=0.05`, `imbalance_factor=50`) or flag name
    (`data="pictures"`); `**{"optim.lr": 0.05}` works too.

    Raises UserError for an unknown recipe or field, or a refused value.
    """
    shipped = shipped_recipes()
    path = shipped.get(str(name), Path(name))
    if path.is_dir() and (path / "recipe.toml").is_file():
        path = path / "recipe.toml"  # a run folder: train the same again
    if not path.is_file():
        if path.is_dir():
            raise UserError(f"{path} is a folder, not a recipe; to train on the pictures in it: --data {path}")
        if path.suffix == ".toml":
            raise UserError(f"no recipe file at {path}")
        raise UserError(f"no recipe is called '{name}'{nearest(str(name), list(shipped))}")
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
        if len(content) > _LARGEST_FILE:
            raise UserError(f"{path} is no recipe: it has more than {_LARGEST_FILE:,} bytes")
        table = tomllib.loads(content.decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({reason(error)})") from None
    except RecursionError:
        raise UserError(f"{path} is no recipe: its values go too deep") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not valid TOML (it is no UTF-8 text); correct it") from None
    except ValueError as error:  # no TOML, a number of thousands of digits, a date that is none
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not valid TOML ({reason(error, library=True)}); correct it") from None
    recipe = recipe_from_table(table, str(path))
    for key, value in overrides.items():
        recipe = override(recipe, find_field(key), value)
    return recipe


def recipe_table(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested plain tables; `recipe_from_table` reads it back."""
    return asdict(recipe)


def recipe_toml(recipe: Recipe) -> str:
    """The complete recipe as TOML; `load_recipe` reads it back."""
    import tomli_w

    return tomli_w.dumps(recipe_table(recipe))
