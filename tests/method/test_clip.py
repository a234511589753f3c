"""Encoders with a text tower, on small random towers: the start of the classifier, and a run from it to prediction."""

import json

import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import draw_folder

from equipoise import UserError, load, load_recipe, train
from equipoise.method.clip import text_directions
from equipoise.method.encoders import create_encoder
from equipoise.method.pretrained import find_pretrained, input_of
from equipoise.runs.checkpoint import load_checkpoint

NAME = "open_clip:tiny-tower"
TOWERS = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """The file with the weights of both towers; open_clip knows the architecture."""
    folder = tmp_path_factory.mktemp("towers")
    (folder / "tiny-tower.json").write_text(json.dumps(TOWERS))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    torch.save(open_clip.create_model("tiny-tower").state_dict(), folder / "tiny.pt")
    return str(folder / "tiny.pt")


def test_the_image_tower_is_the_encoder(weights):
    encoder, width = create_encoder(NAME, 32, weights=weights)
    both = open_clip.create_model("tiny-tower", pretrained=weights).eval()
    images = torch.randn(2, 3, 32, 32)
    assert width == 24
    assert torch.allclose(encoder.eval()(images), both.encode_image(images))
    assert input_of(NAME) == {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD, "size": 32}


def test_a_classifier_starts_at_the_names_of_its_classes(weights, tmp_path):
    both = open_clip.create_model("tiny-tower", pretrained=weights).eval()
    tokens = open_clip.get_tokenizer("tiny-tower")(["a photo of a red ant.", "a photo of a bee."])
    expected = F.normalize(both.encode_text(tokens), dim=1)
    assert torch.allclose(text_directions(NAME, weights, ["red_ant", "bee"]), expected, atol=1e-6)
    recipe = load_recipe(
        "frozen", data=str(draw_folder(tmp_path / "data", {"red_ant": 9, "bee": 6})), arch=NAME, weights=weights,
        classifier_start="text", epochs=1, batch_size=4, lr=1e-9,
    )  # fmt: skip
    train(recipe, tmp_path / "run", progress=False)
    trained = load_checkpoint(tmp_path / "run" / "last.pt")
    assert trained.recipe.views.size == 32, "the encoder's own"
    order = [trained.class_names.index(name) for name in ("red_ant", "bee")]
    assert torch.allclose(trained.weights["classifier.weight"][order], expected, atol=1e-5)
    (tmp_path / "data").rename(tmp_path / "moved")
    assert len(load(tmp_path / "run").predict(tmp_path / "moved" / "bee", top=1)) == 6


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("open_clip:nonsense", "open_clip knows no architecture nonsense"),
        ("open_clip:ViT-B-32/nonsense", "open_clip has no weights nonsense of ViT-B-32; it has: openai"),
        ("open_clip:ViT-B-32/laion2b_s34b_b79k", "could not be had: the hub cannot be reached"),
    ],
)
def test_what_cannot_be_had(name, said, monkeypatch):
    monkeypatch.setattr("equipoise.method.pretrained._is_reachable", lambda repository: False)
    with pytest.raises(UserError, match=said):
        find_pretrained(name)


def test_other_encoders_have_no_text_tower(tmp_path):
    data = draw_folder(tmp_path / "data", {"ant": 6, "bee": 5})
    recipe = load_recipe("pictures", data=str(data), arch="resnet8", size=16, batch_size=4, classifier_start="text")
    with pytest.raises(UserError, match=r"on a pretrained open_clip:\.\.\. starts at text"):
        train(recipe, tmp_path / "run")
