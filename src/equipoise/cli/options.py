"""The commands and their options. Nothing heavy is imported here: `equipoise --help` does not wait for torch."""

from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from typing import get_args

from equipoise.authors.flags import add_authors_flags
from equipoise.cli.flags import DEMO, add_field, add_recipe_flags, add_set, seconds
from equipoise.config.reading import shipped_recipes
from equipoise.config.recipe import SECOND_STAGES, Method, find_field, recipe_fields

ENDINGS = {"onnx": ".onnx", "safetensors": "-safetensors", "torch-export": ".pt2"}  # of what `export` writes
_BUDGET = "time limit for own pictures, as 30m or 2h, within which a recipe is chosen"
_CHOSEN = "the best checkpoint where validation chose one, else the last"
_TARGET = f"a run folder ({_CHOSEN}), a checkpoint, or a folder from --to safetensors"
_VIEWS = "views of a BCL authors' checkpoint [imagenet-lt]"
_FORMS = (
    "onnx: one file for ONNX Runtime and the like; safetensors: a folder for a model hub, which equipoise.load() opens "
    "and whose encoder timm loads; torch-export: one file for torch.export.load"
)


def _train(command: ArgumentParser, arguments: Sequence[str]) -> None:
    add = command.add_argument
    default = f"without one: {DEMO}, or with --data what is recognised there, else one sized to data and machine"
    recipe = f"a shipped recipe ({', '.join(shipped_recipes())}) or a TOML file; {default}"
    add("recipe", nargs="?", metavar="RECIPE", help=recipe)
    add("--out", metavar="FOLDER", help="the run folder [runs/RECIPE-METHOD-TIME]; of --reload, a file for metrics")
    add("--budget", metavar="TIME", type=seconds, help=_BUDGET)
    add("--beside", choices=get_args(Method), help="train this method too, and show both (the demo: ce)")
    command.set_defaults(logits=None, label_shift=False, none_of_these=None)  # options of `evaluate`
    add_authors_flags(command)
    add_recipe_flags(command, arguments)


def _retune(command: ArgumentParser, _: Sequence[str]) -> None:
    add = command.add_argument
    add("target", metavar="RUN", help="a run folder (its best checkpoint, or else the last), or a checkpoint")
    stages = (
        "anew with classes drawn alike (crt), label smoothing 0.98 (los) or balanced softmax; a scale for each class, "
        "learned (lws) or a power of its weights' norm, which validation chooses (tau-norm); nearest class mean (ncm)"
    )
    add("--with", dest="stage", choices=tuple(SECOND_STAGES), required=True, help=stages)
    add("--out", metavar="FOLDER", help="the run folder [runs/RECIPE-STAGE-METHOD-TIME]")
    add_set(command)


def _init(command: ArgumentParser, arguments: Sequence[str]) -> None:
    add = command.add_argument
    add("data.path", metavar="FOLDER", help="own pictures, as for train")
    add("--budget", metavar="TIME", type=seconds, help=_BUDGET)
    add("--out", metavar="FILE.toml", default="recipe.toml", help="the recipe's file [%(default)s]")
    command.set_defaults(recipe=None, dataset=None, resume=None)  # options of `train`
    add_recipe_flags(command, arguments, without="data.path")


def _compare(command: ArgumentParser, arguments: Sequence[str]) -> None:
    add = command.add_argument
    add("recipe", metavar="RECIPE", help="a shipped recipe, a TOML file, or a run folder")
    add("--methods", default="bcl,ce,logit-adjusted", help="by commas; differences are to the first [%(default)s]")
    add("--seeds", type=int, default=3, help="how many, from --seed on [%(default)s]")
    add("--out", metavar="FOLDER", help="for the run folders; finished runs are kept (default: runs/compare-RECIPE)")
    add("--markdown", action="store_true", help="print what compare.md holds, and all else to stderr")
    command.set_defaults(dataset=None, resume=None)  # options of `train`
    add_recipe_flags(command, arguments)


def _evaluate(command: ArgumentParser, _: Sequence[str]) -> None:
    add = command.add_argument
    both = f"on its own data a run's checkpoints are both scored; with --data, --split and the like, {_CHOSEN}"
    add("target", metavar="RUN_OR_CHECKPOINT", help=f"a run folder, a .pt file, or the authors' .pth.tar; {both}")
    add("--data", help="other data of the same classes (default: the run's own)")
    parts = "train", "validation", "test"
    add("--split", choices=parts, help="the part to score (default: test, or validation where there is no test)")
    add("--out", metavar="FILE", help="where to write the metrics (default: beside the checkpoint)")
    add("--logits", metavar="FILE", help="write the logits of every image too, as .npz")
    add("--none-of-these", metavar="FOLDER", help="pictures of no class: how well they are told apart")
    add("--label-shift", action="store_true", help="the accuracy under other class priors, up to 50 to 1")
    add_set(command, "data.val_list", "data.test_list", "data.on_bad_image", "data.allow_outside", "device")


