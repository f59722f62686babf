"""Captions: words by their hashes against whole numbers, the text encoder against torch on the same weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import path

from jaxgen import config as configs
from jaxgen.data import captions, shapes
from jaxgen.networks.text import TextEncoder, word_numbers

N, T, D = 3, 5, 4  # captions, words, features
MASK = np.arange(T) < np.array([[T], [3], [1]])


def randomised(tree, seed: int = 1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(0.3 * rng.normal(size=a.shape) + 0.6 * (a.ndim == 1), jnp.float32), tree)


def encoded(*texts: str) -> np.ndarray:
    return np.stack([shapes.encode_caption(text) for text in texts])


def number(word: bytes, numbers: int) -> int:
    """The hash in whole numbers, byte by byte."""
    total = sum(b * 16_777_619 ** (i + 1) for i, b in enumerate(word)) % 2**32
    total = (total ^ total >> 16) * 0x85EBCA6B % 2**32
    return 1 + (total ^ total >> 13) % (numbers - 1)


def test_words_have_numbers():
    texts = ('a Small red heart', ' a_b,  c3; Über-große (x)', '', 'one two three four five six seven', 'x' * 64)
    rows = word_numbers(encoded(*texts), 6, 1000)
    for row, text in zip(rows, texts, strict=True):
        expected = [number(w, 1000) for w in captions.words(text.encode())][:6]
        assert row.tolist() == expected + [0] * (6 - len(expected))
    assert captions.words(texts[1].encode()) == [b'a_b', b'c3', 'Über'.encode(), 'große'.encode(), b'x']


def test_words_of_the_scenes_do_not_collide():
    numbers = configs.load(path('attngan_shapes', '')).model.words
    words = {*shapes.SHAPES, *shapes.COLOURS, *shapes.SIZES, *shapes.BACKGROUNDS, 'a', 'an', 'on', 'background'}
    hashed = word_numbers(encoded(*sorted(words)), 1, numbers)
    assert len(set(hashed[:, 0].tolist())) == len(words)


@pytest.mark.slow  # imports torch
def test_text_encoder_equals_torch():
    torch = pytest.importorskip('torch')
    network = TextEncoder(20, 6, D)
    words = jnp.asarray(np.where(MASK, np.arange(N * T).reshape(N, T) + 1, 0))
    params = randomised(jax.eval_shape(network.init, jax.random.key(0), words))['params']
    lstm = torch.nn.LSTM(6, D // 2, bidirectional=True, batch_first=True)
    with torch.no_grad():
        for name, suffix in (('forward', ''), ('backward', '_reverse')):
            weights = {
                'weight_ih': params[name]['input']['kernel'].T, 'weight_hh': params[name]['state'].T,
                'bias_ih': params[name]['bias'], 'bias_hh': jnp.zeros(2 * D),
            }  # fmt: skip
            for kind, value in weights.items():
                getattr(lstm, f'{kind}_l0{suffix}').copy_(torch.tensor(np.asarray(value)))
        x = torch.tensor(np.asarray(params['embedding'])[words])
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, MASK.sum(1), batch_first=True)
        states, (last, _) = lstm(packed)
        states = torch.nn.utils.rnn.pad_packed_sequence(states, batch_first=True)[0]
    of_words, sentence = network.apply({'params': params}, words)
    np.testing.assert_allclose(of_words, states, atol=1e-5)
    np.testing.assert_allclose(sentence, last.permute(1, 0, 2).reshape(N, D), atol=1e-5)
