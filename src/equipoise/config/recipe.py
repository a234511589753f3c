"""The fields of a recipe, each declared once, here: its type, what it means, what it may be. All values pass the same
check, whichever way they came."""

import dataclasses
import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, reduce
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
from msgspec import Meta

from equipoise.base.errors import UserError, shown

Method = Literal[
    "balanced-softmax", "bcl", "ce", "class-weights", "concutmix", "focal", "gml", "gpaco", "kcl", "ldam-drw",
    "logit-adjusted", "paco", "proco", "supcon+la", "tsc", "vs",
]  # fmt: skip
# What a method changes in the recipe of another one: as its authors published it, for ImageNet-LT.
PUBLISHED: dict[Method, dict[str, Any]] = {
    "balanced-softmax": {"tau": 1.0},
    "concutmix": {"mix": "cmo"},
    "focal": {"gamma": 2.0},
    "gml": {"alpha": 1.0, "beta": 1.0, "temperature": 0.07, "queue": 16384},
    "gpaco": {"beta": 0.045, "temperature": 0.2},
    "paco": {"beta": 0.05, "temperature": 0.2},
    "proco": {"alpha": 1.0, "beta": 1.0, "temperature": 0.1},
    "vs": {"gamma": 0.3},
}
# What second stages change in the first stage's recipe. As published for ImageNet-LT: crt and lws by Kang et al. (ICLR
# 2020), los by Sun et al. (ICLR 2025); the rate is the first stage's where none is named.
SECOND_STAGES: dict[str, dict[str, Any]] = {
    "crt": {"data.sampler": "class-balanced", "epochs": 10},
    "lws": {"data.sampler": "class-balanced", "epochs": 5, "model.classifier_start": "scaled"},
    "tau-norm": {"data.sampler": "class-balanced", "epochs": 1, "model.classifier_start": "scaled"},
    "ncm": {"data.sampler": "class-balanced", "epochs": 1, "model.classifier": "cosine"},
    "los": {"epochs": 20, "optim.lr": 5e-4, "loss.label_smoothing": 0.98},
    "balanced": {"epochs": 10, "method": "balanced-softmax", "loss.tau": 1.0},
}
ALL_STAGES: dict[str, Any] = {
    "method": "ce", "data.sampler": "instance", "loss.label_smoothing": 0.0, "optim.schedule": "cosine",
    "optim.warmup_epochs": 0, "optim.sam": 0.0, "optim.ema": 0.0, "views.mix": "none",
    "model.tune": "frozen", "model.classifier_start": "class-means", "model.anchor": 0.0,
}  # fmt: skip
UNTRAINED = ("tau-norm", "ncm")  # computed; the prior of their logits is taken for that of balanced draws


def _field(default: Any, help: str, *flags: str, length: int | None = None, **bounds: Any) -> Any:
    """A field of a recipe, for `Field`; `bounds` are those of `msgspec.Meta`, for each number of a tuple. A
    `description` says what text may be."""
    about = {"help": help, "flags": flags, "length": length, "bounds": Meta(**bounds)}
    return dataclasses.field(default=default, metadata=about)


@dataclass(frozen=True)
class Data:
    path: str = _field(
        "digits",
        "class folders, images with a table of labels, packed images, a published data set, 'digits'; or a URL",
        "data",
    )
    benchmark: Literal["", "imagenet-lt", "inat2018", "places-lt"] = _field("", "its published lists name the images")
    train_list: str = _field("", "list file 'path label' or table of the training images, paths below the data folder")
    val_list: str = _field("", "list file or table of the validation images")
    test_list: str = _field("", "list file or table of the test images")
    image_column: str = _field("", "table: column with the images' names, or in Parquet their bytes ('' finds it)")
    label_column: str = _field("", "table: column with the labels, text or numbers ('' finds it)")
    class_level: int = _field(1, "1: the folders in the data folder are classes; 2: those in these", ge=1, le=9)
    on_bad_image: Literal["error", "skip"] = _field("error", "an unreadable image: stop, or take another of its class")
    allow_outside: bool = _field(False, "read images that paths or links lead to outside the data folder")
    imbalance: Literal["exponential", "step", "by-size"] = _field(
        "exponential", "shape of the tail that imbalance_factor cuts; by-size: of classes of any size"
    )
    imbalance_factor: float = _field(1.0, "cut a long tail: largest / smallest class (1: train on all images)", ge=1)
    holdout: float = _field(0.1, "share of training images held out if there is no validation part", ge=0, le=0.5)
    fold: str = _field(
        "",
        "cross-validation: hold out the K-th of N equal parts instead, as 2/5",
        pattern=r"\A(\d{1,4}/\d{1,4})?\Z",
        description="the number of a part and of all parts, as 2/5",
    )
    sampler: Literal["instance", "square-root", "class-balanced", "progressive"] = _field(
        "instance", "how often a class is drawn: as its images, by their root, as all others, from the first to this"
    )
    group_by: str = _field("", "hold out whole groups: a table's column, or a regular expression on the images' paths")


