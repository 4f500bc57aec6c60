"""The datasets known by name: their entries, fetched, found in local copies, refused in one sentence."""
import gzip
import hashlib
import io
import multiprocessing
import re
import shutil
import sys
import tarfile
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from fastai.vision.all import Pipeline, TensorImage
from resnet_nbdev import catalogue
from resnet_nbdev.augment import AUGMENT, image_tfms
from resnet_nbdev.catalogue import CATALOGUE, DEFAULTS, PLAIN, data_path, datasets, settings_of
from resnet_nbdev.images import open_image
from resnet_nbdev.layouts import find_layout
from resnet_nbdev.web import find_images

from conftest import make_folder, noise, refuses
from small_sets import SHARED, WNIDS, archive_of, get_data, load_small, mnist_files

NAMES = {'imagenette', 'imagenette_320', 'imagenette_160', 'imagewoof', 'imagewoof_320', 'imagewoof_160', 'miniplaces',
         'mnist', 'stanford_dogs', 'cub200', 'cifar10', 'digits'}


def test_names(): assert set(CATALOGUE) == NAMES


@pytest.mark.parametrize('name', CATALOGUE)
def test_entry(name):
    entry = CATALOGUE[name]
    for k in ('folder', 'licence', 'citation', 'source'): assert entry[k].strip() == entry[k] != ''
    for k in ('images', 'classes'): assert isinstance(entry[k], int) and entry[k] > 1
    assert entry['source'].startswith(('https://', 'http://')) and '/' not in entry['folder']
    assert bool(entry['files']) == (name != 'digits')
    for f in entry['files']:
        assert set(f) <= {'urls', 'md5', 'bytes'} and f['urls']
        for url in f['urls']: assert re.fullmatch(r'https?://[^\s/]+/\S+\.(tgz|tar|zip|tar\.gz|gz)', url)
        assert len({url.rsplit('/', 1)[1] for url in f['urls']}) == 1, 'a file keeps its name'
        assert f.get('md5') is None or re.fullmatch('[0-9a-f]{32}', f['md5'])
        assert f.get('bytes') is None or f['bytes'] > 1000
    labels = settings_of(name)['labels']
    assert not labels or len(set(labels)) == len(set(labels.values())) == entry['classes']


@pytest.mark.parametrize('name', CATALOGUE)
def test_settings_pass(name):
    conf = settings_of(name)
    assert set(conf) >= set(DEFAULTS)
    items, batch = image_tfms(*(conf[k] for k in ('presize', 'resize', 'augment', 'fit', 'stats')))
    im = items[0](open_image(noise(0, 50)), split_idx=0)
    assert im.size == (conf['presize'],)*2
    x = TensorImage(torch.from_numpy(np.array(im)).permute(2, 0, 1)[None]/255)
    for split in (0, 1): assert Pipeline(batch, split_idx=split)(x).shape == (1, 3, conf['resize'], conf['resize'])


def test_checksums_agree_with_torchvision():
    known = torchvision.datasets.Imagenette._ARCHIVES
    for name, size in (('imagenette', 'full'), ('imagenette_320', '320px'), ('imagenette_160', '160px')):
        file, = CATALOGUE[name]['files']
        assert file['md5'] == known[size][1] and file['urls'][0].rsplit('/')[-1] == known[size][0].rsplit('/')[-1]
    assert [(f['urls'][0].rsplit('/')[-1], f['md5']) for f in CATALOGUE['mnist']['files']] == \
        torchvision.datasets.MNIST.resources
    sums = [f['md5'] for v in CATALOGUE.values() for f in v['files'] if f.get('md5')]
    assert len(sums) == len(set(sums))


