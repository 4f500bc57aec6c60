"""What holds for every network that can be asked for, tried on random ones; what a drawing and an import promise."""
import copy
import os
import shutil
import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch

from conftest import HOME, environment, randomised
from resnet_nbdev.blocks import BLOCKS, SHORTCUTS
from resnet_nbdev.layers import layer_table, plot_network
from resnet_nbdev.networks import STEMS, custom_resnet
from resnet_nbdev.resnet import ARCHS, cifar_resnet, create_resnet, resnet18
from resnet_nbdev.weights import load_weights, torchvision_state

os.environ['HYPOTHESIS_STORAGE_DIRECTORY'] = HOME  # else it makes a folder where pytest was started
from hypothesis import HealthCheck, given, settings, strategies as st

SKIPPING = [o for o in BLOCKS if BLOCKS[o].skip]
close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)


def ceil_div(a, b): return -(-a//b)


@st.composite
def networks(draw, block, kind, stages=(1, 4), zero_init=True):
    "Arguments of custom_resnet, and the height and width of an image that is large enough"
    stem, n = draw(st.sampled_from(STEMS)), draw(st.integers(*stages))
    several = lambda low, high: draw(st.lists(st.integers(low, high), min_size=n, max_size=n))
    sizes = several(4, 16)
    kw = dict(block_sizes=several(1, 3), feature_map_sizes=sorted(sizes) if kind == 'A' else sizes, block=block,
              stem=stem, shortcut_kind=kind, classes=draw(st.integers(1, 7)), in_channels=draw(st.integers(1, 5)),
              ks=draw(st.sampled_from([1, 3, 5])))
    if zero_init and block != 'PlainBlock': kw['zero_init'] = draw(st.booleans())
    if block == 'BottleneckBlock':
        kw |= dict(stride_on=draw(st.sampled_from(['1x1', '3x3'])), groups=draw(st.sampled_from([1, 2, 4])),
                   width_per_group=draw(st.sampled_from([32, 64, 128])))
    side = st.integers((1 if stem == 'cifar' else 4)*2**(n-1), 40)
    return kw, (draw(side), draw(side))


def random_networks(n, blocks=tuple(BLOCKS), kinds=SHORTCUTS, **options):
    "Call a test with `n` networks for each block and shortcut: left to hypothesis alone, some would never be drawn"
    def decorate(f):
        @pytest.mark.parametrize('kind', kinds)
        @pytest.mark.parametrize('block', blocks)
        @settings(max_examples=n, deadline=None, derandomize=True, database=None,
                  suppress_health_check=[HealthCheck.too_slow])
        @given(data=st.data())
        def test(block, kind, data): f(*data.draw(networks(block, kind, **options)))
        test.__doc__ = f.__doc__
        return test
    return decorate


def build(kw, seed=0):
    torch.manual_seed(seed)
    return custom_resnet(**kw)


def images(kw, size, n=2, seed=1, **to):
    return torch.randn(n, kw['in_channels'], *size, generator=torch.Generator().manual_seed(seed)).to(**to)


def trained(kw, seed=0): return randomised(build(kw, seed))


def real_shapes(model, x):
    "The output shape of one image for each part, from a forward pass"
    out, handles = {}, []
    for name, m in [*model.body.named_children(), *model.head.named_children()]:
        keep = lambda _, args, y, name=name: out.__setitem__(name, tuple(y.shape[1:]))
        handles.append(m.register_forward_hook(keep))
    with torch.no_grad(): logits = model(x)
    for o in handles: o.remove()
    return logits, out


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


@random_networks(5)
def test_layer_table(kw, size):
    "Against a forward pass, and against torch's counter: two operations for each multiply-add"
    from torch.utils.flop_counter import FlopCounterMode
    model = build(kw).eval()
    state = copy.deepcopy(model.state_dict())
    table = layer_table(model, size)
    with FlopCounterMode(display=False) as counter: _, shapes = real_shapes(model, images(kw, size, n=1))
    shapes.pop('flatten')
    assert table.output.to_dict() == shapes
    assert table.parameters.sum() == sum(p.numel() for p in model.parameters())
    assert table.multiply_adds.sum()*2 == counter.get_total_flops()
    counts = {k.split('.', 2)[2]: sum(v.values()) for k, v in counter.get_flop_counts().items() if k.count('.') == 2}
    for name, count in table.multiply_adds.items(): assert count*2 == counts.get(name, 0), name
    same_tensors(model.state_dict(), state)


def same_tensors(a, b):
    assert a.keys() == b.keys()
    for k in a: assert a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]), k


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
def test_round_trip_of_the_weights(kw, size):
    one, other, x = trained(kw, 0), trained(kw, 1), images(kw, size)
    state = torchvision_state(one)
    assert load_weights(other, state, strict=True) is other
    same_tensors(other.state_dict(), one.state_dict())
    with torch.no_grad(): assert torch.equal(one(x), other(x))
    assert all(t.data_ptr() == u.data_ptr() for t, u in zip(state.values(), one.state_dict().values()))


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


