"""What a run directory says: the config and the spec of its data, and whether a use of it fits."""

from __future__ import annotations

import glob
import os
from collections.abc import Set

from ml_collections import ConfigDict

from jaxgen import config as configs
from jaxgen import data, files, origin
from jaxgen.errors import UserError
from jaxgen.sections import sides
from jaxgen.text import tokenizers

TOKENIZER = 'tokenizer'  # folder in a run's directory


def saved_config(workdir: str) -> ConfigDict:
    """The config that the run in `workdir` was trained with.

    Raises:
      UserError: there is no run.
    """
    files.check_local(workdir, 'workdir')
    workdir = os.path.expanduser(workdir)
    path = os.path.join(workdir, 'config.json')
    if not os.path.isfile(path):
        check_no_archive(workdir)
        if below := sorted(glob.glob(os.path.join(glob.escape(workdir), '*', 'config.json'))):
            runs = ', '.join(os.path.dirname(file) for file in below[:8])
            raise UserError(f'no run in {workdir}; below it there are {runs}{", ..." if len(below) > 8 else ""}')
        raise UserError(f'no run in {workdir}: train one first, or give its --workdir')
    origin.name_modules(workdir)
    return configs.read_json(path)


def check_no_archive(workdir: str) -> None:
    """Raises UserError where a run's archive is named in place of its directory."""
    unpack = {'.zip': 'python -m zipfile -e', '.tar': 'tar -xf', '.tar.gz': 'tar -xf', '.tgz': 'tar -xf'}
    command = next((c for ending, c in unpack.items() if workdir.endswith(ending)), '')
    if command and os.path.isfile(workdir):
        into = ' FOLDER' if 'zipfile' in command else ' -C FOLDER'
        raise UserError(f'{workdir} is an archive: unpack it, {command} {workdir}{into}, and name the run in FOLDER')


def save_config(workdir: str, config: ConfigDict, spec: data.Spec) -> None:
    """Writes the files by which a run is used without its data, from any directory: config.json, with absolute paths;
    data.json, the spec of an example; origin.json, see origin.py."""
    config = configs.complete(config.to_dict())
    files.save_json(os.path.join(workdir, 'config.json'), config.to_dict())
    files.save_json(os.path.join(workdir, 'data.json'), data.spec_to_json(spec))
    origin.sign(workdir, config)


def saved_spec(workdir: str) -> data.Spec | None:
    """The spec of the training data, as `save_config` wrote it; None: the run has none.

    Raises:
      UserError: the file is damaged.
    """
    path = os.path.join(workdir, 'data.json')
    if not os.path.exists(path):
        return None
    return configs.parse_json(path, data.spec_from_json, 'leave it away where the data are there')


def saved_tokenizer(workdir: str) -> tokenizers.Tokenizer | None:
    """The run's own tokenizer; None: it has none.

    Raises:
      UserError: it is damaged.
    """
    folder = os.path.join(os.path.expanduser(workdir), TOKENIZER)
    return tokenizers.from_folder(folder) if os.path.isdir(folder) else None


def used_config(workdir: str, saved: ConfigDict, config: ConfigDict | dict | None, named: Set[str]):
    """(config, unnamed): the config that a run is used with, and paths in it that are not to be read; see `load`.

    A stage lies where the person says, or else where `origin.stage` finds it. Where prepared data lie is a question of
    the machine, so a stranger's run does not say it.
    """
    if isinstance(config, dict):
        named, sections = configs.flat(config).keys(), configs.update_sections(saved.to_dict(), config)
    else:
        sections = (saved if config is None else config).to_dict()
    used = configs.complete(sections)
    for name, path in used.stages.items():
        if f'stages.{name}' not in named and path == saved.stages.get(name):
            used.stages[name] = origin.stage(workdir, saved, name)
    unnamed = origin.unnamed(workdir, saved, used, named)
    origin.check_named(unnamed, *(f'stages.{name}' for name in used.stages))
    for field in configs.MACHINE:
        if unnamed.pop(field, ''):
            used.data[field.removeprefix('data.')] = ''
    return used, unnamed


