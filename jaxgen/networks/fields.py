"""Constraints that attributes of several networks share, see `jaxgen.options`."""

from __future__ import annotations

from typing import Annotated

from jaxgen.options import Range, Rule

# Features of the first level: half of them embed the time by sines and half by cosines.
Channels = Annotated[int, Range('[4, inf)'), Rule(lambda c: c % 2 == 0, 'even')]
Multipliers = Annotated[tuple[int, ...], Range('(0, inf)'), Rule(bool, 'one or more numbers')]
RealMultipliers = Annotated[tuple[float, ...], Range('(0, inf)'), Rule(bool, 'one or more numbers')]
GroupSize = Annotated[int, Range('[0, inf)')]
