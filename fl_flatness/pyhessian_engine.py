"""PyHessian 0.1 (Yao et al. 2020; https://github.com/amirgholami/PyHessian) as the engine.

An optional extra, and a second opinion on this package's numbers.  What it would otherwise do, and
what is done about it here:

- it puts the model in evaluation mode for good: it works on a copy of the network;
- of a single batch it leaves gradients with their graphs in `.grad`, which keep each other alive,
  and adds to them on a second call, which doubles every eigenvalue: it is given a list of batches,
  even of one, and then drops them itself;
- it takes a GPU unless told otherwise, and draws from the global generator: both are told;
- it raises for parameters that the loss does not use: a term (s / 2) ||theta - theta_0||^2 at
  theta = theta_0 uses all of them, and adds s to every eigenvalue, 0 by default;
- it orders eigenvalues by |lambda|: where it finds a negative one, s moves all of them above 0, so
  that the order is the algebraic one;
- its trace stops at a small change of the running mean, or where that is negative: it is told
  never to stop early, and gives as many samples as were asked for;
- its density needs `torch.eig`, which torch has no more: `torch.linalg.eigh` stands in;
- it averages over batches, which is right for a loss that is a mean: cross-entropy is.
"""

from __future__ import annotations

import copy
import warnings
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fl_common.determinism import seed_of
from fl_common.passes import criterion_of, unrounded
from fl_flatness.products import refuse_once_differentiable
from fl_flatness.spectrum import Density, merged
from fl_flatness.trace import Estimate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fl_flatness.measure import Settings
    from fl_flatness.products import Curvature

MISSING = (
    "flatness.engine = pyhessian: PyHessian is not installed; pip install 'flatfed[pyhessian]', "
    "or set flatness.engine=own"
)


class PyHessian:
    """The Hessian of `curvature`, seen by PyHessian.  Raises ValueError if it is not installed."""

    def __init__(self, curvature: Curvature, seed: int) -> None:
        try:
            # By name: the package's attribute `hessian` is the class of that name.
            self.module = import_module("pyhessian.hessian")
        except ImportError:
            raise ValueError(MISSING) from None
        self.curvature, self.seed = curvature, seed

    def eigenvalues(
        self, k: int = 1, *, tolerance: float = 1e-2, steps: int = 100
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The k largest by algebraic value (k,), and their vectors (k, d), both float64.

        tolerance: on the residual, as elsewhere.  PyHessian stops at a relative change of the
            eigenvalue, which goes as the residual's square; here at tolerance^2 / 10.
        steps: most products for each of them, and for each attempt.
        """
        values, vectors = self._power(k, 0.0, tolerance, steps)
        if values.min() < 0:
            shift = float(values.abs().max())
            values, vectors = self._power(k, shift, tolerance, steps)
        order = values.argsort(descending=True, stable=True)
        return values[order], vectors[order]

    def _power(
        self, k: int, shift: float, tolerance: float, steps: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with self._hessian("eigenvalues", shift) as hessian:
            values, vectors = hessian.eigenvalues(maxIter=steps, tol=tolerance**2 / 10, top_n=k)
        rows = [torch.cat([part.flatten() for part in v]).double() for v in vectors]
        return (
            torch.tensor(values, dtype=torch.float64) - shift,
            # Without curvature its vectors are 0.
            torch.stack([row / (row.norm() or 1.0) for row in rows]),
        )

    def trace(self, *, probes: int) -> Estimate:
        with self._hessian("trace") as hessian:
            samples = torch.tensor(hessian.trace(maxIter=probes, tol=float("-inf"))).double()
        return Estimate(float(samples.mean()), float(samples.std()) / probes**0.5)

    def density(self, *, probes: int = 4, steps: int = 30) -> Density:
        """At most d steps: PyHessian goes on with rounding errors beyond the last one."""
        with self._hessian("density") as hessian, _torch_with_eig(self.module):
            nodes, weights = hessian.density(iter=min(steps, self.curvature.d), n_v=probes)
        return merged(
            [
                (torch.tensor(n).double(), torch.tensor(w).double() / probes)
                for n, w in zip(nodes, weights, strict=True)
            ]
        )

    def measure(self, settings: Settings) -> dict[str, Any]:
        """What `measure.measure` gives, of this engine; without lambda_min."""
        top, tolerance = min(settings.top, self.curvature.d), settings.tolerance
        values, vectors = self.eigenvalues(top, tolerance=tolerance, steps=settings.steps)
        residuals = [self._residual(float(a), v) for a, v in zip(values, vectors, strict=True)]
        trace = self.trace(probes=settings.probes)
        found: dict[str, Any] = {
            "lambda_max": float(values[0]),
            "lambda_max_residual": residuals[0],
            "converged": max(residuals) <= tolerance,
            "trace": trace.value,
            "trace_error": trace.error,
        }
        if settings.top > 1:
            found["eigenvalues"] = values.tolist()
            found["eigenvalue_residuals"] = residuals
        if settings.density_probes:
            seen = self.density(probes=settings.density_probes, steps=settings.density_steps)
            found["density"] = {"nodes": seen.nodes.tolist(), "weights": seen.weights.tolist()}
        return found

    def _residual(self, value: float, vector: torch.Tensor) -> float:
        """||H v - lambda v|| / |lambda| by a product of our own."""
        off = float((self.curvature.product(vector) - value * vector).norm())
        return off / abs(value) if off else 0.0

    @contextmanager
    def _hessian(self, purpose: str, shift: float = 0.0) -> Iterator[Any]:
        """PyHessian's object over a copy of the network, with `shift` added to eigenvalues."""
        curvature = self.curvature
        net = copy.deepcopy(curvature.net)
        for name, p in net.named_parameters():
            p.requires_grad_(name in curvature.names)
        params = [p for p in net.parameters() if p.requires_grad]
        starts = [p.detach().clone() for p in params]
        loss_of = criterion_of(net)

        def criterion(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            refuse_once_differentiable(output)
            away = sum((p - s).square().sum() for p, s in zip(params, starts, strict=True))
            return loss_of(output, y) + shift / 2 * away

        cuda = curvature.device.type == "cuda"
        with (
            torch.random.fork_rng(devices=[curvature.device] if cuda else []),
            torch.cuda.device(curvature.device if cuda else -1),
            torch.enable_grad(),
            unrounded(),
            # The faster kernels of attention have no second derivative.
            sdpa_kernel(SDPBackend.MATH),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", message="Using backward.. with create_graph")
            torch.manual_seed(seed_of(f"pyhessian-{purpose}", self.seed))
            loader = list(curvature.batches)
            yield self.module.hessian(net, criterion, dataloader=loader, cuda=cuda)


@contextmanager
def _torch_with_eig(module: Any) -> Iterator[None]:
    """`module.torch` has `eig` again, for symmetric matrices."""

    class Torch:
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        @staticmethod
        def eig(t: torch.Tensor, eigenvectors: bool) -> tuple[torch.Tensor, torch.Tensor]:
            values, vectors = torch.linalg.eigh(t)
            return values[:, None], vectors

    module.torch = Torch()
    try:
        yield
    finally:
        module.torch = torch
