"""Everything derived from the measurements: ratios, parts of the ceiling, targets, and the tables that show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, median, stdev
from typing import Any

import pandas as pd

from benchmarks.denoise import SNR
from cryo_lib.paper.methods import METHODS
from cryo_lib.paper.tables import markdown

Results = Mapping[str, Any]
NOISE = 3.0  # standard errors of the difference of two means over few seeds that still count as noise
FLAT = 1.1  # times the memory at the shortest stack that still counts as flat


def ratios(rates: Mapping[str, Sequence[float]], ours: str, other: str) -> list[float]:
    """The ratio of each pair of timings that were made one after the other."""
    return [a / b for a, b in zip(rates[ours], rates[other], strict=True)]


def rate_of(what: str, group: Results, row: Results) -> float:
    """FLOP/s ("flop") of our training steps, all trainings together, or bytes/s ("bytes") read and written uncached."""
    return median(row["images_per_s"]["ours"]) / group["configuration"]["batch"] * row["iteration"][what]


def part_of_ceiling(group: Results, row: Results) -> float:
    """FLOP/s of our step over the device's best, by matrix product or convolution, at the same precision."""
    return rate_of("flop", group, row) / max(group["ceiling"]["gemm"], group["ceiling"]["conv"])


def fastest(denoised: Results, who: str) -> str | None:
    """The denoiser of the fastest row whose name begins with `who`; None where there is none."""
    rates = {row["denoiser"]: median(row["images_per_s"]) for row in denoised["rows"]}
    return max((name for name in rates if name.startswith(who)), key=rates.get, default=None)


def topaz_ratio(denoised: Results) -> float | None:
    """Our fastest row over Topaz's fastest, the median of pairs of timings; None where Topaz was not measured."""
    rates, topaz = {row["denoiser"]: row["images_per_s"] for row in denoised["rows"]}, fastest(denoised, "Topaz")
    return median(ratios(rates, fastest(denoised, "Ours"), topaz)) if topaz else None


def topaz_gain(denoised: Results | None) -> float | None:
    """PSNR (dB) of our fastest row above that of Topaz's; None where Topaz was not measured."""
    scores = {row["denoiser"]: row["psnr"] for row in denoised["rows"]} if denoised else {}
    topaz = fastest(denoised, "Topaz") if denoised else None
    return scores[fastest(denoised, "Ours")] - scores[topaz] if topaz else None


def memory_ratio(rows: Sequence[Results]) -> float:
    """Peak memory of denoising the longest `.mrcs` over that of the shortest."""
    plain = sorted((row for row in rows if row["file"] == ".mrcs"), key=lambda row: row["images"])
    return plain[-1]["peak_memory"] / plain[0]["peak_memory"]


def changes(measured: Results) -> list[dict[str, Any]]:
    """What each precision changes against float32: `method`, `precision`, `change` of the mean PSNR (dB), and the
    standard error of that difference by the seeds' spread, `error`."""
    by = {(row["method"], row["precision"]): row["psnr"] for row in measured["rows"]}
    found = []
    for (method, precision), psnr in by.items():
        exact = by[method, "float32"]
        error = ((stdev(psnr) ** 2 + stdev(exact) ** 2) / len(psnr)) ** 0.5
        row = {"method": method, "precision": precision, "change": mean(psnr) - mean(exact), "error": error}
        found += [row] if precision != "float32" else []
    return found


