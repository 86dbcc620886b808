"""Poses and projections, in RELION's conventions; images and volumes on other grids.

Volumes are `(z, y, x)`, images `(n, y, x)`; the centre is index `n // 2`, but RELION centres images of odd side on
pixel `(n + 1) // 2`, and so do we. A rotation takes image axes to volume axes: with `R = rotation_from_euler(rot, tilt,
psi)` an atom at `r` (x, y, z) is seen at `R.T @ r`, and the image is the integral along its z.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import finufft
import numpy as np
import scipy.fft
from scipy.spatial.transform import Rotation

from cryo_lib import checks
from cryo_lib.files import cores

TOLERANCE = 3e-5  # relative error of the Fourier slices


def random_rotations(n: int, seed: Any) -> np.ndarray:
    """Return `(n, 3, 3)` float64 rotations, uniform on SO(3); `seed` as numpy's `default_rng` takes it."""
    return Rotation.random(checks.integer("n", n, low=1), rng=np.random.default_rng(seed)).as_matrix()


def jittered(rotation: Any, n: int, degrees: float, seed: Any) -> np.ndarray:
    """Return `(n, 3, 3)` rotations near `rotation`: turned about each image axis by angles of sd `degrees`.

    `rotation` is `(3, 3)`, near which all lie, or `(n, 3, 3)`, one each; ValueError for another number.
    """
    rotation = as_rotations(rotation if np.ndim(rotation) == 3 else np.asarray(rotation)[None])
    if len(rotation) not in (1, n):
        raise ValueError(
            f"rotation: expected one, or one for each of {n}, got {len(rotation)}; change n or the rotations"
        )
    sd = np.deg2rad(checks.number("degrees", degrees, low=0))
    turns = np.random.default_rng(seed).normal(0.0, 1.0, (checks.integer("n", n, low=1), 3))
    return rotation @ Rotation.from_rotvec(sd * turns).as_matrix()


def rotation_from_euler(rot: Any, tilt: Any, psi: Any) -> np.ndarray:
    """Return the `(n, 3, 3)` rotations, image axes to volume axes, of RELION's angles.

    Parameters
    ----------
    rot, tilt, psi : rlnAngleRot, rlnAngleTilt, rlnAnglePsi in degrees, each `(n,)` or a scalar.

    Raises
    ------
    ValueError : shapes that do not go together, or angles that are not finite.

    Source: RELION's ZYZ convention (Heymann, Chagoyen & Belnap 2005), whose own matrix is the transpose of ours.
    """
    shapes = [np.shape(angle) for angle in (rot, tilt, psi)]
    lengths = {shape[0] for shape in shapes if shape}
    if any(len(shape) > 1 for shape in shapes) or len(lengths) > 1 or 0 in lengths:
        raise ValueError(f"rot, tilt, psi: expected scalars or (n,) arrays of one length n >= 1, got shapes {shapes}")
    angles = np.stack(np.broadcast_arrays(*(np.atleast_1d(angle) for angle in (rot, tilt, psi))), axis=-1)
    if not np.isfinite(angles).all():
        raise ValueError("rot, tilt, psi: expected finite angles, got NaN or infinity; remove these particles")
    return Rotation.from_euler("ZYZ", angles, degrees=True).as_matrix()


def euler_from_rotation(rotations: Any) -> np.ndarray:
    """Return RELION's `(n, 3)` rot, tilt, psi in degrees, tilt in [0, 180], of `(n, 3, 3)` rotations.

    At tilt 0 and 180 only rot + psi or rot - psi is defined: one of the two is then 0.
    """
    return Rotation.from_matrix(as_rotations(rotations)).as_euler("ZYZ", degrees=True, suppress_warnings=True)


