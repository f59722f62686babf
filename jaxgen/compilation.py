"""The compilation cache: what XLA compiled is kept, so that the next start of the same job takes it from the disk.

It is JAX's persistent compilation cache, whose keys are of the program, the options of the compiler and its version.
The entries are our own files: whole or not there, with a digest, and bounded in size. An entry is machine code that is
run, so no directory is used that others can write to. Each kind of machine has a folder of its own, because programs
for CPUs are compiled for one.

`import jaxgen` turns nothing on; the command calls `use`, and so may a script, before its first compile.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import pathlib
import platform
import re
import time
import warnings
from typing import Any

import jax

from jaxgen import config as configs
from jaxgen import files, log, sharding
from jaxgen.errors import UserError

LARGEST = 2 * 2**30  # bytes of all entries, where JAX_COMPILATION_CACHE_MAX_SIZE says nothing else
LEAST_SECONDS = 0.2  # of compiling; what takes less is not kept
ENTRY, TIME = '.program', '.seconds'  # endings of files
DIGEST = 32  # bytes of SHA-256 before an entry's contents


def default_directory() -> str:
    """The cache in the person's cache directory."""
    return files.cache_directory('compiled')


def machine() -> str:
    """A name for this kind of machine: programs for CPUs depend on the processor and the number of its cores."""
    lines = [platform.machine(), platform.processor(), str(len(getattr(os, 'sched_getaffinity', cores)(0)))]
    with contextlib.suppress(OSError), open('/proc/cpuinfo', encoding='utf-8', errors='replace') as file:
        about = re.compile(r'(model name|model|cpu family|flags|Features|CPU part|CPU implementer)\s*:')
        for line in file:
            if not line.strip():  # the first processor is enough
                break
            lines += [line] if about.match(line) else []
    return hashlib.sha256('\n'.join(lines).encode()).hexdigest()[:12]


def cores(_) -> range:
    return range(os.cpu_count() or 1)


class Entries:
    """Files `KEY.program` of one kind of machine, as JAX reads and writes its cache: `get` and `put`.

    No failure reaches the caller: what cannot be read is compiled anew, what cannot be written is not kept. Several
    processes may use one directory.
    """

    def __init__(self, directory: str, largest: int):
        self.directory, self.largest = directory, largest
        self._path = self.path = pathlib.Path(directory)  # JAX asks for the first
        self.root = os.path.dirname(directory)
        self.loaded: list[str] = []  # keys
        self.failed = False

    def file(self, key: str) -> str:
        return os.path.join(self.directory, key + ENTRY)

    def get(self, key: str) -> bytes | None:
        """The contents of an entry; None where it is not there, or not as it was written."""
        try:
            with open(os.open(self.file(key), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), 'rb') as file:
                contents = file.read()
        except OSError:
            return None
        if hashlib.sha256(contents[DIGEST:]).digest() != contents[:DIGEST]:
            with contextlib.suppress(OSError):
                os.remove(self.file(key))
            return None
        with contextlib.suppress(OSError):
            os.utime(self.file(key))  # the least recently used go first
        self.loaded.append(key)
        return contents[DIGEST:]

    def put(self, key: str, value: bytes) -> None:
        """Keeps an entry, and removes the least recently used ones beyond the limit."""
        if len(value) > self.largest or self.failed:
            return
        try:
            with files.replacing(self.file(key)) as file:
                file.write(hashlib.sha256(value).digest() + value)
            self.evict()
        except OSError as e:
            self.failed = True
            log.say(f'WARNING: compiled programs cannot be kept in {self.directory}: {e.strerror}')

    def evict(self) -> None:
        """Removes the least recently used files of all machines beyond the limit, and what a killed process left."""
        kept = []
        for folder in [self.path, *self.path.parent.iterdir()]:
            for entry in os.scandir(folder) if folder.is_dir() and not folder.is_symlink() else ():
                with contextlib.suppress(OSError):  # others remove files, too
                    about = entry.stat(follow_symlinks=False)
                    if entry.name.endswith((ENTRY, TIME)):
                        kept.append((about.st_mtime_ns, about.st_size, entry.path))
                    elif entry.name.endswith('.new') and about.st_mtime < time.time() - 86400:
                        os.remove(entry.path)
        total = sum(size for _, size, path in set(kept))
        for _, size, path in sorted(set(kept)):
            if total <= self.largest:
                return
            with contextlib.suppress(OSError):
                os.remove(path)
            total -= size


_entries: Entries | None = None


