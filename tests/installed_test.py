"""jaxgen as a person has it who installs it: a wheel, the configs in it, and the command from any directory."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from support import NAMES, ROOT, mistake, path

import jaxgen
from jaxgen import arguments as command
from jaxgen import assembly, catalogue, files, run
from jaxgen import config as configs
from jaxgen import configs as shipped
from jaxgen.main import run_main

# Put first on the path of an installed package: no file of the clone may be opened.
WATCH = f"""
import os, sys

def refuse(event, args):
    if event == 'open' and isinstance(args[0], str):
        path = os.path.realpath(args[0])
        if path.startswith({ROOT + os.sep!r}) and not path.startswith(os.path.realpath(sys.prefix) + os.sep):
            raise RuntimeError('opened ' + path)

sys.addaudithook(refuse)
"""


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    """The folder of a wheel that was made of the clone's files and installed beside nothing else."""
    root = tmp_path_factory.mktemp('installed')
    source, target = root / 'source', root / 'target'
    source.mkdir()
    for name in ('pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(os.path.join(ROOT, name), source)
    for name in ('jaxgen', 'configs'):
        shutil.copytree(os.path.join(ROOT, name), source / name, ignore=shutil.ignore_patterns('__pycache__'))
    pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', '--quiet']
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    build = [*pip, 'wheel', '--no-deps', '--no-build-isolation', '--no-index', '--wheel-dir', str(root), str(source)]
    subprocess.run(build, check=True, cwd=root, env=env)
    (wheel,) = root.glob('jaxgen-*.whl')
    install = [*pip, 'install', '--no-deps', '--no-index', '--no-compile', '--target', str(target), str(wheel)]
    subprocess.run(install, check=True, cwd=root, env=env)
    (target / 'sitecustomize.py').write_text(WATCH)
    return target


def from_elsewhere(installed, directory, *command: str) -> str:
    """Runs a command in a directory with the installed package alone; what it printed."""
    env = {**os.environ, 'PYTHONPATH': str(installed), 'PYTHONDONTWRITEBYTECODE': '1'}
    done = subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def python_files(folder: str) -> set[str]:
    return {
        os.path.relpath(os.path.join(d, f), folder) for d, _, names in os.walk(folder) for f in names if f[-3:] == '.py'
    }


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_config(installed):
    modules = python_files(os.path.join(ROOT, 'jaxgen'))
    assert python_files(str(installed / 'jaxgen')) == modules | {f'configs/{name}.py' for name in NAMES}


@pytest.mark.slow
def test_train_sample_and_evaluate_from_an_empty_directory(installed, tmp_path):
    where = (
        'import importlib, jaxgen; print(jaxgen.__file__); '
        "print(importlib.import_module('jaxgen.configs.ddpm_digits').__file__)"
    )
    package, config = from_elsewhere(installed, tmp_path, sys.executable, '-c', where).split()
    assert package == f'{installed}/jaxgen/__init__.py' and config == f'{installed}/jaxgen/configs/ddpm_digits.py'
    script, module = [sys.executable, f'{installed}/bin/jaxgen'], [sys.executable, '-m', 'jaxgen']
    from_elsewhere(installed, tmp_path, *script, '--config=ddpm_digits:tiny')
    workdir = tmp_path / 'runs' / 'ddpm_digits_tiny'
    from_elsewhere(installed, tmp_path, *module, '--mode=sample', f'--workdir={workdir}', '--n=2', '--out=samples')
    assert sorted(os.listdir(tmp_path / 'samples' / 'images')) == ['00000.png', '00001.png']
    from_elsewhere(installed, tmp_path, *script, '--mode=evaluate', '--workdir=runs/ddpm_digits_tiny')
    assert json.loads((workdir / 'evaluation.json').read_text())['step'] == 4
    assert sorted(os.listdir(tmp_path)) == ['runs', 'samples']


# --- configs by their names


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_configs_by_their_names(elsewhere):
    assert shipped.names() == NAMES
    for variant in ('', 'tiny', 'tiny,conditional'):
        name = f'vae_digits:{variant}' if variant == 'tiny' else f'ddpm_digits:{variant}'
        assert configs.load(name.rstrip(':')) == configs.load(path(name.partition(':')[0], variant))
    module = importlib.import_module('jaxgen.configs.ddpm_digits')  # in a clone, too
    assert module.__file__ == path('ddpm_digits', '') and module.get_config() == configs.load('ddpm_digits')
    assert configs.name('ddpm_digits:tiny,conditional') == 'ddpm_digits_tiny_conditional'


def test_a_file_comes_before_the_name(elsewhere, monkeypatch):
    (elsewhere / 'ddpm_digits').write_text('mine')
    with pytest.raises(configs.UserError, match='ddpm_digits is not a Python file'):
        configs.load('ddpm_digits')
    (elsewhere / 'mine').mkdir()
    (elsewhere / 'ddpm_digits').unlink()
    (elsewhere / 'ddpm_digits').mkdir()  # a run of this name, say
    assert configs.load('ddpm_digits').family == 'diffusion'


def test_names_of_no_config(elsewhere, capfd, no_compile):
    assert "no config 'ddpm_digit'; did you mean ddpm_digits" in mistake(capfd, '--config=ddpm_digit:tiny')
    (elsewhere / 'own_model.py').write_text('')
    assert 'did you mean own_model.py?' in mistake(capfd, '--config=own_model')
    said = mistake(capfd, '--config=configs/ddpm_digits.py')
    assert 'no config file configs/ddpm_digits.py' in said and 'comes with jaxgen: ddpm_digits' in said
    assert "no config 'xyzzy'; --mode=list prints all" in mistake(capfd, '--config=xyzzy')
    assert 'no config file ../mine' in mistake(capfd, '--config=../mine')


def test_the_config_of_a_stage_that_is_not_trained(elsewhere, capfd, no_compile):
    assert configs.named('runs/vqvae_digits/') == 'vqvae_digits'
    assert configs.named('runs/ddpm_digits_tiny_v') == 'ddpm_digits:tiny,v'
    assert configs.named('runs/unknown_digits') == ''
    config = configs.load('vqvae_digits_prior')
    assert config.stages.first == str(elsewhere / 'runs' / 'vqvae_digits')
    assert assembly.assemble(config, stage=assembly.abstract_stage).config.family == config.family
    # One in configs/ of the directory comes first.
    (elsewhere / 'configs').mkdir()
    (elsewhere / 'configs' / 'vqvae_digits.py').write_text('')
    assert configs.named('runs/vqvae_digits') == 'configs/vqvae_digits.py'


# --- only this machine's files


@pytest.mark.parametrize('address', ['gs://bucket/run', 's3://bucket/run', 'http://host/run', 'hdfs+x://run'])
def test_addresses_are_refused(address, elsewhere, capfd, no_compile):
    tiny, digits = '--config=vqvae_digits_prior:tiny', '--config=vae_digits:tiny'
    for args in (
        [digits, f'--workdir={address}'],
        ['--mode=sample', f'--workdir={address}'],
        ['--mode=sample', '--workdir=run', f'--out={address}'],
        ['--mode=evaluate', digits, f'--images={address}'],
        [tiny, f'--config.stages.first={address}'],
        [digits, f'--config.data.source=folder:{address}'],
        [digits, f'--config.data.dir={address}'],
    ):
        said = mistake(capfd, *args)
        assert f'={address} is an address' in said and args[-1].partition('=')[0].lstrip('-') in said
    with pytest.raises(configs.UserError, match='is an address'):
        run.load(address)
    assert os.listdir(elsewhere) == []


def test_paths_that_look_like_addresses(elsewhere):
    for name in ('a:b', 'a:/b', '/tmp/a://b', '://x', 'my runs://x'):
        files.check_local(name, '--workdir')


# --- first screens


@pytest.mark.parametrize('args', [[], ['--help'], ['-h'], ['--mode=sample', '--help']])
def test_help_is_one_screen(args, capfd, no_compile):
    assert run_main(['jaxgen', *args]) == 0
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert not err and len(lines) < 50 and max(map(len, lines)) <= 100
    assert lines[0].startswith(f'jaxgen {jaxgen.__version__}')
    for name in command.define_flags():
        assert name == 'h' or any(re.match(rf'  --{name}\b', line) for line in lines), name
    assert all(f'--mode={mode}' in out for mode in command.MODES if mode != 'train')


def test_version(capfd, no_compile):
    assert run_main(['jaxgen', '--version']) == 0
    assert capfd.readouterr().out == f'jaxgen {jaxgen.__version__}\n'


# --- the list of configs


def listed(capfd, *words: str) -> list[str]:
    assert run_main(['jaxgen', '--mode=list', *words]) == 0
    return capfd.readouterr().out.splitlines()[1:]


def test_the_list_has_every_config(capfd, no_compile):
    lines = listed(capfd)
    assert [line.split()[0] for line in lines] == NAMES
    (line,) = [line for line in lines if line.startswith('ddpm_digits ')]
    assert re.split(r'  +', line)[1:] == [
        'diffusion', 'digits', '8x8x1', '3.6 minutes on 2 CPU cores', 'conditional v min_snr',
    ]  # fmt: skip
    assert re.split(r'  +', next(line for line in lines if line.startswith('adm_imagenet256 ')))[4] == '-'


def test_the_list_by_words(capfd, no_compile):
    assert {line.split()[0] for line in listed(capfd, 'DIGITS', 'stylegan2')} == {'stylegan2_digits'}
    assert "no config has 'digits zebras'" in mistake(capfd, '--mode=list', 'digits', 'zebras')
    assert listed(capfd) == listed(capfd, '--mode', 'list')
    assert '--workdir is read by' in mistake(capfd, '--mode=list', '--workdir=x')
    assert 'a field of one config' in mistake(capfd, '--mode=list', '--config.seed=1')


def test_variants():
    assert catalogue.variants('vae_digits') == ['tiny']
    # Table 1 of DiT: four sizes, three patches; that without a variant is XL/2.
    sizes = {f'{size}{patch}' for size in ('s', 'b', 'l', 'xl') for patch in (2, 4, 8)}
    assert sizes <= {'xl2', *catalogue.variants('dit_imagenet256')}
    for variant in catalogue.variants('edm_cifar10'):
        assert configs.load(f'edm_cifar10:{variant}').family == 'diffusion'
