"""Conditions: arrays of another kind than their condition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.contract import NEGATIVE, Context, Family
from jaxgen.diffusion import conditioning as conditions
from jaxgen.errors import UserError
from jaxgen.networks.clip import TextOutput
from jaxgen.networks.latent_unet import LatentUNet
from jaxgen.networks.unet import UNet


@pytest.mark.parametrize(
    ('kind', 'dtype', 'shape'),
    [('class', 'float32', (2,)), ('embedding', 'int32', (2,)), ('tokens', 'int32', (2, 3)),
     ('image', 'float32', (2, 5)),
     ('words', 'float32', (2, 3)), ('mask', 'int32', (2,))],
)  # fmt: skip
def test_arrays_of_another_kind(kind, dtype, shape):
    one = conditions.Condition('c', 'vector', None, conditions.same, jnp.zeros_like, 0.0, kind=kind)
    with pytest.raises(UserError, match=r'config\.model\.conditioning\.c of kind'):
        conditions.init((one,), jax.random.key(0), {'c': jnp.zeros(shape, dtype)})


def reader(width):
    """A text encoder whose outputs are its tokens times numbers of its weights."""

    def encode_text(state, frozen, tokens):
        each = tokens[..., None] * state['w'][:width]
        return TextOutput(each, 2 * each, 3 * each, each[:, -1], 5 * each[:, -1])

    return Family(None, None, None, None, encode_text=encode_text)


TOKENS = {'text': np.array([[1, 2, 3], [4, 5, 6]]), 'text_2': np.array([[7, 8], [9, 1]])}
NEGATIVES = {'text': np.array([[1, 0, 0], [1, 9, 0]]), 'text_2': np.array([[3, 3], [2, 2]])}
FROZEN = {name: ({'w': jnp.arange(1.0, 5)}, None) for name in TOKENS}


def text_batch(has_negative=(False, True)):
    batch = {f'{name}/tokens': jnp.asarray(x) for name, x in TOKENS.items()}
    batch |= {f'{name}/negative': jnp.asarray(x) for name, x in NEGATIVES.items()}
    return batch | {NEGATIVE: jnp.asarray(has_negative), 'image': jnp.zeros((2, 4, 4, 3))}


def text_conditioning(network, **fields):
    context = Context((4, 4, 3), 0, None, stages={'text': reader(2), 'text_2': reader(4)})
    usual = dict(tokens=('text/before', 'text_2/last'), pooled=('text/embedding',), empty='encoded', dropout=0.5)
    return conditions.make({'caption': {'kind': 'text', **usual, **fields}}, context, network)


def by_hand(tokens, n):
    """Tokens and pooled of the above."""
    first = 2 * tokens['text'][..., None] * np.arange(1.0, 3)
    second = tokens['text_2'][..., None] * np.arange(1.0, 5)
    wide = np.concatenate([first, np.zeros((n, 3, 2))], -1)
    return np.concatenate([wide, second], 1), 5 * tokens['text'][:, -1:] * np.arange(1.0, 3)


def test_a_caption_is_what_text_encoders_make_of_it():
    conditioning = text_conditioning(LatentUNet())
    values = conditions.values_of(conditioning, text_batch(), FROZEN)
    for absent, tokens in ((False, TOKENS), (True, NEGATIVES)):
        chosen = conditions.without(conditioning, values, 'caption') if absent else values
        made = conditions.embed(conditioning, {}, chosen, jnp.zeros((2, 4, 4, 3)))
        for ours, right in zip((made['tokens'], made['pooled']), by_hand(tokens, 2), strict=True):
            np.testing.assert_array_equal(ours, right)


def test_prepared_texts_are_those_of_the_tokens():
    conditioning = text_conditioning(LatentUNet())
    prepared = conditions.prepare(conditioning)(FROZEN, text_batch())
    assert sorted(prepared) == ['text/before', 'text/embedding', 'text_2/last']
    batch = {name: x for name, x in text_batch().items() if not name.endswith('/tokens')} | prepared
    values = (conditions.values_of(conditioning, b, FROZEN) for b in (batch, text_batch()))
    jax.tree.map(np.testing.assert_array_equal, *values)


def test_no_caption_is_zeros_where_there_is_no_negative_prompt():
    conditioning = text_conditioning(LatentUNet(), empty='zeros')
    absent = conditions.values_of(conditioning, text_batch(), FROZEN)['caption']['absent']
    right = [x * np.array([0, 1]).reshape(-1, *[1] * (x.ndim - 1)) for x in by_hand(NEGATIVES, 2)]
    np.testing.assert_array_equal(absent['tokens'], right[0])
    np.testing.assert_array_equal(absent['pooled'], right[1])


def test_a_dropped_caption_is_dropped_in_all_its_parts():
    conditioning = text_conditioning(LatentUNet())
    batch = {name: jnp.repeat(x, 50, 0) for name, x in text_batch((False, False)).items()}
    values = conditions.values_of(conditioning, batch, FROZEN, train=True)
    dropped = conditions.drop(conditioning, jax.random.key(0), values)['caption']
    empty = by_hand({name: x[:1] for name, x in NEGATIVES.items()}, 1)
    gone = [(dropped[p] == e).reshape(100, -1).all(1) for p, e in zip(('tokens', 'pooled'), empty, strict=True)]
    assert 30 < gone[0].sum() < 70
    np.testing.assert_array_equal(gone[0], gone[1])
    kept = np.repeat(by_hand(TOKENS, 2)[0], 50, 0)
    np.testing.assert_array_equal(np.asarray(dropped['tokens'])[~gone[0]], kept[~gone[0]])


def test_networks_that_read_a_vector_get_a_linear_map_of_the_pooled_text():
    conditioning = text_conditioning(UNet(channels=8), tokens=())
    values = conditions.values_of(conditioning, text_batch(), FROZEN)
    params = conditions.init(conditioning, jax.random.key(0), values)
    made = conditions.embed(conditioning, params, values, jnp.zeros((2, 4, 4, 3)))
    linear = params['caption']['pooled']
    np.testing.assert_allclose(made['vector'], by_hand(TOKENS, 2)[1] @ linear['kernel'] + linear['bias'], rtol=1e-6)
    assert set(made) == {'vector'}


@pytest.mark.parametrize(
    ('fields', 'message'),
    [(dict(tokens=('text',)), 'write STAGE/OUTPUT'), (dict(tokens=('text/first',)), 'write STAGE/OUTPUT'),
     (dict(tokens=('text_4/last',)), 'needs config.stages.text_4'), (dict(tokens=(), pooled=()), 'both empty')],
)  # fmt: skip
def test_texts_of_no_encoder(fields, message):
    with pytest.raises(UserError, match=message):
        text_conditioning(LatentUNet(), **fields)


def test_a_network_without_tokens():
    with pytest.raises(UserError, match='is embedded as tokens'):
        text_conditioning(UNet(channels=8))
