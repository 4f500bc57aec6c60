"""The looks into a network: that they show the right numbers, and change nothing"""
import copy

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.vision.all import Learner
from resnet_nbdev.blocks import BLOCKS, BottleneckBlock, PlainBlock, PreActBlock, ResBlock
from resnet_nbdev.core import InputError
from resnet_nbdev.data import get_data
from resnet_nbdev.explain import (
    delete_blocks,
    embed,
    feature_maps,
    features,
    filtered,
    grad_cam,
    gradient_flow,
    overlay,
    plot_embedding,
    plot_filters,
    plot_maps,
    residual_blocks,
    without_block,
)
from resnet_nbdev.learner import resnet_learner
from resnet_nbdev.networks import custom_resnet
from resnet_nbdev.predictions import class_table, confident_errors, plot_confusion, predictions, show_predictions
from resnet_nbdev.resnet import cifar_resnet
from torch import nn

from conftest import randomised, refuses
from photos_of_noise import LOADERS, learner
from test_export import network


def test_features(learn):
    found, labels = features(learn, 2)
    xb, yb = (torch.cat(o).as_subclass(torch.Tensor) for o in zip(*learn.dls.loaders[2]))
    with torch.no_grad():
        maps = learn.model.eval().body(xb)
        pooled = learn.model.head.avgpool(maps)[..., 0, 0]
        assert torch.allclose(torch.from_numpy(found), pooled, atol=1e-5)
        before = learn.model.body.conv1(xb)
    assert labels.tolist() == yb.tolist()
    assert torch.allclose(torch.from_numpy(features(learn, 2, 'head.fc')[0]), learn.model(xb), atol=1e-4)
    early = features(learn, 2, 'body.bn1')[0]  # the ReLU after it works in place
    assert torch.allclose(torch.from_numpy(early), learn.model.body.bn1(before).mean((2, 3)), atol=1e-5)
    twice = features(learn, 2, 'body.layer1.0.relu')[0]  # runs twice: the last is the block's output
    assert torch.allclose(torch.from_numpy(twice), torch.from_numpy(features(learn, 2, 'body.layer1')[0]))


def test_maps(learn):
    x = torch.randn(3, 16, 16)
    maps = feature_maps(learn.model, x, 'body.bn1')
    with torch.no_grad(): expected = learn.model.body.bn1(learn.model.body.conv1(x[None]))[0]
    assert torch.allclose(maps, expected, atol=1e-5) and maps.min() < 0
    assert torch.equal(filtered(learn.model, x), feature_maps(learn.model, x[None], 'body.conv1'))
    maps = torch.zeros(20, 4, 4)
    maps[[3, 7, 12]] += torch.tensor([2., -3., 1.])[:, None, None]
    fig = plot_maps(maps, 3)
    assert [int(o.get_title()) for o in fig.axes] == [3, 7, 12]
    assert [np.asarray(o.images[0].get_array())[0, 0] for o in fig.axes] == [2, -3, 1]
    assert {o.images[0].get_clim() for o in fig.axes} == {(-3, 2)}


@pytest.mark.parametrize('channels, stem', [(1, 'cifar'), (3, 'imagenet'), (4, 'cifar'), (3, 'deep')])
def test_filters(channels, stem):
    model = custom_resnet([1], [64], 5, stem=stem, in_channels=channels)
    shown = plot_filters(model).axes
    w = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).weight
    assert len(shown) == len(w)
    for ax, o in zip(shown, w):
        values = np.asarray(ax.images[0].get_array())
        assert 0 <= values.min() and values.max() <= 1 and .5 in (1 - values.min(), values.max() - .5, .5)
        assert values.shape == (*o.shape[1:], 3)[:3 if channels == 3 else 2]
    assert filtered(model, torch.rand(channels, 32, 32)).shape[0] == len(w)


def test_embedding():
    values = np.random.default_rng(0).normal(size=(40, 60))
    for how in ('pca', 'tsne'): np.testing.assert_array_equal(embed(values, how), embed(values, how))
    assert embed(values[:5], 'tsne').shape == (5, 2) and embed(values[:2]).shape == (2, 2)
    fig = plot_embedding(embed(values), np.arange(40) % 12, [f'class {i}' for i in range(12)])
    assert len(fig.legends[0].texts) == 12
    assert plot_embedding(embed(values), [0]*40, 'ab', ax=plt.subplots()[1]).legends == []


# nothing is changed

def state(model):
    return ({k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()],
            [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
            [len(h) for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)],
            [sorted(vars(m)) for m in model.modules()])


def same(a, b):
    if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture
def odd(learn):
    "A learner whose network has mixed flags, a frozen stage and gradients"
    model = learn.model.train()
    model.body.layer2.eval()
    model.body.layer1.requires_grad_(False)
    for p in model.head.parameters(): p.grad = torch.ones_like(p)
    yield learn
    model.requires_grad_(True).eval()
    model.zero_grad()


