"""Fields of runs that were saved before there were sections: each finds its section, by hand."""

from __future__ import annotations

import re

import pytest

from jaxgen import config as configs
from jaxgen import options
from jaxgen.errors import UserError
from jaxgen.families import consistency, ddgan, noisy_classifier, vdm

# What such a run's network had beside its own: the fields of the networks that it did not take.
OTHERS = {'adm': {'channels': 192}, 'ncsnpp': {'channels': 128}, 'dit': {'channels': 1152}}
CONSISTENCY = dict(
    OTHERS, network='unet', unet={'channels': 32, 'attention': [4]}, conditional=True, sigma_min=0.01, sigma_max=50.0,
    data_std=0.4, discretisation='doubling', start_scales=None, end_scales=8, total_steps=40, times='lognormal',
    time_mean=-1.0, time_std=1.5, distance='pseudo_huber', huber=0.01, lpips=[], weighting='none', target_decay=0.0,
    adapt_decay=False, solver='euler', init_from_teacher=False, sample_steps=3, levels=[], clip=False,
)  # fmt: skip


def sections(family, model: dict) -> dict:
    """The complete sections of a former model."""
    return options.complete(family.build, family.former(model), 'model')


def test_consistency():
    new = sections(consistency, CONSISTENCY)
    network = new.pop('network')
    assert (network['name'], network['channels'], network['attention']) == ('unet', 32, (4,))
    assert new == dict(
        conditioning={'label': {'kind': 'class', 'dropout': 0.0}}, sigma_min=0.01, sigma_max=50.0, data_std=0.4,
        # Where start_scales was None it was the paper's 10, or end_scales if that was less.
        discretisation={'name': 'doubling', 'start_scales': 8, 'end_scales': 8, 'total_steps': 40},
        times={'name': 'lognormal', 'mean': -1.0, 'std': 1.5}, distance={'name': 'pseudo_huber', 'huber': 0.01},
        weighting='none', target={'name': 'weights'}, teacher={'solver': 'euler', 'initialise': False},
        sampler={'steps': 3, 'levels': (), 'clip': False},
    )  # fmt: skip


@pytest.mark.parametrize(
    ('former', 'section', 'expected'),
    [
        (
            {'discretisation': 'sqrt', 'end_scales': None}, 'discretisation',
            {'name': 'sqrt', 'start_scales': 2, 'end_scales': 150, 'total_steps': 40},
        ),
        (
            {'discretisation': 'constant', 'start_scales': 10, 'end_scales': 17}, 'discretisation',
            {'name': 'constant', 'end_scales': 17},
        ),
        ({'times': 'uniform'}, 'times', {'name': 'uniform'}),
        ({'distance': 'l1'}, 'distance', {'name': 'l1'}),
        ({'distance': 'perceptual', 'lpips': ['a']}, 'distance', {'name': 'perceptual', 'lpips': ('a',)}),
        (
            {'target_decay': 0.9, 'adapt_decay': True}, 'target',
            {'name': 'average', 'decay': 0.9, 'adaptive': True},
        ),
        # mu was 0.9^(10 / 20) at every update: N does not change.
        (
            {'target_decay': 0.81, 'adapt_decay': True, 'discretisation': 'constant', 'start_scales': 10,
             'end_scales': 20}, 'target', {'name': 'average', 'decay': pytest.approx(0.9), 'adaptive': False},
        ),
    ],
)  # fmt: skip
def test_consistency_by_choice(former, section, expected):
    assert sections(consistency, CONSISTENCY | former)[section] == expected


def test_noisy_classifier():
    network = dict(channels=32, multipliers=[1, 2], blocks=1, attention=[4], heads=1, head_channels=16)
    flat = dict(
        adm=network, process='cosine', timesteps=20, beta_start=1e-4, beta_end=0.02, sigma_min=None, sigma_max=None
    )
    new = sections(noisy_classifier, flat)
    assert new['process'] == dict(name='cosine', timesteps=20, zero_terminal=False, rescale_timesteps=False)
    assert (new['network']['head_channels'], new['network']['multipliers']) == (16, (1.0, 2.0))
    assert 'heads' not in new['network']
    exploding = sections(noisy_classifier, flat | dict(process='ve', sigma_min=0.1))['process']
    assert exploding == dict(name='ve', sigma_min=0.1, sigma_max=None)


@pytest.mark.parametrize('kind', ['scalar', 'network'])
def test_vdm(kind):
    network = dict(channels=8, blocks=2, fourier=[3], attention=True, dropout=0.2, groups=4, group_size=0, eps=1e-5)
    flat = dict(conditional=False, schedule=kind, gamma_min=-9.0, gamma_max=4.0, schedule_loss='bound', timesteps=5)
    new = sections(vdm, dict(network, **flat, sample_steps=7, bound_times=3))
    learned = {'loss': 'bound'} if kind == 'network' else {}
    assert new == dict(
        network=dict(network, fourier=(3,)), conditioning={},
        schedule={'name': kind, 'gamma_min': -9.0, 'gamma_max': 4.0, **learned},
        timesteps=5, sampler={'steps': 7}, likelihood={'times': 3}, augmentation='none',
    )  # fmt: skip


def test_ddgan():
    generator = dict(latent=3, style=4, mapping_layers=1, channels=8, multipliers=[1], blocks=1, attention=[])
    generator |= dict(resampling='box', pyramid='none', dropout=0.1)
    discriminator = dict(channels=6, multipliers=[1, 2], full=0, embedding=4)
    process = dict(timesteps=2, beta_min=0.2, beta_max=9.0)
    flat = {f'discriminator_{k}': v for k, v in discriminator.items()}
    assert sections(ddgan, dict(generator, **process, **flat, r1=0.3, r1_every=4)) == dict(
        process=process, generator=dict(generator, multipliers=(1,), attention=()),
        discriminator=dict(discriminator, multipliers=(1, 2), group=4), r1=0.3, r1_every=4,
    )  # fmt: skip


@pytest.mark.parametrize('family', [consistency, noisy_classifier, vdm, ddgan], ids=lambda f: f.__name__)
def test_sections_stay_as_they_are(family):
    model = options.complete(family.build, {}, 'model')
    assert family.former(model) == model


@pytest.mark.parametrize('name', ['diffusion', 'consistency', 'vdm', 'ddgan', 'noisy_classifier'])
def test_former_fields_by_hand_are_refused_with_their_present_place(name):
    """No such field is a present one, and the section that each points to is there."""
    known, moved = options.fields(configs.builder(name)), configs.module(name).MOVED
    assert not moved.keys() & known.keys() and {new.partition('.')[0] for new in moved.values()} <= known.keys()
    for old, new in moved.items():
        with pytest.raises(UserError, match=re.escape(f'config.model.{old} is now config.model.{new}')):
            configs.complete({'family': name, 'model': {old: 3}})
