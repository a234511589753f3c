"""Checkpoints: whole or not there, the same when read, and never executed."""

import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from equipoise import UserError, load_recipe
from equipoise.base.files import atomic_file
from equipoise.config.recipe import Views
from equipoise.method.encoders import pretrained_normalisation
from equipoise.runs.checkpoint import Checkpoint, create_network, digest_of, load_checkpoint, state_on_cpu
from equipoise.runs.folder import chosen_checkpoint, find_checkpoint


@pytest.fixture
def checkpoint() -> Checkpoint:
    """After four epochs of digits by 'supcon+la', with the momentum of its first parameter."""
    recipe = load_recipe("digits-lt", method="supcon+la", milestones="0.5 3")
    network = create_network(recipe, 3, start=False)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9).state_dict()
    optimizer["state"] = {0: {"momentum_buffer": torch.ones_like(next(network.parameters()))}}
    weights, data = state_on_cpu(network), {"train": "f00"}
    return Checkpoint(recipe, ("a", "b", "c"), (9, 5, 1), 4, 20, (0.75, 3), weights, optimizer, data)


def test_round_trip(checkpoint, tmp_path):
    checkpoint.save(tmp_path / "last.pt")
    read = load_checkpoint(tmp_path / "last.pt")
    assert replace(read, weights={}, optimizer={}) == replace(checkpoint, weights={}, optimizer={})
    assert read.weights.keys() == checkpoint.weights.keys()
    assert all(torch.equal(read.weights[name], value) for name, value in checkpoint.weights.items())
    assert read.optimizer["param_groups"] == checkpoint.optimizer["param_groups"]
    momentum = read.optimizer["state"][0]["momentum_buffer"]
    assert torch.equal(momentum, checkpoint.optimizer["state"][0]["momentum_buffer"])
    network = read.build()
    assert not network.training
    assert network(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)).shape == (2, 3)


def test_the_checkpoint_before_the_last_is_kept(checkpoint, tmp_path):
    for epoch in (1, 2, 3):
        replace(checkpoint, epoch=epoch, best=None).save_last(tmp_path)
    assert [load_checkpoint(tmp_path / f"{name}.pt").epoch for name in ("previous", "last")] == [2, 3]


def test_which_checkpoint_a_path_means(checkpoint, tmp_path):
    for path in (tmp_path, tmp_path / "none.pt"):
        with pytest.raises(UserError, match=r"neither|there is no run folder or checkpoint"):
            chosen_checkpoint(path)
    checkpoint.save(tmp_path / "last.pt")
    assert chosen_checkpoint(tmp_path) == tmp_path / "last.pt"
    assert find_checkpoint(tmp_path / "bcl_ckpt.pth.tar") == tmp_path / "last.pt", "as the authors' code calls it"
    checkpoint.save(tmp_path / "best.pt")
    assert chosen_checkpoint(tmp_path) == tmp_path / "best.pt"
    assert chosen_checkpoint(tmp_path / "last.pt") == tmp_path / "last.pt"


def test_pretrained_weights_of_another_normalisation_are_refused():
    """Unless the recipe has a mean of its own. The weights themselves are not asked for before."""
    vit = {"encoder": "vit_small_patch16_224", "pretrained": True}
    with pytest.raises(UserError, match=r"recipe's; add --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5$"):
        create_network(load_recipe("pictures", **vit), 3, start=True)
    absent = {"weights": "none.pth", "mean": "0.5 0.5 0.5", "std": "0.5 0.5 0.5"}
    with pytest.raises(UserError, match=r"none\.pth"):
        create_network(load_recipe("pictures", **vit, **absent), 3, start=True)


@pytest.mark.parametrize("name", ["resnet18", "resnet152.tv_in1k", "resnet32", "none", "resnet18.none"])
def test_imagenets_normalisation(name):
    known = pretrained_normalisation(name)
    assert known == (None if name in ("resnet32", "none", "resnet18.none") else (Views().mean, Views().std))


# ---- files


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