X, Y = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
LOOKS = dict(
    predictions=lambda o: predictions(o, 0), features=features, delete_blocks=delete_blocks,
    show_predictions=lambda o: show_predictions(o, predictions(o)), plot_filters=lambda o: plot_filters(o.model),
    filtered=lambda o: filtered(o.model, X[0]), feature_maps=lambda o: feature_maps(o.model, X[:1], 'body.layer2'),
    grad_cam=lambda o: grad_cam(o.model, X), gradient_flow=lambda o: gradient_flow(o.model, X, Y),
    gradient_flow_eval=lambda o: gradient_flow(o.model, X, Y, training=False))
FAILURES = dict(
    layer=lambda o: features(o, layer='body.layer7'), unused=lambda o: features(o, layer=nn.ReLU()),
    small=lambda o: feature_maps(o.model, X[0, :, :2, :2], 'body.layer2'),
    flat=lambda o: feature_maps(o.model, X[0], 'head'),
    label=lambda o: gradient_flow(o.model, X, Y + 9), block=lambda o: inside(o.model, 'body.layer2.0', X[:, :1]))


def inside(model, name, x):
    with without_block(model, name):
        try: model(x)
        except RuntimeError as e: raise InputError('this failed inside') from e


@pytest.mark.parametrize('look', LOOKS)
def test_nothing_changes(odd, look):
    before, drawn = state(odd.model), torch.get_rng_state()
    LOOKS[look](odd)
    assert same(before, state(odd.model))
    if look.startswith('gradient'): assert torch.equal(drawn, torch.get_rng_state())


@pytest.mark.parametrize('look', FAILURES)
def test_nothing_changes_when_it_fails(odd, look):
    before = state(odd.model)
    with pytest.raises(InputError): FAILURES[look](odd)
    assert same(before, state(odd.model))


# deleted blocks

def small_net(block, kind='B'):
    torch.manual_seed(0)
    return randomised(custom_resnet([2, 2], [8, 16], 5, block=block, stem='cifar', shortcut_kind=kind)).double()


def replaced(model, name):
    "A copy of the network that never had the block, only what goes around it"
    model = copy.deepcopy(model)
    block = model.get_submodule(name)
    layers = [] if block.downsample is None else [block.downsample]
    if block.preact: layers = [block.bn1, nn.ReLU(), *layers] if layers else []
    elif block.skip: layers = [*layers, nn.ReLU()]
    stage, i = name.rsplit('.', 1)
    model.get_submodule(stage)[int(i)] = nn.Sequential(*layers)
    return model


@pytest.mark.parametrize('kind', 'ABCD')
@pytest.mark.parametrize('block', [ResBlock, BottleneckBlock, PreActBlock])
def test_deletion_is_a_network_without_the_block(block, kind):
    model, x = small_net(block, kind), torch.rand(3, 3, 16, 16, dtype=torch.float64)
    given = x.clone()
    assert residual_blocks(model) == [f'body.layer{i}.{j}' for i in (1, 2) for j in (0, 1)]
    with torch.no_grad():
        whole = model(x)
        for name in residual_blocks(model):
            expected = replaced(model, name)(x)
            with without_block(model, name) as same_model:
                assert same_model is model and torch.equal(model(x), expected)
                assert torch.equal(copy.deepcopy(model)(x), expected)
            assert not torch.allclose(expected, whole)
        with without_block(model, 'body.layer1.1'), without_block(model, 'body.layer2.1'):
            two = replaced(replaced(model, 'body.layer1.1'), 'body.layer2.1')
            with without_block(model, 'body.layer2.1'): assert torch.equal(model(x), two(x))
            assert torch.equal(model(x), two(x))
        assert torch.equal(model(x), whole) and torch.equal(x, given)


def test_a_plain_block_passes_its_input_on():
    model, x = small_net(PlainBlock), torch.rand(3, 3, 16, 16, dtype=torch.float64)
    for name in ('body.layer1.0', 'body.layer1.1', 'body.layer2.1'):
        with without_block(model, name), torch.no_grad(): assert torch.equal(model(x), replaced(model, name)(x))
    with pytest.raises(InputError, match='has no shortcut'), without_block(model, 'body.layer2.0'): pass


