"""The command `equipoise`: arguments become calls, and exceptions one clear line."""

import argparse
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from equipoise import __version__
from equipoise.base import progress
from equipoise.base.errors import SharedError, Stopped, UserError, in_words, one_line, out_of_memory
from equipoise.cli.flags import with_overrides
from equipoise.cli.options import COMMANDS
from equipoise.config.reading import load_recipe, shipped_recipes
from equipoise.config.recipe import PUBLISHED, Recipe, nearest

_DESCRIPTION = """\
Train image classifiers on long-tailed data with Balanced Contrastive Learning (BCL, CVPR 2022).

  equipoise train                          the demo: digits with a long tail, BCL beside plain cross-entropy
  equipoise train --data FOLDER            your own pictures, one sub-folder a class; or a published data set
  equipoise train cifar10-lt --data FOLDER a recipe of the literature
  equipoise predict RUN IMAGES_OR_FOLDER   the classes of images, with probabilities
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (default: those of this process) and return its exit code: 1 for what `data`,
    `doctor` and `predict` found, 2 for what a user must put right, 130 and 143 after SIGINT, and SIGTERM or SIGHUP."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may be no valid text
    if hasattr(signal, "SIGUSR1") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # it asks a run to save: until one handles it, it must not kill
    try:
        return _run([_dashed(word) for word in (sys.argv[1:] if arguments is None else arguments)])
    except (UserError, Stopped) as error:
        # What all processes raise, one on each host says.
        if not isinstance(error, SharedError | Stopped) or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"equipoise: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("equipoise: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `equipoise recipes | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, RuntimeError, MemoryError) as error:  # no permission, a full disk; too little memory
        if not isinstance(error, OSError) and not out_of_memory(error):
            raise
        print(f"equipoise: {one_line(in_words(error))}", file=sys.stderr)
        return 2


def _run(words: list[str]) -> int:
    options, unknown = _parser(words).parse_known_args(words)
    if unknown and not unknown[0].startswith("-"):
        options.parser.error(f"'{unknown[0]}' is one argument too many")
    if unknown:
        option = unknown[0].partition("=")[0]
        valid = [name for name in options.parser._option_string_actions if name.startswith("--")]
        options.parser.error(f"no option is called {option}{nearest(option, valid)}")
    progress.quiet = options.quiet
    if "set" in options and "WORLD_SIZE" not in os.environ:
        with_overrides(Recipe(), options)  # a process alone refuses a wrong value at once, before torch is imported
    return getattr(import_module(f"equipoise.cli.{options.module}"), options.command)(options) or 0


def _dashed(argument: str) -> str:
    """`--batch_size=8` as `--batch-size=8`: the authors' spelling of options is as good."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if argument.startswith("--") else argument


class _Parser(argparse.ArgumentParser):
    """One whose errors are a UserError of one line."""

    def error(self, message: str) -> NoReturn:
        # Of the several names of an option, 'argument --path/--data: ...', the last long one.
        message = re.sub(r"^argument (?:\S+/)?(--\w[\w-]+)[^\s:]*", r"argument \1", message)
        raise UserError(f"{message} (see {self.prog} --help)")


def _parser(arguments: list[str]) -> argparse.ArgumentParser:
    parser = _Parser(
        "equipoise", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"equipoise {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, (summary, module, add_options) in COMMANDS.items():
        description = f"{summary[0].upper()}{summary[1:]}."
        command: Any = commands.add_parser(name, help=summary, description=description, allow_abbrev=False)
        command.set_defaults(module=module, parser=command)
        command.add_argument("--quiet", action="store_true", help="print results and errors only: no plan, no progress")
        add_options(command, arguments)
    return parser


def recipes(options: argparse.Namespace) -> None:
    if options.methods:
        from equipoise.method.methods import METHODS

        said = {name: " ".join(str(method.__doc__).split()) for name, method in METHODS.items()}
        for name, brought in PUBLISHED.items():  # what they bring along into a recipe of another method
            said[name] += f" [{', '.join(f'{field} = {value}' for field, value in brought.items())}]"
    else:
        said = {name: load_recipe(name).summary for name in shipped_recipes()}
    for name, summary in said.items():
        print(f"{name:<14}  {summary}")


def completion(options: argparse.Namespace) -> None:
    import shtab

    parser = _parser([])
    commands: Any = parser._subparsers and parser._subparsers._group_actions[0].choices
    for action in [action for command in commands.values() for action in command._actions]:
        if "|" in str(action.metavar) and "FILE" not in str(action.metavar):
            action.choices = str(action.metavar).split("|")
        elif action.choices is None and action.nargs != 0:
            action.complete = shtab.FILE
    print(shtab.complete(parser, options.shell))
