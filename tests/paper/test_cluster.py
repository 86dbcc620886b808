"""Trainings as a job array: the parameters are the pipeline's, and a real SLURM runs, requeues and collects them."""

import contextlib
import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from cryo_lib.evaluate import metrics
from cryo_lib.networks import models
from cryo_lib.networks.runs import Run
from cryo_lib.paper import cluster, machine, trained
from cryo_lib.paper.experiments import DATASETS, grid, jobs, of_dataset, read_scale, settings_of
from cryo_lib.stacks.dataset import Dataset, Experiment

ROOT = Path(__file__).resolve().parents[2]
SCALES = sorted((ROOT / "scales").glob("*.yaml"))
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


@pytest.mark.parametrize("path", SCALES, ids=lambda p: p.stem)
def test_every_training_is_one_task_and_has_the_parameters_that_its_stage_passes(path):
    """Read off the command in dvc.yaml, merged as the runner merges them; only the lists are those of one run."""
    params = read_scale(path)
    everything = cluster.tasks(params)
    assert everything == [(name, run) for name, study in params["study"].items() for run in grid(study)]
    for dataset, (_, stage) in DATASETS.items():
        words, expected = STAGES[stage]["cmd"].replace("${item.scale}", params["scale"]).split(), {}
        for word, value in zip(words, words[1:]):
            if word == "-s":
                expected |= {value: params[value]} if value == "study" else params[value]
        expected |= {words[i + 1]: yaml.safe_load(words[i + 2]) for i, word in enumerate(words) if word == "-p"}
        assert cluster.parameters(params, dataset) == expected
        trained = [run for name, study in of_dataset(expected["study"], dataset).items() for run in grid(study)]
        assert trained == [run for name, run in everything if params["study"][name]["dataset"] == dataset]
        for name, run in everything[:: 1 + len(everything) // 50]:
            given = cluster.parameters(params, dataset, (name, run))
            assert given == expected | {"study": given["study"]} and [*given["study"]] == [name]
            assert grid(given["study"][name]) == [run]
            assert settings_of(params | {"study": given["study"]}, name, run) == settings_of(params, name, run)


def test_the_data_of_studies_are_those_of_their_stages():
    params = read_scale(ROOT / "scales" / "ci.yaml")
    made_by = {name: cluster.made_by(params, name) for name in params["study"]}
    assert made_by["table1"] == made_by["harder"] == "projections" and made_by["figure4"] == "pairs"
    for name, stage in made_by.items():
        (out,) = [out for out in STAGES[stage]["outs"] if isinstance(out, str)]
        assert out.replace("${item.scale}", "ci") == cluster.folders(params, name)[0].as_posix()


def test_a_stage_is_collected_when_all_that_it_trains_is_asked_for():
    params = read_scale(ROOT / "scales" / "ci.yaml")
    assert [*cluster.stages(params, [])] == ["train@ci", "train_particles@ci"]
    assert cluster.stages(params, ["table1", "figure4_halves", "figure4"]) == {"train_particles@ci": "ribosome"}
    assert cluster.stages(params, ["table1", "figure4"]) == {}
    with pytest.raises(ValueError, match="all that a stage trains .*; figure4, figure4_halves.*, got table1, figure4;"):
        cluster.collect(params, ["table1", "figure4"])


def test_indices_are_written_as_slurm_reads_them():
    assert cluster.ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8" and cluster.ranges([]) == ""


def test_unknown_studies_and_indices_are_named():
    params = read_scale(ROOT / "scales" / "ci.yaml")
    with pytest.raises(ValueError, match="studies: expected some of table1, .*, got table2"):
        cluster.chosen(params, ["table1", "table2"])
    n = len(cluster.tasks(params))
    with pytest.raises(ValueError, match=f"index: expected 0 to {n - 1}, the trainings of the scale 'ci', got {n}"):
        cluster.train(params, n)


SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
JobRequeue=1
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES State=UP MaxTime=INFINITE
"""


def run(command: str, **options) -> str:
    done = subprocess.run(command, shell=True, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout.strip()


def copy_sources(folder: Path, *files: str) -> None:
    """What a cluster needs of the repository, and more of its files."""
    ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "logs")
    for name in ("cryo_lib", "notebooks", "cluster"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("dvc.yaml", *files):
        shutil.copy(ROOT / name, folder / name)


def refusal(command: str, **options) -> str:
    """What a command says that fails."""
    done = subprocess.run(command, shell=True, capture_output=True, text=True, **options)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stderr


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_for(condition, seconds: float, what: str):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.2)
    return value


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A SLURM of one node, this machine, by a configuration of its own; the environment for it."""
    if missing := [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]:
        pytest.skip(f"SLURM is not installed: no {', '.join(missing)} (Debian packages slurm-wlm and munge)")
    if os.geteuid():
        pytest.skip("SLURM's daemons need to be started by root")
    folder = tmp_path_factory.mktemp("slurm")
    host = run("hostname -s")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    written = SLURM_CONF.format(host=host, folder=folder, cpus=os.cpu_count(), ports=free_ports(2))
    (folder / "slurm.conf").write_text(written)
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    started = subprocess.run(["pgrep", "-x", "munged"], capture_output=True).returncode
    if started:
        for place in ("/run/munge", "/var/log/munge", "/var/lib/munge"):
            Path(place).mkdir(parents=True, exist_ok=True)
            os.chown(place, pwd.getpwnam("munge").pw_uid, -1)
        run("setpriv --reuid=munge --regid=munge --clear-groups munged --force")
    try:
        run("slurmctld -c", env=environment)
        run("slurmd -c", env=environment)
        try:
            wait_for(lambda: "idle" in run("sinfo --noheader --format=%T", env=environment), 300, "an idle node")
        except AssertionError as error:
            logs = [(folder / f"{name}.log").read_text().splitlines()[-3:] for name in ("slurmctld", "slurmd")]
            pytest.skip(f"SLURM does not start on this machine: {error}; {logs}")
        yield environment
    finally:
        for name in ("slurmd", "slurmctld"):
            if (folder / f"{name}.pid").is_file():
                subprocess.run(["kill", (folder / f"{name}.pid").read_text().strip()])
        if started:
            subprocess.run(["pkill", "-x", "munged"])


def test_a_job_array_trains_survives_a_requeue_and_is_collected(slurm, tmp_path):
    """Submitted by cluster/submit.sh; one task is requeued in the middle of its training; DVC has nothing to run."""
    copy_sources(tmp_path, ".dvcignore")
    params = (ROOT / "scales" / "ci.yaml").read_text()
    (tmp_path / "params.yaml").write_text(params.replace("epochs: 1", "epochs: 60", 1))  # long enough to interrupt
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text((ROOT / ".dvc" / "config").read_text() + "    no_scm = true\n")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = slurm | {"PATH": path, "PYTHONPATH": str(tmp_path), "GRES": "", "OMP_NUM_THREADS": "1"}
    here = {"cwd": tmp_path, "env": environment}

    said = run("cluster/submit.sh figure4 figure4_halves", **here)
    array, collection = (line.rsplit(" ", 1)[1] for line in said.splitlines() if ": job " in line)
    wait_for(lambda: list(tmp_path.glob(".scratch/*/state.pt")), 900, "a training under way")
    running = run(f"squeue --noheader --states=R --jobs={array} --format=%i", **here).split()[0]
    run(f"scontrol requeue {running}", **here)
    pending = f"squeue --noheader --states=PD --jobs={running} --format=%i"
    wait_for(lambda: run(pending, **here), 600, "the requeued task")
    run(f"scontrol update JobId={running} StartTime=now", **here)  # else after two minutes
    wait_for(lambda: not run("squeue --noheader --format=%i", **here), 1800, "the jobs to end")

    logs = {path.name: path.read_text() for path in (tmp_path / "cluster" / "logs").iterdir()}
    assert "restart 0" in logs[f"train-{running}.out"] and "restart 1" in logs[f"train-{running}.out"], logs
    assert run("python -m cryo_lib.paper.cluster missing figure4 figure4_halves", **here) == "", logs
    made = {path.parent.relative_to(tmp_path) for path in tmp_path.glob("runs/ci/**/generator.json")}
    params = read_scale(tmp_path / "params.yaml")
    assert made == {job.folder for name in ("figure4", "figure4_halves") for job in jobs(params, name)}
    collected = logs[f"collect-{collection}.out"]
    assert "Running stage" not in run("dvc repro --single-item train_particles@ci", **here), collected

    collect = "python -m cryo_lib.paper.cluster collect figure4 figure4_halves"
    assert run(collect, **here) == "train_particles@ci"
    stray = tmp_path / "runs/ci/figure4/l1_ae/measured-none/seed9/generator.safetensors"
    stray.parent.mkdir()
    stray.touch()
    said = refusal(collect, **here)
    assert "got 1 others, the first runs/ci/figure4/l1_ae/measured-none/seed9; remove them" in said
    stray.unlink()
    next(tmp_path.glob("runs/ci/**/generator.safetensors")).unlink()
    assert "1 of 4 trainings are not finished: " in refusal(collect, **here)


ABSENT = """dvc papermill IPython ipykernel nbclient nbconvert jupyterlab mrcfile starfile skimage sklearn aspire
bm3d""".split()


def test_a_machine_without_the_environment_trains_in_pieces_that_go_on(tmp_path):
    """No DVC, Jupyter, papermill: the data are made, then trainings in the order asked for; what is finished stays."""
    copy_sources(tmp_path)
    shutil.copy(ROOT / "scales/ci.yaml", tmp_path / "params.yaml")
    site = tmp_path / "build/wheels/site"
    site.mkdir(parents=True)
    (site / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": f"{tmp_path}:{site}", "CUDA_VISIBLE_DEVICES": ""}
    here = {"cwd": tmp_path, "env": environment}
    run(f"{sys.executable} -m cryo_lib.paper.notebooks script 00 -p scale ci -s structure", **here)
    printed = run("cluster/piece.sh 0 'table1/l1_ae/*'", **here)
    (left,) = [int(line.split()[0]) for line in printed.splitlines() if "trainings left: call again" in line]
    assert left > 0 and (tmp_path / "data/ci/rnap/card.json").is_file() and not (tmp_path / "runs").exists()
    printed = run("cluster/piece.sh 9 --workers 2 'table1/l1_ae/*'", **here)
    assert printed.splitlines()[-1] == "0 trainings left"
    made = {path.parent: path.stat().st_mtime_ns for path in tmp_path.glob("runs/ci/table1/**/generator.safetensors")}
    assert len(made) == left and {path.parents[1].name for path in made} == {"l1_ae"}
    assert not list((tmp_path / ".scratch").glob("*/"))
    printed = run("cluster/piece.sh 9 'table1/beta_05_05_l1/awgn-0.1-none/*' 'table1/l1_ae/*'", **here)
    assert [line for line in printed.splitlines() if line.startswith("table1/l1_ae")] == []
    assert all(path.joinpath("generator.safetensors").stat().st_mtime_ns == time_ for path, time_ in made.items())
    run(f"{sys.executable} -m cryo_lib.paper.trained", **here)
    check_what_has_been_trained(tmp_path)
    said = refusal(f"{sys.executable} -m cryo_lib.paper.cluster train 'tabel1/*'", **here)
    assert "pattern: expected one of trainings such as table1/" in said
    said = refusal(f"{sys.executable} -m cryo_lib.paper.cluster train --workers 0", **here)
    assert "workers: expected" in said


def check_what_has_been_trained(folder: Path) -> None:
    """The table and the picture hold what is finished and no more, each by its own network on the test images."""
    data, table = Dataset(folder / "data/ci/rnap"), pd.read_csv(folder / "results/ci/trained.csv")
    networks = table[table["study"].notna()]
    found = {path.parent for path in (folder / "runs/ci").rglob("generator.safetensors")}
    named = {
        folder / "runs/ci" / row.study / Run(row.method, row.experiment, row.seed).folder: row
        for row in networks.itertuples()
    }
    assert set(named) == found and len(networks) == len(found)
    x = data.clean("test")
    for path, row in named.items():
        x_hat = models.denoise_images(
            models.load(path / "generator.safetensors")[0], data.pairs("test", Experiment.parse(row.experiment))[1]
        )
        assert row.psnr == pytest.approx(metrics.psnr(x, x_hat).mean(), abs=1e-3) and row.images_per_s > 0
    noisy = table[table["method"] == "noisy"]
    assert noisy["experiment"].tolist() == sorted(set(noisy["experiment"]), reverse=True)  # each once
    for row in noisy.itertuples():
        assert row.mse == pytest.approx(
            metrics.mse(*data.pairs("test", Experiment.parse(row.experiment))).mean(), rel=1e-4
        )
    assert set(networks["device"]) == {"cpu"} and "| Trained on |" in (folder / "results/ci/trained.md").read_text()
    left = len(cluster.tasks(read_scale(folder / "params.yaml"))) - len(found)
    assert f"{left} of the scale's" in (folder / "results/ci/trained.md").read_text()
    assert (folder / "figures/ci/trained.png").stat().st_size > 10_000


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), OSError("no space"), ValueError("damaged")])
def test_a_training_that_breaks_is_told_of_and_the_others_go_on(error, monkeypatch, capsys):
    params, begun = read_scale(ROOT / "scales" / "ci.yaml"), []

    def break_or_run_out_of_time(task: Run, *_: object, **__: object) -> None:
        begun.append(task)
        if len(begun) == 1:
            raise error

    monkeypatch.setattr(cluster, "finished", lambda params, study, run: run.method == "l2_ae")
    monkeypatch.setattr(cluster.runs, "run", break_or_run_out_of_time)
    asked = [run for _, run in cluster.in_order(params, ["table1/*"]) if run.method != "l2_ae"]
    assert cluster.work(params, ["table1/*"]) == len(asked) > 1 and begun == asked
    said = capsys.readouterr()
    assert said.err == f"error: table1/{asked[0].folder.as_posix()}: {error}\n"
    assert said.out.splitlines() == [f"table1/{run.folder.as_posix()}" for run in asked]


