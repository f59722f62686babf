"""The arguments of the command: options, examples, and what is wrong with them. Imports no jax, so that the first line
is on the screen at once."""

from __future__ import annotations

import os
import re
import sys
import textwrap

from absl import flags

import jaxgen
from jaxgen import configs, interrupt, locks, options
from jaxgen.errors import UserError

MODES = (
    *('train', 'sample', 'evaluate', 'explore', 'pack', 'import', 'export', 'merge', 'describe', 'compile', 'prepare'),
    *('data', 'fields', 'list'),
)


def define_flags() -> flags.FlagValues:
    """The options of the command."""
    values = flags.FlagValues()
    string, integer, boolean = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_boolean
    string('mode', 'train', ' | '.join(MODES), flag_values=values)
    string(
        'config',
        '',
        'NAME or NAME:VARIANT that comes with jaxgen, FILE.py:VARIANT, or RUN:lora',
        flag_values=values,
    )
    string('workdir', '', 'directory of the run; default runs/<config name>', flag_values=values)
    string(
        'out',
        '',
        'sample, explore, data: where the images go, default in WORKDIR; pack: FILE.zip or FOLDER; compile: FILE.json',
        flag_values=values,
    )
    string('weights', 'ema', 'sample, evaluate, explore: ema | params | width of an average, 0.07', flag_values=values)
    integer(
        'n',
        0,
        'how many; default 64, in evaluate config.evaluate.samples; explore: 8',
        flag_values=values,
    )
    string('step', '', 'of the checkpoint that is used, or best; default the newest', flag_values=values)
    integer('seed', 0, 'sample, evaluate, explore: of the noise', flag_values=values)
    integer('film', 0, 'sample: frames of film.png, the steps of the first 8 samples', flag_values=values)
    string('features', '', 'evaluate: inception | run:PATH | none, the network to evaluate with', flag_values=values)
    string('inception', '', 'evaluate: file with the weights of Inception', flag_values=values)
    string(
        'images',
        '',
        'evaluate: a folder of images instead of a run, against --config',
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        'condition',
        [],
        "sample: NAME=VALUE, e.g. label=3, caption='a red heart' or @FILE, image=FILE or a folder; may be repeated",
        flag_values=values,
    )
    string('from', '', 'import: file or folder of published weights', flag_values=values)
    string('discriminator', '', 'import: file of the discriminator, if apart from the generator', flag_values=values)
    string('tokenizer', '', 'import: folder of the tokenizer, if apart from the text encoder', flag_values=values)
    string('to', '', 'export: FILE.safetensors, FILE.pt or a new folder; merge: a new run', flag_values=values)
    string('names', '', 'import, export: the source whose names the weights have', flag_values=values)
    string('topology', '', 'compile: the slice, v5e:4x4, v5p:2x2x4, v6e:8x8, h100:8', flag_values=values)
    string('cache', '', 'directory of compiled programs, or off; default ~/.cache/jaxgen/compiled', flag_values=values)
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
  jaxgen --mode=pack --workdir=runs/ddpm_digits --out=x.zip  the run and its stages, to share
  jaxgen --mode=describe --config=ddpm_digits              parameters, bytes, batch, FLOPs
  jaxgen --mode=compile --config=dit_imagenet256 --topology=v5e:4x4  what a TPU slice would take
  jaxgen --mode=prepare --config=dit_imagenet256           what frozen stages compute, once
  jaxgen --mode=data --config=ddpm_digits                  counts, classes, a grid of images
  jaxgen --mode=fields --config=ddpm_digits                every field of the config
  jaxgen --mode=import --config=dit_imagenet256 --from=x.pt  a run of published weights
  jaxgen --mode=export --workdir=runs/ddpm_digits --to=x.pt  its weights, for other programs
  jaxgen --mode=merge --workdir=runs/LORA --to=runs/NEW    a LoRA and its base as one run

Options:
{options}
  --config.FIELD=VALUE  any field of the config
