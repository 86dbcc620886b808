"""Published notebooks are the same for the same results; the book made of them shows its figures without a network."""

import base64
import io
import json
import shutil
import subprocess
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from cryo_lib.paper import book, notebooks
from cryo_lib.paper.book import BookError

ROOT = Path(__file__).resolve().parents[2]
SCALES = sorted(path for path in ROOT.glob("paper/*") if path.is_dir())
CODE = (
    "n = 1  # a number, µ\nname = 'x'  # a name\nrate = 1.0e-3  # kept\nboth = [\n    1,\n    2,\n]  # two lines",
    "import time\nimport matplotlib.pyplot as plt\nimport pandas as pd\nfrom tqdm.auto import tqdm\n"
    "print(f'[1/2, {time.time()} s]', flush=True)\nfor _ in tqdm(range(2)):\n    pass",
    "figure, axis = plt.subplots()\naxis.plot(range(n))\naxis.legend(['$5'])",
    "pd.DataFrame({'a': [n, 2]})",
)


def notebook(*cells, name="20 · What $\\lambda_1$ is"):
    text = f"# {name}\n\n$$\\hat v = \\arg\\min_v \\lVert A_i v\\rVert^2 < 1$$\n\n`$5` is `a_b_c`, and $x_1$ and $x_2$."
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text), *cells])


def shown(*data):
    """A code cell that displayed all of this."""
    outputs = [nbformat.v4.new_output("display_data", d) for d in data]
    return nbformat.v4.new_code_cell("f()", outputs=outputs, execution_count=7)


def png(pixels):
    Image.fromarray(np.asarray(pixels, np.uint8)).save(buffer := io.BytesIO(), "png")
    return {"image/png": base64.b64encode(buffer.getvalue()).decode()}


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB"))


@pytest.fixture(scope="module")
def executions(tmp_path_factory):
    """One notebook with a figure, a table, times and a progress bar, executed twice by papermill."""
    folder = tmp_path_factory.mktemp("executions")
    cells = [nbformat.v4.new_code_cell(source) for source in CODE]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(notebook(*cells), folder / "source.ipynb")
    given = {"n": 4, "name": "y", "both": [3], "rate": 0.001}
    return [notebooks.run(folder / "source.ipynb", folder / f"{i}.ipynb", given) for i in range(2)]


def test_the_same_results_are_the_same_file(executions, tmp_path):
    one, two = (book.publish(path, tmp_path / path.name).read_bytes() for path in executions)
    assert one == two and executions[0].read_bytes() != executions[1].read_bytes()
    assert book.publish(tmp_path / "0.ipynb", tmp_path / "again.ipynb").read_bytes() == one


def test_what_a_reader_sees_is_kept_and_what_the_machine_did_is_not(executions, tmp_path):
    before, after = (nbformat.read(p, 4) for p in (executions[0], book.publish(executions[0], tmp_path / "a.ipynb")))
    nbformat.validate(after)
    parameters, setup, figure, table = after.cells[1:]
    expected = 'n = 4  # a number, µ\nname = "y"  # a name\nrate = 1.0e-3  # kept\nboth = [3]  # two lines'
    assert parameters.source == expected
    assert [cell.source for cell in after.cells[2:]] == list(CODE[1:])
    assert [cell.execution_count for cell in after.cells[1:]] == [1, 2, 3, 4] and table.outputs[0].execution_count == 4
    assert not setup.outputs and "<td>4</td>" in table.outputs[0].data["text/html"]
    text = "".join(line for line in (tmp_path / "a.ipynb").read_text().splitlines() if "image/png" not in line)
    for word in ("papermill", "iopub", " at 0x", "duration", '"version"', "widget", "1/2, 1"):
        assert word not in text
    drawn = [o.data for cell in before.cells[1:] for o in cell.outputs if "image/png" in o.get("data", {})]
    kept = [o.data for o in figure.outputs if "image/png" in o.data]
    assert len(kept) == len(drawn) == 1 and np.array_equal(pixels(kept[0]), pixels(drawn[0]))
    assert b"Software" in base64.b64decode(drawn[0]["image/png"])
    assert b"Software" not in base64.b64decode(kept[0]["image/png"])


