"""What a run folder says in JSON becomes tables of which every value is of its kind: anybody may have changed it."""

from pathlib import Path
from typing import Any

from equipoise.base.errors import UserError
from equipoise.base.files import ABSENT, fits, is_count, is_filled, is_number, is_positive, is_share, is_text, read_json
from equipoise.evaluation.metrics import GROUPS

_MOST_BYTES = 2**24  # those of 20,000 classes have 4 million


_SHARE = (None, is_share)
_ROW = {"tau": is_number, "top1": is_share, "mean_per_class": is_share, **dict.fromkeys(GROUPS, _SHARE)}
_FIGURES = {
    **dict.fromkeys(("top1", "mean_per_class", "macro_f1", "worst_class", "worst_tenth", "ece"), is_share),
    **dict.fromkeys(("top5", *GROUPS), _SHARE),
    "images": is_filled,
    "per_class": [_SHARE],
    "prior_sweep": (None, [_ROW]),
}
_POST_HOC = {"tau": is_number, "validation": _ROW, "test": (ABSENT, _ROW)}


def _is_block(value: Any) -> bool:
    """The figures of one checkpoint, which agree with each other."""
    kinds = {"validation": (None, _FIGURES), "test": (None, _FIGURES), "post_hoc": (None, _POST_HOC)}
    if not fits(value, {**kinds, "epoch": is_count, "step": (ABSENT, is_count), "temperature": (None, is_positive)}):
        return False
    if any(value[part] is None for part in value["post_hoc"] or {} if part in ("validation", "test")):
        return False
    return all(_agree(value[part]) for part in ("validation", "test") if value[part])


def _agree(figures: dict[str, Any]) -> bool:
    """Whether the same shot groups have images everywhere, and one at least."""
    there = [figures[group] is not None for group in GROUPS]
    return any(there) and all(
        [row[group] is not None for group in GROUPS] == there for row in figures["prior_sweep"] or ()
    )


_BAD_IMAGES = {str: {str: is_text}}
_METRICS = {
    "method": is_text,
    "last": _is_block,
    "best": (None, _is_block),
    **dict.fromkeys(("test", "validation"), (None, _FIGURES)),
    "bad_images": (ABSENT, _BAD_IMAGES),
    "best_lost": (ABSENT, None, is_text),
    "class_names": [is_text],
    "train_counts": [is_count],
}
_RECORD = {
    **dict.fromkeys(("command", "started", "precision"), is_text),
    "versions": {str: is_text},
    "machine": {str: (is_text, is_count)},
    "git": (ABSENT, None, {"commit": is_text, "changed": bool}),
    "launch": (ABSENT, is_text),
    "processes": (ABSENT, is_count),
    "class_counts": {str: is_filled},
}
_DATA = {"kind": is_text, "fingerprints": {str: is_text}, "images": {str: is_count}}


def read_metrics(file: Path) -> dict[str, Any]:
    """`metrics.json`. Raises UserError where it is damaged, or its figures are not of its classes."""
    advice = "remove it, and write it anew with equipoise evaluate"
    table = read_json(file, _MOST_BYTES, _METRICS, advice)
    blocks = [table["last"], table["best"] or table["last"], table]
    figures = [block[part] for block in blocks for part in ("validation", "test") if block[part]]
    lengths = {len(table["class_names"]), len(table["train_counts"]), *(len(of["per_class"]) for of in figures)}
    if len(lengths) > 1:
        raise UserError(f"{file} is damaged (its figures are of different numbers of classes); {advice}")
    return table


def read_record(file: Path) -> dict[str, Any]:
    """`run.json`: what a run was started with. Raises UserError where it is damaged."""
    advice = "name another run, or train it anew"
    table = read_json(file, _MOST_BYTES, {**_RECORD, "data": _DATA}, advice)
    if len(table["class_counts"]) < 2 or not table["data"]["images"].get("train"):
        raise UserError(f"{file} is damaged (it names no classes, or no training images); {advice}")
    return table


def read_bad_images(file: Path) -> dict[str, dict[str, str]]:
    """`bad-images.json`: by part and name, the reason. Raises UserError where it is damaged."""
    return read_json(file, _MOST_BYTES, _BAD_IMAGES, "remove it")
