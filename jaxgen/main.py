"""The command: jaxgen --config=ddpm_digits, or python -m jaxgen.main --config=configs/ddpm_digits.py

Modes:
  train     train the config's run, or go on with it from its newest checkpoint (the default)
  sample    draw images from a trained run: PNG files, a grid and an .npz
  evaluate  metrics of a trained run: its family's own on the test split, and those of its samples against the
            data, in the features of the network that --features names; or of a folder of images,
            --images=FOLDER, against the data of --config: evaluation.json
  explore   sheets of a trained run: reconstructions, interpolations, traversals and maps of its latent space,
            its samples beside their nearest training images: PNG files
  pack      a run, its newest checkpoint and its stages into one folder or archive, --out: to move or to share
  describe  print what a config is, as JSON, without computing: parameters, bytes, batch, FLOPs
  compile   compile the training step and the sampler for --topology, TPUs that need not be there: memory, FLOPs, bytes
            of HBM, what is sent, the least time, and what to change; --out=FILE.json has all numbers
  prepare   compute what frozen stages make of a config's training images, latents or codes, which training does by
            itself where it is worth it (config.data.prepared): on another machine, or before many trainings
  import    make a run of published weights, at step 0: --from=FILE_OR_FOLDER [--names=SOURCE]; a model of diffusers
            needs no --config
  export    write a run's weights with the names of a source: --to=FILE_OR_FOLDER [--names=SOURCE]
  merge     write one ordinary run of a run with adapters (LoRA), its base and their scales: --to=RUN
  data      print what the data of a config are, before training: counts, sizes, classes, what is left out; an image
            grid of a training batch and of test examples: PNG and JSON
  list      print the configs that come with jaxgen, a line each: those with all the words that follow
  fields    print every field of a config: value, meaning, type, allowed values, default

`sample`, `evaluate` and `explore` read the run's own saved config, so `--workdir` is enough. Any field is
set by e.g. `--config.optim.lr=1e-3`; of a trained run those that training does not depend on.

Outputs, of other settings beside each other:
  sample    WORKDIR/samples/stepSTEP_WEIGHTS_seedSEED[_...]/ with images/, grid.png, samples.npz, film.png, or --out
  explore   WORKDIR/explore/stepSTEP_WEIGHTS_seedSEED[_...]/ with explore.json and the sheets, or --out
  evaluate  WORKDIR/results/stepSTEP_WEIGHTS_DIGEST.json, the newest also WORKDIR/evaluation.json;
            --images: runs/images_FOLDER/, or --out
  data      WORKDIR/data/ with grid.png and summary.json, or --out
In --out a later call replaces what an earlier one wrote there, and nothing else.

Exit codes: 0 done; 1 a fault stopped the run; 2 a mistake in the command or its config; 75 stopped by a
signal and saved, the same command goes on.
"""

from __future__ import annotations

import sys

from jaxgen import arguments, interrupt, options

if __name__ == '__main__':
    arguments.check_platform()
    interrupt.install()  # before jax is imported, which takes a second and has threads of its own
    arguments.begin(sys.argv)

import contextlib
import gc
import json
import math
import os

import einops
import jax
import numpy as np
from absl import flags

import jaxgen
from jaxgen import (
    assembly,
    catalogue,
    checkpoint,
    compilation,
    data,
    describe,
    directory,
    fields,
    files,
    hosts,
    log,
    merging,
    outputs,
    pack,
    prepare,
    sharding,
    slices,
    tuning,
)
from jaxgen import config as configs
from jaxgen import run as runs
from jaxgen.conditions import PROMPTS
from jaxgen.data import folder, summary
from jaxgen.errors import RunError, UserError
from jaxgen.evaluation import cache, explore, record, samples
from jaxgen.sections import sides
from jaxgen.weights import exporting, importing, pipelines

MOST_PROMPTS = 2**26  # bytes of a file of texts
# Those that need no run.
CONFIG_MODES = ('train', 'describe', 'compile', 'prepare', 'data', 'import')


def parse_condition(text: str) -> tuple[str, str]:
    """(name, value) of NAME=VALUE."""
    name, equals, value = text.partition('=')
    if not name or not equals:
        raise UserError(
            "write --condition=label=NUMBER, --condition=caption='some words' or --condition=image=FILE; it is "
            f'{text!r}'
        )
    return name, value


