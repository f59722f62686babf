"""Disentanglement: metrics of latents worked out by hand, against slow oracles, and through a run's evaluation."""

from __future__ import annotations

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import mutual_info_score

from jaxgen import assembly, data, run, sharding
from jaxgen import config as configs
from jaxgen.contract import Family, Latents, State
from jaxgen.errors import RunError, UserError
from jaxgen.metrics.disentanglement import beta_vae_score, binned, mutual_information, mutual_information_gap

GRID = np.array(list(itertools.product(range(4), range(4), range(4))) * 4)  # every scene of three factors, four times


def test_bins_are_even_parts_of_the_range():
    z = np.array([[0.0, 5.0], [0.1, 5.0], [0.25, 5.0], [0.74, 5.0], [1.0, 5.0]])
    np.testing.assert_array_equal(binned(z, 4).T, [[0, 0, 1, 2, 3], [0, 0, 0, 0, 0]])


def test_mutual_information_against_a_sum_over_cells():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, 200), rng.integers(0, 3, 200)
    b = np.where(rng.random(200) < 0.4, a % 3, b)
    total = 0.0
    for i in range(5):
        for j in range(3):
            p = ((a == i) & (b == j)).mean()
            if p:
                total += p * math.log(p / ((a == i).mean() * (b == j).mean()))
    np.testing.assert_allclose(mutual_information(a, b), total, atol=1e-12)
    np.testing.assert_allclose(mutual_information(a, b), mutual_info_score(a, b), atol=1e-12)
    np.testing.assert_allclose(mutual_information(a, a), mutual_info_score(a, a), atol=1e-12)


