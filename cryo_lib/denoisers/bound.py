"""The Bayes bound: the posterior mean under the true volumes, uniform poses and the true noise.

Its expected squared error is the least that any estimator can have, a network included. It is computed by Monte
Carlo, over projections at directions spread over the sphere and all their turns in the plane. Over finitely many it
is an estimator like any other: its PSNR is a *lower* bound of the optimum's, and grows with the number of templates
towards it. `growth` shows how far it still moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from cryo_lib import checks
from cryo_lib.denoisers.summing import Posterior
from cryo_lib.denoisers.templates import Templates, directions

CHUNK = 1024  # projections that are made at a time


def growth(
    y: Any,
    volumes: Any,
    sigma: Any,
    n_templates: int,
    seed: int,
    doublings: int = 3,
    device: str = "auto",
    **given: Any,
) -> Iterator[tuple[int, Posterior]]:
    """Yield the number of templates and the posterior for n_templates / 2**doublings, then twice as many, and so on.

    Each takes up those before it, in grids of directions of their own turns.

    Parameters
    ----------
    y : noisy images `(n, h, h)`. volumes : `(c, h, h, h)`, equally likely. sigma : sd of the noise, a number or `(n,)`.
    n_templates : projections in all, in equal shares of the volumes. seed : of their directions.
    given : `transfer`, `spectrum` and `shifts` as of `PosteriorSum`.
    """
    templates = Templates(volumes, device=device)
    total, count = templates.sum(y, sigma, **given), len(templates.volumes)
    each = checks.integer("n_templates", n_templates, low=count * 2**doublings) // count
    before = 0
    for step in range(doublings, -1, -1):
        grid = directions(each // 2**step - before, [seed, step])
        for start in range(0, len(grid), CHUNK):
            for label in range(count):
                total.add(templates.coefficients(label, grid[start : start + CHUNK]), label, scores=False)
        before += len(grid)
        yield total.count, total.result()


def bayes_mean(y: Any, volumes: Any, sigma: Any, n_templates: int, seed: int, **given: Any) -> np.ndarray:
    """E[x | y] under the true volumes and noise, `(n, h, h)` float32, by n_templates projections; see `growth`."""
    ((_, posterior),) = growth(y, volumes, sigma, n_templates, seed, doublings=0, **given)
    return posterior.x_hat
