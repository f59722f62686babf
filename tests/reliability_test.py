"""Faults and mistakes, provoked for real: kills, signals, damaged files, full disks, not-a-numbers."""

from __future__ import annotations

import glob
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image
from support import ROOT, assert_same, devices, main, metrics, mistake, path, saved_state

from jaxgen import assembly, run
from jaxgen import config as configs
from jaxgen.main import run_main
from jaxgen.train import train

pytestmark = pytest.mark.slow  # compiles networks, trains or starts processes

FAMILIES = ('ddpm_digits', 'vae_digits', 'wgan_gp_digits')


def start(*args: str, env: dict | None = None) -> subprocess.Popen:
    """Starts the command in a process of its own; stderr is read by `ended`."""
    command = [sys.executable, '-u', '-m', 'jaxgen.main', *args]
    env = {**os.environ, **(env or {})}
    return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f'ended before its time: {process.communicate()[1][-2000:]}'
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.005)


def checkpoints(workdir) -> list[int]:
    folder = os.path.join(workdir, 'checkpoints')
    return sorted(int(d) for d in os.listdir(folder) if d.isdigit()) if os.path.isdir(folder) else []


STEPS = {'ddpm_digits': 60, 'vae_digits': 200}  # enough for a kill to land in the middle


def long_run(name: str, workdir, steps: int = 0, save_every: int = 10, **more) -> list[str]:
    fields = {'train.steps': steps or STEPS[name], 'train.save_every': save_every, 'train.log_every': 7, **more}
    return [f'--config={path(name)}', f'--workdir={workdir}', *(f'--config.{k}={v}' for k, v in fields.items())]


def check_equal_to_uninterrupted(name: str, workdir, tmp_path, **more) -> str:
    """Goes on with the run in `workdir` and compares it with one that was never stopped; its stderr."""
    done = main(*long_run(name, workdir, **more))
    assert done.returncode == 0, done.stderr
    assert 'going on from step' in done.stderr
    whole = str(tmp_path / 'whole')
    config, _, *fields = long_run(name, whole, **more)
    train(configs.override(configs.load(config.removeprefix('--config=')), fields), whole)
    assert_same(saved_state(whole, STEPS[name]), saved_state(workdir, STEPS[name]))
    assert metrics(whole) == metrics(workdir) and len(metrics(whole)) == STEPS[name] // 7
    return done.stderr


def test_killed_run_goes_on_as_if_nothing_had_been(tmp_path):
    """What is left of it is the loop's and the checkpoints' affair; DDPM is stopped by SIGTERM below."""
    name = 'vae_digits'
    workdir = tmp_path / 'run'
    process = start(*long_run(name, workdir))
    wait_for(lambda: checkpoints(workdir), process)
    process.kill()
    process.communicate()
    assert checkpoints(workdir)[-1] < STEPS[name], 'the kill came too late to test anything'
    check_equal_to_uninterrupted(name, workdir, tmp_path)


def test_sigterm_saves_and_goes_on_the_same(tmp_path):
    workdir = tmp_path / 'run'
    process = start(*long_run('ddpm_digits', workdir, save_every=1000))
    wait_for(lambda: os.path.exists(workdir / 'metrics.jsonl') and metrics(workdir), process)
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    (step,) = checkpoints(workdir)
    assert f'saved at step {step}' in stderr and 0 < step < 60
    stderr = check_equal_to_uninterrupted('ddpm_digits', workdir, tmp_path, save_every=1000)
    assert f'going on from step {step} of 60' in stderr


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signal_in_compilation_ends_at_once(number, tmp_path):
    # A rate of its own makes an update that is in no compilation cache.
    rate = {'optim.lr': 1e-3 + time.time_ns() % 10**9 * 1e-14, 'model.network.blocks': 2}
    process = start(*long_run('ddpm_digits', tmp_path / 'run', **rate), env={'JAX_LOG_COMPILES': '1'})
    for line in process.stderr:
        if 'MLIR module conversion jit(call)' in line:
            break
    time.sleep(0.5)
    assert process.poll() is None, 'nothing was compiled'
    began = time.monotonic()
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert time.monotonic() - began < 2, 'waited for the compile'
    assert 'Finished XLA compilation of jit(call)' not in stderr, 'the signal came too late to test anything'
    assert 'nothing to save' in stderr and not checkpoints(tmp_path / 'run')


def test_sigterm_in_sampling_saves(tmp_path):
    """While the grid of step 2 is drawn, which takes minutes."""
    more = {
        'train.sample_every': 2,
        'train.samples': 2048,
        'model.process.timesteps': 4000,
        'model.process.beta_end': 0.005,
        'sample.batch': 2048,
        'train.log_every': 1,
    }
    workdir = tmp_path / 'run'
    process = start(*long_run('ddpm_digits', workdir, save_every=1000, **more))
    wait_for(lambda: os.path.exists(workdir / 'metrics.jsonl') and len(metrics(workdir)) == 2, process)
    time.sleep(3)
    process.terminate()
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 75, stderr
    assert 'saved at step 2' in stderr and checkpoints(workdir) == [2]
    assert int(saved_state(workdir).step) == 2


