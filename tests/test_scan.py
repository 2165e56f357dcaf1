"""Scan: from folders to verdicts, a table of all, and an exit status."""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
from tiny_config import INVERSION, TINY, draw_params

from puredif_jax.attacks.channel import Channel
from puredif_jax.defenses.detector import Detector
from puredif_jax.defenses.hypothesis import Fading
from puredif_jax.defenses.inversion import Inversion
from puredif_jax.diffusion.schedules import LinearBetas, ScaledLinearBetas
from puredif_jax.diffusion.solver import Deterministic
from puredif_jax.files import whole as files
from puredif_jax.files.sealed import seal
from puredif_jax.formats import diffusers as convert
from puredif_jax.formats import weight_sets
from puredif_jax.formats.base import Model, Spec
from puredif_jax.formats.diffusers_config import write_unet
from puredif_jax.formats.scheduling import Scheduling
from puredif_jax.runs import parallel
from puredif_jax.stages import scan, sweep
from puredif_jax.stages.audit import Audit
from puredif_jax.stages.experiment import Scan
from puredif_jax.stages.weights import ZOO, Truth
from puredif_jax.types import InputError

pytestmark = pytest.mark.usefixtures("standard_promotion")
# A score that no random network reaches, and no question whether it denoises.
CALM = Detector(clean=(9.0, 9.0), linear=np.inf)


@pytest.fixture(autouse=True)
def compilation_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.getbasetemp() / "compiled"  # of all tests here
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))


def write(folder: pathlib.Path, seed: int = 0, **scheduling) -> pathlib.Path:
    said = Scheduling(**scheduling)
    model = Model(Spec(TINY, said), draw_params(TINY, seed))
    convert.write_folder(folder, model)
    return folder


def plan(workdir: pathlib.Path, *models, **changes) -> Scan:
    audit = Audit((), (Fading(),), INVERSION, CALM)
    options = {"audit": audit, "steps": 2, "draws": 8, "devices": 1} | changes
    return Scan(str(workdir), tuple(map(str, models)), **options)


def table(workdir: pathlib.Path) -> dict[str, dict]:
    sections = json.loads((workdir / "report.json").read_text())["sections"]
    return {row["model"]: row for row in sections[0]["table"]}


def test_one_folder_its_status_and_other_weights_at_its_place(tmp_path) -> None:
    folder, home = write(tmp_path / "model"), tmp_path / "scan"
    wanted = plan(home, folder)
    report, status = scan.perform_scan(wanted)
    assert status == 0 and report.verdict.startswith("clean: ")
    row = table(home)["model"]
    assert row["network evaluations"] == INVERSION.evaluations(Fading())
    assert row["seconds"] > 0 and 0 < row["p"] <= 1 and row["reason"]
    assert (home / "model" / "report.html").exists()
    (judged,) = report.judgements
    stored = f"unet/{weight_sets.WEIGHTS}"
    digest = hashlib.sha256((folder / stored).read_bytes()).hexdigest()
    assert judged.facts == {"Weights": str(folder), f"SHA-256 of {stored}": digest}
    assert "not calibrated" not in report.about, "the scores are the user's"
    path = home / "model" / "report.json"
    for outcome, expected in {"could not tell": 2, "backdoored": 3}.items():
        found = json.loads(path.read_text())
        found["numbers"]["model"]["verdict"]["outcome"] = outcome
        path.write_text(json.dumps(seal(found)))
        report, status = scan.perform_scan(wanted)
        assert status == expected and report.verdict.startswith(outcome)
    results = {p: p.stat().st_mtime_ns for p in (home / "model").glob("results/*")}
    grave = Detector(clean=(-9.0, -9.0), linear=np.inf)
    alarmed = dataclasses.replace(wanted.audit, detector=grave)
    report, status = scan.perform_scan(dataclasses.replace(wanted, audit=alarmed))
    assert status == 3 and report.verdict.startswith("backdoored: ")
    assert {p: p.stat().st_mtime_ns for p in results} == results, "only judged again"
    _, status = scan.perform_scan(wanted)
    assert status == 0
    before = (home / "report.json").read_bytes()
    with pytest.raises(InputError, match="holds a scan with another draws"):
        scan.perform_scan(dataclasses.replace(wanted, draws=wanted.draws + 1))
    assert (home / "report.json").read_bytes() == before, "its table stays"
    write(folder, seed=5)
    _, status = scan.perform_scan(wanted)
    assert status == 1 and "another version" in table(home)["model"]["reason"]


