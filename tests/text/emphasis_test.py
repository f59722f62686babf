"""Prompts with weights: how they are read, which tokens have them, and what text encoders' sequences become."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assemble, first_batch, tiny, with_tokenizers

from jaxgen import conditions, run
from jaxgen.data.captions import encoded
from jaxgen.diffusion import conditioning
from jaxgen.errors import UserError
from jaxgen.text import captions, emphasis, tokenizers


@pytest.mark.parametrize(('text', 'pieces'), [
    ('a red heart', [('a red heart', 1)]),
    ('a (red) heart', [('a ', 1), ('red', 1.1), (' heart', 1)]),
    ('((red))', [('red', 1.21)]),
    ('(red:1.3), [blue]', [('red', 1.3), (', ', 1), ('blue', 1 / 1.1)]),
    ('(a (red: 2) heart)', [('a ', 1.1), ('red', 2.2), (' heart', 1.1)]),
    (r'\(red\) \[1\] \\', [('(red) [1] \\', 1)]),
    ('at 10:30) and ]', [('at 10:30) and ]', 1)]),
    ('open (to [the end', [('open ', 1), ('to ', 1.1), ('the end', 1)]),
    ('(cloud:-0.5)', [('cloud', -0.5)]),
    ('', []),
])  # fmt: skip
def test_marks_are_read(text, pieces):
    plain, weights = emphasis.parsed(text)
    assert plain == ''.join(piece for piece, _ in pieces)
    np.testing.assert_allclose(weights, [w for piece, w in pieces for _ in piece], rtol=1e-6)


def test_tokens_have_the_weights_of_their_words():
    """Start, end and padding have 1; a token that is left out has none."""
    made = tokenizers.train(['a red heart and a blue ring'] * 50, 600, 8)
    plain, characters = emphasis.parsed('a (red:2) [heart]')
    np.testing.assert_allclose(made.weights(plain, characters), [1, 1, 2, 1 / 1.1, 1, 1, 1, 1], rtol=1e-6)
    plain, characters = emphasis.parsed('(a red heart and a blue ring a:3)')
    np.testing.assert_allclose(made.weights(plain, characters), [1, 3, 3, 3, 3, 3, 3, 1])
    batch = {'caption': encoded(['a (red:2)', 'a [red]'])}
    out = captions.tokenised(batch, {'text/tokens': made}, negatives=True, weighted=True)
    np.testing.assert_allclose(out['text/weights'][:, :4], [[1, 1, 2, 1], [1, 1, 1 / 1.1, 1]], rtol=1e-6)
    np.testing.assert_array_equal(out['text/tokens'], made(['a red', 'a red']).ids)
    assert (out['text/negative_weights'] == 1).all()
    literal = captions.tokenised(batch, {'text/tokens': made}, negatives=True)
    np.testing.assert_array_equal(literal['text/tokens'], made(['a (red:2)', 'a [red]']).ids)
    assert 'text/weights' not in literal


def test_sequences_are_multiplied_and_their_mean_restored():
    rng = np.random.default_rng(0)
    z, pooled, weights = rng.normal(2, 1, (2, 3, 5)), rng.normal(size=(2, 5)), rng.uniform(0.5, 2, (2, 3))
    outputs = {'text/last': jnp.asarray(z), 'text/embedding': jnp.asarray(pooled), 'text_2/last': jnp.asarray(z)}
    found = conditioning.weighted(outputs, {'text/weights': jnp.asarray(weights)}, 'weights')
    wanted = z * weights[..., None]
    wanted = [one * before.mean() / one.mean() for one, before in zip(wanted, z, strict=True)]
    np.testing.assert_allclose(found['text/last'], wanted, rtol=1e-5)
    np.testing.assert_array_equal(found['text/embedding'], outputs['text/embedding'])
    np.testing.assert_array_equal(found['text_2/last'], outputs['text_2/last'])


@pytest.mark.slow
def test_a_run_reads_weights():
    """Where they are all 1 the condition is that of the plain text; else another one."""
    config = tiny('ldm_text_shapes', model=dict(editing=dict(weighted_prompts=True)))
    a = assemble(config)

    def batch(text):
        return conditions.first(a, config, 1, {'caption': text})

    ids = [batch(text)['text/tokens'] for text in ('a red heart', 'a (red:1.0) heart', 'a (red:1.5) heart')]
    np.testing.assert_array_equal(ids[0], ids[1])
    np.testing.assert_array_equal(ids[0], ids[2])
    assert (batch('a (red:1.0) heart')['text/weights'] == 1).all()
    assert batch('a (red:1.5) heart')['text/weights'].max() == 1.5
    plain = dataclasses.replace(a, family=a.family._replace(captions=a.family.captions._replace(weighted=False)))
    with_tokenizers(plain)
    rng = np.random.default_rng(0)
    state = jax.eval_shape(a.family.init, jax.random.key(0), first_batch(config), a.frozen)
    state = jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), state)
    r = run.Run('nowhere', config, a, state, 'ema')
    texts = ['a red heart', 'a (red:1.0) heart', 'a (red:1.5) heart']
    y = [r.sample(1, condition={'caption': text}) for text in texts]
    np.testing.assert_array_equal(y[0], y[1])
    assert (y[0] != y[2]).any()
    without = r.sample(1, condition={'caption': 'a blue ring', 'negative_caption': 'a red heart'})
    assert (without != r.sample(1, condition={'caption': 'a blue ring', 'negative_caption': 'a (red:2) heart'})).any()
    assert 'text/weights' not in conditions.first(plain, config, 1, {'caption': 'a (red:1.5) heart'})


def test_models_without_text_encoders_have_no_weights(no_compile):
    with pytest.raises(UserError, match='weighted_prompts is of text encoders'):
        assemble(tiny('ddpm_digits', model=dict(editing=dict(weighted_prompts=True))))
