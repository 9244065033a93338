"""How flat the loss is at a model: the one entry for runs and for the command line."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from fl_common.determinism import seed_of
from fl_common.failures import first_line
from fl_flatness.layers import layers
from fl_flatness.products import Curvature, cut
from fl_flatness.spectrum import Lanczos, density, eigenpairs
from fl_flatness.trace import hutchinson

if TYPE_CHECKING:
    from typing import Any

    import torch


@dataclass(frozen=True)
class Settings:
    """What is measured, and how exactly."""

    engine: Literal["own", "pyhessian"] = "own"
    """Whose eigenvalues, trace and density: this package's, or PyHessian's (an extra)."""
    batch_size: int = 128
    """Samples per graph: memory depends on it, and numbers by rounding alone."""
    tolerance: float = 1e-2
    """On ||H v - lambda v|| / |lambda| of each eigenvalue; see `spectrum.Eigenpairs`."""
    steps: int = 100
    """Most products for the eigenvalues."""
    probes: int = 16
    """Products for the trace, 2 or more; its standard error falls as their root."""
    top: int = 1
    """Largest eigenvalues; from 2 on they are listed."""
    density_probes: int = 0
    """Start vectors of the spectral density; 0: none."""
    density_steps: int = 30
    """Products, and nodes, of each."""
    layers: bool = False
    """lambda_max, trace and activation norms of every layer."""


def measure(
    net: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, settings: Settings, seed: int
) -> dict[str, Any]:
    """Flatness of the mean loss of `net` over x (n, ...), transformed already, and y (n,).

    Gives JSON-ready numbers:

    lambda_max, lambda_min: the largest and smallest eigenvalue by algebraic value;
        `_residual`: ||H v - lambda v|| / |lambda| of each.  lambda_min is an upper bound, as near
        as its residual says; PyHessian gives none.
    converged: whether the eigenvalues asked for are as exact as asked for.
    trace, trace_error: its estimate and standard error.
    products: Hessian-vector products for these; of this package's engine alone.
    eigenvalues, eigenvalue_residuals: with `top` > 1, in descending order.
    density: with `density_probes`, {"nodes": [...], "weights": [...]} of `spectrum.Density`.
    layers: with `layers`, rows of `layers.LayerFlatness`; always of this package's engine.

    The network is left as found, its generators included; BatchNorm uses its running statistics.
    Equal seeds give equal bits on one machine.  Raises ValueError where the curvature is not
    finite, where torch cannot compute it, or there is nothing to measure.
    """
    try:
        return _measured(net, x, y, settings, seed)
    except RuntimeError as error:  # mostly of operations without a second derivative
        raise ValueError(f"torch cannot compute the curvature: {first_line(error)}") from error


def _measured(
    net: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, settings: Settings, seed: int
) -> dict[str, Any]:
    batches = cut(x, y, settings.batch_size)
    curvature = Curvature(net, batches)
    stream = seed_of("flatness", seed)
    if settings.engine == "pyhessian":
        from fl_flatness.pyhessian_engine import PyHessian

        found = PyHessian(curvature, stream).measure(settings)
    else:
        found = _own(curvature, settings, stream)
    if settings.layers:
        rows = layers(
            net, batches, tolerance=settings.tolerance, steps=settings.steps,
            probes=settings.probes, seed=stream,
        )  # fmt: skip
        found["layers"] = [asdict(row) for row in rows]
    return found


def _own(curvature: Curvature, settings: Settings, stream: int) -> dict[str, Any]:
    lanczos = Lanczos(curvature, stream)
    steps, top = min(settings.steps, curvature.d), min(settings.top, curvature.d)
    pairs = eigenpairs(lanczos, top, tolerance=settings.tolerance, steps=steps)
    trace = hutchinson(curvature, probes=settings.probes, seed=stream, within=lanczos)
    found: dict[str, Any] = {
        "lambda_max": float(pairs.values[0]),
        "lambda_max_residual": float(pairs.residuals[0]),
        "lambda_min": pairs.lowest,
        "lambda_min_residual": pairs.lowest_residual,
        "converged": pairs.converged,
        "products": len(lanczos.basis) + settings.probes,
        "trace": trace.value,
        "trace_error": trace.error,
    }
    if settings.top > 1:
        found["eigenvalues"] = pairs.values.tolist()
        found["eigenvalue_residuals"] = pairs.residuals.tolist()
    if settings.density_probes:
        seen = density(
            curvature, probes=settings.density_probes, steps=settings.density_steps, seed=stream
        )
        found["density"] = {"nodes": seen.nodes.tolist(), "weights": seen.weights.tolist()}
    return found
