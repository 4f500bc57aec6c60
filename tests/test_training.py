"""A training that is ended at any moment goes on as if nothing had happened, and what cannot go on says why."""
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import time
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import Callback
from PIL import Image
from resnet_nbdev import folders
from resnet_nbdev.catalogue import settings_of
from resnet_nbdev.checkpoints import read_tensor_file
from resnet_nbdev.core import InputError
from resnet_nbdev.data import get_data
from resnet_nbdev.learner import resnet_learner
from resnet_nbdev.plans import PLANS
from resnet_nbdev.runs import load_run
from resnet_nbdev.training import fine_tune
from safetensors.torch import load_file

from conftest import SMALL
from forked import (
    BASE,
    DAMAGE,
    STOCK,
    UNPRIVILEGED,
    check_same,
    check_whole,
    epoch_of,
    flags,
    go_on,
    history,
    names,
    plain_pickle,
    read,
    sentence,
    snapshot,
    torch_pickle,
)
from toys import config_of

# killed

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
    bf16=(dict(precision='bf16', channels_last=True, opt='nesterov', schedule='linear'), [
        ('training 2', 2), ('validation 2', 2)]),
    gradual=(dict(plan='gradual', epochs=1), [BETWEEN, BETWEEN, ('before replace state.safetensors', 1), BETWEEN]),
    frozen=(dict(plan='head', bn='frozen', top_k=3, monitor='valid_loss'), [BETWEEN, ('training 3', 3)]))
QUICK = 'average', 'accumulate', 'patience', 'ranger', 'workers', 'gradual', 'bf16'


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


# the same seed, the same run

def test_same_seed_same_bits(tune, whole, tmp_path):
    assert tune(tmp_path).wait().code == 0
    check_same(tmp_path/'runs'/'mine', whole())
    with pytest.raises(AssertionError): check_same(tmp_path/'runs'/'mine', whole(seed=8))


@pytest.mark.parametrize('workers', [1, 2, 4])
def test_resident_loader_with_any_number_of_workers(whole, workers): check_same(whole(workers=workers), whole())


def test_going_on_with_other_workers_and_another_copy(tune, whole, mine, digits, tmp_path):
    "Of the resident loader they are no part of the run, and neither is where the images lie"
    go_on(tune, mine, whole(), workers=3, data=shutil.copytree(digits, tmp_path/'elsewhere'))


# finished

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


# no room, no rights

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


# files that are not what the run wrote

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


# images that go while they are needed

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


# a clock that goes backwards

BACKWARDS = '''
import datetime as d
real,begun = time.time,time.time()
time.time = lambda: begun - 1000*(real() - begun)
time.time_ns = lambda: int(time.time()*1e9)
class Backwards(d.datetime):
    @classmethod
    def now(cls, tz=None): return cls.fromtimestamp(time.time(), tz)
training.datetime = d.datetime = Backwards
'''


def test_a_clock_that_goes_backwards(tune, whole, tmp_path):
    run = tmp_path/'runs'/'mine'
    assert tune(tmp_path, first=BACKWARDS, kills=[('training 3', 2)]).wait().code == -signal.SIGKILL
    go_on(tune, run, whole(), first=BACKWARDS)
    assert (pd.read_csv(run/'history.csv')[['seconds', 'images/s']] > 0).all(axis=None)
    assert 0 < read(run, 'metrics.json')['seconds'] < 100


# no number, and Ctrl-C

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


# what other programs read

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


# what a run leaves behind

FILES = ['best.safetensors', 'config.json', 'curves.png', 'history.csv', 'last.safetensors', 'metrics.json',
         'predictions.png']


def test_files_of_a_run(digits_run):
    assert names(digits_run) == FILES
    config = read(digits_run, 'config.json')
    assert (config['name'], config['arch']) == ('digits-cifar_resnet8', 'cifar_resnet8')
    want = dict(source='digits', arch='cifar_resnet8', seed=42, freeze_epochs=1, epochs=2,
                base_lr=settings_of('digits')['base_lr'])
    assert {k: config['arguments'][k] for k in want} == want
    assert {'python', 'torch', 'fastai', 'resnet_nbdev'} <= config['versions'].keys()
    data = config['data']
    assert (data['train'], data['val'], data['skipped'], data['vocab']) == (1438, 359, 0, [str(i) for i in range(10)])
    assert len(data['fingerprint']) == 64
    for o in ('curves.png', 'predictions.png'):
        with Image.open(digits_run/o) as im: assert im.format == 'PNG' and min(im.size) > 100
    for o in FILES: assert (digits_run/o).stat().st_mode & 0o444, 'others may read it too'


def losses(run): return pd.read_csv(run/'history.csv')[['epoch', 'cycle', 'train_loss', 'valid_loss', 'accuracy']]


