"""A plan becomes a run folder. Here is the training loop, and the only `optimizer.step()`."""

import math
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from equipoise.checkpoint import Checkpoint, atomic_file, create_network, state_on_cpu
from equipoise.device import autocast, describe_machine
from equipoise.errors import UserError
from equipoise.evaluate import predict
from equipoise.lists import Parts
from equipoise.loader import Batches, open_batches, worker_count
from equipoise.log import ProgressLine, RunLog
from equipoise.losses import (
    balanced_contrastive_loss,
    log_prior,
    logit_adjusted_cross_entropy,
    supervised_contrastive_loss,
)
from equipoise.metrics import score
from equipoise.model import Outputs, TwoBranchNetwork
from equipoise.optim import create_sgd, learning_rate
from equipoise.plan import Plan, default_folder, prepare
from equipoise.recipe import Recipe, recipe_toml
from equipoise.run import (
    BEST,
    LAST,
    RECIPE,
    RECORD,
    Run,
    evaluate_run,
    record_bad_images,
    view_settings,
    write_json,
)

Terms = dict[str, Tensor]


class NonFiniteLossError(UserError):
    """A loss term became infinite or not a number; the optimizer has not moved since."""


def train(
    recipe: Recipe, out: str | Path | None = None, progress: bool = True, resume: str | Path | None = None
) -> Run:
    """Train `recipe` into the folder `out` (default: `runs/RECIPE-METHOD-TIME`) and score what came of it. `resume`:
    see `prepare`.

    Raises UserError for what the user must put right, and leaves no folder behind then; NonFiniteLossError if the loss
    became infinite or not a number.
    """
    return fit(prepare(recipe, out, resume), progress)


def fit(plan: Plan, progress: bool = True) -> Run:
    """Carry out `plan`. See `train`."""
    recipe, parts, device = plan.recipe, plan.parts, plan.device
    # All that can fail for a reason of the user's comes before the folder is made.
    views = view_settings(recipe)
    workers = worker_count(recipe.workers)
    skip = recipe.data.on_bad_image == "skip"
    batches = open_batches(parts.train, views, device, workers, skip)
    validation = open_batches(parts.validation, views, device, workers, skip) if parts.validation else None
    if parts.test is not None:
        open_batches(
            parts.test, views, device, workers, skip
        )  # small images are decoded by it: better now than at the end
    torch.manual_seed(recipe.seed)
    network = create_network(recipe, len(parts.train.class_names), start=True)
    network = network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] torch's stub lacks it

    created = not plan.folder.exists()
    while not (plan.resumed and plan.resumed.in_place) and not _claim(plan.folder):
        if plan.folder_named:
            raise UserError(f"another run is writing into {plan.folder}; name another folder with --out")
        plan = replace(plan, folder=default_folder(recipe))
    try:
        _write_record(plan)
        _loop(plan, network.to(device), batches, validation, progress)
    except NonFiniteLossError as error:
        # The folder stays: what was logged up to here shows how it came about.
        raise NonFiniteLossError(f"{error}. The log is in {plan.folder}") from None
    except (UserError, OSError, KeyboardInterrupt):
        if not (plan.folder / LAST).exists():
            _remove(plan.folder, created)
        raise
    try:
        evaluate_run(plan.folder, parts, str(device))
    except UserError as error:
        raise UserError(f"{error}. Training is done and kept; then: equipoise evaluate {plan.folder}") from None
    return Run(plan.folder)


