"""Families and networks of a person's own, by dotted path; nothing is imported because a run says so."""

from __future__ import annotations

import hashlib
import hmac
import itertools
import json
import os
import sys
import types

import jax
import pytest
from support import mistake, path

import jaxgen
from jaxgen import assembly, imports, origin
from jaxgen import config as configs
from jaxgen.errors import UserError
from jaxgen.main import run_main

FAMILY = '''
import os
from typing import Annotated

import jax.numpy as jnp
from flax import linen as nn

from jaxgen import options
from jaxgen.contract import Aux, Family, make_update, new_state
from jaxgen.randomness import example_keys, normal

with open({marker!r}, 'a') as file:
    file.write('imported')


@options.checked
def build(context, *, width: Annotated[int, '[1, inf)'] = 4):
    """Args:
      width: of the layer.
    """
    image = context.image
    network = nn.Sequential([nn.Dense(width), nn.Dense(image[-1])])

    def loss(params, state, frozen, batch, rng):
        x = batch['image']
        value = jnp.square(network.apply({{'params': params['net']}}, x) - x).mean()
        return value, Aux({{'loss': value}})

    def init(rng, batch, frozen):
        return new_state({{'net': network.init(rng, batch['image'])['params']}}, context.optim)

    def sample(state, frozen, batch, rng):
        return jnp.clip(network.apply({{'params': state.ema['net']}}, normal(example_keys(rng, batch), image)), -1, 1)

    def evaluate(state, frozen, batch, rng):
        return {{'error': jnp.square(batch['image']).mean((1, 2, 3))}}

    return Family(init, make_update(loss, context.optim, 'net'), sample, evaluate)


own_build = build


def needs(context, *, width):
    return build(context)


class Net(nn.Module):
    channels: int = 4
    out_channels: int = 1

    @nn.compact
    def __call__(self, x, t, *, train=False):
        h = nn.silu(nn.Dense(self.channels)(x) + nn.Dense(self.channels)(jnp.log1p(t)[:, None])[:, None, None])
        return nn.Dense(self.out_channels)(h)
'''
numbers = itertools.count()
TINY = {**configs.TINY, 'data': {'size': 8, 'batch': 8}}


