"""Contrastive CutMix against slow loops; how the labels lean in training: test_methods.py."""

import math

import pytest
import torch
import torch.nn.functional as F

from equipoise.method.bcl import leaning, near_labels


def test_labels_are_shares_of_the_nearest_prototypes_by_distance():
    view, prototypes = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, -1.0]])
    shares = near_labels(view, prototypes, 2)
    assert shares[0].tolist() == pytest.approx([0, 1 / 3, 2 / 3])  # distances 5, 2 and 1
    near = [1 / math.sqrt(5), 1 / math.sqrt(2)]
    assert shares[1].tolist() == pytest.approx([0, near[0] / sum(near), near[1] / sum(near)])


def test_the_weight_is_what_the_authors_set_for_each_data_set():
    """2 / 255 for the ten classes of CIFAR-10, 200 / 255 for the thousand of ImageNet-LT; and so about a thousandth."""
    for classes, scale in (10, 2 / 255), (1000, 200 / 255):
        counts = torch.logspace(math.log10(5), math.log10(1280), classes, dtype=torch.float64)
        mixed = 0.25 * F.one_hot(torch.tensor([0]), classes).double() + 0.75 / classes
        expected = scale * math.log(float((mixed[0] * counts).sum())) / float(counts.log().sum())
        assert leaning(mixed, counts).tolist() == pytest.approx([expected])
        assert 0 < expected < 0.003
