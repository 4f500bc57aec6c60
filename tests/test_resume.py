"""A training that is ended at any moment goes on as if nothing had happened, and what cannot go on says why."""
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import time
from itertools import count, product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from resnet_nbdev.core import InputError
from resnet_nbdev.checkpoints import flatten_state, read_state, read_tensor_file, state_file, tensor_file, restore_state
from resnet_nbdev.catalogue import data_path
from resnet_nbdev.runs import load_run

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='the runs are forked from a process with fastai in it')
WEIGHTS = 'best', 'last', 'average'
COLUMNS = ['epoch', 'cycle', 'train_loss', 'valid_loss', 'accuracy']


# Runs without the 5 s of a new process: each is forked from a server that has imported everything

CHILD = '''
import math, multiprocessing, os, resource, signal, sys, time
from pathlib import Path
import matplotlib.pyplot as plt
import resnet_nbdev.cli as cli, resnet_nbdev.runs as runs

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

def before_batch(self, real=runs.RunRecorder.before_batch):
    real(self)
    now['learn'] = self.learn
    moment(f"{'training' if self.training else 'validation'} {len(self.rows)+1}")
runs.RunRecorder.before_batch = before_batch
if not figures: runs.plot_history = runs.plot_predictions = lambda *args: plt.figure(figsize=(1, 1))
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
            base_lr=1e-2, ema=0.9, resident=True, seed=7)
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


# 1. Killed

MOMENTS = [('before fsync config.json', 1), ('validation 1', 2), ('after fsync best.safetensors', 1),
           ('after replace state.safetensors', 1), ('before replace state.safetensors', 2),
           ('after replace last.safetensors', 2), ('training 3', 3), ('after replace state.safetensors', 3),
           ('after replace history.csv', 3), ('after replace metrics.json', 5)]


def kill_and_go_on(tune, whole, tmp_path, kills, **changes):
    "Kill at the first moment, go on and kill at the second, and so on; at last, go on to the end"
    run = tmp_path/'runs'/'mine'
    for i, o in enumerate(kills):
        done = tune(tmp_path, resume=i > 0, kills=[o], **changes).wait()
        assert done.code == -signal.SIGKILL, (o, done.code, done.err)
        if run.exists(): check_whole(run)
    go_on(tune, run, whole(**changes), **changes)


@pytest.mark.parametrize('moment', MOMENTS, ids=lambda o: f'{o[0]}, {o[1]}')
def test_killed_at(tune, whole, tmp_path, moment): kill_and_go_on(tune, whole, tmp_path, [moment])


def test_killed_again_and_again(tune, whole, tmp_path):
    "While it goes on, also before it has trained a batch"
    kill_and_go_on(tune, whole, tmp_path, [
        ('training 2', 2), ('after replace metrics.json', 1), ('training 2', 1), ('validation 2', 2),
        ('after replace state.safetensors', 1), ('after replace last.safetensors', 1),
        ('after fsync metrics.json', 1), ('before replace state.safetensors', 1), ('before replace metrics.json', 2)])


@pytest.mark.slow
def test_killed_at_every_write_and_batch(tune, whole, tmp_path):
    lines, wrong = (whole().parent.parent/'moments').read_text().splitlines(), {}
    lines = [o for o in lines[lines.index('before fsync config.json, 1'):] if not o.startswith('after')]
    assert len(lines) > 50
    for i, (name, n) in enumerate(o.rsplit(', ', 1) for o in lines):
        (cwd := tmp_path/str(i)).mkdir()
        try: kill_and_go_on(tune, whole, cwd, [(name, int(n))])
        except AssertionError as e: wrong[name, n] = str(e).splitlines()[0]
    assert not wrong, '\n'.join(f'{k}: {v}' for k, v in wrong.items())


@pytest.mark.slow
def test_killed_at_random_times(tune, whole, tmp_path):
    rng, wrong = random.Random(5), {}
    start = time.monotonic()
    whole(seed=8)
    took = time.monotonic() - start
    for i in range(20):
        (cwd := tmp_path/str(i)).mkdir()
        run, part = cwd/'runs'/'mine', rng.uniform(0.1, 1)
        for resume in (False, True)[:1 + i%2]:
            done = tune(cwd, resume=resume, seed=8)
            done.process.join(took*part/(1 + i%2))
            done.process.kill() # does nothing if it has ended
            done.wait()
            if run.exists(): check_whole(run)
        try: go_on(tune, run, whole(seed=8), seed=8)
        except AssertionError as e: wrong[i, part] = str(e).splitlines()[0]
    assert not wrong


BETWEEN = ('after replace metrics.json', 2)  # the first epoch is told, the next cycle has not begun
VARIANTS = dict(
    average=(dict(ema=None, average=2, epochs=3), [
        ('after replace state.safetensors', 2), ('before unlink 00001.safetensors', 1),
        ('after replace average.safetensors', 1)]),
    accumulate=(dict(accumulate=48, freeze_epochs=2), [('training 2', 2), ('training 3', 1), ('training 4', 4)]),
    mixup=(dict(mixup=0.4), [('training 3', 3)]),
    cutmix=(dict(cutmix=1.), [('training 3', 3)]),
    dropout=(dict(dropout=0.5, hidden=8), [('training 2', 2), ('training 3', 3)]),
    patience=(dict(patience=1, epochs=12, base_lr=0.3), [('training 2', 2), ('after replace state.safetensors', 2)]),
    sgd=(dict(opt='sgd', clip=1., max_norm=3.), [('training 3', 3)]),
    rmsprop=(dict(opt='rmsprop'), [('training 3', 3)]),
    ranger=(dict(opt='ranger'), [('training 3', 3)]),
    flat=(dict(schedule='flat'), [('training 2', 4), ('training 3', 3)]),
    stock=(STOCK, [('training 2', 3), ('validation 3', 1)]),
    workers=(dict(resident=False, workers=2), [('training 2', 3), ('validation 3', 1)]),
    flat_cos=(dict(schedule='flat_cos', label_smoothing=0.1, wd=0.1), [('training 3', 3)]),
    progressive=(dict(progressive='8,16', epochs=4), [('training 3', 2), ('training 5', 1)]),
    gradual=(dict(plan='gradual', epochs=1), [BETWEEN, BETWEEN, ('before replace state.safetensors', 1), BETWEEN]),
    frozen=(dict(plan='head', bn='frozen', top_k=3, monitor='valid_loss'), [BETWEEN, ('training 3', 3)]))
QUICK = 'average', 'accumulate', 'patience', 'ranger', 'workers', 'gradual'


@pytest.mark.parametrize('variant', [pytest.param(k, marks=[] if k in QUICK else pytest.mark.slow) for k in VARIANTS])
def test_killed_with(tune, whole, tmp_path, variant):
    "Options that have a state of their own"
    changes, kills = VARIANTS[variant]
    kill_and_go_on(tune, whole, tmp_path, kills, **changes)
    metrics = read(whole(**changes), 'metrics.json')
    assert (metrics['epochs'] < metrics['epochs_planned']) == (variant == 'patience'), 'it should stop early'


@pytest.mark.slow
def test_the_command_itself_is_killed(start_cli, run_cli, whole, digits, tmp_path):
    "With its worker processes, by the group, as a batch system does"
    changes = dict(resident=False, workers=2)
    args = ['resnet_fine_tune', *flags(dict(data=digits, name='mine', **BASE | changes))]
    p, run = start_cli(*args), tmp_path/'runs'/'mine'
    end = time.monotonic() + 90
    while not (run/'history.csv').exists():
        assert p.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    os.killpg(p.pid, signal.SIGKILL)
    assert p.wait(10) == -signal.SIGKILL
    done = run_cli(*args, '--resume')
    assert done.returncode == 0 and not done.stderr, done
    check_same(run, whole(**changes))


# 2. The same seed, the same run

def test_same_seed_same_bits(tune, whole, tmp_path):
    assert tune(tmp_path).wait().code == 0
    check_same(tmp_path/'runs'/'mine', whole())
    with pytest.raises(AssertionError): check_same(tmp_path/'runs'/'mine', whole(seed=8))


@pytest.mark.parametrize('workers', [1, 2, 4])
def test_resident_loader_with_any_number_of_workers(whole, workers): check_same(whole(workers=workers), whole())


def test_going_on_with_other_workers_and_another_copy(tune, whole, mine, digits, tmp_path):
    "Of the resident loader they are no part of the run, and neither is where the images lie"
    go_on(tune, mine, whole(), workers=3, data=shutil.copytree(digits, tmp_path/'elsewhere'))


# 3. Another run

OTHER = dict(
    epochs=('cycles.2.epochs was 2 and is 3', dict(epochs=3)), base_lr=('cycles.1.rates was', dict(base_lr=2e-2)),
    freeze_epochs=('cycles.1.epochs was 1 and is 2', dict(freeze_epochs=2)),
    arch=('arch was cifar_resnet8 and is cifar_resnet20', dict(arch='cifar_resnet20')),
    seed=('seed was 7 and is 8', dict(seed=8)), bs=('data.bs was 32 and is 16', dict(bs=16)),
    label_smoothing=('made.label_smoothing was 0.0 and is 0.1', dict(label_smoothing=0.1)),
    plan=('made.plan.', dict(plan='gradual')), ema=('made.ema was 0.9 and is 0.8', dict(ema=0.8)),
    schedule=('cycles.2.kind was one_cycle and is flat', dict(schedule='flat')), opt=('made.opt was', dict(opt='sgd')),
    patience=('patience was 0 and is 2', dict(patience=2)),
    average=('average was 0 and is 2', dict(ema=None, average=2)),
    loader=('workers was None and is 0', STOCK),
    resize=('data.resize was 16 and is 8', dict(resize=8)),
    monitor=('monitor was accuracy and is valid_loss', dict(monitor='valid_loss')))


RARER = 'ema', 'schedule', 'opt', 'patience', 'average', 'resize', 'monitor'


@pytest.mark.parametrize('what', [pytest.param(k, marks=pytest.mark.slow if k in RARER else []) for k in OTHER])
def test_another_run_is_refused(tune, mine, tmp_path, what):
    says, changes = OTHER[what]
    before = snapshot(tmp_path/'runs')
    done = tune(tmp_path, resume=True, **changes).wait()
    sentence(done, 'runs/mine cannot go on', 'another run', says)
    assert snapshot(tmp_path/'runs') == before


def test_all_differences_are_listed(tune, mine, tmp_path):
    done = tune(tmp_path, resume=True, epochs=4, seed=3, bs=16).wait()
    sentence(done, 'cycles.2.epochs was 2 and is 4', 'seed was 7 and is 3', 'data.bs was 32 and is 16')


def test_other_augmentation_is_refused(mine, digits, tmp_path, monkeypatch):
    from resnet_nbdev.recipes import run_recipe
    before = snapshot(mine)
    with pytest.raises(InputError, match=r'data\.augment\.max_rotate was None and is 5'):
        run_recipe(dict({k: v for k, v in BASE.items() if k != 'seed'}, data=digits), 'mine', True, seed=7,
                   runs=tmp_path/'runs', augment=dict(min_scale=0.5, max_rotate=5))
    assert snapshot(mine) == before


@pytest.mark.parametrize('split', ['train', pytest.param('val', marks=pytest.mark.slow)])
@pytest.mark.parametrize('what', ['added', 'changed', 'removed', 'moved to another class', 'renamed'])
def test_other_images_are_refused(tune, mine, digits, tmp_path, what, split):
    data = shutil.copytree(digits, tmp_path/'data')
    one, two = (sorted((data/split/c).iterdir())[0] for c in '37')
    if what == 'added': shutil.copy(one, one.with_name('more.png'))
    elif what == 'changed':
        im = Image.open(one)
        im.putpixel((3, 3), 255 - im.getpixel((3, 3)))
        im.save(one)
    elif what == 'removed': one.unlink()
    elif what == 'renamed': one.rename(one.with_name('other.png'))
    else: one.rename(two.with_name('other.png'))
    before = snapshot(mine)
    done = tune(tmp_path, resume=True, data=data).wait()
    sentence(done, 'runs/mine cannot go on', 'data.fingerprint was',
             *([f'data.{split} was'] if what in ('added', 'removed') else []))
    assert snapshot(mine) == before


def test_other_workers_of_the_stock_loader_are_refused(tune, killed, tmp_path):
    mine = Path(shutil.copytree(killed(**STOCK), tmp_path/'runs'/'mine'))
    before = snapshot(mine)
    sentence(tune(tmp_path, resume=True, resident=False, workers=2).wait(), 'workers was 0 and is 2')
    assert snapshot(mine) == before


# 4. Finished

def test_a_finished_run_says_so(tune, whole, tmp_path):
    mine = Path(shutil.copytree(whole(), tmp_path/'runs'/'mine'))
    before = snapshot(mine)
    done = tune(tmp_path, resume=True).wait()
    assert (done.code, done.err) == (0, '') and 'runs/mine is finished: 3 epochs' in done.out
    assert snapshot(mine) == before
    sentence(tune(tmp_path, resume=True, epochs=3).wait(), 'cycles.2.epochs was 2 and is 3')
    sentence(tune(tmp_path).wait(), 'runs/mine exists already', 'resume')
    assert snapshot(mine) == before


def test_resume_begins_a_run_that_is_not_there(tune, whole, tmp_path):
    go_on(tune, tmp_path/'runs'/'mine', whole())


# 5. No room, no rights

LIMIT = 'resource.setrlimit(resource.RLIMIT_FSIZE, ({}, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))'


def limited(moment, n, size): return f'on({moment!r}, {n}, lambda: {LIMIT.format(size)})'


@pytest.mark.parametrize('moment,n,size,says,kept', [
    ('training 3', 2, 400_000, 'state.safetensors could not be written (File too large)', 2),
    ('after replace state.safetensors', 2, 500, 'metrics.json could not be written (File too large)', 2),
    pytest.param('training 2', 2, 200_000, 'last.safetensors could not be written (File too large)', 1,
                 marks=pytest.mark.slow),
    pytest.param('training 1', 2, 200_000, 'last.safetensors could not be written (File too large)', 0,
                 marks=pytest.mark.slow)])
def test_disk_full_at_a_checkpoint(tune, whole, tmp_path, moment, n, size, says, kept):
    run = tmp_path/'runs'/'mine'
    said = sentence(tune(tmp_path, first=limited(moment, n, size)).wait(), f'runs/mine/{says}', 'resume')
    assert (f'of epoch {kept}, in runs/mine/last.safetensors' if kept else 'no epoch was finished') in said
    check_whole(run)
    assert not list(run.rglob('*.part')), 'half of a file takes the space that was missing'
    if kept: assert epoch_of(run/'last.safetensors') == kept and load_run(run, 'last')
    go_on(tune, run, whole())


def test_disk_full_at_the_beginning(tune, whole, tmp_path):
    sentence(tune(tmp_path, first=LIMIT.format(2000)).wait(), 'runs/mine/config.json', 'File too large')
    go_on(tune, tmp_path/'runs'/'mine', whole())


def test_disk_full_at_the_end(tune, whole, tmp_path):
    done = tune(tmp_path, first=limited('after replace metrics.json', 4, 3000), figures=True).wait()
    said = sentence(done, 'runs/mine/curves.png', 'File too large')
    assert 'resume' in said, 'what to do'
    check_whole(tmp_path/'runs'/'mine')
    go_on(tune, tmp_path/'runs'/'mine', whole())


FILL = '''
def fill():
    try:
        with open('runs/ballast', 'wb', 0) as f:
            while True: f.write(bytes(4096))
    except OSError: pass
