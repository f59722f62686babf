"""Configs: what a config file may say, and one plain line for whatever is wrong with it.

A config file has `get_config(variant='')` and returns `make(variant, ...)`. The sections that
all families share are listed in `DEFAULTS`, each field with its default; `config.model` holds
the keyword arguments of the family's `build`. So the config that a run saves is complete, every
field can be set on the command line (`--config.optim.lr=1e-3`), and a misspelt field is an
error that names the near misses.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import json
import os
import re
import traceback
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from jaxgen import options
from jaxgen.errors import UserError
from jaxgen.files import absolute
from jaxgen.options import check_choice, check_range, coerce, near, shown

# Schedules that end at the last update: there a run's length is part of what its updates compute.
ENDING = ('linear', 'cosine', 'half_linear')

DEFAULTS: dict[str, Any] = {
    'family': '',  # module in jaxgen/families
    'seed': 0,  # of weights, data order and noise
    'model': {},  # keyword arguments of the family's build
    'stages': {},  # {name: run directory} of earlier stages
    'data': {
        'source': 'digits',  # digits | shapes | gaussians:1 | folder:PATH | pairs:PATH | a TFDS name; see data/
        'other': '',  # a second source, whose pictures come unpaired as the feature 'other'
        'size': 8,  # pixels, height = width
        'channels': 1,  # 1 or 3
        'features': ('image',),  # what a batch holds, e.g. ('image', 'label'), ('image', 'edges')
        'classes': 0,  # number of classes where the source cannot say (a folder, a TFDS set)
        'batch': 128,  # examples of one update, over all devices
        'keep_classes': (),  # classes that training is restricted to; the test split keeps all, for finding the others
        'box': (),  # (top, left, height, width) cut out before anything else
        'crop': 'center',  # center | random: the square that is resized to size x size | resized: see crop_area
        'crop_area': (0.08, 1.0),  # of the image, and
        'crop_aspect': (0.75, 4 / 3),  # width / height, of random rectangles that are resized to size x size
        'crop_rate': 1.0,  # fraction of the training images with a random crop; the others have the central square
        'jitter': 0,  # pixels by which training images are enlarged before size x size are cut out anywhere
        'pad': 0,  # pixels that training images are padded with before size x size are cut out anywhere
        'shift': 0.0,  # fraction of the side by which training images are moved up or down, left or right, at most
        'fill': 'reflect',  # reflect | edge: what pad and shift show beyond the border
        'flip': False,  # mirror half of the training images left to right
        'low_resolution': 0,  # side in pixels of the feature 'low_resolution', means of squares of the image
        'dir': '',  # where prepared sets lie; '': $TFDS_DATA_DIR or ~/tensorflow_datasets
        'test_fraction': 0.2,  # fraction of a source without a test split that is held out
        'max_corrupt': 0.01,  # fraction of unreadable files of a folder that is put up with
        'max_pixels': 2**26,  # of one image; larger ones are unreadable, or end the run where a data set has them
        'threads': 4,  # of the loader
        'cache_mb': 512,  # sets that decode to less are decoded once and kept in memory
    },
    'optim': {
        'name': 'adam',  # adam | adamax | adamw | radam | rmsprop | sgd
        'lr': 2e-4,
        'schedule': 'constant',  # constant | linear | cosine | half_linear | step | exponential | rsqrt; see optim.py
        'warmup': 0,  # updates of linear rise
        'plateau': 0.0,  # linear, cosine: fraction of the updates after warm-up before the fall
        'floor': 0.0,  # linear, cosine, exponential, rsqrt: fraction of lr that is left
        'boundaries': (),  # step: updates at which lr is multiplied by decay_rate
        'decay_rate': 1.0,  # step, and exponential: in decay_every updates
        'decay_every': 1,  # exponential; rsqrt: updates before the fall
        'b1': 0.9,
        'b2': 0.999,
        'eps': 1e-8,
        'weight_decay': 0.0,  # adamw
        'weight_decay_schedule': 'constant',  # constant | cosine, to weight_decay_end at the last update
        'weight_decay_end': 0.0,
        'no_decay': (),  # weights that weight_decay and l2 leave out: ('bias', 'scale'), patterns for words of a path
        'l2': 0.0,  # l2 * weights is added to the clipped gradient; torch's Adam calls it weight_decay
        'clip': 0.0,  # global gradient norm, 0: off
        'normalise': False,  # each array's gradient is divided by its norm
        'accumulate': 1,  # parts of a batch, one gradient
        'ema': 0.9999,  # decay of the weights' moving average
        'ema_warmup': False,  # min(ema, (1 + n) / (10 + n)) at update n
        'ema_halflife': 0.0,  # of the moving average in images, in place of ema; 0: ema
        'ema_rampup': 0.0,  # and at most this fraction of the images so far; 0: no ramp-up
        'ema_std': (),  # widths of two more averages, (0.05, 0.1), for --weights=STD; with train.keep_every
        'networks': {},  # {network: fields above that differ for it}
    },
    'train': {
        'steps': 1000,  # updates
        'updates_per_call': 1,  # updates in one XLA program; every interval is a multiple of it
        'dtype': 'float32',  # of computation: float32 | bfloat16
        'remat': False,  # trade time for memory
        'log_every': 50,
        'save_every': 500,
        'keep': 2,  # newest checkpoints kept
        'keep_every': 0,  # and every checkpoint at a multiple of this, 0: none
        'sample_every': 500,  # 0: only at the end
        'samples': 64,  # pictures of a grid
        'evaluate_every': 0,  # 0: never; figures of config.evaluate into the logs
        'evaluate_samples': 2000,  # drawn for them
    },
    'mesh': {
        'fsdp': 1,  # devices that share one copy of the weights
    },
    'sample': {
        'batch': 256,  # samples drawn at once
    },
    'evaluate': {
        'batch': 256,  # examples measured at once
        'examples': 0,  # of the test split, for the family's own figures; 0: all
        'samples': 50_000,  # drawn, for the figures of sets of pictures
        'features': 'none',  # the network that those are measured with: inception | run:PATH | none
        'inception': '',  # file with the weights of the former
        'split': 'train',  # what samples are held against: train, as in most papers, or test
    },
}

# What every config's variant `tiny` begins with: a run of seconds, for tests. The variant's own fields come on top.
TINY: dict[str, Any] = {
    'data': {'size': 8, 'batch': 8},
    'optim': {'lr': 3e-3, 'schedule': 'constant'},
    'train': {
        'steps': 4,
        'updates_per_call': 1,
        'dtype': 'float32',
        'remat': False,
        'log_every': 1,
        'save_every': 2,
        'sample_every': 0,
        'samples': 4,
    },
    'sample': {'batch': 4},
    'evaluate': {'batch': 8, 'examples': 8, 'features': 'none'},
}

# Values of these fields are names; anything else is refused here, not deep in a compile.
CHOICES = {
    'data.channels': (1, 3),
    'data.crop': ('center', 'random', 'resized'),
    'data.fill': ('reflect', 'edge'),
    'optim.name': ('adam', 'adamax', 'adamw', 'radam', 'rmsprop', 'sgd'),
    'optim.schedule': ('constant', 'linear', 'cosine', 'half_linear', 'step', 'exponential', 'rsqrt'),
    'optim.weight_decay_schedule': ('constant', 'cosine'),
    'train.dtype': ('float32', 'bfloat16'),
    'evaluate.split': ('train', 'test'),
}
# Intervals in which numbers lie, with [ ] where an end belongs to them and ( ) where it does not. Those of `optim` hold
# for `optim.networks.NAME` too. NaN and infinity lie in none, nor in any other field.
RANGES = {
    'seed': '[0, 2147483647]',
    'data.size': '[1, 65536]',
    'data.classes': '[0, inf)',
    'data.batch': '[1, inf)',
    'data.crop_rate': '(0, 1]',
    'data.jitter': '[0, inf)',
    'data.pad': '[0, inf)',
    'data.shift': '[0, 0.5)',
    'data.low_resolution': '[0, inf)',
    'data.test_fraction': '(0, 1)',
    'data.max_corrupt': '[0, 1]',
    'data.threads': '[1, 1024]',
    'data.max_pixels': '[1, inf)',
    'data.cache_mb': '[0, inf)',
    'optim.lr': '(0, inf)',
    'optim.warmup': '[0, inf)',
    'optim.plateau': '[0, 1)',
    'optim.floor': '[0, 1]',
    'optim.decay_rate': '(0, 1]',
    'optim.decay_every': '[1, inf)',
    'optim.b1': '[0, 1)',
    'optim.b2': '[0, 1)',
    'optim.eps': '[0, inf)',
    'optim.weight_decay': '[0, inf)',
    'optim.weight_decay_end': '[0, inf)',
    'optim.l2': '[0, inf)',
    'optim.clip': '[0, inf)',
    'optim.accumulate': '[1, inf)',
    'optim.ema': '[0, 1)',
    'optim.ema_halflife': '[0, inf)',
    'optim.ema_rampup': '[0, inf)',
    'train.steps': '[1, inf)',
    'train.updates_per_call': '[1, inf)',
    'train.log_every': '[1, inf)',
    'train.save_every': '[1, inf)',
    'train.keep': '[1, inf)',
    'train.keep_every': '[0, inf)',
    'train.sample_every': '[0, inf)',
    'train.samples': '[1, inf)',
    'train.evaluate_every': '[0, inf)',
    'train.evaluate_samples': '[1, inf)',
    'mesh.fsdp': '[1, inf)',
    'sample.batch': '[1, inf)',
    'evaluate.batch': '[1, inf)',
    'evaluate.examples': '[0, inf)',
    'evaluate.samples': '[1, inf)',
}
MAX_JSON = 2**20  # bytes of a config.json; a real one has some thousand
# A run may go on although these differ from what it was started with: they change how far it
# goes and what is written when, never what an update computes.
FREE_ON_RESUME = re.compile(
    r'train\.(steps|log_every|save_every|keep|keep_every|sample_every|samples|evaluate_every|evaluate_samples)'
    r'|sample\..*|evaluate\..*|data\.(dir|threads|cache_mb|max_corrupt|max_pixels)|mesh\..*'
)
# A trained run is sampled and measured although these differ, too. The other fields say what its weights are.
FREE_IN_USE = re.compile(rf'{FREE_ON_RESUME.pattern}|train\.(dtype|remat|updates_per_call)')
# These name places. They may be renamed where the digest of what lies there is the one that training saw.
MOVABLE = re.compile(r'stages\..*|data\.(source|other)')
# Prefixes of the values of these fields that are paths; '': the whole value is one.
PATHS = {
    'data.source': ('folder:', 'pairs:'),
    'data.other': ('folder:', 'pairs:'),
    'data.dir': ('',),
    'evaluate.features': ('run:',),
    'evaluate.inception': ('',),
}
NAME = re.compile(r'[A-Za-z_]\w*')  # of a stage
# Names that fields had in runs saved before, {former: present}. A family's module has a table FORMER of this kind for
# config.model: {'game': 'adversarial', 'width': 'network.width'}. What no table can say, its function
# `former(model) -> model` does, of the section as it was saved.
FORMER = {'data.test_share': 'data.test_fraction'}


def families() -> list[str]:
    """Names of all families: the modules in jaxgen/families."""
    folder = os.path.join(os.path.dirname(__file__), 'families')
    return sorted(f[:-3] for f in os.listdir(folder) if f.endswith('.py') and f != '__init__.py')


def one_line(e: BaseException, limit: int = 300) -> str:
    """What an exception says, on one line."""
    text = ' '.join(str(e).split())
    return f'{type(e).__name__}: {text[:limit]}' if text else type(e).__name__


def module(family: str):
    """The family's module, by the family's name."""
    if family not in families():
        raise UserError(f'config.family: no family {family!r}{near(family, families())}')
    return importlib.import_module(f'jaxgen.families.{family}')


def builder(family: str) -> Callable:
    """The family's build function, by the family's name."""
    return module(family).build


def merge(path: str, defaults: dict, given: dict) -> dict:
    """Defaults with the given values put in, each of them known and of the right type."""
    merged = dict(defaults)
    for key, value in given.items():
        where = f'{path}.{key}' if path else key
        if not isinstance(key, str) or key not in defaults:
            known = near(key, defaults) if defaults else '; this section has none'
            raise UserError(f'config.{" ".join(where.split())[:200]}: no such field{known}')
        default = defaults[key]
        if where in ('stages', 'optim.networks') and not isinstance(value, dict):
            raise UserError(f'config.{where} is a section: write config.{where}.NAME = ...; it is {shown(value)}')
        if where in ('stages', 'optim.networks'):
            for name in value:
                if not (isinstance(name, str) and NAME.fullmatch(name)):
                    raise UserError(f'config.{where}: a name is made of letters, digits and _; it is {shown(name)}')
        if where == 'stages':
            merged[key] = {name: coerce(f'{where}.{name}', run, '') for name, run in value.items()}
            for name, run in merged[key].items():
                if not run:
                    raise UserError(f'config.stages.{name} must be the directory of a run; it is empty')
        elif where == 'optim.networks':
            shared = ('accumulate', 'ema', 'ema_warmup', 'ema_std', 'ema_halflife', 'ema_rampup', 'networks')
            own = {k: v for k, v in DEFAULTS['optim'].items() if k not in shared}
            for name, fields in value.items():
                if not isinstance(fields, dict):
                    raise UserError(f'config.{where}.{name} is a section with fields: {", ".join(own)}')
            checked = {name: merge(f'{where}.{name}', own, fields) for name, fields in value.items()}
            merged[key] = {name: {k: checked[name][k] for k in fields} for name, fields in value.items()}
        elif isinstance(default, dict):
            if not isinstance(value, dict):
                raise UserError(f'config.{where} is a section with fields: {", ".join(default)}')
            merged[key] = merge(where, default, value)
        else:
            merged[key] = coerce(where, value, default)
    return merged


def deep_update(base: dict, over: dict) -> dict:
    """Base with `over` put in, dicts merged level by level."""
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = deep_update(out[key], value) if both else value
    return out


def update_sections(sections: dict, over: dict) -> dict:
    """The sections with `over` put in. In `model` another component's name takes its own fields with it, see
    `options.update`; another family starts `model` anew."""
    family = over.get('family', sections.get('family'))
    model = sections.get('model', {}) if family == sections.get('family') else {}
    out = deep_update({**sections, 'model': {}}, {k: v for k, v in over.items() if k != 'model'})
    new = over.get('model', {})
    out['model'] = options.update(builder(family), model, new) if isinstance(new, dict) and family else new
    return out


def make(variant: str = '', /, variants: dict[str, dict] | None = None, **sections) -> ConfigDict:
    """A complete, checked config from the fields that differ from the defaults.

    Args:
      variant: what followed the colon in `--config=FILE:VARIANT`; several are joined by commas.
      variants: {name: sections} put over the others when the variant is named; under those of 'tiny' lies TINY.
      **sections: as DEFAULTS.

    Raises:
      UserError: an unknown field, a wrong type, a value out of range.
    """
    variants = variants or {}
    for name in filter(None, variant.split(',')):
        if name not in variants:
            raise UserError(f'this config has no variant {name!r}{near(name, variants) if variants else ""}')
        if name == 'tiny':
            sections = update_sections(sections, TINY)
        sections = update_sections(sections, variants[name])
    return complete(sections)


def complete(sections: dict) -> ConfigDict:
    """A checked config of these sections; fields that they lack have their defaults, and paths are absolute.

    Raises:
      UserError: as `make`.
    """
    family = sections.get('family', '')
    if not isinstance(family, str) or not family:
        raise UserError(f'config.family is missing: one of {", ".join(families())}')
    build, model = builder(family), sections.get('model', {})
    if not isinstance(model, dict):
        raise UserError(f'config.model is a section with fields: {", ".join(options.fields(build))}')
    refuse_former_names(sections, family)
    resolved = merge('', DEFAULTS, {k: v for k, v in sections.items() if k != 'model'})
    resolved['model'] = options.complete(build, model, 'model')
    check(resolved)
    return ConfigDict(with_absolute_paths(resolved))


def path_of(field: str, value: str) -> str:
    """The path that the value of a field names, '' where it names none: 'folder:/pictures' -> '/pictures'."""
    prefixes = ('',) if field.startswith('stages.') else PATHS.get(field, ())
    return next((value.removeprefix(p) for p in prefixes if value.startswith(p)), '')


def paths(resolved) -> dict[str, str]:
    """{field: path} of all paths that a config names."""
    fields = [*PATHS, *(f'stages.{name}' for name in resolved['stages'])]
    named = {field: path_of(field, get(resolved, field)) for field in fields}
    return {field: path for field, path in named.items() if path}


def with_absolute_paths(resolved: dict) -> dict:
    """The same config, whatever directory it is read in."""
    for field, path in paths(resolved).items():
        *above, last = field.split('.')
        section = get(resolved, '.'.join(above))
        section[last] = section[last].removesuffix(path) + absolute(path)
    return resolved


def parse_json(path: str, parse: Callable[[Any], Any], remedy: str):
    """What `parse` makes of a JSON file that may come from anybody.

    Raises:
      UserError: it cannot be read or parsed, in one line that ends in `remedy`.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), encoding='utf-8') as file:
            text = file.read(MAX_JSON + 1)
        if len(text) > MAX_JSON:
            raise ValueError(f'it has more than {MAX_JSON} characters')
        return parse(json.loads(text))
    except (OSError, ValueError, RecursionError) as e:
        reason = e.strerror if isinstance(e, OSError) else one_line(e)
        raise UserError(f'{path} is damaged ({reason}): {remedy}') from e
    except UserError as e:
        raise UserError(f'{path}: {e}') from e


