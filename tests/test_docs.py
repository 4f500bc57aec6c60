"""The site that `make docs` builds: no warning, no broken link, and every page looked at in a real browser."""
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections import namedtuple
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import pytest

from conftest import ROOT

for o in ('nbdev', 'sphinx', 'myst_nb', 'sphinx_book_theme', 'bs4'):
    pytest.importorskip(o, reason='a development tool, not installed beside the wheel')
from bs4 import BeautifulSoup
from filelock import FileLock

AXE = 'axe-core@4.14.1'
SMALL = ['index.html', '01_blocks.html', 'gallery.html']  # looked at after every edit
CODE = 'index.html'  # the page whose code has to be readable, too
MOST = 3_000_000  # bytes of a page with all that it loads
CHROMIUM, DRIVER = shutil.which('chromium'), shutil.which('chromedriver')
OPTIONS = ['--headless=new', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync',
           '--disable-background-networking', '--disable-component-update', '--disable-renderer-backgrounding',
           '--disable-background-timer-throttling', '--disable-backgrounding-occluded-windows',
           '--window-size=1280,800']
Built = namedtuple('Built', 'folder code said')


@pytest.fixture(scope='session')
def built(tmp_path_factory):
    "The site, built once for all processes of pytest-xdist"
    base = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ: base = base.parent
    folder, log = base/'site', base/'site.json'
    with FileLock(base/'site.lock'):
        if not log.exists():
            command = [sys.executable, '-m', 'tools.site.build', folder]
            r = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
            log.write_text(json.dumps([r.returncode, r.stdout + r.stderr]))
    return Built(folder, *json.loads(log.read_text()))


@pytest.fixture(scope='session')
def pages(built):
    "{address: parsed HTML}"
    return {p.relative_to(built.folder).as_posix(): BeautifulSoup(p.read_text(encoding='utf-8'), 'html.parser')
            for p in sorted(built.folder.rglob('*.html')) if '_static' not in p.parts}


@pytest.fixture(scope='session')
def docs():
    "The module tools/site/build.py"
    sys.path.insert(0, str(ROOT))
    from tools.site import build
    return build


def test_build(built):
    assert built.code == 0 and built.said.count('\n') == 1, built.said
    assert 'python -m http.server -d' in built.said
    assert not (built.folder.parent/'jupyter_execute').exists(), 'MyST-NB writes beside the site'


def test_every_notebook_has_its_place(docs, pages):
    groups = docs.group_pages(docs.found_notebooks())
    assert all(groups.values()), 'a part of the sidebar is empty'
    assert {f'{o}.html' for o in docs.found_notebooks()} <= set(pages)
    in_order = [a['href'].removesuffix('.html') for a in pages['index.html'].select('.bd-docs-nav li.toctree-l1 > a')]
    assert in_order[1:] == [*sum(groups.values(), []), 'api/index', 'measured', 'gallery']


def references(page, soup):
    "(element, address within the site or elsewhere, fragment) of all that a page refers to"
    for tag, attribute in (('a', 'href'), ('link', 'href'), ('img', 'src'), ('script', 'src'), ('source', 'src')):
        for o in soup.find_all(tag, attrs={attribute: True}):
            if o[attribute].startswith('data:'): continue
            address, fragment = urldefrag(urljoin(f'http://site/{page}', o[attribute]))
            yield o, address.removeprefix('http://site/'), unquote(fragment)


def test_links(built, pages, docs):
    "Every link within the site leads to a file and a place in it; whatever a page loads is part of the site"
    places = {k: {o['id'] for o in v.find_all(id=True)} for k, v in pages.items()}
    wrong = []
    for page, soup in pages.items():
        for o, address, fragment in references(page, soup):
            if urlsplit(address).scheme:
                if o.name != 'a' and o.get('rel') != ['canonical']: wrong.append((page, 'loads', address))
                continue
            path = unquote(address.partition('?')[0])
            if not (built.folder/path).is_file(): wrong.append((page, 'leads to', address))
            elif fragment and path in places and fragment not in places[path]: wrong.append((page, address, fragment))
    assert not wrong


