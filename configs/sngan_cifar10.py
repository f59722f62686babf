"""SN-GAN on CIFAR-10 without labels: residual networks, hinge loss, the paper's settings.

    python -m jaxgen.main --config=configs/sngan_cifar10.py

Time: not measured
Paper: FID 21.7, Inception score 8.22 (Miyato et al. 2018, table 2; of 5,000 samples)
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='gan',
        data=dict(source='cifar10', size=32, channels=3, batch=320),  # 5 discriminator steps of 64 images
        model=dict(
            adversarial='hinge',
            network=dict(name='resnet', width=256, discriminator_width=128, multipliers=(1, 1, 1, 1), pooling='sum'),
            latent=128,
            discriminator_steps=5,
            generator_batch=2,
            spectral=('discriminator',),
            dequantise=True,
        ),
        optim=dict(lr=2e-4, schedule='linear', b1=0.0, b2=0.9, ema=0.0),  # the paper averages no weights
        train=dict(steps=50_000, log_every=100, save_every=2000, sample_every=2000),
        variants={
            'tiny': dict(
                data=dict(source='shapes'),
                model=dict(
                    network=dict(width=8, discriminator_width=4, multipliers=(1, 1)), latent=4, discriminator_steps=2
                ),
                optim=dict(lr=2e-4, schedule='linear'),
            ),
        },
    )
