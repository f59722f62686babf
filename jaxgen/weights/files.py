"""Files of published weights, opened lazily: the names, shapes and dtypes at once, each tensor when it is read, from
its place in the file, so that no more of a file is in memory than what is read.

A file comes from a stranger and is data: safetensors hold no code, and files of torch are read by `weights_only`, which
runs none.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes  # registers bfloat16 as a dtype, which safetensors returns
import numpy as np
import safetensors

from jaxgen.errors import UserError

SAFE_TORCH = (2, 6)  # before it, `weights_only` could be made to run code (CVE-2025-32434)
DEEPEST, MOST = 50, 1_000_000  # levels of dictionaries in a file of torch, and objects in them
MOST_HEADER, MOST_JSON = 2**25, 2**25  # bytes of the header of a safetensors file, and of a JSON file
MOST_PICKLED = 2**28  # bytes of a file of torch that are no numbers
TORCH = ('.pt', '.pth', '.ckpt', '.bin')
DTYPES = {
    **{'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16, 'BOOL': np.bool_},
    **{'F8_E4M3': ml_dtypes.float8_e4m3fn, 'F8_E5M2': ml_dtypes.float8_e5m2},
    **{'I64': np.int64, 'I32': np.int32, 'I16': np.int16, 'I8': np.int8, 'U8': np.uint8},
}
HUB = 'hf:'
TOKENIZERS = ('*merges.txt', '*spiece.model')  # files of tokenizers beside JSON
PIPELINE = 'model_index.json'  # of a folder whose models lie in folders of their own
# The weights in a folder of the hub, the first that is there.
IN_FOLDER = (
    'diffusion_pytorch_model.safetensors.index.json',
    'diffusion_pytorch_model.safetensors',
    'model.safetensors.index.json',
    'model.safetensors',
    'diffusion_pytorch_model.bin.index.json',
    'diffusion_pytorch_model.bin',
    'pytorch_model.bin.index.json',
    'pytorch_model.bin',
)
# Further copies of them have a word in their names, *.fp16.safetensors or *.safetensors.index.fp16.json; the first of
# these words that is there.
VARIANTS = ('fp16', 'bf16', 'fp32', 'ema', 'non_ema')


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file, not read yet."""

    shape: tuple[int, ...]
    dtype: np.dtype  # object: numbers or a layout that numpy has not, which cannot be read
    read: Callable[[], np.ndarray]
    place: tuple[str, int] = ('', 0)  # file and byte where it begins: the order in which to read


@dataclasses.dataclass(frozen=True)
class Weights(Mapping):
    """The tensors of a file or folder by their names there, and what the file says of itself."""

    path: str
    tensors: dict[str, Tensor]
    config: dict[str, Any] = dataclasses.field(default_factory=dict)  # config.json beside the weights
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)  # of a safetensors file
    files: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 of the file; of several files, that of their digests in order."""
        digests = [digest_of(path, file_state(path)) for path in self.files]
        return digests[0] if len(digests) == 1 else hashlib.sha256(''.join(digests).encode()).hexdigest()

    @functools.cached_property
    def states(self) -> tuple[tuple[int, ...], ...]:
        """Inode, length and time of the last change of each file when this was first called for."""
        return tuple(file_state(path) for path in self.files)

    def check_unchanged(self) -> None:
        """Raises UserError where a file is another one than at the first call of `states`."""
        for path, state in zip(self.files, self.states, strict=True):
            if file_state(path) != state:
                raise UserError(f'{path} changed while it was read: run the same command again')

    def below(self, prefix: str) -> Weights:
        """The tensors whose names begin with `prefix`, without it."""
        inside = {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}
        return dataclasses.replace(self, tensors=inside)


@functools.lru_cache(maxsize=64)
def digest_of(path: str, state: tuple[int, ...]) -> str:
    """SHA-256 of a file in this state: of one with several models it is taken once."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def file_state(path: str) -> tuple[int, ...]:
    about = os.stat(path)
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


def open_weights(path: str, option: str = '--from') -> Weights:
    """The weights in a .safetensors file, a file of torch, or a folder of the hub (one model: its weights, whole or in
    shards with their index, and config.json).

    Args:
      option: that names the path, for messages.

    Raises:
      UserError: there is nothing of that kind, it cannot be read, or reading it would run code.
    """
    path = of_hub(path, option) if path.startswith(HUB) else os.path.expanduser(path)
    if os.path.isdir(path):
        return open_folder(path, option)
    if not os.path.isfile(path):
        raise UserError(f'{option}={path}: no such file or folder')
    if path.endswith('.safetensors'):
        tensors, metadata = open_safetensors(path)
        return Weights(path, tensors, beside(path), metadata, (path,))
    if re.search(r'\.index(\.\w+)?\.json$', path):
        return open_shards(path)
    if path.endswith(('.pkl', '.pickle')):
        raise UserError(
            f'{option}={path}: a pickle runs code when it is opened, so it is not read: save its state_dict as '
            'safetensors where you trust it (docs/weights.md shows how)'
        )
    if not path.endswith(TORCH):
        raise UserError(
            f'{option}={path}: weights are read from .safetensors, {", ".join(TORCH)} or a folder of the hub'
        )
    return Weights(path, open_torch(path), beside(path), {}, (path,))


def of_hub(path: str, option: str) -> str:
    """The folder of 'hf:ORGANISATION/NAME' or 'hf:ORGANISATION/NAME/SUBFOLDER' in the hub's cache, into which
    huggingface_hub puts what is not there yet.

    Raises:
      UserError: it is not installed, or has no such model and cannot fetch it.
    """
    parts = path.removeprefix(HUB).split('/')
    if len(parts) < 2 or not all(parts) or '..' in parts:
        raise UserError(f'{option}={path}: write hf:ORGANISATION/NAME, or hf:ORGANISATION/NAME/SUBFOLDER')
    try:
        from huggingface_hub import snapshot_download
    except ImportError as e:
        raise UserError(f'{option}={path} needs pip install huggingface_hub, or name a folder of your own') from e
    below = '/'.join([*parts[2:], ''])
    wanted = [f'{below}{ending}' for ending in ('*.json', '*.safetensors', '*.bin', *TOKENIZERS)]
    if parts[2:] and parts[2].startswith('text_encoder'):  # whose tokenizer lies in a folder beside it
        wanted += [f'tokenizer*/{ending}' for ending in ('*.json', *TOKENIZERS)]
    try:
        folder = snapshot_download('/'.join(parts[:2]), allow_patterns=wanted)
    except Exception as e:  # of the network, the hub or its cache
        raise UserError(f'{option}={path} cannot be had: {" ".join(str(e).split())[:200]}') from e
    return os.path.join(folder, *parts[2:])


def open_folder(path: str, option: str) -> Weights:
    """The weights in a folder of the hub; see `open_weights`."""
    for name in IN_FOLDER:
        inside = os.path.join(path, name)
        if os.path.isfile(inside):
            check_inside(path, name)
            return dataclasses.replace(open_weights(inside, option), path=path)
    if name := variant_in(path):
        check_inside(path, name)
        return dataclasses.replace(open_weights(os.path.join(path, name), option), path=path)
    whole = sorted(name for name in os.listdir(path) if name.endswith('.safetensors'))
    if len(whole) == 1:
        check_inside(path, whole[0])
        return dataclasses.replace(open_weights(os.path.join(path, whole[0]), option), path=path)
    what = f'{len(whole)} files of weights: name one of them' if whole else f'none of {", ".join(IN_FOLDER)}'
    parts = read_json(os.path.join(path, PIPELINE)) if os.path.isfile(os.path.join(path, PIPELINE)) else {}
    folders = [name for name in parts if os.path.isdir(os.path.join(path, name))]
    if folders:
        what = f'a pipeline: name one of its models, {option}={os.path.join(path, folders[0])}, of {", ".join(folders)}'
    raise UserError(f'{option}={path} holds {what}')


def variant_in(folder: str) -> str:
    """The file in a folder of the hub that has one of the names IN_FOLDER but for one of the words VARIANTS; ''."""
    for word in VARIANTS:
        for name in IN_FOLDER:
            stem, dot, last = name.rpartition('.')
            named = [f'{stem}.{word}{dot}{last}']
            if last == 'json':  # of older versions
                named.append(f'{name.partition(".")[0]}.{word}.{name.partition(".")[2]}')
            for one in named:
                if os.path.isfile(os.path.join(folder, one)):
                    return one
    return ''


def check_inside(folder: str, name: str) -> None:
    """Raises UserError where a file of a folder is a link out of it, other than in the hub's cache, whose snapshots
    link to the files in `blobs` beside them."""
    top, real = os.path.realpath(folder or '.'), os.path.realpath(os.path.join(folder, name))
    model, snapshots, _ = top.partition('/snapshots/')
    allowed = [top, *([f'{model}/blobs'] if snapshots else [])]
    if not any(real.startswith(f'{one}/') for one in allowed):
        raise UserError(f'{os.path.join(folder, name)} is a link out of its folder, to {real}: name that file itself')


