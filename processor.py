"""What goes into the model: prompts become ids, and pictures become pixels; and the way back.

    "What is this?<image>"                               picture file
              |                                                |  load_image
              |  ChameleonProcessor                       PIL picture
              |                                                |  ChameleonImageProcessor
    input_ids (B, T), attention_mask (B, T)          pixel_values (N, 3, H, W)

    ids of this prompt:   <s> What is this ? <racm3:break> <image> x S <eoss> <reserved08706>
    with its answer:      the same, then  A star . </s>; labels (B, T) are -100 before the answer

    pixels of a picture:  RGB, transparency on white    (H, W, 3) uint8
                          shortest edge to 512          (512, W', 3) or (H', 512, 3)
                          centre crop                   (512, 512, 3)
                          level * 0.0078 - 1            (512, 512, 3) float32, -1 to 0.989
                          channels first, stacked       (N, 3, 512, 512)

    and back:             pixels (N, 3, H, W) of the VQ-VAE --postprocess--> N PIL pictures

Letter, word   meaning
B, T           prompts in a batch; ids in a row
N, S           pictures of all prompts; codes per picture, one <image> each
H, W           height and width of a picture. Arrays are (H, W), PIL's sizes are (W, H)
C              channels: 1 grey, 3 RGB, 4 RGBA
level          what a picture file holds: uint8, 0..255
pixel          what the VQ-VAE takes and gives: float, about [-1, 1]

What differs from the processors of most models
- The S <image> ids only hold the place. The model replaces them by the picture's ids.
- A prompt for a chat ends with the end-of-turn id, a text to be completed does not.
- The factor is 0.0078 as in transformers, not 2 / 255 = 0.00784, so white is 0.989. Meta trained
  with level / 255 * 2 - 1, which rescale_factor=2 / 255 gives.
- Except at DIFFERS, all numbers equal those of transformers 4.43 to 4.57, bit for bit.
- The EXIF orientation of a PIL picture is ignored, and 16-bit levels above 255 are clipped, as in
  Meta's code and in transformers. `load_image`, for files, turns the picture and scales the levels.

Sources: https://arxiv.org/abs/2405.09818, section 2.1 (a 512 x 512 picture becomes 1024 codes);
the documentation of transformers' ChameleonImageProcessor and ChameleonProcessor.
"""

import copy
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, TypeGuard

import numpy as np
import torch
from PIL import Image, ImageOps

from tokenizer import (
    IGNORE,
    AutoTokenizer,
    BatchFeature,
    Tokenizer,
    fixed,
    read_json,
    stack,
    write_json,
)
from vqvae import Flag, check_fields, real, whole

Loaded = Image.Image | np.ndarray | torch.Tensor
Picture = Loaded | str | Path  # the last two: a file
Pictures = Picture | list  # one picture, a stack (N, ...), or nested lists of both


# ---------------------------------------------------------------------------------------------
# One picture, step by step


