"""The BCL authors' checkpoints are read to the same logits as their model gives."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet50, resnext50_32x4d

from equipoise import UserError
from equipoise.authors.checkpoints import from_authors
from equipoise.runs.checkpoint import load_checkpoint

CLASSES, FEATURE_DIM = 7, 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class TheirClassifier(nn.Module):
    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, classes))

    def forward(self, hidden):
        return 30 * F.normalize(hidden, dim=1) @ F.normalize(self.weight, dim=0)


class TheirModel(nn.Module):
    """The authors' model, written from its description: encoder, head, fc and head_fc in this order."""

    def __init__(self, arch: str, cosine: bool, width: int = 2048) -> None:
        super().__init__()
        self.encoder = {"resnet50": resnet50, "resnext50": resnext50_32x4d}[arch](weights=None)
        self.encoder.fc = nn.Identity()

        def head() -> nn.Sequential:
            return nn.Sequential(
                nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True), nn.Linear(width, FEATURE_DIM)
            )

        self.head = head()
        self.fc = TheirClassifier(width, CLASSES) if cosine else nn.Linear(width, CLASSES)
        self.head_fc = head()

    def forward(self, images):
        hidden = self.encoder(images)
        weight = self.fc.weight.T if isinstance(self.fc, TheirClassifier) else self.fc.weight
        return F.normalize(self.head(hidden), dim=1), self.fc(hidden), F.normalize(self.head_fc(weight), dim=1)


def trained(arch: str, cosine: bool) -> tuple[nn.DataParallel, torch.optim.SGD]:
    """Their model after two steps, so that BatchNorm has averages and SGD momentum."""
    torch.manual_seed(0)
    model = nn.DataParallel(TheirModel(arch, cosine))
    optimizer = torch.optim.SGD(model.parameters(), 1e-5, momentum=0.9, weight_decay=5e-4)
    for step in range(2):
        features, logits, prototypes = model(torch.randn(8, 3, 64, 64))
        loss = F.cross_entropy(logits, torch.arange(8) % CLASSES) + (features[:4] * prototypes[:4]).sum() * (1 + step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = 1.0  # averages that fit the weights
    with torch.no_grad():
        model(torch.randn(16, 3, 64, 64))
    return model.eval(), optimizer


def table_of(model: nn.Module, optimizer: torch.optim.SGD, arch: str) -> dict[str, Any]:
    state = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    return {"epoch": 90, "arch": arch, "best_acc1": 57.25, **state}


def small_table() -> dict[str, Any]:
    """A table with all that is looked at, of a model with two layers in its encoder and few features."""
    torch.manual_seed(0)
    model = TheirModel("resnet50", cosine=True, width=32)
    model.encoder = nn.Sequential()
    model.encoder.layer1 = nn.ModuleList([nn.Sequential()])
    model.encoder.layer1[0].conv2 = nn.Conv2d(64, 64, 3, bias=False)
    wrapped = nn.DataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.01, momentum=0.9)
    for parameter in wrapped.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return table_of(wrapped, optimizer, "resnet50")


@pytest.mark.parametrize(("arch", "is_cosine"), [("resnet50", True), ("resnext50", False)])
def test_the_logits_are_theirs(arch, is_cosine, tmp_path):
    model, optimizer = trained(arch, is_cosine)
    # One GPU alone (`--gpu 0`) and there is no DataParallel, so no prefix. Old versions of torch wrote no zip file.
    prefixed = arch == "resnet50"
    table = table_of(model if prefixed else model.module, optimizer, arch)
    torch.save(table, tmp_path / "x.pth.tar", _use_new_zipfile_serialization=prefixed)
    read = load_checkpoint(tmp_path / "x.pth.tar")
    assert (read.recipe.model.encoder, read.class_names, read.class_counts) == (arch, tuple("0123456"), ())
    assert read.recipe.model.classifier == ("cosine" if is_cosine else "linear")
    assert (read.recipe.model.hidden_dim, read.recipe.model.feature_dim, read.epoch) == (0, FEATURE_DIM, 90)
    network = read.build()
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        normalised = (images / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        features, logits, prototypes = model(normalised)
        ours = network.training_outputs(images.repeat(2, 1, 1, 1, 1))
        assert 0.1 < logits.abs().max() < 100
        assert (network(images) - logits).abs().max() < 1e-4
        assert (ours.features_BVD[:, 0] - features).abs().max() < 1e-5
        assert (ours.prototypes_CD - prototypes).abs().max() < 1e-5
    assert read.optimizer == {"state": {}}, "their momentum is not taken over"


def test_as_many_classes_as_features():
    """A square weight without a bias is still one column a class."""
    model = TheirModel("resnet50", cosine=True, width=32)
    model.fc = TheirClassifier(32, 32)
    _, _, weights = from_authors({"state_dict": model.state_dict(), "arch": "resnet50"}, "file")
    assert torch.equal(weights["classifier.weight"], model.fc.weight.detach().T)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda table: table["state_dict"].pop("module.head.3.weight"), "it lacks the matrix of a layer; is it"),
        (
            lambda table: table["state_dict"].update({"module.backbone.x": torch.zeros(1)}),
            "'module.backbone.x' is no part of the BCL authors' model",
        ),
        (lambda table: table.update(epoch="90"), "arch is 'resnet50' and epoch '90'; take another checkpoint"),
    ],
)
def test_refused_tables(damage, said):
    table = small_table()
    assert from_authors(table, "file")[1] == 90
    damage(table)
    with pytest.raises(UserError, match=f"^bcl_ckpt.pth.tar: .*{said}"):
        from_authors(table, "bcl_ckpt.pth.tar")


def test_parts_that_do_not_fit_each_other_are_refused(tmp_path):
    """By the network that they would make. What an earlier version of ours wrote in their layout is read as theirs."""
    table = {**small_table(), "equipoise": {"class_names": list("abcdefg")}}
    table["state_dict"]["module.head_fc.3.weight"] = torch.zeros(8, 99)
    del table["optimizer"]
    torch.save(table, tmp_path / "x.pth.tar")
    checkpoint = load_checkpoint(tmp_path / "x.pth.tar")
    assert checkpoint.class_names == tuple("0123456")
    with pytest.raises(UserError, match="do not fit"):
        checkpoint.build()
