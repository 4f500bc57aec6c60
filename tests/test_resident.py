"The resident loader: as a Learner uses it, its files on the disk, and its distributions and pictures beside fastai's."
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
import pandas as pd
import pytest
import torch
from fastai.vision.all import (AffineCoordTfm, Brightness, Callback, ClassificationInterpretation, Contrast, CutMix,
    Dihedral, LightingTfm, MixUp, PILImage, RandomResizedCropGPU, Rotate, ShortEpochCallback, TensorImage, Warp, Zoom,
    dihedral_mat, imagenet_stats, load_learner, set_seed, setup_aug_tfms)
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy.stats import chi2_contingency, ks_2samp

from conftest import environment, extract_photos, noise
from resnet_nbdev import resident
from resnet_nbdev.core import InputError
from resnet_nbdev.augment import FITS, fix_augment, image_tfms
from resnet_nbdev.catalogue import PLAIN
from resnet_nbdev.data import get_data
from resnet_nbdev.images import open_image
from resnet_nbdev.learner import resnet_learner
from resnet_nbdev.predictions import plot_predictions
from resnet_nbdev.resident import valid_pixels, resident_bytes, resident_data, room_for
from resnet_nbdev.warps import draw_augment, homographies, shrink_to, lookup_tables, warp_cv2, warp_torch
from resnet_nbdev.runs import predict
from resnet_nbdev.training import fine_tune

CPU = torch.device('cpu')
CLASSES = 'coarse', 'fine', 'medium'
SIZES = (60, 60), (90, 50), (41, 77), (30, 26), (200, 120)


def waves(seed, size=(60, 60), frequency=12):
    "A picture with large and small shapes and no symmetry, (height, width, 3)"
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size[0], :size[1]]/max(size)
    rings = [np.sin(frequency*np.hypot(x - a, y - b) + c) for a, b, c in rng.uniform(0, 3, (3, 3))]
    light = 127 + 90*np.stack(rings, -1)*rng.uniform(.5, 1, 3) + 30*(x - y)[..., None]
    return light.clip(0, 255).astype(np.uint8)


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
def fresh():
    set_seed(0)
    yield
    plt.close('all')


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


# distributions

SETTINGS = dict(
    published=dict(min_scale=.5), default={}, mult=dict(mult=2, min_scale=.3), vertical=dict(flip_vert=True),
    far=dict(min_zoom=.5, max_zoom=1.5, min_scale=.9), turned=dict(max_rotate=45, max_warp=0, do_flip=False),
    always=dict(p_affine=1, p_lighting=1, max_lighting=.5), never=dict(p_affine=0, p_lighting=0),
    miniplaces=dict(hflip=.25, vflip=.25, max_rotate=15, p_affine=1, max_zoom=1, max_warp=0, max_lighting=0),
    one_way=dict(vflip=.9), cropped=dict(max_rotate=0, max_zoom=1, max_warp=0, max_lighting=0, crop=True),
    contrasts=dict(max_contrast=.4, p_lighting=.6), plain=PLAIN, batch=dict(batch=True, min_scale=.5),
    batch_vertical=dict(batch=True, flip_vert=True, min_zoom=.8))


SYMMETRIES = dihedral_mat(torch.empty(8, 1), p=1., draw=list(range(8)))[:, :2, :2].numpy()


