"""Notebooks as stages of the pipeline and as commands: `cryo list`, `cryo run 11 -p particles my.star`."""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import re
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

import nbformat
import yaml

from cryo_lib.files import closure, write_text

PATIENCE = 300  # s, with a kernel that starts, or sends what a cell showed, on a machine that is busy
# A thread that waits must not spin on a core that others need; several of NumPy's round otherwise and, beside another
# busy process, take ten times as long.
THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_NUM_THREADS": "1"}


class NotebookError(RuntimeError):
    """A notebook was given wrong parameters, or one of its cells failed."""


def declared(notebook: nbformat.NotebookNode, name: str) -> dict[str, Any]:
    """The parameters of the one cell tagged `parameters`, with their defaults."""
    cells = [c for c in notebook.cells if c.cell_type == "code" and "parameters" in c.metadata.get("tags", [])]
    if len(cells) != 1:
        raise NotebookError(f"{name}: expected one code cell tagged `parameters`, found {len(cells)}")
    assignments = [node for node in ast.parse(cells[0].source).body if isinstance(node, ast.Assign)]
    return {node.targets[0].id: ast.literal_eval(node.value) for node in assignments}


def check_parameters(name: str, known: dict[str, Any], given: dict[str, Any], complete: bool = False) -> None:
    """Raise NotebookError for a parameter that the notebook does not declare, or of another type than its default.

    With `complete` also for one that is not given: a parameter file that lacks a key must not fall back on a default.
    """
    if complete and (missing := ", ".join(sorted(set(known) - set(given)))):
        raise NotebookError(f"{name}: expected all of its parameters, {missing} not given; add to section, or use -p")
    for key, value in given.items():
        if key not in known:
            raise NotebookError(f"{name}: unknown parameter {key!r}; it declares {', '.join(sorted(known))}")
        default = known[key]
        number = type(default) is float and type(value) is int
        if default is not None and type(value) is not type(default) and not number:
            raise NotebookError(
                f"{name}: parameter {key!r} expects {type(default).__name__} (such as {default!r}), "
                f"got {value!r} ({type(value).__name__}); in YAML write 1.0e-3, not 1e-3"
            )


def value_of(name: str, text: str, default: Any) -> Any:
    """A parameter from the command line, read by the type of its default: text as it is, the rest as YAML.

    A number may be written as 1e-3 here. NotebookError for what is not YAML.
    """
    if isinstance(default, str):
        return text
    if isinstance(default, float):
        with contextlib.suppress(ValueError):
            return float(text)
    return _yaml(f"parameter {name!r}", text)


def _file(path: str) -> Any:
    """What a parameter file holds."""
    if not Path(path).is_file():
        raise NotebookError(f"parameters: expected the file {path}, found nothing; start in the repository's root")
    return _yaml(path, Path(path).read_bytes())


def _yaml(name: str, text: str | bytes) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = " ".join(str(error).split())
        raise NotebookError(f"{name}: expected YAML, got {text[:60]!r} ({where}); quote or correct it") from error


def section(params: dict[str, Any], dotted: str) -> dict[str, Any]:
    """The mapping at a dotted name such as `study.table1`."""
    value: Any = params
    for part in dotted.split("."):
        if not isinstance(value, dict) or part not in value:
            raise NotebookError(f"parameters: no section {dotted!r}; there are {', '.join(params)}")
        value = value[part]
    if not isinstance(value, dict):
        raise NotebookError(f"parameters: {dotted!r} is a value, expected a section")
    return value


def _read(path: Path, parameters: dict[str, Any], complete: bool) -> nbformat.NotebookNode:
    """A notebook that takes these parameters; NotebookError where there is none or it does not."""
    if not path.is_file():
        there = ", ".join(map(str, sorted(path.parent.glob("*.ipynb"))))
        raise NotebookError(f"{path}: no such notebook; there are {there}")
    try:
        notebook = nbformat.read(path, as_version=4)
    except (ValueError, AttributeError, nbformat.ValidationError) as error:
        raise NotebookError(
            f"{path}: expected a Jupyter notebook, got another file ({error}); check the path"
        ) from error
    check_parameters(path.name, declared(notebook, path.name), parameters, complete)
    return notebook


