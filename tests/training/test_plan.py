"""What a plan decides beyond its recipe. Places and refusals are in test_place.py."""

import pytest
from conftest import draw_folder

from equipoise import UserError, load_recipe
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


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"method": "ldam-drw", "classifier": "linear"}, "ldam-drw needs a cosine classifier: set --classifier cosine"),
        (
            {"method": "ldam-drw", "sampler": "square-root"},
            "ldam-drw goes by the class counts as they are: set --sampler instance",
        ),
        ({"method": "paco", "label_smoothing": 0.1}, "paco has no label smoothing: set --label-smoothing 0"),
        ({"method": "gml", "classifier": "linear"}, "gml needs a cosine classifier: set --classifier cosine"),
        ({"method": "focal", "label_smoothing": 0.1}, "focal has no label smoothing: set --label-smoothing 0"),
        (
            {"method": "gpaco", "mix": "cutmix"},
            "gpaco, whose views train both branches, cannot take mixed images: set --mix none",
        ),
        ({"method": "concutmix", "mix": "mixup"}, "concutmix pastes boxes of other images: set --mix cmo"),
        (
            {"method": "concutmix", "tune": "frozen"},
            "concutmix mixes images, not a frozen encoder's features: set --tune last-stage",
        ),
        ({"tune": "frozen", "mix": "cmo"}, "a frozen encoder's features cannot take mixed images: set --mix none"),
        ({"weights": "a.pth"}, "tune = scratch starts from random weights: set --tune full, or drop --weights"),
        ({"anchor": 6.0}, "only cosine classifiers on pretrained encoders are held: set --anchor 0"),
    ],
)
def test_what_would_have_no_effect_is_refused(fields, sentence, tmp_path):
    with pytest.raises(UserError) as error:
        prepare(load_recipe("digits-lt", **fields), tmp_path / "run")
    assert str(error.value) == sentence
