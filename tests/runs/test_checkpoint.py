"""Checkpoints: whole or not there, the same when read, and never executed."""

import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from equipoise import UserError, load_recipe
from equipoise.base.files import atomic_file
from equipoise.config.recipe import Views, find_field, override
from equipoise.method.encoders import pretrained_normalisation
from equipoise.runs.checkpoint import Checkpoint, _digest, create_network, load_checkpoint, state_on_cpu


@pytest.fixture
def checkpoint() -> Checkpoint:
    recipe = load_recipe("digits-lt", method="supcon+la", milestones="0.5 3")
    network = create_network(recipe, 3, start=False)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    return Checkpoint(
        recipe,
        ("a", "b", "c"),
        (9, 5, 1),
        4,
        20,
        (0.75, 3),
        state_on_cpu(network),
        optimizer.state_dict(),
        {"train": "f00"},
    )


def test_round_trip(checkpoint, tmp_path):
    checkpoint.save(tmp_path / "last.pt")
    read = load_checkpoint(tmp_path / "last.pt")
    assert read.recipe == checkpoint.recipe
    assert (read.class_names, read.class_counts, read.epoch, read.step, read.best) == (
        ("a", "b", "c"), (9, 5, 1), 4, 20, (0.75, 3)
    )  # fmt: skip
    assert read.weights.keys() == checkpoint.weights.keys()
    assert all(torch.equal(read.weights[name], value) for name, value in checkpoint.weights.items())
    assert read.optimizer["param_groups"] == checkpoint.optimizer["param_groups"]
    network = read.build()
    assert not network.training
    assert network(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)).shape == (2, 3)


def test_pretrained_weights_of_another_normalisation_are_refused():
    """Unless the recipe has a mean of its own. The weights themselves are not asked for before."""
    vit = {"encoder": "vit_small_patch16_224", "pretrained": True}
    with pytest.raises(UserError, match=r"recipe's; add --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5$"):
        create_network(load_recipe("pictures", **vit), 3, start=True)
    absent = {"weights": "none.pth", "mean": "0.5 0.5 0.5", "std": "0.5 0.5 0.5"}
    with pytest.raises(UserError, match=r"no file of weights at none\.pth"):
        create_network(load_recipe("pictures", **vit, **absent), 3, start=True)


@pytest.mark.parametrize("name", ["resnet18", "resnext50", "resnet152.tv_in1k", "resnet32", "none", "resnet18.none"])
def test_imagenets_normalisation(name):
    known = pretrained_normalisation(name)
    assert known == (None if name in ("resnet32", "none", "resnet18.none") else (Views().mean, Views().std))


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "last.pt"
    path.write_bytes(b"old")

    def write_half() -> None:
        with atomic_file(path) as file:
            file.write(b"half")
            raise RuntimeError("power")

    with pytest.raises(RuntimeError, match="power"):
        write_half()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["last.pt"]


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("content", ["payload", "payload-pickle", "text", "empty", "half", "other", "incomplete"])
def test_what_is_no_checkpoint_is_refused_and_not_run(content, checkpoint, tmp_path):
    path, mark = tmp_path / "last.pt", tmp_path / "executed"
    if content == "payload":
        torch.save({"format": 1, "recipe": Payload(mark)}, path)
    elif content == "payload-pickle":
        path.write_bytes(pickle.dumps(Payload(mark)))
    elif content == "half":
        checkpoint.save(path)
        path.write_bytes(path.read_bytes()[:5000])
    elif content == "incomplete":
        torch.save({"format": 1, "best": None}, path)
    elif content == "other":
        torch.save({"state_dict": {}}, path)
    else:
        path.write_text({"text": "hello", "empty": ""}[content])
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert not mark.exists()