def parse_conditions(texts: list[str]) -> dict[str, str | list[str]]:
    """{name: value} of texts NAME=VALUE; several of one name, and the lines of a file, caption=@FILE, are values of one
    sample each."""
    condition: dict[str, list[str]] = {}
    listed = set()  # also where a file has one line
    for name, value in map(parse_condition, texts):
        if name in PROMPTS and value.startswith('@'):
            condition.setdefault(name, []).extend(prompts(name, value[1:]))
            listed.add(name)
        else:
            condition.setdefault(name, []).append(value)
    return {name: values if len(values) > 1 or name in listed else values[0] for name, values in condition.items()}


def prompts(name: str, path: str) -> list[str]:
    """The lines of a file that are not blank.

    Raises:
      UserError: there is no such file, it is no text in UTF-8, or too large.
    """
    path = os.path.expanduser(path)
    try:
        with folder.open_regular(path) as file:
            content = file.read(MOST_PROMPTS + 1)
        if len(content) > MOST_PROMPTS:
            raise ValueError(f'it has more than {MOST_PROMPTS:,} bytes')
        lines = [line.strip() for line in content.decode('utf-8-sig').split('\n')]
    except (OSError, ValueError) as e:
        why = e.strerror if isinstance(e, OSError) else ' '.join(str(e).split())
        raise UserError(f'--condition={name}=@{path}: no texts can be read, one a line, in UTF-8: {why}') from e
    if not (texts := [line for line in lines if line]):
        raise UserError(f'--condition={name}=@{path}: the file holds no text')
    return texts


