"""What is computed at a scale: parameter files, experiments, and the grid of training runs they expand to."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cryo_lib import checks, contamination, imaging
from cryo_lib.losses import METHODS

SPLITS = ("train", "val", "test")
MEASURED = "measured"  # the protocol of images that are noisy as they were taken
KEYS = {
    "scale", "structure", "data", "baselines", "studies", "supplement_studies", "study", "train",
    "export", "reconstruct", "relion", "assign",
    "particles", "pairs", "particle_studies", "particle_train", "denoise", "weights",
}  # fmt: skip


@dataclass(frozen=True)
class Experiment:
    """A noise protocol, an SNR and a contamination, written `protocol-snr-contamination` such as `awgn-0.1-A_0.3`.

    `awgn-0.1-none-half1` and `-half2` train on disjoint halves of the pairs. Real particles have their own noise: there it
    is `measured-contamination`, such as `measured-none`.

    Attributes
    ----------
    protocol : "awgn" (Eq. 1 as printed), "clipped" (the noisy image clipped to [0, 1], as the authors' scripts), or
        "measured" (the noisy images of the data set itself).
    snr : Var(signal) / Var(noise) of each image, > 0; None for measured images.
    kind, eps : contamination of the fraction `eps` of the training pairs, Eq. (2), a key of `contamination.KINDS` or
        `contamination.HARDER`; "none" and 0 without. Those of `contamination.PROJECTED` need simulated images.
    half : 1 or 2, every other training pair from the first or the second on; 0, all of them.
    """

    protocol: str
    snr: float | None
    kind: str = "none"
    eps: float = 0.0
    half: int = 0

    def __post_init__(self) -> None:
        checks.choice("protocol", self.protocol, (*imaging.PROTOCOLS, MEASURED))
        if self.protocol != MEASURED:
            checks.number("snr", self.snr, above=0)
        elif self.snr is not None:
            raise ValueError(f"snr: expected None, since {MEASURED} images have their own noise, got {self.snr}")
        checks.choice("contamination", self.kind, ("none", *contamination.KINDS, *contamination.HARDER))
        if self.protocol == MEASURED and self.kind in contamination.PROJECTED:
            raise ValueError(f"contamination: {self.kind} projects references anew, which {MEASURED} images do not allow; use simulated ones")
        if self.protocol == "clipped" and self.kind == "I":
            raise ValueError("contamination: I adds ice to noisy images, after which clipped ones would leave [0, 1]; use awgn")
        checks.number("eps", self.eps, low=0, high=1)
        checks.choice("half", self.half, (0, 1, 2))

    @classmethod
    def parse(cls, text: str) -> Experiment:
        """Read `protocol-snr-contamination`, `-half1` or `-half2` after it; ValueError names what is wrong."""
        match = re.fullmatch(r"([a-z]+)(?:-([0-9.]+))?-(?:none|([A-Z])_([0-9.]+))(?:-half([12]))?", str(text))
        if not match or (match[2] is None) != (match[1] == MEASURED):
            raise ValueError(
                "experiment: expected protocol-snr-contamination such as awgn-0.1-none, awgn-0.05-A_0.3 or, of particles, "
                f"{MEASURED}-none (-half1 or -half2 after it), got {text!r}"
            )
        protocol, snr, kind, eps, half = match.groups()
        try:
            experiment = cls(protocol, float(snr) if snr else None, kind or "none", float(eps or 0), int(half or 0))
        except ValueError as error:
            raise ValueError(f"experiment {text!r}: {error}") from error
        if str(experiment) != text:
            raise ValueError(f"experiment: expected the form {str(experiment)!r}, got {text!r}; names are keys, so one form is valid")
        return experiment

    def __str__(self) -> str:
        kind = "none" if self.kind == "none" else f"{self.kind}_{self.eps:g}"
        noise = self.protocol if self.snr is None else f"{self.protocol}-{self.snr:g}"
        return f"{noise}-{kind}" + (f"-half{self.half}" if self.half else "")

    def contaminated(self, x: Any, y: Any, seed: int, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        """The training pairs after contamination, Eq. (2); `options` are those of `contamination.contaminate`."""
        if self.kind == "none":
            return x, y
        return contamination.contaminate(x, y, self.kind, self.eps, seed, **options)[:2]


@dataclass(frozen=True)
class Dataset:
    """The images of a scale, as notebook 01 (simulated) or 10 (particles) writes them.

    `volumes.npy`, `x_{train,val,test}.npy`, `poses.npz`, `card.json`; of particles also `y_{train,val,test}.npy`.

    Attributes
    ----------
    folder : where they lie; FileNotFoundError, when something is read, where they do not.
    """

    folder: Path

    @property
    def card(self) -> dict[str, Any]:
        """Image size, pixel size (A), resolution (A), the data's seed, and the digests of the images."""
        return json.loads(self._file("card.json").read_text())

    @property
    def poses(self) -> dict[str, np.ndarray]:
        """`<split>_rotations` `(n, 3, 3)`; simulated: `<split>_conformations` `(n,)`; particles: `<split>_rows` `(n,)`."""
        return dict(np.load(self._file("poses.npz")))

    @property
    def volumes(self) -> np.ndarray:
        """The density of each conformation, `(conformations, n, n, n)` float32."""
        return np.load(self._file("volumes.npy"))

    def clean(self, split: str) -> np.ndarray:
        """The references of a split, `(n, h, w)` float32 in [0, 1], mapped from their file."""
        return np.load(self._file(f"x_{checks.choice('split', split, SPLITS)}.npy"), mmap_mode="c")

    def pairs(self, split: str, experiment: Experiment) -> tuple[np.ndarray, np.ndarray]:
        """References and noisy images of a split, Eq. (1): the same for every run, with noise of its own for each split.

        Of the training split, the half that the experiment asks for.
        """
        x = self.clean(split)
        if experiment.protocol == MEASURED:
            y = np.load(self._file(f"y_{split}.npy"), mmap_mode="c")
        else:
            seed = len(SPLITS) * self.card["seed"] + SPLITS.index(split)
            y = imaging.add_noise(x, experiment.snr, seed, experiment.protocol)
        kept = _kept(split, experiment)
        return x[kept], y[kept]

    def views(self, split: str, experiment: Experiment) -> contamination.Views:
        """What the references of `pairs(split, experiment)` were projected from; simulated images only."""
        poses, kept = self.poses, _kept(split, experiment)
        return contamination.Views(self.volumes, poses[f"{split}_rotations"][kept], poses[f"{split}_conformations"][kept])

    def _file(self, name: str) -> Path:
        path = Path(self.folder, name)
        if not path.is_file():
            raise FileNotFoundError(
                f"data: expected {path}, found nothing; make it with `dvc repro projections` (notebooks 00 and 01), or, for "
                "particles and their measured noise, with notebook 10"
            )
        return path


def _kept(split: str, experiment: Experiment) -> slice:
    """Which images of a split the experiment takes: of the training split, the half that it asks for."""
    return slice(experiment.half - 1, None, 2) if experiment.half and split == "train" else slice(None)


@dataclass(frozen=True)
class Run:
    """One training: a method on an experiment with a seed (initial weights, minibatch order, choice of contaminated pairs).

    `variant` names the changes of settings that the study makes for it; "" where it makes none.
    """

    method: str
    experiment: str
    seed: int
    variant: str = ""

    def __post_init__(self) -> None:
        checks.choice("method", self.method, METHODS)
        Experiment.parse(self.experiment)
        checks.integer("seed", self.seed, low=0)
        if not re.fullmatch("[a-z0-9_.]*", str(self.variant)) or str(self.variant).startswith((".", "seed")):
            raise ValueError(f"variant: expected a name of a-z, 0-9, _ and dots, not like seed0, got {self.variant!r}; it names a folder")

    @property
    def folder(self) -> Path:
        """Where the run's outputs lie below its study's folder: method/experiment/variant/seed, without the variant "" ."""
        return Path(self.method, self.experiment, self.variant, f"seed{self.seed}")


def expected_runs(params: dict[str, Any], names: list[str], folder: Path) -> dict[Path, Run]:
    """The folder of every run of the studies `names` below `folder`, and the run; FileNotFoundError where one was not trained."""
    expected = {folder / name / run.folder: run for name in names for run in expand(params["study"][name])}
    gaps = [str(path) for path in expected if not (path / "generator.safetensors").is_file()]
    if gaps:
        raise FileNotFoundError(f"{len(gaps)} of {len(expected)} runs are missing, the first {gaps[0]}: run `dvc repro` for them")
    return expected


def expand(study: dict[str, Any]) -> list[Run]:
    """The runs of a study `{methods, experiments, seeds, variants}`, seeds outermost: a first result of everything comes early.

    `variants` maps names to changes of the training settings; `{}` is one run as the settings are.
    """
    if set(study) != {"methods", "experiments", "seeds", "variants"}:
        raise ValueError(f"study: expected the keys methods, experiments, seeds and variants, got {', '.join(sorted(study))}")
    for name, values in study.items():
        if len(set(values)) != len(values):
            raise ValueError(f"study: {name} are listed twice, got {values}")
    return [
        Run(method, experiment, seed, variant)
        for seed in study["seeds"]
        for variant in study["variants"] or [""]
        for experiment in study["experiments"]
        for method in study["methods"]
    ]


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
            raise ValueError(f"the lists of studies hold {listed}, expected the entries of study: {list(params['study'])}")
        for name, study in params["study"].items():
            of_particles = name in params["particle_studies"]
            for run in expand(study):
                if (Experiment.parse(run.experiment).protocol == MEASURED) != of_particles:
                    wanted = f"{MEASURED}-..." if of_particles else f"one of {', '.join(imaging.PROTOCOLS)}"
                    raise ValueError(f"study {name}: expected the noise {wanted}, got {run.experiment}")
        for name in params["baselines"]["baseline_experiments"]:
            Experiment.parse(name)
        trained = {f"{study}/{run.folder}" for study, grid in params["study"].items() for run in expand(grid)}
        if missing := [name for name in _used(params) if name not in trained]:
            names = ", ".join(missing)
            raise ValueError(f"export, assign, denoise and weights use runs that no study makes: {names}; add them to a study")
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
    print(f"Scale {scale['scale']!r}: {sum(runs.values())} trainings ({', '.join(f'{n} {name}' for name, n in runs.items())})")
