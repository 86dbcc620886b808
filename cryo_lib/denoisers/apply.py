"""A trained network, or any denoiser of arrays, applied to a particle stack on disk."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cryo_lib import checks
from cryo_lib.denoisers.ofstack import OfStack, own_pixel_size
from cryo_lib.files import cores
from cryo_lib.networks import models, parallel
from cryo_lib.simulate.ctf import phase_flip
from cryo_lib.stacks.particles import ParticleStack, write

PRINT_EVERY = 10  # seconds between lines of progress
THREADS = 4  # batches at a time of a network on a GPU
PASSES = threading.Lock()  # a pass sets the network's mode, and how the whole process multiplies
RESIZES = ("none", "crop", "rescale")  # what may be done to images of another size, each with what stands before it
Denoiser = torch.nn.Module | OfStack | Callable[[np.ndarray], np.ndarray]


def denoise_stack(
    model: Denoiser | Mapping[int, Denoiser],
    particles: ParticleStack | str | Path,
    out: str | Path,
    *,
    columns: Mapping[str, Any] | None = None,
    watch: Callable[[slice, np.ndarray], None] | None = None,
    project: str | Path | None = None,
    batch_size: int = 100,
    precision: str = "float32",
    progress: bool = False,
) -> Path:
    """Denoise every image of a stack and write `.mrcs` + `.star`, in batches: memory does not grow with the stack.

    The next batch is read while one is denoised; a `Network` on a GPU, for which the host has much to do, denoises
    several at a time. Where torchrun started several processes, they take batches in turn, each on its own GPU, and the
    first one writes.

    Parameters
    ----------
    model : a generator (run on the device its weights are on, in eval mode), or a function from `(n, h, w)` float32 to
        the same shape; or one for each half-set (rlnRandomSubset), `{1: ..., 2: ...}`: half-maps then share no network;
        `{0: ...}` is one for all.
    particles : an open stack or the path of one, `(n, h, w)`, on the grey scale that the network was trained on.
    out : the `.star` to write (its `.mrcs` goes beside it), or a `.mrcs` alone; rows, order and columns are kept, only
        the image reference changes.
    columns : numbers that the star gets beside its own, `(n,)` of each label; see `stacks.particles.write`. They are
        read when all images are written: `watch` may fill them.
    watch : called with the rows (a slice) and the denoised images of each batch before it is written, in the first
        process and in the order of the stack.
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
    model = model if isinstance(model, Mapping) else {0: model}
    half_sets = np.broadcast_to(0, len(stack)) if set(model) == {0} else stack.half_sets
    if half_sets is None or set(half_sets) != set(model):
        found = "no rlnRandomSubset" if half_sets is None else sorted(set(half_sets.tolist()))
        raise ValueError(f"{stack.path}: expected the half-sets {sorted(model)}, one a model, got {found}")
    shape = stack.images.shape[1:]
    for size in {getattr(each, "image_size", None) for each in model.values()} - {None}:
        if shape != (size, size):
            raise ValueError(
                f"particles: this network denoises {size} x {size} px images, got {' x '.join(map(str, shape))}; "
                "rescale or crop the stack explicitly, or train a network for its size"
            )

    def read(start: int) -> np.ndarray:
        return stack.images[start : start + batch_size]

    def of_batch(start: int, y: np.ndarray) -> np.ndarray:
        x_hat = np.empty_like(y)
        for half, each in model.items():
            chosen = half_sets[start : start + batch_size] == half
            if not chosen.any():
                continue
            of_half = y[chosen]
            if isinstance(each, torch.nn.Module):
                found = models.denoise_images(each, of_half, batch_size, precision=precision)
            elif isinstance(each, OfStack):
                found = each(of_half, start + np.flatnonzero(chosen))
            else:
                found = np.asarray(each(of_half))
            checks.same_shape("images", of_half, "what the model returned of them", found)
            x_hat[chosen] = found
        return x_hat

    def denoised() -> Iterator[np.ndarray]:
        started = printed = time.monotonic()
        mine = batch_size * parallel.rank()
        starts = range(0, len(stack), batch_size * parallel.size())
        threads = min(each.threads if isinstance(each, OfStack) else 1 for each in model.values())
        with ThreadPoolExecutor(threads) as pool:
            aside = read if threads == 1 else lambda start: of_batch(start, read(start))
            asked = (pool.submit(aside, start + mine) for start in starts)
            ahead = deque(islice(asked, threads))
            for start in starts:
                if progress and parallel.rank() == 0 and time.monotonic() - printed > PRINT_EVERY:
                    printed = time.monotonic()
                    print(f"{start} of {len(stack)} images, {start / (printed - started):.0f} a second", flush=True)
                ahead.extend(islice(asked, 1))
                batch = ahead.popleft().result()
                yield from parallel.in_order(of_batch(start + mine, batch) if threads == 1 else batch, batch_size)

    def watched() -> Iterator[np.ndarray]:
        start = 0
        for x_hat in denoised():
            if watch is not None:
                watch(slice(start, start + len(x_hat)), x_hat)
            start += len(x_hat)
            yield x_hat

    written = None
    if parallel.rank():
        for _ in denoised():
            pass
    else:  # what fails here ends this process, and torchrun the others, which wait for its images
        written = write(out, watched(), stack, columns=columns, project=project)
    return parallel.from_first(lambda: written)


