"""Decoded images and their random numbers become the views of a training batch; or one view for evaluation.

A *view* is a geometry (crop, flip) followed by operations on pixels. The three kinds, from BCL's code and MoCo v2:
`cls` feeds the classifier, `sim` and `rand` the contrastive branch. What is random is decided for a whole batch, image
by image (`policies.py`), from `draws.uniforms`. So a view depends on (seed, epoch, image) and not on which batch,
process or device computes it.

On a CPU it is OpenCV that changes pixels (`image_operations.py`): photographs one by one, in the processes of the
loader; the small images of CIFAR operation by operation, where they lie in memory. On a GPU small images go through
torch (`operations.py`), and so do the digits everywhere.

Shapes: B images of a batch, S the side of a view, V views.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from equipoise.config.recipe import Recipe
from equipoise.views import image_operations, policies
from equipoise.views import operations as op
from equipoise.views.draws import uniforms
from equipoise.views.policies import Numbers, Turn

Array = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]

_LONG_STRIP = 16  # times as long as it is wide
_EVALUATION_MARGIN = 256 / 224  # Resize(256) · CenterCrop(224)


@dataclass(frozen=True)
class ViewSettings:
    """`policy`: 'digits', 'cifar' or 'photos'. `kinds`: each view's, of 'cls', 'sim', 'rand'. `mean` (of 1) fills
    what RandAugment's geometry leaves empty. `randaug`: RandAugment in the view 'cls' of photographs; its number of
    operations and magnitude, there and in 'rand'."""

    policy: str
    kinds: tuple[str, ...]
    size: int
    blur: bool = False
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    randaug: bool = True
    randaug_n: int = 2
    randaug_m: float = 10.0


def view_kinds(cl_views: str, contrastive: bool) -> tuple[str, ...]:
    """The kind of each view: the classifier's, then those of the contrastive branch ('sim-rand': rand before sim)."""
    if not contrastive:
        return ("cls",)
    return (
        "cls",
        *{"sim-sim": ("sim", "sim"), "sim-rand": ("rand", "sim"), "rand-rand": ("rand", "rand")}[cl_views],
    )


def small_views(
    images_B3SS: Tensor, settings: ViewSettings, seed: int, epoch: int, indices_B: npt.NDArray[np.int64]
) -> Tensor:
    """All views of a batch of small images: uint8 `[B, 3, S, S]` to uint8 `[V, B, 3, S, S]`, on the same device."""
    if images_B3SS.device.type != "cpu" or settings.policy == "digits":
        return batch_views(images_B3SS, settings, seed, epoch, indices_B)
    views_VBSS3 = np.empty((len(settings.kinds), len(images_B3SS), settings.size, settings.size, 3), np.uint8)
    for stream, (kind, views_BSS3) in enumerate(zip(settings.kinds, views_VBSS3, strict=True)):
        numbers = Numbers(uniforms(seed, epoch, indices_B, stream, policies.NUMBERS_PER_VIEW))
        _crop_small_images(images_B3SS.permute(0, 2, 3, 1).numpy(), kind, numbers, views_BSS3)
        for turn in _turns(kind, settings, numbers):
            for rows, operation in _groups(turn):
                changed = image_operations.operation(*operation)
                views_BSS3[rows] = changed(views_BSS3[rows], turn.argument_B[rows])
        if kind == "cls":
            _cut_out(views_BSS3, numbers)
    return torch.from_numpy(views_VBSS3).permute(0, 1, 4, 2, 3)


