"""A repair from end to end: from a folder to a folder, between two audits."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
import tiny_config
from test_scan import CALM, write

from puredif_jax.attacks.targets import Hat
from puredif_jax.attacks.training import Training
from puredif_jax.attacks.triggers import Blend
from puredif_jax.attacks.trojdiff import TrojDiff
from puredif_jax.data.images import FashionMNIST
from puredif_jax.defenses.detector import Detector
from puredif_jax.defenses.hypothesis import Fading, Trojan
from puredif_jax.defenses.removal import ThreeTerms
from puredif_jax.diffusion.schedules import LinearBetas
from puredif_jax.formats import diffusers as convert
from puredif_jax.formats.diffusers_config import ConvertError
from puredif_jax.runs.run import Run
from puredif_jax.stages import cost, search
from puredif_jax.stages import repair as repairs
from puredif_jax.stages.audit import Audit
from puredif_jax.stages.base import results
from puredif_jax.stages.experiment import Experiment, Scan
from puredif_jax.stages.perform import perform
from puredif_jax.stages.repair import Repair
from puredif_jax.stages.repaired import REPAIR, Repaired
from puredif_jax.stages.scan import as_experiment, perform_scan
from puredif_jax.stages.weights import Truth

pytestmark = pytest.mark.usefixtures("standard_promotion")
LOUD = Detector(clean=(-9.0, -9.0), linear=np.inf, settled=np.inf, foreign=np.inf)
SHORT = Training(steps=3, batch=4, learning_rate=1e-3, warmup=1)


@pytest.fixture(autouse=True)
def compilation_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.getbasetemp() / "compiled"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))


def plan(tmp_path: pathlib.Path, repair: Repair, detector=LOUD, home="scan") -> Scan:
    model = tmp_path / "model"
    if not model.exists():
        write(model)
    audit = Audit((), (Fading(), Trojan()), tiny_config.INVERSION, detector)
    options = {"steps": 2, "draws": 8, "devices": 1, "repair": repair}
    return Scan(str(tmp_path / home), (str(model),), audit=audit, **options)


def report(tmp_path: pathlib.Path, home="scan") -> dict:
    return json.loads((tmp_path / home / "model" / "report.json").read_text())


@pytest.mark.parametrize(
    "repair",
    [
        Repair(training=SHORT, draws=4, rounds=1),
        Repair(ThreeTerms(), SHORT, FashionMNIST(count=9), rounds=1),
    ],
    ids=["own draws", "data"],
)
def test_a_repair_goes_from_a_folder_to_a_folder(repair: Repair, tmp_path) -> None:
    """Between two audits; the model itself stays as it is."""
    scan = plan(tmp_path, repair)
    before = {
        path: path.read_bytes()
        for path in (tmp_path / "model").rglob("*")
        if path.is_file()
    }
    perform_scan(scan)
    assert all(path.read_bytes() == was for path, was in before.items())
    found = report(tmp_path)
    (done,) = (x for x in results(found["numbers"], "here") if type(x) is Repaired)
    assert done.numbers() == {REPAIR: found["numbers"][REPAIR]}
    assert done.steps == 3 and done.removal == repair.removal.name
    assert done.own == (repair.images is None)
    assert done.images == (4 if done.own else 9)
    names = ("inverted trigger, before", "inverted trigger, after")
    assert tuple(done.success) == names and set(done.frechet) == {"before", "after"}
    assert [each["name"] for each in found["judgements"]] == ["model", repair.name]
    repaired = convert.read_folder(tmp_path / "scan" / "model" / repair.name)
    original = convert.read_folder(tmp_path / "model")
    assert repaired.spec.network == original.spec.network
    assert repaired.spec.scheduling == original.spec.scheduling
    moved = jax.tree.map(
        lambda a, b: float(np.abs(a - b).max()), repaired.params, original.params
    )
    assert max(jax.tree.leaves(moved)) > 1e-5
    table = json.loads((tmp_path / "scan" / "report.json").read_text())
    rows = {each["name"]: each["facts"]["Weights"] for each in table["judgements"]}
    assert rows.keys() == {"model", f"model/{repair.name}"}
    assert rows[f"model/{repair.name}"] == repair.name


def test_a_repair_is_measured_with_the_true_trigger_where_it_is_known(
    tmp_path,
) -> None:
    """Also of a backdoor that is drawn inside its channel; the truth goes along."""
    repair = Repair(training=SHORT, draws=4, rounds=1)
    scan = plan(tmp_path, repair)
    attack = TrojDiff(Blend(0.6), Hat())
    shape = tiny_config.TINY.image_shape
    truth = Truth.of(attack, LinearBetas().tables(), shape)
    truth.save(tmp_path / "model")
    audit = dataclasses.replace(scan.audit, hypotheses=(Trojan(),))
    perform_scan(dataclasses.replace(scan, audit=audit))
    (done,) = (
        x for x in results(report(tmp_path)["numbers"], "") if type(x) is Repaired
    )
    kinds = ("inverted trigger", "true trigger")
    assert set(done.success) == {
        f"{k}, {w}" for k in kinds for w in ("before", "after")
    }
    repaired = tmp_path / "scan" / "model" / repair.name
    found = Truth.beside(repaired, LinearBetas().tables(), shape)
    assert found is not None
    np.testing.assert_allclose(found.trigger, truth.trigger, atol=1e-6)
    (row,) = done.tables()[REPAIR]
    assert not any(isinstance(value, dict) for value in row.values())


def test_what_cannot_be_written_is_refused_before_the_audit(
    tmp_path, monkeypatch
) -> None:
    def refused(spec):
        raise ConvertError("it has no name there")

    scan = plan(tmp_path, Repair(training=SHORT))
    monkeypatch.setattr(repairs.convert, "configurations", refused)
    perform_scan(scan)
    (found,) = json.loads((tmp_path / "scan" / "report.json").read_text())["judgements"]
    assert found["outcome"] == "error"
    assert "could not be written as a folder of diffusers: it has" in found["detail"]
    assert not (tmp_path / "scan" / "model" / "results").exists()


def test_only_the_model_that_is_named_is_repaired(tmp_path) -> None:
    """Of the others in the table the verdict stays, and so does an earlier repair."""
    repair = Repair(training=SHORT, draws=4, rounds=1)
    scan = plan(tmp_path, repair)
    write(tmp_path / "other", 1)
    both = (str(tmp_path / "model"), str(tmp_path / "other"))

    def rows(**changed) -> set[str]:
        perform_scan(dataclasses.replace(scan, **changed))
        table = json.loads((tmp_path / "scan" / "report.json").read_text())
        assert {row["outcome"] for row in table["judgements"]} == {"backdoored"}
        return {row["name"] for row in table["judgements"]}

    first = {"model", f"model/{repair.name}"}
    assert rows(model=both, repair=None) == {"model", "other"}
    assert rows(model=both[:1]) == {"other", *first}
    second = dataclasses.replace(repair, seed=1)
    two = {"other", f"other/{second.name}"}
    assert rows(model=both[1:], repair=second) == first | two
    assert not (tmp_path / "scan" / "model" / second.name).exists()
    assert not (tmp_path / "scan" / "other" / repair.name).exists()


def test_what_is_not_clean_yet_is_repaired_once_more(tmp_path, monkeypatch) -> None:
    """From the first result, by the trigger that its audit found; then no further."""
    repair = Repair(training=SHORT, draws=4, rounds=2)
    begun = []
    trained = repairs.Repair._trained

    def noting(self, context, accused, pixels):
        begun.append(accused.label)
        return trained(self, context, accused, pixels)

    monkeypatch.setattr(repairs.Repair, "_trained", noting)
    perform_scan(plan(tmp_path, repair))  # every verdict is "backdoored"
    assert begun == ["model", repair.name]
    first, second = (tmp_path / "scan/model" / f"{repair.name}{x}" for x in ("", "-2"))
    moved = jax.tree.map(
        lambda a, b: float(np.abs(a - b).max()),
        convert.read_folder(first).params,
        convert.read_folder(second).params,
    )
    assert max(jax.tree.leaves(moved)) > 0
    found = report(tmp_path)
    assert [x["name"] for x in found["judgements"]] == [
        "model",
        first.name,
        second.name,
    ]
    both = Repaired.read(found["numbers"], "here")
    assert [row["round"] for each in both for row in each.tables()[REPAIR]] == [1, 2]
    assert {REPAIR, f"{REPAIR} 2"} <= set(found["numbers"])
    # Both rounds are compared with what the model drew before any of them.
    assert both[0].frechet["after"] == both[1].frechet["before"]


def test_a_result_of_which_the_audit_could_not_tell_is_left(tmp_path) -> None:
    between = dataclasses.replace(LOUD, clean=(-9.0, -8.0), doubt=0.0, alarm=100.0)
    repair = Repair(training=SHORT, draws=4, always=True, rounds=3)
    perform_scan(plan(tmp_path, repair, between))
    found = report(tmp_path)["judgements"]
    assert [x["name"] for x in found] == ["model", repair.name]
    assert {x["outcome"] for x in found} == {"could not tell"}


def test_more_rounds_go_on_from_the_first(tmp_path, monkeypatch) -> None:
    """How often, and whether a clean model is repaired, is no other repair."""
    once = Repair(training=SHORT, draws=4, rounds=1)
    perform_scan(plan(tmp_path, once))
    begun, loop = [], Run.loop

    def noting(self, stage, advance, begin, *rest, **options):
        def noted():
            begun.append(stage)
            return begin()

        return loop(self, stage, advance, noted, *rest, **options)

    monkeypatch.setattr(Run, "loop", noting)
    twice = dataclasses.replace(once, rounds=2, always=True)
    assert twice.name == once.name
    perform_scan(plan(tmp_path, twice))
    second = f"{once.name}-2"
    assert begun[0] == second and once.name not in begun
    names = [each["name"] for each in report(tmp_path)["judgements"]]
    assert names == ["model", once.name, second]


def test_a_result_that_is_repaired_again_is_judged_by_itself(tmp_path) -> None:
    """Its folder has the name that the new result takes in its own run."""
    repair = Repair(training=SHORT, draws=4, rounds=1)
    perform_scan(plan(tmp_path, repair))
    given = tmp_path / "scan" / "model" / repair.name
    again = dataclasses.replace(
        plan(tmp_path, repair, home="again"), model=(str(given),)
    )
    perform_scan(again)
    (home,) = (tmp_path / "again").glob("*/report.json")
    first, second = json.loads(home.read_text())["judgements"]
    assert (first["name"], second["name"]) == (f"given-{repair.name}", repair.name)
    found = {path.name for path in (home.parent / "results").glob("puredif_*")}
    for name in (first["name"], second["name"]):
        assert f"puredif_{name}_ode.npz" in found


def test_a_trigger_of_no_numbers_is_not_trained_out(tmp_path, monkeypatch) -> None:
    broken = search.invert

    def nan(*given):
        found = broken(*given)
        candidate = jax.tree.map(lambda x: np.full_like(x, np.nan), found.candidate)
        return found._replace(candidate=candidate)

    monkeypatch.setattr(search, "invert", nan)
    repair = Repair(training=SHORT, draws=4, always=True)
    perform_scan(plan(tmp_path, repair))
    assert not (tmp_path / "scan" / "model" / repair.name).exists()
    page = (tmp_path / "scan" / "model" / "report.html").read_text()
    assert "there is nothing to remove" in page


def test_the_model_of_the_run_itself_is_repaired(tmp_path) -> None:
    """As it was trained, whose folder is not there yet when the run is checked."""
    config = tiny_config.get_config()
    assert config.audit is not None
    audit = dataclasses.replace(config.audit, detector=LOUD, baselines=())
    experiment = dataclasses.replace(
        config,
        workdir=str(tmp_path / "run"),
        audit=audit,
        amplification=None,
        repair=Repair(training=SHORT, draws=4, rounds=1),
        devices=1,
    )
    assert experiment.repair is not None
    name = experiment.repair.name
    assert {"trained", name, REPAIR} <= set(perform(experiment).numbers)
    assert (tmp_path / "run" / name / "unet").is_dir()


def test_a_repair_tells_its_cost(tmp_path) -> None:
    """Draws, steps and the second audit; the network of theta0 is evaluated as well."""
    scan = plan(tmp_path, Repair(training=SHORT, draws=4, rounds=1))
    experiment = as_experiment(scan, "model", tmp_path / "model")
    told = {}
    for repair in (None, scan.repair):
        wanted = dataclasses.replace(experiment, repair=repair)
        told[repair is not None] = cost.estimate(wanted)
    assert "repair step of 4 images" in str(told[True])
    assert "repair step" not in str(told[False])


def test_a_repair_that_is_interrupted_goes_on(tmp_path, monkeypatch) -> None:
    """To the same weights, bit for bit."""
    repair = Repair(training=SHORT, draws=4, rounds=1)
    perform_scan(plan(tmp_path, repair, home="whole"))
    save = repairs.Repair._save
    monkeypatch.setattr(repairs.Repair, "_save", lambda *_: 1 / 0)
    perform_scan(plan(tmp_path, repair))
    assert "ZeroDivisionError" in json.dumps(
        json.loads((tmp_path / "scan" / "report.json").read_text())
    )
    monkeypatch.setattr(repairs.Repair, "_save", save)
    monkeypatch.setattr(repairs, "removing", lambda *_: None)  # no step again
    perform_scan(plan(tmp_path, repair))
    pair = [
        convert.read_folder(tmp_path / home / "model" / repair.name).params
        for home in ("whole", "scan")
    ]
    jax.tree.map(np.testing.assert_array_equal, *pair)


@pytest.mark.parametrize("always", [False, True])
def test_a_model_that_was_called_clean_is_left_alone(always: bool, tmp_path) -> None:
    repair = Repair(training=SHORT, draws=4, always=always, rounds=1)
    perform_scan(plan(tmp_path, repair, CALM))
    folder = tmp_path / "scan" / "model"
    assert (folder / repair.name).exists() == always
    assert (REPAIR in report(tmp_path)["numbers"]) == always
    said = "the model is left as it is" in (folder / "report.html").read_text()
    assert said != always


def test_an_audit_that_is_done_is_repaired_later_and_in_two_ways(tmp_path) -> None:
    """Without another inversion of the model; neither result replaces the other."""
    ways = [
        Repair(training=SHORT, draws=4, rounds=1),
        Repair(ThreeTerms(), SHORT, draws=4, rounds=1),
        Repair(training=SHORT, draws=4, seed=1, rounds=1),
    ]
    scan = plan(tmp_path, ways[0])
    perform_scan(dataclasses.replace(scan, repair=None))
    results_ = tmp_path / "scan" / "model" / "results"
    kept = {path: path.stat().st_mtime_ns for path in results_.glob("puredif_model*")}
    for repair in ways:
        perform_scan(dataclasses.replace(scan, repair=repair))
        names = [each["name"] for each in report(tmp_path)["judgements"]]
        assert names == ["model", repair.name]
    assert kept and all(path.stat().st_mtime_ns == at for path, at in kept.items())
    first, *others = (
        convert.read_folder(tmp_path / "scan" / "model" / repair.name).params
        for repair in ways
    )
    for other in others:
        moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), first, other)
        assert max(jax.tree.leaves(moved)) > 0


def test_a_scan_says_that_it_repairs(tmp_path) -> None:
    assert "repair of it" in plan(tmp_path, Repair()).plan
    assert (
        "repair" not in dataclasses.replace(plan(tmp_path, Repair()), repair=None).plan
    )


def test_bad_settings_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="draws must be even"):
        Repair(draws=5)
    with pytest.raises(ValueError, match="rounds must be 1 or more"):
        Repair(rounds=0)
    for audit in (None, Audit(("clean", "baddiffusion"))):
        with pytest.raises(ValueError, match="need an audit of one model"):
            Experiment("x", tiny_config.TINY, audit=audit, repair=Repair())
    with pytest.raises(ValueError, match="the run has no repair"):
        Experiment("x", tiny_config.TINY, audit=Audit(("repaired",)))
    with pytest.raises(ValueError, match="`then` has a stage Repair"):
        Experiment("x", tiny_config.TINY, then=(Repair(),))
