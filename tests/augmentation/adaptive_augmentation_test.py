"""Adaptive discriminator augmentation against slow oracles."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.augmentation import adaptive as ada
from jaxgen.augmentation import warp as warping

H = np.asarray(warping.FILTER)


def images(n=6, height=8, width=8, channels=3) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (n, height, width, channels)).astype('float32')


def test_filter_is_an_orthogonal_wavelets():
    for k in range(6):
        assert abs((H[2 * k :] * H[: len(H) - 2 * k]).sum() - (k == 0)) < 1e-12
        # Six vanishing moments: the high-pass filter knows nothing of polynomials up to degree 5.
        assert abs((H * (-1.0) ** np.arange(12) * np.arange(12.0) ** k).sum()) < 1e-6
    assert abs(H.sum() - math.sqrt(2)) < 1e-12


@pytest.mark.parametrize('channels', [1, 3])
def test_nothing_happens_at_probability_zero_bit_for_bit(channels):
    x = images(channels=channels)
    change = jax.jit(lambda x, p: ada.augment(x, jax.random.key(1), p, tuple(ada.CHANGES)))
    np.testing.assert_array_equal(change(x, 0.0), x)
    z = change(x, 1.0)
    assert np.isfinite(z).all() and (np.abs(z - x).max((1, 2, 3)) > 0.1).all()


def at(x: np.ndarray, row: int, column: int) -> np.ndarray:
    """x [H, W, C] at any position, mirrored at its edges over and over."""

    def inside(i, size):
        i = i % (2 * size - 2)
        return i if i < size else 2 * size - 2 - i

    return x[inside(row, x.shape[0]), inside(column, x.shape[1])]


@pytest.mark.parametrize('height, width', [(8, 8), (16, 5)])
def test_moves_by_whole_pixels_are_mirrored_at_the_edges(height, width):
    x = images(5, height, width)
    most = (math.ceil(height / 8), math.ceil(width / 8))
    moves = np.array([(0, 0), most, (-most[0], -most[1]), (1, -1), (-1, 0)])
    y = ada.moved(jnp.asarray(x), jnp.asarray(moves))
    for one, got, (down, right) in zip(x, y, moves, strict=True):
        want = [[at(one, i - down, j - right) for j in range(width)] for i in range(height)]
        np.testing.assert_array_equal(got, want)


def test_blits_are_the_eight_turns_with_moves_and_the_right_frequencies():
    x = images(1)[0]
    turned = [np.rot90(m, k) for m in (x, x[:, ::-1]) for k in range(4)]
    moves = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    expected = np.array(
        [[[[at(t, i - d, j - r) for j in range(8)] for i in range(8)] for d, r in moves] for t in turned]
    )
    n = 4000
    draw = jax.jit(lambda p: ada.augment(jnp.broadcast_to(x, (n, *x.shape)), jax.random.key(0), p, ('blit',)))
    for p in (1.0, 0.4):
        y = np.asarray(draw(p))
        same = (y[:, None, None, 2:4] == expected[None, :, :, 2:4]).all((3, 4, 5))  # [n, 8, 9]
        assert (same.reshape(n, -1).sum(1) == 1).all(), 'every image is one of the 72'
        fraction = same.any(2).mean(0)
        np.testing.assert_allclose(fraction[:4].sum(), 1 - p / 2, atol=0.03)  # not mirrored
        np.testing.assert_allclose(fraction[0] + fraction[4], 1 - p + p / 4, atol=0.03)  # not turned
        # u / 8 of the side is less than half a pixel in half of all draws.
        np.testing.assert_allclose(same.any(1).mean(0)[4], 1 - p + p / 4, atol=0.03)


def slow_warp(x: np.ndarray, matrix: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """One image [H, W, C], by the definition: zeros between pixels, filter, bilinear, filter."""
    height, width, channels = x.shape
    radius = 60
    fine = np.zeros((2 * radius, 2 * radius, channels))  # half pixel (m, k) lies at [m + radius, k + radius]
    for i in range(-radius // 2, radius // 2):
        for j in range(-radius // 2, radius // 2):
            fine[2 * i + radius, 2 * j + radius] = at(x, i, j)
    for axis in (0, 1):  # y_m = sqrt(2) sum_i h_{m - i + 5} x_i
        wide = np.moveaxis(fine, axis, 0)
        out = sum(math.sqrt(2) * tap * np.roll(wide, t - 5, 0) for t, tap in enumerate(H))
        fine = np.moveaxis(out, 0, axis)

    def read(m, k):
        middle = np.array([height - 1, width - 1]) / 2
        position = 2 * (matrix @ (np.array([m, k]) / 2 - middle) + offset + middle) + radius
        (i, j), (down, right) = np.floor(position).astype(int), position - np.floor(position)
        upper = (1 - right) * fine[i, j] + right * fine[i, j + 1]
        return (1 - down) * upper + down * ((1 - right) * fine[i + 1, j] + right * fine[i + 1, j + 1])

    got = np.array([[read(m, k) for k in range(-5, 2 * width + 5)] for m in range(-5, 2 * height + 5)])
    out = np.zeros(x.shape)
    for i in range(height):
        for j in range(width):
            window = got[2 * i : 2 * i + 12, 2 * j : 2 * j + 12]
            out[i, j] = np.einsum('s,t,stc->c', H, H, window) / 2
    return out


def test_warp_is_its_definition():
    x = images(3, 6, 5, 2)
    rng = np.random.default_rng(1)
    matrix = np.eye(2) + 0.3 * rng.normal(size=(3, 2, 2))
    offset = rng.normal(size=(3, 2))
    got = jax.jit(warping.warp)(x, jnp.float32(matrix), jnp.float32(offset))
    want = [slow_warp(*each) for each in zip(x, matrix, offset, strict=True)]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_warps_that_move_pixels_onto_pixels_move_them():
    x, warp = images(3), jax.jit(warping.warp)
    matrix = jnp.broadcast_to(jnp.eye(2), (3, 2, 2))
    moves = np.array([(0, 0), (3, -2), (-7, 20)])
    for one, move, got in zip(x, moves, warp(x, matrix, jnp.float32(moves)), strict=True):
        want = [[at(one, i + move[0], j + move[1]) for j in range(8)] for i in range(8)]
        np.testing.assert_allclose(got, want, atol=1e-5)
    # Turned by a quarter, a smooth image is turned; the filter is not quite symmetric.
    i, j = np.mgrid[:32, :32]
    smooth = (np.sin(i / 4) * np.cos(j / 5 + 1)).astype('float32')
    got = warp(smooth[None, :, :, None], warping.rotation(jnp.full(1, math.pi / 2)), jnp.zeros((1, 2)))[0, ..., 0]
    inner = np.s_[8:-8, 8:-8]
    wrong = sorted(np.abs(got - np.rot90(smooth, k))[inner].max() for k in (1, 3))
    assert wrong[0] < 0.02 and wrong[1] > 0.5


def test_geometric_changes_have_the_papers_strengths(monkeypatch):
    n = 20_000
    transforms = {}

    def keep(x, matrix, offset):
        transforms.update(matrix=np.asarray(matrix), offset=np.asarray(offset))
        return x

    monkeypatch.setattr(ada, 'warp', keep)
    x = jnp.zeros((n, 16, 8, 1))
    ada.augment(x, jax.random.key(0), 1.0, ('geometric',))
    back = np.linalg.inv(transforms['matrix'])  # [n, 2, 2], of positions in x to positions in y
    sizes = np.linalg.svd(back, compute_uv=False)
    np.testing.assert_allclose(np.log2(sizes).mean(1).std(), 0.2, rtol=0.03)  # scale
    np.testing.assert_allclose(np.sqrt(np.square(np.log2(sizes[:, 0] / sizes[:, 1]) / 2).mean()), 0.2, rtol=0.03)
    move = -np.einsum('nij,nj->ni', back, transforms['offset'])
    np.testing.assert_allclose(move.std(0), [2.0, 1.0], rtol=0.03)
    assert (np.linalg.det(back) > 0).all()
    angle = np.arctan2(back[:, 1, 0] - back[:, 0, 1], back[:, 0, 0] + back[:, 1, 1])
    assert np.abs(np.exp(1j * angle).mean()) < 0.03
    ada.augment(x, jax.random.key(1), 0.3, ('geometric',))
    still = np.abs(transforms['matrix'] - np.eye(2)).max((1, 2)) < 1e-6
    np.testing.assert_allclose(still.mean(), 0.7**3, atol=0.02)  # not scaled, not turned, not stretched
    np.testing.assert_allclose((np.abs(transforms['offset']).max(1) == 0).mean(), 0.7, atol=0.02)


def test_colours_are_the_products_of_matrices():
    x = images(4)
    rng = np.random.default_rng(2)
    brightness, contrast, hue, saturation = rng.uniform(0.2, 2, (4, 4)).astype('float32')
    sign = np.array([1, -1, 1, -1], np.float32)
    got = ada.recoloured(*map(jnp.asarray, (x, brightness, contrast, sign, hue, saturation)))
    v = np.ones(3) / math.sqrt(3)
    cross = np.array([[0, -v[2], v[1]], [v[2], 0, -v[0]], [-v[1], v[0], 0]])
    luma = np.outer(v, v)
    for i in range(4):
        mirror = np.eye(3) - (1 - sign[i]) * luma
        turn = math.cos(hue[i]) * np.eye(3) + math.sin(hue[i]) * cross + (1 - math.cos(hue[i])) * luma
        fade = luma + saturation[i] * (np.eye(3) - luma)
        matrix = fade @ turn @ mirror * contrast[i]
        want = (x[i] + brightness[i]) @ matrix.T
        np.testing.assert_allclose(got[i], want, rtol=1e-4, atol=1e-5)
    grey = ada.recoloured(*map(jnp.asarray, (x[..., :1], brightness, contrast, sign, hue, saturation)))
    want = (sign * contrast)[:, None, None, None] * (x[..., :1] + brightness[:, None, None, None])
    np.testing.assert_allclose(grey, want, rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_the_changed_pictures():
    """The transpose of a linear map: <f(x), y> = <x, f'(y)>."""
    x, y = images(3), images(3)[:, ::-1]
    f = lambda x: ada.augment(x, jax.random.key(3), 0.9, ('blit', 'geometric'))  # noqa: E731
    out, back = jax.vjp(jax.jit(f), x)
    np.testing.assert_allclose((out * y).sum(), (x * back(jnp.asarray(y))[0]).sum(), rtol=1e-4)


def test_probability_follows_the_signs():
    p = jnp.float32(0.1)
    step = dict(target=0.6, images_to_one=1000)
    np.testing.assert_allclose(ada.adapted(p, jnp.float32(0.7), 50, **step), 0.15, rtol=1e-6)
    np.testing.assert_allclose(ada.adapted(p, jnp.float32(0.5), 50, **step), 0.05, rtol=1e-6)
    assert ada.adapted(p, jnp.float32(-1), 500, **step) == 0 and ada.adapted(p, jnp.float32(1), 5000, **step) == 1
