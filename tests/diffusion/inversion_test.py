"""Textual inversion: new words in tokenizers and text encoders, and runs of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_same, context, path, train_stages

import jaxgen
from jaxgen import conditions, directory, library
from jaxgen import config as configs
from jaxgen.diffusion import adapters, inversion
from jaxgen.errors import UserError
from jaxgen.networks.clip import TextTower
from jaxgen.text import tokenizers

TEXTS = [f'a {a} {b} on a mat' for a in ('red', 'blue') for b in ('heart', 'star')]


def test_a_word_is_so_many_tokens_of_a_text():
    plain = tokenizers.train(TEXTS, 540, 12)
    made = plain.with_word('<Zig>', (700, 701)).with_word('zag', (702,))
    (one, two), (with_word, without) = (
        plain(['a red heart', 'zagreb']).ids,
        made(['a <zig> red ZAG heart', 'zagreb']).ids,
    )
    start, a, red, heart, end = one[:5]
    assert with_word.tolist() == [start, a, 700, 701, red, 702, heart] + 5 * [end]
    assert without.tolist() == two.tolist()  # within a word it is none
    assert made(['<zig> <zig> <zig> <zig> <zig> <zig> <zig>']).cut == 1
    text = 'a <zig> red'
    weights = made.weights(text, np.arange(len(text), dtype=np.float32))
    assert weights.tolist() == [1, 0, 6, 6, 10] + 7 * [1]
    assert made.with_length(5).rest('a <zig> red heart') == 'red heart'
    for word in ('heart', '<|endoftext|>', '<zig>'):
        with pytest.raises(UserError, match='is a word of the tokenizer already'):
            made.with_word(word, (3,))


@pytest.mark.slow
def test_rows_behind_the_table_of_a_text_encoder():
    """As of an encoder whose table has them."""
    options = dict(length=6, channels=8, blocks=2, heads=2, features=4)
    small, large = TextTower(vocabulary=20, end=19, **options), TextTower(vocabulary=23, end=19, **options)
    tokens = jnp.array([[18, 3, 21, 20, 19, 19], [18, 22, 1, 19, 19, 19]])
    params = large.init(jax.random.key(0), tokens)['params']
    table = params['tokens']['embedding']
    cut = {**params, 'tokens': {'embedding': table[:20]}}
    right = large.apply({'params': params}, tokens)
    for module in (small, TextTower(vocabulary=20, **options)):  # also where a text ends at its largest number
        assert_same(module.apply({'params': cut}, tokens, added=table[20:]), right)

    def loss(added):
        return small.apply({'params': cut}, tokens, added=added).last.sum()

    def of_table(table):
        return large.apply({'params': {**params, 'tokens': {'embedding': table}}}, tokens).last.sum()

    np.testing.assert_allclose(jax.grad(loss)(table[20:]), jax.grad(of_table)(table)[20:], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """A folder with a tiny text-to-image run `ldm_text_shapes`, its stages, and `zig`, a word learned on it."""
    folder = tmp_path_factory.mktemp('runs')
    config = configs.load(path('inversion_shapes'))
    train_stages(config, folder)
    changes = {'train.steps': 4, 'train.save_every': 2, 'model.adapter.initial': 'a', 'optim.lr': 0.1}
    changes |= {f'stages.{name}': where for name, where in config.stages.items()}
    library.train(library.config(path('inversion_shapes'), **changes), folder / 'zig')
    return folder


@pytest.mark.slow
def test_it_begins_as_the_initial_word_and_nothing_else_is_learned(runs):
    run, base = jaxgen.load(runs / 'zig'), jaxgen.load(runs / 'ldm_text_shapes')
    rows = run.state.ema[adapters.INVERSION]
    table = run.assembled.frozen['text'][0].ema['text']['tokens']['embedding']
    assert set(run.state.ema) == {adapters.INVERSION} and rows['text'].shape == (2, table.shape[1])
    (first_row,) = run.assembled.tokenizers['text/tokens'].pieces('a')
    first = run.assembled.init(jax.random.key(0), first_of(run), run.assembled.frozen)
    np.testing.assert_array_equal(first.ema[adapters.INVERSION]['text'], np.tile(table[first_row], (2, 1)))
    assert (np.abs(np.asarray(rows['text']) - table[first_row]).max(1) > 0).all()
    known = {'caption': 'a red'}
    assert_same(run.sample(2, condition=known), base.sample(2, condition=known))
    staged = jaxgen.load(runs / 'ldm_text_shapes', config={'stages.thing': str(runs / 'zig')})
    new = {'caption': 'a zig', 'negative_caption': 'zig zig'}
    for one in (run, staged):  # what changes in samples is held against diffusers, see text_pipelines_test.py
        arrays = conditions.first(one.assembled, one.config, 1, new)
        assert arrays['text/tokens'][0, 2:4].tolist() == [len(table), len(table) + 1]
        assert arrays['text/negative'][0, 1:5].tolist() == 2 * [len(table), len(table) + 1]
    assert_same(staged.sample(2, condition=new), run.sample(2, condition=new))


def first_of(run):
    return {name: jnp.asarray(x[None]) for name, x in run.assembled.dataset('train')[0].items()}


@pytest.mark.slow
def test_mistakes(runs):
    stages = {f'stages.{name}': where for name, where in directory.saved_config(str(runs / 'zig')).stages.items()}

    def refused(message, **fields):
        with pytest.raises(UserError, match=message):
            library.train(library.config(path('inversion_shapes'), **stages, **fields), runs / 'wrong')

    refused('is a word of the tokenizer already', **{'model.adapter.word': 'a', 'data.prompt': 'a'})
    refused(r"initial = 'zigzag' is \d+ tokens", **{'model.adapter.initial': 'zigzag'})
    refused('no training caption has the word', **{'model.adapter.word': '<other>'})
    refused('is that of another of these runs', **{'stages.thing': str(runs / 'zig')})


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (
            {'word': 'a star'},
            r"config\.model\.adapter\.word must be one word without spaces, like '<zig>'; it is 'a star'",
        ),
        ({'word': ''}, 'must be one word without spaces'),
        ({'encoders': ('first',)}, "'first' is no text encoder of this model: text, text_2"),
    ],
)
def test_words_that_are_none(changes, message):
    texts = {'kind': 'text', 'tokens': ('text/last+text_2/last',), 'pooled': ('text_2/embedding',)}
    model = {'conditioning': {'caption': texts, 'label': {'kind': 'class'}}}
    adapter = {'name': 'inversion', 'word': '<zig>', 'vectors': 2, 'initial': '', 'encoders': ()}
    made = inversion.bind(context(), model, adapter)
    assert made.added == (('text', '<zig>', 2), ('text_2', '<zig>', 2)) and made.learned == '<zig>'
    with pytest.raises(UserError, match=message):
        inversion.bind(context(), model, adapter | changes)
    with pytest.raises(UserError, match='is of a model that reads captions'):
        inversion.bind(context(), {'conditioning': {}}, adapter)
