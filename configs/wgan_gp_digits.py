"""WGAN-GP on scikit-learn's 8x8 handwritten digits: a GAN that trains while you wait.

    python -m jaxgen.main --config=configs/wgan_gp_digits.py

Time: 2.4 minutes on 2 CPU cores
Paper: none
Ours: Fréchet distance 0.41 (classifier_digits, 500 samples; held-out digits have 0.19)
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='gan',
        data=dict(source='digits', size=8, channels=1, batch=160),  # 5 critic steps of 32 images
        model=dict(
            adversarial='wasserstein',
            network=dict(name='resnet', width=32, multipliers=(1, 1, 1)),
            latent=32,
            discriminator_steps=5,
            generator_batch=2,
            penalty=10.0,
            dequantise=True,
        ),
        optim=dict(lr=2e-3, schedule='linear', b1=0.0, b2=0.9, ema=0.998, ema_warmup=True),
        train=dict(steps=2400, log_every=100, save_every=800, sample_every=800),
        evaluate=dict(features='run:runs/classifier_digits', samples=2000),
        variants={
            'tiny': dict(
                data=dict(batch=10), model=dict(network=dict(width=8), latent=8), optim=dict(lr=2e-3, schedule='linear')
            ),
        },
    )
