"""Measures a model: the family's own figures on the test split, and its samples against a data set.

The first are per example, with standard errors (`measure`). The second come from a network that
looks at pictures (`Evaluator`): distances between two sets of pictures, and what each holds of the other.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np

from jaxgen import data, log, randomness, sample, sharding
from jaxgen.data import shapes
from jaxgen.data.loader import OTHER
from jaxgen.errors import RunError, UserError
from jaxgen.metrics import detection, disentanglement, neighbours, scores
from jaxgen.metrics import features as networks
from jaxgen.metrics.moments import frechet
from jaxgen.metrics.statistics import Statistics, cached, gather

KID_SUBSET = 1000  # pictures of one of KID's subsets (Binkowski et al. 2018)
ENOUGH = 10  # pictures per dimension: with fewer, the Frechet distance is mostly bias


@functools.cache
def program(family):
    """The jitted evaluation of a family: -> {name: [n]}."""

    def evaluate(state, frozen, batch, seed):
        return family.evaluate(
            state, frozen, sample.to_inside(batch), randomness.stream(jax.random.key(seed), 'evaluate')
        )

    return sharding.jit(evaluate)


@functools.cache
def encoder(family):
    """The jitted encoder of a family: -> {'latents': [n, ...]}."""

    def encode(state, frozen, batch, seed):
        images = {'image': sample.to_inside(batch)['image']}
        return {'latents': family.encode(state, frozen, images, randomness.stream(jax.random.key(seed), 'encode'))}

    return sharding.jit(encode)


def over(function, state, frozen, mesh, source, n: int, size: int, seed: int, progress: Callable[[int], None]) -> dict:
    """What a jitted function gives for the first n examples of `source`, float64 {name: [n, ...]}.

    The batch that it gets holds 'index', the example's number, beside the data, so that
    random estimates depend on the example and the seed only.
    """
    size = sharding.round_up(mesh, min(size, n))
    found: dict[str, list] = {}
    for start in range(0, n, size):
        index = np.arange(start, min(start + size, n), dtype=np.int32)
        batch = {**source.take(index), 'index': index}
        placed, real = sharding.put_padded(mesh, batch, size)
        for name, values in function(state, frozen, placed, seed).items():
            found.setdefault(name, []).append(sharding.to_host(values)[:real].astype(np.float64))
        progress(start + real)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def average(values: np.ndarray) -> dict:
    """{'value', 'stderr', 'n'} of float64 [n]; one value has no standard error."""
    n = len(values)
    spread = {'stderr': float(values.std(ddof=1) / np.sqrt(n))} if n > 1 else {}
    return {'value': float(values.mean()), **spread, 'n': n}


def measure(
    family, state, frozen, mesh, source, n: int, size: int, seed: int, progress: Callable[[int], None], odd=None
) -> dict[str, dict]:
    """{name: {'value', 'stderr', 'n'}}: means over the first n examples of `source` (0: all).

    Args:
      odd: bool [n], which examples the model should find odd: 'auc/NAME' then says how well each figure tells them
        from the others, the higher ones being odd; 'n' counts them and 'n_reference' the others.

    Raises:
      RunError: a figure is not finite; names it and the example.
    """
    n = min(n or len(source), len(source))
    found, results = over(program(family), state, frozen, mesh, source, n, size, seed, progress), {}
    for name, values in found.items():
        if not np.isfinite(values).all():
            raise RunError(f'{name} is not finite for example {int(np.argmin(np.isfinite(values)))} of the test split')
        results[name] = average(values)
    if odd is not None and (odd.all() or not odd.any()):
        log.say(f'the first {n} test examples are all of one kind: no area under an ROC curve')
    elif odd is not None:
        for name, values in found.items():
            area, stderr = detection.roc_auc(values, odd)
            numbers = {'n': int(odd.sum()), 'n_reference': int((~odd).sum())}
            results[f'auc/{name}'] = {'value': area, **({'stderr': stderr} if stderr == stderr else {}), **numbers}
    return results


def codes_and_factors(
    family, state, frozen, mesh, source, n: int, size: int, seed: int, progress: Callable[[int], None]
) -> dict[str, dict]:
    """{name: {'value', 'n'}} of the codes of the first n examples of `source`, which has 'factors': 'mig' and
    'mig/0', 'mig/1', ... by factor, and 'beta_vae_score'; see jaxgen/metrics/disentanglement.py. Beside the gap of a
    factor stand the number of the 'latent' that knows most of it, and how much, 'known'. {} where the codes are not
    vectors of two numbers or more.
    """
    like = {'image': source.take(np.arange(1))['image']}
    shape = jax.eval_shape(encoder(family), state, frozen, like, seed)['latents'].shape
    if len(shape) != 2 or shape[1] < 2:
        return {}
    factors = source.take(np.arange(n))['factors']
    latents = over(encoder(family), state, frozen, mesh, source, n, size, seed, progress)['latents']
    gap, gaps = disentanglement.mutual_information_gap(latents, factors)
    score, stderr = disentanglement.beta_vae_score(latents, factors)
    table = disentanglement.known(latents, factors)
    each = {
        f'mig/{i}': {'value': float(g), 'n': n, 'latent': int(row.argmax()), 'known': float(row.max())}
        for i, (g, row) in enumerate(zip(gaps, table, strict=True))
        if g == g
    }
    return {'mig': {'value': gap, 'n': n}, **each, 'beta_vae_score': {'value': score, 'stderr': stderr, 'n': n}}


def figures(fake: Statistics, real: Statistics, name: str, training: bool) -> dict[str, dict]:
    """{figure/name: {'value', 'n', 'n_reference', ...}} of pictures against a data set.

    frechet            distance of two Gaussians (FID, where the network is Inception)
    sfid               the same of spatial features (Nash et al. 2021)
    kid                squared maximum mean discrepancy, mean over subsets
    inception_score    of the pictures alone
    precision, recall  share of each set in the other's neighbourhoods of 3; sets of one size
    density, coverage  the same with neighbourhoods of 5, robust to outliers
    authenticity       share of pictures that are not copies of training pictures; left out where features of some
                       training pictures only are kept, since a copy of one of the others would pass
    modes, class_kl    classes that are met; divergence of their shares from the data's, nats

    Args:
      name: the network's.
      training: the data set is what the model was trained on; authenticity is of nothing else.
    """
    n, n_reference = fake.moments.n, real.moments.n
    found = {'frechet': {'value': frechet(fake.moments, real.moments), 'n': n, 'n_reference': n_reference}}
    if fake.spatial is not None:
        found['sfid'] = {'value': frechet(fake.spatial, real.spatial), 'n': n, 'n_reference': n_reference}
    m = min(len(fake.features), len(real.features))  # kept of either side
    subset = min(KID_SUBSET, m)
    value, std = scores.kernel_distance(fake.features, real.features, size=subset)
    found['kid'] = {'value': value, 'std': std, 'n': len(fake.features), 'n_reference': len(real.features)}
    found['kid']['subset'] = subset
    if fake.logits is not None:
        value, std = scores.inception_score(fake.logits)
        found['inception_score'] = {'value': value, 'std': std, 'n': len(fake.logits)}
    shares = neighbours.neighbourhood(real.features[:m], fake.features[:m])
    authenticity = shares.pop('authenticity')
    for figure, value in shares.items():
        found[figure] = {'value': value, 'n': m, 'n_reference': m}
    if training and len(real.features) < n_reference:
        log.say(
            f'no authenticity: features of {len(real.features)} of the {n_reference} training pictures are kept, and '
            'copies of the others would pass'
        )
    elif training:
        if m < len(real.features):  # a copy is found only where its original is
            authenticity = neighbours.neighbourhood(real.features, fake.features)['authenticity']
        found['authenticity'] = {'value': authenticity, 'n': m, 'n_reference': len(real.features)}
    if fake.logits is not None:
        modes, kl = scores.class_balance(fake.logits, real.counts)
        found['modes'] = {'value': modes, 'n': len(fake.logits), 'of': len(real.counts)}
        found['class_kl'] = {'value': kl, 'n': len(fake.logits), 'n_reference': int(real.counts.sum())}
    return {f'{figure}/{name}': entry for figure, entry in found.items()}


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """A network that looks at pictures, and the data set that they are held against."""

    features: networks.Features
    section: dict  # the config's section `data`: the set, and what is done to its pictures
    split: str
    mesh: object
    size: int  # pictures in one batch of the network

    @functools.cached_property
    def source(self):
        return data.dataset({**self.section, 'features': ('image',)}, self.split)

    @property
    def image(self) -> tuple[int, int, int]:
        return (self.section['size'], self.section['size'], self.section['channels'])

    @property
    def cache(self) -> str:
        return os.path.join(data.root(self.section), 'statistics')

    def check(self, n: int) -> None:
        """Raises UserError where n pictures, or the data set, are too few to be measured; warns where they are few."""
        outputs = self.features.shapes(self.image)
        widest = max(outputs['features'], outputs.get('spatial', 0))
        for count, what in ((n, 'pictures'), (len(self.source), f'pictures in the split {self.split!r}')):
            if count <= widest:
                raise UserError(
                    f'{count} {what} are too few: the Frechet distance of {widest} features ({self.features.name}) '
                    f'needs more than {widest} pictures on either side'
                )
        if n < ENOUGH * outputs['features']:
            log.say(
                f'{n} pictures are few for {outputs["features"]} features: their Frechet distance is biased upwards, '
                'so compare it with others of as many pictures only'
            )

    def batch(self, n: int) -> int:
        return sharding.round_up(self.mesh, min(self.size, n))

    def extract(self, images: np.ndarray, n: int) -> dict[str, np.ndarray]:
        """Outputs of the network for uint8 images [b, H, W, C], some of a set of n, in batches of one shape."""
        size = self.batch(n)
        cuts = range(0, len(images), size)
        parts = [networks.extract(self.features, self.mesh, images[i : i + size], size) for i in cuts]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    @functools.cached_property
    def reference(self) -> Statistics:
        """Of the data set, from the cache if it is there."""
        n = len(self.source)

        def pieces() -> Iterator[dict]:
            size = self.batch(n)
            with log.bar(n, f'{self.split} split of {self.section["source"]}') as bar:
                for start in range(0, n, size):
                    yield self.extract(self.source.take(np.arange(start, min(start + size, n)))['image'], n)
                    bar.update(min(size, n - start))

        key = f'{self.source.identity} n={n} {self.features.digest}'
        title = f'{self.section["source"].partition(":")[0].replace("/", "_")}-{self.split}-{self.features.name}'
        return cached(self.cache, title, key, lambda: gather(pieces(), n))

    def figures(self, pieces: Iterable[dict], n: int) -> dict[str, dict]:
        """The figures of n pictures, from what `extract` gave of them, piece by piece."""
        real = self.reference  # before the pieces are made: it has a progress bar of its own
        return figures(gather(pieces, n), real, self.features.name, self.split == 'train')

    def about(self) -> dict:
        """What stands in evaluation.json of how it was measured."""
        outputs = self.features.shapes(self.image)
        return {
            'features': {'name': self.features.name, 'sha256': self.features.digest, 'dimensions': outputs},
            'reference': {'source': self.section['source'], 'split': self.split, 'n': len(self.source)},
        }


def asked(run, evaluator: Evaluator) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] | None:
    """What samples are to show, by the features of the data that the evaluator's network names: the class that each is
    drawn for, or what is known of the test example whose caption, mask, edges, ... it gets. None where nothing is.

    Returns:
      From what samples get (see sample.condition_provider) to {name: [n]}.
    """
    names, conditions, section = evaluator.features.reads, run.assembled.family.conditions, run.config.data.to_dict()
    if not names or not conditions:
        return None
    if 'label' in conditions:
        return (lambda given: {'label': given['label']}) if names == ('label',) else None
    # Of what becomes of pictures of another source nothing is known, but that both styles have the same test scenes.
    if OTHER in conditions and not {section['source'], section['other']} <= {'shapes', 'shapes:outlined'}:
        return None
    section |= {'features': ('image', *names), 'other': ''}
    try:
        data.spec(section)
    except UserError:  # the data do not say
        return None
    source = data.dataset(section, 'test')

    def wanted(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        examples = source.take_cyclic(given['index'])
        return {name: examples[name] for name in names}

    return wanted


def hits(evaluator: Evaluator, images: np.ndarray, wanted: dict[str, np.ndarray], told: bool, n: int) -> dict:
    """Whether the evaluator's network finds in each picture what was asked for: {'asked/accuracy': [b], ...}, 0 or 1.

    Args:
      images: uint8 [b, H, W, C], some of n.
      wanted: by `asked`, of these.
      told: by a caption, which names some factors only: 'asked/accuracy/0', ... are of those, and 'asked/caption' says
        whether all of them are right.
    """
    size, found, batch = evaluator.batch(n), {}, {'image': images, **wanted}
    for start in range(0, len(images), size):
        placed, real = sharding.put_padded(evaluator.mesh, {k: v[start : start + size] for k, v in batch.items()}, size)
        values = networks.program(evaluator.features.hits)(evaluator.features.variables, placed)
        for name, x in values.items():
            found.setdefault(f'asked/{name}', []).append(sharding.to_host(x)[:real])
    found = {name: np.concatenate(parts) for name, parts in found.items()}
    if told and 'factors' in wanted:
        names = [f'asked/accuracy/{i}' for i, name in enumerate(shapes.FACTORS) if name in shapes.CAPTIONED_FACTORS]
        found = {name: found[name] for name in names}
        found['asked/caption'] = np.prod(list(found.values()), 0)
    return found


def sample_features(run, evaluator: Evaluator, n: int, seed: int, progress: Callable[[int], None]) -> Iterator[dict]:
    """Outputs of the evaluator's network for n samples of a run, and `hits`, piece by piece.

    Every piece is kept in the run's directory until `forget`, so that what was stopped goes on
    where it was.
    """
    give, to_show = sample.condition_provider(run.assembled, run.config, {}), asked(run, evaluator)
    size = sharding.round_up(run.assembled.mesh, min(run.config.sample.batch, n))
    folder = piece_folder(run, evaluator, size, seed)
    for start in range(0, n, size):
        numbers = np.arange(start, min(start + size, n))
        path = os.path.join(folder, f'{start:08d}.npz')
        piece = read_piece(path, len(numbers))
        if sharding.any_host(piece is None):
            batch = give(numbers)
            images = sample.draw_batch(
                run.assembled.family, run.state, run.assembled.frozen, run.assembled.mesh, batch, size, seed
            )
            piece = evaluator.extract(images, n)
            if to_show:
                piece |= hits(evaluator, images, to_show(batch), 'caption' in batch, n)
            if jax.process_index() == 0:
                log.save_npz(path, {**piece, NAMES: np.array(list(piece))})
        progress(start + len(numbers))
        yield piece


def piece_folder(run, evaluator: Evaluator, size: int, seed: int) -> str:
    """Where the pieces of one evaluation lie: by all that decides what is in them."""
    config, weights = run.config.to_dict(), (run.state.ema, run.state.extra, run.assembled.frozen)
    key = [config['family'], config['model'], config['data'], networks.digest(weights), seed, size]
    key += [evaluator.features.digest, jax.__version__, config['train']['dtype'], config['stages']]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return os.path.join(run.workdir, 'evaluation', name)


NAMES = 'names'  # entry of a piece's file: the names of the others


def read_piece(path: str, n: int) -> dict[str, np.ndarray] | None:
    """A piece of n samples, or None if it is of another number or damaged."""
    try:
        piece = log.load_npz(path)
    except (OSError, ValueError):
        return None
    names = piece.pop(NAMES, np.array(''))  # one may be lost with the directory of the file
    whole = names.ndim and sorted(piece) == sorted(names)
    return piece if whole and all(x.ndim and len(x) == n for x in piece.values()) else None


def forget(run) -> None:
    """Removes the pieces of all evaluations of a run; call it once the figures are written."""
    sharding.barrier('forget')
    if jax.process_index() == 0:
        shutil.rmtree(os.path.join(run.workdir, 'evaluation'), ignore_errors=True)
