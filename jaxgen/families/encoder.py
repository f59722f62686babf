"""A published encoder alone, of texts or of images: a frozen stage of other models, which nothing trains here.

CLIP's text tower is that of Stable Diffusion 1, OpenCLIP's larger ones those of 2 and SDXL, the encoder of T5 1.1 that
of Stable Diffusion 3 and FLUX, CLIP's vision tower that of image variations. A run of one is made by --mode=import;
both towers together are the family `clip`, which can be trained.
"""

from __future__ import annotations

from typing import Annotated

import jax
import jax.numpy as jnp

from jaxgen import options
from jaxgen.checks import check_size
from jaxgen.contract import WORDS, Context, Family, Texts, new_state, untrained
from jaxgen.errors import UserError
from jaxgen.losses.matching import unit
from jaxgen.networks.clip import NORMALISATIONS, TextOutput, TextTower, VisionTower, normalised
from jaxgen.networks.t5 import T5Encoder
from jaxgen.options import Component, OneOf, Section, own_fields

Array = jax.Array

TEXT_ENCODERS = {'clip': TextTower, 't5': T5Encoder}
ENCODERS = {**TEXT_ENCODERS, 'clip_vision': VisionTower}
COMPONENT = Component(ENCODERS, omit=('remat', 'dtype'))


def of_t5(features: Array, tokens: Array) -> TextOutput:
    """The output of T5's encoder [n, T, C]; its mean over the tokens of a text, which are not 0, stands for a pooled
    one (Ni et al. 2022, arXiv 2108.08877, section 3)."""
    there = (tokens != 0).astype(features.dtype)
    mean = jnp.einsum('nt,ntc->nc', there, features) / jnp.maximum(there.sum(-1, keepdims=True), 1)
    return TextOutput(features, features, features, mean, mean)


@options.checked
def build(
    context: Context,
    *,
    network: Annotated[Section, COMPONENT] = 'clip',
    normalisation: Annotated[str, OneOf(*NORMALISATIONS)] = 'clip',
) -> Family:
    """An encoder of `ENCODERS`.

    Args:
      network: the encoder, and its sizes.
      normalisation: of the channels of an image, for an encoder of images: see the family `clip`.

    encode_text returns the encoder's output; encode, of images, embeddings of length 1, float32 [n, features].

    Raises:
      UserError: widths that the heads do not divide, an image that the patches do not fit.
    """
    name, own = network['name'], own_fields(network)
    module = ENCODERS[name](**own, remat=context.remat, dtype=context.dtype)
    if name != 't5' and own['channels'] % own['heads']:
        raise UserError(f'config.model.network: channels {own["channels"]} must be a multiple of heads {own["heads"]}')

    def evaluate(state, frozen, batch, rng):
        return {}

    if name in TEXT_ENCODERS:

        def init(rng, batch, frozen):
            return new_state({'text': module.init(rng, batch['tokens'])['params']}, context.optim)

        def encode_text(state, frozen, tokens):
            """The output of the encoder."""
            output = module.apply({'params': state.ema['text']}, tokens, added=state.ema.get(WORDS))
            return of_t5(output, tokens) if name == 't5' else output

        texts = Texts(own['vocabulary'], own['length'], divisible=name != 't5')
        return Family(init, untrained, None, evaluate, encode_text=encode_text, texts=texts)

    check_size(context.image, own['patch'], 'config.model.network.patch')

    def init_vision(rng, batch, frozen):
        return new_state({'vision': module.init(rng, batch['image'])['params']}, context.optim)

    def encode(state, frozen, batch, rng):
        """Embeddings of images, float32 [n, features], of length 1."""
        return unit(module.apply({'params': state.ema['vision']}, normalised(batch['image'], normalisation)).embedding)

    return Family(init_vision, untrained, None, evaluate, encode, divisor=own['patch'])
