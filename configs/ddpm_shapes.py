"""DDPM on the drawn scenes (jaxgen/data/shapes.py), 32x32.

    python -m jaxgen.main --config=configs/ddpm_shapes.py

Time: not measured
Paper: none
Ours: not measured
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='diffusion',
        data=dict(source='shapes', size=32, channels=3, batch=32),
        model=dict(
            unet=dict(channels=16, multipliers=(1, 2, 4), blocks=1, attention=(8,), dropout=0.0),
            variance='fixed_small',
            sampler='ddim',
            sample_steps=50,
            bound_steps=50,
        ),
        optim=dict(lr=2e-3, warmup=100, clip=1.0, ema=0.995, ema_warmup=True),
        train=dict(steps=1500, log_every=50, save_every=500, sample_every=500),
        evaluate=dict(features='run:runs/classifier_shapes', samples=2000),
        variants={
            'tiny': dict(
                data=dict(size=8, batch=8),
                model=dict(
                    unet=dict(channels=8, multipliers=(1, 2), attention=(4,)),
                    timesteps=20,
                    beta_end=0.5,
                    sample_steps=4,
                    bound_steps=4,
                ),
                optim=dict(lr=3e-3, warmup=2),
                train=dict(steps=4, log_every=1, save_every=2, sample_every=0, samples=4),
                sample=dict(batch=4),
                evaluate=dict(batch=8, examples=8, features='none'),
            ),
        },
    )