on('training 2', 2, fill)
'''


def mounted(where, *args):
    where.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(['mount', *args, where], capture_output=True, text=True) if shutil.which('mount') else None
    if done is None or done.returncode: pytest.skip('nothing can be mounted here')


def test_a_disk_that_is_full(tune, whole, tmp_path):
    mounted(tmp_path/'runs', '-t', 'tmpfs', '-o', 'size=8m', 'tmpfs')
    try:
        run = tmp_path/'runs'/'mine'
        sentence(tune(tmp_path, first=FILL).wait(), 'runs/mine/last.safetensors could not be written',
                 'No space left on device', 'of epoch 1', 'resume')
        check_whole(run)
        sentence(tune(tmp_path, resume=True).wait(), 'runs/mine/', 'No space left on device')
        check_whole(run)
        (tmp_path/'runs'/'ballast').unlink()
        go_on(tune, run, whole())
    finally: subprocess.run(['umount', tmp_path/'runs'], check=True)


UNPRIVILEGED = '''
import ctypes
if ctypes.CDLL(None).capset((ctypes.c_uint32*2)(0x20080522, 0), (ctypes.c_uint32*6)()): os._exit(77)
'''  # root without root's rights: the permissions of its own files hold for it, too


def test_a_run_that_cannot_be_written(tune, whole, mine, tmp_path):
    before = snapshot(mine)
    mine.chmod(0o555)
    try:
        done = tune(tmp_path, resume=True, first=UNPRIVILEGED).wait()
        if done.code == 77: pytest.skip('rights cannot be given up here')
        sentence(done, 'runs/mine', 'written (Permission denied)')
        assert snapshot(mine) == before
    finally: mine.chmod(0o755)
    go_on(tune, mine, whole(), first=UNPRIVILEGED)


@pytest.mark.parametrize('resume', [False, True])
def test_a_folder_of_runs_that_cannot_be_written(tune, tmp_path, resume):
    (tmp_path/'runs').mkdir(mode=0o555)
    done = tune(tmp_path, resume=resume, first=UNPRIVILEGED).wait()
    if done.code == 77: pytest.skip('rights cannot be given up here')
    sentence(done, 'the run folder runs/mine cannot be made', 'can be written to')
    assert not names(tmp_path/'runs')


def test_a_folder_that_becomes_unwritable(tune, whole, tmp_path):
    run = tmp_path/'runs'/'mine'
    done = tune(tmp_path, first=UNPRIVILEGED + "on('training 2', 2, lambda: os.chmod('runs/mine', 0o555))").wait()
    if done.code == 77: pytest.skip('rights cannot be given up here')
    sentence(done, 'runs/mine/', 'could not be written (Permission denied)', 'of epoch 1', 'resume')
    run.chmod(0o755)
    check_whole(run)
    go_on(tune, run, whole())


def test_a_read_only_disk(tune, whole, mine, tmp_path):
    before = snapshot(mine)
    mounted(tmp_path/'runs', '--bind', tmp_path/'runs')
    try:
        subprocess.run(['mount', '-o', 'remount,bind,ro', tmp_path/'runs'], check=True)
        sentence(tune(tmp_path, resume=True).wait(), 'runs/mine', 'cannot be')
        assert snapshot(mine) == before
    finally: subprocess.run(['umount', tmp_path/'runs'], check=True)
    go_on(tune, mine, whole())


# 6. Files that are not what the run wrote

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


def test_the_pickles_would_run(tmp_path):
    for i, o in enumerate([plain_pickle, torch_pickle]):
        o(tmp_path/'file', tmp_path/f'marker{i}')
        if o is plain_pickle: pickle.loads((tmp_path/'file').read_bytes())
        else: torch.load(tmp_path/'file', weights_only=False)
        assert (tmp_path/f'marker{i}').exists()


@pytest.mark.parametrize('damage', DAMAGE)
def test_a_damaged_state_is_refused(tune, whole, mine, tmp_path, damage):
    good = (mine/'state.safetensors').read_bytes()
    DAMAGE[damage](mine/'state.safetensors', tmp_path/'marker')
    before = snapshot(mine)
    sentence(tune(tmp_path, resume=True).wait(), 'runs/mine/state.safetensors')
    assert snapshot(mine) == before and not (tmp_path/'marker').exists()
    (mine/'state.safetensors').write_bytes(good)
    if damage == 'half': go_on(tune, mine, whole())


@pytest.mark.parametrize('what', ['state', 'last', 'best', 'average'])
def test_a_file_of_another_run_is_refused(tune, mine, killed, tmp_path, what):
    shutil.copy(killed(seed=8)/f'{what}.safetensors', mine)
    before = snapshot(mine)
    sentence(tune(tmp_path, resume=True).wait(), f'runs/mine/{what}.safetensors',
             *(['seed was 8 and is 7'] if what == 'state' else []))
    assert snapshot(mine) == before


def test_weights_as_a_state_are_refused(tune, mine, tmp_path):
    shutil.copy(mine/'last.safetensors', mine/'state.safetensors')
    sentence(tune(tmp_path, resume=True).wait(), 'runs/mine/state.safetensors')


def test_a_state_without_its_weights_is_refused(tune, mine, tmp_path):
    (mine/'best.safetensors').unlink()
    sentence(tune(tmp_path, resume=True).wait(), 'runs/mine/best.safetensors is missing')


def test_weights_without_a_state_are_refused(tune, mine, tmp_path):
    (mine/'state.safetensors').unlink()
    before = snapshot(mine)
    sentence(tune(tmp_path, resume=True).wait(), 'runs/mine has no state.safetensors')
    assert snapshot(mine) == before


@pytest.mark.parametrize('what', ['best', 'last', 'average'])
@pytest.mark.parametrize('damage', ['a bit in the middle', 'half', 'a pickle'])
def test_damaged_weights_do_not_survive(tune, whole, killed, tmp_path, what, damage):
    "They are refused, or made anew: a run does not end as finished with weights that nobody can use"
    mine = Path(shutil.copytree(killed(('before replace metrics.json', 5)), tmp_path/'runs'/'mine'))
    DAMAGE[damage](mine/f'{what}.safetensors', tmp_path/'marker')
    weights = lambda: {k: v for k, v in snapshot(mine).items() if k.suffix == '.safetensors'}
    before = weights()
    done = tune(tmp_path, resume=True).wait()
    assert not (tmp_path/'marker').exists()
    if done.code == 0: return check_same(mine, whole())
    sentence(done, f'runs/mine/{what}.safetensors')
    assert weights() == before


@pytest.mark.parametrize('name,content', [('config.json', ''), ('config.json', '[]'), ('metrics.json', '{"a"'),
                                          ('config.json', '{"seed": 7}')])
def test_damaged_json_is_refused(tune, mine, tmp_path, name, content):
    (mine/name).write_text(content)
    before = snapshot(mine)
    sentence(tune(tmp_path, resume=True).wait(), 'runs/mine')
    assert snapshot(mine) == before


@pytest.fixture
def copied(whole, tmp_path): return Path(shutil.copytree(whole(), tmp_path/'runs'/'mine'))


@pytest.fixture
def image(digits): return next((digits/'val'/'3').iterdir())


@pytest.mark.parametrize('damage', DAMAGE)
@pytest.mark.parametrize('weights', WEIGHTS)
def test_damaged_weights_do_not_predict(copied, image, refused_here, tmp_path, weights, damage):
    DAMAGE[damage](copied/f'{weights}.safetensors', tmp_path/'marker')
    refused_here('resnet_predict', 'mine', image, '--weights', weights, says=[f'runs/mine/{weights}.safetensors'])
    assert not (tmp_path/'marker').exists()


def test_exchanged_weights_do_not_predict(copied, image, refused_here):
    best, last = (copied/f'{o}.safetensors' for o in ('best', 'last'))
    one, two = best.read_bytes(), last.read_bytes()
    best.write_bytes(two)
    last.write_bytes(one)
    for o in 'best', 'last': refused_here('resnet_predict', 'mine', image, '--weights', o,
                                          says=[f'runs/mine/{o}.safetensors was exchanged'])


@pytest.mark.parametrize('changes', [dict(arch='cifar_resnet20'), dict(seed=8)], ids=['network', 'seed'])
@pytest.mark.parametrize('weights', WEIGHTS)
def test_weights_of_another_run_do_not_predict(copied, whole, image, refused_here, weights, changes):
    shutil.copy(whole(**changes)/f'{weights}.safetensors', copied)
    refused_here('resnet_predict', 'mine', image, '--weights', weights,
                 says=[f'runs/mine/{weights}.safetensors was exchanged'])


# 7. Images that go while they are needed

@pytest.mark.parametrize('what,split,workers', [
    pytest.param(*o, marks=[] if o in (('gone', 'val', 0), ('corrupt', 'train', 2)) else pytest.mark.slow)
    for o in product(['gone', 'corrupt'], ['train', 'val'], [0, 2])])
def test_an_image_goes_in_the_middle(tune, whole, digits, tmp_path, what, split, workers):
    changes, data = dict(resident=False, workers=workers), shutil.copytree(digits, tmp_path/'data')
    file = sorted((data/split/'5').iterdir())[1]
    act = f'os.remove({str(file)!r})' if what == 'gone' else f"Path({str(file)!r}).write_bytes(b'GIF89a nothing')"
    kept = 1 if split == 'val' else 2
    moment = 'training 2' if split == 'val' else 'validation 2'
    done = tune(tmp_path, data=data, first=f'on({moment!r}, 1, lambda: {act})', **changes).wait()
    sentence(done, file, f'of epoch {kept}', 'resume goes on from it')
    run = tmp_path/'runs'/'mine'
    check_whole(run)
    before = snapshot(run)
    done = tune(tmp_path, resume=True, data=data, **changes).wait()
    assert done.code == 2 and f'data.{split} was' in done.err.splitlines()[-1], done.err
    assert snapshot(run) == before
    shutil.copy(digits/file.relative_to(data), file)
    go_on(tune, run, whole(**changes), data=data, **changes)


def test_a_worker_is_killed(tune, whole, tmp_path):
    changes = dict(resident=False, workers=2)
    act = 'os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)'
    done = tune(tmp_path, first=f"on('training 2', 1, lambda: {act})", **changes).wait()
    sentence(done, 'a process that loads images was killed', 'of epoch 1', 'resume goes on from it')
    go_on(tune, tmp_path/'runs'/'mine', whole(**changes), **changes)


# 8. A clock that goes backwards

BACKWARDS = '''
import datetime as d
real,begun = time.time,time.time()
time.time = lambda: begun - 1000*(real() - begun)
time.time_ns = lambda: int(time.time()*1e9)
class Backwards(d.datetime):
    @classmethod
    def now(cls, tz=None): return cls.fromtimestamp(time.time(), tz)
