"""A shipped network is the one that was trained, but for the rounding to 16 bits."""

import pytest
import torch

from cryo_lib.networks import models, shipping


def test_a_network_at_16_bit_is_the_same_but_for_rounding():
    model = models.UNet(32, 4)
    half, size = shipping.at_16_bit(model, 1.0)
    assert size == pytest.approx(2 * models.parameter_count(model) / 1e6, rel=0.1)
    y = torch.randn(3, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(half.float()(y), model(y), rtol=0.02, atol=0.02)
    assert next(model.parameters()).dtype == torch.float32


def test_what_16_bits_cannot_hold_and_a_file_that_is_too_large_are_named():
    model = models.UNet(32, 4)
    with pytest.raises(ValueError, match="expected a file of at most 0.01 MB, since it lies in git, got .* MB"):
        shipping.at_16_bit(model, 0.01)
    model.first.weight.data[0, 0, 0, 0] = 1e6
    with pytest.raises(
        ValueError, match="expected values that 16 bits hold to one part in 2048, got 1 of .* first.weight"
    ):
        shipping.at_16_bit(model, 1.0)
