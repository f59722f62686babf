"""Flow matching (rectified flow) on the drawn scenes (jaxgen/data/shapes.py), 32x32.

    python -m jaxgen.main --config=configs/flow_shapes.py

Time: 20 minutes on 2 CPU cores with other work on them
Paper: none
Ours: colours, backgrounds, sizes and places are right, shapes are still blurred; distance not measured
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='diffusion',
        data=dict(source='shapes', size=32, channels=3, batch=32),
        model=dict(
            unet=dict(channels=16, multipliers=(1, 2, 4), blocks=1, attention=(8,), dropout=0.0),
            process='flow',
            prediction='flow',
            times='logit_normal',
            time_mean=0.0,
            time_std=1.0,
            variance='fixed_small',
            sampler='euler',
            sample_steps=50,
            clip=False,
        ),
        optim=dict(lr=2e-3, warmup=100, clip=1.0, ema=0.995, ema_warmup=True),
        train=dict(steps=1500, log_every=50, save_every=500, sample_every=500),
        evaluate=dict(features='run:runs/classifier_shapes', samples=2000),
        variants={
            'tiny': dict(
                data=dict(size=8, batch=8),
                model=dict(unet=dict(channels=8, multipliers=(1, 2), attention=(4,)), sample_steps=4, ode_steps=3),
                optim=dict(lr=3e-3, warmup=2),
                train=dict(steps=4, log_every=1, save_every=2, sample_every=0, samples=4),
                sample=dict(batch=4),
                evaluate=dict(batch=8, examples=8, features='none'),
            ),
        },
    )
