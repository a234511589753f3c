"""Data at the edges of what can be trained on: trained on, or refused in one line."""

import io
import json
import os
import signal
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import draw_folder
from PIL import Image

from equipoise import load_recipe, train
from equipoise.base.errors import Stopped
from equipoise.config.recipe import Recipe
from equipoise.method.methods import METHODS, objective_of
from equipoise.runs.checkpoint import create_network, load_checkpoint
from equipoise.training.plan import prepare
from equipoise.training.step import Step
from equipoise.views.loader import open_batches
from equipoise.views.views import view_settings

TINY = {"policy": "cifar", "size": 8, "encoder": "resnet8", "hidden_dim": 8, "feature_dim": 8, "epochs": 1,
        "log_every": 1, "device": "cpu", "holdout": 0}  # fmt: skip


def tiny(data: object, **overrides) -> Recipe:
    return load_recipe("pictures", data=str(data), **{**TINY, **overrides})


def steps(run) -> list[float]:
    """The loss of each step that was logged."""
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


WITH_STATE = [name for name in METHODS if objective_of(tiny("", method=name), (2, 1)).state_dict()]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_class_with_one_image(method, tmp_path):
    draw_folder(tmp_path / "data" / "train", {"ant": 9, "bee": 1})
    draw_folder(tmp_path / "data" / "test", {"ant": 2, "bee": 2})
    run = train(tiny(tmp_path / "data", method=method, batch_size=5), tmp_path / "run", progress=False)
    assert np.isfinite(steps(run)).all()
    assert len(run.metrics["test"]["per_class"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "method"), [*(("cifar", method) for method in METHODS), ("photos", "bcl")])
def test_a_last_batch_of_one_image(policy, method, tmp_path):
    """It is left out, as BatchNorm has no spread of one: 13 images are two steps of 6. 14 are three."""
    for count, expected in ((13, 2), (14, 3)):
        data = draw_folder(tmp_path / f"data{count}", {"ant": count - 4, "bee": 4})
        recipe = tiny(data, policy=policy, method=method, batch_size=6, workers=0)
        losses = steps(train(recipe, tmp_path / f"run{count}", progress=False))
        assert len(losses) == expected
        assert np.isfinite(losses).all()


MORE = {"sampler": "progressive", "mix": "cmo", "sam": 0.05, "ema": 0.9}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "fields"), [*((method, {}) for method in [*WITH_STATE, "kcl"]), ("proco", MORE | {"policy": "photos"})]
)
def test_what_a_method_keeps_goes_on(method, fields, tmp_path, monkeypatch):
    """A run that is stopped within an epoch ends, to the last bit, as an undisturbed one; with other workers too."""
    data = draw_folder(tmp_path / "data", {"ant": 14, "bee": 6})
    recipe = tiny(data, method=method, batch_size=5, epochs=5, workers=0, precision="fp32", **fields)
    whole = load_checkpoint(train(recipe, tmp_path / "whole", progress=False).path / "last.pt")
    steps, honest = list[int](), Step.__call__

    def stop(step, batch, votes):
        steps.append(1)
        if len(steps) == 18:  # in the last epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(step, batch, votes)

    monkeypatch.setattr(Step, "__call__", stop)
    with pytest.raises(Stopped):
        train(recipe, tmp_path / "run", progress=False)
    recipe = replace(recipe, workers=2)
    again = load_checkpoint(train(recipe, resume=tmp_path / "run", progress=False).path / "last.pt")
    assert again.step == whole.step == 20
    assert bool(whole.raw) == ("ema" in fields)
    for name in ("weights", "raw", "objective"):
        ours, expected = getattr(again, name), getattr(whole, name)
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[name], value) for name, value in expected.items())


@pytest.mark.long
def test_ten_thousand_classes_of_two_images(tmp_path):
    """Trained by cross-entropy. BCL, which compares every image with every class, takes ten times as long: one step."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(file, "PNG")
    table = pa.table({"img": [file.getvalue()] * 20_000, "label": np.repeat(np.arange(10_000), 2)})
    (tmp_path / "data").mkdir()
    pq.write_table(table, tmp_path / "data" / "train.parquet")
    run = train(tiny(tmp_path / "data", method="ce", batch_size=4000), tmp_path / "run", progress=False)
    assert len(steps(run)) == 5
    assert np.isfinite(steps(run)).all()
    assert len(run.metrics["class_names"]) == 10_000
    plan = prepare(tiny(tmp_path / "data", method="bcl", batch_size=100))
    network = create_network(plan.recipe, 10_000, start=True).train()
    batches = open_batches(plan.parts.train, view_settings(plan.recipe), plan.device).training(0, 100, range(1))
    step = Step(plan.recipe, network, plan.parts.train.class_counts, plan.device, plan.precision, plan.world)
    values, _ = step(next(batches))
    assert np.isfinite(list(values.values())).all()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in network.parameters())
