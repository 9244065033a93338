"""MOON: features like the global model's, unlike those of the client's last model.

Li et al., Model-Contrastive Federated Learning, CVPR 2021 (https://arxiv.org/abs/2103.16257), eq.
2-3; official code: https://github.com/QinbinLi/MOON.  Here z is the output of the projection
head, which the classifier reads, z_g that of the received model, and z_p that of the client's model
after its last round, both in evaluation mode:

    loss + mu mean_B -log(e^{cos(z, z_g) / tau} / (e^{cos(z, z_g) / tau} + e^{cos(z, z_p) / tau})).

A client's first round has no z_p and no term, as in that code's first round of a run.  In later
rounds, that code compares a new client with the random network that it began with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from pydantic import Field

from fl_common.config import Group
from fl_common.deferred import torch
from fl_common.layout import COUNTERS, PARAMS, STATS, Layout
from fl_common.models.catalogue import MODELS, skeleton
from fl_common.passes import called_with, evaluating, extra_pass, is_main_pass
from regularizers.base import Regularizer

if TYPE_CHECKING:
    from fl_common.config import CoreConfig
    from fl_common.layout import Flat

_REFERENCES: WeakKeyDictionary[torch.nn.Module, tuple[dict[str, torch.Tensor], ...]] = (
    WeakKeyDictionary()
)
"""The tensors of each network's two reference models, at the same addresses in every round, where
recorded passes read them."""

OWN_HEAD = "let it be fl_common.models.layers.with_head(Chain(...))"


class MOONParams(Group):
    mu: float = Field(
        1.0, ge=0, description="weight mu of the contrastive term; 0: off; MOON has 5 on CIFAR-10"
    )
    tau: float = Field(0.5, gt=0, description="temperature tau of the similarities")


class MOON(Regularizer):
    """With mu = 0 the run is the plain one with the same head."""

    name = "moon"
    alone = "it compares with two other models of each client"
    replays = True
    Params = MOONParams
    params: MOONParams
    neutral = "moon.mu=0"
    copies = 2
    memory = (PARAMS, STATS, COUNTERS)
    references: tuple[dict[str, torch.Tensor], ...] = ()
    """The tensors of the global and of the last local model; none before the first round."""

    @classmethod
    def check(cls, config: CoreConfig) -> list[str]:
        net = skeleton(config)
        if net is None or has_head(net):
            return []
        remedy = "set model.head=moon" if config.model.name in MODELS else OWN_HEAD
        return [f"moon with model.name = {config.model.name}: it has no projection head; {remedy}"]

    @classmethod
    def prepare(cls, net: torch.nn.Module, params: MOONParams) -> None:
        if not has_head(net):
            raise ValueError(f"moon: it has no projection head; {OWN_HEAD}")

    def blank(self, sent: Flat) -> Flat:
        return {}

    def remember(self, memory: Flat, sent: Flat, model: Flat) -> Flat:
        return {kind: model[kind] for kind in self.memory if kind in model}

    def begin(self, net: torch.nn.Module, sent: Flat, memory: Flat) -> None:
        if not (self.params.mu and memory):
            return
        from fl_common.models.layers import Representation

        layout, device = Layout.of(net), next(net.parameters()).device
        kinds = [kind for kind in self.memory if kind in memory]
        models = [
            layout.named({kind: flat[kind].to(device) for kind in kinds}) for flat in (sent, memory)
        ]
        if net not in _REFERENCES:
            # Tensors of their own: kernels may sum differently on views at other alignments.
            _REFERENCES[net] = tuple(
                {f"net.{name}": torch.empty_like(view) for name, view in m.items()} for m in models
            )
        self.references = _REFERENCES[net]
        for held, model in zip(self.references, models, strict=True):
            torch._foreach_copy_(list(held.values()), list(model.values()))
        self.net, self.representation = net, Representation(net)
        self.hooks = (net.fc.register_forward_pre_hook(self._see),)

    def variant(self) -> bool:
        return bool(self.references)

    def _see(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if is_main_pass(self.net):
            self.z = args[0]

    def data_term(
        self, x: torch.Tensor, output: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor | float:
        if not self.references:
            return 0.0
        z = self.z
        del self.z
        if not z.requires_grad:  # a partial round that trains only layers behind the projection
            return 0.0
        return self.params.mu * contrast(z, *self._refer(x), self.params.tau).mean()

    def _refer(self, x: torch.Tensor) -> list[torch.Tensor]:
        """z_g and z_p (B, width), of the network with each reference's tensors in turn."""
        if x.dim() == 4:  # faster on the CPU: pooling above all
            x = x.contiguous(memory_format=torch.channels_last)
        with evaluating(self.net), extra_pass(), torch.no_grad():
            return [called_with(self.representation, tensors, x) for tensors in self.references]

    def finish(self) -> None:
        super().finish()
        self.references = ()


def has_head(net: torch.nn.Module) -> bool:
    """Whether this is a `Chain` with a projection head."""
    from fl_common.models.layers import Chain

    return isinstance(net, Chain) and hasattr(net, "head")


def contrast(z: torch.Tensor, z_g: torch.Tensor, z_p: torch.Tensor, tau: float) -> torch.Tensor:
    """(B,) of z (B, width) in float32 or wider: -log(e^a / (e^a + e^b)) is softplus(b - a).

    Where both references are the same, b - a is exactly 0, and so is its gradient.
    """
    wide = torch.promote_types(z.dtype, torch.float32)
    z, z_g, z_p = (torch.nn.functional.normalize(each.to(wide)) for each in (z, z_g, z_p))
    return torch.nn.functional.softplus((z * (z_p - z_g)).sum(1) / tau)
