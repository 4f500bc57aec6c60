"""Bad networks, hostile archives, killed processes and full disks: a whole file or folder, or one sentence."""
import errno
import gzip
import hashlib
import http.server
import io
import random
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import time
import types
import zipfile

import fastprogress.fastprogress as fastprogress
import pytest
from resnet_nbdev import archives
from resnet_nbdev.archives import download, unpack
from resnet_nbdev.core import InputError

from conftest import environment

BODY = random.Random(0).randbytes(3000)
SHA256 = hashlib.sha256(BODY).hexdigest()


def refuses(call, *args, says, **kw):
    with pytest.raises(InputError) as e: call(*args, **kw)
    assert '\n' not in str(e.value)
    for o in [says] if isinstance(says, str) else says: assert str(o) in str(e.value), (o, str(e.value))


def names(folder): return {p.name for p in folder.iterdir() if not p.name.endswith('.lock')}


def fetch(urls, dest, **kw): return download(urls, dest, **{'wait': 0.01, **kw})


@pytest.fixture
def once(monkeypatch):
    "A second try would wait first"
    def sleep(seconds): raise AssertionError('tried again')
    monkeypatch.setattr(archives.time, 'sleep', sleep)


# a server whose answers are written down before

class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        answers = self.server.answers[self.path[1:]]
        self.server.asked.append(self.headers.get('Range'))
        try: (answers.pop(0) if len(answers) > 1 else answers[0])(self)
        except OSError: pass  # the client hung up

    def start(self, code, **headers):
        self.send_response(code)
        for k, v in headers.items(): self.send_header(k.replace('_', '-'), str(v))
        self.end_headers()

    def log_message(self, *args): pass


@pytest.fixture
def net():
    "A server at .url: .answers is {name: list of answers, the last one for ever}; .asked lists the ranges asked for"
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Answer)
    server.answers, server.asked, server.url = {}, [], f'http://127.0.0.1:{server.server_port}/'
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def answer(code, **headers): return lambda h: h.start(code, Content_Length=0, **headers)


def body(content=BODY, cut=None, ranges=True, if_range=True, pause=0, step=2**16, **version):
    "The whole or the rest of a file; the connection ends after `cut` bytes"
    version = version or dict(ETag='"v1"')

    def send(h):
        asked = h.headers.get('Range') if ranges else None
        if if_range and h.headers.get('If-Range') != [*version.values()][0]: asked = None
        start = int(asked[6:-1]) if asked else 0
        if asked and start >= len(content):
            return h.start(416, Content_Length=0, Content_Range=f'bytes */{len(content)}', **version)
        placed = dict(Content_Range=f'bytes {start}-{len(content)-1}/{len(content)}') if asked else {}
        h.start(206 if asked else 200, Content_Length=len(content)-start, **version, **placed)
        end = len(content) if cut is None else start + cut
        for i in range(start, min(end, len(content)), step):
            h.wfile.write(content[i:min(i + step, end)])
            time.sleep(pause)
    return send


def chunked(*chunks, end=True):
    def send(h):
        h.protocol_version = 'HTTP/1.1'
        h.start(200, Transfer_Encoding='chunked', Connection='close')
        for o in chunks: h.wfile.write(b'%x\r\n%s\r\n' % (len(o), o))
        if end: h.wfile.write(b'0\r\n\r\n')
        h.close_connection = True
    return send


@pytest.fixture
def get(net, tmp_path):
    "Let a server answer so, download it to x.bin, and return its content"
    def get(*answers, **kw):
        net.answers['x'] = list(answers)
        assert fetch(net.url + 'x', tmp_path/'x.bin', **kw) == tmp_path/'x.bin'
        assert names(tmp_path) == {'x.bin'}
        return (tmp_path/'x.bin').read_bytes()
    return get


# downloads that succeed

def test_file_that_is_there_asks_nobody(get, net, tmp_path):
    assert get(body()) == BODY
    for kw in ({}, dict(bytes=3000, sha256=SHA256.upper(), md5=hashlib.md5(BODY).hexdigest())):
        fetch(net.url + 'x', tmp_path/'x.bin', **kw)
    assert net.asked == [None]