A space does in place of an equals sign.
"""


def help_text(values: flags.FlagValues) -> str:
    """The first screen: examples, and the options with a line or two each."""
    lines = []
    for name in (name for name in values if name != 'h'):
        value = '' if values[name].boolean else '=' + name.upper()
        first = f'  --{name + value:<19} '
        lines += textwrap.wrap(
            values[name].help.partition(';\n')[0], 96, initial_indent=first, subsequent_indent=' ' * 24
        )
    return HELP.format(version=jaxgen.__version__, options='\n'.join(lines)).rstrip()


NUMBER = re.compile(r'-(\d|\.\d|inf|nan)')  # a value may begin with a dash, too
TRUTHS = ('true', 'false', '1', '0')


def with_values(texts: list[str], values: flags.FlagValues) -> list[str]:
    """The arguments with `--NAME VALUE` as `--NAME=VALUE`. A field without a value stays alone: it may be a boolean.

    Raises:
      UserError: an option's value is missing.
    """
    out: list[str] = []
    rest = list(texts)
    while rest:
        text = rest.pop(0)
        if text == '--':
            return [*out, text, *rest]
        name, is_field = text.lstrip('-'), text.startswith(('--config.', '-config.'))
        if text.startswith('-') and '=' not in text and (is_field or name in values):
            following = rest[0] if rest and (not rest[0].startswith('-') or NUMBER.match(rest[0])) else None
            boolean = not is_field and values[name].boolean
            if following is not None and (not boolean or following.lower() in TRUTHS):
                text = f'{text}={rest.pop(0)}'
            elif not is_field and not boolean:
                raise UserError(f'{text} needs a value: {text}={name.upper()}')
        out.append(text)
    return out


def parse(argv: list[str]) -> tuple[flags.FlagValues, list[str], list[str]]:
    """(options, overrides, words): the options, `--config.x=y` apart, and what is neither.

    Raises:
      UserError: there is no such option, or its value is missing or none.
    """
    for text in argv[1:]:
        if not options.is_text(text):
            raise UserError(f'cannot use {options.shown(text)}: it has zero bytes or half characters')
    values = define_flags()
    texts = with_values(argv[1:], values)
    overrides = [a for a in texts if a.startswith(('--config.', '-config.'))]
    try:
        words = values([argv[0], *[a for a in texts if a not in overrides]])[1:]
    except (flags.Error, ValueError) as e:  # absl raises the latter for --noNAME=VALUE
        raise UserError(mistake(e, values)) from e
    if words and values.mode != 'list':
        raise UserError(f'cannot use {words[0]!r}: {meant(words[0])}')
    return values, overrides, words


def mistake(e: Exception, values: flags.FlagValues) -> str:
    """What is wrong with an option, by the error of absl."""
    text = ' '.join(str(e).split())
    if isinstance(e, flags.UnrecognizedFlagError):
        known = f'; did you mean --config.{e.flagname}?' if '.' in e.flagname else options.near(e.flagname, values)
        return f'--{e.flagname}: no such option{known}'
    if illegal := re.match(r'flag --(\w+)=(.*): (invalid literal|\W*Non-boolean)', text):
        return f'--{illegal[1]} must be {"an integer" if illegal[3][0] == "i" else "true or false"}; it is {illegal[2]}'
    return f'{text}; see --help'


def meant(word: str) -> str:
    """How a word is written as an option."""
    if word in MODES:
        return f'did you mean --mode={word}?'
    if word.partition(':')[0] in configs.names() or word.endswith(('.py', '.json')):
        return f'did you mean --config={word}?'
    return 'options are --NAME=VALUE; see --help'


# The options that each mode reads. Others would change nothing, so they are refused.
USING = ('config', 'workdir', 'weights', 'step', 'n', 'seed', 'cache', 'multihost')
READS = {
    'train': ('config', 'workdir', 'profile', 'cache', 'multihost'),
    'sample': (*USING, 'out', 'film', 'condition'),
    'evaluate': (*USING, 'features', 'inception'),
    'evaluate --images': ('config', 'workdir', 'images', 'out', 'features', 'inception', 'cache', 'multihost'),
    'explore': (*USING, 'out'),
    'pack': ('config', 'workdir', 'step', 'out'),
    'describe': ('config',),
    'compile': ('config', 'topology', 'out'),
    'prepare': ('config', 'cache', 'multihost'),
    'data': ('config', 'workdir', 'out'),
    'fields': ('config',),
    'list': (),
    'import': ('config', 'workdir', 'from', 'discriminator', 'tokenizer', 'names'),
    'export': ('config', 'workdir', 'weights', 'step', 'to', 'names'),
    'merge': ('config', 'workdir', 'weights', 'step', 'to'),
}
WITHOUT_RUN = ('train', 'describe', 'compile', 'prepare', 'data', 'fields', 'import')  # modes of a config
# Options in which ~ is the home directory; the config knows its own.
PATHS = ('workdir', 'out', 'images', 'from', 'discriminator', 'tokenizer', 'to', 'cache')


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
    options.check_weights_name(values.weights)
    for name in ('n', 'film', 'seed'):
        if values[name].present:
            options.check_integer(f'--{name}', values[name].value, 0 if name == 'seed' else 1)
    if values.step not in ('', 'best') and not (values.step.isdecimal() and values.step.isascii()):
        raise UserError(f'--step must be the step of a checkpoint, or best; it is {options.shown(values.step)}')
    for name in {'import': ('from',), 'export': ('to',), 'merge': ('to',), 'compile': ('topology',)}.get(mode, ()):
        if not values[name].value:
            raise UserError(f'--mode={mode} needs --{name}: {values[name].help.partition(": ")[2]}')
    if mode not in ('list', 'import') and not values.config and (mode in WITHOUT_RUN or not values.workdir):
        config = '--config=NAME (--mode=list prints them) or --config=FILE.py'
        need = config if mode in WITHOUT_RUN else '--workdir=DIRECTORY of a run, or --config=NAME'
        raise UserError(f'--mode={mode} needs {need}')


def printable(message: str) -> str:
    """A message on one line; names of files and classes may hold anything."""
    return ''.join(c if c.isprintable() else ' ' for c in message)


def show(text: str) -> None:
    """Prints a text, as much of it as is read: a pipe into `head` or a pager may close."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is written at exit either


