"""Published text encoders and CLIP as runs: from folders that transformers saves, from files of OpenAI and OpenCLIP."""

from __future__ import annotations

import json
import os
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from references import randomise
from support import run_main

import jaxgen
from jaxgen.contract import Texts
from jaxgen.errors import UserError
from jaxgen.text import tokenizers
from jaxgen.weights import exporting, files, pipelines, text_encoders
from jaxgen.weights.importing import import_weights

TEXTS = ['a small red heart on a blue mat', 'green', 'a large star! ' * 9]
OWN = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, projection_dim=20)
LENGTH, VOCABULARY = 11, 560


@pytest.fixture(scope='session')
def tokenizer(tmp_path_factory):
    """The folder of a tokenizer of CLIP's kind, and what it makes of texts."""
    folder = str(tmp_path_factory.mktemp('tokenizer'))
    made = tokenizers.train((f'a {a} {b} on a mat' for a in ('red', 'blue') for b in ('heart', 'star')), 550, LENGTH)
    made.save(folder)
    return folder, made


def of_text(transformers, cls: str = 'CLIPTextModel', **options):
    """A text tower of transformers with random weights."""
    torch = pytest.importorskip('torch')
    own = dict(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, eos_token_id=2, bos_token_id=0, pad_token_id=1)
    return randomise(torch, getattr(transformers, cls)(transformers.CLIPTextConfig(**{**own, **OWN, **options})))


def of_t5(transformers, **options):
    torch = pytest.importorskip('torch')
    sizes = dict(vocab_size=VOCABULARY, d_model=32, d_kv=10, d_ff=48, num_layers=3, num_heads=4)
    own = dict(feed_forward_proj='gated-gelu', relative_attention_num_buckets=16, relative_attention_max_distance=20)
    return randomise(torch, transformers.T5EncoderModel(transformers.T5Config(**{**sizes, **own, **options})))


def whole_clip(transformers, **options):
    torch = pytest.importorskip('torch')
    text = dict(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, eos_token_id=2, **OWN, **options)
    vision = dict(image_size=12, patch_size=4, **{**OWN, 'num_attention_heads': 2, 'hidden_size': 24}, **options)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
    return randomise(torch, transformers.CLIPModel(config))


def saved(model, tokenizer, folder, name: str = 'text_encoder'):
    """A folder of a pipeline: the model as it saves itself, and its tokenizer beside it."""
    model.save_pretrained(folder / name)
    if tokenizer:
        shutil.copytree(tokenizer, folder / name.replace('text_encoder', 'tokenizer'))
    return str(folder / name)


def encoded(run, tokens):
    family = run.assembled.family
    return jax.jit(family.encode_text)(run.state, run.assembled.frozen, tokens)


def outputs(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64)), output_hidden_states=True)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def check_export(run, model, folder):
    """The export is loaded by its class, with the same numbers in the same tensors."""
    import torch

    exporting.export_weights(run, folder)
    again = type(model).from_pretrained(folder)
    assert {**again.state_dict()}.keys() == {**model.state_dict()}.keys()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weight, rtol=0, atol=0)
    return again


@pytest.mark.slow
@pytest.mark.parametrize(
    ('cls', 'options'),
    [('CLIPTextModelWithProjection', dict(hidden_act='gelu', eos_token_id='start')), ('CLIPTextModel', {})],
)
def test_a_text_tower(tmp_path, tokenizer, cls, options, capsys):
    """Of the folder alone: sizes, activation and heads, the tokenizer beside it; another token at the end than the
    largest number, and the 2 of old files, which is none."""
    transformers = pytest.importorskip('transformers')
    if options:
        options |= {'eos_token_id': tokenizer[1].backend.token_to_id(tokenizers.START)}
    model = of_text(transformers, cls, **options)
    hub = saved(model, tokenizer[0], tmp_path)
    assert run_main(['jaxgen', '--mode=import', f'--from={hub}', f'--workdir={tmp_path}/run']) == 0, capsys.readouterr()
    run = jaxgen.load(str(tmp_path / 'run'))
    assert run.config.family == 'encoder' and run.config.model.network.end == options.get('eos_token_id', -1)
    tokens, _, cut = run.assembled.tokenizers['tokens'](TEXTS)
    assert tokens.shape == (3, LENGTH) and cut == 2
    np.testing.assert_array_equal(tokens, tokenizer[1](TEXTS).ids)
    ours, theirs = encoded(run, tokens), outputs(model, tokens)
    np.testing.assert_allclose(ours.last, theirs.last_hidden_state, atol=2e-5)
    np.testing.assert_allclose(ours.before, theirs.hidden_states[-2], atol=2e-5)
    embedding = (theirs.text_embeds if 'text_embeds' in theirs else theirs.pooler_output).numpy()
    np.testing.assert_allclose(ours.embedding, embedding, atol=2e-5)
    np.testing.assert_allclose(run.encode_text(TEXTS), unit(embedding), atol=2e-5)
    check_export(run, model, str(tmp_path / 'out'))
    kept = tokenizers.from_folder(str(tmp_path / 'out'))
    np.testing.assert_array_equal(kept(TEXTS).ids, tokens)


