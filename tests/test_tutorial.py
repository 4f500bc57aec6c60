"""The tutorial runs on real photos: with a few of them for every edit, and its whole short run among the slow tests."""
import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT, environment, imagenette_zip, script

NAME = 'imagenette_resnet34.ipynb'
pytest.importorskip('nbdev', reason='a development tool, not installed beside the wheel')


@pytest.fixture
def notebooks(tmp_path):
    "A copy of nbs/ with the settings that nbdev reads, since a run writes beside its notebook"
    shutil.copytree(ROOT/'nbs', tmp_path/'nbs', ignore=shutil.ignore_patterns('runs', '.*'))
    shutil.copy(ROOT/'settings.ini', tmp_path)
    return tmp_path/'nbs'


def test_few_photos(notebooks, photos):
    command = [script('nbdev_test'), '--path', f'nbs/tutorials/{NAME}', '--flags', 'net']
    r = subprocess.run(command, cwd=notebooks.parent, env=environment(RESNET_DATA=str(photos.parent)),
                       capture_output=True, text=True, timeout=600)
    assert r.returncode == 0 and 'Success' in r.stdout, r.stderr
    run, = (notebooks/'tutorials'/'runs').iterdir()
    assert json.loads((run/'metrics.json').read_text())['status'] == 'finished'


@pytest.mark.slow
def test_short_run(notebooks, tmp_path):
    "All cells, as a reader runs them, in about 5 minutes on two quiet cores; the assertions are in the notebook"
    with zipfile.ZipFile(imagenette_zip()) as z: z.extractall(tmp_path/'data')
    env = environment(RESNET_DATA=str(tmp_path/'data'), OMP_NUM_THREADS=str(os.cpu_count()))
    r = subprocess.run([sys.executable, '-m', 'nbconvert', '--to', 'notebook', '--execute', '--inplace', NAME],
                       cwd=notebooks/'tutorials', env=env, capture_output=True, text=True, timeout=2400)
    assert r.returncode == 0, r.stderr