def former_names(family: str) -> dict[str, str]:
    """{former: present} of all fields that had another name: those of the family, and those that all families share."""
    own = getattr(module(family), 'FORMER', {})
    return FORMER | {f'model.{old}': f'model.{new}' for old, new in own.items()}


def refuse_former_names(sections: dict, family: str) -> None:
    """Raises UserError for a field under the name that it had before."""
    for old, new in former_names(family).items():
        if contains(sections, old) and not new.startswith(f'{old}.'):  # a component's name alone stands for its section
            raise UserError(f'config.{old} is now config.{new}')


def with_present_names(sections: dict) -> dict:
    """The sections of a config that was saved at any time, each field under its present name.

    A field that moved into a component's section is dropped where the component has none of its name: nothing read it.

    Raises:
      UserError: a field is there under both names.
      ValueError: config.model is none that the family ever had.
    """
    family = sections.get('family')
    if family not in families() or not isinstance(sections.get('model', {}), dict):
        return sections  # `complete` says what is wrong
    if hasattr(module(family), 'former'):
        try:
            sections = {**sections, 'model': module(family).former(sections.get('model', {}))}
        except Exception as e:  # of values that no run ever saved
            raise ValueError(f'config.model: {one_line(e)}') from e
    names = {old: new for old, new in former_names(family).items() if is_former(sections, old, new)}
    values = {old: get(sections, old) for old in names}
    for old in names:
        sections = without(sections, old)
    for old, new in names.items():
        if contains(sections, new):
            raise UserError(f'config.{old} is now config.{new}, and both are there')
        sections = deep_update(sections, nested(new, values[old]))
    known = options.fields(builder(family))
    for new in names.values():
        if not is_read(sections, new, known):
            sections = without(sections, new)
    return sections


