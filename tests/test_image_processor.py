"""image_processor.py: the documented numbers bit for bit, the way back, and bad files."""

import io
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from synthetic import png

from processor import BatchFeature, ChameleonImageProcessor, load_image

SMALL = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
SIZES = [(64, 64), (37, 41), (100, 33), (33, 100), (1, 40), (3, 50), (1, 1), (512, 300), (601, 700)]
MODES = ["RGB", "L", "P", "RGBA", "LA", "CMYK", "I;16", "1", "PA", "I", "F", "YCbCr", "P+tRNS"]


def noise(width: int, height: int, channels: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def picture(mode: str, width: int, height: int, seed: int = 0) -> Image.Image:
    rgba = noise(width, height, 4, seed)
    if mode == "I;16":
        levels = rgba[:, :, 0].astype(np.uint16) * 3  # up to 765: more than 8 bits
        return Image.frombytes("I;16", (width, height), levels.tobytes())
    if mode == "RGBA":
        return Image.fromarray(rgba)
    if mode == "LA":
        return Image.merge("LA", Image.fromarray(rgba).split()[2:])
    if mode == "PA":
        return picture("LA", width, height, seed).convert("PA")
    rgb = Image.fromarray(rgba[:, :, :3])
    if mode == "P+tRNS":
        palette = rgb.quantize(16)
        palette.info["transparency"] = bytes(range(0, 256, 16))
        return palette
    return rgb.convert(mode)


def documented(image: Image.Image, edge: int = 512) -> np.ndarray:
    """The pipeline of transformers 4.43 to 4.57, written again: -> (3, edge, edge) float32."""
    if image.mode != "RGB":
        rgba = np.array(image.convert("RGBA"))
        if (rgba[..., 3] == 255).all():
            image = image.convert("RGB")
        else:
            a = (rgba[..., 3] / 255.0)[..., None]
            image = Image.fromarray(((1 - a) * 255 + a * rgba[..., :3]).astype("uint8"))
    w, h = image.size
    new = (edge, int(edge * h / w)) if w <= h else (int(edge * w / h), edge)
    x = np.array(image.resize(new, Image.LANCZOS))
    y0, x0 = (x.shape[0] - edge) // 2, (x.shape[1] - edge) // 2
    x = x[y0 : y0 + edge, x0 : x0 + edge]
    x = (x.astype(np.float64) * 0.0078).astype(np.float32)
    return ((x - np.float32(1)) / np.float32(1)).transpose(2, 0, 1)


@pytest.mark.parametrize("mode", MODES)
def test_pixels_equal_the_documented_pipeline_bit_for_bit(mode):
    for seed, (width, height) in enumerate(SIZES):
        image = picture(mode, width, height, seed)
        got = ChameleonImageProcessor(**SMALL)(image, return_tensors="np").pixel_values
        assert got.dtype == np.float32 and got.shape == (1, 3, 32, 32)
        assert np.array_equal(got[0], documented(image, 32)), (mode, width, height)


@given(st.sampled_from(MODES), st.integers(1, 150), st.integers(1, 150), st.integers(1, 48))
@settings(deadline=None, max_examples=150)
def test_any_size_and_any_edge_equal_the_documented_pipeline(mode, width, height, edge):
    image = picture(mode, width, height)
    processor = ChameleonImageProcessor(size=edge, crop_size=edge)
    got = processor(image, return_tensors="np").pixel_values[0]
    assert np.array_equal(got, documented(image, edge))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "I;16"])
@pytest.mark.parametrize("size", [(640, 480), (333, 777), (1, 99), (512, 512)])
def test_pixels_at_full_size_equal_the_documented_pipeline(mode, size):
    image = picture(mode, *size)
    got = ChameleonImageProcessor()(image, return_tensors="np").pixel_values[0]
    assert np.array_equal(got, documented(image))


