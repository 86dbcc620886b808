"""The posterior over projections of a map as a denoiser of a stack: no refined poses and no training.

The CTF of each particle is applied to the projections. The noise's level and spectrum and the contrast of the map are
estimated from the images themselves, as `screening` does. Where the stack has origins they centre the images; where it
has no poses, shifts are summed over.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cryo_lib.denoisers.ofstack import OfStack, edge
from cryo_lib.denoisers.posterior import Maps
from cryo_lib.denoisers.screening import FEW, Screen
from cryo_lib.simulate import projection
from cryo_lib.stacks.particles import ParticleStack

SIZE = 64  # pixels, at most, of the grid
HELD, MARGIN = 0.99, 1.25  # share of the map's energy in a sphere, and times its diameter, that the grid is wide


class OfMap(OfStack):
    """E[x | y] over all projections of a map, turns and shifts, for `apply.denoise_stack`.

    Parameters
    ----------
    stack : particles with a pixel size.
    volume, voxel_size : the map, `(m, m, m)`, and its A. The grid is as wide as what it shows, and a quarter more.
    size : pixels, at most, of the grid.
    options : `contrast` and `reach` as of `Screen`.

    Raises
    ------
    ValueError : see `Screen`, and `Maps.check_scale`, of images spread over the stack.
    """

    def __init__(
        self,
        stack: ParticleStack,
        volume: Any,
        voxel_size: float,
        *,
        size: int = SIZE,
        device: str = "auto",
        **options: Any,
    ) -> None:
        n = min(2 * int(MARGIN * radius(volume)), len(volume) - len(volume) % 2)
        volume = projection.resample_volume(volume, voxel_size, n, voxel_size)
        self.screen = Screen(stack, volume, voxel_size, size=size, device=device, **options)
        super().__init__(stack, self.screen.n, self.screen.pixel_size, self.screen.contrast)
        self.maps = Maps([self.screen.volume], device=device)
        some = stack.spread(FEW)
        y, sigma, given = self.screen.question(self.screen.images(some), some, self.screen.gain)
        self.maps.check_scale(y, sigma, **given)  # here, since a batch may be one image, and that one junk

    @property
    def facts(self) -> dict[str, Any]:
        gain, shifts = self.screen.gain, self.screen.shifts
        found = {"contrast of the map (sd of the noise)": round(gain, 3), "CTF": self.stack.ctf is not None}
        found["shifts"] = (
            "as the star file says" if self.stack.poses else f"summed over, {shifts} px" if shifts else "0"
        )
        return super().facts | found

    def denoise(self, y: np.ndarray, rows: Any) -> np.ndarray:
        y, sigma, given = self.screen.question(self.centred(y, rows), rows, self.screen.gain)
        return self.off_centre(in_circle(self.maps.posterior(y, sigma, check=False, **given).x_hat), rows)


def in_circle(images: np.ndarray) -> np.ndarray:
    """Images `(m, n, n)`, level beyond the inscribed circle: a turned projection has corners of its box there."""
    n = images.shape[-1]
    radius = np.hypot(*np.ogrid[-1 : 1 : n * 1j, -1 : 1 : n * 1j])
    level = images[:, (radius > 0.9) & (radius <= 1)].mean(axis=1)[:, None, None]
    return (images - level) * edge(radius) + level


def radius(volume: Any) -> int:
    """The radius, voxels, of the sphere around the middle that holds nearly all of a map's energy."""
    volume = projection.as_volume(volume)
    axes = np.ogrid[tuple(slice(-(side // 2), side - side // 2) for side in volume.shape)]
    shell = np.rint(np.sqrt(sum(axis**2 for axis in axes))).astype(int)
    energy = np.cumsum(np.bincount(shell.ravel(), np.square(volume - np.median(volume)).ravel()))
    return int(np.searchsorted(energy, HELD * energy[-1])) + 1
