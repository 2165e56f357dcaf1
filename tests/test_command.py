"""The command in words, shipped configurations by name, and a run's config.json."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest
from absl import flags

from puredif_jax import main
from puredif_jax.attacks.targets import Cat
from puredif_jax.attacks.triggers import Blend, StopSign
from puredif_jax.attacks.trojdiff import TrojDiff
from puredif_jax.runs import config, sources
from puredif_jax.runs.command_line import from_words
from puredif_jax.runs.config import ConfigError
from puredif_jax.runs.sources import load, shipped
from puredif_jax.stages.experiment import Experiment, Scan, Sweep

HERE = pathlib.Path(__file__).parent
CONFIGS = sorted(path.stem for path in (HERE.parent / "configs").glob("*.py"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside any clone."""
    monkeypatch.chdir(tmp_path)


def words(*given: str) -> Experiment | Sweep | Scan:
    found, rest = from_words(["puredif", *given])
    assert rest == ["puredif"]
    return found


def refusal(*given: str) -> str:
    with pytest.raises(ConfigError) as caught:
        from_words(["puredif", *given])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_shipped_configuration_is_found_by_its_name() -> None:
    assert [*shipped()] == CONFIGS
    for name in CONFIGS:
        assert load(name) == load(f"configs/{name}.py") == load(f"{name}.py")


def test_a_file_here_comes_before_a_shipped_one(tmp_path: pathlib.Path) -> None:
    (tmp_path / "scan.py").write_text("import nothing_of_this_name")
    with pytest.raises(ConfigError, match="nothing_of_this_name"):
        load("scan.py")
    assert isinstance(load("scan"), Scan)


def test_an_installed_package_has_them_below_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "configs"
    home.mkdir()
    (home / "mine.py").write_text("")
    monkeypatch.setattr(sources, "HOMES", (home, *sources.HOMES))
    assert shipped() == {"mine": home / "mine.py"}


def test_words_name_models() -> None:
    assert words("scan", "a,b", "owner/name").model == ("a,b", "owner/name")
    assert words("repair", "a").model == ("a",)
    assert words("audit", "a", "b").audit.weights == ("a", "b")
    measured = words("measure", "a")
    assert measured.weights == "a"
    assert words("scan").model == load("scan").model


def test_words_set_fields_in_order_and_switches_need_no_value() -> None:
    found = words("scan", "--offline", "a", "--seed", "3", "--config.draws=8", "b")
    assert (found.model, found.offline, found.seed, found.draws) == (
        ("a", "b"),
        True,
        3,
        8,
    )
    assert words("repair", "a", "--repair.always").repair.always
    assert not words("repair", "a", "--repair.always=false").repair.always
    assert words("scan", "a", "--seed=1", "--seed=2").seed == 2


def test_flags_of_absl_stay() -> None:
    flags.FLAGS(["puredif"])
    found, rest = from_words(["puredif", "scan", "a", "--verbosity", "1"])
    assert (found.model, rest) == (("a",), ["puredif", "--verbosity", "1"])


@pytest.mark.parametrize("name", ["train", "baddiffusion", "amplify"])
def test_an_attack_is_chosen_in_words(name: str) -> None:
    assert words(name, "--attack=TrojDiff").attack == TrojDiff()
    found = words(
        name, "--attack=TrojDiff(Blend(0.8), Cat())", "--attack.poison_rate=1"
    )
    assert found.attack == TrojDiff(Blend(0.8), Cat(), poison_rate=1.0)
    assert words(name, "--attack.trigger=StopSign").attack.trigger == StopSign()


@pytest.mark.parametrize(
    "given, said",
    [
        ((), "the command needs a configuration first"),
        (("--seed=1",), "the command needs a configuration first"),
        (("scann",), "did you mean 'scan'?"),
        (("scan", "a", "--sed=1"), "no field 'sed' (did you mean 'seed'?)"),
        (("scan", "a", "--seed"), "--seed has no value"),
        (("scan", "a", "--offline=perhaps"), "cannot be 'perhaps'"),
        (("claims", "a"), "a sweep takes no model"),
        (("quickstart", "a", "b"), "starts from one model, found a, b"),
        (("here.json",), "is no JSON file"),
        (("list.json",), "is not the configuration of a run"),
        (("sweep.json",), "give the config file, or the config.json of one run"),
        (("strange.json",), "is a Strange, which the package does not have"),
        (("newer.json",), "has colour, which Scan does not have"),
        (("wrong.json",), "cannot be made: ValueError: steps must be 1 or more"),
        (("typed.json",), "config.seed in typed.json cannot be 'one': expected int"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    tmp_path: pathlib.Path, given: tuple[str, ...], said: str
) -> None:
    scan = config.to_dict(load("scan"))
    for name, plain in {
        "list": [1],
        "sweep": {"type": "Sweep"},
        "strange": {"type": "Strange", "x": 1},
        "newer": {**scan, "colour": 1},
        "wrong": {**scan, "steps": 0},
        "typed": {**scan, "audit": scan["audit"], "seed": "one"},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(plain))
    (tmp_path / "here.json").write_text("{")
    assert said in refusal(*given)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_json_of_a_run_gives_its_configuration(
    name: str, tmp_path: pathlib.Path
) -> None:
    wanted = load(name)
    runs = wanted.chosen() if isinstance(wanted, Sweep) else (wanted,)
    for run in runs[:: max(1, len(runs) // 4)]:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config.to_dict(run), allow_nan=False))
        assert load(str(path)) == run


def test_help_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    for given in ([], ["help"], ["--help"], ["scan", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main.parse_words(["puredif", *given])
        assert stop.value.code == 0
        out = capsys.readouterr().out
        if given[:1] == ["scan"]:
            assert out.startswith("Scan of models") and "--config.model=zoo" in out
        else:
            assert "puredif FILE [MODEL ...]" in out and "In configs/ are" in out


def test_cost_in_words() -> None:
    found, rest = main.parse_words(["puredif", "cost", "scan", "a"])
    assert isinstance(found, Scan) and found.workdir == "runs/scan-a"
    assert flags.FLAGS["cost"].value
    flags.FLAGS["cost"].value = False


def test_the_installed_command_runs_anywhere(tmp_path: pathlib.Path) -> None:
    """And ends quietly where nobody reads on."""
    command = pathlib.Path(sys.executable).parent / "puredif"
    asked = subprocess.run(
        [command, "scan", "nowhere"], capture_output=True, text=True, cwd=tmp_path
    )
    assert (asked.returncode, asked.stdout) == (1, "")
    assert "nowhere" in asked.stderr and "Traceback" not in asked.stderr
    reader, writer = os.pipe()
    os.close(reader)
    unread = subprocess.run(
        [command, "scan", "--help"], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert "Error" not in unread.stderr
