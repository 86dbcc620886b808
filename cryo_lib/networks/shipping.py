"""Networks made small enough to be shipped in git: at 16 bit, where that loses nothing that matters."""

from __future__ import annotations

import copy

from safetensors.torch import save
from torch import nn

from cryo_lib.networks import models

DIGITS = 2**11  # a 16-bit float keeps a number to one part of it, from 2**-14 on


def at_16_bit(model: nn.Module, limit: float) -> tuple[nn.Module, float]:
    """A copy of a network with 16-bit weights, and the size of its file, MB (1e6 bytes).

    A float keeps 11 binary digits of a number between 6e-5 and 65,504. In a convolution's kernel no number may move by
    more than one part in 2,048 of its greatest; in vectors (biases, batch norm's statistics) 3e-8 does not matter.

    Raises
    ------
    ValueError : more is lost, or the file has more than `limit` MB.
    """
    half = copy.deepcopy(model).half()
    kept, lost = half.state_dict(), []
    for name, value in model.state_dict().items():
        largest, error = value.double().abs().max(), (kept[name].double() - value.double()).abs().max()
        if not error <= max(largest, 2**-14 if value.ndim < 2 else 0) / DIGITS:
            lost.append(f"{name} (up to {largest:.3g}, off by up to {error:.3g})")
    if lost:
        problem = (
            f"values that 16 bits hold to one part in {DIGITS}, got {len(lost)} of {len(kept)} tensors with others"
        )
        raise ValueError(f"weights: expected {problem}, the first {lost[0]}; ship another network")
    size = len(save(kept)) / 1e6
    if size > limit:
        network = f"{models.parameter_count(model):,} parameters at 16 bit"
        problem = f"expected a file of at most {limit:g} MB, since it lies in git, got {size:.3g} MB ({network})"
        raise ValueError(f"weights: {problem}; ship a narrower or smaller network")
    return half, size
