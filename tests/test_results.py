"""Figures cannot rot: each has its conditions, and what a page shows is what its file holds."""
import json
import re
import runpy
import subprocess
import sys
import zipfile

import pytest
import resnet_nbdev
from resnet_nbdev.core import InputError
from resnet_nbdev.results import (
    changed_since,
    fingerprint,
    has_result,
    load_result,
    missing_conditions,
    quote_matches,
    resolve_pointer,
    result_states,
    results_folder,
    results_used,
    wrong_quotes,
)

from conftest import ROOT

nbformat = pytest.importorskip('nbformat', reason='a development tool, not installed beside the wheel')
FILES = sorted((ROOT/'nbs'/'results').glob('*.json'))
PAGES = [p for p in sorted((ROOT/'nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts]
script = runpy.run_path(str(ROOT/'tools'/'results.py'), run_name='results')


def prose(page): return '\n'.join(c.source for c in nbformat.read(page, 4).cells if c.cell_type == 'markdown')


@pytest.mark.parametrize('file', FILES, ids=lambda o: o.stem)
def test_has_its_conditions(file):
    result = json.loads(file.read_text())
    assert missing_conditions(result) == []
    if not result.get('published'):
        assert re.fullmatch('[0-9a-f]{40}(-dirty)?', result['commit'])
        assert {'torch', 'fastai', 'resnet_nbdev'} <= result['versions'].keys()
    assert not re.search(r'/(home|root|tmp|work|Users)/', file.read_text())


def test_no_page_quotes_what_is_not_there():
    assert [*script['misquoted']()] == []


def test_no_page_shows_older_values():
    assert [*script['older_pages']()] == [], 'run python -m tools.outputs PAGE'


@pytest.mark.parametrize('page', [o for o in PAGES if o.parent.name == 'tutorials' and o.stem != 'famous_errors'],
                         ids=lambda o: o.stem)
def test_page_and_its_figures_are_of_one_run(page):
    name = f'{page.stem}_short'
    assert nbformat.read(page, 4).metadata.results[name] == fingerprint(load_result(name))
    assert f'(../results/{name}.json)' in prose(page)


@pytest.mark.parametrize('page', PAGES, ids=lambda o: o.stem)
def test_no_figure_of_merit_is_typed(page):
    "A fraction of three and more digits in prose was measured, so it is a quote or computed; settings are code"
    text = re.sub(r'```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\]\([^)]*\)|\[[^\]]*\](?=\()|https?://\S+', '', prose(page),
                  flags=re.S)
    assert re.findall(r'(?<![\w.])0\.\d{3,}|\d[\d.]*\s*(?:images/s|img/s)', text) == []


@pytest.fixture
def results(tmp_path, monkeypatch):
    "The results as they are, in a copy to damage"
    for o in FILES: (tmp_path/o.name).write_text(o.read_text())
    monkeypatch.setattr('resnet_nbdev.results.results_folder', lambda: tmp_path)
    return tmp_path


def change(file, **more): file.write_text(json.dumps({**json.loads(file.read_text()), **more}))


def test_a_changed_value_is_seen(results):
    before = {p.name for p, _ in script['older_pages']()}
    file = results/'resnet50_strides.json'
    change(file, values={**load_result('resnet50_strides')['values'], 'more': 1})
    pages = {'famous_errors.ipynb', '60_agreement.ipynb', '63_bench.ipynb'}
    assert {p.name for p, _ in script['older_pages']()} - before == pages
    change(results/'he2015_table2.json', note='a condition told better')
    assert len([*script['older_pages']()]) == len(before) + 3


def test_a_quote_is_compared_to_its_digits(results):
    quote = '[{}](results/imagenette_resnet34_published.json#/values/{})'
    for said in ('0.849', '0.85', '0.849427', '84.9 %'): assert wrong_quotes(quote.format(said, 'accuracy')) == []
    for said in ('0.848', '0.8494271', '85.9 %', 'good'): assert len(wrong_quotes(quote.format(said, 'accuracy'))) == 1
    said, = wrong_quotes(quote.format('0.84', 'accuracy'))
    assert '0.849427' in said and 'imagenette_resnet34_published' in said
    assert 'there is no /values/top_5' in wrong_quotes(quote.format('0.84', 'top_5'))[0]
    change(results/'imagenette_resnet34_published.json', values=dict(accuracy=.9))
    assert wrong_quotes(quote.format('0.849', 'accuracy'))


@pytest.mark.parametrize('said, value, right', [
    ('1,234', 1234.4, True), ('1,235', 1234.4, False), ('-0.25', -.25, True), ('0.50', .505, False), ('65 s', 65, True),
    ('a GPU', 'a GPU', True), ('a CPU', 'a GPU', False)])
def test_holds(said, value, right): assert quote_matches(said, value) is right


def test_look_up():
    result = {'a b': [dict(c=1)], 'd/e': 2}
    assert (resolve_pointer(result, '/a%20b/0/c'), resolve_pointer(result, '/d~1e')) == (1, 2)
    for o in ('/a', '/a b/1', '/a b/0/c/d'):
        with pytest.raises(InputError, match='there is no'): resolve_pointer(result, o)


def test_what_is_missing(results):
    with pytest.raises(InputError, match="no result 'nothing': measured are .*resnet50_strides"): load_result('nothing')
    assert not has_result('nothing')
    result = load_result('resnet50_strides')
    for k in ('data', 'commit', 'versions'):
        for empty in (None, ''): assert missing_conditions({**result, k: empty}) == [k]
    assert missing_conditions({**load_result('he2015_table2'), 'source': ''}) == ['source']
    (results/'he2015_table2.json').write_text('{')
    with pytest.raises(InputError, match='he2015_table2.json is not readable'): load_result('he2015_table2')


@pytest.fixture
def repository(tmp_path, monkeypatch):
    "A package of one module in a repository of its own, and the commit that holds it"
    def git(*args):
        who = ['-c', 'user.name=a', '-c', 'user.email=a@example.org']
        return subprocess.run(['git', *who, *args], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    for o in ('__init__', 'net'): (tmp_path/f'{o}.py').write_text('def f(x):\n    "One"\n    return x + 1 # more\n')
    monkeypatch.setattr(resnet_nbdev, '__file__', str(tmp_path/'__init__.py'))
    git('init', '-q')
    git('add', '.')
    git('commit', '-q', '-m', 'first')
    return tmp_path/'net.py', git('rev-parse', 'HEAD').strip()


@pytest.mark.parametrize('now, stale', [
    ('def f(x):\n    "One"\n    return x + 1 # more\n', False), ('def f(x):\n    "Two"\n    return (x+1)\n', False),
    ('def f(x): return x + 1', False), ('def f(x): return x + 2', True), ('def f(y): return y + 1', True),
    ('def f(x=1): return x + 1', True)])
def test_stale_is_what_changed_in_meaning(repository, now, stale):
    file, commit = repository
    file.write_text(now)
    assert changed_since(commit, ['net']) == changed_since(f'{commit}-dirty', ['net']) == ['net']*stale


def test_a_move_keeps_a_figure_current(repository):
    "What counts is the definition, in whichever module it stands and however it is written"
    file, commit = repository
    file.write_text('X = 1\n')
    file.with_name('other.py').write_text('def f(x): return (x\n+ 1)')
    assert changed_since(commit, ['net', 'f']) == []
    file.with_name('other.py').write_text('def f(x): return x - 1')
    assert changed_since(commit, ['net', 'f']) == ['net', 'f']


@pytest.fixture
def three(repository):
    "Modules of which the second needs the first, and the third nothing; and their commit"
    folder = repository[0].parent
    sources = {'low': 'SCALE = 2\ndef double(x): return x*SCALE',
               'high': 'from .low import double\ndef top(x): return double(x)',
               'aside': 'def apart(double): return double'}
    for name, text in sources.items(): (folder/f'{name}.py').write_text(text)
    who = ['-c', 'user.name=a', '-c', 'user.email=a@example.org']
    run = lambda *args: subprocess.run(['git', *who, *args], cwd=folder, capture_output=True, text=True,
                                       check=True).stdout
    run('add', '.')
    run('commit', '-q', '-m', 'three')
    return folder, run('rev-parse', 'HEAD').strip()


@pytest.mark.parametrize('module, text, stale', [
    ('low', 'SCALE = 3\ndef double(x): return x*SCALE', ['double', 'top']),
    ('low', 'SCALE = 2\nSCALE += 1\ndef double(x): return x*SCALE', ['double', 'top']),
    ('low', 'MORE = 1\ndef more(x): return x\nSCALE = 2\ndef double(x): return x*SCALE', []),
    ('aside', 'def apart(double): return -double', ['apart']), ('high', 'def top(x): return x', ['top'])])
def test_a_figure_ages_with_all_that_it_needs(three, module, text, stale):
    folder, commit = three
    (folder/f'{module}.py').write_text(text)
    assert changed_since(commit, ['apart', 'double', 'top']) == stale


def test_stale_is_what_cannot_be_compared(repository):
    file, commit = repository
    assert changed_since('0'*40, ['net']) == ['net'] and changed_since(commit, ['net', 'other']) == ['other']
    file.unlink()
    assert changed_since(commit, ['net']) == ['net']


def test_states(results):
    states = result_states()
    assert set(states.state) <= {'current', 'stale', 'quoted'} and set(states.index) == {o.stem for o in FILES}
    assert states.state['he2015_table2'] == 'quoted'
    change(results/'resnet50_strides.json', commit='0'*40)
    assert result_states().state['resnet50_strides'] == 'stale'


def test_used_results_are_found_in_code():
    code = ["load_result('he2015_table2')", "[load_result(o) for o in ('data_460_224', 'x')]"]
    assert results_used(code) == {o: fingerprint(load_result(o)) for o in ('data_460_224', 'he2015_table2')}


def test_make_results_says_all(tmp_path):
    r = subprocess.run([sys.executable, ROOT/'tools'/'results.py'], cwd=tmp_path, capture_output=True, text=True)
    assert r.returncode == 0 and all(o.stem in r.stdout for o in FILES), r.stderr


def test_wheel_carries_results(tmp_path):
    "What a tutorial reads in Colab"
    pytest.importorskip('build', reason='a development tool, not installed beside the wheel')
    r = subprocess.run([sys.executable, '-m', 'build', '-q', '--wheel', '--no-isolation', '--outdir', tmp_path, ROOT],
                       capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    with zipfile.ZipFile(next(tmp_path.glob('*.whl'))) as z:
        have = {o.split('/')[-1] for o in z.namelist() if o.startswith('resnet_nbdev/results/')}
    assert have == {o.name for o in FILES} and results_folder().is_dir()
