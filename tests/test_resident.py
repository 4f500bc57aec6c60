"""The resident loader: as a Learner uses it, its files on the disk, and its batches beside fastai's."""
import gzip
import json
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.vision.all import (
    Callback,
    ClassificationInterpretation,
    CutMix,
    MixUp,
    PILImage,
    Rotate,
    ShortEpochCallback,
    TensorImage,
    imagenet_stats,
    load_learner,
    set_seed,
)
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from resnet_nbdev import resident
from resnet_nbdev.augment import FITS, image_tfms
from resnet_nbdev.catalogue import PLAIN
from resnet_nbdev.core import InputError
from resnet_nbdev.data import get_data
from resnet_nbdev.images import open_image
from resnet_nbdev.learner import resnet_learner
from resnet_nbdev.predictions import plot_predictions
from resnet_nbdev.resident import resident_bytes, resident_data, room_for, valid_pixels
from resnet_nbdev.runs import predict
from resnet_nbdev.training import fine_tune
from scipy.stats import ks_2samp

from conftest import environment, extract_photos, waves

CPU = torch.device('cpu')
CLASSES = 'coarse', 'fine', 'medium'
SIZES = (60, 60), (90, 50), (41, 77), (30, 26), (200, 120)


def make_waves(dest, train=8, val=5, sizes=SIZES):
    for split, n in (('train', train), ('val', val)):
        for k, name in enumerate(CLASSES):
            (dest/split/name).mkdir(parents=True)
            for i in range(n):
                im = waves([len(split), k, i], sizes[i % len(sizes)], 6 + 9*k)
                Image.fromarray(im).save(dest/split/name/f'{i}.png')
    return dest


@pytest.fixture(scope='session')
def pictures(tmp_path_factory): return make_waves(tmp_path_factory.mktemp('waves')/'pictures')


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    "The folder where pixels are kept, for this test alone"
    monkeypatch.setattr(resident, 'fastai_path', lambda name: tmp_path/'home'/name)
    return tmp_path/'home'/'data'/'resident'


@pytest.fixture
def opened(monkeypatch):
    "The images that the resident loader has decoded"
    seen = []
    monkeypatch.setattr(resident, 'open_image', lambda o: seen.append(o) or open_image(o))
    return seen


@pytest.fixture(autouse=True)
def fresh(): set_seed(0)


def ours(source, size=32, bs=8, presize=40, num_workers=2, **kw):
    return resident_data(source, size, bs, 'cpu', presize=presize, num_workers=num_workers, **kw)


def theirs(source, size=32, bs=8, presize=40, **kw):
    return get_data(source, presize, size, bs, device='cpu', num_workers=0, **kw)


def threads_end(before, patience=10):
    "Whether no more than `before` threads are left; those of a pool end a moment after it"
    end = time.monotonic() + patience
    while threading.active_count() > before and time.monotonic() < end: time.sleep(.01)
    return threading.active_count() <= before


def inputs(dl): return torch.cat([b[0] for b in dl])


def grey_levels(a, b, stats=imagenet_stats):
    "Absolute differences of two batches of normalised images, on the scale from 0 to 255"
    return (a - b).abs()*255*torch.tensor(stats[1] if stats else [1.]*3)[:, None, None]


# as a Learner uses it

@pytest.fixture(scope='session')
def learners(pictures):
    "Two learners with one trained network, the first with our loader, the second with fastai's"
    set_seed(0)
    learn = resnet_learner(ours(pictures), 'cifar_resnet8')
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(4, 1e-2)
    return learn, resnet_learner(theirs(pictures), learn.model)


def test_batches(pictures):
    "Shapes, types, classes and sizes are those of get_data, and so is what comes back from decode and show_batch"
    a, b = ours(pictures), theirs(pictures)
    assert list(a.vocab) == list(b.vocab) == list(CLASSES) and a.train.n_inp == 1 and len(a) == len(b) == 2
    for one, other in zip(a, b):
        assert len(one) == len(other) and len(one.dataset) == len(other.dataset)
        found, known = one.one_batch(), other.one_batch()
        assert [(type(o), o.shape, o.dtype) for o in found] == [(type(o), o.shape, o.dtype) for o in known]
        back, stock = one.decode(found), other.decode(known)
        assert [(type(o), o.dtype) for o in back] == [(type(o), o.dtype) for o in stock]
        assert back[0].min() < 60 and back[0].max() > 190
        assert [type(o) for o in one.decode_batch(found)[0]] == [type(o) for o in other.decode_batch(known)[0]]
        one.show_batch(max_n=4)
        assert {o.get_title() for o in plt.gcf().axes[:4]} <= set(CLASSES)
    assert a.valid.decode_batch(a.valid.one_batch())[0][1] == 'coarse'
    assert {**b.info, 'loader': 'resident', 'hold': 'map'} == a.info


def test_predictions(learners):
    "On the validation set, on training images, and on new ones"
    new, stock = learners
    files = list(new.dls.train_ds.items[:5]) + list(new.dls.valid_ds.items[:3])
    for ask in (lambda dls: dls.valid, lambda dls: dls.test_dl(files), lambda dls: dls.test_dl(files, bs=3)):
        with new.no_bar(), stock.no_bar(): a, b = (o.get_preds(dl=ask(o.dls))[0] for o in (new, stock))
        torch.testing.assert_close(a, b, atol=.01, rtol=0)
    with new.no_bar(), stock.no_bar():
        (a, ys), (b, truth) = (o.get_preds(1) for o in (new, stock))
        assert torch.equal(ys, truth) and new.validate()[1] == pytest.approx(stock.validate()[1])
    assert a.std(0).max() > .1, 'a network that always says the same would prove nothing'


