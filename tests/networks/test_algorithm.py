"""Algorithm 1 does what it says: the right losses and order, loud failure, and steps to leave a GPU alone with."""

import importlib
import inspect
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cryo_lib.networks import algorithm, losses, models, replay
from cryo_lib.networks.algorithm import Settings
from cryo_lib.networks.engine import Trainer, TrainingError
from cryo_lib.networks.runs import varied

SMALL = Settings(width=2, epochs=2, batch_size=4, log_every=3)
EXACT = {"eta_d": 2**-10, "eta_g": 2**-10}  # rates that a GPU, which reads them in single precision, does not round
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def trainer(method="beta_05_05_l1", settings=SMALL, seed=0, n=18):
    x = np.random.default_rng(1).random((n, 32, 32)).astype(str(torch.get_default_dtype()).removeprefix("torch."))
    return Trainer(losses.Method.parse(method), settings, lambda epoch: (x, x + 0.1), seed, CPU)


def minibatch(t):
    """The first four pairs and a mixing, as `step` takes them."""
    return *next(t.batches.take([torch.arange(4)])), torch.rand(
        t.settings.k_d, 4, generator=torch.Generator().manual_seed(5)
    )


def assert_same_weights(a, b):
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("method", ["beta_05_05_l1", "wgan_gp_l1"])
def test_the_256_px_networks_learn_in_the_same_loop(method):
    """Every convolution of both moves, and the reconstruction loss falls."""
    x = np.random.default_rng(1).random((8, 64, 64), np.float32)
    settings = varied(SMALL, {"architecture": "resnet256", "batch_size": 4, "eta_g": 1e-3})
    t = Trainer(losses.Method.parse(method), settings, lambda epoch: (x, x + 0.1), 0, CPU)
    kernels = [p for network in (t.generator, t.discriminator) for p in network.parameters() if p.ndim == 4]
    before = [kernel.detach().clone() for kernel in kernels]
    found = [float(t.step(*minibatch(t))["reconstruction"]) for _ in range(6)]
    assert all(not torch.equal(a, b) for a, b in zip(before, kernels)) and found[-1] < found[0]


def test_an_autoencoder_step_is_adam_on_the_reconstruction_loss(double):
    """Algorithm 1 without a discriminator, replayed by plain torch."""
    t = trainer("l2_ae", varied(SMALL, {"k_g": 2}))
    x, y, mix = minibatch(t)
    twin = models.ResNetGenerator(32, 2)
    twin.load_state_dict(t.generator.state_dict())
    adam = torch.optim.Adam(twin.parameters(), SMALL.eta_g, (SMALL.beta1, SMALL.beta2))
    for _ in range(2):
        adam.zero_grad()
        torch.nn.functional.mse_loss(twin(y), x).backward()
        adam.step()
    t.step(x, y, mix)
    for ours, plain in zip(t.generator.parameters(), twin.parameters()):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("method", ["js_l1", "wgan_gp_l1"])
def test_a_gan_step_is_k_d_updates_of_d_then_k_g_of_g(method, double):
    """Algorithm 1 written out line by line, with G(y) computed anew for every update."""
    s = varied(SMALL, {"k_d": 2, "k_g": 2, "adversarial_reduction": "sum"})
    t = trainer(method, s)
    x, y, mix = minibatch(t)
    g, d = models.ResNetGenerator(32, 2), models.ResNetDiscriminator(32, 2)
    g.load_state_dict(t.generator.state_dict())
    d.load_state_dict(t.discriminator.state_dict())
    adam_g = torch.optim.Adam(g.parameters(), s.eta_g, (s.beta1, s.beta2))
    adam_d = torch.optim.Adam(d.parameters(), s.eta_d, (s.beta1, s.beta2))
    for k in range(s.k_d):
        x_hat = g(y).detach()
        if method == "js_l1":
            gain = (torch.sigmoid(d(x)).log() + (1 - torch.sigmoid(d(x_hat))).log()).sum() / 4
        else:
            gain = (d(x) - d(x_hat)).sum() / 4
            gain = gain - s.mu * losses.gradient_penalty(d, x, x_hat, mix[k].view(4, 1, 1, 1))
        adam_d.zero_grad()
        (-gain).backward()
        adam_d.step()
    for _ in range(s.k_g):
        x_hat = g(y)
        score = (1 - torch.sigmoid(d(x_hat))).log() if method == "js_l1" else -d(x_hat)
        adam_g.zero_grad()
        (score.sum() / 4 + s.lam * (x_hat - x).abs().mean()).backward()
        adam_g.step()
    t.step(x, y, mix)
    for ours, plain in zip(
        [*t.generator.parameters(), *t.discriminator.parameters()], [*g.parameters(), *d.parameters()]
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-5)


