"""Optimisation from the config: schedules, averages, accumulation, several steps in one update."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen.config import DEFAULTS, differences_that_matter, make
from jaxgen.contract import Aux, advance, gradient_step, new_state, split_batch
from jaxgen.errors import UserError
from jaxgen.optim import (
    exponent,
    halflife_decay,
    halflife_one_minus_decay,
    initial_fraction,
    learning_rate,
    make_optim,
    post_hoc,
    power_decay,
    power_one_minus_decay,
    weight_decay_by_update,
)


def optim(steps: int = 100, **fields):
    return make_optim(steps, **{**DEFAULTS['optim'], 'name': 'sgd', 'b1': 0.0, 'lr': 0.1, **fields})


def loss(params, state, frozen, batch, rng):
    """Least squares of one network; the other must never move."""
    error = batch['x'] @ params['line'] - batch['y'] + 0 * params['other'].sum()
    value = jnp.square(error).mean()
    return value, Aux({'loss': value})


def state(o):
    return new_state({'line': jnp.ones(3), 'other': jnp.ones(2)}, o)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return {'x': jnp.asarray(rng.normal(size=(12, 3)), jnp.float32), 'y': jnp.asarray(rng.normal(size=12), jnp.float32)}


def test_schedules():
    rate = learning_rate(10, lr=1.0, schedule='linear', warmup=4)
    np.testing.assert_allclose([rate(i) for i in range(4)], [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose([rate(i) for i in (4, 7, 10)], [1.0, 0.5, 0.0], atol=1e-7)
    cosine = learning_rate(8, lr=2.0, schedule='cosine', warmup=0)
    np.testing.assert_allclose([cosine(i) for i in (0, 4, 8)], [2.0, 1.0, 0.0], atol=1e-6)
    half = learning_rate(12, lr=2.0, schedule='half_linear', warmup=2)
    np.testing.assert_allclose([half(i) for i in (0, 1, 2, 7, 8, 12)], [1.0, 2.0, 2.0, 2.0, 1.6, 0.0], atol=1e-6)
    assert learning_rate(8, lr=2.0, schedule='constant', warmup=0)(1000) == 2.0


def rates(**fields):
    """Learning rates of our schedule as a function of many updates at once."""
    return jax.jit(jax.vmap(learning_rate(fields.pop('steps', 100), **{'warmup': 0, **fields})))


@pytest.fixture(scope='module')
def torch():
    return pytest.importorskip('torch')


def of_torch(torch, scheduler, n: int, lr: float, **fields) -> list[float]:
    """The learning rates of n updates under a scheduler of torch, which computes in float64."""
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler, out = scheduler(sgd, **fields), []
    for _ in range(n):
        out.append(scheduler.get_last_lr()[0])
        sgd.step()
        scheduler.step()
    return out


def test_schedules_are_those_of_torch(torch):
    s, n = torch.optim.lr_scheduler, jnp.arange(100)
    step = rates(lr=0.3, schedule='step', boundaries=(20, 50, 51), decay_rate=0.3)
    np.testing.assert_allclose(
        step(n), of_torch(torch, s.MultiStepLR, 100, 0.3, milestones=[20, 50, 51], gamma=0.3), rtol=1e-6
    )
    falling = rates(lr=0.3, schedule='exponential', decay_rate=0.97)
    np.testing.assert_allclose(falling(n), of_torch(torch, s.ExponentialLR, 100, 0.3, gamma=0.97), rtol=1e-6)
    cosine = rates(lr=0.3, schedule='cosine', floor=0.1)
    np.testing.assert_allclose(
        cosine(n), of_torch(torch, s.CosineAnnealingLR, 100, 0.3, T_max=100, eta_min=0.03), rtol=1e-5
    )
    linear = rates(lr=0.3, schedule='linear', floor=0.2)
    like = of_torch(torch, s.LinearLR, 100, 0.3, start_factor=1.0, end_factor=0.2, total_iters=100)
    np.testing.assert_allclose(linear(n), like, rtol=1e-5)


def test_a_plateau_comes_before_the_fall():
    """VAR's 'lin0': 5 % of the updates after warm-up at the full rate, then a line to 1 % of it."""
    rate = rates(steps=1100, lr=2.0, schedule='linear', warmup=100, plateau=0.05, floor=0.01)
    slow = []
    for n in range(1101):
        part = (n - 100) / 1000
        slow.append(2 * ((n + 1) / 100 if n < 100 else 1 if part < 0.05 else 0.01 + 0.99 * (1 - part) / 0.95))
    np.testing.assert_allclose(rate(jnp.arange(1101)), slow, rtol=1e-5)
    half = dict(lr=2.0, warmup=0, steps=1000)
    np.testing.assert_allclose(
        rates(schedule='linear', plateau=0.5, **half)(jnp.arange(1000)),
        rates(schedule='half_linear', **half)(jnp.arange(1000)),
        atol=1e-6,
    )


