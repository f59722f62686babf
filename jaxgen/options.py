"""Options: what a field of a config may be, written where the field is declared.

A section of a config is the keyword signature of the function (or the attributes of the network) that reads it:

    def build(
        context: Context,
        *,
        width: Annotated[int, '[1, inf)'] = 128,
        dropout: Annotated[float, '[0, 1)'] = 0.0,
        norm: Annotated[str, OneOf('batch', 'layer')] = 'batch',
        kernel: Annotated[int, Rule(lambda k: k % 2 == 1, 'odd')] = 3,
        sampler: Annotated[Section, Component(SAMPLERS)] = 'ddim',
    ) -> Family:
        '''Args:
          width: features of every layer.
        ...

`complete` puts a person's fields over the defaults and checks each: its name, its type, its constraints. A `Component`
is a section of which one field, `name`, says whose fields the others are, so that no config holds a field that nobody
reads. `describe` lists the fields with types, defaults, allowed values and the meanings of the docstring.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import operator
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

from jaxgen import imports
from jaxgen.errors import UserError

LARGEST = 2**31 - 1  # of any integer: most of them become int32 on a device
LARGEST_FLOAT = 3.4028234e38  # of any other number: they become float32
Section = str | dict[str, Any]  # a component's name, or its fields

# --- constraints


class Range(NamedTuple):
    """Numbers in an interval, '[0, 1)': [ ] where an end belongs to it, ( ) where it does not. Of a tuple: each."""

    interval: str

    def check(self, field: str, value) -> None:
        for number in value if isinstance(value, tuple) else (value,):
            check_range(field, number, self.interval)

    def __str__(self) -> str:
        return within(self.interval)


class Choice(NamedTuple):
    """One of these values; of a tuple each entry. Written as OneOf('a', 'b')."""

    allowed: tuple

    def check(self, field: str, value) -> None:
        for one in value if isinstance(value, tuple) else (value,):
            check_choice(field, one, self.allowed)

    def __str__(self) -> str:
        return 'one of ' + ', '.join(map(repr, self.allowed))


def OneOf(*allowed) -> Choice:
    return Choice(allowed)


class Rule(NamedTuple):
    """Values of which `holds(value)` is true; `requirement` says which these are, after 'must be'."""

    holds: Callable[[Any], bool]
    requirement: str

    def check(self, field: str, value) -> None:
        if not self.holds(value):
            raise UserError(f'config.{field} must be {self.requirement}; it is {shown(value)}')

    def __str__(self) -> str:
        return self.requirement


class Traced(NamedTuple):
    """No constraint but a mark, written TRACED: the field is read in sampling alone, and only through
    `Family.settings`. A new value is another argument of a compiled program and needs no new one, unless it changes the
    structure of these settings."""


TRACED = Traced()

Count = Annotated[int, Range('[1, inf)')]
Fraction = Annotated[float, Range('[0, 1]')]
Rate = Annotated[float, Range('[0, 1)')]
Positive = Annotated[float, Range('(0, inf)')]
NonNegative = Annotated[float, Range('[0, inf)')]

# --- sections


@dataclasses.dataclass(frozen=True)
class Component:
    """A section with one field that names a function or network of `table`, and the fields which that one reads.

    Attributes:
      table: {name: function, network, or None for one without fields}.
      common: a function whose fields the section has besides, whatever the name.
      omit: attributes of networks that are not a person's to set.
      key: the field that holds the name.
    """

    table: Mapping[str, Any]
    common: Callable | None = None
    omit: tuple[str, ...] = ()
    key: str = 'name'

    def fields(self, name: str) -> dict[str, Field]:
        """{name: field} of the component's section, without the key."""
        common = fields(self.common) if self.common else {}
        return common | {k: f for k, f in fields(self.table[name]).items() if k not in self.omit}


@dataclasses.dataclass(frozen=True)
class Named:
    """A section of components by names of a person's choice: {name: section}.

    Attributes:
      usual: {name: component's name} of names that say by themselves which one it is.
    """

    component: Component
    usual: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Signature:
    """The keyword signature of `function`, or the attributes of a network.

    Attributes:
      omit: those that are not a person's to set.
    """

    function: Callable
    omit: tuple[str, ...] = ()

    def fields(self) -> dict[str, Field]:
        """{name: field} of all but the omitted ones."""
        return {k: f for k, f in fields(self.function).items() if k not in self.omit}