def targets(results: Results) -> list[dict[str, Any]]:
    """Each target with what was measured: `target`, `value` (None where it was not) and `met` (None likewise)."""
    on_gpu, steps = results["environment"]["device_type"] == "cuda", results.get("steps", [])
    speed = [median(ratios(row["images_per_s"], "ours", "plain")) for group in steps for row in group["rows"]]
    parts = [part_of_ceiling(group, row) for group in steps for row in group["rows"]]
    memory = results.get("memory")
    lengths = sorted(row["images"] for row in memory if row["file"] == ".mrcs") if memory else [10**3, 10**6]
    topaz = topaz_ratio(results["denoise"]) if "denoise" in results else None
    rows = []

    def add(target: str, value: float | None, least: float = float("-inf"), most: float = float("inf")) -> None:
        rows.append({"target": target, "value": value, "met": None if value is None else least <= value <= most})

    slowest = min(speed) if speed else None
    add("GPU: every method's step at least 5 times the plain loop", slowest if on_gpu else None, 5.0)
    add("GPU: every method's step at least 0.4 of the ceiling", min(parts) if on_gpu and parts else None, 0.4)
    add("CPU: every method's step at least 1.5 times the plain loop", None if on_gpu else slowest, 1.5)
    add("Denoising at least 5 times Topaz-Denoise", topaz, 5.0)
    add("... with a PSNR at least its own on the same stack (dB above it)", topaz_gain(results.get("denoise")), 0.0)
    name = f"Denoising memory flat from {lengths[0]:,} to {lengths[-1]:,} images (at most {FLAT} times)"
    add(name, memory_ratio(memory) if memory else None, most=FLAT)
    apart = [abs(row["change"]) / row["error"] for row in changes(results["accuracy"])] if "accuracy" in results else []
    name = f"PSNR by precision within seed noise (at most {NOISE:g} standard errors apart)"
    add(name, max(apart, default=None), most=NOISE)
    return rows


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f}"


def _rate(values: Sequence[float]) -> str:
    middle = median(values)
    return f"{middle:,.1f}" if middle < 1000 else f"{middle:,.0f}"


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _targets_table(results: Results) -> pd.DataFrame:
    said = {None: "not measured in this run", True: "yes", False: "no"}
    rows = []
    for row in targets(results):
        value = "—" if row["value"] is None else f"{row['value']:.2f}"
        rows.append({"Target": row["target"], "Measured": value, "Met": said[row["met"]]})
    return pd.DataFrame(rows)


def _steps_table(group: Results) -> pd.DataFrame:
    rows = []
    for row in group["rows"]:
        rates = row["images_per_s"]
        rows.append(
            {
                "Method": METHODS[row["method"]].label,
                "Ours (images/s)": _rate(rates["ours"]),
                "Plain loop (images/s)": _rate(rates["plain"]),
                "Ratio": _spread(ratios(rates, "ours", "plain")),
                "GFLOP an image": f"{row['iteration']['flop'] / group['configuration']['batch'] / 1e9:.3g}",
                "Ours (GFLOP/s)": f"{rate_of('flop', group, row) / 1e9:,.0f}",
                "of the ceiling": f"{part_of_ceiling(group, row):.0%}",
                "Ours (GB/s)": f"{rate_of('bytes', group, row) / 1e9:,.1f}",
                "of the copy rate": f"{rate_of('bytes', group, row) / group['ceiling']['copy']:.0%}",
                "Memory, ours (MiB)": _mib(row["peak_memory"]["ours"]),
                "Memory, plain (MiB)": _mib(row["peak_memory"]["plain"]),
            }
        )
    return pd.DataFrame(rows)


def _steps(results: Results) -> str:
    parts = []
    for group in results["steps"]:
        chosen, ceiling, row = group["configuration"], group["ceiling"], group["rows"][0]
        several = f", {row['trainings']} trainings side by side with one thread each" if row["trainings"] > 1 else ""
        parts.append(
            f"### {chosen['name']}\n\n"
            f"Minibatches of {chosen['batch']}, {chosen['pairs']:,} pairs. Ours: {chosen['precision']}{several}, all "
            "images/s together; memory is that of one training. Plain loop: one, in float32 by torch's default "
            f"settings and threads. Ratio: median (lowest to highest) of {len(row['images_per_s']['ours'])} pairs of "
            "timings.\n\n"
            f"Ceiling, {chosen['precision']}: {ceiling['gemm'] / 1e9:,.0f} GFLOP/s by matrix product, "
            f"{ceiling['conv'] / 1e9:,.0f} GFLOP/s by 3x3 convolution; copies {ceiling['copy'] / 1e9:,.1f} GB/s read "
            "plus written. A step's bytes are those that its operations read and write, as if no cache held them "
            "between two: above 100 % of the copy rate, caches do.\n\n" + markdown(_steps_table(group))
        )
    return "## Training step\n\n" + "\n".join(parts)


