"""Every reader of files on a million damaged ones: `make fuzz`, or `python -m benchmarks.fuzz [INPUTS] [READER ...]`.

What is held to: a reader gives a valid result or a `UserError` of one line, in which no library speaks of its objects
and classes, never another exception, within 20 seconds. Atheris makes the inputs, from small whole files and by what
the code does with them. Those that went somewhere new, and those that
failed, are kept in build/fuzz; the next run starts from the former.
"""

import argparse
import contextlib
import gzip
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
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
    from equipoise.base.tensors import load_tensors
    from equipoise.config.recipe import Recipe, load_recipe, recipe_table, recipe_toml
    from equipoise.data.cifar import CifarArchive, open_cifar
    from equipoise.data.decode import decode
    from equipoise.data.images import ImageFiles, ImageList
    from equipoise.data.lists import departures, identity, image_lists, read_list
    from equipoise.data.pack import pack
    from equipoise.data.sources import find_parts
    from equipoise.deploy.hub import read_hub_folder
    from equipoise.deploy.predict import in_class_order, read_weights
    from equipoise.method.encoders import _read_weights
    from equipoise.report.page import _content
    from equipoise.report.read import read_runs
    from equipoise.runs.checkpoint import FORMAT, Checkpoint, load_checkpoint
    from equipoise.runs.records import read_bad_images, read_metrics, read_record


@dataclass(frozen=True)
class Reader:
    """`read` reads the file `name`, which `wrap` makes of an input: where a file is packed, damage alone would hardly
    ever come through. `seeds` are whole inputs; `share` of all inputs it gets."""

    name: str
    seeds: Callable[[], list[bytes]]
    read: Callable[[Path], object]
    wrap: Callable[[bytes], bytes] = bytes
    share: float = 1.0


# ---------------------------------------------------------------------------------------------- whole files


