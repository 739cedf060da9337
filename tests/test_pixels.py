"""One image in every mode and container gives the same pixels; whatever else a file holds is one line that names it."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageSequence

from cil.config import DataConfig, HardwareConfig
from cil.config.schema import MAX_PIXELS
from cil.data import sources
from cil.data.images import LoadedSplit, read_image
from cil.data.pixels import decode
from cil.data.source import ImageSource
from cil.data.transforms import Transforms
from cil.errors import DataError

few = settings(derandomize=True, deadline=None, max_examples=12)
sides = st.tuples(st.integers(1, 9), st.integers(1, 9))
greys = sides.flatmap(lambda side: arrays(np.uint8, side))
colours = sides.flatmap(lambda side: arrays(np.uint8, (*side, 3)))


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(values: np.ndarray, colour: int, extra: bytes = b"") -> bytes:
    """A PNG of uint16 values by its specification; PIL writes 16 bits for grey only."""
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def tiff(rows: bytes, size: tuple[int, int], bits: int, white_is_zero: bool = False) -> bytes:
    """A grey TIFF by its specification; PIL writes neither 12 bits nor an inverted scale."""
    tags = [(256, size[0]), (257, size[1]), (258, bits), (259, 1), (262, 0 if white_is_zero else 1)]
    tags += [(273, 8), (277, 1), (278, size[1]), (279, len(rows))]
    rows += b"\0" * (len(rows) % 2)
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(rows)) + rows + struct.pack("<H", len(tags)) + entries + b"\0\0\0\0"


def twelve_bits(values: np.ndarray) -> bytes:
    """Rows of 12-bit values, two in three bytes, each row filled up to a byte."""
    bits = ((values.astype(np.uint16)[..., None] >> np.arange(11, -1, -1)) & 1).reshape(len(values), -1)
    return np.packbits(bits.astype(np.uint8), axis=1).tobytes()


def with_palette(pixels: np.ndarray, kind: str, **options) -> bytes:
    colours, index = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
    image = Image.fromarray(index.reshape(pixels.shape[:2]).astype(np.uint8))
    image.putpalette(colours.astype(np.uint8).tobytes())
    return saved(image, kind, **options)


def grey_files(grey: np.ndarray) -> dict[str, bytes]:
    """The same grey image in files of every mode, by what they exercise."""
    image, (height, width) = Image.fromarray(grey), grey.shape
    sixteen, full = grey.astype(np.uint16) * 257, np.full_like(grey, 65535, dtype=np.uint16)
    files = {kind: saved(image, kind) for kind in ("PNG", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "TGA", "PCX", "SGI")}
    files |= {
        "16 bits, PNG": saved(Image.fromarray(sixteen), "PNG"),
        "16 bits, TIFF": saved(Image.fromarray(sixteen), "TIFF"),
        "16 bits, TIFF of the other byte order": saved(Image.fromarray(sixteen.astype(">u2")), "TIFF"),
        "16 bits, TIFF compressed": saved(Image.fromarray(sixteen), "TIFF", compression="tiff_lzw"),
        "16 bits, JPEG 2000": saved(Image.fromarray(sixteen), "JPEG2000"),
        "16 bits, PGM": b"P5 %d %d 65535\n" % (width, height) + sixteen.astype(">u2").tobytes(),
        "10 bits, PGM": b"P5 %d %d 1023\n" % (width, height) + np.rint(grey / 255 * 1023).astype(">u2").tobytes(),
        "12 bits, TIFF": tiff(twelve_bits(np.rint(grey / 255 * 4095)), (width, height), 12),
        "16 bits, white is zero": tiff((65535 - sixteen).astype("<u2").tobytes(), (width, height), 16, True),
        "8 bits, white is zero": tiff((255 - grey).tobytes(), (width, height), 8, True),
        "16 bits with opacity": png(np.dstack([sixteen, full]), 4),
        "48 bits": png(np.dstack([sixteen] * 3), 2),
        "float in 0…1, TIFF": saved(Image.fromarray(grey.astype(np.float32) / 255), "TIFF"),
        "float in 0…1, PFM": saved(Image.fromarray(grey.astype(np.float32) / 255), "PPM"),
        "32 bits": saved(Image.fromarray(grey.astype(np.int32)), "TIFF"),
        "opaque": saved(image.convert("LA"), "PNG"),
        "palette": with_palette(np.dstack([grey] * 3), "PNG"),
    }
    if grey.max() > 1:  # up to 1 white is 1
        files["float in 0…255"] = saved(Image.fromarray(grey.astype(np.float32)), "TIFF")
    return files


def colour_files(pixels: np.ndarray) -> dict[str, bytes]:
    image, other = Image.fromarray(pixels), Image.fromarray(255 - pixels)
    more = {"save_all": True, "append_images": [other]}
    sixteen, full = pixels.astype(np.uint16) * 257, np.full(pixels.shape[:2], 65535, np.uint16)
    files = {kind: saved(image, kind) for kind in ("PNG", "TIFF", "BMP", "PPM", "JPEG2000", "TGA", "QOI", "SGI")}
    return files | {
        "48 bits": png(sixteen, 2),
        "64 bits": png(np.dstack([sixteen, full]), 6),
        "opaque": saved(image.convert("RGBA"), "PNG"),
        "opaque, TIFF": saved(image.convert("RGBA"), "TIFF"),
        "CMYK": saved(image.convert("CMYK"), "TIFF"),
        "WebP": saved(image, "WEBP", lossless=True),
        "palette": with_palette(pixels, "PNG"),
        "GIF": with_palette(pixels, "GIF"),
        "animated GIF": with_palette(pixels, "GIF", save_all=True, append_images=[other.quantize(4)]),
        "animated PNG": saved(image, "PNG", **more),
        "animated WebP": saved(image, "WEBP", lossless=True, **more),
        "two pages": saved(image, "TIFF", **more),
    }


@few
@given(greys)
def test_a_grey_image_gives_the_same_pixels_in_every_mode(grey):
    for name, content in grey_files(grey).items():
        found = decode(content)
        assert found.mode == "RGB"
        difference = np.abs(np.asarray(found).astype(int) - grey[..., None])
        assert difference.max() <= 1, name


@few
@given(colours)
def test_a_colour_image_gives_the_same_pixels_in_every_mode(pixels):
    for name, content in colour_files(pixels).items():
        np.testing.assert_array_equal(np.asarray(decode(content)), pixels, err_msg=name)


@few
@given(colours)
def test_an_ordinary_file_keeps_the_pixels_it_always_had(pixels):
    """Of PIL's ``convert("RGB")``, to the bit: the feature store and stored runs rest on them."""
    image = Image.fromarray(pixels)
    smooth = image.resize((40, 30), Image.Resampling.BICUBIC)
    files = [saved(smooth, "JPEG"), saved(smooth.convert("L"), "JPEG"), saved(smooth.convert("CMYK"), "JPEG")]
    files += [saved(smooth, "WEBP"), saved(smooth.convert("1"), "PNG"), saved(smooth.convert("P"), "PNG")]
    other = smooth.convert("YCbCr")  # before 13.0 Pillow does not read such TIFF files that are not compressed
    files += [saved(smooth.convert("RGBA"), "PNG"), saved(other, "TIFF", compression="tiff_lzw")]
    for content in files:
        np.testing.assert_array_equal(
            np.asarray(decode(content)), np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        )
    np.testing.assert_array_equal(np.asarray(decode(other)), np.asarray(other.convert("RGB")))