@pytest.fixture(scope="module")
def oracle():
    from transformers.models.chameleon import image_processing_pil_chameleon as hf

    return hf.ChameleonImageProcessorPil(**SMALL)


@pytest.mark.parametrize("mode", [mode for mode in MODES if "A" not in mode and "+" not in mode])
def test_opaque_pictures_equal_transformers_5_bit_for_bit(mode, oracle):
    for seed, (width, height) in enumerate(SIZES):
        image = picture(mode, width, height, seed)
        want = oracle(image, return_tensors="np")["pixel_values"]
        got = ChameleonImageProcessor(**SMALL)(image, return_tensors="np")["pixel_values"]
        assert np.array_equal(got, want), (mode, width, height)


def test_transparent_pictures_are_at_most_one_level_away_from_transformers_5(oracle):
    plain = {"do_resize": False, "do_center_crop": False}
    image = picture("RGBA", 256, 256)
    want = oracle(image, return_tensors="np", **plain)["pixel_values"]
    got = ChameleonImageProcessor(**SMALL, **plain)(image, return_tensors="np").pixel_values
    levels = np.abs(got - want) / 0.0078
    assert 0 < levels.max() < 1.01


@pytest.mark.parametrize("options", [
    {"do_resize": False}, {"do_center_crop": False}, {"do_rescale": False}, {"do_normalize": False},
    {"size": {"height": 20, "width": 50}}, {"crop_size": {"height": 21, "width": 50}},
    {"resample": 3}, {"rescale_factor": 1 / 255}, {"image_mean": [0.1, 0.2, 0.3]},
    {"image_std": [0.5, 0.25, 2.0]}, {"do_rescale": False, "do_normalize": False},
    {"do_resize": False, "crop_size": {"height": 65, "width": 30}}, {"size": {"shortest_edge": 9}},
    {"image_mean": 0.5, "image_std": 0.5}, {"size": {"shortest_edge": 30, "longest_edge": 37}},
    {"size": {"shortest_edge": 30, "longest_edge": 90}},
])
def test_every_option_does_what_transformers_does(options, oracle):
    image = picture("RGB", 40, 61)
    want = oracle(image, return_tensors="np", **options)["pixel_values"]
    called = ChameleonImageProcessor(**SMALL)(image, return_tensors="np", **options).pixel_values
    built = ChameleonImageProcessor(**{**SMALL, **options})(image, return_tensors="np").pixel_values
    every = (ChameleonImageProcessor().to_dict() | SMALL | options).values()  # by position
    placed = ChameleonImageProcessor().preprocess(image, *every, return_tensors="np").pixel_values
    assert np.array_equal(placed, want)
    assert called.dtype == want.dtype and np.array_equal(called, want)
    assert np.array_equal(built, want)


@given(
    height=st.integers(1, 70), width=st.integers(1, 70), crop=st.tuples(*[st.integers(1, 70)] * 2)
)
@settings(deadline=None, max_examples=60)
def test_center_crop_pads_and_cuts_as_transformers_does(oracle, height, width, crop):
    image = picture("RGB", width, height)
    options = {"do_resize": False, "crop_size": {"height": crop[0], "width": crop[1]}}
    want = oracle(image, return_tensors="np", **options)["pixel_values"]
    got = ChameleonImageProcessor()(image, return_tensors="np", **options).pixel_values
    assert np.array_equal(got, want)


