"""Diffusion, written once. Read in this order: processes, parameterisations, samplers, guidance, likelihood.

Everywhere x_t = alpha_t x_0 + sigma_t eps with eps from N(0, I), and a model is one callable

    denoise(x, t) -> estimate of x_0

with x [n, ...] and t a scalar or [n]. Samplers and bounds know nothing else of the model: what its
network predicts, clipping, labels and guidance are inside the callable. `families/diffusion.py` puts
the parts together.
"""
