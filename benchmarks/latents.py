"""Whether the autoencoder or the model of its latents limits a latent diffusion of scenes, by the scenes' classifier.

    python benchmarks/latents.py --first=runs/kl_shapes --model=runs/ldm_text_shapes --images=latents.png

Three things that have the same decoder: images that are reconstructed from their own latents; from these with noise
added, of so many of their standard deviations, which says how exact a model's latents must be; and samples of a model.
Of each the fraction of right shapes, colours, sizes and backgrounds and of images of which all four are right (samples
are requested by held-out captions, where the model reads any), and the fraction of which the classifier gives one shape
a probability above 0.8. Of the latents mean, standard deviation, and those of each channel beside the posterior's:
config.model.latent_shift is the first, latent_scale one over the second. The image has rows of examples: the originals,
the reconstructions at each noise, the samples, every pixel enlarged.
"""

from __future__ import annotations

import argparse
import json

import jax
import numpy as np

import jaxgen
from jaxgen import data, files, sample
from jaxgen.data.shapes import CAPTIONED_FACTORS, FACTORS

SURE = 0.8  # probability of the likeliest shape
SHOWN, ZOOM = 12, 5  # images of a row; pixels of each side that one pixel becomes


def measure(classifier, images: np.ndarray, factors: np.ndarray, requested: bool = True) -> dict[str, float]:
    """Fractions of images uint8 [n, H, W, C]: of those that show the factors int32 [n, 7], and 'sure'.

    requested: whether there are factors that they should show; else only 'sure' is measured.
    """
    features = classifier.features
    right: dict[str, list[np.ndarray]] = {name: [] for name in (*CAPTIONED_FACTORS, 'all four', 'sure')}
    correct, apply = jax.jit(features.correct), jax.jit(features.apply)
    for start in range(0, len(images), size := min(256, len(images))):
        part, of_part = images[start : start + size], factors[start : start + size]
        there = len(part)
        padded = {'image': np.resize(part, (size, *part.shape[1:])), 'factors': np.resize(of_part, (size, 7))}
        each = {k: np.asarray(v)[:there] for k, v in correct(features.variables, padded).items()}
        named = {name: each[f'accuracy/{list(FACTORS).index(name)}'] for name in CAPTIONED_FACTORS}
        named['all four'] = np.prod(list(named.values()), 0)
        logits = np.asarray(apply(features.variables, padded['image'])['logits'])[:there]
        named['sure'] = np.asarray(jax.nn.softmax(logits)).max(-1) > SURE
        for name, x in named.items():
            right[name].append(x)
    means = {name: round(float(np.concatenate(parts).mean()), 4) for name, parts in right.items()}
    return means if requested else {'sure': means['sure']}


def psnr(x: np.ndarray, y: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 images, dB."""
    return round(float(10 * np.log10(255**2 / np.square(x.astype(np.float32) - y).mean())), 2)


def noise_of(run, images: np.ndarray) -> np.ndarray | None:
    """The posterior's standard deviation of each channel, a mean; None: the stage has no posterior."""
    posterior = run.assembled.family.posterior
    if posterior is None:
        return None
    moments = jax.jit(lambda s, f, b, k: posterior.moments(s, f, sample.to_inside(b), k))
    made = moments(run.state, run.assembled.frozen, {'image': images}, jax.random.key(0))
    return np.exp(0.5 * np.asarray(made['log_var'])).mean((0, 1, 2))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--first', default='runs/kl_shapes', help='run of the autoencoder')
    parser.add_argument('--model', default='', help='run of a model of its latents')
    parser.add_argument('--classifier', default='runs/classifier_shapes')
    parser.add_argument('--size', type=int, default=0, help='of the images; 0: that of the training of --first')
    parser.add_argument('--noise', default='0,0.1,0.2,0.3,0.5', help='standard deviations, of those of the latents')
    parser.add_argument('--n', type=int, default=512)
    parser.add_argument('--images', default='', help='PNG that is written')
    parser.add_argument('--out', default='', help='JSON that is written')
    args = parser.parse_args()

    sizes = {'data.size': args.size} if args.size else {}
    classifier, first = jaxgen.load(args.classifier), jaxgen.load(args.first, config=sizes)
    section = {**first.config.data.to_dict(), 'features': ('image', 'factors')}
    examples = data.dataset(section, 'test').take_cyclic(np.arange(args.n))
    x, factors = examples['image'], examples['factors']
    rows = [x]
    results: dict = {'n': args.n, 'originals': measure(classifier, x, factors)}
    z = first.encode(x)
    std = z.std((0, 1, 2))
    results['latents'] = {'mean': float(z.mean()), 'std': float(z.std()), 'std by channel': std.tolist()}
    if (noise := noise_of(first, x[:256])) is not None:
        results['latents']['std of the posterior'] = noise.tolist()
    draw = np.random.default_rng(0)
    for sigma in map(float, args.noise.split(',')):
        y = first.decode(z + sigma * std * draw.standard_normal(z.shape, np.float32))
        results[f'noise {sigma:g}'] = measure(classifier, y, factors) | {'psnr': psnr(x, y)}
        rows.append(y)
    if args.model:
        model = jaxgen.load(args.model)
        captioned = 'caption' in model.assembled.family.conditions
        # Without a condition, sample i is drawn under the conditions of test example i.
        samples = model.sample(args.n)
        results['samples'] = measure(classifier, samples, factors, captioned)
        rows.append(samples)
    for name, values in results.items():
        print(name, values)
    if args.images:
        shown = min(SHOWN, args.n)
        grid = np.concatenate([np.concatenate(list(row[:shown]), 1) for row in rows])
        files.save_png(args.images, grid.repeat(ZOOM, 0).repeat(ZOOM, 1))
    if args.out:
        with open(args.out, 'w', encoding='utf-8') as file:
            json.dump(results, file, indent=2)


if __name__ == '__main__':
    main()
