"""The posterior mean over references, or over projections of a map: a denoiser without a network and without training.

Where the truth is one of the references, turned in the plane, no estimator has a lesser mean squared error. It returns what
the references hold, of pure noise as well ("Einstein from noise"); its evidence says which image shows one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation
from torch import Tensor

from cryo_lib import checks
from cryo_lib.denoisers.steerable import FITTED, Basis
from cryo_lib.denoisers.summing import NEIGHBOURS, Posterior, PosteriorSum
from cryo_lib.networks.models import pick_device
from cryo_lib.simulate.projection import as_volume, directions, project, rescale

COMPONENTS = 16  # of a local model, at most
TEMPERATURES = (1.0, 2.0, 4.0, 8.0, 16.0)
COARSE, LEVELS = 1024, 2  # directions that are tried first, and how often they are made four times as dense
TOGETHER = 8  # images that share their fine templates
BELOW = 18.0, 0.05  # nats below an image's best coarse direction that one may be, and this share of the best besides


class References:
    """References, kept ready for the posterior of any number of stacks.

    Parameters
    ----------
    images : `(m, h, h)`, on the grey scale that the noisy images have without their noise.
    tolerance : share of their energy that the basis leaves out.
    device : "auto", "cpu" or "cuda".
    """

    def __init__(self, images: Any, tolerance: float = 3e-4, device: str = "auto") -> None:
        self.basis = Basis(images, tolerance, pick_device(device))
        self.coefficients = self.basis.expand(images)

    def posterior(self, y: Any, sigma: Any, temperature: float = 1.0, **given: Any) -> Posterior:
        """The posterior of noisy images `(n, h, h)`; sigma and `given` as of `PosteriorSum`.

        temperature : 1 gives the posterior mean. Above, x_hat is that of a Gaussian model of x around the most likely
            references, weighted by their likelihood to the power of 1 / temperature: it reaches between references that
            lie further apart than the noise can tell. `choose_temperature` chooses it. White noise without CTF only.
        """
        temperature = checks.number("temperature", temperature, low=1)
        total = PosteriorSum(self.basis, y, sigma, **given)
        total.add(self.coefficients)
        if temperature == 1:
            return total.result()
        if total.rings is not None:
            raise ValueError("temperature: expected 1 with a transfer or a spectrum, since the local model has neither")
        return total.result(self._local(total, temperature))

    def _local(self, total: PosteriorSum, temperature: float) -> Tensor:
        """E[x | y] where x is Gaussian with the weighted mean and covariance of the neighbours, `(n, d)`."""
        k = min(NEIGHBOURS, total.count)
        turned = self.basis.turned(self.coefficients[total.numbers[:, :k]], total.turns[:, :k])
        weights = torch.softmax(total.likelihoods[:, :k] / temperature, 1)[..., None]
        mean = (weights * turned).sum(1, keepdim=True)
        spread = torch.view_as_real(weights.sqrt() * (turned - mean)).flatten(2).double()
        variances, vectors = torch.linalg.eigh(spread @ spread.mT + 1e-12 * torch.eye(k, device=spread.device))
        variances, vectors = variances[:, -COMPONENTS:], vectors[:, :, -COMPONENTS:]
        directions = (vectors.mT @ spread) / variances.sqrt()[..., None]
        away = torch.view_as_real(total.y[:, None] - mean).flatten(2).double()
        gain = variances / (variances + 1 / total.precision[:, None])
        moved = ((gain[..., None] * (directions @ away.mT)).mT @ directions)[:, 0]
        return mean[:, 0] + torch.view_as_complex(moved.float().unflatten(1, (-1, 2)).contiguous())


def posterior_mean(y: Any, references: Any, sigma: Any, temperature: float = 1.0, **given: Any) -> np.ndarray:
    """E[x | y] over references and their turns, `(n, h, h)` float32; see `References`.

    Parameters
    ----------
    y : noisy images `(n, h, h)`. references : `(m, h, h)`.
    sigma : sd of the noise, a number or `(n,)`; `noise_level` estimates it.
    temperature, given : as of `References.posterior`.
    """
    return References(references).posterior(y, sigma, temperature, **given).x_hat


def choose_temperature(
    references: References, x: Any, y: Any, sigma: Any, among: Sequence[float] = TEMPERATURES
) -> float:
    """Of some temperatures that of the highest mean PSNR on validation pairs x, y."""

    def loss(temperature: float) -> float:
        x_hat = references.posterior(y, sigma, temperature).x_hat
        return float(np.log(np.square(x_hat - np.asarray(x)).mean(axis=(1, 2))).mean())

    return min(among, key=loss)


class Templates:
    """Projections of volumes at directions over the sphere, made as they are asked for, each rescaled to [0, 1].

    Parameters
    ----------
    volumes : `(c, h, h, h)`, equally likely; as `references` of label 0 to c - 1.
    """

    def __init__(self, volumes: Any, tolerance: float = 3e-4, device: str = "auto") -> None:
        self.volumes = [as_volume(volume) for volume in volumes]
        if not self.volumes:
            raise ValueError("volumes: expected one or more, got none; give the map")
        some = directions(FITTED // len(self.volumes), 0)
        self.basis = Basis(np.concatenate([self._views(v, some) for v in self.volumes]), tolerance, pick_device(device))

    @staticmethod
    def _views(volume: np.ndarray, rotations: np.ndarray) -> np.ndarray:
        return rescale(project(volume, rotations))

    def coefficients(self, label: int, rotations: np.ndarray) -> Tensor:
        """Of the projections of one volume at `(m, 3, 3)` rotations, `(m, d)`."""
        return self.basis.expand(self._views(self.volumes[label], rotations))

    def sum(self, y: Any, sigma: Any, **given: Any) -> PosteriorSum:
        """The sum over these templates for images `(n, h, h)`, empty yet; see `PosteriorSum`."""
        return PosteriorSum(self.basis, y, sigma, len(self.volumes), **given)


@dataclass(frozen=True)
class MapPosterior(Posterior):
    """The posterior over projections of volumes: `labels` are the volumes.

    Attributes
    ----------
    rotations : `(n, 3, 3)`, the most likely pose of each image, image axes to volume axes.
    """

    rotations: np.ndarray


def posterior_map(
    y: Any,
    volumes: Any,
    sigma: Any,
    *,
    coarse: int = COARSE,
    levels: int = LEVELS,
    seed: int = 0,
    device: str = "auto",
    transfer: Any = None,
    spectrum: Any = None,
) -> MapPosterior:
    """E[x | y] over all projections of one volume or several, coarse to fine: only near likely directions are there more.

    As RELION's adaptive oversampling (Scheres 2012), but all turns in the plane are tried at every level.

    Parameters
    ----------
    y : noisy images `(n, h, h)`. volumes : `(c, h, h, h)`, conformations, equally likely.
    sigma, transfer, spectrum : as of `summing.PosteriorSum`.
    coarse : directions over the sphere that are tried first. levels : how often they are made four times as dense.
    seed : of the turn of the grids of directions.
    """
    templates = Templates(volumes, device=device)
    grids = [directions(coarse * 4**level, [seed, level]) for level in range(levels + 1)]
    count = len(templates.volumes)
    total = templates.sum(y, sigma, transfer=transfer, spectrum=spectrum)
    scores = [total.add(templates.coefficients(label, grids[0]), label) for label in range(count)]
    if not levels:
        return _with_poses(total, np.tile(grids[0], (count, 1, 1)), count * coarse)
    trees = [cKDTree(grid[:, :, 2]) for grid in grids]
    sigma, found = np.broadcast_to(np.asarray(sigma, np.float64), len(y)), []
    for start in range(0, len(y), TOGETHER):
        rows = slice(start, start + TOGETHER)
        given = {"transfer": transfer if transfer is None else transfer[rows], "spectrum": spectrum}
        part, near = [score[rows].cpu().numpy() for score in scores], [grids[0]] * count
        for level in range(1, levels + 1):
            reach = 1.2 * np.sqrt(4 * np.pi / len(grids[level - 1]))
            best = np.max([score.max(axis=1) for score in part if score.size], axis=0)
            least = (best - BELOW[0] - BELOW[1] * np.abs(best))[:, None]
            likely = [rotations[(score > least).any(axis=0)] for score, rotations in zip(part, near)]
            near = [grids[level][_within(trees[level], each[:, :, 2], reach)] for each in likely]
            total = templates.sum(y[rows], sigma[rows], **given)
            part = [
                total.add(templates.coefficients(label, each), label).cpu().numpy() if len(each) else np.empty((0, 0))
                for label, each in enumerate(near)
            ]
        found.append(_with_poses(total, np.concatenate(near), count * len(grids[-1])))
    return MapPosterior(*(np.concatenate(values) for values in zip(*(vars(each).values() for each in found))))


def _within(tree: cKDTree, points: np.ndarray, reach: float) -> np.ndarray:
    """The numbers of a tree's points within reach of any of some others, ascending."""
    found = tree.query_ball_point(points, reach) if len(points) else []
    return np.unique(np.concatenate([*map(np.asarray, found), []])).astype(int)


def _with_poses(total: PosteriorSum, rotations: np.ndarray, size: int) -> MapPosterior:
    """The posterior, with the pose of each image: that of its most likely template, turned back."""
    posterior = total.result(size=size)
    turns = Rotation.from_rotvec(np.outer(-posterior.angle, [0, 0, 1]), degrees=True).as_matrix()
    return MapPosterior(**vars(posterior), rotations=rotations[posterior.reference] @ turns)
