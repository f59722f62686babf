"""BigGAN on ImageNet, 128x128, class-conditional: 70 million weights against 88 million.

    python -m jaxgen.main --config=configs/biggan_imagenet128.py

The batch of 2,048 is each of the two discriminator steps'; accumulation (`--config.optim.accumulate=N`) makes it fit,
with batch normalisation then over its parts.

Differs: these are the paper's settings (two discriminator steps, 5e-5 and 2e-4, orthogonal regularisation) with the
eps of the public PyTorch code; that has one step, 1e-4 and 4e-4 and no regularisation, and averages from update 20,000.
It does not mirror images.

Time: not measured
Paper: FID 7.4, Inception score 166.5, each at its best truncation (Brock et al. 2018)
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='gan',
        data=dict(source='imagenet2012', size=128, channels=3, features=('image', 'label'), batch=4096, flip=True),
        model=dict(
            adversarial='hinge',
            network=dict(
                name='biggan',
                width=96,
                multipliers=(16, 16, 8, 4, 2, 1),
                halvings=5,
                attention=(64,),
                embedding=128,
                pooling='sum',
            ),
            conditional='projection',
            latent=120,
            discriminator_steps=2,
            spectral=('generator', 'discriminator'),
            orthogonal=1e-4,
        ),
        optim=dict(lr=2e-4, b1=0.0, b2=0.999, eps=1e-6, ema=0.9999, networks=dict(generator=dict(lr=5e-5))),
        train=dict(steps=140_000, dtype='bfloat16', log_every=100, save_every=2000, sample_every=2000),
        variants={
            'tiny': dict(
                data=dict(source='shapes', flip=False),
                model=dict(
                    network=dict(width=4, multipliers=(2, 1), halvings=0, attention=(8,), embedding=3), latent=4
                ),
                optim=dict(lr=2e-4),
            ),
        },
    )
