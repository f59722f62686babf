"""Where samples, sheets and results go: outputs of one call lie together, and those of others beside them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from typing import Any

from jaxgen.errors import UserError

SOURCES = 'sources.json'  # of samples named after a person's files: {name: {'sha256': its own, 'sources': paths}}
MOST_SOURCES = 2**28  # bytes of it that are read
# {file that every call writes: the paths of all that it may write, beside the files in images/ that SOURCES lists}.
WRITTEN = {
    'samples.npz': re.compile(r'samples\.npz|samples\.json|sources\.json|grid\.png|film\.png|images/\d{5,}\.png'),
    'summary.json': re.compile(r'summary\.json|grid\.png'),
    'explore.json': re.compile(
        r'explore\.json|(reconstructions|interpolation_linear|interpolation_spherical|traversals|map_pca|map_tsne'
        r'|neighbours)\.png'
    ),
}


def digest(value) -> str:
    """Eight hexadecimal digits, by the JSON of a value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:8]


def name(run, changed: dict, seed: int, condition: dict[str, str] | None = None, **numbers: int) -> str:
    """A directory's name for the outputs of one call, by all that they depend on.

    Args:
      changed: {field: value} of the config where it differs from the run's own.
      numbers: those that are not the default.
    """
    parts = [f'step{run.step}', run.weights, f'seed{seed}']
    exact: dict[str, Any] = {'changed': changed} if changed else {}
    for key, value in (condition or {}).items():
        short = re.sub('[^a-z0-9]+', '-', value.lower())[:40]
        parts.append(f'{key}{short}')
        if short != value:
            exact[key] = value
    parts += [f'{key}{value}' for key, value in numbers.items()]
    return '_'.join([*parts, *([digest(exact)] if exact else [])])


def is_regular(path: str) -> bool:
    return os.path.lexists(path) and stat.S_ISREG(os.lstat(path).st_mode)


def file_digest(path: str) -> str:
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def listed(folder: str) -> dict[str, str]:
    """{name: SHA-256} of the files in images/ that an earlier call named after a person's, by its SOURCES; {} where it
    is none of ours."""
    path = os.path.join(folder, SOURCES)
    if not is_regular(path) or os.path.getsize(path) > MOST_SOURCES:
        return {}
    try:
        with open(path, encoding='utf-8') as file:
            return {name: str(about['sha256']) for name, about in json.load(file).items()}
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return {}


def written(folder: str, index: str) -> list[str]:
    """The files in `folder` that an earlier call wrote, relative to it.

    Raises:
      UserError: there are files of these names, and nothing says that they are jaxgen's.
    """
    pattern, ours, foreign = WRITTEN[index], [], ''
    for entry in os.scandir(folder) if os.path.isdir(folder) else ():
        if entry.name == 'images' and index == 'samples.npz':
            if entry.is_symlink() or not entry.is_dir():
                foreign = entry.name
                continue
            named = listed(folder)
            for one in os.listdir(entry.path):
                path = os.path.join(entry.path, one)
                # What a person has changed since is theirs.
                if pattern.fullmatch(f'images/{one}') or (
                    one in named and is_regular(path) and file_digest(path) == named[one]
                ):
                    ours.append(f'images/{one}')
                else:
                    foreign = f'images/{one}'
        elif pattern.fullmatch(entry.name):
            ours.append(entry.name)
    if ours and index not in ours:
        foreign = foreign or ours[0]
    if foreign:
        raise UserError(
            f'--out={folder}: {foreign} there was not written by jaxgen, and would be mixed with what is: name another '
            'directory'
        )
    return ours


@contextlib.contextmanager
def directory(folder: str, index: str) -> Iterator[str]:
    """A new directory to write into; at the end of the block its files take the place of an earlier call's in `folder`.

    Nothing else in `folder` is touched. If the block is left by an exception, nothing is.
    """
    written(folder, index)
    os.makedirs(folder, exist_ok=True)
    new = os.path.join(folder, f'.{uuid.uuid4().hex}.new')
    os.mkdir(new)
    try:
        yield new
        for one in written(folder, index):
            if one != index:
                os.remove(os.path.join(folder, one))
        os.replace(os.path.join(new, index), os.path.join(folder, index))  # first: it says whose the others are
        for subfolder, _, files in os.walk(new):
            to = os.path.join(folder, os.path.relpath(subfolder, new))
            os.makedirs(to, exist_ok=True)
            for one in files:
                os.replace(os.path.join(subfolder, one), os.path.join(to, one))
    finally:
        shutil.rmtree(new, ignore_errors=True)
