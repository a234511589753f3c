"""Files of tensors: read as torch wrote them, refused where they claim more than they have, and never executed."""

import io
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from equipoise import UserError
from equipoise.base.tensors import load_tensors


def packed(program: bytes, *, pack: int = zipfile.ZIP_STORED, records: dict[str, bytes] | None = None) -> bytes:
    """A file as `torch.save` writes it, around a pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", pack) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/version", b"3\n")
        for name, content in (records or {}).items():
            archive.writestr(f"archive/data/{name}", content)
    return file.getvalue()


def refused(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_tensors(path, "checkpoint")
    said = str(error.value)
    assert said.startswith(f"{path} is no checkpoint that can be read (")
    assert "\n" not in said
    return said


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("best", [57.25, torch.tensor(57.25), np.float64(57.25), np.float32(57.25)], ids=repr)
def test_files_as_torch_writes_them(zipped, best, tmp_path):
    weight = torch.randn(2, 3).T  # not contiguous
    table = {
        "state_dict": OrderedDict(a=weight, b=torch.nn.Parameter(weight)),
        "best": best,
        "names": ("a", "b"),
        3: [None],
    }
    path = tmp_path / "x.pth.tar"
    torch.save(table, path, _use_new_zipfile_serialization=zipped)
    read = load_tensors(path, "checkpoint")
    assert isinstance(read, dict)
    path.unlink()  # nothing is left in the file
    assert torch.equal(read["state_dict"]["a"], weight)
    assert torch.equal(read["state_dict"]["b"], weight)
    assert float(read["best"]) == 57.25
    assert (read["names"], read[3]) == (("a", "b"), [None])


def test_a_number_of_an_older_numpy(tmp_path):
    path = tmp_path / "x"
    torch.save({"best_acc1": np.float64(57.25)}, path, pickle_protocol=2, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert b"cnumpy._core.multiarray\nscalar\n" in content
    path.write_bytes(content.replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray"))
    assert load_tensors(path, "checkpoint") == {"best_acc1": 57.25}


class Payload:
    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("function", "asked"), [(os.mkdir, "posix.mkdir"), (os.system, "posix.system"), (exec, "builtins.exec")]
)
def test_a_payload_is_refused_and_not_run(function, asked, zipped, tmp_path):
    mark = tmp_path / "executed"
    argument = {os.mkdir: str(mark), os.system: f"mkdir {mark}", exec: f"import os; os.mkdir({str(mark)!r})"}[function]
    torch.save({"weights": Payload(function, argument)}, tmp_path / "x", _use_new_zipfile_serialization=zipped)
    said = refused(tmp_path / "x", (tmp_path / "x").read_bytes())
    if function is exec:
        asked = r"(__builtin__\.)?exec"  # as protocol 2 says it, and torch tells it
    assert re.search(f"it asks for '{asked}', which no checkpoint needs; nothing of it was run", said)
    assert not mark.exists()
    torch.load(tmp_path / "x", weights_only=False)
    assert mark.exists(), "it would have run"


def tensor(claimed: int, size: int, stride: int) -> bytes:
    """The pickle of a tensor of so many numbers, in a record said to have `claimed` of them."""

    def number(value: int) -> bytes:
        return b"\x8a\x08" + struct.pack("<q", value)

    record = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
        + number(claimed)
        + b"tQ"
    )
    shape = number(size) + b"\x85" + number(stride) + b"\x85"
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + record + number(0) + shape + hooks + b"tR."


@pytest.mark.parametrize(
    ("claimed", "size", "stride"),
    [
        (10**6, 10**6, 1),  # more than the record: would be read beyond its end
        (4, 10**9, 0),  # one number, a thousand million times
    ],
)
def test_tensors_that_claim_more_than_the_file_has(claimed, size, stride, tmp_path):
    (tmp_path / "x").write_bytes(packed(tensor(4, 4, 1), records={"0": struct.pack("<4f", 1, 2, 3, 4)}))
    read = load_tensors(tmp_path / "x", "checkpoint")
    assert isinstance(read, torch.Tensor)
    assert read.tolist() == [1, 2, 3, 4]
    refused(tmp_path / "x", packed(tensor(claimed, size, stride), records={"0": struct.pack("<4f", 1, 2, 3, 4)}))


def test_no_memory_is_taken_for_what_a_record_claims(tmp_path):
    """Of a mapped file it gets what there is."""
    (tmp_path / "x").write_bytes(packed(tensor(10**15, 4, 1), records={"0": struct.pack("<4f", 1, 2, 3, 4)}))
    try:
        read = load_tensors(tmp_path / "x", "checkpoint")
    except UserError:
        return  # as some versions of torch have it
    assert isinstance(read, torch.Tensor)
    assert read.tolist() == [1, 2, 3, 4]
    assert read.untyped_storage().nbytes() == 16


def test_a_packed_file_is_not_unpacked(tmp_path):
    bomb = packed(b"\x80\x02}.", pack=zipfile.ZIP_DEFLATED, records={"0": bytes(10**8)})
    assert len(bomb) < 200_000
    assert "(it is packed)" in refused(tmp_path / "x", bomb)


def test_entries_upon_each_other(tmp_path):
    """Two entries of the directory that name the same bytes of the file."""
    content = packed(b"\x80\x02}.", records={"0": bytes(10**6), "1": b""})
    start = content.index(b"PK\x01\x02")
    first = content.index(b"archive/data/0", start) - 46
    last = content.index(b"archive/data/1", start) - 46
    entry = bytearray(content[first : first + 46] + b"archive/data/1")
    doubled = content[:last] + bytes(entry) + content[last + 46 + len("archive/data/1") :]
    assert "it claims more than it has" in refused(tmp_path / "x", doubled)


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02" + b"]" * 1_000_000 + b".",
        b"\x80\x02}" + b"N" + b"\x85" * 100_000 + b"Ns.",  # as a key it would overflow the stack
    ],
)
def test_programs_that_only_make_objects(program, tmp_path):
    assert "it makes more objects than a network has" in refused(tmp_path / "x", packed(program))


def test_circles_and_depth(tmp_path):
    circle: list[object] = []
    circle.append(circle)
    torch.save(circle, tmp_path / "x")
    assert "go too deep" in refused(tmp_path / "x", (tmp_path / "x").read_bytes())
    thousand: list[object] = [0]
    for _ in range(8):
        thousand = [thousand] * 1000  # 10^24 entries, eight lists
    torch.save(thousand, tmp_path / "x")
    read = load_tensors(tmp_path / "x", "checkpoint")
    assert isinstance(read, list)
    assert read[0] is read[999]


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04", b"\x80", b"hello", pickle.dumps([1]), packed(b""), packed(b"."), packed(b"\x80\x02Q.")],
)
def test_what_is_none(content, tmp_path):
    assert "x is no checkpoint that can be read (" in refused(tmp_path / "x", content)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    ],
    ids=["sparse", "nested", "quantized"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch says of the last two that they are new, or old
def test_tensors_that_no_network_has(make, tmp_path):
    torch.save({"a": make()}, tmp_path / "x")
    assert "of a kind that no network has" in refused(tmp_path / "x", (tmp_path / "x").read_bytes())


def test_a_number_that_claims_to_be_large(tmp_path):
    """NumPy's own would take two thousand million bytes for it."""
    program = pickle.dumps(np.float64(1), 2)
    assert b"X\x02\x00\x00\x00f8" in program
    huge = program.replace(b"X\x02\x00\x00\x00f8", b"X\x0b\x00\x00\x00V2000000000")
    assert "a number of an unknown kind" in refused(tmp_path / "x", packed(huge))