def test_wrong_file_that_is_there_is_replaced(get, net, tmp_path):
    (tmp_path/'x.bin').write_bytes(BODY[::-1])
    assert get(body(), sha256=SHA256) == BODY
    (tmp_path/'x.bin').write_bytes(b'short')
    assert get(body(), bytes=3000) == BODY


def test_wrong_file_stays_until_the_right_one_is_whole(net, tmp_path):
    (tmp_path/'x.bin').write_bytes(b'old')
    net.answers['x'] = [body(cut=1000)]
    refuses(fetch, net.url + 'x', tmp_path/'x.bin', tries=2, sha256=SHA256, says='it ended after 2,000 of 3,000 bytes')
    assert (tmp_path/'x.bin').read_bytes() == b'old'


def test_cut_connections_are_continued(get, net):
    assert get(body(cut=1000)) == BODY
    assert net.asked == [None, 'bytes=1000-', 'bytes=2000-']


def test_cut_connections_of_a_server_without_ranges(get, net):
    assert get(body(cut=1000, ranges=False), body(cut=2999, ranges=False), body(ranges=False)) == BODY
    assert net.asked == [None, 'bytes=1000-', 'bytes=2999-']


@pytest.mark.parametrize('version, continued', [
    (dict(Last_Modified='Wed, 21 Oct 2015 07:28:00 GMT'), True), (dict(ETag='W/"v1"'), False),
    (dict(Content_Language='en'), False)])
def test_only_what_is_identified_is_continued(get, net, version, continued):
    assert get(body(cut=1000, **version), body(**version)) == BODY
    assert net.asked == [None, 'bytes=1000-' if continued else None]


@pytest.mark.parametrize('if_range', [True, False])
def test_file_that_changed_on_the_server_is_begun_afresh(get, net, if_range):
    "Also when the server passes over If-Range and sends the rest of the new file"
    assert get(body(BODY[::-1], cut=1000), body(ETag='"v2"', if_range=if_range)) == BODY
    assert net.asked == [None, 'bytes=1000-'] + [None]*(not if_range)


def test_rest_that_begins_elsewhere_is_not_taken(get, net):
    def shifted(h): h.start(206, Content_Length=5, Content_Range='bytes 5-9/3000', ETag='"v1"')
    assert get(body(cut=1000), shifted, body()) == BODY
    assert net.asked == [None, 'bytes=1000-', None]


def test_part_that_was_complete(get, net, tmp_path):
    "A process was killed between the last byte and the renaming"
    (tmp_path/'x.bin.part').write_bytes(BODY)
    (tmp_path/'x.bin.part.etag').write_text('"v1"')
    assert get(body(), sha256=SHA256) == BODY
    assert net.asked == ['bytes=3000-']


def test_part_that_is_longer_than_the_file(get, net, tmp_path):
    (tmp_path/'x.bin.part').write_bytes(BODY*2)
    (tmp_path/'x.bin.part.etag').write_text('"v1"')
    assert get(body()) == BODY
    assert net.asked == ['bytes=6000-', None]


@pytest.mark.parametrize('code', [429, 500, 503])
def test_faults_that_pass(get, net, code):
    assert get(answer(code), answer(code), body()) == BODY


def test_tries_that_bring_a_megabyte_do_not_count(get, net):
    large = BODY*2000
    assert get(body(large, cut=1_200_000), tries=2) == large
    assert len(net.asked) == 5


def test_server_without_ranges_is_not_asked_for_ever(net, tmp_path):
    net.answers['x'] = [body(BODY*1000, cut=2_000_000, ranges=False)]
    refuses(fetch, net.url + 'x', tmp_path/'x.bin', tries=2, says='it ended after 2,000,000 of 3,000,000 bytes')
    assert len(net.asked) == 2


