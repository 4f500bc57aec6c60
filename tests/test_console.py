"""A function becomes a command: its numbers, flags and refusals."""
import sys

import pytest
from resnet_nbdev.console import command, whole_numbers
from resnet_nbdev.core import InputError

from conftest import refuses


def test_not_a_number(refused_here):
    refused_here('resnet_fine_tune', 'digits', '--epochs', 'many',
                 says=["argument --epochs: invalid int value: 'many'", 'resnet_fine_tune --help'])


def test_unknown_option(refused_here):
    refused_here('resnet_fine_tune', 'digits', '--epoch', 3, says=['--epoch', 'resnet_fine_tune --help'])
    refused_here('resnet_predict', says=['run', 'resnet_predict --help'])


ERRORS = dict(input=InputError('first\nInputError: no such person'), file=OSError(2, 'No such', 'a.txt'),
              stop=KeyboardInterrupt())


@pytest.fixture
def greet(monkeypatch):
    "A command, and what it was called with"
    def greet(
        name:str, # of whom
        *,
        how_often:int=1, # times
        loud:bool=False, # in capitals
        error:str=None # to raise
    ):
        "Say hello"
        called.append((name, how_often, loud))
        if error: raise ERRORS[error]
    called = []

    def run(*args):
        monkeypatch.setattr(sys, 'argv', ['greet', *args])
        command(greet).main()
        return called.pop()
    return run


def test_flags(greet, capsys):
    "With _ or - alike, in any order; the comments are the help"
    assert greet('Ann') == ('Ann', 1, False)
    assert greet('--how-often', '3', 'Ann', '--loud') == greet('Ann', '--loud', '--how_often=3') == ('Ann', 3, True)
    with pytest.raises(SystemExit): greet('--help')
    said = capsys.readouterr().out
    for o in ('Say hello', 'of whom', '--how_often INT', 'times (default: 1)', 'in capitals'): assert o in said


@pytest.mark.parametrize('error, says', [('input', 'no such person'), ('file', 'No such: a.txt'),
                                         ('stop', 'interrupted')])
def test_one_sentence(greet, error, says, capsys, monkeypatch):
    "The last line of a message, without a traceback; one of several processes says which it is"
    for rank, who in (('0', ''), ('2', '(process 2) ')):
        monkeypatch.setenv('RANK', rank)
        with pytest.raises(SystemExit) as e: greet('Ann', '--error', error)
        assert e.value.code == 2 and capsys.readouterr().err == f'greet: {who}{says}\n'


def test_whole_numbers():
    assert whole_numbers('--progressive', '96,128') == [96, 128]
    refuses("--progressive takes whole numbers with commas between them, not '96,,128'", whole_numbers, '--progressive',
            '96,,128')
