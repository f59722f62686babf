"""A run: the family that a config makes, with the weights in a run directory."""

from __future__ import annotations

import dataclasses
import functools
import glob
import json
import math
import os
import re
from collections.abc import Callable, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.extend import core
from ml_collections import ConfigDict

import jaxgen
from jaxgen import conditions, data, files, functions, imports, log, optim, options, origin, sample, sharding, stopping
from jaxgen import config as configs
from jaxgen.checkpoint import Checkpoints
from jaxgen.checks import check_size, check_stage_image
from jaxgen.contract import Context, Family, State
from jaxgen.data.own_images import OwnImages
from jaxgen.errors import RunError, UserError
from jaxgen.evaluation import cache, conditional, held_out, samples
from jaxgen.evaluation.bound import BoundModel
from jaxgen.metrics import features
from jaxgen.options import check_integer, check_weights_name

MOST_VARIANTS = 64  # of an `Assembled` that it keeps
MOST_INITIAL = 0.05  # of averaged weights may be those before the first update, before a line says so
DECIDES = re.compile(
    r'model\..*|stages\..*|train\.dtype|data\.(test_source|validation_source)'
)  # fields that samples depend on


@dataclasses.dataclass(frozen=True)
class Assembled:
    """A config's family with its earlier stages, its data's spec and its devices; no weights of its own."""

    config: ConfigDict
    family: Family
    frozen: dict[str, Any]  # {stage: (its State, its frozen)}
    spec: data.Spec
    mesh: Any
    unnamed: dict[str, str] = dataclasses.field(default_factory=dict)  # paths that are not to be read; see origin.py
    context: Context | None = None  # that `build` got

    def dataset(self, split: str, **changes):
        """The examples of config.data, some of its fields changed.

        Raises:
          UserError: they lie where only a stranger's run says so.
        """
        origin.check_named(self.unnamed, *configs.DATA_PATHS)
        return data.dataset({**self.config.data.to_dict(), **changes}, split)

    def with_model(self, model: dict[str, Any]) -> Assembled:
        """The same with another config.model, which says of the weights what it said before."""
        config = ConfigDict({**self.config.to_dict(), 'model': model})
        assert self.context is not None, 'made by `assemble`'
        return dataclasses.replace(self, config=config, family=make_family(config, self.context))

    def with_options(self, given: dict[str, Any]) -> Assembled:
        """The same with other options of sampling, see sample.with_options; the newest ones are kept."""
        text, kept = repr(given), self.variants
        if text not in kept:
            build, model = configs.builder(self.config.family), self.config.model.to_dict()
            new = self.with_model(sample.with_options(build, model, self.family, given))
            if len(kept) >= MOST_VARIANTS:
                del kept[next(iter(kept))]
            kept[text] = new
        return kept[text]

    @functools.cached_property
    def variants(self) -> dict[str, Assembled]:
        """Those of `with_options`, by the options as a text."""
        return {}

    @functools.cached_property
    def abstract(self) -> State:
        """State as shapes and dtypes; costs a trace, no memory.

        Raises:
          UserError: config.optim.networks names a network that the family does not have.
        """
        state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.traced_init.out_info)
        for name in self.config.optim.networks:
            if name not in state.params:
                raise UserError(f'config.optim.networks.{name}: no such network{options.near(name, state.params)}')
        return state

    @functools.cached_property
    def traced_init(self) -> jax.stages.Traced:
        """`init_state` for a batch of the config's size, traced once for the shapes and for the first State."""
        n = self.config.data.batch
        batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct((n, *a.shape), a.dtype), self.spec.features)
        init = functools.partial(init_state, self.family)
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):  # for checks.check_parts
            return jax.jit(init).trace(jax.eval_shape(lambda: jax.random.key(0)), batch, self.frozen)

    def init(self, rng, batch: dict, frozen) -> State:
        """As `init_state`, from what is traced already."""
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            leaves = core.jaxpr_as_fun(self.traced_init.jaxpr)(*jax.tree.leaves((rng, batch, frozen)))
        return jax.tree.unflatten(jax.tree.structure(self.abstract), leaves)

    @functools.cached_property
    def stage_digests(self) -> dict[str, str]:
        """{stage: SHA-256 of its weights}, which a checkpoint keeps: what was trained on them fits no others."""
        return {name: features.digest((state.ema, state.extra)) for name, (state, _) in self.frozen.items()}


def init_state(family: Family, rng, batch: dict, frozen) -> State:
    """The state before the first update, of a training batch of uint8 images."""
    return family.init(rng, sample.to_inside(batch), frozen)


