"""jaxgen in a program or a notebook: configs by name, training with callbacks, in threads, and interrupted."""

from __future__ import annotations

import inspect
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from support import ROOT, assert_same, metrics, path, saved_state

import jaxgen
from jaxgen import config as configs
from jaxgen import library
from jaxgen.errors import RunError, UserError

STEPS = 4


@pytest.fixture(scope='module')
def config():
    return jaxgen.config(path('vae_digits'), train={'steps': STEPS, 'log_every': 2, 'save_every': 4})


@pytest.fixture(scope='module')
def plain(config, tmp_path_factory):
    """A run that nothing interrupted and nobody watched."""
    workdir = str(tmp_path_factory.mktemp('library') / 'plain')
    return jaxgen.train(config, workdir)


@pytest.mark.slow
def test_import_is_light():
    code = (
        "import sys, jaxgen; assert 'jax' not in sys.modules; assert 'config' in dir(jaxgen); jaxgen.config; "
        "jaxgen.errors.UserError; assert 'jax' not in sys.modules; jaxgen.metrics, jaxgen.data, "
        "jaxgen.compilation.use; print(jaxgen.config('vae_digits:tiny').family)"
    )
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == 'vae\n', done.stderr


# --- configs


@pytest.mark.parametrize('name', ['vae_digits:tiny', path('vae_digits'), pathlib.Path(path('vae_digits'))])
def test_config_by_name_file_or_path(name):
    assert jaxgen.config(name) == configs.load(path('vae_digits'))


@pytest.mark.parametrize(
    'overrides',
    [
        {'optim': {'lr': 1e-2}, 'model': {'beta': 2.0}},
        {'optim.lr': 1e-2, 'model.beta': 2},
        {'optim': {'lr': np.float64(1e-2)}, 'model': {'beta': np.int64(2)}},
    ],
)
def test_overrides_are_those_of_the_command_line(overrides):
    base = configs.load(path('vae_digits'))
    expected = configs.override(base, ['--config.optim.lr=1e-2', '--config.model.beta=2.0'])
    assert jaxgen.config(base, **overrides) == jaxgen.config(path('vae_digits'), **overrides) == expected


def test_a_component_and_its_field():
    changed = jaxgen.config(path('ddpm_digits'), **{'model.sampler': 'heun', 'model.sampler.steps': 7})
    assert (changed.model.sampler.name, changed.model.sampler.steps) == ('heun', 7)


def test_a_config_of_defaults_and_a_few_fields():
    fields = {'family': 'vae', 'data': {'source': 'digits'}, 'data.keep_classes': range(3)}
    assert jaxgen.config(fields) == jaxgen.config(**fields) and jaxgen.config(fields).data.keep_classes == (0, 1, 2)
    assert jaxgen.config(family='vae', data={'source': 'shapes', 'size': 16, 'channels': 3}).data.size == 16


@pytest.mark.parametrize(
    'name, overrides, message',
    [
        ('vae_digit', {}, 'no config .*did you mean vae_digits'),
        ('vae_digits', {'lr': 1e-3}, 'config.lr: no such field'),
        ('vae_digits', {'optim.lrate': 1e-3}, 'did you mean lr'),
        ('vae_digits', {'optim': {'lr': '1e-3'}}, 'config.optim.lr must be float'),
        ('vae_digits', {'optim': {'lr': 1e-3}, 'optim.lr': 1e-4}, 'config.optim.lr is given twice'),
        ('vae_digits', {'optim.': 1}, "a field is named by a text like 'optim.lr'"),
        ('', {'data': {'size': 16}}, 'config.family is missing'),
        (7, {}, "named by a text like 'ddpm_digits'"),
    ],
)
def test_mistakes_are_one_line(name, overrides, message):
    with pytest.raises(UserError, match=message) as e:
        jaxgen.config(name, **overrides)
    assert '\n' not in str(e.value)


@pytest.mark.slow
def test_what_is_passed_on_takes_the_same():
    """`import jaxgen` is without jax, so its function stands for that of library.py, and has the same parameters."""
    short, whole = (inspect.signature(module.import_weights).parameters for module in (jaxgen, library))
    assert {*short} == {*whole}


def test_list_configs():
    entries = jaxgen.list_configs('vae', 'DIGITS')
    assert {'vae_digits', 'conditional_vae_digits'} <= {entry.name for entry in entries}
    assert all('digits' in ' '.join(entry).lower() for entry in entries)
    assert not jaxgen.list_configs('nothing has this word')


# --- training


def test_callbacks_see_the_lines_and_change_nothing(config, plain, tmp_path):
    """They may draw, and change what they are given."""
    seen = []

    def callback(step, logs, run):
        seen.append((step, dict(logs), run.step, run.sample(2)))
        logs.clear()

    workdir = str(tmp_path / 'watched')
    run = jaxgen.train(config, workdir, callbacks=[callback])
    assert_same(saved_state(workdir), saved_state(plain.workdir))
    lines = metrics(workdir)
    assert lines == metrics(plain.workdir)
    assert [(step, logs) for step, logs, *_ in seen] == [
        (line['step'], {k: v for k, v in line.items() if k not in ('step', 'examples')}) for line in lines
    ]
    for step, _, at, _ in seen:
        assert step <= at <= step + 1, 'the weights are those of the line, or of the next call'
    np.testing.assert_array_equal(seen[-1][3], run.sample(2))
    assert run.step == STEPS


