"""Adapters: what they add, and runs of them."""

from __future__ import annotations

import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from support import assert_same, context, main, metrics, path

import jaxgen
from jaxgen import config as configs
from jaxgen import data, library, merging, sample
from jaxgen.contract import Family
from jaxgen.diffusion import adapters
from jaxgen.errors import UserError
from jaxgen.families import diffusion

RNG = np.random.default_rng(0)


def drawn(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def test_a_low_rank_product_is_added_to_a_dense_kernel():
    kernel, down, up = drawn(5, 7), drawn(5, 2), drawn(2, 7)
    made = adapters.with_lora({'out': {'kernel': kernel}}, [({'out': {'down': down, 'up': up}}, 0.5)])
    np.testing.assert_allclose(made['out']['kernel'], kernel + 0.5 * down @ up, rtol=1e-5, atol=1e-6)


def test_queries_keys_and_values_of_each_block_have_their_own():
    kernel, down, up = drawn(2, 4, 9), drawn(2, 3, 4, 1), drawn(2, 3, 1, 3)
    made = adapters.with_lora({'qkv': {'kernel': kernel}}, [({'qkv': {'down': down, 'up': up}}, 1.0)])
    for block in range(2):
        parts = [kernel[block, :, 3 * j : 3 * j + 3] + down[block, j] @ up[block, j] for j in range(3)]
        np.testing.assert_allclose(made['qkv']['kernel'][block], np.concatenate(parts, 1), rtol=1e-5, atol=1e-6)


def test_of_a_convolution_it_is_one_to_the_rank_and_one_by_one():
    def convolved(x, kernel):
        numbers = ('NHWC', 'HWIO', 'NHWC')
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=numbers)

    x, kernel, down, up = drawn(2, 6, 5, 3), drawn(3, 3, 3, 4), drawn(3, 3, 3, 2), drawn(2, 4)
    made = adapters.with_lora({'first': {'kernel': kernel}}, [({'first': {'down': down, 'up': up}}, 2.0)])
    right = convolved(x, kernel) + 2 * convolved(convolved(x, down), up[None, None])
    np.testing.assert_allclose(convolved(x, made['first']['kernel']), right, rtol=1e-4, atol=1e-4)


NETWORK = {
    'blocks': {
        'qkv': {'kernel': jnp.zeros((2, 4, 12)), 'bias': jnp.zeros((2, 12))},
        'mlp1': {'kernel': jnp.zeros((2, 4, 8))},
    },
    'last': {'kernel': jnp.zeros((3, 3, 4, 1))},
}  # fmt: skip


@pytest.mark.parametrize(
    ('patterns', 'paths'),
    [
        (adapters.ATTENTION, ['blocks/qkv']),
        (('*',), ['blocks/qkv', 'blocks/mlp1', 'last']),
        (('blocks/m*',), ['blocks/mlp1']),
    ],
)
def test_layers_are_named_by_patterns(patterns, paths):
    assert [layer.path for layer in adapters.chosen(NETWORK, patterns)] == paths


def test_a_pattern_of_no_layer():
    with pytest.raises(UserError, match="no layer is named 'attn'; their names end in last, mlp1, qkv"):
        adapters.chosen(NETWORK, ('qkv', 'attn'))


def test_it_adds_nothing_before_the_first_update():
    frozen = {'base': (jaxgen.contract.State(0, None, None, {'denoiser': NETWORK}), {})}
    made = adapters.init(jax.random.key(0), NETWORK, frozen, {'layers': ('*',), 'rank': 2})
    assert made['blocks']['qkv']['down'].shape == (2, 3, 4, 2)
    assert made['last']['up'].shape == (2, 1)
    assert_same(adapters.with_lora(NETWORK, [(made, 1.0)]), NETWORK)


def model_of(**changes) -> dict:
    return configs.make(family='diffusion', model=changes).model.to_dict()


def test_a_base_of_another_model_is_named():
    model, other = model_of(), model_of(network={'channels': 16})
    family = Family(None, None, None, None, config=json.dumps({'family': 'diffusion', 'model': other}))
    own = {'name': 'lora', 'rank': 4, 'alpha': 0.0}
    with pytest.raises(UserError, match=r'network\.channels = \d+ here, 16 there; --config=RUN:lora'):
        adapters.bind(context(stages={'base': family}), model, own, {})
    with pytest.raises(UserError, match=r'needs config\.stages\.base'):
        adapters.bind(context(), model, own, {})
    with pytest.raises(UserError, match=r'config\.model\.adapters\.a needs config\.stages\.a'):
        adapters.bind(context(), model, {'name': 'none'}, {'a': {'scale': 1.0}})


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """A folder with the tiny run `base` and `lora`, trained on it."""
    folder = tmp_path_factory.mktemp('runs')
    library.train(configs.load(path('ddpm_digits')), folder / 'base')
    changes = {'data.source': 'digits', 'data.batch': 8, 'train.steps': 4, 'train.save_every': 2, 'optim.lr': 0.1}
    changes |= {'train.log_every': 1, 'train.sample_every': 0, 'model.adapter.layers': ('*',), 'sample.batch': 4}
    config = library.config(f'{folder}/base:lora', **changes)
    library.train(config, folder / 'lora')
    return folder, config