def say_mistake(e: UserError) -> int:
    """Writes the line of a person's mistake; the exit code."""
    print(f'jaxgen: error: {printable(str(e))}', file=sys.stderr)
    return 2


# Modes that compute, and what they begin with.
DOING = {
    **{'train': 'training', 'sample': 'sampling', 'evaluate': 'evaluating', 'explore': 'exploring', 'pack': 'packing'},
    **{
        'import': 'importing',
        'export': 'exporting',
        'merge': 'merging',
        'compile': 'compiling',
        'prepare': 'preparing',
    },
}


def check_platform() -> None:
    """Ends the process with a line on a system that is not supported."""
    try:
        locks.check_platform()
    except UserError as e:
        sys.exit(say_mistake(e))


def begin(argv: list[str]) -> None:
    """Help, the version and mistakes in the options, which end the process; else the first line of modes that compute.
    Called before jax is imported, which takes a second."""
    try:
        values, _, _ = parse(argv)
        if values.help or values.version or len(argv) < 2:
            show(f'jaxgen {jaxgen.__version__}' if values.version else help_text(values))
            sys.exit(0)
        check_flags(values)
    except UserError as e:
        sys.exit(say_mistake(e))
    if values.mode == 'compile':
        os.environ['JAX_PLATFORMS'] = 'cpu'  # a TPU or GPU of this machine is left to whoever uses it
    if values.mode in DOING:
        what = ' in '.join(filter(None, (values.config, values.images or values.workdir)))
        interrupt.say(f'jaxgen: {DOING[values.mode]} {printable(what)} (version {jaxgen.__version__})')
