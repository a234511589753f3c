"""Words of `equipoise data` and `equipoise pack` become calls."""

import argparse
import os
import shlex
from dataclasses import replace
from pathlib import Path

from equipoise.base.errors import UserError, own_command
from equipoise.cli.flags import add_field, add_list_flags, add_set, overrides_of
from equipoise.config.recipe import Recipe, find_field, override


def add_data_words(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "path",
        metavar="PATH",
        help="folder of class folders or of a published data set, Parquet, CIFAR archive, a list file, or 'digits'",
    )
    command.add_argument("--images", metavar="FOLDER", help="PATH is a list file: what its paths are below")
    command.add_argument(
        "--write-lists", metavar="FOLDER", help="write iNaturalist's JSON as the list files of the literature"
    )
    add_list_flags(command, ("train", "val", "test"))
    command.add_argument(
        "--check", action="store_true", help="decode every image and list all bad ones; exit code 1 if there are any"
    )
    add_field(command, find_field("data.allow_outside"))
    add_set(command)


def data(options: argparse.Namespace) -> int:
    """1 where `--check` has found bad images."""
    recipe = Recipe()
    for field, value in overrides_of(options):
        recipe = override(recipe, field, value)

    from equipoise.cli.tables import print_data
    from equipoise.data.sources import Source, source_of, survey, write_lists

    path = Path(options.path)
    if path.is_file() and path.suffix in (".txt", ".lst", ".json"):
        folder = options.images or str(path.absolute().parent)
        source = Source(folder, lists={"train": str(path)}, allow_outside=recipe.data.allow_outside)
    elif options.images:
        raise UserError("--images goes with a list file as PATH; for a folder, name its lists with --train-list")
    else:
        source = source_of(replace(recipe, data=replace(recipe.data, path=options.path)))
    if options.write_lists:
        for said in write_lists(source, Path(options.write_lists)):
            print(said)
        return 0
    found, problems, bad = survey(source, options.check)
    print_data(options.path, found, problems, bad, options.check)
    return 1 if options.check and bad else 0


def add_pack_words(command: argparse.ArgumentParser) -> None:
    command.add_argument("path", metavar="DATA", help="any data that `train` takes as files of images")
    command.add_argument("--out", metavar="FOLDER", required=True, help="then: equipoise train --data FOLDER")
    command.add_argument(
        "--short-side",
        type=int,
        default=256,
        metavar="PIXELS",
        help="larger images are resized to it, and become JPEG (default: 256, which training at 224 pixels asks for)",
    )
    command.add_argument("--workers", type=int, default=-1, help="processes (default: one for each core)")
    add_list_flags(command, ("train", "val", "test"))
    add_set(command)


def pack(options: argparse.Namespace) -> None:
    if options.short_side < 8:
        raise UserError(f"--short-side must be at least 8 pixels, not {options.short_side}")
    recipe = Recipe()
    for field, value in overrides_of(options):
        recipe = override(recipe, field, value)
    if recipe.data.on_bad_image == "skip":
        raise UserError("pack passes over no bad image: equipoise data DATA --check lists them; repair or remove them")

    from equipoise.data.pack import pack as write_packed_parts
    from equipoise.data.sources import as_recognised, find_parts, source_of
    from equipoise.views.loader import worker_count

    source, _ = as_recognised(source_of(replace(recipe, data=replace(recipe.data, path=options.path))))
    out = Path(os.path.expanduser(options.out))
    told = write_packed_parts(
        find_parts(source), source.benchmark, out, options.short_side, worker_count(options.workers)
    )
    print("\n".join([*told, f"train on it: {own_command()} train --data {shlex.quote(str(out))}"]))