@dataclass(frozen=True)
class Views:
    policy: Literal["digits", "cifar", "photos"] = _field("photos", "augmentation for images of that kind")
    cl_views: Literal["sim-sim", "sim-rand", "rand-rand"] = _field("sim-sim", "views of the contrastive branch")
    size: int = _field(224, "side of a training image, pixels (0: that of the pretrained encoder)", ge=0, le=1024)
    smallest_crop: float = _field(0.08, "photographs: least share of its area that a random crop takes", gt=0, le=1)
    randaug: bool = _field(True, "RandAugment in the classifier's view of photographs")
    randaug_n: int = _field(2, "RandAugment: operations a view", ge=1, le=4)
    randaug_m: float = _field(10.0, "RandAugment: magnitude", ge=0, le=10)
    mix: Literal["none", "mixup", "cutmix", "cmo"] = _field(
        "none", "mix the classifier's view with that of a second image: blended, pasted, or pasted from a rare class"
    )
    mix_alpha: float = _field(1.0, "mix: lambda is drawn from Beta(alpha, alpha)", gt=0, le=100)
    blur: bool = _field(False, "Gaussian blur in sim views, p=.5, as in MoCo v2 (the authors: no)")
    mean: tuple[float, ...] = _field((0.485, 0.456, 0.406), "subtracted from each channel, of 1", length=3, ge=0, le=1)
    std: tuple[float, ...] = _field((0.229, 0.224, 0.225), "divides each channel, of 1", length=3, gt=0, le=1)


@dataclass(frozen=True)
class Model:
    encoder: str = _field("resnet50", "resnet8, resnet20, resnet32 (for small images) or any name timm knows", "arch")
    tune: Literal["scratch", "full", "last-stage", "head+norm", "lora", "frozen"] = _field(
        "scratch",
        "what is trained of the encoder: all, from random weights; all, a part, or nothing of a pretrained one",
    )
    weights: str = _field("", "the encoder's weights: a file in timm's or torchvision's naming, or a run folder")
    classifier: Literal["cosine", "linear"] = _field("cosine", "cosine with scale 30, or linear with bias")
    classifier_start: Literal["class-means", "text", "scaled"] = _field(
        "class-means", "where a cosine classifier on a pretrained encoder starts; text: of the names (open_clip:...)"
    )
    anchor: float = _field(0.0, "pull of a cosine classifier to its start (0: none; 6 suits frozen features)", ge=0)
    hidden_dim: int = _field(0, "hidden width of the two projections (0: the encoder's width)", ge=0, le=65_536)
    feature_dim: int = _field(1024, "width D of the contrastive features", "feat-dim", ge=2, le=65_536)
    batch_norm: Literal["per-rank", "synchronised", "frozen"] = _field(
        "per-rank", "BatchNorm's statistics: of each process's images, of the whole batch, or as they start"
    )


