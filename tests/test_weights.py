"""What load_weights takes and what it refuses: files of every kind and every kind of damage, and published weights."""
import functools
import hashlib
import io
import os
import pickle
import random
import re
import socket
import subprocess
from collections import OrderedDict
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from resnet_nbdev import weights
from resnet_nbdev.core import InputError
from resnet_nbdev.networks import custom_resnet
from resnet_nbdev.resnet import ARCHS, BottleneckBlock, cifar_resnet, create_resnet, resnet18, resnet50
from resnet_nbdev.weights import IMAGENET, IMAGENET_URL, adapt_conv1, imagenet_name, load_weights, torchvision_state
from safetensors.torch import save_file
from timm.models._manipulate import adapt_input_conv
from torchvision import models

from conftest import randomised
from random_networks import images, random_networks, same_tensors, trained

PICKLES = dict(zip=dict(), legacy=dict(_use_new_zipfile_serialization=False))


def net(seed=0, sizes=(1, 1), classes=3, **kw):
    "A small network in eval mode with batch norms as they may be after training"
    torch.manual_seed(seed)
    return randomised(custom_resnet(list(sizes), [4*2**i for i in range(len(sizes))], classes, **kw))


def copied(model): return {k: v.clone() for k, v in torchvision_state(model).items()}


def same(model, state, leave=()):
    "Whether the model holds exactly these tensors, apart from those whose names start with `leave`"
    got = torchvision_state(model)
    return got.keys() == state.keys() and all(torch.equal(got[k], v) for k, v in state.items()
                                              if not k.startswith(tuple(leave)))


def write(path, state, **kw):
    if path.suffix == '.safetensors': save_file({k: v.contiguous() for k, v in state.items()}, path)
    else: torch.save(state, path, **kw)
    return path


def refused(model, source, *says, **kw):
    "One line, without torch's advice to try it with weights_only=False, and not a bit of the model has changed"
    before = copied(model)
    with pytest.raises(InputError) as e: load_weights(model, source, **kw)
    said = str(e.value)
    assert len(said.splitlines()) == 1, said
    assert 'weights_only' not in said
    for o in says: assert str(o) in said, said
    assert same(model, before)
    return said


def logits(model, size=64, channels=3):
    x = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(5))
    with torch.no_grad(): return model.eval()(x)


@pytest.mark.parametrize('kind', [str, Path])
@pytest.mark.parametrize('name', ['a.safetensors', 'a.pth', 'a.pt', 'a.bin', 'a.pth.tar', 'a.b c.pth', 'v1.0.pt',
                                  'v1.0.safetensors', 'a.pth.safetensors'])
def test_takes_a_file(name, kind, tmp_path):
    path, model = write(tmp_path/name, copied(net())), net(1)
    assert load_weights(model, kind(path), strict=True) is model
    assert same(model, copied(net()))


@pytest.mark.parametrize('kw', PICKLES.values(), ids=PICKLES)
def test_takes_both_formats_of_torch(kw, tmp_path):
    model = load_weights(net(1), write(tmp_path/'a.pth', copied(net()), **kw))
    assert same(model, copied(net()))


def test_expands_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    write(tmp_path/'a.pth', copied(net()))
    for source in ('~/a.pth', Path('~/a.pth')): assert same(load_weights(net(1), source), copied(net()))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('suffix', ['.safetensors', '.pth'])
def test_takes_every_precision(suffix, dtype, tmp_path):
    state = copied(net().to(dtype))
    model = load_weights(net(1), write(tmp_path/f'a{suffix}', state))
    assert same(model, {k: v.float() if v.is_floating_point() else v for k, v in state.items()})


def prefixed(prefix): return lambda s: {prefix + k: v for k, v in s.items()}


WRAPPINGS = {
    'state_dict': lambda s: dict(epoch=3, state_dict=s, best=.5), 'model': lambda s: dict(model=s, optimizer={'lr': 1}),
    'module': prefixed('module.'), '_orig_mod': prefixed('_orig_mod.'), 'both': prefixed('module._orig_mod.'),
    # torch.compile(DistributedDataParallel(model))
    'compiled': prefixed('_orig_mod.module.'),
    'wrapped': lambda s: dict(state_dict=prefixed('module.')(s)), 'ordered': OrderedDict}


