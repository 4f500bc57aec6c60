"""Photos of noise in three splits, and learners for them."""
import numpy as np
import pytest
import torch
from PIL import Image
from resnet_nbdev.blocks import BottleneckBlock, ResBlock
from resnet_nbdev.data import get_data
from resnet_nbdev.learner import resnet_learner
from resnet_nbdev.resident import resident_data
from resnet_nbdev.resnet import cifar_resnet
from torch import nn

from conftest import make_folder, randomised

WNIDS = 'n01440764', 'n02102040', 'n03394916'  # tench, English_springer, French_horn: in another order by name
LOADERS = dict(stock=lambda data, bs: get_data(data, 24, 16, bs, num_workers=0, device='cpu'),
               resident=lambda data, bs: resident_data(data, 16, bs, presize=24, device='cpu'))


@pytest.fixture(scope='module')
def three(tmp_path_factory):
    "Photos of noise in three splits, of classes whose folders and names have different orders"
    path = make_folder(tmp_path_factory.mktemp('three')/'photos', WNIDS, train=6, val=4)
    more = make_folder(tmp_path_factory.mktemp('more')/'photos', WNIDS, train=5, val=1)
    (more/'train').rename(path/'test')
    for o in (path/'test').rglob('*.png'):  # other pixels than those of the training images
        Image.fromarray(255 - np.asarray(Image.open(o))).save(o)
    return path


@pytest.fixture(scope='module')
def hundred(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp('hundred')/'photos', [f'class {i:03}' for i in range(100)], 2, 2)


def learner(data, kind='stock', bs=4, block=ResBlock):
    torch.manual_seed(0)
    dls = LOADERS[kind](data, bs)
    model = randomised(cifar_resnet(8 if block is not BottleneckBlock else 11, len(dls.vocab), block))
    nn.init.normal_(model.head.fc.weight)  # so that the answers differ
    return resnet_learner(dls, model)


@pytest.fixture(scope='module')
def learn(three): return learner(three)
