"""A file of tensors becomes its table, on the CPU. No code from the file runs."""

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from equipoise.base.errors import UserError, out_of_memory, reason

# In checkpoints of the BCL authors' code the best accuracy may be a number of NumPy's, also of one before NumPy 2.
_SCALAR = np.float64(0).__reduce__()[0]
_NUMBERS_OF_NUMPY: list[Any] = [
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8")),
]
_REFUSED = re.compile(r"GLOBAL ([\w.]+)")  # in torch's message: the function that it did not call


def load_tensors(path: Path, what: str) -> object:
    """The table in a file of safetensors or of `torch.save`. `what` the file should be is for messages: 'checkpoint'.

    Raises UserError for a file that cannot be read, is no such file, or names a function that no network needs;
    MemoryError or torch's error where the memory is too small.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals(_NUMBERS_OF_NUMPY):
            warnings.simplefilter("ignore")  # about the format of old files
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no {what} at {path}") from None
    except Exception as error:  # both libraries raise anything for a damaged file
        if out_of_memory(error):
            raise
        function = _REFUSED.search(str(error))
        why = f"it asks for '{function[1]}', which was not run" if function else reason(error)
        raise UserError(f"{path} is no {what} that can be read ({why}); take another, or copy it anew") from None