def _denoise(results: Results) -> str:
    denoised = results["denoise"]
    chosen, ratio = denoised["configuration"], topaz_ratio(denoised)
    rows = []
    for row in denoised["rows"]:
        score = "—" if row["psnr"] is None else f"{row['psnr']:.2f}"
        rows.append((row["denoiser"], _rate(row["images_per_s"]), _mib(row["peak_memory"]), score))
    if not denoised["topaz_installed"]:
        rows.append(("Topaz-Denoise", "not installed: make topaz", "—", "—"))
    table = pd.DataFrame(rows, columns=["Denoiser", "images/s", "Peak memory (MiB)", "PSNR (dB)"])
    said = ""
    if ratio is not None:
        ours, theirs = fastest(denoised, "Ours"), fastest(denoised, "Topaz")
        said = f" Our fastest row ({ours}) over Topaz's ({theirs}): {ratio:.2f}, the median of pairs of timings."
    return (
        f"## Denoising\n\nA stack of {chosen['images']:,} images of {chosen['size']} px, from file to file, "
        f"{chosen['batch']} a batch: views of a particle that no network has seen, at SNR {SNR:g}. Ours: the general "
        f"network that ships. The paper's: the residual network of width {chosen['width']}, untrained. Topaz-Denoise "
        f"0.3.20: its U-net with the weights it ships, in float32. PSNR: after one scale and offset for the stack."
        f"{said}\n\n" + markdown(table)
    )


def _memory(results: Results) -> str:
    rows = []
    for row in results["memory"]:
        stack, rate = f"{row['images']:,} images, {row['file']}", f"{row['images'] / row['seconds']:,.0f}"
        memory = {"Memory before (MiB)": _mib(row["before"]), "Peak memory (MiB)": _mib(row["peak_memory"])}
        rows.append({"Stack": stack, "images/s": rate} | memory)
    said = (
        "## Memory of denoising\n\nHost memory of a process that denoises a stack of 32 px images on the CPU with one "
        "thread, and before it opens it. The table of the particles is held whole, images are not.\n\n"
    )
    return said + markdown(pd.DataFrame(rows))


def _geometry(results: Results) -> str:
    measured, names = results["geometry"], {"project": "Projection", "reconstruct": "Reconstruction"}
    chosen = measured["configuration"]
    rows = [{"": label, "images/s": _rate(measured[name])} for name, label in names.items()]
    said = f"{chosen['images']:,} images of {chosen['size']} px, all cores of the CPU.\n\n"
    return f"## Projection and reconstruction\n\n{said}" + markdown(pd.DataFrame(rows))


def _growth(results: Results) -> str:
    names = {"size": "Image size (px)", "width": "Width", "pairs": "Pairs"}
    rows = []
    for row in results["growth"]:
        rest = ", ".join(f"{name} {value:,}" for name, value in row["options"].items() if name != row["axis"])
        point = {"Axis": names[row["axis"]], "Value": f"{row['value']:,}", "Rest": rest}
        time = f"{1e3 * median(row['seconds_per_iteration']):,.1f}"
        rows.append(point | {"ms an iteration": time, "Peak memory (MiB)": _mib(row["peak_memory"])})
    said = "One training of the (.5,.5)-GAN + ℓ1; on the CPU with one thread.\n\n"
    return f"## Growth\n\n{said}" + markdown(pd.DataFrame(rows))


