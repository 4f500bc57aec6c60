"""Timed in turns: who is called when, and what the figures make of it."""
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from resnet_nbdev.timing import break_even, in_turns, paired_seconds, quartiles, ratio

from conftest import refuses


def test_turns():
    "Each is called once a round, each is first as often as the others, and a first round is not counted"
    called = []
    calls = {k: lambda k=k: called.append(k) or len(called) for k in 'abc'}
    table = in_turns(calls, 6)
    assert len(called) == 21 and table.shape == (6, 3) and list(table) == list('abc')
    assert set(Counter(called[3::3]).values()) == {2} and all(set(called[i:i+3]) == set('abc') for i in range(0, 21, 3))
    assert sorted(table.to_numpy().ravel()) == [*range(4, 22)], 'the numbers that the calls return'
    refuses('rounds must be', in_turns, calls, 0)


def test_ratio_within_each_round():
    "What slows both does not count"
    slow = np.array([1., 5, 2, 9])
    found = ratio(pd.DataFrame(dict(a=2*slow, b=slow)), 'a', 'b')
    assert set(found.values()) == {2.} and quartiles(pd.Series([1., 2, 3, 4, 5])) == dict(median=3., low=2., high=4.)


def test_seconds_are_those_of_the_call():
    times = paired_seconds(dict(none=lambda: None, more=lambda: sum(range(200_000))), 5)
    assert times.shape == (5, 2) and (times > 0).all(axis=None) and (times.more > times.none).all()


@pytest.mark.parametrize('seconds, saved, steps', [(10, 1, 10), (10, 3, 4), (10, 0, None), (10, -1, None)])
def test_break_even(seconds, saved, steps):
    "Whole steps, and never if none of them is shorter"
    assert break_even(seconds, saved) == steps