@pytest.mark.slow
def test_the_returned_run_is_the_saved_one(plain):
    loaded = jaxgen.load(pathlib.Path(plain.workdir))
    assert_same((plain.state.ema, plain.state.extra, plain.step), (loaded.state.ema, loaded.state.extra, loaded.step))
    np.testing.assert_array_equal(plain.sample(3), loaded.sample(3))
    assert plain.config == loaded.config and plain.evaluate() == loaded.evaluate()


@pytest.mark.slow
def test_evaluation_mixes_no_weights_of_two_trainings(config, plain, tmp_path, monkeypatch):
    """What sampling does not need is read when it is needed: by then the directory may hold another training."""
    workdir = str(tmp_path / 'run')
    shutil.copytree(plain.workdir, workdir)
    loaded = jaxgen.load(workdir)
    assert loaded.evaluate() == plain.evaluate()
    monkeypatch.chdir(tmp_path)
    relative = jaxgen.load('run')
    monkeypatch.chdir('/')
    assert relative.evaluate() == plain.evaluate() and relative.changes() == {}
    jaxgen.train(jaxgen.config(config, **{'train.steps': STEPS + 4, 'train.keep': 1}), workdir)
    with pytest.raises(UserError, match='has gone on to step 8'):
        loaded.evaluate()
    shutil.rmtree(workdir)
    jaxgen.train(jaxgen.config(config, seed=3), workdir)
    with pytest.raises(UserError, match='has been trained anew'):
        loaded.evaluate()
    assert len(loaded.sample(3)) == 3


@pytest.mark.slow
def test_a_view_is_gone_with_the_next_update(config, tmp_path):
    kept = []
    jaxgen.train(config, str(tmp_path / 'run'), callbacks=[lambda step, logs, run: kept.append(run)])
    with pytest.raises(UserError, match='the training has gone on'):
        kept[0].sample(2)


def test_what_a_callback_raises_is_raised_once_the_state_is_saved(config, plain, tmp_path, capfd):
    class Pruned(Exception):
        pass

    def callback(step, logs, run):
        raise Pruned('no good')

    workdir = str(tmp_path / 'run')
    with pytest.raises(Pruned, match='no good'):
        jaxgen.train(config, workdir, callbacks=[callback])
    lines = [line for line in capfd.readouterr().err.splitlines() if 'a callback' in line]
    assert len(lines) == 1 and 'stopped and saved at step 3' in lines[0]
    assert os.listdir(os.path.join(workdir, 'checkpoints')) == ['3']
    jaxgen.train(config, workdir)
    assert_same(saved_state(workdir, STEPS), saved_state(plain.workdir, STEPS))
    assert metrics(workdir) == metrics(plain.workdir)


@pytest.mark.parametrize('callbacks', [print, [3], 'no functions'])
def test_callbacks_are_a_list_of_functions(callbacks, config, tmp_path, no_compile):
    with pytest.raises(UserError, match='callbacks must be a list of functions'):
        jaxgen.train(config, str(tmp_path / 'run'), callbacks=callbacks)


def test_a_config_without_a_name_needs_a_directory(config, no_compile):
    with pytest.raises(UserError, match="name the run's directory"):
        jaxgen.train(config)


@pytest.fixture
def ctrl_c():
    """Ctrl-C has its usual course, also in a process that was started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_saves_and_takes_its_course(config, plain, ctrl_c, tmp_path):
    """Ctrl-C raises KeyboardInterrupt, and the program goes on; a handler of the program's own is called."""
    workdir, handlers = str(tmp_path / 'run'), [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    received = []
    before = signal.signal(signal.SIGTERM, lambda *_: received.append('SIGTERM'))
    try:
        with pytest.raises(RunError, match='stopped and saved at step 3'):
            jaxgen.train(config, str(tmp_path / 'other'), callbacks=[lambda *_: signal.raise_signal(signal.SIGTERM)])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == ['SIGTERM']
    with pytest.raises(KeyboardInterrupt):
        jaxgen.train(config, workdir, callbacks=[lambda *_: signal.raise_signal(signal.SIGINT)])
    assert os.listdir(os.path.join(workdir, 'checkpoints')) == ['3']
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert jaxgen.train(config, workdir).step == STEPS
    assert_same(saved_state(workdir, STEPS), saved_state(plain.workdir, STEPS))


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(config, ctrl_c, tmp_path):
    reached = []

    def twice(step, logs, run):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        reached.append(step)

    with pytest.raises(KeyboardInterrupt):
        jaxgen.train(config, str(tmp_path / 'run'), callbacks=[twice])
    assert not reached


@pytest.mark.slow
def test_trainings_in_threads(config, plain, tmp_path):
    """Two at once, each in its own directory; signals are left to the main thread."""
    trained = []

    def train(name):
        trained.append(jaxgen.train(config, str(tmp_path / name)))

    handler = signal.getsignal(signal.SIGINT)
    threads = [threading.Thread(target=train, args=(name,)) for name in ('a', 'b')]
    for thread in threads:
        thread.start()
    assert signal.getsignal(signal.SIGINT) is handler
    for thread in threads:
        thread.join()
    assert len(trained) == 2
    for name in ('a', 'b'):
        assert_same(saved_state(str(tmp_path / name), STEPS), saved_state(plain.workdir, STEPS))