def read(workdir: str, config: ConfigDict | dict | None = None, named: Set[str] = frozenset()):
    """(config, spec, unnamed): what a run is to be used with, no weights; arguments and errors as those of `load`."""
    saved = saved_config(workdir)
    origin.check_layout(workdir, everything=not origin.is_own(workdir, saved))
    used, unnamed = used_config(workdir, saved, config, named)
    spec = saved_spec(workdir)
    if spec is None:  # the data are read for it
        origin.check_named(unnamed, *configs.DATA_PATHS)
    elif sides(used.data.size) != sides(saved.data.size):
        spec = data.resized(spec, used.data.size)
    return used, spec, unnamed


def check_system(workdir: str, saved: ConfigDict, path: str) -> None:
    """Raises UserError where the config file `path` is of another system than the run in `workdir`, whose own config is
    read."""
    given = configs.load(path)
    if given.family != saved.family or set(given.model) != set(saved.model):
        raise UserError(
            f'--config={path} is of another system than the run in {workdir} (a {saved.family}), whose own config is '
            'read: leave --config out'
        )
    different = [d for d in configs.differences(saved, given) if d.startswith(('model.', 'data.size', 'stages.'))]
    if different:
        raise UserError(
            f'--config={path} is not what the run in {workdir} was trained with, and the own config of a run is read '
            f'({"; ".join(different)[:300]}): leave --config out'
        )


def check_use(workdir: str, saved: ConfigDict, config: ConfigDict, free: tuple[str, ...]) -> None:
    """Raises UserError where a config says of a trained run that it is another one."""
    different = configs.differences_that_matter(saved, config, free, use=True)
    if different:
        raise UserError(
            f'{workdir} was trained with another config: {"; ".join(different)}; only what training does not depend on '
            'may be changed'
        )


def check_moved_data(
    about: dict, config: ConfigDict, workdir: str, moved: list[str], test_source: str | None = None
) -> None:
    """Raises UserError where config.data names another folder than before, and its images are others.

    Args:
      test_source: that of the training, where it may be another now. It decides whether a part of data.source is held
        out, and so which images are the training split.
    """
    fields = [field for field in moved if field.startswith('data.')]
    if test_source is not None and test_source != config.data.test_source:
        fields = ['data.test_source', *fields]
    if fields and about.get('data') != data.dataset(config.data, 'train').identity:
        what = 'its images' if fields[0] in ('data.source', 'data.other') else 'with it the training images'
        raise UserError(
            f'config.{fields[0]} = {configs.get(config, fields[0])}: {what} are not those that {workdir} was trained '
            'on; put it back, or give another --workdir'
        )


def is_read_alone(config: ConfigDict, name: str, path: str) -> bool:
    """Whether nothing of the stages of the run in `path` is read where it is the stage `name` of this config's run: an
    adapter, whose base may be this run itself. The family's module says it by `reads_alone`, of the saved config."""
    reads_alone = getattr(configs.module(config.family), 'reads_alone', None)
    return bool(reads_alone and reads_alone(name, saved_config(path)))


def check_cycle(workdir: str, config: ConfigDict, above: tuple[str, ...] = (), untrained: bool = False) -> None:
    """Raises UserError where a run is a stage of itself, also by way of others. Reads configs alone.

    untrained: a stage that is not there yet has the config of its name, as in abstract_stage.
    """
    here = (*above, os.path.realpath(workdir))
    for name, path in config.stages.items():
        if os.path.realpath(path) in here:
            raise UserError(f'config.stages.{name}: {path} is a stage of itself; name the run of an earlier stage')
        if os.path.isfile(os.path.join(path, 'config.json')):
            if is_read_alone(config, name, path):
                continue
            check_cycle(path, read(path)[0], here, untrained)
        elif untrained and configs.named(path):
            check_cycle(path, configs.load(configs.named(path)), here, untrained)
