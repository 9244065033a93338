"""H_N and H_D: how alike the curvatures of the clients' losses are.

Mendieta et al., Local Learning Matters (FedAlign), eqs 3 and 4; with D_k the diagonal of client
k's Hessian, and means over pairs of clients

    H_N = (||D_k||^2 - ||D_j||^2)^2,     H_D = D_k . D_j / (||D_k|| ||D_j||).

`paper`: over the pairs k < j.  `fedalign-code`, as https://github.com/mmendiet/FedAlign computes
it: D_k has an entry per parameter tensor, the sum of its part of the diagonal; the norms of H_N
are not squared; the mean is over all K^2 pairs, those of a client with itself included.

That code takes batches of the whole training set for each client's model; what the diagonals are
made from is the caller's choice here.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import sqrt
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


@dataclass(frozen=True)
class Match:
    h_n: float
    """0 for clients whose Hessians are alike."""
    h_d: float
    """1 for clients whose Hessians are alike."""


def match(
    diagonals: Sequence[torch.Tensor],
    mode: Literal["paper", "fedalign-code"] = "paper",
    names: Sequence[int] | None = None,
) -> Match:
    """H_N and H_D of K >= 2 clients.

    diagonals: each D_k (d,), or two independent estimates of it, (2, d), as `trace.diagonal` gives
        them: the paper's products then pair different halves, so that noise does not bias them.
        Estimate all clients' with the same seed, so that like clients are exactly alike.  For
        fedalign-code an entry stands for a tensor, as `diagonals.as_sent` gives it.
    names: of the clients, for the error; counted from 0 unless given.

    Raises ValueError where a diagonal is zero or lost in the noise of its estimate.
    """
    if len(diagonals) < 2:
        raise ValueError(f"{len(diagonals)} client: a match needs two or more")
    halves = [(d, d) if d.dim() == 1 else (d[0], d[1]) for d in diagonals]
    if mode == "fedalign-code":
        means = [(a + b) / 2 for a, b in halves]
        halves = [(d, d) for d in means]
    squares = [_product(h, h) for h in halves]
    for k, square in zip(names or range(len(squares)), squares, strict=True):
        if not square > 0:
            raise ValueError(
                f"client {k}: ||diag H||^2 is estimated at {square:.3g}; use more probes"
            )
    pairs = list(combinations(range(len(halves)), 2))
    norm = sqrt if mode == "fedalign-code" else float
    h_n = [(norm(squares[k]) - norm(squares[j])) ** 2 for k, j in pairs]
    h_d = [_product(halves[k], halves[j]) / sqrt(squares[k] * squares[j]) for k, j in pairs]
    if mode == "fedalign-code":
        count = len(halves) ** 2
        return Match(2 * sum(h_n) / count, (2 * sum(h_d) + len(halves)) / count)
    return Match(sum(h_n) / len(pairs), sum(h_d) / len(pairs))


def _product(k: tuple[torch.Tensor, torch.Tensor], j: tuple[torch.Tensor, torch.Tensor]) -> float:
    """D_k . D_j from different halves, whose noise is independent even for common probes."""
    first, second = (float(a.double() @ b.double()) for a, b in ((k[0], j[1]), (k[1], j[0])))
    return (first + second) / 2
