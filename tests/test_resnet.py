"""The family by name: its sizes, and what it costs to import it."""
import subprocess
import sys

import pytest
import torch
from resnet_nbdev.resnet import create_resnet

from conftest import environment

PARAMETERS = dict(resnet18=11_689_512, resnet34=21_797_672, resnet50=25_557_032, resnet101=44_549_160,
                  resnet152=60_192_808)


@pytest.mark.parametrize('name', PARAMETERS)
def test_parameters(name):
    with torch.device('meta'): net = create_resnet(name, 1000)
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]


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
