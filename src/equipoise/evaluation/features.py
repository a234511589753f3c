"""The features of an encoder. Of a frozen one they are computed once: a file for each list, encoder and view, mapped
into memory. Of the training images, those nearest to others: beside a mistake, a wrong label shows at once.

Shapes: N images, F width of the encoder, V views of a batch of B images; M images asked about, K neighbours of each.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.format import open_memmap
from torch import Tensor

from equipoise.base.device import exact_float32
from equipoise.base.errors import SharedError, UserError
from equipoise.base.files import atomic_file, cache_folder
from equipoise.base.progress import ProgressLine
from equipoise.base.world import ALONE, World
from equipoise.config.recipe import Recipe
from equipoise.data.decode import BadImageError, in_order, stand_in
from equipoise.data.images import ImageFiles, ImageList, Indices, Parts, TarImages
from equipoise.evaluation.none_of_these import KnownClasses, know_classes
from equipoise.evaluation.predictions import Table
from equipoise.method.network import TwoBranchNetwork
from equipoise.views.loader import Batch, Batches, Maker, Task, open_recipe_batches
from equipoise.views.views import view_settings

_BATCH = 16  # images at a time: as fast as more, in less memory
_MISTAKES, _NEIGHBOURS = 12, 4  # that the report shows

Nearest = tuple[Tensor, Tensor]  # cosines [M, K], the highest first, and rows of the training part
_WHOLE = 2**30  # sums in whole numbers of 2^-30 are the same in whatever order ranks add


def open_encoded_batches(
    recipe: Recipe, images: ImageList, network: TwoBranchNetwork, device: torch.device, world: World
) -> Batches:
    """Batches of images under the recipe's views or, where its encoder is frozen, of the features of their evaluation
    views, which `Batches.prepare` computes."""
    if recipe.model.tune != "frozen":
        return open_recipe_batches(recipe, images, device, world)
    return Batches(_FeatureMaker(recipe, images, network), device, 0, world)


class _FeatureMaker(Maker):
    """Makes batches of features `[V, B, F]`, the same for all views."""

    def __init__(self, recipe: Recipe, images: ImageList, network: TwoBranchNetwork) -> None:
        self.in_memory = True
        self.bad: dict[int, BadImageError] = {}
        self.labels_N = images.labels_N
        self.settings = view_settings(recipe)
        self._recipe, self._images, self._network = recipe, images, network

    def prepare(self, world: World, look: Callable[[], None]) -> None:
        """Compute what is not in the file yet. `look` is called now and then, and may raise."""
        self._features_NF, self.bad = compute_features(self._recipe, self._images, self._network, world, look)

    def _training(self, task: Task) -> Batch:
        rows_B: list[int] = task.indices_G[task.here].tolist()
        for place, row in enumerate(rows_B):
            if row in self.bad:
                rows_B[place] = stand_in(self._images, row, lambda other: None if other in self.bad else other)
        features_VBF = self._features_NF[rows_B].expand(len(self.settings.kinds), -1, -1)
        return Batch(features_VBF, torch.from_numpy(self.labels_N[task.indices_G]), task.rows)

    def _evaluation(self, indices_B: Indices) -> Batch:
        good = [index for index in indices_B.tolist() if index not in self.bad]
        bad = {index: error for index, error in self.bad.items() if index in indices_B}
        return Batch(self._features_NF[good][None], torch.from_numpy(self.labels_N[good]), slice(0, len(good)), bad)


def compute_features(
    recipe: Recipe, images: ImageList, network: TwoBranchNetwork, world: World, look: Callable[[], None] = lambda: None
) -> tuple[Tensor, dict[int, BadImageError]]:
    """The encoder's features `[N, F]`, float32, mapped from their file, and the images that cannot be read. Rows that
    are not computed yet are NaN, so that what was interrupted goes on. The ranks of a machine share the work, and all
    ranks call it."""
    source = images.images
    if isinstance(source, ImageFiles) and source.url:  # the file is named by the copies, which must be there
        world.each_makes(lambda: _copy(source, range(world.local_rank, len(images), world.local_size), look))
    file = _file(recipe, images, network)
    if world.local_rank == 0 and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as opened:
            np.lib.format.write_array(opened, np.full((len(images), network.width), np.nan, np.float32))
    world.gather_objects(None)
    written_NF = open_memmap(file, mode="r+")
    todo = np.flatnonzero(np.isnan(written_NF[:, 0]))[world.local_rank :: world.local_size]
    shown, device, done = world.is_first and len(todo) > 0, next(network.parameters()).device, 0
    network.eval()
    with (
        closing(open_recipe_batches(recipe, images, device, world)) as batches,
        closing(ProgressLine(0, len(todo), "image", shown)) as line,
        exact_float32(),
    ):
        for batch, rows in batches.evaluation_of(todo, _BATCH):
            look()
            with torch.inference_mode():
                written_NF[rows] = network.encode(batch.images_VB3SS[0]).cpu().numpy()
            done += len(rows) + len(batch.bad)
            line.update(done, "features of the encoder")
    written_NF.flush()
    of_ranks = world.gather_objects(batches.bad)  # then all rows are there
    features_NF = torch.from_numpy(np.load(file, mmap_mode="c"))  # torch warns of arrays that cannot be written
    return features_NF, {index: error for of_rank in of_ranks for index, error in of_rank.items()}


def _copy(files: ImageFiles, share: range, look: Callable[[], None]) -> None:
    """Copy these images from their URL, where they are not here yet."""

    def there(index: int) -> None:
        with contextlib.suppress(FileNotFoundError):  # it is a bad image
            files.path(index)

    with closing(ProgressLine(0, len(share), "image", share.start == 0)) as line:
        for done, _ in enumerate(in_order(there, share, threads=8), 1):
            look()
            line.update(done, "copied")


def class_means(
    recipe: Recipe, images: ImageList, network: TwoBranchNetwork, world: World, look: Callable[[], None]
) -> Tensor:
    """`[C, F]`: of each class the mean of its images' features, each of length 1. All ranks call it."""
    features_NF, _ = compute_features(recipe, images, network, world, look)

    def means() -> Tensor:
        sums_CF = torch.zeros(len(images.class_names), network.width)
        pieces = (of_N.split(4096) for of_N in (features_NF, torch.from_numpy(images.labels_N)))
        for rows_RF, labels_R in zip(*pieces, strict=True):
            units_RF = torch.nan_to_num(F.normalize(rows_RF, dim=1))  # of a bad image there are none
            sums_CF.index_add_(0, labels_R, units_RF)
        return sums_CF / torch.tensor(images.class_counts)[:, None]

    return world.first_makes(means)


