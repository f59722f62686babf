"""Results of the code of GANs, autoregressive and score models on weights of a fixed rule, for generators_test.py.

    PYTHONPATH=tests python tests/weights/make_generators.py CASE PATH

runs one case of CASES by the clone of its repository in PATH and writes tests/weights/generators/CASE.npz. It needs
torch on a CPU, and what the repository imports; modules that it imports and that nothing here runs are left empty. The
weights follow from their names and shapes, and the noise from names, see tests/reference_weights.py.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import reference_weights as weights
import torch
import torch.utils.cpp_extension

torch.utils.cpp_extension.load = lambda *args, **kwargs: None  # kernels of GPUs, not used


def stub(*names: str, **contents: Any) -> None:
    """Puts empty modules of these names in the place of ones that are not there."""
    for name in names:
        module = types.ModuleType(name)
        module.__dict__.update(contents)
        module.__getattr__ = lambda attribute: None
        module.__path__ = []
        sys.modules[name] = module


def fill(module: torch.nn.Module, prefix: str = '', rules: Sequence[weights.Rule] = ()) -> dict[str, list[int]]:
    """Gives a module the weights of the rule; returns the shapes of its state dict under `prefix`, its integers left
    out."""
    state = {name: tensor for name, tensor in module.state_dict().items() if tensor.is_floating_point()}
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(torch.from_numpy(np.array(weights.tensor(prefix + name, tuple(tensor.shape), rules))))
    module.eval()
    return {prefix + name: list(tensor.shape) for name, tensor in state.items()}


@contextlib.contextmanager
def given(owner: Any, name: str, values: Callable[..., torch.Tensor]) -> Iterator[None]:
    """`owner.name` is `values` within the block: noise that is given, in place of random one."""
    before = getattr(owner, name)
    setattr(owner, name, values)
    try:
        yield
    finally:
        setattr(owner, name, before)


def in_turn(key: str, last: bool = False) -> Callable[..., torch.Tensor]:
    """A function of the shape, or of a tensor of that shape, that returns noise 'KEY 0', 'KEY 1', ..., [n, H, W, C]
    moved to [n, C, H, W]."""
    count = iter(range(10**6))

    def draw(*shape: Any, **kwargs: Any) -> torch.Tensor:
        shape = tuple(shape[0].shape) if isinstance(shape[0], torch.Tensor) else tuple(shape)
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return to_torch(weights.noise(f'{key} {next(count)}', moved(shape)))

    return draw


def moved(shape: Sequence[int]) -> tuple[int, ...]:
    """[n, C, H, W] as [n, H, W, C]; other shapes as they are."""
    return (shape[0], *shape[2:], shape[1]) if len(shape) == 4 else tuple(shape)


def to_torch(x: np.ndarray) -> torch.Tensor:
    """[n, H, W, C] to [n, C, H, W]; other arrays as they are."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1) if x.ndim == 4 else x))


def to_numpy(x: torch.Tensor) -> np.ndarray:
    """float32 [n, H, W, C] of [n, C, H, W]; other arrays as they are."""
    y = x.detach().numpy()
    y = np.moveaxis(y, 1, -1) if y.ndim == 4 else y
    return np.ascontiguousarray(y.astype(np.float32) if y.dtype.kind == 'f' else y)


