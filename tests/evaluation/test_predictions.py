"""Predictions from a network, batch by batch."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from equipoise import UserError
from equipoise.evaluation.metrics import TAUS
from equipoise.evaluation.predictions import predict
from equipoise.views.loader import Batch

CLASSES = 9


class Images:
    """620 random images in three batches, labels 0 to 8."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (620, 3, 4, 4), dtype=torch.uint8, generator=generator)
        self.labels = torch.randint(0, CLASSES, (620,), generator=generator)

    def evaluation(self, batch_size: int) -> Iterator[Batch]:
        for images, labels in zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True):
            yield Batch(images[None], labels, slice(0, len(labels)))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.normal = nn.BatchNorm1d(48)
        self.linear = nn.Linear(48, CLASSES)

    def forward(self, images):
        assert not self.training
        assert torch.is_inference_mode_enabled()
        return self.linear(self.normal(images.flatten(1).float() / 255))


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network().eval()


def test_predictions_against_the_whole_matrix(network):
    images = Images()
    counts = torch.arange(1, CLASSES + 1).double() ** 2
    log_prior = (counts / counts.sum()).log()
    with torch.inference_mode():
        logits = network(images.images).double()
    made = predict(network, images, log_prior, keep_logits=True)
    assert made.labels_N.tolist() == images.labels.tolist()
    assert made.ranked_NK.shape == (620, 5)
    assert made.ranked_NK.tolist() == logits.topk(5).indices.tolist()
    assert made.confidence_N == pytest.approx(logits.softmax(1).amax(1).numpy(), abs=1e-6)
    assert list(made.adjusted) == list(TAUS)
    for tau, adjusted in made.adjusted.items():
        assert adjusted.tolist() == (logits - tau * log_prior).argmax(1).tolist(), tau
    assert made.adjusted[0.0].tolist() == made.ranked_NK[:, 0].tolist()
    assert made.adjusted[2.0].tolist() != made.adjusted[0.0].tolist()
    assert made.logits_NC is not None
    assert np.allclose(made.logits_NC, logits.numpy(), atol=1e-6)
    bare = predict(network, images)
    assert (bare.adjusted, bare.logits_NC) == ({}, None)


def test_of_equal_logits_the_first_class_is_predicted(network):
    nn.init.zeros_(network.linear.weight)
    nn.init.zeros_(network.linear.bias)
    made = predict(network, Images(), torch.zeros(CLASSES))
    assert (made.ranked_NK == np.arange(5)).all()
    assert (made.adjusted[1.0] == 0).all()
    assert made.confidence_N == pytest.approx(1 / CLASSES)


@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf])
def test_outputs_that_are_not_finite_are_not_scored(spoilt, network):
    with torch.no_grad():
        network.linear.bias[3] = spoilt
    with pytest.raises(UserError, match="the network's logits are not finite numbers"):
        predict(network, Images())
