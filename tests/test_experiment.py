"""What a configuration says of itself: budgets and baselines."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_objectives import LOSSES
from tiny_config import TINY, draw_params, get_config

from puredif_jax.attacks.baddiffusion import BadDiffusion
from puredif_jax.attacks.trojdiff import TrojDiff
from puredif_jax.attacks.villandiffusion import VillanDiffusion
from puredif_jax.attacks.villandiffusion_ve import VillanDiffusionVE
from puredif_jax.data.images import FashionMNIST
from puredif_jax.defenses import elijah
from puredif_jax.defenses.blocks import Blocks
from puredif_jax.defenses.denoising_consistency import DenoisingConsistency
from puredif_jax.defenses.descent import Descent
from puredif_jax.defenses.distribution_shift import DistributionShift
from puredif_jax.defenses.elijah import Elijah, ElijahLoss
from puredif_jax.defenses.hypothesis import Exploding, Fading, Hypothesis, Trojan
from puredif_jax.defenses.inversion import Inversion
from puredif_jax.defenses.objective import Sum
from puredif_jax.defenses.puredif import Puredif
from puredif_jax.defenses.spectrum import Spectrum
from puredif_jax.defenses.starts import Starts
from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.diffusion.path_keeping import PathKeeping
from puredif_jax.diffusion.schedules import CosineBetas, LinearBetas
from puredif_jax.diffusion.solver import Ancestral, Deterministic
from puredif_jax.diffusion.ve import PredictorCorrector, VarianceExploding
from puredif_jax.metrics import measures as metrics
from puredif_jax.stages.amplify import Amplification
from puredif_jax.stages.audit import Audit
from puredif_jax.stages.embedding import Pixels
from puredif_jax.stages.evaluation import Evaluation
from puredif_jax.stages.experiment import Experiment, Scan, Sweep
from puredif_jax.stages.measure import Measure
from puredif_jax.stages.perform import names, open_lab
from puredif_jax.stages.quality import quality
from puredif_jax.stages.train import Train
from puredif_jax.stages.weights import Truth
from puredif_jax.types import Candidate

SHAPE = (8, 8, 1)
SCHEDULE = LinearBetas().tables()
CHANNEL = Fading().channel(SCHEDULE, SHAPE)
SHIFT = DistributionShift(timesteps=(900, 300), samples=3)
CONSISTENCY = DenoisingConsistency(sampler=DDIM(steps=4), samples=5)


class Counter:
    """A model that counts the images it is evaluated on."""

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, params, x, t):
        def add(_) -> None:
            self.images += x.shape[0]

        jax.debug.callback(add, x)
        return 0.1 * x


@pytest.mark.parametrize(
    "loss",
    [Sum(SHIFT, CONSISTENCY), *LOSSES.values()],
    ids=str,
)
def test_evaluations_are_those_that_the_network_sees(loss) -> None:
    counter = Counter()
    bound = loss.bind(counter, SCHEDULE, CHANNEL)
    candidate = Candidate(jnp.ones(SHAPE), jnp.zeros(SHAPE))
    bound({}, candidate, jax.random.key(0)).block_until_ready()
    jax.effects_barrier()
    assert loss.evaluations == counter.images


def test_evaluations_of_blocks() -> None:
    """Squares of one and two pixels at two places an axis and three levels."""
    blocks = Blocks(sides=(4, 8), places=2, draws=3)
    assert seen(blocks, Trojan()) == blocks.evaluations == 2 * 4 * 3 * 3


def test_evaluations_of_a_spectrum() -> None:
    spectrum = Spectrum(draws=12, together=5)
    assert seen(spectrum, Fading()) == spectrum.evaluations == 12


def seen(starts: Starts, hypothesis: Hypothesis) -> int:
    """Images that the network sees when it answers to all inputs."""
    counter, family = Counter(), hypothesis.family(SCHEDULE, SHAPE)
    every = jnp.arange(starts.count(SHAPE))
    starts.answers(
        counter, {}, SCHEDULE, family, every, SHAPE, jax.random.key(0)
    ).block_until_ready()
    jax.effects_barrier()
    return counter.images


def test_evaluations_of_an_inversion() -> None:
    """By hand: three candidates for two steps, then two for four.

    Each scout leaps twice, to an image from ten steps of four draws, judged by 40. Ten
    timesteps of five draws judge each scout once and the two finalists twice. A start
    has an image of ten steps of 16 draws.
    """
    leap, judge, image = 2 * (4 * 10 + 40), 10 * 5, 10 * 16
    descent = Descent(steps=6, candidates=3, scout=2, finalists=2)
    blocks = Blocks(sides=(4, 8), places=2, draws=3)
    spectrum = Spectrum(draws=11)
    scouted = Inversion(SHIFT, descent, blocks, spectrum, heldout=5)
    steps = 3 * (3 * 2 + 2 * 4) * 6 + 3 * leap + (3 + 2 * 2) * judge
    assert scouted.evaluations(Fading()) == steps, "no whole pair of directions"
    assert scouted.evaluations(Trojan()) == steps + 72 + image
    four = dataclasses.replace(
        scouted, descent=dataclasses.replace(descent, candidates=4)
    )
    more = 3 * 2 * 6 + leap + judge + 11 + 2 * image
    assert four.evaluations(Fading()) == steps + more
    single = dataclasses.replace(descent, candidates=1)
    assert dataclasses.replace(scouted, descent=single).starts(Trojan()) is None
    still = dataclasses.replace(scouted, loss=ElijahLoss())
    assert still.starts(Trojan()) is None, "a loss that does not move gamma"
    one = Inversion(loss=SHIFT, descent=single, heldout=5)
    assert one.evaluations(Fading()) == 3 * 6 * 6 + leap + 3 * judge
    plain = Inversion(SHIFT, Descent(steps=6, candidates=3), heldout=5)
    assert plain.evaluations(Fading()) == 3 * 18 * 6 + 6 * judge
    unseen = Inversion(ElijahLoss(samples=7), Descent(steps=6), heldout=5)
    assert unseen.evaluations(Fading()) == 3 * 6 * 7 + 2 * (judge + image)


@pytest.mark.parametrize("kind", [Fading, Exploding])
@pytest.mark.parametrize("solver", [Ancestral(), Deterministic()])
def test_elijah_as_published_and_at_equal_evaluations(kind, solver) -> None:
    budget = Inversion().evaluations(kind(solver))
    audit = Audit(baselines=(Elijah(), Elijah(budget=budget // 3)))
    names = [defense.name for defense in audit.defenses]
    assert names == ["puredif", "elijah", f"elijah, {budget // 3} gradients"]
    ours, published, equal = (
        defense.inversions([kind(solver)])[kind(solver)] for defense in audit.defenses
    )
    assert ours == audit.inversion
    assert published == elijah.published(kind(solver))
    descent = dataclasses.replace(published.descent, steps=1, low=-1.0, high=0.0)
    assert descent == Descent(
        steps=1, learning_rate=0.1, b2=0.999, bound=None, cosine=False
    )
    assert equal.evaluations(kind(solver)) == pytest.approx(budget, rel=0.01)
    steps = dataclasses.replace(published.descent, steps=equal.descent.steps)
    assert equal == dataclasses.replace(published, descent=steps)


def test_frechet_draws_come_in_pairs(tmp_path, monkeypatch) -> None:
    """A network that says 0 draws eps, scaled: each pair then sums to nothing."""
    asked: list[np.ndarray] = []

    def features(self: Pixels, images: np.ndarray) -> np.ndarray:
        asked.append(images)
        return images.reshape(len(images), -1)[:, :2]

    monkeypatch.setattr(metrics, "frechet_distance", lambda *_: 1.0)
    monkeypatch.setattr(Pixels, "features", features)
    sampler = DDIM(steps=2, clip=None)
    options = Evaluation(
        batch=8, deterministic=sampler, frechet_draws=24, embedding=Pixels()
    )
    lab = open_lab(Experiment(str(tmp_path), model=TINY, evaluation=options))
    silent = draw_params(TINY, scale=0.0)
    found = quality(lab, options, "silent", silent, FashionMNIST())
    assert found == (1.0, {})
    _, drawn = asked
    assert drawn.shape == (24, *TINY.image_shape) and np.ptp(drawn[:12]) > 1
    np.testing.assert_array_equal(drawn[:12], -drawn[12:])
    _, rates = quality(lab, options, "same", silent, FashionMNIST(), drawn[5])
    assert rates == metrics.success(drawn, drawn[5]) and rates["mse<0.001"] == 1 / 24


@pytest.mark.parametrize("draws", [-4, 2, 7])
def test_frechet_draws_are_an_even_number(draws: int) -> None:
    with pytest.raises(ValueError, match=f"even number of at least 4, found {draws}"):
        Evaluation(frechet_draws=draws)


def test_an_audit_tries_what_applies_to_the_process() -> None:
    """All kinds are its default; three apply to a process that fades, two to others."""
    audit = Audit()
    names = {
        betas: [kind.name for kind in audit.tried(betas.tables())]
        for betas in (LinearBetas(), VarianceExploding())
    }
    assert names == {
        LinearBetas(): ["sde", "ode", "trojan"],
        VarianceExploding(): ["ve sde", "ve ode"],
    }
    fading, trojan = map(audit.inversion.evaluations, (Fading(), Trojan()))
    count = f"{4 * fading + trojan:,} evaluations"  # two are placebos
    assert audit.plan(SCHEDULE) == (
        f"(under sde, ode and trojan, {count} of its network on an image)"
    )
    exploding = VarianceExploding().tables()
    count = f"{4 * fading:,} evaluations"
    assert audit.plan(exploding).startswith(f"(under ve sde and ve ode, {count} of")
    only = Audit(("clean",), hypotheses=(Exploding(),))
    with pytest.raises(ValueError, match=r"no hypothesis .*\(ve ode\) .* LinearBetas"):
        Experiment("run", TINY, audit=only)
    run = Experiment("run", TINY, audit=only, schedule=VarianceExploding())
    assert run.images == audit.inversion.images
    ancestral, deterministic = audit.tried(exploding)
    kinds = [ancestral, *ancestral.placebos, deterministic]
    assert audit.searches(exploding) == [(kind, audit.inversion) for kind in kinds]


def test_hypotheses_are_told_apart_by_their_names() -> None:
    with pytest.raises(ValueError, match=r"different names, found \['ode', 'ode'\]"):
        Audit(hypotheses=(Fading(), Fading(Deterministic())))


def test_defenses_are_told_apart_by_their_names() -> None:
    with pytest.raises(ValueError, match=r"name of its own, found \['puredif', 'el"):
        Audit(baselines=(Elijah(), Elijah()))
    with pytest.raises(ValueError, match="name of its own"):
        Audit(baselines=(Puredif(),))


def test_a_run_is_its_stages_in_order() -> None:
    whole = get_config()
    kinds = [Amplification, Train, Measure, Audit]
    assert [type(stage) for stage in whole.stages] == kinds
    assert whole.stages[0] is whole.amplification and whole.stages[3] is whole.audit
    only = dict(training=None, attack=None, amplification=None, audit=None)
    bare = dataclasses.replace(whole, **only)
    assert bare.stages == ()
    assert dataclasses.replace(bare, weights="clean").stages == (Measure(),)
    known = dataclasses.replace(whole, audit=Audit(("clean",)))
    assert [type(stage) for stage in known.stages] == [kinds[-1], *kinds[:-1]]
    assert known.plan.index("audit") < known.plan.index("training")
    longer = dataclasses.replace(whole, then=(Measure(), Measure()))
    assert longer.stages == (*whole.stages, Measure(), Measure())
    assert longer.plan == f"{whole.plan}, Measure, Measure"


def test_a_run_reads_the_weights_that_its_stages_name() -> None:
    whole = get_config()
    assert names(whole) == []
    found = dataclasses.replace(whole, weights="b", audit=Audit(("trained", "a", "b")))
    assert names(found) == ["a", "b"]


def test_a_backdoor_is_measured_by_the_sampler_under_which_it_fires() -> None:
    corrected = PredictorCorrector(levels=7)
    found = Evaluation(ancestral=corrected, deterministic=DDIM(3))
    assert found.sampler(Ancestral()) == corrected and corrected.steps == 14
    assert found.sampler(Deterministic()) == DDIM(3)
    assert found.sampler(Ancestral(), 0.5) == corrected
    kept = Evaluation(ancestral=PathKeeping(7))
    assert kept.sampler(Ancestral()) == PathKeeping(7)
    assert kept.sampler(Ancestral(), 0.5) == PathKeeping(7, psi=0.5)
    assert kept.sampler(Deterministic(), 0.5) == kept.deterministic


@pytest.mark.parametrize(
    "attack,psi",
    [
        (BadDiffusion(), 1.0),
        (VillanDiffusion(psi=0.3), 0.3),
        (VillanDiffusion(psi=0.0, solver=Ancestral()), 0.0),
        (VillanDiffusionVE(), None),
        (TrojDiff(), None),
    ],
    ids=lambda x: type(x).__name__,
)
def test_the_share_of_a_backdoor_is_read_from_its_channel(attack, psi) -> None:
    explodes = isinstance(attack, VillanDiffusionVE)
    process = VarianceExploding(50) if explodes else CosineBetas()
    schedule = process.tables()
    assert Truth.of(attack, schedule, (16, 16, 1)).psi(schedule) == psi


@pytest.mark.parametrize(
    "model,workdir",
    [
        (("zoo",), "runs/scan-zoo"),
        (("models/my model",), "runs/scan-models-my-model"),
        (("owner/name",), "runs/scan-owner-name"),
        (("../x/",), "runs/scan-x"),
        (("a", "b", "c"), r"runs/scan-a-and-2-more-[0-9a-f]{8}"),
        (("x" * 300,), r"runs/scan-x{40}-[0-9a-f]{8}-x{30}"),
        (("\x1b[2J\n",), r"runs/scan-2J"),
        (("..",), r"runs/scan-model-[0-9a-f]{8}"),
    ],
)
def test_a_scan_lies_in_a_folder_named_after_its_models(model, workdir) -> None:
    found = Scan(model=model).located()
    assert re.fullmatch(workdir, found.workdir)
    assert found.located() == found
    assert Scan("mine", model).located().workdir == "mine"


def test_folders_of_different_scans_differ() -> None:
    names = [("a", "b"), ("a", "c"), ("x" * 300,), ("x" * 301,), ("..",), ("/",)]
    assert len({Scan(model=name).located().workdir for name in names}) == len(names)


def test_a_plan_is_said_in_words() -> None:
    assert get_config().plan == (
        "runs/tiny: 12 steps of training, reinforcement of the trigger at step 6, 12, "
        "measuring of the model, audit of trained (under ode, 5,976 evaluations of its "
        "network on an image)"
    )
    sweep = Sweep("sweep", (get_config(),))
    assert sweep.plan == "sweep: 1 of 1 runs"
    assert Scan(model=("a", "b")).located().plan.startswith("runs/scan-a-and-1-more")
    assert Experiment("x", TINY).plan == "x: nothing but a report"
