"""Prompts and pictures become what the model takes; pixels become a picture again.

    "What is this?<image>"                          picture file --load_image--> PIL picture
             |                                                                        |
    Tokenizer.encode, piece by piece                           ChameleonImageProcessor, see below
             |                                                                        |
    <s> What is this ? <racm3:break> <image> x S <eoss> <reserved08706>               |
             |                                                                        |
    input_ids (B, T), attention_mask (B, T)                        pixel_values (N, 3, H, W)

    ChameleonImageProcessor, for the released model:
              to RGB, transparency on white                       (H, W, 3) uint8
              shortest edge to 512, Lanczos                       (512, W', 3) or (H', 512, 3)
              centre crop                                         (512, 512, 3)
              u8 * 0.0078, then - 1                               (512, 512, 3) float32, [-1, 0.989]
              channels first, stacked                             (N, 3, 512, 512)
    PIL picture <--postprocess: clamp, (x + 1) / 2 * 255-- pixels (N, 3, H, W) of the VQ-VAE

Letter, word   meaning
B, T           prompts; ids of a row
N, S           pictures; codes per picture
H, W           height and width. Arrays are (H, W); PIL names sizes the other way round, (W, H)
level          uint8 0..255, what a picture file holds
pixel          float, about [-1, 1]

What differs from most models' preparation
- A prompt ends with the end-of-turn id for a chat, and without it for text completion.
- The factor is 0.0078, not 2 / 255 = 0.00784: transformers' number, white becomes 0.989.
- Numbers are those of transformers 4.43 to 4.57 ("slow" ChameleonImageProcessor), bit for bit.
  The weights saw Meta's own u8 / 255 * 2 - 1; rescale_factor=2 / 255 gives that.
- The EXIF orientation is ignored, as by Meta and transformers; 16-bit levels above 255 clip.

Sources: arXiv 2405.09818 section 2.1 (a 512 x 512 picture is 1024 codes); the documentation of
transformers' ChameleonImageProcessor and ChameleonProcessor.
"""

import copy
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tokenizer import Tokenizer, load_tokenizer, read_json, write_json

Picture = Image.Image | np.ndarray | torch.Tensor
Pictures = Picture | list  # one picture, a stack (N, ...), or lists of them, however nested
Stacked = list[np.ndarray] | np.ndarray | torch.Tensor


