"""Configs: what a config file may say, and one plain line for whatever is wrong with it.

A config file has `get_config(variant='')` and returns `make(variant, ...)`. The sections that
all families share are in sections.py, each field with its default and what it may be; `config.model`
holds the keyword arguments of the family's `build`. So the config that a run saves is complete, every
field can be set on the command line (`--config.optim.lr=1e-3`), and a misspelt field is an
error that names the near misses.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import importlib.util
import json
import os
import re
import sys
import traceback
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

import jaxgen
from jaxgen import addresses, imports, options
from jaxgen import configs as shipped
from jaxgen.errors import UserError
from jaxgen.files import absolute, check_local
from jaxgen.options import near, shown
from jaxgen.sections import Config, sides

# Schedules that end at the last update: there a run's length is part of what its updates compute.
ENDING = ('linear', 'cosine', 'half_linear')

# Fields of `train` that must be multiples of updates_per_call.
INTERVALS = ('steps', 'log_every', 'save_every', 'keep_every', 'sample_every', 'evaluate_every', 'held_out_every')

# {section: {field: default}}, of the sections that all families share.
DEFAULTS = options.complete(Config, {}, '')
# What every config's variant `tiny` begins with: a run of seconds, for tests. The variant's own fields come on top.
TINY: dict[str, Any] = {
    'data': {'size': 8, 'batch': 8},
    'optim': {'lr': 3e-3, 'schedule': 'constant', 'accumulate': 1},
    'mesh': {'fsdp': 1},
    'train': {
        'steps': 4,
        'updates_per_call': 1,
        'dtype': 'float32',
        'remat': False,
        'log_every': 1,
        'save_every': 2,
        'sample_every': 0,
        'held_out_every': 0,
        'stop_on': '',
        'patience': 0,
        'samples': 4,
    },
    'sample': {'batch': 4},
    'evaluate': {'batch': 8, 'examples': 8, 'features': 'none'},
}

MAX_JSON = 2**20  # bytes of a config.json; a real one has some thousand
# A run may go on although these differ from what it was started with: they change how far it
# goes and what is written when, never what an update computes.
FREE_ON_RESUME = re.compile(
    r'train\.(steps|initial|log_every|save_every|keep|keep_every|sample_every|samples|evaluate_every|evaluate_samples'
    r'|held_out_every|held_out_examples|stop_on|patience|deterministic)|data\.validation_source'
    r'|sample\..*|evaluate\..*|data\.(dir|direct|threads|processes|cache_mb|disk_mb|max_corrupt|max_pixels)'
    r'|data\.(prepared|prepared_dir|prepared_gb)'
    r'|mesh\..*|train\.(remat|updates_per_call)|optim\.accumulate'
)
# Of these the fields that say in what pieces, and in which order, an update is computed: results differ by rounding,
# and with `accumulate` by the parts where a loss compares examples or normalises by them.
LAYOUT = re.compile(r'mesh\..*|train\.(remat|updates_per_call)|optim\.accumulate')
# A trained run is sampled and measured although these differ, too. The other fields say what its weights are.
# Whether its weights fit images of another size is seen by their shapes, see assembly.py.
FREE_IN_USE = re.compile(rf'{FREE_ON_RESUME.pattern}|train\.(dtype|stages_dtype)|data\.(test_source|size)')
# These name files and runs. They may lie elsewhere where the digest of what is there is the one of the training.
MOVABLE = re.compile(r'stages\..*|data\.(source|other|test_source|validation_source)')
SOURCES = tuple(f'{kind}:' for kind in addresses.KINDS)
# Prefixes of the values of these fields that are paths; '': the whole value is one.
PATHS = {
    'data.source': SOURCES,
    'data.other': SOURCES,
    'data.test_source': SOURCES,
    'data.validation_source': SOURCES,
    'data.dir': ('',),
    'data.prepared_dir': ('',),
    'evaluate.features': ('run:',),
    'evaluate.clip': ('run:',),
    'evaluate.inception': ('',),
    'evaluate.reference': ('',),
    'train.initial': ('',),
}
MACHINE = ('data.dir', 'data.prepared_dir')  # questions of the machine, which a stranger's run does not answer
DATA_PATHS = tuple(field for field in PATHS if field.startswith('data.') and field not in MACHINE)  # of images
# What fields were that a run was saved without, {field: value}, where that is not their default.
BEFORE = {'data.prepared': 'off', 'train.stages_dtype': 'stage'}
# Names that fields had in runs saved before, {former: present}. A family's module has a table FORMER of this kind for
# config.model: {'game': 'adversarial', 'width': 'network.width'}. What no table can say, its function
# `former(model) -> model` does, of the section as it was saved; its table MOVED says then, of fields that are given by
# hand, where each is now.
FORMER = {'data.test_share': 'data.test_fraction'}


class UnknownVariant(UserError):
    """A config has no variant of this name; `known` are those that it has."""

    def __init__(self, name: str, known: list[str]):
        super().__init__(f'this config has no variant {name!r}{near(name, known) if known else ""}')
        self.known = known


def families() -> list[str]:
    """Names of all families: the modules in jaxgen/families."""
    folder = os.path.join(os.path.dirname(__file__), 'families')
    return sorted(f[:-3] for f in os.listdir(folder) if f.endswith('.py') and f != '__init__.py')


def one_line(e: BaseException, limit: int = 300) -> str:
    """What an exception says, on one line."""
    text = ' '.join(str(e).split())
    return f'{type(e).__name__}: {text[:limit]}' if text else type(e).__name__


def module(family: str):
    """The family's module, by the family's name or its dotted path; see imports.py."""
    if imports.is_dotted(family):
        return imports.family(family)[0]
    if family not in families():
        raise UserError(f'config.family: no family {family!r}{near(family, families())}')
    return importlib.import_module(f'jaxgen.families.{family}')


def builder(family: str) -> Callable:
    """The family's build function, by the family's name or its dotted path."""
    return imports.family(family)[1] if imports.is_dotted(family) else module(family).build


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
      **sections: those of sections.Config.

    Raises:
      UserError: an unknown field, a wrong type, a value out of range.
    """
    variants = variants or {}
    for written in (sections, *variants.values()):  # by a person, in Python
        imports.name_those_of(written)
    for name in filter(None, variant.split(',')):
        if name not in variants:
            raise UnknownVariant(name, list(variants))
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
    resolved = options.complete(Config, {**sections, 'model': {}}, '')
    resolved['model'] = options.complete(build, model, 'model')
    resolved['data']['size'] = one_size(resolved['data']['size'])
    check(resolved)
    return ConfigDict(with_absolute_paths(resolved))


