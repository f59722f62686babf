"""The origin of a run: whether it was trained by the person who uses it. Only then are the paths in it trusted.

A run directory is data. Its config names paths outside of it: a folder of images, earlier stages, a feature network.
The person who trained the run named these, so training signs them with the person's own secret
(`~/.config/jaxgen/key`), and the signature moves with the run. In a run with another signature, or none, such a path is
used only where the person names it on the command line or in the call. Likewise the modules that it names
(imports.py), of a family or a network outside of jaxgen.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import stat
import uuid
from collections.abc import Set

from jaxgen import config as configs
from jaxgen import files, imports
from jaxgen.errors import UserError

NAME = 'origin.json'
LONGEST = 2**16  # characters of it that are read
# The entries of a run's directory. Through links there, files outside of it would be read and written.
OWN = (
    *('config.json', NAME, 'data.json', 'lock', 'metrics.jsonl', 'checkpoints', 'digests', 'damaged', 'samples'),
    *('data', 'explore', 'evaluation', 'evaluation.json', 'best.json', 'weights.json', 'results', 'tensorboard'),
    *('profile', 'stages'),
)


def secret(create: bool = False) -> bytes:
    """The person's key, b'' where there is none and none can be stored."""
    folder = os.path.join(os.environ.get('XDG_CONFIG_HOME') or os.path.expanduser('~/.config'), 'jaxgen')
    path = os.path.join(folder, 'key')
    with contextlib.suppress(OSError):
        if create and not os.path.exists(path):
            os.makedirs(folder, exist_ok=True)
            new = f'{path}.{uuid.uuid4().hex}'
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), 'wb') as file:
                file.write(secrets.token_bytes(32))
            with contextlib.suppress(FileExistsError):
                os.link(new, path)  # whole or not at all, and never over another
            os.remove(new)
        with open(path, 'rb') as file:
            return file.read(64)
    return b''


def signature(config, key: bytes, relative: dict[str, str] | None = None) -> str:
    """HMAC-SHA256, in hexadecimal digits, of the paths and modules that a config names, and of those of its stages that
    are relative to the run, where these are given."""
    sections = config.to_dict() if hasattr(config, 'to_dict') else config
    named: dict = configs.paths(sections)
    modules = imports.of_sections(sections)
    more = ({} if relative is None else {'stages': relative}) | ({'modules': modules} if modules else {})
    text = json.dumps({'paths': named, **more} if more else named, sort_keys=True)
    return hmac.new(key, text.encode('utf-8', 'surrogateescape'), hashlib.sha256).hexdigest()


def sign(workdir: str, config) -> None:
    """Writes this person's signature of a run's paths into its directory, and where its stages lie from there."""
    key = secret(create=True)
    if key:
        run = os.path.realpath(workdir)
        relative = {name: os.path.relpath(os.path.realpath(path), run) for name, path in config.stages.items()}
        signed: dict = {'paths': signature(config, key)}
        if relative:
            signed |= {'stages': relative, 'stages_signature': signature(config, key, relative)}
        files.save_json(os.path.join(workdir, NAME), signed)


def read(workdir: str) -> dict:
    """What `sign` has written, or anything else that lies there; {} where it is no JSON object."""
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe must not block
        with open(os.open(os.path.join(workdir, NAME), flags), encoding='utf-8') as file:
            signed = json.loads(file.read(LONGEST))
    except (OSError, ValueError, RecursionError):
        return {}
    return signed if isinstance(signed, dict) else {}


def is_signature(text, *of) -> bool:
    """Whether a text is this person's signature of the arguments of `signature` but the key."""
    key = secret()
    try:
        return bool(key) and hmac.compare_digest(text, signature(of[0], key, *of[1:]))
    except (TypeError, KeyError, AttributeError, ValueError, RecursionError):  # of what is no config, either
        return False


def is_own(workdir: str, config) -> bool:
    """Whether a run has this person's signature of these paths."""
    return is_signature(read(workdir).get('paths'), config)


def stage(workdir: str, config, name: str) -> str:
    """Where a stage of a run lies, which may have been moved, if nobody names another place: in RUN/stages/NAME, which
    is the run's own; in a run of this person at its place relative to the run, or beside the run under its name; where
    it lay in training."""
    path, signed = config.stages[name], read(workdir)
    places = [os.path.join(workdir, 'stages', name)]
    if is_signature(signed.get('paths'), config):
        relative: dict = signed.get('stages') or {}
        if is_signature(signed.get('stages_signature'), config, relative) and name in relative:
            places.append(os.path.join(os.path.realpath(workdir), relative[name]))
        if not os.path.isdir(path):
            places.append(os.path.join(os.path.dirname(os.path.realpath(workdir)), os.path.basename(path)))
    existing = (place for place in places if os.path.isfile(os.path.join(place, 'config.json')))
    return files.absolute(next(existing, path))


def name_modules(workdir: str) -> None:
    """Lets the modules that a run's config.json names be imported, where it is this person's own; see imports.py."""

    def parse(sections) -> None:
        if imports.of_sections(sections) and is_own(workdir, sections):
            imports.name_those_of(sections)

    configs.parse_json(os.path.join(workdir, 'config.json'), parse, 'put back the config of this run')


def outside(workdir: str, path: str) -> bool:
    """Whether a path, its links resolved, lies outside of the run's directory."""
    run = os.path.realpath(workdir)
    return os.path.commonpath([run, os.path.realpath(path)]) != run


def unnamed(workdir: str, saved, config, named: Set[str]) -> dict[str, str]:
    """{field: path} of the paths outside of a run that only the run itself names.

    Args:
      saved: the run's own config.
      config: the config in use, in which the person named the fields `named`.
    """
    if is_own(workdir, saved):
        return {}
    theirs = configs.paths(saved).items() & configs.paths(config).items()

    def is_named(field: str) -> bool:
        return any(field == one or field.startswith(f'{one}.') for one in named)

    return {field: path for field, path in theirs if not is_named(field) and outside(workdir, path)}


def check_named(unnamed: dict[str, str], *fields: str) -> None:
    """Raises UserError where one of these fields is among the `unnamed`."""
    for field in fields:
        if field in unnamed:
            raise UserError(
                f'config.{field} names {unnamed[field]}, which lies outside of the run, and the run was not trained '
                f'here: name it yourself, --config.{field}=...'
            )


def check_layout(workdir: str, everything: bool = False, deep: bool = True) -> None:
    """Raises UserError where a link, a pipe or a device stands in for a file of the run.

    The run's directory may be a link itself: the person named it.

    Args:
      everything: check all files in the directory, not only those that a run writes. The config of a stranger's run may
        name images or a prepared data set among them.
      deep: check what lies in folders too. Checkpoints do not need it: their digests refuse links and pipes, and a
        checkpoint with one is damaged, where the one before it is not.
    """

    def check(path: str) -> None:
        mode = os.lstat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            what = f'a link to {os.readlink(path)}' if stat.S_ISLNK(mode) else 'no regular file'
            raise UserError(f'{path} is {what}: the files of a run must lie in its own directory')

    for name in os.listdir(workdir) if everything else OWN:
        top = os.path.join(workdir, name)
        if not os.path.lexists(top):
            continue
        check(top)
        for folder, folders, names in os.walk(top) if deep else ():
            for one in (*folders, *names):
                with contextlib.suppress(FileNotFoundError):  # a concurrent training removes old checkpoints
                    check(os.path.join(folder, one))
