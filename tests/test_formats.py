"""Formats: each knows its own models, reads them whole, and is scanned to a verdict."""

import dataclasses
import functools
import hashlib
import importlib.util
import io
import json
import pathlib
import sys
import types
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from ldm_folder import FIRST_STAGE, LATENTS, write_ldm
from test_unet import CHEAP, apply
from tiny_config import INVERSION, TINY, draw_params

from puredif_jax.attacks.channel import Channel
from puredif_jax.defenses.detector import Detector
from puredif_jax.defenses.hypothesis import Exploding, Fading, Hypothesis
from puredif_jax.diffusion import ve
from puredif_jax.diffusion.ddim import DDIM
from puredif_jax.diffusion.multistep import DPMSolver
from puredif_jax.diffusion.path_keeping import PathKeeping
from puredif_jax.diffusion.prediction import estimates, predicting
from puredif_jax.diffusion.sampling import sample
from puredif_jax.diffusion.schedules import LinearBetas, ScaledLinearBetas
from puredif_jax.diffusion.ve import PredictorCorrector, VarianceExploding
from puredif_jax.diffusion.widened import Widened
from puredif_jax.formats import ddim_checkpoint, discovery, entries, hub
from puredif_jax.formats.base import Format, Model, Spec
from puredif_jax.formats.ddim_checkpoint import DDIMCheckpoint
from puredif_jax.formats.ddim_config import Config, read_config
from puredif_jax.formats.diffusers import DiffusersFolder, write_folder
from puredif_jax.formats.diffusers_config import ConvertError
from puredif_jax.formats.entries import Entry
from puredif_jax.formats.fitting import fitting, parameters
from puredif_jax.formats.known import format_of
from puredif_jax.formats.latent import BOUND, LatentFolder
from puredif_jax.formats.scheduling import Scheduling, ScoreScheduling
from puredif_jax.formats.state_dict import from_torch, to_torch
from puredif_jax.formats.weight_sets import WEIGHTS
from puredif_jax.networks.base import ImageNetwork
from puredif_jax.networks.ncsnpp import NCSNpp
from puredif_jax.runs.page import Section
from puredif_jax.stages import audit as audit_stage
from puredif_jax.stages import scan
from puredif_jax.stages.audit import Audit
from puredif_jax.stages.experiment import Scan
from puredif_jax.stages.models import Models, Source
from puredif_jax.stages.pictures import as_images
from puredif_jax.types import InputError, Params

GOLDEN = pathlib.Path(__file__).parent / "golden"
EXPLODING = ScoreScheduling(VarianceExploding(20, 0.01, 5.0), corrections=2, snr=0.3)


def load_maker():
    path = GOLDEN / "make_ddim_checkpoint.py"
    spec = importlib.util.spec_from_file_location("make_ddim_checkpoint", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


maker = load_maker()


@functools.cache
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "ddim_checkpoint.npz") as arrays:
        return dict(arrays)