@dataclass(frozen=True)
class Loss:
    alpha: float = _field(1.0, "weight of the classification loss (two-branch methods only)", ge=0)
    beta: float = _field(0.35, "weight of the contrastive loss, or of a feature of the same class (paco, gpaco)", ge=0)
    temperature: float = _field(0.07, "temperature of the contrastive loss (gml: its start)", "temp", gt=0)
    tau: float = _field(1.0, "strength of the logit adjustment, where a method has one (paco, gpaco: 1)", ge=0)
    queue: int = _field(8192, "paco, gpaco, gml: earlier features that are compared with", ge=1, le=1_000_000)
    gamma: float = _field(0.0, "focal: exponent of 1 - probability; vs: of the class count", ge=0, le=10)
    effective_beta: float = _field(0.9999, "class-weights, ldam-drw: beta (1: weights 1 / n)", ge=0, le=1)
    label_smoothing: float = _field(
        0.0, "share of the label that goes to all classes alike; probabilities then favour rare classes", ge=0, le=0.99
    )


@dataclass(frozen=True)
class Optim:
    lr: float = _field(0.1, "peak learning rate of SGD", "learning-rate", gt=0)
    momentum: float = _field(0.9, "momentum", ge=0, le=0.9999)
    weight_decay: float = _field(5e-4, "weight decay", "wd", ge=0)
    layer_decay: float = _field(1.0, "learning rate of an encoder's layer, as a share of the next one's", gt=0, le=1)
    schedule: Literal["cosine", "step"] = _field("cosine", "learning rate over the epochs")
    sam: float = _field(0.0, "sharpness-aware minimisation: rho (0: off; 0.05 usual; twice the time)", ge=0)
    ema: float = _field(0.0, "score and use a moving average of the weights: its decay (0: off)", ge=0, le=0.99999)
    warmup_epochs: int = _field(0, "epochs of linear warm-up", ge=0)
    milestones: tuple[float, ...] = _field((), "step schedule: x0.1 from these epochs (below 1: share of all)", gt=0)


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a training run. Make one with `load_recipe(name, **overrides)`, which checks it."""

    name: str = _field(
        "custom",
        "the recipe's name, part of the run folder's",
        pattern=r"\A[^/\\\x00-\x1f]{1,100}\Z",
        description="a name of up to 100 characters without /",
    )
    summary: str = _field("", "one line for `equipoise recipes`")
    method: Method = _field("bcl", "what is trained (equipoise recipes --methods explains them)")  # noqa: RUF009 the rule does not know the alias
    seed: int = _field(0, "everything random follows from it", ge=0, le=2**31 - 1)
    epochs: int = _field(90, "passes over the training images", ge=1, le=1_000_000)
    batch_size: int = _field(256, "images a step (each gives three views), over all processes", "b", ge=2)
    micro_batch: int = _field(0, "images that pass the encoder at a time, to save memory (0: all of a process)", ge=0)
    device: str = _field(
        "auto",
        "auto takes cuda, then mps, then cpu; cuda:1 is the second GPU",
        pattern=r"\A(auto|cpu|mps|cuda(:\d{1,3})?)\Z",
        description="one of auto, cpu, cuda, cuda:N, mps",
    )
    precision: Literal["auto", "fp32", "bf16"] = _field(
        "auto", "auto takes bf16 where the device is built for it; in fp32, a GPU's convolutions are in TF32"
    )
    compile: bool = _field(False, "let torch compile the encoder first: minutes once; steps may be faster")
    cuda_graph: bool = _field(False, "launch a full batch's step at once, on one GPU: small networks train faster")
    deterministic: bool = _field(False, "the same bits in every run on a GPU too, which is slower there")
    workers: int = _field(-1, "loader threads, or processes for a GPU (-1: one a core)", "j", ge=-1, le=512)
    log_every: int = _field(20, "steps between two lines of metrics.jsonl", "p", "print-freq", ge=1)
    checkpoint_minutes: float = _field(10.0, "minutes between two checkpoints within an epoch", gt=0)
    track: Literal["none", "tensorboard", "mlflow", "wandb"] = _field(
        "none", "show settings, losses and accuracies in this tracker too (pip install it)"
    )
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
    help: str
    flags: tuple[str, ...]  # further names of its flag
    length: int | None  # of a tuple
    bounds: Meta

    @property
    def key(self) -> str:
        return ".".join(self.path)

    @property
    def names(self) -> tuple[str, ...]:
        """The names by which it can be overridden, its own first, in the command line's spelling."""
        return (self.path[-1].replace("_", "-"), *self.flags)


