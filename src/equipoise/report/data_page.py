"""A data set becomes one HTML page: its copies and odd images in pictures, class counts, sizes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from equipoise.data.copies import Pair
from equipoise.data.images import Found, ImageList, imbalance_factor
from equipoise.data.inspection import Inspection, Place
from equipoise.evaluation.labels import Doubt
from equipoise.report import charts
from equipoise.report.page import write_page
from equipoise.report.svg import Axis, Figure, shortened

_MOST_PAIRS, _MOST_ODD = 60, 24  # in pictures, of each kind
_MOST_BARS = 100  # of more classes, the largest and the smallest

_HEADINGS = {
    "parts": "Copies in another part",
    "labels": "Copies in another class",
    "again": "Copies in the same class and part",
}


def write_data_page(
    path: str, found: Found, inspection: Inspection, out: Path, doubts: Sequence[Doubt] | None = None
) -> Path:
    """Write the page about the data at `path` to `out` and return it. `doubts`: None where labels were not checked."""
    copies = [(_HEADINGS[kind], *_shown(pairs, inspection)) for kind, pairs in inspection.copies.items() if pairs]
    odd = [
        (what, len(rows), [(place, _picture(place)) for place in (inspection.places[row] for row in rows[:_MOST_ODD])])
        for what, rows in inspection.odd.items()
    ]
    content = {
        "path": path,
        "kind": found.kind,
        "parts": [(part, images, imbalance_factor(images.class_counts)) for part, images in found.parts.items()],
        "copies": copies,
        "too_alike": inspection.too_alike,
        "doubts": doubts,
        "doubted": [(*doubt, _picture(doubt.place)) for doubt in doubts[:_MOST_PAIRS]] if doubts else [],
        "odd": odd,
        "bad": [error.fault for error in inspection.bad],
        "counts": [(part, _bars(images)) for part, images in found.parts.items()],
        "most_bars": _MOST_BARS,
        "sizes": _sizes(inspection),
    }
    return write_page("data_page.html.jinja", content, out)


def _shown(pairs: Sequence[Pair], inspection: Inspection) -> tuple[list[Any], list[tuple[Place, Place, bool]]]:
    """The first pairs with their pictures, those that are not exact before others, since they need a look; and all."""
    everything = [(inspection.places[image], inspection.places[other], exact) for image, other, exact in pairs]
    first = sorted(everything, key=lambda pair: pair[2])[:_MOST_PAIRS]
    return [(image, other, exact, _picture(image), _picture(other)) for image, other, exact in first], everything


def _picture(place: Place) -> Markup:
    return Markup().join(charts.thumbnails(place.images, [place.row]))


def _bars(images: ImageList) -> Markup:
    """The images of each class as bars, the largest first."""
    counts = images.class_counts
    order = sorted(range(len(counts)), key=lambda label: -counts[label])
    half = _MOST_BARS // 2
    shown = order if len(order) <= _MOST_BARS else [*order[:half], *order[-half:]]
    figure = Figure(Axis("", 0, max(counts)), 32 * len(shown), (4, 70, 4, 0))
    for top, label in zip(range(0, figure.height, 32), shown, strict=True):
        figure.text(0, top + 12, shortened(images.class_names[label]), "row")
        figure.bar(0, max(counts), top + 22, 8, "track")
        figure.bar(0, counts[label], top + 22, 8, "run0")
        figure.text(1, top + 26, f"{counts[label]:,}", "axis", dx=8)
    return figure.svg("images of each class")


def _sizes(inspection: Inspection) -> dict[str, Any] | None:
    """Smallest, median and largest image; None where none could be read."""
    sizes_N2 = inspection.sizes_N2
    if not len(sizes_N2):
        return None
    order = np.argsort(sizes_N2.prod(1), kind="stable").tolist()
    ends = [(inspection.places[row], *sizes_N2[row].tolist()) for row in (order[0], order[-1])]
    return {"smallest": ends[0], "largest": ends[1], "median": np.median(sizes_N2, axis=0).tolist()}
