"""A data set becomes one HTML page: its copies and odd images in pictures, class counts, sizes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup

from equipoise.data.images import Found, ImageList, imbalance_factor
from equipoise.data.inspection import Inspection, Place
from equipoise.evaluation.labels import Doubt
from equipoise.report.charts import thumbnails
from equipoise.report.page import write_page
from equipoise.report.svg import Axis, Figure, shortened

_MOST_BARS = 100  # of more classes, the largest and the smallest


def write_data_page(
    path: str, found: Found, inspection: Inspection, out: Path, doubts: Sequence[Doubt] | None = None
) -> Path:
    """Write the page about the data at `path` to `out` and return it. `doubts`: None where labels were not checked."""
    sizes_N2 = inspection.sizes_N2
    content = {
        "path": path,
        "found": found,
        "inspection": inspection,
        "doubts": doubts,
        "most": {"bars": _MOST_BARS, "pairs": 60, "odd": 24},  # in pictures, of each kind
        "by_area": sizes_N2.prod(1).argsort(kind="stable").tolist(),
        "median": np.median(sizes_N2, axis=0).tolist() if len(sizes_N2) else None,
        "imbalance_factor": imbalance_factor,
        "picture": _picture,
        "bars": _bars,
    }
    return write_page("data_page.html.jinja", content, out)


def _picture(place: Place) -> Markup:
    return Markup().join(thumbnails(place.images, [place.row]))


def _bars(images: ImageList) -> Markup:
    """The images of each class as bars, the largest first."""
    counts = images.class_counts
    order = sorted(range(len(counts)), key=lambda label: -counts[label])
    shown = order if len(order) <= _MOST_BARS else [*order[: _MOST_BARS // 2], *order[-_MOST_BARS // 2 :]]
    figure = Figure(Axis("", 0, max(counts)), 32 * len(shown), (4, 4, 0))
    for top, label in zip(range(0, figure.height, 32), shown, strict=True):
        figure.text(0, top + 12, shortened(images.class_names[label]), "row")
        figure.bar(0, max(counts), top + 22, 8, "track")
        figure.bar(0, counts[label], top + 22, 8, "run0")
        figure.label(top + 22, f"{counts[label]:,}", "axis")
    return figure.svg("images of each class")
