"The API reference: a page for each module, made from its docments"
import ast
import inspect
import re
from importlib import import_module

from fastcore.docments import docments, empty

from .notebooks import escape, prose_only


def name_of(o):
    "An annotation or a default in the words of the source"
    if isinstance(o, type): return o.__name__
    composed = hasattr(o, '__origin__') or isinstance(o, type(int | str))
    text = str(o) if composed else getattr(o, '__name__', repr(o))
    text = re.sub(r" at 0x[0-9a-f]+|<(?:class|function) '?([\w.]+)'?>", r'\1', text)
    return re.sub(r'\b(?:[a-z_]+\.)+([A-Z]\w*)', r'\1', text)


def cut(text, most=60): return text if len(text) <= most else text[:most - 3] + '...'


def code(text): return f'`{cut(text)}`'.replace('|', r'\|') if text else ''


def said(symbol): return escape(inspect.cleandoc(symbol.__doc__ or ''))


def signature(name, symbol):
    "name(a, b=1), in lines that fit"
    stars = {inspect.Parameter.VAR_POSITIONAL: '*', inspect.Parameter.VAR_KEYWORD: '**'}
    parts, keyword = [], False
    try: found = inspect.signature(symbol).parameters.values()
    except ValueError: return name  # an exception's
    for p in found:
        if p.name == 'self': continue
        if p.kind == p.KEYWORD_ONLY and not keyword and not any(o.startswith('*') for o in parts): parts.append('*')
        keyword = keyword or p.kind == p.KEYWORD_ONLY
        parts.append(stars.get(p.kind, '') + p.name + ('' if p.default is empty else '=' + cut(name_of(p.default), 30)))
    line = f'{name}({", ".join(parts)})'
    if len(line) <= 100: return line
    return f'{name}(\n    ' + ',\n    '.join(parts) + '\n)'


def parameters(symbol):
    "A table of what goes in and what comes out, as far as it is documented"
    rows = []
    for name, o in docments(symbol, full=True, args_kwargs=True).items():
        if name == 'self' or name == 'return' and not o.docment and o.anno in (empty, None): continue
        anno, default = '' if o.anno is empty else name_of(o.anno), '' if o.default is empty else name_of(o.default)
        means = escape(' '.join((o.docment or '').split())).replace('|', r'\|')
        rows.append(['**returns**' if name == 'return' else f'`{name}`', code(anno), code(default), means])
    if not any(type_ or means for _, type_, _, means in rows): return ''
    lines = [' | '.join(o) for o in [['parameter', 'type', 'default', 'meaning'], ['---']*4, *rows]]
    return ''.join(f'| {o} |\n' for o in lines) + '\n'


def methods(symbol):
    "A list of the public methods and properties that say what they are for"
    lines = []
    for name, o in vars(symbol).items():
        o = getattr(o, 'fget', None) or getattr(o, '__func__', o)
        if name.startswith('_') or not callable(o) or not o.__doc__: continue
        call = name if isinstance(vars(symbol)[name], property) else signature(name, o)
        lines.append(f'- `{" ".join(call.split())}`: {said(o)}\n')
    return f'Methods:\n\n{"".join(lines)}\n' if lines else ''


class Module:
    "What a page needs to know of a module; `repo` is its address on GitHub, with the branch"
    def __init__(self, name, repo):
        self.module, self.repo = import_module(name), repo
        self.name, self.short, self.file = name, name.rpartition('.')[2], name.replace('.', '/') + '.py'
        source = inspect.getsource(self.module)
        self.lines, self.nodes = source.splitlines(), {}
        for node in ast.parse(source).body:
            names = [node.name] if hasattr(node, 'name') else [t.id for t in getattr(node, 'targets', [])
                                                               if isinstance(t, ast.Name)]
            self.nodes.update({o: node for o in names})

    @property
    def symbols(self):
        "Exported functions and classes, in the order of the source"
        return [o for o in self.nodes if o in self.module.__all__ and hasattr(self.nodes[o], 'body')]

    @property
    def constants(self):
        return [o for o in self.nodes if o in self.module.__all__ and not hasattr(self.nodes[o], 'body')]

    def source_link(self, name):
        node = self.nodes[name]
        first = min([node.lineno, *(d.lineno for d in getattr(node, 'decorator_list', []))])
        return f'{self.repo}/{self.file}#L{first}-L{node.end_lineno}'

    def entry(self, name, explained):
        "Heading, links, signature, docstring, parameters, methods"
        symbol = getattr(self.module, name)
        text = f'## {name}\n\n{{.page-links}}\n[Source]({self.source_link(name)}){explained}\n\n'
        text += f'```python\n{"class " if inspect.isclass(symbol) else ""}{signature(name, symbol)}\n```\n\n'
        text += f'{said(symbol)}\n\n{parameters(symbol)}'
        return text + (methods(symbol) if inspect.isclass(symbol) else '')

    def constant_entries(self):
        nodes = [self.nodes[o] for o in self.constants]
        shown = [self.lines[n.lineno - 1:n.end_lineno] for n in nodes]
        shown = '\n'.join('\n'.join(o if len(o) < 13 else [*o[:10], '    ...']) for o in shown)
        return f'## Constants\n\n```python\n{shown}\n```\n' if nodes else ''

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
