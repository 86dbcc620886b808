"""The benchmarks compare what they say: one algorithm twice, right counts, tables that follow from their numbers."""

import copy
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks import ceiling, denoise, parts, steps, tables, worker
from benchmarks.count import Count
from benchmarks.plain import PlainLoop
from benchmarks.sizes import size_of
from cryo_lib.denoisers import topaz
from cryo_lib.networks import losses, models
from cryo_lib.networks.runs import Settings, Trainer
from cryo_lib.paper import methods
from cryo_lib.stacks.particles import ParticleStack

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.mark.parametrize("method", ["l1_ae", "l2_ae", "js_l1", "beta_05_05_l1", "wgan_gp_l1"])
def test_the_plain_loop_takes_the_steps_of_our_engine(method, double):
    """From the same weights, on the same minibatches and mixing: two iterations later the same weights and losses."""
    rng = np.random.default_rng(0)
    x = rng.random((8, 32, 32))
    y = x + rng.standard_normal(x.shape)
    method, settings = losses.Method.parse(method), Settings(width=2, epochs=1, batch_size=4)
    engine = Trainer(method, settings, lambda epoch: (x, y), 0, CPU)
    before = copy.deepcopy(engine.generator)
    loop = PlainLoop(method, copy.deepcopy(engine.generator), copy.deepcopy(engine.discriminator), x, y, 4, CPU)
    for rows, mix in zip(engine.epoch_batches(0), engine.epoch_mixing(0), strict=True):
        loop.iteration(rows.numpy(), mix.numpy())
    sums = engine.advance(2)
    for name, total in sums.items():
        assert float(total) == pytest.approx(sum(line[name] for line in loop.log), rel=1e-7), name
    for network, theirs in ((engine.generator, loop.G), (engine.discriminator, loop.D)):
        for a, b in zip(network.parameters(), theirs.parameters(), strict=True) if network is not None else ():
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # Adam moves weights by 1e-3 and more
    moved = [(a - b).abs().max() for a, b in zip(engine.generator.parameters(), before.parameters(), strict=True)]
    assert max(moved) > 1e-3


def test_the_plain_loop_visits_every_pair_once_an_epoch(monkeypatch):
    seen = []
    x = np.zeros((10, 32, 32), np.float32)
    loop = PlainLoop(losses.Method.parse("l1_ae"), models.GENERATORS["resnet"](32, 1), None, x, x, 4, CPU)
    monkeypatch.setattr(loop, "iteration", lambda rows, mix: seen.append(rows))
    loop.train(6)
    assert [len(rows) for rows in seen] == [4, 4, 2] * 2
    assert all(sorted(np.concatenate(epoch)) == list(range(10)) for epoch in (seen[:3], seen[3:]))


