"""k-positive contrastive learning (Kang et al., ICLR 2021) and its targeted form (TSC: Li et al., CVPR 2022).

Both were published with a queue of momentum features; here, as for BCL, the columns are those of the batch. And TSC's
authors assign points to classes at every step; here it is done at each epoch's start.
Shapes: G images of the whole batch, V contrastive views, K = V * G features, N of them anchors, M columns, C classes,
D width of the features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equipoise.method.losses import ALL, flat
from equipoise.method.objective import Outputs, TwoBranch


def k_positive_loss(
    features_GVD: Tensor,
    labels_G: Tensor,
    temperature: float,
    seed: int,
    rows: slice = ALL,
    targets_CD: Tensor | None = None,
    positives: int = 6,
) -> Tensor:
    """The mean over all features of the supervised contrastive loss with few positives: the other views of the image
    and `positives` further features of its class, drawn for each anchor (Kang et al., eq. 4), fewer where there are not
    so many; so that no class dominates. With `targets_CD`, one point a class, they are columns too, and each anchor's
    own one is a further positive, of weight 0.2 (Li et al., eq. 5). `rows`: see `balanced_contrastive_loss`."""
    features_KD, labels_K, anchors = flat(features_GVD, labels_G, rows)
    columns_MD = features_KD if targets_CD is None else torch.cat([features_KD, targets_CD.to(features_KD)])
    scores_NM = features_KD[anchors] @ columns_MD.T / temperature
    scores_NM = scores_NM.diagonal_scatter(torch.full_like(scores_NM[:, 0], -torch.inf), anchors.start)
    log_shares_NM = scores_NM.log_softmax(1)
    drawn_NK = _draw(labels_K, features_GVD.shape[1], positives, seed)[anchors]
    count_N = drawn_NK.sum(1)
    total_N = log_shares_NM[:, : len(labels_K)].where(drawn_NK, 0).sum(1)
    if targets_CD is not None:
        own_N1 = len(labels_K) + labels_K[anchors][:, None]
        total_N = total_N + 0.2 * log_shares_NM.gather(1, own_N1)[:, 0]
        count_N = count_N + 1
    return -(total_N / count_N.clamp(min=1)).sum() / len(labels_K)


def _draw(labels_K: Tensor, views: int, positives: int, seed: int) -> Tensor:
    """`[K, K]`: the positives of each feature."""
    features = len(labels_K)
    random = torch.rand(features, features, generator=torch.Generator().manual_seed(seed)).to(labels_K.device)
    images_K = torch.arange(features, device=labels_K.device) // views
    same_image_KK = images_K[:, None] == images_K
    candidates_KK = (labels_K[:, None] == labels_K) & ~same_image_KK
    chosen = random.where(candidates_KK, -1).topk(min(positives, features), dim=1).indices
    drawn_KK = torch.zeros_like(candidates_KK).scatter_(1, chosen, True) & candidates_KK
    return (drawn_KK | same_image_KK).fill_diagonal_(False)


class Kcl(TwoBranch):
    """Logit-adjusted cross-entropy and, beside it, the supervised contrastive loss with six positives for each anchor
    (Kang et al., ICLR 2021)."""

    records = False

    def contrast(self, outputs: Outputs, labels_G: Tensor, rows: slice) -> Tensor:
        return k_positive_loss(outputs.features_BVD, labels_G, self.settings.temperature, self.seed, rows)


def spread_points(count: int, width: int, device: torch.device | None = None) -> Tensor:
    """`[count, width]`: points far apart on the unit sphere. Up to width + 1 of them are a simplex; of more, each is
    moved a hundred times away from the others, mostly from its nearest: that descends the mean log of the sum of
    exp(2 * cosine) (Li et al., eq. 3, at another temperature)."""
    if count <= width + 1:
        centred = torch.eye(count) - 1 / count
        basis = torch.linalg.svd(centred)[0][:, : max(count - 1, 1)]  # each row a corner, in count - 1 dimensions
        return F.pad(F.normalize(basis, dim=1), (0, width - basis.shape[1]))
    random = torch.randn(count, width, generator=torch.Generator().manual_seed(0))
    points = F.normalize(random.to(device), dim=1)
    for step in range(100):
        pull = torch.softmax((2 * points @ points.T).fill_diagonal_(-torch.inf), 1) @ points
        points = F.normalize(points - (1 - step / 100) * pull, dim=1)
    return points


class Tsc(Kcl):
    """KCL with a pull of the features to one point a class (Li et al., CVPR 2022). The points are spread evenly over
    the sphere and assigned to the classes by the means of their features, anew at each epoch's start."""

    def build(self, width: int) -> None:
        self.targets_CD, self.means_CD = (nn.Buffer(torch.zeros(len(self.counts_C), width)) for _ in range(2))

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        if not self.targets_CD.any():
            width, device = self.targets_CD.shape[1], self.targets_CD.device
            self.targets_CD.copy_(spread_points(len(self.counts_C), width, device))
            return
        from scipy.optimize import linear_sum_assignment

        _, order = linear_sum_assignment(-(self.means_CD @ self.targets_CD.T).cpu().double().numpy())
        self.targets_CD.copy_(self.targets_CD[torch.from_numpy(order).to(self.targets_CD.device)])

    def contrast(self, outputs: Outputs, labels_G: Tensor, rows: slice) -> Tensor:
        # Move the mean of each class that is there a tenth of the way to that of its features.
        there_C = torch.zeros_like(self.counts_C).index_fill_(0, labels_G, 1)[:, None].to(self.means_CD)
        sums_GD = outputs.features_BVD.detach().sum(1).to(self.means_CD)
        sums_CD = torch.zeros_like(self.means_CD).index_add_(0, labels_G, sums_GD)
        moved_CD = F.normalize(0.9 * self.means_CD + (1 - 0.9) * F.normalize(sums_CD, dim=1), dim=1)
        self.means_CD.lerp_(moved_CD, there_C)
        how = self.settings.temperature, self.seed, rows, self.targets_CD
        return k_positive_loss(outputs.features_BVD, labels_G, *how)
