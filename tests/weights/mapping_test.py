"""Names and layouts of published weights: the table's language, and each source against the names of its state dict."""

from __future__ import annotations

import dataclasses
import json
import os
import re

import numpy as np
import pytest

from jaxgen import assembly
from jaxgen import config as configs
from jaxgen.errors import UserError
from jaxgen.networks.dit import position_embedding
from jaxgen.weights import mapping, published, sources
from jaxgen.weights.files import Tensor, Weights
from jaxgen.weights.importing import flat_shapes, other_fields, published_part
from jaxgen.weights.mapping import Layout, Table

# Names and shapes of state dicts of small networks of each source's own classes.
with open(os.path.join(os.path.dirname(__file__), 'names.json'), encoding='utf-8') as file:
    NAMES = json.load(file)


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: Tensor(a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()}


def test_convolution_dense_and_bias_have_the_layout_of_torch():
    rng = np.random.default_rng(0)
    theirs = {
        'conv.weight': rng.normal(size=(5, 3, 2, 4)),
        'dense.weight': rng.normal(size=(7, 6)),
        'dense.bias': rng.normal(size=7),
    }
    table = Table([(r'/kernel$', '.weight'), (r'/bias$', '.bias')])
    shapes = {'conv/kernel': (2, 4, 3, 5), 'dense/kernel': (6, 7), 'dense/bias': (7,)}
    for entry in mapping.entries(table, shapes):
        ours = entry.read(tensors(theirs))
        assert ours.shape == shapes[entry.path]
        np.testing.assert_array_equal(entry.write(ours)[entry.names[0]], theirs[entry.names[0]])
    conv = mapping.entry(table, 'conv/kernel', (2, 4, 3, 5)).read(tensors(theirs))
    assert conv[1, 3, 2, 4] == theirs['conv.weight'][4, 2, 1, 3]


def test_joined_and_stacked_tensors():
    rng = np.random.default_rng(0)
    theirs = {f'blocks.{i}.{q}.weight': rng.normal(size=(4, 3)) for i in range(2) for q in 'qkv'}
    table = Table([('^blocks/qkv/', 'blocks.*.{q,k,v}/'), ('/kernel$', '.weight')])
    entry = mapping.entry(table, 'blocks/qkv/kernel', (2, 3, 12))
    assert entry.names == tuple(theirs)
    ours = entry.read(tensors(theirs))
    for i in range(2):
        for j, q in enumerate('qkv'):
            np.testing.assert_array_equal(ours[i][:, 4 * j : 4 * j + 4], theirs[f'blocks.{i}.{q}.weight'].T)
    for name, written in entry.write(ours).items():
        np.testing.assert_array_equal(written, theirs[name])


def test_heads_that_stand_one_after_another():
    """q, k and v of each of two heads in turn, as guided-diffusion has them."""
    rows = np.arange(12.0)[:, None] * np.ones((1, 4))  # [heads 2 x (q, k, v) x 2, 4]
    layout = Layout('qkv/kernel', '(h j c) i 1 -> i (j h c)', {'h': 2, 'j': 3})
    entry = mapping.entry(Table([('/kernel$', '.weight')], [layout]), 'qkv/kernel', (4, 12))
    ours = entry.read(tensors({'qkv.weight': rows[:, :, None]}))
    assert ours[0].tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]  # q of both heads, k of both, v of both


def test_copies_must_be_equal():
    table = Table([('^time/', 'block.@.time/'), ('/kernel$', '.weight')], copies=2)
    entry = mapping.entry(table, 'time/kernel', (3, 4))
    same = {f'block.{i}.time.weight': np.ones((4, 3)) for i in range(2)}
    assert entry.read(tensors(same)).shape == (3, 4)
    assert set(entry.write(np.ones((3, 4)))) == set(same)
    with pytest.raises(UserError, match=r'block\.1\.time\.weight is not equal to block\.0'):
        entry.read(tensors(same | {'block.1.time.weight': np.zeros((4, 3))}))