def test_schedules_are_exact_after_millions_of_updates():
    """Against float64: PixelCNN++'s 0.999995 per update, an inverse square root, and lines over 2^30 updates."""
    n = np.array([0, 1, 999, 10**6, 10**7, 2**24 + 1, 10**8, 2**30])
    falling = rates(lr=1e-3, schedule='exponential', decay_rate=0.999995, floor=1e-6)
    np.testing.assert_allclose(falling(n), 1e-3 * np.maximum(0.999995 ** n.astype(float), 1e-6), rtol=1e-5)
    root = rates(lr=1e-3, schedule='rsqrt', decay_every=70_000)
    np.testing.assert_allclose(root(n), 1e-3 / np.sqrt(np.maximum(n / 70_000, 1)), rtol=1e-6)
    line = rates(lr=1.0, schedule='linear', steps=2**30)
    np.testing.assert_allclose(line(n), 1 - n / 2**30, atol=2e-7)


def test_a_scheduled_weight_decay():
    """VAR's: half a cosine over the whole run, from 0.05 to 0.08."""
    value = weight_decay_by_update(11, 0.05, 0.08)
    np.testing.assert_allclose(
        [value(n) for n in range(11)],
        [0.08 - 0.03 * (0.5 + 0.5 * np.cos(np.pi * n / 10)) for n in range(11)],
        rtol=1e-6,
    )


def train(weights: dict, gradients: list[dict], **fields) -> dict:
    """Weights after our optimiser's steps with these gradients."""
    tx = make_optim(len(gradients), **{**DEFAULTS['optim'], **fields}).tx('net')
    opt = tx.init(weights)
    for g in gradients:
        updates, opt = tx.update(g, opt, weights)
        weights = optax.apply_updates(weights, updates)
    return weights


def train_torch(torch, kind, weights: dict, gradients: list[dict], groups, **fields) -> dict:
    """The same of torch. groups: parameters' options from a dict of tensors."""
    tensors = {k: torch.tensor(np.asarray(v, np.float64), requires_grad=True) for k, v in weights.items()}
    optimiser = kind(groups(tensors), **fields)
    for g in gradients:
        for k, t in tensors.items():
            t.grad = torch.tensor(np.asarray(g[k], np.float64))
        optimiser.step()
    return {k: t.detach().numpy() for k, t in tensors.items()}


@pytest.fixture
def problem():
    rng = np.random.default_rng(1)
    shapes = {'kernel': (3, 4), 'bias': (4,)}
    weights = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    return weights, [{k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()} for _ in range(20)]


def test_adamax_is_that_of_torch(torch, problem):
    ours = train(*problem, name='adamax', lr=0.1, b2=0.9)
    like = train_torch(torch, torch.optim.Adamax, *problem, lambda t: list(t.values()), lr=0.1, betas=(0.9, 0.9))
    for name in like:
        np.testing.assert_allclose(ours[name], like[name], rtol=1e-4, atol=1e-5)


def test_weight_decay_leaves_out_what_no_decay_names(torch, problem):
    ours = train(*problem, name='adamw', lr=0.01, weight_decay=0.5, no_decay=('bias',))
    like = train_torch(
        torch,
        torch.optim.AdamW,
        *problem,
        lambda t: [{'params': [t['kernel']]}, {'params': [t['bias']], 'weight_decay': 0.0}],
        lr=0.01,
        weight_decay=0.5,
    )
    for name in like:
        np.testing.assert_allclose(ours[name], like[name], rtol=1e-4, atol=1e-6)
    everywhere = train(*problem, name='adamw', lr=0.01, weight_decay=0.5)
    assert np.abs(everywhere['bias'] - ours['bias']).max() > 0.01


def test_l2_is_the_weight_decay_of_torchs_adam(torch, problem):
    ours = train(*problem, lr=0.01, l2=0.5)
    like = train_torch(torch, torch.optim.Adam, *problem, lambda t: list(t.values()), lr=0.01, weight_decay=0.5)
    for name in like:
        np.testing.assert_allclose(ours[name], like[name], rtol=1e-4, atol=1e-6)


