"""Which replies may touch the global model.

A reply is looked at before anything of it is used: one that is not exactly what was asked for is
rejected, with the reason; the round goes on without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, prod
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import ArrayRecord, MetricRecord

from fl_common.deferred import torch
from fl_common.wire import METRICS, ArrivedArray, TensorArray

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flwr.app import Array, RecordDict

HEADER_BYTES = 1024
"""More than NumPy's header, before the elements, ever takes."""


@dataclass(frozen=True)
class Spec:
    """Shape and dtype ("float32") that an array must have."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Spec:
        """A tensor's own."""
        return cls(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Expected:
    """What a good reply to one message holds."""

    records: Mapping[str, Mapping[str, Spec]]
    """Array records by name, their arrays by key."""
    server_round: int
    samples: int
    """What the roll call said: n_i, or the number of held-out samples."""
    metrics: frozenset[str]
    """The numbers that come with it, one each, besides round and samples."""
    steps: int | None = None
    """K_i, optimizer steps of local training."""
    series: frozenset[str] = frozenset()
    """The lists that come with it, of one number per step."""


def objection(content: RecordDict, expected: Expected) -> str | None:
    """Why this reply is rejected, or None if it is good.

    Looks at names and sizes before it decodes anything, so that a huge array costs nothing; a
    good array is decoded once, in place.
    """
    names = {*expected.records, METRICS}
    if set(content) != names:
        return f"records {_names(content)} instead of {_names(names)}"
    if not isinstance(content[METRICS], MetricRecord):
        return f"{METRICS} is not a MetricRecord"
    for name, specs in expected.records.items():
        record = content[name]
        if not isinstance(record, ArrayRecord):
            return f"{name} is not an ArrayRecord"
        if set(record) != set(specs):
            return f"arrays {_names(record)} instead of {_names(specs)}"
        for key, spec in specs.items():
            if problem := _array_problem(record, key, spec):
                return f"array {key}: {problem}"
    return _metrics_problem(content[METRICS], expected)


def _names(names: object) -> str:
    return "(" + ", ".join(sorted(map(str, names))) + ")"


def _array_problem(record: ArrayRecord, key: str, spec: Spec) -> str | None:
    array = record[key]
    given = Spec(tuple(array.shape), array.dtype)
    if given != spec:
        return f"{given} instead of {spec}"
    if not isinstance(array, TensorArray):
        problem = _decode(record, key, array, spec)
        if problem:
            return problem
    return _not_finite(record[key].tensor)


def _decode(record: ArrayRecord, key: str, array: Array, spec: Spec) -> str | None:
    """Replace a serialised array by its tensor; what it claims to be may be a lie."""
    bound = prod(spec.shape) * np.dtype(spec.dtype).itemsize + HEADER_BYTES
    size = array.nbytes if isinstance(array, ArrivedArray) else len(array.data)
    if size > bound:
        return f"{size} bytes, at most {bound} were expected"
    try:
        tensor = torch.from_numpy(array.numpy())
    except Exception as error:  # the bytes are a stranger's: NumPy may raise anything
        return f"cannot be decoded: {error}"
    if Spec.of(tensor) != spec:
        return f"says {spec}, holds {Spec.of(tensor)}"
    record[key] = TensorArray(tensor)
    return None


def _not_finite(tensor: torch.Tensor) -> str | None:
    # The norm is one pass without a temporary; it is not finite either when it overflows, and
    # only then the elements are looked at one by one.
    if not tensor.is_floating_point() or torch.isfinite(torch.linalg.vector_norm(tensor)):
        return None
    wrong = int((~torch.isfinite(tensor)).sum())
    return f"{wrong} of {tensor.numel()} elements are NaN or infinite" if wrong else None


def _metrics_problem(metrics: MetricRecord, expected: Expected) -> str | None:
    names = {"server-round", "num-examples", *expected.metrics, *expected.series}
    if set(metrics) != names:
        return f"metrics {_names(metrics)} instead of {_names(names)}"
    for key, value in metrics.items():
        if key in expected.series:
            if not isinstance(value, list) or len(value) != expected.steps:
                return f"{key} is not a list of {expected.steps} numbers"
            if not all(isfinite(number) and number >= 0 for number in value):
                return f"{key} has values that cannot be norms"
            continue
        if isinstance(value, list) or not isfinite(value):
            return f"{key} = {value} is not a finite number"
        if key.startswith("accuracy") and not 0 <= value <= 1:
            return f"{key} = {value} is not between 0 and 1"
    if metrics.get("server-round") != expected.server_round:
        return f"answers round {metrics.get('server-round')}, this is round {expected.server_round}"
    weight = metrics.get("num-examples")
    if not isinstance(weight, int) or weight <= 0:
        return f"num-examples = {weight} is not a positive whole number"
    if weight != expected.samples:
        return f"num-examples = {weight}, but {expected.samples} at the roll call"
    if expected.steps is not None and metrics.get("steps") != expected.steps:
        return f"steps = {metrics.get('steps')}, but {expected.steps} were to be taken"
    return None
