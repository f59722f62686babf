"""VAR's first stage on scikit-learn's 8x8 handwritten digits: codes out of 64 on grids of 1, 2x2, 3x3 and 4x4.

    python -m jaxgen.main --config=configs/classifier_digits.py    # for the perceptual distance
    python -m jaxgen.main --config=configs/var_vqvae_digits.py

The first of two stages: its samples are of independent codes, no digits.

Time: 7.4 minutes on one CPU core with much other work on it, 2.4 minutes of CPU time
Paper: none
Ours: of held-out digits, from their codes: mean absolute error 0.084, squared error 0.021, pixels in [-1, 1]; 5.4 bits
per code, all 64 codes in use; samples of independent codes have Fréchet distance 3.47 (classifier_digits, 500 samples)
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='vqgan',
        stages=dict(perceptual='runs/classifier_digits'),
        data=dict(source='digits', size=8, channels=1, batch=64),
        model=dict(
            regulariser='vq',
            channels=16,
            multipliers=(1, 2),
            blocks=1,
            latent=8,
            latent_kernel=3,
            vocabulary=64,
            scales=(1, 2, 3, 4),
            restart=0.1,
            perceptual=0.5,
            adversarial=0.1,
            discriminator_start=400,
            discriminator_channels=16,
            discriminator_layers=1,
        ),
        optim=dict(
            lr=2e-3,
            schedule='cosine',
            b1=0.5,
            b2=0.9,
            ema=0.99,
            ema_warmup=True,
            networks=dict(discriminator=dict(lr=5e-4)),
        ),
        train=dict(steps=800, updates_per_call=10, log_every=50, save_every=400, sample_every=400),
        evaluate=dict(features='run:runs/classifier_digits', samples=2000),
        variants={
            'tiny': dict(
                model=dict(
                    channels=8,
                    latent=4,
                    vocabulary=8,
                    scales=(1, 2, 4),
                    restart=0.0,
                    discriminator_start=1,
                    discriminator_channels=4,
                )
            ),
        },
    )
