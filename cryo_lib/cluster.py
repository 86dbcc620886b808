"""The trainings of a scale one by one, as the tasks of a cluster's job array: papermill alone, without DVC and its lock.

python -m cryo_lib.cluster list [STUDY...]       every training, its index, and whether it is finished
python -m cryo_lib.cluster missing [STUDY...]    the indices of those that are not, as `sbatch --array` takes them
python -m cryo_lib.cluster run INDEX             one training
python -m cryo_lib.cluster stages [STUDY...]     their stages in dvc.yaml, once all are finished; stops where one is not
python -m cryo_lib.cluster data [STUDY...]       the stages that make what they train on
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from cryo_lib import notebooks, training
from cryo_lib.experiments import Run, expand, read_scale


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
    given = {"scale": params["scale"], "study": study, "dataset": "ribosome" if of_particles else "rnap", "device": "auto"}
    settings = params["train"] | (params["particle_train"] if of_particles else {})
    if study in params["supplement_studies"]:
        settings = settings | {"on_failure": "record"}
    return given | settings | one


def finished(params: dict[str, Any], study: str, run: Run) -> bool:
    """Whether a training has been made, by these very settings, data and code."""
    given = parameters(params, study, run)
    data = Path("data", params["scale"], given["dataset"])
    if not (data / "card.json").is_file():
        return False
    settings = training.Settings(**{name: given[name] for name in training.Settings.__dataclass_fields__})
    return training.finished(run, training.varied(settings, run.variant, given["variants"]), data, Path("runs", params["scale"], study))


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
        raise ValueError(f"index: expected 0 to {len(everything) - 1}, the trainings of the scale {params['scale']!r}, got {index}")
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
        raise FileNotFoundError(f"{len(missing)} of {len(wanted)} trainings are not finished: {ranges(missing)}; submit them again")
    folders = {Path("runs", params["scale"], study, run.folder) for study, run in wanted.values()}
    names = list(dict.fromkeys(study for study, _ in wanted.values()))
    found = {path.parent for name in names for path in Path("runs", params["scale"], name).rglob("generator.safetensors")}
    if strays := sorted(map(str, found - folders)):
        raise ValueError(f"expected the runs of the studies alone, got {len(strays)} others, the first {strays[0]}; remove them")
    kinds = {"supplement_studies": "train_supplement", "particle_studies": "train_particles", "studies": "train"}
    return [f"{stage}@{params['scale']}-{name}" for name in names for key, stage in kinds.items() if name in params[key]]


def data_stages(params: dict[str, Any], studies: list[str]) -> list[str]:
    """The stages that make what some studies train on."""
    of_particles = [study in params["particle_studies"] for study, _ in chosen(params, studies).values()]
    return ["projections"] * (not all(of_particles)) + ["pairs"] * any(of_particles)


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 when all went well."""
    parser = argparse.ArgumentParser(prog="python -m cryo_lib.cluster", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("list", "missing", "stages", "data"):
        commands.add_parser(name).add_argument("studies", nargs="*")
    commands.add_parser("run").add_argument("index", type=int)
    options = parser.parse_args(arguments)
    try:
        params = read_scale("params.yaml")
        if options.command == "run":
            print(train(params, options.index))
        elif options.command == "stages":
            print(*stages(params, options.studies))
        elif options.command == "data":
            print(*data_stages(params, options.studies))
        elif options.command == "missing":
            print(ranges([i for i, task in chosen(params, options.studies).items() if not finished(params, *task)]))
        else:
            for i, (study, run) in chosen(params, options.studies).items():
                print(f"{i:4d}  {'finished' if finished(params, study, run) else '-':8s}  {study}/{run.folder.as_posix()}")
    except (notebooks.NotebookError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
