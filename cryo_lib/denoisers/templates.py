"""Projections of maps as references: at directions spread evenly over the sphere, made as they are asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation
from torch import Tensor

from cryo_lib import checks
from cryo_lib.denoisers.steerable import FITTED, Basis
from cryo_lib.denoisers.summing import PosteriorSum
from cryo_lib.networks.models import pick_device
from cryo_lib.simulate.projection import as_volume, project, random_rotations, rescale


def directions(n: int, seed: Any) -> np.ndarray:
    """Return `(n, 3, 3)` rotations whose viewing directions lie evenly over the sphere, without a turn in the plane.

    A Fibonacci lattice (Swinbank and Purser 2006), turned at random by `seed`, so that grids of several seeds are
    independent and each direction is uniform.
    """
    n = checks.integer("n", n, low=1)
    height, turn = 1 - (2 * np.arange(n) + 1) / n, np.pi * (1 + 5**0.5) * np.arange(n)
    lattice = Rotation.from_euler("ZY", np.stack([turn, np.arccos(height)], axis=1)).as_matrix()
    return random_rotations(1, seed) @ lattice


class Templates:
    """Projections of volumes at directions over the sphere, made as they are asked for, each rescaled to [0, 1].

    Parameters
    ----------
    volumes : `(c, h, h, h)`, equally likely; their projections have the labels 0 to c - 1.
    """

    def __init__(self, volumes: Any, device: str = "auto") -> None:
        self.volumes = [as_volume(volume) for volume in volumes]
        if not self.volumes:
            raise ValueError("volumes: expected one or more, got none; give the map")
        some = directions(max(1, FITTED // len(self.volumes)), 0)
        views = [rescale(project(volume, some)) for volume in self.volumes]
        self.basis = Basis(np.concatenate(views), device=pick_device(device))

    def coefficients(self, label: int, rotations: np.ndarray) -> Tensor:
        """Of the projections of one volume at `(m, 3, 3)` rotations, `(m, d)`."""
        return self.basis.expand(rescale(project(self.volumes[label], rotations)))

    def sum(self, y: Any, sigma: Any, **given: Any) -> PosteriorSum:
        """The sum over these templates for images `(n, h, h)`, empty yet; see `PosteriorSum`."""
        return PosteriorSum(self.basis, y, sigma, len(self.volumes), **given)
