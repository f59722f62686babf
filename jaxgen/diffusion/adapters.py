"""Adapters: what is added to the weights of a trained network, which stay as they are.

LoRA (Hu et al. 2021, arXiv 2106.09685) adds a product of two small matrices to each of some kernels,

    W + scale alpha / rank  down up,    down [in, rank], up [rank, out]

with `up` zero before the first update. Their weights lie in a tree like the network's, {'down': ..., 'up': ...} in the
place of {'kernel': ...}. Of the stacked kernels of a scan each has its own pair, and so has each of the matrices that
lie side by side in one kernel, queries, keys and values: [blocks, matrices, in, rank]. `down` of a convolution has its
kernel, and `up` is 1x1.
"""

from __future__ import annotations

import fnmatch
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxgen.contract import Context
from jaxgen.errors import UserError
from jaxgen.options import TRACED, Component, Count, NonNegative, PartialFields
from jaxgen.randomness import stream

Array = jax.Array

BASE = 'base'  # the stage whose network is adapted
LORA, INVERSION = 'lora', 'inversion'  # the network of `State`, and the adapter's name
OWN = 'own'  # in the section of scales, the run's own LoRA
ATTENTION = ('qkv', '*_qkv*', 'out', '*_out*', 'cross_q', 'cross_kv')
# Fields of config.model that are the base's; {}: the whole section. Of conditions all but how often they are dropped.
SAME = ('process', 'network', 'conditioning', 'latent_scale', 'latent_shift')
SAME_TRAINING = ('prediction', 'variance')
MATRICES = {'qkv': 3, 'kv': 2}  # side by side in a kernel, by the end of its layer's name


def lora(
    *,
    rank: Count = 4,
    alpha: NonNegative = 0.0,
    layers: tuple[str, ...] = ATTENTION,
) -> None:
    """LoRA of the network of `config.stages.base`.

    Args:
      rank: of the matrices that are added.
      alpha: they are multiplied by alpha / rank; 0: as large as the rank.
      layers: patterns for words of a layer's path or the path: '*' is every layer with a kernel.
    """


def inversion(
    *,
    word: str = '',
    vectors: Count = 1,
    initial: str = '',
    encoders: tuple[str, ...] = (),
) -> None:
    """A new word for the text encoders of the model of `config.stages.base`, see diffusion/inversion.py.

    Args:
      word: that captions have for it, '<zig>'.
      vectors: tokens that it is for an encoder.
      initial: a word that it begins as, one token; '': the mean of all.
      encoders: stages of the text encoders that learn it; (): all.
    """


COMPONENT = Component({'none': None, LORA: lora, INVERSION: inversion})


def added(*, scale: Annotated[float, TRACED] = 1.0) -> None:
    """A LoRA in sampling.

    Args:
      scale: of what it adds to the weights.
    """


SECTION = PartialFields(added)


