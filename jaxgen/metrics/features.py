"""Evaluation networks: from uint8 images to the features that distances are measured in.

    features = of_run(jaxgen.load('runs/classifier_digits'))
    extract(features, mesh, images, size=256)['features']  # float32 [n, d]

A distance between two sets of images means nothing without the network it was measured in, so every metric carries
the network's name, and the SHA-256 of its weights is recorded with it.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import data, fsdp, log, sharding
from jaxgen.errors import UserError
from jaxgen.metrics import inception
from jaxgen.networks.inception import Inception


class EmbeddedTexts(NamedTuple):
    """Texts as a network reads them."""

    embeddings: np.ndarray  # float32 [n, d], of length 1
    tokens: np.ndarray  # int32 [n, length], the same where a text is the same


class Features(NamedTuple):
    """A network with its weights."""

    name: str  # stands in the name of every metric
    digest: str  # SHA-256 of the weights
    image: tuple[int, int, int] | None  # H, W, C that it reads; None: any size, grey or colour
    apply: Callable  # (variables, uint8 [n, H, W, C]) -> {'features': [n, d], 'logits': [n, c], 'spatial': [n, s]}
    variables: Any
    attributes: tuple[str, ...] = ()  # features of the data that a classifier predicts
    # (variables, {'image': uint8 [n, H, W, C], attributes}) -> {'accuracy': [n], ...}: whether predictions are right
    correct: Callable | None = None
    resizes: bool = False  # images of any size are brought to that of `image`, and grey ones to its channels
    texts: Callable[[Sequence[str]], EmbeddedTexts] | None = None  # of a network with texts and images in one space

    def shapes(self, image: tuple[int, int, int]) -> dict[str, int]:
        """{output: its dimensions} for images of shape `image`; 'logits' and 'spatial' only where there are any.

        Raises:
          UserError: it does not read such images.
        """
        own = self.image or image
        if own != image and not (self.resizes and own[2] in (3, image[2])):
            raise UserError(
                f'{self.name} reads images of {displayed(own)}, and these are {displayed(image)}: '
                'name features that were trained on such images'
            )
        like = jax.ShapeDtypeStruct((1, *image), np.uint8)
        return {name: out.shape[1] for name, out in jax.eval_shape(self.apply, self.variables, like).items()}


def displayed(image: tuple[int, int, int]) -> str:
    """'32 x 32 x 3'."""
    return ' x '.join(map(str, image))


def digest(tree) -> str:
    """SHA-256 over names, shapes and values of all arrays."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        value = sharding.to_host(leaf)
        total.update(f'{jax.tree_util.keystr(path)} {value.shape} {value.dtype} '.encode())
        total.update(np.ascontiguousarray(value).tobytes())
    return total.hexdigest()


def resized(images: jax.Array, image: tuple[int, int, int]) -> jax.Array:
    """uint8 [n, H, W, C] as [n, *image]: the largest part in the middle that has its aspect ratio, by bicubic
    interpolation with antialiasing (Keys 1981, a = -1/2), as CLIP's images are brought to size."""
    height, width, channels = image
    factor = max(height / images.shape[1], width / images.shape[2])
    size = [max(int(factor * side), least) for side, least in zip(images.shape[1:3], image, strict=False)]
    if (height, width) != images.shape[1:3]:
        x = jax.image.resize(images.astype(jnp.float32), (len(images), *size, images.shape[3]), 'cubic')
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        x = jnp.rint(jnp.clip(x[:, top : top + height, left : left + width], 0, 255))
        images = x.astype(jnp.uint8)
    return jnp.broadcast_to(images, (*images.shape[:3], channels))


def of_run(run) -> Features:
    """The features of a run (run.Run): the output of its family's `encode`, flat, and the logits of its `classify`. One
    that reads texts too takes images of any size, see `resized`.

    Raises:
      UserError: its family encodes nothing.
    """
    family = run.assembled.family
    if family.encode is None or family.latents.grids:
        raise UserError(f'{run.workdir} is a run of {run.config.family}, which has no features: name a classifier')

    image = tuple(run.assembled.spec.features['image'].shape)
    reads = family.logit_scale is not None

    def apply(variables, images):
        state, frozen = variables
        images = resized(images, image) if reads else images
        batch, rng = {'image': data.to_float(images)}, jax.random.key(0)
        out = {'features': family.encode(state, frozen, batch, rng)}
        if family.classify is not None:
            out['logits'] = family.classify(state, frozen, batch, rng)
        return {name: x.reshape(len(x), -1).astype(jnp.float32) for name, x in out.items()}

    def correct(variables, batch):
        state, frozen = variables
        batch = {**batch, 'image': data.to_float(batch['image'])}
        metrics = family.evaluate(state, frozen, batch, jax.random.key(0))
        return {name: x for name, x in metrics.items() if name.split('/')[0] == 'accuracy'}

    said: list[int] = []

    def texts(values: Sequence[str]) -> EmbeddedTexts:
        tokens, _, cut = run.assembled.tokenizers['tokens'](list(values))
        if cut and not said:
            said.append(cut)
            log.say(
                f'NOTE: {name} reads {tokens.shape[1]} tokens of a text, and some captions are longer: these are cut'
            )
        return EmbeddedTexts(run.apply('encode_text', {'tokens': tokens}), tokens)

    attributes = tuple(name for name in run.config.data.features if name != 'image')
    classifier = family.sample is None and family.classify is not None and attributes
    weights = (run.state.ema, run.state.extra)
    name = os.path.basename(os.path.abspath(run.workdir))
    variables = (run.state, run.assembled.frozen)
    return Features(
        name,
        digest(weights),
        image,
        apply,
        variables,
        attributes if classifier else (),
        correct if classifier else None,
        resizes=reads,
        texts=texts if reads else None,
    )


def of_inception(path: str, cache: str, mesh) -> Features:
    """The FID network with the weights in the file `path`; see inception.load for its errors."""
    name, variables = inception.load(path, cache)
    network = Inception()

    def apply(variables, images):
        return network.apply(variables, jnp.broadcast_to(images, (*images.shape[:3], 3)))

    variables = jax.device_put(variables, sharding.over_weights(mesh, variables))
    return Features(name, digest(variables), None, apply, variables)


@functools.cache
def program(apply: Callable) -> Callable:
    """The function (variables, inputs) -> arrays jitted, once, to be called within `sharding.use`."""
    return sharding.jit(fsdp.gathering(apply))


def extract(features: Features, mesh, images: np.ndarray, size: int) -> dict[str, np.ndarray]:
    """Outputs of the network for uint8 images [n, H, W, C] with n <= size, sharded over the mesh; float32 [n, ...].

    size: what the batch is padded to, a multiple of the number of devices: one size, one compile.
    """
    placed, real = sharding.put_padded(mesh, {'images': images}, size)
    with sharding.use(mesh):
        outputs = program(features.apply)(features.variables, placed['images'])
    return {name: sharding.to_host(x)[:real] for name, x in outputs.items()}
