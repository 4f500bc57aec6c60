"""Images by address: hostile addresses, names, redirects, servers and contents, and what is still fetched."""
import contextlib
import gzip
import http.server
import io
import ipaddress
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
import tracemalloc
import warnings
import zlib

import pytest
from PIL import Image
from resnet_nbdev.core import InputError
from resnet_nbdev.images import open_image
from resnet_nbdev.web import fetch_image, find_images, is_public

from conftest import noise


def refuses(says, url, call=fetch_image, **kw):
    with pytest.raises(InputError) as e: call(url, **kw)
    said = str(e.value)
    assert said.isprintable() and len(said) < 700 and e.value.__context__ is None
    for o in [says] if isinstance(says, str) else says: assert o in said, (o, said)
    return said


def encoded(size=20, kind='png'):
    f = io.BytesIO()
    Image.fromarray(noise(0, size)).save(f, kind)
    return f.getvalue()


PNG = encoded()


def inside(url, **kw): return fetch_image(url, **{'allow_private': True, 'timeout': 5, 'seconds': 10, **kw})


@pytest.fixture
def no_timer_left():
    yield
    timers = [o for o in threading.enumerate() if isinstance(o, threading.Timer)]
    for o in timers: o.join(1)
    assert not any(o.is_alive() for o in timers)


@pytest.fixture
def answers():
    "A server at .url: put {path: (status, headers, content)} into .pages; .asked lists what was asked for"
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path)
            self.server.headers.append(self.headers)
            status, headers, content = self.server.pages.get(self.path, (404, {}, b''))
            self.send_response(status)
            for k, v in {'Content-Length': len(content), **headers}.items():
                if v is not None: self.send_header(k, str(v))
            self.end_headers()
            with contextlib.suppress(OSError): self.wfile.write(content)

        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.pages, server.asked, server.headers = {}, [], []
    server.url = f'http://127.0.0.1:{server.server_port}'
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def talks():
    "talks(call, family) -> port of a server that does call(socket) with each connection"
    with contextlib.ExitStack() as stack:
        def start(call, family=socket.AF_INET):
            s = stack.enter_context(socket.create_server(('::1' if family == socket.AF_INET6 else '127.0.0.1', 0),
                                                         family=family))

            def serve():
                with contextlib.suppress(OSError):
                    while True:
                        with s.accept()[0] as one, contextlib.suppress(OSError): call(one)
            threading.Thread(target=serve, daemon=True).start()
            return s.getsockname()[1]
        yield start


def drip(first, one=b'x', pause=0.02):
    "Never silent for long, and not done for long"
    def talk(s):
        end = time.monotonic() + 5
        s.recv(10_000)
        s.sendall(first)
        while time.monotonic() < end:
            time.sleep(pause)
            s.sendall(one)
    return talk


def say(*parts):
    def talk(s):
        s.recv(10_000)
        for o in parts: s.sendall(o)
    return talk


# which addresses are public

PRIVATE = ['0.0.0.0', '0.1.2.3', '10.1.2.3', '100.64.0.1', '100.100.100.200', '127.0.0.1', '127.255.0.1',
           '168.63.129.16', '169.254.169.254', '172.16.0.1', '172.31.255.255', '192.0.0.8', '192.0.0.192',
           '192.168.1.1', '198.18.0.1', '203.0.113.5', '224.0.0.1', '240.0.0.1', '255.255.255.255']


@pytest.mark.parametrize('address', PRIVATE)
def test_private_inside_ipv6(address):
    "Mapped, NAT64, 6to4 and in the old compatible form"
    n = int(ipaddress.IPv4Address(address))
    other = [0xffff << 32 | n, 0x64ff9b << 96 | n, 0x2002 << 112 | n << 80, n]
    assert not any(is_public(o) for o in [address, *(str(ipaddress.IPv6Address(o)) for o in other)])


@pytest.mark.parametrize('address', ['::', '::1', 'fe80::1', 'fe80::1%eth0', 'fec0::1', 'fc00::1', 'fd00:ec2::254',
                                     'ff02::1', '64:ff9b:1::808:808', '100::1', '2001:db8::1', '2001::1', '::8.8.8.8'])
def test_private_ipv6(address): assert not is_public(address)


