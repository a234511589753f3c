"""Whether the script that runs may be imported again, by processes that it starts."""

import ast
import inspect
import multiprocessing
import sys
from pathlib import Path

from equipoise.base.errors import UserError


def refuse_unguarded_script() -> None:
    """Raise UserError where processes start by importing the main script ('spawn', 'forkserver') and its call that led
    here is not under `if __name__ == "__main__":`. Each of them would begin that call anew."""
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    if multiprocessing.get_start_method() == "fork" or file is None or Path(file).name == "__main__.py":
        return  # nothing is imported; nor in a notebook, nor under `python -m PACKAGE`
    line, frame = 0, inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals is vars(main):
            line = frame.f_lineno
        frame = frame.f_back
    if line and not _is_guarded(ast.parse(Path(file).read_bytes()), line):
        raise UserError(
            f"{file}, line {line}: loader processes import this script, and would run this line too; put it under if "
            '__name__ == "__main__": or set workers=0'
        )


def _is_guarded(script: ast.Module, line: int) -> bool:
    """Whether the line is within an `if` that looks at `__name__`."""
    around = (
        node
        for node in ast.walk(script)
        if isinstance(node, ast.If) and node.lineno <= line <= (node.end_lineno or node.lineno)
    )
    return any(isinstance(part, ast.Name) and part.id == "__name__" for node in around for part in ast.walk(node.test))
