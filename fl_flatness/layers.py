"""Curvature and activation norms layer by layer: what MAN's theory puts side by side.

For a layer with weight W, input a and output z, and a single sample whose later layers are
piecewise linear, the block of the Hessian is H_W = (a a^T) x G with G = d2 loss / dz2, hence
lambda_max(H_W) = ||a||^2 lambda_max(G); for a linear layer over B samples,

    lambda_max(H_W) <= max_i lambda_max(G_i) ||A||_F^2 / B.

||A||_F^2 / B is `input_per_sample` here.  MAN penalises the mean square of the outputs of ReLUs,
`output_per_element`, which are the inputs of the layers that follow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fl_common.deferred import torch
from fl_common.passes import evaluating, unrounded
from fl_flatness.products import Curvature
from fl_flatness.spectrum import Lanczos, eigenpairs
from fl_flatness.trace import hutchinson

if TYPE_CHECKING:
    from typing import Any

    from fl_flatness.products import Batches

ACTIVATIONS = (
    "ReLU", "ReLU6", "LeakyReLU", "PReLU", "ELU", "CELU", "SELU", "GELU", "SiLU", "Mish",
    "Softplus", "Tanh", "Sigmoid", "Hardtanh", "Hardswish", "LogSigmoid",
)  # fmt: skip


@dataclass(frozen=True)
class LayerFlatness:
    """A module with trainable parameters of its own; JSON-ready by `dataclasses.asdict`."""

    layer: str
    """Its name in the network; a weight that layers share counts for the first of them."""
    kind: str
    """Its class."""
    parameter: str
    """What the block is of: "weight", where it has one, or its first parameter."""
    lambda_max: float
    lambda_max_residual: float
    """Relative; see `spectrum.Eigenpairs`."""
    trace: float
    trace_error: float
    """Standard error."""
    input_per_sample: float | None
    """Mean over the samples of ||a||^2, summed over the calls of the layer, if it has several."""
    input_per_element: float | None
    """Mean of the squares."""
    output_per_sample: float | None
    """The same of the next activation function's output; None where none follows, and inputs too
    where the layer is not called."""
    output_per_element: float | None


def layers(
    net: torch.nn.Module,
    batches: Batches,
    *,
    tolerance: float = 1e-2,
    steps: int = 100,
    probes: int = 16,
    seed: int = 0,
) -> list[LayerFlatness]:
    """One entry per layer, in the network's order.

    tolerance, steps: of each lambda_max, as in `eigenpairs`; probes: of each trace, one product
    each.  n layers cost about n times as much as a measurement of the whole network.
    """
    norms = activation_norms(net, batches)
    trainable = {name for name, p in net.named_parameters() if p.requires_grad}
    found = []
    for name, module in net.named_modules():
        prefix = f"{name}." if name else ""
        own = [p for p, _ in module.named_parameters(recurse=False) if prefix + p in trainable]
        if not own:
            continue
        chosen = "weight" if "weight" in own else own[0]
        block = Curvature(net, batches, only=[prefix + chosen])
        lanczos = Lanczos(block, seed)
        top = eigenpairs(lanczos, tolerance=tolerance, steps=min(steps, block.d))
        trace = hutchinson(block, probes=probes, seed=seed, within=lanczos)
        inputs, outputs = norms[name]
        found.append(
            LayerFlatness(
                layer=name,
                kind=type(module).__name__,
                parameter=chosen,
                lambda_max=float(top.values[0]),
                lambda_max_residual=float(top.residuals[0]),
                trace=trace.value,
                trace_error=trace.error,
                input_per_sample=inputs.per_sample(),
                input_per_element=inputs.per_element(),
                output_per_sample=outputs.per_sample(),
                output_per_element=outputs.per_element(),
            )
        )
    return found


@dataclass
class Squares:
    """The sum of squares of an activation's values, over batches and calls."""

    sum: float | torch.Tensor = 0.0
    elements: int = 0
    samples: int = 0

    def add(self, a: torch.Tensor) -> None:
        self.sum = self.sum + a.detach().double().square().sum()
        self.elements += a.numel()

    def per_sample(self) -> float | None:
        """Mean of ||A||^2 over the samples; None if nothing was seen."""
        return float(self.sum) / self.samples if self.elements else None

    def per_element(self) -> float | None:
        """Mean of the squares."""
        return float(self.sum) / self.elements if self.elements else None


def activation_norms(net: torch.nn.Module, batches: Batches) -> dict[str, tuple[Squares, Squares]]:
    """Input and following activation of every module with parameters of its own, by its name.

    The activation functions are modules of torch.nn; functional ones cannot be seen.
    """
    found: dict[str, tuple[Squares, Squares]] = {}
    waiting: list[Squares] = []
    """Of layers that no activation function has followed yet."""
    handles = []

    def enters(inputs: Squares, outputs: Squares) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], torch.Tensor) and args[0].is_floating_point():
                inputs.add(args[0])
            waiting.append(outputs)

        return hook

    def activates(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        for outputs in waiting:
            outputs.add(output)
        waiting.clear()

    kinds = tuple(getattr(torch.nn, name) for name in ACTIVATIONS)
    samples = 0
    try:
        for name, module in net.named_modules():
            if next(module.parameters(recurse=False), None) is not None:
                pair = found[name] = Squares(), Squares()
                handles.append(module.register_forward_pre_hook(enters(*pair)))
            if isinstance(module, kinds):
                handles.append(module.register_forward_hook(activates))
        with evaluating(net), unrounded(), torch.no_grad():
            for x, y in batches:
                net(x)
                samples += len(y)
                waiting.clear()
    finally:
        for handle in handles:
            handle.remove()
    for squares in (one for pair in found.values() for one in pair):
        squares.samples = samples
    return found
