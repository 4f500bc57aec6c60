"""Exported files do what the network does, tell how to use them, and are refused with one sentence."""
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from resnet_nbdev.checkpoints import tensor_file
from resnet_nbdev.data import image_loader
from resnet_nbdev.demo import demo_page
from resnet_nbdev.export import FORMATS, describe_run, export_model, export_run, input_recipe
from resnet_nbdev.networks import custom_resnet
from resnet_nbdev.resnet import create_resnet
from resnet_nbdev.runs import load_run, predict
from resnet_nbdev.weights import load_weights, torchvision_state
from safetensors import safe_open

from conftest import randomised, refuses

ARCHS = ['cifar_resnet8', 'resnet18', 'bottlenecks', 'resnet18d', 'preact_resnet18',
         pytest.param('resnet50', marks=pytest.mark.slow)]
GRAPHS = ['onnx', 'pt2']
MEAN, STD = [.4, .5, .45], [.2, .25, .3]
VOCAB = ['cat', 'dog', 'émeu']


def network(arch):
    torch.manual_seed(0)
    made = custom_resnet([1]*4, [8, 8, 16, 16], 3, block='BottleneckBlock') if arch == 'bottlenecks' else None
    return randomised(made or create_resnet(arch, len(VOCAB)))


def configuration(arch='cifar_resnet8', **kw):
    data = dict(presize=48, resize=40, augment={}, fit='crop', stats=[MEAN, STD], vocab=VOCAB, **kw)
    return dict(name='mine', arch=arch, data=data)


def called(content, to):
    "The function in a file, and what the file tells"
    if to == 'onnx':
        ort = pytest.importorskip('onnxruntime')
        session = ort.InferenceSession(content)
        about = session.get_modelmeta().custom_metadata_map['about']
        return lambda x: torch.from_numpy(session.run(['logits'], {'image': x.numpy()})[0]), json.loads(about)
    import io
    extra = {'about': ''}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        program = torch.export.load(io.BytesIO(content), extra_files=extra)
    return program.module(), json.loads(extra['about'])


@pytest.mark.parametrize('to', GRAPHS)
@pytest.mark.parametrize('arch', ARCHS)
@torch.no_grad()
def test_graph_is_the_network_at_every_size(arch, to):
    if to == 'onnx': pytest.importorskip('onnx'), pytest.importorskip('onnxruntime')
    model, config = network(arch), configuration(arch)
    config['data']['resize'] = model.stride + 8
    call, about = called(export_model(model, describe_run(model, config), to), to)
    mean, std = (torch.tensor(o).view(3, 1, 1) for o in (MEAN, STD))
    least = about['smallest']
    for shape in ((1, least, least), (2, least + 1, 2*least + 5), (3, 2*least, 2*least)):
        x = torch.rand(shape[0], 3, *shape[1:])
        want = model((x - mean)/std)
        assert want.std() > 1e-3, 'the networks tell images apart'
        torch.testing.assert_close(call(x), want, atol=1e-4, rtol=1e-4)
    assert (about['classes'], about['arch'], about['normalised_inside']) == (VOCAB, arch, True)
    assert least == model.stride + (to == 'pt2')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A folder as a finished run leaves it, of a network that has learned nothing"
    folder = tmp_path_factory.mktemp('runs')/'mine'
    folder.mkdir()
    (folder/'config.json').write_text(json.dumps(configuration()))
    about = dict(kind='best', arch='cifar_resnet8', vocab=VOCAB)
    (folder/'best.safetensors').write_bytes(tensor_file(torchvision_state(network('cifar_resnet8')), about))
    return folder


def need(to):
    if to == 'onnx': pytest.importorskip('onnx'), pytest.importorskip('onnxruntime')


@pytest.mark.parametrize('to', FORMATS)
def test_file_tells_how_to_use_it(run, to, tmp_path):
    need(to)
    path = export_run(run, to, tmp_path/'it')
    assert path == tmp_path/'it' and [o.name for o in tmp_path.iterdir()] == ['it'], 'no half-written file is left'
    if to == 'safetensors':
        with safe_open(path, 'pt') as f: about = json.loads(f.metadata()['about'])
    else: _, about = called(path.read_bytes(), to)
    assert about['classes'] == VOCAB and about['normalised_inside'] == (to != 'safetensors')
    assert (about['presize'], about['resize'], about['fit'], about['mean'], about['std']) == (48, 40, 'crop', MEAN, STD)
    assert ('subtract mean' in about['input']) == (to == 'safetensors') and '48x48' in about['input']
    content = path.read_bytes()
    assert b'resnet_nbdev.' not in content, 'no module of this package is needed to read it'
    assert str(Path(torch.__file__).parents[1]).encode() not in content, 'it does not tell the folders of its maker'


def test_safetensors_are_the_weights(run, tmp_path):
    again = load_weights(create_resnet('cifar_resnet8', 3), export_run(run, 'safetensors', tmp_path/'w.safetensors'))
    x = torch.rand(2, 3, 20, 20)
    assert torch.equal(again.eval()(x), load_run(run)[0](x))


