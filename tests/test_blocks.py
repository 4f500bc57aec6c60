"""Blocks: what a block is without its branch, and without its shortcut."""
import torch
from resnet_nbdev.weights import load_weights, torchvision_state

from random_networks import SKIPPING, build, images, random_networks, trained


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
    model = trained(kw | dict(zero_init=False))
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