def is_former(sections: dict, old: str, new: str) -> bool:
    """Whether a field is there under the name that it had before.

    Where a name became a section, 'network' -> 'network.name', a section of this name is a present one.
    """
    return contains(sections, old) and not (new.startswith(f'{old}.') and isinstance(get(sections, old), dict))


def is_read(sections: dict, path: str, known: dict[str, options.Field]) -> bool:
    """Whether the component that a section of config.model names has the field 'model.SECTION.FIELD'."""
    _, name, *inner = path.split('.')
    component = known[name].section if name in known else None
    if not inner or not isinstance(component, options.Component):
        return True
    usual = known[name].default
    chosen = sections['model'][name].get(component.key, usual if isinstance(usual, str) else usual.get(component.key))
    fields = component.fields(chosen) if isinstance(chosen, str) and chosen in component.table else inner
    return inner[0] in (component.key, *fields)


def read_json(path: str) -> ConfigDict:
    """The config in a config.json, which may come from anybody; see FORMER for one that was saved before.

    Raises:
      UserError: it is no config, in one line.
    """

    def parse(sections) -> ConfigDict:
        if not isinstance(sections, dict):
            raise ValueError(f'it is a JSON {type(sections).__name__}, not an object')
        return complete(with_present_names(sections))

    return parse_json(path, parse, 'put back the config of this run')


