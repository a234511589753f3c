"""Decoded images and random numbers become the views of a training batch; or one view for evaluation.

A *view* is a geometry (crop, flip) followed by operations on pixels. The three kinds, from BCL's code and MoCo v2:
`cls` feeds the classifier, `sim` and `rand` the contrastive branch. All random decisions are made for a whole batch,
image by image (`policies.py`), from `draws.uniforms`. So a view depends on (seed, epoch, image) and not on which batch
or process computes it.

Shapes: B images of a batch, S the side of a view, V views.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from equipoise.config.recipe import Recipe
from equipoise.views import operations, policies
from equipoise.views.draws import uniforms
from equipoise.views.operations import Operation, Pixels, Step
from equipoise.views.policies import BatchOperation, Numbers, Whole

_LONG_STRIP = 16  # times as long as it is wide
_EVALUATION_MARGIN = 256 / 224  # Resize(256) · CenterCrop(224)
_CONTRASTIVE_KINDS = {"sim-sim": ("sim", "sim"), "sim-rand": ("rand", "sim"), "rand-rand": ("rand", "rand")}


@dataclass(frozen=True)
class ViewSettings:
    """`policy`: 'digits', 'cifar' or 'photos'. `kinds`: of each view, 'cls', 'sim' or 'rand'. `size`: the side of a
    view, pixels. `blur`: in the view 'sim' and 'rand'. `mean` (of 1): the colour with which RandAugment's geometry
    fills. `randaug`: RandAugment in the view 'cls' of photographs; `randaug_n`, `randaug_m`: its number of operations
    and magnitude, there and in 'rand'."""

    policy: str
    kinds: tuple[str, ...]
    size: int
    blur: bool = False
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    randaug: bool = True
    randaug_n: int = 2
    randaug_m: float = 10.0


def view_settings(recipe: Recipe) -> ViewSettings:
    """The views that `recipe` trains and evaluates with: the classifier's, then those of the contrastive branch, if the
    method has one."""
    views, contrastive = recipe.views, recipe.method in ("bcl", "supcon+la")
    return ViewSettings(
        policy=views.policy,
        kinds=("cls", *(_CONTRASTIVE_KINDS[views.cl_views] if contrastive else ())),
        size=views.size,
        blur=views.blur,
        mean=views.mean,
        randaug=views.randaug,
        randaug_n=views.randaug_n,
        randaug_m=views.randaug_m,
    )


def small_views(images_BSS3: Pixels, settings: ViewSettings, seed: int, epoch: int, indices_B: Whole) -> Tensor:
    """All views of a batch of small images, each of the size of a view: uint8 `[V, B, 3, S, S]`. `indices_B`: their
    places in the training list."""

    def view(kind: str, numbers: Numbers) -> Pixels:
        digits = settings.policy == "digits"
        view_BSS3 = _move_digits(images_BSS3, kind, numbers) if digits else _crop(images_BSS3, kind, numbers)
        # Operation by operation: for one small image, a call costs more than its work.
        for chosen in _pixel_operations(kind, settings, numbers):
            for rows, _, operation in _groups(chosen):
                view_BSS3[rows] = operation(view_BSS3[rows], chosen.argument_B[rows])
        return view_BSS3 if digits or kind != "cls" else _cut_out(view_BSS3, numbers)

    return _views(view, settings, seed, epoch, indices_B)


def photo_views(photos: Sequence[Pixels], settings: ViewSettings, seed: int, epoch: int, indices_B: Whole) -> Tensor:
    """All views of a batch of photographs of any size, each uint8 `[H, W, 3]`: uint8 `[V, B, 3, S, S]`. `indices_B`:
    their places in the training list."""
    heights_B, widths_B = np.array([photo.shape[:2] for photo in photos]).T

    def view(kind: str, numbers: Numbers) -> Pixels:
        boxes_B4 = policies.random_boxes(numbers, heights_B, widths_B, smallest_share=0.08).tolist()
        flips = (numbers.next() < 0.5).tolist()
        steps = _steps(len(photos), _pixel_operations(kind, settings, numbers))
        view_BSS3 = np.empty((len(photos), settings.size, settings.size, 3), np.uint8)
        # Image by image: its bytes stay in the processor's cache.
        for photo, box, flip, of_image, out_SS3 in zip(photos, boxes_B4, flips, steps, view_BSS3, strict=True):
            view_1SS3 = np.ascontiguousarray(operations.resized_crop(photo, box, settings.size))[None]
            if flip:
                view_1SS3 = operations.flip_horizontal(view_1SS3)
            out_SS3[...] = operations.in_turn(view_1SS3, of_image)[0]
        return view_BSS3

    return _views(view, settings, seed, epoch, indices_B)


def _views(
    view: Callable[[str, Numbers], Pixels], settings: ViewSettings, seed: int, epoch: int, indices_B: Whole
) -> Tensor:
    """`[V, B, 3, S, S]`. `view` makes one, from its kind and its random numbers."""
    numbers = [
        Numbers(uniforms(seed, epoch, indices_B, stream, policies.NUMBERS_PER_VIEW))
        for stream in range(len(settings.kinds))
    ]
    return torch.from_numpy(np.stack([*map(view, settings.kinds, numbers)])).permute(0, 1, 4, 2, 3)


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
        step = width / new_width, height / new_height
        right, bottom = min((left + size) * step[0], width), min((top + size) * step[1], height)
        box = (left * step[0], top * step[1], right, bottom)
        return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box))
    resized = image.resize((new_width, new_height), Image.Resampling.BILINEAR)
    return np.asarray(resized)[top : top + size, left : left + size]


# ---------------------------------------------------------------------------------------------- geometry


def _crop(images_BSS3: Pixels, kind: str, numbers: Numbers) -> Pixels:
    """For 'cls' torchvision's RandomCrop of the image with a black margin (4 pixels at a side of 32), for the others
    its RandomResizedCrop; then a flip."""
    batch, side = images_BSS3.shape[:2]
    if kind == "cls":
        margin = side // 8
        top_B, left_B = numbers.whole(2 * margin + 1), numbers.whole(2 * margin + 1)
        padded = np.pad(images_BSS3, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
        # A row of pixels is one row of bytes: windows of 3 * side of them, at every third.
        rows = padded.reshape(batch, -1, 3 * padded.shape[2])
        windows = np.lib.stride_tricks.sliding_window_view(rows, (side, 3 * side), (1, 2))
        crops_BSS3 = windows[:, :, ::3][np.arange(batch), top_B, left_B].reshape(images_BSS3.shape)
    else:
        sides_B = np.full(batch, side)
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
        return [] if kind == "cls" else policies.jitter(numbers, 0.4, 0.4, 0.0, 0.0, probability=0.8)
    if settings.policy == "cifar" and kind == "cls":
        return policies.auto_augment(numbers, settings.size)
    if kind == "cls":
        chosen = policies.jitter(numbers, 0.4, 0.4, 0.4, 0.0, probability=1.0)
        return chosen + _rand_augment(settings, numbers) if settings.randaug else chosen
    chosen = policies.jitter(numbers, 0.4, 0.4, 0.4, 0.1, probability=0.8)
    chosen.append(policies.grayscale(numbers, 0.2))
    if settings.blur:
        chosen.append(policies.blur(numbers))
    return chosen + _rand_augment(settings, numbers) if kind == "rand" else chosen


def _rand_augment(settings: ViewSettings, numbers: Numbers) -> list[BatchOperation]:
    return policies.rand_augment(numbers, settings.size, settings.mean, settings.randaug_n, settings.randaug_m)


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