def missing_features(recipe: Recipe, images: ImageList, network: TwoBranchNetwork) -> int:
    """How many images have no features in the file yet."""
    file = _file(recipe, images, network)
    return int(np.isnan(np.load(file, mmap_mode="r")[:, 0]).sum()) if file.exists() else len(images)


def _file(recipe: Recipe, images: ImageList, network: TwoBranchNetwork) -> Path:
    """Named by what the features follow from: the images (of files and tars also size and time of change), encoder,
    weights and view."""
    hasher = hashlib.sha256(images.fingerprint().encode())
    if isinstance(source := images.images, ImageFiles | TarImages):
        names = source.tars if isinstance(source, TarImages) else map(os.fsdecode, source.paths_N.tolist())
        for name in names:
            hasher.update(b",")
            with contextlib.suppress(OSError):  # it is a bad image, or not copied yet
                status = os.stat(source.root / name if isinstance(source, ImageFiles) else name)
                hasher.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    views = recipe.views
    hasher.update(f"{recipe.model.encoder} {views.policy} {views.size} {views.mean} {views.std}".encode())
    for name, tensor in network.encoder.state_dict().items():
        if name.endswith((".0.a", ".0.b")):  # of LoRA: at the start they add nothing
            continue
        hasher.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return cache_folder("features") / f"{hasher.hexdigest()}.npy"