class Fields(Signature):
    """A section that is a signature."""


class PartialFields(Signature):
    """A section of sections by names of a person's choice, each with those of a signature's fields that differ."""


@dataclasses.dataclass(frozen=True)
class NamedTexts:
    """A section of texts by names of a person's choice, none of them empty.

    Attributes:
      meaning: of each text, 'the directory of a run'.
    """

    meaning: str


@dataclasses.dataclass(frozen=True)
class Follows:
    """A section whose fields are those of one function of a table, which the sections declared before it choose.

    Attributes:
      table: {name: function}.
      choose: {section declared before: its value} -> name.
    """

    table: Mapping[str, Any]
    choose: Callable[[dict[str, Any]], str]


AnySection = Component | Named | Fields | PartialFields | NamedTexts | Follows


class Field(NamedTuple):
    """One option of a section."""

    name: str
    type: Any
    default: Any
    constraints: tuple = ()
    meaning: str = ''
    section: AnySection | None = None
    traced: bool = False  # see Traced


@functools.cache
def fields(target: Callable | None) -> dict[str, Field]:
    """{name: Field} of a function's keyword-only arguments, or of a dataclass's attributes.

    Arguments that a functools.partial binds are not among them.
    """
    if target is None:
        return {}
    bound = target.keywords if isinstance(target, functools.partial) else {}
    function: Any = inspect.unwrap(target.func if isinstance(target, functools.partial) else target)
    if isinstance(function, type):
        defaults = dataclass_defaults(function)
        hints = {k: v for c in reversed(function.__mro__) for k, v in inspect.get_annotations(c).items()}
    else:
        parameters = inspect.signature(function).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in bound}
        hints = function.__annotations__
    owners = reversed(function.__mro__) if inspect.isclass(function) else (function,)
    meanings = {name: text for owner in owners for name, text in documented(owner).items()}
    out = {}
    for name, default in defaults.items():
        hint = hints.get(name, Any)
        hint = evaluated(hint, function) if isinstance(hint, str) else hint
        kind, *notes = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
        notes = [Range(note) if isinstance(note, str) else note for note in notes]
        section = next((n for n in notes if isinstance(n, AnySection)), None)
        rules = tuple(n for n in notes if n is not section and not isinstance(n, Traced))
        traced = any(isinstance(n, Traced) for n in notes)
        out[name] = Field(name, kind, default, rules, meanings.get(name, ''), section, traced)
    return out


def dataclass_defaults(function) -> dict[str, Any]:
    """{attribute: default} of those that have one; `parent` and `name` of a network are flax's own."""
    attributes = {f.name: f for f in dataclasses.fields(function)}
    if 'parent' in attributes:
        attributes = {k: f for k, f in attributes.items() if k not in ('parent', 'name')}
    defaults = {
        k: f.default if f.default_factory is dataclasses.MISSING else f.default_factory() for k, f in attributes.items()
    }
    return {k: v for k, v in defaults.items() if v is not dataclasses.MISSING}


def evaluated(hint: str, function) -> Any:
    """The type that an annotation of `function` stands for."""
    owners = function.__mro__ if inspect.isclass(function) else (function,)
    for owner in owners:
        try:
            return eval(hint, vars(sys.modules[owner.__module__]))
        except NameError:
            continue
    return Any


ENTRY = re.compile(r'^(\s*)(\w+(?:, \w+)*)(?: \([^)]*\))?: (.*)$')


@functools.cache
def documented(function: Callable) -> dict[str, str]:
    """{argument: meaning} by the docstring's 'Args:' or 'Attributes:'; 'a, b: ...' is of both."""
    lines = inspect.cleandoc(function.__doc__ or '').split('\n')
    starts = [i for i, line in enumerate(lines) if re.match(r'(Args|Attributes)\b.*:$', line.strip())]
    if not starts:
        return {}
    meanings: dict[str, str] = {}
    names: list[str] = []
    indent = None
    for line in lines[starts[0] + 1 :]:
        entry = ENTRY.match(line)
        if not line.strip() or (indent is not None and len(line) - len(line.lstrip()) < indent):
            if not line.strip():
                continue
            break
        if entry and (indent is None or len(entry[1]) == indent):
            indent, names = len(entry[1]), entry[2].split(', ')
            meanings |= dict.fromkeys(names, entry[3])
        else:
            meanings |= {name: f'{meanings[name]} {line.strip()}' for name in names}
    return meanings


