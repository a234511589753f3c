"""A training step of ResNet-50 at 224 pixels, forward, backward and SGD: `python -m benchmarks.step [--images 16]`.

48 views (16 images, three views), 1,000 classes, all cores. Ours is the step of `training.py` in the precision that
`auto` takes on this machine: bf16 where the processor computes in it. "ratio" is the time of the eager step in float32,
channels first, with the loss in its mask form, divided by ours. What a processor gains by bf16 differs: without the
instructions nothing, and the ratio is that of channels-last memory and of the loss. Each in processes of its own, in
turn, since ours also changes how the process keeps its memory. Takes 100 s on two cores.
"""

import argparse
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.loss import mask_form
from benchmarks.timing import answer, apart, finish, say_times, say_where
from equipoise.base.device import choose_precision, keep_freed_memory
from equipoise.base.world import ALONE
from equipoise.config.reading import load_recipe
from equipoise.config.recipe import Recipe
from equipoise.runs.checkpoint import create_network
from equipoise.training.step import Step
from equipoise.views.loader import Batch

CLASSES = 1000
CPU = torch.device("cpu")


class PlainBCL(nn.Module):
    """The network of BCL, as one writes it down."""

    def __init__(self, encoder: str) -> None:
        super().__init__()
        self.encoder = timm.create_model(encoder, num_classes=0)
        width: int = self.encoder.num_features
        self.weight = nn.Parameter(torch.randn(CLASSES, width))
        self.projection, self.prototypes = (
            nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 1024))
            for _ in range(2)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.encoder(images)
        logits = 30 * F.normalize(hidden[: len(images) // 3]) @ F.normalize(self.weight).T
        features = F.normalize(self.projection(hidden)).unflatten(0, (3, -1))[1:].transpose(0, 1)
        return logits, features, F.normalize(self.prototypes(self.weight))


def plain_step(images: Tensor, labels: Tensor, encoder: str = "resnet50") -> Callable[[], None]:
    """Normalised float images, view-major."""
    network = PlainBCL(encoder).to(images.device).train()
    prior = torch.log_softmax(torch.linspace(0, -5, CLASSES, device=images.device), 0)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        logits, features, prototypes = network(images)
        loss = F.cross_entropy(logits + prior, labels) + 0.35 * mask_form(features, labels, prototypes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def our_step(images: Tensor, labels: Tensor, recipe: Recipe, classes: int = CLASSES) -> Callable[[], None]:
    """Images as bytes, view-major."""
    device = images.device
    network = create_network(recipe, classes, start=True).to(device, memory_format=torch.channels_last).train()
    precision = choose_precision(recipe.precision, device)
    take_step = Step(recipe, network, tuple(range(classes, 0, -1)), device, precision, ALONE)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=5e-4)
    batch = Batch(images.unflatten(0, (-1, len(labels))), labels, slice(0, len(labels)))

    def step() -> None:
        optimizer.zero_grad()
        take_step(batch)
        optimizer.step()

    return step


OURS, PLAIN = "ours", "eager, float32, channels first"


def child(name: str, images: int) -> None:
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (3 * images, 224, 224, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    labels = torch.randint(0, CLASSES, (images,))
    if name == OURS:
        keep_freed_memory()  # as a run does
        step = our_step(pixels, labels, load_recipe("imagenet-lt", arch="resnet50"))
    else:
        step = plain_step(((pixels.float() - 120) / 58).contiguous(), labels)
    answer(step, rounds=3, warmup=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        child(options.child, options.images)
        return
    say_where()
    precision = choose_precision("auto", CPU)
    print(f"ResNet-50, {3 * options.images} views of 224 pixels, {CLASSES} classes; ours in {precision}, channels last")
    words = ["--images", str(options.images), "--threads", str(options.threads)]
    times = apart("benchmarks.step", words, (OURS, PLAIN))
    say_times(times, 3 * options.images)
    finish("step", times[PLAIN], times[OURS], precision=precision)


if __name__ == "__main__":
    main()
