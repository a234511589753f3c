"""Whether the script that runs may be imported again, by processes that it starts."""

import multiprocessing
import sys
from pathlib import Path

from equipoise.base.errors import UserError


def refuse_unguarded_script() -> None:
    """Raise UserError where processes start by importing the main script ('spawn', 'forkserver') and it never asks
    whether its `__name__` is `__main__`: each of them would begin anew what led here."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    if multiprocessing.get_start_method() == "fork" or file is None or Path(file).name == "__main__.py":
        return  # nothing is imported; nor in a notebook, nor under `python -m PACKAGE`
    if b"__main__" not in Path(file).read_bytes():
        raise UserError(
            f"{file}: loader processes import this script, and would run it again; put what must run once under if "
            '__name__ == "__main__": or set workers=0'
        )
