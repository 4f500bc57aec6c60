"""Pictures of every kind and every kind of damage, through `open_image`, `check_images` and `channel_stats`."""
import hashlib
import io
import os
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features
from resnet_nbdev.core import InputError
from resnet_nbdev.images import Picture, channel_stats, check_images, open_image
from resnet_nbdev.layouts import list_images

from conftest import make_folder, noise

GREY = np.arange(24, dtype=np.uint8).reshape(4, 6)*10
RGB = noise(1, 16)


def saved(im, fmt, **kw):
    "The bytes of an image file"
    f = io.BytesIO()
    (Image.fromarray(im) if isinstance(im, np.ndarray) else im).save(f, fmt, **kw)
    return f.getvalue()


def opened(source):
    "The array of an image that must come out as RGB"
    im = open_image(source)
    assert im.mode == 'RGB'
    return np.asarray(im)


def grey3(a): return np.repeat(a[..., None], 3, 2)


def chunk(kind, content):
    return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))


def png_with(kind, content):
    "The bytes of RGB as a PNG file with one more chunk behind its header"
    png = saved(RGB, 'PNG')
    return png[:33] + chunk(kind, content) + png[33:]


@pytest.mark.parametrize('fmt', ['PNG', 'TIFF', 'BMP', 'GIF'])
def test_grey(fmt): assert (opened(saved(GREY, fmt)) == grey3(GREY)).all()


def test_one_bit():
    bits = GREY > 100
    assert (opened(saved(Image.fromarray(bits), 'PNG')) == grey3(bits*255)).all()


def test_grey_with_alpha():
    "Transparent is white, opaque is itself, half transparent is half way"
    alpha = np.zeros_like(GREY)
    alpha[1], alpha[2] = 255, 128
    out = opened(saved(Image.merge('LA', [Image.fromarray(GREY), Image.fromarray(alpha)]), 'PNG'))
    assert (out[[0, 3]] == 255).all() and (out[1] == grey3(GREY)[1]).all()
    assert abs(out[2] - (grey3(GREY)[2]*128. + 255*127)/255).max() <= 1


def test_rgb_with_alpha():
    alpha = np.zeros((16, 16, 1), np.uint8)
    alpha[8:] = 255
    out = opened(saved(np.concatenate([RGB, alpha], 2), 'PNG'))
    assert (out[:8] == 255).all() and (out[8:] == RGB[8:]).all()


def test_palette_without_transparency():
    im = Image.fromarray(RGB).quantize(16)
    assert (opened(saved(im, 'PNG')) == np.asarray(im.convert('RGB'))).all()


@pytest.mark.parametrize('fmt', ['PNG', 'GIF'])
def test_palette_with_transparency(fmt):
    im = Image.fromarray((np.arange(36).reshape(6, 6) % 3).astype(np.uint8)).convert('P')
    im.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    out = opened(saved(im, fmt, transparency=1))
    assert (out[:, 0::3] == [255, 0, 0]).all() and (out[:, 1::3] == 255).all() and (out[:, 2::3] == [0, 0, 255]).all()


def test_rgb_with_a_transparent_colour():
    a = RGB.copy()
    a[0, 0], a[a == 7] = [7, 7, 7], 8
    a[0, 0] = 7
    out = opened(saved(a, 'PNG', transparency=(7, 7, 7)))
    assert (out[0, 0] == 255).all() and (out[1:] == a[1:]).all()


def test_cmyk_jpeg():
    "Colours as Pillow's own conversion gives them, and not inverted"
    flat = np.zeros((16, 16, 3), np.uint8) + np.array([200, 100, 30], np.uint8)
    content = saved(Image.fromarray(flat).convert('CMYK'), 'JPEG', quality=95)
    assert Image.open(io.BytesIO(content)).mode == 'CMYK'
    assert abs(opened(content).astype(int) - flat).max() < 8


@pytest.mark.parametrize('fmt', ['PNG', 'TIFF'])
def test_16_bit_grey(fmt):
    "Scaled to 8 bits: Pillow's own conversion would turn nearly all of it white"
    deep = GREY.astype(np.uint16)*257
    content = saved(deep, fmt)
    assert Image.open(io.BytesIO(content)).mode.startswith('I')
    assert (opened(content) == grey3(GREY)).all()


