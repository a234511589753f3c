"""Fill `.gpu-kit` with what a bare machine with a GPU lacks, and print the command to run there: `make gpu-kit`.

The machine is expected to have Python 3.12 with torch, timm, opencv, pyarrow, scikit-learn, pytest and what these need,
rich and jinja2, and no network. What travels is the working tree with `.gpu-kit` in it.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

KIT = Path(".gpu-kit")
PYTHON = "3.12"
PACKAGES = ("tomli-w", "msgspec")  # which need nothing themselves
PHOTOS = 40
MOST = 60 * 2**20  # bytes: lent machines take little more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with CIFAR-10 as Parquet (the archive is too large to travel)")
    parser.add_argument("photos", type=Path, help="folder of JPEG photographs")
    options = parser.parse_args()
    for folder in (options.data, options.photos):
        if not folder.is_dir():
            parser.error(f"there is no folder at {folder}")
    shutil.rmtree(KIT, ignore_errors=True)
    copy([path for path in options.data.iterdir() if path.is_file()], KIT / "cifar10")
    photos = sorted(path for path in options.photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    copy(list({path.name: path for path in photos}.values())[:: -(-len(photos) // PHOTOS) or 1], KIT / "photos")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--no-compile"]
    subprocess.run([*pip, f"--python-version={PYTHON}", f"--target={KIT / 'site'}", *PACKAGES], check=True)
    size = sum(path.stat().st_size for path in KIT.rglob("*") if path.is_file())
    if size > MOST:
        raise SystemExit(f"{KIT} has {size / 2**20:.0f} MiB, more than {MOST / 2**20:.0f}; name less data")
    print(f"{KIT}: {size / 2**20:.0f} MiB. Copy the working tree with it, and run there:\n")
    print(
        f"  PYTHONPATH=src:{KIT}/site python3 -m benchmarks.gpu --data {KIT}/cifar10 --photos {KIT}/photos"
        " --minutes 9 --out gpu-figures"
    )


def copy(files: list[Path], folder: Path) -> None:
    """Ends the program where there is nothing to copy."""
    if not files:
        raise SystemExit(f"nothing to copy into {folder}")
    folder.mkdir(parents=True)
    for file in files:
        (folder / file.name).write_bytes(file.read_bytes())


if __name__ == "__main__":
    main()