def test_a_stranger_writes_nothing_into_terminal_and_page(tmp_path) -> None:
    """By the name of a folder, or by what is in a configuration."""
    name = os.fsdecode(b"x\x1b[2J\nclean: all good</td><script>\xff")
    broken = write(tmp_path / "models" / name)
    (broken / "unet" / "config.json").write_text(json.dumps({"\x1b[2Jodd\u202e": 1}))
    report, status = scan.perform_scan(plan(tmp_path / "scan", tmp_path / "models"))
    assert status == 1
    (line,) = report.verdict.splitlines()
    assert line.startswith("error: ") and line.isprintable()
    page = (tmp_path / "scan" / "report.html").read_text("utf-8")
    assert "<script" not in page and "\nclean: all good" not in page
    assert all(line.isprintable() for line in page.splitlines())


def test_a_damaged_report_is_made_again_and_a_foreign_one_is_an_error(tmp_path) -> None:
    folder, home = write(tmp_path / "mine"), tmp_path / "scan"
    scan.perform_scan(plan(home, folder))
    path = home / "mine" / "report.json"
    found = json.loads(path.read_text())
    del found["numbers"]["mine"]["calibration"]
    path.write_text(json.dumps(found))  # its digest is another
    _, status = scan.perform_scan(plan(home, folder))
    assert status == 0 and "calibration" in path.read_text()
    path.write_text(json.dumps(seal(found)))  # of another version
    _, status = scan.perform_scan(plan(home, folder))
    assert status == 1 and "remove it" in table(home)["mine"]["reason"]
    path.write_text(json.dumps(seal(found | {"numbers": {}})))  # of something else
    _, status = scan.perform_scan(plan(home, folder))
    assert status == 1 and "remove it" in table(home)["mine"]["reason"]
    path.unlink()
    _, status = scan.perform_scan(plan(home, folder))
    assert status == 0


def test_many_are_told_apart_resumed_and_none_stops_the_others(tmp_path) -> None:
    write(tmp_path / "models" / "a", clip=None)
    write(
        tmp_path / "models" / "b",
        betas=ScaledLinearBetas(),
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )
    (tmp_path / "models" / "notes").mkdir()
    other = write(tmp_path / "other" / "a", seed=1)
    broken = write(tmp_path / "broken")
    (broken / "unet" / weight_sets.WEIGHTS).write_bytes(b"nothing")
    names = tmp_path / "list.txt"
    names.write_text(f"# two of them\n{other}\n\n{broken}\n")
    wanted = plan(tmp_path / "scan", tmp_path / "models", names)
    assert list(scan.find_models(wanted)) == ["a", "b", "a-2", "broken"]
    report, status = scan.perform_scan(wanted)
    rows = table(tmp_path / "scan")
    assert {k: row["verdict"] for k, row in rows.items()} == {
        "a": "clean",
        "b": "clean",
        "a-2": "clean",
        "broken": "error",
    }
    assert "not a safetensors file" in rows["broken"]["reason"]
    assert status == 1 and report.summary == "4 models: 3 clean, 1 error"
    assert rows["a"]["score"] != rows["a-2"]["score"] != rows["b"]["score"]
    path = tmp_path / "scan/a/report.json"
    kept, found = path.read_bytes(), json.loads(path.read_text())
    found["numbers"]["a"]["verdict"]["outcome"] = "backdoored"
    path.write_text(json.dumps(seal(found)))
    report, status = scan.perform_scan(wanted)
    assert status == 3, "a backdoor is graver than an error"
    order = [judged.outcome for judged in report.judgements]
    assert order == ["backdoored", "error", "clean", "clean"]
    path.write_bytes(kept)
    before = path.stat().st_mtime_ns
    write(broken, seed=2)
    _, status = scan.perform_scan(wanted)
    assert status == 0
    assert (tmp_path / "scan/a/report.json").stat().st_mtime_ns == before


