"""Image lists."""

import hashlib
import os
from pathlib import Path

import numpy as np
from conftest import draw_folder, image_list

from equipoise.data.images import ImageFiles, ImageList, PixelArrays
from equipoise.data.sources import find_parts


def test_fingerprint_changes_with_content_labels_and_names(tmp_path):
    base = image_list([3, 2])
    assert base.fingerprint() == image_list([3, 2]).fingerprint()
    others = [
        image_list([2, 3]),
        base.take(np.array([0, 1])),
        ImageList("x", base.images, base.labels_N, ("other", "names")),
        ImageList("x", PixelArrays("x", base.images.pixels_NHW3 + 1), base.labels_N, base.class_names),
        ImageList("x", base.images, base.labels_N[::-1].copy(), base.class_names),
    ]
    draw_folder(tmp_path, {"c0": 3, "c1": 2})
    others.append(find_parts(str(tmp_path)).parts["train"])
    assert len({base.fingerprint(), *(other.fingerprint() for other in others)}) == 7


def test_files_below_a_folder():
    """Fingerprints hang on the digest: runs of earlier versions go on."""
    names = ["a/1.jpg", "b/é 2.jpg", "a/1.jpg", "\udcff.png"]
    files = ImageFiles.of(Path("root"), names)
    assert [files.name(index) for index in range(len(files))] == [f"root/{name}" for name in names]
    assert files.digest() == hashlib.sha256(os.fsencode("\0".join(names))).hexdigest()
    taken = files.take(np.array([3, 1]))
    assert [taken.name(index) for index in range(2)] == ["root/\udcff.png", "root/b/é 2.jpg"]
