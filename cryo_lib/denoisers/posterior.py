"""The posterior mean over references, or over projections of a map: a denoiser without a network and without training.

Where the truth is one of the references, turned in the plane, no estimator has a lesser mean squared error. It
returns what the references hold, of pure noise as well ("Einstein from noise"); its evidence says which image shows
one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation
from torch import Tensor

from cryo_lib import checks
from cryo_lib.denoisers.steerable import Basis
from cryo_lib.denoisers.summing import NEIGHBOURS, Posterior, PosteriorSum, noise_sd, shift_grid
from cryo_lib.denoisers.templates import Templates, directions
from cryo_lib.networks.models import pick_device
from cryo_lib.simulate.projection import square

COMPONENTS = 16  # of a local model, at most
TEMPERATURES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
COARSE, LEVELS = 1024, 2  # directions that are tried first, and how often they are made four times as dense
TOGETHER = 8  # images that share their fine templates
KEPT = 2**27  # coefficients of a grid's projections that are kept at most, 1 GB
ROWS = 4096  # images, times shifts, that are held at a time
BELOW = 18.0, 0.02  # nats below an image's best coarse direction that one may be, and this share of the best besides


class References:
    """References, kept ready for the posterior of any number of stacks.

    Parameters
    ----------
    images : `(m, h, h)`, on the grey scale that the noisy images have without their noise.
    tolerance : share of their energy that the basis leaves out.
    device : "auto", "cpu" or "cuda".
    mirrors : take their mirror images as well, numbered m to 2m - 1: of projections, those from the opposite side.
    """

    def __init__(self, images: Any, tolerance: float = 1e-4, device: str = "auto", mirrors: bool = False) -> None:
        images = np.concatenate([images, mirrored(images)]) if mirrors else images
        self.basis = Basis(images, tolerance, pick_device(device))
        self.coefficients = self.basis.expand(images)

    def posterior(self, y: Any, sigma: Any, temperature: float = 1.0, **given: Any) -> Posterior:
        """The posterior of noisy images `(n, h, h)`; sigma and `given` as of `PosteriorSum`.

        temperature : 1 gives the posterior mean. Above, x_hat is that of a Gaussian model of x around the most likely
            references, weighted by their likelihood to the power of 1 / temperature: it reaches between references that
            lie further apart than the noise can tell. `choose_temperature` chooses it. White noise without CTF and
            centred particles only.

        Raises
        ------
        ValueError : see `PosteriorSum` and its `check_scale`; a temperature that does not go with `given`.
        """
        temperature = checks.number("temperature", temperature, low=1)
        if temperature > 1 and any(value is not None for value in given.values()):
            raise ValueError(
                f"temperature: expected 1 with a transfer, a spectrum or shifts, got {temperature}; the local model "
                "knows white noise and centred particles only"
            )
        return _joined([total.result(self._estimate(total, temperature)) for total in self._sums(y, sigma, **given)])

    def _sums(self, y: Any, sigma: Any, **given: Any) -> Iterator[PosteriorSum]:
        """The sums over all references, for some of the images at a time."""
        for images, of_images in _portions(y, sigma, **given):
            total = PosteriorSum(self.basis, images, **of_images)
            total.check_scale(self.coefficients)
            total.add(self.coefficients, scores=False)
            yield total

    def _estimate(self, total: PosteriorSum, temperature: float) -> Tensor:
        """Coefficients of the estimate, `(n, d)`."""
        return total.coefficients() if temperature == 1 else self._local(total, temperature)

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


def mirrored(images: Any) -> np.ndarray:
    """Images `(m, h, h)` with x taken to -x about RELION's centre: of a projection, that from the opposite side."""
    images = square(images, "references")
    return np.roll(images[..., ::-1], 1 + images.shape[-1] % 2, axis=-1)


def posterior_mean(
    y: Any, references: Any, sigma: Any, temperature: float = 1.0, mirrors: bool = False, **given: Any
) -> np.ndarray:
    """E[x | y] over references and their turns, `(n, h, h)` float32; see `References`.

    Parameters
    ----------
    y : noisy images `(n, h, h)`. references : `(m, h, h)`.
    sigma : sd of the noise, a number or `(n,)`; `noise_level` estimates it.
    mirrors : as of `References`. temperature, given : as of `References.posterior`.
    """
    return References(references, mirrors=mirrors).posterior(y, sigma, temperature, **given).x_hat


