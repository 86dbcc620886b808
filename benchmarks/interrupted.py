"""`make reliability`: `dvc repro` killed at random moments, started twice at once, and without room on the disk."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from benchmarks.worker import ROOT

TARGETS = ("reconstruct", "denoise", "relion")  # and all before them: structures, projections, particles, trainings
KILLS = {  # of each stage: how often it is killed
    "structures": 1,
    "projections": 1,
    "train": 6,
    "particles": 2,
    "train_particles": 2,
    "export": 2,
    "reconstruct": 2,
    "denoise": 2,
    "relion": 2,
}
ROOM = 60_000  # bytes that a file may have, as where the disk is full
READY = 6.0  # s, about, that `dvc repro` takes to its first stage


def copy(folder: Path) -> Path:
    """A copy of the repository's files at the ci scale, without its history and its results."""
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("results/", "figures/", "paper/", "dvc.lock")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    scale = yaml.safe_load((ROOT / "scales" / "ci.yaml").read_text())
    scale["relion"] |= {"run_relion": bool(shutil.which("relion_refine_mpi")), "relion_stacks": ["clean"]}
    (folder / "params.yaml").write_text(yaml.safe_dump(scale, sort_keys=False))
    subprocess.run([sys.executable, "-m", "dvc", "config", "--local", "core.no_scm", "true"], cwd=folder, check=True)
    return folder


def environment(folder: Path) -> dict[str, str]:
    """The environment of a command of a copy: this Python's programs, the copy's library."""
    paths = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(folder)}
    return os.environ | paths


def start(folder: Path) -> subprocess.Popen:
    """`dvc repro` of a copy, whose output goes to a file beside it."""
    command = [sys.executable, "-m", "dvc", "repro", *TARGETS]
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
    """The lock file: a digest of every stage's code, parameters, and what it made, in whatever order they ran.

    Without RELION's own folder, whose logs say when they were written.
    """
    made = {}
    for name, stage in yaml.safe_load((folder / "dvc.lock").read_text())["stages"].items():
        made[f"{name}: parameters"] = stage.get("params")
        for entry in stage.get("deps", []) + stage.get("outs", []):
            if not entry["path"].startswith("relion/"):
                made[f"{name}: {entry['path']}"] = entry
    return made


def against(plain: dict[str, Any], folder: Path) -> tuple[str, bool]:
    """What a copy has made beside a `plain` one's outcome, in words that name what differs; whether nothing does."""
    made = outcome(folder)
    other = sorted(each for each in plain | made if plain.get(each) != made.get(each))
    return (f"other results: {', '.join(other)}", False) if other else ("the same results, to the bit", True)


def begun(folder: Path, since: int = 0) -> list[str]:
    """The stages that `dvc repro` has begun in a copy, by what it has printed after so many characters."""
    return re.findall(r"Running stage '([^@']+)", said(folder)[since:])


def running(folder: Path, since: int) -> str:
    """The stage that `dvc repro` is at, by what it has printed in a copy after so many characters; "" before one."""
    return (begun(folder, since) or [""])[-1]


def ended(process: subprocess.Popen, folder: Path) -> bool:
    """Wait for the `dvc repro` of a copy: True at its end, False where it was killed; RuntimeError where it failed."""
    if process.wait() not in (0, -signal.SIGKILL):
        raise RuntimeError(f"dvc repro ended with {process.returncode}: {said(folder)[-2000:]}")
    return process.returncode == 0


def undisturbed(folder: Path) -> dict[str, float]:
    """Run a copy to its end; s that each stage took, the mean of those of one name."""
    process, spent, before = start(folder), Counter(), time.monotonic()
    while process.poll() is None:
        time.sleep(0.1)
        now = time.monotonic()
        spent[running(folder, 0)] += now - before
        before = now
    ended(process, folder)
    return {stage: spent[stage] / count for stage, count in Counter(begun(folder)).items()}


def killed(folder: Path, plan: dict[str, int], lasts: dict[str, float], seed: int = 0) -> list[str]:
    """Run a copy to its end, killed as often as `plan` has it, at random moments of stages that last so many seconds.

    The stages that were under way are returned.
    """
    rng, hit, left = np.random.default_rng(seed), [], Counter(plan)
    while True:
        since = len(said(folder)) if hit else 0
        process = start(folder)
        while process.poll() is None:
            time.sleep(0.1)
            if left[stage := running(folder, since)] > 0:
                time.sleep(rng.uniform(0, 0.8 * lasts[stage]))
                if process.poll() is None:
                    hit.append(running(folder, since))
                    kill(process)
                    left[hit[-1]] -= 1
                break
        if ended(process, folder):
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


def measure(plan: dict[str, int] = KILLS) -> list[tuple[str, str, bool]]:
    """Each interruption, what comes of it, and whether that is right: the results of a run that nothing interrupts."""
    with tempfile.TemporaryDirectory() as name:
        plain, broken, double = (copy(Path(name, each)) for each in ("plain", "broken", "double"))
        lasts = undisturbed(plain)
        stopped = full(plain)
        hit = killed(broken, plan, lasts)
        whole, refused = twice(double)
        wanted = outcome(plain)
        after_kills, after_double = (against(wanted, each) for each in (broken, double))
    stages = ", ".join(f"{stage} {hit.count(stage)}" for stage in dict.fromkeys(hit))
    kept = {True: "an error; the files before are as they were", False: "no error, or files that are cut"}
    return [
        (f"no room for files above {ROOM // 1000} kB", kept[stopped], stopped),
        (f"kill -9 at {len(hit)} random moments ({stages})", f"started again: {after_kills[0]}", after_kills[1]),
        ("a second at the same time", "is refused" if refused else "is not refused", refused),
        ("the first of two", after_double[0] if whole else "fails", whole and after_double[1]),
    ]


if __name__ == "__main__":
    print(*measure(), sep="\n")
