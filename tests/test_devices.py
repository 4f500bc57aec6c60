"""What a computer can do is used, and what it cannot is refused."""
from pathlib import Path

import pytest
import torch
from fastai.vision.all import Callback, DataLoader
from resnet_nbdev import devices
from resnet_nbdev.cli import resnet_fine_tune
from resnet_nbdev.devices import has_bf16, pick_precision, prefers_channels_last

from conftest import refuses
from toys import changed, copied, learner


@pytest.fixture
def computer(monkeypatch):
    "A computer that has bf16 or not, and computes all layers right or not"
    def pretend(has, wrong=()):
        monkeypatch.setattr(devices, 'has_bf16', lambda _: has)
        monkeypatch.setattr(devices, 'wrong_layers', lambda: wrong)
    return pretend


@pytest.mark.parametrize('has, wrong, auto', [(True, (), 'bf16'), (False, (), 'fp32'), (True, ('conv 3x3',), 'fp32')])
def test_precision_on_a_cpu(has, wrong, auto, computer):
    computer(has, wrong)
    assert pick_precision('auto', 'cpu') == auto and pick_precision('fp32', 'cpu') == 'fp32'
    made = learner(precision='auto')
    assert [o.name for o in made.cbs if 'precision' in o.name] == ['cpu_mixed_precision']*(auto == 'bf16')
    assert (made.options['precision'], made.options['channels_last']) == (auto, prefers_channels_last(auto, 'cpu'))
    refuses('fp16 needs a GPU', learner, precision='fp16')
    refuses("unknown precision 'fp8'", learner, precision='fp8')


def test_nothing_is_chosen_for_a_learner_unasked():
    made = learner()
    assert (made.options['precision'], made.options['channels_last']) == ('fp32', False)


def test_slow_bf16_is_said_and_wrong_bf16_refused(computer):
    computer(False)
    with pytest.warns(UserWarning, match='no instructions for bf16'): assert pick_precision('bf16', 'cpu') == 'bf16'
    computer(True, ('conv 3x3', 'linear'))
    refuses('computes conv 3x3, linear wrongly', learner, precision='bf16')
    refuses('bf16 needs a processor or an Nvidia GPU', pick_precision, 'bf16', 'meta')


@pytest.mark.parametrize('has', [True, False])
def test_precision_on_a_gpu(has, computer):
    computer(has)
    assert pick_precision('auto', 'cuda') == ('bf16' if has else 'fp16')
    assert pick_precision('fp16', 'cuda:0') == 'fp16'
    if not has: refuses('no bf16', pick_precision, 'bf16', 'cuda')


@pytest.mark.parametrize('words, has', [('flags: avx2 avx512_bf16', True), ('Features: asimd bf16', True),
                                        ('flags: avx2 avx512f', False)])
def test_an_older_torch_asks_linux(words, has, monkeypatch):
    monkeypatch.delattr(torch.cpu, 'get_capabilities', raising=False)
    monkeypatch.setattr(Path, 'read_text', lambda _: words)
    assert has_bf16('cpu') == has
    monkeypatch.setattr(Path, 'read_text', lambda _: open('/no/such/file'))
    assert not has_bf16('cpu')


def test_comparing_layers_draws_no_random_number():
    torch.manual_seed(3)
    want = torch.rand(3)
    torch.manual_seed(3)
    devices.wrong_layers.__wrapped__()
    assert torch.equal(torch.rand(3), want)


class Dtypes(Callback):
    order = 20
    def before_fit(self):
        self.seen = []
        self.hook = self.model.body.layer1.register_forward_hook(lambda m, i, o: self.seen.append(o.dtype))
    def after_fit(self): self.hook.remove()
    def after_pred(self): self.outside = self.pred.dtype


def test_bf16_from_the_first_layer_to_the_loss():
    "In training, in validation and in predictions without labels; afterwards autocast is off"
    made, watch = learner(precision='bf16', channels_last=True), Dtypes()
    before = copied(made.model)
    with made.added_cbs(watch):
        made.fit(1, 1e-2)
        assert {*watch.seen} == {torch.bfloat16} and not torch.is_autocast_enabled('cpu')
        assert changed(before, made.model) and all(o.dtype == torch.float32 for o in made.model.parameters())
        probs, _ = made.get_preds(dl=DataLoader([(o,) for o, _ in made.dls.valid.dataset], bs=4))
        assert {*watch.seen} == {torch.bfloat16} and not torch.is_autocast_enabled('cpu')
    assert probs.dtype == watch.outside == torch.float32


@pytest.mark.parametrize('error', [ZeroDivisionError, KeyboardInterrupt])
def test_a_pass_that_breaks_off_leaves_autocast(error):
    "And the network as it was: outside of the training it computes in fp32"
    made = learner(precision='bf16')
    def stop(*_): raise error
    hook = made.model.head.register_forward_hook(stop)
    with pytest.raises(error): made.fit(1)
    assert not torch.is_autocast_enabled('cpu') and 'forward' not in made.model.__dict__
    hook.remove()
    assert made.model(torch.zeros(1, 3, 16, 16)).dtype == torch.float32


@pytest.mark.parametrize('which', range(3))
def test_a_layer_that_gives_nan_is_wrong(which, monkeypatch):
    "In its output or in one of its gradients, in one memory format only"
    real = devices._computed
    def broken(layer, x, bf16):
        parts = real(layer, x, bf16)
        last = x.is_contiguous(memory_format=torch.channels_last)
        if bf16 and not last and len(parts) > which: parts[which] = parts[which]*float('nan')
        return parts
    monkeypatch.setattr(devices, '_computed', broken)
    assert 'conv 3x3' in devices.wrong_layers.__wrapped__()


@pytest.mark.parametrize('device', ['toaster', 'cuda:99', 'xpu', 'hpu', 'mps:x'])
def test_unknown_device(device, tmp_path):
    refuses(f'the device {device!r} is not there', resnet_fine_tune, 'digits', device=device, runs=str(tmp_path/'runs'))


def test_unknown_device_by_command(refused_here):
    refused_here('resnet_fine_tune', 'digits', '--device', 'toaster', says=["the device 'toaster' is not there"])
