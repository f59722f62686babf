"""Configs: values, shapes of sections, files and JSON of any kind, and the one line that refuses what will not do."""

from __future__ import annotations

import json
import math
import os
import sys
import types
from typing import Annotated, Any

import pytest
from support import mistake, path

from jaxgen import config as configs
from jaxgen import options, sections
from jaxgen.diffusion import processes
from jaxgen.errors import UserError

HUGE = 10**400


@pytest.fixture(scope='module')
def base():
    return configs.load(path('vae_digits'))


def refused(config, *fields: str) -> str:
    """The message for fields that cannot be set together; one line."""
    with pytest.raises(UserError) as e:
        configs.override(config, [f'--config.{field}' for field in fields])
    assert '\n' not in str(e.value) and len(str(e.value)) < 1000
    return str(e.value)


# --- ranges


def shared(target=sections.Config, path: str = '') -> dict[str, options.Field]:
    """{'section.name': field} of the sections that all families share."""
    out = {}
    for name, field in options.fields(target).items():
        below = isinstance(field.section, options.Fields)
        out |= shared(field.section.function, f'{path}{name}.') if below else {f'{path}{name}': field}
    return out


RANGES = {k: r.interval for k, f in shared().items() for r in f.constraints if isinstance(r, options.Range)}


def test_every_number_has_a_range():
    """But those that are one of a few; a new field is not forgotten."""
    numbers = {k: f for k, f in shared().items() if type(f.default) in (int, float) and k != 'data.size'}
    assert len(numbers) > 40
    assert not [
        k for k, f in numbers.items() if not any(isinstance(r, options.Range | options.Choice) for r in f.constraints)
    ]
    assert shared().keys() == set(configs.flat(configs.DEFAULTS)) | {'model', 'stages', 'optim.networks'}


def test_every_field_has_a_meaning_and_a_type():
    assert not [k for k, f in shared().items() if not f.meaning or f.type is Any]


@pytest.mark.parametrize('field', RANGES)
def test_ends_of_ranges(field, base):
    """Beyond each end of an interval a value is refused, in it and on a closed end it is not."""
    interval = RANGES[field]
    low, high = map(float, interval[1:-1].split(','))
    whole = isinstance(configs.get(configs.DEFAULTS, field), int)
    step = 1 if whole else 1e-6
    outside = [low - step, *([low] if interval[0] == '(' else [])]
    inside = [low if interval[0] == '[' else low + step]
    if high < math.inf:
        outside += [high + step, *([high] if interval[-1] == ')' else [])]
        inside += [high if interval[-1] == ']' else high - step]
    for value in outside:
        assert f'config.{field} must be' in refused(base, f'{field}={int(value) if whole else value}')
    for value in inside:
        options.check_range(field, value, interval)


@pytest.mark.parametrize(
    'text',
    [
        *('optim.clip=-1', 'optim.lr=-1', 'optim.lr=0', 'optim.b1=1.0', 'optim.b2=2', 'optim.eps=-1'),
        *('optim.weight_decay=-1', 'optim.l2=-0.1', 'optim.warmup=-1', 'optim.decay_rate=1.5', 'optim.floor=2'),
        *('data.classes=-3', 'data.max_corrupt=2', 'data.threads=1000000', 'data.threads=-1', 'data.size=0'),
        *('data.batch=0', 'data.test_fraction=1', 'data.shift=0.5', 'data.crop_rate=0', 'data.cache_mb=-1'),
        *('evaluate.examples=-5', 'evaluate.samples=0', 'sample.batch=0', 'mesh.fsdp=0', 'seed=-1', 'train.steps=-1'),
        *('train.keep=0', 'optim.ema=1', 'optim.ema=-0.1', 'optim.accumulate=0', 'train.updates_per_call=0'),
    ],
)
def test_values_out_of_range(text, base):
    field, _, value = text.partition('=')
    message = refused(base, text)
    assert f'config.{field} must be' in message
    assert str(float(value)) in message or value in message


