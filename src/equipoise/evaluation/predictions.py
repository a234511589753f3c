"""A network and a list become predictions.

Shapes: N images of the list, B of a batch, C classes, K the classes ranked of each image, T strengths of the prior.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equipoise.base.device import exact_float32, start_reading
from equipoise.base.errors import SharedError, UserError
from equipoise.base.world import ALONE, World
from equipoise.evaluation.metrics import BINS, GROUPS, TAUS, Predictions, shot_group
from equipoise.method.network import TwoBranchNetwork
from equipoise.runs.records import Calibration
from equipoise.views.loader import Batches

_BATCH = 64
_RANKED = 5

Arrays = tuple[npt.NDArray[Any], ...]
Look = Callable[[Tensor, Tensor, Tensor], None]  # at the labels, the encoder's output and the logits of a batch


@torch.inference_mode()
def predict(
    network: TwoBranchNetwork,
    batches: Batches,
    log_prior_C: Tensor | None = None,
    keep_logits: bool = False,
    looks: Sequence[Look] = (),
    world: World = ALONE,
) -> Predictions:
    """Predictions in the order of the list, from the raw logits of one view: no prior is added. With several ranks,
    each computes its batches and all have the whole. The network is left in evaluation mode.

    In float32 whatever the network was trained in, so that a metric depends on the weights and not on the device. With
    `log_prior_C`, what `logits - tau * log prior` would predict is kept too. The logits themselves are kept only if
    asked for: those of a large test set fill gigabytes. `looks` are called with each batch. Raises UserError where no
    image can be read, or the logits are not finite.
    """
    network.eval()
    with exact_float32():
        # An error of one rank is raised on all: the others would else wait for its batches.
        rows = world.each_makes(lambda: _predict_share(network, batches, log_prior_C, keep_logits, looks))
    in_order = world.gather_in_turn(rows)
    if not sum(len(row[0]) for row in in_order):
        raise SharedError("none of the images to score can be read; repair them")
    labels_N, ranked_NK, confidence_N, *further = (np.concatenate(column) for column in zip(*in_order, strict=True))
    logits_NC = further.pop() if keep_logits else None
    adjusted = dict(zip(TAUS, further[0].T, strict=True)) if further else {}
    return Predictions(labels_N, ranked_NK, confidence_N.astype(np.float64), adjusted, logits_NC)


def _predict_share(
    network: TwoBranchNetwork, batches: Batches, log_prior_C: Tensor | None, keep_logits: bool, looks: Sequence[Look]
) -> list[Arrays]:
    """Of each of this rank's batches: labels, ranked classes, confidence, and what else `predict` is asked for."""
    rows: list[Arrays] = []
    pending: list[Callable[[], tuple[Tensor, ...]]] = []
    for batch in batches.evaluation(_BATCH):
        hidden_BF = network.encode(batch.images_VB3SS[0])
        logits_BC: Tensor = network.classifier(hidden_BF)
        for look in looks:
            look(batch.labels_G, hidden_BF, logits_BC)
        # Of equal logits the first class comes first, here and in argmax.
        ranked_BC = logits_BC.sort(dim=1, descending=True, stable=True).indices
        found = [logits_BC.isfinite().all(), batch.labels_G, ranked_BC[:, :_RANKED], logits_BC.softmax(1).amax(1)]
        if log_prior_C is not None:
            prior_C = log_prior_C.to(logits_BC)
            found.append(torch.stack([(logits_BC - tau * prior_C).argmax(1) for tau in TAUS], dim=1))
        if keep_logits:
            found.append(logits_BC)
        pending.append(start_reading(*found))
        if len(pending) > 1:  # the batch before is waited for while a GPU computes this one
            rows.append(_arrays(pending.pop(0)()))
    return rows + [_arrays(read()) for read in pending]


def _arrays(read: tuple[Tensor, ...]) -> Arrays:
    """The arrays of a batch. Raises UserError where its logits are not finite."""
    finite, *found = read
    if not finite:
        raise UserError("the network's logits are not finite, so nothing can be scored; use an earlier checkpoint")
    return tuple(tensor.numpy().copy() for tensor in found)  # pinned memory, which a GPU reads, is scarce


