"""What a computer can do is used, and what it cannot is refused."""
import pytest
import torch
from fastai.vision.all import MixedPrecision
from resnet_nbdev.cli import resnet_fine_tune
from resnet_nbdev.devices import pick_precision

from conftest import refuses
from toys import learner


def test_precision_on_a_cpu():
    assert pick_precision('auto', 'cpu') == pick_precision('fp32', 'cpu') == 'fp32'
    assert not [o for o in learner(precision='auto').cbs if isinstance(o, MixedPrecision)]
    for o in ('bf16', 'fp16'): refuses(f'{o} needs a GPU', learner, precision=o)
    refuses("unknown precision 'fp8'", learner, precision='fp8')


@pytest.mark.parametrize('has', [True, False])
def test_precision_on_a_gpu(has, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda *_, **kw: has)
    assert pick_precision('auto', 'cuda') == ('bf16' if has else 'fp16')
    assert pick_precision('fp16', 'cuda:0') == 'fp16'
    if not has: refuses('no bf16', pick_precision, 'bf16', 'cuda')


@pytest.mark.parametrize('device', ['toaster', 'cuda:99', 'xpu', 'hpu', 'mps:x'])
def test_unknown_device(device, tmp_path):
    refuses(f'the device {device!r} is not there', resnet_fine_tune, 'digits', device=device, runs=str(tmp_path/'runs'))


def test_unknown_device_by_command(refused_here):
    refused_here('resnet_fine_tune', 'digits', '--device', 'toaster', says=["the device 'toaster' is not there"])
