"""The commands: what users get wrong in one sentence, exit code 2 and nothing left behind; and what they train."""
import json
import math
import os
import resource
import shutil
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from resnet_nbdev.catalogue import CATALOGUE, IMAGENETTE_CLASSES
from resnet_nbdev.cli import resnet_fine_tune
from resnet_nbdev.recipes import RECIPES
from resnet_nbdev.resnet import ARCHS
from resnet_nbdev.runs import load_run, predict

from conftest import SMALL, imagenette_zip, refuses, run_command, small
from small_sets import LABELS, get_data, mnist_files, write_files
from toys import no_download, weights_of

# names of datasets, networks, folders

def test_no_dataset(refused):
    refused('resnet_fine_tune', says=['name a dataset', 'resnet_fine_tune digits', '--data PATH'])


def test_unknown_dataset(refused):
    refused('resnet_fine_tune', 'imagenet', says=["unknown dataset 'imagenet'", 'no such folder', *CATALOGUE])


def test_unknown_arch(refused_here):
    refused_here('resnet_fine_tune', 'digits', '--arch', 'resnet19', says=["unknown arch 'resnet19'", *ARCHS])


def test_folder_without_train(refused_here, tmp_path):
    (tmp_path/'mine'/'val'/'cat').mkdir(parents=True)
    refused_here('resnet_fine_tune', '--data', 'mine',
                 says=['mine has no folder train/', 'train/<class>/ and val/<class>/'])


def test_class_only_in_val(refused_here, folder):
    for f in (folder/'train'/'dog').iterdir(): f.unlink()
    refused_here('resnet_fine_tune', folder, *SMALL, says=[folder, 'images of dog in val/ and none in train/'])


def test_class_with_only_bad_files_by_command(refused_here, folder):
    for f in (folder/'train'/'dog').iterdir(): f.write_bytes(b'bad')
    done = refused_here('resnet_fine_tune', folder, *SMALL, says=['images of dog in val/ and none in train/'], notes=1)
    assert done.stderr.startswith('Left out 8 of 24 files that are no readable images: ')


# files that are no images

def test_bad_files_are_left_out_and_training_goes_on(run_cli, folder, broken_files, tmp_path):
    done = run_cli('resnet_fine_tune', folder, *SMALL, '--name', 'mine')
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith('Left out 3 of 27 files that are no readable images: ')
    assert done.stderr.count('\n') == 1
    for f in broken_files: assert f'{f} (' in done.stderr
    assert '16 training and 8 validation images of 2 classes' in done.stdout
    assert json.loads((tmp_path/'runs'/'mine'/'config.json').read_text())['data']['skipped'] == 3


def test_bad_files_are_refused_with_strict(refused_here, folder, broken_files):
    refused_here('resnet_fine_tune', folder, *SMALL, '--strict',
                 says=['3 of 27 files are no readable images', *broken_files])


# numbers

@pytest.mark.parametrize('what', ['presize', 'resize', 'epochs', 'bs', 'max_per_class'])
@pytest.mark.parametrize('value', [0, -1])
def test_counts_below_one(what, value, folder, tmp_path):
    refuses(f'{what} must be a whole number of at least 1, and is {value}',
            resnet_fine_tune, str(folder), runs=str(tmp_path/'runs'), **{**small, what: value})
    assert not (tmp_path/'runs').exists()


def test_no_epochs(refused_here, folder):
    refused_here('resnet_fine_tune', folder, *SMALL, '--epochs', 0, says=['epochs must be', 'and is 0'])


def test_negative_resize(refused_here):
    refused_here('resnet_fine_tune', 'digits', '--resize', -8, says=['resize must be', 'and is -8'])


@pytest.mark.parametrize('name, value', [
    ('epochs', 0), ('freeze_epochs', -1), ('base_lr', math.nan), ('max_per_class', 0), ('workers', -1), ('bs', 0)])
def test_numbers_are_looked_at_before_a_download(name, value, monkeypatch, tmp_path):
    def fetch(files, dest): raise AssertionError('a download of 1.6 GB began')
    monkeypatch.setattr('resnet_nbdev.catalogue.fetch', fetch)
    refuses(f'{name} must', resnet_fine_tune, 'imagenette', runs=str(tmp_path/'runs'), **{name: value})