def get(resolved: dict, path: str):
    for key in path.split('.'):
        resolved = resolved[key]
    return resolved


def contains(sections: dict, path: str) -> bool:
    """Whether a field is there, 'data.size'."""
    for key in path.split('.'):
        if not isinstance(sections, dict) or key not in sections:
            return False
        sections = sections[key]
    return True


def without(sections: dict, path: str) -> dict:
    """The sections without one field, which is there."""
    first, _, rest = path.partition('.')
    others = {k: v for k, v in sections.items() if k != first}
    return {**others, first: without(sections[first], rest)} if rest else others


def nested(path: str, value) -> dict:
    """{'a': {'b': value}} of 'a.b'."""
    for key in reversed(path.split('.')):
        value = {key: value}
    return value


def check_fields(resolved: dict) -> None:
    """Raises UserError for a value that is not among the CHOICES of its field, or not in its RANGES."""
    for table, check_one in ((CHOICES, check_choice), (RANGES, check_range)):
        for field, allowed in table.items():
            check_one(field, get(resolved, field), allowed)
            section, _, last = field.partition('.')
            for name, own in resolved['optim']['networks'].items() if section == 'optim' else ():
                if last in own:
                    check_one(f'optim.networks.{name}.{last}', own[last], allowed)


def check(resolved: dict) -> None:
    """Raises UserError for values that cannot work whatever the family."""
    check_fields(resolved)
    train, data, optim = resolved['train'], resolved['data'], resolved['optim']
    for where, fields in [
        ('optim', optim),
        *((f'optim.networks.{n}', optim | f) for n, f in optim['networks'].items()),
    ]:
        check_recipe(where, fields)
    check_augmentation(data)
    k = train['updates_per_call']
    for name in ('steps', 'log_every', 'save_every', 'keep_every', 'sample_every', 'evaluate_every'):
        if train[name] % k:
            raise UserError(
                f'config.train.{name} = {train[name]} must be a multiple of config.train.updates_per_call = {k}'
            )
    if data['batch'] % optim['accumulate']:
        raise UserError(
            f'config.data.batch = {data["batch"]} must be a multiple of config.optim.accumulate = {optim["accumulate"]}'
        )
    if 'image' not in data['features']:
        raise UserError("config.data.features must hold 'image'")
    if data['other'] and 'other' not in data['features']:
        raise UserError("config.data.other is read only where config.data.features holds 'other'")
    if data['size'] % (data['low_resolution'] or 1):
        raise UserError(
            f'config.data.low_resolution = {data["low_resolution"]} must divide config.data.size = {data["size"]}'
        )
    if not all(type(std) in (int, float) and 0 < std < 0.288 for std in optim['ema_std']):
        raise UserError(
            f'config.optim.ema_std: widths must be more than 0 and less than 0.288; they are {optim["ema_std"]}'
        )
    for field, prefixes in PATHS.items():
        if (value := get(resolved, field)) and value in prefixes:
            raise UserError(f'config.{field} = {value!r} must name a directory, {value}PATH')
    features = resolved['evaluate']['features']
    if features not in ('none', 'inception') and not features.startswith('run:'):
        raise UserError(f"config.evaluate.features must be 'inception', 'run:PATH' or 'none'; it is {features!r}")
    if train['evaluate_every'] and features == 'none':
        raise UserError('config.train.evaluate_every needs config.evaluate.features: run:PATH of a classifier, say')
    box = data['box']
    if box and not (len(box) == 4 and all(type(x) is int for x in box) and min(box) >= 0 and min(box[2:]) >= 1):
        raise UserError(f'config.data.box must be (top, left, height, width) in pixels; it is {shown(box)}')
    if not all(type(label) is int and label >= 0 for label in data['keep_classes']):
        raise UserError(f'config.data.keep_classes must be numbers of classes; it is {shown(data["keep_classes"])}')