class ClassCalibration:
    """Sums batch by batch, for each class, how far the softmax of the raw logits is from the labels.

    The sums are whole numbers of 2^-30: whatever the order in which ranks add, they are the same to the last bit.
    """

    def __init__(self, classes: int) -> None:
        self._edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64)[1:-1]
        self._gaps_KC = torch.zeros(BINS, classes, dtype=torch.int64)  # label (0 or 1) - probability, by its bin
        self._of_label_3C = torch.zeros(3, classes, dtype=torch.int64)  # images, NLL and Brier score

    def add(self, labels_B: Tensor, _: Tensor, logits_BC: Tensor) -> None:
        """See `Look`."""
        labels_B, logs_BC = labels_B.cpu(), logits_BC.cpu().double().log_softmax(1)
        shares_BC = logs_BC.exp()
        gaps_BC = F.one_hot(labels_B, len(logs_BC.T)) - shares_BC
        # A probability on an edge belongs to the bin below it, as in `calibration_error`.
        self._gaps_KC.scatter_add_(0, torch.bucketize(shares_BC, self._edges), _whole(gaps_BC))
        nll_B = F.nll_loss(logs_BC, labels_B, reduction="none")
        self._of_label_3C.index_add_(
            1, labels_B, _whole(torch.stack([torch.ones_like(nll_B), nll_B, gaps_BC.square().sum(1)]))
        )

    def by_group(self, train_counts_C: Sequence[int], world: World) -> dict[str, Calibration]:
        """Of 'all' classes and of each shot group that has images: see `Calibration`. All ranks call it."""
        gaps_KC, (images_C, *sums) = (
            world.sum(whole).double().numpy() / _WHOLE for whole in (self._gaps_KC, self._of_label_3C)
        )
        seen_C = images_C > 0
        means = [np.abs(gaps_KC).sum(0) / images_C.sum(), *(sum_C / np.maximum(images_C, 1) for sum_C in sums)]
        groups_C = np.array([shot_group(count) for count in train_counts_C] or [""] * len(images_C))
        found: dict[str, Calibration] = {}
        for group in ("all", *GROUPS):
            chosen_C = seen_C & ((groups_C == group) | (group == "all"))
            if chosen_C.any():
                ece, nll, brier = (float(mean_C[chosen_C].mean()) for mean_C in means)
                found[group] = {"classwise_ece": ece, "nll": nll, "brier": brier}
        return found


_WHOLE = 2**30


def _whole(values: Tensor) -> Tensor:
    return (values * _WHOLE).round().long()


COSINE_BINS = 200  # of equal width, -1 to 1
_MAPPED = 600  # images at most on the map: their t-SNE takes under 2 s
_ROWS_AT_ONCE = 1024

Table = dict[str, npt.NDArray[Any]]


