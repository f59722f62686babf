"""The command: python -m jaxgen.main --config=configs/ddpm_digits.py

Modes:
  train     train the config's run, or go on with it from its newest checkpoint (the default)
  sample    draw images from a trained run: PNG files, a grid and an .npz
  evaluate  measure a trained run on the test split: evaluation.json
  describe  print what a config is, as JSON, without computing: parameters, bytes, batch, FLOPs

`sample` and `evaluate` read the run's own saved config, so `--workdir` is enough. Any field is
set by e.g. `--config.optim.lr=1e-3`.

Exit codes: 0 done; 1 a fault stopped the run; 2 a mistake in what was asked for; 75 told to
stop, saved, the same command goes on.
"""

from __future__ import annotations

import sys

import jaxgen
from jaxgen import interrupt

if __name__ == '__main__':
    interrupt.install()  # before jax is imported, which takes a second and has threads of its own

import json
import os
import shutil

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from jaxgen import checkpoint, data, describe, log, sharding
from jaxgen import config as configs
from jaxgen import run as runs
from jaxgen.errors import RunError, UserError

MODES = ('train', 'sample', 'evaluate', 'describe')


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    string, integer, boolean = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_boolean
    string('mode', 'train', ' | '.join(MODES), flag_values=values)
    string('config', '', 'config file, FILE.py or FILE.py:VARIANT', flag_values=values)
    string('workdir', '', 'directory of the run; default runs/<config name>', flag_values=values)
    string('out', '', 'sample: where the pictures go; default WORKDIR/samples/...', flag_values=values)
    string('weights', 'ema', 'sample, evaluate: ema | params', flag_values=values)
    integer('n', 0, 'how many: samples (default 64), test examples (default all)', flag_values=values)
    integer('seed', 0, 'sample: of the noise', flag_values=values)
    flags.DEFINE_multi_string('condition', [], 'sample: NAME=VALUE, e.g. label=3', flag_values=values)
    boolean('profile', False, 'train: trace a few updates into WORKDIR/profile', flag_values=values)
    boolean('multihost', False, 'join the other hosts of the run first', flag_values=values)
    boolean('help', False, 'show this', flag_values=values)
    return values


def parse(argv: list[str]) -> tuple[flags.FlagValues, list[str]]:
    """Flags, and the `--config.x=y` overrides apart."""
    overrides = [a for a in argv[1:] if a.startswith(('--config.', '-config.'))]
    values = define_flags()
    try:
        rest = values([argv[0], *[a for a in argv[1:] if a not in overrides]])
    except flags.Error as e:
        raise UserError(' '.join(str(e).split()) + '; see --help') from e
    if len(rest) > 1:
        raise UserError(f'cannot use {rest[1]!r}: every argument is --NAME=VALUE; see --help')
    return values, overrides


def number(text: str) -> tuple[str, int]:
    name, _, value = text.partition('=')
    try:
        return name, int(value)
    except ValueError as e:
        raise UserError(f'write --condition={name or "label"}=NUMBER; it is {text!r}') from e


def sample_mode(run, n: int, seed: int, condition: dict[str, int], out: str) -> None:
    n = n or 64
    given = ''.join(f'_{name}{value}' for name, value in condition.items())
    own = os.path.join(run.workdir, 'samples', f'step{run.step}_{run.weights}_seed{seed}{given}')
    first, out = jax.process_index() == 0, out or own
    pieces = run.draw(n, seed, condition)  # its mistakes come before anything is removed
    if first and out == own:
        shutil.rmtree(out, ignore_errors=True)  # of a larger n
    images = []
    with tqdm(total=n, unit='image', file=sys.stderr, disable=not first) as bar:
        for piece in pieces:
            for image in piece:
                if first:
                    log.save_png(os.path.join(out, f'{len(images):05d}.png'), image)
                images.append(image)
            bar.update(len(piece))
    if not first:
        return
    images = np.stack(images)
    log.save_png(os.path.join(out, 'grid.png'), log.grid(images[:256]))
    np.savez_compressed(os.path.join(out, 'samples.npz'), images=images)
    log.say(f'{n} samples by the {run.weights} weights of step {run.step}: {out}')


def evaluate_mode(run, n: int) -> None:
    total = len(data.dataset(run.config.data, 'test'))
    with tqdm(total=min(n or run.config.evaluate.n or total, total), unit='image', file=sys.stderr) as bar:
        metrics = run.evaluate(n, lambda done: bar.update(done - bar.n))
    if jax.process_index() != 0:
        return
    device = jax.devices()[0]
    record = {
        'step': run.step,
        'weights': run.weights,
        'split': 'test',
        'seed': run.config.seed,
        'metrics': metrics,
        'versions': {'jax': jax.__version__, 'jaxgen': jaxgen.__version__},
        'device': f'{jax.device_count()} x {device.device_kind}',
    }
    path = os.path.join(run.workdir, 'evaluation.json')
    log.save_json(path, record)
    for name, m in metrics.items():
        print(f'{name}: {m["mean"]:.4f} +- {m["stderr"]:.4f} ({m["n"]} examples)')
    log.say(f'by the {run.weights} weights of step {run.step}: {path}')


def main(argv: list[str]) -> None:
    """Runs one mode. Raises UserError and RunError; `run_main` turns them into exit codes."""
    values, overrides = parse(argv)
    if values.help:
        print(__doc__ + '\n' + values.main_module_help().partition('\n')[2])
        return
    mode = values.mode
    if mode not in MODES:
        raise UserError(f'--mode={mode}: no such mode{configs.near(mode, MODES)}')
    if values.weights not in ('ema', 'params'):
        raise UserError(f'--weights must be ema or params; it is {values.weights!r}')
    if values.n < 0 or not 0 <= values.seed < 2**31:
        raise UserError('--n and --seed must not be negative, and --seed less than 2**31')
    if not values.config and (mode in ('train', 'describe') or not values.workdir):
        need = '--config=FILE' if mode in ('train', 'describe') else '--workdir=DIRECTORY of a run, or --config=FILE'
        raise UserError(f'--mode={mode} needs {need}')
    workdir = values.workdir or os.path.join('runs', configs.name(values.config))
    if values.multihost:
        sharding.start_hosts()
    if mode in ('train', 'describe'):
        config = configs.override(configs.load(values.config), overrides)
        if mode == 'train':
            from jaxgen.train import train

            train(config, workdir, values.profile)
        else:
            print(json.dumps(describe.describe(config, runs.assemble(config)), indent=2))
        return
    condition = dict(number(text) for text in values.condition)
    config = configs.override(runs.saved_config(workdir), overrides)
    run = runs.load(workdir, config=config, weights=values.weights, all_weights=mode == 'evaluate')
    if mode == 'sample':
        sample_mode(run, values.n, values.seed, condition, values.out)
    else:
        evaluate_mode(run, values.n)


def run_main(argv: list[str]) -> int:
    """Runs one mode; returns the exit code. A person's mistake or a fault is one line on stderr."""
    try:
        main(argv)
    except UserError as e:
        print(f'jaxgen: error: {e}', file=sys.stderr)
        return 2
    except (RunError, OSError) as e:
        print(f'jaxgen: stopped: {" ".join(str(e).split())}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.unraisablehook = checkpoint.print_unraisable
    sys.exit(run_main(sys.argv))
