"""Three 224-pixel views (cls, sim, sim) from packed images: `python -m benchmarks.packed [FOLDER] [--short-side 256]`.

The photographs in FOLDER (default: ../shared/data/photos) are packed as `equipoise pack` does it; then as in
`benchmarks.input`: one thread, each in a process of its own, "ratio" is the time of the obvious way from the
photographs themselves divided by ours from the packed file. Takes 60 s.
"""

import argparse
import os
import tempfile
from pathlib import Path

import torch

from benchmarks.input import BATCH, NAMES, PHOTOS, SIZE, child, read_photos, report, write_folder
from benchmarks.timing import say_where
from equipoise.data.decode import decode
from equipoise.data.packed import pack
from equipoise.data.sources import find_parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=PHOTOS)
    parser.add_argument("--short-side", type=int, default=256)
    parser.add_argument("--packed", help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    contents = read_photos(options.folder, most=320)
    if options.child:
        images = find_parts(options.packed).parts["train"]
        child(options.child, contents, lambda index: decode(images, index))
        return
    torch.set_num_threads(1)
    say_where()
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "data", Path(folder) / "packed"
        write_folder(contents, data)
        pack(find_parts(str(data)), out, options.short_side, os.cpu_count() or 1)
        images = find_parts(str(out)).parts["train"]
        before = sum(map(len, contents)) / len(contents) / 1000
        after = sum(len(images.images.content(index)) for index in range(len(images))) / len(images) / 1000
        print(
            f"{len(images)} photographs of {before:.0f} kB, packed {after:.0f} kB, short sides of at most "
            f"{options.short_side}, three views of {SIZE} pixels, batches of {BATCH}"
        )
        report("packed", [str(options.folder), "--packed", str(out)], len(images))


if __name__ == "__main__":
    main()