@random_networks(15, blocks=['ResBlock'], kinds='A', zero_init=False)
def test_plain_and_residual_differ_by_the_skip_alone(kw, size):
    "In train mode, where batch norm keeps ReLUs from dying and with them the difference"
    res, plain = build(kw), build(kw | dict(block='PlainBlock'), 1)
    shapes = lambda m: [(k, v.shape) for k, v in m.state_dict().items()]
    assert shapes(res) == shapes(plain)
    load_weights(plain, torchvision_state(res), strict=True)
    x = images(kw, size, n=8)
    with torch.no_grad(): assert not torch.allclose(res(x), plain(x))


@random_networks(8, blocks=SKIPPING)
def test_without_its_branch_a_block_is_its_shortcut(kw, size):
    model, x = trained(kw | dict(zero_init=False)), images(kw, size)
    zeroed = build(kw | dict(zero_init=True)).eval()
    blocks = [[b for n, m in o.body.named_children() if n.startswith('layer') for b in m] for o in (model, zeroed)]
    last = 'bn3' if kw['block'] == 'BottleneckBlock' else 'bn2'
    with torch.no_grad():
        h = torch.randn(2, blocks[0][0].conv1.in_channels, *size)
        for b, z in zip(*blocks):
            state = b.state_dict()
            if b.preact: assert not z.conv2.weight.any()
            else: assert not (z.get_submodule(last).weight.any() or z.get_submodule(last).bias.any())
            keep = ('conv2.',) if b.preact else (f'{last}.weight', f'{last}.bias')
            z.load_state_dict({k: v for k, v in state.items() if not k.startswith(keep)}, strict=False)
            for training in (False, True):
                z.train(training)
                start = z.relu(z.bn1(h)) if z.preact and z.downsample is not None else h
                around = start if z.downsample is None else z.downsample(start)
                want = around if z.preact else around.relu()
                assert torch.equal(z(h), want)
            h = b(h)


@pytest.mark.parametrize('arch', ARCHS)
def test_drawing(arch):
    "Every stage is named, and every text can be read: none on another, none beyond the edge"
    from matplotlib import pyplot as plt
    from matplotlib.text import Text
    with torch.device('meta'): model = create_resnet(arch, 10)
    fig = plot_network(model, 32 if arch.startswith('cifar') else (224, 192))
    try:
        fig.canvas.draw()
        texts = [o for ax in fig.axes for o in ax.get_children() if isinstance(o, Text) and o.get_text().strip()]
        stages = [n for n, _ in model.body.named_children() if n.startswith('layer')]
        assert {'stem', *stages, 'head'} <= {o.get_text() for o in texts}
        boxes = [(o.get_text(), o.get_window_extent()) for o in texts]
        for i, (text, box) in enumerate(boxes):
            inside = fig.bbox.x0 <= box.x0 and box.x1 <= fig.bbox.x1 and fig.bbox.y0 <= box.y0 and box.y1 <= fig.bbox.y1
            assert inside, (text, box, fig.bbox)
            for other, place in boxes[:i]: assert not box.overlaps(place), (text, other)
    finally: plt.close(fig)


IMPORT = '''
import sys, time, torch
before, start = set(sys.modules), time.process_time()
import resnet_nbdev.resnet
print(time.process_time() - start, *{o.split('.')[0] for o in set(sys.modules) - before})
'''


def test_import_is_light(tmp_path):
    "A user of the networks alone waits for torch and for nothing else"
    heavy, seconds = {'fastai', 'fastcore', 'pandas', 'torchvision', 'matplotlib', 'safetensors'}, []
    for _ in range(3):
        out = subprocess.run([sys.executable, '-c', IMPORT], cwd=tmp_path, env=environment(), text=True, timeout=60,
                             check=True, stdout=subprocess.PIPE).stdout.split()
        assert not heavy & set(out[1:])
        seconds.append(float(out[0]))
        if seconds[-1] <= .2: break
    assert min(seconds) <= .2, seconds


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize('arch', [partial(cifar_resnet, 8), partial(resnet18, block='PreActBlock')],
                         ids=['cifar_resnet8', 'preact_resnet18'])
def test_weights_take_the_precision_of_the_model(dtype, arch):
    source, model = arch(classes=3), arch(classes=3).to(dtype)
    load_weights(model, torchvision_state(source), strict=True)
    for k, v in model.state_dict().items():
        want = source.state_dict()[k]
        assert torch.equal(v, want.to(dtype) if want.is_floating_point() else want), k
    assert next(model.parameters()).dtype == dtype
    with torch.no_grad(): assert model.eval()(torch.randn(2, 3, 32, 32, dtype=dtype)).isfinite().all()
