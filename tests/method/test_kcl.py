"""KCL and TSC against slow loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from equipoise.config.recipe import Loss
from equipoise.method.kcl import Tsc, _draw, k_positive_loss, spread_points
from equipoise.method.objective import Outputs

LABELS = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2])


def features() -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    return F.normalize(torch.randn(8, 2, 4, generator=random, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("targeted", [False, True])
def test_the_loss_is_the_equation(targeted):
    z, targets = features().flatten(0, 1), F.normalize(torch.eye(3, 4, dtype=torch.float64) - 0.2, dim=1)
    drawn, total = _draw(LABELS.repeat_interleave(2), 2, 3, 5), 0.0
    for i in range(16):
        columns = [z[j] for j in range(16) if j != i] + (list(targets) if targeted else [])
        denominator = math.log(sum(math.exp(z[i] @ column / 0.2) for column in columns))
        positives = [z[j] for j in range(16) if drawn[i, j]]
        inner = sum(float(z[i] @ positive / 0.2) - denominator for positive in positives)
        if targeted:
            inner += 0.2 * (float(z[i] @ targets[LABELS[i // 2]] / 0.2) - denominator)
        total -= inner / (len(positives) + targeted)
    loss = k_positive_loss(features(), LABELS, 0.2, 5, targets_CD=targets if targeted else None, positives=3)
    assert loss.item() == pytest.approx(total / 16, rel=1e-12)


def test_positives_are_the_other_view_and_few_others_of_the_class():
    labels, counts = LABELS.repeat_interleave(2), torch.zeros(16, 16)
    for seed in range(400):
        drawn = _draw(labels, 2, 3, seed)
        assert drawn.sum(1).tolist() == [4] * 10 + [3] * 4 + [1] * 2, "as many as there are"
        counts += drawn
    assert (counts[0, 2:10] / 400).tolist() == pytest.approx([3 / 8] * 8, abs=0.1), "all alike"
    assert counts[0, 1] == 400
    assert counts.diagonal().sum() == 0
    assert torch.equal(_draw(labels, 2, 3, 7), _draw(labels, 2, 3, 7))
    assert not torch.equal(_draw(labels, 2, 3, 7), _draw(labels, 2, 3, 8))


@pytest.mark.parametrize(("count", "width"), [(5, 16), (17, 16)])
def test_points_are_a_simplex_where_there_is_room(count, width):
    cosines = spread_points(count, width) @ spread_points(count, width).T
    assert torch.allclose(cosines, (count * torch.eye(count) - 1) / (count - 1), atol=1e-6)


def test_more_points_are_spread():
    cosines = (spread_points(100, 32) @ spread_points(100, 32).T).fill_diagonal_(0)
    at_random = F.normalize(torch.randn(100, 32), dim=1)
    assert cosines.square().sum() < 0.8 * (at_random @ at_random.T).fill_diagonal_(0).square().sum()
    assert cosines.max() < 0.4


def test_each_class_gets_the_point_that_is_nearest_to_its_mean():
    objective = Tsc(Loss(temperature=0.2), torch.tensor([5, 2, 1]), 4)
    objective.begin_epoch(0, 2)
    first = objective.targets_CD.clone()
    towards = first[[2, 0, 1]][LABELS][:, None].repeat(1, 2, 1)
    objective(Outputs(torch.zeros(8, 3), towards), LABELS, slice(0, 8))
    assert torch.allclose(objective.means_CD, first[[2, 0, 1]])
    objective.begin_epoch(1, 2)
    assert torch.equal(objective.targets_CD, first[[2, 0, 1]])


def test_a_run_that_starts_from_another_has_points_too():
    """Its first epoch is not number 0."""
    objective = Tsc(Loss(), torch.tensor([5, 2, 1]), 4)
    objective.begin_epoch(3, 5)
    assert torch.allclose(objective.targets_CD.norm(dim=1), torch.ones(3))