def test_only_pictures_that_do_not_fit_lose_colours(tmp_path):
    """The largest does; the file then fits."""
    random = np.random.default_rng(0)
    large, small = (random.integers(0, 256, (size, size, 3)) for size in (260, 100))
    nbformat.write(notebook(shown(png(small)), shown(png(large))), tmp_path / "a.ipynb")
    out = book.publish(tmp_path / "a.ipynb", tmp_path / "b.ipynb")
    first, second = (pixels(cell.outputs[0].data) for cell in nbformat.read(out, 4).cells[1:])
    assert book.LIMIT / 2 < out.stat().st_size <= book.LIMIT
    assert np.array_equal(first, small) and 64 <= len(np.unique(second.reshape(-1, 3), axis=0)) <= 256


def test_pictures_that_do_not_fit_in_few_colours_become_smaller(tmp_path, monkeypatch):
    """What a network that has not learnt draws is noise, which no palette makes small: its notebook is published."""
    monkeypatch.setattr(book, "LIMIT", 20_000)
    random = np.random.default_rng(0)
    large, small = random.integers(0, 256, (300, 200, 3)), random.integers(0, 256, (20, 30, 3))
    nbformat.write(notebook(shown(png(small)), shown(png(large))), tmp_path / "a.ipynb")
    out = book.publish(tmp_path / "a.ipynb", tmp_path / "b.ipynb")
    first, second = (pixels(cell.outputs[0].data) for cell in nbformat.read(out, 4).cells[1:])
    assert out.stat().st_size <= book.LIMIT and first.shape == small.shape
    assert second.shape[:2] in [(225, 150), (150, 100), (75, 50)]
    assert book.publish(out, tmp_path / "c.ipynb").read_bytes() == out.read_bytes()


def test_no_picture_becomes_smaller_while_another_has_colours_to_lose(tmp_path, monkeypatch):
    monkeypatch.setattr(book, "LIMIT", 20_000)
    random, shapes = np.random.default_rng(0), [(110, 156, 3), (80, 100, 3)]  # they fit in 16 colours, of both
    nbformat.write(notebook(*(shown(png(random.integers(0, 256, shape))) for shape in shapes)), tmp_path / "a.ipynb")
    out = book.publish(tmp_path / "a.ipynb", tmp_path / "b.ipynb")
    assert [pixels(cell.outputs[0].data).shape for cell in nbformat.read(out, 4).cells[1:]] == shapes
    assert book.publish(out, tmp_path / "c.ipynb").read_bytes() == out.read_bytes()


def test_pictures_that_do_not_fit_at_all_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(book, "LIMIT", 20_000)
    picture = png(np.random.default_rng(0).integers(0, 256, (800, 800, 3)))
    nbformat.write(notebook(shown(picture)), tmp_path / "a.ipynb")
    with pytest.raises(BookError, match=r"a.ipynb: expected at most 20000 bytes, got \d+ more .*code cell 1: \d+"):
        book.publish(tmp_path / "a.ipynb", tmp_path / "c.ipynb")
    assert not (tmp_path / "c.ipynb").exists()


FAILED = [nbformat.v4.new_output("error", ename="E", evalue="no")]


@pytest.mark.parametrize(
    "cell, message",
    [
        (nbformat.v4.new_code_cell("1"), "code cell 1: expected an executed cell"),
        (shown({"image/jpeg": "", "text/plain": ""}), "code cell 1: expected image/png, .* got image/jpeg"),
        (nbformat.v4.new_code_cell("1/0", execution_count=1, outputs=FAILED), "code cell 1: E: no"),
        (shown({"text/plain": repr(Path.cwd())}), "code cell 1: expected no folder of this machine, got /"),
        (shown({"text/plain": "x" * 300_000}), "expected at most 200000 bytes, got 10.* more .*no picture"),
    ],
)
def test_what_cannot_be_published_is_refused(cell, message, tmp_path):
    nbformat.write(notebook(cell), tmp_path / "a.ipynb")
    with pytest.raises(BookError, match=message):
        book.publish(tmp_path / "a.ipynb", tmp_path / "b.ipynb")


@pytest.fixture(scope="module")
def small(executions, tmp_path_factory):
    """A book of two notebooks, and the folder of these."""
    folder = tmp_path_factory.mktemp("paper") / "ci"
    book.publish(executions[0], folder / "20_first.ipynb")
    nbformat.write(notebook(shown(png(np.zeros((9, 9)))), name="21 · Two"), folder / "21_second-study.ipynb")
    return folder, book.build(folder, folder.parent / "book", ROOT / "CITATION.cff").parent


