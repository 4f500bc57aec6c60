"""Checked batches: what get_data gives of each dataset, says of a bad one and refuses."""
import json
import os
import shutil
import sys
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.vision.all import imagenet_stats
from resnet_nbdev.catalogue import IMAGENETTE_CLASSES, data_path, settings_of
from resnet_nbdev.core import InputError
from resnet_nbdev.data import class_counts
from resnet_nbdev.images import channel_stats
from resnet_nbdev.inspection import check_data, plot_counts
from resnet_nbdev.layouts import read_images
from resnet_nbdev.resident import resident_data

from conftest import make_folder, png, refuses
from small_sets import CIFAR_NAMES, SHARED, archive_of, class_of, get_data, load_small


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


def test_settings_of_a_call_go_before_those_of_the_dataset(mnist):
    info = get_data('mnist', 40, 36, 4, path=mnist, augment=dict(do_flip=False), fit='squish', stats='imagenet').info
    assert [info[k] for k in ('presize', 'resize', 'bs', 'augment', 'fit', 'stats')] == \
        [40, 36, 4, dict(do_flip=False), 'squish', 'imagenet']
    own = load_small('mnist', path=mnist, stats='own')
    assert own.info['stats'] == channel_stats(own.train_ds.items)


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


@pytest.mark.parametrize('missing', ['train', 'val'])
def test_folder_without_train_or_val(missing, folder):
    (folder/missing).rename(folder/'other')
    refuses([str(folder), f'has no folder {missing}/', 'train/<class>/ and val/<class>/'], get_data, folder)


def test_data_that_is_a_file_or_absent(folder, tmp_path):
    (tmp_path/'set.zip').write_bytes(b'x')
    refuses([f'{tmp_path}/set.zip', 'is no whole tar or zip archive'], get_data, tmp_path/'set.zip')
    refuses(['absent', 'no such folder'], get_data, 'imagenette', path=tmp_path/'absent')


@pytest.mark.parametrize('split', ['train', 'val'])
def test_split_without_images(split, folder):
    for f in (folder/split).rglob('*.png'): f.unlink()
    refuses(f'{folder} has no images in {split}/', get_data, folder, 16, 16, 4)


def test_class_with_only_bad_files(folder, capsys):
    for f in (folder/'train'/'dog').iterdir(): f.write_bytes(b'bad')
    refuses(['images of dog in val/ and none in train/'], get_data, folder, 16, 16, 4)
    assert 'Left out 8 of 24 files' in capsys.readouterr().err


def test_file_that_goes_bad_after_the_check(folder):
    "The worker that finds it hands on the name, in the last line, which is what a command tells"
    dls = get_data(folder, 16, 16, 4, num_workers=1)
    for f in (folder/'train').rglob('*.png'): f.write_bytes(b'bad')
    with pytest.raises(InputError) as e: list(dls.train)
    said = str(e.value).strip().splitlines()[-1]
    assert f'{folder}/train/' in said and '.png is no readable image' in said


@pytest.mark.parametrize('load', [partial(get_data, resize=16), partial(resident_data, size=16)])
def test_holdout(load, folder):
    "Some training images in place of the validation images, which may be damaged; always the same ones"
    whole = load(folder, bs=4, presize=16, num_workers=1)
    for f in (folder/'val').rglob('*.png'): f.write_bytes(b'bad')
    one, two = (load(folder, bs=4, presize=16, num_workers=1, holdout=.25) for _ in range(2))
    assert one.valid_ds.items == two.valid_ds.items and (len(one.train_ds), len(one.valid_ds)) == (12, 4)
    assert {*one.train_ds.items} | {*one.valid_ds.items} == {*whole.train_ds.items}
    assert one.info['fingerprint'] != whole.info['fingerprint']


def test_wrong_holdouts(folder):
    refuses('holdout must be at least 0 and below 1', get_data, folder, holdout=1.)
    refuses('holdout=0.01 of 16 images is none', get_data, folder, holdout=.01)
