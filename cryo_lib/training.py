"""Algorithm 1: one loop for every method; device, checkpoint and resume, and a grid of runs side by side."""

from __future__ import annotations

import hashlib
import json
import math
import resource
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cryo_lib import checks, contamination, experiments, imaging, losses, metrics, models, pggan
from cryo_lib.experiments import Dataset, Experiment, Run
from cryo_lib.files import atomic, write_text


PRINT_EVERY = 10  # seconds between lines of progress


@dataclass(frozen=True)
class Settings:
    """Everything Algorithm 1 leaves to choose; what the paper states is the default.

    Attributes
    ----------
    architecture, width : a key of `models.GENERATORS`, and the channels of its first level.
    epochs : passes over the training pairs. batch_size : m, pairs a minibatch.
    k_d, k_g : discriminator and generator updates on each minibatch; an autoencoder makes the same k_g updates.
    eta_d, eta_g : Adam's learning rates. beta1, beta2 : Adam's moment decays.
    decay : share of the training, at its end, over which the learning rates fall linearly to 0; 0 is the paper's, constant.
    lam : weight of the reconstruction loss. mu : weight of WGAN's gradient penalty.
    reconstruction_reduction, adversarial_reduction : "mean" or "sum" over an image's pixels, and over its patch scores.
    noise, unit, redraw, jitter_degrees, jitter_pixels : of the contamination (see `contamination.contaminate`); redraw gives
        fresh noise every epoch.
    log_every : iterations between two lines of metrics and checkpoints.
    calibration : noisy images that batch norm's statistics are taken from before each evaluation; 0 keeps its moving averages.
    on_failure : "stop" raises `TrainingError`; "record" is for experiments on where training breaks: metrics begin with a line
        at iteration 0, a collapsed generator is trained on, and a loss that is not finite ends the run at the last line's
        state; the card's `failed` says which, where the run ends so.
    """

    architecture: str = "resnet"
    width: int = 64
    epochs: int = 20
    batch_size: int = 20
    k_d: int = 1
    k_g: int = 2
    eta_d: float = 1e-3
    eta_g: float = 1e-2
    beta1: float = 0.5
    beta2: float = 0.999
    decay: float = 0.0
    lam: float = 10.0
    mu: float = 10.0
    reconstruction_reduction: str = "mean"
    adversarial_reduction: str = "mean"
    noise: str = "gaussian"
    unit: str = "sample"
    redraw: bool = False
    jitter_degrees: float = 10.0
    jitter_pixels: float = 1.0
    log_every: int = 250
    calibration: int = 200
    on_failure: str = "stop"

    def __post_init__(self) -> None:
        checks.choice("architecture", self.architecture, models.GENERATORS)
        for name in ("width", "epochs", "batch_size", "k_d", "k_g", "log_every"):
            checks.integer(name, getattr(self, name), low=1)
        for name in ("eta_d", "eta_g"):
            checks.number(name, getattr(self, name), above=0)
        checks.integer("calibration", self.calibration, low=0)
        checks.number("decay", self.decay, low=0, high=1)
        for name in ("lam", "mu", "jitter_degrees", "jitter_pixels"):
            checks.number(name, getattr(self, name), low=0)
        for name in ("beta1", "beta2"):
            checks.number(name, getattr(self, name), low=0, high=0.999999)
        for name in ("reconstruction_reduction", "adversarial_reduction"):
            checks.choice(name, getattr(self, name), ("mean", "sum"))
        checks.choice("noise", self.noise, contamination.NOISES)
        checks.choice("unit", self.unit, contamination.UNITS)
        checks.choice("redraw", self.redraw, (False, True))
        checks.choice("on_failure", self.on_failure, ("stop", "record"))


class TrainingError(RuntimeError):
    """Training cannot go on: a loss is not finite, or the generator has collapsed."""


