"""What messages say of errors of the system, of libraries, and of too little memory."""

import io
import json

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from equipoise.base.errors import UserError, in_words, one_line, out_of_memory, reason, shown

UNCLEAR = "its content makes no sense"


def raised(call) -> Exception:
    with pytest.raises(Exception) as error:  # noqa: PT011 of any kind
        call()
    return error.value


@pytest.mark.parametrize(
    ("error", "ours", "with_the_library"),
    [
        (PermissionError(13, "Permission denied", "x"), "permission denied", "permission denied"),
        (raised(lambda: json.loads("{}}")), UNCLEAR, "Extra data: line 1 column 3 (char 2)"),
        (RuntimeError("first \x1b[31mline\nsecond line"), UNCLEAR, r"first \x1b[31mline"),
        (raised(lambda: Image.open(io.BytesIO(b"x"))), UNCLEAR, UNCLEAR),
        (KeyError(1946569571), UNCLEAR, UNCLEAR),
        (raised(lambda: b"\xff".decode()), UNCLEAR, UNCLEAR),
        (RuntimeError("[enforce fail at inline_container.cc:340] . no central directory"), UNCLEAR, UNCLEAR),
    ],
)
def test_reasons(error, ours, with_the_library):
    assert reason(error) == ours
    assert reason(error, library=True) == with_the_library
    assert reason(ValueError(), library=True, otherwise="timm does not say why") == "timm does not say why"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."), True),
        (raised(lambda: torch.empty(2**60)), True),
        (raised(lambda: cv2.resize(np.zeros((9, 9), np.uint8), (2**20, 2**30))), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_too_little_memory(error, expected):
    assert out_of_memory(error) is expected
    assert ("not enough memory" in in_words(error)) is expected


def test_a_message_is_one_line():
    assert str(UserError("no field is called 'com\n\x1bile'")) == r"no field is called 'com\n\x1bile'"
    assert in_words(OSError(28, "No space left on device", "x.pt")) == "no space left on device: x.pt"
    assert len(shown("x" * 10_000)) <= 100
    for name in ("C:\\new\\a 日本\u3000語.jpg", "screenshot 9.00\u202fAM.png", "👩\u200d👩", "Schüssel"):
        assert one_line(name) == name
    assert one_line("a\x1b[2Jb\u2028c\u202ed\udcff\x9b") == r"a\x1b[2Jb\u2028c\u202ed\udcff\x9b"
