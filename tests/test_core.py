"""What cannot be done is said in one sentence."""
import subprocess
import sys

import pytest
from resnet_nbdev.core import InputError, check_counts, error_reason, name_a_few, one_line

from conftest import environment, refuses


@pytest.mark.parametrize('value', [0, -1, 1.5, '3', float('nan')])
def test_counts(value):
    refuses(f'bs must be a whole number of at least 1, and is {value}', check_counts, bs=value)
    check_counts(bs=None, workers=2)
    check_counts(least=0, epochs=0)


def test_a_reason_is_a_few_words():
    assert error_reason(OSError('no room.\nTraceback and more')) == 'no room'
    assert error_reason(KeyError()) == 'KeyError', 'an error without a word is called by its name'
    assert ' at 0x' not in error_reason(OSError('cannot identify image file <_io.BytesIO object at 0x7f12>'))


def test_names_stay_on_one_line():
    assert one_line('a\nb\x1b[31m größe') == r'a\nb\x1b[31m größe'
    assert name_a_few(f'{i}\n' for i in range(5)) == r'0\n, 1\n, 2\n, 3\n, 4\n'
    assert name_a_few(range(1000)) == '0, 1, 2, 3, 4, ...'


def test_nothing_is_imported_for_it(tmp_path):
    "So that --help and a refusal come at once"
    code = "import sys, resnet_nbdev.core; print([o for o in ('torch', 'numpy', 'fastcore') if o in sys.modules])"
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.stdout == '[]\n', done
    assert issubclass(InputError, ValueError), 'known to those who catch what Python raises for a wrong value'
