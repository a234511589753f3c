"""A rehearsal of the BCL authors' experiments: their three commands on miniature ImageNet-LT and iNaturalist 2018.

    make rehearsal [PHOTOS=FOLDER]         # = python -m benchmarks.rehearsal [FOLDER]

The trees have the layout and the names of the real ones, with the lists or the official JSON beside them. Their
pictures are crops of the photographs in FOLDER, a class from each photograph, or are drawn. The commands are those of
the authors' README, for two epochs at a small size, with both of their encoders. What they leave is checked; it stays
in runs/rehearsal.
"""

import argparse
import hashlib
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from equipoise.runs.checkpoint import Checkpoint

COUNTS = (40, 24, 14, 8, 5, 3)  # training images of each class
PER_CLASS = 3  # images of each class in validation and test parts
PLACE = Path("runs") / "rehearsal"
# The authors' README, with its paths and its epochs open.
_TRAIN = "-p 200 --epochs {epochs} --arch {arch} --use-norm True"
TRAIN_IMAGENET = f"--data {{data}} --lr 0.1 {_TRAIN} --wd 5e-4 --cos True --cl_views {{views}}"
TRAIN_INATURALIST = f"--data {{data}} --lr 0.2 {_TRAIN} --wd 1e-4 --cos True --cl_views {{views}}"
EVALUATE_IMAGENET = (
    "--data {data} --arch {arch} --use-norm True --p 10 --reload True --resume log/{name}/bcl_ckpt.best.pth.tar"
)


# ---------------------------------------------------------------------------------------------- pictures