@few
@given(colours, st.integers(0, 9), st.data())
def test_transparent_pixels_are_shown_on_white(pixels, seed, data):
    random = np.random.RandomState(seed)
    alpha = random.choice([0, 1, 80, 128, 254, 255], pixels.shape[:2]).astype(np.uint8)

    def on_white(shown, opacity):
        return opacity[..., None] / 255 * shown + 255 - opacity[..., None].astype(float)

    def agree(content, expected):
        assert np.abs(np.asarray(decode(content)).astype(int) - expected).max() <= 1

    image, grey = Image.fromarray(np.dstack([pixels, alpha])), pixels[..., 0]
    agree(saved(image, "PNG"), on_white(pixels, alpha))
    agree(saved(image, "TIFF"), on_white(pixels, alpha))
    agree(saved(Image.fromarray(np.dstack([grey, alpha])), "PNG"), on_white(np.dstack([grey] * 3), alpha))
    deep = np.dstack([pixels, alpha]).astype(np.uint16) * 257
    agree(png(deep, 6), on_white(pixels, alpha))
    key = pixels[0, 0]
    same = (pixels == key).all(-1)
    agree(saved(Image.fromarray(pixels), "PNG", transparency=tuple(key.tolist())), on_white(pixels, 255 * ~same))
    agree(png(pixels.astype(np.uint16) * 257, 2, chunk(b"tRNS", (key.astype(np.uint16) * 257).astype(">u2").tobytes())),
          on_white(pixels, 255 * ~same))  # fmt: skip
    shown = on_white(np.dstack([grey] * 3), 255 * (grey != grey[0, 0]))
    agree(saved(Image.fromarray(grey), "PNG", transparency=int(grey[0, 0])), shown)
    deep_key = chunk(b"tRNS", struct.pack(">H", int(grey[0, 0]) * 257))
    agree(png(grey.astype(np.uint16) * 257, 0, deep_key), shown)
    colours, index = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
    opacity = random.randint(0, 256, len(colours)).astype(np.uint8)
    each = on_white(pixels, opacity[index].reshape(pixels.shape[:2]))
    agree(with_palette(pixels, "PNG", transparency=opacity.tobytes()), each)
    hidden = int(index[0])
    agree(with_palette(pixels, "GIF", transparency=hidden), on_white(pixels, 255 * ~same))


