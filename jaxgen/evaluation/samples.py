"""Metrics of samples, or of any images, against a data set, in the features of a network.

A network with the data set that samples are compared with is an `Evaluator`; what it needs of either side are
`Statistics` (jaxgen/metrics/statistics.py).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from jaxgen import data, log, sample, sharding
from jaxgen.errors import UserError
from jaxgen.evaluation import cache, conditional
from jaxgen.evaluation.bound import BoundModel
from jaxgen.evaluation.held_out import mean, r_precision
from jaxgen.metrics import edges, masks, neighbours, retrieval, scores
from jaxgen.metrics import features as networks
from jaxgen.metrics.moments import frechet
from jaxgen.metrics.statistics import KEPT, Statistics, cached, gather, published
from jaxgen.sections import sides

CLIP = 'clip/'  # names of what a CLIP run gives of samples begin with it
# What samples are compared with the image of a condition by, {condition: function of both}; its name is the prefix of
# those metrics' names.
REQUESTED: dict[str, Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]] = {
    'edges': edges.match,
    'mask': masks.match,
}
BY_REQUEST = tuple(f'{name}_' for name in REQUESTED)
OWN = 'own/'  # name of the samples themselves, where the data have metrics of their own
KID_SUBSET = 1000  # images of one of KID's subsets (Binkowski et al. 2018)
# Metrics of which larger values are better.
LARGER: tuple[str, ...] = ('inception_score', 'precision', 'recall', 'density', 'coverage', 'authenticity', 'modes')
ENOUGH = 10  # images per dimension: with fewer, the Frechet distance is mostly bias


def distances(fake: Statistics, real: Statistics) -> dict[str, dict]:
    """Distances between two sets: 'frechet', 'sfid' of spatial features where there are any, and 'kid' where more than
    moments is known."""
    counts = {'n': fake.moments.n} | ({} if real.published else {'n_reference': real.moments.n})
    metrics: dict[str, dict] = {'frechet': {'value': frechet(fake.moments, real.moments), **counts}}
    if fake.spatial is not None and real.spatial is not None:
        metrics['sfid'] = {'value': frechet(fake.spatial, real.spatial), **counts}
    if real.published:
        return metrics
    subset = min(KID_SUBSET, len(fake.features), len(real.features))
    value, std = scores.kernel_distance(fake.features, real.features, size=subset)
    metrics['kid'] = {'value': value, 'std': std, 'n': len(fake.features), 'n_reference': len(real.features)}
    metrics['kid']['subset'] = subset
    return metrics


def fidelity_and_diversity(fake: Statistics, real: Statistics, training: bool) -> dict[str, dict]:
    """Fractions by nearest neighbours: 'precision', 'recall', 'density', 'coverage', and 'authenticity' where the data
    set is that of training and all of its features are kept: a copy of an image without them would pass as new."""
    m = min(len(fake.features), len(real.features))  # both sets of one size
    fractions = neighbours.neighbourhood(real.features[:m], fake.features[:m])
    authenticity = fractions.pop('authenticity')
    metrics = {name: {'value': value, 'n': m, 'n_reference': m} for name, value in fractions.items()}
    if training and len(real.features) < real.moments.n:
        log.say(
            f'no authenticity: features of {len(real.features)} of the {real.moments.n} training images are kept, and '
            'copies of the others would pass'
        )
    elif training:
        if m < len(real.features):  # a copy is recognised only where its original is
            authenticity = neighbours.neighbourhood(real.features, fake.features)['authenticity']
        metrics['authenticity'] = {'value': authenticity, 'n': m, 'n_reference': len(real.features)}
    return metrics


def clip_distance(fake: np.ndarray, real: np.ndarray) -> dict:
    """The entry 'cmmd' of embeddings of images [n, d] against those of a data set."""
    return {'value': scores.gaussian_discrepancy(fake, real), 'n': len(fake), 'n_reference': len(real)}


def compare(fake: Statistics, real: Statistics, name: str, training: bool, clip: bool = False) -> dict[str, dict]:
    """{metric/NAME: {'value', 'n', 'n_reference', ...}} of images against a data set.

    frechet            distance of two Gaussians (FID, where the network is Inception)
    sfid               the same of spatial features (Nash et al. 2021)
    kid                squared maximum mean discrepancy, mean over subsets
    inception_score    of the images alone
    precision, recall  fraction of each set inside the other's neighbourhoods of 3; sets of one size
    density, coverage  the same with neighbourhoods of 5, robust to outliers
    authenticity       fraction of images that are not copies of training images
    modes, class_kl    classes with a sample; divergence of the class distribution from that of the data, nats
    cmmd               maximum mean discrepancy of a CLIP run's embeddings

    Args:
      name: the network's.
      training: the data set is what the model was trained on; authenticity is of nothing else.
      clip: the features are embeddings of a CLIP run.
    """
    metrics = distances(fake, real)
    if fake.logits is not None:
        value, std = scores.inception_score(fake.logits)
        metrics['inception_score'] = {'value': value, 'std': std, 'n': len(fake.logits)}
    if real.published:
        return {f'{metric}/{name}': entry for metric, entry in metrics.items()}
    metrics |= fidelity_and_diversity(fake, real, training)
    if clip:
        metrics['cmmd'] = clip_distance(fake.features, real.features)
    if fake.logits is not None:
        modes, kl = scores.class_balance(fake.logits, real.counts)
        metrics['modes'] = {'value': modes, 'n': len(fake.logits), 'of': len(real.counts)}
        metrics['class_kl'] = {'value': kl, 'n': len(fake.logits), 'n_reference': int(real.counts.sum())}
    return {f'{metric}/{name}': entry for metric, entry in metrics.items()}


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """A network, and the data set that images are compared with in its features."""

    features: networks.Features
    section: dict  # the config's section `data`: the set, and how its images are preprocessed
    split: str
    mesh: Any
    size: int  # images in one batch of the network
    published: str = ''  # a file of moments that images are compared with in place of the data set

    @functools.cached_property
    def source(self):
        """The data set's examples."""
        return data.dataset({**self.section, 'features': ('image',)}, self.split)

    @property
    def image(self) -> tuple[int, int, int]:
        """H, W, C of its images."""
        return (*sides(self.section['size']), self.section['channels'])

    @property
    def folder(self) -> str:
        """Where statistics of data sets are kept."""
        return os.path.join(data.root(self.section), 'statistics')

    def check(self, n: int) -> None:
        """Raises UserError where n images, or the data set, are too few to be evaluated; warns where they are few."""
        outputs = self.features.shapes(self.image)
        widest = max(outputs['features'], outputs.get('spatial', 0))
        counts = [(n, 'images')]
        if self.published:
            _ = self.reference  # its mistakes come first
        else:
            counts.append((len(self.source), f'images in the split {self.split!r}'))
        for count, what in counts:
            if count <= widest:
                raise UserError(
                    f'{count} {what} are too few: the Frechet distance of {widest} features ({self.features.name}) '
                    f'needs more than {widest} images on either side'
                )
        if n < ENOUGH * outputs['features']:
            log.say(
                f'{n} images are few for {outputs["features"]} features: their Frechet distance is biased upwards, '
                'so compare it with others of as many images only'
            )

    def metric_names(self) -> list[str]:
        """Names of the metrics that `compare` gives in any case."""
        outputs = self.features.shapes(self.image)
        if self.published:
            return [f'frechet/{self.features.name}']
        names = ['frechet', *(['sfid'] if 'spatial' in outputs else []), 'kid']
        names += ['inception_score', 'modes', 'class_kl'] if 'logits' in outputs else []
        names += ['cmmd'] if self.features.texts else []
        return [f'{name}/{self.features.name}' for name in (*names, 'precision', 'recall', 'density', 'coverage')]

    def batch(self, n: int) -> int:
        """Images in one batch, of n in all."""
        return sharding.round_up(self.mesh, min(self.size, n))

    def extract(self, images: np.ndarray, n: int) -> dict[str, np.ndarray]:
        """Outputs of the network for uint8 images [b, H, W, C], some of a set of n, in batches of one shape."""
        size = self.batch(n)
        cuts = range(0, len(images), size)
        parts = [networks.extract(self.features, self.mesh, images[i : i + size], size) for i in cuts]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def pieces(self, take: Callable[[int, int], np.ndarray], n: int, title: str) -> Iterator[dict]:
        """`extract` of n images, batch by batch, with a progress bar; `take(start, stop)` gives them."""
        size = self.batch(n)
        with log.bar(n, title, jax.process_index() != 0) as bar:
            for start in range(0, n, size):
                stop = min(start + size, n)
                yield self.extract(take(start, stop), n)
                bar.update(stop - start)

    @functools.cached_property
    def reference(self) -> Statistics:
        """Statistics of the data set, from the cache if they are there, or of a published file."""
        if self.published:
            return published(self.published, self.features.shapes(self.image))
        n, name = len(self.source), self.section['source']

        def make() -> Statistics:
            title = f'{self.split} split of {name}'
            return gather(self.pieces(lambda i, j: self.source.take(np.arange(i, j))['image'], n, title), n)

        key = f'{self.source.identity} n={n} {self.features.digest}'
        title = f'{name.partition(":")[0].replace("/", "_")}-{self.split}-{self.features.name}'
        return cached(self.folder, title, key, make)

    def compare(self, pieces: Iterable[dict], n: int) -> dict[str, dict]:
        """Metrics of n images, of whose `extract` these are the pieces; see `compare`."""
        real = self.reference  # before the pieces are made: it has a progress bar of its own
        clip = self.features.texts is not None
        return compare(gather(pieces, n), real, self.features.name, self.split == 'train', clip)

    def compare_images(self, images, title: str) -> dict[str, dict]:
        """Metrics of images, uint8 [n, H, W, C] or any sequence of such slices."""
        return self.compare(self.pieces(lambda i, j: images[i:j], len(images), title), len(images))

    def about(self) -> dict:
        """The entries of evaluation.json on the network and the data set."""
        outputs = self.features.shapes(self.image)
        network = {'name': self.features.name, 'sha256': self.features.digest, 'dimensions': outputs}
        if self.published:
            with open(self.published, 'rb') as file:
                digest = hashlib.file_digest(file, 'sha256').hexdigest()
            return {'features': network, 'reference': {'file': os.path.basename(self.published), 'sha256': digest}}
        source = self.section.get(f'{self.split}_source') or self.section['source']
        return {
            'features': network,
            'reference': {'source': source, 'split': self.split, 'n': len(self.source)},
        }


