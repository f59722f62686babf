"""Options: constraints at the field, sections whose fields depend on a name, and what is said of each."""

# ruff: noqa: B006
from __future__ import annotations

import dataclasses
import functools
import re
from typing import Annotated

import flax.linen as nn
import pytest

from jaxgen import options
from jaxgen.errors import UserError
from jaxgen.options import Component, Fields, Named, NamedTexts, OneOf, PartialFields, Rule, Section


def steps(x, *, steps: Annotated[int, '[0, inf)'] = 0, clip: bool = True):
    """Args:
    x: not an option.
    steps: levels that are visited,
      0: all.
    clip: estimates.
    """


def ddim(x, *, eta: Annotated[float, '[0, 1]'] = 0.0):
    """Args:
    eta: randomness.
    """


def heun(x, *, churn: float = 0.0, eta: Annotated[float, '[0, 2]'] = 1.0, straight: bool = False):
    pass


class Net(nn.Module):
    """Attributes:
    width: of every layer, a: b.
    sizes, kernels: of each level.
    """

    width: Annotated[int, Rule(lambda w: w % 2 == 0, 'even')] = 8
    sizes: Annotated[tuple[int, ...], '[1, inf)'] = (1, 2)
    kernels: tuple[int, ...] = (3,)
    classes: int = 0


class Deep(Net):
    depth: Annotated[int, '[1, 9]'] = 2


NETWORKS = {'net': Net, 'deep': Deep, 'none': None}
SAMPLERS = {'ddim': ddim, 'heun': functools.partial(heun, straight=True)}
NETWORK = Component(NETWORKS, omit=('classes',))


def build(
    context,
    *,
    norm: Annotated[str, OneOf('batch', 'layer')] = 'batch',
    rate: Annotated[float | None, '(0, 1)'] = None,
    network: Annotated[Section, NETWORK] = 'net',
    sampler: Annotated[Section, Component(SAMPLERS, steps)] = {'name': 'ddim', 'steps': 7},
    conditions: Annotated[Section, Named(Component(SAMPLERS, key='kind'), {'label': 'ddim'})] = {},
    inner: Annotated[Section, Fields(steps)] = {},
    some: Annotated[dict, PartialFields(steps, omit=('clip',))] = {},
    runs: Annotated[dict, NamedTexts('a directory')] = {},
):
    """Args:
    norm: of the layers.
    """
    return norm


def refused(**given) -> str:
    with pytest.raises(UserError) as e:
        options.complete(build, given, 'model')
    return str(e.value)


def test_defaults_are_those_of_the_named_components():
    assert options.complete(build, {}, 'model') == {
        'norm': 'batch',
        'rate': None,
        'network': {'name': 'net', 'width': 8, 'sizes': (1, 2), 'kernels': (3,)},
        'sampler': {'name': 'ddim', 'steps': 7, 'clip': True, 'eta': 0.0},
        'conditions': {},
        'inner': {'steps': 0, 'clip': True},
        'some': {},
        'runs': {},
    }


def test_another_component_has_its_own_fields():
    full = options.complete(build, {'network': 'deep', 'sampler': {'name': 'heun', 'churn': 3}}, 'model')
    assert full['network'] == {'name': 'deep', 'width': 8, 'sizes': (1, 2), 'kernels': (3,), 'depth': 2}
    assert full['sampler'] == {'name': 'heun', 'steps': 0, 'clip': True, 'churn': 3.0, 'eta': 1.0}
    assert options.complete(build, {'network': 'none'}, 'model')['network'] == {'name': 'none'}
    given = {'conditions': {'label': {'eta': 1}, 'other': 'heun'}}
    assert options.complete(build, given, 'model')['conditions'] == {
        'label': {'kind': 'ddim', 'eta': 1.0},
        'other': {'kind': 'heun', 'churn': 0.0, 'eta': 1.0},
    }


