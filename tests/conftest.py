"""Commands, folders of images, a trained run and a web server for the tests; nothing of the user's home is touched."""
import atexit
import http.server
import io
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import zipfile
import zlib
from pathlib import Path

HOME = tempfile.mkdtemp(prefix='resnet_nbdev_tests_')
atexit.register(shutil.rmtree, HOME, ignore_errors=True)
# before fastai is imported
os.environ.update(FASTAI_HOME=HOME, MPLBACKEND='Agg', NO_PROXY='127.0.0.1', no_proxy='127.0.0.1')
for o in ('RESNET_DATA', 'PYTHONWARNINGS', 'IN_TEST'): os.environ.pop(o, None)

import numpy as np
import pytest
from PIL import Image

pytest_plugins = 'forked', 'photos_of_noise', 'small_sets', 'toys'
ROOT = Path(__file__).resolve().parent.parent
small = dict(arch='cifar_resnet8', presize=16, resize=16, bs=4, epochs=1, freeze_epochs=0, workers=0)
SMALL = [o for k, v in small.items() for o in (f'--{k}', v)]  # a training of seconds


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: whole runs that take minutes')
    config.addinivalue_line('markers', "tutorials: the tutorials' short runs, up to 5 minutes each")


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    if plt := sys.modules.get('matplotlib.pyplot'): plt.close('all')


def refuses(says, call, *args, **kw):
    "In Python a refusal is an `InputError`: one sentence that has all of `says`"
    from resnet_nbdev.core import InputError
    with pytest.raises(InputError) as e: call(*args, **kw)
    said = str(e.value)
    assert '\n' not in said
    for o in says if isinstance(says, (list, tuple)) else [says]: assert str(o) in said, (o, said)
    return said


def script(name): return str(Path(sys.executable).with_name(name))


def environment(**env):
    "The environment of a command: one thread, and `env`, in which None takes a variable away"
    env = {**os.environ, 'OMP_NUM_THREADS': '1', **env}
    return {k: v for k, v in env.items() if v is not None}


def run_command(*args, cwd, timeout=150, **env):
    return subprocess.run([script(args[0]), *map(str, args[1:])], cwd=cwd, env=environment(**env), timeout=timeout,
                          capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.fixture
def run_cli(tmp_path):
    "Run a command in `tmp_path`, with more environment variables as keywords"
    return lambda *args, timeout=150, **env: run_command(*args, cwd=tmp_path, timeout=timeout, **env)


@pytest.fixture
def run_here(tmp_path, monkeypatch, capfd):
    "The same without the 5 s of a new process: the script of the command runs as this one's main program"
    def run(*args):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, 'argv', [script(args[0]), *map(str, args[1:])])
        capfd.readouterr()
        try:
            runpy.run_path(sys.argv[0], run_name='__main__')
            code = 0
        except SystemExit as e: code = e.code or 0
        return subprocess.CompletedProcess(sys.argv, code, *capfd.readouterr())
    return run


def check_refusal(run, cwd, args, says, notes, env):
    state = lambda: sorted((cwd/'runs').rglob('*')) if (cwd/'runs').is_dir() else (cwd/'runs').exists()
    before = state()
    done = run(*args, **env)
    lines = done.stderr.splitlines()
    assert done.returncode == 2, done
    assert 'Traceback' not in done.stdout + done.stderr, done.stderr
    assert len(lines) == 1 + notes, done.stderr
    assert lines[-1].startswith(f'{args[0]}: '), lines
    for o in says: assert str(o) in lines[-1], (o, lines[-1])
    assert state() == before, 'a refused command left something in runs/'
    return done


@pytest.fixture
def refused(run_cli, tmp_path):
    "Run a command that must end with one sentence on stderr that has all of `says`, exit code 2, and no new run folder"
    return lambda *args, says, notes=0, **env: check_refusal(run_cli, tmp_path, args, says, notes, env)


@pytest.fixture
def refused_here(run_here, tmp_path):
    "`refused` without a new process"
    return lambda *args, says, notes=0: check_refusal(run_here, tmp_path, args, says, notes, {})


@pytest.fixture
def start_cli(tmp_path):
    "Start a command in a process group of its own, with its output in the files out and err; what still runs is killed"
    started = []

    def start(*args, **env):
        with open(tmp_path/'out', 'w') as out, open(tmp_path/'err', 'w') as err:
            heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores SIGINT
            p = subprocess.Popen([script(args[0]), *map(str, args[1:])], cwd=tmp_path, env=environment(**env),
                                 stdout=out, stderr=err, stdin=subprocess.DEVNULL,
                                 start_new_session=True, preexec_fn=heed)
        started.append(p)
        return p
    yield start
    for p in started:
        try: os.killpg(p.pid, signal.SIGKILL)
        except ProcessLookupError: pass
        p.wait(10)


