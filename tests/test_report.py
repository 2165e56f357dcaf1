"""report: scalars that survive a kill, a page that needs nothing but itself."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import math
import os
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import puredif_jax.report
from puredif_jax.report import Metrics, Report, Section, environment, progress


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


# Metrics


def test_metrics_come_back_as_columns(tmp_path):
    metrics = Metrics(tmp_path / "run")
    assert metrics.read("train")["step"].shape == (0,)
    metrics.write("train", 1, loss=jnp.float32(0.1), grad=np.float32(2), seen=3)
    metrics.write("invert", 1, loss=np.array([1.0, math.nan, -math.inf], np.float32))
    metrics.write("train", jnp.int32(2), loss=math.inf, extra=jnp.bfloat16(0.5))
    metrics.write("invert", 2, other=True)
    train, invert = metrics.read("train"), metrics.read("invert")
    assert list(train) == ["step", "loss", "grad", "seen", "extra"]
    assert train["step"].dtype == np.int64
    np.testing.assert_array_equal(train["step"], [1, 2])
    np.testing.assert_array_equal(train["loss"], [0.1, math.inf])
    np.testing.assert_array_equal(train["extra"], [math.nan, 0.5])
    nans = [math.nan] * 3
    np.testing.assert_array_equal(invert["loss"], [[1, math.nan, -math.inf], nans])
    np.testing.assert_array_equal(invert["other"], [math.nan, 1])
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"loss": 0.1,' in text and '"loss": [1.0, "nan", "-inf"]' in text
    for line in text.splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_rewind_drops_later_lines_of_the_stage_and_a_torn_line(tmp_path):
    metrics, file = Metrics(tmp_path), tmp_path / "metrics.jsonl"
    metrics.rewind("train", 0)
    assert not file.exists()
    for step in 10, 20, 30:
        metrics.write("train", step, loss=step / 10)
        metrics.write("invert", step, loss=0.0)
    before = file.read_text().splitlines(keepends=True)
    with file.open("a") as stream:
        stream.write('{"stage": "train", "step": 40, "lo')
    np.testing.assert_array_equal(metrics.read("train")["step"], [10, 20, 30])
    metrics.rewind("train", 20)
    assert file.read_text() == "".join(before[:4] + before[5:])
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
    metrics.write("train", 30, loss=7.0)
    np.testing.assert_array_equal(metrics.read("train")["loss"], [1, 2, 7])
    metrics.rewind("train", -1)
    assert metrics.read("train")["step"].size == 0
    assert metrics.read("invert")["step"].size == 3


# The bar


def test_a_bar_in_a_log_is_a_line_now_and_then(capsys, monkeypatch):
    clock = iter(np.arange(0.0, 1e6, 0.5))  # half a second from refresh to refresh
    monkeypatch.setattr(puredif_jax.report.time, "monotonic", lambda: next(clock))
    with progress(total=100, initial=40, label="invert", enabled=True) as bar:
        for i in range(60):
            bar.set_postfix(loss=i)
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("invert:  40%")
    assert re.search(r"100/100 \[.*, .*/s, loss=59\]$", lines[-1])
    assert 4 <= len(lines) <= 8
    assert not any("\r" in line for line in lines)


def test_a_bar_that_is_off_is_silent(capsys):
    with progress(total=3, initial=0, label="train", enabled=False) as bar:
        bar.update(3)
        bar.set_postfix(loss=1.0)
    assert capsys.readouterr().err == ""


# The report


def test_report_json_holds_all_but_the_pictures(tmp_path):
    rows = ({"model": "clean", "score": np.float32(0.1)}, {"score": math.nan, 3: None})
    section = Section("Scores", table=rows, pictures=(("x", np.zeros((2, 2, 1))),))
    report = Report(
        "Run",
        verdict="backdoored",
        sections=(section, Section("Notes")),
        config={"type": "Invert", "timesteps": (1, 2)},
        environment={"jax": None},
        numbers={"asr": jnp.float32(0.75), "ids": np.arange(2), "ok": np.bool(True)},
    )
    report.write(tmp_path)
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    found = json.loads(text, parse_constant=pytest.fail)
    assert len(found.pop("sha256")) == 64
    assert found == {
        "title": "Run",
        "verdict": "backdoored",
        "numbers": {"asr": 0.75, "ids": [0, 1], "ok": True},
        "sections": [
            {
                "title": "Scores",
                "table": [
                    {"model": "clean", "score": 0.1},
                    {"score": "nan", "3": None},
                ],
            },
            {"title": "Notes", "table": []},
        ],
        "config": {"type": "Invert", "timesteps": [1, 2]},
        "environment": {"jax": None},
    }
    assert text.startswith('{\n  "title": "Run"')
    html_text = (tmp_path / "report.html").read_bytes()
    report.write(tmp_path)
    assert text == (tmp_path / "report.json").read_text(encoding="utf-8")
    assert html_text == (tmp_path / "report.html").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["report.html", "report.json"]


def test_page_is_self_contained_and_escaped(tmp_path):
    evil = '<script src="x">alert(1)</script>&"'
    image, line = np.zeros((2, 2, 3)), {evil: ([0, 1], [1, 2])}
    section = Section(
        evil, f"{evil}\n\nsecond", ({evil: evil},), ((evil, image),), ((evil, line),)
    )
    fields = dict.fromkeys(["config", "environment", "numbers"], {evil: evil})
    parsed = page(tmp_path, section, title=evil, verdict=evil, **fields)
    tags = [tag for tag, _ in parsed.tags]
    assert not {"script", "link", "iframe", "style-sheet"} & set(tags)
    for name in "title h1 h2 td th figcaption".split():
        assert evil in parsed.text[name]
    assert parsed.text["p"] == [evil, evil, "second"]
    assert len(parsed.images()) == 2
    for _, attributes in parsed.tags:
        assert "href" not in attributes and "srcset" not in attributes
        assert attributes.get("src", "data:").startswith("data:")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|url\(|@import", text)
    assert text.index(parsed.text["p"][2]) > text.index('class="box"')


@pytest.mark.parametrize("report", [Report("Empty"), Report("x", "", (Section("y"),))])
def test_an_empty_report_is_a_page(tmp_path, report):
    report.write(tmp_path)
    parsed = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert not {"img", "table", "figure", "p"} & {tag for tag, _ in parsed.tags}


def test_numbers_with_numbers_within_are_in_the_tables_of_their_sections(tmp_path):
    numbers = {"share": 0.5, "model": {"gain": 0.25}, "rows": [{"gain": 0.125}]}
    parsed = page(tmp_path, Section("x"), numbers=numbers)
    assert parsed.text["td"] == ["share", "0.5"]
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


def test_reports_of_a_table_are_links(tmp_path):
    rows = ({"report": "a b/report.html"}, {"model": "an error"})
    tags = page(tmp_path, Section("Models", table=rows)).tags
    links = [attributes for tag, attributes in tags if tag == "a"]
    assert links == [{"href": "a%20b/report.html"}]


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


@pytest.mark.parametrize("shape", [(16, 16), (2, 2, 4), (1, 1, 2, 2, 3)])
def test_a_picture_of_another_shape_is_named(tmp_path, shape):
    with pytest.raises(ValueError, match=r"'odd' has shape .*expected \[H, W, C\]"):
        page(tmp_path, Section("x", pictures=(("odd", np.zeros(shape)),)))
    assert not (tmp_path / "report.json").exists()  # it would say that all is done


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


# The environment


def test_environment_tells_software_but_no_places(monkeypatch):
    argv = "/home/ann/p/main.py --config=configs/smoke.py --config.out=/home/ann/r"
    argv += " --a=~ann/x/y,/b --b=gs://ann/c/d --rate=1/2 /tmp"
    monkeypatch.setattr(sys, "argv", argv.split())
    monkeypatch.setattr(
        subprocess, "check_output", lambda *_, **__: "puredif_jax/\n1234abcd\n"
    )
    found = environment()
    assert found["commit"] == "1234abcd"
    assert found["numpy"] == np.__version__ and found["jax"]
    assert found["command"] == (
        ".../main.py --config=configs/smoke.py --config.out=.../r --a=.../y,.../b "
        "--b=.../d --rate=1/2 .../tmp"
    )
    json.dumps(found)


@pytest.mark.parametrize(
    "git",
    [FileNotFoundError(), subprocess.CalledProcessError(128, "git"), "lib/x/\n12"],
)
def test_environment_without_a_checkout(monkeypatch, git):
    def check_output(*_, **__):
        if isinstance(git, Exception):
            raise git
        return git

    monkeypatch.setattr(subprocess, "check_output", check_output)
    assert environment()["commit"] is None
