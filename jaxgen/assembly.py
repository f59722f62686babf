"""The family that a config makes with its stages, data and devices, and the weights of a run restored into it."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from ml_collections import ConfigDict

from jaxgen import config as configs
from jaxgen import data, directory, imports, log, optim, options, origin, sample, sharding, stopping
from jaxgen.checkpoint import Checkpoints
from jaxgen.checks import check_same_weights, check_size, size_text
from jaxgen.contract import NEGATIVE, Context, Family, State, Texts
from jaxgen.errors import RunError, UserError
from jaxgen.metrics import features
from jaxgen.options import check_integer, check_weights_name
from jaxgen.sections import sides
from jaxgen.text import captions
from jaxgen.text.tokenizers import Tokenizer

MOST_VARIANTS = 64  # of an `Assembled` that it keeps
MOST_INITIAL = 0.05  # of averaged weights may be those before the first update, before a line says so


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
    workdir: str = ''  # of the run that it is restored from, '' before there is one

    def dataset(self, split: str, **changes):
        """The examples of config.data, some of its fields changed, as the family reads them.

        Raises:
          UserError: they lie where only a stranger's run says so.
        """
        examples = self.untokenised(split, **changes)
        return captions.Tokenised(examples, self.tokenised) if self.texts else examples

    def untokenised(self, split: str, **changes):
        """As `dataset`, with captions as the data have them."""
        origin.check_named(self.unnamed, *configs.DATA_PATHS)
        return data.dataset({**self.config.data.to_dict(), **changes}, split)

    @functools.cached_property
    def texts(self) -> dict[str, Texts]:
        """{name in a batch: what is known of the tokens there}: 'tokens' that the family itself reads, 'STAGE/tokens'
        that a frozen stage reads."""
        stages = self.context.stages if self.context else {}
        every = {'tokens': self.family.texts, **{f'{name}/tokens': family.texts for name, family in stages.items()}}
        return {name: texts for name, texts in every.items() if texts.vocabulary}

    @functools.cached_property
    def tokenizers(self) -> dict[str, Tokenizer]:
        """{name of tokens: their tokenizer}: those of runs lie there, a new run's own is trained on its captions.

        Raises:
          UserError: a stage has none.
        """
        made = {}
        for name, texts in self.texts.items():
            stage = name.rpartition('/')[0]
            path = self.config.stages[stage] if stage else self.workdir
            saved = directory.saved_tokenizer(path) if path else None
            if not stage and saved is None and self.config.train.initial:
                saved = directory.saved_tokenizer(self.config.train.initial)
            if saved is None and stage:
                raise UserError(f'config.stages.{stage}: the run in {path} has no tokenizer')
            own = saved or captions.trained(self.config.data, texts)
            made[name] = dataclasses.replace(own, whole=not texts.divisible)
        first = {name: texts.vocabulary for name, texts in self.texts.items()}
        for stage, word, n in self.family.captions.added:
            name = f'{stage}/tokens'
            made[name] = made[name].with_word(word, range(first[name], first[name] + n))
            first[name] += n
        return made

    def tokenised(self, batch: dict[str, Any], prompts: bool = False) -> dict[str, Any]:
        """A batch with its captions as the tokens that the family and its stages read.

        Args:
          prompts: the captions are to be sampled; the family may read weights in them, or several parts of them.
        """
        if not self.texts:
            return batch
        read = self.family.captions
        chunks = read.chunks if prompts else 1
        return captions.tokenised(batch, self.tokenizers, read.encoded, prompts and read.weighted, chunks)

    @property
    def features(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and types of one example as the family reads it; see `tokenised`."""
        features = dict(self.spec.features)
        if self.texts:
            features.pop('caption', None)
            others = 'other/' if features.pop('other_caption', None) else ''
        tokens = {name: jax.ShapeDtypeStruct((texts.length,), np.int32) for name, texts in self.texts.items()}
        of_others = {f'other/{name}': x for name, x in tokens.items()} if self.texts and others else {}
        if self.family.captions.encoded:
            tokens |= {captions.negative_name(name): x for name, x in tokens.items() if '/' in name}
            tokens[NEGATIVE] = jax.ShapeDtypeStruct((), np.bool_)
        return features | tokens | of_others

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
        batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct((n, *a.shape), a.dtype), self.features)
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

    @functools.cached_property
    def tokenizer_digests(self) -> dict[str, str]:
        """{name of tokens: SHA-256 of their tokenizer}, which a checkpoint keeps beside `stage_digests`."""
        return {name: tokenizer.digest() for name, tokenizer in self.tokenizers.items()}


def init_state(family: Family, rng, batch: dict, frozen) -> State:
    """The state before the first update, of a training batch of uint8 images."""
    return family.init(rng, sample.to_inside(batch), frozen)