def restored_stage(path: str, mesh) -> tuple[Family, State, dict]:
    """An earlier stage from its run: its family, its weights, and the frozen ones of its own stages."""
    run = load(path, mesh=mesh)
    return run.assembled.family, run.state, run.assembled.frozen


def check_stages(about: dict, assembled: Assembled, workdir: str, moved: Sequence[str] = ()) -> None:
    """Raises UserError where a stage has other weights than when the checkpoint `about` was saved.

    moved: fields 'stages.NAME' that name another directory than then; without a digest these are refused.
    """
    saved = about.get('stages', {})
    for name, digest in assembled.stage_digests.items() if saved or moved else ():
        path = assembled.config.stages[name]
        if name not in saved and f'stages.{name}' in moved:
            raise UserError(
                f'config.stages.{name} = {path}: {workdir} does not say which weights it was trained on, so only the '
                'directory that it names will do'
            )
        if saved.get(name, digest) != digest:
            raise UserError(
                f'config.stages.{name}: the weights in {path} are not those that {workdir} was trained on: put these '
                'back, or train it anew in another --workdir'
            )


def check_moved_data(
    about: dict, config: ConfigDict, workdir: str, moved: list[str], test_source: str | None = None
) -> None:
    """Raises UserError where config.data names another folder than before, and its images are others.

    Args:
      test_source: that of the training, where it may be another now. It decides whether a part of data.source is held
        out, and so which images are the training split.
    """
    fields = [field for field in moved if field.startswith('data.')]
    if test_source is not None and test_source != config.data.test_source:
        fields = ['data.test_source', *fields]
    if fields and about.get('data') != data.dataset(config.data, 'train').identity:
        what = 'its images' if fields[0] in ('data.source', 'data.other') else 'with it the training images'
        raise UserError(
            f'config.{fields[0]} = {configs.get(config, fields[0])}: {what} are not those that {workdir} was trained '
            'on; put it back, or give another --workdir'
        )


def check_cycle(workdir: str, config: ConfigDict, above: tuple[str, ...] = (), untrained: bool = False) -> None:
    """Raises UserError where a run is a stage of itself, also by way of others. Reads configs alone.

    untrained: a stage that is not there yet has the config of its name, as in abstract_stage.
    """
    here = (*above, os.path.realpath(workdir))
    for name, path in config.stages.items():
        if os.path.realpath(path) in here:
            raise UserError(f'config.stages.{name}: {path} is a stage of itself; name the run of an earlier stage')
        if os.path.isfile(os.path.join(path, 'config.json')):
            check_cycle(path, read(path)[0], here, untrained)
        elif untrained and configs.named(path):
            check_cycle(path, configs.load(configs.named(path)), here, untrained)


def abstract_stage(path: str, mesh) -> tuple[Family, State, dict]:
    """The same as shapes and dtypes, of the run in `path` or, before there is one, of the config of that name.

    Raises:
      UserError: there is neither.
    """
    trained, file = os.path.isfile(os.path.join(path, 'config.json')), configs.named(path)
    if not trained and not file:
        raise UserError(f'config.stages: no run in {path}, and no config of that name that says what it would be')
    if trained:
        config, spec, _ = read(path)
    else:
        config, spec = configs.load(file), None
    a = assemble(config, mesh, abstract_stage, spec)
    return a.family, a.abstract.replace(params=None, opt=None), a.frozen


def check_stages_trained(config: ConfigDict) -> None:
    """Raises UserError where a stage is not there yet, or elsewhere."""
    for name, path in config.stages.items():
        if not os.path.isfile(os.path.join(os.path.expanduser(path), 'config.json')):
            check_no_archive(path)
            file = configs.named(path)
            first = f'train it first (--config={file}), or' if file else 'train it first, or'
            raise UserError(
                f'config.stages.{name}: no run in {path}: {first} --config.stages.{name}=PATH says where it is'
            )