def test_normalised_gradients(problem):
    """Adam of gradients that are divided by their norm, array by array, is ours of the gradients as they are."""
    weights, gradients = problem
    unit = [{k: x / np.linalg.norm(x) for k, x in g.items()} for g in gradients]
    ours, like = train(weights, gradients, normalise=True, lr=0.01), train(weights, unit, lr=0.01)
    for name in like:
        np.testing.assert_allclose(ours[name], like[name], rtol=1e-5, atol=1e-6)
    zero = [jax.tree.map(jnp.zeros_like, g) for g in gradients]
    jax.tree.map(np.testing.assert_array_equal, train(weights, zero, normalise=True), weights)


def test_a_pattern_that_matches_no_weight_is_refused(problem):
    with pytest.raises(UserError, match="no weight matches 'biass'"):
        train(*problem, name='adamw', weight_decay=0.1, no_decay=('bias', 'biass'))
    nested = {'layer_0': {'kernel': jnp.ones(2)}, 'norm': {'scale': jnp.ones(2)}}
    zero = jax.tree.map(jnp.zeros_like, nested)
    for pattern in ('nor*', 'scale', 'norm/scale'):
        after = train(nested, [zero], name='adamw', lr=0.1, weight_decay=0.1, no_decay=(pattern,))
        np.testing.assert_allclose(after['norm']['scale'], 1)
    np.testing.assert_allclose(after['layer_0']['kernel'], 1 - 0.1 * 0.1, rtol=1e-6)


def test_a_half_life_in_images_with_ramp_up():
    """EDM's and StyleGAN2's: from 0 at the first update to the constants of the papers."""
    assert halflife_decay(0, 512, 500_000, 0.05) == 0
    for n in (1, 10, 1000, 10**5, 10**7):
        half = min(500_000, n * 512 * 0.05)
        assert 1 - float(halflife_decay(n, 512, 500_000, 0.05)) == pytest.approx(1 - 0.5 ** (512 / half), rel=1e-3)
    assert float(halflife_decay(10**6, 512, 500_000, 0.05)) == pytest.approx(0.99929047, abs=1e-7)  # EDM, CIFAR-10
    assert float(halflife_decay(0, 32, 10_000, 0.0)) == pytest.approx(0.99778439, abs=1e-7)  # StyleGAN2, 10,000 images
    o = optim(ema=0.0, ema_halflife=100.0, ema_rampup=0.5, batch=10)
    s, slow = state(o), 1.0
    for n in range(40):
        s = advance(s.replace(params={**s.params, 'line': jnp.full(3, float(n))}), o)
        decay = 0.5 ** (10 / min(100, n * 10 * 0.5)) if n else 0
        slow = decay * slow + (1 - decay) * n
    np.testing.assert_allclose(s.ema['line'], slow, rtol=1e-5)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        (dict(schedule='step'), 'boundaries'),
        (dict(schedule='exponential', decay_rate=1.5), 'decay_rate'),
        (dict(plateau=1.0), 'plateau'),
        (dict(floor=-0.1), 'floor'),
        (dict(decay_every=0), 'decay_every'),
        (dict(boundaries=(0.5,)), 'boundaries'),
        (dict(weight_decay=0.1), 'adamw'),
        (dict(l2=-1.0), 'l2'),
        (dict(networks=dict(denoiser=dict(schedule='foo'))), 'networks.denoiser.schedule'),
        (dict(networks=dict(denoiser=dict(weight_decay=0.1))), 'networks.denoiser.weight_decay'),
    ],
)
def test_recipes_that_cannot_work_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        make(family='vae', optim=fields)


def test_a_run_goes_on_longer_only_under_schedules_without_an_end():
    for schedule, ends in (('constant', False), ('rsqrt', False), ('exponential', False), ('linear', True)):
        a, b = (make(family='vae', optim=dict(schedule=schedule), train=dict(steps=n)) for n in (1000, 2000))
        assert bool(differences_that_matter(a, b)) == ends
    fields = dict(name='adamw', weight_decay=0.1, weight_decay_schedule='cosine')
    a, b = (make(family='vae', optim=fields, train=dict(steps=n)) for n in (1000, 2000))
    assert differences_that_matter(a, b)


def test_accumulation_is_the_whole_batch(batch):
    """The gradient of the parts' mean is that of the whole; clipping comes after."""
    for clip in (0.0, 0.05):
        results = []
        for parts in (1, 4):
            o = optim(accumulate=parts, clip=clip)
            results.append(gradient_step(loss, o, 'line')(state(o), {}, batch, jax.random.key(0)))
        for a, b in zip(*map(jax.tree.leaves, results), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)