def stock_draws(augment, n, presize=460, size=224):
    "What fastai's transforms draw for `n` images, under our names, read from their matrices and attributes"
    tfms, rows = image_tfms(presize, size, augment, 'crop', 'none')[1], {}
    batch = augment.get('batch', False)
    calls = [torch.empty(3, 3, 2, 2)]*n if batch else [torch.empty(n, 1)]
    def all_calls(f):  # batch: one value a call, the same for all of its images
        found = [f(x) for x in calls]
        if not batch: return found[0]
        assert all((o == o[:1]).all() for o in found)
        return torch.stack([o[0] for o in found])
    neutral = dict(dihedral=0, warp_x=0, warp_y=0, rotate=0, zoom=1, zoom_x=np.nan, zoom_y=np.nan, crop=presize, left=0,
                   top=0, place_x=.5, place_y=.5, brightness=.5, contrast=1)
    square, places = image_tfms(presize, size, augment, 'crop', 'none')[0][0], []
    for _ in range(n):
        square.before_call(None, 0)
        places.append(square.pcts)
    rows['place_x'], rows['place_y'] = np.array(places).T
    for t in tfms:
        for f in getattr(t, 'aff_fs', []):
            m, kind = all_calls(f).double().numpy(), f.func.__name__
            if kind in ('flip_mat', 'dihedral_mat'):
                known = SYMMETRIES[:, None]
                hits = (known == m[:, :2, :2]).all((2, 3))
                assert (hits.sum(0) == 1).all()
                rows['dihedral'] = hits.argmax(0)
            elif kind == 'rotate_mat': rows['rotate'] = np.degrees(np.arctan2(m[:, 0, 1], m[:, 0, 0]))
            else:
                s, zoomed = m[:, 0, 0], np.abs(m[:, 0, 0] - 1) > 1e-3
                rows['zoom'] = 1/s
                for k, i in (('zoom_x', 0), ('zoom_y', 1)):
                    rows[k] = np.where(zoomed, (m[:, i, 2]/np.where(zoomed, 1 - s, 1) + 1)/2, np.nan)
        for f in getattr(t, 'coord_fs', []):
            def corners(x):
                f.before_call(x)
                return f.targ_pts[:, 0]
            at = all_calls(corners).numpy()
            rows['warp_y'], rows['warp_x'] = -1 - at[:, 0], -1 - at[:, 1]
        if isinstance(t, LightingTfm):
            for f in t.fs:
                k = 'brightness' if 'Brightness' in type(f).__name__ else 'contrast'
                def change(x):
                    f.before_call(x)
                    return f.change
                rows[k] = all_calls(change).numpy()*(rows[k] if k == 'contrast' and k in rows else 1)
        if isinstance(t, RandomResizedCropGPU):
            drawn, x = [], torch.empty(1, 1, 1, 1).expand(1, 3, presize, presize)
            for _ in range(n):
                t.before_call(x, 0)
                drawn.append((*t.cp_size, *t.tl))
            height, rows['crop'], rows['top'], rows['left'] = np.array(drawn).T
            assert (height == rows['crop']).all()
        assert isinstance(t, (AffineCoordTfm, LightingTfm, RandomResizedCropGPU))
    return pd.DataFrame({k: np.broadcast_to(rows.get(k, v), n) for k, v in neutral.items()})


def our_draws(augment, n, presize=460, size=224):
    full, rng = fix_augment(augment), np.random.default_rng(0)
    if full['batch']:
        found = [draw_augment(3, full, presize, size, rng) for _ in range(n)]
        assert all((o == o.iloc[0]).all(axis=None) for o in found)
        found = pd.concat([o[:1] for o in found])
    else: found = draw_augment(n, full, presize, size, rng)
    centres = ['zoom_x', 'zoom_y']
    return found.assign(**found[centres].where((1 - 1/found.zoom).abs() > 1e-3))


def p_values(a, b):
    "Of the hypothesis that each column has the same distribution in both tables; six digits make float32 and 64 agree"
    assert set(a) == set(b)
    a, b = a.astype(float).round(6), b.astype(float).round(6)
    p = {k: ks_2samp(a[k].dropna(), b[k].dropna()).pvalue if a[k].notna().any() and b[k].notna().any() else
         float(a[k].isna().all() and b[k].isna().all()) for k in a}
    at = lambda t, k: t[k]/(t['crop'].rsub(460) + 1)  # the place within what the crop leaves free
    return {**p, **{f'{k} in crop': ks_2samp(at(a, k), at(b, k)).pvalue for k in ('left', 'top')}}


@pytest.mark.parametrize('name', SETTINGS)
def test_distributions(name, record_property):
    "Kolmogorov-Smirnov, each parameter; with fourteen of them p below .01/14 would be unlikely"
    augment = SETTINGS[name]
    n = 1000 if augment.get('batch') else 20_000
    p = p_values(our_draws(augment, n), stock_draws(augment, n))
    record_property('p', float(min(p.values())))
    assert min(p.values()) > .01/14, p


