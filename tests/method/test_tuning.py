"""How much of an encoder is trained: which parameters move, how fast, and that the start is the pretrained network."""

import pytest
import torch
from torch import nn

from equipoise import UserError
from equipoise.config.recipe import Model, Recipe, Views
from equipoise.method.encoders import create_encoder
from equipoise.method.network import TwoBranchNetwork
from equipoise.method.tuning import merge_low_rank, parameter_groups, restrict


def trained(name: str, tune: str) -> tuple[list[str], float]:
    """The encoder's parameters that are trained, and their share of all."""
    encoder = create_encoder(name, 64)[0]
    restrict(encoder, tune)
    named = dict(encoder.named_parameters())
    moving = [key for key, parameter in named.items() if parameter.requires_grad]
    return moving, sum(named[key].numel() for key in moving) / sum(map(torch.Tensor.numel, named.values()))


def test_the_last_stage():
    assert {name.partition(".")[0] for name in trained("resnet18", "last-stage")[0]} == {"layer4"}
    lite, share = trained("tf_efficientnet_lite0", "last-stage")
    assert {".".join(name.split(".")[:2]) for name in lite} == {
        "blocks.6",
        "conv_head.weight",
        "bn2.weight",
        "bn2.bias",
    }
    assert 0.25 < share < 0.35
    vit = trained("test_vit", "last-stage")[0]
    assert "norm.weight" in vit
    convnext = trained("test_convnext", "last-stage")[0]
    assert any(name.startswith("stages.3") for name in convnext), "timm counts its last norm as a group"
    assert not any(name.startswith(("patch_embed", "blocks.0")) for name in vit)
    assert any(name.startswith("blocks.2") for name in trained("resnet8", "last-stage")[0])


def test_normalisations():
    for name, kind in (
        ("resnet18", nn.BatchNorm2d),
        ("tf_efficientnet_lite0", nn.BatchNorm2d),
        ("test_vit", nn.LayerNorm),
    ):
        encoder = create_encoder(name, 64)[0]
        expected = {
            f"{key}.{of}"
            for key, module in encoder.named_modules()
            if isinstance(module, kind)
            for of in ("weight", "bias")
        }
        assert set(trained(name, "head+norm")[0]) == expected
        assert expected


def test_blocks_that_are_called_after_a_normalisation_are_none():
    moving, share = trained("regnety_002", "head+norm")
    assert share < 0.02
    assert moving


def test_all_and_nothing():
    assert trained("resnet8", "full")[1] == trained("resnet8", "scratch")[1] == 1
    assert trained("resnet8", "frozen")[1] == 0


def test_low_rank_additions():
    """Nothing at the start; a low-rank difference after it; merged, the plain encoder of the same outputs."""
    torch.manual_seed(0)
    encoder = create_encoder("test_vit", 160)[0].eval()
    names, images = set(encoder.state_dict()), torch.randn(2, 3, 160, 160)
    before, weight = encoder(images), encoder.blocks[0].attn.qkv.weight.detach().clone()
    restrict(encoder, "lora")
    assert torch.allclose(encoder(images), before, atol=1e-6)
    moving = {name: one for name, one in encoder.named_parameters() if one.requires_grad}
    assert all(name.rpartition(".")[2] in ("a", "b") for name in moving)
    optimizer = torch.optim.SGD(moving.values(), lr=0.5)
    for _ in range(2):
        encoder(images).square().sum().backward()
        optimizer.step()
    after = encoder(images)
    assert not torch.allclose(after, before, atol=1e-3)
    difference = encoder.blocks[0].attn.qkv.weight - weight
    assert 1 <= torch.linalg.matrix_rank(difference, atol=1e-5) <= 8
    merge_low_rank(encoder)
    assert set(encoder.state_dict()) == names
    assert torch.allclose(encoder(images), after, atol=1e-5)
    with pytest.raises(UserError, match="linear layers of timm's vision transformers"):
        restrict(create_encoder("resnet18", 64)[0], "lora")


@pytest.mark.parametrize("tune", ["scratch", "last-stage"])
def test_layers_learn_at_their_rates(tune):
    network = TwoBranchNetwork(Recipe(model=Model("resnet18", tune=tune), views=Views(size=64)), 3, start=False)
    groups = parameter_groups(network, network.encoder, 0.5)
    rate = {id(one): group["lr_scale"] for group in groups for one in group["params"]}
    assert len(rate) == sum(len(group["params"]) for group in groups), "each parameter once"
    assert set(rate) == {id(one) for one in network.parameters() if one.requires_grad}
    assert rate[id(network.classifier.weight)] == 1
    layers = [network.encoder.layer4[1], network.encoder.layer4[0], network.encoder.layer3[1]]
    for depth, layer in enumerate(layers[: None if tune == "scratch" else 2], 1):
        assert {rate[id(one)] for one in layer.parameters()} == {0.5**depth}
    (alone,) = parameter_groups(network, network.encoder, 1.0)
    assert {id(one) for one in alone["params"]} == set(rate)
