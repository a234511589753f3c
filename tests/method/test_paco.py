"""GPaCo and PaCo against their authors' numbers, and their queue."""

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, golden_values

from equipoise.config.recipe import Loss
from equipoise.method.losses import log_prior
from equipoise.method.network import Outputs
from equipoise.method.paco import GPaCo, PaCo, parametric_contrastive_loss


@pytest.mark.parametrize("case", GOLDEN["paco"]["cases"], ids=lambda case: f"{case['lcg_seed']} {case['prior']}")
def test_gpaco_golden(case):
    batch, width, queue, classes = case["batch"], case["dim"], case["queue"], case["classes"]
    count = (2 * batch + queue) * width
    values = golden_values(case["lcg_seed"], count + 2 * batch * classes)
    features = values[:count].reshape(-1, width).requires_grad_()
    logits = (values[count:] * case["logit_scale"]).reshape(-1, classes).requires_grad_()
    labels = torch.tensor(case["labels"])
    z = F.normalize(features, dim=1)
    prior = log_prior(torch.tensor(case["class_counts"])) if case["prior"] else 0
    outputs = Outputs(
        (logits + prior).unflatten(0, (2, batch)).transpose(0, 1),
        z[: 2 * batch].unflatten(0, (2, batch)).transpose(0, 1),
        None,
    )
    settings = Loss(beta=case["alpha"], temperature=case["temperature"], label_smoothing=case["smooth"])
    queued = z[2 * batch :], labels[2 * batch :]
    whole, parts = [slice(0, batch)], [slice(0, 1), slice(1, batch)]
    for of_rows in (whole, parts):
        loss = torch.zeros(())
        for rows in of_rows:
            of_part = outputs._replace(logits_BC=outputs.logits_BC[rows])
            loss = loss + parametric_contrastive_loss(of_part, labels[:batch], rows, queued, settings, case["gamma"])
        assert loss.item() == pytest.approx(case["loss"], rel=1e-9)
        of_features, of_logits = torch.autograd.grad(loss, [features, logits], retain_graph=True)
        # They add 1e-12 to a sum that may be 1e-6.
        assert of_features.norm().item() == pytest.approx(case["grad_features_norm"], rel=2e-9)
        assert of_logits.norm().item() == pytest.approx(case["grad_logits_norm"], rel=1e-9)


@pytest.mark.parametrize("expected", GOLDEN["paco"]["queries"], ids=lambda case: str(case["lcg_seed"]))
def test_paco_golden(expected):
    """Of the same inputs: only queries are anchors, and keys have no gradient."""
    (case,) = [one for one in GOLDEN["paco"]["cases"] if one["lcg_seed"] == expected["lcg_seed"] and one["prior"]]
    batch, width, classes = case["batch"], case["dim"], case["classes"]
    count = (2 * batch + case["queue"]) * width
    values = golden_values(case["lcg_seed"], count + 2 * batch * classes)
    queries = values[: batch * width].reshape(-1, width).requires_grad_()
    others = F.normalize(values[:count].reshape(-1, width)[batch:].detach(), dim=1)
    logits = (values[count:] * case["logit_scale"]).reshape(-1, classes)[:batch].requires_grad_()
    labels, prior = torch.tensor(case["labels"]), log_prior(torch.tensor(case["class_counts"]))
    features = torch.stack([F.normalize(queries, dim=1), others[:batch]], dim=1)
    settings, queued = Loss(beta=case["alpha"], temperature=case["temperature"]), (others[batch:], labels[2 * batch :])
    loss = torch.zeros(())
    for rows in (slice(0, 1), slice(1, batch)):
        of_part = Outputs((logits + prior)[rows, None], features, None)
        loss = loss + parametric_contrastive_loss(of_part, labels[:batch], rows, queued, settings, case["gamma"])
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-9)
    of_queries, of_logits = torch.autograd.grad(loss, [queries, logits])
    assert of_queries.norm().item() == pytest.approx(expected["grad_features_norm"], rel=2e-9)
    assert of_logits.norm().item() == pytest.approx(expected["grad_logits_norm"], rel=1e-9)


@pytest.mark.parametrize("method", [GPaCo, PaCo])
def test_the_queue_holds_the_last_features(method):
    """Also where a batch is larger than it, or goes over its end; what was never filled is compared with nothing."""
    objective = method(Loss(queue=5, temperature=0.2), torch.tensor([3, 2]), 4)
    features = F.normalize(torch.randn(14, 2, 4), dim=2)
    seen = 0
    for size in (3, 4, 7):
        labels = torch.arange(seen, seen + size) % 2
        anchors = 1 if objective.momentum else 2
        batch = Outputs(torch.zeros(size, anchors, 2), features[seen : seen + size], None)
        found = objective(batch, labels, slice(0, size))["loss"]
        if not seen:
            nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
            adjusted = batch._replace(logits_BC=batch.logits_BC + objective.log_prior_C.float())
            alone = parametric_contrastive_loss(adjusted, labels, slice(0, size), nothing, objective.settings)
            assert found.item() == pytest.approx(alone.item(), rel=1e-5)
        seen += size
        first = max(seen - 5, 0)
        expected = {(label % 2, *row.tolist()) for label, row in enumerate(features[first:seen, 1], first)}
        there = zip(objective.queue_labels_Q.tolist(), objective.queue_QD.tolist(), strict=True)
        assert {(label, *row) for label, row in there if label >= 0} == expected
