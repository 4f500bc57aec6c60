"""An augmentation as one map and one table: its distributions and pictures beside fastai's."""
import subprocess
import sys
import textwrap

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import (
    AffineCoordTfm,
    Brightness,
    Contrast,
    Dihedral,
    LightingTfm,
    RandomResizedCropGPU,
    Rotate,
    TensorImage,
    Warp,
    Zoom,
    dihedral_mat,
    imagenet_stats,
    set_seed,
    setup_aug_tfms,
)
from resnet_nbdev.augment import fix_augment, image_tfms
from resnet_nbdev.catalogue import PLAIN
from resnet_nbdev.warps import draw_augment, homographies, lookup_tables, shrink_to, warp_cv2, warp_torch
from scipy.stats import chi2_contingency, ks_2samp

from conftest import environment, noise, waves


@pytest.fixture(autouse=True)
def fresh(): set_seed(0)


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


def given(presize, size, n=1, **values):
    "Parameters for `n` images: neutral, with the whole square, but for `values`"
    neutral = dict(dihedral=0, warp_x=0., warp_y=0., rotate=0., zoom=1., zoom_x=.5, zoom_y=.5, crop=presize, left=0,
                   top=0, place_x=.5, place_y=.5, brightness=.5, contrast=1.)
    return pd.DataFrame({k: np.broadcast_to(values.get(k, v), n) for k, v in neutral.items()})


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