class Network(OfStack):
    """A network that was trained on other images, as a denoiser of a stack's own; `fit` makes one.

    Images get the background mean and sd of those that it was trained on (its card's). Where it was trained on images
    whose phases were flipped (its card's `phase_flipped`), these are flipped, too.
    """

    def __init__(
        self, model: torch.nn.Module, card: Mapping[str, Any], stack: ParticleStack, pixel_size: float, **options: Any
    ) -> None:
        self.precision = options.pop("precision")
        super().__init__(stack, card["image_size"], pixel_size, **options)
        self.model, self.card, self.flips = model, card, bool(card.get("phase_flipped"))
        self.threads = min(THREADS, cores()) if next(model.parameters()).is_cuda else 1
        references = card["pixel_size"] and "copies" not in card.get("data", {})  # in [0, 1]; see notebooks 40 and 10
        self.grey = OfStack.grey if references else None
        if self.flips and stack.ctf is None:
            problem = "expected a CTF, since this network was trained on images whose phases were flipped, got none"
            raise ValueError(f"{stack.path}: {problem}; estimate it, or take another network")

    def __call__(self, images: np.ndarray, rows: Any = slice(None)) -> np.ndarray:
        if self.flips:
            images = phase_flip(images, self.stack.ctf.iloc[rows], self.own)
        return super().__call__(images, rows)

    @property
    def facts(self) -> dict[str, Any]:
        kept = ("architecture", "width", "background", "phase_flipped", "run", "validation")
        return super().facts | {key: self.card[key] for key in kept if key in self.card}

    def denoise(self, y: np.ndarray, rows: Any) -> np.ndarray:
        background = self.card["background"]
        y = y * np.float32(background["sd"]) + np.float32(background["mean"])
        with PASSES:
            return models.denoise_images(self.model, y, precision=self.precision)


def fit(
    model: torch.nn.Module,
    card: Mapping[str, Any],
    stack: ParticleStack,
    *,
    resize: str = "none",
    contrast: str | None = None,
    precision: str = "float32",
) -> Network:
    """Return a denoiser of a stack's own images by a network that was trained on others, for `denoise_stack`.

    Each image is given the background mean and sd of the images that the network was trained on (its card's). Where
    `resize` allows it is also brought to their box and pixel size, and the denoised image back to the stack's; beyond
    the network's box it has the mean of its background. A network of particles of any size, whose card has the pixel
    size null, sees the whole box, brought to its own, whatever `resize` says.

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
    A denoiser of the stack's images, protein bright; see `OfStack`.

    Raises
    ------
    ValueError : a box, a pixel size or a contrast that the network was not trained for; a card that does not say.
    """
    if missing := [key for key in ("image_size", "pixel_size", "background") if key not in card]:
        lacking = ", ".join(missing)
        raise ValueError(f"card: expected image_size, pixel_size and background, got no {lacking}; train it again")
    size, scale = card["image_size"], card["pixel_size"]
    (height, box), own = stack.images.shape[1:], own_pixel_size(stack)
    if scale is None:
        return Network(model, card, stack, own * box / size, contrast=contrast, precision=precision)
    same_scale = abs(own / scale - 1) < 0.005
    needed = "none" if same_scale and height == box == size else "crop" if same_scale and box >= size else "rescale"
    if RESIZES.index(checks.choice("resize", resize, RESIZES)) < RESIZES.index(needed):
        raise ValueError(
            f"{stack.path}: expected {size} x {size} px of {scale:g} A, which this network was trained on, got "
            f"{height} x {box} px of {own:g} A; allow resize {needed}, or train a network for this size"
        )
    return Network(model, card, stack, own if same_scale else scale, contrast=contrast, precision=precision)


def of_checkpoints(
    files: Sequence[str | Path], stack: ParticleStack, device: str = "auto", **options: Any
) -> dict[int, Network]:
    """Networks of checkpoints on disk, fitted to a stack: one for all, `{0: ...}`, or one for each half-set.

    `device`, "auto", "cpu" or "cuda", is where they run; `options` are those of `fit`.
    """
    networks = []
    for file in files:
        model, card = models.load(file)
        networks.append(fit(model.to(models.pick_device(device)), card, stack, **options))
    return dict(enumerate(networks, len(networks) > 1))
