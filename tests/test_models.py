"""The networks are the paper's, at any width and size, and survive a trip to disk."""

import pytest
import torch

from cryo_lib import models


def test_parameter_counts_at_the_papers_width():
    assert models.parameter_count(models.ResNetGenerator(128)) == 4_195_843
    assert models.parameter_count(models.ResNetDiscriminator(128)) == 2_803_393
    assert round(models.parameter_count(models.DeepGenerator(256)) / 1e6, 1) == 78.8
    assert round(models.parameter_count(models.DeepDiscriminator(256)) / 1e6, 1) == 20.7


@pytest.mark.parametrize("size, width", [(32, 4), (40, 3), (48, 16), (128, 2), (256, 1)])
def test_shapes_at_any_width_and_multiple_of_8(size, width):
    images = torch.rand(2, 1, size, size)
    x_hat = models.ResNetGenerator(size, width).double()(images.double())  # in single precision tanh rounds to 1
    assert x_hat.shape == images.shape and x_hat.abs().max() < 1
    patches = size // 8 - 3
    assert models.ResNetDiscriminator(size, width)(images).shape == (2, 1, patches, patches)


@pytest.mark.parametrize("size, width", [(64, 3), (128, 2), (256, 1)])
def test_the_256_px_networks_have_six_levels_and_patches_of_their_own(size, width):
    images = torch.rand(2, 1, size, size)
    model = models.DeepGenerator(size, width).double()
    x_hat = model(images.double())
    assert x_hat.shape == images.shape and x_hat.abs().max() < 1 and len(model.down) == 6 and len(model.up) == 5
    patches = size // 8 - 6
    assert models.DeepDiscriminator(size, width)(images).shape == (2, 1, patches, patches)


def test_the_256_px_generator_adds_the_encoders_maps_at_every_level():
    """With everything below a level silenced, the output still depends on the input through that level's skip."""
    images = torch.rand(2, 1, 64, 64, requires_grad=True)
    for silenced in range(5):
        model = models.DeepGenerator(64, 2).eval()
        model.up[silenced].resample.weight.data.zero_()
        (gradient,) = torch.autograd.grad(model(images).square().sum(), images)
        assert gradient.abs().max() > 0, silenced


def test_a_same_convolution_keeps_the_size_and_is_centred():
    conv = models.SameConv(1, 1)
    conv.bias.data.zero_()
    conv.weight.data.copy_(torch.arange(16.0).view(1, 1, 4, 4))
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 4, 4] = 1
    out = conv(image)[0, 0]
    assert out.shape == (8, 8) and torch.equal(out[2:6, 2:6], conv.weight.data[0, 0].flip(0, 1))


def test_128_px_has_13_by_13_patch_scores():
    assert models.ResNetDiscriminator(128, 1)(torch.rand(1, 1, 128, 128)).shape[2:] == (13, 13)


def test_skips_carry_the_encoder_to_the_decoder():
    """With the bottleneck silenced, the output still depends on the input: through the skips."""
    model = models.ResNetGenerator(32, 4).eval()
    model.up[0].resample.weight.data.zero_()
    images = torch.rand(1, 1, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(images).square().sum(), images)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("build, size, message", [
    (models.ResNetGenerator, 100, "image_size: expected a multiple of 8, got 100; use 96 or 104"),
    (models.ResNetDiscriminator, 24, "image_size: expected an integer >= 32, got 24"),
    (models.DeepGenerator, 200, "image_size: expected a multiple of 64, got 200; use 192 or 256"),
])
def test_impossible_sizes_are_refused(build, size, message):
    with pytest.raises(ValueError, match=message):
        build(size)


@pytest.mark.parametrize("build", [models.ResNetGenerator, models.ResNetDiscriminator])
def test_images_of_another_size_are_refused(build):
    with pytest.raises(ValueError, match=r"expected shape \(n, 1, 32, 32\), got \(2, 1, 40, 40\)"):
        build(32, 2)(torch.rand(2, 1, 40, 40))


@pytest.mark.parametrize("architecture, size", [("resnet", 32), ("resnet256", 64)])
def test_a_checkpoint_comes_back_whole(architecture, size, tmp_path):
    model = models.GENERATORS[architecture](size, 4).eval()
    card = {"architecture": architecture, "image_size": size, "width": 4, "note": "kept"}
    path = models.save(tmp_path / "g.safetensors", model, card)
    loaded, read = models.load(path)
    images = torch.rand(3, 1, size, size)
    assert read == card and torch.equal(loaded(images), model(images)) and not loaded.training


def test_bad_checkpoints_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="checkpoint: expected .*g.safetensors, found nothing"):
        models.load(tmp_path / "g.safetensors")
    path = models.save(tmp_path / "g.safetensors", models.ResNetGenerator(32, 4), {"architecture": "resnet", "image_size": 32, "width": 8})
    with pytest.raises(ValueError, match="weights and card do not fit together"):
        models.load(path)
    models.save(path, models.ResNetGenerator(32, 4), {"architecture": "resnet", "width": 4})
    with pytest.raises(ValueError, match="its card has no 'image_size'"):
        models.load(path)


def test_an_unusable_device_is_refused():
    with pytest.raises((RuntimeError, AssertionError)):
        models.pick_device("cuda:99")


def test_a_gpu_that_torch_cannot_use_is_said_loudly(monkeypatch, tmp_path):
    """With an nvidia-smi that lists a GPU and a torch that sees none, the CPU is used and a warning says so."""
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'GPU 0: imaginary'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.warns(UserWarning, match="nvidia-smi lists a GPU but torch .* cannot use it, so the CPU is used"):
        assert models.pick_device().type == "cpu"