def _report(command: ArgumentParser, _: Sequence[str]) -> None:
    add = command.add_argument
    add("runs", metavar="RUN", nargs="+", help=f"a run folder; one that stopped early will do. Shown: {_CHOSEN}")
    add("--out", metavar="FILE", help="the page (default: report.html in the first run folder)")


def _recipes(command: ArgumentParser, _: Sequence[str]) -> None:
    command.add_argument("--methods", action="store_true", help="the methods instead, which --method chooses from")


def _data(command: ArgumentParser, _: Sequence[str]) -> None:
    add = command.add_argument
    add("data.path", metavar="PATH", help="a data set, as for train; or a list file in its folder")
    add("--check", action="store_true", help="decode every image; exit code 1 for bad ones, copies, what train refuses")
    add("--report", metavar="FILE.html", help="the same, and a page with copies, sizes and odd images in pictures")
    add("--check-labels", action="store_true", help="the labels that are most probably wrong: in minutes; no failure")
    of_data = [field.key for field in recipe_fields() if field.path[0] == "data" and field.key != "data.path"]
    add_set(command, *of_data)


def _pack(command: ArgumentParser, _: Sequence[str]) -> None:
    add = command.add_argument
    add("data.path", metavar="DATA", help="any data that `train` takes as files of images")
    add("--out", metavar="FOLDER", required=True, help="then: equipoise train --data FOLDER")
    add("--short-side", type=int, default=256, metavar="PIXELS", help="larger images are resized to it, as JPEG [256]")
    add_set(command, "workers", "data.train_list", "data.val_list", "data.test_list")


def _predict(command: ArgumentParser, _: Sequence[str]) -> None:
    add = command.add_argument
    add("target", metavar="RUN", help=_TARGET)
    add("paths", metavar="IMAGES_OR_FOLDER", nargs="*", help="image files, and folders of them")
    add("--list", metavar="FILE", help="a file with one path a line, from the working directory (-: standard input)")
    add("--top", type=int, default=5, metavar="K", help="classes an image, the most probable first [5]")
    written = command.add_mutually_exclusive_group()
    instead = "write a line for each image instead of the table; - is standard output, and all else goes to stderr"
    written.add_argument("--csv", metavar="FILE", help=instead)
    written.add_argument("--json", metavar="FILE", help="the same as JSON, with the files that were passed over")
    add("--explain", type=int, metavar="N", help="show the N nearest training images, by features kept in ~/.cache")
    prior = "class frequencies: equal, as in training, estimated from these images, or a CSV file of weights [uniform]"
    add("--prior", default="uniform", metavar="uniform|train|estimate|FILE", help=prior)
    add("--recipe", default="imagenet-lt", metavar="RECIPE", help=_VIEWS)
    add_field(command, find_field("device"))
    command.epilog = "Exit code: 0 where every file was predicted, 1 where some were passed over, 2 where all were."


def _serve(command: ArgumentParser, _: Sequence[str]) -> None:
    add = command.add_argument
    add("target", metavar="RUN", help=_TARGET)
    add("--port", type=int, default=8000, help="where on this machine, 0 for any that is free [%(default)s]")
    near = "show the N nearest training images, by features kept in ~/.cache; 0 for none [%(default)s]"
    add("--explain", type=int, default=4, metavar="N", help=near)
    add("--recipe", default="imagenet-lt", metavar="RECIPE", help=_VIEWS)
    add_field(command, find_field("device"))


def _export(command: ArgumentParser, _: Sequence[str]) -> None:
    add = command.add_argument
    add("target", metavar="RUN_OR_CHECKPOINT", help=_TARGET)
    add("--to", choices=tuple(ENDINGS), required=True, help=_FORMS)
    add("--out", metavar="FILE", help="what to write (default: beside the checkpoint)")


def _completion(command: ArgumentParser, _: Sequence[str]) -> None:
    command.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="see docs/terminal.md for where it belongs")


# Of each command: its summary, the module that has a function of its name, and what adds its options.
COMMANDS: dict[str, tuple[str, str, Callable[[ArgumentParser, Sequence[str]], None]]] = {
    "train": ("train a classifier from a recipe", "train", _train),
    "retune": ("another classifier on the encoder of a run", "train", _retune),
    "init": ("write the recipe for own pictures, explained", "train", _init),
    "compare": ("train several methods with several seeds", "train", _compare),
    "evaluate": ("score a run or a checkpoint", "use", _evaluate),
    "report": ("write runs as one HTML page, side by side", "use", _report),
    "recipes": ("the recipes that come with the package", "main", _recipes),
    "data": ("what a folder holds: classes, counts, problems", "train", _data),
    "pack": ("re-encode images once, smaller, into tars of WebDataset", "train", _pack),
    "predict": ("name the classes of images", "use", _predict),
    "serve": ("try a model on a page in the browser, or by HTTP", "use", _serve),
    "export": ("write a run in another layout", "use", _export),
    "doctor": ("what a bug report needs: versions, devices, speed", "doctor", lambda command, _: None),
    "completion": ("what a shell must read to complete these commands", "main", _completion),
}
