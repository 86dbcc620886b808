"""From one value an image to tables: means and sds over seeds, the best marked, the paper's values beside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cryo_lib.evaluate.metrics import SCORES
from cryo_lib.files import atomic
from cryo_lib.paper import methods

HIGHER_IS_BETTER = {"mse": False, "psnr": True, "ssim": True}
KEYS = ["method", "experiment", "seed"]
DENOISERS = {  # of a stack, by the first word of its path; of other words one network
    "halves": "two networks, disjoint pairs",
    "screened": "one network, screened pairs",
    "posterior": "all references",
    "posterior_halves": "disjoint halves of the references",
}


def score(x: Any, x_hat: Any, method: str, experiment: str, seed: int | None = None) -> pd.DataFrame:
    """MSE, PSNR and SSIM of each image as rows `method, experiment, seed, image, mse, psnr, ssim`.

    `x`, `x_hat` as in `metrics.mse`; `seed` None (no randomness) is written as -1.
    """
    values = {name: metric(x, x_hat) for name, metric in SCORES.items()}
    rows = pd.DataFrame({"image": np.arange(len(values["mse"]))} | values)
    for column, value in zip(reversed(KEYS), (-1 if seed is None else seed, experiment, method)):
        rows.insert(0, column, value)
    return rows


def write_csv(path: str | Path, table: pd.DataFrame, digits: int = 6) -> Path:
    """Write a table as CSV, atomically, with `digits` significant digits and Unix line ends."""
    with atomic(path) as temporary:
        table.to_csv(temporary, index=False, float_format=f"%.{digits}g", lineterminator="\n")
    return Path(path)


def write_per_image(folder: str | Path, rows: pd.DataFrame) -> list[Path]:
    """Write `per_image_<metric>.csv`: a row a test image, a column a run (`method/experiment/seed`)."""
    run = rows["method"] + "/" + rows["experiment"] + rows["seed"].map(lambda s: "" if s < 0 else f"/seed{s}")
    wide = rows.assign(run=run).pivot(index="image", columns="run", values=list(SCORES))
    order, folder = list(dict.fromkeys(run)), Path(folder)
    return [write_csv(folder / f"per_image_{name}.csv", wide[name][order].reset_index(), digits=5) for name in SCORES]


def over_images(rows: pd.DataFrame, keys: Sequence[str] = KEYS) -> pd.DataFrame:
    """Mean over the test images of each run, which `keys` name: rows `method, experiment, seed, mse, ..., n_images`."""
    grouped = rows.groupby(list(keys), sort=False)
    return grouped[list(SCORES)].mean().reset_index().assign(n_images=grouped.size().to_numpy())


def over_seeds(runs: pd.DataFrame, keys: Sequence[str] = KEYS[:2]) -> pd.DataFrame:
    """Mean and sd (n - 1) over seeds of `over_images`: `method, experiment, mse, ..., mse_sd, ..., n_seeds`.

    `keys` are those of a run but its seed. The sd of one seed is NaN.
    """
    grouped = runs.groupby(list(keys), sort=False)
    means, sds = grouped[list(SCORES)].mean(), grouped[list(SCORES)].std().add_suffix("_sd")
    return means.join(sds).assign(n_seeds=grouped.size()).reset_index()


def stability(curves: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """How steady trainings were, a row a run (which `keys` name, as the index): `fall`, `spread`.

    `fall` is the most that validation PSNR (dB) lost from one line of metrics to the next, so it depends on how far
    apart the lines are; 0 where it never fell. `spread` is the last one: the outputs' variation over images divided by
    the references', 1 for images as varied as these and 0 for one picture.

    Parameters
    ----------
    curves : lines of metrics in order, with the columns `psnr` and `spread`.
    """
    grouped = curves.groupby(list(keys), sort=False)
    fall = grouped["psnr"].agg(lambda psnr: np.fmax(0.0, -psnr.diff().min()))
    return pd.DataFrame({"fall": fall, "spread": grouped["spread"].last()})


def mark_best(summary: pd.DataFrame) -> pd.DataFrame:
    """Add `<metric>_best`: True in each experiment for the best mean and all within its one sd, as in Table 1.

    What the paper does not have (`methods.BEYOND`) takes no part.
    """
    summary = summary.copy()
    taking_part = summary[~summary["method"].isin([*methods.BEYOND])]
    for name, higher in HIGHER_IS_BETTER.items():
        marks = pd.Series(False, index=summary.index)
        for _, group in taking_part.groupby("experiment"):
            sign = 1 if higher else -1
            best = (sign * group[name]).idxmax()
            margin = np.nan_to_num(group.loc[best, f"{name}_sd"])
            marks[group.index] = sign * group[name] >= sign * group.loc[best, name] - margin
        summary[f"{name}_best"] = marks
    return summary


def cell(row: Any, metric: str) -> str:
    """`mean ± sd` of one metric of a summary row, in the paper's precision, bold where marked best; — for nothing."""
    value, sd = row[metric], row.get(f"{metric}_sd", np.nan)
    if not np.isfinite(value):
        return "—"
    form = "{:.2e}" if metric == "mse" else "{:.2f}"
    text = form.format(value) + (f" ± {form.format(sd)}" if np.isfinite(sd) else "")
    return f"**{text}**" if row.get(f"{metric}_best", False) else text


