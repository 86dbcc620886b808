"""What makes Algorithm 1 fast, and lets it stop and go on: the device, its batches, CUDA graphs, processes, state."""

from __future__ import annotations

import copy
import math
import pickle
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cryo_lib.files import atomic, foreign
from cryo_lib.networks import models, parallel, pggan
from cryo_lib.networks.algorithm import Algorithm1, Settings
from cryo_lib.networks.batches import Batches, hidden, turned
from cryo_lib.networks.losses import Method
from cryo_lib.networks.replay import Replayed


class TrainingError(RuntimeError):
    """Training cannot go on: a loss is not finite, or the generator has collapsed."""


class Trainer(Algorithm1):
    """Algorithm 1 on training pairs: its networks and batches, its loop, and everything needed to stop and go on.

    Where torchrun started several processes, each takes a part of every minibatch; batch norm, gradients and losses are
    those of the whole minibatch, so the results are one process's, but for rounding.

    Parameters
    ----------
    method : the scores and the reconstruction loss.
    settings : see `Settings`.
    pairs : epoch -> (x, y), the training pairs of that epoch, `(n, h, w)` float32; called again only when
        `settings.redraw` asks for fresh contamination or `settings.fresh_noise` for fresh noise.
    seed : of the initial weights, the minibatch order, augmentation and the gradient penalty's mixing.

    Attributes
    ----------
    kept : the generator that is validated and written: the one that is trained, or the moving average of its weights.

    Raises
    ------
    ValueError : more processes than the smallest minibatch has pairs.
    """

    def __init__(
        self,
        method: Method,
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
        self.kept = copy.deepcopy(self.generator) if settings.average else self.generator
        if self.discriminator is not None:
            self.optimise_d = self._optimiser(self.discriminator, settings.eta_d)
        self.iteration, self.seconds = 0, 0.0  # the latter without evaluations
        self.history: list[dict[str, Any]] = []
        grows = isinstance(self.generator, pggan.Growing)
        self._captures = device.type == "cuda" and settings.cuda_graph and parallel.size() == 1 and not grows
        self._replayed: Replayed | None = None
        smallest = len(self.batches) % settings.batch_size or min(settings.batch_size, len(self.batches))
        if smallest < parallel.size():
            raise ValueError(
                f"batch_size: expected every minibatch to have a pair for each of {parallel.size()} processes, got one "
                f"of {smallest} ({len(self.batches)} pairs, {settings.batch_size} a minibatch); start fewer, or "
                "choose another size"
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

        Within an epoch the host only starts work and never waits. Of several processes each has its part of them.
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
                    self._average()
        return sums

    @torch.no_grad()
    def _average(self) -> None:
        """Move the weights that are kept towards the present ones: by more in the first iterations, a mean of few."""
        if self.settings.average:
            decay = min(self.settings.average, self.iteration / (10 + self.iteration))
            move = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
            move([*self.kept.parameters()], [*self.generator.parameters()], self.iteration)
            for kept, present in zip(self.kept.buffers(), self.generator.buffers()):
                kept.copy_(present)

    def _minibatches(self, epoch: int, chosen: slice) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
        """This process's part of some minibatches of an epoch: references, noisy images, mixing, how large a part."""
        if (self.settings.redraw or self.settings.fresh_noise) and epoch != self._epoch:
            self._load(epoch, *self.pairs(epoch), self.batches.resident)
        whole = self.epoch_batches(epoch)[chosen]
        order = [rows[parallel.part(len(rows))] for rows in whole]
        mixing = self.epoch_mixing(epoch)[chosen].to(self.device)
        taken = self.batches.take(order)
        if self.settings.augment:
            taken = self._augmented(taken, epoch, order)
        if self.method.target == "itself":
            taken = self._hidden(taken, whole, epoch, chosen.start)
        for rows, part, (x, y), mix in zip(whole, order, taken, mixing):
            yield x, y, mix[:, : len(rows)][:, parallel.part(len(rows))], len(part) / len(rows)

    def _augmented(
        self, taken: Iterable[tuple[Tensor, Tensor]], epoch: int, order: list[Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Minibatches, given by their rows, with both images of a pair turned alike, anew in every epoch."""
        turns = torch.randint(8, (len(self.batches),), generator=self._draws(epoch))[torch.cat(order)]
        for (x, y), each in zip(taken, turns.to(self.device).split([len(part) for part in order])):
            yield turned(x, each), turned(y, each)

    def _hidden(
        self, taken: Iterable[tuple[Tensor, Tensor]], whole: list[Tensor], epoch: int, first: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Minibatches of noisy images alone, with pixels that G does not see, others in every epoch."""
        draws = torch.Generator(self.device)
        for i, ((_, y), rows) in enumerate(zip(taken, whole), epoch * self.iterations_per_epoch + first):
            draws.manual_seed(1_000_003 * self.seed + i)
            drawn = torch.rand((len(rows), *y.shape[1:]), generator=draws, device=self.device)
            yield hidden(y, drawn[parallel.part(len(rows))])

    def _step(self, x: Tensor, y: Tensor, mix: Tensor, share: float) -> dict[str, Tensor]:
        x = self._grow(x)
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

    def _set_rates(self) -> None:
        left = 1 - self.iteration / self.iterations
        share = min(1.0, left / self.settings.decay) if self.settings.decay else 1.0
        share *= min(1.0, (1 - left) / self.settings.warmup) if self.settings.warmup else 1.0
        rates = [(self.optimise_g, self.settings.eta_g)]
        if self.discriminator is not None:
            rates.append((self.optimise_d, self.settings.eta_d))
        for optimiser, rate in rates:
            (group,) = optimiser.param_groups
            if self._captures:
                # A captured step reads its rate from the device, from one place.
                if not isinstance(group["lr"], Tensor) or group["lr"].device.type != self.device.type:
                    group["lr"] = torch.tensor(rate, dtype=torch.float32, device=self.device)
                group["lr"].fill_(share * rate)
            else:
                group["lr"] = share * rate

    def _grow(self, x: Tensor) -> Tensor:
        """Tell networks that grow how far the training is; the references as these see them, or as they are."""
        if not isinstance(self.generator, pggan.Growing):
            return x
        progress = self.iteration / self.iterations
        for network in filter(None, (self.generator, self.kept, self.discriminator)):
            network.progress = progress
        return pggan.seen(x, progress)

    def train(
        self,
        checkpoint: Path,
        validate: Callable[[torch.nn.Module], dict[str, float]],
        report: Callable[[list[dict[str, Any]]], None] = lambda history: None,
        until: float = math.inf,
    ) -> bool:
        """Run (or go on) to the end: every `log_every` iterations a line of metrics, a checkpoint, a call of `report`.

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
            self._report({}, validate, checkpoint, report)
        while self.iteration < self.iterations:
            before, started = self.iteration, time.perf_counter()
            sums = self.advance(self.settings.log_every - before % self.settings.log_every)
            means = parallel.total(torch.stack([*sums.values()])) / (self.iteration - before)
            losses = dict(zip(sums, means.tolist()))  # waits for the device: the time is that of the iterations
            self.seconds += time.perf_counter() - started
            self._report(losses, validate, checkpoint, report)
            if parallel.from_first(lambda: time.monotonic() > until):
                break
        return self.iteration == self.iterations

    def speed(self) -> dict[str, Any]:
        """Images a second so far, interruptions left out, peak memory, and the device: no result depends on them."""
        epoch, first = divmod(self.iteration, self.iterations_per_epoch)
        seen = epoch * len(self.batches) + first * self.settings.batch_size
        rate = round(seen / self.seconds, 1) if self.seconds else 0.0
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device)
        else:
            memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"images_per_s": rate, "peak_memory_mib": memory >> 20, "device": str(self.device)}

    def _report(self, losses: dict[str, float], validate: Callable, checkpoint: Path, report: Callable) -> None:
        self.calibrate()
        self._log(losses, parallel.from_first(lambda: validate(self.kept)))
        if parallel.rank() == 0:
            self.save_state(checkpoint)
            report(self.history)

    def calibrate(self) -> None:
        """Set the generator's batch-norm statistics to those of its present weights, on the first noisy images.

        The moving averages kept during training lag behind weights that change fast and can cost several dB in eval
        mode. Training itself uses each minibatch's own statistics and is not touched. Source: Wu and Johnson 2021
        ("precise BN").
        """
        self.kept.train()
        if self.settings.calibration:
            whole = self.batches.noisy(self.settings.calibration).split(100)
            with models.arithmetic("float32"):
                torch.optim.swa_utils.update_bn([y[parallel.part(len(y))] for y in whole], self.kept)

    def _log(self, losses: dict[str, float], validation: dict[str, float]) -> None:
        s = self.settings
        bad = [name for name, value in (losses | validation).items() if not math.isfinite(value)]
        if bad:
            raise TrainingError(
                f"{', '.join(bad)} not finite at iteration {self.iteration} of {self.iterations}; lower eta_g "
                f"({s.eta_g:g}) or eta_d ({s.eta_d:g}), or check lam ({s.lam:g}) and the reductions"
            )
        if (collapse := self.collapse(validation["spread"])) and s.on_failure == "stop":
            raise TrainingError(collapse)
        at = {"iteration": self.iteration, "epoch": self.iteration / self.iterations_per_epoch}
        self.history.append(at | {"progress": self.iteration / self.iterations} | losses | validation)

    def collapse(self, spread: float) -> str:
        """Why the training counts as collapsed, in its second half, by the outputs' `spread`; "" if it does not."""
        if spread >= 0.01 or self.iteration < self.iterations / 2:
            return ""
        return (
            f"the generator has collapsed at iteration {self.iteration} of {self.iterations}: its outputs vary over "
            f"images by {spread:.2%} of the references' variation; raise lam, lower eta_g, or choose another method"
        )

    def save_state(self, path: Path) -> None:
        """Write everything needed to go on to `path`, atomically."""
        state = {"iteration": self.iteration, "seconds": self.seconds, "history": self.history}
        for name in self._parts():
            state[name] = getattr(self, name).state_dict()
        with atomic(path) as temporary:
            torch.save(state, temporary)

    def load_state(self, path: Path) -> None:
        """Go on from a state written by `save_state` of the same configuration; ValueError for another file."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            for name in self._parts():
                getattr(self, name).load_state_dict(state[name])
            self.iteration, self.seconds, self.history = state["iteration"], state["seconds"], state["history"]
        except (RuntimeError, ValueError, KeyError, TypeError, EOFError, OSError, pickle.UnpicklingError) as error:
            got = foreign(path) or "a damaged one, one cut short, or another's"
            problem = f"expected the state of this training, to go on with, got {got}"
            raise ValueError(f"{path}: {problem}; delete it to train from the start") from error
        self._replayed = None  # the optimisers' tensors are new ones

    def _parts(self) -> tuple[str, ...]:
        parts = ("generator", "optimise_g")
        if self.discriminator is not None:
            parts += "discriminator", "optimise_d"
        return (*parts, "kept") if self.settings.average else parts