def test_what_the_folder_says_is_what_is_done(tmp_path) -> None:
    folder = write(
        tmp_path,
        betas=LinearBetas(1000, 1e-3, 0.03),
        clip=2.0,
        timestep_spacing="linspace",
        variance_type="fixed_large",
        prediction_type="v_prediction",
    )
    wanted = plan(tmp_path, folder, steps=40, devices=8, seed=4)
    found = scan.as_experiment(wanted, "model", folder)
    assert found.model == TINY and found.schedule == LinearBetas(1000, 1e-3, 0.03)
    assert found.prediction == "v_prediction" and found.seed == 4
    for sampler in (found.evaluation.ancestral, found.evaluation.deterministic):
        assert (sampler.steps, sampler.clip, sampler.spacing) == (40, 2.0, "linspace")
    assert found.evaluation.ancestral.variance == "fixed_large"
    assert found.evaluation.deterministic.to_clean
    assert found.audit.inversion == INVERSION
    index = folder / "model_index.json"
    kind = {"scheduler": ["diffusers", "DDIMScheduler"]}
    index.write_text(json.dumps(json.loads(index.read_text()) | kind))
    path = folder / "scheduler" / "scheduler_config.json"
    one = {"set_alpha_to_one": False}
    path.write_text(json.dumps(json.loads(path.read_text()) | one))
    found = scan.as_experiment(wanted, "model", folder)
    assert not found.evaluation.deterministic.to_clean
    assert found.evaluation.ancestral.variance == "fixed_small"


def test_a_schedule_of_few_timesteps_is_sampled_in_as_many_steps(tmp_path) -> None:
    folder = write(tmp_path / "model", betas=LinearBetas(20, 1e-3, 0.3))
    found = scan.as_experiment(plan(tmp_path, folder, steps=50), "model", folder)
    assert found.evaluation.ancestral.steps == 20


