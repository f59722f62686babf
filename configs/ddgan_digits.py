"""Denoising diffusion GAN on scikit-learn's 8x8 handwritten digits: four steps.

    python -m jaxgen.main --config=configs/ddgan_digits.py

The discriminator dies, both losses standing still, where the generator learns as fast as it does, and with the
paper's noise, in which 8x8 pixels are lost.

Time: 19.4 minutes on a CPU core with other work beside it
Paper: none
Ours: Fréchet distance 1.77, precision 0.41, recall 0.80; held-out digits have 0.19
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='ddgan',
        data=dict(source='digits', size=8, channels=1, batch=32),
        model=dict(
            process=dict(timesteps=4, beta_max=10.0),  # 8x8 pixels are lost in less noise than the paper's 32x32
            generator=dict(
                latent=32, style=64, mapping_layers=2, channels=16, multipliers=(1, 2), blocks=1, attention=()
            ),
            discriminator=dict(channels=24, multipliers=(1, 2, 4), embedding=64),
            r1=0.01,
            r1_every=4,
        ),
        optim=dict(
            lr=1e-3,
            schedule='cosine',
            b1=0.5,
            b2=0.99,
            ema=0.998,
            ema_warmup=True,
            networks=dict(generator=dict(lr=1e-4)),
        ),
        train=dict(steps=8000, updates_per_call=10, log_every=100, save_every=2000, sample_every=2000),
        evaluate=dict(features='run:runs/classifier_digits', samples=2000),
        variants={
            'tiny': dict(
                model=dict(
                    process=dict(timesteps=2),
                    generator=dict(
                        latent=3, style=4, mapping_layers=1, channels=4, multipliers=(1,), blocks=1, attention=()
                    ),
                    discriminator=dict(channels=4, multipliers=(1,), embedding=4),
                    r1_every=1,
                ),
                optim=dict(lr=1e-3, schedule='cosine'),
            ),
        },
    )