def assemble(
    config: ConfigDict, mesh=None, stage: Callable = restored_stage, spec: data.Spec | None = None
) -> Assembled:
    """The family of a config, with the stages that it stands on restored from their runs.

    Args:
      stage: (run directory, mesh) -> (family, state, frozen) of an earlier stage; abstract_stage where shapes will do.
      spec: of the data, where the run holds it; None: that of the data.

    Raises:
      UserError: values that do not fit each other, before anything is compiled.
    """
    spec = spec or data.spec(config.data)
    mesh = mesh or sharding.make_mesh(config.mesh.fsdp)
    if stage is restored_stage:
        check_stages_trained(config)
    stages = {name: stage(path, mesh) for name, path in config.stages.items()}
    context = Context(
        image=tuple(spec.features['image'].shape),
        classes=spec.classes,
        optim=optim.make_optim(config.train.steps, batch=config.data.batch, **config.optim.to_dict()),
        stages={name: family for name, (family, _, _) in stages.items()},
        dtype=jnp.dtype(config.train.dtype),
        remat=config.train.remat,
    )
    if 'first' in stages:
        check_stage_image(context, 'first')
    family = make_family(config, context)
    check_size(context.image, family.divisor, 'this network')
    missing = sorted({*family.conditions, *family.displayed} - set(spec.features))
    if missing:
        raise UserError(f'config.data.features must hold {", ".join(missing)}: this model is conditioned on it')
    frozen = {name: (state, its_frozen) for name, (_, state, its_frozen) in stages.items()}
    return Assembled(config, family, frozen, spec, mesh, context=context)


def make_family(config: ConfigDict, context: Context) -> Family:
    """The family of a config, and what its programs depend on: config.model but for fields that are arguments of them,
    and this context. Another call of `assemble` has another one, since code may have changed meanwhile in a notebook.

    Raises:
      UserError: values that do not fit each other.
    """
    build = configs.builder(config.family)
    model = config.model.to_dict()
    family = build(context, **model)
    known = options.fields(build)
    fixed = options.untraced(known, options.complete(build, model, 'model'))
    return family._replace(image=context.image, program=(json.dumps(fixed), context.optim))


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run, ready to sample and to evaluate. Made by `jaxgen.load`."""

    workdir: str
    config: ConfigDict
    assembled: Assembled
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
        anomalous = ~np.isin(data.labels(c.data, split)[:n], kept) if kept else None
        results = held_out.evaluate(model, source, n, c.evaluate.batch, c.seed, anomalous, split)
        if 'factors' in a.spec.features and a.family.encode is not None and not a.family.latents.grids:
            results |= held_out.evaluate_disentanglement(model, source, n, c.evaluate.batch, c.seed)
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

    def compare(self, evaluator: samples.Evaluator, n: int, seed: int = 0) -> dict[str, dict]:
        """Metrics of n samples against a data set, see samples.compare. Where samples are conditioned on attributes
        that the evaluator's network predicts, also the conditional accuracy, see conditional.Attributes."""
        n, seed = check_integer('n', n, 1), check_integer('seed', seed, 0)
        a, c, model = self.assembled, self.config.to_dict(), self.model
        origin.check_named(a.unnamed, *configs.DATA_PATHS)
        batch = model.batch_size(c['sample']['batch'], n)
        weights = features.digest((self.state.ema, self.state.extra, a.frozen))
        decides = [c[name] for name in ('family', 'model', 'data', 'stages')] + [c['train']['dtype'], weights]
        folder = cache.path(self.folder, [*decides, evaluator.features.digest, seed, batch])
        provide = conditions.provider(a, self.config, {})
        attributes = conditional.requested(a.family, c['data'], evaluator.features, evaluator.mesh)
        pieces = samples.sample_outputs(model, provide, evaluator, attributes, n, batch, seed, folder)
        return samples.compare_samples(evaluator, pieces, n)

    def changes(self) -> dict[str, Any]:
        """{field: value} of what samples depend on, where it is another than in the run's own config."""
        different = configs.changed(saved_config(self.folder), self.config)
        return {field: value for field, (_, value) in different.items() if DECIDES.fullmatch(field)}


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
    which, section = config.evaluate.features, config.data.to_dict()
    if which == 'inception':
        network = features.of_inception(config.evaluate.inception, os.path.join(data.root(section), 'weights'), mesh)
    else:
        path = which.removeprefix('run:')
        if not os.path.isfile(os.path.join(path, 'config.json')):
            file = configs.named(path)
            command = f' (python -m jaxgen.main --config={file})' if file else ''
            raise UserError(
                f'config.evaluate.features = {which!r}: no run in {path}; train it first{command}, or --features=none '
                'for the metrics that need no other network'
            )
        network = load(path, mesh=mesh).features
    c = config.evaluate
    evaluator = samples.Evaluator(network, section, c.split, mesh, c.batch, os.path.expanduser(c.reference))
    network.shapes(evaluator.image)  # whether it reads such images
    return evaluator


