"""Triggers and targets: published geometry, scaling, and every value at every shape."""

import numpy as np
import pytest

from puredif_jax.attacks import targets
from puredif_jax.attacks import triggers as tr

TRIGGERS = [
    tr.Box(),
    tr.Box(size=4, value=1.0),
    tr.StopSign(),
    tr.Glasses(),
    tr.Blend(),
    tr.Patch(),
    tr.RandomPattern(),
]
TARGETS = [
    targets.Corner(),
    targets.Shoe(),
    targets.Hat(),
    targets.Cat(),
    targets.Shift(),
    targets.NoShift(),
]
SHAPES = [(16, 16, 1), (32, 32, 3), (64, 64, 3), (28, 28, 1)]
RGB32 = (32, 32, 3)
FLOOR = np.float32(-0.4)


def draw(value, shape, trigger=None):
    """The image of a trigger, or of a target given a trigger."""
    if not any(type(value) is type(target) for target in TARGETS):
        return value.image(shape)
    return value.image(shape, (trigger or tr.StopSign()).image(shape))


def bounds(inside):
    """First and one past last row and column of the true pixels of [H, W]."""
    rows, columns = np.nonzero(inside)
    return rows.min(), rows.max() + 1, columns.min(), columns.max() + 1


def visible(trigger, shape):
    return tr.mask(trigger.image(shape))[..., 0] == 0


# --- Every value at every shape ------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("value", TRIGGERS + TARGETS, ids=str)
def test_image_is_a_new_float32_array_in_range(value, shape):
    first, second = draw(value, shape), draw(value, shape)
    assert first.dtype == np.float32 and first.shape == shape
    assert np.isfinite(first).all() and abs(first).max() <= 1
    assert first.std() > 0
    np.testing.assert_array_equal(first, second)
    assert first.flags.writeable and not np.shares_memory(first, second)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_targets_are_lifted(target, shape):
    for trigger in (tr.Box(), tr.StopSign()):
        assert draw(target, shape, trigger).min() == FLOOR


@pytest.mark.parametrize("value", TRIGGERS + TARGETS, ids=str)
def test_values_are_hashable_and_compare_by_content(value):
    assert len({value, eval(repr(value), vars(tr) | vars(targets))}) == 1


@pytest.mark.parametrize("shape", [(24, 40, 3), (40, 24, 1)], ids=str)
@pytest.mark.parametrize("value", TRIGGERS + TARGETS, ids=str)
def test_other_than_square_images(value, shape):
    assert draw(value, shape).shape == shape
    assert np.isfinite(draw(value, shape)).all()


@pytest.mark.parametrize("pixels", [8, 9, 11, 16, 28, 33])
@pytest.mark.parametrize("size", [1, 4, 14, 18, 28])
def test_squares_of_every_size_fit(pixels, size):
    for trigger in (tr.Box(size), tr.StopSign(size)):
        top, bottom, left, right = bounds(visible(trigger, (pixels, pixels, 1)))
        side = max(1, int(size * pixels / 32 + 0.5))
        assert bottom - top == right - left == side
        assert top >= 0 and bottom == right < pixels


# --- Triggers ------------------------------------------------------------------------


def test_box_golden():
    box = tr.Box(14).image(RGB32)
    assert box.sum() == -2484
    assert (box == 0).sum() == 588 and (box == -1).sum() == 3 * 32 * 32 - 588
    assert (box[16:30, 16:30] == 0).all()


@pytest.mark.parametrize(
    "pixels, size, gap", [(16, 7, 1), (28, 12, 2), (32, 14, 2), (64, 28, 4)]
)
@pytest.mark.parametrize("trigger", [tr.Box(), tr.Box(value=1.0), tr.StopSign()])
def test_box_and_sign_scale(trigger, pixels, size, gap):
    start, stop = pixels - gap - size, pixels - gap
    inside = visible(trigger, (pixels, pixels, 3))
    assert bounds(inside) == (start, stop, start, stop)


def test_white_box():
    assert (tr.Box(8, value=1.0).image(RGB32)[22:30, 22:30] == 1).all()


