"""VAE on stochastically binarised 28x28 MNIST, layers 784-400-20-400-784.

    python -m jaxgen.main --config=configs/vae_mnist.py
    python -m jaxgen.main --config=configs/vae_mnist.py:paper

The network is that of PyTorch's example, with layers of ReLUs; `paper` has Kingma & Welling's, 500 units of tanh.

Differs: the example and the paper take grey levels as probabilities, here they are drawn as bits; the paper's optimiser
is Adagrad with a small weight decay, and its weights start from N(0, 0.01).

Time: not measured
Paper: none with these layers
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='vae',
        data=dict(source='mnist', size=28, channels=1, batch=128),
        model=dict(
            network='mlp', hidden=(400,), latent=20, likelihood='bernoulli', binarise=True, encoder_range='unit'
        ),
        optim=dict(lr=1e-3, ema=0.999, ema_warmup=True),
        train=dict(steps=100_000, updates_per_call=20, log_every=1000, save_every=10_000, sample_every=10_000),
        variants={
            'paper': dict(data=dict(batch=100), model=dict(hidden=(500,), activation='tanh')),
            'tiny': dict(data=dict(source='digits'), model=dict(hidden=(16,), latent=4, iwae_samples=3)),
        },
    )