@pytest.mark.parametrize('block', BLOCKS.values(), ids=BLOCKS)
def test_accuracies_without_blocks(three, block):
    learn = learner(three, block=block)
    table = delete_blocks(learn, 2)
    xb, yb = (torch.cat(o).as_subclass(torch.Tensor) for o in zip(*learn.dls.loaders[2]))
    score = lambda m: (m.eval()(xb).argmax(1) == yb).double().mean().item()
    with torch.no_grad():
        assert table.attrs['accuracy'] == score(learn.model) == predictions(learn, 2).is_correct.mean()
        assert table.accuracy.tolist() == [score(replaced(learn.model, o)) for o in table.block]
    np.testing.assert_allclose(table['drop'], table.attrs['accuracy'] - table.accuracy)
    plain = [] if block.skip else ['body.layer2.0', 'body.layer3.0']
    assert table.block.tolist() == [o for o in residual_blocks(learn.model) if o not in plain]


# gradients

@pytest.mark.parametrize('training', [True, False])
def test_gradients_by_hand(training):
    model, x, y = small_net(ResBlock), torch.rand(6, 3, 16, 16, dtype=torch.float64), torch.arange(6) % 5
    model.body.layer1.requires_grad_(False)
    flow = gradient_flow(model, x, y, training)
    with torch.inference_mode(): pd.testing.assert_frame_equal(flow, gradient_flow(model, x, y, training))
    hand = copy.deepcopy(model).requires_grad_(True).train(training)
    F.cross_entropy(hand(x), y).backward()
    convs = {n: m for n, m in hand.named_modules() if isinstance(m, nn.Conv2d)}
    assert flow.layer.tolist() == [*convs] and flow.layer[0] == 'body.conv1'
    np.testing.assert_allclose(flow.gradient, [m.weight.grad.norm().item() for m in convs.values()], rtol=1e-9)
    np.testing.assert_allclose(flow.weight, [m.weight.norm().item() for m in convs.values()], rtol=1e-9)


# what cannot be done

BAD = dict(
    no_test_set=(lambda o: predictions(o, 3), '3 sets'),
    negative=(lambda o: delete_blocks(o, -1), '3 sets'),
    not_a_set=(lambda o: features(o, 'val'), '3 sets'),
    other_table=(lambda o: confident_errors(pd.DataFrame(dict(a=[1]))), 'no column is_correct, probability'),
    other_images=(lambda o: show_predictions(o, predictions(o, 0), 1), 'not images of set 1'),
    no_set=(lambda o: show_predictions(o, predictions(o), 5), '3 sets'),
    no_image=(lambda o: show_predictions(o, predictions(o).head(0)), 'from 1 to 100'),
    no_column=(lambda o: show_predictions(o, predictions(o), cols=0), 'cols must'),
    other_vocab=(lambda o: class_table(predictions(o), ['tench']), "has the class 'English_springer'"),
    not_square=(lambda o: plot_confusion(pd.DataFrame(np.ones((2, 3)))), 'as many rows'),
    how=(lambda o: embed(np.ones((9, 3)), 'umap'), "'pca' or 'tsne'"),
    nan=(lambda o: embed(np.full((9, 3), np.nan)), 'finite'),
    few=(lambda o: embed(np.ones((3, 3)), 'tsne'), '5 images'),
    labels=(lambda o: plot_embedding(np.ones((3, 2)), [0, 1], 'ab'), '(N, 2)'),
    label=(lambda o: plot_embedding(np.ones((2, 2)), [0, 2], 'ab'), 'from 0 to 1'),
    no_conv=(lambda o: plot_filters(nn.Linear(2, 2)), 'no convolution'),
    grey=(lambda o: filtered(o.model, X[0, :1]), '(N, 3, H, W)'),
    bytes=(lambda o: filtered(o.model, (X[0]*255).byte()), 'floats'),
    path=(lambda o: filtered(o.model, 'photo.jpg'), 'not str'),
    several=(lambda o: feature_maps(o.model, X, 'body'), 'x has 4'),
    tiny=(lambda o: feature_maps(o.model, X[0, :, :2, :2], 'body'), 'too small'),
    flat=(lambda o: feature_maps(o.model, X[0], 'head'), 'no maps'),
    maps=(lambda o: plot_maps(X), '(C, h, w)'),
    unknown=(lambda o: features(o, layer='body.layer9'), "no layer 'body.layer9'"),
    unused=(lambda o: features(o, layer=nn.ReLU()), 'does not use'),
    unequal=(lambda o: gradient_flow(o.model, X, Y[:2]), 'for each of 4 images'),
    large=(lambda o: gradient_flow(o.model, X, Y + 1), 'from 0 to 2'),
    float=(lambda o: gradient_flow(o.model, X, Y.float()), 'number of a class'),
    block=(lambda o: without_block(o.model, 'body.layer1').__enter__(), 'body.layer1.0'),
    no_block=(lambda o: without_block(nn.Linear(2, 2), 'x').__enter__(), 'none'))


@pytest.mark.parametrize('case', BAD)
def test_one_sentence(learn, case):
    look, says = BAD[case]
    with pytest.raises(InputError) as e: look(learn)
    assert says in str(e.value) and '\n' not in str(e.value)


