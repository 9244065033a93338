"""`torch`, imported at first use.

Algorithm files declare their hyper-parameters, which the configuration must know within
milliseconds, beside tensor arithmetic, which needs torch (two seconds to import).  They write
`from fl_common.deferred import torch`; an attribute access imports the real module.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


class _Deferred:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(importlib.import_module(self._name), attribute)
        setattr(self, attribute, value)
        return value


if TYPE_CHECKING:
    import torch
else:
    torch = _Deferred("torch")