@pytest.mark.parametrize('size', ['(28, 20)', '28, 20', '[28, 20]'])
def test_a_size_is_a_number_or_height_and_width(size, base, tmp_path):
    config = configs.override(base, [f'--config.data.size={size}'])
    assert config.data.size == (28, 20)
    (tmp_path / 'config.json').write_text(json.dumps(config.to_dict()))
    assert configs.read_json(str(tmp_path / 'config.json')).to_dict() == config.to_dict()
    assert configs.override(config, ['--config.data.size=8']).to_dict() == base.to_dict()
    assert configs.override(base, ['--config.data.size=(8, 8)']).data.size == 8, 'one size is written in one way'


@pytest.mark.parametrize(
    'size', ['(28,)', '(28, 20, 1)', '(0, 8)', '(8, 65537)', '(8, 8.5)', '(True, 8)', '28x20', '()', 'None', '1e3']
)
def test_what_is_no_size(size, base):
    message = refused(base, f'data.size={size}')
    assert message.startswith('config.data.size must be int, or (height, width) in pixels, each from 1 to 65536')


def test_low_resolution_of_images_that_are_not_square(base):
    sizes = ['--config.data.size=(24, 16)']
    assert configs.override(base, [*sizes, '--config.data.low_resolution=4']).data.low_resolution == 4
    for side in (3, 32, 1):  # 16 is no multiple of 3, 32 is larger, 24 no multiple of 16
        with pytest.raises(UserError, match=r'low_resolution = \d+ must divide config.data.size = \(24, 16\)'):
            configs.override(base, [*sizes, f'--config.data.low_resolution={side}'])
    with pytest.raises(UserError, match=r'config\.data\.pad'):
        configs.override(base, [*sizes, '--config.data.pad=16'])


def test_a_mistake_of_the_command(capfd, no_compile):
    assert 'config.optim.clip must be 0 or more; it is -1.0' in mistake(
        capfd, '--mode=describe', f'--config={path("autoencoder_digits")}', '--config.optim.clip=-1'
    )


@pytest.mark.parametrize('text', ['lr=-1', 'clip=-1', 'b1=1.0', 'b2=1', 'eps=-1e-8', 'warmup=-1', 'lr=1e999', 'l2=-1'])
def test_the_optimiser_of_one_network_has_the_same_ranges(text, base):
    assert f'config.optim.networks.coder.{text.partition("=")[0]} must be' in refused(
        base, f'optim.networks.coder.{text}'
    )
    assert configs.override(base, ['--config.optim.networks.coder.lr=1']).optim.networks.coder.lr == 1


@pytest.mark.parametrize(
    'text',
    [
        *('optim.lr=1e999', 'optim.lr=-1e999', 'data.crop_area=(0.5, 1e999)', 'data.crop_aspect=(1, 1e999)'),
        *('optim.ema_std=(1e999,)', 'model.scale=1e999', 'model.beta=-1e999', f'optim.lr={10**310}'),
        *('seed=2147483648', f'train.steps={10**20}', f'model.latent={10**30}', f'data.keep_classes=({10**20},)'),
    ],
)
def test_no_field_is_infinite_or_too_large(text, base):
    assert f'config.{text.partition("=")[0]}' in refused(base, text)


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf, 2**31, -(2**31), HUGE])
def test_numbers_from_python_and_json(value, base):
    """Those that no text of the command line is: not-a-numbers, and integers of any length."""
    for section, field in (('optim', 'lr'), ('model', 'latent'), ('train', 'steps'), ('optim', 'boundaries')):
        given = (value,) if field == 'boundaries' else value
        with pytest.raises(UserError, match=rf'config\.{section}\.{field}') as e:
            configs.complete(configs.deep_update(base.to_dict(), {section: {field: given}}))
        assert len(str(e.value)) < 500


def test_numbers_that_a_family_chooses_are_finite(base):
    """Fields whose default is None, like sigma_max of diffusion."""
    ve = configs.load(path('score_ve_digits', 'tiny'))
    free = [f.name for f in options.fields(processes.ve).values() if f.default is None]
    assert free == ['sigma_min', 'sigma_max']
    for name in free:
        where = f'model.process.{name}'
        assert f'config.{where} must be a finite' in refused(ve, f'{where}=1e999')
        assert f'config.{where} must be' in refused(ve, f'{where}={10**20}')
        assert f'config.{where} must be a number or None' in refused(ve, f'{where}=many')
        assert configs.override(ve, [f'--config.{where}=None']).model.process[name] is None