def test_gap_by_hand():
    one_each, gaps = mutual_information_gap(GRID.astype(float), GRID)
    np.testing.assert_allclose([one_each, *gaps], 1)
    # Every factor twice: the second best latent has the same information.
    np.testing.assert_allclose(mutual_information_gap(np.tile(GRID, 2), GRID)[0], 0, atol=1e-12)
    # Half of a factor: z_0 is which half of the 4 values, ln 2 of ln 4, and no other latent depends on it.
    half = np.stack([GRID[:, 0] // 2, GRID[:, 1]], 1)
    value, gaps = mutual_information_gap(half, GRID)
    np.testing.assert_allclose(gaps, [0.5, 1, 0], atol=1e-12)
    np.testing.assert_allclose(value, 0.5)
    # z_0 determines the factor, z_1 half of it: a gap of one half again.
    np.testing.assert_allclose(mutual_information_gap(np.stack([GRID[:, 0], GRID[:, 0] // 2], 1), GRID)[1][0], 0.5)
    # One latent may hold two factors: the gap does not mind.
    both = np.stack([GRID[:, 0] + 4 * GRID[:, 1], 0 * GRID[:, 0]], 1)
    np.testing.assert_allclose(mutual_information_gap(both, GRID)[1], [1, 1, 0], atol=1e-12)


def test_rotated_latents_lose_the_gap():
    """A rotation keeps all information, and no axis is a factor any more."""
    rng = np.random.default_rng(0)
    factors = rng.integers(0, 10, (4000, 2))
    straight = factors + rng.uniform(-0.3, 0.3, (4000, 2))
    rotated = straight @ np.array([[1, -1], [1, 1]]) / math.sqrt(2)
    assert mutual_information_gap(straight, factors)[0] > 0.85
    assert abs(mutual_information_gap(rotated, factors)[0]) < 0.03
    assert beta_vae_score(straight, factors)[0] > 0.99 > 0.7 > beta_vae_score(rotated, factors)[0]


def test_gap_against_a_slow_oracle():
    rng = np.random.default_rng(1)
    factors = np.stack([rng.integers(0, k, 500) for k in (2, 3, 7)], 1)
    latents = factors @ rng.normal(size=(3, 5)) + 0.3 * rng.normal(size=(500, 5))
    gaps = []
    for k in range(3):
        information = []
        for j in range(5):
            edges = np.linspace(latents[:, j].min(), latents[:, j].max(), 21)
            information.append(mutual_info_score(np.digitize(latents[:, j], edges[1:-1]), factors[:, k]))
        best, second = sorted(information)[:-3:-1]
        gaps.append((best - second) / mutual_info_score(factors[:, k], factors[:, k]))
    value, each = mutual_information_gap(latents, factors)
    np.testing.assert_allclose(each, gaps, atol=1e-12)
    np.testing.assert_allclose(value, np.mean(gaps))


def test_score_of_latents_with_all_information_and_none():
    rng = np.random.default_rng(0)
    factors = rng.integers(0, 8, (2000, 4))
    accuracy, stderr = beta_vae_score(factors + 0.1 * rng.normal(size=(2000, 4)), factors)
    assert accuracy > 0.99 and stderr < 0.002
    accuracy, stderr = beta_vae_score(rng.normal(size=(2000, 4)), factors)
    assert abs(accuracy - 0.25) < 0.04 and 0.004 < stderr < 0.01
    # A factor that never changes is not a class of the classifier: three are left.
    factors[:, 2] = 5
    assert abs(beta_vae_score(rng.normal(size=(2000, 4)), factors)[0] - 1 / 3) < 0.04


def test_score_compares_pairs_that_share_the_factor():
    """With one pair a vote, the latents' difference is 0 just where the factor is shared: a latent that is the first
    factor alone then determines whether it was that one, but where the other is equal by chance."""
    rng = np.random.default_rng(0)
    factors = np.stack([rng.integers(0, 50, 3000), rng.integers(0, 2, 3000)], 1)
    latents = np.stack([factors[:, 0] > 24, rng.random(3000)], 1).astype(float)
    # Shared: always 0. Else 0 in half of the pairs, and 64 of these are never all 0.
    assert beta_vae_score(latents, factors)[0] > 0.99
    # By one pair: 3 of 4 at best (right where the latent differs, and half of the rest is of each kind: 2 of 3).
    assert 0.7 < beta_vae_score(latents, factors, pairs=1)[0] < 0.8


def test_degenerate_latents_and_factors_are_refused():
    with pytest.raises(UserError, match='two numbers'):
        mutual_information_gap(np.zeros((64, 1)), GRID[:64])
    with pytest.raises(UserError, match='two numbers'):
        beta_vae_score(np.zeros((64, 1)), GRID[:64])
    with pytest.raises(UserError, match='no factor'):
        mutual_information_gap(GRID, 0 * GRID)
    with pytest.raises(UserError, match='two or more'):
        beta_vae_score(GRID, GRID * [1, 0, 0])
    with pytest.raises(RunError, match='not finite'):
        mutual_information_gap(np.full((64, 3), np.nan), GRID[:64])
    constant = mutual_information_gap(GRID, GRID * [1, 1, 0])
    assert np.isnan(constant[1][2]) and constant[0] == 1, 'a factor that is one value has no entropy'


class Scenes:
    """A data set whose images are their factors."""

    def __len__(self):
        return len(GRID)

    def take(self, index):
        images = np.zeros((len(index), 2, 2, 1), np.uint8)
        images[:, 0, :, 0], images[:, 1, 0, 0] = 60 * GRID[index, :2], 60 * GRID[index, 2]
        return {'image': images, 'factors': GRID[index].astype(np.int32)}


def evaluated(monkeypatch, encode, **family) -> dict:
    """Metrics of a run whose family encodes by `encode`."""
    config = configs.make(
        family='vae',
        data={'source': 'shapes', 'channels': 3, 'features': ('image', 'factors')},
        evaluate={'batch': 100},
    )
    monkeypatch.setattr(data, 'dataset', lambda section, split: Scenes())
    toy = Family(None, None, None, lambda *a: {'nothing': jnp.zeros(len(a[2]['image']))}, encode, **family)
    assembled = assembly.Assembled(config, toy, {}, data.spec(config.data), sharding.make_mesh(1))
    return run.Run('', config, assembled, State(jnp.int32(0), {}, {}, {}), 'ema').evaluate()


def test_any_family_that_encodes_is_evaluated(monkeypatch):
    def straight(state, frozen, batch, rng):
        assert set(batch) == {'image'}, 'latents are of the image alone'
        return batch['image'].reshape(len(batch['image']), -1)

    def rotated(state, frozen, batch, rng):
        return straight(state, frozen, batch, rng)[:, :3] @ jnp.array([[1.0, 1, 1], [1, -1, 1], [1, 1, -1]])

    metrics = evaluated(monkeypatch, straight)
    assert {'mig', 'mig/0', 'mig/1', 'mig/2', 'beta_vae_score', 'nothing'} == set(metrics)
    np.testing.assert_allclose([metrics['mig']['value'], metrics['mig/2']['value']], 1, atol=1e-6)
    assert [metrics[f'mig/{i}']['latent'] for i in range(3)] == [0, 1, 2]
    np.testing.assert_allclose([metrics[f'mig/{i}']['known'] for i in range(3)], 1, atol=1e-6)
    assert metrics['mig']['n'] == len(GRID) and metrics['beta_vae_score']['value'] > 0.99
    assert evaluated(monkeypatch, rotated)['mig']['value'] < 0.5
    maps = evaluated(monkeypatch, lambda state, frozen, batch, rng: batch['image'])
    codes = evaluated(monkeypatch, straight, latents=Latents(grids=((2, 2),), vocabulary=3))
    assert set(maps) == set(codes) == set(evaluated(monkeypatch, None)) == {'nothing'}