def thin(x: torch.Tensor, rows: int = 8) -> np.ndarray:
    """The first two images, every so many pixels that this number of rows is left: a wrong image shows in these too."""
    y = to_numpy(x[:2])
    step = y.shape[1] // rows
    return np.ascontiguousarray(y[:, step // 2 :: step, ::step])


def draws_by_gumbel(key: str, drawn: list | None = None) -> Callable[..., torch.Tensor]:
    """In place of torch.multinomial(probabilities [n, V], 1): the largest of log p + Gumbel noise 'KEY 0', ...

    drawn: gets the draws [n], one after another.
    """
    count = iter(range(10**6))

    def draw(probabilities: torch.Tensor, num_samples: int, **kwargs: Any) -> torch.Tensor:
        noise = weights.gumbel(f'{key} {next(count)}', tuple(probabilities.shape))
        codes = (probabilities.log() + torch.from_numpy(noise)).argmax(-1, keepdim=True)
        if drawn is not None:
            drawn.append(codes[:, 0])
        return codes

    return draw


def filtered(logits: torch.Tensor, top_k: int = 0, top_p: float | None = None) -> torch.Tensor:
    """What transformers had as top_k_top_p_filtering, for top_k alone: logits below the k-th are -inf."""
    assert top_p is None
    return torch.where(logits < torch.topk(logits, top_k)[0][..., -1:], -torch.inf, logits)


Case = tuple[dict[str, list[int]], Sequence[weights.Rule], dict[str, Any], dict[str, Any]]


# --- taming-transformers


def vqgan_gpt() -> Case:
    """https://github.com/CompVis/taming-transformers: VQGAN with its discriminator, and a GPT over its codes."""
    stub('transformers', top_k_top_p_filtering=filtered)
    stub('pytorch_lightning', LightningModule=torch.nn.Module)
    stub('main', instantiate_from_config=lambda config: config['module'])
    discriminator = importlib.import_module('taming.modules.discriminator.model').NLayerDiscriminator
    mingpt = importlib.import_module('taming.modules.transformer.mingpt')
    loss = torch.nn.Module()
    loss.discriminator = discriminator(3, ndf=8, n_layers=1)
    sizes = dict(
        double_z=False, z_channels=8, resolution=16, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 2],
        num_res_blocks=1, attn_resolutions=[8], dropout=0.0,
    )  # fmt: skip
    model = importlib.import_module('taming.models.vqgan').VQModel(sizes, {'module': loss}, n_embed=32, embed_dim=8)
    gpt = mingpt.GPT(vocab_size=32, block_size=64, n_layer=2, n_head=4, n_embd=32)
    rules = [(r'gpt\.head\.weight', 0.0, 0.5), (r'first\.quantize\.embedding\.weight', 0.0, 0.5)]
    shapes = fill(model, 'first.', rules) | fill(gpt, 'gpt.', rules)
    start, arrays = torch.tensor([[3], [5]]), {}
    images = to_torch(np.tanh(weights.noise('images', (2, 16, 16, 3))))

    def draw(name: str, **settings: Any) -> None:
        with torch.no_grad(), given(torch, 'multinomial', draws_by_gumbel(name)):
            codes = mingpt.sample_with_past(start, gpt, 64, **settings)
            z = model.quantize.get_codebook_entry(codes.reshape(-1), (2, 8, 8, 8))
            arrays.update({f'{name}_codes': codes.numpy().astype(np.int16), f'{name}_images': thin(model.decode(z))})

    draw('greedy', sample_logits=False)
    draw('uniform')
    draw('top_k', temperature=0.8, top_k=5)
    with torch.no_grad():
        codes = model.encode(images)[2][2].reshape(2, 8, 8)
        arrays |= {
            'codes': codes.numpy().astype(np.int16),
            'discriminator': to_numpy(loss.discriminator(images))[..., 0],
        }
    return shapes, rules, arrays, {'labels': [3, 5]}


# --- VAR


def var(shared: bool, depth: int) -> Case:
    """https://github.com/FoundationVision/VAR: the transformer over four scales of its VQ-VAE."""
    models = importlib.import_module('models')
    patches, vocabulary = (1, 2, 3, 4), 32
    first = models.VQVAE(
        vocab_size=vocabulary, z_channels=8, ch=32, test_mode=True, share_quant_resi=4, v_patch_nums=patches
    )
    prior = models.VAR(
        first, num_classes=8, depth=depth, embed_dim=64, num_heads=4, shared_aln=shared, patch_nums=patches,
        attn_l2_norm=not shared, flash_if_available=False, fused_if_available=False,
    )  # fmt: skip
    rules = [
        (r'prior\.head\.weight', 0.0, 0.5),
        (r'prior\..*scale_mul_1H11', 1.4, 0.2),
        (r'prior\..*zero_k_bias', 0.0, 0.0),
        (r'first\.quantize\.embedding\.weight', 0.0, 0.5),
    ]
    shapes = fill(first, 'first.', rules) | fill(prior, 'prior.', rules)
    labels, arrays = torch.tensor([2, 5]), {}
    for name, settings in {
        'greedy': dict(cfg=1.5, top_k=1),
        'guided': dict(cfg=2.0),
        'truncated': dict(cfg=1.0, top_k=20, top_p=0.9),
    }.items():
        codes: list[torch.Tensor] = []
        with torch.no_grad(), given(torch, 'multinomial', draws_by_gumbel(name, codes)):
            image = prior.autoregressive_infer_cfg(2, labels, **settings)
            arrays[f'{name}_codes'] = torch.cat([x.reshape(2, -1) for x in codes], 1).numpy().astype(np.int16)
            arrays[f'{name}_images'] = thin(image * 2 - 1, 16)
    return shapes, rules, arrays, {'labels': labels.tolist()}


# --- StyleGAN2


def stylegan2(classes: int, generator: str, discriminator: str, mapping_layers: int, clamp: float | None) -> Case:
    """https://github.com/NVlabs/stylegan2-ada-pytorch: both networks, images of 16 pixels."""
    networks = importlib.import_module('training.networks')
    widths = dict(channel_base=128, channel_max=24, conv_clamp=clamp)
    g = networks.Generator(
        z_dim=16, c_dim=classes, w_dim=16, img_resolution=16, img_channels=3,
        mapping_kwargs=dict(num_layers=mapping_layers), synthesis_kwargs=dict(**widths, architecture=generator),
    )  # fmt: skip
    d = networks.Discriminator(
        c_dim=classes, img_resolution=16, img_channels=3, architecture=discriminator, **widths
    )  # fmt: skip
    rules = [
        (r'.*mapping\.fc\d+\.weight', 0.0, 100.0),
        (r'.*mapping\.fc\d+\.bias', 0.0, 20.0),
        (r'.*\.affine\.bias', 1.0, 0.2),
        (r'.*(w_avg|noise_strength|bias)', 0.0, 0.2),
        (r'.*(weight|const)', 0.0, 1.0),
    ]
    filters = {n: b.clone() for m in (g, d) for n, b in m.named_buffers() if n.endswith('resample_filter')}
    shapes = fill(g, 'G_ema.', rules) | fill(d, 'D.', rules)
    for module in (g, d):
        for name, buffer in module.named_buffers():
            if name in filters:
                buffer.copy_(filters[name])
    shapes = {name: shape for name, shape in shapes.items() if not name.endswith('resample_filter')}
    z = torch.from_numpy(weights.noise('z', (4, 16)))
    labels = [1, 0, 3, 2]
    c = torch.nn.functional.one_hot(torch.tensor(labels), classes).float() if classes else torch.zeros(4, 0)
    with torch.no_grad():
        arrays = {
            'constant': thin(g(z, c, truncation_psi=0.7, noise_mode='const')),
            'untruncated': thin(g(z, c, noise_mode='const')),
        }
        with given(torch, 'randn', in_turn('layer')):
            arrays['random'] = thin(g(z, c, truncation_psi=0.5, noise_mode='random'))
        images = to_torch(np.tanh(weights.noise('images', (4, 16, 16, 3))))
        arrays['discriminator'] = to_numpy(d(images, c))[:, 0]
    return shapes, rules, arrays, {'labels': labels}


# --- BigGAN


def biggan(resolution: int, width: int, attention: str) -> Case:
    """https://github.com/ajbrock/BigGAN-PyTorch: both networks in evaluation, by stored statistics."""
    stub('torchvision', 'torchvision.datasets', 'torchvision.transforms', 'torchvision.utils', 'h5py')
    networks = importlib.import_module('BigGAN')
    common = dict(resolution=resolution, n_classes=8, skip_init=True)
    latent = 20 * {32: 4, 128: 6}[resolution]
    g = networks.Generator(
        G_ch=width, dim_z=latent, G_attn=attention, G_shared=True, shared_dim=8, hier=True, cross_replica=False,
        mybn=False, norm_style='bn', **common,
    )  # fmt: skip
    d = networks.Discriminator(D_ch=width, D_attn=attention, **common)
    rules = [
        (r'D\.embed\.(weight|u0)', 1.0, 0.1),  # one singular value above all others, and nearly its vector
        (r'.*\.gamma', 0.8, 0.2),
        (r'.*\.[bg].*\.(gain|bias)\.weight', 0.0, 0.15),
    ]
    shapes = fill(g, 'G_ema.', rules) | fill(d, 'D.', rules)
    labels = torch.tensor([1, 6])
    z = torch.from_numpy(np.clip(weights.noise('z', (2, latent)), -0.8, 0.8))
    images = to_torch(np.tanh(weights.noise('images', (2, resolution, resolution, 3))))
    with torch.no_grad():
        arrays = {'images': thin(g(z, g.shared(labels))), 'discriminator': to_numpy(d(images, labels))[:, 0]}
    return shapes, rules, arrays, {'labels': labels.tolist()}


# --- denoising diffusion GANs


def ddgan() -> Case:
    """https://github.com/NVlabs/denoising-diffusion-gan: four steps from given noise, and its discriminator."""
    stub('torchvision', 'pytorch_fid', 'pytorch_fid.fid_score')
    generator = importlib.import_module('score_sde.models.ncsnpp_generator_adagn').NCSNpp
    discriminator = importlib.import_module('score_sde.models.discriminator').Discriminator_small
    program = importlib.import_module('test_ddgan')
    settings = types.SimpleNamespace(
        num_channels_dae=32, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=(8,), dropout=0.0,
        resamp_with_conv=True, image_size=16, conditional=True, fir=True, fir_kernel=[1, 3, 3, 1], skip_rescale=True,
        resblock_type='biggan', progressive='none', progressive_input='residual', progressive_combine='sum',
        embedding_type='positional', num_channels=3, nz=20, n_mlp=2, z_emb_dim=32, fourier_scale=16.0,
        not_use_tanh=False, centered=True, num_timesteps=4, beta_min=0.1, beta_max=20.0, use_geometric=False,
    )  # fmt: skip
    g = generator(settings)
    d = discriminator(nc=6, ngf=8, t_emb_dim=16, act=torch.nn.LeakyReLU(0.2))
    shapes = fill(g, 'netG_dict.module.') | fill(d, 'netD_dict.module.')
    x, start = (to_torch(weights.noise(name, (4, 16, 16, 3))) for name in ('x_s', 'start'))
    steps = torch.tensor([0, 3, 1, 2])
    with torch.no_grad():
        arrays = {'discriminator': to_numpy(d(x, steps, start))[:, 0]}
        coefficients = program.Posterior_Coefficients(settings, 'cpu')
        with given(torch, 'randn', in_turn('z')), given(torch, 'randn_like', in_turn('step')):
            arrays['images'] = thin(program.sample_from_model(coefficients, g, 4, start[:2], None, settings))
    return shapes, [], arrays, {}


# --- score_sde


def score_sde(kind: str) -> Case:
    """https://github.com/yang-song/score_sde_pytorch: its predictor-corrector (VE) and ODE (VP) from given noise."""
    name = {'ncsnpp': 've.cifar10_ncsnpp_continuous', 'skip': 've.celebahq_256_ncsnpp_continuous'}.get(
        kind, 'vp.ddpm.cifar10_continuous' if kind == 'ddpm' else 'vp.cifar10_ddpmpp_continuous'
    )
    config = importlib.import_module(f'configs.{name}').get_config()
    config.data.image_size = 16
    config.model.nf, config.model.ch_mult, config.model.num_res_blocks = 32, (1, 2), 1
    config.model.attn_resolutions, config.model.num_scales = (8,), 10 if name.startswith('ve') else 1000
    sde_lib, sampling = importlib.import_module('sde_lib'), importlib.import_module('sampling')
    network = importlib.import_module('models.ddpm' if kind == 'ddpm' else 'models.ncsnpp')
    model = (network.DDPM if kind == 'ddpm' else network.NCSNpp)(config)
    shapes = fill(model, '', [])
    shapes = {n: s for n, s in shapes.items() if n != 'sigmas'}
    x = weights.noise('start', (2, 16, 16, 3))
    t = torch.tensor([0.3, 0.9])
    if name.startswith('ve'):
        sde = sde_lib.VESDE(sigma_min=0.01, sigma_max=50.0, N=10)  # of images in [0, 1]
    else:
        sde = sde_lib.VPSDE(0.1, 20.0, 1000)
    score = importlib.import_module('models.utils').get_score_fn(sde, model, continuous=True)
    with torch.no_grad():
        arrays = {'score': thin(score(to_torch(x), t))}
    shape = (1, 3, 16, 16)

    def unit(like: torch.Tensor) -> torch.Tensor:  # as long as the root of its size: the mean length of such noise
        drawn = correction(like)
        return drawn * (drawn.numel() ** 0.5 / drawn.norm())

    correction = in_turn('noise')
    if name.startswith('ve'):
        pc = sampling.get_pc_sampler(
            sde, shape, sampling.ReverseDiffusionPredictor, sampling.LangevinCorrector, lambda x: x, 0.16, 1,
            continuous=True, denoise=True, eps=1e-5, device='cpu',
        )  # fmt: skip
        with given(torch, 'randn', in_turn('start')), given(torch, 'randn_like', unit):
            arrays['images'] = thin(2 * pc(model)[0] - 1)
    else:
        ode = sampling.get_ode_sampler(sde, shape, lambda x: x, rtol=1e-6, atol=1e-6, eps=1e-3, device='cpu')
        z = to_torch(weights.noise('start 0', moved(shape)))
        arrays['images'] = thin(ode(model, z)[0])
    return shapes, [], arrays, {'t': t.tolist()}


# --- the pip package lpips


def lpips() -> Case:
    """https://pypi.org/project/lpips: the distance of two images; PATH is the folder that has the package. VGG-16's
    layers stand in for torchvision's, in its order."""
    widths, layers, before = ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3), [], 3
    for group in widths:
        for width in group:
            layers += [torch.nn.Conv2d(before, width, 3, padding=1), torch.nn.ReLU(inplace=True)]
            before = width
        layers.append(torch.nn.MaxPool2d(2))
    vgg = types.SimpleNamespace(vgg16=lambda pretrained: types.SimpleNamespace(features=torch.nn.Sequential(*layers)))
    stub('torchvision', models=vgg)
    stub('tqdm', tqdm=None)
    stub('skimage', 'skimage.metrics', 'matplotlib', 'matplotlib.pyplot')
    measure = importlib.import_module('lpips').LPIPS(pretrained=False, net='vgg', pnet_rand=True, verbose=False)
    layers_of_depths = list(measure.lins)
    del measure.lins  # a second name of the same layers
    measure.lins = layers_of_depths
    rules = [(r'lin.*\.weight', 0.5, 0.1)]
    shapes = fill(measure, '', rules)
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith('scaling_layer')}
    shift, scale = (getattr(measure.scaling_layer, name) for name in ('shift', 'scale'))
    shift.copy_(torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None])
    scale.copy_(torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])
    x, y = (to_torch(np.tanh(weights.noise(name, (2, 32, 32, 3)))) for name in ('x', 'y'))
    with torch.no_grad():
        return shapes, rules, {'distance': to_numpy(measure(x, y)).reshape(-1)}, {}