@pytest.fixture(autouse=True)
def nothing_named(monkeypatch):
    """As in a process in which the person has named nothing yet."""
    monkeypatch.setattr(imports, '_named', set())


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The name of an installed package with the module `family`, of which `imported` tells whether it was."""
    name = f'own_package_{next(numbers)}'
    folder = tmp_path / 'site' / name
    folder.mkdir(parents=True)
    (folder / '__init__.py').touch()
    (folder / 'family.py').write_text(FAMILY.format(marker=str(tmp_path / 'marker')))
    monkeypatch.syspath_prepend(str(tmp_path / 'site'))
    return name


@pytest.fixture
def new_process(tmp_path, monkeypatch):
    """From a call on it is another process, of a stranger where it is asked for; `imported()` whether it imported."""

    def begin(stranger: bool = False):
        for name in [name for name in sys.modules if name.startswith('own_package_')]:
            del sys.modules[name]
        imports._named.clear()
        (tmp_path / 'marker').unlink(missing_ok=True)
        if stranger:
            monkeypatch.setenv('XDG_CONFIG_HOME', str(tmp_path / 'another'))
        return (tmp_path / 'marker').exists

    return begin


def trained(package, workdir, family='family') -> str:
    config = jaxgen.config(family=f'{package}.{family}', model={'width': 3}, **TINY)
    jaxgen.train(config, str(workdir))
    return str(workdir)


@pytest.mark.parametrize('family', ['family', pytest.param('family.own_build', marks=pytest.mark.slow)])
def test_a_family_of_ones_own(family, package, tmp_path, new_process):
    workdir = trained(package, tmp_path / 'run', family)
    new_process()
    loaded = jaxgen.load(workdir)
    assert loaded.sample(2).shape == (2, 8, 8, 1) and loaded.config.model.width == 3
    new_process()
    assert run_main(['jaxgen', '--mode=sample', f'--workdir={workdir}', '--n=1']) == 0


def test_the_run_of_a_stranger_imports_nothing_unless_it_is_named(package, tmp_path, new_process, capfd):
    workdir = trained(package, tmp_path / 'run')
    imported = new_process(stranger=True)
    with pytest.raises(UserError, match='Python code that would be run') as e:
        jaxgen.load(workdir)
    assert '\n' not in str(e.value)
    assert f'name it yourself, --config.family={package}.family' in str(e.value)
    capfd.readouterr()
    for mode in ('sample', 'evaluate', 'explore'):
        assert 'Python code that would be run' in mistake(capfd, f'--mode={mode}', f'--workdir={workdir}')
    prior = jaxgen.config('vae_digits:tiny', stages={'first': workdir})
    with pytest.raises(UserError, match='Python code'):
        assembly.assemble(prior)
    assert not imported()
    assert jaxgen.load(workdir, config={'family': f'{package}.family'}).step == 4
    assert imported()
    new_process(stranger=True)
    command = ['jaxgen', '--mode=sample', f'--workdir={workdir}', '--n=1', f'--config.family={package}.family']
    assert run_main(command) == 0


@pytest.mark.parametrize(
    'change',
    [
        {'family': 'own_package_x.family'},
        pytest.param({'model': {'width': 3, 'x': 'os.path'}}, marks=pytest.mark.slow),
        pytest.param({'family': 'os.system'}, marks=pytest.mark.slow),
    ],
)
def test_a_signature_is_of_the_modules_too(change, package, tmp_path, new_process):
    """Also of another one that is installed, and of a name within the model."""
    workdir = trained(package, tmp_path / 'run')
    file = os.path.join(workdir, 'config.json')
    with open(file, encoding='utf-8') as stored:
        saved = json.load(stored)
    with open(file, 'w', encoding='utf-8') as stored:
        json.dump({**saved, **change}, stored)
    imported = new_process()
    with pytest.raises(UserError, match='Python code that would be run'):
        jaxgen.load(workdir)
    assert not imported()


def test_signatures_without_modules_are_those_of_before():
    config, key = configs.load(path('vae_digits')), b'a key'
    text = json.dumps(configs.paths(config), sort_keys=True).encode()
    assert origin.signature(config, key) == hmac.new(key, text, hashlib.sha256).hexdigest()


@pytest.mark.slow
def test_a_network_of_ones_own(package, tmp_path, new_process, capfd):
    name = f'{package}.family.Net'
    config = jaxgen.config(path('ddpm_digits'), model={'network': {'name': name, 'channels': 6}})
    assert config.model.network.to_dict() == {'name': name, 'channels': 6}
    workdir = str(tmp_path / 'run')
    jaxgen.train(config, workdir)
    assert jaxgen.load(workdir).sample(2).shape == (2, 8, 8, 1)
    imported = new_process(stranger=True)
    with pytest.raises(UserError, match=r'config.model.network.name names .*--config.model.network.name='):
        jaxgen.load(workdir)
    assert not imported()
    capfd.readouterr()
    fields = [f'--config={path("ddpm_digits")}', f'--config.model.network={name}']
    assert run_main(['jaxgen', '--mode=fields', *fields]) == 0
    assert 'model.network.channels' in capfd.readouterr().out
    assert 'channles: no such field' in mistake(capfd, '--mode=fields', *fields, '--config.model.network.channles=3')


def test_a_config_file_names_them(package, tmp_path):
    file = tmp_path / 'mine.py'
    lines = f"    return make(variant, family='{package}.family', variants={{'tiny': {{}}}})\n"
    file.write_text('from jaxgen.config import make\n\n\ndef get_config(variant=""):\n' + lines)
    assert jaxgen.config(f'{file}:tiny').model.width == 4
    assert jaxgen.config(file, **{'model.width': 7}).model.width == 7


def test_objects_stand_for_their_paths(package):
    module = imports.importlib.import_module(f'{package}.family')
    for target, expected in [(module, ''), (module.build, '.build')]:
        assert jaxgen.config(family=target, **TINY).family == f'{package}.family{expected}'
    network = jaxgen.config(path('ddpm_digits'), **{'model.network': module.Net}).model.network
    assert network.to_dict() == {'name': f'{package}.family.Net', 'channels': 8}  # as it was set


@pytest.mark.parametrize('where', ['', 'inner'])
def test_modules_in_the_directory_of_a_run(where, tmp_path, monkeypatch):
    """The current directory comes first where Python looks: there a run may bring modules of any name."""
    name = f'own_package_{next(numbers)}'
    (tmp_path / 'run' / where).mkdir(parents=True, exist_ok=True)
    (tmp_path / 'run' / 'checkpoints').mkdir()
    (tmp_path / 'run' / 'config.json').touch()
    (tmp_path / 'run' / where / f'{name}.py').write_text('raise SystemExit("imported")')
    monkeypatch.syspath_prepend(str(tmp_path / 'run' / where))
    with pytest.raises(UserError, match='in the directory of a run, and a run is data'):
        jaxgen.config(family=name + '.build')


def test_mistakes(package, tmp_path):
    def local(context):
        pass

    (tmp_path / 'site' / package / 'broken.py').write_text('import os\n1 / 0\n')
    (tmp_path / 'site' / package / 'syntax.py').write_text('def build(:\n')
    (tmp_path / 'site' / package / 'needs.py').write_text('import no_such_package\n')
    (tmp_path / 'site' / package / 'leaves.py').write_text('raise SystemExit(3)\n')
    main = types.FunctionType(local.__code__, {}, 'build')
    main.__module__, main.__qualname__ = '__main__', 'build'
    for family, message in [
        ('no_such_package_x.family', "no module 'no_such_package_x' .*install its package"),
        (f'{package}.famly', f"no module '{package}.famly'"),
        (f'{package}.broken', r'ZeroDivisionError: division by zero \(.*broken.py:2\)'),
        (f'{package}.syntax', r'SyntaxError: .*syntax.py:1\)'),
        (f'{package}.needs', "ModuleNotFoundError: No module named 'no_such_package'"),
        (f'{package}.leaves', 'SystemExit: 3'),
        (f'{package}', 'no family'),
        (f'{package}.family.FAMILY', 'no module'),
        (f'{package}.family.Net', 'has no function build'),
        (f'{package}.family.needs', r"every option needs a default; \['width'\]"),
        ('os.path', 'has no function build'),
        (local, 'in a notebook, the main program or a function'),
        (lambda context: None, 'in a notebook, the main program or a function'),
        (main, 'in a notebook, the main program or a function'),
    ]:
        with pytest.raises(UserError, match=message) as e:
            jaxgen.config(family=family)
        assert '\n' not in str(e.value)
    with pytest.raises(UserError, match=r'config\.model\.network\.name must be one of'):
        jaxgen.config(path('ddpm_digits'), **{'model.network': 'unett'})
    with pytest.raises(UserError, match=r'config\.model\.sampler\.name must be one of'):
        jaxgen.config(path('ddpm_digits'), **{'model.sampler': f'{package}.family.Net'})


NETWORKS = '''
from typing import Annotated

from jaxgen.networks import gan, pixelcnn


def pair(image, projection, dtype, remat, *, width: Annotated[int, '[1, inf)'] = 4, multipliers=(2, 1)):
    return gan.dcgan(image, projection, dtype, remat, width=width, multipliers=multipliers)


class Pixels(pixelcnn.PixelCNN):
    """A network of one's own."""
'''


@pytest.mark.slow
@pytest.mark.parametrize('base, name', [('dcgan_digits', 'pair'), ('pixelcnn_digits', 'Pixels')])
def test_networks_of_other_families(base, name, package, tmp_path, no_compile):
    (tmp_path / 'site' / package / 'nets.py').write_text(NETWORKS)
    config = jaxgen.config(path(base), **{'model.network': f'{package}.nets.{name}'})
    own, original = (assembly.assemble(c).abstract for c in (config, configs.load(path(base))))
    assert jax.tree.map(lambda x: x.shape, own.params) == jax.tree.map(lambda x: x.shape, original.params)
