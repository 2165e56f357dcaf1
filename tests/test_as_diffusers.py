"""Whole folders, as diffusers reads them and as we do: the same network and process.

Generated folders: all pairs of saves, all fields of both configurations one at a time,
all schedulers. Each is read alike, or refused by one of the two; never otherwise.

    python tests/test_as_diffusers.py [FILE.json]    counts them
"""

import collections
import inspect
import itertools
import json
import pathlib
import sys
import tempfile
import warnings

import jax
import numpy as np
import pytest

from puredif_jax.diffusion.sampling import Threshold
from puredif_jax.formats import diffusers as convert
from puredif_jax.formats import discovery, weight_sets
from puredif_jax.formats.base import Model
from puredif_jax.types import InputError

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore")

SIZE = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
X = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
TIMES = np.array([3, 700])


def network(seed: int = 0, **changes):
    torch.manual_seed(seed)
    made = diffusers.UNet2DModel(**(SIZE | changes))
    for parameter in made.parameters():  # also those that begin at zero
        parameter.data += 0.05 * torch.randn_like(parameter)
    return made


def save(folder: pathlib.Path, net, scheduler=None, **options) -> None:
    scheduler = scheduler or diffusers.DDPMScheduler()
    diffusers.DDPMPipeline(net, scheduler).save_pretrained(folder, **options)


