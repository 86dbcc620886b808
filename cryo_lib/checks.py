"""Checks on what enters the library: every message says what, expected, got, and the way out."""

from __future__ import annotations

from typing import Any

import numpy as np


def as_images(name: str, value: Any, dtype: type = np.float32) -> np.ndarray:
    """Return `value` as a finite `(n, h, w)` array.

    Parameters
    ----------
    name : what the array is called in messages.
    value : numpy array or CPU tensor, `(n, h, w)`, any real dtype.
    dtype : floating dtype of the result; no copy is made where none is needed.

    Raises
    ------
    TypeError : not a real-valued array, or a tensor that is not on the CPU.
    ValueError : not three-dimensional, empty, or not finite (the first bad image is named).
    """
    device = getattr(value, "device", None)
    if device is not None and str(device) != "cpu":
        raise TypeError(f"{name}: expected a numpy array or a CPU tensor, got a tensor on {device}; call .cpu() first")
    array = np.asarray(value.detach() if hasattr(value, "detach") else value)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name}: expected real numbers, got dtype {array.dtype}")
    if array.ndim != 3 or 0 in array.shape:
        raise ValueError(
            f"{name}: expected images of shape (n, h, w) with n, h, w >= 1, got {array.shape}; "
            "a single image is image[None]"
        )
    with np.errstate(over="ignore"):  # what is beyond the range of `dtype` is told as infinite
        array = array.astype(dtype, copy=False)
    finite = np.isfinite(array).all(axis=(1, 2))
    if not finite.all():
        raise ValueError(
            f"{name}: expected finite pixels, got NaN or infinity in {int((~finite).sum())} of {len(array)} images, "
            f"the first is image {int(np.argmin(finite))}; repair or remove these images"
        )
    return array


def network_input(images: Any, size: int) -> None:
    """Raise ValueError unless `images` is a tensor `(n, 1, size, size)`, as a network built for `size` pixels takes."""
    if images.ndim != 4 or images.shape[1:] != (1, size, size):
        raise ValueError(
            f"images: expected shape (n, 1, {size}, {size}), got {tuple(images.shape)}; this network was built for "
            f"{size} px: crop or rescale the images, or build one for their size"
        )


def same_shape(name_a: str, a: np.ndarray, name_b: str, b: np.ndarray) -> None:
    """Raise ValueError unless arrays `a` and `b` have one shape."""
    if a.shape != b.shape:
        raise ValueError(
            f"{name_a} and {name_b}: expected the same shape, got {a.shape} and {b.shape}; "
            "crop, pad or resample one of them"
        )


def number(
    name: str, value: Any, *, low: float | None = None, high: float | None = None, above: float | None = None
) -> float:
    """Return `value` as a float within `[low, high]` and strictly greater than `above`.

    Raises
    ------
    TypeError : not a real number (bool and str included; YAML reads `1e-3` as a string: write `1.0e-3`).
    ValueError : not finite, or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(
            f"{name}: expected a number, got {value!r} ({type(value).__name__}); in YAML write 1.0e-3, not 1e-3"
        )
    bounds = (
        [f"> {above}"] * (above is not None) + [f">= {low}"] * (low is not None) + [f"<= {high}"] * (high is not None)
    )
    value = float(value)
    inside = (
        np.isfinite(value)
        and (low is None or value >= low)
        and (high is None or value <= high)
        and (above is None or value > above)
    )
    if not inside:
        raise ValueError(f"{name}: expected a finite number{' ' if bounds else ''}{' and '.join(bounds)}, got {value}")
    return value


def integer(name: str, value: Any, *, low: int | None = None, multiple_of: int = 1) -> int:
    """Return `value` as an int, at least `low` and a multiple of `multiple_of`; TypeError or ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer, got {value!r} ({type(value).__name__})")
    if low is not None and value < low:
        raise ValueError(f"{name}: expected an integer >= {low}, got {value}")
    if value % multiple_of:
        below = value - value % multiple_of
        near = f"{below} or {below + multiple_of}" if below else f"{multiple_of}"
        raise ValueError(f"{name}: expected a multiple of {multiple_of}, got {value}; use {near}")
    return int(value)


def choice(name: str, value: Any, options: Any) -> Any:
    """Return `value` if it is one of `options`; ValueError listing them otherwise."""
    options = list(options)
    if value not in options:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, options))}, got {value!r}")
    return value


def grey_range(name: str, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the `(n,)` minima and maxima of images that vary."""
    low, high = images.min(axis=(1, 2)), images.max(axis=(1, 2))
    constant = low == high
    if constant.any():
        first = int(np.argmax(constant))
        raise ValueError(
            f"{name}: expected images that vary, got {int(constant.sum())} constant of {len(images)}, "
            f"the first is image {first} (value {low[first]:g}); remove these images"
        )
    return low, high