@pytest.mark.parametrize('wrap', WRAPPINGS.values(), ids=WRAPPINGS)
def test_takes_wrapped_and_prefixed(wrap, tmp_path):
    for state in (torchvision_state(net()), net().state_dict()):  # our own names have body. and head. in front
        for source in (wrap(state), write(tmp_path/'a.pth', wrap(state))):
            assert same(load_weights(net(1), source, strict=True), copied(net()))


def test_takes_a_data_parallel_and_a_compiled_model():
    for model in (torch.nn.DataParallel(net()), torch.compile(net()), torch.compile(torch.nn.DataParallel(net()))):
        assert same(load_weights(net(1), model.state_dict(), strict=True), copied(net()))


@pytest.mark.parametrize('suffix', ['.safetensors', '.pth'])
def test_takes_files_without_counted_batches(suffix, tmp_path):
    state = {k: v for k, v in copied(net()).items() if 'num_batches' not in k}
    model = load_weights(net(1), write(tmp_path/f'a{suffix}', state), strict=True)
    assert same(model, {k: state.get(k, torch.tensor(0)) for k in torchvision_state(model)})


def test_the_source_is_not_changed():
    "Not by loading, not by bridging, and not by the model afterwards"
    source = torchvision_state(net())
    before, keys = copied(net()), list(source)
    model = load_weights(net(1, classes=5, in_channels=1), source)
    for t in torchvision_state(model).values(): t.zero_()
    assert list(source) == keys and all(torch.equal(source[k], v) for k, v in before.items())


def torchvision_networks():
    make = models.resnet.ResNet
    yield models.resnet18(), resnet18()
    yield models.resnext50_32x4d(), create_resnet('resnext50_32x4d', 1000)
    channels = [64, 128, 256, 512]
    for block, name in ((models.resnet.BasicBlock, 'ResBlock'), (models.resnet.Bottleneck, 'BottleneckBlock')):
        yield make(block, [1]*4, num_classes=7), custom_resnet([1]*4, channels, 7, block=name)


def test_torchvision_there_and_back(tmp_path):
    for theirs, ours in torchvision_networks():
        randomised(theirs)
        load_weights(ours, write(tmp_path/'a.pth', theirs.state_dict()), strict=True)
        torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
        want = {k: v.clone() for k, v in theirs.state_dict().items()}
        for t in theirs.state_dict().values(): t.zero_()
        theirs.load_state_dict(torchvision_state(ours), strict=True)
        assert all(torch.equal(v, want[k]) for k, v in theirs.state_dict().items())


TIMM = {'resnet18d': dict(stem='deep', shortcut_kind='D'), 'resnetv2_18': dict(block='PreActBlock'),
        'resnetv2_18d': dict(block='PreActBlock', stem='deep', shortcut_kind='D')}


@pytest.mark.parametrize('name', TIMM)
def test_timm(name, tmp_path):
    theirs = randomised(timm.create_model(name, pretrained=False, num_classes=7))
    state = theirs.state_dict()
    ours = load_weights(resnet18(7, **TIMM[name]), write(tmp_path/'a.safetensors', state), strict=True)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    if 'v2' in name: return
    want = {k: v.clone() for k, v in state.items()}
    for t in state.values(): t.zero_()
    theirs.load_state_dict(torchvision_state(ours), strict=True)
    assert all(torch.equal(v, want[k]) for k, v in theirs.state_dict().items())


def test_another_number_of_classes(tmp_path, capsys):
    for i, (had, needs) in enumerate(((3, 5), (3, 1), (1, 3))):
        path, model = write(tmp_path/f'{i}.pth', copied(net(classes=had))), net(1, classes=needs)
        refused(model, path, path, 'fc.bias', strict=True)
        assert not capsys.readouterr().out
        head = {k: v for k, v in copied(model).items() if k.startswith('fc.')}
        load_weights(model, path)
        said = capsys.readouterr().out
        assert said.count('\n') == 1 and f'{had} classes' in said and f'{needs} in the model' in said
        assert same(model, copied(net(classes=had)) | head)


