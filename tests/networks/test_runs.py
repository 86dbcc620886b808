"""Runs and grids: exact resume, cards that say what was trained, results that do not depend on the workers."""

import contextlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from cryo_lib.evaluate.metrics import SCORES
from cryo_lib.networks import engine, losses, models, runs
from cryo_lib.networks.algorithm import Settings
from cryo_lib.networks.engine import Trainer, TrainingError
from cryo_lib.networks.runs import Job, Run, varied
from cryo_lib.stacks.dataset import Dataset

SMALL = Settings(width=2, epochs=2, batch_size=4, log_every=3)
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def data(tmp_path):
    """A dataset folder of blobs, as notebook 01 writes it."""
    rng = np.random.default_rng(0)
    grid = np.arange(32) - 16
    for split, n in (("train", 18), ("val", 6)):
        dx, dy = rng.uniform(-6, 6, (2, n, 1, 1))
        x = np.exp(-((grid[None, None] - dx) ** 2 + (grid[None, :, None] - dy) ** 2) / 18)
        np.save(tmp_path / f"x_{split}.npy", x.astype(np.float32))
    (tmp_path / "card.json").write_text(json.dumps({"seed": 0, "pixel_size": 4.0}))
    return tmp_path


def weights(path):
    return models.load(path / "generator.safetensors")[0].state_dict()


def assert_same_weights(a, b):
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("method", ["l1_ae", "wgan_gp_l1"])
def test_resume_after_kill_equals_the_uninterrupted_run_bit_for_bit(method, data, tmp_path):
    """A process that dies by SIGKILL between two lines of metrics, started again, leaves the same files to the bit."""
    program = f"""if 1:
        import os, signal, sys, torch
        from pathlib import Path
        from cryo_lib.evaluate.metrics import SCORES
        from cryo_lib.networks import runs
        step, (out, scratch, end) = runs.Trainer.step, sys.argv[1:]

        def mortal(trainer, *minibatch):
            if trainer.iteration == int(end):
                os.kill(os.getpid(), signal.SIGKILL)
            return step(trainer, *minibatch)

        torch.set_num_threads(1)
        runs.Trainer.step = mortal
        settings = runs.Settings(width=2, epochs=6, batch_size=4, log_every=5)
        task, data = runs.Run('{method}', 'awgn-0.5-A_0.3', 3), Path({str(data)!r})
        runs.run(task, settings, data, Path(out), Path(scratch), 'cpu', scores=SCORES)
    """
    whole, cut, scratch = tmp_path / "whole", tmp_path / "cut", tmp_path / "scratch"
    for out, state, end, code in (
        (cut, scratch, 12, -signal.SIGKILL),
        (cut, scratch, -1, 0),
        (whole, tmp_path / "fresh", -1, 0),
    ):
        assert not list(out.rglob("*.safetensors"))
        words = [sys.executable, "-c", program, *map(str, (out, state, end))]
        assert subprocess.run(words).returncode == code
    folder = Run(method, "awgn-0.5-A_0.3", 3).folder
    assert_same_weights(weights(cut / folder), weights(whole / folder))
    lines = [json.loads(line) for line in (cut / folder / "metrics.jsonl").open()]
    assert [line["iteration"] for line in lines] == list(range(5, 31, 5))


def test_a_state_of_other_code_torch_settings_or_data_is_not_taken_up(data, tmp_path, monkeypatch):
    folders = set()
    task, dataset = Run("l1_ae", "awgn-0.5-none", 0), Dataset(data)

    def add(settings):
        folders.add(runs.state_of(tmp_path, runs.configuration_of(task, settings, dataset, CPU, SCORES)))

    add(SMALL)
    add(varied(SMALL, {"lam": 1.0}))
    (data / "card.json").write_text(json.dumps({"seed": 0, "pixel_size": 5.0}))
    add(SMALL)
    scores = {"mse": SCORES["psnr"]}
    folders |= {
        runs.state_of(tmp_path, runs.configuration_of(task, SMALL, dataset, CPU, given)) for given in (scores, {})
    }
    for version in ("2.0", "2.0+cpu", "2.0+cu118"):  # a build is no other version
        monkeypatch.setattr(torch, "__version__", version)
        add(SMALL)
    monkeypatch.setattr(runs, "closure", lambda source: "other code")
    runs._digest.cache_clear()
    add(SMALL)
    runs._digest.cache_clear()
    assert len(folders) == 7