def randomised(model):
    "Batch norms as they may be after training; small weights keep the numbers of deep networks in a usual range"
    import torch
    with torch.no_grad():
        for m in (o for o in model.modules() if isinstance(o, torch.nn.BatchNorm2d)):
            m.weight.uniform_(.3, .7)
            for t in (m.bias, m.running_mean): t.uniform_(-.2, .2)
            m.running_var.uniform_(.5, 1.5)
            m.num_batches_tracked.random_(1, 1000)
    return model.eval()


def noise(seed, size=20): return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def png(seed, size=20):
    "The bytes of a PNG file of noise"
    f = io.BytesIO()
    Image.fromarray(noise(seed, size)).save(f, 'PNG')
    return f.getvalue()


def waves(seed, size=(60, 60), frequency=12):
    "A picture with large and small shapes and no symmetry, (height, width, 3)"
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size[0], :size[1]]/max(size)
    rings = [np.sin(frequency*np.hypot(x - a, y - b) + c) for a, b, c in rng.uniform(0, 3, (3, 3))]
    light = 127 + 90*np.stack(rings, -1)*rng.uniform(.5, 1, 3) + 30*(x - y)[..., None]
    return light.clip(0, 255).astype(np.uint8)


def make_folder(dest, classes=('cat', 'dog'), train=8, val=4):
    "A folder in Imagenette's layout with PNG files of noise"
    for split, n in (('train', train), ('val', val)):
        for c in classes:
            (dest/split/c).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(noise(zlib.crc32(f'{split}{c}{i}'.encode()))).save(dest/split/c/f'{i}.png')
    return dest


@pytest.fixture
def folder(tmp_path): return make_folder(tmp_path/'pets')


@pytest.fixture
def broken_files(folder):
    "`folder` with an empty file, a text and half a JPEG among its images; the three, in the order of their names"
    train = folder/'train'/'cat'
    (train/'empty.png').touch()
    Image.fromarray(noise(0, 60)).save(train/'half.jpg')
    content = (train/'half.jpg').read_bytes()
    (train/'half.jpg').write_bytes(content[:len(content)//2])
    (train/'text.jpg').write_text('no picture\n')
    return [train/o for o in ('empty.png', 'half.jpg', 'text.jpg')]


@pytest.fixture(scope='session')
def digits_run(tmp_path_factory):
    "The folder of a finished run: resnet_fine_tune digits --epochs 2"
    cwd = tmp_path_factory.mktemp('digits')
    done = run_command('resnet_fine_tune', 'digits', '--epochs', 2, cwd=cwd)
    assert done.returncode == 0 and not done.stderr, done
    return cwd/'runs'/'digits-cifar_resnet8'


@pytest.fixture
def run_copy(digits_run, tmp_path):
    "A copy of `digits_run` to damage, known as 'mine' in `tmp_path`"
    return Path(shutil.copytree(digits_run, tmp_path/'runs'/'mine'))


@pytest.fixture(scope='session')
def digit_files(digits_run):
    "Validation images of the digits, one for each class"
    return [sorted((Path(HOME)/'data'/'digits'/'val'/str(c)).iterdir())[0] for c in range(10)]


def shared_file(name):
    path = Path(os.environ.get('RESNET_SHARED') or ROOT.parent/'shared'/'data')/name
    if not path.is_file(): pytest.skip(f'there is no {path}: set RESNET_SHARED to the folder of {name}')
    return path


def imagenette_zip(): return shared_file('imagenette2-160.zip')


def extract_photos(dest, **most):
    "The first photos by file name of each class of Imagenette, for example train=24, val=8, under their official names"
    taken = {}
    with zipfile.ZipFile(imagenette_zip()) as z:
        for name in sorted(o for o in z.namelist() if o.endswith('.JPEG')):
            place = name.rsplit('/', 1)[0]
            taken[place] = taken.get(place, 0) + 1
            if taken[place] <= most.get(place.split('/')[1], 0): z.extract(name, dest)
    return dest/'imagenette2-160'


@pytest.fixture(scope='session')
def photos(tmp_path_factory): return extract_photos(tmp_path_factory.mktemp('photos'), train=24, val=8)


@pytest.fixture
def web():
    "A web server at .url: put {path: bytes or (bytes, length that the header claims)} into .pages"
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            page = self.server.pages.get(self.path.lstrip('/'))
            if page is None: return self.send_error(404)
            content, length = page if isinstance(page, tuple) else (page, len(page))
            self.send_response(200)
            self.send_header('Content-Length', str(length))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.pages, server.url = {}, f'http://127.0.0.1:{server.server_port}/'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
