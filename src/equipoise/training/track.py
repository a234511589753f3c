"""What a run logs, in TensorBoard, MLflow or Weights & Biases too; none is imported unless the recipe's `track` names
it. The id of the tracked run is kept in the run folder, so that a run that goes on does so in the same one."""

import os
import secrets
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from equipoise.base.errors import reason
from equipoise.config.recipe import field_value, recipe_fields
from equipoise.data.images import imbalance_factor
from equipoise.runs.folder import Track
from equipoise.training.plan import FILES, Plan

Tracker = tuple[Track, Callable[[bool], object]]  # takes figures; ends, of a run that is finished or not


@contextmanager
def tracked(plan: Plan) -> Generator[Track]:
    """What sends figures to the plan's tracker. Where that fails it is said once, and only the end still tried."""
    name, gone, finished = plan.recipe.track, plan.recipe.track == "none" or not plan.world.is_first, False

    def attempt(act: Callable[[], Any]) -> Any:
        nonlocal gone
        try:
            return act()
        except Exception as error:  # libraries raise what they like
            why = reason(error, library=True, otherwise="no answer")
            if not gone:
                print(f"equipoise: {name} has failed ({why}); the run goes on without it", file=sys.stderr, flush=True)
            gone = True

    tracker: Any = None if gone else attempt(lambda: _TRACKERS[name](plan))
    try:
        yield lambda figures, step: None if gone else attempt(lambda: tracker[0](figures, step))
        finished = not gone
    finally:
        attempt(lambda: tracker and tracker[1](finished))  # the next run of the process must not lie within this one


def _settings(plan: Plan) -> dict[str, Any]:
    """The recipe without its paths and addresses, which are private, and what the training classes are like."""
    counts = plan.parts.train.class_counts
    about = {"classes": len(counts), "train_images": sum(counts), "imbalance": round(imbalance_factor(counts), 2)}
    return {field.key: field_value(plan.recipe, field) for field in recipe_fields() if field.key not in FILES} | about


def _tensorboard(plan: Plan) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter  # takes a second to import

    done = plan.start.checkpoint.step if plan.start and plan.place.resumes else 0
    # TensorBoard drops what earlier files have from the next step on.
    writer = SummaryWriter(str(plan.folder / "tensorboard"), purge_step=done + 1)
    writer.add_text("settings", "\n".join(f"    {name} = {value}" for name, value in _settings(plan).items()), done)

    def send(figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return send, lambda _: writer.close()


def _mlflow(plan: Plan) -> Tracker:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # a server that is gone would hold training up
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    import mlflow

    if not (file := plan.folder / "mlflow.id").exists():
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "equipoise"))
        with mlflow.start_run(run_name=plan.folder.name, nested=True) as run:  # which ends it, should that fail
            mlflow.log_params(_settings(plan))
        file.write_text(run.info.run_id)
    mlflow.start_run(file.read_text(), nested=True)
    return mlflow.log_metrics, lambda finished: mlflow.end_run("FINISHED" if finished else "KILLED")


def _wandb(plan: Plan) -> Tracker:
    os.environ.setdefault("WANDB_PROJECT", "equipoise")
    import wandb

    if not (file := plan.folder / "wandb.id").exists():
        file.write_text(secrets.token_hex(4))
    which: Any = {"id": file.read_text(), "resume": "allow", "name": plan.folder.name, "dir": plan.folder}
    run = wandb.init(reinit="create_new", settings={"console": "off", "silent": True}, **which)
    run.config.update(_settings(plan), allow_val_change=True)
    return run.log, lambda finished: run.finish(0 if finished else 1)


_TRACKERS: dict[str, Callable[[Plan], Tracker]] = {"tensorboard": _tensorboard, "mlflow": _mlflow, "wandb": _wandb}
