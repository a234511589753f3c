"""Readers of files on a million damaged ones: `make fuzz`, or `python -m benchmarks.fuzz [INPUTS] [READER ...]`.

What is held to: a reader gives a valid result or a `UserError` of one line, in which no library speaks of its objects
and classes, never another exception, within 20 seconds. Atheris makes the inputs, from small whole files and by what
the code does with them. Those that went somewhere new, and those that failed, are kept in build/fuzz; the next run
starts from the former. Formats that a library reads whole (Parquet, torch's and safetensors' files) are not
here: their libraries are fuzzed elsewhere, and what we do with their errors is tested in the rooms.
"""

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

KEPT = Path("build") / "fuzz"
_INSIDE = re.compile(r" object at 0x|<class '|\w(Error|Exception)\b|\n")


def _instrumented() -> contextlib.AbstractContextManager[Any]:
    """Where Atheris is at work, it must see these modules before anything else imports them."""
    if "--one" not in sys.argv:
        return contextlib.nullcontext()
    import atheris

    return atheris.instrument_imports(include=["equipoise", "tomllib", "PIL"])


with _instrumented():
    from equipoise import UserError
    from equipoise.config.reading import load_recipe, recipe_toml
    from equipoise.config.recipe import Recipe
    from equipoise.data.decode import decode
    from equipoise.data.images import ImageFiles, ImageList
    from equipoise.data.lists import read_list
    from equipoise.data.packed import pack
    from equipoise.data.sources import find_parts
    from equipoise.deploy.hub import read_hub_folder
    from equipoise.evaluation.shift import in_class_order, read_weights
    from equipoise.report.page import read_runs
    from equipoise.runs.records import read_bad_images, read_metrics, read_record


@dataclass(frozen=True)
class Reader:
    """`read` reads the file `name`; `seeds` are whole ones; `share` of all inputs it gets."""

    name: str
    seeds: Callable[[], list[bytes]]
    read: Callable[[Path], object]
    share: float = 1.0


# ---------------------------------------------------------------------------------------------- whole files


