"""Statistics of the features of a set of images, and the cache of those of data sets.

    statistics = gather(pieces, n)  # pieces: outputs of features.extract, one after another
    statistics = cached(folder, title, key, lambda: gather(pieces, n))

Moments are of all images, in float64. Features themselves, which nearest neighbours and kernels need, are kept of KEPT
images at most, in a random order that is always the same: any first m of them are a fair sample, however the images
were sorted.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import uuid
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgen import files, log, sharding
from jaxgen.errors import RunError, UserError
from jaxgen.metrics.moments import Moments, merge

KEPT = 50_000
SEED = 2020  # of the order: torch-fidelity's, so that its Inception Score has the same splits
FORMAT = 1  # of the cache; another number, and old files are not looked at


class Statistics(NamedTuple):
    """Statistics of a set of images, from which jaxgen/evaluation/samples.py computes its metrics."""

    moments: Moments  # of the features of all images
    features: np.ndarray  # float32 [m, d], m <= KEPT
    counts: np.ndarray  # int64 [c]: how many of all images the network puts into each class; [0] without classes
    logits: np.ndarray | None = None  # float32 [m, c]; None without classes, and for a data set from the cache
    spatial: Moments | None = None  # of sFID's features, where the network has them
    published: bool = False  # moments alone, out of a file that does not say of how many images


def gather(pieces: Iterable[dict[str, np.ndarray]], n: int) -> Statistics:
    """The statistics of n images.

    Args:
      pieces: {'features': [b, d], 'logits': [b, c], 'spatial': [b, s]}, the last two where there are any,
        n images in all.

    Raises:
      RunError: a feature is not finite.
    """
    order = np.random.RandomState(SEED).permutation(n)[:KEPT]
    row = np.full(n, -1)
    row[order] = np.arange(len(order))
    start, counts = 0, np.zeros(0, np.int64)
    kept: dict[str, np.ndarray] = {}
    moments: dict[str, Moments] = {}
    for piece in pieces:
        rows = row[start : start + len(piece['features'])]
        for name, x in piece.items():
            good = np.isfinite(x).all(1)
            if not good.all():
                raise RunError(f'{name} of image {start + int(np.argmin(good))} are not finite: stopped')
            if name != 'logits':
                own = Moments.of(x)
                moments[name] = merge(moments[name], own) if name in moments else own
            if name != 'spatial':
                into = kept.setdefault(name, np.empty((len(order), x.shape[1]), np.float32))
                into[rows[rows >= 0]] = x[rows >= 0]
        start += len(rows)
        if 'logits' in piece:
            predicted = np.bincount(piece['logits'].argmax(1), minlength=piece['logits'].shape[1])
            counts = counts + predicted if len(counts) else predicted
    assert start == n, f'{start} images, not {n}'
    return Statistics(moments['features'], kept['features'], counts, kept.get('logits'), moments.get('spatial'))


def cached(folder: str, title: str, key: str, make: Callable[[], Statistics]) -> Statistics:
    """The statistics that `key` stands for, from `folder`, or made and put there.

    Safe with several processes: a file appears whole or not at all, and all of them make the same. One that is damaged
    is put aside with a warning and made anew.

    Args:
      title: what the file's name begins with, for people.
      key: all that decides what they are.
    """
    key = f'{FORMAT} {key}'
    path = os.path.join(folder, f'{title}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz')
    stored = None
    if os.path.isfile(path):
        try:
            stored = read(path, key)
        except (OSError, ValueError, KeyError, TypeError) as e:
            log.say(f'WARNING: {path} is damaged ({" ".join(str(e).split())}): put aside and computed again')
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                os.rename(path, f'{path}.damaged-{uuid.uuid4().hex[:8]}')
    missing = sharding.any_host(stored is None)
    if stored is not None and not missing:
        return stored
    statistics = make()._replace(logits=None)
    if jax.process_index() == 0:
        try:
            if os.path.islink(folder):  # it may have come with a run, and lead anywhere
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            write(path, key, statistics)
        except OSError as e:  # a set may lie where nothing can be written
            log.say(f'WARNING: {path} cannot be written ({e.strerror}): it will be computed again')
    return statistics


def published(path: str, dimensions: dict[str, int]) -> Statistics:
    """The moments in a published .npz: 'mu' [d] and 'sigma' [d, d], and of sFID's features 'mu_s' and 'sigma_s'.

    Args:
      dimensions: of the network's outputs, {'features': d, 'spatial': s}.

    Raises:
      UserError: it is no such file, or its moments are of another network.
    """
    arrays: dict[str, np.ndarray] = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for name in ('mu', 'sigma', 'mu_s', 'sigma_s'):
                if name in file:
                    arrays[name] = np.asarray(file[name], np.float64)
    except FileNotFoundError as e:
        raise UserError(f'config.evaluate.reference = {path}: no such file') from e
    except Exception as e:  # a stranger's file can fail in any way
        raise UserError(
            f'config.evaluate.reference = {path} is no .npz of moments ({" ".join(str(e).split())[:200]})'
        ) from e

    def moments(mu: str, sigma: str, size: int) -> Moments:
        if arrays[mu].shape != (size,) or arrays[sigma].shape != (size, size):
            raise UserError(
                f'config.evaluate.reference = {path}: {mu} and {sigma} are {arrays[mu].shape} and '
                f'{arrays[sigma].shape}, and the network has {size} features'
            )
        if not (np.isfinite(arrays[mu]).all() and np.isfinite(arrays[sigma]).all()):
            raise UserError(f'config.evaluate.reference = {path}: {mu} or {sigma} is not finite')
        return Moments(2, arrays[mu], arrays[sigma])  # the covariance of two is the scatter

    if not {'mu', 'sigma'} <= arrays.keys():
        raise UserError(f'config.evaluate.reference = {path} has no mu and sigma')
    spatial = None
    if {'mu_s', 'sigma_s'} <= arrays.keys() and 'spatial' in dimensions:
        spatial = moments('mu_s', 'sigma_s', dimensions['spatial'])
    first = moments('mu', 'sigma', dimensions['features'])
    return Statistics(
        first, np.zeros((0, dimensions['features']), np.float32), np.zeros(0, np.int64), None, spatial, True
    )


def write(path: str, key: str, made: Statistics) -> None:
    """Writes a file of the cache."""
    arrays = {'key': np.array(key), 'features': made.features, 'counts': made.counts}
    for name, moments in (('moments', made.moments), ('spatial', made.spatial)):
        if moments is not None:
            arrays |= {f'{name}_{field}': np.asarray(value) for field, value in moments._asdict().items()}
    files.save_npz(path, arrays)


def read(path: str, key: str) -> Statistics:
    """The statistics in a file of the cache.

    Raises:
      ValueError, KeyError, TypeError, OSError: it is damaged.
    """
    # Reading checks the checksums of the zip.
    file = files.load_npz(path)
    if str(file['key']) != key:
        raise ValueError('it is of something else')

    def moments(name: str) -> Moments:
        values: dict[str, Any] = {field: file[f'{name}_{field}'] for field in Moments._fields}
        return Moments(**{**values, 'n': int(values['n'])})

    spatial = moments('spatial') if 'spatial_n' in file else None
    return Statistics(moments('moments'), file['features'], file['counts'], None, spatial)
