"""One training as the pipeline runs it: its data, its card, where it goes on when interrupted; and a grid of them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from cryo_lib import checks
from cryo_lib.files import closure, cores, read_json, write_text
from cryo_lib.networks import models, parallel
from cryo_lib.networks.algorithm import Settings
from cryo_lib.networks.engine import Trainer, TrainingError
from cryo_lib.networks.losses import Method
from cryo_lib.simulate import contamination, noise
from cryo_lib.stacks.dataset import MEASURED, Dataset, Experiment

PRINT_EVERY = 10  # seconds between lines of progress
Scores = Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]]  # such as `evaluate.metrics.SCORES`


@dataclass(frozen=True)
class Run:
    """One training: a method on an experiment with a seed (initial weights, order of minibatches, contaminated pairs).

    `variant` names the changes of settings that the study makes for it; "" where it makes none.
    """

    method: str
    experiment: str
    seed: int
    variant: str = ""

    def __post_init__(self) -> None:
        target, experiment = Method.parse(self.method).target, Experiment.parse(self.experiment)
        if target != "reference" and experiment.kind != "none":
            raise ValueError(f"{self.method}: expected no contamination, since it sees no reference, got {experiment}")
        if target == "copy" and experiment.protocol == MEASURED:
            raise ValueError(
                f"{self.method}: expected simulated images, to add noise to twice, got {experiment}; try noise2void"
            )
        checks.integer("seed", self.seed, low=0)
        if not re.fullmatch("[a-z0-9_.]*", str(self.variant)) or str(self.variant).startswith((".", "seed")):
            raise ValueError(
                f"variant: expected a folder's name of a-z, 0-9, _ and dots, not like seed0, got {self.variant!r}"
            )

    @property
    def folder(self) -> Path:
        """Where the outputs lie below the study's folder: method/experiment/variant/seed, without the variant "" ."""
        return Path(self.method, self.experiment, self.variant, f"seed{self.seed}")


def expand(grid: Mapping[str, Any]) -> list[Run]:
    """The runs of `{methods, experiments, seeds, variants}`, seeds outermost: a first result of everything comes early.

    `variants` maps names to changes of the training settings; `{}` is one run as the settings are.
    """
    for name, values in grid.items():
        if len(set(values)) != len(values):
            raise ValueError(f"study: {name} are listed twice, got {values}")
    axes = grid["seeds"], grid["variants"] or [""], grid["experiments"], grid["methods"]
    return [Run(method, experiment, seed, variant) for seed, variant, experiment, method in product(*axes)]


class Job(NamedTuple):
    """A run with its settings, whose outputs go below `out`."""

    task: Run
    settings: Settings
    out: Path

    @property
    def folder(self) -> Path:
        """Where its outputs lie."""
        return self.out / self.task.folder


