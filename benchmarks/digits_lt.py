"""Digits-LT, every method, five seeds: mean and standard deviation of the test accuracy of the last epoch.

    python -m benchmarks.digits_lt [--seeds 5] [--out runs/digits-lt-results]

Runs that are there already are read, not repeated. The table goes into docs/results.md.
"""

import argparse
import json
from pathlib import Path
from typing import get_args

import numpy as np

import equipoise
from equipoise.recipe import Method

COLUMNS = ("top1", "many", "medium", "few")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/digits-lt-results"))
    options = parser.parse_args()
    print(f"| method | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for method in get_args(Method):
        rows: list[list[float]] = []
        for seed in range(options.seeds):
            folder = options.out / f"{method}-{seed}"
            if not (folder / "metrics.json").is_file():
                equipoise.train(equipoise.load_recipe("digits-lt", method=method, seed=seed), folder, progress=False)
            test = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["test"]
            rows.append([100 * test[column] for column in COLUMNS])
        means, deviations = np.mean(rows, axis=0), np.std(rows, axis=0, ddof=1)
        cells = [f"{mean:.1f} ± {deviation:.1f}" for mean, deviation in zip(means, deviations, strict=True)]
        print(f"| {method} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
