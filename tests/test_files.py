"""A file is there whole or not at all, and sizes can be read."""
import os
import shutil
import subprocess
import sys

import pytest
from resnet_nbdev.files import disk_room, format_bytes, write_file

from conftest import environment


def test_human():
    assert [format_bytes(o) for o in (0, 1, 999, 1000, 999_499, 999_500, 1e6, 5e8, 1.5e12, 4e15)] == [
        '0 B', '1 B', '999 B', '1 kB', '999 kB', '1 MB', '1 MB', '500 MB', '1.5 TB', '4e+03 TB']


def test_room_of_a_path_that_is_not_there(tmp_path):
    assert disk_room(tmp_path/'a'/'b') == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)


# writing

@pytest.mark.parametrize('what', ['replace', 'fsync'])
def test_a_write_that_fails_keeps_the_old_file(what, tmp_path, monkeypatch):
    path = tmp_path/'a.json'
    write_file(path, b'old')

    def fail(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, what, fail)
    with pytest.raises(OSError, match='No space left'): write_file(path, b'new and longer')
    monkeypatch.undo()
    assert path.read_bytes() == b'old'
    assert sorted(o.name for o in tmp_path.iterdir()) == ['a.json'], 'half of a file takes the space that was missing'
    write_file(path, b'new and longer')
    assert path.read_bytes() == b'new and longer' and [o.name for o in tmp_path.iterdir()] == ['a.json']


KILLED_WRITER = '''
import os, random, signal, sys, time
from pathlib import Path
from resnet_nbdev.files import write_file
path, contents = Path(sys.argv[1])/'a.bin', [b'a'*3_000_000, b'b'*2_000_000]
write_file(path, contents[0])
random.seed(1)
for i in range(25):
    if not (pid := os.fork()):
        while True:
            for o in contents: write_file(path, o)
    time.sleep(random.uniform(0.005, 0.05))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert path.read_bytes() in contents, f'a part of a file after kill {i}'
print('whole')
'''


def test_a_killed_writer_leaves_whole_files(tmp_path):
    done = subprocess.run([sys.executable, '-c', KILLED_WRITER, tmp_path], env=environment(), capture_output=True,
                          text=True, timeout=120)
    assert done.stdout == 'whole\n', done.stderr