def saved_config(workdir: str) -> ConfigDict:
    """The config that the run in `workdir` was trained with.

    Raises:
      UserError: there is no run.
    """
    files.check_local(workdir, 'workdir')
    workdir = os.path.expanduser(workdir)
    path = os.path.join(workdir, 'config.json')
    if not os.path.isfile(path):
        check_no_archive(workdir)
        if below := sorted(glob.glob(os.path.join(glob.escape(workdir), '*', 'config.json'))):
            runs = ', '.join(os.path.dirname(file) for file in below[:8])
            raise UserError(f'no run in {workdir}; below it there are {runs}{", ..." if len(below) > 8 else ""}')
        raise UserError(f'no run in {workdir}: train one first, or give its --workdir')
    origin.name_modules(workdir)
    return configs.read_json(path)


def check_no_archive(workdir: str) -> None:
    """Raises UserError where a run's archive is named in place of its directory."""
    unpack = {'.zip': 'python -m zipfile -e', '.tar': 'tar -xf', '.tar.gz': 'tar -xf', '.tgz': 'tar -xf'}
    command = next((c for ending, c in unpack.items() if workdir.endswith(ending)), '')
    if command and os.path.isfile(workdir):
        into = ' FOLDER' if 'zipfile' in command else ' -C FOLDER'
        raise UserError(f'{workdir} is an archive: unpack it, {command} {workdir}{into}, and name the run in FOLDER')


def save_config(workdir: str, config: ConfigDict, spec: data.Spec) -> None:
    """Writes the files by which a run is used without its data, from any directory: config.json, with absolute paths;
    data.json, the spec of an example; origin.json, see origin.py."""
    config = configs.complete(config.to_dict())
    files.save_json(os.path.join(workdir, 'config.json'), config.to_dict())
    files.save_json(os.path.join(workdir, 'data.json'), data.spec_to_json(spec))
    origin.sign(workdir, config)


def saved_spec(workdir: str) -> data.Spec | None:
    """The spec of the training data, as `save_config` wrote it; None: the run has none.

    Raises:
      UserError: the file is damaged.
    """
    path = os.path.join(workdir, 'data.json')
    if not os.path.exists(path):
        return None
    return configs.parse_json(path, data.spec_from_json, 'leave it away where the data are there')


def used_config(workdir: str, saved: ConfigDict, config: ConfigDict | dict | None, named: Set[str]):
    """(config, unnamed): the config that a run is used with, and paths in it that are not to be read; see `load`.

    A stage lies where the person says, or else where `origin.stage` finds it. Where prepared data lie is a question of
    the machine, so a stranger's run does not say it.
    """
    if isinstance(config, dict):
        named, sections = configs.flat(config).keys(), configs.update_sections(saved.to_dict(), config)
    else:
        sections = (saved if config is None else config).to_dict()
    used = configs.complete(sections)
    for name, path in used.stages.items():
        if f'stages.{name}' not in named and path == saved.stages.get(name):
            used.stages[name] = origin.stage(workdir, saved, name)
    unnamed = origin.unnamed(workdir, saved, used, named)
    origin.check_named(unnamed, *(f'stages.{name}' for name in used.stages))
    if unnamed.pop('data.dir', ''):
        used.data.dir = ''
    return used, unnamed


def read(workdir: str, config: ConfigDict | dict | None = None, named: Set[str] = frozenset()):
    """(config, spec, unnamed): what a run is to be used with, no weights; arguments and errors as those of `load`."""
    saved = saved_config(workdir)
    origin.check_layout(workdir, everything=not origin.is_own(workdir, saved))
    config, unnamed = used_config(workdir, saved, config, named)
    spec = saved_spec(workdir)
    if spec is None:  # the data are read for it
        origin.check_named(unnamed, *configs.DATA_PATHS)
    return config, spec, unnamed


def check_system(workdir: str, saved: ConfigDict, path: str) -> None:
    """Raises UserError where the config file `path` is of another system than the run in `workdir`, whose own config is
    read."""
    given = configs.load(path)
    if given.family != saved.family or set(given.model) != set(saved.model):
        raise UserError(
            f'--config={path} is of another system than the run in {workdir} (a {saved.family}), whose own config is '
            'read: leave --config out'
        )
    different = [d for d in configs.differences(saved, given) if d.startswith(('model.', 'data.size', 'stages.'))]
    if different:
        raise UserError(
            f'--config={path} is not what the run in {workdir} was trained with, and the own config of a run is read '
            f'({"; ".join(different)[:300]}): leave --config out'
        )


