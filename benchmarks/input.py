"""Three 224-pixel views (cls, sim, sim) from JPEG photographs: `python -m benchmarks.input [FOLDER]`.

One thread, so per core, and each in a process of its own. "ratio" is the time of the obvious way divided by ours; the
obvious way is Pillow's decoder, torchvision's transforms of Pillow images and timm's RandAugment, image by image, up to
a normalised batch. Ours ends as a batch of bytes, because the network normalises on its device; "ratio_bytes" compares
with the obvious way up to bytes. FOLDER: photographs (default: ../shared/data/photos). Takes 60 s.
"""

import argparse
import io
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import plain_views
from benchmarks.timing import answer, apart, finish, ratio, say_times, say_where
from equipoise.base.device import keep_freed_memory
from equipoise.data.decode import decode_bytes
from equipoise.views.views import ViewSettings, photo_views

SIZE = 224
BATCH = 64
PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "photos"


def read_photos(folder: Path, most: int) -> list[bytes]:
    """Up to `most` JPEG files of a folder, spread over it. Ends the benchmark where there are none."""
    if not folder.is_dir():
        raise SystemExit(f"there is no folder at {folder}; name a folder of photographs")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise SystemExit(f"{folder} holds no JPEG files (.jpg, .jpeg); name a folder of photographs")
    return [path.read_bytes() for path in files[:: -(-len(files) // most)]]


def write_folder(contents: list[bytes], folder: Path) -> None:
    """Photographs as a data set: of two classes, as a folder must be."""
    for number, content in enumerate(contents):
        file = folder / "ab"[number % 2] / f"{number:04}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def ours(decode: Callable[[int], np.ndarray], images: int) -> Callable[[], None]:
    settings, epochs = ViewSettings("photos", size=SIZE, kinds=("cls", "sim", "sim")), itertools.count()

    def run() -> None:
        epoch = next(epochs)
        for first in range(0, images, BATCH):
            indices_B = np.arange(first, min(first + BATCH, images))
            photo_views([decode(int(index)) for index in indices_B], settings, 0, epoch, indices_B)

    return run


def plain(contents: list[bytes], end: str) -> Callable[[], None]:
    views = plain_views.photo_views(SIZE, end)
    return plain_views.all_views(contents, lambda content: Image.open(io.BytesIO(content)).convert("RGB"), views, BATCH)


OURS, PLAIN, PLAIN_BYTES, DECODING = "ours", "obvious way, normalised", "obvious way, bytes", "decoding alone, as ours"
NAMES = (OURS, PLAIN, PLAIN_BYTES, DECODING)


def child(name: str, contents: list[bytes], decode: Callable[[int], np.ndarray]) -> None:
    """`contents` are the photographs themselves, `decode` makes pixels of ours."""
    torch.set_num_threads(1)
    if name in (OURS, DECODING):
        keep_freed_memory()  # as a run does
    subjects = {
        OURS: lambda: ours(decode, len(contents)),
        PLAIN: lambda: plain(contents, "normalised"),
        PLAIN_BYTES: lambda: plain(contents, "bytes"),
        DECODING: lambda: lambda: [decode(index) for index in range(len(contents))],
    }
    answer(subjects[name](), rounds=min(20, max(3, 640 // len(contents))))


def report(benchmark: str, words: list[str], images: int) -> None:
    """Measure all, each in its process, and say what came out."""
    times = apart(f"benchmarks.{benchmark}", words, NAMES)
    say_times(times, images)
    as_bytes = ratio(times[PLAIN_BYTES].wall, times[OURS].wall)
    finish(benchmark, times[PLAIN], times[OURS], ratio_bytes=round(as_bytes, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=PHOTOS)
    parser.add_argument("--child", choices=NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    contents = read_photos(options.folder, most=320)
    if options.child:
        child(options.child, contents, lambda index: decode_bytes(contents[index]))
        return
    torch.set_num_threads(1)
    say_where()
    kilobytes = sum(map(len, contents)) / len(contents) / 1000
    print(f"{len(contents)} photographs of {kilobytes:.0f} kB, three views of {SIZE} pixels, batches of {BATCH}")
    report("input", [str(options.folder)], len(contents))


if __name__ == "__main__":
    main()