@pytest.mark.slow
def test_t5_in_shards(tmp_path, tokenizer, capsys):
    """The length of a text is the tokenizer's, since the network has none."""
    transformers = pytest.importorskip('transformers')
    model = of_t5(transformers)
    model.save_pretrained(tmp_path / 'text_encoder_3', max_shard_size='20KB')
    tokenizer[1].with_length(9).save(str(tmp_path / 'tokenizer_3'))
    assert os.path.isfile(tmp_path / 'text_encoder_3' / 'model.safetensors.index.json')
    command = ['jaxgen', '--mode=import', f'--from={tmp_path}/text_encoder_3', f'--workdir={tmp_path}/run']
    assert run_main(command) == 0, capsys.readouterr()
    run = jaxgen.load(str(tmp_path / 'run'))
    tokens = run.assembled.tokenizers['tokens'](TEXTS).ids
    assert tokens.shape == (3, 9) and run.config.model.network.furthest == 20
    ours = encoded(run, tokens)
    np.testing.assert_allclose(ours.last, outputs(model, tokens).last_hidden_state, atol=2e-5)
    there = tokens != 0
    mean = (np.asarray(ours.last) * there[..., None]).sum(1) / there.sum(1)[:, None]
    np.testing.assert_allclose(ours.embedding, mean, atol=1e-6)
    check_export(run, model, str(tmp_path / 'out'))


@pytest.mark.slow
def test_whole_clip(tmp_path, tokenizer, capsys):
    """Both towers and their scale; trained on afterwards, and packed with its tokenizer."""
    torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
    model = whole_clip(transformers)
    model.save_pretrained(tmp_path / 'hub')
    with open(tmp_path / 'hub' / 'preprocessor_config.json', 'w') as file:
        json.dump({'image_mean': [0.5] * 3, 'image_std': [0.5] * 3}, file)
    tokenizer[1].save(str(tmp_path / 'hub'))
    assert run_main(['jaxgen', '--mode=import', f'--from={tmp_path}/hub', f'--workdir={tmp_path}/run']) == 0
    run = jaxgen.load(str(tmp_path / 'run'))
    assert run.config.family == 'clip' and run.config.model.normalisation == 'none'
    images = np.random.default_rng(0).uniform(-1, 1, (4, 12, 12, 3)).astype(np.float32)
    tokens = tokenizer[1](TEXTS).ids
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    np.testing.assert_allclose(
        run.similarity(images, TEXTS), unit(theirs.image_embeds.numpy()) @ unit(theirs.text_embeds.numpy()).T, atol=2e-5
    )
    np.testing.assert_allclose(run.zero_shot(images, TEXTS), theirs.logits_per_image.softmax(1), atol=2e-4)
    # Images of another size, by the source's own preparation: to within its rounding after each axis.
    larger = (64 + np.kron(images[:3], np.ones((1, 5, 3, 1)))[:, :, :23] * 60).astype(np.uint8)
    sizes = dict(size={'shortest_edge': 12}, crop_size=12, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    pixels = transformers.CLIPImageProcessor(**sizes)([x.transpose(2, 0, 1) for x in larger], return_tensors='pt')
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens.astype(np.int64)), pixels['pixel_values'])
    cosines = np.diagonal(theirs.logits_per_image / model.logit_scale.detach().exp())
    np.testing.assert_allclose(np.diagonal(run.similarity(larger, TEXTS)), cosines, atol=5e-3)
    score = jaxgen.metrics.clip_score(larger, TEXTS, features=run)
    assert score == pytest.approx(100 * np.maximum(cosines, 0).mean(), abs=0.5)
    check_export(run, model, str(tmp_path / 'out'))
    assert jaxgen.import_weights(tmp_path / 'out', workdir=tmp_path / 'again').config.model.to_dict() == (
        run.config.model.to_dict()
    )
    packed = ['jaxgen', '--mode=pack', f'--workdir={tmp_path}/run', f'--out={tmp_path}/packed']
    assert run_main(packed) == 0, capsys.readouterr()
    moved = jaxgen.load(str(tmp_path / 'packed'))
    np.testing.assert_array_equal(moved.encode_text(TEXTS), run.encode_text(TEXTS))
    config = run.config.copy_and_resolve_references()
    config.train.steps, config.data.batch = 1, 4
    jaxgen.train(config, str(tmp_path / 'run'))
    assert jaxgen.load(str(tmp_path / 'run')).step == 1


