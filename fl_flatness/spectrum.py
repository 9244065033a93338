"""Eigenvalues at both ends of a Hessian's spectrum, and its density, by Lanczos' method.

From a start vector, m products give an orthonormal basis V (m, d) with V H V^T = T tridiagonal.
T's eigenvalues theta (Ritz values) approach those of H from within, at both ends first; for T's
eigenvector s, ||H u - theta u|| = beta_m |s_m| with u = V^T s, so the residual is known without a
further product.  The basis is orthogonalised twice against all of itself (Golub and Van Loan,
Matrix Computations, section 10.3), without which converged eigenvalues would come again.  An
eigenvalue that occurs several times counts once, until the basis spans the whole space.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fl_common.deferred import torch
from fl_common.determinism import seed_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_flatness.products import Curvature


class Lanczos:
    """V and T of the Hessian of `curvature`, grown by one product at a time.

    V's rows are kept in the network's dtype: m d numbers.  seed: of the start vector, and of the
    fresh ones that follow once the products lead nowhere new.
    """

    def __init__(self, curvature: Curvature, seed: int) -> None:
        self.curvature, self.seed = curvature, seed
        self.basis: list[torch.Tensor] = []
        """The rows (d,) of V."""
        self.alpha: list[float] = []
        """T's diagonal."""
        self.beta: list[float] = []
        """beta[j] couples rows j and j + 1 of V; the last one would couple the next row."""
        self._next = self._fresh()

    @property
    def exhausted(self) -> bool:
        """Whether V spans all that the start vector leads to: T's eigenvalues are H's."""
        return bool(self.beta) and self.beta[-1] == 0.0

    def step(self) -> None:
        """One product; there are at most d."""
        q = self._fresh() if self._next is None else self._next
        self.basis.append(q)
        w = self.curvature.product(q)
        self.alpha.append(float(w @ q.double()))
        self._orthogonalise(w)
        beta = float(w.norm())
        rounding = 100 * torch.finfo(q.dtype).eps * max(map(abs, (*self.alpha, *self.beta)))
        ended = beta <= rounding or len(self.basis) == self.curvature.d
        self.beta.append(0.0 if ended else beta)
        self._next = None if ended else (w / beta).to(q.dtype)

    def ritz(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """theta (m,) in ascending order, s in columns (m, m), residuals ||H u - theta u|| (m,)."""
        off = torch.tensor(self.beta[:-1], dtype=torch.float64)
        t = torch.diag(torch.tensor(self.alpha, dtype=torch.float64))
        theta, s = torch.linalg.eigh(t + torch.diag(off, 1) + torch.diag(off, -1))
        return theta, s, self.beta[-1] * s[-1].abs()

    def vector(self, s: torch.Tensor) -> torch.Tensor:
        """u = V^T s (d,) float64, of length 1, for s (m,)."""
        u = torch.zeros(self.curvature.d, dtype=torch.float64, device=self.curvature.device)
        for q, weight in zip(self.basis, s.tolist(), strict=True):
            u.add_(q, alpha=weight)
        return u / u.norm()

    def _fresh(self) -> torch.Tensor:
        of = self.curvature
        seed = seed_of("flatness-start", self.seed, len(self.basis))
        generator = torch.Generator(of.device).manual_seed(seed)
        v = torch.randn(of.d, generator=generator, dtype=torch.float64, device=of.device)
        self._orthogonalise(v)
        return (v / v.norm()).to(of.dtype)

    def _orthogonalise(self, w: torch.Tensor) -> None:
        for _ in range(2):
            for q in self.basis:
                wide = q.double()
                w.addcmul_(wide, -(w @ wide))


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues in algebraic order: the largest need not have the largest |lambda|, where there
    are negative ones.  Residuals are relative, ||H v - lambda v|| / |lambda|; an eigenvalue lies
    within this share of |lambda|, up to the rounding of products.  lambda itself is nearer by far
    (by the residual's square), unless others are as near as the residual: those may come as one.
    """

    values: torch.Tensor
    """(k,) float64, the largest, in descending order."""
    residuals: torch.Tensor
    """(k,) float64."""
    vectors: torch.Tensor
    """(k, d) float64, of length 1."""
    lowest: float
    """The smallest eigenvalue by algebraic value, approached from above."""
    lowest_residual: float
    converged: bool
    """Whether the residuals are as small as was asked for."""


def eigenpairs(
    lanczos: Lanczos, k: int = 1, *, tolerance: float = 1e-2, steps: int = 100
) -> Eigenpairs:
    """The k largest eigenvalues, and the smallest one as far as it is known by then.

    Grows `lanczos` until the relative residuals of the k are at most `tolerance`, or its basis has
    `steps` rows.
    """
    d = lanczos.curvature.d
    if not 1 <= k <= min(steps, d):
        raise ValueError(f"{k} eigenvalues: from 1 to {min(steps, d)}, for {d} parameters and "
                         f"{steps} steps")  # fmt: skip
    while True:
        if len(lanczos.basis) >= k:
            theta, s, residuals = lanczos.ritz()
            top = list(range(len(theta) - 1, len(theta) - 1 - k, -1))
            converged = bool((residuals <= tolerance * theta.abs())[top].all())
            if converged or len(lanczos.basis) >= min(steps, d):
                break
        lanczos.step()
    relative = torch.where(residuals > 0, residuals / theta.abs(), 0.0)
    return Eigenpairs(
        values=theta[top],
        residuals=relative[top],
        vectors=torch.stack([lanczos.vector(s[:, i]) for i in top]),
        lowest=float(theta[0]),
        lowest_residual=float(relative[0]),
        converged=converged,
    )


@dataclass(frozen=True)
class Density:
    """Where the d eigenvalues lie: sum_j weights[j] delta(lambda - nodes[j]), of mass 1."""

    nodes: torch.Tensor
    """(m,) float64, in ascending order."""
    weights: torch.Tensor
    """(m,) float64, of sum 1."""


def density(curvature: Curvature, *, probes: int = 4, steps: int = 30, seed: int = 0) -> Density:
    """Stochastic Lanczos quadrature (Ghorbani, Krishnan and Xiao, ICML 2019).

    Each of `probes` random start vectors gives the nodes theta_j and weights s_j[0]^2 of a
    Gaussian quadrature of the density that it sees; their mean is returned.
    """
    if probes < 1 or steps < 1:
        raise ValueError(f"{probes} probes, {steps} steps: at least 1 of each")
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for probe in range(probes):
        lanczos = Lanczos(curvature, seed_of("flatness-density", seed, probe))
        while len(lanczos.basis) < min(steps, curvature.d) and not lanczos.exhausted:
            lanczos.step()
        theta, s, _ = lanczos.ritz()
        found.append((theta, s[0] ** 2 / probes))
    return merged(found)


def merged(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Density:
    """One density of nodes and weights that come in parts."""
    nodes, weights = (torch.cat(column) for column in zip(*parts, strict=True))
    order = nodes.argsort(stable=True)
    return Density(nodes[order], weights[order])