def one_size(size: int | tuple[int, ...]) -> int | tuple[int, ...]:
    """The one spelling of a size: (8, 8) is 8."""
    height, width = sides(size)
    return height if height == width else size


def data_section(fields: dict) -> dict[str, Any]:
    """The section `data` of these fields, complete and checked: for its images alone.

    Raises:
      UserError: as `make`.
    """
    resolved = options.complete(Config, {'data': dict(fields)}, '')
    check(resolved)
    return with_absolute_paths(resolved)['data']


def path_of(field: str, value: str) -> str:
    """The path that the value of a field names, '' where it names none: 'idx:/digits?layout=NWH' -> '/digits'."""
    prefixes = ('',) if field.startswith('stages.') else PATHS.get(field, ())
    if prefixes is SOURCES:
        address = addresses.parse(value)
        return address.path if address else ''
    return next((value.removeprefix(p) for p in prefixes if value.startswith(p)), '')


def paths(resolved) -> dict[str, str]:
    """{field: path} of all paths that a config names."""
    fields = [*PATHS, *(f'stages.{name}' for name in resolved['stages'])]
    named = {field: path_of(field, get(resolved, field)) for field in fields}
    return {field: path for field, path in named.items() if path}


def with_absolute_paths(resolved: dict) -> dict:
    """The same config, whatever directory it is read in."""
    for field, path in paths(resolved).items():
        check_local(path, f'config.{field}')
        *above, last = field.split('.')
        section = get(resolved, '.'.join(above))
        if PATHS.get(field) is SOURCES and (address := addresses.parse(section[last])):
            section[last] = str(address._replace(path=absolute(path)))
        else:
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
    model = sections.get('model')
    for old, new in getattr(module(family), 'MOVED', {}).items():
        if isinstance(model, dict) and old in model:
            raise UserError(f'config.model.{old} is now config.model.{new}')