def change(path: pathlib.Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def theirs(folder: pathlib.Path, **options):
    """What diffusers draws with, or None where it cannot load the folder."""
    try:
        return diffusers.DDPMPipeline.from_pretrained(folder, **options)
    except Exception:  # of many kinds
        return None


def ours(folder: pathlib.Path):
    try:
        return convert.read_folder(folder)
    except InputError:
        return None


def outputs_agree(pipeline, model) -> bool:
    x = np.broadcast_to(X, (*X.shape[:3], model.spec.network.in_channels))
    with torch.no_grad():
        given = torch.tensor(x.transpose(0, 3, 1, 2).copy())
        wanted = pipeline.unet(given, torch.tensor(TIMES)).sample
    wanted = wanted.numpy().transpose(0, 2, 3, 1)[..., : model.spec.network.in_channels]
    found = jax.jit(model.spec.network)(model.params, x, TIMES)
    return np.allclose(found, wanted, atol=2e-4 * np.abs(wanted).max())


SAVES = {
    "single": {},
    "shards": {"max_shard_size": "5KB"},
    "bin": {"safe_serialization": False},
    "shards of bin": {"safe_serialization": False, "max_shard_size": "5KB"},
    "fp32 variant": {"variant": "fp32"},
    "shards of a variant": {"variant": "ema", "max_shard_size": "5KB"},
}


PAIRS = [*itertools.permutations(SAVES, 2)]


@pytest.mark.parametrize("forms", PAIRS, ids=str)
def test_pairs_of_saves(tmp_path, forms) -> None:
    """The weights that `from_pretrained` takes; the others have rows of their own."""
    outcome = compare_saves(tmp_path / "model", forms)
    if forms[0] != "shards" and {*forms} & {"single", "shards", "bin"}:
        assert outcome == "alike", "diffusers loads these"


def compare_saves(folder: pathlib.Path, forms) -> str:
    nets = [network(seed) for seed in (1, 2)]
    for net, form in zip(nets, forms, strict=True):
        save(folder, net, **SAVES[form])
    pipeline, model = theirs(folder), ours(folder)
    if pipeline is not None:
        assert model is not None and outputs_agree(pipeline, model)
    found = discovery.find([str(folder)])
    read = [
        convert.DiffusersFolder().files(path)
        for path in found.models.values()
        if isinstance(path, pathlib.Path)
    ]
    scanned = {file.name for files in read for file in files if file.exists()}
    held = {
        path.name
        for path in (folder / "unet").iterdir()
        if path.suffix in (".safetensors", ".bin")
    }
    loose = " ".join(str(x) for x in found.models.values() if isinstance(x, InputError))
    assert all(name in scanned or name in loose for name in held)
    return "refused" if pipeline is None else "alike"


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("form", ["single", "bin", "shards"])
def test_dtypes(tmp_path, kind, form) -> None:
    net = network().to(getattr(torch, kind))
    save(tmp_path, net, **SAVES[form])
    pipeline, model = theirs(tmp_path), ours(tmp_path)
    assert outputs_agree(pipeline.to(dtype=torch.float32), model)
    assert "cast to float32" in convert.DiffusersFolder().check(tmp_path, model.spec)[0]


def test_a_variant_is_the_one_that_was_asked_for(tmp_path) -> None:
    save(tmp_path, network(1))
    save(tmp_path, network(2), variant="ema")
    place = weight_sets.choose(tmp_path / "unet", "ema").principal
    spec = convert.DiffusersFolder().spec(place)
    params = convert.DiffusersFolder().read(place, spec)
    model = Model(spec, params)
    assert outputs_agree(theirs(tmp_path, variant="ema"), model)
    with pytest.raises(InputError, match="variant 'fp16'.* has ema, and"):
        weight_sets.choose(tmp_path / "unet", "fp16")


# Values of the fields of a network, each beside the default.
NETWORK = {
    "sample_size": [16, (8, 16), None],
    "in_channels": [3, 4],
    "out_channels": [2, 3],
    "center_input_sample": [True, 0],
    "time_embedding_type": ["fourier", "positional"],
    "time_embedding_dim": [32, 16],
    "freq_shift": [1, 0.5],
    "flip_sin_to_cos": [False],
    "down_block_types": [
        ("UNetResDownBlock2D", "UNetResAttnDownBlock2D"),
        ("DownBlock2D", "ResnetDownsampleBlock2D"),
    ],
    "mid_block_type": [None],
    "up_block_types": [("UNetResAttnUpBlock2D", "UNetResUpBlock2D")],
    "block_out_channels": [(4, 8), (8, 8)],
    "layers_per_block": [2],
    "mid_block_scale_factor": [1.0, 1.4],
    "downsample_padding": [0],
    "downsample_type": ["resnet", "conv"],
    "upsample_type": ["resnet"],
    "dropout": [0.1],
    "act_fn": ["swish", "SiLU", "gelu"],
    "attention_head_dim": [None, 4, 16],
    "norm_num_groups": [8, 2],
    "attn_norm_num_groups": [4, 8],
    "norm_eps": [1e-6, 1e-3],
    "resnet_time_scale_shift": ["scale_shift"],
    "add_attention": [False],
    "class_embed_type": ["timestep", "identity"],
    "num_class_embeds": [3],
    "num_train_timesteps": [10],
}


def test_every_field_of_a_network_has_values() -> None:
    taken = inspect.signature(diffusers.UNet2DModel.__init__).parameters
    assert set(NETWORK) == set(taken) - {"self"}


# Fields that a network of ours has, with values that it does not.
BUILT = (
    "time_embedding_type freq_shift flip_sin_to_cos block_out_channels dropout act_fn "
    "layers_per_block downsample_padding attention_head_dim norm_num_groups norm_eps "
    "attn_norm_num_groups num_train_timesteps up_block_types"
).split()
UNBUILT = {
    ("time_embedding_type", "fourier"),
    ("act_fn", "gelu"),
    ("attn_norm_num_groups", 8),
}
CASES = [(name, value) for name, values in NETWORK.items() for value in values]


@pytest.mark.parametrize("name,value", CASES, ids=str)
def test_fields_of_a_network(tmp_path, name, value) -> None:
    """As they are saved, and as `_use_default_values` names them, of another value."""
    found = compare_networks(tmp_path, name, value)
    if name not in SIZE:  # of these the default would want other weights
        assert found[-1] == "alike"
    if name in BUILT and (name, value) not in UNBUILT:
        assert found[0] == "alike"


def compare_networks(home: pathlib.Path, name: str, value) -> list[str]:
    found = []
    try:
        net = network(**{name: value})
    except Exception:
        net = None  # no network of diffusers
    if net is not None:
        save(home / "saved", net)
        found.append(assert_alike(home / "saved"))
    save(home / "silent", network())
    config = home / "silent" / "unet" / "config.json"
    change(config, **{name: value, "_use_default_values": [name, "dropout"]})
    return [*found, assert_alike(home / "silent")]


def assert_alike(folder: pathlib.Path) -> str:
    """The same outputs and the same process, or refused by one of the two."""
    pipeline, model = theirs(folder), ours(folder)
    if model is None or pipeline is None:
        return "refused"
    try:
        alike = outputs_agree(pipeline, model)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        if "jax" in type(error).__module__:
            raise
        return "refused"  # diffusers cannot run it
    assert alike
    assert_process(pipeline.scheduler, model.spec.scheduling)
    return "alike"


def assert_process(scheduler, scheduling) -> None:
    """The tables, what the network predicts and is given, and bounds on the image."""
    taken = inspect.signature(type(scheduler).__init__).parameters
    config = {k: v for k, v in scheduler.config.items() if k in taken}
    schedule = scheduling.betas.tables()
    assert schedule.steps == config["num_train_timesteps"]
    assert scheduling.kind == type(scheduler).__name__
    if hasattr(scheduler, "alphas_cumprod"):
        wanted = scheduler.alphas_cumprod.numpy()
        np.testing.assert_allclose(schedule.signal**2, wanted, atol=2e-6)
        np.testing.assert_allclose(schedule.noise**2, 1 - wanted, atol=2e-6)
    else:  # IPNDM
        np.testing.assert_allclose(
            schedule.noise[::-1], scheduler.betas[:-1], atol=2e-6
        )
    assert scheduling.prediction_type == config.get("prediction_type", "epsilon")
    bound = None
    if config.get("thresholding"):
        ratio, most = config["dynamic_thresholding_ratio"], config["sample_max_value"]
        bound = Threshold(ratio, most)
    elif config.get("clip_sample"):
        bound = config.get("clip_sample_range", 1.0)
    assert scheduling.clip == bound
    if "timestep_spacing" in config:
        assert scheduling.timestep_spacing == config["timestep_spacing"]
        assert scheduling.steps_offset == config["steps_offset"]
    variance = config.get("variance_type") or "fixed_small"
    learned = variance.startswith("learned")
    assert scheduling.learned == learned
    if not learned:
        assert scheduling.variance_type == variance.removesuffix("_log")
    plain = not config.get("use_karras_sigmas", False)
    try:
        scheduler.set_timesteps(schedule.steps)
    except Exception:
        return  # such as an offset that leads out of the schedule
    given = np.unique(np.asarray(scheduler.timesteps, np.float64))
    if plain and len(given) == schedule.steps and not config.get("steps_offset"):
        np.testing.assert_allclose(given, schedule.given, atol=2e-4)


# Values of the fields of schedulers, one at a time.
SCHEDULER = {
    "num_train_timesteps": [20, 4000],
    "beta_start": [1e-3, 0.00085],
    "beta_end": [0.03, 0.012],
    "beta_schedule": [
        "scaled_linear",
        "squaredcos_cap_v2",
        "sigmoid",
        "laplace",
        "exp",
    ],
    "trained_betas": [[float(x) for x in np.linspace(1e-3, 2e-2, 1000)], [0.1] * 5],
    "prediction_type": ["v_prediction", "sample", "flow_prediction"],
    "variance_type": ["fixed_large", "fixed_small_log", "learned", "learned_range"],
    "clip_sample": [True, False],
    "clip_sample_range": [2.0],
    "thresholding": [True],
    "dynamic_thresholding_ratio": [0.9],
    "sample_max_value": [3.0],
    "timestep_spacing": ["leading", "linspace", "trailing"],
    "steps_offset": [1],
    "set_alpha_to_one": [True, False],
    "rescale_betas_zero_snr": [True],
    "timestep_type": ["continuous"],
    "use_karras_sigmas": [True],
    "use_flow_sigmas": [True],
    "use_dynamic_shifting": [True],
    "solver_order": [3],
    "final_sigmas_type": ["sigma_min"],
    "lower_order_final": [False],
    "skip_prk_steps": [True],
    "interpolation_type": ["log_linear"],
    "algorithm_type": ["dpmsolver"],
    "shift_terminal": [0.1],
    "predict_x0": [False],
    "use_lu_lambdas": [True],
}
NAMES = sorted(
    name
    for name in dir(diffusers)
    if name.endswith("Scheduler")
    and not name.startswith("Flax")
    and hasattr(getattr(diffusers, name), "from_config")
    and issubclass(getattr(diffusers, name), diffusers.SchedulerMixin)
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> pathlib.Path:
    """A folder whose scheduler is changed by the tests, one after the other."""
    folder = tmp_path_factory.mktemp("plain")
    save(folder, network())
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_schedulers_and_their_fields(plain, name) -> None:
    """Every class, with every field that it or another takes, one at a time."""
    found = compare_schedulers(plain, name)
    if name in READ:
        assert found["alike"] >= 30, found


def compare_schedulers(plain: pathlib.Path, name: str) -> collections.Counter:
    path = plain / "scheduler" / "scheduler_config.json"
    change(plain / "model_index.json", scheduler=["diffusers", name])
    found = collections.Counter()
    variants = [{}] + [{k: v} for k, values in SCHEDULER.items() for v in values]
    variants += [{k: v, "_use_default_values": [k]} for k, (v, *_) in SCHEDULER.items()]
    # Some fields count only beside another.
    v = {"prediction_type": "v_prediction"}
    variants += [
        {"timestep_type": "continuous"} | v,
        {"rescale_betas_zero_snr": True} | v,
        {"thresholding": True, "sample_max_value": 3.0},
        {"clip_sample": True, "clip_sample_range": 2.0},
    ]
    for fields in variants:
        path.write_text(json.dumps({"_class_name": "DDPMScheduler"} | fields))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipeline, spec = theirs(plain), None
            try:
                spec = convert.DiffusersFolder().spec(plain)
            except InputError as error:
                assert "\n" not in str(error)
        if spec is None or pipeline is None:
            found["refused"] += 1
            continue
        assert spec.scheduling is not None
        assert_process(pipeline.scheduler, spec.scheduling)
        found["alike"] += 1
    return found


READ = (
    "DDPMScheduler DDPMParallelScheduler DDIMScheduler DDIMParallelScheduler "
    "DEISMultistepScheduler DPMSolverMultistepScheduler DPMSolverSinglestepScheduler "
    "EulerDiscreteScheduler EulerAncestralDiscreteScheduler HeunDiscreteScheduler "
    "KDPM2DiscreteScheduler LMSDiscreteScheduler PNDMScheduler SASolverScheduler "
    "UniPCMultistepScheduler LCMScheduler TCDScheduler DDIMInverseScheduler "
    "DPMSolverMultistepInverseScheduler KDPM2AncestralDiscreteScheduler"
).split()


@pytest.mark.parametrize("kind", ["DDIMPipeline", "PNDMPipeline"])
def test_pipelines_convert_their_scheduler(tmp_path, kind) -> None:
    save(tmp_path, network())
    change(tmp_path / "model_index.json", _class_name=kind)
    pipeline = getattr(diffusers, kind).from_pretrained(tmp_path)
    scheduling = convert.read_folder(tmp_path).spec.scheduling
    assert_process(pipeline.scheduler, scheduling)
    assert scheduling.kind == kind.replace("Pipeline", "Scheduler")


def test_a_learned_variance_leaves_the_noise(tmp_path) -> None:
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    save(tmp_path, network(out_channels=2), scheduler)
    assert assert_alike(tmp_path) == "alike"
    assert convert.read_folder(tmp_path).spec.network.learned_variance
    path = tmp_path / "scheduler" / "scheduler_config.json"
    change(path, variance_type="fixed_small")
    with pytest.raises(InputError, match="twice its in_channels"):
        convert.read_folder(tmp_path)


def test_the_average_of_a_training_script(tmp_path) -> None:
    """EMAModel.save_pretrained, below a checkpoint of a pipeline."""
    from diffusers.training_utils import EMAModel

    net = network()
    average = EMAModel(
        net.parameters(),
        use_ema_warmup=True,
        model_cls=diffusers.UNet2DModel,
        model_config=net.config,
    )
    average.step(net.parameters())
    save(tmp_path / "out", network(5))
    average.save_pretrained(tmp_path / "out" / "checkpoint-5" / "unet_ema")
    net.save_pretrained(tmp_path / "out" / "checkpoint-5" / "unet")
    found = discovery.find([str(tmp_path / "out")])
    assert list(found.models) == [
        "out",
        "out.checkpoint-5",
        "out.checkpoint-5.unet_ema",
    ]
    spec = convert.DiffusersFolder().spec(found.models["out.checkpoint-5.unet_ema"])
    assert spec.scheduling is not None and not spec.own
    assert any("moving average" in remark for remark in spec.remarks)


def tally() -> dict:
    """How many folders of each kind are read alike, and how many are refused."""
    counts: dict[str, collections.Counter] = collections.defaultdict(
        collections.Counter
    )
    with tempfile.TemporaryDirectory() as place:
        home = pathlib.Path(place)
        for i, forms in enumerate(PAIRS):
            counts["pairs of saves"][compare_saves(home / f"saves-{i}", forms)] += 1
        for i, (name, value) in enumerate(CASES):
            found = compare_networks(home / f"network-{i}", name, value)
            counts["fields of a network"].update(found)
        save(home / "plain", network())
        for name in NAMES:
            counts["schedulers"].update(compare_schedulers(home / "plain", name))
    versions = {"diffusers": diffusers.__version__, "torch": torch.__version__}
    return {
        "command": "python tests/test_as_diffusers.py",
        "read otherwise": 0,  # the comparisons raise
        **{kind: dict(found) for kind, found in counts.items()},
        "classes of schedulers": len(NAMES),
        "device": "CPU",
        **versions,
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    text = json.dumps(tally(), indent=2)
    print(text)
    for file in sys.argv[1:]:
        pathlib.Path(file).write_text(text + "\n")
