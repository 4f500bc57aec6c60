"""The command, started by torchrun as two processes: the same accuracy, one writer, a killed process, and going on."""
import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from safetensors.torch import load_file

from conftest import environment, script

pytest.importorskip('accelerate')
SMALL = '--max_per_class', 40, '--bs', 16, '--epochs', 3, '--plan', 'discriminative', '--ema', 0.9, '--device', 'cpu'


def launch(*args):
    "The command line of two processes on this machine"
    return [str(o) for o in (sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', 2,
                             '--no-python', script('resnet_fine_tune'), *args)]


def together(*args, cwd, timeout=240):
    return subprocess.run(launch(*args), cwd=cwd, env=environment(), timeout=timeout, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL)


def rows(run): return len((run/'history.csv').read_text().splitlines()) - 1 if (run/'history.csv').exists() else 0


def children(pid):
    return [int(o) for o in subprocess.run(['pgrep', '-P', str(pid)], capture_output=True, text=True).stdout.split()]


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A run of two processes that nothing disturbed"
    cwd = tmp_path_factory.mktemp('together')
    done = together('digits', *SMALL, '--name', 'whole', '--json', cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd/'runs'/'whole', done


def test_one_process_reports_and_writes(whole):
    run, done = whole
    lines = [json.loads(o) for o in done.stdout.splitlines()]
    assert [o['epoch'] for o in lines] == [1, 2, 3, 4], 'each line once'
    config, metrics = (json.loads((run/o).read_text()) for o in ('config.json', 'metrics.json'))
    assert (config['ranks'], config['scale_lr'], metrics['status']) == (2, 'sqrt', 'finished')
    assert max(config['cycles'][0]['rates']) == pytest.approx(config['arguments']['base_lr']*2**0.5)
    assert sorted(o.name for o in run.iterdir() if o.suffix == '.safetensors') == \
        ['average.safetensors', 'best.safetensors', 'last.safetensors']


@pytest.mark.slow
def test_killed_process_ends_the_run_and_resume_goes_on(whole, tmp_path):
    "Within a minute, with a sentence and a non-zero code; then the end is that of the undisturbed run, to the bit"
    run = tmp_path/'runs'/'mine'
    args = 'digits', *SMALL, '--name', 'mine'
    with open(tmp_path/'err', 'w') as err:
        p = subprocess.Popen(launch(*args), cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=err,
                             stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        end = time.monotonic() + 200
        while rows(run) < 2:
            assert p.poll() is None and time.monotonic() < end, (tmp_path/'err').read_text()
            time.sleep(0.05)
        victim = max(children(p.pid))
        os.kill(victim, signal.SIGKILL)
        start = time.monotonic()
        code = p.wait(60)
        said = [l for l in (tmp_path/'err').read_text().splitlines() if l.startswith('resnet_fine_tune: ')]
        assert code and time.monotonic() - start < 60
    finally:
        try: os.killpg(p.pid, signal.SIGKILL)
        except ProcessLookupError: pass
    assert len(said) == 1 and 'resume goes on' in said[0], (tmp_path/'err').read_text()
    done = together(*args, '--resume', cwd=tmp_path)
    assert done.returncode == 0 and 'goes on after epoch' in done.stdout, done.stderr
    for o in ('last', 'best', 'average'):
        assert (run/f'{o}.safetensors').read_bytes() == (whole[0]/f'{o}.safetensors').read_bytes(), o
    history = pd.read_csv(run/'history.csv')
    assert list(history.epoch) == [1, 2, 3, 4]


def test_another_number_of_processes_is_another_run(whole, tmp_path, run_cli):
    run = whole[0]
    (tmp_path/'runs').mkdir()
    (tmp_path/'runs'/'whole').symlink_to(run)
    done = run_cli('resnet_fine_tune', 'digits', *SMALL, '--name', 'whole', '--resume')
    assert done.returncode == 2 and 'ranks was 2 and is 1' in done.stderr and done.stderr.count('\n') == 1, done.stderr


@pytest.mark.slow
def test_a_name_that_is_taken(whole):
    "One sentence of the process that looked, and the other's says whose it is"
    done = together('digits', *SMALL, '--name', 'whole', cwd=whole[0].parent.parent)
    said = [l for l in done.stderr.splitlines() if l.startswith('resnet_fine_tune: ')]
    assert done.returncode and 'runs/whole exists already' in said[0] and len(said) <= 2, done.stderr


@pytest.mark.slow
def test_accuracy_is_that_of_one_process(tmp_path, run_cli):
    "The same global batch and rate, 13 epochs on the digits: 0.02 apart at most; batch norm sees halves of the batch"
    common = 'digits', '--device', 'cpu', '--scale_lr', 'none'
    assert together(*common, '--bs', 32, '--name', 'two', cwd=tmp_path, timeout=900).returncode == 0
    assert run_cli('resnet_fine_tune', *common, '--bs', 64, '--name', 'one', timeout=900).returncode == 0
    one, two = (json.loads((tmp_path/'runs'/o/'metrics.json').read_text())['last']['accuracy'] for o in ('one', 'two'))
    print(f'one process {one:.4f}, two {two:.4f}')
    assert min(one, two) > 0.97 and abs(one - two) <= 0.02


@pytest.mark.slow
@pytest.mark.parametrize('kind', [[], ['--workers', 2], ['--resident']])
def test_all_loaders(kind, tmp_path):
    done = together('digits', *SMALL, *kind, '--name', 'mine', cwd=tmp_path, timeout=600)
    assert done.returncode == 0 and len(load_file(tmp_path/'runs'/'mine'/'last.safetensors')) > 20, done.stderr