def load_image(path: str | Path) -> Image.Image:
    """A picture file -> PIL picture, fully read; of an animation, the first frame.

    ValueError, in one line, for whatever is no whole picture of a sane size.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about EXIF data and the like, which nobody reads
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()  # open() reads the header alone: a file cut short shows only here
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"picture {str(path)!r} is too large, scale it down: {error}") from None
    except OSError as error:  # includes PIL's UnidentifiedImageError
        reason = error.strerror or "not a picture, or one cut short"
        raise ValueError(f"picture {str(path)!r} cannot be read: {reason}") from None
    except Exception as error:  # on broken files PIL raises SyntaxError, struct.error, ...
        raise ValueError(f"picture {str(path)!r} is broken: {type(error).__name__}") from None
    if not all(image.size):
        raise ValueError(f"picture {str(path)!r} is empty: it has no pixels")
    return image


class BatchFeature(dict):
    """What the processors return: a dict whose keys are attributes too, with .to(device, dtype)."""

    def __getattr__(self, name: str) -> Stacked:
        if name not in self:
            raise AttributeError(f"no {name!r} here, only {', '.join(self)}")
        return self[name]

    def to(self, *args, device: torch.device | str | int | None = None,
           dtype: torch.dtype | None = None) -> "BatchFeature":
        """Move and cast in place: .to("cuda"), .to(torch.bfloat16), .to("cuda", torch.bfloat16).

        Only floats are cast: above 256, bfloat16 holds every second integer, so ids would change.
        """
        for arg in args:
            device, dtype = (device, arg) if isinstance(arg, torch.dtype) else (arg, dtype)
        for name, value in self.items():
            if isinstance(value, torch.Tensor):
                self[name] = value.to(device, dtype if value.is_floating_point() else None)
        return self


class ChameleonImageProcessor:
    """Pictures -> pixel_values, and back. Options and defaults as documented for transformers.

    Every option can be given to the constructor, and again to one call.
    """

    DEFAULTS = {
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": 512},  # or {"height": h, "width": w}, or an int: shortest edge
        "resample": 1,  # PIL's number of the filter: 1 is Lanczos
        "do_center_crop": True,
        "crop_size": {"height": 512, "width": 512},  # or an int: a square
        "do_rescale": True,
        "rescale_factor": 0.0078,
        "do_normalize": True,
        "image_mean": [1.0, 1.0, 1.0],  # or one number for all channels
        "image_std": [1.0, 1.0, 1.0],
    }
    # A picture of 1 x 100,000 with its short edge at 512 would need 79 GB before the crop.
    MAX_RESIZED_PIXELS = 2**27

    def __init__(self, **options):
        unknown = set(options) - set(self.DEFAULTS)
        if unknown:
            raise TypeError(f"unknown option {min(unknown)!r}, not one of {list(self.DEFAULTS)}")
        for name, default in self.DEFAULTS.items():
            value = options.get(name)
            setattr(self, name, copy.deepcopy(default if value is None else value))
        if isinstance(self.size, int):
            self.size = {"shortest_edge": self.size}
        if isinstance(self.crop_size, int):
            self.crop_size = {"height": self.crop_size, "width": self.crop_size}
        self._check()

    def _check(self) -> None:
        for name, kinds in (("size", ({"shortest_edge"}, {"height", "width"})),
                            ("crop_size", ({"height", "width"},))):
            value = getattr(self, name)
            if not isinstance(value, dict) or set(value) not in kinds or not all(
                    isinstance(n, int) and n > 0 for n in value.values()):
                wanted = " or ".join(str(sorted(kind)) for kind in kinds)
                raise ValueError(f"{name}={value!r}: want {wanted}, whole numbers above 0")
        if self.resample not in list(Image.Resampling):
            raise ValueError(f"resample={self.resample!r}: PIL's filters are 0..5, 1 is Lanczos")
        for name in ("rescale_factor", "image_mean", "image_std"):
            value = np.ravel(getattr(self, name))
            if value.dtype.kind not in "if" or (name == "image_std" and not value.all()):
                raise ValueError(f"{name}={value.tolist()}: want numbers, for image_std not 0")
        for name, default in self.DEFAULTS.items():
            if isinstance(default, bool) and not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: want True or False")

    def __call__(self, images: Pictures, **options) -> BatchFeature:
        """As preprocess."""
        return self.preprocess(images, **options)

    def preprocess(self, images: Pictures, return_tensors: str | None = None,
                   data_format: str | None = "channels_first",
                   input_data_format: str | None = None, **options) -> BatchFeature:
        """Pictures -> {"pixel_values": (N, 3, H, W)}: tensor ("pt"), array ("np") or list (None).

        images: one picture, a stack (N, ...) or (nested) lists. A picture is a PIL image, an array
        or a tensor (H, W), (H, W, C) or (C, H, W): uint8, or fractions 0..1 with do_rescale=False.
        data_format: "channels_first", "channels_last", or None for the input's own.
        """
        own = self.to_dict()
        given = {name: own.get(name) if v is None else v for name, v in options.items()}
        settings = ChameleonImageProcessor(**{**own, **given})
        arrays = []
        for image in flat_pictures(images):
            if settings.do_convert_rgb and isinstance(image, Image.Image) and image.mode != "RGB":
                image = image.convert("RGBA")  # whatever carries transparency, palettes included
            array, layout = to_array(image, input_data_format)  # (H, W, C)
            array = settings.prepare(array)  # (H', W', C)
            target = data_format or layout
            if target not in ("channels_first", "channels_last"):
                raise ValueError(f"data_format={target!r}: channels_first, channels_last or None")
            arrays.append(array.transpose(2, 0, 1) if target == "channels_first" else array)
        return BatchFeature(pixel_values=stack(arrays, return_tensors))  # (N, C, H', W')

    def prepare(self, array: np.ndarray) -> np.ndarray:
        """(H, W, C) levels -> (H', W', C) float32 pixels: the steps in their documented order."""
        if self.do_convert_rgb:
            array = on_white(array)  # (H, W, 3)
        if self.do_resize:
            array = self.resize(array)  # (H', W', C)
        if self.do_center_crop:
            array = center_crop(array, **self.crop_size)  # (height, width, C)
        if self.do_rescale:
            if array.dtype.kind == "f" and array.min() >= 0 and array.max() <= 1:
                warnings.warn("pixels lie in 0..1 already: pass do_rescale=False", stacklevel=3)
            # Multiplied in float64 and rounded once; float32 * float32 is an ulp off in places.
            array = (array.astype(np.float64) * self.rescale_factor).astype(np.float32)
        if self.do_normalize:
            mean, std = np.float32(self.image_mean), np.float32(self.image_std)
            if mean.size not in (1, array.shape[2]) or std.size not in (1, array.shape[2]):
                raise ValueError(f"image_mean and image_std must fit {array.shape[2]} channel(s)")
            # pixel = (level * 0.0078 - 1) / 1
            array = (array.astype(np.float32) - mean) / std
        return array

    def resize(self, array: np.ndarray) -> np.ndarray:
        """(H, W, C) -> (H', W', C). PIL resamples levels, so fractions become levels on the way."""
        levels, fractions = to_levels(array)
        height, width = self.resized_size(*levels.shape[:2])
        image = Image.fromarray(levels[:, :, 0] if levels.shape[2] == 1 else levels)
        resized = np.asarray(image.resize((width, height), self.resample))
        resized = resized.reshape(height, width, -1)  # (H', W', C), also for one channel
        if fractions:
            return (resized.astype(np.float64) * (1 / 255)).astype(np.float32)
        return resized

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """(H, W) of a picture -> (H', W'), the shorter one equal to size["shortest_edge"]."""
        if "height" in self.size:
            return self.size["height"], self.size["width"]
        edge, short, long = self.size["shortest_edge"], min(height, width), max(height, width)
        # DIFFERS: truncated as in transformers; Meta's code rounds (one row or column at times).
        long = int(edge * long / short)
        if edge * long > self.MAX_RESIZED_PIXELS:
            raise ValueError(f"a picture of {width} x {height} pixels is too long: crop it first")
        return (edge, long) if height < width else (long, edge)

    @staticmethod
    def postprocess(pixel_values: torch.Tensor) -> list[Image.Image]:
        """Pixels (N, 3, H, W), about [-1, 1] -> N pictures."""
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(f"pixels must be (N, 3, H, W), got {tuple(pixel_values.shape)}")
        # level = trunc((clamp(pixel, -1, 1) + 1) / 2 * 255)
        levels = (pixel_values.detach().float().clamp(-1, 1) + 1) / 2 * 255
        levels = levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()  # (N, H, W, 3)
        return [Image.fromarray(image) for image in levels.numpy()]

    def to_dict(self) -> dict:
        """All options, as a new processor takes them."""
        return {name: getattr(self, name) for name in self.DEFAULTS}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write preprocessor_config.json, which transformers reads too."""
        kind = {"image_processor_type": "ChameleonImageProcessor"}
        write_json(Path(folder) / "preprocessor_config.json", {**self.to_dict(), **kind})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ChameleonImageProcessor":
        """Read preprocessor_config.json, or processor_config.json as transformers 5 writes it."""
        file = Path(folder) / "preprocessor_config.json"
        joint = Path(folder) / "processor_config.json"
        data = read_json(file) if file.is_file() else None
        if data is None and joint.is_file():
            file, data = joint, read_json(joint).get("image_processor")
        if not isinstance(data, dict):
            raise ValueError(f"{folder}: no preprocessor_config.json in it "
                             f"(ChameleonImageProcessor().save_pretrained(folder) writes one)")
        try:  # other keys, such as image_processor_type or do_pad, are none of our options
            return cls(**{name: value for name, value in data.items() if name in cls.DEFAULTS})
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None


