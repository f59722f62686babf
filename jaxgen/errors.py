"""Errors that main turns into one line on stderr and an exit code."""


class UserError(Exception):
    """A person's mistake. The message is one line that says what to do. Exit code 2."""


class RunError(Exception):
    """A fault that stopped a run: not a number, no readable checkpoint, a full disk. Exit code 1."""