def test_each_epoch_visits_every_pair_once_in_an_order_of_its_own():
    t = trainer()
    orders = [torch.cat(t.epoch_batches(epoch)) for epoch in (0, 1, 0)]
    assert torch.equal(orders[0].sort().values, torch.arange(18))
    assert torch.equal(orders[0], orders[2]) and not torch.equal(orders[0], orders[1])


def test_contaminated_minibatches_stay_together():
    batches = trainer(settings=varied(SMALL, {"unit": "minibatch"})).epoch_batches(0)
    assert sorted(batch.tolist() for batch in batches) == [list(range(i, min(i + 4, 18))) for i in range(0, 18, 4)]


@pytest.mark.parametrize(
    "setting, expected",
    [
        ({"decay": 0.5}, np.minimum(1, (1 - np.arange(10) / 10) / 0.5)),
        ({"warmup": 0.5}, np.minimum(1, np.arange(10) / 10 / 0.5)),
    ],
)
def test_rates_fall_to_zero_over_the_last_share_and_rise_from_zero_over_the_first(setting, expected):
    t = trainer(settings=varied(SMALL, setting))
    rates = []
    for iteration in range(t.iterations):
        t.iteration = iteration
        t._set_rates()
        rates.append(t.optimise_g.param_groups[0]["lr"] / SMALL.eta_g)
    np.testing.assert_allclose(rates, expected)


def test_what_is_kept_is_the_moving_average_of_the_weights(double):
    """Its closed form, with a decay that grows from 1/11 to the one that is set; the training itself is untouched."""
    t, plain = trainer("l2_ae", varied(SMALL, {"average": 0.2})), trainer("l2_ae")
    expected = {name: value.clone() for name, value in t.generator.named_parameters()}
    for iteration in range(1, 6):
        t.advance(1), plain.advance(1)
        decay = min(0.2, iteration / (10 + iteration))
        for name, value in t.generator.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * value.detach()
    assert_same_weights(t.generator.state_dict(), plain.generator.state_dict())
    for name, value in t.kept.named_parameters():
        torch.testing.assert_close(value.detach(), expected[name])
    assert plain.kept is plain.generator
    for kept, present in zip(t.kept.buffers(), t.generator.buffers()):
        assert torch.equal(kept, present)


def test_pairs_are_turned_together_and_anew_in_every_epoch():
    """y = x + 0.1 still holds; each image is one of the square's eight, and not the same in two epochs."""
    t, seen = trainer("l2_ae", varied(SMALL, {"augment": True})), []
    t._step = lambda x, y, mix, share: seen.append((x, y)) or {}
    t.advance(t.iterations)
    x, y = (torch.cat(images) for images in zip(*seen))
    torch.testing.assert_close(y, x + 0.1)
    order = torch.cat([torch.cat(t.epoch_batches(epoch)) for epoch in (0, 1)])
    sums = torch.from_numpy(t.pairs(0)[0]).sum((1, 2))[order]
    torch.testing.assert_close(x.sum((1, 2, 3)), sums)
    first, second = (x[half][order[half].argsort()] for half in (slice(18), slice(18, 36)))
    assert 9 < (first != second).flatten(1).any(1).sum() < 18


def test_batch_norm_statistics_are_those_of_the_present_weights():
    """After calibration eval mode and training mode agree on a batch that has the calibration images' statistics."""
    t = trainer(n=100)
    t.calibrate()
    y = t.batches.noisy(100)
    with torch.no_grad():
        t.generator.train()
        training_mode = t.generator(y)
        t.calibrate()
        eval_mode = t.generator.eval()(y)
    assert (training_mode - eval_mode).abs().mean() < 0.02 * training_mode.std()


