"""Three views (cls, sim, sim) of 32-pixel images that lie in memory: `python -m benchmarks.small_images [FOLDER]`.

One thread, each in a process of its own. "ratio" is the time of the obvious way divided by ours; the obvious way is
torchvision's transforms of Pillow images, image by image, up to a normalised batch. Ours ends as a batch of bytes,
because the network normalises on its device; "ratio_bytes" compares with the obvious way up to bytes. FOLDER: CIFAR, in
any form that `equipoise train cifar10-lt` reads (default: ../shared/data/cifar10). Takes 50 s.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import plain_views
from benchmarks.timing import answer, apart, finish, ratio, say_times, say_where
from equipoise.base.device import choose_device, keep_freed_memory
from equipoise.base.errors import UserError
from equipoise.data.images import ImageList
from equipoise.data.sources import find_parts
from equipoise.views.loader import open_batches, steps_per_epoch
from equipoise.views.views import ViewSettings

BATCH, IMAGES = 256, 1024
SETTINGS = ViewSettings("cifar", size=32, kinds=("cls", "sim", "sim"))
CIFAR = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10"


OURS, PLAIN, PLAIN_BYTES = "ours", "obvious way, normalised", "obvious way, bytes"


def child(name: str, images: ImageList) -> None:
    torch.set_num_threads(1)
    batches, per_epoch = open_batches(images, SETTINGS, choose_device("cpu")), steps_per_epoch(len(images), BATCH)
    epochs = (range(first, first + per_epoch) for first in itertools.count(0, per_epoch))
    if name == OURS:
        keep_freed_memory()  # as a run does
        answer(lambda: [None for _ in batches.training(0, BATCH, next(epochs))], rounds=7)
        return
    pixels_NSS3 = np.concatenate([batch.images_VB3SS[0].permute(0, 2, 3, 1) for batch in batches.evaluation(BATCH)])
    views = plain_views.cifar_views("normalised" if name == PLAIN else "bytes")
    answer(plain_views.all_views(list(pixels_NSS3), Image.fromarray, views, BATCH), rounds=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default=str(CIFAR))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        images = find_parts(options.folder).parts["train"]
    except UserError as error:
        raise SystemExit(str(error)) from None
    images = images.take(np.arange(min(IMAGES, len(images))))
    if options.child:
        child(options.child, images)
        return
    torch.set_num_threads(1)
    say_where()
    print(f"{len(images)} images of 32 pixels in memory, three views, batches of {BATCH}")
    times = apart("benchmarks.small_images", [options.folder], (OURS, PLAIN, PLAIN_BYTES))
    say_times(times, len(images))
    as_bytes = ratio(times[PLAIN_BYTES].wall, times[OURS].wall)
    finish("small_images", times[PLAIN], times[OURS], ratio_bytes=round(as_bytes, 3))


if __name__ == "__main__":
    main()
