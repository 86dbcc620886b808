"""Two processes that torchrun starts compute what one does: trainings, denoised stacks and the sums they rest on."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cryo_lib.denoisers import apply
from cryo_lib.evaluate.metrics import SCORES
from cryo_lib.networks import losses, models, parallel, runs
from cryo_lib.networks.algorithm import Settings
from cryo_lib.networks.engine import Trainer
from cryo_lib.networks.runs import Run
from cryo_lib.simulate import projection
from cryo_lib.stacks import particles

ROOT = Path(__file__).resolve().parents[2]
PAIRS = 11  # minibatches of 4, 4 and 3: of the last one the processes have 2 and 1


IMPORTS = """import sys
from pathlib import Path
import torch
from cryo_lib.denoisers import apply
from cryo_lib.evaluate.metrics import SCORES
from cryo_lib.networks import losses, models, parallel, runs
from cryo_lib.networks.algorithm import Settings
from cryo_lib.networks.engine import Trainer
from cryo_lib.networks.runs import Run
"""


def two_processes(*words, cwd=ROOT, timeout=None):
    """Run Python (options of torchrun, then a file, or -m and a module) in two processes joined by gloo."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(cwd)}
    return subprocess.run(map(str, command), env=env, capture_output=True, text=True, cwd=cwd, timeout=timeout)


def torchrun(logs, *words, cwd=ROOT):
    """What each of two processes printed, kept below `logs`, that ran to their end."""
    done = two_processes("--redirects", "1", "--log-dir", logs, *words, cwd=cwd)
    printed = [path.read_text() for path in sorted(logs.glob("**/stdout.log"))]
    assert done.returncode == 0 and len(printed) == 2, (done.stdout, done.stderr, printed)
    return printed


@pytest.fixture
def script(tmp_path):
    """A program below the temporary folder, of the lines that are given after IMPORTS."""

    def write(text):
        path = tmp_path / "program.py"
        path.write_text(IMPORTS + text)
        return path

    return write


def test_alone_everything_stays_as_it_is():
    x = torch.arange(6.0)
    norm = torch.nn.BatchNorm2d(2)
    parallel.synchronise(norm)
    assert (
        parallel.size() == 1 and parallel.rank() == 0 and parallel.total(x) is x and type(norm) is torch.nn.BatchNorm2d
    )
    assert parallel.part(7) == slice(0, 7) and parallel.from_first(lambda: 5) == 5
    assert [batch is x for batch in parallel.in_order(x, 9)] == [True] and parallel.gathered(x) is x
    mean, variance, n = parallel.moments(x.view(3, 2), (0,))
    assert n == 3
    torch.testing.assert_close(mean, torch.tensor([[2.0, 3.0]]))
    torch.testing.assert_close(variance, torch.tensor([[8 / 3, 8 / 3]]))


