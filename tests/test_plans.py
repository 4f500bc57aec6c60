"""Plans: what moves and how fast, fastai's own schedules, and networks cut as a plan says."""
import math

import numpy as np
import pytest
import torch
from fastai.vision.all import Callback
from resnet_nbdev.plans import PLANS, SCHEDULES, Plan, build_network, plan_cycles, plan_table, run_cycle, stage_groups
from resnet_nbdev.resnet import create_resnet
from torch import nn

from conftest import refuses
from toys import GROUPS, TINY, batch_norm, changed, copied, group_of, learner, same, toy, weights_of

ALL, HEAD = set(GROUPS), {'head'}
MOVES = dict(all=[ALL, ALL], head=[HEAD, HEAD], late=[HEAD, {'layer3', 'layer4', 'head'}], cut=[HEAD, HEAD],
             frozen=[HEAD, HEAD], discriminative=[HEAD, ALL], stepped=[ALL, ALL],
             gradual=[HEAD, {'layer4', 'head'}, {'layer3', 'layer4', 'head'}, ALL])


def test_every_plan_is_tested(): assert {*MOVES, 'probe'} == PLANS.keys()  # see test_probes.py


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
    cycle = plan_cycles(learn, 0, 1, 2e-2, schedule='flat')[0]
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


@pytest.mark.parametrize('kw', [dict(lr_mult=0), dict(lr_mult=-3), dict(lr_mult=math.nan), dict(pct_start=2.),
                                dict(pct_start=-1.), dict(div=0.)], ids=str)
def test_numbers_of_a_schedule_are_refused(kw):
    refuses('must', plan_cycles, learner(plan='discriminative'), **kw)


# fastai's own calls

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
    mine = ours(2, 1, 1e-2, lr_mult=7, pct_start=0.5, div=3.)
    assert same(end(mine, plan='discriminative'), end(theirs, plan='discriminative'))


FITS = dict(one_cycle=[lambda l, lr: l.fit_one_cycle(1, lr, pct_start=0.99),
                       lambda l, lr: l.fit_one_cycle(2, lr, pct_start=0.3, div=5.)],
            flat_cos=[lambda l, lr: l.fit_flat_cos(1, lr), lambda l, lr: l.fit_flat_cos(2, lr)],
            flat=[lambda l, lr: l.fit(1, lr), lambda l, lr: l.fit(2, lr)])


@pytest.mark.parametrize('kind', FITS)
def test_schedules_are_fits_of_fastai(kind):
    def theirs(learn):
        learn.freeze_to(-1)
        FITS[kind][0](learn, slice(1e-2))
        learn.unfreeze()
        FITS[kind][1](learn, slice(5e-5, 5e-3))
    assert same(end(ours(1, 2, 1e-2, schedule=kind), plan='discriminative'), end(theirs, plan='discriminative'))


def test_every_schedule_is_tested(): assert {*FITS, 'linear'} == SCHEDULES.keys()


def test_straight_up_and_straight_down_to_zero():
    "In each group, at every step"
    learn = learner(plan='discriminative', dls=toy(n=20, bs=2, valid=2, size=16), cbs=Rates())
    cycle = plan_cycles(learn, 0, 2, 1e-2, schedule='linear', pct_start=.25, div=4.)[0]
    run_cycle(learn, cycle)
    at = np.arange(20)/20
    shape = np.where(at < .25, .25 + .75*at/.25, (1 - at)/.75)
    np.testing.assert_allclose(learn.rates.seen, shape[:, None]*np.array(cycle['rates']), rtol=1e-6)


def test_no_frozen_epochs():
    theirs = lambda learn: learn.fit_one_cycle(2, slice(5e-5, 5e-3), pct_start=0.3, div=5.)
    assert same(end(ours(0, 2, 1e-2), plan='discriminative'), end(theirs, plan='discriminative'))


# networks

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
