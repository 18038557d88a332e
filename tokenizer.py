"""Chameleon's vocabulary: text and pictures become one sequence of ids, and ids become text again.

    "What is this?<image>"                            picture
             |                                           |
    Tokenizer.encode, piece by piece          ChameleonImageProcessor (image_processor.py)
             |                                           |
    <s> What is this ? <racm3:break> <image> x S <eoss> <reserved08706>
             |                                           |
    input_ids (B, T), attention_mask (B, T)      pixel_values (N, 3, H, W)
             |                                           |
             |              ids by name <-- codes (N, S) of the VQ-VAE, in place of <image> x S
             '------------------------- model -----------'
                                          |
                  ids --> bytes --> text: Tokenizer.decode, or StreamDecoder id by id

Glossary
    B, T    prompts in a batch, ids in a row          N, S   pictures in a batch, codes per picture
    K       codes of the codebook (8192)              V      ids of the vocabulary (65536)
    code    0..K-1, a row of the VQ-VAE's codebook    id     0..V-1, a row of the embedding table
    token   what an id stands for                     piece  a part of a text, split for tokenizing

What differs from the tokenizer of a text-only Llama
    - K ids are codes of pictures. Code 53 is the id NAMED "IMGIMGFDZ" (A..J are the digits 0..9):
      ids are found by name here, never computed as code + 4.
    - Byte-level BPE after six splits; every digit and every punctuation mark is a token of its own.
    - Text never becomes a control id, however it is spelled. Only "<image>" means something, and
      ChameleonProcessor, not the tokenizer, gives it its meaning.
    - A prompt ends with the end-of-turn id for a chat, and without it for completion.

Sources: arXiv 2405.09818 section 2.1; the documentation of transformers'
ChameleonProcessor; the published names and split patterns of the release's tokenizer.
"""

import codecs
import heapq
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from image_processor import (
    BatchFeature,
    ChameleonImageProcessor,
    Picture,
    Pictures,
    Stacked,
    flat_pictures,
    load_image,
    read_json,
    stack,
    write_json,
)

__all__ = ["BatchFeature", "ByteLevelBPE", "ChameleonImageProcessor", "ChameleonProcessor",
           "SentencePieceTokenizer", "StreamDecoder", "Tokenizer", "VocabularyMap", "load_image",
           "load_tokenizer"]

BEGIN_IMAGE, END_IMAGE, END_OF_TURN = "<racm3:break>", "<eoss>", "<reserved08706>"
IMAGE_PLACEHOLDERS = ("<image>", "<reserved08707>")  # HF's name, and Meta's for the same id
IMAGE_TOKEN = re.compile("IMGIMG(A|[B-J][A-J]*)Z")


# -------------------------------------------------------------------------- codes <-> names <-> ids


def image_token_name(code: int) -> str:
    """53 -> "IMGIMGFDZ": the decimal digits as letters A..J, without zero padding."""
    return f"IMGIMG{''.join('ABCDEFGHIJ'[int(digit)] for digit in str(code))}Z"


def image_code_from_name(name: str) -> int | None:
    """ "IMGIMGFDZ" -> 53; None for a name that image_token_name never gives."""
    if not IMAGE_TOKEN.fullmatch(name):
        return None
    return int("".join(str("ABCDEFGHIJ".index(letter)) for letter in name[6:-1]))


