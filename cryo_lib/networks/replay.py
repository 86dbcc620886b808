"""A step that changes tensors in place, replayed as one CUDA graph: one launch instead of hundreds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WARM_UP = 3  # eager calls before the capture, in which libraries choose their kernels and optimisers make their state


class Replayed:
    """`step`, captured once and replayed at every call; its values are those of the eager step.

    Parameters
    ----------
    step : of tensors on a GPU, to tensors; it waits for nothing, and all that it changes is in `state`.
    state : the tensors that `step` changes. What the warm-up does to them is undone; those that are new after it, an
        optimiser's, start from 0.
    inputs : examples; later ones have the same shapes.
    """

    def __init__(
        self, step: Callable[..., dict[str, Tensor]], state: Callable[[], list[Tensor]], inputs: Sequence[Tensor]
    ) -> None:
        self._inputs = [value.clone() for value in inputs]
        before = [(value, value.detach().clone()) for value in state()]
        _warm_up(lambda: step(*self._inputs), inputs[0].device)
        known = {id(value) for value, _ in before}
        with torch.no_grad():
            for value, saved in before:
                value.copy_(saved)
            for value in state():
                if id(value) not in known:
                    value.zero_()
        self._replay, self._outputs = _capture(lambda: step(*self._inputs), inputs[0].device)

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """What `step` gives for these inputs; the next call overwrites it."""
        for place, value in zip(self._inputs, inputs, strict=True):
            place.copy_(value)
        self._replay()
        return self._outputs


def _warm_up(step: Callable[[], object], device: torch.device) -> None:
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)


def _capture(
    step: Callable[[], dict[str, Tensor]], device: torch.device
) -> tuple[Callable[[], None], dict[str, Tensor]]:
    graph = torch.cuda.CUDAGraph()
    # Other threads, of a loader that pins memory, may go on meanwhile.
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"):
        outputs = step()
    return graph.replay, outputs