Conditions = dict[str, np.ndarray]  # of samples, by name; see conditions.provider
APART = (conditional.PREFIX, CLIP, OWN, *BY_REQUEST)  # names of what is no output of the evaluator's network
WITH_HOLES = ('image', 'masked')  # conditions beside which a mask says what is missing of an image


def requested(conditions: Conditions, shape: tuple[int, ...]) -> list[str]:
    """The conditions, images of one channel, that samples [*shape] are compared with, of REQUESTED."""
    names = [name for name in REQUESTED if name in conditions and conditions[name].shape[1:] == (*shape[1:3], 1)]
    return [name for name in names if name != 'mask' or not set(WITH_HOLES) & set(conditions)]


@dataclasses.dataclass(frozen=True)
class Measures:
    """What samples are measured with, one of the first and the last at least."""

    evaluator: Evaluator | None = None
    attributes: conditional.Attributes | None = None  # that they are requested to show, by the evaluator's network
    clip: Evaluator | None = None  # of a CLIP run
    captions: Callable[[Conditions], list[str]] | None = None  # that they are drawn for
    own: Callable[[np.ndarray], dict[str, dict]] | None = None  # the data's own metrics, see data.sample_metrics

    def outputs(self, images: np.ndarray, conditions: Conditions, n: int) -> dict[str, np.ndarray]:
        """Of samples uint8 [b, H, W, C], some of a set of n: outputs of the evaluator's network, and beside them, in
        entries that begin with 'conditional_accuracy', whether each shows the attributes that it is conditioned on;
        'clip/image', 'clip/text' and 'clip/tokens' are of the CLIP run, 'edges_f1', ... and 'mask_iou' of
        the requested edges and masks, 'own/images' the samples for the data's own metrics."""
        out: dict[str, np.ndarray] = {}
        if self.evaluator:
            out |= self.evaluator.extract(images, n)
        if self.evaluator and self.attributes:
            out |= self.attributes.correct(images, conditions, self.evaluator.batch(n))
        for name in requested(conditions, images.shape):
            compared = REQUESTED[name](images, conditions[name])
            out |= {f'{name}_{metric}': x for metric, x in compared.items()}
        if self.own:
            out[f'{OWN}images'] = images
        if self.clip:
            same = self.clip is self.evaluator
            out[f'{CLIP}image'] = out['features'] if same else self.clip.extract(images, n)['features']
        if self.clip and self.captions and self.clip.features.texts:
            texts = self.clip.features.texts(self.captions(conditions))
            out |= {f'{CLIP}text': texts.embeddings, f'{CLIP}tokens': texts.tokens}
        return out

    def compare(self, pieces: Iterable[dict[str, np.ndarray]], n: int) -> dict[str, dict]:
        """Metrics of n samples, of whose `outputs` these are the pieces; those of single samples with their standard
        errors."""
        apart: dict[str, list] = {}

        def rest() -> Iterator[dict[str, np.ndarray]]:
            for piece in pieces:
                for name in [name for name in piece if name.startswith(APART)]:
                    apart.setdefault(name, []).append(piece.pop(name))
                yield piece

        metrics = {}
        if self.clip:
            _ = self.clip.reference  # before the pieces are made: it has a progress bar of its own
        if self.evaluator:
            metrics = self.evaluator.compare(rest(), n)
        else:
            for _ in rest():
                pass
        each = {name: np.concatenate(parts) for name, parts in apart.items()}
        for name, correct in each.items():
            if self.evaluator and name.startswith(conditional.PREFIX):
                metrics[f'{name}/{self.evaluator.features.name}'] = mean(correct.astype(np.float64))
            elif name.startswith(BY_REQUEST):
                metrics[name] = mean(correct.astype(np.float64))
        if self.own:
            metrics |= self.own(each.pop(f'{OWN}images'))
        return metrics | self.of_clip({name.removeprefix(CLIP): x for name, x in each.items() if name.startswith(CLIP)})

    def compare_images(self, images, title: str) -> dict[str, dict]:
        """`of_clip` of images that no captions are known of, uint8 [n, H, W, C] or any sequence of such slices."""
        assert self.clip is not None
        _ = self.clip.reference
        pieces = self.clip.pieces(lambda i, j: images[i:j], len(images), title)
        return self.of_clip({'image': np.concatenate([piece['features'] for piece in pieces])})

    def of_clip(self, outputs: dict[str, np.ndarray]) -> dict[str, dict]:
        """Metrics by the embeddings of a CLIP run:

        cmmd         maximum mean discrepancy of the embeddings of samples and data
        clip_score   100 max(cosine, 0) of a sample and its caption
        r_precision  fraction of samples to which of 100 captions their own is the most similar
        """
        metrics: dict[str, dict] = {}
        if self.clip and self.clip is not self.evaluator:
            real = self.clip.reference.features
            metrics['cmmd'] = clip_distance(outputs['image'][:KEPT], real)
        if 'text' in outputs:
            metrics |= text_metrics(outputs['image'], outputs['text'], outputs['tokens'])
        return {f'{name}/{self.clip.features.name}': entry for name, entry in metrics.items() if self.clip}


