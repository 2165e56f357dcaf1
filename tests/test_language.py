"""Plain English: how long sentences are, words that hide what is meant, dead links.

It reads README, the other pages, every docstring and every message. As a program it
lists what it finds, and ends with status 1 if that is anything:

    python tests/test_language.py [FILE ...]
"""

from __future__ import annotations

import ast
import pathlib
import re
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
MOST = 30  # words of a sentence
HIDING = ("that of", "those of", "told", "of then", "anew", "of which", "of whose")
"""Each leaves a reader to look for what it stands for."""

PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")),
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("**/*.md")),
]
READ = [path for path in PAGES if path.parent.name != "notebook"]
"""The notebook is a dated record, which stays as it was written."""

SOURCES = [
    path
    for folder in ("puredif_jax", "configs", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
_FENCED = re.compile(r"^(```|~~~).*?^\1", re.M | re.S)
_MATHS = re.compile(r"\$\$.*?\$\$|\\\[.*?\\\]", re.S)
_ITEM = re.compile(r"\s*([-*]|\d+\.)\s")
_ENTRY = re.compile(r"(?m)^\s*(\w+(?:, \w+)*|\*+\w+): ")
_END = re.compile(r"(?<=[.!?:;])[\"')]*\s+")
_WORD = re.compile(r"[A-Za-z0-9][\w'’./-]*")
_LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
_PATH = re.compile(r"`?\b((?:docs|configs|benchmarks|tests|launch)/[\w./-]+\.\w+)")


def prose(text: str) -> str:
    """A page without code, formulas, tables and headings; list items apart."""
    text = _MATHS.sub("\n\n", _FENCED.sub("\n\n", text))
    lines = []
    for line in text.split("\n"):
        bare = line.lstrip()
        if line.startswith("    ") or bare.startswith(("|", "#", "!", "<", "---")):
            lines.append("")
        elif _ITEM.match(line):
            lines += ["", _ITEM.sub("", line, count=1)]
        else:
            lines.append(line)
    return "\n".join(lines)


def plain(docstring: str) -> str:
    """A docstring without formulas and commands, which stand further in; entries apart.

    An entry of "Args:" and its like goes on in lines that are indented further.
    """
    paragraphs = []
    for paragraph in docstring.split("\n\n"):
        lines = paragraph.split("\n")
        if all(line.startswith("  ") for line in lines):
            continue
        paragraphs.append(_ENTRY.sub("\n\n", paragraph))
    return "\n\n".join(paragraphs)


def sentences(text: str) -> Iterator[str]:
    """Each sentence of prose; a colon and a semicolon end one, too."""
    text = re.sub(r"`[^`\n]*`", "code", text)
    for paragraph in re.split(r"\n\s*\n", text):
        yield from filter(None, _END.split(" ".join(paragraph.split())))


def faults(text: str) -> Iterator[str]:
    """What is to be mended in prose, a line each."""
    for sentence in sentences(text):
        count = len(_WORD.findall(sentence))
        if count > MOST:
            yield f"{count} words: {sentence}"
        for phrase in HIDING:
            if re.search(rf"\b{phrase}\b", sentence, re.I):
                yield f"{phrase!r}: {sentence}"


def docstrings(path: pathlib.Path) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, kinds) and (found := ast.get_docstring(node)):
            yield found


def messages(path: pathlib.Path) -> Iterator[str]:
    """What a program may say: its texts of five words and more, without docstrings."""
    tree = ast.parse(path.read_text("utf-8"))
    left_out = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            left_out |= {id(part) for part in ast.walk(node) if part is not node}
    for node in ast.walk(tree):
        if id(node) in left_out:
            continue
        if isinstance(node, ast.JoinedStr):
            parts = [
                p.value if isinstance(p, ast.Constant) else "X" for p in node.values
            ]
            text = "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        else:
            continue
        if len(text.split()) >= 5 and not text.startswith("."):
            yield text


def faults_of(path: pathlib.Path) -> list[str]:
    """The faults of a page, or of a module's docstrings and messages."""
    if path.suffix == ".md":
        return [*faults(prose(path.read_text("utf-8")))]
    read = [*map(plain, docstrings(path)), *messages(path)]
    return [fault for each in read for fault in faults(each)]


def named(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", READ + SOURCES, ids=named)
def test_sentences_are_short_and_name_what_they_mean(path: pathlib.Path) -> None:
    assert faults_of(path) == []


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_links_and_named_files_are_there(path: pathlib.Path) -> None:
    """Links are beside the page, and named files below the root.

    The reference is made when the site is built, which checks links to it.
    """
    text = path.read_text("utf-8")
    links = [link for link in _LINK.findall(text) if "://" not in link]
    links = [link for link in links if not link.startswith("reference/")]
    dead = [link for link in links if not (path.parent / link).exists()]
    body = _FENCED.sub("", text)
    dead += [name for name in _PATH.findall(body) if not (ROOT / name).exists()]
    assert dead == []


def test_what_the_check_finds() -> None:
    long = "word " * MOST + "more."
    assert [*faults(long)] == [f"{MOST + 1} words: {long}"]
    assert [*faults("word " * MOST + "; and more.")] == []
    assert [*faults("It is that of a model. It was Told.")] == [
        "'that of': It is that of a model.",
        "'told': It was Told.",
    ]
    page = "# of then\n\n    anew\n\n| told |\n\n```\nanew\n```\n\n- one\n- two told\n"
    assert [*faults(prose(page))] == ["'told': two told"]
    text = f"Short.\n\n  anew\n\nArgs:\n  x: {'word ' * 20}\n  y: {'word ' * 20}\n"
    assert [*faults(plain(text))] == []


def test_which_texts_of_a_module_are_messages(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        '"""A docstring of more than five words."""\n'
        'found = f"{found!r} is no model: give a " "folder with one"\n'
        'short = "of four words only"\n'
    )
    assert [*messages(path)] == ["X is no model: give a folder with one"]


if __name__ == "__main__":
    chosen = [pathlib.Path(name).resolve() for name in sys.argv[1:]] or READ + SOURCES
    found = [f"{named(path)}: {each}" for path in chosen for each in faults_of(path)]
    print("\n".join(found))
    sys.exit(bool(found))
