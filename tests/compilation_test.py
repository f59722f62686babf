"""The compilation cache: the same bits with it and without, whatever state its files are in, and nobody else's code."""

from __future__ import annotations

import errno
import hashlib
import os
import pathlib
import stat
import subprocess
import sys
import threading

import jax
import pytest
from support import ROOT, assert_same, metrics, mistake, path, saved_state, tiny

from jaxgen import compilation, files, sharding
from jaxgen.main import run_main


@pytest.fixture
def fresh(monkeypatch):
    """No variable names a cache, and everything is kept; the tests' own is back at the end."""
    named = os.environ['JAX_COMPILATION_CACHE_DIR']
    monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    yield
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', named)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', before)
    compilation.use()


def programs(folder) -> list[str]:
    return sorted(str(p) for p in folder.rglob('*.program'))


def entries(folder, largest: int = 10**9) -> compilation.Entries:
    folder.mkdir(parents=True, exist_ok=True)
    return compilation.Entries(str(folder), largest)


# --- training


def train(workdir, cache, steps: int) -> None:
    jax.clear_caches()
    arguments = ['jaxgen', f'--config={path("vae_digits")}', f'--workdir={workdir}', f'--cache={cache}']
    assert run_main([*arguments, f'--config.train.steps={steps}', '--config.train.save_every=1']) == 0


@pytest.mark.slow
def test_the_same_bits_cold_warm_damaged_and_resumed(tmp_path, fresh, capfd, monkeypatch):
    cache = tmp_path / 'cache'
    train(tmp_path / 'without', 'off', 2)
    assert compilation.seconds('any') is None
    train(tmp_path / 'cold', cache, 2)
    kept = programs(cache)
    assert any('jit_call-' in one for one in kept) and 'compiled in' in capfd.readouterr().err
    train(tmp_path / 'warm', cache, 1)
    train(tmp_path / 'warm', cache, 2)
    said = capfd.readouterr().err
    assert (
        programs(cache) == kept
        and f's the first time; now from the cache, {cache}' in said
        and 'compiled in' not in said
    )
    for i, one in enumerate(kept):
        whole = pathlib.Path(one).read_bytes()
        foreign = hashlib.sha256(whole[:99]).digest() + whole[:99]  # whole, and no program
        damaged = [whole[:100], b'', foreign, whole[:500] + bytes([whole[500] ^ 1]) + whole[501:]][i % 4]
        pathlib.Path(one).write_bytes(damaged)
    train(tmp_path / 'damaged', cache, 2)
    assert 'compiled in' in capfd.readouterr().err
    for name in ('cold', 'warm', 'damaged'):
        assert_same(saved_state(tmp_path / 'without', 2), saved_state(tmp_path / name, 2))
        assert metrics(tmp_path / 'without') == metrics(tmp_path / name)


def test_a_full_disk_changes_nothing(tmp_path, fresh, capfd, monkeypatch):
    real = files.replacing

    def full(name):
        if name.endswith(('.program', '.seconds')):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(name)

    monkeypatch.setattr(files, 'replacing', full)
    train(tmp_path / 'run', tmp_path / 'cache', 1)
    assert capfd.readouterr().err.count('WARNING: compiled programs cannot be kept') == 1
    assert not programs(tmp_path)


# --- files


def test_what_was_put_is_got(tmp_path):
    first, second = entries(tmp_path), entries(tmp_path)
    assert first.get('a') is None and first.loaded == []
    first.put('a', b'program')
    assert second.get('a') == b'program' and second.loaded == ['a']


@pytest.mark.parametrize('change', [lambda x: x[:-1], lambda x: x + b'\0', lambda x: b'\0' + x[1:], lambda x: b''])
def test_a_changed_entry_is_none(change, tmp_path):
    kept = entries(tmp_path)
    kept.put('a', b'program')
    file = pathlib.Path(kept.file('a'))
    file.write_bytes(change(file.read_bytes()))
    assert kept.get('a') is None and not os.path.exists(kept.file('a'))
    kept.put('a', b'program')
    assert kept.get('a') == b'program'


def test_links_and_directories_are_none(tmp_path):
    kept, elsewhere = entries(tmp_path / 'here'), entries(tmp_path / 'elsewhere')
    elsewhere.put('a', b'program')
    os.symlink(elsewhere.file('a'), kept.file('a'))
    os.mkdir(kept.file('b'))
    os.mkfifo(kept.file('c'))
    assert [kept.get(key) for key in 'abc'] == [None] * 3
    kept.put('b', b'program')  # cannot be kept, which is said
    assert kept.failed


def test_the_least_recently_used_go_first(tmp_path):
    largest = 5 * (100 + compilation.DIGEST)
    other, kept = entries(tmp_path / 'other', largest), entries(tmp_path / 'this', largest)
    other.put('of another machine', bytes(100))
    for i in range(4):
        kept.put(str(i), bytes(100))
    for age, (one, key) in enumerate([(other, 'of another machine'), *((kept, str(i)) for i in range(4))]):
        os.utime(one.file(key), ns=(0, age))
    assert kept.get('0')
    kept.put('4', bytes(100))
    assert not programs(tmp_path / 'other') and kept.get('1')
    kept.put('5', bytes(100))
    assert [key for key in '012345' if kept.get(key)] == ['0', '1', '3', '4', '5']
    kept.put('large', bytes(largest + 1))
    assert kept.get('large') is None and kept.get('0')