def with_present_names(sections: dict) -> dict:
    """The sections of a config that was saved at any time, each field under its present name.

    A field that moved into a component's section is dropped where the component has none of its name: nothing read it.

    Raises:
      UserError: a field is there under both names.
      ValueError: config.model is none that the family ever had.
    """
    family: Any = sections.get('family')
    if not (family in families() or imports.is_dotted(family)) or not isinstance(sections.get('model', {}), dict):
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
    for field, value in BEFORE.items():
        if isinstance(sections.get(field.partition('.')[0], {}), dict) and not contains(sections, field):
            sections = deep_update(sections, nested(field, value))
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


def check(resolved: dict) -> None:
    """Raises UserError for values that cannot work whatever the family."""
    train, data, optim = resolved['train'], resolved['data'], resolved['optim']
    for where, fields in [
        ('optim', optim),
        *((f'optim.networks.{n}', optim | f) for n, f in optim['networks'].items()),
    ]:
        check_recipe(where, fields)
    check_augmentation(data)
    k = train['updates_per_call']
    for name in INTERVALS:
        if train[name] % k:
            raise UserError(
                f'config.train.{name} = {train[name]} must be a multiple of config.train.updates_per_call = {k}'
            )
    if data['batch'] % optim['accumulate']:
        raise UserError(
            f'config.data.batch = {data["batch"]} must be a multiple of config.optim.accumulate = {optim["accumulate"]}'
        )
    if data['validation_fraction'] and data['validation_source']:
        raise UserError(
            'config.data.validation_fraction holds validation examples out of the training data, and '
            'config.data.validation_source names others: set one of them'
        )
    if data['other'] and 'other' not in data['features']:
        raise UserError("config.data.other is read only where config.data.features holds 'other'")
    if 'other_caption' in data['features'] and 'other' not in data['features']:
        raise UserError("config.data.features: 'other_caption' is of 'other', which they do not hold")
    check_low_resolution(data)
    for field, prefixes in PATHS.items():
        if (value := get(resolved, field)) and value in prefixes:
            what = 'a file or directory' if value.removesuffix(':') in addresses.READ else 'a directory'
            raise UserError(f'config.{field} = {value!r} must name {what}, {value}PATH')
    check_stopping(train)
    if train['evaluate_every'] and resolved['evaluate']['features'] == 'none':
        raise UserError('config.train.evaluate_every needs config.evaluate.features: run:PATH of a classifier, say')


def check_low_resolution(data: dict) -> None:
    """Raises UserError where the image cannot be cut into equal squares that are the pixels of 'low_resolution'."""
    height, width = sides(data['size'])
    factor, rest = divmod(min(height, width), data['low_resolution'] or min(height, width))
    if rest or height % factor or width % factor:
        both = '' if height == width else ': its shorter side, and the quotient the longer one'
        raise UserError(
            f'config.data.low_resolution = {data["low_resolution"]} must divide config.data.size = {data["size"]}{both}'
        )


def check_stopping(train: dict) -> None:
    """Raises UserError for a metric to stop on that is never evaluated, and for patience without one."""
    metric, patience = train['stop_on'], train['patience']
    if patience and not metric:
        raise UserError(
            f'config.train.patience = {patience} needs config.train.stop_on: the metric that is to improve, '
            'validation/NAME, say'
        )
    if metric.startswith('test/'):
        raise UserError(
            f'config.train.stop_on = {metric!r}: a run that stops on test examples is chosen by them; hold validation '
            'examples out (config.data.validation_fraction), and stop on validation/NAME'
        )
    if metric and '/' not in metric:
        raise UserError(
            f'config.train.stop_on = {metric!r} must be validation/NAME, of the family, or METRIC/NETWORK, of samples'
        )
    interval = 'held_out_every' if metric.startswith('validation/') else 'evaluate_every'
    if metric and not train[interval]:
        raise UserError(f'config.train.stop_on = {metric!r} needs config.train.{interval}: updates between evaluations')


def check_recipe(where: str, fields: dict) -> None:
    """Raises UserError for fields of an optimiser that cannot work, or that the others leave without an effect."""

    if fields['schedule'] == 'step' and not fields['boundaries']:
        raise UserError(
            f"config.{where}.boundaries must name an update where config.optim.schedule is 'step'; it is ()"
        )
    if fields['weight_decay'] and fields['name'] != 'adamw':
        raise UserError(
            f'config.{where}.weight_decay is read by adamw and not by {fields["name"]}, whose penalty is l2; it is '
            f'{fields["weight_decay"]}'
        )