def complete(target: Callable | None, given: dict, path: str) -> dict[str, Any]:
    """Every field of a function's section: the given values, checked, and defaults for the others.

    Raises:
      UserError: an unknown field, a wrong type, a value that a constraint refuses.
    """
    return completed(fields(target), given, path)


def completed(known: dict[str, Field], given: dict, path: str) -> dict[str, Any]:
    """`complete`, of these fields."""
    check_known(known, given, path)
    values: dict[str, Any] = {}
    for name, field in known.items():
        section = field.section
        if isinstance(section, Follows):
            field = field._replace(section=Fields(section.table[section.choose(values)]))
        values[name] = value_of(field, given.get(name, field.default), join(path, name))
    return values


def join(path: str, name: str) -> str:
    """'section.name', or the name alone at the root of the config, whose path is ''."""
    return f'{path}.{name}' if path else name


def check_known(known: dict[str, Field], given: dict, path: str) -> None:
    """Raises UserError where a given field is none of these."""
    for key in given:
        if not isinstance(key, str) or key not in known:
            hint = near(key, known) if known else '; this section has none'
            raise UserError(f'config.{" ".join(join(path, str(key)).split())[:200]}: no such field{hint}')


NAME = re.compile(r'[A-Za-z_]\w*')


def check_names(value, path: str) -> None:
    """Raises UserError where a value is no section by names of a person's choice."""
    if not isinstance(value, dict):
        raise UserError(f'config.{path} is a section: write config.{path}.NAME = ...; it is {shown(value)}')
    for name in value:
        if not (isinstance(name, str) and NAME.fullmatch(name)):
            raise UserError(f'config.{path}: a name is made of letters, digits and _; it is {shown(name)}')


def value_of(field: Field, value, path: str):
    """The checked value of one field, its section completed if it is one."""
    section = field.section
    if isinstance(section, Component):
        return component_section(section, field.default, value, path)
    if isinstance(section, Named):
        check_names(value, path)
        return {
            name: component_section(section.component, section.usual.get(name, ''), own, f'{path}.{name}')
            for name, own in value.items()
            if own is not None
        }
    if isinstance(section, PartialFields):
        check_names(value, path)
        return {name: partial_section(section, own, f'{path}.{name}') for name, own in value.items()}
    if isinstance(section, NamedTexts):
        check_names(value, path)
        return {name: named_text(section, text, f'{path}.{name}') for name, text in value.items()}
    if isinstance(section, Fields):
        return completed(section.fields(), as_section(value, '', path, section.fields()), path)
    if isinstance(field.default, dict):  # a table of defaults
        known = {k: Field(k, type(v), v) for k, v in field.default.items()}
        return completed(known, as_section(value, '', path, known), path)
    several = isinstance(field.type, types.UnionType) and field.default is not None
    if several:  # the rule says all that it may be
        value = tuple(value) if isinstance(value, list) else value
    else:
        value = coerce(path, value, field.default)
    if field.default == () and not any(isinstance(rule, Rule) for rule in field.constraints):
        check_entries(path, value, field.type)
    if value is not None or several:
        for rule in field.constraints:
            rule.check(path, value)
    return value


def check_entries(path: str, value: tuple, kind) -> None:
    """Raises UserError where entries of a tuple are not of the type that `kind`, tuple[float, ...], says."""
    entry: Any = next(iter(typing.get_args(kind)), None)
    takes = {int: (int,), float: (int, float), str: (str,)}.get(entry) if isinstance(entry, type) else None
    if takes and not all(type(one) in takes for one in value):
        raise UserError(f'config.{path} must be a tuple of {entry.__name__}; it is {shown(value)}')


def partial_section(section: PartialFields, value, path: str) -> dict[str, Any]:
    """The checked values of the fields that are given, and no others."""
    known = section.fields()
    given = as_section(value, '', path, known)
    check_known(known, given, path)
    return {name: value_of(known[name], own, f'{path}.{name}') for name, own in given.items()}


def named_text(section: NamedTexts, value, path: str) -> str:
    """The checked text."""
    text = coerce(path, value, '')
    if not text:
        raise UserError(f'config.{path} must be {section.meaning}; it is empty')
    return text


def as_section(value, key: str, path: str, known) -> dict:
    """A section's fields; a text names the component where there is a `key`."""
    if key and isinstance(value, str):
        return {key: value}
    if not isinstance(value, dict):
        raise UserError(f'config.{path} is a section with fields: {", ".join(known)}')
    return value


