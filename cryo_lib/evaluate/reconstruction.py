"""Known-pose Fourier reconstruction of a stack, half-maps, Fourier shell correlation and resolution.

The reconstruction is the least-squares volume: that whose projections (`projection.project`, Fourier slices without
interpolation) are closest to the images, by non-uniform FFT and conjugate gradients. RELION's conventions, as in
`simulate.projection`.

Why finufft: on 128 px projections of the phantom, two busy cores, 500 images took 16 s (20 s by relion_reconstruct),
lowest FSC against the truth up to 80 % of Nyquist 0.9995 (0.9966); 200 images took 7 s (19 s by torch-fourier-slice),
FSC at 75 % of Nyquist 0.975 (0.895). 20,000 images took 45 s and 2 GiB on the two cores when quiet. torch-projectors
has no wheel for this torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import finufft
import numpy as np
import pandas as pd
import scipy.fft
from scipy.ndimage import distance_transform_edt
from scipy.sparse.linalg import LinearOperator, cg

from cryo_lib import checks
from cryo_lib.files import cores
from cryo_lib.simulate import projection
from cryo_lib.simulate.ctf import ctf as ctf_of
from cryo_lib.stacks.particles import Poses

TOLERANCE = 1e-3  # relative error of the non-uniform FFTs, well below that of the conjugate gradients
POINTS = 8_000_000  # Fourier samples a thread holds at a time: more share the FFTs of a batch, fewer save memory
GOLD_STANDARD = 0.143  # FSC threshold for half-maps; Rosenthal & Henderson 2003
THRESHOLDS = {  # of the curves of `compare`; 0.5 against a map without noise is what 0.143 is between half-maps
    "halves": GOLD_STANDARD,
    "halves_masked": GOLD_STANDARD,
    "halves_corrected": GOLD_STANDARD,
    "truth": 0.5,
    "truth_masked": 0.5,
}


@dataclass
class _NormalEquations:
    """A^H y and the kernel of A^H A, a convolution, of some images: the least-squares volume solves them."""

    back_projection: np.ndarray  # (n, n, n)
    kernel: np.ndarray  # (2n, 2n, 2n), zero shift at its centre

    def __add__(self, other: _NormalEquations) -> _NormalEquations:
        return _NormalEquations(self.back_projection + other.back_projection, self.kernel + other.kernel)

    def solve(self, regularisation: float, iterations: int, threads: int) -> np.ndarray:
        """Return the `(n, n, n)` float32 solution inside the sphere inscribed in the box, zero outside."""
        n = len(self.back_projection)
        grid, axis = (2 * n,) * 3, np.arange(n) - n // 2
        inside = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2 < (n // 2) ** 2).astype(np.float32)
        density = scipy.fft.rfftn(scipy.fft.ifftshift(self.kernel), workers=threads).real / n**3
        shell = _shells(2 * n)[0]
        samples = np.bincount(shell.ravel(), density.ravel()) / np.bincount(shell.ravel())  # a Fourier voxel
        samples[n - 4 :] = samples[n - 4]  # none beyond Nyquist, where the inverse is not to grow
        inverse = (1 / (samples + max(regularisation, 1e-3 * samples[n - 4]))).astype(np.float32)[shell]

        def convolve(volume: np.ndarray, transfer: np.ndarray) -> np.ndarray:
            spectrum = scipy.fft.rfftn(volume.reshape(n, n, n) * inside, s=grid, workers=threads)
            spectrum *= transfer
            return scipy.fft.irfftn(spectrum, s=grid, workers=threads, overwrite_x=True)[:n, :n, :n] * inside

        normal = LinearOperator(
            (n**3, n**3), lambda v: convolve(v, density).ravel() + np.float32(regularisation) * v, dtype=np.float32
        )
        nearly_inverse = LinearOperator((n**3, n**3), lambda v: convolve(v, inverse).ravel(), dtype=np.float32)
        right = (self.back_projection * inside).ravel() / np.float32(n**3)
        return cg(normal, right, M=nearly_inverse, rtol=0, maxiter=iterations)[0].reshape(n, n, n)


def reconstruct(
    images: Any,
    poses: Any,
    *,
    pixel_size: float | None = None,
    ctf: Any = None,
    regularisation: float = 0.1,
    iterations: int = 10,
    threads: int | None = None,
) -> np.ndarray:
    """Return the volume whose projections at known poses, through the CTF if one is given, are closest to the images.

    Minimises ||A v - y||^2 + `regularisation` n ||v||^2 over volumes v inside the sphere inscribed in the box, A being
    `projection.project` and the CTF, the misfit taken up to Nyquist. Images are read in batches: memory does not grow
    with their number.

    Parameters
    ----------
    images : `(m, n, n)`, an array or `ParticleStack.images`, read as needed.
    poses : rotations `(m, 3, 3)`, image axes to volume axes, or `ParticleStack.poses`.
    pixel_size : A; needed where the poses have shifts, which are in A, and for the CTF.
    ctf : `ParticleStack.ctf`, a row an image (see `simulate.ctf.ctf`); None for images that have none, or keep it.
    regularisation : >= 0, the weight of the prior v = 0, as a number of samples in each Fourier voxel: it holds down
        what hardly any view has seen, and does nothing to shells where samples abound.
    iterations : of preconditioned conjugate gradients; 10 bring clean projections to FSC > 0.998 below 80 % of Nyquist,
        with a CTF, which hardly passes the lowest shells, 40.
    threads : None for the process's cores, at most 4, each holding a Fourier grid of 2.5 times the box. The result does
        not depend on it.

    Returns
    -------
    `(n, n, n)` float32, `[z, y, x]`, on the scale of the volume that `projection.project` projects.

    Raises
    ------
    TypeError, ValueError : no poses, images that are not square or not one a pose, NaN, shifts without a pixel size.

    Source: Fessler et al. 2005, IEEE Trans. Signal Process. 53, 3393 (Toeplitz-embedded least squares); FINUFFT, see
    `projection.project`.
    """
    options = {"regularisation": regularisation, "iterations": iterations, "threads": threads}
    return _least_squares(images, poses, lambda m: [np.arange(m)], pixel_size=pixel_size, ctf=ctf, **options)[-1]


def half_maps(images: Any, poses: Any, half_sets: Any, **options: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return three reconstructions, `(n, n, n)` each: from half-set 1, from half-set 2, and from both.

    Parameters
    ----------
    images, poses, options : as for `reconstruct`.
    half_sets : `(m,)` of 1 and 2, as rlnRandomSubset; images with 0 are left out.

    Raises
    ------
    ValueError : an empty half-set, other numbers, another length; see `reconstruct`.
    """
    half_sets = np.asarray(half_sets)

    def halves(m: int) -> list[np.ndarray]:
        rows = [np.flatnonzero(half_sets == half) for half in (1, 2)]
        if half_sets.shape != (m,) or not np.isin(half_sets, (0, 1, 2)).all() or not all(map(len, rows)):
            raise ValueError(
                f"half_sets: expected {m} values of 1 and 2 (0 leaves an image out), some of each, got shape "
                f"{half_sets.shape} with {len(rows[0])} in half-set 1 and {len(rows[1])} in half-set 2"
            )
        return rows

    return tuple(_least_squares(images, poses, halves, **options))


