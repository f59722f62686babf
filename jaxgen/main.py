"""The command: jaxgen --config=ddpm_digits, or python -m jaxgen.main --config=configs/ddpm_digits.py

Modes:
  train     train the config's run, or go on with it from its newest checkpoint (the default)
  sample    draw images from a trained run: PNG files, a grid and an .npz
  evaluate  metrics of a trained run: its family's own on the test split, and those of its samples against the
            data, in the features of the network that --features names; or of a folder of images,
            --images=FOLDER, against the data of --config: evaluation.json
  explore   sheets of a trained run: reconstructions, interpolations, traversals and maps of its latent space,
            its samples beside their nearest training images: PNG files
  describe  print what a config is, as JSON, without computing: parameters, bytes, batch, FLOPs
  list      print the configs that come with jaxgen, a line each: those with all the words that follow
  fields    print every field of a config: value, meaning, type, allowed values, default

`sample`, `evaluate` and `explore` read the run's own saved config, so `--workdir` is enough. Any field is
set by e.g. `--config.optim.lr=1e-3`; of a trained run those that training does not depend on.

Outputs, of other settings beside each other:
  sample    WORKDIR/samples/stepSTEP_WEIGHTS_seedSEED[_...]/ with images/, grid.png, samples.npz, film.png, or --out
  explore   WORKDIR/explore/stepSTEP_WEIGHTS_seedSEED[_...]/ with explore.json and the sheets, or --out
  evaluate  WORKDIR/results/stepSTEP_WEIGHTS_DIGEST.json, the newest also WORKDIR/evaluation.json;
            --images: runs/images_FOLDER/, or --out
In --out a later call replaces what an earlier one wrote there, and nothing else.

Exit codes: 0 done; 1 a fault stopped the run; 2 a mistake in the command or its config; 75 stopped by a
signal and saved, the same command goes on.
"""

from __future__ import annotations

import sys

from jaxgen import interrupt, options

if __name__ == '__main__':
    interrupt.install()  # before jax is imported, which takes a second and has threads of its own

import contextlib
import json
import math
import os
import textwrap

import einops
import jax
import numpy as np
from absl import flags

import jaxgen
from jaxgen import catalogue, checkpoint, data, describe, fields, files, hosts, log, outputs, sharding
from jaxgen import config as configs
from jaxgen import run as runs
from jaxgen.errors import RunError, UserError
from jaxgen.evaluation import cache, explore, record

MODES = ('train', 'sample', 'evaluate', 'explore', 'describe', 'fields', 'list')