class VocabularyMap:
    """Names -> ids, and the bijection between codes (codebook) and ids (vocabulary).

    vocabulary_map: name -> id, as in config.json; None or {} makes a map without image tokens.
    Attributes: num_codes K, code_to_id (K,) int64; image_token_id, begin_image_id, end_image_id,
    end_of_turn_id, each None if the name is absent. ValueError unless the codes are exactly 0..K-1.
    Source: transformers' ChameleonImageVocabularyMapping.
    """

    def __init__(self, vocabulary_map: dict[str, int] | None = None):
        names = vocabulary_map or {}
        self.image_token_id = next((names[n] for n in IMAGE_PLACEHOLDERS if n in names), None)
        self.begin_image_id, self.end_image_id = names.get(BEGIN_IMAGE), names.get(END_IMAGE)
        self.end_of_turn_id = names.get(END_OF_TURN)

        ids = {image_code_from_name(name): token_id for name, token_id in names.items()}
        ids.pop(None, None)  # all the names that are no image token's
        missing = [code for code in range(len(ids)) if code not in ids]
        if missing:
            raise ValueError(f"the vocabulary has {len(ids)} image tokens, but none is named "
                             f"{image_token_name(missing[0])}: codes must be 0..K-1 without a gap")
        if len({i for i in ids.values() if isinstance(i, int) and i >= 0}) != len(ids):
            raise ValueError("image tokens must have an id each, whole, not negative, none twice")
        # By name. In the release id = code + 4 happens to hold; a converted model may reorder.
        # Always on the CPU: a model under construction on the "meta" device has no numbers.
        ordered = [ids[code] for code in range(len(ids))]
        self.code_to_id = torch.tensor(ordered, dtype=torch.long, device="cpu")  # (K,)
        self.num_codes = len(ordered)
        # The inverse table; -1 for ids that are no image token, and a last -1 for ids beyond it.
        size = max(ordered, default=-1) + 2
        self._id_to_code = torch.full((size,), -1, dtype=torch.long, device="cpu")
        self._id_to_code[self.code_to_id] = torch.arange(self.num_codes, device="cpu")

    def ids_from_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes of any shape -> ids, same shape and device. ValueError outside 0..K-1."""
        codes = torch.as_tensor(codes).long()
        # Unchecked, a negative code would index from the end and look right.
        if codes.numel() and not 0 <= codes.min() <= codes.max() < self.num_codes:
            raise ValueError(f"image codes are 0..{self.num_codes - 1}, these are "
                             f"{int(codes.min())}..{int(codes.max())}: are they ids already?")
        return self.code_to_id.to(codes.device)[codes]

    def codes_from_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids of any shape -> codes, same shape and device. ValueError on an id that is no code."""
        ids = torch.as_tensor(ids).long()
        beyond = len(self._id_to_code) - 1
        inside = torch.where((ids >= 0) & (ids < beyond), ids, beyond)
        codes = self._id_to_code.to(ids.device)[inside]
        if (codes < 0).any():
            raise ValueError(f"id {int(ids[codes < 0][0])} is no image token: pass a picture's ids")
        return codes


# ------------------------------------------------------------------------------------- text <-> ids


class Tokenizer:
    """What both file formats share; they supply encode, and the bytes a name stands for.

    vocab: name -> id. special_ids: the control ids, which encode never gives. bos_token_id "<s>",
    pad_token_id "<pad>", eos_token_id "</s>", unk_token_id "<unk>", sep_token_id (end of turn) and
    image_token_id; all but the first two may be None. padding_side is for ChameleonProcessor:
    "left" puts every prompt's last id into the last column, where generation goes on.
    """

    def __init__(self, path: str | Path, vocab: dict[str, int], special_ids: Iterable[int]):
        self.path, self.vocab, self.vocabulary = Path(path), vocab, VocabularyMap(vocab)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self.special_ids = frozenset(special_ids)
        self.padding_side = "left"
        # <s> is id 0 in the release: ask `is None`, never for truth.
        self.bos_token_id, self.pad_token_id = vocab.get("<s>"), vocab.get("<pad>")
        self.eos_token_id, self.unk_token_id = vocab.get("</s>"), vocab.get("<unk>")
        self.sep_token_id = self.vocabulary.end_of_turn_id
        self.image_token_id = self.vocabulary.image_token_id
        if self.bos_token_id is None or self.pad_token_id is None:
            raise ValueError(f"{path}: no <s> or no <pad> in it, so not a Chameleon vocabulary")
        self._names = {token_id: name for name, token_id in vocab.items()}

    def encode(self, text: str) -> list[int]:
        """Text -> ids, without <s>. Never a control id, whatever the text.

        DIFFERS: transformers parses "</s>", "IMGIMGABZ" or "<reserved08706>" in a prompt, so that a
        prompt can inject control ids. Here they are letters (tokenizers' encode_special_tokens).
        """
        raise NotImplementedError

    def text_bytes(self, name: str) -> bytes:
        """Name of a text token -> the utf-8 bytes it stands for."""
        raise NotImplementedError

    def token_bytes(self, token_id: int) -> bytes:
        """Id -> bytes: of a text token, maybe half a character; of a control token, its name."""
        token_id = int(token_id)
        if token_id not in self._names:
            raise ValueError(f"id {token_id} is not in the vocabulary, which ends before "
                             f"{self.vocab_size}: tokenizer and model do not belong together")
        name = self._names[token_id]
        return name.encode() if token_id in self.special_ids else self.text_bytes(name)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Ids (T,), a list, array or tensor -> text; bytes that are not utf-8 become U+FFFD."""
        if getattr(ids, "ndim", 1) != 1:
            raise ValueError(f"decode takes ids (T,), not {tuple(ids.shape)}: use batch_decode")
        decoder = self.stream_decoder(skip_special_tokens)
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        return "".join(decoder.feed(token_id) for token_id in ids) + decoder.flush()

    def batch_decode(self, batch: Iterable, skip_special_tokens: bool = True) -> list[str]:
        """Ids (B, T), or B rows of any lengths -> B texts."""
        return [self.decode(ids, skip_special_tokens) for ids in batch]

    def stream_decoder(self, skip_special_tokens: bool = True) -> "StreamDecoder":
        """A decoder to feed one id at a time."""
        return StreamDecoder(self, skip_special_tokens)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer's file, byte for byte, under the name that transformers expects."""
        content = self.path.read_bytes()
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"tokenizer{self.path.suffix}").write_bytes(content)


