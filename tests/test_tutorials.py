"""Tutorials and labs run from an empty folder: with few images, and whole by make test-tutorials."""
import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from resnet_nbdev.results import missing_conditions

from conftest import ROOT, environment, extract_photos, imagenette_zip, shared_file

pytest.importorskip('nbconvert', reason='a development tool, not installed beside the wheel')
PAGES = sorted(o.name for o in (ROOT/'nbs'/'tutorials').glob('*.ipynb'))
OTHERS = 'miniplaces-20.zip', 'CUB_200_2011-100.zip', 'stanford_dogs-mini.zip', 'mnist.zip'
WEIGHTS = 'resnet50-v1-imagenet-fp16.safetensors'


def unpack_others(dest):
    for name in OTHERS:
        with zipfile.ZipFile(shared_file(name)) as z: z.extractall(dest)
    return dest


@pytest.fixture(scope='session')
def few(tmp_path_factory):
    dest = tmp_path_factory.mktemp('few')
    extract_photos(dest, train=24, val=8)
    return unpack_others(dest)


@pytest.fixture(scope='session')
def whole(tmp_path_factory):
    dest = tmp_path_factory.mktemp('whole')
    with zipfile.ZipFile(imagenette_zip()) as z: z.extractall(dest)
    return unpack_others(dest)


def execute(name, data, cwd, timeout, **env):
    "All cells, as a reader runs them; the assertions are in the notebook"
    shutil.copy(ROOT/'nbs'/'tutorials'/name, cwd)
    command = [sys.executable, '-m', 'nbconvert', '--to', 'notebook', '--execute', '--inplace', name]
    env = environment(RESNET_DATA=str(data), RESNET_WEIGHTS=str(shared_file(WEIGHTS)), **env)
    r = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
    assert r.returncode == 0, r.stderr[-4000:]
    runs = [json.loads((o/'metrics.json').read_text())['status'] for o in (cwd/'runs').glob('*')]
    assert set(runs) <= {'finished'} and (runs or name != 'imagenette_resnet34.ipynb')
    figures = {o.name: json.loads(o.read_text()) for o in cwd.glob('*.json')}
    assert list(figures) == ([] if name == 'famous_errors.ipynb' else [name.replace('.ipynb', '_short.json')])
    assert not any(set(missing_conditions(o)) - {'commit'} for o in figures.values()), 'a wheel has no commit'


@pytest.mark.parametrize('name', [o if o == 'imagenette_resnet34.ipynb' else pytest.param(o, marks=pytest.mark.slow)
                                  for o in PAGES])
def test_few_images(name, few, tmp_path): execute(name, few, tmp_path, 300, IN_TEST='1')


@pytest.mark.tutorials
@pytest.mark.parametrize('name', [pytest.param(o, marks=pytest.mark.slow) if o == 'imagenette_resnet34.ipynb' else o
                                  for o in PAGES])
def test_short_run(name, whole, tmp_path):
    "At most 5 minutes each on two quiet cores"
    execute(name, whole, tmp_path, 1500, OMP_NUM_THREADS=str(os.cpu_count()))


FIRST = '''from importlib.util import find_spec
from importlib.metadata import version
if not find_spec('resnet_nbdev'):
    %pip install -q git+https://github.com/resnet-nbdev/resnet_nbdev torch=={version('torch')}'''


@pytest.mark.parametrize('name', PAGES)
def test_form(name):
    "Starts by installing only what is missing, has one switch, tells of its run, ends with answered questions"
    cells = json.loads((ROOT/'nbs'/'tutorials'/name).read_text())['cells']
    code = [''.join(o['source']) for o in cells if o['cell_type'] == 'code']
    text = [''.join(o['source']) for o in cells if o['cell_type'] == 'markdown']
    assert code[0] == FIRST
    assert not any('results/' in o or 'nbs/' in o for o in code), 'an empty folder has no repository in it'
    assert '<details>' in text[-2] + text[-1] + text[-3] and '## Questions' in '\n'.join(text[-4:])
    assert text[-1].startswith('## What to read next')
    if name == 'famous_errors.ipynb': return  # one size
    assert code.count('full_run = False') == 1
    assert sum('conditions(full_run' in o for o in code) == 1
    assert '**The outputs stored on this page are those of the short run' in '\n'.join(text)


@pytest.mark.parametrize('path', sorted((ROOT/'nbs').glob('*.ipynb')), ids=lambda o: o.stem)
def test_pages_open_in_colab(path):
    "Those of the library, too, begin by installing what is missing"
    code = [''.join(o['source']) for o in json.loads(path.read_text())['cells'] if o['cell_type'] == 'code']
    assert code[0] == f'#| hide\n{FIRST}'
