"""Smaller image lists cut out of a list: the long-tail subsets of the literature, and what is held out of training.
None depends on the training seed, so that runs with different seeds are trained and scored on the same images. Shape
suffixes: N images, C classes."""

import os
import re
import warnings
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from equipoise.base.errors import UserError, several
from equipoise.data.images import ImageFiles, ImageList, Indices, TarImages

_FOLDS_OF_SHARE = 20


def of_classes(full: ImageList) -> list[Indices]:
    """The indices of each class's images, ascending. Sorted once: with many classes, a search for each is slow."""
    order_N = np.argsort(full.labels_N, kind="stable")
    return np.split(order_N, np.cumsum(full.class_counts)[:-1])


def long_tail_counts(largest: int, classes: int, imbalance_factor: float, shape: str) -> list[int]:
    """Images kept of each class (Cao et al., NeurIPS 2019, section 4): of class c `int(largest * (1 / imbalance_factor)
    ** (c / (classes - 1)))`; with the shape 'step', of the second half of them `int(largest * (1 / imbalance_factor))`.
    """
    if shape == "step":
        head = classes // 2
        return [largest] * head + [int(largest * (1 / imbalance_factor))] * (classes - head)
    return [int(largest * (1 / imbalance_factor) ** (c / (classes - 1))) for c in range(classes)]


def long_tailed(full: ImageList, imbalance_factor: float, shape: str) -> ImageList:
    """The benchmark's long-tail subset: numpy's legacy generator with seed 0 shuffles each class's indices in label
    order, and the first n are kept. Which these are depends on the order of `full`: CIFAR has another one as Parquet.
    The largest class keeps as many images as the smallest class of `full` has, so that the shape is exact; but with the
    shape 'by-size' the classes come in the order of their size, and each keeps at most its place's share of the largest
    one. Raises UserError where the smallest class would be left empty."""
    by_size = shape == "by-size"
    largest = max(full.class_counts) if by_size else min(full.class_counts)
    counts_C = np.array(long_tail_counts(largest, len(full.class_names), imbalance_factor, shape))
    if by_size:
        counts_C[np.argsort(np.negative(full.class_counts), kind="stable")] = counts_C.copy()
    counts: list[int] = counts_C.tolist()
    if 0 in counts:
        empty, most = full.class_names[counts.index(0)], max(counts)
        what = f"imbalance factor {imbalance_factor:g} leaves class '{empty}' without images"
        raise UserError(f"{what}; the largest class keeps {most}, so it can be {most} at most")
    generator = np.random.RandomState(0)
    kept: list[Indices] = []
    for indices, count in zip(of_classes(full), counts, strict=True):
        generator.shuffle(indices)
        kept.append(indices[:count])
    return full.take(np.concatenate(kept))


def hold_out(full: ImageList, share: float, fold: str = "") -> tuple[ImageList, ImageList | None]:
    """(training, validation): `share` of each class, rounded: of a tenth, a class of five images keeps all. None where
    all classes are so small. With `fold`, as '2/5', the second of five equal parts instead, of classes with two or more
    images: the five together hold out each image once. Images of one group (`ImageList.groups_N`) stay together. Raises
    UserError where no groups or folds can be made."""
    number, folds = map(int, fold.split("/")) if fold else (0, 0)
    if fold and not 1 <= number <= folds > 1:
        raise UserError(f"data.fold must be the number of a part and of all parts, as 2/5, not '{fold}'")
    if full.groups_N is not None:
        chosen = _of_groups(full, full.groups_N, share, number, folds)
    else:
        generator = np.random.default_rng(0)
        shuffled = [generator.permutation(indices) for indices in of_classes(full)]
        if fold:
            dealt = [indices for indices in shuffled if len(indices) > 1]
            chosen = np.concatenate([np.empty(0, np.int64), *dealt])[number - 1 :: folds]
        else:
            counts = [round(share * count) for count in full.class_counts]
            chosen = np.concatenate([indices[:count] for indices, count in zip(shuffled, counts, strict=True)])
    if len(chosen) == 0 and (fold or full.groups_N is not None):
        what = "images of two groups" if full.groups_N is not None else "two images"
        raise UserError(f"{full.origin}: no class has {what}, so none can be held out; set --holdout 0")
    if len(chosen) == 0:
        return full, None
    return full.take(np.setdiff1d(np.arange(len(full)), chosen)), full.take(np.sort(chosen))


def _of_groups(full: ImageList, groups_N: npt.NDArray[np.str_], share: float, number: int, folds: int) -> Indices:
    """That fold of those into which scikit-learn divides groups, with classes spread evenly; without a number, as many
    of twenty as are nearest to `share`. A class whose last training images would go keeps its groups."""
    from sklearn.model_selection import StratifiedGroupKFold  # over a second of import

    names, numbers_N = np.unique(groups_N, return_inverse=True)
    largest = max(full.class_counts)
    folds = folds or max(2, min(_FOLDS_OF_SHARE, len(names), largest))
    if folds > min(len(names), largest):
        what = f"its images are of {several(len(names), 'group')}, those of a class {largest} at most"
        raise UserError(f"{full.origin}: {what}: too few for {folds} parts")
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=0)
    with warnings.catch_warnings(action="ignore"):  # of classes with fewer images than there are folds
        held_of_folds = [held for _, held in splitter.split(full.labels_N, full.labels_N, numbers_N)]
    first, count = (number - 1, 1) if number else (0, max(1, round(share * folds)))
    held = np.concatenate(held_of_folds[first : first + count])
    kept = np.array(full.class_counts) - np.bincount(full.labels_N[held], minlength=len(full.class_names))
    needed = numbers_N[held][kept[full.labels_N[held]] == 0]
    return held[~np.isin(numbers_N[held], needed)]


def grouped(images: ImageList, by: str) -> ImageList:
    """The list with groups, unless a table gave it some: what the regular expression `by` finds in each image's path
    below the data folder, its first group where it has one. Raises UserError where it finds nothing in a path."""
    if images.groups_N is not None:
        return images
    source = images.images
    if not isinstance(source, ImageFiles | TarImages):
        raise UserError(f"{images.origin} has no column '{by}', and its images have no paths, for data.group_by")
    try:
        matches = [(path, re.search(by, path)) for path in map(os.fsdecode, source.paths_N.tolist())]
    except re.error as error:
        raise UserError(f"data.group_by is no column and no regular expression: '{by}' ({error})") from None
    groups = [next(filter(None, found.groups() or (found[0],)), "") if found else "" for _, found in matches]
    if "" in groups:
        path = matches[groups.index("")][0]
        raise UserError(f"data.group_by = '{by}' finds nothing in {path}; it must match every path")
    return replace(images, groups_N=np.array(groups))
