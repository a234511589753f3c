"""What only a GPU can show: it computes what a CPU computes, is not waited for, and can repeat every bit."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, check_bcl_golden, check_logit_adjusted_golden, figures_of
from torch import Tensor

import equipoise
from equipoise import Run, UserError, load_checkpoint, load_recipe, train
from equipoise.base.device import choose_device, choose_precision
from equipoise.base.world import ALONE
from equipoise.data.sources import find_parts
from equipoise.evaluation.score import evaluate_run
from equipoise.method.losses import (
    balanced_contrastive_loss,
    log_prior,
    logit_adjusted_cross_entropy,
    supervised_contrastive_loss,
)
from equipoise.method.methods import METHODS as ALL_METHODS
from equipoise.method.network import TwoBranchNetwork, batch_norms
from equipoise.runs.checkpoint import create_network
from equipoise.training.loop import set_training
from equipoise.training.step import Step
from equipoise.views.loader import Batch, open_batches
from equipoise.views.views import ViewSettings, view_settings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DEVICE, CPU = torch.device("cuda"), torch.device("cpu")
METHODS = [{"method": method} for method in ALL_METHODS]
CLASS_COUNTS = (124, 80, 51, 33, 21, 14, 9, 5, 3, 2)  # of digits-lt: six steps an epoch


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Of two tensors, relative to the norm of the second."""
    ours, theirs = ours.detach().cpu().double(), theirs.detach().cpu().double()
    return float((ours - theirs).norm() / theirs.norm())


def log_lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def record_of(run: Path) -> dict:
    return json.loads((run / "run.json").read_text(encoding="utf-8"))


def with_fields(*fields: dict):
    """A test of recipes with each of these fields."""
    return pytest.mark.parametrize("fields", fields, ids=lambda of_one: "-".join(map(str, of_one.values())))


@pytest.fixture
def no_tf32() -> Iterator[None]:
    """Convolutions in float32 do not round to TF32, as they do by default on a GPU."""
    with warnings.catch_warnings(action="ignore"):  # torch 2.9 announces another way to say it
        before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    with warnings.catch_warnings(action="ignore"):
        torch.backends.cudnn.allow_tf32 = before


# ---- words


def test_devices_and_precisions():
    assert choose_device("cuda") == choose_device("auto") == DEVICE
    assert choose_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(UserError, match="no cuda:99"):
        choose_device("cuda:99")
    computes_bf16 = torch.cuda.get_device_capability(DEVICE) >= (8, 0)
    assert choose_precision("auto", DEVICE) == ("bf16" if computes_bf16 else "fp32")


# ---- losses


@pytest.mark.parametrize("case", GOLDEN["losses"], ids=lambda case: case["name"])
def test_bcl_golden(case):
    check_bcl_golden(case, DEVICE.type)


def test_logit_adjusted_golden():
    check_logit_adjusted_golden(DEVICE.type)


