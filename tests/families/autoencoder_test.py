"""Autoencoders: each corruption, its loss, restorations and metrics against plain ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import sgd

from jaxgen.augmentation import corruptions
from jaxgen.contract import Context
from jaxgen.errors import UserError
from jaxgen.families import autoencoder

SMALL = dict(width=4, blocks=1, hidden=2, halvings=1, latent=3)
KEY = jax.random.key(0)


def family(corruption='none', image=(8, 4, 3), accumulate=1, **model):
    f = autoencoder.build(
        Context(image, 0, sgd(0.1, accumulate, newest=0.5)), corruption=corruption, **{**SMALL, **model}
    )
    names = ('init', 'update', 'sample', 'evaluate', 'encode', 'decode')
    return f._replace(**{name: jax.jit(getattr(f, name)) for name in names})


def images(n: int = 4, seed: int = 0, image=(8, 4, 3)) -> dict:
    x = jax.random.uniform(jax.random.key(seed), (n, *image), minval=-1, maxval=1)
    return {'image': x, 'index': jnp.arange(n, dtype=jnp.int32)}


def test_without_corruption():
    f, batch = family(), images()
    state = jax.jit(f.init)(KEY, batch, {})
    after, logs = f.update(state, {}, batch, KEY)
    z = f.encode(state, {}, batch, KEY)
    assert z.shape[1:] == f.latents.shape == (4, 2, 3) and f.conditions == () and f.trajectory is None
    again = f.decode(state, {}, {}, z, KEY)
    metrics = f.evaluate(state, {}, batch, KEY)
    assert set(metrics) == {'squared_error'}
    np.testing.assert_allclose(metrics['squared_error'], jnp.square(again - batch['image']).mean((1, 2, 3)), rtol=1e-4)
    keys = [jax.random.fold_in(KEY, i) for i in (7, 2)]
    noise = jnp.stack([jax.random.normal(key, f.latents.shape) for key in keys])
    drawn = f.sample(state, {}, {'index': jnp.array([7, 2])}, KEY)
    np.testing.assert_allclose(drawn, f.decode(state, {}, {}, noise, KEY), atol=1e-5)
    # No randomness: parts of a batch give the same step.
    parts = family(accumulate=2)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        parts.update(state, {}, batch, KEY)[0],
        after,
    )
    assert logs['loss'] == pytest.approx(float(metrics['squared_error'].mean()), rel=1e-3)


@pytest.mark.parametrize('corruption', ['noise', 'low_resolution', 'grey', 'mask'])
def test_with_corruption(corruption):
    """The clean image is the target, the corrupted one the only input; the example's key corrupts it."""
    f, batch = family(corruption, hole=2, noise=0.4), images(6)
    assert f.conditions == ('image',)
    state = jax.jit(f.init)(KEY, batch, {})
    metrics = f.evaluate(state, {}, batch, KEY)
    x = batch['image']

    def corrupted(keys):
        """The network's input, and the restored image by its output `out`."""
        if corruption == 'noise':
            return x + 0.4 * jax.vmap(lambda key: jax.random.normal(key, (8, 4, 3)))(keys), lambda out: out
        if corruption == 'mask':
            unknown = np.asarray(corruptions.holes(keys, (8, 4), 2))
            return x * ~unknown, lambda out: np.where(unknown, out, x)
        simple = corruptions.grey if corruption == 'grey' else lambda x: corruptions.low_resolution(x, 2)
        return simple(x), lambda out: out + simple(x) - simple(out)

    inputs, restored_by = corrupted(jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(6)))
    np.testing.assert_allclose(metrics['squared_error/input'], jnp.square(inputs - x).mean((1, 2, 3)), rtol=1e-4)
    out = f.decode(state, {}, {}, f.encode(state, {}, {'image': inputs}, KEY), KEY)  # these two corrupt nothing
    assert np.abs(out).max() < 1, 'nothing was clipped'
    restored = np.clip(restored_by(out), -1, 1)
    np.testing.assert_allclose(f.sample(state, {}, batch, KEY), restored, atol=1e-5)
    np.testing.assert_allclose(jax.jit(f.trajectory)(state, {}, batch, KEY)['image'], [inputs, restored], atol=1e-5)
    np.testing.assert_allclose(metrics['squared_error'], np.square(restored - x).mean((1, 2, 3)), rtol=1e-4)
    moved = f.sample(state, {}, {**batch, 'index': batch['index'] + 1}, KEY)
    assert (np.abs(moved - restored).max() > 1e-3) == (corruption in ('noise', 'mask'))

    inputs, restored_by = corrupted(jax.random.split(KEY, 6))
    out = f.decode(state, {}, {}, f.encode(state, {}, {'image': inputs}, KEY), KEY)
    _, logs = f.update(state, {}, batch, KEY)
    assert logs['loss'] == pytest.approx(float(jnp.square(restored_by(out) - x).mean()), rel=1e-4)


def test_what_is_known_stays():
    """Means of squares and luma of the restored image are those of the input, whatever the decoder's output."""
    x, out = images()['image'], images(seed=1)['image']
    for simple in (corruptions.grey, lambda x: corruptions.low_resolution(x, 2)):
        np.testing.assert_allclose(simple(out + simple(x) - simple(out)), simple(x), atol=1e-5)


@pytest.mark.parametrize('model', [
    dict(corruption='blur'), dict(corruption='noise', noise=0.0), dict(corruption='low_resolution', factor=5),
    dict(corruption='low_resolution', factor=1), dict(corruption='grey', image=(8, 8, 1)), dict(halvings=0),
    dict(corruption='mask', hole=0), dict(corruption='mask', hole=9), dict(halvings=4), dict(latent=0), dict(width=1),
])  # fmt: skip
def test_says_what_is_wrong(model):
    with pytest.raises(UserError, match=r'config\.') as error:
        family(**{'image': (8, 8, 3), **model})
    assert '\n' not in str(error.value)
