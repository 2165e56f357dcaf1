"""Many runs by one command: shared, resumed, and none lost to another's bad input."""

import csv
import dataclasses
import json
import pathlib
import signal
import subprocess
import sys
import threading

import pytest
from tiny_config import TINY, draw_params

from puredif_jax.attacks.targets import Hat
from puredif_jax.attacks.training import Training
from puredif_jax.attacks.triggers import Box
from puredif_jax.attacks.villandiffusion import VillanDiffusion
from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.diffusion.schedules import ScaledLinearBetas
from puredif_jax.runs import weight_file
from puredif_jax.runs.binding import is_run
from puredif_jax.stages import programs
from puredif_jax.stages.evaluation import Evaluation
from puredif_jax.stages.experiment import Experiment, Sweep
from puredif_jax.stages.sweep import in_turn, perform_sweep
from puredif_jax.types import InputError

AT_IT = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("!", end="", flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    weight_file.save_weights(path, draw_params(TINY), {})
    return str(path)


def experiment(name: str, weights: str, **changes) -> Experiment:
    """The success of an attack in eight draws."""
    return Experiment(
        workdir=name,
        model=TINY,
        weights=weights,
        attack=VillanDiffusion(trigger=Box(), target=Hat()),
        evaluation=Evaluation(draws=8, batch=8, deterministic=DDIM(steps=2)),
        **changes,
    )


@pytest.fixture(autouse=True)
def compilation_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))


def sweep(folder: pathlib.Path, *experiments: Experiment, only: str = "*") -> Sweep:
    return Sweep(str(folder), experiments, only)


def finished(folder: pathlib.Path) -> list[str]:
    return sorted(p.parent.name for p in folder.glob("*/*/report.json"))


def test_runs_are_shared_resumed_and_put_into_one_table(tmp_path, weights) -> None:
    folder = tmp_path / "sweep"
    runs = (experiment("a/one", weights), experiment("a/two", weights, seed=1))
    assert perform_sweep(sweep(folder, *runs, only="*/one")) is None
    assert finished(folder) == ["one"]
    before = (folder / "a/one/report.json").stat().st_mtime_ns
    (folder / "a/two").mkdir()
    other = subprocess.Popen(  # another process is at it, until it dies
        [sys.executable, "-c", AT_IT, str(folder / "a/two/lock")],
        stdout=subprocess.PIPE,
    )
    assert other.stdout is not None and other.stdout.read(1) == b"!"
    death = threading.Timer(3, other.kill)
    death.start()
    assert perform_sweep(sweep(folder, *runs)) is not None
    assert other.poll() == -signal.SIGKILL, "it was not waited for"
    other.communicate()
    assert (folder / "a/one/report.json").stat().st_mtime_ns == before
    report = json.loads((folder / "report.json").read_text())
    (section,) = report["sections"]
    assert section["title"] == "success"
    assert {row["run"] for row in section["table"]} == {"a/one", "a/two"}
    with (folder / "success.csv").open() as file:
        read = list(csv.DictReader(file))
    shown = [{k: str(v) for k, v in row.items()} for row in section["table"]]
    assert read == shown
    changed = experiment("a/one", weights, seed=5)
    with pytest.raises(InputError, match="a/one holds a run with another seed"):
        perform_sweep(sweep(folder, changed, runs[1]))


def test_runs_on_equal_networks_share_their_programs(tmp_path, weights) -> None:
    programs.drawing.cache_clear()
    one = experiment("one", weights)
    made = []
    for other in (
        one,
        dataclasses.replace(one, workdir="seed", seed=1),
        dataclasses.replace(
            one,
            workdir="batch",
            evaluation=dataclasses.replace(one.evaluation, batch=4),
        ),
        dataclasses.replace(one, workdir="schedule", schedule=ScaledLinearBetas()),
    ):
        perform_sweep(sweep(tmp_path, other))
        made.append(programs.drawing.cache_info().misses)
    assert made == [1, 1, 2, 3]


def test_bad_input_of_one_run_does_not_stop_the_others(tmp_path, weights) -> None:
    runs = (experiment("a/bad", "no/such"), experiment("a/good", weights))
    with pytest.raises(InputError, match="1 of 2 runs .*a/bad.* 'no/such'"):
        perform_sweep(sweep(tmp_path, *runs))
    assert finished(tmp_path) == ["good"]


@pytest.mark.parametrize(
    "names,only", [((), "*"), (("a", "a"), "*"), (("a", "b"), "c*")]
)
def test_a_sweep_needs_runs(names, only) -> None:
    with pytest.raises(ValueError, match="run"):
        Sweep("sweep", tuple(experiment(name, "clean") for name in names), only)


def test_a_folder_that_cannot_be_locked_is_used_with_a_warning(
    tmp_path, monkeypatch, caplog
) -> None:
    import errno
    import fcntl

    def unsupported(file, how):
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    folders = [tmp_path / "a", tmp_path / "b"]
    assert list(in_turn(folders)) == [0, 1]
    assert "start no second call" in caplog.text


def test_a_lock_that_cannot_be_opened_is_a_sentence(tmp_path) -> None:
    """Root may open any file, but not a folder as one."""
    (tmp_path / "lock").mkdir()
    with pytest.raises(InputError, match="lock cannot be opened .Is a directory"):
        next(in_turn([tmp_path]))


def test_a_run_names_another_whose_model_it_starts_from(tmp_path) -> None:
    """Wherever the sweep lies; a name of the zoo stays the model that ships."""
    base = experiment("base", "x.safetensors", training=Training(3, warmup=1))
    runs = (base, experiment("next", "base"), experiment("clean", "clean"))
    for home in ("one", "two"):
        placed = sweep(tmp_path / home, *runs).placed()
        wanted = [
            "x.safetensors",
            str(tmp_path / home / "base" / "weights.safetensors"),
            "clean",
        ]
        assert [each.weights for each in placed] == wanted


def test_a_table_has_rows_of_its_own_configuration_alone(
    tmp_path, weights, caplog
) -> None:
    """A run that was not asked for may be of another one: then there is no table."""
    runs = (experiment("a", weights), experiment("b", weights))
    assert perform_sweep(sweep(tmp_path, *runs)) is not None
    changed = (runs[0], experiment("b", weights, seed=5))
    assert perform_sweep(sweep(tmp_path, *changed, only="a")) is None
    assert "no table of all runs" in caplog.text and "another seed" in caplog.text


@pytest.mark.parametrize("weights", ["b", "later"])
def test_a_run_starts_from_one_before_it_that_trains(weights) -> None:
    runs = (
        experiment("b", "clean"),
        experiment("a", weights),
        experiment("later", "clean", training=Training(3, warmup=1)),
    )
    with pytest.raises(ValueError, match=f"a starts from {weights}, which must be a"):
        Sweep("sweep", runs)


def test_a_sweep_that_was_moved_goes_on(tmp_path) -> None:
    """Its runs may start from one another; what lies elsewhere stays bound."""

    def config(home: str, weights: str) -> dict:
        return {"workdir": f"{home}/next", "weights": weights}

    folder = tmp_path / "two" / "next"
    (folder / "results").mkdir(parents=True)
    old = config(f"{tmp_path}/one", f"{tmp_path}/one/base/weights.safetensors")
    (folder / "config.json").write_text(json.dumps(old))
    new = config(f"{tmp_path}/two", f"{tmp_path}/two/base/weights.safetensors")
    assert is_run(folder, new)
    with pytest.raises(InputError, match="another weights"):
        is_run(folder, config(f"{tmp_path}/two", f"{tmp_path}/other.safetensors"))
