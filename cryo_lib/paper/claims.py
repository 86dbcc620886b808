"""Does a claim hold? A claim is a list of comparisons; a test of each, at 5 %, and a rule that joins them, decide.

A comparison says "a is greater than b". `a` and `b` map a seed to one value an image (shell, run, ...), the same images
in both; the seed -1 says that there is no randomness. What is compared is the difference of runs of one seed:

- of several seeds: the mean differences, one a seed, by a one-sided t-test;
- of one seed: the differences image by image, by a one-sided Wilcoxon signed-rank test. It speaks of these two runs,
  not of what another seed would give.

A claim holds where every comparison is decided for it (so no correction is due), does not where one is decided against
it (at 5 % divided by their number, Bonferroni), and is undecided else: runs are missing, or too few.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

LEVEL = 0.05
Runs = Mapping[int, np.ndarray]
VERDICTS = {True: "yes", False: "no", None: "undecided"}


class Comparison(NamedTuple):
    """Is a greater than b? The mean difference, the p-values for and against, and what was tested; NaN without runs."""

    difference: float
    p_for: float
    p_against: float
    n: int
    over: str


def compare(a: Runs, b: Runs, over: str = "images") -> Comparison:
    """Test that `a` is greater than `b`, as the module says; `over` names the values of one run."""
    a, b = (dict.fromkeys(other, one[-1]) if set(one) == {-1} else one for one, other in ((a, b), (b, a)))
    differences = [np.atleast_1d(np.subtract(a[seed], b[seed])) for seed in sorted(a.keys() & b.keys())]
    if not differences or not all(np.isfinite(each).all() for each in differences):
        return Comparison(np.nan, np.nan, np.nan, 0, over)
    several = len(differences) > 1
    values = np.array([np.mean(each) for each in differences]) if several else differences[0]
    n, over, p = len(values), "seeds" if several else over, (1.0, 1.0)
    if several:
        with np.errstate(divide="ignore", invalid="ignore"):
            t = values.mean() / stats.sem(values)
        p = (stats.t.sf(t, n - 1), stats.t.cdf(t, n - 1)) if values.any() else p
    elif n > 1 and values.any():
        p = tuple(stats.wilcoxon(values, alternative=side).pvalue for side in ("greater", "less"))
    return Comparison(float(values.mean()), float(p[0]), float(p[1]), n, over)


def decide(comparisons: Sequence[Comparison]) -> bool | None:
    """Whether the claim that they make holds; None where that is undecided."""
    known = [each for each in comparisons if each.n]
    if any(each.p_against < LEVEL / len(known) for each in known):
        return False
    return True if known and all(each.p_for < LEVEL for each in comparisons) else None


def row(claim: str, paper: str, comparisons: Iterable[Comparison], ours: str = "", unit: str = "") -> dict[str, Any]:
    """One row of the table of claims, of a claim that comparisons make; `ours` comes before what they found."""
    comparisons = list(comparisons)
    known = [each for each in comparisons if each.n]
    found, test = ["no runs"], ""
    if known:
        low, high = (f"{end(each.difference for each in known):.3g}".replace("-", "−") for end in (min, max))
        found = [f"difference {low} {unit}".strip()]
        if len(known) > 1:
            alike = sum(each.difference > 0 for each in known)
            found = [f"differences {low} to {high} {unit}".strip(), f"{alike} of {len(known)} > 0"]
        tested = dict.fromkeys((each.over, each.n) for each in known)
        name = {True: "t-test over {0} {1}", False: "Wilcoxon over {0} {1}"}
        test = ", ".join("one value each" if n == 1 else name[over == "seeds"].format(n, over) for over, n in tested)
        against = min(1.0, len(known) * min(each.p_against for each in known))
        test += f"; p = {max(each.p_for for each in known):.2g} for, {against:.2g} against"
    if len(known) < len(comparisons):
        found.append(f"{len(comparisons) - len(known)} of {len(comparisons)} comparisons not run")
    return _cells(claim, paper, "; ".join([ours] * bool(ours) + [", ".join(found)]), decide(comparisons), test)


def counted(claim: str, paper: str, holds: bool | None, ours: str, rule: str) -> dict[str, Any]:
    """One row of the table of claims, of a claim that is read off and not tested; None where it cannot be."""
    return _cells(claim, paper, ours, holds, rule)


def _cells(claim: str, paper: str, ours: str, holds: bool | None, test: str) -> dict[str, Any]:
    return {"Claim": claim, "The paper's": paper, "Ours": ours, "Holds": VERDICTS[holds], "Test": test or "—"}


def per_image(folder: str | Path, metric: str) -> dict[tuple[str, str], dict[int, np.ndarray]]:
    """`per_image_<metric>.csv` of a folder of results: (method, experiment) -> seed -> one value an image.

    Nothing for what was not run, so that its comparison is undecided.
    """
    runs: dict[tuple[str, str], dict[int, np.ndarray]] = defaultdict(dict)
    for name, values in pd.read_csv(Path(folder) / f"per_image_{metric}.csv", index_col="image").items():
        method, experiment, *seed = str(name).split("/")
        runs[method, experiment][int(seed[0].removeprefix("seed")) if seed else -1] = values.to_numpy()
    return runs


def per_run(table: pd.DataFrame, keys: Sequence[str], value: str) -> dict[tuple[Any, ...], dict[int, np.ndarray]]:
    """A table of one row a run, with a column `seed`: what `keys` name -> seed -> the one value of that run."""
    runs: dict[tuple[Any, ...], dict[int, np.ndarray]] = defaultdict(dict)
    for _, each in table.iterrows():
        runs[tuple(each[list(keys)])][int(each["seed"])] = np.array([each[value]], float)
    return runs


def harm(contaminated: Runs, clean: Runs) -> dict[int, np.ndarray]:
    """How much greater the MSE is after contaminated training: the logarithm of the ratio, of seeds that both have."""
    return {seed: np.log(contaminated[seed] / clean[seed]) for seed in contaminated.keys() & clean.keys()}


def full_map(halves: np.ndarray) -> np.ndarray:
    """The FSC with the truth that a half-map FSC promises for the map of all images, sqrt(2 f / (1 + f)).

    Source: Rosenthal & Henderson 2003; 0.143 between half-maps is 0.5 against the truth.
    """
    halves = np.clip(halves, 0, 1)
    return np.sqrt(2 * halves / (1 + halves))
