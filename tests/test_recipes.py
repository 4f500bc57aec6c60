"""Recipes: every choice arrives, is recorded and can be changed."""
import inspect
import json
import re
import zipfile
from functools import wraps
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch
from resnet_nbdev import recipes, training
from resnet_nbdev.data import get_data
from resnet_nbdev.devices import pick_precision
from resnet_nbdev.plans import PLANS
from resnet_nbdev.recipes import RECIPES, about, run_recipe
from resnet_nbdev.resnet import ARCHS
from resnet_nbdev.runs import load_run
from safetensors.torch import load_file

from conftest import refuses, shared_file
from toys import config_of, named, no_download, same, toy, weights_of


@pytest.fixture
def handed(monkeypatch):
    "What `run_recipe` hands to those who load, build and train, as their own signatures bind it; none of it is done"
    got, dls = {}, toy()
    dls.info = dict(train=24, val=8, resize=32)

    def watch(module, name, result):
        real = getattr(module, name)

        @wraps(real)
        def call(*args, **kw):
            got[name] = inspect.signature(real).bind(*args, **kw).arguments
            return result
        monkeypatch.setattr(module, name, call)
    watch(recipes, 'get_data', dls)
    watch(recipes, 'resident_data', dls)
    watch(recipes, 'resnet_learner', SimpleNamespace())
    watch(recipes, 'fine_tune', None)
    monkeypatch.setattr(recipes, '_say_start', lambda *_: None)
    return got


@pytest.mark.parametrize('name', RECIPES)
def test_every_choice_of_a_recipe_arrives(name, handed, tmp_path):
    "At the function that it is for, with its value; and all of it goes into the record"
    recipe = RECIPES[name]
    run_recipe(name, runs=tmp_path, device='cpu')
    kind = 'resident_data' if recipe.get('resident') else 'get_data'
    data, made, run = (dict(handed.pop(o)) for o in (kind, 'resnet_learner', 'fine_tune'))
    assert not handed and 'kw' not in made
    if 'size' in data: data['resize'] = data.pop('size')
    plan = made.pop('plan')
    assert plan.but(dropout=0.) == PLANS[recipe['plan']] and plan.dropout == recipe.get('dropout', 0.)
    found = {**data, **made, **{k: v for k, v in run.items() if k not in ('name', 'resume', 'runs')}}
    for k, v in recipe.items():
        if k not in ('plan', 'dropout', 'resident'): assert found[k] == v, k
    assert run['arguments'].items() >= {**recipe, 'seed': 42, 'device': 'cpu'}.items()
    assert json.loads(json.dumps(run['arguments'])) == run['arguments']