@pytest.mark.parametrize('wrong, seen', [
    (dict(max_rotate=11), 'rotate'), (dict(max_zoom=1.11), 'zoom'), (dict(max_warp=.22), 'warp_x warp_y'),
    (dict(max_lighting=.22), 'brightness contrast'), (dict(flip_vert=True), 'dihedral'),
    (dict(p_affine=.7), 'rotate zoom warp_x warp_y'), (dict(min_scale=.52), 'crop'), (dict(hflip=.47), 'dihedral'),
    (dict(max_contrast=.05), 'contrast')], ids=str)
def test_the_distributions_are_told_apart(wrong, seen):
    "A setting that is a little off is seen, where it is and nowhere else"
    p = p_values(our_draws({**SETTINGS['published'], **wrong}, 20_000), stock_draws(SETTINGS['published'], 20_000))
    found, seen = {k for k, v in p.items() if v < .01/14}, set(seen.split())
    assert seen <= found <= seen | {'left', 'top'}, p


def test_independence():
    "Which parameters keep their neutral values together, and that places, centres and strengths know nothing of others"
    drawn = [f(SETTINGS['published'], 20_000) for f in (our_draws, stock_draws)]
    neutral = dict(dihedral=0, warp_x=0, warp_y=0, rotate=0, zoom=1, brightness=.5, contrast=1)
    pattern = [sum((t[k].round(6) != v)*2**i for i, (k, v) in enumerate(neutral.items())) for t in drawn]
    counts = pd.DataFrame([o.value_counts() for o in pattern]).fillna(0)
    assert counts.shape[1] > 100 and chi2_contingency(counts).pvalue > .01
    for t in drawn:
        t = t.assign(left=t.left/(461 - t['crop']), top=t.top/(461 - t['crop']))[t['crop'] < 430]
        related = t.corr(method='spearman').to_numpy() - np.eye(14)
        assert np.abs(related).max() < .04


@pytest.mark.parametrize('presize, size', [(1, 1), (2, 1), (33, 32), (224, 224), (32, 64)])
def test_crops_stay_inside(presize, size):
    for augment in (dict(min_scale=.01), {}):
        t = draw_augment(2000, fix_augment(augment), presize, size, np.random.default_rng(0))
        for k in ('left', 'top'):
            assert t[k].min() >= 0 and (t[k] + t['crop']).max() <= presize and (t[k] == t[k].round()).all()
        assert t['crop'].between(max(0, round(presize*np.sqrt(augment.get('min_scale', 1)))), presize).all()


# pictures

def stock_pictures(squares, drawn, size, mode='bilinear', pad_mode='reflection'):
    "fastai's transforms with the parameters in `drawn`, a row for each of `squares`, to (N, 3, size, size)"
    of, fixed = lambda k: drawn[k].astype(float).tolist(), dict(p=1., mode=mode, pad_mode=pad_mode)
    tfms = setup_aug_tfms([Dihedral(draw=drawn.dihedral.tolist(), **fixed),
                           Warp(draw_x=of('warp_x'), draw_y=of('warp_y'), **fixed), Rotate(draw=of('rotate'), **fixed),
                           Zoom(draw=of('zoom'), draw_x=of('zoom_x'), draw_y=of('zoom_y'), **fixed),
                           Brightness(draw=of('brightness'), p=1.), Contrast(draw=of('contrast'), p=1.)])
    tfms[0].mode, tfms[0].pad_mode = mode, pad_mode
    x = TensorImage(torch.from_numpy(squares).permute(0, 3, 1, 2).float()/255)
    for t in tfms: x = t(x, split_idx=0)
    cut, found = RandomResizedCropGPU(size, mode=mode), []
    for im, r in zip(x, drawn.itertuples()):
        cut.tl, cut.cp_size = (int(r.top), int(r.left)), (int(r.crop),)*2
        found.append(cut._encode(im[None], mode))
    return torch.cat(found).as_subclass(torch.Tensor)


def our_pictures(squares, drawn, size, mode='bilinear', pad_mode='reflection', stats=None):
    "The same by OpenCV and by torch"
    presize = squares.shape[1]
    side, H, T = shrink_to(drawn, presize, size), homographies(drawn, presize, size), lookup_tables(drawn, stats)
    assert H.shape == (len(drawn), 3, 3) and T.shape == (len(drawn), 3, 256)
    by_cv2 = np.full((len(drawn), 3, size, size), np.nan, np.float32)
    for i in range(len(drawn)): warp_cv2(squares[i], H[i], T[i], by_cv2[i], side, mode, pad_mode)
    by_torch = warp_torch(torch.from_numpy(squares), H, drawn, size, side, stats, mode, pad_mode)
    assert not np.isnan(by_cv2).any() and by_torch.shape == by_cv2.shape
    return torch.from_numpy(by_cv2), by_torch