def test_negative_workers(folder, tmp_path):
    refuses(['workers must', '-1'],
            resnet_fine_tune, str(folder), runs=str(tmp_path/'runs'), **{**small, 'workers': -1})


def test_negative_freeze_epochs(folder, tmp_path):
    refuses(['freeze_epochs must', '-1'],
            resnet_fine_tune, str(folder), runs=str(tmp_path/'runs'), **{**small, 'freeze_epochs': -1})
    assert not (tmp_path/'runs').exists()


def test_no_freeze_epochs(folder, tmp_path):
    "0 is allowed: one cycle only"
    resnet_fine_tune(str(folder), runs=str(tmp_path/'runs'), name='mine', **small)
    lines = (tmp_path/'runs'/'mine'/'history.csv').read_text().splitlines()
    assert len(lines) == 2 and lines[1].startswith('1,1,')


@pytest.mark.parametrize('value', [0, -1e-3, math.nan, math.inf])
def test_learning_rate(value, folder, tmp_path):
    refuses(f'base_lr must be a positive number, and is {value}',
            resnet_fine_tune, str(folder), runs=str(tmp_path/'runs'), base_lr=value, **small)
    assert not (tmp_path/'runs').exists()


def test_learning_rate_by_command(refused, folder):
    refused('resnet_fine_tune', folder, *SMALL, '--base_lr', 'nan',
            says=['base_lr must be a positive number, and is nan'])


def test_batch_larger_than_the_set(refused_here, folder):
    refused_here('resnet_fine_tune', folder, *SMALL, '--bs', 17, says=['a batch of 17', '16 images', 'smaller bs'])


def test_batch_of_one_on_one_pixel(run_here, folder, tmp_path):
    "Batch norm needs two values a channel, which shows in the first batch only: a sentence, and a run that failed"
    size = '--presize', 32, '--resize', 32
    done = run_here('resnet_fine_tune', folder, *SMALL, *size, '--arch', 'resnet18', '--bs', 1, '--name', 'mine')
    assert done.returncode == 2 and done.stderr.count('\n') == 1, done.stderr
    assert done.stderr.startswith('resnet_fine_tune: ') and '(bs)' in done.stderr
    assert json.loads((tmp_path/'runs'/'mine'/'metrics.json').read_text())['status'] == 'failed'


def test_images_smaller_than_the_strides(refused_here, folder):
    refused_here('resnet_fine_tune', folder, *SMALL, '--arch', 'resnet18', says=['16x16 pixels', 'needs 32 pixels'])
    refused_here('resnet_fine_tune', 'digits', '--arch', 'preact_resnet34', says=['16x16 pixels', 'too small'])


def test_data_command(refused_here, run_here, folder, tmp_path):
    "What resnet_data refuses, and what it says of a set"
    refused_here('resnet_data', 'look', says=["unknown action 'look'", "'list', 'get' or 'check'"])
    for o in ('get', 'check'): refused_here('resnet_data', o, says=[f'{o} needs a dataset'])
    refused_here('resnet_data', 'get', 'imagenet', says=["unknown dataset 'imagenet'"])
    refused_here('resnet_data', 'check', folder, '--plot', 'counts.nonsense',
                 says=['counts.nonsense', 'cannot be written'])
    refused_here('resnet_data', 'check', folder, '--out', 'no/folder/x.csv', says=['no/folder'])
    shutil.copy(folder/'train'/'cat'/'0.png', folder/'val'/'cat'/'again.png')
    done = run_here('resnet_data', 'check', folder, '--plot', 'counts.png', '--out', 'problems.csv')
    assert (done.returncode, done.stderr) == (0, '') and 'in two splits: 1' in done.stdout
    assert '25 readable images of 2 classes' in done.stdout
    assert Image.open(tmp_path/'counts.png').size[0] > 300 and 'again.png' in (tmp_path/'problems.csv').read_text()


def test_resident_by_command(run_cli, refused_here, folder, tmp_path):
    "Trained from kept pixels; a batch that is too large is refused there, too"
    done = run_cli('resnet_fine_tune', folder, *SMALL, '--resident', '--name', 'mine')
    assert done.returncode == 0 and not done.stderr, done
    config = json.loads((tmp_path/'runs'/'mine'/'config.json').read_text())
    assert config['data']['loader'] == 'resident' and config['arguments']['resident'] is True
    refused_here('resnet_fine_tune', folder, *SMALL, '--resident', '--bs', 99, says=['a batch of 99 is larger'])