def test_absent(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint at"):
        load_checkpoint(tmp_path / "none.pt")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("recipe", 3), ("recipe", {"seed": "x"}), ("recipe", {1: 2}),
        ("class_names", 3), ("class_names", ()), ("class_names", ("a", "a", "b")), ("class_names", ("a", 1, None)),
        ("class_counts", (1, 2)), ("class_counts", (1, 2, -3)), ("class_counts", (1, 2, 0)),
        ("class_counts", (1, 2, "x")), ("class_counts", None),
        ("epoch", -1), ("epoch", "x"), ("epoch", 2**70), ("epoch", True), ("epoch", 900), ("step", 1.5), ("step", 3),
        ("best", 3), ("best", (1,)), ("best", ("x", 2)), ("best", {}),
        ("best", (float("nan"), 2)), ("best", (1.5, 2)), ("best", (-0.5, 2)), ("best", (0.5, 0)), ("best", (0.5, 5)),
        ("weights", []), ("weights", {1: torch.zeros(1)}), ("weights", {"a": "x"}),
        ("optimizer", None), ("optimizer", {"state": []}), ("optimizer", {"state": {}, "param_groups": 3}),
        ("optimizer", {"state": {0: 5}, "param_groups": []}), ("optimizer", {"state": {0: {}}, "param_groups": []}),
        ("optimizer", {"state": {"0": {"momentum_buffer": torch.zeros(1)}}, "param_groups": []}),
        ("fingerprints", {"train": 3}), ("fingerprints", ()),
    ],
)  # fmt: skip
def test_tables_of_anybodys(key, value, checkpoint, tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path)
    table = torch.load(path, weights_only=True)
    table["step"] = 1000
    table[key] = value
    torch.save({**table, "digest": _digest(table)}, path)
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    assert str(error.value).startswith(str(path))
    assert "checksum does not fit" not in str(error.value)


@pytest.mark.parametrize("spoil", [{"step": 10**500}, {"weights": {"a": torch.zeros(2)}}, {"digest": None}])
def test_a_digest_that_does_not_fit(spoil, checkpoint, tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path)
    torch.save({**torch.load(path, weights_only=True), **spoil}, path)
    with pytest.raises(UserError, match="is damaged: its checksum does not fit"):
        load_checkpoint(path)


def test_kind_and_shape_of_tensors_are_in_the_digest(checkpoint, tmp_path):
    """The same bytes as other numbers, or in other rows."""
    name, value = next(iter(checkpoint.weights.items()))
    path = tmp_path / "last.pt"
    for other in (value.view(torch.int32), value.flatten()):
        checkpoint.save(path)
        table = torch.load(path, weights_only=True)
        table["weights"][name] = other
        torch.save(table, path)
        with pytest.raises(UserError, match="is damaged: its checksum does not fit"):
            load_checkpoint(path)


def test_weights_that_are_not_finite_are_not_scored(checkpoint):
    checkpoint.weights["classifier.weight"][1, 2] = torch.nan
    with pytest.raises(
        UserError, match=r"weights are not all finite numbers \(first: classifier.weight\); use an earlier"
    ):
        checkpoint.build()


@pytest.mark.skipif(sys.platform != "linux", reason="it limits memory as Linux does")
def test_no_memory_is_taken_for_what_a_recipe_claims(checkpoint, tmp_path):
    """A network of 2.5 GB, two projections of 17 GB each, classes of 0.8 GB, named by files of 2 MB at most: refused
    with 500 MB more than the process has."""
    huge = override(checkpoint.recipe, find_field("encoder"), "vit_huge_patch14_224")
    wide = override(checkpoint.recipe, find_field("hidden_dim"), 65_536)
    wide = override(wide, find_field("feature_dim"), 65_536)
    replace(checkpoint, recipe=huge).save(tmp_path / "huge.pt")
    replace(checkpoint, recipe=wide).save(tmp_path / "wide.pt")
    names, counts = tuple(str(number) for number in range(10**5)), (1,) * 10**5
    deep = override(checkpoint.recipe, find_field("encoder"), "resnet50")
    replace(checkpoint, recipe=deep, class_names=names, class_counts=counts).save(tmp_path / "many.pt")
    code = (
        "import resource, sys, timm\n"
        "from pathlib import Path\n"
        "from equipoise import UserError\nfrom equipoise.runs.checkpoint import load_checkpoint\n"
        "read = [load_checkpoint(path) for path in sys.argv[1:]]\n"
        "size = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize() + 500_000_000\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size, size))\n"
        "for checkpoint in read:\n"
        "    try:\n        checkpoint.build()\n"
        "    except UserError as error:\n        print(error)\n"
    )
    files = [str(tmp_path / f"{name}.pt") for name in ("huge", "wide", "many")]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [
        f"the checkpoint's weights do not fit the {what} classes that it names; use another one"
        for what in ("vit_huge_patch14_224 and 3", "resnet8 and 3", "resnet50 and 100,000")
    ], done.stderr


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is no file"), atomic_file(tmp_path / "pipe"):
        pass
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "file")
    for content in (b"first", b"second"):
        with atomic_file(tmp_path / "link") as file:
            file.write(content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "far" / "file").read_bytes() == content
    assert [path.name for path in (tmp_path / "far").iterdir()] == ["file"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_is_kept(mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        with atomic_file(tmp_path / "file"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode
