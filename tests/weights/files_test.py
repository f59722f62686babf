"""Files of weights: what is read, and what is refused in one line without running anything."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from support import ROOT

from jaxgen.errors import UserError
from jaxgen.weights import mapping
from jaxgen.weights.files import open_weights

ARRAYS = {'a.weight': np.arange(6, dtype=np.float32).reshape(2, 3), 'b': np.array([1, 2], np.int64)}


def saved(path) -> str:
    safetensors.numpy.save_file(ARRAYS, path, {'format': 'pt'})
    return str(path)


def test_safetensors_with_config_beside_it(tmp_path):
    path = saved(tmp_path / 'model.safetensors')
    (tmp_path / 'config.json').write_text('{"_class_name": "UNet2DModel"}')
    for name in (path, str(tmp_path)):
        weights = open_weights(name)
        assert {n: t.shape for n, t in weights.items()} == {'a.weight': (2, 3), 'b': (2,)}
        np.testing.assert_array_equal(weights['a.weight'].read(), ARRAYS['a.weight'])
        assert weights.config == {'_class_name': 'UNet2DModel'} and weights.metadata == {'format': 'pt'}
        assert len(weights.sha256) == 64


def test_shards(tmp_path):
    for i, (name, array) in enumerate(ARRAYS.items()):
        safetensors.numpy.save_file({name: array}, tmp_path / f'{i}.safetensors')
    index = tmp_path / 'diffusion_pytorch_model.safetensors.index.json'
    index.write_text(json.dumps({'weight_map': {n: f'{i}.safetensors' for i, n in enumerate(ARRAYS)}}))
    weights = open_weights(str(tmp_path))
    np.testing.assert_array_equal(weights['b'].read(), ARRAYS['b'])
    os.remove(tmp_path / '1.safetensors')
    with pytest.raises(UserError, match=r"shard '1\.safetensors' is not in its folder"):
        open_weights(str(tmp_path))
    index.write_text(json.dumps({'weight_map': {'a.weight': '../outside.safetensors'}}))
    with pytest.raises(UserError, match='is not in its folder'):
        open_weights(str(tmp_path))


def test_bfloat16_stays(tmp_path):
    torch = pytest.importorskip('torch')
    from safetensors.torch import save_file

    x = torch.tensor([1.0, 1 / 3], dtype=torch.bfloat16)
    save_file({'x': x}, tmp_path / 'x.safetensors')
    torch.save({'x': x}, tmp_path / 'x.pt')
    for name in ('x.safetensors', 'x.pt'):
        tensor = open_weights(str(tmp_path / name))['x']
        assert tensor.dtype.name == 'bfloat16' and tensor.read().dtype.name == 'bfloat16'
        np.testing.assert_array_equal(tensor.read().astype(np.float32), x.float().numpy())


def test_torch_dictionaries_are_joined_by_dots(tmp_path):
    torch = pytest.importorskip('torch')
    tree = {'ema': {'w': torch.ones(2)}, 'list': [torch.zeros(1), torch.ones(1)], 'step': 3}
    torch.save(tree, tmp_path / 'x.ckpt')
    torch.save(tree, tmp_path / 'old.pth', _use_new_zipfile_serialization=False)
    for name in ('x.ckpt', 'old.pth'):
        weights = open_weights(str(tmp_path / name))
        assert set(weights) == {'ema.w', 'list.0', 'list.1'}
        np.testing.assert_array_equal(weights.below('list.')['1'].read(), [1])


class Code:
    def __reduce__(self):
        return os.system, ('touch RAN',)


@pytest.mark.parametrize('name', ['x.pt', 'x.pth', 'x.ckpt', 'x.bin', 'x.pkl', 'x.pickle'])
def test_pickles_with_code_are_refused_and_not_run(tmp_path, monkeypatch, name):
    pytest.importorskip('torch')
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    pickle.dump({'w': Code()}, buffer)
    with zipfile.ZipFile(tmp_path / name, 'w') as archive:  # as torch writes them
        archive.writestr('archive/data.pkl', buffer.getvalue())
        archive.writestr('archive/version', '3')
    with pytest.raises(UserError, match='safetensors'):
        open_weights(str(tmp_path / name))
    (tmp_path / name).write_bytes(buffer.getvalue())
    with pytest.raises(UserError):
        open_weights(str(tmp_path / name))
    assert not (tmp_path / 'RAN').exists()


@pytest.mark.parametrize('size', [0, 7, 20, 60, -1])
@pytest.mark.parametrize('name', ['x.safetensors', 'x.pt'])
def test_truncated_files_are_refused(tmp_path, name, size):
    path = tmp_path / name
    if name.endswith('.pt'):
        torch = pytest.importorskip('torch')
        torch.save({'a': torch.ones(3)}, path)
    else:
        saved(path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r'x\.(safetensors|pt)'):
        open_weights(str(path))


def test_other_files_and_folders_are_refused(tmp_path):
    (tmp_path / 'x.txt').write_text('hello')
    for path, line in {
        tmp_path / 'nothing.pt': 'no such file',
        tmp_path / 'x.txt': 'weights are read from .safetensors',
        tmp_path: 'none of diffusion_pytorch_model',
    }.items():
        with pytest.raises(UserError, match=line):
            open_weights(str(path))
    saved(tmp_path / 'a.safetensors')
    saved(tmp_path / 'b.safetensors')
    with pytest.raises(UserError, match='2 files of weights: name one'):
        open_weights(str(tmp_path))


def test_models_of_the_hub_come_from_its_cache(tmp_path):
    """Its layout: refs name a commit, whose snapshot is the folder. Without the network another model is one line."""
    pytest.importorskip('huggingface_hub')
    model = tmp_path / 'hub' / 'models--org--name'
    (model / 'refs').mkdir(parents=True)
    (model / 'refs' / 'main').write_text('a' * 40)
    snapshot = model / 'snapshots' / ('a' * 40) / 'vae'
    snapshot.mkdir(parents=True)
    saved(snapshot / 'diffusion_pytorch_model.safetensors')
    code = (
        'from jaxgen.weights.files import open_weights; from jaxgen.errors import UserError\n'
        "print(sorted(open_weights('hf:org/name/vae')))\n"
        "for path in ('hf:org/other', 'hf:name', 'hf:org/../x'):\n"
        '    try: open_weights(path)\n'
        '    except UserError as e: print(str(e))\n'
    )
    environment = {**os.environ, 'HF_HOME': str(tmp_path), 'HF_HUB_OFFLINE': '1'}
    run = subprocess.run([sys.executable, '-c', code], env=environment, cwd=ROOT, capture_output=True, text=True)
    lines = run.stdout.splitlines()
    assert lines[0] == "['a.weight', 'b']", run.stderr
    assert lines[1].startswith('--from=hf:org/other cannot be had')
    assert all('write hf:ORGANISATION/NAME' in line for line in lines[2:]) and len(lines) == 4


def test_folder_of_a_pipeline_names_its_models(tmp_path):
    (tmp_path / 'vae').mkdir()
    (tmp_path / 'model_index.json').write_text('{"_class_name": "DiTPipeline", "vae": ["diffusers", "AutoencoderKL"]}')
    with pytest.raises(UserError, match=r'a pipeline: name one of its models, --from=.*vae, of vae'):
        open_weights(str(tmp_path))


def test_torch_with_numbers_that_are_not_read_or_without_an_end(tmp_path):
    """They open, since a file may hold them beside its weights; a list that holds itself does not."""
    torch = pytest.importorskip('torch')
    tree = {'meta': torch.empty(3, device='meta'), 'sparse': torch.ones(3).to_sparse(), 'x': torch.ones(3)}
    torch.save(tree, tmp_path / 'x.pt')
    weights = open_weights(str(tmp_path / 'x.pt'))
    assert {name: t.dtype.name for name, t in weights.items()} == {'meta': 'object', 'sparse': 'object', 'x': 'float32'}
    endless: list = [torch.ones(3)]
    endless.append(endless)
    torch.save(endless, tmp_path / 'y.pt')
    with pytest.raises(UserError, match='nested too deep'):
        open_weights(str(tmp_path / 'y.pt'))


WHOLE = {'dtype': 'F32', 'shape': [4, 4], 'data_offsets': [0, 64]}


@pytest.mark.parametrize('header', [
    b'[]', b'[' * 100_000, b'{"a":"x"}', json.dumps({'a': {**WHOLE, 'shape': [-4, 4]}}).encode(),
    json.dumps({'a': {**WHOLE, 'shape': [2**40, 2**40]}}).encode(),
    json.dumps({'a': {**WHOLE, 'data_offsets': [4, 68]}}).encode(),
    json.dumps({'a': WHOLE, 'b': WHOLE}).encode(),
])  # fmt: skip
def test_headers_that_are_none_are_refused(tmp_path, header):
    (tmp_path / 'x.safetensors').write_bytes(len(header).to_bytes(8, 'little') + header + bytes(64))
    with pytest.raises(UserError, match='is no whole safetensors file'):
        open_weights(str(tmp_path / 'x.safetensors'))


@pytest.mark.parametrize('length', [2**25 + 1, 2**62])
def test_a_header_is_read_up_to_a_length(tmp_path, length):
    (tmp_path / 'x.safetensors').write_bytes(length.to_bytes(8, 'little') + b'{}')
    with pytest.raises(UserError, match='with a header of'):
        open_weights(str(tmp_path / 'x.safetensors'))


def test_numbers_that_are_no_weights_open_and_are_not_read(tmp_path):
    header = json.dumps({'a': {'dtype': 'U16', 'shape': [32], 'data_offsets': [0, 64]}}).encode()
    (tmp_path / 'x.safetensors').write_bytes(len(header).to_bytes(8, 'little') + header + bytes(64))
    assert open_weights(str(tmp_path / 'x.safetensors'))['a'].dtype == np.dtype(object)


@pytest.mark.parametrize('name', ['F8_E4M3', 'F8_E5M2'])
def test_numbers_of_eight_bits_become_bfloat16(tmp_path, name):
    # 1.5 in either format: sign, exponent with its bias of 7 or 15, mantissa.
    bits = {'F8_E4M3': 0b0_0111_100, 'F8_E5M2': 0b0_01111_10}[name]
    header = json.dumps({'a.weight': {'dtype': name, 'shape': [2, 3], 'data_offsets': [0, 6]}}).encode()
    content = len(header).to_bytes(8, 'little') + header + bytes([bits] * 6)
    (tmp_path / 'x.safetensors').write_bytes(content)
    array = mapping.entry(mapping.Table([*mapping.LEAVES]), 'a/kernel', (3, 2)).read(
        open_weights(str(tmp_path / 'x.safetensors'))
    )
    assert array.dtype.name == 'bfloat16' and array.shape == (3, 2) and (array.astype(np.float32) == 1.5).all()


FURTHER = (
    'diffusion_pytorch_model.fp16.safetensors',
    'model.fp16.safetensors',
    'diffusion_pytorch_model.safetensors.index.fp16.json',
    'model.fp16.safetensors.index.json',
)


@pytest.mark.parametrize('name', FURTHER)
def test_further_copies_in_a_folder(tmp_path, name):
    there = 'part-1.safetensors' if name.endswith('json') else name
    safetensors.numpy.save_file({'a': np.arange(3.0)}, tmp_path / there)
    if name.endswith('json'):
        (tmp_path / name).write_text(json.dumps({'weight_map': {'a': there}}))
    np.testing.assert_array_equal(open_weights(str(tmp_path))['a'].read(), np.arange(3.0))


def test_archives_that_unpack_to_more_are_refused(tmp_path):
    pytest.importorskip('torch')
    with zipfile.ZipFile(tmp_path / 'x.pt', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('archive/data.pkl', bytes(10**7))
    with pytest.raises(UserError, match='an archive that torch did not write'):
        open_weights(str(tmp_path / 'x.pt'))


def test_tensors_of_torch_are_read_from_their_places(tmp_path):
    """Views, steps through storages and tensors that share one; the order of reading is that in the file."""
    torch = pytest.importorskip('torch')
    whole = torch.arange(24.0).reshape(4, 6)
    tree = {'whole': whole, 'rows': whole[1:3], 'turned': whole.T, 'none': whole[:0], 'next': torch.arange(5)}
    torch.save(tree, tmp_path / 'x.pt')
    weights = open_weights(str(tmp_path / 'x.pt'))
    for name, tensor in tree.items():
        np.testing.assert_array_equal(weights[name].read(), tensor.numpy())
    if sys.platform == 'linux':
        assert weights['rows'].place[1] == weights['whole'].place[1] + 24 > 24
