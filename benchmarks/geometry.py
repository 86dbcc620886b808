"""Projection and known-pose reconstruction: images a second, on all cores of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.sizes import Size
from benchmarks.worker import Gang, timed
from cryo_lib.evaluate import reconstruction
from cryo_lib.simulate import projection

CPU = torch.device("cpu")


def ball(size: int) -> np.ndarray:
    """A volume of random voxels, `size` a side, within a ball as a particle fills its box."""
    axis = (np.arange(size) - size // 2) / (size / 2)
    inside = axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2 < 0.64
    return np.random.default_rng(0).random(inside.shape, np.float32) * inside


def rates(size: int, images: int) -> Callable[..., dict[str, Any]]:
    """A measurement of so many projections of a volume of `size` voxels a side, and of the reconstruction from them.

    Returns
    -------
    A function that takes nothing and returns `project` and `reconstruct` in images/s.
    """
    volume = ball(size)
    rotations = projection.random_rotations(images, 0)
    projections = projection.project(volume, rotations)
    reconstruction.reconstruct(projections[:16], rotations[:16])

    def measure() -> dict[str, Any]:
        project = timed(CPU, lambda: projection.project(volume, rotations))
        reconstruct = timed(CPU, lambda: reconstruction.reconstruct(projections, rotations))
        return {"project": images / project, "reconstruct": images / reconstruct}

    return measure


def run(device: str, size: Size) -> dict[str, Any]:
    """Both rates, in images/s, of `size.repeats` timings, at most three: they are the CPU's whatever the device."""
    print("projection and reconstruction", flush=True)
    with Gang("geometry:rates", **size.geometry) as gang:
        results = [gang.measure()[0] for _ in range(min(3, size.repeats))]
    return {"configuration": size.geometry} | {
        name: [each[name] for each in results] for name in ("project", "reconstruct")
    }