def convolutions(size, width):
    """FLOP of each layer of `models.ConvGenerator` for an image: 2 a multiply-add, at the smaller side of its maps."""
    sides = [size // 2**level for level in (1, 2, 3, 4)]
    channels = [1, width, 2 * width, 4 * width, 8 * width]
    one_way = [2 * 16 * i * o * side**2 for i, o, side in zip(channels, channels[1:], sides)]
    return one_way + one_way[::-1]


def test_flop_of_a_convolutional_network_are_those_counted_by_hand():
    network, y = models.GENERATORS["conv"](32, 3), torch.randn(5, 1, 32, 32)
    with Count() as forward:
        out = network(y)
    assert forward.flop == 5 * sum(convolutions(32, 3))
    with Count() as backward:
        out.mean().backward()
    assert backward.flop == 5 * (2 * sum(convolutions(32, 3)) - convolutions(32, 3)[0])  # the images need no gradient


def test_flop_of_an_iteration_are_those_counted_by_hand():
    """Two updates of an autoencoder, each forward and backward, through our engine as the benchmark counts it."""
    x = np.random.default_rng(0).random((4, 32, 32), np.float32)
    settings = Settings(architecture="conv", width=3, batch_size=4, epochs=1)
    engine = Trainer(losses.Method.parse("l1_ae"), settings, lambda epoch: (x, x), 0, CPU)
    with Count() as counted:
        engine.advance(1)
    layers = convolutions(32, 3)
    assert counted.flop == 4 * 2 * (3 * sum(layers) - layers[0])


def test_flop_grow_with_the_batch_and_the_penalty_costs_more():
    options = {"device": "cpu", "size": 32, "width": 2, "pairs": 8, "precision": "float32"}
    flop = {(m, b): steps.count(method=m, batch=b, **options)["flop"] for m in ("js_l1", "wgan_gp_l1") for b in (2, 4)}
    assert flop["js_l1", 4] == 2 * flop["js_l1", 2] and flop["wgan_gp_l1", 4] == 2 * flop["wgan_gp_l1", 2]
    assert flop["wgan_gp_l1", 2] > 1.1 * flop["js_l1", 2]


def test_bytes_are_those_of_what_operations_read_and_write():
    a, b = torch.ones(10, 10), torch.ones(10, 10)
    with Count() as counted:
        (a + b).view(100)
    assert counted.bytes == 3 * 400 and counted.flop == 0


@pytest.mark.parametrize("suffix", [".mrcs", ".star"])
def test_a_stack_of_noise_is_as_long_as_asked_for_and_varies(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(denoise, "BLOCK", 8)
    stack = ParticleStack.open(denoise.write_noise(tmp_path / f"noise{suffix}", 20, 16))
    images = stack.images[:]
    assert images.shape == (20, 16, 16) and len(np.unique(images, axis=0)) == 20


def test_a_stack_that_the_disk_cannot_hold_is_refused_before_it_is_written(tmp_path):
    with pytest.raises(OSError, match="expected .* MiB free"):
        denoise.write_noise(tmp_path / "noise.mrcs", 10**12, 32)
    assert not list(tmp_path.iterdir())


def test_a_measurement_that_fails_says_which():
    with worker.Gang("geometry:rates", size=8, images=0) as gang:
        with pytest.raises(RuntimeError, match="geometry:rates.*exit code 1"):
            gang.measure()


def test_processes_have_a_scripts_environment_whatever_this_one_has(monkeypatch):
    started = []
    monkeypatch.setattr(worker.subprocess, "Popen", lambda command, env, **options: started.append((command, env)))
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("MKL_NUM_THREADS", "1")
    worker.Gang("steps:plain", count=2, threads=1)
    assert len(started) == 2
    for command, env in started:
        assert command[-1] == "1" and not any(name.startswith(worker.THREADING) for name in env)


def test_unknown_sizes_and_sections_are_refused(tmp_path):
    with pytest.raises(ValueError, match="size: expected one of quick, full"):
        size_of("huge", "cpu")
    with pytest.raises(ValueError, match="only: expected one of steps"):
        benchmarks.measure("cpu", "quick", ["speed"], tmp_path)


def check(folder):
    """Every committed or fresh table is that of its numbers, and its ratios those of its timings."""
    for path in sorted(folder.glob("*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        text = path.with_suffix(".md").read_text(encoding="utf-8")
        assert text == tables.report(results)
        for group in results.get("steps", []):
            best = max(group["ceiling"]["gemm"], group["ceiling"]["conv"])
            for row in group["rows"]:
                ours, plain = (np.array(row["images_per_s"][name]) for name in ("ours", "plain"))
                label = methods.METHODS[row["method"]].label
                reached = np.median(ours) / group["configuration"]["batch"] * row["iteration"]["flop"] / best
                cells = f"| {np.median(ours / plain):.2f} (", f"| {reached:.0%} |"
                lines = [line for line in text.splitlines() if line.startswith(f"| {label} |")]
                assert any(all(cell in line for cell in cells) for line in lines), label


def test_a_ceiling_is_of_calls_in_a_row_that_take_long_enough(monkeypatch):
    """One call takes 3 ms here: four in a row are more than 10, and their rate is that of a call."""
    monkeypatch.setattr(ceiling, "LEAST", 0.01)
    times = itertools.cycle([0.003, 0.006, 0.012])
    monkeypatch.setattr(ceiling, "median_time", lambda device, work, repeats: work() or next(times))
    options = {"size": 32, "width": 2, "batch": 2, "gemm_sizes": [8], "copy_mib": 1, "repeats": 1}
    rates = ceiling.ceiling("cpu", "float32", **options)()
    assert rates["gemm"] == pytest.approx(2 * 8**3 / 0.003) and rates["copy"] == pytest.approx(2**21 / 0.003)


def test_the_parts_of_a_step_are_all_of_it(tmp_path, monkeypatch, one_thread):
    """Every operation is in one part; what convolutions reach alone is what the step reaches over their share."""
    assert parts.part_of("aten::mkldnn_convolution") == parts.part_of("aten::convolution_backward") == "Convolutions"
    assert parts.part_of("aten::native_batch_norm_backward") == "Batch norm"
    assert parts.part_of("aten::_fused_adam_") == "Adam" and parts.part_of("aten::sum") == parts.OTHER
    monkeypatch.setitem(parts.FOLDERS, "quick", tmp_path)
    rows = parts.main("quick", iterations=1)
    for row in rows:
        assert sum(row["shares"].values()) == pytest.approx(1) and min(row["shares"].values()) >= 0
        assert all(row["shares"][part] > 0 for part in ("Convolutions", "Batch norm", "Adam"))
        assert row["reached"] == pytest.approx(row["convolutions"] * row["shares"]["Convolutions"])
    assert (tmp_path / "parts.md").read_text().endswith(tables.markdown(parts.table(rows)))


def test_committed_tables_follow_from_their_numbers():
    check(ROOT / "benchmarks" / "results")
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        shown = tables.summary(json.loads(path.read_text(encoding="utf-8")))
        assert f"<!-- benchmarks {path.stem} -->\n{shown}<!-- /benchmarks {path.stem} -->" in page


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The folder of a whole quick run, whose processes have this one's threads: other tests run beside them."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "THREADING", ())
        benchmarks.main(["--device", "cpu", "--size", "quick", "--out", str(folder)])
    return folder


def test_a_quick_run_writes_numbers_tables_and_curves(quick):
    assert {path.name for path in quick.iterdir()} == {"cpu.json", "cpu.md", "cpu_growth.png"}
    check(quick)
    results = json.loads((quick / "cpu.json").read_text())
    assert set(benchmarks.MEASUREMENTS) <= set(results)
    (group,) = results["steps"]
    assert all(value > 0 for value in group["ceiling"].values())
    for row in group["rows"]:
        assert all(len(rates) == 3 and min(rates) > 0 for rates in row["images_per_s"].values())
    assert [row["images"] for row in results["memory"]] == [200, 400, 200]
    assert all(row["peak_memory"] >= row["before"] > 0 for row in results["memory"])
    named = {row["denoiser"] for row in results["denoise"]["rows"]}
    assert {"Ours, float32", "The paper's network, float32"} <= named
    posterior = results["posterior"]
    assert [row["denoiser"] for row in posterior["rows"]] == ["Network", "Posterior"]
    assert [(row["axis"], row["value"]) for row in posterior["growth"]] == [
        *(("references", value) for value in (20, 40)),
        *(("images", value) for value in (8, 16)),
    ]
    ratio = np.median(np.divide(*(row["images_per_s"] for row in posterior["rows"][::-1])))
    assert f"Posterior over network, images/s: {ratio:.2f} (" in (quick / "cpu.md").read_text()
    measured = any(name.startswith("Topaz") for name in named)
    assert measured == results["denoise"]["topaz_installed"] == topaz.installed(denoise.TOPAZ)


def test_targets_are_computed_from_the_numbers(quick):
    results = json.loads((quick / "cpu.json").read_text())
    cpu = next(row for row in tables.targets(results) if row["target"].startswith("CPU"))
    (row,) = results["steps"][0]["rows"]
    expected = np.median(np.divide(row["images_per_s"]["ours"], row["images_per_s"]["plain"]))
    assert cpu["value"] == pytest.approx(expected) and cpu["met"] == (expected >= 1.5)
    row["images_per_s"]["ours"] = [1.4 * rate for rate in row["images_per_s"]["plain"]]
    results["memory"][1]["peak_memory"] = 2 * results["memory"][0]["peak_memory"]
    rows = tables.targets(results)
    assert [row["met"] for row in rows if row["target"].startswith("CPU")] == [False]
    assert [row["met"] for row in rows if row["target"].startswith("GPU")] == [None, None]
    assert [(row["value"], row["met"]) for row in rows if "memory" in row["target"]] == [(2.0, False)]
    precision = next(row for row in rows if row["target"].startswith("PSNR"))
    accuracy = results["accuracy"]["rows"]
    psnr = [[row["psnr"] for row in accuracy if row["precision"] == name] for name in ("float32", "bf16")]
    exact, rounded = map(np.array, psnr)
    error = np.sqrt((exact.var(axis=1, ddof=1) + rounded.var(axis=1, ddof=1)) / exact.shape[1])
    assert precision["value"] == pytest.approx((abs(rounded.mean(axis=1) - exact.mean(axis=1)) / error).max())
    del results["steps"], results["denoise"], results["memory"], results["accuracy"]
    assert all(row["met"] is None for row in tables.targets(results))


def test_the_psnr_of_a_denoiser_does_not_depend_on_its_grey_scale():
    x = np.random.default_rng(0).random((4, 8, 8))
    x_hat = x + np.random.default_rng(1).normal(0, 0.1, x.shape)
    score = denoise.psnr(x, x_hat)
    assert denoise.psnr(x, 7 - 3 * x_hat) == pytest.approx(score) and 20 < score < 21.5


def test_topaz_counts_only_where_it_was_measured():
    ours = {"denoiser": "Ours, float32", "images_per_s": [10.0, 12.0, 14.0]}
    assert tables.topaz_ratio({"rows": [ours]}) is None
    slow = {"denoiser": "Topaz-Denoise, its denoise_stack", "images_per_s": [1.0, 1.0, 1.0]}
    fast = {"denoiser": "Topaz-Denoise, in batches", "images_per_s": [2.0, 3.0, 2.0]}
    assert tables.topaz_ratio({"rows": [ours, slow, fast]}) == 5.0
    scored = [row | {"psnr": psnr} for row, psnr in zip((ours, slow, fast), (25.0, 24.0, 23.0))]
    assert tables.topaz_gain({"rows": scored}) == 2.0 and tables.topaz_gain({"rows": scored[:1]}) is None
    absent = {"configuration": {"size": 8, "width": 1, "images": 1, "batch": 1}, "rows": [], "topaz_installed": False}
    assert "not installed: make topaz" in tables.SECTIONS["denoise"]({"denoise": absent})
