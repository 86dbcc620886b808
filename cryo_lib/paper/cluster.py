"""The trainings of a scale one by one, without DVC and its lock: as the tasks of a job array, or in pieces on one GPU.

python -m cryo_lib.paper.cluster list [STUDY...]       every training, its index, and whether it is finished
python -m cryo_lib.paper.cluster missing [STUDY...]    the indices of those that are not, as `sbatch --array` takes them
python -m cryo_lib.paper.cluster run INDEX             one training, by papermill
python -m cryo_lib.paper.cluster train [PATTERN...]    what is not finished, without papermill, as long as --minutes
python -m cryo_lib.paper.cluster stages [STUDY...]     the stages that these studies, or all, are the whole of
python -m cryo_lib.paper.cluster collect [STUDY...]    once all are finished: these stages' notebooks; prints the stages
python -m cryo_lib.paper.cluster data [STUDY...]       the stages that make what they train on
"""

from __future__ import annotations

import argparse
import contextlib
import math
import shutil
import sys
import time
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from cryo_lib import checks
from cryo_lib.evaluate.metrics import SCORES
from cryo_lib.files import cores
from cryo_lib.networks import models, parallel, runs
from cryo_lib.networks.runs import Run
from cryo_lib.paper import notebooks
from cryo_lib.paper.experiments import DATASETS, grid, of_dataset, read_scale, settings_of
from cryo_lib.stacks.dataset import Dataset

NOTEBOOK, SCRATCH = Path("notebooks/03_train_networks.ipynb"), Path(".scratch")


def tasks(params: dict[str, Any]) -> list[tuple[str, Run]]:
    """Every training of a scale, its study and run; its index is its number in the job array."""
    return [(name, run) for name, study in params["study"].items() for run in grid(study)]


def chosen(params: dict[str, Any], studies: list[str]) -> dict[int, tuple[str, Run]]:
    """The tasks of some studies, or of all where none is named, by their index; ValueError for a study that is none."""
    if unknown := sorted(set(studies) - set(params["study"])):
        raise ValueError(f"studies: expected some of {', '.join(params['study'])}, got {', '.join(unknown)}")
    return {i: task for i, task in enumerate(tasks(params)) if not studies or task[0] in studies}


def parameters(params: dict[str, Any], dataset: str, run: tuple[str, Run] | None = None) -> dict[str, Any]:
    """What notebook 03 is run with for the studies on a data set, as its stage does, or for one run of one alone."""
    studies = params["study"]
    if run is not None:
        name, task = run
        one = {"methods": [task.method], "experiments": [task.experiment], "seeds": [task.seed]}
        one["variants"] = {task.variant: studies[name]["variants"][task.variant]} if task.variant else {}
        studies = {name: studies[name] | one}
    return {"scale": params["scale"], "dataset": dataset, "device": "auto", "study": studies} | params["train"]


def folders(params: dict[str, Any], name: str) -> tuple[Path, Path]:
    """Where a study's pairs lie, and where its runs go."""
    return Path("data", params["scale"], params["study"][name]["dataset"]), Path("runs", params["scale"], name)


def finished(params: dict[str, Any], study: str, run: Run) -> bool:
    """Whether a training has been made, by these very settings, data and code."""
    data, out = folders(params, study)
    return (data / "card.json").is_file() and runs.finished(run, settings_of(params, study, run), data, out, SCORES)


def in_order(params: dict[str, Any], patterns: list[str]) -> list[tuple[str, Run]]:
    """The tasks whose folders, as `list` prints them, match the patterns (* is anything), in their order, each once.

    ValueError for a pattern that none matches.
    """
    names = {task: f"{task[0]}/{task[1].folder.as_posix()}" for task in tasks(params)}
    found: dict[tuple[str, Run], None] = {}
    for pattern in patterns or ["*"]:
        matching = [task for task, name in names.items() if fnmatchcase(name, pattern)]
        if not matching:
            example = next(iter(names.values()))
            raise ValueError(f"pattern: expected one of trainings such as {example}, got {pattern!r}; see `list`")
        found |= dict.fromkeys(matching)
    return list(found)