runs.datetime = d.datetime = Backwards
'''


def test_a_clock_that_goes_backwards(tune, whole, tmp_path):
    run = tmp_path/'runs'/'mine'
    assert tune(tmp_path, first=BACKWARDS, kills=[('training 3', 2)]).wait().code == -signal.SIGKILL
    go_on(tune, run, whole(), first=BACKWARDS)
    assert (pd.read_csv(run/'history.csv')[['seconds', 'images/s']] > 0).all(axis=None)
    assert 0 < read(run, 'metrics.json')['seconds'] < 100


# 9. Two at once

def test_two_of_one_name(tune, whole, tmp_path):
    "The second is refused in one sentence, and the first does not notice"
    first = tune(tmp_path, first="on('training 2', 2, lambda: os.kill(os.getpid(), signal.SIGSTOP))").stopped()
    run = tmp_path/'runs'/'mine'
    before = snapshot(run)
    begun = time.monotonic()
    sentence(tune(tmp_path, resume=True).wait(), 'runs/mine is being written by another process')
    assert time.monotonic() - begun < 30
    sentence(tune(tmp_path).wait(), 'runs/mine exists already')
    assert snapshot(run) == before
    os.kill(first.pid, signal.SIGCONT)
    assert first.wait().code == 0
    check_same(run, whole())


def test_two_begin_at_once(tune, whole, tmp_path):
    "One of them trains, whichever"
    both = [tune(tmp_path, resume=True) for _ in range(2)]
    for o in both: o.wait()
    codes = sorted(o.code for o in both)
    assert codes in ([0, 0], [0, 2]), [o.err for o in both]
    for o in both:
        if o.code: sentence(o, 'runs/mine is being written by another process')
    check_same(tmp_path/'runs'/'mine', whole())


def test_orphaned_workers_do_not_hold_the_run(tune, whole, tmp_path):
    "Only the main process is killed; its workers need some seconds to notice"
    changes = dict(resident=False, workers=2)
    assert tune(tmp_path, kills=[('training 2', 2)], **changes).wait().code == -signal.SIGKILL
    go_on(tune, tmp_path/'runs'/'mine', whole(**changes), **changes)


# 10. No number, and Ctrl-C

@pytest.mark.parametrize('moment,says', [('training 3', 'in epoch 3, batch 2, at a learning rate of '),
                                         ('validation 3', 'the validation loss is nan after epoch 3')])
@pytest.mark.parametrize('value', ['math.nan', pytest.param('math.inf', marks=pytest.mark.slow)])
def test_a_loss_that_is_no_number(tune, whole, tmp_path, moment, says, value):
    done = tune(tmp_path, first=f"on({moment!r}, 2, lambda: now['learn'].xb[0].fill_({value}))").wait()
    sentence(done, says, 'the loss is nan' if 'training' in moment else '', 'of epoch 2, in runs/mine/last.safetensors')
    run = tmp_path/'runs'/'mine'
    assert epoch_of(run/'last.safetensors') == 2 and load_run(run, 'last')
    assert all(torch.isfinite(t).all() for t in read_tensor_file(run/'last.safetensors')[0].values())
    assert read(run, 'metrics.json')['status'] == 'failed'
    go_on(tune, run, whole())


def test_a_rate_that_is_too_high(tune, tmp_path):
    done = tune(tmp_path, opt='sgd', schedule='flat', base_lr=1e20, ema=None).wait()
    sentence(done, 'the loss is', 'in epoch ', 'batch ', 'at a learning rate of ', 'no epoch was finished')


@pytest.mark.parametrize('moment,sent', [
    (('training 2', 3), 'SIGINT'), (('before fsync state.safetensors', 2), 'SIGINT'),
    (('after replace state.safetensors', 2), 'SIGTERM'),
    *[pytest.param(o, k, marks=pytest.mark.slow) for k in ('SIGINT', 'SIGTERM')
      for o in (('training 2', 1), ('validation 2', 1), ('after replace last.safetensors', 2),
                ('after fsync metrics.json', 3), ('before replace metrics.json', 5))]])
def test_interrupted(tune, whole, tmp_path, moment, sent):
    "By Ctrl-C, or by what ends a job"
    done = tune(tmp_path, first=f'on(*{moment}, lambda: os.kill(os.getpid(), signal.{sent}))').wait()
    sentence(done, 'interrupted', 'runs/mine', 'resume')
    run = tmp_path/'runs'/'mine'
    assert read(run, 'metrics.json')['status'] == 'interrupted'
    check_whole(run)
    go_on(tune, run, whole())


# 11. What other programs read

def lines(done): return [json.loads(o) for o in done.out.splitlines()]


@pytest.mark.parametrize('moment', [('training 3', 2), ('after replace state.safetensors', 2),
                                    ('after replace last.safetensors', 3)], ids=lambda o: o[0])
def test_json_lines(tune, tmp_path, moment):
    "A line for each epoch, and nothing else, over all parts of the run"
    done = tune(tmp_path, json=True, kills=[moment]).wait()
    assert done.code == -signal.SIGKILL
    found = lines(done) + lines(go_on(tune, tmp_path/'runs'/'mine', json=True))
    assert [(o['run'], o['epoch']) for o in found] == [('mine', 1), ('mine', 2), ('mine', 3)]
    assert [[o[k] for k in COLUMNS] for o in found] == history(tmp_path/'runs'/'mine').values.tolist()


def test_no_json_line_twice(tune, tmp_path):
    "Between the table and the line, the line may be lost; it never comes twice"
    done = tune(tmp_path, json=True, kills=[('after replace history.csv', 2)]).wait()
    assert done.code == -signal.SIGKILL
    found = [o['epoch'] for o in lines(done) + lines(go_on(tune, tmp_path/'runs'/'mine', json=True))]
    assert found in ([1, 3], [1, 2, 3])


def test_json_of_a_finished_run(tune, whole, tmp_path):
    shutil.copytree(whole(), tmp_path/'runs'/'mine')
    assert not lines(go_on(tune, tmp_path/'runs'/'mine', json=True)), 'it has no further epoch'


@pytest.mark.parametrize('moment', [
    ('training 3', 2), ('after replace state.safetensors', 2), ('after replace history.csv', 3),
    pytest.param(('before replace metrics.json', 3), marks=pytest.mark.slow)], ids=lambda o: o[0])
def test_tensorboard(tune, tmp_path, moment):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    assert tune(tmp_path, tensorboard=True, kills=[moment]).wait().code == -signal.SIGKILL
    run = tmp_path/'runs'/'mine'
    go_on(tune, run, tensorboard=True)
    board = EventAccumulator(str(run/'tensorboard')).Reload()
    for k in 'train_loss', 'valid_loss', 'accuracy':
        assert [o.step for o in board.Scalars(k)] == [1, 2, 3], k
        assert [o.value for o in board.Scalars(k)] == pytest.approx(history(run)[k].tolist(), abs=1e-6)


# 12. Values and files

def same(a, b):
    "Equal in type, value and order, to the bit"
    if isinstance(a, (torch.Tensor, np.ndarray)):
        bits = lambda o: o.tobytes() if isinstance(o, np.ndarray) else o.reshape(-1).view(torch.uint8).numpy().tobytes()
        return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)
    if type(a) is not type(b): return False
    if isinstance(a, dict): return same(list(a), list(b)) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float): return np.float64(a).tobytes() == np.float64(b).tobytes() or a != a and b != b
    return a == b


try:
    from hypothesis import HealthCheck, given, settings, strategies as st
    from hypothesis.extra.numpy import array_shapes, arrays
except ImportError: pass
else:
    DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.uint8, torch.int8,
              torch.int16, torch.int32, torch.int64]

    @st.composite
    def tensors(draw):
        shape, dtype = draw(st.lists(st.integers(0, 3), max_size=3)), draw(st.sampled_from(DTYPES))
        n = int(np.prod(shape, dtype=int))
        size = torch.empty(0, dtype=dtype).element_size()
        raw = bytearray(draw(st.binary(min_size=n*size, max_size=n*size)))
        if dtype == torch.bool: raw = bytearray(o % 2 for o in raw)
        t = (torch.frombuffer(raw, dtype=dtype) if n else torch.empty(0, dtype=dtype)).reshape(shape)
        return t.transpose(0, -1) if len(shape) > 1 and draw(st.booleans()) else t

    ARRAYS = arrays(st.sampled_from('f2 f4 f8 ? i1 i2 i4 i8 u1 u2 u4 u8'.split()),
                    array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
    PLAIN = st.none() | st.booleans() | st.integers(-2**700, 2**700) | st.floats() | st.text()
    KEYS = st.text() | st.integers(-2**70, 2**70)
    VALUES = st.recursive(PLAIN | tensors() | ARRAYS, lambda o: st.lists(o, max_size=4)
                          | st.dictionaries(KEYS, o, max_size=4) | st.lists(o, max_size=4).map(tuple), max_leaves=12)
    COMMON = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

    @settings(max_examples=150, **COMMON)
    @given(VALUES)
    def test_values_come_back(value):
        kept = {}
        about = json.loads(json.dumps(flatten_state(value, kept)))
        assert all(isinstance(o, torch.Tensor) for o in kept.values())
        assert same(restore_state(about, kept), value)

    @settings(max_examples=60, **COMMON)
    @given(VALUES)
    def test_values_come_back_from_a_file(tmp_path_factory, value):
        path = tmp_path_factory.getbasetemp()/'state.safetensors'
        path.write_bytes(state_file(value))
        assert same(read_state(path), value)
        assert state_file(value) == state_file(value)

    @settings(max_examples=80, **COMMON)
    @given(data=st.data())
    def test_any_changed_byte_is_noticed(tmp_path_factory, data):
        path = tmp_path_factory.getbasetemp()/'changed.safetensors'
        content = bytearray(state_file({'a': (1, 2.5, None), 'b': torch.arange(5.), 3: torch.tensor(True)}))
        at, bit = data.draw(st.integers(0, len(content)-1)), data.draw(st.integers(0, 7))
        content[at] ^= 1 << bit
        path.write_bytes(content)
        with pytest.raises(InputError, match='is damaged|is no whole file'): read_state(path)

    @settings(max_examples=60, **COMMON)
    @given(content=st.binary(max_size=200))
    def test_any_bytes_are_no_state(tmp_path_factory, content):
        path = tmp_path_factory.getbasetemp()/'bytes.safetensors'
        path.write_bytes(content)
        with pytest.raises(InputError, match='is no whole file'): read_state(path)


@pytest.mark.parametrize('value', [object(), {1, 2}, {'a': [print]}, b'bytes', 1j, np.array(['text']), np.array([None]),
                                   np.datetime64('2020-01-01'), {(1, 2): 3}], ids=lambda o: type(o).__name__)
def test_what_cannot_be_stored_is_refused(value):
    with pytest.raises(InputError, match='not stored'): state_file({'here': value})


@pytest.mark.parametrize('about', [{'list': []}, {'dict': 3}, {'dict': [['a', {'tensor': 'b'}]]}, {'a': 1, 'b': 2}, {},
                                   {'dict': [[[], 1]]}], ids=repr)
def test_a_sound_file_of_another_kind_is_refused(tmp_path, about):
    (tmp_path/'state.safetensors').write_bytes(tensor_file({'a': torch.ones(2)}, about))
    with pytest.raises(InputError, match='state.safetensors'): read_state(tmp_path/'state.safetensors')


def test_one_key_within_another():
    "Names with dots, and a number beside its text"
    value = {'a': {'b': torch.zeros(1)}, 'a.b': torch.ones(1), 1: torch.tensor(2.), '1': torch.tensor(3.)}
    kept = {}
    assert same(restore_state(flatten_state(value, kept), kept), value)
