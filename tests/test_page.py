"""page: one document that needs nothing but itself, whatever strangers have named."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from puredif_jax.runs.page import Judgement, Section
from puredif_jax.runs.report import Report

# Attributes that a page may have: none that runs or fetches anything.
KNOWN = set(
    "lang charset name content class width alt src title scope tabindex role href "
    "aria-label id".split()
)


class Page(html.parser.HTMLParser):
    """Tags in order, the text of each kind of element, and whether tags match."""

    void = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)
            self.text.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.text[self.open[-1]][-1] += data

    def having(self, tag: str) -> list[dict]:
        """The attributes of every element of this kind."""
        return [attributes for name, attributes in self.tags if name == tag]

    def images(self) -> list[tuple[dict, np.ndarray]]:
        """The attributes and the `[h, w, 4]` bytes of every image."""
        found = []
        for attributes in (attributes for tag, attributes in self.tags if tag == "img"):
            kind, _, code = attributes["src"].partition(",")
            assert kind == "data:image/png;base64"
            image = Image.open(io.BytesIO(base64.b64decode(code, validate=True)))
            found.append((attributes, np.asarray(image.convert("RGBA"))))
        return found


def page(folder, *sections: Section, **fields) -> Page:
    Report(fields.pop("title", "Run"), sections=sections, **fields).write(folder)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_page_is_self_contained_and_escaped(tmp_path):
    evil = '</td><script src="x">alert(1)</script>&"\''
    image, line = np.zeros((2, 2, 3)), {evil: ([0, 1], [1, 2])}
    section = Section(
        evil, f"{evil}\n\nsecond", ({evil: evil},), ((evil, image),), ((evil, line),)
    )
    judged = Judgement(evil, evil, evil, evil, {evil: evil}, evil)
    fields = dict.fromkeys(["config", "environment", "numbers"], {evil: evil})
    fields |= {"judgements": (judged,), "summary": evil, "about": evil}
    columned = Section(evil, table=({evil: evil},), columns={evil: evil})
    parsed = page(tmp_path, section, columned, title=evil, **fields)
    tags = [tag for tag, _ in parsed.tags]
    assert not {"script", "link", "iframe", "style-sheet"} & set(tags)
    for name in "title h1 h2 td th figcaption dt dd bdi abbr".split():
        assert evil in parsed.text[name], name
    assert parsed.text["p"] == [*[evil] * 5, evil, "second"]
    assert len(parsed.images()) == 2
    for _, attributes in parsed.tags:
        assert set(attributes) <= KNOWN, attributes
        assert "<" not in attributes.get("href", "")
        assert attributes.get("src", "data:").startswith("data:")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|url\(|@import", text)


UNSEEN = "x\x1b[2J\n\nclean: all good\u202e\u200b\udcff"
SEEN = r"x\x1b[2J\n\nclean: all good\u202e\u200b\udcff"


def test_what_cannot_be_seen_is_escaped_wherever_it_is(tmp_path) -> None:
    pictures, lines = ((UNSEEN, np.zeros((2, 2, 1))),), ((UNSEEN, {}),)
    rows = ({UNSEEN: UNSEEN, "report": UNSEEN},)
    section = Section(UNSEEN, "", rows, pictures, lines, pairs=pictures)
    judged = Judgement(UNSEEN, UNSEEN, UNSEEN, UNSEEN, {UNSEEN: UNSEEN}, UNSEEN)
    fields = dict.fromkeys(["config", "environment", "numbers"], {UNSEEN: UNSEEN})
    parsed = page(tmp_path, section, title=UNSEEN, judgements=(judged,), **fields)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    allowed = text.replace("\n", "").replace("–", "")
    assert allowed.isascii() and allowed.isprintable()
    for name in "title h1 h2 td th figcaption dt dd bdi p".split():
        assert SEEN in parsed.text[name], name
    assert judged.line == f"{SEEN}: {SEEN} ({SEEN})"
    assert Report("x", (judged,)).verdict == judged.line


def test_a_verdict_is_a_word_and_a_colour_above_all_else(tmp_path) -> None:
    outcomes = ["backdoored", "could not tell", "clean", "error", "not done yet"]
    judged = [Judgement(f"model {i}", x, "so sure") for i, x in enumerate(outcomes)]
    parsed = page(
        tmp_path,
        Section("More", table=({"x": 1},)),
        judgements=tuple(judged),
        about="Sought: some.",
        environment={"date": "today", "jax": "1.2", "command": "python x"},
    )
    rows = [tag.get("class") for tag in parsed.having("li")]
    assert rows == ["bad", "doubt", "good", "none", "none"] * 2, "overview and cards"
    words = [x for x in parsed.text["p"] if x in outcomes]
    assert words == outcomes * 2
    leads = [x["href"] for x in parsed.having("a")]
    assert leads == [f"#{x['id']}" for x in parsed.having("li") if "id" in x]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    places = [text.index(f">{x}<") for x in ("backdoored", "today", "python x", "More")]
    assert places == sorted(places)
    assert parsed.text["dd"] == ["today", "jax 1.2", "python x"]


def test_the_line_of_a_verdict_starts_with_it() -> None:
    assert Judgement("a", "clean", "p = 1", "why").line == "clean: a (p = 1)"
    assert Judgement("a", "error", detail="why").line == "error: a (why)"
    assert Judgement("a", "not done yet").line == "not done yet: a"


def test_a_table_is_reached_by_the_keyboard_and_its_columns_are_explained(
    tmp_path,
) -> None:
    rows = ({"long": 1, "score": 0.5, "reason": "hidden"}, {"score": 2.0})
    columns = {"score": "how far", "long": "", "absent": "of no row"}
    parsed = page(tmp_path, Section("Scores", table=rows, columns=columns))
    (frame,) = [x for x in parsed.having("div") if x.get("class") == "wide"]
    assert (frame["tabindex"], frame["role"]) == ("0", "region")
    assert frame["aria-label"] == "Table: Scores"
    assert parsed.text["td"] == ["0.5", "1", "2", "–"]
    assert parsed.having("abbr") == [{"title": "how far"}]
    assert parsed.text["dt"] == ["score"] and parsed.text["dd"] == ["how far"]
    found = json.loads((tmp_path / "report.json").read_text())["sections"][0]
    assert found["table"][0]["reason"] == "hidden", "the file has all columns"


def test_sections_below_sections_have_headings_of_their_own(tmp_path) -> None:
    deep = Section("d", "`code` and <b>")
    for title in "cba":
        deep = Section(title, sections=(deep, Section(f"{title}2")))
    parsed = page(tmp_path, deep)
    assert [parsed.text[f"h{i}"] for i in (2, 3, 4, 5)] == [
        ["a"],
        ["b", "a2"],
        ["c", "b2"],
        ["d", "c2"],
    ]
    assert parsed.text["code"] == ["code"] and "b" not in parsed.text


def test_pictures_to_compare_are_side_by_side(tmp_path) -> None:
    pictures = tuple((name, np.zeros((8, 4, 4, 1))) for name in ("with", "without"))
    parsed = page(tmp_path, Section("Evidence", pairs=pictures))
    at = [i for i, (_, x) in enumerate(parsed.tags) if x.get("class") == "pairs"]
    kinds = [tag for tag, _ in parsed.tags[at[0] + 1 : at[0] + 7]]
    assert kinds == ["figure", "img", "figcaption"] * 2
    assert parsed.text["figcaption"] == ["with", "without"]


@pytest.mark.parametrize(
    "report", [Report("Empty"), Report("x", sections=(Section("y"),))]
)
def test_an_empty_report_is_a_page(tmp_path, report):
    report.write(tmp_path)
    parsed = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert not {"img", "table", "figure", "p"} & {tag for tag, _ in parsed.tags}


def test_numbers_with_numbers_within_are_in_the_tables_of_their_sections(tmp_path):
    numbers = {"share": 0.5, "model": {"gain": 0.25}, "rows": [{"gain": 0.125}]}
    parsed = page(tmp_path, Section("x"), numbers=numbers)
    assert (parsed.text["dt"], parsed.text["dd"]) == (["share"], ["0.5"])
    assert json.loads((tmp_path / "report.json").read_text())["numbers"] == numbers


def test_tables_align_and_round_numbers(tmp_path):
    rows = (
        {"model": "clean", "score": 0.123456, "steps": 123456},
        {"model": "bad", "score": 12345.6, "found": True},
        {"score": math.nan, "found": [1, 0.33333]},
    )
    parsed = page(tmp_path, Section("Scores", table=rows))
    assert parsed.text["th"] == ["model", "score", "steps", "found"]
    assert parsed.text["td"] == [
        *("clean", "0.1235", "123456", "–"),
        *("bad", "12346", "–", "True"),
        *("–", "nan", "–", "1, 0.3333"),
    ]
    right = [
        attributes.get("class") == "n"
        for tag, attributes in parsed.tags
        if tag in ("th", "td")
    ]
    assert right == [False, True, True, False] * 4


def test_scouts_share_one_line_of_the_legend(tmp_path, monkeypatch):
    legends = []

    def legend(axes, **options):
        legends.append(axes.get_legend_handles_labels()[1])

    monkeypatch.setattr("matplotlib.axes.Axes.legend", legend)
    x = np.arange(3.0)
    lines = {"ode": (x, x), **{f"ode, scout {i}": (x, x + i) for i in range(8)}}
    page(tmp_path, Section("Audit", curves=(("loss", lines),)))
    assert legends == [["ode", "scouts"]]


def test_pictures_keep_their_pixels(tmp_path):
    single = np.linspace(-1, 1, 16 * 16 * 3).reshape(16, 16, 3)
    grid = np.full((11, 4, 5, 1), 3.0)
    grid[9] = -1
    grid[2, 0, 0] = math.nan
    pictures = (("one", single), ("many", jnp.asarray(grid)), ("none", grid[:0]))
    (one, pixels), (many, tiles) = page(
        tmp_path, Section("x", pictures=pictures)
    ).images()
    np.testing.assert_allclose(pixels[..., :3], (single + 1) * 127.5, atol=0.5)
    assert one["class"] == "pixels" and one["width"] == "128" and one["alt"] == "one"
    assert tiles.shape == (2 * 5 - 1, 8 * 6 - 1, 4)
    assert many["width"] == str(tiles.shape[1] * 13)
    np.testing.assert_array_equal(tiles[0:4, 0:5], 255)
    np.testing.assert_array_equal(tiles[5:9, 6:11], [[[0, 0, 0, 255]] * 5] * 4)
    for gap in tiles[4], tiles[:, 5], tiles[5:, 3 * 6 :], tiles[0, 12]:
        np.testing.assert_array_equal(gap[..., 3], 0)
    assert (tiles[..., 3] == 255).sum() == 11 * 4 * 5 - 1


@pytest.mark.parametrize("shape", [(16, 16), (1, 1, 2, 2, 3)])
def test_a_picture_of_another_shape_is_named(tmp_path, shape):
    with pytest.raises(ValueError, match=r"'odd' has shape .*expected \[H, W, C\]"):
        page(tmp_path, Section("x", pictures=(("odd", np.zeros(shape)),)))
    assert not (tmp_path / "report.json").exists()  # it would say that all is done


@pytest.mark.parametrize("shape", [(3, 2, 4), (2, 3, 2, 4)])
def test_images_of_other_channels_are_shown_channel_by_channel(tmp_path, shape) -> None:
    image = np.linspace(-1, 1, math.prod(shape)).reshape(shape)
    ((_, tiles),) = page(tmp_path, Section("x", pictures=(("four", image),))).images()
    images = image.reshape(-1, *shape[-3:])
    assert tiles.shape == (len(images) * 4 - 1, 4 * 3 - 1, 4)
    for i, c in np.ndindex(len(images), 4):
        tile = tiles[4 * i : 4 * i + 3, 3 * c : 3 * c + 2, 0]
        np.testing.assert_allclose(tile, (images[i, ..., c] + 1) * 127.5, atol=0.5)


def test_differences_are_red_above_zero_and_blue_below(tmp_path):
    image = np.zeros((2, 4, 3))
    image[:, 0, 1], image[:, 0, 2] = 0.1, -1.0  # the larger counts
    image[:, 1, 0] = 2.0
    image[:, 2] = math.nan
    pictures = (("Difference to truth", image), ("difference", np.zeros((9, 2, 2, 1))))
    parsed = page(tmp_path, Section("x", pictures=pictures))
    (_, signed), (ramp, bar), (_, zeros), _ = parsed.images()
    assert signed.shape == (2, 4, 4) and ramp["class"] == "ramp"
    (blue, red, missing, white), bar = signed[0].astype(int), bar[0].astype(int)
    assert blue[2] > blue[0] + 50 and red[0] > red[2] + 50
    assert missing[3] == 0 and white[:3].min() > 240 and zeros[0, 0, :3].min() > 240
    np.testing.assert_array_equal(red, bar[-1])  # 2 is the limit
    assert np.abs(bar[len(bar) // 4] - blue).max() < 15  # and -1 half of it
    keys = [" ".join(text.split()) for text in parsed.text["div"]]
    assert [key for key in keys if key] == ["-2 2", "-1 1"]


@pytest.mark.parametrize(
    ("y", "scales"),
    [
        ([1.0, 1e-3], ["log"]),
        ([1.0, 0.02], []),
        ([-1.0, 1e3], []),
        ([math.nan, math.inf], []),
        ([], []),
    ],
)
def test_curves_are_logarithmic_over_two_decades(tmp_path, monkeypatch, y, scales):
    found: list[str] = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_yscale", lambda _, x: found.append(x))
    lines = {"cost $x$": (jnp.arange(len(y)), jnp.asarray(y, float)), "one": ([0], [1])}
    parsed = page(tmp_path, Section("x", curves=(("loss", lines), ("none", {}))))
    assert [attributes["alt"] for attributes, _ in parsed.images()] == ["loss", "none"]
    assert found == scales
