"""The stages of `benchmarks.gpu` that measure speed: the step, the loss, the input."""

import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.figures import Task
from benchmarks.input import read_photos, write_folder
from benchmarks.loss import Loss, inputs, mask_form, ours, products
from benchmarks.loss import step as loss_step
from benchmarks.step import CLASSES, our_step, plain_step
from benchmarks.waiting import training
from equipoise.base.device import choose_precision
from equipoise.config.reading import load_recipe
from equipoise.data.sources import find_parts
from equipoise.training.plan import Plan, prepare
from equipoise.views.loader import Batch, open_batches, worker_count
from equipoise.views.views import ViewSettings, small_views, view_settings

_UNTIMED = 5  # steps: the fourth is recorded, where steps are
RESNET50 = 4.089e9  # multiply-adds of one image at 224 pixels


def seconds_of(subject: Callable[[], object], device: torch.device, rounds: int = 7, calls: int = 3) -> float:
    """Seconds of one call: the median over rounds of several calls that a GPU may take without waiting for the host."""

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(2):
        subject()
    seconds: list[float] = []
    for _ in range(rounds):
        finish()
        start = time.perf_counter()
        for _ in range(calls):
            subject()
        finish()
        seconds.append((time.perf_counter() - start) / calls)
    return statistics.median(seconds)


# ---------------------------------------------------------------------------------------------- the step


def step(task: Task) -> None:
    """ResNet-50, three views of 224 pixels, 1,000 classes: as `imagenet-lt` trains it, and as one writes it down. Then
    ResNet-32 as `cifar10-lt` trains it, recorded as CUDA graphs and not."""
    device, precision = task.device, choose_precision("auto", task.device)
    size, mine, theirs = (32, "resnet8", "resnet18") if task.rehearse else (224, "resnet50", "resnet50")
    factor = torch.randn(512 if task.rehearse else 8192, 512 if task.rehearse else 8192, device=device).bfloat16()
    product = 2 * len(factor) ** 3 / seconds_of(lambda: factor @ factor, device)

    def plain(batch: int) -> Callable[[], None]:
        pixels, labels = _noise(batch, size, device)
        return plain_step(((pixels.float() - 120) / 58).contiguous(), labels, theirs)

    def ours(compiled: bool = False) -> Callable[[int], Callable[[], None]]:
        recipe = load_recipe("imagenet-lt", arch=mine, size=size, compile=compiled)
        return lambda batch: our_step(*_noise(batch, size, device), recipe)

    def measure(name: str, make: Callable[[int], Callable[[], None]]) -> float:
        batch, seconds, memory = _largest(make, device, [4] if task.rehearse else [256, 192, 128, 64, 32])
        rate = 3 * batch * 6 * RESNET50 / seconds
        figures = {} if task.rehearse else {"tflops": rate / 1e12, "share_of_product": rate / product}
        figures |= {"batch": batch, "ms": 1000 * seconds, "peak_gib": memory}
        task.say(f"{name}, batch {batch} in three views", batch / seconds, "images/s", **figures)
        return batch / seconds

    eager = measure(f"{precision}, channels last", ours())
    task.say("that is faster than the next one by", eager / measure("float32, channels first", plain), "times")
    _small_step(task)
    start = time.perf_counter()
    compiled = measure("the first, compiled", ours(compiled=True))
    task.say("compiling gains", compiled / eager, "times", seconds=time.perf_counter() - start)


def _small_step(task: Task) -> None:
    encoder, batch = ("resnet8", 16) if task.rehearse else ("resnet32", 256)
    images, labels = _noise(batch, 32, task.device, classes=10)
    for name, recorded, by_trial in (
        ("eager", False, False),
        ("recorded", True, False),
        ("recorded, cuDNN choosing by trial", True, True),
    ):
        torch.backends.cudnn.benchmark = by_trial
        take = our_step(images, labels, load_recipe("cifar10-lt", arch=encoder, cuda_graph=recorded), classes=10)
        for _ in range(_UNTIMED):
            take()
        task.say(f"{encoder}, {batch} images, {name}", 1000 * seconds_of(take, task.device), "ms")
    torch.backends.cudnn.benchmark = False