def check_augmentation(data: dict) -> None:
    """Raises UserError for augmentation that cannot work."""
    if not data['pad'] < min(sides(data['size'])):
        raise UserError(f'config.data.pad must be from 0 to below config.data.size; it is {data["pad"]}')
    if data['crop'] == 'resized' and data['jitter']:
        raise UserError("config.data.jitter is for the crops 'center' and 'random': 'resized' has its own sizes")
    if data['draft'] and (data['crop'] == 'resized' or data['box']):
        what = 'box' if data['box'] else 'crop'
        raise UserError(
            f'config.data.draft decodes at a part of the size, but config.data.{what} = {data[what]!r} needs all: '
            'set it to 0'
        )


def locate(file: str) -> str:
    """The path of a config file: of the file itself, or of the config that comes with jaxgen under this name.

    Raises:
      UserError: there is neither.
    """
    file = os.path.expanduser(file)
    if os.path.isfile(file):
        return file
    folder, base = os.path.split(file)
    known = shipped.files_in(folder or '.')
    if folder or file.endswith('.py'):
        if base.removesuffix('.py') in shipped.names():
            raise UserError(f'no config file {file}; one of this name comes with jaxgen: {base.removesuffix(".py")}')
        raise UserError(f'no config file {file}{near(base, known) if known else ""}')
    if file in shipped.names():
        return shipped.file(file)
    close = difflib.get_close_matches(file, [*shipped.names(), *known], n=3, cutoff=0.5)
    raise UserError(
        f'no config {shown(file)}' + (f'; did you mean {" or ".join(close)}?' if close else '; --mode=list prints all')
    )


def load(path: str) -> ConfigDict:
    """The config of `FILE.py` or `FILE.py:VARIANT`, or of the name of one that comes with jaxgen, `NAME:VARIANT`; or
    that by which a run is tuned, `RUN:VARIANT`, see tuning.py."""
    file, variant = split_variant(path)
    from jaxgen import tuning  # which reads runs, by this module

    if tuning.is_run(file):
        return tuning.derived(file, variant)
    file = locate(file)
    spec = importlib.util.spec_from_file_location('jaxgen_config', file)
    if spec is None or spec.loader is None:
        raise UserError(f'{file} is not a Python file; a config is a .py file with get_config')
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, 'get_config'):
            raise UserError(f'{file} has no function get_config')
        config = module.get_config(variant)
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as e:  # a person's file can fail in any way: one line, with its position
        raise UserError(f'{position_in(file, e)}: {one_line(e)}') from e
    if not isinstance(config, ConfigDict):
        raise UserError(f'{file}: get_config must return what jaxgen.config.make returns; it is {shown(config)}')
    imports.name_those_of(config.to_dict())
    return complete(config.to_dict())


def split_variant(path: str) -> tuple[str, str]:
    """(FILE.py, VARIANT) of 'FILE.py:VARIANT', ('FILE.py', '') of 'FILE.py'."""
    file, ending, variant = path.partition('.py:')
    return (file + '.py', variant) if ending else (path, '') if path.endswith('.py') else path.partition(':')[::2]


def position_in(file: str, e: BaseException) -> str:
    """'FILE:LINE' of the last line of `file` that led to an exception, or 'FILE'."""
    if isinstance(e, SyntaxError) and e.filename == file:
        return f'{file}:{e.lineno}'
    lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == file]
    return f'{file}:{lines[-1]}' if lines else file


def override(config: ConfigDict, texts: list[str]) -> ConfigDict:
    """The config with fields set on the command line, ['--config.optim.lr=1e-3', ...], and checked."""
    sections = config.to_dict()
    given: dict[str, Any] = {}
    for text in texts:
        path, equals, value = text.lstrip('-').partition('=')
        keys = path.removeprefix('config.').split('.')
        if not equals:  # of a boolean
            if type(at(sections, keys)) not in (bool, type(None)):
                raise UserError(f'{text} needs a value: {text}=VALUE')
            value = 'true'
        given = joined(given, nested('.'.join(keys), parsed(value, keys, sections)))
    imports.name_those_of(given)
    return complete(update_sections(sections, given))


