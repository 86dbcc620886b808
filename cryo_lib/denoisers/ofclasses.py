"""The posterior over a stack's own class averages as a denoiser of its images: no map, no network, no training pairs.

Of y = C x + noise the phases are flipped where the CTF is known, so that the images show |C| x; the noise is made white
by its own spectrum, and origins, where the stack has them, centre the images. Classes are learnt once, from images and
their mirror images. The estimate of |C| x, times the probability of a particle (a temperature above 1 takes noise for
one, the evidence does not), is coloured again, levelled beyond the inscribed circle, and divided by the rms
of C without its envelope, in rings, smoothed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.fft
from scipy.special import expit

from cryo_lib import checks
from cryo_lib.denoisers.classes import Classes
from cryo_lib.denoisers.ofmap import SIZE, in_circle
from cryo_lib.denoisers.ofstack import OfStack, own_pixel_size
from cryo_lib.denoisers.screening import CHUNK, background_spectrum
from cryo_lib.denoisers.wiener import FEW, over_rings, passed
from cryo_lib.simulate.ctf import ctf, phase_flip
from cryo_lib.stacks.particles import ParticleStack

LEAST, ENOUGH = 20, 200  # images: fewer are refused; from so many on classes are better than a low-pass, CTF or not
LEARNT, EACH, MOST = 4000, 10, 200  # images, at most, that classes are learnt from; images a class; classes, at most
ITERATIONS, TEMPERATURE = 2, 8.0  # as of the scale's classes
PASSED = 0.1  # of |C|, at least, that the estimate is divided by: about a CTF's at frequency 0


class OfClasses(OfStack):
    """E[x | y] over class averages of the stack and their turns, for `apply.denoise_stack`.

    Parameters
    ----------
    stack : particles with a pixel size, `LEAST` or more.
    contrast : as of `Grid`.
    size : pixels, at most, of the grid, which is as wide as the images.
    seed : of the images that classes are learnt from and start from.

    Raises
    ------
    ValueError : too few images; see `Grid`.
    """

    grey = None

    def __init__(
        self,
        stack: ParticleStack,
        *,
        contrast: str | None = None,
        size: int = SIZE,
        seed: int = 0,
        device: str = "auto",
    ) -> None:
        if len(stack) < LEAST:
            problem = f"expected {LEAST} images or more, for class averages, got {len(stack)}"
            raise ValueError(f"{stack.path}: {problem}; take method lowpass, or give the whole stack")
        box = stack.images.shape[-1]
        n = min(checks.integer("size", size, low=16), box)
        super().__init__(stack, n, own_pixel_size(stack) * box / n, contrast)
        few = stack.spread(FEW)
        self.noise = np.sqrt(over_rings(background_spectrum(self.seen(stack.images[few])), n))
        self.passed = np.float32(1)
        if stack.ctf is not None:
            rings = passed(ctf(stack.ctf.iloc[few].assign(rlnCtfBfactor=0.0), n, self.pixel_size), n)
            self.passed = over_rings(np.sqrt(rings).clip(min=PASSED), n)
        self.rows = np.sort(np.random.default_rng(seed).permutation(len(stack))[:LEARNT])
        parts = np.array_split(self.rows, -(-len(self.rows) // CHUNK))
        y = np.concatenate([self.question(self.seen(stack.images[part]), part) for part in parts])
        n_classes = min(max(len(y) // EACH, 1), MOST)
        self.classes = Classes(y, 1.0, n_classes, ITERATIONS, seed, mirrors=True, device=device)

    @property
    def facts(self) -> dict[str, Any]:
        found = {"classes": len(self.classes.templates), "images they are learnt from": len(self.rows)}
        found["phases"] = "as they are: no CTF" if self.stack.ctf is None else "flipped by the CTF"
        return super().facts | found | {"centred": "no: no poses" if self.stack.poses is None else "by the origins"}

    def question(self, y: np.ndarray, rows: Any) -> np.ndarray:
        """Images on the grid, of these rows, as classes see them: phases flipped, centred, their noise white, sd 1."""
        if self.stack.ctf is not None:
            y = phase_flip(y, self.stack.ctf.iloc[rows], self.pixel_size)
        return _times(self.centred(y, rows), 1 / self.noise)

    def denoise(self, y: np.ndarray, rows: Any) -> np.ndarray:
        x_hat, evidence = self.classes.denoise(self.question(y, rows), 1.0, TEMPERATURE)
        x_hat *= expit(evidence).astype(np.float32)[:, None, None]
        return self.off_centre(_times(in_circle(_times(x_hat, self.noise)), 1 / self.passed), rows)


def _times(images: np.ndarray, factor: np.ndarray) -> np.ndarray:
    return scipy.fft.irfft2(scipy.fft.rfft2(images) * factor, s=images.shape[1:])
