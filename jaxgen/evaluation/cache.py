"""The piece cache: outputs of a network for samples, kept in the run's directory until the evaluation is done, so that
one that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable

import jax
import numpy as np

from jaxgen import files, sharding

FOLDER = 'evaluation'  # in a run's directory
NAMES = 'names'  # entry of a piece's file: the names of the others
FORMAT = 4  # of what a piece holds; pieces of another one are not read


def path(workdir: str, decides) -> str:
    """The folder of one evaluation's pieces.

    Args:
      decides: all that their contents depend on, as JSON.
    """
    key = json.dumps([FORMAT, jax.__version__, decides], sort_keys=True)
    return os.path.join(workdir, FOLDER, hashlib.sha256(key.encode()).hexdigest()[:16])


def piece(folder: str, start: int, n: int, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The piece of samples start to start + n, {name: [n, ...]}, from `folder`, or made and kept there.

    All hosts must call it together.
    """
    file = os.path.join(folder, f'{start:08d}.npz')
    kept = read(file, n)
    missing = sharding.any_host(kept is None)
    if kept is not None and not missing:
        return kept
    made = make()
    if jax.process_index() == 0:
        files.save_npz(file, {**made, NAMES: np.array(list(made))})
    return made


def read(file: str, n: int) -> dict[str, np.ndarray] | None:
    """A piece of n samples; None if it is of another number, damaged or not there."""
    try:
        arrays = files.load_npz(file)
    except (OSError, ValueError):
        return None
    names = arrays.pop(NAMES, np.array(''))  # one may be lost with the directory of the file
    whole = names.ndim and sorted(arrays) == sorted(names)
    return arrays if whole and all(x.ndim and len(x) == n for x in arrays.values()) else None


def clear(workdir: str) -> None:
    """Removes the pieces of all evaluations of a run; call it once the metrics are written."""
    sharding.barrier('clear')
    if jax.process_index() == 0:
        shutil.rmtree(os.path.join(workdir, FOLDER), ignore_errors=True)
