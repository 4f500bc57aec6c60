"""Build the site from the notebooks and their stored outputs: python -m tools.site.build [FOLDER]; by default _docs.

Nothing is executed. nbdev reads the notebooks, the modules beside this one make of them what MyST-NB understands, and
Sphinx makes the site.
"""
import ast
import os
import re
import shutil
import sys
import tempfile
from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path

import nbformat
from nbformat.v4 import new_markdown_cell

if not find_spec('sphinx'):
    sys.exit('Sphinx is not installed: it needs Python 3.11 or newer (make docs PYTHON=python3.12)')

from .gallery import gallery_page
from .markdown import llms_txt, local_links, notebook_markdown, without_myst
from .measured import figure_links, measured_page, read_results
from .notebooks import DECADES, annotated, prose_only, read_page, title_of
from .reference import Module, name_links

root = Path(__file__).resolve().parents[2]
nbs = root/'nbs'


def settings():
    config = ConfigParser(delimiters=['='])
    config.read(root/'settings.ini', encoding='utf-8')
    return config['DEFAULT']


cfg = settings()
github = f'https://github.com/{cfg["user"]}/{cfg["repo"]}'
blob = f'{github}/blob/{cfg["branch"]}'
colab = f'https://colab.research.google.com/github/{cfg["user"]}/{cfg["repo"]}/blob/{cfg["branch"]}'


def found_notebooks():
    "Names of all notebooks, such as tutorials/famous_errors"
    paths = [p for p in nbs.rglob('*.ipynb') if not any(o.startswith(('.', '_')) for o in p.relative_to(nbs).parts)]
    return {p.relative_to(nbs).with_suffix('').as_posix() for p in paths}


class Page:
    "A notebook of the site"
    def __init__(self, name):
        self.name, self.base, self.up = name, name.rpartition('/')[2], '../'*name.count('/')
        self.path = nbs/f'{name}.ipynb'
        self.nb = read_page(self.path)
        self.title, self.subtitle = title_of(self.nb)
        for c in self.nb.cells:
            if c.cell_type == 'markdown': c.source = prose_only(c.source, self.to_github)

    def to_github(self, text):
        "Links to files of the repository that the site does not have"
        def linked(m):
            path = (self.path.parent/m[1]).resolve()
            if not path.is_file() or path.is_relative_to(nbs): return m[0]
            return f']({blob}/{path.relative_to(root)}{m[2] or ""})'
        return re.sub(r'\]\((?!https?:)([^)#\s]+)(#[^)\s]*)?\)', linked, text)

    def place(self, cell): return f'cell-{self.base}-{cell.id}'.lower()

    def definitions(self):
        "{name: the exported cell that defines it}"
        exported = [c for c in self.nb.cells if c.metadata.get('exported')]
        return {o.name: c for c in exported for o in ast.parse(c.source).body if hasattr(o, 'name')}

    def head(self):
        "Title and subtitle, with the ways to Colab, to the notebook and to plain Markdown"
        links = {'Open in Colab': f'{colab}/nbs/{self.name}.ipynb', 'Notebook': f'{blob}/nbs/{self.name}.ipynb',
                 'Markdown': f'{self.base}.md'}
        links = ' '.join(f'<a href="{v}">{k}</a>' for k, v in links.items())
        return f'# {self.title}\n\n{{.subtitle}}\n{self.subtitle}\n\n<p class="page-links">{links}</p>\n\n'

    def for_site(self, reference, results):
        "The notebook as MyST-NB wants it: links, places to link to, alternative texts"
        shown, cells = nbformat.from_dict(self.nb), []
        defined = {c.id: [] for c in self.nb.cells}
        for name, c in self.definitions().items():
            if reference.has(self.name, name): defined[c.id].append(f'`{name}`')
        for c, _, alt in annotated(shown):
            if defined[c.id] or alt: cells.append(new_markdown_cell(f'({self.place(c)})=', id=f'to-{c.id}'))
            if alt: c.metadata['mystnb'] = dict(image=dict(alt=alt))
            cells.append(c)
            if defined[c.id]:
                names = f'{{.in-reference}}\nReference: {", ".join(defined[c.id])}'
                cells.append(new_markdown_cell(names, id=f'of-{c.id}'))
        for c in cells:
            if c.cell_type == 'markdown':
                c.source = reference.link(figure_links(c.source, results, self.up), self.name, self.up)
        cells[0].source = self.head() + re.sub(r'\A# .+\n*(?:> ?.*\n?)*', '', cells[0].source)
        shown.cells = cells
        return shown


