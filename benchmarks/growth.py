"""Growth of an iteration's time and of the memory of a training, with image size, width and number of pairs."""

from __future__ import annotations

from typing import Any

from benchmarks.sizes import Size
from benchmarks.worker import Gang, iterations_for

METHOD = "beta_05_05_l1"


def run(device: str, size: Size) -> list[dict[str, Any]]:
    """A row a point: `axis`, `value`, the other `options`, seconds an iteration, peak memory in bytes."""
    rows = []
    precision, threads = ("float32", 1) if device == "cpu" else ("bf16", None)
    for curve in size.growth:
        for value in curve.values:
            print(f"growth: {curve.axis} {value}", flush=True)
            options = curve.base | {curve.axis: value}
            training = options | {"device": device, "method": METHOD, "precision": precision}
            with Gang("steps:ours", threads=threads, **training) as gang:
                iterations = iterations_for(gang, size.growth_seconds)
                results = [gang.measure(iterations=iterations)[0] for _ in range(size.growth_repeats)]
            seconds = [result["seconds"] / iterations for result in results]
            rows.append({"axis": curve.axis, "value": value, "options": options, "seconds_per_iteration": seconds})
            rows[-1]["peak_memory"] = results[-1]["peak_memory"]
    return rows
