"""Values and files of a state: whatever is stored comes back to the bit, and nothing opens a pickle."""
import ast
import json
from pathlib import Path

import numpy as np
import pytest
import resnet_nbdev
import torch
from resnet_nbdev.catalogue import PLAIN
from resnet_nbdev.checkpoints import flatten_state, read_state, restore_state, state_file, tensor_file
from resnet_nbdev.core import InputError


def same(a, b):
    "Equal in type, value and order, to the bit"
    if isinstance(a, (torch.Tensor, np.ndarray)):
        bits = lambda o: o.tobytes() if isinstance(o, np.ndarray) else o.reshape(-1).view(torch.uint8).numpy().tobytes()
        return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)
    if type(a) is not type(b): return False
    if isinstance(a, dict): return same(list(a), list(b)) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float): return np.float64(a).tobytes() == np.float64(b).tobytes() or a != a and b != b
    return a == b


try:
    from hypothesis import HealthCheck, given, settings, strategies as st
    from hypothesis.extra.numpy import array_shapes, arrays
except ImportError: pass
else:
    DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.uint8, torch.int8,
              torch.int16, torch.int32, torch.int64]

    @st.composite
    def tensors(draw):
        shape, dtype = draw(st.lists(st.integers(0, 3), max_size=3)), draw(st.sampled_from(DTYPES))
        n = int(np.prod(shape, dtype=int))
        size = torch.empty(0, dtype=dtype).element_size()
        raw = bytearray(draw(st.binary(min_size=n*size, max_size=n*size)))
        if dtype == torch.bool: raw = bytearray(o % 2 for o in raw)
        t = (torch.frombuffer(raw, dtype=dtype) if n else torch.empty(0, dtype=dtype)).reshape(shape)
        return t.transpose(0, -1) if len(shape) > 1 and draw(st.booleans()) else t

    ARRAYS = arrays(st.sampled_from('f2 f4 f8 ? i1 i2 i4 i8 u1 u2 u4 u8'.split()),
                    array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
    PLAIN = st.none() | st.booleans() | st.integers(-2**700, 2**700) | st.floats() | st.text()
    KEYS = st.text() | st.integers(-2**70, 2**70)
    VALUES = st.recursive(PLAIN | tensors() | ARRAYS, lambda o: st.lists(o, max_size=4)
                          | st.dictionaries(KEYS, o, max_size=4) | st.lists(o, max_size=4).map(tuple), max_leaves=12)
    COMMON = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

    @settings(max_examples=150, **COMMON)
    @given(VALUES)
    def test_values_come_back(value):
        kept = {}
        about = json.loads(json.dumps(flatten_state(value, kept)))
        assert all(isinstance(o, torch.Tensor) for o in kept.values())
        assert same(restore_state(about, kept), value)

    @settings(max_examples=60, **COMMON)
    @given(VALUES)
    def test_values_come_back_from_a_file(tmp_path_factory, value):
        path = tmp_path_factory.getbasetemp()/'state.safetensors'
        path.write_bytes(state_file(value))
        assert same(read_state(path), value)
        assert state_file(value) == state_file(value)

    @settings(max_examples=80, **COMMON)
    @given(data=st.data())
    def test_any_changed_byte_is_noticed(tmp_path_factory, data):
        path = tmp_path_factory.getbasetemp()/'changed.safetensors'
        content = bytearray(state_file({'a': (1, 2.5, None), 'b': torch.arange(5.), 3: torch.tensor(True)}))
        at, bit = data.draw(st.integers(0, len(content)-1)), data.draw(st.integers(0, 7))
        content[at] ^= 1 << bit
        path.write_bytes(content)
        with pytest.raises(InputError, match='is damaged|is no whole file'): read_state(path)

    @settings(max_examples=60, **COMMON)
    @given(content=st.binary(max_size=200))
    def test_any_bytes_are_no_state(tmp_path_factory, content):
        path = tmp_path_factory.getbasetemp()/'bytes.safetensors'
        path.write_bytes(content)
        with pytest.raises(InputError, match='is no whole file'): read_state(path)


@pytest.mark.parametrize('value', [object(), {1, 2}, {'a': [print]}, b'bytes', 1j, np.array(['text']), np.array([None]),
                                   np.datetime64('2020-01-01'), {(1, 2): 3}], ids=lambda o: type(o).__name__)
def test_what_cannot_be_stored_is_refused(value):
    with pytest.raises(InputError, match='not stored'): state_file({'here': value})


@pytest.mark.parametrize('about', [{'list': []}, {'dict': 3}, {'dict': [['a', {'tensor': 'b'}]]}, {'a': 1, 'b': 2}, {},
                                   {'dict': [[[], 1]]}], ids=repr)
def test_a_sound_file_of_another_kind_is_refused(tmp_path, about):
    (tmp_path/'state.safetensors').write_bytes(tensor_file({'a': torch.ones(2)}, about))
    with pytest.raises(InputError, match='state.safetensors'): read_state(tmp_path/'state.safetensors')


def test_one_key_within_another():
    "Names with dots, and a number beside its text"
    value = {'a': {'b': torch.zeros(1)}, 'a.b': torch.ones(1), 1: torch.tensor(2.), '1': torch.tensor(3.)}
    kept = {}
    assert same(restore_state(flatten_state(value, kept), kept), value)


def unsafe(source):
    "Lines that open pickles: those of libraries that do nothing else, fastai's, and torch's without weights_only=True"
    lines = []
    for o in ast.walk(ast.parse(source)):
        names = [a.name for a in o.names] if isinstance(o, (ast.Import, ast.ImportFrom)) else []
        if isinstance(o, ast.ImportFrom): names.append(o.module or '')
        bad = {'pickle', 'cloudpickle', 'dill', 'joblib', 'shelve', 'marshal'} & {n.split('.')[0] for n in names}
        loads = isinstance(o, (ast.Name, ast.Attribute, ast.alias)) and \
            'load_learner' in (getattr(o, 'id', ''), getattr(o, 'attr', ''), getattr(o, 'name', ''))
        calls = False
        if isinstance(o, ast.Call) and ast.unparse(o.func) in ('torch.load', 'np.load'):
            given = {k.arg: getattr(k.value, 'value', None) for k in o.keywords}
            calls = given.get('weights_only') is not True if ast.unparse(o.func) == 'torch.load' \
                else given.get('allow_pickle', False) is not False
        if bad or loads or calls: lines.append(o.lineno)
    return lines


def test_the_package_opens_no_pickles():
    for o in ('import pickle', 'from pickle import loads', 'torch.load(f)', 'torch.load(f, weights_only=False)',
              'np.load(f, allow_pickle=True)', 'learn = load_learner(f)', 'from fastai.learner import load_learner'):
        assert unsafe(o), o
    assert not unsafe("torch.load(f, map_location='cpu', weights_only=True)")
    files = sorted(Path(resnet_nbdev.__file__).parent.rglob('*.py'))
    assert len(files) > 10
    assert {f.name: found for f in files if (found := unsafe(f.read_text()))} == {}
