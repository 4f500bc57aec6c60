"""What users get wrong: one sentence, exit code 2 and nothing left behind."""
import io
import json
import math
import os
import shutil
import socket
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from resnet_nbdev.core import InputError
from resnet_nbdev.cli import resnet_fine_tune
from resnet_nbdev.catalogue import CATALOGUE, data_path
from resnet_nbdev.data import get_data
from resnet_nbdev.web import find_images
from resnet_nbdev.resnet import ARCHS
from resnet_nbdev.folders import run_path
from resnet_nbdev.recipes import run_recipe
from resnet_nbdev.runs import load_run, predict



small = dict(arch='cifar_resnet8', presize=16, resize=16, bs=4, epochs=1, freeze_epochs=0, workers=0)
SMALL = [o for k, v in small.items() for o in (f'--{k}', v)]


def refuses(says, call, *args, **kw):
    "In Python, the same sentence is an `InputError`"
    with pytest.raises(InputError) as e: call(*args, **kw)
    assert '\n' not in str(e.value)
    for o in [says] if isinstance(says, str) else says: assert o in str(e.value), (o, str(e.value))


# names of datasets, networks, folders

def test_no_dataset(refused):
    refused('resnet_fine_tune', says=['name a dataset', 'resnet_fine_tune digits', '--data PATH'])


def test_unknown_dataset(refused):
    refused('resnet_fine_tune', 'imagenet', says=["unknown dataset 'imagenet'", 'no such folder', *CATALOGUE])


def test_unknown_arch(refused_here):
    refused_here('resnet_fine_tune', 'digits', '--arch', 'resnet19', says=["unknown arch 'resnet19'", *ARCHS])


@pytest.mark.parametrize('missing', ['train', 'val'])
def test_folder_without_train_or_val(missing, folder):
    (folder/missing).rename(folder/'other')
    refuses([str(folder), f'has no folder {missing}/', 'train/<class>/ and val/<class>/'], get_data, folder)


def test_folder_without_train(refused_here, tmp_path):
    (tmp_path/'mine'/'val'/'cat').mkdir(parents=True)
    refused_here('resnet_fine_tune', '--data', 'mine',
                 says=['mine has no folder train/', 'train/<class>/ and val/<class>/'])


def test_data_that_is_a_file_or_absent(folder, tmp_path):
    (tmp_path/'set.zip').write_bytes(b'x')
    refuses([f'{tmp_path}/set.zip', 'is no whole tar or zip archive'], get_data, tmp_path/'set.zip')
    refuses(['absent', 'no such folder'], get_data, 'imagenette', path=tmp_path/'absent')


@pytest.mark.parametrize('split', ['train', 'val'])
def test_split_without_images(split, folder):
    for f in (folder/split).rglob('*.png'): f.unlink()
    refuses(f'{folder} has no images in {split}/', get_data, folder, 16, 16, 4)


def test_class_only_in_val(refused_here, folder):
    for f in (folder/'train'/'dog').iterdir(): f.unlink()
    refused_here('resnet_fine_tune', folder, *SMALL, says=[folder, 'images of dog in val/ and none in train/'])


def test_class_with_only_bad_files(folder, capsys):
    for f in (folder/'train'/'dog').iterdir(): f.write_bytes(b'bad')
    refuses(['images of dog in val/ and none in train/'], get_data, folder, 16, 16, 4)
    assert 'Left out 8 of 24 files' in capsys.readouterr().err


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


def test_file_that_goes_bad_after_the_check(folder):
    "The worker that finds it hands on the name, in the last line, which is what a command tells"
    dls = get_data(folder, 16, 16, 4, num_workers=1)
    for f in (folder/'train').rglob('*.png'): f.write_bytes(b'bad')
    with pytest.raises(InputError) as e: list(dls.train)
    said = str(e.value).strip().splitlines()[-1]
    assert f'{folder}/train/' in said and '.png is no readable image' in said


# numbers

@pytest.mark.parametrize('what', ['presize', 'resize', 'epochs', 'bs', 'max_per_class'])
@pytest.mark.parametrize('value', [0, -1])
def test_counts_below_one(what, value, folder, tmp_path):
    refuses(f'{what} must be a whole number of at least 1, and is {value}',
            resnet_fine_tune, str(folder), runs=str(tmp_path/'runs'), **{**small, what: value})
    assert not (tmp_path/'runs').exists()


