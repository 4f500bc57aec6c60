"Our networks compute what torchvision's and timm's compute: logits, gradients, running statistics, predictions."
import pytest
import torch

from conftest import extract_photos, randomised, shared_file
from resnet_nbdev.bench import differences, imagenette_photos, logits_of, operations, stride_accuracy
from resnet_nbdev.resnet import ARCHS, create_resnet, load_weights, resnet50, torchvision_state

models = pytest.importorskip('torchvision.models')
PARAMETERS = dict(resnet18=11_689_512, resnet34=21_797_672, resnet50=25_557_032, resnet101=44_549_160,
                  resnet152=60_192_808)
LARGEST = {torch.float32: 1e-4, torch.float64: 1e-10}


def assert_same(ours, theirs, dtype, size, record):
    "`theirs` has the weights of `ours`, and both do the same with two images, in both modes"
    torch.manual_seed(0)
    x = torch.randn(2, 3, size, size, dtype=dtype)
    for train in (False, True):
        found = differences(ours.to(dtype), theirs.to(dtype), x, train)
        record(f'{size} px, {dtype}, train={train}', found)
        assert max(found.values()) < LARGEST[dtype], found


@pytest.mark.parametrize('name', PARAMETERS)
def test_parameters(name):
    with torch.device('meta'): net = create_resnet(name, 1000)
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize('dtype', LARGEST, ids=str)
@pytest.mark.parametrize('name', PARAMETERS)
def test_torchvision(name, dtype, record_property):
    ours, theirs = randomised(create_resnet(name, 1000)), getattr(models, name)()
    theirs.load_state_dict(torchvision_state(ours), strict=True)
    for size in (224, 160): assert_same(ours, theirs, dtype, size, record_property)


@pytest.mark.parametrize('name', ['wide_resnet50_2', 'wide_resnet101_2', 'resnext50_32x4d', 'resnext101_32x8d',
                                  'resnext101_64x4d'])
def test_torchvision_relatives(name, record_property):
    ours, theirs = randomised(create_resnet(name, 1000)), getattr(models, name)()
    theirs.load_state_dict(torchvision_state(ours), strict=True)
    assert_same(ours, theirs, torch.float32, 96, record_property)


@pytest.mark.parametrize('dtype', LARGEST, ids=str)
@pytest.mark.parametrize('name', ['resnet18d', 'resnet34d', 'resnet50d', 'resnet101d', 'resnet152d'])
def test_timm_resnet_d(name, dtype, record_property):
    timm = pytest.importorskip('timm')
    ours, theirs = randomised(create_resnet(name, 1000)), timm.create_model(name)
    theirs.load_state_dict(torchvision_state(ours), strict=True)
    for size in (224, 160): assert_same(ours, theirs, dtype, size, record_property)


@pytest.mark.parametrize('size', [97, 33])
def test_timm_resnet_d_odd_sizes(size, record_property):
    timm = pytest.importorskip('timm')
    ours, theirs = randomised(create_resnet('resnet18d', 1000)), timm.create_model('resnet18d')
    theirs.load_state_dict(torchvision_state(ours), strict=True)
    assert_same(ours, theirs, torch.float64, size, record_property)


@pytest.mark.parametrize('dtype', LARGEST, ids=str)
@pytest.mark.parametrize('name, kw', [('18', {}), ('34', {}), ('18d', dict(stem='deep', shortcut_kind='D'))])
def test_timm_preactivation(name, kw, dtype, record_property):
    timm = pytest.importorskip('timm')
    theirs = randomised(timm.create_model(f'resnetv2_{name}'))
    ours = load_weights(create_resnet(f'preact_resnet{name[:2]}', 1000, **kw), theirs.state_dict(), strict=True)
    for size in (224, 160): assert_same(ours, theirs, dtype, size, record_property)


@pytest.mark.parametrize('kw', [dict(stride_on='1x1'), dict(block='PlainBlock'), dict(shortcut_kind='A')])
def test_the_comparison_sees(kw):
    "Changes that leave the remaining weights loadable: each is far above the tolerance"
    name = 'resnet50' if 'stride_on' in kw else 'resnet18'
    ours, theirs = randomised(create_resnet(name, 1000, **kw)), getattr(models, name)()
    theirs.load_state_dict(torchvision_state(ours), strict=False)
    torch.manual_seed(0)
    with torch.no_grad(): a, b = (m.eval()(torch.randn(2, 3, 96, 96)) for m in (ours, theirs))
    assert (a - b).abs().max() > 1e-2


@pytest.mark.parametrize('name', PARAMETERS)
def test_same_operations(name):
    "Torch is asked for the same work, so the networks are equally fast on any machine"
    x = torch.randn(2, 3, 64, 64)
    assert operations(ARCHS[name](), x) == operations(getattr(models, name)(), x)


@pytest.fixture(scope='module')
def weights(): return shared_file('resnet50-v1-imagenet-fp16.safetensors')


@pytest.fixture(scope='module')
def two_hundred(tmp_path_factory): return extract_photos(tmp_path_factory.mktemp('photos'), val=20)


def test_real_weights(weights, two_hundred, record_property):
    "Photo for photo what torchvision's ResNet-50 says with its strides moved to the first 1x1 convolution"
    theirs = models.resnet50()
    for stage in (theirs.layer2, theirs.layer3, theirs.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    ours = resnet50(weights=weights, stride_on='1x1')
    theirs.load_state_dict(torchvision_state(ours), strict=True)
    x, y = imagenette_photos(two_hundred)
    a, b = logits_of(ours, x), logits_of(theirs, x)
    record_property('logits', (a - b).abs().max().item())
    assert torch.equal(a.argsort(stable=True), b.argsort(stable=True))
    top = a.topk(5).indices == y[:, None]
    assert (len(y), top[:, 0].sum().item(), top.any(1).sum().item()) == (200, 125, 172)  # top-1 0.625, top-5 0.860


def test_real_weights_with_strides_of_version_15(weights, two_hundred, record_property):
    found = stride_accuracy(weights, two_hundred)
    record_property('accuracy', found.to_dict())
    assert found.top1['1x1'] == .625 and found.top1['3x3'] < .56
