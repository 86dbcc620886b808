"""A checkerboard is found whatever its grey scale, and particles and filaments are not taken for one."""

import numpy as np
import pytest
import scipy.fft

from cryo_lib.denoisers import inspection
from cryo_lib.denoisers.inspection import CHECKED, Inspection, checkerboard
from cryo_lib.denoisers.ofstack import OfStack
from cryo_lib.simulate.projection import project, random_rotations, rescale
from cryo_lib.stacks.particles import ParticleStack, new
from tests.simulate.blobs import Blobs

N = 64


@pytest.fixture(scope="module")
def particles():
    return rescale(project(Blobs(N, reach=18).volume(), random_rotations(40, 0)))


def pattern(stride, side=16, n=N):
    """A patch of alternate signs in the middle, that repeats after `stride` pixels."""
    y, x = np.mgrid[:n, :n]
    signs = np.where((y // (stride // 2) + x // (stride // 2)) % 2, 1.0, -1.0)
    inside = (abs(y - n // 2) < side // 2) & (abs(x - n // 2) < side // 2)
    return (signs * inside).astype(np.float32)


def filaments(n=N):
    """Straight ones at every fourth degree, of many widths, smooth or with subunits that repeat at the very strides."""
    y, x = np.mgrid[:n, :n] - n // 2
    found = []
    for angle in np.deg2rad(np.arange(0, 180, 4)):
        across, along = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
        for width in (2.0, 4.0, 8.0):
            for repeat in (np.inf, 4.0, 5.3, 8.0, 16.0):
                found.append(np.exp(-((across / width) ** 2) / 2) * (1 + 0.3 * np.cos(2 * np.pi * along / repeat)))
    return np.array(found, np.float32)


@pytest.mark.parametrize("stride", [2, 4, 8])
@pytest.mark.parametrize("n", [40, 64, 90])
def test_a_checkerboard_is_found_at_each_stride_and_on_any_grey_scale(stride, n):
    particles = rescale(project(Blobs(n, reach=0.28 * n).volume(), random_rotations(10, 0)))
    broken = particles + pattern(stride, 32, n)
    assert checkerboard(broken).min() > CHECKED > 10 * checkerboard(particles).max()
    np.testing.assert_allclose(checkerboard(1000 - 7 * broken), checkerboard(broken), rtol=1e-2)


def test_a_small_saturated_patch_as_networks_draw_it_is_found(particles):
    """Dots two pixels apart in a patch of 8 px, from the least to the greatest value."""
    dots = np.zeros((N, N), np.float32)
    dots[36:44, 28:36], dots[36:44:2, 28:36:2] = 1, -1
    assert checkerboard(np.where(dots, dots, particles)).min() > CHECKED


def test_particles_filaments_noise_and_blobs_have_none(particles):
    rng = np.random.default_rng(0)
    white = rng.standard_normal((100, N, N)).astype(np.float32)
    k = np.hypot(scipy.fft.fftfreq(N)[:, None], scipy.fft.rfftfreq(N))
    smooth = scipy.fft.irfft2(scipy.fft.rfft2(white) * np.exp(-40 * k**2), s=(N, N))
    y, x = np.mgrid[:N, :N] - N // 2
    blobs = [np.exp(-(np.hypot(y, x) ** 2) / (2 * width**2)) for width in (0.7, 1.5, 3.0, 6.0, 12.0)]
    discs = [(np.hypot(y, x) < radius).astype(float) for radius in (2, 5, 11, 20, 28)]
    for images in (particles, white, smooth, np.array(blobs + discs, np.float32), filaments()):
        assert checkerboard(images).max() < CHECKED


class Given(OfStack):
    """Gives what it was given."""

    def __init__(self, stack, x_hat):
        super().__init__(stack, N, stack.pixel_size, "bright")
        self.x_hat = x_hat

    def denoise(self, y, rows):
        return self.x_hat[rows]


@pytest.fixture(scope="module")
def inspected(tmp_path_factory, particles):
    """Good images, but for a checkerboard, one far below 0, one far above 1, and one of another particle."""
    noise = 0.3 * np.random.default_rng(1).standard_normal(particles.shape, np.float32)
    stack = ParticleStack.open(
        new(tmp_path_factory.mktemp("s") / "p.star", particles + noise, random_rotations(40, 0), 5.0)
    )
    x_hat = particles.copy()
    x_hat[0] = 0.5 + 0.2 * (x_hat[0] + 1.5 * pattern(2))
    x_hat[1, 32, 32] = -0.5
    x_hat[2] *= 1.5
    x_hat[3] = np.random.default_rng(2).random((N, N))
    return Given(stack, x_hat)


def test_what_is_broken_is_named_and_nothing_else(inspected):
    found = Inspection(inspected)
    found.take(slice(0, 40), inspected.x_hat)
    table = found.table
    assert list(table["why"][:4]) == ["checkerboard", "range", "range", "correlation"]
    assert (table["why"][4:] == "").all() and (table["score"][4:] < 1).all() and (table["score"][:4] > 1).all()
    np.testing.assert_allclose(table["minimum"], inspected.x_hat.min(axis=(1, 2)), atol=1e-6)
    said = found.said()
    assert said.startswith("4 of 40 denoised images are broken (10.0%): 2 have grey levels that no clean image has")
    assert "1 have a checkerboard" in said and "1 have no likeness" in said


def test_no_number_depends_on_the_batches(inspected):
    whole, parts = Inspection(inspected), Inspection(inspected)
    whole.take(slice(0, 40), inspected.x_hat)
    for start in range(0, 40, 7):
        parts.take(slice(start, min(start + 7, 40)), inspected.x_hat[start : start + 7])
    np.testing.assert_allclose(parts.table.drop(columns="why"), whole.table.drop(columns="why"), atol=1e-5)


def test_a_pattern_that_the_input_has_is_none_of_the_denoisers(tmp_path, particles):
    seen = particles + pattern(2)
    stack = ParticleStack.open(new(tmp_path / "p.star", seen, random_rotations(40, 0), 5.0))
    found = Inspection(Given(stack, 0.5 * seen + 0.5))
    found.take(slice(0, 40), found.denoiser.x_hat)
    assert np.all(found.measured["checkerboard"] < 0.01)


def test_chance_is_the_correlation_of_images_that_have_nothing_in_common():
    y, x_hat = np.random.default_rng(0).standard_normal((2, 2000, N, N)).astype(np.float32)
    correlation, chance = inspection.likeness(y, x_hat, 5.0), inspection.chance(N, 5.0)
    assert np.mean(correlation > chance) < 0.005 < np.mean(correlation > chance / 2)
    again = inspection.likeness(3 * y + 1, 2 - 5 * x_hat, 5.0)
    np.testing.assert_allclose(again, -correlation, atol=1e-4)


def test_without_a_grey_scale_of_clean_images_no_range_is_asked(inspected):
    free = Given(inspected.stack, inspected.x_hat)
    free.grey = None
    found = Inspection(free)
    found.take(slice(0, 40), 100 * inspected.x_hat)
    assert list(found.table["why"][:4]) == ["checkerboard", "", "", "correlation"]
