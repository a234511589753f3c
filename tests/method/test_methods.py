"""Each method against its formula, its authors' numbers, and what holds for all."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, golden_values
from torch import Tensor

from equipoise import BalancedContrastiveLoss, load_recipe
from equipoise.config.recipe import Loss, Method
from equipoise.method.kcl import k_positive_loss, spread_points
from equipoise.method.losses import log_prior, supervised_contrastive_loss
from equipoise.method.methods import METHODS, class_weights, objective_of, remedies
from equipoise.method.objective import Outputs
from equipoise.method.queues import parametric_contrastive_loss

COUNTS, LABELS = (50, 10, 2), torch.tensor([0, 0, 0, 1, 1, 2])
SETTINGS = {"alpha": 1.5, "beta": 0.7, "temperature": 0.2, "tau": 1.3, "gamma": 0.4, "effective_beta": 0.99,
            "feature_dim": 4}  # fmt: skip


def outputs(method: str) -> Outputs:
    random = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(6, 2, 4, generator=random, dtype=torch.float64), dim=-1)
    prototypes = F.normalize(torch.randn(3, 4, generator=random, dtype=torch.float64), dim=-1)
    anchors = 1 if METHODS[method].momentum else 2
    shape = (6, anchors, 3) if METHODS[method].shares_views else (6, 3)
    logits, *projected = (torch.randn(of, generator=random, dtype=torch.float64) for of in (shape, (6, 4), (3, 4)))
    return Outputs(logits, features, prototypes, tuple(projected))


def proco(features: Tensor, prior: Tensor) -> Tensor:
    """Its own test holds the scores to their formula."""
    objective, total = METHODS["proco"](Loss(temperature=0.2), torch.tensor(COUNTS), 4).double(), torch.zeros(())
    for view in features.unbind(1):
        objective.update(view, LABELS)
        total = total + F.cross_entropy(objective.scores(view) + prior, LABELS) / 2
    return total


def gpaco(of: Outputs, smoothing: float) -> Tensor:
    """Before anything is in its queue. Its own test holds it to its authors' numbers."""
    adjusted = of._replace(logits_BC=of.logits_BC + log_prior(torch.tensor(COUNTS)))
    settings = Loss(beta=0.7, temperature=0.2, label_smoothing=smoothing)
    nothing = torch.zeros(0, 4, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    return parametric_contrastive_loss(adjusted, LABELS, slice(0, 6), nothing, settings)


def paco(of: Outputs, smoothing: float) -> Tensor:
    """Before anything is in its queue, for each query in turn. A plan refuses the smoothing, the loss would take it."""
    columns, labels, total = of.features_BVD.flatten(0, 1), LABELS.repeat_interleave(2), torch.zeros(())
    prior = log_prior(torch.tensor(COUNTS))
    for image, label in enumerate(LABELS.tolist()):
        others = [column for column in range(12) if column != 2 * image]
        scores = torch.cat([of.logits_BC[image, 0] + prior, columns[others] @ columns[2 * image] / 0.2])
        target = torch.full((3,), smoothing / 2, dtype=torch.float64)
        target[label] = 1 - smoothing
        weights = torch.cat([target, 0.7 * (labels[others] == label).double()])
        total = total - (weights * scores.log_softmax(0)).sum() / weights.sum() / 6
    return total


def gml(features: Tensor, prior: Tensor) -> Tensor:
    """Before anything else is in its queue: for each query all keys, then all but that of the same image. Class 2 has
    no other one."""
    total = torch.zeros(())
    for image, label in enumerate(LABELS.tolist()):
        for left_out in [None] if label == 2 else [None, image]:
            scores = [
                (features[keys, 1] @ features[image, 0] / 0.2).exp().mean().log()
                for keys in ([i for i in range(6) if LABELS[i] == c and i != left_out] for c in range(3))
            ]
            total = total + F.cross_entropy(torch.stack(scores) + prior, LABELS[image]) / 6
    return total


def formula(method: str, of: Outputs, smoothing: float) -> Tensor:
    """Each in its plainest form, with torch's label smoothing where it goes with that."""
    if METHODS[method].shares_views:
        return paco(of, smoothing) if method == "paco" else gpaco(of, smoothing)
    logits, features, prototypes, _ = of
    prior, counts = log_prior(torch.tensor(COUNTS)), torch.tensor(COUNTS, dtype=torch.float64)
    adjusted = F.cross_entropy(logits + 1.3 * prior, LABELS, label_smoothing=smoothing)
    weights = (1 - 0.99) / (1 - 0.99**counts)
    weighted = F.cross_entropy(logits, LABELS, weights, label_smoothing=smoothing)  # mean: divided by the weights
    right = logits.softmax(1)[range(6), LABELS]
    margins = 30 * 0.5 * (2 / counts) ** 0.25
    return {
        "bcl": lambda: 1.5 * adjusted + 0.7 * BalancedContrastiveLoss(0.2)(features, LABELS, prototypes),
        "concutmix": lambda: formula("bcl", of, smoothing),  # of images that are not mixed
        "supcon+la": lambda: 1.5 * adjusted + 0.7 * supervised_contrastive_loss(features, LABELS, 0.2),
        "logit-adjusted": lambda: adjusted,
        "balanced-softmax": lambda: adjusted,
        "ce": lambda: F.cross_entropy(logits, LABELS, label_smoothing=smoothing),
        "class-weights": lambda: weighted,
        "focal": lambda: -((1 - right) ** 0.4 * right.log()).mean(),
        "ldam-drw": lambda: F.cross_entropy(logits - margins * F.one_hot(LABELS, 3), LABELS, label_smoothing=smoothing),
        "kcl": lambda: 1.5 * adjusted + 0.7 * k_positive_loss(features, LABELS, 0.2, 0),
        "tsc": lambda: 1.5 * adjusted + 0.7 * k_positive_loss(features, LABELS, 0.2, 0, targets_CD=spread_points(3, 4)),
        "gml": lambda: 1.5 * adjusted + 0.7 * gml(features, prior),
        "proco": lambda: 1.5 * adjusted + 0.7 * proco(features, prior),
        "vs": lambda: F.cross_entropy((counts / 50) ** 0.4 * logits + 1.3 * prior, LABELS, label_smoothing=smoothing),
    }[method]()


OTHERS, SHARES = torch.tensor([1, 2, 0, 2, 1, 0]), torch.tensor([1.0, 0.5, 0.25, 0.875, 0.0, 0.75])  # exact in binary


def classification(method: str, logits: Tensor) -> Tensor:
    """The classification loss of mixed images, image by image and label by label."""
    prior, counts = log_prior(torch.tensor(COUNTS)), torch.tensor(COUNTS, dtype=torch.float64)
    weights = (1 - 0.99) / (1 - 0.99**counts) if method == "class-weights" else torch.ones(3)
    total = weighed = torch.zeros((), dtype=torch.float64)
    for place in range(6):
        own, other, share = LABELS[place], OTHERS[place], SHARES[place].double()
        for label, part in ((own, share), (other, 1 - share)):
            row = logits[place]
            if method == "ldam-drw":
                row = row - 30 * 0.5 * (2 / counts[label]) ** 0.25 * F.one_hot(label, 3)
            elif method == "vs":
                row = (counts / 50) ** 0.4 * row + 1.3 * prior
            elif method not in ("ce", "focal", "class-weights"):
                row = row + 1.3 * prior
            right = row.softmax(0)[label]
            loss = -((1 - right) ** 0.4) * right.log() if method == "focal" else -right.log()
            total, weighed = total + part * weights[label] * loss, weighed + part * weights[label]
    return total / weighed


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.mixes])
def test_mixed_images_have_the_losses_of_both_labels_by_their_shares(method):
    """The contrastive loss is of the first labels alone. Where every share is 1, nothing is mixed."""

    def terms(mixed: tuple[Tensor, ...]) -> dict[str, float]:
        objective = objective_of(load_recipe("digits-lt", method=method, **SETTINGS), COUNTS).double()
        objective.begin_epoch(0, 2)
        objective.mixed = mixed
        found = objective(outputs(method), LABELS, slice(0, 6))
        return {name: term.item() for name, term in found.items()}

    plain, mixed = terms(()), terms((OTHERS, SHARES))
    expected = classification(method, outputs(method).logits_BC).item()
    assert mixed.get("classification", mixed["loss"]) == pytest.approx(expected, rel=1e-9)
    assert mixed.get("contrastive") == plain.get("contrastive")
    assert terms((OTHERS, torch.ones(6))) == pytest.approx(plain, rel=1e-12)


