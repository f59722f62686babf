"""JEM on CIFAR-10: WRN-28-10 without normalisation, a classifier and an energy of images in one.

    python -m jaxgen.main --config=configs/jem_cifar10.py

Differs: the release holds out 5,000 training images; the numbers of updates here are those of its epochs all the same,
703 each. It adds noise to test images too, and its classifier learns from another batch than its energy.

Time: not measured
Paper: accuracy 92.9%, FID 38.4, Inception score 8.76 (Grathwohl et al. 2020, table 1)
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='ebm',
        data=dict(source='cifar10', size=32, channels=3, features=('image', 'label'), batch=64, flip=True, pad=4),
        model=dict(
            network='wide_resnet',
            width=160,
            multipliers=(1, 2, 4),
            blocks=4,
            joint=True,
            buffer=10_000,
            fresh=0.05,
            steps=20,
            step=1.0,
            noise=0.01,
            clamp=0.0,
            bounded=False,
            data_noise=0.03,
            regulariser=0.0,
            start='buffer',
        ),
        # Epochs 160, 180 and 200.
        optim=dict(lr=1e-4, warmup=1000, schedule='step', boundaries=(160 * 703, 180 * 703), decay_rate=0.3, ema=0.0),
        train=dict(steps=140_600, log_every=100, save_every=1000, sample_every=5000),
        variants={
            'tiny': dict(
                data=dict(source='shapes'),
                model=dict(width=8, multipliers=(1, 2), blocks=1, buffer=24, steps=3, sample_steps=4),
                optim=dict(warmup=2, schedule='step'),
            ),
        },
    )
