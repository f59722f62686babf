"""A run: the family that a config makes, with the weights in a run directory."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Callable, Sequence, Set
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from ml_collections import ConfigDict

import jaxgen
from jaxgen import (
    assembly,
    conditions,
    data,
    directory,
    files,
    functions,
    log,
    options,
    origin,
    sample,
    sharding,
)
from jaxgen import config as configs
from jaxgen.checkpoint import Checkpoints
from jaxgen.contract import State
from jaxgen.data.own_images import OwnImages
from jaxgen.errors import UserError
from jaxgen.evaluation import cache, conditional, held_out, prompts, samples
from jaxgen.evaluation.bound import BoundModel
from jaxgen.metrics import arrays, features
from jaxgen.metrics.scores import log_sum_exp
from jaxgen.options import check_integer
from jaxgen.text.tokenizers import caption_texts

DECIDES = re.compile(
    r'model\..*|stages\..*|train\.dtype|data\.(size|test_source|validation_source)'
)  # fields that samples depend on


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run, ready to sample and to evaluate. Made by `jaxgen.load`."""

    workdir: str
    config: ConfigDict
    assembled: assembly.Assembled
    state: State  # without params and opt where they were not loaded
    weights: str  # 'ema', 'params' or the width of an average: what `state.ema` holds
    above: str = dataclasses.field(default_factory=files.here, repr=False)  # the directory that workdir is relative to

    @property
    def folder(self) -> str:
        """The run's directory, from wherever the program is by now."""
        return os.path.join(self.above, self.workdir)

    @property
    def step(self) -> int:
        self.check_present()
        return int(self.state.step)

    def is_gone(self) -> bool:
        """Whether the weights were those of a training that has gone on; see library.train."""
        return any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state) if isinstance(leaf, jax.Array))

    def check_present(self) -> None:
        """Raises UserError where `is_gone`."""
        if self.is_gone():
            raise UserError(
                'the training has gone on since this Run was made, and its weights are gone: use it within the '
                f'callback, or jaxgen.load({self.workdir!r})'
            )

    @property
    def model(self) -> BoundModel:
        self.check_present()
        return BoundModel(self.assembled.family, self.state, self.assembled.frozen, self.assembled.mesh)

    def __repr__(self) -> str:
        family, sizes = self.assembled.family, {}
        for name, weights in self.state.ema.items():
            sizes[name] = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(weights))
        step = 'gone' if self.is_gone() else self.step
        image = ' x '.join(map(str, self.image))
        given = f', under {", ".join(family.conditions)}' if family.conditions else ''
        can = [name for name in functions.OFFERED if getattr(family, name) is not None]
        can += ['reconstruct'] if {'encode', 'decode'} <= {*can} else []
        can += ['similarity', 'zero_shot'] if family.logit_scale is not None else []
        can += ['interpolate'] if 'decode' in can and not family.latents.grids else []
        lines = [
            f'Run of {self.config.family} in {self.workdir}',
            f'  data: {self.config.data.source}, {image}{given}',
            f'  weights: {self.weights} of step {step}',
            f'  parameters: {sum(sizes.values()):,} ({", ".join(f"{name} {size:,}" for name, size in sizes.items())})',
            f'  functions: {", ".join(can)}, evaluate, save',
        ]
        return '\n'.join(lines)

    @property
    def image(self) -> tuple[int, ...]:
        """Height, width and channels of an image."""
        return tuple(self.assembled.spec.features['image'].shape)

    def with_sampling(self, **sampling) -> Run:
        """The run with other options of sampling, on the same weights: fields of config.model that sampling reads,
        temperature=0.7, sampler={'name': 'heun', 'steps': 20} or sampler='ddim', guidance={'scale': 3.0} or
        **{'guidance.scale': 3.0}. No file is read.

        Raises:
          UserError: an option that there is not, one that training depends on, or a value that it cannot have.
        """
        if not sampling:
            return self
        assembled = self.assembled.with_options(configs.plain(sampling))
        return dataclasses.replace(self, config=assembled.config, assembled=assembled)

    def given(self, condition: dict[str, Any] | conditions.Given | None, n: int | None = None) -> conditions.Given:
        """The conditions of n samples, read and checked; see conditions.read."""
        n = None if n is None else check_integer('n', n, 0)
        return conditions.read(self.assembled, self.config, {} if condition is None else condition, n)

    def sample(
        self,
        n: int | None = None,
        seed: int | Sequence[int] = 0,
        condition: dict[str, Any] | None = None,
        latents: Any = None,
        **sampling,
    ) -> np.ndarray:
        """Images, uint8 [n, H, W, C]. Image i depends on the seed and on i, not on n but for rounding.

        Args:
          n: images of each seed; None: as many as a condition has values or latents, else 16, or 1 where there are
            several seeds.
          seed: a number, or several of them: n images of each, in their order, each time under the same conditions.
          condition: {name: value}, of which there is one for all images or a list of one for each: {'label': 3},
            {'label': [1, 2, 3]}, {'caption': 'a small red heart'}, {'image': 'photo.png'}. Labels are numbers or names
            of classes. Images are paths of files or folders, images of PIL, or arrays [h, w], [h, w, c], [n, h, w, c]
            of uint8 or of real numbers in [-1, 1], of any size; see docs/own_images.md. Where no condition is an
            image, and the model encodes and decodes, 'image' is reconstructed.
          latents: images of these, [n, ...], in place of random ones; see `decode`. The seed is that of further noise.
          sampling: options of sampling, see `with_sampling`. The first call compiles. Later ones do only where an
            option changes the program: its steps, the name of a sampler, something that was off; and to go back to what
            was compiled costs nothing.
        """
        run = self.with_sampling(**sampling)
        several = (isinstance(seed, Sequence) and not isinstance(seed, str)) or getattr(seed, 'ndim', 0) > 0
        listed: Any = seed if several else [seed]
        seeds = [check_integer('seed', one, 0) for one in listed]
        nothing = np.zeros((0, *self.image), np.uint8)
        if latents is not None:
            decoded = [run.decode(latents, condition, seed=one) for one in seeds]
            if n is not None and any(n != len(images) for images in decoded):
                raise UserError(f'n = {options.shown(n)}, and there are {len(decoded[0])} latents: leave n out')
            return np.concatenate([nothing, *decoded])
        given = run.given(condition, n)
        for line in given.doubts():
            log.say(line)
        n = given.n if n is not None else given.n or (1 if several else 16)
        parts = [part for one in seeds for part in run.draw(n, one, given)]
        return np.concatenate([nothing, *parts])

    def draw(self, n: int, seed: int = 0, condition: dict[str, Any] | conditions.Given | None = None):
        """As `sample` of one seed, in pieces of at most config.sample.batch images."""
        seed, given = check_integer('seed', seed, 0), self.given(condition, n)
        if given.reconstructs:
            return self.reconstructions(given.images['image'], n, seed)
        provide = conditions.provider(self.assembled, self.config, given)
        compiled = sample.program(self.assembled.family)
        size = sample.batch_size(self.model, compiled, n, self.config.sample.batch)
        return sample.draw(self.model, provide, n, size, seed)

    def reconstructions(self, images: OwnImages, n: int, seed: int = 0):
        """The first n images encoded and decoded, in pieces of at most config.sample.batch, uint8."""
        size = self.model.batch_size(self.config.sample.batch, n)
        for start in range(0, n, size):
            yield self.reconstruct(images.take(np.arange(start, min(start + size, n))), seed)

    def film(
        self,
        n: int,
        frames: int,
        seed: int = 0,
        condition: dict[str, Any] | conditions.Given | None = None,
        **sampling,
    ) -> np.ndarray:
        """Trajectories of the first n images of `sample` with the same options; see sample.film."""
        seed, n = check_integer('seed', seed, 0), check_integer('n', n, 1)
        frames = check_integer('frames', frames, 1)
        run = self.with_sampling(**sampling)
        batch = conditions.first(run.assembled, run.config, n, run.given(condition), film=True)
        size = sample.batch_size(run.model, sample.program(run.assembled.family, 'trajectory'), n, n)
        return sample.film(run.model, batch, size, seed, frames)

    @functools.cached_property
    def features(self) -> features.Features:
        """The network that distances between images may be measured in; see metrics.features.of_run for errors."""
        return features.of_run(self)

    def encode(self, images, seed: int = 0) -> Any:
        """Latents or features of images, float32 [n, ...], or a tuple of int32 [n, h, w], coarse grids first.

        Args:
          images: uint8 [n, H, W, C], or floats in [-1, 1], any n; of the run's height, width and channels.
          seed: of noise, where the encoder draws any.

        Raises:
          UserError: the family encodes nothing, or the images are no such ones.
        """
        functions.check_offered(self.assembled.family, 'encode', self.config.family)
        return self.apply('encode', {'image': functions.as_images('images', images, self.image)}, seed)

    def decode(self, latents, condition: dict[str, Any] | None = None, dtype=np.uint8, seed: int = 0) -> np.ndarray:
        """Images [n, H, W, C] of latents as `encode` gives them, or of draws of N(0, I) where it gives none.

        Args:
          condition: as for `sample`, where the family draws under conditions and does not encode.
          dtype: np.uint8, or np.float32 for numbers in [-1, 1].

        Raises:
          UserError: the family decodes nothing, or the latents are no such ones.
        """
        family = self.assembled.family
        functions.check_offered(family, 'decode', self.config.family)
        if dtype not in (np.uint8, np.float32, 'uint8', 'float32'):
            raise UserError(f'dtype must be uint8 or float32; it is {options.shown(dtype)}')
        arrays = functions.as_latents(self.model, 'latents', latents, self.image)
        given = family.encode is None and bool(family.conditions)
        if condition and not given:
            raise UserError(f'a {self.config.family} decodes these latents under no condition: leave condition out')
        if given:
            n = len(next(iter(arrays.values())))
            arrays |= conditions.first(self.assembled, self.config, n, condition or {})
        return functions.as_uint8(self.apply('decode', arrays, seed), np.empty(0, dtype))

    def reconstruct(self, images, seed: int = 0) -> np.ndarray:
        """The images encoded and decoded, uint8 or float32 [n, H, W, C] as they are."""
        functions.check_offered(self.assembled.family, 'decode', self.config.family)
        like = functions.as_images('images', images, self.image)
        dtype = np.uint8 if like.dtype == np.uint8 else np.float32
        return self.decode(self.encode(like, seed), dtype=dtype, seed=seed)

    def classify(self, images, sigma: Any = None) -> np.ndarray:
        """Logits of the classes, float32 [n, classes].

        Args:
          images: uint8 or floats in [-1, 1], [n, H, W, C]; with `sigma`, a number or [n], image + sigma eps.

        Raises:
          UserError: the family has no classes, or was not trained on noise.
        """
        functions.check_offered(self.assembled.family, 'classify', self.config.family)
        arrays = {'image': functions.as_images('images', images, self.image, noisy=sigma is not None)}
        if sigma is not None:
            arrays['sigma'] = functions.as_levels('sigma', sigma, len(arrays['image']))
        return self.apply('classify', arrays)

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings of texts, float32 [n, d], of length 1. Texts of more tokens than the model reads are cut.

        Raises:
          UserError: the family reads no texts.
        """
        functions.check_offered(self.assembled.family, 'encode_text', self.config.family)
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise UserError(f'texts must be a list of them; it is {options.shown(texts)}')
        tokens, _, cut = self.assembled.tokenizers['tokens'](list(texts))
        if cut:
            log.say(f'NOTE: {cut} of the texts are cut to {tokens.shape[1]} tokens')
        return self.apply('encode_text', {'tokens': tokens})

    def similarity(self, images, texts: Sequence[str]) -> np.ndarray:
        """Cosines of the embeddings of images and texts, float32 [images, texts]: the likeliest text of an image is its
        class, where the texts describe classes.

        Args:
          images: uint8 or floats in [-1, 1], [n, H, W, C], of any size.
        """
        self.check_one_space()
        return self.encode_images(images) @ self.encode_text(texts).T

    def zero_shot(
        self,
        images,
        classes: Sequence[str | Sequence[str]],
        templates: Sequence[str] = ('{}',),
        ensemble: str = 'embeddings',
    ) -> np.ndarray:
        """Probabilities of the classes, float32 [n, classes], by texts that describe them; see evaluation/prompts.py.

        Args:
          images: as for `similarity`.
          classes: the text of each class, 'a photo of a cat' or, with templates, 'cat'; or several texts of each.
          templates: the prompts of a class are its texts in place of {} in all of these.
          ensemble: what of several prompts of a class is averaged, 'embeddings' or 'probabilities'.
        """
        self.check_one_space()
        if ensemble not in prompts.ENSEMBLES:
            raise UserError(f'ensemble must be {" or ".join(prompts.ENSEMBLES)}; it is {options.shown(ensemble)}')
        texts = prompts.fill(templates, classes)
        embedded = self.encode_images(images)
        logits = prompts.logits(embedded, self.encode_text, texts, self.logit_scale, ensemble)
        return np.exp(logits - log_sum_exp(logits, 1)).astype(np.float32)

    def check_one_space(self) -> None:
        """Raises UserError where the family does not bring images and texts into one space."""
        if self.assembled.family.logit_scale is None:
            raise UserError(f'a {self.config.family} does not compare images with texts: take a run of clip')

    @property
    def logit_scale(self) -> float:
        """What cosines of embeddings of images and texts are multiplied by to be logits."""
        scale = self.assembled.family.logit_scale
        assert scale is not None
        return float(scale(self.model.state))

    def encode_images(self, images) -> np.ndarray:
        """Embeddings of images of any size, float32 [n, d]; see metrics.features.resized."""
        if np.shape(images)[1:] == self.image:
            return self.encode(images)
        return arrays.extract(images, self, self.config.sample.batch)['features']

    def denoise(self, images, sigma, condition: dict[str, Any] | None = None) -> np.ndarray:
        """Estimates of the images without noise, [n, H, W, C]: uint8 of uint8, else float32, not clipped.

        Args:
          images: image + sigma eps, with pixels of the image in [-1, 1]; uint8 where little noise was clipped.
          sigma: standard deviation of the noise, a number or [n].
          condition: as for `sample`.
        """
        family = self.assembled.family
        functions.check_offered(family, 'denoise', self.config.family)
        x = functions.as_images('images', images, self.image, noisy=True)
        arrays = {'x': x, 'sigma': functions.as_levels('sigma', sigma, len(x))}
        arrays |= conditions.first(self.assembled, self.config, len(x), condition or {})
        return functions.as_uint8(self.apply('denoise', arrays), x)

    def interpolate(self, a, b, n: int = 8, path: str = 'spherical', condition: dict[str, Any] | None = None):
        """Images uint8 [m, n, H, W, C], n steps from each image of `a` [m, H, W, C] to that of `b` through latents.

        Args:
          a, b: images, uint8 or floats in [-1, 1]; latents where the family does not encode.
          n: images of a row, the first and last of which are the decoded ends.
          path: 'spherical', which keeps the usual norm of draws of a Gaussian, or 'linear'.
          condition: as for `sample`, where the family draws under conditions.
        """
        family, n = self.assembled.family, check_integer('n', n, 2)
        functions.check_offered(family, 'decode', self.config.family)
        if family.latents.grids:
            raise UserError(f'latents of a {self.config.family} are integers, and nothing lies between them')
        if path not in tuple(functions.PATHS):
            raise UserError(f'path must be {" or ".join(functions.PATHS)}; it is {options.shown(path)}')
        if family.encode is not None:
            a, b = self.encode(a), self.encode(b)
        else:
            a, b = (functions.as_latents(self.model, name, z, self.image)['z'] for name, z in (('a', a), ('b', b)))
        if len(a) != len(b):
            raise UserError(f'a and b must be as many; they are {len(a)} and {len(b)}')
        between = functions.PATHS[path](a, b, np.linspace(0, 1, n)).astype(np.float32)
        rows = [self.decode(step, condition) for step in between.swapaxes(0, 1)]  # so that row i has condition i
        return np.stack(rows, 1)

    def apply(self, name: str, arrays: dict[str, np.ndarray], seed: int = 0) -> Any:
        """Outputs of a function of the family for host arrays {name: [n, ...]}; see functions.apply."""
        seed = check_integer('seed', seed, 0)
        return functions.apply(self.model, name, arrays, self.config.sample.batch, seed)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the averaged weights and State.extra as a .safetensors file, whole or not at all.

        An array's name is its path in State, 'ema/decoder/Dense_0/kernel' or 'extra/...'. The metadata are texts:
        'jaxgen' (the version), 'family', 'config' (JSON), 'step', and 'weights', which of them these are.

        Raises:
          UserError: the path has another ending, or cannot be written to.
        """
        path, state = os.path.expanduser(files.as_path(path, 'path')), self.model.state
        files.check_local(path, 'path')
        if not path.endswith('.safetensors'):
            raise UserError(f'path must end in .safetensors; it is {path}')
        if os.path.isdir(path):
            raise UserError(f'path={path} is a folder: name a file')
        leaves = jax.tree_util.tree_leaves_with_path({'ema': state.ema, 'extra': state.extra})
        arrays = {jax.tree_util.keystr(keys, simple=True, separator='/'): sharding.to_host(x) for keys, x in leaves}
        about = {
            'jaxgen': jaxgen.__version__,
            'family': self.config.family,
            'config': json.dumps(self.config.to_dict()),
            'step': str(self.step),
            'weights': self.weights,
        }
        if jax.process_index() == 0:
            files.check_writable(os.path.dirname(path) or '.', 'path')
            with files.replacing(path) as file:
                file.write(safetensors.numpy.save({k: np.ascontiguousarray(x) for k, x in arrays.items()}, about))

    def evaluate(self) -> dict[str, dict]:
        """The family's own metrics of the split config.evaluate.held_out, {name: {'value', 'stderr', 'n'}}: means over
        its first config.evaluate.examples examples (0: all). Where training was restricted to some classes and the test
        split is not, also each metric as an anomaly score for the others; where the data have factors, also the
        disentanglement of the latents."""
        a, c, model = self.assembled, self.config, self.model
        if self.state.params is None:  # adversarial families have metrics of the critic, which sampling does not need
            model = model._replace(state=self.state.replace(params=self.saved_params()))
        split = c.evaluate.held_out
        source = a.dataset(split)
        n = min(c.evaluate.examples or len(source), len(source))
        kept = c.data.keep_classes if split == 'test' else ()  # the other splits have no other classes
        tasks = prompts.tasks(c.evaluate.templates, c.data.to_dict()) if a.family.logit_scale else {}
        anomalous = ~np.isin(data.labels(c.data, split)[:n], kept) if kept else None
        results = held_out.evaluate(model, source, n, c.evaluate.batch, c.seed, anomalous, split)
        if 'factors' in a.spec.features and a.family.encode is not None and not a.family.latents.grids:
            results |= held_out.evaluate_disentanglement(model, source, n, c.evaluate.batch, c.seed)
        if a.family.encode_text is not None and a.family.encode is not None and 'tokens' in a.texts:
            results |= held_out.evaluate_retrieval(model, source, n, c.evaluate.batch, c.seed)
        if a.family.logit_scale is not None:
            results |= self.evaluate_zero_shot(tasks, n)
        return results

    def evaluate_zero_shot(self, tasks: dict[str, prompts.Task], n: int) -> dict[str, dict]:
        """Accuracies of the first n examples of config.evaluate.held_out, see prompts.tasks."""
        c, a, numbers = self.config.evaluate, self.assembled, np.arange(n)
        if not tasks:
            return {}
        source = a.untokenised(c.held_out, features=('image',))
        cuts = range(0, n, c.batch)
        images = np.concatenate([self.encode(source.take(numbers[i : i + c.batch])['image']) for i in cuts])
        texts = list(dict.fromkeys(text for task in tasks.values() for texts in task.prompts for text in texts))
        embedded = dict(zip(texts, self.encode_text(texts), strict=True))

        def encode(texts: list[str]) -> np.ndarray:
            return np.stack([embedded[text] for text in texts])

        results = {}
        for name, task in tasks.items():
            feature = task.attribute.feature
            values = a.untokenised(c.held_out, features=('image', feature)).take(numbers)[feature]
            logits = prompts.logits(images, encode, task.prompts, self.logit_scale, c.ensemble)
            results[name] = prompts.accuracy(task, logits, values)
        return results

    def saved_params(self) -> dict[str, Any]:
        """`params` of this step's checkpoint.

        Raises:
          UserError: it is gone.
        """
        checkpoints = Checkpoints(self.folder)
        try:
            steps = checkpoints.steps()
            if steps and self.step not in steps:
                raise UserError(f'the training in {self.workdir} has gone on to step {steps[-1]}: load it again')
            items = ('params', 'ema')
            saved, _ = checkpoints.restore_step(self.step, self.assembled.abstract, self.assembled.mesh, items)
        finally:
            checkpoints.close()
        averages = {name: saved.ema[name] for name in self.state.ema}
        if self.weights == 'ema' and features.digest(averages) != features.digest(self.state.ema):
            raise UserError(f'{self.workdir} has been trained anew: load it again')
        return saved.params

    def modes(self, n: int, seed: int = 0) -> dict[str, dict]:
        """The data's own metrics of n samples, like mode coverage, where their distribution is known, see
        data.sample_metrics; else {}."""
        n, seed = check_integer('n', n, 1), check_integer('seed', seed, 0)
        metrics = data.sample_metrics(self.config.data)
        return metrics(self.sample(n, seed)) if metrics and self.assembled.family.sample else {}

    def compare(
        self, evaluator: samples.Evaluator | None, n: int, seed: int = 0, clip: samples.Evaluator | None = None
    ) -> dict[str, dict]:
        """Metrics of n samples against a data set, see samples.compare, and `modes` of the same samples. Where samples
        are conditioned on attributes that the evaluator's network predicts, also the conditional accuracy, see
        conditional.Attributes.

        Args:
          clip: of a CLIP run: of samples and their captions, see samples.Measures.of_clip. None: the evaluator, where
            its network is one.
        """
        n, seed = check_integer('n', n, 1), check_integer('seed', seed, 0)
        a, c, model = self.assembled, self.config.to_dict(), self.model
        origin.check_named(a.unnamed, *configs.DATA_PATHS)
        batch = model.batch_size(c['sample']['batch'], n)
        weights = features.digest((self.state.ema, self.state.extra, a.frozen))
        decides = [c[name] for name in ('family', 'model', 'data', 'stages')] + [c['train']['dtype'], weights]
        provide = conditions.provider(a, self.config, {})
        if clip is None and evaluator is not None and evaluator.features.texts:
            clip = evaluator
        own = data.sample_metrics(self.config.data)
        measures = samples.Measures(evaluator, clip=clip, captions=self.captions(), own=own)
        if evaluator is not None:
            attributes = conditional.requested(a.family, c['data'], evaluator.features, evaluator.mesh)
            measures = dataclasses.replace(measures, attributes=attributes)
        networks = [one.features.digest if one else '' for one in (evaluator, clip)]
        folder = cache.path(self.folder, [*decides, *networks, seed, batch])
        return measures.compare(samples.sample_outputs(model, provide, measures, n, batch, seed, folder), n)

    def captions(self) -> Callable[[dict[str, np.ndarray]], list[str]] | None:
        """The function from samples' conditions to the captions of the test split that they are drawn for; None where
        they are drawn for none."""
        if 'caption' not in self.assembled.family.conditions:
            return None
        source = self.assembled.untokenised('test')

        def of_examples(batch: dict[str, np.ndarray]) -> list[str]:
            return caption_texts(source.take_cyclic(batch['index'])['caption'])

        return of_examples

    def changes(self) -> dict[str, Any]:
        """{field: value} of what samples depend on, where it is another than in the run's own config."""
        different = configs.changed(directory.saved_config(self.folder), self.config)
        return {field: value for field, (_, value) in different.items() if DECIDES.fullmatch(field)}


