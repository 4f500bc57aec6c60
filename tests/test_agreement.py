"""Our networks compute what torchvision's and timm's compute: logits, gradients, running statistics, predictions."""
import pytest
import timm
import torch
from resnet_nbdev.agreement import (
    compare_networks,
    imagenette_photos,
    logits_of,
    operations,
    stride_logits,
    top_accuracy,
)
from resnet_nbdev.resnet import ARCHS, create_resnet, resnet50
from resnet_nbdev.weights import load_weights, torchvision_state
from torchvision import models

from conftest import extract_photos, randomised, shared_file
from test_resnet import PARAMETERS


def deep_are_slow(names): # as they take most of the time
    return [pytest.param(o, marks=pytest.mark.slow) if '101' in o or '152' in o else o for o in names]


DEPTHS = deep_are_slow(PARAMETERS)
LARGEST = {torch.float32: 1e-4, torch.float64: 1e-10}


def assert_same(ours, theirs, dtype, size, record):
    "`theirs` has the weights of `ours`, and both do the same with two images, in both modes"
    torch.manual_seed(0)
    x = torch.randn(2, 3, size, size, dtype=dtype)
    for train in (False, True):
        found = compare_networks(ours.to(dtype), theirs.to(dtype), x, train)
        record(f'{size} px, {dtype}, train={train}', found)
        assert all(v < LARGEST[dtype] for v in found.values()), found  # not max, which can pass over NaN


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


@pytest.mark.parametrize('dtype', LARGEST, ids=str)
@pytest.mark.parametrize('name', DEPTHS)
def test_torchvision(name, dtype, record_property):
    ours, theirs = randomised(create_resnet(name, 1000)), getattr(models, name)()
    theirs.load_state_dict(torchvision_state(ours), strict=True)
    for size in (224, 160): assert_same(ours, theirs, dtype, size, record_property)


@pytest.mark.parametrize('name', deep_are_slow(['wide_resnet50_2', 'wide_resnet101_2', 'resnext50_32x4d',
                                                'resnext101_32x8d', 'resnext101_64x4d']))
def test_torchvision_relatives(name, record_property):
    ours, theirs = randomised(create_resnet(name, 1000)), getattr(models, name)()
    theirs.load_state_dict(torchvision_state(ours), strict=True)
    assert_same(ours, theirs, torch.float32, 96, record_property)


@pytest.mark.parametrize('dtype', LARGEST, ids=str)
@pytest.mark.parametrize('name', deep_are_slow(f'{o}d' for o in PARAMETERS))
def test_timm_resnet_d(name, dtype, record_property):
    ours, theirs = randomised(create_resnet(name, 1000)), timm.create_model(name)
    theirs.load_state_dict(torchvision_state(ours), strict=True)
    for size in (224, 160): assert_same(ours, theirs, dtype, size, record_property)


@pytest.mark.parametrize('size', [97, 33])
def test_timm_resnet_d_odd_sizes(size, record_property):
    ours, theirs = randomised(create_resnet('resnet18d', 1000)), timm.create_model('resnet18d')
    theirs.load_state_dict(torchvision_state(ours), strict=True)
    assert_same(ours, theirs, torch.float64, size, record_property)


@pytest.mark.parametrize('dtype', LARGEST, ids=str)
@pytest.mark.parametrize('name, kw', [('18', {}), ('34', {}), ('18d', dict(stem='deep', shortcut_kind='D'))])
def test_timm_preactivation(name, kw, dtype, record_property):
    theirs = randomised(timm.create_model(f'resnetv2_{name}'))
    ours = load_weights(create_resnet(f'preact_resnet{name[:2]}', 1000, **kw), theirs.state_dict(), strict=True)
    for size in (224, 160): assert_same(ours, theirs, dtype, size, record_property)


@pytest.mark.parametrize('kw', [dict(stride_on='1x1'), dict(block='PlainBlock'), dict(shortcut_kind='A')])
def test_the_comparison_sees(kw):
    "Changes that leave the remaining weights loadable: each is far above the tolerance"
    name = 'resnet50' if 'stride_on' in kw else 'resnet18'
    ours, theirs = randomised(create_resnet(name, 1000, **kw)), getattr(models, name)()
    theirs.load_state_dict(torchvision_state(ours), strict=False)
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad(): a, b = (m.eval()(x) for m in (ours, theirs))
    assert (a - b).abs().max() > 1e-2


@pytest.mark.parametrize('name', DEPTHS)
def test_there_and_back(name):
    "Through torchvision's network, bit for bit"
    ours, theirs = randomised(create_resnet(name, 1000)), getattr(models, name)()
    theirs.load_state_dict(torchvision_state(ours), strict=True)
    back = load_weights(create_resnet(name, 1000), theirs.state_dict(), strict=True).state_dict()
    assert list(back) == list(ours.state_dict())
    for k, v in ours.state_dict().items(): assert back[k].dtype == v.dtype and torch.equal(back[k], v), k


@pytest.mark.parametrize('name', DEPTHS)
def test_same_operations(name):
    "Torch is asked for the same work, so the networks are equally fast on any machine"
    x = torch.randn(2, 3, 64, 64)
    assert operations(ARCHS[name](), x) == operations(getattr(models, name)(), x)


@pytest.mark.slow
def test_real_weights(tmp_path, record_property):
    "Photo for photo what torchvision's ResNet-50 says with its strides moved to the first 1x1 convolution"
    weights, folder = shared_file('resnet50-v1-imagenet-fp16.safetensors'), extract_photos(tmp_path, val=20)
    theirs = models.resnet50()
    for stage in (theirs.layer2, theirs.layer3, theirs.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    theirs.load_state_dict(torchvision_state(resnet50(weights=weights, stride_on='1x1')), strict=True)
    x, y = imagenette_photos(folder)
    a, b = stride_logits(weights, x), logits_of(theirs, x)
    record_property('logits', (a['1x1'] - b).abs().max().item())
    assert torch.equal(a['1x1'].argsort(stable=True), b.argsort(stable=True))
    found = {k: top_accuracy(o, y) for k, o in a.items()}
    record_property('accuracy', found)
    assert len(y) == 200 and found['1x1'] == dict(top1=.625, top5=.86)
    assert found['3x3']['top1'] < .56 and found['3x3']['top5'] < .81
