"""VQ-VAE on CIFAR-10 with the sizes of its authors' example in Sonnet: 8x8 codes out of 512.

    python -m jaxgen.main --config=configs/vqvae_cifar10.py
    python -m jaxgen.main --config=configs/vqvae_cifar10.py:loss    # the codebook learned by the loss, as in the paper

662,723 weights, and a codebook of 32,768 numbers, which follows moving averages; with `:loss` it is a network too.
The example's images lie in [-0.5, 0.5], ours in [-1, 1]: `variance` is that of the data, so that the errors agree.

Differs: the example trains 10,000 updates.

Time: not measured
Paper: 4.67 bits per dimension, by a network of 256 channels (van den Oord et al. 2017, section 4.1)
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='vqvae',
        data=dict(source='cifar10', size=32, channels=3, batch=32),
        model=dict(debiased=True, variance=0.253),
        optim=dict(lr=3e-4, ema=0.0),
        train=dict(steps=100_000, log_every=100, save_every=5000, sample_every=20_000),
        variants={
            'tiny': dict(data=dict(source='shapes'), model=dict(width=8, blocks=1, hidden=4, vocabulary=8, latent=4)),
            'loss': dict(model=dict(codebook='loss', debiased=False)),
        },
    )