# --- variants


def test_tiny_variants_have_a_common_part():
    """Fields of the config's own variant come on top of it, and other variants on top of both."""
    variants = {'tiny': dict(data=dict(batch=4), model=dict(latent=2)), 'long': dict(train=dict(steps=8), seed=3)}
    sections = dict(family='vae', data=dict(batch=64, flip=True), optim=dict(schedule='cosine'))
    full, tiny, long = (configs.make(v, variants=variants, **sections) for v in ('', 'tiny', 'tiny,long'))
    assert (full.data.batch, full.train.steps, full.optim.schedule) == (64, 1000, 'cosine')
    assert (tiny.data.batch, tiny.model.latent, tiny.data.flip) == (4, 2, True)
    common = configs.flat(configs.TINY)
    assert {k: configs.get(tiny, k) for k in common} == common | {'data.batch': 4}
    assert set(configs.changed(tiny, long)) == {'train.steps', 'seed'} and long.train.steps == 8
    with pytest.raises(UserError, match='has no variant'):
        configs.make('tiny', **sections)


# --- sections and fields of the wrong shape


@pytest.mark.parametrize(
    'text, says',
    [
        ("optim.networks={'coder': {'schedule': 'foo'}}", 'config.optim.networks.coder.schedule must be one of'),
        ("optim.networks={'coder': {'lr': 'fast'}}", 'config.optim.networks.coder.lr must be float'),
        ("optim.networks={'coder': {'ema': 0.5}}", 'config.optim.networks.coder.ema: no such field'),
        ("optim.networks={'coder': {'networks': {}}}", 'no such field'),
        ("optim.networks={'coder': [1]}", 'config.optim.networks.coder is a section'),
        ("optim.networks={'a.b': {}}", 'a name is made of letters'),
        ('optim.networks={1: {}}', 'a name is made of letters'),
        ('optim.networks=[]', 'is a section'),
        ('model={1: 2}', 'config.model.1: no such field'),
        ("model={'a b\\n': 2}", 'no such field'),
        ('model=[]', 'config.model is a section'),
        ('model=None', 'config.model is a section'),
        ("stages={'a.b': 'x'}", 'a name is made of letters'),
        ("stages={'': 'x'}", 'a name is made of letters'),
        ("stages={1: 'x'}", 'a name is made of letters'),
        ("stages={'a': 3}", 'config.stages.a must be str'),
        ("stages={'a': {'b': 'c'}}", 'config.stages.a must be str'),
        ("stages={'a': ''}", 'config.stages.a must be the directory of a run'),
        ('stages=None', 'is a section'),
        ("data={'size': {'a': 1}}", 'config.data.size must be int'),
        ('data.size=8.0', 'config.data.size must be int'),
        ('train.steps=()', 'config.train.steps must be int'),
        ('train.steps=None', 'config.train.steps must be int'),
        ('optim.lr.x=3', 'config.optim.lr must be float'),
        ('optim.lr=True', 'config.optim.lr must be float'),
        ('optim..lr=3', 'no such field'),
        ('=3', 'no such field'),
        ('data.features=image', 'config.data.features must be tuple'),
        ("data.features=('image', 3)", 'tuple of str'),
        ('data.features=()', "'image' among them"),
        ("data.keep_classes=('a',)", 'numbers of classes'),
        ('data.keep_classes=(-1,)', 'numbers of classes'),
        ('data.keep_classes=(1.5,)', 'numbers of classes'),
        ('data.box=(0, 0, 0, 8)', '(top, left, height, width)'),
        ('data.box=(-1, 0, 8, 8)', '(top, left, height, width)'),
        ('data.box=(0, 0, 8)', '(top, left, height, width)'),
        ('data.source=folder:a\0b', 'zero bytes'),
        ('stages.first=a\0b', 'zero bytes'),
        ('data.dir=a\ud800', 'half characters'),
        ('data.source=folder:', 'must name a directory'),
        ('data.source=pairs:', 'must name a directory'),
        ('evaluate.features=run:', 'must name a directory'),
        ('model.latent=' + '[' * 100_000, 'config.model.latent must be int'),
        ('model.latent=' + '-' * 100_000 + '1', 'config.model.latent must be int'),
        ('train.steps=' + '9' * 10_000, 'config.train.steps must be int'),
        ('family=../os', 'no family'),
        ('family=jaxgen.families.vae', 'no family'),
    ],
)
def test_sections_and_fields_of_other_shapes(text, says, base):
    assert says in refused(base, text)


