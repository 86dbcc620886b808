"""Algorithm 1 does what it says: the right losses, exact resume, loud failure, results that do not depend on the workers."""

import json
import math
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from cryo_lib import experiments, losses, models, training
from cryo_lib.experiments import Run
from cryo_lib.training import Settings, Trainer, TrainingError

SMALL = Settings(width=2, epochs=2, batch_size=4, log_every=3)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


@pytest.fixture
def double():
    """Double precision, in which rounding cannot hide behind Adam's normalisation of tiny gradients."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def trainer(method="beta_05_05_l1", settings=SMALL, seed=0, n=18):
    x = np.random.default_rng(1).random((n, 32, 32)).astype(str(torch.get_default_dtype()).removeprefix("torch."))
    return Trainer(losses.METHODS[method], settings, lambda epoch: (x, x + 0.1), seed, CPU)


def weights(path):
    return models.load(path / "generator.safetensors")[0].state_dict()


def assert_same_weights(a, b):
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("method", ["beta_05_05_l1", "wgan_gp_l1"])
def test_the_256_px_networks_learn_in_the_same_loop(method):
    """Every convolution of both moves, and the reconstruction loss falls."""
    x = np.random.default_rng(1).random((8, 64, 64), np.float32)
    settings = replace(SMALL, architecture="resnet256", batch_size=4, eta_g=1e-3)
    t = Trainer(losses.METHODS[method], settings, lambda epoch: (x, x + 0.1), 0, CPU)
    kernels = [p for network in (t.generator, t.discriminator) for p in network.parameters() if p.ndim == 4]
    before = [kernel.detach().clone() for kernel in kernels]
    found = [float(t.step(t.x[:4], t.y[:4])["reconstruction"]) for _ in range(6)]
    assert all(not torch.equal(a, b) for a, b in zip(before, kernels)) and found[-1] < found[0]


def test_an_autoencoder_step_is_adam_on_the_reconstruction_loss(double):
    """Algorithm 1 without a discriminator, replayed by plain torch."""
    t = trainer("l2_ae", replace(SMALL, k_g=2))
    x, y = t.x[:4], t.y[:4]
    twin = models.ResNetGenerator(32, 2)
    twin.load_state_dict(t.generator.state_dict())
    adam = torch.optim.Adam(twin.parameters(), SMALL.eta_g, (SMALL.beta1, SMALL.beta2))
    for _ in range(2):
        adam.zero_grad()
        torch.nn.functional.mse_loss(twin(y), x).backward()
        adam.step()
    t.step(x, y)
    for ours, plain in zip(t.generator.parameters(), twin.parameters()):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("method", ["js_l1", "wgan_gp_l1"])
def test_a_gan_step_is_k_d_updates_of_d_then_k_g_of_g(method, double):
    """Algorithm 1 written out line by line, with G(y) computed anew for every update."""
    s = replace(SMALL, k_d=2, k_g=2, adversarial_reduction="sum")
    t = trainer(method, s)
    x, y = t.x[:4], t.y[:4]
    g, d = models.ResNetGenerator(32, 2), models.ResNetDiscriminator(32, 2)
    g.load_state_dict(t.generator.state_dict())
    d.load_state_dict(t.discriminator.state_dict())
    adam_g = torch.optim.Adam(g.parameters(), s.eta_g, (s.beta1, s.beta2))
    adam_d = torch.optim.Adam(d.parameters(), s.eta_d, (s.beta1, s.beta2))
    mixing = torch.Generator().manual_seed(0)
    for _ in range(s.k_d):
        x_hat = g(y).detach()
        if method == "js_l1":
            gain = (torch.sigmoid(d(x)).log() + (1 - torch.sigmoid(d(x_hat))).log()).sum() / 4
        else:
            mix = torch.rand(4, 1, 1, 1, generator=mixing)
            gain = (d(x) - d(x_hat)).sum() / 4
            gain = gain - s.mu * losses.gradient_penalty(d, x, x_hat, mix)
        adam_d.zero_grad()
        (-gain).backward()
        adam_d.step()
    for _ in range(s.k_g):
        x_hat = g(y)
        score = (1 - torch.sigmoid(d(x_hat))).log() if method == "js_l1" else -d(x_hat)
        adam_g.zero_grad()
        (score.sum() / 4 + s.lam * (x_hat - x).abs().mean()).backward()
        adam_g.step()
    t.step(x, y)
    for ours, plain in zip([*t.generator.parameters(), *t.discriminator.parameters()], [*g.parameters(), *d.parameters()]):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-5)


def test_each_epoch_visits_every_pair_once_in_an_order_of_its_own():
    t = trainer()
    orders = [torch.cat(t.epoch_batches(epoch)) for epoch in (0, 1, 0)]
    assert torch.equal(orders[0].sort().values, torch.arange(18))
    assert torch.equal(orders[0], orders[2]) and not torch.equal(orders[0], orders[1])


def test_contaminated_minibatches_stay_together():
    batches = trainer(settings=replace(SMALL, unit="minibatch")).epoch_batches(0)
    assert sorted(batch.tolist() for batch in batches) == [list(range(i, min(i + 4, 18))) for i in range(0, 18, 4)]


def test_rates_fall_linearly_to_zero_over_the_last_share():
    t = trainer(settings=replace(SMALL, decay=0.5))
    rates = []
    for t.iteration in range(t.iterations):
        t._set_rates()
        rates.append(t.optimise_g.param_groups[0]["lr"] / SMALL.eta_g)
    np.testing.assert_allclose(rates, np.minimum(1, (1 - np.arange(10) / 10) / 0.5))


def test_batch_norm_statistics_are_those_of_the_present_weights():
    """After calibration eval mode and training mode agree on a batch that has the calibration images' statistics."""
    t = trainer(n=100)
    t.calibrate()
    y = t.y[:100]
    with torch.no_grad():
        t.generator.train()
        training_mode = t.generator(y)
        t.calibrate()
        eval_mode = t.generator.eval()(y)
    assert (training_mode - eval_mode).abs().mean() < 0.02 * training_mode.std()


