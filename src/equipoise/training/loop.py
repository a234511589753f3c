"""A plan becomes a run folder. Here is the training loop, and the only `optimizer.step()`."""

import errno
import math
import shlex
import time
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from pathlib import Path

import torch

from equipoise.base.device import deterministic, keep_freed_memory
from equipoise.base.errors import SharedError, Stopped, UserError, in_words, out_of_memory, own_command, reason, several
from equipoise.base.progress import ProgressLine
from equipoise.base.world import join, lost_rank
from equipoise.config.recipe import Recipe
from equipoise.evaluation.metrics import score
from equipoise.evaluation.predictions import predict
from equipoise.evaluation.run import Run
from equipoise.evaluation.score import evaluate_run, record_bad_images
from equipoise.method.batchnorm import batch_norms
from equipoise.method.network import TwoBranchNetwork
from equipoise.runs.checkpoint import Checkpoint, create_network, load_checkpoint, state_on_cpu
from equipoise.runs.folder import BEST, LAST
from equipoise.runs.log import RunLog
from equipoise.training.folder import RunFolder
from equipoise.training.optim import create_sgd, learning_rate
from equipoise.training.plan import Plan, Resumed, prepare
from equipoise.training.signals import Requests
from equipoise.training.step import Step
from equipoise.views.loader import Batches, open_batches, worker_count
from equipoise.views.views import view_settings

Best = tuple[float, int] | None  # the highest score on the validation part, and the epoch it was reached in


class NonFiniteLossError(SharedError):
    """A loss term became infinite or not a number; the optimizer has not moved since."""


def train(
    recipe: Recipe, out: str | Path | None = None, progress: bool = True, resume: str | Path | None = None
) -> Run:
    """Train `recipe` into the folder `out` (default: `runs/RECIPE-METHOD-TIME`) and score what came of it. `resume`:
    see `prepare`. In processes that torchrun has started, all call it, and train together.

    Raises UserError for what the user must put right, and leaves no folder behind then; NonFiniteLossError if the loss
    became infinite or not a number; Stopped after SIGINT or SIGTERM, when the run is saved.
    """
    with join() as world:
        return fit(prepare(recipe, out, resume, world), progress)


def fit(plan: Plan, progress: bool = True, begins: Callable[[Plan], None] = lambda _: None) -> Run:
    """Carry out `plan`. See `train`. `begins` is called with the plan, in the folder that was got, once all that can be
    refused has been: weights that do not fit or cannot be had, images, a folder that cannot be made."""
    world = plan.world
    if plan.place.done:
        begins(plan)
        return Run(plan.folder)
    if plan.device.type == "cpu":
        keep_freed_memory()
    # All that can fail for a reason of the user's comes before the folder is made.
    network, batches, validation = world.each_makes(lambda: _open(plan))
    with deterministic(plan.recipe.deterministic), Requests() as requests, RunFolder(plan) as folder:
        try:
            plan = plan.at(world.first_makes(folder.take))
            begins(plan)
            try:
                _loop(plan, network.to(plan.device), batches, validation, requests, progress and world.is_first)
            finally:
                for opened in (batches, validation):
                    if opened is not None:
                        opened.close()
            _score(plan, requests)
        except NonFiniteLossError as error:
            folder.keep()
            raise NonFiniteLossError(f"{error}. The log is in {plan.folder}{_way_on(plan)}") from None
        except OSError as error:  # the disk is full
            # A broken pipe writes nothing (nobody reads the plan), nor does a process that cannot be started.
            if not world.is_first or isinstance(error, BrokenPipeError) or error.errno == errno.ENOMEM:
                raise
            raise _no_room(plan, f"{plan.folder} could not be written ({in_words(error)})") from None
        except (RuntimeError, MemoryError) as error:
            if out_of_memory(error):
                raise UserError(f"{in_words(error)}{_once_there_is_more(plan)}") from None
            if "deterministic" in str(error):
                raise UserError(
                    f"a {plan.recipe.model.encoder} cannot be trained deterministically on a GPU "
                    f"({reason(error, library=True, otherwise='torch does not say why')}); leave out --deterministic"
                ) from None
            raise lost_rank(error) or error from None
    return Run(plan.folder)


def _score(plan: Plan, requests: Requests) -> None:
    """Training is done: the figures. A signal ends the run at once now, since there is nothing more to save."""
    done = "training is done and saved, its figures are not"
    _leave_if_stopped(plan, requests, done)
    requests.stop_at_once(done, _resume_command(plan))
    try:
        evaluate_run(plan.folder, plan.parts, str(plan.device), plan.world)
    except (UserError, RuntimeError, MemoryError) as error:
        if not isinstance(error, UserError) and not out_of_memory(error):
            raise
        raise UserError(
            f"{in_words(error)}. Training is done and kept; then: {own_command()} evaluate "
            f"{shlex.quote(str(plan.folder))}"
        ) from None


