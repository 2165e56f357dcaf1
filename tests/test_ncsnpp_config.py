"""Configurations of NCSN++: a field is read as diffusers does, or refused by name."""

import dataclasses
import inspect
import json
import random
import re

import jax
import numpy as np
import pytest
from golden import make_ncsnpp as maker
from golden import make_unet
from test_unet import apply, assert_close

from puredif_jax.formats import state_dict
from puredif_jax.formats.diffusers_config import ConvertError, read_unet, write_unet
from puredif_jax.formats.ncsnpp_config import read_ncsnpp, write_ncsnpp
from puredif_jax.formats.network_config import read_network, write_network
from puredif_jax.networks.ncsnpp import SMALL, NCSNpp
from puredif_jax.networks.unet import SHIPPED, UNet

NETWORKS = [
    *(NCSNpp(**config) for config in (maker.CONFIGS | maker.FULL).values()),
    *(UNet(**config) for config in make_unet.CONFIGS.values()),
    dataclasses.replace(SHIPPED, learned_variance=True),
    SMALL,
]
# The smallest with all that there is.
BASE = write_ncsnpp(
    NCSNpp(
        sample_size=(8, 8),
        block_out_channels=(8, 8),
        down_block_types=("SkipDownBlock2D",) * 2,
        up_block_types=("SkipUpBlock2D",) * 2,
        layers_per_block=1,
    )
)


def as_file(config):
    return json.loads(json.dumps(config))


@pytest.mark.parametrize("network", NETWORKS, ids=lambda net: type(net).__name__)
def test_a_configuration_comes_back(network):
    assert read_network(as_file(write_network(network))) == network


def test_the_blocks_tell_the_network():
    both = ((SHIPPED, read_unet, write_unet), (SMALL, read_ncsnpp, write_ncsnpp))
    for network, read, write in both:
        config = write_network(network)
        assert config == write(network)
        assert read_network(config) == read(config) == network
    mixed = write_network(SMALL) | {"down_block_types": ["DownBlock2D"] * 3}
    with pytest.raises(ConvertError, match="3 names out of SkipDownBlock2D"):
        read_network(mixed)
    hidden = write_network(SMALL) | {"_use_default_values": ["down_block_types"]}
    with pytest.raises(ConvertError, match="down_block_types needs 3 names"):
        read_network(hidden)
    fourier = write_network(SHIPPED) | {"time_embedding_type": "fourier"}
    with pytest.raises(ConvertError, match="time_embedding_type='fourier', which is"):
        read_network(fourier)


def test_another_class_is_refused():
    for network in (SHIPPED, SMALL):
        config = write_network(network)
        with pytest.raises(ConvertError, match="^here is of class 'VQModel': only"):
            read_network(config, "here", "VQModel")
        del config["_class_name"]
        assert read_network(config, "here", "UNet2DModel") == network


def test_images_of_other_channels_get_a_word():
    remarks: list[str] = []
    assert read_network(write_network(SMALL), "here", None, remarks) == SMALL
    (remark,) = remarks
    assert remark.startswith("here has in_channels=1: diffusers has skip blocks for")
    single = NCSNpp(**maker.CONFIGS["single"])  # of one channel, without resampling
    for network in (NCSNpp(), single, SHIPPED):
        read_network(write_network(network), "here", None, found := [])
        assert not found


def test_a_moving_average_gets_a_word():
    config = BASE | {"decay": 0.9999, "optimization_step": 5, "use_ema_warmup": False}
    remarks: list[str] = []
    assert read_network(config, "here", None, remarks) == read_network(BASE)
    assert "here is of a moving average of weights (decay, opt" in remarks[0]


# Values of the fields: those that are read, and those that are refused.
FIELDS = {
    "sample_size": ([16, [8, 16]], [None, 7, [8, 8, 8]]),
    "in_channels": ([], [1, 4, "3"]),
    "out_channels": ([], [1, 6]),
    "center_input_sample": ([True], [0, None]),
    "time_embedding_type": (["positional"], ["learned", None]),
    "time_embedding_dim": ([None, 32], [16]),
    "freq_shift": ([1], ["1"]),
    "flip_sin_to_cos": ([False], ["no"]),
    "down_block_types": (
        [["UNetResSkipDownBlock2D"] * 2],
        [["SkipDownBlock2D", "DownBlock2D"], ["SkipDownBlock2D"], "SkipDownBlock2D"],
    ),
    "mid_block_type": ([], [None]),
    "up_block_types": (
        [["UNetResSkipUpBlock2D"] * 2],
        [["SkipUpBlock2D", "UpBlock2D"], [["SkipUpBlock2D"], 3]],
    ),
    "block_out_channels": ([[8, 12]], [[8, 3], [8], []]),
    "layers_per_block": ([2], [0, 40]),
    "mid_block_scale_factor": ([1, 1.5], ["1", 0, None]),
    "downsample_padding": ([0, 5], []),
    "downsample_type": (["resnet"], []),
    "upsample_type": (["resnet"], []),
    "dropout": ([0.1], [2.0]),
    "act_fn": (["swish", "SiLU"], ["gelu"]),
    "attention_head_dim": ([None, 4], [3, 16]),
    "norm_num_groups": ([None, 4], [5, 0]),
    "attn_norm_num_groups": ([None], [4]),
    "norm_eps": ([1e-3], [-1.0]),
    "resnet_time_scale_shift": ([], ["scale_shift"]),
    "add_attention": ([], [False]),
    "class_embed_type": ([], ["timestep", "identity"]),
    "num_class_embeds": ([], [3]),
    "num_train_timesteps": ([10], []),
}
READ = [(name, value) for name, (values, _) in FIELDS.items() for value in values]
REFUSED = [(name, value) for name, (_, values) in FIELDS.items() for value in values]


