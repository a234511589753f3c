"""Epochs of steps, each looked at before the weights move, saved and validated. Here is the only `optimizer.step()`."""

import contextlib
import copy
import math
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from types import FrameType

import torch
from torch import nn

from equipoise.base.errors import SharedError, Stopped
from equipoise.base.progress import ProgressLine
from equipoise.config.recipe import Optim, Recipe
from equipoise.evaluation.metrics import score
from equipoise.evaluation.predictions import predict
from equipoise.evaluation.score import record_bad_images
from equipoise.method.network import TwoBranchNetwork, batch_norms
from equipoise.method.tuning import parameter_groups
from equipoise.runs.checkpoint import Checkpoint, state_on_cpu
from equipoise.runs.folder import BEST, RunLog, Track
from equipoise.training.plan import Plan
from equipoise.training.step import Step
from equipoise.views.loader import Batch, Batches


class NonFiniteLossError(SharedError):
    """A loss term became infinite or not a number; the optimizer has not moved since."""


_HANGUP, _SAVE = (getattr(signal, name, -1) for name in ("SIGHUP", "SIGUSR1"))  # which Windows lacks
_STOPPING = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", _HANGUP: "terminated"}


class Requests(contextlib.ExitStack):
    """A context in which SIGUSR1 asks to save and go on, SIGINT, SIGTERM and SIGHUP (the terminal is gone) to save and
    stop, and a second SIGINT or SIGTERM stops at once. Outside the main thread nothing is handled."""

    def __init__(self) -> None:
        super().__init__()
        self._save = False
        self.stop = ""  # how, once it was asked for
        self._at_once: tuple[str, str] | None = None

    def __enter__(self) -> "Requests":
        for number in (_SAVE, *_STOPPING) if threading.current_thread() is threading.main_thread() else ():
            # Under nohup, SIGHUP is to be ignored.
            if number > 0 and not (number == _HANGUP and signal.getsignal(number) == signal.SIG_IGN):
                self.callback(signal.signal, number, signal.signal(number, self._handle))
        return self

    def votes(self, save: bool = False) -> list[int]:
        """Whether to save, as `save` or a signal since the last time says, to be interrupted, to be terminated: 0 or 1
        each. Ranks add up their votes."""
        save, self._save = save or self._save, False
        return [int(save), int(self.stop == "interrupted"), int(self.stop == "terminated")]

    def leave_if_stopped(self, state: str, resume_command: str) -> None:
        """Raise Stopped if this process was asked to stop. All is saved already."""
        if self.stop:
            raise Stopped(self.stop, state, resume_command)

    def stop_at_once(self, state: str, resume_command: str) -> None:
        """From now on there is nothing to save: a signal ends the run at once, in this state."""
        self._at_once = state, resume_command
        self.leave_if_stopped(state, resume_command)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number == _SAVE:
            self._save = True
            return
        if number == _HANGUP:
            _leave_terminal()
        if not self.stop:
            self.stop = _STOPPING[number]
            if self._at_once is not None:
                raise Stopped(self.stop, *self._at_once)
            if os.environ.get("RANK", "0") == "0":
                print("\nfinishing this step, then saving; once more to stop at once", file=sys.stderr, flush=True)
        # SIGHUP comes twice, from the terminal and from the shell in it. Slurm sends SIGTERM to every process, and
        # torchrun sends it on to the same ones: that is the same request.
        elif number == signal.SIGINT or (number == signal.SIGTERM and "TORCHELASTIC_RUN_ID" not in os.environ):
            raise KeyboardInterrupt


def _leave_terminal() -> None:
    """Write to nowhere what was written to a terminal: one that is gone refuses it."""
    for stream in (1, 2):
        with contextlib.suppress(OSError):  # closed
            if stat.S_ISCHR(os.fstat(stream).st_mode):  # isatty denies a terminal that is gone
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


