"""EDM on CIFAR-10, unconditional (Karras et al. 2022); `:conditional` on the class, `:ve` has NCSN++'s network.

    python -m jaxgen.main --config=configs/edm_cifar10.py
    python -m jaxgen.main --config=configs/edm_cifar10.py:conditional
    python -m jaxgen.main --config=configs/edm_cifar10.py:conditional,ve
    python -m jaxgen.main --config=configs/edm_cifar10.py:ffhq64 --config.data.source=folder:PATH  # or with ve
    python -m jaxgen.main --config=configs/edm_cifar10.py:imagenet64

`:ffhq64` and `:imagenet64` are the published models of these sets. FFHQ is for a person to fetch
(https://github.com/NVlabs/ffhq-dataset, 1024x1024 pixels). ImageNet's has ADM's network and is sampled with churn.

Time: not measured
Paper: FID 1.97, `:ve` 1.98, `:conditional` 1.79, `:conditional,ve` 1.79, with 35 evaluations; `:ffhq64` 2.39, with
`ve` 2.53, 79 evaluations; `:imagenet64` 1.36, 511 evaluations
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='diffusion',
        data=dict(source='cifar10', size=32, channels=3, batch=512),
        model=dict(
            process=dict(name='ve', sigma_min=0.002, sigma_max=80.0),
            network=dict(name='ncsnpp', channels=128, multipliers=(2, 2, 2), blocks=4, attention=(16,), dropout=0.13),
            training=dict(augmentation=0.12, prediction='edm', times='lognormal'),
            sampler=dict(name='heun', steps=18, spacing='karras', clip=False),
            likelihood=dict(steps=100),
        ),
        # 10 million images of warm-up. The average's half-life in images, and at most a twentieth of those seen.
        optim=dict(lr=1e-3, warmup=19_531, ema_halflife=500_000.0, ema_rampup=0.05),
        train=dict(steps=390_625, log_every=100, save_every=5000, sample_every=20_000),
        variants={
            'conditional': dict(data=dict(features=('image', 'label')), model=dict(conditioning=dict(label=dict()))),
            've': dict(model=dict(network=dict(embedding='fourier', resampling='fir', pyramid='residual'))),
            'ffhq64': dict(
                data=dict(source='folder:images1024x1024', size=64, batch=256),
                model=dict(
                    network=dict(multipliers=(1, 2, 2, 2), dropout=0.05),
                    training=dict(augmentation=0.15),
                    sampler=dict(steps=40),
                ),
                optim=dict(lr=2e-4, warmup=39_063),
                train=dict(steps=781_250),
            ),
            # 2.5 billion images in all.
            'imagenet64': dict(
                data=dict(source='imagenet2012', size=64, batch=4096, features=('image', 'label')),
                model=dict(
                    network=dict(
                        name='adm',
                        channels=192,
                        group_size=4,
                        multipliers=(1, 2, 3, 4),
                        blocks=3,
                        attention=(32, 16, 8),
                        head_channels=64,
                        dropout=0.1,
                    ),
                    training=dict(augmentation=0.0),
                    conditioning=dict(label=dict()),
                    sampler=dict(steps=256, s_churn=40.0, s_min=0.05, s_max=50.0, s_noise=1.003),
                ),
                optim=dict(lr=1e-4, warmup=2441, ema_halflife=50e6),
                train=dict(steps=610_352, dtype='bfloat16', remat=True),
            ),
            'tiny': dict(
                data=dict(source='shapes'),
                model=dict(
                    network=dict(channels=8, multipliers=(1,), blocks=1, attention=()),
                    sampler=dict(steps=4),
                    likelihood=dict(steps=3),
                ),
                optim=dict(warmup=2),
            ),
        },
    )
