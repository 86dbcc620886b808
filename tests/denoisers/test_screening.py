"""Particles of a stand-in score above images of its noise alone; the numbers go to where RELION selects by them."""

import shutil
import subprocess

import numpy as np
import pytest

from cryo_lib.denoisers import apply, screening
from cryo_lib.simulate import standin
from cryo_lib.simulate.noise import standardise
from cryo_lib.stacks.pairs import Pairs
from cryo_lib.stacks.particles import DEFOCUS, ParticleStack, new

BOX, PIXEL = 32, 15.0
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def screened(tmp_path_factory):
    """Particles, every other one replaced by the noise of its own CTF; which show it; the screen of their map."""
    volume, made = standin.make(80, box=BOX, pixel_size=PIXEL, resolution=36.0, snr=0.3, seed=0)
    images = np.concatenate([*made.pop("images")])
    path = new(tmp_path_factory.mktemp("stack") / "p.star", images, **made)
    shows = np.arange(80) % 2 == 0
    noise = standin.noise(ParticleStack.open(path).ctf[~shows], BOX, PIXEL, np.random.default_rng(1))
    images[~shows] = standardise(noise, PIXEL, BOX, PIXEL)
    stack = ParticleStack.open(new(path, images, **made))
    screen = screening.Screen(stack, volume, PIXEL, n_directions=200)
    return stack, volume, shows, screen, screen.evidence(np.arange(80))


def test_particles_have_evidence_and_their_noise_alone_has_none(screened):
    _, _, shows, _, evidence = screened
    assert evidence[shows].min() > 0 > np.quantile(evidence[~shows], 0.95)
    assert evidence[shows].min() > evidence[~shows].max()


def test_the_contrast_is_that_of_known_poses_though_half_the_images_show_nothing(screened):
    stack, volume, shows, screen, _ = screened
    known = Pairs(stack, volume, PIXEL, screen.n, screen.pixel_size).agreement(np.flatnonzero(shows))
    assert screen.gain == pytest.approx(known.gain, rel=0.25)


def test_shifts_are_undone_and_a_finer_larger_box_is_brought_to_the_maps(screened, tmp_path, monkeypatch):
    """In chunks; without their shifts nearly all particles have less evidence."""
    monkeypatch.setattr(screening, "CHUNK", 30)
    stack, volume, shows, _, evidence = screened
    y = standardise(stack.images[:], PIXEL, 3 * BOX, PIXEL / 2)
    poses, columns = stack.poses, {label: stack.ctf[label] for label in DEFOCUS}
    given = {"spherical_aberration": standin.SPHERICAL_ABERRATION, "columns": columns}
    moved, unmoved = (
        ParticleStack.open(new(tmp_path / f"{i}.star", y, poses.rotations, PIXEL / 2, shifts=shifts, **given))
        for i, shifts in enumerate((poses.shifts, None))
    )
    found, without = (screening.evidence(each, volume, PIXEL, n_directions=200)[shows] for each in (moved, unmoved))
    assert np.median(found) == pytest.approx(np.median(evidence[shows]), rel=0.25)
    assert np.mean(without < found) > 0.8


def test_a_map_is_what_its_inscribed_sphere_holds_whatever_the_level_around_it():
    rng = np.random.default_rng(0)
    volume = rng.standard_normal((32, 32, 32)).astype(np.float32)
    axis = np.linspace(-1, 1, 32)
    radius = np.sqrt((axis**2)[:, None, None] + (axis**2)[:, None] + axis**2)
    cut = screening.in_sphere(volume)
    assert not cut[radius > 1].any()
    inside = radius < 0.9
    np.testing.assert_allclose(cut[inside], volume[inside] - volume[radius > 1].mean(), atol=1e-5)
    np.testing.assert_allclose(screening.in_sphere(volume + 7), cut, atol=1e-4)


def test_the_spectrum_of_white_noise_is_flat_and_of_coloured_noise_its_own():
    white = np.random.default_rng(0).standard_normal((400, 48, 48)).astype(np.float32)
    np.testing.assert_allclose(screening.background_spectrum(white), 1, atol=0.15)
    smooth = np.fft.irfft2(np.fft.rfft2(white) * np.exp(-8 * np.fft.rfftfreq(48) ** 2), s=(48, 48))
    rings = screening.background_spectrum(smooth.astype(np.float32))
    assert rings[2:6].mean() > 1.2 * rings[18:].mean()


@pytest.mark.skipif(not shutil.which("relion_star_handler"), reason="needs Debian's package relion")
def test_relion_selects_particles_by_the_column(screened, tmp_path):
    stack, *_, evidence = screened
    apply.denoise_stack(lambda y: y, stack, tmp_path / "d.star", columns={screening.LABEL: evidence})
    command = f"relion_star_handler --i d.star --o kept.star --select {screening.LABEL} --minval 0"
    done = subprocess.run(command.split(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    kept = ParticleStack.open(tmp_path / "kept.star").table
    assert len(kept) == np.count_nonzero(evidence >= 0)
    np.testing.assert_allclose(kept[screening.LABEL], evidence[evidence >= 0], atol=1e-5)
