"""The datasets: read from local copies, fetched by name, transformed as published, refused in one sentence."""
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import struct
import sys
import tarfile
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from fastai.vision.all import Pipeline, TensorImage, imagenet_stats
from PIL import Image
from resnet_nbdev import data
from resnet_nbdev.core import InputError
from resnet_nbdev.augment import image_tfms
from resnet_nbdev.catalogue import CATALOGUE, DEFAULTS, PLAIN, data_path, datasets, settings_of
from resnet_nbdev.data import class_counts
from resnet_nbdev.images import Picture, channel_stats, open_image
from resnet_nbdev.inspection import check_data, plot_counts
from resnet_nbdev.layouts import read_idx, read_images
from resnet_nbdev.runs import load_run
from scipy.io import loadmat, savemat

from conftest import make_folder, noise, shared_file

get_data = partial(data.get_data, num_workers=0)
load_small = partial(get_data, presize=16, resize=16, bs=4)


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close('all')


def refuses(says, call, *args, **kw):
    "One sentence that has all of `says`"
    with pytest.raises(InputError) as e: call(*args, **kw)
    assert '\n' not in str(e.value)
    for o in says if isinstance(says, list) else [says]: assert str(o) in str(e.value), (o, str(e.value))
    return str(e.value)


def png(seed, size=20):
    f = io.BytesIO()
    Image.fromarray(noise(seed, size)).save(f, 'PNG')
    return f.getvalue()