def varied(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """Settings with some of them changed; ValueError for what is no setting, or no value of one."""
    return Settings(**settings.model_dump() | changes)


def _validation(x: np.ndarray, y: np.ndarray, scores: Scores) -> Callable[[torch.nn.Module], dict[str, float]]:
    if len(x) < 2:
        raise ValueError(f"x_val: expected at least 2 images to watch the training on, got {len(x)}; raise n_val")
    spread = x.std(axis=0).mean()

    def validate(model: torch.nn.Module) -> dict[str, float]:
        x_hat = models.denoise_images(model, y)
        if not np.isfinite(x_hat).all():
            return dict.fromkeys([*scores, "spread"], math.nan)
        values = {name: float(score(x, x_hat).mean()) for name, score in scores.items()}
        return values | {"spread": float(x_hat.std(axis=0).mean() / spread)}

    return validate


@threadpool_limits.wrap(1, user_api="blas")  # NumPy's threads round otherwise, and wait for those of other processes
def run(
    task: Run,
    settings: Settings,
    data: Path,
    out: Path,
    scratch: Path,
    device: str = "auto",
    *,
    scores: Scores,
    quiet: bool = False,
    until: float = math.inf,
) -> dict[str, Any] | None:
    """Train one run: `generator.safetensors`, its card and `metrics.jsonl` below `out`; its last validation scores.

    The state, and the lines of metrics while it runs, live in `scratch` under a hash of the configuration, the data's
    digests and the code, so that a repeated call after any interruption goes on where it stopped, and never from the
    state of something else. How fast it was goes to `scratch`/speed.jsonl: what `out` holds is the same in every run.
    A line is printed every 10 s or so, unless `quiet`. Of several processes (torchrun) the first writes.

    Parameters
    ----------
    data : folder of a `stacks.dataset.Dataset`.
    scores : of the validation images.
    until : of `time.monotonic()`; a training that has not ended by then stops at its next line of metrics, to be gone
        on with, and None is returned.
    """
    chosen, dataset = models.pick_device(device), Dataset(Path(data))
    configuration = configuration_of(task, settings, dataset, chosen, scores)
    state, final = state_of(scratch, configuration), out / task.folder
    experiment = Experiment.parse(task.experiment)
    options = {
        name: getattr(settings, name) for name in ("noise", "unit", "batch_size", "jitter_degrees", "jitter_pixels")
    }
    target = Method.parse(task.method).target
    for name in ("redraw", "fresh_noise"):
        if settings.screen and getattr(settings, name):
            raise ValueError(
                f"screen: expected {name}: false, since each epoch would leave out other pairs; leave one away"
            )
    if settings.screen and target != "reference":
        raise ValueError(f"screen: expected false for {task.method}, which sees no reference; leave it away")
    if settings.fresh_noise and experiment.protocol == MEASURED:
        raise ValueError(f"fresh_noise: expected false for {experiment}, whose noise was measured; leave it away")

    def pairs(epoch: int) -> tuple[np.ndarray, np.ndarray]:
        fresh = [dataset.card["seed"], task.seed, epoch] if settings.fresh_noise and epoch else None
        draw = epoch if settings.redraw else 0
        x, y = dataset.training_pairs(experiment, task.seed, fresh, draw=draw, **options)
        if target == "copy":
            x = dataset.noisy(x, experiment, [dataset.card["seed"], task.seed, epoch if fresh else 0, 1])
        kept = contamination.screen(x, y) if settings.screen else slice(None)
        return x[kept], y[kept]

    printed = time.monotonic()

    def report(history: list[dict[str, Any]]) -> None:
        nonlocal printed
        _write_lines(state / "metrics.jsonl", history)
        if not quiet and time.monotonic() - printed > PRINT_EVERY:
            printed = time.monotonic()
            speed = trainer.speed()["images_per_s"]
            print(f"{_progress(final, history[-1], scores)}, {speed:.0f} images/s", flush=True)

    trainer, failure = Trainer(Method.parse(task.method), settings, pairs, task.seed, chosen), ""
    try:
        if not trainer.train(state / "state.pt", _validation(*dataset.pairs("val", experiment), scores), report, until):
            return None
    except TrainingError as error:
        if settings.on_failure == "stop":
            where = f"; its lines of metrics up to then are in {state}" if trainer.history else ""
            raise TrainingError(f"{task.folder}: {error}{where}") from error
        trainer.load_state(state / "state.pt")
        failure = str(error)
    line = trainer.history[-1]
    last = {name: line[name] for name in scores}
    _, y = dataset.pairs("train", experiment)
    network = {"architecture": settings.architecture, "image_size": y.shape[-1], "width": settings.width}
    mean, sd = (float(values.mean()) for values in noise.background(y[:256]))
    seen = {"pixel_size": configuration["data"]["pixel_size"], "background": {"mean": mean, "sd": sd}}
    failure = failure or trainer.collapse(line["spread"])
    card = network | seen | {"validation": last} | ({"failed": failure} if failure else {}) | configuration

    def write() -> None:
        _write_lines(final / "metrics.jsonl", trainer.history)
        models.save(final / "generator.safetensors", trainer.kept, card)
        with (scratch / "speed.jsonl").open("a") as file:
            file.write(json.dumps({"run": final.as_posix()} | trainer.speed()) + "\n")

    parallel.from_first(write)
    return last


def _write_lines(path: Path, history: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(line) + "\n" for line in history))


def configuration_of(
    task: Run, settings: Settings, dataset: Dataset, device: torch.device, scores: Scores
) -> dict[str, Any]:
    """All that a run's result depends on, as its card holds it: the data and the code by their digests.

    Torch is told by its version without the build (+cpu, +cu130), which on the CPU changes nothing.
    """
    modules = sorted({__name__, *(score.__module__ for score in scores.values())})
    named = {name: score.__qualname__ for name, score in scores.items()}
    source = _digest(f"import {', '.join(modules)}\n{named}")
    code = {"torch": torch.__version__.partition("+")[0], "device": device.type, "source": source}
    return {"run": asdict(task), "settings": settings.model_dump(), "data": dataset.card, "code": code}


@cache
def _digest(source: str) -> str:
    """Of the closure of some code, taken once: as it was when this process began to train."""
    return hashlib.sha256(closure(source).encode()).hexdigest()


def finished(task: Run, settings: Settings, data: Path, out: Path, scores: Scores) -> bool:
    """Whether `out` holds the generator of this very configuration, whatever device and version of torch trained it."""
    path = out / task.folder / "generator.json"
    if not (path.is_file() and path.with_suffix(".safetensors").is_file()):
        return False
    card = read_json(path)
    wanted = configuration_of(task, settings, Dataset(data), torch.device("cpu"), scores)
    wanted["code"] = card.get("code", {}) | {"source": wanted["code"]["source"]}
    return all(card.get(name) == value for name, value in wanted.items())


