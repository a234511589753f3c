"""The network against its formulas."""

import pytest
import torch
import torch.nn.functional as F

from equipoise.config.recipe import Model, Recipe, Views
from equipoise.method.network import ScaledClassifier, TwoBranchNetwork

IMAGES = torch.randint(0, 256, (12, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def network(classifier="cosine", method="bcl", classes=5, anchor=0.0) -> TwoBranchNetwork:
    torch.manual_seed(0)
    model = Model("resnet8", classifier=classifier, hidden_dim=24, feature_dim=8, anchor=anchor)
    return TwoBranchNetwork(Recipe(method=method, model=model, views=Views(size=16)), classes)


def test_cosine_classifier_is_scale_thirty():
    """However long the class weights are; they start at length 1."""
    model = network().eval()
    hidden, weight = model.encoder((IMAGES / 255 - model.mean / 255) / (model.std / 255)), model.classifier.weight
    assert torch.allclose(weight.norm(dim=1), torch.ones(5))
    with torch.no_grad():
        weight *= torch.arange(1.0, 6.0)[:, None]
    cosine = F.normalize(hidden, dim=1) @ F.normalize(weight, dim=1).T
    assert torch.allclose(model(IMAGES), 30 * cosine, atol=1e-4)


def test_a_scaled_classifier_trains_its_scales_alone():
    """At first, and normalised with tau 0, it is the classifier that it scales; with tau 1 all norms are 1."""
    for of in (network().classifier, network("linear").classifier):
        scaled, hidden = ScaledClassifier(of), torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
        assert torch.equal(scaled(hidden), of(hidden))
        assert [name for name, value in scaled.named_parameters() if value.requires_grad] == ["scales_C"]
        of.weight *= torch.arange(1.0, 6.0)[:, None]
        before = of(hidden)
        scaled.normalise(0)
        assert torch.equal(scaled(hidden), before)
        scaled.normalise(1)
        assert scaled.weight.norm(dim=1).tolist() == pytest.approx([1] * 5)
        assert torch.allclose(scaled(hidden), before / of.weight.norm(dim=1))


def test_linear_classifier_has_a_bias_and_prototypes():
    """The authors' code crashes here."""
    model = network(classifier="linear")
    outputs = model.training_outputs(IMAGES.unflatten(0, (3, 4)))
    assert model.classifier.bias.shape == (5,)
    assert outputs.prototypes_CD.shape == (5, 8)


def test_training_outputs():
    model = network().train()
    outputs = model.training_outputs(IMAGES.unflatten(0, (3, 4)))
    assert outputs.logits_BC.shape == (4, 5)
    assert outputs.features_BVD.shape == (4, 2, 8)
    for vectors in (outputs.features_BVD, outputs.prototypes_CD):
        assert torch.allclose(vectors.norm(dim=-1), torch.ones(()), atol=1e-5)
    # View-major: image b's second view is image 4 + b of the batch. Batch statistics are over all twelve.
    hidden = model.encoder((IMAGES - model.mean) / model.std)
    features = F.normalize(model.projection(hidden), dim=1)
    assert torch.allclose(outputs.features_BVD[1, 0], features[4 + 1], atol=1e-5)
    assert torch.allclose(outputs.features_BVD[1, 1], features[8 + 1], atol=1e-5)
    assert torch.allclose(outputs.logits_BC, model.classifier(hidden[:4]), atol=1e-4)


@pytest.mark.parametrize(("method", "branches"), [("bcl", 3), ("supcon+la", 2), ("ce", 1)])
def test_every_branch_that_is_there_gets_a_gradient(method, branches):
    model = network(method=method)
    outputs = model.training_outputs(IMAGES.unflatten(0, (3, 4)))
    assert [len(output) > 0 for output in outputs[:3]] == [place < branches for place in range(3)]
    sum(output.sum() for output in outputs[:3]).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_heads_are_float32_under_autocast():
    model = network()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model.training_outputs(IMAGES.unflatten(0, (3, 4)))
    assert {value.dtype for value in outputs[:3]} == {torch.float32}


def test_micro_batches_with_live_batchnorm():
    """Heads over the whole batch, the encoder's statistics over each micro-batch, its averages moved once by each."""
    whole, parted = network().train(), network().train()
    outputs = parted.training_outputs(IMAGES.unflatten(0, (3, 4)), micro_batch=2)
    parts = IMAGES.unflatten(0, (3, 4)).split(2, dim=1)
    encoded = [whole.encoder((part.flatten(0, 1) - whole.mean) / whole.std).unflatten(0, (3, 2)) for part in parts]
    hidden = torch.cat(encoded, dim=1).flatten(0, 1)
    features = F.normalize(whole.projection(hidden), dim=1)
    assert torch.allclose(outputs.features_BVD[1, 1], features[8 + 1], atol=1e-6)
    expected = whole.classifier(hidden[:4])
    assert torch.allclose(outputs.logits_BC, expected, atol=1e-5)
    weights = torch.linspace(-1, 1, 20).view(4, 5)
    (outputs.logits_BC * weights).sum().backward()
    (expected * weights).sum().backward()
    for (name, ours), theirs in zip(parted.encoder.named_parameters(), whole.encoder.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5), name
    for (name, ours), theirs in zip(parted.encoder.named_buffers(), whole.encoder.buffers(), strict=True):
        assert torch.allclose(ours.float(), theirs.float(), rtol=1e-5), name


@pytest.mark.parametrize(("micro_batch", "sizes"), [(0, [12]), (1, [1] * 12), (3, [3] * 4), (5, [4] * 3), (8, [6] * 2)])
def test_dropout_is_the_same_when_a_micro_batch_is_computed_again(micro_batch, sizes):
    """What the second pass computes must be what the first one gave: its gradient says so."""
    model = network(method="ce").eval()
    model.encoder = torch.nn.Sequential(model.encoder, torch.nn.Dropout(0.5).train())
    torch.manual_seed(1)
    outputs = model.training_outputs(IMAGES[None], micro_batch)
    outputs.logits_BC.square().sum().backward()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
    torch.manual_seed(1)
    hidden = torch.cat([model.encoder((part - model.mean) / model.std) for part in IMAGES.split(sizes)])
    model.zero_grad()
    model.classifier(hidden).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(gradient[name], parameter.grad, rtol=1e-3, atol=1e-4), name


def test_a_classifier_that_is_held_at_its_start():
    """The penalty is the slow sum, zero at the start; a class without a direction keeps its own."""
    model = network(classes=3, anchor=6.0)
    classifier, before = model.classifier, model.classifier.weight.detach().clone()
    counts, means = torch.tensor([90.0, 9.0, 1.0]), torch.randn(3, 64)
    means[1] = 0
    classifier.start_at(means)
    assert torch.allclose(classifier.weight[::2], F.normalize(means[::2], dim=1))
    assert torch.equal(classifier.weight[1], before[1])
    assert classifier.penalty(counts) == 0
    moved = torch.randn(3, 64)
    with torch.no_grad():
        classifier.weight += moved
    expected = sum(
        6 / (100 * n) ** 0.5 * float(row.square().sum()) / 2 for n, row in zip((90, 9, 1), moved, strict=True)
    )
    assert classifier.penalty(counts).item() == pytest.approx(expected, rel=1e-5)
    classifier.penalty(counts).backward()
    assert torch.allclose(classifier.weight.grad[2], 0.6 * moved[2], atol=1e-5)
    assert "classifier.start" in model.state_dict(), "a run that goes on needs it"
    assert "classifier.start" not in network().state_dict()
