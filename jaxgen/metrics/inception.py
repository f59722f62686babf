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

from jaxgen import log, origin, torch_file
from jaxgen.errors import UserError
from jaxgen.networks.inception import Inception

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


def torch_name(path: str) -> str:
    """'params/Mixed_5b.branch1x1/conv/kernel' to 'Mixed_5b.branch1x1.conv.weight'."""
    module, _, leaf = path.partition('/')[2].replace('/', '.').rpartition('.')
    leaf = {'kernel': 'weight', 'scale': 'weight', 'mean': 'running_mean', 'var': 'running_var'}.get(leaf, leaf)
    return f'{module}.{leaf}'


TO_TORCH = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}  # axes by rank: HWIO to OIHW


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
    tensors = {name: a for name, a in read(path).items() if not name.endswith('.num_batches_tracked')}
    expected = {torch_name(path): [shape[axis] for axis in TO_TORCH[len(shape)]] for path, shape in shapes().items()}
    actual = {name: list(a.shape) for name, a in tensors.items()}
    for name in sorted(expected.keys() | actual.keys()):
        if expected.get(name) != actual.get(name):
            other = ": this is torchvision's network, another one" if actual.get('fc.weight') == [1000, 2048] else ''
            raise UserError(
                f'{path} is not the weights of the Inception network of FID: {name} is {actual.get(name, "absent")} '
                f'there and {expected.get(name, "absent")} in the network{other}; the weights are at {PUBLISHED["url"]}'
            )

    def layout(a):
        return np.ascontiguousarray(a.transpose(np.argsort(TO_TORCH[a.ndim])), np.float32)

    return {path: layout(tensors[torch_name(path)]) for path in shapes()}


def read(path: str) -> dict[str, np.ndarray]:
    """{name: array} of a .safetensors file or of one that torch wrote."""
    try:
        if path.endswith('.safetensors'):
            return safetensors.numpy.load_file(path)
        return torch_file.read(path)
    except UserError:
        raise
    except ImportError as e:
        raise UserError(f'reading {path} needs torch: pip install torch, or give the weights as .safetensors') from e
    except Exception as e:  # what is no file of weights fails in many ways, some with advice that would be unsafe
        raise UserError(
            f'{path} cannot be read as a file of weights ({type(e).__name__}); they are at {PUBLISHED["url"]}'
        ) from e