def test_a_state_that_is_cut_or_anothers_is_named_with_the_way_out(tmp_path):
    path, other = tmp_path / "state.pt", tmp_path / "other.pt"
    trainer().save_state(path)
    trainer("l1_ae").save_state(other)
    good = path.read_bytes()
    for content in (good[:-99], good[:9], b"", other.read_bytes(), b"version https://git-lfs.github.com/spec/v1"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="state.pt: expected the state of this training.*delete it") as caught:
            trainer().load_state(path)
        assert "weights_only" not in str(caught.value)


def test_a_resumed_training_makes_only_the_steps_that_are_left(tmp_path):
    """Stopped at its second line of metrics, a training goes on from there and ends where an uninterrupted one does."""
    counts, ends = [], []
    for stop in (None, 2, None):
        t = trainer("js_l1", varied(SMALL, {"decay": 0.5, "average": 0.9, "augment": True}))
        step, steps, lines = t.step, [], []
        t.step = lambda *minibatch, step=step, steps=steps: steps.append(1) or step(*minibatch)

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
        ends.append({k: v.clone() for k, v in t.kept.state_dict().items()})
    assert counts == [10, 6, 4]
    assert_same_weights(ends[0], ends[2])


def test_a_loss_that_is_not_finite_stops_with_the_reason(tmp_path):
    t = trainer("l2_ae", varied(SMALL, {"eta_g": 0.5}))
    t.generator.last[0].weight.data.fill_(math.nan)
    with pytest.raises(TrainingError, match=r"loss_g.* not finite at iteration 3 of 10; lower eta_g \(0.5\)"):
        t.train(tmp_path / "state.pt", lambda model: {"psnr": 1.0, "spread": 1.0})


def test_a_collapse_stops_with_the_reason(tmp_path):
    t = trainer("l1_ae")
    with pytest.raises(
        TrainingError, match="the generator has collapsed at iteration 6 of 10: its outputs vary over images by 0.10%"
    ):
        t.train(tmp_path / "state.pt", lambda model: {"psnr": 1.0, "spread": 0.001})


