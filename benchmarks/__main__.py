"""All speed benchmarks, in turn, against `expected.json`: `make bench`, or `python -m benchmarks [NAME ...]`.

Each runs in a process of its own and ends with a line of JSON. `expected.json` has, by benchmark, its ratios and their
values where they were measured last; one that is worse by more than a fifth is named, and the exit code is 1. Ratios
are of one run on one machine, so that they can be compared with those of another; seconds (`startup`) can not quite.
Takes 6 minutes on two cores. Nothing else should run meanwhile.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

EXPECTED = Path(__file__).with_name("expected.json")
# Of all else, less: seconds, shares, and the loss as a multiple of its matrix products.
HIGHER_IS_BETTER = {"input.ratio", "input.ratio_bytes", "packed.ratio", "packed.ratio_bytes", "small_images.ratio",
                    "small_images.ratio_bytes", "step.ratio"}  # fmt: skip
ALLOWED = 1.2


def measure(name: str) -> dict[str, Any]:
    """What the benchmark found: the last line that it prints. All its lines are shown."""
    print(f"\n{name}", flush=True)
    process = subprocess.Popen([sys.executable, "-m", f"benchmarks.{name}"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        print(f"  {line}", end="", flush=True)
        last = line
    if process.wait():
        raise SystemExit(f"benchmarks.{name} has failed")
    return json.loads(last)


def fallen(found: dict[str, dict[str, Any]], expected: dict[str, dict[str, float]]) -> list[str]:
    """A line for each expected figure that is worse by more than a fifth."""
    said: list[str] = []
    for name, figures in found.items():
        for figure, value in expected.get(name, {}).items():
            higher = f"{name}.{figure}" in HIGHER_IS_BETTER
            worse = value / figures[figure] if higher else figures[figure] / value
            if worse > ALLOWED:
                said.append(f"{name}: {figure} is {figures[figure]:.3g}, {value:.3g} was expected")
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    expected: dict[str, dict[str, float]] = json.loads(EXPECTED.read_text(encoding="utf-8"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(expected))
    names = parser.parse_args().names or list(expected)
    if unknown := sorted(set(names) - set(expected)):
        raise SystemExit(f"no benchmark is called {unknown[0]}: {', '.join(expected)}")
    start = time.monotonic()
    found = {name: measure(name) for name in names}
    print(f"\n{(time.monotonic() - start) / 60:.1f} minutes\n")
    for name, figures in found.items():
        for figure, value in expected[name].items():
            print(f"  {name + ', ' + figure:<32} {figures[figure]:8.3f}   expected {value:8.3f}")
    said = fallen(found, expected)
    print("\n" + "\n".join(said or ["nothing has fallen by more than a fifth"]))
    return bool(said)


if __name__ == "__main__":
    sys.exit(main())