@pytest.mark.parametrize('address', [
    '8.8.8.8', '172.32.0.1', '100.128.0.1', '192.169.0.1', '169.253.0.1', '223.255.255.1', '2606:4700::1111',
    '::ffff:8.8.8.8', '64:ff9b::808:808', '2002:808:808::1'])
def test_public(address): assert is_public(address)


# addresses that lead inside

SPELLED = ['127.0.0.1', '127.1', '2130706433', '0x7f000001', '0x7f.0.0.1', '017700000001', '0177.0.0.1', '0',
           'localhost', 'LocalHost', 'localhost.', '[::1]', '[0:0:0:0:0:0:0:1]',
           '[::ffff:127.0.0.1]', '[::ffff:7f00:1]']


@pytest.mark.parametrize('host', SPELLED)
def test_this_machine(host, answers, no_timer_left):
    said = refuses([f'http://{host}:', 'no public address', 'allow_private', '--allow_private', 'file'],
                   f'http://{host}:{answers.server_port}/a.png')
    assert 'leads to ' in said and not answers.asked


def test_this_machine_if_it_is_allowed(answers):
    "The addresses above do reach the server, or their refusal would show nothing"
    answers.pages['/a.png'] = 200, {}, PNG
    for host in ('127.0.0.1', '2130706433', '0177.0.0.1', 'LocalHost'):
        assert inside(f'http://{host}:{answers.server_port}/a.png') == PNG
    assert [*find_images(f'HTTP://127.0.0.1:{answers.server_port}/a.png', allow_private=True).values()] == [PNG]


@pytest.mark.parametrize('address', ['169.254.169.254', '10.0.0.1', '[fd00:ec2::254]', '100.100.100.200', '0x0a.1'])
def test_the_network_inside_is_not_even_called(address, monkeypatch):
    def connect(*args): raise AssertionError('called')
    monkeypatch.setattr(socket.socket, 'connect', connect)
    refuses('no public address', f'http://{address}/latest/meta-data/')
    refuses('no public address', f'https://{address}:22/')
    refuses('no public address', f'http://{address}/', find_images)


@pytest.fixture
def names(monkeypatch):
    "What names lead to: {name: list of lists of addresses, one for each look-up, the last for ever}"
    known, real, asked = {}, socket.getaddrinfo, []

    def lookup(host, port, *args, **kw):
        if host not in known: return real(host, port, *args, **kw)
        asked.append(host)
        found = known[host].pop(0) if len(known[host]) > 1 else known[host][0]
        return [o for a in found for o in real(a, port, *args, **kw)]
    monkeypatch.setattr(socket, 'getaddrinfo', lookup)
    known['asked'] = asked
    return known


FAR = '2000::1'  # public by its number, and given to nobody


def test_name_of_this_machine(names, answers):
    names['pictures.example'] = [['127.0.0.1']]
    refuses(['pictures.example', 'leads to 127.0.0.1'], f'http://pictures.example:{answers.server_port}/')
    assert not answers.asked


@pytest.mark.parametrize('addresses', [[FAR, '127.0.0.1'], ['127.0.0.1', FAR], ['8.8.8.8', '::1']])
def test_one_of_several_addresses_is_private(addresses, names, answers):
    names['pictures.example'] = [addresses]
    refuses('no public address', f'http://pictures.example:{answers.server_port}/')
    assert not answers.asked


def test_name_that_changes_its_address(names, answers):
    "DNS rebinding: public when it is checked, this machine when it is called"
    answers.pages['/a.png'] = 200, {}, PNG
    names['pictures.example'] = [[FAR], ['127.0.0.1']]
    url = f'http://pictures.example:{answers.server_port}/a.png'
    refuses('could not be fetched', url, timeout=0.5)
    assert names['asked'] == ['pictures.example'] and not answers.asked
    assert inside(url) == PNG, 'the second answer leads to the server'


def test_a_dead_address_before_a_live_one(names, answers):
    names['pictures.example'] = [['::1', '127.0.0.1']]  # the server listens on the second only
    answers.pages['/a.png'] = 200, {}, PNG
    assert inside(f'http://pictures.example:{answers.server_port}/a.png') == PNG
    assert answers.headers[0]['Host'] == f'pictures.example:{answers.server_port}'


