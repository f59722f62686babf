"""Prompts with weights of their words, in the syntax of AUTOMATIC1111's web UI:

    (word)        weight 1.1          ((word))   1.1^2
    (word:1.3)    weight 1.3          [word]     1 / 1.1
    \\( \\) \\[ \\] \\\\   the character itself

Weights inside of others are multiplied; what is opened and not closed goes to the end of the text.
"""

from __future__ import annotations

import re

import numpy as np

UP, DOWN = 1.1, 1 / 1.1
PIECES = re.compile(r'\\[\\()\[\]]|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[()\[\]]|[^\\()\[\]:]+|.', re.DOTALL)


def parsed(text: str) -> tuple[str, np.ndarray]:
    """A text without its marks, and the weight of each of its characters, float32."""
    plain: list[str] = []
    weights = np.ones(len(text), np.float64)
    opened: dict[str, list[int]] = {'(': [], '[': []}  # where the texts of brackets begin
    n = 0

    def weigh(start: int, factor: float) -> None:
        weights[start:n] *= factor

    for piece in PIECES.finditer(text):
        part, number = piece.group(), piece.group(1)
        if part in ('(', '['):
            opened[part].append(n)
            continue
        if part == ')' and opened['(']:
            weigh(opened['('].pop(), UP)
            continue
        if part == ']' and opened['[']:
            weigh(opened['['].pop(), DOWN)
            continue
        if number and opened['(']:
            weigh(opened['('].pop(), float(number))
            continue
        part = part[1:] if len(part) == 2 and part[0] == '\\' else part
        plain.append(part)
        n += len(part)
    for bracket, factor in (('(', UP), ('[', DOWN)):
        for start in opened[bracket]:
            weigh(start, factor)
    return ''.join(plain), weights[:n].astype(np.float32)