def test_predictions_on_training_images(pictures):
    "Squares without augmentation come from both loaders alike, in the same order"
    a, b = (f(pictures, augment=PLAIN, fit='squish') for f in (ours, theirs))
    learn = resnet_learner(a, 'cifar_resnet8')
    loaders = [o.train.new(shuffle=False, drop_last=False) for o in (a, b)]
    with learn.no_bar(): (x, u, y), (z, v, w) = (learn.get_preds(dl=o, with_input=True) for o in loaders)
    assert grey_levels(x, z).mean() < 1 and torch.equal(y, w) and len(y) == 24
    torch.testing.assert_close(u, v, atol=.01, rtol=0)


def test_new_images(learners, opened):
    "Paths, with and without labels, and what may stand behind a path in fastai, too: bytes, arrays, images"
    dls, stock = (o.dls for o in learners)
    known, other = dls.valid_ds.items[1], dls.train_ds.items[2]
    rgba = Image.fromarray(waves(5)).convert('RGBA')
    rgba.putalpha(100)
    asked = [known, other, other.read_bytes(), waves(3, (50, 70)), rgba, PILImage.create(other)]
    for items in (asked, [asked[-1]]):  # fastai judges by the first
        a, b = (o.test_dl(items) for o in (dls, stock))
        assert [len(o) for o in (a.one_batch(), b.one_batch())] == [1, 1]
        assert grey_levels(a.one_batch()[0], b.one_batch()[0]).mean() < 1
    assert not any(o is known for o in opened) and any(o is other for o in opened)
    a, b = (o.test_dl([known, other], with_labels=True).one_batch() for o in (dls, stock))
    assert torch.equal(a[1], b[1]) and grey_levels(a[0], b[0]).mean() < 1
    for o in (dls, stock):
        with pytest.raises(AssertionError, match='Expected an input of type'): o.test_dl([other.read_bytes()])


@pytest.mark.parametrize('order', [1, -1])
def test_new_images_beside_known_ones(pictures, order):
    "In one batch, wherever the pixels of the known ones are"
    dls = ours(pictures)
    items = [dls.valid_ds.items[0], waves(1)][::order]
    if order == -1: items = [dls.train_ds.items[0], *items]
    expected = inputs(dls.test_dl(items))
    dls.train.resident.move('device', CPU)
    assert grey_levels(inputs(dls.test_dl(items)), expected).max() < .01


def test_a_bad_new_image(learners, tmp_path):
    (tmp_path/'bad.jpg').write_bytes(b'no image')
    dls, before = learners[0].dls, threading.active_count()
    with pytest.raises(InputError, match='bad.jpg is no readable image'):
        dls.test_dl([dls.valid_ds.items[0], tmp_path/'bad.jpg']).one_batch()
    with pytest.raises(InputError, match='bad.jpg is no readable image'): learners[0].predict(tmp_path/'bad.jpg')
    assert threads_end(before)


def test_kept_pixels_need_no_files(tmp_path):
    "Nor does a file that goes bad after the check stop an epoch"
    dls = ours(make_waves(tmp_path/'pictures', 4, 2))
    expected = inputs(dls.valid)
    for o in (tmp_path/'pictures').rglob('*.png'): o.write_bytes(b'')
    assert torch.equal(inputs(dls.valid), expected) and len(inputs(dls.train)) == 8


def test_interpretation(learners):
    new, stock = learners
    with new.no_bar(), stock.no_bar():
        a, b = map(ClassificationInterpretation.from_learner, learners)
        assert (a.confusion_matrix() == b.confusion_matrix()).all() and a.confusion_matrix().sum() == 15
        torch.testing.assert_close(a.top_losses(15)[0], b.top_losses(15)[0], atol=.02, rtol=.02)
        a.plot_top_losses(4)
        assert sum(o.get_title() != '' for o in plt.gcf().axes) == 4
        a.plot_confusion_matrix()
        new.show_results(max_n=4)
        titles = [o.get_title() for fig in plt.get_fignums() for o in plt.figure(fig).axes]
        assert a.most_confused() == b.most_confused() and any('\n' in o for o in titles)
    with new.no_bar(): found = ClassificationInterpretation.from_learner(new, ds_idx=0)
    assert found.confusion_matrix().sum() == 24


@pytest.mark.parametrize('callback', [MixUp, CutMix])
def test_mixing_callbacks(pictures, callback):
    learn = resnet_learner(ours(pictures), 'cifar_resnet8')
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-2, cbs=callback())
    assert np.isfinite(learn.recorder.losses).all() and len(learn.recorder.losses) == 6


