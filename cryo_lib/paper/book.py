"""The paper as it is seen: executed notebooks as they are committed in `paper/<scale>/`, and one static site of them.

python -m cryo_lib.paper.book [paper/<scale>] [build/book]     the scale of params.yaml where none is given
"""

from __future__ import annotations

import ast
import base64
import io
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import yaml
from PIL import Image

from cryo_lib.files import enter_root, write_text

LIMIT = 200_000  # bytes of a published notebook
# Colours, and share of its width and height, of a picture that does not fit as it is, from most to least.
POORER = (*((colours, 1.0) for colours in (256, 128, 64, 32, 16)), (16, 0.75), (16, 0.5), (16, 0.25))
PNG, WIDGET = "image/png", "application/vnd.jupyter.widget-view+json"
KINDS = {PNG, "text/html", "text/latex", "text/markdown", "text/plain"}


class BookError(RuntimeError):
    """A notebook cannot be published as it is, or there is none to make a book of."""


def publish(executed: str | Path, out: str | Path) -> Path:
    """Write an executed notebook as it is committed: the same bytes for the same code and results.

    What a cell displays is kept, what it prints is not: a line of progress tells of the machine, not of the paper, so
    a notebook displays what a reader must see. Times, counters, ids, addresses, versions and widgets (progress bars,
    sliders) go. Injected parameters go into the cell tagged `parameters`. Pictures lose colours, and then size, the
    largest first, until the file has at most LIMIT bytes.

    Raises
    ------
    BookError : a cell that failed or was not executed, an output of an unknown type or with the path of the folder that
        this runs in, or pictures that do not fit.
    """
    notebook, pictures, count = nbformat.read(executed, as_version=4), [], 0
    notebook.cells, notebook.nbformat_minor = _folded(notebook.cells), 5
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i:02d}"
        cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
        if cell.cell_type != "code":
            continue
        count, where = count + 1, f"{executed}, code cell {count + 1}"
        if cell.execution_count is None:
            raise BookError(f"{where}: expected an executed cell, got one that is not; run the notebook first")
        cell.execution_count = count
        cell.outputs = [o for o in cell.outputs if o.output_type != "stream" and WIDGET not in o.get("data", ())]
        for output in cell.outputs:
            if output.output_type == "error":
                raise BookError(f"{where}: {output.ename}: {output.evalue}; mend the notebook and run it again")
            if unknown := set(output.data) - KINDS:
                raise BookError(f"{where}: expected {', '.join(sorted(KINDS))}, got {', '.join(sorted(unknown))}")
            output.metadata = {}
            if output.output_type == "execute_result":
                output.execution_count = count
            for kind in set(output.data) - {PNG}:
                if (here := str(Path.cwd())) in output.data[kind]:
                    raise BookError(f"{where}: expected no folder of this machine, got {here}; do not display it")
                output.data[kind] = re.sub(r" at 0x[0-9a-f]+", "", output.data[kind])
            if PNG in output.data:
                image = _image(output.data[PNG])
                pictures.append((where, output.data, image, list(POORER)))
                output.data[PNG] = _encoded(image)
    while (excess := len(nbformat.writes(notebook).encode()) + 1 - LIMIT) > 0:
        left = (p for p in pictures if p[3])  # colours of all go before the size of any, and the largest is the next
        *_, data, image, poorer = max(left, key=lambda p: (p[3][0][1] == 1, len(p[1][PNG])), default=[None] * 3)
        if not poorer:
            sizes = "; ".join(f"{where}: {len(data[PNG])}" for where, data, *_ in pictures) or "no picture"
            raise BookError(
                f"{executed}: expected at most {LIMIT} bytes, got {excess} more with the pictures as poor as they get "
                f"({sizes}); draw fewer or smaller pictures, or show less of a table"
            )
        data[PNG] = _encoded(image, *poorer.pop(0))
    nbformat.validate(notebook)
    return write_text(out, nbformat.writes(notebook) + "\n")


def _folded(cells: list[Any]) -> list[Any]:
    """The cells but those that papermill injected; where they differ their values go to the parameters' cell."""
    given = {}
    for cell in (cell for cell in cells if "injected-parameters" in cell.metadata.get("tags", [])):
        statements = ast.parse(cell.source).body
        given |= {node.targets[0].id: ast.get_source_segment(cell.source, node.value) for node in statements}
    for cell in (cell for cell in cells if "parameters" in cell.metadata.get("tags", [])):
        lines = cell.source.splitlines()
        for node in reversed([node for node in ast.parse(cell.source).body if isinstance(node, ast.Assign)]):
            name, comment = node.targets[0].id, lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
            if name in given and ast.unparse(ast.parse(given[name])) != ast.unparse(node.value):
                lines[node.lineno - 1 : node.end_lineno] = [f"{name} = {given[name]}{comment}"]
        cell.source = "\n".join(lines)
    return [cell for cell in cells if "injected-parameters" not in cell.metadata.get("tags", [])]


