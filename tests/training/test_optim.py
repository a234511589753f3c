"""The moving average of the weights, by hand, and what a run does with it (that it goes on: test_numbers.py too). SGD
and its schedules are in test_loop.py."""

import copy
import os
import signal

import pytest
import torch
from conftest import draw_folder
from torch import nn

from equipoise import load_recipe, train
from equipoise.base.errors import Stopped
from equipoise.runs.checkpoint import load_checkpoint, state_on_cpu
from equipoise.training import loop
from equipoise.training.loop import average_in
from equipoise.training.plan import prepare
from equipoise.training.session import start


def test_the_average_by_hand():
    """Number by number: after steps 1, 2, ..., the weight of the past is 2/11, 3/12, ..., and 0.5 at most. What does
    not change stays to the last bit."""
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    averaged, resting = copy.deepcopy(network), network[0].bias.detach().clone()
    expected = {name: value.tolist() for name, value in network.state_dict().items()}
    for step in range(1, 30):
        with torch.no_grad():
            network[0].weight.normal_()
        network(torch.randn(4, 3, dtype=torch.float64))
        average_in(averaged, network, 0.5, step)
        past = min(0.5, (1 + step) / (10 + step))
        for name in ("0.weight", "1.running_mean"):
            new = network.state_dict()[name]
            expected[name] = (past * torch.tensor(expected[name], dtype=torch.float64) + (1 - past) * new).tolist()
    for name in ("0.weight", "1.running_mean"):
        assert torch.allclose(
            averaged.state_dict()[name], torch.tensor(expected[name], dtype=torch.float64), rtol=1e-12
        )
    assert torch.equal(averaged[0].bias, resting)


@pytest.mark.parametrize("tune", ["scratch", "frozen"])
def test_a_run_scores_the_average_and_goes_on_with_its_weights(tune, tmp_path, monkeypatch):
    """Interrupted in the second epoch. The averages of all steps are taken by hand, from the classifier's start on."""
    data = draw_folder(tmp_path / "data", {"ant": 14, "bee": 6})
    small = {"size": 8, "encoder": "resnet8", "epochs": 3, "batch_size": 5, "workers": 0, "precision": "fp32"}
    if tune == "frozen":
        torch.manual_seed(1)
        from equipoise.method.encoders import create_encoder

        torch.save(create_encoder("resnet8", 8, False)[0].state_dict(), tmp_path / "weights.pt")
        small["weights"] = str(tmp_path / "weights.pt")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe = load_recipe("pictures", data=str(data), policy="cifar", method="ce", tune=tune, ema=0.9, **small)
    by_hand, validated, steps = dict[str, torch.Tensor](), list[dict[str, torch.Tensor]](), list[int]()

    def recorded(averaged, network, decay, step):
        if step == 1:
            by_hand.update({name: value.double() for name, value in state_on_cpu(averaged).items()})
        average_in(averaged, network, decay, step)
        past = min(decay, (1 + step) / (10 + step))
        for name, value in state_on_cpu(network).items():
            by_hand[name] = past * by_hand[name] + (1 - past) * value.double()
        steps.append(step)
        if steps == [1, 2, 3, 4, 5]:  # in the second epoch
            os.kill(os.getpid(), signal.SIGTERM)

    def look(network, *arguments, **further):
        validated.append(state_on_cpu(network))
        return honest(network, *arguments, **further)

    honest = loop.predict
    monkeypatch.setattr(loop, "average_in", recorded)
    monkeypatch.setattr(loop, "predict", look)
    with pytest.raises(Stopped):
        train(recipe, tmp_path / "run", progress=False)
    stopped = load_checkpoint(tmp_path / "run" / "last.pt")
    with start(prepare(recipe, resume=tmp_path / "run")) as session:
        assert all(torch.equal(session.network.state_dict()[name], value) for name, value in stopped.raw.items())
    run = train(recipe, resume=tmp_path / "run", progress=False)
    last = load_checkpoint(run.path / "last.pt")
    assert steps == list(range(1, 13)), "none twice"
    for name, value in last.weights.items():
        if not name.endswith("num_batches_tracked"):
            assert torch.allclose(value.double(), by_hand[name], rtol=1e-4, atol=1e-6), name
    assert not torch.equal(last.raw["classifier.weight"], last.weights["classifier.weight"])
    assert all(torch.equal(value, validated[-1][name]) for name, value in last.weights.items())
    used = load_checkpoint(run.path / "best.pt").weights
    assert all(torch.equal(value, used[name]) for name, value in run.model.state_dict().items())
