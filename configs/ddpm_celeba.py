"""DDPM on CelebA faces, 64x64, with the network of the DDIM paper: 78.7 million weights.

    python -m jaxgen.main --config=configs/ddpm_celeba.py

The square cut out of the 218x178 pictures is the one of the DDIM paper's code: rows 57 to 185,
columns 25 to 153. `--config.model.sampler=ddim --config.model.sampler.steps=100` samples in a tenth
of the steps.

Time: not measured
Paper: Song et al. 2021 (arXiv 2010.02502), table 1, gives FID by number of steps and eta
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='diffusion',
        data=dict(source='celeb_a', size=64, channels=3, batch=128, flip=True, box=(57, 25, 128, 128)),
        model=dict(
            network=dict(
                channels=128, group_size=0, multipliers=(1, 2, 2, 2, 4), blocks=2, attention=(16,), dropout=0.1
            )
        ),
        optim=dict(lr=2e-4, warmup=5000, clip=1.0, ema=0.9999),
        train=dict(steps=500_000, log_every=100, save_every=5000, sample_every=20_000),
        variants={
            'tiny': dict(
                data=dict(source='shapes', box=()),
                model=dict(
                    process=dict(timesteps=20, beta_end=0.5),
                    network=dict(channels=8, group_size=4, multipliers=(1,), blocks=1, attention=()),
                    sampler='ddim',
                ),
                optim=dict(warmup=2),
            ),
        },
    )
