"""What `import jaxgen` offers in a program or a notebook: configs by name, with fields changed, and training.

    config = jaxgen.config('ddpm_digits', optim={'lr': 5e-4}, **{'train.steps': 1000})
    run = jaxgen.train(config, 'runs/mine', callbacks=[lambda step, logs, run: print(step, logs['loss'])])

`jaxgen.config` and `jaxgen.train` are modules that can be called: the functions below are what a call of them does.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from jaxgen import config as configs
from jaxgen import files, imports, options
from jaxgen.errors import UserError

if TYPE_CHECKING:
    from jaxgen.run import Run
    from jaxgen.train import Callback


def config(name: str | os.PathLike | ConfigDict = '', /, **overrides) -> ConfigDict:
    """A complete, checked config.

    Args:
      name: of a config that comes with jaxgen, 'ddpm_digits' or 'ddpm_digits:tiny,conditional'; or of a file,
        'mine.py:small'; or a config, whose fields are checked again; '' begins with the defaults.
      **overrides: the fields that differ, as sections, `optim={'lr': 1e-3}`, or by their paths,
        `**{'optim.lr': 1e-3}`. A family or network of your own is a dotted path, or the module, function or class.

    Raises:
      UserError: no such config or field, or a value that it does not take: one line that says what it takes.
    """
    given = configs.nested_fields(configs.plain(overrides))
    imports.name_those_of(given)
    if isinstance(name, ConfigDict | dict):
        sections = configs.nested_fields(configs.plain(name))
    elif not isinstance(name, str | os.PathLike):
        raise UserError(f"a config is named by a text like 'ddpm_digits'; it is {options.shown(name)}")
    else:
        sections = configs.load(os.fspath(name)).to_dict() if os.fspath(name) else {}
    return configs.complete(configs.update_sections(sections, given))


def train(
    config: str | os.PathLike | ConfigDict, workdir: str | os.PathLike = '', callbacks: Sequence[Callback] = ()
) -> Run:
    """Trains a run to config.train.steps, from its newest checkpoint if there is one, and returns it.

    Ctrl-C (or SIGTERM) saves the state and then raises KeyboardInterrupt (or ends the program, as it would anyway):
    the same call goes on from there. In another thread than the main one there are no signals to catch.

    Args:
      config: a config, or the name of one; see `jaxgen.config`.
      workdir: the run's directory; 'runs/NAME' by default, where the config is named.
      callbacks: functions (step, logs, run), called where a line is written to metrics.jsonl: `logs` are its numbers,
        {name: number}, means of the updates' logs, or held-out metrics, or metrics of samples. `run` is a Run of the
        present weights; it can be used until the function returns. Weights and metrics are the same, bit for bit, as
        without callbacks. What a callback raises ends the training, once the state is saved. With several hosts they
        are called on each.

    Raises:
      UserError: the config does not fit itself, the devices or the run in `workdir`.
      RunError: not a number, a full disk, no readable checkpoint.
    """
    from jaxgen import sharding  # here, since jax is imported
    from jaxgen.train import train as train_run

    if not isinstance(callbacks, list | tuple) or not all(map(callable, callbacks)):
        raise UserError(f'callbacks must be a list of functions (step, logs, run); it is {options.shown(callbacks)}')
    checked = configs_of(config)
    workdir = files.as_path(workdir, 'workdir')
    if not workdir:
        if not isinstance(config, str | os.PathLike):
            raise UserError("name the run's directory: jaxgen.train(config, 'runs/NAME')")
        workdir = os.path.join('runs', configs.name(os.fspath(config)))
    files.check_local(workdir, 'workdir')
    sharding.check_devices()
    return train_run(checked, workdir, callbacks=callbacks)


configs_of = config  # under a name that no argument has


def import_weights(
    path: str | os.PathLike,
    *,
    name: str = '',
    config: str | os.PathLike | ConfigDict | None = None,
    workdir: str | os.PathLike = '',
    names: str = '',
    discriminator: str | os.PathLike = '',
    tokenizer: str | os.PathLike = '',
) -> Run:
    """The run at step 0 that holds the weights of a published file or folder, which is made in `workdir`.

    Args:
      path: a .safetensors file, a file of torch, or a folder of the hub.
      name: of published weights, see `jaxgen.published()`: it says config and source.
      config: of the network that the weights are of, where they have no such name. Without either it is made by the
        config.json of a model or pipeline of diffusers or transformers.
      workdir: the run's directory; 'runs/NAME' by default, of the config.
      names: of the source, where the names in the file fit several.
      discriminator: of a GAN, a file of its own, where `path` does not have it.
      tokenizer: of a text encoder, a folder of its own, where `path` does not have it.

    Raises:
      UserError: no such weights, or they do not fit the config; a file that only code could open.
    """
    from jaxgen import run as runs
    from jaxgen.weights import importing, pipelines
    from jaxgen.weights import published as known

    if name and config is not None:
        raise UserError('name the published weights, or give the config of their network: one of them')
    licence = ''
    reader = files.as_path(tokenizer, 'tokenizer')
    if not name and config is None:
        base, checked = pipelines.derived(files.as_path(path, 'path'), reader)
    elif name:
        one = known.find(name)
        licence = one.licence
        checked, names, base = known.config_of(one), names or one.names, one.config
    else:
        from jaxgen import tuning  # which reads runs

        checked = configs_of(tuning.for_weights(os.fspath(config)) if isinstance(config, str | os.PathLike) else config)
        base = configs.name(os.fspath(config)) if isinstance(config, str | os.PathLike) else ''
    workdir = files.as_path(workdir, 'workdir') or (os.path.join('runs', base) if base else '')
    if not workdir:
        raise UserError("name the run's directory: jaxgen.import_weights(..., workdir='runs/NAME')")
    critic = files.as_path(discriminator, 'discriminator')
    importing.import_weights(checked, files.as_path(path, 'path'), workdir, names, licence, critic, tokenizer=reader)
    return runs.load(workdir)
