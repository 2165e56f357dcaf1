"""A report as one HTML page: it fetches nothing, runs no script and can be printed.

The first screen has the verdicts, each in a word and a colour. What a stranger has
named is escaped, and wraps rather than widens the page.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from puredif_jax.runs.figures import Lines, curves, picture
from puredif_jax.types import shown

_COLOURS = {"backdoored": "bad", "could not tell": "doubt", "clean": "good"}
_DEEPEST = 6  # level of a heading
_LONG = 24  # characters of a word that may be broken in a table


@dataclass(frozen=True)
class Judgement:
    """What is known of one model, for the first screen of a page and for a terminal.

    Attributes:
      name: of the model.
      outcome: the verdict in a word or three, or "error".
      sure: how sure that is, in a clause.
      detail: more sentences.
      facts: what identifies the model, by names such as "Folder".
      report: address of its own page, beside this one.
    """

    name: str
    outcome: str
    sure: str = ""
    detail: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    report: str | None = None

    @property
    def line(self) -> str:
        """For a terminal; the verdict stands first, so that no name can feign one."""
        why = self.sure or self.detail
        line = f"{self.outcome}: {shown(self.name, 255)}"
        return shown(f"{line} ({why})" if why else line, 2000)


@dataclass(frozen=True)
class Section:
    """A part of a report: text, rows of a table, captioned pictures and lines.

    Attributes:
      title: its heading.
      text: paragraphs with an empty line between; `such` words are set as code.
      table: rows, by column.
      pictures: `[H, W, C]` or a grid `[N, H, W, C]` in [-1, 1]; a caption that starts
        with "difference" is drawn in blue and red around 0.
      curves: named lines (x, y), each `[n]`.
      columns: names of the columns that the page shows, in order, with the meaning of
        each in a line; without any, it shows all.
      pairs: pictures to compare, two side by side.
      sections: below it.
    """

    title: str
    text: str = ""
    table: tuple[Mapping[str, object], ...] = ()
    pictures: tuple[tuple[str, npt.ArrayLike], ...] = ()
    curves: tuple[tuple[str, Lines], ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    pairs: tuple[tuple[str, npt.ArrayLike], ...] = ()
    sections: tuple[Section, ...] = ()

    def tree(self) -> Iterable[Section]:
        """This one and all below it."""
        yield self
        for section in self.sections:
            yield from section.tree()


def render(
    title: str,
    summary: str,
    judgements: Sequence[Judgement],
    about: str,
    facts: Mapping[str, str],
    numbers: Mapping[str, object],
    sections: Sequence[Section],
    appendices: Mapping[str, str],
) -> str:
    """The page.

    Args:
      title: its heading.
      summary: of all models, in a line.
      judgements: of each model; of several, an overview stands first, and more below.
      about: paragraphs on what the verdicts cover.
      facts: when, with what and how the report was made.
      numbers: results of the whole, shown with the facts; values that have names
        within are left out.
      sections: what was found.
      appendices: preformatted texts, by their titles.
    """
    heading = _text(title)
    cards = "".join(_card(i, judged) for i, judged in enumerate(judgements))
    cards = f'<ul class="models">\n{cards}</ul>\n' if judgements else ""
    body = f"<header><h1>{heading}</h1>\n{_paragraphs(summary)}"
    if len(judgements) > 1:
        rows = "".join(_overview(i, judged) for i, judged in enumerate(judgements))
        body += f'<ul class="overview">\n{rows}</ul>\n'
    else:
        body += cards
    whole = {k: _cell(plain(v)) for k, v in numbers.items() if not _nested(v)}
    body += f"{_paragraphs(about)}{_facts({**facts, **whole})}</header>\n<main>"
    body += cards if len(judgements) > 1 else ""
    body += "".join(_section(section, 2) for section in sections)
    for name, content in appendices.items():
        lines = "\n".join(shown(line, len(line)) for line in content.split("\n"))
        pre = f"<pre>{escape(lines)}</pre>"
        body += f"<details><summary>{_text(name)}</summary>{pre}</details>\n"
    body += "</main>"
    return (
        f"{_HEAD}<title>{heading}</title></head>\n<body>{body}{_FOOT}</body></html>\n"
    )


def plain(value: Any) -> Any:
    """`value` as JSON has it: arrays as lists, nan and inf as strings."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, (list, tuple)) or np.ndim(value):
        return [plain(item) for item in value]
    scalar = np.asarray(value)[()]
    if isinstance(scalar, (np.bool, np.integer)):
        return scalar.item()
    try:
        number = float(str(scalar))  # a float32 0.1 as 0.1, not 0.10000000149
    except ValueError:
        return str(value)
    return number if math.isfinite(number) else str(number)


def _text(value: object) -> str:
    """As text of the page, also within an attribute."""
    return escape(shown(str(value), 10_000))


