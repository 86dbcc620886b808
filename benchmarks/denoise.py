"""Denoising a stack on disk: throughput and memory beside Topaz-Denoise, and memory as the stack grows.

Topaz-Denoise is imported in the measuring process alone; see `denoisers.topaz`.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.sizes import Size
from benchmarks.worker import ROOT, Gang, alternate, peak_memory, timed
from cryo_lib.denoisers import apply, topaz
from cryo_lib.evaluate import metrics, unseen
from cryo_lib.networks import models
from cryo_lib.simulate import density, noise, phantom, projection
from cryo_lib.stacks import mrc, particles
from cryo_lib.stacks.particles import ParticleStack

TOPAZ, GENERAL = ROOT / topaz.FOLDER, ROOT / "weights" / "general" / "unet.safetensors"
MEMORY_SIZE, MEMORY_WIDTH = 32, 1  # px and channels of the stacks and the network that memory is measured with
BOX, SNR = 220.0, 0.1  # A and Var(signal) / Var(noise), of the particles that are denoised
BLOCK = 1000  # random images that a long stack repeats, each time on another scale


def write_noise(path: Path, n: int, size: int) -> Path:
    """Write a `.mrcs` of `n` images of noise, or a `.star` and the `.mrcs` beside it; memory does not grow with `n`.

    OSError where the disk has no room for it and for as large a stack beside it.
    """
    needed, free = 8 * n * size**2, shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(
            f"{path.parent}: expected {needed >> 20} MiB free for a stack of {n} images and its denoised copy, got "
            f"{free >> 20} MiB; free some, or measure without them by --only"
        )
    rng = np.random.default_rng(0)
    block = rng.standard_normal((min(n, BLOCK), size, size), np.float32)

    def batches() -> Iterator[np.ndarray]:
        for start in range(0, n, len(block)):
            yield block[: n - start] * np.float32(1 + start / n)

    if path.suffix == ".star":
        return particles.new(path, batches(), np.tile(np.eye(3), (n, 1, 1)), 1.0)
    mrc.write_stack(path, batches(), (n, size, size), 1.0)
    return path


def write_particles(path: Path, n: int, size: int) -> np.ndarray:
    """Write a `.mrcs` of `n` noisy views of a particle that no network has seen, the phantom; the clean ones."""
    particle = phantom.phantom(2)[0]
    volume = density.density(particle, size, BOX / size, 2 * BOX / size)
    x = projection.rescale(projection.project(volume, projection.random_rotations(n, 0)))
    mrc.write_stack(path, [noise.add_noise(x, SNR, 0)], x.shape, BOX / size)
    return x


def psnr(x: np.ndarray, x_hat: np.ndarray) -> float:
    """Mean PSNR (dB) of denoised images on the clean ones' grey scale, as brought there by one scale and offset."""
    return float(metrics.psnr(x, unseen.on_scale(x, x_hat)).mean())


def ours(device: str, stack: str, batch: int, precision: str, out: str) -> Callable[..., dict[str, Any]]:
    """A measurement of the network that ships, by `apply.denoise_stack`, as that of `resnet`."""
    chosen, opened = torch.device(device), ParticleStack.open(stack)
    model, card = models.load(GENERAL)
    model = model.to(chosen, memory_format=torch.channels_last)
    known = card | {"phase_flipped": False}  # images without a CTF
    denoiser = apply.fit(model, known, opened, contrast="bright", precision=precision)
    return measured(chosen, opened, partial(apply.denoise_stack, denoiser, opened, out, batch_size=batch))


def resnet(device: str, stack: str, width: int, batch: int, precision: str, out: str) -> Callable[..., dict[str, Any]]:
    """A measurement of the paper's network, untrained: `work` in images, `seconds`, `peak_memory` in bytes."""
    chosen, opened = torch.device(device), ParticleStack.open(stack)
    model = models.GENERATORS["resnet"](opened.images.shape[-1], width).eval()
    model = model.to(chosen, memory_format=torch.channels_last)
    options = {"batch_size": batch, "precision": precision}
    return measured(chosen, opened, partial(apply.denoise_stack, model, opened, out, **options))


def measured(chosen: torch.device, opened: ParticleStack, denoise: Callable[[], Any]) -> Callable[..., dict[str, Any]]:
    """The measurement of what denoises a stack, as `resnet` says."""

    def measure() -> dict[str, Any]:
        return {"work": len(opened), "seconds": timed(chosen, denoise), "peak_memory": peak_memory(chosen)}

    return measure


def memory(stack: str, width: int, out: str) -> Callable[..., dict[str, Any]]:
    """A measurement of `apply.denoise_stack` on the CPU: `seconds`, `before` and `peak_memory` in bytes.

    `before` is what it took before it opened the stack, of which torch's libraries are most.
    """
    cpu = torch.device("cpu")
    model = models.GENERATORS["resnet"](MEMORY_SIZE, width).eval()

    def measure() -> dict[str, Any]:
        before = peak_memory(cpu)
        seconds = timed(cpu, lambda: apply.denoise_stack(model, stack, out))
        return {"seconds": seconds, "before": before, "peak_memory": peak_memory(cpu)}

    return measure


