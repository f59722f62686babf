"""DDPM on the drawn scenes (jaxgen/data/shapes.py), 32x32, by their latents of 8x8x4.

    python -m jaxgen.main --config=configs/classifier_shapes.py    # sees how alike two pictures are
    python -m jaxgen.main --config=configs/kl_shapes.py            # the autoencoder, whose latents these are
    python -m jaxgen.main --config=configs/ddpm_shapes.py

Time: 24.4 minutes on one CPU core with other work on it, after 11.4 minutes of kl_shapes
Paper: none
Ours: Fréchet distance 15.3 by the scenes' classifier (500 samples), precision 0.90, recall 0.71
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='diffusion',
        stages=dict(first='runs/kl_shapes'),
        data=dict(source='shapes', size=32, channels=3, batch=64),
        model=dict(
            network=dict(channels=32, multipliers=(1, 2), blocks=2, attention=(8, 4), dropout=0.0),
            sampler=dict(variance='fixed_small', steps=250, clip=False),
            likelihood=dict(variance='fixed_small'),
            latent_scale=0.5,
        ),
        optim=dict(lr=1.5e-3, schedule='cosine', warmup=100, clip=1.0, ema=0.998, ema_warmup=True),
        train=dict(steps=2400, updates_per_call=5, log_every=50, save_every=600, sample_every=1200),
        evaluate=dict(features='run:runs/classifier_shapes', samples=2000),
        variants={
            'tiny': dict(
                model=dict(
                    process=dict(timesteps=20, beta_end=0.5),
                    network=dict(channels=8, multipliers=(1,), blocks=1, attention=()),
                    sampler=dict(steps=0),
                ),
                optim=dict(warmup=2),
            ),
        },
    )
