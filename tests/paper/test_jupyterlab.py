"""JupyterLab's own server opens the notebooks and runs them from `notebooks/`, as a reader does."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import nbformat
import pytest
import requests
import websocket

ROOT = Path(__file__).resolve().parents[2]
READERS = sorted(p.name for p in (ROOT / "notebooks").glob("[23]*.ipynb") if p.name[:2] != "39")  # read only results/
PATIENCE = 600  # s, for one answer: what is slow is no failure


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(url, session) of a JupyterLab server in a copy of the repository that has results but neither data nor runs."""
    folder = tmp_path_factory.mktemp("lab")
    for name in ("cryo_lib", "notebooks", "results"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    shutil.copy(ROOT / "dvc.yaml", folder)
    session = requests.Session()
    session.headers["Authorization"] = f"token {(token := uuid.uuid4().hex)}"
    # Kernels talk through files, not through ports that another process may take first; their paths must be short.
    with tempfile.TemporaryDirectory() as runtime:
        environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
        environment |= {"JUPYTER_RUNTIME_DIR": runtime, "JUPYTER_CONFIG_DIR": runtime, "JUPYTER_TOKEN": token}
        options = ["--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", "--KernelManager.transport=ipc"]
        command = [sys.executable, "-m", "jupyterlab", *options]
        with (folder / "server.log").open("w") as log:
            for _ in range(5):  # the server finds a free port, frees it and takes it: another process may be faster
                process = subprocess.Popen([*command, "--port=0"], cwd=folder, env=environment, stdout=log, stderr=log)
                try:
                    if url := address(process, Path(runtime, f"jpserver-{process.pid}.json"), session):
                        yield url, session
                        return
                finally:
                    process.terminate()
                    process.wait()
    raise AssertionError((folder / "server.log").read_text())


def address(process, card, session):
    """Where the server answers, once it does; None where it ended."""
    end = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < end:
        try:
            url = json.loads(card.read_text())["url"].rstrip("/")
            session.get(f"{url}/api/status", timeout=PATIENCE).raise_for_status()
            return url
        except (FileNotFoundError, ValueError, requests.ConnectionError):
            time.sleep(0.1)


def run_cells(url: str, session: requests.Session, name: str) -> list[dict]:
    """Open a notebook by the server's API, start a kernel where JupyterLab would, run the code cells; the messages."""
    opened = session.get(f"{url}/api/contents/notebooks/{name}", timeout=PATIENCE).json()
    notebook = nbformat.from_dict(opened["content"])
    wanted = {"path": f"notebooks/{name}", "type": "notebook", "name": name}
    wanted["kernel"] = {"name": notebook.metadata.kernelspec.name}
    started = session.post(f"{url}/api/sessions", json=wanted, timeout=PATIENCE).json()
    address = f"{url.replace('http', 'ws')}/api/kernels/{started['kernel']['id']}/channels"
    header = [f"Authorization: {session.headers['Authorization']}"]
    channel = websocket.create_connection(address, header=header, timeout=PATIENCE)
    messages = []
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        header = {"msg_id": uuid.uuid4().hex, "msg_type": "execute_request", "username": "", "version": "5.3"}
        header["session"] = uuid.uuid4().hex
        content = {"code": cell.source, "silent": False, "store_history": True, "allow_stdin": False}
        request = {"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"}
        channel.send(json.dumps(request))
        while True:
            messages.append(message := json.loads(channel.recv()))
            if message["parent_header"].get("msg_id") == header["msg_id"]:
                if message["content"].get("execution_state") == "idle":
                    break
    channel.close()
    session.delete(f"{url}/api/sessions/{started['id']}", timeout=PATIENCE)
    return messages


@pytest.mark.parametrize("name", READERS)
def test_a_notebook_opens_and_runs(server, name):
    messages = run_cells(*server, name)
    errors = [m["content"] for m in messages if m["msg_type"] == "error"]
    assert not errors, errors
    shown = [m["content"]["data"] for m in messages if m["msg_type"] in ("display_data", "execute_result")]
    wanted = "text/markdown" if name.startswith("37_") else "image/png"  # the claims are a table
    assert any(wanted in data for data in shown), f"no {wanted} was shown"
