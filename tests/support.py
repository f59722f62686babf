"""Helpers of several test files."""

from __future__ import annotations

import glob
import json
import os
import subprocess
import sys

import jax
import numpy as np

from jaxgen import config as configs

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONFIGS = sorted(glob.glob(os.path.join(ROOT, 'configs', '*.py')))
NAMES = [configs.name(path) for path in CONFIGS]


def path(name: str, variant: str = 'tiny') -> str:
    """FILE:VARIANT of a config by its name."""
    return os.path.join(ROOT, 'configs', f'{name}.py') + (f':{variant}' if variant else '')


def main(*args: str, env: dict | None = None, timeout: float = 240) -> subprocess.CompletedProcess:
    """Runs the command in a process of its own, as its user would."""
    command = [sys.executable, '-W', 'error', '-m', 'jaxgen.main', *args]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env={**os.environ, **(env or {})}
    )


def devices(n: int) -> dict[str, str]:
    """Environment of a process that sees n devices."""
    return {'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={n}'}


def metrics(workdir) -> list[dict]:
    """Lines of metrics.jsonl without what depends on the clock."""
    from jaxgen.log import CLOCK

    with open(os.path.join(workdir, 'metrics.jsonl'), encoding='utf-8') as file:
        return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in file]


def assert_same(a, b) -> None:
    """Two trees are equal bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (place, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=jax.tree_util.keystr(place))


def saved_state(workdir, step: int | None = None):
    """The whole State of a run's newest checkpoint."""
    from jaxgen import checkpoint, run

    assembled = run.assemble(run.saved_config(str(workdir)))
    checkpoints = checkpoint.Checkpoints(str(workdir))
    state, _ = checkpoints.restore(assembled.abstract, assembled.mesh)
    checkpoints.close()
    assert step is None or int(state.step) == step
    return state
