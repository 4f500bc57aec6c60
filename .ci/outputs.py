"""Run notebooks from top to bottom and store what they show: python .ci/outputs.py [NOTEBOOK ...], by default all in nbs/.

A cell with the flag `cuda` is passed over where there is no GPU. Everything else runs, whatever its flags.
"""
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from torch import cuda

root = Path(__file__).resolve().parents[1]


class Client(NotebookClient):
    async def async_execute_cell(self, cell, *args, **kwargs):
        if '#| cuda' in cell.source.splitlines() and not cuda.is_available():
            cell.outputs = []
            return cell
        return await super().async_execute_cell(cell, *args, **kwargs)


pages = [p for p in sorted(root.glob('nbs/**/*.ipynb')) if '.ipynb_checkpoints' not in p.parts]
for path in map(Path, sys.argv[1:] or pages):
    print(path.name, flush=True)
    nb = nbformat.read(path, 4)
    Client(nb, timeout=None, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}}).execute()
    nbformat.write(nb, path)
