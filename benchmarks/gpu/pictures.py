"""Made-up pictures, for a machine without data: they show that everything runs, and nothing about accuracy."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_small(folder: Path, most: int) -> Path:
    """Ten classes of noise of 32 pixels, each a little brighter; `most` a class to train on, a tenth to test."""
    random = np.random.default_rng(0)
    for part, count in (("train", most), ("test", max(2, most // 10))):
        for label in range(10):
            place = folder / part / str(label)
            place.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 156, (32, 32, 3), dtype=np.uint8) + np.uint8(10 * label)
                Image.fromarray(pixels).save(place / f"{number}.png")
    return folder


def write_photos(folder: Path, count: int) -> Path:
    """Smooth noise as large as a photograph of ImageNet, in JPEG."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = random.integers(0, 256, (47, 63, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
    return folder
