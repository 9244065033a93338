"""Which forward passes are a step's own, and which are extra.

A method on forward hooks works on the pass whose output the loss is taken of.  Methods that look
at the network once more (a teacher, a slimmed copy, a reference) wrap that in `extra_pass`.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from fl_common.deferred import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

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
