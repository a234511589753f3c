"""The features of a frozen encoder, computed once: a file for each list, encoder and view, mapped into memory.

Shapes: N images, F width of the encoder, V views of a batch of B images.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from numpy.lib.format import open_memmap
from torch import Tensor

from equipoise.base.device import exact_float32
from equipoise.base.files import atomic_file
from equipoise.base.progress import ProgressLine
from equipoise.base.world import World
from equipoise.config.recipe import Recipe
from equipoise.data.decode import BadImageError, stand_in
from equipoise.data.images import ImageFiles, ImageList, Indices
from equipoise.method.network import TwoBranchNetwork
from equipoise.views.loader import Batch, Batches, Maker, Task, open_recipe_batches
from equipoise.views.views import view_settings

_BATCH = 16  # images at a time: as fast as more, in less memory


def open_encoded_batches(
    recipe: Recipe, images: ImageList, network: TwoBranchNetwork, device: torch.device, world: World
) -> Batches:
    """Batches of images under the recipe's views or, where its encoder is frozen, of the features of their evaluation
    views, which `Batches.prepare` computes."""
    batches = open_recipe_batches(recipe, images, device, world)
    if recipe.model.tune != "frozen":
        return batches
    return Batches(_FeatureMaker(recipe, images, network, batches), device, 0, world)


class _FeatureMaker(Maker):
    """Makes batches of features `[V, B, F]`, the same for all views."""

    def __init__(self, recipe: Recipe, images: ImageList, network: TwoBranchNetwork, batches: Batches) -> None:
        self.in_memory = True
        self.bad: dict[int, BadImageError] = {}
        self.labels_N = images.labels_N
        self._recipe, self._images, self._network, self._batches = recipe, images, network, batches
        self.settings = view_settings(recipe)
        self._features_NF: npt.NDArray[np.float32] = np.empty((0, 0), np.float32)

    def prepare(self, world: World, look: Callable[[], None]) -> None:
        """Compute what is not in the file yet. `look` is called now and then, and may raise."""
        with closing(self._batches):
            file, bad = compute_features(self._recipe, self._images, self._network, self._batches, world, look)
        # Each rank has read its share, and waits here for the others, which write into the same file.
        self.bad = {index: error for of_rank in world.gather_objects(bad) for index, error in of_rank.items()}
        self._features_NF = np.load(file, mmap_mode="r")

    def _training(self, task: Task) -> Batch:
        rows_B: list[int] = task.indices_G[task.here].tolist()
        for place, row in enumerate(rows_B):
            if row in self.bad:
                rows_B[place] = stand_in(self._images, row, lambda other: None if other in self.bad else other)
        features_BF = torch.from_numpy(self._features_NF[rows_B])
        labels_G = torch.from_numpy(self._images.labels_N[task.indices_G])
        return Batch(features_BF.expand(len(self.settings.kinds), -1, -1), labels_G, task.rows)

    def _evaluation(self, indices_B: Indices) -> Batch:
        good = [index for index in indices_B.tolist() if index not in self.bad]
        labels_B = torch.from_numpy(self._images.labels_N[good])
        bad = {index: error for index, error in self.bad.items() if index in indices_B}
        return Batch(torch.from_numpy(self._features_NF[good])[None], labels_B, slice(0, len(good)), bad)


def compute_features(
    recipe: Recipe,
    images: ImageList,
    network: TwoBranchNetwork,
    batches: Batches,
    world: World,
    look: Callable[[], None],
) -> tuple[Path, dict[int, BadImageError]]:
    """The file of the encoder's features `[N, F]`, float32, and the images that cannot be read. Rows that are not
    computed yet are NaN, so that what was interrupted goes on. The ranks of a machine share the work: the bad images
    are those of this rank's share."""
    file = _file(recipe, images, network)
    if world.local_rank == 0 and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as opened:
            np.lib.format.write_array(opened, np.full((len(images), network.width), np.nan, np.float32))
    world.gather_objects(None)
    features_NF = open_memmap(file, mode="r+")
    bad: dict[int, BadImageError] = {}
    todo = np.flatnonzero(np.isnan(features_NF[:, 0]))[world.local_rank :: world.local_size]
    network.eval()
    with closing(ProgressLine(0, len(todo), "image", world.is_first and len(todo) > 0)) as line, exact_float32():
        done = 0
        for batch, rows in batches.evaluation_of(todo, _BATCH):
            look()
            with torch.inference_mode():
                features_NF[rows] = network.encode(batch.images_VB3SS[0]).cpu().numpy()
            bad.update(batch.bad)
            done += len(rows) + len(batch.bad)
            line.update(done, "features of the encoder")
    features_NF.flush()
    return file, bad


def class_means(
    recipe: Recipe, images: ImageList, network: TwoBranchNetwork, world: World, look: Callable[[], None]
) -> Tensor:
    """`[C, F]`: of each class the mean of its images' features, each of length 1. All ranks call it."""
    device = next(network.parameters()).device
    with closing(open_recipe_batches(recipe, images, device, world)) as batches:
        file, _ = compute_features(recipe, images, network, batches, world, look)
    world.gather_objects(None)  # each rank has computed its share

    def means() -> Tensor:
        sums_CF = torch.zeros(len(images.class_names), network.width)
        features_NF = np.load(file, mmap_mode="r")
        for start in range(0, len(images), 4096):
            rows_RF = torch.from_numpy(features_NF[start : start + 4096].copy())
            units_RF = torch.nan_to_num(F.normalize(rows_RF, dim=1))  # of a bad image there are none
            sums_CF.index_add_(0, torch.from_numpy(images.labels_N[start : start + 4096]), units_RF)
        return sums_CF / torch.tensor(images.class_counts)[:, None]

    return world.first_makes(means)


def missing_features(recipe: Recipe, images: ImageList, network: TwoBranchNetwork) -> int:
    """How many images have no features in the file yet."""
    file = _file(recipe, images, network)
    return int(np.isnan(np.load(file, mmap_mode="r")[:, 0]).sum()) if file.exists() else len(images)


def _file(recipe: Recipe, images: ImageList, network: TwoBranchNetwork) -> Path:
    """Named by what the features follow from: the images (of files also size and time of change), encoder, weights and
    view."""
    hasher = hashlib.sha256(images.fingerprint().encode())
    if isinstance(images.images, ImageFiles):
        for index in range(len(images)):
            with contextlib.suppress(OSError):  # it is a bad image
                status = os.stat(images.images.path(index))
                hasher.update(f"{status.st_size} {status.st_mtime_ns} ".encode())
    views = recipe.views
    hasher.update(f"{recipe.model.encoder} {views.policy} {views.size} {views.mean} {views.std}".encode())
    for name, tensor in network.encoder.state_dict().items():
        if name.endswith((".0.a", ".0.b")):  # of LoRA: at the start they add nothing
            continue
        hasher.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")  # of what can be computed again
    return cache / "equipoise" / "features" / f"{hasher.hexdigest()}.npy"
