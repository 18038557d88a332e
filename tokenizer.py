"""Chameleon's text tokenizer, and the map between codes of pictures and ids of the vocabulary.

    "What is this?" --Tokenizer.text_ids--> ids --model--> ids --decode or StreamDecoder--> text
    codes (N, S) of the VQ-VAE <--VocabularyMap, by name--> ids (N, S)

processor.py puts the ids of text and pictures together into one row.

Letter, word  meaning
B, T          prompts in a batch; ids in a row
N, S          pictures in a batch; codes per picture
K, code       number of codes (8192); code: 0..K-1, a row of the VQ-VAE's codebook
V, id         number of ids (65536); id: 0..V-1, a row of the decoder's embedding table
token, name   what an id stands for; its string in the vocabulary
mark          begin-image, end-image, end of turn, or <image>, which HF calls `image_token`
image token   an id or a name that stands for a code, such as IMGIMGFDZ
word          a pre-token: merges never cross its ends

What differs from the tokenizer of a text-only Llama
- K ids are codes of pictures. Their names spell the code with A..J for the digits 0..9: 53 is FD.
- It is byte-level BPE. A text is first split into words by six rules; each digit and each
  punctuation mark is a word of its own.
- Text never becomes a control id, whatever it says. "<image>" has a meaning in prompts only
  because ChameleonProcessor looks for it.

Sources: Chameleon, https://arxiv.org/abs/2405.09818, section 2.1 (65536 ids, 8192 of them codes);
the names and splits of the released tokenizer.
"""

import codecs
import heapq
import json
import math
import operator
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

BEGIN_IMAGE, END_IMAGE, END_OF_TURN = "<racm3:break>", "<eoss>", "<reserved08706>"
IMAGE_PLACEHOLDERS = ("<image>", "<reserved08707>")  # HF's name, and Meta's for the same id
CONTROLS = {"<s>", "<pad>", "</s>", "<unk>", BEGIN_IMAGE, END_IMAGE, END_OF_TURN,
            *IMAGE_PLACEHOLDERS}  # names of codes are controls, too: see IMAGE_TOKEN
IGNORE = -100  # a label that counts for nothing, as in torch's cross_entropy
IDS = (torch.int64, torch.int32)  # dtypes of ids
IMAGE_TOKEN = re.compile("IMGIMG(A|[B-J][A-J]*)Z")  # every name that `image_token_name` gives


# ---------------------------------------------------------------------------------------------
# JSON files, for this file and for those that import it


def read_json(file: Path) -> dict:
    """The JSON object in a file. ValueError, naming the file, if there is none."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # includes UnicodeDecodeError
        raise ValueError(f"{file}: broken JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file}: broken JSON: an object is wanted")
    return data


def write_json(file: Path, data: dict) -> None:
    """Writes a JSON object with sorted keys; creates the folder if it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------
# Codes <-> names <-> ids


def image_token_name(code: int) -> str:
    """53 -> "IMGIMGFDZ": the decimal digits of the code as letters A..J, without zero padding."""
    return f"IMGIMG{''.join('ABCDEFGHIJ'[int(digit)] for digit in str(code))}Z"


def check_ids(ids: dict, size: int = 10**6, of: str = "") -> None:
    """ValueError for a name whose id is not one of 0..size-1."""
    for name, token_id in ids.items():
        if not (type(token_id) is int and 0 <= token_id < size and isinstance(name, str)):
            raise ValueError(f"{of}{name!s:.80} is {token_id!r:.80}, but ids are whole numbers "
                             f"from 0 to {size - 1}")


