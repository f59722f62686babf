"""The command: python -m jaxgen.main --config=configs/ddpm_digits.py

Modes:
  train     train the config's run, or go on with it from its newest checkpoint (the default)
  sample    draw images from a trained run: PNG files, a grid and an .npz
  evaluate  measure a trained run: its own figures on the test split, and its samples against the
            data, with the network named by --features; or a folder of pictures, --images=FOLDER,
            against the data of --config: evaluation.json
  explore   look into a trained run: reconstructions, interpolations, traversals and maps of its latent space,
            its samples beside the training pictures nearest to them: PNG files
  describe  print what a config is, as JSON, without computing: parameters, bytes, batch, FLOPs

`sample`, `evaluate` and `explore` read the run's own saved config, so `--workdir` is enough. Any field is
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
import re
import shutil

import jax
import numpy as np
from absl import flags

from jaxgen import checkpoint, data, describe, evaluate, explore, log, sharding
from jaxgen import config as configs
from jaxgen import run as runs
from jaxgen.errors import RunError, UserError

MODES = ('train', 'sample', 'evaluate', 'explore', 'describe')


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    string, integer, boolean = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_boolean
    string('mode', 'train', ' | '.join(MODES), flag_values=values)
    string('config', '', 'config file, FILE.py or FILE.py:VARIANT', flag_values=values)
    string('workdir', '', 'directory of the run; default runs/<config name>', flag_values=values)
    string(
        'out',
        '',
        'sample, explore: where the pictures go; default WORKDIR/samples/..., WORKDIR/explore',
        flag_values=values,
    )
    string('weights', 'ema', 'sample, evaluate, explore: ema | params | width of an average, 0.07', flag_values=values)
    integer(
        'n',
        0,
        'how many samples; default 64, in evaluate config.evaluate.samples; explore: rows, default 8',
        flag_values=values,
    )
    integer('seed', 0, 'sample, evaluate, explore: of the noise', flag_values=values)
    integer('film', 0, 'sample: frames of film.png, the steps of the first 8 samples', flag_values=values)
    string('features', '', 'evaluate: inception | run:PATH | none, the network to measure with', flag_values=values)
    string('inception', '', 'evaluate: file with the weights of Inception', flag_values=values)
    string(
        'images',
        '',
        'evaluate: a folder of pictures instead of a run, against the data of --config',
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        'condition', [], "sample: NAME=VALUE, e.g. label=3 or caption='a small red heart'", flag_values=values
    )
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


def as_number(text: str) -> float:
    """0 for what is none."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def given_condition(text: str) -> tuple[str, str]:
    name, equals, value = text.partition('=')
    if not name or not equals:
        raise UserError(f"write --condition=label=NUMBER or --condition=caption='some words'; it is {text!r}")
    return name, value


def sample_mode(run, n: int, seed: int, condition: dict[str, str], out: str, frames: int) -> None:
    n = n or 64
    film = run.film(min(n, 8), frames, seed, condition) if frames else None
    given = ''.join(f'_{name}{re.sub("[^a-z0-9]+", "-", value.lower())}' for name, value in condition.items())
    own = os.path.join(run.workdir, 'samples', f'step{run.step}_{run.weights}_seed{seed}{given}')
    first, out = jax.process_index() == 0, out or own
    pieces = run.draw(n, seed, condition)  # its mistakes come before anything is removed
    if first and out == own:
        shutil.rmtree(out, ignore_errors=True)  # of a larger n
    images = []
    with log.bar(n, quiet=not first) as bar:
        for piece in pieces:
            for image in piece:
                if first:
                    log.save_png(os.path.join(out, 'images', f'{len(images):05d}.png'), image)
                images.append(image)
            bar.update(len(piece))
    if not first:
        return
    images = np.stack(images)
    log.save_png(os.path.join(out, 'grid.png'), log.grid(images[:256]))
    np.savez_compressed(os.path.join(out, 'samples.npz'), images=images)
    if film is not None:
        log.save_png(os.path.join(out, 'film.png'), log.grid(film.reshape(-1, *film.shape[3:]), film.shape[2]))
    log.say(f'{n} samples by the {run.weights} weights of step {run.step}: {out}')


def evaluate_mode(run, seed: int) -> None:
    """The family's own figures, and those of its samples, into WORKDIR/evaluation.json."""
    config, family = run.config.evaluate, run.assembled.family
    evaluator = None
    if config.features != 'none' and family.sample is not None:
        evaluator = runs.make_evaluator(run.config, run.assembled.mesh)
        evaluator.check(config.samples)
    record = {'step': run.step, 'weights': run.weights, 'split': 'test', 'seed': run.config.seed}
    metrics = run.evaluate() | run.modes(config.samples, seed)
    if evaluator is not None:
        metrics |= run.compare(evaluator, config.samples, seed)
        record |= {'samples': {'n': config.samples, 'seed': seed}, **evaluator.about()}
    save_evaluation(os.path.join(run.workdir, 'evaluation.json'), record, metrics)
    evaluate.forget(run)


