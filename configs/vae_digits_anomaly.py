"""VAE for anomaly detection: trained on the digits 0 to 4 of scikit-learn's 8x8 digits, it detects the others.

    python -m jaxgen.main --config=configs/vae_digits_anomaly.py

Time: 40 seconds on one CPU core
Paper: none
Ours: area under the ROC curve for the digits 5 to 9 of the test split: 0.997 by squared error, 0.91 by
reconstruction in nats, 0.92 by the ELBO
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='vae',
        data=dict(source='digits', size=8, channels=1, keep_classes=(0, 1, 2, 3, 4), batch=128),
        # The scale is fixed: a learned one shrinks on so few images, and the test bound with it.
        model=dict(
            network='mlp',
            hidden=(512, 256),
            latent=10,
            likelihood='discretised_gaussian',
            scale=0.5,
            learn_scale=False,
        ),
        optim=dict(lr=1e-3, schedule='cosine', ema=0.999, ema_warmup=True),
        train=dict(steps=6000, updates_per_call=50, log_every=500, save_every=3000, sample_every=3000),
        evaluate=dict(features='run:runs/classifier_digits', samples=2000),
        variants={
            'tiny': dict(model=dict(hidden=(16, 12), latent=4, iwae_samples=3)),
        },
    )