def _open(plan: Plan) -> tuple[TwoBranchNetwork, Batches, Batches | None]:
    """The network as it starts, and what reads the training and validation images."""
    recipe, parts, world = plan.recipe, plan.parts, plan.world
    views, workers = view_settings(recipe), worker_count(recipe.workers, world.local_size)
    skip = recipe.data.on_bad_image == "skip"
    batches = open_batches(parts.train, views, plan.device, workers, world, skip)
    validation = open_batches(parts.validation, views, plan.device, workers, world, skip) if parts.validation else None
    if parts.test is not None:
        # Small images are decoded by it: better now than at the end.
        open_batches(parts.test, views, plan.device, skip=skip)
    classes = len(parts.train.class_names)
    if plan.resumed is not None and not plan.resumed.checkpoint.fits(recipe, classes):
        raise UserError(
            f"the weights of {plan.resumed.path} do not fit method {recipe.method} with a {recipe.model.encoder}; "
            f"it was trained with {plan.resumed.checkpoint.recipe.method}"
        )
    torch.manual_seed(recipe.seed)
    # MKL takes fewer threads where the machine is busy, unless their number was set: and sums in another order.
    torch.set_num_threads(torch.get_num_threads())
    # What a run that goes on once started from may be gone, or out of reach.
    network = create_network(recipe, classes, start=plan.resumed is None)
    if plan.resumed is not None:
        network.load_state_dict(plan.resumed.checkpoint.weights)
        _refuse_momentum(plan.resumed, network)
    network = network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] torch's stub lacks it
    if recipe.model.batch_norm == "synchronised" and world.size > 1:
        network.synchronise_batch_norm(plan.device)
    return network, batches, validation


def _refuse_momentum(resumed: Resumed, network: TwoBranchNetwork) -> None:
    """Raise UserError where the optimizer's state is not of this network's parameters."""
    shapes = dict(enumerate(parameter.shape for parameter in network.parameters()))
    for index, of in resumed.checkpoint.optimizer["state"].items():
        if shapes.get(index) != of["momentum_buffer"].shape:
            raise UserError(
                f"{resumed.path} is damaged or was changed: its momentum does not fit its weights; use another one of "
                "the run"
            )


def _loop(
    plan: Plan,
    network: TwoBranchNetwork,
    batches: Batches,
    validation: Batches | None,
    requests: Requests,
    progress: bool,
) -> None:
    recipe, world = plan.recipe, plan.world
    take_step = Step(recipe, network, plan.parts.train.class_counts, plan.device, plan.precision, world)
    optimizer = create_sgd(network.parameters(), recipe.optim.lr, recipe.optim.momentum, recipe.optim.weight_decay)
    first_epoch, step, best = _restore(plan, optimizer)
    line = ProgressLine(step, recipe.epochs * plan.steps_per_epoch, recipe.epochs, progress)
    with closing(line), RunLog(plan.folder if world.is_first else None, first_epoch, step) as log:
        save = _Keeper(plan, network, optimizer, log)

        def keep(epoch: int) -> None:
            """Save; first the bad images, so that a run that goes on does not lose any. All ranks do it together."""
            record_bad_images(plan.folder, world, train=batches, validation=validation)
            save(epoch, step, best)

        # One stream over all epochs: its workers make the next epoch's first batches while this one is validated.
        steps = range(step, recipe.epochs * plan.steps_per_epoch)
        stream = batches.training(recipe.seed, recipe.batch_size, steps)
        for epoch in range(first_epoch, recipe.epochs):
            set_training(network, recipe)
            rate = _set_learning_rate(optimizer, recipe, epoch)
            images_seen, since = 0, time.perf_counter()
            while step < (epoch + 1) * plan.steps_per_epoch:
                # What a network may draw in its forward pass (dropout, stochastic depth) follows from step and rank.
                torch.manual_seed(_step_seed(recipe.seed, step, world.rank))
                with _memory_of_a_step(plan):
                    batch = next(stream)
                    optimizer.zero_grad()
                    values, votes = take_step(batch, requests.votes(save=save.due()))
                    _refuse_non_finite(values, step, epoch, rate)
                    optimizer.step()
                step += 1
                images_seen += len(batch.labels_G)
                speed = images_seen / (time.perf_counter() - since)
                line.update(step, epoch, values, speed)
                if step % recipe.log_every == 0 or step % plan.steps_per_epoch == 0:
                    log.write("train", step, epoch, {**values, "lr": rate, "images_per_second": round(speed, 1)})
                    images_seen, since = 0, time.perf_counter()
                wanted, stopped = requests.read(votes)
                if wanted:
                    keep(epoch)
                if stopped is not None:
                    world.wait()  # for rank 0, which saves: who leaves meanwhile would be taken for lost
                    raise Stopped(stopped, f"step {step} is done and saved", _resume_command(plan))
            world.first_buffers(network)
            state = f"step {step} is done and saved"
            if validation is not None:
                keep(epoch)  # it may take long
                score = _validate(network, validation, plan, log, step, epoch, requests, state)
                if best is None or score > best[0]:
                    best = (score, epoch + 1)
            is_best = best is not None and best[1] == epoch + 1
            if is_best or epoch + 1 == recipe.epochs or world.size > 1 or save.is_cheap():
                keep(epoch + 1)
                _leave_if_stopped(plan, requests, state)