def test_arrays_and_tensors_of_either_layout_give_the_pixels_of_the_picture():
    processor = ChameleonImageProcessor(**SMALL)
    array = noise(50, 40, 3)
    want = processor(Image.fromarray(array), return_tensors="pt").pixel_values
    tensor = torch.from_numpy(array)
    for image in (array, array.transpose(2, 0, 1), tensor, tensor.permute(2, 0, 1),
                  array.astype(np.float32), array.astype(np.int64), tensor.to(torch.bfloat16)):
        assert torch.equal(processor(image, return_tensors="pt").pixel_values, want)
    low = noise(40, 4, 3)  # its height could be four channels
    assert torch.equal(processor(low, return_tensors="pt").pixel_values,
                       processor(Image.fromarray(low), return_tensors="pt").pixel_values)
    stack = torch.from_numpy(np.stack([255 - array, array]))
    assert torch.equal(processor(stack, return_tensors="pt").pixel_values[1:], want)
    stack = processor(np.stack([255 - array, array]), return_tensors="pt").pixel_values
    assert stack.shape == (2, 3, 32, 32)
    assert torch.equal(stack[1:], want) and not torch.equal(stack[:1], want)


def test_grey_and_transparent_arrays_give_the_pixels_of_the_picture():
    processor = ChameleonImageProcessor(**SMALL)
    grey, rgba = noise(50, 40, 1), noise(50, 40, 4)
    want = processor(Image.fromarray(grey[:, :, 0]), return_tensors="np").pixel_values
    for array in (grey, grey[:, :, 0], grey.transpose(2, 0, 1)):
        assert np.array_equal(processor(array, return_tensors="np").pixel_values, want)
    want = processor(Image.fromarray(rgba), return_tensors="np").pixel_values
    for array in (rgba, rgba.transpose(2, 0, 1)):
        assert np.array_equal(processor(array, return_tensors="np").pixel_values, want)


def test_an_array_of_true_and_false_is_white_and_black():
    mask = noise(50, 40, 1)[:, :, 0] > 99
    processor = ChameleonImageProcessor(**SMALL)
    want = processor(Image.fromarray(mask), return_tensors="np").pixel_values  # PIL's mode "1"
    assert np.array_equal(processor(mask, return_tensors="np").pixel_values, want)


def test_transparent_fractions_are_blended_on_white_as_levels_are():
    rgba = noise(40, 50, 4).transpose(2, 0, 1)
    options = {"do_resize": False, "do_center_crop": False}
    processor = ChameleonImageProcessor(**options)
    levels = processor(rgba, return_tensors="np", rescale_factor=1 / 255).pixel_values
    parts = processor(rgba / np.float32(255), return_tensors="np", do_rescale=False).pixel_values
    assert np.abs(levels - parts).max() < 1.01 / 255  # levels are whole, fractions are not


def test_fractions_equal_transformers_when_rescaling_is_off(oracle):
    fractions = np.random.default_rng(0).random((3, 40, 50), dtype=np.float32)
    want = oracle(fractions, return_tensors="np", do_rescale=False)["pixel_values"]
    processor = ChameleonImageProcessor(**SMALL)
    got = processor(fractions, return_tensors="np", do_rescale=False).pixel_values
    assert np.array_equal(got, want) and np.ptp(got) > 0.5
    with pytest.warns(UserWarning, match="rescale_factor=255"):
        processor(fractions, return_tensors="np")
    levels = processor((fractions * 255).astype(np.uint8), return_tensors="np").pixel_values
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parts = processor(fractions, return_tensors="np", rescale_factor=255 * 0.0078).pixel_values
    assert np.abs(levels - parts).max() < 0.01


def test_nested_lists_are_flattened_in_order_and_data_formats_are_kept():
    processor = ChameleonImageProcessor(**SMALL)
    images = [Image.new("RGB", (9, 7), (level, 0, 0)) for level in (0, 100, 200)]
    pixels = processor([images[:1], images[1:]], return_tensors="pt").pixel_values  # (3, 3, 32, 32)
    assert [round((p[0, 0, 0].item() + 1) / 0.0078) for p in pixels] == [0, 100, 200]
    last = processor(images, return_tensors="pt", data_format="channels_last").pixel_values
    assert torch.equal(last.permute(0, 3, 1, 2), pixels)
    own = processor(np.asarray(images[1]), data_format=None).pixel_values
    assert isinstance(own, list) and own[0].shape == (32, 32, 3)