@pytest.mark.slow
def test_a_vision_tower(tmp_path, capsys):
    torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
    config = transformers.CLIPVisionConfig(image_size=12, patch_size=4, hidden_act='gelu', **OWN)
    model = randomise(torch, transformers.CLIPVisionModelWithProjection(config))
    model.save_pretrained(tmp_path / 'image_encoder')
    command = ['jaxgen', '--mode=import', f'--from={tmp_path}/image_encoder', f'--workdir={tmp_path}/run']
    assert run_main(command) == 0, capsys.readouterr()
    run = jaxgen.load(str(tmp_path / 'run'))
    images = np.random.default_rng(0).uniform(-1, 1, (4, 12, 12, 3)).astype(np.float32)
    mean, deviation = (np.array(x, np.float32) for x in ((0.48145466, 0.4578275, 0.40821073),
                                                         (0.26862954, 0.26130258, 0.27577711)))  # fmt: skip
    pixels = torch.from_numpy((((images + 1) / 2 - mean) / deviation).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        np.testing.assert_allclose(run.encode(images), unit(model(pixels).image_embeds.numpy()), atol=2e-5)
    check_export(run, model, str(tmp_path / 'out'))


def as_openai(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a CLIPModel by the names of OpenAI's code, clip/model.py."""
    out = {
        'token_embedding.weight': state['text_model.embeddings.token_embedding.weight'],
        'positional_embedding': state['text_model.embeddings.position_embedding.weight'],
        'text_projection': state['text_projection.weight'].T,
        'logit_scale': state['logit_scale'],
        'visual.class_embedding': state['vision_model.embeddings.class_embedding'],
        'visual.conv1.weight': state['vision_model.embeddings.patch_embedding.weight'],
        'visual.positional_embedding': state['vision_model.embeddings.position_embedding.weight'],
        'visual.proj': state['visual_projection.weight'].T,
    }
    norms = {
        'ln_final': 'text_model.final_layer_norm',
        'visual.ln_pre': 'vision_model.pre_layrnorm',
        'visual.ln_post': 'vision_model.post_layernorm',
    }
    for theirs, root in (('transformer', 'text_model'), ('visual.transformer', 'vision_model')):
        for i in range(3):
            own, block = f'{theirs}.resblocks.{i}', f'{root}.encoder.layers.{i}'
            parts = {'attn.out_proj': 'self_attn.out_proj', 'mlp.c_fc': 'mlp.fc1', 'mlp.c_proj': 'mlp.fc2'}
            parts |= {'ln_1': 'layer_norm1', 'ln_2': 'layer_norm2'}
            norms |= {f'{own}.{a}': f'{block}.{b}' for a, b in parts.items()}
            for kind in ('weight', 'bias'):
                qkv = [state[f'{block}.self_attn.{part}_proj.{kind}'] for part in 'qkv']
                out[f'{own}.attn.in_proj_{kind}'] = np.concatenate(qkv)
    for a, b in norms.items():
        out |= {f'{a}.{kind}': state[f'{b}.{kind}'] for kind in ('weight', 'bias')}
    return {name: np.ascontiguousarray(x) for name, x in out.items()}


@pytest.mark.slow
def test_files_of_openai_and_openclip(tmp_path, tokenizer):
    """Whole, and the text tower out of them; the same numbers come back under the same names."""
    transformers = pytest.importorskip('transformers')
    model = whole_clip(transformers)
    state = as_openai({name: x.numpy() for name, x in model.state_dict().items()})
    scalars = {name: np.array(7) for name in ('input_resolution', 'context_length', 'vocab_size')}
    safetensors.numpy.save_file(state | scalars, tmp_path / 'openai.safetensors')
    path = str(tmp_path / 'openai.safetensors')
    with pytest.raises(UserError, match=r'no config\.json says how many heads a tower of 32 channels has'):
        pipelines.derived(path)
    text = dict(vocabulary=VOCABULARY, length=LENGTH, channels=32, blocks=3, heads=4, hidden=40)
    vision = dict(patch=4, channels=24, blocks=3, heads=2, hidden=40)
    config = jaxgen.config.make(
        family='clip', model=dict(text=text, vision=vision, features=20, normalisation='none'),
        data=dict(source='shapes', size=12, channels=3, features=('image', 'caption'), batch=4),
    )  # fmt: skip
    with pytest.raises(UserError, match='holds no tokenizer'):
        import_weights(config, path, str(tmp_path / 'run'))
    import_weights(config, path, str(tmp_path / 'run'), tokenizer=tokenizer[0])
    run = jaxgen.load(str(tmp_path / 'run'))
    tokens = run.assembled.tokenizers['tokens'](TEXTS).ids
    assert tokens[1, -1] == 0, 'OpenAI fills texts up with zeros'
    np.testing.assert_allclose(
        encoded(run, tokens).last, outputs(model.text_model, tokens).last_hidden_state, atol=2e-5
    )
    exporting.export_weights(run, str(tmp_path / 'out.safetensors'), 'openclip')
    again = safetensors.numpy.load_file(tmp_path / 'out.safetensors')
    assert again.keys() == state.keys()
    for name, x in state.items():
        np.testing.assert_array_equal(again[name], x)
    alone = jaxgen.config.make(
        family='encoder', model=dict(network=dict(name='clip', features=20, **text)), data=config.data.to_dict()
    )
    import_weights(alone, path, str(tmp_path / 'alone'), tokenizer=tokenizer[0])
    ours = encoded(jaxgen.load(str(tmp_path / 'alone')), tokens)
    np.testing.assert_array_equal(ours.embedding, encoded(run, tokens).embedding)


# --- what config.json says, and what is wrong


def said(config: dict, tensors: dict[str, tuple[int, ...]], path: str = 'hub') -> files.Weights:
    named = {name: files.Tensor(shape, np.dtype(np.float32), lambda: None) for name, shape in tensors.items()}
    return files.Weights(path, named, config)


def shapes_of_text(channels: int = 128, blocks: int = 2) -> dict[str, tuple[int, ...]]:
    shapes = {'token_embedding.weight': (99, channels), 'position_embedding.weight': (7, channels)}
    shapes = {f'text_model.embeddings.{name}': shape for name, shape in shapes.items()}
    return shapes | {f'text_model.encoder.layers.{i}.mlp.fc1.weight': (4 * channels, channels) for i in range(blocks)}


def test_what_config_json_says_of_a_text_tower():
    text = {'model_type': 'clip_text_model', 'num_attention_heads': 4, 'hidden_act': 'gelu', 'eos_token_id': 2}
    network = dict(vocabulary=99, length=7, channels=128, blocks=2, heads=4, hidden=0, features=0)
    network |= dict(name='clip', activation='gelu', end=-1)
    assert text_encoders.model_of(said(text, shapes_of_text())) == ('encoder', {'network': network}, 0)
    for end, field in ((98, -1), (97, 97), (0, 0)):
        _, model, _ = text_encoders.model_of(said({**text, 'eos_token_id': end}, shapes_of_text()))
        assert model['network']['end'] == field
    unprefixed = {name.removeprefix('text_model.'): shape for name, shape in shapes_of_text().items()}
    assert text_encoders.model_of(said(text, unprefixed))[1]['network'] == network
    alone = text_encoders.model_of(said({}, shapes_of_text()))[1]['network']
    assert alone['heads'] == 2 and 'end' not in alone


@pytest.mark.parametrize(
    ('change', 'line'),
    [
        ({'layer_norm_eps': 1e-3}, 'layer_norm_eps is 0.001 in the config.json'),
        ({'hidden_act': 'relu'}, "hidden_act is 'relu' .* 'quick_gelu' or 'gelu'"),
        ({'num_attention_heads': 0}, 'num_attention_heads is 0, and should be a count'),
        ({'eos_token_id': [2, 3]}, 'eos_token_id is .* should be a number'),
        ({'key_of_tomorrow': 1}, 'key_of_tomorrow is 1 .* not known here'),
        ({'model_type': 'siglip'}, "is of a 'siglip': here are clip"),
        ({'model_type': 't5'}, 'is of a t5: this network is a clip_text_model'),
    ],
)
def test_a_config_json_that_does_not_fit(change, line):
    with pytest.raises(UserError, match=line) as caught:
        text_encoders.model_of(said({'model_type': 'clip_text_model', **change}, shapes_of_text()))
    assert '\n' not in str(caught.value)


def test_only_gated_t5():
    shapes = {
        'shared.weight': (99, 32),
        'encoder.block.0.layer.0.SelfAttention.q.weight': (40, 32),
        'encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight': (32, 4),
        'encoder.block.0.layer.1.DenseReluDense.wi_0.weight': (64, 32),
    }
    config = {'model_type': 't5', 'feed_forward_proj': 'gated-gelu', 'num_heads': 4}
    _, model, _ = text_encoders.model_of(said(config, shapes), 77)
    assert model['network'] == dict(
        name='t5', vocabulary=99, channels=32, blocks=1, heads=4, head_channels=10, hidden=64, buckets=32, furthest=128,
        length=77,
    )  # fmt: skip
    with pytest.raises(UserError, match="feed_forward_proj is 'relu'"):
        text_encoders.model_of(said({'model_type': 't5'}, shapes))


def test_where_a_tokenizer_lies(tmp_path, tokenizer):
    texts = Texts(VOCABULARY, LENGTH)
    for name in ('text_encoder', 'text_encoder_2', 'tokenizer'):
        os.mkdir(tmp_path / name)
    shutil.copytree(tokenizer[0], tmp_path / 'tokenizer_2')
    second, file = str(tmp_path / 'text_encoder_2'), str(tmp_path / 'all.safetensors')
    assert text_encoders.tokenizer_folder(second) == str(tmp_path / 'tokenizer_2')
    assert text_encoders.tokenizer_folder(file, suffix='_2') == str(tmp_path / 'tokenizer_2')
    assert text_encoders.read_tokenizer(texts, file, str(tmp_path), '_2', pad=0).pad == 0
    with pytest.raises(UserError, match=r'text_encoder holds no tokenizer.* --tokenizer=FOLDER'):
        text_encoders.read_tokenizer(texts, str(tmp_path / 'text_encoder'))
    with pytest.raises(UserError, match='--tokenizer=nowhere holds no tokenizer'):
        text_encoders.read_tokenizer(texts, second, 'nowhere')
    with pytest.raises(UserError, match='tokens, and the text encoder 99: it is of another'):
        text_encoders.read_tokenizer(Texts(99, LENGTH), second)
    os.remove(tmp_path / 'tokenizer_2' / 'merges.txt')
    os.symlink(os.path.join(tokenizer[0], 'merges.txt'), tmp_path / 'tokenizer_2' / 'merges.txt')
    with pytest.raises(UserError, match='is a link out of its folder'):
        text_encoders.read_tokenizer(texts, second)


def test_an_encoder_is_not_trained(tmp_path, capfd, no_compile):
    assert run_main(['jaxgen', '--config=clip_text_l14:tiny', f'--workdir={tmp_path}/run']) == 2
    assert "nothing here trains the family 'encoder': import a published one" in capfd.readouterr().err
