"""Matching of images and captions: the deep attentional multimodal similarity model (DAMSM) of AttnGAN (Xu et al. 2017,
arXiv 1711.10485, section 3.2). All in float32; similarities are [images, captions], of every image with every caption.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

Array = jax.Array

LOW = -1e9  # of logits that do not count


def unit(x: Array) -> Array:
    """Vectors [n, d] of length 1, float32."""
    x = x.astype(jnp.float32)
    return x / jnp.sqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)


def cosine(x: Array, y: Array) -> Array:
    """Cosine similarity of the last axes, broadcast."""
    norms = jnp.sqrt(jnp.square(x).sum(-1) * jnp.square(y).sum(-1) + 1e-12)
    return (x * y).sum(-1) / norms


def sentence_similarity(images: Array, sentences: Array) -> Array:
    """Cosines [n, m] of images [n, d] and sentences [m, d]."""
    chex.assert_rank([images, sentences], 2)
    return cosine(images[:, None], sentences[None])


def word_similarity(regions: Array, words: Array, mask: Array, gamma1: float = 4.0, gamma2: float = 5.0) -> Array:
    """R(Q, D): similarity of an image's regions and a caption's words (eqs. 7 to 10).

    Every word e_i attends to the regions v_j, with weights alpha_ij; c_i is its region context:

        s = softmax over words of (e_i . v_j),  alpha = softmax over regions of (gamma1 * s),  c_i = sum_j alpha_ij v_j
        R = log sum_i exp(gamma2 * cosine(c_i, e_i))

    As in the published code, R is not divided by gamma2.

    Args:
      regions: [n, r, d].
      words: [m, T, d].
      mask: bool [m, T], true where there is a word.

    Returns:
      [n, m]
    """
    chex.assert_shape(mask, words.shape[:2])
    logits = jnp.einsum('nrd,mtd->nmrt', regions, words)
    s = jax.nn.softmax(jnp.where(mask[:, None], logits, LOW))  # eq. 8
    alpha = jax.nn.softmax(gamma1 * s, axis=2)  # eq. 9
    context = jnp.einsum('nmrt,nrd->nmtd', alpha, regions)
    return jax.nn.logsumexp(jnp.where(mask, gamma2 * cosine(context, words), LOW), axis=-1)  # eq. 10


def matching_loss(similarity: Array, own: Array, same: Array, gamma3: float = 10.0) -> Array:
    """-log P(D_i | Q_i) - log P(Q_i | D_i), means over the images (eqs. 11 and 12).

    Args:
      similarity: [n, m], of n images with m captions, theirs and perhaps more.
      own: bool [n, m], which caption is whose; one for each image.
      same: bool [n, m], which captions are word for word the image's: these count in neither direction, but for its
        own.
    """
    chex.assert_equal_shape([similarity, own, same])
    logits = jnp.where(same & ~own, LOW, gamma3 * similarity)
    right = sum((jax.nn.log_softmax(logits, axis) * own).sum() for axis in (0, 1))
    return -right / len(similarity)


def contrastive_loss(similarity: Array, same: Array | None = None) -> Array:
    """Cross-entropy [n], nats, of finding each image's own text among all and each text's own image, their mean
    (Radford et al. 2021, arXiv 2103.00020, figure 3).

    Args:
      similarity: [n, n], logits of image i and text j; image i's own text is text i.
      same: bool [n, n], which texts are word for word image i's: these count in neither direction, but for its own;
        None: all count, as in the paper.
    """
    chex.assert_rank(similarity, 2)
    own = jnp.eye(len(similarity), dtype=bool)
    logits = similarity if same is None else jnp.where(same & ~own, LOW, similarity)
    of_images, of_texts = (-(jax.nn.log_softmax(logits, axis) * own).sum(axis) for axis in (1, 0))
    return (of_images + of_texts) / 2
