"""EDM on ImageNet 64x64, class-conditional, with ADM's network (Karras et al. 2022).

    python -m jaxgen.main --config=configs/edm_imagenet64.py

Sampled with churn, 511 evaluations.

Time: not measured
Paper: FID 1.36
Ours: not measured
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='diffusion',
        data=dict(source='imagenet2012', size=64, channels=3, batch=4096, features=('image', 'label')),
        model=dict(
            network='adm',
            adm=dict(
                channels=192, multipliers=(1, 2, 3, 4), blocks=3, attention=(32, 16, 8), head_channels=64, dropout=0.1
            ),
            conditional=True,
            process='ve',
            sigma_min=0.002,
            sigma_max=80.0,
            prediction='edm',
            times='lognormal',
            variance='fixed_small',
            sampler='heun',
            sample_steps=256,
            spacing='karras',
            s_churn=40.0,
            s_min=0.05,
            s_max=50.0,
            s_noise=1.003,
            clip=False,
            ode_steps=100,
        ),
        # 10 million images of warm-up, 2.5 billion in all; the average's half-life is 50 million.
        optim=dict(lr=1e-4, warmup=2441, ema=0.99994322),
        train=dict(steps=610_352, log_every=100, save_every=1000, sample_every=10_000, dtype='bfloat16', remat=True),
        variants={
            'tiny': dict(
                data=dict(source='shapes', size=8, batch=8),
                model=dict(
                    adm=dict(channels=8, multipliers=(1, 2), blocks=1, attention=(4,), head_channels=4),
                    sample_steps=4,
                    ode_steps=3,
                ),
                optim=dict(lr=3e-3, warmup=2),
                train=dict(steps=4, log_every=1, save_every=2, sample_every=0, samples=4, dtype='float32', remat=False),
                sample=dict(batch=4),
                evaluate=dict(batch=8, examples=8),
            ),
        },
    )
