"""Hooks of the site: formulas as MathML, and the reference from the sources.

mkdocs.yml names this file. The reference has a page for each folder of the package, so
a new module needs no entry. Formulas need no script in the reader's browser.
"""

from __future__ import annotations

import ast
import html
import pathlib
import re

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "puredif_jax"
LAYERS = (
    "diffusion",
    "networks",
    "attacks",
    "defenses",
    "metrics",
    "formats",
    "data",
    "stages",
    "runs",
    "files",
)
"""The folders of the package, in the order in which a reader may want them."""

_MATHS = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)


def _formula(found: re.Match[str]) -> str:
    display = "block" if found[2] == "[" else "inline"
    return convert(html.unescape(found[3]).strip(), display=display)


def on_page_content(text: str, **_: object) -> str:
    """Formulas of a page as MathML."""
    return _MATHS.sub(_formula, text)


def _said(path: pathlib.Path) -> str:
    """The first sentence of a module's docstring."""
    first = (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").split("\n")[0]
    return first.rstrip(".")


def _page(layer: str) -> str:
    """The reference of a folder."""
    folder = PACKAGE / layer
    lines = [f"# {layer}", "", f"{_said(folder / '__init__.py')}.", ""]
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py":
            lines += [f"::: puredif_jax.{layer}.{path.stem}", ""]
    return "\n".join(lines)


def on_files(files, config):
    """Adds the pages of the reference."""
    pages = {layer: _page(layer) for layer in LAYERS}
    rows = [
        f"| [{layer}]({layer}.md) | {_said(PACKAGE / layer / '__init__.py')} |"
        for layer in LAYERS
    ]
    pages["index"] = "\n".join(
        [
            "# Reference",
            "",
            "From the docstrings, a page for each folder of `puredif_jax`. Names that "
            "begin with an underscore are not part of it.",
            "",
            "| folder | what it holds |",
            "| --- | --- |",
            *rows,
            "",
        ]
    )
    for name, text in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


class Formulas(griffe.Extension):
    """Paragraphs of a docstring that stand further in are formulas: shown as typed."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = "\n\n".join(
                _shown(each) for each in obj.docstring.value.split("\n\n")
            )


def _shown(paragraph: str) -> str:
    lines = paragraph.split("\n")
    if all(re.match(r" {2}(?! )", line) or line.startswith("    ") for line in lines):
        return "\n".join(["```text", *(line[2:] for line in lines), "```"])
    return paragraph