def test_check_names_what_is_missing_left_over_and_of_another_shape():
    table = Table([('/kernel$', '.weight')])
    entries = mapping.entries(table, {'a/kernel': (2, 3), 'b/kernel': (2, 3)})
    kinds = 'float16, bfloat16, float32, float64, float8_e4m3fn, float8_e5m2'
    with pytest.raises(UserError, match=rf'not of {kinds}: a\.weight is int64'):
        mapping.check(entries[:1], tensors({'a.weight': np.zeros((3, 2), np.int64)}), '', 'FILE')
    file = tensors({'a.weight': np.zeros((3, 5)), 'c.weight': np.zeros(1), 'step': np.zeros(())})
    with pytest.raises(UserError) as error:
        mapping.check(entries, file, 'step', 'FILE')
    assert str(error.value) == (
        'FILE does not fit the config: of another shape: a.weight is [3, 5] and [3, 2] by the config; '
        'missing: b.weight [3, 2]; left over: c.weight [1]'
    )


def case(name: str) -> tuple:
    """(config, shapes of our arrays, file) of one of NAMES, its tensors zeros that take no memory."""
    one, config = NAMES[name], case_config(name)
    file = tensors({n: np.broadcast_to(np.float32(0), shape) for n, shape in one['tensors'].items()})
    return config, shapes_of(config), Weights(name, file)


def case_config(name: str):
    one = NAMES[name]
    return configs.override(configs.load(one['config']), [f'--config.{text}' for text in one['overrides']])


def shapes_of(config) -> dict[str, tuple[int, ...]]:
    return flat_shapes(published_part(assembly.assemble(config, stage=assembly.abstract_stage).abstract))


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_source_has_the_names_and_shapes_of_its_state_dict(name):
    config, shapes, weights = case(name)
    fit = sources.choose(config, shapes, weights, NAMES[name]['source'])
    mapping.check(fit.entries, fit.weights, fit.source.skip, name)
    for entry in fit.entries:
        ours = entry.read(fit.weights)
        assert ours.shape == entry.shape
        for tensor, written in entry.write(ours).items():
            assert mapping.same_numbers(written.shape, fit.weights[tensor].shape)
    for source in sources.for_config(config):
        names = [n for entry in sources.entries_of(source, config, shapes) for n in entry.all_names]
        assert len(names) == len({*names}), f'{source.name} names a tensor twice'


# Where what comes back are other bits than what went in: SiT's outputs for a variance that nothing reads; gains, which
# are kept less 1 in DDGAN.
OTHER_BITS = {'SiT': r'final_layer\.linear\..*', 'DDGAN': r'.*\.style\.bias'}


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_what_goes_in_comes_out_bit_for_bit(name):
    """Of every state dict, in every dtype that a run keeps."""
    config, shapes, weights = case(name)
    rng, different = np.random.default_rng(0), set()
    for dtype in ('float32', 'float16', 'bfloat16'):
        arrays = {n: rng.standard_normal(t.shape, np.float32).astype(dtype) for n, t in weights.items()}
        fit = sources.choose(config, shapes, Weights(name, tensors(arrays)), NAMES[name]['source'])
        for entry in fit.entries:
            for copy in entry.copies:  # which equal the first
                fit.weights.tensors[copy] = fit.weights.tensors[entry.names[0]]
            ours = entry.read(fit.weights)
            assert ours.dtype == dtype
            for tensor, written in entry.write(ours).items():
                expected = fit.weights[tensor].read()
                assert written.dtype == dtype
                if written.tobytes() != expected.tobytes():
                    different.add(tensor)
    assert {n for n in different if not re.fullmatch(OTHER_BITS.get(name, ''), n)} == set()


def test_order_of_heads_has_to_be_said():
    config, shapes, weights = case('ADM')
    with pytest.raises(UserError, match=r'--names=guided for q, k and v head by head.*--names=guided_new_order'):
        sources.choose(config, shapes, weights)
    assert sources.choose(config, shapes, weights, 'guided').source.name == 'guided'
    with pytest.raises(UserError, match=r'--names=guidde: no such source; did you mean guided'):
        sources.choose(config, shapes, weights, 'guidde')
    config.model.network.head_channels = 64  # one head has one order
    assert sources.choose(config, shapes, weights).source.name == 'guided'


def test_averages_are_preferred_to_weights():
    config, shapes, weights = case('DiT')
    both = {f'{root}.{n}': t for root in ('model', 'ema') for n, t in weights.tensors.items()}
    fit = sources.choose(config, shapes, Weights('both', both))
    assert fit.weights['pos_embed'] is both['ema.pos_embed']


