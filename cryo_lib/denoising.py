"""A trained network, or any denoiser of arrays, applied to a particle stack on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cryo_lib import models
from cryo_lib.particles import ParticleStack, write


def denoise_stack(
    model: torch.nn.Module | Callable[[np.ndarray], np.ndarray],
    particles: ParticleStack | str | Path,
    out: str | Path,
    *,
    batch_size: int = 100,
) -> Path:
    """Denoise every image of a stack and write `.mrcs` + `.star`, in batches: memory does not grow with the stack.

    Parameters
    ----------
    model : a generator (run on the device its weights are on, in eval mode), or a function from `(n, h, w)` float32 to the
        same shape.
    particles : an open stack or the path of one, `(n, h, w)`, on the grey scale that the network was trained on.
    out : the `.star` to write (its `.mrcs` goes beside it), or a `.mrcs` alone; rows, order and columns are kept, only the
        image reference changes.

    Returns
    -------
    The path written. ValueError where the images are not of the size the network was built for.
    """
    stack = particles if isinstance(particles, ParticleStack) else ParticleStack.open(particles)
    size = getattr(model, "image_size", None)
    if size is not None and tuple(stack.images.shape[1:]) != (size, size):
        raise ValueError(
            f"particles: this network denoises {size} x {size} px images, got {' x '.join(map(str, stack.images.shape[1:]))}; "
            "rescale or crop the stack explicitly, or train a network for its size"
        )

    def denoised() -> Iterator[np.ndarray]:
        for start in range(0, len(stack), batch_size):
            y: Any = stack.images[start : start + batch_size]
            yield models.denoise_images(model, y, batch_size) if isinstance(model, torch.nn.Module) else model(y)

    return write(out, denoised(), like=stack)
