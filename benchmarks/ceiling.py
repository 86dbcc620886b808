"""The device's own ceiling: its best matrix product, its best convolution of the networks' shapes, and its copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.worker import median_time
from cryo_lib.networks import models

LEAST = 0.01  # s that one timing takes at least


def ceiling(
    device: str, precision: str, size: int, width: int, batch: int, gemm_sizes: list[int], copy_mib: int, repeats: int
) -> Callable[..., dict[str, Any]]:
    """A measurement of the rates that no step of a network can pass.

    Parameters
    ----------
    precision : of the products, one of `models.PRECISIONS`.
    size, width, batch : of the images and of the networks, whose widest 3x3 convolution (4 `width` channels at an
        eighth of `size`) is timed, and those of the levels before it.
    gemm_sizes : sides of the square matrices tried. copy_mib : MiB that are copied at a time.

    Returns
    -------
    A function that takes nothing and returns `gemm` and `conv`, FLOP/s of the best of each, and `copy`, bytes/s read
    plus written.
    """
    chosen = torch.device(device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    def rate(amount: float, work: Callable[[], Any]) -> float:
        """Of calls in a row that take `LEAST` s or longer: a GPU is waited for once, and not after each."""

        def row() -> None:
            for _ in range(calls):
                work()

        calls = 1
        while (seconds := median_time(chosen, row, repeats)) < LEAST:
            calls *= 2
        return calls * amount / seconds

    def best(works: list[tuple[float, Callable[[], Any]]]) -> float:
        return max(rate(*work) for work in works)

    def gemm(n: int) -> tuple[float, Callable[[], Any]]:
        a, b = torch.randn(2, n, n, device=chosen, dtype=dtype)
        return 2 * n**3, lambda: a @ b

    def convolution(multiple: int, shrunk: int) -> tuple[float, Callable[[], Any]]:
        channels, side = multiple * width, size // shrunk
        layout = {"device": chosen, "dtype": dtype, "memory_format": torch.channels_last}
        x = torch.randn(batch, channels, side, side).to(**layout)
        weight = torch.randn(channels, channels, 3, 3).to(**layout)
        work = 2 * 9 * channels**2 * batch * side**2
        return work, lambda: torch.nn.functional.conv2d(x, weight, padding=1)

    def measure() -> dict[str, Any]:
        source = torch.zeros(copy_mib << 18, device=chosen)
        target = torch.ones_like(source)
        with torch.inference_mode(), models.arithmetic(precision, one_size=True):
            return {
                "gemm": best([gemm(n) for n in gemm_sizes]),
                "conv": best([convolution(*level) for level in ((1, 2), (2, 4), (4, 8))]),
                "copy": best([(2.0 * (copy_mib << 20), lambda: target.copy_(source))]),
            }

    return measure
