"""A plan becomes a run folder: it is opened, taken, trained and scored, and what goes wrong is said in one line."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from equipoise.base.device import describe_machine, deterministic, keep_freed_memory
from equipoise.base.errors import UserError, in_words, out_of_memory, own_command, quoted
from equipoise.base.world import join, lost_rank
from equipoise.config.recipe import Recipe
from equipoise.evaluation.features import class_means, open_encoded_batches
from equipoise.evaluation.score import Run, evaluate_run
from equipoise.method.clip import text_directions
from equipoise.method.network import CosineClassifier, TwoBranchNetwork
from equipoise.runs.checkpoint import create_network
from equipoise.runs.folder import BAD_IMAGES, LAST, METRICS, PREVIOUS, RunFolder, Track, write_record
from equipoise.training.loop import NonFiniteLossError, Requests, Trainer
from equipoise.training.plan import Named, Plan, default_folder, prepare
from equipoise.training.track import tracked
from equipoise.views.loader import Batches


def train(recipe: Recipe, out: Named = None, progress: bool = True, resume: Named = None) -> Run:
    """Train `recipe` into the folder `out` (default: `runs/RECIPE-METHOD-TIME`) and score what came of it. `resume`:
    see `prepare`. In processes that torchrun has started, all call it, and train together.

    Raises UserError for what the user must put right, and leaves no folder behind then; NonFiniteLossError if the loss
    became infinite or not a number; Stopped after SIGINT or SIGTERM, when the run is saved.

    >>> recipe = equipoise.load_recipe("digits-lt", method="logit-adjusted", epochs=1)
    >>> run = equipoise.train(recipe, "runs/first", progress=False)
    >>> run.metrics["test"]["images"]
    500
    """
    with join() as world, start(prepare(recipe, out, resume, world)) as session:
        return session.run(progress)


@dataclass(frozen=True)
class Session:
    """A plan of which all is checked, in the folder that was got: this process's own until `start` ends."""

    plan: Plan
    network: TwoBranchNetwork
    trainer: Trainer
    opened: Mapping[str, Batches]
    track: Track

    def run(self, progress: bool = True) -> Run:
        """Train and score. See `train`."""
        plan, requests = self.plan, self.trainer.requests

        def look() -> None:
            requests.leave_if_stopped("features are kept", plan.resume_command())

        if plan.classifier is not None:  # saved at once: a run folder without a checkpoint could be trained
            self.network.classifier.load_state_dict(plan.classifier.state_dict())
            self.trainer.finish()
        else:
            for batches in self.opened.values():
                batches.prepare(look)
            classifier, model = self.network.classifier, plan.recipe.model
            if plan.start is None and isinstance(classifier, CosineClassifier):
                if starts_at_means(plan.recipe):
                    classifier.start_at(class_means(plan.recipe, plan.parts.train, self.network, plan.world, look))
                elif model.classifier_start == "text":
                    text = model.encoder, model.weights, plan.parts.train.class_names
                    classifier.start_at(plan.world.first_makes(lambda: text_directions(*text)))
            self.trainer.train(progress and plan.world.is_first, self.track)
        state = "training is done and saved, but not scored"  # nothing more has to be saved
        plan.world.each_makes(lambda: requests.stop_at_once(state, plan.resume_command()))
        try:
            metrics = evaluate_run(plan.folder, plan.parts, str(plan.device), plan.world)
        except (UserError, RuntimeError, MemoryError) as error:
            if not isinstance(error, UserError) and not out_of_memory(error):
                raise
            again = f"{own_command()} evaluate {quoted(plan.folder)}"
            raise UserError(f"{in_words(error)}. Training is done and kept; then: {again}") from None
        scored = metrics["test"] or metrics["validation"] or {}
        final = {f"final/{name}": value for name, value in scored.items() if isinstance(value, float)}
        self.track(final, self.trainer.step)
        return Run(plan.folder)


def starts_at_means(recipe: Recipe) -> bool:
    """Whether the classifier starts at the means of the classes."""
    model = recipe.model
    return model.tune != "scratch" and (model.classifier, model.classifier_start) == ("cosine", "class-means")


