"""The objective of each method, against its formula."""

from dataclasses import replace

import pytest
import torch

from equipoise import BalancedContrastiveLoss, load_recipe
from equipoise.method.losses import log_prior, logit_adjusted_cross_entropy, supervised_contrastive_loss
from equipoise.method.network import Outputs
from equipoise.training.step import loss_terms


@pytest.mark.parametrize("method", ["bcl", "supcon+la", "logit-adjusted", "ce"])
def test_methods_are_their_formulas(method):
    random = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(6, 2, 4, generator=random), dim=-1)
    prototypes = torch.nn.functional.normalize(torch.randn(3, 4, generator=random), dim=-1)
    logits, labels = torch.randn(6, 3, generator=random), torch.tensor([0, 0, 0, 1, 1, 2])
    prior = log_prior(torch.tensor((50, 10, 2)))
    adjusted = logit_adjusted_cross_entropy(logits, labels, prior, 1.3)
    expected = {
        "bcl": 1.5 * adjusted + 0.7 * BalancedContrastiveLoss(0.2)(features, labels, prototypes),
        "supcon+la": 1.5 * adjusted + 0.7 * supervised_contrastive_loss(features, labels, 0.2),
        "logit-adjusted": adjusted,
        "ce": torch.nn.functional.cross_entropy(logits, labels),
    }[method]
    recipe = replace(load_recipe("digits-lt", alpha=1.5, beta=0.7, temperature=0.2, tau=1.3), method=method)
    terms = loss_terms(recipe, prior, Outputs(logits, features, prototypes), labels, slice(0, 6))
    assert terms["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
