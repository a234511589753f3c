"""The BCL authors' checkpoints: read to the same logits as their model gives, written so that it loads them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet50, resnext50_32x4d

from equipoise import UserError
from equipoise.authors.checkpoints import from_authors, is_authors_table, to_authors
from equipoise.config.recipe import Model, Views
from equipoise.method.network import TwoBranchNetwork
from equipoise.runs.checkpoint import load_checkpoint

CLASSES, FEATURE_DIM = 7, 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class TheirClassifier(nn.Module):
    """A cosine classifier with one column a class."""

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


def table_of(model: nn.Module, optimizer: torch.optim.SGD, arch: str, best: Any = 57.25) -> dict[str, Any]:
    return {
        "epoch": 90,
        "arch": arch,
        "state_dict": model.state_dict(),
        "best_acc1": best,
        "optimizer": optimizer.state_dict(),
    }


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


@pytest.fixture(scope="module")
def cosine() -> tuple[nn.DataParallel, torch.optim.SGD, dict[str, Any]]:
    model, optimizer = trained("resnet50", cosine=True)
    return model, optimizer, table_of(model, optimizer, "resnet50")


@pytest.mark.parametrize(
    ("arch", "is_cosine"), [("resnet50", True), ("resnext50", True), ("resnet50", False), ("resnext50", False)]
)
def test_the_logits_are_theirs(arch, is_cosine):
    model, optimizer = trained(arch, is_cosine)
    # One GPU alone (`--gpu 0`) and there is no DataParallel, so no prefix.
    table = table_of(model.module if arch == "resnext50" else model, optimizer, arch)
    read = from_authors(table, "file")
    assert (read.arch, read.classes, read.hidden_dim, read.feature_dim) == (arch, CLASSES, 2048, FEATURE_DIM)
    assert read.classifier == ("cosine" if is_cosine else "linear")
    assert read.epoch == 90
    settings = Model(arch, classifier=read.classifier, feature_dim=FEATURE_DIM)
    network = TwoBranchNetwork(settings, Views(size=64), CLASSES).eval()
    network.load_state_dict(read.weights)
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        normalised = (images / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        features, logits, prototypes = model(normalised)
        ours = network.training_outputs(images.repeat(2, 1, 1, 1, 1))
        assert 0.1 < logits.abs().max() < 100
        assert (network(images) - logits).abs().max() < 1e-4
        assert (ours.features_BVD[:, 0] - features).abs().max() < 1e-5
        assert (ours.prototypes_CD - prototypes).abs().max() < 1e-5
    by_name = dict(network.named_parameters())
    theirs = dict(model.module.named_parameters())
    assert read.momentum.keys() == by_name.keys()
    expected = optimizer.state[theirs["fc.weight"]]["momentum_buffer"]
    assert torch.equal(read.momentum["classifier.weight"], expected.T if is_cosine else expected)
    expected = optimizer.state[theirs["head_fc.3.bias"]]["momentum_buffer"]
    assert torch.equal(read.momentum["prototype_projection.3.bias"], expected)


def test_as_many_classes_as_features():
    """A square weight without a bias is still one column a class."""
    model = TheirModel("resnet50", cosine=True)
    model.fc = TheirClassifier(2048, 2048)
    read = from_authors({"state_dict": model.state_dict(), "arch": "resnet50"}, "file")
    assert torch.equal(read.weights["classifier.weight"], model.fc.weight.detach().T)
    assert read.momentum == {}


def test_there_and_back(cosine):
    model, optimizer, table = cosine
    read = from_authors(table, "file")
    group = optimizer.state_dict()["param_groups"][0]
    extra = {"class_names": ["a"]}
    back = to_authors(
        read.weights, read.momentum, arch="resnet50", classifier="cosine", epoch=90, best_per_class=0.5725,
        param_group=group, extra=extra,
    )  # fmt: skip
    assert list(back["state_dict"]) == list(table["state_dict"])
    assert all(torch.equal(back["state_dict"][key], value) for key, value in table["state_dict"].items())
    assert (back["epoch"], back["arch"], back["equipoise"]) == (90, "resnet50", extra)
    assert back["best_acc1"] == pytest.approx(57.25)
    assert is_authors_table(back)
    fresh = nn.DataParallel(TheirModel("resnet50", cosine=True))
    fresh.load_state_dict(back["state_dict"])
    again = torch.optim.SGD(fresh.parameters(), 0.5, momentum=0.1)
    again.load_state_dict(back["optimizer"])
    assert again.param_groups[0]["lr"] == 1e-5
    for theirs, ours in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(optimizer.state[theirs]["momentum_buffer"], again.state[ours]["momentum_buffer"])


# ---- what is refused


def without(key):
    return lambda table: table["state_dict"].pop(key)


def put(key, value):
    return lambda table: table["state_dict"].__setitem__(key, value)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without("module.fc.weight"), "it has no matrix 'fc.weight'; is it a checkpoint of the BCL authors' code?"),
        (without("module.head.3.weight"), "it has no matrix 'head.3.weight'"),
        (put("module.fc.weight", torch.zeros(3)), "it has no matrix 'fc.weight'"),
        (put("module.encoder.fc.weight", torch.zeros(1)), "'module.encoder.fc.weight' is no part of the BCL authors'"),
        (put("module.backbone.x", torch.zeros(1)), "'module.backbone.x' is no part of the BCL authors' model"),
        (put("module.fc.weight", [1.0]), "'module.fc.weight' holds [1.0], not a tensor"),
        (put("module.fc.weight", torch.full((32, 7), torch.nan)), "'module.fc.weight' has values that are not finite"),
        (put("module.encoder.layer1.0.conv2.weight", torch.zeros(9, 9, 3, 3)), "neither a ResNet-50 nor a ResNeXt-50"),
        (lambda table: table.update(epoch="90"), "epoch is '90', not a number of epochs"),
        (
            lambda table: table["optimizer"]["state"].update({0: {"momentum_buffer": torch.zeros(1)}}),
            "the optimizer's state does not fit the model (parameter 0)",
        ),
        (
            lambda table: table["optimizer"]["state"].update({9999: {"momentum_buffer": torch.zeros(1)}}),
            "the optimizer's state does not fit the model (parameter 9999)",
        ),
    ],
)
def test_refused_tables(damage, said):
    table = small_table()
    assert from_authors(table, "file").classes == CLASSES
    damage(table)
    with pytest.raises(UserError) as error:
        from_authors(table, "bcl_ckpt.pth.tar")
    assert str(error.value).startswith("bcl_ckpt.pth.tar: ")
    assert said in str(error.value)


def test_parts_that_do_not_fit_each_other_are_refused(tmp_path):
    """By the network that they would make."""
    table = small_table()
    table["state_dict"]["module.head_fc.3.weight"] = torch.zeros(8, 99)
    del table["optimizer"]
    torch.save(table, tmp_path / "x.pth.tar")
    with pytest.raises(UserError, match="do not fit"):
        load_checkpoint(tmp_path / "x.pth.tar").build()


@pytest.mark.parametrize("table", [{}, [], {"state_dict": 3}, {"format": 1, "weights": {}}, None])
def test_what_is_none_of_theirs(table):
    assert not is_authors_table(table)


def test_models_that_theirs_cannot_be():
    read = from_authors(small_table(), "file")

    def write(weights, arch="resnet50"):
        to_authors(
            weights, {}, arch=arch, classifier="cosine", epoch=1, best_per_class=None, param_group={}, extra={}
        )  # fmt: skip

    with pytest.raises(UserError, match="knows resnet50 and resnext50, not resnet18; nothing was written"):
        write(read.weights, "resnet18")
    baseline = {name: value for name, value in read.weights.items() if "projection" not in name}
    with pytest.raises(UserError, match="has a projection, which only --method bcl trains"):
        write(baseline)
