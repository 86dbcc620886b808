"""A stack on disk goes through a network in batches, and RELION opens what comes out."""

import shutil
import subprocess

import numpy as np
import pytest
import torch

from cryo_lib import denoising, imaging, models, particles


@pytest.fixture
def stack(tmp_path):
    y = np.random.default_rng(0).normal(0.2, 1, (7, 32, 32)).astype(np.float32)
    path = particles.new(tmp_path / "noisy.star", y, imaging.random_rotations(7, 0), 6.4)
    return path, y


def network():
    torch.manual_seed(0)
    return models.ResNetGenerator(32, 4).eval()


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_stack_is_the_networks_output_whatever_the_batch(stack, batch_size, tmp_path):
    path, y = stack
    model = network()
    written = denoising.denoise_stack(model, path, tmp_path / "denoised.star", batch_size=batch_size)
    with torch.no_grad():
        expected = model(torch.as_tensor(y)[:, None])[:, 0].numpy()
    np.testing.assert_allclose(particles.ParticleStack.open(written).images[:], expected, atol=1e-6)


def test_rows_and_columns_are_kept_and_only_the_reference_changes(stack, tmp_path):
    before = particles.ParticleStack.open(stack[0]).table
    after = particles.ParticleStack.open(denoising.denoise_stack(network(), stack[0], tmp_path / "d.star")).table
    assert list(before) == list(after)
    assert before.drop(columns="rlnImageName").equals(after.drop(columns="rlnImageName"))
    assert after["rlnImageName"].str.contains("d.mrcs").all()


def test_any_function_of_images_is_a_denoiser(stack, tmp_path):
    written = denoising.denoise_stack(lambda y: 2 * y, stack[0], tmp_path / "d.star", batch_size=2)
    np.testing.assert_allclose(particles.ParticleStack.open(written).images[:], 2 * stack[1])


def test_a_network_in_training_mode_is_used_in_eval_mode_and_left_as_it_was(stack):
    model = network().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first = models.denoise_images(model, stack[1])
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    np.testing.assert_array_equal(first, models.denoise_images(model.eval(), stack[1]))


def test_a_stack_of_another_box_is_refused(stack, tmp_path):
    with pytest.raises(ValueError, match="particles: this network denoises 40 x 40 px images, got 32 x 32"):
        denoising.denoise_stack(models.ResNetGenerator(40, 2), stack[0], tmp_path / "d.star")
    assert not (tmp_path / "d.star").exists() and not (tmp_path / "d.mrcs").exists()


def test_each_half_set_goes_through_its_own_network(stack, tmp_path):
    path, y = stack
    written = denoising.denoise_stack({1: lambda y: y + 1, 2: lambda y: 2 * y}, path, tmp_path / "d.star", batch_size=3)
    half_sets = particles.ParticleStack.open(path).half_sets
    expected = np.where(half_sets[:, None, None] == 1, y + 1, 2 * y)
    np.testing.assert_array_equal(particles.ParticleStack.open(written).images[:], expected)


def test_half_sets_without_a_network_are_named(stack, tmp_path):
    with pytest.raises(ValueError, match=r"expected the half-sets \[1\], one a model, got \[1, 2\]"):
        denoising.denoise_stack({1: network()}, stack[0], tmp_path / "d.star")
    with pytest.raises(ValueError, match=r"expected the half-sets \[1, 2\], one a model, got no rlnRandomSubset"):
        denoising.denoise_stack({1: network(), 2: network()}, stack[0].with_suffix(".mrcs"), tmp_path / "d.mrcs")
    with pytest.raises(ValueError, match="this network denoises 40 x 40 px images, got 32 x 32"):
        denoising.denoise_stack({1: network(), 2: models.ResNetGenerator(40, 4)}, stack[0], tmp_path / "d.star")


@pytest.mark.skipif(shutil.which("relion_reconstruct") is None, reason="RELION is not installed (Debian package `relion`)")
def test_relion_reconstructs_from_the_denoised_stack(stack, tmp_path):
    denoising.denoise_stack(network(), stack[0], tmp_path / "denoised.star")
    stats = subprocess.run(["relion_image_handler", "--i", "denoised.star", "--stats"], cwd=tmp_path, capture_output=True, text=True)
    assert stats.returncode == 0 and "(x,y,z,n)=32x32x1x1" in stats.stdout.replace(" ", ""), stats.stdout + stats.stderr
    command = ["relion_reconstruct", "--i", "denoised.star", "--o", "map.mrc"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    import mrcfile

    volume = mrcfile.read(tmp_path / "map.mrc")
    assert volume.shape == (32, 32, 32) and np.isfinite(volume).all() and volume.std() > 0
