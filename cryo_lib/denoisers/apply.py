"""A trained network, or any denoiser of arrays, applied to a particle stack on disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cryo_lib import checks
from cryo_lib.networks import models, parallel
from cryo_lib.simulate import noise, projection
from cryo_lib.stacks.particles import ParticleStack, contrast_of, write

PRINT_EVERY = 10  # seconds between lines of progress
RESIZES = ("none", "crop", "rescale")  # what may be done to images of another size, each with what stands before it
Denoiser = torch.nn.Module | Callable[[np.ndarray], np.ndarray]


def denoise_stack(
    model: Denoiser | Mapping[int, Denoiser],
    particles: ParticleStack | str | Path,
    out: str | Path,
    *,
    columns: Mapping[str, Any] | None = None,
    project: str | Path | None = None,
    batch_size: int = 100,
    precision: str = "float32",
    progress: bool = False,
) -> Path:
    """Denoise every image of a stack and write `.mrcs` + `.star`, in batches: memory does not grow with the stack.

    The next batch is read while one is denoised. Where torchrun started several processes, they take batches in turn,
    each on its own GPU, and the first one writes.

    Parameters
    ----------
    model : a generator (run on the device its weights are on, in eval mode), or a function from `(n, h, w)` float32 to
        the same shape; or one for each half-set (rlnRandomSubset), `{1: ..., 2: ...}`: half-maps then share no network.
    particles : an open stack or the path of one, `(n, h, w)`, on the grey scale that the network was trained on.
    out : the `.star` to write (its `.mrcs` goes beside it), or a `.mrcs` alone; rows, order and columns are kept, only
        the image reference changes.
    columns : numbers that the star gets beside its own, `(n,)` of each label; see `stacks.particles.write`.
    project : the folder that image references are relative to, those of `particles` (where it is a path) and of `out`;
        see `ParticleStack.open` and `write` for None.
    precision : of a generator's passes, as in `models.denoise_images`.
    progress : print a line every 10 s or so.

    Returns
    -------
    The path written.

    Raises
    ------
    ValueError : images not of the size the network was built for; half-sets missing, or others than `model` has.
    """
    stack = particles if isinstance(particles, ParticleStack) else ParticleStack.open(particles, project=project)
    if isinstance(model, Mapping):
        half_sets = stack.half_sets
        if half_sets is None or set(half_sets) != set(model):
            found = "no rlnRandomSubset" if half_sets is None else sorted(set(half_sets.tolist()))
            raise ValueError(f"{stack.path}: expected the half-sets {sorted(model)}, one a model, got {found}")
    else:
        model, half_sets = {0: model}, np.broadcast_to(0, len(stack))
    shape = stack.images.shape[1:]
    for size in {getattr(each, "image_size", None) for each in model.values()} - {None}:
        if shape != (size, size):
            raise ValueError(
                f"particles: this network denoises {size} x {size} px images, got {' x '.join(map(str, shape))}; "
                "rescale or crop the stack explicitly, or train a network for its size"
            )

    def denoised() -> Iterator[np.ndarray]:
        started = printed = time.monotonic()
        mine = batch_size * parallel.rank()
        starts = range(0, len(stack), batch_size * parallel.size())
        with ThreadPoolExecutor(1) as reader:
            ahead = [reader.submit(stack.images.__getitem__, slice(mine, mine + batch_size))]
            for start in starts:
                if progress and parallel.rank() == 0 and time.monotonic() - printed > PRINT_EVERY:
                    printed = time.monotonic()
                    print(f"{start} of {len(stack)} images, {start / (printed - started):.0f} a second", flush=True)
                y, part = ahead.pop().result(), slice(start + mine, start + mine + batch_size)
                following = slice(part.start + starts.step, part.stop + starts.step)
                ahead.append(reader.submit(stack.images.__getitem__, following))
                x_hat = np.empty_like(y)
                for half, each in model.items():
                    chosen = half_sets[part] == half
                    if chosen.any() and isinstance(each, torch.nn.Module):
                        x_hat[chosen] = models.denoise_images(each, y[chosen], batch_size, precision=precision)
                    elif chosen.any():
                        x_hat[chosen] = each(y[chosen])
                yield from parallel.in_order(x_hat, batch_size)

    if parallel.rank():
        for _ in denoised():
            pass
    return parallel.from_first(lambda: write(out, denoised(), stack, columns=columns, project=project))


def fit(
    model: torch.nn.Module,
    card: Mapping[str, Any],
    stack: ParticleStack,
    *,
    resize: str = "none",
    contrast: str | None = None,
    precision: str = "float32",
) -> Callable[[np.ndarray], np.ndarray]:
    """Return a denoiser of a stack's own images by a network that was trained on others, for `denoise_stack`.

    Each image is given the background mean and sd of the images that the network was trained on (its card's). Where
    `resize` allows it is also brought to their box and pixel size, and the denoised image back to the stack's; beyond
    the network's box it has the mean of its background.

    Parameters
    ----------
    model, card : as `models.load` returns them.
    stack : particles of any size; with a pixel size.
    resize : what may be done to images of another size: "none"; "crop", the middle of a larger box of the same pixel
        size is denoised; "rescale", images of any box and pixel size are resampled.
    contrast : "bright" or "dark" particles, the latter inverted; None takes them for bright where they prove to be.
    precision : of the network's passes, as in `models.denoise_images`.

    Returns
    -------
    A function of images `(n, h, w)` to images of the same shape, protein bright.

    Raises
    ------
    ValueError : a box, a pixel size or a contrast that the network was not trained for; a card that does not say.
    """
    if missing := [key for key in ("image_size", "pixel_size", "background") if key not in card]:
        lacking = ", ".join(missing)
        raise ValueError(f"card: expected image_size, pixel_size and background, got no {lacking}; train it again")
    size, scale, background = card["image_size"], card["pixel_size"], card["background"]
    if stack.pixel_size is None:
        problem = f"expected a pixel size, to compare with the network's {scale:g} A, got none"
        raise ValueError(f"{stack.path}: {problem}; open with pixel_size=...")
    (height, box), own = stack.images.shape[1:], stack.pixel_size
    same_scale = abs(own / scale - 1) < 0.005
    needed = "none" if same_scale and height == box == size else "crop" if same_scale and box >= size else "rescale"
    if RESIZES.index(checks.choice("resize", resize, RESIZES)) < RESIZES.index(needed):
        raise ValueError(
            f"{stack.path}: expected {size} x {size} px of {scale:g} A, which this network was trained on, got "
            f"{height} x {box} px of {own:g} A; allow resize {needed}, or train a network for this size"
        )
    contrast, own = contrast_of(stack, contrast), scale if same_scale else own

    def denoise(images: np.ndarray) -> np.ndarray:
        y = noise.standardise(images, own, size, scale, contrast)
        y = y * np.float32(background["sd"]) + np.float32(background["mean"])
        x_hat = models.denoise_images(model, y, precision=precision)
        level = noise.background(x_hat)[0][:, None, None].astype(np.float32)
        return projection.resample(x_hat - level, scale, box, own) + level

    return denoise