@pytest.mark.parametrize("n, processes", [(7, 2), (8, 3), (3, 3), (2, 3)])
def test_parts_are_the_whole_in_order_and_nearly_equal(n, processes, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    parts = []
    for rank in range(processes):
        monkeypatch.setenv("RANK", str(rank))
        parts.append(list(range(n))[parallel.part(n)])
    assert sum(parts, []) == list(range(n)) and max(map(len, parts)) - min(map(len, parts)) <= 1


BATCH_NORM = """
import sys, torch
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
x = torch.randn(5, 3, 4, 4) + torch.arange(5.0)[:, None, None, None]
norm = torch.nn.BatchNorm2d(3)
torch.nn.init.normal_(norm.weight)
parallel.synchronise(norm)
mine = x[parallel.part(5)].clone().requires_grad_()
score = (norm(mine) ** 3).sum(dim=(1, 2, 3))
(slope,) = torch.autograd.grad(score.sum(), mine, create_graph=True)
penalty = (slope.flatten(1).norm(dim=1) - 1).square().sum()
penalty.backward()
parallel.sum_gradients(norm.parameters())
found = {"slope": slope.detach(), "penalty": parallel.total(penalty.detach())}
found |= {"gradient": norm.weight.grad, "second": mine.grad}
torch.save(found | norm.state_dict(), f"{sys.argv[1]}.{parallel.rank()}")
"""


def test_batch_norm_of_two_processes_is_that_of_the_whole_batch_to_the_second_derivative(script, tmp_path):
    """Slopes of the scores by images, the penalty on them and its gradients, as WGANgp needs them; running sums."""
    program = script(BATCH_NORM)
    torchrun(tmp_path / "logs", program, tmp_path / "two")
    subprocess.run([sys.executable, program, tmp_path / "one"], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    one, *two = (torch.load(f"{tmp_path}/{name}", weights_only=True) for name in ("one.0", "two.0", "two.1"))
    for name, value in one.items():
        if name in ("slope", "second"):
            torch.testing.assert_close(torch.cat([each[name] for each in two]), value)
        else:
            for each in two:
                torch.testing.assert_close(each[name], value, msg=name)


RAISES = """

def fails():
    raise ValueError("the disk is full")

try:
    parallel.from_first(fails)
except ValueError as error:
    print("said:", error)
print("then:", parallel.from_first(lambda: "together"))
"""


def test_what_the_first_process_raises_all_raise(script, tmp_path):
    printed = torchrun(tmp_path / "logs", script(RAISES))
    assert [each.splitlines() for each in printed] == 2 * [["said: the disk is full", "then: together"]]


TRAIN = """
import sys, numpy, torch
torch.set_default_dtype(torch.float64)
x = numpy.random.default_rng(1).random((11, 32, 32))
given = {"width": 2, "epochs": 2, "batch_size": 4, "log_every": 2, "eta_g": 1e-3, "calibration": 11}
resnets = [(method, "resnet") for method in ("l1_ae", "trimmed_ae", "beta_05_05_welsch", "wgan_gp_l1")]
for method, architecture in [*resnets, ("wgan_gp_l1", "pggan")]:
    settings = Settings(architecture=architecture, **given)
    trainer = Trainer(losses.Method.parse(method), settings, lambda epoch: (x, x + 0.1), 0, torch.device("cpu"))
    checkpoint = __import__("pathlib").Path(f"{sys.argv[1]}.{method}.{architecture}")
    trainer.train(checkpoint, lambda model: {"spread": 1.0, "psnr": 1.0})
"""


def test_two_processes_train_as_one_on_the_same_minibatches(script, tmp_path):
    """All methods, minibatches of uneven parts : the same losses, weights and batch-norm statistics but for rounding.

    Robust losses take their medians over the whole minibatch.
    """
    program = script(TRAIN)
    torchrun(tmp_path / "logs", program, tmp_path / "two")
    subprocess.run([sys.executable, program, tmp_path / "one"], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    compared = sorted(path.name.removeprefix("one.") for path in tmp_path.glob("one.*"))
    assert len(compared) == 5
    for name in compared:
        one, two = (torch.load(tmp_path / f"{start}.{name}", weights_only=True) for start in ("one", "two"))
        assert [line["iteration"] for line in two["history"]] == [2, 4, 6]
        for a, b in zip(one["history"], two["history"]):
            assert a.keys() == b.keys()
            for key in a.keys() & {"loss_d", "loss_g", "reconstruction"}:
                np.testing.assert_allclose(a[key], b[key], rtol=1e-6, err_msg=f"{name} {key}")
        for part in {"generator", "discriminator"} & one.keys():
            for key, value in one[part].items():
                torch.testing.assert_close(
                    two[part][key].double(), value.double(), rtol=1e-4, atol=1e-4, msg=f"{name} {key}"
                )


def test_more_processes_than_pairs_in_a_minibatch_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    x = np.random.default_rng(1).random((PAIRS, 32, 32), np.float32)
    with pytest.raises(
        ValueError, match="a pair for each of 4 processes, got one of 3 .11 pairs, 4 a minibatch.; start fewer"
    ):
        Trainer(
            losses.Method.parse("l1_ae"), Settings(width=2, batch_size=4), lambda epoch: (x, x), 0, torch.device("cpu")
        )


GRID = """
import sys
from pathlib import Path
data, out = map(Path, sys.argv[1:])
settings = runs.Settings(width=2, epochs=2, batch_size=4, log_every=3, eta_g=1e-4)
jobs = [runs.Job(Run("l2_ae", "awgn-0.5-A_0.3", seed), settings, out) for seed in (0, 1)]
runs.run_grid(jobs, data, out / "scratch", "cpu", scores=SCORES)
"""


def test_a_grid_by_two_processes_writes_what_one_writes_once(script, tmp_path):
    rng = np.random.default_rng(0)
    for split, n in (("train", 12), ("val", 4)):
        np.save(tmp_path / f"x_{split}.npy", rng.random((n, 32, 32), np.float32))
    (tmp_path / "card.json").write_text(json.dumps({"seed": 0, "pixel_size": 4.0}))
    printed = torchrun(tmp_path / "logs", script(GRID), tmp_path, tmp_path / "two")
    assert ["by 2 processes together" in each for each in printed] == [True, False]
    assert ["[2/2" in each for each in printed] == [True, False]
    task, settings = (
        Run("l2_ae", "awgn-0.5-A_0.3", 1),
        Settings(width=2, epochs=2, batch_size=4, log_every=3, eta_g=1e-4),
    )
    runs.run(task, settings, tmp_path, tmp_path / "one", tmp_path / "s", "cpu", scores=SCORES)
    one, two = (json.loads((tmp_path / name / task.folder / "generator.json").read_text()) for name in ("one", "two"))
    # Rounding turns the sign of Adam's first steps where a gradient is nearly 0: a rate of 1e-3 makes 0.2 dB of that.
    assert one["validation"]["psnr"] == pytest.approx(two["validation"]["psnr"], abs=0.01)
    assert one | {"validation": 0} == two | {"validation": 0} and not list((tmp_path / "two" / "scratch").glob("*/"))


def test_notebooks_train_together_and_leave_a_copy_each(tmp_path):
    """Notebook 03 by papermill in two processes: their kernels make one training, which the first one writes."""
    rng, root = np.random.default_rng(0), tmp_path / "copy"
    for name in ("cryo_lib", "notebooks"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    shutil.copy(ROOT / "dvc.yaml", root)
    data = root / "data/laptop/rnap"
    data.mkdir(parents=True)
    for split, n in (("train", 12), ("val", 4)):
        np.save(data / f"x_{split}.npy", rng.random((n, 32, 32), np.float32))
    (data / "card.json").write_text(json.dumps({"seed": 0, "pixel_size": 4.0}))
    settings = "{width: 2, epochs: 1, batch_size: 4, calibration: 12, eta_g: 1.0e-3}"
    study = "{try: {methods: [js_l1], experiments: [awgn-0.1-none]}}"
    given = {"study": study, "settings": settings, "device": "cpu"}
    words = [word for name, value in given.items() for word in ("-p", name, value)]
    notebook, out = root / "notebooks/03_train_networks.ipynb", root / "executed/03.ipynb"
    printed = torchrun(tmp_path / "logs", "-m", "cryo_lib.paper.notebooks", "run", notebook, out, *words, cwd=root)
    assert ["by 2 processes together" in each for each in printed] == [True, False]
    assert sorted(path.name for path in out.parent.iterdir()) == ["03.1.ipynb", "03.ipynb"]
    assert len(list(root.glob("runs/laptop/try/**/generator.safetensors"))) == 1


DENOISE = """
import sys, torch
torch.manual_seed(0)
network = models.ResNetGenerator(32, 2).eval()
print("wrote", apply.denoise_stack(network, sys.argv[1], sys.argv[2], batch_size=3))
"""


def test_two_processes_end_where_the_stack_cannot_be_written(script, tmp_path):
    """The first says why; the other, which waits to hand over its images, does not wait for ever."""
    stack = particles.new(tmp_path / "noisy.star", np.ones((7, 32, 32)), projection.random_rotations(7, 0), 6.4)
    done = two_processes(script(DENOISE), stack, stack, timeout=300)
    assert done.returncode != 0 and "noisy" in done.stderr and "ValueError" in done.stderr, done.stderr


@pytest.mark.parametrize("n", [2, 13])
def test_two_processes_denoise_a_stack_as_one(n, script, tmp_path):
    """Batches in turn, the last ones short or empty; one stack is written, in the order of the rows."""
    y = np.random.default_rng(0).normal(0.2, 1, (n, 32, 32)).astype(np.float32)
    stack = particles.new(tmp_path / "noisy.star", y, projection.random_rotations(n, 0), 6.4)
    printed = torchrun(tmp_path / "logs", script(DENOISE), stack, tmp_path / "two.star")
    assert [each.split() for each in printed] == 2 * [["wrote", str(tmp_path / "two.star")]]
    torch.manual_seed(0)
    one = apply.denoise_stack(models.ResNetGenerator(32, 2).eval(), stack, tmp_path / "one.star", batch_size=3)
    one, two = particles.ParticleStack.open(one), particles.ParticleStack.open(tmp_path / "two.star")
    np.testing.assert_allclose(two.images[:], one.images[:], atol=1e-6)
    assert two.table.drop(columns="rlnImageName").equals(one.table.drop(columns="rlnImageName"))