# --- paths


def test_one_path_is_written_in_one_way(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', str(tmp_path))
    spellings = (
        'runs/first',
        'runs/first/',
        './runs//first',
        'x/../runs/first',
        '~/runs/first',
        f'{tmp_path}/runs/first',
    )
    for text in spellings:
        fields = [
            f'stages.first={text}',
            f'data.source=folder:{text}',
            f'evaluate.features=run:{text}',
            f'data.dir={text}',
        ]
        config = configs.override(base, [f'--config.{field}' for field in fields])
        first = f'{tmp_path}/runs/first'
        assert config.stages.first == config.data.dir == first
        assert config.data.source == f'folder:{first}' and config.evaluate.features == f'run:{first}'
        assert configs.paths(config) == {
            'stages.first': first, 'data.source': first, 'evaluate.features': first, 'data.dir': first,
        }  # fmt: skip
    # Names of data sets are no paths.
    assert configs.override(base, ['--config.data.source=cifar10']).data.source == 'cifar10'


# --- config.json, of anybody


@pytest.mark.parametrize(
    'text, says',
    [
        *((text, 'is a JSON') for text in ('[]', '3', 'null', 'true', '"digits"', '[{"family": "vae"}]', '1e5')),
        ('', 'JSONDecodeError'),
        ('{', 'JSONDecodeError'),
        ('\ufeff{}', 'JSONDecodeError'),
        ('[' * 100_000, 'RecursionError'),
        ('{"a":' * 100_000, 'RecursionError'),
        ('{}', 'config.family is missing'),
        ('{"family": 3}', 'config.family is missing'),
        ('{"family": ["vae"]}', 'config.family is missing'),
        ('{"family": "os"}', 'no family'),
        ('{"family": "vae", "optim": {"lr": NaN}}', 'must be a finite number'),
        ('{"family": "vae", "optim": {"lr": Infinity}}', 'must be a finite number'),
        ('{"family": "vae", "optim": {"lr": 1e999}}', 'must be a finite number'),
        ('{"family": "vae", "seed": ' + '9' * 4000 + '}', 'config.seed must be'),
        ('{"family": "vae", "seed": ' + '9' * 5000 + '}', 'damaged (ValueError'),
        ('{"family": "vae", "stages": {"first": null}}', 'config.stages.first must be str'),
        ('{"family": "vae", "data": [1]}', 'config.data is a section'),
        ('{"family": "vae", "data": {"features": ["image", {}]}}', 'tuple of str'),
        ('{"family": "vae", "model": {"hidden": [[1]]}}', 'tuple of int'),
        ('{"family": "vae", "data": {"dir": "a\\u0000b"}}', 'zero bytes'),
        ('{"family": "vae", "data": {"dir": "a\\ud800"}}', 'half characters'),
        ('{"family": "vae", "x\\n\\u001b[31m": 1}', 'no such field'),
        ('{"family": "vae"}' + ' ' * 2**21, 'damaged (ValueError: it has more than'),
    ],
)  # fmt: skip
def test_config_json_of_any_content(text, says, tmp_path, capfd, no_compile):
    file = tmp_path / 'config.json'
    file.write_text(text, encoding='utf-8')
    message = mistake(capfd, '--mode=sample', f'--workdir={tmp_path}')
    assert says in message and str(file) in message and len(message) < 1500
    assert message.rstrip('\n').isprintable()


def test_config_json_that_is_no_file(tmp_path):
    """Nothing waits for a pipe, and no link is followed."""
    (tmp_path / 'whole.json').write_text(json.dumps({'family': 'vae'}))
    assert configs.read_json(str(tmp_path / 'whole.json')).family == 'vae'
    os.mkfifo(tmp_path / 'pipe.json')
    os.symlink(tmp_path / 'whole.json', tmp_path / 'link.json')
    (tmp_path / 'folder.json').mkdir()
    (tmp_path / 'bytes.json').write_bytes(b'{"family": "v\xffae"}')
    for name in ('pipe', 'link', 'folder', 'bytes', 'absent'):
        with pytest.raises(UserError, match=rf'{name}\.json is damaged'):
            configs.read_json(str(tmp_path / f'{name}.json'))


# --- fields that had other names


def small(*, width: int = 8, rate: Annotated[float, '[0, 1)'] = 0.5):
    pass


def large(*, width: int = 64, depth: int = 2):
    pass


NETWORK = options.Component({'small': small, 'large': large, 'none': None})


def renamed_build(context, *, adversarial: str = 'hinge', network: Annotated[options.Section, NETWORK] = 'small'):
    pass


@pytest.fixture
def renamed(monkeypatch):
    """A family whose fields had other names; some have moved into a component's section."""
    names = {'game': 'adversarial', 'network': 'network.name', 'width': 'network.width', 'depth': 'network.depth'}
    family = types.SimpleNamespace(build=renamed_build, FORMER=names)
    monkeypatch.setitem(sys.modules, 'jaxgen.families.renamed', family)
    monkeypatch.setattr(configs, 'families', lambda: ['renamed', 'vae'])
    return family


def saved(tmp_path, **sections):
    """The config of a config.json with these sections."""
    (tmp_path / 'config.json').write_text(json.dumps(sections))
    return configs.read_json(str(tmp_path / 'config.json'))


@pytest.mark.parametrize(
    'model, expected',
    [
        ({'game': 'wgan'}, {'adversarial': 'wgan', 'network': {'name': 'small', 'width': 8, 'rate': 0.5}}),
        ({'width': 3, 'depth': 5}, {'network': {'name': 'small', 'width': 3, 'rate': 0.5}}),
        ({'network': 'large', 'width': 3, 'depth': 5}, {'network': {'name': 'large', 'width': 3, 'depth': 5}}),
        ({'network': 'none', 'width': 3, 'depth': 5}, {'network': {'name': 'none'}}),
        ({'network': {'name': 'large', 'depth': 1}}, {'network': {'name': 'large', 'width': 64, 'depth': 1}}),
    ],
)
def test_saved_configs_have_present_names(model, expected, tmp_path, renamed):
    read = saved(tmp_path, family='renamed', model=model, data={'test_share': 0.125})
    assert read.model.to_dict() == {'adversarial': 'hinge'} | expected
    assert read.data.test_fraction == 0.125
    # And what is saved now is read as it is.
    assert saved(tmp_path, **read.to_dict()) == read


def test_what_no_table_says_a_function_does(tmp_path, renamed):
    def former(model):
        return {**model, 'game': model['loss'].lower()} if 'loss' in model else model

    renamed.former = lambda model: {k: v for k, v in former(model).items() if k != 'loss'}
    assert saved(tmp_path, family='renamed', model={'loss': 'WGAN'}).model.adversarial == 'wgan'
    assert saved(tmp_path, family='renamed', model={}).model.adversarial == 'hinge'
    with pytest.raises(UserError, match=r"is damaged \(ValueError: config\.model: AttributeError: 'int'"):
        saved(tmp_path, family='renamed', model={'loss': 3})


@pytest.mark.parametrize(
    'sections, message',
    [
        (dict(model={'game': 'a', 'adversarial': 'b'}), 'config.model.game is now config.model.adversarial, and both'),
        (
            dict(data={'test_share': 0.1, 'test_fraction': 0.1}),
            'config.data.test_share is now config.data.test_fraction',
        ),
        (dict(model={'game': 3}), 'config.model.adversarial must be str'),
        (dict(model={'network': 3}), 'config.model.network.name must be one of'),
        (dict(model={'network': ['small'], 'depth': 1}), 'config.model.network.name must be one of'),
        (
            dict(model={'width': 1, 'network': {'name': 'small', 'width': 2}}),
            'config.model.width is now config.model.net',
        ),
        (dict(model=[]), 'config.model is a section'),
        (dict(data=[]), 'config.data is a section'),
    ],
)
def test_saved_configs_of_no_time(sections, message, tmp_path, renamed):
    with pytest.raises(UserError) as e:
        saved(tmp_path, family='renamed', **sections)
    assert message in str(e.value) and '\n' not in str(e.value)


def test_former_names_in_files_and_on_the_command_line(renamed, base, tmp_path):
    config = configs.make(family='renamed')
    assert refused(config, 'model.game=wgan') == 'config.model.game is now config.model.adversarial'
    assert refused(config, 'model.width=3') == 'config.model.width is now config.model.network.width'
    assert refused(base, 'data.test_share=0.5') == 'config.data.test_share is now config.data.test_fraction'
    # A component's name stands for its section, as it did when it was all there was.
    assert configs.override(config, ['--config.model.network=large']).model.network.depth == 2
    with pytest.raises(UserError, match=r'config\.data\.test_share is now'):
        configs.make(family='vae', data=dict(test_share=0.5))


with open(os.path.join(os.path.dirname(__file__), 'former_configs.json'), encoding='utf-8') as file:
    # {name: family and model as runs of this config saved them before 0.2.0, or first, where the family is newer}
    FORMER = json.load(file)


@pytest.mark.parametrize('name', FORMER)
def test_runs_saved_before_are_those_of_the_same_config(name, tmp_path):
    """An entry goes when its config is changed on purpose."""
    assert saved(tmp_path, **FORMER[name]).model == configs.load(path(name, '')).model


def test_former_configs_have_every_family():
    assert {section['family'] for section in FORMER.values()} == set(configs.families())


@pytest.mark.parametrize('family', configs.families())
def test_tables_of_former_names(family):
    """No former name is a present one, but that of a component; each present name is a field of some component."""
    known = options.fields(configs.builder(family))
    for old, new in getattr(configs.module(family), 'FORMER', {}).items():
        assert old not in known or new.startswith(f'{old}.')
        name, *inner = new.split('.')
        section = known[name].section
        assert not inner or any(inner[0] in (section.key, *section.fields(one)) for one in section.table)


# --- config files: programs of the person's own


def loading(tmp_path, text: str | bytes) -> str:
    """What is said of a config file with this text."""
    file = tmp_path / 'mine.py'
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UserError) as e:
        configs.load(str(file))
    message = str(e.value)
    assert '\n' not in message and message.startswith(str(file)), message
    return message.removeprefix(str(file))