def idx(array, kind=8, zero=0):
    "An array of bytes in the format of http://yann.lecun.com/exdb/mnist"
    return struct.pack(f'>HBB{array.ndim}I', zero, kind, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def mnist_files(train=60, test=20, classes=10):
    "{name without .gz: content} of a small MNIST"
    files = {}
    for seed, (name, n) in enumerate((('train', train), ('t10k', test))):
        images = np.random.default_rng(seed).integers(0, 256, (n, 28, 28), dtype=np.uint8)
        files |= {f'{name}-images-idx3-ubyte': idx(images), f'{name}-labels-idx1-ubyte': idx(np.arange(n) % classes)}
    return files


def write_files(dest, files):
    for name, content in files.items():
        (dest/name).parent.mkdir(parents=True, exist_ok=True)
        (dest/name).write_bytes(content)
    return dest


@pytest.fixture
def mnist(tmp_path): return write_files(tmp_path/'MNIST'/'raw', mnist_files())


CIFAR_NAMES = 'airplane automobile bird cat deer dog frog horse ship truck'.split()


def cifar_files(n=20, batches=5):
    "{name: content} of CIFAR-10's binary version with `n` records a file; the arrays by file, and the labels"
    files, arrays = {'batches.meta.txt': ('\n'.join(CIFAR_NAMES) + '\n\n').encode()}, {}
    for i, name in enumerate([*(f'data_batch_{i+1}.bin' for i in range(batches)), 'test_batch.bin']):
        pixels = np.random.default_rng(i).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        labels = (np.arange(n) + i) % 10
        arrays[name] = pixels, labels
        # one byte for the class, then the red, the green and the blue plane, each row by row
        files[name] = b''.join(bytes([c]) + b''.join(p[..., k].tobytes() for k in range(3))
                               for p, c in zip(pixels, labels.tolist()))
    return files, arrays


@pytest.fixture
def cifar(tmp_path): return write_files(tmp_path/'cifar-10-batches-bin', cifar_files()[0])


def cub_files(classes=('001.Black_footed_Albatross', '002.Least_Tern'), n=20, flags=None, absent=()):
    "{name: content} of a small CUB-200-2011; every third image is in the test set"
    names = [f'{c}/{i:03}.png' for c in classes for i in range(n)]
    flags = flags or [int(i % 3 > 0) for i in range(len(names))]
    table = lambda values: ''.join(f'{i} {v}\n' for i, v in enumerate(values, 1)).encode()
    files = {f'images/{o}': png(i) for i, o in enumerate(names) if o not in absent}
    return {'images.txt': table(names), 'train_test_split.txt': table(flags), **files}


@pytest.fixture
def cub(tmp_path): return write_files(tmp_path/'CUB_200_2011', cub_files())


def dog_files(dest, classes=('n02085620-Chihuahua', 'n02085782-Japanese_spaniel'), train=8, test=20):
    "A small Stanford Dogs, with lists as the authors' MATLAB wrote them"
    for k, (split, n) in enumerate((('train', train), ('test', test))):
        names = [f'{c}/{c.split("-")[0]}_{k}{i:03}.jpg' for c in classes for i in range(n)]
        write_files(dest/'Images', {o: png(1000*k + i) for i, o in enumerate(names)})
        cells = np.empty((len(names), 1), object)
        cells[:, 0] = names
        savemat(dest/f'{split}_list.mat', {'file_list': cells, 'labels': np.repeat([[1], [2]], n, 0)})
    return dest


@pytest.fixture
def dogs(tmp_path): return dog_files(tmp_path/'stanford_dogs')


# the datasets themselves, as far as the shared folder holds them

SHARED = { # name: (archive, classes, images by split)
    'imagenette_160': ('imagenette2-160.zip', 10, dict(train=9469, val=3925)),
    'miniplaces': ('miniplaces-20.zip', 20, dict(train=20*150, val=20*50)),
    'mnist': ('mnist.zip', 10, dict(train=58_000, val=2000, test=10_000)),
    'stanford_dogs': ('stanford_dogs-mini.zip', 120, dict(train=1800, val=60, test=540)),
    'cub200': ('CUB_200_2011-100.zip', 100, dict(train=2612, val=291, test=1200))}
WNIDS = 'n03394916 n03888257 n03425413 n02102040 n03417042 n02979186 n01440764 n03445777 n03000684 n03028079'.split()
ENGLISH = ['French_horn', 'parachute', 'gas_pump', 'English_springer', 'garbage_truck', 'cassette_player', 'tench',
           'golf_ball', 'chain_saw', 'church']


def archive_of(name): return shared_file(SHARED[name][0])


def raw_mnist(folder, name, offset):
    return np.frombuffer(gzip.decompress((folder/f'{name}-ubyte.gz').read_bytes()), np.uint8, offset=offset)


def class_of(name, item):
    "The class of an image by another way than the reader's"
    if name == 'imagenette_160': return dict(zip(WNIDS, ENGLISH))[item.parent.name]
    if name == 'mnist':
        part = item.file.name.split('-')[0]
        return str(raw_mnist(item.file.parent, f'{part}-labels-idx1', 8)[item.i])
    return item.parent.name[dict(cub200=4, stanford_dogs=10).get(name, 0):]


@pytest.mark.parametrize('name', SHARED)
def test_splits_of(name):
    file, n_classes, splits = SHARED[name]
    table = read_images(data_path(archive_of(name)), labels=settings_of(name)['labels'])
    assert table.split.value_counts().to_dict() == splits
    assert table.label.nunique() == table.folder.nunique() == n_classes
    assert not [o for o in table.label.unique() if re.match(r'n\d{8}|\d+\.', o)]
    assert table['item'].nunique() == len(table)


def test_imagenette_by_class():
    table = read_images(data_path(archive_of('imagenette_160')), labels=CATALOGUE['imagenette_160']['labels'])
    counts = pd.crosstab(table.folder, table.split).loc[WNIDS]
    assert counts.train.tolist() == [956, 960, 931, 955, 961, 993, 963, 951, 858, 941]
    assert counts.val.tolist() == [394, 390, 419, 395, 389, 357, 387, 399, 386, 409]
    assert dict(zip(table.folder, table.label)) == dict(zip(WNIDS, ENGLISH))


def test_miniplaces_by_class():
    table = read_images(data_path(archive_of('miniplaces')))
    counts = pd.crosstab(table.label, table.split)
    assert (counts.train == 150).all() and (counts.val == 50).all()


def test_mnist_by_place():
    "Validation is the last 2,000 of the training images; labels and pixels are those at their place"
    table = read_images(data_path(archive_of('mnist')))
    file = lambda o: o.file.name.split('-')[0]
    places = {o: [(file(i), i.i) for i in table['item'][table.split == o]] for o in ('train', 'val', 'test')}
    assert places == dict(train=[('train', i) for i in range(58_000)], test=[('t10k', i) for i in range(10_000)],
                          val=[('train', i) for i in range(58_000, 60_000)])
    folder = table['item'][0].file.parent
    labels = np.concatenate([raw_mnist(folder, f'{o}-labels-idx1', 8) for o in ('train', 't10k')])
    assert (table.label.astype(int).to_numpy() == labels).all()
    pixels = np.concatenate([raw_mnist(folder, f'{o}-images-idx3', 16) for o in ('train', 't10k')]).reshape(-1, 28, 28)
    for i in range(0, 70_000, 1777): assert (table['item'][i].pixels == pixels[i]).all()


def test_cub_by_the_authors_lists():
    "train_test_split.txt holds, and every tenth training image is for validation"
    table = read_images(folder := data_path(archive_of('cub200')))
    root = folder/'CUB_200_2011'
    lists = {o: dict(l.split() for l in (root/f'{o}.txt').read_text().splitlines())
             for o in ('images', 'train_test_split', 'classes', 'image_class_labels')}
    training = [i for i, flag in lists['train_test_split'].items() if flag == '1']
    val = training[::10]
    want = {o: 'test' for o in lists['images']} | {o: 'train' for o in training} | {o: 'val' for o in val}
    assert table.split.tolist() == [want[o] for o in lists['images']]
    assert [str(o.relative_to(root/'images')) for o in table['item']] == list(lists['images'].values())
    classes = [lists['classes'][lists['image_class_labels'][i]] for i in lists['images']]
    assert table.folder.tolist() == classes and table.label.tolist() == [o.split('.')[1] for o in classes]


def test_dogs_by_the_authors_lists():
    table = read_images(folder := data_path(archive_of('stanford_dogs')))
    lists = {o: loadmat(folder/'stanford_dogs'/f'{o}_list.mat') for o in ('train', 'test')}
    files = {k: [o[0][0] for o in v['file_list']] for k, v in lists.items()}
    told = {o: [f'{i.parent.name}/{i.name}' for i in table['item'][table.split == o]] for o in ('train', 'val', 'test')}
    assert told['train'] == files['train'] and told['val'] == files['test'][::10]
    assert told['test'] == [o for i, o in enumerate(files['test']) if i % 10]
    numbers = dict(zip(sum(files.values(), []), np.concatenate([o['labels'].ravel() for o in lists.values()])))
    pairs = {(numbers[f'{i.parent.name}/{i.name}'], label) for i, label in zip(table['item'], table.label)}
    assert len(pairs) == 120, 'a breed is one number of the authors and one name'


@pytest.mark.parametrize('name', [*SHARED, 'digits'])
def test_batches_of(name):
    "By the dataset's own settings: shapes, classes, values in the range of the statistics, a test set if there is one"
    path = None if name == 'digits' else archive_of(name)
    conf = settings_of(name)
    dls = get_data(name, bs=8, path=path, max_per_class=(2, 1))
    info, side = dls.info, conf['resize']
    splits = ['train', 'val', 'test'] if info['test'] else ['train', 'val']
    assert [len(o.dataset) for o in dls.loaders] == [info[o] for o in splits]
    assert len(dls.loaders) == (2 if name in ('imagenette_160', 'miniplaces', 'digits') else 3)
    assert list(dls.vocab) == info['vocab'] == sorted(info['vocab'])
    means, stds = {'imagenet': imagenet_stats, 'none': ([0]*3, [1]*3)}.get(conf['stats'], info['stats'])
    low, high = ((torch.tensor(o) - torch.tensor(means))/torch.tensor(stds) for o in ([0.]*3, [1.]*3))
    table = read_images(data_path(path or name), labels=conf['labels'])
    split_of = dict(zip(table['item'].map(str), table.split))
    for dl, split in zip(dls.loaders, splits):
        xb, yb = dl.one_batch()
        assert xb.shape == (len(yb), 3, side, side) and yb.dtype == torch.int64 and xb.dtype == torch.float32
        values = xb.as_subclass(torch.Tensor).transpose(0, 1).flatten(1).cpu()
        assert (values.amin(1) >= low - 1e-4).all() and (values.amax(1) <= high + 1e-4).all()
        assert (values.std(1) > .02).all(), 'not a picture'
        assert {split_of[str(o)] for o in dl.items} == {split}
        if split == 'train': continue
        for item, y in zip(dl.items, yb): # in their order
            assert dls.vocab[y] == class_of(name, item)
    dls.show_batch(max_n=4)
    plt.gcf().canvas.draw()
    counts = class_counts(dls)
    assert counts.sum().to_dict() == {o: info[o] for o in splits} and list(counts.index) == info['vocab']


def test_a_batch_of_mnist_is_the_file_in_a_black_frame():
    dls = get_data('mnist', path=archive_of('mnist'), max_per_class=2, bs=8)
    for dl in dls.loaders[1:]:
        xb, _ = dl.one_batch()
        for item, x in zip(dl.items, xb):
            want = np.pad(item.pixels, 2)/np.float32(255)
            assert all(np.allclose(channel, want, atol=1e-6) for channel in x.cpu().numpy())


@pytest.mark.parametrize('name', [*SHARED, 'digits'])
def test_wherever_a_copy_lies(name, tmp_path, monkeypatch):
    "An archive, its folder, the folder in it, and both under RESNET_DATA: the same data, the same fingerprint"
    if name == 'digits': archive = shutil.make_archive(tmp_path/'some', 'zip', data_path('digits'))
    else: archive = archive_of(name)
    folder = data_path(archive)
    inner = data.find_layout(folder)[0]
    known = CATALOGUE[name]['folder']
    (tmp_path/'folders').mkdir()
    (tmp_path/'folders'/known).symlink_to(inner)
    (tmp_path/'archives').mkdir()
    (tmp_path/'archives'/f'{known}.zip').symlink_to(archive)
    load = lambda **kw: get_data(name, 32, 32, 8, max_per_class=(2, 1), **kw).info
    monkeypatch.setattr(data, 'fetch', None)
    infos = [load(path=o) for o in (archive, str(archive), folder, inner)]
    for place in ('folders', 'archives'):
        monkeypatch.setenv('RESNET_DATA', str(tmp_path/place))
        assert str(data_path(name)).startswith(str(tmp_path/'folders')) == (place == 'folders')
        infos.append(load())
    assert all(o == infos[0] for o in infos[1:])
    assert len(infos[0]['fingerprint']) == 64 and infos[0]['name'] == name
    other = get_data(name, 32, 32, 8, max_per_class=(1, 1), path=folder).info
    assert other['fingerprint'] != infos[0]['fingerprint']


# files that hold many images

@pytest.mark.parametrize('packed', [False, True])
def test_idx_is_read_pixel_for_pixel(packed, tmp_path):
    files = mnist_files(train=60, test=20)
    end = '.gz' if packed else ''
    write_files(tmp_path, {f'{k}{end}': gzip.compress(v) if packed else v for k, v in files.items()})
    table = read_images(tmp_path)
    assert table.split.tolist() == ['train']*58 + ['val']*2 + ['test']*20
    assert table.label.tolist() == [str(i % 10) for i in [*range(60), *range(20)]]
    want = b''.join(v[16:] for k, v in files.items() if 'images' in k)
    assert b''.join(o.pixels.tobytes() for o in table['item']) == want
    image = np.asarray(open_image(table['item'][7]))
    assert image.shape == (28, 28, 3) and (image == table['item'][7].pixels[..., None]).all()
    assert (read_idx(tmp_path/f'train-labels-idx1-ubyte{end}') == np.arange(60) % 10).all()


def test_idx_of_other_shapes(tmp_path):
    for shape in ((3,), (2, 3), (2, 3, 4), (2, 3, 4, 5)):
        want = np.arange(np.prod(shape)).reshape(shape)
        (tmp_path/'a').write_bytes(idx(want))
        assert (read_idx(tmp_path/'a') == want).all() and read_idx(tmp_path/'a').shape == shape


LABELS = idx(np.arange(9))
BAD_IDX = dict(
    empty=b'', four_bytes=LABELS[:4], no_values=LABELS[:8], cut=LABELS[:-1], longer=LABELS + b'\0', text=b'no idx file',
    other_type=idx(np.arange(9), kind=9), floats=idx(np.arange(9), kind=13), magic=idx(np.arange(9), zero=1),
    no_dimension=struct.pack('>HBB', 0, 8, 0) + b'\1', many=struct.pack('>HBB', 0, 8, 200) + bytes(800),
    huge=struct.pack('>HBBII', 0, 8, 2, 2**32 - 1, 2**32 - 1) + b'\0', half_gz=gzip.compress(LABELS)[:20],
    bad_gz=gzip.compress(LABELS)[:-6] + b'\0'*6, gz_of_text=gzip.compress(b'no idx file'), gz_start=b'\x1f\x8b')


@pytest.mark.parametrize('kind', BAD_IDX)
def test_bad_idx_file(kind, mnist):
    path = mnist/'train-labels-idx1-ubyte'
    path.write_bytes(BAD_IDX[kind])
    refuses([path, 'is no whole idx file'], read_idx, path)
    refuses([path, 'is no whole idx file'], load_small, mnist)


def test_idx_files_that_do_not_fit(mnist):
    labels = mnist/'t10k-labels-idx1-ubyte'
    whole = labels.read_bytes()
    for other in (idx(np.arange(19)), idx(np.arange(21)), idx(np.zeros((20, 1)))):
        labels.write_bytes(other)
        refuses(['t10k-images-idx3-ubyte', 't10k-labels-idx1-ubyte', 'do not fit', '(20, 28, 28)'], load_small, mnist)
    labels.write_bytes(whole)
    (mnist/'t10k-images-idx3-ubyte').write_bytes(idx(np.zeros((20, 784))))
    refuses(['do not fit', '(20, 784)'], load_small, mnist)


@pytest.mark.parametrize('name', ['train-labels-idx1-ubyte', 't10k-images-idx3-ubyte', 't10k-labels-idx1-ubyte'])
def test_idx_file_that_is_absent(name, mnist):
    (mnist/name).unlink()
    refuses([mnist, 'lacks', name], load_small, mnist)


def test_a_single_idx_file_stands_for_all(mnist):
    want = load_small('mnist', path=mnist).info
    for o in mnist.iterdir(): assert load_small('mnist', path=o).info == want
    assert len(load_small(mnist/'train-images-idx3-ubyte').loaders) == 3


def test_cifar_is_read_pixel_for_pixel(tmp_path):
    files, arrays = cifar_files(n=20)
    table = read_images(write_files(tmp_path/'cifar-10-batches-bin', files))
    assert table.split.value_counts().to_dict() == dict(train=90, val=10, test=20)
    assert [i for i, o in enumerate(table.split) if o == 'val'] == list(range(0, 100, 10))
    assert (table.split[100:] == 'test').all()
    order = [f'data_batch_{i}.bin' for i in range(1, 6)] + ['test_batch.bin']
    for i, o in enumerate(table['item']):
        pixels, labels = arrays[order[i//20]]
        assert o.file.name == order[i//20] and o.i == i % 20
        assert (np.asarray(open_image(o)) == pixels[i % 20]).all(), 'channels, rows and columns at their place'
        assert table.label[i] == CIFAR_NAMES[labels[i % 20]]


def test_batches_of_cifar(cifar):
    "Validation and test images are the file's pixels with the paper's frame cut off again"
    dls = get_data('cifar10', path=cifar, bs=8)
    train, val, test = dls.loaders
    assert train.one_batch()[0].shape == (8, 3, 32, 32) and list(dls.vocab) == CIFAR_NAMES
    means, stds = (torch.tensor(o)[:, None, None] for o in channel_stats(dls.train_ds.items))
    assert dls.info['stats'] == channel_stats(dls.train_ds.items)
    for dl in (val, test):
        for item, x, y in zip(dl.items, *dl.one_batch()):
            want = torch.from_numpy(item.pixels.copy()).permute(2, 0, 1)/255
            assert torch.allclose(x.as_subclass(torch.Tensor).cpu()*stds + means, want, atol=1e-4)
            assert dls.vocab[y] == item.label
    dls.show_batch(max_n=4)


def test_bad_cifar_files(cifar):
    path, names = cifar/'data_batch_3.bin', cifar/'batches.meta.txt'
    whole, told = path.read_bytes(), names.read_bytes()
    for content in (whole[:-1], whole + b'\0', whole[:100]):
        path.write_bytes(content)
        refuses([path, f'{len(content):,} bytes', 'no multiple of 3,073'], load_small, cifar)
    path.write_bytes(b'\x0a' + whole[1:])
    refuses([path, 'a class 10', 'names 10'], load_small, cifar)
    path.write_bytes(whole)
    names.write_text('airplane automobile\n')
    refuses(['has a class 9', 'names 2'], load_small, cifar)
    names.unlink()
    refuses([cifar, 'batches.meta.txt'], load_small, cifar)
    names.write_bytes(told)
    (cifar/'test_batch.bin').unlink()
    refuses([cifar, 'test_batch.bin'], load_small, cifar)


# the catalogue

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
    full = {k: {**data.AUGMENT, **settings_of(k)['augment']} for k in CATALOGUE}
    flips = lambda o: (full[o]['hflip'], full[o]['vflip'])
    assert flips('miniplaces') == (.25, .25) and flips('stanford_dogs') == (.5, .5)
    assert full['miniplaces']['max_rotate'] == 15 and full['stanford_dogs']['max_rotate'] == .2*360
    assert full['stanford_dogs']['max_contrast'] == .2 and full['miniplaces']['max_contrast'] == 0
    for o in ('miniplaces', 'stanford_dogs'):
        assert (full[o]['p_affine'], full[o]['max_zoom'], full[o]['max_warp'], full[o]['max_lighting']) == (1, 1, 0, 0)
    assert full['mnist'] == {**data.AUGMENT, **PLAIN}
    assert full['cub200']['max_rotate'] == 5 and full['cifar10']['crop'] is True


# fetching by name

@pytest.fixture
def home(tmp_path, monkeypatch):
    "Where datasets go in this test, in place of fastai's folders"
    monkeypatch.setattr(data, 'fastai_path', lambda kind: tmp_path/'home'/kind)
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


def tar(*paths, mode='w:gz'):
    f = io.BytesIO()
    with tarfile.open(fileobj=f, mode=mode) as t:
        for o in paths: t.add(o, o.name)
    return f.getvalue()


def files_in(folder): return {str(o.relative_to(folder)): o.read_bytes() for o in folder.rglob('*') if o.is_file()}


def left_over(home, *folders):
    "What is under `home` besides those data folders, locks, and versions of files that were fetched in part"
    made = [home/'data'/o for o in folders]
    return [o for o in home.rglob('*') if o.is_file() and not any(m in o.parents for m in made)
            and not (o.name.endswith('.lock') and not o.stat().st_size) and not o.name.endswith('.part.etag')]


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


# what happens to an image

def to_batch(*arrays): return TensorImage(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)/255)


def augmented(x, augment, presize=None, split=0, **kw):
    "What training (`split` 0) or validation (1) makes of a batch of square images; statistics are left out"
    tfms = image_tfms(presize or x.shape[-1], kw.pop('resize', x.shape[-1]), augment, stats=kw.pop('stats', 'none'))[1]
    return Pipeline(tfms, split_idx=split)(x).as_subclass(torch.Tensor)


def corners(x):
    "Where the one bright quadrant of each image has gone: names of (upper or lower, left or right)"
    half = x.shape[-1]//2
    sums = torch.stack([x[:, 0, i*half:(i+1)*half, j*half:(j+1)*half].mean((1, 2)) for i in (0, 1) for j in (0, 1)], 1)
    assert (sums.amax(1) > .9).all()
    return sums.argmax(1)


@pytest.mark.parametrize('hflip, vflip', [(.25, .25), (.5, .5), (.7, .1), (1, 0), (0, 1), (None, .3), (.3, None)])
def test_flips_come_as_often_as_said(hflip, vflip):
    "Of both kinds together, too: they are independent. The bright quadrant begins at the upper left"
    torch.manual_seed(0)
    n = 4000
    x = TensorImage(torch.zeros(n, 3, 8, 8))
    x[:, :, :4, :4] = 1
    places = corners(augmented(x, {**PLAIN, 'hflip': hflip, 'vflip': vflip}))
    h, v = hflip or 0, vflip or 0
    for place, p in enumerate(((1-h)*(1-v), h*(1-v), (1-h)*v, h*v)): # upper left, upper right, lower left, lower right
        count = (places == place).sum().item()
        assert abs(count - n*p) <= 4*(n*p*(1-p))**.5, (place, count, n*p)


def test_a_flip_moves_every_pixel_to_its_place():
    x = to_batch(noise(3, 8))
    for kw, axes in ((dict(hflip=1), [3]), (dict(vflip=1), [2]), (dict(hflip=1, vflip=1), [2, 3])):
        assert torch.allclose(augmented(x, {**PLAIN, **kw}), x.flip(axes).as_subclass(torch.Tensor), atol=1e-5)


def test_validation_is_not_flipped():
    x = to_batch(noise(3, 8))
    kw = dict(hflip=1, vflip=1, max_contrast=.9, p_lighting=1, max_rotate=90, p_affine=1, crop=True)
    assert torch.allclose(augmented(x, {**PLAIN, **kw}, split=1), x.as_subclass(torch.Tensor), atol=1e-5)


def test_crop_is_a_window_of_the_image():
    "Its pixels to a thousandth of a level, anywhere in it, and in validation the middle"
    same = partial(torch.allclose, rtol=0, atol=1e-3/255)
    x, places = to_batch(noise(4, 40), noise(5, 40)), Counter()
    plain = x.as_subclass(torch.Tensor)
    torch.manual_seed(0)
    np.random.seed(0)
    for _ in range(150):
        out = augmented(x, {**PLAIN, 'crop': True}, resize=32)
        found = [(i, j) for i in range(9) for j in range(9) if same(plain[:, :, i:i+32, j:j+32], out)]
        assert out.shape == (2, 3, 32, 32) and len(found) == 1
        places[found[0]] += 1
    rows, columns = zip(*places)
    assert min(rows) == min(columns) == 0 and max(rows) == max(columns) >= 7 and len(places) > 40
    assert same(augmented(x, {**PLAIN, 'crop': True}, resize=32, split=1), plain[:, :, 4:36, 4:36])


def test_crop_of_every_size():
    "No rounding makes the window a pixel smaller, so that it would be scaled"
    for presize in range(30, 50):
        x = TensorImage(torch.rand(1, 3, presize, presize))
        for resize in range(24, presize + 1, 7):
            tfm, = (o for o in image_tfms(presize, resize, {**PLAIN, 'crop': True})[1] if hasattr(o, 'valid_scale'))
            for split in (0, 1):
                tfm.before_call(x, split)
                assert tuple(tfm.cp_size) == (resize, resize), (presize, resize, split)


def test_crop_and_flip_of_cifar():
    "Section 4.2 of the ResNet paper: 4 pixels of padding, a crop of 32, and a flip from left to right in half of them"
    conf = settings_of('cifar10')
    im = image_tfms(conf['presize'], 32, conf['augment'], conf['fit'])[0][0](open_image(noise(6, 32)), split_idx=0)
    padded = np.asarray(im)
    assert (padded[4:36, 4:36] == noise(6, 32)).all() and padded.sum() == noise(6, 32).sum()
    x = to_batch(padded)
    plain, kinds = x.as_subclass(torch.Tensor), Counter()
    windows = {f: [o[:, :, i:i+32, j:j+32] for i in range(9) for j in range(9)]
               for f, o in dict(no=plain, yes=plain.flip(3)).items()}
    for _ in range(40):
        out = augmented(x, conf['augment'], presize=40, resize=32)
        found = [f for f, ws in windows.items() if any(torch.allclose(w, out, atol=1e-4) for w in ws)]
        assert len(found) == 1
        kinds[found[0]] += 1
    assert min(kinds['no'], kinds['yes']) > 5


def fitted(fit, array, size, split=1):
    tfm, = image_tfms(size, size, PLAIN, fit)[0]
    return np.asarray(tfm(open_image(array), split_idx=split))


@pytest.mark.parametrize('split', [0, 1])
def test_croppad_centres_in_black(split):
    tall = noise(7, 28)[:, :14]
    out = fitted('croppad', tall, 32, split)
    want = np.zeros((32, 32, 3), np.uint8)
    want[2:30, 9:23] = tall
    assert (out == want).all()
    assert (fitted('croppad', noise(7, 28), 20, split) == noise(7, 28)[4:24, 4:24]).all(), 'larger ones are cut'


@pytest.mark.parametrize('split', [0, 1])
@pytest.mark.parametrize('wide', [False, True])
def test_pad_centres_in_black(wide, split):
    "All of the image is there, at its proportions, and black beside it, in training too, as S4 has it"
    im = np.full((20, 40, 3), 200, np.uint8)
    for _ in range(5):
        out = fitted('pad', im if wide else im.transpose(1, 0, 2), 32, split)
        if not wide: out = out.transpose(1, 0, 2)
        # Lanczos reaches 3 pixels over the edges, at 8 and 24
        assert not out[:5].any() and not out[27:].any() and (out[11:21] == 200).all()
        assert (abs(out[[7, 8, 23, 24]].astype(int).sum(0) - 400) < 20).all()


def test_pad_is_lanczos():
    "S4's filter, not Pillow's default for photos"
    big = noise(8, 90)
    assert (fitted('pad', big, 30) == np.asarray(Image.fromarray(big).resize((30, 30), Image.LANCZOS))).all()


def test_squish_and_crop():
    half = np.zeros((20, 40, 3), np.uint8)
    half[:, 20:] = 255
    out = fitted('squish', half, 20)
    assert (out[:, :9] == 0).all() and (out[:, 11:] == 255).all(), 'all of it'
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, 10:30] = 255
    assert (fitted('crop', wide, 20) == 255).all(), 'the middle'


def test_contrast_keeps_mid_grey():
    torch.manual_seed(0)
    contrast = {**PLAIN, 'max_contrast': .2, 'p_lighting': 1}
    grey = TensorImage(torch.full((50, 3, 4, 4), .5))
    assert torch.allclose(augmented(grey, contrast), grey.as_subclass(torch.Tensor), atol=1e-6)
    light, dark = (augmented(TensorImage(torch.full((50, 3, 4, 4), o)), contrast)[:, 0, 0, 0] for o in (.8, .2))
    assert light.min() < .78 and light.max() > .82 and ((light > .5) & (light < 1)).all()
    assert len(light.unique()) > 40 and dark.min() < .18 and dark.max() > .22
    none = TensorImage(torch.full((4, 3, 4, 4), .8))
    assert torch.equal(augmented(none, PLAIN), none.as_subclass(torch.Tensor))


@pytest.mark.parametrize('split', [0, 1])
def test_plain_changes_nothing(split):
    x = to_batch(noise(1, 16), noise(2, 16))
    assert torch.allclose(augmented(x, PLAIN, split=split), x.as_subclass(torch.Tensor), atol=1e-6)


def test_statistics_that_are_used():
    x = to_batch(noise(1, 16))
    plain = x.as_subclass(torch.Tensor)
    norm = lambda means, stds: (plain - torch.tensor(means)[:, None, None])/torch.tensor(stds)[:, None, None]
    apply = lambda stats: augmented(x.clone(), PLAIN, stats=stats)
    assert torch.allclose(apply('none'), plain, atol=1e-6) and plain.max() <= 1 and plain.min() >= 0
    assert torch.allclose(apply('imagenet'), norm(*imagenet_stats), atol=1e-5)
    assert torch.allclose(apply(([.1, .2, .3], [.4, .5, .6])), norm([.1, .2, .3], [.4, .5, .6]), atol=1e-5)


@pytest.mark.parametrize('kw, says', [
    (dict(augment=dict(max_turn=1)), ['unknown augmentation max_turn', 'max_rotate', 'hflip']),
    (dict(augment=dict(hflip=1.5)), ['hflip is a probability', '1.5']),
    (dict(augment=dict(vflip=-.1)), ['vflip is a probability', '-0.1']),
    (dict(augment=dict(hflip=float('nan'))), ['hflip must be a number', 'nan']),
    (dict(augment=dict(vflip='x')), ['vflip must be a number', "'x'"]),
    (dict(augment=dict(max_rotate=None)), ['max_rotate must be a number', 'None']),
    (dict(augment=dict(max_contrast=1)), ['max_contrast must be at least 0 and below 1', '1']),
    (dict(stats=([.5]*3,)), ['three means']), (dict(stats=([.5]*3, [.1, 0, .1])), ['three means']),
    (dict(stats=([.5], [.5])), ['three means']), (dict(stats=5), ['three means', '5']),
    (dict(augment=dict(min_scale=0)), ['min_scale']), (dict(augment=dict(max_zoom=0)), ['zooms']),
    (dict(fit='stretch'), ["unknown fit 'stretch'", 'crop', 'squish', 'pad', 'croppad']),
    (dict(stats='cifar'), ["'cifar'", 'imagenet', 'none', 'own'])])
def test_settings_that_are_refused(kw, says, folder, monkeypatch):
    "By the transforms, and before a download"
    refuses(says, image_tfms, 16, 16, **kw)
    refuses(says, load_small, folder, **kw)
    monkeypatch.setattr(data, 'fetch', None)
    refuses(says, load_small, 'imagewoof', **kw)


def test_settings_of_a_call_go_before_those_of_the_dataset(mnist):
    info = get_data('mnist', 40, 36, 4, path=mnist, augment=dict(do_flip=False), fit='squish', stats='imagenet').info
    assert [info[k] for k in ('presize', 'resize', 'bs', 'augment', 'fit', 'stats')] == \
        [40, 36, 4, dict(do_flip=False), 'squish', 'imagenet']
    own = load_small('mnist', path=mnist, stats='own')
    assert own.info['stats'] == channel_stats(own.train_ds.items)


# mean and spread

def stats_by_numpy(arrays):
    x = np.concatenate([(o if o.ndim == 3 else np.repeat(o[..., None], 3, 2)).reshape(-1, 3) for o in arrays])/255.
    return x.mean(0), x.std(0)


def test_stats_of_images_of_all_sizes(tmp_path):
    "Each pixel counts once, so a larger image counts for more; files as arrays"
    arrays = [noise(i, 5 + 9*i)//(i + 1) for i in range(6)] + [noise(9, 30)[:7]]
    for i, o in enumerate(arrays): Image.fromarray(o).save(tmp_path/f'{i}.png')
    got, want = channel_stats(arrays), stats_by_numpy(arrays)
    assert np.allclose(got, want, atol=5.1e-5) and channel_stats(sorted(tmp_path.iterdir())) == got
    assert not np.allclose(got[0], np.mean([stats_by_numpy([o])[0] for o in arrays], 0), atol=1e-3)


def test_stats_of_grey_and_constant_images():
    grey = [noise(i, 10 + i)[..., 0] for i in range(3)]
    means, stds = channel_stats(grey)
    assert len(set(means)) == len(set(stds)) == 1 and np.allclose((means, stds), stats_by_numpy(grey), atol=5.1e-5)
    for level in (0, 77, 255):
        assert channel_stats([np.full((50, 30, 3), level, np.uint8)]*5) == ([round(level/255, 4)]*3, [0.]*3)
    colour = np.zeros((4, 4, 3), np.uint8) + np.array([255, 51, 0], np.uint8)
    assert channel_stats([colour]) == ([1, .2, 0], [0]*3)
    picture = Picture('a', 0, grey[0], 'x')
    assert channel_stats([picture]) == channel_stats([grey[0]])


def test_stats_of_very_many_pixels():
    "Sums beyond what 32 bits hold, in whole numbers or in floats; one dark pixel among 9 million"
    arrays = [np.full((3000, 1000, 3), 255, np.uint8) for _ in range(3)]
    arrays[1][0, 0] = 0
    arrays[2][:, ::2] = 253
    n, q, s = 9_000_000, 255**2*(7_500_000 - 1) + 253**2*1_500_000, 255*(7_500_000 - 1) + 253*1_500_000
    mean, std = s/n, (q/n - (s/n)**2)**.5
    assert channel_stats(arrays) == ([round(mean/255, 4)]*3, [round(std/255, 4)]*3)
    many = [Picture('a', i, noise(i, 12)[..., 0], 'x') for i in range(2000)]
    assert np.allclose(channel_stats(many), stats_by_numpy([o.pixels for o in many]), atol=5.1e-5)


# wrong labels on purpose

@pytest.fixture
def noisy(tmp_path):
    "A folder of Imagenette with noisy_imagenette.csv as its authors made it; with 50 %, every second label is wrong"
    folder = make_folder(tmp_path/'imagenette2-160', WNIDS[:2])
    rows = []
    for f in sorted(folder.rglob('*.png')):
        split, label = f.parts[-3:-1]
        other = WNIDS[WNIDS[:2].index(label) ^ 1]
        i, is_val = int(f.stem), split == 'val'
        wrong = lambda every: label if is_val or i % every else other
        rows.append([f'{split}/{label}/{f.name}', label, wrong(8), wrong(8), wrong(4), wrong(2), is_val])
    columns = ['path', *(f'noisy_labels_{o}' for o in (0, 1, 5, 25, 50)), 'is_valid']
    pd.DataFrame(rows, columns=columns).to_csv(folder/'noisy_imagenette.csv', index=False)
    return folder


def told_labels(dl): return [dl.vocab[int(y)] for y in dl.dataset.tls[1]]


def test_noise_changes_training_labels_only(noisy):
    csv = pd.read_csv(noisy/'noisy_imagenette.csv').set_index('path')
    names = dict(zip(WNIDS, ENGLISH))
    seen = {}
    for level, n_wrong in ((None, 0), (0, 0), (1, 2), (5, 2), (25, 4), (50, 8)):
        dls = load_small('imagenette_160', path=noisy, noise=level)
        listed = [csv.loc[str(o.relative_to(noisy)), f'noisy_labels_{level or 0}'] for o in dls.train_ds.items]
        assert told_labels(dls.train) == [names[o] for o in listed]
        assert sum(o.parent.name != l for o, l in zip(dls.train_ds.items, listed)) == n_wrong
        assert told_labels(dls.valid) == [names[o.parent.name] for o in dls.valid_ds.items]
        assert list(dls.vocab) == dls.info['vocab'] == ['French_horn', 'parachute']
        assert dls.info['noise'] == (level or 0)
        seen.setdefault(dls.info['fingerprint'], []).append(level)
    assert list(seen.values()) == [[None, 0], [1, 5], [25], [50]], 'those with the same labels have the same'


def test_noise_in_a_list_of_validation_labels(noisy):
    "A file that has it would not change them"
    table = pd.read_csv(noisy/'noisy_imagenette.csv')
    table.loc[table.is_valid, 'noisy_labels_50'] = WNIDS[0]
    table.to_csv(noisy/'noisy_imagenette.csv', index=False)
    dls = load_small(noisy, noise=50)
    assert told_labels(dls.valid) == [dict(zip(WNIDS, ENGLISH))[o.parent.name] for o in dls.valid_ds.items]
    assert len(set(told_labels(dls.valid))) == 2


def test_noise_on_a_part(noisy):
    dls = load_small(noisy, noise=50, max_per_class=4)
    got = [dls.vocab[int(y)] != dict(zip(WNIDS, ENGLISH))[o.parent.name]
           for o, y in zip(dls.train_ds.items, dls.train_ds.tls[1])]
    assert got == [int(o.stem) % 2 == 0 for o in dls.train_ds.items] and len(got) == 8


def test_noise_that_is_refused(noisy, folder):
    refuses(['noisy_imagenette.csv', '2 % noise', '0, 1, 5, 25, 50'], load_small, noisy, noise=2)
    refuses([folder, 'has no noisy_imagenette.csv'], load_small, folder, noise=5)


@pytest.mark.parametrize('content', ['', 'path\n', 'path,noisy_labels_5\n"open', 'noisy_labels_5\nn03394916\n'])
def test_noise_from_a_damaged_list(content, noisy):
    (noisy/'noisy_imagenette.csv').write_text(content)
    refuses('noisy_imagenette.csv', load_small, noisy, noise=5)


# sets from which nothing, or not all, can be learned

def test_one_class(tmp_path):
    refuses(['has one class, cat', 'two are needed'], load_small, make_folder(tmp_path/'one', ('cat',)))


def test_empty_class_folder(folder, capsys):
    "Told; training goes on with the others"
    for split in ('train', 'val'): (folder/split/'emu').mkdir()
    dls = load_small(folder)
    said = capsys.readouterr().err
    assert list(dls.vocab) == ['cat', 'dog'] and said.count('\n') == 1
    assert said.startswith(f'Note on {folder}: ') and 'train/emu' in said and 'val/emu' in said and 'no image' in said


def test_class_only_in_training(folder, capsys):
    shutil.rmtree(folder/'val'/'dog')
    dls = load_small(folder)
    said = capsys.readouterr().err
    assert said == f'Note on {folder}: no image of dog is in val/\n' and list(dls.vocab) == ['cat', 'dog']
    assert len(dls.train.one_batch()[1]) == 4 and class_counts(dls).loc['dog'].to_dict() == dict(train=8, val=0)


@pytest.mark.parametrize('split', ['val', 'test'])
def test_class_only_outside_of_training(split, folder):
    shutil.copytree(folder/'val'/'dog', folder/split/'emu')
    refuses([folder, f'images of emu in {split}/ and none in train/'], load_small, folder)


def test_class_with_another_name_in_each_split(folder):
    (folder/'val'/'dog').rename(folder/'val'/'Dog')
    refuses('images of Dog in val/ and none in train/', load_small, folder)


def test_folder_with_a_test_set(folder, tmp_path):
    shutil.copytree(make_folder(tmp_path/'more')/'val', folder/'test')
    for i, f in enumerate(sorted((folder/'test').rglob('*.png'))): f.write_bytes(png(1000 + i))
    dls = load_small(folder)
    assert [len(o.dataset) for o in dls.loaders] == [16, 8, 8] and dls.info['leaked'] == 0
    assert {o.parts[-3] for o in dls[2].items} == {'test'}
    assert len(load_small(folder, max_per_class=(4, 2))[2].dataset) == 4


def test_images_in_both_splits(folder, capsys):
    "Counted in validation and test set, by their content; nobody is refused"
    for i in range(3): shutil.copy(folder/'train'/'cat'/f'{i}.png', folder/'val'/'cat'/f'copy{i}.png')
    (folder/'test'/'dog').mkdir(parents=True)
    shutil.copy(folder/'train'/'cat'/'0.png', folder/'test'/'dog'/'0.png')
    shutil.copy(folder/'val'/'cat'/'1.png', folder/'val'/'cat'/'again.png') # is in no other split
    dls = load_small(folder)
    said = capsys.readouterr().err
    assert dls.info['leaked'] == 4 and said.count('\n') == 1 and '4 of 13 images outside of train/' in said


def test_clean_set_has_no_note(folder, capsys):
    assert load_small(folder).info['leaked'] == 0 and capsys.readouterr().err == ''


LONG = 'w'*200


@pytest.mark.filterwarnings('ignore:Glyph')
@pytest.mark.parametrize('classes', [('größe ñ', '日本語'), (LONG, 'dog'), ('two words', ' led'), ("it's", '1$ & 2$'),
                                     ('_hidden', 'a,b;c'), ('новый\u0301', 'émoji 🐈')])
def test_names_of_every_kind(classes, tmp_path, capsys):
    folder = make_folder(tmp_path/'a set', classes)
    for i, f in enumerate(sorted(folder.rglob('*.png'))): f.rename(f.with_name(f'é {i} {"n"*(200 - len(str(i)))}.png'))
    dls = load_small(folder)
    assert list(dls.vocab) == sorted(classes) and dls.info['train'] == 16 and capsys.readouterr().err == ''
    dls.show_batch(max_n=4)
    plt.gcf().canvas.draw() # a font without the letter is no error
    problems, counts = check_data(folder)
    assert problems.empty and list(counts.index) == sorted(classes)
    plot_counts(counts).canvas.draw()
    assert json.loads(json.dumps(dls.info))['vocab'] == sorted(classes)


def test_newlines_in_names(tmp_path, capsys):
    "They are classes like others; what is said of them stays one line"
    folder = make_folder(tmp_path/'set', ('new\nline', 'dog'))
    (folder/'train'/'dog'/'a\nb.png').write_bytes(png(5))
    assert list(load_small(folder).vocab) == ['dog', 'new\nline'] and capsys.readouterr().err == ''
    shutil.rmtree(folder/'val'/'new\nline')
    (folder/'train'/'dog'/'c\nd.png').write_bytes(b'bad')
    load_small(folder)
    said = capsys.readouterr().err
    assert said.count('\n') == 2 and said.startswith('Left out 1 of ') and '\nNote on ' in said
    refuses('no readable images', load_small, folder, strict=True)


@pytest.mark.skipif(sys.platform in ('darwin', 'win32'), reason='the file system keeps no such names')
def test_names_that_are_no_unicode(folder):
    "As they come out of old zip archives"
    shutil.copy(folder/'train'/'cat'/'0.png', folder/'train'/'cat'/os.fsdecode(b'gr\xfc\xdfe.png'))
    (folder/'train'/'dog'/'7.png').rename(folder/'train'/'dog'/os.fsdecode(b'\xff.png'))
    assert load_small(folder).info['train'] == 17


# lists of authors

def test_cub_with_files_that_are_absent(tmp_path, capsys):
    absent = '001.Black_footed_Albatross/004.png', '002.Least_Tern/008.png'
    dls = load_small(write_files(tmp_path/'cub', cub_files(absent=absent)))
    said = capsys.readouterr().err
    assert dls.info['skipped'] == 2 and said.startswith('Left out 2 of 40 files') and said.count('\n') == 1
    for o in absent: assert o in said
    refuses(['2 of 40 files', *absent], load_small, tmp_path/'cub', strict=True)


def test_cub_with_every_file_absent(tmp_path):
    files = cub_files()
    write_files(tmp_path/'cub', {k: files[k] for k in ('images.txt', 'train_test_split.txt')})
    refuses('no images in train/', load_small, tmp_path/'cub')


def test_cub_with_spaces_in_names(tmp_path, capsys):
    dls = load_small(write_files(tmp_path/'cub', cub_files(classes=('001.Great Auk', '002.Least Tern'))))
    assert list(dls.vocab) == ['Great Auk', 'Least Tern'] and not capsys.readouterr().err


@pytest.mark.parametrize('name', ['images.txt', 'train_test_split.txt'])
@pytest.mark.parametrize('content', [b'1\n2\n', b'7 1\n', b'\xff\xfe\x00', b'', b'<html>'])
def test_cub_with_a_malformed_list(name, content, cub):
    (cub/name).write_bytes(content)
    refuses(cub, load_small, cub)


def test_cub_without_its_list(cub):
    (cub/'images.txt').unlink()
    refuses([cub, 'images.txt'], load_small, cub)


def test_dogs(dogs):
    dls = load_small('stanford_dogs', path=dogs)
    assert list(dls.vocab) == ['Chihuahua', 'Japanese_spaniel'] and [len(o.dataset) for o in dls.loaders] == [16, 4, 36]


@pytest.mark.parametrize('content', [b'', b'no list', b'x'*500, bytes(500), 'half', 'other name', 'numbers'])
@pytest.mark.parametrize('name', ['train_list.mat', 'test_list.mat'])
def test_dogs_with_a_malformed_list(name, content, dogs):
    path = dogs/name
    if content == 'half': path.write_bytes(path.read_bytes()[:-40])
    elif content == 'other name': savemat(path, {'labels': [1, 2]})
    elif content == 'numbers': savemat(path, {'file_list': [1, 2]})
    else: path.write_bytes(content)
    refuses(dogs, load_small, dogs)


def test_dogs_without_a_list(dogs):
    (dogs/'test_list.mat').unlink()
    refuses([dogs, 'test_list.mat'], load_small, dogs)


# sources that are no dataset

def test_folder_with_nothing_recognisable(tmp_path):
    (tmp_path/'set'/'cats').mkdir(parents=True)
    (tmp_path/'set'/'cats'/'a.png').write_bytes(png(0))
    refuses([tmp_path/'set', 'train/<class>/ and val/<class>/'], load_small, tmp_path/'set')
    (tmp_path/'empty').mkdir()
    refuses([tmp_path/'empty', 'train/<class>/ and val/<class>/'], load_small, tmp_path/'empty')
    refuses(tmp_path/'empty', load_small, 'mnist', path=tmp_path/'empty')


def test_train_that_is_a_file(tmp_path):
    for o in ('train', 'val'): write_files(tmp_path, {o: b'x'})
    refuses([tmp_path, 'train/<class>/'], load_small, tmp_path)


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
    monkeypatch.setattr(data, 'fetch', None)
    refuses([tmp_path/'imagenette2-160.tgz'], load_small, 'imagenette_160')


def test_the_layout_may_lie_two_levels_down(folder, tmp_path):
    want = load_small(folder).info['fingerprint']
    shutil.copytree(folder, tmp_path/'a'/'b'/'in'/'pets')
    assert load_small(tmp_path/'a'/'b'/'in').info['fingerprint'] == want
    assert load_small(tmp_path/'a'/'b').info['fingerprint'] == want
    refuses('train/<class>/', load_small, tmp_path/'a')


# a set looked over

def test_check_finds_nothing_in_a_clean_set(folder):
    problems, counts = check_data(folder)
    assert problems.empty and list(problems.columns) == ['split', 'class', 'file', 'problem', 'detail']
    assert counts.to_dict() == dict(train=dict(cat=8, dog=8), val=dict(cat=4, dog=4))


def test_check_finds_each_kind_of_problem(folder):
    train = folder/'train'/'cat'
    (train/'bad.png').write_bytes(b'bad')
    (train/'empty.png').touch()
    (train/'half.png').write_bytes(png(50, 60)[:4000])
    Image.fromarray(noise(51)).save(train/'jpeg.png', 'JPEG')
    Image.fromarray(noise(52)).save(train/'without', 'PNG')
    (train/'tiny.png').write_bytes(png(53, 4))
    Image.fromarray(noise(54, 60)[:3]).save(train/'strip.png')
    shutil.copy(train/'0.png', train/'twice.png')
    shutil.copy(train/'1.png', folder/'train'/'dog'/'other.png')
    shutil.copy(train/'2.png', folder/'val'/'cat'/'leak.png')
    shutil.copy(folder/'val'/'dog'/'0.png', folder/'val'/'dog'/'twin.png')
    problems, counts = check_data(folder)
    place = lambda *o: str(folder.joinpath(*o))
    want = {(place('train', 'cat', f'{k}'), v) for k, v in {
        'bad.png': 'unreadable', 'empty.png': 'unreadable', 'half.png': 'unreadable', 'jpeg.png': 'wrong extension',
        'without': 'wrong extension', 'tiny.png': 'tiny', 'strip.png': 'tiny', 'twice.png': 'double'}.items()}
    want |= {(place('train', 'dog', 'other.png'), 'in two classes'), (place('val', 'cat', 'leak.png'), 'in two splits'),
             (place('val', 'dog', 'twin.png'), 'double')}
    assert {(o.file, o.problem) for o in problems.itertuples()} == want and len(problems) == len(want)
    details = dict(zip(problems.file, problems.detail))
    assert details[place('train', 'cat', 'tiny.png')] == '4x4 pixels'
    assert 'JPEG' in details[place('train', 'cat', 'jpeg.png')]
    assert place('train', 'cat', '2.png') in details[place('val', 'cat', 'leak.png')]
    assert details[place('train', 'cat', 'empty.png')] == 'empty'
    for o in problems.itertuples(): assert f'{folder}/{o.split}/{getattr(o, "_2")}/' in o.file
    assert counts.to_dict() == dict(train=dict(cat=8 + 5, dog=8 + 1), val=dict(cat=4 + 1, dog=4 + 1)), 'readable ones'


def test_check_with_another_measure_of_tiny(folder):
    assert (check_data(folder, tiny=21)[0].problem == 'tiny').sum() == 24
    assert check_data(folder, tiny=20)[0].empty


def test_check_passes_good_extensions(folder):
    "Also those that Pillow calls otherwise: a telephone's .jpg is often a JPEG with a second picture in it, an MPO"
    train = folder/'train'/'cat'
    for name, fmt in (('a.jpg', 'JPEG'), ('b.JPEG', 'JPEG'), ('c.jfif', 'JPEG'), ('d.tif', 'TIFF'), ('e.bmp', 'BMP'),
                      ('f.GIF', 'GIF'), ('g.webp', 'WEBP')):
        Image.fromarray(noise(ord(name[0]))).save(train/name, fmt)
    assert check_data(folder)[0].empty
    second = Image.fromarray(noise(61))
    Image.fromarray(noise(60)).save(train/'phone.jpg', 'MPO', save_all=True, append_images=[second])
    assert Image.open(train/'phone.jpg').format == 'MPO' and check_data(folder)[0].empty


def test_check_of_idx_files(mnist):
    "Doubles are found between files that are one file"
    assert check_data(mnist)[0].empty
    content = bytearray((mnist/'t10k-images-idx3-ubyte').read_bytes())
    content[16:16+784] = (mnist/'train-images-idx3-ubyte').read_bytes()[16+784*3:16+784*4]
    (mnist/'t10k-images-idx3-ubyte').write_bytes(content)
    problems, counts = check_data('mnist', path=mnist)
    assert problems.problem.tolist() == ['in two splits'] and problems.split.tolist() == ['test']
    assert problems.file[0].endswith('t10k-images-idx3-ubyte[0]') and 'train-images-idx3-ubyte[3]' in problems.detail[0]
    assert counts.sum().to_dict() == dict(train=58, val=2, test=20)


def test_check_of_a_set_without_a_readable_file(folder):
    for f in folder.rglob('*.png'): f.write_bytes(b'bad')
    problems, counts = check_data(folder)
    assert (problems.problem == 'unreadable').all() and len(problems) == 24 and counts.to_numpy().sum() == 0


def test_check_of_an_unknown_name(): refuses("unknown dataset 'imagenet'", check_data, 'imagenet')


@pytest.mark.parametrize('n', [2, 200])
def test_plot_of_many_classes(n):
    names = [f'{i} {"long name "*8}' for i in range(n)]
    counts = pd.DataFrame(dict(train=range(1, n+1), val=range(n)), index=pd.Index(names, name='class'))
    fig = plot_counts(counts)
    fig.canvas.draw()
    assert isinstance(fig, plt.Figure)
    ax, = fig.axes
    labels = [o.get_text() for o in ax.get_yticklabels()]
    assert len(labels) == n and labels[-1].startswith('0 long name') and all(len(o) < 40 for o in labels)
    bars = [o for o in ax.patches if o.get_width()]
    assert sum(o.get_width() for o in bars) == counts.to_numpy().sum()
    bar = next(o for o in ax.patches if abs(o.get_y() + o.get_height()/2 - (n - 1)) < .01)
    assert bar.get_width() == counts.train.iloc[0], 'the first class is at the top'


# by the commands

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
