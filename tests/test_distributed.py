"""Training by two processes, which talk by gloo on the CPU; what a launcher and the deaths of processes do."""
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from resnet_nbdev.core import InputError
from resnet_nbdev.distributed import gather, join, lost_peer, ranks
from safetensors.torch import load_file

from conftest import environment, script

pytest.importorskip('accelerate')


@pytest.fixture(scope='session')
def two(tmp_path_factory):
    "two(text of a script or name of a command, *args): run by torchrun with two processes, in a folder that is kept"
    cwd = tmp_path_factory.mktemp('two')

    def run(what, *args, timeout=300, cwd=cwd, **env):
        if '\n' in what:
            (file := cwd/'script.py').write_text(what)
            call = [file]
        else: call = ['--no-python', script(what)]
        call = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', 2, *call, *args]
        return subprocess.run([str(o) for o in call], cwd=cwd, env=environment(**env), timeout=timeout,
                              capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return run


def found(done):
    "What the main process has printed as FOUND and JSON"
    assert done.returncode == 0, done.stderr
    return json.loads(next(l for l in done.stdout.splitlines() if l.startswith('FOUND '))[6:])


START = '''
import json, os, random, signal, sys, time, zlib
import numpy as np, torch
from fastai.vision.all import *
from resnet_nbdev.core import InputError
from resnet_nbdev.catalogue import PLAIN
from resnet_nbdev.data import get_data
from resnet_nbdev.distributed import *
from resnet_nbdev.learner import resnet_learner
from resnet_nbdev.resident import resident_data
device = join('cpu')
def data(kind='stock', bs=16, workers=0, seed=42, augment=PLAIN, n=(9, 7)):
    set_seed(seed)
    make = resident_data if kind == 'resident' else get_data
    return make('digits', bs=bs, num_workers=workers, max_per_class=n, augment=augment, device=device)
def learner(**kw):
    dls = data(**kw)
    dls.valid.n = 33 # 16 for one rank and 17, one batch more, for the other
    return resnet_learner(dls, 'cifar_resnet8', metrics=[accuracy, F1Score(average='macro')])
def refusal(f):
    try: f()
    except InputError as e: return str(e)
def end(**results):
    everyone = gather(results)
    if is_main(): print('FOUND ' + json.dumps(everyone), flush=True)
    leave()
'''
SCRIPT = START + '''
def seen(dl): return [[zlib.crc32(x.numpy().tobytes()) for x in b[0]] for b in dl]
def shares(kind, workers):
    dls = data(kind, workers=workers)
    part,valid = shard(dls.train),shard(dls.valid, part=(rank(), 4))
    whole = dls.train.new(bs=32, num_workers=0)
    whole.rng.setstate(dls.train.rng.getstate())
    return dict(train=[seen(part) for _ in range(2)], whole=[seen(whole) for _ in range(2)], n=len(part),
                valid=[seen(o) for o in [valid] + [shard(dls.valid, part=(k, 4)) for k in (2, 3)]], nv=len(valid),
                all=seen(dls.valid), copy=type(part.new()) is type(dls.train), left=dls.train.rng is not part.rng,
                detached=len(part.to_detach(torch.ones(3))))
out = {f'{k} {w}': shares(k, w) for k,w in (('stock', 0), ('stock', 2), ('resident', 2))}

class First(Callback):
    "The gradients of the first step, as the optimizer gets them"
    order = 90
    def before_step(self):
        if self.epoch == self.iter == 0: self.grads = [p.grad.clone() for p in self.learn.model.parameters()]
def gradients(kind, bs):
    dls = data(kind, bs=bs)
    set_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(392, 10))
    learn = Learner(dls, net, loss_func=nn.CrossEntropyLoss(), cbs=(first := First()))
    with together(learn), learn.no_bar(), learn.no_logging():
        out['draws'] = [float(torch.rand(1)), float(np.random.rand()), random.random()]
        learn.fit(1, 1e-2)
    return first.grads
for kind in ('stock', 'resident'):
    by_two,draws = gradients(kind, 16),out['draws'] # random numbers from one seed
    with alone(): by_one = gradients(kind, 32)
    out['draws'] = draws
    out[f'{kind} gradients'] = max((p - q).abs().max().item() for p,q in zip(by_two, by_one))
    out[f'{kind} largest'] = max(p.abs().max().item() for p in by_one)

weights = lambda m: float(sum(p.detach().double().sum() for p in m.parameters()))
statistics = lambda m: [float(b.double().sum()) for b in m.buffers()]
learn = learner(seed=rank()) # nobody has given a seed
out['weights before'] = weights(learn.model)
with together(learn), learn.no_bar():
    learn.fit(2, 1e-2)
    out['divided'] = list(learn.recorder.values[-1])
    out['losses'] = [float(o) for o in learn.recorder.losses]
    out['again'] = list(learn.validate())
    out['statistics'] = statistics(learn.model)
    out['order'] = learn.dls.train.drawn
    state = learn.dls.train.rng.getstate()
    if is_main(): # the other one goes on
        with alone(): out['predicted'] = len(learn.get_preds(dl=learn.dls.test_dl(learn.dls.valid_ds.items[:9]))[0])
    out['everyone'] = [len(o) for o in learn.get_preds()]
out['weights after'] = weights(learn.model)
out['goes on'] = learn.dls.train.rng.getstate() == state and type(learn.dls.train) is TfmdDL
with alone(), learn.no_bar(): out['whole'] = list(learn.validate())

class Fails(Callback):
    def __init__(self, event): setattr(self, event, self.fail)
    def fail(self): raise ZeroDivisionError('on purpose')
out['usable'] = []
before = [type(o).__name__ for o in learn.cbs]
for event in ('after_batch', 'after_loss', 'before_validate'):
    try:
        with together(learn), learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2, cbs=Fails(event))
    except ZeroDivisionError: out['usable'].append(type(learn.model).__name__)
out['usable'].append([type(o).__name__ for o in learn.cbs] == before)
with alone(), learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
learn = resnet_learner(learn.dls, 'cifar_resnet8', splitter=lambda m: [params(m.body), params(m.head)], train_bn=False)
parts = lambda: [weights(learn.model.body), weights(learn.model.head)]
with together(learn), learn.no_bar(), learn.no_logging():
    out['parts'] = [parts()]
    for change in (learn.freeze, learn.unfreeze):
        change()
        learn.fit(1, 1e-2)
        out['parts'].append(parts())

def train(change=noop, **kw):
    l = learner()
    change(l)
    with together(l, **kw), l.no_bar(), l.no_logging(): l.fit(1)
def shuffle_by_numpy(l): l.dls.train.shuffle_fn = lambda idxs: list(np.random.permutation(idxs))
def own_metric(l): l.metrics = [Dice()]
out['own order'] = refusal(lambda: train(shuffle_by_numpy))
out['own metric'] = refusal(lambda: train(own_metric))
out['sync_bn'] = refusal(lambda: train(sync_bn=True))
out['too large'] = refusal(lambda: shard(data(bs=50).train))
out['agree'] = [agree(False), agree(rank() == 1)]
end(**out)
'''


@pytest.fixture(scope='module')
def results(two):
    done = two(SCRIPT)
    return found(done), done


def same(found, key): return found[0][key] == found[1][key]


@pytest.mark.parametrize('loader', ['stock 0', 'stock 2', 'resident 2'])
def test_every_image_belongs_to_one_rank(results, loader):
    "Each global batch is that of one process with a batch twice as large, in its order; no validation image twice"
    a, b = (o[loader] for o in results[0])
    for one, other, whole in zip(a['train'], b['train'], a['whole']):
        assert (len(one), len(other), len(whole), a['n'], b['n']) == (2,)*5  # 90 images: the last 26 are dropped
        for x, y, z in zip(one, other, whole): assert x + y == z and len(set(z)) == 32
    assert a['train'][0] != a['train'][1], 'the second epoch has an order of its own'
    sizes = [sum(map(len, o)) for o in (a['valid'][0], b['valid'][0], *a['valid'][1:])]
    assert sizes == [17, 18, 17, 18]
    assert (a['nv'], b['nv']) == (len(a['valid'][0]), len(b['valid'][0]))
    parts = [a['valid'][0], b['valid'][0], *a['valid'][1:]]
    assert [i for o in parts for batch in o for i in batch] == [i for batch in a['all'] for i in batch]
    assert a['copy'] and a['left'] and a['detached'] == 3


@pytest.mark.parametrize('loader', ['stock', 'resident'])
def test_gradients_are_those_of_the_global_batch(results, loader):
    for o in results[0]: assert o[f'{loader} gradients'] < 1e-6 < 1e-3 < o[f'{loader} largest']


def test_metrics_are_those_of_one_process(results):
    "Loss, accuracy and F1 of 33 images, though one rank has a batch more than the other"
    for o in results[0]:
        assert o['divided'][1:] == pytest.approx(o['whole'], rel=1e-6) and o['again'] == o['divided'][1:]
        assert len(o['losses']) == 4 and o['losses'][-1] == pytest.approx(o['divided'][0], rel=1e-6)
    assert same(results[0], 'divided') and same(results[0], 'losses')


def test_all_ranks_have_one_network(results):
    "Weights and batch-norm statistics agree, from seeds that did not; the random numbers of training do not agree"
    a, b = results[0]
    assert a['weights before'] != b['weights before'] and same(results[0], 'weights after')
    assert same(results[0], 'order') and same(results[0], 'statistics') and len(set(a['statistics'])) > 10
    assert not set(a['draws']) & set(b['draws'])


def test_frozen_and_unfrozen_in_turn(results):
    "What trains is decided by each fit: first the head alone, then all of it"
    (_, b, c), (_, y, z) = (o['parts'] for o in results[0])
    body, head = zip(*results[0][0]['parts'])
    assert (b, c) == (y, z) and body[0] == body[1] != body[2] and len(set(head)) == 3


def test_only_the_main_process_reports(results):
    lines = results[1].stdout.splitlines()
    assert sum(o.startswith('[0, ') for o in lines) == 1 and not any('Traceback' in o for o in lines)
    assert 'Warning' not in results[1].stderr, results[1].stderr


def test_learner_is_as_before(results):
    "Loaders, model and callbacks are the old ones, after an exception as well; the generator goes on"
    for o in results[0]:
        assert o['usable'] == ['ResNet']*3 + [True] and o['goes on'] and o['everyone'] == [70, 70]
    assert results[0][0]['predicted'] == 9


def test_refusals(results):
    for o in results[0]:
        assert 'drew different orders' in o['own order'] and 'the metric dice cannot' in o['own metric']
        assert 'needs GPUs' in o['sync_bn']
        assert '90 training images do not fill a batch of 50 for each of 2 processes' in o['too large']
        assert o['agree'] == [False, True]


def test_refused_before_a_group_is_there(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert ranks() == 2
    for device, says in (('cuda:1', 'cannot share cuda:1'), ('mps', 'not on mps')):
        with pytest.raises(InputError, match=says): join(device)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match='has 0 GPUs'): join('cuda')
    with pytest.raises(InputError, match='has to join'): gather(1)
    monkeypatch.delenv('MASTER_ADDR', raising=False)
    monkeypatch.setenv('RANK', '0')
    with pytest.raises(InputError, match='did not find each other'): join('cpu')


def test_without_accelerate(monkeypatch):
    "The module is there, and says what is missing when it is needed"
    monkeypatch.setitem(sys.modules, 'accelerate', None)
    assert join('cpu') == torch.device('cpu')
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(InputError, match=r'needs accelerate: pip install .resnet_nbdev\[distributed\]'): join('cpu')


LOST = START + '''
import resnet_nbdev.distributed as distributed
dies,when,how = int(sys.argv[1]),sys.argv[2],getattr(signal, sys.argv[3])
class Dies(Callback):
    order = -50
    def before_batch(self):
        if rank() == dies and self.epoch == 1 and self.training == (when == 'train'): os.kill(os.getpid(), how)
learn = learner()
learn.add_cb(Dies())
start = time.time()
try:
    with together(learn), learn.no_bar(), learn.no_logging(): learn.fit(3, 1e-2)
except Exception as e:
    print(lost_peer(e), type(learn.model).__name__, time.time() - start, flush=True)
    leave()
'''


@pytest.mark.parametrize('dies, when, how', [(1, 'train', 'SIGKILL'), (0, 'valid', 'SIGKILL'),
                                             pytest.param(1, 'train', 'SIGSTOP', marks=pytest.mark.slow)])
def test_lost_process(tmp_path, dies, when, how):
    "Without a launcher that would end the other one: it ends by itself and knows why"
    (tmp_path/'script.py').write_text(LOST)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = dict(WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    ps = [subprocess.Popen([sys.executable, 'script.py', str(dies), when, how], cwd=tmp_path,
                           env=environment(**env, RANK=str(k), LOCAL_RANK=str(k)), text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE) for k in range(2)]
    try:
        out, err = ps[1 - dies].communicate(timeout=240)
        known, model, seconds = out.split()
        assert (known, model, err) == ('True', 'ResNet', '') and float(seconds) < 100, (out, err)
    finally:
        for p in ps: p.kill()
        for p in ps: p.communicate()


def test_lost_peer_knows_others():
    assert lost_peer(RuntimeError('[../third_party/gloo/gloo/transport/tcp/pair.cc] Connection reset by peer'))
    assert lost_peer(RuntimeError('NCCL error: ncclRemoteError: a remote process exiting prematurely'))
    cause = ValueError('another')
    cause.__context__ = torch.distributed.DistNetworkError('failed to recv, got 0 bytes')
    assert lost_peer(cause)
    for o in (RuntimeError('Connection reset by peer'), ConnectionResetError(), KeyboardInterrupt(), None,
              RuntimeError('NCCL error: unhandled cuda runtime error'), InputError('gloo, timed out')):
        assert not lost_peer(o), o


# the command, started by torchrun as two processes

SMALL = '--max_per_class', 40, '--bs', 16, '--epochs', 3, '--plan', 'discriminative', '--ema', 0.9, '--device', 'cpu'


def launch(*args):
    "The command line of two processes on this machine"
    return [str(o) for o in (sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', 2,
                             '--no-python', script('resnet_fine_tune'), *args)]


def together(*args, cwd, timeout=240):
    return subprocess.run(launch(*args), cwd=cwd, env=environment(), timeout=timeout, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL)


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


def rows(run): return len((run/'history.csv').read_text().splitlines()) - 1 if (run/'history.csv').exists() else 0


def children(pid):
    return [int(o) for o in subprocess.run(['pgrep', '-P', str(pid)], capture_output=True, text=True).stdout.split()]


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
    assert done.returncode == 0 and 'resumes after epoch' in done.stdout, done.stderr
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