def own_fields(section: dict[str, Any], key: str = 'name') -> dict[str, Any]:
    """The fields of a component's section without the one that names the component."""
    return {k: v for k, v in section.items() if k != key}


def component_section(component: Component, default: Section, value, path: str) -> dict[str, Any]:
    """{key: name, ...} with every field of the named component."""
    key = component.key
    own = as_section(value, key, path, [key])
    usual = as_section(default, key, path, [key])
    name: Any = own.get(key, usual.get(key))
    if not name and not own.get(key):
        raise UserError(f'config.{path}.{key} is missing: one of {", ".join(component.table)}')
    if isinstance(component.table, imports.OwnToo) and imports.is_dotted(name):
        imports.load(name, f'{path}.{key}')
    else:
        check_choice(f'{path}.{key}', name, tuple(component.table))
    base = own_fields(usual, key) if name == usual.get(key) else {}
    given = base | own_fields(own, key)
    return {key: name, **completed(component.fields(name), given, path)}


def update(target: Callable, base: dict, over: dict) -> dict:
    """`base` with the fields of `over` put in, section by section.

    Where another component is named, what was set of the former one stays if the new one has a field of that name.
    """
    known = fields(target)
    out = updated(known, base, over)
    for name, field in known.items():
        if (
            isinstance(field.section, Follows)
            and name in base
            and chosen(known, name, base) != chosen(known, name, out)
        ):
            out[name] = over.get(name, {})
    return out


def chosen(known: dict[str, Field], name: str, values: dict) -> str:
    """Whose fields a section that follows others has; '' where these are wrong."""
    before = dict(list(known.items())[: list(known).index(name)])
    section: Any = known[name].section
    try:
        return section.choose(completed(before, {k: v for k, v in values.items() if k in before}, 'model'))
    except UserError:
        return ''


def updated(known: dict[str, Field], base: dict, over: dict) -> dict:
    """`update`, of these fields."""
    out = dict(base)
    for name, value in over.items():
        field, before = known.get(name), out.get(name)
        section = field.section if field else None
        if field and isinstance(section, Component):
            out[name] = updated_component(section, field.default, before, value)
        elif isinstance(section, Named) and isinstance(value, dict):
            mine = dict(before or {})
            for key, own in value.items():
                former = mine.pop(key, None)
                if own is not None:  # None takes the section away
                    mine[key] = updated_component(section.component, section.usual.get(key, ''), former, own)
            out[name] = mine
        elif isinstance(section, Fields) and isinstance(value, dict) and isinstance(before or {}, dict):
            out[name] = updated(section.fields(), before or {}, value)
        elif isinstance(value, dict) and isinstance(before, dict):
            out[name] = updated({}, before, value)
        else:
            out[name] = value
    return out


def updated_component(component: Component, default: Section, before, over):
    """The section `before` with `over` put in; either may be a name alone, and `before` None."""
    key = component.key
    base, more, usual = ({key: v} if isinstance(v, str) else v for v in (before or {}, over, default or {}))
    if not isinstance(base, dict) or not isinstance(more, dict):
        return over
    old: Any = base.get(key, usual.get(key))
    new: Any = more.get(key, old)
    if not all(isinstance(name, str) and name in component.table for name in (old, new)):
        return {**base, **more}
    known = component.fields(new)
    if new != old:
        former = component.fields(old)
        set_ones = {k: v for k, v in base.items() if k in former and v != former[k].default}
        base = {k: v for k, v in set_ones.items() if k in known}
    return {key: new, **updated(known, own_fields(base, key), own_fields(more, key))}


def checked(function: Callable) -> Callable:
    """The function, its keyword arguments completed and checked as the fields of `config.model` before it is called."""

    @functools.wraps(function)
    def call(*args, **given):
        return function(*args, **complete(function, given, 'model'))

    return call


def untraced(known: dict[str, Field], values: dict) -> dict[str, Any]:
    """The values of complete sections without those of traced fields."""
    out = {}
    for name, field in known.items():
        section, value = field.section, values[name]
        if isinstance(section, Component):
            own = untraced(section.fields(value[section.key]), own_fields(value, section.key))
            out[name] = {section.key: value[section.key], **own}
        elif isinstance(section, Fields):
            out[name] = untraced(section.fields(), value)
        elif isinstance(section, PartialFields):
            parts = {key: untraced({k: section.fields()[k] for k in own}, own) for key, own in value.items()}
            out[name] = {key: own for key, own in parts.items() if own}
        elif not field.traced:
            out[name] = value
    return out