@pytest.mark.parametrize("size", [4, 8, 11, 14, 18])
@pytest.mark.parametrize("shape", [(32, 32, 1), RGB32], ids=str)
def test_stop_sign_is_an_octagon_with_a_pattern(size, shape):
    image = tr.StopSign(size).image(shape)
    square = visible(tr.StopSign(size), shape)[30 - size : 30, 30 - size : 30]
    np.testing.assert_array_equal(square, square[::-1])
    np.testing.assert_array_equal(square, square[:, ::-1])
    np.testing.assert_array_equal(square, square.T)
    assert not square[0, 0] and square[0, size // 2]
    corners = (size / (2 + 2**0.5)) ** 2 * 2  # four triangles
    assert square.sum() == pytest.approx(size**2 - corners, abs=size / 2)
    assert image.max() < 0.999
    assert len(np.unique(image)) >= 3


def test_stop_sign_is_red_with_a_white_border():
    sign = tr.StopSign(18).image((256, 256, 3))[96:240, 96:240]
    red, green, blue = sign[20, 72]
    assert red > 0.5 and green < -0.8 and blue < -0.7
    assert (sign[3, 72] > 0.9).all()
    letters = (sign[50:94, 20:124] > 0.9).all(axis=-1)
    assert 0.3 < letters.mean() < 0.7  # white on red


@pytest.mark.parametrize("pixels, width", [(32, 20), (64, 40), (256, 160)])
def test_glasses_are_centred(pixels, width):
    inside = visible(tr.Glasses(), (pixels, pixels, 3))
    np.testing.assert_array_equal(inside, inside[:, ::-1])
    _, _, left, right = bounds(inside)
    assert right - left == width
    assert not inside[[0, -1]].any()


def test_blend_scales_one_picture():
    full, blend = tr.Blend(gamma=0.0).image(RGB32), tr.Blend(gamma=0.6).image(RGB32)
    np.testing.assert_allclose(blend, 0.4 * full, rtol=1e-6)
    assert np.ptp(full) > 1.5
    gamma = tr.Blend(gamma=0.6).gamma_map(RGB32)
    assert gamma.dtype == np.float32
    np.testing.assert_array_equal(gamma, np.full(RGB32, 0.6, np.float32))


@pytest.mark.parametrize("pixels, size", [(16, 2), (32, 3), (64, 6)])
def test_patch_is_in_the_corner(pixels, size):
    shape = (pixels, pixels, 3)
    patch, gamma = tr.Patch(3, 0.1).image(shape), tr.Patch(3, 0.1).gamma_map(shape)
    block = np.zeros(shape, np.float32)
    block[-size:, -size:] = 1
    np.testing.assert_allclose(patch, 0.9 * block, rtol=1e-6)
    np.testing.assert_allclose(gamma, 1 - 0.9 * block, rtol=1e-6)
    assert gamma.dtype == np.float32


def test_random_pattern_follows_bound_and_seed():
    image = tr.RandomPattern(bound=0.2, seed=3).image(RGB32)
    assert 0.19 < abs(image).max() <= np.float32(0.2)
    assert image.std() == pytest.approx(0.2 / 3**0.5, rel=0.05)
    assert not np.array_equal(image, tr.RandomPattern(seed=4).image(RGB32))
    half = tr.RandomPattern(bound=0.1, seed=3).image(RGB32)
    np.testing.assert_allclose(half, image / 2, atol=1e-7)


def test_mask_is_where_all_channels_are_black():
    image = np.array([[[-1, -1, -1], [-1, 0, -1], [0.5, 0.5, 0.5]]], np.float32)
    got = tr.mask(image)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, [[[1] * 3, [0] * 3, [0] * 3]])
    assert tr.mask(tr.Box().image(RGB32)).sum() == 3 * (32 * 32 - 14 * 14)
    for trigger in (tr.Blend(), tr.Patch(), tr.RandomPattern()):
        assert not tr.mask(trigger.image(RGB32)).any()


# --- Targets -------------------------------------------------------------------------


def test_corner_golden():
    corner = draw(targets.Corner(), RGB32)
    assert (corner == 0).sum() == 300 and (corner == FLOOR).sum() == 3 * 32 * 32 - 300
    assert (corner[:10, :10] == 0).all()
    assert (draw(targets.Corner(), (16, 16, 1)) == 0).sum() == 25


def test_shoe_is_fashion_mnist_train_0():
    boot = (draw(targets.Shoe(), (28, 28, 1))[..., 0] + 1) * 127.5
    row = [75, 204, 212, 204, 193, 205, 211, 225, 216, 185, 197, 206, 198, 213, 240]
    row += [195, 227, 245, 239, 223, 218, 212, 209, 222, 220, 221, 230, 67]
    np.testing.assert_allclose(boot[20], np.maximum(row, 76.5), atol=1e-4)
    assert boot.max() == pytest.approx(255)