def _loop(plan: Plan, network: TwoBranchNetwork, batches: Batches, validation: Batches | None, progress: bool) -> None:
    recipe = plan.recipe
    terms_of = loss_terms(recipe, plan.parts.train.class_counts, plan.device)
    optimizer = create_sgd(network.parameters(), recipe.optim.lr, recipe.optim.momentum, recipe.optim.weight_decay)
    fingerprints = {name: part.fingerprint() for name, part in plan.parts.named().items()}
    first_epoch, best = _restore(plan, network, optimizer)
    step = first_epoch * plan.steps_per_epoch
    log = RunLog(plan.folder, step)
    line = ProgressLine(step, recipe.epochs * plan.steps_per_epoch, recipe.epochs, progress)
    try:
        for epoch in range(first_epoch, recipe.epochs):
            network.train()
            rate = _set_learning_rate(optimizer, recipe, epoch)
            images_seen, since = 0, time.perf_counter()
            for batch in batches.training(recipe.seed, epoch, recipe.batch_size):
                # What a network may draw in its forward pass (dropout, stochastic depth) follows from the step.
                torch.manual_seed(_step_seed(recipe.seed, step))
                with autocast(plan.device, plan.precision):
                    outputs = network.training_outputs(batch.images_VB3SS.flatten(0, 1), views=len(batch.images_VB3SS))
                terms, loss = terms_of(outputs, batch.labels_B)
                read_terms = _start_reading(terms)
                optimizer.zero_grad()
                loss.backward()
                values = read_terms()
                _refuse_non_finite(values, step, epoch, rate)
                optimizer.step()
                step += 1
                images_seen += len(batch.labels_B)
                speed = images_seen / (time.perf_counter() - since)
                line.update(step, epoch, values, speed)
                if step % recipe.log_every == 0 or step % plan.steps_per_epoch == 0:
                    log.write("train", step, epoch, {**values, "lr": rate, "images_per_second": round(speed, 1)})
                    images_seen, since = 0, time.perf_counter()
            if validation is not None:
                score = _validate(network, validation, plan.parts, log, step, epoch)
                if best is None or score > best[0]:
                    best = (score, epoch + 1)
            checkpoint = Checkpoint(
                recipe=recipe,
                class_names=plan.parts.train.class_names,
                class_counts=plan.parts.train.class_counts,
                epoch=epoch + 1,
                step=step,
                best=best,
                weights=state_on_cpu(network),
                optimizer=optimizer.state_dict(),
                fingerprints=fingerprints,
            )
            # Before the checkpoint, so that a run that goes on from it does not lose any.
            record_bad_images(plan.folder, train=batches, validation=validation)
            # The best first: a last checkpoint never speaks of a best one that is not there.
            if best is not None and best[1] == epoch + 1:
                checkpoint.save(plan.folder / BEST)
            checkpoint.save(plan.folder / LAST)
    finally:
        line.close()
        log.close()


def _restore(
    plan: Plan, network: TwoBranchNetwork, optimizer: torch.optim.Optimizer
) -> tuple[int, tuple[float, int] | None]:
    """Put weights and momentum back where a run goes on; the epoch it goes on with, and its best score so far."""
    if plan.resumed is None:
        return 0, None
    checkpoint = plan.resumed.checkpoint
    network.load_state_dict(checkpoint.weights)
    # The groups are the recipe's: of theirs, all that changes is the learning rate, which is set in every epoch.
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": checkpoint.optimizer["state"], "param_groups": groups})
    # In another folder there is no file of an earlier best.
    return checkpoint.epoch, checkpoint.best if plan.resumed.in_place else None


def loss_terms(
    recipe: Recipe, class_counts: tuple[int, ...], device: torch.device
) -> Callable[[Outputs, Tensor], tuple[Terms, Tensor]]:
    """The objective of the recipe's method: outputs and labels to its named terms (`loss` is the total) and the total.

    bcl: alpha * logit-adjusted cross-entropy + beta * balanced contrastive loss. supcon+la: the same with the
    supervised contrastive loss. The others have one term, with weight 1.
    """
    loss, method = recipe.loss, recipe.method
    log_prior_C = log_prior(torch.tensor(class_counts)).to(device, torch.float32)

    def terms_of(outputs: Outputs, labels_B: Tensor) -> tuple[Terms, Tensor]:
        if method == "ce":
            total = F.cross_entropy(outputs.logits_BC.float(), labels_B)
            return {"loss": total.detach()}, total
        classification = logit_adjusted_cross_entropy(outputs.logits_BC, labels_B, log_prior_C, loss.tau)
        if method == "logit-adjusted":
            return {"loss": classification.detach()}, classification
        assert outputs.features_BVD is not None
        if method == "bcl":
            assert outputs.prototypes_CD is not None
            contrastive = balanced_contrastive_loss(
                outputs.features_BVD, labels_B, outputs.prototypes_CD, loss.temperature
            )
        else:
            contrastive = supervised_contrastive_loss(outputs.features_BVD, labels_B, loss.temperature)
        total = loss.alpha * classification + loss.beta * contrastive
        terms = {"loss": total, "classification": classification, "contrastive": contrastive}
        return {name: term.detach() for name, term in terms.items()}, total

    return terms_of


