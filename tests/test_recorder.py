"""What is told of a training while it happens: table, metrics, best epoch, lines for programs."""
import json
import shutil
import signal

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from fastai.vision.all import Callback, EarlyStoppingCallback, Learner
from resnet_nbdev.data import get_data
from resnet_nbdev.recorder import is_patience_over
from resnet_nbdev.resnet import create_resnet
from resnet_nbdev.runs import compare_runs, load_run
from resnet_nbdev.training import fine_tune
from safetensors.torch import load_file

from conftest import refuses
from forked import COLUMNS, epoch_of, go_on, history, read
from toys import learner, named, same


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
    # it asks for accuracy too
    monkeypatch.setattr('resnet_nbdev.training.plot_predictions', lambda learn: plt.figure())
    fine_tune(learn, 'mine', 0, 3, runs=tmp_path/'runs')
    run = tmp_path/'runs'/'mine'
    assert (epoch_of(run/'best.safetensors'), epoch_of(run/'last.safetensors')) == (2, 3)
    for name, i in (('best', 1), ('last', 2)):
        weights = load_file(run/f'{name}.safetensors')
        assert all((weights[k.removeprefix('body.').removeprefix('head.')] == v).all() for k, v in kept[i].items())
    assert read(run, 'metrics.json')['best']['accuracy'] == pytest.approx(0.9)
    assert not load_run(run)[0].training


def test_average_of_last_epochs(trained):
    learn = trained['mean']
    saved, (*_, before, last) = load_file(learn.run_path/'average.safetensors'), map(named, learn.kept.states)
    assert len(learn.kept.states) == 3 and saved.keys() == last.keys()
    for k, v in saved.items():
        want = ((before[k].double() + last[k].double())/2).to(v.dtype) if v.is_floating_point() else last[k]
        assert torch.equal(v, want), k
    assert not same(saved, last)
    model, _ = load_run(learn.run_path, 'average')
    assert same(named(model.state_dict()), saved)
    metrics = json.loads((learn.run_path/'metrics.json').read_text())
    assert 0 <= metrics['average']['accuracy'] <= 1 and 'valid_loss' in metrics['average']


def test_moving_average_is_saved(trained):
    learn = trained['ema']
    saved = load_file(learn.run_path/'average.safetensors')
    assert same(saved, named(learn.weight_average.model_average.state_dict()))
    assert not same(saved, load_file(learn.run_path/'last.safetensors'))


# what other programs read

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


# validated now and then

def test_validated_after_the_first_epoch_every_so_many_and_the_last(tmp_path):
    "Rows of the others have no validation figures, and none of them is the best"
    def start(name, stop=None, **kw):
        data = get_data('digits', max_per_class=8, bs=16, num_workers=0)
        made = learner(dls=data, plan='discriminative', cbs=stop)
        return fine_tune(made, name, 2, 5, 1e-2, runs=tmp_path, **kw)
    run = start('mine', valid_every=3).run_path
    rows = pd.read_csv(run/'history.csv')
    seen = rows.valid_loss.notna()
    assert seen.tolist() == [True, True, False, False, True, False, True] and rows.train_loss.notna().all()
    assert rows.accuracy.notna().equals(seen)
    metrics = json.loads((run/'metrics.json').read_text())
    assert metrics['best']['accuracy'] == rows.accuracy.max() and metrics['last']['epoch'] == 7
    refuses('valid_every was 3 and is 1', start, 'mine', resume=True)
    refuses('early_stopping looks at every validation', start, 'other', valid_every=2, stop=EarlyStoppingCallback())
    assert len(compare_runs(runs=tmp_path)[0]) == 1


def test_patience_counts_validated_epochs():
    found = [(1., .5), (None, None), (2., .4), (None, None), (3., .3)]
    rows = [dict(cycle=1, valid_loss=loss, accuracy=score) for loss, score in found]
    assert [is_patience_over(rows[:i], 'accuracy', 2) for i in range(1, 6)] == [False]*4 + [True]
