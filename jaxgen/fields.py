"""Every field of a config as text: its value, type, default, allowed values and meaning. Nothing is computed."""

from __future__ import annotations

import shutil
import textwrap

from jaxgen import config as configs
from jaxgen import options
from jaxgen.sections import Config

WIDEST = 120  # columns, however wide the terminal
LEAST = 34  # columns of the last part of a line


def describe(config) -> list[options.Described]:
    """All fields of a complete config, those of the family's model in the place of 'model'."""
    sections = config.to_dict()
    shared = options.describe(Config, {**sections, 'model': {}}, '')
    shared[0] = shared[0]._replace(default=sections['family'], allowed='one of ' + ', '.join(configs.families()))
    model = options.describe(configs.builder(sections['family']), sections['model'], 'model')
    first = [line.path for line in shared].index('stages')
    return [*shared[:first], *model, *shared[first:]]


def text(config, width: int = 0) -> str:
    """The fields in three columns: name, value, and the meaning with type, allowed values and default.

    Args:
      width: of the text; 0 is the terminal's.
    """
    width = width or min(shutil.get_terminal_size((WIDEST, 0)).columns, WIDEST)
    sections, out = config.to_dict(), []
    heading = ''
    for line in describe(config):
        section = line.path.partition('.')[0]
        if section != heading:
            out.append('')
        heading = section
        out += row(line, shown(sections, line), width)
    head = 'Fields of this config: name, value, meaning (type, allowed values; default where it differs). Set one by '
    return '\n'.join([*textwrap.wrap(head + '--config.NAME=VALUE.', width), *out])


def shown(sections: dict, line: options.Described) -> str:
    """A field's value; of a section by names of a person's choice, the names."""
    value = configs.get(sections, line.path)
    return ', '.join(value) or '{}' if isinstance(value, dict) else options.shown(value, 1000)


def row(line: options.Described, value: str, width: int) -> list[str]:
    """The lines of one field. Names and values that are too long for their columns push the rest to the next line."""
    kind = f'{line.type}, {line.allowed}' if line.allowed else line.type
    default = options.shown(line.default, 1000)
    note = kind if value == default else f'{kind}; default {default}'
    first = max(min(28, (width - LEAST) * 3 // 5), 1)
    second = max(min(16, width - LEAST - first), 1)
    start = first + second
    names, values = line.path.ljust(first - 1) + ' ', value.ljust(second - 1) + ' '
    rest = textwrap.wrap(f'{line.meaning.rstrip(".")} ({note})', max(width - start, LEAST))
    if len(names) + len(values) <= start:
        return [names + values + rest[0], *(' ' * start + part for part in rest[1:])]
    return [*textwrap.wrap(names + values, width, subsequent_indent='  '), *(' ' * start + part for part in rest)]
