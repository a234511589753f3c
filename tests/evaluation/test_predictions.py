"""Confidence at a temperature and the geometry of features, against slow loops over all images and pairs."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from equipoise import UserError
from equipoise.base.world import ALONE
from equipoise.config.recipe import Model, Recipe, Views
from equipoise.evaluation.metrics import GROUPS, TAUS, Predictions, shot_group
from equipoise.evaluation.predictions import (
    COSINE_BINS,
    ClassCalibration,
    Observation,
    confidence_at,
    count_cosines,
    predict,
)
from equipoise.method.network import TwoBranchNetwork
from equipoise.views.loader import Batch

COUNTS = (300, 150, 60, 25, 19, 3)
CLASSES = len(COUNTS)
TEMPERATURE = 1.7


@pytest.fixture
def network() -> TwoBranchNetwork:
    torch.manual_seed(0)
    return TwoBranchNetwork(Recipe(model=Model("resnet8", feature_dim=12), views=Views(size=16)), CLASSES).eval()


@pytest.fixture
def observed(network):
    """(table, images, labels, logits): 47 images in batches of 20; one class has one image, one has none."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (47, 3, 16, 16), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 3, (47,), generator=generator)
    labels[::5] = 5
    labels[1] = 3
    observation = Observation(network, COUNTS, TEMPERATURE)
    with torch.inference_mode():
        for part, of_part in zip(images.split(20), labels.split(20), strict=True):
            observation.add(of_part, network.encode(part), network(part))
        logits = network(images).double()
    return observation.table(predictions(labels, logits)), images, labels, logits


def predictions(labels, logits) -> Predictions:
    return Predictions(labels.numpy(), logits.argmax(1)[:, None].numpy(), logits.softmax(1).amax(1).numpy())


def test_confidence_at_the_temperature(observed):
    table, _, labels, logits = observed
    expected = (logits / TEMPERATURE).softmax(1).amax(1).numpy()
    assert table["calibrated_N"] == pytest.approx(expected, abs=1e-5)
    assert table["confidence_N"] == pytest.approx(logits.softmax(1).amax(1).numpy())
    assert (table["labels_N"] == labels.numpy()).all()
    assert (table["predicted_N"] == logits.argmax(1).numpy()).all()
    assert confidence_at(logits.repeat(50, 1), TEMPERATURE).numpy() == pytest.approx(np.tile(expected, 50))


