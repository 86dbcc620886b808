"""Topaz-Denoise's network comes from its own folder, and says where it is missing."""

from pathlib import Path

import numpy as np
import pytest

from cryo_lib.denoisers import topaz

FOLDER = Path(__file__).resolve().parents[2] / topaz.FOLDER


def test_where_it_is_not_installed_it_says_how(tmp_path):
    assert not topaz.installed(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected topaz-em .*, found none; install it: make topaz"):
        topaz.load(tmp_path)


@pytest.mark.skipif(not topaz.installed(FOLDER), reason="Topaz-Denoise is not installed: make topaz")
def test_it_lessens_noise_whatever_the_grey_scale():
    grid = np.hypot(*np.ogrid[-1:1:64j, -1:1:64j])
    x = np.repeat((grid < 0.5)[None].astype(np.float32), 4, axis=0)
    y = x + np.random.default_rng(0).standard_normal(x.shape, np.float32)
    denoise = topaz.load(FOLDER).denoise
    assert np.square(denoise(y) - x).mean() < 0.2 * np.square(y - x).mean()
    np.testing.assert_allclose(denoise(5 + 3 * y), 5 + 3 * denoise(y), atol=1e-3)
