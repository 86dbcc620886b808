"""The networks are the paper's, at any width and size, and survive a trip to disk."""

import numpy as np
import pytest
import torch

from cryo_lib.networks import models


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


def shaken(model):
    """The model with random weights and biases, which an untrained one does not have."""
    for value in model.parameters():
        torch.nn.init.normal_(value, 0, 0.2)
    return model.eval()


def test_the_u_nets_result_turns_with_the_grey_scale_and_is_each_images_own():
    model, y = shaken(models.UNet(32, 3)).double(), torch.randn(3, 1, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(model(2.5 * y - 4), 2.5 * model(y) - 4)
    torch.testing.assert_close(model(y)[1:2], model(y[1:2]))
    assert torch.equal(model(torch.full_like(y, 0.3)), torch.full_like(y, 0.3))


def test_the_u_net_leaves_no_pattern_of_its_strides():
    """Far from the border a plane of one grey level stays one, which transposed convolutions break."""
    middle, plane = slice(120, 136), torch.ones(1, 1, 256, 256)
    plane[..., :2, :2] = 0  # an image that varies, far from what is looked at
    smooth, strided = shaken(models.UNet(256, 1)), shaken(models.ResNetGenerator(256, 1))
    ours, theirs = (model(plane)[..., middle, middle] for model in (smooth, strided))
    assert ours.std() < 1e-4 * ours.abs().mean() and theirs.std() > 0.01 * theirs.abs().mean()


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


@pytest.mark.parametrize(
    "build, size, message",
    [
        (models.ResNetGenerator, 100, "image_size: expected a multiple of 8, got 100; use 96 or 104"),
        (models.ResNetDiscriminator, 24, "image_size: expected an integer >= 32, got 24"),
        (models.DeepGenerator, 200, "image_size: expected a multiple of 64, got 200; use 192 or 256"),
    ],
)
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
    path = models.save(
        tmp_path / "g.safetensors",
        models.ResNetGenerator(32, 4),
        {"architecture": "resnet", "image_size": 32, "width": 8},
    )
    with pytest.raises(ValueError, match="weights and card do not fit together"):
        models.load(path)
    good = path.read_bytes()
    for content, got in (
        (good[:-9], "a damaged file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"g.safetensors: expected weights as safetensors, got {got}"):
            models.load(path)
    card = path.with_suffix(".json")
    card.write_text(card.read_text()[:-5])
    with pytest.raises(ValueError, match="g.json: expected a JSON file, got a damaged one, or one cut short .*copy it"):
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


@pytest.mark.parametrize("size, patches", [(128, 5), (64, 1), (48, 1), (32, 1)])
def test_the_convolutional_networks_keep_the_size_and_score_patches(size, patches):
    images = torch.rand(2, 1, size, size)
    x_hat = models.ConvGenerator(size, 2).double()(images.double())
    assert x_hat.shape == images.shape and x_hat.abs().max() < 1
    assert models.ConvDiscriminator(size, 2)(images).shape == (2, 1, patches, patches)


def test_the_convolutional_generator_has_four_levels_and_neither_skips_nor_residual_blocks():
    """At width 64 its widths are 64, 128, 256, 512; its bottleneck silenced, the output knows nothing of the input."""
    model = models.ConvGenerator(128)
    down = [m.out_channels for m in model.modules() if type(m) is torch.nn.Conv2d]
    up = [m.out_channels for m in model.modules() if type(m) is torch.nn.ConvTranspose2d]
    assert down == [64, 128, 256, 512] and up == [256, 128, 64, 1]
    assert {m.kernel_size for m in model.modules() if hasattr(m, "kernel_size")} == {(4, 4)}
    small, images = models.ConvGenerator(32, 2).eval(), torch.rand(1, 1, 32, 32, requires_grad=True)
    small.layers[9].weight.data.zero_()
    (gradient,) = torch.autograd.grad(small(images).sum(), images)
    assert gradient.abs().max() == 0


@pytest.mark.parametrize("architecture", models.GENERATORS)
def test_every_architecture_comes_back_from_disk_and_refuses_other_sizes(architecture, tmp_path):
    torch.manual_seed(0)
    model, critic = (kind[architecture](64, 2) for kind in (models.GENERATORS, models.DISCRIMINATORS))
    path = models.save(tmp_path / "g.safetensors", model, {"architecture": architecture, "image_size": 64, "width": 2})
    y = torch.rand(2, 64, 64)
    loaded, _ = models.load(path)
    x_hat = models.denoise_images(model, y)
    np.testing.assert_array_equal(models.denoise_images(loaded, y), x_hat)
    as_a_file_has_them = y.numpy().astype(">f4")[::-1]
    np.testing.assert_array_equal(models.denoise_images(model, as_a_file_has_them), x_hat[::-1])
    for network in (model, critic):
        with pytest.raises(
            ValueError,
            match=r"images: expected shape \(n, 1, 64, 64\), got \(2, 1, 48, 48\); this network was built for 64 px",
        ):
            network(torch.rand(2, 1, 48, 48))


def test_batch_statistics_are_those_of_each_batch_and_leave_the_model_as_it_was():
    torch.manual_seed(0)
    model, y = models.ResNetGenerator(32, 2).eval(), torch.rand(6, 32, 32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = models.denoise_images(model, y, batch_size=3, batch_statistics=True)
    assert not model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        expected = torch.cat([model.train()(part[:, None]) for part in y.split(3)])[:, 0]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)
    assert np.abs(found - models.denoise_images(model.eval(), y)).max() > 1e-3
