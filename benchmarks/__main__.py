"""`python -m benchmarks`: measure, and write what was measured, tables and growth curves."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import accuracy, curves, denoise, geometry, growth, posterior, steps, tables
from benchmarks.sizes import Size, size_of
from benchmarks.worker import ROOT
from cryo_lib import checks
from cryo_lib.files import cores, write_json, write_text
from cryo_lib.networks import models
from cryo_lib.paper.machine import device_name, revision
from cryo_lib.paper.report import insert

MEASUREMENTS: dict[str, Callable[[str, Size], Any]] = {"steps": steps.run, "denoise": denoise.run}
MEASUREMENTS |= {"memory": denoise.run_memory, "geometry": geometry.run, "growth": growth.run, "accuracy": accuracy.run}
MEASUREMENTS["posterior"] = posterior.run
FOLDERS = {"full": ROOT / "benchmarks" / "results", "quick": ROOT / "build" / "benchmarks"}


def environment(device: str) -> dict[str, Any]:
    """What the numbers were measured on: device, cores, versions, and what else the machine was doing.

    `revision` ends in "-dirty" where files had changed since; `load` is the number of processes that were running or
    wanted to, over the minute before.
    """
    machine = {"device": device_name(device), "device_type": device, "cores": cores()}
    machine |= {"load": round(os.getloadavg()[0], 2)}
    return machine | {"torch": torch.__version__, "python": platform.python_version(), "revision": revision(ROOT)}


def measure(device: str, size: str, only: Sequence[str], out: Path) -> dict[str, Any]:
    """Measure the sections of `only` and write `<device>.json`, `.md` and `_growth.png` into `out`; the results.

    ValueError for sections, sizes or devices that there are not.
    """
    for name in only:
        checks.choice("only", name, MEASUREMENTS)
    chosen = size_of(size, device)
    results = {"size": size, "environment": environment(device)}
    results |= {name: run(device, chosen) for name, run in MEASUREMENTS.items() if name in only}
    write_json(out / f"{device}.json", results)
    write_text(out / f"{device}.md", tables.report(results))
    curves.draw(results, out / f"{device}_growth.png")
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see `python -m benchmarks --help`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    devices = ("auto", "cpu", "cuda")
    parser.add_argument("--device", default="auto", choices=devices, help="auto takes a GPU that torch can use")
    parser.add_argument("--size", default="full", choices=FOLDERS, help="quick is for tests: its numbers mean nothing")
    parser.add_argument("--only", default=",".join(MEASUREMENTS), help="sections, with commas: %(default)s")
    parser.add_argument("--out", type=Path, help="folder; benchmarks/results, or build/benchmarks for the quick size")
    given = parser.parse_args(arguments)
    device = models.pick_device(given.device).type
    results = measure(device, given.size, given.only.split(","), given.out or FOLDERS[given.size])
    if given.size == "full" and given.out is None:
        insert(ROOT / "docs" / "speed.md", f"benchmarks {device}", tables.summary(results))
    print(f"\n{tables.report(results)}")


if __name__ == "__main__":
    main()
