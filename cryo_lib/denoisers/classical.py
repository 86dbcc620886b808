"""Classical denoisers of Table 1, by the libraries that own them, each told the true noise level.

| method | library | settings, by one rule for every image size |
|---|---|---|
| gaussian | scipy.fft | periodic low-pass exp(-2 (pi width f)^2); width tuned |
| bm3d | bm3d (non-commercial licence) | nf = 16 (within 0.1 dB of 32, or better); profile, factor on sigma tuned |
| ksvd | dictlearn | 16 px patches at step 1, 144 atoms learned from 5,000 noisy patches in 10 AK-SVD sweeps |
| nlm | scikit-image | fast mode, patch 7 px, sigma known; distance in px and h in units of sigma tuned |
| cwf | ASPIRE (GPL-3.0) | `DenoiserCov2D`: Fourier-Bessel basis, Frobenius shrinkage, covariance of noisy images |
| rir | ASPIRE (GPL-3.0) | `RIRClass2D`: the mean of an image and of the 49 nearest by their bispectra, turned to it |

Tuned settings are those of least mean MSE on training pairs: `WIDTHS` on all of them, `SETTINGS` on the first
`TUNING_PAIRS`. K-SVD, CWF and class averages (rir) learn from all noisy images there are, training's and test's, of
training's the first `LEARNING_IMAGES`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from functools import cache, partial
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

METHODS: tuple[str, ...] = ("gaussian", "bm3d", "ksvd", "nlm", "cwf", "rir")
NEEDS = {  # least image side in px (a patch, or the basis, has to fit), module, its name on PyPI
    "gaussian": (1, "scipy", "scipy"),
    "bm3d": (12, "bm3d", "bm3d"),  # its blocks are 8 or 11 px, but it aborts the process on images of 11 x 11
    "ksvd": (16, "dictlearn", "dictlearn"),
    "nlm": (7, "skimage", "scikit-image"),
    "cwf": (8, "aspire", "aspire"),
    "rir": (16, "aspire", "aspire"),  # for as many components as it is given
}
WIDTHS = np.geomspace(0.25, 64.0, 161)  # px, standard deviations tried by "gaussian"
TUNING_PAIRS = 24  # training pairs, from the first on, that choose among SETTINGS
SETTINGS: dict[str, list[dict[str, Any]]] = {  # what they choose among; the first is that of a caller without pairs
    "bm3d": [{"profile": profile, "factor": factor} for profile in ("np", "vn") for factor in (1.0, 1.15, 1.3)],
    "nlm": [{"distance": distance, "h": h} for distance in (11, 3, 5, 7, 9, 15) for h in (0.8, 0.5, 1.2, 2.0)],
}
LEARNING_IMAGES = 10_000  # noisy images of training, from the first on, that "ksvd" and "cwf" learn from beside y
PATCH, ATOMS_PER_AXIS, SWEEPS, TRAINING_PATCHES = 16, 12, 10, 5_000  # K-SVD
NEIGHBOURS, COMPONENTS = 50, 60  # rir: images a class, and components of their representation, at most
RESIDUAL = chdtri(PATCH**2, 0.25)  # squared norm that unit noise on a patch stays below three times in four
CHUNK = 8  # images a worker takes at a time
Denoiser = Callable[..., np.ndarray]  # of one image, its noise level, and settings


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
    method : one of `METHODS`. "gaussian", "bm3d" and "nlm" see one image at a time; "ksvd", "cwf" and
        "rir" learn from `y` and `y_train` together (thousands of images, for a good covariance).
    y : noisy images `(n, h, w)`, any scale; square for "cwf" and "rir".
    sigma : `(n,)` noise standard deviation of each image, before any clipping, in units of `y`; unused by "gaussian".
    x_train, y_train : clean and noisy pairs `(m, h, w)`, which choose the settings and give the noise level of
        `y_train`. Without them "ksvd", "cwf" and "rir" learn from `y` alone, "bm3d" and "nlm" take the first of their
        `SETTINGS`, and "gaussian" cannot do.
    n_jobs : processes of one thread for "bm3d", "ksvd" and "nlm"; all cores by default. It does not change the result.
    seed : picks the patches that "ksvd" learns from.

    Returns
    -------
    x_hat : `(n, h, w)` float32, on the scale of `y`, not clipped.

    Raises
    ------
    TypeError, ValueError : unknown method; images empty, not finite or too small; sigma of wrong shape, <= 0 or not
        finite; training pairs missing, not finite, of another size or without noise; too few images for "rir".
    ModuleNotFoundError : the method's library is not installed.
    RuntimeError : ASPIRE's process was killed.

    Notes
    -----
    BM3D: Dabov et al. 2007 (reference 10). K-SVD: Aharon, Elad, Bruckstein 2006 (reference 11). CWF: Bhamre, Zhang,
    Singer 2016 (reference 12). Non-local means: Buades, Coll, Morel 2005. Class averages: Zhao and Singer 2014.
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
        return _low_pass(y, best_width(x_train, y_train, y.shape[1:]))
    if x_train is None and y_train is None:
        x_train = y_train = y[:0]
    else:
        x_train, y_train = (z[:LEARNING_IMAGES] for z in _training_pairs(x_train, y_train, y.shape[1:]))
    sigma_train = _noise_levels((y_train - x_train).std(axis=(1, 2)), len(y_train), "y_train - x_train")
    if method in _ASPIRE:
        return _by_aspire(method, np.concatenate([y, y_train]), np.concatenate([sigma, sigma_train]), len(y))
    with threadpool_limits(1):
        if method == "ksvd":
            noisy, levels = np.concatenate([y, y_train]), np.concatenate([sigma, sigma_train])
            one = partial(_ksvd, dictionary=_learn_dictionary(noisy, levels, seed))
        else:
            one = {"bm3d": _bm3d, "nlm": _nlm}[method]
            tuning = (z[:TUNING_PAIRS] for z in (x_train, y_train, sigma_train))
            one = partial(one, **best_setting(one, SETTINGS[method], *tuning, n_jobs))
        return _apply([one], y, sigma, n_jobs)[0]


def _noise_levels(sigma: Any, n: int, name: str = "sigma") -> np.ndarray:
    sigma = np.asarray(sigma, dtype=np.float64)
    if sigma.shape != (n,):
        raise ValueError(
            f"{name}: expected one noise standard deviation an image, shape ({n},), got {sigma.shape}; "
            "for one level throughout use np.full(len(y), sigma)"
        )
    good = np.isfinite(sigma) & (sigma > 0)
    if not good.all():
        first = int(np.argmin(good))
        raise ValueError(
            f"{name}: expected finite values > 0, got {int((~good).sum())} others, the first is {sigma[first]} at "
            f"image {first}; give the true noise level of every image"
        )
    return sigma


def _parts(n: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, n, size)]


def _each(one: Denoiser, y: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Apply `one` to each image of a chunk with one thread, in whichever process this runs."""
    with threadpool_limits(1):
        return np.stack([one(image, float(level)) for image, level in zip(y, sigma)]).astype(np.float32)