def check_recipe(where: str, fields: dict) -> None:
    """Raises UserError for fields of an optimiser that cannot work, or that the others leave without an effect."""

    def refuse(field: str, wanted: str) -> None:
        raise UserError(f'config.{where}.{field} {wanted}; it is {fields[field]!r}')

    if not all(type(b) is int and b > 0 for b in fields['boundaries']):
        refuse('boundaries', 'must be numbers of updates, (60_000, 80_000)')
    if fields['schedule'] == 'step' and not fields['boundaries']:
        refuse('boundaries', "must name an update where config.optim.schedule is 'step'")
    if not all(isinstance(pattern, str) for pattern in fields['no_decay']):
        refuse('no_decay', "must be patterns, ('bias', 'scale')")
    if fields['weight_decay'] and fields['name'] != 'adamw':
        refuse('weight_decay', f'is read by adamw and not by {fields["name"]}, whose penalty is l2')


def check_augmentation(data: dict) -> None:
    """Raises UserError for augmentation that cannot work."""
    for field, most in (('crop_area', 1.0), ('crop_aspect', float('inf'))):
        values = data[field]
        if len(values) != 2 or not 0 < values[0] <= values[1] <= most:
            raise UserError(
                f'config.data.{field} must be (least, most), above 0'
                f'{" and at most 1" if most == 1 else ""}; it is {values!r}'
            )
    if not data['pad'] < data['size']:
        raise UserError(f'config.data.pad must be from 0 to below config.data.size; it is {data["pad"]}')
    if data['crop'] == 'resized' and data['jitter']:
        raise UserError("config.data.jitter is for the crops 'center' and 'random': 'resized' has its own sizes")