def test_links_to_the_repository(pages, docs):
    "Colab, edit and source links: the file is tracked, the branch is the default one, the lines are there"
    run = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    tracked = set(run(['git', 'ls-files']).stdout.splitlines()) # or else, in an unpacked archive, what is there
    tracked = tracked or {o.relative_to(ROOT).as_posix() for o in ROOT.rglob('*') if o.is_file()}
    own = f'{docs.cfg["user"]}/{docs.cfg["repo"]}'
    pattern = re.compile(r'https://(github\.com|colab\.research\.google\.com/github)'
                         rf'/{own}/(blob|edit)/([^/]+)/([^#?]+)(?:#L(\d+)-L(\d+)|#[a-z-]+)?')
    colab = set()
    for page, soup in pages.items():
        for a in soup.find_all('a', href=True):
            if not (m := pattern.fullmatch(a['href'])):
                assert re.fullmatch(rf'(?!.*{own}).*|https://github.com/{own}(/commit/\w+)?', a['href']), a
                continue
            site, _, branch, path, first, last = m.groups()
            assert branch == docs.cfg['branch'] and path in tracked, (page, a['href'])
            if 'colab' in site and path == f'nbs/{page.removesuffix(".html")}.ipynb': colab.add(page)
            if first:
                lines = (ROOT/path).read_text(encoding='utf-8').splitlines()[int(first) - 1:int(last)]
                name = a.find_previous('h2').get_text().rstrip('#').strip()
                assert any(re.match(rf'(async )?(def|class) {name}\b', o) for o in lines), (page, name, a['href'])
    assert colab == {f'{o}.html' for o in docs.found_notebooks()}


def test_pictures_are_described(pages):
    for page, soup in pages.items():
        for o in soup.select('article img'):
            assert len(o.get('alt', '')) > 10 and not re.search(r'\.(png|svg|jpe?g)\b|_images', o['alt']), (page, o)


def test_figures(built, pages, docs):
    "Each file has a section and a copy; what a page quotes leads to a row of it, and a link to the file to its section"
    measured, files = pages['measured.html'], sorted((ROOT/'nbs'/'results').glob('*.json'))
    assert files
    for o in files:
        assert measured.find(id=o.stem) or measured.find(id=o.stem.replace('_', '-')), o.stem
        assert (built.folder/'results'/o.name).read_bytes() == o.read_bytes()
    for page, soup in pages.items():
        for a in soup.select('a.figure'):
            to = unquote(urldefrag(a['href'])[1])
            place = measured.find(id=to)
            if to in {o.stem for o in files}: assert place.find_next('h3').get_text().startswith(to), (page, a)
            else: assert len(place.find_parent('tr').find_all('td')) == 2, (page, a)


def test_quoted_figures(docs):
    "By a JSON pointer; a value in a list leads to the list; the build stops at one that is not there"
    results = dict(a={'values': {'best one': {'x/s': 1.5}, 'rate': dict(low=1, median=2, high=3), 'all': [1, 2]}})
    def led(link): return re.fullmatch('<a class="figure" href="../measured.html#(.+)">7</a>', made(f'[7]({link})'))[1]
    def made(text): return docs.figure_links(text, results, '../')
    assert led('../results/a.json#/values/best%20one/x~1s') == 'a.values.best-one.x/s'
    assert led('../results/a.json#/values/rate/median') == 'a.values.rate.median'
    assert led('results/a.json#/values/all/1') == 'a.values.all'
    assert led('results/a.json') == 'a'
    page = docs.measured_page(dict(a=dict(results['a'], what='A < B')), 'https://x')
    assert all(f'id="a.values.{o}"' in page for o in ('best-one.x/s', 'rate', 'rate.median', 'all'))
    assert '| 2 (1 to 3) |' in page and r'A \< B.' in page
    kept = '```\n[7](results/a.json)\n```'
    assert made(kept) == kept
    with pytest.raises(SystemExit, match='results/b.json, which is not there'): made('[7](results/b.json)')
    with pytest.raises(SystemExit, match='there is no /values/none'): made('[7](results/a.json#/values/none)')
    with pytest.raises(SystemExit, match='is no JSON pointer'): made('[7](results/a.json#values.rate)')


def test_for_programs(built, pages, docs):
    "llms.txt lists every page; each has a Markdown copy whose links lead somewhere, without marks of MyST"
    text = (built.folder/'llms.txt').read_text(encoding='utf-8')
    assert re.match(r'# .+\n\n> .+\n\n## ', text)
    listed = re.findall(r'(?m)^- \[[^\]]+\]\(([^)]+)\): .+$', text)
    assert len(listed) == len(re.findall('(?m)^- ', text)) == len(set(listed))
    assert {o.replace('.md', '.html') for o in listed} == set(pages) - {'search.html'}
    for o in listed:
        page = (built.folder/o).read_text(encoding='utf-8')
        prose = re.sub(r'(?s)```.*?```|`[^`\n]*`', '', page)
        assert page.startswith('# ') and not re.search(r'(?m)^\{|^\(.+\)=$', prose), o
        for link in re.findall(r'\]\((?!https?:)([^)#\s]+)', prose):
            assert ((built.folder/o).parent/unquote(link)).is_file(), (o, link)


