"""What a reader hands over: labels at once, samples in blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fl_common.data.errors import DataError
from fl_common.data.layouts import held_out_size


@dataclass(frozen=True, eq=False)
class RawSplit:
    """y: (n,) int64. blocks: samples in the same order, (k, C, H, W) uint8, (k, F) float32, or
    token ids (k, L) uint8."""

    y: np.ndarray
    blocks: Iterable[np.ndarray]


@dataclass(frozen=True, eq=False)
class Raw:
    """A data set as it is read; `classes[y]` is a label's name."""

    classes: tuple[str, ...]
    train: RawSplit
    test: RawSplit


def held_out(y: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Ascending indices of train and of test, a fifth of every class drawn with `seed`.

    A class of n samples gives the nearest whole number to n / 5, so one or two give none.
    """
    rng = np.random.default_rng(seed)
    in_test = np.zeros(len(y), bool)
    for label in np.unique(y):
        members = rng.permutation(np.flatnonzero(y == label))
        in_test[members[: held_out_size(len(members))]] = True
    if not in_test.any():
        raise DataError(f"{len(y)} samples are too few to hold out a test set; add a test split")
    return np.flatnonzero(~in_test), np.flatnonzero(in_test)