def _restore(plan: Plan, optimizer: torch.optim.Optimizer) -> tuple[int, int, Best]:
    """Put the momentum back where a run goes on; the epoch and step that it goes on with, and its best."""
    if plan.resumed is None:
        return 0, 0, None
    checkpoint = plan.resumed.checkpoint
    # The groups are the recipe's: of theirs, all that changes is the learning rate, which is set in every epoch.
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": checkpoint.optimizer["state"], "param_groups": groups})
    if not plan.resumed.in_place:
        # Under another recipe only whole epochs count; and in another folder there is no file of an earlier best.
        return checkpoint.epoch, checkpoint.epoch * plan.steps_per_epoch, None
    return checkpoint.epoch, checkpoint.step, checkpoint.best


class _Keeper:
    """Writes checkpoints: those of rank 0, since the weights are the same on all."""

    def __init__(self, plan: Plan, network: TwoBranchNetwork, optimizer: torch.optim.Optimizer, log: RunLog) -> None:
        self._plan, self._network, self._optimizer, self._log = plan, network, optimizer, log
        self._fingerprints = {name: part.fingerprint() for name, part in plan.parts.named().items()}
        of_before = plan.resumed.checkpoint.step if plan.resumed and plan.place.taken else 0
        self._last, self._kept, self._took = time.monotonic(), of_before, 0.0

    def due(self) -> bool:
        """Whether the last one is so long ago that it is time for another."""
        return self._plan.world.is_first and time.monotonic() - self._last > 60 * self._plan.recipe.checkpoint_minutes

    def is_cheap(self) -> bool:
        """Whether saving takes a small part of the time in which it is done: epochs may be shorter than a second."""
        return time.monotonic() - self._last > 20 * self._took

    def __call__(self, epoch: int, step: int, best: Best) -> None:
        """Keep the state after `epoch` whole epochs and `step` steps. Raises UserError where that cannot be written."""
        plan, begun = self._plan, time.monotonic()
        if not plan.world.is_first:
            return
        checkpoint = Checkpoint(
            recipe=plan.recipe,
            class_names=plan.parts.train.class_names,
            class_counts=plan.parts.train.class_counts,
            epoch=epoch,
            step=step,
            best=best,
            weights=state_on_cpu(self._network),
            optimizer=self._optimizer.state_dict(),
            fingerprints=self._fingerprints,
        )
        try:
            self._log.sync()  # a run that goes on from here does not write its lines again
            # The best first: a last checkpoint never speaks of a best one that is not there.
            if best is not None and best[1] == epoch and step == epoch * plan.steps_per_epoch:
                checkpoint.save(plan.folder / BEST)
            checkpoint.save_last(plan.folder)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            kept = f"that of step {self._kept} is whole" if self._kept else "there is none before it"
            what = f"the checkpoint of step {step} could not be written into {plan.folder} ({reason}); {kept}"
            raise _no_room(plan, what, bool(self._kept)) from None
        self._last, self._kept, self._took = time.monotonic(), step, time.monotonic() - begun


def set_training(network: TwoBranchNetwork, recipe: Recipe) -> None:
    """Training mode, but for a BatchNorm that the recipe freezes."""
    network.train()
    if recipe.model.batch_norm == "frozen":
        for module in batch_norms(network):
            module.eval()


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


def _refuse_non_finite(values: dict[str, float], step: int, epoch: int, rate: float) -> None:
    wrong = [name for name, value in values.items() if not math.isfinite(value)]
    if wrong:
        term = wrong[-1]  # the total is first; a part that is wrong says more
        raise NonFiniteLossError(
            f"step {step + 1} (epoch {epoch + 1}): the loss term '{term}' is {values[term]}; the weights were not "
            f"changed by it. Lower the learning rate (now {rate:g}) or warm up longer"
        )


