"""Vector quantisers: the nearest code of a codebook, how gradients pass it, and how the codebook learns.

A codebook is float32 [K, D]. A latent z [..., D] becomes the number of the nearest code, int32 [...] (van den Oord
et al. 2017, arXiv 1711.00937, eq. 1), and the decoder gets that code. A codebook learns in one of two ways:

- by the loss: it is a network among `State.params`, and `losses` draws codes to latents (eq. 3, second term);
- by moving averages (appendix A.1): a dict in `State.extra` holds for each code how many latents an update gave it
  and their sum; the code is the quotient. No gradient reaches it. `ema_start` makes the dict, `ema_codebook` reads
  it, and both training and evaluation read this one.

An update whose loss is taken over parts of the batch must still count the whole batch once: `statistics` of the parts
add up, and `ema_absorb` takes the total. All are pure functions; none asks the host for anything.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxgen.networks.layers import look_up

Array = jax.Array
EPS = 1e-5  # of the Laplace smoothing of counts


def nearest(z: Array, codebook: Array) -> Array:
    """Number of the nearest code by Euclidean distance, int32 [...]; of equally near ones the first.

    Distances are float32 whatever the dtype of z.

    Args:
      z: [..., D].
      codebook: [K, D].
    """
    z, codebook = z.astype(jnp.float32), codebook.astype(jnp.float32)
    # |z - e|^2 without |z|^2, which all codes share: [..., K] numbers, never [..., K, D]. Products at full precision:
    # the short floats of GPUs and TPUs would pick the wrong one of two near codes.
    products = jnp.einsum('...d,kd->...k', z, codebook, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmin(jnp.square(codebook).sum(-1) - 2 * products, -1).astype(jnp.int32)


def embed(codes: Array, codebook: Array) -> Array:
    """The vectors [..., D] of codes int [...]; NaN for a code that is not in the codebook [K, D]."""
    return look_up(codebook, codes)


def straight_through(z: Array, quantised: Array) -> Array:
    """Exactly `quantised` forwards; backwards the gradient goes to z as it is, none to `quantised`. Both [..., D]."""
    return jax.lax.stop_gradient(quantised) + (z - jax.lax.stop_gradient(z))


def losses(z: Array, quantised: Array) -> tuple[Array, Array]:
    """(codebook loss, commitment), scalars: squared distance of z [..., D] to its codes, mean over all numbers.

    Both have one value. The first moves codes to latents, the second latents to codes; the whole loss takes the first
    plus 0.25 times the second, or with moving averages the second alone.
    """
    z, quantised = z.astype(jnp.float32), quantised.astype(jnp.float32)
    codebook = jnp.square(jax.lax.stop_gradient(z) - quantised).mean()
    commitment = jnp.square(z - jax.lax.stop_gradient(quantised)).mean()
    return codebook, commitment


def start(rng: Array, size: int, features: int) -> Array:
    """A codebook [size, features] at the start: uniform with variance 1 / features, so codes of length about 1."""
    return jax.nn.initializers.variance_scaling(1.0, 'fan_out', 'uniform')(rng, (size, features), jnp.float32)


def statistics(z: Array, codes: Array, size: int) -> dict[str, Array]:
    """What one batch gives each code: 'count' [K], how many latents, and 'sum' [K, D] of them. They add up over parts.

    Args:
      z: [..., D]; no gradient goes through it.
      codes: int [...].
      size: K.
    """
    z = jax.lax.stop_gradient(z).astype(jnp.float32).reshape(-1, z.shape[-1])
    # A product and not a scatter: GPUs add up a scatter in an order that changes from run to run.
    hits = jax.nn.one_hot(codes.reshape(-1), size, dtype=jnp.float32)
    return {'count': hits.sum(0), 'sum': jnp.einsum('nk,nd->kd', hits, z, precision=jax.lax.Precision.HIGHEST)}


def ema_start(codebook: Array, debiased: bool = False) -> dict[str, Array]:
    """Averages whose codebook is the one given, [K, D]: each code has been met once.

    Args:
      debiased: the first update forgets the start, and averages weigh all updates so far by their share, as in
        Sonnet. A code that no latent ever came to is then 0.

    Without it a code that no latent comes to stays where it is as long as its count is far above EPS, and goes to 0
    with it: count and sum decay alike, and the smoothing of counts is what remains, as in the published code. `restart`
    brings such codes back.
    """
    # A copy: State is donated, and one buffer must not be donated twice.
    state = {'count': jnp.ones(len(codebook)), 'sum': jnp.array(codebook, jnp.float32)}
    return {**state, 'weight': jnp.zeros(())} if debiased else state


def ema_scale(state: dict[str, Array]) -> Array:
    """What the averages of `state` must be divided by: 1, or with debiasing 1 - decay^updates (1 before the first)."""
    weight = state.get('weight', jnp.ones(()))
    return jnp.where(weight > 0, weight, 1.0)


def smoothed(count: Array, eps: Array | float = EPS) -> Array:
    """Counts [K] that are never 0, with the same total."""
    total = count.sum()
    return (count + eps) / (total + len(count) * eps) * total


def ema_codebook(state: dict[str, Array]) -> Array:
    """The codebook [K, D] that averages stand for."""
    # Numerator and denominator have one scale; it is left in what smooths them only.
    return state['sum'] / smoothed(state['count'], EPS * ema_scale(state))[:, None]


def ema_absorb(state: dict[str, Array], found: dict[str, Array], decay: float) -> dict[str, Array]:
    """Averages after an update whose whole batch gave `found` (see `statistics`)."""
    keep = jnp.float32(decay)
    if 'weight' in state:
        keep = jnp.where(state['weight'] > 0, keep, 0.0)
    new = {name: keep * state[name] + (1 - decay) * found[name] for name in ('count', 'sum')}
    return {**new, 'weight': decay * state['weight'] + 1 - decay} if 'weight' in state else new


def ema_update(state: dict[str, Array], z: Array, codes: Array, decay: float) -> dict[str, Array]:
    """Averages after an update whose whole batch had latents z [..., D] and codes int [...]."""
    return ema_absorb(state, statistics(z, codes, len(state['count'])), decay)


def restart(
    codebook: Array, count: Array, z: Array, rng: Array, threshold: float, scale: Array | float = 1.0
) -> tuple[Array, Array, Array]:
    """Replaces dead codes by latents of the batch (Dhariwal et al. 2020, arXiv 2005.00341, section 3.1).

    Each dead code gets a latent drawn at random, all of them different ones if z has as many. It starts anew with the
    count of one latent per update, or `threshold` if that is more.

    Args:
      codebook: [K, D].
      count: [K], average number of latents that an update gives each code.
      z: [..., D], latents of a batch, the same on all devices or spread over them.
      threshold: codes with a smaller count are dead.
      scale: what counts are divided by before they are compared, see `ema_scale`.

    Returns:
      Codebook, count, and bool [K], which codes were replaced.
    """
    dead = count / scale < threshold
    flat = jax.lax.stop_gradient(z).astype(jnp.float32).reshape(-1, z.shape[-1])
    picked = jax.random.permutation(rng, len(flat))[jnp.arange(len(codebook)) % len(flat)]
    codebook = jnp.where(dead[:, None], flat[picked], codebook)
    return codebook, jnp.where(dead, max(1.0, threshold) * scale, count), dead


def with_restarted(state: Any, name: str, codebook: Array, dead: Array) -> Any:
    """The State with the learned codebook `name` of the network 'codebook' replaced, as `restart` gives it.

    The replaced codes take their new values in all averages of the weights too: an average of a code that is given up
    is worth nothing.
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
    # The sum that makes the new code what it shall be; sums of the living stay as they are.
    total = codebook * smoothed(count, EPS * scale)[:, None]
    return {**state, 'count': count, 'sum': jnp.where(dead[:, None], total, state['sum'])}


def perplexity_of_counts(count: Array) -> Array:
    """exp of the entropy of the shares that counts [K] stand for: how many codes are in use, as it were, 1 to K."""
    share = count / jnp.maximum(count.sum(), 1e-20)
    return jnp.exp(jax.scipy.special.entr(share).sum())


def perplexity(codes: Array, size: int) -> Array:
    """The same of codes int [...] out of `size`: 1 if all are one code, `size` if all are met equally often."""
    return perplexity_of_counts(jax.nn.one_hot(codes.reshape(-1), size, dtype=jnp.float32).sum(0))


def usage(codes: Array, size: int) -> Array:
    """Share of the `size` codes that are met among codes int [...], 0 to 1."""
    return (jax.nn.one_hot(codes.reshape(-1), size, dtype=jnp.float32).sum(0) > 0).mean()