CASES: dict[str, Callable[[], Case]] = {
    'vqgan_gpt': vqgan_gpt,
    'var': lambda: var(False, 3),
    'var_shared': lambda: var(True, 1),
    'stylegan2': lambda: stylegan2(0, 'skip', 'resnet', 8, None),
    'stylegan2_classes': lambda: stylegan2(8, 'resnet', 'orig', 2, 1.0),
    'stylegan2_skip': lambda: stylegan2(0, 'orig', 'skip', 3, None),
    'biggan_32': lambda: biggan(32, 4, '0'),
    'biggan_128': lambda: biggan(128, 8, '64'),
    'ddgan': ddgan,
    'ncsnpp': lambda: score_sde('ncsnpp'),
    'ncsnpp_skip': lambda: score_sde('skip'),
    'ddpmpp': lambda: score_sde('ddpmpp'),
    'score_ddpm': lambda: score_sde('ddpm'),
    'lpips': lpips,
}

if __name__ == '__main__':
    case, path = sys.argv[1:]
    sys.path.insert(0, path)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shapes, rules, arrays, about = CASES[case]()
    for key, value in arrays.items():
        print(key, value.shape, value.dtype, f'mean {value.mean():.4f} deviation {value.std():.4f}')
    weights.save(case, shapes, rules, arrays, about)
