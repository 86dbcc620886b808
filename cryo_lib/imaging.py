"""The forward model, Eq. (1): atoms -> density, poses, projections, CTF, noise at a signal-to-noise ratio.

RELION's conventions. Volumes are `(z, y, x)`, images `(n, y, x)`; the centre is index `n // 2`, but RELION centres
images of odd side on pixel `(n + 1) // 2`, and so do we. A rotation takes image axes to volume axes: with
`R = rotation_from_euler(rot, tilt, psi)` an atom at `r` (x, y, z) is seen at `R.T @ r`, and the image is the integral
along its z.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import finufft
import gemmi
import numpy as np
import scipy.fft
from scipy.spatial.transform import Rotation

from cryo_lib import checks

TOLERANCE = 3e-5  # relative error of the Fourier slices
PROTOCOLS = ("awgn", "clipped")
CTF_LABELS = (
    "rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle", "rlnPhaseShift",
    "rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast", "rlnCtfBfactor", "rlnCtfScalefactor",
)  # fmt: skip


def density(structure: gemmi.Structure, n: int, pixel_size: float, resolution: float) -> np.ndarray:
    """Return the electrostatic density of a structure, protein bright.

    Electron form factors (gemmi's `DensityCalculatorE`). The atoms' own B factors are replaced by
    8 pi^2 (0.225 resolution)^2, the Gaussian of that resolution; occupancies count.

    Parameters
    ----------
    structure : one model, coordinates in A; the origin falls on voxel `n // 2` along each axis. Left as it is.
    n : box side in voxels.
    pixel_size : A per voxel.
    resolution : in A, at least two voxels.

    Returns
    -------
    `(n, n, n)` float32, `[z, y, x]`; its sum times `pixel_size**3` is the sum of the form factors at zero angle.

    Raises
    ------
    TypeError, ValueError : bad numbers; not one model, no atoms, an unknown element or a coordinate that is not
        finite; atoms that reach within half the resolution of the faces of the box, or beyond.
    """
    n = checks.integer("n", n, low=4)
    pixel_size = checks.number("pixel_size", pixel_size, above=0)
    resolution = checks.number("resolution", resolution, low=2 * pixel_size)
    if len(structure) != 1:
        raise ValueError(f"structure {structure.name!r}: expected one model, got {len(structure)}; keep one of them")
    model = structure[0].clone()
    atoms = [site.atom for site in model.all()]
    if not atoms:
        raise ValueError(f"structure {structure.name!r}: expected atoms, got none; check the chains that were chosen")
    unknown = next((atom for atom in atoms if atom.element.name == "X"), None)
    if unknown is not None:
        raise ValueError(
            f"structure {structure.name!r}: atom {unknown.name!r} (serial {unknown.serial}) has no known element; "
            "set or remove it"
        )
    positions = np.array([atom.pos.tolist() for atom in atoms])
    _check_box(structure.name, positions, n, pixel_size, margin=resolution / 2)

    for atom, position in zip(atoms, positions + n // 2 * pixel_size):
        atom.pos = gemmi.Position(*position)
        atom.b_iso = 8 * np.pi**2 * (0.225 * resolution) ** 2
        atom.aniso = gemmi.SMat33f(0, 0, 0, 0, 0, 0)
    calculator = gemmi.DensityCalculatorE()
    side = n * pixel_size
    calculator.grid.set_unit_cell(gemmi.UnitCell(side, side, side, 90, 90, 90))
    calculator.grid.set_size(n, n, n)
    calculator.add_model_density_to_grid(model)
    return np.ascontiguousarray(calculator.grid.array.transpose(2, 1, 0), dtype=np.float32)


def _check_box(name: str, positions: np.ndarray, n: int, pixel_size: float, margin: float) -> None:
    if not np.isfinite(positions).all():
        raise ValueError(f"structure {name!r}: expected finite coordinates, got NaN or infinity; remove these atoms")
    low, high = positions.min(axis=0) - margin, positions.max(axis=0) + margin
    half = (n - 1) // 2  # voxels above the centre, the shorter side of an even box
    reach = max(high.max(), -low.min())
    if reach > half * pixel_size:
        extent = ", ".join(f"{axis} {a:.1f} to {b:.1f}" for axis, a, b in zip("xyz", low, high))
        box = 2 * int(np.ceil(reach / pixel_size)) + 2
        larger = np.ceil(1000 * reach / half) / 1000
        raise ValueError(
            f"structure {name!r}: its density spans {extent} A, so the box must reach {reach:.1f} A from the origin; "
            f"{n} voxels of {pixel_size:g} A reach {half * pixel_size:.1f} A; use n >= {box} or "
            f"pixel_size >= {larger:.3f} A, or centre the structure"
        )


def random_rotations(n: int, seed: Any) -> np.ndarray:
    """Return `(n, 3, 3)` float64 rotations, uniform on SO(3); `seed` as numpy's `default_rng` takes it."""
    return Rotation.random(checks.integer("n", n, low=1), rng=np.random.default_rng(seed)).as_matrix()


def jittered(rotation: Any, n: int, degrees: float, seed: Any) -> np.ndarray:
    """Return `(n, 3, 3)` rotations near `rotation`: turned about each image axis by angles of sd `degrees`.

    `rotation` is `(3, 3)`, near which all lie, or `(n, 3, 3)`, one each; ValueError for another number.
    """
    rotation = as_rotations(rotation if np.ndim(rotation) == 3 else np.asarray(rotation)[None])
    if len(rotation) not in (1, n):
        raise ValueError(f"rotation: expected one, or one for each of {n}, got {len(rotation)}; change n or the rotations")
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


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


def ctf(parameters: Mapping[str, Any], n: int, pixel_size: float) -> np.ndarray:
    """Return the contrast transfer functions of `n` px images, the Fourier transform of Eq. (1)'s point spread function.

    sin(pi lambda z k^2 - pi/2 Cs lambda^3 k^4 + phase shift + asin(amplitude contrast)) exp(-B k^2 / 4) scale: positive
    at low frequency, so that protein stays bright; z is the defocus in the direction of k, underfocus positive.

    Parameters
    ----------
    parameters : RELION's labels -> `(m,)`, such as `ParticleStack.ctf`: rlnDefocusU, rlnDefocusV (A), rlnDefocusAngle,
        rlnPhaseShift (degrees), rlnVoltage (kV), rlnSphericalAberration (mm), rlnAmplitudeContrast, rlnCtfBfactor (A^2)
        and rlnCtfScalefactor.
    n : side of the images in pixels. pixel_size : A.

    Returns
    -------
    `(m, n, n // 2 + 1)` float32, in the layout of `scipy.fft.rfft2`.

    Raises
    ------
    ValueError : a parameter missing, not finite, or an impossible one (voltage <= 0, amplitude contrast outside [0, 1]).

    Source: Mindell & Grigorieff 2003; signs and constants as RELION's ctf.cpp.
    """
    if missing := [label for label in CTF_LABELS if label not in parameters]:
        raise ValueError(f"ctf: expected {', '.join(CTF_LABELS)}, got no {', '.join(missing)}; add them")
    values = np.stack([np.atleast_1d(np.asarray(parameters[label], np.float64)) for label in CTF_LABELS])
    if not np.isfinite(values).all():
        label, row = (index[0] for index in np.nonzero(~np.isfinite(values)))
        raise ValueError(f"ctf: expected finite parameters, got {CTF_LABELS[label]} {values[label, row]} in row {row + 1}")
    u, v, angle, phase, voltage, aberration, contrast, b_factor, scale = values[..., None, None]
    if voltage.min() <= 0 or contrast.min() < 0 or contrast.max() > 1:
        raise ValueError("ctf: expected rlnVoltage > 0 and rlnAmplitudeContrast in [0, 1], got others; correct the file")
    n, pixel_size = checks.integer("n", n, low=2), checks.number("pixel_size", pixel_size, above=0)
    ky, kx = scipy.fft.fftfreq(n, pixel_size)[:, None], scipy.fft.rfftfreq(n, pixel_size)
    squared, direction = kx**2 + ky**2, np.arctan2(ky, kx) - np.deg2rad(angle)
    wavelength = 12.2643247 / np.sqrt(1e3 * voltage * (1 + 0.978466e-6 * 1e3 * voltage))
    defocus = 0.5 * (u + v + (u - v) * np.cos(2 * direction))
    turned = np.pi * wavelength * (defocus - 0.5e7 * aberration * wavelength**2 * squared) * squared
    turned += np.deg2rad(phase) + np.arcsin(contrast)
    return (scale * np.exp(-0.25 * b_factor * squared) * np.sin(turned)).astype(np.float32)


def apply_ctf(images: Any, parameters: Mapping[str, Any], pixel_size: float) -> np.ndarray:
    """Return images `(m, n, n)` float32 convolved with their point spread functions; see `ctf`. The border is periodic."""
    images = checks.as_images("images", images)
    transfer = ctf(parameters, images.shape[1], pixel_size)
    if images.shape[1] != images.shape[2] or len(transfer) != len(images):
        raise ValueError(f"images: expected ({len(transfer)}, n, n), one a row of the parameters, got {images.shape}")
    return scipy.fft.irfft2(scipy.fft.rfft2(images) * transfer, s=images.shape[1:])


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
    images = _square(images)
    h = images.shape[1]
    matrix = _interpolation(h, (h + 1) // 2, pixel_size, n, (n + 1) // 2, to)
    return images if matrix is None else matrix @ images @ matrix.T


def _square(images: Any) -> np.ndarray:
    images = checks.as_images("images", images)
    if images.shape[1] != images.shape[2]:
        raise ValueError(f"images: expected square ones, got {images.shape[1]} x {images.shape[2]}; crop or pad them")
    return images


def resample_volume(volume: Any, pixel_size: float, n: int, to: float) -> np.ndarray:
    """Return a volume `(h, h, h)` on a grid of `n` voxels of `to` A a side, `(n, n, n)` float32; see `resample`."""
    volume = as_volume(volume)
    matrix = _interpolation(len(volume), len(volume) // 2, pixel_size, n, n // 2, to)
    return volume if matrix is None else np.tensordot(matrix, matrix @ volume @ matrix.T, axes=1)


def _interpolation(h: int, centre: int, pixel_size: float, n: int, new_centre: int, to: float) -> np.ndarray | None:
    """The `(n, h)` float32 matrix from samples to interpolated ones (Dirichlet's kernel); None where they are the same."""
    n = checks.integer("n", n, low=2)
    ratio = checks.number("to", to, above=0) / checks.number("pixel_size", pixel_size, above=0)
    if n == h and abs(ratio - 1) * h < 0.01:
        return None
    at = (np.arange(n) - new_centre) * ratio + centre
    coarse = max(ratio, 1.0)
    waves = np.arange(int(h / 2 / coarse + 1e-6) + 1)
    weights = np.where((waves == 0) | np.isclose(2 * coarse * waves, h), 1.0, 2.0) / h
    matrix = np.cos(2 * np.pi / h * (at[:, None] - np.arange(h))[..., None] * waves) @ weights
    matrix[(at < -0.5) | (at > h - 0.5)] = 0.0
    return matrix.astype(np.float32)


def background(images: Any, reach: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and sd, `(m,)` float64 each, of every image's background.

    It lies outside the circle inscribed in the middle `reach` of the box (1: the whole), and inside that square; RELION's
    extraction, which has the same purpose, takes a circle of 75 % of the box.
    """
    images = checks.as_images("images", images)
    y, x = np.ogrid[tuple(slice(-1, 1, side * 1j) for side in images.shape[1:])]
    chosen = images[:, (np.hypot(y, x) > reach) & (np.maximum(abs(y), abs(x)) <= reach)]
    return chosen.mean(axis=1, dtype=float), chosen.std(axis=1, dtype=float)


def standardise(images: Any, pixel_size: float, n: int, to: float, contrast: str = "bright") -> np.ndarray:
    """Return particles on another grid, protein bright, the background of each of mean 0 and sd 1 (see `background`).

    Parameters
    ----------
    images, pixel_size, n, to : see `resample`; where the new box is larger than the image, 0 surrounds it.
    contrast : "bright", or "dark" for particles darker than their background: they are inverted.

    Returns
    -------
    `(m, n, n)` float32.

    Raises
    ------
    TypeError, ValueError : see `resample`; another contrast; a background that does not vary (the image is named).
    """
    sign = {"bright": 1, "dark": -1}[checks.choice("contrast", contrast, ("bright", "dark"))]
    images = _square(images)
    reach = min(1.0, images.shape[1] * pixel_size / (n * to))
    level, _ = background(images)
    images = resample(images - level[:, None, None].astype(np.float32), pixel_size, n, to)
    mean, sd = background(images, reach)
    if not sd.all():
        raise ValueError(
            f"images: expected backgrounds that vary, got {int((sd == 0).sum())} constant of {len(images)}, the first "
            f"of image {int(np.argmin(sd))}; remove these images, or give stacks that were not masked"
        )
    images -= mean[:, None, None].astype(np.float32)
    images *= (sign / sd)[:, None, None].astype(np.float32)
    return images


def power_spectrum(images: Any, pixel_size: float) -> tuple[np.ndarray, np.ndarray]:
    """Return frequencies in 1/A and the mean power of images `(m, n, n)` at them, rotationally averaged, `(n // 2 + 1,)` each.

    ValueError for images that are not square.
    """
    images = _square(images)
    n = images.shape[1]
    ring = np.rint(np.hypot(scipy.fft.fftfreq(n, 1 / n)[:, None], scipy.fft.rfftfreq(n, 1 / n))).astype(int)
    power = (np.abs(scipy.fft.rfft2(images)) ** 2).mean(axis=0) / n**2
    rings = np.bincount(ring.ravel(), power.ravel())[: n // 2 + 1] / np.bincount(ring.ravel())[: n // 2 + 1]
    return np.arange(n // 2 + 1) / (n * pixel_size), rings


def rescale(images: Any) -> np.ndarray:
    """Return `(n, h, w)` float32 images, each mapped linearly to [0, 1]; ValueError names a constant image."""
    images = checks.as_images("images", images)
    low, high = _range("images", images)
    return (images - low[:, None, None]) / (high - low)[:, None, None]


def _range(name: str, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the `(n,)` minima and maxima of images that vary."""
    low, high = images.min(axis=(1, 2)), images.max(axis=(1, 2))
    constant = low == high
    if constant.any():
        first = int(np.argmax(constant))
        raise ValueError(
            f"{name}: expected images that vary, got {int(constant.sum())} constant of {len(images)}, "
            f"the first is image {first} (value {low[first]:g}); remove these images"
        )
    return low, high


def noise_sigma(x: Any, snr: float) -> np.ndarray:
    """Return the `(n,)` float64 noise standard deviations, `sqrt(Var(x_i) / snr)`, Var over the whole clean image.

    Raises
    ------
    TypeError, ValueError : `x` not finite `(n, h, w)` images that vary, or `snr` not a finite number > 0.
    """
    x = checks.as_images("x", x)
    snr = checks.number("snr", snr, above=0)
    _range("x", x)
    parts = np.array_split(x, -(-len(x) // 256))  # the variance makes a float64 copy: of a part at a time
    return np.sqrt(np.concatenate([part.var(axis=(1, 2), dtype=np.float64) for part in parts]) / snr)


def add_noise(x: Any, snr: float, seed: Any, protocol: str = "awgn") -> np.ndarray:
    """Return noisy images, Eq. (1) with a the identity: y = x + noise, SNR = Var(x_i) / Var(noise_i) for every image.

    Parameters
    ----------
    x : `(n, h, w)` clean images, for "clipped" in [0, 1].
    snr : > 0.
    seed : as numpy's `default_rng` takes it. Noise is drawn image after image: the noise of the first m images does
        not depend on those that follow.
    protocol : "awgn", Gaussian noise as printed; "clipped", the same noise, then y clipped to [0, 1], which is what the
        paper's numbers suggest.

    Returns
    -------
    `(n, h, w)` float32; `x` is untouched.

    Raises
    ------
    TypeError, ValueError : see `noise_sigma`; an unknown protocol.
    """
    x = checks.as_images("x", x)
    checks.choice("protocol", protocol, PROTOCOLS)
    sigma = noise_sigma(x, snr).astype(np.float32)
    y = np.random.default_rng(seed).standard_normal(x.shape, dtype=np.float32)
    y *= sigma[:, None, None]
    y += x
    return np.clip(y, 0, 1, out=y) if protocol == "clipped" else y


def random_views(n_images: int, n_volumes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rotations `(n_images, 3, 3)`, uniform on SO(3), and the volume that each image shows, `(n_images,)` int64.

    Volumes have equal shares of the images (counts differ by at most one), in random order.
    """
    n_images, n_volumes = checks.integer("n_images", n_images, low=1), checks.integer("n_volumes", n_volumes, low=1)
    pose_seed, order_seed = np.random.SeedSequence(checks.integer("seed", seed, low=0)).spawn(2)
    rotations = random_rotations(n_images, pose_seed)
    return rotations, np.random.default_rng(order_seed).permutation(np.arange(n_images) % n_volumes)


def views(
    volumes: Sequence[Any], rotations: Any, shown: Any, shifts: Any = None, *, batch: int = 128, threads: int | None = None
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
