"""The cost of training against slow counts of steps and layers."""

import json
from dataclasses import replace

import pytest
import torch
from synthetic import untrained
from torch import nn

from equipoise.evaluation.cost import training_cost
from equipoise.runs.checkpoint import create_network


def counted(checkpoint) -> int:
    """Multiplications of convolutions, linear layers and the classifier, layer by layer on a real image."""
    network, total = create_network(checkpoint.recipe, len(checkpoint.class_names), start=False).eval(), []

    def count(module, inputs, output) -> None:
        if isinstance(module, nn.Conv2d):
            total.append(output[0].numel() * module.weight[0].numel())
        elif isinstance(module, nn.Linear):
            total.append(output[0].numel() * module.in_features)

    for module in network.encoder.modules():
        module.register_forward_hook(count)
    size = checkpoint.recipe.views.size
    with torch.no_grad():
        network(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    return sum(total) + network.classifier.weight.numel()


@pytest.mark.parametrize("fields", [{}, {"method": "ce"}, {"arch": "resnet32", "size": 32}])
def test_convolutions_are_counted_once(fields, tmp_path):
    checkpoint = untrained(**fields)
    assert training_cost(tmp_path, checkpoint)["multiply_adds"] == counted(checkpoint)


@pytest.mark.slow
def test_attention_is_counted_and_low_rank_additions_are_not(tmp_path):
    checkpoint = untrained(arch="vit_tiny_patch16_224", size=32)
    tokens, width, blocks = 5, 192, 12
    found = training_cost(tmp_path, checkpoint)
    assert found["multiply_adds"] == counted(checkpoint) + blocks * 2 * tokens**2 * width
    recipe = replace(checkpoint.recipe, model=replace(checkpoint.recipe.model, tune="lora"))
    with_lora = training_cost(tmp_path, replace(checkpoint, recipe=recipe))
    assert with_lora["multiply_adds"] == found["multiply_adds"]
    assert with_lora["trained_parameters"] < found["trained_parameters"] == found["parameters"]
    assert with_lora["parameters"] > found["parameters"]


def test_parameters_are_those_of_the_network(tmp_path):
    checkpoint = untrained()
    found = training_cost(tmp_path, checkpoint)
    network = create_network(checkpoint.recipe, 3, start=False)
    assert found["parameters"] == sum(parameter.numel() for parameter in network.parameters())
    assert found["parameters"] > training_cost(tmp_path, untrained(method="ce"))["parameters"], "without projections"


@pytest.mark.parametrize(("images", "batch", "step"), [(20, 8, 9), (17, 8, 5), (16, 8, 4), (20, 8, 7)])
def test_images_that_were_seen(images, batch, step, tmp_path):
    """Step by step: the last batch of an epoch is short, and one of a single image is left out."""
    epoch = [size for start in range(0, images, batch) if (size := min(batch, images - start)) > 1]
    seen = sum(epoch[number % len(epoch)] for number in range(step))
    checkpoint = untrained(counts=(images - 6, 5, 1), batch_size=batch, step=step)
    assert training_cost(tmp_path, checkpoint)["images_seen"] == seen


def test_seconds_are_summed_over_the_parts_of_a_run(tmp_path):
    """Of epochs of 8, 8 and 4 images. After step 15 it was interrupted, without a line; the first line of the next part
    holds for steps 11 to 20."""
    checkpoint = untrained(counts=(14, 5, 1), batch_size=8)
    assert training_cost(tmp_path, checkpoint)["seconds"] is None
    speeds = [(5, 40.0), (10, 20.0), (20, 80.0), (24, 16.0)]
    lines = [{"kind": "train", "step": step, "epoch": 0, "images_per_second": speed} for step, speed in speeds]
    lines.insert(2, {"kind": "validation", "step": 10, "epoch": 0, "few": 0.5})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen = [
        sum(4 if step % 3 == 0 else 8 for step in part)
        for part in (range(1, 6), range(6, 11), range(11, 21), range(21, 25))
    ]
    assert training_cost(tmp_path, checkpoint)["seconds"] == pytest.approx(
        seen[0] / 40 + seen[1] / 20 + seen[2] / 80 + seen[3] / 16, abs=1e-3
    )
