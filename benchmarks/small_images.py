"""Three views (cls, sim, sim) of 32-pixel images that lie in memory: `python -m benchmarks.small_images [FOLDER]`.

One process and one thread. "ratio" is the time of the obvious way divided by ours; the obvious way is torchvision's
transforms of Pillow images, image by image, up to a normalised batch. Ours ends as a batch of bytes, because the
network normalises on its device; "ratio_bytes" compares with the obvious way up to bytes. FOLDER: CIFAR, in any form
that `equipoise train cifar10-lt` reads (default: ../shared/data/cifar10). Takes 30 s.
"""

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import plain_views
from benchmarks.timing import finish, in_turn, ratio, say_times, say_where
from equipoise.device import choose_device, keep_freed_memory
from equipoise.loader import SmallImages
from equipoise.sources import open_parts
from equipoise.views import ViewSettings

BATCH, IMAGES = 256, 1024
SETTINGS = ViewSettings("cifar", ("cls", "sim", "sim"), 32)
CIFAR = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default=str(CIFAR))
    images = open_parts(parser.parse_args().folder).train.take(np.arange(IMAGES))
    torch.set_num_threads(1)
    keep_freed_memory()  # as a run does
    say_where()
    print(f"{IMAGES} images of 32 pixels in memory, three views, batches of {BATCH}")
    batches, epochs = SmallImages(images, SETTINGS, choose_device("cpu")), itertools.count()
    pixels_NSS3 = np.concatenate([batch.images_VB3SS[0].permute(0, 2, 3, 1) for batch in batches.evaluation(BATCH)])
    subjects: dict[str, Callable[[], object]] = {
        "ours": lambda: [None for _ in batches.training(0, next(epochs), BATCH)]
    }
    for end in ("normalised", "bytes"):
        views = plain_views.cifar_views(end)
        subjects[f"obvious way, {end}"] = plain_views.all_views(pixels_NSS3, Image.fromarray, views, BATCH)
    times = in_turn(subjects, rounds=9)
    say_times(times, IMAGES)
    as_bytes = ratio(times["obvious way, bytes"].wall, times["ours"].wall)
    finish("small_images", times["obvious way, normalised"], times["ours"], ratio_bytes=round(as_bytes, 3))


if __name__ == "__main__":
    main()
