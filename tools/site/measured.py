"The page of measured figures: a section for each file in nbs/results, a place for each of its values"
import json
import sys

from resnet_nbdev.blocks import InputError
from resnet_nbdev.results import QUOTE, pointer_keys, resolve_pointer

from .notebooks import escape, prose_only

VALUES = 'values', 'baseline'
CONDITIONS = ('source', 'images', 'data', 'note', 'seeds', 'spread', 'command', 'code', 'commit', 'device', 'versions',
              'date')
INTRO = '''# Measured figures

{.subtitle}
Every figure that a page quotes: its value, and on what, with what and when it was measured

A quoted figure on a page leads to its row here. Files and rows are those of `nbs/results`; `published` marks figures
that others have published, with their source. `make results` in the repository says which are stale.
'''


def leaves(value, path=()):
    "(keys, value) of all that is neither a dictionary nor a list of them"
    if isinstance(value, list) and any(isinstance(o, dict) for o in value): value = dict(enumerate(value))
    if isinstance(value, dict) and not spread(value):
        for k, v in value.items(): yield from leaves(v, (*path, str(k)))
    else: yield path, value


def spread(value):
    "Is it a median with its quartiles, or the like, that one row can show?"
    return isinstance(value, dict) and set(value) == {'low', 'median', 'high'}


def place(name, path): return '.'.join([name, *path]).replace(' ', '-')


def shown(value):
    "A value in short"
    if isinstance(value, list):
        few = [shown(o) for o in value]
        return ', '.join(few if len(few) <= 8 else [*few[:3], '...', few[-1], f'({len(few)} values)']) or 'none'
    if isinstance(value, bool) or value is None: return {True: 'yes', False: 'no', None: 'none'}[value]
    if isinstance(value, int): return f'{value:,}'
    if isinstance(value, float): return f'{value:,.4g}' if abs(value) < 1e4 else f'{float(f"{value:.4g}"):,.0f}'
    if spread(value): return f'{shown(value["median"])} ({shown(value["low"])} to {shown(value["high"])})'
    return escape(str(value)).replace('|', r'\|')


def row(name, path, key, value, parts=()):
    "With a place for the value, and one for each of its parts"
    places = ''.join(f'<span id="{place(name, o)}"></span>' for o in [path, *((*path, k) for k in parts)])
    return f'| {places}{key} | {value} |'


def table(name, rows, head):
    lines = [f'| {head[0]} | {head[1]} |', '|---|---|', *(row(name, *o) for o in rows)]
    return '\n'.join(lines) + '\n\n'


def condition_rows(result, commit_url):
    for key in [k for k in CONDITIONS if k in result]:
        value = result[key]
        if key == 'commit': text = f'[{value[:7]}]({commit_url}/{value.removesuffix("-dirty")})' + value[40:]
        elif key == 'command': text = f'`{value}`'
        elif isinstance(value, dict): text = ', '.join(f'{k} {shown(v)}' for k, v in value.items())
        else: text = shown(value)
        yield (key,), key, text


def section(name, result, commit_url):
    text = f'({name})=\n### {name}\n\n{escape(result["what"])}. <a href="results/{name}.json">As JSON</a>\n\n'
    values = [(p, v) for k in VALUES if k in result for p, v in leaves(result[k], (k,))]
    text += table(name, [(p, ', '.join(p[p[0] == 'values':]), shown(v), v if spread(v) else ()) for p, v in values],
                  ('value', 'measured'))
    return text + table(name, condition_rows(result, commit_url), ('condition', 'of this measurement'))


def measured_page(results, commit_url):
    "`results` are {name: contents of its file}"
    text = INTRO
    for title, published in (('Measured here', False), ('Published by others', True)):
        found = {k: v for k, v in results.items() if bool(v.get('published')) == published}
        if found: text += f'\n## {title}\n\n' + '\n'.join(section(k, v, commit_url) for k, v in found.items())
    return text


def figure_links(text, results, up):
    "Links to values in results/NAME.json become links to their rows; `up` leads from the page to the site's root"
    def linked(m):
        said, name, pointer = m.groups()
        if name not in results: sys.exit(f'a page quotes {said} from results/{name}.json, which is not there')
        keys = ()
        if pointer:
            try: resolve_pointer(results[name], pointer)
            except InputError as e: sys.exit(f'a page quotes {said} from results/{name}.json: {e}')
            keys = tuple(pointer_keys(pointer))
        rows = {o for p, v in leaves(results[name]) for o in [p, *((*p, k) for k in (v if spread(v) else ()))]}
        while keys and keys not in rows: keys = keys[:-1]  # a value in a list leads to the list
        return f'<a class="figure" href="{up}measured.html#{place(name, keys)}">{said}</a>'
    return prose_only(text, lambda s: QUOTE.sub(linked, s))


def read_results(folder):
    return {p.stem: json.loads(p.read_text(encoding='utf-8')) for p in sorted(folder.glob('*.json'))}
