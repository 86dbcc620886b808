"""Classical denoisers of Table 1, by the libraries that own them, each told the true noise level.

| method | library | settings, the same for every image size |
|---|---|---|
| gaussian | scipy.fft | periodic low-pass exp(-2 (pi width f)^2), the width of least mean MSE on training pairs |
| bm3d | bm3d (non-commercial licence) | default profile, nf = 16: within 0.1 dB of 32, or better, 2-3 times faster |
| ksvd | dictlearn | 16 px patches at step 1, 144 atoms learned from 5,000 noisy patches in 10 AK-SVD sweeps |
| nlm | scikit-image | fast mode, patch 7 px, distance 11 px, h = 0.8 sigma, sigma known |
| cwf | ASPIRE (GPL-3.0) | `DenoiserCov2D`: Fourier-Bessel basis, Frobenius shrinkage, covariance of the noisy stack |
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from joblib import Parallel, cpu_count, delayed
from joblib.externals.loky import ProcessPoolExecutor
from scipy.fft import fft2, fftfreq, ifft2
from scipy.special import chdtri
from threadpoolctl import threadpool_limits

from cryo_lib import checks

METHODS: tuple[str, ...] = ("gaussian", "bm3d", "ksvd", "nlm", "cwf")
NEEDS = {  # least image side in px (a patch, or the basis, has to fit), module, its name on PyPI
    "gaussian": (1, "scipy", "scipy"),
    "bm3d": (9, "bm3d", "bm3d"),  # its blocks are 8 px, but it aborts the process on images of 8 x 8
    "ksvd": (16, "dictlearn", "dictlearn"),
    "nlm": (7, "skimage", "scikit-image"),
    "cwf": (8, "aspire", "aspire"),
}
WIDTHS = np.geomspace(0.25, 64.0, 161)  # px, standard deviations tried by "gaussian"
PATCH, ATOMS_PER_AXIS, SWEEPS, TRAINING_PATCHES = 16, 12, 10, 5000  # K-SVD
RESIDUAL = chdtri(PATCH**2, 0.25)  # squared norm that unit noise on a patch stays below three times in four
CHUNK = 8  # images a worker takes at a time


def denoise(
    method: str,
    y: Any,
    sigma: Any,
    *,
    x_train: Any = None,
    y_train: Any = None,
    n_jobs: int | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Denoise a stack by a classical method (Table 1) that is told the true noise level of each image.

    Parameters
    ----------
    method : one of `METHODS`. "bm3d" and "nlm" see one image at a time; "ksvd" and "cwf" learn from the noisy stack
        (hundreds of images, for a good covariance); "gaussian" takes its width from `x_train`, `y_train`.
    y : noisy images `(n, h, w)`, any scale; square for "cwf".
    sigma : `(n,)` noise standard deviation of each image, before any clipping, in units of `y`; unused by "gaussian".
    x_train, y_train : clean and noisy pairs `(m, h, w)`, needed by "gaussian" and used by no other method.
    n_jobs : processes of one thread for "bm3d", "ksvd" and "nlm"; all cores by default. It does not change the result.
    seed : picks the patches that "ksvd" learns from.

    Returns
    -------
    x_hat : `(n, h, w)` float32, on the scale of `y`, not clipped.

    Raises
    ------
    TypeError, ValueError : unknown method; images empty, not finite or too small; sigma of wrong shape, <= 0 or not
        finite; training pairs missing or of another size.
    ModuleNotFoundError : the method's library is not installed.

    Notes
    -----
    BM3D: Dabov et al. 2007 (reference 10). K-SVD: Aharon, Elad, Bruckstein 2006 (reference 11). CWF: Bhamre, Zhang,
    Singer 2016 (reference 12). Non-local means: Buades, Coll, Morel 2005.
    """
    checks.choice("method", method, METHODS)
    y = checks.as_images("y", y)
    sigma = _noise_levels(sigma, len(y))
    n_jobs = cpu_count() if n_jobs is None else checks.integer("n_jobs", n_jobs, low=1)
    seed = checks.integer("seed", seed, low=0)
    least, module, package = NEEDS[method]
    if min(y.shape[1:]) < least:
        raise ValueError(
            f"y: {method} needs images of at least {least} x {least} px, got {y.shape[1]} x {y.shape[2]}; "
            "use larger images or another method"
        )
    if find_spec(module) is None:
        raise ModuleNotFoundError(f"method {method} needs the library {package}: pip install {package}", name=module)

    if method == "gaussian":
        transfer = _transfer(best_width(x_train, y_train, y.shape[1:]), y.shape[1:])
        return np.concatenate([ifft2(fft2(y[part]) * transfer).real for part in _parts(len(y), 256)])
    if method == "cwf":
        return _cwf(y, sigma)
    with threadpool_limits(1):
        if method == "ksvd":
            one = partial(_ksvd, dictionary=_learn_dictionary(y, sigma, seed))
        else:
            one = {"bm3d": _bm3d, "nlm": _nlm}[method]
        chunks = Parallel(n_jobs)(delayed(_each)(one, y[part], sigma[part]) for part in _parts(len(y), CHUNK))
    return np.concatenate(chunks)


