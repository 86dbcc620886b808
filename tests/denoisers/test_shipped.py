"""The network that ships, on particles that it has never seen: none comes out broken, and noise comes out empty."""

from pathlib import Path

import numpy as np
import pytest

from cryo_lib.denoisers import apply, inspection
from cryo_lib.networks import models
from cryo_lib.simulate import general, noise
from cryo_lib.simulate.assemblies import blob
from cryo_lib.stacks.particles import ParticleStack

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ROOT / "weights/general/unet.safetensors"
REAL = ROOT.parent / "shared/data/particles"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def network():
    return models.load(WEIGHTS)


@pytest.mark.parametrize("snr", [0.01, 0.03, 0.1, 0.5])
def test_at_no_snr_is_an_image_broken_and_each_is_nearer_to_the_truth(network, snr):
    rng = np.random.default_rng(5)
    pairs = general.particle_pairs(blob(rng), 50, 64, rng, snr=(snr, snr))
    x_hat = models.denoise_images(network[0], pairs.y)
    span = np.ptp(pairs.x, axis=(1, 2))
    assert (x_hat.min(axis=(1, 2)) > pairs.x.min(axis=(1, 2)) - 0.3 * span).all()
    error = [np.square(images - pairs.x).mean(axis=(1, 2)) for images in (x_hat, pairs.y, np.zeros_like(x_hat))]
    assert (error[0] < 0.2 * error[1]).all() and error[0].mean() < error[2].mean()


@pytest.mark.parametrize("colour", ["white", "coloured"])
def test_of_noise_alone_little_is_left(network, colour):
    rng = np.random.default_rng(6)
    y = rng.standard_normal((100, 64, 64), np.float32)
    if colour == "coloured":
        y = general.coloured(general.microscope(100, rng), 64, 4.0, rng)
        y = (y - noise.background(y)[0][:, None, None]).astype(np.float32)
    assert np.square(models.denoise_images(network[0], y)).mean() < 0.02 * np.square(y).mean()


@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data/particles")
@pytest.mark.parametrize(
    "name, contrast",
    [("empiar_10076_7.star", "dark"), ("sample_particles_relion31.star", "bright"), ("relion31.star", "bright")],
)
def test_no_real_particle_is_broken(network, name, contrast):
    stack = ParticleStack.open(REAL / name)
    denoiser = apply.fit(*network, stack, contrast=contrast)
    inspected = inspection.Inspection(denoiser)
    inspected.take(slice(0, len(stack)), denoiser(stack.images[:], slice(None)))
    assert (inspected.score < 1).all()