def value_and_gradients(name: str, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Of a loss, on random inputs of 70 images in two views and of 40 classes."""
    random = torch.Generator().manual_seed(0)
    shapes = [(70, 2, 32), (40, 32), (70, 40)]
    inputs = [torch.randn(shape, generator=random, dtype=torch.float64).to(device, dtype) for shape in shapes]
    raw, centres, logits = (tensor.requires_grad_() for tensor in inputs)
    labels = (40 * torch.rand(70, generator=random) ** 3).long().to(device)
    features, prototypes = F.normalize(raw, dim=-1), F.normalize(centres, dim=-1)
    if name == "bcl":
        value = balanced_contrastive_loss(features, labels, prototypes, 0.1)
    elif name == "supcon":
        value = supervised_contrastive_loss(features, labels, 0.1)
    else:
        prior = log_prior(torch.arange(1, 41)).to(device)
        value = logit_adjusted_cross_entropy(5 * logits, labels, prior)
    gradients = torch.autograd.grad(value, inputs, allow_unused=True)
    return [value, *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize(("name", "rows"), [("bcl", None), ("bcl", 16), ("supcon", None), ("logit-adjusted", None)])
def test_losses_in_float32_are_those_of_a_cpu_in_float64(name, rows, monkeypatch):
    """BCL in one chunk of anchors, and in nine of which the last is short."""
    expected = value_and_gradients(name, CPU, torch.float64)
    if rows is not None:
        monkeypatch.setattr("equipoise.method.losses._CHUNK_ENTRIES_GPU", 1)
        monkeypatch.setattr("equipoise.method.losses._CHUNK_ROWS", rows)
    ours = value_and_gradients(name, DEVICE, torch.float32)
    for one, two in zip(ours, expected, strict=True):
        assert (one.device.type, one.dtype) == (DEVICE.type, torch.float32)
        assert distance(one, two) < 1e-5


# ---- steps


def make_step(device: torch.device, **fields) -> tuple[Step, TwoBranchNetwork, Batch]:
    """A network of digits-lt with averages of BatchNorm that change something, its step, and a batch of noise."""
    recipe = load_recipe("digits-lt", **fields)
    torch.manual_seed(0)
    network = create_network(recipe, len(CLASS_COUNTS), start=True).to(memory_format=torch.channels_last)
    for module in batch_norms(network):
        module.running_mean.normal_(0, 0.1)
        module.running_var.uniform_(0.5, 1.5)
    set_training(network, recipe)
    network.to(device)
    random, views = torch.Generator().manual_seed(1), len(view_settings(recipe).kinds)
    images = torch.randint(0, 256, (views, 24, 3, 16, 16), dtype=torch.uint8, generator=random)
    labels = torch.randint(0, len(CLASS_COUNTS), (24,), generator=random)
    step = Step(recipe, network, CLASS_COUNTS, device, recipe.precision, ALONE)
    return step, network, Batch(images.to(device), labels.to(device), slice(0, 24))


@contextmanager
def no_waiting() -> Iterator[None]:
    """What waits for the GPU raises RuntimeError: all but the waiting for an event, which torch does not look at."""
    with warnings.catch_warnings(action="ignore"):  # torch calls it a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_would_be_noticed():
    number = torch.ones((), device=DEVICE)
    with no_waiting(), pytest.raises(RuntimeError, match="synchronizing"):
        number.item()


@with_fields(*METHODS, {"micro_batch": 8}, {"precision": "fp32"})
def test_a_step_waits_for_its_loss_terms_alone(fields):
    """Forward pass, losses, backward pass and the optimizer's step. The loss terms are read by way of an event."""
    take_step, network, batch = make_step(DEVICE, **{"precision": "bf16", **fields})
    optimizer = torch.optim.SGD(network.parameters(), 0.05, 0.9, weight_decay=5e-4)
    for number in range(3):  # in the first two, libraries are loaded, and momentum is made
        with no_waiting() if number == 2 else nullcontext():
            optimizer.zero_grad()
            values, votes = take_step(batch, (0, 1, 0))
            optimizer.step()
        assert votes == [0, 1, 0]
        assert np.isfinite([*values.values()]).all()


def gradients(device: torch.device, **fields) -> tuple[Tensor, dict[str, float]]:
    take_step, network, batch = make_step(device, **fields)
    values, _ = take_step(batch)
    return torch.cat([parameter.grad.flatten() for parameter in network.parameters()]), values


@with_fields(*METHODS, {"micro_batch": 8}, {"batch_norm": "frozen"}, {"micro_batch": 8, "batch_norm": "frozen"})
def test_gradients_are_those_of_a_cpu(fields, no_tf32):
    ours, our_terms = gradients(DEVICE, precision="fp32", **fields)
    theirs, their_terms = gradients(CPU, precision="fp32", **fields)
    assert ours.device.type == DEVICE.type
    # A ReLU whose input is nearly 0 may open on one of the two alone: that is 1e-4 of the gradient.
    assert distance(ours, theirs) < 1e-3
    assert our_terms == pytest.approx(their_terms, rel=1e-4)


def test_loss_terms_in_bf16_are_near_those_in_float32():
    _, in_bf16 = gradients(DEVICE, precision="bf16")
    _, in_float32 = gradients(CPU, precision="fp32")
    assert in_bf16 == pytest.approx(in_float32, rel=0.03)


@with_fields(*({**method, "precision": "fp32"} for method in METHODS), {"precision": "bf16"})
def test_a_recorded_step_trains_as_one_that_is_not(fields, no_tf32):
    """Eight steps, each of other images and labels, of which the sixth is short: three are not recorded yet, nor is the
    short one."""
    terms: list[list[float]] = []
    states: list[Tensor] = []
    for recorded in (False, True):
        take_step, network, batch = make_step(DEVICE, cuda_graph=recorded, batch_size=24, **fields)
        optimizer, random = (
            torch.optim.SGD(network.parameters(), 0.01, 0.9, weight_decay=5e-4),
            torch.Generator().manual_seed(2),
        )
        terms.append([])
        for number in range(8):
            count = 10 if number == 5 else 24
            shape = (len(batch.images_VB3SS), count, 3, 16, 16)
            images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random).to(DEVICE)
            labels = torch.randint(0, len(CLASS_COUNTS), (count,), generator=random).to(DEVICE)
            optimizer.zero_grad()
            with no_waiting() if number == 7 else nullcontext():
                terms[-1] += take_step(Batch(images, labels, slice(0, count)))[0].values()
                optimizer.step()
        states.append(torch.cat([value.double().flatten() for value in network.state_dict().values()]))
    exact = fields["precision"] == "fp32"
    assert terms[1] == pytest.approx(terms[0], rel=1e-4 if exact else 0.03)
    assert distance(states[1], states[0]) < (1e-5 if exact else 1e-2)