@pytest.mark.parametrize('value, says', [((4, 2, 1), 'one number or a pair'), ((4, 0), 'must be a whole number')])
def test_pairs_that_are_none(value, says, folder, tmp_path):
    refuses(['max_per_class', says], run_recipe, dict(source=str(folder)), runs=tmp_path/'runs', max_per_class=value)
    refuses(['max_per_class', says], get_data, folder, max_per_class=value)


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


def test_benchmarks(refused_here, tmp_path):
    bench = lambda *args, says: refused_here('resnet_bench', *args, says=says)
    bench('speed', says=["unknown benchmark 'speed'", "'model', 'data', 'train', 'strides', 'allreduce' or 'compile'"])
    bench('model', '--arch', 'cifar_resnet8', says=['torchvision has no cifar_resnet8'])
    for o in ('model', 'allreduce', 'compile'):
        bench(o, '--arch', 'resnet35', says=["unknown arch 'resnet35'"])
        bench(o, '--rounds', 0, says=['rounds must be'])
    for o in ('model', 'compile'): bench(o, '--size', 16, says=['too small'])
    bench('strides', says=['--weights'])
    for o in ('data', 'train'): bench(o, '--data', 'nowhere', says=["unknown dataset 'nowhere'"])
    (tmp_path/'a.pth').write_bytes(b'no weights')
    bench('strides', '--weights', 'a.pth', '--data', tmp_path, says=[tmp_path, 'no .JPEG files'])


@pytest.mark.slow
def test_compiled(refused, run_cli, tmp_path):
    "Without a compiler it says so; with one the figures are written"
    call = ('resnet_bench', 'compile', '--arch', 'cifar_resnet8', '--size', 16, '--bs', 4, '--rounds', 2)
    refused(*call, says=['torch.compile does not work here', 'compiler'], CXX='/nowhere/g++')
    done = run_cli(*call, '--out', '.', timeout=600)
    values = json.loads((tmp_path/'compile_cifar_resnet8_16.json').read_text())['values']
    assert done.returncode == 0 and values['compile_seconds'] > 1 and set(values['seconds']) == {'eager', 'compiled'}


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


def test_not_a_number(refused_here):
    refused_here('resnet_fine_tune', 'digits', '--epochs', 'many',
                 says=["argument --epochs: invalid int value: 'many'", 'resnet_fine_tune --help'])


def test_unknown_option(refused_here):
    refused_here('resnet_fine_tune', 'digits', '--epoch', 3, says=['--epoch', 'resnet_fine_tune --help'])
    refused_here('resnet_predict', says=['run', 'resnet_predict --help'])


@pytest.mark.parametrize('device', ['toaster', 'cuda:99', 'xpu', 'hpu', 'mps:x'])
def test_unknown_device(device, tmp_path):
    refuses(f'the device {device!r} is not there', resnet_fine_tune, 'digits', device=device, runs=str(tmp_path/'runs'))


def test_unknown_device_by_command(refused_here):
    refused_here('resnet_fine_tune', 'digits', '--device', 'toaster', says=["the device 'toaster' is not there"])


# where a run goes

@pytest.mark.parametrize('name', ['', 'a/b', 'a/', '/tmp', '..', '.', '.hidden', '../up'])
def test_name_of_a_run(name, tmp_path): refuses(['plain name', repr(name)], run_path, name, tmp_path)


def test_name_with_slash(refused_here):
    refused_here('resnet_fine_tune', 'digits', '--name', 'a/b', says=['plain name', "'a/b'"])


def test_existing_run(refused, tmp_path):
    (tmp_path/'runs'/'mine').mkdir(parents=True)
    refused('resnet_fine_tune', 'digits', '--name', 'mine', says=['runs/mine exists already', 'another name'])


def test_runs_that_is_a_file(refused_here, tmp_path):
    (tmp_path/'results').write_text('mine\n')
    refused_here('resnet_fine_tune', 'digits', '--runs', 'results',
                 says=['results/digits-cifar_resnet8 cannot be made', f'{tmp_path}/results is no folder'])
    assert (tmp_path/'results').read_text() == 'mine\n'


