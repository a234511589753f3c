"""Random numbers that depend on (seed, epoch, image index) and on nothing else.

A generator with a state would tie the numbers to the order in which images are read, so to the number of workers
and ranks. Here each number is a hash of where it is used, computed for a whole batch at once.

The hash is the output function of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number
generators", OOPSLA 2014), applied once per key and then in counter mode.
"""

import numpy as np
import numpy.typing as npt

_GOLDEN = 0x9E3779B97F4A7C15


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(
    seed: int, epoch: int, indices_B: npt.NDArray[np.int64], stream: int, count: int
) -> npt.NDArray[np.float64]:
    """`[B, count]` numbers, uniform on [0, 1), for each image `index` of the training list.

    `stream` separates uses of the same image in the same epoch (one stream a view).
    """
    key_B = _mix(indices_B.astype(np.uint64) + np.uint64(_GOLDEN))
    for part in (seed, epoch, stream):
        key_B = _mix(key_B + np.uint64((part + 1) * _GOLDEN % 2**64))
    counter_K = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return (_mix(key_B[:, None] + counter_K) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """The order in which the `count` training images are seen in `epoch`."""
    return np.random.default_rng((seed, epoch)).permutation(count)