def _noise_levels(sigma: Any, n: int) -> np.ndarray:
    sigma = np.asarray(sigma, dtype=np.float64)
    if sigma.shape != (n,):
        raise ValueError(
            f"sigma: expected one noise standard deviation an image, shape ({n},), got {sigma.shape}; "
            "for one level throughout use np.full(len(y), sigma)"
        )
    good = np.isfinite(sigma) & (sigma > 0)
    if not good.all():
        first = int(np.argmin(good))
        raise ValueError(
            f"sigma: expected finite values > 0, got {int((~good).sum())} others, the first is {sigma[first]} at image "
            f"{first}; give the true noise level of every image"
        )
    return sigma


def _parts(n: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, n, size)]


def _each(one: Callable[[np.ndarray, float], np.ndarray], y: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Apply `one` to each image of a chunk with one thread, in whichever process this runs."""
    with threadpool_limits(1):
        return np.stack([one(image, float(level)) for image, level in zip(y, sigma)]).astype(np.float32)


def _transfer(width: float, shape: tuple[int, int]) -> np.ndarray:
    squared = np.square(fftfreq(shape[0]))[:, None] + np.square(fftfreq(shape[1]))
    return np.exp(-2 * (np.pi * width) ** 2 * squared).astype(np.float32)


def best_width(x_train: Any, y_train: Any, shape: tuple[int, int]) -> float:
    """Return the width (px) in `WIDTHS` of the Gaussian low-pass that has the least mean MSE on training pairs.

    Parameters
    ----------
    x_train, y_train : clean and noisy images `(m, h, w)`.
    shape : `(h, w)` of the images to be denoised; a width in pixels holds only for images of the same size.

    Raises
    ------
    ValueError : pairs missing, of different shapes, not finite, or not of size `shape`.
    """
    if x_train is None or y_train is None:
        raise ValueError("x_train, y_train: expected pairs, that gaussian sets its width on, got None; give both")
    x_train, y_train = checks.as_images("x_train", x_train), checks.as_images("y_train", y_train)
    checks.same_shape("x_train", x_train, "y_train", y_train)
    if x_train.shape[1:] != tuple(shape):
        raise ValueError(
            f"x_train: expected {shape[0]} x {shape[1]} px, as the images to denoise, got "
            f"{x_train.shape[1]} x {x_train.shape[2]}; use training pairs of that size"
        )
    power, cross = np.zeros(shape), np.zeros(shape)
    for part in _parts(len(x_train), 256):
        x_hat, y_hat = fft2(x_train[part]), fft2(y_train[part])
        power += np.square(np.abs(y_hat)).sum(axis=0)
        cross += (x_hat.conj() * y_hat).real.sum(axis=0)
    errors = [(g * (g * power - 2 * cross)).sum() for g in (_transfer(width, shape) for width in WIDTHS)]  # Parseval
    return float(WIDTHS[np.argmin(errors)])


def _bm3d(y: np.ndarray, sigma: float) -> np.ndarray:
    from bm3d import BM3DProfile, bm3d

    profile = BM3DProfile()
    profile.nf = 16  # side of the Fourier domain in which the variances of a block are computed
    profile.num_threads = 1  # more are not reproducible, says bm3d
    return bm3d(y, sigma, profile)


def _nlm(y: np.ndarray, sigma: float) -> np.ndarray:
    from skimage.restoration import denoise_nl_means

    return denoise_nl_means(y, patch_size=7, patch_distance=11, h=0.8 * sigma, sigma=sigma, fast_mode=True)


def _patches(z: np.ndarray) -> np.ndarray:
    """Every patch: a view `(..., h - PATCH + 1, w - PATCH + 1, PATCH, PATCH)`."""
    return np.lib.stride_tricks.sliding_window_view(z, (PATCH, PATCH), axis=(-2, -1))


def _omp(patches: np.ndarray, dictionary: np.ndarray, **_: Any) -> np.ndarray:
    """Error-constrained orthogonal matching pursuit: the fewest atoms that leave RESIDUAL or less."""
    from dictlearn import sparse_encode

    codes = np.zeros((len(patches), len(dictionary)))
    signal = np.square(patches).sum(axis=1) > RESIDUAL
    codes[signal] = sparse_encode(patches[signal], dictionary, tol=RESIDUAL)
    return codes


def _learn_dictionary(y: np.ndarray, sigma: np.ndarray, seed: int) -> np.ndarray:
    """K-SVD (its approximate, AK-SVD form) from cosines, on patches of the images scaled to unit noise."""
    from dictlearn import DictionaryLearning

    rng = np.random.default_rng(seed)
    index = tuple(rng.integers(size, size=TRAINING_PATCHES) for size in _patches(y).shape[:3])
    patches = _patches(y)[index].reshape(TRAINING_PATCHES, -1) / sigma[index[0], None]
    cosines = np.cos(np.pi / ATOMS_PER_AXIS * np.outer(np.arange(ATOMS_PER_AXIS), np.arange(PATCH)))
    cosines[1:] -= cosines[1:].mean(axis=1, keepdims=True)
    cosines /= np.linalg.norm(cosines, axis=1, keepdims=True)
    options = {"transform_algorithm": _omp, "fit_algorithm": "aksvd", "replace_unused_atoms": "no", "max_iter": SWEEPS}
    learner = DictionaryLearning(ATOMS_PER_AXIS**2, dict_init=np.kron(cosines, cosines), **options)
    return learner.fit(patches).components_


def _ksvd(y: np.ndarray, sigma: float, dictionary: np.ndarray) -> np.ndarray:
    """Code every patch of an image scaled to unit noise, and average the patches where they overlap."""
    patches = _patches(y / np.float64(sigma))
    rows, columns = patches.shape[:2]
    denoised = (_omp(patches.reshape(-1, PATCH**2), dictionary) @ dictionary).reshape(patches.shape)
    total = np.zeros(y.shape)
    for i, j in np.ndindex(PATCH, PATCH):
        total[i : i + rows, j : j + columns] += denoised[:, :, i, j]
    return sigma * total / np.outer(*(np.convolve(np.ones(size), np.ones(PATCH)) for size in (rows, columns)))


def _cwf(y: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Covariance Wiener filter of the images scaled to unit noise (whitened): one noise variance, 1, holds for all.

    Imported, ASPIRE takes over logging and writes logs and a configuration folder: it gets a process of its own.
    """
    if y.shape[1] != y.shape[2]:
        raise ValueError(f"y: cwf needs square images, got {y.shape[1]} x {y.shape[2]}; crop or pad them")
    scale = sigma.astype(np.float32)[:, None, None]
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"log_dir": folder, "console_level": "ERROR", "log_file_level": "CRITICAL", "log_exceptions": 0}
        Path(folder, "config.yaml").write_text(json.dumps({"logging": quiet}), encoding="utf-8")
        environment = {"ASPIREDIR": folder, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with ProcessPoolExecutor(1, env=environment) as worker:
            return worker.submit(_aspire_cwf, y / scale).result() * scale


def _aspire_cwf(y: np.ndarray) -> np.ndarray:
    from aspire.denoising import DenoiserCov2D
    from aspire.image import Image
    from aspire.source import ArrayImageSource

    source = ArrayImageSource(Image(y, pixel_size=1.0))  # the filter makes no use of the pixel size
    return DenoiserCov2D(source, var_noise=1.0).denoise[:].asnumpy()