# ---------------------------------------------------------------------- one picture, step by step


def flat_pictures(images: Pictures) -> list[Picture]:
    """One picture, a stack (N, ...) or nested lists of both -> flat list of pictures."""
    if isinstance(images, (list, tuple)):
        return [picture for item in images for picture in flat_pictures(item)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    if isinstance(images, (Image.Image, np.ndarray, torch.Tensor)):
        return [images]
    hint = " (load_image opens a file)" if isinstance(images, (str, Path)) else ""
    raise ValueError(f"a picture must be PIL, numpy or torch, not {type(images).__name__}{hint}")


def to_array(image: Picture, layout: str | None = None) -> tuple[np.ndarray, str]:
    """One picture -> (H, W, C) and the layout it came in: "channels_first" or "channels_last".

    DIFFERS: transformers 4 guesses one layout for the whole batch from the first picture's shape,
    and so takes a PIL picture one pixel high for channels first. PIL is always channels last.
    """
    if isinstance(image, Image.Image):
        array, layout = np.asarray(image), "channels_last"
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
    if layout not in ("channels_first", "channels_last"):
        raise ValueError(f"input_data_format={layout!r}: channels_first or channels_last")
    if layout == "channels_first":
        array = array.transpose(1, 2, 0)  # (H, W, C)
    return (array.astype(np.uint8) * 255 if array.dtype == bool else array), layout


def guess_layout(shape: tuple[int, int, int]) -> str:
    """The axis of 1, 3 or else 4 numbers holds the channels; if both could, the first one does."""
    first, last = shape[0] in (1, 3), shape[2] in (1, 3)
    if first and last:
        warnings.warn(f"channels of {shape} taken first: pass input_data_format", stacklevel=4)
    if first or (shape[0] == 4 and not last):
        return "channels_first"
    if last or shape[2] == 4:
        return "channels_last"
    raise ValueError(f"a picture of shape {shape} has no axis of 1, 3 or 4 channels")


def on_white(array: np.ndarray) -> np.ndarray:
    """(H, W, 1, 3 or 4) -> (H, W, 3): grey is repeated, transparency blended on white.

    DIFFERS: transformers 5 blends with PIL's alpha_composite, at most one level away from this.
    """
    if array.shape[2] == 3:
        return array
    if array.shape[2] == 1:
        return np.repeat(array, 3, axis=2)  # (H, W, 3)
    if array.shape[2] != 4:
        raise ValueError(f"{array.shape[2]} channels are not grey, RGB or RGBA")
    white = 1.0 if array.dtype.kind == "f" else 255
    rgb, alpha = array[:, :, :3], array[:, :, 3:] / white  # (H, W, 3), (H, W, 1)
    # out = (1 - a) * 255 + a * rgb, truncated to a level by astype
    return ((1 - alpha) * white + alpha * rgb).astype(array.dtype)


def to_levels(array: np.ndarray) -> tuple[np.ndarray, bool]:
    """-> uint8 levels, and True if the input was fractions 0..1. ValueError if it was neither."""
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
    """(H, W, C) -> (height, width, C) at offset (n - size) // 2; zeros around a smaller picture."""
    top, left = (array.shape[0] - height) // 2, (array.shape[1] - width) // 2
    if top < 0 or left < 0:
        more_rows, more_columns = max(height - array.shape[0], 0), max(width - array.shape[1], 0)
        above, before = (more_rows + 1) // 2, (more_columns + 1) // 2
        array = np.pad(array, ((above, more_rows - above), (before, more_columns - before), (0, 0)))
    return array[max(top, 0) :, max(left, 0) :][:height, :width]  # (height, width, C)


# ---------------------------------------------------------------------------------------------
# Prompts and pictures together


class ChameleonProcessor:
    """Prompts with "<image>" in them, and pictures -> what the model's forward takes.

    image_seq_length is S, the codes per picture (vqvae.py tells why 1024); image_token is the
    text that marks a picture's place.
    """

    def __init__(self, image_processor: ChameleonImageProcessor, tokenizer: Tokenizer,
                 image_seq_length: int = 1024, image_token: str = "<image>"):
        if not isinstance(image_seq_length, int) or image_seq_length < 1:
            raise ValueError(f"image_seq_length={image_seq_length!r}: want a whole number above 0")
        if not isinstance(image_token, str) or not image_token:
            raise ValueError(f"image_token={image_token!r}: want the text that marks a picture")
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.image_seq_length, self.image_token = image_seq_length, image_token

    def __call__(self, *inputs, text: str | list[str] | None = None,
                 images: Pictures | None = None,
                 padding: bool | str = False, truncation: bool | str = False,
                 max_length: int | None = None, padding_side: str | None = None,
                 return_for_text_completion: bool = False, return_tensors: str | None = "pt",
                 **image_options) -> BatchFeature:
        """-> input_ids (B, T), attention_mask (B, T) and, with pictures, pixel_values (N, 3, H, W).

        text and images may be positional in either order: transformers changed it in 4.46. images:
        flat, taken in order over all prompts, or nested, one list per prompt. padding: True or
        "longest", "max_length", False. return_for_text_completion leaves the end of turn out.
        image_options: as ChameleonImageProcessor's. ValueError for an empty prompt, a wrong number
        of pictures, unequal lengths without padding, a max_length that would cut a picture in two.
        """
        for value in inputs:
            if is_text(value) and text is None:
                text = value
            elif images is None:
                images = value
            else:
                raise TypeError("more than one text, or more than one value for images")
        for name in image_options.keys() - ChameleonImageProcessor.DEFAULTS.keys():
            if name not in ("data_format", "input_data_format"):
                raise TypeError(f"ChameleonProcessor does not know the keyword {name!r}")
        if not is_text(text):
            raise ValueError("the prompt is missing: text must be a string or a list of strings")
        prompts = [text] if isinstance(text, str) else text
        pictures = self.match(prompts, images)
        rows = [self.layout(prompt, return_for_text_completion) for prompt in prompts]
        rows = self.truncate(rows, truncation, max_length, padding)
        data = self.pad(rows, padding, max_length, padding_side or self.tokenizer.padding_side)
        data = {name: tensor_rows(rows, return_tensors) for name, rows in data.items()}  # (B, T)
        if pictures:
            image_options["return_tensors"] = return_tensors
            data |= self.image_processor(pictures, **image_options)  # (N, 3, H, W)
        return BatchFeature(data)

    def match(self, prompts: list[str], images: Pictures | None) -> list[Picture]:
        """Pictures in the order of their places, row by row; ValueError if the counts differ.

        DIFFERS: transformers leaves that to the model, which knows only the total of the batch.
        """
        places = [prompt.count(self.image_token) for prompt in prompts]
        for n, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {n + 1} is empty: write something")
        if isinstance(images, (list, tuple)) and images and all(
                item is None or isinstance(item, (list, tuple)) for item in images):
            if len(images) != len(prompts):
                raise ValueError(f"{len(images)} lists of pictures for {len(prompts)} prompt(s)")
            groups = [flat_pictures(item or []) for item in images]
            for n, (group, count) in enumerate(zip(groups, places)):
                if len(group) != count:
                    raise ValueError(f"prompt {n + 1} has {count} {self.image_token} but "
                                     f"{len(group)} picture(s): give one for each")
            return [picture for group in groups for picture in group]
        pictures = [] if images is None else flat_pictures(images)
        if len(pictures) != sum(places):
            counts = ", ".join(f"prompt {n + 1} has {count}" for n, count in enumerate(places))
            raise ValueError(f"{len(pictures)} picture(s) for {sum(places)} {self.image_token} "
                             f"({counts}): give one for each")
        return pictures

    def layout(self, prompt: str, completion: bool) -> list[int]:
        """One prompt -> ids: <s>, the text pieces with a picture's ids between them, end of turn.

        Each piece is tokenized on its own: a word never reaches across a picture.
        """
        names = self.tokenizer.vocabulary
        picture = [names.begin_image_id, *[names.image_token_id] * self.image_seq_length,
                   names.end_image_id]
        if self.image_token in prompt and None in picture:
            raise ValueError("this tokenizer has no image tokens: leave the picture out")
        if not completion and names.end_of_turn_id is None:
            raise ValueError("this tokenizer has no end of turn: set return_for_text_completion")
        ids = [self.tokenizer.bos_token_id]
        for n, piece in enumerate(prompt.split(self.image_token)):
            ids += (picture if n else []) + self.tokenizer.encode(piece)
        return ids if completion else [*ids, names.end_of_turn_id]

    def truncate(self, rows: list[list[int]], truncation: bool | str, max_length: int | None,
                 padding: bool | str) -> list[list[int]]:
        """Rows -> their first max_length ids. A picture is never cut: ValueError."""
        wanted = truncation in (True, "longest_first", "only_first")
        if not wanted and truncation not in (False, None, "do_not_truncate"):
            raise ValueError(f"truncation={truncation!r}: want True or False")
        if max_length is None and (wanted or padding == "max_length"):
            raise ValueError("truncation=True and padding='max_length' need a max_length")
        if max_length is not None and not wanted and padding != "max_length":
            raise ValueError("max_length is for truncation=True or padding='max_length': set one")
        if max_length is not None and (not isinstance(max_length, int) or max_length < 1):
            raise ValueError(f"max_length={max_length!r}: want a whole number above 0")
        if not wanted:
            return rows
        end_image = self.tokenizer.vocabulary.end_image_id
        for n, row in enumerate(rows):
            if end_image is not None and end_image in row[max_length:]:
                raise ValueError(f"max_length={max_length} would cut a picture of prompt {n + 1}, "
                                 f"which has {len(row)} ids: raise it or shorten the text")
        return [row[:max_length] for row in rows]

    def pad(self, rows: list[list[int]], padding: bool | str, max_length: int | None,
            side: str) -> dict[str, list[list[int]]]:
        """Rows -> input_ids of one length (if padding), and attention_mask: 1 real id, 0 <pad>."""
        if side not in ("left", "right"):
            raise ValueError(f"padding_side={side!r}: 'left' or 'right'")
        lengths = {False: 0, None: 0, "do_not_pad": 0, "max_length": max_length,
                   True: max(map(len, rows)), "longest": max(map(len, rows))}
        if padding not in lengths:
            raise ValueError(f"padding={padding!r}: True, 'longest', 'max_length' or False")
        data = {"input_ids": [], "attention_mask": []}
        for row in rows:
            space = lengths[padding] - len(row)
            for name, filler, content in (("input_ids", self.tokenizer.pad_token_id, row),
                                          ("attention_mask", 0, [1] * len(row))):
                fill = [filler] * space  # [] if space is negative
                data[name].append(fill + content if side == "left" else content + fill)
        return data

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True,
               clean_up_tokenization_spaces: bool = False) -> str:
        """As Tokenizer.decode. Text comes back as it was, so there are no spaces to clean up."""
        return self.batch_decode([ids], skip_special_tokens, clean_up_tokenization_spaces)[0]

    def batch_decode(self, batch: Iterable, skip_special_tokens: bool = True,
                     clean_up_tokenization_spaces: bool = False) -> list[str]:
        """As Tokenizer.batch_decode."""
        if clean_up_tokenization_spaces:
            raise ValueError("clean_up_tokenization_spaces would change the text: leave it off")
        return self.tokenizer.batch_decode(batch, skip_special_tokens)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer's file, preprocessor_config.json and processor_config.json."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        data = {"image_seq_length": self.image_seq_length, "image_token": self.image_token}
        write_json(Path(folder) / "processor_config.json",
                   {**data, "processor_class": "ChameleonProcessor"})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ChameleonProcessor":
        """From a checkpoint folder; processor_config.json, if there, gives image_seq_length."""
        tokenizer, file = load_tokenizer(folder), Path(folder) / "processor_config.json"
        data = read_json(file) if file.is_file() else {}
        known = {name: data[name] for name in ("image_seq_length", "image_token") if name in data}
        return cls(ChameleonImageProcessor.from_pretrained(folder), tokenizer, **known)