def load(path: str) -> ConfigDict:
    """The config of `FILE.py` or `FILE.py:VARIANT`."""
    file, variant = split_variant(path)
    file = os.path.expanduser(file)
    if not os.path.isfile(file):
        folder = os.path.dirname(file) or '.'
        there = [f for f in os.listdir(folder) if f.endswith('.py')] if os.path.isdir(folder) else []
        raise UserError(f'no config file {file}{near(os.path.basename(file), there) if there else ""}')
    spec = importlib.util.spec_from_file_location('jaxgen_config', file)
    if spec is None:
        raise UserError(f'{file} is not a Python file; a config is a .py file with get_config')
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, 'get_config'):
            raise UserError(f'{file} has no function get_config')
        config = module.get_config(variant)
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as e:  # a person's file can fail in any way: one line, with the place
        raise UserError(f'{place_in(file, e)}: {one_line(e)}') from e
    if not isinstance(config, ConfigDict):
        raise UserError(f'{file}: get_config must return what jaxgen.config.make returns; it is {shown(config)}')
    return complete(config.to_dict())


def split_variant(path: str) -> tuple[str, str]:
    """(FILE.py, VARIANT) of 'FILE.py:VARIANT', ('FILE.py', '') of 'FILE.py'."""
    file, ending, variant = path.partition('.py:')
    return (file + '.py', variant) if ending else (path, '') if path.endswith('.py') else path.partition(':')[::2]