class Layer(NamedTuple):
    """A kernel to which something is added."""

    path: str  # of its layer, 'down0_0_transformer/blocks/qkv'
    stack: tuple[int, ...]  # (blocks of a scan,) or ()
    matrices: tuple[int, ...]  # (number of matrices side by side,) or ()
    inputs: tuple[int, ...]  # (in,) or (height, width, in)
    outputs: int  # of each matrix

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes of both factors."""
        front = self.stack + self.matrices
        return {'down': (*front, *self.inputs, rank), 'up': (*front, rank, self.outputs)}


def layer_of(path: str, shape: Sequence[int]) -> Layer:
    """The layer with a kernel of this shape: [in, out] or [height, width, in, out], stacked with one axis more."""
    ending = re.search(r'(?:^|[/_])(qkv|kv)\d?$', path)
    matrices = MATRICES[ending[1]] if ending and len(shape) <= 3 else 1
    stack, rest = (tuple(shape[:1]), shape[1:]) if len(shape) % 2 else ((), shape)
    return Layer(path, stack, (matrices,) * (matrices > 1), tuple(rest[:-1]), rest[-1] // matrices)


def layers_of(shapes: Mapping[str, Any]) -> list[Layer]:
    """All layers of a network with a kernel, by the tree of its weights or their shapes."""
    flat = flatten_dict(shapes, sep='/')
    return [layer_of(path.rpartition('/')[0], x.shape) for path, x in flat.items() if path.endswith('/kernel')]


def chosen(shapes: Mapping[str, Any], patterns: Sequence[str]) -> list[Layer]:
    """The layers that patterns name.

    Raises:
      UserError: a pattern, or without the usual ones none, names no layer.
    """
    every = layers_of(shapes)

    def named(pattern: str) -> list[Layer]:
        return [e for e in every if any(fnmatch.fnmatchcase(w, pattern) for w in (*e.path.split('/'), e.path))]

    entries = {pattern: named(pattern) for pattern in patterns}
    wrong = [pattern for pattern, some in entries.items() if not some]
    if wrong and (tuple(patterns) != ATTENTION or len(wrong) == len(entries)):
        names = sorted({e.path.rpartition('/')[2] for e in every})
        raise UserError(
            f'config.model.adapter.layers: no layer is named {wrong[0]!r}; their names end in {", ".join(names)[:300]}'
        )
    paths = {e.path for some in entries.values() for e in some}
    return [e for e in every if e.path in paths]


def init(rng: Array, shapes: Mapping[str, Any], frozen: Any, adapter: Mapping[str, Any]) -> dict[str, Any]:
    """Weights of LoRA before the first update: normals of variance 1 / inputs, and zeros.

    Args:
      shapes: of the weights of the network by its config.
      adapter: the complete section.

    Raises:
      UserError: the base has other weights.
    """
    check_weights(shapes, frozen[BASE][0].ema['denoiser'], BASE)
    flat = {}
    for layer in chosen(shapes, adapter['layers']):
        own = layer.shapes(adapter['rank'])
        noise = jax.random.normal(stream(rng, layer.path), own['down'])
        flat[f'{layer.path}/down'] = noise * math.prod(layer.inputs) ** -0.5
        flat[f'{layer.path}/up'] = jnp.zeros(own['up'])
    return unflatten_dict(flat, sep='/')


def check_weights(shapes: Mapping[str, Any], weights: Mapping[str, Any], stage: str) -> None:
    """Raises UserError where the weights of a stage's network are not those of this one: of another number of classes,
    or other data."""
    here, there = ({k: x.shape for k, x in flatten_dict(tree, sep='/').items()} for tree in (shapes, weights))
    for path in sorted(here.keys() | there.keys()):
        if here.get(path) != there.get(path):
            raise UserError(
                f'config.stages.{stage} has other weights than this network: {path} is {there.get(path)} there and '
                f'{here.get(path)} here: take data with as many classes and channels'
            )


def product(down: Array, up: Array, layer: Layer, shape: Sequence[int]) -> Array:
    """down up as an array of the kernel's shape, float32."""
    blocks, matrices, rank = math.prod(layer.stack), math.prod(layer.matrices), up.shape[-2]
    first = down.astype(jnp.float32).reshape(blocks, matrices, -1, rank)
    second = up.astype(jnp.float32).reshape(blocks, matrices, rank, -1)
    each = jnp.einsum('bmir,bmro->bimo', first, second, precision='highest')
    return each.reshape(shape)


def with_lora(weights: dict[str, Any], adapters: Sequence[tuple[dict[str, Any], Any]]) -> dict[str, Any]:
    """A network's weights and what adapters add to them, float32 where there is anything.

    Args:
      adapters: (weights of LoRA, number that its product is multiplied by).
    """
    flat = flatten_dict(weights, sep='/')
    for adapter, factor in adapters:
        pairs = flatten_dict(adapter, sep='/')
        for path in (path.removesuffix('/down') for path in pairs if path.endswith('/down')):
            kernel = flat[f'{path}/kernel']
            more = product(pairs[f'{path}/down'], pairs[f'{path}/up'], layer_of(path, kernel.shape), kernel.shape)
            flat[f'{path}/kernel'] = kernel.astype(jnp.float32) + factor * more
    return unflatten_dict(flat, sep='/')


def factor_of(adapter: Mapping[str, Any]) -> float:
    """alpha / rank of a complete section."""
    return (adapter['alpha'] or adapter['rank']) / adapter['rank']