def _image(png: str) -> Image.Image:
    """The picture of a PNG in base64, on white where it is transparent."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _encoded(image: Image.Image, colours: int | None = None, share: float = 1.0) -> str:
    """A picture as PNG in base64, pixels and nothing else: in all of its colours, as a palette where they are few."""
    if share < 1:
        image = image.resize([max(1, round(share * n)) for n in image.size], Image.Resampling.LANCZOS)
    if colours:
        image = image.quantize(colours, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).convert("RGB")
    if image.getcolors(256):
        palette, index = np.unique(np.asarray(image) @ np.array([1 << 16, 1 << 8, 1]), return_inverse=True)
        image = Image.fromarray(index.astype(np.uint8).reshape(image.size[::-1]))
        image.putpalette(palette.astype(">u4").view(np.uint8).reshape(-1, 4)[:, 1:].tobytes())
    image.save(png := io.BytesIO(), "png", optimize=True)
    return base64.b64encode(png.getvalue()).decode()


def build(published: str | Path, out: str | Path, citation: str | Path = "CITATION.cff") -> Path:
    """Write one static site of the notebooks in a folder such as `paper/laptop` to `out`; the path of its first page.

    Pages need no server and no network. `citation` holds the title and the reference. BookError where there is no
    notebook, or a formula that cannot be drawn.
    """
    from jinja2 import DictLoader  # what only the site needs
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter

    published, out = Path(published), Path(out)
    notebooks = {path.stem: nbformat.read(path, as_version=4) for path in sorted(published.glob("*.ipynb"))}
    if not notebooks:
        raise BookError(f"{published}: expected executed notebooks, found none; `make repro` writes them")
    page = Path(__file__).with_suffix(".html.j2").read_text(encoding="utf-8")
    exporter = HTMLExporter(extra_loaders=[DictLoader({"page": page})], template_name="basic", template_file="page")
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    exporter.register_filter("markdown2html", _html)
    paper = yaml.safe_load(Path(citation).read_text(encoding="utf-8"))["preferred-citation"]
    authors = ", ".join(f"{author['given-names']} {author['family-names']}" for author in paper["authors"])
    index = f"""# {paper["title"]}
{authors} ({paper["year"]}), [doi:{paper["doi"]}](https://doi.org/{paper["doi"]}).

Every table and figure as computed at the scale `{published.name}`, a page each: what the paper claims, what we find,
where we differ and why, and the code.

| | |
|---|---|
"""
    titles: dict[str | None, str] = {"index": "Contents"}
    for name, notebook in notebooks.items():  # a heading, and what a name has after its words, such as a study
        heading = re.search(r"^# (.+)$", notebook.cells[0].source, re.MULTILINE)
        titles[name] = " · ".join([heading[1] if heading else name, *name.split("-")[1:]])
        index += f"| [{_thumbnail(notebook)}]({name}.html) | [{titles[name]}]({name}.html) |\n"
    pages = {"index": nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(index)])} | notebooks
    for old in out.glob("*.html"):
        old.unlink()
    names = [None, *pages, None]
    for before, name, after in zip(names, names[1:], names[2:]):
        title, links = titles[name], [(before, f"← {titles.get(before)}"), (after, f"{titles.get(after)} →")]
        plain = re.sub(r"[$\\{}`*]", "", title)
        for cell in pages[name].cells:
            cell.metadata["alt"] = plain
        style = HtmlFormatter().get_style_defs(".highlight")
        resources = {"title": plain, "links": [links[0], ("index", titles["index"]), links[1]], "pygments": style}
        write_text(out / f"{name}.html", exporter.from_notebook_node(pages[name], resources)[0])
    return out / "index.html"


def _html(markdown: str) -> str:
    """Markdown as HTML, its formulas as MathML, which browsers draw by themselves."""
    from latex2mathml.converter import convert
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    def formula(tex: str, display: str = "inline") -> str:
        mathml = convert(tex.replace(r"\arg", r"\mathrm{arg}"), display=display)
        if unknown := re.findall(r"\\[a-zA-Z]+", mathml):
            raise BookError(f"formula {tex!r}: expected LaTeX that latex2mathml knows, got {', '.join(unknown)}")
        return mathml

    renderer = IPythonRenderer(escape=False, exclude_anchor_links=True)
    renderer.inline_math, renderer.block_math = formula, lambda tex: formula(tex, "block")
    renderer.latex_environment = lambda name, body: formula(rf"\begin{{{name}}}{body}\end{{{name}}}", "block")
    return MarkdownWithMath(renderer=renderer).render(markdown)


def _thumbnail(notebook: nbformat.NotebookNode) -> str:
    """A small copy of a notebook's first picture, as a Markdown image; empty where it has none."""
    for output in (output for cell in notebook.cells for output in cell.get("outputs", []) if PNG in output.data):
        image = _image(output.data[PNG])
        image.thumbnail((352, 352))
        return f"![](data:{PNG};base64,{_encoded(image, 64)})"
    return ""


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 when all went well."""
    enter_root()
    given = sys.argv[1:] if arguments is None else arguments
    default = ["paper/" + yaml.safe_load(Path("params.yaml").read_text())["scale"], "build/book"]
    try:
        print(f"wrote {build(*given, *default[len(given) :])}")
    except BookError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