def explore_mode(run, n: int, seed: int, out: str) -> None:
    """Pictures of a run's latent space and of its samples' neighbours, into WORKDIR/explore."""
    n, out = n or 8, out or os.path.join(run.workdir, 'explore')
    found = explore.explore(run, n, seed, out)
    if jax.process_index() != 0:
        return
    for name, figure in found.items():
        print(f'{name}: {figure["value"]:.4g}, n = {figure["n"]}')
    log.save_json(os.path.join(out, 'explore.json'), {'step': run.step, 'weights': run.weights, 'seed': seed, **found})


def images_mode(config, folder: str, out: str) -> None:
    """The figures of a folder of pictures against the data set of a config."""
    if config.evaluate.features == 'none':
        raise UserError('--images needs --features=inception or --features=run:PATH: the network to measure with')
    evaluator = runs.make_evaluator(config, sharding.make_mesh(config.mesh.fsdp))
    pictures = data.Pictures(folder, evaluator.image)
    evaluator.check(len(pictures))

    def pieces():
        size = evaluator.batch(len(pictures))
        with log.bar(len(pictures), folder, jax.process_index() != 0) as bar:
            for start in range(0, len(pictures), size):
                images = pictures[start : start + size]
                yield evaluator.extract(images, len(pictures))
                bar.update(len(images))

    metrics = evaluator.figures(pieces(), len(pictures))
    out = out or os.path.join('runs', f'images_{os.path.basename(os.path.abspath(folder))}')
    record = {'images': {'folder': os.path.abspath(folder), 'n': len(pictures)}, **evaluator.about()}
    save_evaluation(os.path.join(out, 'evaluation.json'), record, metrics)


def save_evaluation(path: str, record: dict, metrics: dict[str, dict]) -> None:
    """Writes evaluation.json and prints the figures."""
    if jax.process_index() != 0:
        return
    for name, m in metrics.items():
        spread = next((f' +- {m[key]:.4g} ({key})' for key in ('stderr', 'std') if key in m), '')
        against = f' against {m["n_reference"]}' if 'n_reference' in m else ''
        best = f'; latent {m["latent"]} knows {m["known"]:.4g}' if 'latent' in m else ''
        print(f'{name}: {m["value"]:.6g}{spread}, n = {m["n"]}{against}{best}')
    device = f'{jax.device_count()} x {jax.devices()[0].device_kind}'
    versions = {'jax': jax.__version__, 'jaxgen': jaxgen.__version__, 'numpy': np.__version__}
    log.save_json(path, {**record, 'metrics': metrics, 'versions': versions, 'device': device})
    log.say(f'written to {path}')


def main(argv: list[str]) -> None:
    """Runs one mode. Raises UserError and RunError; `run_main` turns them into exit codes."""
    values, overrides = parse(argv)
    if values.help:
        print(__doc__ + '\n' + values.main_module_help().partition('\n')[2])
        return
    mode = values.mode
    if mode not in MODES:
        raise UserError(f'--mode={mode}: no such mode{configs.near(mode, MODES)}')
    if values.weights not in ('ema', 'params') and not 0 < as_number(values.weights) < 0.288:
        raise UserError(
            f'--weights must be ema, params or the width of an average, between 0 and 0.288; it is {values.weights!r}'
        )
    if min(values.n, values.film) < 0 or not 0 <= values.seed < 2**31:
        raise UserError('--n, --film and --seed must not be negative, and --seed less than 2**31')
    if not values.config and (mode in ('train', 'describe') or not values.workdir):
        need = '--config=FILE' if mode in ('train', 'describe') else '--workdir=DIRECTORY of a run, or --config=FILE'
        raise UserError(f'--mode={mode} needs {need}')
    if values.images and mode != 'evaluate':
        raise UserError(f'--images is measured by --mode=evaluate; the mode is {mode}')
    given = {
        'features': values.features,
        'inception': values.inception,
        'samples': values.n if mode == 'evaluate' else 0,
    }
    overrides += [f'--config.evaluate.{name}={value}' for name, value in given.items() if value]
    workdir = values.workdir or os.path.join('runs', configs.name(values.config))
    if values.multihost:
        sharding.start_hosts()
    if mode in ('train', 'describe'):
        config = configs.override(configs.load(values.config), overrides)
        if mode == 'train':
            from jaxgen.train import train

            train(config, workdir, values.profile)
        else:
            print(json.dumps(describe.describe(config, runs.assemble(config, stage=runs.abstract_stage)), indent=2))
        return
    condition = dict(given_condition(text) for text in values.condition)
    if values.images:
        config = runs.saved_config(values.workdir) if values.workdir else configs.load(values.config)
        images_mode(configs.override(config, overrides), values.images, values.out)
        return
    config = configs.override(runs.saved_config(workdir), overrides)
    run = runs.load(workdir, config=config, weights=values.weights, all_weights=mode == 'evaluate')
    if mode == 'sample':
        sample_mode(run, values.n, values.seed, condition, values.out, values.film)
    elif mode == 'explore':
        explore_mode(run, values.n, values.seed, values.out)
    else:
        evaluate_mode(run, values.seed)


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
