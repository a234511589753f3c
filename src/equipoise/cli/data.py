"""`equipoise data` and `pack`."""

import argparse
import os
import shlex
from dataclasses import replace
from pathlib import Path

from equipoise.base.errors import UserError, one_line, own_command, several
from equipoise.cli import flags
from equipoise.cli.tables import print_data, print_doubts
from equipoise.config.reading import load_recipe
from equipoise.config.recipe import Recipe
from equipoise.data.packed import pack as write_packed_parts
from equipoise.data.sources import as_recognised, find_parts, recognise, survey
from equipoise.evaluation import labels
from equipoise.report.data_page import write_data_page
from equipoise.views.loader import worker_count


def data(options: argparse.Namespace) -> int:
    """1 where `--check` has found bad images, copies that make figures too good or labels doubtful, or what training
    refuses."""
    flags.refuse_unwritable("--report", options.report, ".html")
    meant = flags.with_overrides(Recipe(), options).data
    path = Path(meant.path)
    if path.is_file() and path.suffix in (".txt", ".lst", ".json"):
        meant = replace(meant, path=str(path.absolute().parent), train_list=str(path))
    found, problems, bad, inspection = survey(meant, options.check or options.report is not None)
    copies = inspection.problems() if inspection else []
    recognised, doubts = recognise(meant.path), None
    recipe = load_recipe(flags.FITTING.get(recognised, recognised))
    print_data(str(path), found, [*problems, *copies], bad, inspection is not None, recipe)
    if options.check_labels:
        doubts = labels.doubtful_labels(
            {part: images for part, images in found.parts.items() if part not in found.faults}
        )
        print_doubts(doubts)
    if inspection is None:
        return 0
    for what, rows in inspection.odd.items():
        first = inspection.places[rows[0]].name
        print(one_line(f"{several(len(rows), 'image')} {what} (first: {first})"))
    if inspection.copies.too_alike:
        print("many images resemble others so closely that only exact copies could be told from them")
    if options.report:
        print(f"report: {write_data_page(str(path), found, inspection, Path(options.report), doubts)}")
    pairs = inspection.copies.pairs
    return 1 if problems or bad or pairs["parts"] or pairs["labels"] else 0


def pack(options: argparse.Namespace) -> None:
    if options.short_side < 8:
        raise UserError(f"--short-side must be at least 8 pixels, not {options.short_side}")
    meant = flags.with_overrides(Recipe(), options)
    out, workers = Path(os.path.expanduser(options.out)), worker_count(meant.workers)
    lines = write_packed_parts(find_parts(as_recognised(meant.data)), out, options.short_side, workers)
    print("\n".join([*lines, f"train on it: {own_command()} train --data {shlex.quote(str(out))}"]))