def test_same_seed_same_run_and_another_seed_another(digits_run, run_cli, tmp_path):
    for seed in (42, 7):
        done = run_cli('resnet_fine_tune', 'digits', '--epochs', 2, '--seed', seed, '--name', f'seed{seed}')
        assert done.returncode == 0, done.stderr
    same, other = tmp_path/'runs'/'seed42', tmp_path/'runs'/'seed7'
    pd.testing.assert_frame_equal(losses(same), losses(digits_run), check_exact=True)
    one, two = load_file(same/'last.safetensors'), load_file(digits_run/'last.safetensors')
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert (same/'last.safetensors').read_bytes() == (digits_run/'last.safetensors').read_bytes()
    data = [read(o, 'config.json')['data'] for o in (same, digits_run, other)]
    assert data[0] == data[1] == data[2]
    assert (losses(other).train_loss != losses(same).train_loss).all()
    assert (other/'last.safetensors').read_bytes() != (same/'last.safetensors').read_bytes()


def test_cycles_are_recorded(trained):
    "Frozen phase, rates of each group and schedule, as trained"
    config = config_of(trained['mean'])
    first, last = config['cycles']
    assert first == dict(trains_from=4, epochs=1, rates=[1e-3]*4 + [1e-2], kind='one_cycle', pct_start=0.99, div=25.)
    np.testing.assert_allclose(last.pop('rates'), [5e-3*10**(i/4 - 1) for i in range(5)], rtol=1e-6)
    assert last == dict(trains_from=0, epochs=2, kind='one_cycle', pct_start=0.3, div=5.)
    assert config['learner']['plan'] == json.loads(json.dumps(vars(PLANS['discriminative'])))
    head = config_of(trained['head'])
    assert [(o['trains_from'], o['kind'], o['pct_start']) for o in head['cycles']] == [(3, 'flat_cos', 0.75)]*2
    assert [len(o['rates']) for o in head['cycles']] == [4, 4] and 'bn_freeze' in head['callbacks']
    assert {k: head['learner']['plan'][k] for k in ('cut', 'hidden', 'dropout', 'bn')} == \
        dict(cut=2, hidden=5, dropout=0.3, bn='frozen')
    assert [o['rates'] for o in config_of(trained['ema'])['cycles']] == [[1e-2], [5e-3]]
    history = pd.read_csv(trained['mean'].run_path/'history.csv')
    assert list(history.cycle) == [1, 2, 2]


def test_full_disk(run_cli, start_cli, folder, tmp_path):
    "A file size limit stands in: the weights (300 kB) cannot be written; the run says so and keeps what it has"
    import resource
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limit[1]))
    try: p = start_cli('resnet_fine_tune', folder, *SMALL, '--name', 'mine')
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert p.wait(100) == 2, (tmp_path/'err').read_text()
    said = (tmp_path/'err').read_text()
    assert said.startswith('resnet_fine_tune: ') and said.count('\n') == 1
    assert 'File too large' in said and 'runs/mine' in said and 'None' not in said
    run = tmp_path/'runs'/'mine'
    assert json.loads((run/'metrics.json').read_text())['status'] == 'failed'
    assert sorted(o.name for o in run.iterdir()) == ['config.json', 'metrics.json']


# a training that is ended from outside

UNFINISHED = [*FILES[:-1], 'state.safetensors'] # what it takes to go on


