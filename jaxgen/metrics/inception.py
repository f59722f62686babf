"""The published weights of the Inception network whose features FID compares: read, converted once, recognised.

The network is jaxgen/networks/inception.py. Other weights give other distances, which are not FID.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import hmac
import os
import uuid

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxgen import log, origin
from jaxgen.errors import UserError
from jaxgen.networks.inception import Inception
from jaxgen.weights import mapping
from jaxgen.weights.features import INCEPTION, INCEPTION_SKIP
from jaxgen.weights.files import open_weights

Array = jax.Array

# The graph's weights as torch-fidelity publishes them. pytorch-fid publishes the same file.
PUBLISHED = {
    'url': 'https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/'
    'weights-inception-2015-12-05-6726825d.pth',
    'sha256': '6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2',
}


@functools.cache
def shapes() -> dict[str, tuple[int, ...]]:
    """{path: shape} of the network's variables, like 'params/Mixed_5b.branch1x1/conv/kernel'."""
    image = jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32)
    tree = jax.eval_shape(Inception().init, jax.random.key(0), image)
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep='/').items()}


def load(path: str, cache: str) -> tuple[str, dict]:
    """Reads the network's weights from a person's file, which is converted once.

    Args:
      path: .pth or .pt as published (reading it takes torch), or .safetensors with the same names, or a file that
        was kept in `cache`.
      cache: folder that keeps the conversion as `inception-<SHA-256 of path>.safetensors`, under a seal by which this
        person's own ones are known.

    Returns:
      (name, variables): `variables` are numpy arrays for `Inception().apply`; `name`, for the names of metrics, is
      'inception' for the published weights, otherwise it has 8 digits of the file's SHA-256.

    Raises:
      UserError: there is no such file, or it holds something else.
    """
    advice = f'download {PUBLISHED["url"]} (SHA-256 {PUBLISHED["sha256"]}) and give it as --inception=PATH'
    if not path:
        raise UserError(f'these metrics need the weights of the Inception network: {advice}')
    try:
        with open(path, 'rb') as file:
            sha256 = hashlib.file_digest(file, 'sha256').hexdigest()
    except OSError as e:
        raise UserError(f'the Inception weights {path} cannot be read ({e.strerror}): {advice}') from e
    kept = os.path.join(cache, f'inception-{sha256}.safetensors')
    converted = read_converted(path)
    if converted is None and os.path.isfile(kept):
        converted = read_converted(kept)
        if converted is None:
            log.say(f'WARNING: {kept} is damaged and is made again')
        elif converted[0] != sha256:  # not kept by this person
            converted = None
    if converted is None:
        converted = sha256, convert(path)
        keep(kept, *converted)
    source, variables = converted
    if source == PUBLISHED['sha256']:
        return 'inception', unflatten_dict(variables, sep='/')
    log.say(
        f'WARNING: {path} (SHA-256 {source}) is not the published weights of the Inception network: '
        f'metrics of its features are not FID and compare only among themselves'
    )
    return f'inception_{source[:8]}', unflatten_dict(variables, sep='/')


def read_converted(path: str) -> tuple[str, dict[str, np.ndarray]] | None:
    """(SHA-256, {path: array}) of a whole file of converted weights; None for any other.

    The SHA-256 is of the file that they were made from where this person's seal says so, otherwise of the arrays
    themselves: a file can claim any origin.
    """
    try:
        with safetensors.safe_open(path, 'numpy') as file:
            about = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()} if 'source' in about else {}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError):
        return None
    if {name: a.shape for name, a in arrays.items()} != shapes():
        return None
    (source, _, mark), digest, key = about['source'].partition(':'), arrays_digest(arrays), origin.secret()
    sealed = key and hmac.compare_digest(mark.encode(), seal(key, source, digest).encode())
    return (source if sealed else digest), arrays


def arrays_digest(arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 over names, types and values."""
    total = hashlib.sha256()
    for name, a in sorted(arrays.items()):
        total.update(f'{name} {a.dtype} {a.shape} '.encode())
        total.update(np.ascontiguousarray(a).tobytes())
    return total.hexdigest()


def seal(key: bytes, source: str, digest: str) -> str:
    """The holder of the key's signature that arrays of this digest were made from the file `source`."""
    return hmac.new(key, f'inception {source} {digest}'.encode(), hashlib.sha256).hexdigest()


def keep(path: str, source: str, arrays: dict[str, np.ndarray]) -> None:
    """Writes a conversion, whole or not at all. Other processes may do the same at the same time."""
    new = f'{path}.{uuid.uuid4().hex}'
    key = origin.secret(create=True)
    about = {'source': f'{source}:{seal(key, source, arrays_digest(arrays)) if key else ""}'}  # one entry: one order
    try:
        if os.path.islink(os.path.dirname(path)):
            raise OSError(f'{os.path.dirname(path)} is a link')
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        with open(new, 'xb') as file:
            file.write(safetensors.numpy.save(arrays, about))
        os.replace(new, path)
    except OSError as e:
        log.say(f'WARNING: the converted Inception weights could not be kept for the next time: {e}')
        with contextlib.suppress(OSError):
            os.remove(new)


def convert(path: str) -> dict[str, np.ndarray]:
    """{path: float32 array} of the network's variables from a file with torch's names and layout.

    Raises:
      UserError: it cannot be read, or holds other names or shapes.
    """
    try:
        tensors = open_weights(path, '--inception')
    except UserError as e:
        raise UserError(f'{e}; the weights are at {PUBLISHED["url"]}') from e
    entries = mapping.entries(INCEPTION, shapes())
    try:
        mapping.check(entries, tensors, INCEPTION_SKIP, path, 'the Inception network of FID')
    except UserError as e:
        classes = tensors.tensors.get('fc.weight')
        other = "; this is torchvision's network, another one" if classes and classes.shape == (1000, 2048) else ''
        raise UserError(f'{e}{other}; the weights are at {PUBLISHED["url"]}') from e
    return {entry.path: entry.read(tensors).astype(np.float32) for entry in entries}
