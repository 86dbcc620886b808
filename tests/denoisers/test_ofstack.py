"""A stack alone, or with a map: particles of a stand-in whose truth is known, without poses and without training."""

import dataclasses

import numpy as np
import pytest

from cryo_lib.denoisers import ofmap
from cryo_lib.denoisers.inspection import Inspection
from cryo_lib.denoisers.wiener import Wiener
from cryo_lib.evaluate.metrics import frc
from cryo_lib.simulate import standin
from cryo_lib.simulate.ctf import apply_ctf, ctf
from cryo_lib.simulate.noise import power_spectrum
from cryo_lib.simulate.projection import project, rescale
from cryo_lib.stacks.particles import ANGLES, DEFOCUS, ORIGINS, ParticleStack, new

BOX, PIXEL = 48, 10.0
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The map, 48 particles with their origins, the same without poses, and the truth."""
    volume, given = standin.make(48, box=BOX, pixel_size=PIXEL, resolution=24.0, snr=0.3, seed=0)
    stack = ParticleStack.open(new(tmp_path_factory.mktemp("stack") / "p.star", **given))
    bare = dataclasses.replace(stack, table=stack.table.drop(columns=[*ANGLES, *ORIGINS]))
    assert bare.poses is None and bare.ctf is not None
    return volume, stack, bare, rescale(project(volume, stack.poses.rotations, stack.poses.shifts / PIXEL))


def correlation(x, x_hat):
    return np.array([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(x, x_hat)])


def without(stack, *columns):
    return dataclasses.replace(stack, table=stack.table.drop(columns=list(columns)))


def test_the_posterior_over_a_map_finds_the_particles_without_poses_and_with_origins_in_place(made):
    volume, stack, bare, x = made
    found = {}
    for name, each, reach in (("origins", stack, 0.0), ("none", bare, 12.0)):
        denoiser = ofmap.OfMap(each, volume, PIXEL, size=36, reach=reach, device="cpu")
        assert denoiser.n <= 36 and (denoiser.screen.shifts is None) == (name == "origins")
        parts = [denoiser(each.images[rows], rows) for rows in np.array_split(np.arange(48), 3)]
        found[name] = np.concatenate(parts)
        inspected = Inspection(denoiser)
        inspected.take(slice(0, 48), found[name])
        assert inspected.broken == 0
    assert correlation(x, found["origins"]).mean() > correlation(x, found["none"]).mean() > 0.95
    assert correlation(x, found["origins"]).mean() > 0.98
    wiener = Wiener(bare)
    assert correlation(x, found["none"]).min() > correlation(x, wiener(bare.images[:])).max()


def test_junk_alone_in_a_batch_stops_nothing_and_a_stack_of_another_contrast_is_refused(made, tmp_path):
    """The grey scale is the stack's: a blob of ice in the last batch is not taken for it, 1 - y of all images is."""
    volume, stack, _, _ = made
    images, axis = stack.images[:], np.arange(BOX) - BOX // 2
    images[-1] += 4 * images.std() * np.exp(-(axis[:, None] ** 2 + axis**2) / 162)
    given = {"rotations": stack.poses.rotations, "pixel_size": PIXEL, "columns": stack.ctf.to_dict("list")}
    iced = ParticleStack.open(new(tmp_path / "iced.star", images, **given, shifts=stack.poses.shifts))
    denoiser = ofmap.OfMap(iced, volume, PIXEL, size=36, device="cpu")
    assert np.isfinite(denoiser(images[-1:], np.array([47]))).all()
    with pytest.raises(ValueError, match="y: expected images on the grey scale of the references"):
        ofmap.OfMap(iced, volume, PIXEL, size=36, device="cpu", contrast="dark")


def test_the_wiener_filter_corrects_the_ctf_beyond_its_first_zero(made):
    """There images without correction agree with the truth with the wrong sign, and corrected ones with the right."""
    _, stack, _, x = made
    ignored = without(stack, DEFOCUS[0])
    corrected, plain = (frc(x, Wiener(each)(each.images[:])).mean(axis=0) for each in (stack, ignored))
    negative = ctf(stack.ctf, BOX, PIXEL)[:, 22:24, 0].mean()  # of most particles, just below 20 A
    assert negative < -0.2 and plain[22:24].mean() < -0.05 < 0.05 < corrected[22:24].mean()
    assert corrected[2:].min() > 0
    np.testing.assert_allclose(corrected[2:12], plain[2:12], atol=0.05)


def test_where_the_envelope_leaves_nothing_the_wiener_filter_shows_no_noise(made, tmp_path):
    """Images in white noise; the B-factor leaves a thousandth of the amplitude at the Nyquist frequency."""
    _, stack, _, x = made
    parameters = stack.ctf.assign(rlnCtfBfactor=1.1e4)
    noise = np.random.default_rng(0).standard_normal(x.shape).astype(np.float32)
    given = {"rotations": stack.poses.rotations, "pixel_size": PIXEL, "columns": parameters.to_dict("list")}
    steep = ParticleStack.open(new(tmp_path / "p.star", apply_ctf(4 * x, parameters, PIXEL) + noise, **given))
    assert (steep.ctf["rlnCtfBfactor"] == 1.1e4).all()
    x_hat = Wiener(steep, contrast="bright")(steep.images[:])
    assert power_spectrum(x_hat, PIXEL)[1][-6:].max() < 0.01  # that of the noise is 1
    assert correlation(x, x_hat).mean() > 0.5 > 5 * correlation(x, steep.images[:]).mean()


def test_the_wiener_filter_is_nearer_to_the_truth_than_the_image_and_no_map_is_needed(made):
    _, stack, _, x = made
    x_hat = Wiener(stack)(stack.images[:], np.arange(48))
    assert (correlation(x, x_hat) > correlation(x, stack.images[:])).all()
    rows = np.array([5, 40, 7])
    np.testing.assert_allclose(Wiener(stack)(stack.images[rows], rows), x_hat[rows], atol=1e-4)


def test_the_grid_is_as_wide_as_what_the_map_shows_and_a_quarter_more():
    axis = np.arange(40) - 20
    ball = np.sqrt((axis**2)[:, None, None] + (axis**2)[:, None] + axis**2) < 10
    assert abs(ofmap.radius(ball.astype(np.float32)) - 10) <= 1
    assert ofmap.radius(3 * ball.astype(np.float32) + 7) == ofmap.radius(ball.astype(np.float32))


def test_beyond_the_inscribed_circle_images_are_level_and_within_they_stay():
    images = np.random.default_rng(0).standard_normal((4, 32, 32)).astype(np.float32)
    radius = np.hypot(*np.ogrid[-1:1:32j, -1:1:32j])
    cut = ofmap.in_circle(images)
    assert np.ptp(cut[:, radius > 1], axis=1).max() < 1e-6
    np.testing.assert_allclose(cut[:, radius < 0.9], images[:, radius < 0.9], atol=1e-6)
    np.testing.assert_allclose(ofmap.in_circle(images + 3), cut + 3, atol=1e-5)
