"""Plans, tools and recipes: what moves, how fast, what a run records of it, and what its network then answers."""
import ast
import inspect
import json
import math
import pickle
import shutil
import zipfile
from functools import partial, wraps
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import resnet_nbdev
import torch
import torch.nn.functional as F
from fastai.vision.all import Callback, DataLoader, DataLoaders, MixedPrecision, set_seed
from resnet_nbdev import resident, runs as runs_module
from resnet_nbdev.core import InputError
from resnet_nbdev.data import get_data, image_loader
from resnet_nbdev.devices import pick_precision
from resnet_nbdev.learner import resnet_learner
from resnet_nbdev.plans import PLANS, SCHEDULES, Plan, build_network, plan_cycles, plan_table, run_cycle, stage_groups
from resnet_nbdev.recipes import RECIPES
from resnet_nbdev.networks import custom_resnet
from resnet_nbdev.resnet import ARCHS, create_resnet
from resnet_nbdev.recipes import run_recipe
from resnet_nbdev.runs import compare_runs, load_run, predict
from resnet_nbdev.training import fine_tune
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import make_folder, shared_file

STAGES = ['layer1', 'layer2', 'layer3', 'layer4']
GROUPS = ['stem', *STAGES, 'head']
TINY = dict(tiny=dict(), tiny_bottleneck=dict(block='BottleneckBlock'))  # four stages, and quick


@pytest.fixture
def tiny(monkeypatch):
    for k, v in TINY.items():
        monkeypatch.setitem(ARCHS, k, partial(custom_resnet, [1, 1, 1, 1], [8, 8, 16, 16], **v))


def toy(n=24, size=32, classes=4, bs=8, shuffle=True, valid=8):
    "Batches of random images, the same at each call"
    x = torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))
    data = list(zip(x, torch.arange(n) % classes))
    loader = partial(DataLoader, bs=bs, num_workers=0)
    dls = DataLoaders(loader(data, shuffle=shuffle), loader(data[:valid]), device='cpu')
    dls.vocab = list('abcdefgh')[:classes]
    return dls


def learner(arch='cifar_resnet8', dls=None, seed=0, **kw):
    set_seed(seed)
    return quietly(resnet_learner(toy(size=16) if dls is None else dls, arch, **kw))


def quietly(learn):
    learn.remove_cbs([o for o in learn.cbs if o.name == 'progress'])
    learn.logger = lambda *_: None
    return learn


def copied(model): return {k: v.clone() for k, v in model.state_dict().items()}


def changed(before, model): return {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}


def same(one, two): return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def group_of(name):
    part = name.split('.')[1]
    return 'head' if name.startswith('head.') else part if part in STAGES else 'stem'


def batch_norm(model):
    return {f'{n}.{k}' for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) for k in m.state_dict()}


def refuses(says, call, *args, **kw):
    with pytest.raises(InputError) as e: call(*args, **kw)
    assert '\n' not in str(e.value)
    for o in [says] if isinstance(says, str) else says: assert o in str(e.value), (o, str(e.value))


# 1. Plans

ALL, HEAD = set(GROUPS), {'head'}
MOVES = dict(all=[ALL, ALL], head=[HEAD, HEAD], late=[HEAD, {'layer3', 'layer4', 'head'}], cut=[HEAD, HEAD],
             frozen=[HEAD, HEAD], discriminative=[HEAD, ALL], stepped=[ALL, ALL],
             gradual=[HEAD, {'layer4', 'head'}, {'layer3', 'layer4', 'head'}, ALL])
FREE_BN = {'all', 'discriminative', 'stepped', 'gradual'}  # the others hold it in what is frozen


def check_plan(plan, moves, free, arch, dls):
    "In each cycle all entries move that should, and no other: weights, running statistics and counters"
    learn = learner(arch, dls, plan=plan)
    cycles = plan_cycles(learn, 1, 1, 1e-2)
    assert len(cycles) == len(moves)
    for i, (cycle, groups) in enumerate(zip(cycles, moves)):
        before, norms = copied(learn.model), batch_norm(learn.model)
        run_cycle(learn, cycle)
        want = {k for k in before if group_of(k) in groups or free and k in norms}
        assert changed(before, learn.model) ^ want == set(), f'cycle {i+1}'


def test_every_plan_is_tested(): assert MOVES.keys() == PLANS.keys()


@pytest.mark.parametrize('arch', TINY)
@pytest.mark.parametrize('name', MOVES)
def test_what_a_plan_moves(name, arch, tiny): check_plan(name, MOVES[name], name in FREE_BN, arch, toy())


@pytest.mark.parametrize('name', ['head', 'late', 'discriminative', 'gradual'])
def test_batch_norm_of_frozen_groups_is_an_option(name, tiny):
    free = name not in FREE_BN
    check_plan(PLANS[name].but(bn='train' if free else 'frozen'), MOVES[name], free, 'tiny', toy())


@pytest.mark.slow
@pytest.mark.parametrize('name', MOVES)
def test_what_a_plan_moves_in_resnet18(name):
    check_plan(name, MOVES[name], name in FREE_BN, 'resnet18', toy(n=8, size=64, bs=4))


def test_frozen_after_a_search_for_the_rate(tmp_path):
    "lr_find trains everything and puts it back; what is frozen then must not shrink by weight decay"
    learn = learner(plan='head', dls=toy(size=16), path=tmp_path)
    with learn.no_bar(): learn.lr_find(num_it=12, show_plot=False, suggest_funcs=None)
    before = copied(learn.model)
    run_cycle(learn, plan_cycles(learn, 1, 1, 1e-2)[0])
    assert {group_of(k) for k in changed(before, learn.model)} == HEAD


def test_frozen_after_it_has_trained():
    "The same where a cycle freezes what an earlier one trained"
    learn = learner(plan=Plan('all first', cycles=(0, -1), bn='frozen'))
    first, last = plan_cycles(learn, 1, 1, 1e-2)
    run_cycle(learn, first)
    before = copied(learn.model)
    run_cycle(learn, last)
    assert {group_of(k) for k in changed(before, learn.model)} == HEAD


class Rates(Callback):
    "The rates of all groups at each step"
    order = 80
    def before_fit(self): self.seen = []
    def before_step(self): self.seen.append([h['lr'] for h in self.opt.hypers])


def tops(name, n, base=1e-2):
    "The highest rates of each cycle, as the paragraphs beside the plans tell"
    one = name == 'all'
    first = [base] if one else [base/10]*(n-1) + [base]
    late = [base/2] if one else [base/2/o for o in (10, 8, 6, 4, 2, 1)] if name == 'stepped' else \
        [base/2*100**(i/(n-1) - 1) for i in range(n)]
    return [first] + [late]*(len(MOVES[name])-1)


def one_cycle(at, top, pct, div):
    cos = lambda a, b, t: a + (b - a)*(1 - math.cos(math.pi*t))/2
    return cos(top/div, top, at/pct) if at < pct else cos(top, top/1e5, (at - pct)/(1 - pct))


