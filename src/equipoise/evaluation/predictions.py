"""A network and a list become predictions.

Shapes: N images of the list, B of a batch, C classes, K the classes ranked of each image, T strengths of the prior.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from equipoise.base.device import exact_float32
from equipoise.base.errors import SharedError, UserError, reason
from equipoise.base.files import atomic_file
from equipoise.base.world import ALONE, World
from equipoise.evaluation.metrics import BINS, GROUPS, TAUS, Predictions, figure_weights, shot_group
from equipoise.method.network import TwoBranchNetwork
from equipoise.runs.records import Calibration
from equipoise.views.loader import Batches

COSINE_BINS = 200  # of equal width, -1 to 1
_BATCH = 64
_RANKED = 5
_WHOLE = 2**30
_MAPPED = 600  # images at most on the map: their t-SNE takes under 2 s
_ROWS_AT_ONCE = 1024

Arrays = tuple[npt.NDArray[Any], ...]
Table = dict[str, npt.NDArray[Any]]
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
    """Predictions in the order of the list, from the raw logits of one view, in float32 whatever the training was in.
    Each rank computes its batches, and all have the whole. The network is left in evaluation mode. With `log_prior_C`,
    what `logits - tau * log prior` would predict is kept too; the logits only if asked for: those of a large test set
    fill gigabytes. `looks` are called with each batch. Raises UserError where no image can be read, or the logits are
    not finite."""
    network.eval()

    def share() -> list[Arrays]:
        """Of each of this rank's batches: labels, ranked classes, confidence, and what else is asked for."""
        rows: list[Arrays] = []
        for batch in batches.evaluation(_BATCH):
            hidden_BF = network.encode(batch.images_VB3SS[0])
            logits_BC: Tensor = network.classifier(hidden_BF)
            if not logits_BC.isfinite().all():
                raise UserError("the network's logits are not finite: nothing can be scored; use an earlier checkpoint")
            for look in looks:
                look(batch.labels_G, hidden_BF, logits_BC)
            # Of equal logits the first class comes first, here and in argmax.
            ranked_BC = logits_BC.sort(dim=1, descending=True, stable=True).indices
            found = [batch.labels_G, ranked_BC[:, :_RANKED], logits_BC.softmax(1).amax(1)]
            if log_prior_C is not None:
                prior_C = log_prior_C.to(logits_BC)
                found.append(torch.stack([(logits_BC - tau * prior_C).argmax(1) for tau in TAUS], dim=1))
            if keep_logits:
                found.append(logits_BC)
            rows.append(tuple(tensor.cpu().numpy() for tensor in found))
        return rows

    with exact_float32():
        # An error of one rank is raised on all: the others would else wait for its batches.
        in_order = world.gather_in_turn(world.each_makes(share))
    labels_N, ranked_NK, confidence_N, *further = (np.concatenate(column) for column in zip(*in_order, strict=True))
    if not len(labels_N):
        raise SharedError("none of the images to score can be read; repair them")
    logits_NC = further.pop() if keep_logits else None
    adjusted = dict(zip(TAUS, further[0].T, strict=True)) if further else {}
    return Predictions(labels_N, ranked_NK, confidence_N.astype(np.float64), adjusted, logits_NC)


class ClassCalibration:
    """Sums batch by batch, for each class, how far the softmax of the raw logits is from the labels. The sums are whole
    numbers of 2^-30: whatever the order in which ranks add, they are the same to the last bit."""

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
        bins_BC, nll_B = torch.bucketize(shares_BC, self._edges), F.nll_loss(logs_BC, labels_B, reduction="none")
        self._gaps_KC.scatter_add_(0, bins_BC, (gaps_BC * _WHOLE).round().long())
        of_label_3B = torch.stack([torch.ones_like(nll_B), nll_B, gaps_BC.square().sum(1)])
        self._of_label_3C.index_add_(1, labels_B, (of_label_3B * _WHOLE).round().long())

    def by_group(self, train_counts_C: Sequence[int], world: World) -> dict[str, Calibration]:
        """Of 'all' classes and of each shot group that has images: see `Calibration`. All ranks call it."""
        gaps_KC, (images_C, *sums) = (
            world.sum(whole).double().numpy() / _WHOLE for whole in (self._gaps_KC, self._of_label_3C)
        )
        means = [np.abs(gaps_KC).sum(0) / images_C.sum(), *(sum_C / np.maximum(images_C, 1) for sum_C in sums)]
        found: dict[str, Calibration] = {}
        for figure, of_C in figure_weights(images_C.astype(np.int64), train_counts_C).items():
            if figure != "top1":
                group = "all" if figure == "mean_per_class" else figure
                ece, nll, brier = (float(mean_C[of_C > 0].mean()) for mean_C in means)
                found[group] = {"classwise_ece": ece, "nll": nll, "brier": brier}
        return found


