"""Folders, lists and files of many images become the table that their authors meant, or one sentence."""
import gzip
import re
import struct

import numpy as np
import pandas as pd
import pytest
from resnet_nbdev.catalogue import CATALOGUE, data_path, settings_of
from resnet_nbdev.images import open_image
from resnet_nbdev.layouts import read_idx, read_images
from scipy.io import loadmat, savemat

from conftest import make_folder, png, refuses
from small_sets import (
    CIFAR_NAMES,
    ENGLISH,
    LABELS,
    SHARED,
    WNIDS,
    archive_of,
    cifar_files,
    cub_files,
    idx,
    load_small,
    mnist_files,
    raw_mnist,
    write_files,
)

# the datasets themselves, as far as the shared folder holds them

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
