"""What a run leaves behind: after its end, after Ctrl-C, after a kill, and after a write that failed."""
import json
import os
import signal
import subprocess
import sys
import time

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from fastai.vision.all import Callback, Learner, fastai_path
from PIL import Image
from resnet_nbdev import runs
from resnet_nbdev.core import InputError
from resnet_nbdev.catalogue import settings_of
from resnet_nbdev.data import get_data
from resnet_nbdev.learner import resnet_learner
from resnet_nbdev.resnet import create_resnet
from resnet_nbdev.recipes import run_recipe
from resnet_nbdev.runs import load_run, predict, write_file
from resnet_nbdev.training import fine_tune
from safetensors import safe_open
from safetensors.torch import load_file

from conftest import environment

FILES = ['best.safetensors', 'config.json', 'curves.png', 'history.csv', 'last.safetensors', 'metrics.json',
         'predictions.png']
UNFINISHED = [*FILES[:-1], 'state.safetensors'] # what it takes to go on


def names(run): return sorted(o.name for o in run.iterdir())


def read(run, name): return json.loads((run/name).read_text())


def epoch_of(path):
    with safe_open(path, 'pt') as f: about = f.metadata()
    return int(about['epoch'] if 'epoch' in about else json.loads(next(iter(about.values())))['epoch'])


def losses(run): return pd.read_csv(run/'history.csv')[['epoch', 'cycle', 'train_loss', 'valid_loss', 'accuracy']]


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


def test_history_and_metrics_agree(digits_run):
    history, metrics = pd.read_csv(digits_run/'history.csv'), read(digits_run, 'metrics.json')
    assert list(history.epoch) == [1, 2, 3] and list(history.cycle) == [1, 2, 2] and not history.isna().any(axis=None)
    assert (metrics['status'], metrics['epochs'], metrics['epochs_planned']) == ('finished', 3, 3)
    for k in ('train_loss', 'valid_loss', 'accuracy'): assert metrics['last'][k] == pytest.approx(history[k].iloc[-1])
    best = history.accuracy.idxmax()
    assert metrics['best']['epoch'] == history.epoch[best]
    assert metrics['best']['accuracy'] == pytest.approx(history.accuracy[best])
    assert metrics['last']['accuracy'] > 0.8, 'three epochs on the digits give about 0.97'
    assert metrics['seconds'] == pytest.approx(history.seconds.sum())
    assert epoch_of(digits_run/'best.safetensors') == history.epoch[best]
    assert epoch_of(digits_run/'last.safetensors') == 3


def test_saved_weights_have_the_accuracy_of_the_table(digits_run):
    "`predict` on the validation images finds what metrics.json says of the best epoch"
    files = sorted((fastai_path('data')/'digits'/'val').glob('*/*.png'))
    found = predict(digits_run, files, k=1)
    right = [c == f.parent.name for c, f in zip(found['class'], files)]
    assert len(files) == 359 and sum(right)/359 == pytest.approx(read(digits_run, 'metrics.json')['best']['accuracy'])


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


def test_a_recipe_with_limits_for_each_split(tmp_path):
    few = lambda **kw: run_recipe(dict(source='digits'), 'few', runs=tmp_path, freeze_epochs=0, epochs=1, device='cpu',
                                  max_per_class=(8, 4), json_lines=True, **kw)
    info = few().dls.info
    assert (info['train'], info['val']) == (80, 40)
    assert few(resume=True).run_path == tmp_path/'few'


def test_best_weights_are_those_of_the_best_epoch(folder, tmp_path, monkeypatch):
    "With an accuracy that is told to rise and fall"
    told = iter([0.2, 0.9, 0.5])

    def accuracy(pred, truth): return torch.tensor(next(told))
    dls = get_data(folder, 16, 16, 8, num_workers=0, device='cpu')
    assert len(dls.valid) == 1
    learn = Learner(dls, create_resnet('cifar_resnet8', 2), metrics=accuracy)
    learn.arch, kept = 'cifar_resnet8', []

    class Keep(Callback):
        def before_validate(self): kept.append({k: v.clone() for k, v in self.learn.model.state_dict().items()})
    learn.add_cb(Keep())
    monkeypatch.setattr('resnet_nbdev.runs.plot_predictions', lambda learn: plt.figure())  # it asks for accuracy too
    fine_tune(learn, 'mine', 0, 3, runs=tmp_path/'runs')
    run = tmp_path/'runs'/'mine'
    assert (epoch_of(run/'best.safetensors'), epoch_of(run/'last.safetensors')) == (2, 3)
    for name, i in (('best', 1), ('last', 2)):
        weights = load_file(run/f'{name}.safetensors')
        assert all((weights[k.removeprefix('body.').removeprefix('head.')] == v).all() for k, v in kept[i].items())
    assert read(run, 'metrics.json')['best']['accuracy'] == pytest.approx(0.9)
    assert not load_run(run)[0].training


# writing

@pytest.mark.parametrize('what', ['replace', 'fsync'])
def test_a_write_that_fails_keeps_the_old_file(what, tmp_path, monkeypatch):
    path = tmp_path/'a.json'
    write_file(path, b'old')

    def fail(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, what, fail)
    with pytest.raises(OSError, match='No space left'): write_file(path, b'new and longer')
    monkeypatch.undo()
    assert path.read_bytes() == b'old'
    assert names(tmp_path) == ['a.json'], 'half of a file takes the space that was missing'
    write_file(path, b'new and longer')
    assert path.read_bytes() == b'new and longer' and names(tmp_path) == ['a.json']


KILLED_WRITER = '''
import os, random, signal, sys, time
from pathlib import Path
from resnet_nbdev.runs import write_file
path, contents = Path(sys.argv[1])/'a.bin', [b'a'*3_000_000, b'b'*2_000_000]
write_file(path, contents[0])
random.seed(1)
for i in range(25):
    if not (pid := os.fork()):
        while True:
            for o in contents: write_file(path, o)
    time.sleep(random.uniform(0.005, 0.05))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert path.read_bytes() in contents, f'a part of a file after kill {i}'
print('whole')
'''


def test_a_killed_writer_leaves_whole_files(tmp_path):
    done = subprocess.run([sys.executable, '-c', KILLED_WRITER, tmp_path], env=environment(), capture_output=True,
                          text=True, timeout=120)
    assert done.stdout == 'whole\n', done.stderr


# a training that is ended from outside

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
    write = runs.Checkpointer.write_metrics
    def interrupted(self, status, **more):
        write(self, status, **more)
        if status == 'running': os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr(runs.Checkpointer, 'write_metrics', interrupted)
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