def test_contrastive_cutmix_leans_in_the_second_half_of_the_epochs():
    recipe = load_recipe("digits-lt", method="concutmix", tau=1.3, temperature=0.2, feature_dim=4)
    of = outputs("concutmix")
    objective = objective_of(recipe, COUNTS).double()
    objective.mixed = OTHERS, SHARES
    plain = classification("concutmix", of.logits_BC).item()
    objective.begin_epoch(1, 2)
    assert objective(of, LABELS, slice(0, 6))["classification"].item() == pytest.approx(plain, rel=1e-12)
    counts = torch.tensor(COUNTS, dtype=torch.float64)
    logs = (of.logits_BC + 1.3 * (counts / counts.sum()).log()).log_softmax(1)
    total = 0.0
    for image, (own, other, share) in enumerate(zip(LABELS, OTHERS, SHARES.double(), strict=True)):
        label = share * F.one_hot(own, 3) + (1 - share) * F.one_hot(other, 3)
        distances = [float((of.projected[0][image] - centre).norm()) for centre in of.projected[1]]
        near = F.one_hot(torch.tensor(distances.index(min(distances))), 3)  # three in ten of three classes: one
        weight = 2 / 255 * (3 / 10) * math.log(float(label @ counts)) / float(counts.log().sum()) if share < 1 else 0
        total -= float((((1 - weight) * label + weight * near) * logs[image]).sum()) / 6
    objective.begin_epoch(2, 3)
    assert objective(of, LABELS, slice(0, 6))["classification"].item() == pytest.approx(total, rel=1e-9)
    assert abs(total - plain) > 1e-6