def beside(path: str) -> dict[str, Any]:
    """config.json in the same folder, or {}."""
    folder = os.path.dirname(path)
    return read_part(folder, 'config.json')


def read_part(folder: str, name: str) -> dict[str, Any]:
    """The JSON object in a file of a folder, {} where there is none."""
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        return {}
    check_inside(folder, name)
    return read_json(path)


def read_json(path: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      UserError: it holds something else.
    """
    try:
        if os.path.getsize(path) > MOST_JSON:
            raise ValueError(f'it has more than {MOST_JSON >> 20} MiB')
        with open(path, encoding='utf-8') as file:
            value = json.loads(file.read(MOST_JSON))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f'{path} cannot be read: {" ".join(str(e).split())[:200]}') from e
    if not isinstance(value, dict):
        raise UserError(f'{path} holds no JSON object')
    return value


def open_shards(index: str) -> Weights:
    """The weights of a sharded model by its index, {'weight_map': {name: file in the same folder}}.

    Raises:
      UserError: a shard is missing, lies elsewhere or lacks what the index says.
    """
    folder, shards = os.path.dirname(index), read_json(index).get('weight_map')
    if not isinstance(shards, dict) or not shards or not all(isinstance(file, str) for file in shards.values()):
        raise UserError(f'{index} has no weight_map')
    opened: dict[str, dict[str, Tensor]] = {}
    for file in sorted({*shards.values()}):
        inside = os.path.join(folder, file)
        if os.path.basename(file) != file or not os.path.isfile(inside):
            raise UserError(f'{index}: the shard {file!r} is not in its folder')
        check_inside(folder, file)
        if not file.endswith(('.safetensors', *TORCH)):
            raise UserError(f'{index}: the shard {file!r} is none of .safetensors, {", ".join(TORCH)}')
        opened[file] = open_safetensors(inside)[0] if file.endswith('.safetensors') else open_torch(inside)
    for name, file in shards.items():
        if name not in opened[file]:
            raise UserError(f'{index}: {file} lacks {name}')
    tensors = {name: opened[file][name] for name, file in shards.items()}
    return Weights(index, tensors, beside(index), {}, tuple(os.path.join(folder, file) for file in opened))


def read_at(path: str, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array whose bytes stand in a file. They are read and not mapped, so they are in memory once.

    Raises:
      UserError: the file ends before.
    """
    out = np.empty(shape, dtype)
    rest = memoryview(out.reshape(-1).view(np.uint8))
    with open(path, 'rb', buffering=0) as file:
        file.seek(offset)
        while len(rest):
            n = file.readinto(rest)
            if not n:
                raise UserError(f'{path} ends in the middle of a tensor: it is not whole')
            rest = rest[n:]
    return out


def open_safetensors(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """({name: Tensor}, metadata) of a .safetensors file.

    Raises:
      UserError: it is truncated or something else.
    """
    try:
        with open(path, 'rb') as file:
            length = int.from_bytes(file.read(8), 'little')
            if length > MOST_HEADER:
                raise UserError(
                    f'{path} is no safetensors file, or one with a header of {length:,} bytes, and at most '
                    f'{MOST_HEADER:,} are read'
                )
            header = file.read(length)
        with safetensors.safe_open(path, 'numpy') as checked:  # offsets and lengths fit the shapes and the file
            metadata = checked.metadata() or {}
        parts = json.loads(header)
    except (OSError, ValueError, safetensors.SafetensorError) as e:
        raise UserError(f'{path} is no whole safetensors file ({" ".join(str(e).split())[:200]})') from e
    tensors = {}
    for name, part in parts.items():
        if name != '__metadata__':
            shape, dtype = tuple(part['shape']), np.dtype(DTYPES.get(part['dtype'], object))
            offset = 8 + length + part['data_offsets'][0]
            read = functools.partial(read_at, path, offset, shape, dtype)
            tensors[name] = Tensor(shape, dtype, read, (path, offset))
    return tensors, metadata


def check_archive(path: str) -> None:
    """Raises UserError where a file of torch is an archive that torch would unpack into much memory: its own hold their
    files as they are."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return  # no archive, or one that torch refuses
    pickled = sum(one.file_size for one in members if one.filename.endswith('.pkl'))
    if any(one.compress_type != zipfile.ZIP_STORED for one in members) or pickled > MOST_PICKLED:
        raise UserError(f'{path} is an archive that torch did not write: its files are compressed, or it is too large')


def mapped_ranges(path: str) -> list[tuple[int, int, int]]:
    """(first address, address after the last, place in the file) of the parts of a file that are mapped into this
    process; none where the system does not show them."""
    real, ranges = os.path.realpath(path), []
    try:
        with open('/proc/self/maps', encoding='utf-8', errors='surrogateescape') as file:
            for line in file:
                addresses, _, offset, _, _, *name = line.rstrip('\n').split(maxsplit=5)
                if name == [real]:
                    low, high = (int(part, 16) for part in addresses.split('-'))
                    ranges.append((low, high, int(offset, 16)))
    except OSError:
        pass
    return ranges


def open_torch(path: str) -> dict[str, Tensor]:
    """{name: Tensor} of a file of torch, names of nested dictionaries joined by dots.

    Tensors are read from their places in the file, where it is an archive (since torch 1.6) and the system shows where
    it is mapped into memory, as Linux does.

    Raises:
      UserError: there is no torch, one too old to read it safely, or the file is something else or holds code.
    """
    try:
        import torch
    except ImportError as e:
        raise UserError(f'reading {path} needs torch: pip install torch, or give the weights as .safetensors') from e
    version = tuple(int(part) for part in torch.__version__.split('+')[0].split('.')[:2])
    if version < SAFE_TORCH:
        raise UserError(
            f'reading {path} needs torch 2.6 or newer, since a file can make older ones run code; this is '
            f'{torch.__version__}: pip install -U torch, or give the weights as .safetensors'
        )

    check_archive(path)

    def load(mapped: bool) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # on archives that are then refused
            return torch.load(path, map_location='cpu', weights_only=True, mmap=mapped)

    try:
        try:
            tree = load(True)
        except (RuntimeError, ValueError):  # files of torch before 1.6 are no archives and cannot be mapped
            tree = load(False)
    except Exception as e:  # what is no file of weights fails in many ways, some with advice that would be unsafe
        text = str(e)
        if 'Unsupported global' in text or 'GLOBAL' in text or 'Unsupported class' in text:
            named = re.search(r'GLOBAL ([\w.]+)', text)
            what = f' ({named[1]})' if named else ''
            raise UserError(
                f'{path} holds objects that only code could make{what}, so it is not read: save its state_dict as '
                'safetensors where you trust it (docs/weights.md shows how)'
            ) from e
        raise UserError(
            f'{path} cannot be read as a file of weights ({type(e).__name__}): it is damaged, or holds '
            'objects that only code could make, and would be read as .safetensors'
        ) from e

    ranges = mapped_ranges(path)

    def place(tensor) -> int | None:
        """Where in the file a tensor begins."""
        if not tensor.numel() or not tensor.is_contiguous():
            return None
        first = tensor.data_ptr()
        after = first + tensor.numel() * tensor.element_size()
        return next((offset + first - low for low, high, offset in ranges if low <= first and after <= high), None)

    def numpy(tensor) -> np.ndarray:
        if (offset := place(tensor)) is not None:
            return read_at(path, offset, tuple(tensor.shape), dtype(tensor))
        tensor = tensor.detach().contiguous()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    def dtype(tensor) -> np.dtype:
        name = str(tensor.dtype).removeprefix('torch.')
        dense = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized
        return np.dtype({'bool': np.bool_, 'bfloat16': ml_dtypes.bfloat16}.get(name, name) if dense else object)

    out: dict[str, Tensor] = {}
    seen = 0

    def flatten(value, name: str, depth: int) -> None:
        nonlocal seen
        seen += 1
        if depth > DEEPEST or seen > MOST:  # a list can hold itself
            raise UserError(f'{path} is nested too deep, or holds too many objects, to be a file of weights')
        if isinstance(value, torch.Tensor):
            try:
                one = dtype(value)
            except TypeError:  # numpy has no such numbers
                one = np.dtype(object)
            at = place(value) if one.kind != 'O' else None
            out[name] = Tensor(tuple(value.shape), one, functools.partial(numpy, value), (path, at or 0))
        elif isinstance(value, dict):
            for key, inside in value.items():
                flatten(inside, f'{name}.{key}' if name else str(key), depth + 1)
        elif isinstance(value, (list, tuple)):
            for i, inside in enumerate(value):
                flatten(inside, f'{name}.{i}', depth + 1)

    flatten(tree, '', 0)
    if not out:
        raise UserError(f'{path} holds no tensors')
    return out