def test_same_run_twice_and_several_updates_per_call(tmp_path):
    """Two runs of one config are equal bit for bit; several updates in one program agree to rounding."""
    base = {'steps': 6, 'save_every': 3, 'log_every': 3}
    from jaxgen.train import train

    states = []
    for i, k in enumerate((1, 1, 3)):
        config = configs.load(path('dcgan_digits')).to_dict()
        config = configs.make(**configs.deep_update(config, {'train': {**base, 'updates_per_call': k}}))
        train(config, str(tmp_path / str(i)))
        states.append(saved_state(tmp_path / str(i), 6))
    assert_same(states[0], states[1])
    for a, b in zip(jax.tree.leaves(states[0]), jax.tree.leaves(states[2]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_checkpoints_kept_and_a_trace_on_demand(tmp_path):
    # In a process of its own: a trace takes in all that its process ever compiled, here hundreds of programs.
    more = {'train.keep': 2, 'train.keep_every': 6, 'train.sample_every': 0}
    done = main(*long_run('vae_digits', tmp_path, 18, 2, **more), '--profile')
    assert done.returncode == 0, done.stderr
    assert checkpoints(tmp_path) == [6, 12, 16, 18]
    assert sorted(os.listdir(tmp_path / 'digests')) == ['12.json', '16.json', '18.json', '6.json']
    assert glob.glob(str(tmp_path / 'profile' / '**' / '*.xplane.pb'), recursive=True)


def test_layout_changes_on_resume_and_says_so(tmp_path, capfd):
    """Remat, updates per call and accumulation may change; the rest may not; and calls begin at their multiples."""
    first = {'train.sample_every': 0, 'train.log_every': 6}

    def go_on(workdir, steps, **more) -> str:
        assert run_main(['jaxgen', *long_run('vae_digits', workdir, steps, 6, **{**first, **more})]) == 0
        return capfd.readouterr().err

    def line(said: str) -> str:
        return next((line for line in said.splitlines() if 'bits may differ' in line), '')

    go_on(tmp_path / 'whole', 12)
    assert not line(go_on(tmp_path / 'run', 6))
    said = line(go_on(tmp_path / 'run', 12, **{'train.updates_per_call': 3, 'train.remat': True}))
    assert 'train.updates_per_call: 1 -> 3' in said and 'train.remat: False -> True' in said and 'noise' not in said
    for x, y in zip(*(jax.tree.leaves(saved_state(tmp_path / w, 12)) for w in ('whole', 'run')), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    said = line(go_on(tmp_path / 'run', 18, **{'optim.accumulate': 2}))
    assert 'optim.accumulate: 1 -> 2' in said and 'noise' in said
    for field, value in {'train.updates_per_call': 5, 'train.dtype': 'bfloat16'}.items():
        more = {**first, 'train.log_every': 5, field: value}
        assert run_main(['jaxgen', *long_run('vae_digits', tmp_path / 'run', 20, 5, **more)]) == 2
        assert field in capfd.readouterr().err


def test_several_updates_per_call_resume_bitwise(tmp_path):
    from jaxgen.train import train

    config = configs.load(path('vae_digits')).to_dict()
    base = {'steps': 8, 'save_every': 4, 'log_every': 4, 'updates_per_call': 2, 'sample_every': 0}
    whole = configs.make(**configs.deep_update(config, {'train': base}))
    part = configs.make(**configs.deep_update(config, {'train': {**base, 'steps': 4}}))
    train(whole, str(tmp_path / 'whole'))
    train(part, str(tmp_path / 'part'))
    train(whole, str(tmp_path / 'part'))
    assert_same(saved_state(tmp_path / 'whole', 8), saved_state(tmp_path / 'part', 8))
    assert metrics(tmp_path / 'whole') == metrics(tmp_path / 'part')


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A finished run with checkpoints of steps 2 and 4, to be copied and damaged."""
    workdir = tmp_path_factory.mktemp('trained')
    assert run_main(['jaxgen', f'--config={path("vae_digits")}', f'--workdir={workdir}']) == 0
    assert checkpoints(workdir) == [2, 4]
    return workdir


@pytest.fixture
def copy(trained, tmp_path):
    import shutil

    return shutil.copytree(trained, tmp_path / 'copy')


def biggest(workdir, step: int) -> str:
    files = glob.glob(os.path.join(workdir, 'checkpoints', str(step), '**', 'd', '*'), recursive=True)
    return max(files, key=os.path.getsize)


def flip_bit(file: str) -> None:
    with open(file, 'r+b') as f:
        f.seek(os.path.getsize(file) // 2)
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 1]))


def truncate(file: str) -> None:
    os.truncate(file, os.path.getsize(file) // 2)


def test_stray_file_and_missing_last_grid(copy, capfd):
    (copy / 'checkpoints' / '4' / '.DS_Store').write_text('a file manager was here')
    (copy / 'samples' / 'step_0000004.png').unlink()
    assert run_main(['jaxgen', f'--config={path("vae_digits")}', f'--workdir={copy}']) == 0
    assert 'damaged' not in capfd.readouterr().err
    assert (copy / 'samples' / 'step_0000004.png').exists()


@pytest.mark.parametrize('damage', [truncate, flip_bit, os.remove])
def test_damaged_checkpoint_the_one_before_is_used(damage, copy, capfd):
    before = saved_state(copy, 4)
    damage(biggest(copy, 4))
    args = ['jaxgen', f'--config={path("vae_digits")}', f'--workdir={copy}']
    assert run_main(['jaxgen', '--mode=sample', f'--workdir={copy}', '--n=1']) == 0
    assert 'step 4 is damaged' in capfd.readouterr().err
    assert checkpoints(copy) == [2, 4], 'sampling changed the checkpoints'
    assert run_main(args) == 0
    stderr = capfd.readouterr().err
    assert 'step 4 is damaged' in stderr and 'going on from step 2' in stderr
    assert_same(before, saved_state(copy, 4))
    aside, digest = sorted(os.listdir(copy / 'damaged'), key=len)
    assert digest == f'{aside}.json' and aside.startswith('4-'), 'the damaged one is kept aside, with its digest'


def test_truncated_without_digest(copy, capfd):
    """As a kill leaves it between the save and its digest, and then a torn file."""
    os.remove(copy / 'digests' / '4.json')
    for file in glob.glob(str(copy / 'checkpoints' / '4' / '**' / 'manifest.ocdbt'), recursive=True):
        truncate(file)
    assert run_main(['jaxgen', f'--config={path("vae_digits")}', f'--workdir={copy}']) == 0
    assert 'going on from step 2' in capfd.readouterr().err


def test_all_damaged_stops_and_starts_nothing(copy, capfd):
    for step in (2, 4):
        truncate(biggest(copy, step))
    assert run_main(['jaxgen', f'--config={path("vae_digits")}', f'--workdir={copy}']) == 1
    stderr = capfd.readouterr().err
    assert 'none of the checkpoints' in stderr and 'Traceback' not in stderr
    assert checkpoints(copy) == [2, 4]


def test_full_disk(tmp_path):
    """Files may not grow over a size that the first checkpoint keeps and a bigger one does not."""
    workdir = tmp_path / 'run'
    assert run_main(['jaxgen', f'--config={path("vae_digits")}', f'--workdir={workdir}', '--config.train.steps=2']) == 0
    good = saved_state(workdir, 2)

    args = [f'--config={path("vae_digits")}', f'--workdir={workdir}', '--config.train.sample_every=0']
    # The compilation cache is a file too.
    process = start(*args, env={'JAX_ENABLE_COMPILATION_CACHE': 'false'})
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4000, 4000))
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1, stderr
    assert 'could not be saved' in stderr and 'step 2 is intact' in stderr, stderr
    assert 'Traceback' not in stderr
    assert_same(good, saved_state(workdir, 2))
    done = main(*args)
    assert done.returncode == 0 and 'going on from step 2' in done.stderr, done.stderr


@pytest.mark.parametrize('name', FAMILIES)
def test_not_a_number_stops(name, tmp_path, capfd):
    """A learning rate that blows up after a while: the last good checkpoint is still finite."""
    networks = '' if name != 'wgan_gp_digits' else '--config.optim.networks.discriminator.lr=1e36'
    args = ['jaxgen', *long_run(name, tmp_path, steps=40, save_every=2), '--config.optim.name=sgd']
    rate = ['--config.optim.lr=1e36', *filter(None, [networks]), '--config.optim.warmup=0', '--config.optim.clip=0.0']
    assert run_main([*args, *rate]) == 1
    stderr = capfd.readouterr().err
    assert 'Traceback' not in stderr
    assert 'at step' in stderr and ('= nan' in stderr or '= inf' in stderr or 'not finite' in stderr), stderr
    for step in checkpoints(tmp_path):
        state = saved_state(tmp_path, step)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_not_a_number_after_a_checkpoint(tmp_path, capfd):
    """Resumed with weights that were finite, data turned bad: names the step, keeps the checkpoint."""
    from jaxgen import data
    from jaxgen.train import train

    config = configs.load(path('vae_digits'))
    config.train.steps = 6
    real = data.batches

    def poisoned(*args, start=0, **kwargs):
        for i, batch in enumerate(real(*args, start=start, **kwargs)):
            yield batch if start + i < 4 else {'image': np.full(batch['image'].shape, np.nan, np.float32)}

    from jaxgen.errors import RunError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, 'batches', poisoned)
        with pytest.raises(RunError, match=r'at step 5: stopped; the last good checkpoint is of step 4'):
            train(config, str(tmp_path))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(saved_state(tmp_path, 4)))


def test_second_training_in_one_directory_is_refused(tmp_path):
    process = start(*long_run('vae_digits', tmp_path, steps=100_000, save_every=1000))
    try:
        wait_for(lambda: os.path.exists(tmp_path / 'metrics.jsonl') and metrics(tmp_path), process)
        done = main(*long_run('vae_digits', tmp_path))
        assert done.returncode == 2 and 'another training is running' in done.stderr
    finally:
        process.kill()
        process.communicate()


# --- mistakes: one line, exit code 2, before any compile


TINY = f'--config={path("ddpm_digits")}'


@pytest.mark.parametrize(
    'args, message',
    [
        ([TINY, '--config.optim.lrate=1'], 'did you mean lr'),
        ([TINY, '--config.modle.channels=1'], 'did you mean model'),
        ([TINY, '--config.model.network.chanels=1'], 'did you mean channels'),
        ([TINY, '--config.model.network.channels=wide'], 'must be int'),
        ([TINY, '--config.model.network.multipliers=2'], 'must be tuple'),
        ([TINY, "--config.model.network.multipliers=('a',)"], 'tuple of int'),
        ([TINY, '--config.optim.lr=fast'], 'must be float'),
        ([TINY, '--config.optim.lr=-1.0'], 'more than 0'),
        ([TINY, '--config.optim.name=adamm'], 'must be one of'),
        ([TINY, '--config.train.steps'], 'needs a value: --config.train.steps=VALUE'),
        ([TINY, '--config.optim=3'], 'section'),
        ([TINY, '--config.train.updates_per_call=3'], 'multiple'),
        ([TINY, '--config.optim.accumulate=3'], 'multiple'),
        ([TINY, '--config.mesh.fsdp=3'], 'number of devices'),
        ([TINY, "--config.optim.networks={'denoser': {'lr': 1e-3}}"], 'did you mean denoiser'),
        ([TINY, "--config.optim.networks={'denoiser': {'lrr': 1e-3}}"], 'did you mean lr'),
        ([TINY, '--config.optim.networks=3'], 'config.optim.networks.NAME'),
        ([TINY, '--config.optim.networks.denoiser=3'], 'section with fields'),
        ([TINY, '--config.stages=runs/first'], 'config.stages.NAME'),
        ([TINY, "--config.data.box=('a', 0, 8, 8)"], '(top, left, height, width)'),
        ([TINY, '--config.seed=2147483648'], 'config.seed must be'),
        ([TINY, '--multihost'], 'JAX_COORDINATOR_ADDRESS'),
        ([TINY, f'--workdir={__file__}'], 'cannot be written to'),
        ([f'--config={path("ddpm_digits", "")}', '--config.data.size=9'], '9'),
        ([TINY, '--config.data.source=cifar11'], 'cifar1'),
        ([TINY, '--config.family=difusion'], 'did you mean diffusion'),
        ([TINY, '--mode=trane'], 'did you mean train'),
        ([TINY, '--sede=3'], 'sede'),
        ([TINY, 'train'], 'train'),
        ([TINY, '--n=lots', '--mode=sample'], 'n'),
        ([TINY, '--noprofile=1', '--mode=describe'], '--noprofile'),
        ([TINY, '--workdir=a\0b'], 'zero bytes'),
        (['--config=configs/ddpm_digit.py'], 'did you mean ddpm_digits.py'),
        (['--config=configs/ddpm_digits.py:tini'], 'did you mean tiny'),
        (['--config=README.md'], 'not a Python file'),
        ([], '--config'),
        (['--mode=sample'], '--workdir'),
        (['--mode=sample', '--workdir=/nonexistent'], 'no run in /nonexistent'),
        (['--mode=evaluate', '--workdir=/nonexistent'], 'no run in /nonexistent'),
    ],
)
def test_mistakes(args, message, capfd, tmp_path, monkeypatch, no_compile):
    monkeypatch.chdir(ROOT)
    if not any(a.startswith(('--workdir', '--mode')) for a in args):
        args = [*args, f'--workdir={tmp_path}/run']
    assert message in mistake(capfd, *args)


def test_a_real_process_exits_with_2_and_one_line_after_the_first(tmp_path):
    done = main(TINY, '--config.model.network.chanels=1', f'--workdir={tmp_path}')
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 2 and not done.stdout


def test_batch_must_divide_by_devices(tmp_path):
    done = main(TINY, f'--workdir={tmp_path}', env=devices(3))
    assert done.returncode == 2 and 'multiple of the number of devices, 3' in done.stderr, done.stderr
    assert done.stderr.count('error: ') == 1 and 'Traceback' not in done.stderr


@pytest.mark.parametrize(
    'text, message',
    [
        ('def get_config(variant=""):\n    return 1 / 0\n', 'ZeroDivisionError'),
        ('import nonexistent_module\n', 'nonexistent_module'),
        ('x = 1\n', 'get_config'),
        ('def get_config(:\n', 'SyntaxError'),
        ('def get_config(variant=""):\n    return 3\n', 'get_config'),
        (
            'from jaxgen.config import make\ndef get_config(v=""):\n    return make(v, family="diffusion", modle={})\n',
            'model',
        ),
        ('from jaxgen.config import make\ndef get_config(v=""):\n    return make(v, data={})\n', 'family'),
    ],
)
def test_broken_config_files(text, message, capfd, tmp_path, no_compile):
    file = tmp_path / 'broken.py'
    file.write_text(text)
    assert message in mistake(capfd, f'--config={file}', f'--workdir={tmp_path}/run')


def image_folder(tmp_path, n: int = 40):
    folder = tmp_path / 'images'
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (12 + i % 5, 10, 3), np.uint8)).save(folder / f'{i:03d}.png')
    return folder


def test_folders_that_cannot_be_used(capfd, tmp_path, no_compile):
    base = [TINY, f'--workdir={tmp_path}/run', f'--config.data.dir={tmp_path}/prepared']
    empty = tmp_path / 'empty'
    empty.mkdir()
    assert str(empty) in mistake(capfd, *base, f'--config.data.source=folder:{empty}')
    assert 'nowhere' in mistake(capfd, *base, f'--config.data.source=folder:{tmp_path}/nowhere')
    (empty / 'notes.txt').write_text('no image')
    assert str(empty) in mistake(capfd, *base, f'--config.data.source=folder:{empty}')
    folder = image_folder(tmp_path)
    for i in range(5):
        file = folder / f'bad{i}.jpg'
        Image.new('RGB', (64, 64)).save(file)
        truncate(str(file))
    stderr = mistake(capfd, *base, f'--config.data.source=folder:{folder}')
    assert 'bad' in stderr and 'max_corrupt' in stderr


def test_folder_of_all_kinds_trains(capfd, tmp_path):
    """Every mode and size that a person's folder may hold, and one torn file, fewer than config.data.max_corrupt."""
    folder = image_folder(tmp_path)
    for mode in ('L', 'LA', 'P', 'RGBA', '1'):
        Image.new(mode, (9, 30)).save(folder / f'mode_{mode}.png')
    Image.new('CMYK', (20, 20), (10, 20, 30, 40)).save(folder / 'cmyk.jpg')
    Image.fromarray(np.full((7, 7), 40_000, np.uint16)).save(folder / 'deep.png')
    Image.new('RGB', (1, 1), (1, 2, 3)).save(folder / 'one_pixel.png')
    torn = folder / 'torn.jpg'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(torn)
    truncate(str(torn))
    args = [TINY, f'--workdir={tmp_path}/run', f'--config.data.dir={tmp_path}/prepared']
    fields = [f'--config.data.source=folder:{folder}', '--config.data.max_corrupt=0.05', '--config.data.channels=3']
    assert run_main(['jaxgen', *args, *fields]) == 0
    stderr = capfd.readouterr().err
    assert 'torn.jpg' in stderr
    assert checkpoints(tmp_path / 'run')[-1] == 4


def test_resume_with_another_config_names_the_field(copy, capfd):
    base = [f'--config={path("vae_digits")}', f'--workdir={copy}']
    assert 'model.latent' in mistake(capfd, *base, '--config.model.latent=7')
    assert 'optim.lr' in mistake(capfd, *base, '--config.optim.lr=0.5')
    assert 'data.batch' in mistake(capfd, *base, '--config.data.batch=16')
    # Fields of the number of updates, of intervals and of measuring may change.
    more = ['--config.train.steps=5', '--config.train.log_every=5', '--config.model.iwae_samples=2']
    assert run_main(['jaxgen', *base, *more]) == 0
    assert checkpoints(copy)[-1] == 5
    capfd.readouterr()
    # Where the learning rate falls to 0 at the last update, that one is part of what an update computes.
    assert 'train.steps' in mistake(capfd, *base, '--config.train.steps=6', '--config.optim.schedule=linear')


def test_weights_of_another_model_are_named(copy, capfd):
    config = json.loads((copy / 'config.json').read_text())
    config['model']['latent'] = 7
    (copy / 'config.json').write_text(json.dumps(config))
    stderr = mistake(capfd, '--mode=sample', f'--workdir={copy}')
    assert 'another model' in stderr and 'coder' in stderr
    for damaged in (b'{', b'{"seed": "\xff"}'):
        (copy / 'config.json').write_bytes(damaged)
        assert 'damaged' in mistake(capfd, '--mode=sample', f'--workdir={copy}')


def test_conditions_that_do_not_exist(copy, capfd):
    assert 'no condition' in mistake(capfd, '--mode=sample', f'--workdir={copy}', '--condition=label=3')
    assert 'no condition' in mistake(capfd, '--mode=sample', f'--workdir={copy}', '--condition=label=three')


def test_samples_that_are_not_numbers_stop(trained):
    import dataclasses

    import jaxgen.run
    from jaxgen.errors import RunError

    run = jaxgen.run.load(str(trained), all_weights=True)
    broken = run.state.replace(ema=jax.tree.map(lambda x: x * np.nan, run.state.ema))
    with pytest.raises(RunError, match='sample 0 is not finite'):
        dataclasses.replace(run, state=broken).sample(n=2)
    with pytest.raises(RunError, match='not finite for example 0'):
        dataclasses.replace(run, state=broken).evaluate()


def test_no_checkpoint_yet(copy, capfd):
    import shutil

    shutil.rmtree(copy / 'checkpoints')
    assert 'no checkpoint yet' in mistake(capfd, '--mode=sample', f'--workdir={copy}')


def several_hosts(count: int, *args: str, each: int = 1) -> list[subprocess.Popen]:
    """The command on so many hosts of `each` devices."""
    import socket

    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    common = {
        'JAX_NUM_PROCESSES': str(count),
        'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}',
        'JAX_CPU_COLLECTIVES_IMPLEMENTATION': 'gloo',
        **(devices(each) if each > 1 else {}),
    }
    return [start('--multihost', *args, env={**common, 'JAX_PROCESS_ID': str(i)}) for i in range(count)]


def two_hosts(*args: str) -> list[subprocess.Popen]:
    """The command on two hosts of one device each."""
    return several_hosts(2, *args)


def one_line(process: subprocess.Popen, seconds: float = 120) -> str:
    """The line with which a host ends that has lost another, without a traceback."""
    _, stderr = process.communicate(timeout=seconds)
    assert process.returncode == 1 and 'Traceback' not in stderr, stderr
    (message,) = (line for line in stderr.splitlines() if 'jaxgen: stopped' in line)
    return message


@pytest.mark.slow
def test_killed_hosts_and_other_numbers_of_hosts(tmp_path):
    """Four devices on 1, 2 and 4 hosts, weights cut over two, hosts killed at any moment: the end is that of a training
    that nothing befell. On the same hosts it is so bit for bit; on others, whose sums are of other order, to rounding.
    """
    chance, more = random.Random(0), {'mesh.fsdp': 2, 'model.hidden': (128, 64), 'train.sample_every': 0}
    steps = 300

    def command(workdir) -> list[str]:
        return long_run('vae_digits', workdir, steps, 25, **more)

    def whole(workdir, hosts: int) -> None:
        for process in several_hosts(hosts, *command(workdir), each=4 // hosts):
            _, stderr = process.communicate(timeout=400)
            assert process.returncode == 0, stderr

    def killed(workdir, hosts: int, lost: tuple[int, ...]) -> None:
        """Some of the hosts are killed once a new checkpoint is there, and after a while of any length."""
        before, processes = checkpoints(workdir), several_hosts(hosts, *command(workdir), each=4 // hosts)
        wait_for(lambda: checkpoints(workdir)[-1:] != before[-1:], processes[0], 400)
        time.sleep(chance.uniform(0, 0.3))
        for i in lost:
            processes[i].kill()
        for i, process in enumerate(processes):
            if i in lost:
                process.communicate()
            else:
                assert 'the same command' in one_line(process)
        assert checkpoints(workdir)[-1] < steps, 'the training had ended before'

    whole(tmp_path / 'whole', 2)
    killed(tmp_path / 'same', 2, (1,))
    killed(tmp_path / 'same', 2, (0, 1))
    whole(tmp_path / 'same', 2)
    expected = saved_state(tmp_path / 'whole', steps)
    assert_same(expected, saved_state(tmp_path / 'same', steps))
    assert metrics(tmp_path / 'whole') == metrics(tmp_path / 'same')

    killed(tmp_path / 'others', 2, (0,))
    killed(tmp_path / 'others', 4, (2,))
    done = main(*command(tmp_path / 'others'), env=devices(4))
    assert done.returncode == 0 and 'going on from step' in done.stderr, done.stderr
    for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(saved_state(tmp_path / 'others', steps)), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-3, atol=1e-4)


def test_two_hosts_equal_one(tmp_path):
    """Two processes with a device each train like one process with two."""
    one, two = tmp_path / 'one', tmp_path / 'two'
    for process in two_hosts(*long_run('vae_digits', two, steps=20)):
        _, stderr = process.communicate(timeout=180)
        assert process.returncode == 0, stderr
    done = main(*long_run('vae_digits', one, steps=20), env=devices(2))
    assert done.returncode == 0, done.stderr
    a, b = saved_state(one, 20), saved_state(two, 20)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_hosts_stop_early_at_one_step(tmp_path):
    """One decides for both; the second start knows that the training has ended."""
    more = {'data.validation_fraction': 0.2, 'train.held_out_every': 2, 'train.stop_on': 'validation/kl'}
    command = long_run('vae_digits', tmp_path, steps=60, **more, **{'train.patience': 2, 'optim.lr': 0.1})
    for _ in range(2):
        said = []
        for process in two_hosts(*command):
            _, stderr = process.communicate(timeout=180)
            assert process.returncode == 0, stderr
            said.append(stderr)
        values = {line['step']: line['validation/kl'] for line in metrics(tmp_path) if 'validation/kl' in line}
        best = min(values, key=values.get)
        assert max(values) == best + 4 < 60, values
        assert f'stopped early at step {best + 4} of 60' in said[0]
        assert checkpoints(tmp_path)[-1] == best + 4 and best in checkpoints(tmp_path)


def test_hosts_stop_together(tmp_path):
    """SIGTERM to one of two: both stop, at one step, and it is saved."""
    hosts = two_hosts(*long_run('vae_digits', tmp_path, steps=1_000_000, save_every=1_000_000))
    wait_for(lambda: os.path.exists(tmp_path / 'metrics.jsonl') and metrics(tmp_path), hosts[0])
    hosts[1].terminate()
    for process in hosts:
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 75, stderr
    (step,) = checkpoints(tmp_path)
    assert f'saved at step {step};' in stderr and int(saved_state(tmp_path).step) == step


def test_an_average_of_mostly_initial_weights_is_announced(tmp_path, capfd):
    """0.9999 after 4 updates is 99.96 % initial; under warm-up and with no average there is no line."""
    workdir = str(tmp_path / 'run')
    common = (f'--config={path("autoencoder_digits")}', f'--workdir={workdir}')
    assert run_main(['jaxgen', *common, '--config.optim.ema=0.9999', '--config.optim.ema_warmup=False']) == 0
    line = 'WARNING: after 4 updates 100 % of the averaged weights (config.optim.ema)'
    assert line in (stderr := capfd.readouterr().err) and 'ema_warmup' in stderr
    loaded = run.load(workdir)
    assert line in capfd.readouterr().err
    run.load(workdir, weights='params')
    assert 'WARNING' not in capfd.readouterr().err
    for fields in (dict(ema_warmup=True), dict(ema=0.0), dict(ema=0.4)):
        changed = configs.make(**configs.deep_update(loaded.config.to_dict(), {'optim': fields}))
        assembly.say_if_initial(workdir, changed, 4, False)
    assert 'WARNING' not in capfd.readouterr().err


def test_lost_host_is_named(tmp_path):
    """SIGKILL to one of two; then to the one that runs the service, which the other notices by other means."""
    for lost in (1, 0):
        workdir = tmp_path / str(lost)
        hosts = two_hosts(*long_run('vae_digits', workdir, steps=1_000_000, save_every=5))
        wait_for(lambda workdir=workdir: checkpoints(workdir), hosts[0])
        hosts[lost].kill()
        hosts[lost].communicate()
        _, stderr = hosts[1 - lost].communicate(timeout=60)
        assert hosts[1 - lost].returncode == 1, stderr
        (message,) = (line for line in stderr.splitlines() if 'jaxgen: stopped' in line)
        assert f'host {lost} (' in message and 'the same command' in message and 'Traceback' not in stderr, stderr


def test_two_reasons_to_leave_are_one_line():
    code = (
        'import threading\nfrom jaxgen import interrupt\nstart = threading.Barrier(8)\n'
        'def leave(i):\n    start.wait()\n    interrupt.leave(f"reason {i}", 1)\n'
        'threads = [threading.Thread(target=leave, args=(i,)) for i in range(8)]\n'
        '[t.start() for t in threads]\n[t.join() for t in threads]\n'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 1 and done.stderr.count('jaxgen: reason') == 1, done.stderr


def test_hosts_that_never_join(tmp_path):
    """A host that is lost before it joined: the others end with one line, without JAX's own messages."""
    code = (
        'import functools, sys, jax\nfrom jaxgen import hosts, main\ninitialize = jax.distributed.initialize\n'
        'def soon(heartbeat_timeout_seconds=60, **given): initialize(**given, initialization_timeout=2)\n'
        'jax.distributed.initialize = soon\nhosts.leave(main.run_main(sys.argv))\n'
    )
    env = {'JAX_NUM_PROCESSES': '2', 'JAX_COORDINATOR_ADDRESS': '127.0.0.1:9', 'JAX_PROCESS_ID': '1'}
    args = [f'--config={path("vae_digits")}', f'--workdir={tmp_path}', '--multihost']
    done = subprocess.run(
        [sys.executable, '-c', code, *args],
        capture_output=True, text=True, cwd=ROOT, timeout=120, env={**os.environ, **env, 'TF_CPP_MIN_LOG_LEVEL': '3'},
    )  # fmt: skip
    assert done.returncode == 1 and 'the 2 hosts have not all joined' in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_another_jax_has_hosts_all_the_same(monkeypatch, capfd):
    """Its private modules may lie elsewhere, and `initialize` may not know the limit."""
    from jaxgen import hosts

    given = {}
    monkeypatch.setattr(jax.distributed, 'initialize', lambda **more: given.update(more))
    monkeypatch.setitem(sys.modules, 'jax._src.distributed', None)
    monkeypatch.delattr(jax._src, 'distributed')
    for name, value in (('COORDINATOR_ADDRESS', 'host:1'), ('NUM_PROCESSES', '2'), ('PROCESS_ID', '1')):
        monkeypatch.setenv(f'JAX_{name}', value)
    hosts.start()
    assert given['process_id'] == 1 and hosts._heartbeats is None
    assert capfd.readouterr().err.count('a lost host is not named') == 1


NAMES = ('run[1]', 'back\\slash', '*', '**', '?', '{a,b}', '%20', 'two words', 'ü€', 'new\nline', '-x', 'gs:')


def small_state(step: int):
    """(State of a few numbers, mesh)."""
    from jaxgen import sharding
    from jaxgen.contract import State

    mesh = sharding.make_mesh(1, jax.devices()[:1])
    weights = {'a': {'kernel': step * jax.numpy.arange(6.0).reshape(2, 3)}}
    state = State(step=jax.numpy.int32(step), params=weights, opt={'a': ({}, (jax.numpy.ones(()),))}, ema=weights)
    return jax.device_put(state, sharding.replicated(mesh)), mesh


def small_run(workdir) -> None:
    """Checkpoints of steps 2 and 4."""
    from jaxgen.checkpoint import Checkpoints

    writer = Checkpoints(workdir, keep=2)
    for step in (2, 4):
        writer.save(small_state(step)[0], {})
    writer.close()


def restored(workdir, keep: int = 0, save: int = 0) -> int:
    """The step that a small run goes on from, its numbers looked at; saves another step after it on request."""
    from jaxgen.checkpoint import Checkpoints

    state, mesh = small_state(2)
    checkpoints = Checkpoints(workdir, keep=keep)
    newest, _ = checkpoints.restore(jax.eval_shape(lambda: state), mesh)
    assert_same(jax.device_get(small_state(int(newest.step))[0]), jax.device_get(newest))
    if save:
        checkpoints.save(small_state(save)[0], {})
    checkpoints.close()
    return int(newest.step)


@pytest.mark.parametrize('name', [*NAMES, '\udcff', 'run[1]/inner', 'plain/'])
def test_what_was_saved_is_there_under_any_path(name, tmp_path):
    (tmp_path / 'link').symlink_to(tmp_path)
    small_run(f'{tmp_path}/link/{name}')
    assert restored(f'{tmp_path}/{name}') == 4
    assert sorted(os.listdir(f'{tmp_path}/{name}/digests')) == ['2.json', '4.json']


def test_a_saved_meter_is_not_changed_by_later_updates():
    """Saving goes on beside the next updates, which add to the meter."""
    from jaxgen.log import Meter

    meter = Meter()
    meter.add({'loss': 1.0})
    saved = meter.state()
    meter.add({'loss': 5.0})
    assert saved == {'count': 1, 'sums': {'loss': 1.0}}


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    'damage, step',
    [
        (lambda run: (run / 'checkpoints/7').write_text('a file'), 4),
        (lambda run: (run / 'checkpoints/9').mkdir(), 4),
        (lambda run: os.rename(run / 'checkpoints/4', run / 'checkpoints/11'), 2),
        (lambda run: replace_by_folder(run / 'digests/4.json'), 2),
        (lambda run: (run / 'digests/1.json').mkdir(), 4),
        (lambda run: (run / 'digests/notes.txt').write_text('of the person'), 4),
        (lambda run: (run / 'digests/4.json').write_text('[' * 100_000), 2),
        (lambda run: os.mkfifo(run / 'checkpoints/4/ema/pipe'), 2),
        (lambda run: replace_by_folder(run / 'checkpoints/4/ema/_METADATA'), 2),
    ],
)
def test_a_training_goes_on_beside_whatever_lies_there(damage, step, tmp_path):
    small_run(tmp_path)
    damage(tmp_path)
    strange = [name for name in ('7', '1.json', 'notes.txt') if list(tmp_path.glob(f'*/{name}'))]
    assert restored(tmp_path) == step  # reading changes nothing
    assert restored(tmp_path, keep=2, save=6) == step
    assert restored(tmp_path) == 6
    assert all(list(tmp_path.glob(f'*/{name}')) for name in strange)


@pytest.mark.parametrize('part', ['', 'ema'])
def test_a_checkpoint_that_goes_while_it_is_read(part, tmp_path, monkeypatch):
    """A training beside the reader saved a newer one and removed this one."""
    import shutil

    from jaxgen.checkpoint import Checkpoints

    small_run(tmp_path)
    read = Checkpoints.read

    def beside(self, step, *args):
        folder = tmp_path / 'checkpoints'
        if step == 4:
            shutil.copytree(folder / '2', folder / '6')
            (folder / '6/about/metadata').write_text((folder / '2/about/metadata').read_text().replace('2', '6', 1))
            shutil.rmtree(folder / '4' / part)
        return read(self, step, *args)

    monkeypatch.setattr(Checkpoints, 'read', beside)
    state, mesh = small_state(2)
    newest, about = Checkpoints(tmp_path).restore(jax.eval_shape(lambda: state), mesh)
    assert int(newest.step) == about['step'] == 6


def test_a_save_that_cannot_be_read_back_is_a_fault(tmp_path, monkeypatch):
    """As where the library looked for its files under another path: it only warned."""
    from jaxgen import checkpoint

    monkeypatch.setattr(checkpoint, 'count_arrays', lambda folder: 0)
    with pytest.raises(checkpoint.RunError, match='0 can be read back'):
        train(configs.load(path('vae_digits')), str(tmp_path))


@pytest.mark.parametrize('name', ['checkpoints', 'checkpoints/4', 'digests', 'digests/4.json', 'metrics.jsonl'])
def test_links_out_of_a_run_are_refused(name, copy, tmp_path, capfd):
    os.rename(copy / name, tmp_path / 'outside')
    (copy / name).symlink_to(tmp_path / 'outside')
    assert 'is a link to' in mistake(capfd, f'--config={path("vae_digits")}', f'--workdir={copy}')


def test_nothing_is_written_through_a_link(copy, tmp_path):
    (tmp_path / 'outside').write_text('kept')
    for name in ('config.json.new', 'metrics.jsonl.new'):
        (copy / name).symlink_to(tmp_path / 'outside')
    args = [f'--config={path("vae_digits")}', f'--workdir={copy}', '--config.train.steps=5']
    assert run_main(['jaxgen', *args]) == 0
    assert (tmp_path / 'outside').read_text() == 'kept' and (copy / 'digests' / '5.json').exists()


@pytest.mark.parametrize('digest', ['', '[]', '{"../../config.json": "00"}', '{"a'])
def test_digests_that_are_none(digest, copy, capfd):
    (copy / 'digests' / '4.json').write_text(digest)
    assert run_main(['jaxgen', f'--config={path("vae_digits")}', f'--workdir={copy}']) == 0
    assert 'going on from step 2' in capfd.readouterr().err


def test_metrics_with_torn_and_foreign_lines(tmp_path, capfd):
    from jaxgen import log

    file = tmp_path / 'metrics.jsonl'
    foreign = ['{"step"', '[1]', '{"loss": 3}', '{"step": "x"}']
    lines = ['{"step": 1, "loss": 2.0}', *foreign, '{"step": 2}', '{"step": 9}', '{"step": 3}']
    file.write_text('\n'.join(lines))
    log.cut_back(str(file), 3)
    assert [json.loads(line)['step'] for line in file.read_text().splitlines()] == [1, 2, 3]
    assert file.read_text().endswith('\n') and '4 lines' in capfd.readouterr().err


def test_full_disk_of_metrics_and_events(copy, capfd, monkeypatch):
    """Where the disk is full before a checkpoint is due: /dev/full is one whose every write fails."""
    from jaxgen import log

    def full(writer, step, means):
        os.write(os.open('/dev/full', os.O_WRONLY), b'x')

    monkeypatch.setattr(log.Writer, 'line', full)
    args = [f'--config={path("vae_digits")}', f'--workdir={copy}', '--config.train.steps=8']
    assert run_main(['jaxgen', *args, '--config.train.log_every=1']) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert 'the disk is full' in last and 'step 4 is intact' in last

    board = log.summary_writer(str(copy / 'tensorboard'))
    writer = board.file_writer.event_writer._ev_writer
    with open('/dev/full', 'wb', buffering=0) as nowhere:
        monkeypatch.setattr(writer._py_recordio_writer, '_writer', nowhere)
        for i in range(50):  # more than its queue holds: nobody waits for ever
            board.add_scalar('loss', 1.0, i)
        board.close()
    stderr = capfd.readouterr().err
    assert stderr.count('events cannot be written') == 1 and 'Traceback' not in stderr


def test_failed_save_leaves_later_signals_working():
    code = (
        'import os, signal, time\nfrom jaxgen import interrupt\n'
        'signal.signal(signal.SIGHUP, signal.SIG_DFL)\ninterrupt.install()\ncalls = []\n'  # nohup ignores it
        'def save():\n    calls.append(1)\n    if len(calls) == 1: raise OSError("full")\n'
        '    interrupt.leave("saved")\n'
        'with interrupt.on_signal(save):\n'
        '    for number in (signal.SIGTERM, signal.SIGHUP):\n        os.kill(os.getpid(), number); time.sleep(0.5)\n'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 75 and 'WARNING: full' in done.stderr and 'Traceback' not in done.stderr, done.stderr


def test_a_closed_terminal_saves(tmp_path):
    """The terminal's end is SIGHUP, and from then on writing to it fails."""
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, '-u', '-m', 'jaxgen.main', *long_run('vae_digits', tmp_path, 1_000_000, 1_000_000)]
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, by what we start too
    process = subprocess.Popen(command, cwd=ROOT, stderr=theirs, start_new_session=True)
    signal.signal(signal.SIGHUP, before)
    os.close(theirs)
    try:
        end = time.monotonic() + 120
        while not (os.path.exists(tmp_path / 'metrics.jsonl') and metrics(tmp_path)):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.05)
        os.close(ours)
        process.send_signal(signal.SIGHUP)
        assert process.wait(60) == 75 and len(checkpoints(tmp_path)) == 1
    finally:
        process.kill()
        process.wait()