def test_16_bit_big_endian_tiff():
    im = Image.frombytes('I;16B', (6, 4), (GREY.astype('>u2')*257).astype('>u2').tobytes())
    assert (opened(saved(im, 'TIFF')) == grey3(GREY)).all()


TURNS = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
         6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a.swapaxes(0, 1), 2), 8: np.rot90}


@pytest.mark.parametrize('orientation', TURNS)
@pytest.mark.parametrize('fmt', ['JPEG', 'PNG', 'TIFF'])
def test_exif_orientation(orientation, fmt, tmp_path):
    "What is stored is turned as EXIF 2.3 (tag 274) says, from bytes and from a file"
    # 32x48: each turn of it is another picture
    colours = [[[250, 10, 10], [10, 250, 10], [10, 10, 250]], [[250, 250, 10], [10, 10, 10], [250, 250, 250]]]
    blocks = np.kron(np.array(colours), np.ones((16, 16, 1), int)).astype(np.uint8)
    exif = Image.Exif()
    exif[274] = orientation
    content = saved(blocks, fmt, exif=exif, **(dict(quality=95, subsampling=0) if fmt == 'JPEG' else {}))
    (tmp_path/'im').write_bytes(content)
    want = TURNS[orientation](blocks)
    for source in (content, tmp_path/'im', str(tmp_path/'im')):
        out = opened(source)
        assert out.shape == want.shape and abs(out.astype(int) - want).max() < 12
        assert open_image(source).getexif().get(274, 1) == 1, 'a second reader would turn it again'


def test_every_kind_of_source(tmp_path):
    content = saved(RGB, 'PNG')
    path = tmp_path/'im.png'
    path.write_bytes(content)
    for source in (path, str(path), content, RGB, Image.fromarray(RGB), Image.open(path)):
        assert (opened(source) == RGB).all()
    assert (opened(GREY) == grey3(GREY)).all()


def test_an_image_in_memory_is_not_changed():
    a, im = RGB.copy(), Image.fromarray(np.dstack([RGB, RGB[..., :1]]))
    np.asarray(opened(a)), opened(im)
    assert (a == RGB).all() and im.mode == 'RGBA' and (np.asarray(im)[..., :3] == RGB).all()


@pytest.mark.parametrize('kept', ['all but 2 bytes', 0.9, 0.5, 0.2, 0.05])
@pytest.mark.parametrize('progressive', [False, True])
def test_truncated_jpeg(kept, progressive, tmp_path):
    content = saved(noise(2, 100), 'JPEG', progressive=progressive)
    path = tmp_path/'cut.jpg'
    path.write_bytes(content[:-2 if isinstance(kept, str) else int(len(content)*kept)])
    with pytest.raises(InputError, match='cut.jpg is no readable image'): open_image(path)
    assert list(check_images([path])[1]) == [path]