def as_rotations(rotations: Any) -> np.ndarray:
    """Return `rotations` as `(n, 3, 3)` float64; ValueError names the first that is none."""
    rotations = checks.as_images("rotations", rotations, np.float64)
    if rotations.shape[1:] != (3, 3):
        raise ValueError(
            f"rotations: expected shape (n, 3, 3), got {rotations.shape}; angles go through rotation_from_euler"
        )
    proper = np.abs(rotations @ rotations.transpose(0, 2, 1) - np.eye(3)).max(axis=(1, 2)) < 1e-4
    proper &= np.linalg.det(rotations) > 0
    if not proper.all():
        raise ValueError(
            f"rotations: expected orthonormal matrices of determinant +1, got {int((~proper).sum())} that are not, "
            f"the first is rotation {int(np.argmin(proper))}"
        )
    return rotations


def as_volume(volume: Any, name: str = "volume") -> np.ndarray:
    """Return `volume` as a finite `(n, n, n)` float32 cube; TypeError or ValueError otherwise."""
    volume = checks.as_images(name, volume)  # as the stack of its z sections
    if len(set(volume.shape)) != 1:
        raise ValueError(f"{name}: expected a cube (n, n, n), got {volume.shape}; pad or crop it")
    return volume


def in_frame(rotations: Any, truth: Any) -> tuple[np.ndarray, np.ndarray, bool]:
    """Turn rotations found in a frame of their own into that of the truth, as one rotation of the whole allows.

    Images do not tell a volume from its mirror image: there the same images have rotations R Rz(180 degrees), so both
    hands are tried and the closer is taken.

    Parameters
    ----------
    rotations, truth : `(n, 3, 3)`, image axes to volume axes, of the same images.

    Returns
    -------
    rotations : `(n, 3, 3)`, of the images in the frame and hand of the truth.
    errors : `(n,)`, degrees that each is off.
    mirrored : whether they were of the mirror image.
    """
    rotations, truth = as_rotations(rotations), as_rotations(truth)
    found = []
    for mirrored in (False, True):
        here = rotations @ np.diag([-1.0, -1.0, 1.0]) if mirrored else rotations
        frame, weights = Rotation.from_matrix(truth @ here.transpose(0, 2, 1)), np.ones(len(here))
        for _ in range(20):  # to the median, which images that are far off do not pull
            centre = frame.mean(weights)
            weights = 1 / np.maximum((centre.inv() * frame).magnitude(), 0.01)
        turned = centre.as_matrix() @ here
        errors = np.rad2deg((Rotation.from_matrix(truth).inv() * Rotation.from_matrix(turned)).magnitude())
        found.append((turned, errors, mirrored))
    return min(found, key=lambda each: np.median(each[1]))


