"""What a plan decides beyond its recipe. Places and refusals are in test_place.py."""

import pytest
from conftest import draw_folder

from equipoise import load_recipe
from equipoise.training import plan
from equipoise.training.plan import prepare


@pytest.mark.parametrize(
    ("arch", "tune", "given", "precision"),
    [
        ("tf_efficientnet_lite0", "full", "auto", "fp32"),
        ("tf_efficientnet_lite0", "full", "bf16", "bf16"),
        ("tf_efficientnet_lite0", "last-stage", "auto", "bf16"),
        ("resnet18", "full", "auto", "bf16"),
    ],
)
def test_convolutions_in_groups_are_trained_in_float32(arch, tune, given, precision, tmp_path, monkeypatch):
    """On a CPU that is built for bf16."""
    monkeypatch.setattr(plan, "choose_precision", lambda name, device: "bf16")
    data = draw_folder(tmp_path / "data", {"ant": 6, "bee": 5})
    recipe = load_recipe("finetune", data=str(data), arch=arch, tune=tune, precision=given, batch_size=4, device="cpu")
    assert prepare(recipe, tmp_path / "run").precision == precision
