"""A classifier of images, and the features in which sets of images are compared.

A residual convolutional network (He et al. 2016, pre-activation) maps an image to `features` numbers, and
one linear layer maps these to logits. Training minimises the cross-entropy -log p(class | image), in nats;
with `smoothing` = s the target class has probability 1 - s + s / k among k classes and every other
s / k (Szegedy et al. 2016, section 7). With several factors per image their cross-entropies are summed.

Distances between sets of images (Fréchet, kernel, precision and recall) compare `encode`'s features. So
these have a smooth nonlinearity, which leaves no feature constant, and come from the whole last map, not
from its mean, which would lose positions. Features hold what the classes depend on: a network that
learns shapes alone may well be blind to colour and background. `target` = 'factors' has all of it as target.

The network has no statistics of the batch: an example's features depend on nothing but the example.
"""

from __future__ import annotations

from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import options
from jaxgen.checks import check_size
from jaxgen.contract import Aux, Context, Family, make_update, new_state
from jaxgen.errors import UserError
from jaxgen.losses.likelihoods import cross_entropy
from jaxgen.networks.classifier import Classifier
from jaxgen.options import Count, OneOf, Rate

Array = jax.Array


def factor_logits(logits: Array, sizes: tuple[int, ...]) -> list[Array]:
    """Logits [n, sum of sizes] of each factor, [n, its number of values]."""
    return jnp.split(logits, np.cumsum(sizes)[:-1], -1)


def score(logits: Array, target: Array, sizes: tuple[int, ...], smoothing: float = 0.0) -> tuple[Array, Array]:
    """Cross-entropy [n], nats, summed over factors, and correctness [n, factors], 1 where the likeliest value is the
    target, else 0.

    Args:
      logits: [n, sum of sizes].
      target: int32 [n, factors], or [n] of one.
    """
    target = target.reshape(len(logits), len(sizes))
    entropies, correct = [], []
    for i, one in enumerate(factor_logits(logits, sizes)):
        entropies.append(cross_entropy(one, target[:, i], smoothing))
        correct.append(one.argmax(-1) == target[:, i])
    return sum(entropies), jnp.stack(correct, -1).astype(jnp.float32)


def check(context: Context, target: str, counts: tuple[int, ...]) -> None:
    """Raises UserError where the target is not among the data, or its sizes are missing."""
    if target == 'label' and not context.classes:
        raise UserError("config.data.features must hold 'label': the class is what the model learns")
    if target == 'factors' and not counts:
        raise UserError("config.model.target = 'factors' needs config.model.counts, the number of values of each")


@options.checked
def build(
    context: Context,
    *,
    width: Count = 32,
    levels: Annotated[int, '[0, inf)'] = 2,
    stride: Count = 1,
    features: Count = 64,
    dropout: Rate = 0.2,
    smoothing: Rate = 0.1,
    target: Annotated[str, OneOf('label', 'factors')] = 'label',
    counts: Annotated[tuple[int, ...], '[1, inf)'] = (),
) -> Family:
    """Classifier.

    Args:
      width: channels at first, doubled each time that the image is halved.
      levels: how often the image is halved.
      stride: of the first convolution; 2 makes a quarter of the work of large images.
      features: number of the features.
      dropout: rate at which features are dropped before the logits, in training.
      smoothing: of the labels, 0 for none.
      target: 'label', the class; or 'factors', int32 [n, k] in the batch, k classes of their own per image.
      counts: of 'factors': the number of values of each.

    encode returns the features, float32 [n, features], or maps of every depth; classify the logits of the label,
    or of the first factor. evaluate returns for each image 'cross_entropy', in nats, of all factors together and
    without smoothing; 'accuracy', 1 where the likeliest class is the target, else 0, or for factors the mean of
    'accuracy/0', 'accuracy/1', ..., one per factor. sample is None.

    Raises:
      UserError: a value that cannot work, or the target is not in the batch.
    """
    check(context, target, counts)
    divisor = stride * 2**levels
    check_size(context.image, divisor, f'config.model.levels = {levels} and stride = {stride}')
    sizes = (context.classes,) if target == 'label' else counts
    network = Classifier(width, levels, stride, features, sum(sizes), dropout, context.dtype, context.remat)

    def averaged(state, batch, **arguments):
        """Features and logits, by the averaged weights."""
        return network.apply({'params': state.ema['classifier']}, batch['image'], **arguments)

    def loss(params, state, frozen, batch, rng):
        _, logits = network.apply({'params': params['classifier']}, batch['image'], True, rngs={'dropout': rng})
        entropy, correct = score(logits, batch[target], sizes, smoothing)
        return entropy.mean(), Aux({'loss': entropy.mean(), 'accuracy': correct.mean()})

    update = make_update(loss, context.optim, 'classifier')

    def init(rng, batch, frozen):
        if target not in batch:
            raise UserError(f'config.data.features must hold {target!r}: it is what the model learns')
        if target == 'factors' and batch[target].shape[1:] != (len(counts),):
            raise UserError(
                f'config.model.counts has {len(counts)} numbers, but an example has factors of shape '
                f'{batch[target].shape[1:]}'
            )
        return new_state({'classifier': network.init(rng, batch['image'])['params']}, context.optim)

    def evaluate(state, frozen, batch, rng):
        entropy, correct = score(averaged(state, batch)[1], batch[target], sizes)
        each = {f'accuracy/{i}': correct[:, i] for i in range(len(counts))} if target == 'factors' else {}
        return {'cross_entropy': entropy, 'accuracy': correct.mean(-1), **each}

    def encode(state, frozen, batch, rng):
        """Features, float32 [n, features]; if the batch holds 'maps', a tuple of maps [n, h, w, c] by depth."""
        return averaged(state, batch, maps=True) if 'maps' in batch else averaged(state, batch)[0]

    def classify(state, frozen, batch, rng):
        """Logits of the label or of the first factor, float32 [n, sizes[0]]."""
        if 'sigma' in batch:
            raise UserError('this classifier was not trained on noise: guidance needs the run of a noisy_classifier')
        return factor_logits(averaged(state, batch)[1], sizes)[0]

    return Family(init, update, None, evaluate, encode, classify=classify, divisor=divisor, larger=('accuracy',))
