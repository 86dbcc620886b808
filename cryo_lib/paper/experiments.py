"""What is computed at a scale: parameter files, experiments, and the grid of training runs they expand to."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from cryo_lib.networks.runs import Run, expand
from cryo_lib.simulate.noise import PROTOCOLS
from cryo_lib.stacks.dataset import MEASURED, Experiment

KEYS = {
    "scale",
    "structure",
    "data",
    "baselines",
    "studies",
    "supplement_studies",
    "study",
    "train",
    "export",
    "reconstruct",
    "relion",
    "assign",
    "particles",
    "pairs",
    "particle_studies",
    "particle_train",
    "denoise",
    "weights",
}


def expected_runs(params: dict[str, Any], names: list[str], folder: Path) -> dict[Path, Run]:
    """The folder of every run of the studies `names` below `folder`, and the run; FileNotFoundError where one was not trained."""
    expected = {folder / name / run.folder: run for name in names for run in expand(params["study"][name])}
    gaps = [str(path) for path in expected if not (path / "generator.safetensors").is_file()]
    if gaps:
        raise FileNotFoundError(
            f"{len(gaps)} of {len(expected)} runs are missing, the first {gaps[0]}: run `dvc repro` for them"
        )
    return expected


def read_scale(path: str | Path) -> dict[str, Any]:
    """Read a parameter file (`params.yaml`, `scales/*.yaml`) and check it: its keys, its studies, its experiments.

    Raises
    ------
    FileNotFoundError, ValueError : no such file, not YAML, a key missing or unknown, an unknown method or experiment.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"parameters: expected the file {path}, found nothing; copy one of scales/*.yaml there")
    try:
        params = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"parameters {path}: not valid YAML: {error}") from error
    try:
        if wrong := sorted(KEYS ^ set(params)):
            raise ValueError(f"expected the sections {', '.join(sorted(KEYS))}; missing or unknown: {', '.join(wrong)}")
        listed = params["studies"] + params["supplement_studies"] + params["particle_studies"]
        if listed != list(params["study"]):
            raise ValueError(
                f"the lists of studies hold {listed}, expected the entries of study: {list(params['study'])}"
            )
        for name, study in params["study"].items():
            of_particles = name in params["particle_studies"]
            for run in expand(study):
                if (Experiment.parse(run.experiment).protocol == MEASURED) != of_particles:
                    wanted = f"{MEASURED}-..." if of_particles else f"one of {', '.join(PROTOCOLS)}"
                    raise ValueError(f"study {name}: expected the noise {wanted}, got {run.experiment}")
        for name in params["baselines"]["baseline_experiments"]:
            Experiment.parse(name)
        trained = {f"{study}/{run.folder}" for study, grid in params["study"].items() for run in expand(grid)}
        if missing := [name for name in _used(params) if name not in trained]:
            names = ", ".join(missing)
            raise ValueError(
                f"export, assign, denoise and weights use runs that no study makes: {names}; add them to a study"
            )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"parameters {path}: {error}") from error
    return params


def _used(params: dict[str, Any]) -> Iterator[str]:
    """The runs, `study/method/experiment/seed`, that the sections `export`, `assign`, `denoise` and `weights` ask for."""
    export, assign = params["export"], params["assign"]
    halves = [f"{name}-half{half}" for name in export["stack_halves"] for half in (1, 2)]
    for name in (*export["stack_runs"], *halves):
        yield f"{name}/seed{export['training_seed']}"
    for method in assign["view_methods"]:
        for seed in assign["training_seeds"]:
            yield f"{assign['view_study']}/{method}/{assign['view_experiment']}/seed{seed}"
    for checkpoints in params["denoise"].values():
        for path in filter(None, checkpoints.values()):
            yield str(Path(path).parent.relative_to(f"runs/{params['scale']}"))
    weights = params["weights"]
    for seed in params["study"].get(weights["weights_study"], {}).get("seeds") or [0]:
        yield f"{weights['weights_study']}/{weights['weights_method']}/{weights['weights_experiment']}/seed{seed}"


def differing_keys(a: Any, b: Any, where: str = "") -> Iterator[str]:
    """Dotted names of the keys that only one of two nested dictionaries has; lists, values and what `variants` holds may differ."""
    if not (isinstance(a, dict) and isinstance(b, dict)) or where.endswith(".variants."):
        return
    for key in sorted(set(a) ^ set(b)):
        yield f"{where}{key}"
    for key in sorted(set(a) & set(b)):
        yield from differing_keys(a[key], b[key], f"{where}{key}.")


if __name__ == "__main__":
    try:
        scale = read_scale("params.yaml")
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    runs = {name: len(expand(study)) for name, study in scale["study"].items()}
    print(
        f"Scale {scale['scale']!r}: {sum(runs.values())} trainings ({', '.join(f'{n} {name}' for name, n in runs.items())})"
    )