def test_reference(pages, docs):
    "Every exported function and class has an entry with its parameters, and is listed"
    from resnet_nbdev import blocks
    page = pages['api/blocks.html']
    for name in ('ResBlock', 'conv'):
        section = page.find(id=name.lower())
        assert name in section.pre.get_text() and getattr(blocks, name).__doc__[:40] in section.get_text()
        assert [o.get_text() for o in section.table.find_all('th')][:4] == ['parameter', 'type', 'default', 'meaning']
        assert any('(N, out_channels, ceil(H/s), ceil(W/s))' in o.get_text() for o in section.table.find_all('tr'))
        assert pages['api/index.html'].find('a', href=f'blocks.html#{name.lower()}')


@pytest.mark.slow
def test_twice_the_same(built, docs, tmp_path):
    "Sources are the same however often they are made"
    pages, groups = docs.read_pages()
    contents = []
    for o in ('a', 'b'):
        (tmp_path/o).mkdir()
        docs.write_sources(tmp_path/o, groups, pages, docs.read_results(docs.nbs/'results'))
        contents.append({p.relative_to(tmp_path/o): p.read_bytes() for p in (tmp_path/o).rglob('*') if p.is_file()})
    assert contents[0] == contents[1]


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope='session')
def address(built):
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Handler, directory=built.folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()
    server.server_close()


@pytest.fixture(scope='session')
def browser(tmp_path_factory):
    webdriver = pytest.importorskip('selenium.webdriver', reason='what drives the browser is not installed')
    if not (CHROMIUM and DRIVER): pytest.skip('there is no chromium with its chromedriver')
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for o in [*OPTIONS, f'--user-data-dir={tmp_path_factory.mktemp("profile")}']: options.add_argument(o)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(120)
    driver.execute_cdp_cmd('Network.setCacheDisabled', dict(cacheDisabled=True))
    yield driver
    driver.quit()


@pytest.fixture(scope='session')
def axe(request):
    "The source of axe-core, from npm"
    folder = Path(request.config.cache.mkdir('axe-core'))
    packed = folder/f'{AXE.replace("@", "-")}.tgz'
    with FileLock(folder/'lock'):
        if not packed.exists():
            try: subprocess.run(['npm', 'pack', AXE], cwd=folder, check=True, capture_output=True, timeout=120)
            except (OSError, subprocess.SubprocessError) as e: pytest.skip(f'npm does not bring {AXE}: {e}')
    with tarfile.open(packed) as t: return t.extractfile('package/axe.min.js').read().decode()


READY = '''const done = arguments[0];
for (const o of document.images) o.loading = 'eager';
const loaded = o => o.complete ? 0 : new Promise(r => { o.onload = o.onerror = r; });
const maths = window.MathJax && window.MathJax.startup && window.MathJax.startup.promise;
Promise.all([maths, document.fonts.ready, ...Array.from(document.images, loaded)])
  .then(() => done(''), e => done(`${e}`));'''
STILL = "document.head.insertAdjacentHTML('beforeend', '<style>* { transition: none !important; }</style>')"
STATE = '''const entries = ['navigation', 'resource'].flatMap(o => performance.getEntriesByType(o));
const article = document.querySelector('article');
return {bytes: entries.reduce((n, o) => n + o.encodedBodySize, 0),
        blank: Array.from(document.images).filter(o => !o.naturalWidth).map(o => o.src),
        unset: article ? article.querySelectorAll('.math:not(:has(mjx-container))').length : 0,
        failed: article ? article.querySelectorAll('mjx-merror').length : 0}'''
AUDIT = '''const [rules, code, done] = arguments;
axe.run(code ? document : {exclude: [['div.highlight']]}, rules).then(
  r => done(r.violations.map(v => [v.id, v.nodes.slice(0, 3).map(n => n.target + ' ' + n.failureSummary)])),
  e => done([`${e}`]));'''