def test_absent_and_folder(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint at"):
        load_tensors(tmp_path / "none.pt", "checkpoint")
    with pytest.raises(UserError, match=r"no checkpoint that can be read \(it is a folder\)"):
        load_tensors(tmp_path, "checkpoint")


def test_a_program_under_a_name_in_capitals_is_looked_through(tmp_path):
    """torch's reader does not mind the case."""
    program = b"\x80\x02}N" + b"\x85" * 300_000 + b"Ns."
    content = packed(program).replace(b"archive/data.pkl", b"archive/data.PKL")
    assert "more objects than a network has" in refused(tmp_path / "x.pt", content)


def test_two_directories_are_refused(tmp_path):
    """torch goes to where the end of the file says that the directory is, Python to what lies just before the end."""
    program, good = b"\x80\x02}N" + b"\x85" * 300_000 + b"Ns.", b"\x80\x02}."
    evil, harmless = packed(program), packed(good)
    at, end = evil.rindex(b"PK\x05\x06"), harmless.rindex(b"PK\x05\x06")
    start, start_harmless = (struct.unpack("<L", x[e + 16 : e + 20])[0] for x, e in ((evil, at), (harmless, end)))
    directory, moved, place = bytearray(harmless[start_harmless:end]), start - start_harmless, 0
    while place < len(directory):
        lengths = struct.unpack("<HHH", directory[place + 28 : place + 34])
        offset = struct.unpack("<L", directory[place + 42 : place + 46])[0] + moved
        directory[place + 42 : place + 46] = struct.pack("<L", offset)
        place += 46 + sum(lengths)
    content = evil[:at] + harmless[:start_harmless] + bytes(directory) + evil[at:]
    assert "it has two directories" in refused(tmp_path / "x.pt", content)
    assert "it has two directories" in refused(tmp_path / "x.pt", packed(good) + b"\0" * 8)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_numbers_that_no_network_has(dtype, tmp_path):
    file = io.BytesIO()
    torch.save({"a": torch.zeros(2).to(dtype)}, file)
    assert "a tensor of a kind that no network has" in refused(tmp_path / "x.pt", file.getvalue())


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_too_little_memory_makes_no_file_a_damaged_one(name, tmp_path):
    """In a real process that may take no more."""
    weights = {"a": torch.zeros(40 << 20, dtype=torch.uint8)}
    torch.save(weights, tmp_path / name) if name == "x.pt" else save_file(weights, tmp_path / name)
    program = f"""
import pathlib, re, resource
import numpy, safetensors.torch, timm, torch
from equipoise.method.encoders import _read_safetensors
from equipoise.base.tensors import load_tensors
file = pathlib.Path({str(tmp_path / name)!r})
read = _read_safetensors if file.suffix == ".safetensors" else lambda file: load_tensors(file, "checkpoint")
assert len(read(file)) == 1
used = int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (used + (20 << 20),) * 2)
try:
    read(file)
except MemoryError:
    print("no memory")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert ended.stderr == ""
    assert ended.stdout == "no memory\n"
