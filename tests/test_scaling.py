"""What several processes send, and what an epoch costs."""
import pytest
from resnet_nbdev.scaling import allreduce_bench, epoch_cost

from conftest import refuses


def test_cost_of_an_epoch():
    "One GPU sends nothing; of several, no more is gained than the slowest part allows"
    table = epoch_cost([1, 2, 16], rate=1000, link=1e9, loader=3000, parameters=25_000_000, bs=100, images=60_000)
    assert table['all-reduce'][1] == 0 and table.compute.tolist() == [60, 30, 3.75]
    assert table.loader.tolist() == [20, 20, 10]
    assert (table['at least'] <= table['at most']).all()
    assert table.efficiency[1] == 1 and table.efficiency.is_monotonic_decreasing


def test_two_processes():
    "They are started, add up tensors of four sizes, and end"
    pytest.importorskip('accelerate', reason='an extra, not installed beside the wheel')
    refuses('parameters must be', allreduce_bench, 0)
    n, rates = allreduce_bench(1000, rounds=2)
    assert (n, rates.shape) == (2, (2, 4)) and (rates > 0).all(axis=None)
