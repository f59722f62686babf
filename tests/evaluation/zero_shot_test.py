"""Prompts of classes, and what a CLIP run measures by command: of its own data, and of another run's samples."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from support import mistake, path

import jaxgen
from jaxgen import config as configs
from jaxgen import data
from jaxgen.data import shapes
from jaxgen.errors import UserError
from jaxgen.evaluation import prompts
from jaxgen.main import run_main
from jaxgen.metrics import retrieval
from jaxgen.train import train

SECTION = dict(source='shapes', size=8, channels=3, features=('image', 'caption'))


def test_slots_that_are_not_asked_for_go_through_all_values():
    made = prompts.tasks(('a {size} {}', 'the {colour} {}', '{}'), {**configs.load(path('clip_shapes')).data.to_dict()})
    assert set(made) == {f'zero_shot_accuracy{name}' for name in ('', '/size', '/colour')}
    shape = made['zero_shot_accuracy']
    assert shape.attribute.feature == 'label' and len(shape.prompts) == 8
    expected = [
        *(f'a {size} star' for size in shapes.SIZES),
        *(f'the {colour} star' for colour in shapes.COLOURS),
        'star',
    ]
    assert shape.prompts[shapes.SHAPES.index('star')] == expected
    size = made['zero_shot_accuracy/size']
    assert size.prompts[1] == [f'a medium {name}' for name in shapes.SHAPES]
    assert (size.attribute.feature, size.attribute.entry) == ('factors', list(shapes.FACTORS).index('size'))


def test_factors_have_the_names_that_captions_say():
    known = prompts.attributes({**configs.load(path('clip_shapes')).data.to_dict()})
    source = data.dataset({**SECTION, 'features': ('image', 'caption', 'factors', 'label')}, 'test')
    for i in range(20):
        example = source[i]
        words = shapes.decode_caption(example['caption']).split()
        for name, attribute in known.items():
            value = np.asarray(example[attribute.feature])
            value = value if attribute.entry is None else value[attribute.entry]
            assert attribute.names[int(value)] in words, name


def test_templates_of_nothing_in_the_data(monkeypatch):
    monkeypatch.setattr(prompts, 'MOST_PROMPTS', 10_000)
    section = configs.load(path('clip_shapes')).data.to_dict()
    with pytest.raises(UserError, match=r'{hue} is unknown; shapes has {}, {shape}'):
        prompts.tasks(('a {hue} {}',), section)
    with pytest.raises(UserError, match='12,288 prompts, of 10,000'):
        prompts.tasks(('{} {shape} {colour} {background} {size} {} {shape}',), section)
    points = configs.load(path('gan_gaussians')).data.to_dict()
    assert prompts.tasks(('a photo of a {}',), points) == {}, 'neither classes nor factors'


def test_accuracy_is_that_of_the_nearest_mean(monkeypatch):
    """Texts in the plane: the mean of a class's directions decides, whatever their number."""
    at = {'east': 0.0, 'north-east': 45.0, 'north': 90.0, 'west': 180.0}

    def encode(texts):
        angles = np.radians([at[text] for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], 1)

    task = prompts.Task(prompts.Attribute('label', None, ('a', 'b')), [['east', 'north-east', 'north'], ['west']])
    angles = np.radians([0.0, 45, 112, 113, 200])  # the border is at (45 + 180) / 2
    images = np.stack([np.cos(angles), np.sin(angles)], 1)
    logits = prompts.logits(images, encode, task.prompts, 3.0)
    assert prompts.accuracy(task, logits, np.array([0, 0, 0, 0, 1]))['value'] == 0.8
    third = task._replace(attribute=task.attribute._replace(entry=1))
    values = np.array([[5, 0], [5, 0], [5, 0], [5, 1], [5, 1]])
    assert prompts.accuracy(third, logits, values)['value'] == 1
    # Probabilities: the mean over a class's prompts of exp(3 cos).
    monkeypatch.setattr(prompts, 'ROWS', 2)
    each = np.exp(3 * images @ encode(list(at)).T)
    expected = np.log(np.stack([each[:, :3].mean(1), each[:, 3]], 1))
    logits = prompts.logits(images, encode, task.prompts, 3.0, 'probabilities')
    np.testing.assert_allclose(logits, expected, rtol=1e-12)
    far = prompts.logits(images, encode, task.prompts, 3e4, 'probabilities')
    assert not np.isnan(far).any() and far.argmax(1).tolist() == [0, 0, 0, 0, 1]


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """{name: directory} of runs that have hardly learned anything."""
    folder = tmp_path_factory.mktemp('runs')
    made = {}
    for name in ('clip_shapes', 'classifier_shapes', 'attngan_shapes', 'beta_vae_shapes'):
        config = configs.load(path(name))
        steps = 100 if name == 'clip_shapes' else 2
        config.train.steps, config.train.save_every, config.train.log_every = steps, steps, steps
        config.evaluate.samples = config.evaluate.examples = 130
        if name == 'clip_shapes':
            config.seed, config.model.text.length, config.model.features, config.data.batch = 1, 16, 16, 32
        made[name] = str(folder / name)
        train(config, made[name])
    return made


def evaluation(workdir: str) -> dict:
    with open(os.path.join(workdir, 'evaluation.json'), encoding='utf-8') as file:
        return json.load(file)