def check_use(workdir: str, saved: ConfigDict, config: ConfigDict, free: tuple[str, ...]) -> None:
    """Raises UserError where a config says of a trained run that it is another one."""
    different = configs.differences_that_matter(saved, config, free, use=True)
    if different:
        raise UserError(
            f'{workdir} was trained with another config: {"; ".join(different)}; only what training does not depend on '
            'may be changed'
        )


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
    check_weights_name(weights)
    if isinstance(config, dict):
        config = configs.nested_fields(configs.plain(config))
        imports.name_those_of(config)
    elif not isinstance(config, ConfigDict | None):
        raise UserError(
            "config must be the fields that differ, like {'model': {'sampler': 'ddim'}}, or a whole config; it is "
            f'{options.shown(config)}'
        )
    saved = saved_config(workdir)
    used, spec, unnamed = read(workdir, config, named)
    check_cycle(workdir, used)
    if mesh is None and 'mesh.fsdp' not in named:  # a run is used on any number of devices
        used.mesh.fsdp = math.gcd(used.mesh.fsdp, jax.device_count())
    assembled = dataclasses.replace(assemble(used, mesh, spec=spec), unnamed=unnamed)
    check_use(workdir, saved, used, assembled.family.free)
    if weights != 'ema' and assembled.family.statistics:
        raise UserError(
            f'--weights={weights}: what {used.family} draws with includes statistics of the averaged weights, which '
            'fit no others: leave --weights out'
        )
    items = ('params', 'ema', 'extra') if all_weights or weights == 'params' else ('ema', 'extra')
    if step is not None:
        step = stopping.best_step(workdir) if step == 'best' else check_integer('step', step, 0)
    checkpoints = Checkpoints(workdir)
    find = checkpoints.restore if step is None else functools.partial(checkpoints.restore_step, int(step))
    restored = find(assembled.abstract, assembled.mesh, items)
    if restored is None:
        raise UserError(f'{workdir} has no checkpoint yet: let the training save one first')
    state, about = restored
    check_stages(about, assembled, workdir, configs.moved(saved, used))
    check_moved_data(about, used, workdir, configs.moved(saved, used), saved.data.test_source)
    names = [name for name in state.ema if '@' not in name]
    if weights != 'ema' and int(state.step) == 0:
        raise UserError(f'{workdir} holds published weights, which are one set: leave --weights out')
    if weights == 'params':
        ema = {name: state.params[name] for name in names}
    elif weights == 'ema':
        ema = {name: state.ema[name] for name in names}
    else:
        ema = averaged_afterwards(checkpoints, assembled, names, int(state.step), float(weights))
    checkpoints.close()
    if weights == 'ema' and 'imported' not in about:
        say_if_initial(workdir, used, int(state.step), assembled.family.statistics)
    state = state.replace(ema=ema)
    return Run(workdir, used, assembled, state, weights)


def say_if_initial(workdir: str, config: ConfigDict, step: int, statistics: bool) -> None:
    """Warns where more than a twentieth of the averaged weights are those before the first update."""
    left = optim.initial_fraction(step, batch=config.data.batch, **config.optim.to_dict())
    if left > MOST_INITIAL:
        or_params = '' if statistics else ', or take --weights=params here'
        log.say(
            f'WARNING: after {step} updates {100 * left:.0f} % of the averaged weights (config.optim.ema) of {workdir} '
            f'are still the initial ones: train on, or anew with --config.optim.ema_warmup=True or a smaller '
            f'ema{or_params}'
        )


def averaged_afterwards(
    checkpoints: Checkpoints, assembled: Assembled, names: list[str], step: int, std: float
) -> dict:
    """Weights {network: average of width `std` at `step`}, by the averages in all checkpoints up to it.

    Raises:
      UserError: the run kept no such averages.
    """
    stds = assembled.config.optim.ema_std
    if not stds:
        raise UserError(
            f'--weights={std:g} is made of averages that this run did not keep: train with '
            "--config.optim.ema_std='(0.05, 0.1)' and --config.train.keep_every=N"
        )
    saved = [s for s in checkpoints.steps() if s <= step and not checkpoints.trouble(s)]
    pairs = [(s, width) for s in saved for width in stds]
    steps, widths = (np.array(column) for column in zip(*pairs, strict=True))
    weights = optim.post_hoc(steps, widths, step, std)
    total: Any = None
    for s in saved:
        try:
            state, _ = checkpoints.read(s, assembled.abstract, assembled.mesh, ('ema',))
        except (UserError, RunError, MemoryError):
            raise
        except Exception as e:
            text = ' '.join(str(e).split())[:200]
            raise RunError(
                f'checkpoint of step {s} cannot be read ({text}): move it out of {checkpoints.folder}'
            ) from e
        for (at, width), weight in zip(pairs, weights, strict=True):
            if at == s:
                part = {name: jax.tree.map(lambda x, c=weight: c * x, state.ema[f'{name}@{width}']) for name in names}
                total = part if total is None else jax.tree.map(jnp.add, total, part)
    return total