class Trainer:
    """A network in training, with all that changes from step to step.

    `epoch` and `step` are the numbers of whole epochs and steps done; `best` is the highest score on the validation
    part so far and the epoch that it was reached in (from 1). A checkpoint holds these and what the optimizer holds.
    """

    def __init__(
        self, plan: Plan, network: TwoBranchNetwork, batches: Batches, validation: Batches | None, requests: Requests
    ) -> None:
        """Of a run that goes on, the network has its weights already."""
        recipe, optim = plan.recipe, plan.recipe.optim
        self.requests = requests
        self._plan, self._network, self._batches, self._validation = plan, network, batches, validation
        self._gradients = Step(recipe, network, plan.parts.train.class_counts, plan.device, plan.precision, plan.world)
        own = [parameter for parameter in self._gradients.objective.parameters() if parameter.requires_grad]
        groups = parameter_groups(network, network.encoder, optim.layer_decay)
        groups = [*groups, {"params": own, "lr_scale": 1.0, "weight_decay": 0.0}]
        # As the authors run it: weight decay on every parameter of the network, biases and BatchNorm too.
        self._optimizer = torch.optim.SGD(groups, optim.lr, optim.momentum, weight_decay=optim.weight_decay)
        self._saved_at, self._saving_took, self._saved_step = time.monotonic(), 0.0, -1
        self._averaged: TwoBranchNetwork | None = None
        self.epoch, self.step, self.best = 0, 0, None
        if plan.start is None:
            return
        done = plan.start.checkpoint
        # Under another recipe only whole epochs count; and in another folder there is no file of an earlier best.
        self.epoch, self.step = done.epoch, done.epoch * plan.steps_per_epoch
        if plan.place.resumes:
            self.step, self.best = done.step, done.best
            groups = self._optimizer.state_dict()["param_groups"]  # the rates in them are set in every epoch
            self._optimizer.load_state_dict({"state": done.optimizer["state"], "param_groups": groups})
            self._gradients.objective.load_state_dict(done.objective)

    def train(self, progress: bool, track: Track) -> None:
        """All steps that are left; `track`: see `RunLog`. Raises Stopped, NonFiniteLossError, and OSError where there
        is no room to write."""
        recipe, plan = self._plan.recipe, self._plan
        if recipe.optim.ema:
            self._averaged = copy.deepcopy(self._network)
            if plan.start is not None and plan.place.resumes:
                self._averaged.load_state_dict(plan.start.checkpoint.weights)
        with (
            closing(self._batches),
            closing(self._validation or self._batches),
            closing(ProgressLine(self.step, plan.steps, "step", progress)) as line,
            closing(RunLog(plan.folder if plan.world.is_first else None, self.epoch, self.step, track)) as log,
        ):
            # One stream over all epochs: its workers make the next epoch's first batches while this one is validated.
            how = range(self.step, plan.steps), recipe.data.sampler, recipe.epochs
            stream = self._batches.training(recipe.seed, recipe.batch_size, *how)
            while self.epoch < recipe.epochs:
                self._train_epoch(stream, log, line)
                self._end_epoch(log)

    def finish(self) -> None:
        """Save the network as it is, as after the last step."""
        self.epoch, self.step = self._plan.recipe.epochs, self._plan.steps
        self._save(RunLog(None, self.epoch, self.step))

    def _train_epoch(self, stream: Iterator[Batch], log: RunLog, line: ProgressLine) -> None:
        recipe, plan = self._plan.recipe, self._plan
        set_training(self._network, recipe)
        rate = learning_rate(self.epoch, recipe.epochs, recipe.optim)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        self._gradients.expect_draws(self.epoch / recipe.epochs)
        if self.step == self.epoch * plan.steps_per_epoch:
            self._gradients.objective.begin_epoch(self.epoch, recipe.epochs)
            plan.world.first_buffers(self._gradients.objective)  # on GPUs, sums differ in their last bits
        images, since = 0, time.perf_counter()
        while self.step < (self.epoch + 1) * plan.steps_per_epoch:
            # What a network may draw in its forward pass (dropout, stochastic depth) follows from step and rank.
            seed_network((recipe.seed * 1_000_003 + self.step + plan.world.rank * 7_368_787) % 2**63, plan.device)
            self._gradients.objective.seed = recipe.seed * 1_000_003 + self.step
            batch = next(stream)
            is_save_due = plan.world.is_first and time.monotonic() - self._saved_at > 60 * recipe.checkpoint_minutes
            terms, votes = self.take_step(batch, self.requests.votes(is_save_due))
            images += len(batch.labels_G)
            speed = images / (time.perf_counter() - since)
            said = "  ".join(f"{name} {value:.3f}" for name, value in terms.items())
            line.update(self.step, f"epoch {self.epoch + 1}/{recipe.epochs}  {speed:,.0f} images/s  {said}")
            if self.step % recipe.log_every == 0 or self.step % plan.steps_per_epoch == 0:
                further = {"lr": rate, "images_per_second": round(speed, 1)}
                log.write("train", self.step, self.epoch, {**terms, **further})
                images, since = 0, time.perf_counter()
            _, interrupted, terminated = votes
            if any(votes):
                self._save(log)
            if interrupted or terminated:
                # Wait for rank 0, which saves: torchrun ends it if another rank leaves meanwhile.
                plan.world.gather_objects(None)
                how = "terminated" if terminated else "interrupted"
                raise Stopped(how, f"step {self.step} is done and saved", plan.resume_command())

    def take_step(self, batch: Batch, votes: Sequence[int] = ()) -> tuple[dict[str, float], list[float]]:
        """Gradients, a look at the loss, and the weights move. The loss terms and the sum over ranks of the votes."""
        self._optimizer.zero_grad()
        terms, of_ranks = self._gradients(batch, votes)
        if wrong := [name for name, value in terms.items() if not math.isfinite(value)]:
            term, rate = wrong[-1], self._optimizer.param_groups[0]["lr"]  # first is the total: a part says more
            raise NonFiniteLossError(
                f"step {self.step + 1} (epoch {self.epoch + 1}): the loss term '{term}' is {terms[term]}; the weights "
                f"were not changed by it. Lower the learning rate (now {rate:g}) or warm up longer; the log is in "
                f"{self._plan.folder}"
            )
        self._optimizer.step()
        self.step += 1
        if self._averaged is not None:
            average_in(self._averaged, self._network, self._plan.recipe.optim.ema, self.step)
        return terms, of_ranks

    def _end_epoch(self, log: RunLog) -> None:
        """Validate, and save. Epochs may be so short that saving takes much of the time: then it is left out, but for
        the best and the last one. A signal is answered after the next step."""
        world = self._plan.world
        for network in filter(None, (self._network, self._averaged)):
            world.first_buffers(network)
        # Ranks must agree, and their clocks do not.
        is_cheap = world.size > 1 or time.monotonic() - self._saved_at > 20 * self._saving_took
        is_best = False
        if self._validation is not None:
            if is_cheap:
                self._save(log)  # before: validation may take long
            mean_per_class = self._validate(self._validation, log)
            is_best = self.best is None or mean_per_class >= self.best[0]  # of equal ones the last has learnt most
            if is_best:
                self.best = (mean_per_class, self.epoch + 1)
        self.epoch += 1
        if is_cheap or is_best or self.epoch == self._plan.recipe.epochs:
            self._save(log)

    def _validate(self, validation: Batches, log: RunLog) -> float:
        """The mean per-class accuracy on the validation part, which may be as long-tailed as the training images: its
        top-1 would choose for the frequent classes. All ranks stop after the batch in which one is asked to."""

        def look(*_: torch.Tensor) -> None:
            if self.requests.stop and self._saved_step != self.step:
                self._save(log)
            self.requests.leave_if_stopped(f"step {self.step} is done and saved", self._plan.resume_command())

        train = self._plan.parts.train
        predictions = predict(self._averaged or self._network, validation, looks=[look], world=self._plan.world)
        scored = score(predictions, train.class_counts, len(train.class_names))
        names = ("top1", "mean_per_class", "many", "medium", "few")
        log.write("validation", self.step, self.epoch, {name: scored[name] for name in names})
        return scored["mean_per_class"]

    def _save(self, log: RunLog) -> None:
        """Write a checkpoint, and the best one where this is it. All ranks call it, rank 0 writes: the weights are the
        same on all. First the bad images, so that a run that goes on does not lose any."""
        plan = self._plan
        record_bad_images(plan.folder, plan.world, train=self._batches, validation=self._validation)
        if not plan.world.is_first:
            return
        begun = time.monotonic()
        checkpoint = Checkpoint(
            recipe=plan.recipe,
            class_names=plan.parts.train.class_names,
            class_counts=plan.parts.train.class_counts,
            epoch=self.epoch,
            step=self.step,
            best=self.best,
            weights=state_on_cpu(self._averaged or self._network),
            optimizer=self._optimizer.state_dict(),
            fingerprints=plan.fingerprints,
            objective=state_on_cpu(self._gradients.objective),
            raw=state_on_cpu(self._network) if self._averaged is not None else {},
        )
        log.sync()  # a run that goes on from here does not write its lines again
        # The best first: a last checkpoint never speaks of a best one that is not there.
        whole = self.step == self.epoch * plan.steps_per_epoch
        if whole and self.best is not None and self.best[1] == self.epoch:
            checkpoint.save(plan.folder / BEST)
        checkpoint.save_last(plan.folder)
        self._saved_at, self._saving_took, self._saved_step = time.monotonic(), time.monotonic() - begun, self.step