class VocabularyMap(torch.nn.Module):
    """Converts codes (of the codebook) to ids (of the vocabulary) and back; has the marks' ids.

    vocabulary_map: name -> id, as in config.json; None or {} gives a map without image tokens.
    Attributes: num_codes K; code_to_id (K,) int64; image_token_id, begin_image_id, end_image_id and
    end_of_turn_id, each None if its name is absent. ValueError unless the codes are exactly 0..K-1,
    and each code and mark has an id of its own.

    It is an nn.Module so that code_to_id follows the model to its device. It is in no checkpoint.
    Source: transformers' ChameleonImageVocabularyMapping.
    """

    code_to_id: torch.Tensor

    def __init__(self, vocabulary_map: dict[str, int] | None = None) -> None:
        super().__init__()
        names = vocabulary_map or {}
        check_ids(names, of="the vocabulary's ")
        self.image_token_id = next((names[n] for n in IMAGE_PLACEHOLDERS if n in names), None)
        self.begin_image_id, self.end_image_id = names.get(BEGIN_IMAGE), names.get(END_IMAGE)
        self.end_of_turn_id = names.get(END_OF_TURN)

        self.num_codes = sum(IMAGE_TOKEN.fullmatch(name) is not None for name in names)
        ids = [names.get(image_token_name(code)) for code in range(self.num_codes)]
        if None in ids:
            raise ValueError(f"the vocabulary has {len(ids)} image tokens, but none is named "
                             f"{image_token_name(ids.index(None))}: codes must be 0..K-1 "
                             "without a gap")
        marks = [self.image_token_id, self.begin_image_id, self.end_image_id, self.end_of_turn_id]
        if twice := [i for i, n in Counter([*ids, *marks]).items() if i is not None and n > 1]:
            raise ValueError("each image token and mark needs an id of its own, but the vocabulary "
                             f"gives two of them the id {min(twice)}")
        # The release has id = code + 4, but a converted vocabulary may be in another order.
        # device="cpu": inside `with torch.device("meta")` this tensor would hold no numbers.
        self.table = torch.tensor(ids, dtype=torch.long, device="cpu")  # (K,)
        self.register_buffer("code_to_id", self.table, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "VocabularyMap":
        """What `to` and `to_empty` call. After the latter, code_to_id would hold no numbers."""
        super()._apply(fn, recurse)
        self.code_to_id = self.table.to(self.code_to_id.device)
        return self

    def codes_from_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids of any shape -> codes, same shape and device. ValueError if an id is no code."""
        ids = torch.as_tensor(ids).long().contiguous()
        table = self.code_to_id.to(ids.device)  # (K,)
        other = ~torch.isin(ids, table)
        if other.any():
            raise ValueError(f"id {int(ids[other][0])} is no image token: pass a picture's ids")
        ordered, codes = table.sort()  # each (K,), in ascending order of ids
        return codes[torch.searchsorted(ordered, ids)]


# ---------------------------------------------------------------------------------------------
# Rows of ids as a batch, for the tokenizer and for processor.py

Arrays = list[np.ndarray] | np.ndarray | torch.Tensor  # of several rows or pictures


class BatchFeature(dict):
    """What both processors return, as in transformers: a dict whose keys are attributes, too."""

    def __getattr__(self, name: str) -> Arrays:
        if name not in self:
            raise AttributeError(f"no {name!r} here, only {', '.join(self)}")
        return self[name]

    def to(self, *args, device: torch.device | str | int | None = None,
           dtype: torch.dtype | None = None, non_blocking: bool = False) -> "BatchFeature":
        """Moves and casts in place: .to("cuda"), .to(torch.bfloat16), .to("cuda", torch.bfloat16).

        Only float tensors are cast: bfloat16 has no 257, so ids would change.
        """
        for arg in args:
            if isinstance(arg, torch.dtype):
                dtype = arg
            else:
                device = arg
        for name, value in self.items():
            if isinstance(value, torch.Tensor):
                kind = dtype if value.is_floating_point() else None
                self[name] = value.to(device, kind, non_blocking=non_blocking)
        return self


def stack(arrays: list[np.ndarray], return_tensors: str | None) -> Arrays:
    """N arrays of one shape (...) -> (N, ...): tensor ("pt") or array ("np"); None: the list."""
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


def lengths_of(rows: list[list[int]], padding: bool | str | None, truncation: bool | str | None,
               max_length: int | None, multiple: int | None) -> tuple[int | None, int]:
    """-> how many ids of a row stay (None: all), and how long it becomes (0: no padding)."""
    cuts = truncation in (True, "longest_first", "only_first")
    if not cuts and truncation not in (False, None, "do_not_truncate"):
        raise ValueError(f"truncation={truncation!r}: want True or False")
    if (cuts or padding == "max_length") != (max_length is not None):
        raise ValueError("max_length goes with truncation=True or padding='max_length': give both "
                         "or neither")
    for name, number in ("max_length", max_length), ("pad_to_multiple_of", multiple):
        if number is not None and (type(number) is not int or number < 1):
            raise ValueError(f"{name}={number!r:.40}: want a whole number, at least 1")
    stay = max_length if cuts else None
    longest = max(len(row[:stay]) for row in rows)
    lengths = {False: 0, None: 0, "do_not_pad": 0, "max_length": max_length, True: longest,
               "longest": longest}
    if padding not in lengths:
        raise ValueError(f"padding={padding!r}: True, 'longest', 'max_length' or False")
    return stay, math.ceil(lengths[padding] / (multiple or 1)) * (multiple or 1)


# ---------------------------------------------------------------------------------------------
# Text <-> ids: what both file formats share


def special_token(name: str) -> property:
    """An attribute such as eos_token: the name of the token whose id is eos_token_id. Setting the
    name sets the id. ValueError for a name that is not in the vocabulary.
    """
    def write(tokenizer: "Tokenizer", token: str) -> None:
        if token not in tokenizer.vocab:
            raise ValueError(f"{name} {token!r:.80} is not in the vocabulary")
        setattr(tokenizer, f"{name}_id", tokenizer.vocab[token])

    return property(lambda tokenizer: tokenizer._names.get(getattr(tokenizer, f"{name}_id")), write)


def fixed(name: str, value: object) -> property:
    """An attribute of transformers' classes that has one value here. ValueError for another."""
    def write(owner: object, other: object) -> None:
        if other != value:
            raise ValueError(f"{name} is always {value!r} here: leave it as it is")

    return property(lambda owner: value, write)


class Tokenizer:
    """The base class of both formats. A subclass supplies plain_ids and three tables.

    vocab: name -> id. text_bytes: id of text -> the bytes of utf-8 that it stands for. All other
    ids are special_ids, the control ids, which text never becomes. whole: strings that are not
    split any further -> the ids of each; of two that fit, the first wins.

    bos_token_id "<s>", pad_token_id "<pad>", eos_token_id "</s>", unk_token_id "<unk>",
    sep_token_id (end of turn) and image_token_id: the last four may be None. padding_side is the
    default of `batch`: "left" aligns the ends of all prompts, where generation continues.
    ValueError: no <s> or <pad>, or a control token that a text could become.
    """

    model_input_names = ["input_ids", "attention_mask"]
    SAVED = ("eos_token", "unk_token", "sep_token", "pad_token")  # tokenizer_config.json has them
    eos_token, unk_token, sep_token, pad_token = map(special_token, SAVED)
    image_token, bos_token = special_token("image_token"), fixed("bos_token", "<s>")
    truncation_side = fixed("truncation_side", "right")
    add_bos_token, add_eos_token = fixed("add_bos_token", True), fixed("add_eos_token", False)

    def __init__(self, path: str | Path, vocab: dict[str, int], text_bytes: dict[int, bytes],
                 whole: dict[str, list[int]]) -> None:
        self.path, self.vocab, self.vocabulary = Path(path), vocab, VocabularyMap(vocab)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self.padding_side = "left"
        if "<s>" not in vocab or "<pad>" not in vocab:
            raise ValueError(f"{path}: no <s> or no <pad> in it, so not a Chameleon vocabulary")
        for name, token_id in vocab.items():
            if token_id in text_bytes and (name in CONTROLS or IMAGE_TOKEN.fullmatch(name)):
                raise ValueError(f"{path}: a text could become {name}, which is a control token: "
                                 "take the tokenizer that came with the weights")
        self.bos_token_id, self.pad_token_id = vocab["<s>"], vocab["<pad>"]
        self.eos_token_id, self.unk_token_id = vocab.get("</s>"), vocab.get("<unk>")
        self.sep_token_id = self.vocabulary.end_of_turn_id
        self.image_token_id = self.vocabulary.image_token_id
        self._names: dict[int | None, str] = {i: name for name, i in vocab.items()}
        self._text_bytes, self._whole = text_bytes, whole
        pattern = "|".join(map(re.escape, whole)) or "(?!)"  # (?!) never matches
        self._split = re.compile(f"({pattern})").split
        self.special_ids = frozenset(vocab.values()).difference(text_bytes)
        self.all_special_ids = sorted(self.special_ids)
        self.all_special_tokens = [self._names[i] for i in self.all_special_ids]

    def text_ids(self, text: str) -> list[int]:
        """Text -> ids, without <s> and without any control id. ValueError for broken unicode.

        DIFFERS: in transformers "</s>", "IMGIMGABZ" or "<reserved08706>" in a prompt become control
        ids, so a prompt can inject them. Here they are tokenized like any other text, as
        `tokenizers` does with encode_special_tokens=True.
        """
        if not isinstance(text, str):
            raise ValueError(f"a text must be a string, not {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair
            raise ValueError(f"character {error.start + 1} of the text is not valid unicode"
                             ) from None
        ids = []
        for n, part in enumerate(self._split(text)):  # at odd n, a string of `whole`
            ids += self._whole[part] if n % 2 else self.plain_ids(part)
        return ids

    def plain_ids(self, text: str) -> list[int]:
        """Text that holds no string of `whole` -> ids."""
        raise NotImplementedError

    def encode(self, text: str, add_special_tokens: bool = True, **options) -> Any:
        """Text -> ids, with <s> in front unless told otherwise. With options, such as
        return_tensors, the input_ids of `tokenizer(text, **options)`.
        """
        if options:
            return self(text, add_special_tokens=add_special_tokens, **options)["input_ids"]
        return [self.bos_token_id] * add_special_tokens + self.text_ids(text)

    def __call__(self, text: str | list[str], *, add_special_tokens: bool = True,
                 return_tensors: str | None = None, **options) -> BatchFeature:
        """One text -> input_ids and attention_mask, lists (T,). Several, or return_tensors: (B, T).
        options: those of `batch`.
        """
        texts = text if isinstance(text, (list, tuple)) else [text]
        if not texts:
            raise ValueError("there is no text: give one, or a list of them")
        rows = [self.encode(one, add_special_tokens) for one in texts]
        data = self.batch(rows, return_tensors=return_tensors, **options)
        if isinstance(text, str) and return_tensors is None:
            return BatchFeature({name: rows[0] for name, rows in data.items()})
        return data

    def batch(self, rows: list[list[int]], labels: list[list[int]] | None = None, /, *,
              padding: bool | str | None = False, truncation: bool | str | None = False,
              max_length: int | None = None, padding_side: str | None = None,
              pad_to_multiple_of: int | None = None, return_tensors: str | None = None,
              return_attention_mask: bool | None = True) -> BatchFeature:
        """Rows of ids -> input_ids and attention_mask (1 id, 0 padding), (B, T) with
        return_tensors; labels, one for each id, are -100 on padding. The options are those of
        transformers' tokenizers; padding is True or "longest", "max_length", or False. ValueError
        for an impossible option, unequal lengths without padding, or a cut through a picture.
        """
        stay, length = lengths_of(rows, padding, truncation, max_length, pad_to_multiple_of)
        side = padding_side or self.padding_side
        if side not in ("left", "right"):
            raise ValueError(f"padding_side={side!r}: 'left' or 'right'")
        for n, row in enumerate(rows):
            if stay and self.vocabulary.end_image_id in row[stay:]:
                raise ValueError(f"max_length={stay} would cut a picture of prompt {n + 1}, which "
                                 f"has {len(row)} ids: raise it or shorten the text")
            if stay and labels and set(labels[n][:stay]) == {IGNORE}:
                raise ValueError(f"max_length={stay} leaves nothing of an answer: raise it, or "
                                 "shorten the prompt")
        columns = {"input_ids": (rows, self.pad_token_id)}  # name -> rows, and what pads them
        if return_attention_mask is not False:  # None, transformers' default, gives it
            columns["attention_mask"] = [[1] * len(row) for row in rows], 0
        if labels is not None:
            columns["labels"] = labels, IGNORE
        data = BatchFeature()
        for name, (values, filler) in columns.items():
            kept = [row[:stay] for row in values]
            fills = [[filler] * (length - len(row)) for row in kept]  # [] if that is negative
            data[name] = [fill + row if side == "left" else row + fill
                          for row, fill in zip(kept, fills)]
        if return_tensors is None:
            return data  # rows of any lengths
        lengths = [len(row) for row in data["input_ids"]]
        if len(set(lengths)) > 1:
            raise ValueError(f"the prompts have {min(lengths)} to {max(lengths)} ids: "
                             "pass padding=True to make them equal")
        return BatchFeature({name: stack([np.array(row, dtype=np.int64) for row in rows],
                                         return_tensors) for name, rows in data.items()})

    @property
    def special_tokens_map(self) -> dict[str, str]:
        names = ("bos_token", *self.SAVED, "image_token")
        return {name: token for name in names if (token := getattr(self, name)) is not None}

    def __len__(self) -> int:
        return self.vocab_size

    def get_vocab(self) -> dict[str, int]:
        return dict(self.vocab)

    def tokenize(self, text: str) -> list[str]:
        """Text -> the names of its tokens, as they stand in the vocabulary."""
        return [self._names[i] for i in self.text_ids(text)]

    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | None | list[int | None]:
        """A name or several -> ids; an unknown name is <unk>, as in transformers."""
        if isinstance(tokens, str):
            return self.vocab.get(tokens, self.unk_token_id)
        return [self.vocab.get(name, self.unk_token_id) for name in tokens]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        ids: Any = self.convert_tokens_to_ids(tokens)
        return self.decode(ids)

    def convert_ids_to_tokens(self, ids: int | Iterable[int]) -> str | list[str]:
        return self.name_of(ids) if isinstance(ids, int) else [self.name_of(i) for i in ids]

    def name_of(self, token_id: int) -> str:
        """Id -> name. ValueError for what is no id of this vocabulary."""
        try:
            return self._names[operator.index(token_id)]  # of an integer tensor, too
        except (KeyError, TypeError):
            raise ValueError(f"id {token_id!r:.40} is not in the vocabulary, which ends before "
                             f"{self.vocab_size}: tokenizer and model do not belong together"
                             ) from None

    def token_bytes(self, token_id: int) -> bytes:
        """Id -> bytes, which may end inside a character; of a control id, its name. ValueError if
        unknown.
        """
        name = self.name_of(token_id)
        return self._text_bytes.get(int(token_id), name.encode())

    def decode(self, token_ids: int | Iterable[int] | torch.Tensor,
               skip_special_tokens: bool = False,
               clean_up_tokenization_spaces: bool = False) -> str:
        """Ids (T,), or one id -> text. Bytes that are not utf-8 become U+FFFD. ValueError for
        unknown ids. clean_up_tokenization_spaces is accepted and ignored, as transformers 5 does
        for BPE.
        """
        given: Any = token_ids
        given = given.tolist() if hasattr(given, "tolist") else given  # one GPU synchronization
        given = [given] if isinstance(given, int) else list(given)
        if given and np.ndim(given[0]):
            raise ValueError("decode takes the ids of one text: use batch_decode for several rows")
        decoder = StreamDecoder(self, skip_special_tokens)
        return "".join(decoder.feed(token_id) for token_id in given) + decoder.flush()

    def batch_decode(self, sequences: Iterable, skip_special_tokens: bool = False,
                     clean_up_tokenization_spaces: bool = False) -> list[str]:
        """Ids (B, T), or B rows of different lengths -> B texts. One row (T,) -> one text."""
        rows = list(sequences)
        return [self.decode(ids, skip_special_tokens, clean_up_tokenization_spaces)
                for ids in ([rows] if rows and not np.ndim(rows[0]) else rows)]

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Copies the tokenizer's files, and writes those from which transformers gives the same
        ids, with the special tokens and the padding_side that were set.
        """
        from chameleon_extras.convert import write_for_transformers  # only to write files

        folder, tokens = Path(save_directory), self.special_tokens_map
        files = {self.path: f"tokenizer{self.path.suffix}"}
        for name in ("tokenizer_config.json", "chat_template.json", "chat_template.jinja"):
            files[self.path.with_name(name)] = name
        folder.mkdir(parents=True, exist_ok=True)
        for file, name in files.items():
            if file.is_file():
                (folder / name).write_bytes(file.read_bytes())
        write_for_transformers(folder)
        saved = {name: tokens[name] for name in self.SAVED if name in tokens}
        file = folder / "tokenizer_config.json"
        write_json(file, read_json(file) | saved | {"padding_side": self.padding_side})


class StreamDecoder:
    """Decodes one id at a time. The strings of `feed` and `flush`, joined, are Tokenizer.decode's.

    One character may need up to four ids. So the bytes of each id go through an incremental utf-8
    decoder, which holds back the bytes of an incomplete character.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._bytes_of = tokenizer.token_bytes
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        """One id -> the text that it completes, "" inside a character. ValueError: unknown id."""
        content = self._bytes_of(token_id)
        return "" if int(token_id) in self._skipped else self._utf8.decode(content)

    def flush(self) -> str:
        """To be called after the last id: U+FFFD if a character is incomplete, else ""."""
        return self._utf8.decode(b"", final=True)


# ---------------------------------------------------------------------------------------------
# Format 1 of 2: tokenizer.json, byte-level BPE. First the six splits of a text into words.

# Splits 1-3: names of sentinel tokens; names of image tokens (the release's pattern has the letters
# A to I only, so a name with a J is not split off); tabs, newlines, four spaces, two spaces. Each
# match becomes a piece, and so does the text between two matches.
STRUCTURE = re.compile(r"(<sentinel:[0-9]+>|IMGIMG[A-I]{1,4}Z|[\t\n]|    |  )")

# Splits 4-6 work on a piece's shape (see Shapes). 4: each number character. 5: each punctuation
# mark. 6: GPT-2's pattern, without its parts for numbers and "'s|'t|'re...": 4 and 5 took those.
# GPT-2's \s+(?!\S) leaves the last of several spaces to the next word. Here (?![LO]) is enough,
# because only words of L and O can begin with a space.
WORDS = re.compile(r"N|P| ?L+| ?O+|[ _]+(?![LO])|[ _]+")


class Shapes(dict):
    """Code point -> a letter for its class: str.translate turns "Hi, 5€" into the shape "LLP NO".

    L letter, N number, P punctuation, " " space, _ other white space, O everything else. Python's
    re has no \\p{L}, so WORDS matches shapes instead. Entries are computed when first needed.
    DIFFERS: a character newer than Python's unicodedata is O; `tokenizers` may know its class.
    """

    def __missing__(self, code_point: int) -> str:
        category = unicodedata.category(chr(code_point))[0]
        self[code_point] = category if category in "LNP" else "O"
        return self[code_point]


# Where the shape is not the category's first letter: code points in hexadecimal.
# _  Unicode's white space except " ". Python's \s and isspace would also accept U+001C..U+001F.
# P  The ASCII symbols $ + < = > ^ ` | ~, and two marks that were punctuation in unicode 8.
# O  Punctuation newer than unicode 8, up to unicode 17: `tokenizers` uses that of unicode 8.
EXCEPTIONS = {
    " ": "20",
    "_": "9-D 85 A0 1680 2000-200A 2028-2029 202F 205F 3000",
    "P": "24 2B 3C-3E 5E 60 7C 7E 166D 111C9",
    "O": """
        61D 9FD A76 C77 C84 1B4E-1B4F 1B7D-1B7F 2E43-2E4F 2E52-2E5D 2E60-2E63 10D6E 10EAD 10ED0
        10F55-10F59 10F86-10F89 113D4-113D5 113D7-113D8 1144B-1144F 1145A-1145B 1145D 11660-1166C
        116B9 1183B 11944-11946 119E2 11A3F-11A46 11A9A-11A9C 11A9E-11AA2 11B00-11B09 11BE1
        11C41-11C45 11C70-11C71 11EF7-11EF8 11F43-11F4F 11FFF 12FF1-12FF2 16D6D-16D6F 16E97-16E9A
        16FE2 1E5FF 1E95E-1E95F""",
}
SHAPES = Shapes({code_point: shape for shape, ranges in EXCEPTIONS.items()
                 for first, last in re.findall(r"(\w+)-?(\w*)", ranges)
                 for code_point in range(int(first, 16), int(last or first, 16) + 1)})


def split_words(text: str) -> Iterator[str]:
    """Text -> words, by all six splits: "a 12  b!" -> "a", " ", "1", "2", "  ", "b", "!"."""
    for piece in STRUCTURE.split(text):
        for match in WORDS.finditer(piece.translate(SHAPES)):
            yield piece[match.start() : match.end()]


def byte_characters() -> list[str]:
    """GPT-2's table from byte to character, with which any bytes have a printable name.

    Printable latin-1 bytes are their own characters. The other 68 become U+0100, U+0101, ...
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = map(chr, range(0x100, 0x200))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


class ByteLevelBPE(Tokenizer):
    """The release's format: text -> words (six splits) -> bytes -> merges, lowest rank first.

    The file supplies vocabulary, merges and added tokens. Its description of the splits is ignored,
    because those above are fixed. There is no unicode normalization and no added space in front.
    ValueError if the file is not of this format. Sources: section 2.1 (BPE, arXiv 1508.07909);
    GPT-2's byte level; the file format of `tokenizers`.
    """

    CACHED_WORDS, CACHED_LETTERS = 65536, 64  # limits of the cache: words, letters per word

    def __init__(self, path: str | Path) -> None:
        data = read_json(Path(path))
        byte_of = {character: byte for byte, character in enumerate(byte_characters())}
        try:
            vocab = dict(data["model"]["vocab"].items())  # AttributeError if it is no object
            added = data.get("added_tokens") or []
            # Words that somebody has added to the vocabulary (transformers' `add_tokens`).
            new = {token["content"] for token in added
                   if token["content"] not in vocab and token.get("special") is False}
            if any(token.get(rule) for token in added if token["content"] in new
                   for rule in ("single_word", "lstrip", "rstrip")):
                raise ValueError("an added word has single_word, lstrip or rstrip, which are not "
                                 "read")
            vocab |= {token["content"]: token["id"] for token in added}
            check_ids(vocab)
            self._ranks = {}  # (left name, right name) -> rank of this merge, its place in the file
            joined = []  # the names that merges make
            for rank, pair in enumerate(data["model"]["merges"]):
                # "a b" or ["a", "b"], depending on the version of `tokenizers` that wrote the file
                left, right = pair.split(" ") if isinstance(pair, str) else pair
                _ = vocab[left], vocab[right], vocab[left + right]  # KeyError if one has no id
                self._ranks[left, right] = rank
                joined.append(left + right)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}: not a BPE tokenizer with a vocabulary and merges to match "
                             f"({type(error).__name__}: {error})") from None
        if not set("".join(joined)) <= byte_of.keys() <= vocab.keys():
            raise ValueError(f"{path}: some of the 256 byte tokens are missing, not byte-level BPE "
                             "(put the tokenizer.model that it was made from beside it)")
        # The ids that a text can become: those of bytes, of what merges join, and of added words.
        text_bytes = {vocab[name]: bytes(byte_of[letter] for letter in name)
                      for name in (*byte_of, *joined)} | {vocab[w]: w.encode() for w in new}
        self._characters, self._cache = [*byte_of], {}
        super().__init__(path, vocab, text_bytes, {
            word: [vocab[word]] for word in sorted(new, key=len, reverse=True)})

    def plain_ids(self, text: str) -> list[int]:
        return [i for word in split_words(text) for i in self.word_ids(word)]

    def word_ids(self, word: str) -> list[int]:
        """Word -> ids, from the cache if possible: words repeat, and merging takes most time."""
        ids = self._cache.get(word)
        if ids is None:
            names = self.merge([self._characters[byte] for byte in word.encode()])
            ids = [self.vocab[name] for name in names]
            if len(self._cache) >= self.CACHED_WORDS:
                self._cache.clear()
            if len(word) <= self.CACHED_LETTERS:
                self._cache[word] = ids
        return ids

    def merge(self, names: list[str]) -> list[str]:
        """Names of a word's bytes -> names after all merges (BPE, arXiv 1508.07909).

        The lowest rank goes first, and of equal ranks the leftmost. With the word as a linked list
        and the possible merges in a heap this takes n log n steps. Searching the whole word after
        each merge would take n^2: minutes for 100,000 letters.
        """
        names, end = list(names), len(names)
        before, after = list(range(-1, end - 1)), list(range(1, end + 1))
        heap = []

        def rank(i: int) -> int | None:
            """The rank of the merge of i and its neighbour; None if there is no such merge."""
            return self._ranks.get((names[i], names[after[i]])) if after[i] < end else None

        def offer(i: int) -> None:
            if i >= 0 and (lowest := rank(i)) is not None:
                heapq.heappush(heap, (lowest, i))

        for i in range(end):
            offer(i)
        while heap:
            lowest, i = heapq.heappop(heap)
            # Skip this merge if i has been merged away ("") or a neighbour has changed since.
            if rank(i) != lowest:
                continue
            j = after[i]
            names[i], names[j] = names[i] + names[j], ""
            after[i] = after[j]
            if after[j] < end:
                before[after[j]] = i
            offer(before[i])
            offer(i)
        return [name for name in names if name]


# ---------------------------------------------------------------------------------------------
# Format 2 of 2: tokenizer.model, sentencepiece


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece BPE model with byte fallback: the format of the small checkpoint in tiny/.

    DIFFERS: the release has format 1. sentencepiece writes a space as U+2581 and would decode a
    U+2581 of the text as a space. Here that character is encoded as its three bytes, and is kept.
    ValueError if the file is no sentencepiece model, or one that does not keep every text as it is.
    """

    SPACE = "\u2581"  # what sentencepiece writes for a space

    def __init__(self, path: str | Path) -> None:
        from sentencepiece import SentencePieceProcessor  # the release does not need it

        try:
            content = Path(path).read_bytes() or b"empty"  # it accepts b"", but refuses b"empty"
            self._model = model = SentencePieceProcessor(model_proto=content)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
        except RuntimeError:
            raise ValueError(f"{path}: not a sentencepiece model, or one cut short") from None
        vocab = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
        text_bytes = {
            i: bytes([int(name[3:5], 16)]) if model.is_byte(i)  # "<0x41>"
            else name.replace(self.SPACE, " ").encode() for name, i in vocab.items()
            if not (model.is_control(i) or model.is_unknown(i) or model.is_unused(i))}
        as_bytes = [vocab.get(f"<0x{byte:02X}>", -1) for byte in self.SPACE.encode()]
        super().__init__(path, vocab, text_bytes, {self.SPACE: as_bytes})
        probe = "  A \n\ufb01"  # normalization or a dummy prefix would change it
        if -1 in as_bytes or self.decode(self.text_ids(probe)) != probe:
            raise ValueError(f"{path}: this sentencepiece model does not keep a text as it is: "
                             f"train it with byte_fallback, no normalisation, no dummy prefix")

    def plain_ids(self, text: str) -> list[int]:
        return self._model.encode(text)


TOKENIZER_FILES = {
    "tokenizer.model": SentencePieceTokenizer,  # first: the tokenizer.json beside it is its copy
    "tokenizer.json": ByteLevelBPE,  # transformers' conversion
    "text_tokenizer.json": ByteLevelBPE,  # Meta's release
    "tokenizer/text_tokenizer.json": ByteLevelBPE,  # the same, from the release's root folder
}


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder, by the name of its file. ValueError if it has none."""
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such folder (give the folder of a checkpoint)")
    for name, kind in TOKENIZER_FILES.items():
        if (Path(folder) / name).is_file():
            tokenizer, config = kind(Path(folder) / name), Path(folder) / "tokenizer_config.json"
            values = read_json(config) if config.is_file() else {}
            tokenizer.padding_side = values.get("padding_side", tokenizer.padding_side)
            for role in Tokenizer.SAVED:
                token = values.get(role)
                if isinstance(token, dict):  # written by transformers 4
                    token = token.get("content")
                # An unknown pad_token raises ValueError here; other unknown names are ignored.
                if isinstance(token, str) and token and (token in tokenizer.vocab
                                                         or role == "pad_token"):
                    setattr(tokenizer, role, token)
            return tokenizer
    raise ValueError(f"{folder}: no tokenizer in it, one of {', '.join(TOKENIZER_FILES)} is wanted")


class AutoTokenizer:
    """transformers' name for "the tokenizer of a folder or a hub id, whatever its format"."""

    @staticmethod
    def from_pretrained(folder: str | Path, padding_side: str | None = None,
                        **hub: object) -> Tokenizer:
        from chameleon_extras.files import find_folder  # only to find files

        tokenizer = load_tokenizer(find_folder(folder, False, **hub))
        tokenizer.padding_side = padding_side or tokenizer.padding_side
        return tokenizer