@pytest.mark.parametrize('name', MOVES)
def test_rates_are_those_of_the_table(name, tiny):
    "At every step of every cycle, in every group; the peak of the last cycles is the rate in the table"
    learn = learner('tiny', toy(n=20, bs=2, valid=2), plan=name, cbs=Rates())
    table = plan_table(learn, freeze_epochs=1, epochs=1, base_lr=1e-2)
    n = {'all': 1, 'cut': 5}.get(name, 6)
    for i, (cycle, top) in enumerate(zip(plan_cycles(learn, 1, 1, 1e-2), tops(name, n))):
        run_cycle(learn, cycle)
        pct, div = (0.3, 5) if i else (0.99, 25)
        want = np.array([[one_cycle(t/10, o, pct, div) for o in top] for t in range(10)])
        np.testing.assert_allclose(learn.rates.seen, want, rtol=1e-6)
        rows = table.loc[i+1]
        moving = (rows.trained > 0).to_numpy()
        np.testing.assert_allclose(rows.learning_rate, np.where(moving, top, 0), rtol=1e-6)
        peak = np.max(learn.rates.seen, 0)[moving]
        np.testing.assert_allclose(peak, rows.learning_rate[moving], rtol=1e-6 if i else 0.1)


@pytest.mark.parametrize('name', MOVES)
def test_numbers_of_the_table(name, tiny):
    "parameters and trained, counted from the network itself"
    learn = learner('tiny', toy(), plan=name)
    table, norms, sizes = plan_table(learn), batch_norm(learn.model), {k: p.numel() for k, p in
                                                                       learn.model.named_parameters()}
    if name == 'all':
        assert (table.parameters == sum(sizes.values())).all() and (table.trained == table.parameters).all()
        return
    for i, groups in enumerate(MOVES[name], 1):
        for g, row in table.loc[i].iterrows():
            mine = {k: n for k, n in sizes.items() if group_of(k) == g}
            free = mine if g in groups else {k for k in mine if k in norms and name in FREE_BN}
            assert (row.parameters, row.trained) == (sum(mine.values()), sum(mine[k] for k in free)), (i, g)
            assert row.frozen == (g not in groups)


def test_a_step_is_as_long_as_the_rate_says(tiny):
    "Adam's first step moves every weight by its group's rate"
    learn = learner('tiny', toy(n=8), plan='stepped', wd=0.)
    cycle = plan_cycles(learn, 0, 1, 2e-2, kind='flat')[0]
    before = [[p.detach().clone() for p in g] for g in stage_groups(learn.model)]
    run_cycle(learn, cycle)
    longest = lambda old, new: max(float((p - q).detach().abs().max()) for p, q in zip(old, new))
    moved = list(map(longest, before, stage_groups(learn.model)))
    np.testing.assert_allclose(moved, [1e-2/o for o in (10, 8, 6, 4, 2, 1)], rtol=0.05)


@pytest.mark.parametrize('freeze', [None, 2])
def test_the_table_leaves_the_learner_as_it_was(freeze):
    learn = learner(plan='gradual')
    if freeze is not None: learn.freeze_to(freeze)
    before, grads = copied(learn.model), [p.requires_grad for p in learn.model.parameters()]
    plan_table(learn, base_lr=1e-2)
    assert same(before, learn.model.state_dict()) and learn.opt.frozen_idx == (freeze or 0)
    assert [p.requires_grad for p in learn.model.parameters()] == grads
    assert learn.opt.hypers[0]['lr'] == learn.lr


def test_the_table_leaves_what_a_user_froze():
    learn = learner(plan='discriminative')
    learn.model.body.conv1.weight.requires_grad_(False)
    plan_table(learn)
    assert not learn.model.body.conv1.weight.requires_grad


def test_a_plan_changes_the_network(tiny):
    keys = lambda **kw: learner('tiny', toy(), **kw).model
    full, cut, wide = keys(plan='head'), keys(plan='cut'), keys(plan=PLANS['frozen'].but(dropout=0.25))
    assert set(full.state_dict()) - set(cut.state_dict()) == {k for k in full.state_dict() if 'layer4' in k}
    assert cut.head.fc.in_features == 16 and cut.stride == 16 and full.stride == 32
    assert [type(o) for o in wide.head] == [nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]
    assert (wide.head.fc1.out_features, wide.head.dropout.p, wide.head.fc.in_features) == (1000, 0.25, 1000)


def test_a_plan_for_another_number_of_groups():
    refuses('6 rates, and the network 5 groups', plan_cycles, learner(plan='stepped'))
    refuses('given by name only', learner, create_resnet('cifar_resnet8', 4), plan='cut')


def test_a_plan_of_one_cycle():
    "It is the last one: half of base_lr, spread over the stages, and the given share of it upwards"
    learn = learner(plan=Plan('once', cycles=(0,)))
    cycle, = plan_cycles(learn, 3, 2, 1e-2, pct_start=0.4)
    np.testing.assert_allclose(cycle['rates'], [5e-3*100**(i/4 - 1) for i in range(5)], rtol=1e-6)
    assert (cycle['epochs'], cycle['pct_start'], cycle['div']) == (2, 0.4, 5.)
    refuses('cycle', Plan, 'never', cycles=())


@pytest.mark.parametrize('kw', [dict(spread=0), dict(spread=-3), dict(spread=math.nan), dict(pct_start=2.),
                                dict(pct_start=-1.), dict(div=0.)], ids=str)
def test_numbers_of_a_schedule_are_refused(kw):
    refuses('must', plan_cycles, learner(plan='discriminative'), **kw)


# 2. fastai's own calls

def end(train, **kw):
    learn = learner(**kw)
    train(learn)
    return learn.model.state_dict()


def ours(*args, **kw):
    def train(learn):
        for cycle in plan_cycles(learn, *args, **kw): run_cycle(learn, cycle)
    return train


@pytest.mark.parametrize('plan', ['discriminative', 'all'])
def test_fine_tune_of_fastai(plan):
    "The same weights and statistics to the last bit"
    for kw in dict(), dict(opt='sgd', wd=0.1, label_smoothing=0.1, clip=1.):
        theirs = lambda learn: learn.fine_tune(2, 1e-2, freeze_epochs=1)
        assert same(end(ours(1, 2, 1e-2), plan=plan, **kw), end(theirs, plan=plan, **kw))
    other = end(lambda learn: learn.fine_tune(2, 2e-2, freeze_epochs=1), plan=plan)
    assert not same(end(ours(1, 2, 1e-2), plan=plan), other)


def test_options_of_fine_tune():
    theirs = lambda learn: learn.fine_tune(1, 1e-2, freeze_epochs=2, lr_mult=7, pct_start=0.5, div=3.)
    mine = ours(2, 1, 1e-2, spread=7, pct_start=0.5, div=3.)
    assert same(end(mine, plan='discriminative'), end(theirs, plan='discriminative'))