def load_image(path: str | Path) -> Image.Image:
    """A picture file -> PIL picture in memory; of an animation, the first frame.

    DIFFERS: the picture is what a viewer shows. Meta's code ignores EXIF orientation, which
    transformers applies to a file, too. Both clip 16-bit grey to white.

    ValueError, in one line, if the file is missing, damaged, too large or no picture, or if its
    pixels have 32 bits.
    """
    named = f"picture {str(path)!r:.300}"
    if re.search(r"(^|/)\w\w+:/", str(path)):  # a URL; Path turns its // into /
        raise ValueError(f"{named} is an address, and nothing is fetched from the network: "
                         "download it and name the file")
    if os.path.exists(path) and not os.path.isfile(path):  # to open a pipe may wait for ever
        raise ValueError(f"{named} is a directory, a pipe or a device: name a file")
    if os.path.isfile(path) and str(path).lower().endswith((".heic", ".heif")):
        try:
            from pillow_heif import register_heif_opener  # type: ignore[import-not-found]
        except ImportError:
            raise ValueError(f"{named} is HEIC: pip install pillow-heif, or save it as JPEG"
                             ) from None
        register_heif_opener()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about EXIF data, and sizes that are checked below
            with Image.open(path) as image:
                limit = Image.MAX_IMAGE_PIXELS or math.inf
                if math.prod(image.size) > limit:  # a JPEG can be read at half its size
                    image.draft(None, (image.width // 2, image.height // 2))
                if math.prod(image.size) > limit:
                    raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
                image.load()  # open() reads only the header; a truncated file fails here
                image = as_shown(image)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{named} is too large ({error}): save it with at most 4000 pixels "
                         "a side") from None
    except OSError as error:  # includes PIL's UnidentifiedImageError
        reason = error.strerror or "not a picture, or one cut short"
        raise ValueError(f"{named} cannot be read: {reason}") from None
    except Exception as error:  # on broken files PIL raises SyntaxError, struct.error, ...
        raise ValueError(f"{named} is broken: {type(error).__name__}") from None
    if image.mode == "F" or image.mode[0] == "I":  # no viewer agrees with another on their range
        raise ValueError(f"{named} has pixels of 32 bits: save it with 8 or 16")
    return image


def as_shown(image: Image.Image) -> Image.Image:
    """A loaded picture file -> PIL picture: upright, 16-bit grey as 8-bit, with transparency."""
    with suppress(Exception):  # broken EXIF data raises errors of many kinds: it is ignored
        ImageOps.exif_transpose(image, in_place=True)
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if deep and np.asarray(image).max() < 2**16:  # grey, 16 bits
        clear = image.info.pop("transparency", None)
        # level = value / 257, rounded
        image = image.convert("I").point(lambda value: value / 257 + 0.5).convert("L")
        image.info |= {} if clear is None else {"transparency": round(clear / 257)}
    return image.convert("RGBA") if "transparency" in image.info else image


def opened(image: Picture) -> Loaded:
    """Reads a file, or what a PIL picture has not read yet. ValueError if it cannot be read."""
    if isinstance(image, (str, Path)):
        return load_image(image)
    if isinstance(image, Image.Image):
        try:
            image.load()
        except Exception as error:  # of many kinds, some without text
            raise ValueError("a PIL picture is closed or broken: pass its file's name, or call "
                             f"load() before it is closed ({type(error).__name__})") from None
    return image


def flat_pictures(images: Pictures) -> list[Picture]:
    """One picture, a stack (N, ...) or nested lists of both -> flat list, or ValueError."""
    if isinstance(images, (list, tuple)):
        return [picture for item in images for picture in flat_pictures(item)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    if isinstance(images, Picture):
        return [images]
    raise ValueError(f"a picture must be PIL, numpy, torch or a file's path, not "
                     f"{type(images).__name__}")


def guess_layout(shape: tuple[int, int, int]) -> str:
    """Shape -> layout: the axis of size 1 or 3, else of size 4, is C. The first axis wins a tie."""
    first, last = shape[0] in (1, 3), shape[2] in (1, 3)
    if first and last:
        warnings.warn(f"channels of {shape} taken first: pass input_data_format", stacklevel=4)
    if first or (shape[0] == 4 and not last):
        return "channels_first"
    if last or shape[2] == 4:
        return "channels_last"
    raise ValueError(f"a picture of shape {shape} has no axis of 1, 3 or 4 channels")


def to_array(image: Loaded, layout: str | None = None, rgb: bool = False
             ) -> tuple[np.ndarray, str]:
    """One picture -> array (H, W, C), and the layout it had: "channels_first" or "channels_last".

    With `rgb`, a PIL picture of another mode becomes RGB. DIFFERS: transformers 4 guesses one
    layout for all pictures from the shape of the first, and a PIL picture one pixel high counts as
    channels first. Here each picture has its own layout, and PIL pictures are always channels last.
    ValueError if it is no picture.
    """
    if isinstance(image, Image.Image):
        other = image.mode != "RGB" or "transparency" in image.info
        array = rgb_levels(image) if rgb and other else np.asarray(image)
        layout = "channels_last"
    elif isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        array = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
    else:
        array = image
    if array.ndim == 2:
        array, layout = array[:, :, None], "channels_last"  # (H, W, 1)
    if array.ndim != 3 or not array.size or array.dtype.kind not in "buif":
        raise ValueError(f"a picture must be numbers of shape (H, W), (H, W, C) or (C, H, W), got "
                         f"{array.dtype} {array.shape}")
    layout = layout or guess_layout(array.shape)
    if layout == "channels_first":
        array = array.transpose(1, 2, 0)  # (H, W, C)
    return (array.astype(np.uint8) * 255 if array.dtype == bool else array), layout


def strips(height: int, width: int) -> list[slice]:
    """Slices of about 2^18 pixels: a whole photograph in float64 would take gigabytes."""
    step = max(1, 2**18 // max(1, width))
    return [slice(top, min(top + step, height)) for top in range(0, height, step)]


def on_white(array: np.ndarray) -> np.ndarray:
    """(H, W, C), where C is 1, 3 or 4 -> (H, W, 3): repeats grey, blends transparency on white.

    DIFFERS: transformers 5 uses PIL's alpha_composite, which is up to one level off this rule.
    """
    if array.shape[2] == 3:
        return array
    if array.shape[2] == 1:
        return np.repeat(array, 3, axis=2)  # (H, W, 3)
    if array.shape[2] != 4:
        raise ValueError(f"{array.shape[2]} channels are not grey, RGB or RGBA")
    white = 1.0 if array.dtype.kind == "f" and array.max() <= 1 else 255
    blended = np.empty((*array.shape[:2], 3), array.dtype)
    for rows in strips(*array.shape[:2]):
        rgb, alpha = array[rows, :, :3], array[rows, :, 3:] / white  # (h, W, 3), (h, W, 1)
        # out = (1 - alpha) * white + alpha * rgb; where levels are integers, truncated
        blended[rows] = (1 - alpha) * white + alpha * rgb
    return blended


def rgb_levels(image: Image.Image) -> np.ndarray:
    """A PIL picture of any mode -> (H, W, 3) uint8, transparency on white."""
    levels = np.empty((image.height, image.width, 3), np.uint8)
    for rows in strips(image.height, image.width):
        strip = image.crop((0, rows.start, image.width, rows.stop))
        levels[rows] = on_white(np.asarray(strip.convert("RGBA")))  # a palette may have alpha
    return levels


def to_levels(array: np.ndarray) -> tuple[np.ndarray, bool]:
    """Levels, or fractions 0..1 -> uint8 levels, and True for fractions. ValueError for others.
    Floats that are all 0 or 1 count as levels, as in transformers.
    """
    if array.dtype == np.uint8:
        return array, False
    low, high = float(array.min()), float(array.max())
    if np.isfinite(high - low) and low >= 0:
        if high <= 255 and np.allclose(array, np.trunc(array)):
            return array.astype(np.uint8), False
        if high <= 1:
            return (array.astype(np.float64) * 255).astype(np.float32).astype(np.uint8), True
    raise ValueError(f"levels must be whole 0..255 or fractions 0..1, these are {low:g}..{high:g}")


def center_crop(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, C) -> (height, width, C), cut at (H - height) // 2. Zeros fill a smaller picture."""
    top, left = (array.shape[0] - height) // 2, (array.shape[1] - width) // 2
    cut = array[max(top, 0) :, max(left, 0) :][:height, :width]
    crop = np.zeros((height, width, array.shape[2]), array.dtype)  # (height, width, C)
    crop[max(-top, 0) :, max(-left, 0) :][: cut.shape[0], : cut.shape[1]] = cut
    return crop


# ---------------------------------------------------------------------------------------------
# All steps: pictures -> pixel_values, and back. First, types of options, as in vqvae.py


def sides(*keys: set[str]) -> Callable[[object], bool]:
    return lambda v: isinstance(v, dict) and set(v) in keys and all(map(whole(1, 4096), v.values()))


def are_numbers(v: Any) -> bool:
    """Is v a number, or a list of them, each from -1e9 to 1e9?"""
    return all(map(real(-1e9, 1e9), v if isinstance(v, list) else [v]))


Edges = Annotated[Any, "shortest_edge, both edges, or height and width, 1 to 4096", sides(
    {"shortest_edge"}, {"shortest_edge", "longest_edge"}, {"height", "width"})]
Sides = Annotated[Any, "height and width, 1 to 4096", sides({"height", "width"})]
Filter = Annotated[int, "a filter of PIL, 0 to 5 (1 is Lanczos)", lambda x: type(x) in (
    int, Image.Resampling) and x in list(Image.Resampling)]
Factor = Annotated[float, "a finite number", real(-1e9, 1e9)]
Means = Annotated[Any, "finite numbers", are_numbers]
Divisors = Annotated[Any, "finite numbers other than 0",
                     lambda v: are_numbers(v) and np.all(np.abs(v) >= 1e-9)]


@dataclass(eq=False)
class ChameleonImageProcessor:
    """Pictures -> pixel_values, and back: transformers' class of that name, with its options.

    None means the default. A call may override the options of the constructor. TypeError for an
    unknown option, ValueError for an impossible value.
    """

    do_resize: Flag = True
    # An int is the shortest edge. Or {shortest_edge, longest_edge: a limit}, or {height, width}.
    size: Edges = 512
    resample: Filter = 1  # the filter's number in PIL: Lanczos
    do_center_crop: Flag = True
    crop_size: Sides = 512  # an int is both sides. Or {height, width}
    do_rescale: Flag = True
    rescale_factor: Factor = 0.0078
    do_normalize: Flag = True
    image_mean: Means = (1.0, 1.0, 1.0)  # or one number for all channels
    image_std: Divisors = (1.0, 1.0, 1.0)
    do_convert_rgb: Flag = True
    # Without a limit, a picture of 1 x 100,000 would be resized to 79 GB before the crop.
    MAX_RESIZED_PIXELS = 2**26

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            value = f.default if value is None else value
            if isinstance(value, (np.ndarray, np.number)):
                value = value.tolist()
            setattr(self, f.name, list(value) if isinstance(value, tuple) else copy.deepcopy(value))
        if type(self.size) is int:
            self.size = {"shortest_edge": self.size}
        if type(self.crop_size) is int:
            self.crop_size = {"height": self.crop_size, "width": self.crop_size}
        check_fields(self)

    def preprocess(self, images: Pictures, *values, return_tensors: str | None = None,
                   data_format: str | None = "channels_first",
                   input_data_format: str | None = None, **options) -> BatchFeature:
        """Pictures -> {"pixel_values": (N, 3, H, W)}: a tensor ("pt"), array ("np") or list (None).

        A picture is a PIL image, a file, or an array or tensor (H, W), (H, W, C) or (C, H, W). It
        holds levels 0..255. (Fractions 0..1 need rescale_factor=255 * 0.0078.) data_format:
        "channels_first", "channels_last", or None for the layout of the input. ValueError for
        anything else.
        """
        given = signature(ChameleonImageProcessor).bind_partial(*values, **options).arguments
        settings = replace(self, **{name: v for name, v in given.items() if v is not None})
        for name, value in ("data_format", data_format), ("input_data_format", input_data_format):
            if value not in ("channels_first", "channels_last", None):
                raise ValueError(f"{name}={value!r}: channels_first, channels_last or None")
        arrays = []
        for image in flat_pictures(images):
            array, layout = to_array(opened(image), input_data_format, settings.do_convert_rgb)
            array = settings.prepare(array)  # (H', W', C)
            first = (data_format or layout) == "channels_first"
            arrays.append(array.transpose(2, 0, 1) if first else array)
        return BatchFeature(pixel_values=stack(arrays, return_tensors))  # (N, C, H', W')

    __call__ = preprocess

    def prepare(self, array: np.ndarray) -> np.ndarray:
        """(H, W, C) levels -> (H', W', C) float32 pixels, by the steps at the top of this file."""
        if self.do_convert_rgb:
            array = on_white(array)  # (H, W, 3)
        if self.do_resize:
            array = self.resize(array)  # (H', W', C)
        if self.do_center_crop:
            array = center_crop(array, **self.crop_size)  # (height, width, C)
        if self.do_rescale:
            fractions = array.dtype.kind == "f" and array.min() >= 0 and array.max() <= 1
            if fractions and abs(self.rescale_factor) < 1:
                warnings.warn("a picture's values lie in 0..1: pass rescale_factor=255 * 0.0078, "
                              "or levels 0..255", stacklevel=3)
            # In float64, rounded once, as in transformers. In float32 some last bits would differ.
            array = (array.astype(np.float64) * self.rescale_factor).astype(np.float32)
        if self.do_normalize:
            mean, std = (np.asarray(v, np.float32) for v in (self.image_mean, self.image_std))
            if mean.size not in (1, array.shape[2]) or std.size not in (1, array.shape[2]):
                raise ValueError(f"image_mean and image_std must fit {array.shape[2]} channel(s)")
            # pixel = (level * rescale_factor - mean) / std = level * 0.0078 - 1
            array = (array.astype(np.float32) - mean) / std
        if not np.isfinite(array).all():
            raise ValueError("the pixels of a picture hold inf or nan: check the array, image_mean "
                             "and image_std")
        return array

    def resize(self, array: np.ndarray) -> np.ndarray:
        """(H, W, C) -> (H', W', C). PIL resizes levels only: fractions become levels and back."""
        levels, fractions = to_levels(array)
        height, width = self.resized_size(*levels.shape[:2])
        image = Image.fromarray(levels[:, :, 0] if levels.shape[2] == 1 else levels)
        resized = np.asarray(image.resize((width, height), self.resample))
        resized = resized.reshape(height, width, -1)  # (H', W', C), also for one channel
        if fractions:
            return (resized.astype(np.float64) * (1 / 255)).astype(np.float32)
        return resized

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """(H, W) of a picture -> (H', W'), the shorter one equal to size["shortest_edge"], or less
        if the longer one would exceed size["longest_edge"] (as in transformers 5; 4 ignores it).
        """
        if "height" in self.size:
            return self.size["height"], self.size["width"]
        short, long = sorted((height, width))
        longest = self.size.get("longest_edge", math.inf)
        exact = min(self.size["shortest_edge"], longest * short / long)  # the new shorter edge
        edge = round(exact)
        # DIFFERS: Meta's code rounds the long edge; transformers, and so this line, truncates it.
        long = long if edge == short else int(exact * long / short)
        if not 0 < edge * long <= self.MAX_RESIZED_PIXELS:
            raise ValueError(f"a picture of {width} x {height} pixels is too long: crop it first")
        return (edge, long) if height < width else (long, edge)

    @staticmethod
    def postprocess(pixel_values: torch.Tensor) -> list[Image.Image]:
        """Pixels (N, 3, H, W), about [-1, 1] -> N PIL pictures. ValueError for another shape."""
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(f"pixels must be (N, 3, H, W), got {tuple(pixel_values.shape)}")
        if not pixel_values.isfinite().all():
            raise ValueError("pixels hold inf or nan: the weights of the VQ-VAE's decoder are "
                             "damaged (download them again)")
        # level = trunc((clamp(pixel, -1, 1) + 1) / 2 * 255)
        levels = (pixel_values.detach().float().clamp(-1, 1) + 1) / 2 * 255
        levels = levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()  # (N, H, W, 3)
        return [Image.fromarray(image) for image in levels.numpy()]

    def to_dict(self) -> dict:
        """All options: ChameleonImageProcessor(**processor.to_dict()) is a copy."""
        return copy.deepcopy(vars(self))

    @classmethod
    def from_dict(cls, values: dict, **changes) -> "ChameleonImageProcessor":
        """What `to_dict` gives -> a processor. Other keys, as image_processor_type, are ignored."""
        return cls(**{name: value for name, value in values.items()
                      if name in cls.__dataclass_fields__} | changes)

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, save_directory: str | Path) -> list[str]:
        """Writes preprocessor_config.json, which transformers reads, too -> its path, in a list."""
        file = Path(save_directory) / "preprocessor_config.json"
        joint = Path(save_directory) / "processor_config.json"  # transformers 5 reads it first
        write_json(file, {**self.to_dict(), "image_processor_type": "ChameleonImageProcessor"})
        if joint.is_file() and "image_processor" in (data := read_json(joint)):
            write_json(joint, {name: data[name] for name in data if name != "image_processor"})
        return [str(file)]

    @classmethod
    def from_pretrained(cls, folder: str | Path, **changes) -> "ChameleonImageProcessor":
        """Reads transformers 5's processor_config.json, else preprocessor_config.json."""
        from chameleon_extras.files import HUB_OPTIONS, find_folder  # as in ChameleonProcessor

        hub = {name: changes.pop(name) for name in HUB_OPTIONS if name in changes}
        folder = find_folder(folder, False, **hub)
        file = Path(folder) / "processor_config.json"
        data = read_json(file).get("image_processor") if file.is_file() else None
        if data is None and (file := Path(folder) / "preprocessor_config.json").is_file():
            data = read_json(file)
        if not isinstance(data, dict):
            raise ValueError(f"{folder}: no preprocessor_config.json in it "
                             f"(ChameleonImageProcessor().save_pretrained(folder) writes one)")
        try:
            return cls.from_dict(data, **changes)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None


# ---------------------------------------------------------------------------------------------
# Prompts: text with pictures in it -> input_ids


def is_text(value: object) -> TypeGuard[str | list[str]]:
    """Is it a string, or a list of one or more strings and nothing else?"""
    items = value if isinstance(value, (list, tuple)) else [value]
    return len(items) > 0 and all(isinstance(item, str) for item in items)


def parts_of(turn: dict) -> list[str | Picture]:
    """A message -> its texts and pictures in order. ValueError if it is no message."""
    content = turn.get("content") if isinstance(turn, dict) else None
    if isinstance(content, str):
        return [content]
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"a message is {{'role': ..., 'content': ...}}, not {turn!r:.80}")
    parts = []
    for part in content:
        given = part if isinstance(part, dict) else {}
        pictures = [given[name] for name in ("image", "path", "url") if given.get(name) is not None]
        if given.get("type") == "text" and isinstance(given.get("text"), str):
            parts.append(given["text"])
        elif given.get("type") == "image" and pictures:
            parts += map(opened, flat_pictures(pictures[0]))  # a file's name would pass for text
        else:
            raise ValueError("a part of a message is {'type': 'text', 'text': ...} or {'type': "
                             f"'image', 'image': ...}}, not {part!r:.80}")
    return parts


IMAGE_OPTIONS = {*ChameleonImageProcessor.__dataclass_fields__, "data_format", "input_data_format"}


class ChameleonProcessor:
    """Prompts and their pictures -> the model's arguments: transformers' class of that name.

    image_seq_length: S, the codes per picture (vqvae.py explains 1024). image_token: the text that
    marks the place of a picture in a prompt. ValueError if S is below 1 or the text is empty.
    """

    model_input_names = ["input_ids", "attention_mask", "pixel_values"]
    MAX_CODES = 2**16  # of a picture: more would exhaust the memory
    chat_template = fixed("chat_template", None)  # `apply_chat_template` has one form

    def __init__(self, image_processor: ChameleonImageProcessor, tokenizer: Tokenizer,
                 image_seq_length: int = 1024, image_token: str = "<image>") -> None:
        if type(image_seq_length) is not int or not 0 < image_seq_length <= self.MAX_CODES:
            raise ValueError(f"image_seq_length={image_seq_length!r:.80}: want a whole number from "
                             f"1 to {self.MAX_CODES}")
        if not isinstance(image_token, str) or not image_token:
            raise ValueError(f"image_token={image_token!r:.80}: want the text that marks a picture")
        if not (isinstance(tokenizer, Tokenizer) and hasattr(image_processor, "preprocess")):
            raise ValueError("a ChameleonProcessor takes a ChameleonImageProcessor and a tokenizer "
                             "that AutoTokenizer of this project has read, in this order")
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.image_seq_length, self.image_token = image_seq_length, image_token
        self.image_token_id = tokenizer.image_token_id

    def __call__(self, *inputs, text: str | list[str] | None = None,
                 images: Pictures | None = None, answers: str | list[str] | None = None,
                 return_for_text_completion: bool = False, return_tensors: str | None = "pt",
                 add_special_tokens: bool = True, **options) -> BatchFeature:
        """-> input_ids (B, T), attention_mask (B, T) and, with pictures, pixel_values (N, 3, H, W).

        text and images may be positional, in either order: transformers changed it in 4.46.
        images: a flat list for all prompts in order, or one list per prompt.
        return_for_text_completion: without the end-of-turn id. add_special_tokens: with <s>.
        answers: one for each prompt, to learn from. Each row ends with its answer and </s>, and
        labels (B, T) are -100 on prompts and padding. Pictures of an answer follow those of its
        prompt; their labels are <image>, which the model replaces by their ids if it is called with
        mask_image_logits=False.
        options: those of `Tokenizer.batch`, such as padding=True, and of ChameleonImageProcessor.
        ValueError for an empty prompt, a wrong number of pictures, unequal lengths without padding,
        or a max_length inside a picture.
        """
        for value in inputs:
            if text is None and is_text(value):
                text = value
            elif images is None:
                images = value
            else:
                raise TypeError("more than one text, or more than one value for images")
        if not is_text(text):
            raise ValueError("the prompt is missing: text must be a string or a list of strings"
                             + (", but these are ids already: give them to model.generate(**text)"
                                if isinstance(text, dict) else ""))
        prompts = [text] if isinstance(text, str) else text
        replies = self.replies(prompts, answers)
        pictures = self.match(prompts, images, replies)
        rows, labels = [], []
        for prompt, reply in zip(prompts, replies):
            row = self.prompt_ids(prompt, return_for_text_completion)
            row = row if add_special_tokens else row[1:]  # without <s>
            end = self.answer_ids(reply)
            rows.append(row + end)
            labels.append([IGNORE] * len(row) + end)
        return self.features(rows, pictures, return_tensors, options,
                             None if answers is None else labels)

    def features(self, rows: list[list[int]], pictures: list[Picture], return_tensors: str | None,
                 options: dict, labels: list[list[int]] | None = None) -> BatchFeature:
        """Rows of ids, and their pictures -> the model's arguments. TypeError for an option that is
        neither one of ChameleonImageProcessor nor one of `Tokenizer.batch`.
        """
        for_images = {name: options.pop(name) for name in IMAGE_OPTIONS & options.keys()}
        if unknown := options.keys() - (Tokenizer.batch.__kwdefaults__ or {}).keys():
            raise TypeError(f"ChameleonProcessor does not know the keyword {min(unknown)!r}")
        data = self.tokenizer.batch(rows, labels, return_tensors=return_tensors, **options)
        if pictures:
            data |= self.image_processor(pictures, return_tensors=return_tensors, **for_images)
        return data

    def replies(self, prompts: list[str], answers: str | list[str] | None) -> list[str]:
        """The answer of each prompt, "" without any. ValueError for an empty or a missing one."""
        if answers is None:
            return [""] * len(prompts)
        replies = [answers] if isinstance(answers, str) else list(answers)
        if len(replies) != len(prompts) or not all(isinstance(x, str) and x for x in replies):
            raise ValueError(f"{len(prompts)} prompt(s) need as many answers, each a text that is "
                             f"not empty, got {answers!r:.80}")
        return replies

    def match(self, prompts: list[str], images: Pictures | None, replies: list[str]
              ) -> list[Picture]:
        """All pictures in the order of their places. ValueError, with both counts, on a mismatch.

        DIFFERS: transformers leaves this to the model, which can only compare the batch's totals.
        """
        if "" in prompts:
            raise ValueError(f"prompt {prompts.index('') + 1} is empty: write something")
        mark = self.image_token
        places = [prompt.count(mark) + reply.count(mark) for prompt, reply in zip(prompts, replies)]
        items = images if isinstance(images, (list, tuple)) else []
        lists = [item is None or isinstance(item, (list, tuple)) for item in items]
        if not any(lists):
            groups = [("text", places, images)]
        elif lists == [True] * len(prompts):
            groups = [(f"prompt {n + 1}", [places[n]], items[n]) for n in range(len(prompts))]
        else:
            raise ValueError(f"images has {len(items)} item(s), lists or None among them, for "
                             f"{len(prompts)} prompt(s): give pictures only or one list per prompt")
        pictures = []
        for who, own, given in groups:
            found = [] if given is None else flat_pictures(given)
            if len(found) != sum(own):
                raise ValueError(f"{who} has {' + '.join(map(str, own))} {mark} but {len(found)} "
                                 "picture(s): give one for each")
            pictures += found
        return pictures

    def prompt_ids(self, prompt: str, completion: bool) -> list[int]:
        """One prompt -> its T ids: <s> text <racm3:break> <image> x S <eoss> text <reserved08706>

        Each piece of text is tokenized by itself. With completion there is no <reserved08706>, the
        end of turn. ValueError if the vocabulary lacks one of these tokens.
        """
        ids = [self.tokenizer.bos_token_id] + self.content_ids(prompt)
        return ids if completion else ids + self.end_of_turn()

    def answer_ids(self, reply: str) -> list[int]:
        """An answer -> its ids with </s>; "" -> []. ValueError if the vocabulary has no </s>."""
        if not reply:
            return []
        if self.tokenizer.eos_token_id is None:
            raise ValueError("this tokenizer has no </s> to end an answer with")
        return [*self.content_ids(reply), self.tokenizer.eos_token_id]

    def content_ids(self, text: str) -> list[int]:
        """Text with pictures -> its ids, without <s> and end."""
        ids = []
        for n, piece in enumerate(text.split(self.image_token)):
            ids += (self.picture_ids() if n else []) + self.tokenizer.text_ids(piece)
        return ids

    def picture_ids(self) -> list[int]:
        """<racm3:break> <image> x S <eoss>: the model replaces <image> by the picture's ids."""
        names = self.tokenizer.vocabulary
        begin, place, end = names.begin_image_id, names.image_token_id, names.end_image_id
        if begin is None or place is None or end is None:
            raise ValueError("this tokenizer has no image tokens: leave the picture out")
        return [begin, *[place] * self.image_seq_length, end]

    def end_of_turn(self) -> list[int]:
        if self.tokenizer.sep_token_id is None:
            raise ValueError("this tokenizer has no end of turn: set return_for_text_completion")
        return [self.tokenizer.sep_token_id]

    def apply_chat_template(self, conversation: list, *, tokenize: bool = True,
                            return_dict: bool = True, add_generation_prompt: bool = True,
                            return_tensors: str | None = "pt", **options) -> BatchFeature:
        """A conversation, or a list of them, in transformers' message format -> as `__call__`:

            [{"role": "user", "content": [{"type": "text", "text": "What is this?"},
                                          {"type": "image", "image": picture}]}, ...]

        <s> first turn, end of turn, second turn, end of turn ...: turns alternate (section 3), so
        the ids need no roles. The first and the last are the user's. Text is text here: neither
        "<image>" nor "<reserved08706>" in it has a meaning. options: those of `__call__`.
        ValueError for what is no conversation, and for tokenize=False, because a string could not
        tell the end of turn from text that looks like it.
        """
        if not (tokenize and return_dict and add_generation_prompt):
            raise ValueError("apply_chat_template gives ids: leave tokenize, return_dict and "
                             "add_generation_prompt at True")
        if not isinstance(conversation, (list, tuple)) or not conversation:
            raise ValueError(f"a conversation is a list of messages, not {conversation!r:.80}")
        many = isinstance(conversation[0], (list, tuple))
        rows, pictures = [], []
        for turns in conversation if many else [conversation]:
            ids = [self.tokenizer.bos_token_id]
            if not turns:
                raise ValueError("a conversation is empty: give it a message")
            for turn in turns:
                for part in parts_of(turn):
                    if isinstance(part, str):
                        ids += self.tokenizer.text_ids(part)
                    else:
                        ids += self.picture_ids()
                        pictures.append(part)
                ids += self.end_of_turn()
            roles = [turn.get("role") for turn in turns]
            if roles != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
                raise ValueError("roles must be user, assistant, user ..., and the last one user, "
                                 f"got {', '.join(map(str, roles)):.80}")
            rows.append(ids)
        return self.features(rows, pictures, return_tensors, options)

    # As the methods of the tokenizer.
    def decode(self, *ids, **options) -> str:
        return self.tokenizer.decode(*ids, **options)

    def batch_decode(self, *ids, **options) -> list[str]:
        return self.tokenizer.batch_decode(*ids, **options)

    def post_process_image_text_to_text(self, generated_outputs: Iterable,
                                        skip_special_tokens: bool = True, **options) -> list[str]:
        return self.batch_decode(generated_outputs, skip_special_tokens, **options)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Writes the tokenizer's files, preprocessor_config.json and processor_config.json, from
        which `from_pretrained` and transformers' AutoProcessor give the same ids.
        """
        self.tokenizer.save_pretrained(save_directory)
        self.image_processor.save_pretrained(save_directory)
        write_json(Path(save_directory) / "processor_config.json", {
            "image_seq_length": self.image_seq_length, "image_token": self.image_token,
            "processor_class": "ChameleonProcessor"})

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, padding_side: str | None = None,
                        **changes) -> "ChameleonProcessor":
        """Reads a folder or a hub id, where processor_config.json may be missing. image_seq_length
        and image_token in `changes` replace the values read; others are options of the hub.
        """
        from chameleon_extras.files import find_folder  # only to find files

        own = {"image_seq_length", "image_token"}
        folder = find_folder(folder, False, **{n: changes[n] for n in changes.keys() - own})
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side)
        file = Path(folder) / "processor_config.json"
        data = (read_json(file) if file.is_file() else {}) | changes
        return cls(ChameleonImageProcessor.from_pretrained(folder), tokenizer,
                   **{name: data[name] for name in own & data.keys()})


# transformers' names for "the class that a folder needs", and its names of other versions
AutoProcessor, AutoImageProcessor = ChameleonProcessor, ChameleonImageProcessor
ChameleonImageProcessorPil = ChameleonImageProcessorFast = ChameleonImageProcessor
