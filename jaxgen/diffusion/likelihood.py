"""The variational bound on the likelihood, in bits per dimension."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.contract import normal
from jaxgen.diffusion.schedules import Schedule, posterior
from jaxgen.losses.divergences import normal_kl
from jaxgen.losses.likelihoods import discretised_gaussian

Array = jax.Array


def variational_bound(
    denoise: Callable, x_0: Array, schedule: Schedule, log_variance: np.ndarray, keys: Array, steps: int = 0
) -> dict[str, Array]:
    """Upper bound on -log2 p(x_0) per dimension: Ho et al. 2020, eq. 5, with a draw of x_t for each term.

    Args:
      denoise: (x [n, ...], t [n]) -> x_0. Its argument t is the schedule's.
      x_0: float32 [n, ...] in [-1, 1], at 256 levels.
      log_variance: of p(x_s | x_t), [T].
      keys: [n], of the draws of each example.
      steps: number of the T - 1 middle terms that are computed. They are cut into so many runs of
        nearly equal length, and one term of each run, drawn for each example, stands for its run:
        the estimate has the right mean. 0: all of them.

    Returns:
      float32 [n] each: 'bits_per_dim', the bound, and the parts of it that are always computed in
      full, 'bits_prior' (L_T: what of x_0 is left at the last level) and 'bits_decoder' (L_0: from
      the first level to 256 values, eq. 13).
    """
    dims = x_0[0].size
    bits = 1 / (dims * math.log(2))
    last = len(schedule.t) - 1
    steps = steps or last
    moves = posterior(schedule)
    table = {
        't': jnp.asarray(schedule.t),
        'alpha': jnp.asarray(schedule.alpha, jnp.float32),
        'sigma': jnp.asarray(schedule.sigma, jnp.float32),
        'x_0_weight': jnp.asarray(moves.x_0_weight, jnp.float32),
        # At step 0 the posterior's variance is 0; that step is the decoder's and reads no other.
        'log_posterior': jnp.asarray(np.log(np.maximum(moves.variance, 1e-300)), jnp.float32),
        'log_model': jnp.asarray(log_variance, jnp.float32),
    }

    def decoder(at, x_0_hat):
        return -discretised_gaussian(x_0_hat, 0.5 * at['log_model'], x_0)

    def middle(at, x_0_hat):
        # Means of q(x_s | x_t, x_0) and p(x_s | x_t): the x_t in them is the same, so only this differs.
        distance = at['x_0_weight'] * (x_0 - x_0_hat)
        return normal_kl(distance, jnp.broadcast_to(at['log_posterior'], x_0.shape), 0.0, at['log_model'])

    def term(_, run):
        number, low, size = run
        which, noise = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, number)))(keys), 1, 0)
        i = low + jax.vmap(lambda key: jax.random.randint(key, (), 0, size))(which)  # [n], a step of the run
        at = {name: values[i].reshape(-1, *[1] * (x_0.ndim - 1)) for name, values in table.items()}
        x_t = at['alpha'] * x_0 + at['sigma'] * normal(noise, x_0.shape[1:])
        x_0_hat = denoise(x_t, table['t'][i])
        return None, size * jax.lax.cond(number == 0, decoder, middle, at, x_0_hat)

    # Run 0 is step 0, the decoder's; the others cut 1 .. T - 1 into `steps`. One scan over all, so
    # that the network is compiled once.
    edges = np.concatenate([[0], 1 + np.arange(steps + 1) * last // steps])
    runs = jax.tree.map(jnp.asarray, (np.arange(steps + 1), edges[:-1], np.diff(edges)))
    terms = jax.lax.scan(term, None, runs)[1]  # [steps + 1, n]
    prior = normal_kl(float(schedule.alpha[last]) * x_0, jnp.full_like(x_0, 2 * math.log(schedule.sigma[last])))
    return {
        'bits_per_dim': bits * (prior + terms.sum(0)),
        'bits_prior': bits * prior,
        'bits_decoder': bits * terms[0],
    }