FITS = dict(one_cycle=[lambda l, lr: l.fit_one_cycle(1, lr, pct_start=0.99),
                       lambda l, lr: l.fit_one_cycle(2, lr, pct_start=0.3, div=5.)],
            flat_cos=[lambda l, lr: l.fit_flat_cos(1, lr), lambda l, lr: l.fit_flat_cos(2, lr)],
            flat=[lambda l, lr: l.fit(1, lr), lambda l, lr: l.fit(2, lr)])


@pytest.mark.parametrize('kind', SCHEDULES)
def test_schedules_are_fits_of_fastai(kind):
    def theirs(learn):
        learn.freeze_to(-1)
        FITS[kind][0](learn, slice(1e-2))
        learn.unfreeze()
        FITS[kind][1](learn, slice(5e-5, 5e-3))
    assert same(end(ours(1, 2, 1e-2, kind), plan='discriminative'), end(theirs, plan='discriminative'))


def test_no_frozen_epochs():
    theirs = lambda learn: learn.fit_one_cycle(2, slice(5e-5, 5e-3), pct_start=0.3, div=5.)
    assert same(end(ours(0, 2, 1e-2), plan='discriminative'), end(theirs, plan='discriminative'))


# 3. Tools

class Watch(Callback):
    "Call `what(learn)` at an event, before or after the callbacks of another order"
    def __init__(self, event, what, order=90):
        self.what, self.order = what, order
        setattr(self, event, lambda: what(self.learn))


def fit(learn, *args, kind='flat', **kw):
    run_cycle(learn, plan_cycles(learn, 0, *args, kind=kind, **kw)[-1])
    return learn


@pytest.mark.parametrize('decay', [0.5, 0.999])
def test_moving_average(decay):
    "Plain arithmetic beside it: (1+n)/(10+n) at first, statistics of batch norm too, counters as they are"
    seen = []
    keep = Watch('after_step', lambda l: seen.append((copied(l.model), copied(l.weight_average.model_average))))
    learn = learner(plan='discriminative', ema=decay, cbs=keep)
    for cycle in plan_cycles(learn, 1, 4, 1e-2): run_cycle(learn, cycle)
    assert len(seen) == 15
    want = {k: v.double() for k, v in seen[0][0].items()}
    for n, (now, average) in enumerate(seen):
        d = min(decay, (1 + n)/(10 + n)) if n else 0
        for k, v in now.items():
            if v.is_floating_point():
                want[k] = d*want[k] + (1-d)*v.double()
                torch.testing.assert_close(average[k].double(), want[k], rtol=1e-5, atol=1e-6)
            else: assert average[k] == v, k
    assert any(float((want[k] - v).abs().max()) > 1e-3 for k, v in seen[-1][0].items()), 'no average at all'
    assert any('running_var' in k for k in want)


def test_moving_average_forgets_a_search_for_the_rate(tmp_path):
    "lr_find ends with wild weights, which are no part of a training"
    learn = learner(ema=0.9, path=tmp_path)
    with learn.no_bar(): learn.lr_find(num_it=12, show_plot=False, suggest_funcs=None, end_lr=100)
    before = copied(learn.model)
    fit(learn, 1, 1e-6, kind='flat')
    now = learn.weight_average.model_average.state_dict()
    for k in (o for o in before if 'conv' in o): torch.testing.assert_close(now[k], before[k], rtol=1e-2, atol=1e-2)


def test_max_norm():
    "Filters that are longer than the limit after a step are scaled down to it, and the others left alone"
    limit, seen = 0.7, []
    weights = lambda l: [m.weight.detach().clone() for m in l.model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    cbs = [Watch('after_step', lambda l: seen.append(weights(l)), o) for o in (64, 66)]
    learn = fit(learner(max_norm=limit, plan='all', cbs=cbs), 2, 2e-2)
    assert len(seen) == 12
    long = short = 0
    for before, after in zip(seen[::2], seen[1::2]):
        for a, b in zip(before, after):
            norms = a.flatten(1).norm(dim=1)
            shrunk = a*(limit/norms).clamp(max=1).view(-1, *[1]*(a.ndim-1))
            torch.testing.assert_close(b, shrunk, rtol=1e-5, atol=1e-7)
            assert b.flatten(1).norm(dim=1).max() <= limit*(1 + 1e-5)
            long, short = long + int((norms > limit).sum()), short + int((norms < limit).sum())
    assert long and short and len(learn.model.state_dict()) > 40


def test_max_norm_leaves_frozen_weights_alone():
    learn = learner(max_norm=0.3, plan='head')
    before = copied(learn.model)
    assert before['body.layer1.0.conv1.weight'].flatten(1).norm(dim=1).min() > 0.3
    fit(learn, 1, 1e-2)
    assert changed(before, learn.model) == {'head.fc.weight', 'head.fc.bias'}
    assert learn.model.head.fc.weight.norm(dim=1).max() <= 0.3*(1 + 1e-5)


def test_progressive_sizes():
    "A third of the cycle each; validation and targets are as they were"
    sizes, truth = dict(train=[], valid=[]), []
    see = Watch('before_batch', lambda l: (sizes['train' if l.training else 'valid'].append(tuple(l.xb[0].shape[2:])),
                                           truth.append(l.yb[0])))
    plain = [[], []]
    learn = learner(dls=toy(size=16, bs=4, shuffle=False), progressive=(8, 12, 16), cbs=[
        see, Watch('before_batch', lambda l: plain[0].append(l.yb[0]), -50)])
    fit(learn, 2, 1e-3)
    assert sizes['train'] == [(8, 8)]*4 + [(12, 12)]*4 + [(16, 16)]*4 and sizes['valid'] == [(16, 16)]*4
    assert all(torch.equal(a, b) for a, b in zip(truth, plain[0], strict=True))
    sizes['train'].clear()
    fit(learn, 1, 1e-3)
    assert sizes['train'] == [(8, 8)]*2 + [(12, 12)]*2 + [(16, 16)]*2, 'each cycle anew'


class Plain(nn.Module):
    "Without batch norm, so that a batch may be cut into pieces"
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                                    nn.Linear(32, 4))
    def forward(self, x): return self.layers(x)


def plain(bs, n=24, **kw):
    "A learner of `Plain` with the images in order and plain steps along the gradient"
    set_seed(0)
    return quietly(resnet_learner(toy(n, 8, bs=bs, shuffle=False), Plain(), opt='sgd', wd=0., **kw))


@pytest.mark.parametrize('kw', [dict(), dict(clip=0.05, label_smoothing=0.1)], ids=str)
def test_small_batches_add_up_to_a_large_one(kw):
    small, large = (fit(o, 2, 0.2).model.state_dict() for o in (plain(4, accumulate=12, **kw), plain(12, **kw)))
    for k in small: torch.testing.assert_close(small[k], large[k], rtol=0, atol=1e-6)
    other = fit(plain(4, **kw), 2, 0.2).model.state_dict()
    assert max(float((other[k] - large[k]).abs().max()) for k in large) > 1e-4, 'without accumulation it differs'