def choose_temperature(
    references: References, x: Any, y: Any, sigma: Any, among: Sequence[float] = TEMPERATURES
) -> float:
    """Of some temperatures that of the highest mean PSNR on two or more validation pairs; ValueError for fewer."""
    x = square(x, "x")
    if len(x) < 2 or np.shape(y) != x.shape:
        raise ValueError(
            f"x, y: expected two or more pairs of one size, got shapes {x.shape} and {np.shape(y)}; give more"
        )
    losses, start = np.zeros(len(among)), 0
    for total in references._sums(y, sigma):
        clean = x[start : start + len(total.y)]
        for k, temperature in enumerate(among):
            x_hat = references.basis.images(references._estimate(total, checks.number("among", temperature, low=1)))
            losses[k] += np.log(np.square(x_hat - clean).mean(axis=(1, 2))).sum()
        start += len(clean)
    return among[int(losses.argmin())]


def _portions(
    y: Any, sigma: Any, transfer: Any = None, shifts: tuple[float, float] | None = None, **given: Any
) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """Images, at most `ROWS` with their shifts, and what else `PosteriorSum` takes of them."""
    y = square(y, "y")
    sigma = noise_sd(sigma, len(y))
    if transfer is not None and len(transfer := np.asarray(transfer)) not in (1, len(y)):
        raise ValueError(f"transfer: expected one for each of {len(y)} images or one for all, got {transfer.shape}")
    parts = -(-len(y) * len(shift_grid(shifts)) // ROWS)
    for rows in np.array_split(np.arange(len(y)), min(parts, len(y))):
        part = slice(rows[0], rows[-1] + 1)
        of_each = transfer if transfer is None or len(transfer) == 1 else transfer[part]
        yield y[part], given | {"sigma": sigma[part], "transfer": of_each, "shifts": shifts}


def _joined(parts: Sequence[Posterior]) -> Any:
    """Posteriors of some images each as one of all."""
    return type(parts[0])(*(np.concatenate(values) for values in zip(*(vars(part).values() for part in parts))))


@dataclass(frozen=True)
class MapPosterior(Posterior):
    """The posterior over projections of volumes: `labels` are the volumes.

    Attributes
    ----------
    rotations : `(n, 3, 3)`, the most likely pose of each image, image axes to volume axes.
    """

    rotations: np.ndarray


class Maps:
    """Volumes, kept ready for the posterior of any number of stacks: a projection is made once, when it is asked for.

    Parameters
    ----------
    volumes : `(c, h, h, h)`, conformations, equally likely.
    coarse : directions over the sphere that are tried first. levels : how often they are made four times as dense.
    seed : of the turn of the grids of directions.
    """

    def __init__(
        self, volumes: Any, *, coarse: int = COARSE, levels: int = LEVELS, seed: int = 0, device: str = "auto"
    ) -> None:
        levels = checks.integer("levels", levels, low=1)
        self.templates = Templates(volumes, device=device)
        self.grids = [directions(coarse * 4**level, [seed, level]) for level in range(levels + 1)]
        self._kept: dict[tuple[int, int], tuple[Tensor, np.ndarray]] = {}
        self.first = [self._coefficients(label, 0, np.arange(coarse)) for label in range(len(self.templates.volumes))]

    def posterior(self, y: Any, sigma: Any, check: bool = True, **given: Any) -> MapPosterior:
        """The posterior of noisy images `(n, h, h)`, coarse to fine; see `posterior_map`.

        check : of all images, their grey scale; False where `check_scale` has been asked of the stack they are of.
        """
        found = []
        for images, of_images in _portions(y, sigma, **given):
            total = self.templates.sum(images, **of_images)
            if check:
                total.check_scale(torch.cat(self.first))
            scores = [total.add(each, label).cpu().numpy() for label, each in enumerate(self.first)]
            for start in range(0, len(images), TOGETHER):
                rows = slice(start, min(start + TOGETHER, len(images)))
                found.append(self._refined(total.some(rows), [score[rows] for score in scores]))
        return _joined(found)

    def check_scale(self, y: Any, sigma: Any, **given: Any) -> None:
        """Raise ValueError where the median image is on another grey scale; see `PosteriorSum.check_scale`."""
        self.templates.sum(y, sigma, **given).check_scale(torch.cat(self.first))

    def _coefficients(self, label: int, level: int, numbers: np.ndarray) -> Tensor:
        """Of the projections of one volume at these directions of a grid; those that were made before are kept."""
        grid, basis = self.grids[level], self.templates.basis
        if len(grid) * len(basis.frequencies) > KEPT:
            return self.templates.coefficients(label, grid[numbers])
        if (label, level) not in self._kept:
            room = torch.empty(len(grid), len(basis.frequencies), dtype=torch.complex64, device=basis.device)
            self._kept[label, level] = room, np.zeros(len(grid), bool)
        kept, made = self._kept[label, level]
        new = numbers[~made[numbers]]
        if len(new):
            kept[torch.from_numpy(new).to(kept.device)] = self.templates.coefficients(label, grid[new])
            made[new] = True
        return kept[torch.from_numpy(numbers).to(kept.device)]

    def _refined(self, total: PosteriorSum, scores: list[np.ndarray]) -> MapPosterior:
        """The posterior of a few images over finer and finer grids near what is likely by their scores at the first."""
        count, level, near = len(scores), 0, [np.arange(len(self.grids[0]))] * len(scores)
        for finer in range(1, len(self.grids)):
            size = len(self.grids[level])
            best = np.max([score.max(axis=1) for score in scores if score.size], axis=0)
            least = (best - BELOW[0] - BELOW[1] * np.abs(best))[:, None]
            held = [score > least for score in scores]
            if level and sum(map(np.sum, held)) > total.n * count * size / 8:
                break
            likely = [numbers[each.any(axis=0)] for each, numbers in zip(held, near)]
            reach = 1.2 * np.sqrt(4 * np.pi / size)
            near = [_within(self.grids[finer], self.grids[level][numbers], reach) for numbers in likely]
            total, scores, level = total.some(slice(0, total.n)), [], finer
            for label, numbers in enumerate(near):
                many = len(numbers) > 0
                score = total.add(self._coefficients(label, level, numbers), label).cpu().numpy() if many else None
                scores.append(np.empty((total.n, 0)) if score is None else score)
        rotations = np.concatenate([self.grids[level][numbers] for numbers in near])
        return _with_poses(total, rotations, count * len(self.grids[level]))


def posterior_map(
    y: Any,
    volumes: Any,
    sigma: Any,
    *,
    coarse: int = COARSE,
    levels: int = LEVELS,
    seed: int = 0,
    device: str = "auto",
    **given: Any,
) -> MapPosterior:
    """E[x | y] over all projections of one volume or several, coarse to fine: more where directions are likely.

    As RELION's adaptive oversampling (Scheres 2012), but all turns in the plane and all shifts are tried at every
    level. Where more than an eighth of the directions are likely the grid is finer than what the images tell, and it
    stays.

    Parameters
    ----------
    y : noisy images `(n, h, h)`. volumes : `(c, h, h, h)`, conformations, equally likely.
    sigma : sd of the noise, a number or `(n,)`.
    coarse, levels, seed : see `Maps`, which keeps its projections for further images.
    given : `transfer`, `spectrum` and `shifts` as of `PosteriorSum`.

    Raises
    ------
    ValueError : see `PosteriorSum` and its `check_scale`; the projections' grey scale is [0, 1].
    """
    maps = Maps(volumes, coarse=coarse, levels=levels, seed=seed, device=device)
    return maps.posterior(y, sigma, **given)


def _within(grid: np.ndarray, points: np.ndarray, reach: float) -> np.ndarray:
    """The numbers of those of a grid's directions that lie within reach of any of some others, ascending."""
    if not len(points):
        return np.empty(0, int)
    distances, _ = cKDTree(points[:, :, 2]).query(grid[:, :, 2], distance_upper_bound=reach)
    return np.flatnonzero(np.isfinite(distances))


def _with_poses(total: PosteriorSum, rotations: np.ndarray, size: int) -> MapPosterior:
    """The posterior, with the pose of each image: that of its most likely template, turned back."""
    posterior = total.result(size=size)
    turns = Rotation.from_rotvec(np.outer(-posterior.angle, [0, 0, 1]), degrees=True).as_matrix()
    return MapPosterior(**vars(posterior), rotations=rotations[posterior.reference] @ turns)
