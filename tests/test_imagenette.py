"""Imagenette's photos through the whole project: a small part of them, and, marked slow, a larger one."""
import json
import os
import zipfile

import pytest
from resnet_nbdev.catalogue import IMAGENETTE_CLASSES, data_path
from resnet_nbdev.data import class_counts, get_data

from conftest import imagenette_zip, run_command

TRAIN = ['--presize', 160, '--resize', 64, '--arch', 'resnet18']


def test_data_of_a_folder(photos):
    "A folder of photos is known by its classes' names, and a batch is what the network takes"
    dls = get_data(photos, presize=160, resize=64, bs=32, num_workers=0, device='cpu')
    assert list(dls.vocab) == sorted(IMAGENETTE_CLASSES.values())
    counts = class_counts(dls)
    assert (counts['train'] == 24).all() and (counts['val'] == 8).all() and len(counts) == 10
    assert (dls.info['train'], dls.info['val'], dls.info['skipped']) == (240, 80, 0)
    xb, yb = dls.one_batch()
    assert xb.shape == (32, 3, 64, 64) and yb.shape == (32,) and abs(float(xb.mean())) < 1


def test_part_of_a_folder(photos):
    dls = get_data(photos, presize=64, resize=64, bs=8, max_per_class=(5, 2), num_workers=0, device='cpu')
    assert (dls.info['train'], dls.info['val']) == (50, 20)


def test_a_name_with_data_is_the_same_set(photos):
    "The local copy of a named dataset, and the same folder without the name"
    kw = dict(presize=64, resize=64, bs=8, num_workers=0, device='cpu')
    named, plain = get_data('imagenette_160', path=photos, **kw), get_data(photos, **kw)
    assert named.info['fingerprint'] == plain.info['fingerprint'] and list(named.vocab) == list(plain.vocab)
    assert named.info['name'] == 'imagenette_160'


def test_resnet_data_is_the_folder_above(photos, monkeypatch):
    monkeypatch.setenv('RESNET_DATA', str(photos.parent))
    assert data_path('imagenette_160') == photos
    dls = get_data('imagenette_160', presize=64, resize=64, bs=8, num_workers=0, device='cpu')
    assert dls.info['train'] == 240


def test_train_and_predict(run_cli, photos, tmp_path):
    "One frozen and one free epoch by command with two workers; the run knows the classes' names of a photo"
    done = run_cli('resnet_fine_tune', '--data', photos, *TRAIN, '--epochs', 1, '--freeze_epochs', 1, '--bs', 32,
                   '--workers', 2, '--name', 'mine')
    assert done.returncode == 0 and not done.stderr, done
    assert '240 training and 80 validation images of 10 classes, 64 px, resnet18 from scratch on' in done.stdout
    assert 'The run is in runs/mine; to use it: resnet_predict runs/mine IMAGE...' in done.stdout
    photo = sorted((photos/'val'/'n03028079').iterdir())[0]
    done = run_cli('resnet_predict', 'mine', photo, '--json', '--k', 10)
    assert done.returncode == 0 and not done.stderr, done
    found, = json.loads(done.stdout)
    assert found['image'] == str(photo)
    assert {p['class'] for p in found['predictions']} == set(IMAGENETTE_CLASSES.values())


def test_train_by_name_with_data(run_cli, photos, tmp_path):
    "The name gives the settings, the folder the photos, and the run is called after the name"
    done = run_cli('resnet_fine_tune', 'imagenette_160', '--data', photos, '--resize', 32, '--arch', 'cifar_resnet8',
                   '--epochs', 1, '--freeze_epochs', 0, '--max_per_class', 8, '--bs', 16, '--workers', 0)
    assert done.returncode == 0 and not done.stderr, done
    config = json.loads((tmp_path/'runs'/'imagenette_160-cifar_resnet8'/'config.json').read_text())
    assert config['data']['name'] == 'imagenette_160' and config['data']['presize'] == 160
    assert config['data']['train'] == 80
    assert config['arguments']['data'] == str(photos)


@pytest.mark.slow
def test_well_above_chance(tmp_path):
    "Three epochs of ResNet-18 at 64 px on 150 photos of each class: 90 s on two quiet cores, accuracy 0.1 by chance"
    with zipfile.ZipFile(imagenette_zip()) as z: z.extractall(tmp_path)
    done = run_command('resnet_fine_tune', '--data', tmp_path/'imagenette2-160', *TRAIN, '--epochs', 2,
                       '--freeze_epochs', 1, '--max_per_class', 150, '--name', 'mine', cwd=tmp_path, timeout=1800,
                       OMP_NUM_THREADS=str(os.cpu_count()))
    assert done.returncode == 0 and not done.stderr, done
    assert '1,500 training and 1,500 validation images of 10 classes' in done.stdout
    last = json.loads((tmp_path/'runs'/'mine'/'metrics.json').read_text())['last']
    assert last['accuracy'] > 0.35
