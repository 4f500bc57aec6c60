"""The benchmark command: what it refuses and what it writes."""
import json

import pytest


def test_benchmarks(refused_here, tmp_path):
    bench = lambda *args, says: refused_here('resnet_bench', *args, says=says)
    bench('speed', says=["unknown benchmark 'speed'",
                         "'model', 'data', 'train', 'strides', 'allreduce', 'compile' or 'precision'"])
    bench('model', '--arch', 'cifar_resnet8', says=['torchvision has no cifar_resnet8'])
    for o in ('model', 'allreduce', 'compile'):
        bench(o, '--arch', 'resnet35', says=["unknown arch 'resnet35'"])
        bench(o, '--rounds', 0, says=['rounds must be'])
    for o in ('model', 'compile'): bench(o, '--size', 16, says=['too small'])
    bench('strides', says=['--weights'])
    for o in ('data', 'train'): bench(o, '--data', 'nowhere', says=["unknown dataset 'nowhere'"])
    (tmp_path/'a.pth').write_bytes(b'no weights')
    bench('strides', '--weights', 'a.pth', '--data', tmp_path, says=[tmp_path, 'no .JPEG files'])


@pytest.mark.slow
def test_compiled(refused, run_cli, tmp_path):
    "Without a compiler it says so; with one the figures are written"
    call = ('resnet_bench', 'compile', '--arch', 'cifar_resnet8', '--size', 16, '--bs', 4, '--rounds', 2)
    refused(*call, says=['torch.compile does not work here', 'compiler'], CXX='/nowhere/g++')
    done = run_cli(*call, '--out', '.', timeout=600)
    values = json.loads((tmp_path/'compile_cifar_resnet8_16.json').read_text())['values']
    assert done.returncode == 0 and values['compile_seconds'] > 1 and set(values['seconds']) == {'eager', 'compiled'}
