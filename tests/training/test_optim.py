"""Schedules against the golden numbers."""

import itertools

import pytest
import torch
from conftest import GOLDEN

from equipoise.training.optim import create_sgd, learning_rate, milestone_epoch

SCHEDULES = {
    "imagenet_lt": {"lr": 0.1, "epochs": 90, "warmup_epochs": 0, "schedule": "cosine"},
    "inat18": {"lr": 0.2, "epochs": 100, "warmup_epochs": 0, "schedule": "cosine"},
    "cifar_200": {
        "lr": 0.15,
        "epochs": 200,
        "warmup_epochs": 5,
        "schedule": "step",
        "milestones": (0.8, 0.9),
    },
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_golden(name):
    ours = [learning_rate(epoch, **SCHEDULES[name]) for epoch in range(SCHEDULES[name]["epochs"])]
    assert ours == pytest.approx(GOLDEN["lr"][name], rel=1e-12)


def test_milestones_in_epochs_and_in_shares_are_the_same():
    shares = SCHEDULES["cifar_200"]
    epochs = {**shares, "milestones": (160, 180)}
    assert [learning_rate(e, **shares) for e in range(200)] == [learning_rate(e, **epochs) for e in range(200)]
    assert milestone_epoch(0.8, 10) == 8


def test_cosine_after_warmup_starts_below_the_peak_and_never_reaches_zero():
    rates = [learning_rate(e, lr=1.0, epochs=10, warmup_epochs=2, schedule="cosine") for e in range(10)]
    assert rates[:2] == [0.5, 1.0]
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[1:]))
    assert rates[-1] > 0


def test_sgd_decays_every_parameter():
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = create_sgd([weight], lr=0.5, momentum=0.0, weight_decay=0.1)
    weight.grad = torch.zeros(1)
    optimizer.step()
    assert weight.item() == pytest.approx(2.0 * (1 - 0.5 * 0.1))