@pytest.mark.parametrize('kw', [dict(), dict(stem='cifar'), dict(stem='deep'), dict(block='PreActBlock'),
                                dict(stem='deep', block='PreActBlock')], ids=str)
def test_another_number_of_input_channels(kw, tmp_path, capsys):
    first = 'conv1.0.weight' if kw.get('stem') == 'deep' else 'conv1.weight'
    state = copied(net(**kw))
    path = write(tmp_path/'a.pth', state)
    for channels in (1, 2, 4, 5, 6):
        model = net(1, in_channels=channels, **kw)
        refused(model, path, path, first, strict=True)
        assert not capsys.readouterr().out
        load_weights(model, path)
        said = capsys.readouterr().out
        assert said.count('\n') == 1 and '3 input channels' in said and f'{channels} in the model' in said
        repeated = torch.stack([state[first][:, i % 3] for i in range(channels)], 1)*3/channels
        want = state[first].sum(1, keepdim=True) if channels == 1 else repeated
        assert same(model, state, [first])
        torch.testing.assert_close(torchvision_state(model)[first], want)


@pytest.mark.parametrize('channels', [1, 2, 3, 4, 5, 6])
def test_input_channels_as_in_timm(channels):
    weight = torch.randn(8, 3, 7, 7)
    assert torch.equal(adapt_conv1(weight, channels), adapt_input_conv(channels, weight))


@pytest.mark.parametrize('channels', [1, 3, 6])
def test_a_grey_picture_looks_the_same_in_any_number_of_channels(channels):
    grey = torch.randn(2, 1, 32, 32)
    one, other = net(), load_weights(net(1, in_channels=channels), copied(net()))
    with torch.no_grad(): torch.testing.assert_close(one(grey.expand(-1, 3, -1, -1)),
                                                     other(grey.expand(-1, channels, -1, -1)))


def test_double_precision_is_kept_in_the_first_filters():
    source, model = net().double(), net(1, in_channels=1).double()
    with torch.no_grad(): source.body.conv1.weight += 1e-9
    load_weights(model, torchvision_state(source))
    want = source.body.conv1.weight.sum(1, keepdim=True)
    torch.testing.assert_close(model.body.conv1.weight, want, rtol=1e-12, atol=1e-12)


def test_both_bridges_at_once(capsys):
    model = load_weights(net(1, classes=5, in_channels=4), copied(net()))
    assert capsys.readouterr().out.count('\n') == 2
    assert same(model, copied(net(1, classes=5, in_channels=4)) | {k: v for k, v in copied(net()).items()
                                                                  if not k.startswith('fc.')}, ['conv1'])


def test_nothing_is_said_where_nothing_is_bridged_or_loaded(capsys):
    load_weights(net(1), copied(net()))
    state = copied(net(classes=5, in_channels=1))
    state.pop('bn1.bias')
    refused(net(1), state, '1 missing (bn1.bias)')
    assert not capsys.readouterr().out


@pytest.mark.parametrize('name', ['none.pth', 'none.safetensors', 'no', 'no/folder/a.pth', 'folder', 'folder.pth', ''])
def test_refuses_what_is_no_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for o in ('folder', 'folder.pth'): Path(o).mkdir()
    for source in (name, Path(name)): refused(net(), source, 'no weights file', Path(name))


@pytest.mark.parametrize('source', ['~no_such_user_of_this_machine/a.pth', 'a'*5000 + '.pth', 'a\0b.pth'],
                         ids=['user', 'long', 'null'])
def test_refuses_what_cannot_be_a_file(source): refused(net(), source, source[:20])


@pytest.mark.parametrize('name', ['a', 'a.txt', 'a.onnx', 'a.h5', 'a.pkl', 'a.npz', 'pth', 'a.pth.txt'])
def test_refuses_another_suffix(name, tmp_path):
    path = write(tmp_path/name, copied(net()))
    refused(net(1), path, path, '.safetensors or .pth')


