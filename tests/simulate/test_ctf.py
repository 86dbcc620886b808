"""The CTF against its formula and RELION's own."""

from __future__ import annotations

import shutil
import subprocess

import mrcfile
import numpy as np
import pandas as pd
import pytest
import scipy.fft

from cryo_lib.simulate import ctf, projection
from cryo_lib.stacks import mrc, particles

needs_relion = pytest.mark.skipif(shutil.which("relion_project") is None, reason="relion_project is not on the PATH")


def microscope(m: int, seed: int = 0) -> pd.DataFrame:
    """CTF parameters of `m` images like EMPIAR-10028's, some with phase shift, B factor, scale, by RELION's labels."""
    rng = np.random.default_rng(seed)
    u, extra = rng.uniform(8000, 39000, m), np.arange(m) % 2
    defocus = {"rlnDefocusU": u, "rlnDefocusV": u - rng.uniform(0, 2000, m), "rlnDefocusAngle": rng.uniform(-90, 90, m)}
    optics = {"rlnVoltage": 300.0, "rlnSphericalAberration": 2.0, "rlnAmplitudeContrast": 0.1}
    rest = {"rlnPhaseShift": 60.0 * extra, "rlnCtfBfactor": 40.0 * extra, "rlnCtfScalefactor": 1.0 - 0.2 * extra}
    return pd.DataFrame(defocus | optics | rest)


def test_ctf_zeros_lie_where_the_formula_puts_them():
    """Without astigmatism, aberration and amplitude contrast: sin(pi lambda z k^2), lambda 0.0197 A at 300 kV."""
    plain = microscope(1).assign(rlnDefocusU=15000.0, rlnDefocusV=15000.0)
    (curve,) = ctf.ctf(plain.assign(rlnSphericalAberration=0.0, rlnAmplitudeContrast=0.0), 256, 1.0)
    k = np.arange(129) / 256
    np.testing.assert_allclose(curve[0], np.sin(np.pi * 0.0196875 * 15000 * k**2), atol=2e-3)
    assert (ctf.ctf(microscope(8), 64, 2.0)[:, 0, 0] > 0).all()  # bright protein stays bright


def test_astigmatism_is_along_its_angle():
    """Along the angle of rlnDefocusU the defocus is U, across it V."""
    tilted = microscope(1).assign(rlnDefocusU=20000.0, rlnDefocusV=10000.0, rlnDefocusAngle=90.0)
    (curve,) = ctf.ctf(tilted, 128, 2.0)
    for along, defocus in ((curve[:65, 0], 20000.0), (curve[0, :], 10000.0)):  # the y axis, the x axis
        (round_,) = ctf.ctf(tilted.assign(rlnDefocusU=defocus, rlnDefocusV=defocus), 128, 2.0)
        np.testing.assert_allclose(np.abs(along), np.abs(round_[0, :]), atol=1e-4)


@needs_relion
def test_ctf_agrees_with_relions_to_numerical_precision(tmp_path):
    """relion_project --ctf of a point (transform 1 everywhere) is the point spread function itself."""
    n, m, pixel_size = 64, 6, 1.34
    volume = np.zeros((n, n, n), np.float32)
    volume[n // 2, n // 2, n // 2] = 1
    table = microscope(m)
    columns = {label: table[label] for label in table if label not in particles.MICROSCOPE}
    options = {"spherical_aberration": 2.0, "amplitude_contrast": 0.1, "columns": columns}
    images, poses = np.random.default_rng(0).random((m, n, n)).astype(np.float32), projection.random_rotations(m, 0)
    path = particles.new(tmp_path / "p.star", images, poses, pixel_size, **options)
    mrc.write_map(tmp_path / "point.mrc", volume, pixel_size)
    images = []
    for flags in ([], ["--ctf"]):
        command = f"relion_project --i point.mrc --ang {path.name} --o out{len(flags)} --angpix {pixel_size}".split()
        subprocess.run([*command, *flags], cwd=tmp_path, check=True, capture_output=True)
        images.append(mrcfile.read(tmp_path / f"out{len(flags)}.mrcs"))
    without, theirs = images
    assert np.abs(theirs - without).max() > 0.5 * np.abs(without).max()
    ours = ctf.apply_ctf(without, particles.ParticleStack.open(path).ctf, pixel_size)
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


def test_flipped_phases_make_of_a_ctf_its_absolute_value():
    """Exactly, in whole batches, whatever the side, below Nyquist, which has no direction; twice, nothing changes."""
    for n in (32, 33):
        parameters = microscope(300, 0).iloc[::100]
        x = np.random.default_rng(0).standard_normal((3, n, n)).astype(np.float32)
        below = (abs(scipy.fft.fftfreq(n))[:, None] < 0.5) & (scipy.fft.rfftfreq(n) < 0.5)
        x = scipy.fft.irfft2(scipy.fft.rfft2(x) * below, s=(n, n))
        transfer = ctf.ctf(parameters, n, 4.0)
        assert (transfer < 0).any(axis=(1, 2)).all()
        flipped = ctf.phase_flip(ctf.apply_ctf(x, parameters, 4.0), parameters, 4.0)
        expected = scipy.fft.irfft2(scipy.fft.rfft2(x) * np.abs(transfer), s=(n, n))
        np.testing.assert_allclose(flipped, expected, atol=1e-5)
        np.testing.assert_allclose(ctf.phase_flip(ctf.phase_flip(x, parameters, 4.0), parameters, 4.0), x, atol=1e-5)
        power = [np.square(np.abs(scipy.fft.rfft2(each))) for each in (x, ctf.phase_flip(x, parameters, 4.0))]
        np.testing.assert_allclose(*power, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rlnVoltage": 0.0}, "expected rlnVoltage > 0"),
        ({"rlnAmplitudeContrast": 1.5}, r"rlnAmplitudeContrast in \[0, 1\]"),
        ({"rlnDefocusV": np.nan}, "expected finite parameters, got rlnDefocusV nan in row 1"),
    ],
)
def test_bad_ctf_parameters_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        ctf.ctf(microscope(3).assign(**change), 32, 2.0)
    with pytest.raises(ValueError, match="got no rlnDefocusU; add them"):
        ctf.ctf(microscope(3).drop(columns="rlnDefocusU"), 32, 2.0)
    with pytest.raises(ValueError, match=r"images: expected \(3, n, n\)"):
        ctf.apply_ctf(np.ones((2, 32, 32)), microscope(3), 2.0)
