"""MaskGIT over the 4x4 codes of VQ-VAE on scikit-learn's 8x8 digits, class-conditional: 16 codes in 8 steps.

    python -m jaxgen.main --config=configs/maskgit_digits.py

after its first stage, `configs/vqvae_digits.py`.

Time: 5.3 minutes on one CPU core
Paper: none
Ours: Fréchet distance 0.51 (500 samples; held-out digits: 0.19); 4.61 bits per masked code on held-out digits
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='maskgit',
        stages=dict(first='runs/vqvae_digits'),
        data=dict(source='digits', size=8, channels=1, batch=128, features=('image', 'label')),
        model=dict(channels=96, blocks=4, heads=4, conditional=True, steps=8, choice_temperature=1.0),
        optim=dict(lr=1e-3, schedule='cosine', warmup=100, clip=1.0, ema=0.995, ema_warmup=True),
        train=dict(steps=1000, log_every=50, save_every=500, sample_every=500),
        evaluate=dict(features='run:runs/classifier_digits', samples=2000),
        variants={
            'tiny': dict(model=dict(channels=16, blocks=2, heads=2, steps=3), optim=dict(warmup=2)),
        },
    )
