"""Runs compared, loaded and used, and what cannot be used says why."""
import json
import pickle
import shutil
import socket
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import fastai_path, set_seed
from resnet_nbdev.catalogue import data_path
from resnet_nbdev.data import image_loader
from resnet_nbdev.runs import compare_runs, load_run, predict

from conftest import refuses
from forked import DAMAGE, WEIGHTS, read
from toys import config_of, same


def test_saved_weights_have_the_accuracy_of_the_table(digits_run):
    "`predict` on the validation images finds what metrics.json says of the best epoch"
    files = sorted((fastai_path('data')/'digits'/'val').glob('*/*.png'))
    found = predict(digits_run, files, k=1)
    right = [c == f.parent.name for c, f in zip(found['class'], files)]
    assert len(files) == 359 and sum(right)/359 == pytest.approx(read(digits_run, 'metrics.json')['best']['accuracy'])


def looks(learn, images, weights, seed, n):
    "Probabilities of one plain look and `n` augmented ones"
    data = config_of(learn)['data']
    set_seed(seed)
    model, _ = load_run(learn.run_path, weights)
    with torch.no_grad():
        return [torch.cat([model(x).softmax(1) for x, in image_loader(
            images, data['presize'], data['resize'], data['augment'], 5, 'cpu', augmented=i > 0)]) for i in range(n+1)]


def table(found): # as (image, class), whatever the order
    return found.pivot(index='image', columns='class', values='probability').to_numpy()


@pytest.mark.parametrize('weights', ['last', 'average'])
def test_several_looks(weights, trained, images):
    "The mean of all; each image's probabilities sum to one; without augmentation nothing is random"
    learn, kw = trained['mean'], dict(k=3, weights=weights, bs=5, device='cpu')
    one, again = (predict(learn.run_path, images, **kw) for _ in range(2))
    pd.testing.assert_frame_equal(one, again, check_exact=True)
    want = looks(learn, images, weights, 5, 2)
    np.testing.assert_allclose(table(one), want[0], atol=1e-6)
    set_seed(5)
    several = predict(learn.run_path, images, tta=2, **kw)
    np.testing.assert_allclose(table(several), torch.stack(want).mean(0), atol=1e-6)
    np.testing.assert_allclose(table(several).sum(1), 1, atol=1e-5)
    assert np.abs(table(several) - table(one)).max() > 1e-4
    assert list(several['rank']) == [1, 2, 3]*len(images)
    assert (several.groupby('image').probability.diff().dropna() <= 0).all()
    refuses('tta must', predict, learn.run_path, images, tta=-1)


def test_weights_that_a_run_does_not_have(trained, images):
    ask = partial(predict, trained['head'].run_path, images[0])
    refuses(['no average.safetensors', 'it has best, last'], ask, weights='average')
    refuses("'best', 'last' or 'average', not 'mean'", ask, weights='mean')


def test_compare_runs(trained):
    folder = trained['mean'].run_path.parent
    table, fig = compare_runs(runs=folder)
    assert list(table.index) == ['ema', 'head', 'mean'] and table.index.name == 'run'
    assert list(table) == ['arch', 'weights', 'status', 'epochs', 'parameters', 'best_epoch', 'accuracy', 'valid_loss',
                           'last', 'average', 'seconds']
    for name, learn in trained.items():
        metrics, row = json.loads((learn.run_path/'metrics.json').read_text()), table.loc[name]
        assert (row.arch, row.weights, row.status, row.epochs) == ('cifar_resnet8', 'none', 'finished', 3)
        assert row.parameters == sum(p.numel() for p in learn.model.parameters())
        assert (row.best_epoch, row.accuracy, row['last']) == \
            (metrics['best']['epoch'], metrics['best']['accuracy'], metrics['last']['accuracy'])
        assert np.isnan(row.average) if name == 'head' else row.average == metrics['average']['accuracy']
    assert [o.get_label() for o in fig.axes[0].lines] == ['ema', 'head', 'mean']
    some, fig = compare_runs('mean', folder/'ema', runs=folder, metric='valid_loss')
    assert list(some.index) == ['mean', 'ema'], 'as asked for'
    history = pd.read_csv(folder/'mean'/'history.csv')
    assert list(fig.axes[0].lines[0].get_ydata()) == list(history.valid_loss)
    assert fig.axes[0].get_ylabel() == 'valid_loss'
    plt.close('all')


