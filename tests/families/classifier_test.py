"""The classifier: its loss against a slow oracle, its heads, and that it learns."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits
from support import optimiser

from jaxgen.contract import Context
from jaxgen.errors import UserError
from jaxgen.families import classifier

slow = pytest.mark.slow  # compiles networks or trains

SMALL = dict(width=4, levels=1, features=6)
COUNTS = (3, 2, 5)


def family(image=(8, 8, 1), classes=4, tx=None, **model):
    f = classifier.build(Context(image, classes, optimiser(tx or optax.sgd(0.1))), **{**SMALL, **model})
    return f._replace(
        **{name: jax.jit(getattr(f, name)) for name in ('init', 'update', 'evaluate', 'encode', 'classify')}
    )


def batch(n: int = 5, image=(8, 8, 1), seed: int = 0) -> dict:
    """Images, labels of 4 classes, and factors of COUNTS."""
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        'image': jax.random.uniform(keys[0], (n, *image), minval=-1, maxval=1),
        'label': jax.random.randint(keys[1], (n,), 0, 4),
        'factors': jax.random.randint(keys[2], (n, len(COUNTS)), 0, jnp.array(COUNTS)),
    }


def slow_entropy(logits: np.ndarray, label: int, smoothing: float = 0.0) -> float:
    """Cross-entropy of one example, number by number."""
    p = np.exp(np.float64(logits))
    p /= p.sum()
    target = [smoothing / len(p) + (1 - smoothing) * (k == label) for k in range(len(p))]
    return -sum(w * np.log(q) for w, q in zip(target, p, strict=True))


def logits_of(f, state, data) -> np.ndarray:
    """All logits, from the features by the last layer alone."""
    last = state.ema['classifier']['logits']
    return np.asarray(f.encode(state, {}, {'image': data['image']}, None) @ last['kernel'] + last['bias'])


@slow
def test_label_head():
    f, data = family(dropout=0.0, smoothing=0.3), batch()
    state = jax.jit(f.init)(jax.random.key(0), data, {})
    logits = logits_of(f, state, data)
    assert logits.shape == (5, 4)
    np.testing.assert_allclose(f.classify(state, {}, {'image': data['image']}, None), logits, atol=1e-5)
    metrics = f.evaluate(state, {}, data, jax.random.key(1))
    expected = [slow_entropy(x, k) for x, k in zip(logits, data['label'], strict=True)]
    np.testing.assert_allclose(metrics['cross_entropy'], expected, rtol=1e-5, err_msg='measured without smoothing')
    np.testing.assert_array_equal(metrics['accuracy'], logits.argmax(-1) == data['label'])
    _, logs = f.update(state, {}, data, jax.random.key(2))
    expected = [slow_entropy(x, k, 0.3) for x, k in zip(logits, data['label'], strict=True)]
    np.testing.assert_allclose(logs['loss'], np.mean(expected), rtol=1e-5, err_msg='trained with it')


@slow
def test_heads_of_factors():
    f, data = family(target='factors', counts=COUNTS, classes=0), batch()
    state = jax.jit(f.init)(jax.random.key(0), data, {})
    parts = np.split(logits_of(f, state, data), [3, 5], -1)
    assert [p.shape[-1] for p in parts] == list(COUNTS)
    np.testing.assert_allclose(f.classify(state, {}, {'image': data['image']}, None), parts[0], atol=1e-5)
    metrics = f.evaluate(state, {}, data, jax.random.key(1))
    expected = [sum(slow_entropy(p[i], data['factors'][i, j]) for j, p in enumerate(parts)) for i in range(5)]
    np.testing.assert_allclose(metrics['cross_entropy'], expected, rtol=1e-5)
    correct = np.stack([p.argmax(-1) for p in parts], -1) == data['factors']
    np.testing.assert_allclose(metrics['accuracy'], correct.mean(-1), rtol=1e-6)
    for j in range(3):
        np.testing.assert_array_equal(metrics[f'accuracy/{j}'], correct[:, j])


@slow
def test_dropout_is_of_training_alone():
    f, data = family(dropout=0.5), batch()
    state = jax.jit(f.init)(jax.random.key(0), data, {})
    one, two = (f.update(state, {}, data, jax.random.key(i))[1]['loss'] for i in (1, 2))
    assert one != two
    again = [f.encode(state, {}, {'image': data['image']}, jax.random.key(i)) for i in (1, 2)]
    np.testing.assert_array_equal(*again)
    assert again[0].shape == (5, 6) and again[0].dtype == jnp.float32


@slow
def test_an_example_stands_alone():
    f, data = family(stride=2), batch()
    state = jax.jit(f.init)(jax.random.key(0), data, {})
    alone = f.encode(state, {}, {'image': data['image'][2:3]}, None)
    np.testing.assert_allclose(f.encode(state, {}, data, None)[2:3], alone, atol=1e-5)


@slow
def test_learns_digits():
    digits = load_digits()
    data = {'image': jnp.float32(digits.images[..., None] / 8 - 1), 'label': jnp.int32(digits.target)}
    train, test = ({k: v[i::2] for k, v in data.items()} for i in (0, 1))
    f = family(classes=10, width=8, features=32, tx=optax.adam(5e-3))
    state = jax.jit(f.init)(jax.random.key(0), train, {})

    @jax.jit
    def learn(state, rng):
        def one(state, rng):
            chosen = jax.random.choice(rng, len(train['image']), (64,))
            return f.update(state, {}, {k: v[chosen] for k, v in train.items()}, rng)

        return jax.lax.scan(one, state, jax.random.split(rng, 80))[0]

    state = learn(state, jax.random.key(1))
    assert f.evaluate(state, {}, test, None)['accuracy'].mean() > 0.9
    features = f.encode(state, {}, {'image': test['image']}, None)
    assert (features.var(0) > 1e-3).all(), 'a feature is constant'


@pytest.mark.parametrize('model', [
    dict(classes=0), dict(target='index'), dict(target='factors'), dict(target='factors', counts=(3, 0)),
    dict(width=0), dict(features=0), dict(levels=-1), dict(levels=4), dict(stride=0), dict(stride=3),
    dict(dropout=1.0), dict(smoothing=-0.1),
])  # fmt: skip
def test_says_what_is_wrong(model):
    with pytest.raises(UserError, match=r'config\.') as error:
        family(**model)
    assert '\n' not in str(error.value)


def test_says_what_the_batch_lacks():
    def start(f, *names):
        with pytest.raises(UserError, match=r'config\.') as error:
            jax.eval_shape(f.init, jax.random.key(0), {k: v for k, v in batch().items() if k in names}, {})
        return str(error.value)

    assert "hold 'factors'" in start(family(target='factors', counts=COUNTS), 'image', 'label')
    assert '4 numbers' in start(family(target='factors', counts=(3, 2, 5, 2)), 'image', 'factors')
