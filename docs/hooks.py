"""Equations as MathML when the site is built: browsers show it without scripts or network."""

import html
import re

from latex2mathml.converter import convert

MATH = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\(?P<open>[(\[])(?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)


def on_page_content(content: str, **_) -> str:
    def mathml(match: re.Match) -> str:
        inline = match['open'] == '('
        return convert(html.unescape(match['tex']).strip(), display='inline' if inline else 'block')

    return MATH.sub(mathml, content)