def test_a_cycle_begins_with_gradients_of_its_own():
    "What was added up for a step that the last cycle did not take is no part of the next"
    steps = []
    grads = lambda l: steps.append([p.grad.clone() for p in l.model.parameters()])
    learn = plain(4, 20, accumulate=8, cbs=Watch('before_step', grads))
    for _ in range(2): learn.model.load_state_dict(plain(4).model.state_dict()), fit(learn, 1, 1e-9)
    assert len(steps) == 4
    for a, b in zip(steps[0], steps[2]): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_clipped_gradients():
    "No longer than the limit, in the same direction"
    limit, seen = 0.3, []
    grads = lambda l: seen.append(torch.cat([p.grad.flatten() for p in l.model.parameters()]))
    learn = learner(clip=limit, cbs=[Watch('before_step', grads, o) for o in (-20, 80)])
    fit(learn, 2, 1e-2)
    assert len(seen) == 12 and max(o.norm() for o in seen[::2]) > limit
    for before, after in zip(seen[::2], seen[1::2]):
        torch.testing.assert_close(after, before*min(1, limit/float(before.norm())), rtol=1e-4, atol=1e-7)


def smoothed(logits, target, eps):
    "Szegedy et al. 2015, section 7, for each image"
    truth = (1-eps)*F.one_hot(target, logits.shape[1]) + eps/logits.shape[1]
    return -(truth*logits.log_softmax(1)).sum(1)


@pytest.mark.parametrize('eps', [0., 0.1, 0.9])
def test_label_smoothing(eps):
    logits, target = torch.randn(6, 4), torch.arange(6) % 4
    learn = learner(label_smoothing=eps)
    torch.testing.assert_close(learn.loss_func(logits, target), smoothed(logits, target, eps).mean())
    torch.testing.assert_close(learn.loss_func.activation(logits), logits.softmax(1))


def test_mixup():
    "The loss of two mixed images is that of both their classes, in the same parts, smoothed or not"
    seen = []

    def look(l): # fastai's names
        if l.training: seen.append((l.loss_grad, l.pred.detach(), *l.mix_up.yb1, *l.yb, l.mix_up.lam.flatten()))
    for eps in (0., 0.1): fit(learner(mixup=0.4, label_smoothing=eps, cbs=Watch('after_loss', look)), 1, 1e-3)
    assert len(seen) == 6
    for i, (loss, pred, other, mine, lam) in enumerate(seen):
        eps = 0. if i < 3 else 0.1
        want = (lam*smoothed(pred, mine, eps) + (1-lam)*smoothed(pred, other, eps)).mean()
        torch.testing.assert_close(loss.detach(), want, rtol=1e-4, atol=1e-5)
    assert any(0.01 < float(o) < 0.99 for *_, lam in seen for o in lam)


def test_cutmix():
    "Pixels are moved between images and never blended; validation images stay whole"
    seen = dict(train=[], valid=[])
    see = Watch('before_batch', lambda l: seen['train' if l.training else 'valid'].append(l.xb[0].clone()))
    learn = fit(learner(cutmix=1., cbs=see, dls=toy(size=16, shuffle=False)), 1, 1e-3)
    images = torch.cat([x for x, _ in learn.dls.train])
    mixed = torch.cat(seen['train'])
    assert torch.isin(mixed, images).all() and not torch.equal(mixed, images)
    assert torch.equal(torch.cat(seen['valid']), torch.cat([x for x, _ in learn.dls.valid]))
    assert np.isfinite(learn.recorder.values[-1]).all()


def test_top_k():
    "Over several batches, the last of them smaller, as scikit-learn counts"
    score = pytest.importorskip('sklearn.metrics').top_k_accuracy_score
    for k in (1, 2, 4):
        learn = learner(dls=toy(size=16, classes=5, valid=21), top_k=k)
        assert learn.metrics.attrgot('name') == ['accuracy', f'top_{k}']
        fit(learn, 1, 1e-2)
        probs, truth = learn.get_preds()
        want = score(truth, probs, k=k, labels=range(5))
        assert learn.validate()[2] == pytest.approx(want, abs=1e-6) and len(truth) == 21
        assert k > 1 or want < 1
    refuses('5 classes, and is 6', learner, dls=toy(size=16, classes=5), top_k=6)


def test_precision_on_a_cpu():
    assert pick_precision('auto', 'cpu') == pick_precision('fp32', 'cpu') == 'fp32'
    assert not [o for o in learner(precision='auto').cbs if isinstance(o, MixedPrecision)]
    for o in ('bf16', 'fp16'): refuses(f'{o} needs a GPU', learner, precision=o)
    refuses("unknown precision 'fp8'", learner, precision='fp8')


@pytest.mark.parametrize('has', [True, False])
def test_precision_on_a_gpu(has, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda *_, **kw: has)
    assert pick_precision('auto', 'cuda') == ('bf16' if has else 'fp16')
    assert pick_precision('fp16', 'cuda:0') == 'fp16'
    if not has: refuses('no bf16', pick_precision, 'bf16', 'cuda')


def test_tools_are_recorded():
    tools = dict(mixup=0.2, clip=1., accumulate=16, ema=0.9, max_norm=2., progressive=(8, 16), label_smoothing=0.1,
                 top_k=2, wd=0.05, opt='sgd')
    learn = learner(plan='late', **tools)
    assert {k: learn.made[k] for k in tools} == {**tools, 'opt': 'SGD(mom=0.9)'}
    assert learn.made['plan']['bn'] == 'frozen' and json.dumps(learn.made)
    assert {'bn_freeze', 'mix_up', 'gradient_clip', 'gradient_accumulation', 'max_norm', 'weight_average',
            'progressive_size'} <= {o.name for o in learn.cbs}
    fit(learn, 1, 1e-2)
    assert np.isfinite(learn.recorder.values[-1]).all()


@pytest.mark.slow
def test_compiled():
    "The same answers, names of weights and average; about 30 s on a quiet core"
    if not (shutil.which('g++') or shutil.which('c++')): pytest.skip('torch.compile needs a C++ compiler')
    plain, fast = learner(), learner(compile=True, ema=0.9)
    x = torch.randn(4, 3, 16, 16)
    assert fast.model._compiled_call_impl is not None and plain.model._compiled_call_impl is None
    torch.testing.assert_close(fast.model.eval()(x), plain.model.eval()(x), rtol=1e-4, atol=1e-4)
    fit(fast, 1, 1e-2)
    assert fast.model.state_dict().keys() == plain.model.state_dict().keys() == \
        fast.weight_average.model_average.state_dict().keys()


# 4. Networks

