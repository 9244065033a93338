"""GroupNorm of channels-last maps on a GPU: one kernel forward, and one backward.

torch's own needs channels outermost, so that under `train.channels-last` every layer transposes its
maps on the way in and out, and launches half a dozen kernels more.  These read maps as they lie and
sum in float32, in a fixed order.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fl_common.failures import first_line

try:
    import triton
    import triton.language as tl
except ImportError:  # torch brings it where it finds a GPU
    triton = None

TILE = 8192
"""Elements that a program handles at a time, 256 for each of its warps."""

_log = logging.getLogger(__name__)


def group_norm(
    x: torch.Tensor, groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """torch.nn.functional.group_norm of x (B, C, H, W), channels innermost, float32 or bfloat16;
    its gradient has none itself."""
    return _GroupNorm.apply(x, weight, bias, groups, eps)


@cache
def compiles(device: torch.device) -> bool:
    """Whether kernels can be compiled here; if not, the log says once why.  Raises OutOfMemoryError
    where the card has no room to try."""
    try:
        if triton is None:
            raise ImportError("no module triton")
        x = torch.zeros(1, 2, 1, 1, device=device)
        with torch.no_grad():
            group_norm(x, 2, x.new_ones(2), x.new_zeros(2), 1e-5)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        why = first_line(error)
        _log.warning("GroupNorm's own kernels cannot be compiled, torch's run: %s", why)
        return False
    return True


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float
    ) -> torch.Tensor:
        y = torch.empty_like(x)
        stats = torch.empty(len(x) * groups, 2, device=x.device)
        grid, shape = _shape(x, groups)
        with torch.cuda.device_of(x):
            _forward[grid](x, y, weight, bias, stats, eps, **shape)
        ctx.save_for_backward(x, weight, stats)
        ctx.groups = groups
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, stats = ctx.saved_tensors
        dy, dx = dy.contiguous(memory_format=torch.channels_last), torch.empty_like(x)
        parts = torch.empty(2, *x.shape[:2], device=x.device)
        grid, shape = _shape(x, ctx.groups)
        with torch.cuda.device_of(x):
            _backward[grid](x, dy, dx, weight, stats, parts, len(x) * x.shape[1], **shape)
        return dx, *parts.sum(1), None, None


def _shape(x: torch.Tensor, groups: int) -> tuple[tuple[int], dict[str, int]]:
    """A program for each group of each sample; and the kernels' constants."""
    samples, channels, height, width = x.shape
    size, pixels = channels // groups, height * width
    columns = triton.next_power_of_2(size)
    rows = max(1, min(triton.next_power_of_2(pixels), TILE // columns))
    warps = max(1, min(16, rows * columns // 256))
    constants = {"C": channels, "D": size, "P": pixels, "COLUMNS": columns, "ROWS": rows}
    return (samples * groups,), {**constants, "num_warps": warps}


if triton is not None:
    # C channels, D of them in a group, P pixels; a program has (ROWS, COLUMNS) of (P, D) at a time.

    @triton.jit
    def _place(C: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
        """A program's sample, rows of a tile, channels of its group, and which of these exist."""
        sample = tl.program_id(0) // (C // D)
        group = tl.program_id(0) % (C // D)
        column = tl.arange(0, COLUMNS)
        return sample, tl.arange(0, ROWS), group * D + column, column < D

    @triton.jit
    def _forward(
        x_at, y_at, weight_at, bias_at, stats_at, eps,
        C: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
        COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """y = weight (x - mean) / sqrt(var + eps) + bias; keeps mean and 1 / sqrt(var + eps)."""
        sample, row, c, inside = _place(C, D, COLUMNS, ROWS)
        first = sample.to(tl.int64) * P * C
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, P, ROWS):
            there = (start + row < P)[:, None] & inside[None, :]
            at = first + (start + row)[:, None] * C + c[None, :]
            total += tl.load(x_at + at, there, 0.0).to(tl.float32)
        mean = tl.sum(total) / (P * D)
        square = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, P, ROWS):
            there = (start + row < P)[:, None] & inside[None, :]
            at = first + (start + row)[:, None] * C + c[None, :]
            x = tl.load(x_at + at, there, 0.0).to(tl.float32)
            square += tl.where(there, (x - mean) * (x - mean), 0.0)
        inverse = 1 / tl.sqrt(tl.sum(square) / (P * D) + eps)
        tl.store(stats_at + 2 * tl.program_id(0), mean)
        tl.store(stats_at + 2 * tl.program_id(0) + 1, inverse)
        scale = tl.load(weight_at + c, inside, 0.0).to(tl.float32) * inverse
        bias = tl.load(bias_at + c, inside, 0.0).to(tl.float32)
        for start in range(0, P, ROWS):
            there = (start + row < P)[:, None] & inside[None, :]
            at = first + (start + row)[:, None] * C + c[None, :]
            x = tl.load(x_at + at, there, 0.0).to(tl.float32)
            y = (x - mean) * scale[None, :] + bias[None, :]
            tl.store(y_at + at, y.to(y_at.dtype.element_ty), there)

    @triton.jit
    def _backward(
        x_at, dy_at, dx_at, weight_at, stats_at, parts_at, half,
        C: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
        COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """With n = (x - mean) / sqrt(var + eps), and means over the group:
        dx = (weight dy - mean(weight dy) - n mean(weight dy n)) / sqrt(var + eps);
        this sample's sums of dy n and, `half` further on, of dy, for weight and bias."""
        sample, row, c, inside = _place(C, D, COLUMNS, ROWS)
        first = sample.to(tl.int64) * P * C
        mean = tl.load(stats_at + 2 * tl.program_id(0))
        inverse = tl.load(stats_at + 2 * tl.program_id(0) + 1)
        dw = tl.zeros([ROWS, COLUMNS], tl.float32)
        db = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, P, ROWS):
            there = (start + row < P)[:, None] & inside[None, :]
            at = first + (start + row)[:, None] * C + c[None, :]
            dy = tl.load(dy_at + at, there, 0.0).to(tl.float32)
            n = (tl.load(x_at + at, there, 0.0).to(tl.float32) - mean) * inverse
            dw += dy * n
            db += dy
        dw_c = tl.sum(dw, 0)
        db_c = tl.sum(db, 0)
        tl.store(parts_at + sample * C + c, dw_c, inside)
        tl.store(parts_at + half + sample * C + c, db_c, inside)
        weight = tl.load(weight_at + c, inside, 0.0).to(tl.float32)
        pull = tl.sum(weight * dw_c) / (P * D)
        shift = tl.sum(weight * db_c) / (P * D)
        for start in range(0, P, ROWS):
            there = (start + row < P)[:, None] & inside[None, :]
            at = first + (start + row)[:, None] * C + c[None, :]
            dy = tl.load(dy_at + at, there, 0.0).to(tl.float32)
            n = (tl.load(x_at + at, there, 0.0).to(tl.float32) - mean) * inverse
            dx = (dy * weight[None, :] - shift - n * pull) * inverse
            tl.store(dx_at + at, dx.to(dx_at.dtype.element_ty), there)