def test_hidden_colours_of_an_image_are_not_changed_where_it_is_opaque():
    pixels = np.random.RandomState(0).randint(0, 256, (20, 20, 4)).astype(np.uint8)
    pixels[..., 3] = np.where(np.arange(20) < 10, 255, 0)
    found = np.asarray(decode(saved(Image.fromarray(pixels), "PNG")))
    np.testing.assert_array_equal(found[:, :10], pixels[:, :10, :3])
    assert (found[:, 10:] == 255).all()


TURNS = {  # EXIF's numbers: what a camera did to the upright image
    1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a, 3),
}  # fmt: skip


@few
@given(colours, st.sampled_from(sorted(TURNS)))
def test_the_orientation_of_a_camera_is_applied(pixels, number):
    exif = Image.Exif()
    exif[0x0112] = number
    turned = Image.fromarray(np.ascontiguousarray(TURNS[number](pixels)))
    deep = Image.fromarray(np.ascontiguousarray(TURNS[number](pixels[..., 0])).astype(np.uint16) * 257)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        content = saved(turned, kind, exif=exif, **options)
        np.testing.assert_array_equal(np.asarray(decode(content)), pixels, err_msg=kind)
        once = ImageSource(lambda i, c=content: Image.open(io.BytesIO(c)), [0], ["a"], describe=str, fingerprint="f")
        twice = ImageSource(lambda i, s=once: s.read(i), [0], ["a"], describe=str, fingerprint="f")
        np.testing.assert_array_equal(np.asarray(twice.read(0)), pixels, err_msg=kind)  # not turned again
    np.testing.assert_array_equal(np.asarray(decode(saved(deep, "PNG", exif=exif)))[..., 0], pixels[..., 0])
    assert decode(saved(turned, "JPEG", exif=exif)).size == pixels.shape[1::-1]