def test_seed_out_of_range(refused_here, tmp_path):
    refused_here('resnet_fine_tune', 'digits', '--seed', 2**32, says=['seed', str(2**32 - 1), str(2**32)])
    refuses(['seed', '-1'], resnet_fine_tune, 'digits', seed=-1, runs=str(tmp_path/'runs'))


# images that cannot be used

def test_no_classes_asked_for(refused_here, digits_run, digit_files):
    refused_here('resnet_predict', digits_run, digit_files[0], '--k', 0,
                 says=['k must be a whole number of at least 1, and is 0'])


def test_folder_with_a_bad_file(run_cli, refused_here, run_copy, digit_files, tmp_path):
    (tmp_path/'mix').mkdir()
    (tmp_path/'mix'/'a.png').write_bytes(digit_files[4].read_bytes())
    (tmp_path/'mix'/'b.png').write_bytes(b'no picture')
    (tmp_path/'mix'/'notes.txt').write_text('no image, and none by its name')
    done = run_cli('resnet_predict', 'mine', 'mix')
    assert done.returncode == 0 and 'mix/a.png' in done.stdout and 'b.png' not in done.stdout
    assert done.stderr.startswith('Left out 1 of 2 files that are no readable images: mix/b.png (')
    assert done.stderr.count('\n') == 1
    refused_here('resnet_predict', 'mine', 'mix', '--strict', says=['1 of 2 files are no readable images: mix/b.png ('])


def test_json_and_table_say_the_same(run_cli, run_here, digits_run, digit_files, web):
    "For a file and an address; with 12 classes asked for, the 10 that there are"
    web.pages['seven.png'] = digit_files[7].read_bytes()
    args = 'resnet_predict', digits_run, digit_files[3], f'{web.url}seven.png', '--k', 12, '--allow_private'
    table, data = run_cli(*args), run_here(*args, '--json')
    assert (table.returncode, data.returncode, table.stderr, data.stderr) == (0, 0, '', '')
    found = json.loads(data.stdout)
    assert [o['image'] for o in found] == [str(digit_files[3]), f'{web.url}seven.png']
    rows = [o.split() for o in table.stdout.splitlines()[1:]]
    want = [[o['image']]*(i == 0) + [p['class'], f"{p['probability']:.4f}"]
            for o in found for i, p in enumerate(o['predictions'])]
    assert rows == want and len(want) == 20
    for o in found:
        probs = [p['probability'] for p in o['predictions']]
        assert probs == sorted(probs, reverse=True) and abs(sum(probs) - 1) < 1e-5
    assert found[1]['predictions'][0]['class'] == '7'


# recipes and flags

def test_flags_win_over_a_recipe(run_here, folder, tmp_path):
    "What is given wins, zeros too, what is not is the recipe's, and the run records both"
    weights_of('cifar_resnet8', tmp_path/'a.safetensors')
    given = dict(arch='cifar_resnet8', weights='a.safetensors', plan='late', presize=16, resize=16, bs=4, epochs=1,
                 freeze_epochs=0, top_k=2, ema=0.0, label_smoothing=0.0)
    done = run_here('resnet_fine_tune', '--recipe', 'places', '--data', folder, '--name', 'mine', '--json',
                    *(p for k, v in given.items() for p in (f'--{k}', v)))
    assert done.returncode == 0, done
    config = json.loads((tmp_path/'runs'/'mine'/'config.json').read_text())
    want = {**RECIPES['places'], **given, 'data': str(folder), 'seed': 42}
    del want['source']
    assert config['arguments'].items() >= want.items()
    assert config['data']['loader'] == 'resident' and config['learner']['plan']['cycles'] == [-1, -3]
    assert config['average'] == RECIPES['places'].get('average', 0)
    cycle, = config['cycles']
    assert cycle['trains_from'] == 2 and cycle['rates'][-1] == pytest.approx(5e-4)
    assert cycle['rates'][-1]/cycle['rates'][0] == pytest.approx(1000)
    row = pd.read_csv(tmp_path/'runs'/'mine'/'history.csv').iloc[0]
    assert 'top_2' in row and row.cycle == 1