def test_export(learners, tmp_path):
    "What is exported has the network and no pixels, and says without the images what it said before"
    learn = learners[0]
    learn.path, before = tmp_path, (learn.path, learn.dls.train.resident)
    learn.export('learner.pkl')
    learn.path = before[0]
    weights = sum(4*o.numel() for o in learn.model.state_dict().values())
    pixels = resident_bytes(24, 15, 40, 32)['map']
    assert (tmp_path/'learner.pkl').stat().st_size < weights + 100_000 < weights + pixels
    assert len(pickle.dumps(before[1])) < 10_000
    asked = tmp_path/'asked.png'
    Image.fromarray(waves(9, (70, 50))).save(asked)
    again = load_learner(tmp_path/'learner.pkl')
    with again.no_bar(), learn.no_bar(): (a, i, p), (b, j, q) = (o.predict(asked) for o in (again, learn))
    assert (a, i) == (b, j) and torch.equal(p, q)
    with again.no_bar(): assert len(again.get_preds(dl=again.dls.test_dl([asked]*9, bs=4))[0]) == 9
    assert before[1].squares is not None, 'exporting takes the pixels away'


def test_predict(learners):
    new, stock = learners
    for item in (new.dls.valid_ds.items[4], new.dls.train_ds.items[4]):
        with new.no_bar(), stock.no_bar(): (a, i, p), (b, j, q) = (o.predict(item) for o in learners)
        assert (a, i) == (b, j) and a in CLASSES
        torch.testing.assert_close(p, q, atol=.01, rtol=0)


def test_new_loaders(pictures):
    "dls.new_empty and dl.new keep what makes the batches; batches may have another size"
    dls = ours(pictures)
    assert [len(o.dataset) for o in dls.new_empty()] == [0, 0]
    again = dls.valid.new(bs=4)
    assert [len(y) for _, y in again] == [4, 4, 4, 3] and torch.equal(inputs(again), inputs(dls.valid))
    every = dls.train.new(shuffle=False, drop_last=False, bs=10)
    assert [len(y) for _, y in every] == [10, 10, 4]
    assert torch.cat([y for _, y in every]).tolist() == [i//8 for i in range(24)]
    backwards = dls.train.new(dls.train_ds.__class__(tls=dls.train_ds.tls), shuffle=True)
    assert backwards.resident is dls.train.resident and len(backwards) == 3


def test_lr_find(photos):
    "On a hundred real photos, with no file left behind"
    set_seed(0)
    learn = resnet_learner(ours(photos, 48, 10, 64, max_per_class=(10, 2)), 'cifar_resnet8')
    with learn.no_bar(), learn.no_logging(): found = learn.lr_find(num_it=20, show_plot=False)
    assert 1e-7 < found.valley < 10


def test_plot_predictions(learners):
    a, b = (plot_predictions(o, n=10) for o in learners)
    assert [o.get_title() for o in a.axes] and len(a.axes) == len(b.axes)
    for one, other in zip(a.axes, b.axes):
        assert one.get_title().split()[:2] == other.get_title().split()[:2]
        if one.images: assert np.abs(one.images[0].get_array() - other.images[0].get_array()).mean()*255 < 1


def test_fine_tune(pictures, tmp_path):
    "A recorded run, and predict on it says what the learner says"
    dls = ours(pictures)
    learn = resnet_learner(dls, 'cifar_resnet8')
    with learn.no_bar(), learn.no_logging(): fine_tune(learn, 'mine', 1, 1, 1e-2, runs=tmp_path)
    config = json.loads((tmp_path/'mine'/'config.json').read_text())
    assert config['data'] == {**dls.info, 'leaked': 0} and config['data']['loader'] == 'resident'
    files = list(dls.valid_ds.items)
    with learn.no_bar(): probs = learn.get_preds(dl=dls.test_dl(files))[0]
    said = predict('mine', files, k=1, weights='last', runs=tmp_path)
    assert said['class'].tolist() == [dls.vocab[i] for i in probs.argmax(1)]
    np.testing.assert_allclose(said.probability, probs.max(1).values, atol=.01)
    assert {o.name for o in (tmp_path/'mine').iterdir()} >= {'curves.png', 'predictions.png', 'history.csv'}


def write_idx(folder, n_train=90, n_test=12):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, n in (('train', n_train), ('t10k', n_test)):
        for kind, array in (('images-idx3', rng.integers(0, 256, (n, 28, 28))), ('labels-idx1', np.arange(n) % 3)):
            head = struct.pack(f'>HBB{array.ndim}I', 0, 8, array.ndim, *array.shape)
            (folder/f'{name}-{kind}-ubyte.gz').write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))
    return folder


def write_cifar(folder):
    folder.mkdir(parents=True)
    (folder/'batches.meta.txt').write_text('cat\ndog\n\n')
    for i, name in enumerate(['data_batch_1', 'data_batch_2', 'test_batch']):
        records = np.random.default_rng(i).integers(0, 256, (30, 3073), dtype=np.uint8)
        records[:, 0] = np.arange(30)//2 % 2
        records.tofile(folder/f'{name}.bin')
    return folder


@pytest.mark.parametrize('name, write, counts', [
    ('mnist', write_idx, [87, 3, 12]), ('cifar10', write_cifar, [54, 6, 30])])
