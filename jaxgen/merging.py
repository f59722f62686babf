"""A run of an adapter and its base as one ordinary run."""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import jaxgen
from jaxgen import config as configs
from jaxgen import directory, log, sharding
from jaxgen.checkpoint import Checkpoints
from jaxgen.contract import State
from jaxgen.data import Spec
from jaxgen.errors import UserError
from jaxgen.files import save_json
from jaxgen.metrics import features
from jaxgen.run import Run
from jaxgen.weights import whole
from jaxgen.weights.importing import RECORD


def merge(run: Run, to: str) -> None:
    """Writes the run `to`, at step 0, whose weights are those that `run` samples with: its base and the adapters, each
    by its scale. It samples the same and needs none of them.

    Raises:
      UserError: the run has no adapters, or there is something in `to`.
    """
    family = run.assembled.family
    if family.merged is None:
        raise UserError(f'--mode=merge: the run in {run.workdir} has no adapters: name the run of a LoRA')
    whole.check_free(os.path.expanduser(to), '--to')
    function, sections = family.merged
    config = configs.complete(sections(run.config.to_dict()))
    ema = sharding.jit(function)(run.state, run.assembled.frozen)
    digests = {name: one for name, one in run.assembled.stage_digests.items() if name in config.stages}
    title = f'{os.path.basename(os.path.abspath(run.workdir))}, merged at step {run.step}'
    record = {'source': 'jaxgen', 'title': title, 'file': run.workdir, 'licence': '', 'sha256': features.digest(ema)}
    record['jaxgen'] = jaxgen.__version__
    write(to, '--to', 'merge', config, run.assembled.spec, ema, run.state.extra, record, digests)
    log.say(f'{run.workdir} and what it stands on are one run at step 0: {to}')


def write(
    to: str,
    option: str,
    what: str,
    config: ConfigDict,
    spec: Spec,
    ema: dict[str, Any],
    extra: Any,
    record: dict[str, Any],
    digests: dict[str, str] | None = None,
) -> None:
    """Writes the run `to`, at step 0, with these weights.

    Args:
      option, what: that names the directory, and what is done, for messages.
      record: where the weights are from, see `importing.write_run`.
      digests: of the stages that they belong to.

    Raises:
      UserError: there is something in `to`.
    """
    to = os.path.expanduser(to)
    whole.check_free(to, option)
    averages = {f'{name}@{std}': tree for name, tree in ema.items() for std in config.optim.ema_std}
    state = State(step=jnp.zeros((), jnp.int32), params={}, opt={}, ema={**ema, **averages}, extra=extra)
    about: dict[str, Any] = {
        'jax': jax.__version__,
        'stages': digests or {},
        'imported': record,
        'meter': log.Meter().state(),
    }
    about['examples'] = 0
    with whole.new_directory(to, what, option) as new:
        checkpoints = Checkpoints(new, keep=1)
        try:
            checkpoints.save(state, about)
        finally:
            checkpoints.close()
        save_json(os.path.join(new, RECORD), record)
        directory.save_config(new, config, spec)
