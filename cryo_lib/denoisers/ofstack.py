"""Denoisers of one stack's particles: they know each image by its row, its CTF and its shift, and say what they are."""

from __future__ import annotations

from typing import Any

import numpy as np

from cryo_lib.denoisers.summing import moved
from cryo_lib.simulate import noise, projection
from cryo_lib.stacks.particles import ParticleStack, contrast_of


class Grid:
    """A grid that a stack's images are brought to: `n` pixels of `pixel_size` A, the middle of the images.

    Parameters
    ----------
    stack : particles with a pixel size.
    contrast : "bright" or "dark" particles, the latter inverted; None takes them for bright where they prove to be.

    Raises
    ------
    ValueError : no pixel size; a contrast that is dark or cannot be told, and is not given.
    """

    def __init__(self, stack: ParticleStack, n: int, pixel_size: float, contrast: str | None = None) -> None:
        self.stack, self.n, self.pixel_size, self.own = stack, n, pixel_size, own_pixel_size(stack)
        self.contrast = contrast_of(stack, contrast)

    def seen(self, images: np.ndarray) -> np.ndarray:
        """Images of the stack on the grid, `(m, n, n)`, protein bright, background of mean 0 and sd 1."""
        return noise.standardise(images, self.own, self.n, self.pixel_size, self.contrast)

    def centred(self, images: np.ndarray, rows: Any) -> np.ndarray:
        """Images of these rows on the grid, moved back by the shifts of their poses where they have them."""
        return images if self.stack.poses is None else moved(images, -self.stack.poses.shifts[rows] / self.pixel_size)

    def off_centre(self, images: np.ndarray, rows: Any) -> np.ndarray:
        """Centred images of these rows on the grid, moved to where the stack has them, their background level."""
        if self.stack.poses is None:
            return images
        level = noise.background(images)[0][:, None, None].astype(np.float32)
        return moved(images - level, self.stack.poses.shifts[rows] / self.pixel_size) + level

    def onto(self, images: np.ndarray) -> np.ndarray:
        """Images at the box and pixel size of the stack `(m, h, h)` on the grid, grey levels as they are."""
        return projection.resample(images, self.own, self.n, self.pixel_size)

    def back(self, images: np.ndarray) -> np.ndarray:
        """Images `(m, n, n)` at the box and pixel size of the stack; beyond the grid, the mean of their background."""
        level = noise.background(images)[0][:, None, None].astype(np.float32)
        return projection.resample(images - level, self.pixel_size, self.stack.images.shape[-1], self.own) + level


class OfStack(Grid):
    """A denoiser of a stack's own images, which works on a grid.

    Attributes
    ----------
    grey : least and greatest value of clean images on the grey scale of what comes out; None where it has no such.
    threads : batches of the stack that it may be called with at a time, each from a thread of its own.
    """

    grey: tuple[float, float] | None = (0.0, 1.0)
    threads: int = 1

    def __call__(self, images: np.ndarray, rows: Any = slice(None)) -> np.ndarray:
        """Images `(m, h, h)`, those of these rows of the stack, denoised: the same shape, protein bright."""
        return self.back(self.denoise(self.seen(images), rows))

    @property
    def facts(self) -> dict[str, Any]:
        """What a reader is to know of it, by name."""
        return {"grid (px)": self.n, "pixel size of the grid (Å)": round(self.pixel_size, 4)}

    def denoise(self, y: np.ndarray, rows: Any) -> np.ndarray:
        """The denoised images `(m, n, n)` of `seen` ones of these rows."""
        raise NotImplementedError


def edge(radius: np.ndarray) -> np.ndarray:
    """1 within a circle or sphere, 0 beyond its radius of 1, float32; between 0.9 and 1 it falls as a cosine."""
    return (0.5 + 0.5 * np.cos(np.pi * np.clip(10 * radius - 9, 0, 1))).astype(np.float32)


def own_pixel_size(stack: ParticleStack) -> float:
    """The pixel size of a stack, A; ValueError where no source says it."""
    if stack.pixel_size is None:
        raise ValueError(f"{stack.path}: expected a pixel size, got none; open it with pixel_size=...")
    return stack.pixel_size
