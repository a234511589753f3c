"""The step beyond what its gradients are over ranks (tests/base/test_world.py)."""

import numpy as np
import pytest
import torch

from equipoise import load_recipe
from equipoise.base.world import ALONE
from equipoise.method.methods import METHODS, objective_of
from equipoise.runs.checkpoint import create_network
from equipoise.training.step import Step
from equipoise.views.draws import sampled_counts

COUNTS = (50, 10, 2)
CPU = torch.device("cpu")


def step_of(**fields) -> Step:
    recipe = load_recipe("digits-lt", feature_dim=4, **fields)
    return Step(recipe, create_network(recipe, len(COUNTS), start=True), COUNTS, CPU, "fp32", ALONE)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.resamples])
def test_losses_are_for_what_the_progressive_sampler_draws_now(method):
    """As those of an objective that is made for these counts; its state stays."""
    step = step_of(method=method, sampler="progressive", gamma=0.4)
    state = {name: value.add_(0.25 if value.is_floating_point() else 1).clone()
             for name, value in step.objective.state_dict().items()}  # fmt: skip
    for progress in (0.0, 0.25, 0.75):
        step.expect_draws(progress)
        expected = objective_of(step._recipe, sampled_counts(COUNTS, "progressive", progress).tolist())
        buffers = dict(step.objective.named_buffers())
        for name, value in expected.named_buffers():
            assert torch.allclose(buffers[name], state.get(name, value).to(buffers[name].dtype), rtol=1e-6), name
    shares = np.array(COUNTS) / 62 / 4 + 0.75 / 3
    assert step.objective.log_prior_C.exp().tolist() == pytest.approx(shares.tolist(), rel=1e-6)