@pytest.mark.parametrize("method", ["l1_ae", "wgan_gp_l1"])
def test_resume_after_kill_equals_the_uninterrupted_run_bit_for_bit(method, data, tmp_path):
    """A process killed by SIGKILL in the middle of training, started again, ends with the same bits."""
    program = (
        "import sys, torch; from pathlib import Path; from cryo_lib import training; from cryo_lib.experiments import Run;"
        "torch.set_num_threads(1);"
        f"s = training.Settings(width=2, epochs=30, batch_size=4, log_every=5);"
        f"training.run(Run('{method}', 'awgn-0.5-A_0.3', 3), s, Path({str(data)!r}), Path(sys.argv[1]), Path(sys.argv[2]), 'cpu')"
    )
    whole, cut, scratch = tmp_path / "whole", tmp_path / "cut", tmp_path / "scratch"
    process = subprocess.Popen([sys.executable, "-c", program, str(cut), str(scratch)])
    deadline = time.monotonic() + 120
    while not list(scratch.glob("*/state.pt")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not list(cut.rglob("*.safetensors")), "the run ended before it could be killed"
    assert 0 < torch.load(next(scratch.glob("*/state.pt")), weights_only=True)["iteration"] < 150
    for out, state in ((cut, scratch), (whole, tmp_path / "fresh")):
        subprocess.run([sys.executable, "-c", program, str(out), str(state)], check=True)
    folder = Run(method, "awgn-0.5-A_0.3", 3).folder
    assert_same_weights(weights(cut / folder), weights(whole / folder))
    lines = [json.loads(line) for line in (cut / folder / "metrics.jsonl").open()]
    assert [line["iteration"] for line in lines] == list(range(5, 151, 5))


def test_a_resumed_training_makes_only_the_steps_that_are_left(tmp_path):
    """Stopped at its second line of metrics, a training goes on from there, and ends where an uninterrupted one does."""
    counts, ends = [], []
    for stop in (None, 2, None):
        t = trainer("js_l1", replace(SMALL, decay=0.5))
        step, steps, lines = t.step, [], []
        t.step = lambda x, y, step=step, steps=steps: steps.append(1) or step(x, y)

        def report(history, stop=stop, lines=lines):
            lines.append(1)
            if len(lines) == stop:
                raise KeyboardInterrupt

        path = tmp_path / ("whole.pt" if not counts else "cut.pt")
        try:
            t.train(path, lambda model: {"psnr": 1.0, "spread": 1.0}, report)
        except KeyboardInterrupt:
            pass
        counts.append(len(steps))
        ends.append({k: v.clone() for k, v in t.generator.state_dict().items()})
    assert counts == [10, 6, 4]
    assert_same_weights(ends[0], ends[2])


def test_a_state_of_other_code_settings_or_data_is_not_taken_up(data, tmp_path, monkeypatch):
    folders = set()
    task, dataset = Run("l1_ae", "awgn-0.5-none", 0), experiments.Dataset(data)
    folders.add(training._state(tmp_path, training.configuration_of(task, SMALL, dataset, CPU)))
    folders.add(training._state(tmp_path, training.configuration_of(task, replace(SMALL, lam=1.0), dataset, CPU)))
    (data / "card.json").write_text(json.dumps({"seed": 0, "pixel_size": 5.0}))
    folders.add(training._state(tmp_path, training.configuration_of(task, SMALL, dataset, CPU)))
    other = tmp_path / "losses.py"
    other.write_text("# other code")
    monkeypatch.setattr(losses, "__file__", str(other))
    folders.add(training._state(tmp_path, training.configuration_of(task, SMALL, dataset, CPU)))
    assert len(folders) == 4


def test_a_run_is_finished_where_its_generator_is_of_this_very_configuration(data, tmp_path):
    task, out = Run("l1_ae", "awgn-0.5-none", 0), tmp_path / "o"
    assert not training.finished(task, SMALL, data, out)
    training.run(task, SMALL, data, out, tmp_path / "s", "cpu")
    assert training.finished(task, SMALL, data, out)
    assert not training.finished(task, replace(SMALL, eta_g=0.02), data, out)
    assert not training.finished(replace(task, seed=1), SMALL, data, out)
    (out / task.folder / "generator.safetensors").unlink()
    assert not training.finished(task, SMALL, data, out)


def test_a_grid_side_by_side_equals_one_after_another_and_leaves_no_state(data, tmp_path, capsys):
    tasks = [Run(m, "awgn-0.5-none", s) for m in ("l1_ae", "js_l1") for s in (0, 1)]
    for workers in (1, 2):
        training.run_grid(tasks, SMALL, data, tmp_path / str(workers), tmp_path / "scratch", "cpu", workers)
    for task in tasks:
        assert_same_weights(weights(tmp_path / "1" / task.folder), weights(tmp_path / "2" / task.folder))
    assert not list((tmp_path / "scratch").iterdir())
    assert "4 runs on the CPU" in capsys.readouterr().out


def test_seeds_differ_and_repeat(data, tmp_path):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        training.run(Run("l1_ae", "awgn-0.5-none", seed), SMALL, data, tmp_path / out, tmp_path / f"s{out}", "cpu")
    first, again, other = (next((tmp_path / out).rglob("*.safetensors")).parent for out in "abc")
    assert_same_weights(weights(first), weights(again))
    assert any(not torch.equal(v, weights(other)[k]) for k, v in weights(first).items())


def test_validation_needs_two_images(data, tmp_path):
    np.save(data / "x_val.npy", np.load(data / "x_val.npy")[:1])
    with pytest.raises(ValueError, match="x_val: expected at least 2 images to watch the training on, got 1; raise n_val"):
        training.run(Run("l1_ae", "awgn-0.5-none", 0), SMALL, data, tmp_path / "o", tmp_path / "s", "cpu")


def test_a_line_of_metrics_says_all_there_is_to_know(data, tmp_path):
    training.run(Run("js_l1", "clipped-0.5-C_0.5", 0), SMALL, data, tmp_path / "o", tmp_path / "s", "cpu")
    lines = [json.loads(line) for line in next((tmp_path / "o").rglob("metrics.jsonl")).open()]
    wanted = {"iteration", "epoch", "progress", "loss_d", "loss_g", "reconstruction", "mse", "psnr", "ssim", "spread"}
    assert wanted | {"images_per_s", "peak_memory_mib", "device"} == set(lines[-1])
    assert lines[-1]["progress"] == 1 and [line["iteration"] for line in lines] == [3, 6, 9, 10]
    card = json.loads(next((tmp_path / "o").rglob("generator.json")).read_text())
    assert card["run"]["method"] == "js_l1" and card["settings"]["lam"] == 10 and card["width"] == 2


def test_training_denoises(data, tmp_path):
    """A few hundred iterations on blobs beat the noisy input by more than 8 dB."""
    settings = Settings(width=4, epochs=60, batch_size=6, log_every=90, decay=0.5)
    values = training.run(Run("beta_05_05_l1", "awgn-0.2-none", 0), settings, data, tmp_path / "o", tmp_path / "s", "cpu")
    x = np.load(data / "x_val.npy")
    noisy = 10 * np.log10(0.2 / x.var(axis=(1, 2)).mean())
    assert values["psnr"] > noisy + 8


def test_a_loss_that_is_not_finite_stops_with_the_reason(tmp_path):
    t = trainer("l2_ae", replace(SMALL, eta_g=0.5))
    t.generator.last[0].weight.data.fill_(math.nan)
    with pytest.raises(TrainingError, match=r"loss_g.* not finite at iteration 3 of 10; lower eta_g \(0.5\)"):
        t.train(tmp_path / "state.pt", lambda model: {"psnr": 1.0, "spread": 1.0})


def test_a_collapse_stops_with_the_reason(tmp_path):
    t = trainer("l1_ae")
    with pytest.raises(TrainingError, match="the generator has collapsed at iteration 6 of 10: its outputs vary over images by 0.10%"):
        t.train(tmp_path / "state.pt", lambda model: {"psnr": 1.0, "spread": 0.001})


@pytest.mark.parametrize("spreads, failed", [([0.5, 0.5, 0.001, 0.001, 0.001], True), ([0.5, 0.5, 0.001, 0.001, 0.4], False)])
def test_recorded_a_collapse_is_trained_on_and_told_where_the_run_ends_so(spreads, failed, tmp_path):
    t, values = trainer("l1_ae", replace(SMALL, on_failure="record")), iter(spreads)
    t.train(tmp_path / "state.pt", lambda model: {"psnr": 1.0, "spread": next(values)})
    assert t.iteration == t.iterations and [line["spread"] for line in t.history] == spreads
    told = t.collapse(t.history[-1]["spread"])
    assert failed == told.startswith("the generator has collapsed at iteration 10 of 10") and failed == bool(told)


def test_recorded_a_run_that_breaks_ends_with_its_last_finite_state_and_its_card_says_so(data, tmp_path, monkeypatch):
    step = Trainer.step

    def breaks(self, x, y):
        if self.iteration == 7:
            self.generator.last[0].weight.data.fill_(math.nan)
        return step(self, x, y)

    monkeypatch.setattr(Trainer, "step", breaks)
    task, settings = Run("l1_ae", "awgn-0.5-none", 0), replace(SMALL, log_every=2)
    with pytest.raises(TrainingError, match="not finite at iteration 8"):
        training.run(task, settings, data, tmp_path / "stop", tmp_path / "s1", "cpu")
    training.run(task, replace(settings, on_failure="record"), data, tmp_path / "record", tmp_path / "s2", "cpu")
    folder = tmp_path / "record" / task.folder
    card = json.loads((folder / "generator.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert "not finite at iteration 8 of 10" in card["failed"] and [line["iteration"] for line in lines] == [0, 2, 4, 6]
    assert all(torch.isfinite(value).all() for value in weights(folder).values())


def test_recorded_a_run_that_breaks_at_once_is_the_untrained_network(data, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "step", lambda self, x, y: {"loss_g": torch.tensor(math.nan)})
    task, settings = Run("l1_ae", "awgn-0.5-none", 0), replace(SMALL, on_failure="record")
    training.run(task, settings, data, tmp_path / "o", tmp_path / "s", "cpu")
    card = json.loads((tmp_path / "o" / task.folder / "generator.json").read_text())
    untrained = trainer("l1_ae").generator.state_dict()
    kept = {k: v for k, v in weights(tmp_path / "o" / task.folder).items() if "running" not in k and "tracked" not in k}
    assert "not finite at iteration 3 of 10" in card["failed"] and all(torch.equal(v, untrained[k]) for k, v in kept.items())


def test_variants_change_the_settings_of_their_runs_alone(data, tmp_path):
    tasks = [Run("js_l1", "awgn-0.5-O_0.3", 0, variant) for variant in ("", "lam_0", "small")]
    np.savez(data / "poses.npz", train_rotations=np.tile(np.eye(3), (18, 1, 1)), train_conformations=np.arange(18) % 2)
    np.save(data / "volumes.npy", np.random.default_rng(0).random((2, 32, 32, 32), np.float32))
    variants = {"lam_0": {"lam": 0.0}, "small": {"width": 1, "batch_size": 9}}
    training.run_grid(tasks, SMALL, data, tmp_path / "o", tmp_path / "s", "cpu", 1, variants)
    cards = [json.loads((tmp_path / "o" / task.folder / "generator.json").read_text()) for task in tasks]
    assert [card["settings"]["lam"] for card in cards] == [10, 0, 10] and [card["width"] for card in cards] == [2, 2, 1]
    assert [card["run"]["variant"] for card in cards] == ["", "lam_0", "small"]


@pytest.mark.parametrize(
    "variants, message",
    [
        ({}, "variant 'lam_0': expected its changes of settings in `variants`, which has none"),
        ({"lam_0": {"lambda": 0.0}}, "variant 'lam_0': .*unexpected keyword argument 'lambda'"),
        ({"lam_0": {"lam": -1.0}}, "variant 'lam_0': lam: expected a finite number >= 0, got -1.0"),
    ],
)
def test_a_variant_that_is_none_is_refused_before_anything_is_trained(variants, message, data, tmp_path):
    tasks = [Run("l1_ae", "awgn-0.5-none", 0), Run("l1_ae", "awgn-0.5-none", 0, "lam_0")]
    with pytest.raises(ValueError, match=message):
        training.run_grid(tasks, SMALL, data, tmp_path / "o", tmp_path / "s", "cpu", 1, variants)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"eta_g": "1e-3"}, TypeError, "eta_g: expected a number, got '1e-3' .*in YAML write 1.0e-3"),
        ({"on_failure": "ignore"}, ValueError, "on_failure: expected one of stop, record, got 'ignore'"),
        ({"epochs": 0}, ValueError, "epochs: expected an integer >= 1, got 0"),
        ({"architecture": "unet"}, ValueError, "architecture: expected one of resnet, resnet256, conv, pggan, got 'unet'"),
        ({"reconstruction_reduction": "max"}, ValueError, "expected one of mean, sum, got 'max'"),
        ({"learning_rate": 1}, TypeError, "unexpected keyword argument 'learning_rate'"),
    ],
)
def test_bad_settings_are_named(change, error, message):
    with pytest.raises(error, match=message):
        Settings(**change)