@contextmanager
def start(plan: Plan) -> Generator[Session]:
    """A session of `plan`. What can be refused is, before the folder is made. See `train` for what it raises."""
    network = plan.world.each_makes(lambda: open_network(plan))
    opened = plan.world.each_makes(
        lambda: {
            name: open_encoded_batches(plan.recipe, part, network, plan.device, plan.world)
            for name, part in plan.parts.named().items()
        }
    )
    with deterministic(plan.recipe.deterministic), Requests() as requests, RunFolder() as folder:
        got = plan.world.first_makes(lambda: _take(folder, plan))
        plan = replace(plan, place=replace(plan.place, folder=got))
        with _failures_in_one_line(plan, folder), tracked(plan) as track:
            trainer = Trainer(plan, network, opened["train"], opened.get("validation"), requests)
            yield Session(plan, network, trainer, opened, track)


def open_network(plan: Plan) -> TwoBranchNetwork:
    """The network as it starts, on its device."""
    recipe, classes, begin = plan.recipe, len(plan.parts.train.class_names), plan.start
    if plan.device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(recipe.seed)
    # MKL takes fewer threads where the machine is busy, unless their number was set: and sums in another order.
    torch.set_num_threads(torch.get_num_threads())
    if begin is None:
        network = create_network(recipe, classes, start=True)
    else:  # the pretrained weights that another run began with are not needed: they may be gone
        network = begin.checkpoint.network(recipe, classes, plan.place.resumes)
    network = network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] torch's stub lacks it
    if recipe.model.batch_norm == "synchronised" and plan.world.size > 1:
        network.synchronise_batch_norm(plan.device)
    return network.to(plan.device)


def _take(folder: RunFolder, plan: Plan) -> Path:
    """Take the planned folder, or if that is taken and the user did not name it, another; and write down the plan."""
    path, place, begin = plan.folder, plan.place, plan.start
    while not folder.take(path, goes_on=place.resumes):
        if place.named:
            raise UserError(f"another run is writing into {path}; wait for it, or name another folder with --out")
        path = default_folder(plan.recipe)
    (path / METRICS).unlink(missing_ok=True)  # of an earlier end
    if begin is None:
        (path / BAD_IMAGES).unlink(missing_ok=True)  # they may have been repaired
    elif place.resumes and begin.path.name == PREVIOUS:
        (path / LAST).unlink(missing_ok=True)  # the damaged one must not become the previous one
    parts = plan.parts
    about: dict[str, Any] = {
        "machine": describe_machine(plan.device),
        "processes": plan.world.size,
        "launch": plan.world.launch,
        "precision": plan.precision,
        "data": {
            "kind": parts.kind,
            "lists": parts.described,
            "notes": parts.notes,
            "fingerprints": plan.fingerprints,
            "images": {name: len(part) for name, part in parts.named().items()},
        },
        "class_counts": dict(zip(parts.train.class_names, parts.train.class_counts, strict=True)),
        "weights": plan.recipe.model.weights,
    }
    if begin is not None:
        done = begin.checkpoint
        about["resumed"] = {"from": str(begin.path), "after_epoch": done.epoch, "after_step": done.step}
    write_record(path, plan.recipe, about)
    return path


@contextmanager
def _failures_in_one_line(plan: Plan, folder: RunFolder) -> Generator[None]:
    """Raise what ends a run for a reason of the user's as one line that says how to go on."""
    try:
        yield
    except NonFiniteLossError:
        folder.kept = True  # its log shows why
        raise
    except (OSError, RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            short = f"there is not enough memory for batches of {plan.recipe.batch_size} images on {plan.device}"
            instead = "train anew with --micro-batch, which computes the same in parts, or a smaller --batch-size"
            raise UserError(f"{short}; {instead}") from None
        # The disk is full, say. A broken pipe is no file: nobody reads what is printed.
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            then = f"go on with: {plan.resume_command()}" if (plan.folder / LAST).exists() else "start again"
            raise UserError(f"{plan.folder} could not be written ({in_words(error)}); once it can, {then}") from None
        if plan.recipe.deterministic and "deterministic" in str(error):
            raise UserError(f"{str(error).partition(',')[0]}; leave out --deterministic") from None
        raise lost_rank(error) or error from None