def work(
    params: dict[str, Any], patterns: list[str], minutes: float = math.inf, device: str = "auto", workers: int = 1
) -> int:
    """Train what is not finished, in the order of the patterns, for so many minutes; how many trainings are left.

    The one under way when the time is up stops at its next line of metrics, and goes on from there at the next call.
    A training that breaks, or has no data yet, is told of and counts as left; the others go on. Small networks do not
    fill a GPU: `workers` train at a time, each in a process of its own. On the CPU they share its cores, and sums, and
    so results, depend on the threads of each. RuntimeError under torchrun.
    """
    if parallel.size() > 1:
        raise RuntimeError("train: expected one process, got torchrun's several; use `run INDEX` under torchrun")
    asked = in_order(params, patterns)
    workers = min(checks.integer("workers", workers, low=1), len(asked))
    make = partial(_train_until, params, time.monotonic() + 60 * minutes, device)
    if workers <= 1:
        return len(asked) - sum(map(make, asked))
    with runs.side_by_side(workers, max(1, cores() // workers)) as pool:
        return len(asked) - sum(pool.map(make, asked))


def _train_until(params: dict[str, Any], until: float, device: str, task: tuple[str, Run]) -> bool:
    """Train a task that is not finished until a time of `time.monotonic()`; whether it is finished then."""
    if finished(params, *task):
        return True
    if time.monotonic() >= until:
        return False
    study, run = task
    data, out = folders(params, study)
    settings, name = settings_of(params, study, run), f"{study}/{run.folder.as_posix()}"
    print(name, flush=True)
    try:
        done = runs.run(run, settings, data, out, SCRATCH, device, scores=SCORES, until=until)
    except (RuntimeError, ValueError, OSError) as error:
        print(f"error: {name}: {error}", file=sys.stderr, flush=True)
        return False
    if not done:
        return False
    print(f"{name}: PSNR {done['psnr']:.2f} dB, SSIM {done['ssim']:.3f}", flush=True)
    configuration = runs.configuration_of(run, settings, Dataset(data), models.pick_device(device), SCORES)
    shutil.rmtree(runs.state_of(SCRATCH, configuration), ignore_errors=True)
    return True


def ranges(indices: list[int]) -> str:
    """Ascending integers as SLURM writes them: [0, 1, 2, 5] is "0-2,5"."""
    parts: list[list[int]] = []
    for i in indices:
        if not parts or i != parts[-1][-1] + 1:
            parts.append([])
        parts[-1].append(i)
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts)


def train(params: dict[str, Any], index: int) -> Path:
    """Run one training through notebook 03, going on where an interrupted one stopped; the executed notebook's path."""
    everything, scale = tasks(params), params["scale"]
    if not 0 <= index < len(everything):
        trainings = f"0 to {len(everything) - 1}, the trainings of the scale {scale!r}"
        raise ValueError(f"index: expected {trainings}, got {index}")
    study, run = everything[index]
    out = Path("executed", scale, "cluster", f"{study}-{run.folder.as_posix().replace('/', '-')}.ipynb")
    given = parameters(params, params["study"][study]["dataset"], (study, run))
    return notebooks.run(NOTEBOOK, out, given, complete=True)


def stages(params: dict[str, Any], studies: list[str]) -> dict[str, str]:
    """The stages of training all of whose studies are named, or all where none is, and the data set of each."""
    named = {name for name, _ in chosen(params, studies).values()}
    whole = [dataset for dataset in DATASETS if of_dataset(params["study"], dataset).keys() <= named]
    return {f"{DATASETS[dataset][1]}@{params['scale']}": dataset for dataset in whole}


def collect(params: dict[str, Any], studies: list[str]) -> list[str]:
    """Make what stages make of finished trainings, the notebooks with their curves; the stages, for `dvc commit`.

    Raises
    ------
    FileNotFoundError : trainings that are not finished, or not by these settings, data and code.
    ValueError : studies that are not all of a stage; runs in a study's folder that are in no grid, and which DVC would
        take up.
    """
    wanted, made = chosen(params, studies), stages(params, studies)
    if not made:
        whole = "; ".join(", ".join(of_dataset(params["study"], dataset)) for dataset in DATASETS)
        problem = f"expected all that a stage trains ({whole}), got {', '.join(studies)}"
        raise ValueError(f"studies: {problem}; name them all")
    if missing := [i for i, task in wanted.items() if not finished(params, *task)]:
        counted = f"{len(missing)} of {len(wanted)} trainings are not finished"
        raise FileNotFoundError(f"{counted}: {ranges(missing)}; submit them again")
    known = {folders(params, name)[1] / run.folder for name, run in wanted.values()}
    names = dict.fromkeys(name for name, _ in wanted.values())
    found = {path.parent for name in names for path in folders(params, name)[1].rglob("generator.safetensors")}
    if strays := sorted(map(str, found - known)):
        problem = f"expected the runs of the studies alone, got {len(strays)} others, the first {strays[0]}"
        raise ValueError(f"{problem}; remove them")
    for dataset in made.values():
        copy = Path("executed", params["scale"], f"{NOTEBOOK.stem}-{dataset}.ipynb")
        with contextlib.redirect_stdout(sys.stderr):
            notebooks.publish(notebooks.run(NOTEBOOK, copy, parameters(params, dataset), complete=True))
    return [*made]


def made_by(params: dict[str, Any], name: str) -> str:
    """The stage that makes what a study trains on."""
    return DATASETS[params["study"][name]["dataset"]][0]


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 when all went well."""
    parser = argparse.ArgumentParser(prog="python -m cryo_lib.paper.cluster", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("list", "missing", "stages", "collect", "data"):
        commands.add_parser(name).add_argument("studies", nargs="*")
    commands.add_parser("run").add_argument("index", type=int)
    piece = commands.add_parser("train")
    piece.add_argument("patterns", nargs="*", metavar="PATTERN")
    piece.add_argument("--minutes", type=float, default=math.inf)
    piece.add_argument("--device", default="auto")
    piece.add_argument("--workers", type=int, default=1, help="trainings at a time, each a process: %(default)s")
    options = parser.parse_args(arguments)
    try:
        params = read_scale("params.yaml")
        if options.command == "run":
            print(train(params, options.index))
        elif options.command == "train":
            left = work(params, options.patterns, options.minutes, options.device, options.workers)
            print(f"{left} trainings left" + (": call again" if left else ""))
        elif options.command == "stages":
            print(*stages(params, options.studies))
        elif options.command == "collect":
            print(*collect(params, options.studies))
        elif options.command == "data":
            print(*dict.fromkeys(made_by(params, study) for study, _ in chosen(params, options.studies).values()))
        elif options.command == "missing":
            print(ranges([i for i, task in chosen(params, options.studies).items() if not finished(params, *task)]))
        else:
            for i, (study, run) in chosen(params, options.studies).items():
                state = "finished" if finished(params, study, run) else "-"
                print(f"{i:4d}  {state:8s}  {study}/{run.folder.as_posix()}")
    except (RuntimeError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
