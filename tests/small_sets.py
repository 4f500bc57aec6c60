"""Small datasets in the formats of their authors, and the real ones of the shared folder."""
import gzip
import struct
from functools import partial

import numpy as np
import pytest
from resnet_nbdev import data
from scipy.io import savemat

from conftest import png, shared_file

get_data = partial(data.get_data, num_workers=0)
load_small = partial(get_data, presize=16, resize=16, bs=4)


def idx(array, kind=8, zero=0):
    "An array of bytes in the format of http://yann.lecun.com/exdb/mnist"
    return struct.pack(f'>HBB{array.ndim}I', zero, kind, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def mnist_files(train=60, test=20, classes=10):
    "{name without .gz: content} of a small MNIST"
    files = {}
    for seed, (name, n) in enumerate((('train', train), ('t10k', test))):
        images = np.random.default_rng(seed).integers(0, 256, (n, 28, 28), dtype=np.uint8)
        files |= {f'{name}-images-idx3-ubyte': idx(images), f'{name}-labels-idx1-ubyte': idx(np.arange(n) % classes)}
    return files


def write_files(dest, files):
    for name, content in files.items():
        (dest/name).parent.mkdir(parents=True, exist_ok=True)
        (dest/name).write_bytes(content)
    return dest


@pytest.fixture
def mnist(tmp_path): return write_files(tmp_path/'MNIST'/'raw', mnist_files())


CIFAR_NAMES = 'airplane automobile bird cat deer dog frog horse ship truck'.split()


def cifar_files(n=20, batches=5):
    "{name: content} of CIFAR-10's binary version with `n` records a file; the arrays by file, and the labels"
    files, arrays = {'batches.meta.txt': ('\n'.join(CIFAR_NAMES) + '\n\n').encode()}, {}
    for i, name in enumerate([*(f'data_batch_{i+1}.bin' for i in range(batches)), 'test_batch.bin']):
        pixels = np.random.default_rng(i).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        labels = (np.arange(n) + i) % 10
        arrays[name] = pixels, labels
        # one byte for the class, then the red, the green and the blue plane, each row by row
        files[name] = b''.join(bytes([c]) + b''.join(p[..., k].tobytes() for k in range(3))
                               for p, c in zip(pixels, labels.tolist()))
    return files, arrays


@pytest.fixture
def cifar(tmp_path): return write_files(tmp_path/'cifar-10-batches-bin', cifar_files()[0])


def cub_files(classes=('001.Black_footed_Albatross', '002.Least_Tern'), n=20, flags=None, absent=()):
    "{name: content} of a small CUB-200-2011; every third image is in the test set"
    names = [f'{c}/{i:03}.png' for c in classes for i in range(n)]
    flags = flags or [int(i % 3 > 0) for i in range(len(names))]
    table = lambda values: ''.join(f'{i} {v}\n' for i, v in enumerate(values, 1)).encode()
    files = {f'images/{o}': png(i) for i, o in enumerate(names) if o not in absent}
    return {'images.txt': table(names), 'train_test_split.txt': table(flags), **files}


@pytest.fixture
def cub(tmp_path): return write_files(tmp_path/'CUB_200_2011', cub_files())


def dog_files(dest, classes=('n02085620-Chihuahua', 'n02085782-Japanese_spaniel'), train=8, test=20):
    "A small Stanford Dogs, with lists as the authors' MATLAB wrote them"
    for k, (split, n) in enumerate((('train', train), ('test', test))):
        names = [f'{c}/{c.split("-")[0]}_{k}{i:03}.jpg' for c in classes for i in range(n)]
        write_files(dest/'Images', {o: png(1000*k + i) for i, o in enumerate(names)})
        cells = np.empty((len(names), 1), object)
        cells[:, 0] = names
        savemat(dest/f'{split}_list.mat', {'file_list': cells, 'labels': np.repeat([[1], [2]], n, 0)})
    return dest


@pytest.fixture
def dogs(tmp_path): return dog_files(tmp_path/'stanford_dogs')


SHARED = { # name: (archive, classes, images by split)
    'imagenette_160': ('imagenette2-160.zip', 10, dict(train=9469, val=3925)),
    'miniplaces': ('miniplaces-20.zip', 20, dict(train=20*150, val=20*50)),
    'mnist': ('mnist.zip', 10, dict(train=58_000, val=2000, test=10_000)),
    'stanford_dogs': ('stanford_dogs-mini.zip', 120, dict(train=1800, val=60, test=540)),
    'cub200': ('CUB_200_2011-100.zip', 100, dict(train=2612, val=291, test=1200))}
WNIDS = 'n03394916 n03888257 n03425413 n02102040 n03417042 n02979186 n01440764 n03445777 n03000684 n03028079'.split()
ENGLISH = ['French_horn', 'parachute', 'gas_pump', 'English_springer', 'garbage_truck', 'cassette_player', 'tench',
           'golf_ball', 'chain_saw', 'church']


def archive_of(name): return shared_file(SHARED[name][0])


def raw_mnist(folder, name, offset):
    return np.frombuffer(gzip.decompress((folder/f'{name}-ubyte.gz').read_bytes()), np.uint8, offset=offset)


def class_of(name, item):
    "The class of an image by another way than the reader's"
    if name == 'imagenette_160': return dict(zip(WNIDS, ENGLISH))[item.parent.name]
    if name == 'mnist':
        part = item.file.name.split('-')[0]
        return str(raw_mnist(item.file.parent, f'{part}-labels-idx1', 8)[item.i])
    return item.parent.name[dict(cub200=4, stanford_dogs=10).get(name, 0):]


LABELS = idx(np.arange(9))