def test_every_method_is_declared():
    assert set(get_args(Method)) == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_methods_are_their_formulas(method, smoothing):
    objective = objective_of(
        load_recipe("digits-lt", method=method, label_smoothing=smoothing, **SETTINGS), COUNTS
    ).double()
    objective.begin_epoch(0, 2)
    terms = objective(outputs(method), LABELS, slice(0, 6))
    assert terms["loss"].item() == pytest.approx(formula(method, outputs(method), smoothing).item(), rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_parts_of_a_batch_add_up(method):
    """Of logits and features, as on several ranks, one of which has no image: terms and gradients."""
    sums, gradients = list[float](), list[Tensor]()
    for parts in ([slice(0, 6)], [slice(0, 1), slice(1, 5), slice(5, 6), slice(6, 6)]):
        recipe = load_recipe("digits-lt", method=method, **SETTINGS)
        logits_BC, features_BVD, prototypes_CD, (view_BD, centres_CD) = outputs(method)
        logits_BC.requires_grad_()
        features_BVD.requires_grad_()
        of_parts = list[Tensor]()
        for part in parts:  # each by an objective of its own, which sees the features of all
            objective = objective_of(recipe, COUNTS).double()
            objective.mixed = (OTHERS, SHARES) if objective.mixes else ()
            objective.begin_epoch(2, 3)
            of_part = Outputs(logits_BC[part], features_BVD, prototypes_CD, (view_BD[part], centres_CD))
            of_parts.append(objective(of_part, LABELS, part)["loss"])
        torch.stack(of_parts).sum().backward()
        sums.append(sum(term.item() for term in of_parts))
        gradients += [logits_BC.grad, features_BVD.grad] if METHODS[method].contrastive else [logits_BC.grad]
    assert sums[0] == pytest.approx(sums[1], rel=1e-12)
    half = len(gradients) // 2
    for one, other in zip(gradients[:half], gradients[half:], strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("beta", [0, 0.99, 0.999, 0.9999])
def test_effective_numbers_golden(beta):
    case = GOLDEN["effective_number_weights"]
    assert class_weights(torch.tensor(case["class_counts"]), beta).tolist() == pytest.approx(
        case[f"beta {beta}"], rel=1e-9
    )


@pytest.mark.parametrize("case", GOLDEN["focal"]["cases"], ids=lambda case: f"gamma {case['gamma']}")
def test_focal_golden(case):
    golden = GOLDEN["focal"]
    values = golden_values(golden["lcg_seed"], golden["batch"] * golden["classes"]) * golden["logit_scale"]
    logits = values.reshape(golden["batch"], golden["classes"]).requires_grad_()
    focal = METHODS["focal"](Loss(gamma=case["gamma"]), torch.ones(golden["classes"]))
    loss = focal.losses(logits, torch.tensor(golden["labels"]), None).mean()
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-9)
    assert logits.grad is not None
    assert logits.grad.norm().item() == pytest.approx(case["grad_norm"], rel=1e-9)


def test_focal_of_an_image_that_is_certainly_right():
    logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
    METHODS["focal"](Loss(gamma=0.5), torch.ones(2)).losses(logits, torch.tensor([0]), None).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("stage", [0, 1])
def test_ldam_golden(stage):
    """In the first stage, and with the deferred weights, which begin after four fifths of the epochs."""
    golden = GOLDEN["ldam"]
    case, counts = golden["cases"][stage], torch.tensor(golden["class_counts"])
    values = golden_values(golden["lcg_seed"], golden["batch"] * golden["classes"])
    cosines = values.reshape(golden["batch"], golden["classes"]).requires_grad_()
    objective = METHODS["ldam-drw"](Loss(effective_beta=0.9999), counts)
    for epoch in range(160 + stage):
        objective.begin_epoch(epoch, 200)
    of = Outputs(30 * cosines)
    loss = objective(of, torch.tensor(golden["labels"]), slice(0, golden["batch"]))["loss"]
    loss.backward()
    assert objective.margins_C.tolist() == pytest.approx(case["margins"], rel=1e-9)
    assert loss.item() == pytest.approx(case["loss"], rel=1e-9)
    assert cosines.grad is not None
    assert cosines.grad.norm().item() == pytest.approx(case["grad_norm"], rel=1e-9)
    again = METHODS["ldam-drw"](Loss(), counts)
    again.load_state_dict(objective.state_dict())  # as a run that goes on: an epoch begins once
    assert again(of, torch.tensor(golden["labels"]), slice(0, golden["batch"]))["loss"].item() == loss.item()


@pytest.mark.parametrize(
    ("method", "prior"),
    [
        ("ce", [9, 4, 1]), ("focal", [9, 4, 1]), ("class-weights", [1, 1, 1]), ("gpaco", [1, 1, 1]),
        ("paco", [1, 1, 1]),
        *((method, [3, 2, 1]) for method in ("logit-adjusted", "vs", "supcon+la", "bcl", "kcl", "tsc", "proco", "gml")),
    ],
)  # fmt: skip
def test_logits_are_for_a_prior(method, prior):
    objective = objective_of(load_recipe("digits-lt", method=method, effective_beta=1, tau=0.5), (9, 4, 1))
    found = objective.log_prior_of_logits().exp()
    assert (found / found[2]).tolist() == pytest.approx(prior)


def test_logits_of_smoothed_labels_are_for_the_prior_of_these():
    """Cross-entropy is smallest where its softmax is the mean smoothed label of an image; their mean is the prior."""
    images, seen = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([[0.8, 0.1, 0.1], [0.5, 0.4, 0.1], [0.2, 0.2, 0.6]])
    shares_C = images @ seen
    smoothed = 0.02 * seen + 0.98 / 3
    counts = (1000 * shares_C).tolist()
    objective = objective_of(load_recipe("digits-lt", method="ce", label_smoothing=0.98), counts)
    assert objective.log_prior_of_logits().exp().tolist() == pytest.approx((images @ smoothed).tolist())
    recipe = load_recipe("digits-lt", method="class-weights", label_smoothing=0.98, effective_beta=1)
    weighted = (images @ smoothed) / shares_C  # a class counts by 1 / n, also where the label is another
    found = objective_of(recipe, counts).log_prior_of_logits().softmax(0)
    assert found.tolist() == pytest.approx((weighted / weighted.sum()).tolist())


@pytest.mark.parametrize("epochs", [*range(1, 13), 200])
def test_the_weights_of_ldam_come_with_their_prior(epochs):
    """After each epoch the prior is that of the stage which the epoch was trained in."""
    objective = objective_of(load_recipe("digits-lt", method="ldam-drw", effective_beta=1), (9, 4, 1))
    for epoch in range(epochs):
        objective.begin_epoch(epoch, epochs)
        weights = dict(objective.named_buffers())["weights_C"]
        expected = (weights * torch.tensor([9, 4, 1]) / 14).log()
        assert torch.allclose(objective.log_prior_of_logits((epoch + 1) / epochs), expected)


@pytest.mark.parametrize(("progress", "prior"), [(0.8, [9, 4, 1]), (0.81, [1, 1, 1])])
def test_logits_of_ldam_are_for_the_prior_of_their_stage(progress, prior):
    objective = objective_of(load_recipe("digits-lt", method="ldam-drw", effective_beta=1), (9, 4, 1))
    found = objective.log_prior_of_logits(progress).exp()
    assert (found / found[2]).tolist() == pytest.approx(prior)


# ---- what the remedies would do, against closed forms worked out by hand


def figures(remedy: str, counts: list[int], beta: float = 0.9999) -> np.ndarray:
    return next(figures_C.numpy() for name, figures_C, _ in remedies(counts, beta) if name.strip() == remedy)


def test_weights_go_by_one_over_n_with_mean_one():
    assert figures("class weights 1/n", [1, 2, 4]) == pytest.approx([12 / 7, 6 / 7, 3 / 7])


def test_effective_numbers_by_the_geometric_series():
    """E_n = 1 + beta + ... + beta^(n - 1); of few images, nearly their number."""
    series = [sum(0.5**power for power in range(count)) for count in (1, 2, 3)]  # 1, 3/2, 7/4
    inverse = [1 / number for number in series]
    found = figures("by effective number", [1, 2, 3], beta=0.5)
    assert found == pytest.approx([3 * w / sum(inverse) for w in inverse])
    few = [1, 2, 4]
    assert figures("by effective number", few) == pytest.approx(figures("class weights 1/n", few), rel=1e-3)
    assert figures("by effective number", [10**6, 10**7]) == pytest.approx([1, 1])


def test_samplers():
    """Of 100 images in 2 classes, the balanced sampler takes 50 of each; by square roots, 9 : 3 as 81 : 9."""
    assert figures("class-balanced sampler", [90, 10]) == pytest.approx([50 / 90, 50 / 10])
    assert figures("square-root sampler", [81, 9]) == pytest.approx([67.5 / 81, 22.5 / 9])
    for sampler in ("class-balanced sampler", "square-root sampler"):
        assert figures(sampler, [795, 300, 112]) @ [795, 300, 112] == pytest.approx(1207)


def test_margins():
    assert figures("logit adjustment", [100, 50, 1]) == pytest.approx([0, math.log(2), math.log(100)])