class StreamDecoder:
    """Ids in, text out as soon as it is whole: all pieces joined equal Tokenizer.decode.

    One character may be spread over four ids, so ids are never decoded to text one by one: their
    bytes are, by a utf-8 decoder that keeps an unfinished character back.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._bytes_of = tokenizer.token_bytes
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        """The text that this id completes, "" if it ends in the middle of a character."""
        content = self._bytes_of(token_id)
        return "" if int(token_id) in self._skipped else self._utf8.decode(content)

    def flush(self) -> str:
        """At the end: U+FFFD for a character that was never completed, else ""."""
        return self._utf8.decode(b"", final=True)


def check_text(text: str) -> None:
    """ValueError for a string that utf-8 cannot hold (half a surrogate pair)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start + 1} of the text is not valid unicode") from None


# --- format 1 of 2: tokenizer.json, byte-level BPE. First how a text is split into words.

# Splits 1-3 work on the text: sentinels; names of image tokens (J is missing upstream); tabs,
# newlines, four spaces, two spaces. What matches becomes a piece, and so does what is between.
STRUCTURE = re.compile(r"(<sentinel:[0-9]+>|IMGIMG[A-I]{1,4}Z|[\t\n]|    |  )")

# Splits 4-6 work on the piece's shape (see Shapes): every number character; every punctuation mark;
# then GPT-2's pattern, of which this much is left: its "'s|'t|'re..." and its numbers cannot match
# any more. GPT-2's \s+(?!\S) leaves the last of several spaces to the word that follows; a number
# or a punctuation mark has ended the piece by then, so only L and O count as following.
WORDS = re.compile(r"N|P| ?L+| ?O+|[ _]+(?![LO])|[ _]+")

# Unicode's white space but for " ". Python's \s and isspace also accept U+001C..U+001F.
WHITE_SPACE = set("\t\n\v\f\r\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | set(
    map(chr, range(0x2000, 0x200B)))

# `tokenizers` knows the punctuation of unicode 8. Later marks (hexadecimal, up to unicode 17) are
# no punctuation to it, two that have changed their category since still are.
NEWER_PUNCTUATION = {
    chr(code_point)
    for first, last in re.findall(r"(\w+)-?(\w*)", """
        61D 9FD A76 C77 C84 1B4E-1B4F 1B7D-1B7F 2E43-2E4F 2E52-2E5D 2E60-2E63 10D6E 10EAD 10ED0
        10F55-10F59 10F86-10F89 113D4-113D5 113D7-113D8 1144B-1144F 1145A-1145B 1145D 11660-1166C
        116B9 1183B 11944-11946 119E2 11A3F-11A46 11A9A-11A9C 11A9E-11AA2 11B00-11B09 11BE1
        11C41-11C45 11C70-11C71 11EF7-11EF8 11F43-11F4F 11FFF 12FF1-12FF2 16D6D-16D6F 16E97-16E9A
        16FE2 1E5FF 1E95E-1E95F""")
    for code_point in range(int(first, 16), int(last or first, 16) + 1)
}
FORMER_PUNCTUATION = {"\u166d", "\U000111c9"}


