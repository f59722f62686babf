"""DCGAN on CelebA faces, 64x64, in the size of the torch port that is widely used.

    python -m jaxgen.main --config=configs/dcgan_celeba.py

Differs: the authors' own code is larger (5x5 kernels, 128 channels), has an L2 penalty of 1e-5 and 350,000 faces of
another set; the port trains 5 epochs by default, here are the authors' 25.

Time: not measured
Paper: no metric for these faces (Radford et al. 2015)
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='gan',
        data=dict(source='celeb_a', size=64, channels=3, batch=128),
        model=dict(network=dict(name='dcgan', width=64, multipliers=(8, 4, 2, 1)), latent=100),
        optim=dict(lr=2e-4, b1=0.5, b2=0.999, ema=0.0),  # the paper averages no weights
        train=dict(steps=32_000, log_every=100, save_every=2000, sample_every=2000),  # 25 epochs
        variants={
            'tiny': dict(
                data=dict(source='shapes'),
                model=dict(network=dict(width=4, multipliers=(2, 1)), latent=4),
                optim=dict(lr=2e-4),
            ),
        },
    )
