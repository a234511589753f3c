"""Encoders: shapes, sizes of the literature, and names that are not there."""

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torchvision.models import resnet18

from equipoise import UserError, load_recipe
from equipoise.method.encoders import create_encoder, timm_arguments
from equipoise.runs.checkpoint import Checkpoint, create_network, state_on_cpu


@pytest.mark.parametrize(("name", "parameters"), [("resnet8", 75_000), ("resnet20", 269_000), ("resnet32", 461_000)])
def test_small_resnets(name, parameters):
    """He et al. give 0.27M and 0.46M for 20 and 32 layers, classifier included (640 weights)."""
    encoder, width = create_encoder(name, 32)
    layers = [module for module in encoder.modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(layers) + 1 == int(name.removeprefix("resnet"))
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(parameters, rel=0.01)
    assert width == 64
    assert encoder(torch.zeros(2, 3, 32, 32)).shape == (2, 64)


def test_shortcut_passes_every_second_pixel_and_adds_no_parameters():
    """With all convolutions zero, only the shortcuts are left: the stem's channels, subsampled, between zeros."""
    encoder, _ = create_encoder("resnet8", 16)
    encoder.eval()
    stem = []
    with torch.no_grad():
        for block in encoder.blocks:
            block.conv1.weight.zero_()
            block.conv2.weight.zero_()
        encoder.norm.register_forward_hook(lambda _, __, output: stem.append(output.relu()))
        features = encoder(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    expected = stem[0][:, :, ::4, ::4].mean((2, 3))
    assert torch.allclose(features[:, 24:40], expected, atol=1e-6)
    assert features[:, :24].abs().max() == 0
    assert features[:, 40:].abs().max() == 0


@pytest.mark.parametrize(
    ("name", "width"),
    [("resnet18", 512), ("resnext50", 2048), ("vit_tiny_patch16_224", 192), ("mobilenetv3_small_050", 1024)],
)
def test_timm_encoders(name, width):
    size = 48 if name.startswith("vit") else 64
    encoder, found = create_encoder(name, size)
    assert encoder.training
    assert found == width
    assert encoder.eval()(torch.zeros(1, 3, size, size)).shape == (1, width)


@pytest.mark.parametrize(
    ("name", "size", "pretrained", "sentence"),
    [
        ("resnet33", 32, False, r"no encoder is called 'resnet33'; did you mean resnet"),
        ("resnet32", 32, True, r"there are no pretrained weights for resnet32; set --tune scratch"),
        ("vit_tiny_patch16_224", 8, False, r"vit_tiny_patch16_224 .* 8 pixels .*; change --size or --arch"),
        ("resnet18.nonsense", 64, False, r"timm cannot build resnet18.nonsense .*nonsense"),
    ],
)
def test_refused_encoders(name, size, pretrained, sentence):
    with pytest.raises(UserError, match=sentence):
        create_encoder(name, size, pretrained)


# ---- weights from a file


def saved(encoder, path):
    """Random weights of an encoder, in a file as torch or safetensors writes it."""
    torch.manual_seed(1)
    state = {key: torch.rand_like(value.float()).to(value.dtype) for key, value in encoder.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    return state


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("name", "make"),
    [("resnet18", resnet18), ("resnet18", timm.models.resnet18), ("resnet8", lambda: create_encoder("resnet8", 32)[0])],
    ids=["torchvision's", "timm's", "ours"],
)
def test_weights_of_a_file_with_and_without_classifier(name, make, suffix, tmp_path):
    """The first two have a classifier, which an encoder does not have."""
    state = saved(make(), tmp_path / f"weights{suffix}")
    encoder, _ = create_encoder(name, 64, weights=tmp_path / f"weights{suffix}")
    assert all(torch.equal(value, state[key]) for key, value in encoder.state_dict().items())


def test_the_encoder_of_a_checkpoint_of_a_run(tmp_path):
    recipe = load_recipe("digits-lt")
    network = create_network(recipe, 2, start=False)
    optimizer = {"state": {}, "param_groups": []}
    state = state_on_cpu(network)
    Checkpoint(recipe, ("a", "b"), (1, 1), 1, 1, None, state, optimizer, {}).save(tmp_path / "last.pt")
    encoder = create_encoder("resnet8", 32, weights=tmp_path / "last.pt")[0]
    assert all(torch.equal(value, network.encoder.state_dict()[key]) for key, value in encoder.state_dict().items())


def test_the_encoder_of_a_checkpoint_of_the_authors(tmp_path):
    full = resnet18(weights=None)
    state = {f"module.encoder.{key}": value for key, value in full.state_dict().items() if not key.startswith("fc")}
    table = {"state_dict": {**state, "module.head.0.weight": torch.zeros(1)}, "best_acc1": np.float64(57.2)}
    torch.save(table, tmp_path / "bcl_ckpt.pth.tar")
    encoder = create_encoder("resnet18", 64, weights=tmp_path / "bcl_ckpt.pth.tar")[0]
    assert all(torch.equal(value, full.state_dict()[key]) for key, value in encoder.state_dict().items())


def test_a_vision_transformer_at_another_size(tmp_path):
    """Position embeddings of 224 pixels, resampled for 64; the same images, the same features where no size changes."""
    full = timm.create_model("vit_tiny_patch16_224", num_classes=5)
    torch.save(full.state_dict(), tmp_path / "vit.pth")
    same, width = create_encoder("vit_tiny_patch16_224", 224, weights=tmp_path / "vit.pth")
    assert width == 192
    images = torch.rand(1, 3, 224, 224)
    with torch.inference_mode():
        expected = full.eval().forward_head(full.forward_features(images), pre_logits=True)
        assert torch.allclose(same.eval()(images), expected, atol=1e-5)
    small = create_encoder("vit_tiny_patch16_224", 64, weights=tmp_path / "vit.pth")[0]
    assert small.state_dict()["pos_embed"].shape == (1, 17, 192)
    assert torch.equal(small.state_dict()["patch_embed.proj.weight"], full.state_dict()["patch_embed.proj.weight"])


RESNET8 = create_encoder("resnet8", 32)[0].state_dict()
NOT_FINITE = create_encoder("resnet18", 32)[0].state_dict()
NOT_FINITE["conv1.weight"] = torch.full((64, 3, 7, 7), torch.inf)


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("x.pth", None, "there is no file of weights at"),
        ("x.pth", b"no weights", "is no file of weights that can be read"),
        ("x.pth", {"epoch": 3}, "does not hold tensors by name"),
        ("x.pth", RESNET8, "does not hold the weights of resnet18: 100 of 120 are not in it (first: conv1.weight)"),
        ("x.safetensors", "resnet50", "of 120 have another shape in it (first: layer"),
        ("x.pth", NOT_FINITE, "1 of 120 hold numbers that are not finite (first: conv1.weight); take another"),
    ],
)
def test_refused_weights(file, content, sentence, tmp_path):
    path = tmp_path / file
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        saved(create_encoder(content, 64)[0], path)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError) as error:
        create_encoder("resnet18", 64, weights=path)
    assert sentence in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_the_authors_encoders_start_as_theirs():
    """Their residual branches do not start at zero, as timm's would."""
    encoder = create_encoder("resnet50", 64)[0]
    assert float(encoder.state_dict()["layer1.0.bn3.weight"].min()) == 1.0
    assert float(create_encoder("resnet18", 64)[0].state_dict()["layer1.0.bn2.weight"].max()) == 0.0


def test_what_timm_calls_an_encoder():
    assert timm_arguments("resnet32", 48) is None
    assert timm_arguments("resnet18.a1_in1k", 48) == ("resnet18", {})
    assert timm_arguments("vit_tiny_patch16_224", 48) == ("vit_tiny_patch16_224", {"img_size": 48})