def test_chunks_without_a_length(get):
    assert get(chunked(BODY[:2000], end=False), chunked(BODY[:2000], BODY[2000:])) == BODY


def test_packed_content_is_stored_as_sent(get):
    "A .tgz that the server calls gzip-encoded keeps its size and its checksum"
    def packs_on_request(h):
        if h.headers['Accept-Encoding'] != 'identity': return h.start(406)
        body(Content_Encoding='gzip')(h)
    assert get(packs_on_request, sha256=SHA256) == BODY


@pytest.mark.parametrize('quiet', [True, False])
def test_bar(get, capsys, monkeypatch, quiet):
    monkeypatch.setattr(archives, 'progress_bar', fastprogress.ConsoleProgressBar)
    monkeypatch.setattr(fastprogress, 'NO_BAR', quiet)
    if quiet: monkeypatch.setattr(fastprogress.ConsoleProgressBar, 'fill', '')
    large = BODY*4000
    assert get(body(large, cut=8_000_000)) == large
    out = capsys.readouterr().out
    assert not out.strip() if quiet else '[8/13 ' in out and out.endswith('\r')


# downloads that fail

@pytest.mark.parametrize('code', [401, 403, 404, 410, 204, 304])
def test_faults_that_stay(net, tmp_path, once, code):
    net.answers['x'] = [answer(code)]
    refuses(fetch, net.url + 'x', tmp_path/'x.bin', says=[f'{net.url}x could not be fetched (status {code})'])
    assert len(net.asked) == 1 and names(tmp_path) == set()