def check_stages(about: dict, assembled: Assembled, workdir: str, moved: Sequence[str] = ()) -> None:
    """Raises UserError where a stage has other weights, or texts another tokenizer, than when the checkpoint `about`
    was saved.

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
    for name, digest in about.get('tokenizers', {}).items():
        if assembled.tokenizer_digests.get(name, digest) != digest:
            stage = name.rpartition('/')[0]
            path = assembled.config.stages[stage] if stage else workdir
            raise UserError(
                f'{os.path.join(path, directory.TOKENIZER)} is not the tokenizer that {workdir} was trained with: put '
                'that back, or train it anew in another --workdir'
            )


def restored_stage(
    path: str, mesh, dtype: str = '', made: dict | None = None, alone: dict[str, str] | None = None
) -> tuple[Family, State, dict]:
    """An earlier stage from its run: its family, its weights, and the frozen ones of its own stages.

    Args:
      dtype: that it computes in; '': that which it was trained in.
      made: stages that are restored already; a run that several name is restored once.
      alone: nothing of its own stages is read: they are shapes, and `frozen` is {}. {name: path} says where those of
        them lie that the person has named.
    """
    made = {} if made is None else made
    key = (os.path.realpath(path), dtype, alone is None)
    if key not in made:
        fields = {'train.dtype': dtype} if dtype else {}
        if alone is None:
            stage = functools.partial(restored_stage, made=made)
            assembled, state = restore(path, fields, mesh=mesh, stage=stage)
        else:
            assembled, state = restored_alone(path, alone, mesh, fields)
        made[key] = assembled.family, state, assembled.frozen if alone is None else {}
    return made[key]


def restored_alone(path: str, stages: dict[str, str], mesh, fields: dict[str, Any] | None = None):
    """As `restore`, of a run whose stages are shapes; they lie where `stages` says, if it names them."""
    named = {f'stages.{name}': stages[name] for name in directory.saved_config(path).stages if name in stages}
    return restore(path, {**(fields or {}), **named}, mesh=mesh, stage=abstract_stage)


def abstract_stage(path: str, mesh, dtype: str = '', size: tuple[int, ...] = ()) -> tuple[Family, State, dict]:
    """The same as shapes and dtypes, of the run in `path` or, before there is one, of the config of that name.

    Args:
      size: height and width of images; (): those that it was trained on.

    Raises:
      UserError: there is neither.
    """
    trained, file = os.path.isfile(os.path.join(path, 'config.json')), configs.named(path)
    if not trained and not file:
        raise UserError(f'config.stages: no run in {path}, and no config of that name that says what it would be')
    if trained:
        config, spec, _ = directory.read(path)
    else:
        config, spec = configs.load(file), None
    config.train.dtype = dtype or config.train.dtype
    image = trained_image(config, spec)
    if size and size != image[:2]:
        config, spec = of_size(config, size), data.resized(spec, size) if spec else None
    a = assemble(config, mesh, abstract_stage, spec, trained=image)
    return a.family, a.abstract.replace(params=None, opt=None), a.frozen


def of_size(config: ConfigDict, size: int | tuple[int, ...]) -> ConfigDict:
    """A config with another `data.size`; a pair may take the place of a number."""
    return ConfigDict({**config.to_dict(), 'data': {**config.data.to_dict(), 'size': size}})


def trained_image(config: ConfigDict, spec: data.Spec | None) -> tuple[int, ...]:
    """Height, width and channels of the images of a config, whose spec may be there already."""
    return tuple((spec or data.spec(config.data)).features['image'].shape)


def resized_stage(
    field: str, path: str, mesh, dtype: str, image: tuple[int, ...], made: tuple[Family, State, dict]
) -> tuple[Family, State, dict]:
    """A stage `made` as it is for images of another size: a convolutional network has none.

    Raises:
      UserError: it has; or the other size does not fit it.
    """
    family, state, frozen = made
    if family.image[2:] != image[2:]:
        raise UserError(f'{field} was trained on images of {family.image[2]} channels, and config.data has {image[2]}')
    try:
        other, abstract, _ = abstract_stage(path, mesh, dtype, image[:2])
    except UserError as e:
        raise UserError(f'{field} was trained on images of {size_text(family.image)} pixels: {e}') from e
    check_same_weights(state, abstract, f'{field}, for images of {size_text(image)}', family.image)
    return other, state, frozen


def check_stages_trained(config: ConfigDict) -> None:
    """Raises UserError where a stage is not there yet, or elsewhere."""
    for name, path in config.stages.items():
        if not os.path.isfile(os.path.join(os.path.expanduser(path), 'config.json')):
            directory.check_no_archive(path)
            file = configs.named(path)
            first = f'train it first (--config={file}), or' if file else 'train it first, or'
            raise UserError(
                f'config.stages.{name}: no run in {path}: {first} --config.stages.{name}=PATH says where it is'
            )


def assemble(
    config: ConfigDict,
    mesh=None,
    stage: Callable = restored_stage,
    spec: data.Spec | None = None,
    workdir: str = '',
    trained: tuple[int, ...] = (),
) -> Assembled:
    """The family of a config, with the stages that it stands on restored from their runs.

    Args:
      mesh: None: of all devices, weights cut into as many of the config's parts as go with their number.
      stage: (run directory, mesh, dtype) -> (family, state, frozen) of an earlier stage; abstract_stage where shapes
        will do.
      spec: of the data, where the run holds it; None: that of the data.
      workdir: of the run, whose tokenizer is read where there is one.
      trained: height, width and channels of the images that its weights are of; (): those of config.data.

    Raises:
      UserError: values that do not fit each other, before anything is compiled.
    """
    spec = spec or data.spec(config.data)
    mesh = mesh or sharding.make_mesh(math.gcd(config.mesh.fsdp, jax.device_count()))
    restoring = stage is restored_stage or getattr(stage, 'func', None) is restored_stage
    if restoring:
        check_stages_trained(config)
        stage = functools.partial(restored_stage, made={}) if stage is restored_stage else stage
    dtype = '' if config.train.stages_dtype == 'stage' else config.train.dtype
    stages = {}
    for name, path in config.stages.items():
        alone = restoring and directory.is_read_alone(config, name, path)
        named = {k: v for k, v in config.stages.items() if k != name}
        stages[name] = stage(path, mesh, dtype, **({'alone': named} if alone else {}))
    image = tuple(spec.features['image'].shape)
    if 'first' in stages and stages['first'][0].image != image:
        path = config.stages['first']
        stages['first'] = resized_stage(f'config.stages.first = {path}', path, mesh, dtype, image, stages['first'])
    context = Context(
        image=image,
        classes=spec.classes,
        optim=optim.make_optim(config.train.steps, batch=config.data.batch, **config.optim.to_dict()),
        stages={name: family for name, (family, _, _) in stages.items()},
        dtype=jnp.dtype(config.train.dtype),
        remat=config.train.remat,
        trained=trained if trained != image else (),
        tokenizer=(lambda name: directory.saved_tokenizer(config.stages[name])) if restoring else None,
    )
    family = make_family(config, context)
    check_size(context.image, family.divisor, 'this network')
    needed = {*family.conditions, *family.displayed} | ({'caption'} if family.texts.vocabulary else set())
    missing = sorted(needed - set(spec.features))
    if missing:
        raise UserError(f'config.data.features must hold {", ".join(missing)}: this model is conditioned on it')
    frozen = {name: (state, its_frozen) for name, (_, state, its_frozen) in stages.items()}
    return Assembled(config, family, frozen, spec, mesh, context=context, workdir=workdir)


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
    complete = options.complete(build, model, 'model')
    program = (json.dumps(options.untraced(known, complete)), context.optim)
    about = json.dumps({'family': config.family, 'model': complete})
    return family._replace(image=context.image, config=about, program=program, deterministic=config.train.deterministic)


def restore(
    workdir: str,
    config: ConfigDict | dict | None = None,
    weights: str = 'ema',
    all_weights: bool = False,
    mesh=None,
    named: Set[str] = frozenset(),
    step: int | str | None = None,
    stage: Callable = restored_stage,
) -> tuple[Assembled, State]:
    """The config of a run assembled, and its weights as State.ema; arguments and errors as those of `run.load`.

    stage: as of `assemble`; of an abstract one it is not checked that it is what the run was trained on.
    """
    check_weights_name(weights)
    if isinstance(config, dict):
        config = configs.nested_fields(configs.plain(config))
        imports.name_those_of(config)
    elif not isinstance(config, ConfigDict | None):
        raise UserError(
            "config must be the fields that differ, like {'model': {'sampler': 'ddim'}}, or a whole config; it is "
            f'{options.shown(config)}'
        )
    saved = directory.saved_config(workdir)
    used, spec, unnamed = directory.read(workdir, config, named)
    directory.check_cycle(workdir, used)
    if mesh is None and 'mesh.fsdp' not in named:  # a run is used on any number of devices
        used.mesh.fsdp = math.gcd(used.mesh.fsdp, jax.device_count())
    resized = sides(used.data.size) != sides(saved.data.size)
    trained = trained_image(saved, directory.saved_spec(workdir)) if resized else ()
    assembled = dataclasses.replace(assemble(used, mesh, stage, spec, workdir, trained), unnamed=unnamed)
    directory.check_use(workdir, saved, used, assembled.family.free)
    if resized:
        field, kept = f'config.data.size = {size_text(assembled.family.image)}', as_trained(workdir, saved, used, mesh)
        check_same_weights(kept, assembled.abstract, field, trained)
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
    if stage is not abstract_stage:
        check_stages(about, assembled, workdir, configs.moved(saved, used))
    directory.check_moved_data(about, used, workdir, configs.moved(saved, used), saved.data.test_source)
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
    return assembled, state.replace(ema=ema)


def as_trained(workdir: str, saved: ConfigDict, used: ConfigDict, mesh) -> State:
    """The State of a run for images of the size that it was trained on, as shapes."""
    return assemble(
        of_size(used, saved.data.size), mesh, abstract_stage, directory.saved_spec(workdir), workdir
    ).abstract


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