def test_ipv6(talks):
    try: port = talks(say(b'HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n' % len(PNG), PNG), socket.AF_INET6)
    except OSError: pytest.skip('no IPv6')
    assert inside(f'http://[::1]:{port}/a.png') == PNG
    refuses('leads to ::1', f'http://[::1]:{port}/a.png')


# what is no address for an image

@pytest.mark.parametrize('url', ['file:///etc/passwd', 'FILE:///etc/passwd', 'ftp://8.8.8.8/a.png', 'gopher://8.8.8.8/',
                                 'data:image/png;base64,' + 'A'*10_000, 'dict://8.8.8.8:11211/', 'httpx://8.8.8.8/'])
def test_other_schemes(url):
    refuses([url[:50], 'is no http or https address'], url)
    refuses([url[:50], 'no file or folder', 'must begin with http:// or https://'], url, find_images)


@pytest.mark.parametrize('name', ['no.jpg', '~nobody9/a.jpg', 'a\0b', 'a\nb', 'x'*5000, 'C:\\a.jpg'])
def test_files_that_are_not_there(name): assert 'http' not in refuses('there is no file or folder', name, find_images)


def test_file_with_a_colon_in_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'file:a.png').write_bytes(PNG)
    assert len(find_images('file:a.png')) == 1


@pytest.mark.parametrize('user', ['me@', 'me:secret@', 'me:secret@8.8.8.8:80@', ':secret@', '8.8.8.8%2f@'])
def test_user_names(user, answers):
    answers.pages['/'] = 200, {}, PNG
    said = refuses('has a user name in it', f'http://{user}127.0.0.1:{answers.server_port}/', allow_private=True)
    assert 'secret' not in said and not answers.asked


def test_password_that_lies_at_home(answers, tmp_path, monkeypatch):
    (tmp_path/'.netrc').write_text('machine 127.0.0.1 login me password secret\n')
    monkeypatch.setenv('NETRC', str(tmp_path/'.netrc'))
    answers.pages['/a.png'] = 200, {}, PNG
    inside(answers.url + '/a.png')
    assert answers.headers[0]['Authorization'] is None


@pytest.mark.parametrize('url', [
    'http://', 'http:///a.png', 'http://[', 'http://[::1', 'http://a..b/', 'http://*/', f"http://{'a'*70}.example/",
    'http://127.0.0.1:99999/', 'http://\n/', 'http://①②⑦.⓪.⓪.①/'])
def test_broken_addresses(url): refuses('http:', url)


# redirects

def chain(n, end): return {f'/{i}': (302, {'Location': f'/{i+1}' if i < n else end}, b'') for i in range(1, n+1)}


def test_five_redirects(answers):
    answers.pages = {**chain(5, '/a.png'), '/a.png': (200, {}, PNG)}
    assert inside(answers.url + '/1') == PNG
    assert answers.asked == ['/1', '/2', '/3', '/4', '/5', '/a.png']


def test_six_redirects(answers):
    answers.pages = {**chain(6, '/a.png'), '/a.png': (200, {}, PNG)}
    refuses([answers.url + '/1 (redirected to ', 'could not be fetched (TooManyRedirects)'], answers.url + '/1', inside)
    assert '/a.png' not in answers.asked


def test_redirects_in_a_ring(answers):
    answers.pages['/1'] = 302, {'Location': '/1'}, b''
    refuses('TooManyRedirects', answers.url + '/1', inside)
    assert len(answers.asked) == 6


@pytest.mark.parametrize('status', [301, 302, 303, 307, 308])
def test_redirect_to_this_machine(status, answers, monkeypatch):
    "The first server counts as public here; the one that it sends to is real"
    monkeypatch.setattr('resnet_nbdev.web.is_public', lambda address: address == '127.0.0.1')
    answers.pages = {'/a.png': (200, {}, PNG)}
    for i, o in enumerate(['169.254.169.254', '[::1]', '2130706434', '10.0.0.1:80']):
        answers.pages[f'/{i}'] = status, {'Location': f'http://{o}/a.png'}, b''
        refuses([f'{answers.url}/{i} (redirected to http://{o}/a.png)', 'no public address'], f'{answers.url}/{i}')
    answers.pages['/far'] = status, {'Location': f'{answers.url}/a.png'}, b''
    assert fetch_image(f'{answers.url}/far') == PNG, 'the check itself lets this server through'