def test_images_in_one_file(tmp_path, name, write, counts, opened):
    "Three loaders, with the sizes, fits and statistics of the dataset, and no file for each image"
    folder = write(tmp_path/'raw')
    a, b = (f(name, bs=8, path=folder, num_workers=n, device='cpu') for f, n in ((resident_data, 2), (get_data, 0)))
    assert [len(o.dataset) for o in a] == counts and a[2].one_batch()[0].shape == (8, 3, 32, 32)
    assert len(opened) == len(set(map(id, opened))) == sum(counts)
    stats = None if name == 'mnist' else a.info['stats']
    for one, other in zip(a.loaders[1:], b.loaders[1:]):
        assert grey_levels(inputs(one), inputs(other), stats).max() < .51
        assert [y.tolist() for _, y in one] == [y.tolist() for _, y in other]
    learn = resnet_learner(a, 'cifar_resnet8')
    stock = resnet_learner(b, learn.model)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2)
        found = learn.validate(2)
    with stock.no_bar(): np.testing.assert_allclose(found, stock.validate(2), atol=.01)
    asked = a.test_dl(list(a[2].dataset.items), with_labels=True)
    assert torch.equal(inputs(asked), inputs(a[2])) and len(opened) == sum(counts)


# decoded once

def test_decoded_once(pictures, own_cache, opened):
    dls = ours(pictures)
    assert len(opened) == len(set(opened)) == 39
    learn = resnet_learner(dls, 'cifar_resnet8')
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
    again = ours(pictures, num_workers=1, hold='memory')
    assert len(opened) == 39 and torch.equal(inputs(dls.valid), inputs(again.valid))
    assert {o.suffix for o in own_cache.iterdir()} <= {'.npy', '.json', '.lock'}


def test_every_setting_has_its_pixels(pictures, own_cache, opened):
    "Settings that change kept pixels are told apart, in any order"
    settings = [{}, dict(presize=48), dict(size=24), dict(fit='squish'), dict(fit='croppad'),
                dict(augment=dict(crop=True)), dict(augment=dict(mode='nearest'))]
    for kw in settings: ours(pictures, **kw)
    opened.clear()
    for kw in settings:
        kw = {**dict(fit='crop'), **kw}
        a, b = (f(pictures, **kw) for f in (ours, theirs))
        assert grey_levels(inputs(a.valid), inputs(b.valid)).mean() < .6, kw


def test_a_changed_photo(tmp_path, own_cache, opened):
    folder = make_waves(tmp_path/'pictures', 4, 2, SIZES[:1])
    before = inputs(ours(folder).valid)
    photo = folder/'val'/'fine'/'1.png'
    photo.write_bytes(photo.read_bytes() + b'\n')  # the pixels are the same
    opened.clear()
    assert torch.equal(inputs(ours(folder).valid), before) and len(opened) == 18
    Image.fromarray(waves(99)).save(photo)
    after = inputs(ours(folder).valid)
    assert [i for i in range(6) if not torch.equal(before[i], after[i])] == [3]


def edit_json(path, **new): path.write_text(json.dumps({**json.loads(path.read_text()), **new}))


@pytest.mark.parametrize('damage', ['cut', 'empty', 'gone', 'a byte', 'the time', 'json cut', 'json gone', 'json empty',
                                    'json a list', 'older version', 'other pillow', 'other content'])
