"""VAR on scikit-learn's 8x8 handwritten digits, class-conditional: 30 codes in four steps, with guidance.

    python -m jaxgen.main --config=configs/var_digits.py

after its first stage, `configs/var_vqvae_digits.py`.

Time: not measured
Paper: none
Ours: not measured
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='var',
        stages=dict(first='runs/var_vqvae_digits'),
        data=dict(source='digits', size=8, channels=1, batch=128, features=('image', 'label')),
        model=dict(channels=96, blocks=4, heads=4, dropout=0.1, gate=0.1, conditional=True, guidance=1.0),
        optim=dict(lr=1e-3, schedule='cosine', warmup=100, clip=1.0, ema=0.995, ema_warmup=True),
        train=dict(steps=1000, log_every=50, save_every=500, sample_every=500),
        evaluate=dict(features='run:runs/classifier_digits', samples=2000),
        variants={
            'tiny': dict(
                data=dict(batch=8),
                model=dict(channels=16, blocks=2, heads=2),
                optim=dict(lr=3e-3, schedule='constant', warmup=2),
                train=dict(steps=4, log_every=1, save_every=2, sample_every=0, samples=4),
                sample=dict(batch=4),
                evaluate=dict(batch=8, examples=8, features='none'),
            ),
        },
    )
