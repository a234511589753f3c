"""CIFAR-10 and CIFAR-100 as their authors publish them become image lists, in the archives' own order.

Two forms each, as a folder or as the `.tar.gz`, which is read without being unpacked: the *binary* one, records of one
(CIFAR-100: two) label bytes and 3,072 pixel bytes; and the *python* one, pickles. A pickle is a program: it is loaded
only if its checksum is that of the published file, so that no other program ever runs.
"""

import hashlib
import pickle
import tarfile
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from equipoise.base.errors import UserError, reason
from equipoise.data.images import ImageList, Indices, PixelArrays

_PIXELS = 3 * 32 * 32
# Classes and form -> folder in the archive, its file of names. Of archives beside each other the first here is read.
_KNOWN = {
    (10, "python"): ("cifar-10-batches-py", "batches.meta"),
    (10, "binary"): ("cifar-10-batches-bin", "batches.meta.txt"),
    (100, "python"): ("cifar-100-python", "meta"),
    (100, "binary"): ("cifar-100-binary", "fine_label_names.txt"),
}
# MD5 of the published pickles, as in torchvision/datasets/cifar.py. MD5 suffices: it is easy to make two files with the
# same one, but nobody can make a second file with that of a given one.
CHECKSUMS: Mapping[str, str] = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
    # CIFAR-100
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}


@dataclass(frozen=True)
class CifarArchive:
    """Where an archive is: the folder of its files, or the `.tar.gz`. `classes`: 10 or 100; `form`: python, binary."""

    path: Path
    classes: int
    form: str


def find_cifar(root: Path) -> CifarArchive | None:
    """The archive at `root`: its `.tar.gz`, its unpacked folder, or a folder that holds one of these; None where there
    is none. Names alone are looked at."""
    for (classes, form), (folder, _) in _KNOWN.items():
        archive = f"cifar-{classes}-{form}.tar.gz"
        # `.` has no name of its own, and a link may have another.
        for path in (root, root.resolve(), root / folder, root / archive):
            if path.name in (folder, archive) and path.exists():
                return CifarArchive(path, classes, form)
    return None


def open_cifar(archive: CifarArchive) -> dict[str, ImageList]:
    """The parts `train` and `test`, images uint8 `[N, 32, 32, 3]` in the archive's order; of CIFAR-100 the fine labels.

    Raises UserError naming the file that is missing, damaged, or a pickle that was not published.
    """
    ending = ".bin" if archive.form == "binary" else ""
    train = [f"data_batch_{number}" for number in range(1, 6)] if archive.classes == 10 else ["train"]
    test = "test_batch" if archive.classes == 10 else "test"
    files = {"train": [name + ending for name in train], "test": [test + ending]}
    of_names = _KNOWN[archive.classes, archive.form][1]
    content = _read(archive, [*files["train"], *files["test"], of_names])
    names = _names(archive, content, of_names)
    parts: dict[str, ImageList] = {}
    for part, of_part in files.items():
        read = [_images(archive, content, name) for name in of_part]
        planes_N3HW = np.concatenate([pixels for pixels, _ in read]).reshape(-1, 3, 32, 32)
        images = PixelArrays(f"{archive.path} ({part})", np.ascontiguousarray(planes_N3HW.transpose(0, 2, 3, 1)))
        parts[part] = ImageList(str(archive.path), images, np.concatenate([labels for _, labels in read]), names)
    return parts


def _read(archive: CifarArchive, wanted: list[str]) -> dict[str, bytes]:
    """The content of the wanted files. Raises UserError where one is missing."""
    content: dict[str, bytes] = {}
    try:
        if archive.path.is_dir():
            content = {name: (archive.path / name).read_bytes() for name in wanted if (archive.path / name).exists()}
        else:
            with tarfile.open(archive.path, "r:gz") as tar:
                for member in tar:
                    name, file = Path(member.name).name, tar.extractfile(member) if member.isreg() else None
                    if name in wanted and file is not None:
                        content[name] = file.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise UserError(f"{archive.path} is damaged ({reason(error)}); take the archive anew") from None
    if missing := [name for name in wanted if name not in content]:
        raise UserError(f"{missing[0]} is missing in {archive.path}; take the archive anew")
    return content


def _images(archive: CifarArchive, content: Mapping[str, bytes], name: str) -> tuple[npt.NDArray[np.uint8], Indices]:
    """Pixels `[N, 3072]` and labels `[N]` of one file."""
    if archive.form == "python":
        table = _unpickle(archive, content, name)
        return table["data"], np.array(table["labels" if archive.classes == 10 else "fine_labels"], np.int64)
    labels = 1 if archive.classes == 10 else 2  # of CIFAR-100: the coarse one, then the fine one
    size, where = len(content[name]), f"{archive.path}/{name}"
    if not size or size % (labels + _PIXELS):
        raise UserError(f"{where} has {size:,} bytes, which are no whole number of images; take the archive anew")
    records = np.frombuffer(content[name], np.uint8).reshape(-1, labels + _PIXELS)
    labels_N = records[:, labels - 1].astype(np.int64)
    if labels_N.max() >= archive.classes:
        raise UserError(f"{where} has label {labels_N.max()}, but the classes are 0 to {archive.classes - 1}")
    return records[:, labels:], labels_N


def _names(archive: CifarArchive, content: Mapping[str, bytes], name: str) -> tuple[str, ...]:
    """The class names."""
    if archive.form == "python":
        return tuple(_unpickle(archive, content, name)["label_names" if archive.classes == 10 else "fine_label_names"])
    names = tuple(content[name].decode("utf-8", "replace").split())
    if not len(set(names)) == len(names) == archive.classes:
        raise UserError(f"{archive.path}/{name} does not name {archive.classes} classes; take the archive anew")
    return names


def _unpickle(archive: CifarArchive, content: Mapping[str, bytes], name: str) -> Any:
    """What a published pickle says. Raises UserError for any other; nothing of that is run."""
    if hashlib.md5(content[name], usedforsecurity=False).hexdigest() != CHECKSUMS[name]:
        raise UserError(
            f"{archive.path}/{name} is not the published file (its MD5 differs); a pickle is a program, so nothing of "
            "it was run; take the archive anew, or its binary version"
        )
    with warnings.catch_warnings(action="ignore"):  # numpy: how Python 2 wrote arrays is deprecated
        return pickle.loads(content[name], encoding="latin1")
