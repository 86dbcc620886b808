"""A volume whose projections are known in closed form."""

from __future__ import annotations

import numpy as np


def correlations(a, b):
    return np.array([np.corrcoef(x.ravel(), y.ravel())[0, 1] for x, y in zip(a, b)])


class Blobs:
    """An asymmetric sum of Gaussians, whose projections are known in closed form."""

    def __init__(self, n, reach, seed=0, count=8):
        rng = np.random.default_rng(seed)
        direction = rng.standard_normal((count, 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        self.n = n
        self.positions = direction * rng.uniform(0, reach, (count, 1))
        self.sigma = rng.uniform(1.3, 2.2, count)
        self.weight = rng.uniform(0.5, 1.5, count)

    def _profile(self, at):
        return np.exp(-((np.arange(self.n) - at[:, None]) ** 2) / (2 * self.sigma[:, None] ** 2))

    def volume(self):
        x, y, z = (self._profile(self.n // 2 + at) for at in self.positions.T)
        return np.einsum("k,kz,ky,kx->zyx", self.weight, z, y, x, optimize=True).astype(np.float32)

    def image(self, rotation, shift=(0.0, 0.0)):
        at = (self.positions @ rotation)[:, :2] + shift + (self.n + 1) // 2  # rows of positions @ R are R.T @ position
        amplitude = self.weight * self.sigma * np.sqrt(2 * np.pi)
        return np.einsum("k,ky,kx->yx", amplitude, self._profile(at[:, 1]), self._profile(at[:, 0]))
