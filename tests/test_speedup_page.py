"""The page of factors: from points of trainings to cells."""

import json

import numpy as np
import speedup_page

from puredif_jax.metrics import measures as metrics
from puredif_jax.stages.amplify import AVERAGED, RAW, REINFORCED, TRUE, Amplified, Point

STEPS = (0, 100, 1000, 10_000)
FIRES = {
    (TRUE, AVERAGED): (0.0, 0.0, 0.5, 0.95),
    (TRUE, RAW): (0.0, 0.0, 0.6, 1.0),
    (REINFORCED, AVERAGED): (0.1, 0.95, 0.97, 0.98),
    (REINFORCED, RAW): (0.1, 0.9, 0.97, 0.98),
}


def run(seed: int) -> dict:
    points = [
        Point(
            steps,
            *kind,
            training=200 * steps,
            reinforcement=20_000 if kind[0] == REINFORCED else 0,
            rates=dict.fromkeys(metrics.SUCCESS, rates[i]),
            norm_ratio=1.0,
            cosine=1.0,
            seconds=0.0,
        )
        for i, steps in enumerate(STEPS)
        for kind, rates in FIRES.items()
    ]
    return {**Amplified(tuple(points)).numbers(), "draws": 10**6}


def test_factors_compare_each_trigger_on_the_weights_that_serve_it_best() -> None:
    record = json.loads(json.dumps({"runs": {f"fast/x/{i}": run(i) for i in (0, 1)}}))
    text = speedup_page.page(record)
    rows = {
        line.split(" | ")[0]: line for line in text.splitlines() if "fast/x" in line
    }
    (row, *_) = (line for line in text.splitlines() if line.startswith("| fast/x | 2 "))
    assert rows and len(row.split(" | ")) == 8
    # The true trigger is best on raw weights, the reinforced one on averaged ones.
    reached = 1000 * 10 ** ((0.95 - 0.6) / 0.4)
    runs = {0: Amplified.read(record["runs"]["fast/x/0"], "it")[0].points}
    (found,) = speedup_page.factors({"x": runs}, 10**6)
    assert float(found["95%"].split(" ")[0]) == round(reached / 100, 1)
    cost = (200 * reached) / (20_000 + 200 * 100)
    assert float(found["95%, with its cost"].split(" ")[0]) == round(cost, 1)
    assert found["99%"] == "not reached"


def test_a_factor_is_a_bound_where_the_true_trigger_does_not_get_there() -> None:
    points = Amplified.read(run(0), "it")[0].points
    low = tuple(
        Point(**(vars(x) | {"rates": dict.fromkeys(metrics.SUCCESS, 0.1)}))
        if x.trigger == TRUE
        else x
        for x in points
    )
    (found,) = speedup_page.factors({"x": {0: low}}, 10**6)
    assert found["95%"] == "more than 100.0"
    assert np.isinf(
        speedup_page.saving(
            *(
                speedup_page.best({0: low}, x, 0.9, False, 9)
                for x in (TRUE, REINFORCED)
            ),
            0.9,
        ).factor
    )