class Described(NamedTuple):
    """One line of a section's description."""

    path: str
    type: str
    default: Any
    allowed: str
    meaning: str


def describe(target: Callable, values: dict, path: str) -> list[Described]:
    """The fields of a function's section, with those of the components that `values`, a complete section, names."""
    return described(fields(target), values, path)


def described(known: dict[str, Field], values: dict, path: str) -> list[Described]:
    """`describe`, of these fields."""
    out = []
    for name, field in known.items():
        where, section, value = join(path, name), field.section, values[name]
        if isinstance(section, Component):
            out += described_component(section, field.default, value, where, field.meaning)
        elif isinstance(section, Named):
            out.append(Described(where, 'sections', {}, f'NAME: {", ".join(section.component.table)}', field.meaning))
            for key, own in value.items():
                out += described_component(
                    section.component, section.usual.get(key, ''), own, f'{where}.{key}', field.meaning
                )
        elif isinstance(section, PartialFields):
            out.append(Described(where, 'sections', {}, f'NAME: fields {", ".join(section.fields())}', field.meaning))
            for key, own in value.items():
                out += described({k: f for k, f in section.fields().items() if k in own}, own, f'{where}.{key}')
        elif isinstance(section, NamedTexts):
            out.append(Described(where, 'texts', {}, f'NAME: {section.meaning}', field.meaning))
            out += [Described(f'{where}.{key}', 'str', '', '', section.meaning) for key in value]
        elif isinstance(section, Fields):
            out += described(section.fields(), value, where)
        elif isinstance(section, Follows):
            out += describe(section.table[section.choose(values)], value, where)
        elif isinstance(field.default, dict):
            out += described({k: Field(k, type(v), v) for k, v in field.default.items()}, value, where)
        else:
            rules = ' and '.join(map(str, field.constraints))
            out.append(Described(where, type_name(field), field.default, rules, field.meaning))
    return out


def described_component(component: Component, default: Section, value: dict, path: str, meaning: str):
    """The lines of one component's section."""
    key = component.key
    usual = {key: default} if isinstance(default, str) else default
    first = Described(f'{path}.{key}', 'str', usual.get(key, ''), names_of(component), meaning)
    known = component.fields(value[key])
    if value[key] == usual.get(key):  # the section's own defaults
        known = {k: f._replace(default=usual.get(k, f.default)) for k, f in known.items()}
    return [first, *described(known, value, path)]


def names_of(component: Component) -> str:
    """The allowed names of a component, in words."""
    own = ', or the dotted path of your own' if isinstance(component.table, imports.OwnToo) else ''
    return 'one of ' + ', '.join(component.table) + own


def type_name(field: Field) -> str:
    """'float', 'tuple of int', 'number or None'."""
    if field.default is None:
        return 'number or None'
    if isinstance(field.type, types.UnionType):
        kinds = typing.get_args(field.type)
        return ' or '.join(type_name(Field('', kind, () if typing.get_origin(kind) else kind())) for kind in kinds)
    if isinstance(field.default, tuple):
        inner = [a for a in typing.get_args(field.type) if a is not Ellipsis]
        names = {getattr(a, '__name__', str(a)) for a in inner} or {type(v).__name__ for v in field.default}
        return 'tuple of ' + ' or '.join(sorted(names)) if names else 'tuple'
    return type(field.default).__name__


# --- values


def near(key: str, known) -> str:
    """'; did you mean a or b?' for a misspelt key, or the known ones if nothing is near."""
    close = difflib.get_close_matches(str(key), list(known), n=3, cutoff=0.5)
    close.sort(key=lambda name: not str(key).startswith(name))  # 'lrate' means lr rather than plateau
    if close:
        return '; did you mean ' + ' or '.join(close) + '?'
    return '; known: ' + ', '.join(sorted(map(str, known)))


def shown(value, limit: int = 200) -> str:
    """A value as a message shows it: on one line, and not more of it than anybody reads."""
    try:
        text = ' '.join(repr(value).split())
    except Exception:  # integers of too many digits, or nested too deeply
        text = f'a very large {type(value).__name__}'
    return text if len(text) <= limit else text[:limit] + '...'


