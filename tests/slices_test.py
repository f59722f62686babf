"""Programs compiled for accelerators that are not here. What needs the compiler for TPUs is skipped where it is not."""

from __future__ import annotations

import importlib.util
import json
import math

import jax
import pytest
from support import main, mistake, path, tiny

from jaxgen import assembly, describe, sharding, slices
from jaxgen.errors import UserError

needs_compiler = pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='libtpu is not installed')
GIB = 2**30


@pytest.mark.parametrize('name', ['v5e', 'v5e:', 'v5e:4x', 'v9:4x4', 'v5e:4x4x4x4', 'v5e:-4', 'V5E:4x4', 'v5e:4x4; x',
    'h200:0', 'v5e:0x4', 'v5e:4x4*0', 'v5e:4x4x4', 'v5e:32x32', 'v5p:4x4'])  # fmt: skip
def test_a_name_of_no_slice_is_one_line(name):
    with pytest.raises(UserError, match=r'no such slice.*: there are v5e:LENGTHS'):
        slices.find(name)


@pytest.mark.parametrize('name', ['h100:12', 'h100:2x2', 'h100:8*2', 'h100:8192'])
def test_gpus_are_named_by_their_number(name):
    with pytest.raises(UserError, match='GPUs'):
        slices.find(name)


@pytest.mark.parametrize('n', [1, 2, 4, 8, 32, 256])
def test_cubes(n):
    assert math.prod(slices.cube(n)) == n and max(slices.cube(n)) <= 2 * min(slices.cube(n))


def test_the_missing_compiler_is_one_line(monkeypatch, capfd):
    monkeypatch.setattr(slices.importlib.util, 'find_spec', lambda name: None)
    line = mistake(capfd, '--mode=compile', f'--config={path("vae_digits")}', '--topology=v5e:4x4')
    assert "pip install 'jaxgen[tpu]'" in line


def test_the_slice_must_be_named(capfd):
    assert '--topology' in mistake(capfd, '--mode=compile', f'--config={path("vae_digits")}')


@pytest.mark.parametrize('name', ['conditional_vae_digits', pytest.param('pix2pix_shapes', marks=pytest.mark.slow)])
def test_programs_are_those_of_training_and_sampling(name):
    """Of a config with labels, and of one with images as conditions."""
    config = tiny(name)
    a = assembly.assemble(config, sharding.make_mesh(1, jax.devices()[:1]), assembly.abstract_stage)
    (update, given), (sampler, conditions) = slices.update_program(a), slices.sample_program(a)
    traced = update.trace(*given)
    assert describe.flops(traced.jaxpr.jaxpr) == describe.describe(config, a)['update_flops']
    assert slices.bytes_a_chip(given[0]) == describe.size(a.abstract)
    images, finite = sampler.trace(*conditions).out_info
    n = sharding.round_up(a.mesh, config.sample.batch)
    assert images.shape == (n, *a.context.image) and finite.shape == (n,)


def test_the_result_is_a_file(capfd, tmp_path):
    options = f'--config={path("vae_digits")}', '--topology=v5e:4x4', f'--out={tmp_path}'
    assert 'is a directory: name the file' in mistake(capfd, '--mode=compile', *options)


@pytest.mark.parametrize('error, expected', [
    ('RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 21.30G of '
     '15.75G hbm. Exceeded hbm capacity by 5.55G.', (21.3, 15.75)),
    ('RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO '
     'temporaries (20.12G) exceeds available HBM (15.75G). HLO module: jit_call.', (21.12, 15.75)),
    ('RESOURCE_EXHAUSTED: something new', (None, None)),
])  # fmt: skip
def test_errors_of_memory(error, expected):
    found = slices.needed(error, GIB)  # the arguments, beside the temporaries
    assert [x if x is None else x / GIB for x in found] == pytest.approx(expected)


def test_other_errors_are_none_of_memory():
    assert slices.needed('INTERNAL: no such instruction', 0) is None


@needs_compiler
@pytest.mark.parametrize('name', ['v5e:3x3', 'v5p:1x1x8960'])
def test_a_slice_that_the_compiler_does_not_know_is_one_line(name):
    with pytest.raises(UserError, match='no such slice'):
        slices.find(name)


@needs_compiler
def test_a_slice_and_what_it_leaves_behind():
    import os

    before = dict(os.environ)
    found = slices.find('v5e:4x4')
    assert (len(found.devices), found.hosts, found.shape) == (16, 4, (4, 4)) and dict(os.environ) == before
    assert len(slices.find('v5e:2x2*2').devices) == 8
    gpus = slices.find('h100:16')
    assert (len(gpus.devices), gpus.hosts, gpus.chip.name) == (16, 2, 'H100 SXM')


@needs_compiler
@pytest.mark.slow
def test_compile_for_a_slice(tmp_path):
    """The numbers of a report agree with each other, with `describe` and with the closed form of FSDP."""
    out = tmp_path / 'about.json'
    config = '--config.data.batch=32', '--config.mesh.fsdp=4', '--config.sample.batch=16'
    done = main(
        '--mode=compile', f'--config={path("dit_digits")}', '--topology=v5e:4x4', f'--out={out}', *config, timeout=500
    )
    assert done.returncode == 0, done.stderr
    about = json.loads(out.read_text())
    assert (about['chips'], about['hosts'], about['mesh']) == (16, 4, {'data': 4, 'fsdp': 4})
    described = json.loads(main('--mode=describe', f'--config={path("dit_digits")}', config[0]).stdout)
    update = about['update']
    assert update['fits'] and 0 < update['memory']['used'] < update['memory']['limit']
    assert update['flops'] == described['update_flops'] <= 16.5 * update['flops_per_chip']
    assert update['seconds']['least'] <= update['seconds']['in_turn'] and 0 < update['fraction_of_peak'] < 1
    assert {row['kind'] for row in update['collectives']} >= {'all-reduce'}
    assert f'update of 32: fits: {update["memory"]["used"] / GIB:.2f} of' in done.stdout and 'sample' in about


@needs_compiler
def test_a_batch_that_does_not_divide_is_refused_before_the_compile(capfd):
    line = mistake(capfd, '--mode=compile', f'--config={path("vae_digits")}', '--topology=v5e:4x4')
    assert 'must be a multiple of the number of devices, 16' in line


def test_advice_for_what_does_not_fit():
    """State that is the most of the memory is cut over more chips; activations are cut by accumulation."""
    config = tiny('vae_digits', data={'batch': 64})
    a = assembly.assemble(config, sharding.make_mesh(1, jax.devices()[:1]))
    about = {'fits': False, 'memory': {'used': 3 * GIB, 'limit': GIB}}
    lines = ' '.join(slices.advice(about, a, update=True))
    assert 'accumulate=4' in lines and 'bfloat16' in lines and 'remat=true' in lines and 'fsdp' not in lines
