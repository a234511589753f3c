"""Run folders without training: a made-up network is scored by the real code, and its files written as a run's are."""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from equipoise.config.reading import load_recipe, recipe_toml
from equipoise.evaluation.score import score_checkpoint
from equipoise.method.losses import log_prior
from equipoise.method.network import CosineClassifier
from equipoise.runs.checkpoint import Checkpoint, create_network, state_on_cpu
from equipoise.runs.folder import METRICS, OBSERVED, RECIPE, RECORD, write_json
from equipoise.views.loader import Batch, steps_per_epoch

WIDTH = 24

TWO_EPOCHS = load_recipe("digits-lt", epochs=2, precision="fp32", method="ce", log_every=1)


class Prejudiced(CosineClassifier):
    """One that has learned something of the training prior."""

    def __init__(self, centres_CF: torch.Tensor, prior_C: torch.Tensor) -> None:
        super().__init__(WIDTH, len(centres_CF))
        self.weight.data = centres_CF
        self.prior_C = prior_C

    def forward(self, hidden_NF: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_NF) + self.prior_C


class MadeUp(nn.Module):
    """Its images are numbers of rows of `hidden_NF`."""

    def __init__(self, hidden_NF: torch.Tensor, classifier: CosineClassifier, two_branch: bool) -> None:
        super().__init__()
        self.width = WIDTH
        self.encode = nn.Embedding.from_pretrained(hidden_NF)
        self.classifier = classifier
        self.projection = nn.Sequential(nn.Linear(WIDTH, 16)) if two_branch else None
        self.prototype_projection = nn.Linear(WIDTH, 16) if two_branch else None


class Rows:
    def __init__(self, labels_N: torch.Tensor, first: int) -> None:
        self.labels_N, self.first = labels_N, first

    def evaluation(self, batch_size: int) -> Iterator[Batch]:
        rows = torch.arange(len(self.labels_N))
        for part in rows.split(batch_size):
            yield Batch((part + self.first)[None], self.labels_N[part], slice(0, len(part)))


def write_run(
    folder: Path,
    counts: Sequence[int],
    *,
    method: str = "bcl",
    names: Sequence[str] | None = None,
    images_per_class: int = 10,
    validation: bool = True,
    seed: int = 0,
    scored: bool = True,
    data: str = "no-such-folder",
) -> Path:
    """A run on classes of those training counts, whose images are harder to tell apart the rarer their class is.
    Without `scored` it stopped half-way."""
    generator = torch.Generator().manual_seed(seed)
    names = names or [f"class {number}" for number in range(len(counts))]
    folder.mkdir(parents=True)
    recipe = load_recipe("digits-lt", method=method, seed=seed, data=data, epochs=20, batch_size=64, log_every=5)
    recipe = replace(recipe, name="synthetic")
    (folder / RECIPE).write_text(recipe_toml(recipe), encoding="utf-8")
    parts = ["train", "test", *(["validation"] if validation else [])]
    images = {"train": sum(counts), "test": len(counts) * images_per_class, "validation": len(counts) * 2}
    write_json(
        folder / RECORD,
        {
            "command": f"equipoise train --method {method}",
            "started": "2026-11-24T12:00:00+0000",
            "versions": {"python": "3.11", "torch": "2.14.1"},
            "machine": {"system": "Linux", "device": "cpu"},
            "precision": "fp32",
            "data": {
                "kind": "class folders",
                "fingerprints": {part: f"{part}-{len(counts)}" for part in parts},
                "images": {part: images[part] for part in parts},
            },
            "class_counts": dict(zip(names, counts, strict=True)),
        },
    )
    steps = steps_per_epoch(sum(counts), recipe.batch_size)
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as log:
        for epoch in range(recipe.epochs if scored else recipe.epochs // 2):
            line = {"step": (epoch + 1) * steps, "epoch": epoch}
            loss = 3 / (1 + epoch)
            terms = {"classification": loss / 3, "contrastive": loss} if method in ("bcl", "supcon+la") else {}
            log.write(json.dumps({"kind": "train", **line, "loss": loss, **terms, "lr": 0.1 / (1 + epoch)}) + "\n")
            if validation:
                shares = {"mean_per_class": 0.6 - loss / 10, "few": None if min(counts) >= 20 else 0.5 - loss / 10}
                log.write(json.dumps({"kind": "validation", **line, **shares}) + "\n")
    if not scored:
        return folder
    write_figures(folder, list(counts), list(names), method, images_per_class, validation, generator)
    return folder


def write_figures(folder, counts, names, method, images_per_class, validation, generator) -> None:
    classes = len(counts)
    centres_CF = F.normalize(torch.randn(classes, WIDTH, generator=generator), dim=1)
    noise_C = 0.15 + 0.5 / torch.tensor(counts, dtype=torch.float32).sqrt()
    labels = {"validation": torch.arange(classes).repeat_interleave(2)} if validation else {}
    labels["test"] = torch.arange(classes).repeat_interleave(images_per_class)
    labels_N = torch.cat(list(labels.values()))
    drawn = torch.randn(len(labels_N), WIDTH, generator=generator)
    prior_C = log_prior(torch.tensor(counts)).float()
    network = MadeUp(
        centres_CF[labels_N] + noise_C[labels_N, None] * drawn,
        Prejudiced(centres_CF, prior_C * (1.0 if method == "ce" else 0.1)),
        method in ("bcl", "supcon+la"),
    ).eval()
    firsts = itertools.accumulate(map(len, labels.values()), initial=0)
    parts = {part: Rows(of_part, first) for (part, of_part), first in zip(labels.items(), firsts, strict=False)}
    checkpoint = SimpleNamespace(
        build=lambda: network, class_counts=tuple(counts), class_names=tuple(names), epoch=20, step=100,
        log_prior_of_logits=lambda: torch.zeros(classes),
    )  # fmt: skip
    block, observed = score_checkpoint(checkpoint, checkpoint.build(), parts)
    np.savez_compressed(folder / OBSERVED, **observed)
    scored = {part: block[part] for part in ("validation", "test")}
    described = {"class_names": names, "train_counts": counts}
    write_json(folder / METRICS, {"method": method, **scored, "last": block, "best": None, **described})


def untrained(counts=(9, 5, 1), names=(), recipe="pictures", epoch=1, step=1, **fields) -> Checkpoint:
    """A checkpoint of random weights; `fields` are the recipe's."""
    torch.manual_seed(0)
    recipe = load_recipe(recipe, **{"arch": "resnet8", "size": 24, "hidden_dim": 16, "feature_dim": 8, **fields})
    weights = state_on_cpu(create_network(recipe, len(counts), start=False))
    names = names or tuple(f"class {label}" for label in range(len(counts)))
    return Checkpoint(recipe, names, counts, epoch, step, None, weights, {"state": {}, "param_groups": []}, {})