@pytest.mark.parametrize(
    'given, message',
    [
        (dict(norm='group'), "config.model.norm must be one of ('batch', 'layer'); it is 'group'"),
        (dict(norm=3), 'config.model.norm must be str'),
        (dict(rate=1.0), 'config.model.rate must be in (0, 1); it is 1.0'),
        (dict(nrm='batch'), 'config.model.nrm: no such field; did you mean norm'),
        (dict(sampler={'churn': 1.0}), 'config.model.sampler.churn: no such field'),
        (dict(sampler='euler'), "config.model.sampler.name must be one of ('ddim', 'heun'); it is 'euler'"),
        (dict(sampler={'name': 'heun', 'straight': False}), 'config.model.sampler.straight: no such field'),
        (dict(sampler={'name': 'heun', 'eta': 3}), 'config.model.sampler.eta must be in [0, 2]; it is 3.0'),
        (dict(sampler={'steps': -1}), 'config.model.sampler.steps must be 0 or more; it is -1'),
        (dict(sampler=3), 'config.model.sampler is a section'),
        (dict(network={'width': 3}), 'config.model.network.width must be even; it is 3'),
        (dict(network={'sizes': (1, 0)}), 'config.model.network.sizes must be 1 or more; it is 0'),
        (dict(network={'classes': 3}), 'config.model.network.classes: no such field'),
        (dict(network={'name': 'none', 'width': 2}), 'this section has none'),
        (dict(conditions={'mask': {}}), 'config.model.conditions.mask.kind is missing'),
        (dict(inner={'clip': 1}), 'config.model.inner.clip must be bool'),
        (dict(conditions={'a b': 'ddim'}), 'config.model.conditions: a name is made of letters'),
        (dict(some={'a': {'steps': -1}}), 'config.model.some.a.steps must be 0 or more; it is -1'),
        (dict(some={'a': {'clip': True}}), 'config.model.some.a.clip: no such field'),
        (dict(some={'a': 3}), 'config.model.some.a is a section with fields: steps'),
        (dict(some=3), 'config.model.some is a section: write config.model.some.NAME = ...'),
        (dict(runs={'a.b': 'x'}), 'config.model.runs: a name is made of letters'),
        (dict(runs={'a': ''}), 'config.model.runs.a must be a directory; it is empty'),
        (dict(runs={'a': 3}), 'config.model.runs.a must be str'),
    ],
)
def test_mistakes_are_one_line(given, message):
    assert message in refused(**given) and '\n' not in refused(**given)


def test_partial_sections_have_what_is_given_alone():
    given = {'some': {'a': {'steps': 2}, 'b': {}}, 'runs': {'first': 'x'}}
    full = options.complete(build, given, 'model')
    assert full['some'] == given['some'] and full['runs'] == given['runs']


def test_attributes_of_dataclasses_are_fields():
    """But for a network's `parent` and `name`, which flax adds; a path '' is the config itself."""

    @dataclasses.dataclass
    class Section:
        name: Annotated[str, OneOf('a', 'b')] = 'a'
        table: dict = dataclasses.field(default_factory=dict)

    assert list(options.fields(Section)) == ['name', 'table']
    assert list(options.fields(Net)) == ['width', 'sizes', 'kernels', 'classes']
    with pytest.raises(UserError, match=r'^config\.name must be one of'):
        options.complete(Section, {'name': 'c'}, '')
    with pytest.raises(UserError, match=r'^config\.nam: no such field; did you mean name'):
        options.complete(Section, {'nam': 'c'}, '')


def test_fields_of_a_network_are_a_section_without_what_is_given():
    def built(*, network: Annotated[Section, Fields(Deep, ('classes',))] = {}):
        pass

    assert options.complete(built, {'network': {'depth': 3}}, 'model')['network'] == {
        'width': 8, 'sizes': (1, 2), 'kernels': (3,), 'depth': 3,
    }  # fmt: skip
    with pytest.raises(UserError, match=r'config\.model\.network\.classes: no such field'):
        options.complete(built, {'network': {'classes': 3}}, 'model')
    lines = options.describe(built, options.complete(built, {}, 'model'), 'model')
    assert [d.path for d in lines] == [f'model.network.{k}' for k in ('width', 'sizes', 'kernels', 'depth')]
    full = {'network': {'depth': 3}}
    assert options.update(built, full, {'network': {'width': 4}})['network'] == {'depth': 3, 'width': 4}