def _least_squares(
    images: Any,
    poses: Any,
    grouped: Callable[[int], list[np.ndarray]],
    *,
    pixel_size: float | None = None,
    ctf: Any = None,
    regularisation: float = 0.1,
    iterations: int = 10,
    threads: int | None = None,
) -> list[np.ndarray]:
    """Return the volume of each group of rows, and of several groups together; `grouped` takes the number of images."""
    if poses is None:
        raise ValueError("poses: expected rotations or Poses, got None: the star file lacks rlnAngleRot, Tilt or Psi")
    images = images if hasattr(images, "shape") else np.asarray(images)
    rotations = projection.as_rotations(poses.rotations if isinstance(poses, Poses) else poses)
    shifts = np.asarray(poses.shifts if isinstance(poses, Poses) else np.zeros((len(rotations), 2)), np.float64)
    if len(images.shape) != 3 or images.shape[1] != images.shape[2] or len(images) != len(rotations):
        raise ValueError(
            f"images: expected square ones, one a pose, of shape ({len(rotations)}, n, n), got {tuple(images.shape)}"
        )
    if ctf is not None and len(ctf) != len(images):
        raise ValueError(f"ctf: expected {len(images)} rows, one an image, got {len(ctf)}")
    if pixel_size is None and (shifts.any() or ctf is not None):
        raise ValueError("pixel_size: expected A per pixel, since the poses have shifts in A, or for the CTF, got None")
    pixel_size = 1.0 if pixel_size is None else checks.number("pixel_size", pixel_size, above=0)
    shifts = shifts / pixel_size

    n = images.shape[1]

    def transfer(rows: np.ndarray) -> np.ndarray:
        return np.ones((1, n, n // 2 + 1), np.float32) if ctf is None else ctf_of(ctf.iloc[rows], n, pixel_size)

    regularisation = checks.number("regularisation", regularisation, low=0)
    iterations = checks.integer("iterations", iterations, low=1)
    threads = checks.integer("threads", min(cores(), 4) if threads is None else threads, low=1)
    equations = [_normal_equations(images, rotations, shifts, transfer, rows, threads) for rows in grouped(len(images))]
    if len(equations) > 1:
        equations.append(reduce(add, equations))
    return [each.solve(regularisation, iterations, threads) for each in equations]


def _normal_equations(
    images: Any, rotations: np.ndarray, shifts: np.ndarray, transfer: Callable, rows: np.ndarray, threads: int
) -> _NormalEquations:
    """Sum A^H y and the kernel of A^H A over batches, each made by one thread, added in order whatever their number."""
    n = images.shape[1]
    ky, kx = 2 * np.pi * scipy.fft.fftfreq(n), 2 * np.pi * scipy.fft.rfftfreq(n)
    plane = np.stack([np.tile(kx, n), np.repeat(ky, len(kx))])
    inside = np.hypot(*plane) < np.pi * (1 - 1e-6)
    plane = plane[:, inside]
    twice = np.where(plane[0] == 0, 1, 2).astype(np.float32)  # a real image's other half plane
    options = {"eps": TOLERANCE, "isign": 1, "upsampfac": 1.25, "nthreads": 1}

    def of_batch(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        batch = checks.as_images(f"images {part[0]} to {part[-1]}", images[part])
        centre = (n + 1) // 2 + shifts[part]
        through = transfer(part).reshape(-1, len(inside))[:, inside]
        spectra = scipy.fft.rfft2(batch).reshape(len(part), -1)[:, inside]
        spectra *= twice * through * np.exp(1j * (centre @ plane)).astype(np.complex64)
        x, y, z = (rotations[part, :, :2].transpose(1, 0, 2) @ plane).astype(np.float32).reshape(3, -1)
        weights = np.broadcast_to(twice * through**2, spectra.shape).astype(np.complex64).ravel()
        back_projection = finufft.nufft3d1(z, y, x, spectra.ravel(), (n,) * 3, **options)
        kernel = finufft.nufft3d1(z, y, x, weights, (2 * n,) * 3, **options)
        return back_projection.real, kernel.real

    size = max(1, POINTS // len(twice))
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    total = _NormalEquations(np.zeros((n,) * 3, np.float32), np.zeros((2 * n,) * 3, np.float32))
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(batches), threads):  # no more at a time, or what is made may wait to be added
            for back_projection, kernel in pool.map(of_batch, batches[start : start + threads]):
                total.back_projection += back_projection
                total.kernel += kernel
    return total


def fsc(a: Any, b: Any) -> np.ndarray:
    """Return the Fourier shell correlation of two volumes, `(n // 2 + 1,)` float64, shell 0 (the mean) to Nyquist.

    Shell s holds the Fourier voxels whose distance from the origin rounds to s: the frequency s / (n pixel size), as
    RELION's. A shell that is empty in one of the volumes has 0.

    Parameters
    ----------
    a, b : `(n, n, n)`. For a masked FSC multiply both by the mask; see `masked_fsc`.

    Raises
    ------
    TypeError, ValueError : not finite cubes of one size.
    """
    a, b = projection.as_volume(a, "a"), projection.as_volume(b, "b")
    checks.same_shape("a", a, "b", b)
    n = len(a)
    shell, weight = _shells(n)
    a, b = scipy.fft.rfftn(a.astype(np.float64)), scipy.fft.rfftn(b.astype(np.float64))

    def over_shells(values: np.ndarray) -> np.ndarray:
        return np.bincount(shell.ravel(), (weight * values).ravel())[: n // 2 + 1]

    cross = over_shells((a * b.conj()).real)
    power = np.sqrt(over_shells(np.abs(a) ** 2) * over_shells(np.abs(b) ** 2))
    return np.divide(cross, power, out=np.zeros_like(cross), where=power > 0)


def _shells(n: int) -> tuple[np.ndarray, np.ndarray]:
    """The shell of each voxel of a half-complex transform, and its weight: 2 where its mate is left out."""
    k, k_last = scipy.fft.fftfreq(n, 1 / n), scipy.fft.rfftfreq(n, 1 / n)
    shell = np.rint(np.sqrt(k[:, None, None] ** 2 + k[:, None] ** 2 + k_last**2)).astype(int)
    return shell, np.where((k_last == 0) | (2 * k_last == n), 1, 2)


def resolution(fsc: Any, threshold: float = GOLD_STANDARD, *, pixel_size: float = 1.0, box: int | None = None) -> float:
    """Return the resolution at which an FSC curve first falls below `threshold`, in the unit of `pixel_size`.

    Linear between shells. A curve that stays above gives that of its last shell; one that is below from shell 1 on,
    infinity.

    Parameters
    ----------
    fsc : `(n // 2 + 1,)`, from shell 0, as `fsc` returns.
    threshold : 0.143 for half-maps (Rosenthal & Henderson 2003), 0.5 against the truth.
    pixel_size : A; 1 gives pixels.
    box : n, the side of the volumes in voxels; None for an even one, 2 (len(fsc) - 1).

    Raises
    ------
    TypeError, ValueError : not a finite curve of two shells or more, or one that does not belong to `box`.
    """
    fsc, threshold = np.asarray(fsc, np.float64), checks.number("threshold", threshold, above=0, high=1)
    if fsc.ndim != 1 or len(fsc) < 2 or not np.isfinite(fsc).all():
        raise ValueError(f"fsc: expected a finite curve, shell 0 first, of shape (n // 2 + 1,), got shape {fsc.shape}")
    box = checks.integer("box", 2 * (len(fsc) - 1) if box is None else box, low=2)
    if box // 2 + 1 != len(fsc):
        raise ValueError(f"box: expected 2 (len(fsc) - 1) = {2 * (len(fsc) - 1)}, or one more, got {box}")
    below = np.flatnonzero(fsc[1:] < threshold) + 1
    if len(below) and below[0] == 1:
        return np.inf
    last = len(fsc) - 1.0
    if len(below):
        above, under = fsc[below[0] - 1], fsc[below[0]]
        last = below[0] - 1 + (above - threshold) / (above - under)
    return box * checks.number("pixel_size", pixel_size, above=0) / last


def soft_mask(volume: Any, level: float, extend: float = 2.0, edge: float = 4.0) -> np.ndarray:
    """Return a mask, `(n, n, n)` float32 in [0, 1], around the voxels above `level`, as relion_mask_create makes it.

    1 up to `extend` voxels from them, then a raised cosine down to 0 over `edge` voxels. ValueError where no voxel is
    above `level`, or all are.
    """
    binary = projection.as_volume(volume) > level
    if binary.all() or not binary.any():
        raise ValueError(
            f"level: expected a density that some voxels exceed, not all, got {level:g}: {int(binary.sum())} of "
            f"{binary.size} do; the volume lies in [{np.min(volume):g}, {np.max(volume):g}]"
        )
    beyond = np.clip((distance_transform_edt(~binary) - extend) / max(edge, 1e-6), 0, 1)
    return (0.5 + 0.5 * np.cos(np.pi * beyond)).astype(np.float32)


def masked_fsc(a: Any, b: Any, mask: Any, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return the FSC of two half-maps inside a mask: as it is, and corrected for what the mask itself correlates.

    The correction is (FSC_masked - FSC_random) / (1 - FSC_random), FSC_random being that of half-maps whose phases were
    made random beyond the shell where the unmasked FSC falls below 0.8; up to 2 shells further it is left out, as in
    RELION. Source: Chen et al. 2013, Ultramicroscopy 135, 24.

    Parameters
    ----------
    a, b, mask : `(n, n, n)`. seed : of the random phases.
    """
    mask = projection.as_volume(mask, "mask")
    masked = fsc(a * mask, b * mask)
    beyond = int(np.argmax(np.append(fsc(a, b), -1.0) < 0.8))
    rng = np.random.default_rng(seed)
    random = fsc(*(_random_phases(volume, beyond, rng) * mask for volume in (a, b)))
    corrected = np.divide(masked - random, 1 - random, out=np.zeros_like(masked), where=random < 1)
    corrected[: beyond + 2] = masked[: beyond + 2]
    return masked, corrected


def _random_phases(volume: np.ndarray, beyond: int, rng: np.random.Generator) -> np.ndarray:
    """The volume with the phases of another's white noise from shell `beyond` on, its amplitudes kept."""
    n = len(volume)
    spectrum, noise = scipy.fft.rfftn(volume), scipy.fft.rfftn(rng.standard_normal(volume.shape, np.float32))
    replaced = np.abs(spectrum) * noise / np.maximum(np.abs(noise), 1e-30)
    return scipy.fft.irfftn(np.where(_shells(n)[0] >= beyond, replaced, spectrum), s=volume.shape)


def low_pass(volume: Any, resolution: float, pixel_size: float) -> np.ndarray:
    """Return the volume, `(n, n, n)` float32, after a Gaussian low-pass that halves waves of `resolution` A."""
    volume, resolution = projection.as_volume(volume), checks.number("resolution", resolution, above=0)
    n, pixel_size = len(volume), checks.number("pixel_size", pixel_size, above=0)
    k, k_last = scipy.fft.fftfreq(n, pixel_size), scipy.fft.rfftfreq(n, pixel_size)
    squared = k[:, None, None] ** 2 + k[:, None] ** 2 + k_last**2
    transfer = np.exp2(-squared * resolution**2).astype(np.float32)
    return scipy.fft.irfftn(scipy.fft.rfftn(volume) * transfer, s=volume.shape)


def compare(
    maps: Mapping[str, Sequence[Any]], truth: Any, mask: Any, pixel_size: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return Fourier shell correlations of several maps, between their halves and against the truth, and resolutions.

    Parameters
    ----------
    maps : name -> two half-maps and the whole map, as `half_maps` returns them, each `(n, n, n)`.
    truth, mask : `(n, n, n)`. pixel_size : A.

    Returns
    -------
    curves : a row a map and shell: `stack`, `shell`, `frequency` (1/A) and the kinds of curve in `THRESHOLDS`.
    resolutions : a row a map, a column a kind, "kind threshold": A.
    """
    curves, shells = [], np.arange(len(truth) // 2 + 1)
    for name, (first, second, whole) in maps.items():
        masked, corrected = masked_fsc(first, second, mask)
        kinds = {"halves": fsc(first, second), "halves_masked": masked, "halves_corrected": corrected}
        kinds |= {"truth": fsc(whole, truth), "truth_masked": fsc(whole * mask, truth * mask)}
        frequency = shells / (len(truth) * pixel_size)
        curves.append(pd.DataFrame({"stack": name, "shell": shells, "frequency": frequency} | kinds))
    options = {"pixel_size": pixel_size, "box": len(truth)}
    resolutions = {
        f"{kind} {threshold}": [resolution(curve[kind], threshold, **options) for curve in curves]
        for kind, threshold in THRESHOLDS.items()
    }
    return pd.concat(curves, ignore_index=True), pd.DataFrame(resolutions, index=pd.Index(maps, name="stack"))


def shown(volume: Any, resolution: float, pixel_size: float) -> np.ndarray:
    """Return a volume as one shows it, `(n, n, n)` uint8: low-passed to its resolution, or a quarter of the box."""
    smooth = low_pass(volume, min(resolution, len(volume) * pixel_size / 4), pixel_size)
    return np.round(255 * np.clip(smooth / smooth.max(), 0, 1)).astype(np.uint8)
