"""The trainings of a scale one by one, without DVC and its lock: as the tasks of a job array, or in pieces on one GPU.

python -m cryo_lib.paper.cluster list [STUDY...]       every training, its index, and whether it is finished
python -m cryo_lib.paper.cluster missing [STUDY...]    the indices of those that are not, as `sbatch --array` takes them
python -m cryo_lib.paper.cluster run INDEX             one training, by papermill
python -m cryo_lib.paper.cluster train [PATTERN...]    those that are not finished, without papermill, as far as --minutes allow
python -m cryo_lib.paper.cluster stages [STUDY...]     their stages in dvc.yaml, once all are finished; stops where one is not
python -m cryo_lib.paper.cluster data [STUDY...]       the stages that make what they train on
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from cryo_lib.networks import models, parallel, runs
from cryo_lib.networks.runs import Run, expand
from cryo_lib.paper import notebooks
from cryo_lib.paper.experiments import read_scale
from cryo_lib.stacks.dataset import Dataset

SCRATCH = Path(".scratch")


def tasks(params: dict[str, Any]) -> list[tuple[str, Run]]:
    """Every training of a scale (`experiments.read_scale`) as its study and run; its index is its number in the job array."""
    return [(name, run) for name, study in params["study"].items() for run in expand(study)]


def chosen(params: dict[str, Any], studies: list[str]) -> dict[int, tuple[str, Run]]:
    """The tasks of some studies, or of all where none is named, by their index; ValueError for a study that is none."""
    if unknown := sorted(set(studies) - set(params["study"])):
        raise ValueError(f"studies: expected some of {', '.join(params['study'])}, got {', '.join(unknown)}")
    return {i: task for i, task in enumerate(tasks(params)) if not studies or task[0] in studies}


def parameters(params: dict[str, Any], study: str, run: Run) -> dict[str, Any]:
    """What notebook 03 is run with for one training: what the stage of its study passes, but for one run alone."""
    of_particles = study in params["particle_studies"]
    variants = params["study"][study]["variants"]
    one = {"methods": [run.method], "experiments": [run.experiment], "seeds": [run.seed]}
    one["variants"] = {run.variant: variants[run.variant]} if run.variant else {}
    data, _ = folders(params, study)
    given = {"scale": params["scale"], "study": study, "dataset": data.name, "device": "auto"}
    settings = params["train"] | (params["particle_train"] if of_particles else {})
    if study in params["supplement_studies"]:
        settings = settings | {"on_failure": "record"}
    return given | settings | one


def settings_of(params: dict[str, Any], study: str, run: Run) -> runs.Settings:
    """The settings of one training, its variant's changes made."""
    given = parameters(params, study, run)
    settings = runs.Settings(**{name: given[name] for name in runs.Settings.__dataclass_fields__})
    return runs.varied(settings, run.variant, given["variants"])


def folders(params: dict[str, Any], study: str) -> tuple[Path, Path]:
    """Where a study's pairs lie, and where its runs go."""
    dataset = "ribosome" if study in params["particle_studies"] else "rnap"
    return Path("data", params["scale"], dataset), Path("runs", params["scale"], study)


def finished(params: dict[str, Any], study: str, run: Run) -> bool:
    """Whether a training has been made, by these very settings, data and code."""
    data, out = folders(params, study)
    return (data / "card.json").is_file() and runs.finished(run, settings_of(params, study, run), data, out)


def in_order(params: dict[str, Any], patterns: list[str]) -> list[tuple[str, Run]]:
    """The tasks whose folders, as `list` prints them, match the patterns (* is anything), pattern by pattern, each once.

    ValueError for a pattern that none matches.
    """
    names = {task: f"{task[0]}/{task[1].folder.as_posix()}" for task in tasks(params)}
    found: dict[tuple[str, Run], None] = {}
    for pattern in patterns or ["*"]:
        matching = [task for task, name in names.items() if fnmatchcase(name, pattern)]
        if not matching:
            raise ValueError(
                f"pattern: expected one of trainings such as {next(iter(names.values()))}, got {pattern!r}; see `list`"
            )
        found |= dict.fromkeys(matching)
    return list(found)


