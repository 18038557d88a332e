"""Chameleon's vocabulary: text becomes ids and ids become text; codes of pictures have names.

    "What is this?" --Tokenizer.encode--> ids --model--> ids --decode, or StreamDecoder--> text
    codes (N, S) of the VQ-VAE --VocabularyMap, by name--> ids

processor.py puts text and pictures together into one row.

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

Sources: arXiv 2405.09818 section 2.1; the published names and split patterns of the release's
tokenizer.
"""

import codecs
import heapq
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

BEGIN_IMAGE, END_IMAGE, END_OF_TURN = "<racm3:break>", "<eoss>", "<reserved08706>"
IMAGE_PLACEHOLDERS = ("<image>", "<reserved08707>")  # HF's name, and Meta's for the same id
IMAGE_TOKEN = re.compile("IMGIMG(A|[B-J][A-J]*)Z")


# ------------------------------------------------------- JSON files, for this file and those above


def read_json(file: Path) -> dict:
    """A JSON object from a file; ValueError naming the file otherwise."""
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
    """Write a JSON object, with sorted keys, into a folder that need not exist yet."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# -------------------------------------------------------------------------- codes <-> names <-> ids


def image_token_name(code: int) -> str:
    """53 -> "IMGIMGFDZ": the decimal digits as letters A..J, without zero padding."""
    return f"IMGIMG{''.join('ABCDEFGHIJ'[int(digit)] for digit in str(code))}Z"


def image_code_from_name(name: str) -> int | None:
    """ "IMGIMGFDZ" -> 53; None for a name that image_token_name never gives."""
    if not IMAGE_TOKEN.fullmatch(name):
        return None
    return int("".join(str("ABCDEFGHIJ".index(letter)) for letter in name[6:-1]))


class VocabularyMap(torch.nn.Module):
    """Names -> ids, and the one table between codes (codebook) and ids (vocabulary).

    vocabulary_map: name -> id, as in config.json; None or {} makes a map without image tokens.
    Attributes: num_codes K, code_to_id (K,) int64; image_token_id, begin_image_id, end_image_id,
    end_of_turn_id, each None if the name is absent. ValueError unless the codes are exactly 0..K-1.

    It is a module only so that its two tables move to the model's device with the model; neither
    is part of a checkpoint. Source: transformers' ChameleonImageVocabularyMapping.
    """

    def __init__(self, vocabulary_map: dict[str, int] | None = None) -> None:
        super().__init__()
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
        # On the CPU: while a model is built on the "meta" device, tensors there hold no numbers.
        ordered = torch.tensor([ids[code] for code in range(len(ids))], dtype=torch.long,
                               device="cpu")  # (K,)
        self.num_codes, beyond = len(ids), max(ids.values(), default=-1) + 1
        # The inverse table: -1 for ids that are no image token, and a last -1 for ids beyond it.
        inverse = torch.full((beyond + 1,), -1, dtype=torch.long, device="cpu")
        inverse[ordered] = torch.arange(self.num_codes, device="cpu")
        self.register_buffer("code_to_id", ordered, persistent=False)
        self.register_buffer("id_to_code", inverse, persistent=False)

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
        beyond = len(self.id_to_code) - 1
        inside = torch.where((ids >= 0) & (ids < beyond), ids, beyond)
        codes = self.id_to_code.to(ids.device)[inside]
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
    "tokenizer.model": SentencePieceTokenizer,  # first: a tokenizer.json beside it is made from it
    "tokenizer.json": ByteLevelBPE,  # transformers' conversion
    "text_tokenizer.json": ByteLevelBPE,  # Meta's release
    "tokenizer/text_tokenizer.json": ByteLevelBPE,  # the same, seen from the release's root
}


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder, by the file it holds; ValueError if it holds none."""
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such folder (give the folder of a checkpoint)")
    for name, kind in TOKENIZER_FILES.items():
        if (Path(folder) / name).is_file():
            return kind(Path(folder) / name)
    raise ValueError(f"{folder}: no tokenizer in it, one of {', '.join(TOKENIZER_FILES)} is wanted")
