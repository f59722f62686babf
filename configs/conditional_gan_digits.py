"""Conditional GAN on scikit-learn's 8x8 handwritten digits: the class beside z and beside the image.

    python -m jaxgen.main --config=configs/conditional_gan_digits.py
    python -m jaxgen.main --mode=sample --workdir=runs/conditional_gan_digits --condition=label=3

The variant `projection` is SN-GAN's with a projection discriminator and conditional batch normalisation.

Time: 6.2 minutes on one CPU core with much other work on it; 16.7 the variant
Paper: none
Ours: Fréchet distance 0.15, the variant 0.29 (500 samples; held-out digits: 0.19)
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='gan',
        data=dict(source='digits', size=8, channels=1, features=('image', 'label'), batch=64),
        model=dict(network=dict(name='dcgan', width=32, multipliers=(2, 1)), conditional='concat', latent=32),
        optim=dict(lr=2e-4, b1=0.5, b2=0.999, ema=0.998, ema_warmup=True),
        train=dict(steps=6000, updates_per_call=20, log_every=200, save_every=2000, sample_every=2000),
        evaluate=dict(features='run:runs/classifier_digits', samples=2000),
        variants={
            'projection': dict(
                data=dict(batch=160),  # 5 discriminator steps of 32 images
                model=dict(
                    adversarial='hinge',
                    network=dict(name='resnet', multipliers=(1, 1, 1), pooling='sum'),
                    conditional='projection',
                    discriminator_steps=5,
                    generator_batch=2,
                    spectral=('discriminator',),
                    dequantise=True,
                ),
                optim=dict(lr=1e-3, schedule='linear', b1=0.0, b2=0.9),
                train=dict(steps=2400, log_every=100, save_every=800, sample_every=800),
            ),
            'tiny': dict(model=dict(network=dict(width=4, multipliers=(1,)), latent=4), optim=dict(lr=2e-4)),
        },
    )