@pytest.mark.parametrize("name,value", REFUSED, ids=str)
def test_other_values_are_refused_by_name(name, value):
    with pytest.raises(ConvertError) as caught:
        read_network(BASE | {name: value}, "here")
    sentence = str(caught.value)
    assert sentence.startswith("here ") and "\n" not in sentence
    said = {
        "time_embedding_dim": "=16",
        "block_out_channels": "channels|_block_types|1 to 32 blocks",
        "norm_num_groups": "8 channels in 5 groups|norm_num_groups must be",
    }
    assert re.search(said.get(name, name), sentence)


def test_an_unknown_field_is_refused():
    with pytest.raises(ConvertError, match="here sets resamp, which we do not know"):
        read_network(BASE | {"resamp": "fir"}, "here")


# --- Against diffusers ---------------------------------------------------------------


@pytest.fixture(scope="module")
def diffusers():
    pytest.importorskip("torch")
    return pytest.importorskip("diffusers")


def test_every_field_of_diffusers_has_values(diffusers):
    taken = inspect.signature(diffusers.UNet2DModel.__init__).parameters
    assert set(FIELDS) == set(taken) - {"self"}
    silent = ("down_block_types", "up_block_types", "sample_size")
    config = {"_class_name": "UNet2DModel"} | {name: BASE[name] for name in silent}
    config["block_out_channels"] = [8, 8]
    defaults = {k: v.default for k, v in taken.items() if k != "self"} | config
    config["norm_num_groups"] = defaults["norm_num_groups"] = None  # 32 would not fit
    assert read_network(config) == read_network(as_file(defaults))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name,value", READ, ids=str)
def test_what_is_read_computes_as_in_diffusers(diffusers, name, value):
    import torch

    config = as_file(BASE | {name: value})
    torch.manual_seed(0)
    model = diffusers.UNet2DModel.from_config(config).eval()
    for parameter in model.parameters():  # also those that begin at zero
        parameter.data += 0.05 * torch.randn_like(parameter)
    network = read_network(config)
    assert isinstance(network, NCSNpp)
    tensors = {k: v.numpy() for k, v in model.state_dict().items()}
    assert tensors.keys() == state_dict.named_leaves(network).keys()
    params = state_dict.from_torch(tensors, network)
    x = np.random.default_rng(0).standard_normal((2, *network.image_shape))
    x, t = x.astype(np.float32), np.array([0.5, 40.0], np.float32)
    with torch.no_grad():
        images = torch.tensor(x.transpose(0, 3, 1, 2).copy())
        wanted = model(images, torch.tensor(t)).sample.numpy().transpose(0, 2, 3, 1)
    for found, row in zip(apply(network, params, x, t), wanted, strict=True):
        assert_close(found, row, 1e-4)


@pytest.mark.filterwarnings("ignore")
def test_networks_are_possible_where_they_are_in_diffusers(diffusers):
    """Of random widths: diffusers, too, refuses norms that do not divide them."""
    import torch

    rng = random.Random(0)
    widths = (2, 4, 6, 16, 24, 32, 36, 40, 64, 130, 160, 256)
    counts = {True: 0, False: 0}
    while min(counts.values()) < 12:
        levels = rng.choice((1, 2, 3))
        config = BASE | {
            "block_out_channels": [rng.choice(widths) for _ in range(levels)],
            "norm_num_groups": rng.choice((None, None, 2, 8)),
            "layers_per_block": rng.choice((1, 2)),
        }
        for way in ("down", "up"):
            kinds = (f"Skip{way.title()}Block2D", f"AttnSkip{way.title()}Block2D")
            config[f"{way}_block_types"] = rng.choices(kinds, (3, 1), k=levels)
        try:
            ours = read_network(config)
        except ConvertError:
            ours = None
        try:
            with torch.device("meta"):
                theirs = diffusers.UNet2DModel.from_config(config)
        except (ValueError, ZeroDivisionError):
            theirs = None
        assert (ours is None) == (theirs is None), config
        counts[ours is not None] += 1
        if theirs is not None:
            found = state_dict.named_leaves(ours)
            wanted = {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
            shapes = jax.tree.map(lambda v: state_dict.torch_shape(v.shape), found)
            assert shapes == wanted
