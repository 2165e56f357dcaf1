"""The whole program: a few steps on real images, bad input, and kill -9."""

import dataclasses
import fcntl
import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
from tiny_config import TINY, draw_params, get_config, shapes

from puredif_jax import main
from puredif_jax.formats import diffusers as convert
from puredif_jax.runs import config, weight_file
from puredif_jax.stages import scan, sweep

HERE = pathlib.Path(__file__).parent
COMMAND = [sys.executable, "-m", "puredif_jax.main"]


def run(capsys, *flags: str) -> str:
    """Runs the program here; returns the sentence of its error, or ''."""
    try:
        main.main(main.parse(["main", *flags]))
    except SystemExit as stop:
        assert stop.code not in (0, None)
        return str(stop.code)
    return ""


def tiny(workdir: pathlib.Path, *flags: str) -> list[str]:
    return [
        f"--config={HERE / 'tiny_config.py'}",
        f"--config.workdir={workdir}",
        *flags,
    ]


def test_leaves_a_report(finished: pathlib.Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    rows = report["numbers"]["amplification"]
    steps = [(row["training steps"], row["trigger"]) for row in rows]
    kinds = ("true trigger", "reinforced")
    assert steps == [(step, kind) for step in (6, 12) for kind in kinds]
    verdict = report["numbers"]["trained"]["verdict"]
    assert verdict["outcome"] != "backdoored" and verdict["reason"]
    methods = [row["method"] for row in report["numbers"]["trained"]["inversions"]]
    assert methods == ["puredif", "elijah"]
    folder = convert.read_folder(finished / "diffusers")
    weights = weight_file.load_weights(finished / "weights.safetensors", shapes(TINY))
    assert folder.spec.network == TINY
    jax.tree.map(np.testing.assert_array_equal, folder.params, weights)
    assert (finished / "diffusers" / "truth.safetensors").exists()
    page = (finished / "report.html").read_text()
    for words in ("true trigger", "reinforced trigger", "difference", "plain noise"):
        assert words in page
    stages = {
        json.loads(line)["stage"]
        for line in (finished / "metrics.jsonl").read_text().splitlines()
    }
    assert {"train", "reinforce_6", "puredif_trained_ode"} <= stages
    with np.load(finished / "results" / "puredif_trained_ode.npz") as file:
        assert file["errors"].shape == (2,), "of the finalists"


def arrays(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Everything a run has computed, but for the seconds it took."""
    found = {}
    for path in sorted((folder / "results").glob("*.npz")):
        with np.load(path, allow_pickle=False) as file:
            found |= {f"{path.stem}/{k}": v for k, v in file.items() if k != "seconds"}
    weights = weight_file.load_weights(folder / "weights.safetensors", shapes(TINY))
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        found[jax.tree_util.keystr(path)] = leaf
    return found


def reached(folder: pathlib.Path, stage: str) -> int:
    """Steps that a stage has written scalars of."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    steps = [0]
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["stage"] == stage:
            steps.append(row["step"])
    return max(steps)


def write_config(tmp_path: pathlib.Path, change: str) -> list[str]:
    """The flags of a config file made of the tiny one."""
    path = tmp_path / "changed.py"
    path.write_text(
        "import dataclasses, sys\n"
        f"sys.path.insert(0, {str(HERE)!r})\n"
        "import tiny_config\n"
        "from puredif_jax.data.images import NpzImages\n"
        "def get_config():\n"
        f"    config = tiny_config.get_config()\n    return {change}\n"
    )
    return [f"--config={path}", f"--config.workdir={tmp_path / 'run'}"]


def test_kill_9_changes_nothing(tmp_path, finished, one_device) -> None:
    """At a random moment of training, of reinforcement and of inversion: bit for bit
    what a run gives that was left alone, but for its baseline."""
    folder = tmp_path / "run"
    command = [*COMMAND, *tiny(folder, "--config.audit.baselines=()")]
    seed = time.time_ns()
    print(f"moments drawn by {seed}")  # shown if it fails
    rng = random.Random(seed)
    for stage, most in (("train", 11), ("reinforce_12", 5), ("puredif_trained_ode", 3)):
        step = rng.randint(1, most)
        process = subprocess.Popen(command, env=one_device, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 240
        while reached(folder, stage) < step and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        assert process.poll() in (None, 0), "it ended by itself"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (folder / "report.json").exists(), "the kills came too late to matter"
    subprocess.run(command, env=one_device, check=True, timeout=600)
    want, got = arrays(finished), arrays(folder)
    want = {k: v for k, v in want.items() if "elijah" not in k}
    assert want.keys() == got.keys()
    for name in want:
        np.testing.assert_array_equal(want[name], got[name], err_msg=name)


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory, one_device) -> tuple[str, pathlib.Path]:
    """The flag of a training without a backdoor, and an uninterrupted run of it."""
    change = (
        "dataclasses.replace(config, attack=None, amplification=None, audit=None, "
        "training=dataclasses.replace(config.training, steps=16))"
    )
    flags = write_config(tmp_path_factory.mktemp("pretraining"), change)
    subprocess.run([*COMMAND, *flags], env=one_device, check=True, timeout=600)
    return flags[0], pathlib.Path(flags[1].partition("=")[2])


def test_sigterm_stores_what_was_done_and_says_so(
    tmp_path, pretraining, one_device
) -> None:
    """Without a backdoor; the end is that of a whole run."""
    flag, finished = pretraining
    folder = tmp_path / "run"
    command = [*COMMAND, flag, f"--config.workdir={folder}"]
    process = subprocess.Popen(
        command, env=one_device, stderr=subprocess.PIPE, text=True
    )
    while reached(folder, "train") < 8 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert not (folder / "report.json").exists()
    assert process.returncode == 143, said
    assert "the same command goes on" in said and "Traceback" not in said
    stored = {int(p.name) for p in (folder / "checkpoints/train").iterdir()}
    assert max(stored) == reached(folder, "train")
    subprocess.run(command, env=one_device, check=True, timeout=600)
    whole, resumed = arrays(finished), arrays(folder)
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--config.trainning.steps=3"], ["trainning", "training", "did you mean"]),
        (["--config.training.steps=many"], ["training.steps", "many", "int"]),
        (["--config.training.steps=-1"], ["steps", "-1"]),
        (["--config.seed=4294967296"], ["seed", "4294967295", "4294967296"]),
        (["--config.weights=nothing/here"], ["nothing/here", "clean"]),
        (["--config.audit.weights=nothing/here"], ["nothing/here", "clean"]),
        (["--config.devices=999"], ["999"]),
        (["--config.workdir=gs://bucket/run"], ["gs://bucket/run", "folder"]),
        (["--config.workdir="], ["workdir is empty"]),
    ],
)
def test_bad_flags_end_in_one_sentence(tmp_path, capsys, flags, words) -> None:
    error = run(capsys, *tiny(tmp_path / "run", *flags))
    assert error.startswith("error: ") and "\n" not in error
    assert all(word in error for word in words), error
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_missing_data_is_named(tmp_path, capsys) -> None:
    flags = write_config(
        tmp_path, "dataclasses.replace(config, data=NpzImages('no/such.npz'))"
    )
    error = run(capsys, *flags)
    assert "no/such.npz" in error and "\n" not in error