def wait_for(condition, p, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert p.poll() is None and time.monotonic() < end, f'exit code {p.poll()} before it came that far'
        time.sleep(0.02)


def rows(run): return len((run/'history.csv').read_text().splitlines()) - 1 if (run/'history.csv').exists() else 0


def nobody_left(group, seconds=10):
    "True if the process group has no living process any more"
    for _ in range(seconds*10):
        try: os.killpg(group, 0)
        except ProcessLookupError: return True
        time.sleep(0.1)
    return False


def interrupt(p, tmp_path):
    "What a terminal does at Ctrl-C; returns what the command said"
    os.killpg(p.pid, signal.SIGINT)
    try: code = p.wait(30)
    except subprocess.TimeoutExpired: pytest.fail('Ctrl-C was not heard')
    assert code == 2, (tmp_path/'err').read_text()
    assert nobody_left(p.pid), 'a process that loads images is still there'
    said = (tmp_path/'err').read_text()
    assert said.startswith('resnet_fine_tune: interrupted') and said.count('\n') == 1, said
    return said


def readable(run):
    "Every file of a run is whole; returns how many"
    for f in (found := [o for o in run.iterdir() if not o.name.startswith('.')]):
        if f.suffix == '.json': json.loads(f.read_text())
        elif f.suffix == '.csv': assert not pd.read_csv(f).isna().any(axis=None)
        elif f.suffix == '.safetensors': load_file(f)
        else: Image.open(f).load()
    return len(found)


def test_ctrl_c(start_cli, tmp_path, digits_run, digit_files):
    "Exit code 2, one sentence, and a run that can be used"
    run = tmp_path/'runs'/'mine'
    p = start_cli('resnet_fine_tune', 'digits', '--epochs', 50, '--workers', 2, '--name', 'mine')
    wait_for(lambda: rows(run) >= 2, p)
    assert 'runs/mine' in interrupt(p, tmp_path)
    metrics, history = read(run, 'metrics.json'), losses(run)
    assert (metrics['status'], metrics['epochs'], metrics['epochs_planned']) == ('interrupted', len(history), 51)
    assert 2 <= len(history) < 51 and readable(run) == 7 and names(run) == UNFINISHED
    assert epoch_of(run/'last.safetensors') - len(history) in (0, 1), 'the weights are written before the table'
    for weights in ('best', 'last'): assert load_run(run, weights)[1]['arch'] == 'cifar_resnet8'


def test_ctrl_c_leaves_a_run_for_predict(start_cli, run_cli, tmp_path, digit_files):
    run = tmp_path/'runs'/'mine'
    p = start_cli('resnet_fine_tune', 'digits', '--epochs', 50, '--name', 'mine')
    wait_for(lambda: rows(run) >= 1, p)
    interrupt(p, tmp_path)
    done = run_cli('resnet_predict', 'mine', digit_files[3], '--json')
    assert done.returncode == 0 and len(json.loads(done.stdout)[0]['predictions']) == 3, done.stderr


def test_ctrl_c_before_the_first_epoch_is_finished(start_cli, refused_here, tmp_path, digit_files):
    run = tmp_path/'runs'/'mine'
    p = start_cli('resnet_fine_tune', 'digits', '--epochs', 50, '--workers', 2, '--name', 'mine')
    wait_for(lambda: (run/'metrics.json').exists(), p)
    assert 'runs/mine' in interrupt(p, tmp_path)
    assert read(run, 'metrics.json')['status'] == 'interrupted' and readable(run) == 2
    assert names(run) == ['config.json', 'metrics.json']
    refused_here('resnet_predict', 'mine', digit_files[0],
                 says=['runs/mine has no best.safetensors', 'no epoch of it was finished'])


def test_ctrl_c_while_the_run_begins(start_cli, tmp_path):
    "From the moment in which the folder is there, its state is told"
    run = tmp_path/'runs'/'mine'
    p = start_cli('resnet_fine_tune', 'digits', '--epochs', 50, '--name', 'mine')
    wait_for(run.exists, p)
    interrupt(p, tmp_path)
    assert read(run, 'metrics.json')['status'] == 'interrupted' and readable(run) == 2


def test_ctrl_c_that_waits_until_the_run_has_begun(tmp_path, monkeypatch):
    "It is held while the folder is made, and heard before the training has begun"
    monkeypatch.chdir(tmp_path)
    write = folders.RunFolder.write_metrics
    def interrupted(self, status, **more):
        write(self, status, **more)
        if status == 'running': os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr(folders.RunFolder, 'write_metrics', interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler) # which pytest-xdist has taken away
    try:
        with pytest.raises(KeyboardInterrupt): fine_tune(resnet_learner(get_data('digits'), 'cifar_resnet8'), 'mine')
    finally: signal.signal(signal.SIGINT, before)
    assert read(tmp_path/'runs'/'mine', 'metrics.json')['status'] == 'interrupted'
    assert names(tmp_path/'runs'/'mine') == ['config.json', 'metrics.json']


def test_kill(start_cli, tmp_path):
    "A power cut: what is there is whole, and is the last epoch that was finished"
    run = tmp_path/'runs'/'mine'
    p = start_cli('resnet_fine_tune', 'digits', '--epochs', 50, '--workers', 2, '--name', 'mine')
    wait_for(lambda: rows(run) >= 1, p)
    time.sleep(0.3)
    os.killpg(p.pid, signal.SIGKILL)
    assert p.wait(10) == -signal.SIGKILL and nobody_left(p.pid)
    assert readable(run) >= 6 and read(run, 'metrics.json')['status'] == 'running'
    assert load_run(run, 'last')[1]['name'] == 'mine' and epoch_of(run/'last.safetensors') >= rows(run) >= 1


def test_error_in_the_middle(folder, tmp_path):
    "An exception of the user's own callback passes, and the run tells that it failed"
    class Fault(Callback):
        def before_validate(self):
            if self.epoch == 1: raise ZeroDivisionError('mine')
    learn = resnet_learner(get_data(folder, 16, 16, 8, num_workers=0, device='cpu'), 'cifar_resnet8', cbs=Fault())
    with pytest.raises(ZeroDivisionError, match='mine'): fine_tune(learn, 'mine', 0, 3, runs=tmp_path)
    assert read(tmp_path/'mine', 'metrics.json')['status'] == 'failed' and rows(tmp_path/'mine') == 1
    assert readable(tmp_path/'mine') == 7
    with pytest.raises(InputError, match='exists already'): fine_tune(learn, 'mine', 0, 3, runs=tmp_path)
