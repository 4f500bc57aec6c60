"""A run's folder, its lock and its identity: what is another run is refused, and nothing is changed."""
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from PIL import Image
from resnet_nbdev.core import InputError
from resnet_nbdev.folders import config_differences, run_identity, run_path

from conftest import SMALL, refuses
from forked import BASE, STOCK, UNPRIVILEGED, check_same, go_on, names, sentence, snapshot


@pytest.mark.parametrize('name', ['', 'a/b', 'a/', '/tmp', '..', '.', '.hidden', '../up'])
def test_name_of_a_run(name, tmp_path): refuses(['plain name', repr(name)], run_path, name, tmp_path)


def test_name_with_slash(refused_here):
    refused_here('resnet_fine_tune', 'digits', '--name', 'a/b', says=['plain name', "'a/b'"])


def test_existing_run(refused, tmp_path):
    (tmp_path/'runs'/'mine').mkdir(parents=True)
    refused('resnet_fine_tune', 'digits', '--name', 'mine', says=['runs/mine exists already', 'another name'])


def test_runs_that_is_a_file(refused_here, tmp_path):
    (tmp_path/'results').write_text('mine\n')
    refused_here('resnet_fine_tune', 'digits', '--runs', 'results',
                 says=['results/digits-cifar_resnet8 cannot be made', f'{tmp_path}/results is no folder'])
    assert (tmp_path/'results').read_text() == 'mine\n'


def test_runs_without_permission(refused_here, folder, tmp_path):
    "/proc stands in where the user is root, who may write everywhere else"
    if os.geteuid(): (runs := tmp_path/'closed').mkdir(mode=0o500)
    else: runs = Path('/proc/nothing')
    refused_here('resnet_fine_tune', folder, *SMALL, '--name', 'mine', '--runs', runs,
                 says=[f'the run folder {runs}/mine cannot be'])


@pytest.mark.parametrize('resume', [False, True])
def test_a_folder_of_runs_that_cannot_be_written(tune, tmp_path, resume):
    (tmp_path/'runs').mkdir(mode=0o555)
    done = tune(tmp_path, resume=resume, first=UNPRIVILEGED).wait()
    if done.code == 77: pytest.skip('rights cannot be given up here')
    sentence(done, 'the run folder runs/mine cannot be made', 'can be written to')
    assert not names(tmp_path/'runs')


# another run

OTHER = dict(
    epochs=('cycles.2.epochs was 2 and is 3', dict(epochs=3)), base_lr=('cycles.1.rates was', dict(base_lr=2e-2)),
    freeze_epochs=('cycles.1.epochs was 1 and is 2', dict(freeze_epochs=2)),
    arch=('arch was cifar_resnet8 and is cifar_resnet20', dict(arch='cifar_resnet20')),
    seed=('seed was 7 and is 8', dict(seed=8)), bs=('data.bs was 32 and is 16', dict(bs=16)),
    label_smoothing=('learner.label_smoothing was 0.0 and is 0.1', dict(label_smoothing=0.1)),
    plan=('learner.plan.', dict(plan='gradual')), ema=('learner.ema was 0.9 and is 0.8', dict(ema=0.8)),
    schedule=('cycles.2.kind was one_cycle and is flat', dict(schedule='flat')),
    opt=('learner.opt was', dict(opt='sgd')),
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


@pytest.mark.parametrize('name,content', [('config.json', ''), ('config.json', '[]'), ('metrics.json', '{"a"'),
                                          ('config.json', '{"seed": 7}')])
def test_damaged_json_is_refused(tune, mine, tmp_path, name, content):
    (mine/name).write_text(content)
    before = snapshot(mine)
    sentence(tune(tmp_path, resume=True).wait(), 'runs/mine')
    assert snapshot(mine) == before


# two at once

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


def test_what_older_versions_did_not_write():
    "Is what they did: no probe, no taps, each epoch validated, `auto` without bf16"
    new = dict(learner=dict(plan=dict(cut=0, taps=0, probe=False), precision='fp32'), valid_every=1)
    old = dict(learner=dict(plan=dict(cut=0), precision='auto'))
    assert config_differences(run_identity(old), run_identity(new)) == []
    assert config_differences(run_identity(old), run_identity({**new, 'valid_every': 3}))
