"""MAN: a penalty on the mean activation norm, which flattens the minimum that is found.

Official code: https://github.com/vcl-iisc/fedMAN (WACV 2024; https://arxiv.org/abs/2512.08314).
For a batch of B samples and activations A_1 ... A_L with m_l elements per sample

    L_total = L + (zeta / 2) R,    R = sum_l ||A_l||_F^2 / (B m_l),

where, as in that code, A_l are the outputs of ReLUs, before pooling and without the logits.  That
code has terms only for its two plain networks; here every ReLU of any network counts.  Its smaller
network for 64 px, outside the SAM folder, overwrites one term and penalises a variance in another;
we consider that a mistake and do not reproduce it.

The gradient of R's term with respect to A_l is a multiple of A_l, so it is added to the gradient
that passes there, and no graph is built.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fl_common.config import Group
from fl_common.deferred import torch
from fl_common.local import PADDING
from fl_common.models.catalogue import MODELS, skeleton
from fl_common.passes import is_main_pass
from regularizers.base import Regularizer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from fl_common.config import CoreConfig
    from fl_common.layout import Flat


NOTHING_TO_SEE = (
    "man looks at nn.ReLU modules (functional.relu cannot be seen), and this network has none; "
    "give it some, or set man.site=layer-input"
)


class MANParams(Group):
    zeta: float = Field(
        0.15,
        ge=0,
        description="weight zeta in (zeta / 2) R; 0: off; published: 0.15 (CIFAR-100), 0.1 or 0.2 "
        "(Tiny-ImageNet)",
    )
    site: Literal["post-act", "layer-input", "pre-act"] = Field(
        "post-act",
        description="which activations; post-act: outputs of ReLUs; layer-input: inputs of linear "
        "and convolutional layers but the first; pre-act: inputs of ReLUs",
    )
    include_logits: bool = Field(
        False, description="count the network's output as an activation too"
    )
    reduce: Literal["mean", "per-sample-sum", "fro"] = Field(
        "mean",
        description="the term of one activation; mean: mean of its squares over batch and "
        "elements; per-sample-sum: sum of its squares over elements, mean over the batch; fro: the "
        "norm of the whole, not squared",
    )
    layer_reduce: Literal["sum", "mean"] = Field(
        "sum", description="how the terms of all activations are combined"
    )


class MAN(Regularizer):
    """Every call of a module is a site, so a module that is used twice counts twice.

    Calls outside a step's own pass do not count (`fl_common.passes`), nor do activations that no
    trained parameter can change, such as the input.
    """

    name = "man"
    alone = ""
    replays = True
    Params = MANParams
    params: MANParams
    neutral = "man.zeta=0"

    @classmethod
    def check(cls, config: CoreConfig) -> list[str]:
        own = skeleton(config) if config.model.name not in MODELS else None
        if own is None or modules_at(config.man.site, own):
            return []
        return [f'regularizers = "{config.regularizers}": {NOTHING_TO_SEE}']

    @classmethod
    def warnings(cls, config: CoreConfig) -> list[str]:
        if not (config.man.include_logits and "moon" in config.regularizer_names):
            return []
        return ["man.include-logits with moon: both pull at the output; leave the logits out"]

    @classmethod
    def prepare(cls, net: torch.nn.Module, params: MANParams) -> None:
        if not modules_at(params.site, net):
            raise ValueError(NOTHING_TO_SEE)

    def begin(self, net: torch.nn.Module, sent: Flat, memory: Flat) -> None:
        self.net, self.seen = net, []
        self.layers = 0
        """L of the pass whose backward pass comes next."""
        if not self.params.zeta:
            return
        after = self.params.site == "post-act"
        self.hooks = tuple(
            module.register_forward_hook(self._after)
            if after
            else module.register_forward_pre_hook(self._before)
            for module in modules_at(self.params.site, net)
        )

    def _before(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self._see(args[0], overwritten=getattr(module, "inplace", False))

    def _after(self, module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        self._see(output)

    def _see(self, a: torch.Tensor, *, overwritten: bool = False) -> None:
        """Record an activation (B, ...), and have its term added to its gradient."""
        if self.stacked:
            if is_main_pass(self.net):
                self.seen.append(a.clone() if overwritten else a)
            return
        if not (a.requires_grad and is_main_pass(self.net)):
            return
        # Detached: a hook that held its own tensor would keep it from being freed.
        kept = a.detach().clone() if overwritten else a.detach()
        self.seen.append(kept)
        a.register_hook(lambda grad: self._with_gradient(grad, kept))

    def _with_gradient(self, grad: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """grad + (zeta / 2) dR/dA, in the dtype of both."""
        zeta = self.params.zeta / (self.layers if self.params.layer_reduce == "mean" else 1)
        if self.params.reduce == "fro":
            return grad + a * (zeta / 2 / _norms([a])[0].clamp_min(1e-12))
        return torch.add(grad, a, alpha=zeta / self._size(a))

    def data_term(
        self, x: torch.Tensor, output: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor | float:
        """(zeta / 2) R of the pass that gave `output`, float32 or wider, without a graph."""
        if not self.params.zeta:
            return 0.0
        if self.params.include_logits:
            self._see(output)
        seen, self.seen, self.layers = self.seen, [], len(self.seen)
        if not seen:
            return 0.0
        norms = _norms(seen)
        if self.params.reduce == "fro":
            terms = torch.stack(norms)
        else:
            roots = [self._size(a) ** -0.5 for a in seen]
            terms = torch.stack(torch._foreach_mul(norms, roots)).square()
        total = terms.mean() if self.params.layer_reduce == "mean" else terms.sum()
        return self.params.zeta / 2 * total

    def stacked_term(
        self, each: Sequence[MAN], output: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor | float:
        """(zeta / 2) R of each client (A,), whose gradient is taken through the graph."""
        params, seen = self.params, [a for a in self.seen if a.requires_grad]
        if params.zeta and params.include_logits:
            seen.append(output)
        if not (params.zeta and seen):
            return 0.0
        samples = y != PADDING
        terms = [_stacked(a, samples, params.reduce) for a in seen]
        total = torch.stack(terms).sum(0)
        return params.zeta / 2 * (total / len(seen) if params.layer_reduce == "mean" else total)

    def _size(self, a: torch.Tensor) -> int:
        """B m_l, or B."""
        return a.numel() if self.params.reduce == "mean" else len(a)


def modules_at(site: str, net: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules whose inputs or outputs are penalised."""
    nn = torch.nn
    kinds = (nn.Linear, nn.modules.conv._ConvNd) if site == "layer-input" else nn.ReLU
    return [module for module in net.modules() if isinstance(module, kinds)]


def _stacked(a: torch.Tensor, samples: torch.Tensor, reduce: str) -> torch.Tensor:
    """One activation's term (A,) of A clients; a (A, B, ...), samples (A, B) false for padding."""
    wide = a.to(torch.promote_types(a.dtype, torch.float32)).flatten(2)
    squares = (wide.square().sum(2) * samples).sum(1)
    if reduce == "fro":
        return squares.clamp_min(1e-24).sqrt()
    size = samples.sum(1)
    return squares / (size * wide.shape[2] if reduce == "mean" else size)


def _norms(activations: list[torch.Tensor]) -> list[torch.Tensor]:
    """||A_l||_F, summed in float32 or wider."""
    wide = torch.promote_types(activations[0].dtype, torch.float32)
    return list(torch._foreach_norm(activations, 2, dtype=wide))
