"""jaxgen: a JAX functional model zoo of generative models for images.

run = jaxgen.load('runs/ddpm_digits')
images = run.sample(n=16, seed=0)  # uint8 [16, H, W, C]
"""

__version__ = '0.1.0'


def load(workdir: str):
    """The trained run in `workdir`, ready to sample and evaluate. See `jaxgen.run.Run`."""
    from jaxgen.run import load as load_run  # here, so that `import jaxgen` does not import jax

    return load_run(workdir)
