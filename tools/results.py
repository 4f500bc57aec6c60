"Which published figures are current, which are stale, and which pages were made with other ones; always exits with 0."
from pathlib import Path

import nbformat
from resnet_nbdev.results import result_states, results_used, wrong_quotes

root = Path(__file__).resolve().parents[1]


def older_pages():
    "Pages whose stored outputs were made with other values than the files hold now"
    pages = {p: nbformat.read(p, 4) for p in sorted(root.glob('nbs/**/*.ipynb')) if '.ipynb_checkpoints' not in p.parts}
    for path, nb in pages.items():
        used = results_used(c.source for c in nb.cells if c.cell_type == 'code')
        was = nb.metadata.get('results', {})
        if changed := sorted(k for k in used.keys() | was.keys() if used.get(k) != was.get(k)):
            yield path.relative_to(root), changed


def misquoted():
    "Figures in prose that their files do not hold"
    texts = {p: p.read_text(encoding='utf-8') for p in root.glob('*.md')}
    for p in root.glob('nbs/**/*.ipynb'):
        texts[p] = '\n'.join(c.source for c in nbformat.read(p, 4).cells if c.cell_type == 'markdown')
    for path, text in sorted(texts.items()):
        for said in wrong_quotes(text): yield path.relative_to(root), said


if __name__ == '__main__':
    print(result_states().drop(columns='what').to_string())
    for path, names in older_pages(): print(f'{path} was made with other values of {", ".join(names)}: run it again')
    for path, said in misquoted(): print(f'{path}: {said}')