@pytest.mark.slow
def test_samples_of_captions_are_measured_by_a_clip_run(runs):
    clip, workdir = runs['clip_shapes'], runs['attngan_shapes']
    args = ['jaxgen', '--mode=evaluate', f'--workdir={workdir}', f'--config.evaluate.clip=run:{clip}']
    assert run_main([*args, f'--features=run:{runs["classifier_shapes"]}']) == 0
    record = evaluation(workdir)
    values = record['metrics']
    assert record['clip']['name'] == 'clip_shapes' and record['features']['name'] == 'classifier_shapes'
    assert {'conditional_accuracy/caption/classifier_shapes', 'frechet/classifier_shapes'} <= set(values)
    # The same of the samples and the captions that they are drawn for, by hand.
    run, reader = jaxgen.load(workdir), jaxgen.load(clip)
    images = run.sample(130)
    test = data.dataset(run.config.data, 'test').take(np.arange(130))
    captions = [shapes.decode_caption(x) for x in test['caption']]
    embeddings, texts = reader.encode(images), reader.encode_text(captions)
    cosines = (embeddings * texts).sum(1)
    assert (cosines > 0).any()
    assert values['clip_score/clip_shapes']['value'] == pytest.approx(100 * np.maximum(cosines, 0).mean(), abs=1e-3)
    assert values['clip_score/clip_shapes']['n'] == values['r_precision/clip_shapes']['n'] == 130
    same = np.unique(captions, return_inverse=True)[1]
    right = retrieval.r_precision(embeddings, texts, same)
    assert values['r_precision/clip_shapes']['value'] == pytest.approx(right.mean(), abs=2 / 130)
    assert values['r_precision/clip_shapes']['of'] == 100
    training = data.dataset(run.config.data, 'train')
    real = reader.encode(training.take(np.arange(len(training)))['image'])
    expected = jaxgen.metrics.clip_distance(embeddings, real)
    assert values['cmmd/clip_shapes']['value'] == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert values['cmmd/clip_shapes']['n_reference'] == len(training)
    # Named as the features, it gives the same beside the distances of these.
    assert run_main([*args[:3], f'--features=run:{clip}']) == 0
    again = evaluation(workdir)['metrics']
    assert {'frechet/clip_shapes', 'precision/clip_shapes'} <= set(again)
    for name in ('clip_score', 'r_precision', 'cmmd'):
        assert again[f'{name}/clip_shapes']['value'] == pytest.approx(values[f'{name}/clip_shapes']['value'], rel=1e-4)


@pytest.mark.slow
def test_samples_without_captions_have_a_distance_alone(runs, tmp_path):
    args = ['jaxgen', '--mode=evaluate', f'--workdir={runs["beta_vae_shapes"]}', '--features=none', '--n=8']
    assert run_main([*args, f'--config.evaluate.clip=run:{runs["clip_shapes"]}']) == 0
    values = evaluation(runs['beta_vae_shapes'])['metrics']
    assert values['cmmd/clip_shapes']['n'] == 8
    assert not [name for name in values if name.startswith(('clip_score', 'r_precision', 'frechet'))]
    folder = tmp_path / 'images'
    folder.mkdir()
    for i, image in enumerate(jaxgen.load(runs['beta_vae_shapes']).sample(8)):
        jaxgen.files.save_png(str(folder / f'{i}.png'), image)
    out = str(tmp_path / 'out')
    fields = ['--mode=evaluate', f'--images={folder}', f'--config={path("beta_vae_shapes")}', f'--out={out}']
    fields += ['--features=none', f'--config.evaluate.clip=run:{runs["clip_shapes"]}']
    assert run_main(['jaxgen', *fields]) == 0
    of_folder = evaluation(out)['metrics']['cmmd/clip_shapes']
    assert of_folder['value'] == pytest.approx(values['cmmd/clip_shapes']['value'], rel=1e-4)


@pytest.mark.slow
def test_a_clip_run_classifies_its_test_images_by_prompts(runs):
    template = 'a {size} {colour} {shape} on a {background} background'
    args = ['jaxgen', '--mode=evaluate', f'--workdir={runs["clip_shapes"]}']
    assert run_main([*args, f"--config.evaluate.templates=('a {{}}', '{template}')"]) == 0
    values = evaluation(runs['clip_shapes'])['metrics']
    names = {'', '/shape', '/colour', '/size', '/background'}
    assert {f'zero_shot_accuracy{name}' for name in names} == {n for n in values if n.startswith('zero_shot')}
    run = jaxgen.load(runs['clip_shapes'])
    test = data.dataset({**SECTION, 'features': ('image', 'label')}, 'test').take(np.arange(130))
    ensemble = configs.load(path('clip_shapes')).evaluate.ensemble
    predicted = run.zero_shot(test['image'], shapes.SHAPES, ('a {}',), ensemble).argmax(1)
    assert values['zero_shot_accuracy']['value'] == pytest.approx((predicted == test['label']).mean(), abs=1 / 130)
    assert values['zero_shot_accuracy']['n'] == 130 and 'r_precision' in values


@pytest.mark.slow
def test_mistakes_come_before_any_compile(runs, no_compile, capfd):
    args = ['--mode=evaluate', f'--workdir={runs["attngan_shapes"]}', '--features=none']
    assert 'no run in /nowhere; train it first' in mistake(capfd, *args, '--config.evaluate.clip=run:/nowhere')
    message = mistake(capfd, *args, f'--config.evaluate.clip=run:{runs["classifier_shapes"]}')
    assert 'must be a run of clip' in message
    assert "'run:PATH' or 'none'" in mistake(capfd, *args, '--config.evaluate.clip=clip_shapes')
    clip = ['--mode=evaluate', f'--workdir={runs["clip_shapes"]}']
    assert '{hue} is unknown' in mistake(capfd, *clip, "--config.evaluate.templates=('a {hue}',)")
