"""ProCo against its authors' numbers, Bessel functions of any precision, and draws from the distribution itself."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, golden_values
from torch import Tensor

from equipoise.config.recipe import Loss
from equipoise.method.objective import Outputs
from equipoise.method.proco import ProCo, log_bessel_difference

mpmath = pytest.importorskip("mpmath")  # torch needs it anyway, by way of sympy


def log_bessel(order: float, kappa: Tensor) -> tuple[Tensor, Tensor]:
    """log I - order * log kappa, and its derivative, by the difference to kappa = 0."""
    difference, ratio = log_bessel_difference(order, torch.zeros_like(kappa), kappa**2)
    return difference - order * math.log(2) - math.lgamma(order + 1), kappa * ratio


@pytest.mark.parametrize("width", [3, 8, 16, 64, 128, 1024, 2048])
def test_bessel_functions_and_their_slope(width):
    order, kappas = width / 2 - 1, [0.0, 1e-3, 0.5, 3, 20, 77, 400, 3e3, 1e5, 1e5 + 20]
    value, slope = log_bessel(order, torch.tensor(kappas, dtype=torch.float64))
    with mpmath.workdps(60):
        for kappa, ours, our_slope in zip(kappas[1:], value.tolist()[1:], slope.tolist()[1:], strict=True):
            bessel = mpmath.besseli(order, kappa)
            expected = mpmath.log(bessel) - order * mpmath.log(kappa)
            assert ours == pytest.approx(float(expected), rel=1e-13, abs=1e-12), kappa
            assert our_slope == pytest.approx(float(mpmath.besseli(order + 1, kappa) / bessel), rel=1e-12), kappa


@pytest.mark.parametrize("width", [8, 128, 2048])
def test_scores_in_float32(width):
    """However large kappa is."""
    kappa = torch.tensor([1e-3, 1, 30, 500, 2e4, 1e5], dtype=torch.float64)
    added = 100 + 20 * kappa * torch.linspace(-1, 1, 41, dtype=torch.float64)[:, None]
    exact, of_float32 = (
        log_bessel_difference(width / 2 - 1, kappa.to(dtype) ** 2, added.to(dtype))
        for dtype in (torch.float64, torch.float32)
    )
    for ours, expected in zip(of_float32, exact, strict=True):
        assert torch.allclose(ours.double(), expected, rtol=2e-5, atol=1e-5)


def authors_log_bessel(order: float, kappa: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As ProCo's authors compute it: Miller's backward recurrence, from twice the order. That is too late a start where
    kappa is much larger than the order."""
    at, above, of_order = torch.ones_like(kappa), torch.zeros_like(kappa), {}
    for number in range(2 * int(order), 0, -1):
        at, above = 2 * number / kappa * at + above, at
        of_order[number] = above
    log_zero = torch.special.i0e(kappa).log() + kappa - at.log()
    value = log_zero + of_order[int(order)].log() - order * kappa.log()
    return value, (of_order[int(order) + 1] / of_order[int(order)]).clamp(max=1)


def test_how_far_the_authors_are_from_it():
    kappa = torch.tensor([10.0, 300, 1e4], dtype=torch.float64)
    for width, expected in ((8, [0.030, 2.7, 6.2]), (128, [0, 0, 0.53])):
        ours, theirs = (of(width / 2 - 1, kappa)[0] for of in (log_bessel, authors_log_bessel))
        assert (ours - theirs).tolist() == pytest.approx(expected, rel=0.02, abs=1e-12)


