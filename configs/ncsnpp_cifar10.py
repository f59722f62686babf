"""NCSN++ (continuous, VE SDE) on CIFAR-10 (Song et al. 2021); `:deep` is twice as deep.

    python -m jaxgen.main --config=configs/ncsnpp_cifar10.py
    python -m jaxgen.main --config=configs/ncsnpp_cifar10.py:deep

Time: not measured
Paper: FID 2.38, Inception Score 9.83; `:deep` 2.20, 9.89
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='diffusion',
        data=dict(source='cifar10', size=32, channels=3, batch=128, flip=True),
        model=dict(
            process=dict(name='ve', sigma_min=0.02, sigma_max=100.0),
            network=dict(
                name='ncsnpp',
                channels=128,
                multipliers=(1, 2, 2, 2),
                blocks=4,
                attention=(16,),
                dropout=0.1,
                embedding='fourier',
                resampling='fir',
                pyramid='residual',
            ),
            training=dict(prediction='score'),
            sampler=dict(name='predictor_corrector', steps=1000, clip=False),
            likelihood=dict(steps=100),
        ),
        # The published loss is half of a sum over 3072 numbers, not their mean: clip and eps are scaled like it.
        optim=dict(lr=2e-4, warmup=5000, clip=1 / 1536, eps=1e-8 / 1536, ema=0.999, ema_warmup=True),
        train=dict(steps=1_300_000, log_every=100, save_every=5000, sample_every=50_000),
        variants={
            'deep': dict(model=dict(network=dict(blocks=8)), train=dict(steps=950_000)),
            'tiny': dict(
                data=dict(source='shapes'),
                model=dict(
                    network=dict(channels=8, multipliers=(1,), blocks=1, attention=()),
                    sampler=dict(steps=5),
                    likelihood=dict(steps=3),
                ),
                optim=dict(warmup=2),
            ),
        },
    )