def state_of(scratch: Path, configuration: dict[str, Any]) -> Path:
    """The folder of the state of an unfinished training of this configuration."""
    return scratch / hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """So many threads for torch, then as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def side_by_side(workers: int, threads: int) -> ProcessPoolExecutor:
    """A pool of processes to train in, of so many threads each.

    They end at once where they are interrupted, and where the process that started them has ended.
    """
    return ProcessPoolExecutor(workers, get_context("spawn"), _begin, (threads,))


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def leave() -> None:
        connection.wait([parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()


def _progress(folder: Path, line: dict[str, Any], scores: Iterable[str]) -> str:
    return f"{folder}: {line['progress']:.0%}, {_said(line, scores)}"


def _said(values: Mapping[str, float], scores: Iterable[str]) -> str:
    return ", ".join(f"{name} {values[name]:.4g}" for name in scores)


def run_grid(
    jobs: Iterable[Job], data: Path, scratch: Path, device: str = "auto", *, scores: Scores, workers: int = 0
) -> None:
    """Train many runs: side by side on the CPU's cores, or one after another in this process; so on a GPU or several.

    A run that is finished already is left as it is. A line is printed as each one ends. Their states in `scratch` are
    removed when all have succeeded. Where torchrun started this process and others, all work on one run at a time.

    Parameters
    ----------
    data, scratch, device, scores : as `run`.
    workers : runs at a time on the CPU; 0: one a core. Each has one thread; those of fewer jobs than cores have more.

    Raises
    ------
    ValueError : `workers` is below 0, or two jobs would write the same run; before anything is trained.
    TrainingError : a run failed; what the others reached is kept in `scratch`.
    """
    given, chosen, workers = list(jobs), models.pick_device(device), checks.integer("workers", workers, low=0)
    data, scratch, places = Path(data), Path(scratch), [job.folder for job in given]
    if twice := sorted({str(place) for place in places if places.count(place) > 1}):
        raise ValueError(f"jobs: expected each run once, got {twice[0]} several times; leave one away")
    waiting = parallel.from_first(
        lambda: [job for job in given if not finished(job.task, job.settings, data, job.out, scores)]
    )
    alone = chosen.type != "cpu" or parallel.size() > 1 or not waiting
    workers = 1 if alone else min(len(waiting), workers or cores())
    if parallel.rank() == 0:
        together = f"{workers} at a time" if parallel.size() == 1 else f"by {parallel.size()} processes together"
        before = f", {len(given) - len(waiting)} finished before" if len(given) > len(waiting) else ""
        print(f"{len(waiting)} runs{before} on {_name(chosen)}, {together}; torch {torch.__version__}", flush=True)
    dataset = Dataset(data)
    states = {
        job.folder: state_of(scratch, configuration_of(job.task, job.settings, dataset, chosen, scores))
        for job in given
    }
    arguments = {job.folder: (job.task, job.settings, data, job.out, scratch, str(chosen)) for job in waiting}
    started = time.perf_counter()
    # of all that are given: sums, and so results, depend on it
    threads = torch.get_num_threads() if alone else max(1, cores() // len(given))
    if workers > 1:
        with side_by_side(workers, threads) as pool:
            futures = {pool.submit(run, *a, scores=scores, quiet=True): folder for folder, a in arguments.items()}
            try:
                _report(_finished(futures, states, scores), len(waiting), started)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    else:
        with _threads(threads):
            ended = ((folder, run(*a, scores=scores)) for folder, a in arguments.items())
            _report(ended, len(waiting), started)
    if parallel.rank() == 0:
        for state in states.values():
            shutil.rmtree(state, ignore_errors=True)


def _finished(
    futures: dict[Future, Path], states: dict[Path, Path], scores: Scores
) -> Iterator[tuple[Path, dict[str, float]]]:
    """Runs as they end; while none does, a line every 10 s on those under way, from their metrics on disk."""
    pending = set(futures)
    while pending:
        done, pending = wait(pending, PRINT_EVERY, FIRST_COMPLETED)
        yield from ((futures[future], future.result()) for future in done)
        if not done:
            lines = {folder: states[folder] / "metrics.jsonl" for folder in map(futures.get, pending)}
            begun = {folder: path.read_text().splitlines()[-1] for folder, path in lines.items() if path.is_file()}
            lines = [f"  {_progress(folder, json.loads(line), scores)}" for folder, line in begun.items()]
            print(*lines, sep="\n", flush=True)


def _report(finished: Iterable[tuple[Path, dict[str, float]]], total: int, started: float) -> None:
    for i, (folder, values) in enumerate(finished, 1):
        seconds = time.perf_counter() - started
        if parallel.rank() == 0:
            print(f"[{i}/{total}, {seconds:5.0f} s] {folder}: {_said(values, values)}", flush=True)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"the CPU ({cores()} cores)"