@pytest.mark.parametrize('to, says', [
    ('file:///etc/passwd', 'no http or https address'), ('ftp://8.8.8.8/a', 'no http or https address'),
    ('data:image/png;base64,AAAA', 'no http or https address'), ('http://me:secret@127.0.0.1/', 'user name'),
    ('//me@127.0.0.1/', 'user name'), ('http://[', 'could not be fetched'), ('', 'could not be fetched'),
    ('http://\xff/', 'could not be fetched')])
def test_redirect_to_no_address(to, says, answers):
    answers.pages['/1'] = 302, {'Location': to}, b''
    assert 'secret' not in refuses(says, answers.url + '/1', inside)


def test_redirect_without_a_place(answers):
    answers.pages['/1'] = 302, {}, b''
    refuses('could not be fetched (302)', answers.url + '/1', inside)


def test_what_comes_with_a_redirect_is_not_read(talks, answers):
    "requests itself would read it all, whatever it holds"
    answers.pages['/a.png'] = 200, {}, PNG
    head = f'HTTP/1.1 302 Found\r\nLocation: {answers.url}/a.png\r\n\r\n'.encode()
    start = time.monotonic()
    assert inside(f'http://127.0.0.1:{talks(drip(head))}/') == PNG
    assert time.monotonic() - start < 3


# proxies

@pytest.fixture
def proxied(answers, monkeypatch):
    for o in ('no_proxy', 'NO_PROXY'): monkeypatch.delenv(o)
    for o in ('http_proxy', 'https_proxy'): monkeypatch.setenv(o, answers.url)
    return answers


def test_proxy(proxied):
    "It may be private, and it looks the name up"
    proxied.pages = {'http://pictures.example/a.png': (302, {'Location': '/b.png'}, b''),
                     'http://pictures.example/b.png': (200, {}, PNG)}
    assert fetch_image('http://pictures.example/a.png') == PNG
    assert proxied.asked == [*proxied.pages]


@pytest.mark.parametrize('host', [*SPELLED, '169.254.169.254', 'router', 'metadata.google.internal', 'a.localhost',
                                  'printer.local', '[fe80::1%25eth0]'])
def test_proxy_is_not_asked_for_the_inside(host, proxied):
    for o in ('http', 'https'): refuses('no public address', f'{o}://{host}/')
    proxied.pages['http://pictures.example/1'] = 302, {'Location': f'http://{host}/'}, b''
    refuses('no public address', 'http://pictures.example/1')
    assert proxied.asked == ['http://pictures.example/1']


def test_proxy_that_is_passed_by(proxied, monkeypatch):
    "For these hosts there is no proxy, so that everything is checked"
    monkeypatch.setenv('no_proxy', '127.0.0.1,localhost')
    for o in ('127.0.0.1', 'localhost'): refuses('no public address', f'http://{o}:{proxied.server_port}/')
    assert not proxied.asked


def test_proxy_that_drips(talks, monkeypatch):
    for o in ('no_proxy', 'NO_PROXY'): monkeypatch.delenv(o)
    for o in ('http_proxy', 'https_proxy'):
        monkeypatch.setenv(o, f"http://127.0.0.1:{talks(drip(b'HTTP/1.1 200 OK', pause=0.01))}")
    start = time.monotonic()
    for o in ('http', 'https'): refuses('more than 0.3 seconds', f'{o}://pictures.example/a.png', seconds=0.3)
    assert time.monotonic() - start < 3


# TLS

@pytest.fixture
def certificate(tmp_path, monkeypatch):
    "What a server needs to be trusted as pictures.example"
    if not shutil.which('openssl'): pytest.skip('no openssl')
    subprocess.run(['openssl', 'req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes',
                    '-keyout', tmp_path/'key', '-out', tmp_path/'cert', '-days', '2', '-subj', '/CN=pictures.example',
                    '-addext', 'subjectAltName=DNS:pictures.example'], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path/'cert', tmp_path/'key')
    monkeypatch.setenv('REQUESTS_CA_BUNDLE', str(tmp_path/'cert'))
    return context