def test_a_picture_one_or_three_pixels_high_is_not_taken_for_channels_first():
    for height in (1, 3):
        image = picture("RGB", 60, height)
        got = ChameleonImageProcessor(**SMALL)(image, return_tensors="np").pixel_values[0]
        assert np.array_equal(got, documented(image, 32))


def test_an_ambiguous_array_warns_and_input_data_format_settles_it():
    array = noise(60, 3, 3)
    processor = ChameleonImageProcessor(**SMALL)
    with pytest.warns(UserWarning, match="input_data_format"):
        first = processor(array, return_tensors="np").pixel_values
    last = processor(array, return_tensors="np", input_data_format="channels_last").pixel_values
    assert not np.array_equal(first, last)
    assert np.array_equal(last[0], documented(Image.fromarray(array), 32))


def test_postprocess_is_the_way_back_to_within_two_levels():
    image = picture("RGB", 32, 32)
    pixels = ChameleonImageProcessor(**SMALL)(image, return_tensors="pt").pixel_values
    back = ChameleonImageProcessor.postprocess(pixels)[0]
    difference = np.abs(np.asarray(back, dtype=int) - np.asarray(image, dtype=int))
    assert back.mode == "RGB" and back.size == (32, 32) and difference.max() <= 2


def test_postprocess_clamps_and_truncates():
    pixels = torch.tensor([-3.0, -1.0, 0.0, 0.999, 1.0, 3.0]).expand(1, 3, 1, 6)
    levels = np.asarray(ChameleonImageProcessor.postprocess(pixels)[0])[0, :, 0]
    assert levels.tolist() == [0, 0, 127, 254, 255, 255]
    pixels = torch.linspace(-1, 1, 30).expand(1, 3, 1, 30).bfloat16()  # the sums are fp32
    assert ChameleonImageProcessor.postprocess(pixels) == ChameleonImageProcessor.postprocess(
        pixels.float())
    with pytest.raises(ValueError, match="N, 3, H, W"):
        ChameleonImageProcessor.postprocess(pixels[0])
    with pytest.raises(ValueError, match="pixels hold inf or nan"):
        ChameleonImageProcessor.postprocess(pixels * torch.inf)


def test_options_survive_saving_and_transformers_reads_them(tmp_path):
    from transformers.models.chameleon import image_processing_pil_chameleon as hf

    options = {**SMALL, "resample": 3, "do_normalize": False, "rescale_factor": 0.5}
    processor = ChameleonImageProcessor(**options)
    processor.save_pretrained(tmp_path / "new")
    again = ChameleonImageProcessor.from_pretrained(tmp_path / "new")
    assert again.to_dict() == processor.to_dict()
    theirs = hf.ChameleonImageProcessorPil.from_pretrained(tmp_path / "new")
    assert dict(theirs.crop_size) == SMALL["crop_size"] and theirs.rescale_factor == 0.5
    theirs.save_pretrained(tmp_path / "theirs")
    again = ChameleonImageProcessor.from_pretrained(tmp_path / "theirs")
    assert again.to_dict() == processor.to_dict()


def test_options_inside_processor_config_json_are_read(tmp_path):
    (tmp_path / "processor_config.json").write_text(
        '{"image_processor": {"size": {"shortest_edge": 48}, "do_pad": null}, "image_token": "x"}'
    )
    assert ChameleonImageProcessor.from_pretrained(tmp_path).size == {"shortest_edge": 48}


def test_an_option_given_as_none_is_the_processors_own():
    processor = ChameleonImageProcessor(size=20, crop_size=None, do_center_crop=False)
    assert processor.crop_size == {"height": 512, "width": 512}
    pixels = processor(Image.new("RGB", (50, 40)), size=None, do_center_crop=None).pixel_values
    assert pixels[0].shape == (3, 20, 25)


