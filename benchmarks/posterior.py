"""The posterior mean over references beside our network on one stack, and its growth with references and images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.denoise import scratch_folder, write_noise
from benchmarks.geometry import ball
from benchmarks.sizes import Size
from benchmarks.worker import Gang, alternate, peak_memory, timed
from cryo_lib.denoisers import apply
from cryo_lib.denoisers.posterior import References
from cryo_lib.denoisers.summing import noise_level
from cryo_lib.simulate import projection
from cryo_lib.stacks.particles import ParticleStack


def ours(device: str, stack: str, references: int, batch: int, out: str) -> Callable[..., dict[str, Any]]:
    """A measurement of the posterior by `apply.denoise_stack`, as that of `denoise.resnet`, and of what comes before.

    Images are noise alone, over which the posterior is widest: it takes as long as it can.

    Returns
    -------
    A function that takes nothing and returns `work` in images, `seconds`, `prepare`, the seconds in which references
    were expanded, and `peak_memory` in bytes.
    """
    chosen, opened = torch.device(device), ParticleStack.open(stack)
    size = opened.images.shape[-1]
    views = projection.rescale(projection.project(ball(size), projection.random_rotations(references, 0)))
    kept: list[References] = []
    prepare = timed(chosen, lambda: kept.append(References(views, device=device)))

    def denoise(y: np.ndarray) -> np.ndarray:
        return kept[0].posterior(y, noise_level(y)).x_hat

    def measure() -> dict[str, Any]:
        seconds = timed(chosen, lambda: apply.denoise_stack(denoise, opened, out, batch_size=batch))
        return {"work": len(opened), "seconds": seconds, "prepare": prepare, "peak_memory": peak_memory(chosen)}

    return measure


def compare(device: str, size: Size, scratch: Path) -> list[dict[str, Any]]:
    """Our network and the posterior in turn on one stack: a row each."""
    print("posterior: beside our network", flush=True)
    chosen = size.posterior
    common = {"device": device, "stack": str(write_noise(scratch / "stack.mrcs", chosen["images"], chosen["size"]))}
    network = common | {"width": chosen["width"], "batch": chosen["batch"], "precision": "float32"}
    over = common | {"references": chosen["references"], "batch": chosen["images"]}
    with (
        Gang("denoise:resnet", out=str(scratch / "network.mrcs"), **network) as first,
        Gang("posterior:ours", out=str(scratch / "posterior.mrcs"), **over) as second,
    ):
        gangs = {"Network": first, "Posterior": second}
        before = {name: gang.measure()[0].get("prepare", 0.0) for name, gang in gangs.items()}
        rates = alternate(gangs, {name: {} for name in gangs}, chosen["repeats"])
        peaks = {name: gang.peak_memory for name, gang in gangs.items()}
    return [
        {"denoiser": name, "prepare": before[name], "images_per_s": rates[name], "peak_memory": peaks[name]}
        for name in gangs
    ]


def growth(device: str, size: Size, scratch: Path) -> list[dict[str, Any]]:
    """A row a point: `axis`, "references" or "images", `value`, `prepare` and `seconds`, peak memory in bytes."""
    rows, threads = [], 1 if device == "cpu" else None
    for axis, values in size.posterior_growth.items():
        for value in values:
            print(f"posterior: {value} {axis}", flush=True)
            options = {name: size.posterior[name] for name in ("references", "images")} | {axis: value}
            stack = write_noise(scratch / f"{axis}{value}.mrcs", options["images"], size.posterior["size"])
            arguments = {"references": options["references"], "batch": options["images"], "out": f"{stack}.out.mrcs"}
            with Gang("posterior:ours", threads=threads, device=device, stack=str(stack), **arguments) as gang:
                (result,) = gang.measure()
            row = {"axis": axis, "value": value, "options": options}
            rows.append(row | {name: result[name] for name in ("prepare", "seconds", "peak_memory")})
    return rows


def run(device: str, size: Size) -> dict[str, Any]:
    """The comparison and the growth, in files that are removed afterwards."""
    with scratch_folder() as folder:
        rows = compare(device, size, Path(folder))
        return {"configuration": size.posterior, "rows": rows, "growth": growth(device, size, Path(folder))}
