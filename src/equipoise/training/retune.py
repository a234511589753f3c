"""The second stage of a run: its encoder stays as it is, and gets another classifier."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from equipoise.base.errors import UserError
from equipoise.base.files import real_path
from equipoise.config.recipe import ALL_STAGES, SECOND_STAGES, UNTRAINED, Field, find_field, override_all
from equipoise.evaluation.features import class_means, open_encoded_batches
from equipoise.evaluation.metrics import score
from equipoise.evaluation.predictions import predict
from equipoise.method.network import CosineClassifier, ScaledClassifier, TwoBranchNetwork
from equipoise.runs.checkpoint import create_network, load_checkpoint, refuse_changed
from equipoise.runs.folder import chosen_checkpoint
from equipoise.training.plan import Named, Plan, prepare

_TAUS = [step / 20 for step in range(21)]


def second_stage(run: Path, stage: str, out: Named = None, overrides: Sequence[tuple[Field, Any]] = ()) -> Plan:
    """The plan of one of the `SECOND_STAGES` of a run, or of a checkpoint; with its classifier, where that is computed
    and not trained. `overrides`: fields of its recipe. Raises UserError where the first stage does not go with it."""
    file = real_path(chosen_checkpoint(run))
    first = load_checkpoint(file)
    if not first.class_counts:
        raise UserError(f"{file} does not say what it was trained on; name a run of equipoise")
    if stage == "tau-norm" and first.recipe.model.classifier == "cosine":
        raise UserError(f"{file} has a cosine classifier, which ignores norms: train it with --classifier linear")
    about = f"{stage} on {file}, after epoch {first.epoch}"
    named = {"name": f"{first.recipe.name}-{stage}", "summary": about, "model.weights": str(file)}
    fields = {**ALL_STAGES, **SECOND_STAGES[stage], **named}
    recipe = override_all(first.recipe, [(find_field(key), value) for key, value in fields.items()])
    plan = prepare(override_all(recipe, overrides), out)
    refuse_changed(recipe.data.path, plan.parts, first, file)
    if stage not in UNTRAINED:
        return plan
    network = create_network(plan.recipe, len(first.class_names), start=True).to(plan.device)
    if isinstance(network.classifier, CosineClassifier):
        network.classifier.start_at(class_means(plan.recipe, plan.parts.train, network, plan.world, lambda: None))
    elif isinstance(network.classifier, ScaledClassifier):
        tau = _choose_tau(plan, network, network.classifier)
        plan = replace(plan, recipe=replace(plan.recipe, summary=f"{about}; tau {tau:g}, which validation chose"))
    return replace(plan, classifier=network.classifier)


def _choose_tau(plan: Plan, network: TwoBranchNetwork, classifier: ScaledClassifier) -> float:
    """Scale the classifier by the tau of the highest mean per-class accuracy on validation, of equal ones the least."""
    validation, counts, scores = plan.parts.validation, plan.parts.train.class_counts, dict[float, float]()
    if validation is None:
        file = plan.recipe.model.weights
        raise UserError(f"{file} has no validation part, which chooses tau: train it with --holdout 0.1")
    with closing(open_encoded_batches(plan.recipe, validation, network, plan.device, plan.world)) as batches:
        batches.prepare()
        for tau in _TAUS:
            classifier.normalise(tau)
            scores[tau] = score(predict(network, batches), counts, len(counts))["mean_per_class"]
    best = max(_TAUS, key=scores.__getitem__)  # the first of equal ones
    classifier.normalise(best)
    return best
