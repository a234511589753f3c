"""The network against its formulas."""

import pytest
import torch
import torch.nn.functional as F

from equipoise.model import TwoBranchNetwork

IMAGES = torch.randint(0, 256, (12, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def network(**settings) -> TwoBranchNetwork:
    torch.manual_seed(0)
    return TwoBranchNetwork("resnet8", 5, **{"size": 16, "hidden_dim": 24, "feature_dim": 8, **settings})


def test_cosine_classifier_is_scale_thirty():
    model = network().eval()
    hidden = model.encoder((IMAGES / 255 - model.mean / 255) / (model.std / 255))
    weight = model.classifier.weight
    assert torch.allclose(weight.norm(dim=1), torch.ones(5))
    cosine = F.normalize(hidden, dim=1) @ F.normalize(weight, dim=1).T
    assert torch.allclose(model(IMAGES), 30 * cosine, atol=1e-4)


def test_linear_classifier_has_a_bias_and_prototypes():
    """The authors' code crashes here."""
    model = network(classifier="linear")
    outputs = model.training_outputs(IMAGES, views=3)
    assert model.classifier.bias.shape == (5,)
    assert outputs.prototypes_CD.shape == (5, 8)


def test_training_outputs():
    model = network().train()
    outputs = model.training_outputs(IMAGES, views=3)
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


def test_without_a_contrastive_branch_there_is_nothing_of_it():
    model = network(contrastive=False)
    outputs = model.training_outputs(IMAGES, views=1)
    assert outputs.features_BVD is None
    assert outputs.prototypes_CD is None
    assert not any("projection" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("prototypes", [True, False])
def test_every_parameter_gets_a_gradient(prototypes):
    model = network(prototypes=prototypes)
    outputs = model.training_outputs(IMAGES, views=3)
    assert (outputs.prototypes_CD is None) != prototypes
    sum(output.sum() for output in outputs if output is not None).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_heads_are_float32_under_autocast():
    model = network()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model.training_outputs(IMAGES, views=3)
    assert {value.dtype for value in outputs} == {torch.float32}


def test_memory_format_of_the_input_does_not_matter():
    model = network().eval()
    last = IMAGES.contiguous(memory_format=torch.channels_last)
    assert torch.allclose(model(IMAGES), model(last), atol=1e-4)