class Shapes(dict):
    """Code point -> a letter for its class, so that str.translate turns "Hi, 5€" into "LLP NO".

    L letter, N number, P punctuation, " " space, _ other white space, O all else. Python's re knows
    no \\p{L}; on the shape it need not. Filled as characters turn up: unicode has a million.
    """

    def __missing__(self, code_point: int) -> str:
        self[code_point] = self.classify(chr(code_point))
        return self[code_point]

    @staticmethod
    def classify(character: str) -> str:
        if character == " ":
            return " "
        if character in WHITE_SPACE:
            return "_"
        category = unicodedata.category(character)[0]
        # The symbols of ascii, $ + < = > ^ ` | ~, count as punctuation.
        if (character.isascii() and category == "S") or character in FORMER_PUNCTUATION:
            return "P"
        return category if category in "LNP" and character not in NEWER_PUNCTUATION else "O"


SHAPES = Shapes()


def split_words(text: str) -> Iterator[str]:
    """All six splits: "a 12  b!" -> "a", " ", "1", "2", "  ", "b", "!". No merge crosses a word."""
    for piece in STRUCTURE.split(text):
        for match in WORDS.finditer(piece.translate(SHAPES)):
            yield piece[match.start() : match.end()]


def byte_characters() -> list[str]:
    """GPT-2's byte -> character table, which makes any bytes a printable name.

    The printable latin-1 bytes stand for themselves, the other 68 for U+0100, U+0101, ... in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = map(chr, range(0x100, 0x200))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


class ByteLevelBPE(Tokenizer):
    """The release's format: the six splits above, then bytes, then merges in rank order.

    Only vocabulary, merges and added tokens are read from the file; the splits are those above,
    whatever the file says. No unicode normalisation, no space put in front. ValueError for other
    files. Source: the format of `tokenizers`; byte-level BPE as in GPT-2.
    """

    CACHED_WORDS, CACHED_LETTERS = 65536, 64  # at most so many words of at most so many letters

    def __init__(self, path: str | Path):
        vocab, merges = read_bpe(Path(path))
        characters = byte_characters()
        if not vocab.keys() >= set(characters):
            raise ValueError(f"{path}: some of the 256 byte tokens are missing, not byte-level BPE")
        self._byte_ids = [vocab[character] for character in characters]
        self._bytes = {character: byte for byte, character in enumerate(characters)}
        self._merges = merges  # (left id, right id) -> (rank, id of both joined)
        text_ids = {*self._byte_ids, *(joined for _, joined in merges.values())}
        # Control ids are those that no text leads to: sounder than flags or "starts with <".
        super().__init__(path, vocab, set(vocab.values()) - text_ids)
        self._cache = {}

    def encode(self, text: str) -> list[int]:
        check_text(text)
        return [token_id for word in split_words(text) for token_id in self.word_ids(word)]

    def word_ids(self, word: str) -> list[int]:
        """Ids of one word. Words repeat, so that remembering them is several times as fast."""
        ids = self._cache.get(word)
        if ids is None:
            ids = self.merge([self._byte_ids[byte] for byte in word.encode()])
            if len(self._cache) >= self.CACHED_WORDS:
                self._cache.clear()
            if len(word) <= self.CACHED_LETTERS:
                self._cache[word] = ids
        return ids

    def merge(self, ids: list[int]) -> list[int]:
        """Ids of a word's bytes -> ids after all merges: lowest rank first, then leftmost.

        A linked list for the word and a heap for the offers: n log n. Looking through the word
        again for each merge is n^2, minutes for one "word" of 100,000 letters.
        """
        ids, end = list(ids), len(ids)
        before, after = list(range(-1, end - 1)), list(range(1, end + 1))
        heap = []

        def offer(i: int) -> None:
            if i >= 0 and after[i] < end and (ids[i], ids[after[i]]) in self._merges:
                rank, joined = self._merges[ids[i], ids[after[i]]]
                heapq.heappush(heap, (rank, i, joined))

        for i in range(end):
            offer(i)
        while heap:
            rank, i, joined = heapq.heappop(heap)
            j = after[i]
            # An offer is stale if i is gone (None) or a neighbour has changed since.
            if j == end or self._merges.get((ids[i], ids[j])) != (rank, joined):
                continue
            ids[i], ids[j] = joined, None
            after[i] = after[j]
            if after[j] < end:
                before[after[j]] = i
            offer(before[i])
            offer(i)
        return [token_id for token_id in ids if token_id is not None]

    def text_bytes(self, name: str) -> bytes:
        return bytes(self._bytes[character] for character in name)


def read_bpe(path: Path) -> tuple[dict[str, int], dict[tuple[int, int], tuple[int, int]]]:
    """tokenizer.json -> vocabulary {name: id} and merges {(left id, right id): (rank, joined id)}.

    The rank is the merge's place in the file: the lower, the earlier it was learned.
    """
    data = read_json(path)
    try:
        vocab = {name: int(token_id) for name, token_id in data["model"]["vocab"].items()}
        vocab |= {token["content"]: int(token["id"]) for token in data.get("added_tokens") or []}
        merges = {}
        for rank, pair in enumerate(data["model"]["merges"]):
            # "a b" or ["a", "b"], by the version of `tokenizers` that wrote the file
            left, right = pair.split(" ") if isinstance(pair, str) else pair
            merges[vocab[left], vocab[right]] = (rank, vocab[left + right])
        return vocab, merges
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a BPE tokenizer with a vocabulary and merges to match "
                         f"({type(error).__name__}: {error})") from None


# --- format 2 of 2: tokenizer.model, sentencepiece


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece BPE model with byte fallback: the format of the project's small checkpoint.

    DIFFERS: the release's tokenizer is the other format. sentencepiece writes a space as U+2581 and
    so reads U+2581 back as a space; here a U+2581 in the text is spelled as its three bytes.
    """

    SPACE = "\u2581"  # sentencepiece's sign for a space

    def __init__(self, path: str | Path):
        from sentencepiece import SentencePieceProcessor  # here: the release does not need it

        try:
            self._model = model = SentencePieceProcessor(model_proto=Path(path).read_bytes())
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
        except RuntimeError:
            raise ValueError(f"{path}: not a sentencepiece model, or one cut short") from None
        ids = range(model.get_piece_size())
        special = [i for i in ids
                   if model.is_control(i) or model.is_unknown(i) or model.is_unused(i)]
        super().__init__(path, {model.id_to_piece(i): i for i in ids}, special)
        self._byte_ids = [self.vocab.get(f"<0x{byte:02X}>") for byte in range(256)]
        probe = "  A \n\ufb01"  # what a normaliser or a dummy prefix would change
        if None in self._byte_ids or self.decode(self.encode(probe)) != probe:
            raise ValueError(f"{path}: this sentencepiece model does not keep a text as it is: "
                             f"train it with byte_fallback, no normalisation, no dummy prefix")

    def encode(self, text: str) -> list[int]:
        check_text(text)
        ids = []
        for n, part in enumerate(text.split(self.SPACE)):
            if n:
                ids += [self._byte_ids[byte] for byte in self.SPACE.encode()]
            ids += self._model.encode(part)
        return ids

    def text_bytes(self, name: str) -> bytes:
        if self._model.is_byte(self.vocab[name]):  # "<0x41>"
            return bytes([int(name[3:5], 16)])
        return name.replace(self.SPACE, " ").encode()


TOKENIZER_FILES = {
    "tokenizer.json": ByteLevelBPE,  # transformers' conversion
    "text_tokenizer.json": ByteLevelBPE,  # Meta's release
    "tokenizer/text_tokenizer.json": ByteLevelBPE,  # the same, seen from the release's root
    "tokenizer.model": SentencePieceTokenizer,
}


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder, by the file it holds; ValueError if it holds none."""
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such folder (give the folder of a checkpoint)")
    for name, kind in TOKENIZER_FILES.items():
        if (Path(folder) / name).is_file():
            return kind(Path(folder) / name)
    raise ValueError(f"{folder}: no tokenizer in it, one of {', '.join(TOKENIZER_FILES)} is wanted")


# ------------------------------------------------------------------------ text and pictures joined


class ChameleonProcessor:
    """Prompts with "<image>" in them, and pictures -> what the model's forward takes.

    image_seq_length is S, the codes per picture: 1024 = (512 / 16)^2, as the VQ-VAE halves the
    picture four times. image_token is the text that marks a picture's place.
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