def beside_sources(given, images: np.ndarray) -> np.ndarray:
    """A grid of images uint8 [n, H, W, C], each behind the images that a person gave for it."""
    n, height, width, channels = images.shape
    shown = []
    for one in given.images.values():
        x = one.take(np.arange(n))
        rows, columns = (np.arange(size) * x.shape[axis] // size for axis, size in ((1, height), (2, width)))
        x = x[:, rows[:, None], columns]
        x = x if x.shape[-1] == channels else np.rint(x.mean(-1, keepdims=True)).astype(np.uint8).repeat(channels, -1)
        shown.append(x)
    tiles = einops.rearrange([*shown, images], 'k n h w c -> (n k) h w c')
    k = len(shown) + 1
    return files.grid(tiles, k * max(1, round(math.sqrt(n / k))))


def sample_mode(run, n: int, seed: int, condition: dict[str, str | list[str]], out: str, frames: int) -> None:
    """Samples as PNG files, a grid of them, an .npz and a film, into WORKDIR/samples/NAME; NAME says the settings.
    Samples of a person's own images are named after these, which stand beside them in the grid."""
    given = run.given(condition, n or None)
    numbers = {**({'n': n} if n else {}), **({'film': frames} if frames else {})}
    n = given.n or 64
    name = outputs.name(run, run.changes(), seed, given.texts, **numbers)
    out, first = out or os.path.join(run.workdir, 'samples', name), jax.process_index() == 0
    outputs.written(out, 'samples.npz')  # its mistakes come before anything is computed
    about = record.made(run, n=n, seed=seed, condition=given.texts, **({'film': frames} if frames else {}))
    for line in (*given.lines(), *given.doubts()) if first else ():
        log.say(line)
    film = run.film(min(n, 8), frames, seed, given) if frames else None
    pieces = run.draw(n, seed, given)
    names = given.names(n) or [f'{i:05d}' for i in range(n)]
    made: dict[str, dict] = {}
    with outputs.directory(out, 'samples.npz') if first else contextlib.nullcontext('') as folder:
        images: list[np.ndarray] = []
        with log.bar(n, quiet=not first) as bar:
            for piece in pieces:
                for image in piece:
                    if first:
                        file = f'{names[len(images)]}.png'
                        files.save_png(os.path.join(folder, 'images', file), image)
                        if sources := given.sources(len(images)):
                            sha256 = outputs.file_digest(os.path.join(folder, 'images', file))
                            made[file] = {'sources': sources, 'sha256': sha256}
                    images.append(image)
                bar.update(len(piece))
        if not first:
            return
        shown = np.stack(images[:256])
        files.save_png(os.path.join(folder, 'grid.png'), beside_sources(given, shown) if made else files.grid(shown))
        if made:
            files.save_json(os.path.join(folder, outputs.SOURCES), made)
        if film is not None:
            states = einops.rearrange(film, 'n rows frames h w c -> (n rows frames) h w c')
            files.save_png(os.path.join(folder, 'film.png'), files.grid(states, film.shape[2]))
        files.save_json(os.path.join(folder, 'samples.json'), {**about, **record.surroundings()})
        files.save_npz(os.path.join(folder, 'samples.npz'), {'images': np.stack(images)}, compressed=True)
    log.say(f'{n} sample{"s" * (n != 1)} by the {run.weights} weights of step {run.step}: {out}')


def evaluate_mode(run, seed: int) -> None:
    """The family's own metrics, and those of its samples, into WORKDIR/evaluation.json.

    That file is the newest; those of all settings lie beside each other in WORKDIR/results.
    """
    config, family = run.config.evaluate, run.assembled.family
    evaluator = clip = None
    if config.features != 'none' and family.sample is not None:
        evaluator = runs.make_evaluator(run.config, run.assembled.mesh, run.assembled.unnamed)
        evaluator.check(config.samples)
    if family.sample is not None:
        clip = runs.make_clip_evaluator(run.config, run.assembled.mesh, run.assembled.unnamed)
    about = record.made(run, split=config.held_out, seed=run.config.seed)
    if config.examples:
        about['examples'] = config.examples
    metrics = run.evaluate()
    if evaluator is None and clip is None:
        metrics |= run.modes(config.samples, seed)
    else:
        metrics |= run.compare(evaluator, config.samples, seed, clip)
        about |= {'samples': {'n': config.samples, 'seed': seed}, **runs.about_networks(evaluator, clip)}
    record.save(run.workdir, about, metrics)
    cache.clear(run.workdir)


def explore_mode(run, n: int, seed: int, out: str) -> None:
    """Sheets of a run's latent space and of its samples' neighbours, into WORKDIR/explore/NAME."""
    name = outputs.name(run, run.changes(), seed, None, **({'n': n} if n else {}))
    n, out = n or 8, out or os.path.join(run.workdir, 'explore', name)
    first = jax.process_index() == 0
    with outputs.directory(out, 'explore.json') if first else contextlib.nullcontext('') as folder:
        about = record.made(run, n=n, seed=seed)
        metrics = explore.explore(run, n, seed, folder)
        if not first:
            return
        files.save_json(os.path.join(folder, 'explore.json'), {**about, **metrics, **record.surroundings()})
    for name, metric in metrics.items():
        print(f'{name}: {metric["value"]:.4g}, n = {metric["n"]}')
    log.say(f'written to {out}')


def pack_mode(workdir: str, config, named: set[str], step: int | str | None, out: str) -> None:
    """A run and its stages in one folder or archive."""
    pack.check_out(out)
    run = runs.load(workdir, config=config, named=named, step=step)
    count, size = pack.pack(run, out)
    log.say(f'step {run.step} of {workdir}, {count} files, {size:,} bytes: {out}')


def images_mode(config, unnamed: dict[str, str], folder: str, out: str) -> None:
    """The metrics of a folder of images against the data set of a config."""
    if config.evaluate.features == 'none' and config.evaluate.clip == 'none':
        raise UserError('--images needs --features=inception or --features=run:PATH: the network to evaluate with')
    out = out or os.path.join('runs', f'images_{os.path.basename(os.path.abspath(folder))}')
    files.check_writable(out, '--out')
    mesh = sharding.make_mesh(math.gcd(config.mesh.fsdp, jax.device_count()))
    evaluator = runs.make_evaluator(config, mesh, unnamed) if config.evaluate.features != 'none' else None
    clip = runs.make_clip_evaluator(config, mesh, unnamed)
    images = data.FolderImages(folder, (*sides(config.data.size), config.data.channels))
    metrics: dict[str, dict] = {}
    if evaluator is not None:
        evaluator.check(len(images))
        metrics |= evaluator.compare_images(images, folder)
    if clip is not None:
        metrics |= samples.Measures(clip=clip).compare_images(images, folder)
    about = {'images': {'folder': os.path.abspath(folder), 'n': len(images)}, **runs.about_networks(evaluator, clip)}
    record.save(out, about, metrics)


def data_mode(config, out: str) -> None:
    """What the data of a config look like: text, summary.json and grid.png."""
    files.check_writable(out, '--out')
    outputs.written(out, 'summary.json')
    about, grid = summary.summarise(config.data, config.seed)
    with outputs.directory(out, 'summary.json') as folder:
        files.save_json(os.path.join(folder, 'summary.json'), about)
        files.save_png(os.path.join(folder, 'grid.png'), grid)
    lines = [*summary.text(about), f'image grid    {os.path.join(out, "grid.png")}']
    lines = [arguments.printable(line) for line in lines]  # names of classes may be a stranger's
    arguments.show('\n'.join(map(arguments.printable, lines)))


def compile_mode(config, workdir: str, topology: str, out: str) -> None:
    """What the training step and the sampler of a config take on a slice, as text, and as JSON in `out`."""
    if out:
        if os.path.isdir(out):
            raise UserError(f'--out={out} is a directory: name the file, --out={os.path.join(out, "compile.json")}')
        files.check_writable(os.path.dirname(out) or '.', '--out')
    directory.check_cycle(workdir, config, untrained=True)
    about = slices.report(config, topology)
    if out:
        files.save_json(out, about)
    arguments.show(slices.text(about))


def read_config(values: flags.FlagValues, overrides: list[str]):
    """The config of a mode that needs no run: the one that is named, or the one that imported weights say."""
    mode = values.mode
    if mode == 'import' and not values.config:
        base, config = pipelines.derived(str(values['from'].value), values.tokenizer, configs.fields_of(overrides))
        log.say(f'config: {base}, with the sizes that config.json or the tensors say')
    else:
        config = tuning.for_weights(values.config) if mode == 'import' else configs.load(values.config)
    return configs.override(config, overrides)


def config_mode(values: flags.FlagValues, overrides: list[str], workdir: str) -> None:
    """Runs one of CONFIG_MODES, which read a config and no run."""
    mode, config = values.mode, read_config(values, overrides)
    if mode == 'data':
        data_mode(config, values.out or os.path.join(workdir, 'data'))
    elif mode == 'compile':
        compile_mode(config, workdir, values.topology, values.out)
    elif mode == 'import':
        importing.import_weights(
            config,
            str(values['from'].value),
            workdir,
            values.names,
            discriminator=values.discriminator,
            named=configs.fields_of(overrides),
            tokenizer=values.tokenizer,
        )
    elif mode == 'prepare':
        prepare.prepare_mode(config, workdir)
    elif mode == 'train':
        from jaxgen.train import train

        train(config, workdir, values.profile)
    else:
        directory.check_cycle(workdir, config, untrained=True)
        assembled = assembly.assemble(config, stage=assembly.abstract_stage)
        print(json.dumps(describe.describe(config, assembled), indent=2))


def run_mode(values: flags.FlagValues, overrides: list[str], workdir: str) -> None:
    """Runs one of the modes that read a run, or evaluate images of which nothing but a config is known."""
    mode, named = values.mode, configs.fields_of(overrides)
    configs.name_imports(overrides)
    if values.images and not values.workdir:
        images_mode(configs.override(configs.load(values.config), overrides), {}, values.images, values.out)
        return
    saved = directory.saved_config(workdir)
    if values.config and values.workdir:
        directory.check_system(workdir, saved, values.config)
    config = configs.override(saved, overrides)
    if values.images:
        config, _, unnamed = directory.read(workdir, config, named)
        images_mode(config, unnamed, values.images, values.out)
        return
    step = int(values.step) if values.step.isdecimal() else values.step or None  # or 'best'
    if mode == 'pack':
        pack_mode(workdir, config, named, step, values.out)
        return
    condition = parse_conditions(values.condition)
    if jax.process_index() == 0:
        files.check_writable(values.out or workdir, '--out' if values.out else '--workdir')
    weights = {'weights': values.weights, 'all_weights': mode == 'evaluate', 'step': step}
    run = runs.load(workdir, config=config, named=named, **weights)
    if jax.process_index() == 0:
        log.say(f'{compilation.devices()}; step {run.step}, {run.weights} weights; {compilation.notice()}')
    if mode == 'export':
        exporting.export_weights(run, values.to, values.names)
    elif mode == 'merge':
        merging.merge(run, values.to)
    elif mode == 'sample':
        sample_mode(run, values.n, values.seed, condition, values.out, values.film)
    elif mode == 'explore':
        explore_mode(run, values.n, values.seed, values.out)
    else:
        evaluate_mode(run, values.seed)


def list_mode(overrides: list[str], words: list[str]) -> None:
    """Prints the configs that these words name, or all."""
    if overrides:
        raise UserError(f'{overrides[0]} is a field of one config, and --mode=list reads none: leave it out')
    if not (lines := catalogue.text(words)):
        raise UserError(f'no config has {options.shown(" ".join(words))}; --mode=list without words prints all')
    arguments.show(lines)


def main(argv: list[str]) -> None:
    """Runs one mode. Raises UserError and RunError; `run_main` turns them into exit codes."""
    values, overrides, words = arguments.parse(argv)
    if values.version:
        arguments.show(f'jaxgen {jaxgen.__version__}')
        return
    if values.help or len(argv) < 2:
        arguments.show(arguments.help_text(values))
        return
    arguments.check_flags(values)
    if values.mode == 'list':
        list_mode(overrides, words)
        return
    for name in arguments.PATHS:
        files.check_local(getattr(values, name), f'--{name}')
        setattr(values, name, os.path.expanduser(getattr(values, name)))
    if values.mode == 'fields':
        arguments.show(fields.text(configs.override(configs.load(values.config), overrides)))
        return
    measured = {
        'features': values.features,
        'inception': values.inception,
        'samples': values.n if values.mode == 'evaluate' else 0,
    }
    overrides += [f'--config.evaluate.{name}={value}' for name, value in measured.items() if value]
    base = configs.name(values.config) if values.config else os.path.basename(str(values['from'].value).rstrip('/'))
    workdir = values.workdir or os.path.join('runs', base)
    if values.multihost:
        hosts.start()
    sharding.check_devices()
    if values.mode in arguments.DOING and values.mode != 'compile':
        compilation.use(values.cache, values.multihost)
    (config_mode if values.mode in CONFIG_MODES else run_mode)(values, overrides, workdir)


def one_line(e: BaseException) -> str:
    """The message of an exception, on one line."""
    return arguments.printable(' '.join(str(e).split()))


def device_fault(e: jax.errors.JaxRuntimeError) -> str:
    """The message of a device's fault, with what helps."""
    text = one_line(e)[:300]
    if 'RESOURCE_EXHAUSTED' in text or 'out of memory' in text.lower():
        return f'the device is out of memory: make config.data.batch, sample.batch or evaluate.batch smaller ({text})'
    return f'the device failed: {text}'


def run_main(argv: list[str]) -> int:
    """Runs one mode; returns the exit code. A person's mistake or a fault is one line on stderr."""
    try:
        with hosts.joined():
            main(argv)
    except UserError as e:
        return arguments.say_mistake(e)
    except MemoryError as e:
        reason = f'out of memory {one_line(e)}'.rstrip()
    except jax.errors.JaxRuntimeError as e:
        reason = device_fault(e)
    except (RunError, OSError) as e:
        reason = one_line(e)
    else:
        return 0
    print(f'jaxgen: stopped: {reason}', file=sys.stderr)
    return 1


def command() -> int:
    """Runs one mode by the arguments of the process; the exit code, once other hosts have theirs."""
    sys.unraisablehook = checkpoint.print_unraisable
    # Tracing makes millions of small objects; looking for cycles among them at every 700 takes a fifth of its time.
    gc.set_threshold(100_000, 10, 10)
    code = run_main(sys.argv)
    hosts.leave(code)
    return code


if __name__ == '__main__':
    sys.exit(command())