@pytest.mark.parametrize("centred", [True, False])
def test_cosines_against_a_loop_over_pairs(centred):
    vectors = torch.randn(40, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.4
    groups = torch.arange(40) % 3
    moved = vectors - vectors.mean(0) if centred else vectors
    expected = np.zeros((3, COSINE_BINS), int)
    for one in range(40):
        for other in range(40):
            if one != other:
                cosine = F.cosine_similarity(moved[one], moved[other], dim=0).item()
                expected[groups[one], min(int((cosine + 1) * COSINE_BINS / 2), COSINE_BINS - 1)] += 1
    found = count_cosines(vectors, groups, centred)
    assert found.sum(1).tolist() == expected.sum(1).tolist()
    # A cosine on the edge of a bin may fall to either side in float32.
    assert np.abs(found - expected).sum() <= 4


def test_many_classes_are_counted_in_pieces():
    vectors = torch.randn(1500, 5, generator=torch.Generator().manual_seed(3))
    assert count_cosines(vectors, torch.zeros(1500, dtype=torch.int64), False).sum() == 1500 * 1499


def test_a_regular_simplex_has_its_cosine():
    simplex = torch.eye(CLASSES) - 1 / CLASSES
    found = count_cosines(simplex, torch.zeros(CLASSES, dtype=torch.int64), False)[0]
    place = int((1 - 1 / (CLASSES - 1)) * COSINE_BINS / 2)
    assert found[place - 1 : place + 2].sum() == found.sum() == CLASSES * (CLASSES - 1)


def test_geometry_against_the_features_themselves(network, observed):
    found, images, labels, _ = observed
    with torch.inference_mode():
        hidden = network.encoder((images - network.mean) / network.std)
        spaces = {"encoder": F.normalize(hidden, dim=1), "contrastive": F.normalize(network.projection(hidden), dim=1)}
    groups = torch.tensor([GROUPS.index(shot_group(count)) for count in COUNTS])
    seen = torch.tensor([label in labels for label in range(CLASSES)])
    assert seen.tolist() == [True, True, True, True, False, True]
    for space, units in spaces.items():
        means = torch.stack([units[labels == label].mean(0) for label in range(CLASSES) if seen[label]])
        expected = count_cosines(means, groups[seen], space == "encoder")
        assert np.abs(found[f"{space}_means_cosines_GK"] - expected).sum() <= 2
        for label in range(CLASSES):
            rows = np.flatnonzero(labels.numpy() == label)
            pairs = [1 - (units[a] @ units[b]).item() for a in rows for b in rows if a != b]
            spread = found[f"{space}_spread_C"][label]
            if pairs:
                assert spread == pytest.approx(np.mean(pairs), abs=1e-5)
            else:
                assert np.isnan(spread)
    rows = found["map_rows_M"]
    assert rows.tolist() == list(range(47))  # fewer than the map can show
    assert found["map_MF"] == pytest.approx(spaces["encoder"][rows].numpy(), abs=1e-3)
    for name in ("classifier", "prototypes"):
        assert found[f"{name}_cosines_GK"].sum() == CLASSES * (CLASSES - 1)


def map_rows(labels, classes: int, batch: int) -> list[int]:
    """Which images of these labels are on the map."""
    network = TwoBranchNetwork(Recipe(method="ce", model=Model("resnet8"), views=Views(size=16)), classes)
    observation = Observation(network, [5] * classes, None)
    for part in labels.split(batch):
        observation.add(part, torch.ones(len(part), network.width), torch.zeros(len(part), classes))
    return observation.table(predictions(labels, torch.zeros(len(labels), classes)))["map_rows_M"].tolist()


def test_the_map_takes_the_first_images_of_each_class():
    assert map_rows(torch.arange(4).repeat(600), 4, 700) == list(range(600))


def test_the_map_of_many_classes_is_evenly_spaced():
    rows = map_rows(torch.arange(2500), 2500, 2500)
    assert len(set(rows)) == 600
    assert set(np.diff(rows)) == {4, 5}
    assert (rows[0], rows[-1]) == (0, 2499)


OUTPUTS = 9


class Images:
    """620 random images in three batches, labels 0 to 8."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (620, 3, 4, 4), dtype=torch.uint8, generator=generator)
        self.labels = torch.randint(0, OUTPUTS, (620,), generator=generator)

    def evaluation(self, batch_size: int) -> Iterator[Batch]:
        for images, labels in zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True):
            yield Batch(images[None], labels, slice(0, len(labels)))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.normal = nn.BatchNorm1d(48)
        self.classifier = nn.Linear(48, OUTPUTS)

    def encode(self, images):
        assert not self.training
        assert torch.is_inference_mode_enabled()
        return self.normal(images.flatten(1).float() / 255)

    def forward(self, images):
        return self.classifier(self.encode(images))


@pytest.fixture
def linear() -> Network:
    torch.manual_seed(0)
    return Network().eval()


def test_predictions_against_the_whole_matrix(linear):
    images = Images()
    counts = torch.arange(1, OUTPUTS + 1).double() ** 2
    log_prior = (counts / counts.sum()).log()
    with torch.inference_mode():
        logits = linear(images.images).double()
    made = predict(linear, images, log_prior, keep_logits=True)
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
    bare = predict(linear, images)
    assert (bare.adjusted, bare.logits_NC) == ({}, None)


def test_of_equal_logits_the_first_class_is_predicted(linear):
    nn.init.zeros_(linear.classifier.weight)
    nn.init.zeros_(linear.classifier.bias)
    made = predict(linear, Images(), torch.zeros(OUTPUTS))
    assert (made.ranked_NK == np.arange(5)).all()
    assert (made.adjusted[1.0] == 0).all()
    assert made.confidence_N == pytest.approx(1 / OUTPUTS)


@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf])
def test_outputs_that_are_not_finite_are_not_scored(spoilt, linear):
    with torch.no_grad():
        linear.classifier.bias[3] = spoilt
    with pytest.raises(UserError, match="the network's logits are not finite"):
        predict(linear, Images())


@pytest.mark.parametrize("ranks", [1, 3])
def test_calibration_of_classes_against_slow_loops(ranks):
    """Batches of several ranks give the same figures to the last bit. The fourth class has no images."""
    generator = torch.Generator().manual_seed(4)
    labels = torch.tensor([0, 1, 2, 4, 5])[torch.randint(0, 5, (200,), generator=generator)]
    logits = 3 * torch.randn(200, CLASSES, generator=generator)
    logits[:40] = torch.tensor([0.0, 0.0, 0.0, -200, -200, -200])  # probabilities of 1/3, on an edge, and of 0
    found = calibration_of(labels, logits, ranks)
    assert found == calibration_of(labels, logits, 1)
    shares = logits.double().softmax(1).tolist()
    ece, nll, brier = {}, {}, {}
    for c in set(labels.tolist()):
        bins = [[] for _ in range(15)]
        for row, label in zip(shares, labels.tolist(), strict=True):
            place = next(k for k in range(15) if row[c] <= (k + 1) / 15 + 1e-12)
            bins[place].append((label == c) - row[c])
        ece[c] = sum(abs(sum(gaps)) for gaps in bins) / 200
        own = [row for row, label in zip(shares, labels.tolist(), strict=True) if label == c]
        nll[c] = np.mean([-np.log(row[c]) for row in own])
        brier[c] = np.mean([sum((share - (k == c)) ** 2 for k, share in enumerate(row)) for row in own])
    groups = {"all": [0, 1, 2, 4, 5], "many": [0, 1], "medium": [2], "few": [4, 5]}
    assert list(found) == list(groups)
    for group, of_group in groups.items():
        for key, per_class in (("classwise_ece", ece), ("nll", nll), ("brier", brier)):
            assert found[group][key] == pytest.approx(np.mean([per_class[c] for c in of_group]), abs=1e-7), (group, key)


def calibration_of(labels, logits, ranks: int):
    of_ranks = [ClassCalibration(CLASSES) for _ in range(ranks)]
    for number, rows in enumerate(torch.arange(len(labels)).split(30)):
        of_ranks[number % ranks].add(labels[rows], torch.empty(0), logits[rows])
    first, *others = of_ranks
    for name in ("_gaps_KC", "_of_label_3C"):
        for other in others:
            getattr(first, name).add_(getattr(other, name))
    return first.by_group(COUNTS, ALONE)


def test_probabilities_that_are_frequencies_have_no_calibration_error():
    """Labels as often as the probabilities say; without training counts there are no groups."""
    calibration = ClassCalibration(2)
    calibration.add(torch.tensor([0, 0, 0, 1]), torch.empty(0), torch.tensor([[3.0, 1.0]]).log().expand(4, -1))
    found = calibration.by_group((), ALONE)
    assert list(found) == ["all"]
    assert found["all"]["classwise_ece"] == pytest.approx(0, abs=1e-7)
    assert found["all"]["nll"] == pytest.approx((np.log(4 / 3) + np.log(4)) / 2)
    assert found["all"]["brier"] == pytest.approx((2 / 16 + 2 * 9 / 16) / 2)