def feature_run(field: str, value: str, mesh) -> features.Features:
    """The network of the run that a field names, 'run:PATH'.

    Raises:
      UserError: there is none.
    """
    path = value.removeprefix('run:')
    if not os.path.isfile(os.path.join(path, 'config.json')):
        file = configs.named(path)
        command = f' (python -m jaxgen.main --config={file})' if file else ''
        without = ', or --features=none for the metrics that need no other network' if 'features' in field else ''
        raise UserError(f'config.{field} = {value!r}: no run in {path}; train it first{command}{without}')
    return load(path, mesh=mesh).features


def make_evaluator(config: ConfigDict, mesh, unnamed: dict[str, str] | None = None) -> samples.Evaluator:
    """The network of config.evaluate.features, and the data set of config.data.

    Args:
      unnamed: paths that only a stranger's run names; see origin.py.

    Raises:
      UserError: there is no such network, or it does not read such images.
    """
    origin.check_named(unnamed or {}, *configs.DATA_PATHS, 'evaluate.features')
    origin.check_named(unnamed or {}, 'evaluate.reference')
    if config.evaluate.features == 'inception':
        origin.check_named(unnamed or {}, 'evaluate.inception')
    c, section = config.evaluate, config.data.to_dict()
    if c.features == 'inception':
        network = features.of_inception(c.inception, os.path.join(data.root(section), 'weights'), mesh)
    else:
        network = feature_run('evaluate.features', c.features, mesh)
    evaluator = samples.Evaluator(network, section, c.split, mesh, c.batch, os.path.expanduser(c.reference))
    network.shapes(evaluator.image)  # whether it reads such images
    return evaluator