def code_weights(name: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Weights by the names of the DDIM code, and images `[B, C, H, W]`."""
    lines = (line.split() for line in golden()[f"{name}_parameters"].tolist())
    shapes = {key: tuple(map(int, shape.split(","))) for key, shape in lines}
    return maker.draw(name, shapes)


# A format of a user: arrays in an .npz, beside a JSON of the schedule's length.
class Arrays(Format):
    name = "a file of arrays with its network beside it"

    def knows(self, path: pathlib.Path) -> bool:
        return path.suffix == ".npz" and path.with_suffix(".json").is_file()

    def spec(self, path: pathlib.Path, scheduler: str | None = None) -> Spec:
        steps = json.loads(path.with_suffix(".json").read_text())["steps"]
        return Spec(TINY, Scheduling(LinearBetas(steps), clip=None))

    def check(self, path: pathlib.Path, spec: Spec) -> tuple[str, ...]:
        self._arrays(path)
        return ()

    def read(self, path: pathlib.Path, spec: Spec) -> Params:
        found = self._arrays(path)
        if not all(np.isfinite(x).all() for x in found.values()):
            raise ConvertError(f"{path} has NaN or infinity")
        return from_torch(found, spec.network)

    def files(self, path: pathlib.Path) -> list[pathlib.Path]:
        return [path]

    def _arrays(self, path: pathlib.Path) -> dict[str, np.ndarray]:
        try:
            with np.load(io.BytesIO(path.read_bytes())) as arrays:
                return dict(arrays)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ConvertError(f"{path} is not a file of arrays") from error


def write_arrays(folder: pathlib.Path) -> tuple[pathlib.Path, Params]:
    params = draw_params(TINY, 3)
    np.savez(folder / "model.npz", **to_torch(params))
    (folder / "model.json").write_text('{"steps": 1000}')
    return folder / "model.npz", params


SKIPPING = NCSNpp(
    sample_size=(8, 8),
    in_channels=3,
    block_out_channels=(8,),
    down_block_types=("SkipDownBlock2D",),
    up_block_types=("SkipUpBlock2D",),
    layers_per_block=1,
)


def write_diffusers(
    folder: pathlib.Path, scheduling: Scheduling, network: ImageNetwork = TINY
) -> tuple[pathlib.Path, Params]:
    params = draw_params(network, 1)
    write_folder(folder / "model", Model(Spec(network, scheduling), params))
    return folder / "model", params


def write_latents(folder: pathlib.Path) -> tuple[pathlib.Path, Params]:
    return folder / "ldm", write_ldm(folder / "ldm")[1]


def write_checkpoint(
    folder: pathlib.Path, kind: str = "average", name: str = "single"
) -> tuple[pathlib.Path, Params]:
    """As the code saves it: a prefix in the state dict, none in the moving average."""
    torch = pytest.importorskip("torch")
    weights, _ = code_weights(name)
    found = {key: torch.from_numpy(value) for key, value in weights.items()}
    raw = {f"module.{key}": value + 1 for key, value in found.items()}
    state = torch.optim.Adam([torch.nn.Parameter(torch.zeros(3))]).state_dict()
    path = folder / "ckpt.pth"
    saved = {
        "average": [raw, state, 3, 70, found],
        "raw": [{f"module.{k}": v for k, v in found.items()}, state, 3, 70],
        "plain": found,
    }
    torch.save(saved[kind], path)
    return path, read_code(name)[1]


SILENT = Config(None, None, True)  # no config.yml


def read_code(name: str, config: Config = SILENT):
    """The network and the parameters of the golden weights, without PyTorch."""
    weights, _ = code_weights(name)
    place = pathlib.Path("ckpt.pth")
    stored = [
        Entry(place, key, "F32", x.shape, lambda x=x: x) for key, x in weights.items()
    ]
    shapes = {key: x.shape for key, x in weights.items()}
    network = ddim_checkpoint.read_network(shapes, place, config, [])
    levels = len(network.block_out_channels)
    renamed = functools.partial(ddim_checkpoint.diffusers_name, levels=levels)
    return network, parameters(fitting(stored, network, place, renamed), network)


class Case(NamedTuple):
    """A format, and a model in it.

    write: makes the model in a folder: its path, and the parameters that are read.
    weights: the file that holds them, from that path.
    opened: its weights tell the network.
    """

    kind: type[Format]
    write: Callable[[pathlib.Path], tuple[pathlib.Path, Params]]
    weights: str
    hypothesis: Hypothesis = Fading()
    opened: bool = False


CASES = {
    "diffusers": Case(
        DiffusersFolder,
        lambda folder: write_diffusers(folder, Scheduling()),
        f"unet/{WEIGHTS}",
    ),
    "score": Case(
        DiffusersFolder,
        lambda folder: write_diffusers(folder, EXPLODING),
        f"unet/{WEIGHTS}",
        Exploding(),
    ),
    "ncsnpp": Case(
        DiffusersFolder,
        lambda folder: write_diffusers(folder, EXPLODING, SKIPPING),
        f"unet/{WEIGHTS}",
        Exploding(),
    ),
    "latents": Case(LatentFolder, write_latents, f"unet/{WEIGHTS}"),
    "checkpoint": Case(DDIMCheckpoint, write_checkpoint, "", opened=True),
    "user's": Case(Arrays, write_arrays, ""),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=[*CASES])


@each_case
def test_a_model_is_known_by_its_own_format_alone(tmp_path, case) -> None:
    path, _ = case.write(tmp_path)
    assert type(format_of(path)) is case.kind
    assert format_of(tmp_path) is None and format_of(tmp_path / "nowhere") is None


@each_case
def test_a_model_comes_in_whole(tmp_path, case) -> None:
    path, params = case.write(tmp_path)
    kind = case.kind()
    spec = kind.spec(path)
    assert hash(spec) == hash(kind.spec(path)) and spec == kind.spec(path)
    assert kind.check(path, spec) == ()
    found = kind.read(path, spec)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    shapes = jax.eval_shape(spec.network.init, jax.random.key(0))
    assert jax.tree.map(np.shape, found) == jax.tree.map(lambda x: x.shape, shapes)
    assert spec.own and all(remark[-1] != "." for remark in spec.remarks)


@each_case
def test_the_files_are_those_that_the_weights_depend_on(tmp_path, case) -> None:
    path, params = case.write(tmp_path)
    files = case.kind().files(path)
    assert path / case.weights in files or path in files
    home = path if path.is_dir() else path.parent
    wanted = {
        str(file.relative_to(home)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }
    assert Source(path).digests == wanted
    for file in tmp_path.rglob("*"):
        if file.is_file() and file not in files and file.suffix != ".json":
            file.unlink()
    found = case.kind().read(path, case.kind().spec(path))
    jax.tree.map(np.testing.assert_array_equal, found, params)


@each_case
@pytest.mark.parametrize("damage", ["cut", "empty", "page", "other"])
def test_damaged_weights_are_told_in_a_sentence(tmp_path, case, damage) -> None:
    """By the configurations alone the model is known all the same."""
    path, _ = case.write(tmp_path)
    kind, file = case.kind(), path / case.weights if case.weights else path
    spec = kind.spec(path)
    content = {
        "cut": file.read_bytes()[: file.stat().st_size // 2],
        "empty": b"",
        "page": b"<!DOCTYPE html><html>",
        "other": b"\x80\x02}q\x00." + bytes(1000),
    }
    file.write_bytes(content[damage])
    if not case.opened:
        assert kind.spec(path) == spec, "no weights are opened"
    for ask in (kind.check, kind.read):
        with pytest.raises(ConvertError) as found:
            ask(path, spec)
        text = str(found.value)
        assert str(file) in text and "\n" not in text and "Traceback" not in text


@each_case
def test_values_that_are_not_finite_are_refused(tmp_path, case) -> None:
    path, _ = case.write(tmp_path)
    file = path / case.weights if case.weights else path
    if file.suffix == ".pth":
        torch = pytest.importorskip("torch")
        found = torch.load(file, weights_only=True)
        found[4]["conv_in.bias"][0] = torch.nan
        torch.save(found, file)
    elif file.suffix == ".npz":
        with np.load(file) as arrays:
            np.savez(file, **{k: np.full_like(v, np.nan) for k, v in arrays.items()})
    else:
        arrays = safetensors.numpy.load_file(file)
        arrays["conv_in.bias"] = np.full_like(arrays["conv_in.bias"], np.inf)
        safetensors.numpy.save_file(arrays, file)
    kind = case.kind()
    with pytest.raises(ConvertError, match="NaN or infinity"):
        kind.read(path, kind.spec(path))


@each_case
def test_what_is_read_once_is_kept_until_another_is_read(tmp_path, case) -> None:
    path, _ = case.write(tmp_path)
    other, _ = write_diffusers(tmp_path / "other", Scheduling())
    models = Models()
    source = models[path]
    assert models[str(path)] is source and source.params is source.params
    kept, spec, digests = source.params, source.spec, source.digests
    assert models[other].params is not None
    assert models[path].spec is spec and models[path].digests is digests
    assert models[path].params is not kept, "one at a time is in memory"


def test_two_formats_that_know_one_path_are_told(tmp_path) -> None:
    path, _ = write_arrays(tmp_path)

    class Also(Arrays):
        name = "another one"

        def knows(self, path: pathlib.Path) -> bool:
            return super().knows(path) and (path.parent / "also").exists()

    assert type(format_of(path)) is Arrays
    (tmp_path / "also").touch()
    with pytest.raises(ConvertError, match=r"\(Arrays\) and another one \(Also\)"):
        format_of(path)
    del Also


# Samplers, as the specification gives them.


def test_the_samplers_of_a_variance_exploding_model(tmp_path) -> None:
    path, _ = write_diffusers(tmp_path, EXPLODING)
    spec = DiffusersFolder().spec(path)
    assert spec.scheduling == EXPLODING
    assert spec.scheduling.prediction_type == "score"
    index = json.loads((path / "model_index.json").read_text())
    assert index["_class_name"] == "ScoreSdeVePipeline"
    found = spec.scheduling.samplers(7)
    assert found == (PredictorCorrector(7, 2, 0.3), DPMSolver(7, "linspace"))
    found = spec.scheduling.samplers(1000)
    assert (found.ancestral.levels, found.deterministic.steps) == (20, 19)


def test_the_samplers_of_the_ddim_code_bound_the_image_of_ddpm_alone(tmp_path) -> None:
    path, _ = write_checkpoint(tmp_path)
    found = DDIMCheckpoint().spec(path).scheduling.samplers(10)
    assert found == (PathKeeping(10, clip=1.0), DDIM(10, clip=None))


@pytest.mark.parametrize(
    "change,words",
    [
        ({"snr": 0}, "snr=0: it must be a number from 1e-06"),
        ({"sigma_max": 0.001}, "sigma_min < sigma_max"),
        ({"correct_steps": 0.5}, "correct_steps=0.5: it must be a whole number"),
        ({"beta_end": 0.2}, "sets beta_end, which we do not know"),
        ({"sigma_min": float("nan")}, "sigma_min=nan"),
    ],
)
def test_what_no_variance_exploding_process_has_is_refused(
    tmp_path, change, words
) -> None:
    path, _ = write_diffusers(tmp_path, EXPLODING)
    place = path / "scheduler" / "scheduler_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | change))
    with pytest.raises(ConvertError, match=words):
        DiffusersFolder().spec(path)


def test_a_pipeline_of_another_kind_does_not_draw_by_scores(tmp_path) -> None:
    path, _ = write_diffusers(tmp_path, EXPLODING)
    place = path / "model_index.json"
    index = json.loads(place.read_text())
    place.write_text(json.dumps(index | {"_class_name": "DDPMPipeline"}))
    with pytest.raises(ConvertError, match="does not draw by ScoreSdeVeScheduler"):
        DiffusersFolder().spec(path)


@pytest.fixture(scope="module")
def diffusers():
    pytest.importorskip("torch")
    return pytest.importorskip("diffusers")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "network",
    [dataclasses.replace(TINY, in_channels=3), SKIPPING],
    ids=["UNet", "NCSNpp"],
)
def test_a_variance_exploding_folder_draws_as_in_diffusers(
    diffusers, tmp_path, monkeypatch, network
) -> None:
    """From the same noise, with none added on the way, to the same images."""
    import torch
    from diffusers.schedulers import scheduling_sde_ve

    params = draw_params(network, 2)
    write_folder(tmp_path, Model(Spec(network, EXPLODING), params))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipeline).__name__ == "ScoreSdeVePipeline"
    pipeline.set_progress_bar_config(disable=True)
    shape = (2, 3, *network.sample_size)
    start = np.random.default_rng(4).normal(size=shape).astype(np.float32)
    module = importlib.import_module(type(pipeline).__module__)
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: torch.tensor(start))
    monkeypatch.setattr(
        scheduling_sde_ve, "randn_tensor", lambda shape, **k: torch.zeros(shape)
    )
    wanted = pipeline(2, num_inference_steps=20, output_type="np").images

    spec = DiffusersFolder().spec(tmp_path)
    assert spec.network == network
    schedule = spec.scheduling.betas.tables()
    model = predicting(spec.network, schedule, spec.scheduling.prediction_type)
    monkeypatch.setattr(ve.jax.random, "normal", lambda key, shape, d: jnp.zeros(shape))

    @functools.partial(jax.jit, compiler_options=CHEAP)
    def draw(eps):
        sampler = spec.scheduling.samplers(20).ancestral
        x = Channel.clean(schedule).start(schedule, eps, jnp.zeros_like(eps))
        return sample(model, params, schedule, sampler, x, jax.random.key(0))

    found = np.clip(draw(jnp.asarray(start.transpose(0, 2, 3, 1))) / 2 + 0.5, 0, 1)
    assert wanted.std() > 0.05
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_network_that_we_write_is_saved_again_by_diffusers(
    diffusers, tmp_path
) -> None:
    path, params = write_diffusers(tmp_path, Scheduling())
    again = tmp_path / "again"
    diffusers.DDPMPipeline.from_pretrained(path).save_pretrained(again)
    kind = DiffusersFolder()
    spec = kind.spec(again)
    assert spec == kind.spec(path)
    jax.tree.map(np.testing.assert_array_equal, kind.read(again, spec), params)


# The checkpoint file of the DDIM code.


@pytest.mark.parametrize("name", maker.CONFIGS)
def test_the_network_of_the_code_gives_its_outputs(name) -> None:
    network, params = read_code(name)
    config = maker.CONFIGS[name]
    side = 16 * 2 ** config["attention"][0]
    assert network.image_shape == (side, side, config["channels"])
    _, images = code_weights(name)
    times = jnp.asarray(maker.TIMES)
    found = apply(network, params, jnp.asarray(images.transpose(0, 2, 3, 1)), times)
    wanted = golden()[f"{name}_output"].transpose(0, 2, 3, 1)
    assert wanted.std() > 0.1
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("name", maker.CONFIGS)
def test_the_golden_outputs_are_those_of_the_maker(name) -> None:
    pytest.importorskip("torch")
    shapes, output = maker.compute(name)
    lines = [f"{k} {','.join(map(str, v))}" for k, v in sorted(shapes.items())]
    assert lines == golden()[f"{name}_parameters"].tolist()
    wanted = golden()[f"{name}_output"]
    np.testing.assert_allclose(output, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
    "kind,words",
    [
        ("average", "the moving average of the weights is taken"),
        ("raw", "no moving average: the raw weights"),
        ("plain", "one set of weights"),
    ],
)
def test_what_a_checkpoint_holds_is_said(tmp_path, kind, words) -> None:
    path, params = write_checkpoint(tmp_path, kind, "cifar10")
    format_ = DDIMCheckpoint()
    spec = format_.spec(path)
    assert spec.network.block_out_channels == (32, 64, 64)
    assert spec.network.sample_size == (32, 32)
    jax.tree.map(np.testing.assert_array_equal, format_.read(path, spec), params)
    (first, size, schedule) = spec.remarks
    assert words in first and "32x32 if the network attends at 16x16" in size
    assert "betas are linear" in schedule and spec.scheduling.betas == LinearBetas()


def test_a_checkpoint_is_opened_once(tmp_path, monkeypatch) -> None:
    path, _ = write_checkpoint(tmp_path)
    count, whole = [], ddim_checkpoint.unpickled

    def unpickled(path):
        count.append(path)
        return whole(path)

    monkeypatch.setattr(ddim_checkpoint, "unpickled", unpickled)
    source = Source(path)
    assert source.spec and source.remarks and source.params
    assert count == [path]


YAML = """!!python/object:argparse.Namespace
data: !!python/object:argparse.Namespace
  dataset: CIFAR10   # of tiny images
  image_size: 16
  rescaled: true
model: !!python/object:argparse.Namespace
  ch_mult: [1, 2, 2]
  attn_resolutions:
  - 16
diffusion:
    beta_schedule: 'quad'
    beta_start: 0.001
    beta_end: 0.03
    num_diffusion_timesteps: 200
evil: !!python/object/apply:os.mkdir [executed]
"""


def test_a_configuration_beside_a_checkpoint_is_read_and_not_executed(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path, _ = write_checkpoint(tmp_path, name="cifar10")
    (tmp_path / "config.yml").write_text(YAML)
    spec = DDIMCheckpoint().spec(path)
    assert spec.network.sample_size == (16, 16) and len(spec.remarks) == 1
    assert spec.scheduling.betas == ScaledLinearBetas(200, 0.001, 0.03)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "before,after,words",
    [
        ("image_size: 16", "image_size: large", "data.image_size='large'"),
        ("rescaled: true", "rescaled: false", "data.rescaled='False'"),
        ("'quad'", "jsd", "beta_schedule='jsd': read are linear, quad"),
        ("beta_end: 0.03", "beta_end: 0.0001", "start <= end"),
        ("image_size: 16", "image_size: 15", "sample_size of two multiples"),
    ],
)
def test_a_configuration_that_is_not_supported(tmp_path, before, after, words) -> None:
    (tmp_path / "config.yml").write_text(YAML.replace(before, after))
    with pytest.raises(ConvertError, match=words):
        config = read_config(tmp_path / "config.yml")
        read_code("cifar10", config)


def test_an_image_size_that_cannot_be_told_is_refused() -> None:
    weights, _ = code_weights("cifar10")
    shapes = {k: v.shape for k, v in weights.items() if not k.startswith("down.1.attn")}
    place = pathlib.Path("ckpt.pth")
    with pytest.raises(ConvertError, match="does not tell the size of its images"):
        ddim_checkpoint.read_network(shapes, place, SILENT, [])
    network = ddim_checkpoint.read_network(shapes, place, Config(64, None, True), [])
    assert network.sample_size == (64, 64)


def test_without_pytorch_a_sentence_says_what_to_install(tmp_path, monkeypatch) -> None:
    path = tmp_path / "ckpt.pth"
    path.write_bytes(b"\x80\x02 module.temb.dense.0.weight")
    assert type(format_of(path)) is DDIMCheckpoint
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConvertError, match="install the extra 'torch'"):
        DDIMCheckpoint().spec(path)


def test_a_hostile_checkpoint_is_a_row_with_a_reason(tmp_path) -> None:
    """One that would call something has the names, and is never executed."""
    torch = pytest.importorskip("torch")

    class Bomb:
        def __reduce__(self):
            return pathlib.Path.mkdir, (tmp_path / "executed",)

    path = tmp_path / "models" / "ckpt.pth"
    path.parent.mkdir()
    torch.save([{"temb.dense.0.weight": torch.zeros(1)}, Bomb()], path)
    assert discovery.find([str(path.parent)]).models == {"models.ckpt.pth": path}
    with pytest.raises(ConvertError, match="nothing in it was executed"):
        DDIMCheckpoint().spec(path)
    assert not (tmp_path / "executed").exists()


# Latent diffusion.


@pytest.mark.filterwarnings("ignore")
def test_a_folder_of_latents_draws_the_images_of_diffusers(diffusers, tmp_path) -> None:
    import torch

    path, params = write_latents(tmp_path)
    pipeline = diffusers.LDMPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    start = torch.randn((5, 3, 8, 8), generator=torch.manual_seed(5)).numpy()
    wanted = pipeline(
        5, torch.manual_seed(5), num_inference_steps=10, output_type="np"
    ).images

    kind = LatentFolder()
    spec = kind.spec(path)
    assert spec.scheduling.betas == Widened(
        ScaledLinearBetas(1000, 0.0015, 0.0195), BOUND
    )
    schedule = spec.scheduling.betas.tables()
    model = predicting(spec.network, schedule, spec.scheduling.prediction_type)

    @functools.partial(jax.jit, compiler_options=CHEAP)
    def draw(eps):
        sampler = spec.scheduling.samplers(10).deterministic
        x = schedule.start(eps)
        return sample(model, params, schedule, sampler, x, jax.random.key(0))

    drawn = np.asarray(draw(jnp.asarray(start.transpose(0, 2, 3, 1))))
    found = kind.shown(path, spec)(drawn)
    assert found.shape == (5, 32, 32, 3) and wanted.std() > 0.05
    np.testing.assert_allclose(found / 2 + 0.5, wanted, atol=1e-4)


def test_pictures_of_latents_become_images_a_few_at_a_time(tmp_path) -> None:
    path, _ = write_latents(tmp_path)
    kind = LatentFolder()
    shown = kind.shown(path, kind.spec(path))
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (6, 8, 8, 3)).astype(np.float32)
    section = Section(
        "All",
        pictures=(
            ("draws", images),
            ("inverted trigger, here", images[0]),
            ("difference from the true one", images[0]),
        ),
        sections=(Section("Below", pairs=(("draws with the trigger", images[:1]),)),),
    )
    assert as_images(section, None) is section
    found = as_images(section, shown)
    (_, draws), (_, trigger) = found.pictures
    assert draws.shape == (6, 32, 32, 3) and np.abs(draws).max() <= 1
    assert trigger.shape == (32, 32, 3)
    np.testing.assert_allclose(trigger, draws[0], atol=1e-5)
    ((_, below),) = found.sections[0].pairs
    np.testing.assert_allclose(below, draws[:1], atol=1e-5)
    params = write_ldm(tmp_path / "again")[0]
    latents = images[:1] * BOUND / FIRST_STAGE.scaling_factor
    wanted = FIRST_STAGE.decode(params, latents)
    np.testing.assert_allclose(draws[:1], np.clip(wanted, -1, 1), atol=1e-4)
    assert shown(images[:0]).shape == (0, 32, 32, 3)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_wider_range_changes_the_unit_and_nothing_else(prediction) -> None:
    """The noise and the image of latents, by any prediction."""
    plain, wide = (p.tables() for p in (LinearBetas(), Widened(LinearBetas(), BOUND)))

    def network(params, x, t):
        return jnp.sin(3 * x) + t[:, None, None, None] / 1000

    latents = np.random.default_rng(1).normal(size=(2, 4, 4, 1)).astype(np.float32)
    for t in (0, 500, 999):
        wanted = estimates(
            predicting(network, plain, prediction), {}, plain, latents, jnp.int32(t)
        )
        found = estimates(
            predicting(network, wide, prediction), {}, wide, latents / 4, jnp.int32(t)
        )
        np.testing.assert_allclose(found.eps, wanted.eps, rtol=2e-4, atol=1e-4)
        np.testing.assert_allclose(4 * found.x0, wanted.x0, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize(
    "file,change,words",
    [
        ("model_index.json", {"_class_name": "LDMSuperResolutionPipeline"}, "class 'L"),
        ("model_index.json", {"bert": ["transformers", "X"]}, "differs in bert"),
        ("model_index.json", {"vqvae": ["os", "system"]}, "only classes of diffusers"),
        ("vqvae/config.json", {"_class_name": "AutoencoderKL"}, "VQModel"),
        ("vqvae/config.json", {"act_fn": "gelu"}, "act_fn='gelu'"),
        ("unet/config.json", {"in_channels": 1, "out_channels": 1}, "3 channels"),
        ("scheduler/scheduler_config.json", {"thresholding": True}, "for latents"),
    ],
)
def test_latents_that_are_not_supported(tmp_path, file, change, words) -> None:
    path, _ = write_latents(tmp_path)
    place = path / file
    index = json.loads(place.read_text())
    place.write_text(json.dumps(index | change))
    if change.get("_class_name") == "AutoencoderKL":
        top = path / "model_index.json"
        kind = {"vqvae": ["diffusers", "AutoencoderKL"]}
        top.write_text(json.dumps(json.loads(top.read_text()) | kind))
    with pytest.raises(ConvertError, match=words):
        LatentFolder().spec(path)


def test_a_bound_on_latents_is_in_their_own_unit(tmp_path) -> None:
    path, _ = write_latents(tmp_path)
    place = path / "scheduler" / "scheduler_config.json"
    change = {"clip_sample": True, "clip_sample_range": 2.0}
    place.write_text(json.dumps(json.loads(place.read_text()) | change))
    assert LatentFolder().spec(path).scheduling.clip == 2.0 / BOUND


def test_a_scaling_factor_that_is_not_named_is_the_one_of_diffusers(tmp_path) -> None:
    path, _ = write_latents(tmp_path)
    place = path / "vqvae" / "config.json"
    config = json.loads(place.read_text())
    del config["scaling_factor"]
    place.write_text(json.dumps(config))
    remarks = LatentFolder().spec(path).remarks
    assert any("no scaling_factor: it is 0.18215" in text for text in remarks)


def test_first_stages_with_missing_weights_are_told(tmp_path) -> None:
    path, _ = write_latents(tmp_path)
    (path / "vqvae" / WEIGHTS).unlink()
    with pytest.raises(ConvertError, match=f"vqvae has none of {WEIGHTS}"):
        LatentFolder().spec(path)


# Discovery and scans.


def test_models_of_all_formats_are_rows_of_their_own(tmp_path) -> None:
    top = tmp_path / "models"
    (top / "here").mkdir(parents=True)
    write_latents(top)
    write_checkpoint(top / "here")
    write_arrays(top / "here")
    write_diffusers(top, Scheduling())
    (top / "here" / "other.pth").touch()
    found = discovery.find([str(top)])
    assert found.notes == ()
    error = found.models.pop("here.loose")
    assert "other.pth (a pickle)" in str(error) and "ckpt" not in str(error)
    assert found.models == {
        "ldm": top / "ldm",
        "model": top / "model",
        "here.ckpt.pth": top / "here" / "ckpt.pth",
        "here.model.npz": top / "here" / "model.npz",
    }
    lone = discovery.find([str(top / "here" / "ckpt.pth"), str(top / "ldm")]).models
    assert lone == {"here.ckpt.pth": top / "here" / "ckpt.pth", "ldm": top / "ldm"}


def test_further_weights_of_a_folder_of_latents_are_not_passed_over(tmp_path) -> None:
    path, _ = write_latents(tmp_path)
    same = path / "vqvae" / "diffusion_pytorch_model.same.safetensors"
    same.write_bytes((path / "vqvae" / WEIGHTS).read_bytes())
    other = path / "unet" / "diffusion_pytorch_model.other.safetensors"
    safetensors.numpy.save_file(to_torch(draw_params(LATENTS, 9)), other)
    found = discovery.find([str(path)])
    assert found.models == {"ldm": path, "ldm.other": other}
    assert any("same.safetensors holds the weights of" in x for x in found.notes)
    with pytest.raises(ConvertError, match="a pipeline with vqvae"):
        format_of(other).spec(other)
    reason = str(discovery.find([str(path)], variant="other").models["ldm"])
    assert "which has no variants such as 'other'" in reason


@pytest.fixture
def compilation_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.getbasetemp() / "compiled"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))


@pytest.mark.usefixtures("standard_promotion", "compilation_cache")
@each_case
def test_a_model_is_scanned_and_read_once(tmp_path, monkeypatch, case) -> None:
    path, _ = case.write(tmp_path)
    calls: list[str] = []
    for name in ("spec", "check", "read"):
        whole = getattr(case.kind, name)

        def counted(*args, name=name, whole=whole):
            calls.append(name)
            return whole(*args)

        monkeypatch.setattr(case.kind, name, counted)
    pictured: list[tuple[int, ...]] = []

    def as_images_(section, shown):
        found = as_images(section, shown)
        for part in found.tree():
            both = (*part.pictures, *part.pairs)
            pictured.extend(np.shape(x)[-3:] for _, x in both)
        return found

    monkeypatch.setattr(audit_stage, "as_images", as_images_)
    audit = Audit(
        weights=(),
        hypotheses=(case.hypothesis,),
        inversion=INVERSION,
        detector=Detector(clean=(9.0, 9.0), linear=np.inf),
    )
    home = tmp_path / "scan"
    wanted = Scan(str(home), (str(path),), audit, steps=2, draws=8, devices=1)
    _, status = scan.perform_scan(wanted)
    (section, *_) = json.loads((home / "report.json").read_text())["sections"]
    (row,) = section["table"]
    assert status == 0 and row["verdict"] == "clean", row
    assert sorted(calls) == ["check", "read", "spec"]
    shape = case.kind().spec(path).network.image_shape
    shape = (32, 32, 3) if case.kind is LatentFolder else shape
    assert set(pictured) == {shape}
    (folder,) = (x for x in home.iterdir() if (x / "report.html").exists())
    (found,) = json.loads((folder / "report.json").read_text())["numbers"].values()
    assert found["sha256"] == Source(path).digests
    assert set(case.kind().spec(path).remarks) <= {*found["remarks"]}


def test_what_a_scan_says_of_a_path_in_no_format(tmp_path) -> None:
    (tmp_path / "x").mkdir()
    wanted = Scan(str(tmp_path / "scan"), (str(tmp_path),), Audit(weights=()))
    with pytest.raises(InputError, match="in none of the formats"):
        scan.as_experiment(wanted, "x", tmp_path / "x")


def test_all_parts_of_latent_diffusion_are_fetched_from_the_hub(
    tmp_path, monkeypatch
) -> None:
    """Configurations first; weights of both networks, where those are supported."""
    path, _ = write_latents(tmp_path)
    asked: list[str] = []

    def snapshot_download(name, revision, allow_patterns, local_files_only):
        asked.extend(allow_patterns)
        return str(path)

    source = types.ModuleType("huggingface_hub")
    source.snapshot_download = snapshot_download
    source.list_repo_files = lambda name, revision: []
    monkeypatch.setitem(sys.modules, "huggingface_hub", source)
    assert hub.find_folder("owner/name") == path
    assert "vqvae/config.json" in asked
    assert {f"vqvae/{WEIGHTS}", f"unet/{WEIGHTS}"} <= {*asked}
    place = path / "vqvae" / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"act_fn": "gelu"}))
    asked.clear()
    assert hub.find_folder("owner/name") == path
    assert not any(WEIGHTS in pattern for pattern in asked)


def test_a_file_that_must_not_be_read_is_named(tmp_path, monkeypatch) -> None:
    path, _ = write_checkpoint(tmp_path)

    def closed(self, *args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(ddim_checkpoint.zipfile, "is_zipfile", closed)
    with pytest.raises(InputError, match=r"ckpt.pth \(a pickle\)"):
        discovery.find([str(path.parent)])


def test_a_loader_that_may_execute_a_pickle_opens_none(tmp_path, monkeypatch) -> None:
    """Weights-only loading was evaded up to PyTorch 2.5 (CVE-2025-32434)."""
    torch = pytest.importorskip("torch")
    path = tmp_path / "weights.bin"
    torch.save({"a": torch.ones(2)}, path)
    assert list(entries.unpickled(path)) == ["a"]
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(ConvertError, match="PyTorch 2.5.1.cpu may execute one"):
        entries.unpickled(path)