def test_runs_without_permission(refused_here, folder, tmp_path):
    "/proc stands in where the user is root, who may write everywhere else"
    if os.geteuid(): (runs := tmp_path/'closed').mkdir(mode=0o500)
    else: runs = Path('/proc/nothing')
    refused_here('resnet_fine_tune', folder, *SMALL, '--name', 'mine', '--runs', runs,
                 says=[f'the run folder {runs}/mine cannot be'])


def test_full_disk(run_cli, start_cli, folder, tmp_path):
    "A file size limit stands in: the weights (300 kB) cannot be written; the run says so and keeps what it has"
    import resource
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limit[1]))
    try: p = start_cli('resnet_fine_tune', folder, *SMALL, '--name', 'mine')
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert p.wait(100) == 2, (tmp_path/'err').read_text()
    said = (tmp_path/'err').read_text()
    assert said.startswith('resnet_fine_tune: ') and said.count('\n') == 1
    assert 'File too large' in said and 'runs/mine' in said and 'None' not in said
    run = tmp_path/'runs'/'mine'
    assert json.loads((run/'metrics.json').read_text())['status'] == 'failed'
    assert sorted(o.name for o in run.iterdir()) == ['config.json', 'metrics.json']


# the network

def test_no_network(refused, tmp_path):
    "The address, and how to give a local copy; no part of an archive is left"
    dead = 'http://127.0.0.1:9'
    refused('resnet_fine_tune', 'imagenette',
            says=[CATALOGUE['imagenette']['files'][0]['urls'][0], 'could not be fetched', '--data', 'RESNET_DATA'],
            FASTAI_HOME=str(tmp_path/'home'), no_proxy=None, NO_PROXY=None,
            http_proxy=dead, https_proxy=dead, HTTPS_PROXY=dead)
    left = {o.name for o in (tmp_path/'home').rglob('*') if o.is_file()}
    assert left <= {'config.ini', '.imagenette2.lock', '.imagenette2.tgz.lock'}


def archive(folder):
    f = io.BytesIO()
    with tarfile.open(fileobj=f, mode='w:gz') as t: t.add(folder, folder.name)
    return f.getvalue()


def test_download(web, folder):
    web.pages['pets.tgz'] = archive(folder)
    assert get_data(f'{web.url}pets.tgz', 16, 16, 4, num_workers=0).info['train'] == 16
    web.pages.clear()
    assert data_path(f'{web.url}pets.tgz').is_dir(), 'the second time needs no network'


