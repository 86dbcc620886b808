"""What is computed at a scale: parameter files, experiments, and the grid of training runs they expand to."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from cryo_lib.networks.runs import Job, Run, Settings, expand, varied
from cryo_lib.simulate.noise import PROTOCOLS
from cryo_lib.stacks.dataset import MEASURED, Experiment

KEYS = {*"scale structure data baselines posterior classes screening studies supplement_studies".split()}
KEYS |= {*"particle_studies kinds study train export reconstruct relion assign particles pairs denoise".split()}
KEYS |= {*"junk noises weights".split()}
GRID = ("methods", "experiments", "seeds", "variants")
# What studies train on: the stage that makes it, and that which trains on it.
DATASETS = {"rnap": ("projections", "train"), "ribosome": ("pairs", "train_particles")}


def grid(study: dict[str, Any]) -> list[Run]:
    """The runs of a study of a parameter file; ValueError for a key that is missing or unknown."""
    if set(study) != {*(keys := ("dataset", "changes", *GRID))}:
        raise ValueError(f"study: expected the keys {', '.join(keys)}, got {', '.join(sorted(study))}")
    return expand({key: study[key] for key in GRID})


def settings_of(params: dict[str, Any], name: str, run: Run) -> Settings:
    """The settings of one training of a study: the scale's, changed by the study and then by the run's variant.

    ValueError for a variant that the study has not, or that is no change of settings.
    """
    study = params["study"][name]
    settings, variants = varied(varied(Settings(), params["train"]["settings"]), study["changes"]), study["variants"]
    if run.variant not in ("", *variants):
        named = f"variant {run.variant!r}: expected its changes of settings in `variants`"
        raise ValueError(f"{named}, which has {list(variants) or 'none'}")
    try:
        return varied(settings, variants.get(run.variant, {}))
    except ValueError as error:
        raise ValueError(f"variants: {error}") from error


def of_dataset(study: dict[str, Any], dataset: str) -> dict[str, Any]:
    """The studies on a data set, each with all of its keys; ValueError where there is none.

    One that leaves them away is on this data set, of seed 0, and changes no settings.
    """
    left_out = {"dataset": dataset, "seeds": [0], "changes": {}, "variants": {}}
    found = {name: left_out | each for name, each in study.items() if each.get("dataset", dataset) == dataset}
    if not found:
        raise ValueError(f"study: expected one on the data set {dataset!r}, got {study}; name the data set of one")
    return found


def jobs(params: dict[str, Any], name: str) -> list[Job]:
    """The trainings of a study, as `runs.run_grid` takes them; what of `params` it needs is scale, train and study."""
    out = Path("runs", params["scale"], name)
    return [Job(run, settings_of(params, name, run), out) for run in grid(params["study"][name])]


def expected_runs(params: dict[str, Any], names: list[str], folder: Path) -> dict[Path, Run]:
    """The folder of every run of some studies below `folder`, and the run; FileNotFoundError where one is missing."""
    expected = {folder / name / run.folder: run for name in names for run in grid(params["study"][name])}
    if gaps := [path for path in expected if not (path / "generator.safetensors").is_file()]:
        counted = f"{len(gaps)} of {len(expected)} runs are missing"
        raise FileNotFoundError(f"{counted}, the first {gaps[0]}: run `dvc repro` for them")
    return expected


def read_scale(path: str | Path) -> dict[str, Any]:
    """Read a parameter file (`params.yaml`, `scales/*.yaml`) and check it: keys, studies, experiments, settings.

    Raises
    ------
    FileNotFoundError, ValueError : no such file, not YAML, a key missing or unknown, a bad method, experiment, setting.
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
            expected = ", ".join(sorted(KEYS))
            raise ValueError(f"expected the sections {expected}; missing or unknown: {', '.join(wrong)}")
        listed, entries = params["studies"] + params["particle_studies"], list(params["study"])
        if listed != entries:
            raise ValueError(f"the lists of studies hold {listed}, expected the entries of study: {entries}")
        if strays := set(params["supplement_studies"]) - set(params["studies"]):
            raise ValueError(f"supplement_studies: expected some of studies, got {', '.join(sorted(strays))}")
        for name, study in params["study"].items():
            _check_study(name, study, params)
        posterior = params["posterior"]
        without = params["baselines"]["baseline_experiments"] + posterior["bound_experiments"]
        without += params["classes"]["class_experiments"]
        stacks = params["export"]["stack_references"] + params["export"]["stack_reference_halves"]
        for name in (*without, *posterior["posterior_experiments"], *stacks):
            Experiment.parse(name)
        trained = {f"{study}/{run.folder}" for study, entry in params["study"].items() for run in grid(entry)}
        if missing := [name for name in _used(params) if name not in trained]:
            used = "export, assign, denoise, junk, noises and weights use runs that no study makes"
            raise ValueError(f"{used}: {', '.join(missing)}; add them to a study")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"parameters {path}: {error}") from error
    return params


def _check_study(name: str, study: dict[str, Any], params: dict[str, Any]) -> None:
    of_particles = name in params["particle_studies"]
    for run in grid(study):
        settings_of(params, name, run)
        if (Experiment.parse(run.experiment).protocol == MEASURED) != of_particles:
            wanted = f"{MEASURED}-..." if of_particles else f"one of {', '.join(PROTOCOLS)}"
            raise ValueError(f"study {name}: expected the noise {wanted}, got {run.experiment}")
    if study["dataset"] != (wanted := "ribosome" if of_particles else "rnap"):
        raise ValueError(f"study {name}: expected the dataset {wanted}, got {study['dataset']!r}")


def _used(params: dict[str, Any]) -> Iterator[str]:
    """The runs, `study/method/experiment/seed`, that other blocks of a parameter file ask for."""
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
    junk = params["junk"]
    for method in junk["junk_methods"]:
        yield f"table1/{method}/{junk['junk_experiments'][0]}/seed{junk['training_seed']}"
    noises = params["noises"]
    for seed in noises["training_seeds"]:
        for run in ("ours/l2_ae", *(f"table1/{method}" for method in noises["noises_methods"])):
            yield f"{run}/{noises['noises_experiment']}/seed{seed}"
    weights = params["weights"]
    for seed in params["study"].get(weights["weights_study"], {}).get("seeds") or [0]:
        yield f"{weights['weights_study']}/{weights['weights_method']}/{weights['weights_experiment']}/seed{seed}"


def differing_keys(a: Any, b: Any, where: str = "") -> Iterator[str]:
    """Dotted names of the keys that only one of two nested dictionaries has, but for settings and changes of them."""
    if not (isinstance(a, dict) and isinstance(b, dict)) or where.endswith((".variants.", ".changes.", ".settings.")):
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
    counts = {name: len(grid(study)) for name, study in scale["study"].items()}
    listed = ", ".join(f"{n} {name}" for name, n in counts.items())
    print(f"Scale {scale['scale']!r}: {sum(counts.values())} trainings ({listed})")
