"""Run notebooks from top to bottom and store what they show: python -m tools.outputs [NOTEBOOK ...]; by default all.

A cell with the flag `net`, which downloads, is passed over, and one with `cuda` where there is no GPU. Everything else
runs, whatever its flags; the tutorials take their images from $RESNET_DATA, if it is set. Large pictures are stored in
256 colours, so that a notebook stays below 1 MB. A tutorial runs in an empty folder, as in Colab; the figures that it
saves there go to nbs/results. The results that a page shows are noted in its metadata. Printed are the minutes that
each notebook took, and its three slowest cells.
"""
import base64
import io
import os
import shutil
import sys
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import nbformat
from nbclient import NotebookClient
from PIL import Image
from resnet_nbdev.results import results_used
from torch import cuda

root = Path(__file__).resolve().parents[1]


class Client(NotebookClient):
    async def async_execute_cell(self, cell, *args, **kwargs):
        flags = cell.source.splitlines()
        if '#| net' in flags or '#| cuda' in flags and not cuda.is_available():
            cell.outputs = []
            return cell
        return await super().async_execute_cell(cell, *args, **kwargs)


def smaller(png):
    "A PNG in base64 with at most 256 colours, if it is a large one"
    if len(png) < 150_000: return png
    to = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert('RGB').quantize(256).save(to, 'png', optimize=True)
    return base64.b64encode(to.getvalue()).decode()


def seconds(cell):
    "How long a cell ran; its times are taken out of its metadata, which then says nothing of the day"
    times = [datetime.fromisoformat(t.replace('Z', '+00:00')) for t in cell.metadata.pop('execution', {}).values()]
    return (max(times) - min(times)).total_seconds() if times else 0


def run(path):
    print(path.name, end='', flush=True)
    start = perf_counter()
    nb = nbformat.read(path, 4)
    with TemporaryDirectory() as empty:
        cwd = empty if path.parent.name == 'tutorials' else str(path.parent)
        Client(nb, timeout=None, kernel_name='python3', resources={'metadata': {'path': cwd}}).execute()
        for o in Path(empty).glob('*.json'): shutil.copy(o, root/'nbs'/'results')
    slow = sorted(((seconds(c), c.source) for c in nb.cells), reverse=True)[:3]
    print(f': {(perf_counter() - start) / 60:.1f} minutes')
    for t, source in slow: print(f'{t:8.1f} s  {source.splitlines()[-1][:80] if source else ""}', flush=True)
    nb.metadata['results'] = results_used(c.source for c in nb.cells if c.cell_type == 'code')
    for o in [o for c in nb.cells for o in c.get('outputs', []) if 'image/png' in o.get('data', {})]:
        o.data['image/png'] = smaller(o.data['image/png'])
    nbformat.write(nb, path)


if __name__ == '__main__':
    os.environ['PYTHONWARNINGS'] = 'ignore:IProgress not found'  # tqdm's wish for ipywidgets
    pages = [p for p in sorted(root.glob('nbs/**/*.ipynb')) if '.ipynb_checkpoints' not in p.parts]
    for path in map(Path, sys.argv[1:] or pages): run(path)