@pytest.mark.parametrize('kind', ['half', 'cut', 'page'])
def test_broken_download(kind, web, folder):
    "A sentence the first time; the second time, with a whole archive, it works"
    url, content = f'{web.url}{kind}.tgz', archive(folder.rename(folder.with_name(kind)))
    half = content[:len(content)//2]
    web.pages[f'{kind}.tgz'] = dict(half=half, cut=(half, len(content)), page=b'<html>no archive</html>')[kind]
    refuses([f'{url} could not be fetched', '--data', 'RESNET_DATA'], data_path, url)
    web.pages[f'{kind}.tgz'] = content
    assert get_data(url, 16, 16, 4, num_workers=0).info['train'] == 16


def test_archive_that_is_not_there(web):
    "The server's error page is no part of the sentence"
    refuses([f'{web.url}no.tgz could not be fetched', '--data'], data_path, f'{web.url}no.tgz')


@pytest.mark.parametrize('url', ['http://[', 'https://[x]/a.tgz'])
def test_address_that_is_none(url):
    refuses(url, data_path, url)
    refuses(url, find_images, [url])


# runs that cannot be used

def test_unknown_run(refused_here, run_copy):
    refused_here('resnet_predict', 'yours', 'a.png', says=['there is no run yours', 'runs/ has mine'])


def test_unknown_run_without_runs(tmp_path):
    refuses(['there is no run mine', str(tmp_path)], load_run, 'mine', runs=tmp_path)


def test_run_without_weights(refused_here, run_copy, digit_files):
    (run_copy/'best.safetensors').unlink()
    refused_here('resnet_predict', 'mine', digit_files[0],
                 says=['runs/mine has no best.safetensors', 'no epoch of it was finished'])
    assert len(predict(run_copy, digit_files[0], weights='last')) == 3


def test_corrupt_config(refused_here, run_copy, digit_files):
    (run_copy/'config.json').write_text('{"name": "mine", "arch')
    refused_here('resnet_predict', 'mine', digit_files[0], says=['runs/mine/config.json is not readable'])


@pytest.mark.parametrize('content', [
    b'', b'\xff\xfe\0', b'[]', b'3', b'null', b'{}', b'{"arch": "cifar_resnet8"}',
    b'{"arch": ["cifar_resnet8"], "data": {}}', b'{"arch": "cifar_resnet8", "data": 1}',
    b'{"arch": "cifar_resnet8", "data": {"vocab": ["1", "2"]}}',
    b'{"arch": "cifar_resnet8", "data": {"presize": 16, "resize": 16, "augment": {}}}'])
def test_config_of_something_else(content, run_copy, digit_files):
    (run_copy/'config.json').write_bytes(content)
    refuses(str(run_copy), predict, run_copy, digit_files[0])


@pytest.mark.parametrize('kept', [0, 7, 1000, 300_000])
def test_truncated_weights(kept, run_copy):
    path = run_copy/'best.safetensors'
    path.write_bytes(path.read_bytes()[:kept])
    refuses(f'{path} is not a readable .safetensors file', load_run, run_copy)


def test_truncated_weights_by_command(refused, run_copy, digit_files):
    path = run_copy/'best.safetensors'
    path.write_bytes(path.read_bytes()[:100_000])
    refused('resnet_predict', 'mine', digit_files[0],
            says=['runs/mine/best.safetensors is not a readable .safetensors file'])


def test_unknown_weights(digits_run): refuses(["'best', 'last' or 'average'", "'worst'"], load_run, digits_run, 'worst')


# images that cannot be used

def test_missing_image(refused_here, run_copy, digit_files):
    refused_here('resnet_predict', 'mine', digit_files[0], 'absent.png', says=['there is no file or folder absent.png'])


def test_bad_image(refused_here, run_copy, tmp_path):
    (tmp_path/'bad.png').write_bytes(b'no picture')
    refused_here('resnet_predict', 'mine', 'bad.png', says=['bad.png is no readable image'])


def test_empty_folder(digits_run, tmp_path):
    refuses(f'there is no readable image in {tmp_path}', predict, digits_run, tmp_path)


def test_no_image(digits_run): refuses('no image was given', predict, digits_run, [])


@pytest.mark.parametrize('kw', [dict(k=0), dict(k=-1), dict(bs=0)])
def test_counts_of_predict(kw, digits_run, digit_files):
    refuses([next(iter(kw)), 'at least 1'], predict, digits_run, digit_files[0], **kw)


def test_no_classes_asked_for(refused_here, digits_run, digit_files):
    refused_here('resnet_predict', digits_run, digit_files[0], '--k', 0,
                 says=['k must be a whole number of at least 1, and is 0'])


def test_unreachable_address(refused_here, digits_run):
    with socket.create_server(('127.0.0.1', 0)) as s: url = f'http://127.0.0.1:{s.getsockname()[1]}/photo.png'
    refused_here('resnet_predict', digits_run, url, '--allow_private', says=[url, 'could not be fetched', 'file'])


def test_address_of_this_machine(refused_here, digits_run, digit_files, web):
    web.pages['seven.png'] = digit_files[7].read_bytes()
    refused_here('resnet_predict', digits_run, f'{web.url}seven.png',
                 says=[f'{web.url}seven.png leads to 127.0.0.1', 'no public address', '--allow_private'])


def test_address_without_a_picture(web, digits_run):
    "The address and the reason: a 404 is mended in another way than a dead network"
    web.pages['page.html'] = b'<html>no picture</html>'
    for page, says in [('absent.png', ['could not be fetched', '404']), ('page.html', ['no readable image'])]:
        refuses([web.url + page, *says], predict, digits_run, web.url + page, allow_private=True)


def test_address_that_breaks_off(web, digits_run):
    web.pages['cut.png'] = b'\x89PNG', 1000
    refuses([f'{web.url}cut.png could not be fetched'], predict, digits_run, f'{web.url}cut.png', allow_private=True)


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
