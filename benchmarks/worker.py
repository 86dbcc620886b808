"""Measurements in processes of their own, so that none warms, threads or fills the memory of another."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
THREADING = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "NUMEXPR_")  # variables that say how threads work and wait


class Gang:
    """Processes that make the same measurement at the same time, started at once and kept until `close`.

    Parameters
    ----------
    task : "module:function" of this package; called once in each process with `arguments`, it prepares the measurement
        and returns a function from a request (keywords) to numbers (a dict), which each `measure` calls.
    count : processes. threads : torch's threads in each; None leaves its default, a thread a core.
    arguments : of the task, as JSON can hold them.
    """

    def __init__(self, task: str, *, count: int = 1, threads: int | None = None, **arguments: Any) -> None:
        self.task = task
        self.answers: list[dict[str, Any]] = []  # the last numbers of each process
        # As a user's script would have it: nothing that a Makefile or a test has set about threads.
        clean = {name: value for name, value in os.environ.items() if not name.startswith(THREADING)}
        clean["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), clean.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "benchmarks.worker", task, json.dumps(arguments), json.dumps(threads)]
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": clean, "text": True}
        self._processes = [subprocess.Popen(command, **options) for _ in range(count)]

    def __len__(self) -> int:
        return len(self._processes)

    def __enter__(self) -> Gang:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.stdin.close()
            process.wait()
            process.stdout.close()

    def measure(self, **request: Any) -> list[dict[str, Any]]:
        """The numbers of each process for one request; they begin together.

        Raises
        ------
        RuntimeError : a process failed; its own error stands above on stderr.
        """
        try:
            for process in self._processes:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
        except BrokenPipeError:
            pass  # the process has ended, which the next lines report
        lines = [process.stdout.readline() for process in self._processes]
        if not all(lines):
            codes = [process.wait() for process, line in zip(self._processes, lines) if not line]
            raise RuntimeError(
                f"{self.task}: expected numbers for {request}, got exit code {codes[0]}; its error stands above, and "
                "-9 means that the memory ran out: choose a smaller size or machine"
            )
        self.answers = [json.loads(line) for line in lines]
        return self.answers

    @property
    def peak_memory(self) -> int:
        """Bytes: the peak of the process that had most, up to its last answer."""
        return max(answer["peak_memory"] for answer in self.answers)

    def rate(self, **request: Any) -> float:
        """Units of work a second (`work` over `seconds`), of all processes together until the last is done."""
        results = self.measure(**request)
        return sum(result["work"] for result in results) / max(result["seconds"] for result in results)


def alternate(
    gangs: Mapping[str, Gang], requests: Mapping[str, Mapping[str, Any]], repeats: int
) -> dict[str, list[float]]:
    """Rates of gangs measured in turn (A B A B ...), so that drift touches all alike: name -> `repeats` rates."""
    rates: dict[str, list[float]] = {name: [] for name in gangs}
    for _ in range(repeats):
        for name, gang in gangs.items():
            rates[name].append(gang.rate(**requests[name]))
    return rates


def iterations_for(gang: Gang, seconds: float) -> int:
    """How many iterations take about so many seconds in a gang, warmed up by the question; at least one."""
    gang.measure(iterations=1)
    taken = max(result["seconds"] for result in gang.measure(iterations=1))
    return max(1, round(seconds / taken))


def timed(device: torch.device, work: Callable[[], Any]) -> float:
    """Seconds that some work takes, with all that it starts on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def median_time(device: torch.device, work: Callable[[], Any], repeats: int) -> float:
    """Median of `repeats` timings in s, after one that is not counted."""
    work()
    return median(timed(device, work) for _ in range(repeats))


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch has held on a GPU, or the most of this process that was ever in the host's memory.

    The host's is Linux's VmHWM, since the peak that getrusage tells may be that of the process that started this one.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def main(task: str, arguments: str, threads: str) -> None:
    """Serve requests, a line of JSON each on stdin, until it ends; a line of numbers for each on stdout."""
    # What libraries print must not stand among the numbers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if (chosen := json.loads(threads)) is not None:
        torch.set_num_threads(chosen)
    module, function = task.split(":")
    measure = getattr(importlib.import_module(f"benchmarks.{module}"), function)(**json.loads(arguments))
    for line in sys.stdin:
        print(json.dumps(measure(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
