"""The losses against slow loops, golden numbers, invariances and a gradient check."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, check_bcl_golden, check_logit_adjusted_golden
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import equipoise
from equipoise.method.losses import (
    balanced_contrastive_loss,
    log_prior,
    logit_adjusted_cross_entropy,
    supervised_contrastive_loss,
)


def slow_bcl(features: Tensor, labels: Tensor, prototypes: Tensor, temperature: float) -> float:
    """The equation, term by term: anchors i, positives p, columns k."""
    batch, views, _ = features.shape
    columns = [(features[b, v], int(labels[b])) for v in range(views) for b in range(batch)]
    anchors = len(columns)
    columns += [(prototype, label) for label, prototype in enumerate(prototypes)]
    members = [sum(label == j for _, label in columns) for j in range(len(prototypes))]
    total = 0.0
    for i in range(anchors):
        z, y = columns[i]
        denominator = 0.0
        for k, (column, label) in enumerate(columns):
            if k != i:
                weight = members[label] - 1 if label == y else members[label]
                denominator += math.exp(float(z @ column) / temperature) / weight
        for p, (column, label) in enumerate(columns):
            if p != i and label == y:
                total += (math.log(denominator) - float(z @ column) / temperature) / (members[y] - 1)
    return total / anchors


def slow_supcon(features: Tensor, labels: Tensor, temperature: float) -> float:
    batch, views, _ = features.shape
    columns = [(features[b, v], int(labels[b])) for v in range(views) for b in range(batch)]
    losses = []
    for i, (z, y) in enumerate(columns):
        others = [(float(z @ column) / temperature, label) for k, (column, label) in enumerate(columns) if k != i]
        positives = [s for s, label in others if label == y]
        if positives:
            denominator = math.log(sum(math.exp(s) for s, _ in others))
            losses.append(sum(denominator - s for s in positives) / len(positives))
    return sum(losses) / len(losses) if losses else 0.0


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, float]:
    """Features, labels, prototypes, temperature: any batch, most of the classes absent in some."""
    classes, batch, views = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.integers(1, 3))
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=batch, max_size=batch))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    features = F.normalize(torch.randn(batch, views, 4, generator=random, dtype=torch.float64), dim=-1)
    prototypes = F.normalize(torch.randn(classes, 4, generator=random, dtype=torch.float64), dim=-1)
    return features, torch.tensor(labels), prototypes, draw(st.sampled_from([0.05, 0.1, 0.5, 1.0]))


@given(batches())
@settings(deadline=None, max_examples=60)
def test_bcl_is_the_equation(batch):
    assert float(balanced_contrastive_loss(*batch)) == pytest.approx(slow_bcl(*batch), rel=1e-12, abs=1e-12)


def mask_form(features: Tensor, labels: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    """The equation with whole matrices and masks, for autograd to differentiate."""
    anchors, columns = features.flatten(0, 1), torch.cat([features.flatten(0, 1), prototypes])
    of_anchors = labels.repeat_interleave(features.shape[1])
    of_columns = torch.cat([of_anchors, torch.arange(len(prototypes))])
    itself = torch.eye(len(anchors), len(columns), dtype=torch.bool)
    positives = (of_anchors[:, None] == of_columns) & ~itself
    members = (of_columns[:, None] == of_columns).sum(1)
    weights = torch.where(positives, members - 1, members)
    similarity = anchors @ columns.T / temperature
    denominator = (similarity.exp() / weights).masked_fill(itself, 0).sum(1, keepdim=True)
    return ((denominator.log() - similarity) * positives / positives.sum(1, keepdim=True)).sum(1).mean()


@given(batches(), st.integers(1, 5))
@settings(deadline=None, max_examples=60)
def test_bcl_in_chunks_has_the_equations_value_and_gradients(batch, rows):
    features, labels, prototypes, temperature = batch
    inputs = [features.requires_grad_(), prototypes.requires_grad_()]
    expected = mask_form(features, labels, prototypes, temperature)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("equipoise.method.losses._CHUNK_ENTRIES", 1)
        patch.setattr("equipoise.method.losses._CHUNK_ROWS", rows)
        ours = balanced_contrastive_loss(features, labels, prototypes, temperature)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-12, abs=1e-12)
    for gradient, wanted in zip(
        torch.autograd.grad(3 * ours, inputs), torch.autograd.grad(3 * expected, inputs), strict=True
    ):
        assert torch.allclose(gradient, wanted, rtol=1e-10, atol=1e-12)


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that an operation returned."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returned = func(*args, **(kwargs or {}))
        if isinstance(returned, Tensor):
            self.entries = max(self.entries, returned.numel())
        return returned


def test_bcl_never_holds_the_whole_matrix(monkeypatch):
    features = F.normalize(torch.randn(600, 2, 8, generator=torch.Generator().manual_seed(10)), dim=-1)
    prototypes = F.normalize(torch.randn(900, 8, generator=torch.Generator().manual_seed(11)), dim=-1)
    labels, matrix = torch.arange(600) % 900, 1200 * 2100
    inputs = [features.requires_grad_(), prototypes.requires_grad_()]
    whole = balanced_contrastive_loss(features, labels, prototypes)
    of_whole = torch.autograd.grad(whole, inputs)
    monkeypatch.setattr("equipoise.method.losses._CHUNK_ENTRIES", matrix // 10)
    with Largest() as largest:
        chunked = balanced_contrastive_loss(features, labels, prototypes)
        of_chunked = torch.autograd.grad(chunked, inputs)
    assert matrix / 12 < largest.entries < matrix / 9
    assert chunked.item() == pytest.approx(whole.item(), rel=1e-6)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-8) for a, b in zip(of_whole, of_chunked, strict=True))
    again = balanced_contrastive_loss(features, labels, prototypes)
    assert all(torch.equal(a, b) for a, b in zip(of_chunked, torch.autograd.grad(again, inputs), strict=True))


@given(batches())
@settings(deadline=None, max_examples=60)
def test_supcon_is_the_equation(batch):
    features, labels, _, temperature = batch
    ours = supervised_contrastive_loss(features, labels, temperature)
    assert float(ours) == pytest.approx(slow_supcon(features, labels, temperature), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("case", GOLDEN["losses"], ids=lambda case: case["name"])
def test_bcl_golden(case):
    check_bcl_golden(case, "cpu")


def test_logit_adjusted_golden():
    check_logit_adjusted_golden("cpu")


@given(batches(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=30)
def test_order_of_batch_and_names_of_classes_do_not_matter(batch, random):
    features, labels, prototypes, temperature = batch
    expected = float(balanced_contrastive_loss(*batch))
    order = torch.tensor(random.sample(range(len(labels)), len(labels)))
    shuffled = balanced_contrastive_loss(features[order], labels[order], prototypes, temperature)
    assert float(shuffled) == pytest.approx(expected, rel=1e-12)
    assert float(balanced_contrastive_loss(features.flip(1), labels, prototypes, temperature)) == pytest.approx(
        expected, rel=1e-12
    )
    new_name = torch.tensor(random.sample(range(len(prototypes)), len(prototypes)))
    renamed = torch.empty_like(prototypes)
    renamed[new_name] = prototypes
    assert float(balanced_contrastive_loss(features, new_name[labels], renamed, temperature)) == pytest.approx(
        expected, rel=1e-12
    )


@given(batches())
@settings(deadline=None, max_examples=20)
def test_views_are_images_of_the_same_class(batch):
    """V views of B images are one view each of V * B images."""
    features, labels, prototypes, temperature = batch
    views = features.shape[1]
    one_each = balanced_contrastive_loss(
        features.transpose(0, 1).reshape(-1, 1, 4), labels.repeat(views), prototypes, temperature
    )
    assert float(one_each) == pytest.approx(float(balanced_contrastive_loss(*batch)), rel=1e-12)


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [3, 1, 1, 2], [50, 1, 7, 2], [5, 0, 0, 1]])
def test_at_the_regular_simplex_class_sizes_do_not_matter(sizes):
    """Features on the corners of the regular simplex: every anchor sees its own class at 1 / T and the C - 1 others
    at -1 / (C - 1) / T, each once, however many images they have. That is what class averaging and class complement
    are for (section 3 of the paper)."""
    classes, temperature = len(sizes), 0.5
    corners = F.normalize(torch.eye(classes, dtype=torch.float64) - 1 / classes, dim=-1)
    labels = torch.arange(classes).repeat_interleave(torch.tensor(sizes))
    features = corners[labels][:, None].expand(-1, 2, -1)
    expected = math.log(1 + (classes - 1) * math.exp(-classes / (classes - 1) / temperature))
    assert float(balanced_contrastive_loss(features, labels, corners, temperature)) == pytest.approx(expected)


def test_gradcheck():
    features = torch.randn(3, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    prototypes = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([0, 2, 2])
    inputs = (features.requires_grad_(), prototypes.requires_grad_())
    assert torch.autograd.gradcheck(lambda f, p: balanced_contrastive_loss(f, labels, p, 0.5), inputs)
    assert torch.autograd.gradcheck(lambda f: supervised_contrastive_loss(f, labels, 0.5), inputs[:1])


@pytest.mark.parametrize("temperature", [0.1, 0.02, 0.005])
def test_float32_does_not_overflow(temperature):
    features = F.normalize(torch.randn(64, 2, 16, generator=torch.Generator().manual_seed(3)), dim=-1)
    features[1] = features[0]  # a similarity of 1 / temperature: exp(200) is not a float32
    prototypes = F.normalize(torch.randn(10, 16, generator=torch.Generator().manual_seed(4)), dim=-1)
    labels = torch.arange(64) % 10
    loss = balanced_contrastive_loss(features.requires_grad_(), labels, prototypes, temperature)
    exact = balanced_contrastive_loss(features.double(), labels, prototypes.double(), temperature)
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert features.grad is not None
    assert bool(features.grad.isfinite().all())


def test_float32_under_bf16_autocast():
    features = F.normalize(torch.randn(16, 2, 8, generator=torch.Generator().manual_seed(5)), dim=-1)
    prototypes = F.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(6)), dim=-1)
    labels = torch.arange(16) % 5
    logits = torch.randn(16, 5, generator=torch.Generator().manual_seed(7))
    adjusted = equipoise.LogitAdjustedCrossEntropy([90, 5, 3, 1, 1])
    plain = (balanced_contrastive_loss(features, labels, prototypes), adjusted(logits, labels))
    with torch.autocast("cpu", torch.bfloat16):
        cast = (balanced_contrastive_loss(features, labels, prototypes), adjusted(logits, labels))
        low = balanced_contrastive_loss(features.bfloat16(), labels, prototypes.bfloat16())
    assert cast == plain
    assert low.dtype == torch.float32


@pytest.mark.parametrize("low", [False, True])
def test_backward_twice(low):
    """The first pass hands its gradients over, scaled in place: the second one must not see what became of them."""
    features, prototypes, labels = torch.randn(16, 2, 8), torch.randn(5, 8), torch.arange(16) % 5
    inputs = features.requires_grad_(), prototypes.requires_grad_()
    once = torch.autograd.grad(balanced_contrastive_loss(features, labels, prototypes), inputs)
    loss = balanced_contrastive_loss(features, labels, prototypes)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        for weight in (0.5, 3.0):
            again = torch.autograd.grad(weight * loss, inputs, retain_graph=True)
            for one, other in zip(once, again, strict=True):
                assert torch.allclose(other, weight * one, rtol=1e-5, atol=1e-7)
                other.zero_()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_second_derivative_is_refused():
    """Its gradients have no graph: a penalty on them would be left out in silence."""
    features = torch.randn(4, 2, 3).requires_grad_()
    loss = balanced_contrastive_loss(features, torch.arange(4), torch.randn(4, 3))
    with pytest.raises(RuntimeError, match="no second derivative: leave out create_graph=True"):
        torch.autograd.grad(loss, features, create_graph=True)


def test_tau_zero_is_plain_cross_entropy():
    logits, labels = torch.randn(6, 3, generator=torch.Generator().manual_seed(9)), torch.tensor([0, 1, 2, 0, 1, 2])
    adjusted = logit_adjusted_cross_entropy(logits, labels, log_prior(torch.tensor([9, 5, 1])), tau=0.0)
    assert adjusted == F.cross_entropy(logits, labels)


def test_label_smoothing_mixes_in_the_mean_over_classes():
    logits, labels = torch.randn(6, 3, generator=torch.Generator().manual_seed(9)), torch.tensor([0, 1, 2, 0, 1, 2])
    prior = log_prior(torch.tensor([9, 5, 1])).float()
    found = logit_adjusted_cross_entropy(logits, labels, prior, label_smoothing=0.3)
    log_shares = (logits + prior).log_softmax(1)
    expected = -(0.7 * log_shares[torch.arange(6), labels] + 0.3 * log_shares.mean(1)).mean()
    assert torch.allclose(found, expected)


def test_wrong_inputs_are_named():
    features, labels, prototypes = torch.zeros(2, 1, 3), torch.tensor([0, 1]), torch.zeros(2, 3)
    loss = equipoise.BalancedContrastiveLoss()
    with pytest.raises(ValueError, match=r"features must be \[B, V, D\]"):
        loss(features[:, 0], labels, prototypes)
    with pytest.raises(ValueError, match="2 images have features but labels are"):
        loss(features, labels[:1], prototypes)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        loss(features, labels, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="one positive number a class"):
        equipoise.LogitAdjustedCrossEntropy([5, 0])
    with pytest.raises(RuntimeError, match="must match the size"):
        equipoise.LogitAdjustedCrossEntropy([5, 2, 1])(torch.zeros(2, 2), labels)


@pytest.mark.parametrize("label", [-1, 2, 7])
def test_a_label_that_is_no_class_is_refused_by_torch(label):
    labels = torch.tensor([1, label])
    with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
        equipoise.BalancedContrastiveLoss()(torch.zeros(2, 1, 3), labels, torch.zeros(2, 3))
    with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
        equipoise.LogitAdjustedCrossEntropy([5, 2])(torch.zeros(2, 2), labels)


@pytest.mark.parametrize("name", ["bcl", "supcon"])
def test_losses_of_disjoint_rows_add_up_with_their_gradients(name):
    """What several ranks compute of a batch: parts of any size, an empty one, and a class that is in one part only."""
    random = torch.Generator().manual_seed(5)
    raw = torch.randn(11, 2, 6, generator=random, dtype=torch.float64, requires_grad=True)
    centres = torch.randn(4, 6, generator=random, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 0, 2, 0, 0, 1, 0, 0, 1, 0])

    def loss(**rows):
        features, prototypes = F.normalize(raw, dim=-1), F.normalize(centres, dim=-1)
        if name == "bcl":
            return balanced_contrastive_loss(features, labels, prototypes, 0.2, **rows)
        return supervised_contrastive_loss(features, labels, 0.2, **rows) + 0 * prototypes.sum()

    whole = torch.autograd.grad(loss(), (raw, centres))
    bounds = [0, 3, 3, 4, 11]
    parts = [loss(rows=slice(*pair)) for pair in itertools.pairwise(bounds)]
    assert sum(parts).item() == pytest.approx(loss().item(), rel=1e-12)
    assert parts[1].item() == 0
    assert min(part.item() for number, part in enumerate(parts) if number != 1) > 0
    for ours, expected in zip(torch.autograd.grad(sum(parts), (raw, centres)), whole, strict=True):
        assert torch.allclose(ours, expected, rtol=1e-10, atol=1e-14)
