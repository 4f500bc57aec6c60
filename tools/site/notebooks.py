"A notebook as its readers see it: what is shown, where it links to, what its pictures are called"
import re

import nbformat
from execnb.nbio import nb2str
from nbdev.process import NBProcessor
from nbdev.processors import filter_stream_, hide_, hide_line, rm_header_dash, strip_ansi, strip_hidden_metadata

# Parts of the sidebar and of the index after tutorials and labs: the library in the order of its numbers, by decades
DECADES = {0: 'Networks', 1: 'Data', 2: 'Training', 3: 'Runs', 4: 'After training', 5: 'Commands', 6: 'Measuring',
           9: 'All of it'}


def default_exp_(cell, *_): del cell['source']


def flags(cell):
    "What later steps have to know of the directives, whose lines are removed"
    if 'export' in cell.directives_: cell.metadata['exported'] = True
    if cell.directives_.get('echo:') == ['false']: cell.metadata['tags'] = ['remove-input']


PROCESSORS = [strip_ansi, hide_line, filter_stream_, rm_header_dash, hide_, default_exp_, flags, strip_hidden_metadata]


def read_page(path):
    "A notebook without hidden cells and directives; nothing is executed"
    nb = nbformat.reads(nb2str(NBProcessor(path, PROCESSORS, process=True).nb), 4)
    for c in nb.cells:
        c.source = re.sub(r'\A(#\|.*\n?)+', '', c.source)  # nbdev leaves those with a colon to Quarto
        if c.cell_type == 'code': c.outputs = [o for o in c.outputs if not only_style(o)]
    nb.cells = [c for c in nb.cells if c.source.strip()]
    nb.metadata.language_info = dict(name='python', pygments_lexer='ipython3')
    return nb


def only_style(output):
    "fastai sends a style sheet for its progress bars ahead of a table"
    html = output.get('data', {}).get('text/html', '')
    return bool(html) and not re.sub(r'(?s)<style.*?</style>', '', html).strip()


def has_picture(cell): return any(picture_of(o) for o in cell.get('outputs', []))


def picture_of(output): return next((k for k in output.get('data', {}) if k.startswith('image/')), None)


def fences(text):
    "(part, is it a fenced code block?) of a Markdown text"
    for i, part in enumerate(re.split(r'(?ms)(^```.*?^```[ \t]*$)', text)):
        if part: yield part, i % 2 == 1


def prose_only(text, change):
    "`change` the text outside of fenced code blocks"
    return ''.join(part if code else change(part) for part, code in fences(text))


def escape(text):
    "Text whose <, * and $ mean themselves, outside of `code`"
    return re.sub(r'`[^`]*`|[<*$]', lambda m: m[0] if m[0][0] == '`' else '\\' + m[0], text)


def title_of(nb):
    "(title, subtitle) from the first cell: a heading, and a quotation below it"
    title, sub = re.match(r'# (.+)\n*((?:> ?.*\n?)*)', nb.cells[0].source).groups()
    return title.strip(), ' '.join(re.sub(r'(?m)^> ?', '', sub).split())


def plain(text):
    "Markdown as a screen reader would say it"
    text = re.sub(r'!?\[([^\]]*)\]\([^)]*\)|<[^>]+>', r'\1', text)
    return ' '.join(re.sub(r'[`*#>\\$]|(?m:^\s*[-|].*$)', '', text).split())


def describe(prose, section):
    "The alternative text of a plot: what the prose before it says last, or else the section that it is in"
    said = plain(re.split(r'\n\s*\n', prose.strip())[-1]) if prose else ''
    if len(said) > 250: said = re.split(r'(?<=[.!?:])\s', said.rstrip('. '))[-1]
    return f'Plot: {said.rstrip(" :.;")}' if len(said) > 20 else f'Plot in the section {section}'


def annotated(nb):
    "(cell, heading of its section, alternative text if it shows a picture) for all cells"
    section = prose = ''
    for c in nb.cells:
        if c.cell_type == 'markdown':
            text = ''.join(part for part, code in fences(c.source) if not code)
            *_, after = re.split(r'(?m)^#{1,6} (.+)$', text)
            for found in re.findall(r'(?m)^#{1,6} (.+)$', text): section = plain(found)
            prose = after
        yield c, section, describe(prose, section) if has_picture(c) else ''
