"""A classifier: names what a picture shows, and gives the features that others are judged by.

A residual convolutional network (He et al. 2016, pre-activation) maps an image to `features` numbers, and
one linear layer maps these to logits. Training minimises the cross-entropy -log p(class | image), in nats;
with `smoothing` = s the class asked for has probability 1 - s + s / k among k classes and every other
s / k (Szegedy et al. 2016, section 7). With several factors per picture their cross-entropies are summed.

Distances between sets of pictures (Fréchet, kernel, precision and recall) compare `encode`'s features. So
these have a smooth nonlinearity, which leaves no feature constant, and come from the whole last map, not
from its mean, which would forget where things are. Features see what the classes tell apart: a network that
learns shapes alone may well be blind to colour and background. `target` = 'factors' asks for all of it.

The network has no statistics of the batch: an example's features depend on nothing but the example.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.checks import check_size
from jaxgen.contract import Aux, Context, Family, make_update, new_state
from jaxgen.errors import UserError
from jaxgen.losses.likelihoods import cross_entropy
from jaxgen.networks.classifier import Classifier

Array = jax.Array


def build(
    context: Context,
    *,
    width: int = 32,
    levels: int = 2,
    stride: int = 1,
    features: int = 64,
    dropout: float = 0.2,
    smoothing: float = 0.1,
    target: str = 'label',
    counts: tuple[int, ...] = (),
) -> Family:
    """Classifier.

    Args:
      width, levels: channels at first, doubled each of `levels` times that the image is halved.
      stride: of the first convolution; 2 makes a quarter of the work of large images.
      features: number of the features.
      dropout: share of the features that the logits do not see in training.
      smoothing: of the labels, 0 for none.
      target: 'label', the class; or 'factors', int32 [n, k] in the batch, k classes of their own per picture.
      counts: of 'factors': the number of values of each.

    encode gives the features, float32 [n, features], or maps of every depth; classify the logits of the label,
    or of the first factor. evaluate gives per image 'cross_entropy', in nats, of all factors together and without
    smoothing; 'accuracy', 1 where the likeliest class is the right one, else 0, or for factors the mean of
    'accuracy/0', 'accuracy/1', ..., one per factor. sample is None.

    Raises:
      UserError: a value that cannot work, or what is to be predicted is not in the batch.
    """
    if target not in ('label', 'factors'):
        raise UserError(f"config.model.target must be 'label' or 'factors'; it is {target!r}")
    if min(width, features, stride) < 1 or levels < 0:
        raise UserError('config.model: width, features and stride must be 1 or more, levels 0 or more')
    if not (0 <= dropout < 1 and 0 <= smoothing < 1):
        raise UserError('config.model: dropout and smoothing must be 0 or more and less than 1')
    if target == 'label' and not context.classes:
        raise UserError("config.data.features must hold 'label': the class is what the model learns")
    if target == 'factors' and not (counts and all(isinstance(k, int) and k > 0 for k in counts)):
        raise UserError("config.model.target = 'factors' needs config.model.counts, the number of values of each")
    divisor = stride * 2**levels
    check_size(context.image, divisor, f'config.model.levels = {levels} and stride = {stride}')

    sizes = (context.classes,) if target == 'label' else counts
    network = Classifier(width, levels, stride, features, sum(sizes), dropout, context.dtype, context.remat)

    def heads(logits: Array) -> list[Array]:
        """Logits of each factor, [n, its number of values]."""
        return jnp.split(logits, np.cumsum(sizes)[:-1], -1)

    def score(logits: Array, batch: dict, smoothing: float = 0.0) -> tuple[Array, Array]:
        """Cross-entropy [n], nats, and hits [n, factors], 0 or 1."""
        wanted = batch[target].reshape(len(logits), len(sizes))
        entropies, hits = [], []
        for i, one in enumerate(heads(logits)):
            entropies.append(cross_entropy(one, wanted[:, i], smoothing))
            hits.append(one.argmax(-1) == wanted[:, i])
        return sum(entropies), jnp.stack(hits, -1).astype(jnp.float32)

    def apply(state, batch) -> tuple[Array, Array]:
        return network.apply({'params': state.ema['classifier']}, batch['image'])

    def loss(params, state, frozen, batch, rng):
        _, logits = network.apply({'params': params['classifier']}, batch['image'], True, rngs={'dropout': rng})
        entropy, hits = score(logits, batch, smoothing)
        return entropy.mean(), Aux({'loss': entropy.mean(), 'accuracy': hits.mean()})

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
        entropy, hits = score(apply(state, batch)[1], batch)
        each = {f'accuracy/{i}': hits[:, i] for i in range(len(counts))} if target == 'factors' else {}
        return {'cross_entropy': entropy, 'accuracy': hits.mean(-1), **each}

    def encode(state, frozen, batch, rng):
        """Features, float32 [n, features]; if the batch holds 'maps', a tuple of maps [n, h, w, c] by depth."""
        if 'maps' in batch:
            return network.apply({'params': state.ema['classifier']}, batch['image'], maps=True)
        return apply(state, batch)[0]

    def classify(state, frozen, batch, rng):
        """Logits of the label or of the first factor, float32 [n, sizes[0]]."""
        if 'sigma' in batch:
            raise UserError('this classifier never saw noise: guidance needs the run of a noisy_classifier')
        return heads(apply(state, batch)[1])[0]

    return Family(init, update, None, evaluate, encode, classify=classify, divisor=divisor)