@pytest.mark.parametrize('suffix', ['.safetensors', '.pth', '.pt', '.bin', '.pth.tar'])
def test_refuses_what_is_no_weights_file(suffix, tmp_path):
    "Empty, a text, noise, and noise behind what each format begins with"
    path, noise = tmp_path/f'bad{suffix}', random.Random(0)
    heads = b'', b'PK\3\4', b'\x80\2', b'\x80\2}q', (300).to_bytes(8, 'little') + b'{"', b'\xff'*8, b'\0'*8
    contents = [b'', b'no weights\n', b'{}', b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n', b'\0'*1000,
                (2).to_bytes(8, 'little') + b'\xff\xfe', (2).to_bytes(8, 'little') + b'[]',
                *(o + noise.randbytes(n) for o in heads for n in (1, 10, 1000, 20_000))]
    model = net()
    for content in contents:
        path.write_bytes(content)
        refused(model, path, path)


@pytest.mark.parametrize('kind', ['safetensors', *PICKLES])
def test_refuses_truncated_files(kind, tmp_path):
    path = tmp_path/('a.safetensors' if kind == 'safetensors' else 'a.pth')
    content = write(path, copied(net()), **PICKLES.get(kind, {})).read_bytes()
    n, model = len(content), net(1)
    cuts = {*range(0, n, n//40), 1, 4, 7, 8, 9, 100, n - 1, n - 2, n - 21, n - 22, n - 23, n - 100}
    if kind == 'safetensors':
        header = 8 + int.from_bytes(content[:8], 'little')
        cuts |= {header//2, header - 1, header, header + 1, header + (n - header)//2}
    for cut in sorted(cuts):
        path.write_bytes(content[:cut])
        refused(model, path, path)


def test_refuses_renamed_files(tmp_path):
    for right, wrong in (('a.pth', 'b.safetensors'), ('c.safetensors', 'd.pth'), ('e.safetensors', 'f.pth.tar')):
        path = write(tmp_path/right, copied(net())).rename(tmp_path/wrong)
        refused(net(1), path, path, 'is not a readable')


class Code:
    def __init__(self, f, *args): self.call = f, args
    def __reduce__(self): return self.call


CODE = dict(system=lambda marker: Code(os.system, f'touch {marker}'), mkdir=lambda marker: Code(os.mkdir, str(marker)),
            call=lambda marker: Code(subprocess.call, ['touch', str(marker)]),
            popen=lambda marker: Code(subprocess.Popen, ['touch', str(marker)]),
            eval=lambda marker: Code(eval, f'open({str(marker)!r}, "w")'),
            exec=lambda marker: Code(exec, f'open({str(marker)!r}, "w")'),
            open=lambda marker: Code(io.open, str(marker), 'w'), touch=lambda marker: Code(Path.touch, marker),
            partial=lambda marker: Code(functools.partial(os.mkdir, str(marker))),
            torch=lambda marker: Code(torch.save, {}, str(marker)))


@pytest.mark.parametrize('kw', [*PICKLES.values(), dict(pickle_protocol=4), None], ids=[*PICKLES, 'four', 'pickle'])
@pytest.mark.parametrize('name', CODE)
def test_refuses_code(name, kw, tmp_path):
    marker = tmp_path/'marker'
    code = CODE[name](marker)
    for i, content in enumerate((code, copied(net()) | {'fc.bias': code}, dict(state_dict=code), [code])):
        for suffix in ('.pth', '.safetensors'):
            path = tmp_path/f'{i}{suffix}'
            with path.open('wb') as f: pickle.dump(content, f) if kw is None else torch.save(content, f, **kw)
            said = refused(net(1), path, path)
            if suffix == '.pth' and kw in PICKLES.values():
                assert re.search(r'is refused: it asks for \S+, which is code', said), said
            assert not marker.exists()


def test_the_code_would_run(tmp_path):
    "Or the test above would show nothing"
    for name, code in CODE.items():
        content = pickle.dumps(code(tmp_path/name))
        out = pickle.loads(content)
        if isinstance(out, subprocess.Popen): out.wait(20)
        assert (tmp_path/name).exists(), name


@pytest.mark.parametrize('kw', PICKLES.values(), ids=PICKLES)
def test_refuses_a_pickled_model(kw, tmp_path):
    model = net()
    for content in (model, dict(model=model), dict(state_dict=model.state_dict(), net=model)):
        path = write(tmp_path/'a.pth', content, **kw)
        refused(net(1), path, path, 'it asks for ', 'which is code')


NO_WEIGHTS = dict(list=[1], tensor=torch.zeros(3), int=5, none=None, text='weights', tuple=(), set={1}, float=.5)


@pytest.mark.parametrize('name', NO_WEIGHTS)
def test_refuses_files_that_hold_no_mapping(name, tmp_path):
    content = NO_WEIGHTS[name]
    refused(net(), write(tmp_path/'a.pth', content), f'and not {type(content).__name__}')
    for o in ('state_dict', 'model'): refused(net(), write(tmp_path/'a.pth', {o: content}))


@pytest.mark.parametrize('entry', [{'epoch': 3}, {'lr': .5}, {'fc.bias': None}, {'fc.bias': [0., 0., 0.]}, {'args': {}},
                                   {'fc.bias': 'zero'}, {5: torch.zeros(3)}, {('fc', 'bias'): torch.zeros(3)},
                                   {None: torch.zeros(3)}, {torch.zeros(30, 3): torch.zeros(3)}], ids=range(10))
def test_refuses_other_entries(entry, tmp_path):
    name = next(iter(entry))
    says = '' if isinstance(name, torch.Tensor) else repr(name)
    for source in (copied(net()) | entry, write(tmp_path/'a.pth', copied(net()) | entry)):
        refused(net(1), source, 'a mapping of names to tensors', says)


def test_refuses_an_empty_mapping(tmp_path):
    for source in ({}, write(tmp_path/'a.pth', {}), write(tmp_path/'a.safetensors', {}), dict(state_dict={})):
        refused(net(), source, 'missing')


OTHERS = [('resnet34', {}, 'resnet18', {}), ('resnet18', {}, 'resnet34', {}), ('resnet50', {}, 'resnet34', {}),
          ('resnet34', {}, 'resnet50', {}), ('resnet101', {}, 'resnet50', {}), ('wide_resnet50_2', {}, 'resnet50', {}),
          ('resnext50_32x4d', {}, 'resnet50', {}), ('resnet18d', {}, 'resnet18', {}), ('resnet18', {}, 'resnet18d', {}),
          ('preact_resnet18', {}, 'resnet18', {}), ('resnet18', {}, 'preact_resnet18', {}),
          ('resnet18', dict(stem='deep'), 'resnet18', {}), ('resnet18', {}, 'resnet18', dict(stem='cifar')),
          ('resnet18', {}, 'resnet18', dict(shortcut_kind='A')), ('resnet18', {}, 'resnet18', dict(shortcut_kind='D')),
          ('resnet18', {}, 'resnet18', dict(ks=5)), ('resnet18', {}, 'resnet18', dict(block='PlainBlock')),
          ('cifar_resnet20', {}, 'cifar_resnet8', {}), ('cifar_resnet8', {}, 'cifar_resnet20', {})]


@pytest.mark.parametrize('name, options, into, others', OTHERS, ids=lambda o: o if isinstance(o, str) else '+'.join(o))
def test_refuses_another_architecture(name, options, into, others):
    "Whether the classes are as many or not"
    for classes in (10, 7):
        with torch.device('meta'): shapes = torchvision_state(create_resnet(name, classes, **options))
        state = {k: torch.zeros((), dtype=v.dtype).expand(v.shape) for k, v in shapes.items()}
        said = refused(create_resnet(into, 10, **others), state, 'the weights of another network')
        assert len(said) < 600


def test_another_architecture_from_a_file(tmp_path):
    for suffix in ('.pth', '.safetensors'):
        path = write(tmp_path/f'a{suffix}', copied(net(sizes=(1, 2))))
        refused(net(), path, path, '12 unexpected (layer2.1.bn1.bias, ')


def test_a_mismatch_names_a_few_of_each_kind():
    state = copied(net(1, sizes=(2, 2, 2), block=BottleneckBlock))
    names = [k for k in state if k.endswith('.weight') and 'layer' in k]
    missing, reshaped, extra = names[:5], names[5:11], [f'layer9.{i}.conv1.weight' for i in range(7)]
    for k in missing: del state[k]
    for k in reshaped: state[k] = torch.zeros(3, 5, 7, 9)
    state |= {k: torch.zeros(1) for k in extra}
    model = net(sizes=(2, 2, 2), block=BottleneckBlock)
    said = refused(model, state, '5 missing', '7 unexpected', '6 of another shape')
    for names in (missing, reshaped, extra): assert sum(bool(re.search(rf'{re.escape(k)}\b', said)) for k in names) == 3
    assert len(said) < 600


def test_refuses_two_tensors_for_one_place():
    for prefix in ('module.', 'body.'):
        refused(net(1), copied(net()) | {f'{prefix}conv1.weight': torch.zeros(4, 3, 7, 7)}, 'conv1.weight', 'twice')


def test_a_mismatch_is_one_line_for_any_name():
    refused(net(), copied(net()) | {'two\nlines': torch.zeros(1)}, '1 unexpected')


@pytest.mark.parametrize('channels', [3, 1, 4])
@pytest.mark.parametrize('key', ['conv1.weight', 'layer2.0.bn1.running_var', 'fc.weight'])
@pytest.mark.parametrize('change', ['int', 'long', 'bool', 'cfloat', 'to_sparse', 'meta'])
def test_refuses_other_tensors(change, key, channels, tmp_path):
    "Also where the first filters have to be adapted first"
    state = copied(net())
    state[key] = state[key].to('meta') if change == 'meta' else getattr(state[key], change)()
    path = write(tmp_path/'a.pth', state)
    for source in (state, path): refused(net(1, in_channels=channels), source, key)


def test_refuses_other_layouts():
    state = copied(net())
    weight = state['fc.weight']
    for o in (weight.to_sparse_csr(), weight.to_sparse_csc(), weight[..., None, None].to_sparse()):
        refused(net(1), state | {'fc.weight': o}, 'fc.weight')


@pytest.mark.parametrize('source', [5, .5, b'a.pth', ['a.pth'], torch.zeros(3), True, io.BytesIO(), net()],
                         ids=lambda o: type(o).__name__)
def test_refuses_other_kinds_of_source(source):
    refused(net(), source, type(source).__name__)
    with pytest.raises(InputError, match=type(source).__name__): resnet18(3, weights=source)


def test_none_is_no_source():
    "But means new weights where a network is made"
    refused(net(), None, 'NoneType')
    assert resnet18(3, weights=None).head.fc.out_features == 3


class Pages(dict):
    "Pages that know what was asked for"
    def __init__(self): self.asked = []

    def get(self, path):
        self.asked.append(path)
        return super().get(path)


@pytest.fixture(scope='module')
def published():
    "A ResNet-18's weights and its file, and the first digits of its hash"
    torch.manual_seed(0)
    state, f = copied(randomised(resnet18())), io.BytesIO()
    torch.save(state, f)
    return state, f.getvalue(), hashlib.sha256(f.getvalue()).hexdigest()[:8]


@pytest.fixture
def cache(tmp_path):
    before = torch.hub.get_dir()
    torch.hub.set_dir(tmp_path/'hub')
    yield tmp_path/'hub'/'checkpoints'
    torch.hub.set_dir(before)


@pytest.fixture
def page(published, web, cache, monkeypatch):
    "The path at which the weights are published"
    _, content, digest = published
    monkeypatch.setattr(weights, 'IMAGENET', IMAGENET | dict(resnet18=digest))
    monkeypatch.setattr(weights, 'IMAGENET_URL', web.url + '{}-{}.pth')
    web.pages, name = Pages(), f'resnet18-{digest}.pth'
    web.pages[name] = content
    return name


def test_imagenet_is_downloaded_once(published, web, page, cache, capsys):
    for _ in range(2):
        assert same(resnet18(weights='imagenet'), published[0])
        assert web.pages.asked == [page] and [o.name for o in cache.iterdir()] == [page]
    web.shutdown()
    web.server_close()
    assert same(load_weights(resnet18(), 'imagenet', strict=True), published[0])
    assert not capsys.readouterr().out


@pytest.mark.parametrize('damage', [lambda o: b'', lambda o: o[:len(o)//2], lambda o: o[:9999] + b'?' + o[10_000:]],
                         ids=['empty', 'half', 'byte'])
def test_imagenet_is_fetched_again_if_the_file_is_damaged(damage, published, web, page, cache):
    cache.mkdir(parents=True)
    (cache/page).write_bytes(damage(published[1]))
    assert same(resnet18(weights='imagenet'), published[0])
    assert web.pages.asked == [page] and [o.name for o in cache.iterdir()] == [page]
    assert (cache/page).read_bytes() == published[1]


def test_imagenet_with_another_head(published, page, capsys):
    state = published[0]
    for channels in (3, 1):
        model = resnet18(10, in_channels=channels)
        head = {k: v for k, v in copied(model).items() if k.startswith('fc.')}
        load_weights(model, 'imagenet')
        assert same(model, state | head, ['conv1'])
        conv1 = state['conv1.weight']
        torch.testing.assert_close(model.body.conv1.weight.detach(), conv1 if channels == 3 else conv1.sum(1, True))
        assert capsys.readouterr().out.count('\n') == (1 if channels == 3 else 2)
        refused(model, 'imagenet', page, strict=True)


@pytest.mark.parametrize('fault', ['hash', 'missing', 'cut', 'empty', 'no server', 'cut cache'])
def test_imagenet_that_cannot_be_fetched(fault, published, web, page, cache, monkeypatch):
    content = published[1]
    if fault == 'hash': web.pages[page] = content[:-1]
    if fault == 'missing': del web.pages[page]
    if fault.startswith('cut'): web.pages[page] = content[:10_000], len(content)
    if fault == 'empty': web.pages[page] = b''
    if fault == 'no server':
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            monkeypatch.setattr(weights, 'IMAGENET_URL', f'http://127.0.0.1:{s.getsockname()[1]}/{{}}-{{}}.pth')
    if fault == 'cut cache':
        cache.mkdir(parents=True)
        (cache/page).write_bytes(content[:10_000])
    refused(resnet18(), 'imagenet', weights.IMAGENET_URL.split('{')[0] + page, 'could not be fetched')
    left = list(cache.iterdir()) if cache.exists() else []
    assert left == ([cache/page] if fault == 'cut cache' else [])


def test_imagenet_where_the_cache_is_no_folder(page, cache):
    cache.parent.mkdir()
    cache.touch()
    refused(resnet18(), 'imagenet', page, 'could not be fetched')


@pytest.mark.parametrize('make', [
    lambda: cifar_resnet(8), lambda: resnet50(10, stride_on='1x1'), lambda: create_resnet('preact_resnet18', 10),
    lambda: create_resnet('resnet18d', 10), lambda: resnet18(10, stem='cifar'),
    lambda: resnet18(10, block='PlainBlock'), lambda: resnet18(10, shortcut_kind='A'), net], ids=range(8))
def test_networks_without_published_weights(make, web, page, cache):
    refused(make(), 'imagenet', 'none of those with published ImageNet weights', 'resnet18')
    assert not web.pages.asked and not cache.exists()


@pytest.mark.parametrize('name', IMAGENET)
def test_published_weights_are_those_of_torchvision(name):
    assert IMAGENET_URL.format(name, IMAGENET[name]) == models.get_model_weights(name).IMAGENET1K_V1.url


def test_published_names():
    "Of any number of classes and channels"
    assert len(IMAGENET) == 10
    for name in IMAGENET:
        with torch.device('meta'): model = ARCHS[name](classes=10, in_channels=1, zero_init=True)
        assert imagenet_name(model) == name


# networks of every kind

@random_networks(6)
def test_round_trip_of_the_weights(kw, size):
    one, other, x = trained(kw, 0), trained(kw, 1), images(kw, size)
    state = torchvision_state(one)
    assert load_weights(other, state, strict=True) is other
    same_tensors(other.state_dict(), one.state_dict())
    with torch.no_grad(): assert torch.equal(one(x), other(x))
    assert all(t.data_ptr() == u.data_ptr() for t, u in zip(state.values(), one.state_dict().values()))


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
