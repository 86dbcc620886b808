"""Bad inputs are read as they should be, or refused by an error of this library that says what and the way out."""

import signal
import subprocess
import sys
from collections import Counter

import psutil
import pytest
import yaml

from benchmarks import bad_inputs, interrupted, reliability
from benchmarks.bad_inputs import Input
from benchmarks.worker import ROOT
from cryo_lib.paper.experiments import read_scale


@pytest.mark.parametrize("family", bad_inputs.FAMILIES, ids=lambda family: family.__name__)
def test_every_input_of_a_family_comes_out_right(family, tmp_path):
    tried = Counter()
    for given in bad_inputs.inputs(family, tmp_path):
        said, right = reliability.outcome(given, tmp_path)
        assert right, (given.kind, given.what, said)
        if given.kind in ("a column", "an optics group"):
            assert given.what.split()[0] in said.partition(".star")[2]  # after the file's own name
        tried[given.reads is None] += 1
    assert tried[True] >= 10


def test_there_are_many_of_them(tmp_path):
    assert sum(sum(1 for _ in bad_inputs.inputs(family, tmp_path)) for family in bad_inputs.FAMILIES) >= 300


def test_bytes_changed_at_random_are_never_another_librarys_error(tmp_path):
    kinds = Counter()
    for kind, given in reliability.mutated(tmp_path, 40, seed=1):
        said, right = reliability.outcome(given, tmp_path)
        assert right or said.startswith("read: "), (kind, given.what, said)
        kinds[kind] += right
    assert all(kinds.values()) and len(kinds) == 6


def raised(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    "attempt", [lambda: raised(ValueError("expected 1")), lambda: int("x"), lambda: {}["x"], lambda: 7]
)
def test_what_another_raises_and_what_is_read_wrongly_does_not_pass(attempt, tmp_path):
    assert not reliability.outcome(Input("a kind", "a thing", attempt), tmp_path)[1]
    assert not reliability.outcome(Input("a kind", "a thing", attempt, reads=8), tmp_path)[1]


def test_a_process_is_killed_with_all_that_it_started():
    code = (
        "import subprocess as s; p = s.Popen(['sleep', '99'], start_new_session=True); print(p.pid, flush=1); p.wait()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(process.stdout.readline()))
    interrupted.kill(process)
    assert process.returncode == -signal.SIGKILL
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_a_kill_knows_the_stage_that_is_under_way(tmp_path):
    log = tmp_path / "copy.log"
    log.write_text("Running stage 'structures@ci':\n> cryo run 00\nRunning stage 'train@ci':\n")
    first = len(log.read_text())
    assert interrupted.running(tmp_path / "copy", 0) == "train"
    assert interrupted.running(tmp_path / "copy", first) == ""
    log.write_text(log.read_text() + "Running stage 'export@ci':\n")
    assert interrupted.running(tmp_path / "copy", first) == "export"


def test_results_that_differ_are_named(tmp_path):
    def locked(name, digest):
        outs = [{"path": "results/ci", "md5": digest}, {"path": "relion/ci", "md5": name}]
        (tmp_path / name).mkdir()
        (tmp_path / name / "dvc.lock").write_text(yaml.safe_dump({"stages": {"relion@ci": {"outs": outs}}}))
        return tmp_path / name

    plain = interrupted.outcome(locked("plain", "a"))
    assert interrupted.against(plain, locked("same", "a")) == ("the same results, to the bit", True)
    assert interrupted.against(plain, locked("other", "b")) == ("other results: relion@ci: results/ci", False)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="an archive does not say which files are the repository's")
def test_a_copy_is_the_repository_at_the_ci_scale_without_results(tmp_path):
    folder = interrupted.copy(tmp_path / "copy")
    assert read_scale(folder / "params.yaml")["scale"] == "ci" and (folder / "dvc.yaml").is_file()
    assert not any((folder / name).exists() for name in ("results", "dvc.lock", ".git"))
