"""A trained network, or any denoiser of arrays, applied to a particle stack on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from cryo_lib import models
from cryo_lib.particles import ParticleStack, write


Denoiser = torch.nn.Module | Callable[[np.ndarray], np.ndarray]


def denoise_stack(
    model: Denoiser | Mapping[int, Denoiser],
    particles: ParticleStack | str | Path,
    out: str | Path,
    *,
    batch_size: int = 100,
) -> Path:
    """Denoise every image of a stack and write `.mrcs` + `.star`, in batches: memory does not grow with the stack.

    Parameters
    ----------
    model : a generator (run on the device its weights are on, in eval mode), or a function from `(n, h, w)` float32 to the
        same shape; or one for each half-set (rlnRandomSubset), `{1: ..., 2: ...}`: half-maps then share no network.
    particles : an open stack or the path of one, `(n, h, w)`, on the grey scale that the network was trained on.
    out : the `.star` to write (its `.mrcs` goes beside it), or a `.mrcs` alone; rows, order and columns are kept, only the
        image reference changes.

    Returns
    -------
    The path written.

    Raises
    ------
    ValueError : images not of the size the network was built for; half-sets missing, or others than `model` has.
    """
    stack = particles if isinstance(particles, ParticleStack) else ParticleStack.open(particles)
    if isinstance(model, Mapping):
        half_sets = stack.half_sets
        if half_sets is None or set(half_sets) != set(model):
            found = "no rlnRandomSubset" if half_sets is None else sorted(set(half_sets.tolist()))
            raise ValueError(f"{stack.path}: expected the half-sets {sorted(model)}, one a model, got {found}")
    else:
        model, half_sets = {0: model}, np.zeros(len(stack), int)
    for each in model.values():
        _check_size(each, stack)

    def denoised() -> Iterator[np.ndarray]:
        for start in range(0, len(stack), batch_size):
            part = slice(start, start + batch_size)
            y = stack.images[part]
            x_hat = np.empty_like(y)
            for half, each in model.items():
                chosen = half_sets[part] == half
                if chosen.any():
                    x_hat[chosen] = _apply(each, y[chosen], batch_size)
            yield x_hat

    return write(out, denoised(), like=stack)


def _check_size(model: Denoiser, stack: ParticleStack) -> None:
    size, found = getattr(model, "image_size", None), tuple(stack.images.shape[1:])
    if size is not None and found != (size, size):
        raise ValueError(
            f"particles: this network denoises {size} x {size} px images, got {' x '.join(map(str, found))}; "
            "rescale or crop the stack explicitly, or train a network for its size"
        )


def _apply(model: Denoiser, y: np.ndarray, batch_size: int) -> np.ndarray:
    return models.denoise_images(model, y, batch_size) if isinstance(model, torch.nn.Module) else model(y)