def test_runs_that_cannot_be_compared(trained, tmp_path):
    folder = trained['mean'].run_path.parent
    refuses(['there is no run other', 'ema, head, mean'], compare_runs, 'other', runs=folder)
    refuses(['has no top_5', 'accuracy'], compare_runs, 'mean', runs=folder, metric='top_5')
    refuses('no run with a finished epoch', compare_runs, runs=tmp_path)
    (tmp_path/'begun').mkdir()
    shutil.copy(folder/'mean'/'config.json', tmp_path/'begun')
    refuses(['begun has no history.csv', 'no epoch'], compare_runs, 'begun', runs=tmp_path)
    refuses('no run with a finished epoch', compare_runs, runs=tmp_path)
    plt.close('all')


# networks from files

@pytest.mark.parametrize('name', ['mean', 'head'])
def test_a_run_is_its_json_and_its_weights(name, trained, images, tmp_path, monkeypatch):
    "Two files in another place, no pickle: the network with its cut, its hidden layer and dropout answers as trained"
    learn, run = trained[name], tmp_path/'elsewhere'
    run.mkdir()
    for o in ('config.json', 'last.safetensors'): shutil.copy(learn.run_path/o, run)

    def refuse(*args, **kw): raise AssertionError('a pickle was opened')
    for module, what in (torch, 'load'), (pickle, 'load'), (pickle, 'loads'), (pickle, 'Unpickler'):
        monkeypatch.setattr(module, what, refuse)
    model, config = load_run(run, 'last')
    assert config == config_of(learn) and not model.training
    assert str(model.head) == str(learn.model.head) and same(model.state_dict(), learn.model.state_dict())
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(x), learn.model.eval()(x))
    assert len(predict(run, images[:2], weights='last')) == 6
    if name == 'head': assert (model.head.fc1.out_features, model.head.dropout.p, model.stride) == (5, 0.3, 2)


@pytest.mark.parametrize('changes, says', [(dict(cut=1), 'another network'), (dict(hidden=6), 'another network'),
                                           (dict(hidden=-1), 'hidden must'), (dict(cut=7), 'it has no more')], ids=str)
def test_another_network_than_recorded(changes, says, trained, tmp_path):
    "A configuration that was changed by hand"
    run = Path(shutil.copytree(trained['head'].run_path, tmp_path/'mine'))
    config = json.loads((run/'config.json').read_text())
    config['learner']['plan'] |= changes
    (run/'config.json').write_text(json.dumps(config))
    refuses(says, load_run, run)


# runs that cannot be used

def test_unknown_run(refused_here, run_copy):
    refused_here('resnet_predict', 'yours', 'a.png', says=['there is no run yours', 'runs/ has mine'])


def test_unknown_run_without_runs(tmp_path):
    refuses(['there is no run mine', str(tmp_path)], load_run, 'mine', runs=tmp_path)


def test_run_without_weights(refused_here, run_copy, digit_files):
    (run_copy/'best.safetensors').unlink()
    refused_here('resnet_predict', 'mine', digit_files[0],
                 says=['runs/mine has no best.safetensors', 'no epoch of it was finished'])
    assert len(predict(run_copy, digit_files[0], weights='last')) == 3


def test_corrupt_config(refused_here, run_copy, digit_files):
    (run_copy/'config.json').write_text('{"name": "mine", "arch')
    refused_here('resnet_predict', 'mine', digit_files[0], says=['runs/mine/config.json is not readable'])


@pytest.mark.parametrize('content', [
    b'', b'\xff\xfe\0', b'[]', b'3', b'null', b'{}', b'{"arch": "cifar_resnet8"}',
    b'{"arch": ["cifar_resnet8"], "data": {}}', b'{"arch": "cifar_resnet8", "data": 1}',
    b'{"arch": "cifar_resnet8", "data": {"vocab": ["1", "2"]}}',
    b'{"arch": "cifar_resnet8", "data": {"presize": 16, "resize": 16, "augment": {}}}'])