def learning_rate(epoch: int, epochs: int, optim: Optim) -> float:
    """The learning rate of `epoch` (from 0) of `epochs`, constant within it, as in the authors' code.

    Linear warm-up reaches `optim.lr` in epoch `warmup_epochs - 1`. Then 'cosine' ends one step above 0, and 'step'
    multiplies by 0.1 at each milestone passed; a milestone below 1 is a share of `epochs`.
    """
    warmup = optim.warmup_epochs
    if epoch < warmup:
        return optim.lr * (epoch + 1) / warmup
    if optim.schedule == "cosine":
        # The denominator is of the epochs that follow the warm-up, plus one, so that no epoch trains at 0.
        progress = (epoch - warmup + 1) / (epochs - warmup + 1)
        return optim.lr * 0.5 * (1 + math.cos(math.pi * progress))
    starts = [round(milestone * epochs) if milestone < 1 else int(milestone) for milestone in optim.milestones]
    return optim.lr * 0.1 ** sum(epoch >= start for start in starts)


@torch.no_grad()
def average_in(averaged: nn.Module, network: nn.Module, decay: float, step: int) -> None:
    """Move the average towards the network as it is after so many steps, by 1 - `decay` of the way; BatchNorm's
    averages too. In the first steps by more, 1 - (1 + step) / (10 + step), as TensorFlow's
    `ExponentialMovingAverage` does with `num_updates`: the random start would stay in it for long."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    pairs = [pair for pair in zip(averaged.parameters(), network.parameters(), strict=True) if pair[1].requires_grad]
    buffers = zip(averaged.buffers(), network.buffers(), strict=True)
    pairs += [pair for pair in buffers if pair[0].is_floating_point()]  # no counters, which nothing reads
    torch._foreach_lerp_([own for own, _ in pairs], [value for _, value in pairs], weight)  # pyright: ignore[reportPrivateUsage] one launch for all


def set_training(network: TwoBranchNetwork, recipe: Recipe) -> None:
    """Training mode, but for a BatchNorm that the recipe freezes, and for parts of which nothing is trained."""
    network.train()
    for norm in batch_norms(network) if recipe.model.batch_norm == "frozen" else ():
        norm.eval()
    _rest(network.encoder)


def _rest(module: nn.Module) -> None:
    """Evaluation mode for what has parameters of which none is trained."""
    parameters = list(module.parameters())
    if any(parameter.requires_grad for parameter in parameters):
        for child in module.children():
            _rest(child)
    elif parameters:
        module.eval()


def seed_network(seed: int, device: torch.device) -> None:
    """What `torch.manual_seed` does for this device: that also walks the stack, which may take a millisecond."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)  # of all: `cuda:1` need not be the current one
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
