"""`resnet_demo`: what its page shows, and in a real browser that nothing is fetched elsewhere."""
import json
import re
import shutil
import signal
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from resnet_nbdev.demo import demo_page, explain_image, read_upload
from resnet_nbdev.runs import load_run, predict

from conftest import refuses

CHROMIUM, DRIVER = shutil.which('chromium'), shutil.which('chromedriver')
OPTIONS = ['--headless=new', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync',
           '--disable-background-networking', '--disable-component-update', '--window-size=1280,900']


def wait(what, seconds=60):
    "The first true value of a function that may fail until then"
    end = time.monotonic() + seconds
    while True:
        try:
            if found := what(): return found
        except Exception as e: failed = e
        else: failed = None
        if time.monotonic() > end: raise AssertionError(f'it did not happen in {seconds} s') from failed
        time.sleep(0.2)


@pytest.fixture
def browser(tmp_path):
    pytest.importorskip('gradio')
    webdriver = pytest.importorskip('selenium.webdriver')
    if not (CHROMIUM and DRIVER): pytest.skip('there is no chromium with its chromedriver')
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for o in [*OPTIONS, f'--user-data-dir={tmp_path/"profile"}']: options.add_argument(o)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.mark.slow
def test_page(digits_run, digit_files, start_cli, browser, tmp_path):
    server = start_cli('resnet_demo', digits_run, '--port', 0)
    address = wait(lambda: re.search(r'http://127\.0\.0\.1:\d+', (tmp_path/'out').read_text()), 120)[0]
    find = lambda css: browser.find_element('css selector', css)
    upload = lambda path: find('#photo input[type=file]').send_keys(str(path))
    first = lambda: find('#classes [data-testid=label-output-value]').text.strip()
    picture = lambda: find('#where img').get_property('src')
    browser.get(address)
    wait(lambda: find('#photo input[type=file]'))

    upload(digit_files[7])
    assert wait(first) == '7'
    assert wait(lambda: find('#where img').get_property('naturalWidth')) == 448
    assert len(re.findall(r'^\d+%$', find('#classes').text, re.M)) == 5
    before = picture()
    assert Image.open(urllib.request.urlopen(before, timeout=10)).size == (448, 448)

    choice = find('#of input')  # the map for another class
    choice.click()
    wait(lambda: [o for o in browser.find_elements('css selector', '#of [role=option], ul[role=listbox] li')
                  if o.text.strip().endswith('3')])[0].click()
    wait(lambda: picture() != before)
    assert first() == '7'
    browser.save_screenshot(str(tmp_path/'page.png'))

    text = tmp_path/'<b>no picture<b>.png'
    text.write_text('no picture')
    find('#photo [title="Remove Image"]').click()
    wait(lambda: not browser.find_elements('css selector', '#photo img'))
    upload(text)
    said = wait(lambda: find('.toast-body').text)
    assert 'This file is no readable image' in said and 'Traceback' not in said
    assert not browser.find_elements('css selector', '#where img'), 'no answer stands beside it'

    severe = [o for o in browser.get_log('browser') if o['level'] == 'SEVERE']
    assert not severe, severe
    asked = [json.loads(o['message'])['message'] for o in browser.get_log('performance')]
    asked = {o['params']['request']['url'] for o in asked if o['method'] == 'Network.requestWillBeSent'}
    assert not [o for o in asked if o.startswith(('http', 'ws')) and not o.startswith(address)], asked

    assert (tmp_path/'err').read_text() == ''
    # a file that nobody has uploaded is not read
    data = [dict(path=str(digit_files[7]), meta={'_type': 'gradio.FileData'}), 'the most probable class']
    ask = urllib.request.Request(f'{address}/gradio_api/call/look', json.dumps(dict(data=data)).encode(),
                                 {'Content-Type': 'application/json'})
    event = json.load(urllib.request.urlopen(ask, timeout=30))['event_id']
    assert b'event: error' in urllib.request.urlopen(f'{address}/gradio_api/call/look/{event}', timeout=30).read()

    server.send_signal(signal.SIGINT)  # with the page still open
    assert server.wait(30) == 0
    assert (tmp_path/'out').read_text().count('\n') == 1


def test_port_that_is_taken(digits_run, refused_here, web):
    pytest.importorskip('gradio')
    refused_here('resnet_demo', digits_run, '--port', web.server_port, says=[web.server_port, 'choose another port'])
    refused_here('resnet_demo', digits_run, '--port', 99999, says=['from 0 to 65535', 99999])


# what the page shows

def test_look_shows_what_the_network_saw(digits_run, digit_files):
    model, config = load_run(digits_run)
    probs, seen = explain_image(model, config, digit_files[4])
    want = predict(digits_run, [digit_files[4]], k=10)
    assert probs == pytest.approx(dict(zip(want['class'], want.probability)), abs=1e-6)
    assert seen.shape == (448, 448, 3)
    bare = explain_image(model, config, digit_files[4], alpha=0)[1][::28, ::28, 0]
    digit = np.asarray(Image.open(digit_files[4]).resize((16, 16), Image.BILINEAR))
    np.testing.assert_allclose(bare, digit, atol=1)
    assert (explain_image(model, config, digit_files[4], '1')[1] != seen).any()
    refuses(["no class 'ten'"], explain_image, model, config, digit_files[4], 'ten')


def test_uploads(monkeypatch, tmp_path):
    Image.new('1', (400, 300)).save(tmp_path/'large.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100_000)
    refuses(['pixels, which is too many'], read_upload, (tmp_path/'large.png').read_bytes())
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 50_000)
    refuses(['pixels, which is too many'], read_upload, (tmp_path/'large.png').read_bytes())
    refuses(['this file is no readable image'], read_upload, b'<script>')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 120_000)
    assert read_upload((tmp_path/'large.png').read_bytes()).size == (400, 300)


def test_page_is_made_without_writing_files(digits_run):
    pytest.importorskip('gradio')
    import resnet_nbdev
    package = Path(resnet_nbdev.__file__).parent
    before = sorted(package.rglob('*.py*'))
    page = demo_page(digits_run)
    assert page.title.startswith('digits-cifar_resnet8') and not page.analytics_enabled
    assert [o for o in sorted(package.rglob('*.py*')) if o not in before and o.suffix != '.pyc'] == []
