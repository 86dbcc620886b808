"""`python -m benchmarks.parts`: where the time of a narrow network's training step goes, and what could be gained.

One thread of the CPU, since a study's trainings go side by side with one each. Shares are of the operations' own time
as torch's profiler tells it, so that another load on the machine lengthens all of them alike.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.__main__ import FOLDERS, environment
from benchmarks.ceiling import ceiling
from benchmarks.sizes import KINDS, Configuration, size_of
from benchmarks.steps import count, trainer
from benchmarks.worker import median_time
from cryo_lib.files import write_text
from cryo_lib.paper.methods import METHODS
from cryo_lib.paper.tables import markdown

PARTS = {  # of a step, by what the names of their operations hold; what comes first takes an operation
    "Convolutions": ("conv",),
    "Batch norm": ("batch_norm",),
    "Adam": ("adam",),
    "Activations": ("relu", "clamp", "tanh", "sigmoid", "threshold"),
    "Copies and layouts": ("copy_", "clone", "contiguous", "to_copy", "cat", "fill_", "zero_", "empty"),
}
OTHER = "All else"


def part_of(operation: str) -> str:
    """The part of a step that an operation of torch's belongs to."""
    return next((part for part, words in PARTS.items() if any(word in operation.lower() for word in words)), OTHER)


def shares(engine: Any, iterations: int) -> dict[str, float]:
    """How much of the operations' time each part of a step takes, in all 1, over so many iterations of an engine."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        engine.advance(iterations)
    times = dict.fromkeys((*PARTS, OTHER), 0.0)
    for event in profiler.key_averages():
        times[part_of(event.key)] += event.self_cpu_time_total
    return {part: time / sum(times.values()) for part, time in times.items()}


def measure(configuration: Configuration, method: str, best: float, iterations: int) -> dict[str, Any]:
    """The step of one method: `shares`, and the parts of the ceiling that it reaches and that its convolutions do.

    `best` is the ceiling in FLOP/s. That of the convolutions is the step's, were all else free: nearly all of its
    FLOP are theirs. It is the most that they reach, since the profiler lengthens small operations more than large.
    """
    options = {"method": method, "size": configuration.size, "width": configuration.width}
    options |= {"batch": configuration.batch, "pairs": configuration.pairs, "precision": configuration.precision}
    engine = trainer("cpu", **options)
    engine.advance(iterations)
    seconds = median_time(torch.device("cpu"), lambda: engine.advance(iterations), 5) / iterations
    found, flop = shares(engine, iterations), count("cpu", **options)["flop"]
    reached = flop / seconds / best
    return {"method": method, "shares": found, "reached": reached, "convolutions": reached / found["Convolutions"]}


def table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """A row a method, in words."""
    return pd.DataFrame(
        {
            "Method": METHODS[row["method"]].label,
            **{part: f"{share:.0%}" for part, share in row["shares"].items()},
            "Step, of the ceiling": f"{row['reached']:.0%}",
            "Its convolutions alone, at most": f"{row['convolutions']:.0%}",
        }
        for row in rows
    )


def main(size: str = "full", iterations: int = 30) -> list[dict[str, Any]]:
    """Measure, and write `parts.md`; a row a kind of step."""
    torch.set_num_threads(1)
    chosen, machine = size_of(size, "cpu"), environment("cpu")
    configuration = chosen.steps[0]
    network = {"size": configuration.size, "width": configuration.width, "batch": configuration.batch}
    more = {"gemm_sizes": list(chosen.gemm_sizes), "copy_mib": chosen.copy_mib, "repeats": chosen.repeats}
    rates = ceiling("cpu", configuration.precision, **network, **more)()
    best = max(rates["gemm"], rates["conv"])
    rows = [measure(configuration, method, best, iterations) for method in KINDS]
    said = (
        f"# Parts of a training step: {configuration.name}\n\n{machine['device']}, one thread, load {machine['load']} "
        f"before the run, torch {machine['torch']}, revision {machine['revision']}. Written by `python -m "
        f"benchmarks.parts`. Ceiling, {configuration.precision}: {best / 1e9:,.0f} GFLOP/s.\n\n"
    )
    write_text(FOLDERS[size] / "parts.md", said + markdown(table(rows)))
    return rows


if __name__ == "__main__":
    print(markdown(table(main())))