GET = 'def get_config(variant=""):\n    '


@pytest.mark.parametrize(
    'text, says',
    [
        ('quit()\n', ':1: SystemExit'),
        ('import sys\nsys.exit(0)\n', ':2: SystemExit'),
        ('raise SystemExit\n', ':1: SystemExit'),
        (GET + 'quit(3)\n', ':2: SystemExit'),
        (GET + 'raise ValueError("one\\ntwo\\n\\nthree")\n', ':2: ValueError: one two three'),
        (GET + 'raise KeyError("a" * 10_000)\n', ':2: KeyError'),
        (GET + 'assert False\n', ':2: AssertionError'),
        (GET + 'return get_config(variant)\n', ':2: RecursionError'),
        (GET + 'raise StopIteration\n', ':2: StopIteration'),
        (GET + 'raise GeneratorExit\n', ':2: GeneratorExit'),
        (GET + 'raise type("Odd", (BaseException,), {})("x")\n', ':2: Odd: x'),
        (GET + 'raise MemoryError\n', ':2: MemoryError'),
        ('def get_config(:\n', ':1: SyntaxError'),
        ('x = (\n', ':1: SyntaxError'),
        ('\n\n  x = 1\n', ':3: IndentationError'),
        (b'x = 1\0\n', 'null bytes'),  # a ValueError or SyntaxError, by Python's version
        (b'x = "\xff"\n', ': SyntaxError'),
        ('def get_config():\n    return 1\n', ': TypeError'),
        ('get_config = 3\n', ': TypeError'),
        (GET + 'return None\n', ': get_config must return'),
        (GET + 'return {"family": "vae"}\n', ': get_config must return'),
        ('x = 1\n', ' has no function get_config'),
    ],
)
def test_config_files_that_fail(text, says, tmp_path):
    message = loading(tmp_path, text)
    assert says in message and len(message) < 500


def test_a_config_file_stops_where_the_person_stops_it(tmp_path):
    file = tmp_path / 'mine.py'
    file.write_text('raise KeyboardInterrupt\n')
    with pytest.raises(KeyboardInterrupt):
        configs.load(str(file))
