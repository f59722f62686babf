"""VQ-VAE's prior on scikit-learn's 8x8 digits: a gated PixelCNN over 4x4 codes, class-conditional.

    python -m jaxgen.main --config=configs/vqvae_digits_prior.py

after its first stage, `configs/vqvae_digits.py`.

Time: 33 seconds on one CPU core
Paper: none
Ours: Fréchet distance 0.76 (500 samples; held-out digits: 0.19); 4.34 bits per code on held-out digits
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='pixelcnn',
        stages=dict(first='runs/vqvae_digits'),
        data=dict(source='digits', size=8, channels=1, features=('image', 'label'), batch=64),
        model=dict(
            network=dict(name='gated', channels=32, blocks=4, kernel=3, hidden_kernel=3, head=64, dropout=0.3),
            embedding=32,
            conditional=True,
        ),
        optim=dict(lr=3e-3, schedule='cosine', warmup=50, clip=1.0, ema=0.99, ema_warmup=True),
        train=dict(steps=800, updates_per_call=10, log_every=50, save_every=400, sample_every=400),
        evaluate=dict(features='run:runs/classifier_digits', samples=2000),
        variants={
            'tiny': dict(
                model=dict(network=dict(channels=8, blocks=1, head=12), embedding=6, coarser_blocks=1),
                optim=dict(lr=1e-2, warmup=2),
            ),
        },
    )
