"""report: scalars that survive a kill, a page that needs nothing but itself."""

from __future__ import annotations

import datetime
import json
import math
import os
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import puredif_jax.runs.report
from puredif_jax.runs.page import Judgement, Section
from puredif_jax.runs.report import Metrics, Report, environment, placeless, progress

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
    monkeypatch.setattr(puredif_jax.runs.report.time, "monotonic", lambda: next(clock))
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
    below = Section("Scores", table=rows, pictures=(("x", np.zeros((2, 2, 1))),))
    judged = Judgement("mine", "clean", "p = 0.9", facts={"Folder": "a/mine"})
    report = Report(
        "Run",
        (judged,),
        "1 model: 1 clean",
        "Sought: all.",
        sections=(Section("Audit", sections=(below,)), Section("Notes")),
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
        "verdict": "clean: mine (p = 0.9)\n1 model: 1 clean",
        "judgements": [
            {
                "name": "mine",
                "outcome": "clean",
                "sure": "p = 0.9",
                "detail": "",
                "facts": {"Folder": "a/mine"},
                "report": None,
            }
        ],
        "about": "Sought: all.",
        "numbers": {"asr": 0.75, "ids": [0, 1], "ok": True},
        "sections": [
            {"title": "Audit", "table": []},
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


# The environment


def test_environment_tells_software_and_the_command_as_typed(monkeypatch) -> None:
    argv = "python -m puredif_jax.main --config=configs/smoke.py".split()
    argv += ["--config.model=/home/ann/my models"]
    monkeypatch.setattr(sys, "orig_argv", argv)
    monkeypatch.setattr(
        subprocess, "check_output", lambda *_, **__: "puredif_jax/\n1234abcd\n"
    )
    found = environment()
    assert found["commit"] == "1234abcd"
    assert found["numpy"] == np.__version__ and found["jax"] and found["puredif_jax"]
    assert datetime.datetime.fromisoformat(found["date"]).tzinfo is not None
    assert found["command"] == (
        "python -m puredif_jax.main --config=configs/smoke.py "
        "'--config.model=/home/ann/my models'"
    )
    json.dumps(found)


def test_a_record_to_publish_has_no_folders() -> None:
    command = "/home/ann/bin/python main.py --config=configs/smoke.py"
    command += " --config.out=/home/ann/r '--a=~ann/x y/z,/b' --b=gs://ann/c/d"
    found = placeless({"command": f"{command} --rate=1/2 /tmp", "jax": "1"})
    assert found == {
        "command": ".../python main.py --config=configs/smoke.py --config.out=.../r "
        "--a=.../z,.../b --b=.../d --rate=1/2 .../tmp",
        "jax": "1",
    }


def test_names_that_are_not_utf8_are_written_and_read_again(tmp_path) -> None:
    name = os.fsdecode(b"caf\xe9")
    judged = Judgement(name, "error", detail=f"{name} is no model", report=name)
    Report(name, (judged,), config={"model": [name]}).write(tmp_path)
    found = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert found["judgements"][0]["name"] == name and found["config"]["model"] == [name]
    text = (tmp_path / "report.html").read_text("utf-8")
    assert r"caf\udce9" in text and 'href="caf%E9"' in text


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