@pytest.mark.parametrize(('others', 'root'), [
    ((), 'module.'), (('model.',), 'ema.'), (('',), 'model_ema.module.'), ((), 'state_dict.net._orig_mod.'),
    (('net.',), 'emaNet.'), (('a.', 'net.'), 'netEMA.'), (('x.',), 'swa_model.module.'), (('x.',), 'ema.shadow.'),
])  # fmt: skip
def test_names_under_any_prefix_averages_first(others, root):
    config, shapes, weights = case('ADM')
    file = {f'{r}{n}': t for r in (*others, root) for n, t in weights.tensors.items()}
    both = {n: Tensor(t.shape, t.dtype, lambda t=t: t.read() + 1) if n.startswith(root) else t for n, t in file.items()}
    fit = sources.choose(config, shapes, Weights('both', both), 'guided')
    mapping.check(fit.entries, fit.weights, fit.source.skip, 'both')
    assert fit.weights['out.2.bias'].read().all()
    assert fit.roots[0] == root and {*fit.roots} == {root, *others}


@pytest.mark.parametrize(('name', 'left'), [
    ('optimizer.state.0.exp_avg', False), ('opt_state.x', False), ('lr_schedulers.0.last_lr', False),
    ('scaler.scale', False), ('optimal.weight', True), ('model.scaler.weight', True),
])  # fmt: skip
def test_what_training_leaves_is_no_weight(name, left):
    assert (re.fullmatch(sources.TRAINING, name) is None) == left


def test_published_weights_have_configs_with_the_fields_of_their_source():
    for one in published.PUBLISHED:
        config = published.config_of(one)
        source, resolved = sources.for_config(config, one.names)[0], config.to_dict()
        for field, value in source.fields(config, None).items():
            assert not configs.contains(resolved, field) or configs.get(resolved, field) == value, (one.name, field)


def test_published_weights_are_found_by_name():
    assert published.find('facebook/DiT-XL-2-256').config == 'dit_imagenet256'
    with pytest.raises(UserError, match='did you mean google/ddpm-cifar10-32'):
        published.find('google/ddpm-cifar10')


def test_averages_of_compvis_are_preferred():
    """They stand beside the trained weights, under names without dots."""
    config, shapes, weights = case('IDDPM')
    trained = {f'state_dict.model.diffusion_model.{n}': t for n, t in weights.tensors.items()}
    averages = {f'state_dict.model_ema.diffusion_model{n.replace(".", "")}': t for n, t in weights.tensors.items()}
    averages |= {n: Tensor(t.shape, t.dtype, lambda t=t: t.read() + 1) for n, t in averages.items()}
    others = tensors({'state_dict.model_ema.decay': np.zeros(()), 'state_dict.first_stage_model.x': np.zeros(2)})
    fit = sources.choose(config, shapes, Weights('ldm', {**trained, **averages, **others}), 'guided')
    mapping.check(fit.entries, fit.weights, fit.source.skip, 'ldm')
    assert all((entry.read(fit.weights) == 1).all() for entry in fit.entries[:10])


NORM = {'norm/scale': (64,)}  # a norm of this width