@cache
def recipe_fields(table: Any = Recipe, prefix: tuple[str, ...] = ()) -> tuple[Field, ...]:
    """All fields, in the order of the file; or those of a table in it."""
    fields: list[Field] = []
    for one in dataclasses.fields(table):
        path = (*prefix, one.name)
        of_table = dataclasses.is_dataclass(one.type)
        fields += recipe_fields(one.type, path) if of_table else [Field(path, one.type, **one.metadata)]
    return tuple(fields)


def find_field(name: str) -> Field:
    """The field called `name` (`optim.lr`, `lr`, `weight_decay`, `weight-decay`). Raises UserError for another."""
    for field in recipe_fields():
        if name.replace("_", "-") in (field.key.replace("_", "-"), *field.names):
            return field
    names = [field.key if "." in name else field.path[-1] for field in recipe_fields()]
    raise UserError(f"no recipe field is called '{name}'{nearest(name, names)}")


def nearest(word: str, valid: list[str]) -> str:
    """'; did you mean ...?' where something valid is near, else the whole list if it is short."""
    close = difflib.get_close_matches(word, valid, n=2, cutoff=0.75)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; there are: {', '.join(valid)}" if len(valid) <= 12 else ""


def field_value(recipe: Recipe, field: Field) -> Any:
    """The value that `recipe` has at `field`."""
    return reduce(getattr, field.path, recipe)


def override(recipe: Recipe, field: Field, value: Any) -> Recipe:
    """`recipe` with `field` set to `value`, which may be text (`"0.1"`, as from a command line); another method comes
    with what it has `PUBLISHED`. Raises UserError that names the field and says what it may be."""
    *section, name = field.path
    changed: dict[str, Any] = {name: _checked(field, value)}
    if name == "method" and changed[name] != recipe.method:
        for key, published in PUBLISHED.get(changed[name], {}).items():
            recipe = override(recipe, find_field(key), published)
    return replace(recipe, **{section[0]: replace(getattr(recipe, section[0]), **changed)} if section else changed)


def override_all(recipe: Recipe, settings: Iterable[tuple[Field, Any]]) -> Recipe:
    """All of these, the method first, as it brings others along."""
    for field, value in sorted(settings, key=lambda setting: setting[0].key != "method"):
        recipe = override(recipe, field, value)
    return recipe


def _checked(field: Field, value: Any) -> Any:
    """`value` as the field's type, within its bounds. Raises UserError."""
    several = get_origin(field.type) is tuple
    given = value.replace(",", " ").split() if several and isinstance(value, str) else value
    strict = not isinstance(given, str | list)  # text may stand for a number; True may not
    bounded: Any = Annotated[float if several else field.type, field.bounds]
    if several:
        bounded = Annotated[tuple[bounded, ...], Meta(min_length=field.length, max_length=field.length)]
    try:
        converted = msgspec.convert(given, bounded, strict=strict)
        numbers = converted if several else (converted,)
        if field.type is str:
            converted.encode()  # the name of a file may be no valid text, which recipe.toml could not hold
        if all(math.isfinite(number) for number in numbers if isinstance(number, float)):
            return converted
    except ValueError:  # of msgspec too
        pass
    raise UserError(f"{field.key} must be {_expected(field)}, not {shown(value)}")


def _expected(field: Field) -> str:
    """What a field takes, for messages."""
    if get_origin(field.type) is Literal:
        return f"one of {', '.join(filter(None, get_args(field.type)))}"
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: field.bounds.description or "text"}
    kind = kinds.get(field.type) or f"{field.length or 'a list of'} numbers"
    limits = {"above": field.bounds.gt, "at least": field.bounds.ge, "at most": field.bounds.le}
    said = " and ".join(f"{words} {limit:.12g}" for words, limit in limits.items() if limit is not None)
    return f"{kind}, {said}" if said else kind
