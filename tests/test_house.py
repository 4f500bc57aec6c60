"""The house: one notebook, one module, one idea, numbered in the order in which modules import each other."""
import ast
import json
import re
from statistics import median

import pytest

from conftest import ROOT

WIDTH = 98  # columns that a cell of the site shows at 1,400 px
ROOMS = {p.stem[3:]: p for p in sorted((ROOT/'nbs').glob('[0-9][0-9]_*.ipynb'))}
PACKAGE = ROOT/'resnet_nbdev'
LIGHT = {'core', 'options', 'console', 'cli'}  # answer without PyTorch
FIXED = {  # of design.md: module -> names that stay importable from it
    'blocks': 'ResBlock BottleneckBlock PlainBlock PreActBlock',
    'resnet': 'custom_resnet resnet18 resnet34 resnet50 resnet101 resnet152 cifar_resnet load_weights '
              'torchvision_state layer_table plot_network',
    'data': 'datasets get_data', 'resident': 'resident_data', 'learner': 'resnet_learner',
    'runs': 'fine_tune run_recipe load_run predict compare_runs',
    'explain': 'predictions confident_errors show_predictions confusion class_table features embed grad_cam',
    'cli': 'resnet_fine_tune resnet_predict resnet_export resnet_demo resnet_data', 'bench': 'resnet_bench'}


def cells(path, kind='code'):
    return [''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == kind]


def exported(path):
    "Exported cells with definitions, without those that only import"
    texts = [re.sub(r'^#\| ?export\n', '', o) for o in cells(path) if re.match(r'#\| ?export\n', o)]
    imports = (ast.Import, ast.ImportFrom)
    return [o for o in texts if not all(isinstance(n, imports) for n in ast.parse(o).body)]


def module(name): return (PACKAGE/f'{name}.py').read_text()


def imported(name):
    "Modules of the package that a module imports when it is imported itself"
    nodes = [o for o in ast.parse(module(name)).body if isinstance(o, ast.ImportFrom)]
    return {o.module for o in nodes if o.level and o.module}


def public(name):
    tree = ast.parse(module(name))
    found = next(o.value for o in tree.body if isinstance(o, ast.Assign) and o.targets[0].id == '__all__')
    return ast.literal_eval(found)


def defined(name):
    "Names that a module itself gives a meaning"
    for o in ast.parse(module(name)).body:
        if isinstance(o, (ast.ClassDef, ast.FunctionDef)): yield o.name
        elif isinstance(o, ast.Assign): yield from (t.id for t in o.targets if isinstance(t, ast.Name))


def test_every_room_has_its_module():
    modules = {p.stem for p in PACKAGE.glob('*.py') if not p.stem.startswith('_')}
    assert modules == set(ROOMS) and len({p.stem[:2] for p in ROOMS.values()}) == len(ROOMS)
    for name, path in ROOMS.items(): assert f'#| default_exp {name}' in cells(path), path.name


@pytest.mark.parametrize('name', ROOMS)
def test_numbers_follow_imports(name):
    "A module imports from lower numbers only, so there is no circle"
    higher = {o for o in imported(name) if ROOMS[o].stem >= ROOMS[name].stem}
    assert not higher, f'{ROOMS[name].stem} imports {", ".join(ROOMS[o].stem for o in higher)}'


@pytest.mark.parametrize('name', ROOMS)
def test_imports_are_relative(name):
    "Absolute ones stand inside functions only, to be late, where nbdev leaves them as they are"
    nodes = [o for o in ast.parse(module(name)).body if isinstance(o, ast.ImportFrom) and not o.level]
    assert not [o.module for o in nodes if o.module.startswith('resnet_nbdev')]


@pytest.mark.parametrize('name', ROOMS)
def test_size(name):
    lines = len(module(name).splitlines())
    assert lines < 400, f'{name}.py has {lines} lines: split the room'
    long = [o.splitlines()[0] for o in exported(ROOMS[name]) if len(o.splitlines()) > 60]
    assert not long, 'cells of more than 60 lines'


def test_cells_are_small():
    assert median(len(o.splitlines()) for path in ROOMS.values() for o in exported(path)) <= 15


def test_no_public_name_is_defined_twice():
    where = {}
    for name in ROOMS:
        own = set(defined(name))
        for o in public(name):
            if o in own and name != 'all': where.setdefault(o, []).append(name)
    assert {o: names for o, names in where.items() if len(names) > 1} == {}


@pytest.mark.parametrize('name', FIXED)
def test_public_interface(name): assert set(FIXED[name].split()) <= set(public(name))


def test_one_test_file_a_room():
    have = {p.stem.removeprefix('test_') for p in (ROOT/'tests').glob('test_*.py')}
    assert set(ROOMS) - {'all'} - have == set()


@pytest.mark.parametrize('path', sorted((ROOT/'nbs').rglob('*.ipynb')), ids=lambda o: o.stem)
def test_lines_fit_the_site(path):
    assert [o for text in cells(path) for o in text.splitlines() if len(o) > WIDTH] == []


@pytest.mark.parametrize('name', sorted(LIGHT & set(ROOMS)))
def test_commands_answer_at_once(name):
    "What a command needs before it trains imports neither PyTorch nor fastai, pandas or numpy"
    heavy = {'torch', 'fastai', 'pandas', 'numpy', 'matplotlib', 'requests'}
    nodes = [o for o in ast.parse(module(name)).body if isinstance(o, (ast.Import, ast.ImportFrom))]
    tops = {a.name.split('.')[0] for o in nodes if isinstance(o, ast.Import) for a in o.names}
    tops |= {o.module.split('.')[0] for o in nodes if isinstance(o, ast.ImportFrom) and not o.level}
    assert not tops & heavy and imported(name) <= LIGHT
