"""CLIP: texts and images in one space (Radford et al. 2021, arXiv 2103.00020).

Two transformers, one over the tokens of a text and one over the patches of an image, give an embedding each. Both are
brought to length 1, and the logit of image i and text j is their product times a learned scale. Training minimises the
cross-entropy of finding each image's own text among all texts of the batch, and of finding each text's own image
(section 2.3), over the whole batch, however many devices it lies on; with `optim.accumulate` over each part of it.

A text is batch['tokens'], made of a caption by the run's own tokenizer, which is trained on the training captions when
the run starts, or comes with imported weights.

What is learned serves as a text encoder of other models (`encode_text`), as a classifier without training, whose
classes are texts, and as a metric: the CLIP score and the maximum mean discrepancy of its features.
"""

from __future__ import annotations

from typing import Annotated, Any

import jax
import jax.numpy as jnp

from jaxgen import options
from jaxgen.checks import check_size
from jaxgen.contract import WORDS, Aux, Context, Family, Texts, make_update, new_state
from jaxgen.errors import UserError
from jaxgen.losses.matching import contrastive_loss, unit
from jaxgen.networks.clip import NORMALISATIONS, TextTower, VisionTower, normalised
from jaxgen.options import Count, Fields, OneOf, Positive, Section

Array = jax.Array

EMPTY: dict[str, Any] = {}
SHARED = ('features', 'activation', 'remat', 'dtype')  # attributes of the towers that are the same for both


def check_heads(where: str, section: dict) -> None:
    """Raises UserError where the width of a tower is no multiple of its heads."""
    if section['channels'] % section['heads']:
        raise UserError(
            f'config.model.{where}: channels {section["channels"]} must be a multiple of heads {section["heads"]}'
        )


@options.checked
def build(
    context: Context,
    *,
    text: Annotated[Section, Fields(TextTower, SHARED)] = EMPTY,
    vision: Annotated[Section, Fields(VisionTower, SHARED)] = EMPTY,
    features: Count = 512,
    activation: Annotated[str, OneOf('quick_gelu', 'gelu')] = 'quick_gelu',
    temperature: Positive = 0.07,
    largest_scale: Positive = 100.0,
    duplicates: Annotated[str, OneOf('count', 'ignore')] = 'count',
    normalisation: Annotated[str, OneOf(*NORMALISATIONS)] = 'none',
) -> Family:
    """CLIP; the defaults are ViT-B/32's.

    Args:
      text: see networks.clip.TextTower.
      vision: see networks.clip.VisionTower.
      features: dimensions of the common space.
      activation: of the MLPs: 'quick_gelu', OpenAI's, or 'gelu'.
      temperature: by which logits are divided at first.
      largest_scale: that logits are multiplied with, at most.
      duplicates: texts of a batch that are word for word the same 'count' as each other's negatives, as in the paper,
        or are left out ('ignore').
      normalisation: of the channels of an image: 'none', [-1, 1] as they are; 'clip', by the mean and deviation that
        published weights were trained with.

    encode returns the embedding of images, float32 [n, features], of length 1; encode_text the text tower's output.
    evaluate returns for each image 'similarity', the cosine of its embedding and its text's; retrieval among held-out
    pairs is measured by evaluation/retrieval.py.

    Raises:
      UserError: no captions, an image that the patches do not fit.
    """
    check_heads('text', text)
    check_heads('vision', vision)
    check_size(context.image, vision['patch'], 'config.model.vision.patch')
    shared = dict(features=features, activation=activation, remat=context.remat, dtype=context.dtype)
    reader, viewer = TextTower(**text, **shared), VisionTower(**vision, **shared)

    def of_images(weights, images):
        return unit(viewer.apply({'params': weights['vision']}, normalised(images, normalisation)).embedding)

    def of_texts(weights, tokens):
        return unit(reader.apply({'params': weights['text']}, tokens).embedding)

    def scale(weights):
        return jnp.minimum(jnp.exp(weights['scale']['value']), largest_scale)

    def similarity(weights, batch):
        images, texts = of_images(weights, batch['image']), of_texts(weights, batch['tokens'])
        return scale(weights) * jnp.matmul(images, texts.T, precision='highest')

    def equal(tokens):
        return (tokens[:, None] == tokens[None]).all(-1) if duplicates == 'ignore' else None

    def loss(params, state, frozen, batch, rng):
        logits = similarity(params, batch)
        value = contrastive_loss(logits, equal(batch['tokens'])).mean()
        right = logits.argmax(1) == jnp.arange(len(logits))
        return value, Aux({'loss': value, 'recall@1/text': right.mean(), 'scale': scale(params)})

    update = make_update(loss, context.optim, 'text', 'vision', 'scale')

    def init(rng, batch, frozen):
        rng_text, rng_vision = jax.random.split(rng)
        params = {
            'text': reader.init(rng_text, batch['tokens'])['params'],
            'vision': viewer.init(rng_vision, batch['image'])['params'],
            'scale': {'value': jnp.log(1 / jnp.float32(temperature))},
        }
        return new_state(params, context.optim)

    def evaluate(state, frozen, batch, rng):
        images, texts = of_images(state.ema, batch['image']), of_texts(state.ema, batch['tokens'])
        return {'similarity': (images * texts).sum(-1)}

    def encode(state, frozen, batch, rng):
        """Embeddings of images, float32 [n, features], of length 1."""
        return of_images(state.ema, batch['image'])

    def encode_text(state, frozen, tokens):
        """The output of the text tower."""
        return reader.apply({'params': state.ema['text']}, tokens, added=state.ema.get(WORDS))

    def logit_scale(state):
        """The learned scale of cosines."""
        return scale(state.ema)

    return Family(
        init,
        update,
        None,
        evaluate,
        encode,
        encode_text=encode_text,
        logit_scale=logit_scale,
        texts=Texts(text['vocabulary'], text['length']),
        divisor=vision['patch'],
        larger=('similarity',),
    )
