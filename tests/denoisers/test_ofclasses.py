"""A stack alone: its class averages denoise it, whatever its grey scale, with its CTF where it has one."""

import dataclasses

import numpy as np
import pytest

from cryo_lib.denoisers import ofclasses
from cryo_lib.denoisers.inspection import Inspection
from cryo_lib.denoisers.ofclasses import OfClasses
from cryo_lib.denoisers.wiener import Wiener
from cryo_lib.simulate import projection, standin
from cryo_lib.simulate.ctf import CTF_LABELS, apply_ctf, ctf
from cryo_lib.simulate.noise import standardise
from cryo_lib.stacks.particles import ANGLES, ORIGINS, ParticleStack, new
from tests.denoisers.test_ofstack import correlation, without
from tests.denoisers.test_posterior import turned

BOX, PIXEL, VIEWS, N = 40, 10.0, 4, 80
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A stack of a few views of the ribosome, turned, with origins, a CTF and coloured noise, and the truth."""
    volume, _ = standin.make(1, box=BOX, pixel_size=PIXEL, resolution=24.0, snr=1.0, seed=0)
    rng, views = np.random.default_rng(0), projection.random_rotations(VIEWS, 0)
    rotations = np.stack([turned(views[k % VIEWS], rng.uniform(0, 360)) for k in range(N)])
    shifts, parameters = rng.normal(0, 8, (N, 2)), standin.microscope(N, 0)
    x = projection.project(volume, rotations, shifts / PIXEL)
    signal = apply_ctf(x, parameters, PIXEL)
    y = signal + np.sqrt(signal.var() / 0.1) * standin.noise(parameters, BOX, PIXEL, rng)
    given = {"rotations": rotations, "pixel_size": PIXEL, "shifts": shifts}
    given |= {"columns": {label: parameters[label] for label in CTF_LABELS[:4]}, "voltage": standin.VOLTAGE}
    given |= {"spherical_aberration": standin.SPHERICAL_ABERRATION, "amplitude_contrast": standin.AMPLITUDE_CONTRAST}
    path = new(tmp_path_factory.mktemp("stack") / "p.star", standardise(y, PIXEL, BOX, PIXEL), **given)
    stack = ParticleStack.open(path)
    assert stack.ctf is not None and stack.poses is not None
    return stack, projection.rescale(x)


@pytest.fixture(scope="module")
def denoiser(made):
    return OfClasses(made[0], size=32, device="cpu")


def with_images(stack, images):
    return dataclasses.replace(stack, images=np.ascontiguousarray(images, np.float32))


def test_class_averages_are_nearer_to_the_truth_than_the_low_pass_with_and_without_origins(made, denoiser):
    stack, x = made
    bare = without(stack, *ANGLES, *ORIGINS)
    lowpass = correlation(x, Wiener(stack)(stack.images[:]))
    centred, found = (correlation(x, each(stack.images[:])) for each in (denoiser, OfClasses(bare, device="cpu")))
    assert (centred > lowpass).mean() > 0.95 and centred.mean() > lowpass.mean() + 0.05
    assert centred.mean() > found.mean() > lowpass.mean()


def test_phases_are_flipped_where_there_is_a_ctf_and_the_facts_say_it(made, denoiser):
    stack, _ = made
    plain = OfClasses(without(stack, "rlnDefocusU"), size=32, device="cpu")
    rows, y = np.arange(9, 12), denoiser.seen(stack.images[9:12])
    ratio = np.fft.rfft2(denoiser.question(y, rows)) / np.fft.rfft2(plain.question(y, rows))
    sign = np.sign(ctf(stack.ctf.iloc[rows], 32, denoiser.pixel_size))
    inside = np.s_[:, 1:16, 1:16]  # at Nyquist a real image has no sign
    np.testing.assert_allclose(ratio[inside], sign[inside], atol=2e-3)
    assert (sign[inside] < 0).any()
    assert (denoiser.facts["phases"], plain.facts["phases"]) == ("flipped by the CTF", "as they are: no CTF")
    np.testing.assert_array_equal(plain.passed, 1)


def test_the_noise_is_white_and_of_sd_1_to_the_classes(made, denoiser):
    question = denoiser.question(denoiser.seen(made[0].images[:]), np.arange(N))
    n = denoiser.n
    outside = np.hypot(*np.ogrid[-1 : 1 : n * 1j, -1 : 1 : n * 1j]) > 1
    assert question[:, outside].std() == pytest.approx(1, abs=0.1)


def test_box_and_scale_are_the_stacks_and_its_grey_levels_do_not_matter(made, denoiser):
    stack, x = made
    x_hat = denoiser(stack.images[:])
    assert x_hat.shape == stack.images.shape and x_hat.dtype == np.float32
    other = with_images(stack, 5 * stack.images[:] + 30)
    np.testing.assert_allclose(OfClasses(other, size=32, device="cpu")(other.images), x_hat, atol=5e-3)
    rows = np.array([5, 70, 7])
    np.testing.assert_allclose(denoiser(stack.images[rows], rows), x_hat[rows], atol=1e-4)
    inspected = Inspection(denoiser)
    inspected.take(slice(0, N), x_hat)
    assert inspected.broken == 0


def test_images_of_noise_alone_come_out_flat(made, denoiser):
    stack, _ = made
    rng = np.random.default_rng(9)
    junk = standin.noise(standin.microscope(20, 1), BOX, PIXEL, rng)
    flat, particles = (denoiser(images, np.arange(20)) for images in (junk, stack.images[:20]))
    assert flat.std() < 0.1 * particles.std()


def test_the_seed_says_all(made, denoiser):
    y = made[0].images[:8]
    again, other = (OfClasses(made[0], size=32, device="cpu", seed=seed)(y, np.arange(8)) for seed in (0, 1))
    np.testing.assert_array_equal(again, denoiser(y, np.arange(8)))
    assert np.abs(other - again).max() > 1e-3


def test_classes_follow_the_number_of_images_and_are_learnt_from_so_many_at_most(made, denoiser, monkeypatch):
    assert denoiser.facts["classes"] == N // ofclasses.EACH and denoiser.facts["images they are learnt from"] == N
    monkeypatch.setattr(ofclasses, "LEARNT", 60)
    few = OfClasses(made[0], size=32, device="cpu")
    assert (len(few.rows), few.facts["classes"]) == (60, 6) and len(set(few.rows)) == 60


def test_stacks_that_have_no_classes_are_named(made):
    stack, _ = made
    for n in (1, ofclasses.LEAST - 1):
        few = dataclasses.replace(stack, table=stack.table.iloc[:n], images=stack.images[:n])
        with pytest.raises(
            ValueError, match=f"p.star: expected {ofclasses.LEAST} images .* got {n}; take method lowpass"
        ):
            OfClasses(few, device="cpu")
    with pytest.raises(ValueError, match="size: expected"):
        OfClasses(stack, size=8, device="cpu")
