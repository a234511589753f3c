"""Decoded images and random numbers become the views of a training batch; or one view for evaluation.

A *view* is a geometry (crop, flip) followed by operations on pixels. The three kinds, from BCL's code and MoCo v2:
`cls` feeds the classifier, `sim` and `rand` the contrastive branch. All random decisions are made for a whole batch,
image by image (`policies.py`), from `draws.Numbers`. So a view depends on (seed, epoch, image) and not on which batch
or process computes it.

Shapes: B images of a batch, S the side of a view, V views.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from equipoise.config.recipe import Recipe, Views
from equipoise.data.decode import Pixels
from equipoise.views import operations, policies
from equipoise.views.draws import Numbers, Whole
from equipoise.views.operations import Operation, Step
from equipoise.views.policies import BatchOperation

_LONG_STRIP = 16  # times as long as it is wide
_EVALUATION_MARGIN = 256 / 224  # Resize(256) · CenterCrop(224)
_CONTRASTIVE_KINDS = {"sim-sim": ("sim", "sim"), "sim-rand": ("rand", "sim"), "rand-rand": ("rand", "rand")}


@dataclass(frozen=True)
class ViewSettings(Views):
    """A recipe's table `views`, and of each view its kind: 'cls', 'sim' or 'rand'."""

    kinds: tuple[str, ...] = ("cls",)


def view_settings(recipe: Recipe) -> ViewSettings:
    """The views that `recipe` trains and evaluates with: the classifier's, then those of the contrastive branch, if the
    method has one."""
    contrastive = _CONTRASTIVE_KINDS[recipe.views.cl_views] if recipe.method in ("bcl", "supcon+la") else ()
    return ViewSettings(**asdict(recipe.views), kinds=("cls", *contrastive))


def small_views(images_BSS3: Pixels, settings: ViewSettings, seed: int, epoch: int, indices_B: Whole) -> Tensor:
    """All views of a batch of small images, each of the size of a view: uint8 `[V, B, 3, S, S]`. `indices_B`: their
    places in the training list."""
    views_VBSS3 = np.empty((len(settings.kinds), *images_BSS3.shape), np.uint8)
    for stream, kind in enumerate(settings.kinds):
        numbers = Numbers(seed, epoch, indices_B, stream)
        digits = settings.policy == "digits"
        view_BSS3 = _move_digits(images_BSS3, kind, numbers) if digits else _crop(images_BSS3, kind, numbers)
        # Operation by operation: for one small image, a call costs more than its work.
        for chosen in _pixel_operations(kind, settings, numbers):
            for rows, _, operation in _groups(chosen):
                view_BSS3[rows] = operation(view_BSS3[rows], chosen.argument_B[rows])
        views_VBSS3[stream] = view_BSS3 if digits or kind != "cls" else _cut_out(view_BSS3, numbers)
    return torch.from_numpy(views_VBSS3).permute(0, 1, 4, 2, 3)


def photo_views(photos: Sequence[Pixels], settings: ViewSettings, seed: int, epoch: int, indices_B: Whole) -> Tensor:
    """All views of a batch of photographs of any size, each uint8 `[H, W, 3]`: uint8 `[V, B, 3, S, S]`. `indices_B`:
    their places in the training list."""
    heights_B, widths_B = np.array([photo.shape[:2] for photo in photos]).T
    views_VBSS3 = np.empty((len(settings.kinds), len(photos), settings.size, settings.size, 3), np.uint8)
    for stream, kind in enumerate(settings.kinds):
        numbers = Numbers(seed, epoch, indices_B, stream)
        boxes_B4 = policies.random_boxes(numbers, heights_B, widths_B, smallest_share=0.08).tolist()
        flips_B = numbers.next() < 0.5
        steps = _steps(len(photos), _pixel_operations(kind, settings, numbers))
        # Image by image: its bytes stay in the processor's cache.
        for row, photo in enumerate(photos):
            view_1SS3 = np.ascontiguousarray(operations.resized_crop(photo, boxes_B4[row], settings.size))[None]
            if flips_B[row]:
                view_1SS3 = operations.flip_horizontal(view_1SS3)
            views_VBSS3[stream, row] = operations.in_turn(view_1SS3, steps[row])[0]
    return torch.from_numpy(views_VBSS3).permute(0, 1, 4, 2, 3)


def short_side(size: int) -> int:
    """To how many pixels the evaluation view resizes the short side before it takes the centre."""
    return round(size * _EVALUATION_MARGIN)


def evaluation_view(photo: Pixels, size: int) -> Pixels:
    """Short side to 256/224 of `size`, then the centre `[size, size, 3]`: Pillow's antialiased bilinear resize."""
    height, width = photo.shape[:2]
    short = short_side(size)
    # The long side is truncated, as torchvision does it.
    new_height, new_width = (
        (short, int(short * width / height)) if height <= width else (int(short * height / width), short)
    )
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    image = Image.fromarray(photo)
    if max(height, width) > _LONG_STRIP * min(height, width):
        # Resized whole, it could fill the memory. Its centre alone is the same within one level of 255.
        x, y = width / new_width, height / new_height
        box = left * x, top * y, min((left + size) * x, width), min((top + size) * y, height)
        return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box))
    resized = image.resize((new_width, new_height), Image.Resampling.BILINEAR)
    return np.asarray(resized)[top : top + size, left : left + size]