def _images() -> list[bytes]:
    y, x = np.mgrid[0:9, 0:12]
    photo = Image.fromarray(np.stack([20 * x, 25 * y, 128 + 0 * x], axis=-1).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    wanted: list[tuple[str, str, dict[str, Any]]] = [
        *[("RGB", kind, {}) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")],
        *[(mode, "PNG", {}) for mode in ("L", "LA", "P", "1", "RGBA")],
        *[(mode, "TIFF", {"compression": "tiff_lzw"}) for mode in ("CMYK", "RGB")],
        *[("RGB", kind, {"exif": exif}) for kind in ("JPEG", "PNG", "WEBP")],
        ("CMYK", "JPEG", {}),
        ("RGB", "JPEG", {"progressive": True}),
        ("P", "PNG", {"transparency": 3}),
        *[("RGB", kind, {"save_all": True, "append_images": [photo.rotate(180)]}) for kind in ("GIF", "WEBP", "PNG")],
    ]
    files: list[bytes] = []
    for mode, kind, options in wanted:
        file = io.BytesIO()
        photo.convert(mode).save(file, kind, **options)
        files.append(file.getvalue())
    sixteen_bits = np.asarray(photo).astype(np.uint16) * 257
    return [*files, *(cv2.imencode(ending, sixteen_bits)[1].tobytes() for ending in (".png", ".tiff"))]


def _lists() -> list[bytes]:
    return [
        b"train/a b/1.jpg 0\ntrain/c/2.jpg 1\n",
        b"x/1.jpg\t0\r\n\r\n./x//2.jpg 0\n",
        "ä/ö.jpg 1\nü/1.jpg 0".encode(),
    ]


def _tars() -> list[bytes]:
    """One of others, with a label of each kind, and what `pack` makes of it in one part."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "x.tar")
        labels = {"0.cls": b"1", "1.json": b'{"label": 0}', "2.txt": b"1\n"}
        with tarfile.open(file, "w") as tar:
            for label, content in labels.items():
                for name, held in ((f"{label[0]}.png", _images()[0]), (label, content)):
                    member = tarfile.TarInfo(name)
                    member.size = len(held)
                    tar.addfile(member, io.BytesIO(held))
        pack(find_parts(str(file)), Path(folder, "out"), 8, 0)
        return [file.read_bytes(), *(packed.read_bytes() for packed in Path(folder, "out").iterdir())]


def _annotations() -> list[bytes]:
    images = [{"id": number, "file_name": f"train_val2018/A/{number}.jpg", "width": 800} for number in range(3)]
    annotations = [{"id": 9 - number, "image_id": number, "category_id": number % 2} for number in range(3)]
    table = {"info": {"year": 2018}, "images": images, "annotations": annotations, "categories": []}
    return [json.dumps(table).encode(), json.dumps(table, indent=1).encode()]


def _recipes() -> list[bytes]:
    folder = Path(__file__).parents[1] / "src" / "equipoise" / "config" / "recipes"
    return [recipe_toml(Recipe()).encode(), *(file.read_bytes() for file in sorted(folder.glob("*.toml")))]


def _hub_config() -> bytes:
    about = {"recipe": asdict(Recipe()), "class_names": ["a", "b"], "class_counts": [5, 1], "temperature": 1.5}
    return json.dumps({"architecture": "resnet8", "equipoise": {**about, "epoch": 4, "step": 20}}).encode()


_COUNTS = {"ant": 120, "bee": 30, "cat": 2}  # of the training images


def _metrics() -> bytes:
    shares = {"top1": 0.7, "mean_per_class": 0.5, "many": 1.0, "medium": 0.5, "few": 0.0}
    row = {"tau": 1.0, **shares}
    further = {
        "macro_f1": 0.5,
        "worst_class": 0.0,
        "worst_tenth": 0.0,
        "ece": 0.1,
        "top5": None,
        "false_head_rate": 0.5,
    }
    figures = {
        **shares,
        **further,
        "images": 9,
        "per_class": [1.0, 0.5, 0.0],
        "intervals": {"top1": [0.4, 0.9], "mean_per_class": [0.2, 0.8]},
        "per_class_intervals": [[0.5, 1.0], [0.1, 0.9], None],
        "prior_sweep": [{**row, "tau": 0.0}, row],
    }
    post_hoc = {"tau": 1.0, "chosen_on": "validation", "validation": row, "test": row}
    block = {"epoch": 2, "step": 6, "test": figures, "validation": figures, "post_hoc": post_hoc, "temperature": 1.5}
    cost = {"seconds": 1.5, "images_seen": 20, "multiply_adds": 9, "parameters": 7, "trained_parameters": 5}
    table = {"method": "bcl", "test": figures, "validation": figures, "last": block, "best": {**block, "epoch": 1},
             "cost": cost, "bad_images": {"test": {"a.jpg": "empty"}}, "class_names": list(_COUNTS),
             "train_counts": list(_COUNTS.values())}  # fmt: skip
    return json.dumps(table).encode()


def _record() -> bytes:
    table = {"command": "equipoise train", "started": "2026-11-24T12:00:00Z", "precision": "fp32", "launch": "",
             "processes": 1, "versions": {"torch": "2.6"}, "machine": {"device": "cpu", "threads": 1},
             "class_counts": _COUNTS,
             "data": {"kind": "class folders", "lists": [], "notes": [], "images": {"train": 152, "test": 9},
                      "fingerprints": {"train": "f00", "test": "f01"}}}  # fmt: skip
    return json.dumps(table).encode()


def _log() -> bytes:
    lines = [
        {"kind": "train", "step": 3, "epoch": 0, "loss": 2.5, "classification": 1, "contrastive": 0.5, "lr": 0.1},
        {"kind": "validation", "step": 3, "epoch": 0, "mean_per_class": 0.5, "few": None, "top1": 0.7},
        {"kind": "train", "step": 6, "epoch": 1, "loss": 1.5, "classification": 1, "contrastive": 0.25, "lr": 0.01},
    ]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


# ---------------------------------------------------------------------------------------------- the readers


def _decode(file: Path) -> object:
    pixels = decode(ImageList("", ImageFiles.of(file.parent, [file.name]), np.zeros(1, np.int64), ("x",)), 0)
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert pixels.dtype == np.uint8
    return pixels


def _read_list(file: Path) -> object:
    read = read_list(file)
    assert len(read.labels_N) == len(read.paths_N) > 0
    assert not any(path.startswith((b"/", b"../")) for path in read.paths_N.tolist())
    return read


def _read_tar(file: Path) -> object:
    parts = find_parts(str(file)).parts
    return [decode(images, row) for images in parts.values() for row in range(len(images))]


def _read_recipe(file: Path) -> object:
    recipe = load_recipe(file)
    file.write_text(recipe_toml(recipe), encoding="utf-8")
    assert load_recipe(file) == recipe
    return recipe


def _read_prior(file: Path) -> object:
    weights = read_weights(file)
    return in_class_order(weights, tuple(weights) or ("ant",))  # a model has classes


def _read_hub_config(file: Path) -> object:
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, file.parent / "model.safetensors")
    save_file({"classifier.weight": torch.ones(2, 3)}, file.parent / "head.safetensors")
    return read_hub_folder(file.parent)


def _read_log(file: Path) -> object:
    """As the report reads it."""
    (file.parent / "recipe.toml").write_text(recipe_toml(load_recipe("digits-lt", data="nowhere")), encoding="utf-8")
    (file.parent / "metrics.json").write_bytes(_metrics())
    (file.parent / "run.json").write_bytes(_record())
    return read_runs([file.parent])


READERS = {
    "image": Reader("x.jpg", _images, _decode, share=3),
    "list": Reader("list.txt", _lists, _read_list, share=2),
    "annotations": Reader("train2018.json", _annotations, _read_list, share=2),
    "tar": Reader("x.tar", _tars, _read_tar),
    "recipe": Reader("recipe.toml", _recipes, _read_recipe),
    "metrics": Reader("metrics.json", lambda: [_metrics()], read_metrics, share=0.5),
    "record": Reader("run.json", lambda: [_record()], read_record, share=0.5),
    "log": Reader("metrics.jsonl", lambda: [_log()], _read_log, share=0.5),
    "bad-images": Reader("bad-images.json", lambda: [b'{"train": {"a.jpg": "empty"}}'], read_bad_images, share=0.3),
    "hub-config": Reader("config.json", lambda: [_hub_config()], _read_hub_config, share=0.5),
    "prior-csv": Reader("prior.csv", lambda: [b'class,weight\na,1\n"b, c",2.5\n'], _read_prior, share=0.5),
}


# ---------------------------------------------------------------------------------------------- one input


def examine(reader: Reader, content: bytes, folder: Path) -> bool:
    """Whether the reader gives a result for the input, and not an error of the user's. Raises whatever else the reader
    raises, and ValueError for a message with the inside of a library."""
    file = folder / reader.name
    file.write_bytes(content)
    try:
        reader.read(file)
    except UserError as error:
        if _INSIDE.search(str(error)):
            raise ValueError(f"a message with the inside of a library: {error}") from None
        return False
    return True


# ---------------------------------------------------------------------------------------------- many inputs


def _fuzz(name: str, inputs: int) -> None:
    """In a process of its own: Atheris ends it."""
    import atheris

    reader = READERS[name]
    counts = np.memmap(KEPT / f"{name}.counts", np.int64, "w+", shape=(2,))  # inputs, valid
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    for seed in reader.seeds():
        examine(reader, seed, folder)

    def one(content: bytes) -> None:
        counts[0] += 1
        counts[1] += examine(reader, content, folder)

    options = [f"-runs={inputs}", "-timeout=20", "-rss_limit_mb=4096", f"-artifact_prefix={KEPT}/failed-{name}-"]
    atheris.Setup([sys.argv[0], *options, str(KEPT / name)], one)
    atheris.Fuzz()


def _run(name: str, inputs: int) -> tuple[str, int, list[int]]:
    corpus = KEPT / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(READERS[name].seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    words = [sys.executable, "-m", "benchmarks.fuzz", "--one", name, str(inputs)]
    started = time.monotonic()
    with (KEPT / f"{name}.log").open("wb") as log:
        code = subprocess.run(words, stdout=log, stderr=log, check=False).returncode
    counts = np.fromfile(KEPT / f"{name}.counts", np.int64).tolist()
    told = f"{counts[0]:>9,} inputs, {counts[1]:>8,} valid"
    verdict = "" if code == 0 else f"  FAILED: {KEPT}/{name}.log, {KEPT}/failed-{name}-*"
    print(f"{name:<17}{told}, {time.monotonic() - started:4.0f} s{verdict}", flush=True)
    return name, code, counts


def _shares(names: list[str], inputs: int) -> Iterator[tuple[str, int]]:
    whole = sum(READERS[name].share for name in names)
    for name in names:
        yield name, round(inputs * READERS[name].share / whole)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inputs", nargs="?", type=int, default=1_000_000)
    parser.add_argument("readers", nargs="*", help=", ".join(READERS))
    parser.add_argument("--one", metavar="READER", help="this reader, in this process")
    options = parser.parse_args()
    if options.one:
        _fuzz(options.one, options.inputs)
    KEPT.mkdir(parents=True, exist_ok=True)
    names = options.readers or list(READERS)
    if not set(names) <= set(READERS):
        parser.error(f"the readers are {', '.join(READERS)}")
    started = time.monotonic()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2) as pool:
        results = list(pool.map(lambda share: _run(*share), _shares(names, options.inputs)))
    inputs, valid = (sum(counts[column] for _, _, counts in results) for column in (0, 1))
    failed = [name for name, code, _ in results if code]
    print(
        f"{inputs:,} inputs to {len(results)} readers in {time.monotonic() - started:,.0f} s: {valid:,} gave a result, "
        f"{inputs - valid:,} a UserError; failed: {', '.join(failed) or 'none'}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
