"""MSE, PSNR and SSIM (Evaluation Method): one value an image; and the Fourier ring correlation."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter

from cryo_lib import checks

SSIM_SIGMA, SSIM_RADIUS, K1, K2 = 1.5, 5, 0.01, 0.03


def _pair(x: Any, x_hat: Any) -> tuple[np.ndarray, np.ndarray]:
    x, x_hat = checks.as_images("x", x, np.float64), checks.as_images("x_hat", x_hat, np.float64)
    checks.same_shape("x", x, "x_hat", x_hat)
    return x, x_hat


def mse(x: Any, x_hat: Any) -> np.ndarray:
    """Mean square error of each image.

    Parameters
    ----------
    x, x_hat : references and denoised images, `(n, h, w)`, numpy arrays or CPU tensors.

    Returns
    -------
    (n,) float64. Raises TypeError or ValueError for shapes that differ, empty stacks and NaN.
    """
    x, x_hat = _pair(x, x_hat)
    return np.square(x - x_hat).mean(axis=(1, 2))


def psnr(x: Any, x_hat: Any, data_range: float = 1.0) -> np.ndarray:
    """Peak signal-to-noise ratio of each image in dB: 10 log10(data_range^2 / MSE).

    Arguments and errors as `mse`; `data_range` > 0 is the peak t of the paper (1 for images scaled to [0, 1]).
    Identical images give infinity.
    """
    data_range = checks.number("data_range", data_range, above=0)
    with np.errstate(divide="ignore"):
        return 10 * np.log10(data_range**2 / mse(x, x_hat))


def ssim(x: Any, x_hat: Any, data_range: float = 1.0) -> np.ndarray:
    """Structural similarity of each image, in [-1, 1].

    Wang et al. 2004 (the paper's reference 38): Gaussian window of sd 1.5 px cut at 11x11, K1 = 0.01, K2 = 0.03,
    C3 = C2/2, averaged over the windows that lie inside the image. Equal to scikit-image's
    `structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)`, for a whole stack in one
    call.

    Arguments and errors as `psnr`; images smaller than 11 px are refused.
    """
    x, x_hat = _pair(x, x_hat)
    data_range = checks.number("data_range", data_range, above=0)
    if min(x.shape[1:]) <= 2 * SSIM_RADIUS:
        raise ValueError(f"x: SSIM needs images of at least 11 x 11 px, got {x.shape[1]} x {x.shape[2]}")

    def local_mean(images: np.ndarray) -> np.ndarray:
        smooth = gaussian_filter(images, SSIM_SIGMA, radius=SSIM_RADIUS, axes=(1, 2))
        return smooth[:, SSIM_RADIUS:-SSIM_RADIUS, SSIM_RADIUS:-SSIM_RADIUS]

    mean_x, mean_h = local_mean(x), local_mean(x_hat)
    var_x = local_mean(x * x) - mean_x**2
    var_h = local_mean(x_hat * x_hat) - mean_h**2
    covariance = local_mean(x * x_hat) - mean_x * mean_h
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    similarity = (2 * mean_x * mean_h + c1) * (2 * covariance + c2)
    return (similarity / ((mean_x**2 + mean_h**2 + c1) * (var_x + var_h + c2))).mean(axis=(1, 2))


def frc(x: Any, x_hat: Any) -> np.ndarray:
    """Fourier ring correlation of each image with its reference, in [-1, 1]: the FSC's counterpart in two dimensions.

    Ring s holds the Fourier pixels whose distance from the origin rounds to s, the frequency s / (n pixel size), as the
    shells of `reconstruction.fsc`. A positive factor on all of a ring does not change it. Source: Saxton and
    Baumeister 1982.

    Arguments and errors as `mse`; images must be square.

    Returns
    -------
    (n, h // 2 + 1) float64, ring 0 (the mean) to Nyquist; 0 where a ring is empty in one of the images.
    """
    x, x_hat = _pair(x, x_hat)
    h, w = x.shape[1:]
    if h != w:
        raise ValueError(f"x: the Fourier ring correlation needs square images, got {h} x {w}; crop or pad them")
    ring = np.rint(np.hypot(np.fft.fftfreq(h)[:, None], np.fft.fftfreq(h)) * h)
    member = (ring.ravel()[:, None] == np.arange(h // 2 + 1)).astype(np.float64)
    a, b = (np.fft.fft2(images).reshape(len(images), -1) for images in (x, x_hat))
    cross = (a * b.conj()).real @ member
    power = np.sqrt((np.abs(a) ** 2 @ member) * (np.abs(b) ** 2 @ member))
    return np.divide(cross, power, out=np.zeros_like(cross), where=power > 0)


SCORES = {"mse": mse, "psnr": psnr, "ssim": ssim}  # of every table
