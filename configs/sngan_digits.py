"""SN-GAN, hinge loss and spectral normalisation, on scikit-learn's 8x8 handwritten digits.

    python -m jaxgen.main --config=configs/sngan_digits.py

Time: 12.2 minutes on one CPU core with much other work on it
Paper: none
Ours: Fréchet distance 0.91 (500 samples; held-out digits: 0.19)
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='gan',
        data=dict(source='digits', size=8, channels=1, batch=160),  # 5 discriminator steps of 32 images
        model=dict(
            adversarial='hinge',
            network=dict(name='resnet', width=32, multipliers=(1, 1, 1), pooling='sum'),
            latent=32,
            discriminator_steps=5,
            generator_batch=2,
            spectral=('discriminator',),
            dequantise=True,
        ),
        optim=dict(lr=1e-3, schedule='linear', b1=0.0, b2=0.9, ema=0.998, ema_warmup=True),
        train=dict(steps=2400, log_every=100, save_every=800, sample_every=800),
        evaluate=dict(features='run:runs/classifier_digits', samples=2000),
        variants={
            'tiny': dict(
                model=dict(network=dict(width=4, multipliers=(1, 1)), latent=4, discriminator_steps=2),
                optim=dict(lr=1e-3, schedule='linear'),
            ),
        },
    )