def is_text(value: str) -> bool:
    """Whether the system takes a text as a path."""
    try:
        return b'\0' not in os.fsencode(value)
    except UnicodeEncodeError:  # JSON can hold half of a pair of surrogates
        return False


def check_finite(path: str, value) -> None:
    """Raises UserError for NaN, infinity, an integer that no device holds, a text that no path can be, and what JSON
    does not hold."""
    if isinstance(value, float) and not abs(value) <= LARGEST_FLOAT:
        raise UserError(f'config.{path} must be a finite number, in float32; it is {value}')
    if isinstance(value, int) and abs(value) > LARGEST:
        raise UserError(f'config.{path} must be from {-LARGEST} to {LARGEST}; it is {shown(value)}')
    if isinstance(value, str) and not is_text(value):
        raise UserError(f'config.{path} must be a text without zero bytes or half characters; it is {shown(value)}')
    if isinstance(value, tuple):
        for one in value:
            check_finite(path, one)
    elif not isinstance(value, bool | int | float | str):
        raise UserError(f'config.{path} must be numbers or names; it holds {type(value).__name__} {shown(value)}')


def coerce(path: str, value, default):
    """Value as the default's type, or UserError; int goes for float, list for tuple."""
    if default is None:  # a number that the family chooses by its other fields where it is None
        if value is not None:
            if type(value) not in (int, float):
                raise UserError(f'config.{path} must be a number or None; it is {type(value).__name__} {shown(value)}')
            check_finite(path, value)
        return value
    if isinstance(default, bool) or isinstance(value, bool):
        fits = isinstance(value, bool) and isinstance(default, bool)
    elif isinstance(default, float) and isinstance(value, int):
        check_finite(path, value)
        return float(value)
    elif isinstance(default, tuple) and isinstance(value, list | tuple):
        if default and not all(
            type(v) is type(default[0]) or (isinstance(default[0], float) and type(v) is int) for v in value
        ):
            raise UserError(
                f'config.{path} must be a tuple of {type(default[0]).__name__}, '
                f'like {default!r}; it is {shown(tuple(value))}'
            )
        check_finite(path, tuple(value))
        return tuple(value)
    else:
        fits = type(value) is type(default)
    if not fits:
        raise UserError(
            f'config.{path} must be {type(default).__name__}, like {default!r}; it is {type(value).__name__} '
            f'{shown(value)}'
        )
    check_finite(path, value)
    return value


def check_integer(name: str, value, least: int) -> int:
    """The value as an int.

    Raises:
      UserError: it is none, is less than `least`, or takes more than 31 bits.
    """
    try:
        number = operator.index(value)
    except TypeError as e:
        raise UserError(f'{name} must be an integer; it is {shown(value)}') from e
    if isinstance(value, bool) or not least <= number <= LARGEST:
        raise UserError(f'{name} must be from {least} to {LARGEST}; it is {shown(value)}')
    return number


def check_weights_name(weights: str) -> None:
    """Raises UserError where --weights is neither ema nor params nor the width of an average."""
    try:
        fits = weights in ('ema', 'params') or 0 < float(weights) < 0.288
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise UserError(
            f'--weights must be ema, params or the width of an average, between 0 and 0.288; it is {weights!r}'
        )


def limits(interval: str) -> tuple[float, float, bool, bool]:
    """(lower, upper, whether the lower end belongs to it, whether the upper does) of '[0, 1)'."""
    low, high = (float(end) for end in interval[1:-1].split(','))
    return low, high, interval[0] == '[', interval[-1] == ']'


def within(interval: str) -> str:
    """An interval in words: '[0, inf)' is '0 or more'."""
    low, high, with_low, _ = limits(interval)
    return f'in {interval}' if high < math.inf else f'{low:g} or more' if with_low else f'more than {low:g}'


def check_range(field: str, value: float, interval: str) -> None:
    """Raises UserError where the value of a field does not lie in its interval."""
    low, high, with_low, with_high = limits(interval)
    if not ((low < value or (with_low and value == low)) and (value < high or (with_high and value == high))):
        raise UserError(f'config.{field} must be {within(interval)}; it is {shown(value)}')


def check_choice(field: str, value, allowed: tuple) -> None:
    """Raises UserError where the value of a field is none of these."""
    if value not in allowed:
        raise UserError(f'config.{field} must be one of {allowed}; it is {shown(value)}')
