"""Importance weighted autoencoder on MNIST in bits that are drawn anew in each update: 50 latents, layers of 200 tanh.

    python -m jaxgen.main --config=configs/iwae_mnist.py

Trained on the bound of k = 50 importance samples; the variants `k5` and `k1` have 5 and 1, the latter the ELBO. The
variants `elbo` and `k5,elbo` take the mean of k ELBOs instead, as the VAEs of the paper's table do. 59,600 images
train, 400 are held out for validation. The learning rate falls by 10^(1/7) after 1, 4, 13, ... epochs: the 8 stages
have 3^0 to 3^7 epochs.

Differs: the release rounds its learning rates to two digits, adds Adam's epsilon before the correction of the bias and
averages no weights; its decoder's last bias starts from the logits of the mean image; test images are there drawn anew
in each evaluation, here once.

Time: not measured
Paper: 84.78 nats, bound of 5,000 importance samples; 86.76 with k = 1 (Burda et al. 2016, table 1)
Ours: shape-checked
"""

from jaxgen.config import make

EPOCH = 2980  # updates
ENDS = (1, 4, 13, 40, 121, 364, 1093)  # of the stages but the last, in epochs


def get_config(variant: str = ''):
    return make(
        variant,
        family='vae',
        data=dict(source='mnist', size=28, channels=1, batch=20, binarise='dynamic', validation_fraction=400 / 60_000),
        model=dict(
            network='mlp',
            hidden=(200, 200),
            activation='tanh',
            latent=50,
            likelihood='bernoulli',
            encoder_range='unit',
            samples=50,
            iwae_samples=5000,
        ),
        optim=dict(
            lr=1e-3,
            b1=0.99,
            eps=1e-4,
            schedule='step',
            boundaries=tuple(epochs * EPOCH for epochs in ENDS),
            decay_rate=10 ** (-1 / 7),
            ema=0.999,
            ema_warmup=True,
        ),
        train=dict(steps=3280 * EPOCH, updates_per_call=20, log_every=1000, save_every=10_000, sample_every=100_000),
        variants={
            'k1': dict(model=dict(samples=1)),
            'k5': dict(model=dict(samples=5)),
            'elbo': dict(model=dict(bound='elbo')),
            'tiny': dict(
                data=dict(source='digits', validation_fraction=0.1),
                model=dict(hidden=(16, 12), latent=4, samples=3, iwae_samples=3),
                optim=dict(boundaries=()),
            ),
        },
    )
