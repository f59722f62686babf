"""A run to share: its weights with those of its stages, in one folder or archive, --mode=pack.

What is packed is what sampling, evaluation and exploration read: the config, the description of the data, the
tokenizer, one checkpoint without the state of the optimiser, and in stages/NAME the same of each stage. The digests of
the files are those of the training. Training data are not packed, and a pack cannot be trained on.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import shutil
import stat
import tarfile
import uuid
import zipfile
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from jaxgen import checkpoint, directory, files, origin
from jaxgen import run as runs
from jaxgen.errors import RunError, UserError

FILES = ('config.json', 'data.json', origin.NAME)
LEFT_OUT = ('opt',)  # items of a checkpoint
ARCHIVES = ('.zip', '.tar', '.tar.gz', '.tgz')


class Packed(NamedTuple):
    """A file of a pack: where it lies in it, and its path, or its contents where it is none of the run's."""

    name: str
    path: str = ''
    contents: bytes = b''
    sha256: str = ''  # by the run's own digest


def parts(workdir: str, config, step: int, frozen: dict, folder: str) -> Iterator[Packed]:
    """The files of a run and of its stages.

    Args:
      config: the run's, as it is used: with the present paths of its stages.
      frozen: {stage: (its state, its frozen)}.
      folder: of the pack, '' or 'stages/NAME'.
    """
    for name in FILES:
        if os.path.isfile(os.path.join(workdir, name)):
            yield Packed(os.path.join(folder, name), os.path.join(workdir, name))
    for path in sorted(glob.glob(os.path.join(glob.escape(os.path.join(workdir, directory.TOKENIZER)), '*'))):
        yield Packed(os.path.join(folder, directory.TOKENIZER, os.path.basename(path)), path)
    checkpoints = os.path.join(workdir, 'checkpoints', str(step))
    sums = {
        name: digest for name, digest in checkpoint.digest(checkpoints).items() if name.split(os.sep)[0] not in LEFT_OUT
    }
    for name, digest in sums.items():
        where = os.path.join(folder, 'checkpoints', str(step), name)
        yield Packed(where, os.path.join(checkpoints, name), sha256=digest)
    contents = (json.dumps(sums, indent=2) + '\n').encode()
    yield Packed(os.path.join(folder, 'digests', f'{step}.json'), contents=contents)
    for name, (state, its_frozen) in frozen.items():
        path = config.stages[name]
        used, _, _ = directory.read(path)
        yield from parts(path, used, int(state.step), its_frozen, os.path.join(folder, 'stages', name))


def copied(part: Packed, into: BinaryIO) -> None:
    """Writes a file of a pack.

    Raises:
      RunError: it is not as it was when the training saved it.
    """
    if part.contents:
        into.write(part.contents)
        return
    digest = hashlib.sha256()
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    with open(os.open(part.path, flags), 'rb') as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise RunError(f'{part.path} is no regular file')
        while piece := file.read(2**20):
            digest.update(piece)
            into.write(piece)
    if part.sha256 and digest.hexdigest() != part.sha256:
        raise RunError(f'{part.path} changed while it was packed: pack again')


def write_zip(out: str, top: str, packed: list[Packed]) -> None:
    with files.replacing(out) as file, zipfile.ZipFile(file, 'w', zipfile.ZIP_STORED) as archive:
        for part in packed:  # arrays are compressed already
            with archive.open(zipfile.ZipInfo(f'{top}/{part.name}'), 'w', force_zip64=True) as into:
                copied(part, into)  # type: ignore[arg-type]


def write_tar(out: str, top: str, packed: list[Packed]) -> None:
    with (
        files.replacing(out) as file,
        tarfile.open(fileobj=file, mode='w' if out.endswith('.tar') else 'w:gz') as archive,
    ):
        for part in packed:
            about = tarfile.TarInfo(f'{top}/{part.name}')
            with tempfile_of(part) as contents:
                about.size = os.fstat(contents.fileno()).st_size
                archive.addfile(about, contents)


@contextlib.contextmanager
def tempfile_of(part: Packed) -> Iterator[BinaryIO]:
    """A file with what is packed, whose size is known: tar writes it first."""
    import tempfile

    with tempfile.TemporaryFile() as file:
        copied(part, file)
        file.seek(0)
        yield file


def write_folder(out: str, top: str, packed: list[Packed]) -> None:
    os.makedirs(os.path.dirname(out), exist_ok=True)
    new = f'{out}.{uuid.uuid4().hex}.new'
    try:
        for part in packed:
            path = os.path.join(new, part.name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, 'xb') as into:
                copied(part, into)
        os.rename(new, out)  # an empty one may be there
    finally:
        shutil.rmtree(new, ignore_errors=True)


def check_out(out: str) -> None:
    """Raises UserError where a pack would replace or mix with what is there."""
    if not out:
        raise UserError('--mode=pack needs --out=FILE.zip, FILE.tar.gz or a new FOLDER')
    if os.path.isdir(out) and os.listdir(out):
        raise UserError(f'--out={out} is there: name a new folder, or a FILE.zip')
    if os.path.isfile(out) and not out.endswith(ARCHIVES):
        raise UserError(f'--out={out} is a file: an archive is called FILE.zip or FILE.tar.gz')
    if os.path.isdir(out) and out.endswith(ARCHIVES):
        raise UserError(f'--out={out} is a directory: name a file')
    files.check_writable(os.path.dirname(os.path.abspath(out)), '--out')


def pack(run: runs.Run, out: str) -> tuple[int, int]:
    """Packs a run that was loaded, which is the proof that its stages fit; (files, bytes).

    Args:
      out: FILE.zip, FILE.tar, FILE.tar.gz, FILE.tgz or a new folder. It is there whole or not at all.

    Raises:
      UserError: `out` is there, or cannot be written.
      RunError: a file of the run has changed since it was saved.
    """
    check_out(out)
    out = files.absolute(out)
    workdir = os.path.realpath(run.workdir)
    packed = list(parts(workdir, run.config, run.step, run.assembled.frozen, ''))
    write: Callable = write_zip if out.endswith('.zip') else write_tar if out.endswith(ARCHIVES) else write_folder
    write(out, os.path.basename(workdir), packed)
    return len(packed), sum(os.path.getsize(part.path) if part.path else len(part.contents) for part in packed)