@pytest.mark.parametrize('name', RECIPES)
def test_recipes_are_plain_and_known(name, monkeypatch, tmp_path):
    recipe = RECIPES[name]
    assert json.loads(json.dumps(recipe)) == recipe and recipe['plan'] in PLANS and recipe['arch'] in ARCHS

    class Reached(Exception): pass
    for what in ('get_data', 'resident_data'):
        real = getattr(recipes, what)

        @wraps(real)
        def stop(*args, **kw): raise Reached
        monkeypatch.setattr(recipes, what, stop)
    with pytest.raises(Reached): run_recipe(name, runs=tmp_path)
    for k, v in recipe.items():
        refuses(f'a recipe has no {k}x', run_recipe, {**{i: o for i, o in recipe.items() if i != k}, f'{k}x': v},
                runs=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', RECIPES)
def test_every_recipe_trains(name, folder, tiny, monkeypatch, tmp_path):
    "To its end, with a smaller network, images and times; config.json has all of its choices"
    monkeypatch.setattr(training, 'plot_history', lambda *_: plt.figure())
    monkeypatch.setattr(training, 'plot_predictions', lambda *_: plt.figure())
    weights_of('tiny', tmp_path/'a.safetensors')
    less = dict(arch='tiny', data=str(folder), presize=32, resize=32, bs=4, epochs=1, workers=0)
    for k, v in dict(weights=str(tmp_path/'a.safetensors'), top_k=2, freeze_epochs=1, progressive=[32]).items():
        if RECIPES[name].get(k): less[k] = v
    learn = run_recipe(name, 'mine', runs=tmp_path/'runs', device='cpu', json_lines=True, **less)
    config = json.loads((tmp_path/'runs'/'mine'/'config.json').read_text())
    assert config['arguments'].items() >= {**RECIPES[name], **less}.items()
    assert {k: config[k] for k in ('average', 'monitor')} == \
        dict(average=RECIPES[name].get('average', 0), monitor=RECIPES[name].get('monitor', 'accuracy'))
    own = {'plan', 'weights', 'arch', 'precision', 'opt', *less}
    for k in config['learner'].keys() & RECIPES[name].keys() - own:
        assert config['learner'][k] == RECIPES[name][k], k
    assert RECIPES[name].get('opt', 'Adam') in config['learner']['opt']
    assert config['learner']['precision'] == pick_precision(RECIPES[name].get('precision', 'auto'), 'cpu')
    metrics = json.loads((learn.run_path/'metrics.json').read_text())
    assert metrics['status'] == 'finished' and metrics['epochs'] == sum(o['epochs'] for o in config['cycles'])
    averaged = RECIPES[name].get('ema') or RECIPES[name].get('average')
    assert (learn.run_path/'average.safetensors').exists() == bool(averaged)


def test_says_what_it_trains_and_how_long_that_takes(folder, tiny, tmp_path, capsys):
    "At the start, and not where it goes on; drawing no random number and moving no weight"
    recipe = dict(data=str(folder), arch='tiny', plan='discriminative', presize=32, resize=32, bs=4, epochs=1,
                  freeze_epochs=1, workers=0)
    runs = [run_recipe(recipe, name, runs=tmp_path, json_lines=quiet).model.state_dict()
            for name, quiet in (('loud', False), ('quiet', True))]
    assert same(*runs)
    assert re.match('16 training and 8 validation images of 2 classes, 32 px, tiny from scratch on cpu in '
                    '(bf16|fp32): a few seconds\n', capsys.readouterr().out)
    run_recipe(recipe, 'loud', resume=True, runs=tmp_path)
    assert 'seconds\n' not in capsys.readouterr().out


@pytest.mark.parametrize('seconds, said', [
    (.1, 'a few seconds'), (5, 'about 10 seconds'), (33, 'about 30 seconds'), (89, 'about 90 seconds'),
    (90, 'about 2 minutes'), (5000, 'about 83 minutes'), (86400, 'about 24.0 hours')])
def test_about(seconds, said): assert about(seconds) == said


def test_wrong_recipes(tmp_path, monkeypatch):
    monkeypatch.setattr('resnet_nbdev.catalogue.fetch', no_download)
    for recipe, says in [('S6', "unknown recipe 'S6'"), (dict(), 'needs a source'),
                         (dict(source='imagenette', colour='red'), 'has no colour'),
                         (dict(source='imagenette', plan='late', cut=9.5), 'cut must'),
                         (dict(source='imagenette', pct_start=2.), 'pct_start'),
                         (dict(source='imagenette', div=0.), 'div')]:
        refuses(says, run_recipe, recipe, runs=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('value, says', [((4, 2, 1), 'one number or a pair'), ((4, 0), 'must be a whole number')])
def test_pairs_that_are_none(value, says, folder, tmp_path):
    refuses(['max_per_class', says], run_recipe, dict(source=str(folder)), runs=tmp_path/'runs', max_per_class=value)
    refuses(['max_per_class', says], get_data, folder, max_per_class=value)


def test_a_recipe_with_limits_for_each_split(tmp_path):
    few = lambda **kw: run_recipe(dict(source='digits'), 'few', runs=tmp_path, freeze_epochs=0, epochs=1, device='cpu',
                                  max_per_class=(8, 4), json_lines=True, **kw)
    info = few().dls.info
    assert (info['train'], info['val']) == (80, 40)
    assert few(resume=True).run_path == tmp_path/'few'


@pytest.mark.slow
def test_recipe_with_real_weights(tmp_path):
    "S2 on 40 photos of 20 places: stem to layer2 of the run are those of ImageNet to the last bit, the rest has moved"
    weights = shared_file('resnet50-v1-imagenet-fp16.safetensors')
    taken = {}
    with zipfile.ZipFile(shared_file('miniplaces-20.zip')) as z:
        for o in sorted(o for o in z.namelist() if o.endswith('.jpg')):
            place = o.rsplit('/', 1)[0]
            taken[place] = taken.get(place, 0) + 1
            if taken[place] <= (2 if '/train/' in o else 1): z.extract(o, tmp_path)
    learn = run_recipe('S2', 'mine', runs=tmp_path/'runs', data=tmp_path/'miniplaces', arch='resnet50_v1', device='cpu',
                       weights=str(weights), presize=64, resize=64, bs=8, epochs=1, workers=0, json_lines=True)
    old, new = load_file(weights), load_file(learn.run_path/'last.safetensors')
    assert len(learn.dls.vocab) == 20 and new['fc.weight'].shape == (20, 2048)
    for k, v in new.items():
        if k.startswith('fc.') or k.endswith('num_batches_tracked'): continue
        moves = k.startswith(('layer3.', 'layer4.'))
        assert torch.equal(v, old[k].to(v.dtype)) != moves, k
    counted = {k.split('.')[0]: int(v) for k, v in new.items() if k.endswith('num_batches_tracked')}
    assert counted == dict(bn1=0, layer1=0, layer2=0, layer3=5, layer4=5)
    config = config_of(learn)
    cycle, = config['cycles']
    assert (cycle['trains_from'], cycle['rates'][-1], config['learner']['plan']['bn']) == (3, 5e-4, 'frozen')
    assert same(named(load_run(learn.run_path, 'last')[0].state_dict()), new)
