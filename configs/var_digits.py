"""VAR on scikit-learn's 8x8 handwritten digits, class-conditional: 30 codes in four steps, with guidance.

    python -m jaxgen.main --config=configs/var_digits.py

after its first stage, `configs/var_vqvae_digits.py`.

Time: 15.6 minutes on one CPU core with much other work on it, 3.2 minutes of CPU time
Paper: none
Ours: Fréchet distance 0.43, without guidance 0.40, with 0.5 of it 0.51 (classifier_digits, 500 samples; held-out digits
have 0.19); 3.73 bits per code
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='var',
        stages=dict(first='runs/var_vqvae_digits'),
        data=dict(source='digits', size=8, channels=1, batch=64, features=('image', 'label')),
        model=dict(channels=64, blocks=4, heads=4, dropout=0.2, gate=0.1, conditional=True, guidance=0.2),
        optim=dict(lr=1e-3, schedule='cosine', warmup=100, clip=1.0, ema=0.995, ema_warmup=True),
        train=dict(steps=1000, log_every=50, save_every=500, sample_every=500),
        evaluate=dict(features='run:runs/classifier_digits', samples=2000),
        variants={
            'tiny': dict(model=dict(channels=16, blocks=2, heads=2), optim=dict(warmup=2)),
        },
    )