@pytest.mark.parametrize("exif", [b"II*\0" + b"\xff" * 30, b"", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02"])
def test_damaged_exif_data_hides_no_image(exif):
    pixels = np.random.RandomState(0).randint(0, 256, (9, 12, 3)).astype(np.uint8)
    np.testing.assert_array_equal(
        np.asarray(decode(saved(Image.fromarray(pixels), "PNG", exif=b"Exif\0\0" + exif))), pixels
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.float32([[0, 1.3]]), "floats from 0 to 1.3"),
        (np.float32([[-0.5, 1]]), "floats from -0.5 to 1"),
        (np.float32([[0, 300]]), "floats from 0 to 300"),
        (np.float32([[0, np.nan]]), "floats from nan to nan"),
        (np.float32([[0, np.inf]]), "floats from 0 to inf"),
        (np.int32([[0, 70000]]), "32-bit integers from 0 to 70000"),
        (np.int32([[-1, 200]]), "32-bit integers from -1 to 200"),
    ],
)
def test_grey_without_a_known_white_is_refused_by_name(values, message, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.fromarray(values).save(tmp_path / name / "x.tif")
    files = sorted(tmp_path.rglob("*.tif"))
    source = ImageSource(lambda i: files[i], [0, 1], ["a", "b"], describe=lambda i: str(files[i]), fingerprint="f")
    with pytest.raises(DataError, match=rf"a/x\.tif: not a readable image \(ValueError: {message}"):
        source.read(0)


# --- files that are broken, foreign or too large ---------------------------------------------------------------------


def one_line(content, name="photo.png", **options):
    """The image of a file's bytes, or the one line that a source gives for it."""
    source = ImageSource(lambda i: content, [0], ["a"], describe=lambda i: name, fingerprint="f", **options)
    try:
        return source.read(0)
    except DataError as error:
        assert str(error).startswith(f"{name}: ") and len(str(error).splitlines()) == 1
        assert str(error).endswith("repair or remove it, or set data.on_error=skip")
        return str(error)


SAMPLE = np.add.outer(np.arange(24) * 5, np.arange(30) * 4).astype(np.uint8)
SAMPLES = {f"grey {k}": v for k, v in grey_files(SAMPLE).items()} | {
    f"colour {k}": v for k, v in colour_files(np.dstack([SAMPLE, SAMPLE // 16 * 16, SAMPLE % 4])).items()
}
SAMPLES["JPEG"] = saved(Image.fromarray(SAMPLE), "JPEG")
for _kind in ("AVIF", "DDS", "ICNS", "IM", "MSP", "SPIDER", "XBM", "ICO", "DIB", "BLP", "EPS"):
    _mode = {"MSP": "1", "XBM": "1", "SPIDER": "F", "BLP": "P"}.get(_kind, "RGB")
    SAMPLES[_kind] = saved(Image.fromarray(SAMPLE).convert(_mode), _kind)


def damage(content: bytes, seed: int) -> bytes:
    random = np.random.RandomState(seed)
    if seed % 3 == 0:
        return content[: random.randint(0, len(content))]
    damaged = bytearray(content)
    for _ in range(1 + seed % 4):
        near = min(len(damaged), 80) if seed % 3 == 1 else len(damaged)  # headers decide more than pixels
        damaged[random.randint(near)] = random.choice([0, 1, 127, 128, 255, random.randint(256)])
    return bytes(damaged)


def damaged_files_are_images_or_one_line(seeds):
    seen = {"image": 0, "line": 0}
    for name, content in SAMPLES.items():
        if name == "EPS":  # an external program reads it
            continue
        for seed in seeds:
            found = one_line(damage(content, seed), max_pixels=10**6)
            assert isinstance(found, str) or found.mode == "RGB"
            seen["line" if isinstance(found, str) else "image"] += 1
    assert min(seen.values()) > 20


def test_a_damaged_file_is_an_image_or_one_line():
    damaged_files_are_images_or_one_line(range(8))


@pytest.mark.slow
def test_damaged_files_are_images_or_one_line():
    damaged_files_are_images_or_one_line(range(8, 200))


ERRORS = (ValueError, struct.error, EOFError, zlib.error, OverflowError, MemoryError, AssertionError, SystemError)
ERRORS += (IndexError, RecursionError, OSError, SyntaxError)


@pytest.mark.parametrize("error", ERRORS)
def test_whatever_a_decoder_raises_names_the_file(error):
    def read(index):
        raise error("first line\nsecond")

    source = ImageSource(read, [0], ["a"], describe=lambda i: "photo.png", fingerprint="f")
    with pytest.raises(DataError, match=r"^photo\.png: not a readable image \(.*first line second.*on_error=skip$"):
        source.read(0)
    assert source.read_or_none(0) is None


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\0\0\0\x18ftypheic\0\0\0\0", None, 3, [1]],
)
def test_what_is_no_image_is_one_line(content):
    line = one_line(content)
    assert "not a readable image" in line
    assert ("SVG and HEIC" in line) == isinstance(content, bytes)


def broken_folder(root, count=40):
    """Class folders in which one file of ``bee`` raises a ValueError in PIL and one is larger than a megapixel."""
    random = np.random.RandomState(0)
    for split, number in (("train", count), ("val", 2)):
        for name in ("ant", "bee"):
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                Image.fromarray(random.randint(0, 256, (16, 20, 3)).astype(np.uint8)).save(
                    root / split / name / f"{i}.png"
                )
    (root / "train" / "bee" / "1.png").write_bytes(b"P5 4 x\n")
    Image.new("L", (1100, 1000)).save(root / "train" / "bee" / "2.png")
    with pytest.raises(ValueError):
        Image.open(root / "train" / "bee" / "1.png")
    return DataConfig(dataset="folder", root=root)


@pytest.mark.parametrize("memory_gib", [4, 0], ids=["memory", "workers"])
def test_any_error_obeys_on_error_in_threads_and_in_worker_processes(memory_gib, tmp_path, backbone):
    config, hardware = broken_folder(tmp_path), HardwareConfig(workers=2, memory_gib=memory_gib)

    def read_all(config):
        split = LoadedSplit(config, "train", hardware)
        images = split.images(Transforms(backbone.data_config))
        assert sum(len(labels) for _, labels in images.batches(np.arange(len(images)), images.labels, 4)) == len(images)
        return split

    with pytest.raises(DataError, match=r"bee/1\.png: not a readable image \(ValueError"):
        read_all(config)
    (tmp_path / "train" / "bee" / "1.png").unlink()
    assert read_all(config).skipped == []
    limited = config.model_copy(update={"max_pixels": 10**6})
    with pytest.raises(
        DataError, match=r"bee/2\.png: too large an image \(1100000 pixels, data\.max_pixels allows 1000000"
    ):
        read_all(limited)
    (tmp_path / "train" / "bee" / "1.png").write_bytes(b"P5 4 x\n")
    split = read_all(limited.model_copy(update={"on_error": "skip"}))
    assert [name[-9:] for name in split.skipped] == ["bee/1.png", "bee/2.png"]
    split = read_all(config.model_copy(update={"on_error": "skip"}))
    assert [name[-9:] for name in split.skipped] == ["bee/1.png"]


def test_prediction_reads_what_training_reads(tmp_path, backbone):
    transforms = Transforms(backbone.data_config)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {name.replace("/", " "): content for name, content in SAMPLES.items() if name != "EPS"}
    files["turned"] = saved(Image.fromarray(SAMPLE), "PNG", exif=exif)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        trained_on = torch.from_numpy(np.asarray(transforms.evaluate(one_line(content))))[None]
        assert torch.equal(read_image(tmp_path / name, transforms), transforms.normalize(trained_on)), name


# --- sizes -----------------------------------------------------------------------------------------------------------


def giant(width, height, kind):
    """A file of a few bytes that claims a huge size."""
    if kind == "PNG":
        head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        return (
            b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
        )
    if kind == "BMP":
        return b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    if kind == "PPM":
        return b"P6 %d %d 255\n" % (width, height)
    inner = giant(width, height, "PNG")  # an icon says nothing of the size of the PNG in it
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(inner), 22) + inner


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "ICO"])
@pytest.mark.parametrize("side", [14_000, 60_000], ids=["above the limit", "refused by PIL itself"])
def test_a_decompression_bomb_is_one_line_with_size_limit_and_key(kind, side):
    line = one_line(giant(side, side, kind))
    assert f"too large an image ({side * side} pixels, data.max_pixels allows {MAX_PIXELS})" in line


