"""CLIP: its loss, its runs and their tokenizers, texts by command and from Python."""

import glob
import os
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from support import assemble, context, first_batch, main, tiny

import jaxgen
from jaxgen import assembly
from jaxgen.errors import UserError
from jaxgen.text import tokenizers


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    workdir = str(tmp_path_factory.mktemp('clip') / 'run')
    jaxgen.train(tiny('clip_shapes', train=dict(steps=4, save_every=2), evaluate=dict(examples=40)), workdir)
    return workdir


@pytest.fixture(scope='module')
def run(trained):
    return jaxgen.load(trained)


def test_loss_is_the_contrastive_one_of_whole_batches():
    """By NumPy from the two towers' outputs, duplicates counted."""
    config = tiny('clip_shapes', model=dict(duplicates='count'), data=dict(batch=6))
    a, batch = assemble(config), first_batch(config)
    state = jax.jit(a.family.init)(jax.random.key(0), batch, {})
    images = np.asarray(jax.jit(a.family.encode)(state, {}, batch, jax.random.key(0)), np.float64)
    texts = np.asarray(jax.jit(a.family.encode_text)(state, {}, batch['tokens']).embedding, np.float64)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, rtol=1e-5)
    logits = np.exp(images @ texts.T / 0.07)
    own = np.diagonal(logits)
    expected = -(np.log(own / logits.sum(1)) + np.log(own / logits.sum(0))).mean() / 2
    _, logs = jax.jit(a.family.update)(state, {}, batch, jax.random.key(1))
    np.testing.assert_allclose(logs['loss'], expected, rtol=1e-4)


def test_the_scale_has_an_upper_end():
    config = tiny('clip_shapes', model=dict(temperature=0.07, largest_scale=5.0))
    a, batch = assemble(config), first_batch(config)
    state = jax.jit(a.family.init)(jax.random.key(0), batch, {})
    assert np.isclose(np.exp(state.params['scale']['value']), 1 / 0.07)
    _, logs = jax.jit(a.family.update)(state, {}, batch, jax.random.key(1))
    assert logs['scale'] == 5


def test_a_run_keeps_its_tokenizer(trained, run, tmp_path):
    """What is trained on the captions goes with the run, and not with the data."""
    kept = tokenizers.from_folder(os.path.join(trained, 'tokenizer'))
    assert kept.length == 8 and 514 < kept.vocabulary <= 520
    moved = tmp_path / 'moved'
    shutil.copytree(trained, moved)
    loaded = jaxgen.load(str(moved))
    texts = ['a small red circle', 'whatever is not in a caption: Ünïcode ☕']
    np.testing.assert_array_equal(loaded.encode_text(texts), run.encode_text(texts))
    for file in glob.glob(os.path.join(moved, 'tokenizer', '*')):
        os.remove(file)
    with pytest.raises(UserError, match='no tokenizer'):
        jaxgen.load(str(moved)).encode_text(texts)


def test_texts_and_images_from_python(run):
    texts = ['a red circle', 'a blue square', 'a red circle']
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    embeddings = run.encode_text(texts)
    assert embeddings.shape == (3, 4) and embeddings.dtype == np.float32
    np.testing.assert_array_equal(embeddings[0], embeddings[2])
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(run.similarity(images, texts), run.encode(images) @ embeddings.T, atol=1e-6)
    with pytest.raises(UserError, match='a list'):
        run.encode_text('a red circle')


def test_evaluation_has_retrieval_both_ways(run):
    results = run.evaluate()
    assert {'similarity', 'recall@1/text', 'recall@5/image'} <= results.keys()
    assert all(0 <= results[f'recall@{k}/{which}']['value'] <= 1 for k in (1, 5, 10) for which in ('text', 'image'))
    assert results['recall@1/text']['value'] <= results['recall@10/text']['value']


def test_captions_are_needed(tmp_path):
    config = tiny('clip_shapes', data=dict(features=('image',)))
    with pytest.raises(UserError, match='must hold caption'):
        assembly.assemble(config)


def test_a_patch_that_does_not_fit_gets_a_line():
    process = main('--config=configs/clip_shapes.py:tiny', '--config.model.vision.patch=3', '--workdir=runs/none')
    assert process.returncode == 2 and 'config.model.vision.patch' in process.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ('variant', 'parameters', 'vision', 'text'),
    [
        ('vit_b32', 151_277_313, 87_849_216, 63_428_096),
        ('vit_b16', 149_620_737, None, None),
        ('', 427_616_513, 303_966_208, 123_650_304),
    ],
)
def test_published_sizes(variant, parameters, vision, text):
    """As instantiated from openai/CLIP@d05afc4, see docs/published_sizes.md."""
    from support import path

    from jaxgen import config as configs

    params = assembly.assemble(configs.load(path('clip_vit_l14', variant))).abstract.params
    sizes = {name: sum(leaf.size for leaf in flatten_dict({'': tree}).values()) for name, tree in params.items()}
    assert sum(sizes.values()) == parameters
    assert vision is None or (sizes['vision'], sizes['text']) == (vision, text)


def test_context_is_checked():
    with pytest.raises(UserError, match='multiple of heads'):
        from jaxgen.families import clip

        clip.build(context((8, 8, 3)), text=dict(channels=10, heads=4), vision=dict(patch=8, channels=8, heads=2))