def define_flags() -> flags.FlagValues:
    """The options of the command."""
    values = flags.FlagValues()
    string, integer, boolean = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_boolean
    string('mode', 'train', ' | '.join(MODES), flag_values=values)
    string(
        'config',
        '',
        'a config that comes with jaxgen, NAME or NAME:VARIANT, or FILE.py, FILE.py:VARIANT',
        flag_values=values,
    )
    string('workdir', '', 'directory of the run; default runs/<config name>', flag_values=values)
    string(
        'out',
        '',
        'sample, explore: where the images go; default WORKDIR/samples/..., WORKDIR/explore',
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
    string('features', '', 'evaluate: inception | run:PATH | none, the network to evaluate with', flag_values=values)
    string('inception', '', 'evaluate: file with the weights of Inception', flag_values=values)
    string(
        'images',
        '',
        'evaluate: a folder of images instead of a run, against the data of --config',
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        'condition', [], "sample: NAME=VALUE, e.g. label=3 or caption='a small red heart'", flag_values=values
    )
    boolean('profile', False, 'train: trace a few updates into WORKDIR/profile', flag_values=values)
    boolean('multihost', False, 'join the other hosts of the run first', flag_values=values)
    flags.DEFINE_boolean('help', False, 'show this', short_name='h', flag_values=values)
    boolean('version', False, 'show the version', flag_values=values)
    return values


HELP = """\
jaxgen {version}: generative models for images

  jaxgen --mode=list digits vae                            the configs that there are, by words
  jaxgen --config=ddpm_digits                              train; again: go on
  jaxgen --config=ddpm_digits:v --config.optim.lr=5e-4     a variant, with a field set
  jaxgen --mode=sample --workdir=runs/ddpm_digits --n=16   draw images
  jaxgen --mode=evaluate --workdir=runs/ddpm_digits        metrics, of the run and its samples
  jaxgen --mode=explore --workdir=runs/ddpm_digits         latent space, nearest training images
  jaxgen --mode=describe --config=ddpm_digits              parameters, bytes, batch, FLOPs
  jaxgen --mode=fields --config=ddpm_digits                every field of the config

Options:
{options}
  --config.FIELD=VALUE  any field of the config
"""


def help_text(values: flags.FlagValues) -> str:
    """The first screen: examples, and the options with a line or two each."""
    lines = []
    for name in (name for name in values if name != 'h'):
        value = '' if values[name].boolean else '=' + name.upper()
        first = f'  --{name + value:<20}'
        lines += textwrap.wrap(values[name].help, 96, initial_indent=first, subsequent_indent=' ' * 24)
    return HELP.format(version=jaxgen.__version__, options='\n'.join(lines)).rstrip()


def parse(argv: list[str]) -> tuple[flags.FlagValues, list[str]]:
    """(flags, overrides): the options, and `--config.x=y` apart."""
    for text in argv[1:]:
        if not options.is_text(text):
            raise UserError(f'cannot use {options.shown(text)}: it has zero bytes or half characters')
    overrides = [a for a in argv[1:] if a.startswith(('--config.', '-config.'))]
    values = define_flags()
    try:
        rest = values([argv[0], *[a for a in argv[1:] if a not in overrides]])
    except (flags.Error, ValueError) as e:  # absl raises the latter for --noNAME=VALUE
        raise UserError(' '.join(str(e).split()) + '; see --help') from e
    if len(rest) > 1 and values.mode != 'list':
        raise UserError(f'cannot use {rest[1]!r}: every argument is --NAME=VALUE; see --help')
    return values, overrides


# The options that each mode reads. Others would change nothing, so they are refused.
USING = ('config', 'workdir', 'weights', 'n', 'seed', 'multihost')
READS = {
    'train': ('config', 'workdir', 'profile', 'multihost'),
    'sample': (*USING, 'out', 'film', 'condition'),
    'evaluate': (*USING, 'features', 'inception'),
    'evaluate --images': ('config', 'workdir', 'images', 'out', 'features', 'inception', 'multihost'),
    'explore': (*USING, 'out'),
    'describe': ('config',),
    'fields': ('config',),
    'list': (),
}
WITHOUT_RUN = ('train', 'describe', 'fields')  # modes of a config
PATHS = ('workdir', 'out', 'images')  # options in which ~ is the home directory; the config knows its own


def check_flags(values: flags.FlagValues) -> None:
    """Raises UserError for options that the mode does not read, or that have impossible values."""
    mode = values.mode
    if mode not in MODES:
        raise UserError(f'--mode={mode}: no such mode{options.near(mode, MODES)}')
    which = f'{mode} --images' if values.images and mode == 'evaluate' else mode
    for name in values:
        if values[name].present and name not in ('mode', 'help', 'h', 'version', *READS[which]):
            modes = [other for other, names in READS.items() if name in names]
            if modes:
                raise UserError(
                    f'--{name} is read by --mode={", --mode=".join(modes)}, and not by --mode={which}: leave it out'
                )
    runs.check_weights_name(values.weights)
    for name in ('n', 'film', 'seed'):
        if values[name].present:
            runs.check_integer(f'--{name}', values[name].value, 0 if name == 'seed' else 1)
    if mode != 'list' and not values.config and (mode in WITHOUT_RUN or not values.workdir):
        need = '--config=FILE' if mode in WITHOUT_RUN else '--workdir=DIRECTORY of a run, or --config=FILE'
        raise UserError(f'--mode={mode} needs {need}')


def parse_condition(text: str) -> tuple[str, str]:
    """(name, value) of NAME=VALUE."""
    name, equals, value = text.partition('=')
    if not name or not equals:
        raise UserError(f"write --condition=label=NUMBER or --condition=caption='some words'; it is {text!r}")
    return name, value


def sample_mode(run, n: int, seed: int, condition: dict[str, str], out: str, frames: int) -> None:
    """Samples as PNG files, a grid of them, an .npz and a film, into WORKDIR/samples/NAME; NAME says the settings."""
    numbers = {**({'n': n} if n else {}), **({'film': frames} if frames else {})}
    n = n or 64
    name = outputs.name(run, run.changes(), seed, condition, **numbers)
    out, first = out or os.path.join(run.workdir, 'samples', name), jax.process_index() == 0
    outputs.written(out, 'samples.npz')  # its mistakes come before anything is computed
    film = run.film(min(n, 8), frames, seed, condition) if frames else None
    pieces = run.draw(n, seed, condition)
    with outputs.directory(out, 'samples.npz') if first else contextlib.nullcontext('') as folder:
        images: list[np.ndarray] = []
        with log.bar(n, quiet=not first) as bar:
            for piece in pieces:
                for image in piece:
                    if first:
                        files.save_png(os.path.join(folder, 'images', f'{len(images):05d}.png'), image)
                    images.append(image)
                bar.update(len(piece))
        if not first:
            return
        files.save_png(os.path.join(folder, 'grid.png'), files.grid(np.stack(images[:256])))
        if film is not None:
            states = einops.rearrange(film, 'n rows frames h w c -> (n rows frames) h w c')
            files.save_png(os.path.join(folder, 'film.png'), files.grid(states, film.shape[2]))
        files.save_npz(os.path.join(folder, 'samples.npz'), {'images': np.stack(images)}, compressed=True)
    log.say(f'{n} samples by the {run.weights} weights of step {run.step}: {out}')


def evaluate_mode(run, seed: int) -> None:
    """The family's own metrics, and those of its samples, into WORKDIR/evaluation.json.

    That file is the newest; those of all settings lie beside each other in WORKDIR/results.
    """
    config, family = run.config.evaluate, run.assembled.family
    evaluator = None
    if config.features != 'none' and family.sample is not None:
        evaluator = runs.make_evaluator(run.config, run.assembled.mesh, run.assembled.unnamed)
        evaluator.check(config.samples)
    about = {'step': run.step, 'weights': run.weights, 'split': 'test', 'seed': run.config.seed}
    if config.examples:
        about['examples'] = config.examples
    metrics = run.evaluate() | run.modes(config.samples, seed)
    if evaluator is not None:
        metrics |= run.compare(evaluator, config.samples, seed)
        about |= {'samples': {'n': config.samples, 'seed': seed}, **evaluator.about()}
    if changes := run.changes():
        about['config'] = changes
    record.save(run.workdir, about, metrics)
    cache.clear(run.workdir)


def explore_mode(run, n: int, seed: int, out: str) -> None:
    """Sheets of a run's latent space and of its samples' neighbours, into WORKDIR/explore/NAME."""
    name = outputs.name(run, run.changes(), seed, None, **({'n': n} if n else {}))
    n, out = n or 8, out or os.path.join(run.workdir, 'explore', name)
    first = jax.process_index() == 0
    with outputs.directory(out, 'explore.json') if first else contextlib.nullcontext('') as folder:
        metrics = explore.explore(run, n, seed, folder)
        if not first:
            return
        about = {'step': run.step, 'weights': run.weights, 'seed': seed}
        files.save_json(os.path.join(folder, 'explore.json'), {**about, **metrics})
    for name, metric in metrics.items():
        print(f'{name}: {metric["value"]:.4g}, n = {metric["n"]}')
    log.say(f'written to {out}')


def images_mode(config, unnamed: dict[str, str], folder: str, out: str) -> None:
    """The metrics of a folder of images against the data set of a config."""
    if config.evaluate.features == 'none':
        raise UserError('--images needs --features=inception or --features=run:PATH: the network to evaluate with')
    out = out or os.path.join('runs', f'images_{os.path.basename(os.path.abspath(folder))}')
    files.check_writable(out, '--out')
    mesh = sharding.make_mesh(math.gcd(config.mesh.fsdp, jax.device_count()))
    evaluator = runs.make_evaluator(config, mesh, unnamed)
    images = data.FolderImages(folder, evaluator.image)
    evaluator.check(len(images))
    metrics = evaluator.compare_images(images, folder)
    record.save(out, {'images': {'folder': os.path.abspath(folder), 'n': len(images)}, **evaluator.about()}, metrics)


def show(text: str) -> None:
    """Prints a text, as much of it as is read: a pipe into `head` or a pager may close."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is written at exit either


def main(argv: list[str]) -> None:
    """Runs one mode. Raises UserError and RunError; `run_main` turns them into exit codes."""
    values, overrides = parse(argv)
    if values.version:
        show(f'jaxgen {jaxgen.__version__}')
        return
    if values.help or len(argv) < 2:
        show(help_text(values))
        return
    check_flags(values)
    mode = values.mode
    if mode == 'list':
        if overrides:
            raise UserError(f'{overrides[0]} is a field of one config, and --mode=list reads none: leave it out')
        words = define_flags()(argv)[1:]
        if not (lines := catalogue.text(words)):
            raise UserError(f'no config has {options.shown(" ".join(words))}; --mode=list without words prints all')
        show(lines)
        return
    for name in PATHS:
        files.check_local(getattr(values, name), f'--{name}')
        setattr(values, name, os.path.expanduser(getattr(values, name)))
    if mode == 'fields':
        show(fields.text(configs.override(configs.load(values.config), overrides)))
        return
    measured = {
        'features': values.features,
        'inception': values.inception,
        'samples': values.n if mode == 'evaluate' else 0,
    }
    overrides += [f'--config.evaluate.{name}={value}' for name, value in measured.items() if value]
    workdir = values.workdir or os.path.join('runs', configs.name(values.config))
    if values.multihost:
        hosts.start()
    sharding.check_devices()
    if mode in ('train', 'describe'):
        config = configs.override(configs.load(values.config), overrides)
        if mode == 'train':
            from jaxgen.train import train

            train(config, workdir, values.profile)
        else:
            runs.check_cycle(workdir, config, untrained=True)
            print(json.dumps(describe.describe(config, runs.assemble(config, stage=runs.abstract_stage)), indent=2))
        return
    named = configs.fields_of(overrides)
    if values.images and not values.workdir:
        images_mode(configs.override(configs.load(values.config), overrides), {}, values.images, values.out)
        return
    saved = runs.saved_config(workdir)
    if values.config and values.workdir:
        runs.check_system(workdir, saved, values.config)
    config = configs.override(saved, overrides)
    if values.images:
        config, _, unnamed = runs.read(workdir, config, named)
        images_mode(config, unnamed, values.images, values.out)
        return
    condition = dict(parse_condition(text) for text in values.condition)
    if jax.process_index() == 0:
        files.check_writable(values.out or workdir, '--out' if values.out else '--workdir')
    run = runs.load(workdir, config=config, weights=values.weights, all_weights=mode == 'evaluate', named=named)
    if mode == 'sample':
        sample_mode(run, values.n, values.seed, condition, values.out, values.film)
    elif mode == 'explore':
        explore_mode(run, values.n, values.seed, values.out)
    else:
        evaluate_mode(run, values.seed)


def printable(message: str) -> str:
    """A message on one line; names of files and classes may hold anything."""
    return ''.join(c if c.isprintable() else ' ' for c in message)


def device_fault(e: jax.errors.JaxRuntimeError) -> str:
    """The message of a device's fault, with what helps."""
    text = printable(' '.join(str(e).split()))[:300]
    if 'RESOURCE_EXHAUSTED' in text or 'out of memory' in text.lower():
        return f'the device is out of memory: make config.data.batch, sample.batch or evaluate.batch smaller ({text})'
    return f'the device failed: {text}'


def run_main(argv: list[str]) -> int:
    """Runs one mode; returns the exit code. A person's mistake or a fault is one line on stderr."""
    try:
        with hosts.joined():
            main(argv)
    except UserError as e:
        print(f'jaxgen: error: {printable(str(e))}', file=sys.stderr)
        return 2
    except MemoryError as e:
        print(f'jaxgen: stopped: out of memory {printable(" ".join(str(e).split()))}'.rstrip(), file=sys.stderr)
        return 1
    except jax.errors.JaxRuntimeError as e:
        print(f'jaxgen: stopped: {device_fault(e)}', file=sys.stderr)
        return 1
    except (RunError, OSError) as e:
        print(f'jaxgen: stopped: {printable(" ".join(str(e).split()))}', file=sys.stderr)
        return 1
    return 0


def command() -> int:
    """Runs one mode by the arguments of the process; the exit code, once other hosts have theirs."""
    sys.unraisablehook = checkpoint.print_unraisable
    code = run_main(sys.argv)
    hosts.leave(code)
    return code


if __name__ == '__main__':
    sys.exit(command())