WRONG = { # flags: what the sentence has
    '--recipe S6': "unknown recipe 'S6'", '--plan none': "unknown plan 'none'", '--bn eval': "'train' or 'frozen'",
    '--opt lion': "unknown optimizer 'lion'", '--schedule cosine': "unknown schedule 'cosine'",
    '--scale_lr cubic': "'cubic'", '--precision fp8': "unknown precision 'fp8'",
    '--precision fp16 --device cpu': 'fp16 needs a GPU', '--progressive a,b': "progressive takes whole numbers",
    '--progressive 96,,128': 'progressive takes whole numbers', '--progressive 0,64': 'progressive',
    '--progressive=-64,64': 'progressive', '--top_k -1': 'top_k must', '--monitor acuracy': "'acuracy'",
    '--monitor top_5 --top_k 3': "'top_5'", '--label_smoothing 1': 'label_smoothing must', '--mixup -1': 'mixup must',
    '--mixup 1 --cutmix 1': 'choose one of them', '--cutmix nan': 'cutmix must', '--clip -1': 'clip must',
    '--accumulate -1': 'accumulate must', '--max_norm inf': 'max_norm must', '--ema 1': 'ema must',
    '--hidden -1': 'hidden must', '--dropout 1': 'dropout must', '--lr_mult 0': 'lr_mult', '--lr_mult -3': 'lr_mult',
    '--lr_mult nan': 'lr_mult', '--patience -1': 'patience must', '--average -1': 'average must',
    '--ema 0.9 --average 2': 'choose one average', '--wd nan': 'wd must', '--wd -1': 'wd must',
    '--weights no.safetensors': 'there is no weights file no.safetensors'}


@pytest.mark.parametrize('args', WRONG)
def test_wrong_values_are_refused_before_a_download(args, refused_here, monkeypatch):
    monkeypatch.setattr('resnet_nbdev.catalogue.fetch', no_download)
    refused_here('resnet_fine_tune', 'imagenette', *args.split(), says=[WRONG[args]])


TOGETHER = {'--plan cut': 'it has no more', '--plan stepped': '6 rates, and the network 5 groups',
            '--weights imagenet': 'published ImageNet weights', '--top_k 3': 'the 2 classes, and is 3',
            '--progressive 3,16': '3x3 pixels are too small', '--accumulate 8 --weights a.txt': 'a.txt'}


@pytest.mark.parametrize('args', TOGETHER)
def test_what_does_not_fit_together(args, refused_here, folder):
    small = '--arch cifar_resnet8 --presize 16 --resize 16 --bs 4 --epochs 1 --freeze_epochs 0 --workers 0'.split()
    refused_here('resnet_fine_tune', folder, *small, *args.split(), says=[TOGETHER[args]])


# predictions

@pytest.mark.parametrize('ending', ['csv', 'json'])
def test_predictions_in_a_file(ending, trained, images, run_here, tmp_path):
    "With all that was asked for; nothing is printed"
    run = trained['mean'].run_path
    done = run_here('resnet_predict', run, *images[:5], '--k', 2, '--weights', 'average', '--out', f'a.{ending}')
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
    want = predict(run, images[:5], 2, 'average')
    if ending == 'csv': found = pd.read_csv(tmp_path/'a.csv')
    else:
        found = pd.DataFrame([dict(image=o['image'], rank=i, **p) for o in json.loads((tmp_path/'a.json').read_text())
                              for i, p in enumerate(o['predictions'], 1)])
    pd.testing.assert_frame_equal(found, want, check_exact=False, rtol=1e-6)


@pytest.mark.parametrize('out', ['a.txt', 'a', 'csv', 'a.csv.gz'])
def test_predictions_in_another_file(out, trained, images, refused_here, tmp_path):
    refused_here('resnet_predict', trained['mean'].run_path, images[0], '--out', out, says=[out, '.csv or .json'])
    assert not (tmp_path/out).exists()


def test_predictions_in_a_folder_that_is_not_there(trained, images, refused_here):
    refused_here('resnet_predict', trained['mean'].run_path, images[0], '--out', 'no/a.csv', says=['no/a.csv'])


# datasets

