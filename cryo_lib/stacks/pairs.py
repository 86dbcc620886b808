"""Training pairs of real particles: noisy images, and projections of a map at their poses or a second noisy image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any

import numpy as np

from cryo_lib import checks
from cryo_lib.simulate import ctf, noise, projection
from cryo_lib.stacks.columns import numbers
from cryo_lib.stacks.particles import ParticleStack, contrast_of

ENOUGH = 5.0  # standard errors by which images must agree better with their own references than with others'
COORDINATES = "rlnCoordinateX", "rlnCoordinateY"  # px, in the micrograph: alike for all frames of a movie
SAME = 0.9  # correlation of two images' backgrounds from which on they are one image and no two


@dataclass(frozen=True)
class Agreement:
    """How well noisy images agree with their references, by `Pairs.agreement`.

    Attributes
    ----------
    gain : grey levels of the normalised image (background sd 1) for one of the reference, least squares.
    level : the references' mean background, which in the normalised image is 0.
    snr : Var(signal) / Var(noise) over the whole image, the signal being the fitted reference with its CTF.
    own, others : mean correlation coefficient of an image with its reference, and with that of the next image.
    excess : (own - others) in standard errors.
    """

    gain: float
    level: float
    snr: float
    own: float
    others: float
    excess: float


class Standardised:
    """Images of a stack on one grid: `n` pixels of `pixel_size` A, the middle of each.

    ValueError : no pixel size; a contrast that is dark or cannot be told, and is not given.
    """

    def __init__(self, stack: ParticleStack, n: int, pixel_size: float, contrast: str | None) -> None:
        if stack.pixel_size is None:
            raise ValueError(f"{stack.path}: expected a pixel size, got none; open it with pixel_size=...")
        self.stack, self.contrast = stack, contrast_of(stack, contrast)
        self.n, self.pixel_size = checks.integer("n", n, low=2, multiple_of=2), pixel_size

    def noisy(self, rows: Any) -> np.ndarray:
        """Images `(m, n, n)` of these rows, protein bright, background of mean 0 and sd 1."""
        return self._standard(self.stack, rows)

    def _standard(self, stack: ParticleStack, rows: Any) -> np.ndarray:
        return noise.standardise(stack.images[rows], stack.pixel_size, self.n, self.pixel_size, self.contrast)


class Pairs(Standardised):
    """Particles and references on one grid: `n` pixels of `pixel_size` A, the middle of the images and of the map.

    Parameters
    ----------
    stack : particles with poses; its shifts move the references, its CTF is not applied to them.
    volume, voxel_size : the map that the poses belong to, `(m, m, m)`, and its A.
    contrast : "bright" or "dark" particles; None as measured, where that can be told and is bright.

    Raises
    ------
    ValueError : no poses, no pixel size, a contrast that is dark or cannot be told; see `projection.resample_volume`.
    """

    def __init__(
        self,
        stack: ParticleStack,
        volume: Any,
        voxel_size: float,
        n: int,
        pixel_size: float,
        contrast: str | None = None,
    ) -> None:
        if stack.poses is None:
            raise ValueError(
                f"{stack.path}: expected rlnAngleRot, rlnAngleTilt and rlnAnglePsi, got none; refine it first"
            )
        checks.number("voxel_size", voxel_size, above=0)
        super().__init__(stack, n, pixel_size, contrast)
        self.volume = projection.resample_volume(volume, voxel_size, n, pixel_size)

    def clean(self, rows: Any) -> np.ndarray:
        """References `(m, n, n)` of these rows: projections at their poses and shifts, each rescaled to [0, 1]."""
        return self._projections(self.volume, rows)

    def _projections(self, volume: np.ndarray, rows: Any) -> np.ndarray:
        poses = self.stack.poses
        return projection.rescale(
            projection.project(volume, poses.rotations[rows], poses.shifts[rows] / self.pixel_size)
        )

    def _with_ctf(self, x: np.ndarray, rows: Any) -> np.ndarray:
        """Projections through the CTF of their images, where these have one."""
        return x if self.stack.ctf is None else ctf.apply_ctf(x, self.stack.ctf.iloc[rows], self.pixel_size)

    def agreement(self, rows: Any) -> Agreement:
        """Compare images with their references, which have their CTF for this.

        Raises
        ------
        ValueError : fewer than 20 rows; images that do not agree better with their own references than with others'; a
            map that agrees better when it is turned by right angles or mirrored, moved by a voxel or two, or scaled by
            a few per cent.
        """
        y, x = self.noisy(rows), self.clean(rows)
        level = float(noise.background(x)[0].mean())
        x = self._with_ctf(x, rows)
        own, others, excess = _agreeing(
            x,
            y,
            f"{self.stack.path}: expected images to agree with the map's projections at their poses",
            "is it the map of this refinement, of the same hand, frame, contrast and voxel size?",
        )
        x, y = _centred(x), _centred(y)
        gain = np.vdot(x, y) / np.vdot(x, x)
        signal = gain**2 * np.square(x).mean()
        snr = signal / (np.square(y).mean() - signal)
        self._require_placed(rows[:100], y[:100], own[:100])
        return Agreement(*map(float, (gain, level, snr, own.mean(), others.mean(), excess)))

    def _require_placed(self, rows: Any, y: np.ndarray, own: np.ndarray) -> None:
        """ValueError where the map, placed or scaled in one of many other ways, agrees better with the images `y`."""
        others = {
            how: _correlation(self._with_ctf(self._projections(other, rows), rows), y)
            for how, other in self._alternatives()
        }
        how = max(others, key=lambda how: others[how].mean())
        better = _standard_errors(others[how] - own)
        if better > ENOUGH:
            raise ValueError(
                f"{self.stack.path}: expected the map of these poses, got one that agrees better with the images, by "
                f"{better:.1f} standard errors, {how}; give the map of this refinement, in its frame"
            )

    def _alternatives(self) -> Iterator[tuple[str, np.ndarray]]:
        """The map with its axes exchanged and flipped, moved by a voxel or two, and of other voxel sizes."""
        for axes, flipped in product(permutations(range(3)), product((False, True), repeat=3)):
            flips = tuple(axis for axis in range(3) if flipped[axis])
            taken = ", ".join(("-" if flip else "") + "zyx"[axis] for axis, flip in zip(axes, flipped))
            hand = np.linalg.det(np.eye(3)[list(axes)]) * (-1) ** len(flips)
            turned = np.roll(np.flip(self.volume.transpose(axes), flips), len(flips) * [1], flips)
            yield (
                f"with its axes z, y, x taken as {taken} ({'another frame' if hand > 0 else 'the other hand'})",
                turned,
            )
        for axis, step in product(range(3), (-2, -1, 1, 2)):
            yield f"moved by {step} voxels along {'zyx'[axis]}", np.roll(self.volume, step, axis)
        for scale in (0.94, 0.97, 1.03, 1.06):
            scaled = projection.resample_volume(self.volume, scale * self.pixel_size, self.n, self.pixel_size)
            yield f"with a voxel size of {scale:g} times its own", scaled


def choose(half_sets: np.ndarray | None, n: int, counts: Mapping[str, int], seed: int) -> dict[str, np.ndarray]:
    """Draw the rows of each split at random, `{name: (count,)}`, and those that remain, `rest`.

    Rows of the first split alternate between half-sets 1 and 2 where there are any: every other one, from the first or
    the second on (`dataset.Experiment.half`), is then of one half-set alone.

    Parameters
    ----------
    half_sets : `(n,)` of 1 and 2, as rlnRandomSubset, or None. n : rows in all. counts : of each split.

    Raises
    ------
    ValueError : fewer rows, or fewer in a half-set, than are asked for.
    """
    rows = np.random.default_rng(checks.integer("seed", seed, low=0)).permutation(n)
    if half_sets is not None:
        place = np.full(n, 2 * n)
        for half in (1, 2):
            place[half_sets[rows] == half] = 2 * np.arange(np.count_nonzero(half_sets == half)) + half
        rows = rows[np.argsort(place, kind="stable")]
        first = next(iter(counts.values()))
        wanted, found = ((first + 1) // 2, first // 2), [np.count_nonzero(half_sets == half) for half in (1, 2)]
        if any(there < least for there, least in zip(found, wanted)):
            expected = " and ".join(map(str, wanted))
            raise ValueError(
                f"half_sets: expected {expected} rows or more of half-sets 1 and 2, got {found[0]} and {found[1]}; "
                "ask for fewer pairs"
            )
    if n < sum(counts.values()):
        wanted = " + ".join(f"{count} ({name})" for name, count in counts.items())
        raise ValueError(f"particles: expected {wanted} or more, got {n}; ask for fewer pairs")
    return dict(zip((*counts, "rest"), np.split(rows, np.cumsum(list(counts.values())))))


def _box(stack: ParticleStack) -> int:
    return stack.images.shape[-1]


def _pixel_size(stack: ParticleStack) -> float | None:
    return stack.pixel_size and round(stack.pixel_size, 3)  # headers hold float32


def _agreeing(x: np.ndarray, y: np.ndarray, expected: str, question: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Correlation of images with their own references, `(m,)`, and with the next, and the difference's standard errors.

    ValueError, in the words given, where that is less than `ENOUGH`, or there are fewer than 20 images.
    """
    if len(y) < 20:
        raise ValueError(f"rows: expected at least 20 to compare images with references, got {len(y)}; give more")
    own, others = _correlation(x, y), _correlation(np.roll(x, 1, axis=0), y)
    excess = _standard_errors(own - others)
    if excess < ENOUGH:
        raise ValueError(
            f"{expected}, at least {ENOUGH:g} standard errors better than with each other's, got {excess:.1f} "
            f"(correlation {own.mean():.4f} and {others.mean():.4f}, {len(y)} images); {question}"
        )
    return own, others, excess


