"""Copies: against a slow loop, on made copies, and on pictures that only look alike."""

import cv2
import numpy as np
import pytest

from equipoise.data.copies import COPY, KINDS, Pair, detail, find_copies
from equipoise.data.sources import find_parts


def picture(seed: int, side: int = 120) -> np.ndarray:
    """Shapes of all sizes, in colours, as a photograph has them."""
    random = np.random.default_rng(seed)
    layers = [
        cv2.resize(random.normal(size=(n, n, 3)), (side, side), interpolation=cv2.INTER_CUBIC) for n in (4, 12, 40)
    ]
    return np.clip(128 + 40 * sum(layers), 0, 255).astype(np.uint8)


def jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    return cv2.imdecode(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR)


def smaller(pixels: np.ndarray, times: int) -> np.ndarray:
    side = pixels.shape[0] // times
    return cv2.resize(pixels, (side, side), interpolation=cv2.INTER_AREA)


CHANGES = {
    "jpeg": lambda pixels: jpeg(pixels, 60),
    "half": lambda pixels: smaller(pixels, 2),
    "quarter, jpeg": lambda pixels: jpeg(smaller(pixels, 4), 60),
    "brighter": lambda pixels: np.clip(pixels * 1.2, 0, 255).astype(np.uint8),
    "gray": lambda pixels: np.repeat(pixels.mean(2, keepdims=True), 3, 2).astype(np.uint8),
}


def found(images, parts=None, labels=None):
    count = len(images)
    parts_N, labels_N = (np.zeros(count, np.int64) if of is None else np.array(of) for of in (parts, labels))
    digests = [str(pixels.shape).encode() + pixels.tobytes() for pixels in images]
    return find_copies(digests, [detail(pixels) for pixels in images], parts_N, labels_N)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_made_copies_are_found_and_nothing_else(change):
    originals = [picture(seed, 256) for seed in range(30)]
    copies, too_alike = found([*originals, *map(change, originals)])
    assert copies["again"] == [Pair(30 + n, n, False) for n in range(30)]
    assert not too_alike


def test_a_mirrored_picture_is_another():
    originals = [picture(seed) for seed in range(5)]
    assert not any(found([*originals, *(pixels[:, ::-1].copy() for pixels in originals)])[0].values())


def correlation(one, other) -> float:
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


def test_pairs_are_those_of_a_slow_loop(monkeypatch):
    """Random parts, labels and copies, in blocks of a few images."""
    monkeypatch.setattr("equipoise.data.copies._ROWS", 16)
    random = np.random.default_rng(0)
    images = [picture(seed, 40) for seed in range(70)]
    for _ in range(60):
        source = images[random.integers(len(images))]
        images.append(source if random.random() < 0.5 else jpeg(source, int(random.integers(60, 95))))
    images = [images[place] for place in random.permutation(len(images))]
    parts, labels = np.sort(random.integers(0, 3, len(images))), random.integers(0, 3, len(images))
    details = [detail(pixels) for pixels in images]
    expected: dict[str, dict[int, list[tuple[float, int]]]] = {kind: {} for kind in KINDS}
    for i in range(len(images)):
        for j in range(i):
            whole = correlation(details[i], details[j])
            alike = min(whole, correlation(details[i][3:13, 3:13], details[j][3:13, 3:13]))
            alike = 2 if np.array_equal(images[i], images[j]) else alike
            in_parts, in_labels = parts[i] != parts[j], labels[i] != labels[j]
            for kind, is_kind in zip(KINDS, (in_parts, in_labels, not (in_parts or in_labels)), strict=True):
                if alike >= COPY and is_kind:
                    expected[kind].setdefault(i, []).append((alike, j))
    copies, _ = found(images, parts, labels)
    for kind in KINDS:
        pairs = {pair.image: pair for pair in copies[kind]}
        assert pairs.keys() == expected[kind].keys()
        assert {pair.exact for pair in pairs.values()} == {True, False}
        for image, candidates in expected[kind].items():
            best = max(candidates)[0]
            assert pairs[image].exact == (best == 2)
            assert pairs[image].other in {j for alike, j in candidates if alike > best - 1e-5}
            if best == 2:
                assert pairs[image].other == min(j for alike, j in candidates if alike == 2)


def test_one_frame_makes_no_copies():
    """Nor does it make the pictures too alike for copies to be found."""
    images = [picture(seed) // 4 for seed in range(40)]
    images.append(jpeg(images[0], 95))
    for pixels in images:
        pixels[:12] = pixels[-12:] = pixels[:, :12] = pixels[:, -12:] = 255
    copies, too_alike = found(images)
    assert copies["again"] == [Pair(40, 0, False)]
    assert not too_alike


def test_plain_pictures_are_copies_only_pixel_for_pixel():
    """A speck of dust on the lens, one level darker, is on all of them."""
    plain = [np.full((64, 64, 3), 200 + n, np.uint8) for n in range(4)]
    for pixels in plain:
        pixels[20:30, 20:30] -= 1
    white = np.full((64, 64, 3), 255, np.uint8)
    copies, _ = found([*plain, jpeg(plain[0], 90), white, white.copy(), np.full((64, 32, 3), 255, np.uint8)])
    assert copies == {"parts": [], "labels": [], "again": [Pair(6, 5, True)]}


def test_digits_are_too_alike_for_near_copies():
    pixels = find_parts("digits").parts["train"].images.pixels_NHW3
    copies, too_alike = found([*pixels, pixels[7]])
    assert too_alike
    assert copies["again"] == [Pair(len(pixels), 7, True)]


def test_no_image_at_all():
    copies, _ = find_copies([], [], np.zeros(0, np.int64), np.zeros(0, np.int64))
    assert not any(copies.values())