def test_what_a_killed_process_left_goes(tmp_path):
    kept = entries(tmp_path)
    for name in ('old.new', 'young.new'):
        (tmp_path / name).write_bytes(b'part')
    os.utime(tmp_path / 'old.new', (0, 0))
    kept.put('a', b'program')
    assert sorted(os.listdir(tmp_path)) == ['a.program', 'young.new']


def test_several_at_once(tmp_path):
    faults: list[BaseException] = []

    def use(i: int) -> None:
        try:
            own = entries(tmp_path, 300)
            for k in range(60):
                key = str((i + k) % 4)
                own.put(key, key.encode() * 100)
                assert own.get(key) in (None, key.encode() * 100)
            assert not own.failed
        except BaseException as e:
            faults.append(e)

    threads = [threading.Thread(target=use, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults and sum(os.path.getsize(one) for one in programs(tmp_path)) <= 300 + 4 * 132


# --- which directory


def test_the_usual_directory(fresh, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'a' / 'b'))
    assert compilation.use() == str(tmp_path / 'a' / 'b' / 'jaxgen' / 'compiled')
    for folder in (tmp_path / 'a', tmp_path / 'a' / 'b' / 'jaxgen'):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path / 'named'))
    assert compilation.use() == str(tmp_path / 'named')
    assert compilation.use(str(tmp_path / 'given')) == str(tmp_path / 'given')
    assert compilation.use('off') == '' and jax.config.jax_compilation_cache_dir is None
    monkeypatch.setenv('JAX_ENABLE_COMPILATION_CACHE', 'false')
    assert compilation.use() == ''


def test_several_hosts_have_one_where_it_is_named(fresh, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert compilation.use('', several_hosts=True) == ''
    assert compilation.use(str(tmp_path / 'given'), several_hosts=True)


@pytest.mark.parametrize('which', ['itself', 'above', 'owner'])
def test_a_directory_of_others_is_not_trusted(which, fresh, tmp_path, capfd, monkeypatch):
    home = tmp_path / 'home'
    home.mkdir()
    monkeypatch.setenv('XDG_CACHE_HOME', str(home / 'cache'))
    directory = compilation.use()
    assert directory and 'WARNING' not in capfd.readouterr().err
    if which == 'owner':
        if os.geteuid() == 0:
            os.chown(home, 12345, -1)
        else:
            other = os.geteuid() + 1
            monkeypatch.setattr(os, 'geteuid', lambda: other)
    else:
        os.chmod(directory if which == 'itself' else home, 0o777)
    (os.chmod(os.path.join(directory, compilation.machine()), 0o777) if which == 'itself' else None)
    assert compilation.use() == ''
    assert 'WARNING: no compilation cache' in capfd.readouterr().err and jax.config.jax_compilation_cache_dir is None


def test_in_a_directory_like_tmp_it_is(fresh, tmp_path, monkeypatch):
    os.chmod(tmp_path, 0o1777)
    assert compilation.use(str(tmp_path / 'cache'))


def test_a_home_that_cannot_be_written(fresh, tmp_path, capfd, monkeypatch):
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
    assert compilation.use() == ''
    assert 'WARNING: no compilation cache' in capfd.readouterr().err


def test_a_directory_that_cannot_be_made(tmp_path, capfd, no_compile):
    (tmp_path / 'file').write_text('')
    arguments = ('--mode=sample', f'--workdir={tmp_path}')
    assert '--cache=' in mistake(capfd, *arguments, f'--cache={tmp_path}/file/cache')
    assert 'is an address' in mistake(capfd, *arguments, '--cache=gs://bucket/cache')


def test_a_library_has_none_unless_it_is_turned_on():
    code = (
        'import jax, jaxgen, jaxgen.run, jaxgen.train\n'
        'assert jax.config.jax_compilation_cache_dir is None\n'
        'jax.jit(lambda x: x + 1)(1)\n'
    )
    env = {k: v for k, v in os.environ.items() if k != 'JAX_COMPILATION_CACHE_DIR'}
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT, env=env, timeout=120)


# --- how long it takes


def test_how_long_a_compile_took(fresh, tmp_path):
    compilation.use(str(tmp_path))
    assert compilation.seconds('job') is None and 's the first time' not in compilation.notice('job')
    compilation.measured('job', 41.7)
    assert compilation.seconds('job') == 41.7 and 'about 42 s the first time' in compilation.notice('job')
    (file,) = tmp_path.rglob('job.seconds')
    for text in ('', 'nan', '-3', '1e9', 'x' * 100, '\0'):
        file.write_text(text)
        assert compilation.seconds('job') is None


@pytest.mark.parametrize(
    ('field', 'value', 'same'),
    [
        ('train.remat', True, False),
        ('train.updates_per_call', 7, False),
        ('train.deterministic', False, False),
        ('optim.accumulate', 2, False),
        ('mesh.fsdp', 2, False),
        ('train.steps', 7, True),
        ('sample.batch', 2, True),
    ],
)
def test_a_job_is_of_what_its_program_depends_on(field, value, same):
    """Another layout is another program, which no former start has compiled."""
    mesh = sharding.make_mesh(1, jax.devices()[:1])
    config = tiny('vae_digits')
    before = compilation.job(config, mesh)
    config.update_from_flattened_dict({field: value})
    assert (compilation.job(config, mesh) == before) is same