def text_metrics(images: np.ndarray, texts: np.ndarray, tokens: np.ndarray) -> dict[str, dict]:
    """'clip_score' and 'r_precision' of embeddings [n, d] of images and of their texts. Texts of the same tokens [n, T]
    are the same; without 99 others there is no R-precision."""
    same = np.unique(tokens, axis=0, return_inverse=True)[1].reshape(-1)
    precision = r_precision(images, texts, same)
    return {'clip_score': mean(retrieval.clip_scores(images, texts))} | (
        {'r_precision': precision} if precision else {}
    )


def sample_outputs(
    model: BoundModel,
    provide: Callable[[np.ndarray], Conditions],
    measures: Measures,
    n: int,
    batch: int,
    seed: int,
    folder: str,
) -> Iterator[dict[str, np.ndarray]]:
    """`Measures.outputs` of n samples, piece by piece.

    Args:
      provide: of the samples' conditions, by their numbers; see conditions.provider.
      batch: samples at a time.
      folder: that keeps the pieces; see cache.path.
    """
    size = model.batch_size(batch, n)

    def make(numbers: np.ndarray) -> dict[str, np.ndarray]:
        conditions = provide(numbers)
        return measures.outputs(sample.draw_batch(model, conditions, size, seed), conditions, n)

    with log.bar(n, 'samples', jax.process_index() != 0) as bar:
        for start in range(0, n, size):
            numbers = np.arange(start, min(start + size, n))
            yield cache.piece(folder, start, len(numbers), functools.partial(make, numbers))
            bar.update(len(numbers))
