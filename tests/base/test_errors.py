"""What messages say of what libraries raise."""

import io
import json

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError

from equipoise.base.errors import UnreadableError, UserError, lacks_memory, one_line, out_of_memory, reason

ODD = "its content makes no sense"


def raised(call) -> Exception:
    with pytest.raises(Exception) as error:  # noqa: PT011 of any kind
        call()
    return error.value


@pytest.mark.parametrize(
    ("error", "ours", "with_the_library"),
    [
        (PermissionError(13, "Permission denied", "x"), "permission denied", "permission denied"),
        (UnreadableError("it is packed"), "it is packed", "it is packed"),
        (UnreadableError("\x1b[31mred"), r"\x1b[31mred", r"\x1b[31mred"),
        (MemoryError(), "there is not enough memory for it", "there is not enough memory for it"),
        (
            raised(lambda: json.loads("{")),
            ODD,
            "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        ),
        (
            OSError("image file is truncated (9 bytes not processed)"),
            ODD,
            "image file is truncated (9 bytes not processed)",
        ),
        (RuntimeError("first line\nsecond line"), ODD, "first line"),
        (ValueError("x" * 1000), ODD, "x" * 150),
        (ValueError("a\rb\x1b[31m"), ODD, r"a\rb\x1b[31m"),
        (ValueError(""), ODD, ODD),
        (ValueError("\nsecond line"), ODD, ODD),
        (raised(lambda: Image.open(io.BytesIO(b"x"))), ODD, ODD),
        (KeyError(1946569571), ODD, ODD),
        (raised(lambda: b"\xff".decode()), ODD, ODD),
        (raised(lambda: int.x), ODD, ODD),  # pyright: ignore
        (ValueError("Can only append to lists, but got <class 'dict'>"), ODD, ODD),
        (OSError("Couldn't deserialize thrift: TProtocolException: Invalid data"), ODD, ODD),
        (
            RuntimeError("[enforce fail at inline_container.cc:340] . file in archive is not in a subdirectory"),
            ODD,
            ODD,
        ),
    ],
)
def test_reasons(error, ours, with_the_library):
    assert reason(error) == ours
    assert reason(error, library=True) == with_the_library


def test_another_word_for_what_no_library_says():
    assert isinstance(raised(lambda: Image.open(io.BytesIO(b"x"))), UnidentifiedImageError)
    assert reason(ValueError(), library=True, otherwise="timm does not say why") == "timm does not say why"


def test_an_error_of_the_user_is_one_line_whatever_is_in_it():
    assert str(UserError("no field is called 'com\n\x1bile'")) == r"no field is called 'com\n\x1bile'"


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."), True),
        (raised(lambda: torch.empty(2**60)), True),
        (OSError("out of memory error when reading image file"), True),  # Pillow's
        (OSError(12, "Cannot allocate memory"), True),
        (OSError(2, "No such file or directory", "out of memory"), False),
        (raised(lambda: cv2.resize(np.zeros((9, 9), np.uint8), (2**20, 2**30))), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1.00 GB)"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("unable to mmap 94273440 bytes from file: Cannot allocate memory (12)"), True),
        (RuntimeError("Error opening '/data/out of memory/a.pt'"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_is_too_little_memory(error, is_it):
    assert out_of_memory(error) is is_it


def test_a_file_that_claims_too_much_is_not_the_machines_fault(monkeypatch):
    assert not lacks_memory(MemoryError(), 10**6)
    assert not lacks_memory(ValueError(), 2**60)
    assert lacks_memory(MemoryError(), 2**60)


def test_names_in_any_script_stay_as_they_are():
    for name in ("C:\\new\\a 日本\u3000語.jpg", "screenshot 9.00\u202fAM.png", "👩\u200d👩", "Schüssel"):
        assert one_line(name) == name
    assert one_line("a\x1b[2Jb\u2028c\u202ed\udcff\x9b") == r"a\x1b[2Jb\u2028c\u202ed\udcff\x9b"
