"""Algorithm 1: its settings, and its step. What makes it fast, and lets it stop and go on, is beside it in `engine`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from cryo_lib.networks import models, parallel
from cryo_lib.networks.losses import Method
from cryo_lib.simulate import contamination

Architecture, Precision = Literal[tuple(models.GENERATORS)], Literal[tuple(models.PRECISIONS)]
Reduction = Literal["mean", "sum"]


class Settings(BaseModel):
    """Everything that Algorithm 1 leaves to choose; the paper's value is the default. ValueError names a bad one."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    architecture: Architecture = Field("resnet", description="of both networks")
    width: int = Field(64, ge=1, description="channels of the first level")
    epochs: int = Field(20, ge=1, description="passes over the training pairs")
    batch_size: int = Field(20, ge=1, description="m, pairs a minibatch")
    k_d: int = Field(1, ge=1, description="updates of D on each minibatch")
    k_g: int = Field(2, ge=1, description="updates of G on each minibatch; an autoencoder makes as many")
    eta_d: float = Field(1e-3, gt=0, description="Adam's learning rate for D")
    eta_g: float = Field(1e-2, gt=0, description="Adam's learning rate for G")
    beta1: float = Field(0.5, ge=0, lt=1, description="Adam's decay of the first moment")
    beta2: float = Field(0.999, ge=0, lt=1, description="Adam's decay of the second moment")
    decay: float = Field(0.0, ge=0, le=1, description="share of the training, its end, over which rates fall to 0")
    warmup: float = Field(0.0, ge=0, lt=1, description="share of the training, its start, over which rates rise from 0")
    average: float = Field(
        0.0, ge=0, lt=1, description="decay of the moving average of G's weights, which is kept; 0: none"
    )
    lam: float = Field(10.0, ge=0, description="lambda, weight of the reconstruction loss")
    mu: float = Field(10.0, ge=0, description="weight of WGAN's gradient penalty")
    reconstruction_reduction: Reduction = Field("mean", description="over an image's pixels")
    adversarial_reduction: Reduction = Field("mean", description="over an image's patch scores")
    noise: Literal[contamination.NOISES] = Field("gaussian", description="that replaces contaminated images")
    unit: Literal[contamination.UNITS] = Field("sample", description="what is contaminated: pairs or whole minibatches")
    redraw: bool = Field(False, description="fresh contamination in every epoch")
    fresh_noise: bool = Field(False, description="fresh noise in every epoch; simulated images only")
    augment: bool = Field(False, description="turn pairs by right angles and mirror them, at random")
    jitter_degrees: float = Field(10.0, ge=0, description="of contamination J: sd of the turn about each axis")
    jitter_pixels: float = Field(1.0, ge=0, description="of contamination J: sd of the shift along x and y")
    screen: bool = Field(False, description="leave out pairs that do not belong together (contamination.screen)")
    precision: Precision = Field("float32", description="of the networks' passes; weights, losses and Adam are float32")
    cuda_graph: bool = Field(True, description="on a GPU, replay a step as one CUDA graph; false: eager, the reference")
    log_every: int = Field(250, ge=1, description="iterations between lines of metrics, and checkpoints")
    calibration: int = Field(
        200, ge=0, description="noisy images that batch norm's statistics are taken from; 0: averages"
    )
    on_failure: Literal["stop", "record"] = Field(
        "stop", description="where training breaks; record: keep what it reached"
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems = "; ".join(map(_described, error.errors()))
            known = f"; settings are {', '.join(type(self).model_fields)}" if "unknown" in problems else ""
            raise ValueError(f"settings: {problems}{known}") from None


def _described(problem: Any) -> str:
    """What is wrong with one setting: its name, what is expected, what was given."""
    name, given = ".".join(map(str, problem["loc"])), problem["input"]
    if problem["type"] == "extra_forbidden":
        return f"{name}: unknown"
    expected = problem["msg"].removeprefix("Input should be ")
    expected = f"a number {expected}" if expected.startswith(("greater", "less")) else expected
    hint = "; in YAML write 1.0e-3, not 1e-3" if isinstance(given, str) and "number" in expected else ""
    return f"{name}: expected {expected}, got {given!r}{hint}"


class Algorithm1:
    """The networks and optimisers that `step` updates; `engine.Trainer` makes them."""

    method: Method
    settings: Settings
    device: torch.device
    generator: torch.nn.Module
    discriminator: torch.nn.Module | None  # None: an autoencoder
    optimise_g: torch.optim.Adam
    optimise_d: torch.optim.Adam

    def step(self, x: Tensor, y: Tensor, mix: Iterable[Tensor], share: float = 1.0) -> dict[str, Tensor]:
        """One iteration of Algorithm 1 on a minibatch; the losses of its last updates, on the device.

        Parameters
        ----------
        x, y : references, or what stands in for them (`Method.target`), and noisy images, `(m, 1, h, w)`.
        mix : k_d times `(m,)`, uniform on [0, 1], of WGAN's gradient penalty.
        share : which part of the whole minibatch this is; losses are weighted by it, gradients summed over processes.
        """
        s, method, losses = self.settings, self.method, {}
        x_hat = self.denoise(y)
        if self.discriminator is not None:
            for between in mix:  # k_d updates of D; G does not change meanwhile, so one G(y) serves them and G's first
                loss = method.discriminator_loss(
                    self.discriminate, x, x_hat.detach(), between, s.mu, s.adversarial_reduction
                )
                losses["loss_d"] = self._update(self.discriminator, self.optimise_d, loss, share)
            self.discriminator.requires_grad_(False)
        for k in range(s.k_g):
            x_hat = self.denoise(y) if k else x_hat
            loss = reconstruction = method.reconstruction_loss(x_hat, x, s.reconstruction_reduction)
            if self.discriminator is not None:
                adversarial = method.adversarial_loss(self.discriminate, x_hat, s.adversarial_reduction)
                loss = s.lam * reconstruction + adversarial
            losses["loss_g"] = self._update(self.generator, self.optimise_g, loss, share)
        if self.discriminator is not None:
            self.discriminator.requires_grad_(True)
        return losses | {"reconstruction": share * reconstruction.detach()}

    def denoise(self, y: Tensor) -> Tensor:
        """G(y), computed at the precision of the settings."""
        with models.autocast(self.device, self.settings.precision):
            return self.generator(y).to(y.dtype)

    def discriminate(self, x: Tensor) -> Tensor:
        """D(x) before its sigmoid: a score of each patch, `(m, 1, ...)`."""
        with models.autocast(self.device, self.settings.precision):
            return self.discriminator(x).to(x.dtype)

    def _update(self, network: torch.nn.Module, optimiser: torch.optim.Adam, loss: Tensor, share: float) -> Tensor:
        optimiser.zero_grad(set_to_none=True)
        loss = share * loss
        loss.backward()
        parallel.sum_gradients(network.parameters())
        optimiser.step()
        return loss.detach()