def run(notebook: str | Path, out: str | Path | None, parameters: dict[str, Any], complete: bool = False) -> Path:
    """Execute `notebook` with papermill and `parameters`, streaming what it prints; the executed copy goes to `out`.

    `out` None is as `executed` says; `complete` as in `check_parameters`. Of several processes that torchrun started,
    each executes it, and their kernels work together where the library does; the copies of all but the first have their
    number in their names.

    Raises
    ------
    NotebookError : no such notebook, a parameter that is unknown or of the wrong type, or a cell that failed.
    """
    from cryo_lib.paper.kernels import started

    notebook = Path(notebook)
    _read(notebook, parameters, complete)
    out = Path(out or executed(notebook, parameters))
    _set_threads()
    if rank := int(os.environ.get("RANK", 0)):
        out = out.with_stem(f"{out.stem}.{rank}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with started("--IPKernelApp.log_level=CRITICAL") as kernel:
        _execute(notebook, out, parameters, kernel)
    return out


def _execute(notebook: Path, out: Path, parameters: dict[str, Any], kernel: Any) -> None:
    """Execute a notebook in a kernel that is started; NotebookError where that fails."""
    import papermill  # a second, in which the kernel gets ready
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    given = {"km": kernel, "kernel_name": "python3", "language": "python", "start_timeout": PATIENCE}
    given |= {"iopub_timeout": PATIENCE, "raise_on_iopub_timeout": True}  # else what comes late is left out
    streams = {"log_output": True, "stdout_file": sys.stdout, "stderr_file": sys.stderr, "progress_bar": False}
    try:
        papermill.execute_notebook(notebook, out, parameters, **given, **streams)
    except PapermillExecutionError as error:
        what = f"cell {error.exec_count} failed: {error.ename}: {error.evalue}"
        if re.fullmatch(r"\d+ requested and \d+ written", error.evalue):  # NumPy's words for a file that is cut short
            what += f"; is the disk full? {shutil.disk_usage('.').free >> 20} MiB are free here"
        raise NotebookError(f"{notebook}: {what} (executed copy: {out})") from error
    except (CellTimeoutError, DeadKernelError) as error:
        what = "expected its process to live to the end, got one that was killed or does not answer"
        raise NotebookError(
            f"{notebook}: {what}; free memory for it, and run it again (executed copy: {out})"
        ) from error


def _set_threads() -> None:
    """Tell kernels, and this process where it has not loaded NumPy yet, how threads work, unless the user has."""
    for name, value in THREADS.items():
        os.environ.setdefault(name, value)


def script(notebook: str | Path, parameters: dict[str, Any], complete: bool = False) -> dict[str, Any]:
    """Execute a notebook's code in this process, without papermill and Jupyter; the names it leaves.

    `complete` as in `check_parameters`, which says what is raised; so is whatever a cell raises.
    """
    _set_threads()
    notebook, names = Path(notebook), {"__name__": "__main__"}
    cells = [cell for cell in _read(notebook, parameters, complete).cells if cell.cell_type == "code"]
    for i, cell in enumerate(cells, 1):
        exec(compile(cell.source, f"{notebook.name}, code cell {i}", "exec"), names)
        if "parameters" in cell.metadata.get("tags", []):
            names |= parameters
    return names


def export(notebooks: str | Path = "notebooks", build: str | Path = "build/nbsrc") -> list[Path]:
    """Write `build/<name>.py` of each notebook, its code and the library's below it: what a stage depends on."""
    written = []
    for path in sorted(Path(notebooks).glob("*.ipynb")):
        cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        written.append(write_text(Path(build, f"{path.stem}.py"), closure("\n\n".join(cells))))
    return written


def find(name: str, folder: str | Path = "notebooks") -> Path:
    """The notebook of a number such as "11", or the path that is given; NotebookError for no such number."""
    if not re.fullmatch(r"\d\d", name):
        return Path(name)
    found = sorted(Path(folder).glob(f"{name}_*.ipynb"))
    if len(found) != 1:
        there = ", ".join(path.stem for path in sorted(Path(folder).glob("*.ipynb")))
        problem = f"expected one {folder}/{name}_*.ipynb, found {len(found)}"
        raise NotebookError(f"notebook: {problem}; there are {there or 'none; start in the root of the repository'}")
    return found[0]


def executed(notebook: Path, parameters: dict[str, Any]) -> Path:
    """Where the executed copy of a notebook goes: executed/, below that the scale where it has one."""
    known = declared(nbformat.read(notebook, as_version=4), notebook.name)
    return Path("executed", str(({"scale": ""} | known | parameters)["scale"]), notebook.name)


def publish(copy: Path) -> Path:
    """Write an executed copy as it is committed, `executed/...` to `paper/...`; NotebookError as `book.publish`."""
    from cryo_lib.paper import book  # its libraries are not where trainings alone run

    try:
        return book.publish(copy, Path("paper", *copy.parts[1:]))
    except book.BookError as error:
        raise NotebookError(str(error)) from error


def listing(folder: str | Path = "notebooks") -> str:
    """The notebooks: number and title, what each makes, what it costs; from their first cells."""
    lines = []
    for path in sorted(Path(folder).glob("*.ipynb")):
        title, *paragraphs = nbformat.read(path, as_version=4).cells[0].source.split("\n\n")
        lines.append(title.lstrip("# "))
        for word in ("Makes", "Costs"):
            text = next((p for p in paragraphs if p.startswith(f"**{word}**")), "").removeprefix(f"**{word}**").strip()
            lines += textwrap.wrap(f"{word.lower()} {text}", 118, initial_indent="     ", subsequent_indent="       ")
    return "\n".join(lines)


def report(scale: str) -> str:
    """What a scale's last run cost, stage by stage, and where its results are, as text to print."""
    lines, total = [f"\nStages of the scale {scale!r}, as last run:"], 0.0
    for path in sorted(Path("executed", scale).glob("*.ipynb")):
        seconds = nbformat.read(path, as_version=4).metadata.get("papermill", {}).get("duration") or 0.0
        total += seconds
        lines.append(f"  {path.stem:42s} {seconds:7.1f} s")
    lines.append(f"  {'together':42s} {total / 60:7.1f} min")
    places = {"tables": f"results/{scale}", "figures": f"figures/{scale}"}
    places |= {"RELION's stacks": f"denoised/{scale}", "denoised particles": f"denoised_particles/{scale}"}
    places |= {"maps": f"maps/{scale}", "executed notebooks": f"executed/{scale}"}
    return "\n".join([*lines, *(f"{name:18s} {folder}/" for name, folder in places.items())])


def main(arguments: list[str] | None = None) -> int:
    """The command line `cryo`; 0 when all went well."""
    parser = argparse.ArgumentParser(prog="cryo", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("run", "execute a notebook with checked parameters"), ("script", "the same, without Jupyter")):
        command = commands.add_parser(name, help=what)
        command.add_argument("notebook", help="its number, such as 11, or its path")
        if name == "run":
            command.add_argument("out", nargs="?", help="the executed copy; default: executed/[<scale>/]<its name>")
            command.add_argument("--publish", action="store_true", help="write it to paper/ too, as it is committed")
        often = {"action": "append", "default": []}
        command.add_argument(
            "-p", nargs=2, metavar=("NAME", "VALUE"), help="VALUE as it is for text, else as YAML", **often
        )
        what = "all parameters of a section, or the parameter that has its name; then none may be missing"
        command.add_argument("-s", metavar="SECTION", help=what, **often)
        command.add_argument("--params", default="params.yaml", help="the parameter file that sections are read from")
    commands.add_parser("list", help="the notebooks: what they make and cost")
    commands.add_parser("export", help="write each notebook's code, and the library's below it, to build/nbsrc")
    command = commands.add_parser("report", help="print the cost of each stage and where the results are")
    command.add_argument("--params", default="params.yaml", help="the parameter file that names the scale")
    options = parser.parse_args(arguments)
    try:
        if options.command in ("run", "script"):
            notebook, parameters = find(options.notebook), {}
            known = declared(_read(notebook, {}, False), notebook.name)
            for name in options.s:
                found = section(_file(options.params), name)
                parameters |= {name: found} if name in known else found
            parameters |= {name: value_of(name, text, known.get(name)) for name, text in options.p}
            if options.command == "script":
                script(notebook, parameters, complete=bool(options.s))
                return 0
            out = run(notebook, options.out, parameters, complete=bool(options.s))
            if options.publish:
                publish(out)
        elif options.command == "list":
            print(listing())
        elif options.command == "export":
            export()
        else:
            print(report(_file(options.params)["scale"]))
    except (NotebookError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