def test_a_run_is_finished_where_its_generator_is_of_this_very_configuration(data, tmp_path):
    task, out = Run("l1_ae", "awgn-0.5-none", 0), tmp_path / "o"
    assert not runs.finished(task, SMALL, data, out, SCORES)
    runs.run(task, SMALL, data, out, tmp_path / "s", "cpu", scores=SCORES)
    assert runs.finished(task, SMALL, data, out, SCORES)
    assert not runs.finished(task, varied(SMALL, {"eta_g": 0.02}), data, out, SCORES)
    assert not runs.finished(replace(task, seed=1), SMALL, data, out, SCORES)
    card = out / task.folder / "generator.json"
    for name, other, same in (("torch", "2.0", True), ("device", "cuda", True), ("source", "other", False)):
        kept = json.loads(card.read_text())
        card.write_text(json.dumps(kept | {"code": kept["code"] | {name: other}}))
        assert runs.finished(task, SMALL, data, out, SCORES) is same
        card.write_text(json.dumps(kept))
    card.write_text(json.dumps({"architecture": "resnet"}))  # of a network from elsewhere
    assert not runs.finished(task, SMALL, data, out, SCORES)
    card.write_text(json.dumps(kept))
    (out / task.folder / "generator.safetensors").unlink()
    assert not runs.finished(task, SMALL, data, out, SCORES)


def test_what_a_run_leaves_is_the_same_whatever_its_speed(data, tmp_path, monkeypatch):
    """Every file byte for byte, with a clock that is ten times as slow."""
    task, clock = Run("js_l1", "awgn-0.5-A_0.3", 0), time.perf_counter
    runs.run(task, SMALL, data, tmp_path / "a", tmp_path / "s", "cpu", scores=SCORES)
    monkeypatch.setattr(engine.time, "perf_counter", lambda: 10 * clock())
    runs.run(task, SMALL, data, tmp_path / "b", tmp_path / "t", "cpu", scores=SCORES)
    first, second = (sorted(path for path in (tmp_path / out).rglob("*") if path.is_file()) for out in "ab")
    assert [path.name for path in first] == ["generator.json", "generator.safetensors", "metrics.jsonl"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_grid_leaves_finished_runs_as_they_are(data, tmp_path, capsys, monkeypatch):
    """The others get the threads, and so the bits, that they have in a grid of which nothing is finished."""
    monkeypatch.setattr(runs, "cores", lambda: 2)
    tasks, settings = [Run("l1_ae", "awgn-0.5-none", seed) for seed in (0, 1)], varied(SMALL, {"width": 16})
    folders = data, tmp_path / "o", tmp_path / "s", "cpu"
    runs.run(tasks[0], settings, *folders, scores=SCORES)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "o").rglob("generator.*")}
    jobs = [Job(task, settings, tmp_path / "o") for task in tasks]
    grid = jobs, data, tmp_path / "s", "cpu"
    runs.run_grid(*grid, scores=SCORES)
    assert "1 runs, 1 finished before" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert not list((tmp_path / "s").glob("*/"))
    runs.run_grid(*grid, scores=SCORES)
    assert "0 runs, 2 finished before" in capsys.readouterr().out
    whole = [Job(task, settings, tmp_path / "whole") for task in tasks]
    runs.run_grid(whole, data, tmp_path / "s", "cpu", scores=SCORES)
    for task in tasks:
        assert_same_weights(weights(tmp_path / "o" / task.folder), weights(tmp_path / "whole" / task.folder))


def test_scores_are_what_they_are_called(data, tmp_path, capsys):
    task = Run("l1_ae", "awgn-0.5-none", 0)
    runs.run_grid([Job(task, SMALL, tmp_path / "o")], data, tmp_path / "s", "cpu", scores={"error": SCORES["mse"]})
    card = json.loads((tmp_path / "o" / task.folder / "generator.json").read_text())
    assert (
        set(card["validation"]) == {"error"} and f"error {card['validation']['error']:.4g}" in capsys.readouterr().out
    )


def test_a_grid_side_by_side_equals_one_after_another_and_leaves_no_state(data, tmp_path, capsys):
    tasks, threads = [Run(m, "awgn-0.5-none", s) for m in ("l1_ae", "js_l1") for s in (0, 1)], torch.get_num_threads()
    for workers in (1, 2):
        jobs = [Job(task, SMALL, tmp_path / str(workers)) for task in tasks]
        runs.run_grid(jobs, data, tmp_path / "scratch", "cpu", workers=workers, scores=SCORES)
    for task in tasks:
        assert_same_weights(weights(tmp_path / "1" / task.folder), weights(tmp_path / "2" / task.folder))
    assert not list((tmp_path / "scratch").glob("*/"))
    assert "4 runs on the CPU" in capsys.readouterr().out and torch.get_num_threads() == threads


