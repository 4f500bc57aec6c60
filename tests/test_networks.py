"""What holds for every network that can be asked for, tried on random ones."""
import copy
import os
import shutil
import warnings

import pytest
import torch
from resnet_nbdev.blocks import BLOCKS

from conftest import HOME
from random_networks import build, ceil_div, close, images, random_networks, real_shapes, trained

os.environ['HYPOTHESIS_STORAGE_DIRECTORY'] = HOME  # else it makes a folder where pytest was started


@random_networks(8)
def test_shapes(kw, size):
    "Each part halves as often as it has strides, and rounds up"
    model = build(kw).eval()
    logits, shapes = real_shapes(model, images(kw, size, n=3))
    assert logits.shape == (3, kw['classes']) and logits.isfinite().all()
    if kw['stem'] != 'cifar': size = [ceil_div(ceil_div(o, 2), 2) for o in size]
    for i, (n, channels) in enumerate(zip(kw['block_sizes'], kw['feature_map_sizes'])):
        if i: size = [ceil_div(o, 2) for o in size]
        stage = model.body.get_submodule(f'layer{i+1}')
        assert len(stage) == n and {type(o).__name__ for o in stage} == {kw['block']}
        assert shapes[f'layer{i+1}'] == (channels*BLOCKS[kw['block']].expansion, *size)
    assert f'layer{i+2}' not in shapes


@random_networks(6, zero_init=False)
def test_every_parameter_learns(kw, size):
    "Normalised values are positive somewhere, so no ReLU is dead, as long as there are a few of them in each channel"
    model, x = build(kw).double(), images(kw, size, n=8, dtype=torch.float64)
    y = model(x)
    (y*torch.randn_like(y)).sum().backward()
    for k, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), k
        assert p.grad.any(), k


@random_networks(6)
def test_gradients_are_finite(kw, size):
    model, x = build(kw), images(kw, size, n=4)
    x.requires_grad_()
    y = model(x)
    (y*torch.randn_like(y)).sum().backward()
    for p in (x, *model.parameters()): assert p.grad is not None and p.grad.isfinite().all()


@random_networks(4)
def test_input_is_not_changed(kw, size):
    "Although ReLUs and sums work in place"
    x = images(kw, size)
    before = x.clone()
    with torch.no_grad():
        for model in (build(kw), build(kw).eval()): model(x)
    assert torch.equal(x, before)


@random_networks(4)
def test_deepcopy(kw, size):
    model, x = trained(kw), images(kw, size)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        want = model(x)
        assert torch.equal(twin(x), want)
        both = [{t.data_ptr() for t in o.state_dict().values()} for o in (model, twin)]
        assert not both[0] & both[1]
        for t in twin.state_dict().values(): t.zero_()
        assert torch.equal(model(x), want)


@random_networks(6)
def test_channels_last(kw, size):
    model, x = trained(kw), images(kw, size)
    with torch.no_grad():
        want = model(x)
        close(model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last)), want)


@random_networks(4)
def test_bf16_autocast(kw, size):
    model, x = build(kw), images(kw, size, n=4)
    with torch.autocast('cpu', torch.bfloat16): y = model(x)
    assert y.dtype == torch.bfloat16
    (y.float()*torch.randn(y.shape)).sum().backward()
    assert y.isfinite().all()
    for p in model.parameters(): assert p.dtype == torch.float32 and p.grad.isfinite().all()


@random_networks(1, stages=(2, 3))
def test_compile_makes_one_graph(kw, size):
    model, x = trained(kw), images(kw, size)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend='eager', fullgraph=True)(x), model(x))
    torch._dynamo.reset()


@random_networks(1, stages=(2, 3))
def test_export(kw, size):
    model, x = trained(kw), images(kw, size)
    with torch.no_grad(): assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.parametrize('way', ['trace', 'script'])
def test_torchscript(way):
    "Old, and still in use where networks are served"
    model, x = trained(dict(block_sizes=[1, 1], feature_map_sizes=[4, 8], classes=3)), torch.randn(2, 3, 40, 24)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', category=torch.jit.TracerWarning)
        made = torch.jit.trace(model, x) if way == 'trace' else torch.jit.script(model)
    for o in (x, x[:1, :, :32, :17]): close(made(o), model(o))


@pytest.mark.parametrize('options, multiples', [
    (dict(), True), (dict(stem='cifar'), False), (dict(block='BottleneckBlock', stem='deep', shortcut_kind='D'), True),
    (dict(block='PreActBlock', stem='cifar', shortcut_kind='A'), True)], ids=['imagenet', 'cifar', 'd', 'preact_a'])
def test_export_with_free_sizes(options, multiples):
    "Multiples of the stride: torch (as of 2.11) settles odd or even at a max-pool, for torchvision's networks as well"
    kw = dict(block_sizes=[1, 1], feature_map_sizes=[4, 8], classes=3, in_channels=3, **options)
    model, Dim = trained(kw), torch.export.Dim
    s = model.stride
    side = lambda name: s*Dim(f'_{name}', min=2) if multiples else Dim(name, min=s + 1)
    exported = torch.export.export(model, (images(kw, (5*s, 7*s)),),
                                   dynamic_shapes=({0: Dim('n', min=1), 2: side('h'), 3: side('w')},)).module()
    with torch.no_grad():
        for n, size in ((1, (2*s, 2*s)), (3, (8*s, 3*s)), *([] if multiples else [(2, (3, 11))])):
            x = images(kw, size, n)
            close(exported(x), model(x))


@pytest.mark.slow
@pytest.mark.skipif(not (os.environ.get('CXX') or any(map(shutil.which, ('g++', 'c++', 'clang++')))),
                    reason='there is no C++ compiler')
@pytest.mark.skipif(' ' in torch.__file__, reason='torch cannot link against itself in a path with a space')
def test_inductor(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path))
    kw = dict(block_sizes=[1], feature_map_sizes=[4], classes=3, in_channels=3, stem='cifar')
    model, x = trained(kw), images(kw, (9, 12))
    torch._dynamo.reset()
    with torch.no_grad(): close(torch.compile(model, fullgraph=True)(x), model(x))
    torch._dynamo.reset()
