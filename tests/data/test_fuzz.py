"""Every reader on damaged files: a result or a UserError, and no more memory than promised. `make fuzz` makes more."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz import READERS, Reader, examine
from equipoise import UserError

# What numbers, sizes and nests go wrong with.
TOKENS = st.sampled_from([
    *(b"\0", b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80", b"\xd8\x00", b"9" * 30, b"-1", b"1e999"),
    *(b"nan", b"../", b"/", b"\n", b'"', b"true", b"{", b"[" * 50, b"]" * 8, b"(" * 8, b"t", b"R", b"b", b".", b"\x85"),
])  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A whole file with up to four places where bytes were changed, put in, taken out, doubled, or the rest cut off."""
    content = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(content)))
        length = draw(st.integers(0, 16))
        put = draw(st.one_of(st.binary(max_size=8), TOKENS, st.just(content[place : place + length])))
        how = draw(st.sampled_from(["put in", "replace", "replace as many", "cut off"]))
        rest = {
            "put in": place,
            "replace": place + length,
            "replace as many": place + len(put),
            "cut off": len(content),
        }
        content = content[:place] + put + content[rest[how] :]
    return content


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_refused_or_read(name, tmp_path):
    reader = READERS[name]
    seeds = reader.seeds()

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.one_of(damaged(seeds), damaged(seeds), st.binary(max_size=100)))
    def examined(content: bytes) -> None:
        valid.append(examine(reader, content, tmp_path)[0])

    valid: list[bool] = []
    examined()
    assert len(valid) >= 300
    assert not all(valid), "what was damaged was refused at least once"


@pytest.mark.parametrize("name", READERS)
def test_whole_files_are_read(name, tmp_path):
    """Else the tests above would test nothing but refusals."""
    reader = READERS[name]
    read = [examine(reader, seed, tmp_path)[0] for seed in reader.seeds()]
    refused = 2 if name == "image" else 0  # floating-point and 32-bit pixels
    assert read.count(False) <= refused


def test_the_check_sees_other_exceptions_and_memory(tmp_path):
    def read(file):
        if file.read_bytes() == b"bug":
            raise KeyError("bug")
        if file.read_bytes() == b"memory":
            np.ones(30_000_000).sum()
        if file.read_bytes() == b"user":
            raise UserError("user")
        if file.read_bytes() == b"inside":
            raise UserError(f"{file} cannot be read ({object()})")

    reader = Reader("x", list, read)
    assert examine(reader, b"good", tmp_path)[0]
    assert not examine(reader, b"user", tmp_path)[0]
    with pytest.raises(KeyError):
        examine(reader, b"bug", tmp_path)
    with pytest.raises(ValueError, match="a message with the inside of a library"):
        examine(reader, b"inside", tmp_path)
    if Path("/proc/self/clear_refs").exists():  # Linux; elsewhere memory is not measured
        with pytest.raises(MemoryError, match="bytes for an input of 6"):
            examine(reader, b"memory", tmp_path)


def zipped(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("test/labels_N.npy", content)
    return file.getvalue()


LARGE = {
    "brackets": ("annotations", lambda: b"[" + b"[]," * 5_000_000 + b"[]]"),
    "texts": ("annotations", lambda: b"[" + b'"ab",' * 4_000_000 + b"0]"),
    "names": ("annotations", lambda: b'{"' + b'":1,"'.join(b"%d" % number for number in range(2_000_000)) + b'":1}'),
    "short lines": ("list", lambda: b"ab 0\n" * 4_000_000),
    "lines": ("list", lambda: b"".join(b"%07d.jpg 0\n" % number for number in range(700_000))),
    "labels": ("list", lambda: b"".join(b"%d/a %d\n" % (number, number) for number in range(500_000))),
    "objects": ("cifar-pickle", lambda: b"\x80\x02" + b"]" * 5_000_000 + b"."),
    "tensor objects": ("checkpoint-table", lambda: b"\x80\x02" + b"}" * 5_000_000 + b"."),
    "zeros": ("cifar-tar", lambda: bytes(150_000_000)),
    "fields": ("recipe", lambda: b"a = 1\n" * 3_000_000),
    "figures": ("metrics", lambda: b"[" + b"[]," * 5_000_000 + b"[]]"),
    "classes": ("record", lambda: b"{" + b",".join(b'"%d":1' % number for number in range(1_000_000)) + b"}"),
    "steps": ("log", lambda: b'{"kind":"train","step":1,"epoch":0}\n' * 700_000),
    "long line": ("log", lambda: b'{"kind":"train","step":1,"epoch":0,"x":[' + b"[]," * 6_000_000 + b"0]}\n"),
    "zipped zeros": ("observed", lambda: zipped(bytes(500_000_000))),
    "zip entries": ("observed", lambda: b"PK\1\2" + bytes(42) + b"PK\1\2" * 10_000_000),
    "brackets of a hub folder": ("hub-config", lambda: b"[" + b"[]," * 7_600_000 + b"[]]"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_large_files_take_their_share_of_memory(name, tmp_path):
    """Read without thought, most of these took twenty times their size."""
    reader, content = LARGE[name]
    valid, taken = examine(READERS[reader], content(), tmp_path)  # raises MemoryError
    assert valid or taken < 2**28