def weights_of(arch, path, classes=4):
    "A file with weights of a network, with statistics as after a training"
    set_seed(3)
    model = create_resnet(arch, classes)
    with torch.no_grad():
        for k, v in model.state_dict().items():
            if 'running' in k: v.uniform_(0.5, 1.5)
    save_file({k.removeprefix('body.').removeprefix('head.'): v for k, v in model.state_dict().items()}, path)
    return model.eval()


@pytest.mark.parametrize('arch, depth', [('resnet18', 3), ('tiny_bottleneck', 2), ('tiny', 1), ('cifar_resnet8', 2),
                                         pytest.param('resnet50_v1', 3, marks=pytest.mark.slow)])
def test_cut_networks(arch, depth, tiny, tmp_path):
    "The kept stages have the weights of the file, their features are the whole network's, and the head reads those"
    full = weights_of(arch, tmp_path/'a.safetensors')
    cut = build_network(arch, 4, tmp_path/'a.safetensors', cut=depth).eval()
    late = {f'layer{i}' for i in range(depth+1, 5)}
    kept = {k for k in full.state_dict() if group_of(k) not in {'head', *late}}
    assert cut.state_dict().keys() == kept | {'head.fc.weight', 'head.fc.bias'}
    assert all(torch.equal(cut.state_dict()[k], full.state_dict()[k]) for k in kept)
    x, seen = torch.randn(2, 3, 64, 64), []
    full.body.get_submodule(f'layer{depth}').register_forward_hook(lambda m, _, out: seen.append(out))
    with torch.no_grad():
        full(x)
        assert torch.equal(cut.body(x), seen[0])
        torch.testing.assert_close(cut(x), cut.head.fc(seen[0].mean((2, 3))))
    assert cut.head.fc.in_features == seen[0].shape[1]
    assert 64//cut.stride == seen[0].shape[-1]
    cut.check_size(cut.stride, cut.stride)


def test_heads_of_networks(tmp_path):
    "A new head for as many classes as asked for, on the body of the file"
    full = weights_of('cifar_resnet8', tmp_path/'a.safetensors')
    net = build_network('cifar_resnet8', 7, tmp_path/'a.safetensors', hidden=12, dropout=0.5)
    body = {k for k in full.state_dict() if k.startswith('body.')}
    assert net.state_dict().keys() == body | {f'head.{o}' for o in ('fc1.weight', 'fc1.bias', 'fc.weight', 'fc.bias')}
    assert all(torch.equal(net.state_dict()[k], full.state_dict()[k]) for k in body)
    x = torch.randn(2, 3, 16, 16)
    features = full.body(x).mean((2, 3))
    want = net.head.fc(net.head.fc1(features).relu())
    torch.testing.assert_close(net.eval()(x), want)
    net.head.train()
    assert not torch.equal(net.head(full.body(x)), want), 'dropout'
    same_as = build_network('cifar_resnet8', 4, tmp_path/'a.safetensors')
    assert same(same_as.state_dict(), full.state_dict())


@pytest.mark.parametrize('kw, says', [
    (dict(cut=-1), 'cut must be'), (dict(cut=1.5), 'cut must be'), (dict(hidden=-1), 'hidden must be'),
    (dict(dropout=-0.1), 'dropout must be'), (dict(dropout=1.), 'dropout must be'), (dict(dropout=math.nan), 'dropout'),
    (dict(cut=3), 'it has no more'), (dict(weights='no.safetensors'), 'there is no weights file')], ids=str)
def test_networks_that_cannot_be_built(kw, says): refuses(says, build_network, 'cifar_resnet8', 4, **kw)


# 5. Recipes

@pytest.fixture
def handed(monkeypatch):
    "What `run_recipe` hands to those who load, build and train, as their own signatures bind it; none of it is done"
    got, dls = {}, toy()
    dls.info = dict(train=24, val=8, resize=32)

    def watch(module, name, result):
        real = getattr(module, name)

        @wraps(real)
        def call(*args, **kw):
            got[name] = inspect.signature(real).bind(*args, **kw).arguments
            return result
        monkeypatch.setattr(module, name, call)
    watch(runs_module, 'get_data', dls)
    watch(resident, 'resident_data', dls)
    watch(runs_module, 'resnet_learner', SimpleNamespace())
    watch(runs_module, 'fine_tune', None)
    return got


@pytest.mark.parametrize('name', RECIPES)
def test_every_choice_of_a_recipe_arrives(name, handed, tmp_path):
    "At the function that it is for, with its value; and all of it goes into the record"
    recipe = RECIPES[name]
    run_recipe(name, runs=tmp_path, device='cpu')
    kind = 'resident_data' if recipe.get('resident') else 'get_data'
    data, made, run = (dict(handed.pop(o)) for o in (kind, 'resnet_learner', 'fine_tune'))
    assert not handed and 'kw' not in made
    if 'size' in data: data['resize'] = data.pop('size')
    plan = made.pop('plan')
    assert plan.but(dropout=0.) == PLANS[recipe['plan']] and plan.dropout == recipe.get('dropout', 0.)
    found = {**data, **made, **{k: v for k, v in run.items() if k not in ('name', 'resume', 'runs')}}
    for k, v in recipe.items():
        if k not in ('plan', 'dropout', 'resident'): assert found[k] == v, k
    assert run['arguments'].items() >= {**recipe, 'seed': 42, 'device': 'cpu'}.items()
    assert json.loads(json.dumps(run['arguments'])) == run['arguments']