def test_server_that_stays_down(net, tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr(archives.time, 'sleep', waited.append)
    net.answers['x'] = [answer(500)]
    refuses(download, net.url + 'x', tmp_path/'x.bin', says=['(status 500)', 'try again later'])
    assert len(net.asked) == 4 and waited == [1, 2, 4]


def test_no_server(tmp_path):
    url = 'http://127.0.0.1:9/x'
    refuses(fetch, url, tmp_path/'x.bin', tries=2, says=[url, 'Connection refused'])


def test_redirects_without_end(net, tmp_path, once):
    net.answers['x'] = [answer(302, Location='/x')]
    refuses(fetch, net.url + 'x', tmp_path/'x.bin', says='Exceeded 30 redirects')


def test_redirect_to_a_file(net, tmp_path, once):
    net.answers['x'] = [answer(302, Location='file:///etc/hostname')]
    refuses(fetch, net.url + 'x', tmp_path/'x.bin', says="'file:///etc/hostname'")


@pytest.mark.parametrize('url', [
    'ftp://127.0.0.1/x', 'file:///etc/hostname', 'x.zip', 'http://', 'http://[', 'http://*/x',
    f"http://{'a'*70}.org/x"])
def test_address_that_is_none(tmp_path, once, url): refuses(fetch, url, tmp_path/'x.bin', says=[url, 'could not be'])


def test_bad_tls(net, tmp_path, once):
    refuses(fetch, net.url.replace('http', 'https') + 'x', tmp_path/'x.bin', says=['https://127.0.0.1', '_ssl.c'])


def test_drip(net, tmp_path):
    net.answers['x'] = [body(BODY[:1000], pause=0.02, step=20)]
    start = time.monotonic()
    refuses(fetch, net.url + 'x', tmp_path/'x.bin', tries=2, timeout=0.3, least_rate=5000,
            says='less than 5 kB a second')
    assert time.monotonic() - start < 3 and len(net.asked) == 2
    slow_enough = fetch(net.url + 'x', tmp_path/'x.bin', timeout=0.3, least_rate=10)
    assert slow_enough.read_bytes() == BODY[:1000]


def test_silence(net, tmp_path):
    net.answers['x'] = [body(pause=1, step=1000)]
    refuses(fetch, net.url + 'x', tmp_path/'x.bin', tries=2, timeout=0.2, says='Read timed out')


def test_less_than_announced(web, tmp_path):
    web.pages['x'] = b'12345', 10
    refuses(fetch, web.url + 'x', tmp_path/'x.bin', tries=2, says=[web.url, 'it ended after 5 of 10 bytes'])
    assert not (tmp_path/'x.bin').exists()


def test_more_than_announced(web, tmp_path, once):
    web.pages['x'] = BODY, 1000
    refuses(fetch, web.url + 'x', tmp_path/'x.bin', bytes=3000, says='1,000 bytes instead of 3,000')
    refuses(fetch, web.url + 'x', tmp_path/'x.bin', sha256=SHA256, says=f'instead of {SHA256[:12]}...')
    assert names(tmp_path) <= {'x.bin.part.etag'}


def test_another_size_without_announcement(net, tmp_path):
    net.answers['x'] = [chunked(*[BODY]*100)]
    refuses(fetch, net.url + 'x', tmp_path/'x.bin', bytes=2999, says='instead of 2,999, so it was deleted')
    net.answers['x'] = [chunked(BODY)]
    refuses(fetch, net.url + 'x', tmp_path/'x.bin', tries=2, bytes=3001, says='it ended after 3,000 of 3,001 bytes')
    assert not (tmp_path/'x.bin').exists()


@pytest.mark.parametrize('kind', ['md5', 'sha256'])
def test_wrong_sum(web, tmp_path, once, kind):
    web.pages['x'] = BODY[::-1]
    found, want = (hashlib.new(kind, o).hexdigest()[:12] for o in (BODY[::-1], BODY))
    refuses(fetch, web.url + 'x', tmp_path/'x.bin', **{kind: hashlib.new(kind, BODY).hexdigest()},
            says=[f'{kind} {found}... instead of {want}...', 'deleted'])
    assert names(tmp_path) <= {'x.bin.part.etag'}


def test_mirrors(net, tmp_path):
    "Down, absent, damaged: the first good one serves; where there is none, each is named with its fault"
    net.answers.update(down=[answer(500)], absent=[answer(404)], damaged=[body(BODY[::-1])], good=[body()])
    urls = [net.url + o for o in ('down', 'absent', 'damaged')]
    refuses(fetch, urls, tmp_path/'x.bin', tries=2, sha256=SHA256,
            says=[f'{urls[0]} could not be fetched (status 500), {urls[1]} could not be fetched (status 404), '
                  f'{urls[2]} could not be fetched (sha256 '])
    assert fetch([*urls, net.url + 'good'], tmp_path/'x.bin', tries=2, sha256=SHA256).read_bytes() == BODY


# where it goes

def full(monkeypatch, free): monkeypatch.setattr(shutil, 'disk_usage', lambda path: types.SimpleNamespace(free=free))


def test_no_room_for_a_download(net, tmp_path, once, monkeypatch):
    full(monkeypatch, 2999)
    net.answers['x'] = [body()]
    refuses(fetch, net.url + 'x', tmp_path/'x.bin', says=[tmp_path/'x.bin', 'needs 3 kB', 'has 3 kB free', 'make room'])
    full(monkeypatch, 3000)
    fetch(net.url + 'x', tmp_path/'x.bin')


class Failing(io.BytesIO):
    def write(self, content): raise OSError(errno.ENOSPC, 'No space left on device')


@pytest.mark.parametrize('why', ['No space left on device', 'Permission denied'])
def test_writing_that_fails(net, tmp_path, once, monkeypatch, why):
    def fails(path, mode='r', **kw):
        if mode == 'rb': return open(path, mode, **kw)
        if why.startswith('No'): return Failing()
        raise PermissionError(errno.EACCES, why, str(path))
    archive = make_tar(tmp_path/'x.tar', {'a': b'text'})
    monkeypatch.setattr(archives, 'open', fails, raising=False)
    net.answers['x'] = [body()]
    refuses(fetch, net.url + 'x', tmp_path/'x.bin', says=[f'{tmp_path}/x.bin cannot be made ({why}', 'has room'])
    refuses(unpack, archive, tmp_path/'x', says=[f'{tmp_path}/x cannot be made ({why}'])
    assert not (tmp_path/'x').exists() and '.x.unpacking' not in names(tmp_path)


def test_place_that_cannot_be(net, tmp_path):
    (tmp_path/'file').touch()
    archive = make_tar(tmp_path/'x.tar', {'a': b'text'})
    for dest in (tmp_path/'file'/'x', tmp_path/('x'*300)):
        refuses(fetch, net.url + 'x', dest, says=f'{dest} cannot be made (')
        refuses(unpack, archive, dest, says=f'{dest} cannot be made (')
    refuses(fetch, net.url + 'x', tmp_path, says=f'{tmp_path} is a folder')
    refuses(unpack, archive, tmp_path/'file', says=f'{tmp_path}/file cannot be made (')
    assert names(tmp_path) == {'file', 'x.tar'}


# archives

FILES = {'train/cat/1.png': b'first', 'train/dog/\u00fc \U0001f408.png': b'', 'val/cat/2.png': b'second'*9000}
KINDS = ['w', 'w:gz', 'w:bz2', 'w:xz', 'zip']


def member(name, content=b'', type=tarfile.REGTYPE, **kw):
    m = tarfile.TarInfo(name)
    m.type, m.size, m.mode = type, len(content), 0o6777
    for k, v in kw.items(): setattr(m, k, v)
    return m, io.BytesIO(content)


def make_tar(path, members, mode='w:gz', **kw):
    with tarfile.open(path, mode, **kw) as tar:
        for m in [member(*o) for o in members.items()] if isinstance(members, dict) else members: tar.addfile(*m)
    return path


def make_zip(path, members, attr=0):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        for k, v in members.items() if isinstance(members, dict) else members:
            info = zipfile.ZipInfo('placeholder')
            info.filename, info.external_attr, info.compress_type = k, attr << 16, zipfile.ZIP_DEFLATED
            z.writestr(info, v)
    return path


def make(path, members, kind='w:gz'): return make_zip(path, members) if kind == 'zip' else make_tar(path, members, kind)


def tree(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


@pytest.mark.parametrize('kind', KINDS)
def test_unpack(tmp_path, kind):
    archive = make(tmp_path/'without a suffix', FILES, kind)
    folder = unpack(archive, tmp_path/'there'/'x')
    assert tree(folder) == FILES and names(tmp_path/'there') == {'x'}
    plain = tmp_path/'plain'
    plain.touch()
    assert {stat.S_IMODE(p.stat().st_mode) for p in folder.rglob('*.png')} == {stat.S_IMODE(plain.stat().st_mode)}
    archive.unlink()
    assert unpack(archive, folder) == folder
    refuses(unpack, archive, tmp_path/'y', says=f'there is no archive {archive}')


def test_dots_and_folders(tmp_path):
    "As `tar c .` writes them; a folder may come twice"
    folders = [member(o, type=tarfile.DIRTYPE) for o in ('./', './a', './a/', './a/empty')]
    archive = make_tar(tmp_path/'x.tar', [*folders, member('./a//b', b'text')])
    assert tree(unpack(archive, tmp_path/'x')) == {'a/b': b'text'}
    assert (tmp_path/'x'/'a'/'empty').is_dir()


def test_names_that_differ_in_case(tmp_path):
    assert set(tree(unpack(make_tar(tmp_path/'x.tar', {'a': b'1', 'A': b'2'}), tmp_path/'x'))) == {'a', 'A'}


@pytest.mark.parametrize('format', [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_formats(tmp_path, format):
    members = {'/'.join(['folder'*5]*4) + '/x.png': b'text'}
    assert tree(unpack(make_tar(tmp_path/'x.tar', members, format=format), tmp_path/'x')) == members


@pytest.fixture
def spurned(tmp_path):
    "An archive that must be refused without a trace; it stays itself"
    def spurned(archive, *says, **kw):
        content = archive.read_bytes()
        refuses(unpack, archive, tmp_path/'place'/'x', says=[archive, *says], **kw)
        assert names(tmp_path/'place') == set() and archive.read_bytes() == content
        assert names(tmp_path) == {'place', archive.name}
    return spurned


@pytest.mark.parametrize('kind', ['w:gz', 'zip'])
@pytest.mark.parametrize('name, why', [
    ('/etc/passwd', 'has an absolute name'), ('//x', 'has an absolute name'), ('C:/x', 'has an absolute name'),
    ('c:x', 'has an absolute name'), ('../x', 'outside'), ('a/../../x', 'outside'), ('a/..', 'outside'),
    ('..\\x', 'no plain path'), ('a\\x', 'no plain path'), ('y'*300, 'File name too long'),
    ('y/'*3000 + 'y', 'File name too long'), ('.', 'exists')])
def test_hostile_names(tmp_path, spurned, kind, name, why):
    spurned(make(tmp_path/'bad', {'good': b'text', name: b'text'}, kind), f'member {name[:150]!r}'[:-1], why)


def test_name_with_a_null(tmp_path, spurned): spurned(make_zip(tmp_path/'bad', {'a\0b': b'text'}), 'no plain path')


@pytest.mark.filterwarnings('ignore:Duplicate name')
@pytest.mark.parametrize('kind', ['w:gz', 'zip'])
@pytest.mark.parametrize('pair', [('a', 'a'), ('a', './a'), ('a', 'a/b'), ('a', 'a/b/c'), ('a/b', 'a')])
def test_names_that_exclude_each_other(tmp_path, spurned, kind, pair):
    members = [(o, b'text') for o in pair]
    archive = make(tmp_path/'bad', [member(*o) for o in members] if kind != 'zip' else members, kind)
    spurned(archive, f'member {pair[1]!r} cannot be written (', 'xists' if pair[1] != 'a/b/c' else 'Not a directory')


@pytest.mark.parametrize('type', [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE])
def test_links_and_devices(tmp_path, spurned, type):
    members = [member('good', b'text'), member('train', type=type, linkname='good'), member('train/x', b'text')]
    spurned(make_tar(tmp_path/'bad', members), "its member 'train' is a link, a device")


@pytest.mark.parametrize('type', [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFBLK])
def test_links_and_devices_in_zip(tmp_path, spurned, type):
    archive = make_zip(tmp_path/'bad', {'train': b'/etc/passwd'}, type | 0o777)
    spurned(archive, "its member 'train' is a link or a device")


def test_encrypted(tmp_path, spurned):
    content = make_zip(tmp_path/'bad', {'x': b'text'}).read_bytes()
    (tmp_path/'bad').write_bytes(content.replace(b'PK\1\2\x14\3\x14\0\0\0', b'PK\1\2\x14\3\x14\0\1\0'))
    spurned(tmp_path/'bad', "its member 'x' is encrypted")


def test_rare_method(tmp_path, spurned):
    with zipfile.ZipFile(tmp_path/'bad', 'w', zipfile.ZIP_LZMA) as z: z.writestr('x', b'text')
    spurned(tmp_path/'bad', "its member 'x' is packed by a rare method")


@pytest.mark.parametrize('kind', KINDS)
def test_expansion(tmp_path, spurned, kind):
    "The limit is one of all files together, and exact"
    archive = make(tmp_path/'bad', {'a': bytes(600_000), 'b': bytes(400_001)}, kind)
    spurned(archive, 'it holds more than 1 MB', limit=10**6)
    unpack(archive, tmp_path/'x', limit=10**6 + 1)


def test_default_limit(tmp_path, spurned, monkeypatch):
    "The larger of 1 GB and 100 times the archive's size"
    seen = []
    monkeypatch.setattr(archives, '_write', lambda members, folder, limit: seen.append(limit))
    for size in (1, 50_000_000):
        with open(tmp_path/'bad', 'wb') as f: f.truncate(size)
        spurned(tmp_path/'bad', 'it holds no file')
    assert seen == [10**9, 5*10**9]


def test_size_that_a_zip_hides(tmp_path, spurned):
    "Its directory says 10 bytes; what is read ends there, and the checksum tells"
    content = make_zip(tmp_path/'bad', {'x': bytes(10**6)}).read_bytes()
    (tmp_path/'bad').write_bytes(content.replace((10**6).to_bytes(4, 'little'), (10).to_bytes(4, 'little')))
    spurned(tmp_path/'bad', 'is no whole tar or zip archive (Bad CRC-32', limit=10**5)


def test_holes(tmp_path, spurned):
    "A sparse member of 1 TB in an archive of 10 kB"
    sparse = member('x', type=tarfile.REGTYPE, pax_headers={'GNU.sparse.major': '0', 'GNU.sparse.minor': '1',
        'GNU.sparse.map': f'{10**12},0', 'GNU.sparse.size': str(10**12), 'GNU.sparse.numblocks': '1'})
    spurned(make_tar(tmp_path/'bad', [sparse], format=tarfile.PAX_FORMAT), 'it holds more than 5 MB', limit=5*10**6)


def test_many_members(tmp_path, spurned, monkeypatch):
    monkeypatch.setattr(archives, 'MOST_MEMBERS', 10)
    spurned(make_tar(tmp_path/'bad', {str(i): b'' for i in range(11)}), 'more than 10 members')


@pytest.mark.parametrize('type', [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_endless_header(tmp_path, spurned, type):
    "It would be read into memory"
    members = [member('a', b'text'), member('x', bytes(2*10**6), type)]
    spurned(make_tar(tmp_path/'bad', members), 'a header of 2,000,384')


def test_nested_headers(tmp_path, spurned):
    members = [member('x', b'y\0', tarfile.GNUTYPE_LONGNAME) for _ in range(3000)]
    spurned(make_tar(tmp_path/'bad', members), 'is no whole tar')


def test_negative_size(tmp_path, spurned):
    header = member('x', size=-512)[0].tobuf(tarfile.GNU_FORMAT)
    (tmp_path/'bad').write_bytes(header + bytes(1024))
    spurned(tmp_path/'bad')


def test_endless_tail(tmp_path, spurned):
    archive = make_tar(tmp_path/'bad', {'a': b'text'}, 'w')
    archive.write_bytes(gzip.compress(archive.read_bytes() + bytes(70*2**20), 1))
    spurned(archive, 'much follows behind its end')


@pytest.mark.parametrize('kind', KINDS)
def test_empty(tmp_path, spurned, kind):
    spurned(make(tmp_path/'bad', {}, kind), 'it holds no file')
    folders = {'a/': b''} if kind == 'zip' else [member('a', type=tarfile.DIRTYPE)]
    spurned(make(tmp_path/'bad', folders, kind), 'it holds no file')


@pytest.mark.parametrize('content', [
    b'', b'<html>', b'PK\3\4', b'\x1f\x8b', b'BZh9', b'\xfd7zXZ\0', bytes(range(256))*9])
def test_no_archive(tmp_path, spurned, content):
    (tmp_path/'bad').write_bytes(content)
    spurned(tmp_path/'bad', 'is no whole tar or zip archive (', 'fetch it again')


@pytest.mark.parametrize('kind', KINDS)
def test_cut(tmp_path, spurned, kind):
    "At 40 places, the borders of a tar's blocks among them; what follows a tar's first empty block is padding"
    make(tmp_path/'bad', FILES, kind)
    content = (tmp_path/'bad').read_bytes()
    end = content.rindex(b'second') + 6 if kind == 'w' else len(content)
    for at in {*range(512, end, 512*(end//15_000 + 1)), *range(1, end, end//20), end - 1, end} - {len(content)}:
        (tmp_path/'bad').write_bytes(content[:at])
        spurned(tmp_path/'bad', 'is no whole tar or zip archive')


@pytest.mark.parametrize('kind', KINDS[1:])
def test_flipped_bits(tmp_path, kind):
    "Each is found, or without effect; a tar alone has no checksum of its files"
    content, rng, found = make(tmp_path/'x', FILES, kind).read_bytes(), random.Random(0), 0
    for _ in range(150):
        bad = bytearray(content)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        (tmp_path/'x').write_bytes(bad)
        try: assert tree(unpack(tmp_path/'x', tmp_path/'there')) == FILES
        except InputError: found += 1
        shutil.rmtree(tmp_path/'there', ignore_errors=True)
        assert names(tmp_path) == {'x'}
    assert found > 80


def test_damaged_header_in_the_middle(tmp_path, spurned):
    "tarfile takes it for the end"
    content = make_tar(tmp_path/'bad', {'a': b'1', 'b': b'2'}, 'w').read_bytes()
    (tmp_path/'bad').write_bytes(content.replace(b'b\0\0', b'c\0\0', 1))
    spurned(tmp_path/'bad', 'it breaks off')


@pytest.mark.parametrize('kind', ['zip', 'w'])
def test_no_room_for_the_files(tmp_path, spurned, monkeypatch, kind):
    archive = make(tmp_path/'bad', {'x': bytes(7*10**6)}, kind)
    full(monkeypatch, 6_900_000)
    spurned(archive, tmp_path/'place'/'x', 'needs 7 MB and its disk has 6.9 MB free')


# processes

def python(code, *args):
    start = ('import sys\nfrom pathlib import Path\nfrom resnet_nbdev.archives import download, unpack\n'
             'url, here = sys.argv[1], Path(sys.argv[2])\nprint("ready", flush=True)\nsys.stdin.readline()\n')
    return subprocess.Popen([sys.executable, '-c', start + code, *map(str, args)], env=environment(), text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ready(p):
    assert p.stdout.readline() == 'ready\n', p.communicate()
    return p


def kill_when(p, true):
    ready(p).stdin.write('\n')
    p.stdin.flush()
    for _ in range(2000):
        if true() or p.poll() is not None: break
        time.sleep(0.005)
    p.send_signal(signal.SIGKILL)
    assert p.wait(20) == -signal.SIGKILL, p.communicate()


def test_killed(net, tmp_path):
    "In the middle of a download, and then of an extraction; the next call goes on from there"
    large = make_tar(tmp_path/'large.tar', {f'{i:05}': BODY for i in range(6000)}, 'w').read_bytes()
    net.answers['x'] = [body(large, pause=0.01), body(large)]
    part, dest, folder = (tmp_path/o for o in ('x.tar.part', 'x.tar', 'x'))
    code = 'unpack(download(url, here/"x.tar"), here/"x")'
    kill_when(python(code, net.url + 'x', tmp_path), lambda: archives._size(part) > 10**6)
    assert not dest.exists() and archives._size(part) > 10**6
    tmp = tmp_path/'.x.unpacking'
    kill_when(python(code, net.url + 'x', tmp_path), lambda: (tmp/'00300').exists())
    assert net.asked[0] is None and int(net.asked[1][6:-1]) > 10**6 and len(net.asked) == 2
    assert dest.read_bytes() == large and (tmp/'00300').exists() and not folder.exists()
    (tmp/'left over').touch()
    unpack(dest, folder)
    assert len(tree(folder)) == 6000 and names(tmp_path) == {'large.tar', 'x.tar', 'x'}


def test_three_at_once(net, tmp_path):
    "One fetches and unpacks, the others wait for it"
    content = make_tar(tmp_path/'large.tar', {f'{i:05}': b'text' for i in range(3000)}, 'w').read_bytes()
    net.answers['x'] = [body(content, pause=0.02)]
    code = 'print(len(list(unpack(download(url, here/"x.tar"), here/"x").iterdir())))'
    processes = [python(code, net.url + 'x', tmp_path) for _ in range(3)]
    for p in processes: ready(p)
    for p in processes:
        p.stdin.write('\n')
        p.stdin.flush()
    for p in processes: assert p.communicate(timeout=60) == ('3000\n', '')
    assert net.asked == [None]
    assert names(tmp_path) == {'large.tar', 'x.tar', 'x'}