# ---- batches


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "size"), [("photos", 24), ("cifar", 32)])
def test_batches_of_loader_processes_arrive_as_one_process_makes_them(policy, size, pictures):
    """By way of pinned memory, two epochs of them at once, and those of evaluation."""
    images = find_parts(str(pictures)).parts["train"]
    settings = ViewSettings(policy, size=size, kinds=("cls", "sim", "rand"))
    made: list[list[Batch]] = []
    for device, workers in ((CPU, 0), (DEVICE, 2)):
        with closing(open_batches(images, settings, device, workers)) as batches:
            made.append([*batches.training(7, 8, range(2 * 3)), *batches.evaluation(8)])
    assert len(made[0]) == 2 * 3 + 3
    for ours, arrived in zip(*made, strict=True):
        assert arrived.images_VB3SS.device.type == arrived.labels_G.device.type == DEVICE.type
        assert torch.equal(arrived.images_VB3SS.cpu(), ours.images_VB3SS)
        assert torch.equal(arrived.labels_G.cpu(), ours.labels_G)
        assert arrived.rows == ours.rows


# ---- runs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three epochs of digits-lt, in the precision that suits the GPU."""
    recipe = load_recipe("digits-lt", epochs=3, warmup_epochs=0, log_every=1, device=DEVICE.type)
    return train(recipe, tmp_path_factory.mktemp("gpu") / "run", progress=False)


@pytest.mark.slow
def test_a_run_learns(run):
    assert record_of(run.path)["machine"]["device"] == torch.cuda.get_device_name(DEVICE)
    losses = [line["loss"] for line in log_lines(run.path)]
    assert sum(losses[12:]) < sum(losses[:6]), "the third epoch's against the first's"
    assert run.metrics["test"]["top1"] > 0.1, "chance"


@pytest.mark.slow
def test_a_run_of_a_gpu_is_used_and_scored_on_a_cpu(run, no_tf32):
    checkpoint = load_checkpoint(run.path / "last.pt")
    momentum = [state["momentum_buffer"] for state in checkpoint.optimizer["state"].values()]
    assert {tensor.device for tensor in [*checkpoint.weights.values(), *momentum]} == {CPU}
    test = find_parts(run.recipe.data.path).parts["test"]
    batches = open_batches(test, view_settings(run.recipe), CPU)
    images = next(iter(batches.evaluation(500))).images_VB3SS[0]
    with torch.inference_mode():
        on_cpu = equipoise.load(run.path, "cpu").model(images)
        on_gpu = equipoise.load(run.path, DEVICE.type).model(images.to(DEVICE))
        assert torch.equal(checkpoint.build()(images), on_cpu)
    assert on_gpu.device.type == DEVICE.type
    assert (on_gpu.cpu() - on_cpu).abs().max() < 1e-3  # of logits up to 30

    all_figures = (run.metrics, run.evaluate(), evaluate_run(run.path, device="cpu"))
    trained, anew, of_cpu = (figures["test"]["top1"] for figures in all_figures)
    assert anew == pytest.approx(of_cpu, abs=0.005)
    assert trained == pytest.approx(of_cpu, abs=0.02)  # convolutions may have been in TF32


