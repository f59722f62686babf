"""Score SDE (VE) on scikit-learn's 8x8 digits, NCSN++: predictor-corrector sampling, likelihood by the ODE.

    python -m jaxgen.main --config=configs/score_ve_digits.py

Time: 10.0 minutes on 2 CPU cores with other work on them
Paper: none
Ours: Fréchet distance 1.32 (classifier_digits, 500 samples; held-out digits have 0.19)
4.91 bits/dim of 256 levels (by the ODE, 64 digits, seed 0; seeds 1 to 4: 4.89, 4.88, 4.88, 4.87. Each digit has one
random vector for the divergence and one draw of dequantisation noise; 200 steps give 4.90 with seed 0)
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='diffusion',
        data=dict(source='digits', size=8, channels=1, batch=128),
        model=dict(
            process=dict(name='ve', sigma_min=0.02, sigma_max=20.0),
            network=dict(
                name='ncsnpp',
                channels=32,
                multipliers=(1, 2),
                blocks=1,
                attention=(4,),
                dropout=0.1,
                embedding='fourier',
                resampling='fir',
                pyramid='residual',
            ),
            training=dict(prediction='score'),
            sampler=dict(name='predictor_corrector', steps=100, clip=False),
        ),
        optim=dict(lr=1e-3, warmup=100, clip=1.0, ema=0.995, ema_warmup=True),
        train=dict(steps=500, log_every=50, save_every=250, sample_every=250),
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