@torch.inference_mode()
def nearest(
    network: TwoBranchNetwork, train: Batches, asked_MF: Tensor, k: int, world: World = ALONE
) -> tuple[Nearest, Tensor]:
    """The `k` images of `train` whose features have the highest cosines with those asked about; of equal ones, the
    first of the list. And `[C, F]`, the direction of each class's mean, of features of length 1. The ranks share the
    images."""
    asked_MF = F.normalize(asked_MF, dim=1)
    sums_CF = torch.zeros(network.classifier.weight.shape, dtype=torch.int64)
    best = torch.empty(len(asked_MF), 0), torch.empty(len(asked_MF), 0, dtype=torch.int64)
    share = np.arange(len(train))[world.rank :: world.size]
    with exact_float32():
        for batch, rows in train.evaluation_of(share, _BATCH):
            units_BF = F.normalize(network.encode(batch.images_VB3SS[0]), dim=1)
            sums_CF.index_add_(0, batch.labels_G.cpu(), (units_BF.cpu().double() * _WHOLE).round().long())
            cosines_MB = asked_MF @ units_BF.T
            rows_MB = torch.from_numpy(rows).expand(len(asked_MF), -1)
            best = _highest([best, (cosines_MB.cpu(), rows_MB)], k)
    return _highest(world.gather_objects(best), k), F.normalize(world.sum(sums_CF).double(), dim=1)


def _highest(found: Sequence[Nearest], k: int) -> Nearest:
    cosines, rows = (torch.cat(columns, dim=1) for columns in zip(*found, strict=True))
    order_MK = cosines.argsort(dim=1, descending=True, stable=True)[:, :k]
    return cosines.gather(1, order_MK), rows.gather(1, order_MK)


@torch.inference_mode()
def look_at_training(
    network: TwoBranchNetwork, parts: Mapping[str, Batches], observed: Table, world: World
) -> KnownClasses | None:
    """Add to what rank 0 `observed` of the part that speaks for the run: the rows of its surest mistakes
    (`mistakes_M`) and, for each, of the nearest training images (`neighbours_MK`); not where images could not be read,
    so that which row is which image is not known. Return what tells images of no class, if there is a validation part.
    All ranks call it."""
    part = "test" if "test" in parts else "validation"
    if "train" not in parts or part not in parts:
        return None

    def surest() -> Indices:
        labels_N, predicted_N, sure_N = (observed[f"{part}/{key}_N"] for key in ("labels", "predicted", "confidence"))
        wrong = np.flatnonzero(labels_N != predicted_N) if len(labels_N) == len(parts[part]) else np.empty(0, np.int64)
        return wrong[np.argsort(-sure_N[wrong], kind="stable")][:_MISTAKES]

    rows_M = world.first_makes(surest)
    asked = [torch.empty(0, network.width, device=network.classifier.weight.device)]
    with exact_float32():
        asked += [network.encode(batch.images_VB3SS[0]) for batch, _ in parts[part].evaluation_of(rows_M, _BATCH)]
    (_, neighbours_MK), means_CF = nearest(network, parts["train"], torch.cat(asked), _NEIGHBOURS, world)
    if len(rows_M):
        observed |= {f"{part}/mistakes_M": rows_M, f"{part}/neighbours_MK": neighbours_MK.numpy()}
    return know_classes(means_CF, network, parts["validation"], world) if "validation" in parts else None


def known_classes_of(recipe: Recipe, network: TwoBranchNetwork, parts: Parts, world: World) -> KnownClasses:
    """What tells images of no class, of any run: its training images are encoded for it. Raises UserError where there
    is no validation part, or too small a one, to choose the threshold."""
    if parts.validation is None:
        raise UserError("the run has no validation part, by which to tell images of no class; train with --holdout 0.1")
    device = next(network.parameters()).device
    with (
        closing(open_encoded_batches(recipe, parts.train, network, device, world)) as train,
        closing(open_encoded_batches(recipe, parts.validation, network, device, world)) as validation,
    ):
        train.prepare()
        validation.prepare()
        _, means_CF = nearest(network, train, torch.empty(0, network.width, device=device), 0, world)
        known = know_classes(means_CF, network, validation, world)
    if known is None:
        few = f"{len(parts.validation)} validation images are too few"
        raise SharedError(f"{few} to tell images of no class; hold out 20 or more")
    return known