def test_table_of_datasets():
    table = datasets()
    assert isinstance(table, pd.DataFrame) and table.index.name == 'name' and set(table.index) == NAMES
    assert {'classes', 'images', 'bytes', 'licence', 'citation', 'source'} <= set(table.columns)
    assert table.loc['mnist', 'bytes'] == 9_912_422 + 28_881 + 1_648_877 + 4_542
    assert table.loc['digits', 'bytes'] == 0 and pd.isna(table.loc['miniplaces', 'bytes'])
    assert table.loc['imagenette', 'images'] == 9469 + 3925 and table.loc['cub200', 'classes'] == 200


def test_the_catalogue_says_what_the_tutorials_do():
    "The tutorials S1 to S5 of shared/systems.md; Keras' rotation of 0.2 is a fifth of a turn to each side"
    want = dict(
        imagenette=dict(presize=460, resize=224, bs=32, augment=dict(min_scale=.5), fit='crop', stats='imagenet',
                        arch='resnet34', freeze_epochs=3, epochs=12, base_lr=5e-4),
        miniplaces=dict(resize=224, bs=64, stats='imagenet'), mnist=dict(resize=32, bs=64, stats='none', fit='croppad'),
        stanford_dogs=dict(resize=224, stats='none', fit='pad'), cub200=dict(stats='own'))
    for name, settings in want.items():
        conf = settings_of(name)
        assert {k: conf[k] for k in settings} == settings
    full = {k: {**AUGMENT, **settings_of(k)['augment']} for k in CATALOGUE}
    flips = lambda o: (full[o]['hflip'], full[o]['vflip'])
    assert flips('miniplaces') == (.25, .25) and flips('stanford_dogs') == (.5, .5)
    assert full['miniplaces']['max_rotate'] == 15 and full['stanford_dogs']['max_rotate'] == .2*360
    assert full['stanford_dogs']['max_contrast'] == .2 and full['miniplaces']['max_contrast'] == 0
    for o in ('miniplaces', 'stanford_dogs'):
        assert (full[o]['p_affine'], full[o]['max_zoom'], full[o]['max_warp'], full[o]['max_lighting']) == (1, 1, 0, 0)
    assert full['mnist'] == {**AUGMENT, **PLAIN}
    assert full['cub200']['max_rotate'] == 5 and full['cifar10']['crop'] is True


# fetching by name

@pytest.fixture
def home(tmp_path, monkeypatch):
    "Where datasets go in this test, in place of fastai's folders"
    monkeypatch.setattr(catalogue, 'fastai_path', lambda kind: tmp_path/'home'/kind)
    return tmp_path/'home'


class Pages(dict):
    "Pages of a server, and in `asked` what was asked for"
    def __init__(self): self.asked = []

    def get(self, path):
        self.asked.append(path)
        return super().get(path)


@pytest.fixture
def publish(web, home, monkeypatch):
    "Let the archives {file name: content} be those of a dataset of the catalogue; returns the server's pages"
    web.pages = Pages()

    def put(name, archives, **wrong):
        files = []
        for k, v in archives.items():
            web.pages[k] = v
            files.append(dict(urls=[f'{web.url}{k}'], md5=hashlib.md5(v).hexdigest(), bytes=len(v)) | wrong)
        monkeypatch.setitem(CATALOGUE, name, {**CATALOGUE[name], 'files': files})
        return web.pages
    return put


def files_in(folder): return {str(o.relative_to(folder)): o.read_bytes() for o in folder.rglob('*') if o.is_file()}


def left_over(home, *folders):
    "What is under `home` besides those data folders, locks, and versions of files that were fetched in part"
    made = [home/'data'/o for o in folders]
    return [o for o in home.rglob('*') if o.is_file() and not any(m in o.parents for m in made)
            and not (o.name.endswith('.lock') and not o.stat().st_size) and not o.name.endswith('.part.etag')]


def tar(*paths, mode='w:gz'):
    f = io.BytesIO()
    with tarfile.open(fileobj=f, mode=mode) as t:
        for o in paths: t.add(o, o.name)
    return f.getvalue()


@pytest.fixture
def nette(tmp_path):
    folder = make_folder(tmp_path/'new'/'imagenette2-160', WNIDS[:2])
    return folder, tar(folder)