@pytest.mark.parametrize('name', RECIPES)
def test_recipes_are_plain_and_known(name, monkeypatch, tmp_path):
    recipe = RECIPES[name]
    assert json.loads(json.dumps(recipe)) == recipe and recipe['plan'] in PLANS and recipe['arch'] in ARCHS

    class Reached(Exception): pass
    for module, what in (runs_module, 'get_data'), (resident, 'resident_data'):
        real = getattr(module, what)

        @wraps(real)
        def stop(*args, **kw): raise Reached
        monkeypatch.setattr(module, what, stop)
    with pytest.raises(Reached): run_recipe(name, runs=tmp_path)
    for k, v in recipe.items():
        refuses(f'a recipe has no {k}x', run_recipe, {**{i: o for i, o in recipe.items() if i != k}, f'{k}x': v},
                runs=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', RECIPES)
def test_every_recipe_trains(name, folder, tiny, monkeypatch, tmp_path):
    "To its end, with a smaller network, images and times; config.json has all of its choices"
    monkeypatch.setattr(runs_module, 'plot_history', lambda *_: plt.figure())
    monkeypatch.setattr(runs_module, 'plot_predictions', lambda *_: plt.figure())
    weights_of('tiny', tmp_path/'a.safetensors')
    less = dict(arch='tiny', data=str(folder), presize=32, resize=32, bs=4, epochs=1, workers=0)
    for k, v in dict(weights=str(tmp_path/'a.safetensors'), top_k=2, freeze_epochs=1).items():
        if RECIPES[name].get(k): less[k] = v
    learn = run_recipe(name, 'mine', runs=tmp_path/'runs', device='cpu', json_lines=True, **less)
    config = json.loads((tmp_path/'runs'/'mine'/'config.json').read_text())
    assert config['arguments'].items() >= {**RECIPES[name], **less}.items()
    assert {k: config[k] for k in ('average', 'monitor')} == \
        dict(average=RECIPES[name].get('average', 0), monitor=RECIPES[name].get('monitor', 'accuracy'))
    for k in config['made'].keys() & RECIPES[name].keys() - {'plan', 'weights', 'arch'} - less.keys():
        assert config['made'][k] == RECIPES[name][k], k
    metrics = json.loads((learn.run_path/'metrics.json').read_text())
    assert metrics['status'] == 'finished' and metrics['epochs'] == sum(o['epochs'] for o in config['cycles'])
    averaged = RECIPES[name].get('ema') or RECIPES[name].get('average')
    assert (learn.run_path/'average.safetensors').exists() == bool(averaged)


def test_flags_win_over_a_recipe(run_here, folder, tmp_path):
    "What is given wins, zeros too, what is not is the recipe's, and the run records both"
    weights_of('cifar_resnet8', tmp_path/'a.safetensors')
    given = dict(arch='cifar_resnet8', weights='a.safetensors', plan='late', presize=16, resize=16, bs=4, epochs=1,
                 freeze_epochs=0, top_k=2, ema=0.0, label_smoothing=0.0)
    done = run_here('resnet_fine_tune', '--recipe', 'places', '--data', folder, '--name', 'mine', '--json',
                    *(p for k, v in given.items() for p in (f'--{k}', v)))
    assert done.returncode == 0, done
    config = json.loads((tmp_path/'runs'/'mine'/'config.json').read_text())
    want = {**RECIPES['places'], **given, 'data': str(folder), 'seed': 42}
    del want['source']
    assert config['arguments'].items() >= want.items()
    assert config['data']['loader'] == 'resident' and config['made']['plan']['cycles'] == [-1, -3]
    assert config['average'] == RECIPES['places'].get('average', 0)
    cycle, = config['cycles']
    assert cycle['trains_from'] == 2 and cycle['rates'][-1] == pytest.approx(5e-4)
    assert cycle['rates'][-1]/cycle['rates'][0] == pytest.approx(1000)
    row = pd.read_csv(tmp_path/'runs'/'mine'/'history.csv').iloc[0]
    assert 'top_2' in row and row.cycle == 1


WRONG = { # flags: what the sentence has
    '--recipe S6': "unknown recipe 'S6'", '--plan none': "unknown plan 'none'", '--bn eval': "'train' or 'frozen'",
    '--opt lion': "unknown optimizer 'lion'", '--schedule cosine': "unknown schedule 'cosine'",
    '--scale_lr cubic': "'cubic'", '--precision fp8': "unknown precision 'fp8'",
    '--precision bf16 --device cpu': 'bf16 needs a GPU', '--progressive a,b': "progressive takes whole numbers",
    '--progressive 96,,128': 'progressive takes whole numbers', '--progressive 0,64': 'progressive',
    '--progressive=-64,64': 'progressive', '--top_k -1': 'top_k must', '--monitor acuracy': "'acuracy'",
    '--monitor top_5 --top_k 3': "'top_5'", '--label_smoothing 1': 'label_smoothing must', '--mixup -1': 'mixup must',
    '--mixup 1 --cutmix 1': 'choose one of them', '--cutmix nan': 'cutmix must', '--clip -1': 'clip must',
    '--accumulate -1': 'accumulate must', '--max_norm inf': 'max_norm must', '--ema 1': 'ema must',
    '--hidden -1': 'hidden must', '--dropout 1': 'dropout must', '--lr_mult 0': 'lr_mult', '--lr_mult -3': 'lr_mult',
    '--lr_mult nan': 'lr_mult', '--patience -1': 'patience must', '--average -1': 'average must',
    '--ema 0.9 --average 2': 'choose one average', '--wd nan': 'wd must', '--wd -1': 'wd must',
    '--weights no.safetensors': 'there is no weights file no.safetensors'}


def no_download(*args): raise AssertionError('a download of 1.6 GB began')


@pytest.mark.parametrize('args', WRONG)
def test_wrong_values_are_refused_before_a_download(args, refused_here, monkeypatch):
    monkeypatch.setattr('resnet_nbdev.catalogue.fetch', no_download)
    refused_here('resnet_fine_tune', 'imagenette', *args.split(), says=[WRONG[args]])


TOGETHER = {'--plan cut': 'it has no more', '--plan stepped': '6 rates, and the network 5 groups',
            '--weights imagenet': 'published ImageNet weights', '--top_k 3': 'the 2 classes, and is 3',
            '--progressive 3,16': '3x3 pixels are too small', '--accumulate 8 --weights a.txt': 'a.txt'}


@pytest.mark.parametrize('args', TOGETHER)
def test_what_does_not_fit_together(args, refused_here, folder):
    small = '--arch cifar_resnet8 --presize 16 --resize 16 --bs 4 --epochs 1 --freeze_epochs 0 --workers 0'.split()
    refused_here('resnet_fine_tune', folder, *small, *args.split(), says=[TOGETHER[args]])


def test_wrong_recipes(tmp_path, monkeypatch):
    monkeypatch.setattr('resnet_nbdev.catalogue.fetch', no_download)
    for recipe, says in [('S6', "unknown recipe 'S6'"), (dict(), 'needs a source'),
                         (dict(source='imagenette', colour='red'), 'has no colour'),
                         (dict(source='imagenette', plan='late', cut=9.5), 'cut must'),
                         (dict(source='imagenette', pct_start=2.), 'pct_start'),
                         (dict(source='imagenette', div=0.), 'div')]:
        refuses(says, run_recipe, recipe, runs=tmp_path)
    assert not list(tmp_path.iterdir())


# 6 and 7. Runs

SMALL = dict(presize=16, resize=16, bs=4, num_workers=0, device='cpu')


class Kept(Callback):
    "The weights at the end of each epoch"
    def __init__(self): self.states = []
    def after_train(self): self.states.append(copied(self.model))


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "Three small runs: {name: learner}, with the weights of each epoch as `.kept.states`"
    tmp = tmp_path_factory.mktemp('trained')
    folder, made = make_folder(tmp/'pets', ('ant', 'bee', 'cat'), 6, 4), {}
    options = dict(mean=(dict(plan='discriminative'), dict(average=2, lr_mult=10)), ema=(dict(ema=0.8), dict()),
                   head=(dict(plan=PLANS['cut'].but(cut=2, hidden=5, dropout=0.3)), dict(schedule='flat_cos')))
    for seed, (name, (build, train)) in enumerate(options.items()):
        set_seed(seed)
        learn = quietly(resnet_learner(get_data(folder, **SMALL), 'cifar_resnet8', cbs=Kept(), **build))
        made[name] = fine_tune(learn, name, 1, 2, 1e-2, runs=tmp/'runs', arguments=dict(seed=seed), **train)
        plt.close('all')
    return made


@pytest.fixture
def images(trained): return sorted((trained['mean'].run_path.parent.parent/'pets'/'val').glob('*/*.png'))


def config_of(learn): return json.loads((learn.run_path/'config.json').read_text())


def test_cycles_are_recorded(trained):
    "Frozen phase, rates of each group and schedule, as trained"
    config = config_of(trained['mean'])
    first, last = config['cycles']
    assert first == dict(trains_from=4, epochs=1, rates=[1e-3]*4 + [1e-2], kind='one_cycle', pct_start=0.99, div=25.)
    np.testing.assert_allclose(last.pop('rates'), [5e-3*10**(i/4 - 1) for i in range(5)], rtol=1e-6)
    assert last == dict(trains_from=0, epochs=2, kind='one_cycle', pct_start=0.3, div=5.)
    assert config['made']['plan'] == json.loads(json.dumps(vars(PLANS['discriminative'])))
    head = config_of(trained['head'])
    assert [(o['trains_from'], o['kind'], o['pct_start']) for o in head['cycles']] == [(3, 'flat_cos', 0.75)]*2
    assert [len(o['rates']) for o in head['cycles']] == [4, 4] and 'bn_freeze' in head['callbacks']
    assert {k: head['made']['plan'][k] for k in ('cut', 'hidden', 'dropout', 'bn')} == \
        dict(cut=2, hidden=5, dropout=0.3, bn='frozen')
    assert [o['rates'] for o in config_of(trained['ema'])['cycles']] == [[1e-2], [5e-3]]
    history = pd.read_csv(trained['mean'].run_path/'history.csv')
    assert list(history.cycle) == [1, 2, 2]


def named(state): return {k.removeprefix('body.').removeprefix('head.'): v for k, v in state.items()}


def test_average_of_last_epochs(trained):
    learn = trained['mean']
    saved, (*_, before, last) = load_file(learn.run_path/'average.safetensors'), map(named, learn.kept.states)
    assert len(learn.kept.states) == 3 and saved.keys() == last.keys()
    for k, v in saved.items():
        want = ((before[k].double() + last[k].double())/2).to(v.dtype) if v.is_floating_point() else last[k]
        assert torch.equal(v, want), k
    assert not same(saved, last)
    model, _ = load_run(learn.run_path, 'average')
    assert same(named(model.state_dict()), saved)
    metrics = json.loads((learn.run_path/'metrics.json').read_text())
    assert 0 <= metrics['average']['accuracy'] <= 1 and 'valid_loss' in metrics['average']


def test_moving_average_is_saved(trained):
    learn = trained['ema']
    saved = load_file(learn.run_path/'average.safetensors')
    assert same(saved, named(learn.weight_average.model_average.state_dict()))
    assert not same(saved, load_file(learn.run_path/'last.safetensors'))


def looks(learn, images, weights, seed, n):
    "Probabilities of one plain look and `n` augmented ones"
    data = config_of(learn)['data']
    set_seed(seed)
    model, _ = load_run(learn.run_path, weights)
    with torch.no_grad():
        return [torch.cat([model(x).softmax(1) for x, in image_loader(
            images, data['presize'], data['resize'], data['augment'], 5, 'cpu', augmented=i > 0)]) for i in range(n+1)]


def table(found): # as (image, class), whatever the order
    return found.pivot(index='image', columns='class', values='probability').to_numpy()


@pytest.mark.parametrize('weights', ['last', 'average'])
def test_several_looks(weights, trained, images):
    "The mean of all; each image's probabilities sum to one; without augmentation nothing is random"
    learn, kw = trained['mean'], dict(k=3, weights=weights, bs=5, device='cpu')
    one, again = (predict(learn.run_path, images, **kw) for _ in range(2))
    pd.testing.assert_frame_equal(one, again, check_exact=True)
    want = looks(learn, images, weights, 5, 2)
    np.testing.assert_allclose(table(one), want[0], atol=1e-6)
    set_seed(5)
    several = predict(learn.run_path, images, tta=2, **kw)
    np.testing.assert_allclose(table(several), torch.stack(want).mean(0), atol=1e-6)
    np.testing.assert_allclose(table(several).sum(1), 1, atol=1e-5)
    assert np.abs(table(several) - table(one)).max() > 1e-4
    assert list(several['rank']) == [1, 2, 3]*len(images)
    assert (several.groupby('image').probability.diff().dropna() <= 0).all()
    refuses('tta must', predict, learn.run_path, images, tta=-1)


def test_weights_that_a_run_does_not_have(trained, images):
    ask = partial(predict, trained['head'].run_path, images[0])
    refuses(['no average.safetensors', 'it has best, last'], ask, weights='average')
    refuses("'best', 'last' or 'average', not 'mean'", ask, weights='mean')


def test_compare_runs(trained):
    folder = trained['mean'].run_path.parent
    table, fig = compare_runs(runs=folder)
    assert list(table.index) == ['ema', 'head', 'mean'] and table.index.name == 'run'
    assert list(table) == ['arch', 'weights', 'status', 'epochs', 'parameters', 'best_epoch', 'accuracy', 'valid_loss',
                           'last', 'average', 'seconds']
    for name, learn in trained.items():
        metrics, row = json.loads((learn.run_path/'metrics.json').read_text()), table.loc[name]
        assert (row.arch, row.weights, row.status, row.epochs) == ('cifar_resnet8', 'none', 'finished', 3)
        assert row.parameters == sum(p.numel() for p in learn.model.parameters())
        assert (row.best_epoch, row.accuracy, row['last']) == \
            (metrics['best']['epoch'], metrics['best']['accuracy'], metrics['last']['accuracy'])
        assert np.isnan(row.average) if name == 'head' else row.average == metrics['average']['accuracy']
    assert [o.get_label() for o in fig.axes[0].lines] == ['ema', 'head', 'mean']
    some, fig = compare_runs('mean', folder/'ema', runs=folder, metric='valid_loss')
    assert list(some.index) == ['mean', 'ema'], 'as asked for'
    history = pd.read_csv(folder/'mean'/'history.csv')
    assert list(fig.axes[0].lines[0].get_ydata()) == list(history.valid_loss)
    assert fig.axes[0].get_ylabel() == 'valid_loss'
    plt.close('all')


def test_runs_that_cannot_be_compared(trained, tmp_path):
    folder = trained['mean'].run_path.parent
    refuses(['there is no run other', 'ema, head, mean'], compare_runs, 'other', runs=folder)
    refuses(['has no top_5', 'accuracy'], compare_runs, 'mean', runs=folder, metric='top_5')
    refuses('no run with a finished epoch', compare_runs, runs=tmp_path)
    (tmp_path/'begun').mkdir()
    shutil.copy(folder/'mean'/'config.json', tmp_path/'begun')
    refuses(['begun has no history.csv', 'no epoch'], compare_runs, 'begun', runs=tmp_path)
    refuses('no run with a finished epoch', compare_runs, runs=tmp_path)
    plt.close('all')


@pytest.mark.parametrize('ending', ['csv', 'json'])
def test_predictions_in_a_file(ending, trained, images, run_here, tmp_path):
    "With all that was asked for; nothing is printed"
    run = trained['mean'].run_path
    done = run_here('resnet_predict', run, *images[:5], '--k', 2, '--weights', 'average', '--out', f'a.{ending}')
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
    want = predict(run, images[:5], 2, 'average')
    if ending == 'csv': found = pd.read_csv(tmp_path/'a.csv')
    else:
        found = pd.DataFrame([dict(image=o['image'], rank=i, **p) for o in json.loads((tmp_path/'a.json').read_text())
                              for i, p in enumerate(o['predictions'], 1)])
    pd.testing.assert_frame_equal(found, want, check_exact=False, rtol=1e-6)


@pytest.mark.parametrize('out', ['a.txt', 'a', 'csv', 'a.csv.gz'])
def test_predictions_in_another_file(out, trained, images, refused_here, tmp_path):
    refused_here('resnet_predict', trained['mean'].run_path, images[0], '--out', out, says=[out, '.csv or .json'])
    assert not (tmp_path/out).exists()


def test_predictions_in_a_folder_that_is_not_there(trained, images, refused_here):
    refused_here('resnet_predict', trained['mean'].run_path, images[0], '--out', 'no/a.csv', says=['no/a.csv'])


# 8. Networks from files

@pytest.mark.parametrize('name', ['mean', 'head'])
def test_a_run_is_its_json_and_its_weights(name, trained, images, tmp_path, monkeypatch):
    "Two files in another place, no pickle: the network with its cut, its hidden layer and dropout answers as trained"
    learn, run = trained[name], tmp_path/'elsewhere'
    run.mkdir()
    for o in ('config.json', 'last.safetensors'): shutil.copy(learn.run_path/o, run)

    def refuse(*args, **kw): raise AssertionError('a pickle was opened')
    for module, what in (torch, 'load'), (pickle, 'load'), (pickle, 'loads'), (pickle, 'Unpickler'):
        monkeypatch.setattr(module, what, refuse)
    model, config = load_run(run, 'last')
    assert config == config_of(learn) and not model.training
    assert str(model.head) == str(learn.model.head) and same(model.state_dict(), learn.model.state_dict())
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(x), learn.model.eval()(x))
    assert len(predict(run, images[:2], weights='last')) == 6
    if name == 'head': assert (model.head.fc1.out_features, model.head.dropout.p, model.stride) == (5, 0.3, 2)


