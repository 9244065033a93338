"""Forward passes with other tensors than the network's own, in evaluation mode, or without TF32,
the loss of a pass, and which passes are a step's own.

A method on forward hooks works on the pass whose output the loss is taken of.  Methods that look
at the network once more (a teacher, a slimmed copy, a reference) wrap that in `extra_pass`.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from fl_common.deferred import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


def criterion_of(net: torch.nn.Module) -> Callable[..., torch.Tensor]:
    """The loss that a network is trained on and judged by, (output, y) -> scalar: its own `loss`,
    if it has one, or the cross-entropy; a mean over the samples of the batch."""
    return getattr(net, "loss", torch.nn.functional.cross_entropy)


def called_with(
    net: torch.nn.Module, tensors: Mapping[str, torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """`net(x)` with `tensors` in the place of its parameters and buffers of these names.

    Tensors that layers share are named once.  So is a module that the network has under several
    names, of which torch's `functional_call` would not put the tensors back.  What the pass puts in
    the place of a buffer is copied to the one in `tensors`.
    """
    given = {
        id(own): tensors[name]
        for named in (net.named_parameters, net.named_buffers)
        for name, own in named(remove_duplicate=False)
        if name in tensors
    }
    places = {
        name: given[id(own)]
        for path, module in net.named_modules()
        for named in (module.named_parameters, module.named_buffers)
        for name, own in named(path, recurse=False, remove_duplicate=False)
        if id(own) in given
    }
    after = dict(places)
    output = torch.func.functional_call(net, after, (x,), tie_weights=False)
    for name, tensor in places.items():
        if after[name] is not tensor:
            tensor.copy_(after[name])
    return output


@contextmanager
def evaluating(net: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module has its own mode again."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def unrounded() -> Iterator[None]:
    """A GPU's convolutions without TF32, which alone can make gradients differ by a few percent."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


_EXTRA = ContextVar("extra pass", default=False)


@contextmanager
def extra_pass() -> Iterator[None]:
    """Forward passes in here are not the step's own; may be nested."""
    token = _EXTRA.set(True)
    try:
        yield
    finally:
        _EXTRA.reset(token)


def is_main_pass(net: torch.nn.Module) -> bool:
    """Whether a forward pass of `net` now is a step's own: in training mode, with gradients, and
    outside `extra_pass`."""
    return net.training and torch.is_grad_enabled() and not _EXTRA.get()