def test_fetch_one_archive(nette, publish, home):
    "Its one folder becomes the dataset's; unpacked, it goes, and a second call needs no network"
    folder, content = nette
    pages = publish('imagenette_160', {'imagenette2-160.tgz': content})
    dls = load_small('imagenette_160')
    assert list(dls.vocab) == ['French_horn', 'parachute'] and dls.info['train'] == 16
    assert files_in(home/'data'/'imagenette2-160') == files_in(folder)
    assert not left_over(home, 'imagenette2-160') and pages.asked == ['imagenette2-160.tgz']
    pages.clear()
    assert load_small('imagenette_160').info == dls.info
    assert load_small('imagenette_160', path=folder).info == dls.info
    assert pages.asked == ['imagenette2-160.tgz']


def test_an_address_of_the_catalogue_is_the_dataset(nette, publish, web, home):
    pages = publish('imagenette_160', {'imagenette2-160.tgz': nette[1]})
    path = data_path(f'{web.url}imagenette2-160.tgz')
    assert path == data_path('imagenette_160') == home/'data'/'imagenette2-160' and len(pages.asked) == 1


def test_fetch_an_archive_with_a_file_beside_its_folder(cub, publish, home, tmp_path):
    "As CUB's, with attributes.txt"
    (tmp_path/'attributes.txt').write_text('1 has_bill_shape\n')
    publish('cub200', {'CUB_200_2011.tgz': tar(cub, tmp_path/'attributes.txt')})
    dls = load_small('cub200')
    assert dls.info['fingerprint'] == load_small('cub200', path=cub).info['fingerprint']
    assert list(dls.vocab) == ['Black_footed_Albatross', 'Least_Tern'] and not left_over(home, 'CUB_200_2011')
    assert (home/'data'/'CUB_200_2011'/'attributes.txt').is_file()


def test_fetch_two_archives(dogs, publish, home):
    "As those of Stanford Dogs: a folder, and lists"
    pages = publish('stanford_dogs', {'images.tar': tar(dogs/'Images', mode='w'),
                                      'lists.tar': tar(*dogs.glob('*.mat'), mode='w')})
    dls = load_small('stanford_dogs')
    assert dls.info == load_small('stanford_dogs', path=dogs).info and dls.info['test'] == 36
    assert files_in(home/'data'/'stanford_dogs') == files_in(dogs) and not left_over(home, 'stanford_dogs')
    assert sorted(pages.asked) == ['images.tar', 'lists.tar']


def test_fetch_files_that_are_no_archives(publish, home):
    "As MNIST's: kept as they are"
    files = {f'{k}.gz': gzip.compress(v) for k, v in mnist_files().items()}
    pages = publish('mnist', files)
    dls = load_small('mnist')
    assert [len(o.dataset) for o in dls.loaders] == [58, 2, 20]
    assert files_in(home/'data'/'MNIST') == files and not left_over(home, 'MNIST')
    pages.clear()
    assert load_small('mnist').info == dls.info


def test_fetch_cifar(cifar, publish, home):
    publish('cifar10', {'cifar-10-binary.tar.gz': tar(cifar)})
    assert load_small('cifar10').info == load_small('cifar10', path=cifar).info


@pytest.mark.parametrize('wrong, says', [(dict(md5='0'*32), 'md5'), (dict(bytes=999), '999')])
def test_another_file_than_the_authors(wrong, says, nette, publish, home, web):
    "A sentence with the address and the way around, and no folder that looks complete; the right one works after it"
    publish('imagenette_160', {'imagenette2-160.tgz': nette[1]}, **wrong)
    refuses([f'{web.url}imagenette2-160.tgz', 'could not be fetched', says, '--data', 'RESNET_DATA'],
            load_small, 'imagenette_160')
    assert not (home/'data'/'imagenette2-160').exists() and not left_over(home)
    assert not [o for o in (home/'data').iterdir() if o.is_dir()]
    publish('imagenette_160', {'imagenette2-160.tgz': nette[1]})
    assert load_small('imagenette_160').info['train'] == 16


