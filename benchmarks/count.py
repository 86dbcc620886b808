"""What a training step has to do: its floating-point operations, and the bytes that its operations read and write."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

UNMOVED = ("_unsafe_view", "_reshape_alias")  # views that torch does not call so


class Count(TorchDispatchMode):
    """Counts every operation run within, forward, backward and optimiser.

    `FlopCounterMode` has the same formulas, but its book-keeping a module stops at WGANgp's gradient of a gradient.

    Attributes
    ----------
    flop : of convolutions and matrix products, 2 a multiply-add; the rest, a percent or so, is left out as is usual.
    bytes : of all tensors that an operation reads and of all that it writes, views and allocations left out: the
        traffic if nothing stayed in a cache between operations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flop = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.flop += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        if not (func.is_view or "empty" in func.__name__ or func.__name__.startswith(UNMOVED)):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return out
