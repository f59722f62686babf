"""The loop of hourglass networks: layers nest, and each on the way up has its counterpart's input."""

from __future__ import annotations

from jaxgen.networks.hourglass import hourglass


def test_layers_are_nested():
    def result(levels: int) -> str:
        return hourglass(
            'x', levels, lambda i, x: f'd{i}({x})', lambda x: f'm({x})', lambda i, x, skip: f'u{i}({x}, {skip})'
        )

    assert result(0) == 'm(x)'
    assert result(2) == 'u0(u1(m(d1(d0(x))), d0(x)), x)'