def test_second_archive_is_absent(dogs, publish, home):
    "Nothing that looks complete; when it is there, the first one is not fetched again"
    lists = tar(*dogs.glob('*.mat'), mode='w')
    pages = publish('stanford_dogs', {'images.tar': tar(dogs/'Images', mode='w'), 'lists.tar': lists})
    del pages['lists.tar']
    refuses(['lists.tar', '404', '--data'], data_path, 'stanford_dogs')
    assert not [o for o in (home/'data').iterdir() if o.is_dir()]
    pages['lists.tar'] = lists
    assert load_small('stanford_dogs').info['test'] == 36 and not left_over(home, 'stanford_dogs')
    assert Counter(pages.asked)['images.tar'] == 1


def test_the_second_address_of_a_file(publish, web, monkeypatch, home):
    pages = publish('mnist', {f'{k}.gz': gzip.compress(v) for k, v in mnist_files().items()})
    gone = lambda url: url.replace(web.url, f'{web.url}gone/')
    files = [dict(f, urls=[gone(f['urls'][0]), *f['urls']]) for f in CATALOGUE['mnist']['files']]
    monkeypatch.setitem(CATALOGUE, 'mnist', {**CATALOGUE['mnist'], 'files': files})
    assert load_small('mnist').info['train'] == 58 and len(pages.asked) == 8


def test_many_threads_at_once(nette, publish, home):
    pages = publish('imagenette_160', {'imagenette2-160.tgz': nette[1]})
    with ThreadPoolExecutor(8) as pool: paths = set(pool.map(data_path, ['imagenette_160']*8))
    assert paths == {home/'data'/'imagenette2-160'} and pages.asked == ['imagenette2-160.tgz']
    assert files_in(paths.pop()) == files_in(nette[0]) and not left_over(home, 'imagenette2-160')


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.skipif(sys.platform == 'win32', reason='processes are forked')
def test_many_processes_at_once(nette, publish, home):
    pages = publish('imagenette_160', {'imagenette2-160.tgz': nette[1]})

    def fetched(): sys.exit(0 if len(list(data_path('imagenette_160').rglob('*.png'))) == 24 else 1)
    processes = [multiprocessing.get_context('fork').Process(target=fetched) for _ in range(4)]
    for o in processes: o.start()
    for o in processes: o.join(60)
    assert [o.exitcode for o in processes] == [0]*4 and pages.asked == ['imagenette2-160.tgz']
    assert not left_over(home, 'imagenette2-160')


def test_two_addresses_with_the_same_file_name(publish, web, home, tmp_path):
    pages = publish('digits', {}) # only the server
    for place, classes in (('a', ('cat', 'dog')), ('b', ('cow', 'hen'))):
        pages[f'{place}/pets.tgz'] = tar(make_folder(tmp_path/place/'pets', classes))
    paths = {o: data_path(f'{web.url}{o}/pets.tgz') for o in 'ab'}
    assert paths['a'] != paths['b']
    for o, classes in (('a', ['cat', 'dog']), ('b', ['cow', 'hen'])):
        assert list(load_small(f'{web.url}{o}/pets.tgz').vocab) == classes
        assert list(load_small(paths[o]).vocab) == classes


def test_a_copy_goes_before_the_network(nette, publish, home, tmp_path, monkeypatch):
    pages = publish('imagenette_160', {'imagenette2-160.tgz': nette[1]})
    monkeypatch.setenv('RESNET_DATA', str(nette[0].parent))
    assert data_path('imagenette_160') == nette[0] and load_small('imagenette_160').info['train'] == 16
    assert not pages.asked and not home.exists()


# local copies

