"""Score SDE (VP) on scikit-learn's 8x8 digits, DDPM++: predictor-corrector sampling, likelihood by the ODE.

    python -m jaxgen.main --config=configs/score_vp_digits.py

Time: 6.5 minutes on 2 CPU cores with other work on them
Paper: none
Ours: Fréchet distance 0.75 (classifier_digits, 500 samples; held-out digits have 0.19)
4.98 bits/dim of 256 levels (by the ODE (64 digits))
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='diffusion',
        data=dict(source='digits', size=8, channels=1, batch=128),
        model=dict(
            process='vp',
            network=dict(name='ncsnpp', channels=32, multipliers=(1, 2), blocks=1, attention=(4,), dropout=0.1),
            sampler=dict(name='predictor_corrector', steps=100, clip=False),
        ),
        optim=dict(lr=1e-3, warmup=100, clip=1.0, ema=0.995, ema_warmup=True),
        train=dict(steps=800, log_every=50, save_every=200, sample_every=200),
        evaluate=dict(features='run:runs/classifier_digits', samples=500, examples=64),
        variants={
            'tiny': dict(
                model=dict(
                    network=dict(channels=8, multipliers=(1,), attention=()),
                    sampler=dict(steps=4),
                    likelihood=dict(steps=3),
                ),
                optim=dict(warmup=2),
            ),
        },
    )