def _start_reading(terms: Terms) -> Callable[[], dict[str, float]]:
    """Send the terms to the host now, before the backward pass is queued; the function returned waits for them alone.

    So a GPU goes on with the backward pass while its loss is looked at.
    """
    values = torch.stack([*terms.values()])
    if values.device.type != "cuda":
        return lambda: dict(zip(terms, values.tolist(), strict=True))
    on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    on_host.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> dict[str, float]:
        arrived.synchronize()
        return dict(zip(terms, on_host.tolist(), strict=True))

    return read


def _refuse_non_finite(values: dict[str, float], step: int, epoch: int, rate: float) -> None:
    wrong = [name for name, value in values.items() if not math.isfinite(value)]
    if wrong:
        term = wrong[-1]  # the total is first; a part that is wrong says more
        raise NonFiniteLossError(
            f"step {step + 1} (epoch {epoch + 1}): the loss term '{term}' is {values[term]}; the weights were not "
            f"changed by it. Lower the learning rate (now {rate:g}) or warm up longer"
        )


def _set_learning_rate(optimizer: torch.optim.Optimizer, recipe: Recipe, epoch: int) -> float:
    optim = recipe.optim
    rate = learning_rate(
        epoch,
        lr=optim.lr,
        epochs=recipe.epochs,
        warmup_epochs=optim.warmup_epochs,
        schedule=optim.schedule,
        milestones=optim.milestones,
    )
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def _step_seed(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step) % 2**63


def _validate(
    network: TwoBranchNetwork, validation: Batches, parts: Parts, log: RunLog, step: int, epoch: int
) -> float:
    """The mean per-class accuracy on the validation part. It chooses the best checkpoint, since a part cut from
    long-tailed training images is long-tailed itself: its top-1 would choose for the frequent classes."""
    scored = score(predict(network, validation), parts.train.class_counts, len(parts.train.class_names))
    values = {
        "top1": scored.top1,
        "mean_per_class": scored.mean_per_class,
        "many": scored.many,
        "medium": scored.medium,
        "few": scored.few,
    }
    log.write("validation", step, epoch, values)
    return scored.mean_per_class


def _claim(folder: Path) -> bool:
    """Make the folder, or take an empty one; of two runs that want it, one gets it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"the run folder {folder} cannot be made ({reason}); name another with --out") from None
    return True


def _remove(folder: Path, created: bool) -> None:
    """Take back a folder, or what was put into one that was there, empty."""
    for _ in range(20):
        for entry in [folder] if created else list(folder.iterdir()):
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
        if not folder.exists() or (not created and not any(folder.iterdir())):
            return
        time.sleep(0.1)  # TensorBoard's thread may be writing its file still


def _write_record(plan: Plan) -> None:
    with atomic_file(plan.folder / RECIPE) as file:
        file.write(recipe_toml(plan.recipe).encode())
    parts = plan.parts
    record: dict[str, Any] = {
        "command": shlex.join(sys.argv),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("equipoise", "torch", "torchvision", "timm", "numpy")},
        },
        "machine": describe_machine(plan.device),
        "precision": plan.precision,
        "git": _git_state(),
        "data": {
            "kind": parts.kind,
            "fingerprints": {name: part.fingerprint() for name, part in parts.named().items()},
            "images": {name: len(part) for name, part in parts.named().items()},
        },
        "class_counts": dict(zip(parts.train.class_names, parts.train.class_counts, strict=True)),
    }
    if plan.resumed is not None:
        record["resumed"] = {"from": str(plan.resumed.path), "after_epoch": plan.resumed.checkpoint.epoch}
    write_json(plan.folder / RECORD, record)


def _git_state() -> dict[str, Any] | None:
    """Commit of the working directory and whether it has changes; None outside a repository or without git."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
