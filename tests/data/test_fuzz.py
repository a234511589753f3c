"""Every reader on damaged files: a result or a UserError. `make fuzz` makes more."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz import READERS, examine

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


@pytest.mark.long
@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_refused_or_read(name, tmp_path):
    reader = READERS[name]
    seeds = reader.seeds()

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.one_of(damaged(seeds), damaged(seeds), st.binary(max_size=100)))
    def examined(content: bytes) -> None:
        valid.append(examine(reader, content, tmp_path))

    valid: list[bool] = []
    examined()
    assert len(valid) >= 300
    assert not all(valid), "what was damaged was refused at least once"


@pytest.mark.parametrize("name", READERS)
def test_whole_files_are_read(name, tmp_path):
    """Else the tests above would test nothing but refusals."""
    reader = READERS[name]
    read = [examine(reader, seed, tmp_path) for seed in reader.seeds()]
    refused = 2 if name == "image" else 0  # floating-point and 32-bit pixels
    assert read.count(False) <= refused
