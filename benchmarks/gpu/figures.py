"""What the stages of `benchmarks.gpu` are given, and the lines that they leave."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


class Figures:
    """One JSON object a line, on the disk as soon as it is known: a machine may be taken away at any moment."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def begin(self) -> None:
        """Leave nothing of an earlier time."""
        self._path.unlink(missing_ok=True)

    def add(self, stage: str, figure: str, value: float | str, unit: str = "", **more: Any) -> None:
        line = {"stage": stage, "figure": figure, "value": value, "unit": unit, **more}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._path.read_text(encoding="utf-8").splitlines()]


@dataclass(frozen=True)
class Task:
    """What a stage is given. `out`: for what is kept; `work`: for what is not. `seconds`: its time limit."""

    stage: str
    data: Path
    photos: Path
    out: Path
    work: Path
    rehearse: bool
    seconds: float

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def say(self, figure: str, value: float | str, unit: str = "", **more: Any) -> None:
        Figures(self.out / "figures.jsonl").add(self.stage, figure, value, unit, **more)


def table(lines: list[dict[str, Any]]) -> str:
    """All figures for people, stage by stage."""
    rows, stage = [""], ""
    for line in lines:
        value = f"{line['value']:,.4g}" if isinstance(line["value"], float) else str(line["value"])
        first = "" if line["stage"] == stage else line["stage"]
        rows.append(f"{first:<8}{line['figure']:<64}{value:>12} {line['unit']}".rstrip())
        stage = line["stage"]
    return "\n".join(rows)