def _step_seed(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step + rank * 7_368_787) % 2**63


def _validate(
    network: TwoBranchNetwork,
    validation: Batches,
    plan: Plan,
    log: RunLog,
    step: int,
    epoch: int,
    requests: Requests,
    state: str,
) -> float:
    """The mean per-class accuracy on the validation part. It chooses the best checkpoint, since a part cut from
    long-tailed training images is long-tailed itself: its top-1 would choose for the frequent classes.

    All is saved, in the `state` that is said: who is asked to stop does so after the batch, and all ranks with it.
    """

    def look(*_: torch.Tensor) -> None:
        requests.leave_if_stopped(state, _resume_command(plan))

    train = plan.parts.train
    predictions = predict(network, validation, observe=look, world=plan.world)
    scored = score(predictions, train.class_counts, len(train.class_names))
    values = {name: scored[name] for name in ("top1", "mean_per_class", "many", "medium", "few")}
    log.write("validation", step, epoch, values)
    return scored["mean_per_class"]


def _leave_if_stopped(plan: Plan, requests: Requests, state: str) -> None:
    """Raise Stopped on all ranks where one of them was asked to stop. All is saved, in the `state` that is said."""
    votes = torch.tensor(requests.votes(), dtype=torch.float64)
    _, stopped = requests.read(plan.world.sum(votes).tolist())
    if stopped is not None:
        raise Stopped(stopped, state, _resume_command(plan))


def _no_room(plan: Plan, what: str, kept: bool = False) -> UserError:
    """The error of a disk on which something could not be written. `kept`: there is a checkpoint, if it can be seen."""
    goes_on = kept or plan.place.taken or (plan.folder / LAST).exists()
    way = f", then: {_resume_command(plan)}" if goes_on else " and start again: the folder was taken back"
    return UserError(f"{what}. Make room there{way}")


@contextmanager
def _memory_of_a_step(plan: Plan) -> Generator[None]:
    """Where the memory cannot hold a step, the error says what makes it smaller."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise _too_large(plan) from None


def _too_large(plan: Plan) -> UserError:
    recipe, size = plan.recipe, plan.world.size
    share = recipe.batch_size // size
    images = min(recipe.micro_batch or share, share)
    views = len(view_settings(recipe).kinds)
    way = _once_there_is_more(plan)  # such a run goes on under its own recipe
    if not way:
        way = "; set a smaller --batch-size, --size or --arch"
        synchronised = size > 1 and recipe.model.batch_norm == "synchronised"
        if images > 4 and not synchronised:  # of three, no part has a single one, whatever the batch
            half = -(-images // 2)
            batch_norm = "" if recipe.model.batch_norm == "frozen" else " (BatchNorm is then over a part)"
            way = f": --micro-batch {half} computes the same batch in parts{batch_norm}; or{way[1:]}"
    whose = "this machine" if plan.device.type == "cpu" else str(plan.device)
    return UserError(
        f"the memory of {whose} is too small for {images} images in {several(views, 'view')} of {recipe.views.size} "
        f"pixels at a time through a {recipe.model.encoder}{way}"
    )


def _once_there_is_more(plan: Plan) -> str:
    if not (plan.folder / LAST).exists():
        return ""
    return f"; the last checkpoint is whole, and once there is more memory: {_resume_command(plan)}"


def _way_on(plan: Plan) -> str:
    """After a loss that is not finite: a command, where there is a checkpoint of a whole epoch to go on from."""
    if not plan.world.is_first or not (plan.folder / LAST).exists() or not load_checkpoint(plan.folder / LAST).epoch:
        return ""
    words = f"--resume {shlex.quote(str(plan.folder))} --out ANOTHER_FOLDER --lr {plan.recipe.optim.lr / 10:g}"
    return f"; its last checkpoint is whole. To go on from there with another rate: equipoise train {words}"


def _resume_command(plan: Plan) -> str:
    world, launcher = plan.world, ""
    if world.size > world.local_size:
        launcher = (
            f"torchrun --nnodes {world.size // world.local_size} --nproc-per-node {world.local_size} "
            "--rdzv-backend c10d --rdzv-endpoint HOST:PORT -m "
        )
    elif world.size > 1:
        launcher = f"torchrun --standalone --nproc-per-node {world.size} -m "
    return f"{launcher}{'equipoise' if launcher else own_command()} train --resume {shlex.quote(str(plan.folder))}"
