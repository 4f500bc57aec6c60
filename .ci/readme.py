"""Write README.md as the Markdown of nbs/index.ipynb, and its pictures to nbs/images; with --check only say whether
they are up to date."""
import base64
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbformat.v4 import new_markdown_cell

from pages.notebooks import annotated

root = Path(__file__).resolve().parents[1]


def directives(cell): return [l for l in cell.source.splitlines() if l.startswith('#|')]


def picture(cell, alt, files):
    "A cell that only shows a picture becomes a link to its file, which `files` keeps"
    path = f'images/readme-{len(files) + 1}.png'
    files[root/'nbs'/path] = base64.b64decode(cell.outputs[0].data['image/png'])
    return new_markdown_cell(f'![{alt}]({path})')


def readme():
    "(text, {path: content} of the pictures)"
    nb = nbformat.read(root/'nbs/index.ipynb', 4)
    nb.cells = [c for c in nb.cells if '#| hide' not in directives(c)]
    files, cells = {}, []
    for c, _, alt in annotated(nb):
        cells.append(picture(c, alt, files) if '#| echo: false' in directives(c) else c)
        c.source = '\n'.join(l for l in c.source.splitlines() if not l.startswith('#|'))
        for o in c.get('outputs', []):  # a table as text, since GitHub shows no styled HTML
            if 'data' in o: o.data = {'text/plain': o.data['text/plain']}
    nb.cells = cells
    nb.metadata['language_info'] = {'name': 'python'}
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r'\]\((?!http|\.\.)', '](nbs/', text).replace('](../', '](')  # README.md lies one folder higher
    text = re.sub(r'\n{3,}', '\n\n', text)
    note = '<!-- made from nbs/index.ipynb by .ci/readme.py: edit there -->\n\n'
    return note + text.strip() + '\n', files


if __name__ == '__main__':
    text, files = readme()
    files[root/'README.md'] = text.encode()
    if '--check' not in sys.argv:
        for path, content in files.items():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
    elif wrong := [p.name for p, content in files.items() if not p.is_file() or p.read_bytes() != content]:
        sys.exit(f'{", ".join(wrong)} is not what nbs/index.ipynb generates: run make prepare')
