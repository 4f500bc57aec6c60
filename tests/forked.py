"""Runs without the 5 s of a new process: each is forked from a server that has imported everything."""
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import time
from itertools import count
from pathlib import Path

import pandas as pd
import pytest
import torch
from resnet_nbdev.catalogue import data_path
from resnet_nbdev.checkpoints import read_tensor_file

WEIGHTS = 'best', 'last', 'average'
COLUMNS = ['epoch', 'cycle', 'train_loss', 'valid_loss', 'accuracy']
CHILD = '''
import math, multiprocessing, os, resource, signal, sys, time
from pathlib import Path
import matplotlib.pyplot as plt
import resnet_nbdev.cli as cli, resnet_nbdev.recorder as recorder, resnet_nbdev.training as training

os.setsid()
os.chdir(cwd)
for fd,name in (1, 'out'), (2, 'err'): os.dup2(os.open(f'{said}.{name}', os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
signal.signal(signal.SIGINT, signal.default_int_handler)
multiprocessing.set_start_method(method, force=True)

seen,acts,now = {},{},{}

def moment(name):
    "Something is about to happen or has happened: do what was asked for at the n-th time"
    seen[name] = seen.get(name, 0) + 1
    if listed: os.write(listing, f'{name}, {seen[name]}\\n'.encode())
    for act in acts.get((name, seen[name]), ()): act()

def on(name, n, act): acts.setdefault((name, n), []).append(act)

def kill(): os.kill(os.getpid(), signal.SIGKILL)

def around(what, label):
    real = getattr(os, what)
    def call(*args, **kw):
        o = label(args[-1] if what == 'replace' else args[0])
        moment(f'before {what} {o}')
        found = real(*args, **kw)
        moment(f'after {what} {o}')
        return found
    setattr(os, what, call)

def label(o): # of a file in the run's folder
    o = Path(os.readlink(f'/proc/self/fd/{o}') if isinstance(o, int) else o)
    return o.name.removeprefix('.').removesuffix('.part')

for o in 'replace', 'fsync', 'unlink', 'rmdir': around(o, label)

def before_batch(self, real=recorder.RunRecorder.before_batch):
    real(self)
    now['learn'] = self.learn
    moment(f"{'training' if self.training else 'validation'} {len(self.rows)+1}")
recorder.RunRecorder.before_batch = before_batch
if not figures: training.plot_history = training.plot_predictions = lambda *args: plt.figure(figsize=(1, 1))
if listed: listing = os.open(listed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
for name,n in kills: on(name, n, kill)
exec(first)
sys.argv = argv
getattr(cli, argv[0]).main()
'''


class Done:
    "What a run has said and how it ended"
    def __init__(self, process, out, err): self.process, self.out_file, self.err_file = process, out, err
    pid = property(lambda self: self.process.pid)
    out = property(lambda self: self.out_file.read_text())
    err = property(lambda self: self.err_file.read_text())

    def wait(self, seconds=120):
        self.process.join(seconds)
        assert self.process.exitcode is not None, f'still running\n{self.out}\n{self.err}'
        self.code = self.process.exitcode
        return self

    def stopped(self, seconds=60):
        "Wait until it has stopped itself"
        end = time.monotonic() + seconds
        while Path(f'/proc/{self.pid}/stat').read_text().rpartition(')')[2].split()[0] != 'T':
            assert self.process.is_alive() and time.monotonic() < end, (self.out, self.err)
            time.sleep(0.02)
        return self


@pytest.fixture(scope='session')
def server():
    if not hasattr(os, 'fork'): pytest.skip('the runs are forked from a process with fastai in it')
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['resnet_nbdev.cli', 'resnet_nbdev.runs', 'resnet_nbdev.resident', 'torch._dynamo',
                                    'torch.utils.tensorboard', 'sklearn.datasets'])
    before, os.environ['OMP_NUM_THREADS'] = os.environ.get('OMP_NUM_THREADS'), '1'
    multiprocessing.forkserver.ensure_running()
    if before is None: del os.environ['OMP_NUM_THREADS']
    else: os.environ['OMP_NUM_THREADS'] = before
    return context


@pytest.fixture(scope='session')
def starter(server):
    started, numbers = [], count()

    def start(cwd, *argv, first='', kills=(), listed='', figures=False):
        "Start `argv` in `cwd`, after the code `first`, to be killed at one of the moments `kills`"
        said = cwd/f'said{next(numbers)}'
        values = dict(cwd=str(cwd), argv=list(map(str, argv)), first=first, kills=list(kills), said=str(said),
                      listed=str(listed), figures=figures, method=multiprocessing.get_start_method())
        p = server.Process(target=exec, args=(CHILD, values))
        p.start()
        started.append(p)
        return Done(p, said.with_suffix('.out'), said.with_suffix('.err'))
    yield start
    for p in (o for o in started if o.is_alive()): # the number of one that has ended may be another's by now
        p.kill()
        p.join(10)


@pytest.fixture(scope='session')
def digits(tmp_path_factory):
    "16 training and 4 validation images of each digit"
    made, dest = data_path('digits'), tmp_path_factory.mktemp('some')/'digits'
    for split, n in (('train', 16), ('val', 4)):
        for c in sorted((made/split).iterdir()):
            (dest/split/c.name).mkdir(parents=True)
            for f in sorted(c.iterdir())[:n]: shutil.copy(f, dest/split/c.name)
    return dest


BASE = dict(arch='cifar_resnet8', plan='discriminative', presize=16, resize=16, bs=32, freeze_epochs=1, epochs=2,
            base_lr=1e-2, ema=0.9, resident=True, precision='fp32', seed=7)
STOCK = dict(resident=False, workers=0)


