"""StarGAN v2 on scikit-learn's 8x8 handwritten digits: the ten digits are the domains, and hands are styles.

    python -m jaxgen.main --config=configs/stargan2_digits.py

Time: not measured
Paper: none
Ours: not measured
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='stargan2',
        data=dict(source='digits', size=8, channels=1, features=('image', 'label', 'domain'), batch=32),
        model=dict(
            width=24,
            most=48,
            halvings=1,
            blocks=2,
            norm='group',
            latent=8,
            style=16,
            hidden=64,
            mapping_layers=2,
            r1=0.1,
            diversity_steps=2500,
        ),
        optim=dict(lr=1e-3, schedule='half_linear', b1=0.0, b2=0.99, ema=0.995, ema_warmup=True),
        train=dict(steps=2500, updates_per_call=10, log_every=50, save_every=500, sample_every=0),
        evaluate=dict(features='run:runs/classifier_digits', samples=2000),
        variants={
            'tiny': dict(
                data=dict(batch=8),
                model=dict(width=4, most=8, halvings=1, blocks=0, latent=4, style=4, hidden=8, mapping_layers=1),
                optim=dict(lr=3e-3, schedule='constant'),
                train=dict(steps=4, updates_per_call=1, log_every=1, save_every=2, sample_every=0, samples=4),
                sample=dict(batch=4),
                evaluate=dict(batch=8, examples=8, features='none'),
            ),
        },
    )
