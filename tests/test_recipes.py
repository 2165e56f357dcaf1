"""The networks that benchmarks/networks.py trains."""

import networks
import numpy as np

GROUPS = (networks.BASES, networks.BACKDOORED + networks.CLEAN)


def test_recipes_have_names_and_bases_of_their_own() -> None:
    bases, tuned = GROUPS
    names = [each.name for each in bases + tuned]
    assert len(set(names)) == len(names) == 49
    assert {each.base for each in tuned} == {each.name for each in bases}
    assert len({each.seed for each in bases + tuned}) == 49


def test_every_attack_of_a_recipe_can_be_made() -> None:
    for each in networks.BACKDOORED:
        shape = (networks.SIDE, networks.SIDE, each.network.in_channels)
        channel = each.attack.channel(networks.SCHEDULE, shape)
        assert np.isfinite(channel.shift).all() and np.isfinite(channel.response).all()
        trigger, target, _ = each.attack.images(shape)
        assert trigger.shape == target.shape == shape


def test_images_are_the_part_that_is_named(tmp_path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28), np.uint8)
    path = tmp_path / "images.npz"
    np.savez(path, images=images, labels=np.array([0, 1, 0, 1, 0, 1]))
    files = {"garments": path}
    whole = networks.GARMENTS.of(files)
    assert whole.shape == (6, 16, 16, 1) and -1 <= whole.min() < whole.max() <= 1
    part = networks.Images("garments", 2, 5).of(files)
    np.testing.assert_allclose(part, whole[2:5], atol=1e-6)
    of_one = networks.Images("garments", label=1).of(files)
    np.testing.assert_allclose(of_one, whole[1::2], atol=1e-6)