def project(
    volume: Any, rotations: Any, shifts: Any = None, *, batch: int = 128, threads: int | None = None
) -> np.ndarray:
    """Return the projections of a volume: line integrals in voxels, by the Fourier slice theorem.

    The slices are computed from the voxels by a non-uniform FFT (exact to about `TOLERANCE`), on a grid so fine that
    density outside the image is cut off and does not wrap round to its other side.

    Parameters
    ----------
    volume : `(n, n, n)`, `[z, y, x]`.
    rotations : `(m, 3, 3)`, image axes to volume axes.
    shifts : `(m, 2)` in pixels or None: image i moves by (dx, dy) = -(rlnOriginXAngst, rlnOriginYAngst) / pixel size.
    batch : projections that a thread makes at a time; bounds the memory.
    threads : None for all cores this process may use. Neither `batch` nor `threads` changes a bit of the result.

    Returns
    -------
    `(m, n, n)` float32.

    Raises
    ------
    TypeError, ValueError : not a finite cube, not rotations, not one finite shift a rotation, bad `batch` or `threads`.

    Source: Barnett, Magland & af Klinteberg (2019), FINUFFT, SIAM J. Sci. Comput. 41, C479.
    """
    volume, rotations = as_volume(volume), as_rotations(rotations)
    batch = checks.integer("batch", batch, low=1)
    threads = checks.integer("threads", cores() if threads is None else threads, low=1)
    n = len(volume)
    shifts = np.zeros((len(rotations), 2)) if shifts is None else np.asarray(shifts, dtype=np.float64)
    if shifts.shape != (len(rotations), 2) or not np.isfinite(shifts).all():
        raise ValueError(f"shifts: expected finite pixels of shape ({len(rotations)}, 2), got shape {shifts.shape}")

    # Fourier grid: odd, hence without a Nyquist frequency; as fine as the farthest voxel, seen from any side, asks for.
    axis = (np.arange(n) - n // 2) ** 2
    farthest = np.sqrt((axis[:, None, None] + axis[:, None] + axis).max(where=volume != 0, initial=0))
    centre = (n + 1) // 2
    size = max(n, int(np.ceil(centre + farthest + np.abs(shifts).max()))) | 1
    ky, kx = 2 * np.pi * scipy.fft.fftfreq(size), 2 * np.pi * scipy.fft.rfftfreq(size)
    plane = np.stack([np.tile(kx, size), np.repeat(ky, len(kx))])
    move_x, move_y = (np.exp(-1j * k * (centre + shift[:, None])) for k, shift in zip((kx, ky), shifts.T))

    volume = volume.astype(np.complex64, order="C")
    images = np.empty((len(rotations), n, n), np.float32)

    def fill(part: slice) -> None:
        x, y, z = points = (rotations[part, :, :2].transpose(1, 0, 2) @ plane).astype(np.float32)
        inside = (np.abs(points) < np.pi).all(axis=0)  # beyond lie aliases of the sampled volume
        slices = np.zeros(inside.shape, np.complex64)
        slices[inside] = finufft.nufft3d2(
            z[inside], y[inside], x[inside], volume, eps=TOLERANCE, isign=-1, upsampfac=1.25, nthreads=1
        )
        slices = slices.reshape(-1, size, len(kx))
        slices *= move_y[part, :, None]
        slices *= move_x[part, None, :]
        images[part] = scipy.fft.irfft2(slices, s=(size, size), overwrite_x=True)[:, :n, :n]

    first, *others = [slice(start, start + batch) for start in range(0, len(rotations), batch)]
    fill(first)  # alone: in finufft 2.5 two first calls of a process at once can crash it, in a table that they fill
    with ThreadPoolExecutor(threads) as pool:  # one thread a batch: the result does not depend on their number
        list(pool.map(fill, others))
    return images


def rescale(images: Any) -> np.ndarray:
    """Return `(n, h, w)` float32 images, each mapped linearly to [0, 1]; ValueError names a constant image."""
    images = checks.as_images("images", images)
    low, high = checks.grey_range("images", images)
    return (images - low[:, None, None]) / (high - low)[:, None, None]


def random_views(n_images: int, n_volumes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rotations `(n_images, 3, 3)`, uniform on SO(3), and the volume that each image shows, `(n_images,)` int64.

    Volumes have equal shares of the images (counts differ by at most one), in random order.
    """
    n_images, n_volumes = checks.integer("n_images", n_images, low=1), checks.integer("n_volumes", n_volumes, low=1)
    pose_seed, order_seed = np.random.SeedSequence(checks.integer("seed", seed, low=0)).spawn(2)
    rotations = random_rotations(n_images, pose_seed)
    return rotations, np.random.default_rng(order_seed).permutation(np.arange(n_images) % n_volumes)


def views(
    volumes: Sequence[Any],
    rotations: Any,
    shown: Any,
    shifts: Any = None,
    *,
    batch: int = 128,
    threads: int | None = None,
) -> np.ndarray:
    """Return clean projections, each of one of several volumes and rescaled to [0, 1], `(m, n, n)` float32.

    Parameters
    ----------
    volumes : each `(n, n, n)`.
    rotations : `(m, 3, 3)`, image axes to volume axes.
    shown : `(m,)`, index into `volumes`.
    shifts, batch, threads : see `project`.

    Raises
    ------
    TypeError, ValueError : no volumes, volumes of different size, an index beyond them; see `project` and `rescale`.
    """
    volumes, rotations, shown = [as_volume(volume) for volume in volumes], as_rotations(rotations), np.asarray(shown)
    if len({volume.shape for volume in volumes}) != 1:
        raise ValueError(f"volumes: expected one or more of one shape, got {[volume.shape for volume in volumes]}")
    if shown.shape != (len(rotations),) or not np.isin(shown, range(len(volumes))).all():
        raise ValueError(f"shown: expected {len(rotations)} indices below {len(volumes)}, got {np.unique(shown)}")
    images = np.empty((len(rotations), *volumes[0].shape[1:]), np.float32)
    for index in np.unique(shown):
        chosen = shown == index
        moved = None if shifts is None else np.asarray(shifts)[chosen]
        images[chosen] = rescale(project(volumes[index], rotations[chosen], moved, batch=batch, threads=threads))
    return images


def simulate(
    volumes: Sequence[Any], n_images: int, seed: int, *, batch: int = 128, threads: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return clean projections of several conformations at uniformly random poses.

    Parameters
    ----------
    volumes : conformations, each `(n, n, n)`: equal shares of the images, see `random_views`.
    n_images : number of images.
    seed : integer >= 0.
    batch, threads : see `project`.

    Returns
    -------
    images : `(n_images, n, n)` float32, each rescaled to [0, 1].
    rotations : `(n_images, 3, 3)` float64.
    conformations : `(n_images,)` int64, index into `volumes`.

    Raises
    ------
    TypeError, ValueError : bad numbers; see `views`.
    """
    rotations, conformations = random_views(n_images, max(len(volumes), 1), seed)
    return views(volumes, rotations, conformations, batch=batch, threads=threads), rotations, conformations


def resample(images: Any, pixel_size: float, n: int, to: float) -> np.ndarray:
    """Return square images on another grid: `n` pixels of `to` A along each side, the centre kept.

    Band-limited interpolation along each axis, cut at the Nyquist frequency of the coarser grid: crops, pads with zeros
    and scales by any ratio in one step. On their own grid images come back as they are.

    Parameters
    ----------
    images : `(m, h, h)`.
    pixel_size, to : A, before and after.

    Returns
    -------
    `(m, n, n)` float32.

    Raises
    ------
    TypeError, ValueError : images not finite or not square, bad numbers.
    """
    images = square(images)
    h = images.shape[1]
    matrix = _interpolation(h, (h + 1) // 2, pixel_size, n, (n + 1) // 2, to)
    return images if matrix is None else matrix @ images @ matrix.T


def resample_volume(volume: Any, pixel_size: float, n: int, to: float) -> np.ndarray:
    """Return a volume `(h, h, h)` on a grid of `n` voxels of `to` A a side, `(n, n, n)` float32; see `resample`."""
    volume = as_volume(volume)
    matrix = _interpolation(len(volume), len(volume) // 2, pixel_size, n, n // 2, to)
    return volume if matrix is None else np.tensordot(matrix, matrix @ volume @ matrix.T, axes=1)


def _interpolation(h: int, centre: int, pixel_size: float, n: int, new_centre: int, to: float) -> np.ndarray | None:
    """The `(n, h)` float32 matrix from samples to interpolated ones (Dirichlet's kernel); None where they are equal."""
    n = checks.integer("n", n, low=2)
    ratio = checks.number("to", to, above=0) / checks.number("pixel_size", pixel_size, above=0)
    return None if n == h and abs(ratio - 1) * h < 0.01 else _dirichlet(h, centre, ratio, n, new_centre)


@lru_cache(maxsize=8)  # a stack's batches share it
def _dirichlet(h: int, centre: int, ratio: float, n: int, new_centre: int) -> np.ndarray:
    at = (np.arange(n) - new_centre) * ratio + centre
    coarse = max(ratio, 1.0)
    waves = np.arange(int(h / 2 / coarse + 1e-6) + 1)
    weights = np.where((waves == 0) | np.isclose(2 * coarse * waves, h), 1.0, 2.0) / h
    matrix = np.cos(2 * np.pi / h * (at[:, None] - np.arange(h))[..., None] * waves) @ weights
    matrix[(at < -0.5) | (at > h - 0.5)] = 0.0
    return matrix.astype(np.float32)


def square(images: Any, name: str = "images") -> np.ndarray:
    """Return images as `(m, n, n)` float32; ValueError, which calls them `name`, where they are not square."""
    images = checks.as_images(name, images)
    if images.shape[1] != images.shape[2]:
        raise ValueError(f"{name}: expected square ones, got {images.shape[1]} x {images.shape[2]}; crop or pad them")
    return images