def test_changing_one_processors_options_leaves_the_documented_defaults():
    processor = ChameleonImageProcessor()
    processor.size["shortest_edge"] = 5
    processor.to_dict()["crop_size"]["height"] = 6
    assert ChameleonImageProcessor().size == {"shortest_edge": 512}
    assert ChameleonImageProcessor().crop_size == {"height": 512, "width": 512}
    given = {"shortest_edge": 9}
    ChameleonImageProcessor(size=given).size["shortest_edge"] = 5
    assert given == {"shortest_edge": 9}


@pytest.mark.parametrize("options", [
    {"size": {"longest_edge": 5}}, {"size": {"shortest_edge": 0}}, {"size": "big"}, {"resample": 9},
    {"resample": 1.0},
    {"crop_size": {"height": 5}}, {"image_std": [1.0, 0.0, 1.0]}, {"rescale_factor": "a"},
    {"image_mean": ["a"]}, {"do_resize": "false"}, {"crop_size": {"height": 5.5, "width": 5}},
    {"resample": [1]}, {"image_mean": [1.0, 1.0]}, {"image_std": [1.0, 1.0]},
])
def test_an_impossible_option_is_a_one_line_error_that_names_it(options):
    with pytest.raises(ValueError, match=next(iter(options))) as error:
        ChameleonImageProcessor(**options)(Image.new("RGB", (600, 600)))
    assert "\n" not in str(error.value)


@given(height=st.integers(1, 70), width=st.integers(1, 70), edge=st.integers(1, 70),
       longest=st.integers(1, 200))
@settings(deadline=None, max_examples=60)
def test_the_longest_edge_is_that_of_transformers(height, width, edge, longest):
    from transformers.image_transforms import get_size_with_aspect_ratio

    processor = ChameleonImageProcessor(size={"shortest_edge": edge, "longest_edge": longest})
    want = get_size_with_aspect_ratio((height, width), edge, longest)
    if not all(want):
        with pytest.raises(ValueError, match="too long"):
            processor.resized_size(height, width)
    else:
        assert processor.resized_size(height, width) == want


def test_an_unknown_option_is_named():
    for call in (lambda: ChameleonImageProcessor(do_rezise=True),
                 lambda: ChameleonImageProcessor()(Image.new("RGB", (9, 9)), do_rezise=None)):
        with pytest.raises(TypeError, match="do_rezise"):
            call()


@pytest.mark.parametrize("bad", [
    "picture.png", 5, None, np.zeros((0, 5, 3), np.uint8), np.zeros((5, 5, 2), np.uint8),
    np.zeros((5,), np.uint8), np.full((9, 9, 3), 300.0), np.full((9, 9, 3), np.nan), [],
    np.full((9, 9, 3), 256.0), np.full((9, 9, 3), -1), np.array([["a"]]), Image.new("RGB", (0, 4)),
    Image.new("RGB", (1, 5000)),
])
def test_what_is_no_picture_is_a_one_line_error(bad):
    with pytest.raises(ValueError) as error:
        ChameleonImageProcessor()(bad, return_tensors="pt")
    assert "\n" not in str(error.value) and len(str(error.value)) > 20


@pytest.mark.parametrize("bad, options, message", [
    (np.zeros((9, 9, 6), np.uint8), dict(input_data_format="channels_last"), "6 channels are not"),
    (np.zeros((9, 9, 3)), dict(data_format="channel_first"), "data_format='channel_first'"),
    (np.full((9, 9, 3), np.nan), dict(do_resize=False), "hold inf or nan"),
])
def test_what_would_be_computed_wrongly_is_refused(bad, options, message):
    with pytest.raises(ValueError, match=message):
        ChameleonImageProcessor()(bad, **options)


def test_pictures_of_different_shapes_cannot_be_stacked():
    images = [Image.new("RGB", (40, 60)), Image.new("RGB", (40, 70))]
    processor = ChameleonImageProcessor(do_center_crop=False, size=32)
    assert len(processor(images).pixel_values) == 2
    with pytest.raises(ValueError, match="crop"):
        processor(images, return_tensors="pt")


