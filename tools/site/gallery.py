"The gallery: every picture of the notebooks, small, with the way to where it is explained"
import base64
import io

from PIL import Image

from .notebooks import annotated, picture_of

INTRO = '# Gallery\n\n{.subtitle}\nEvery plot of these pages; each leads to where it is explained\n'
WIDTH = 480 # of a small picture in pixels


def small(png):
    "A picture of at most `WIDTH` pixels on white, in few colours"
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert('RGBA')
    image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('RGB')
    image.thumbnail((WIDTH, WIDTH), Image.LANCZOS)
    to = io.BytesIO()
    image.quantize(64, dither=Image.Dither.NONE).save(to, 'png', optimize=True)
    return to.getvalue()


def pictures(nb):
    "(cell, heading of its section, alternative text, image in base64)"
    for c, section, alt in annotated(nb):
        for o in c.get('outputs', []):
            if picture_of(o) == 'image/png': yield c, section, alt, o.data['image/png']


def gallery_page(notebooks, folder):
    "`notebooks` are [(title, name, notebook, place of a cell)]; the small pictures are written to `folder`"
    text = INTRO
    for title, name, nb, place in notebooks:
        items = ''
        for n, (cell, section, alt, png) in enumerate(pictures(nb), 1):
            file, link = folder/f'{name.replace("/", "-")}-{n}.png', f'{name}.ipynb#{place(cell)}'
            file.write_bytes(small(png))
            items += f'- [![{bracketless(alt)}]({folder.name}/{file.name})]({link}) [{bracketless(section)}]({link})\n'
        if items: text += f'\n## {title}\n\n{{.gallery}}\n{items}'
    return text


def bracketless(text): return text.translate(str.maketrans('[]', '()'))
