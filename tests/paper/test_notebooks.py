"""Notebooks run with the parameters they declare and no others; committed ones are clean."""

import ast
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from cryo_lib.paper import notebooks
from cryo_lib.paper.notebooks import NotebookError

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture
def notebook(tmp_path):
    cells = [
        nbformat.v4.new_markdown_cell("# A notebook"),
        nbformat.v4.new_code_cell("n = 1  # a number\nrate = 0.5\nname = 'x'", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("print('n is', n)\n1 / n"),
    ]
    path = tmp_path / "a.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_a_run_injects_parameters_and_streams_output(notebook, capfd):
    out = notebooks.run(notebook, notebook.parent / "deep" / "out.ipynb", {"n": 4})
    assert "n is 4" in capfd.readouterr().out
    assert "0.25" in str(nbformat.read(out, as_version=4).cells[-1].outputs)


@pytest.mark.parametrize("told, threads", [({}, 1), ({"OPENBLAS_NUM_THREADS": "2"}, 2)])
@pytest.mark.parametrize("command", ["run", "script"])
def test_numpy_has_one_thread_in_a_notebook_unless_told_otherwise(command, told, threads, notebook, monkeypatch):
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    book = nbformat.read(notebook, 4)
    ask = "import numpy, threadpoolctl\nprint(threadpoolctl.threadpool_info()[0]['num_threads'], 'threads')"
    book.cells.append(nbformat.v4.new_code_cell(ask))
    nbformat.write(book, notebook)
    words = [sys.executable, "-m", "cryo_lib.paper.notebooks", command, str(notebook)]
    done = subprocess.run(words, cwd=notebook.parent, capture_output=True, text=True)
    assert f"{threads} threads" in done.stdout, done.stderr


def test_a_script_is_the_same_code_in_this_process(notebook, capsys, monkeypatch):
    """With the parameters checked and injected alike, and without papermill."""
    monkeypatch.setitem(sys.modules, "papermill", None)
    names = notebooks.script(notebook, {"n": 5})
    assert names["n"] == 5 and "n is 5" in capsys.readouterr().out
    with pytest.raises(NotebookError, match="unknown parameter 'm'"):
        notebooks.script(notebook, {"m": 5})
    assert notebooks.main(["script", str(notebook), "-p", "n", "6"]) == 0 and "n is 6" in capsys.readouterr().out


def test_a_failing_cell_is_one_line_with_the_way_to_it(notebook, capsys):
    out = notebook.parent / "out.ipynb"
    assert notebooks.main(["run", str(notebook), str(out), "-p", "n", "0"]) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message == f"error: {notebook}: cell 3 failed: ZeroDivisionError: division by zero (executed copy: {out})"
    assert out.is_file()


def said_of(cell, notebook, capsys):
    """The last line of a run of a notebook with one more cell, which fails."""
    book = nbformat.read(notebook, 4)
    book.cells.append(nbformat.v4.new_code_cell(cell))
    nbformat.write(book, notebook)
    assert notebooks.main(["run", str(notebook), str(notebook.parent / "out.ipynb")]) == 1
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_file_that_is_cut_short_asks_for_the_disk(notebook, capsys):
    """NumPy says how much it could not write, and neither where nor why."""
    message = said_of("raise OSError('8 requested and 5 written')", notebook, capsys)
    assert "OSError: 8 requested and 5 written; is the disk full? " in message and "MiB are free here" in message


def test_a_kernel_that_dies_is_one_line_with_the_way_out(notebook, capsys):
    message = said_of("import os\nos.kill(os.getpid(), 9)", notebook, capsys)
    assert message.startswith(f"error: {notebook}: expected its process to live to the end, got one that was killed")


@pytest.mark.parametrize(
    "given, message",
    [
        ({"m": 1}, "a.ipynb: unknown parameter 'm'; it declares n, name, rate"),
        ({"n": "one"}, r"parameter 'n' expects int \(such as 1\), got 'one' \(str\)"),
        ({"rate": "1e-3"}, "parameter 'rate' expects float .* in YAML write 1.0e-3, not 1e-3"),
        ({"n": True}, "expects int"),
        ({"name": None}, r"parameter 'name' expects str \(such as 'x'\), got None"),
    ],
)
def test_unknown_and_mistyped_parameters_are_refused_before_anything_runs(notebook, given, message):
    with pytest.raises(NotebookError, match=message):
        notebooks.run(notebook, notebook.parent / "out.ipynb", given)
    assert not (notebook.parent / "out.ipynb").exists()


@pytest.mark.parametrize(
    "text", ["a #1.star", "a: b.star", "[a].star", "{a}.star", "5", "true", "null", "", "'a'", "*x"]
)
def test_text_on_the_command_line_is_the_text_it_is(notebook, capsys, text):
    cells = nbformat.read(notebook, as_version=4)
    cells.cells[-1].source = "print(repr(name))"
    nbformat.write(cells, notebook)
    assert notebooks.main(["script", str(notebook), "-p", "name", text]) == 0
    assert capsys.readouterr().out.strip() == repr(text)


def test_text_goes_through_papermill_as_it_is(notebook, capfd):
    cells = nbformat.read(notebook, as_version=4)
    cells.cells[-1].source = "print(name)"
    nbformat.write(cells, notebook)
    text = "[a] #1: 'b' {c} \"d\" \\e.star"
    assert notebooks.main(["run", str(notebook), str(notebook.parent / "out.ipynb"), "-p", "name", text]) == 0
    assert text in capfd.readouterr().out


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("rate", "1e-3", 1e-3),
        ("rate", "2", 2.0),
        ("n", "7", 7),
        ("n", "[1", "expected YAML, got"),
        ("n", "1.5", "expects int"),
    ],
)
def test_the_declared_type_reads_the_value(notebook, capsys, name, text, expected):
    code = notebooks.main(["script", str(notebook), "-p", name, text])
    if isinstance(expected, str):
        assert code == 1 and expected in capsys.readouterr().err
    else:
        assert code == 0 and notebooks.value_of(name, text, {"rate": 0.5, "n": 1}[name]) == expected


