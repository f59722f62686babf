"""When the site is built: equations become MathML, which browsers show without scripts or network, and notebooks become
pages, with the outputs stored in them."""

import glob
import html
import json
import os
import re

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

MATH = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\(?P<open>[(\[])(?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)


def on_page_content(content: str, **_) -> str:
    def mathml(match: re.Match) -> str:
        inline = match['open'] == '('
        return convert(html.unescape(match['tex']).strip(), display='inline' if inline else 'block')

    return MATH.sub(mathml, content)


def output_markdown(output: dict) -> str:
    if output['output_type'] == 'stream':
        return f'```text\n{"".join(output["text"]).rstrip()}\n```'
    if 'image/png' in output['data']:
        return f'<img alt="Output of the cell" src="data:image/png;base64,{output["data"]["image/png"]}">'
    return f'```text\n{"".join(output["data"]["text/plain"])}\n```'


def notebook_markdown(path: str) -> str:
    """A notebook as a page: its text, code and stored outputs, in order."""
    with open(path, encoding='utf-8') as file:
        notebook = json.load(file)
    parts = []
    for cell in notebook['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown':
            parts.append(source)
        else:
            parts += [f'```python\n{source}\n```', *map(output_markdown, cell['outputs'])]
    return '\n\n'.join(parts) + '\n'


def on_files(files: Files, config, **_) -> Files:
    for path in sorted(glob.glob(os.path.join(config.docs_dir, 'notebooks', '*.ipynb'))):
        page = os.path.relpath(path, config.docs_dir).removesuffix('.ipynb') + '.md'
        files.append(File.generated(config, page, content=notebook_markdown(path)))
    return files


def on_page_markdown(markdown: str, **_) -> str:
    """Links to notebooks, which lead to the files elsewhere, lead to their pages in the site."""
    return re.sub(r'(\]\([^)\s:]+)\.ipynb\)', r'\1.md)', markdown)
