"""An unpacked archive, which has no .git, runs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_dvc_runs_where_there_is_no_repository(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc" / "config", tmp_path / ".dvc")
    (tmp_path / "dvc.yaml").write_text("stages: {a: {cmd: echo 7 > out, outs: [out]}}")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    here = {"cwd": tmp_path, "env": os.environ | {"PATH": path, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}}
    for command in ("make -o setup scm", "dvc repro"):
        done = subprocess.run(command.split(), **here, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out").read_text() == "7\n"