def test_local_archives_of_every_kind(folder, tmp_path, home):
    "Known by their content; two with the same name and another content are two"
    want = load_small(folder).info['fingerprint']
    for fmt in ('zip', 'tar', 'gztar', 'bztar', 'xztar'):
        packed = shutil.make_archive(tmp_path/fmt/'pets', fmt, folder.parent, folder.name)
        assert load_small(packed).info['fingerprint'] == want
    other = make_folder(tmp_path/'other', ('cow', 'hen'))
    packed = shutil.make_archive(tmp_path/'second'/'pets', 'zip', other)
    assert list(load_small(packed).vocab) == ['cow', 'hen']
    assert len([o for o in (home/'data').iterdir() if o.is_dir()]) == 6


@pytest.mark.parametrize('name', [*SHARED, 'digits'])
def test_wherever_a_copy_lies(name, tmp_path, monkeypatch):
    "An archive, its folder, the folder in it, and both under RESNET_DATA: the same data, the same fingerprint"
    if name == 'digits': archive = shutil.make_archive(tmp_path/'some', 'zip', data_path('digits'))
    else: archive = archive_of(name)
    folder = data_path(archive)
    inner = find_layout(folder)[0]
    known = CATALOGUE[name]['folder']
    (tmp_path/'folders').mkdir()
    (tmp_path/'folders'/known).symlink_to(inner)
    (tmp_path/'archives').mkdir()
    (tmp_path/'archives'/f'{known}.zip').symlink_to(archive)
    load = lambda **kw: get_data(name, 32, 32, 8, max_per_class=(2, 1), **kw).info
    monkeypatch.setattr(catalogue, 'fetch', None)
    infos = [load(path=o) for o in (archive, str(archive), folder, inner)]
    for place in ('folders', 'archives'):
        monkeypatch.setenv('RESNET_DATA', str(tmp_path/place))
        assert str(data_path(name)).startswith(str(tmp_path/'folders')) == (place == 'folders')
        infos.append(load())
    assert all(o == infos[0] for o in infos[1:])
    assert len(infos[0]['fingerprint']) == 64 and infos[0]['name'] == name
    other = get_data(name, 32, 32, 8, max_per_class=(1, 1), path=folder).info
    assert other['fingerprint'] != infos[0]['fingerprint']


def test_resnet_data_is_the_folder_above(photos, monkeypatch):
    monkeypatch.setenv('RESNET_DATA', str(photos.parent))
    assert data_path('imagenette_160') == photos
    dls = get_data('imagenette_160', presize=64, resize=64, bs=8, num_workers=0, device='cpu')
    assert dls.info['train'] == 240


@pytest.mark.parametrize('content', [b'', b'no archive', b'PK\x03\x04 and so on', b'\x1f\x8b'])
def test_archive_that_is_none(content, tmp_path, home):
    (tmp_path/'set.zip').write_bytes(content)
    refuses([tmp_path/'set.zip', 'archive'], load_small, tmp_path/'set.zip')
    assert not left_over(home) and not [o for o in home.rglob('set-*') if o.is_dir()]


def test_archive_without_a_dataset(tmp_path, home):
    with zipfile.ZipFile(tmp_path/'set.zip', 'w') as z: z.writestr('notes.txt', 'nothing here')
    refuses('train/<class>/ and val/<class>/', load_small, tmp_path/'set.zip')


def test_archive_under_resnet_data_that_is_none(tmp_path, home, monkeypatch):
    (tmp_path/'imagenette2-160.tgz').write_bytes(b'no archive')
    monkeypatch.setenv('RESNET_DATA', str(tmp_path))
    monkeypatch.setattr(catalogue, 'fetch', None)
    refuses([tmp_path/'imagenette2-160.tgz'], load_small, 'imagenette_160')


def test_the_layout_may_lie_two_levels_down(folder, tmp_path):
    want = load_small(folder).info['fingerprint']
    shutil.copytree(folder, tmp_path/'a'/'b'/'in'/'pets')
    assert load_small(tmp_path/'a'/'b'/'in').info['fingerprint'] == want
    assert load_small(tmp_path/'a'/'b').info['fingerprint'] == want
    refuses('train/<class>/', load_small, tmp_path/'a')


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
