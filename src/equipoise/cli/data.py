"""`equipoise data` and `equipoise pack`: their options, and the calls that these become."""

import argparse
import os
import shlex
from dataclasses import replace
from pathlib import Path

from equipoise.base.errors import UserError, own_command
from equipoise.cli import flags
from equipoise.config.recipe import Recipe


def add_data_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    data = "a data set, as for train: a folder, Parquet, a CIFAR archive, 'digits'; a list file"
    add("data.path", metavar="PATH", help=data)
    add("--images", metavar="FOLDER", help="PATH is a list file: the folder that its paths start from")
    add("--check", action="store_true", help="decode every image, list all bad ones; exit code 1 if there are any")
    flags.add_fields(command, "data.train_list", "data.val_list", "data.test_list", "data.allow_outside")
    flags.add_set(command)


def data(options: argparse.Namespace) -> int:
    """1 where `--check` has found bad images."""
    meant = flags.with_overrides(Recipe(), options).data

    from equipoise.cli.tables import print_data
    from equipoise.data.sources import survey

    path = Path(meant.path)
    if path.is_file() and path.suffix in (".txt", ".lst", ".json"):
        meant = replace(meant, path=options.images or str(path.absolute().parent), train_list=str(path))
    elif options.images:
        raise UserError("--images goes with a list file as PATH; for a folder, name its lists with --train-list")
    found, problems, bad = survey(meant, options.check)
    print_data(str(path), found, problems, bad, options.check)
    return 1 if options.check and bad else 0


def add_pack_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("data.path", metavar="DATA", help="any data that `train` takes as files of images")
    add("--out", metavar="FOLDER", required=True, help="then: equipoise train --data FOLDER")
    help = "larger images are resized to it, and become JPEG [256: for training at 224 pixels]"
    add("--short-side", type=int, default=256, metavar="PIXELS", help=help)
    add("--workers", type=int, default=-1, help="threads (default: one for each core)")
    flags.add_fields(command, "data.train_list", "data.val_list", "data.test_list")
    flags.add_set(command)


def pack(options: argparse.Namespace) -> None:
    if options.short_side < 8:
        raise UserError(f"--short-side must be at least 8 pixels, not {options.short_side}")
    meant = flags.with_overrides(Recipe(), options).data
    if meant.on_bad_image == "skip":
        raise UserError("pack leaves out no bad image: equipoise data FOLDER --check lists them; repair or remove them")

    from equipoise.data.packed import pack as write_packed_parts
    from equipoise.data.sources import as_recognised, find_parts
    from equipoise.views.loader import worker_count

    out, workers = Path(os.path.expanduser(options.out)), worker_count(options.workers)
    lines = write_packed_parts(find_parts(as_recognised(meant)[0]), out, options.short_side, workers)
    print("\n".join([*lines, f"train on it: {own_command()} train --data {shlex.quote(str(out))}"]))
