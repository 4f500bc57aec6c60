"Everything is in settings.ini; this file only hands it to setuptools."
import re
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
url = f"https://github.com/{cfg['user']}/{cfg['repo']}"


def long_description():
    "README.md with whole addresses, since PyPI has none of the files that it links to"
    pages, files = f"{url}/blob/{cfg['branch']}/", f"{url}/raw/{cfg['branch']}/"
    whole = lambda m: m[0] + (files if m[0][0] == '!' else pages)
    return re.sub(r'!?\[[^\]]*\]\((?!https?:|#)', whole, (here/'README.md').read_text(encoding='utf-8'))


class WithResults(build_py):
    "The published figures travel in the wheel, since the tutorials read them"
    def run(self):
        super().run()
        if self.editable_mode: return  # the repository's own are read
        to = Path(self.build_lib)/cfg['lib_path']/'results'
        to.mkdir(parents=True, exist_ok=True)
        for o in (here/cfg['nbs_path']/'results').glob('*.json'): shutil.copy(o, to)


setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    long_description=long_description(), long_description_content_type='text/markdown',
    author=cfg['author'], author_email=cfg['author_email'], license='Apache-2.0', url=url,
    packages=find_packages(include=[cfg['lib_path'] + '*']), python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(),
    extras_require={k.removesuffix('_requirements'): v.split() for k, v in cfg.items() if k.endswith('_requirements')},
    entry_points={'console_scripts': cfg['console_scripts'].split()},
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Developers', 'Intended Audience :: Education',
                 'Natural Language :: English', f"Programming Language :: Python :: {cfg['min_python']}"],
    cmdclass=dict(build_py=WithResults), zip_safe=False)