def test_the_limit_can_be_lowered_and_raised(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # PIL refuses above twice that
    content = saved(Image.new("L", (50, 60)), "PNG")
    assert "(3000 pixels, data.max_pixels allows 2999)" in one_line(content, max_pixels=2999)
    assert one_line(content, max_pixels=3000).size == (50, 60)
    opened = ImageSource(
        lambda i: Image.open(io.BytesIO(content)), [0], ["a"], describe=str, fingerprint="f", max_pixels=2999
    )
    with pytest.raises(DataError, match=r"3000 pixels, data\.max_pixels allows 2999"):
        opened.read(0)


def test_a_narrow_image_that_resizing_would_blow_up_is_refused(tmp_path, backbone):
    transforms = Transforms(backbone.data_config)
    Image.new("L", (3, 60_000)).save(tmp_path / "line.png")
    assert read_image(tmp_path / "line.png", Transforms({**backbone.data_config, "crop_mode": "squash"})).shape[0] == 1
    with pytest.raises(DataError, match=r"line\.png: 3 × 60000 pixels, .* more than max_pixels allows \(200000\)"):
        read_image(tmp_path / "line.png", transforms, 200_000)
    for size in ((3, 60), (60, 3), (17, 17)):
        step = transforms.evaluate.transforms[0]
        assert step(Image.new("RGB", size)).size == transforms.resized(size)


def test_a_tar_and_a_folder_decode_alike(tmp_path):
    import tarfile

    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "x.png").write_bytes(SAMPLES["grey 16 bits, PNG"])
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        tar.add(tmp_path / "train", arcname="")
    for source in (sources.folder(tmp_path / "train"), sources.folder(tmp_path / "train.tar")):
        np.testing.assert_array_equal(np.asarray(source.read(1))[..., 0], SAMPLE)


def test_an_animation_is_its_first_frame():
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    for kind, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        content = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert len(list(ImageSequence.Iterator(Image.open(io.BytesIO(content))))) == 3
        assert decode(content).getcolors() == [(48, (255, 0, 0))]
