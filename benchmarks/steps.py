"""The training step of each method: ours, the plain loop's, and how much of the device's ceiling ours reaches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.count import Count
from benchmarks.plain import PlainLoop
from benchmarks.sizes import Configuration, Size
from benchmarks.worker import Gang, alternate, iterations_for, peak_memory, timed
from cryo_lib.files import cores
from cryo_lib.networks import losses, models, runs

ENDLESS = 1_000_000  # epochs, more than any measurement takes


def random_pairs(pairs: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """References and noisy images, `(pairs, size, size)` float32: noise, which costs what images cost."""
    rng = np.random.default_rng(0)
    x = rng.random((pairs, size, size), np.float32)
    return x, x + rng.standard_normal(x.shape, np.float32)


def trainer(
    device: str, method: str, size: int, width: int, batch: int, pairs: int, precision: str, cuda_graph: bool = True
) -> runs.Trainer:
    """Our engine with the paper's settings, at the start of a training without end."""
    settings = runs.Settings(width=width, batch_size=batch, epochs=ENDLESS, precision=precision, cuda_graph=cuda_graph)
    x, y = random_pairs(pairs, size)
    return runs.Trainer(losses.Method.parse(method), settings, lambda epoch: (x, y), 0, torch.device(device))


def ours(device: str, batch: int, **options: Any) -> Callable[..., dict[str, Any]]:
    """A measurement of `iterations` of our engine: `work` in images, `seconds`, and `peak_memory` so far in bytes."""
    chosen, engine = torch.device(device), trainer(device, batch=batch, **options)

    def measure(iterations: int) -> dict[str, Any]:
        seconds = timed(chosen, lambda: engine.advance(iterations))
        return {"work": iterations * batch, "seconds": seconds, "peak_memory": peak_memory(chosen)}

    return measure


def plain(device: str, method: str, size: int, width: int, batch: int, pairs: int) -> Callable[..., dict[str, Any]]:
    """The same measurement of the plain loop."""
    chosen, chosen_method = torch.device(device), losses.Method.parse(method)
    torch.manual_seed(0)
    generator = models.GENERATORS["resnet"](size, width)
    discriminator = None if chosen_method.adversary == "none" else models.DISCRIMINATORS["resnet"](size, width)
    loop = PlainLoop(chosen_method, generator, discriminator, *random_pairs(pairs, size), batch, chosen)

    def measure(iterations: int) -> dict[str, Any]:
        seconds = timed(chosen, lambda: loop.train(iterations))
        return {"work": iterations * batch, "seconds": seconds, "peak_memory": peak_memory(chosen)}

    return measure


def count(device: str, **options: Any) -> dict[str, int]:
    """One iteration of our engine, run here step by step: its `flop` and `bytes`, see `count.Count`."""
    engine = trainer(device, cuda_graph=False, **options)
    with Count() as counted:
        engine.advance(1)
    del engine
    if device == "cuda":
        torch.cuda.empty_cache()  # for the processes that are measured next
    return {"flop": counted.flop, "bytes": counted.bytes}


def side_by_side(device: str) -> dict[str, Any]:
    """How our engine fills a device: one training on a GPU; on the CPU one a core, as `runs.run_grid`."""
    return {"count": cores(), "threads": 1} if device == "cpu" else {"count": 1, "threads": None}


def compare(device: str, configuration: Configuration, method: str) -> dict[str, Any]:
    """Ours and the plain loop in turn: images/s of all trainings together, peak memory of one, our step's count."""
    network = {"size": configuration.size, "width": configuration.width, "batch": configuration.batch}
    common = {"device": device, "method": method, "pairs": configuration.pairs} | network
    ours = side_by_side(device) | {"precision": configuration.precision}
    with Gang("steps:ours", **ours, **common) as a, Gang("steps:plain", **common) as b:
        gangs = {"ours": a, "plain": b}
        requests = {name: {"iterations": iterations_for(gang, configuration.seconds)} for name, gang in gangs.items()}
        rates = alternate(gangs, requests, configuration.repeats)
        memory = {name: gang.peak_memory for name, gang in gangs.items()}
    counted = count(precision=configuration.precision, **common)
    return {"method": method, "images_per_s": rates, "peak_memory": memory, "trainings": len(a), "iteration": counted}


def ceilings(device: str, configuration: Configuration, size: Size) -> dict[str, float]:
    """The best rates of the device at a configuration's precision: `gemm`, `conv` in FLOP/s and `copy` in bytes/s.

    On the CPU both of one process with all threads and of a process a core with one thread each, whichever is faster.
    """
    options = {"precision": configuration.precision, "size": configuration.size, "width": configuration.width}
    options |= {"batch": configuration.batch, "device": device}
    options |= {"gemm_sizes": list(size.gemm_sizes), "copy_mib": size.copy_mib, "repeats": size.repeats}
    arrangements = [{"count": 1, "threads": None}] + ([side_by_side(device)] if device == "cpu" else [])
    totals = []
    for arrangement in arrangements:
        with Gang("ceiling:ceiling", **arrangement, **options) as gang:
            results = gang.measure()
        totals.append({name: sum(result[name] for result in results) for name in ("gemm", "conv", "copy")})
    return {name: max(total[name] for total in totals) for name in totals[0]}


def run(device: str, size: Size) -> list[dict[str, Any]]:
    """Every configuration of a size: what it is, its ceilings, and a row a method."""
    results = []
    for configuration in size.steps:
        rows = []
        for method in configuration.methods:
            print(f"training step: {configuration.name}, {method}", flush=True)
            rows.append(compare(device, configuration, method))
        shown = "name", "size", "width", "batch", "pairs", "precision"
        chosen = {name: getattr(configuration, name) for name in shown}
        results.append({"configuration": chosen, "ceiling": ceilings(device, configuration, size), "rows": rows})
    return results
