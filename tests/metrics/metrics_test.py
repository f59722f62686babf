"""Metrics on features against closed forms, slow oracles, torch-fidelity, and samplers broken on purpose."""

from __future__ import annotations

import numpy as np
import pytest
from support import torch_fidelity

from jaxgen.errors import RunError, UserError
from jaxgen.metrics import neighbours, scores
from jaxgen.metrics.moments import Moments, finite, frechet, merge
from jaxgen.metrics.neighbours import neighbourhood
from jaxgen.metrics.scores import class_balance, gaussian_discrepancy, inception_score, kernel_distance, modes_covered


def gaussian(mean, covariance, n=101) -> Moments:
    return Moments(n, np.asarray(mean, 'float64'), np.asarray(covariance, 'float64') * (n - 1))


def random_covariance(rng, d):
    a = rng.normal(size=(d, d))
    return a @ a.T / d


def two_sets(seed, n, m, d):
    """Features that are correlated, skewed and differ a little, float64."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(d, d)) / np.sqrt(d)
    x, y = (np.maximum(rng.normal(size=(k, d)) @ mix + shift, -0.5) for k, shift in ((n, 0.3), (m, 0.4)))
    return x, y * 1.1


def in_torch(x):
    import torch

    return torch.from_numpy(np.asarray(x))


def reference(name):
    torch_fidelity()
    import importlib

    return importlib.import_module(f'torch_fidelity.metric_{name}')


def test_frechet_of_commuting_gaussians():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0.01, 3, size=(2, 12))
    m, k = rng.normal(size=(2, 12))
    expected = ((m - k) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet(gaussian(m, np.diag(a)), gaussian(k, np.diag(b))) == pytest.approx(expected, rel=1e-12)
    q = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    assert frechet(gaussian(m, q * a @ q.T), gaussian(k, q * b @ q.T)) == pytest.approx(expected, rel=1e-12)


def test_frechet_of_general_gaussians_against_high_precision():
    mpmath = pytest.importorskip('mpmath')
    rng = np.random.default_rng(1)
    s, t = random_covariance(rng, 6), random_covariance(rng, 6)
    m = rng.normal(size=6)
    with mpmath.workdps(40):
        eigenvalues = mpmath.eig(mpmath.matrix(s.tolist()) * mpmath.matrix(t.tolist()), right=False)
        cross = float(sum(mpmath.sqrt(mpmath.re(e)) for e in eigenvalues))
    expected = (m**2).sum() + np.trace(s) + np.trace(t) - 2 * cross
    got = frechet(gaussian(m, s), gaussian(np.zeros(6), t))
    assert got == pytest.approx(expected, rel=1e-12)
    assert frechet(gaussian(np.zeros(6), t), gaussian(m, s)) == pytest.approx(got, rel=1e-12), 'symmetric'


def test_frechet_of_samples_nears_that_of_their_gaussians():
    rng = np.random.default_rng(2)
    s, t, m = random_covariance(rng, 4), random_covariance(rng, 4), rng.normal(size=4)
    expected = frechet(gaussian(m, s), gaussian(np.zeros(4), t))
    errors = []
    for n in (1_000, 100_000):
        x, y = rng.multivariate_normal(m, s, n), rng.multivariate_normal(np.zeros(4), t, n)
        errors.append(abs(frechet(Moments.of(x), Moments.of(y)) / expected - 1))
    assert errors[1] < 0.01 and errors[1] < errors[0]


@pytest.mark.parametrize('n, m, d, rank', [(200, 150, 40, 40), (200, 150, 40, 9), (30, 20, 40, 40), (2, 3, 7, 7)])
def test_frechet_of_dependent_and_dead_features(n, m, d, rank):
    rng = np.random.default_rng(3)
    x, y = (rng.normal(size=(k, rank)) @ rng.normal(size=(rank, d)) for k in (n, m))
    x[:, :3] = y[:, 1:5] = 0
    y[:, 6] = 2.5
    u, v = ((a - a.mean(0)) / np.sqrt(len(a) - 1) for a in (x, y))
    # Without a covariance, hence without its rounding: tr (S T)^1/2 is the sum of singular values of u v^T.
    cross = np.linalg.svd(u @ v.T, compute_uv=False).sum()
    expected = np.square(x.mean(0) - y.mean(0)).sum() + (u**2).sum() + (v**2).sum() - 2 * cross
    assert frechet(Moments.of(x), Moments.of(y)) == pytest.approx(expected, rel=1e-11)
    assert 0 <= frechet(Moments.of(x), Moments.of(x)) <= 1e-11 * (u**2).sum()
    shift = frechet(Moments.of(x), Moments.of(x + 0.5))
    assert shift == pytest.approx(0.25 * d, rel=1e-9), 'a shift alone'


@pytest.mark.parametrize('dtype', ['float64', 'float32', 'float16'])
def test_streamed_moments_are_those_of_the_whole(dtype, monkeypatch):
    monkeypatch.setattr('jaxgen.metrics.moments.ROWS', 100)  # several in one call, too
    rng = np.random.default_rng(4)
    x = (rng.normal(size=(1500, 20)) @ rng.normal(size=(20, 20)) + (0 if dtype == 'float16' else 1e4)).astype(dtype)
    got, start = Moments.empty(20), 0
    while start < len(x):
        size = int(rng.integers(1, 300))
        got, start = merge(got, Moments.of(x[start : start + size])), start + size
    exact = x.astype('longdouble')  # np.cov in float64 has rounding of its own
    exact = exact - exact.mean(0)
    expected = (exact.T @ exact / 1499).astype('float64')
    for moments in (got, Moments.of(x)):
        assert moments.n == 1500
        np.testing.assert_allclose(moments.mean, x.astype('float64').mean(0), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(moments.covariance(), expected, rtol=1e-12, atol=1e-12 * expected.max())
        theirs = np.cov(x, rowvar=False, dtype='float64')
        np.testing.assert_allclose(moments.covariance(), theirs, rtol=1e-12, atol=1e-12 * expected.max())
    same = merge(merge(Moments.empty(20), got), Moments.empty(20))
    np.testing.assert_array_equal(same.scatter, got.scatter)
    assert merge(Moments.empty(3), Moments.empty(3)).n == 0


def test_inception_score_of_known_classifiers():
    sure = 50.0 * np.eye(5, dtype='float32')[np.arange(100) % 5]
    assert inception_score(sure, 4) == pytest.approx((5, 0)), 'certain and even: the number of classes'
    assert inception_score(np.zeros((100, 5)), 4) == pytest.approx((1, 0)), 'no idea'
    assert inception_score(np.repeat(sure[:1], 100, 0), 4) == pytest.approx((1, 0)), 'one mode'
    assert inception_score(np.sort(sure.argmax(1))[:, None] == np.arange(5), 1)[0] > 1
    halves = np.concatenate([sure[:50], np.zeros((50, 5))])
    assert inception_score(halves, 2) == pytest.approx((3, 2)), 'parts lie one after the other, ddof is 0'
    assert inception_score(1e4 * sure, 1) == pytest.approx((5, 0)), 'probabilities that underflow'
    assert inception_score(1e4 * sure[:1], 1) == pytest.approx((1, 0)), 'and their mean does, too'


def test_kernel_distance_against_loops():
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(7, 3)), rng.normal(size=(7, 3)) + 1

    def kernel(a, b):
        return (sum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / 3 + 1) ** 3

    pairs = [(i, j) for i in range(7) for j in range(7)]
    within = sum(kernel(s[i], s[j]) for s in (x, y) for i, j in pairs if i != j) / 42
    expected = within - 2 * sum(kernel(x[i], y[j]) for i, j in pairs) / 49
    assert kernel_distance(x, y, subsets=2, size=7) == pytest.approx((expected, 0)), 'a subset of all is the set'


def test_gaussian_discrepancy_against_loops(monkeypatch):
    """Means over all pairs, those of one with itself among them, in parts of any number of rows."""
    x, y = two_sets(3, 9, 7, 4)

    def mean(a, b):
        return np.mean([np.exp(-np.square(p - q).sum() / (2 * 3.0**2)) for p in a for q in b])

    expected = 5 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert gaussian_discrepancy(x, y, sigma=3, scale=5) == pytest.approx(expected, rel=1e-10)
    monkeypatch.setattr(scores, 'ROWS', 4)
    assert gaussian_discrepancy(x, y, sigma=3, scale=5) == pytest.approx(expected, rel=1e-10)
    assert gaussian_discrepancy(x, x) == 0
    with pytest.raises(UserError, match='one dimension'):
        gaussian_discrepancy(x, y[:, :3])


def test_gaussian_discrepancy_of_two_points():
    """1000 (2 - 2 exp(-d^2 / 200)) of one point each at the distance d, also where d is small."""
    for d in (2.0, 1e-4):
        expected = -2000 * np.expm1(-(d**2) / 200)
        assert gaussian_discrepancy(np.zeros((1, 3)), np.array([[d, 0, 0]])) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_grows_with_the_shift_and_has_no_bias():
    x, y = two_sets(6, 300, 300, 8)
    near, std = kernel_distance(x[:150], x[150:], subsets=50, size=50)
    assert abs(near) < 4 * std / np.sqrt(6), 'about 0, where a biased estimate is above'
    assert kernel_distance(x, y, subsets=50, size=50)[0] > abs(near)
    assert kernel_distance(x, y, 5, 50) != kernel_distance(x, y, 5, 50, seed=0)


def test_modes_covered():
    weights, means, stds = np.array([0.5, 0.25, 0.25]), np.array([[0.0, 0], [4, 0], [0, 4]]), np.array([1.0, 0.5, 1])
    points = np.array([[0, 2.9], [-3.1, 0], [1.4, 0], [2.6, 0], [0, 1.1], [4, 1.6], [9, 9], [3, 0]])
    # Of the first: 0 (between it and the third: the nearer in deviations), 2, 3; of the second 7; of the third 4.
    good, covered, kl = modes_covered(points, weights, means, stds)
    distance = np.sqrt(((points[:, None] - means) ** 2).sum(-1)) / stds
    which = [int(d.argmin()) for d in distance if d.min() <= 3]
    assert good == len(which) / 8 == 5 / 8 and covered == len(set(which)) == 3
    p = np.bincount(which) / len(which)
    assert kl == pytest.approx((p * np.log(p / weights)).sum()) and kl > 0
    assert modes_covered(np.full((3, 2), 99.0), weights, means, stds) == (0, 0, np.inf)
    assert modes_covered(points[2:4], weights, means, stds)[1:] == (1, pytest.approx(np.log(2)))
    rng = np.random.default_rng(0)
    own = means[rng.choice(3, 20_000, p=weights)]
    good, covered, kl = modes_covered(own + rng.normal(size=own.shape) * 0.01, weights, means, stds)
    assert good == 1 and covered == 3 and kl < 1e-3


def test_class_balance():
    hot = np.eye(4)
    modes, kl = class_balance(hot[[0, 0, 0, 1]], [10, 10, 20, 0])
    data = np.array([10, 10, 20, 1]) / 41
    expected = 0.75 * np.log(0.75 / data[0]) + 0.25 * np.log(0.25 / data[1])
    assert modes == 2 and kl == pytest.approx(expected)
    assert class_balance(hot[[0, 1, 2, 2]], [5, 5, 10, 0])[0] == 3
    modes, kl = class_balance(hot[[0, 1, 2, 2, 3]], [25, 25, 50, 25])
    assert modes == 4 and kl == pytest.approx(0, abs=1e-15), 'as in the data'
    assert class_balance(hot[[3] * 9], [100, 100, 100, 0])[1] == pytest.approx(np.log(301)), 'not infinite'


SIZES = [(300, 200, 16), (120, 150, 64), (260, 300, 128)]


@pytest.mark.parametrize('n, m, d', SIZES)
def test_frechet_is_that_of_torch_fidelity(n, m, d):
    fid = reference('fid')
    x, y = two_sets(7, n, m, d)
    expected = fid.fid_statistics_to_metric(*(fid.fid_features_to_statistics(in_torch(s)) for s in (x, y)), False)
    assert frechet(Moments.of(x), Moments.of(y)) == pytest.approx(expected['frechet_inception_distance'], rel=1e-6)


@pytest.mark.parametrize('n, c', [(100, 10), (107, 5), (1003, 40)])
def test_inception_score_is_that_of_torch_fidelity(n, c):
    isc = reference('isc')
    logits = np.random.default_rng(8).normal(size=(n, c)).astype('float32') * 3
    expected = isc.isc_features_to_metric(in_torch(logits), 10, shuffle=False)
    expected = expected['inception_score_mean'], expected['inception_score_std']
    assert inception_score(logits) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('n, m, d', SIZES)
def test_kernel_distance_is_that_of_torch_fidelity(n, m, d):
    kid = reference('kid')
    x, y = two_sets(9, n, m, d)
    options = {'kid_subsets': 7, 'kid_subset_size': 100, 'verbose': False}
    expected = kid.kid_features_to_metric(in_torch(x), in_torch(y), **options)
    expected = expected['kernel_inception_distance_mean'], expected['kernel_inception_distance_std']
    assert kernel_distance(x, y, subsets=7, size=100) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('n, m, d', SIZES)
def test_precision_and_recall_are_those_of_torch_fidelity(n, m, d):
    prc = reference('prc')
    x, y = two_sets(10, n, m, d)
    y[: m // 3] *= 2
    for real, fake in ((x, y), (y, x)):
        expected = prc.prc_features_to_metric(in_torch(fake), in_torch(real), save_cpu_ram=False, verbose=False)
        got = neighbourhood(real, fake)
        assert 0.1 < min(got['precision'], got['recall']) < 0.9, 'a test of something'
        assert got['precision'] == pytest.approx(expected['precision'], abs=1e-6)
        assert got['recall'] == pytest.approx(expected['recall'], abs=1e-6)


def slow_neighbourhood(real, fake, k_precision, k_density):
    """By the definitions, one pair after the other, in float64."""
    real, fake = np.asarray(real, 'float64'), np.asarray(fake, 'float64')

    def distance(a, b):
        return float(np.square(a - b).sum())

    def radius(points, i, k):
        return sorted(distance(points[i], points[j]) for j in range(len(points)) if j != i)[k - 1]

    between = [[distance(f, r) for r in real] for f in fake]
    n, m = len(real), len(fake)
    ball = {k: [radius(real, i, k) for i in range(n)] for k in (1, k_precision, k_density)}
    fake_ball = [radius(fake, j, k_precision) for j in range(m)]
    nearest = [min(range(n), key=lambda i: row[i]) for row in between]
    return {
        'precision': sum(any(between[j][i] <= ball[k_precision][i] for i in range(n)) for j in range(m)) / m,
        'recall': sum(any(between[j][i] <= fake_ball[j] for j in range(m)) for i in range(n)) / n,
        'density': sum(between[j][i] <= ball[k_density][i] for i in range(n) for j in range(m)) / (k_density * m),
        'coverage': sum(any(between[j][i] <= ball[k_density][i] for j in range(m)) for i in range(n)) / n,
        'authenticity': sum(between[j][nearest[j]] > ball[1][nearest[j]] for j in range(m)) / m,
    }


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(neighbours, 'CHUNK', 16)
    for f in (neighbours.radii, neighbours.each_sample):
        f.clear_cache()  # CHUNK is no argument


@pytest.mark.parametrize('n, m, ks', [(16, 33, (3, 5)), (15, 32, (2, 1)), (50, 17, (3, 5)), (6, 48, (3, 5))])
def test_neighbours_against_loops(n, m, ks, small_chunks):
    real, fake = two_sets(11, n, m, 6)
    expected = slow_neighbourhood(real, fake, *ks)
    assert neighbourhood(real, fake, *ks) == pytest.approx(expected)
    assert neighbourhood(real + 1e5, fake + 1e5, *ks) == pytest.approx(expected), 'an offset costs nothing'


def test_neighbours_among_duplicates_and_ties(small_chunks):
    # Whole numbers and a power of two of them: no rounding, and many distances are equal or 0.
    rng = np.random.default_rng(12)
    real, fake = rng.integers(0, 3, (64, 4)).astype('float32'), rng.integers(1, 4, (37, 4)).astype('float32')
    assert len(np.unique(real, axis=0)) < 60 and len(np.unique(fake, axis=0)) < 37
    got = neighbourhood(real, fake)
    assert got == pytest.approx(slow_neighbourhood(real, fake, 3, 5))
    assert all(0.1 < got[name] < 0.95 for name in got), f'a test of something: {got}'


@pytest.mark.parametrize('d', [3, 64, 2048])
def test_only_copies_are_at_distance_zero(d):
    rng = np.random.default_rng(15)
    x = rng.normal(size=(100, d)).astype('float32') + 3
    order = rng.permutation(100)
    distances = np.asarray(neighbours.squared_distances(x, x[order]))
    np.testing.assert_array_equal(distances == 0, np.arange(100)[:, None] == order)
    near = x + 0.02 * np.linalg.norm(x, axis=1, keepdims=True) / np.sqrt(d)
    distances = np.diagonal(neighbours.squared_distances(x, near))
    np.testing.assert_allclose(distances, np.square(x - near).sum(1), rtol=0.05)


def test_neighbours_around_a_whole_chunk():
    rng = np.random.default_rng(13)
    n, m = neighbours.CHUNK, neighbours.CHUNK + 1
    real, fake = rng.normal(size=(n, 8)).astype('float32'), 1.3 * rng.normal(size=(m, 8)).astype('float32')
    rr, ff, fr = (
        np.square(a[:, None].astype('float64') - b).sum(-1) for a, b in ((real, real), (fake, fake), (fake, real))
    )
    rr, ff = np.sort(rr, 1), np.sort(ff, 1)  # column 0 is the sample itself
    expected = {
        'precision': (fr <= rr[:, 3]).any(1).mean(),
        'recall': (fr <= ff[:, 3:4]).any(0).mean(),
        'density': (fr <= rr[:, 5]).sum() / (5 * m),
        'coverage': (fr.min(0) <= rr[:, 5]).mean(),
        'authenticity': (fr.min(1) > rr[fr.argmin(1), 1]).mean(),
    }
    assert neighbourhood(real, fake) == pytest.approx(expected, abs=1e-12)


def test_broken_samplers():
    rng = np.random.default_rng(14)
    modes = 10 * rng.normal(size=(8, 32))

    def draw(n, which):
        return (modes[rng.choice(which, n)] + rng.normal(size=(n, 32))).astype('float32')

    data = draw(400, range(8))
    good = neighbourhood(data, draw(400, range(8)))
    assert min(good['precision'], good['recall']) > 0.7 and good['coverage'] > 0.9
    assert 0.9 < good['density'] < 1.2 and good['authenticity'] > 0.5

    collapsed = neighbourhood(data, draw(400, [2]))
    assert collapsed['precision'] > 0.7
    assert collapsed['recall'] < 0.2 and collapsed['coverage'] < 0.2, 'one mode of eight'

    point = neighbourhood(data, np.repeat(data[:1], 50, 0))  # one image of the data, always
    assert point['precision'] == 1 and point['recall'] == 1 / 400 and point['authenticity'] == 0

    copies = neighbourhood(data, rng.permutation(np.concatenate([data, data])))
    assert copies['precision'] == copies['recall'] == copies['coverage'] == 1
    assert copies['authenticity'] == 0
    doubled = neighbourhood(np.repeat(data, 2, 0), data)
    assert doubled['authenticity'] == 0, 'copies of data that occur twice are copies'

    far = neighbourhood(data, draw(400, range(8)) + 100)
    assert far == dict(precision=0, recall=0, density=0, coverage=0, authenticity=1)

    moments = Moments.of(data)
    good, half, one = (frechet(moments, Moments.of(draw(400, which))) for which in (range(8), range(4), [2]))
    assert 5 * good < half < one


def test_degenerate_features_are_refused():
    x = np.zeros((20, 3), 'float32')
    bad = x.copy()
    bad[[17, 19], 1] = np.nan, np.inf
    for measure in (
        finite,
        Moments.of,
        lambda x: kernel_distance(x, np.zeros((20, 3)), size=5),
        lambda x: kernel_distance(np.zeros((20, 3)), x, size=5),
        lambda x: neighbourhood(np.zeros((20, 3)), x),
        lambda x: neighbourhood(x, np.zeros((20, 3))),
        inception_score,
        lambda x: class_balance(x, [1, 1, 1]),
    ):
        measure(x)
        with pytest.raises(RunError, match=r'(features|logits) of sample 17 are not finite'):
            measure(bad)
    with pytest.raises(UserError, match=r'10 parts .* only 9 samples'):
        inception_score(x[:9])
    for size in (16, 1):
        with pytest.raises(UserError, match=f'subsets of 2 to 15 samples; they are of {size}'):
            kernel_distance(x, x[:15], size=size)
    for real, fake in ((x, x[:5]), (x[:5], x)):
        with pytest.raises(UserError, match='need 6 samples or more'):
            neighbourhood(real, fake)
    neighbourhood(x[:6], x[:6])
    with pytest.raises(UserError, match='two samples'):
        frechet(Moments.of(x), Moments.of(x[:1]))
