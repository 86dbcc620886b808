"""What the arithmetic of a training costs in accuracy: validation PSNR by precision, over seeds."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.sizes import KINDS, Size
from cryo_lib.evaluate.metrics import SCORES
from cryo_lib.files import write_json
from cryo_lib.networks import runs
from cryo_lib.simulate import density, projection, structures

EXPERIMENT = "awgn-0.1-none"
BOX = 204.8  # A, of the projected phantom


def write_pairs(folder: Path, size: int, counts: dict[str, int]) -> Path:
    """Write projections of the phantom's two ends, `counts` of each split, as `stacks.dataset.Dataset` reads them."""
    pixel_size = BOX / size
    ends = structures.prepare("phantom", 2)
    volumes = np.stack([density.density(each, size, pixel_size, 2 * pixel_size) for each in ends])
    for seed, (split, n) in enumerate(counts.items()):
        x, _, _ = projection.simulate(volumes, n, seed=seed)
        np.save(folder / f"x_{split}.npy", x)
    write_json(folder / "card.json", {"image_size": size, "pixel_size": pixel_size, "seed": 0})
    return folder


def run(device: str, size: Size) -> dict[str, Any]:
    """Trainings of one method of each kind: a row a method and precision, with each seed's validation PSNR (dB)."""
    chosen = size.accuracy
    network = {"width": chosen["width"], "batch_size": chosen["batch"], "epochs": chosen["epochs"], "decay": 0.7}
    rows = []
    with tempfile.TemporaryDirectory() as name:
        data = write_pairs(Path(name), chosen["size"], {"train": chosen["pairs"], "val": chosen["validation"]})
        seeds = range(chosen["seeds"])
        tasks = [runs.Run(method, EXPERIMENT, seed) for seed in seeds for method in KINDS]
        for precision in size.precisions:
            print(f"accuracy: {precision}", flush=True)
            out = data / precision
            settings = runs.Settings(**network, precision=precision, log_every=chosen["pairs"])
            jobs = [runs.Job(task, settings, out) for task in tasks]
            runs.run_grid(jobs, data, data / "scratch", device, scores=SCORES)
            for method in KINDS:
                cards = [out / run.folder / "generator.json" for run in tasks if run.method == method]
                psnr = [json.loads(card.read_text())["validation"]["psnr"] for card in cards]
                rows.append({"method": method, "precision": precision, "psnr": psnr})
    return {"configuration": dict(chosen), "rows": rows}
