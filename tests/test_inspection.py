"""A dataset looked over: duplicates, leaks, unreadable files, counts."""
import shutil

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from PIL import Image
from resnet_nbdev.inspection import check_data, plot_counts

from conftest import noise, png, refuses


def test_check_finds_nothing_in_a_clean_set(folder):
    problems, counts = check_data(folder)
    assert problems.empty and list(problems.columns) == ['split', 'class', 'file', 'problem', 'detail']
    assert counts.to_dict() == dict(train=dict(cat=8, dog=8), val=dict(cat=4, dog=4))


def test_check_finds_each_kind_of_problem(folder):
    train = folder/'train'/'cat'
    (train/'bad.png').write_bytes(b'bad')
    (train/'empty.png').touch()
    (train/'half.png').write_bytes(png(50, 60)[:4000])
    Image.fromarray(noise(51)).save(train/'jpeg.png', 'JPEG')
    Image.fromarray(noise(52)).save(train/'without', 'PNG')
    (train/'tiny.png').write_bytes(png(53, 4))
    Image.fromarray(noise(54, 60)[:3]).save(train/'strip.png')
    shutil.copy(train/'0.png', train/'twice.png')
    shutil.copy(train/'1.png', folder/'train'/'dog'/'other.png')
    shutil.copy(train/'2.png', folder/'val'/'cat'/'leak.png')
    shutil.copy(folder/'val'/'dog'/'0.png', folder/'val'/'dog'/'twin.png')
    problems, counts = check_data(folder)
    place = lambda *o: str(folder.joinpath(*o))
    want = {(place('train', 'cat', f'{k}'), v) for k, v in {
        'bad.png': 'unreadable', 'empty.png': 'unreadable', 'half.png': 'unreadable', 'jpeg.png': 'wrong extension',
        'without': 'wrong extension', 'tiny.png': 'tiny', 'strip.png': 'tiny', 'twice.png': 'duplicate'}.items()}
    want |= {(place('train', 'dog', 'other.png'), 'in two classes'), (place('val', 'cat', 'leak.png'), 'in two splits'),
             (place('val', 'dog', 'twin.png'), 'duplicate')}
    assert {(o.file, o.problem) for o in problems.itertuples()} == want and len(problems) == len(want)
    details = dict(zip(problems.file, problems.detail))
    assert details[place('train', 'cat', 'tiny.png')] == '4x4 pixels'
    assert 'JPEG' in details[place('train', 'cat', 'jpeg.png')]
    assert place('train', 'cat', '2.png') in details[place('val', 'cat', 'leak.png')]
    assert details[place('train', 'cat', 'empty.png')] == 'empty'
    for o in problems.itertuples(): assert f'{folder}/{o.split}/{o._2}/' in o.file
    assert counts.to_dict() == dict(train=dict(cat=8 + 5, dog=8 + 1), val=dict(cat=4 + 1, dog=4 + 1)), 'readable ones'


def test_check_with_another_measure_of_tiny(folder):
    assert (check_data(folder, tiny=21)[0].problem == 'tiny').sum() == 24
    assert check_data(folder, tiny=20)[0].empty


def test_check_passes_good_extensions(folder):
    "Also those that Pillow calls otherwise: a telephone's .jpg is often a JPEG with a second picture in it, an MPO"
    train = folder/'train'/'cat'
    for name, fmt in (('a.jpg', 'JPEG'), ('b.JPEG', 'JPEG'), ('c.jfif', 'JPEG'), ('d.tif', 'TIFF'), ('e.bmp', 'BMP'),
                      ('f.GIF', 'GIF'), ('g.webp', 'WEBP')):
        Image.fromarray(noise(ord(name[0]))).save(train/name, fmt)
    assert check_data(folder)[0].empty
    second = Image.fromarray(noise(61))
    Image.fromarray(noise(60)).save(train/'phone.jpg', 'MPO', save_all=True, append_images=[second])
    assert Image.open(train/'phone.jpg').format == 'MPO' and check_data(folder)[0].empty


def test_check_of_idx_files(mnist):
    "Duplicates are found between files that are one file"
    assert check_data(mnist)[0].empty
    content = bytearray((mnist/'t10k-images-idx3-ubyte').read_bytes())
    content[16:16+784] = (mnist/'train-images-idx3-ubyte').read_bytes()[16+784*3:16+784*4]
    (mnist/'t10k-images-idx3-ubyte').write_bytes(content)
    problems, counts = check_data('mnist', path=mnist)
    assert problems.problem.tolist() == ['in two splits'] and problems.split.tolist() == ['test']
    assert problems.file[0].endswith('t10k-images-idx3-ubyte[0]') and 'train-images-idx3-ubyte[3]' in problems.detail[0]
    assert counts.sum().to_dict() == dict(train=58, val=2, test=20)


def test_check_of_a_set_without_a_readable_file(folder):
    for f in folder.rglob('*.png'): f.write_bytes(b'bad')
    problems, counts = check_data(folder)
    assert (problems.problem == 'unreadable').all() and len(problems) == 24 and counts.to_numpy().sum() == 0


def test_check_of_an_unknown_name(): refuses("unknown dataset 'imagenet'", check_data, 'imagenet')


@pytest.mark.parametrize('n', [2, 200])
def test_plot_of_many_classes(n):
    names = [f'{i} {"long name "*8}' for i in range(n)]
    counts = pd.DataFrame(dict(train=range(1, n+1), val=range(n)), index=pd.Index(names, name='class'))
    fig = plot_counts(counts)
    fig.canvas.draw()
    assert isinstance(fig, plt.Figure)
    ax, = fig.axes
    labels = [o.get_text() for o in ax.get_yticklabels()]
    assert len(labels) == n and labels[-1].startswith('0 long name') and all(len(o) < 40 for o in labels)
    bars = [o for o in ax.patches if o.get_width()]
    assert sum(o.get_width() for o in bars) == counts.to_numpy().sum()
    bar = next(o for o in ax.patches if abs(o.get_y() + o.get_height()/2 - (n - 1)) < .01)
    assert bar.get_width() == counts.train.iloc[0], 'the first class is at the top'
