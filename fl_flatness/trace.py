"""Trace and diagonal of a Hessian from products with random signs v: E v v^T = 1.

Hutchinson 1990: tr H = E v^T H v, and diag H = E v * (H v) (Bekas, Kokiopoulou and Saad 2007).
The variance of v^T H v is twice the sum of the squares off the diagonal, most of which a few large
eigenvalues make.  Hutch++ (Meyer, Musco, Musco and Woodruff, SOSA 2021) therefore takes the trace
within a subspace Q exactly, and estimates the rest:

    tr H = tr Q H Q^T + tr (1 - Q^T Q) H (1 - Q^T Q).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fl_common.deferred import torch
from fl_common.determinism import seed_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fl_flatness.products import Curvature
    from fl_flatness.spectrum import Lanczos

BLOCK = 8
"""Vectors multiplied at once: they share the graphs of the batches, and cost 16 d bytes each."""


@dataclass(frozen=True)
class Estimate:
    value: float
    error: float
    """Standard error, by the spread of the probes."""


def hutchinson(
    curvature: Curvature, *, probes: int, seed: int = 0, within: Lanczos | None = None
) -> Estimate:
    """tr H from `probes` products, 2 or more.

    within: a basis whose share of the trace is known, the sum of its alpha.  After the largest
        eigenvalues were computed, this makes the estimate Hutch++ for no further product.
    """
    if probes < 2:
        raise ValueError(f"{probes} probes: a trace with its standard error needs 2 or more")
    known, basis = (sum(within.alpha), within.basis) if within else (0.0, [])
    values = []
    for vectors in signs(curvature, probes, seed):
        for q in basis:
            wide = q.double()
            vectors.addr_(vectors @ wide, wide, alpha=-1)
        values.append((vectors * curvature.products(vectors)).sum(1))
    found = torch.cat(values)
    return Estimate(known + float(found.mean()), float(found.std()) / len(found) ** 0.5)


def diagonal(curvature: Curvature, *, probes: int, seed: int = 0) -> torch.Tensor:
    """diag H from an even number of products, 2 or more: two estimates from independent halves of
    them, (2, d) float64.  The product of the two is ||diag H||^2 without the bias that the square
    of one estimate has."""
    if probes < 2 or probes % 2:
        raise ValueError(f"{probes} probes: a diagonal needs an even number, 2 or more")
    sums = torch.zeros(2, curvature.d, dtype=torch.float64, device=curvature.device)
    for vectors in signs(curvature, probes, seed):
        terms = vectors.mul_(curvature.products(vectors))
        sums[0] += terms[::2].sum(0)
        sums[1] += terms[1::2].sum(0)
    return sums * 2 / probes


def signs(curvature: Curvature, count: int, seed: int) -> Iterator[torch.Tensor]:
    """`count` vectors of random signs, up to (BLOCK, d) float64 at a time."""
    device = curvature.device
    for start in range(0, count, BLOCK):
        rows = []
        for probe in range(start, min(start + BLOCK, count)):
            generator = torch.Generator(device).manual_seed(seed_of("flatness-probe", seed, probe))
            rows.append(torch.randint(2, (curvature.d,), generator=generator, device=device))
        yield torch.stack(rows).double().mul_(2).sub_(1)
