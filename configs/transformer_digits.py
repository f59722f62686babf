"""Class-conditional transformer over the 4x4 codes of VQ-VAE on scikit-learn's 8x8 digits: VQGAN's second stage.

    python -m jaxgen.main --config=configs/transformer_digits.py

after its first stage, `configs/vqvae_digits.py`.

Time: 14.3 minutes on 2 CPU cores with much other work on them, 4.2 minutes of CPU time
Paper: none
Ours: Fréchet distance 0.27 (classifier_digits, 500 samples; held-out digits have 0.19); 4.66 bits per code
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='transformer',
        stages=dict(first='runs/vqvae_digits'),
        data=dict(source='digits', size=8, channels=1, batch=128, features=('image', 'label')),
        model=dict(channels=96, blocks=4, heads=4, dropout=0.1, conditional=True),
        optim=dict(lr=1e-3, schedule='cosine', warmup=100, clip=1.0, ema=0.995, ema_warmup=True),
        train=dict(steps=1000, log_every=50, save_every=500, sample_every=500),
        evaluate=dict(features='run:runs/classifier_digits', samples=2000),
        variants={
            'tiny': dict(model=dict(channels=16, blocks=2, heads=2), optim=dict(warmup=2)),
        },
    )
