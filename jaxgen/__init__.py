"""jaxgen: a JAX functional model zoo of generative models for images.

run = jaxgen.load('runs/ddpm_digits')
images = run.sample(n=16, seed=0)  # uint8 [16, H, W, C]
"""

__version__ = '0.2.0'


def load(workdir: str, *, config=None, weights: str = 'ema'):
    """The trained run in `workdir`, ready to sample and evaluate. See `jaxgen.run.load` and `jaxgen.run.Run`.

    Args:
      config: fields that differ from the saved ones, {'model': {'sampler': 'ddim'}}: such as training does not depend
        on, and paths that have changed.
      weights: 'ema', 'params', or the width of an average that was kept, '0.07'.
    """
    from jaxgen.run import load as load_run  # here, so that `import jaxgen` does not import jax

    return load_run(workdir, config=config, weights=weights)
