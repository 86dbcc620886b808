"""Classical denoisers: each is worth its row, is reproducible, and refuses what it cannot do."""

from __future__ import annotations

import os
import signal
import sys
from functools import cache

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, rotate

from cryo_lib.denoisers import classical
from cryo_lib.evaluate.metrics import psnr
from cryo_lib.simulate.density import density
from cryo_lib.simulate.phantom import phantom
from cryo_lib.simulate.projection import project, random_rotations, rescale

SIZE, SNR = 32, 0.1
LIBRARY_METHODS = [method for method in classical.METHODS if method != "gaussian"]
OF_FEW = [method for method in classical.METHODS if method != "rir"]  # those that need no hundreds of images


@pytest.fixture(autouse=True)
def cheap(monkeypatch) -> None:
    monkeypatch.setattr(classical, "TUNING_PAIRS", 4)


@cache
def particles(n: int = 32, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rotated two-domain blobs in [0, 1] on a background of 0, at SNR 0.1: x, y, sigma."""
    rng = np.random.default_rng(seed)
    grid = np.indices((SIZE, SIZE)) - SIZE // 2
    shape = (grid[0] ** 2 / 64 + grid[1] ** 2 / 25 < 1).astype(float)
    shape[(np.abs(grid[1]) < 2) & (grid[0] > 0)] = 0  # the cleft of a claw
    shape = gaussian_filter(shape, 1.0)
    x = np.stack([rotate(shape, angle, reshape=False, order=1) for angle in rng.uniform(0, 360, n)])
    x = (x / x.max(axis=(1, 2), keepdims=True)).astype(np.float32)
    sigma = np.sqrt(x.var(axis=(1, 2)) / SNR)
    y = (x + sigma[:, None, None] * rng.standard_normal(x.shape)).astype(np.float32)
    return x, y, sigma


def denoise(method: str, y: np.ndarray, sigma: np.ndarray, **options) -> np.ndarray:
    x_train, y_train, _ = particles(seed=1)
    return classical.denoise(method, y, sigma, **{"x_train": x_train, "y_train": y_train, "n_jobs": 1} | options)


@cache
def reference(method: str) -> np.ndarray:
    _, y, sigma = particles()
    return denoise(method, y, sigma)


@pytest.mark.parametrize("method", OF_FEW)
def test_every_method_gains_at_least_10_db_on_additive_noise(method: str) -> None:
    x, y, _ = particles()
    x_hat = reference(method)
    assert x_hat.shape == y.shape and x_hat.dtype == np.float32
    assert (psnr(x, x_hat) - psnr(x, y)).mean() > 10


@pytest.mark.parametrize("method", OF_FEW)
def test_clipped_noise_is_denoised_too(method: str) -> None:
    x, y, sigma = particles()
    y = y.clip(0, 1)
    kept = y.copy()
    assert (psnr(x, denoise(method, y, sigma)) - psnr(x, y)).mean() > 2
    np.testing.assert_array_equal(y, kept)  # the caller's images are left as they were


@pytest.mark.parametrize("method", ["bm3d", "ksvd", "nlm"])
def test_two_processes_give_the_result_of_one_bit_for_bit(method: str) -> None:
    _, y, sigma = particles()
    np.testing.assert_array_equal(denoise(method, y, sigma, n_jobs=2), reference(method))


def test_class_averages_gain_from_the_images_of_other_views_and_are_the_same_each_time() -> None:
    volume = density(phantom(2)[0], SIZE, 6.4, 13.0)
    x = rescale(project(volume, random_rotations(400, 0)))
    sigma = np.sqrt(x.var(axis=(1, 2)) / SNR)
    y = (x + sigma[:, None, None] * np.random.default_rng(0).standard_normal(x.shape)).astype(np.float32)
    first, second = (classical.denoise("rir", y[:100], sigma[:100], x_train=x[100:], y_train=y[100:]) for _ in range(2))
    np.testing.assert_array_equal(first, second)  # ASPIRE draws among bispectra
    assert (psnr(x[:100], first) - psnr(x[:100], y[:100])).mean() > 6


def test_few_images_have_no_class_averages() -> None:
    _, y, sigma = particles()
    with pytest.raises(ValueError, match="expected images that rir can learn from, got 12 .* or take another"):
        classical.denoise("rir", y[:12], sigma[:12])


def test_ksvd_heeds_its_seed() -> None:
    _, y, sigma = particles()
    assert not np.array_equal(denoise("ksvd", y, sigma, seed=1), reference("ksvd"))


@pytest.mark.parametrize("method", ["gaussian", "bm3d", "nlm", "cwf"])
def test_order_does_not_matter_and_scale_is_kept(method: str) -> None:
    _, y, sigma = particles()
    x_train, y_train, _ = particles(seed=1)
    order = np.random.default_rng(2).permutation(len(y))
    x_hat = denoise(method, 4 * y[order], 4 * sigma[order], x_train=4 * x_train, y_train=4 * y_train) / 4
    np.testing.assert_allclose(x_hat, reference(method)[order], atol=1e-3)


@pytest.mark.parametrize("method", ["gaussian", "bm3d", "nlm"])
def test_images_are_denoised_one_by_one(method: str) -> None:
    _, y, sigma = particles()
    np.testing.assert_allclose(denoise(method, y[3:4], sigma[3:4])[0], reference(method)[3], atol=1e-6)


@pytest.mark.parametrize("method", ["gaussian", "nlm"])
def test_a_constant_added_stays_added(method: str) -> None:
    _, y, sigma = particles()
    np.testing.assert_allclose(denoise(method, y[:5] + 1, sigma[:5]) - 1, reference(method)[:5], atol=1e-4)


@pytest.mark.parametrize("method", ["bm3d", "ksvd", "nlm", "cwf"])
def test_each_image_has_its_own_noise_level(method: str) -> None:
    """Ten times the noise on one half must not spoil the other half, as one common level would."""
    x, y, sigma = particles()
    loud = np.where(np.arange(len(y)) < len(y) // 2, 1.0, 10.0)
    y_loud = (x + (y - x) * loud[:, None, None]).astype(np.float32)
    gain = psnr(x, denoise(method, y_loud, sigma * loud)) - psnr(x, y_loud)
    assert gain[loud == 1].mean() > 6 and gain[loud == 10].mean() > 10


@pytest.mark.parametrize(("method", "gain"), [("cwf", 1.0), ("ksvd", 0.1)])
def test_training_images_are_learned_from_beside_the_stack(method: str, gain: float) -> None:
    """Five images alone give a poor covariance, and a poor dictionary; 32 more of training make up for it."""
    x, y, sigma = (z[:5] for z in particles())
    alone = classical.denoise(method, y, sigma, n_jobs=1)
    assert psnr(x, denoise(method, y, sigma)).mean() > psnr(x, alone).mean() + gain


def test_cwf_of_some_images_is_that_of_all_when_the_rest_is_for_training() -> None:
    """The covariance, and each image's own noise level, are those of both stacks together, whichever is denoised."""
    x, y, sigma = particles()
    y = (x + (y - x) * np.linspace(0.5, 2, len(y), dtype=np.float32)[:, None, None]).astype(np.float32)
    sigma = (y - x).std(axis=(1, 2))
    together = classical.denoise("cwf", y, sigma)
    np.testing.assert_allclose(
        classical.denoise("cwf", y[:5], sigma[:5], x_train=x[5:], y_train=y[5:]), together[:5], atol=1e-4
    )


@pytest.mark.parametrize("method", classical.SETTINGS)
def test_the_setting_is_the_best_on_the_training_pairs(method: str, monkeypatch) -> None:
    """By brute force: the pairs that choose, denoised with each setting alone."""
    x, y, sigma = (z[: classical.TUNING_PAIRS] for z in particles(seed=1))
    settings = classical.SETTINGS[method][::-1]  # the first is not the best
    monkeypatch.setitem(classical.SETTINGS, method, settings)
    chosen = np.square(denoise(method, y, sigma) - x).mean()
    errors = []
    for setting in settings:
        monkeypatch.setitem(classical.SETTINGS, method, [setting])
        errors.append(np.square(classical.denoise(method, y, sigma, n_jobs=1) - x).mean())
    assert chosen == pytest.approx(min(errors), rel=1e-5) and errors[0] > 1.02 * chosen


def test_best_width_is_the_brute_force_minimum_over_the_training_pairs() -> None:
    x, y, _ = particles(seed=1)
    best = classical.best_width(x, y, (SIZE, SIZE))
    error = [np.square(gaussian_filter(y, (0, w, w), mode="wrap") - x).mean() for w in classical.WIDTHS[:100]]
    assert best == pytest.approx(classical.WIDTHS[np.argmin(error)], rel=0.08)  # scipy cuts its kernel at 4 sd
    assert classical.best_width(x, x, (SIZE, SIZE)) == classical.WIDTHS[0]


def test_rectangular_images() -> None:
    x, y, sigma = particles()
    for method in ("gaussian", "bm3d", "ksvd", "nlm"):
        pairs = {"x_train": x[:, 4:], "y_train": y[:, 4:]}
        x_hat = classical.denoise(method, y[:4, 4:], sigma[:4], n_jobs=1, **pairs)
        assert (psnr(x[:4, 4:], x_hat) - psnr(x[:4, 4:], y[:4, 4:])).mean() > 6
    with pytest.raises(ValueError, match="cwf needs square images, got 28 x 32; crop or pad"):
        classical.denoise("cwf", y[:4, 4:], sigma[:4], **pairs)


def test_aspire_stays_out_of_this_process_and_folder(tmp_path, monkeypatch, capfd) -> None:
    _, y, sigma = particles()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    classical._aspire.cache_clear()
    again = denoise("cwf", y, sigma)
    assert "aspire" not in sys.modules
    assert not [path for path in tmp_path.rglob("*") if "aspire" in path.name.lower() or path.name == "logs"]
    assert capfd.readouterr() == ("", "")
    np.testing.assert_array_equal(again, reference("cwf"))


def test_another_process_of_aspire_is_started_where_one_was_killed(monkeypatch) -> None:
    _, y, sigma = particles()
    with monkeypatch.context() as patched:
        patched.setitem(classical._ASPIRE, "cwf", lambda y, n: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(RuntimeError, match="cwf: expected ASPIRE's process to live .* killed; free memory"):
            denoise("cwf", y, sigma)
    np.testing.assert_array_equal(denoise("cwf", y, sigma), reference("cwf"))


@pytest.mark.parametrize(("method", "least"), [(m, classical.NEEDS[m][0]) for m in LIBRARY_METHODS])
def test_smallest_images(method: str, least: int) -> None:
    y = np.random.default_rng(0).standard_normal((6, least, least))
    if method not in ("cwf", "rir"):  # a start of ASPIRE takes seconds
        assert np.isfinite(classical.denoise(method, y, np.ones(6), n_jobs=1)).all()
    with pytest.raises(ValueError, match=f"{method} needs images of at least {least} x {least} px, got"):
        classical.denoise(method, y[:, 1:], np.ones(6))


@pytest.mark.parametrize(
    ("sigma", "message"),
    [
        (0.5, r"shape \(32,\), got \(\); for one level"),
        (np.ones(3), r"shape \(32,\), got \(3,\)"),
        (np.r_[np.ones(30), 0, -1], "got 2 others, the first is 0.0 at image 30"),
        (np.r_[np.nan, np.ones(31)], "the first is nan at image 0"),
    ],
)
def test_bad_sigma(sigma, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        denoise("nlm", particles()[1], sigma)


def test_bad_input() -> None:
    x, y, sigma = particles()
    with pytest.raises(ValueError, match="method: expected one of gaussian, bm3d, ksvd, nlm, cwf, rir, got 'median'"):
        denoise("median", y, sigma)
    with pytest.raises(ValueError, match=r"y: expected images of shape \(n, h, w\)"):
        denoise("nlm", y[0], sigma)
    broken = y.copy()
    broken[7, 0, 0] = np.nan
    with pytest.raises(ValueError, match="y: expected finite pixels, .* the first is image 7"):
        denoise("nlm", broken, sigma)
    with pytest.raises(ValueError, match="y_train: expected finite pixels"):
        denoise("gaussian", y, sigma, y_train=broken)
    for missing in ("x_train", "y_train"):
        with pytest.raises(ValueError, match="expected pairs, to choose settings on, got None"):
            denoise("gaussian", y, sigma, **{missing: None})
    with pytest.raises(ValueError, match="x_train and y_train: expected the same shape"):
        denoise("gaussian", y, sigma, x_train=x[:5])
    with pytest.raises(ValueError, match="x_train: expected 32 x 32 px, as the images to denoise, got 16 x 16"):
        denoise("gaussian", y, sigma, x_train=x[:, :16, :16], y_train=y[:, :16, :16])
    with pytest.raises(ValueError, match="n_jobs: expected an integer >= 1, got 0"):
        denoise("nlm", y, sigma, n_jobs=0)
    with pytest.raises(ValueError, match="seed: expected an integer >= 0, got -1"):
        denoise("ksvd", y, sigma, seed=-1)


@pytest.mark.parametrize("method", LIBRARY_METHODS)
def test_missing_library_says_what_to_install(method: str, monkeypatch) -> None:
    monkeypatch.setattr(classical, "find_spec", lambda module: None)
    package = {"ksvd": "dictlearn", "nlm": "scikit-image", "cwf": "aspire", "rir": "aspire"}.get(method, method)
    with pytest.raises(ModuleNotFoundError, match=f"method {method} needs the library .*: pip install {package}"):
        denoise(method, particles()[1], particles()[2])
