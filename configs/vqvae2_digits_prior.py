"""VQ-VAE-2's prior on scikit-learn's 8x8 digits: 2x2 coarse codes, with attention, and 4x4 fine ones given these.

    python -m jaxgen.main --config=configs/vqvae2_digits_prior.py

after its first stage, `configs/vqvae2_digits.py`.

Time: 1.3 minutes on one CPU core
Paper: none
Ours: Fréchet distance 1.23 (500 samples; held-out digits: 0.19); 5.50 bits per code on held-out digits
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='pixelcnn',
        stages=dict(first='runs/vqvae2_digits'),
        data=dict(source='digits', size=8, channels=1, features=('image', 'label'), batch=64),
        model=dict(
            network=dict(name='snail', channels=32, blocks=2, layers=2, heads=4, dropout=0.3),
            embedding=32,
            conditional=True,
        ),
        optim=dict(lr=3e-3, schedule='cosine', warmup=50, clip=1.0, ema=0.99, ema_warmup=True),
        train=dict(steps=800, updates_per_call=10, log_every=50, save_every=400, sample_every=400),
        evaluate=dict(features='run:runs/classifier_digits', samples=2000),
        variants={
            'tiny': dict(
                model=dict(network=dict(channels=8, blocks=1, layers=1, heads=2), embedding=6, coarser_blocks=1),
                optim=dict(lr=1e-2, warmup=2),
            ),
        },
    )