@pytest.mark.parametrize("pixels", [16, 56, 64])
def test_shoe_resize_keeps_the_picture(pixels):
    small, large = (draw(targets.Shoe(), (n, n, 1))[..., 0] for n in (28, pixels))
    assert large.mean() == pytest.approx(small.mean(), abs=0.05)
    assert bounds(large > 0)[2] < pixels / 8 and bounds(large > 0)[3] > pixels * 7 / 8


@pytest.mark.parametrize("target", [targets.Hat(), targets.Cat()], ids=str)
def test_drawn_targets_stand_out_and_agree_between_sizes(target):
    large, small = (draw(target, (n, n, 3)) for n in (64, 32))
    pooled = large.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    assert abs(pooled - small).mean() < 0.02
    assert 0.2 < (small > 0).any(axis=-1).mean() < 0.7
    assert (small[0, 0] == FLOOR).all()


def test_grey_is_the_luminance_of_colour():
    colour, grey = (tr.Blend().image((32, 32, c)) for c in (3, 1))
    np.testing.assert_allclose(colour @ [0.299, 0.587, 0.114], grey[..., 0], atol=1e-6)


@pytest.mark.parametrize("pixels, dx, dy", [(16, 3, 2), (32, 5, 3), (64, 10, 6)])
@pytest.mark.parametrize("trigger", TRIGGERS, ids=str)
def test_shift_and_no_shift(trigger, pixels, dx, dy):
    image = trigger.image((pixels, pixels, 3))
    before = image.copy()
    lifted = np.where(image <= FLOOR, FLOOR, image)
    np.testing.assert_array_equal(targets.NoShift().image(image.shape, image), lifted)
    rolled = np.roll(np.roll(lifted, -dy, axis=0), -dx, axis=1)
    np.testing.assert_array_equal(targets.Shift().image(image.shape, image), rolled)
    np.testing.assert_array_equal(image, before)


# --- Errors --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: tr.Box(size=0), r"size must be .* from 1 to 28 .*, found 0\."),
        (lambda: tr.Box(size=14.0), r"size must be .*, found 14\.0\."),
        (lambda: tr.Box(value=-1.0), r"value must be in \(-1, 1\], found -1\.0\."),
        (lambda: tr.Box(value=float("nan")), "value must be .*, found nan"),
        (lambda: tr.StopSign(size=29), "size must be .*, found 29"),
        (lambda: tr.Blend(gamma=1.0), r"gamma must be in \[0, 1\), found 1\.0\."),
        (lambda: tr.Patch(gamma=-0.1), r"gamma must be in \[0, 1\), found -0\.1\."),
        (lambda: tr.Patch(size=-3), "size must be .*, found -3"),
        (lambda: tr.RandomPattern(bound=0.0), r"bound must be in \(0, 1\], found 0"),
        (lambda: tr.RandomPattern(bound=1.5), r"bound must be .*, found 1\.5"),
        (lambda: tr.RandomPattern(seed=-1), "seed must be a whole number >= 0"),
        (lambda: tr.RandomPattern(seed=0.5), "seed must be .*, found 0.5"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("shape", [(32, 32, 2), (32, 4, 3), (32, 32), (32, 32, 4)])
@pytest.mark.parametrize("value", TRIGGERS + TARGETS, ids=str)
def test_bad_shapes(value, shape):
    trigger = () if value in TRIGGERS else (np.zeros(shape, np.float32),)
    with pytest.raises(ValueError, match=r"shape must be \(H, W, C\) .*, found \(32,"):
        value.image(shape, *trigger)


@pytest.mark.parametrize("value", [tr.Blend(), tr.Patch()], ids=str)
def test_bad_shapes_of_gamma_maps(value):
    with pytest.raises(ValueError, match="shape must be"):
        value.gamma_map((32, 32, 2))


@pytest.mark.parametrize("target", [targets.Shift(), targets.NoShift()], ids=str)
def test_trigger_of_another_shape(target):
    with pytest.raises(ValueError, match=r"must be \(32, 32, 3\), found \(16, 16, 3\)"):
        target.image(RGB32, np.zeros((16, 16, 3), np.float32))