def _apply(ones: list[Denoiser], y: np.ndarray, sigma: np.ndarray, n_jobs: int) -> np.ndarray:
    """Apply each denoiser to every image, `(len(ones), n, h, w)`."""
    tasks = [delayed(_each)(one, y[part], sigma[part]) for one in ones for part in _parts(len(y), CHUNK)]
    return np.concatenate(Parallel(n_jobs)(tasks)).reshape(len(ones), *y.shape)


def best_setting(
    one: Denoiser, settings: list[dict[str, Any]], x: np.ndarray, y: np.ndarray, sigma: np.ndarray, n_jobs: int
) -> dict[str, Any]:
    """Return the setting with which `one` has the least mean MSE on pairs `(m, h, w)`; without pairs, the first."""
    if len(x) == 0:
        return settings[0]
    errors = [np.square(x_hat - x).mean() for x_hat in _apply([partial(one, **s) for s in settings], y, sigma, n_jobs)]
    return settings[int(np.argmin(errors))]


def _transfer(width: float, shape: tuple[int, int]) -> np.ndarray:
    squared = np.square(fftfreq(shape[0]))[:, None] + np.square(fftfreq(shape[1]))
    return np.exp(-2 * (np.pi * width) ** 2 * squared).astype(np.float32)


def _low_pass(y: np.ndarray, width: float) -> np.ndarray:
    transfer = _transfer(width, y.shape[1:])
    return np.concatenate([ifft2(fft2(y[part]) * transfer).real for part in _parts(len(y), 256)])