def _standard_errors(values: np.ndarray) -> float:
    return values.mean() / max(values.std(ddof=1) / len(values) ** 0.5, 1e-9)


def _centred(images: np.ndarray) -> np.ndarray:
    return images - images.mean(axis=(1, 2), keepdims=True)


def _correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's coefficient of each two images, `(m,)`."""
    x, y = _centred(x), _centred(y)
    return (x * y).sum(axis=(1, 2)) / np.sqrt((x**2).sum(axis=(1, 2)) * (y**2).sum(axis=(1, 2)))


class Copies(Standardised):
    """Two noisy images of each particle on one grid, as `Pairs`: a network learns one from the other (Noise2Noise).

    A movie gives them as its even and its odd frames (Lehtinen et al. 2018; Bepler et al. 2020): no map and no poses.

    Parameters
    ----------
    stack, copies : the same particles, row by row, of one box and pixel size.
    n, pixel_size : of the grid, px and A. contrast : see `Pairs`.

    Raises
    ------
    ValueError : stacks of other lengths, boxes or pixel sizes, or whose coordinates in the micrographs differ; no pixel
        size; a contrast that is dark or cannot be told.
    """

    def __init__(
        self, stack: ParticleStack, copies: ParticleStack, n: int, pixel_size: float, contrast: str | None = None
    ) -> None:
        super().__init__(stack, n, pixel_size, contrast)
        self.copies = copies
        for name, of in {"images": len, "px": _box, "A a pixel": _pixel_size}.items():
            if of(copies) != of(stack):
                problem = f"expected {of(stack)} {name}, as {stack.path} has, got {of(copies)}"
                raise ValueError(f"{copies.path}: {problem}; give the same particles, extracted alike, row by row")
        labels = [label for label in COORDINATES if label in stack.table and label in copies.table]
        tables = [numbers(each.path, each.table[labels]).to_numpy() for each in (stack, copies) if labels]
        apart = (abs(np.subtract(*tables)) > 1).any(axis=1) if tables else np.zeros(1, bool)
        if apart.any():
            raise ValueError(
                f"{copies.path}: expected the particles of {stack.path} in its order, got other {' and '.join(labels)} "
                f"in {apart.sum()} rows, the first is row {np.argmax(apart) + 1}; bring both to one order"
            )

    def clean(self, rows: Any) -> np.ndarray:
        """What stands for their references: the copies, on the same grey scale."""
        return self._standard(self.copies, rows)

    def agreement(self, rows: Any) -> Agreement:
        """Compare images with their copies. The covariance of the two is the signal's variance, as noise is in neither.

        Raises
        ------
        ValueError : fewer than 20 rows; images that do not agree better with their own copies than with others'; copies
            whose background is that of the images: they are the same images.
        """
        y, x = self.noisy(rows), self.clean(rows)
        own, others, excess = _agreeing(
            x,
            y,
            f"{self.copies.path}: expected copies to agree with the images of {self.stack.path} row by row",
            "are they the same particles, in one order?",
        )
        shared = 1 - np.square(noise.background(y - x)[1]).mean() / 2  # of backgrounds of sd 1 each
        if shared > SAME:
            raise ValueError(
                f"{self.copies.path}: expected other noise than in {self.stack.path}, got a background that correlates "
                f"by {shared:.2f}; give the particles of other frames of the movies"
            )
        covariance = float((_centred(x) * _centred(y)).mean())
        snr = covariance / max(float(np.square(_centred(y)).mean()) - covariance, 1e-9)
        return Agreement(1.0, 0.0, snr, float(own.mean()), float(others.mean()), float(excess))


class Computed:
    """Images of rows of a stack, `(len(rows), n, n)`, made by `make` (rows -> `(m, n, n)`) when they are asked for."""

    def __init__(self, make: Callable[[np.ndarray], np.ndarray], rows: np.ndarray, n: int) -> None:
        self.make, self.rows, self.shape = make, rows, (len(rows), n, n)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        return self.make(self.rows[key])