@pytest.mark.parametrize('fit, augment', [('crop', {}), ('squish', {}), ('pad', {}), ('croppad', dict(crop=True))])
def test_recipe_in_words_leads_to_the_input(fit, augment):
    "Followed with Pillow alone, it gives what the validation loader gives, up to a few grey levels at edges"
    y, x = np.mgrid[:90, :130]/20
    photo = Image.fromarray((127 + 60*np.stack([np.sin(x), np.cos(y), np.sin(x + y)], -1)*[1, 1.2, 2]).astype(np.uint8))
    (loaded,), = image_loader([photo], 48, 40, augment, 1, 'cpu', fit, 'none')
    words = input_recipe(dict(presize=48, resize=40, augment=augment, fit=fit))
    w, h = photo.size
    if 'middle square' in words: im = photo.crop(((w-h)//2, 0, (w+h)//2, h)).resize((48, 48), Image.BILINEAR)
    elif 'longer side' in words:
        im = Image.new('RGB', (48, 48))
        im.paste(photo.resize((48, round(48*h/w)), Image.BILINEAR), (0, (48 - round(48*h/w))//2))
    elif 'black square' in words: im = photo.crop(((w-48)//2, (h-48)//2, (w+48)//2, (h+48)//2))
    else: im = photo.resize((48, 48), Image.BILINEAR)
    if 'middle 40x40' in words: im = im.crop((4, 4, 44, 44))
    if 'scale that to 40x40' in words: im = im.resize((40, 40), Image.BILINEAR)
    gap = np.abs(np.asarray(im)/255 - loaded[0].permute(1, 2, 0).numpy())
    assert gap.mean() < 0.02, gap.mean()


def test_onnx_of_a_trained_run_predicts_the_same(digits_run, digit_files, tmp_path):
    need('onnx')
    call, about = called(export_run(digits_run, 'onnx', tmp_path/'d.onnx').read_bytes(), 'onnx')
    ours = predict(digits_run, digit_files, k=1)
    side = about['resize']
    x = np.stack([np.float32(Image.open(o).convert('RGB').resize((side, side), Image.BILINEAR)) for o in digit_files])
    probs = call(torch.from_numpy(x/255).permute(0, 3, 1, 2).contiguous()).softmax(1)
    assert [about['classes'][i] for i in probs.argmax(1)] == list(ours['class'])
    np.testing.assert_allclose(probs.amax(1), ours.probability, atol=1e-4)


# refusals

def test_refusals(run, tmp_path):
    refuses(["unknown format 'pickle'", *FORMATS], export_run, run, 'pickle')
    refuses(['there is no run nowhere'], export_run, 'nowhere', 'pt2', runs=tmp_path)
    (tmp_path/'there').write_text('mine')
    refuses([tmp_path/'there', 'exists already', '--overwrite'], export_run, run, 'safetensors', tmp_path/'there')
    assert (tmp_path/'there').read_text() == 'mine'
    export_run(run, 'safetensors', tmp_path/'there', overwrite=True)
    assert (tmp_path/'there').stat().st_size > 10_000
    refuses([tmp_path, 'is a folder'], export_run, run, 'safetensors', tmp_path)
    refuses([tmp_path/'no', 'no folder that can be written to'], export_run, run, 'safetensors', tmp_path/'no'/'w')


def test_run_without_weights(run, tmp_path):
    bare = tmp_path/'runs'/'bare'
    bare.mkdir(parents=True)
    (bare/'config.json').write_bytes((run/'config.json').read_bytes())
    refuses(['best.safetensors'], export_run, 'bare', 'safetensors', runs=bare.parent)
    assert [o.name for o in bare.iterdir()] == ['config.json']


def test_graph_that_differs_is_not_written(run, tmp_path, monkeypatch):
    "By an exporter that forgets the normalisation"
    from resnet_nbdev import export
    make, read = export._WRITERS['pt2']
    monkeypatch.setitem(export._WRITERS, 'pt2', (lambda net, about: make(net.model, about), read))
    refuses(['the pt2 file differs from the network by'], export_run, run, 'pt2', tmp_path/'it')
    assert not list(tmp_path.iterdir())


def test_pt2_needs_more_than_one_place():
    model = network('cifar_resnet8')
    about = dict(describe_run(model, configuration()), resize=4)
    refuses(['more than 4 pixels', 'has 4'], export_model, model, about, 'pt2')


@pytest.mark.parametrize('package, extra', [('onnx', 'export'), ('onnxruntime', 'export'), ('gradio', 'demo')])
def test_missing_package_is_named(run, package, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    before = sorted(run.iterdir())
    call = demo_page if extra == 'demo' else export_run
    refuses([package, f"pip install 'resnet_nbdev[{extra}]'"], call, run)
    assert sorted(run.iterdir()) == before


@pytest.mark.parametrize('to', GRAPHS)
def test_command_says_where_the_file_is_and_nothing_else(run, run_cli, tmp_path, to):
    need(to)
    done = run_cli('resnet_export', run, '--to', to, '--out', 'it')
    assert (done.returncode, done.stdout, done.stderr) == (0, 'it\n', '')
    assert (tmp_path/'it').stat().st_size > 100_000


def test_command_refuses(run, refused_here):
    refused_here('resnet_export', run, '--to', 'keras', says=["unknown format 'keras'"])
    refused_here('resnet_export', 'nowhere', '--to', 'pt2', says=['there is no run nowhere'])