def _training_pairs(x_train: Any, y_train: Any, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    if x_train is None or y_train is None:
        raise ValueError("x_train, y_train: expected pairs, to choose settings on, got None; give both")
    x_train, y_train = checks.as_images("x_train", x_train), checks.as_images("y_train", y_train)
    checks.same_shape("x_train", x_train, "y_train", y_train)
    if x_train.shape[1:] != tuple(shape):
        raise ValueError(
            f"x_train: expected {shape[0]} x {shape[1]} px, as the images to denoise, got "
            f"{x_train.shape[1]} x {x_train.shape[2]}; use training pairs of that size"
        )
    return x_train, y_train


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
    x_train, y_train = _training_pairs(x_train, y_train, shape)
    power, cross = np.zeros(shape), np.zeros(shape)
    for part in _parts(len(x_train), 256):
        x_hat, y_hat = fft2(x_train[part]), fft2(y_train[part])
        power += np.square(np.abs(y_hat)).sum(axis=0)
        cross += (x_hat.conj() * y_hat).real.sum(axis=0)
    errors = [(g * (g * power - 2 * cross)).sum() for g in (_transfer(width, shape) for width in WIDTHS)]  # Parseval
    return float(WIDTHS[np.argmin(errors)])


def _bm3d(y: np.ndarray, sigma: float, profile: str, factor: float) -> np.ndarray:
    """By the profile "np", the default, or "vn", for strong noise."""
    from bm3d import BM3DProfile, BM3DProfileVN, bm3d

    options = {"np": BM3DProfile, "vn": BM3DProfileVN}[profile]()
    options.nf = 16  # side of the Fourier domain in which the variances of a block are computed
    options.num_threads = 1  # more are not reproducible, says bm3d
    return bm3d(y, factor * sigma, options)


def _nlm(y: np.ndarray, sigma: float, distance: int, h: float) -> np.ndarray:
    """`h` in units of sigma."""
    from skimage.restoration import denoise_nl_means

    options = {"patch_size": 7, "patch_distance": distance, "h": h * sigma, "sigma": sigma, "fast_mode": True}
    return denoise_nl_means(y, **options)


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


def _by_aspire(method: str, y: np.ndarray, sigma: np.ndarray, n: int) -> np.ndarray:
    """The first `n` images denoised by what ASPIRE learns from all.

    Images are scaled to unit noise (whitened): one noise variance, 1, holds for all.
    """
    if y.shape[1] != y.shape[2]:
        raise ValueError(f"y: {method} needs square images, got {y.shape[1]} x {y.shape[2]}; crop or pad them")
    scale = sigma.astype(np.float32)[:, None, None]
    worker, _ = _aspire()
    try:
        return worker.submit(_ASPIRE[method], y / scale, n).result() * scale[:n]
    except BrokenExecutor as error:
        _aspire.cache_clear()  # the next call starts another
        problem = "expected ASPIRE's process to live to the end, got one that was killed"
        raise RuntimeError(f"{method}: {problem}; free memory for it, or give it fewer images") from error


@cache
def _aspire() -> tuple[ProcessPoolExecutor, tempfile.TemporaryDirectory]:
    """A process of ASPIRE's own, and the folder that it writes to, both for as long as this process lives.

    Imported, which takes seconds, ASPIRE takes over logging and writes logs and a configuration folder.
    """
    folder = tempfile.TemporaryDirectory()
    quiet = {"log_dir": folder.name, "console_level": "ERROR", "log_file_level": "CRITICAL", "log_exceptions": 0}
    Path(folder.name, "config.yaml").write_text(json.dumps({"logging": quiet}), encoding="utf-8")
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return ProcessPoolExecutor(1, env=threads | {"ASPIREDIR": folder.name}), folder


def _cwf(y: np.ndarray, n: int) -> np.ndarray:
    """Covariance Wiener filter by the covariance of all."""
    from aspire.denoising import DenoiserCov2D

    return DenoiserCov2D(_source(y), var_noise=1.0).denoise[:n].asnumpy()


def _rir(y: np.ndarray, n: int) -> np.ndarray:
    """Each image's class: its nearest by rotationally invariant representation, mirrored where that is nearer.

    ASPIRE takes the logarithm of every component's variance: those of which noise leaves none are left out.
    """
    from aspire.basis import FFBBasis2D, FSPCABasis
    from aspire.classification import BFRAverager2D, RIRClass2D, TopClassSelector
    from aspire.denoising import ClassAvgSource

    level = y.mean(axis=(1, 2), keepdims=True)
    source, neighbours = _source(y - level), min(NEIGHBOURS, len(y))
    np.random.seed(0)  # what draws among bispectra is given no seed
    components = COMPONENTS
    while components > 1 and (FSPCABasis(source, components=components).eigvals <= 0).any():
        components = components * 3 // 4
    sizes = {"fspca_components": components, "bispectrum_components": components}
    averager = BFRAverager2D(FFBBasis2D(source.L, dtype=np.float32), source)
    try:
        classes = RIRClass2D(source, n_nbor=neighbours, seed=0, **sizes)
        return ClassAvgSource(source, classes, TopClassSelector(), averager).images[:n].asnumpy() + level[:n]
    except RuntimeError as error:
        problem = f"expected images that rir can learn from, got {len(y)} of which it cannot ({error})"
        raise ValueError(f"y: {problem}; give more, or take another method") from error


def _source(y: np.ndarray) -> Any:
    from aspire.image import Image
    from aspire.source import ArrayImageSource

    return ArrayImageSource(Image(y, pixel_size=1.0))  # neither makes use of the pixel size


_ASPIRE = {"cwf": _cwf, "rir": _rir}
