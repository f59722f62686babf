"""VAE with a VampPrior on MNIST in fixed black and white (Larochelle & Murray 2011): one level of latents.

    python -m jaxgen.main --config=configs/vampprior_mnist.py

The variant `normal` has the prior N(0, I), the variant `two` a second level of latents; `two,normal` both.

Differs: the release stops early, after 50 epochs without a better bound of the validation set, and averages no weights;
the norm that a gradient is divided by is there that of a gated layer's two matrices each, here of both together.

Time: not measured
Paper: 85.57 nats, bound of 5,000 importance samples; 88.56 with N(0, I), 83.19 and 86.05 with two levels
(Tomczak & Welling 2017, table 1)
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='vae',
        data=dict(source='binarized_mnist', size=28, channels=1, batch=100),
        model=dict(
            network='gated',
            hidden=(300, 300),
            latent=40,
            prior='vamp',
            pseudo_inputs=500,
            likelihood='bernoulli',
            white=1,  # TFDS stores its bits as 0 and 1
            encoder_range='unit',
            beta_warmup=50_000,  # 100 epochs
            iwae_samples=5000,
        ),
        optim=dict(lr=5e-4, normalise=True, ema=0.999, ema_warmup=True),
        train=dict(steps=1_000_000, updates_per_call=20, log_every=1000, save_every=10_000, sample_every=10_000),
        variants={
            'normal': dict(model=dict(prior='normal')),
            'two': dict(model=dict(latent2=40)),
            'tiny': dict(
                data=dict(source='digits'),
                model=dict(hidden=(16,), latent=4, pseudo_inputs=5, white=255, beta_warmup=2, iwae_samples=3),
            ),
        },
    )
