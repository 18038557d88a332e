"""Prompts and pictures, joined: from "What is this?<image>" and a file to what the model takes.

    "What is this?<image>"                            picture
             |                                           |
    Tokenizer.encode, piece by piece          ChameleonImageProcessor (image_processor.py)
             |                                           |
    <s> What is this ? <racm3:break> <image> x S <eoss> <reserved08706>
             |                                           |
    input_ids (B, T), attention_mask (B, T)      pixel_values (N, 3, H, W)

Letters: B prompts, T ids of a row, N pictures, S codes per picture. A prompt ends with the
end-of-turn id for a chat, and without it for completion.

Source: the documentation of transformers' ChameleonProcessor.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from image_processor import (
    BatchFeature,
    ChameleonImageProcessor,
    Picture,
    Pictures,
    Stacked,
    flat_pictures,
    read_json,
    stack,
    write_json,
)
from tokenizer import Tokenizer, load_tokenizer


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
