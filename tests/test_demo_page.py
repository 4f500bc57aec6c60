"""`resnet_demo` in a real browser: a digit is recognised, what is no image is refused, nothing is fetched elsewhere."""
import json
import re
import shutil
import signal
import time
import urllib.request

import pytest
from PIL import Image

pytest.importorskip('gradio')
webdriver = pytest.importorskip('selenium.webdriver')
CHROMIUM, DRIVER = shutil.which('chromium'), shutil.which('chromedriver')
if not (CHROMIUM and DRIVER): pytest.skip('there is no chromium with its chromedriver', allow_module_level=True)

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
    refused_here('resnet_demo', digits_run, '--port', web.server_port, says=[web.server_port, 'choose another port'])
    refused_here('resnet_demo', digits_run, '--port', 99999, says=['from 0 to 65535', 99999])