def at(sections: Any, keys: list[str]) -> Any:
    """The value of a field; None where there is none."""
    for key in keys:
        sections = sections.get(key) if isinstance(sections, dict) else None
    return sections


def parsed(value: str, keys: list[str], sections: dict) -> Any:
    """What a text on the command line stands for, by the type of the field's present value; a field that is not there
    yet may be of a component that another text names."""
    present = at(sections, keys)
    if isinstance(present, bool):
        return {'true': True, 'false': False}.get(value.lower(), value)
    if present is None and value.lower() in ('true', 'false'):
        return value.lower() == 'true'
    if not isinstance(present, str) or keys[0] == 'optim':
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):  # then it is a text
            return ast.literal_eval(value)
    return value


def joined(first: dict, second: dict) -> dict:
    """Both trees of fields in one; of a component 'name' may stand for {'name': 'name'}."""
    out = dict(first)
    for key, value in second.items():
        before = out.get(key)
        if isinstance(before, dict) and isinstance(value, str):
            value = {'name': value}
        if isinstance(before, str) and isinstance(value, dict):
            before = {'name': before}
        out[key] = joined(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return out


def name_imports(texts: list[str]) -> None:
    """Lets the families and networks that overrides name be imported; see imports.py."""
    imports.name(*(text.partition('=')[2] for text in texts))


def fields_of(texts: list[str]) -> set[str]:
    """The fields that overrides name, {'optim.lr', 'stages.first', ...}, without their values."""
    return {text.lstrip('-').partition('=')[0].removeprefix('config.') for text in texts}


def name(path: str) -> str:
    """The run's name: configs/ddpm_digits.py:tiny -> ddpm_digits_tiny."""
    file, variant = split_variant(path)
    base = os.path.splitext(os.path.basename(file))[0]
    return '_'.join([base, *filter(None, variant.split(','))])


def named(run: str) -> str:
    """The config whose `name` is that of the directory `run`, as `load` takes it; '' if there is none.

    FILE.py:VARIANT of one in configs/, or NAME:VARIANT of one that comes with jaxgen.
    """
    words = os.path.basename(os.path.abspath(run)).split('_')
    for k in range(len(words), 0, -1):
        name = '_'.join(words[:k])
        for config, there in (
            (os.path.join('configs', f'{name}.py'), os.path.isfile),
            (name, shipped.names().__contains__),
        ):
            if there(config):
                return ':'.join([config, *filter(None, [','.join(words[k:])])])
    return ''


def plain(value):
    """A value of a field as JSON has it: numbers and arrays, and paths, as Python's own, sections as dicts."""
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | range):
        return tuple(plain(one) for one in value)
    if isinstance(value, type | types.FunctionType | types.ModuleType):  # a family or network of the person's own
        return imports.path_of(value)
    if hasattr(value, '__array__'):  # of numpy, jax or torch
        return plain(np.asarray(value).tolist())
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def nested_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of fields of which some are given by their paths: {'optim.lr': 1e-3} -> {'optim': {'lr': 1e-3}}.

    Raises:
      UserError: a field is given twice.
    """
    tree: dict[str, Any] = {}
    for path, value in fields.items():
        if not isinstance(path, str) or not all(path.split('.')):
            raise UserError(f"a field is named by a text like 'optim.lr'; it is {shown(path)}")
        own = nested_fields(value) if isinstance(value, Mapping) and value else value
        more = nested(path, own)
        twice = sorted(set(flat(tree)) & set(flat(more)))
        if twice:
            raise UserError(f'config.{twice[0]} is given twice')
        tree = joined(tree, more)
    return tree


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


def other_layout(old: ConfigDict, new: ConfigDict) -> list[str]:
    """The differences in how an update is cut and ordered; see LAYOUT."""
    return [d for d in differences(old, new) if LAYOUT.fullmatch(d.partition(':')[0])]


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

    def path(key: str, value) -> str:
        return path_of(key, value) if isinstance(value, str) else ''

    different = changed(old, new).items()
    return [k for k, values in different if MOVABLE.fullmatch(k) and all(path(k, value) for value in values)]


sys.modules[__name__].__class__ = jaxgen.CallableModule  # jaxgen.config(name, **overrides): library.config
