"""The page of a zoo: from rows of models to cells."""

import detection_page
import numpy as np
import pytest


def model(attack: str, score: float, fires: float = 0.9, network: str = "a") -> dict:
    """As the record keeps it; statistics of baselines tell nothing."""
    statistics = dict.fromkeys(detection_page.METHODS.values(), 0.0)
    return statistics | {
        "network": network,
        "attack": attack,
        "trigger": "Box" if attack else "",
        "rate": 0.15 if attack else 0.0,
        "fires": fires if attack else None,
        "outcome": "backdoored" if score > 0.3 else "clean",
        "score": score,
        "p": 0.5,
        "success": fires if attack else None,
        "cosine": 0.99 if attack else None,
    }


def record(**changes: dict) -> dict:
    """Two halves of six models, of two attacks and two networks."""
    made = {}
    for half in detection_page.HALVES:
        for number in range(3):
            network = "ab"[number % 2]
            bad = model("BD" if number < 2 else "VD", 0.8 + number / 10, 0.9, network)
            made[f"{half}/backdoored-{number}"] = bad
            made[f"{half}/clean-{number}"] = model("", number / 10, network=network)
    return {"models": made | changes}


def test_statistics_are_compared_on_the_test_half() -> None:
    ours, *others = detection_page.compared(record())
    assert ours["AUC"] == "1.000 (1.000 to 1.000)"
    assert ours["right, by the development half"].startswith("6 of 6 ")
    assert all(each["AUC"].startswith("0.500") for each in others)
    missed = model("BD", 0.05)
    rows = detection_page.compared(record(**{"test/backdoored-0": missed}))
    assert rows[0]["right, by the development half"].startswith("5 of 6 ")
    assert rows[0]["AUC"].startswith(f"{7 / 9:.3f}")


def test_backdoors_that_hardly_fire_are_counted_apart() -> None:
    text = detection_page.page(record(**{"test/backdoored-0": model("BD", 0.0, 0.1)}))
    assert "- 2 backdoored models were called:" in text
    assert "1 further ones fire less often" in text
    assert "| 60% to 90% |" not in text and "| 90% to 100% | 2 of 2 " in text


def test_a_group_that_is_left_out_has_no_part_in_its_bound() -> None:
    strange = {
        f"{half}/backdoored-2": model("VD", 0.15) for half in detection_page.HALVES
    }
    rows = detection_page.left_out(record(**strange), "attack")
    cells = {row["left out: attack"]: row["PureDiffusion"] for row in rows}
    assert cells == {
        "BD": "2 of 2, 2 of 3 clean",
        "VD": "0 of 1, 3 of 3 clean",
    }


def test_a_model_without_a_statistic_counts_as_the_least() -> None:
    refused = model("BD", 0.0) | dict.fromkeys(("score", "success", "cosine"))
    made = record(**{"test/backdoored-0": refused | {"outcome": "could not tell"}})
    ours, *_ = detection_page.compared(made)
    assert ours["models without it"] == 1 and ours["AUC"].startswith("0.667")
    assert "| BD | 1 of 2 " in detection_page.page(made)


def test_a_threshold_lies_between_both_kinds() -> None:
    bad, clean = np.array([0.6, 0.8, 0.1]), np.array([0.0, 0.2, 0.3])
    assert detection_page.threshold(bad, clean) == pytest.approx(0.45)


def test_the_page_of_a_part_says_what_is_missing() -> None:
    text = detection_page.page({"models": {"test/clean-0": model("", 0.1)}})
    assert text.count("There is none yet.") == 7


@pytest.mark.parametrize(
    "attack,words",
    [
        (None, ""),
        ({"type": "BadDiffusion", "trigger": {"type": "Box"}}, "BadDiffusion"),
        ({"type": "TrojDiff", "trigger": {"type": "Patch"}}, "TrojDiff, patch"),
        (
            {
                "type": "VillanDiffusion",
                "trigger": {"type": "Box"},
                "psi": 0.5,
                "solver": {"type": "Deterministic"},
            },
            "VillanDiffusion, psi 0.5, deterministic",
        ),
    ],
)
def test_attacks_in_words(attack, words) -> None:
    assert detection_page.about(attack) == words
