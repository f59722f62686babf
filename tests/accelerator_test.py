"""The benchmark of accelerators: both frameworks' networks are the same, and it runs, stops and goes on."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxgen import describe

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PATH = os.path.join(ROOT, 'benchmarks', 'accelerator.py')


@pytest.fixture(scope='module')
def accelerator():
    spec = importlib.util.spec_from_file_location('accelerator', PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize('tiny', [True, False])
@pytest.mark.parametrize('name', ['ddpm_cifar10', 'dit_b2', 'dit_xl2', 'adm_imagenet64', 'sd_unet'])
def test_networks_have_as_many_weights_in_torch(accelerator, name, tiny):
    torch = pytest.importorskip('torch')
    pytest.importorskip('diffusers')
    kind, fields, *_, size, channels = (accelerator.TINY if tiny else accelerator.NETWORKS)[name]
    net = accelerator.flax_network(kind, fields, jnp.bfloat16)
    more = {'tokens': jnp.zeros((1, *accelerator.TEXT))} if kind == 'latent_unet' else {}
    x = jnp.zeros((1, size, size, channels))
    ours = jax.eval_shape(lambda: net.init(jax.random.key(0), x, jnp.ones(1), **more, train=False))
    with torch.device('meta'):
        theirs = accelerator.torch_network(kind, fields, size, channels)
    assert sum(p.numel() for p in theirs.parameters()) == describe.count(ours)


def test_ratios_are_of_the_same_work(accelerator):
    def row(framework, what, batch, seconds, network='dit_b2'):
        times = {'median': seconds}
        return dict(framework=framework, what=what, batch=batch, network=network, seconds=times, parameters=7)

    rows = [row('jaxgen', 'train', 8, 2.0), row('torch', 'train', 8, 3.0), row('torch', 'evaluate', 8, 5.0)]
    rows += [row('jaxgen', 'evaluate', 4, 1.0), row('jaxgen', 'train', 8, 1.0, 'dit_xl2')]
    assert [r.get('speed_over_torch') for r in accelerator.with_ratios(rows)] == [1.5, None, None, None, None]
    with pytest.raises(SystemExit, match='not the same network: 8 and 7'):
        accelerator.with_ratios([rows[0] | {'parameters': 8}, rows[1]])


def test_peaks_are_those_of_the_device(accelerator):
    assert accelerator.peak_of('NVIDIA H200') == 989.4e12 and accelerator.peak_of('TPU v5 lite') == 197e12
    assert accelerator.peak_of('cpu') is None


@pytest.mark.slow
def test_it_runs_and_measures_nothing_twice(tmp_path):
    out = str(tmp_path / 'rows.json')
    command = [sys.executable, PATH, '--tiny', '--only=dit_b2', f'--out={out}']
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    with open(out) as f:
        rows = json.load(f)['rows']
    ours = [r for r in rows if r['framework'] == 'jaxgen']
    assert len(ours) == 6 and {r['what'] for r in ours} == {'train', 'evaluate'}
    assert all(r['seconds']['min'] > 0 and r['device'] and r['versions']['jax'] == jax.__version__ for r in rows)
    before = os.stat(out).st_mtime_ns
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert os.stat(out).st_mtime_ns == before
    assert subprocess.run([*command, '--minutes=0'], capture_output=True).returncode == 1
