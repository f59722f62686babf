"""VQGAN of the drawn scenes (jaxgen/data/shapes.py): 32x32 pixels to 8x8 codes out of 256.

    python -m jaxgen.main --config=configs/classifier_shapes.py    # for the perceptual distance
    python -m jaxgen.main --config=configs/vqgan_shapes.py

The first of two stages: its samples are of independent codes, no scenes. The discriminator comes in halfway.

Time: 6.6 minutes on one CPU core
Paper: none
Ours: squared error 0.0117 and absolute error 0.058, of pixels in [-1, 1]; 7.6 bits per code
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='vqgan',
        stages=dict(perceptual='runs/classifier_shapes'),
        data=dict(source='shapes', size=32, channels=3, batch=16),
        model=dict(
            regulariser='vq',
            channels=16,
            multipliers=(1, 2, 4),
            blocks=1,
            latent=8,
            vocabulary=256,
            restart=0.03,
            pixels='l2',
            perceptual=0.1,
            adversarial=0.1,
            discriminator_start=600,
            discriminator_channels=16,
            discriminator_layers=2,
        ),
        optim=dict(
            lr=2e-3,
            schedule='cosine',
            warmup=50,
            clip=1.0,
            b1=0.5,
            b2=0.9,
            ema=0.995,
            ema_warmup=True,
            networks=dict(discriminator=dict(lr=5e-4)),
        ),
        train=dict(steps=1200, updates_per_call=10, log_every=50, save_every=300, sample_every=0),
        evaluate=dict(features='run:runs/classifier_shapes', samples=2000),
        variants={
            'tiny': dict(
                model=dict(
                    channels=8,
                    multipliers=(1, 2),
                    latent=4,
                    vocabulary=8,
                    restart=0.0,
                    discriminator_start=1,
                    discriminator_channels=4,
                    discriminator_layers=1,
                ),
                optim=dict(warmup=0),
            ),
        },
    )