def _noise(batch: int, size: int, device: torch.device, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    """Three views of a batch of images that mean nothing, as bytes, and labels."""
    pixels = torch.randint(0, 256, (3 * batch, size, size, 3), dtype=torch.uint8, device=device)
    return pixels.permute(0, 3, 1, 2), torch.randint(0, classes, (batch,), device=device)


def _largest(
    make: Callable[[int], Callable[[], None]], device: torch.device, batches: list[int]
) -> tuple[int, float, float]:
    """The first of the batches that fits; seconds of its step, and the memory it took at most, in GiB."""
    for batch in batches:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        try:
            seconds = seconds_of(make(batch), device, *((1, 1) if device.type == "cpu" else (4, 3)))
            memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
            return batch, seconds, memory
        except torch.OutOfMemoryError:
            continue
    raise SystemExit("not even the smallest batch fits")


# ---------------------------------------------------------------------------------------------- the loss


def loss(task: Task) -> None:
    """The balanced contrastive loss, forward and backward in float32, against the products that it cannot do without,
    and against the equation as it is written down."""
    for batch, width, classes in [(8, 16, 30)] if task.rehearse else [(256, 1024, 8142), (4096, 128, 8142)]:
        of_batch = inputs(batch, width, classes, str(task.device))
        where, matrix = f"B {batch}, D {width}, C {classes}", 4 * 2 * batch * (2 * batch + classes)
        alone = _products_alone(of_batch)
        task.say(f"{where}: products alone", 1000 * alone, "ms")
        for name, subject in (("ours", ours), ("mask form", mask_form)):
            figures = _measured_loss(subject, of_batch)
            task.say(f"{where}: {name}", 1000 * figures["seconds"], "ms")
            task.say(f"{where}: {name} / products", figures["seconds"] / alone, "times")
            if "bytes" in figures:
                task.say(f"{where}: {name}, memory / the full matrix", figures["bytes"] / matrix, "times", **figures)


def _products_alone(of_batch: tuple[Tensor, Tensor, Tensor]) -> float:
    anchors_ND, prototypes_CD = of_batch[0].flatten(0, 1), of_batch[2]
    of_features_NN = torch.randn(len(anchors_ND), len(anchors_ND), device=anchors_ND.device)
    of_prototypes_NC = torch.randn(len(anchors_ND), len(prototypes_CD), device=anchors_ND.device)
    return seconds_of(
        lambda: products(anchors_ND, prototypes_CD, of_features_NN, of_prototypes_NC), anchors_ND.device, calls=10
    )


def _measured_loss(subject: Loss, of_batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
    """Seconds and, on a GPU, bytes at the peak beyond the inputs and their gradients."""
    device = of_batch[0].device
    figures = {"seconds": seconds_of(lambda: loss_step(subject, *of_batch), device, calls=10)}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _, *gradients = loss_step(subject, *of_batch)
        returned = sum(4 * gradient.numel() for gradient in gradients)
        figures["bytes"] = torch.cuda.max_memory_allocated(device) - before - returned
    return figures


# ---------------------------------------------------------------------------------------------- the input


def input_speed(task: Task) -> None:
    """Photographs and small images on their way into the step: how fast they come, and how long the step waits."""
    rehearse, device = task.rehearse, task.device
    contents = read_photos(task.photos, most=320)
    copies = 32 if rehearse else 4096
    write_folder([contents[n % len(contents)] for n in range(copies)], task.work / "photographs")
    images = find_parts(str(task.work / "photographs")).parts["train"]
    size, batch = (32, 8) if rehearse else (224, 256)
    settings = ViewSettings("photos", size=size, kinds=("cls", "sim", "sim"))
    batches = open_batches(images, settings, device, worker_count(-1))
    steps = 4 if rehearse else 28
    arriving = batches.training(0, batch, range(10**9))
    first = [next(arriving) for _ in range(2 if rehearse else 8)]  # the workers start
    start = time.perf_counter()
    for _ in range(steps):
        next(arriving)
    _finish(device)
    speed = steps * batch / (time.perf_counter() - start)
    task.say(f"photographs, three views of {size} pixels, {worker_count(-1)} processes", speed, "images/s")
    encoder = "resnet8" if rehearse else "resnet50"
    recipe = load_recipe("imagenet-lt", arch=encoder, size=size)
    take = our_step(first[0].images_VB3SS.flatten(0, 1), first[0].labels_G, recipe)
    del first
    fixed, loaded = _with_and_without_input(take, arriving, device, 3 if rehearse else 40)
    task.say(f"{encoder} step: its batch there already", 1000 * fixed, "ms")
    task.say("the same while photographs arrive", 1000 * loaded, "ms")
    task.say("share of the step spent waiting for photographs", 1 - fixed / loaded, "")
    batches.close()
    _small(task)


def _small(task: Task) -> None:
    device = task.device
    more = {"encoder": "resnet8", "batch_size": 32, "imbalance_factor": 10} if task.rehearse else {}
    plan = prepare(load_recipe("cifar10-lt", data=str(task.data), **more), task.work / "not written")
    settings, batch = view_settings(plan.recipe), plan.recipe.batch_size
    alone = open_batches(plan.parts.train, settings, torch.device("cpu"))
    indices_B = np.arange(batch)
    pixels_BSS3 = next(alone.evaluation(batch)).images_VB3SS[0].permute(0, 2, 3, 1).numpy()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = seconds_of(lambda: small_views(pixels_BSS3, settings, 0, 0, indices_B), torch.device("cpu"))
    torch.set_num_threads(threads)
    task.say(f"CIFAR, three views of {batch} images, one core", 1000 * seconds, "ms")
    batches = open_batches(plan.parts.train, settings, device, worker_count(-1))
    arriving = batches.training(0, batch, range(10**9))
    held = next(arriving)
    take = _cifar_step(plan)
    fixed, loaded = _with_and_without_input(lambda: take(held), arriving, device, 3 if task.rehearse else 200, take)
    task.say(f"{plan.recipe.model.encoder} step: its batch there already", 1000 * fixed, "ms")
    task.say("the same while CIFAR's views are made", 1000 * loaded, "ms")
    task.say("share of the step spent waiting for CIFAR's views", 1 - fixed / loaded, "")
    batches.close()


def _cifar_step(plan: Plan) -> Callable[[Batch], None]:
    network, take_step, optimizer = training(plan)

    def take(batch: Batch) -> None:
        optimizer.zero_grad()
        take_step(batch)
        optimizer.step()

    network.train()
    return take


def _with_and_without_input(
    fixed: Callable[[], None],
    arriving: Iterator[Batch],
    device: torch.device,
    steps: int,
    take: Callable[[Batch], None] | None = None,
) -> tuple[float, float]:
    """Seconds of a step whose batch is there already, and of one that takes the next batch that arrives. Without `take`
    the step is the fixed one and the batch only has to be there."""

    def loaded() -> None:
        batch = next(arriving)
        if take is None:
            fixed()
        else:
            take(batch)

    for _ in range(_UNTIMED):
        fixed()
    without = seconds_of(fixed, device, rounds=1, calls=steps)
    for _ in range(2 * worker_count(-1)):  # what the workers have made meanwhile
        next(arriving)
    return without, seconds_of(loaded, device, rounds=1, calls=steps)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