def test_a_damaged_cache(pictures, own_cache, opened, monkeypatch, damage):
    "What does not look whole is made anew, and only that"
    expected = inputs(ours(pictures).valid)
    kept, = own_cache.glob('*-other-*.npy')
    told, content, stat = kept.with_suffix('.json'), kept.read_bytes(), kept.stat()
    later = lambda: os.utime(kept, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
    def write(content):
        kept.write_bytes(content)
        later()
    dict([('cut', lambda: write(content[:-1])), ('empty', lambda: write(b'')), ('gone', kept.unlink),
          ('a byte', lambda: write(content[:200] + bytes([content[200] ^ 255]) + content[201:])), ('the time', later),
          ('json cut', lambda: told.write_text(told.read_text()[:-2])), ('json gone', told.unlink),
          ('json empty', lambda: told.write_text('')), ('json a list', lambda: told.write_text('[1]')),
          ('older version', lambda: edit_json(told, version=0)),
          ('other pillow', lambda: edit_json(told, pillow='1.0')),
          ('other content', lambda: edit_json(told, fingerprint='0'*64))])[damage]()
    opened.clear()
    dls = ours(pictures)
    assert torch.equal(inputs(dls.valid), expected) and len(opened) == 15
    opened.clear()
    ours(pictures)
    assert not opened


@pytest.mark.parametrize('change', ['version', 'pillow'])
def test_another_version(pictures, own_cache, opened, monkeypatch, change):
    ours(pictures)
    opened.clear()
    if change == 'version': monkeypatch.setattr(resident, 'CACHE_VERSION', 10**6)
    else: monkeypatch.setattr(resident.Image, '__version__', '0.1')
    ours(pictures)
    assert len(opened) == 39


def test_a_failure_while_decoding(pictures, own_cache, monkeypatch):
    "Leaves nothing that looks whole, and the next one starts anew"
    def fail(o):
        if o.name == '7.png': raise InputError('went bad')
        return open_image(o)
    monkeypatch.setattr(resident, 'open_image', fail)
    before = threading.active_count()
    with pytest.raises(InputError, match='went bad'): ours(pictures)
    assert {o.suffix for o in own_cache.iterdir()} <= {'.lock'} and threading.active_count() == before
    monkeypatch.setattr(resident, 'open_image', open_image)
    assert len(inputs(ours(pictures).valid)) == 15


SCRIPT = textwrap.dedent('''
    import os, sys, time
    from resnet_nbdev import resident
    from resnet_nbdev.images import open_image
    folder, log, pause = sys.argv[1], sys.argv[2], float(sys.argv[3])
    def slow(o):
        with open(log, 'a') as f: f.write(f'{o}\\n')
        time.sleep(pause)
        return open_image(o)
    resident.open_image = slow
    print('ready', flush=True)
    dls = resident.resident_data(folder, 32, 8, 'cpu', presize=40, num_workers=2)
    print(sum(x.double().sum().item() for x, _ in dls.valid), flush=True)
''')


def start_script(folder, log, pause, home):
    return subprocess.Popen([sys.executable, '-c', SCRIPT, folder, log, str(pause)], stdout=subprocess.PIPE, text=True,
                            env=environment(FASTAI_HOME=str(home)), start_new_session=True)


@pytest.mark.slow
def test_processes(pictures, tmp_path, own_cache, opened):
    "One is killed while it decodes; of the two that come next, one decodes and both have the pixels; then we have them"
    home, log = tmp_path/'home', tmp_path/'log'
    killed = start_script(pictures, log, 1, home)
    try:
        while not (log.exists() and log.read_text().count('\n') > 1):
            assert killed.poll() is None
            time.sleep(.05)
    finally: os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not list(own_cache.glob('*.json')) and all('.part' in o.name for o in own_cache.glob('*.npy'))
    assert list(own_cache.iterdir()), 'it was killed too early'
    log.unlink()
    two = [start_script(pictures, log, .02, home) for _ in range(2)]
    said = [o.communicate(timeout=120)[0].split() for o in two]
    assert [o.returncode for o in two] == [0, 0] and said[0] == said[1]
    lines = log.read_text().splitlines()
    assert len(lines) == len(set(lines)) == 39
    dls = ours(pictures)
    assert not opened and sum(x.double().sum().item() for x, _ in dls.valid) == float(said[0][1])
    assert not [o for o in own_cache.iterdir() if '.part' in o.name]


def test_no_room_on_the_disk(pictures, own_cache, opened, monkeypatch):
    "Said with figures, before anything is decoded"
    need = resident_bytes(24, 15, 40, 32)['map']
    monkeypatch.setattr(resident, 'disk_room', lambda folder: need//3)
    with pytest.raises(InputError, match=r'need .*\d.* which has .*\d.* left: .*smaller presize') as e:
        ours(pictures)
    assert str(own_cache) in str(e.value) and '\n' not in str(e.value) and not opened
    monkeypatch.setattr(resident, 'disk_room', lambda folder: 10**9)
    assert len(ours(pictures).valid_ds) == 15


def test_the_disk_fills_up(pictures, own_cache, monkeypatch):
    "An error of the system while the pixels are written"
    def full(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(np.lib.format, 'open_memmap', full)
    with pytest.raises(InputError, match='cannot be made .No space left on device'): ours(pictures)
    assert not list(own_cache.glob('*.npy')) + list(own_cache.glob('*.json'))


@pytest.mark.parametrize('where', ['data', 'data/resident'])
def test_no_folder_for_pixels(pictures, own_cache, tmp_path, where):
    "A file stands where the folder should: for any user what a folder without permission is for all but root"
    (tmp_path/'home'/where).parent.mkdir(parents=True)
    (tmp_path/'home'/where).write_text('')
    with pytest.raises(InputError, match='.*home/data') as e: ours(pictures)
    assert '\n' not in str(e.value)


@pytest.mark.skipif(os.geteuid() == 0, reason='root writes everywhere')
def test_no_permission(pictures, own_cache):
    own_cache.mkdir(parents=True)
    own_cache.chmod(0o500)
    with pytest.raises(InputError, match='.*home/data'): ours(pictures)
    own_cache.chmod(0o700)


def test_too_little_memory(pictures, own_cache, opened, monkeypatch):
    need = resident_bytes(24, 15, 40, 32)['map']
    monkeypatch.setattr(resident, 'free_memory', lambda: need)
    for hold in ('memory', 'device'):
        with pytest.raises(InputError, match=r"images need .*\d.* the memory has .*\d.* use hold='map'"):
            ours(pictures, hold=hold)
    assert not opened
    assert ours(pictures).info['hold'] == 'map'
    monkeypatch.setattr(resident, 'free_memory', lambda: 2*need)
    assert ours(pictures, hold='memory').info['hold'] == ours(pictures, hold='device').info['hold'] == 'memory'
    monkeypatch.setattr(resident, 'free_memory', lambda: None)
    assert room_for(10**18, CPU, 'memory') == 'memory'  # a system that does not tell


def test_free_memory(): assert 10**7 < resident.free_memory() < 10**14


@pytest.mark.parametrize('presize, size', [(40, 32), (32, 32), (61, 7)])
def test_resident_bytes(pictures, own_cache, presize, size):
    "The figure is that of the arrays in the files, and the floats are those of a batch"
    dls = ours(pictures, size, presize=presize)
    told = resident_bytes(len(dls.train_ds), len(dls.valid_ds), presize, size, 8)
    arrays = [np.load(o) for o in own_cache.glob('*.npy')]
    assert told == dict(map=sum(o.nbytes for o in arrays), batch=dls.one_batch()[0].nbytes)
    assert sorted(o.shape for o in arrays) == sorted([(24, presize, presize, 3), (15, size, size, 3)])
    for wrong in (dict(train=-1), dict(train=2.5), dict(train=1, presize=0), dict(train=1, bs=0)):
        with pytest.raises(InputError, match='must be a whole number'): resident_bytes(**wrong)


@pytest.mark.parametrize('kw, said', [
    (dict(hold='disk'), 'hold must be'), (dict(num_workers=-1), 'num_workers'), (dict(num_workers=1.5), 'num_workers'),
    (dict(augment=dict(xtra_tfms=[Rotate()])), 'xtra_tfms'), (dict(augment=dict(align_corners=False)), 'align_corners'),
    (dict(augment=dict(max_turn=3)), 'max_turn'),
    (dict(fit='stretch'), 'stretch'), (dict(size=0), 'size'), (dict(bs=25), 'batch of 25 is larger')])
def test_refused(pictures, own_cache, opened, kw, said):
    with pytest.raises(InputError, match=said): ours(pictures, **kw)
    assert not opened


# batches beside fastai's

@pytest.fixture(scope='session')
def four_photos(tmp_path_factory):
    "A folder with four real photos as squares of 116 pixels, each a class of its own"
    folders = tmp_path_factory.mktemp('four'), tmp_path_factory.mktemp('squares')
    source, dest = extract_photos(folders[0], train=1, val=1), folders[1]
    for split in ('train', 'val'):
        for name, taken in zip('abcd', sorted((source/split).iterdir())):
            (dest/split/name).mkdir(parents=True)
            photo, = taken.iterdir()
            FITS['crop'](116)(open_image(photo), split_idx=1).save(dest/split/name/'0.png')
    return dest


class Moments:
    "Mean and variance of each pixel over all images that were added, a place for each photo, in grey levels"
    def __init__(self): self.n, self.sum, self.squares = 0, 0, 0

    def add(self, x):
        x = x.as_subclass(torch.Tensor).double()*255
        self.n, self.sum, self.squares = self.n + 1, self.sum + x, self.squares + x**2

    @property
    def mean(self): return self.sum/self.n
    @property
    def variance(self): return (self.squares/self.n - self.mean**2)*self.n/(self.n - 1)


def resident_moments(folder, n, **kw):
    dls, found = ours(folder, 56, 4, 116, stats='none', **kw), Moments()
    for _ in range(n):
        for x, y in dls.train: found.add(x[y.argsort()])
    return found


def test_mean_and_variance_images(four_photos, record_property):
    "Many draws of the same photos: fastai's batch transforms twice, and ours"
    n, stock = 600, []
    files = sorted((four_photos/'train').rglob('*.png'))
    squares = torch.stack([torch.from_numpy(np.array(Image.open(f))) for f in files])
    squares = TensorImage(squares.permute(0, 3, 1, 2).float()/255)
    tfms = image_tfms(116, 56, dict(min_scale=.5), 'crop', 'none')[1]
    for _ in range(2):
        stock.append(Moments())
        for _ in range(n):
            x = squares
            for t in tfms: x = t(x, split_idx=0)
            stock[-1].add(x)
    found = resident_moments(four_photos, n)
    apart = lambda a, b: (a.mean - b.mean).abs().mean().item()
    between, gap = apart(*stock), max(apart(found, o) for o in stock)
    ratio = [(found.variance.mean((1, 2, 3))/o.variance.mean((1, 2, 3))).numpy() for o in stock]
    record_property('mean', (between, gap))
    record_property('variance', [o.tolist() for o in ratio])
    assert gap < 1.5*between + .5 < 4, (gap, between)
    assert all((.9 < o).all() and (o < 1.15).all() for o in ratio), ratio
    off = resident_moments(four_photos, 100, augment=dict(min_scale=.5, do_flip=False))
    assert min(apart(off, o) for o in stock) > 2*gap


FITTED = [  # presize, size, fit, stats, augment
    (460, 224, 'crop', 'imagenet', None), (160, 128, 'crop', 'imagenet', None), (160, 128, 'squish', 'none', None),
    (160, 128, 'pad', 'own', None), (32, 32, 'croppad', 'none', PLAIN), (32, 32, 'crop', 'own', PLAIN),
    (32, 32, 'pad', 'none', {}), (40, 32, 'croppad', ([.4, .5, .6], [.2, .3, .25]), dict(crop=True)),
    (40, 32, 'croppad', 'own', dict(max_rotate=0, max_zoom=1, max_warp=0, max_lighting=0, crop=True)),
    (40, 32, 'crop', 'imagenet', PLAIN), (97, 41, 'squish', 'imagenet', dict(flip_vert=True)),
    (150, 31, 'crop', 'imagenet', dict(min_scale=.5)), (150, 31, 'crop', 'imagenet', {}),
    (48, 48, 'crop', 'imagenet', dict(min_scale=.25)), (30, 60, 'crop', 'imagenet', None)]


@pytest.mark.parametrize('presize, size, fit, stats, augment', FITTED, ids=str)
def test_validation(pictures, presize, size, fit, stats, augment):
    "fastai's tensors but for the rounding to bytes, on average a quarter of a grey level and at most half of one"
    kw = dict(size=size, presize=presize, fit=fit, stats=stats, augment=augment, max_per_class=(5, 5))
    a, b = (f(pictures, **kw) for f in (ours, theirs))
    used = {'imagenet': imagenet_stats, 'none': None, 'own': a.info['stats']}.get(str(stats), stats)
    gap = grey_levels(inputs(a.valid), inputs(b.valid), used)
    assert a.info['stats'] == b.info['stats'] and gap.mean() < .3 and gap.max() < .51
    x = a.one_batch()[0]
    assert x.shape == (8, 3, size, size) and x.isfinite().all()


def test_validation_of_photos(photos):
    kw = dict(size=128, presize=160, max_per_class=(2, 4))
    gap = grey_levels(*(inputs(f(photos, **kw).valid) for f in (ours, theirs)))
    assert len(gap) == 40 and gap.mean() < .3 and gap.max() < .51


@pytest.mark.parametrize('size', [(80, 40), (40, 100), (60, 60)], ids=str)
@pytest.mark.parametrize('turned', [False, True])
def test_photos_that_are_not_square(size, turned, tmp_path, own_cache):
    "The square lies anywhere in the photo, as the stock loader places it: white on one end, how much white is seen?"
    width, height = size
    white = np.zeros((height, width, 3), np.uint8)
    (white[:height//2] if height > width else white[:, :width//2])[:] = 255
    exif = Image.Exif()
    if turned: exif[274], white = 6, np.rot90(white)
    for split, n in (('train', 16), ('val', 2)):
        for c in 'ab':
            (tmp_path/split/c).mkdir(parents=True)
            for i in range(n): Image.fromarray(white).save(tmp_path/split/c/f'{i}.png', exif=exif, pnginfo=text(c, i))
    kw = dict(size=20, presize=20, bs=32, augment=PLAIN, stats='none')
    set_seed(0)
    def seen(f): return torch.cat([x.mean((1, 2, 3)) for _ in range(30) for x, _ in f(tmp_path, **kw).train])
    a, b = seen(ours), seen(theirs)
    assert len(a) == 30*32 and ks_2samp(a.round(decimals=1), b.round(decimals=1)).pvalue > .001
    if width != height: assert a.min() < .05 and a.max() > .95
    else: assert (a - .5).abs().max() < .01
    a, b = (inputs(f(tmp_path, **kw).valid) for f in (ours, theirs))
    assert (a - b).abs().max()*255 < .51


def text(*words):
    "Something that tells one file from another"
    info = PngInfo()
    info.add_text('words', str(words))
    return info


def test_training_images_without_chance(pictures):
    "Squares without augmentation are fastai's, as they are and shrunk; from 200 ours averages 2 pixels, fastai 2.5"
    for presize, size, limit in ((40, 40, .6), (80, 40, .6), (160, 40, .6), (200, 40, 1)):
        kw = dict(size=size, presize=presize, fit='squish', augment=PLAIN)
        a, b = (inputs(f(pictures, **kw).train.new(shuffle=False)) for f in (ours, theirs))
        assert grey_levels(a, b).mean() < limit


@pytest.mark.parametrize('augment', [dict(min_scale=.5), dict(batch=True), dict(flip_vert=True, pad_mode='zeros'),
                                     dict(crop=True, mode='nearest')], ids=str)
@pytest.mark.parametrize('presize', [40, 100])
def test_whole_batches_by_torch(pictures, augment, presize):
    "What a GPU does, on the CPU: the same draws, the same pictures"
    found = []
    for move in (False, True):
        set_seed(3)
        dls = ours(pictures, presize=presize, augment=augment)
        if move: dls.train.resident.move('device', CPU)
        found.append(([b for _ in range(2) for b in dls.train], list(dls.valid)))
        assert isinstance(dls.train.resident.squares, torch.Tensor) == move
    (train, valid), (train_torch, valid_torch) = found
    assert len(train) == len(train_torch) == 6
    for (x, y), (z, w) in zip(train, train_torch):
        assert torch.equal(y, w) and type(x) is type(z) and x.dtype == z.dtype and x.shape == z.shape
        assert grey_levels(x, z).mean() < 1
    for (x, y), (z, w) in zip(valid, valid_torch): assert torch.equal(y, w) and (x - z).abs().max() < 1e-5


# seeds, epochs and threads

def two_epochs(folder, seed=5, disturb=lambda: None, **kw):
    set_seed(seed)
    dls, found = ours(folder, **kw), []
    for _ in range(2):
        for b in dls.train:
            found.append(b)
            disturb()
    return found


def same(a, b): return len(a) == len(b) and all(torch.equal(x, z) and torch.equal(y, w) for (x, y), (z, w) in zip(a, b))


@pytest.mark.parametrize('augment', [None, dict(batch=True)], ids=str)
def test_seeds(pictures, augment):
    "Bit for bit, whatever the threads, wherever the pixels, and whoever draws between the batches"
    def disturb():
        torch.rand(3), np.random.rand(3), random.random()
        random.seed(1)
    kw = dict(augment=augment)
    first = two_epochs(pictures, **kw)
    assert len(first) == 6
    for more in (dict(num_workers=1), dict(num_workers=5), dict(hold='memory'), dict(disturb=disturb)):
        assert same(first, two_epochs(pictures, **kw, **more)), more
    assert not same(first, two_epochs(pictures, seed=6, **kw))
    pictures_of = [torch.stack([o.std() for x, _ in first[i:i+3] for o in x]).sort().values for i in (0, 3)]
    assert not torch.isclose(*pictures_of, atol=1e-4).any(), 'the second epoch shows the images of the first'
    stds = torch.stack([o.std() for x, _ in first for o in x])
    assert len(stds.unique()) == len(stds)


def test_each_image_has_its_own_draws(tmp_path):
    "Copies of one picture look different, in a batch, in the next batch and in the next epoch"
    for split, n in (('train', 6), ('val', 1)):
        for name in CLASSES[:2]:
            (tmp_path/split/name).mkdir(parents=True)
            for i in range(n): Image.fromarray(waves(split == 'val')).save(tmp_path/split/name/f'{i}.png')
    dls = ours(tmp_path, bs=4)
    x = torch.cat([inputs(dls.train) for _ in range(2)]).flatten(1)
    assert len(x) == 24 and (torch.cdist(x, x) + 99*torch.eye(24)).min() > 1


def random_states(): return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


@pytest.mark.parametrize('augment', [None, dict(batch=True), PLAIN], ids=str)
def test_decoding_draws_nothing(pictures, own_cache, augment):
    "So the first run, which decodes, and the second, which does not, give a network the same weights and batches"
    found = []
    for _ in range(2):
        set_seed(4)
        dls = ours(pictures, augment=augment)
        found.append((random_states(), inputs(dls.train)))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


def test_the_seed_alone_decides(pictures):
    "Two loaders made after each other differ, and an epoch is as it is however much of the one before was used"
    set_seed(1)
    a, b = ours(pictures), ours(pictures)
    assert not torch.equal(inputs(a.train), inputs(b.train))
    def second_epoch(batches):
        set_seed(1)
        dls = ours(pictures)
        for _ in zip(range(batches), dls.train): pass
        return list(dls.train)
    assert same(second_epoch(1), second_epoch(3))


def test_each_image_once(pictures):
    "An epoch has every image once, but for those of the last, incomplete batch of the training set"
    dls = ours(pictures, bs=8, augment=PLAIN)
    for _ in range(2):
        ys = torch.cat([y for _, y in dls.train])
        assert ys.bincount().tolist() == [8, 8, 8]
        x = inputs(dls.train)
        assert len(torch.unique(x, dim=0)) == 24
    seen = [y for _, y in dls.valid]
    assert [len(o) for o in seen] == [8, 7] and torch.cat(seen).tolist() == [i//5 for i in range(15)]
    dls = ours(pictures, bs=9)
    assert [len(y) for _, y in dls.train] == [9, 9] and len(dls.train) == 2 and [len(y) for _, y in dls.valid] == [9, 6]
    assert len(torch.unique(inputs(dls.train), dim=0)) == 18
    one = ours(pictures, bs=24)
    assert len(list(one.train)) == 1 and len(list(one.valid)) == 1


def test_labels_stay_with_their_images(tmp_path):
    "Each class a colour: shuffled, by torch, and in all loaders made of others"
    colours = dict(red=(250, 5, 5), green=(5, 250, 5), blue=(5, 5, 250))
    for split, n in (('train', 7), ('val', 3)):
        for name, colour in colours.items():
            (tmp_path/split/name).mkdir(parents=True)
            for i in range(n): Image.new('RGB', (30 + i, 40), colour).save(tmp_path/split/name/f'{i}.png')
    dls = ours(tmp_path, bs=5, stats='none')
    assert list(dls.vocab) == ['blue', 'green', 'red']
    for move in (False, True):
        if move: dls.train.resident.move('device', CPU)
        some = dls.test_dl(dls.train_ds.items[::-3] + dls.valid_ds.items[::2], with_labels=True, bs=4)
        for dl in (dls.train, dls.valid, some, dls.train.new(bs=3), dls.valid.new(shuffle=True, bs=2)):
            for x, y in dl: assert torch.equal(2 - x.mean((2, 3)).argmax(1).as_subclass(torch.Tensor), torch.tensor(y))


class Fails(Callback):
    def after_batch(self): raise KeyError('stop')


def test_stopping_early(pictures):
    "An epoch that is left leaves no threads, and the next one is whole"
    before = threading.active_count()
    dls = ours(pictures, bs=4, num_workers=3)
    for stop in (1, 2, 4):
        for i, _ in enumerate(dls.train, 1):
            if i == stop: break
        assert len(list(dls.train)) == 6
    it = iter(dls.train)
    next(it)
    del it
    dls.one_batch(), dls.valid.one_batch()
    learn = resnet_learner(dls, 'cifar_resnet8')
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2, cbs=ShortEpochCallback(.2))
    with pytest.raises(KeyError), learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=Fails())
    assert threads_end(before)
    assert len(list(dls.train)) == 6


def test_valid_pixels(pictures):
    "It leaves its input alone and says what the validation transforms say"
    squares = np.stack([waves(i, (50, 50)) for i in range(3)])
    before, tfms = squares.copy(), image_tfms(50, 30, None, 'crop', 'imagenet')[1]
    found = valid_pixels(squares, tfms)
    x = TensorImage(torch.from_numpy(squares).permute(0, 3, 1, 2).float()/255)
    for t in tfms[:-1]: x = t(x, split_idx=1)
    assert (squares == before).all() and found.dtype == np.uint8 and found.shape == (3, 30, 30, 3)
    assert np.abs(found/255 - x.permute(0, 2, 3, 1).numpy()).max()*255 < .51
