"""JupyterLab's own server opens the notebooks and runs them from `notebooks/`, as a reader does."""

import json
import re
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path

import nbformat
import pytest
import requests
import websocket

ROOT = Path(__file__).resolve().parents[2]
READERS = sorted(p.name for p in (ROOT / "notebooks").glob("*.ipynb") if int(p.name[:2]) >= 20)  # read only results/


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(url, token) of a JupyterLab server in a copy of the repository that has results but neither data nor runs."""
    folder = tmp_path_factory.mktemp("lab")
    for name in ("cryo_lib", "notebooks", "results"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    shutil.copy(ROOT / "dvc.yaml", folder)
    token = uuid.uuid4().hex
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--ServerApp.port=0",
        "--ServerApp.ip=127.0.0.1",
    ]
    log = folder / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen([*command, f"--IdentityProvider.token={token}"], cwd=folder, stdout=out, stderr=out)
    try:
        for _ in range(600):
            found = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
            if found or process.poll() is not None:
                break
            time.sleep(0.1)
        assert found, log.read_text()
        yield found.group(), token
    finally:
        process.terminate()
        process.wait(30)


def run_cells(url: str, token: str, name: str) -> list[list[dict]]:
    """Open a notebook by the server's API, start its kernel where JupyterLab would, run every code cell; their outputs."""
    headers = {"Authorization": f"token {token}"}
    opened = requests.get(f"{url}/api/contents/notebooks/{name}", headers=headers, timeout=30).json()
    notebook = nbformat.from_dict(opened["content"])
    session = {
        "path": f"notebooks/{name}",
        "type": "notebook",
        "name": name,
        "kernel": {"name": notebook.metadata.kernelspec.name},
    }
    session = requests.post(f"{url}/api/sessions", headers=headers, json=session, timeout=60).json()
    address = f"{url.replace('http', 'ws')}/api/kernels/{session['kernel']['id']}/channels?token={token}"
    channel = websocket.create_connection(address, timeout=180)
    outputs = []
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        header = {
            "msg_id": uuid.uuid4().hex,
            "msg_type": "execute_request",
            "username": "",
            "session": uuid.uuid4().hex,
            "version": "5.3",
        }
        content = {
            "code": cell.source,
            "silent": False,
            "store_history": True,
            "allow_stdin": False,
            "stop_on_error": True,
        }
        channel.send(
            json.dumps({"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"})
        )
        outputs.append([])
        while True:
            message = json.loads(channel.recv())
            if message["parent_header"].get("msg_id") != header["msg_id"]:
                continue
            outputs[-1].append(message)
            if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                break
    channel.close()
    requests.delete(f"{url}/api/sessions/{session['id']}", headers=headers, timeout=30)
    return outputs


@pytest.mark.parametrize("name", READERS)
def test_a_notebook_opens_and_runs(server, name):
    messages = [message for cell in run_cells(*server, name) for message in cell]
    errors = [m["content"] for m in messages if m["msg_type"] == "error"]
    assert not errors, errors
    shown = [m["content"]["data"] for m in messages if m["msg_type"] in ("display_data", "execute_result")]
    assert any("image/png" in data for data in shown), "no picture was shown"
