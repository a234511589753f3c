"""What several test files use: golden numbers and small pictures on disk."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text(encoding="utf-8"))


def golden_values(seed: int, count: int):
    """The golden file's pseudo-random inputs."""
    import torch

    values, x = np.empty(count), seed
    for index in range(count):
        x = (1103515245 * x + 12345) % 2**31
        values[index] = x / 2**31 - 0.5
    return torch.from_numpy(values)


def check_bcl_golden(case: dict, device: str) -> None:
    """Value and gradients of the balanced contrastive loss, from features and prototypes before they are normalised."""
    import torch
    from torch.nn.functional import normalize

    from equipoise import BalancedContrastiveLoss

    batch, width, classes = case["batch"], case["dim"], case["classes"]
    values = golden_values(case["lcg_seed"], (2 * batch + classes) * width).to(device)
    features = values[: 2 * batch * width].reshape(batch, 2, width).requires_grad_()
    prototypes = values[2 * batch * width :].reshape(classes, width).requires_grad_()
    labels = torch.tensor(case["labels"], device=device)
    loss = BalancedContrastiveLoss(case["temperature"])(
        normalize(features, dim=-1), labels, normalize(prototypes, dim=-1)
    )
    assert loss.item() == pytest.approx(case["loss"], rel=1e-9)
    gradients = torch.autograd.grad(loss, [features, prototypes])
    for name, gradient in zip(("features", "prototypes"), gradients, strict=True):
        assert gradient.norm().item() == pytest.approx(case[f"grad_{name}_norm"], rel=1e-9)
        assert gradient.flatten()[:4].tolist() == pytest.approx(case[f"grad_{name}_first"], rel=1e-9)


def check_logit_adjusted_golden(device: str) -> None:
    import torch

    from equipoise import LogitAdjustedCrossEntropy

    case = GOLDEN["logit_adjusted_cross_entropy"]
    logits = golden_values(case["lcg_seed"], 40).to(device).reshape(8, 5) * case["scale"]
    loss = LogitAdjustedCrossEntropy(case["class_counts"], tau=case["tau"]).to(device)
    assert loss(logits, torch.tensor(case["labels"], device=device)).item() == pytest.approx(case["loss"], rel=1e-9)


def draw_picture(path: Path, label: int, seed: int, size: tuple[int, int] = (40, 32)) -> None:
    """A picture whose class can be seen: a bright band, at a height that belongs to the label, on noise."""
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 90, (height, width, 3), dtype=np.uint8)
    band = height // 6
    pixels[(label + 1) * band : (label + 2) * band] += 150
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def draw_folder(root: Path, counts: dict[str, int], suffix: str = ".png") -> Path:
    """A folder of class folders with that many pictures each."""
    for label, (name, count) in enumerate(counts.items()):
        for number in range(count):
            draw_picture(root / name / f"{number}{suffix}", label, seed=1000 * label + number)
    return root


def image_list(counts: list[int]):
    """In a random order; the pixel of each image is its number."""
    from equipoise.data.images import ImageList, PixelArrays

    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    pixels = np.arange(len(labels), dtype=np.uint8).repeat(3).reshape(-1, 1, 1, 3)
    return ImageList("test", PixelArrays("test", pixels), labels, tuple(f"c{i}" for i in range(len(counts))))


def write_parquet(path, labels, column="img", label_column="label", metadata=None, **more):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": b"not decoded here", "path": "x.jpg"} for _ in labels], kind)
    table = pa.table({column: images, label_column: pa.array(labels, pa.int64()), **more})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(metadata), path)


def opened(path, **fields):
    """The data at a path, to train on, with nothing held out unless that is asked for."""
    from equipoise.config.recipe import Data
    from equipoise.data.sources import open_data

    return open_data(Data(str(path), **{"holdout": 0, **fields}))


def figures_of(run: Path) -> dict:
    """`metrics.json` of a run, without what the clock tells."""
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["cost"].pop("seconds")
    return metrics


def refusal(capsys, *words: str) -> str:
    """What a refused command says: one line, on stderr, with exit code 2."""
    from equipoise.cli.main import main

    assert main(words) == 2
    said = capsys.readouterr()
    assert said.err.startswith("equipoise: ")
    assert said.err.count("\n") == 1
    return said.err.removeprefix("equipoise: ").strip()


# `open` waits for a reader.
_LATE_WRITER = """
import sys, time
time.sleep(5)
while True:
    with open(sys.argv[1], "wb"):
        print("somebody waited", flush=True)
"""


@contextmanager
def pipe(path: Path) -> Iterator[None]:
    """A pipe for which the block must not wait. If it does, it is let go after five seconds, and fails: by another
    process that writes nothing, since neither a signal nor a thread would come through where a library waits in C."""
    os.mkfifo(path)
    words = [sys.executable, "-S", "-c", _LATE_WRITER, str(path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as writer:
        try:
            yield
        finally:
            writer.kill()
            said = writer.communicate()[0]
    assert said == ""


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three classes of 12, 6 and 3 pictures."""
    return draw_folder(tmp_path / "my pictures", {"ant": 12, "bee": 6, "cat": 3})


ODD_NAMES = ("<b>x & y<", 'a, "quoted"', "two\nlines|")  # what a folder may be called


def draw_colour(path: Path, label: int, seed: int) -> None:
    """A picture of one colour, whose class can be guessed: the classes overlap."""
    mean = [(90, 120, 128), (128, 110, 120), (150, 140, 110)][label]
    colour = np.random.default_rng(seed).normal(mean, 25).clip(0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), tuple(colour.tolist())).save(path)


@pytest.fixture(scope="session")
def odd_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished BCL run on pictures of three classes of odd names; its data is `data` beside it."""
    from equipoise import load_recipe, train

    root = tmp_path_factory.mktemp("odd")
    for part, counts in {"train": (30, 12, 5), "val": (9, 6, 5), "test": (6, 6, 6)}.items():
        for label, (name, count) in enumerate(zip(ODD_NAMES, counts, strict=True)):
            for number in range(count):
                seed = 10_000 * len(part) + 100 * label + number
                draw_colour(root / "data" / part / name / f"{number}.png", label, seed)
    fields = {"arch": "resnet8", "size": 16, "hidden_dim": 16, "feature_dim": 8, "randaug": False, "workers": 0}
    fields |= {"epochs": 15, "batch_size": 12, "lr": 0.05, "warmup_epochs": 0}
    fields["precision"] = "fp32"  # so that the figures are those of any processor, nearly
    recipe = load_recipe("pictures", data=str(root / "data"), **fields)
    return train(recipe, root / "run", progress=False).path


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, for the tests of pages."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium and chromedriver here, so pages are not looked at")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield window
    window.quit()


@pytest.fixture
def shared_data() -> Path:
    """Real data sets, which lie beside the checkout where they are available; they are not part of the project."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real data sets (../shared/data) are not here")
    return folder