@pytest.fixture
def tls(answers, certificate):
    answers.socket = certificate.wrap_socket(answers.socket, server_side=True)
    return answers


def test_certificates_are_checked_by_the_name(tls, names):
    names['pictures.example'] = names['other.example'] = [['127.0.0.1']]
    tls.pages['/a.png'] = 200, {}, PNG
    assert inside(f'https://pictures.example:{tls.server_port}/a.png') == PNG
    asked = len(tls.asked)
    for o in ('other.example', '127.0.0.1'): refuses('SSLError', f'https://{o}:{tls.server_port}/a.png', inside)
    refuses('leads to 127.0.0.1', f'https://pictures.example:{tls.server_port}/a.png')
    assert len(tls.asked) == asked


def test_redirect_from_https_to_http(tls, names):
    names['pictures.example'] = [['127.0.0.1']]
    tls.pages['/1'] = 302, {'Location': 'http://pictures.example/a.png'}, b''
    refuses('leads from https to http', f'https://pictures.example:{tls.server_port}/1', inside)


@pytest.mark.parametrize('first', [b'HTTP/1.1 200', b'HTTP/1.1 200 OK\r\n\r\n'])
def test_drip_inside_tls(first, certificate, names, talks):
    names['pictures.example'] = [['127.0.0.1']]

    def talk(s):
        with certificate.wrap_socket(s, server_side=True) as t: drip(first)(t)
    port, start = talks(talk), time.monotonic()
    refuses('more than 0.3 seconds', f'https://pictures.example:{port}/', inside, seconds=0.3)
    assert time.monotonic() - start < 2


# servers that take their time, or send more than they should

