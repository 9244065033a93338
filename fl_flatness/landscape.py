"""The loss along lines and planes through the present parameters.

Directions are (d,), such as eigenvectors, or random ones with each filter as long as the
network's own (Li et al., Visualizing the Loss Landscape of Neural Nets, NeurIPS 2018, section 4),
which makes pictures of different networks comparable.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from fl_common.deferred import torch
from fl_common.determinism import seed_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fl_flatness.products import Curvature


def filter_normalised(curvature: Curvature, *, seed: int = 0, index: int = 0) -> torch.Tensor:
    """A random direction (d,) float64, number `index` of its stream.

    Each filter, a row of a weight of two or more dimensions, is scaled to ||d_f|| = ||theta_f||;
    biases and the scales of norm layers stay as they are, as in the authors' pictures.
    """
    generator = torch.Generator(curvature.device).manual_seed(
        seed_of("flatness-direction", seed, index)
    )
    parts = []
    for p in curvature.params:
        drawn = torch.randn(p.shape, generator=generator, dtype=torch.float64, device=p.device)
        if p.dim() < 2:
            parts.append(torch.zeros_like(drawn).flatten())
            continue
        rows, own = drawn.flatten(1), p.detach().double().flatten(1)
        lengths = own.norm(dim=1) / rows.norm(dim=1).clamp_min(1e-30)
        parts.append((rows * lengths[:, None]).flatten())
    return torch.cat(parts)


def line(curvature: Curvature, direction: torch.Tensor, steps: Sequence[float]) -> torch.Tensor:
    """Losses (n,) float64 at theta + a `direction`, for a in `steps`."""
    return plane(curvature, direction, torch.zeros_like(direction), steps, [0.0])[0]


def plane(
    curvature: Curvature,
    first: torch.Tensor,
    second: torch.Tensor,
    steps: Sequence[float],
    second_steps: Sequence[float],
) -> torch.Tensor:
    """Losses (m, n) float64 at theta + a `first` + b `second`; a goes along the columns.

    The parameters are put back from a copy, bit for bit, whatever happens.
    """
    for direction in (first, second):
        if direction.shape != (curvature.d,):
            raise ValueError(
                f"a direction has shape {tuple(direction.shape)}, the parameters ({curvature.d},)"
            )
    losses = torch.empty(len(second_steps), len(steps), dtype=torch.float64)
    with _restoring(curvature) as start:
        for i, b in enumerate(second_steps):
            for j, a in enumerate(steps):
                _place(curvature, start, a * first + b * second)
                losses[i, j] = curvature.loss()
    return losses


@contextmanager
def _restoring(curvature: Curvature) -> Iterator[list[torch.Tensor]]:
    start = [p.detach().clone() for p in curvature.params]
    try:
        yield start
    finally:
        with torch.no_grad():
            torch._foreach_copy_(curvature.params, start)


def _place(curvature: Curvature, start: list[torch.Tensor], offset: torch.Tensor) -> None:
    pieces = offset.to(curvature.device).split(curvature.sizes)
    with torch.no_grad():
        for p, origin, piece in zip(curvature.params, start, pieces, strict=True):
            # In float64, so that small steps are not lost before the sum is rounded.
            p.copy_(origin.double() + piece.view(p.shape))