def _images() -> list[bytes]:
    y, x = np.mgrid[0:9, 0:12]
    photo = Image.fromarray(np.stack([20 * x, 25 * y, 128 + 0 * x], axis=-1).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    wanted: list[tuple[str, str, dict[str, Any]]] = [
        *[("RGB", kind, {}) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")],
        *[(mode, "PNG", {}) for mode in ("L", "LA", "P", "1", "RGBA", "I;16")],
        *[(mode, "TIFF", {}) for mode in ("CMYK", "1", "F", "I")],
        *[("RGB", "TIFF", {"compression": packing}) for packing in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits")],
        *[("RGB", kind, {"exif": exif}) for kind in ("JPEG", "PNG", "TIFF", "WEBP")],
        ("CMYK", "JPEG", {}),
        ("RGB", "JPEG", {"progressive": True}),
        ("P", "PNG", {"transparency": 3}),
        *[("RGB", kind, {"save_all": True, "append_images": [photo.rotate(180)]}) for kind in ("GIF", "WEBP", "PNG")],
    ]
    files: list[bytes] = []
    for mode, kind, options in wanted:
        file = io.BytesIO()
        image = (
            Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16)) if mode == "I;16" else photo.convert(mode)
        )
        image.save(file, kind, **options)
        files.append(file.getvalue())
    colour = np.asarray(photo).astype(np.uint16) * 257
    return [*files, *(cv2.imencode(ending, colour)[1].tobytes() for ending in (".png", ".tiff"))]


def _lists() -> list[bytes]:
    return [
        b"train/a b/1.jpg 0\ntrain/c/2.jpg 1\n",
        b"x/1.jpg\t0\r\n\r\n./x//2.jpg 0\n",
        "ä/ö.jpg 1\nü/1.jpg 0".encode(),
    ]


def _annotations() -> list[bytes]:
    images = [{"id": number, "file_name": f"train_val2018/A/{number}.jpg", "width": 800} for number in range(3)]
    annotations = [{"id": 9 - number, "image_id": number, "category_id": number % 2} for number in range(3)]
    table = {"info": {"year": 2018}, "images": images, "annotations": annotations, "categories": []}
    return [json.dumps(table).encode(), json.dumps(table, indent=1).encode()]


def _recipes() -> list[bytes]:
    folder = Path(__file__).parents[1] / "src" / "equipoise" / "config" / "recipes"
    return [recipe_toml(Recipe()).encode(), *(file.read_bytes() for file in sorted(folder.glob("*.toml")))]


def _tables() -> list[bytes]:
    content = _images()[0]
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    struct_of = pa.array(
        [{"bytes": content, "path": "x"}] * 3, pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    files: list[bytes] = []
    for packing in ("none", "snappy", "zstd"):
        for images in (struct_of, pa.array([content] * 3)):
            table = pa.table({"img": images, "label": pa.array([0, 1, 1])})
            metadata = {"huggingface": json.dumps({"info": {"features": features}})}
            file = io.BytesIO()
            pq.write_table(table.replace_schema_metadata(metadata), file, compression=packing)
            files.append(file.getvalue())
    return files


def _records() -> bytes:
    return (bytes([1]) + bytes(3072)) * 2


_TEN = b"ant\nbee\ncat\ndog\nemu\nfox\ngnu\nhen\nibis\njay\n"


def _cifar() -> dict[str, bytes]:
    """The files of a miniature CIFAR-10."""
    names = [f"data_batch_{number}.bin" for number in range(1, 6)] + ["test_batch.bin"]
    return {**dict.fromkeys(names, _records()), "batches.meta.txt": _TEN}


def _tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in _cifar().items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def _checkpoint() -> dict[str, Any]:
    return {
        "format": FORMAT,
        "recipe": recipe_table(Recipe()),
        "class_names": ["a", "b"],
        "class_counts": [5, 1],
        "epoch": 4,
        "step": 20,
        "best": (0.75, 3),
        "fingerprints": {"train": "f00"},
        "weights": {"classifier.weight": torch.ones(2, 3), "encoder.bias": torch.zeros(1)},
        "optimizer": {
            "state": {0: {"momentum_buffer": torch.ones(2, 3)}},
            "param_groups": [{"lr": 0.1, "params": [0]}],
        },
    }


def _authors_checkpoint() -> dict[str, Any]:
    shapes = {"encoder.x": [2], "fc.weight": [4, 3], "head.0.weight": [4, 4], "head.3.weight": [2, 4]}
    shapes |= {"head_fc.0.weight": [4, 4], "head_fc.3.weight": [2, 4]}
    state = {f"module.{name}": torch.ones(shape) for name, shape in shapes.items()}
    momentum = {0: {"momentum_buffer": torch.ones(2)}}
    return {"epoch": 3, "arch": "tiny", "best_acc1": np.float64(57.25), "state_dict": state,
            "optimizer": {"state": momentum, "param_groups": []}}  # fmt: skip


def _saved(table: object, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(table, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def _program(table: object) -> bytes:
    """The pickle inside of what `torch.save` writes."""
    with zipfile.ZipFile(io.BytesIO(_saved(table))) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def _around_program(program: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", b"little")
        for record in range(8):
            archive.writestr(f"archive/data/{record}", np.ones(8, np.float32).tobytes())
        archive.writestr("archive/version", b"3\n")
    return file.getvalue()


def _safetensors() -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}, "__metadata__": {"x": "y"}})
    return struct.pack("<Q", len(header)) + header.encode() + bytes(16)


# ---------------------------------------------------------------------------------------------- the readers


def _decode(file: Path) -> object:
    pixels = decode(ImageList("", ImageFiles.of(file.parent, [file.name]), np.zeros(1, np.int64), ("x",)), 0)
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert pixels.dtype == np.uint8
    return pixels


def _read_list(file: Path) -> object:
    read = read_list(file)
    lists, notes = image_lists({"train": read}, file.parent)
    assert sum(lists["train"].class_counts) == len(read.paths_N)
    assert not any(path.startswith((b"/", b"../")) for path in read.paths_N.tolist())
    return [*notes, identity(read), *departures(read)]


def _read_recipe(file: Path) -> object:
    recipe = load_recipe(file)
    file.write_text(recipe_toml(recipe), encoding="utf-8")
    assert load_recipe(file) == recipe
    return recipe


def _read_checkpoint(file: Path) -> object:
    """With the checksums put right: whoever makes a file on purpose does that."""
    torch.save(load_tensors(file, "checkpoint"), file)
    return load_checkpoint(file)


def _packed() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in zip(("a/1.jpg", "a/2.jpg", "b/3.jpg"), _images(), strict=False):
            path = Path(folder) / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        pack(find_parts(f"{folder}/data"), "", Path(folder) / "out", 256, 0)
        return (Path(folder) / "out" / "train.pack").read_bytes()


def _read_prior(file: Path) -> object:
    weights = read_weights(file)
    return in_class_order(weights, tuple(weights), str(file))


def _read_hub_config(file: Path) -> object:
    from safetensors.torch import save_file

    checkpoint = Checkpoint(Recipe(), ("a", "b"), (5, 1), 4, 20, None, {"classifier.weight": torch.ones(2, 3)}, {}, {})
    save_file({"x": torch.ones(2)}, file.parent / "model.safetensors")
    save_file(checkpoint.weights, file.parent / "head.safetensors")
    return read_hub_folder(file.parent)


def _hub_config() -> bytes:
    about = {"recipe": recipe_table(Recipe()), "class_names": ["a", "b"], "class_counts": [5, 1], "temperature": 1.5}
    return json.dumps({"architecture": "resnet8", "equipoise": {**about, "epoch": 4, "step": 20}}).encode()


_COUNTS = {"ant": 120, "bee": 30, "cat": 2}  # of the training images


def _metrics() -> dict[str, Any]:
    shares = {"top1": 0.7, "mean_per_class": 0.5, "many": 1.0, "medium": 0.5, "few": 0.0}
    row = {"tau": 1.0, **shares}
    further = {"macro_f1": 0.5, "worst_class": 0.0, "worst_tenth": 0.0, "ece": 0.1, "top5": None}
    figures = {
        **shares,
        **further,
        "images": 9,
        "per_class": [1.0, 0.5, 0.0],
        "prior_sweep": [{**row, "tau": 0.0}, row],
    }
    post_hoc = {"tau": 1.0, "chosen_on": "validation", "validation": row, "test": row}
    block = {"epoch": 2, "step": 6, "test": figures, "validation": figures, "post_hoc": post_hoc, "temperature": 1.5}
    return {"method": "bcl", "test": figures, "validation": figures, "last": block, "best": {**block, "epoch": 1},
            "bad_images": {"test": {"a.jpg": "empty"}}, "class_names": list(_COUNTS),
            "train_counts": list(_COUNTS.values())}  # fmt: skip


def _record() -> dict[str, Any]:
    return {"command": "equipoise train", "started": "2026-11-24T12:00:00Z", "precision": "fp32", "launch": "",
            "processes": 1, "versions": {"torch": "2.6"}, "machine": {"device": "cpu", "threads": 1},
            "git": {"commit": "f00", "changed": False}, "class_counts": _COUNTS,
            "data": {"kind": "class folders", "lists": [], "notes": [], "fingerprints": {"train": "f00", "test": "f01"},
                     "images": {"train": 152, "test": 9}}}  # fmt: skip


def _log() -> bytes:
    lines = [
        {"kind": "train", "step": 3, "epoch": 0, "loss": 2.5, "classification": 1, "contrastive": 0.5, "lr": 0.1},
        {"kind": "validation", "step": 3, "epoch": 0, "mean_per_class": 0.5, "few": None, "top1": 0.7},
        {"kind": "train", "step": 6, "epoch": 1, "loss": 1.5, "classification": 1, "contrastive": 0.25, "lr": 0.01},
    ]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def _observed() -> dict[str, Any]:
    spread, cosines = np.array([0.1, 0.5, np.nan], np.float32), np.ones((3, 200), np.int64)
    confidence = np.linspace(0.4, 1, 9, dtype=np.float32)
    spaces = {f"{space}_spread_C": spread for space in ("encoder", "contrastive")}
    means = ("encoder_means", "classifier", "contrastive_means", "prototypes")
    return {
        "labels_N": np.repeat(np.arange(3, dtype=np.int32), 3),
        "predicted_N": np.array([0, 0, 0, 1, 1, 2, 0, 0, 1], np.int32),
        "confidence_N": confidence,
        "calibrated_N": confidence,
        "map_MF": np.ones((9, 4), np.float16),
        "map_rows_M": np.arange(9),
        **spaces,
        **{f"{name}_cosines_GK": cosines for name in means},
    }


def _npz(arrays: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in arrays.items():
            archive.writestr(f"test/{name}.npy", content)
    return file.getvalue()


def _arrays() -> dict[str, bytes]:
    files = {name: io.BytesIO() for name in _observed()}
    for name, file in files.items():
        np.save(file, _observed()[name])
    return {name: file.getvalue() for name, file in files.items()}


def _read_run_folder(file: Path) -> object:
    """A folder of which the file is one, as `report` reads it."""
    recipe = load_recipe("digits-lt", data="nowhere")  # its encoder needs no timm, nor its data scikit-learn
    whole = {"recipe.toml": recipe_toml(recipe).encode(), "observed.npz": _npz(_arrays()),
             "metrics.json": json.dumps(_metrics()).encode(), "run.json": json.dumps(_record()).encode()}  # fmt: skip
    for name, content in whole.items():
        (file.parent / name).write_bytes(content)
    return _content(read_runs([file.parent]), None)


def _read_table(file: Path) -> object:
    found = next(iter(find_parts(str(file)).parts.values()))  # a changed index may name another part alone
    assert sum(found.class_counts) == len(found) > 0
    return decode(found, 0)


def _read_cifar(file: Path) -> object:
    """Reads a folder of which the file is one."""
    for name, content in _cifar().items():
        if name != "data_batch_2.bin" and not (file.parent / name).exists():
            (file.parent / name).write_bytes(content)
    shutil.move(file, file.parent / "data_batch_2.bin")
    return _whole(CifarArchive(file.parent, 10, "binary"))


def _whole(archive: CifarArchive) -> object:
    parts = open_cifar(archive)
    assert all(len(part) == sum(part.class_counts) for part in parts.values())
    return parts


READERS = {
    "image": Reader("x.jpg", _images, _decode, share=3),
    "list": Reader("list.txt", _lists, _read_list, share=2),
    "annotations": Reader("train2018.json", _annotations, _read_list, share=2),
    "recipe": Reader("recipe.toml", _recipes, _read_recipe),
    "parquet": Reader("train.parquet", _tables, _read_table, share=0.5),
    "cifar-records": Reader("x", lambda: [_records()], _read_cifar),
    "cifar-archive": Reader("cifar-10-binary.tar.gz", lambda: [gzip.compress(_tar())],
                            lambda file: _whole(CifarArchive(file, 10, "binary"))),
    "cifar-tar": Reader("cifar-10-binary.tar.gz", lambda: [_tar()],
                        lambda file: _whole(CifarArchive(file, 10, "binary")), lambda tar: gzip.compress(tar, 1)),
    "checkpoint": Reader("last.pt", lambda: [_saved(_checkpoint()), _saved(_authors_checkpoint())], _read_checkpoint),
    "checkpoint-old": Reader("last.pt", lambda: [_saved(table, zipped=False) for table in
                                                 (_checkpoint(), _authors_checkpoint())], _read_checkpoint),
    "weights": Reader("weights.pth", lambda: [_program({"state_dict": {"a": torch.ones(2, 4)}})], _read_weights,
                      _around_program),
    "safetensors": Reader("weights.safetensors", lambda: [_safetensors()], _read_weights),
    "metrics": Reader("metrics.json", lambda: [json.dumps(_metrics()).encode()], read_metrics, share=0.5),
    "record": Reader("run.json", lambda: [json.dumps(_record()).encode()], read_record, share=0.5),
    "log": Reader("metrics.jsonl", lambda: [_log()], _read_run_folder, share=0.5),
    "bad-images": Reader("bad-images.json", lambda: [b'{"train": {"a.jpg": "empty"}}'], read_bad_images, share=0.3),
    "packed": Reader("train.pack", lambda: [_packed()], _read_table),
    "hub-config": Reader("config.json", lambda: [_hub_config()], _read_hub_config, share=0.5),
    "prior-json": Reader("prior.json", lambda: [b'{"a": 1, "b": 2.5}'], _read_prior, share=0.5),
    "prior-csv": Reader("prior.csv", lambda: [b"class,weight\na,1\n\"b, c\",2.5\n"], _read_prior, share=0.5),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------- one input


def examine(reader: Reader, content: bytes, folder: Path) -> bool:
    """Whether the reader gives a result for the input, and not an error of the user's. Raises whatever else the reader
    raises, and ValueError for a message with the inside of a library."""
    file = folder / reader.name
    file.write_bytes(reader.wrap(content))
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
