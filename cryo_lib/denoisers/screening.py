"""Which particles of a stack show the molecule of a map: the evidence of each, under projections of the map.

The evidence is the log of the likelihood ratio of "a projection of the map, at any pose" to "noise alone", nats: the
number that `posterior` gives, on a grid as coarse as a few hundred directions deserve, with each particle's CTF, and
the noise's level and spectrum estimated where no particle is. The contrast of the map in the images is estimated too.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from cryo_lib.denoisers.ofstack import Grid, edge, own_pixel_size
from cryo_lib.denoisers.templates import Templates, directions
from cryo_lib.simulate import noise, projection
from cryo_lib.simulate.ctf import ctf
from cryo_lib.stacks.particles import ParticleStack

LABEL = "rlnParticleFigureOfMerit"  # the evidence in star files: RELION knows, keeps and selects by it, never sets it
SIZE, DIRECTIONS = 48, 400  # pixels, at most, of the grid; directions over the sphere, all turns of each
CHUNK, FEW = 400, 96  # images that are read at a time, and that the contrast and the spectrum are estimated from
GAINS, FINER = np.geomspace(0.05, 51.2, 11), np.geomspace(0.6, 1 / 0.6, 6)  # sd of the noise for one of a template
PRINT_EVERY = 10  # seconds between lines of progress


class Screen(Grid):
    """A map ready to be looked for in the images of a stack.

    Parameters
    ----------
    stack : particles with a pixel size. Where it has poses, their shifts centre the images; their angles are not used.
        Where it has a CTF, templates have it too.
    volume, voxel_size : the map, `(m, m, m)`, and its A. The middle of the images that it covers is compared.
    contrast : "bright" or "dark" particles; None takes them for bright where they prove to be.
    n_directions, seed : of the templates, and of the turn of their grid.
    size : pixels, at most, of the grid that is compared on.
    reach : A, how far particles may lie off the centre where the stack has no poses; their shifts are summed over.

    Raises
    ------
    ValueError : no pixel size; a contrast that is dark or cannot be told; see `projection.resample_volume`.

    Attributes
    ----------
    n, pixel_size : of the grid that is compared on, A.
    volume : the map on it, `(n, n, n)`, `in_sphere`.
    spectrum : `(n // 2 + 1,)`, the noise's power in rings, 1 being that of white noise of the background's sd.
    gain : how many sd of the noise one of a template is, templates being projections on [0, 1].
    """

    def __init__(
        self,
        stack: ParticleStack,
        volume: Any,
        voxel_size: float,
        *,
        contrast: str | None = None,
        n_directions: int = DIRECTIONS,
        size: int = SIZE,
        reach: float = 0.0,
        seed: int = 0,
        device: str = "auto",
    ) -> None:
        own = own_pixel_size(stack)
        box = min(len(volume) * voxel_size, stack.images.shape[1] * own)
        n = 2 * round(min(size, box / max(voxel_size, own)) / 2)
        super().__init__(stack, n, box / n, contrast)
        self.volume = projection.resample_volume(in_sphere(volume), voxel_size, n, self.pixel_size)
        self.templates, rotations = Templates([self.volume], device=device), directions(n_directions, seed)
        self.coefficients = self.templates.coefficients(0, rotations)
        views = projection.rescale(projection.project(self.volume, rotations[:FEW]))
        self.level = float(noise.background(views)[0].mean())
        searched = stack.poses is None and reach >= self.pixel_size
        self.shifts = (reach / self.pixel_size, 1.0) if searched else None
        some = stack.spread(FEW)
        images = self.images(some)
        self.spectrum = background_spectrum(images)
        self.gain = 1.0
        for gains in (GAINS, FINER):
            self.gain *= float(max(gains, key=lambda gain: self._likelihood(images, some, self.gain * gain)))

    def images(self, rows: Any) -> np.ndarray:
        """Images `(m, n, n)` of these rows on the grid, centred, protein bright, background of mean 0 and sd 1."""
        return self.centred(self.seen(self.stack.images[rows]), rows)

    def evidence(self, rows: Any) -> np.ndarray:
        """Of these rows, `(m,)`, nats: above 0 a projection of the map explains the image better than noise alone."""
        return self._evidence(self.images(rows), rows, self.gain)

    def question(self, y: np.ndarray, rows: Any, gain: float) -> tuple[np.ndarray, float, dict[str, Any]]:
        """Centred images, their sigma and what else the posterior takes of them, on the grey scale of the templates."""
        given, level = {"spectrum": self.spectrum, "shifts": self.shifts}, self.level
        if self.stack.ctf is not None:
            given["transfer"] = ctf(self.stack.ctf.iloc[rows], self.n, self.pixel_size)
            level = level * given["transfer"][:, :1, :1]
        return y / np.float32(gain) + level, 1 / gain, given

    def _evidence(self, y: np.ndarray, rows: Any, gain: float) -> np.ndarray:
        y, sigma, given = self.question(y, rows, gain)
        total = self.templates.sum(y, sigma, **given)
        total.add(self.coefficients)
        return total.result().evidence

    def _likelihood(self, images: np.ndarray, rows: Any, gain: float) -> float:
        """Log likelihood of a gain where every other image is noise alone: such images do not lower the estimate."""
        return float(np.logaddexp(0, self._evidence(images, rows, gain)).sum())


def in_sphere(volume: Any) -> np.ndarray:
    """A map less the level of its corners, and 0 beyond the sphere inscribed in its box: no view shows the box's edges.

    The map is `(m, m, m)`.
    """
    volume = projection.as_volume(volume)
    radius = np.sqrt(sum(axis**2 for axis in np.ogrid[(slice(-1, 1, len(volume) * 1j),) * 3]))
    level = volume[radius > 1].mean(dtype=float)
    return (volume - np.float32(level)) * edge(radius)


def background_spectrum(images: np.ndarray) -> np.ndarray:
    """The power of images' noise in rings of Fourier pixels, `(n // 2 + 1,)`, from outside the inscribed circle.

    Their background has mean 0, which says nothing of ring 0: it is taken to be as ring 1.
    """
    n = images.shape[-1]
    radius = np.hypot(*np.ogrid[-1 : 1 : n * 1j, -1 : 1 : n * 1j])
    outside = (0.5 - 0.5 * np.cos(np.pi * np.clip((radius - 0.95) / 0.1, 0, 1))).astype(np.float32)
    power = noise.power_spectrum(images * outside, 1.0)[1] / np.square(outside).mean()
    power[0] = power[1]
    return power


def evidence(
    stack: ParticleStack, volume: Any, voxel_size: float, *, progress: bool = False, **options: Any
) -> np.ndarray:
    """The evidence of every particle of a stack, `(n,)` nats, in chunks: memory does not grow with the stack.

    Arguments, `options` among them, are those of `Screen`.

    progress : print a line every 10 s or so.
    """
    screen, found = Screen(stack, volume, voxel_size, **options), []
    started = printed = time.monotonic()
    for start in range(0, len(stack), CHUNK):
        found.append(screen.evidence(np.arange(start, min(start + CHUNK, len(stack)))))
        if progress and time.monotonic() - printed > PRINT_EVERY:
            printed, done = time.monotonic(), start + len(found[-1])
            print(f"{done} of {len(stack)} images, {done / (printed - started):.0f} a second", flush=True)
    return np.concatenate(found)