class Observation:
    """Collects batch by batch what a network shows of one list; with a `temperature`, its confidence at it too."""

    def __init__(self, network: TwoBranchNetwork, train_counts_C: Sequence[int], temperature: float | None) -> None:
        self._network, self._temperature = network, temperature
        self._groups_C = torch.tensor([GROUPS.index(shot_group(count)) for count in train_counts_C])
        self._mapped_of_each = max(1, _MAPPED // len(train_counts_C))
        self._calibrated_B: list[Tensor] = []
        # Of each batch the labels, and the features and rows (within the batch) of those that may be on the map.
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []
        self._mapped_C = torch.zeros(len(train_counts_C), dtype=torch.int64)
        widths = {"encoder": network.width}
        if network.projection is not None:
            widths["contrastive"] = cast("nn.Linear", network.projection[-1]).out_features
        # Of unit features, [C, F] by space.
        self._sums = {
            space: torch.zeros(len(train_counts_C), width, dtype=torch.float64) for space, width in widths.items()
        }

    def add(self, labels_B: Tensor, hidden_BF: Tensor, logits_BC: Tensor) -> None:
        """See `Look`."""
        labels_B, spaces = labels_B.cpu(), {"encoder": hidden_BF}
        if self._network.projection is not None:
            spaces["contrastive"] = self._network.projection(hidden_BF)
        for space, vectors_BF in spaces.items():
            self._sums[space].index_add_(0, labels_B, F.normalize(vectors_BF, dim=1).cpu().double())
        # Of each class its first few images.
        rows_B = torch.nonzero(_place_in_class(labels_B) + self._mapped_C[labels_B] < self._mapped_of_each)[:, 0]
        self._mapped_C += torch.bincount(labels_B, minlength=len(self._mapped_C))
        map_BF = F.normalize(hidden_BF[rows_B.to(hidden_BF.device)], dim=1).half().cpu()
        self._batches.append((labels_B, map_BF, rows_B))
        if self._temperature is not None:
            self._calibrated_B.append(confidence_at(logits_BC, self._temperature).cpu())

    def gather(self, world: World) -> None:
        """Put together what all ranks have collected; they compute batches in turn."""
        self._batches = world.gather_in_turn(self._batches)
        self._calibrated_B = world.gather_in_turn(self._calibrated_B)
        for sums_CF in self._sums.values():
            world.sum(sums_CF)

    def table(self, predictions: Predictions) -> Table:
        """All that the report draws of the list: confidence, geometry by shot group, and how far classes spread.

        `calibrated_N`: as `confidence_N`, at the temperature; absent without one. `*_cosines_GK` counts the cosines
        between a class of the group and every other class, of class means (`encoder_means`, `contrastive_means`: of
        unit features), of the classifier's weights (`classifier`) and of the prototypes (`prototypes`). The encoder's
        means and the classifier's weights have their common mean subtracted: the output of a ReLU has no negative
        cosines otherwise. `*_spread_C`: 1 - the mean cosine between two images of the class; NaN with fewer than two.
        `map_MF`: unit features of the images `map_rows_M`.
        """
        table: Table = {
            "labels_N": predictions.labels_N.astype(np.int32),
            "predicted_N": predictions.ranked_NK[:, 0].astype(np.int32),
            "confidence_N": predictions.confidence_N.astype(np.float32),
        }
        if self._calibrated_B:
            table["calibrated_N"] = torch.cat(self._calibrated_B).numpy()
        labels, maps, rows = zip(*self._batches, strict=True)
        labels_N = torch.cat(labels)
        starts = itertools.accumulate(map(len, labels), initial=0)
        map_rows = torch.cat([rows_B + start for rows_B, start in zip(rows, starts, strict=False)])
        # Each rank has kept the first images of its own batches.
        kept = torch.nonzero(_place_in_class(labels_N[map_rows]) < self._mapped_of_each)[:, 0]
        # Of more classes than a map can show, evenly many.
        shown_M = kept[torch.linspace(0, len(kept) - 1, min(_MAPPED, len(kept))).long()]
        table |= {"map_MF": torch.cat(maps)[shown_M].numpy(), "map_rows_M": map_rows[shown_M].numpy()}
        counts_C = torch.bincount(labels_N, minlength=len(self._groups_C)).double()
        seen_C = counts_C > 0
        for space, sums_CF in self._sums.items():
            table[f"{space}_spread_C"] = _spread(sums_CF, counts_C)
            means_CF = sums_CF[seen_C] / counts_C[seen_C, None]
            centred = space == "encoder"
            table[f"{space}_means_cosines_GK"] = count_cosines(means_CF, self._groups_C[seen_C], centred)
        with torch.inference_mode():
            weights_CF, projection = self._network.classifier.weight, self._network.prototype_projection
            table["classifier_cosines_GK"] = count_cosines(weights_CF.cpu(), self._groups_C, True)
            if projection is not None:
                table["prototypes_cosines_GK"] = count_cosines(projection(weights_CF).cpu(), self._groups_C, False)
        return table


def _place_in_class(labels_B: Tensor) -> Tensor:
    """For each image, how many before it have its label."""
    order = labels_B.argsort(stable=True)
    first = torch.searchsorted(labels_B[order], labels_B[order])
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order)) - first)


def confidence_at(logits_NC: Tensor, temperature: float) -> Tensor:
    """The largest softmax probability of `logits / temperature`, a piece at a time."""
    return torch.cat([(rows / temperature).softmax(1).amax(1) for rows in logits_NC.split(_ROWS_AT_ONCE)])


def count_cosines(vectors_CF: Tensor, groups_C: Tensor, centred: bool) -> npt.NDArray[np.int64]:
    """[G, K]: how many cosines between a vector of a class of that group and the vector of another class fall into each
    of `COSINE_BINS`; if `centred`, after subtracting the mean of all vectors."""
    vectors_CF = vectors_CF.float()
    units_CF = F.normalize(vectors_CF - vectors_CF.mean(0) if centred else vectors_CF, dim=1)
    counts_GK = torch.zeros(len(GROUPS), COSINE_BINS, dtype=torch.int64)
    for group, row_GK in enumerate(counts_GK):
        for rows in torch.nonzero(groups_C == group)[:, 0].split(_ROWS_AT_ONCE):
            cosines = (units_CF[rows] @ units_CF.T).clamp_(-1, 1)
            itself = cosines[torch.arange(len(rows)), rows]
            # Exact in float32: a piece has fewer than 2^24 cosines, of up to 16,384 classes.
            all_K, own_K = (torch.histc(values, COSINE_BINS, -1, 1) for values in (cosines, itself))
            row_GK += (all_K - own_K).long()
    return counts_GK.numpy()


def _spread(sums_CF: Tensor, counts_C: Tensor) -> npt.NDArray[np.float32]:
    """1 - the mean cosine of the n (n - 1) ordered pairs of unit vectors; |sum of the vectors|^2 - n is their total."""
    pairs_C = counts_C * (counts_C - 1)
    cosine_C = (sums_CF.double().square().sum(1) - counts_C) / pairs_C
    return torch.where(pairs_C > 0, 1 - cosine_C, torch.nan).float().numpy()