def test_networks_that_do_not_fit(three):
    dls = LOADERS['stock'](three, 4)
    with pytest.raises(InputError, match='3 classes'): predictions(Learner(dls, cifar_resnet(8, 5)))
    broken = resnet_learner(dls, 'cifar_resnet8')
    nn.init.constant_(broken.model.head.fc.weight, np.nan)
    with pytest.raises(InputError, match='not finite'): predictions(broken)
    other = Learner(dls, nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)))
    assert residual_blocks(other.model) == []
    with pytest.raises(InputError, match='no block'): delete_blocks(other)
    assert len(predictions(other)) == 12 and len(gradient_flow(other.model, X, Y)) == 1
    assert features(other, layer='0')[0].shape == (12, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')
def test_on_a_gpu(three):
    dls = get_data(three, 24, 16, 4, num_workers=0, device='cuda')
    learn = resnet_learner(dls, 'cifar_resnet8')
    table = predictions(learn)
    show_predictions(learn, table)
    plot_filters(learn.model)
    assert features(learn)[0].shape == (12, 64) and len(delete_blocks(learn)) == 3
    assert filtered(learn.model, X[0]).device.type == 'cpu' and len(gradient_flow(learn.model, X, Y))
    overlay(X[0], grad_cam(learn.model, X.cuda())[0])


# Grad-CAM

@pytest.mark.parametrize('kw', [dict(block='ResBlock', stem='deep', shortcut_kind='D'), dict(block='BottleneckBlock'),
                                dict(block='PreActBlock', stem='cifar')])
def test_grad_cam_is_the_numerical_gradient(kw):
    "A step for all places of a channel at once changes a score by as many times the channel's weight, for every class"
    torch.manual_seed(0)
    model = randomised(custom_resnet([1, 1, 1], [8, 16, 16], 5, **kw)).double()
    x = torch.rand(1, 3, 40, 56, dtype=torch.float64)
    cut = [n for n, _ in model.body.named_children()].index('layer2') + 1
    with torch.no_grad():
        A = model.body[:cut](x)
        step = 1e-7*torch.eye(A.shape[1], dtype=A.dtype)[:, :, None, None]
        score = lambda o: torch.cat([model.head(model.body[cut:](p.clone())) for p in o.split(64)]) # a ReLU in place
        weights = (score(A + step) - score(A - step))/2e-7/A[0, 0].numel()
        want = torch.einsum('kc,khw->chw', weights, A[0]).relu()
    found = torch.cat([grad_cam(model, x, c, 'body.layer2') for c in range(5)])
    assert (want.amax((1, 2)) > 0).any()
    torch.testing.assert_close(found, want/want.amax((1, 2), keepdim=True).clamp(min=1e-30), atol=1e-4, rtol=0)


def test_grad_cam_leaves_everything_as_it_was():
    model = cifar_resnet(8, 4).train()
    model.body.layer1.eval()
    for p in model.body.parameters(): p.requires_grad_(False)
    flags = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.rand(3, 3, 16, 16)
    with torch.inference_mode(): maps = grad_cam(model, x)
    assert maps.shape == (3, 4, 4) and not maps.requires_grad
    with pytest.raises(InputError): grad_cam(model, x, layer='head')
    with pytest.raises(RuntimeError): grad_cam(model, torch.rand(3, 5, 16, 16))
    assert [m.training for m in model.modules()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()), 'running statistics are as they were'


def test_each_image_has_its_own_map_and_class():
    model = network('cifar_resnet8')
    x = torch.rand(4, 3, 20, 24)
    classes = model(x).argmax(1)
    torch.testing.assert_close(grad_cam(model, x), grad_cam(model, x, classes))
    torch.testing.assert_close(grad_cam(model, x, [0, 1, 2, 0])[1:2], grad_cam(model, x[1:2], 1), atol=1e-5, rtol=0)
    maps = torch.cat([grad_cam(model, x, c) for c in range(3)])
    assert maps.min() >= 0 and set(maps.amax((1, 2)).round(decimals=5).tolist()) <= {0., 1.}


@pytest.mark.parametrize('target', [3, -1, [0, 1, 2], 1.5])
def test_no_such_class(target):
    refuses(['class'], grad_cam, network('cifar_resnet8'), torch.rand(2, 3, 16, 16), target)


def test_overlay_is_where_the_map_is():
    grey = np.full((40, 60, 3), 100, np.uint8)
    cam = torch.zeros(4, 6)
    cam[0, 5] = 1
    shown = overlay(grey, cam, 1).astype(int)
    moved = (shown != 100).any(2)
    assert shown.shape == grey.shape and moved[:10, 50:].all() and not moved[20:].any() and not moved[:, :40].any()
