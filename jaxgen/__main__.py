"""The command by its other names: jaxgen, python -m jaxgen. See main.py."""

from __future__ import annotations

import sys

from jaxgen import arguments, interrupt


def command() -> int:
    """Runs the command; the exit code."""
    arguments.check_platform()
    interrupt.install()  # before jax is imported, which takes a second and has threads of its own
    arguments.begin(sys.argv)
    from jaxgen import main

    return main.command()


if __name__ == '__main__':
    sys.exit(command())
