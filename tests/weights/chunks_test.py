"""Prompts that are longer than a text encoder reads, in parts: as encoded by hand with transformers, and drawn by the
pipelines of diffusers with these embeddings."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import run_main
from text_pipelines import LENGTH, PIPELINES, save_tokenizer, saved

import jaxgen
from jaxgen import conditions, sample
from jaxgen.families import diffusion
from jaxgen.text import emphasis, tokenizers

PROMPTS = ['a red heart on a mat and a blue star on a mat, a red star', 'star star blue']
NEGATIVES = ['blurred', 'a mat a mat a mat a mat a mat a mat']
CHUNKS = 3


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    return save_tokenizer(str(tmp_path_factory.mktemp('tokenizer')))


def by_hand(theirs, texts):
    """int [n, CHUNKS, LENGTH]: the words of a text in parts, between a start and an end."""
    out = np.full((len(texts), CHUNKS, LENGTH), theirs.pad_token_id)
    for row, text in zip(out, texts, strict=True):
        words = theirs(text, add_special_tokens=False)['input_ids']
        for part, first in zip(row, range(0, CHUNKS * (LENGTH - 2), LENGTH - 2), strict=True):
            own = [theirs.bos_token_id, *words[first : first + LENGTH - 2], theirs.eos_token_id]
            part[: len(own)] = own
    return out


def test_tokens_of_parts(tokenizer):
    transformers = pytest.importorskip('transformers')
    ours = tokenizers.from_folder(tokenizer)
    theirs = transformers.CLIPTokenizer.from_pretrained(tokenizer)
    texts = [*PROMPTS, '', 40 * 'mat ']
    made = ours(texts, CHUNKS)
    np.testing.assert_array_equal(made.ids, by_hand(theirs, texts).reshape(4, -1))
    assert made.cut == 1 and ours.rest(40 * 'mat ', CHUNKS).strip().startswith('mat')
    assert ours.rest(PROMPTS[0], CHUNKS) == '' and ours.rest(PROMPTS[0])


def test_weights_of_words_in_parts(tokenizer):
    ours = tokenizers.from_folder(tokenizer)
    text, characters = emphasis.parsed('a red heart on a mat and a (blue:2) star')
    made, weights = ours([text], 2).ids[0], ours.weights(text, characters, 2)
    blue = ours.pieces('blue')
    start = next(i for i in range(len(made)) if made[i : i + len(blue)].tolist() == blue)
    expected = np.ones(2 * LENGTH)
    expected[start : start + len(blue)] = 2
    np.testing.assert_array_equal(weights, expected)


def embedded(theirs, case: str, texts):
    """(sequences, pooled vectors) of a pipeline's encoders: of each part by itself, of the first part."""
    torch = pytest.importorskip('torch')
    sequences, vectors = [], []
    for name in ('text_encoder', 'text_encoder_2')[: 1 if case == 'sd' else 2]:
        parts = torch.from_numpy(by_hand(theirs.tokenizer, texts))
        with torch.no_grad():
            made = [getattr(theirs, name)(parts[:, i], output_hidden_states=True) for i in range(CHUNKS)]
        sequences.append(torch.cat([x.last_hidden_state if case == 'sd' else x.hidden_states[-2] for x in made], 1))
        vectors.append(made[0][0])
    if case != 'sd3':
        return torch.cat(sequences, -1), vectors[-1]
    with torch.no_grad():  # T5 reads one part
        t5 = theirs._get_t5_prompt_embeds(texts)
    joined = torch.cat(sequences, -1)
    joined = torch.nn.functional.pad(joined, (0, t5.shape[-1] - joined.shape[-1]))
    return torch.cat([joined, t5], 1), torch.cat(vectors, -1)


@pytest.mark.slow
@pytest.mark.parametrize('case', ['sd', 'sdxl', 'sd3'])
def test_images_of_long_prompts(case, tokenizer, tmp_path, monkeypatch, capsys):
    torch = pytest.importorskip('torch')
    theirs = saved(PIPELINES[case][0], tokenizer, tmp_path / 'hub')
    command = ['jaxgen', '--mode=import', f'--from={tmp_path}/hub', f'--workdir={tmp_path}/run']
    assert run_main(command) == 0, capsys.readouterr()
    changes = {'model.sampler.steps': 10, 'model.guidance.scale': 3.0, 'model.editing.prompt_chunks': CHUNKS}
    run = jaxgen.load(str(tmp_path / 'run'), config=changes)
    shape = run.assembled.context.stages['first'].latents.shape
    noise = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    (tokens, pooled), (absent, other) = embedded(theirs, case, PROMPTS), embedded(theirs, case, NEGATIVES)
    more = {} if case == 'sd' else dict(pooled_prompt_embeds=pooled, negative_pooled_prompt_embeds=other)
    theirs.set_progress_bar_config(disable=True)
    images = 2 * theirs(
        prompt_embeds=tokens, negative_prompt_embeds=absent, height=32, width=32, guidance_scale=3.0,
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()), num_inference_steps=10, output_type='np', **more,
    ).images - 1  # fmt: skip
    arrays = conditions.first(run.assembled, run.config, 2, {'caption': PROMPTS, 'negative_caption': NEGATIVES})
    batch = sample.to_inside({name: jnp.asarray(x) for name, x in arrays.items()})
    monkeypatch.setattr(diffusion, 'normal', lambda keys, shape: jnp.asarray(noise))
    family = run.assembled.family
    draw = jax.jit(lambda state, frozen: family.sample(state, frozen, batch, jax.random.key(0), family.settings()))
    np.testing.assert_allclose(draw(run.state, run.assembled.frozen), np.clip(images, -1, 1), atol=1e-3)


@pytest.mark.slow
def test_parts_where_no_sequence_of_a_clip_is_read(tokenizer, tmp_path, capsys):
    saved(PIPELINES['flux'][0], tokenizer, tmp_path / 'hub')
    assert run_main(['jaxgen', '--mode=import', f'--from={tmp_path}/hub', f'--workdir={tmp_path}/run']) == 0
    capsys.readouterr()
    command = ['jaxgen', '--mode=sample', f'--workdir={tmp_path}/run', '--n=1', '--condition=caption=a mat']
    assert run_main([*command, '--config.model.editing.prompt_chunks=2']) == 2
    assert 'prompt_chunks is of networks that read the sequences of a CLIP' in capsys.readouterr().err
