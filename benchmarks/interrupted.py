"""`make reliability`: `dvc repro` killed at random moments, started twice at once, and without room on the disk."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from benchmarks.worker import ROOT

TARGET = "reconstruct"  # and all before it: structures, projections, trainings, stacks denoised
KILLS = 20
ROOM = 60_000  # bytes that a file may have, as where the disk is full
READY = 6.0  # s, about, that `dvc repro` takes to its first stage


def copy(folder: Path) -> Path:
    """A copy of the repository's files at the ci scale, without its history and its results."""
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("results/", "figures/", "paper/", "dvc.lock")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    shutil.copy2(ROOT / "scales" / "ci.yaml", folder / "params.yaml")
    subprocess.run([sys.executable, "-m", "dvc", "config", "--local", "core.no_scm", "true"], cwd=folder, check=True)
    return folder


def environment(folder: Path) -> dict[str, str]:
    """The environment of a command of a copy: this Python's programs, the copy's library."""
    paths = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(folder)}
    return os.environ | paths


def start(folder: Path) -> subprocess.Popen:
    """`dvc repro` of a copy, whose output goes to a file beside it."""
    command = [sys.executable, "-m", "dvc", "repro", TARGET]
    with open(f"{folder}.log", "a") as log:
        return subprocess.Popen(command, cwd=folder, env=environment(folder), stdout=log, stderr=subprocess.STDOUT)


def said(folder: Path) -> str:
    """What `dvc repro` has printed in a copy so far."""
    return Path(f"{folder}.log").read_text(errors="replace")


def kill(process: subprocess.Popen) -> None:
    """kill -9 of a process and of all that it has started."""
    whole = [psutil.Process(process.pid)]
    whole += whole[0].children(recursive=True)
    for each in whole:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            pass
    process.wait()
    psutil.wait_procs(whole, timeout=10)


def outcome(folder: Path) -> dict[str, Any]:
    """The lock file: a digest of every stage's code, parameters, and what it made, in whatever order they ran."""
    return yaml.safe_load((folder / "dvc.lock").read_text())


def killed(folder: Path, seconds: float, kills: int, seed: int = 0) -> list[str]:
    """Run a copy to its end, killed at so many random moments; the stages that were under way.

    seconds : that an uninterrupted run takes, over which the moments are spread.
    """
    rng, hit = np.random.default_rng(seed), []
    while True:
        process = start(folder)
        try:
            process.wait(READY + rng.uniform(0, seconds / kills) if len(hit) < kills else None)
        except subprocess.TimeoutExpired:
            kill(process)
            hit.append((re.findall(r"Running stage '([^@']+)", said(folder)) or ["none yet"])[-1])
            continue
        if process.returncode:
            raise RuntimeError(f"dvc repro ended with {process.returncode}: {said(folder)[-2000:]}")
        return hit


def twice(folder: Path) -> tuple[bool, bool]:
    """Two `dvc repro` of one copy at once: whether the first ended well, and whether the second said that it waits."""
    first = start(folder)
    time.sleep(2 * READY)
    second = start(folder)
    refused = second.wait() != 0 and bool(re.search("busy|acquire lock", said(folder)))
    return first.wait() == 0, refused


def full(folder: Path) -> bool:
    """A stage made again where no file may grow beyond `ROOM`: an error, and the files before are as they were."""
    made = folder / "data" / "ci" / "rnap"
    before = {path: path.read_bytes() for path in made.iterdir()}
    command = [sys.executable, "-m", "cryo_lib.paper.notebooks", "run", "01", "-p", "scale", "ci", "-s", "data"]
    command += ["-p", "core_chain", "C", "-p", "clamp_chain", "D"]
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (ROOM, ROOM))
    options = {"env": environment(folder), "capture_output": True, "text": True}
    done = subprocess.run(command, cwd=folder, preexec_fn=limit, **options)
    return "OSError" in done.stderr and {path: path.read_bytes() for path in made.iterdir()} == before


def measure(kills: int = KILLS) -> list[tuple[str, str, bool]]:
    """Each interruption, what comes of it, and whether that is right: the results of a run that nothing interrupts."""
    with tempfile.TemporaryDirectory() as name:
        plain, broken, double = (copy(Path(name, each)) for each in ("plain", "broken", "double"))
        started = time.monotonic()
        if start(plain).wait():
            raise RuntimeError(f"dvc repro failed without any interruption: {said(plain)[-2000:]}")
        seconds, stopped = time.monotonic() - started, full(plain)
        hit = killed(broken, seconds, kills)
        ended, refused = twice(double)
        same = [outcome(each) == outcome(plain) for each in (broken, double)]
    stages = ", ".join(f"{stage} {hit.count(stage)}" for stage in dict.fromkeys(hit))
    kept = {True: "an error; the files before are as they were", False: "no error, or files that are cut"}
    words = {True: "the same results, to the bit", False: "other results"}
    return [
        (f"no room for files above {ROOM // 1000} kB", kept[stopped], stopped),
        (f"kill -9 at {len(hit)} random moments ({stages})", f"started again: {words[same[0]]}", same[0]),
        ("a second at the same time", "is refused" if refused else "is not refused", refused),
        ("the first of two", words[same[1]] if ended else "fails", ended and same[1]),
    ]


if __name__ == "__main__":
    print(*measure(), sep="\n")
