"""Algorithm 1: its settings, its steps for every method, and everything needed to stop and go on."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cryo_lib import checks
from cryo_lib.files import atomic
from cryo_lib.networks import losses, models, parallel, pggan
from cryo_lib.networks.batches import Batches
from cryo_lib.networks.replay import Replayed
from cryo_lib.simulate import contamination


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
    precision : arithmetic of the networks' passes in training, a key of `models.PRECISIONS`; weights, losses and Adam's state
        are float32, and so are evaluations.
    cuda_graph : on a GPU, replay a whole step as one CUDA graph: the same kernels without the cost of launching each. Networks
        that grow, minibatches of another size and several processes go step by step, as all do where it is False.
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
    precision: str = "float32"
    cuda_graph: bool = True
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
        checks.choice("precision", self.precision, models.PRECISIONS)
        checks.choice("cuda_graph", self.cuda_graph, (False, True))
        checks.choice("on_failure", self.on_failure, ("stop", "record"))


class TrainingError(RuntimeError):
    """Training cannot go on: a loss is not finite, or the generator has collapsed."""


class Trainer:
    """Algorithm 1 on training pairs: state, steps, and everything needed to stop and go on.

    Where torchrun started several processes, each takes a part of every minibatch; batch norm, gradients and losses are those
    of the whole minibatch, so the results are one process's, but for rounding.

    Parameters
    ----------
    method : the scores and the reconstruction loss.
    settings : see `Settings`.
    pairs : epoch -> (x, y), the training pairs of that epoch, `(n, h, w)` float32; called again only when
        `settings.redraw` asks for fresh contamination.
    seed : of the initial weights, the minibatch order and the gradient penalty's mixing.

    Raises
    ------
    ValueError : more processes than the smallest minibatch has pairs.
    """

    def __init__(
        self,
        method: losses.Method,
        settings: Settings,
        pairs: Callable[[int], tuple[Any, Any]],
        seed: int,
        device: torch.device,
    ) -> None:
        self.method, self.settings, self.pairs, self.seed, self.device = method, settings, pairs, seed, device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        x, y = pairs(0)
        self._load(0, x, y)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.generator = models.GENERATORS[settings.architecture](x.shape[-1], settings.width)
            discriminator = models.DISCRIMINATORS[settings.architecture]
            self.discriminator = None if method.adversary == "none" else discriminator(x.shape[-1], settings.width)
        self.optimise_g = self._optimiser(self.generator, settings.eta_g)
        if self.discriminator is not None:
            self.optimise_d = self._optimiser(self.discriminator, settings.eta_d)
        self.iteration = 0
        self.history: list[dict[str, Any]] = []
        grows = isinstance(self.generator, pggan.Growing)
        self._captures = device.type == "cuda" and settings.cuda_graph and parallel.size() == 1 and not grows
        self._replayed: Replayed | None = None
        smallest = len(self.batches) % settings.batch_size or min(settings.batch_size, len(self.batches))
        if smallest < parallel.size():
            raise ValueError(
                f"batch_size: expected every minibatch to have a pair for each of {parallel.size()} processes, got one of "
                f"{smallest} ({len(self.batches)} pairs, {settings.batch_size} a minibatch); start fewer, or choose another size"
            )

    def _optimiser(self, network: torch.nn.Module, rate: float) -> torch.optim.Adam:
        parallel.synchronise(network)
        network.to(self.device, memory_format=torch.channels_last)
        betas, on_gpu = (self.settings.beta1, self.settings.beta2), self.device.type == "cuda"
        return torch.optim.Adam(network.parameters(), rate, betas, fused=True, capturable=on_gpu)

    def _load(self, epoch: int, x: Any, y: Any, resident: bool | None = None) -> None:
        self.batches = None  # the pairs before need not lie beside these
        half = self.settings.precision == "bf16" and self.device.type == "cuda"
        self.batches, self._epoch = Batches(x, y, self.device, half, resident), epoch

    @property
    def iterations_per_epoch(self) -> int:
        return math.ceil(len(self.batches) / self.settings.batch_size)

    @property
    def iterations(self) -> int:
        """Iterations of the whole training."""
        return self.settings.epochs * self.iterations_per_epoch

    def _draws(self, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(1_000_003 * self.seed + epoch)

    def epoch_batches(self, epoch: int) -> list[Tensor]:
        """The rows of each minibatch of an epoch, in an order fixed by the seed and the epoch.

        Where whole minibatches are contaminated, minibatches are blocks of consecutive pairs, visited in random order.
        """
        n, m = len(self.batches), self.settings.batch_size
        if self.settings.unit == "minibatch":
            blocks = torch.arange(n).split(m)
            return [blocks[i] for i in torch.randperm(len(blocks), generator=self._draws(epoch))]
        return list(torch.randperm(n, generator=self._draws(epoch)).split(m))

    def epoch_mixing(self, epoch: int) -> Tensor:
        """The gradient penalty's shares of references in its mixtures, `(iterations, k_d, m)` uniform on [0, 1]."""
        shape = self.iterations_per_epoch, self.settings.k_d, self.settings.batch_size
        return torch.rand(shape, generator=self._draws(epoch))

    def advance(self, iterations: int) -> dict[str, Tensor]:
        """Run the next so many iterations, as far as there are any; the sums of their losses, on the device.

        Within an epoch the host only starts work and never waits for it. Of several processes each has its part of the sums.
        """
        sums: dict[str, Tensor] = {}
        end = min(self.iteration + iterations, self.iterations)
        with models.arithmetic(self.settings.precision, one_size=True):
            while self.iteration < end:
                epoch, first = divmod(self.iteration, self.iterations_per_epoch)
                for minibatch in self._minibatches(epoch, slice(first, first + end - self.iteration)):
                    self._set_rates()
                    for name, value in self._step(*minibatch).items():
                        sums[name] = sums.get(name, 0) + value
                    self.iteration += 1
        return sums

    def _minibatches(self, epoch: int, chosen: slice) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
        """This process's part of the chosen minibatches of an epoch: references, noisy images, mixing, and how large a part."""
        if self.settings.redraw and epoch != self._epoch:
            self._load(epoch, *self.pairs(epoch), self.batches.resident)
        whole = self.epoch_batches(epoch)[chosen]
        order = [rows[parallel.part(len(rows))] for rows in whole]
        mixing = self.epoch_mixing(epoch)[chosen].to(self.device)
        for rows, part, (x, y), mix in zip(whole, order, self.batches.take(order), mixing):
            yield x, y, mix[:, : len(rows)][:, parallel.part(len(rows))], len(part) / len(rows)

    def _step(self, x: Tensor, y: Tensor, mix: Tensor, share: float) -> dict[str, Tensor]:
        if not self._captures or len(y) != self.settings.batch_size:
            return self.step(x, y, mix, share)
        if self._replayed is None:
            self._replayed = Replayed(self.step, self._state, (x, y, mix))
        return self._replayed(x, y, mix)

    def _state(self) -> list[Tensor]:
        """Every tensor that a step changes."""
        tensors = []
        for name in self._parts():
            part = getattr(self, name)
            if isinstance(part, torch.nn.Module):
                tensors += [*part.parameters(), *part.buffers()]
            else:
                tensors += [value for values in part.state.values() for value in values.values()]
        return tensors

    def step(self, x: Tensor, y: Tensor, mix: Tensor, share: float = 1.0) -> dict[str, Tensor]:
        """One iteration of Algorithm 1 on a minibatch; the losses of its last updates, on the device.

        Parameters
        ----------
        x, y : references and noisy images, `(m, 1, h, w)`.
        mix : of the gradient penalty, `(k_d, m)`; other methods do not look at it.
        share : which part of the whole minibatch these pairs are; losses are weighted by it, and gradients summed over processes.
        """
        s, out = self.settings, {}
        x = self._grow(x)
        x_hat = self._generate(y)
        if self.discriminator is not None:
            # G does not change during the k_d updates, so one G(y) serves them and the first update of G.
            for shares_of_x in mix:
                loss = self._discriminator_loss(x, x_hat.detach(), shares_of_x)
                out["loss_d"] = self._update(self.discriminator, self.optimise_d, loss, share)
            self.discriminator.requires_grad_(False)
        for k in range(s.k_g):
            if k:
                x_hat = self._generate(y)
            reconstruction = losses.reduce_images(self.method.reconstruction(x_hat, x), s.reconstruction_reduction)
            loss = reconstruction if self.discriminator is None else s.lam * reconstruction + self._adversarial(x_hat)
            out["loss_g"] = self._update(self.generator, self.optimise_g, loss, share)
        if self.discriminator is not None:
            self.discriminator.requires_grad_(True)
        return out | {"reconstruction": share * reconstruction.detach()}

    def _update(self, network: torch.nn.Module, optimiser: torch.optim.Adam, loss: Tensor, share: float) -> Tensor:
        optimiser.zero_grad(set_to_none=True)
        loss = share * loss
        loss.backward()
        parallel.sum_gradients(network.parameters())
        optimiser.step()
        return loss.detach()

    def _generate(self, y: Tensor) -> Tensor:
        with models.autocast(self.device, self.settings.precision):
            return self.generator(y).to(y.dtype)

    def _discriminate(self, x: Tensor) -> Tensor:
        with models.autocast(self.device, self.settings.precision):
            return self.discriminator(x).to(x.dtype)

    def _set_rates(self) -> None:
        left = 1 - self.iteration / self.iterations
        share = min(1.0, left / self.settings.decay) if self.settings.decay else 1.0
        rates = [(self.optimise_g, self.settings.eta_g)]
        if self.discriminator is not None:
            rates.append((self.optimise_d, self.settings.eta_d))
        for optimiser, rate in rates:
            (group,) = optimiser.param_groups
            if self._captures:
                # A captured step reads its rate from the device, from one place.
                if not isinstance(group["lr"], Tensor) or group["lr"].device.type != self.device.type:
                    group["lr"] = torch.tensor(rate, device=self.device)
                group["lr"].fill_(share * rate)
            else:
                group["lr"] = share * rate

    def _grow(self, x: Tensor) -> Tensor:
        """Tell networks that grow how far the training is; the references as these networks see them, others as they are."""
        if not isinstance(self.generator, pggan.Growing):
            return x
        progress = self.iteration / self.iterations
        for network in filter(None, (self.generator, self.discriminator)):
            network.progress = progress
        return pggan.seen(x, progress)

    def _adversarial(self, x_hat: Tensor) -> Tensor:
        scores = self.method.fake(self._discriminate(x_hat))
        return losses.reduce_images(scores, self.settings.adversarial_reduction)

    def _discriminator_loss(self, x: Tensor, x_hat: Tensor, mix: Tensor) -> Tensor:
        real = self.method.real(self._discriminate(x))
        loss = -losses.reduce_images(real, self.settings.adversarial_reduction) - self._adversarial(x_hat)
        if self.method.adversary != "wgan_gp":
            return loss
        mix = mix[:, None, None, None]
        penalty = losses.gradient_penalty(self._discriminate, x, x_hat, mix, self.settings.adversarial_reduction)
        return loss + self.settings.mu * penalty

    def train(
        self,
        checkpoint: Path,
        validate: Callable[[torch.nn.Module], dict[str, float]],
        report: Callable[[list[dict[str, Any]]], None] = lambda history: None,
        until: float = math.inf,
    ) -> bool:
        """Run (or go on) to the end: every `log_every` iterations a line of metrics, a checkpoint, and a call of `report`.

        Parameters
        ----------
        until : of `time.monotonic()`, after which the next line of metrics is the last; called again, training goes on.

        Returns
        -------
        Whether the training is at its end.

        Raises
        ------
        TrainingError : a loss is not finite, or the generator gives the same image for every input.
        """
        if parallel.from_first(checkpoint.is_file):
            self.load_state(checkpoint)
        elif self.settings.on_failure == "record":
            self._report({}, validate, 0.0, checkpoint, report)
        while self.iteration < self.iterations:
            before, started = self.iteration, time.perf_counter()
            sums = self.advance(self.settings.log_every - before % self.settings.log_every)
            means = dict(
                zip(sums, (parallel.total(torch.stack([*sums.values()])) / (self.iteration - before)).tolist())
            )
            speed = (self._seen(self.iteration) - self._seen(before)) / (time.perf_counter() - started)
            self._report(means, validate, speed, checkpoint, report)
            if parallel.from_first(lambda: time.monotonic() > until):
                break
        return self.iteration == self.iterations

    def _seen(self, iteration: int) -> int:
        """Pairs visited before an iteration."""
        epoch, first = divmod(iteration, self.iterations_per_epoch)
        return epoch * len(self.batches) + first * self.settings.batch_size

    def _report(
        self, means: dict[str, float], validate: Callable, speed: float, checkpoint: Path, report: Callable
    ) -> None:
        self.calibrate()
        self._log(means, parallel.from_first(lambda: validate(self.generator)), speed)
        if parallel.rank() == 0:
            self.save_state(checkpoint)
            report(self.history)

    def calibrate(self) -> None:
        """Set the generator's batch-norm statistics to those of its present weights, on the first `calibration` noisy images.

        The moving averages kept during training lag behind weights that change fast and can cost several dB in eval mode.
        Training itself uses each minibatch's own statistics and is not touched. Source: Wu and Johnson 2021 ("precise BN").
        """
        self.generator.train()
        if self.settings.calibration:
            whole = self.batches.noisy(self.settings.calibration).split(100)
            with models.arithmetic("float32"):
                torch.optim.swa_utils.update_bn([y[parallel.part(len(y))] for y in whole], self.generator)

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
        state = {"iteration": self.iteration, "history": self.history}
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
        self._replayed = None  # the optimisers' tensors are new ones

    def _parts(self) -> tuple[str, ...]:
        parts = ("generator", "optimise_g")
        return parts if self.discriminator is None else (*parts, "discriminator", "optimise_d")