def weights_of(run: Path) -> Tensor:
    weights = load_checkpoint(run / "last.pt").weights
    return torch.cat([value.flatten() for value in weights.values() if value.is_floating_point()])


def two_epochs(folder: Path, first: torch.device, then: torch.device) -> Path:
    """One epoch in float32 on each of the devices."""
    fields = {"warmup_epochs": 0, "lr": 0.01, "precision": "fp32", "log_every": 1}
    train(load_recipe("digits-lt", epochs=1, device=first.type, **fields), folder, progress=False)
    return train(load_recipe(folder, epochs=2, device=then.type), progress=False, resume=folder).path


@pytest.fixture(scope="module")
def cpu_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_epochs(tmp_path_factory.mktemp("cpu") / "run", CPU, CPU)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(DEVICE, CPU), (CPU, DEVICE)], ids=["to the CPU", "to the GPU"])
def test_a_run_goes_on_on_another_device(first, then, cpu_run, no_tf32, tmp_path):
    """And ends near where it ends on a CPU alone. Without its momentum it would be ten times as far away."""
    run = two_epochs(tmp_path / "run", first, then)
    assert record_of(run)["resumed"]["after_step"] == 6
    assert [line["step"] for line in log_lines(run)] == list(range(1, 13))
    assert distance(weights_of(run), weights_of(cpu_run)) < 1e-3


# A run of digits-lt into FOLDER. With STEPS, somebody presses Ctrl-C after so many, and it goes on.
RUN = """
import os, signal, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
from equipoise import load_recipe, train
from equipoise.base.errors import Stopped

folder, device, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
taken = []

def count(*_):
    taken.append(1)
    if len(taken) == steps:
        os.kill(os.getpid(), signal.SIGINT)

register_optimizer_step_post_hook(count)
recipe = load_recipe("digits-lt", epochs=3, warmup_epochs=0, log_every=1, device=device, deterministic=True)
try:
    train(recipe, folder, progress=False)
    print("whole")
except Stopped as stopped:
    print(stopped)
    train(load_recipe(folder), progress=False, resume=folder)
"""


@pytest.mark.slow
def test_deterministic_runs_end_with_the_same_bits_stopped_or_not(tmp_path):
    """In three new processes: what cuBLAS must be told, it must be told before it is first used."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("CUBLAS_WORKSPACE_CONFIG", None)
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-c", RUN, str(tmp_path / name), DEVICE.type, str(steps)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for name, steps in {"one": 0, "two": 0, "stopped": 8}.items()
    }  # fmt: skip
    said = {name: process.communicate() for name, process in processes.items()}
    for name, process in processes.items():
        assert process.returncode == 0, f"{name}: {said[name][1][-3000:]}"
    assert said["one"][0] == said["two"][0] == "whole\n"
    assert said["stopped"][0].startswith("interrupted: step ")
    assert 8 <= record_of(tmp_path / "stopped")["resumed"]["after_step"] < 12, "within the second epoch"
    for name in ("two", "stopped"):
        assert torch.equal(weights_of(tmp_path / name), weights_of(tmp_path / "one"))
        assert figures_of(tmp_path / name) == figures_of(tmp_path / "one")


# ---- last, since it takes longest


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch warns of what is not ours while it compiles
def test_a_compiled_encoder_trains_the_same_network(tmp_path, monkeypatch):
    """In three steps."""
    if not os.environ.get("CC") and not any(map(shutil.which, ("gcc", "clang"))):
        pytest.skip("torch.compile needs a C compiler for a GPU, and none is here")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    losses: list[list[float]] = []
    for compiled in (False, True):
        take_step, network, batch = make_step(DEVICE, precision="fp32", compile=compiled)
        optimizer = torch.optim.SGD(network.parameters(), 0.01, 0.9, weight_decay=5e-4)
        losses.append([])
        for _ in range(3):
            optimizer.zero_grad()
            losses[-1] += take_step(batch)[0].values()
            optimizer.step()
        assert bool([*tmp_path.rglob("*.py")]) == compiled, "something was compiled"
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