def make_clip_evaluator(config: ConfigDict, mesh, unnamed: dict[str, str] | None = None) -> samples.Evaluator | None:
    """The CLIP run of config.evaluate.clip, and the data set of config.data; None where it names none.

    Raises:
      UserError: there is no such run, it has no texts and images in one space, or does not read such images.
    """
    c = config.evaluate
    if c.clip == 'none':
        return None
    origin.check_named(unnamed or {}, *configs.DATA_PATHS, 'evaluate.clip')
    network = feature_run('evaluate.clip', c.clip, mesh)
    if network.texts is None:
        raise UserError(f'config.evaluate.clip = {c.clip!r} must be a run of clip: this one has no texts')
    evaluator = samples.Evaluator(network, config.data.to_dict(), c.split, mesh, c.batch)
    network.shapes(evaluator.image)
    return evaluator


def about_networks(evaluator: samples.Evaluator | None, clip: samples.Evaluator | None) -> dict:
    """The entries of evaluation.json on the networks that samples are measured with, and the data set."""
    about = [one.about() for one in (clip, evaluator) if one]
    return {**about[0], **about[-1]} | ({'clip': clip.about()['features']} if clip else {})


def load(
    workdir: str,
    *,
    config: ConfigDict | dict | None = None,
    weights: str = 'ema',
    all_weights: bool = False,
    mesh=None,
    named: Set[str] = frozenset(),
    step: int | str | None = None,
):
    """The run in `workdir` with the weights of its newest checkpoint, or of that of a step, a Run.

    A run is data: nothing in its directory is executed, and what its config names outside of the directory is not read,
    unless it was trained by this person or the path is named in this call (see origin.py).

    Args:
      config: fields that differ from the saved ones, {'model': {'sampler': 'ddim'}} or {'model.sampler': 'ddim'}, or a
        whole config in place of it.
        Only what training does not depend on may differ; a folder of images or a stage may have moved.
      weights: 'ema' or 'params', which of them sampling and evaluation use; or a width, '0.07': the average of that
        standard deviation over the run, put together from all checkpoints kept (`config.optim.ema_std`).
      all_weights: restore `params` too, which `evaluate` reads and otherwise restores by itself.
      named: fields of a whole config that the person set, though it may be to what they were, {'data.source', ...}.
      step: of the checkpoint, one of those that were kept, or 'best', by config.train.stop_on.

    Raises:
      UserError: no run there, no checkpoint yet, none of this step, weights of another model, weights that have no
        batch statistics, a change of what training depends on, a stage that has been trained on, or one whose path
        nobody named.
      RunError: no checkpoint can be read.
    """
    workdir = os.path.expanduser(workdir)
    assembled, state = assembly.restore(workdir, config, weights, all_weights, mesh, named, step)
    return Run(workdir, assembled.config, assembled, state, weights)
