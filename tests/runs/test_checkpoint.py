"""Checkpoints: the same when read, damaged ones refused, and the network that they make."""

from dataclasses import replace

import pytest
import torch

from equipoise import UserError, load_recipe
from equipoise.runs.checkpoint import Checkpoint, create_network, load_checkpoint, state_on_cpu
from equipoise.runs.folder import chosen_checkpoint


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
        with pytest.raises(UserError, match=r"there is no run folder or checkpoint at "):
            chosen_checkpoint(path)
    checkpoint.save(tmp_path / "last.pt")
    assert chosen_checkpoint(tmp_path) == tmp_path / "last.pt"
    assert chosen_checkpoint(tmp_path / "bcl_ckpt.pth.tar") == tmp_path / "last.pt", "as the authors' code calls it"
    checkpoint.save(tmp_path / "best.pt")
    assert chosen_checkpoint(tmp_path) == tmp_path / "best.pt"
    assert chosen_checkpoint(tmp_path / "last.pt") == tmp_path / "last.pt"


# ---- what is no checkpoint


@pytest.mark.parametrize("part", ["weights", "momentum"])
def test_a_flipped_bit_is_found(part, checkpoint, tmp_path):
    """In a tensor: it gives another number, and torch does not look."""
    path = tmp_path / "last.pt"
    checkpoint.weights["encoder.stem.weight"] += 0.5  # so that its bytes are there once
    checkpoint.save(path)
    content = bytearray(path.read_bytes())
    momentum = checkpoint.optimizer["state"][0]["momentum_buffer"]
    tensor = momentum if part == "momentum" else checkpoint.weights["encoder.stem.weight"]
    content[content.index(tensor.numpy().tobytes()) + tensor.nbytes // 2] ^= 16
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["step"] == 20
    with pytest.raises(UserError, match=r"last.pt is damaged: a checksum in it does not fit; take another one"):
        load_checkpoint(path)


def test_files_of_earlier_versions(checkpoint, tmp_path):
    """They hold a digest of their own, which is no longer looked at."""
    path = tmp_path / "last.pt"
    checkpoint.save(path)
    table = torch.load(path, weights_only=True)
    torch.save({**table, "class_names": ["a", "b", "c"], "digest": "3f58"}, path)
    assert load_checkpoint(path).class_names == checkpoint.class_names


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("format", 1, "is not a checkpoint of this version of equipoise"),
        ("recipe", {"seed": "x"}, "seed must be a whole number"),
    ],
)
def test_other_tables_are_refused(key, value, said, checkpoint, tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path)
    torch.save({**torch.load(path, weights_only=True), key: value}, path)
    with pytest.raises(UserError, match=said) as error:
        load_checkpoint(path)
    assert str(error.value).startswith(str(path))


def test_weights_that_are_not_finite_are_not_scored(checkpoint):
    checkpoint.weights["classifier.weight"][1, 2] = torch.nan
    with pytest.raises(UserError, match=r"not all finite \(first: classifier.weight\); use an earlier"):
        checkpoint.build()


@pytest.mark.parametrize("fields", [{"encoder": "resnet20"}, {"hidden_dim": 65}])
def test_weights_of_another_network_are_refused(fields, checkpoint):
    checkpoint = replace(checkpoint, recipe=load_recipe("digits-lt", method="supcon+la", **fields))
    with pytest.raises(UserError, match=r"weights \(.*\) do not fit method .* and 3 classes; use another one"):
        checkpoint.build()


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        ("instance", [9, 4, 1]),
        ("square-root", [3, 2, 1]),
        ("class-balanced", [1, 1, 1]),
        # In the fourth of four epochs, the last that it has seen: 1/4 of 9/14, 4/14, 1/14 and 3/4 of 1/3.
        ("progressive", [(9 + 14) / (1 + 14), (4 + 14) / (1 + 14), 1]),
    ],
)
def test_plain_logits_have_the_prior_of_what_was_drawn(sampler, expected, checkpoint):
    recipe = replace(checkpoint.recipe, method="ce", epochs=4, data=replace(checkpoint.recipe.data, sampler=sampler))
    done = replace(checkpoint, recipe=recipe, epoch=4, class_counts=(9, 4, 1))
    prior = done.log_prior_of_logits().exp()
    assert torch.allclose(prior / prior[2], torch.tensor(expected, dtype=torch.float64))
