"""Steps for a sampler that changes, and sharpness-aware ones. Over ranks: tests/base/test_world.py."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from equipoise import load_recipe
from equipoise.base.world import ALONE
from equipoise.method.methods import METHODS, objective_of
from equipoise.runs.checkpoint import create_network
from equipoise.training.step import Step
from equipoise.views.draws import sampled_counts
from equipoise.views.loader import Batch
from equipoise.views.views import view_settings

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


# ---- sharpness-aware minimisation


def batch_of(step: Step, images: int = 6) -> Batch:
    random, views = torch.Generator().manual_seed(1), len(view_settings(step._recipe).kinds)
    pixels = torch.randint(0, 256, (views, images, 3, 16, 16), generator=random, dtype=torch.uint8)
    return Batch(pixels, torch.arange(images) % 3, slice(0, images))


def double_step(**fields) -> Step:
    torch.manual_seed(0)
    step = step_of(**fields)
    step._network.double().train()
    step.objective.double().begin_epoch(0, 2)
    return step


def test_sam_by_hand():
    """Two gradients of plain cross-entropy by autograd; nothing of the step is used for them."""
    step = double_step(method="ce", sam=0.3)
    network, batch = copy.deepcopy(step._network), batch_of(step)

    def gradients() -> list[torch.Tensor]:
        network.train()
        loss = F.cross_entropy(network(batch.images_VB3SS[0]), batch.labels_G)
        return list(torch.autograd.grad(loss, list(network.parameters())))

    first = gradients()
    length = sum(float(gradient.square().sum()) for gradient in first) ** 0.5
    averages = {name: value.clone() for name, value in network.named_buffers()}
    with torch.no_grad():
        for parameter, gradient in zip(network.parameters(), first, strict=True):
            parameter += 0.3 * gradient / length
    expected, before = gradients(), [parameter.detach().clone() for parameter in step._network.parameters()]
    step(batch)
    for parameter, gradient, start in zip(step._network.parameters(), expected, before, strict=True):
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, gradient, rtol=1e-9, atol=1e-12)
        assert torch.equal(parameter, start), "to the last bit"
    for name, value in step._network.named_buffers():
        assert torch.equal(value, averages[name]), f"{name} is of the first pass alone"


def parameters_of(step: Step) -> list[torch.nn.Parameter]:
    return [*step._network.parameters(), *step.objective.parameters()]


@pytest.mark.parametrize("micro_batch", [0, 3])
@pytest.mark.parametrize("method", METHODS)
def test_sam_of_each_method_sees_the_batch_once(method, micro_batch):
    """The second gradient and the loss are those of a plain step at the moved weights, from the state of before; what
    the step leaves behind is what a plain step at the weights themselves leaves."""
    fields = {"method": method, "micro_batch": micro_batch}
    step, plain, uphill = (double_step(**fields, sam=sam) for sam in (0.3, 0.0, 0.0))
    batch = batch_of(step)
    plain(batch)
    moved = [parameter for parameter in parameters_of(plain) if parameter.grad is not None]
    length = torch.stack([parameter.grad.norm() for parameter in moved]).norm()
    with torch.no_grad():
        for parameter, of_plain in zip(parameters_of(uphill), parameters_of(plain), strict=True):
            parameter += 0 if of_plain.grad is None else 0.3 * of_plain.grad / length
    expected, (terms, _) = uphill(batch)[0], step(batch)
    assert terms == pytest.approx(expected, rel=1e-9)
    for parameter, other in zip(parameters_of(step), parameters_of(uphill), strict=True):
        assert (parameter.grad is None) == (other.grad is None)
        assert parameter.grad is None or torch.allclose(parameter.grad, other.grad, rtol=1e-7, atol=1e-10)
    for ours, after in ((step._network, plain._network), (step.objective, plain.objective)):
        for name, value in after.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name
