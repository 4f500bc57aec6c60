"The repository is consistent: package, notebooks and README say the same."
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]
pytest.importorskip('nbdev', reason='a development tool, not installed beside the wheel')


def contents(folder): return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    to = tmp_path_factory.mktemp('project')
    tracked = subprocess.run(['git', 'ls-files', '-z'], cwd=root, capture_output=True, text=True, check=True).stdout
    for f in filter(None, tracked.split('\0')):
        if (root/f).is_file():
            (to/f).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root/f, to/f)
    return to


@pytest.mark.parametrize('command', ['nbdev_export', 'nbdev_clean'])
def test_changes_nothing(copy, command):
    before = contents(copy)
    subprocess.run([Path(sys.executable).with_name(command)], cwd=copy, check=True, capture_output=True, timeout=120)
    changed = [str(f) for f, c in contents(copy).items() if before.get(f) != c]
    assert not changed, f'{command} changes {changed}: run make prepare'


def test_readme_is_generated(copy):
    r = subprocess.run([sys.executable, '-m', 'tools.readme', '--check'], cwd=copy, capture_output=True, text=True,
                       timeout=120)
    assert r.returncode == 0, r.stderr


def test_lines_fit():
    import json
    files = [*root.glob('tests/*.py'), *root.glob('tools/**/*.py'), root/'setup.py']
    code = {p.name: p.read_text().splitlines() for p in files}
    for nb in root.rglob('nbs/**/*.ipynb'):
        code[nb.name] = [l for c in json.loads(nb.read_text())['cells'] if c['cell_type'] == 'code'
                         for l in ''.join(c['source']).splitlines()]
    assert [f'{name}: {l}' for name, lines in code.items() for l in lines if len(l) > 120] == []


def test_notebooks_carry_clean_outputs(copy):
    "Every page has outputs, of one run, with no error, warning, progress bar or path of the machine that made them"
    import json
    for nb in sorted((copy/'nbs').rglob('*.ipynb')):
        cells = [c for c in json.loads(nb.read_text())['cells'] if c['cell_type'] == 'code']
        outputs = [o for c in cells for o in c['outputs']]
        text = json.dumps([o for o in outputs], ensure_ascii=False)
        assert outputs, nb.name
        assert not any(o['output_type'] == 'error' or o.get('name') == 'stderr' for o in outputs), nb.name
        assert not re.search(r'Warning: |█|/(home|root|tmp|work|Users)/', text), nb.name
        assert nb.stat().st_size < 1_000_000, nb.name
