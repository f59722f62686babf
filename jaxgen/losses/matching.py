"""How well pictures and captions match: the deep attentional multimodal similarity of AttnGAN (Xu et al. 2017, arXiv
1711.10485, section 3.2). All in float32; similarities are [pictures, captions], of every picture with every caption.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array

LOW = -1e9  # of logits that do not count


def cosine(x: Array, y: Array) -> Array:
    """Of the last axes, broadcast: 1 where they point the same way."""
    norms = jnp.sqrt(jnp.square(x).sum(-1) * jnp.square(y).sum(-1) + 1e-12)
    return (x * y).sum(-1) / norms


def sentence_similarity(images: Array, sentences: Array) -> Array:
    """Cosines [n, m] of pictures [n, d] and sentences [m, d]."""
    return cosine(images[:, None], sentences[None])


def word_similarity(regions: Array, words: Array, there: Array, attend: float = 4.0, gather: float = 5.0) -> Array:
    """R(Q, D): how well the words of a caption find themselves in the regions of a picture (eqs. 7 to 10).

    Every word e_i looks at the regions v_j, with weights alpha_ij, for what it finds there, c_i:

        s = softmax over words of (e_i . v_j),  alpha = softmax over regions of (attend * s),  c_i = sum_j alpha_ij v_j
        R = log sum_i exp(gather * cosine(c_i, e_i))

    As in the published code, R is not divided by `gather`.

    Args:
      regions: [n, r, d].
      words: [m, T, d].
      there: bool [m, T], where there is a word.
      attend, gather: gamma_1 and gamma_2.

    Returns:
      [n, m]
    """
    logits = jnp.einsum('nrd,mtd->nmrt', regions, words)
    s = jax.nn.softmax(jnp.where(there[:, None], logits, LOW))
    alpha = jax.nn.softmax(attend * s, axis=2)
    found = jnp.einsum('nmrt,nrd->nmtd', alpha, regions)
    return jax.nn.logsumexp(jnp.where(there, gather * cosine(found, words), LOW), axis=-1)


def matching_loss(similarity: Array, own: Array, same: Array, sharpness: float = 10.0) -> Array:
    """-log P(D_i | Q_i) - log P(Q_i | D_i), means over the pictures (eqs. 11 and 12).

    Args:
      similarity: [n, m], of n pictures with m captions, theirs and perhaps more.
      own: bool [n, m], which caption is whose; one for each picture.
      same: bool [n, m], which captions are word for word the picture's: these count neither way, but for its own.
      sharpness: gamma_3.
    """
    logits = jnp.where(same & ~own, LOW, sharpness * similarity)
    right = sum((jax.nn.log_softmax(logits, axis) * own).sum() for axis in (0, 1))
    return -right / len(similarity)