def released(device: str, stack: str, batch: int | None, out: str, folder: str = str(TOPAZ)) -> Callable[..., dict]:
    """The same measurement of Topaz-Denoise's U-net, as that of `resnet`.

    Parameters
    ----------
    batch : None calls Topaz's own `denoise_stack`, which holds the stack in memory and denoises one image at a time
        (without patches and deconvolution, which are for micrographs). A number instead gives batches of so many images
        to Topaz's `Denoise.denoise`, with files read and written as for ours.
    folder : where topaz-em is installed.
    """
    opened, denoiser = ParticleStack.open(stack), topaz.load(folder, device)
    own = importlib.import_module("topaz.denoise").denoise_stack

    def whole() -> None:
        with contextlib.redirect_stderr(io.StringIO()):  # it counts the images aloud
            options = {"deconvolve": False, "patch_size": -1, "normalize": False, "use_cuda": device == "cuda"}
            own(stack, out, [denoiser], **options)

    in_batches = partial(apply.denoise_stack, denoiser.denoise, opened, out, batch_size=batch)
    return measured(torch.device(device), opened, torch.inference_mode()(whole if batch is None else in_batches))


def compare(device: str, size: Size, scratch: Path) -> dict[str, Any]:
    """Ours, the paper's network and Topaz in turn on one stack: what is denoised, and a row each.

    Those of Topaz only if it is installed. `psnr` is that of trained networks, none of which has seen the particle.
    """
    print("denoising: ours and Topaz-Denoise", flush=True)
    chosen = {name: size.denoise[name] for name in ("size", "width", "images", "batch")}
    stack, batch = scratch / "stack.mrcs", chosen["batch"]
    x = write_particles(stack, chosen["images"], chosen["size"])
    common, tasks = {"device": device, "stack": str(stack)}, {}
    for precision in size.precisions:
        same = {"batch": batch, "precision": precision}
        tasks[f"Ours, {precision}"] = {"task": "denoise:ours"} | same
        tasks[f"The paper's network, {precision}"] = {"task": "denoise:resnet", "width": chosen["width"]} | same
    if topaz.installed(TOPAZ):
        tasks["Topaz-Denoise, in batches"] = {"task": "denoise:released", "batch": batch}
        tasks["Topaz-Denoise, its denoise_stack"] = {"task": "denoise:released", "batch": None}
    gangs = {}
    try:
        for i, (name, options) in enumerate(tasks.items()):
            gangs[name] = Gang(out=str(scratch / f"out{i}.mrcs"), **common, **options)
        for gang in gangs.values():
            gang.measure()
        rates = alternate(gangs, {name: {} for name in gangs}, size.denoise["repeats"])
        peaks = {name: gang.peak_memory for name, gang in gangs.items()}
    finally:
        for gang in gangs.values():
            gang.close()

    rows = []
    for i, (name, options) in enumerate(tasks.items()):
        trained = options["task"] != "denoise:resnet"
        score = psnr(x, ParticleStack.open(scratch / f"out{i}.mrcs").images[:]) if trained else None
        rows.append({"denoiser": name, "images_per_s": rates[name], "peak_memory": peaks[name], "psnr": score})
    return {"configuration": chosen, "rows": rows, "topaz_installed": topaz.installed(TOPAZ)}


def memory_growth(size: Size, scratch: Path) -> list[dict[str, Any]]:
    """Time and peak memory of denoising stacks of growing length, and of one with a particle table: a row a stack."""
    rows = []
    for suffix, lengths in ((".mrcs", size.memory_images), (".star", (size.memory_star,))):
        for n in lengths:
            print(f"denoising: memory with {n} images, {suffix}", flush=True)
            stack, out = write_noise(scratch / f"long{suffix}", n, MEMORY_SIZE), scratch / f"denoised{suffix}"
            with Gang("denoise:memory", threads=1, stack=str(stack), width=MEMORY_WIDTH, out=str(out)) as gang:
                (result,) = gang.measure()
            rows.append({"images": n, "file": suffix} | result)
            for path in scratch.iterdir():
                path.unlink()
    return rows


def run(device: str, size: Size) -> dict[str, Any]:
    """The comparison with Topaz-Denoise, in files that are removed afterwards."""
    with scratch_folder() as folder:
        return compare(device, size, Path(folder))


def run_memory(device: str, size: Size) -> list[dict[str, Any]]:
    """The growth of memory with the stack, on the host whatever the device, in files that are removed afterwards."""
    with scratch_folder() as folder:
        return memory_growth(size, Path(folder))


def scratch_folder() -> tempfile.TemporaryDirectory:
    """A folder for stacks, on the disk of this repository."""
    TOPAZ.parent.mkdir(exist_ok=True)
    return tempfile.TemporaryDirectory(prefix="bench-", dir=TOPAZ.parent)
