"""Would the tests notice? `make mutants` breaks the package in the places that `mutants.toml` lists, one at a time.

Each entry names a file, a piece of it that occurs once, what takes its place, and the tests that should fail then. They
run in a copy of the working tree. Ends with 1 if fewer than nine tenths fail. Takes about half an hour on two cores.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_name("mutants.toml")
SHARE = 0.9


@dataclass(frozen=True)
class Mutant:
    """`tests`: arguments of pytest."""

    file: str
    before: str
    after: str
    tests: str

    def apply(self, top: Path) -> None:
        """Break the copy at `top`. Ends the program where the place is not there, or there more than once."""
        path = top / "src" / "equipoise" / self.file
        text = path.read_text(encoding="utf-8")
        if text.count(self.before) != 1:
            raise SystemExit(f"{self.file}: {self.before!r} occurs {text.count(self.before)} times; mend {LIST.name}")
        path.write_text(text.replace(self.before, self.after), encoding="utf-8")


def mutants() -> list[Mutant]:
    return [Mutant(**entry) for entry in tomllib.loads(LIST.read_text(encoding="utf-8"))["mutant"]]


def _left_out(folder: str, names: list[str]) -> list[str]:
    """What is no part of the tree, for `shutil.copytree`; `src/equipoise/runs` is."""
    at_top = ("runs", "build") if Path(folder) == TOP else ()
    return [name for name in names if name in (".venv", ".git", ".gpu-kit", "__pycache__", *at_top)]


def killed(mutant: Mutant, top: Path) -> bool:
    """Whether a test fails with `mutant` in the tree at `top`, which is whole again afterwards."""
    path = top / "src" / "equipoise" / mutant.file
    whole = path.read_bytes()
    mutant.apply(top)
    try:
        command = [sys.executable, "-m", "pytest", "-x", "-q", *mutant.tests.split()]
        environment = {**os.environ, "PYTHONPATH": str(top / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=top, env=environment, capture_output=True, text=True, check=False)
    finally:
        path.write_bytes(whole)
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest {mutant.tests} ended with {done.returncode}: {done.stdout[-500:]}")
    return done.returncode != 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rooms", nargs="*", help="only those of these rooms (default: all)")
    rooms = parser.parse_args().rooms
    chosen = [mutant for mutant in mutants() if not rooms or mutant.file.split("/")[0] in rooms]
    survivors: list[Mutant] = []
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder) / "tree"
        shutil.copytree(TOP, top, ignore=_left_out)
        for number, mutant in enumerate(chosen, start=1):
            dead = killed(mutant, top)
            print(
                f"{number}/{len(chosen)} {'killed  ' if dead else 'SURVIVED'} {mutant.file}: {mutant.after!r}",
                flush=True,
            )
            survivors += [] if dead else [mutant]
    count = len(chosen) - len(survivors)
    print(f"{count} of {len(chosen)} mutants killed ({100 * count / len(chosen):.0f} %)")
    return count < SHARE * len(chosen)


if __name__ == "__main__":
    sys.exit(main())
