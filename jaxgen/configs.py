"""The configs that come with jaxgen, as modules: jaxgen.configs.ddpm_digits.

They are the files of the folder configs/, which lies in a clone beside the package, and in an installed package in it.
"""

from __future__ import annotations

import os

_PACKAGE = os.path.dirname(os.path.abspath(__file__))
_INSTALLED = os.path.join(_PACKAGE, 'configs')
FOLDER = _INSTALLED if os.path.isdir(_INSTALLED) else os.path.join(os.path.dirname(_PACKAGE), 'configs')
__path__ = [FOLDER]  # where Python looks for jaxgen.configs.NAME


def files_in(folder: str) -> list[str]:
    """Names of the Python files in a folder, which need not be there."""
    return sorted(f for f in os.listdir(folder) if f.endswith('.py')) if os.path.isdir(folder) else []


def names() -> list[str]:
    """Names of the configs that come with jaxgen."""
    return [file.removesuffix('.py') for file in files_in(FOLDER)]


def file(name: str) -> str:
    """The file of one of them."""
    return os.path.join(FOLDER, f'{name}.py')