def is_text(value: object) -> bool:
    """A string, or a list of at least one string and nothing else."""
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and all(isinstance(item, str) for item in value)
    return isinstance(value, str)


def tensor_rows(rows: list[list[int]], return_tensors: str | None) -> Stacked | list[list[int]]:
    """B rows of T ids -> (B, T) int64, "pt" or "np"; None leaves them lists of any lengths."""
    if return_tensors is None:
        return rows
    if len(set(map(len, rows))) > 1:
        raise ValueError(f"the prompts have {min(map(len, rows))} to {max(map(len, rows))} ids: "
                         f"pass padding=True to make them equal")
    return stack([np.array(row, dtype=np.int64) for row in rows], return_tensors)  # (B, T)


def stack(arrays: list[np.ndarray], return_tensors: str | None) -> Stacked:
    """N arrays of one shape (...) -> (N, ...): tensor for "pt", array for "np"; None: the list."""
    if return_tensors not in ("pt", "np", None):
        raise ValueError(f"return_tensors={return_tensors!r}: 'pt', 'np' or None")
    if return_tensors is None:
        return arrays
    shapes = sorted({array.shape for array in arrays})
    if len(shapes) != 1:
        raise ValueError(f"cannot stack shapes {shapes}: crop or pad to one" if shapes else
                         "no picture given: pass at least one")
    stacked = np.stack(arrays)  # (N, ...)
    return torch.from_numpy(stacked) if return_tensors == "pt" else stacked
