"""Algorithm 1 as a paper's script is written: what the training engine is measured against.

Networks in torch's own layout (NCHW) and float32, torch's default settings throughout, minibatches copied from numpy to
the device one by one, G(y) computed anew at each update, gradients of D kept while G is updated, and losses read by
`.item()` in every iteration. The networks and the (alpha, beta)-scores are the library's: they are not compared.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from cryo_lib.networks import losses

K_D, K_G, ETA_D, ETA_G, LAM, MU = 1, 2, 1e-3, 1e-2, 10.0, 10.0  # the paper's, as in `runs.Settings`


class PlainLoop:
    """One training; `train` is the script's loop.

    Parameters
    ----------
    method : scores and reconstruction loss.
    generator, discriminator : freshly made networks, moved to `device`; the discriminator is None for an autoencoder.
    x, y : references and noisy images, `(n, h, w)` numpy arrays of the networks' dtype.
    batch_size : pairs a minibatch.
    """

    def __init__(
        self,
        method: losses.Method,
        generator: nn.Module,
        discriminator: nn.Module | None,
        x: np.ndarray,
        y: np.ndarray,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.method, self.x, self.y, self.batch_size, self.device = method, x, y, batch_size, device
        self.rng = np.random.default_rng(0)
        self.G = generator.to(device)
        self.optimizer_G = torch.optim.Adam(self.G.parameters(), lr=ETA_G, betas=(0.5, 0.999))
        self.D = discriminator
        if discriminator is not None:
            self.D = discriminator.to(device)
            self.optimizer_D = torch.optim.Adam(self.D.parameters(), lr=ETA_D, betas=(0.5, 0.999))
        self.log: list[dict[str, float]] = []
        self.order = np.empty(0, int)

    def train(self, iterations: int) -> None:
        """The next so many iterations, over as many epochs as they take; `log` gets a line for each."""
        for _ in range(iterations):
            if not len(self.order):
                self.order = self.rng.permutation(len(self.x))
            rows, self.order = self.order[: self.batch_size], self.order[self.batch_size :]
            self.iteration(rows, self.rng.random((K_D, len(rows))))

    def iteration(self, rows: np.ndarray, mix: np.ndarray) -> None:
        """One iteration on the pairs of `rows`; `mix`, `(k_d, m)` in [0, 1], is WGANgp's."""
        x = torch.tensor(self.x[rows])[:, None].to(self.device)
        y = torch.tensor(self.y[rows])[:, None].to(self.device)
        line = {}
        if self.D is not None:
            for k in range(K_D):
                fake = self.G(y).detach()
                loss_D = -self.method.real(self.D(x)).mean() - self.method.fake(self.D(fake)).mean()
                if self.method.adversary == "wgan_gp":
                    share = torch.tensor(mix[k], dtype=x.dtype)[:, None, None, None].to(self.device)
                    loss_D = loss_D + MU * self._gradient_penalty(x, fake, share)
                self.optimizer_D.zero_grad()
                loss_D.backward()
                self.optimizer_D.step()
                line["loss_d"] = loss_D.item()
        for _ in range(K_G):
            fake = self.G(y)
            difference = fake - x
            reconstruction = difference.abs().mean() if self.method.loss == "l1" else difference.pow(2).mean()
            loss_G = reconstruction
            if self.D is not None:
                loss_G = LAM * reconstruction + self.method.fake(self.D(fake)).mean()
            self.optimizer_G.zero_grad()
            loss_G.backward()
            self.optimizer_G.step()
        self.log.append(line | {"loss_g": loss_G.item(), "reconstruction": reconstruction.item()})

    def _gradient_penalty(self, x: Tensor, fake: Tensor, share: Tensor) -> Tensor:
        between = (share * x + (1 - share) * fake).requires_grad_(True)
        scores = self.D(between)
        # The score of an image is the mean over its patches.
        upstream = torch.ones_like(scores) / scores[0].numel()
        (gradient,) = torch.autograd.grad(scores, between, grad_outputs=upstream, create_graph=True)
        return ((gradient.reshape(len(x), -1).norm(2, dim=1) - 1) ** 2).mean()