# --- stages


def built_of(family: Any) -> dict[str, Any]:
    """{'family': name, 'model': config.model} of a stage, {} where it is not known."""
    return json.loads(family.config) if family.config else {}


def adapter_of(family: Any) -> dict[str, Any]:
    """The section `adapter` of a stage's config.model; 'none' where it has none."""
    about = built_of(family)
    return about.get('model', {}).get('adapter', {}) if about.get('family') == 'diffusion' else {}


def is_adapter(config: Mapping[str, Any]) -> bool:
    """Whether the run of a saved config holds an adapter alone."""
    adapter = config['model'].get('adapter', {}) if config['family'] == 'diffusion' else {}
    return adapter.get('name', 'none') != 'none'


def reads_alone(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a stage's own stages are not read: of the base, its network is, and of an adapter, what it adds."""
    return name == BASE or is_adapter(config)


def flat_fields(section: Any, path: str = '') -> dict[str, Any]:
    """{'a.b': value} of nested sections."""
    if not isinstance(section, dict):
        return {path: section}
    return {k: v for name, own in section.items() for k, v in flat_fields(own, f'{path}.{name}').items()}


def check_same(model: Mapping[str, Any], family: Any, stage: str) -> None:
    """Raises UserError where a model is not that of a stage: another network or process, or other conditions.

    Args:
      model: complete config.model.
      family: of the stage.
    """
    about = built_of(family)
    if about.get('family') != 'diffusion':
        raise UserError(f'config.stages.{stage} must be a diffusion run: its network is adapted')

    def compared(model: Mapping[str, Any]) -> dict[str, Any]:
        sections = {name: model[name] for name in SAME}
        sections['training'] = {name: model['training'][name] for name in SAME_TRAINING}
        fields = {path[1:]: value for path, value in flat_fields(sections).items()}
        fields = {path: list(v) if isinstance(v, tuple) else v for path, v in fields.items()}
        return {path: v for path, v in fields.items() if not re.fullmatch(r'(conditioning|network)\..*dropout', path)}

    here, there = compared(model), compared(about['model'])
    wrong = [path for path in sorted(here.keys() | there.keys()) if here.get(path) != there.get(path)]
    if wrong:
        shown = '; '.join(f'{path} = {here.get(path)!r} here, {there.get(path)!r} there' for path in wrong[:3])
        raise UserError(
            f'config.stages.{stage} is a run of another model: config.model.{shown}; --config=RUN:lora or '
            'RUN:controlnet takes all of it from the run'
        )


def factors_of(
    context: Context, model: Mapping[str, Any], adapter: Mapping[str, Any], scales: Mapping[str, Any]
) -> dict[str, float]:
    """{name: scale alpha / rank} of the run's own LoRA and of those of its stages.

    Args:
      model: complete config.model.
      adapter: its section of this name.
      scales: {name: {'scale': number}}, 1 where it is not named.

    Raises:
      UserError: a LoRA of another model, or a scale of none.
    """
    factors = {}
    for name, family in context.stages.items():
        theirs = adapter_of(family)
        if name != BASE and theirs.get('name') == LORA:
            check_same(model, family, name)
            factors[name] = factor_of(theirs)
    if OWN in factors:
        raise UserError(f"config.stages.{OWN}: this is the name of a run's own LoRA: take another")
    if adapter['name'] == LORA:
        factors = {OWN: factor_of(adapter), **factors}
    for name in scales:
        if name not in factors:
            raise UserError(
                f'config.model.adapters.{name} needs config.stages.{name}, the run of a LoRA'
                if name != OWN
                else f'config.model.adapters.{OWN}: this run has no LoRA of its own'
            )
    return {name: factor * scales.get(name, {}).get('scale', 1.0) for name, factor in factors.items()}


class Adapters(NamedTuple):
    """What makes the weights that a network is applied with."""

    base: bool  # whether the network is that of the stage BASE
    factors: dict[str, float]  # of each LoRA in sampling, see `factors_of`
    own: float  # alpha / rank of its own LoRA

    @property
    def in_training(self) -> dict[str, float]:
        """The factors with which the run's own LoRA is trained, by its scale 1 and without others."""
        return {OWN: self.own} if OWN in self.factors else {}

    def weights(self, networks: dict[str, Any], frozen: Any, factors: dict[str, Any] | None = None) -> Any:
        """The weights of a network.

        Args:
          networks: params or averages of the run.
          factors: in place of its own.
        """
        weights = frozen[BASE][0].ema['denoiser'] if self.base else networks['denoiser']
        factors = self.factors if factors is None else factors
        trees = {name: networks[LORA] if name == OWN else frozen[name][0].ema[LORA] for name in factors}
        return with_lora(weights, [(trees[name], factor) for name, factor in factors.items()]) if trees else weights

    def merged(self, state: Any, frozen: Any) -> dict[str, Any]:
        """{network: weights} that sampling applies, in the dtype of the base's."""
        weights = frozen[BASE][0].ema['denoiser'] if self.base else state.ema['denoiser']
        made = self.weights(state.ema, frozen)
        return {'denoiser': jax.tree.map(lambda new, old: new.astype(old.dtype), made, weights)}

    def without(self, sections: dict[str, Any]) -> dict[str, Any]:
        """The sections of a config without the adapters."""
        stages = {name: path for name, path in sections['stages'].items() if name not in (BASE, *self.factors)}
        model = {**sections['model'], 'adapter': 'none', 'adapters': {}}
        return {**sections, 'stages': stages, 'model': model}


def bind(context: Context, model: Mapping[str, Any], adapter: Mapping[str, Any], scales: Mapping[str, Any]) -> Adapters:
    """The adapters of a model; arguments and errors as those of `factors_of`.

    Raises:
      UserError: an adapter without a base, or a base that is another model or an adapter itself.
    """
    base = adapter['name'] != 'none'
    if base and BASE not in context.stages:
        raise UserError(
            f'config.model.adapter.name = {adapter["name"]!r} needs config.stages.{BASE}, the run whose network it '
            'adapts: --config=RUN:lora names it and takes its model'
        )
    if base:
        check_same(model, context.stages[BASE], BASE)
        if adapter_of(context.stages[BASE]).get('name', 'none') != 'none':
            raise UserError(
                f'config.stages.{BASE} is the run of an adapter: make one run of it and its base with --mode=merge, '
                'and name that'
            )
    own = factor_of(adapter) if adapter['name'] == LORA else 0.0
    return Adapters(base, factors_of(context, model, adapter, scales), own)


# --- tuning.py


def of_few_images(sections: dict[str, Any]) -> dict[str, Any]:
    """The section `data` for a few images: all of them are trained on, and have the conditions of the model alone."""
    read = [name for name in sections['data']['features'] if name in sections['model']['conditioning']]
    return {'batch': 4, 'test_fraction': 0.0, 'features': ('image', *read), 'prepared': 'off'}


def lora_of(sections: dict[str, Any], run: str) -> dict[str, Any]:
    """What a config of LoRA has over that of its base: the recipe of diffusers' examples of training LoRA (the rate,
    AdamW, the norm of the gradient, rank 4), without an average of the weights, which so few updates would not fill.
    """
    return {
        'stages': {BASE: run},
        'model': {'adapter': {'name': 'lora'}},
        'data': of_few_images(sections),
        'optim': {'name': 'adamw', 'lr': 1e-4, 'weight_decay': 1e-2, 'clip': 1.0, 'ema': 0.0},
        'train': {'steps': 500, 'save_every': 250, 'sample_every': 250, 'samples': 16},
    }


def full_of(sections: dict[str, Any], run: str) -> dict[str, Any]:
    """What a config of fine-tuning all weights has over that of the run that it starts from: DreamBooth's recipe in
    diffusers' example (the rate, AdamW, the norm of the gradient)."""
    return {
        'data': of_few_images(sections),
        'optim': {'name': 'adamw', 'lr': 5e-6, 'weight_decay': 1e-2, 'clip': 1.0, 'ema': 0.0},
        'train': {'initial': run, 'steps': 400, 'save_every': 200, 'sample_every': 200, 'samples': 16},
    }