def _prose(value: str) -> str:
    """Text in which `such` words are code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", _text(value))


def _paragraphs(text: str) -> str:
    parts = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return "".join(f"<p>{_prose(part)}</p>\n" for part in parts if part)


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(
        f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>\n"
        for name, value in facts.items()
    )
    return f'<dl class="facts">{rows}</dl>\n' if rows else ""


def _word(judged: Judgement) -> str:
    return f'<p class="word">{_text(judged.outcome)}</p>'


def _colour(judged: Judgement) -> str:
    return _COLOURS.get(judged.outcome, "none")


def _overview(number: int, judged: Judgement) -> str:
    """A row: the word, the model, how sure; it leads to the card."""
    name = f'<a href="#model-{number}"><bdi>{_text(judged.name)}</bdi></a>'
    why = _prose(judged.sure or judged.detail)
    return (
        f'<li class="{_colour(judged)}">{_word(judged)}<p class="name">{name}</p>'
        f'<p class="why">{why}</p></li>\n'
    )


def _card(number: int, judged: Judgement) -> str:
    """All that is known of a model at first sight."""
    name = f"<bdi>{_text(judged.name)}</bdi>"
    if judged.report is not None:
        name = f'<a href="{_address(judged.report)}">{name}</a>'
    texts = "".join(f"<p>{_prose(x)}</p>\n" for x in (judged.sure, judged.detail) if x)
    return (
        f'<li class="{_colour(judged)}" id="model-{number}">{_word(judged)}\n'
        f"<div><h2>{name}</h2>\n{texts}{_facts(judged.facts)}</div></li>\n"
    )


def _address(path: str) -> str:
    """The address of a file beside the page; its name need not be UTF-8."""
    return escape(quote(os.fsencode(path)))


def _nested(value: object) -> bool:
    """Whether it has names within; such a value is in a section's table."""
    rows = value if isinstance(value, (list, tuple)) else (value,)
    return not rows or any(isinstance(row, Mapping) for row in rows)


def _section(section: Section, level: int) -> str:
    kind = f"h{min(level, _DEEPEST)}"
    html = f"<section><{kind}>{_text(section.title)}</{kind}>\n"
    html += _paragraphs(section.text)
    html += _table(section.title, section.table, section.columns)
    figures = [(caption, picture(caption, x)) for caption, x in section.pictures]
    html += _figures("row", figures)
    pairs = [(caption, picture(caption, x)) for caption, x in section.pairs]
    html += _figures("pairs", pairs)
    plots = [(caption, curves(caption, x)) for caption, x in section.curves]
    html += _figures("row", plots)
    html += "".join(_section(below, level + 1) for below in section.sections)
    return html + "</section>\n"


def _figures(layout: str, figures: Sequence[tuple[str, str]]) -> str:
    """Captions and images, or nothing."""
    html = "".join(
        f"<figure>{image}<figcaption>{_text(caption)}</figcaption></figure>\n"
        for caption, image in figures
    )
    return f'<div class="{layout}">{html}</div>' if figures else ""


def _table(
    title: str, rows: Sequence[Mapping[str, object]], columns: Mapping[str, str]
) -> str:
    """The rows, or nothing; a column with a number in it is set to the right.

    A table wider than the screen scrolls within a frame that the keyboard reaches.
    """
    lines = [""] * (len(rows) + 1)
    found = dict.fromkeys(name for row in rows for name in row)
    meanings = {name: text for name, text in columns.items() if name in found}
    names = list(meanings or found)
    for name in names:
        values = [plain(row.get(name)) for row in rows]
        kind = ' class="n"' if {int, float} & set(map(type, values)) else ""
        words = (word for value in values for word in _cell(value).split())
        if not kind and max(map(len, words), default=0) > _LONG:
            kind = ' class="w"'
        head = _text(name)
        if meaning := meanings.get(name):
            head = f'<abbr title="{_text(meaning)}">{head}</abbr>'
        lines[0] += f'<th scope="col"{kind}>{head}</th>'
        for i, value in enumerate(values, start=1):
            cell = _prose(_cell(value))
            lines[i] += f"<td{kind}>{cell}</td>"
    if not rows:
        return ""
    html = "\n".join(f"<tr>{line}</tr>" for line in lines)
    frame = f'tabindex="0" role="region" aria-label="Table: {_text(title)}"'
    said = {name: text for name, text in meanings.items() if text}
    legend = _facts(said).replace("facts", "legend", 1)
    return f'<div class="wide" {frame}><table>{html}</table></div>\n{legend}'


def _cell(value: Any) -> str:
    """What `plain` returns, for a reader: floats with four significant digits."""
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    if isinstance(value, float):
        return f"{value:.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.4g}"
    return "–" if value is None else str(value)


