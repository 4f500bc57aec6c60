"Pages as plain Markdown, for readers that are programs, and llms.txt, which lists them"
import re

from .notebooks import annotated, picture_of, prose_only


def output_text(output, alt):
    if picture_of(output): return f'*[{alt}]*'
    text = output.get('text') or output.get('data', {}).get('text/plain', '')
    return f'```\n{text.rstrip()}\n```' if text.strip() else ''


def notebook_markdown(nb):
    "Prose and code as they are, outputs as text, pictures as their descriptions"
    parts = []
    for c, _, alt in annotated(nb):
        if c.cell_type == 'code':
            if 'remove-input' not in c.metadata.get('tags', []): parts.append(f'```python\n{c.source}\n```')
            parts += [output_text(o, alt) for o in c.outputs]
        else: parts.append(c.source)
    return '\n\n'.join(filter(None, parts)) + '\n'


def local_links(text):
    "Links between pages lead to their Markdown"
    return prose_only(text, lambda s: re.sub(r'(\]\((?!http)[^)#\s]+)\.ipynb\b', r'\1.md', s))


def without_myst(text):
    "A generated page without what only MyST-NB understands"
    text = re.sub(r'(?m)^(\(.+\)=|\{[.#].+\})\n', '', text)
    return re.sub(r'<a href="([^"]*)">([^<]*)</a>', r'[\2](\1)', re.sub(r'<span id="[^"]*"></span>', '', text))


def llms_txt(name, summary, groups):
    "llmstxt.org: a title, a summary, and sections of links; `groups` are {section: [(title, address, subtitle)]}"
    text = f'# {name}\n\n> {summary}\n'
    for section, pages in groups.items():
        text += f'\n## {section}\n\n' + ''.join(f'- [{t}]({a}){": "*bool(s)}{s}\n' for t, a, s in pages)
    return text