def test_a_run_on_mnist_and_its_predictions(run_here, tmp_path):
    "resnet_predict prepares an image as validation did: without statistics, in a black frame"
    mnist = write_files(tmp_path/'MNIST', mnist_files(train=300))
    done = run_here('resnet_fine_tune', 'mnist', '--data', mnist, '--arch', 'cifar_resnet8', '--bs', 32, '--workers', 0,
                    '--freeze_epochs', 0, '--epochs', 1, '--name', 'mine', '--device', 'cpu')
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert '290 training and 10 validation images of 10 classes, 32 px, cifar_resnet8' in done.stdout
    model, config = load_run(tmp_path/'runs'/'mine')
    assert [config['data'][k] for k in ('fit', 'stats', 'test')] == ['croppad', 'none', 20]
    dls = get_data('mnist', bs=8, path=mnist, device='cpu')
    assert dls.info['fingerprint'] == config['data']['fingerprint']
    (tmp_path/'shown').mkdir()
    for i, o in enumerate(dls[2].items): Image.fromarray(o.pixels).save(tmp_path/'shown'/f'{i:02}.png')
    answered = run_here('resnet_predict', 'mine', 'shown', '--json', '--k', 10, '--device', 'cpu')
    assert answered.returncode == 0 and not answered.stderr, answered.stderr
    with torch.no_grad(): want = torch.cat([model(xb).softmax(1) for xb, _ in dls[2]])
    got = json.loads(answered.stdout)
    assert len(got) == len(want) == 20
    for found, probs in zip(got, want):
        told = {o['class']: o['probability'] for o in found['predictions']}
        assert np.allclose([told[o] for o in dls.vocab], probs, atol=1e-5), found['image']
    shifted = get_data('mnist', bs=8, path=mnist, stats='imagenet', fit='squish', device='cpu')
    with torch.no_grad(): other = torch.cat([model(xb).softmax(1) for xb, _ in shifted[2]])
    assert (other - want).abs().max() > 1e-3, 'the comparison sees the difference'


def test_a_run_on_an_archive(run_here, folder, tmp_path):
    packed = shutil.make_archive(tmp_path/'pets', 'zip', folder)
    done = run_here('resnet_fine_tune', packed, '--arch', 'cifar_resnet8', '--presize', 16, '--resize', 16, '--bs', 4,
                    '--workers', 0, '--freeze_epochs', 0, '--epochs', 1, '--device', 'cpu')
    assert done.returncode == 0, done.stderr
    assert 'runs/pets-cifar_resnet8' in done.stdout


def test_a_damaged_set_by_command(refused_here, mnist):
    (mnist/'t10k-labels-idx1-ubyte').write_bytes(LABELS[:-1])
    refused_here('resnet_fine_tune', 'mnist', '--data', mnist, says=[mnist, 'no whole idx file'])


# Imagenette's photos through the whole project

TRAIN = ['--presize', 160, '--resize', 64, '--arch', 'resnet18']


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


# the README's first promise: what make demo trains

@pytest.mark.slow
def test_digits_to_985_in_a_minute(tmp_path):
    "98.5 % right after 60 s on two cores; counted as processor time, which a busy machine does not stretch"
    used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    before = used()
    done = run_command('resnet_fine_tune', 'digits', cwd=tmp_path, OMP_NUM_THREADS=str(os.cpu_count()), timeout=1200)
    assert done.returncode == 0 and not done.stderr, done
    metrics = json.loads((tmp_path/'runs/digits-cifar_resnet8/metrics.json').read_text())
    print(f"accuracy {metrics['last']['accuracy']:.4f} after {metrics['seconds']:.0f} s")
    assert metrics['last']['accuracy'] >= 0.985
    assert used() - before <= 120


@pytest.mark.parametrize('args', [['--help'], ['digits', '--epochz', '3']], ids=['help', 'wrong flag'])
def test_help_answers_at_once(args, tmp_path):
    "In half a second of processor time: PyTorch is not imported for it"
    before = os.times()
    done = run_command('resnet_fine_tune', *args, cwd=tmp_path)
    after = os.times()
    assert done.returncode == (0 if '--help' in args else 2) and 'Traceback' not in done.stderr
    assert after.children_user + after.children_system - before.children_user - before.children_system <= 0.5