def test_a_link_stays_a_link(checkpoint, tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "last.pt")
    checkpoint.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "far").iterdir()] == ["last.pt"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_is_kept(mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        with atomic_file(tmp_path / "file"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


# ---- what is no checkpoint


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("content", ["payload", "payload-pickle", "text", "empty", "half", "other", "format 1"])
def test_what_is_no_checkpoint_is_refused_and_not_run(content, checkpoint, tmp_path):
    path, mark = tmp_path / "last.pt", tmp_path / "executed"
    if content == "payload":
        torch.save({"format": 1, "recipe": Payload(mark)}, path)
    elif content == "payload-pickle":
        path.write_bytes(pickle.dumps(Payload(mark)))
    elif content == "half":
        checkpoint.save(path)
        path.write_bytes(path.read_bytes()[:5000])
    elif content == "format 1":
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
        ("recipe", 3), ("recipe", {"seed": "x"}), ("class_names", ()), ("class_names", ("a", "a", "b")),
        ("class_names", ("a", 1, None)), ("class_counts", (1, 2)), ("class_counts", (1, 2, 0)), ("class_counts", None),
        ("epoch", -1), ("epoch", True), ("epoch", 900), ("step", 1.5), ("step", 3), ("best", 3), ("best", (1,)),
        ("best", (float("nan"), 2)), ("best", (1.5, 2)), ("best", (0.5, 0)), ("best", (0.5, 5)),
        ("weights", []), ("weights", {"a": "x"}), ("optimizer", None), ("optimizer", {"state": []}),
        ("optimizer", {"state": {0: {}}, "param_groups": []}), ("fingerprints", {"train": 3}),
    ],
)  # fmt: skip
def test_a_table_that_was_changed(key, value, checkpoint, tmp_path):
    """By somebody who has put the checksum right."""
    path = tmp_path / "last.pt"
    checkpoint.save(path)
    table = {**torch.load(path, weights_only=True), key: value}
    torch.save({**table, "digest": digest_of(table)}, path)
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert "checksum does not fit" not in str(error.value)


@pytest.mark.parametrize("spoil", ["step", "weights", "digest", "kind", "shape"])
def test_a_digest_that_does_not_fit(spoil, checkpoint, tmp_path):
    """Other values, and the same bytes as other numbers or in other rows."""
    path = tmp_path / "last.pt"
    checkpoint.save(path)
    table = torch.load(path, weights_only=True)
    name, value = next(iter(checkpoint.weights.items()))
    if spoil in ("kind", "shape"):
        table["weights"][name] = value.view(torch.int32) if spoil == "kind" else value.flatten()
    else:
        table[spoil] = {"step": 21, "weights": {"a": torch.zeros(2)}, "digest": None}[spoil]
    torch.save(table, path)
    with pytest.raises(UserError, match="is damaged: its checksum does not fit"):
        load_checkpoint(path)


def test_the_digest_of_a_file_of_before(checkpoint):
    """It is what every version computes: checkpoints that were written are read."""
    table = {"weights": {"a": torch.arange(3.0)}, "best": (0.75, 3), "class_names": ["a"], "epoch": 4, "digest": "x"}
    assert digest_of(table) == "3f585e41600c8db8d72b5ea7e7f61efccd21cc3be2cf2cc30bf7fe5a9501a2ee"
    assert digest_of({**table, "class_names": ("a",)}) == digest_of(table)


def test_weights_that_are_not_finite_are_not_scored(checkpoint):
    checkpoint.weights["classifier.weight"][1, 2] = torch.nan
    with pytest.raises(UserError, match=r"not all finite numbers \(first: classifier.weight\); use an earlier"):
        checkpoint.build()


@pytest.mark.parametrize("fields", [{"encoder": "vit_huge_patch14_224"}, {"hidden_dim": 65_536, "feature_dim": 65_536}])
def test_weights_of_another_network_are_refused_before_it_is_built(fields, checkpoint, monkeypatch):
    """The network that the recipe names may be larger than the memory."""
    checkpoint = replace(checkpoint, recipe=load_recipe("digits-lt", method="supcon+la", **fields))
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *_: pytest.fail("it was built"))
    with pytest.raises(UserError, match=r"weights do not fit the .* and 3 classes that it names; use another one"):
        checkpoint.build()