def weights(change) -> dict:
    return jax.tree.map(change, draw_params(TINY))


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda x: x * np.float32(np.nan), ["NaN"]),
        (lambda x: np.concatenate([x, x], -1), ["[8]", "[4]"]),
        (lambda x: x.astype(np.float16), ["float16", "float32"]),
    ],
)
def test_bad_weights_are_named(tmp_path, capsys, change, words) -> None:
    path = tmp_path / "bad.safetensors"
    weight_file.save_weights(path, weights(change), {})
    error = run(capsys, *tiny(tmp_path / "run", f"--config.weights={path}"))
    assert "\n" not in error
    assert all(word.lower() in error.lower() for word in words), error


def test_another_config_in_the_same_folder_is_refused(finished, capsys) -> None:
    before = sorted(p.name for p in finished.rglob("*"))
    error = run(capsys, *tiny(finished, "--config.training.batch=16"))
    assert "training.batch" in error and "\n" not in error
    assert sorted(p.name for p in finished.rglob("*")) == before


def test_finished_run_is_not_run_again(finished, capsys, tmp_path) -> None:
    """Nor where it has been moved to, or on other devices."""
    before = (finished / "metrics.jsonl").read_text()
    moved = shutil.copytree(finished, tmp_path / "moved")
    assert run(capsys, *tiny(moved, "--config.devices=2")) == ""
    assert (moved / "metrics.jsonl").read_text() == before