@pytest.mark.parametrize(
    "spreads, failed", [([0.5, 0.5, 0.001, 0.001, 0.001], True), ([0.5, 0.5, 0.001, 0.001, 0.4], False)]
)
def test_recorded_a_collapse_is_trained_on_and_told_where_the_run_ends_so(spreads, failed, tmp_path):
    t, values = trainer("l1_ae", varied(SMALL, {"on_failure": "record"})), iter(spreads)
    t.train(tmp_path / "state.pt", lambda model: {"psnr": 1.0, "spread": next(values)})
    assert t.iteration == t.iterations and [line["spread"] for line in t.history] == spreads
    told = t.collapse(t.history[-1]["spread"])
    assert failed == told.startswith("the generator has collapsed at iteration 10 of 10") and failed == bool(told)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"eta_g": "1e-3"}, "settings: eta_g: expected a valid number, got '1e-3'; in YAML write 1.0e-3, not 1e-3"),
        ({"eta_g": float("nan")}, "eta_g: expected a finite number, got nan"),
        ({"redraw": 1}, "redraw: expected a valid boolean, got 1"),
        ({"epochs": True}, "epochs: expected a valid integer, got True"),
        ({"epochs": 0}, "epochs: expected a number greater than or equal to 1, got 0"),
        ({"on_failure": "ignore"}, "on_failure: expected 'stop' or 'record', got 'ignore'"),
        ({"precision": "fp8"}, "precision: expected 'float32', 'tf32' or 'bf16', got 'fp8'"),
        ({"architecture": "vit"}, "architecture: expected 'resnet', 'resnet256', 'conv', 'pggan' or 'unet', got 'vit'"),
        ({"learning_rate": 1}, "settings: learning_rate: unknown; settings are architecture, width, epochs,"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        varied(SMALL, change)


def test_an_integer_serves_for_a_real_setting_and_every_setting_is_described():
    assert varied(SMALL, {"lam": 1}).lam == 1.0
    assert all(field.description for field in Settings.model_fields.values())


def test_algorithm_1_fits_on_a_page():
    assert len(inspect.getsource(algorithm).splitlines()) <= 150


def test_advancing_is_stepping_through_the_epochs_in_order():
    """Over the end of an epoch and its smaller last minibatch; and no further than the end."""
    a, b = trainer("wgan_gp_l1"), trainer("wgan_gp_l1")
    total = {}
    for epoch in (0, 1):
        for rows, mix in zip(b.epoch_batches(epoch), b.epoch_mixing(epoch)):
            for name, value in b.step(*next(b.batches.take([rows])), mix[:, : len(rows)]).items():
                total[name] = total.get(name, 0) + value
    sums = [a.advance(7), a.advance(100)]
    assert a.iteration == a.iterations == 10
    assert_same_weights(a.generator.state_dict(), b.generator.state_dict())
    assert total.keys() == sums[0].keys()
    for name, value in total.items():
        torch.testing.assert_close(sums[0][name] + sums[1][name], value)


class Watch(TorchDispatchMode):
    """Fails where an operation reads a value back to the host, or touches a tensor that is not on the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        devices = {value.device.type for value in tree_leaves((args, kwargs, out)) if isinstance(value, torch.Tensor)}
        assert "cpu" not in devices and function is not torch.ops.aten._local_scalar_dense.default, function
        return out


@pytest.fixture
def meta(monkeypatch):
    """A device without memory: a step runs on it in full; a wait for a value is an error. Adam's kernel is let in."""
    for name in ("torch.optim.adam", "torch.optim.optimizer"):
        if hasattr(module := importlib.import_module(name), "_get_fused_kernels_supported_devices"):
            monkeypatch.setattr(module, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    return torch.device("meta")


@pytest.mark.parametrize("method", ["l1_ae", "trimmed_ae", "welsch_ae", "js_l1", "beta_m1_m1_l1", "wgan_gp_l1"])
def test_a_step_never_waits_for_the_device(method, meta):
    x = np.zeros((8, 32, 32), np.float32)
    t = Trainer(losses.Method.parse(method), SMALL, lambda epoch: (x, x), 0, meta)
    inputs = *next(t.batches.take([torch.arange(4)])), torch.rand(1, 4, device=meta)
    t.step(*inputs)
    with Watch():
        out = t.step(*inputs)
    assert all(value.device == meta for value in out.values())
    with pytest.raises((AssertionError, RuntimeError)), Watch():
        float(out["loss_g"])


@pytest.mark.parametrize("method", ["l2_ae", "beta_05_05_l1", "wgan_gp_l1"])
def test_bf16_steps_are_those_of_float32_but_for_rounding(method):
    """The losses at the initial weights agree to 2 % but not to the bit; weights and Adam's moments stay float32.

    Of WGAN's D the gradient's norm does: nearly all of its loss is the penalty, mu (norm - 1)^2, which magnifies that.
    """
    found = {}
    for precision in ("float32", "bf16"):
        t = trainer(method, varied(SMALL, {"precision": precision, "width": 4, "k_g": 1}))
        found[precision] = t.step(*minibatch(t))
        kept = [*t.generator.parameters(), *(m for state in t.optimise_g.state.values() for m in state.values())]
        assert all(value.dtype == torch.float32 for value in kept)
    for name in found["float32"].keys() - {"loss_g"}:  # the others are taken before the first update
        exact, rounded = found["float32"][name], found["bf16"][name]
        assert rounded.dtype == torch.float32 and not torch.equal(exact, rounded)
        if (method, name) == ("wgan_gp_l1", "loss_d"):
            exact, rounded = (1 + (loss / t.settings.mu).sqrt() for loss in (exact, rounded))
        torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.0)


def test_the_arithmetic_of_a_gpu_is_set_for_a_training_and_set_back():
    kinds = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [kind.fp32_precision for kind in kinds]
    with models.arithmetic("tf32", one_size=True):
        assert torch.backends.cudnn.benchmark
    assert not torch.backends.cudnn.benchmark
    for precision, expected in (("float32", "ieee"), ("tf32", "tf32"), ("bf16", "tf32")):
        with models.arithmetic(precision):
            assert [kind.fp32_precision for kind in kinds] == [expected, expected]
        assert [kind.fp32_precision for kind in kinds] == before


@pytest.mark.parametrize("method", ["l1_ae", "js_l1", "wgan_gp_l1"])
@pytest.mark.parametrize("resumed", [False, True])
def test_replayed_steps_are_the_eager_ones(method, resumed, double, tmp_path, monkeypatch):
    """The warm-up leaves no trace in weights, statistics and moments, inputs and rates reach the step, and the last
    minibatch fits. Only the capture, which is not ours, is emulated: a replay calls the step on the same tensors and
    fills the same outputs."""

    def capture(step, device):
        saved = [value.clone() for value in t._state()]
        outputs = step()
        with torch.no_grad():
            for value, old in zip(t._state(), saved):
                value.copy_(old)

        def again():
            for name, value in step().items():
                outputs[name].copy_(value)

        return again, outputs

    monkeypatch.setattr(replay, "_warm_up", lambda step, device: [step() for _ in range(replay.WARM_UP)])
    monkeypatch.setattr(replay, "_capture", capture)
    settings, ends = varied(SMALL, EXACT | {"decay": 0.5}), []
    for captures in (False, True):
        t = trainer(method, settings, n=14)  # 8 iterations, the last of each pass smaller; decayed rates are exact, too
        t._captures = captures
        if resumed:  # by the same trainer, whose capture is then of tensors that are no longer the state
            t.advance(3)
            t.save_state(tmp_path / "state.pt")
            t.advance(2)
            t.load_state(tmp_path / "state.pt")
        sums = t.advance(100)
        assert (t._replayed is not None) == captures
        ends.append(
            (sums, {f"{part}.{k}": v for part in t._parts() for k, v in flat(getattr(t, part).state_dict()).items()})
        )
    (sums, end), (replayed_sums, replayed_end) = ends
    for name, value in sums.items():
        torch.testing.assert_close(replayed_sums[name], value)
    for name, value in end.items():
        torch.testing.assert_close(replayed_end[name], value, rtol=1e-4, atol=1e-5, msg=name)


def flat(state):
    """The tensors of a network's or an optimiser's state by name."""
    return (
        state
        if "state" not in state
        else {f"{i}.{k}": v for i, values in state["state"].items() for k, v in values.items()}
    )


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")


@gpu
@pytest.mark.parametrize("method", ["l1_ae", "welsch_ae", "beta_05_05_l1", "wgan_gp_l1"])
def test_on_a_gpu_replayed_steps_are_the_eager_ones_and_neither_waits(method, double):
    """In double precision: in single, ten steps of Adam make up to 0.3 sd of one rounding of the images."""
    x, ends = np.random.default_rng(1).random((18, 32, 32)), []
    noisy = torch.as_tensor(x[:, None] + 0.1).cuda()
    for cuda_graph in (False, True):
        settings = varied(SMALL, EXACT | {"cuda_graph": cuda_graph, "average": 0.9})
        t = Trainer(losses.Method.parse(method), settings, lambda epoch: (x, x + 0.1), 0, torch.device("cuda"))
        t.advance(1)
        (taken,) = t._minibatches(0, slice(1, 2))
        torch.cuda.set_sync_debug_mode("error")
        try:
            t._step(*taken)
            t.iteration += 1
            t._average()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        t.advance(100)
        with torch.no_grad():
            ends.append((t.generator(noisy), t.kept(noisy)))
    assert not torch.equal(*ends[0])
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-5)


def test_time_that_is_up_stops_at_a_line_of_metrics_to_be_gone_on_with(tmp_path):
    def validate(model):
        return {"psnr": 1.0, "spread": 1.0}

    whole, cut = trainer("wgan_gp_l1"), trainer("wgan_gp_l1")
    assert whole.train(tmp_path / "whole.pt", validate)
    assert not cut.train(tmp_path / "cut.pt", validate, until=0.0) and cut.iteration == 3
    again = trainer("wgan_gp_l1")
    assert again.train(tmp_path / "cut.pt", validate) and len(again.history) == 4
    assert_same_weights(whole.generator.state_dict(), again.generator.state_dict())
