"""The API reference: a page for each module, made from its docments.

sphinx.ext.autodoc and sphinx-autodoc2 were tried: both show docstrings, but neither reads docments, so the tables of
parameters, the help of options, the links to cells and the Markdown copies would be written here all the same. How a
signature is printed is Sphinx's.
"""
import ast
import inspect
import re
from importlib import import_module
from textwrap import fill

from fastcore.docments import docments, empty
from resnet_nbdev.options import option_help
from sphinx.util.inspect import object_description, stringify_signature
from sphinx.util.typing import stringify_annotation

from .notebooks import escape, prose_only


def short_names(text): return re.sub(r"<(?:class|function) '?(?:\w+\.)*(\w+)[^>]*>", r'\1', text)


def type_text(annotation):
    return '' if annotation is empty else stringify_annotation(annotation, 'smart').replace('~', '')


def default_text(default): return '' if default is empty else short_names(object_description(default))


def code(text, limit=60):
    shown = text if len(text) <= limit else text[:limit - 3] + '...'
    return f'`{shown}`'.replace('|', r'\|') if text else ''


def docstring(symbol): return escape(inspect.cleandoc(symbol.__doc__ or ''))


def signature(name, symbol):
    "name(a, b=1), in lines that fit"
    try: found = inspect.signature(symbol)
    except ValueError: return name  # an exception's
    found = found.replace(parameters=[p for p in found.parameters.values() if p.name != 'self'])
    text = stringify_signature(found, show_annotation=False, show_return_annotation=False)
    return fill(name + short_names(text), 98, subsequent_indent='    ', break_long_words=False, break_on_hyphens=False)


def parameters(symbol):
    "A table of what goes in and what comes out, as far as it is documented"
    rows, options = [], getattr(symbol, 'options', None) or getattr(symbol, '__dataclass_fields__', {})
    for name, o in docments(symbol, full=True, args_kwargs=True).items():
        if name == 'self' or name == 'return' and not o.docment and o.anno in (empty, None): continue
        meaning = escape(' '.join((o.docment or help_of(options.get(name))).split())).replace('|', r'\|')
        name = '**returns**' if name == 'return' else f'`{name}`'
        rows.append([name, code(type_text(o.anno)), code(default_text(o.default)), meaning])
    if not any(type_ or meaning for _, type_, _, meaning in rows): return ''
    lines = [' | '.join(o) for o in [['parameter', 'type', 'default', 'meaning'], ['---']*4, *rows]]
    return ''.join(f'| {o} |\n' for o in lines) + '\n'


def help_of(option):
    "The help of a field of `Options`; its default has a column of its own, unless it only stands for another one"
    if 'help' not in getattr(option, 'metadata', ()): return ''
    text = option_help(option)
    return text if option.default is None else re.sub(r' \(default: .*\)$', '', text)


def methods(symbol):
    "A list of the public methods and properties that say what they are for"
    lines = []
    for name, o in vars(symbol).items():
        o = getattr(o, 'fget', None) or getattr(o, '__func__', o)
        if name.startswith('_') or not callable(o) or not o.__doc__: continue
        call = name if isinstance(vars(symbol)[name], property) else signature(name, o)
        lines.append(f'- `{" ".join(call.split())}`: {docstring(o)}\n')
    return f'Methods:\n\n{"".join(lines)}\n' if lines else ''


def definitions(source):
    "{name: syntax tree} of what a module defines at its top level"
    return {name: node for node in ast.parse(source).body for name in names_of(node)}


def names_of(node):
    if hasattr(node, 'name'): return [node.name]
    return [o.id for o in getattr(node, 'targets', []) if isinstance(o, ast.Name)]


class Module:
    "What a page needs to know of a module; `repo` is its address on GitHub, with the branch"
    def __init__(self, name, repo):
        self.module, self.repo = import_module(name), repo
        self.name, self.short, self.file = name, name.rpartition('.')[2], name.replace('.', '/') + '.py'
        source = inspect.getsource(self.module)
        self.lines = source.splitlines()
        exported = {k: o for k, o in definitions(source).items() if k in self.module.__all__}
        self.symbols = {k: o for k, o in exported.items() if hasattr(o, 'body')}  # functions and classes
        self.constants = {k: o for k, o in exported.items() if not hasattr(o, 'body')}

    def source_link(self, name):
        node = self.symbols[name]
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        return f'{self.repo}/{self.file}#L{first}-L{node.end_lineno}'

    def entry(self, name, explained):
        "Heading, links, signature, docstring, parameters, methods"
        symbol = getattr(self.module, name)
        text = f'## {name}\n\n{{.page-links}}\n[Source]({self.source_link(name)}){explained}\n\n'
        text += f'```python\n{"class " if inspect.isclass(symbol) else ""}{signature(name, symbol)}\n```\n\n'
        text += f'{docstring(symbol)}\n\n{parameters(symbol)}'
        return text + (methods(symbol) if inspect.isclass(symbol) else '')

    def constant_entries(self):
        sources = [self.lines[o.lineno - 1:o.end_lineno] for o in self.constants.values()]
        shown = '\n'.join('\n'.join(o if len(o) < 13 else [*o[:10], '    ...']) for o in sources)
        return f'## Constants\n\n```python\n{shown}\n```\n' if sources else ''

    def page(self, title, notebook, places):
        "`places` are the addresses of the cells that define the symbols"
        text = f'# {self.name}\n\n{{.subtitle}}\nThe module of the page [{title}]({notebook})\n\n'
        explain = lambda o: f' [Explained]({places[o]})' if o in places else ''
        return text + ''.join(self.entry(o, explain(o)) for o in self.symbols) + self.constant_entries()


def name_links(text, find):
    "Code in prose that is the name of a function or class leads to the address that `find` gives for it, if any"
    def linked(m):
        address = find(m[1].removesuffix('()'))
        return f'[`{m[1]}`]({address})' if address else m[0]
    name = re.compile(r'(?<![\[`])`([A-Za-z_]\w*(?:\(\))?)`(?![\]`])')
    change = lambda line: line if line.startswith('#') else name.sub(linked, line)
    return prose_only(text, lambda s: ''.join(change(o) for o in s.splitlines(keepends=True)))
