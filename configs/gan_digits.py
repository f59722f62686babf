"""The GAN of 2014, two perceptrons, on scikit-learn's 8x8 handwritten digits.

    python -m jaxgen.main --config=configs/gan_digits.py

The variant `minimax` has the loss of the paper's equation 1 for the generator too, where this one has that of its
section 3.

Time: 5.7 minutes on one CPU core with much other work on it
Paper: none
Ours: Fréchet distance 1.18 (500 samples; held-out digits: 0.19)
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='gan',
        data=dict(source='digits', size=8, channels=1, batch=64),
        model=dict(adversarial='non_saturating', network=dict(name='mlp', hidden=(256, 256)), latent=32),
        optim=dict(lr=2e-4, b1=0.5, b2=0.999, ema=0.998, ema_warmup=True),
        train=dict(steps=20_000, updates_per_call=50, log_every=500, save_every=5000, sample_every=5000),
        evaluate=dict(features='run:runs/classifier_digits', samples=2000),
        variants={
            'minimax': dict(model=dict(adversarial='minimax')),
            'tiny': dict(model=dict(network=dict(hidden=(16, 12)), latent=4), optim=dict(lr=2e-4)),
        },
    )