def test_a_book_is_read_in_order(small):
    _, out = small
    index, first, second = (path.read_text() for path in (out / "index.html", *sorted(out.glob("2*.html"))))
    assert "Hanlin Gu" in index and index.index('"20_first.html"') < index.index('"21_second-study.html"')
    assert 'href="21_second-study.html"' in first and 'href="20_first.html"' in second and "21 · Two · study" in index
    assert "<code>$5</code>" in first and "$x" not in first and "tqdm" in first and "n</span>" in first


def test_a_book_that_cannot_be_made_says_why(tmp_path):
    with pytest.raises(BookError, match="expected executed notebooks, found none; `make repro`"):
        book.build(tmp_path, tmp_path / "book", ROOT / "CITATION.cff")
    nbformat.write(notebook(nbformat.v4.new_markdown_cell(r"$\nosuch x$")), tmp_path / "20_a.ipynb")
    with pytest.raises(BookError, match=r"formula '\\\\nosuch x': .* got \\nosuch"):
        book.build(tmp_path, tmp_path / "book", ROOT / "CITATION.cff")


class Browser:
    """Headless Chromium that finds no host, spoken to over pipes."""

    def __init__(self, profile):
        program = shutil.which("chromium") or shutil.which("google-chrome")
        if not program:
            pytest.skip("no Chromium: apt-get install chromium")
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
        command = [program, *options, f"--user-data-dir={profile}", "--host-resolver-rules=MAP * ~NOTFOUND"]
        pipes = ["sh", "-c", 'exec "$@" 3<&0 4>&1 >/dev/null', "sh"]
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([*pipes, *command], **streams)
        self.session, self.events = {}, []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        self("Network.enable"), self("Page.enable")

    def _message(self):
        message = bytearray()
        while (byte := self.process.stdout.read(1)) != b"\0":
            assert byte, f"Chromium ended: {self.process.wait()}"
            message += byte
        return json.loads(message)

    def __call__(self, method, **parameters):
        request = {"id": 1, "method": method, "params": parameters} | self.session
        self.process.stdin.write(json.dumps(request).encode() + b"\0")
        self.process.stdin.flush()
        while "id" not in (answer := self._message()):
            self.events.append(answer)
        return answer["result"]

    def open(self, page):
        """What a page asked for, its images' and formulas' widths, and that of its text."""
        self.events.clear()
        self("Page.navigate", url=page.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message())
        asked = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        script = """[[...document.images].map(i => [i.naturalWidth, i.width]),
            [...document.querySelectorAll('math')].map(m => m.getBoundingClientRect().width),
            document.querySelector('main').clientWidth]"""
        return asked, *self("Runtime.evaluate", expression=script, returnByValue=True)["result"]["value"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.process.terminate()
    browser.process.wait()


def assert_is_seen(browser, folder, out):
    """Every page shows every picture of its notebook, no wider than the page, and asks for nothing but itself."""
    for path in sorted(folder.glob("*.ipynb")):
        drawn = path.read_text().count('"image/png": ')
        asked, images, formulas, width = browser.open(out / f"{path.stem}.html")
        assert len(images) == drawn and all(0 < natural and 0 < seen <= width for natural, seen in images), path
        assert all(formula > 0 for formula in formulas), path
        assert all(url.startswith(("file:", "data:")) for url in asked), asked
    _, images, *_ = browser.open(out / "index.html")
    assert images and all(natural > 0 for natural, _ in images)


def test_chromium_shows_a_book(browser, small):
    assert_is_seen(browser, *small)
    assert len(browser.open(small[1] / "20_first.html")[2]) == 4


def test_chromium_would_notice_a_picture_from_elsewhere(browser, tmp_path):
    (tmp_path / "a.html").write_text('<main><img src="https://example.org/a.png"></main>')
    asked, images, *_ = browser.open(tmp_path / "a.html")
    assert images[0][0] == 0 and "https://example.org/a.png" in asked


@pytest.mark.parametrize("folder", SCALES, ids=lambda path: path.name)
def test_the_paper_as_committed_is_seen(browser, folder, tmp_path):
    assert_is_seen(browser, folder, book.build(folder, tmp_path, ROOT / "CITATION.cff").parent)


@pytest.mark.parametrize("path", [p for s in SCALES for p in sorted(s.glob("*.ipynb"))], ids=lambda p: p.stem)
def test_a_committed_notebook_is_small_and_as_it_was_published(path, tmp_path):
    assert path.stat().st_size <= book.LIMIT
    assert book.publish(path, tmp_path / path.name).read_bytes() == path.read_bytes()
