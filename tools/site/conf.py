"Sphinx's settings; build.py adds what it reads from settings.ini"
from pathlib import Path

extensions = ['myst_nb', 'sphinx_copybutton', 'sphinx-mathjax-offline', 'sphinx.ext.mathjax', 'sphinx.ext.githubpages']
html_theme = 'sphinx_book_theme'
html_static_path = [str(Path(__file__).parent/'static')]
html_theme_options = dict(
    use_repository_button=True, use_source_button=True, use_edit_page_button=True, path_to_docs='nbs',
    launch_buttons=dict(colab_url='https://colab.research.google.com'), use_download_button=False,
    use_fullscreen_button=False, home_page_in_toc=True, max_navbar_depth=1, show_toc_level=2, navbar_persistent=[],
    navigation_with_keys=False, secondary_sidebar_items={'**': ['page-toc'], 'index': []})
html_context = dict(default_mode='auto')
html_css_files = ['site.css']
html_favicon = str(Path(__file__).parent/'static'/'favicon.svg')
html_copy_source = html_show_sourcelink = html_show_sphinx = html_use_index = False
html_last_updated_fmt = None
nb_execution_mode = 'off'
nb_merge_streams = True
myst_enable_extensions = ['dollarmath', 'amsmath', 'attrs_block', 'attrs_inline']
myst_heading_anchors = 4
myst_dmath_double_inline = True
copybutton_exclude = '.linenos, .gp'


def fewer_buttons(app, page, template, context, doctree):
    "A page that was generated has no source to look at or to edit; that of a notebook is shown as a notebook"
    kept = []
    for group in context.get('header_buttons', []):
        buttons = group.get('buttons', [])
        if context.get('page_source_suffix') != '.ipynb':
            buttons = [b for b in buttons if b['label'] not in ('source-file-button', 'source-edit-button')]
        for b in [o for o in buttons if 'url' in o]: b['url'] = b['url'].removesuffix('?plain=1')
        if 'buttons' not in group or buttons: kept.append({**group, 'buttons': buttons} if buttons else group)
    context['header_buttons'] = kept


def setup(app): app.connect('html-page-context', fewer_buttons, priority=900)
