"""EDM on CIFAR-10, unconditional (Karras et al. 2022); `:conditional` is told the class, `:ve` has NCSN++'s network.

    python -m jaxgen.main --config=configs/edm_cifar10.py
    python -m jaxgen.main --config=configs/edm_cifar10.py:conditional
    python -m jaxgen.main --config=configs/edm_cifar10.py:conditional,ve

Time: not measured
Paper: FID 1.97, `:ve` 1.98, `:conditional` 1.79, `:conditional,ve` 1.79, 35 evaluations
Ours: not measured
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='diffusion',
        data=dict(source='cifar10', size=32, channels=3, batch=512),
        model=dict(
            network='ncsnpp',
            ncsnpp=dict(channels=128, multipliers=(2, 2, 2), blocks=4, attention=(16,), dropout=0.13),
            augmentation=0.12,
            process='ve',
            sigma_min=0.002,
            sigma_max=80.0,
            prediction='edm',
            times='lognormal',
            variance='fixed_small',
            sampler='heun',
            sample_steps=18,
            spacing='karras',
            clip=False,
            ode_steps=100,
        ),
        # 10 million images of warm-up; the average's half-life is 500,000 images.
        optim=dict(lr=1e-3, warmup=19_531, ema=0.99929047),
        train=dict(steps=390_625, log_every=100, save_every=5000, sample_every=20_000),
        variants={
            'conditional': dict(data=dict(features=('image', 'label')), model=dict(conditional=True)),
            've': dict(model=dict(ncsnpp=dict(embedding='fourier', resampling='fir', pyramid='residual'))),
            'tiny': dict(
                data=dict(source='shapes', size=8, batch=8),
                model=dict(
                    ncsnpp=dict(channels=8, multipliers=(1, 2), blocks=1, attention=(4,)), sample_steps=4, ode_steps=3
                ),
                optim=dict(lr=3e-3, warmup=2),
                train=dict(steps=4, log_every=1, save_every=2, sample_every=0, samples=4),
                sample=dict(batch=4),
                evaluate=dict(batch=8, examples=8),
            ),
        },
    )
