"""Encoders: shapes, sizes of the literature, and names that are not there."""

import os
import re
import subprocess
import sys

import pytest
import torch

from equipoise import UserError
from equipoise.backbones import create_encoder


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


def test_unknown_and_missing():
    with pytest.raises(UserError, match=r"no encoder is called 'resnet33'; did you mean .*resnet32"):
        create_encoder("resnet33", 32)
    with pytest.raises(UserError, match=r"there are no pretrained weights for resnet32; set model.pretrained to false"):
        create_encoder("resnet32", 32, pretrained=True)


def test_what_an_encoder_does_not_take_is_said():
    with pytest.raises(UserError, match=r"vit_tiny_patch16_224 .* 8 pixels .*; change --size or --arch"):
        create_encoder("vit_tiny_patch16_224", 8)
    with pytest.raises(UserError, match=r"timm cannot build resnet18.nonsense .*nonsense"):
        create_encoder("resnet18.nonsense", 64)


def test_pretrained_weights_out_of_reach(tmp_path):
    """In a process of its own, since the hub's library reads its environment once, when it is imported."""
    code = """
from equipoise import UserError
from equipoise.backbones import create_encoder
try:
    create_encoder("resnet18", 64, pretrained=True)
except UserError as error:
    print(error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert re.fullmatch(
        r"the pretrained weights of resnet18 could not be had \(.+\); connect to the network, name a file of them "
        r"with --weights FILE, or set --pretrained false\n",
        done.stdout,
    )