def test_config_of_something_else(content, run_copy, digit_files):
    (run_copy/'config.json').write_bytes(content)
    refuses(str(run_copy), predict, run_copy, digit_files[0])


@pytest.mark.parametrize('kept', [0, 7, 1000, 300_000])
def test_truncated_weights(kept, run_copy):
    path = run_copy/'best.safetensors'
    path.write_bytes(path.read_bytes()[:kept])
    refuses(f'{path} is not a readable .safetensors file', load_run, run_copy)


def test_truncated_weights_by_command(refused, run_copy, digit_files):
    path = run_copy/'best.safetensors'
    path.write_bytes(path.read_bytes()[:100_000])
    refused('resnet_predict', 'mine', digit_files[0],
            says=['runs/mine/best.safetensors is not a readable .safetensors file'])


def test_unknown_weights(digits_run): refuses(["'best', 'last' or 'average'", "'worst'"], load_run, digits_run, 'worst')


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


# images that cannot be used

def test_missing_image(refused_here, run_copy, digit_files):
    refused_here('resnet_predict', 'mine', digit_files[0], 'absent.png', says=['there is no file or folder absent.png'])


def test_bad_image(refused_here, run_copy, tmp_path):
    (tmp_path/'bad.png').write_bytes(b'no picture')
    refused_here('resnet_predict', 'mine', 'bad.png', says=['bad.png is no readable image'])


def test_empty_folder(digits_run, tmp_path):
    refuses(f'there is no readable image in {tmp_path}', predict, digits_run, tmp_path)


def test_no_image(digits_run): refuses('no image was given', predict, digits_run, [])


@pytest.mark.parametrize('kw', [dict(k=0), dict(k=-1), dict(bs=0)])
def test_counts_of_predict(kw, digits_run, digit_files):
    refuses([next(iter(kw)), 'at least 1'], predict, digits_run, digit_files[0], **kw)


def test_unreachable_address(refused_here, digits_run):
    with socket.create_server(('127.0.0.1', 0)) as s: url = f'http://127.0.0.1:{s.getsockname()[1]}/photo.png'
    refused_here('resnet_predict', digits_run, url, '--allow_private', says=[url, 'could not be fetched', 'file'])


def test_address_of_this_machine(refused_here, digits_run, digit_files, web):
    web.pages['seven.png'] = digit_files[7].read_bytes()
    refused_here('resnet_predict', digits_run, f'{web.url}seven.png',
                 says=[f'{web.url}seven.png leads to 127.0.0.1', 'no public address', '--allow_private'])


def test_address_without_a_picture(web, digits_run):
    "The address and the reason: a 404 is mended in another way than a dead network"
    web.pages['page.html'] = b'<html>no picture</html>'
    for page, says in [('absent.png', ['could not be fetched', '404']), ('page.html', ['no readable image'])]:
        refuses([web.url + page, *says], predict, digits_run, web.url + page, allow_private=True)


def test_address_that_breaks_off(web, digits_run):
    web.pages['cut.png'] = b'\x89PNG', 1000
    refuses([f'{web.url}cut.png could not be fetched'], predict, digits_run, f'{web.url}cut.png', allow_private=True)


OLDER = Path(__file__).parent/'fixtures'/'run_0_1_0'  # trained with version 0.1.0 before its rooms were rebuilt


def test_a_run_of_an_older_version_predicts():
    "Its config.json has older names for what it has; its answers are those that it gave then"
    assert 'made' in json.loads((OLDER/'config.json').read_text()), 'the fixture is no older run'
    model, config = load_run(OLDER)
    assert config['learner']['plan']['lr_mult'] == 100 and 'made' not in config and not model.training
    then = json.loads((OLDER/'expected.json').read_text())
    images = [data_path('digits')/'val'/o for o in then]
    now = predict(OLDER, images, k=1)
    assert now['class'].tolist() == [o for o, _ in then.values()]
    np.testing.assert_allclose(now.probability, [p for _, p in then.values()], atol=1e-4)


def test_a_run_of_an_older_version_is_compared():
    table, fig = compare_runs(OLDER)
    plt.close(fig)
    assert table.loc['run_0_1_0', ['weights', 'status']].tolist() == ['none', 'finished']
