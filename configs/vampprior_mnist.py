"""VAE with a VampPrior on MNIST in fixed black and white (Larochelle & Murray 2011): one level of latents.

    python -m jaxgen.main --config=configs/vampprior_mnist.py
    python -m jaxgen.main --mode=evaluate --workdir=runs/vampprior_mnist --step=best --config.model.iwae_samples=5000

The variant `normal` has the prior N(0, I), the variant `two` a second level of latents; `two,normal` both. The data of
the variant `dynamic` are MNIST in bits that are drawn anew in each update, those of `omniglot` and `caltech` the files
chardata.mat and caltech101_silhouettes_28_split1.mat in the working directory. Training stops after 50 epochs without a
smaller bound of the validation set.

Differs: the release averages no weights; the norm that a gradient is divided by is there that of a gated layer's two
matrices each, here of both together.

Time: not measured
Paper: 85.57 nats, bound of 5,000 importance samples; 88.56 with N(0, I), 83.19 and 86.05 with two levels
(Tomczak & Welling 2017, table 1)
Ours: shape-checked
"""

from jaxgen.config import make


def epochs(updates: int) -> dict:
    """Fields that count epochs of so many updates: at most 2,000, 100 of warm-up, 50 without a smaller bound."""
    return dict(
        model=dict(beta_warmup=100 * updates),
        train=dict(steps=2000 * updates, save_every=100 * updates, sample_every=100 * updates, held_out_every=updates),
    )


def get_config(variant: str = ''):
    mnist, omniglot, caltech = epochs(500), epochs(230), epochs(41)
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
            iwae_samples=1,
            **mnist['model'],
        ),
        optim=dict(lr=5e-4, normalise=True, ema=0.999, ema_warmup=True),
        train=dict(updates_per_call=10, log_every=500, stop_on='validation/nll_elbo', patience=50, **mnist['train']),
        variants={
            'normal': dict(model=dict(prior='normal')),
            'two': dict(model=dict(latent2=40)),
            'dynamic': dict(
                data=dict(source='mnist', binarise='dynamic', validation_fraction=1 / 6), model=dict(white=255)
            ),
            'omniglot': dict(
                data=dict(
                    source='mat:chardata.mat?image=data&layout=(WH)N&range=0,1',
                    binarise='dynamic',
                    validation_fraction=1345 / 24_345,
                ),
                model=dict(white=255, **omniglot['model']),
                train=dict(log_every=230, **omniglot['train']),
            ),
            'caltech': dict(
                data=dict(source='mat:caltech101_silhouettes_28_split1.mat?layout=N(WH)&range=1,0'),
                model=dict(white=255, pseudo_mean=0.8, **caltech['model']),
                train=dict(updates_per_call=1, log_every=41, **caltech['train']),
            ),
            'tiny': dict(
                data=dict(source='digits'),
                model=dict(hidden=(16,), latent=4, pseudo_inputs=5, white=255, beta_warmup=2, iwae_samples=3),
            ),
        },
    )
