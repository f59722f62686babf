"""A consistency model of scikit-learn's 8x8 digits: one evaluation of the network for a sample.

    python -m jaxgen.main --config=configs/consistency_digits.py            # improved consistency training, no teacher
    python -m jaxgen.main --config=configs/consistency_digits.py:distill    # distils runs/edm_digits

Time: 11.4 minutes on 2 CPU cores with other work on them
Paper: none
Ours: with one evaluation, Fréchet distance 1.69, `:distill` 1.21 (classifier_digits, 500 samples; held-out digits
have 0.19)
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='consistency',
        data=dict(source='digits', size=8, channels=1, batch=128),
        model=dict(
            network=dict(name='ncsnpp', channels=32, multipliers=(1, 2), blocks=1, attention=(4,), dropout=0.1),
            discretisation=dict(start_scales=10, end_scales=160, total_steps=900),
        ),
        optim=dict(lr=1e-3, warmup=100, clip=1.0, ema=0.995, ema_warmup=True),
        train=dict(steps=900, log_every=50, save_every=300, sample_every=450),
        evaluate=dict(features='run:runs/classifier_digits', samples=2000),
        variants={
            # Learning rate and dropout fall for fine-tuning: the network starts as the teacher's.
            'distill': dict(
                stages=dict(teacher='runs/edm_digits'),
                model=dict(
                    network=dict(dropout=0.0),
                    discretisation=dict(name='constant', end_scales=17),
                    times='uniform',
                    distance='l2',
                    weighting='none',
                ),
                optim=dict(lr=5e-4),
                train=dict(steps=600, save_every=200, sample_every=300),
            ),
            'tiny': dict(
                model=dict(
                    network=dict(channels=8, multipliers=(1,), attention=()),
                    discretisation=dict(name='doubling', start_scales=2, end_scales=8, total_steps=4),
                    sampler=dict(steps=2),
                ),
                optim=dict(warmup=2),
            ),
        },
    )