def test_steps_within_one_update(batch):
    """times = 3 is three steps, each on its own part, at the rate of the one update."""
    o = optim(schedule='linear', steps=2)
    many, _ = gradient_step(loss, o, 'line', times=3)(state(o), {}, batch, jax.random.key(0))
    line = jnp.ones(3)
    for part in range(3):
        own = {k: v[part::3] for k, v in batch.items()}
        line = line - 0.1 * jax.grad(
            lambda p, own=own: loss({'line': p, 'other': jnp.ones(2)}, None, {}, own, None)[0]
        )(line)
    np.testing.assert_allclose(many.params['line'], line, rtol=1e-5)


def test_only_the_named_network_moves(batch):
    o = optim(networks={'line': {'lr': 0.3}})
    before = state(o)
    after, aux = gradient_step(loss, o, 'line')(before, {}, batch, jax.random.key(0))
    np.testing.assert_array_equal(after.params['other'], before.params['other'])
    assert jax.tree.all(jax.tree.map(np.array_equal, after.opt['other'], before.opt['other']))
    gradient = jax.grad(lambda p: loss({**before.params, 'line': p}, before, {}, batch, None)[0])(before.params['line'])
    np.testing.assert_allclose(after.params['line'], before.params['line'] - 0.3 * gradient, rtol=1e-5)
    np.testing.assert_allclose(aux.logs['grad_norm/line'], optax.tree.norm(gradient), rtol=1e-5)


def test_moving_average():
    for warm in (False, True):
        o = optim(ema=0.9, ema_warmup=warm)
        s, slow = state(o), 1.0
        for n in range(30):
            weights = float(n)
            s = advance(s.replace(params={**s.params, 'line': jnp.full(3, weights)}), o)
            decay = min(0.9, (2 + n) / (11 + n)) if warm else 0.9  # score SDEs' release: 2/11 at the first update
            slow = decay * slow + (1 - decay) * weights
        np.testing.assert_allclose(s.ema['line'], slow, rtol=1e-5)
        assert int(s.step) == 30


def test_parts_of_a_batch_are_all_of_it():
    parts = split_batch({'x': jnp.arange(12)}, 3)['x']
    assert parts.shape == (3, 4) and sorted(parts.reshape(-1).tolist()) == list(range(12))


def test_widths_of_power_function_averages():
    assert exponent(0.05) == pytest.approx(16.97, abs=0.01) and exponent(0.1) == pytest.approx(6.94, abs=0.01)  # paper
    gamma = exponent(0.1)
    t = (np.arange(100_000) + 0.5) / 100_000
    weight = t**gamma / (t**gamma).sum()
    assert np.sqrt((weight * t**2).sum() - (weight * t).sum() ** 2) == pytest.approx(0.1, rel=1e-4)


def test_an_average_put_together_afterwards_is_the_one_tracked():
    """Of two widths, saved now and then, any other width comes out as if it had been kept all along."""
    target = 0.07
    o = optim(ema_std=(0.05, 0.1, target))
    rng = np.random.default_rng(0)
    path = np.cumsum(rng.normal(size=(400, 3)), 0) * 0.1  # weights wander
    s, saved = state(o), []
    step = jax.jit(lambda s, w: advance(s.replace(params={**s.params, 'line': w}), o))
    for n in range(400):
        s = step(s, jnp.asarray(path[n], jnp.float32))
        if (n + 1) % 50 == 0:
            saved += [(n + 1, std, np.asarray(s.ema[f'line@{std}'])) for std in (0.05, 0.1)]
    assert set(s.ema) == {f'{name}{at}' for name in ('line', 'other') for at in ('', '@0.05', '@0.1', '@0.07')}
    weight = np.arange(1, 401) ** exponent(target)
    np.testing.assert_allclose(s.ema['line@0.07'], weight @ path / weight.sum(), atol=0.02)
    steps, stds, values = zip(*saved, strict=True)
    coefficients = post_hoc(np.array(steps), np.array(stds), 400, target)
    np.testing.assert_allclose(coefficients @ np.stack(values), s.ema['line@0.07'], atol=2e-3)
    # Far more exact than the nearest of those that were kept.
    assert np.abs(values[-2] - s.ema['line@0.07']).max() > 0.02


