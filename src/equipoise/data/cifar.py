"""CIFAR-10 and CIFAR-100 in the form that torchvision keeps them in become image lists, in the archive's own order.

Their files are pickles, and a pickle is a program: torchvision loads one only if its MD5 is that of the published file.
"""

import warnings
from pathlib import Path

import numpy as np

from equipoise.base.errors import UserError
from equipoise.data.images import Found, ImageList, PixelArrays

_FOLDERS = {"cifar-10-batches-py": "cifar10", "cifar-100-python": "cifar100"}
_ARCHIVES = [f"cifar-{classes}-{form}.tar.gz" for classes in (10, 100) for form in ("python", "binary")]


def find_cifar(root: Path) -> tuple[Path, str] | None:
    """The folder of an archive's files, `root` or one in it, and 'cifar10' or 'cifar100'; None where there is none.
    Names alone are looked at. Raises UserError for another form of it."""
    for folder, name in _FOLDERS.items():
        for path in (root, root / folder):
            if path.resolve().name == folder and path.is_dir():
                return path, name
    for other in (*_ARCHIVES, "cifar-10-batches-bin", "cifar-100-binary"):
        if root.name == other or (root / other).exists():
            raise UserError(f"{root} holds CIFAR as {other}; take the python version, unpacked: tar xzf FILE.tar.gz")
    return None


def open_cifar(path: Path, name: str) -> Found:
    """The parts `train` and `test`; of CIFAR-100 the fine labels. Raises UserError where a file is missing, or not the
    published one."""
    from torchvision.datasets import CIFAR10, CIFAR100  # a second of import, needed here alone

    dataset = CIFAR10 if name == "cifar10" else CIFAR100
    parts: dict[str, ImageList] = {}
    for part in ("train", "test"):
        try:
            with warnings.catch_warnings(action="ignore"):  # numpy: how Python 2 wrote arrays is deprecated
                read = dataset(path.resolve().parent, train=part == "train")
        except (RuntimeError, OSError):
            raise UserError(
                f"{path} is not the published {dataset.__name__}: a file is missing or cannot be read, or its MD5 "
                "differs, so that none was loaded; take the archive anew"
            ) from None
        images = PixelArrays(f"{path} ({part})", np.ascontiguousarray(read.data))
        parts[part] = ImageList(str(path), images, np.array(read.targets, np.int64), tuple(read.classes))
    return Found(f"{dataset.__name__} archive (python)", parts, divided=True)
