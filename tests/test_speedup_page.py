"""The page of factors: from points of trainings to cells."""

import json

import pytest
import speedup_page

from puredif_jax.metrics import measures as metrics
from puredif_jax.stages.amplify import AVERAGED, RAW, REINFORCED, TRUE, Amplified, Point

STEPS = (0, 50, 100, 1000, 10_000)
FIRES = {
    (TRUE, AVERAGED): (0.0, 0.0, 0.0, 0.5, 0.9),
    (TRUE, RAW): (0.0, 0.0, 0.0, 0.6, 1.0),
    (REINFORCED, AVERAGED): (0.1, 0.2, 0.95, 0.97, 0.98),
    (REINFORCED, RAW): (0.1, 0.2, 0.9, 0.97, 0.98),
}


def run(fires: dict = FIRES, steps: tuple = STEPS) -> dict:
    """As the record keeps it."""
    points = [
        Point(
            step,
            *kind,
            training=200 * step,
            reinforcement=20_000 if kind[0] == REINFORCED else 0,
            rates=dict.fromkeys(metrics.SUCCESS, rates[i]),
            norm_ratio=1.0,
            cosine=1.0,
            seconds=0.0,
        )
        for i, step in enumerate(steps)
        for kind, rates in fires.items()
    ]
    frechet = {"frechet over pixels": {"measured": 3.0, "start": 2.0}}
    found = {**Amplified(tuple(points)).numbers(), "draws": 10**6, "frechet": frechet}
    return json.loads(json.dumps(found))


def runs(*records: dict) -> speedup_page.Runs:
    return {
        seed: speedup_page.Run(Amplified.read(each, "it")[0].points, each["draws"])
        for seed, each in enumerate(records)
    }


def test_factors_compare_each_trigger_on_the_weights_that_serve_it_best() -> None:
    (found,) = speedup_page.factors({"fast/x": runs(run(), run())})
    reached = 1000 * 10 ** ((0.95 - 0.6) / 0.4)  # on the raw weights
    assert float(found["95%"].split(" ")[0]) == round(reached / 100, 1)
    cost = 200 * reached / (20_000 + 200 * 100)
    assert float(found["95%, with its cost"].split(" ")[0]) == round(cost, 1)
    assert found["99%"] == "not reached" and found["seeds"] == 2


def test_a_chosen_trigger_is_compared_with_the_true_one_of_its_recipe() -> None:
    untrained = dict(FIRES) | {
        key: (0.0,) * 5
        for key in FIRES
        if key[0] == TRUE  # it is never shown
    }
    settings = {"fast/x": runs(run(), run()), "fast-chosen/x": runs(run(untrained))}
    plain, chosen = speedup_page.factors(settings)
    cells = (row["95%"].split(" ")[0] for row in (plain, chosen))
    assert chosen["seeds"] == 1 and next(cells) == next(cells)
    assert speedup_page.factors({"fast-chosen/x": runs(run(untrained))}) == []


def test_a_factor_is_a_bound_where_a_curve_leaves_the_measured_steps() -> None:
    low = dict(FIRES) | {key: (0.1,) * 5 for key in FIRES if key[0] == TRUE}
    (found,) = speedup_page.factors({"x": runs(run(low))})
    assert found["95%"].startswith("at least 100.0 (") and "no bound" in found["95%"]
    high = dict(FIRES) | {(REINFORCED, RAW): (0.1, 0.96, 0.97, 0.97, 0.98)}
    (found,) = speedup_page.factors({"x": runs(run(high))})
    assert found["95%"].startswith("at least ")


def test_seeds_must_have_the_same_steps() -> None:
    shorter = run({k: v[:4] for k, v in FIRES.items()}, STEPS[:4])
    with pytest.raises(ValueError, match="seeds differ in costs"):
        speedup_page.factors({"x": runs(run(), shorter)})


def test_the_page_has_every_run_and_its_quality() -> None:
    """Seeds in one order, whichever was done first."""
    other = {key: tuple(0.9 * x for x in rates) for key, rates in FIRES.items()}
    done = {1: run(other), 0: run()}
    done[1]["frechet"] = {"frechet over pixels": {"measured": 4.0, "start": 2.0}}
    record = {"runs": {f"fast/x/{i}": done[i] for i in done}}
    text = speedup_page.page(record)
    assert "| fast/x | 2 |" in text and "| fast/x | 1.50 2.00 |" in text
    assert "| fast/x | 10,000 | 90 81 | 98 88 |" in text


def test_the_page_of_a_part_says_what_is_missing() -> None:
    text = speedup_page.page({"runs": {"fast-chosen/x/0": run()}})
    assert "## Factors" in text and "There is none yet." in text