# ------------------------------------------------------------------------------------ load_image


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.png"
    picture("RGB", 300, 200).save(path)
    return path


def test_load_image_reads_the_whole_picture(good):
    image = load_image(good)
    good.unlink()  # nothing is left to be read later
    assert image.size == (300, 200)
    assert np.array_equal(np.asarray(image), np.asarray(picture("RGB", 300, 200)))


@pytest.mark.parametrize("name, content, message", [
    ("text.png", b"I am a text file\n" * 9, "not a picture"),
    ("empty.png", b"", "not a picture"),
    ("bomb.png", png(20000, 20000), "too large"),
    ("large.png", png(10000, 10000), "too large"),
    ("zero.png", png(0, 5), "picture"),
])
def test_a_file_that_is_no_whole_picture_is_a_one_line_error(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_image(path)
    assert "\n" not in str(error.value) and name in str(error.value)


@pytest.mark.parametrize("kind", ["float32", "int32"])
def test_a_file_with_pixels_of_no_known_range_is_a_one_line_error(tmp_path, kind):
    Image.fromarray(np.arange(12).reshape(3, 4).astype(kind) * 10**6).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="has pixels of 32 bits: save it with 8 or 16"):
        load_image(tmp_path / "a.tif")


def test_a_tiff_of_32_bits_is_never_taken_for_one_of_16(tmp_path):
    Image.fromarray(np.arange(256, dtype=np.int32).reshape(16, 16)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="has pixels of 32 bits"):
        load_image(tmp_path / "a.tif")


def test_a_missing_file_a_folder_and_an_impossible_name_are_one_line_errors(tmp_path):
    for path, message in ((tmp_path / "none.png", "No such file"), (tmp_path, "directory"),
                          ("a\0b", "broken"), ("", "No such file|broken"),
                          ("iVBORw0KGgo" * 9999, "cannot be read|broken")):  # a base64 text
        with pytest.raises(ValueError, match=message) as error:
            load_image(path)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_file_is_seen_as_a_viewer_shows_it(tmp_path):
    """Upright, and 16-bit grey scaled: a PIL picture is not. Both may have a transparent colour."""
    path, small = tmp_path / "a.png", {"do_resize": False, "do_center_crop": False}
    rgb = np.array([[[255, 0, 0], [0, 255, 0]]], np.uint8)  # red, green

    def seen(image):
        pixels = ChameleonImageProcessor(**small)(image, data_format="channels_last").pixel_values
        return np.rint((pixels[0] + 1) / 0.0078).astype(int).tolist()

    exif = Image.Exif()
    exif[0x112] = 6  # to be turned by 90 degrees
    Image.fromarray(rgb).save(path, exif=exif)
    assert seen(path) == [[[255, 0, 0]], [[0, 255, 0]]] and seen(Image.open(path)) == rgb.tolist()
    Image.fromarray(rgb).save(path, transparency=(255, 0, 0))
    white = [[[255, 255, 255], [0, 255, 0]]]
    assert seen(path) == seen(Image.open(path)) == white
    deep = Image.fromarray(np.array([[0, 129, 51400, 65535]], np.uint16))
    for name in ("a.png", "a.ppm"):
        deep.save(tmp_path / name)
        assert seen(tmp_path / name) == [[[0] * 3, [1] * 3, [200] * 3, [255] * 3]]
    deep.save(path)
    assert seen(Image.open(path)) == [[[0] * 3, [129] * 3, [255] * 3, [255] * 3]]
    deep.save(path, transparency=51400)
    assert seen(path)[0][2] == [255] * 3


def test_levels_with_transparency_may_be_floats():
    levels = np.full((4, 4, 4), 200, np.uint8)
    seen = [ChameleonImageProcessor(do_resize=False, do_center_crop=False)(
        levels.astype(kind), return_tensors="pt").pixel_values for kind in (np.uint8, np.float32)]
    torch.testing.assert_close(*seen, atol=0.0078, rtol=0)  # a level: the blend is truncated