def beside_paper(ours: pd.DataFrame, paper: pd.DataFrame, checkpoints: pd.DataFrame, snr: float) -> pd.DataFrame:
    """Table 1 at one SNR as strings: a row a method, the paper's values and ours side by side.

    In italics what the paper does not have.

    Parameters
    ----------
    ours : `mark_best(over_seeds(...))` without contaminated experiments.
    paper : `results/preprint/table1.csv`: method, snr, mse, mse_sd, psnr, psnr_sd, ssim, ssim_sd.
    checkpoints : the five best of one run a method and experiment: `method, experiment, psnr` (mean), `psnr_sd`.
    """
    awgn, clipped = (
        ours[ours["experiment"] == f"{protocol}-{snr:g}-none"].set_index("method") for protocol in ("awgn", "clipped")
    )
    printed = paper[paper["snr"] == snr].set_index("method")
    best_of_one = checkpoints[checkpoints["experiment"] == f"awgn-{snr:g}-none"].set_index("method")

    def entry(table: pd.DataFrame, method: str, metric: str) -> str:
        return cell(table.loc[method], metric) if method in table.index else "—"

    rows = []
    for method, known in methods.among([*awgn.index, *clipped.index]).items():
        row = {"Method": f"*{known.label}*" if method in methods.BEYOND else known.label}
        for metric in SCORES:
            row[f"{metric.upper()}, paper"] = entry(printed, method, metric)
            row[f"{metric.upper()}, ours"] = entry(awgn, method, metric)
        row["PSNR, ours, clipped"] = entry(clipped, method, "psnr")
        row["PSNR, ours, five checkpoints of one run"] = entry(best_of_one, method, "psnr")
        rows.append(row)
    return pd.DataFrame(rows)


def with_references(ours: pd.DataFrame) -> pd.DataFrame:
    """PSNR on additive noise, a row a method, by what the method is told; those that need no reference come first.

    `ours` is `over_seeds(...)` without contaminated experiments. Columns: method, told, references, `psnr_<snr>`, ...
    """
    ours = ours[ours["experiment"].str.startswith("awgn-")]
    psnr = ours.pivot(index="method", columns="experiment", values="psnr")
    psnr.columns = [f"psnr_{name.split('-')[1]}" for name in psnr.columns]
    known = methods.among(psnr.index)
    psnr = psnr.loc[[*known], sorted(psnr.columns, reverse=True)].reset_index()
    needs = [entry.needs for entry in known.values()]
    psnr.insert(1, "told", needs)
    psnr.insert(2, "references", [any(word in need for word in methods.CLEAN) for need in needs])
    return psnr.sort_values("references", kind="stable", ignore_index=True)


def in_words(table: pd.DataFrame) -> pd.DataFrame:
    """`with_references` as strings; in bold the best PSNR of those that are told no reference."""
    columns = [column for column in table if column.startswith("psnr_")]
    best, known = table[~table["references"]][columns].max(), methods.labels()
    words = {"Method": table["method"].map(known), "Is told": table["told"]}
    words["Clean references"] = table["references"].map({True: "yes", False: "no"})
    for name in columns:
        cells = [f"{v:.2f}" if np.isfinite(v) else "—" for v in table[name]]
        bold = ~table["references"] & (table[name] == best[name])
        words[f"PSNR, SNR {name[5:]}"] = [f"**{cell}**" if b else cell for cell, b in zip(cells, bold)]
    return pd.DataFrame(words)


def resolutions(table: pd.DataFrame, truth: str = "Truth") -> pd.DataFrame:
    """The resolutions of `reconstruction.compare` as strings, a row a stack.

    `table`'s index is the stacks' paths, `study/method/experiment`; `truth` is what the maps were compared with.
    """
    known = methods.labels() | {"noisy": "Noisy images"}
    words = [name.split("/") for name in table.index]
    described = pd.DataFrame({"Images": [known.get(part := (word[1:2] or word)[0], part) for word in words]})
    described["Denoiser"] = [DENOISERS.get(word[0], "one network") if word[1:] else "—" for word in words]
    if any(word[2:] for word in words):
        described["Contamination of their references"] = [word[2].split("-")[2] if word[2:] else "—" for word in words]
    titles = ["Half-maps", "Half-maps, masked", "Half-maps, masked and corrected", truth, f"{truth}, masked"]
    described[[f"{title} (Å)" for title in titles]] = [[f"{value:.1f}" for value in row] for row in table.to_numpy()]
    return described


def markdown(table: pd.DataFrame) -> str:
    """A table of strings as GitHub Markdown."""
    rows = [table.columns, ["---"] * len(table.columns), *table.itertuples(index=False)]
    return "".join("| " + " | ".join(str(value).replace("|", "\\|") for value in row) + " |\n" for row in rows)
