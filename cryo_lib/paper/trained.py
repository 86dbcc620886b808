"""What has been trained so far, on the test images, before a scale's grid is whole: a table and a picture.

python -m cryo_lib.paper.trained [PATTERN...]    trainings of the scale in params.yaml; patterns as of `cluster train`
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from cryo_lib.files import write_text
from cryo_lib.networks import models
from cryo_lib.paper import cluster, figures, methods, tables
from cryo_lib.paper.experiments import read_scale
from cryo_lib.stacks.dataset import Dataset, Experiment

KEYS = ["study", "method", "experiment", "variant", "seed"]
WITHOUT_TRAINING = "baselines", "posterior", "classes"  # folders of denoised test images below runs/<scale>


def speeds(scratch: Path) -> dict[str, float]:
    """Images a second of each training that has ended, by the folder of its run, as `runs.run` wrote them."""
    lines = (scratch / "speed.jsonl").read_text().splitlines() if (scratch / "speed.jsonl").is_file() else []
    return {line["run"]: line["images_per_s"] for line in map(json.loads, lines)}


def denoised(
    params: dict[str, Any], patterns: list[str], device: torch.device, took: dict[str, float]
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """The test images by each method that has run, after the noisy ones: its `KEYS` and speed, and `(n, h, w)`."""
    scale = params["scale"]
    data, runs = Dataset(Path("data", scale, "rnap")), Path("runs", scale)
    tasks = [task for task in cluster.in_order(params, patterns) if cluster.finished(params, *task)]
    names = {run.experiment: Experiment.parse(run.experiment) for _, run in tasks}
    untrained = {"study": "", "variant": "", "seed": -1, "images_per_s": np.nan}
    for name, experiment in names.items():
        if not experiment.eps:
            yield untrained | {"method": "noisy", "experiment": name}, data.pairs("test", experiment)[1]
    for path in sorted(path for folder in WITHOUT_TRAINING for path in runs.glob(f"{folder}/*/*.npy")):
        yield untrained | {"method": path.stem, "experiment": path.parts[-2]}, np.load(path)
    for study, run in tasks:
        folder = runs / study / run.folder
        model, _ = models.load(folder / "generator.safetensors")
        x_hat = models.denoise_images(model.to(device), data.pairs("test", names[run.experiment])[1])
        of_run = {"study": study, "method": methods.shown_as(study, run.method), "experiment": run.experiment}
        of_run |= {"variant": run.variant, "seed": run.seed, "images_per_s": took.get(folder.as_posix(), np.nan)}
        yield of_run, x_hat


def revision(root: str | Path) -> str:
    """The commit of a checkout, "-dirty" where files have changed since, or that which `cluster/pack.sh` packed."""
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"]
    said = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    packed = Path(root, "build", "revision")
    return said or (packed.read_text().strip() if packed.is_file() else "unknown")


def machine(device: torch.device) -> str:
    """In words, what trainings ran on, where this is called where they did."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return f"{name}, torch {torch.__version__}, revision {revision('.')}"


def write(params: dict[str, Any], patterns: list[str], device: str = "auto", scratch: Path = cluster.SCRATCH) -> str:
    """Write `results/<scale>/trained.csv` and `.md`, and `figures/<scale>/trained.png` and `.pdf`; the Markdown."""
    scale, chosen, took = params["scale"], models.pick_device(device), speeds(scratch)
    data = Dataset(Path("data", scale, "rnap"))
    x, rows, shown = data.clean("test"), [], {"Clean": data.clean("test")[0]}
    for of_run, x_hat in denoised(params, patterns, chosen, took):
        method, experiment, variant, seed = (of_run[name] for name in KEYS[1:])
        row = tables.over_images(tables.score(x, x_hat, method, experiment, seed)).assign(**of_run)
        rows.append(row)
        told, contaminated = f"{row['psnr'].item():.1f} dB", Experiment.parse(experiment)
        what = [methods.METHODS[method].label, variant, f"{contaminated.kind}, ε = {contaminated.eps:g}"]
        shown[", ".join(filter(None, what[: 3 if contaminated.eps else 2])) + f"\n{told}"] = x_hat[0]
        print(f"{'/'.join(str(of_run[name]) for name in KEYS)}: {told}", flush=True)
    table = pd.concat(rows, ignore_index=True)
    table = table[[*KEYS, "n_images", "mse", "psnr", "ssim", "images_per_s"]]
    tables.write_csv(Path("results", scale, "trained.csv"), table)

    figures.use_style()
    limits = [figures.noise_limits(image) if "Noisy" in title else (0, 1) for title, image in shown.items()]
    grid = figures.image_grid(list(shown.values()), list(shown), limits, data.card["pixel_size"])
    figures.save(grid, Path("figures", scale, "trained"))

    left = sum(not cluster.finished(params, *task) for task in cluster.tasks(params))
    said = f"{machine(chosen)}. {len(x):,} test images; PSNR and SSIM are means over them. "
    said += f"{left} of the scale's {len(cluster.tasks(params))} trainings are not made yet.\n\n"
    words = {"method": "Method", "experiment": "Experiment", "variant": "Variant", "seed": "Seed"}
    words |= {"psnr": "PSNR (dB)", "ssim": "SSIM", "images_per_s": "Training (images/s)"}
    readable = table.assign(
        method=[methods.METHODS[name].label for name in table["method"]],
        psnr=table["psnr"].map("{:.2f}".format),
        ssim=table["ssim"].map("{:.3f}".format),
        seed=table["seed"].map(lambda seed: "—" if seed < 0 else str(seed)),
        images_per_s=table["images_per_s"].map(lambda rate: "—" if np.isnan(rate) else f"{rate:,.0f}"),
    )
    if not table["variant"].any():
        del words["variant"]
    text = said + tables.markdown(readable[list(words)].rename(columns=words))
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