def test_where_nothing_is_trained_that_is_said(tmp_path, monkeypatch):
    """Before any training, and where particles alone are asked for, whose test images are others."""
    monkeypatch.chdir(tmp_path)
    params = read_scale(ROOT / "scales" / "ci.yaml")
    monkeypatch.setattr(cluster, "finished", lambda params, study, run: study == "figure4")
    for patterns, among in (([], "all"), (["figure4/*"], "figure4/*")):
        with pytest.raises(ValueError, match=re.escape(f"among {among} of the scale 'ci', got none of ")):
            trained.write(params, patterns)


def test_a_revision_is_the_checkouts_or_that_which_was_packed(tmp_path, monkeypatch):
    """Not that of another checkout around the unpacked sources, and without git on the machine."""
    run("git init --quiet && git -c user.name=a -c user.email=a@b.c commit --quiet --allow-empty -m x", cwd=tmp_path)
    assert machine.revision(tmp_path) == run("git rev-parse --short HEAD", cwd=tmp_path)
    unpacked = tmp_path / "unpacked"
    (unpacked / "build").mkdir(parents=True)
    (unpacked / "build" / "revision").write_text("1234567\n")
    assert machine.revision(unpacked) == "1234567"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.revision(unpacked) == "1234567" and machine.revision(tmp_path) == "unknown"


@pytest.mark.parametrize("scale, asked", [("laptop", False), ("workstation", True)])
def test_where_relion_is_to_run_and_is_not_there_that_is_said_first(scale, asked, tmp_path):
    shutil.copy(ROOT / "scales" / f"{scale}.yaml", tmp_path / "params.yaml")
    environment = os.environ | {"PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "cryo_lib.paper.machine"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == asked, done.stderr
    said = "expected RELION on PATH, got no such program" in done.stderr and "set run_relion: false" in done.stderr
    assert said == asked and "Traceback" not in done.stderr


def test_trainings_come_in_the_order_of_the_patterns_each_once():
    params = read_scale(ROOT / "scales" / "paper.yaml")
    found = cluster.in_order(params, ["table1/*/awgn-0.05-none/seed0", "table1/*/seed0", "contamination/beta*/seed1"])
    assert [run.experiment for _, run in found[:8]] == ["awgn-0.05-none"] * 8 and len(found) == 16 + 2 * 9
    assert {study for study, _ in found[:16]} == {"table1"} and all(run.seed == 0 for _, run in found[:16])
    assert cluster.in_order(params, []) == cluster.tasks(params)
