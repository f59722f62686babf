"""Families and networks of a person's own, by dotted path: config.family = 'mypackage.myfamily'.

A module that is imported is a program that is run. So nothing is imported because a run's config.json names it: only
what the person has named in this process (in a config file, on the command line, in a call), or what a run names that
this person has signed (see origin.py).
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Mapping
from typing import Any

from jaxgen.errors import UserError

DOTTED = re.compile(r'[A-Za-z_]\w*(\.[A-Za-z_]\w*)+')

_named: set[str] = set()


def is_dotted(text) -> bool:
    """Whether a text is a path of modules, 'mypackage.myfamily'."""
    return isinstance(text, str) and len(text) < 1000 and bool(DOTTED.fullmatch(text))


def of_sections(sections) -> dict[str, str]:
    """{field: text} of all dotted paths in `family` and `model` of a config's sections: of some nothing is imported."""
    out: dict[str, str] = {}

    def visit(value, path: str) -> None:
        if isinstance(value, Mapping):
            for key, one in value.items():
                visit(one, f'{path}.{key}')
        elif is_dotted(value):
            out[path] = value

    for name in ('family', 'model'):
        visit(sections.get(name) if isinstance(sections, Mapping) else None, name)
    return out


def name(*paths: str) -> None:
    """Lets these paths be imported from here on: the person has named them."""
    _named.update(path for path in paths if is_dotted(path))


def name_those_of(sections) -> None:
    """Lets all dotted paths of a config's sections be imported from here on: the person has written them."""
    name(*of_sections(sections).values())


def load(path: str, field: str = '') -> Any:
    """The module, function or class of a dotted path.

    Args:
      field: of the config, that names it.

    Raises:
      UserError: the person has not named it, it lies in a run's directory, or cannot be imported.
    """
    where = f'config.{field}' if field else 'the config'
    if path not in _named:
        raise UserError(
            f'{where} names {path}, Python code that would be run, and the run was not trained here: where you know '
            f'it, name it yourself, --config.{field or "FIELD"}={path}'
        )
    check_place(path, where)
    above, _, last = path.rpartition('.')
    try:
        module = importlib.import_module(above)
        return getattr(module, last) if hasattr(module, last) else importlib.import_module(path)
    except ModuleNotFoundError as e:
        if e.name and (path == e.name or path.startswith(f'{e.name}.')):
            raise UserError(
                f'{where}: no module {e.name!r} for {path}: install its package, or put its folder on PYTHONPATH'
            ) from e
        raise UserError(f'{where}: {path} cannot be imported: {failure(e)}') from e
    except (Exception, SystemExit) as e:
        raise UserError(f'{where}: {path} cannot be imported: {failure(e)}') from e


def failure(e: BaseException) -> str:
    """What an import raised, and where, on one line."""
    frames = [
        f for f in traceback.extract_tb(e.__traceback__) if 'importlib' not in f.filename and f.filename != __file__
    ]
    at = f'{e.filename}:{e.lineno}' if isinstance(e, SyntaxError) else ''
    at = at or (f'{frames[-1].filename}:{frames[-1].lineno}' if frames else '')
    return ' '.join(f'{type(e).__name__}: {e}'.split())[:300] + (f' ({at})' if at else '')


def check_place(path: str, where: str) -> None:
    """Raises UserError where the package lies in the directory of a run, which somebody else may have made: Python
    looks for modules in the current directory first."""
    top = path.partition('.')[0]
    if top in sys.modules:
        file = getattr(sys.modules[top], '__file__', None)
        places = [file] if file else list(getattr(sys.modules[top], '__path__', []))
    else:
        try:
            spec = importlib.util.find_spec(top)  # of a top-level name this runs nothing
        except (ImportError, ValueError):
            spec = None
        if spec is None:
            return
        places = [spec.origin] if spec.has_location and spec.origin else list(spec.submodule_search_locations or [])
    for place in places:
        folder = os.path.realpath(place)
        while (above := os.path.dirname(folder)) != folder:
            folder = above
            if all(os.path.exists(os.path.join(folder, entry)) for entry in ('config.json', 'checkpoints')):
                raise UserError(
                    f'{where}: {top} would be imported from {place}, in the directory of a run, and a run is data: '
                    'work from another directory'
                )


def family(path: str) -> tuple[Any, Any]:
    """(module, build function) of a family's dotted path: of a module with `build`, or of the function itself.

    Raises:
      UserError: there is none.
    """
    if path.startswith('jaxgen.'):
        raise UserError(
            f'config.family: no family {path!r}: those of jaxgen have one word, {path.rpartition(".")[2]!r}'
        )
    target = load(path, 'family')
    if inspect.ismodule(target):
        module, build = target, getattr(target, 'build', None)
    else:
        module, build = sys.modules.get(getattr(target, '__module__', ''), target), target
    if not callable(build) or inspect.isclass(build):
        raise UserError(f'config.family: {path} has no function build(context, *, ...) -> Family')
    parameters = list(inspect.signature(build).parameters.values())
    required = [p.name for p in parameters[1:] if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if not parameters or required:
        raise UserError(
            f'config.family: {path} must be build(context, *, ...), and every option needs a default; '
            f'{required or "it takes no context"}'
        )
    return module, build


def path_of(target) -> str:
    """The dotted path of a module, a function or a class, by which a saved run finds it again.

    Raises:
      UserError: it has none: it was defined in a notebook, in the main program or in a function.
    """
    if inspect.ismodule(target):
        path = target.__name__
    else:
        path = f'{getattr(target, "__module__", "")}.{getattr(target, "__qualname__", "")}'
    if path.startswith('__main__') or not is_dotted(path):
        raise UserError(
            f'{getattr(target, "__name__", target)!s} is defined in a notebook, the main program or a function, where '
            'no saved run finds it again: put it into a module of its own, and import that'
        )
    _named.add(path)
    if load(path) is not target:
        raise UserError(f'{path} is another object than the one that was given: give what the module has')
    return path


class OwnToo(dict):
    """A table {name: network} whose names may also be dotted paths of a person's own ones."""

    def __contains__(self, key) -> bool:
        return super().__contains__(key) or is_dotted(key)

    def __missing__(self, key):
        if not is_dotted(key):
            raise KeyError(key)
        return load(key)