def work(params: dict[str, Any], patterns: list[str], minutes: float = math.inf, device: str = "auto") -> int:
    """Train what is not finished, in the order of the patterns, for so many minutes; how many trainings are left.

    The one under way when the time is up stops at its next line of metrics (so up to a line later), and goes on from there at the next call. A
    training that breaks, or has no data yet, is told of and counts as left; the others go on. RuntimeError under torchrun.
    """
    if parallel.size() > 1:
        raise RuntimeError("train: expected one process, got torchrun's several; use `run INDEX` under torchrun")
    until, left = time.monotonic() + 60 * minutes, 0
    for study, run in in_order(params, patterns):
        if finished(params, study, run):
            continue
        data, out = folders(params, study)
        settings, done = settings_of(params, study, run), None
        if time.monotonic() < until:
            print(f"{study}/{run.folder.as_posix()}", flush=True)
            try:
                done = runs.run(run, settings, data, out, SCRATCH, device, until=until)
            except (runs.TrainingError, FileNotFoundError) as error:
                print(f"error: {error}", file=sys.stderr, flush=True)
        if done:
            print(f"  PSNR {done['psnr']:.2f} dB, SSIM {done['ssim']:.3f}", flush=True)
            configuration = runs.configuration_of(run, settings, Dataset(data), models.pick_device(device))
            shutil.rmtree(runs.state_of(SCRATCH, configuration), ignore_errors=True)
        left += not done
    return left


def ranges(indices: list[int]) -> str:
    """Ascending integers as SLURM writes them: [0, 1, 2, 5] is "0-2,5"."""
    parts: list[list[int]] = []
    for i in indices:
        if parts and i == parts[-1][-1] + 1:
            parts[-1].append(i)
        else:
            parts.append([i])
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts)


def train(params: dict[str, Any], index: int) -> Path:
    """Run one training through notebook 03, going on where an interrupted one stopped; the executed notebook's path."""
    everything = tasks(params)
    if not 0 <= index < len(everything):
        raise ValueError(
            f"index: expected 0 to {len(everything) - 1}, the trainings of the scale {params['scale']!r}, got {index}"
        )
    study, run = everything[index]
    out = Path("executed", params["scale"], "cluster", f"{study}-{run.folder.as_posix().replace('/', '-')}.ipynb")
    return notebooks.run("notebooks/03_train_networks.ipynb", out, parameters(params, study, run), complete=True)


def stages(params: dict[str, Any], studies: list[str]) -> list[str]:
    """The `train...` stages of some studies, whose outputs are whole.

    Raises
    ------
    FileNotFoundError : trainings that are not finished, or not by these settings, data and code.
    ValueError : runs in the studies' folders that are in no grid; DVC would take them up.
    """
    wanted = chosen(params, studies)
    if missing := [i for i, task in wanted.items() if not finished(params, *task)]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(wanted)} trainings are not finished: {ranges(missing)}; submit them again"
        )
    folders = {Path("runs", params["scale"], study, run.folder) for study, run in wanted.values()}
    names = list(dict.fromkeys(study for study, _ in wanted.values()))
    found = {
        path.parent for name in names for path in Path("runs", params["scale"], name).rglob("generator.safetensors")
    }
    if strays := sorted(map(str, found - folders)):
        raise ValueError(
            f"expected the runs of the studies alone, got {len(strays)} others, the first {strays[0]}; remove them"
        )
    kinds = {"supplement_studies": "train_supplement", "particle_studies": "train_particles", "studies": "train"}
    return [
        f"{stage}@{params['scale']}-{name}" for name in names for key, stage in kinds.items() if name in params[key]
    ]


def data_stages(params: dict[str, Any], studies: list[str]) -> list[str]:
    """The stages that make what some studies train on."""
    of_particles = [study in params["particle_studies"] for study, _ in chosen(params, studies).values()]
    return ["projections"] * (not all(of_particles)) + ["pairs"] * any(of_particles)


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 when all went well."""
    parser = argparse.ArgumentParser(prog="python -m cryo_lib.paper.cluster", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("list", "missing", "stages", "data"):
        commands.add_parser(name).add_argument("studies", nargs="*")
    commands.add_parser("run").add_argument("index", type=int)
    piece = commands.add_parser("train")
    piece.add_argument("patterns", nargs="*", metavar="PATTERN")
    piece.add_argument("--minutes", type=float, default=math.inf)
    piece.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    try:
        params = read_scale("params.yaml")
        if options.command == "run":
            print(train(params, options.index))
        elif options.command == "train":
            left = work(params, options.patterns, options.minutes, options.device)
            print(f"{left} trainings left" + (": call again" if left else ""))
        elif options.command == "stages":
            print(*stages(params, options.studies))
        elif options.command == "data":
            print(*data_stages(params, options.studies))
        elif options.command == "missing":
            print(ranges([i for i, task in chosen(params, options.studies).items() if not finished(params, *task)]))
        else:
            for i, (study, run) in chosen(params, options.studies).items():
                print(
                    f"{i:4d}  {'finished' if finished(params, study, run) else '-':8s}  {study}/{run.folder.as_posix()}"
                )
    except (RuntimeError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