def test_checked_completes_what_the_function_gets():
    @options.checked
    def built(context, *, sampler: Annotated[Section, Component(SAMPLERS)] = 'ddim', width: options.Count = 3):
        return context, sampler, width

    assert built('c', sampler='heun') == ('c', {'name': 'heun', 'churn': 0.0, 'eta': 1.0}, 3)
    with pytest.raises(UserError, match=re.escape('config.model.width must be 1 or more; it is 0')):
        built('c', width=0)
    assert list(options.fields(built)) == ['sampler', 'width']


def test_updates_of_sections():
    base = {'sampler': {'name': 'ddim', 'steps': 9, 'eta': 1.0}, 'network': {'width': 4}}
    assert options.update(build, base, {'sampler': {'steps': 3}})['sampler'] == {'name': 'ddim', 'steps': 3, 'eta': 1.0}
    # What was set stays where the new component has it: eta of 1 is heun's too.
    assert options.update(build, base, {'sampler': 'heun'})['sampler'] == {'name': 'heun', 'steps': 9, 'eta': 1.0}
    assert options.update(build, base, {'network': {'name': 'none'}})['network'] == {'name': 'none'}
    # What was not is the new component's own.
    full = options.complete(build, {}, 'model')
    assert options.update(build, full, {'sampler': {'name': 'heun', 'churn': 1}})['sampler'] == {
        'name': 'heun',
        'steps': 7,
        'churn': 1,
    }
    labelled = options.update(build, {}, {'conditions': {'label': {'eta': 0.5}}})
    assert options.update(build, labelled, {'conditions': {'other': 'heun'}})['conditions'] == {
        'label': {'kind': 'ddim', 'eta': 0.5},
        'other': {'kind': 'heun'},
    }


def test_description_has_every_field_with_its_meaning():
    given = {'network': 'deep', 'some': {'a': {'steps': 2}}, 'runs': {'first': 'x'}}
    full = options.complete(build, given, 'model')
    lines = {d.path: d for d in options.describe(build, full, 'model')}
    assert lines['model.norm'] == ('model.norm', 'str', 'batch', "one of 'batch', 'layer'", 'of the layers.')
    assert lines['model.sampler.steps'].meaning == 'levels that are visited, 0: all.'
    assert lines['model.sampler.steps'][2:4] == (7, '0 or more')
    assert lines['model.sampler.name'].allowed == 'one of ddim, heun'
    assert lines['model.network.width'][2:] == (8, 'even', 'of every layer, a: b.')
    assert lines['model.network.kernels'].meaning == 'of each level.'
    assert lines['model.network.sizes'].type == 'tuple of int'
    assert lines['model.network.depth'].allowed == 'in [1, 9]'
    assert lines['model.rate'].type == 'number or None'
    assert 'model.sampler.churn' not in lines
    assert lines['model.some.a.steps'].meaning == 'levels that are visited, 0: all.'
    assert lines['model.some'].allowed == 'NAME: fields steps' and 'model.some.a.clip' not in lines
    assert lines['model.runs.first'] == ('model.runs.first', 'str', '', '', 'a directory')


@pytest.mark.parametrize(
    ('kind', 'good', 'bad'),
    [(float, (1, 0.5), ('x',)), (float, (), (True,)), (int, (1,), (1.5,)), (str, ('label',), (1,))],
)
def test_entries_of_a_tuple_that_is_empty_by_default(kind, good, bad):
    """The annotation says their type where there is no default entry to compare with."""

    def build(*, scales: tuple[kind, ...] = ()):
        pass

    build.__annotations__['scales'] = tuple[kind, ...]
    assert options.complete(build, {'scales': list(good)}, 'model') == {'scales': good}
    with pytest.raises(UserError, match=rf'config\.model\.scales must be a tuple of {kind.__name__}; it is'):
        options.complete(build, {'scales': bad}, 'model')
