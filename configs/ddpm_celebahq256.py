"""DDPM on CelebA-HQ, 256x256, as in the paper: 113.7 million weights.

    python -m jaxgen.main --config=configs/ddpm_celebahq256.py

Time: not measured
Paper: no figure (Ho et al. 2020 show samples only)
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='diffusion',
        data=dict(source='celeb_a_hq/256', size=256, channels=3, batch=64, flip=True),
        model=dict(
            network=dict(
                channels=128, group_size=0, multipliers=(1, 1, 2, 2, 4, 4), blocks=2, attention=(16,), dropout=0.0
            ),
            sampler=dict(variance='fixed_small'),
            likelihood=dict(variance='fixed_small'),
        ),
        optim=dict(lr=2e-5, warmup=5000, clip=1.0, ema=0.9999),
        train=dict(
            steps=500_000, log_every=100, save_every=5000, sample_every=20_000, samples=16, remat=True, dtype='bfloat16'
        ),
        sample=dict(batch=16),
        evaluate=dict(batch=16),
        variants={
            'tiny': dict(
                data=dict(source='shapes'),
                model=dict(
                    process=dict(timesteps=20, beta_end=0.5),
                    network=dict(channels=8, group_size=4, multipliers=(1,), blocks=1, attention=(), dropout=0.1),
                ),
                optim=dict(warmup=2),
            ),
        },
    )