def photo_views(
    photos: Sequence[Pixels], settings: ViewSettings, seed: int, epoch: int, indices_B: npt.NDArray[np.int64]
) -> Tensor:
    """All views of a batch of photographs of any size, each uint8 `[H, W, 3]`: uint8 `[V, B, 3, S, S]`."""
    views_VBSS3 = np.empty((len(settings.kinds), len(photos), settings.size, settings.size, 3), np.uint8)
    for stream, (kind, views_BSS3) in enumerate(zip(settings.kinds, views_VBSS3, strict=True)):
        numbers = Numbers(uniforms(seed, epoch, indices_B, stream, policies.NUMBERS_PER_VIEW))
        boxes_B4, flips = _photo_crops(photos, numbers)
        steps = _steps(len(photos), _turns(kind, settings, numbers))
        # All of an image before the next one: its bytes stay in the cache.
        for photo, box, flip, of_image, out_SS3 in zip(photos, boxes_B4, flips, steps, views_BSS3, strict=True):
            view_1SS3 = np.ascontiguousarray(image_operations.resized_crop(photo, box, settings.size))[None]
            if flip:
                view_1SS3 = image_operations.flip_horizontal(view_1SS3)
            out_SS3[...] = image_operations.in_turn(view_1SS3, of_image)[0]
    return torch.from_numpy(views_VBSS3).permute(0, 1, 4, 2, 3)


def batch_views(
    images_B3SS: Tensor, settings: ViewSettings, seed: int, epoch: int, indices_B: npt.NDArray[np.int64]
) -> Tensor:
    """`small_views` with whole batches in torch, on any device."""
    views: list[Tensor] = []
    geometry = _digit_geometry if settings.policy == "digits" else _cifar_geometry
    for stream, kind in enumerate(settings.kinds):
        numbers = Numbers(uniforms(seed, epoch, indices_B, stream, policies.NUMBERS_PER_VIEW))
        view = geometry(images_B3SS, kind, numbers)
        for turn in _turns(kind, settings, numbers):
            view = turned(view, turn)
        views.append(_cutout(view, numbers) if (settings.policy, kind) == ("cifar", "cls") else view)
    return torch.stack(views)


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
        # The whole of it resized could fill the memory. Its centre alone is the same within one level of 255.
        step = width / new_width, height / new_height
        right, bottom = min((left + size) * step[0], width), min((top + size) * step[1], height)
        box = (left * step[0], top * step[1], right, bottom)
        return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box))
    resized = image.resize((new_width, new_height), Image.Resampling.BILINEAR)
    return np.asarray(resized)[top : top + size, left : left + size]


# ---------------------------------------------------------------------------------------------- geometry


def _photo_crops(photos: Sequence[Pixels], numbers: Numbers) -> tuple[list[list[int]], list[bool]]:
    """The box of each photograph, and whether what is in it is mirrored."""
    heights_B, widths_B = np.array([photo.shape[:2] for photo in photos]).T
    boxes = policies.random_boxes(numbers, heights_B, widths_B, smallest_share=0.08)
    return np.stack(boxes, axis=1).tolist(), (numbers.next() < 0.5).tolist()