def given(presize, size, n=1, **values):
    "Parameters for `n` images: neutral, with the whole square, but for `values`"
    neutral = dict(dihedral=0, warp_x=0., warp_y=0., rotate=0., zoom=1., zoom_x=.5, zoom_y=.5, crop=presize, left=0,
                   top=0, place_x=.5, place_y=.5, brightness=.5, contrast=1.)
    return pd.DataFrame({k: np.broadcast_to(values.get(k, v), n) for k, v in neutral.items()})


def compare(drawn, presize, size, far, near=.6, frequency=8, **kw):
    "Mean grey levels between each two of the three; `far`: fastai interpolates twice"
    squares = np.stack([waves([i, 7], (presize, presize), frequency) for i in range(len(drawn))])
    stock, (by_cv2, by_torch) = stock_pictures(squares, drawn, size, **kw), our_pictures(squares, drawn, size, **kw)
    apart = lambda a, b: (a - b).abs().mean((1, 2, 3)).max().item()*255
    found = dict(cv2=apart(by_cv2, stock), torch=apart(by_torch, stock), both=apart(by_cv2, by_torch))
    assert found['both'] < near and found['cv2'] < far and found['torch'] < far, found
    return squares, stock, by_cv2, by_torch


@pytest.mark.parametrize('size', [64, 41])
def test_symmetries(size):
    "All eight; for images of their own size bit for bit, but for the rounding of floats"
    drawn = given(64, size, 8, dihedral=np.arange(8))
    squares, stock, by_cv2, by_torch = compare(drawn, 64, size, .6)
    if size == 64:
        exact = torch.stack([TensorImage(torch.from_numpy(o).permute(2, 0, 1)).dihedral(k).float()/255
                             for k, o in enumerate(squares)])
        assert torch.allclose(by_cv2, exact, atol=1e-6) and (by_torch - exact).abs().max() < .01
    flat = by_cv2.flatten(1)
    assert (torch.cdist(flat, flat) + 99*torch.eye(8)).min() > 1


@pytest.mark.parametrize('pad_mode', ['reflection', 'border', 'zeros'])
@pytest.mark.parametrize('mode', ['bilinear', 'nearest'])
@pytest.mark.parametrize('values', [
    dict(rotate=[-45., 45]), dict(rotate=[10., 180]), dict(warp_x=[.2, -.2]), dict(warp_y=[.2, -.2]),
    dict(warp_x=[.4, -.4], warp_y=[-.4, .3]), dict(zoom=[1.5, 2], zoom_x=[0., 1], zoom_y=[1., .3]),
    dict(zoom=[.5, .8], zoom_x=[0., .7], zoom_y=[1., .2]), dict(brightness=[.1, .9]), dict(contrast=[.3, 3.])], ids=str)
def test_each_parameter(values, mode, pad_mode):
    "Alone at its extremes; nearest neighbours of bytes and of floats may differ where two are equally near"
    limit = .7 if mode == 'bilinear' else 3
    compare(given(65, 65, 2, **values), 65, 65, limit, limit, mode=mode, pad_mode=pad_mode)


@pytest.mark.parametrize('presize, size, far', [
    (96, 64, 1.2), (97, 63, 1.2), (64, 64, 2), (33, 21, 3), (40, 39, 3), (200, 40, 1.5), (201, 31, 1.5), (30, 60, 3)])
