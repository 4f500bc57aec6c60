"""Random networks of all kinds, with images for them."""
import os
from functools import partial

import pytest
import torch
from resnet_nbdev.blocks import BLOCKS, SHORTCUTS
from resnet_nbdev.networks import STEMS, custom_resnet

from conftest import HOME, randomised

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


def same_tensors(a, b):
    assert a.keys() == b.keys()
    for k in a: assert a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]), k