_HEAD = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root { color-scheme: light dark; --page: #fff; --ink: #1d2127; --soft: #58616d;
  --line: #d8dde3; --box: #f1f4f7; --link: #1a5a96;
  --bad: #b3261e; --doubt: #865400; --good: #1b6e3c; --none: #58616d }
@media (prefers-color-scheme: dark) { :root { --page: #15181c; --ink: #e3e6ea;
  --soft: #a3adb8; --line: #3a424b; --box: #1f252c; --link: #8ec1f0 } }
* { box-sizing: border-box }
body { max-width: 74rem; margin: auto; padding: 1.2rem 1rem; background: var(--page);
  color: var(--ink); font: 1rem/1.45 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { margin: 0 0 .8rem; font-size: 1.5rem }  h2, h3 { margin: 0; font-size: 1.2rem }
h3 { font-size: 1.05rem }  a { color: var(--link) }
p { max-width: 48rem; margin: .5rem 0 }
section, footer { border-top: 1px solid var(--line); margin-top: 1.6rem;
  padding: 1rem 0 }
section section { border: 0; margin-top: 1rem; padding: 0 }
.models, .overview { list-style: none; margin: 0; padding: 0 }
.models > li, .overview > li { display: grid; gap: 0 1rem; break-inside: avoid;
  padding: .5rem .8rem; background: var(--box); border-left: .4rem solid var(--tone) }
.models > li { grid-template-columns: 9rem minmax(0, 1fr); margin: .5rem 0;
  border-radius: .3rem }
.overview > li { grid-template-columns: 9rem minmax(0, 14rem) minmax(0, 1fr);
  padding: .2rem .8rem; border-bottom: 1px solid var(--line) }
.overview p, .models p { margin: .1rem 0; font-size: .9rem; max-width: none }
.overview .name, .overview .why { display: -webkit-box; overflow: hidden;
  -webkit-box-orient: vertical; -webkit-line-clamp: 2 }
.overview .name { unicode-bidi: isolate; font-weight: 600 }
.overview .why { font-size: .8rem; color: var(--soft) }
.bad { --tone: var(--bad) }  .doubt { --tone: var(--doubt) }
.good { --tone: var(--good) }  .none { --tone: var(--none) }
.models h2 { font-size: 1.05rem; unicode-bidi: isolate }
.word { align-self: start; padding: .15rem .5rem; border-radius: .3rem;
  background: var(--tone); color: #fff; font-weight: 700; text-align: center;
  print-color-adjust: exact; -webkit-print-color-adjust: exact }
.facts, .legend { margin: .4rem 0 0; font-size: .85rem; line-height: 1.35 }
.facts > div { display: flex; flex-wrap: wrap; gap: 0 .6rem }
.facts dt, .legend dt { color: var(--soft) }
.facts dd, .legend dd { margin: 0; min-width: 0 }
.models .facts { margin: 0; font-size: .8rem }
.legend > div { display: grid; grid-template-columns: 9rem minmax(0, 1fr); gap: .6rem;
  max-width: 48rem }
table { border-collapse: collapse; font-size: .9rem; margin-top: .6rem }
th, td { padding: .3rem 1.1rem .3rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; min-width: 4.5rem; unicode-bidi: isolate;
  overflow-wrap: normal }
.w { min-width: 12rem; overflow-wrap: anywhere }
th, figcaption, footer, .key { color: var(--soft); font-size: .85rem; line-height: 1.4 }
th { text-align: left }  abbr { text-decoration: none }
.n { text-align: right; font-variant-numeric: tabular-nums }
.wide { overflow-x: auto }  .wide:focus-visible { outline: 2px solid var(--link) }
.row { display: flex; flex-wrap: wrap; gap: 1rem; margin-top: .8rem }
.pairs { display: grid; grid-template-columns: repeat(2, minmax(0, max-content));
  gap: 1rem; margin-top: .8rem }
figure { margin: 0; min-width: 8rem; max-width: 100%; break-inside: avoid }
figcaption { width: 0; min-width: 100% } /* as wide as the picture, never wider */
img { display: block; max-width: 100%; height: auto; margin-bottom: .4rem }
.pixels { image-rendering: pixelated; background: var(--line) }  .key { display: flex }
.ramp { height: .6rem; margin: .3rem .4rem }
summary { cursor: pointer; margin: .6rem 0 }
code { font-size: .9em }
pre { padding: .8rem 1rem; background: var(--box); font-size: .8rem;
  white-space: pre-wrap }
@media (max-width: 40rem) {
  .models > li { grid-template-columns: minmax(0, 1fr) }
  .models .word { justify-self: start }
  .overview > li { grid-template-columns: 8.6rem minmax(0, 1fr); padding: .2rem .5rem }
  .overview .why { display: none } /* the card below has it */
  .pairs { grid-template-columns: minmax(0, 1fr) }
  .legend > div { grid-template-columns: minmax(0, 1fr); gap: 0;
    margin-bottom: .3rem } }
@media print {
  :root { color-scheme: light; --page: #fff; --ink: #000; --soft: #444; --line: #bbb;
    --box: #fff; --link: #000 }
  body { max-width: none; padding: 0; font-size: 10pt }
  .models > li, .overview > li { border: 1px solid var(--line);
    border-left: .4rem solid var(--tone) }
  .wide { overflow: visible }  tr, figure, dl > div { break-inside: avoid }
  h2, h3 { break-after: avoid }  summary { break-after: avoid }
  details::details-content { content-visibility: visible; height: auto } }
</style>"""
_FOOT = "<footer>Defence research: finding backdoors in models to remove them.</footer>"