class Reference:
    "The modules of the package, each with the page that it is exported from"
    def __init__(self, pages):
        exported = lambda p: re.search(r'#\| ?default_exp (\w+)', p.path.read_text(encoding='utf-8'))
        exports = {o: exported(p) for o, p in pages.items()}
        self.modules = {o: Module(f'{cfg["lib_name"]}.{m[1]}', blob) for o, m in exports.items() if m}
        self.pages = pages

    def has(self, page, name): return page in self.modules and name in self.modules[page].symbols

    def address(self, page, name=''): return f'api/{self.modules[page].short}.md' + f'#{name.lower()}'*bool(name)

    def link(self, text, page, up):
        "Names of functions and classes lead to their entries; of two with one name, that of the page's own module"
        def find(name):
            found = [page] if self.has(page, name) else [o for o in self.modules if self.has(o, name)]
            return up + self.address(found[0], name) if len(found) == 1 else None
        return name_links(text, find)

    def page(self, page):
        p, places = self.pages[page], {}
        for name, c in p.definitions().items(): places[name] = f'../{page}.ipynb#{p.place(c)}'
        return self.link(self.modules[page].page(p.title, f'../{page}.ipynb', places), page, '../')

    def index(self):
        rows = [f'| [{m.name}]({m.short}.md) | [{self.pages[o].title}](../{o}.ipynb) | '
                f'{", ".join(f"[`{s}`]({m.short}.md#{s.lower()})" for s in m.symbols)} |\n'
                for o, m in self.modules.items()]
        text = '# Reference\n\n{.subtitle}\nEvery public function and class, from the signatures in the source\n\n'
        text += '| module | page | functions and classes |\n|---|---|---|\n' + ''.join(rows)
        return text + '\n' + toctree([m.short for m in self.modules.values()])


def toctree(pages, caption=None):
    options = [':hidden:', *([f':caption: {caption}'] if caption else [])]
    return '\n'.join(['```{toctree}', *options, '', *pages, '```', ''])


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')


def write_sources(src, groups, pages, results):
    "What Sphinx reads; returns the generated pages, {name: Markdown}"
    reference = Reference(pages)
    (src/'small').mkdir()
    listed = [pages[o] for names in groups.values() for o in names]
    pictures = gallery_page([(p.title, p.name, p.nb, p.place) for p in listed], src/'small')
    made = {'measured': measured_page(results, f'{github}/commit'), 'gallery': pictures, 'api/index': reference.index(),
            **{f'api/{m.short}': reference.page(o) for o, m in reference.modules.items()}}
    for name, text in made.items(): write(src/f'{name}.md', text)
    trees = [toctree(names, caption) for caption, names in {
        **groups, 'Look up': ['api/index', 'measured', 'gallery']}.items()]
    for name, page in pages.items():
        nb = page.for_site(reference, results)
        if name == 'index': nb.cells += [new_markdown_cell(o, id=f'tree-{i}') for i, o in enumerate(trees)]
        write(src/f'{name}.ipynb', nbformat.writes(nb))
    return made


def run_sphinx(src, out, tmp):
    from sphinx.cmd.build import main
    name = dict(project=cfg['lib_name'], html_title=cfg['lib_name'], release=cfg['version'], author=cfg['author'],
                copyright=cfg['copyright'], html_baseurl=f'https://{cfg["user"]}.github.io/{cfg["repo"]}/')
    theme = dict(repository_url=github, repository_branch=cfg['branch'])
    more = [f'-D{k}={v}' for k, v in name.items()] + [f'-Dhtml_theme_options.{k}={v}' for k, v in theme.items()]
    return main(['-q', '-n', '-W', '--keep-going', '-b', 'html', '-c', str(Path(__file__).parent), '-d', str(tmp),
                 *more, str(src), str(out)])