def place_in(file: str, e: BaseException) -> str:
    """'FILE:LINE' of the last line of `file` that led to an exception, or 'FILE'."""
    if isinstance(e, SyntaxError) and e.filename == file:
        return f'{file}:{e.lineno}'
    lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == file]
    return f'{file}:{lines[-1]}' if lines else file


def override(config: ConfigDict, texts: list[str]) -> ConfigDict:
    """The config with fields set on the command line, ['--config.optim.lr=1e-3', ...], and checked."""
    sections = config.to_dict()
    for text in texts:
        path, equals, value = text.lstrip('-').partition('=')
        if not equals:
            raise UserError(f'write {text}=VALUE, with an equals sign')
        keys = path.removeprefix('config.').split('.')
        like = sections
        for key in keys:
            like = like.get(key, '') if isinstance(like, dict) else ''
        given: Any = value
        if isinstance(like, bool):
            given = {'true': True, 'false': False}.get(value.lower(), value)
        elif not isinstance(like, str) or keys[0] == 'optim':
            with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):  # then it is a text
                given = ast.literal_eval(value)
        sections = update_sections(sections, nested('.'.join(keys), given))
    return complete(sections)


def fields_of(texts: list[str]) -> set[str]:
    """The fields that overrides name, {'optim.lr', 'stages.first', ...}, without their values."""
    return {text.lstrip('-').partition('=')[0].removeprefix('config.') for text in texts}


