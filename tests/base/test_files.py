"""What may be opened, JSON within bounds, and values of their kinds."""

from pathlib import Path

import pytest
from conftest import draw_picture, pipe

from equipoise import UserError, load, load_recipe
from equipoise.base.files import (
    ABSENT,
    fits,
    is_count,
    is_number,
    is_share,
    is_text,
    misfit,
    parsed_json,
    read_json,
    regular_file,
)
from equipoise.deploy.predict import read_weights
from equipoise.method.encoders import create_encoder
from equipoise.runs.checkpoint import load_checkpoint


def hub(path: Path) -> object:
    for name in ("config.json", "head.safetensors"):
        if not (path.parent / name).exists():
            (path.parent / name).write_text(
                '{"equipoise": {"recipe": {}, "class_names": ["a", "b"], "class_counts": [], "epoch": 1, "step": 1,'
                ' "temperature": null}}'
            )
    return load(path.parent)


READERS = {
    "recipe": ("mine.toml", load_recipe),
    "run's recipe": ("recipe.toml", lambda path: load_recipe(path.parent)),
    "checkpoint": ("last.pt", load_checkpoint),
    "run's checkpoint": ("last.pt", lambda path: load(path.parent)),
    "weights": ("weights.pth", lambda path: create_encoder("resnet8", 16, weights=path)),
    "safetensors": ("weights.safetensors", lambda path: create_encoder("resnet8", 16, weights=path)),
    "hub folder": ("model.safetensors", hub),
    "prior": ("prior.csv", read_weights),
    "JSON": ("x.json", lambda path: read_json(path, 100, dict, "remove it")),
}


@pytest.mark.parametrize("name", READERS)
def test_a_pipe_is_not_waited_for(name, tmp_path):
    name, read = READERS[name]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    with pipe(path), pytest.raises(UserError) as error:
        read(path)
    assert "\n" not in str(error.value)


def test_what_is_no_file_is_named(tmp_path):
    draw_picture(tmp_path / "a.png", 0, 0)
    assert regular_file(tmp_path / "a.png") == tmp_path / "a.png"
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        regular_file(tmp_path)
    with pytest.raises(OSError, match="it is no file: '/dev/zero'"):
        regular_file(Path("/dev/zero"))
    with pytest.raises(FileNotFoundError):
        regular_file(tmp_path / "b.png")


@pytest.mark.parametrize(
    "content",
    [b"[" * 5_000_000, b"[" + b"[]," * 2_000_000 + b"[]]", b"[" + b'{"a":1},' * 2_000_000 + b"1]",
     b'{"' + b'":1,"'.join(b"%d" % number for number in range(500_000)) + b'":1}'],
)  # fmt: skip
def test_json_that_would_fill_the_memory(content):
    with pytest.raises(ValueError, match="it is nearly all brackets or names"):
        parsed_json(content)


def test_json():
    assert parsed_json(b'{"a": [1, null]}') == {"a": [1, None]}
    with pytest.raises(ValueError, match="it goes too deep"):
        parsed_json(b"[" * 100_000)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", "x.json is damaged (Expecting property name enclosed in double quotes: line 1 column 2"),
        (b"\xff", "x.json is damaged (it is no UTF-8 text); remove it"),
        (b" " * 101, "x.json is damaged (it has 101 bytes); remove it"),
        (b"[]", "x.json is damaged (all of it is missing, or is not what belongs there); remove it"),
        (b'{"a": {}}', "x.json is damaged (a.b is missing, or is not what belongs there); remove it"),
        (b'{"a": {"b": [1, "x"]}}', "x.json is damaged (a.b[1] is missing, or is not what belongs there); remove it"),
        (b'{"a": {"b": [NaN]}}', "x.json is damaged (a.b[0] is missing, or is not what belongs there); remove it"),
        (None, "x.json cannot be read (no such file or directory); remove it"),
    ],
)
def test_read_json(content, sentence, tmp_path):
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_json(tmp_path / "x.json", 100, {"a": {"b": [is_number]}}, "remove it")
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (None, None, True),
        (0, None, False),
        ("a", str, True),
        ([1, 2], [is_count], True),
        ([1, -2], [is_count], False),
        ({}, [is_count], False),
        ([], {"a": is_count}, False),
        ({"a": 1, "b": "more"}, {"a": is_count}, True),
        ({}, {"a": is_count}, False),
        ({}, {"a": (ABSENT, is_count)}, True),
        ({"a": None}, {"a": (ABSENT, is_count)}, False),
        ({"x": 1, "y": 2}, {str: is_count}, True),
        ({"x": 1, "y": "2"}, {str: is_count}, False),
        ({"\ud800": 1}, {str: is_count}, False),
        (True, is_count, False),
        (2**53, is_count, False),
        (1.0, is_count, False),
        (float("nan"), is_number, False),
        (float("inf"), is_number, False),
        (10**400, is_number, False),
        (True, is_number, False),
        (-3, is_number, True),
        (-0.1, is_share, False),
        (1.1, is_share, False),
        (1, is_share, True),
        ("\udcff", is_text, True),
        ("\ud800", is_text, False),
        (b"a", is_text, False),
    ],
)
def test_kinds(value, kind, expected):
    assert fits(value, kind) is expected
    assert (misfit(value, kind) is None) is expected