@pytest.mark.parametrize("case", GOLDEN["proco"]["cases"], ids=lambda case: f"width {case['dim']}")
def test_proco_golden(case, monkeypatch):
    """Three batches, after the second of which an epoch ends; losses and gradients of one view. With the authors'
    Bessel functions, all else is theirs to the ninth digit."""

    def difference(order: float, square_C: Tensor, added_BC: Tensor) -> tuple[Tensor, Tensor]:
        (less_C, _), (more_BC, slope_BC) = (
            authors_log_bessel(order, square.sqrt()) for square in (square_C, square_C + added_BC)
        )
        return more_BC - less_C, slope_BC / (square_C + added_BC).sqrt()

    monkeypatch.setattr("equipoise.method.proco.log_bessel_difference", difference)
    classes, width, batch = case["classes"], case["dim"], case["batch"]
    values = golden_values(case["lcg_seed"], classes * width + 3 * batch * width)
    start, batches = values[: classes * width].reshape(classes, width), values[classes * width :]
    objective = ProCo(Loss(temperature=case["temperature"], alpha=0, beta=1), torch.tensor(case["class_counts"]), width)
    objective = objective.double()
    objective.start_CD.copy_(0.9 * F.normalize(start, dim=1))
    objective.means_2CD.copy_(objective.start_CD)
    labels = torch.tensor(case["labels"])
    for number, (features, expected) in enumerate(zip(batches.reshape(3, batch, width), case["steps"], strict=True)):
        if number in (0, 2):
            objective.begin_epoch(number // 2, 2)
        features.requires_grad_()
        outputs = Outputs(torch.zeros(batch, classes), F.normalize(features, dim=1)[:, None])
        loss = objective(outputs, labels, slice(0, batch))["loss"]
        (gradient,) = torch.autograd.grad(loss, features)
        assert objective.counts_2C[0].tolist() == expected["amount"]
        assert objective.kappa().tolist() == pytest.approx(expected["kappa"], rel=1e-9)
        assert loss.item() == pytest.approx(expected["loss"], rel=1e-9)
        assert gradient.norm().item() == pytest.approx(expected["grad_norm"], rel=1e-9)
        scores = objective.scores(F.normalize(features, dim=1))[0]
        assert (scores - scores.mean()).tolist() == pytest.approx(
            [one - sum(expected["logits_first_row"]) / classes for one in expected["logits_first_row"]], rel=1e-8
        )


def test_scores_are_the_mean_over_draws():
    """In two dimensions, where it is the von Mises distribution: the mean of exp(z . z' / temperature)."""
    random = torch.Generator().manual_seed(0)
    objective = ProCo(Loss(temperature=0.5), torch.tensor([3, 2]), 2).double()
    objective.means_2CD.copy_(torch.tensor([[0.5, 0.0], [0.0, 0.7]], dtype=torch.float64))
    kappa = objective.kappa()
    z = F.normalize(torch.randn(3, 2, generator=random, dtype=torch.float64), dim=1)
    torch.manual_seed(0)
    for label, towards in enumerate((0.0, math.pi / 2)):
        angles = torch.distributions.VonMises(torch.tensor(towards), kappa[label].float()).sample((200_000,)).double()
        draws = torch.stack([angles.cos(), angles.sin()], 1)
        expected = (z @ draws.T / 0.5).exp().mean(1).log()
        assert torch.allclose(objective.scores(z)[:, label], expected, atol=0.01)


def test_the_gradient_is_that_of_the_scores():
    objective = ProCo(Loss(temperature=0.1), torch.tensor([5, 3, 1]), 16).double()
    objective.update(F.normalize(torch.randn(9, 16, dtype=torch.float64), dim=1), torch.arange(9) % 3)
    z = F.normalize(torch.randn(4, 16, dtype=torch.float64), dim=1).requires_grad_()
    assert torch.autograd.gradcheck(objective.scores, z)


def test_the_means_are_over_the_epoch_before_and_this_one():
    """A class that does not occur in an epoch starts over with it."""
    objective = ProCo(Loss(), torch.tensor([3, 2]), 4)
    one, other, third = F.normalize(torch.randn(3, 1, 4), dim=2)
    label = torch.tensor([0])
    objective.update(one, label)
    objective.begin_epoch(1, 3)
    objective.update(other, label)
    assert torch.allclose(objective.means_2CD[0, 0], (one + other)[0] / 2)
    objective.begin_epoch(2, 3)
    objective.update(third, label)
    assert torch.allclose(objective.means_2CD[0, 0], (other + third)[0] / 2)
    assert torch.equal(objective.means_2CD[0, 1], objective.start_CD[1])
    assert objective.counts_2C.tolist() == [[2, 0], [1, 0]]