@pytest.mark.parametrize('step', [0, 1, 10**3, 10**6, 34_000_000, 2 * 10**9])
def test_averages_go_on_in_long_runs(step):
    """The weight of the newest, against float64: a relative 1e-6 of it where the decay is 1 but for a few 1e-9."""
    with np.errstate(divide='ignore'):
        for std in (0.05, 0.1, 0.28):
            gamma = exponent(std)
            target = -np.expm1((gamma + 1) * np.log1p(-1 / np.float64(step + 1)))
            assert float(power_one_minus_decay(step, std)) == pytest.approx(target, rel=1e-5)
            assert float(power_decay(step, std)) == pytest.approx(1 - target, abs=2e-7)
    for halflife, rampup in ((1e4, 0.0), (1e10, 0.0), (1e10, 0.05)):
        images = min(halflife, step * 64 * rampup) if rampup else halflife
        target = -np.expm1(-np.log(2) * 64 / images) if images else 1.0
        assert float(halflife_one_minus_decay(step, 64, halflife, rampup)) == pytest.approx(target, rel=1e-5)
    for warm in (False, True):
        target = max(1 - 0.999999, 9 / (11 + step)) if warm else 1 - 0.999999
        assert float(optim(ema=0.999999, ema_warmup=warm).one_minus_decay(step)) == pytest.approx(target, rel=1e-5)


def test_an_average_late_in_a_run_takes_its_step():
    """At update 20 million, 2,000 steps towards 1: against float64. The decay in float32 would be 0 or 40 % off."""
    late, k, o = 20_000_000, 2000, optim(ema_std=(0.1,))
    s = state(o)
    s = s.replace(step=jnp.int32(late), ema=jax.tree.map(jnp.zeros_like, s.ema))
    s, _ = jax.jit(lambda s: jax.lax.scan(lambda s, _: (advance(s, o), None), s, None, k))(s)
    kept = np.exp((exponent(0.1) + 1) * (np.log(late) - np.log(late + k)))
    np.testing.assert_allclose(s.ema['line@0.1'], 1 - kept, rtol=1e-3)


@pytest.mark.parametrize('shape', ['linear', 'cosine', 'exponential', 'rsqrt', 'step', 'constant'])
def test_schedules_of_long_runs(shape):
    """Against float64, to a millionth of lr, up to two billion updates."""
    steps, warm = 2_000_000_000, 5000
    options = dict(decay_rate=0.5, decay_every=10**7, boundaries=(10**6, 10**9), floor=0.0)
    rate = learning_rate(steps, lr=1.0, schedule=shape, warmup=warm, **options)
    for n in (0, 4999, 5000, 10**6, 16_777_217, 10**8, 10**9, steps - 1):
        progress = max(n - warm, 0) / (steps - warm)
        factor = {
            'constant': 1.0,
            'linear': 1 - progress,
            'cosine': 0.5 + 0.5 * np.cos(np.pi * progress),
            'exponential': 0.5 ** (n / 10**7),
            'rsqrt': min(1, (n / 10**7) ** -0.5) if n else 1.0,
            'step': 0.5 ** ((n >= 10**6) + (n >= 10**9)),
        }[shape]
        assert float(rate(jnp.int32(n))) == pytest.approx(min((n + 1) / warm, 1) * factor, abs=1e-6), n


@pytest.mark.parametrize('steps', [0, 1, 7, 400, 3000])
def test_what_is_left_of_the_first_weights(steps):
    """Against the average itself: the first weights are 1, all later ones 0."""
    cases = [dict(ema=0.9999), dict(ema=0.99, ema_warmup=True), dict(ema=0.5, ema_warmup=True), dict(ema=0.0)]
    cases += [dict(ema_halflife=5e4), dict(ema_halflife=5e4, ema_rampup=0.05), dict(ema=0.1, ema_warmup=True)]
    for case in cases:
        fields = dict(ema=0.0, ema_warmup=False, ema_halflife=0.0, ema_rampup=0.0, batch=64) | case
        newest, left = make_optim(10, **{**DEFAULTS['optim'], **fields}).one_minus_decay, 1.0
        for value in np.asarray(jax.vmap(newest)(jnp.arange(steps)), np.float64):
            left *= 1 - value
        assert initial_fraction(steps, **fields) == pytest.approx(left, rel=2e-3, abs=1e-12), case
    published = dict(ema_warmup=False, ema_halflife=0.0, ema_rampup=0.0, batch=1)
    assert initial_fraction(400, ema=0.9999, **published) == pytest.approx(0.9608, abs=1e-4)