@pytest.mark.slow
def test_lora_of_a_run(runs, tmp_path):
    folder, _ = runs
    base, lora = jaxgen.load(folder / 'base'), jaxgen.load(folder / 'lora')
    assert set(lora.state.ema) == {'lora'}
    of_base, of_lora = base.sample(4), lora.sample(4)
    assert (of_base != of_lora).any()
    np.testing.assert_array_equal(lora.sample(4, **{'adapters.own.scale': 0.0}), of_base)
    # Sampled from the base, several at once, and scales that compile nothing.
    fields = {'stages': {'a': str(folder / 'lora'), 'b': str(folder / 'lora')}, 'model.adapters.b.scale': 0.0}
    both = jaxgen.load(folder / 'base', config=fields)
    np.testing.assert_array_equal(both.sample(4), of_lora)
    halves = both.with_sampling(adapters={'a': {'scale': 0.5}, 'b': {'scale': 0.5}})
    assert sample.program(halves.assembled.family) is sample.program(both.assembled.family)
    weights = [run.assembled.family.merged[0](run.state, run.assembled.frozen) for run in (halves, lora)]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), *weights)
    # Merged.
    half = lora.with_sampling(adapters={'own': {'scale': 0.5}})
    merging.merge(half, str(tmp_path / 'merged'))
    merged = jaxgen.load(tmp_path / 'merged')
    assert not merged.config.stages
    np.testing.assert_array_equal(merged.sample(4), half.sample(4))


@pytest.mark.slow
def test_an_interrupted_lora_is_the_uninterrupted_one(runs, tmp_path):
    folder, config = runs
    for steps in (2, 4):
        library.train(library.config(config, **{'train.steps': steps}), tmp_path / 'again')
    assert_same(jaxgen.load(tmp_path / 'again').state.ema, jaxgen.load(folder / 'lora').state.ema)
    assert metrics(tmp_path / 'again') == metrics(folder / 'lora')


@pytest.mark.slow
def test_mistakes_in_a_command(runs, tmp_path):
    folder, _ = runs
    for arguments, message in (
        ((f'--config={folder}/base:lora',), "config.data.source = 'folder:' must name a directory"),
        ((f'--config={folder}/base:lara', '--config.data.source=digits'), "no variant 'lara'; did you mean lora?"),
        ((f'--config={folder}/lora:lora', '--config.data.source=digits'), 'is the run of an adapter'),
        (('--mode=merge', f'--workdir={folder}/base', f'--to={tmp_path}/m'), 'has no adapters'),
    ):
        done = main(*arguments, f'--workdir={tmp_path}/run') if '--mode=merge' not in arguments else main(*arguments)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr.splitlines()[-1]
    assert not os.path.exists(tmp_path / 'run' / 'checkpoints')


def test_captions_that_all_examples_have_alike(tmp_path):
    for i in range(5):
        Image.fromarray(RNG.integers(0, 255, (9, 9), np.uint8)).save(tmp_path / f'{i}.png')
    fields = {
        'source': f'folder:{tmp_path}',
        'features': ('image', 'caption', 'other'),
        'other': 'shapes',
        'size': 8,
        'batch': 3,
    }
    fields |= {'prompt': 'a sks digit', 'other_prompt': 'a digit', 'test_fraction': 0.0}
    batch = next(iter(data.batches(fields, 'train', seed=0)))
    for name, text in (('caption', b'a sks digit'), ('other_caption', b'a digit')):
        assert [bytes(x) for x in batch[name]] == 3 * [text]
        assert data.spec(fields).features[name].shape == batch[name].shape[1:]
    assert batch['other'].shape == (3, 8, 8, 1)
    own = data.dataset({'source': 'shapes', 'size': 8, 'channels': 1, 'features': ('image', 'caption')}, 'train')
    pairs = {own[i]['image'].tobytes(): bytes(own[i]['caption']) for i in range(len(own))}
    fields |= {'features': (*fields['features'], 'other_caption')}
    fixed = next(iter(data.batches(fields, 'train', seed=0)))
    assert all((fixed[name] == x).all() for name, x in batch.items())
    batch = next(iter(data.batches({**fields, 'other_prompt': ''}, 'train', seed=0)))
    assert [bytes(x) for x in batch['other_caption']] == [pairs[x.tobytes()] for x in batch['other']]
    assert bytes(batch['caption'][0]) == b'a sks digit'
    assert len(data.dataset(fields, 'train')) == 5  # nothing is held out
    with pytest.raises(UserError, match='no test examples'):
        data.dataset(fields, 'test')


def test_other_images_have_a_loss_of_their_own():
    own = {'image': 1, 'text/tokens': 2, 'has_negative': 3}
    others = {'other': 4, 'other/text/tokens': 5}
    assert diffusion.with_others(own) == (own, {})
    assert diffusion.with_others(own | others) == (own, {'image': 4, 'text/tokens': 5, 'has_negative': 3})


@pytest.mark.slow
def test_fine_tuning_starts_from_a_run_and_keeps_its_class(runs, tmp_path):
    folder, _ = runs
    changes = {'data.source': 'digits', 'data.batch': 8, 'data.features': ('image', 'other'), 'data.other': 'shapes'}
    changes |= {'train.log_every': 1, 'train.sample_every': 0, 'train.save_every': 1, 'optim.lr': 1e-8}
    config = library.config(f'{folder}/base:full', **changes)
    one = library.train(library.config(config, **{'train.steps': 1}), tmp_path / 'run')
    base = jaxgen.load(folder / 'base')
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6)
    jax.tree.map(close, one.state.ema, base.state.ema)
    library.train(library.config(config, **{'train.steps': 2}), tmp_path / 'run')
    library.train(library.config(config, **{'train.steps': 2}), tmp_path / 'whole')
    runs_of_two = [jaxgen.load(tmp_path / name) for name in ('run', 'whole')]
    assert_same(*(run.state.ema for run in runs_of_two))
    (first, _) = metrics(tmp_path / 'whole')
    assert first['loss_others'] > 0
    assert not runs_of_two[0].config.stages  # it stands on its own