def test_a_run_waits_for_the_process_that_is_at_it(
    tmp_path, capsys, monkeypatch
) -> None:
    said = []
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)

        def wait(level, text, seconds, names) -> None:
            said.append(names)
            fcntl.flock(file, fcntl.LOCK_UN)

        monkeypatch.setattr(sweep.logging, "log_every_n_seconds", wait)
        flags = tiny(tmp_path, "--config.weights=nothing/here")
        assert "nothing/here" in run(capsys, *flags)
    assert said == [str(tmp_path)]


@pytest.mark.parametrize("content", ["{", "[1]", "7"])
def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys, content) -> None:
    (tmp_path / "config.json").write_text(content)
    assert "is not the configuration of a run" in run(capsys, *tiny(tmp_path))
    assert (tmp_path / "config.json").read_text() == content
    file = tmp_path / "file"
    file.write_text("")
    for place in (file, file / "below"):
        assert "no folder that can be written to" in run(capsys, *tiny(place))


def test_command_line_exit_code(tmp_path) -> None:
    done = subprocess.run(
        [*COMMAND, *tiny(tmp_path, "--config.sede=1")], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "sede" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_names_the_flags_and_the_fields_of_a_config(capsys, flag) -> None:
    for rest in ([], [f"--config={HERE / 'tiny_config.py'}"]):
        with pytest.raises(SystemExit) as ended:
            main.parse(["main", flag, *rest])
        assert not ended.value.code
        said = capsys.readouterr().out
        assert ("--config.NAME=VALUE" in said) == (not rest)
        assert ("The smallest whole run" in said) == bool(rest)
        assert ("--config.training.steps=12" in said) == bool(rest)


def test_the_version_is_told(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main.parse(["main", "--version"])
    assert not ended.value.code
    assert capsys.readouterr().out.startswith("puredif_jax 0.")


@pytest.mark.parametrize(
    "argv,words",
    [
        (["--cost=maybe"], "--cost=maybe"),
        ([f"--config={HERE / 'other.py'}"], "returns a Training: expected an"),
    ],
)
def test_what_is_no_run_is_said(tmp_path, argv, words) -> None:
    other = tmp_path / "other.py"
    other.write_text(
        "from puredif_jax.attacks.training import Training\n"
        "def get_config(): return Training(3, warmup=1)\n"
    )
    argv = [arg.replace(str(HERE / "other.py"), str(other)) for arg in argv]
    with pytest.raises(SystemExit, match=f"^error: .*{words}"):
        main.parse(["main", *argv])


def test_ctrl_c_is_told_and_ends_with_its_status(tmp_path, monkeypatch) -> None:
    def pressed(scan) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scan, "perform_scan", pressed)
    path = HERE.parent / "configs" / "scan.py"
    argv = [f"--config={path}", f"--config.workdir={tmp_path}"]
    with pytest.raises(SystemExit) as ended:
        main.main(main.parse(["main", *argv]))
    assert ended.value.code == 130


def test_a_wrong_path_does_not_bind_the_folder(tmp_path, capsys) -> None:
    for name in ("nowhere", "nor/here"):
        error = run(capsys, *tiny(tmp_path, f"--config.weights={name}"))
        assert name in error and "holds a run" not in error


def test_config_is_hashable_and_json() -> None:
    experiment = get_config()
    assert hash(experiment) == hash(dataclasses.replace(experiment))
    assert config.to_dict(experiment)["model"]["block_out_channels"] == [4]


@pytest.mark.parametrize("status", [0, 1, 2, 3])
def test_a_scan_ends_with_the_status_of_what_it_found(
    tmp_path, monkeypatch, status
) -> None:
    found = types.SimpleNamespace(verdict="so it is")
    monkeypatch.setattr(scan, "perform_scan", lambda wanted: (found, status))
    path = HERE.parent / "configs" / "scan.py"
    argv = [f"--config={path}", f"--config.workdir={tmp_path}"]
    ended = 0
    try:
        main.main(main.parse(["main", *argv]))
    except SystemExit as stop:
        ended = stop.code
    assert ended == status
