"""Schedules against the golden numbers."""

import itertools
from dataclasses import replace

import pytest
import torch
from conftest import GOLDEN

from equipoise.config.recipe import Optim
from equipoise.training.optim import create_sgd, learning_rate

SCHEDULES = {
    "imagenet_lt": (90, Optim(lr=0.1, warmup_epochs=0, schedule="cosine")),
    "inat18": (100, Optim(lr=0.2, warmup_epochs=0, schedule="cosine")),
    "cifar_200": (200, Optim(lr=0.15, warmup_epochs=5, schedule="step", milestones=(0.8, 0.9))),
}


def rates(epochs: int, optim: Optim) -> list[float]:
    return [learning_rate(epoch, epochs, optim) for epoch in range(epochs)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_golden(name):
    assert rates(*SCHEDULES[name]) == pytest.approx(GOLDEN["lr"][name], rel=1e-12)


def test_milestones_in_epochs_and_in_shares_are_the_same():
    epochs, optim = SCHEDULES["cifar_200"]
    assert rates(epochs, replace(optim, milestones=(160, 180))) == rates(epochs, optim)


def test_cosine_after_warmup_starts_below_the_peak_and_never_reaches_zero():
    found = rates(10, Optim(lr=1.0, warmup_epochs=2, schedule="cosine"))
    assert found[:2] == [0.5, 1.0]
    assert all(later < earlier for earlier, later in itertools.pairwise(found[1:]))
    assert found[-1] > 0


def test_sgd_decays_every_parameter():
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = create_sgd([weight], lr=0.5, momentum=0.0, weight_decay=0.1)
    weight.grad = torch.zeros(1)
    optimizer.step()
    assert weight.item() == pytest.approx(2.0 * (1 - 0.5 * 0.1))
