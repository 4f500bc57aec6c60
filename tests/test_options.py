"""An option is stated once: the command line, the signatures and the refusals are made from its field."""
import inspect
from dataclasses import fields

import pytest
from resnet_nbdev.augment import FITS
from resnet_nbdev.cli import resnet_fine_tune
from resnet_nbdev.console import command_parser
from resnet_nbdev.core import InputError
from resnet_nbdev.data import get_data
from resnet_nbdev.distributed import RULES
from resnet_nbdev.learner import OPTIMIZERS, resnet_learner
from resnet_nbdev.options import (
    GROUPS,
    DataOptions,
    OneOf,
    Options,
    RunOptions,
    ToolOptions,
    option,
    option_help,
    takes,
)
from resnet_nbdev.plans import PLANS, SCHEDULES
from resnet_nbdev.recipes import run_recipe
from resnet_nbdev.resident import resident_data
from resnet_nbdev.training import fine_tune

ALL = {o.name: o for g in GROUPS.values() for o in fields(g)}
TAKEN = {get_data: ['data'], resident_data: ['data'], resnet_learner: ['network', 'tools'], fine_tune: ['run'],
         run_recipe: list(GROUPS), resnet_fine_tune: list(GROUPS)}
OTHERWISE = {resident_data: {'resize'}}  # is called size


def test_no_name_is_in_two_groups(): assert len(ALL) == sum(len(fields(g)) for g in GROUPS.values())


@pytest.mark.parametrize('name, there', [
    ('plan', PLANS), ('opt', OPTIMIZERS), ('schedule', SCHEDULES), ('fit', FITS)])
def test_names_to_choose_from_are_those_that_act(name, there):
    check = ALL[name].metadata['check']
    assert isinstance(check, OneOf) and check.names == tuple(there)


def test_rules_for_several_processes():
    for o in RULES: RunOptions(scale_lr=o)
    with pytest.raises(InputError, match="unknown rule 'cubic'.*" + ', '.join(RULES)): RunOptions(scale_lr='cubic')


@pytest.mark.parametrize('function', TAKEN, ids=lambda o: o.__name__)
def test_signatures_show_them(function):
    shown = inspect.signature(function).parameters
    for o in (o for g in TAKEN[function] for o in fields(GROUPS[g]) if o.name not in OTHERWISE.get(function, ())):
        assert o.name in shown, o.name


@pytest.mark.parametrize('o', ALL.values(), ids=lambda o: o.name)
def test_each_has_help_and_a_flag(o, capsys):
    parser = command_parser(resnet_fine_tune)
    flags = {a.dest: a for a in parser._actions}
    assert o.metadata['help'] and (o.name in flags) == o.metadata['flag']
    if o.metadata['flag']: assert flags[o.name].help == option_help(o)


def test_what_is_not_given_is_not_handed_on():
    given = vars(command_parser(resnet_fine_tune).parse_args(['digits', '--wd', '0']))
    assert given['wd'] == 0 and not {'ema', 'epochs', 'strict'} & set(given)


def test_a_check_is_made_with_the_object():
    class Even(Options): pass
    def even(name, value):
        if value % 2: raise InputError(f'{name} is odd')
    Even.__annotations__ = dict(n=int)
    Even.n = option(2, 'a number', even)
    from dataclasses import dataclass
    Even = dataclass(Even)
    assert Even().n == 2 and Even(n=4).not_none() == dict(n=4)
    with pytest.raises(InputError, match='n is odd'): Even(n=3)
    with pytest.raises(TypeError): Even(m=3)
    assert Even.pick(dict(n=6, m=3)) == Even(6)

    @takes(Even, but=['m'])
    def f(x, n=8, **kw): return x
    assert list(inspect.signature(f).parameters) == ['x', 'n'] and f.options == {}


@pytest.mark.parametrize('kw, says', [
    (dict(bs=0), 'bs must be a whole number of at least 1, and is 0'), (dict(fit='stretch'), "unknown fit 'stretch'"),
    (dict(max_per_class=(1, 2, 3)), 'one number or a pair'), (dict(max_per_class=(1, 0)), 'max_per_class must')])
def test_data_options_refuse(kw, says):
    with pytest.raises(InputError, match=says): DataOptions(**kw)


@pytest.mark.parametrize('kw, says', [
    (dict(ema=1), 'ema must be at least 0 and below 1, and is 1'), (dict(mixup=float('inf')), 'mixup must be'),
    (dict(opt='sdg'), "unknown optimizer 'sdg': it is one of adam, sgd"),
    (dict(mixup=.1, cutmix=.1), 'choose one of them'), (dict(precision='int8'), "unknown precision 'int8'"),
    (dict(progressive=(96, 0)), 'progressive must be whole numbers')])
def test_tool_options_refuse(kw, says):
    with pytest.raises(InputError, match=says): ToolOptions(**kw)
