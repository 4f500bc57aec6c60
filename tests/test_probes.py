"""Probes: features computed once, a head fitted to them, and a run like any other."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from resnet_nbdev.catalogue import PLAIN
from resnet_nbdev.data import get_data
from resnet_nbdev.explain import feature_maps, grad_cam
from resnet_nbdev.export import export_run
from resnet_nbdev.learner import resnet_learner
from resnet_nbdev.plans import PLANS, build_network, find_plan, plan_cycles, run_cycle
from resnet_nbdev.probes import STRENGTHS, check_probe, fit_head, probe_features
from resnet_nbdev.recipes import run_recipe
from resnet_nbdev.resident import resident_data
from resnet_nbdev.runs import load_run, predict
from torch import nn

from conftest import refuses
from toys import changed, copied, group_of, quietly

SIZES = dict(presize=32, resize=32, bs=4, num_workers=0)


def shades(dest, **classes):
    "A folder of noise about a value of grey for each class"
    rng = np.random.default_rng(0)
    for split, n in (('train', 8), ('val', 4)):
        for name, grey in classes.items():
            (dest/split/name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(grey, grey+60, (20, 20, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(dest/split/name/f'{i}.png')
    return dest


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Two classes, dark and bright, of each 8 training and 4 validation images"
    return shades(tmp_path_factory.mktemp('probe'), dark=0, bright=190)


@pytest.fixture
def dls(folder): return get_data(folder, augment=PLAIN, **SIZES)


def probed(dls, arch='cifar_resnet8', plan='probe', **kw):
    torch.manual_seed(0)
    return quietly(resnet_learner(dls, arch, plan=plan, **kw))


@pytest.mark.parametrize('arch, kw', [('cifar_resnet8', {}), ('cifar_resnet8', dict(taps=3)),
                                      ('cifar_resnet8', dict(cut=2)),
                                      ('cifar_resnet8', dict(cut=2, taps=2, dropout=.5)), ('tiny', dict(taps=4)),
                                      ('tiny_bottleneck', dict(taps=2, precision='bf16'))], ids=str)
def test_only_the_head_moves(arch, kw, dls, tiny):
    learn = probed(dls, arch, **kw)
    before = copied(learn.model)
    cycle, = plan_cycles(learn, 3, 5, 1e-2)
    run_cycle(learn, cycle)
    assert {group_of(k) for k in changed(before, learn.model)} == {'head'}
    assert learn.recorder.values[-1][-1] == 1 and learn.recorder.values[-1][0] > 0


def test_features_are_what_the_last_layer_reads(dls):
    "In the order of the images, from every loader the same, in evaluation mode; modes stay"
    learn = probed(dls)
    x, y = probe_features(learn, 0)
    assert y.tolist() == [int(o) for _, o in dls.train_ds] and learn.model.training
    logits, _ = learn.get_preds(dl=dls.test_dl(dls.train_ds.items), act=nn.Identity())
    torch.testing.assert_close(learn.model.head.fc(x), logits.as_subclass(torch.Tensor))


def test_resident_features_are_the_same(folder, dls):
    learn = probed(dls)
    want = probe_features(learn, 0)[0]
    learn.dls = resident_data(folder, 32, augment=PLAIN, presize=32, bs=4, num_workers=1)
    torch.testing.assert_close(probe_features(learn, 0)[0], want, atol=2e-2, rtol=0)


def test_the_layer_is_logistic_regression():
    "Its gradient with the decay of the strength is zero; features need not be of size one"
    rng = np.random.default_rng(1)
    y = torch.from_numpy(rng.integers(0, 3, 60))
    x = torch.from_numpy(rng.normal(size=(60, 5))*7 + 40).float() + 8*y[:, None]
    w, b, rows = fit_head((x, y), (x[::2], y[::2]), 3, strengths=[0.1])
    size = x.std(0).mean() + 1e-6
    u = (w*size).requires_grad_()
    loss = nn.functional.cross_entropy((x - x.mean(0))/size @ u.T + b + w @ x.mean(0), y) + 0.1/2*(u**2).sum()
    loss.backward()
    assert u.grad.abs().max() < 1e-2 and rows[0]['accuracy'] > 0.6


def test_the_strength_is_chosen_by_the_validation_images():
    "Noise that is learned by heart is held down; where there is none, decay only costs"
    rng = np.random.default_rng(2)
    def sample(n, noise):
        y = rng.integers(0, 2, n)
        x = np.c_[2*y - 1 + rng.normal(size=n)*noise, rng.normal(size=(n, 60))].astype(np.float32)
        return torch.from_numpy(x), torch.from_numpy(y)
    chosen = {noise: fit_head(sample(40, noise), sample(400, noise), 2)[2][-1]['strength'] for noise in (0.05, 2)}
    assert set(chosen.values()) <= set(STRENGTHS) and chosen[2] > 1e-3


def test_a_class_without_training_images():
    x, y = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2*2
    w, b, _ = fit_head((x, y), (x, y), 4)
    answers = (x @ w.T + b).argmax(1)
    assert set(answers.tolist()) <= {0, 2} and (answers == y).float().mean() > 0.5 and b.isfinite().all()


@pytest.mark.parametrize('plan, kinds', [('probe+late', ['probe', 'one_cycle']), ('probe+all', ['probe', 'one_cycle']),
                                         ('probe+gradual', ['probe', *['one_cycle']*3]), ('probe+probe', ['probe'])])
def test_a_probe_in_place_of_the_first_cycle(plan, kinds, dls, tiny):
    learn = probed(dls, 'tiny', plan)
    assert [o['kind'] for o in plan_cycles(learn, 1, 1, 1e-2)] == kinds
    assert [o['kind'] for o in plan_cycles(learn, 0, 1, 1e-2)] == [kinds[0], *kinds[1:][-1:]]
    for cycle in plan_cycles(learn, 1, 1, 1e-2): run_cycle(learn, cycle)


def test_plans_with_a_probe():
    assert find_plan('probe+late') == PLANS['late'].but(probe=True)
    refuses("unknown plan 'lat'", find_plan, 'probe+lat')


# a run like any other

@pytest.mark.parametrize('taps', [0, 2])
def test_a_probe_is_a_run(taps, folder, tiny, tmp_path):
    "It is written, predicts, is exported, and goes on with more epochs of something else"
    recipe = dict(data=str(folder), arch='tiny', plan='probe', presize=48, resize=48, bs=4, workers=0, taps=taps)
    learn = run_recipe(recipe, 'mine', runs=tmp_path, json_lines=True)
    row, = pd.read_csv(learn.run_path/'history.csv').itertuples()
    assert (row.accuracy, row.epoch) == (1, 1) and row.train_loss > 0 and row._7 > 0  # images/s
    config = json.loads((learn.run_path/'config.json').read_text())
    assert config['arguments']['augment'] == PLAIN and config['learner']['plan']['probe']
    model, _ = load_run(learn.run_path)
    found = predict(learn.run_path, folder/'val', k=1)
    assert len(found) == 8 and all(o['class'] in str(o.image) for _, o in found.iterrows())
    assert export_run(learn.run_path, 'pt2').exists()
    assert run_recipe(recipe, 'mine', resume=True, runs=tmp_path, json_lines=True).run_path == learn.run_path
    if taps: return
    fine = run_recipe({**recipe, 'plan': 'late', 'weights': str(learn.run_path/'best.safetensors'), 'freeze_epochs': 0,
                       'epochs': 1}, 'fine', runs=tmp_path, json_lines=True)
    assert torch.equal(fine.model.body.layer1[0].conv1.weight, model.body.layer1[0].conv1.weight)


def test_the_average_has_the_fitted_head(folder, tiny, tmp_path):
    recipe = dict(data=str(folder), arch='tiny', plan='probe', presize=48, resize=48, bs=4, workers=0, ema=.9)
    learn = run_recipe(recipe, 'mine', runs=tmp_path, json_lines=True)
    averaged, _ = load_run(learn.run_path, 'average')
    assert torch.equal(averaged.head.fc.weight, learn.model.head.fc.weight)


def test_maps_of_a_network_that_reads_several_stages(tiny):
    "Are those of its last stage, not the averages"
    model = build_network('tiny', 2, taps=3)
    images = torch.zeros(1, 3, 96, 96)
    assert feature_maps(model, images).shape[-2:] == grad_cam(model, images, 0).shape[-2:] == (3, 3)


# refused

def test_what_cannot_be_probed(folder, dls, tmp_path, tiny):
    refuses('vary at random', probed, get_data(folder, **SIZES))
    probed(get_data(folder, **SIZES), 'tiny', 'probe+late')
    refuses('not those of Sequential', probed, dls, nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, 2)))
    refuses('hidden adds another', probed, dls, hidden=5)
    refuses('from 1 to 3 stages', probed, dls, taps=4)
    refuses('from 1 to 2 stages', build_network, 'cifar_resnet8', 2, cut=2, taps=3)
    refuses('hidden adds another', run_recipe, dict(data=str(folder), arch='tiny', plan='probe', hidden=3),
            runs=tmp_path)
    refuses('one class, grey: two are needed', get_data, shades(tmp_path/'one', grey=99))
    refuses('only one', check_probe, SimpleNamespace(vocab=['grey']))
    refuses('no use for mixup', run_recipe, dict(data=str(folder), arch='tiny', plan='probe', mixup=.4), runs=tmp_path)
    refuses('no use for progressive, label_smoothing', probed, dls, progressive=(16,), label_smoothing=.1)
    refuses('not finite numbers', fit_head, (torch.full((4, 2), math.nan), torch.arange(4)), 2*(torch.zeros(4, 2),), 4)
    refuses('training images have only one', fit_head, (torch.zeros(4, 2), torch.zeros(4)), 2*(torch.zeros(4, 2),), 4)
    refuses('a name or a `Plan`', find_plan, None)
    assert not (tmp_path/'mine').exists()
