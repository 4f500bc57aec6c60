"Write README.md as the Markdown of nbs/index.ipynb; with --check only say whether it is up to date."
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parents[1]


def readme():
    nb = nbformat.read(root/'nbs/index.ipynb', 4)
    directives = lambda c: [l for l in c.source.splitlines() if l.startswith('#|')]
    nb.cells = [c for c in nb.cells if '#| hide' not in directives(c)]
    for c in nb.cells:
        c.source = '\n'.join(l for l in c.source.splitlines() if not l.startswith('#|'))
        for o in c.get('outputs', []):  # a table as text, since GitHub shows no styled HTML
            if 'data' in o: o.data = {'text/plain': o.data['text/plain']}
    nb.metadata['language_info'] = {'name': 'python'}
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r'\]\((?!http|\.\.)', '](nbs/', text).replace('](../', '](')  # README.md lies one folder higher
    text = re.sub(r'\n{3,}', '\n\n', text)
    note = '<!-- made from nbs/index.ipynb by .ci/readme.py: edit there -->\n\n'
    return note + text.strip() + '\n'


if __name__ == '__main__':
    path = root/'README.md'
    if '--check' not in sys.argv: path.write_text(readme(), encoding='utf-8')
    elif path.read_text(encoding='utf-8') != readme():
        sys.exit('README.md is not what nbs/index.ipynb generates: run make prepare')
