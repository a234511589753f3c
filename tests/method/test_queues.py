"""GPaCo, PaCo and GML against their authors' numbers and slow loops, and their queues."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, golden_values

from equipoise.config.recipe import Loss
from equipoise.method.losses import log_prior
from equipoise.method.objective import Outputs
from equipoise.method.queues import Gml, GPaCo, PaCo, class_scores, parametric_contrastive_loss


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
    of_views = (of.unflatten(0, (2, batch)).transpose(0, 1) for of in (logits + prior, z[: 2 * batch]))
    outputs = Outputs(*of_views)
    settings = Loss(beta=case["alpha"], temperature=case["temperature"], label_smoothing=case["smooth"])
    queued = z[2 * batch :], labels[2 * batch :]
    whole, parts = [slice(0, batch)], [slice(0, 1), slice(1, batch)]
    for of_rows in (whole, parts):
        loss = torch.zeros(())
        for rows in of_rows:
            of_part = outputs._replace(logits_BC=outputs.logits_BC[rows])
            loss = loss + parametric_contrastive_loss(of_part, labels[:batch], rows, queued, settings)
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
        of_part = Outputs((logits + prior)[rows, None], features)
        loss = loss + parametric_contrastive_loss(of_part, labels[:batch], rows, queued, settings)
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
        batch = Outputs(torch.zeros(size, anchors, 2), features[seen : seen + size])
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


@pytest.mark.parametrize("case", GOLDEN["gml"]["cases"], ids=lambda case: str(case["lcg_seed"]))
def test_gml_golden(case):
    """The keys of earlier images come with an earlier batch."""
    batch, labels = case["batch"], torch.tensor(case["labels"])
    values = golden_values(case["lcg_seed"], (batch + case["queue"]) * case["dim"]).reshape(-1, case["dim"])
    queries, keys = values[:batch].requires_grad_(), F.normalize(values[batch:].detach(), dim=1)
    for parts in ([slice(0, batch)], [slice(0, 1), slice(1, batch), slice(batch, batch)]):
        gradients, total = [torch.zeros(()), torch.zeros(())], 0.0
        for rows in parts:
            settings = Loss(temperature=case["temperature"], queue=1000)
            objective = Gml(settings, torch.tensor(case["class_counts"]), case["dim"]).double()
            objective.enqueue(keys[batch:], labels[batch:])
            features = torch.stack([F.normalize(queries, dim=1), keys[:batch]], dim=1)
            loss = objective.contrast(Outputs(torch.zeros(0), features), labels[:batch], rows)
            total += loss.item()
            of_part = torch.autograd.grad(loss, [queries, objective.log_temperature])
            gradients = [one + other for one, other in zip(gradients, of_part, strict=True)]
        assert total == pytest.approx(case["loss"], rel=1e-9)
        assert gradients[0].norm().item() == pytest.approx(case["grad_features_norm"], rel=1e-9)
        assert gradients[1].item() == pytest.approx(case["grad_log_temperature"], rel=1e-9)


@pytest.mark.parametrize("scale", [1.0, 1000.0])  # at the latter, exp would overflow
def test_scores_are_log_means_of_what_is_there(scale):
    scores = scale * torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 2, 2, 0, 3, 3, 3, 3, 4])
    scores[1, 8] = scores[2, 4:6] = -torch.inf  # of class 4 the only one; of class 3 two
    scores.requires_grad_()
    found = class_scores(scores, labels, 5)
    for row in range(4):
        for label in range(5):
            of_row = scores.detach()[row]
            there = [of_row[q] for q in range(9) if labels[q] == label and of_row[q] > -math.inf]
            expected = torch.stack(there).logsumexp(0) - math.log(len(there)) if there else -math.inf
            assert found[row, label].item() == pytest.approx(float(expected), rel=1e-12)
    F.cross_entropy(found, torch.tensor([0, 0, 2, 3])).backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


def test_each_class_has_places_of_its_own():
    """Three, and of the others its share. They hold its last keys, also where one batch has more."""
    objective = Gml(Loss(queue=19), torch.tensor([8, 1, 1]), 4)
    assert objective.sizes_C.tolist() == [11, 4, 4]
    assert Gml(Loss(queue=1), torch.tensor([8, 1, 1]), 4).sizes_C.tolist() == [3, 3, 3]
    keys, labels = torch.randn(40, 4), torch.tensor([0, 1] * 20)
    for batch in (slice(0, 3), slice(3, 5), slice(5, 19), slice(19, 40)):
        owners = objective.enqueue(keys[batch], labels[batch])
        first = batch.start
        for label, size in enumerate([11, 4, 4]):
            of_class = [number for number in range(batch.stop) if labels[number] == label][-size:]
            filled = (objective.labels_Q == label) & (objective.queue_QD != 0).any(1)
            there = {tuple(key) for key in objective.queue_QD[filled].tolist()}
            assert there == {tuple(keys[number].tolist()) for number in of_class}
            own = [number - first for number in of_class if number >= first]
            assert sorted(owners[(objective.labels_Q == label) & (owners >= 0)].tolist()) == own
        for place in (owners >= 0).nonzero()[:, 0].tolist():
            assert torch.equal(objective.queue_QD[place], keys[batch][owners[place]])


def test_the_temperature_is_learned_from_the_second_pass_alone():
    """The features' gradient is that of the first one, in which the temperature is a number."""
    objective = Gml(Loss(temperature=0.2), torch.tensor([3, 2]), 4).double()
    features = F.normalize(torch.randn(4, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=2)
    features.requires_grad_()
    labels = torch.tensor([0, 0, 0, 1])  # the last has no other key of its class: it says nothing of the temperature
    objective.contrast(Outputs(torch.zeros(0), features), labels, slice(0, 4)).backward()
    assert features.grad is not None
    assert objective.log_temperature.grad is not None
    queries, keys = features.detach()[:, 0].requires_grad_(), features.detach()[:, 1]
    log_temperature = objective.log_temperature.detach().clone().requires_grad_()
    prior = objective.log_prior_C
    first = torch.stack([(queries @ keys[:3].T / 0.2).exp().mean(1).log(), queries @ keys[3] / 0.2], dim=1)
    F.cross_entropy(first + prior, labels).backward()
    assert torch.allclose(features.grad[:, 0], queries.grad, rtol=1e-9)
    assert not features.grad[:, 1].any()
    total = torch.zeros((), dtype=torch.float64)
    for image in range(3):
        others = keys[[other for other in range(3) if other != image]]
        scores = (queries[image].detach() @ torch.cat([others, keys[3:]]).T) / log_temperature.exp()
        total = total + F.cross_entropy(torch.stack([scores[:2].exp().mean().log(), scores[2]]) + prior, labels[image])
    (total / 4).backward()
    assert objective.log_temperature.grad.item() == pytest.approx(log_temperature.grad.item(), rel=1e-9)