def test_a_picture_with_broken_exif_data_is_shown(tmp_path):
    picture("RGB", 30, 20).save(tmp_path / "a.png", exif=b"Exif\0\0junkjunk")
    assert load_image(tmp_path / "a.png").size == (30, 20)


@pytest.mark.parametrize("name", ["http://a/b.png", Path("folder") / "https://a/b.png"])
def test_an_address_is_named_as_one(name):
    with pytest.raises(ValueError, match="nothing is fetched"):
        load_image(name)


def test_a_large_photograph_is_read_at_half_its_size(tmp_path, monkeypatch):
    picture("RGB", 640, 480).save(tmp_path / "a.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200_000)
    assert load_image(tmp_path / "a.jpg").size == (320, 240)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # PIL's way to say: no limit
    assert load_image(tmp_path / "a.jpg").size == (640, 480)


MEMORY = """
import resource, sys
from PIL import Image
from processor import ChameleonImageProcessor
Image.new(sys.argv[1], (6000, 6000)).save(sys.argv[2], compress_level=1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
ChameleonImageProcessor()(sys.argv[2])
print((peak() - before) / 6000**2)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts otherwise")
@pytest.mark.parametrize("mode", ["1", "RGBA"])
def test_a_large_picture_takes_twelve_bytes_a_pixel(tmp_path, mode):
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", MEMORY, mode, str(tmp_path / "a.png")], cwd=root,
                          capture_output=True, text=True)
    assert float(done.stdout) <= 12, done.stderr


def test_a_closed_picture_is_a_one_line_error(good):
    image = Image.open(good)
    image.close()
    with pytest.raises(ValueError, match="closed or broken"):
        ChameleonImageProcessor()(image)


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm"])
def test_a_file_cut_short_anywhere_is_a_picture_or_a_one_line_error(tmp_path, kind):
    buffer = io.BytesIO()
    picture("RGB", 40, 30).save(buffer, kind)
    content, path, errors = buffer.getvalue(), tmp_path / f"cut.{kind}", 0
    for end in np.linspace(0, len(content) - 1, 40).astype(int):
        path.write_bytes(content[:end])
        try:
            assert load_image(path).size == (40, 30)
        except ValueError as error:
            errors += 1
            assert "\n" not in str(error)
    assert errors > 20


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_a_file_with_broken_bytes_is_a_picture_or_a_value_error(tmp_path_factory, data):
    kind = data.draw(st.sampled_from(["png", "jpeg", "gif", "tiff", "webp"]))
    buffer = io.BytesIO()
    picture("RGB", 24, 24).save(buffer, kind)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "flipped"
    path.write_bytes(content)
    try:
        load_image(path)
    except ValueError as error:
        assert "\n" not in str(error)


# ---------------------------------------------------------------------------------- BatchFeature


def test_to_casts_floats_only_and_takes_what_tensors_take():
    def batch():
        return BatchFeature(pixel_values=torch.ones(1, 3, 2, 2), input_ids=torch.tensor([[8711]]))

    for moved in (batch().to(torch.bfloat16), batch().to("cpu", torch.bfloat16),
                  batch().to(torch.bfloat16, "cpu"),
                  batch().to("cpu", dtype=torch.bfloat16, non_blocking=True),
                  batch().to(dtype=torch.bfloat16)):
        assert moved["pixel_values"].dtype == torch.bfloat16
        assert moved.input_ids.dtype == torch.int64 and moved.input_ids.item() == 8711
    assert batch().to("meta").pixel_values.device.type == "meta"
    assert sorted({**batch()}) == ["input_ids", "pixel_values"]
    with pytest.raises(AttributeError, match="labels"):
        batch().labels  # noqa: B018
