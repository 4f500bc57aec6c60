"""What happens to an image: flips, crops, fits, light and statistics, as published, and in validation nothing."""
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from fastai.vision.all import Pipeline, TensorImage, imagenet_stats
from PIL import Image
from resnet_nbdev.augment import image_tfms
from resnet_nbdev.catalogue import PLAIN, settings_of
from resnet_nbdev.images import open_image

from conftest import noise, refuses
from small_sets import load_small


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


def to_batch(*arrays): return TensorImage(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)/255)


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
    monkeypatch.setattr('resnet_nbdev.catalogue.fetch', None)
    refuses(says, load_small, 'imagewoof', **kw)