class Observation:
    """Collects batch by batch what a network shows of one list; with a `temperature`, its confidence at it too."""

    def __init__(self, network: TwoBranchNetwork, train_counts_C: Sequence[int], temperature: float | None) -> None:
        classes = len(train_counts_C)
        self._network, self._temperature = network, temperature
        self._groups_C = torch.tensor([GROUPS.index(shot_group(count)) for count in train_counts_C])
        self._mapped_of_each, self._seen_C = max(1, _MAPPED // classes), torch.zeros(classes, dtype=torch.int64)
        # Of each batch labels, confidence at the temperature, which images may be on the map, and their features.
        self._batches: list[tuple[Tensor, ...]] = []
        self._sums = {  # of unit features, [C, F] by space
            space: torch.zeros(classes, vectors_1F.shape[1], dtype=torch.float64)
            for space, vectors_1F in self._spaces(network.classifier.weight[:1]).items()
        }

    def _spaces(self, hidden_BF: Tensor) -> dict[str, Tensor]:
        """The features of these outputs of the encoder, by space."""
        projection = self._network.projection
        return {"encoder": hidden_BF} | ({} if projection is None else {"contrastive": projection(hidden_BF)})

    def add(self, labels_B: Tensor, hidden_BF: Tensor, logits_BC: Tensor) -> None:
        """See `Look`."""
        labels_B = labels_B.cpu()
        for space, vectors_BF in self._spaces(hidden_BF).items():
            self._sums[space].index_add_(0, labels_B, F.normalize(vectors_BF, dim=1).cpu().double())
        # Of each class its first few images.
        mapped_B = _place_in_class(labels_B) + self._seen_C[labels_B] < self._mapped_of_each
        self._seen_C += torch.bincount(labels_B, minlength=len(self._seen_C))
        map_MF = F.normalize(hidden_BF[mapped_B.to(hidden_BF.device)], dim=1).half().cpu()
        temperature = self._temperature
        calibrated_B = torch.empty(0) if temperature is None else confidence_at(logits_BC, temperature).cpu()
        self._batches.append((labels_B, calibrated_B, mapped_B, map_MF))

    def table(self, predictions: Predictions, world: World = ALONE) -> Table:
        """All that the report draws of the list: confidence, geometry by shot group, and how far classes spread. All
        ranks call it, rank 0 alone has it.

        `calibrated_N`: as `confidence_N`, at the temperature; absent without one. `*_cosines_GK` counts the cosines
        between a class of the group and every other class, of class means (`encoder_means`, `contrastive_means`: of
        unit features), of the classifier's weights (`classifier`) and of the prototypes (`prototypes`). The encoder's
        means and the classifier's weights have their common mean subtracted: the output of a ReLU has no negative
        cosines otherwise. `*_spread_C`: 1 - the mean cosine between two images of the class; NaN with fewer than two.
        `map_MF`: unit features of the images `map_rows_M`.
        """
        batches = world.gather_in_turn(self._batches)
        for sums_CF in self._sums.values():
            world.sum(sums_CF)
        if not world.is_first:
            return {}
        table: Table = {
            "labels_N": predictions.labels_N.astype(np.int32),
            "predicted_N": predictions.ranked_NK[:, 0].astype(np.int32),
            "confidence_N": predictions.confidence_N.astype(np.float32),
        }
        labels_N, calibrated_N, mapped_N, map_MF = map(torch.cat, zip(*batches, strict=True))
        if len(calibrated_N):
            table["calibrated_N"] = calibrated_N.numpy()
        rows_M = torch.nonzero(mapped_N)[:, 0]
        # Each rank has kept the first images of its own batches.
        first = torch.nonzero(_place_in_class(labels_N[rows_M]) < self._mapped_of_each)[:, 0]
        # Of more classes than a map can show, evenly many.
        shown = first[torch.linspace(0, len(first) - 1, min(_MAPPED, len(first))).long()]
        table |= {"map_MF": map_MF[shown].numpy(), "map_rows_M": rows_M[shown].numpy()}
        counts_C = torch.bincount(labels_N, minlength=len(self._groups_C)).double()
        seen_C, pairs_C = counts_C > 0, counts_C * (counts_C - 1)
        for space, sums_CF in self._sums.items():
            cosine_C = (sums_CF.square().sum(1) - counts_C) / pairs_C  # |sum of n units|^2 - n: the total of all pairs
            table[f"{space}_spread_C"] = torch.where(pairs_C > 0, 1 - cosine_C, torch.nan).float().numpy()
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


def to_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write them as NumPy's .npz, which is complete or not there at all."""
    with atomic_file(path) as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType] no key is its own argument


def read_observed(file: Path, part: str) -> Table:
    """The arrays of a part in a run's `observed.npz`. Raises UserError where it is missing or damaged."""
    try:
        with np.load(file) as arrays:  # which executes nothing in it
            return {key.removeprefix(f"{part}/"): arrays[key] for key in arrays.files if key.startswith(f"{part}/")}
    except Exception as error:  # numpy, zipfile and zlib raise errors of many kinds
        fault = f"{file} is {'missing' if isinstance(error, FileNotFoundError) else f'damaged ({reason(error)})'}"
        raise UserError(f"{fault}; write it anew: equipoise evaluate {file.parent}") from None