def threads_of_numpy(x, x_hat):
    """As if it was a score."""
    return np.array([each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"])


@pytest.mark.parametrize("workers", [1, 2])
def test_numpy_has_one_thread_where_networks_train(workers, data, tmp_path, monkeypatch):
    """More round otherwise, and those of processes side by side wait for each other."""
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    tasks, scores = [Run("l1_ae", "awgn-0.5-none", seed) for seed in (0, 1)], {"threads": threads_of_numpy}
    with threadpool_limits(2, user_api="blas"):
        assert threads_of_numpy(None, None).max() == 2
        jobs = [Job(task, SMALL, tmp_path / "o") for task in tasks]
        runs.run_grid(jobs, data, tmp_path / "s", "cpu", workers=workers, scores=scores)
    for task in tasks:
        card = json.loads((tmp_path / "o" / task.folder / "generator.json").read_text())
        assert card["validation"] == {"threads": 1}


def test_processes_side_by_side_end_with_the_one_that_started_them(data, tmp_path):
    """Killed, it can tell them nothing."""
    program = f"""if 1:
        from pathlib import Path
        from cryo_lib.evaluate.metrics import SCORES
        from cryo_lib.networks import runs
        tasks = [runs.Run('l1_ae', 'awgn-0.5-none', seed) for seed in (0, 1)]
        settings = runs.Settings(width=2, epochs=10**6, batch_size=4, log_every=3)
        data, out, scratch = Path({str(data)!r}), Path({str(tmp_path)!r}, 'out'), Path({str(tmp_path)!r}, 'scratch')
        runs.run_grid([runs.Job(task, settings, out) for task in tasks], data, scratch, 'cpu', scores=SCORES, workers=2)
    """
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True)
    try:
        while len(list((tmp_path / "scratch").glob("*/state.pt"))) < 2:  # then both train, each in a process
            assert parent.poll() is None
            time.sleep(0.1)
        parent.kill()
        parent.communicate(timeout=60)  # to the end of what they print, which is theirs
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)


def test_seeds_differ_and_repeat(data, tmp_path):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        runs.run(
            Run("l1_ae", "awgn-0.5-none", seed), SMALL, data, tmp_path / out, tmp_path / f"s{out}", "cpu", scores=SCORES
        )
    first, again, other = (next((tmp_path / out).rglob("*.safetensors")).parent for out in "abc")
    assert_same_weights(weights(first), weights(again))
    assert any(not torch.equal(v, weights(other)[k]) for k, v in weights(first).items())


def test_validation_needs_two_images(data, tmp_path):
    np.save(data / "x_val.npy", np.load(data / "x_val.npy")[:1])
    with pytest.raises(
        ValueError, match="x_val: expected at least 2 images to watch the training on, got 1; raise n_val"
    ):
        runs.run(Run("l1_ae", "awgn-0.5-none", 0), SMALL, data, tmp_path / "o", tmp_path / "s", "cpu", scores=SCORES)


def test_a_line_of_metrics_says_all_there_is_to_know(data, tmp_path):
    runs.run(Run("js_l1", "clipped-0.5-C_0.5", 0), SMALL, data, tmp_path / "o", tmp_path / "s", "cpu", scores=SCORES)
    lines = [json.loads(line) for line in next((tmp_path / "o").rglob("metrics.jsonl")).open()]
    wanted = {"iteration", "epoch", "progress", "loss_d", "loss_g", "reconstruction", "mse", "psnr", "ssim", "spread"}
    assert wanted == set(lines[-1])
    (speed,) = [json.loads(line) for line in (tmp_path / "s" / "speed.jsonl").open()]
    assert speed["images_per_s"] > 0 and speed["peak_memory_mib"] > 0 and speed["device"] == "cpu"
    assert lines[-1]["progress"] == 1 and [line["iteration"] for line in lines] == [3, 6, 9, 10]
    card = json.loads(next((tmp_path / "o").rglob("generator.json")).read_text())
    assert card["run"]["method"] == "js_l1" and card["settings"]["lam"] == 10 and card["width"] == 2