def damaged(tmp_path):
    "Files that are no images, by what is wrong with them"
    png = saved(noise(2, 100), 'PNG')
    big = struct.pack('>IIBBBBB', 100_000, 100_000, 8, 2, 0, 0, 0)
    files = dict(empty=b'', text=b'no picture\n', half_png=png[:len(png)//2], header_png=png[:33], signature=png[:8],
                 bomb=png[:8] + chunk(b'IHDR', big) + png[33:], half_tiff=saved(noise(2, 100), 'TIFF')[:9000])
    for k, v in files.items():
        (tmp_path/f'{k}.png').write_bytes(v)
        yield tmp_path/f'{k}.png'


def test_damaged_files_are_refused_by_name(tmp_path):
    files = list(damaged(tmp_path))
    for f in files:
        with pytest.raises(InputError) as e: open_image(f)
        said = str(e.value)
        assert said.startswith(f'{f} is no readable image (') and '\n' not in said and ' at 0x' not in said
    assert list(check_images(files)[1]) == files


def test_no_file_at_all(tmp_path):
    for path in (tmp_path, tmp_path/'absent.jpg'):
        with pytest.raises(InputError, match=f'{path.name} is no readable image'): open_image(path)


def test_damaged_bytes():
    with pytest.raises(InputError, match='these bytes are no readable image'): open_image(b'no picture')


@pytest.mark.skipif(not features.check('avif'), reason='this Pillow reads no AVIF')
def test_damaged_avif(tmp_path):
    "Pillow raises RuntimeError for this format alone"
    path, content = tmp_path/'bad.avif', saved(noise(2, 64), 'AVIF')
    data = content.index(b'mdat') + 4
    zeroed = content[:data] + bytes(200) + content[data+200:]
    for bad in (content[:len(content)//2], content.replace(b'iloc', b'free'), zeroed):
        path.write_bytes(bad)
        with pytest.raises(InputError, match='bad.avif is no readable image'): open_image(path)
        assert list(check_images([path])[1]) == [path]


BAD_EXIF = dict(
    png=lambda: png_with(b'eXIf', b'XX\0*\0\0\0\x08\0\0'),
    jpeg=lambda: saved(RGB, 'JPEG', exif=b'Exif\0\0XX\0*\0\0\0\x08\0\0'),
    # turned, and with a resolution of 'abc'
    words=lambda: png_with(b'eXIf', b'MM\0*\0\0\0\x08\0\x02' + struct.pack('>HHI4s', 274, 3, 1, b'\0\x06\0\0')
                           + struct.pack('>HHI4s', 282, 2, 4, b'abc\0') + bytes(4)))


@pytest.mark.parametrize('kind', BAD_EXIF)
def test_damaged_exif_does_not_hide_the_picture(kind, tmp_path):
    "A photo that every viewer shows is no reason to stop: at worst it is shown as it is stored"
    path = tmp_path/'im'
    path.write_bytes(BAD_EXIF[kind]())
    assert opened(path).shape == RGB.shape
    assert check_images([path])[0] == [path]


def test_nothing_is_written_to_the_files(folder):
    "Names, contents and times of a folder stay as they are, also where images are turned or broken"
    exif = Image.Exif()
    exif[274] = 6
    (folder/'train'/'cat'/'turned.jpg').write_bytes(saved(RGB, 'JPEG', exif=exif))
    (folder/'train'/'cat'/'broken.jpg').write_bytes(b'no')
    files = lambda: [f for f in folder.rglob('*') if f.is_file()]
    state = lambda: {f: (hashlib.sha256(f.read_bytes()).digest(), f.stat().st_mtime_ns) for f in files()}
    before = state()
    for f in check_images(list_images(folder))[0]: open_image(f)
    assert state() == before


def test_unreadable_files_are_left_out_and_named(folder, broken_files, capsys):
    files = list_images(folder)
    good, bad, _ = check_images(files)
    assert good == [f for f in files if f not in broken_files] and list(bad) == broken_files
    said = capsys.readouterr().err
    assert said.startswith('Left out 3 of 27 files that are no readable images: ') and said.count('\n') == 1
    for f in broken_files: assert f'{f} (' in said
    assert 'empty.png (empty)' in said


def test_strict_refuses_unreadable_files(folder, broken_files, capsys):
    with pytest.raises(InputError) as e: check_images(list_images(folder), strict=True)
    assert str(e.value).startswith('3 of 27 files are no readable images: ')
    for f in broken_files: assert f'{f} (' in str(e.value)
    assert not capsys.readouterr().err


def test_only_the_first_of_many_are_named(tmp_path, capsys):
    for i in range(9): (tmp_path/f'{i}.png').touch()
    check_images(sorted(tmp_path.iterdir()))
    said = capsys.readouterr().err
    assert said.startswith('Left out 9 of 9') and said.count('.png') == 5 and said.endswith(', ...\n')


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read every file')
def test_a_file_without_permission_is_left_out(folder):
    path = folder/'train'/'cat'/'0.png'
    path.chmod(0)
    assert list(check_images(list_images(folder))[1]) == [path]


def fingerprint(folder): return check_images(list_images(folder))[2]


def test_fingerprint_follows_the_content(folder, tmp_path):
    "Location, order of creation and times do not matter; one byte, one name and one class do"
    here = fingerprint(folder)
    there = tmp_path/'elsewhere'/'cats and dogs'
    for f in reversed(list_images(folder)):
        (there/f.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(f, there/f.relative_to(folder))
    assert fingerprint(there) == here
    seen = {here}
    one = there/'train'/'cat'/'0.png'
    one.write_bytes(one.read_bytes() + b'\0')  # behind the end of the picture: the same pixels in another file
    seen.add(fingerprint(there))
    one.rename(one.with_name('00.png'))
    seen.add(fingerprint(there))
    (there/'train'/'cat').rename(there/'train'/'cow')
    seen.add(fingerprint(there))
    (there/'val'/'dog'/'0.png').unlink()
    seen.add(fingerprint(there))
    assert len(seen) == 5


def test_fingerprint_of_a_part(tmp_path):
    "Files of which no one speaks do not count: hidden ones, and those that are left out"
    folder = make_folder(tmp_path/'set')
    before = fingerprint(folder)
    (folder/'train'/'cat'/'.DS_Store').write_bytes(b'x')
    (folder/'train'/'.hidden').mkdir()
    (folder/'train'/'cat'/'bad.png').touch()
    (folder/'notes.txt').write_text('x')
    assert fingerprint(folder) == before


# mean and spread

def stats_by_numpy(arrays):
    x = np.concatenate([(o if o.ndim == 3 else np.repeat(o[..., None], 3, 2)).reshape(-1, 3) for o in arrays])/255.
    return x.mean(0), x.std(0)


def test_stats_of_images_of_all_sizes(tmp_path):
    "Each pixel counts once, so a larger image counts for more; files as arrays"
    arrays = [noise(i, 5 + 9*i)//(i + 1) for i in range(6)] + [noise(9, 30)[:7]]
    for i, o in enumerate(arrays): Image.fromarray(o).save(tmp_path/f'{i}.png')
    got, want = channel_stats(arrays), stats_by_numpy(arrays)
    assert np.allclose(got, want, atol=5.1e-5) and channel_stats(sorted(tmp_path.iterdir())) == got
    assert not np.allclose(got[0], np.mean([stats_by_numpy([o])[0] for o in arrays], 0), atol=1e-3)


def test_stats_of_grey_and_constant_images():
    grey = [noise(i, 10 + i)[..., 0] for i in range(3)]
    means, stds = channel_stats(grey)
    assert len(set(means)) == len(set(stds)) == 1 and np.allclose((means, stds), stats_by_numpy(grey), atol=5.1e-5)
    for level in (0, 77, 255):
        assert channel_stats([np.full((50, 30, 3), level, np.uint8)]*5) == ([round(level/255, 4)]*3, [0.]*3)
    colour = np.zeros((4, 4, 3), np.uint8) + np.array([255, 51, 0], np.uint8)
    assert channel_stats([colour]) == ([1, .2, 0], [0]*3)
    picture = Picture('a', 0, grey[0], 'x')
    assert channel_stats([picture]) == channel_stats([grey[0]])


def test_stats_of_very_many_pixels():
    "Sums beyond what 32 bits hold, in whole numbers or in floats; one dark pixel among 9 million"
    arrays = [np.full((3000, 1000, 3), 255, np.uint8) for _ in range(3)]
    arrays[1][0, 0] = 0
    arrays[2][:, ::2] = 253
    n, q, s = 9_000_000, 255**2*(7_500_000 - 1) + 253**2*1_500_000, 255*(7_500_000 - 1) + 253*1_500_000
    mean, std = s/n, (q/n - (s/n)**2)**.5
    assert channel_stats(arrays) == ([round(mean/255, 4)]*3, [round(std/255, 4)]*3)
    many = [Picture('a', i, noise(i, 12)[..., 0], 'x') for i in range(2000)]
    assert np.allclose(channel_stats(many), stats_by_numpy([o.pixels for o in many]), atol=5.1e-5)
