"""Make or complete the environment in the folder given first, for `make`; whatever is missing is told in one sentence.

Written so that old Pythons can read it, because telling them that they are too old is one of its jobs.
"""
import os
import subprocess
import sys


def stop(message):
    sys.stderr.write(message + '\n')
    sys.exit(2)


def setting(name):
    for line in open('settings.ini'):
        key, _, value = line.partition('=')
        if key.strip() == name: return value.strip()


def works(*command):
    with open(os.devnull, 'w') as null:
        try: return subprocess.call(command, stdout=null, stderr=null) == 0
        except OSError: return False


def main(venv, *packages):
    need = setting('min_python')
    minimum = tuple(int(o) for o in need.split('.'))
    new_enough = 'import sys; sys.exit(sys.version_info < %r)' % (minimum,)
    if sys.version_info < minimum:
        stop('%s is Python %s, and this project needs %s or newer: install one and name it, as in '
             'make demo PYTHON=python3.12' % (sys.executable, sys.version.split()[0], need))
    try:  # Debian and Ubuntu ship these two apart from Python
        import ensurepip  # noqa: F401
        import venv as _  # noqa: F401
    except ImportError:
        stop('%s has no venv module: install it (on Debian and Ubuntu: apt-get install python3-venv) and try again'
             % sys.executable)
    python = os.path.join(venv, 'bin', 'python')
    if not works(python, '-c', new_enough):  # absent, broken by a moved Python, or too old
        if subprocess.call([sys.executable, '-m', 'venv', '--clear', venv]):
            stop('%s could not be made: is there space, and may you write here?' % os.path.abspath(venv))
    if not works(python, '-m', 'pip', '--version'): subprocess.check_call([python, '-m', 'ensurepip'])
    print('Installing into %s: about 5 GB, most of it PyTorch; half a minute to several, by the network' % venv)
    sys.stdout.flush()
    uv = [os.path.join(venv, 'bin', 'uv'), 'pip', 'install', '-q', '--python', python, '--compile-bytecode']
    uv += ['--reinstall-package', setting('lib_name')]  # uv's cache does not watch settings.ini
    if works(python, '-m', 'pip', 'install', '-q', 'uv') and subprocess.call(uv + list(packages)) == 0: return
    print('uv could not install it; pip tries, which takes longer')  # a mirror may be known to pip alone
    sys.stdout.flush()
    if subprocess.call([python, '-m', 'pip', 'install', '-q'] + list(packages)):
        stop('The requirements could not be installed: pip says why above, and a second try goes on from here')


if __name__ == '__main__': main(*sys.argv[1:])
