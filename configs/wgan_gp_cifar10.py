"""WGAN-GP on CIFAR-10 without labels: the paper's residual networks and settings.

    python -m jaxgen.main --config=configs/wgan_gp_cifar10.py

Differs: the release's default is conditional, with a classifier's loss; these are its settings without labels.

Time: not measured
Paper: Inception score 7.86, unsupervised (Gulrajani et al. 2017)
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='gan',
        data=dict(source='cifar10', size=32, channels=3, batch=320),  # 5 critic steps of 64 images
        model=dict(
            adversarial='wasserstein',
            network=dict(name='resnet', width=128, multipliers=(1, 1, 1, 1)),
            latent=128,
            discriminator_steps=5,
            generator_batch=2,
            penalty=10.0,
            dequantise=True,
        ),
        optim=dict(lr=2e-4, schedule='linear', b1=0.0, b2=0.9, ema=0.0),  # the paper averages no weights
        train=dict(steps=100_000, log_every=100, save_every=2000, sample_every=2000),
        variants={
            'tiny': dict(
                data=dict(source='shapes', batch=10),
                model=dict(network=dict(width=8, multipliers=(1, 1)), latent=8),
                optim=dict(lr=2e-4, schedule='linear'),
            ),
        },
    )
