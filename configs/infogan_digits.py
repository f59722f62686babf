"""InfoGAN on scikit-learn's 8x8 handwritten digits: one category of ten, and two continuous codes.

    python -m jaxgen.main --config=configs/infogan_digits.py

`--mode=explore` shows traversals of each code, categories first.

Time: 1.7 minutes on a CPU core with other work beside it
Paper: none
Ours: Fréchet distance 0.58, precision 0.83, recall 0.37; held-out digits have 0.19
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='infogan',
        data=dict(source='digits', size=8, channels=1, batch=64),
        model=dict(noise=16, categories=(10,), continuous=2, width=32, levels=2, hidden=128),
        optim=dict(lr=2e-4, b1=0.5, ema=0.998, ema_warmup=True, networks=dict(generator=dict(lr=1e-3))),
        train=dict(steps=6000, updates_per_call=20, log_every=200, save_every=2000, sample_every=2000),
        evaluate=dict(features='run:runs/classifier_digits', samples=2000),
        variants={
            'tiny': dict(
                model=dict(noise=3, categories=(3, 2), continuous=1, width=16, hidden=32, recogniser_hidden=16),
                optim=dict(lr=2e-4),
            ),
        },
    )
