"""Small networks, loaders and runs, and what moves in them."""
import json
from functools import partial

import matplotlib.pyplot as plt
import pytest
import torch
from fastai.vision.all import Callback, DataLoader, DataLoaders, set_seed
from resnet_nbdev.data import get_data
from resnet_nbdev.learner import resnet_learner
from resnet_nbdev.networks import custom_resnet
from resnet_nbdev.plans import PLANS
from resnet_nbdev.resnet import ARCHS, create_resnet
from resnet_nbdev.training import fine_tune
from safetensors.torch import save_file
from torch import nn

from conftest import make_folder

STAGES = ['layer1', 'layer2', 'layer3', 'layer4']
GROUPS = ['stem', *STAGES, 'head']
TINY = dict(tiny=dict(), tiny_bottleneck=dict(block='BottleneckBlock'))  # four stages, and quick


@pytest.fixture
def tiny(monkeypatch):
    for k, v in TINY.items():
        monkeypatch.setitem(ARCHS, k, partial(custom_resnet, [1, 1, 1, 1], [8, 8, 16, 16], **v))


def toy(n=24, size=32, classes=4, bs=8, shuffle=True, valid=8):
    "Batches of random images, the same at each call"
    x = torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))
    data = list(zip(x, torch.arange(n) % classes))
    loader = partial(DataLoader, bs=bs, num_workers=0)
    dls = DataLoaders(loader(data, shuffle=shuffle), loader(data[:valid]), device='cpu')
    dls.vocab = list('abcdefgh')[:classes]
    return dls


def learner(arch='cifar_resnet8', dls=None, seed=0, **kw):
    set_seed(seed)
    return quietly(resnet_learner(toy(size=16) if dls is None else dls, arch, **kw))


def quietly(learn):
    learn.remove_cbs([o for o in learn.cbs if o.name == 'progress'])
    learn.logger = lambda *_: None
    return learn


def copied(model): return {k: v.clone() for k, v in model.state_dict().items()}


def changed(before, model): return {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}


def same(one, two): return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def group_of(name):
    part = name.split('.')[1]
    return 'head' if name.startswith('head.') else part if part in STAGES else 'stem'


def batch_norm(model):
    return {f'{n}.{k}' for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) for k in m.state_dict()}


def weights_of(arch, path, classes=4):
    "A file with weights of a network, with statistics as after a training"
    set_seed(3)
    model = create_resnet(arch, classes)
    with torch.no_grad():
        for k, v in model.state_dict().items():
            if 'running' in k: v.uniform_(0.5, 1.5)
    save_file({k.removeprefix('body.').removeprefix('head.'): v for k, v in model.state_dict().items()}, path)
    return model.eval()


def no_download(*args): raise AssertionError('a download of 1.6 GB began')


SMALL = dict(presize=16, resize=16, bs=4, num_workers=0, device='cpu')


class Kept(Callback):
    "The weights at the end of each epoch"
    def __init__(self): self.states = []
    def after_train(self): self.states.append(copied(self.model))


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    "Three small runs: {name: learner}, with the weights of each epoch as `.kept.states`"
    tmp = tmp_path_factory.mktemp('trained')
    folder, made = make_folder(tmp/'pets', ('ant', 'bee', 'cat'), 6, 4), {}
    options = dict(mean=(dict(plan='discriminative'), dict(average=2, lr_mult=10)), ema=(dict(ema=0.8), dict()),
                   head=(dict(plan=PLANS['cut'].but(cut=2, hidden=5, dropout=0.3)), dict(schedule='flat_cos')))
    for seed, (name, (build, train)) in enumerate(options.items()):
        set_seed(seed)
        learn = quietly(resnet_learner(get_data(folder, **SMALL), 'cifar_resnet8', cbs=Kept(), **build))
        made[name] = fine_tune(learn, name, 1, 2, 1e-2, runs=tmp/'runs', arguments=dict(seed=seed), **train)
        plt.close('all')
    return made


@pytest.fixture
def images(trained): return sorted((trained['mean'].run_path.parent.parent/'pets'/'val').glob('*/*.png'))


def config_of(learn): return json.loads((learn.run_path/'config.json').read_text())


def named(state): return {k.removeprefix('body.').removeprefix('head.'): v for k, v in state.items()}