def name(path: str) -> str:
    """The run's name: configs/ddpm_digits.py:tiny -> ddpm_digits_tiny."""
    file, variant = split_variant(path)
    base = os.path.splitext(os.path.basename(file))[0]
    return '_'.join([base, *filter(None, variant.split(','))])


def named(run: str) -> str:
    """The config FILE.py:VARIANT in configs/ whose `name` is that of the directory `run`; '' if there is none."""
    words = os.path.basename(os.path.abspath(run)).split('_')
    for k in range(len(words), 0, -1):
        file = os.path.join('configs', '_'.join(words[:k]) + '.py')
        if os.path.isfile(file):
            return ':'.join([file, *filter(None, [','.join(words[k:])])])
    return ''


def flat(tree: dict, path: str = '') -> dict[str, Any]:
    """{'a.b': value} of a tree of sections."""
    out = {}
    for key, value in tree.items():
        where = f'{path}.{key}' if path else str(key)
        out.update(flat(value, where) if isinstance(value, dict) else {where: value})
    return out


def changed(old: ConfigDict, new: ConfigDict) -> dict[str, tuple]:
    """{'a.b': (old, new)} of every field that differs; None stands for one that is not there."""
    old, new = flat(old.to_dict()), flat(new.to_dict())
    return {k: (old.get(k), new.get(k)) for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)}


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """'a.b: old -> new' for every field that differs."""
    return [f'{key}: {before!r} -> {after!r}' for key, (before, after) in changed(old, new).items()]


def differences_that_matter(
    old: ConfigDict, new: ConfigDict, free: tuple[str, ...] = (), *, use: bool = False
) -> list[str]:
    """The differences that would change what an update computes, or what its weights are.

    Those of `moved` are left out: whether they matter is a question of digests.

    Args:
      free: fields and sections of the model that no update reads.
      use: the run is sampled or measured, not trained on. Then what training costs and how long it takes is free too,
        and a stage may be added that only sampling reads, like a classifier that guides.
    """
    sections = [new.optim, *new.optim.networks.values()]
    ending = any(
        o.get('schedule') in ENDING or o.get('weight_decay_schedule', 'constant') != 'constant' for o in sections
    )
    fixed = {'train.steps'} if ending and not use else set()
    may, pattern = {f'model.{name}' for name in free} | set(moved(old, new)), FREE_IN_USE if use else FREE_ON_RESUME

    def may_change(key: str) -> bool:
        return any(key == field or key.startswith(f'{field}.') for field in may)

    def matters(key: str, before) -> bool:
        if use and before is None and key.startswith('stages.'):
            return False
        return key in fixed or not (may_change(key) or pattern.fullmatch(key))

    different = changed(old, new)
    kept = {key for key, (before, _) in different.items() if matters(key, before)}
    return [d for d in differences(old, new) if d.partition(':')[0] in kept]


def moved(old: ConfigDict, new: ConfigDict) -> list[str]:
    """The fields, 'data.source', 'stages.first', ..., whose folder or run is another than it was."""

    def place(key: str, value) -> str:
        return path_of(key, value) if isinstance(value, str) else ''

    different = changed(old, new).items()
    return [k for k, values in different if MOVABLE.fullmatch(k) and all(place(k, value) for value in values)]
