"""The supervised contrastive loss beside a classifier, and its balanced form.

Shapes: G images of the whole batch, V contrastive views, C classes, D width of the features.
"""

from torch import Tensor

from equipoise.method.losses import balanced_contrastive_loss, supervised_contrastive_loss
from equipoise.method.network import Outputs
from equipoise.method.objective import TwoBranch


class SupCon(TwoBranch):
    """Logit-adjusted cross-entropy and, beside it, the supervised contrastive loss (Khosla et al., NeurIPS 2020): BCL
    without averaging and complement."""

    def contrast(self, outputs: Outputs, labels_G: Tensor, rows: slice) -> Tensor:
        assert outputs.features_BVD is not None
        return supervised_contrastive_loss(outputs.features_BVD, labels_G, self.settings.temperature, rows)


class Bcl(TwoBranch):
    """Balanced Contrastive Learning (Zhu et al., CVPR 2022)."""

    prototypes = True

    def contrast(self, outputs: Outputs, labels_G: Tensor, rows: slice) -> Tensor:
        features_GVD, prototypes_CD = outputs.features_BVD, outputs.prototypes_CD
        assert features_GVD is not None
        assert prototypes_CD is not None
        return balanced_contrastive_loss(features_GVD, labels_G, prototypes_CD, self.settings.temperature, rows)
