"""SiT on scikit-learn's 8x8 digits: DiT's network, a straight line from noise to image, sampled as an SDE.

    python -m jaxgen.main --config=configs/sit_digits.py

Time: 14.5 minutes on 2 CPU cores with other work on them
Paper: none
Ours: Fréchet distance 0.38 (classifier_digits, 500 samples; held-out digits have 0.19)
4.54 bits/dim of 256 levels (by the ODE (64 digits))
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='diffusion',
        data=dict(source='digits', size=8, channels=1, batch=128, features=('image', 'label')),
        model=dict(
            network='dit',
            dit=dict(channels=128, blocks=6, heads=4, patch=2),
            conditional=True,
            label_dropout=0.1,
            process='flow',
            prediction='flow',
            variance='fixed_small',
            sampler='euler_maruyama',
            sample_steps=100,
            guidance=1.5,
            clip=False,
        ),
        optim=dict(lr=1e-3, warmup=100, clip=1.0, ema=0.995, ema_warmup=True),
        train=dict(steps=1000, log_every=50, save_every=500, sample_every=500),
        evaluate=dict(features='run:runs/classifier_digits', samples=500, examples=64),
        variants={
            'tiny': dict(
                model=dict(dit=dict(channels=16, blocks=2, heads=2), sample_steps=4, ode_steps=3), optim=dict(warmup=2)
            ),
        },
    )
