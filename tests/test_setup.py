"""The way to a first run on a bare machine: the environment's script, the Makefile, imports and workflow files."""
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, environment

in_project = pytest.mark.skipif(not all((ROOT/o).exists() for o in ('Makefile', 'settings.ini', 'tools/venv.py')),
                                reason=f'{ROOT} is not the project: tests/ was copied alone')


def run(*args, cwd, **env):
    args = list(map(str, args))
    return subprocess.run(args, cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=60)


@pytest.fixture
def project(tmp_path):
    "What `make demo` looks at before it installs anything"
    dest = tmp_path/'project'
    shutil.copytree(ROOT/'tools', dest/'tools', ignore=shutil.ignore_patterns('__pycache__'))
    for o in ('Makefile', 'settings.ini', 'setup.py'): shutil.copyfile(ROOT/o, dest/o)
    return dest


def python(version):
    "An interpreter of this version that starts, or skip"
    major, name = version.split('.')[0], f'python{version}'
    folders = sorted(Path('~/.pyenv/versions').expanduser().glob(f'{version}.*/bin'))
    for path in [o/f'python{major}' for o in folders] + [shutil.which(name)]:
        if path and subprocess.run([path, '-c', 'pass'], capture_output=True).returncode == 0: return path
    pytest.skip(f'there is no {name} on this machine')


def one_sentence(done, *says):
    assert done.returncode == 2, done
    assert done.stderr.count('\n') == 1 and not done.stdout, done
    for o in says: assert o in done.stderr


@in_project
@pytest.mark.parametrize('version', ['2.7', '3.6', '3.8', '3.9'])
def test_old_python(version, project):
    old = python(version)
    done = run(old, 'tools/venv.py', '.venv', '-e', '.[dev]', cwd=project)
    one_sentence(done, f'is Python {version}.', 'needs 3.10 or newer', 'make demo PYTHON=')
    assert not (project/'.venv').exists()


@in_project
def test_python_without_venv(project, tmp_path):
    "Debian ships ensurepip apart from Python"
    (tmp_path/'fake').mkdir()
    (tmp_path/'fake'/'ensurepip.py').write_text('raise ImportError("not installed")\n')
    done = run(sys.executable, 'tools/venv.py', '.venv', '-e', '.[dev]', cwd=project, PYTHONPATH=str(tmp_path/'fake'))
    one_sentence(done, 'has no venv module', 'apt-get install python3-venv')
    assert not (project/'.venv').exists()


@in_project
@pytest.mark.skipif(not shutil.which('make'), reason='there is no make')
def test_make_without_python(project):
    done = run('make', 'demo', 'PYTHON=nonexistent', cwd=project)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and lines[0].startswith('nonexistent is not there: ') and 'PYTHON=' in lines[0], done
    assert all(o.startswith('make') for o in lines[1:]) and not (project/'.venv').exists()


@in_project
@pytest.mark.skipif(not shutil.which('make'), reason='there is no make')
def test_make_with_an_old_python(project):
    done = run('make', 'demo', f'PYTHON={python("3.8")}', cwd=project)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and 'needs 3.10 or newer' in lines[0], done
    assert all(o.startswith('make') for o in lines[1:])
    assert not (project/'.venv').exists()


@in_project
@pytest.mark.skipif(not shutil.which('make'), reason='there is no make')
def test_make_help(project):
    "Each target that is meant for people is told with a line"
    done = run('make', cwd=project)
    assert done.returncode == 0 and {'demo', 'test'} <= {o.split('\t')[0] for o in done.stdout.splitlines()}


HEAVY = 'fastai', 'pandas', 'torchvision', 'matplotlib', 'PIL'


@pytest.mark.parametrize('module', ['blocks', 'resnet'])
def test_networks_import_torch_alone(module, tmp_path):
    code = f'import sys, resnet_nbdev.{module}; print(*[o for o in {HEAVY} if o in sys.modules])'
    done = run(sys.executable, '-c', code, cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, ''), done


@pytest.mark.parametrize('command, flags', [('resnet_fine_tune', ['--runs', '--device']),
                                            ('resnet_predict', ['--runs', '--device']), ('resnet_data', ['--plot'])])
def test_help_is_quick_and_complete(command, flags, tmp_path):
    "The whole help, without the seconds that fastai takes"
    done = run(sys.executable, '-X', 'importtime', Path(sys.executable).with_name(command), '--help', cwd=tmp_path)
    assert done.returncode == 0 and all(o in done.stdout for o in flags)
    assert 'fastai.vision' not in done.stderr and not list(tmp_path.iterdir())


SCHEMAS = {'.github/workflows/*': 'github-workflows', '.github/dependabot.yml': 'dependabot',
           '.github/ISSUE_TEMPLATE/[!c]*': 'github-issue-forms', 'CITATION.cff': 'citation-file-format',
           '.github/ISSUE_TEMPLATE/config.yml': 'github-issue-config'}


@in_project
@pytest.mark.parametrize('pattern', SCHEMAS)
def test_configuration_files(pattern):
    "They are what GitHub, or whoever reads them, takes"
    tool, files = Path(sys.executable).with_name('check-jsonschema'), sorted(ROOT.glob(pattern))
    if not tool.exists(): pytest.skip('check-jsonschema is not installed')
    done = run(tool, '--builtin-schema', f'vendor.{SCHEMAS[pattern]}', *files, cwd=ROOT)
    assert files and done.returncode == 0, done.stdout + done.stderr


@in_project
def test_actions_are_pinned():
    "By the hash of a commit, which cannot be moved, with its version beside it for dependabot and readers"
    used = [o for p in ROOT.glob('.github/workflows/*') for o in re.findall('uses: (.+)', p.read_text())]
    assert used and [o for o in used if not re.fullmatch(r'[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+', o)] == []
