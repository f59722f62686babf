"""Checks of a config that several families make."""

from __future__ import annotations

import pytest

from jaxgen import checks
from jaxgen.contract import Context
from jaxgen.errors import UserError


def test_size():
    for image in ((8, 16, 3), (8, 8, 1), (16, 4, 1)):
        checks.check_size(image, 4, 'config.model.levels = 2')
    message = r'config\.data\.size = (\d+|\(\d+, \d+\)) must be a multiple of 4 for config\.model\.levels = 2$'
    for image in ((6, 8, 3), (8, 6, 3), (2, 2, 1)):
        with pytest.raises(UserError, match=message):
            checks.check_size(image, 4, 'config.model.levels = 2')


def test_labels():
    unlabelled, labelled = (Context((4, 4, 1), classes, optim=None) for classes in (0, 10))
    checks.check_labels(labelled, True)
    checks.check_labels(unlabelled, False)
    with pytest.raises(UserError, match=r'config\.model\.conditional needs labels'):
        checks.check_labels(unlabelled, True)


def test_parts():
    checks.check_parts(12, 3, 'config.optim.accumulate = 3')
    with pytest.raises(UserError, match=r'batch = 12 must be a multiple of 5: config\.optim\.accumulate = 5 makes 5'):
        checks.check_parts(12, 5, 'config.optim.accumulate = 5')