def test_a_parameter_file_that_is_none_is_named(notebook, capsys):
    path = notebook.parent / "params.yaml"
    command = ["script", str(notebook), "-s", "s", "--params", str(path)]
    for content, said in ((None, "expected the file"), ("s: [", "expected YAML"), ("words", "no section 's'")):
        if content:
            path.write_text(content)
        assert notebooks.main(command) == 1 and said in capsys.readouterr().err


def test_with_a_section_no_parameter_may_be_missing(notebook, capsys):
    params = notebook.parent / "params.yaml"
    params.write_text("s: {n: 1, rate: 0.5}")
    command = ["run", str(notebook), str(notebook.parent / "out.ipynb"), "-s", "s", "--params", str(params)]
    assert notebooks.main(command) == 1
    assert "a.ipynb: expected all of its parameters, name not given" in capsys.readouterr().err
    assert notebooks.main([*command, "-p", "name", "y"]) == 0


def test_an_integer_serves_for_a_float(notebook):
    notebooks.check_parameters("a", {"rate": 0.5}, {"rate": 1})


def test_sections_are_found_or_named():
    params = {"study": {"table1": {"seeds": [0]}}, "scale": "ci"}
    assert notebooks.section(params, "study.table1") == {"seeds": [0]}
    with pytest.raises(NotebookError, match="no section 'study.table2'; there are study, scale"):
        notebooks.section(params, "study.table2")
    with pytest.raises(NotebookError, match="'scale' is a value, expected a section"):
        notebooks.section(params, "scale")


def test_a_notebook_that_is_not_there_is_named(tmp_path):
    with pytest.raises(NotebookError, match="b.ipynb: no such notebook"):
        notebooks.run(tmp_path / "b.ipynb", tmp_path / "out.ipynb", {})


def test_export_holds_code_only_and_that_of_the_library_below_it(notebook):
    (exported,) = notebooks.export(notebook.parent, notebook.parent / "build")
    before = exported.read_text()
    assert "print('n is', n)" in before and "A notebook" not in before and "a number" not in before


def test_a_notebook_is_found_by_its_number_and_its_copy_has_the_scale(notebook, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert notebooks.find("20") == Path("notebooks/20_make_table1.ipynb")
    assert notebooks.executed(notebooks.find("20"), {"scale": "ci"}) == Path("executed/ci/20_make_table1.ipynb")
    assert notebooks.executed(notebook, {}) == Path("executed/a.ipynb")
    with pytest.raises(NotebookError, match="expected one notebooks/99_.*, found 0; there are 00_prepare_structures, "):
        notebooks.find("99")


def test_the_list_tells_of_every_notebook_what_it_makes_and_costs():
    text = notebooks.listing(ROOT / "notebooks")
    for path in COMMITTED:
        assert f"{path.stem[:2]} · " in text
    assert text.count("     makes ") == text.count("     costs ") == len(COMMITTED)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: p.stem)
def test_a_committed_notebook_keeps_the_house_rules(path):
    """No outputs; prose first; parameters with comments, then the root; no `def`; at most 15 code cells of 20 lines."""
    notebook = nbformat.read(path, as_version=4)
    assert path.read_text() == nbformat.writes(notebook) + "\n" and set(notebook.metadata) == {
        "kernelspec",
        "language_info",
    }
    for cell in notebook.cells:
        clean = set(cell.metadata) <= {"tags"} and not cell.get("outputs") and cell.get("execution_count") is None
        assert clean, f"{path.name} has outputs or editor metadata: make strip"
    cells = notebook.cells
    code = [c for c in cells if c.cell_type == "code"]
    assert cells[0].cell_type == "markdown" and "**Makes**" in cells[0].source and "**Costs**" in cells[0].source
    assert code[0] is cells[1] and code[0].metadata["tags"] == ["parameters"] and "enter_root()" in code[1].source
    lines = code[0].source.splitlines()
    for node in ast.parse(code[0].source).body:
        statement = lines[node.lineno - 1 : node.end_lineno]
        assert any("  # " in line for line in statement), f"a parameter without a comment: {statement[0]}"
    shown = code[1].source.splitlines()[-1] == "enter_root()"
    assert not shown, "a cell that ends with enter_root() displays this machine's folder: end it with a semicolon"
    assert len(code) <= 15
    for cell in code[1:]:
        assert len(cell.source.splitlines()) <= 20, cell.source
    for cell in code:
        assert not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.walk(ast.parse(cell.source)))
    assert any("We differ" in c.source for c in cells) or "01_" in path.name
    assert notebooks.declared(nbformat.read(path, as_version=4), path.name).get("scale", "laptop") == "laptop"


def test_what_cannot_be_published_is_said_in_a_line(tmp_path):
    """As every refusal of the command is; `book` says what it refuses."""
    cell = nbformat.v4.new_code_cell("1")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "a.ipynb")
    with pytest.raises(NotebookError, match="a.ipynb, code cell 1: expected an executed cell"):
        notebooks.publish(tmp_path / "a.ipynb")
