"""A Learner's tools: averages, limits, mixtures and sizes, beside plain arithmetic."""
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.vision.all import Callback, set_seed
from resnet_nbdev.learner import resnet_learner
from resnet_nbdev.plans import plan_cycles, run_cycle
from resnet_nbdev.resident import resident_data
from torch import nn

from conftest import refuses
from toys import changed, copied, learner, quietly, toy

# tools

class Watch(Callback):
    "Call `what(learn)` at an event, before or after the callbacks of another order"
    def __init__(self, event, what, order=90):
        self.what, self.order = what, order
        setattr(self, event, lambda: what(self.learn))


def fit(learn, *args, schedule='flat', **kw):
    run_cycle(learn, plan_cycles(learn, 0, *args, schedule=schedule, **kw)[-1])
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
    fit(learn, 1, 1e-6, schedule='flat')
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


@pytest.mark.parametrize('threads', [1, 3])
def test_the_resident_loader_makes_small_images_at_once(threads, folder):
    "Averages of its full ones; after the training its own size again"
    made = {}
    for small in (8, 16):
        dls = resident_data(folder, 16, 4, presize=20, num_workers=threads, augment=dict(max_lighting=0.))
        batches = made.setdefault(small, [])
        learn = learner(dls=dls, progressive=(small, 16), cbs=Watch(
            'before_batch', lambda l: l.training and batches.append(l.x.as_subclass(torch.Tensor).clone()), -50))
        fit(learn, 2, 1e-3)
        assert dls.one_batch()[0].shape[-1] == 16
    for i, (one, two) in enumerate(zip(made[8], made[16], strict=True)):
        want = nn.functional.avg_pool2d(two, 2) if i < 4 else two
        torch.testing.assert_close(one, want, rtol=0, atol=0.02)


def test_an_interrupted_training_leaves_the_loader_its_size(folder):
    dls = resident_data(folder, 16, 4, presize=20)
    def stop(learn):
        if learn.training: raise KeyboardInterrupt
    made = learner(dls=dls, progressive=(8, 16), cbs=Watch('after_batch', stop))
    with pytest.raises(KeyboardInterrupt): fit(made, 1, 1e-3)
    assert dls.one_batch()[0].shape[-1] == 16


def test_no_size_above_that_of_the_images(folder):
    refuses('progressive has 24 pixels, and the images 16', learner, dls=resident_data(folder, 16, 4, presize=20),
            progressive=(8, 24))


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


def test_tools_are_recorded():
    tools = dict(mixup=0.2, clip=1., accumulate=16, ema=0.9, max_norm=2., progressive=(8, 16), label_smoothing=0.1,
                 top_k=2, wd=0.05, opt='sgd')
    learn = learner(plan='late', **tools)
    assert {k: learn.options[k] for k in tools} == {**tools, 'opt': 'SGD(mom=0.9)'}
    assert learn.options['plan']['bn'] == 'frozen' and json.dumps(learn.options)
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
