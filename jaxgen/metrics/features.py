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
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import data, fsdp, sharding
from jaxgen.errors import UserError
from jaxgen.metrics import inception
from jaxgen.networks.inception import Inception


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

    def shapes(self, image: tuple[int, int, int]) -> dict[str, int]:
        """{output: its dimensions} for images of shape `image`; 'logits' and 'spatial' only where there are any.

        Raises:
          UserError: it does not read such images.
        """
        if self.image not in (None, image):
            raise UserError(
                f'{self.name} reads images of {displayed(self.image)}, and these are {displayed(image)}: '
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


def of_run(run) -> Features:
    """The features of a run (run.Run): the output of its family's `encode`, flat, and the logits of its `classify`.

    Raises:
      UserError: its family encodes nothing.
    """
    family = run.assembled.family
    if family.encode is None or family.latents.grids:
        raise UserError(f'{run.workdir} is a run of {run.config.family}, which has no features: name a classifier')

    def apply(variables, images):
        state, frozen = variables
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

    attributes = tuple(name for name in run.config.data.features if name != 'image')
    classifier = family.sample is None and family.classify is not None and attributes
    weights = (run.state.ema, run.state.extra)
    name = os.path.basename(os.path.abspath(run.workdir))
    variables = (run.state, run.assembled.frozen)
    image = tuple(run.assembled.spec.features['image'].shape)
    return Features(name, digest(weights), image, apply, variables, *((attributes, correct) if classifier else ()))


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
