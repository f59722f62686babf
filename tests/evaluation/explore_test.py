"""Explore: interpolation of latents, directions, neighbours, and the mode from end to end."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from PIL import Image
from support import mistake, tiny

from jaxgen import run
from jaxgen.evaluation import explore
from jaxgen.main import run_main
from jaxgen.train import train


def test_interpolations_of_two_points():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 4, 5))
    t = np.linspace(0, 1, 7)
    for between in (explore.linear, explore.spherical):
        points = between(a, b, t)
        assert points.shape == (3, 7, 4, 5)
        np.testing.assert_allclose(points[:, 0], a, atol=1e-12)
        np.testing.assert_allclose(points[:, -1], b, atol=1e-12)
    np.testing.assert_allclose(explore.linear(a, b, t)[:, 3], (a + b) / 2)
    # Equal angles on the circle between two orthogonal vectors of one length.
    x, y = np.array([[3.0, 0.0]]), np.array([[0.0, 3.0]])
    angles = t * np.pi / 2
    np.testing.assert_allclose(
        explore.spherical(x, y, t)[0], 3 * np.stack([np.cos(angles), np.sin(angles)], -1), atol=1e-12
    )
    # Parallel ones have a line between them, opposite ones too: no number is lost.
    np.testing.assert_allclose(explore.spherical(x, 2 * x, t), explore.linear(x, 2 * x, t))
    assert np.isfinite(explore.spherical(x, -x, t)).all()


def test_directions_of_vectors_are_axes_and_of_maps_principal_components():
    rng = np.random.default_rng(0)
    scale = np.array([0.5, 3.0, 1.0])
    axes, std = explore.directions(rng.normal(size=(2000, 3)) * scale)
    np.testing.assert_array_equal(axes, np.eye(3)[[1, 2, 0]])
    np.testing.assert_allclose(std, scale[[1, 2, 0]], rtol=0.1)
    hidden = rng.normal(size=8)
    hidden /= np.linalg.norm(hidden)
    maps = (2 * rng.normal(size=(500, 1)) * hidden + 0.1 * rng.normal(size=(500, 8))).reshape(500, 2, 2, 2)
    axes, std = explore.directions(maps)
    assert axes.shape[1:] == (2, 2, 2)
    np.testing.assert_allclose(abs((axes[0].ravel() * hidden).sum()), 1, atol=1e-3)
    np.testing.assert_allclose(std[0], 2, rtol=0.1)


class Examples:
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def take(self, index):
        return {'image': self.images[index]}


def test_nearest_equals_a_search_one_by_one():
    rng = np.random.default_rng(0)
    train_images = rng.integers(0, 256, (23, 4, 4, 1)).astype(np.uint8)
    samples = np.concatenate([train_images[[5, 9]], rng.integers(0, 256, (3, 4, 4, 1)).astype(np.uint8)])
    distance, numbers = explore.nearest(samples, Examples(train_images), 3, chunk=7)
    for i, image in enumerate(samples):
        by_hand = [np.sqrt(np.mean(((image.astype(float) - t) / 127.5) ** 2)) for t in train_images]
        np.testing.assert_array_equal(numbers[i], np.argsort(by_hand)[:3])
        np.testing.assert_allclose(distance[i], np.sort(by_hand)[:3])
    np.testing.assert_array_equal(distance[:2, 0], 0)


@pytest.mark.slow  # t-SNE
def test_a_map_separates_groups_and_frames_them_in_colours():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    z = rng.normal(size=(60, 5)) + 20 * labels[:, None]
    for method in ('pca', 'tsne'):
        points = explore.flat_map(z, method, 0)
        assert points.shape == (60, 2)
        centres = np.stack([points[labels == i].mean(0) for i in (0, 1)])
        nearer = np.square(points[:, None] - centres).sum(-1).argmin(1)
        np.testing.assert_array_equal(nearer, labels)
    images = np.full((2, 8, 8, 1), 7, np.uint8)
    sheet = explore.scatter(images, np.array([[0.0, 0.0], [1.0, 1.0]]), np.array([0, 1]), size=100)
    colours, counts = np.unique(sheet.reshape(-1, 3), axis=0, return_counts=True)
    assert {tuple(c) for c in colours} >= {(255, 255, 255), (7, 7, 7)} and len(colours) == 4
    # Two frames of 26 pixels, 20 of them the image.
    assert counts[(colours == 7).all(1)] == 2 * 400 and sorted(counts)[:2] == [276, 276]


@pytest.mark.slow  # trains
def test_explores_what_each_family_has(tmp_path, capfd):
    sheets = {
        'vae_digits': {'reconstructions', 'interpolation_linear', 'interpolation_spherical', 'traversals', 'map_pca',
                       'map_tsne', 'neighbours'},
        'conditional_gan_digits': {'interpolation_linear', 'interpolation_spherical', 'neighbours'},
        'classifier_digits': {'map_pca', 'map_tsne'},
    }  # fmt: skip
    for name, expected in sheets.items():
        workdir = str(tmp_path / name)
        train(tiny(name), workdir)
        assert run_main(['jaxgen', '--mode=explore', f'--workdir={workdir}', '--n=3', '--seed=1']) == 0
        out = os.path.join(workdir, 'explore', 'step4_ema_seed1_n3')
        assert {f[:-4] for f in os.listdir(out) if f.endswith('.png')} == expected, name
        with open(os.path.join(out, 'explore.json'), encoding='utf-8') as file:
            record = json.load(file)
        assert record['step'] == 4 and (record['copies']['n'] == 6) if 'neighbours' in expected else True
    row = Image.open(tmp_path / 'vae_digits' / 'explore' / 'step4_ema_seed1_n3' / 'interpolation_linear.png')
    cell = 48 + 3
    assert row.size == (explore.FRAMES * cell + 3, 3 * cell + 3)
    # Ends of an interpolation are reconstructions of the test images.
    whole = np.asarray(row)
    sheet = np.asarray(Image.open(tmp_path / 'vae_digits' / 'explore' / 'step4_ema_seed1_n3' / 'reconstructions.png'))
    np.testing.assert_array_equal(whole[3 : 3 + 48, 3 : 3 + 48], sheet[3 + cell : 3 + cell + 48, 3 : 3 + 48])
    capfd.readouterr()
    assert 'no run in' in mistake(capfd, '--mode=explore', f'--workdir={tmp_path / "none"}')


@pytest.mark.slow  # trains
def test_copies_are_recognised(tmp_path):
    """Training images as samples are copies; test images are not."""
    from jaxgen import data

    workdir = str(tmp_path / 'run')
    train(tiny('vae_digits'), workdir)
    trained = run.load(workdir)
    sources = {split: data.dataset(trained.config.data, split) for split in ('train', 'test')}

    class Copying:
        def __init__(self, split):
            self.config, self.assembled, self.split = trained.config, trained.assembled, split
            self.model = trained.model

        def sample(self, n, seed):
            return sources[self.split].take(np.arange(100, 100 + n))['image']

    metrics = {split: explore.explore(Copying(split), 2, 0, str(tmp_path / split)) for split in ('train', 'test')}
    assert metrics['train']['copies']['value'] == 1 and metrics['train']['distance_of_samples']['value'] == 0
    assert metrics['test']['copies']['value'] == 0