def use(where: str = '', several_hosts: bool = False) -> str:
    """Turns the compilation cache on, and returns its directory; '' where there is none.

    Args:
      where: a directory, or 'off'; '' is JAX_COMPILATION_CACHE_DIR, or else the person's cache directory.
      several_hosts: off, unless it is named: a host that compiles might wait for one that does not.

    Raises:
      UserError: the directory `where` cannot be made.
    """
    global _entries
    _entries, inside = None, _inside_jax()
    variable = os.environ.get('JAX_COMPILATION_CACHE_DIR', '')
    directory = where or variable or ('off' if several_hosts else default_directory())
    enabled = str(os.environ.get('JAX_ENABLE_COMPILATION_CACHE', '')).lower() not in ('0', 'false', 'no', 'off')
    if '://' in directory and not where:  # JAX's own; who may write to a bucket is not seen from here
        return directory if enabled else ''
    if directory == 'off' or not enabled or not hasattr(os, 'geteuid'):
        return _off(inside)
    root = files.absolute(directory)
    folder = os.path.join(root, machine())
    try:
        files.make_private(folder)
        folder = os.path.realpath(folder)  # a link may be replaced
        problem = files.distrusted(folder)
    except OSError as e:
        if where:
            raise UserError(f'--cache={where} cannot be made: {e.filename}: {e.strerror}') from e
        problem = f'{e.filename or folder}: {e.strerror}'
    if problem:
        log.say(
            f'WARNING: no compilation cache: {problem}; name another directory by --cache=DIRECTORY, or --cache=off'
        )
        return _off(inside)
    for name, value in {
        'jax_persistent_cache_min_compile_time_secs': LEAST_SECONDS,
        'jax_persistent_cache_enable_xla_caches': 'none',  # XLA would write beside the entries, without a bound
    }.items():
        if name.upper() not in os.environ:
            with contextlib.suppress(AttributeError, ValueError):  # of another version of JAX
                jax.config.update(name, value)
    # These say that an entry fits no more, or was not kept: it is compiled, and nothing is lost.
    warnings.filterwarnings('ignore', message='Error (reading|writing) persistent compilation cache')
    jax.config.update('jax_compilation_cache_dir', folder)
    jax.config.update('jax_enable_compilation_cache', True)
    if inside is not None:
        largest = getattr(jax.config, 'jax_compilation_cache_max_size', -1)
        entries = Entries(folder, LARGEST if largest < 0 else largest)
        entries.failed = not os.access(folder, os.W_OK)  # it is only read, then
        inside.get_file_cache = lambda path, usual=_usual(inside): (entries, path) if path == folder else usual(path)
        inside.get_file_cache.usual = _usual(inside)
        inside.reset_cache()  # a compile may have been before
        _entries = entries
    return root


def _off(inside) -> str:
    jax.config.update('jax_enable_compilation_cache', False)
    jax.config.update('jax_compilation_cache_dir', None)
    if inside is not None:
        inside.reset_cache()
    return ''


def _usual(inside):
    """JAX's own function that makes the cache of a directory."""
    return getattr(inside.get_file_cache, 'usual', inside.get_file_cache)


def _inside_jax() -> Any:
    """JAX's internal module of its cache, into which our files are put, for which there is no public API. None where
    another version of JAX has none of these names: then the files are JAX's own."""
    try:
        from jax._src import compilation_cache as inside

        _ = inside.get_file_cache, inside.reset_cache
    except (ImportError, AttributeError):
        return None
    return inside


# --- how long a compile takes


def job(config, mesh) -> str:
    """A name for what a training compiles: of all fields that its program depends on, and the devices."""

    def is_of_program(name: str) -> bool:
        of_program = configs.LAYOUT.fullmatch(name) or name in ('train.deterministic', 'data.prepared')
        others = configs.FREE_ON_RESUME.fullmatch(name) or name in ('seed', 'data.source', 'data.other')
        return bool(of_program or not others)

    fields = {name: value for name, value in configs.flat(config.to_dict()).items() if is_of_program(name)}
    kinds = [[device.platform, device.device_kind] for device in mesh.devices.flat]
    about = [jax.__version__, os.environ.get('XLA_FLAGS', ''), kinds, fields]
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:24]


def seconds(name: str) -> float | None:
    """How long a job took to compile on this machine, where that was measured."""
    if _entries is None or not name:
        return None
    path = os.path.join(_entries.directory, name + TIME)
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), encoding='utf-8') as file:
            number = float(file.read(40))
    except (OSError, ValueError):
        return None
    return number if math.isfinite(number) and 0 < number < 1e6 else None


def loaded(program: str) -> bool:
    """Whether a program of a name has been taken from the cache by this process."""
    return _entries is not None and any(key.startswith(f'jit_{program}-') for key in _entries.loaded)


def measured(name: str, number: float) -> None:
    """Keeps how long a job took to compile."""
    if _entries is not None and not _entries.failed:
        with contextlib.suppress(OSError), files.replacing(os.path.join(_entries.directory, name + TIME)) as file:
            file.write(f'{number:.1f}'.encode())


def devices() -> str:
    """The devices that compute, in words."""
    return f'{sharding.devices()}, JAX {jax.__version__}'


def notice(name: str = '') -> str:
    """What a person reads before a compile: how long it takes, where that is known.

    name: of a job; '' for programs whose compile is not measured.
    """
    if _entries is None:
        return 'compiling'
    if not name:
        return f'compiling what is not in the cache, {_entries.root}'
    known = seconds(name)
    first = f'about {known:.0f} s the first time; now' if known else 'the next start takes it'
    return f'compiling ({first} from the cache, {_entries.root})'
