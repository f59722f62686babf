"""Sections `data` that a person writes for the loader alone, {'source': 'digits', 'batch': 4}: the rest is defaults."""

from __future__ import annotations

import functools
from collections.abc import Callable

from jaxgen import config as configs
from jaxgen import options
from jaxgen.errors import UserError
from jaxgen.sections import Data


def completed(data):
    """The section with the defaults of the fields that it lacks, checked; as it is where it lacks none.

    Raises:
      UserError: it has an unknown field, or a value that one does not take.
    """
    if not hasattr(data, 'keys'):
        raise UserError(f"a section of fields is needed, {{'source': 'digits'}}; it is {options.shown(data)}")
    if options.fields(Data).keys() == set(data.keys()):
        return data
    return configs.data_section(data.to_dict() if hasattr(data, 'to_dict') else data)


def completes(function: Callable) -> Callable:
    """The function, whose first argument is then `completed`."""

    @functools.wraps(function)
    def call(data, *args, **options):
        return function(completed(data), *args, **options)

    return call
