"""What has been trained so far on simulated images, before a scale's grid is whole: test scores, and a picture.

python -m cryo_lib.paper.trained [PATTERN...]    trainings of the scale in params.yaml; patterns as of `cluster train`
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from cryo_lib.evaluate.metrics import SCORES
from cryo_lib.files import write_text
from cryo_lib.networks import models
from cryo_lib.networks.runs import Run
from cryo_lib.paper import cluster, figures, methods, tables
from cryo_lib.paper.experiments import read_scale
from cryo_lib.paper.machine import device_name, revision
from cryo_lib.stacks.dataset import Dataset, Experiment

KEYS = ["study", "method", "experiment", "variant", "seed"]
WITHOUT_TRAINING = "baselines", "posterior", "classes"  # folders of denoised test images below runs/<scale>


def speeds(scratch: Path) -> dict[str, float]:
    """Images a second of each training that has ended, by the folder of its run, as `runs.run` wrote them."""
    lines = (scratch / "speed.jsonl").read_text().splitlines() if (scratch / "speed.jsonl").is_file() else []
    return {line["run"]: line["images_per_s"] for line in map(json.loads, lines)}


def finished(params: dict[str, Any], patterns: list[str]) -> list[tuple[str, Run]]:
    """The finished trainings on simulated images that match patterns; ValueError where there is none."""
    chosen = [task for task in cluster.in_order(params, patterns) if task[0] in params["studies"]]
    found = [task for task in chosen if cluster.finished(params, *task)]
    if not found:
        where = f"among {' '.join(patterns) or 'all'} of the scale {params['scale']!r}"
        problem = f"expected a finished training on simulated images {where}, got none of {len(chosen)}"
        raise ValueError(f"trained: {problem}; make one by `python -m cryo_lib.paper.cluster train`")
    return found


def denoised(
    data: Dataset, runs: Path, tasks: list[tuple[str, Run]], device: torch.device, took: dict[str, float]
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """The test images as they are, by each method without training that has run on them, and by each training.

    Yields the `KEYS`, the speed and the kind of device of each, and the images `(n, h, w)`.
    """
    experiments = {run.experiment: Experiment.parse(run.experiment) for _, run in tasks}
    untrained = {"study": "", "variant": "", "seed": -1, "device": "", "images_per_s": np.nan}
    for name in dict.fromkeys(str(Experiment(each.protocol, each.snr)) for each in experiments.values()):
        yield untrained | {"method": "noisy", "experiment": name}, data.pairs("test", Experiment.parse(name))[1]
        for path in (path for folder in WITHOUT_TRAINING for path in sorted((runs / folder / name).glob("*.npy"))):
            yield untrained | {"method": path.stem, "experiment": name}, np.load(path)
    for study, run in tasks:
        folder = runs / study / run.folder
        model, card = models.load(folder / "generator.safetensors")
        x_hat = models.denoise_images(model.to(device), data.pairs("test", experiments[run.experiment])[1])
        of_run = {"study": study, "method": methods.shown_as(study, run.method), "experiment": run.experiment}
        of_run |= {"variant": run.variant, "seed": run.seed, "device": card["code"]["device"]}
        of_run["images_per_s"] = took.get(folder.as_posix(), np.nan)
        yield of_run, x_hat


def in_words(table: pd.DataFrame) -> str:
    """The table as Markdown; a column of variants where there are any."""
    columns = {"method": "Method", "experiment": "Experiment", "variant": "Variant", "seed": "Seed"}
    columns |= {"psnr": "PSNR (dB)", "ssim": "SSIM", "device": "Trained on", "images_per_s": "Training (images/s)"}
    if not table["variant"].any():
        del columns["variant"]
    readable = table.assign(
        method=[methods.METHODS[name].label for name in table["method"]],
        psnr=table["psnr"].map("{:.2f}".format),
        ssim=table["ssim"].map("{:.3f}".format),
        seed=table["seed"].map(lambda seed: "—" if seed < 0 else str(seed)),
        device=table["device"].replace("", "—"),
        images_per_s=table["images_per_s"].map(lambda rate: "—" if np.isnan(rate) else f"{rate:,.0f}"),
    )
    return tables.markdown(readable[list(columns)].rename(columns=columns))


def write(params: dict[str, Any], patterns: list[str], device: str = "auto", scratch: Path = cluster.SCRATCH) -> str:
    """Write `results/<scale>/trained.csv` and `.md`, and `figures/<scale>/trained.png` and `.pdf`; the Markdown.

    ValueError where nothing is finished that the patterns match; see `finished`.
    """
    scale, chosen, took = params["scale"], models.pick_device(device), speeds(scratch)
    tasks, data = finished(params, patterns), Dataset(Path("data", scale, "rnap"))
    x, rows = data.clean("test"), []
    titles, images, limits = ["Clean"], [x[0]], [(0.0, 1.0)]
    for of_run, x_hat in denoised(data, Path("runs", scale), tasks, chosen, took):
        method, experiment, variant, seed = (of_run[name] for name in KEYS[1:])
        rows.append(tables.over_images(tables.score(x, x_hat, method, experiment, seed)).assign(**of_run))
        named = ", ".join(filter(None, [methods.METHODS[method].label, variant]))
        told = f"{experiment}, seed {seed}" if seed > 0 else experiment
        titles.append(f"{named}\n{told}\n{rows[-1]['psnr'].item():.1f} dB")
        images.append(x_hat[0])
        limits.append(figures.noise_limits(x_hat[0]) if method == "noisy" else (0.0, 1.0))
        print(titles[-1].replace("\n", ", "), flush=True)
    table = pd.concat(rows, ignore_index=True)[[*KEYS, "n_images", *SCORES, "device", "images_per_s"]]
    tables.write_csv(Path("results", scale, "trained.csv"), table)
    figures.use_style()
    grid = figures.image_grid(images, titles, limits, data.card["pixel_size"], 5)
    figures.save(grid, Path("figures", scale, "trained"))
    everything = cluster.tasks(params)
    left = sum(not cluster.finished(params, *task) for task in everything)
    text = f"Evaluated on {device_name(chosen)}, torch {torch.__version__}, revision {revision('.')}. "
    text += f"{len(x):,} test images; PSNR and SSIM are means over them. {left} of the scale's {len(everything)} "
    text += "trainings are not made yet.\n\n"
    text += in_words(table)
    write_text(Path("results", scale, "trained.md"), text)
    return text


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 when all went well."""
    parser = argparse.ArgumentParser(prog="python -m cryo_lib.paper.trained", description=__doc__.splitlines()[0])
    parser.add_argument("patterns", nargs="*", metavar="PATTERN")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    try:
        print(write(read_scale("params.yaml"), options.patterns, options.device))
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
