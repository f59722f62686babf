"""Prepared data sets are data, not code: TFDS executes nothing that their files name, and leaves their directory alone.

A run may name the directory of its prepared sets, so a stranger's run can bring such files. TFDS imports the class of
every feature that a set's `features.json` names, and a few of its builders unpickle what lies in the downloads.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import tensorflow_datasets as tfds

from jaxgen.errors import UserError

# What arrays are made of again in a pickle. Everything else there could be any function with any arguments.
ARRAYS = {
    *(f'{module}.{name}' for module in ('numpy.core.multiarray', 'numpy._core.multiarray')
      for name in ('_reconstruct', 'scalar')),
    *('numpy.ndarray', 'numpy.dtype', '_codecs.encode', 'collections.OrderedDict'),
}  # fmt: skip
active = []  # while `arrays_only` is on


def import_no_features() -> None:
    """From now on TFDS makes features of classes that are there already, its own and what the user's program defines,
    and raises UserError where a `features.json` names any other instead of importing it. Whatever reads a
    prepared set goes through this one function."""
    connector = tfds.features.FeatureConnector
    known = connector._registered_features

    def cls_from_name(cls, name: str):
        if name not in known:
            raise UserError(
                f'features.json of a prepared set names the class {name[:200]!r}, which is not one of TFDS: it is not '
                'imported, since a data set must not run code; import it yourself if you trust it'
            )
        return known[name]

    connector.cls_from_name = classmethod(cls_from_name)


def hook(event: str, args: tuple) -> None:
    if active and event == 'pickle.find_class' and '.'.join(map(str, args)) not in ARRAYS:
        raise UserError(f'a downloaded file is a pickle that calls {".".join(map(str, args))[:200]}: it is not run')


@contextlib.contextmanager
def arrays_only() -> Iterator[None]:
    """Pickles may hold arrays and nothing else, in all threads of this process."""
    active.append(0)
    try:
        yield
    finally:
        active.pop()


def check_inside(root: str, path: str) -> None:
    """Raises UserError where `path`, below `root`, leads out of it by a symbolic link. `root` may be a link itself."""
    top = os.path.realpath(root)
    if os.path.commonpath([top, os.path.realpath(path)]) != top:
        raise UserError(
            f'{path} is a link that leads out of {root}, so nothing is written there: name another config.data.dir'
        )


def check_shards(builder) -> None:
    """Raises UserError where the metadata of a prepared set names files outside of its directory."""
    top = os.path.abspath(builder.data_dir)
    for split in builder.info.splits.values():
        for path in split.filepaths:
            if os.path.commonpath([top, os.path.abspath(path)]) != top:
                raise UserError(f'{top}: its dataset_info.json names a file outside of it, {os.fspath(path)[:200]}')


import_no_features()
sys.addaudithook(hook)