def test_training_denoises(data, tmp_path):
    """A few hundred iterations on blobs beat the noisy input by more than 8 dB."""
    settings = Settings(width=4, epochs=60, batch_size=6, log_every=90, decay=0.5)
    values = runs.run(
        Run("beta_05_05_l1", "awgn-0.2-none", 0), settings, data, tmp_path / "o", tmp_path / "s", "cpu", scores=SCORES
    )
    x = np.load(data / "x_val.npy")
    noisy = 10 * np.log10(0.2 / x.var(axis=(1, 2)).mean())
    assert values["psnr"] > noisy + 8


def test_recorded_a_run_that_breaks_ends_with_its_last_finite_state_and_its_card_says_so(data, tmp_path, monkeypatch):
    step = Trainer.step

    def breaks(self, *minibatch):
        if self.iteration == 7:
            self.generator.last[0].weight.data.fill_(math.nan)
        return step(self, *minibatch)

    monkeypatch.setattr(Trainer, "step", breaks)
    task, settings = Run("l1_ae", "awgn-0.5-none", 0), varied(SMALL, {"log_every": 2})
    with pytest.raises(TrainingError, match="not finite at iteration 8"):
        runs.run(task, settings, data, tmp_path / "stop", tmp_path / "s1", "cpu", scores=SCORES)
    runs.run(
        task,
        varied(settings, {"on_failure": "record"}),
        data,
        tmp_path / "record",
        tmp_path / "s2",
        "cpu",
        scores=SCORES,
    )
    folder = tmp_path / "record" / task.folder
    card = json.loads((folder / "generator.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert "not finite at iteration 8 of 10" in card["failed"] and [line["iteration"] for line in lines] == [0, 2, 4, 6]
    assert all(torch.isfinite(value).all() for value in weights(folder).values())


def test_recorded_a_run_that_breaks_at_once_is_the_untrained_network(data, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "step", lambda self, *minibatch: {"loss_g": torch.tensor(math.nan)})
    task, settings = Run("l1_ae", "awgn-0.5-none", 0), varied(SMALL, {"on_failure": "record"})
    runs.run(task, settings, data, tmp_path / "o", tmp_path / "s", "cpu", scores=SCORES)
    card = json.loads((tmp_path / "o" / task.folder / "generator.json").read_text())
    x = np.load(data / "x_train.npy")
    untrained = Trainer(losses.Method.parse("l1_ae"), SMALL, lambda epoch: (x, x), 0, CPU).generator.state_dict()
    kept = {k: v for k, v in weights(tmp_path / "o" / task.folder).items() if "running" not in k and "tracked" not in k}
    assert "not finite at iteration 3 of 10" in card["failed"] and all(
        torch.equal(v, untrained[k]) for k, v in kept.items()
    )


def test_runs_side_by_side_have_each_their_own_settings_and_folder(data, tmp_path):
    np.savez(data / "poses.npz", train_rotations=np.tile(np.eye(3), (18, 1, 1)), train_conformations=np.arange(18) % 2)
    np.save(data / "volumes.npy", np.random.default_rng(0).random((2, 32, 32, 32), np.float32))
    changes = {"": {}, "lam_0": {"lam": 0.0}, "small": {"width": 1, "batch_size": 9}}
    tasks = {variant: Run("js_l1", "awgn-0.5-O_0.3", 0, variant) for variant in changes}
    jobs = [Job(tasks[name], varied(SMALL, each), tmp_path / f"o{name}") for name, each in changes.items()]
    runs.run_grid(jobs, data, tmp_path / "s", "cpu", workers=2, scores=SCORES)
    cards = [json.loads((job.folder / "generator.json").read_text()) for job in jobs]
    assert [card["settings"]["lam"] for card in cards] == [10, 0, 10] and [card["width"] for card in cards] == [2, 2, 1]
    assert [card["run"]["variant"] for card in cards] == ["", "lam_0", "small"]


def test_a_run_that_two_jobs_would_write_is_refused_before_anything_is_trained(data, tmp_path):
    jobs = [Job(Run("l1_ae", "awgn-0.5-none", 0), varied(SMALL, {"lam": lam}), tmp_path / "o") for lam in (1.0, 2.0)]
    with pytest.raises(ValueError, match="expected each run once, got .*l1_ae/awgn-0.5-none/seed0 several times"):
        runs.run_grid(jobs, data, tmp_path / "s", "cpu", workers=1, scores=SCORES)
    assert not (tmp_path / "o").exists()


def test_a_run_whose_time_is_up_goes_on_at_the_next_call(data, tmp_path, monkeypatch):
    """Its speed is that of all calls together: two epochs of 18 pairs in four times a second."""
    clock = SimpleNamespace(perf_counter=itertools.count().__next__, monotonic=time.monotonic)
    monkeypatch.setattr(engine, "time", clock)
    task, folders = Run("js_l1", "awgn-0.5-none", 0), (data, tmp_path / "o", tmp_path / "s", "cpu")
    calls = 1
    while runs.run(task, SMALL, *folders, scores=SCORES, until=0.0) is None:
        assert not (tmp_path / "o").exists()
        calls += 1
    lines = [json.loads(line) for line in (tmp_path / "o" / task.folder / "metrics.jsonl").open()]
    assert calls == 4 and [line["iteration"] for line in lines] == [3, 6, 9, 10]
    assert [json.loads(line)["images_per_s"] for line in (tmp_path / "s" / "speed.jsonl").open()] == [9.0]


def test_screened_pairs_that_do_not_belong_together_are_left_out(data, tmp_path, monkeypatch):
    """Of 60 pairs 18 get a reference of noise: the trainer sees only, and most of, the others."""
    x = np.tile(np.load(data / "x_train.npy"), (4, 1, 1))[:60]
    np.save(data / "x_train.npy", x)
    seen = {}

    def watch(method, settings, pairs, *rest):
        seen["x"], seen["y"] = pairs(0)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "Trainer", watch)
    arguments = data, tmp_path / "o", tmp_path / "s", "cpu"
    task = Run("l2_ae", "awgn-0.5-A_0.3", 0)
    with pytest.raises(KeyboardInterrupt):
        runs.run(task, varied(SMALL, {"screen": True}), *arguments, scores=SCORES)
    assert len(seen["x"]) == len(seen["y"]) and 38 <= len(seen["x"]) <= 42
    assert all((image == x).all(axis=(1, 2)).any() for image in seen["x"])
    for name in ("redraw", "fresh_noise"):
        with pytest.raises(ValueError, match=f"screen: expected {name}: false"):
            runs.run(task, varied(SMALL, {"screen": True, name: True}), *arguments, scores=SCORES)
    with pytest.raises(ValueError, match="screen: expected false for noise2void, which sees no reference"):
        runs.run(Run("noise2void", "awgn-0.5-none", 0), varied(SMALL, {"screen": True}), *arguments, scores=SCORES)


@pytest.mark.parametrize("method", ["noise2noise", "noise2void"])
def test_methods_without_references_see_none(method, data, tmp_path, monkeypatch):
    """What the network is compared with is noisy: itself where it is hidden, or a copy whose noise is its own."""
    seen, plain = [], runs.Trainer

    def watch(*arguments):
        seen.append(plain(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "Trainer", watch)
    with pytest.raises(KeyboardInterrupt):
        runs.run(Run(method, "awgn-0.5-none", 0), SMALL, data, tmp_path / "o", tmp_path / "s", "cpu", scores=SCORES)
    (t,), clean = seen, torch.from_numpy(np.load(data / "x_train.npy")).unsqueeze(1)
    (x, y, *_), rows = next(t._minibatches(0, slice(0, 1))), t.epoch_batches(0)[0]
    known = ~x.isnan()
    if method == "noise2void":
        noisy = torch.from_numpy(t.pairs(0)[1]).unsqueeze(1)[rows]
        assert torch.equal(x[known], noisy[known]) and 0 < known.float().mean() < 0.05
        assert torch.equal(y[~known], noisy[~known]) and (y[known] != noisy[known]).all()
        other = next(t._minibatches(1, slice(0, 1)))[0]
        assert not torch.equal(known, ~other.isnan())
    else:
        noise, copy = y - clean[rows], x - clean[rows]
        assert known.all() and copy.std().item() == pytest.approx(noise.std().item(), rel=0.1)
        assert abs(np.corrcoef(noise.flatten(), copy.flatten())[0, 1]) < 0.05


@pytest.mark.parametrize(
    "method, experiment, message",
    [
        ("noise2void", "awgn-0.5-A_0.3", "noise2void: expected no contamination, since it sees no reference"),
        ("noise2noise", "measured-none", "noise2noise: expected simulated images.*try noise2void"),
    ],
)
def test_methods_without_references_are_refused_what_they_cannot_learn_from(method, experiment, message):
    with pytest.raises(ValueError, match=message):
        Run(method, experiment, 0)
