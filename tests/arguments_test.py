"""The arguments of the command: values after a space, and the first line before jax is imported."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from support import ROOT, main, path

from jaxgen import arguments, directory, locks
from jaxgen import config as configs
from jaxgen.errors import UserError


@pytest.mark.parametrize(
    ('spaced', 'joined'),
    [
        ('--config x.py --workdir a', '--config=x.py --workdir=a'),
        ('--mode sample --n 5 --workdir a', '--mode=sample --n=5 --workdir=a'),
        ('-mode sample -workdir a', '--mode=sample --workdir=a'),
        ('--config x.py --config.optim.lr 1e-3', '--config=x.py --config.optim.lr=1e-3'),
        ('--config x.py --config.data.shift -1', '--config=x.py --config.data.shift=-1'),
        ('--config x.py --config.optim.lr -.5', '--config=x.py --config.optim.lr=-.5'),
        ('--config x.py --profile true', '--config=x.py --profile'),
        ('--config x.py --profile --multihost false', '--config=x.py --profile --nomultihost'),
        ('--config x.py --config.train.remat --workdir a', '--config=x.py --config.train.remat --workdir=a'),
        ('--mode sample --workdir a --condition label=3 --condition x=y',
         '--mode=sample --workdir=a --condition=label=3 --condition=x=y'),
        ('--mode list digits vae', '--mode=list digits vae'),
    ],
)  # fmt: skip
def test_a_space_is_an_equals_sign(spaced, joined):
    (first, *others), (second, *same) = (arguments.parse(['jaxgen', *text.split()]) for text in (spaced, joined))
    assert first.flag_values_dict() == second.flag_values_dict()
    assert [[o.lstrip('-') for o in one] for one in others] == [[o.lstrip('-') for o in one] for one in same]


def test_values_that_hold_spaces_and_signs():
    given, overrides, _ = arguments.parse(['jaxgen', '--condition', 'caption=a red = b', '--config.data.source', 'a b'])
    assert given.condition == ['caption=a red = b'] and overrides == ['--config.data.source=a b']


@pytest.mark.parametrize(
    ('text', 'says'),
    [
        ('--workdir', '--workdir needs a value: --workdir=WORKDIR'),
        ('--workdir --n=3', '--workdir needs a value'),
        ('--config x.py --n', '--n needs a value: --n=N'),
        ('--mode=sample --n five', r'--n must be an integer; it is five$'),
        ('--mode=sample --n=4.0', r'--n must be an integer; it is 4\.0$'),
        ('--profile=3', r'--profile must be true or false; it is 3$'),
        ('--optim.lr=3', r'--optim\.lr: no such option; did you mean --config\.optim\.lr\?'),
        ('--confg=x', '--confg: no such option; did you mean config'),
        ('train --config=x', r"'train': did you mean --mode=train\?"),
        ('vae_digits:tiny', r"'vae_digits:tiny': did you mean --config=vae_digits:tiny\?"),
        ('--mode=sample five', "cannot use 'five'"),
        ('--profile maybe --config x.py', "cannot use 'maybe'"),
    ],
)
def test_missing_values(text, says):
    with pytest.raises(UserError, match=f'.*{says}'):
        arguments.parse(['jaxgen', *text.split()])


def test_booleans_of_a_config():
    config = configs.load(path('ddpm_digits'))
    assert not config.train.remat and not config.data.flip

    def given(*texts):
        _, overrides, _ = arguments.parse(['jaxgen', *texts])
        return configs.override(config, overrides)

    assert given('--config.train.remat', '--config.data.flip', 'true', '--n=3').train.remat
    assert given('--config.train.remat', '--config.data.flip', 'true', '--n=3').data.flip
    assert not given('--config.data.flip', 'False').data.flip
    with pytest.raises(UserError, match=r'config\.optim\.lr needs a value: --config.optim.lr=VALUE'):
        given('--config.optim.lr')
    with pytest.raises(UserError, match=r'no such field.*remat'):
        given('--config.train.remta')


def test_mistakes_in_options_are_told_without_jax():
    code = 'import sys; from jaxgen import __main__ as m\ntry: m.command()\nfinally: print(*sys.modules)'
    for text, exit_code in (('--workdir', 2), ('--mode=smaple', 2), ('--help', 0), ('--version', 0)):
        command = [sys.executable, '-c', code, text]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
        assert done.returncode == exit_code and done.stderr.count('\n') == (exit_code == 2), done.stderr
        assert not {'jax', 'numpy', 'tensorflow_datasets'} & set(
            done.stdout.rpartition('\n')[0].rpartition('\n')[2].split()
        )


@pytest.mark.parametrize('module', ['jaxgen', 'jaxgen.main'])
def test_the_first_line_comes_before_jax(module, tmp_path):
    began = time.monotonic()
    command = [sys.executable, '-X', 'importtime', '-m', module, '--mode=sample', f'--workdir={tmp_path}']
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    before = []
    for line in process.stderr:
        if line.startswith('jaxgen: '):
            break
        before.append(line.rpartition('|')[2].strip())
    seconds = time.monotonic() - began
    process.kill()
    process.communicate()
    assert line.startswith('jaxgen: ') and f'sampling {tmp_path}' in line
    assert 'absl.flags' in before and not {'jax', 'numpy', 'PIL'} & set(before)
    assert seconds < 20, 'the process hung'  # how soon it is stands in the docs; here others use the cores


def test_a_mistake_that_jax_is_needed_for_comes_after_it():
    done = main('--mode=train', f'--config={path("ddpm_digits")}', '--config.optim.lr=-1')
    assert done.returncode == 2
    assert [line.partition(' ')[0] for line in done.stderr.splitlines()] == ['jaxgen:', 'jaxgen:']


def test_a_system_without_file_locks_is_one_line():
    code = "import sys; sys.modules['fcntl'] = None; from jaxgen import __main__ as m; sys.exit(m.command())"
    command = [sys.executable, '-c', code, f'--config={path("vae_digits")}']
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and 'use Linux or macOS' in done.stderr


def test_a_program_without_file_locks_trains_nothing(tmp_path, monkeypatch):
    from jaxgen.train import train

    monkeypatch.setattr(locks, 'fcntl', None)
    with pytest.raises(UserError, match='is not supported'):
        train(configs.load(path('vae_digits')), str(tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()


def test_a_lock_is_held_once(tmp_path):
    with open(tmp_path / 'lock', 'wb') as first, open(tmp_path / 'lock', 'wb') as second:
        locks.hold(first.fileno())
        with pytest.raises(BlockingIOError):
            locks.hold(second.fileno())
        first.close()
        locks.hold(second.fileno(), wait=True)


def test_a_folder_of_runs_is_no_run(tmp_path):
    (tmp_path / 'packed' / 'mine').mkdir(parents=True)
    (tmp_path / 'packed' / 'mine' / 'config.json').write_text('{}')
    with pytest.raises(UserError, match=r'no run in .*packed; below it there are .*mine$'):
        directory.saved_config(str(tmp_path / 'packed'))