@pytest.mark.parametrize('changes, says', [(dict(cut=1), 'another network'), (dict(hidden=6), 'another network'),
                                           (dict(hidden=-1), 'hidden must'), (dict(cut=7), 'it has no more')], ids=str)
def test_another_network_than_recorded(changes, says, trained, tmp_path):
    "A configuration that was changed by hand"
    run = Path(shutil.copytree(trained['head'].run_path, tmp_path/'mine'))
    config = json.loads((run/'config.json').read_text())
    config['made']['plan'] |= changes
    (run/'config.json').write_text(json.dumps(config))
    refuses(says, load_run, run)


def unsafe(source):
    "Lines that open pickles: those of libraries that do nothing else, fastai's, and torch's without weights_only=True"
    lines = []
    for o in ast.walk(ast.parse(source)):
        names = [a.name for a in o.names] if isinstance(o, (ast.Import, ast.ImportFrom)) else []
        if isinstance(o, ast.ImportFrom): names.append(o.module or '')
        bad = {'pickle', 'cloudpickle', 'dill', 'joblib', 'shelve', 'marshal'} & {n.split('.')[0] for n in names}
        loads = isinstance(o, (ast.Name, ast.Attribute, ast.alias)) and \
            'load_learner' in (getattr(o, 'id', ''), getattr(o, 'attr', ''), getattr(o, 'name', ''))
        calls = False
        if isinstance(o, ast.Call) and ast.unparse(o.func) in ('torch.load', 'np.load'):
            given = {k.arg: getattr(k.value, 'value', None) for k in o.keywords}
            calls = given.get('weights_only') is not True if ast.unparse(o.func) == 'torch.load' \
                else given.get('allow_pickle', False) is not False
        if bad or loads or calls: lines.append(o.lineno)
    return lines


