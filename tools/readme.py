"""Bring the table of pages in nbs/index.ipynb up to date, then write README.md as the Markdown of that notebook, and
its pictures to nbs/images; with --check only say whether all are up to date."""
import base64
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbformat.v4 import new_markdown_cell

from .site.notebooks import DECADES, annotated, title_of

root = Path(__file__).resolve().parents[1]
INDEX = root/'nbs/index.ipynb'
TABLE = '| page | module | what it is about |\n|---|---|---|\n'  # a cell of the index that is made from the pages


def directives(cell): return [l for l in cell.source.splitlines() if l.startswith('#|')]


def picture(cell, alt, files):
    "A cell that only shows a picture becomes a link to its file, which `files` keeps"
    path = f'images/readme-{len(files) + 1}.png'
    files[root/'nbs'/path] = base64.b64decode(cell.outputs[0].data['image/png'])
    return new_markdown_cell(f'![{alt}]({path})')


def pages_table():
    "The pages of the library in the order of their numbers, from their own titles"
    text, part = TABLE, None
    for path in sorted((root/'nbs').glob('[0-9][0-9]_*.ipynb')):
        title, subtitle = title_of(nbformat.read(path, 4))
        if part != (part := DECADES[int(path.stem[0])]): text += f'| **{part}** | | |\n'
        text += f'| [{title}]({path.name}) | `{path.stem[3:]}` | {subtitle} |\n'
    return text.strip()


def read_index():
    "The index with its table of pages as it should be, and whether it was so"
    nb = nbformat.read(INDEX, 4)
    cell = next(c for c in nb.cells if c.source.startswith(TABLE))
    was, cell.source = cell.source, pages_table()
    return nb, was == cell.source


def readme(nb):
    "(text, {path: content} of the pictures)"
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
    note = '<!-- made from nbs/index.ipynb by tools/readme.py: edit there -->\n\n'
    return note + text.strip() + '\n', files


def main():
    nb, is_current = read_index()
    if '--check' not in sys.argv and not is_current: nbformat.write(nb, INDEX)
    text, files = readme(nb)
    files[root/'README.md'] = text.encode()
    if '--check' not in sys.argv:
        for path, content in files.items():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        return
    wrong = [p.name for p, content in files.items() if not p.is_file() or p.read_bytes() != content]
    if wrong or not is_current: sys.exit(f'{", ".join(wrong or [INDEX.name])} is not up to date: run make prepare')


if __name__ == '__main__': main()