def flags(options):
    "{'bs': 32, 'resident': True} -> ['--bs', 32, '--resident']"
    return [p for k, v in options.items() if v is not None and v is not False
            for p in ([f'--{k}'] if v is True else [f'--{k}', v])]


@pytest.fixture(scope='session')
def tune(starter, digits):
    "Start a small training called mine in `cwd`: `BASE` with changes"
    def start(cwd, resume=False, data=None, json=False, tensorboard=False, name='mine', runs='runs', first='', kills=(),
              listed='', figures=False, **changes):
        options = dict(data=data or digits, name=name, runs=runs, **BASE | changes, resume=resume, json=json,
                       tensorboard=tensorboard)
        return starter(cwd, 'resnet_fine_tune', *flags(options), first=first, kills=kills, listed=listed,
                       figures=figures)
    return start


@pytest.fixture(scope='session')
def whole(tune, tmp_path_factory):
    "The folder of a run with these changes that nothing has disturbed"
    made = {}

    def run(**changes):
        key = json.dumps(changes, sort_keys=True)
        if key not in made:
            cwd = tmp_path_factory.mktemp('whole')
            done = tune(cwd, listed=cwd/'moments', **changes).wait()
            assert done.code == 0 and not done.err, done.err
            made[key] = cwd/'runs'/'mine'
        return made[key]
    return run


@pytest.fixture(scope='session')
def killed(tune, tmp_path_factory):
    "The folder of a run with these changes that was killed, in its third epoch if nothing else is said; to be copied"
    made = {}

    def run(moment=('training 3', 2), **changes):
        key = json.dumps([moment, changes], sort_keys=True)
        if key not in made:
            cwd = tmp_path_factory.mktemp('killed')
            assert tune(cwd, kills=[moment], **changes).wait().code == -signal.SIGKILL
            made[key] = cwd/'runs'/'mine'
        return made[key]
    return run


@pytest.fixture
def mine(killed, tmp_path):
    "A copy of `killed()` to go on with in `tmp_path`"
    return Path(shutil.copytree(killed(), tmp_path/'runs'/'mine'))


def names(run): return sorted(str(o.relative_to(run)) for o in run.rglob('*'))


def read(run, name): return json.loads((run/name).read_text())


def history(run): return pd.read_csv(run/'history.csv')[COLUMNS]


def epoch_of(path): return read_tensor_file(path)[1]['epoch']


def snapshot(folder): \
    return {o: (o.read_bytes(), o.stat().st_mtime_ns) for o in folder.rglob('*') if o.is_file() and o.name != '.lock'}


def check_whole(run):
    "What a crash has left is a run whose files can be used"
    for o in run.rglob('*.safetensors'): assert read_tensor_file(o)[0]
    for o in run.glob('*.json'): assert json.loads(o.read_text())
    if (run/'history.csv').exists():
        t = history(run)
        assert list(t.epoch) == list(range(1, len(t)+1)) and not t.isna().any(axis=None)
        assert epoch_of(run/'last.safetensors') in (len(t), len(t)+1)


def check_same(run, whole):
    "The run has ended as the one that nothing has disturbed, to the last bit"
    assert read(run, 'metrics.json')['status'] == 'finished'
    pd.testing.assert_frame_equal(history(run), history(whole), check_exact=True)
    for o in WEIGHTS:
        one, two = (p/f'{o}.safetensors' for p in (run, whole))
        assert one.exists() == two.exists(), o
        if one.exists(): assert one.read_bytes() == two.read_bytes(), f'{o} is another'
    for k in 'best', 'last', 'average':
        drop = lambda o: {k: v for k, v in (o or {}).items() if k not in ('seconds', 'images/s')}
        assert drop(read(run, 'metrics.json').get(k)) == drop(read(whole, 'metrics.json').get(k))
    assert names(run) == names(whole)


def go_on(tune, run, whole=None, **kw):
    "Resume without a fault, and compare"
    done = tune(run.parent.parent, resume=True, **kw).wait()
    assert done.code == 0 and not done.err, (done.code, done.err)
    if whole is not None: check_same(run, whole)
    return done


def sentence(done, *says):
    "The run ended with exit code 2 and one line on stderr that has all of `says`"
    assert done.code == 2, (done.code, done.err)
    assert done.err.count('\n') == 1 and done.err.startswith('resnet_fine_tune: '), done.err
    assert 'Traceback' not in done.out, done.out
    for o in says: assert str(o) in done.err, (o, done.err)
    return done.err


UNPRIVILEGED = '''
import ctypes
if ctypes.CDLL(None).capset((ctypes.c_uint32*2)(0x20080522, 0), (ctypes.c_uint32*6)()): os._exit(77)
'''  # root without root's rights: the permissions of its own files hold for it, too


class Program:
    "What a pickle can hold: code that runs when it is read"
    def __init__(self, marker): self.marker = str(marker)
    def __reduce__(self): return os.mkdir, (self.marker,)


def torch_pickle(path, marker): torch.save({'model': Program(marker)}, path)


def plain_pickle(path, marker): path.write_bytes(pickle.dumps(Program(marker)))


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[int(at*len(content))] ^= 1
    path.write_bytes(content)


DAMAGE = {'a bit in the header': lambda p, m: flip(p, 0.0005), 'a bit in the middle': lambda p, m: flip(p, 0.5),
          'the last bit': lambda p, m: flip(p, 0.9999999), 'half': lambda p, m: os.truncate(p, p.stat().st_size//2),
          'a byte less': lambda p, m: os.truncate(p, p.stat().st_size - 1), 'empty': lambda p, m: os.truncate(p, 0),
          'a byte more': lambda p, m: p.write_bytes(p.read_bytes() + b'\0'), 'text': lambda p, m: p.write_text('no\n'),
          'a pickle': plain_pickle, "torch's pickle": torch_pickle}