# ---------------------------------------------------------------------------------------------- geometry


def _crop(images_BSS3: Pixels, kind: str, numbers: Numbers) -> Pixels:
    """For 'cls' torchvision's RandomCrop of the image with a black margin (4 pixels at a side of 32), for the others
    its RandomResizedCrop; then a flip."""
    side = images_BSS3.shape[1]
    sides_B = np.full(len(images_BSS3), side)
    if kind == "cls":
        margin = side // 8
        images_BSS3 = np.pad(images_BSS3, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
        top_B, left_B = numbers.whole(2 * margin + 1), numbers.whole(2 * margin + 1)
        boxes_B4 = np.stack([top_B, left_B, sides_B, sides_B], axis=1)
    else:
        boxes_B4 = policies.random_boxes(numbers, sides_B, sides_B, smallest_share=0.2)
    boxed = zip(images_BSS3, boxes_B4.tolist(), strict=True)
    crops_BSS3 = np.stack([operations.resized_crop(image, box, side) for image, box in boxed])
    flipped_B = numbers.next() < 0.5
    crops_BSS3[flipped_B] = operations.flip_horizontal(crops_BSS3[flipped_B])
    return crops_BSS3


def _move_digits(images_BSS3: Pixels, kind: str, numbers: Numbers) -> Pixels:
    """Slant, turn, shift and scale as hands do; more for the contrastive views. Never a flip: it makes other signs."""
    side = images_BSS3.shape[1]
    strength = 1.0 if kind == "cls" else 1.5
    turn_B = np.deg2rad(numbers.between(-10, 10)) * strength
    slant_B = numbers.between(-0.15, 0.15) * strength
    zoom_B = np.exp(numbers.between(-0.12, 0.12) * strength)
    shift_x_B, shift_y_B = (numbers.between(-0.08, 0.08) * strength * side for _ in range(2))
    # From an output pixel to an input pixel, about the centre.
    cos_B, sin_B, middle = np.cos(turn_B) / zoom_B, np.sin(turn_B) / zoom_B, side / 2
    a, b, d, e = cos_B, sin_B + slant_B * cos_B, -sin_B, cos_B - slant_B * sin_B
    to_x_B3 = np.stack([a, b, middle - a * middle - b * middle + shift_x_B], axis=1)
    to_y_B3 = np.stack([d, e, middle - d * middle - e * middle + shift_y_B], axis=1)
    return operations.affine(images_BSS3, np.stack([to_x_B3, to_y_B3], axis=1), (0, 0, 0), "bilinear")


def _cut_out(images_BSS3: Pixels, numbers: Numbers) -> Pixels:
    """Cutout (DeVries & Taylor, arXiv:1708.04552), in place: a black square of half the side, clipped at the border."""
    side = images_BSS3.shape[1]
    half = side // 4
    centres_y, centres_x = numbers.whole(side).tolist(), numbers.whole(side).tolist()
    for image, y, x in zip(images_BSS3, centres_y, centres_x, strict=True):
        image[max(0, y - half) : y + half, max(0, x - half) : x + half] = 0
    return images_BSS3


# ---------------------------------------------------------------------------------------------- pixels


def _pixel_operations(kind: str, settings: ViewSettings, numbers: Numbers) -> list[BatchOperation]:
    """The operations between a view's geometry and Cutout."""
    if settings.policy == "digits":
        return [] if kind == "cls" else policies.jitter(numbers, (0.4, 0.4, 0, 0), probability=0.8)
    if settings.policy == "cifar" and kind == "cls":
        return policies.auto_augment(numbers, settings.size)
    if kind == "cls":
        chosen = policies.jitter(numbers, (0.4, 0.4, 0.4, 0), probability=1.0)
        return chosen + policies.rand_augment(numbers, settings) if settings.randaug else chosen
    chosen = policies.jitter(numbers, (0.4, 0.4, 0.4, 0.1), probability=0.8)
    chosen.append(policies.grayscale(numbers, 0.2))
    if settings.blur:
        chosen.append(policies.blur(numbers))
    return chosen + policies.rand_augment(numbers, settings) if kind == "rand" else chosen


def _groups(chosen: BatchOperation) -> Iterator[tuple[Whole, str, Operation]]:
    """Rows of the batch that get the same operation, its name, and the operation."""
    names, resamplings = policies.OPERATIONS, policies.RESAMPLINGS
    # One number for an operation and its resampling; below 0 where there is none.
    groups_B = len(resamplings) * chosen.operation_B + chosen.resampling_B
    for group in np.unique(groups_B[groups_B >= 0]).tolist():
        place, resampling = divmod(group, len(resamplings))
        operation = operations.operation(names[place], resamplings[resampling], chosen.fill)
        yield np.flatnonzero(groups_B == group), names[place], operation


def _steps(images: int, chosen: Sequence[BatchOperation]) -> list[list[Step]]:
    """The operations on each image of a batch, one after the other."""
    steps: list[list[Step]] = [[] for _ in range(images)]
    for of_batch in chosen:
        for rows, name, operation in _groups(of_batch):
            for row in rows.tolist():
                steps[row].append((name, operation, of_batch.argument_B[row : row + 1]))
    return steps
