"""The Wiener filter of a stack: a low-pass whose form the images' own spectra give, and that corrects their CTF.

Of y = C x + noise, with the spectra S of x and N of the noise in rings, the best linear estimate is
C S / (C^2 S + N) y. N is that outside the particles, S what the whole images have beyond it. The CTF's envelope
(rlnCtfBfactor) is a part of x: to undo it where it leaves next to nothing would show noise alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.fft
from scipy.ndimage import uniform_filter1d

from cryo_lib.denoisers.ofstack import OfStack, own_pixel_size
from cryo_lib.denoisers.screening import background_spectrum
from cryo_lib.simulate.ctf import ctf
from cryo_lib.simulate.noise import power_spectrum
from cryo_lib.stacks.particles import ParticleStack

FEW, SMOOTH = 256, 5  # images, at most, that the spectra are estimated from; rings that C^2 and S are smoothed over


class Wiener(OfStack):
    """The Wiener filter of a stack on its own grid, for `apply.denoise_stack`; without a CTF, C is 1.

    Parameters
    ----------
    stack : particles with a pixel size.
    contrast : as of `Grid`.

    Attributes
    ----------
    signal, noise : `(n // 2 + 1,)`, S and N, 1 being the power of white noise of the background's sd.
    """

    grey = None

    def __init__(self, stack: ParticleStack, *, contrast: str | None = None) -> None:
        super().__init__(stack, stack.images.shape[-1], own_pixel_size(stack), contrast)
        rows = stack.spread(FEW)
        y = self.seen(stack.images[rows])
        self.noise = background_spectrum(y)
        excess = np.maximum(power_spectrum(y, 1.0)[1] - self.noise, 0)
        self.signal = uniform_filter1d(excess, SMOOTH) / passed(self.transfer(rows), self.n)

    def transfer(self, rows: Any) -> np.ndarray:
        """C of these rows without its envelope, `(m, n, n // 2 + 1)`, or `(1, ...)` where it is 1."""
        if self.stack.ctf is None:
            return np.ones((1, self.n, self.n // 2 + 1), np.float32)
        return ctf(self.stack.ctf.iloc[rows].assign(rlnCtfBfactor=0.0), self.n, self.pixel_size)

    @property
    def facts(self) -> dict[str, Any]:
        ratio = self.signal / self.noise
        return super().facts | {"CTF": self.stack.ctf is not None, "greatest S / N of a ring": f"{ratio.max():.3g}"}

    def denoise(self, y: np.ndarray, rows: Any) -> np.ndarray:
        signal, noise = (over_rings(each, self.n) for each in (self.signal, self.noise))
        transfer = self.transfer(rows)
        gain = transfer * signal / (transfer**2 * signal + noise)
        return scipy.fft.irfft2(scipy.fft.rfft2(y) * gain, s=y.shape[1:])


def passed(transfer: np.ndarray, n: int) -> np.ndarray:
    """The mean of C^2 over images of side n and in rings, `(n // 2 + 1,)`, smoothed: no ring is at a CTF's zero."""
    return uniform_filter1d(power_spectrum(scipy.fft.irfft2(transfer, s=(n, n)), 1.0)[1] * n**2, SMOOTH)


def over_rings(values: np.ndarray, n: int) -> np.ndarray:
    """Values of rings, `(n // 2 + 1,)`, at the Fourier pixels of images of side n, `(n, n // 2 + 1)` float32."""
    k = n * np.hypot(scipy.fft.fftfreq(n)[:, None], scipy.fft.rfftfreq(n))
    return np.interp(k, np.arange(len(values)), values).astype(np.float32)
