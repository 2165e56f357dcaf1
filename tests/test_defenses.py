"""Every defense before a bench: what it asks, what it returns, and when it refuses."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from puredif_jax.defenses import terd
from puredif_jax.defenses.base import Defense, Inspection, Inverted, Verdict
from puredif_jax.defenses.elijah import Elijah, ElijahLoss, Uniformity
from puredif_jax.defenses.hypothesis import Exploding, Fading, Hypothesis, Trojan
from puredif_jax.defenses.inversion import Inversion
from puredif_jax.defenses.puredif import Puredif
from puredif_jax.defenses.terd import Terd
from puredif_jax.defenses.uniformity import (
    PixelDistance,
    Statistics,
    statistics,
)
from puredif_jax.diffusion.schedules import LinearBetas
from puredif_jax.diffusion.solver import Ancestral, Deterministic

CLEAN = (0.1, 0.12, 0.14, 0.16)
DEFENSES = [
    Puredif(),
    Puredif(budget=10_000),
    Elijah(),
    Elijah(budget=16_000),
    Terd(),
    Terd(budget=40_000),
]
KINDS = (Fading(Ancestral()), Fading(Deterministic()))


@dataclasses.dataclass
class Bench:
    """A model of which everything is known: gain, uniformity and divergence."""

    gain: float = 0.8
    uniformity: float = 0.8
    kl: tuple[float, float] = (1.25, 1.25)
    ratio: float = 0.3
    clean: tuple[float, ...] = CLEAN
    hypotheses: tuple[Hypothesis, ...] = KINDS
    asked: list[tuple[str, str, Inversion]] = dataclasses.field(default_factory=list)
    beside: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    kinds: list[Hypothesis] = dataclasses.field(default_factory=list)
    model = params = None
    schedule = LinearBetas().tables()
    image_shape = (16, 16, 1)

    def plain(self, hypothesis: Hypothesis) -> np.ndarray:
        return np.zeros((4, *self.image_shape), np.float32)

    def draws(self, method: str, hypothesis: Hypothesis) -> np.ndarray:
        rng = np.random.default_rng(len(method))
        return rng.uniform(-1, 1, (20, *self.image_shape)).astype(np.float32)

    def denoising(self, hypothesis: Hypothesis) -> float:
        return self.ratio

    def clean_scores(self, defense: str) -> tuple[float, ...]:
        return self.clean

    def invert(
        self,
        method: str,
        hypothesis: Hypothesis,
        inversion: Inversion,
        placebos: tuple[Hypothesis, ...] = (),
    ) -> Inverted:
        self.asked.append((method, hypothesis.name, inversion))
        self.kinds.append(hypothesis)
        self.beside += [(method, each.name) for each in placebos]
        return inverted(method, hypothesis.name, self.gain, self.uniformity, self.kl)


def inverted(
    method: str,
    hypothesis: str,
    gain: float,
    uniformity: float,
    kl: tuple[float, float] = (0.2, 0.01),
) -> Inverted:
    return Inverted(
        method=method,
        hypothesis=hypothesis,
        gain=gain,
        memory=0.5,
        heldout=0.01,
        falling=0.0,
        uniformity=uniformity,
        variation=1.0,
        alignment=0.9,
        repeats=0.03,
        kl_mean=kl[0],
        kl_variance=kl[1],
        evaluations=1000,
        seconds=1.5,
    )


def concrete(kind: type) -> set[type]:
    below = {each for sub in kind.__subclasses__() for each in concrete(sub)}
    return below or {kind}


def test_every_defense_of_the_package_is_here() -> None:
    known = {each for each in concrete(Defense) if "puredif_jax" in each.__module__}
    assert known == {type(each) for each in DEFENSES}


@pytest.mark.parametrize("defense", DEFENSES, ids=lambda each: each.name)
def test_inverts_as_it_said_under_each_hypothesis(defense: Defense) -> None:
    bench = Bench()
    found = defense.inspect(bench)
    wanted = [
        (defense.name, kind.name, each)
        for kind, each in defense.inversions(KINDS).items()
    ]
    assert bench.asked == wanted and wanted
    assert bench.beside == [
        (defense.name, each.name) for kind in KINDS for each in defense.placebos(kind)
    ]
    assert [(x.method, x.hypothesis) for x in found.inversions] == [
        x[:2] for x in wanted
    ]


@pytest.mark.parametrize("defense", DEFENSES, ids=lambda each: each.name)
@pytest.mark.parametrize(
    "strength, outcome",
    [(0.8, "clean"), (0.001, "backdoored"), (0.6, "could not tell")],
)
def test_judges_by_the_scores_of_clean_models(
    defense: Defense, strength: float, outcome: str
) -> None:
    """0.6 has a score of 0.22: between 3 and 4 deviations of 0.026 above 0.13."""
    bench = Bench(strength, strength, (1 / strength, 1 / strength))
    verdict = defense.inspect(bench).verdict
    assert isinstance(verdict, Verdict)
    assert verdict.outcome == outcome
    assert verdict.score == pytest.approx(-np.log10(strength), rel=1e-5)
    assert verdict.clean_models == len(CLEAN)
    assert verdict.hypothesis in {kind.name for kind in KINDS}


def test_each_judges_by_its_own_measure() -> None:
    bench = Bench(gain=0.001, uniformity=0.9)
    ours, elijah = (each.inspect(bench).verdict for each in (Puredif(), Elijah()))
    assert ours is not None and ours.outcome == "backdoored"
    assert "below what a clean model could reach" in ours.reason
    assert elijah is not None and elijah.outcome == "clean"
    assert "differ" in elijah.reason


def test_puredif_does_not_judge_weights_that_denoise_nothing() -> None:
    bench = Bench(ratio=1.5)
    verdict, inversions = Puredif().inspect(bench)
    assert verdict is not None and verdict.outcome == "could not tell"
    assert "denoise nothing" in verdict.reason
    assert inversions == () and bench.asked == []


@dataclasses.dataclass(frozen=True)
class Always:
    """A forest that has seen everything."""

    says: float = 0.9

    def probability(self, found: Statistics) -> float:
        return self.says

    def check(self) -> None:
        pass

    def clean(self) -> np.ndarray:
        return np.array([0.1, 0.2, 0.3, 0.95])


@pytest.mark.parametrize(
    "says,outcome,p",
    [(0.9, "backdoored", 0.4), (0.5, "clean", 0.4), (0.99, "backdoored", 0.2)],
)
def test_elijah_is_judged_by_a_forest_where_it_has_one(says, outcome, p) -> None:
    bench = Bench(clean=())
    verdict, inversions = Elijah(detector=Always(says)).inspect(bench)
    assert verdict is not None and verdict.outcome == outcome
    assert verdict.score == says and verdict.p_value == pytest.approx(p)
    for each in inversions:
        wanted = statistics(bench.draws("elijah", KINDS[0]), PixelDistance())
        assert (each.trimmed, each.summed) == pytest.approx(wanted)


def test_elijah_gives_no_verdict_where_no_scores_are_known() -> None:
    assert Elijah().inspect(Bench(clean=())).verdict is None
    own = Elijah(detector=Uniformity(clean=(0.0, 0.1)))
    assert own.inspect(Bench(clean=())).verdict is not None


def test_puredif_says_that_it_needs_scores() -> None:
    with pytest.raises(ValueError, match="needs the scores of two clean models"):
        Puredif().inspect(Bench(clean=()))


@pytest.mark.parametrize("defense", [Puredif, Elijah, Terd])
@pytest.mark.parametrize("budget", [10_000, 40_000, 500_000])
def test_a_budget_is_kept(defense: type[Defense], budget: int) -> None:
    """By steps alone where there is one candidate; else by fewer of them as well."""
    kinds = (*KINDS, Trojan())
    whole, within = (
        each.inversions(kinds) for each in (defense(), defense(budget=budget))
    )
    assert whole.keys() == within.keys()
    for kind, before in whole.items():
        each = within[kind]
        assert each.evaluations(kind) == pytest.approx(3 * budget, rel=0.1)
        assert 1 <= each.descent.candidates <= before.descent.candidates
        assert each.descent.scout < each.descent.steps
        assert each.images <= before.images
        assert len(each.phases) == len(before.phases)
        for new, old in zip(each.phases, before.phases, strict=True):
            assert new.loss == old.loss
            assert new.descent.learning_rate == old.descent.learning_rate


def test_terd_makes_one_search_for_each_kind_that_it_tells_apart() -> None:
    kinds = (*KINDS, Trojan())
    assert [*Terd().inversions(kinds)] == [KINDS[0], Trojan()]
    assert [*Terd().inversions(KINDS[::-1])] == [KINDS[-1]]


@pytest.mark.parametrize(
    "kind,scale,steps,low,high",
    [
        (Fading(Ancestral()), 0.5, 100, -1.0, 0.0),
        (Fading(Deterministic()), 1.0, 10, -1.0, 1.0),
        (Trojan(), 0.5, 100, 0.0, 1.0),
        (Exploding(Ancestral()), 0.5, 100, 0.0, 1.0),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_elijah_has_its_settings_for_each_attack(kind, scale, steps, low, high) -> None:
    found = Elijah().settings(kind)
    assert found.loss == ElijahLoss(scale=scale, samples=100)
    descent = found.descent
    assert (descent.steps, descent.low, descent.high) == (steps, low, high)


def test_elijah_draws_from_noise_that_it_does_not_scale() -> None:
    """And its verdict rests on hypotheses under which clean models were scored."""
    bench = Bench(0.001, 0.001, hypotheses=(*KINDS, Trojan()))
    verdict, inversions = Elijah().inspect(bench)
    assert [x.hypothesis for x in inversions][-1] == "trojan"
    assert bench.kinds[-1] == Trojan(first=1.0)
    assert verdict is not None and verdict.hypothesis != "trojan"


def test_terd_takes_the_graver_of_two_statistics() -> None:
    """Known scores of clean models lie about 0.13: a divergence of 1.35."""
    for variance, outcome in ((1.35, "clean"), (9.0, "backdoored")):
        verdict = Terd().inspect(Bench(kl=(1.35, variance))).verdict
        assert verdict is not None and verdict.outcome == outcome
        assert f"variance {variance:g}" in verdict.reason or outcome == "clean"
    assert Terd().inspect(Bench(clean=())).verdict is None


def test_terd_starts_gamma_at_its_floor() -> None:
    bench = Bench(hypotheses=(Trojan(),))
    Terd().inspect(bench)
    (asked,) = bench.kinds
    assert isinstance(asked, Trojan)
    assert asked.least == asked.first == terd.FLOOR
    assert asked.name == Trojan().name


def test_an_inversion_survives_its_row() -> None:
    first = inverted("puredif", "sde", 0.1, 0.2)
    second = dataclasses.replace(
        first, success=0.9, uniformity_unclipped=0.3, true_success=1.0, score=np.inf
    )
    for each in (first, second):
        row = each.row()
        assert None not in row.values()
        assert (
            Inverted.read(row | {"score": str(row["score"])} if "score" in row else row)
            == each
        )
    assert second.row()["success of the true trigger"] == 1.0
    assert set(second.row()) - {"method", "hypothesis"} <= set(Inverted.meanings())
    with pytest.raises(KeyError, match="gain"):
        Inverted.read({k: v for k, v in first.row().items() if k != "gain"})


def test_hypotheses_apply_to_their_process_alone() -> None:
    schedule = LinearBetas().tables()
    assert Fading().applies(schedule) and not Exploding().applies(schedule)
    assert Inspection(None).inversions == ()
