"""Pairs of many particles: their SNR, grey scale, spectra and kinds are those that are claimed."""

import numpy as np
import pytest
import scipy.fft

from cryo_lib.simulate import assemblies, general
from cryo_lib.simulate.ctf import ctf
from cryo_lib.simulate.library import Points
from cryo_lib.simulate.noise import background

BOX = 32


@pytest.fixture(scope="module")
def particle():
    return assemblies.blob(np.random.default_rng(4))


@pytest.fixture(scope="module")
def part():
    rng = np.random.default_rng(0)
    return Points("part", rng.uniform(-1, 1, (300, 3)) * (18, 12, 12), np.full(300, 54.0))


def test_the_snr_is_the_ratio_of_variances(particle):
    for snr in (0.02, 0.5):
        pairs = general.particle_pairs(particle, 200, BOX, np.random.default_rng(1), snr=(snr, snr))
        ratio = pairs.signal.var(axis=(1, 2)) / (pairs.y - pairs.signal).var(axis=(1, 2))
        assert np.median(ratio) == pytest.approx(snr, rel=0.1)
        np.testing.assert_allclose(pairs.table["snr"], snr)


def test_backgrounds_have_mean_0_and_sd_1_and_the_reference_the_images_grey_scale(particle):
    pairs = general.particle_pairs(particle, 60, BOX, np.random.default_rng(2), neighbours=0.3)
    mean, sd = background(pairs.y)
    np.testing.assert_allclose(mean, 0, atol=1e-4)
    np.testing.assert_allclose(sd, 1, atol=1e-4)
    np.testing.assert_allclose(background(pairs.x)[0], 0, atol=1e-4)
    product = np.einsum("mij,mij->m", pairs.x, pairs.signal - pairs.x)  # least squares: the rest is orthogonal
    np.testing.assert_allclose(product / np.square(pairs.signal).sum(axis=(1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(pairs.table["pixel_size"] * BOX * 0.75 >= particle.diameter - 1e-6, True)


def test_phases_are_those_of_the_projection(particle):
    """After the flip every frequency at which the lens passes something has the sign of the reference there."""
    pairs = general.particle_pairs(particle, 40, BOX, np.random.default_rng(3), snr=(1.0, 1.0))
    transfer = ctf(pairs.table, BOX, pairs.table["pixel_size"][0])
    a, b = (scipy.fft.rfft2(images) for images in (pairs.x, pairs.signal))
    strong = (np.abs(transfer) > 0.4) & (np.abs(a) > np.quantile(np.abs(a), 0.8))
    strong[:, 0, 0] = False
    agreement = (a * b.conj()).real[strong] / (np.abs(a) * np.abs(b))[strong]
    assert np.median(agreement) > 0.95 and (agreement > 0).mean() > 0.97


def test_noise_alone_has_no_reference(particle):
    pairs = general.particle_pairs(particle, 400, BOX, np.random.default_rng(5), empty=0.25)
    empty = (pairs.table["kind"] == "noise").to_numpy()
    assert 0.15 < empty.mean() < 0.35
    assert not pairs.x[empty].any() and not pairs.signal[empty].any() and (pairs.table["snr"][empty] == 0).all()
    assert pairs.x[~empty].any(axis=(1, 2)).all() and pairs.y.std(axis=(1, 2)).min() > 0.3


def test_neighbours_add_density_beside_the_particle(particle):
    alone, beside = (
        general.particle_pairs(particle, 60, BOX, np.random.default_rng(6), fraction=0.5, snr=(1, 1), neighbours=share)
        for share in (0.0, 1.0)
    )
    ring = np.hypot(*np.mgrid[-16:16, -16:16]) > 14
    level = [np.abs(pairs.x[:, ring]).max(axis=1) / np.abs(pairs.x).max(axis=(1, 2)) for pairs in (alone, beside)]
    assert np.median(level[0]) < 0.1 and np.mean(level[1] > 0.2) > 0.5


def test_filaments_cross_the_box(part):
    pairs = general.filament_pairs(part, 40, 64, np.random.default_rng(7))
    bright = pairs.x > 0.3 * pairs.x.max(axis=(1, 2), keepdims=True)
    edges = [bright[:, 0], bright[:, -1], bright[:, :, 0], bright[:, :, -1]]
    reached = np.sum([edge.any(axis=1) for edge in edges], axis=0)
    assert (pairs.table["kind"] == "filament").all() and np.mean(reached >= 2) > 0.75


def test_coloured_noise_has_variance_1_whatever_its_spectrum(particle):
    parameters = general.microscope(300, np.random.default_rng(0))
    for seed in range(6):
        images = general.coloured(parameters, BOX, 4.0, np.random.default_rng(seed))
        assert images.dtype == np.float32 and np.square(images).mean() == pytest.approx(1, abs=0.05)
    spectra = [
        np.abs(np.fft.fft2(general.coloured(parameters, BOX, 4.0, np.random.default_rng(seed)))[:, 1, 1]).mean()
        for seed in range(12)
    ]
    assert max(spectra) > 1.3 * min(spectra)


def test_drawn_pairs_come_again_with_their_seed_and_only_with_it(part):
    first, again, other = (general.drawn_pairs([part], BOX, np.random.default_rng((0, seed))) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.y, again.y)
    np.testing.assert_array_equal(first.x, again.x)
    assert first.table.equals(again.table) and not np.array_equal(first.y, other.y)
    assert first.x.shape == first.y.shape == (general.BATCH, BOX, BOX) and first.y.dtype == first.x.dtype == np.float32
    large = part._replace(xyz=part.xyz * 5)
    with pytest.raises(ValueError, match="expected some of less than 80 A, got none"):
        general.drawn_pairs([large], BOX, np.random.default_rng(0))
