"""Vector quantisers: the nearest code of a codebook, how gradients pass it, and how the codebook learns.

A codebook is float32 [K, D]. A latent z [..., D] becomes the index of the nearest code, int32 [...] (van den Oord
et al. 2017, arXiv 1711.00937, eq. 1), and the decoder's input is that code. A codebook learns in one of two ways:

- by the loss: it is a network among `State.params`, and `losses` moves codes towards latents (eq. 3, second term);
- by moving averages (appendix A.1): a dict in `State.extra` has for each code the number of latents that an update
  assigned to it and their sum; the code is the quotient. It has no gradient. `ema_start` makes the dict, `ema_codebook`
  reads it, in training and in evaluation.

An update whose loss is taken over parts of the batch must still count the whole batch once: `statistics` of the parts
add up, and `ema_absorb` takes the total. All are pure functions without callbacks to the host.
"""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp

from jaxgen.networks.layers import look_up

Array = jax.Array
EPS = 1e-5  # of the Laplace smoothing of counts


def nearest(z: Array, codebook: Array) -> Array:
    """Index of the nearest code by Euclidean distance, int32 [...]; of equally near ones the first.

    Distances are float32 whatever the dtype of z.

    Args:
      z: [..., D].
      codebook: [K, D].
    """
    chex.assert_shape(codebook, (None, z.shape[-1]))
    z, codebook = z.astype(jnp.float32), codebook.astype(jnp.float32)
    # |z - e|^2 without |z|^2, which all codes share: an array [..., K], never [..., K, D]. Products at full precision:
    # the short floats of GPUs and TPUs would pick the wrong one of two near codes.
    products = jnp.einsum('...d,kd->...k', z, codebook, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmin(jnp.square(codebook).sum(-1) - 2 * products, -1).astype(jnp.int32)


def embed(codes: Array, codebook: Array) -> Array:
    """The vectors [..., D] of codes int [...]; NaN for a code that is not in the codebook [K, D]."""
    return look_up(codebook, codes)


def straight_through(z: Array, quantised: Array) -> Array:
    """Exactly `quantised` forwards; backwards the gradient goes to z as it is, none to `quantised`. Both [..., D]."""
    chex.assert_equal_shape([z, quantised])
    return jax.lax.stop_gradient(quantised) + (z - jax.lax.stop_gradient(z))


def losses(z: Array, quantised: Array) -> tuple[Array, Array]:
    """(codebook loss, commitment), scalars: squared distance of z [..., D] to its codes, mean over all dimensions.

    Both have one value. The first moves codes to latents, the second latents to codes; the loss (eq. 3) has the first
    plus 0.25 times the second, or with moving averages the second alone.
    """
    chex.assert_equal_shape([z, quantised])
    z, quantised = z.astype(jnp.float32), quantised.astype(jnp.float32)
    codebook = jnp.square(jax.lax.stop_gradient(z) - quantised).mean()
    commitment = jnp.square(z - jax.lax.stop_gradient(quantised)).mean()
    return codebook, commitment


def start(rng: Array, size: int, features: int) -> Array:
    """A codebook [size, features] at the start: uniform with variance 1 / features, so codes of length about 1."""
    return jax.nn.initializers.variance_scaling(1.0, 'fan_out', 'uniform')(rng, (size, features), jnp.float32)


def statistics(z: Array, codes: Array, size: int) -> dict[str, Array]:
    """'count' [K] of the latents that a batch assigns to each code, and their 'sum' [K, D]. They add up over parts.

    Args:
      z: [..., D]; no gradient goes through it.
      codes: int [...].
      size: K.
    """
    chex.assert_equal_shape_prefix([z, codes], codes.ndim)
    z = jax.lax.stop_gradient(z).astype(jnp.float32).reshape(-1, z.shape[-1])
    # A product and not a scatter: GPUs add up a scatter in an order that changes from run to run.
    assigned = jax.nn.one_hot(codes.reshape(-1), size, dtype=jnp.float32)  # [n, K]
    total = jnp.einsum('nk,nd->kd', assigned, z, precision=jax.lax.Precision.HIGHEST)
    return {'count': assigned.sum(0), 'sum': total}


def ema_start(codebook: Array, debiased: bool = False) -> dict[str, Array]:
    """Averages whose codebook is the one given, [K, D]: as if each code had one latent.

    Args:
      debiased: the first update forgets the start, and the averages' weights of all updates so far sum to 1, as in
        Sonnet. A code without a latent so far is then 0.

    Without it a code without latents stays where it is as long as its count is far above EPS, and goes to 0 with it:
    count and sum decay alike, and the smoothing of counts is what remains, as in the published code. `restart` brings
    such codes back.
    """
    # A copy: State is donated, and one buffer must not be donated twice.
    state = {'count': jnp.ones(len(codebook)), 'sum': jnp.array(codebook, jnp.float32)}
    return {**state, 'weight': jnp.zeros(())} if debiased else state


def ema_scale(state: dict[str, Array]) -> Array:
    """Divisor of the averages in `state`: 1, or with debiasing 1 - decay^updates (1 before the first)."""
    weight = state.get('weight', jnp.ones(()))
    return jnp.where(weight > 0, weight, 1.0)


def smoothed(count: Array, eps: Array | float = EPS) -> Array:
    """Counts [K] that are never 0, with the same total."""
    total = count.sum()
    return (count + eps) / (total + len(count) * eps) * total


def ema_codebook(state: dict[str, Array]) -> Array:
    """The codebook [K, D]: sums over smoothed counts."""
    # Numerator and denominator have one scale; only the smoothing needs it.
    return state['sum'] / smoothed(state['count'], EPS * ema_scale(state))[:, None]


def ema_absorb(state: dict[str, Array], batch: dict[str, Array], decay: float) -> dict[str, Array]:
    """Averages after an update with these `statistics` of its whole batch."""
    keep = jnp.float32(decay)
    if 'weight' in state:
        keep = jnp.where(state['weight'] > 0, keep, 0.0)
    new = {name: keep * state[name] + (1 - decay) * batch[name] for name in ('count', 'sum')}
    return {**new, 'weight': decay * state['weight'] + 1 - decay} if 'weight' in state else new


def ema_update(state: dict[str, Array], z: Array, codes: Array, decay: float) -> dict[str, Array]:
    """Averages after an update whose whole batch had latents z [..., D] and codes int [...]."""
    return ema_absorb(state, statistics(z, codes, len(state['count'])), decay)


def restart(
    codebook: Array, count: Array, z: Array, rng: Array, threshold: float, scale: Array | float = 1.0
) -> tuple[Array, Array, Array]:
    """Replaces dead codes by latents of the batch (Dhariwal et al. 2020, arXiv 2005.00341, section 3.1).

    Each dead code becomes a latent drawn at random, all of them different ones if z has as many. Its count is then one
    latent per update, or `threshold` if that is more.

    Args:
      codebook: [K, D].
      count: [K], average number of latents per update of each code.
      z: [..., D], latents of a batch, the same on all devices or sharded over them.
      threshold: codes with a smaller count are dead.
      scale: divisor of counts before they are compared, see `ema_scale`.

    Returns:
      Codebook, count, and bool [K], which codes were replaced.
    """
    dead = count / scale < threshold
    flat = jax.lax.stop_gradient(z).astype(jnp.float32).reshape(-1, z.shape[-1])
    picked = jax.random.permutation(rng, len(flat))[jnp.arange(len(codebook)) % len(flat)]
    codebook = jnp.where(dead[:, None], flat[picked], codebook)
    return codebook, jnp.where(dead, max(1.0, threshold) * scale, count), dead


def restart_learned(
    state: Any, name: str, count: Array, z: Array, rng: Array, threshold: float
) -> tuple[Any, Array, Array]:
    """`restart` for the codebook `name` of the network 'codebook': the State, count and which codes were replaced."""
    codebook, count, dead = restart(state.params['codebook'][name], count, z, rng, threshold)
    return with_restarted(state, name, codebook, dead), count, dead


def with_restarted(state: Any, name: str, codebook: Array, dead: Array) -> Any:
    """The State with the codebook `name` of the network 'codebook' replaced, where codes in `dead` [K] are new.

    These have their new values in all averages of the weights too: an average with a code that was given up is
    worthless.
    """
    params = {**state.params, 'codebook': {**state.params['codebook'], name: codebook}}
    ema = {
        network: {**weights, name: jnp.where(dead[:, None], codebook, weights[name])}
        if network.partition('@')[0] == 'codebook'
        else weights
        for network, weights in state.ema.items()
    }
    return state.replace(params=params, ema=ema)


def ema_restart(state: dict[str, Array], z: Array, rng: Array, threshold: float) -> dict[str, Array]:
    """`restart` for a codebook of moving averages."""
    scale = ema_scale(state)
    codebook, count, dead = restart(ema_codebook(state), state['count'], z, rng, threshold, scale)
    # Sums whose quotients are the new codes; those of other codes stay as they are.
    total = codebook * smoothed(count, EPS * scale)[:, None]
    return {**state, 'count': count, 'sum': jnp.where(dead[:, None], total, state['sum'])}


def probabilities(count: Array) -> Array:
    """Frequencies of codes with these counts [K], none 0, their sum 1."""
    count = smoothed(count)
    return count / count.sum()


def perplexity(count: Array) -> Array:
    """exp of the entropy of codes with these counts [K]: the effective number of codes in use, 1 to K."""
    probability = count / jnp.maximum(count.sum(), 1e-20)
    return jnp.exp(jax.scipy.special.entr(probability).sum())


def usage(count: Array) -> Array:
    """Fraction of codes whose count, of [K], is not 0."""
    return (count > 0).mean()