@pytest.mark.parametrize(('case', 'change', 'field', 'value'), [
    ('ADM', 'network.group_size=4', 'network.group_size', 0),
    ('ADM', 'network.groups=16', 'network.groups', 32),
    ('ADM', 'network.eps=1e-6', 'network.eps', 1e-5),
    ('ADM', 'network.sines_first=True', 'network.sines_first', False),
    ('ADM', 'network.freq_shift=1', 'network.freq_shift', 0),
    ('IDDPM', 'network.padding=end', 'network.padding', 'all'),
    ('IDDPM', 'training.time_scale=2.0', 'training.time_scale', 1.0),
    ('ADM', 'training.time_shift=1.0', 'training.time_shift', 0.0),
    ('ADM classifier', 'network.eps=1e-6', 'network.eps', 1e-5),
    ('ADM classifier', 'network.freq_shift=1', 'network.freq_shift', 0),
    ('EDM, DDPM++', 'network.group_size=0', 'network.group_size', 4),
    ('EDM, DDPM++', 'network.eps=1e-5', 'network.eps', 1e-6),
    ('EDM, DDPM++', 'network.resampling=fir', 'network.resampling', 'box'),
    ('EDM, NCSN++', 'network.resampling=box', 'network.resampling', 'fir'),
    ('EDM, DDPM++', 'training.prediction.data_std=1.0', 'training.prediction.data_std', 0.5),
    ('EDM, DDPM++', 'training.prediction=eps', 'training.prediction.name', 'edm'),
    ('EDM, DDPM++', 'training.time_scale=1000.0', 'training.time_scale', 1.0),
    ('EDM, ADM', 'network.head_channels=32', 'network.head_channels', 64),
    ('EDM, ADM', 'network.eps=1e-6', 'network.eps', 1e-5),
    ('DiT', 'network.freq_shift=1', 'network.freq_shift', 0),
    ('DiT', 'network.mlp_eps=1e-5', 'network.mlp_eps', 1e-6),
    ('DiT', 'training.prediction=v', 'training.prediction.name', 'eps'),
    ('DiT', 'training.time_scale=-0.001', 'training.time_scale', 1.0),
    ('SiT', 'training.time_scale=1.0', 'training.time_scale', -0.001),
    ('SiT', 'training.time_shift=0.0', 'training.time_shift', 1.0),
    ('SiT', 'training.prediction=x0', 'training.prediction.name', 'flow'),
    ('NCSN++, residual', 'network.group_size=0', 'network.group_size', 4),
    ('NCSN++, residual', 'network.eps=1e-5', 'network.eps', 1e-6),
    ('NCSN++, residual', 'training.prediction=eps', 'training.prediction.name', 'score'),
    ('NCSN++, skip', 'training.time_scale=2.0', 'training.time_scale', 1.0),
    ('VQGAN', 'group_size=4', 'group_size', 0),
    ('VQGAN', 'eps=1e-5', 'eps', 1e-6),
    ('KL autoencoder', 'groups=16', 'groups', 32),
    ('VAR VQ-VAE', 'eps=1e-5', 'eps', 1e-6),
])  # fmt: skip
def test_what_names_cannot_tell_is_named(case, change, field, value):
    """Nothing differs but the field that was changed, which the file's source has otherwise."""
    one = NAMES[case]
    file = Weights(case, tensors({n: np.broadcast_to(np.float32(0), s) for n, s in one['tensors'].items()}))
    file = dataclasses.replace(file, tensors={n: t for n, t in file.items() if n != 'pos_embed'})
    file = file.below('model.') if one['source'] == 'edm' else file
    wrong = []
    for changes in ([], [f'model.{change}']):
        lines = [f'--config.{text}' for text in [*one['overrides'], *changes]]
        config = configs.override(configs.load(one['config']), lines)
        wrong.append(other_fields(config, sources.for_config(config, one['source'])[0], file, NORM))
    assert wrong[0] == {}
    assert wrong[1].pop(f'model.{field}')[0] == value and wrong[1] == {}


def test_heads_that_the_file_does_not_tell():
    """Those of a published size are known; of others it is said that they are the config's."""
    config = configs.override(configs.load('dit_imagenet256'), ['--config.model.network.heads=8'])
    (source,) = sources.for_config(config, 'dit')
    assert other_fields(config, source, None, {}) == {'model.network.heads': (16, 8)}
    assert source.remarks(config, Weights('file', {})) == []
    config.model.network.blocks = 3
    assert other_fields(config, source, None, {}) == {}
    assert source.remarks(config, Weights('file', {})) == [
        'the file does not say how many heads its attention has: 8, config.model.network.heads'
    ]
    config = configs.load('iddpm_cifar10')
    (heads, time) = sources.for_config(config, 'guided')[0].remarks(config, Weights('file', {}))
    assert heads.endswith('4 heads, heads of config.model.network') and time.endswith('rescale_timesteps is True')
    config = configs.load('adm_imagenet64')
    (heads,) = sources.for_config(config, 'guided')[0].remarks(config, Weights('file', {}))
    assert heads.endswith('64 channels a head, head_channels of config.model.network')


def test_positions_are_the_fixed_ones():
    config = case_config('DiT')
    (source,) = sources.for_config(config, 'dit')
    fixed = position_embedding(4, 4, 64)[None]
    source.fields(config, Weights('file', tensors({'pos_embed': fixed.astype(np.float16)})))
    for table, line in ((fixed[:, ::-1], 'is not the fixed table'), (fixed[:, :15], r'is \[1, 15, 64\]')):
        with pytest.raises(UserError, match=f'pos_embed of the file {line}'):
            source.fields(config, Weights('file', tensors({'pos_embed': table})))


def test_teachers_of_consistency_models_embed_a_thousand_times_as_much():
    config = configs.override(configs.load('adm_imagenet64'), ['--config.model.process=ve', *[
        f'--config.model.{field}' for field in ('training.prediction=edm', 'training.variance=fixed')
    ]])  # fmt: skip
    source = sources.for_config(config, 'guided')[0]
    assert other_fields(config, source, None, {}) == {'model.training.time_scale': (1000.0, 1.0)}