def pictures(photos: Path | None, classes: int) -> list[tuple[str, Image.Image]]:
    """A large picture for each class, with a name."""
    files = sorted(p for p in photos.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png")) if photos else []
    if photos and len(files) < classes:
        raise SystemExit(f"{photos} holds {len(files)} photographs; {classes} are needed")
    chosen = [files[position * len(files) // classes] for position in range(classes)] if photos else []
    if chosen:
        return [(file.stem, Image.open(file).convert("RGB")) for file in chosen]
    return [(f"drawn{label}", _drawn(label)) for label in range(classes)]


def _drawn(label: int) -> Image.Image:
    """Stripes of the class's direction and colours, on noise."""
    generator = np.random.default_rng(label)
    y, x = np.mgrid[0:360, 0:480]
    turn = math.pi * label / len(COUNTS)
    stripes = np.sin((x * math.cos(turn) + y * math.sin(turn)) / (8 + 2 * label))[..., None]
    colour, other = generator.integers(40, 216, (2, 3))
    pixels = np.where(stripes > 0, colour, other) + generator.normal(0, 20, (360, 480, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def crops(picture: Image.Image, seed: int) -> Iterator[Image.Image]:
    """Different pictures of one thing: crops of at least half of each side, at most 160 pixels long."""
    generator = np.random.default_rng(seed)
    while True:
        width, height = (int(side * generator.uniform(0.5, 0.9)) for side in picture.size)
        left, top = int(generator.integers(picture.width - width)), int(generator.integers(picture.height - height))
        crop = picture.crop((left, top, left + width, top + height))
        crop.thumbnail((160, 160))
        yield crop


# ---------------------------------------------------------------------------------------------- trees


def build_imagenet(root: Path, photos: Path | None = None, counts: tuple[int, ...] = COUNTS) -> Path:
    """`train/WNID/WNID_n.JPEG`, `val/WNID/ILSVRC2012_val_n.JPEG` and the three lists of ImageNet-LT."""
    lines: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for label, (name, picture) in enumerate(pictures(photos, len(counts))):
        wnid = name[:9] if re.match(r"n\d{8}", name) else f"n{label:08}"
        source = crops(picture, label)
        for number in range(
            counts[label] + PER_CLASS
        ):  # validation images come from the train folder, as in ImageNet-LT
            path = f"train/{wnid}/{wnid}_{number * 37}.JPEG"
            _save(next(source), root / path)
            lines["train" if number < counts[label] else "val"].append(f"{path} {label}\n")
        for number in range(PER_CLASS):
            path = f"val/{wnid}/ILSVRC2012_val_{label * PER_CLASS + number + 1:08}.JPEG"
            _save(next(source), root / path)
            lines["test"].append(f"{path} {label}\n")
    for part, text in lines.items():
        (root / f"ImageNet_LT_{part}.txt").write_text("".join(text), encoding="utf-8")
    return root


def build_inaturalist(root: Path, photos: Path | None = None, counts: tuple[int, ...] = COUNTS) -> Path:
    """`train_val2018/GROUP/CATEGORY/HASH.jpg`, `train2018.json` and `val2018.json`, as officially published."""
    tables: dict[str, dict[str, Any]] = {
        part: {"info": {"year": 2018}, "images": [], "annotations": [], "categories": []} for part in ("train", "val")
    }
    for label, (_, picture) in enumerate(pictures(photos, len(counts))):
        source = crops(picture, 100 + label)
        for number in range(counts[label] + PER_CLASS):
            part = tables["train" if number < counts[label] else "val"]
            name = hashlib.md5(f"{label} {number}".encode(), usedforsecurity=False).hexdigest()
            path = f"train_val2018/{('Plantae', 'Insecta', 'Aves')[label % 3]}/{label}/{name}.jpg"
            _save(next(source), root / path)
            identity = 10_000 * (label + 1) + number
            part["images"].append({"id": identity, "file_name": path, "height": 0, "width": 0, "rights_holder": ""})
            part["annotations"].append({"id": identity, "image_id": identity, "category_id": label})
    for part, table in tables.items():
        (root / f"{part}2018.json").write_text(json.dumps(table), encoding="utf-8")
    return root


def _save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, "JPEG", quality=90)


# ---------------------------------------------------------------------------------------------- commands and checks


def equipoise(words: str, place: Path) -> str:
    """What `equipoise WORDS` prints, in the folder `place`. Ends the rehearsal if it fails."""
    print(f"$ equipoise {words}", flush=True)
    command = [sys.executable, "-m", "equipoise", *shlex.split(words)]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{done.stderr}\nexit code {done.returncode}")
    return done.stdout


class Checks:
    """Counts what holds; ends the rehearsal at the first thing that does not."""

    def __init__(self) -> None:
        self.passed = 0

    def __call__(self, what: str, holds: bool) -> None:
        if not holds:
            raise SystemExit(f"the rehearsal failed: {what}")
        self.passed += 1


def write_as_authors(checkpoint: "Checkpoint", file: Path) -> Path:
    """The checkpoint of a BCL run as the authors' code would have written it, without its optimizer."""
    import torch

    parts = {"encoder": "encoder", "projection": "head", "classifier": "fc", "prototype_projection": "head_fc"}
    state: dict[str, torch.Tensor] = {}
    for name, value in checkpoint.weights.items():
        part, _, rest = name.partition(".")
        state[f"module.{parts[part]}.{rest}"] = value.T if name == "classifier.weight" else value
    arch = checkpoint.recipe.model.encoder
    torch.save({"epoch": checkpoint.epoch, "arch": arch, "state_dict": state, "best_acc1": 57.25}, file)
    return file


def rehearse(place: Path, photos: Path | None, size: int, epochs: int, encoders: tuple[str, ...]) -> int:
    """Build both trees in `place`, run the commands, check what they leave; the number of checks passed."""
    from equipoise.config.reading import load_recipe
    from equipoise.runs.checkpoint import load_checkpoint

    imagenet = build_imagenet(place / "imagenet_2012", photos)
    inaturalist = build_inaturalist(place / "inat2018", photos)
    small = f"-b 16 --set views.size={size} --track tensorboard"
    check = Checks()

    def left(run: Path, images: dict[str, int]) -> dict[str, Any]:
        """The run's figures, after looking at everything that every run must leave."""
        metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
        record = json.loads((run / "run.json").read_text(encoding="utf-8"))
        check(f"{run} trained on the right images", record["data"]["images"] == images)
        check(f"{run} has the right class counts", metrics["train_counts"] == list(COUNTS))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        losses = [line["loss"] for line in lines if line["kind"] == "train"]
        check(f"{run} logged finite losses", bool(losses) and all(math.isfinite(loss) for loss in losses))
        steps = math.ceil(sum(COUNTS) / 16) * epochs
        check(f"{run} took {steps} steps", lines[-1]["step"] == steps)
        check(f"{run} has TensorBoard curves", any((run / "tensorboard").iterdir()))
        for checkpoint in ("last", "best"):
            if metrics[checkpoint]:
                figures = metrics[checkpoint]["test"]
                shown = [figures[name] for name in ("top1", "mean_per_class", "macro_f1", "worst_class", "ece")]
                check(f"{run}: {checkpoint} has figures", all(0 <= figure <= 1 for figure in shown))
                check(f"{run}: an absent group is absent", figures["many"] is None and figures["few"] is not None)
        return metrics

    for encoder in encoders:
        views = "sim-sim" if encoder == "resnet50" else "rand-rand"
        name = f"imagenet_{encoder}_batchsize16_epochs_{epochs}_temp_0.07_lr_0.1_{views}"
        options = {"arch": encoder, "epochs": epochs, "views": views, "name": name}

        said = equipoise(f"train {TRAIN_IMAGENET.format(data=imagenet.name, **options)} {small}", place)
        check(
            "the ImageNet tree is recognised",
            "no recipe named: taking 'imagenet-lt'" in said,
        )
        run = place / "log" / name
        per_part = len(COUNTS) * PER_CLASS
        metrics = left(run, {"train": sum(COUNTS), "validation": per_part, "test": per_part})
        check("validation chose a best checkpoint", metrics["best"] is not None and (run / "best.pt").is_file())
        recipe = load_recipe(run / "recipe.toml")
        check(
            "the flags are in the recipe",
            (recipe.model.encoder, recipe.views.cl_views, recipe.optim.lr) == (encoder, views, 0.1),
        )
        said = equipoise(f"train {EVALUATE_IMAGENET.format(data=imagenet.name, **options)} {small}", place)
        file = re.search(r"written: (\S+\.json)", said)
        scored = json.loads((place / file[1]).read_text(encoding="utf-8")) if file else {}
        check("--reload scores the test list", scored.get("split") == "test")
        check("--reload gives the figures of training", scored.get("test") == metrics["best"]["test"])

        best = load_checkpoint(run / "best.pt")
        write_as_authors(best, place / "theirs.pth.tar")
        longer = {**options, "epochs": epochs + 1}
        words = f"{TRAIN_IMAGENET.format(data=imagenet.name, **longer)} {small} --resume theirs.pth.tar"
        equipoise(f"train {words}", place)
        logged = (
            place / "log" / name.replace(f"epochs_{epochs}", f"epochs_{epochs + 1}") / "metrics.jsonl"
        ).read_text()
        first = json.loads(logged.splitlines()[0])["epoch"]
        check("training goes on from the authors' checkpoint", first == best.epoch)

        options["name"] = name = f"inat_{encoder}_batchsize16_epochs_{epochs}_temp_0.07_lr_0.2_{views}"
        said = equipoise(f"train {TRAIN_INATURALIST.format(data=inaturalist.name, **options)} {small}", place)
        check("the iNaturalist tree is recognised", "no recipe named: taking 'inat2018'" in said)
        run = place / "log" / name
        metrics = left(run, {"train": sum(COUNTS), "test": per_part})
        check("the test part chooses nothing", metrics["best"] is None and not (run / "best.pt").exists())
        check("iNaturalist has its own mean", load_recipe(run / "recipe.toml").views.mean == (0.466, 0.471, 0.380))
    return check.passed


def main() -> None:
    parser = argparse.ArgumentParser(description="Rehearse the BCL authors' commands on miniature data sets.")
    parser.add_argument("photos", nargs="?", type=Path, help="a folder of photographs (default: pictures are drawn)")
    parser.add_argument("--size", type=int, default=64, help="side of a training image, pixels")
    options = parser.parse_args()
    if options.photos and not options.photos.is_dir():
        raise SystemExit(f"there is no folder {options.photos}")
    shutil.rmtree(PLACE, ignore_errors=True)
    passed = rehearse(PLACE, options.photos, options.size, 2, ("resnet50", "resnext50"))
    print(f"the rehearsal passed: {passed} checks; its runs are in {PLACE / 'log'}")


if __name__ == "__main__":
    main()