class Trainer:
    """Algorithm 1 on pairs held in memory: state, steps, and everything needed to stop and go on.

    Parameters
    ----------
    method : the scores and the reconstruction loss.
    settings : see `Settings`.
    pairs : epoch -> (x, y), the training pairs of that epoch, `(n, h, w)` float32; called again only when
        `settings.redraw` asks for fresh contamination.
    seed : of the initial weights, the minibatch order and the gradient penalty's mixing.
    """

    def __init__(
        self, method: losses.Method, settings: Settings, pairs: Callable[[int], tuple[Any, Any]], seed: int, device: torch.device
    ) -> None:
        self.method, self.settings, self.pairs, self.seed, self.device = method, settings, pairs, seed, device
        self._load_pairs(0)
        size = self.x.shape[-1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.generator = models.GENERATORS[settings.architecture](size, settings.width)
            discriminator = models.DISCRIMINATORS[settings.architecture]
            self.discriminator = None if method.adversary == "none" else discriminator(size, settings.width)
        self.generator.to(device, memory_format=torch.channels_last)
        betas = (settings.beta1, settings.beta2)
        self.optimise_g = torch.optim.Adam(self.generator.parameters(), settings.eta_g, betas, fused=True)
        if self.discriminator is not None:
            self.discriminator.to(device, memory_format=torch.channels_last)
            self.optimise_d = torch.optim.Adam(self.discriminator.parameters(), settings.eta_d, betas, fused=True)
        self.mixing = torch.Generator().manual_seed(seed)
        self.iteration = 0
        self.history: list[dict[str, Any]] = []

    def _load_pairs(self, epoch: int) -> None:
        self.x, self.y = (torch.as_tensor(a).unsqueeze(1).to(self.device) for a in self.pairs(epoch))

    @property
    def iterations_per_epoch(self) -> int:
        return math.ceil(len(self.x) / self.settings.batch_size)

    @property
    def iterations(self) -> int:
        """Iterations of the whole training."""
        return self.settings.epochs * self.iterations_per_epoch

    def epoch_batches(self, epoch: int) -> list[Tensor]:
        """The indices of each minibatch of an epoch, in an order fixed by the seed and the epoch.

        Where whole minibatches are contaminated, minibatches are blocks of consecutive pairs, visited in random order.
        """
        rng = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
        n, m = len(self.x), self.settings.batch_size
        if self.settings.unit == "minibatch":
            blocks = torch.arange(n).split(m)
            return [blocks[i] for i in torch.randperm(len(blocks), generator=rng)]
        return list(torch.randperm(n, generator=rng).to(self.device).split(m))

    def step(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """One iteration of Algorithm 1 on a minibatch; the losses of its last updates, on the device."""
        s, out = self.settings, {}
        self._set_rates()
        x = self._grow(x)
        x_hat = self.generator(y)
        if self.discriminator is not None:
            # G does not change during the k_d updates, so one G(y) serves them and the first update of G.
            for _ in range(s.k_d):
                out["loss_d"] = self._update_discriminator(x, x_hat.detach())
            self.discriminator.requires_grad_(False)
        for k in range(s.k_g):
            if k:
                x_hat = self.generator(y)
            reconstruction = losses.reduce_images(self.method.reconstruction(x_hat, x), s.reconstruction_reduction)
            loss = reconstruction if self.discriminator is None else s.lam * reconstruction + self._adversarial(x_hat)
            self.optimise_g.zero_grad(set_to_none=True)
            loss.backward()
            self.optimise_g.step()
        if self.discriminator is not None:
            self.discriminator.requires_grad_(True)
        return out | {"loss_g": loss.detach(), "reconstruction": reconstruction.detach()}

    def _set_rates(self) -> None:
        left = 1 - self.iteration / self.iterations
        share = min(1.0, left / self.settings.decay) if self.settings.decay else 1.0
        rates = [(self.optimise_g, self.settings.eta_g)]
        if self.discriminator is not None:
            rates.append((self.optimise_d, self.settings.eta_d))
        for optimiser, rate in rates:
            optimiser.param_groups[0]["lr"] = share * rate

    def _grow(self, x: Tensor) -> Tensor:
        """Tell networks that grow how far the training is; the references as these networks see them, others as they are."""
        if not isinstance(self.generator, pggan.Growing):
            return x
        progress = self.iteration / self.iterations
        for network in filter(None, (self.generator, self.discriminator)):
            network.progress = progress
        return pggan.seen(x, progress)

    def _adversarial(self, x_hat: Tensor) -> Tensor:
        scores = self.method.fake(self.discriminator(x_hat))
        return losses.reduce_images(scores, self.settings.adversarial_reduction)

    def _update_discriminator(self, x: Tensor, x_hat: Tensor) -> Tensor:
        real = self.method.real(self.discriminator(x))
        loss = -losses.reduce_images(real, self.settings.adversarial_reduction) - self._adversarial(x_hat)
        if self.method.adversary == "wgan_gp":
            mix = torch.rand(len(x), 1, 1, 1, generator=self.mixing).to(self.device)
            penalty = losses.gradient_penalty(self.discriminator, x, x_hat, mix, self.settings.adversarial_reduction)
            loss = loss + self.settings.mu * penalty
        self.optimise_d.zero_grad(set_to_none=True)
        loss.backward()
        self.optimise_d.step()
        return loss.detach()

    def train(
        self,
        checkpoint: Path,
        validate: Callable[[torch.nn.Module], dict[str, float]],
        report: Callable[[list[dict[str, Any]]], None] = lambda history: None,
    ) -> None:
        """Run (or go on) to the end: every `log_every` iterations a line of metrics, a checkpoint, and a call of `report`.

        Raises
        ------
        TrainingError : a loss is not finite, or the generator gives the same image for every input.
        """
        if checkpoint.is_file():
            self.load_state(checkpoint)
        elif self.settings.on_failure == "record":
            self._report({}, validate, 0.0, checkpoint, report)
        started, images, sums = time.perf_counter(), 0, {}
        while self.iteration < self.iterations:
            epoch, first = divmod(self.iteration, self.iterations_per_epoch)
            if self.settings.redraw and epoch:
                self._load_pairs(epoch)
            for batch in self.epoch_batches(epoch)[first:]:
                for name, value in self.step(self.x[batch], self.y[batch]).items():
                    sums[name] = sums.get(name, 0) + value
                self.iteration, images = self.iteration + 1, images + len(batch)
                if self.iteration % self.settings.log_every and self.iteration != self.iterations:
                    continue
                steps = (self.iteration - 1) % self.settings.log_every + 1
                means = {name: float(total) / steps for name, total in sums.items()}
                speed = images / (time.perf_counter() - started)
                self._report(means, validate, speed, checkpoint, report)
                started, images, sums = time.perf_counter(), 0, {}

    def _report(self, means: dict[str, float], validate: Callable, speed: float, checkpoint: Path, report: Callable) -> None:
        self.calibrate()
        self._log(means, validate(self.generator), speed)
        self.save_state(checkpoint)
        report(self.history)

    def calibrate(self) -> None:
        """Set the generator's batch-norm statistics to those of its present weights, on the first `calibration` noisy images.

        The moving averages kept during training lag behind weights that change fast and can cost several dB in eval mode.
        Training itself uses each minibatch's own statistics and is not touched. Source: Wu and Johnson 2021 ("precise BN").
        """
        self.generator.train()
        if self.settings.calibration:
            torch.optim.swa_utils.update_bn(self.y[: self.settings.calibration].split(100), self.generator)

    def _log(self, means: dict[str, float], validation: dict[str, float], images_per_s: float) -> None:
        at = f"iteration {self.iteration} of {self.iterations}"
        bad = [name for name, value in (means | validation).items() if not math.isfinite(value)]
        if bad:
            raise TrainingError(
                f"{', '.join(bad)} not finite at {at}; lower eta_g ({self.settings.eta_g:g}) or eta_d ({self.settings.eta_d:g}), "
                f"or check lam ({self.settings.lam:g}) and the reductions"
            )
        if (collapse := self.collapse(validation["spread"])) and self.settings.on_failure == "stop":
            raise TrainingError(collapse)
        memory = (
            torch.cuda.max_memory_allocated(self.device)
            if self.device.type == "cuda"
            else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        )
        self.history.append(
            {"iteration": self.iteration, "epoch": self.iteration / self.iterations_per_epoch}
            | {"progress": self.iteration / self.iterations}
            | means
            | validation
            | {"images_per_s": round(images_per_s, 1), "peak_memory_mib": memory >> 20, "device": str(self.device)}
        )

    def collapse(self, spread: float) -> str:
        """Why the training counts as collapsed: in its second half, outputs hardly vary over images (`spread`); "" if it does not."""
        if spread >= 0.01 or self.iteration < self.iterations / 2:
            return ""
        return (
            f"the generator has collapsed at iteration {self.iteration} of {self.iterations}: its outputs vary over images by "
            f"{spread:.2%} of the references' variation; raise lam, lower eta_g, or choose another method"
        )

    def save_state(self, path: Path) -> None:
        """Write everything needed to go on to `path`, atomically."""
        state = {"iteration": self.iteration, "history": self.history, "mixing": self.mixing.get_state()}
        for name in self._parts():
            state[name] = getattr(self, name).state_dict()
        with atomic(path) as temporary:
            torch.save(state, temporary)

    def load_state(self, path: Path) -> None:
        """Go on from a state written by `save_state` of the same configuration."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name in self._parts():
            getattr(self, name).load_state_dict(state[name])
        self.iteration, self.history = state["iteration"], state["history"]
        self.mixing.set_state(state["mixing"])

    def _parts(self) -> tuple[str, ...]:
        parts = ("generator", "optimise_g")
        return parts if self.discriminator is None else (*parts, "discriminator", "optimise_d")


def _validation(x: np.ndarray, y: np.ndarray) -> Callable[[torch.nn.Module], dict[str, float]]:
    if len(x) < 2:
        raise ValueError(f"x_val: expected at least 2 images to watch the training on, got {len(x)}; raise n_val")
    spread = x.std(axis=0).mean()

    def validate(model: torch.nn.Module) -> dict[str, float]:
        x_hat = models.denoise_images(model, y)
        if not np.isfinite(x_hat).all():
            return {"mse": math.nan, "psnr": math.nan, "ssim": math.nan, "spread": math.nan}
        values = {name: float(getattr(metrics, name)(x, x_hat).mean()) for name in ("mse", "psnr", "ssim")}
        return values | {"spread": float(x_hat.std(axis=0).mean() / spread)}

    return validate


def run(
    task: Run, settings: Settings, data: Path, out: Path, scratch: Path, device: str = "auto", quiet: bool = False
) -> dict[str, Any]:
    """Train one run and write `generator.safetensors`, its card and `metrics.jsonl` below `out`; its last validation metrics.

    The state, and the lines of metrics while it runs, live in `scratch` under a hash of the configuration, the data's
    digests and the code, so that a repeated call after any interruption goes on where it stopped, and never from the state
    of something else. A line is printed every 10 s or so, unless `quiet`.

    Parameters
    ----------
    data : folder of an `experiments.Dataset`.
    """
    chosen, dataset = models.pick_device(device), Dataset(Path(data))
    configuration = configuration_of(task, settings, dataset, chosen)
    state, final = _state(scratch, configuration), out / task.folder
    experiment = Experiment.parse(task.experiment)
    x, y = dataset.pairs("train", experiment)
    options = {name: getattr(settings, name) for name in ("noise", "unit", "batch_size", "jitter_degrees", "jitter_pixels")}
    if experiment.kind in contamination.PROJECTED:
        options["views"] = dataset.views("train", experiment)

    def pairs(epoch: int) -> tuple[np.ndarray, np.ndarray]:
        return experiment.contaminated(x, y, task.seed, draw=epoch if settings.redraw else 0, **options)

    printed = time.monotonic()

    def report(history: list[dict[str, Any]]) -> None:
        nonlocal printed
        _write_lines(state / "metrics.jsonl", history)
        if not quiet and time.monotonic() - printed > PRINT_EVERY:
            printed = time.monotonic()
            print(_progress(task, history[-1]), flush=True)

    trainer, failure = Trainer(losses.METHODS[task.method], settings, pairs, task.seed, chosen), ""
    try:
        trainer.train(state / "state.pt", _validation(*dataset.pairs("val", experiment)), report)
    except TrainingError as error:
        if settings.on_failure == "stop":
            where = f"; its lines of metrics up to then are in {state}" if trainer.history else ""
            raise TrainingError(f"{task.folder}: {error}{where}") from error
        trainer.load_state(state / "state.pt")
        failure = str(error)
    line = trainer.history[-1]
    last = {name: line[name] for name in ("mse", "psnr", "ssim")}
    _write_lines(final / "metrics.jsonl", trainer.history)
    network = {"architecture": settings.architecture, "image_size": x.shape[-1], "width": settings.width}
    mean, sd = (float(values.mean()) for values in imaging.background(y[:256]))
    seen = {"pixel_size": configuration["data"]["pixel_size"], "background": {"mean": mean, "sd": sd}}
    failure = failure or trainer.collapse(line["spread"])
    card = network | seen | {"validation": last} | ({"failed": failure} if failure else {}) | configuration
    models.save(final / "generator.safetensors", trainer.generator, card)
    return last


def _write_lines(path: Path, history: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(line) + "\n" for line in history))


def configuration_of(task: Run, settings: Settings, dataset: Dataset, device: torch.device) -> dict[str, Any]:
    """All that a run's result depends on, as its card holds it: the data by the digests in its card, the code by a digest of its source."""
    modules = (checks, contamination, experiments, imaging, losses, metrics, models, pggan)
    source = b"".join(Path(file).read_bytes() for file in (*(m.__file__ for m in modules), __file__))
    code = {"torch": torch.__version__, "device": device.type, "source": hashlib.sha256(source).hexdigest()}
    return {"run": asdict(task), "settings": asdict(settings), "data": dataset.card, "code": code}


def finished(task: Run, settings: Settings, data: Path, out: Path) -> bool:
    """Whether `out` holds the generator of this very configuration (settings, data, code), on whatever device it was trained."""
    path = out / task.folder / "generator.json"
    if not (path.is_file() and path.with_suffix(".safetensors").is_file()):
        return False
    card = json.loads(path.read_text())
    wanted = configuration_of(task, settings, Dataset(data), torch.device(card["code"]["device"]))
    return all(card[name] == value for name, value in wanted.items())


def _state(scratch: Path, configuration: dict[str, Any]) -> Path:
    return scratch / hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()[:16]


def _worker(*arguments: Any) -> dict[str, Any]:
    torch.set_num_threads(1)
    return run(*arguments, quiet=True)


def _progress(task: Run, line: dict[str, Any]) -> str:
    return f"{task.folder}: {line['progress']:.0%}, PSNR {line['psnr']:.2f} dB, {line['images_per_s']:.0f} images/s"


def run_grid(
    tasks: Iterable[Run],
    settings: Settings,
    data: Path,
    out: Path,
    scratch: Path,
    device: str = "auto",
    workers: int | None = None,
    variants: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> None:
    """Train many runs, side by side on the CPU's cores with one thread each, or one after another on a GPU.

    A line is printed as each run ends. Their states in `scratch` are removed when all have succeeded.

    Parameters
    ----------
    tasks, settings, data, out, scratch, device : as `run`.
    workers : runs at a time on the CPU; None is one a core.
    variants : name -> changes of `settings`, for the tasks that have a variant.

    Raises
    ------
    ValueError : a task's variant is not among `variants` or is no change of settings; before anything is trained.
    TrainingError : a run failed; what the others reached is kept in `scratch`.
    """
    tasks = list(tasks)
    chosen = models.pick_device(device)
    changed = {task: varied(settings, task.variant, variants) for task in tasks}
    workers = 1 if chosen.type != "cpu" else min(len(tasks), workers or imaging.cores())
    print(f"{len(tasks)} runs on {_name(chosen)}, {workers} at a time; torch {torch.__version__}", flush=True)
    states = {task: _state(Path(scratch), configuration_of(task, changed[task], Dataset(Path(data)), chosen)) for task in tasks}
    arguments = [(task, changed[task], Path(data), Path(out), Path(scratch), str(chosen)) for task in tasks]
    started = time.perf_counter()
    if chosen.type != "cpu":
        _report(((a[0], run(*a)) for a in arguments), len(tasks), started)
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            futures = {pool.submit(_worker, *a): a[0] for a in arguments}
            try:
                _report(_finished(futures, states), len(tasks), started)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    for state in states.values():
        shutil.rmtree(state, ignore_errors=True)


def varied(settings: Settings, variant: str, variants: Mapping[str, Mapping[str, Any]]) -> Settings:
    """The settings of a variant: `settings` with the changes that `variants` has under its name; "" changes nothing.

    ValueError where it is not among `variants`, or changes what is no setting, or to no value of one.
    """
    if not variant:
        return settings
    if variant not in variants:
        raise ValueError(f"variant {variant!r}: expected its changes of settings in `variants`, which has {list(variants) or 'none'}")
    try:
        return replace(settings, **variants[variant])
    except (TypeError, ValueError) as error:
        raise ValueError(f"variant {variant!r}: {error}") from error


def _finished(futures: dict[Future, Run], states: dict[Run, Path]) -> Iterator[tuple[Run, dict[str, float]]]:
    """Runs as they end; while none does, a line every 10 s on those under way, from their metrics on disk."""
    pending = set(futures)
    while pending:
        done, pending = wait(pending, PRINT_EVERY, FIRST_COMPLETED)
        yield from ((futures[future], future.result()) for future in done)
        if not done:
            lines = {task: states[task] / "metrics.jsonl" for task in map(futures.get, pending)}
            begun = {task: path.read_text().splitlines()[-1] for task, path in lines.items() if path.is_file()}
            print(*(f"  {_progress(task, json.loads(line))}" for task, line in begun.items()), sep="\n", flush=True)


def _report(finished: Iterable[tuple[Run, dict[str, float]]], total: int, started: float) -> None:
    for i, (task, values) in enumerate(finished, 1):
        seconds = time.perf_counter() - started
        print(f"[{i}/{total}, {seconds:5.0f} s] {task.folder}: PSNR {values['psnr']:.2f} dB, SSIM {values['ssim']:.3f}", flush=True)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"the CPU ({imaging.cores()} cores)"