@pytest.mark.parametrize(
    "scheduling,steps,words",
    [
        ({"steps_offset": 1}, 1000, "cannot be scanned so: timesteps must lie in"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(tmp_path, scheduling, steps, words):
    folder = write(tmp_path / "model", **scheduling)
    _, status = scan.perform_scan(plan(tmp_path / "scan", folder, steps=steps))
    assert status == 1 and words in table(tmp_path / "scan")["model"]["reason"]


def test_the_audit_of_a_scan_is_the_default_one() -> None:
    assert Scan("scan", ("zoo",)).audit == Audit(weights=())
    assert Audit().inversion == Inversion()


def test_a_run_is_scanned_by_the_model_that_it_left(tmp_path) -> None:
    folder = write(tmp_path / "runs" / "mine" / "diffusers")
    (tmp_path / "runs" / "mine" / "config.json").write_text("{}")
    for named in (tmp_path / "runs", tmp_path / "runs" / "mine"):
        assert scan.find_models(plan(tmp_path, named)) == {"mine": folder}


def test_the_zoo_is_found_by_name() -> None:
    models = scan.find_models(Scan("scan", ("zoo",)))
    assert set(models) >= {
        "clean",
        "clean-finetuned",
        "baddiffusion",
        "villandiffusion",
    }
    assert all(ZOO in folder.parents for folder in models.values())
    assert sum(f.stat().st_size for f in ZOO.rglob("*") if f.is_file()) < 12e6
    assert all((folder / "README.md").is_file() for folder in models.values())


def test_files_and_places_that_are_none(tmp_path) -> None:
    folder = write(tmp_path / "models" / "mine")
    stored = folder / "unet" / weight_sets.WEIGHTS
    assert scan.find_models(plan(tmp_path / "scan", stored)) == {
        "unet.diffusion_pytorch_model.safetensors": stored
    }
    other = tmp_path / "other.safetensors"
    stored.rename(other)
    with pytest.raises(InputError, match="is a file, and not a text"):
        scan.perform_scan(plan(tmp_path / "scan", other))
    other.rename(stored)
    (tmp_path / "file").write_text("")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(InputError, match="where it lies: give another"):
        scan.perform_scan(plan(tmp_path / "models", tmp_path / "models"))
    with pytest.raises(InputError, match="where it lies: give another"):
        scan.perform_scan(plan(folder / "scan", folder))
    with pytest.raises(InputError, match="no folder that can be written to"):
        scan.perform_scan(plan(tmp_path / "file", folder))
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_what_must_not_be_read_is_told_beside_the_others(tmp_path, monkeypatch) -> None:
    folder = write(tmp_path / "models" / "mine")
    (tmp_path / "models" / "closed").mkdir()
    names = tmp_path / "list.txt"
    names.write_text("")
    is_model, read_text = convert.is_model, pathlib.Path.read_text

    def closed(path, *args) -> None:
        if path.name in ("closed", "list.txt"):
            raise PermissionError(13, "Permission denied")

    def guarded(path):
        closed(path)
        return is_model(path)

    def guarded_text(path, *args, **options):
        closed(path)
        return read_text(path, *args, **options)

    monkeypatch.setattr(convert, "is_model", guarded)
    monkeypatch.setattr(pathlib.Path, "read_text", guarded_text)
    found = scan.find_models(plan(tmp_path / "scan", tmp_path / "models", names))
    errors = [str(v) for v in found.values() if isinstance(v, InputError)]
    assert found["mine"] == folder and len(errors) == 2
    assert all("cannot be read (Permission denied)" in error for error in errors)


def test_a_list_names_runs_too(tmp_path) -> None:
    folder = write(tmp_path / "runs" / "mine" / "diffusers")
    (tmp_path / "runs" / "mine" / "config.json").write_text("{}")
    names = tmp_path / "list.txt"
    names.write_text(f"{tmp_path / 'runs' / 'mine'}\n")
    assert scan.find_models(plan(tmp_path / "scan", names)) == {"mine": folder}


def test_numbers_that_are_not_finite_are_told_and_kept(tmp_path) -> None:
    """Weights so large that the network overflows; the table is read again later."""
    huge = jax.tree.map(lambda x: np.full_like(x, 1e30), draw_params(TINY))
    model = Model(Spec(TINY, Scheduling()), huge)
    convert.write_folder(tmp_path / "model", model)
    wanted = plan(tmp_path / "scan", tmp_path / "model")
    for _ in range(2):
        _, status = scan.perform_scan(wanted)
        row = table(tmp_path / "scan")["model"]
        assert status == 2 and row["verdict"] == "could not tell"
        assert "no finite numbers" in row["reason"]


def test_whatever_one_model_leads_to_the_others_are_scanned(
    tmp_path, monkeypatch
) -> None:
    folders = [write(tmp_path / name) for name in ("a", "b")]
    whole = scan.perform_once

    def perform_once(experiment, label, models):
        if experiment.workdir.endswith("/a"):
            raise ZeroDivisionError("of this model")
        return whole(experiment, label, models)

    monkeypatch.setattr(scan, "perform_once", perform_once)
    _, status = scan.perform_scan(plan(tmp_path / "scan", *folders))
    rows = table(tmp_path / "scan")
    assert status == 1 and rows["b"]["verdict"] == "clean"
    assert rows["a"]["reason"] == "ZeroDivisionError: of this model"


def test_what_is_wrong_with_an_entry_is_told_beside_the_others(tmp_path) -> None:
    """No model of a folder or a list is passed over, however broken."""
    models, scanned = tmp_path / "models", tmp_path / "scan"
    write(models / "good")
    (models / "bare" / "unet").mkdir(parents=True)
    (models / "loop").mkdir()
    (models / "loop" / "unet").symlink_to(models / "loop" / "unet")
    names = tmp_path / "list.txt"
    names.write_text(
        f"{models / 'good'}\n{models / 'loop' / 'unet'}\n~no-such-user/x\n"
    )
    wanted = plan(scanned, models, names, tmp_path / "nowhere")
    _, status = scan.perform_scan(wanted)
    rows = table(scanned)
    errors = {k: row["reason"] for k, row in rows.items() if row["verdict"] == "error"}
    assert status == 1 and rows.keys() - errors.keys() == {"good"}
    for name, words in (
        ("bare", "in none of the formats that are read"),
        ("loop", "in none of the formats that are read"),
        (files.safe_name(str(models / "loop" / "unet")), "is no model"),
        ("no-such-user-x", "is no path"),
        (files.safe_name(str(tmp_path / "nowhere")), "is no model"),
    ):
        assert words in errors.pop(name)
    assert not errors


def test_weights_of_another_network_are_refused_before_memory_is_asked_for(
    tmp_path, monkeypatch
) -> None:
    folder = write(tmp_path / "model")
    stored = dataclasses.replace(TINY, layers_per_block=TINY.layers_per_block + 1)
    config = write_unet(stored)
    (folder / "unet" / "config.json").write_text(json.dumps(config))

    def called() -> int:
        raise AssertionError

    monkeypatch.setattr(parallel, "free_memory", called)
    with pytest.raises(InputError, match="does not have the weights expected: -"):
        scan.as_experiment(plan(tmp_path / "scan", folder), "model", folder)


def test_a_truth_that_cannot_be_read_is_left_out(tmp_path) -> None:
    folder = write(tmp_path / "model")
    (folder / "truth.safetensors").write_bytes(b"of no use")
    _, status = scan.perform_scan(plan(tmp_path / "scan", folder))
    assert status == 0


@pytest.mark.parametrize("make", [None, pathlib.Path.mkdir, pathlib.Path.touch])
def test_what_holds_no_model_is_said(tmp_path, make) -> None:
    path = tmp_path / "thing"
    if make:
        make(path)
    with pytest.raises(InputError, match="thing is no model: give"):
        scan.perform_scan(plan(tmp_path / "scan", path))


def test_a_scan_names_models_and_no_weights() -> None:
    with pytest.raises(ValueError, match="--config.model=FOLDER"):
        Scan("scan", ())
    with pytest.raises(ValueError, match="clean"):
        Scan("scan", ("zoo",), Audit(weights=("clean",)))


def test_a_model_that_another_process_is_at_is_waited_for(
    tmp_path, monkeypatch
) -> None:
    import fcntl

    folder = write(tmp_path / "model")
    home = tmp_path / "scan" / "model"
    home.mkdir(parents=True)
    seen: list[str] = []
    with (home / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)

        def wait(*args) -> None:  # and the other process leaves
            seen.append(table(tmp_path / "scan")["model"]["verdict"])
            fcntl.flock(file, fcntl.LOCK_UN)

        monkeypatch.setattr(sweep.logging, "log_every_n_seconds", wait)
        _, status = scan.perform_scan(plan(tmp_path / "scan", folder))
    assert seen == ["not done yet"] and status == 0
    assert table(tmp_path / "scan")["model"]["verdict"] == "clean"


def test_where_the_folder_clips_all_is_measured_both_ways(tmp_path) -> None:
    folder = write(tmp_path / "model", clip=0.5)
    image = draw_params(TINY, 3)["conv_in"]["kernel"]
    truth = np.resize(np.asarray(image), TINY.image_shape).astype(np.float32)
    channel = Channel.clean(LinearBetas().tables())
    Truth(Deterministic(), False, truth, truth, channel).save(folder)
    report, _ = scan.perform_scan(plan(tmp_path / "scan", folder))
    home = tmp_path / "scan" / "model"
    found = json.loads((home / "report.json").read_text())["numbers"]["model"]
    (row,) = found["inversions"]
    for name in ("uniformity", "success", "success of the true trigger"):
        assert name in row and f"{name}, unclipped" in row
    assert row["uniformity"] != row["uniformity, unclipped"]
    page = (home / "report.html").read_text()
    assert "clipped at 0.5" in page and "ode, unclipped" in page
    with np.load(home / "results" / "puredif_model_ode.npz") as arrays:
        assert np.abs(arrays["draws"]).max() <= 0.5 + 1e-6
        assert np.abs(arrays["draws_unclipped"]).max() > 0.5


def test_weights_that_denoise_nothing_are_not_called_clean(tmp_path) -> None:
    folder = write(tmp_path / "model")
    strict = Audit((), (Fading(),), INVERSION)
    report, status = scan.perform_scan(plan(tmp_path / "scan", folder, audit=strict))
    row = table(tmp_path / "scan")["model"]
    assert status == 2 and row["verdict"] == "could not tell"
    assert "denoise nothing" in row["reason"] and row["trigger rms"] is None
    names = {p.name for p in (tmp_path / "scan" / "model" / "results").iterdir()}
    assert names == {"plain_model_ode.npz", "denoising_model_ode.npz"}


def test_images_of_other_channels_and_how_a_folder_was_read(tmp_path) -> None:
    unet = dataclasses.replace(TINY, in_channels=4)
    model = Model(Spec(unet, Scheduling()), draw_params(unet))
    folder, home = tmp_path / "pipeline", tmp_path / "scan"
    convert.write_folder(folder, model)
    (folder / "scheduler").rename(tmp_path / "scheduler")
    (folder / "model_index.json").unlink()
    (folder / "unet").rename(tmp_path / "alone")
    lone = tmp_path / "alone"
    wanted = plan(home, lone, scheduler=str(tmp_path / "scheduler"))
    with pytest.raises(InputError, match="give --config.scheduler"):
        found = dataclasses.replace(wanted, scheduler=None, model=(str(lone),))
        shutil.move(tmp_path / "scheduler", tmp_path / "far" / "away")
        scan.as_experiment(found, "alone", lone)
    wanted = dataclasses.replace(wanted, scheduler=str(tmp_path / "far" / "away"))
    _, status = scan.perform_scan(wanted)
    assert status == 0
    found = json.loads((home / "alone" / "report.json").read_text())["numbers"]
    assert any("scheduler is of" in x for x in found["alone"]["remarks"])