def _accuracy(results: Results) -> str:
    measured = results["accuracy"]
    chosen = measured["configuration"]
    changed = {(row["method"], row["precision"]): row for row in changes(measured)}
    rows = []
    for row in measured["rows"]:
        change = changed.get((row["method"], row["precision"]))
        said = f"{change['change']:+.2f} ± {change['error']:.2f}" if change else "—"
        psnr = f"{mean(row['psnr']):.2f} ± {stdev(row['psnr']):.2f}"
        label = METHODS[row["method"]].label
        rows.append({"Method": label, "Precision": row["precision"], "PSNR (dB)": psnr, "Change (dB)": said})
    said = (
        f"Trainings on {chosen['pairs']:,} projections of the phantom, {chosen['size']} px, SNR 0.1, "
        f"width {chosen['width']}, {chosen['epochs']} epoch in minibatches of {chosen['batch']}; "
        f"validation PSNR, mean ± sd over {chosen['seeds']} seeds, "
        "and the change of the mean against float32 ± its standard error.\n\n"
    )
    return f"## Accuracy by precision\n\n{said}" + markdown(pd.DataFrame(rows))


def _posterior(results: Results) -> str:
    measured = results["posterior"]
    chosen, rates = measured["configuration"], {row["denoiser"]: row["images_per_s"] for row in measured["rows"]}
    table = pd.DataFrame(
        {
            "Denoiser": row["denoiser"],
            "images/s": _rate(row["images_per_s"]),
            "Before (s)": f"{row['prepare']:.1f}",
            "Peak memory (MiB)": _mib(row["peak_memory"]),
        }
        for row in measured["rows"]
    )
    points = [
        {
            "Axis": row["axis"].capitalize(),
            "Value": f"{row['value']:,}",
            "Rest": ", ".join(f"{name} {value:,}" for name, value in row["options"].items() if name != row["axis"]),
            "Before (s)": f"{row['prepare']:.1f}",
            "Sum (s)": f"{row['seconds']:.1f}",
            "Peak memory (MiB)": _mib(row["peak_memory"]),
        }
        for row in measured["growth"]
    ]
    return (
        f"## Posterior\n\nA stack of {chosen['images']:,} images of {chosen['size']} px, from file to file: the "
        f"posterior mean over {chosen['references']:,} references and their turns, and the residual network of width "
        f"{chosen['width']} in float32, {chosen['batch']} images a batch. Images are noise, for which the posterior "
        "takes longest. Before: the references are expanded in a basis, once for all stacks. Posterior over network, "
        "images/s: "
        f"{_spread(ratios(rates, 'Posterior', 'Network'))}, of pairs of timings.\n\n{markdown(table)}\n"
        "Growth of the posterior; on the CPU with one thread for the sum. Memory is that of the process, with its "
        f"references.\n\n{markdown(pd.DataFrame(points))}"
    )


SECTIONS = {"steps": _steps, "denoise": _denoise, "memory": _memory}
SECTIONS |= {"geometry": _geometry, "growth": _growth, "accuracy": _accuracy, "posterior": _posterior}


def _machine(results: Results) -> str:
    machine = results["environment"]
    return (
        f"{machine['cores']} cores, load {machine['load']} before the run, torch {machine['torch']}, revision "
        f"{machine['revision']}, size {results['size']}"
    )


def summary(results: Results) -> str:
    """What docs/speed.md shows: the targets, and the ratio of each method's step, as Markdown."""
    steps = [
        {
            "Training step": f"{METHODS[row['method']].label}; {group['configuration']['name']}",
            "Ours (images/s)": _rate(row["images_per_s"]["ours"]),
            "Plain loop (images/s)": _rate(row["images_per_s"]["plain"]),
            "Ratio": _spread(ratios(row["images_per_s"], "ours", "plain")),
            "of the ceiling": f"{part_of_ceiling(group, row):.0%}",
        }
        for group in results.get("steps", [])
        for row in group["rows"]
    ]
    said = f"{results['environment']['device']}, {_machine(results)}.\n\n"
    return said + markdown(_targets_table(results)) + ("\n" + markdown(pd.DataFrame(steps)) if steps else "")


def report(results: Results) -> str:
    """The measurements as Markdown: the machine, the targets, and a table for each section that was measured."""
    head = (
        f"# Benchmarks: {results['environment']['device']}\n\n{_machine(results)}. Written by "
        "`python -m benchmarks`; every ratio is of timings of this one run.\n\n## Targets\n\n"
        + markdown(_targets_table(results))
    )
    return "\n".join([head, *(section(results) for name, section in SECTIONS.items() if name in results)])