@pytest.mark.parametrize('first, one', [
    (b'HTTP/1.1 200', b'K'), (b'HTTP/1.1 200 OK\r\n', b'a: b\r\n'), (b'HTTP/1.1 100 Continue\r\n\r\n', b'x'),
    (b'HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n', b'x'), (b'HTTP/1.1 200 OK\r\n\r\n' + PNG, b'x'),
    (b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n', b'1\r\nx\r\n'),
    (b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;', b'x'),
    (b'HTTP/1.1 302 Found\r\nLocation: /', b'x')])
def test_drip(first, one, talks, no_timer_left):
    port, start = talks(drip(first, one)), time.monotonic()
    refuses('could not be fetched (more than 0.3 seconds)', f'http://127.0.0.1:{port}/', inside, seconds=0.3)
    assert time.monotonic() - start < 2


def test_drip_in_the_greeting_of_tls(talks):
    port, start = talks(drip(b'\x16\x03\x03\x40\x00\x02\x00\x3f\xfc')), time.monotonic()
    refuses('more than 0.3 seconds', f'https://127.0.0.1:{port}/', inside, seconds=0.3)
    assert time.monotonic() - start < 2


def test_redirects_share_the_time(talks):
    "Each of them is quick enough alone"
    def slow(s):
        s.recv(10_000)
        time.sleep(0.2)
        s.sendall(b'HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\nConnection: close\r\n\r\n')
    refuses('more than 0.5 seconds', f'http://127.0.0.1:{talks(slow)}/', inside, seconds=0.5)


@pytest.mark.parametrize('scheme', ['http', 'https'])
def test_silence(scheme, talks):
    port, start = talks(lambda s: time.sleep(3)), time.monotonic()
    refuses('could not be fetched', f'{scheme}://127.0.0.1:{port}/', inside, timeout=0.2)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize('kw', [
    dict(timeout=0), dict(seconds=-1), dict(seconds=float('nan')), dict(timeout=1e9), dict(limit=0)])
def test_limits_that_are_none(kw, no_timer_left): refuses(next(iter(kw)), 'http://127.0.0.1/', **kw)


def test_announced_as_too_large(talks):
    "Refused at once"
    port = talks(drip(b'HTTP/1.1 200 OK\r\nContent-Length: 60000000\r\n\r\n'))
    refuses('is larger than 50,000,000 bytes', f'http://127.0.0.1:{port}/', inside, seconds=2)


@pytest.mark.parametrize('head, pack', [
    (b'', bytes), (b'Content-Length: -1\r\n', bytes),
    (b'Transfer-Encoding: chunked\r\nContent-Length: 5\r\n', lambda b: b'%x\r\n%b\r\n' % (len(b), b))])
def test_too_large_without_a_word(head, pack, talks):
    def flood(s):
        s.recv(10_000)
        s.sendall(b'HTTP/1.1 200 OK\r\n' + head + b'\r\n')
        for _ in range(3000): s.sendall(pack(bytes(10_000)))
    refuses('is larger than 1,000,000 bytes', f'http://127.0.0.1:{talks(flood)}/', inside, limit=10**6)


def test_exactly_the_limit(answers):
    answers.pages['/a.png'] = 200, {}, PNG
    assert inside(answers.url + '/a.png', limit=len(PNG)) == PNG
    refuses('is larger than', answers.url + '/a.png', inside, limit=len(PNG) - 1)


@pytest.mark.parametrize('claimed, says', [(len(PNG) + 1, 'could not be fetched'), (len(PNG)//2, 'no readable image'),
                                           ('1, 2', 'could not be fetched'), ('many', None)])
def test_lying_length(claimed, says, talks):
    port = talks(say(f'HTTP/1.1 200 OK\r\nContent-Length: {claimed}\r\n\r\n'.encode(), PNG))
    if says: refuses(says, f'http://127.0.0.1:{port}/', inside)
    else: assert inside(f'http://127.0.0.1:{port}/') == PNG


@pytest.mark.parametrize('answer', [
    b'', b'\0'*100, b'SSH-2.0-OpenSSH\r\n', b'HTTP/1.1 abc\r\n\r\n',
    b'HTTP/1.1 200 OK\r\n' + b'a: b\r\n'*1000 + b'\r\n',
    b'HTTP/1.1 200 OK\r\na: ' + b'b'*100_000 + b'\r\n\r\n', b'HTTP/1.1 500 \r\n\r\n', b'HTTP/1.1 204 No\r\n\r\n',
    b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n', b'HTTP/1.1 206 Partial\r\n\r\n' + PNG])
def test_broken_answers(answer, talks):
    refuses('could not be fetched', f'http://127.0.0.1:{talks(say(answer))}/', inside)


# what arrives

def test_identity_is_asked_for(answers):
    answers.pages['/a.png'] = 200, {}, PNG
    inside(answers.url + '/a.png')
    assert answers.headers[0]['Accept-Encoding'] == 'identity'


def test_packed_all_the_same(answers):
    answers.pages['/a'] = 200, {'Content-Encoding': 'GZip'}, gzip.compress(PNG)
    assert inside(answers.url + '/a') == PNG
    answers.pages['/b'] = 200, {'Content-Encoding': 'gzip'}, PNG
    refuses('no readable image', answers.url + '/b', inside)
    answers.pages['/c'] = 200, {'Content-Encoding': 'gzip'}, gzip.compress(PNG)[:-30]
    refuses('no readable image', answers.url + '/c', inside)


@pytest.mark.parametrize('layers, says', [(1, 'is larger than 1,000,000 bytes'), (2, 'is packed as gzip, gzip')])
def test_gzip_bomb(layers, says, answers):
    content = bytes(200_000_000)
    for _ in range(layers): content = gzip.compress(content, 9 if layers > 1 else 1)
    answers.pages['/a'] = 200, {'Content-Encoding': ', '.join(['gzip']*layers)}, content
    del content
    tracemalloc.start()
    refuses(says, answers.url + '/a', inside, limit=10**6)
    assert tracemalloc.get_traced_memory()[1] < 2e7
    tracemalloc.stop()


def png(width, height, data=b''):
    chunk = lambda kind, b: struct.pack('>I', len(b)) + kind + b + struct.pack('>I', zlib.crc32(kind + b))
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>2I5B', width, height, 1, 0, 0, 0, 0)) +
            chunk(b'IDAT', zlib.compress(data)) + chunk(b'IEND', b''))


def gif(screen, frame):
    return (b'GIF89a' + struct.pack('<2H3B', *screen, 0x80, 0, 0) + bytes(6) +
            b',' + struct.pack('<4HB', 0, 0, *frame, 0) + b'\x02\x02\x4c\x01\x00;')


def tiff(width, height):
    tags = [(256, 4, width), (257, 4, height), (258, 3, 1), (259, 3, 1), (262, 3, 1), (273, 4, 8), (278, 4, height),
            (279, 4, 1)]
    return (b'II*\0' + struct.pack('<IH', 8, len(tags)) +
            b''.join(struct.pack('<2H2I', k, t, 1, v) for k, t, v in tags) + bytes(4))


BOMBS = {'png': png(9500, 9500), 'huge png': png(10**6, 10**6), 'gif': gif((9500, 9500), (1, 1)),
         'gif frame': gif((1, 1), (9500, 9500)), 'huge gif frame': gif((1, 1), (20_000, 20_000)),
         'tiff': tiff(50_000, 50_000), 'bmp': b'BM' + struct.pack('<3I', 100, 0, 54) + struct.pack(
             '<IiiHHIIiiII', 40, 30_000, 30_000, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(50)}


@pytest.mark.parametrize('kind', BOMBS)
def test_bombs_are_seen_by_their_header(kind, answers, recwarn, capfd, monkeypatch):
    def load(*args): raise AssertionError('decoded')
    Image.init()  # some of its plugins make an image of their own
    monkeypatch.setattr(Image.Image, 'load', load)
    monkeypatch.setattr('PIL.ImageFile.ImageFile.load', load)
    answers.pages['/a'] = 200, {}, BOMBS[kind]
    refuses([answers.url + '/a', f'has more than {Image.MAX_IMAGE_PIXELS:,} pixels'], answers.url + '/a', inside)
    assert not recwarn.list and capfd.readouterr() == ('', '')


def test_the_helpers_make_images():
    "Small ones of the same make can be read"
    for o in (png(8, 8, bytes(16)), gif((1, 1), (1, 1)), tiff(8, 1)): open_image(o)


def test_pillows_limit_counts(answers, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 399)
    answers.pages['/a.png'] = 200, {}, PNG
    filters = list(warnings.filters)
    refuses('has more than 399 pixels', answers.url + '/a.png', inside)
    assert warnings.filters == filters


@pytest.mark.parametrize('content', [
    b'', b'<html>no picture</html>', b'<svg xmlns="http://www.w3.org/2000/svg"/>', PNG[:200], b'\x89PNG\r\n\x1a\n',
    b'GIF89a', encoded(kind='jpeg')[:300], b'%PDF-1.4', b'PK\3\4', b'\0'*1000])
def test_no_images(content, answers):
    answers.pages['/a'] = 200, {'Content-Type': 'image/png'}, content
    refuses([answers.url + '/a', 'no readable image'], answers.url + '/a', inside)


def test_postscript_is_not_run(answers, monkeypatch):
    monkeypatch.setattr(subprocess, 'check_call', lambda *a, **k: pytest.fail('run'))
    answers.pages['/a.png'] = 200, {}, b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n'
    refuses('EPS is a program', answers.url + '/a.png', inside)


@pytest.mark.parametrize('kind', ['png', 'jpeg', 'gif', 'webp', 'bmp', 'tiff', 'ppm'])
def test_images_of_all_kinds(kind, answers):
    answers.pages['/a'] = 200, {'Content-Type': 'text/plain'}, encoded(kind=kind)
    assert open_image(inside(answers.url + '/a')).size == (20, 20)


@pytest.mark.filterwarnings('ignore::UserWarning')
def test_damaged_images(answers):
    "They are read or refused"
    for i in range(150):
        kind = ['png', 'jpeg', 'gif', 'webp', 'tiff'][i % 5]
        content = bytearray(encoded(kind=kind))
        for j, o in enumerate(noise(i, 2).ravel()): content[(int(o)*7 + j*31) % min(len(content), 150)] ^= 1 + j
        answers.pages['/a'] = 200, {}, bytes(content)
        try: open_image(inside(answers.url + '/a'))
        except InputError as e: assert str(e).startswith(answers.url) and str(e).isprintable()


def test_whatever_a_decoder_raises(answers, monkeypatch):
    def broken(*args): raise KeyError('a\nb')
    Image.init()
    monkeypatch.setitem(Image.OPEN, 'PNG', (broken, Image.OPEN['PNG'][1]))
    answers.pages['/a.png'] = 200, {}, PNG
    refuses('no readable image', answers.url + '/a.png', inside)