def test_all_parameters(presize, size, far):
    "Crops at their corners and within, odd sizes, images as large as the squares, larger, and far smaller"
    some = draw_augment(8, fix_augment(dict(max_rotate=30, flip_vert=True)), presize, size, np.random.default_rng(1))
    side = int(presize*.8)
    free = presize - side
    drawn = some.assign(dihedral=range(8), crop=side, left=[0, free, 0, free, free//2, 1, 2, 3],
                        top=[0, 0, free, free, free//3, 3, 1, 0])
    compare(drawn, presize, size, far, 1, frequency=5)


def test_shrinking_first():
    "Far larger squares are averaged first, by halving: noise becomes grey, as with fastai, and does not stay noise"
    squares, drawn = np.stack([noise(i, 256) for i in range(4)]), given(256, 32, 4)
    assert shrink_to(drawn, 256, 32) == 64 and shrink_to(drawn, 256, 128) == shrink_to(drawn, 256, 256) == 256
    stock, by_both = stock_pictures(squares, drawn, 32), our_pictures(squares, drawn, 32)
    for o in by_both: assert o.std().item() == pytest.approx(stock.std().item(), rel=.1) and o.std() < .09


@pytest.mark.parametrize('mode', ['bilinear', 'nearest', 'bicubic'])
@pytest.mark.parametrize('presize, size', [(1, 1), (2, 1), (1, 5), (5, 1), (300, 1), (3, 2)])
def test_tiny(presize, size, mode):
    "Nothing crashes, and a square of one colour stays what it is"
    if mode == 'bicubic' and presize == 1: pytest.skip('see test_one_pixel')
    squares = np.full((5, presize, presize, 3), 200, np.uint8)
    drawn = draw_augment(5, fix_augment(dict(max_lighting=0)), presize, size, np.random.default_rng(0))
    for o in our_pictures(squares, drawn, size, mode): assert ((o*255 - 200).abs() < 1).all()


def test_one_pixel():
    "In a process of its own, as OpenCV never comes back from its bicubic reflection of a single pixel"
    code = """
        import numpy as np
        from resnet_nbdev.warps import warp_cv2
        out = np.zeros((3, 4, 4), np.float32)
        table = np.tile(np.arange(256, dtype=np.float32), (3, 1))
        warp_cv2(np.full((1, 1, 3), 200, np.uint8), np.eye(3) + .1, table, out, 1, 'bicubic')
        print(out.min(), out.max())
        """
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], env=environment(), timeout=60,
                          capture_output=True, text=True)
    assert done.stdout.split() == ['200.0', '200.0'], done


def test_bicubic():
    drawn = draw_augment(4, fix_augment({}), 64, 64, np.random.default_rng(2))
    squares = np.stack([waves(i, (64, 64), 8) for i in range(4)])
    stock, (a, b) = stock_pictures(squares, drawn, 64, 'bicubic'), our_pictures(squares, drawn, 64, 'bicubic')
    # OpenCV's kernel has a = -0.75, and so has torch's
    for one, other in ((a, b), (a, stock), (b, stock)): assert (one - other).abs().mean()*255 < 1.5


def test_tables():
    "Light and normalisation of all 256 values, beside fastai's on floats"
    drawn = given(2, 2, 6, brightness=np.array([.5, .4, .6, .1, .9, .5]), contrast=np.array([1, .8, 1.25, 2, .5, 3]))
    x = TensorImage((torch.arange(256)/255).view(1, 1, 1, 256).expand(6, 3, 1, 256).clone())
    for t in setup_aug_tfms([Brightness(draw=drawn.brightness.tolist(), p=1.),
                             Contrast(draw=drawn.contrast.tolist(), p=1.)]): x = t(x, split_idx=0)
    mean, std = (torch.tensor(o)[:, None] for o in imagenet_stats)
    np.testing.assert_allclose(lookup_tables(drawn, None), x[:, :, 0], atol=1e-4)
    np.testing.assert_allclose(lookup_tables(drawn, imagenet_stats), (x[:, :, 0] - mean)/std, atol=1e-3)
    np.testing.assert_allclose(lookup_tables(None, None)[0], np.tile(np.arange(256)/255, (3, 1)), atol=1e-7)
    assert lookup_tables(drawn, None).dtype == np.float32


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


def test_middle(pictures):
    "It leaves its input alone and says what the validation transforms say"
    squares = np.stack([waves(i, (50, 50)) for i in range(3)])
    before, tfms = squares.copy(), image_tfms(50, 30, None, 'crop', 'imagenet')[1]
    found = valid_pixels(squares, tfms)
    x = TensorImage(torch.from_numpy(squares).permute(0, 3, 1, 2).float()/255)
    for t in tfms[:-1]: x = t(x, split_idx=1)
    assert (squares == before).all() and found.dtype == np.uint8 and found.shape == (3, 30, 30, 3)
    assert np.abs(found/255 - x.permute(0, 2, 3, 1).numpy()).max()*255 < .51