def write_texts(out, groups, pages, made):
    "Markdown beside each page, and llms.txt"
    for name, page in pages.items(): write(out/f'{name}.md', local_links(notebook_markdown(page.nb)))
    for name, text in made.items():
        text = without_myst(text).replace('](small/', '](_images/')  # where Sphinx puts pictures
        write(out/f'{name}.md', local_links(text))
    entry = lambda o: (pages[o].title, f'{o}.md', pages[o].subtitle)
    lists = {k: [entry(o) for o in v] for k, v in {'Start': ['index'], **groups}.items()}
    lists['Look up'] = [(re.match('# (.+)', t)[1], f'{o}.md', subtitle_of(t)) for o, t in made.items()]
    write(out/'llms.txt', llms_txt(cfg['lib_name'], pages['index'].subtitle, lists))


def subtitle_of(text): return re.search(r'\{\.subtitle\}\n(.+)', text)[1]


def index_links():
    "({tutorials: in the order of their links in index.ipynb}, those in its table that is headed by the word tutorial)"
    text = '\n\n'.join(c.source for c in read_page(nbs/'index.ipynb').cells if c.cell_type == 'markdown')
    links = lambda part: dict.fromkeys(re.findall(r'\]\((tutorials/\w+)\.ipynb\b', part))
    table = re.search(r'(?im)^\|[^|]*\btutorials?\b[^\n]*\n\|[ :|-]+\n(?:\|.*\n?)+', text)
    if not table: sys.exit('nbs/index.ipynb has no table of the tutorials')
    return links(text), links(table[0])


def group_pages(names):
    "{part of the sidebar: names of its pages}"
    linked, tutorials = index_links()
    numbered = sorted(o for o in names if re.match(r'\d\d_', o) and int(o[0]) in DECADES)
    groups = dict(Tutorials=[o for o in linked if o in tutorials], Labs=[o for o in linked if o not in tutorials])
    groups.update({part: [o for o in numbered if int(o[0]) == i] for i, part in DECADES.items()})
    placed = {'index', *sum(groups.values(), [])}
    if lost := names - placed:
        sys.exit(f'{", ".join(sorted(lost))} has no place on the site: a page of the library has a number of one of '
                 f'the DECADES, a tutorial is linked from nbs/index.ipynb')
    if absent := placed - names: sys.exit(f'nbs/index.ipynb links to {", ".join(sorted(absent))}, which is not there')
    return groups


def read_pages():
    "({name: page}, {part of the sidebar: names})"
    groups = group_pages(found_notebooks())
    return {o: Page(o) for o in ['index', *sum(groups.values(), [])]}, groups


def build(out):
    pages, groups = read_pages()
    results = read_results(nbs/'results')
    if out.exists(): shutil.rmtree(out)
    with tempfile.TemporaryDirectory() as tmp:
        src = Path(tmp)/'src'
        src.mkdir()
        made = write_sources(src, groups, pages, results)
        failed = run_sphinx(src, Path(tmp)/'site', Path(tmp)/'doctrees')  # MyST-NB leaves its pictures beside it
        shutil.move(Path(tmp)/'site', out)
    write_texts(out, groups, pages, made)
    shutil.copytree(nbs/'results', out/'results')
    (out/'_static/scripts/fontawesome.js').write_text('')  # 1.5 MB a page for icons that are in the theme's font, too
    (out/'.buildinfo').unlink(missing_ok=True)
    shutil.rmtree(out/'_sources', ignore_errors=True)
    if failed: sys.exit('Sphinx has warned of what is listed above: the site is not complete')


if __name__ == '__main__':
    out = Path(sys.argv[1] if len(sys.argv) > 1 else root/cfg['doc_path']).resolve()
    build(out)
    print(f'The site is in {out}. To look at it: python -m http.server -d {os.path.relpath(out)} 8000, then '
          'http://localhost:8000')