def _crop_small_images(images_BSS3: Pixels, kind: str, numbers: Numbers, out_BSS3: Pixels) -> None:
    batch, side = images_BSS3.shape[:2]
    if kind == "cls":
        top_B, left_B, padding = _shifts(numbers, side)
        padded = np.pad(images_BSS3, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        # A row of pixels is one row of bytes: windows of 3 * side of them, at every third.
        windows = np.lib.stride_tricks.sliding_window_view(
            padded.reshape(batch, -1, 3 * padded.shape[2]), (side, 3 * side), (1, 2)
        )
        out_BSS3[...] = windows[:, :, ::3][np.arange(batch), top_B, left_B].reshape(out_BSS3.shape)
    else:
        sides_B = np.full(batch, side)
        boxes = policies.random_boxes(numbers, sides_B, sides_B, smallest_share=0.2)
        for image, box, out in zip(images_BSS3, np.stack(boxes, axis=1).tolist(), out_BSS3, strict=True):
            out[...] = image_operations.resized_crop(image, box, side)
    flipped_B = numbers.next() < 0.5
    out_BSS3[flipped_B] = image_operations.flip_horizontal(out_BSS3[flipped_B])


def _shifts(numbers: Numbers, side: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int]:
    """The corners of the crops of padded images, and the padding: 4 at 32 pixels."""
    padding = side // 8
    return numbers.whole(2 * padding + 1), numbers.whole(2 * padding + 1), padding


def _cifar_geometry(images_B3SS: Tensor, kind: str, numbers: Numbers) -> Tensor:
    batch, _, side, _ = images_B3SS.shape
    if kind == "cls":
        top, left, padding = _shifts(numbers, side)
        cropped = op.shift_crop(images_B3SS, *_tensors(images_B3SS, top, left), padding=padding)
    else:
        sides = np.full(batch, side)
        boxes = policies.random_boxes(numbers, sides, sides, smallest_share=0.2)
        cropped = op.resized_crop(images_B3SS, *_tensors(images_B3SS, *boxes), size=side)
    return op.flip_horizontal(cropped, _tensors(images_B3SS, numbers.next() < 0.5)[0])


def _digit_geometry(images_B3SS: Tensor, kind: str, numbers: Numbers) -> Tensor:
    """Slant, turn, shift and scale as hands do; more for the contrastive views. Never a flip: it makes other signs."""
    side = images_B3SS.shape[-1]
    strength = 1.0 if kind == "cls" else 1.5
    turn = np.deg2rad(numbers.between(-10, 10)) * strength
    slant = numbers.between(-0.15, 0.15) * strength
    zoom = np.exp(numbers.between(-0.12, 0.12) * strength)
    shift_x, shift_y = (numbers.between(-0.08, 0.08) * strength * side for _ in range(2))
    # Output pixel to input pixel, about the centre.
    cos, sin, middle = np.cos(turn) / zoom, np.sin(turn) / zoom, side / 2
    a, b, d, e = cos, sin + slant * cos, -sin, cos - slant * sin
    rows = np.stack(
        [
            np.stack([a, b, middle - a * middle - b * middle + shift_x], axis=1),
            np.stack([d, e, middle - d * middle - e * middle + shift_y], axis=1),
        ],
        axis=1,
    )
    return op.affine(images_B3SS, *_tensors(images_B3SS, rows), fill_3=(0, 0, 0), interpolation="bilinear")


# ---------------------------------------------------------------------------------------------- pixels


def _turns(kind: str, settings: ViewSettings, numbers: Numbers) -> list[Turn]:
    """Everything of a view that follows its geometry, but for Cutout."""
    if settings.policy == "digits":
        return [] if kind == "cls" else policies.jitter(numbers, 0.4, 0.4, 0.0, 0.0, probability=0.8)
    if settings.policy == "cifar" and kind == "cls":
        return policies.auto_augment(numbers, settings.size)
    if kind == "cls":
        turns = policies.jitter(numbers, 0.4, 0.4, 0.4, 0.0, probability=1.0)
        return turns + _rand_augment(settings, numbers) if settings.randaug else turns
    turns = policies.jitter(numbers, 0.4, 0.4, 0.4, 0.1, probability=0.8)
    turns.append(policies.grayscale(numbers, 0.2))
    if settings.blur:
        turns.append(policies.blur(numbers))
    return turns + _rand_augment(settings, numbers) if kind == "rand" else turns


def _rand_augment(settings: ViewSettings, numbers: Numbers) -> list[Turn]:
    return policies.rand_augment(numbers, settings.size, settings.mean, settings.randaug_n, settings.randaug_m)


def _groups(turn: Turn) -> Iterator[tuple[npt.NDArray[np.int64], tuple[str, op.Interpolation, tuple[float, ...]]]]:
    """The operations of a turn: rows of the batch, and name, resampling and fill of what happens to them."""
    # One number for an operation and its resampling.
    groups_B = np.where(turn.operation_B < 0, -1, len(policies.RESAMPLINGS) * turn.operation_B + turn.resampling_B)
    for group in np.unique(groups_B[groups_B >= 0]).tolist():
        operation, resampling = divmod(group, len(policies.RESAMPLINGS))
        named = policies.OPERATIONS[operation], policies.RESAMPLINGS[resampling], turn.fill
        yield np.flatnonzero(groups_B == group), named


def _steps(images: int, turns: Sequence[Turn]) -> list[list[image_operations.Step]]:
    """What is done to each image of a batch, one after the other."""
    steps: list[list[image_operations.Step]] = [[] for _ in range(images)]
    for turn in turns:
        for rows, operation in _groups(turn):
            for row in rows.tolist():
                step = operation[0], image_operations.operation(*operation), turn.argument_B[row : row + 1]
                steps[row].append(step)
    return steps


def turned(images_B3SS: Tensor, turn: Turn) -> Tensor:
    """A turn of a batch of small images: each operation on the images that it is meant for, together."""
    for rows, (name, resample, fill) in _groups(turn):
        (argument,) = _tensors(images_B3SS, turn.argument_B[rows])
        if len(rows) == len(images_B3SS):
            return named_operation(images_B3SS, argument, name, fill, resample)
        # Chosen on the CPU: a device is not waited for.
        rows_on_device = torch.from_numpy(rows).to(images_B3SS.device, non_blocking=True)
        made = named_operation(images_B3SS[rows_on_device], argument, name, fill, resample)
        images_B3SS = images_B3SS.index_copy(0, rows_on_device, made)
    return images_B3SS


def _tensors(like: Tensor, *arrays: npt.NDArray[np.generic]) -> list[Tensor]:
    """Parameters on the images' device; float64 becomes float32."""
    return [
        torch.from_numpy(array.astype(np.float32) if array.dtype == np.float64 else array).to(
            like.device, non_blocking=True
        )
        for array in arrays
    ]


def _cutout(images: Tensor, numbers: Numbers) -> Tensor:
    side = images.shape[-1]
    centre_y, centre_x = numbers.whole(side), numbers.whole(side)
    return op.cutout(images, *_tensors(images, centre_y, centre_x), length=side // 2)  # 16 at 32 pixels


def _cut_out(images_BSS3: Pixels, numbers: Numbers) -> None:
    """The same, in place."""
    side = images_BSS3.shape[1]
    half = side // 4
    centres_y, centres_x = numbers.whole(side).tolist(), numbers.whole(side).tolist()
    for image, y, x in zip(images_BSS3, centres_y, centres_x, strict=True):
        image[max(0, y - half) : y + half, max(0, x - half) : x + half] = 0


def named_operation(
    images: Tensor, argument_B: Tensor, name: str, fill: Sequence[float], resample: op.Interpolation
) -> Tensor:
    """The operation `name` of `policies.OPERATIONS`, with its argument in the operation's own unit."""
    side = images.shape[-1]
    colour: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "Brightness": op.adjust_brightness,
        "Color": op.adjust_saturation,
        "Contrast": op.adjust_contrast,
        "Hue": op.adjust_hue,
        "Sharpness": op.adjust_sharpness,
        "Posterize": lambda pixels, bits: op.posterize(pixels, bits.long()),
        "Solarize": op.solarize,
        "SolarizeAdd": op.solarize_add,
        "Blur": op.gaussian_blur,
        "AutoContrast": lambda pixels, _: op.autocontrast(pixels),
        "Equalize": lambda pixels, _: op.equalize(pixels),
        "Invert": lambda pixels, _: op.invert(pixels),
        "Grayscale": lambda pixels, _: op.to_grayscale(pixels),
    }
    if name in colour:
        return colour[name](images, argument_B)
    nothing = torch.zeros_like(argument_B)
    matrix = {
        "Rotate": lambda: op.rotation(argument_B, side, side),
        "ShearX": lambda: op.shear_x(argument_B),
        "ShearY": lambda: op.shear_y(argument_B),
        "TranslateX": lambda: op.translation(argument_B, nothing),
        "TranslateY": lambda: op.translation(nothing, argument_B),
    }[name]()
    return op.affine(images, matrix, fill, resample)


def view_settings(recipe: Recipe) -> ViewSettings:
    """The views that `recipe` trains and evaluates with."""
    views = recipe.views
    return ViewSettings(
        policy=views.policy,
        kinds=view_kinds(views.cl_views, contrastive=recipe.method in ("bcl", "supcon+la")),
        size=views.size,
        blur=views.blur,
        mean=views.mean,
        randaug=views.randaug,
        randaug_n=views.randaug_n,
        randaug_m=views.randaug_m,
    )
