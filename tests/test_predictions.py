"""What a network says of each image stands beside the truth, in the order of the images."""
import copy
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.vision.all import ClassificationInterpretation, Learner
from PIL import Image
from resnet_nbdev.data import image_loader
from resnet_nbdev.explain import embed, features, plot_embedding
from resnet_nbdev.learner import resnet_learner
from resnet_nbdev.predictions import (
    class_table,
    confident_errors,
    confusion,
    most_confused,
    plot_confusion,
    predictions,
    show_predictions,
)

from photos_of_noise import LOADERS, WNIDS, learner


def by_hand(learn, items):
    "The probabilities of images that are prepared one at a time"
    info = learn.dls.info
    look = lambda o: learn.model.eval()(image_loader([o], info['presize'], info['resize'], info['augment'],
                                                     fit=info['fit'], stats=info['stats']).one_batch()[0])
    with torch.no_grad(): return torch.cat([look(o).as_subclass(torch.Tensor) for o in items]).softmax(1).numpy()


def check_table(learn, ds_idx, names):
    table, dl = predictions(learn, ds_idx), learn.dls.loaders[ds_idx]
    items = list(dl.dataset.items)
    p = by_hand(learn, items)
    assert list(table['item']) == items and list(table.index) == list(range(len(items)))
    assert list(table.truth) == [names(o) for o in items]
    assert list(table.predicted) == [learn.dls.vocab[i] for i in p.argmax(1)]
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3)
    close(table.probability, p.max(1))
    close(table.truth_probability, [row[learn.dls.vocab.o2i[names(o)]] for row, o in zip(p, items)])
    close(table.attrs['probabilities'], p)
    close(table.loss, -np.log(table.truth_probability))
    assert (table.is_correct == (table.truth == table.predicted)).all()
    return table


@pytest.mark.parametrize('kind', LOADERS)
def test_probabilities(three, kind):
    "Each set, in its order; the training set without shuffling, augmentation and a dropped last batch"
    names = dict(zip(WNIDS, ('tench', 'English_springer', 'French_horn')))
    learn = learner(three, kind)
    assert list(learn.dls.vocab) == ['English_springer', 'French_horn', 'tench']
    sizes = [len(check_table(learn, i, lambda o: names[o.parent.name])) for i in range(3)]
    assert sizes == [18, 12, 15]


@pytest.mark.parametrize('kind', LOADERS)
def test_hundred_classes(hundred, kind):
    learn = learner(hundred, kind, bs=64)
    table = check_table(learn, 1, lambda o: o.parent.name)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        counts, scores = confusion(table, learn.dls.vocab), class_table(table, learn.dls.vocab)
        fig = plot_confusion(counts)
        fig.canvas.draw()
        plot_embedding(embed(features(learn)[0]), features(learn)[1], learn.dls.vocab).canvas.draw()
    assert table.predicted.nunique() < 100 and scores.notna().all(axis=None)
    assert counts.sum(axis=1).eq(2).all() and np.trace(counts) == table.is_correct.sum()
    assert max(fig.get_size_inches()) < 8
    assert not {o.get_text() for o in fig.axes[0].get_xticklabels()} & set(learn.dls.vocab)


def test_against_fastai(learn):
    table = predictions(learn)
    with learn.no_bar(), learn.no_logging():
        other = ClassificationInterpretation.from_learner(learn)
        assert (confusion(table, learn.dls.vocab) == other.confusion_matrix()).all(axis=None)
        pairs = {(a, b): n for a, b, n in other.most_confused()}
    found = most_confused(table, 100)
    assert {(o.truth, o.predicted): o.images for o in found.itertuples()} == pairs
    assert (found.truth != found.predicted).all() and found.images.is_monotonic_decreasing
    np.testing.assert_allclose(table.loss, other.losses, atol=1e-4)


def test_a_loss_without_softmax(three):
    model = learner(three).model
    dls = LOADERS['stock'](three, 4)
    table = predictions(Learner(dls, model, loss_func=lambda x, y: F.mse_loss(x, F.one_hot(y, 3).float())))
    np.testing.assert_allclose(table.probability, predictions(resnet_learner(dls, model)).probability, atol=1e-6)
    np.testing.assert_allclose(table.attrs['probabilities'].sum(1), 1, atol=1e-5)


def test_tables_can_be_joined(learn):
    "pandas compares and copies what hangs on a frame"
    a, b = predictions(learn), predictions(learn, 2)
    assert len(pd.concat([a, b])) == 27 and len(a.merge(b, on='truth'))
    part = a[a.truth == 'tench']
    np.testing.assert_array_equal(part.attrs['probabilities'][part.index].max(1), part.probability)
    p = copy.deepcopy(a.attrs['probabilities'])
    assert (p == p.max(1, keepdims=True)).sum() == len(p) and p.shape == (12, 3)


def test_errors_in_order():
    table = pd.DataFrame(dict(is_correct=[True, False, False, True, False], probability=[.9, .3, .8, .5, .8],
                              truth=list('abcab'), predicted=list('acbab')))
    assert confident_errors(table).index.tolist() == [2, 4, 1] and confident_errors(table, 1).index.tolist() == [2]
    assert confident_errors(table[table.is_correct]).empty
    assert most_confused(table[table.truth == table.predicted]).empty


def test_a_class_that_never_occurs():
    table = pd.DataFrame(dict(truth=['a', 'a', 'b'], predicted=['a', 'b', 'b']))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        scores, counts = class_table(table, ['never', 'b', 'a']), confusion(table, ['never', 'b', 'a'])
        share = plot_confusion(counts).axes[0].images[0].get_array()
    assert scores.loc['never'].tolist() == [0, 0, 0, 0] and scores.index.tolist() == ['never', 'b', 'a']
    assert scores.loc['a'].tolist() == [2, 1, .5, 2/3] and scores.loc['b'].tolist() == [1, .5, 1, 2/3]
    np.testing.assert_allclose(share, [[0, 0, 0], [0, 1, 0], [0, .5, .5]])
    assert counts.index.name == 'truth' and counts.loc['a', 'b'] == 1 and counts.loc['b', 'a'] == 0


def test_the_picture_of_the_row(tmp_path):
    "Images of one colour each, told by their file names"
    for split, n in (('train', 4), ('val', 6)):
        for c in 'xy':
            (tmp_path/split/c).mkdir(parents=True)
            for i in range(n):
                grey = 20*i + 10*(c == 'y') + 100*(split == 'train')
                Image.new('RGB', (16, 16), (grey, 255 - grey, 50)).save(tmp_path/split/c/f'{grey}.png')
    for kind in LOADERS:
        learn = learner(tmp_path, kind)
        for ds_idx in (0, 1):
            table = predictions(learn, ds_idx).sample(frac=1, random_state=0)
            fig = show_predictions(learn, table, ds_idx)
            for ax, o in zip(fig.axes, table.itertuples()):
                grey = int(Path(o.item).stem)
                np.testing.assert_allclose(np.asarray(ax.images[0].get_array()).mean((0, 1))*255,
                                           [grey, 255 - grey, 50], atol=2)
                assert ax.get_title().split() == [o.truth, o.predicted, f'{o.probability:.2f}']
                assert ax.spines['left'].get_visible() != o.is_correct
