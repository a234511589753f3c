"""A step with a momentum copy: it follows the network, is saved with the run, and is in nothing that comes of it."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import draw_folder

from equipoise import load, load_recipe, train
from equipoise.base.world import ALONE
from equipoise.deploy.hub import write_hub_folder
from equipoise.method.network import batch_norms
from equipoise.runs.checkpoint import create_network, load_checkpoint
from equipoise.training.loop import set_training
from equipoise.training.step import Step
from equipoise.views.loader import Batch
from equipoise.views.views import view_settings

COUNTS, CPU = (9, 5, 2), torch.device("cpu")
TINY = {"policy": "cifar", "size": 8, "encoder": "resnet8", "hidden_dim": 8, "feature_dim": 8, "device": "cpu",
        "holdout": 0, "epochs": 2, "batch_size": 5, "workers": 0, "precision": "fp32"}  # fmt: skip
METHODS = ["paco", "gml"]


def steps(count: int, **fields):
    """A network and its step, after so many batches of noise, and the weights before each of them."""
    recipe = load_recipe("pictures", **{**TINY, **fields})
    torch.manual_seed(0)
    network = create_network(recipe, 3, start=True)
    for module in batch_norms(network):
        module.running_mean.normal_(0, 0.1)
        module.running_var.uniform_(0.5, 1.5)
    step = Step(recipe, network, COUNTS, CPU, recipe.precision, ALONE)
    set_training(network, recipe)
    optimizer, before = torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=5e-4), []
    for number in range(count):
        random = torch.Generator().manual_seed(number)
        shape = (len(view_settings(recipe).kinds), 6, 3, 8, 8)
        images = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
        labels = torch.tensor([0, 0, 1, 0, 1, number % 3])
        before.append(copy.deepcopy(network))
        optimizer.zero_grad()
        assert np.isfinite(step(Batch(images, labels, slice(0, 6)))[0]["loss"])
        optimizer.step()
    return network, step, before, images


@pytest.mark.parametrize("method", METHODS)
def test_the_copy_follows_the_network(method):
    """0.999 * copy + 0.001 * weights, of each step in turn, in float64; with no gradient and in no optimizer."""
    network, step, before, _ = steps(4, method=method)
    follower = step.objective.momentum_copy
    expected = {name: value.double() for name, value in before[0].named_parameters()}
    for of_step in before:
        expected = {n: 0.999 * expected[n] + 0.001 * value.double() for n, value in of_step.named_parameters()}
    names = [
        f"{branch}.{n}" for branch in ("encoder", "projection") for n, _ in getattr(network, branch).named_parameters()
    ]
    found = dict(zip(names, follower.parameters(), strict=True))
    for name, value in found.items():
        assert value.grad is None
        assert torch.allclose(value.double(), expected[name].detach(), rtol=1e-6, atol=1e-7), name
    moved = [name for name in names if not torch.equal(found[name], dict(network.named_parameters())[name])]
    assert len(moved) == len(names), "the copy is another one"
    assert {id(value) for value in found.values()}.isdisjoint(map(id, network.parameters()))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"micro_batch": 3},
        {"batch_norm": "frozen"},
        {"tune": "last-stage", "weights": "file"},
        {"precision": "bf16"},
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_the_last_view_passes_the_copy_alone(method, fields, tmp_path):
    """In the modes of the network's own modules, in the same parts, and without a gradient."""
    if "weights" in fields:
        torch.save(create_network(load_recipe("pictures", **TINY), 3, start=True).encoder.state_dict(), tmp_path / "w")
        fields = fields | {"weights": str(tmp_path / "w")}
    network, step, _, images = steps(2, method=method, **fields)
    follower, micro_batch = step.objective.momentum_copy, fields.get("micro_batch", 0)
    with torch.autocast("cpu", torch.bfloat16, enabled="precision" in fields):
        outputs = network.training_outputs(images, micro_batch, follower, 0.999)
        own = network.training_outputs(images[:-1], micro_batch)
        encoder, projection = follower
        parts = images[-1].tensor_split(2 if micro_batch else 1)
        hidden = torch.cat([encoder((part - network.mean) / network.std).float() for part in parts])
        keys = F.normalize(projection(hidden).float(), dim=1)
    assert outputs.features_BVD.shape == (6, 2, 8)
    assert torch.allclose(outputs.features_BVD[:, 1], keys, atol=0.03 if "precision" in fields else 1e-6)
    assert torch.allclose(outputs.features_BVD[:, :1], own.features_BVD, atol=1e-6)
    assert torch.allclose(outputs.logits_BC, own.logits_BC, atol=1e-4)
    for ours, theirs in zip(encoder.modules(), network.encoder.modules(), strict=True):
        assert ours.training == theirs.training
    network.zero_grad()
    outputs.features_BVD[:, 1].sum().backward()
    assert not any(bool(parameter.grad.any()) for parameter in network.projection.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_nothing_of_the_copy_is_in_what_comes_of_a_run(method, tmp_path):
    """It is in the checkpoint's state of the method. The exported folder predicts what the run does."""
    data = draw_folder(tmp_path / "data", {"ant": 14, "bee": 6})
    run = train(load_recipe("pictures", data=str(data), method=method, **TINY), tmp_path / "run", progress=False)
    checkpoint = load_checkpoint(run.path / "last.pt")
    plain = create_network(load_recipe("pictures", method="supcon+la", **TINY), 2, start=False).state_dict()
    assert checkpoint.weights.keys() == checkpoint.build().state_dict().keys() == plain.keys()
    of_branches = [name for name in plain if name.startswith(("encoder.", "projection."))]
    assert len([name for name in checkpoint.objective if name.startswith("momentum_copy.")]) == len(of_branches)
    trained = len(list(checkpoint.build().parameters())) + (method == "gml")
    assert len(checkpoint.optimizer["state"]) == trained
    if method == "gml":
        assert checkpoint.objective["log_temperature"] != torch.tensor(0.07).log(), "it is learned"
        assert checkpoint.optimizer["param_groups"][-1]["weight_decay"] == 0
    write_hub_folder(tmp_path / "shared", checkpoint, None, None)
    assert not any(b"momentum_copy" in file.read_bytes() for file in (tmp_path / "shared").iterdir())
    pictures = sorted(map(str, data.glob("*/*.png")))
    ours, shared = (load(place).predict(pictures).probability_NK for place in (run.path, tmp_path / "shared"))
    assert np.array_equal(ours, shared)