def test_the_package_opens_no_pickles():
    for o in ('import pickle', 'from pickle import loads', 'torch.load(f)', 'torch.load(f, weights_only=False)',
              'np.load(f, allow_pickle=True)', 'learn = load_learner(f)', 'from fastai.learner import load_learner'):
        assert unsafe(o), o
    assert not unsafe("torch.load(f, map_location='cpu', weights_only=True)")
    files = sorted(Path(resnet_nbdev.__file__).parent.rglob('*.py'))
    assert len(files) > 10
    assert {f.name: found for f in files if (found := unsafe(f.read_text()))} == {}


# 9. Real weights and photos

@pytest.mark.slow
def test_recipe_with_real_weights(tmp_path):
    "S2 on 40 photos of 20 places: stem to layer2 of the run are those of ImageNet to the last bit, the rest has moved"
    weights = shared_file('resnet50-v1-imagenet-fp16.safetensors')
    taken = {}
    with zipfile.ZipFile(shared_file('miniplaces-20.zip')) as z:
        for o in sorted(o for o in z.namelist() if o.endswith('.jpg')):
            place = o.rsplit('/', 1)[0]
            taken[place] = taken.get(place, 0) + 1
            if taken[place] <= (2 if '/train/' in o else 1): z.extract(o, tmp_path)
    learn = run_recipe('S2', 'mine', runs=tmp_path/'runs', data=tmp_path/'miniplaces', arch='resnet50_v1', device='cpu',
                       weights=str(weights), presize=64, resize=64, bs=8, epochs=1, workers=0, json_lines=True)
    old, new = load_file(weights), load_file(learn.run_path/'last.safetensors')
    assert len(learn.dls.vocab) == 20 and new['fc.weight'].shape == (20, 2048)
    for k, v in new.items():
        if k.startswith('fc.') or k.endswith('num_batches_tracked'): continue
        moves = k.startswith(('layer3.', 'layer4.'))
        assert torch.equal(v, old[k].to(v.dtype)) != moves, k
    counted = {k.split('.')[0]: int(v) for k, v in new.items() if k.endswith('num_batches_tracked')}
    assert counted == dict(bn1=0, layer1=0, layer2=0, layer3=5, layer4=5)
    config = config_of(learn)
    cycle, = config['cycles']
    assert (cycle['trains_from'], cycle['rates'][-1], config['made']['plan']['bn']) == (3, 5e-4, 'frozen')
    assert same(named(load_run(learn.run_path, 'last')[0].state_dict()), new)
