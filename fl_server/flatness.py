"""Flatness during a run: the curvature of the loss at the global model, as numbers of a round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fl_common import wire
from fl_common.deferred import torch
from fl_common.guards import Spec
from fl_flatness.diagonals import subsample
from fl_flatness.match import match
from fl_flatness.measure import Settings, measure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from flwr.app import Message

    from fl_common.config import CoreConfig
    from fl_common.data.sources import Split


@dataclass(frozen=True)
class FlatnessOf:
    """Measures flatness on samples of the server's test set, which are drawn once."""

    config: CoreConfig
    x: torch.Tensor
    """(n, ...) as the model takes it, on the device."""
    y: torch.Tensor
    """(n,) int64, on the device."""

    @classmethod
    def of(
        cls,
        config: CoreConfig,
        test: Split,
        transform: Callable[[torch.Tensor], torch.Tensor],
        device: torch.device,
    ) -> FlatnessOf:
        """`flatness.samples` of `test` at most, through `transform`, on `device`."""
        chosen = subsample(len(test), config.flatness.samples, config.run.seed).numpy()
        x, y = (torch.from_numpy(a[chosen]).to(device) for a in (test.x, test.y))
        return cls(config, transform(x), y)

    def row(self, net: torch.nn.Module) -> dict[str, Any]:
        """lambda_max and trace with their errors; with `flatness.layers`, a list of layers."""
        flatness = self.config.flatness
        settings = Settings(
            engine=flatness.engine,
            tolerance=flatness.tolerance,
            probes=flatness.probes,
            layers=flatness.layers,
        )
        found = measure(net, self.x, self.y, settings, self.config.run.seed)
        named = ("lambda_max", "lambda_max_residual", "trace", "trace_error", "layers")
        return {key: found[key] for key in named if key in found}


def expected_diagonal(config: CoreConfig, net: torch.nn.Module) -> dict[str, dict[str, Spec]]:
    """The array records of a client's answer."""
    sizes = [p.numel() for p in net.parameters() if p.requires_grad]
    entries = len(sizes) if config.flatness.match == "fedalign-code" else sum(sizes)
    return {wire.ARRAYS: {wire.DIAGONAL: Spec((2, entries), "float32")}}


def matched(config: CoreConfig, replies: Iterable[tuple[int, Message]]) -> dict[str, float]:
    """H_N and H_D of all clients that answered, by name.  Raises ValueError as `match` does."""
    diagonals = {
        name: wire.unpack(reply.content[wire.ARRAYS])[wire.DIAGONAL] for name, reply in replies
    }
    found = match([*diagonals.values()], config.flatness.match, [*diagonals])
    return {"h_n": found.h_n, "h_d": found.h_d}