RULES = dict(runOnly=dict(type='tag', values=['wcag2a', 'wcag2aa']),
             rules={'heading-order': dict(enabled=True), 'page-has-heading-one': dict(enabled=True)})
COLOURS = dict(runOnly=dict(type='rule', values=['color-contrast']))
WIDER = '''const most = arguments[0];
const scrolls = o => o && (getComputedStyle(o).overflowX != 'visible' || scrolls(o.parentElement));
const wide = o => o.getBoundingClientRect().right > most + 1 && !scrolls(o.parentElement);
const found = Array.from(document.querySelectorAll('article *')).filter(wide);
return [document.documentElement.scrollWidth, found.slice(0, 3).map(o => o.outerHTML.slice(0, 150))]'''


def wait(what, seconds=60):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, f'it did not happen in {seconds} s'
        time.sleep(0.1)
    return found


def screen(browser, width, height):
    size = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', size)


def open_page(browser, url):
    "Load a page to its end; what went wrong meanwhile, and what it asked for"
    for o in ('browser', 'performance'): browser.get_log(o)
    browser.get(url)
    assert browser.execute_async_script(READY) == ''
    events = [json.loads(o['message'])['message'] for o in browser.get_log('performance')]
    of = lambda kind: [o['params'] for o in events if o['method'] == f'Network.{kind}']
    failed = [o['errorText'] for o in of('loadingFailed')]
    failed += [o['response']['url'] for o in of('responseReceived') if o['response']['status'] >= 400]
    said = [o['message'] for o in browser.get_log('browser') if o['level'] in ('SEVERE', 'WARNING')]
    return failed + said, [o['request']['url'] for o in of('requestWillBeSent')]


def look_at(browser, address, page, axe):
    "All that a reader of a page would mind, as a list"
    screen(browser, 1280, 800)
    wrong, asked = open_page(browser, address + page)
    wrong += [o for o in asked if o.startswith(('http', 'ws')) and not o.startswith(address)]
    state = browser.execute_script(STATE)
    if state['bytes'] > MOST: wrong.append(f'{state["bytes"]} bytes')
    if state['blank'] or state['unset'] or state['failed']: wrong.append(state)
    browser.execute_script(axe)
    browser.execute_script(STILL)
    for theme, rules in (('light', RULES), ('dark', COLOURS)):
        browser.execute_script('document.documentElement.dataset.theme = arguments[0]', theme)
        # code has the same colours on every page, and more elements than all the rest
        wrong += [(theme, o) for o in browser.execute_async_script(AUDIT, rules, page == CODE)]
    browser.execute_script('document.documentElement.dataset.theme = "light"')
    screen(browser, 390, 844)
    width, elements = browser.execute_script(WIDER, 390)
    if width > 390: wrong.append((f'{width} pixels wide', elements))
    return wrong


def test_some_pages_in_a_browser(browser, address, axe):
    wrong = {o: look_at(browser, address, o, axe) for o in SMALL}
    assert not any(wrong.values()), wrong


@pytest.mark.slow
def test_all_pages_in_a_browser(browser, address, axe, pages):
    wrong = {o: look_at(browser, address, o, axe) for o in pages if o not in SMALL}
    assert not any(wrong.values()), {k: v for k, v in wrong.items() if v}


def test_maths(browser, address):
    open_page(browser, address + '01_blocks.html')
    assert len(browser.find_elements('css selector', 'article mjx-container')) >= 3


def test_search(browser, address, pages):
    screen(browser, 1280, 800)
    wrong, _ = open_page(browser, address + 'search.html?q=ResBlock')
    wait(lambda: 'finished' in browser.find_element('css selector', '#search-results').text)
    found = browser.find_elements('css selector', '#search-results li a')
    links = {urldefrag(o.get_attribute('href').partition('?')[0])[0].removeprefix(address) for o in found}
    assert {'api/blocks.html', '01_blocks.html'} <= links <= set(pages) and not wrong


def test_front_page_is_one_screen(browser, address):
    "What it is, a picture, the two commands and the way to the five tutorials, without scrolling"
    screen(browser, 1280, 800)
    open_page(browser, address)
    found = lambda css: browser.find_elements('css selector', f'article {css}')
    shown = [found('h1')[0], found('img')[0], found('pre')[0], *found('a[href^="tutorials/"]')[:5]]
    assert len(shown) == 8 and max(o.rect['y'] + o.rect['height'] for o in shown) <= 800
    assert 'make demo' in shown[2].text and 'make test' in shown[2].text
