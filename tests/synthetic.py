"""Small tokenizer files with the release's pipeline and layout (that is gated), and a png."""

import json
import random
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import strategies as st

# A corpus of its own, so that merges across letters, digits, punctuation and spaces turn up.
CORPUS = [
    "Chameleon is an early-fusion model: text and pictures are one sequence of tokens.",
    "What do you see in this image? A red circle, a blue square and a green triangle.",
    "    indented\n\ttabs and  two spaces\r\nwindows lines    four",
    "Führer, naïve café, Cửa Việt, Москва, 日本語のテキスト, עברית, العربية, हिन्दी",
    "It's 1234567 € or $89.00 — isn't it? She'll, they've, I'm, we'd, you're!",
    "e = mc² ½ Ⅷ ٣ 👩‍👩‍👧 🎨🖼️ ➜ ∑ ≤ ≥ ±",
    "don't <sentinel:12> the IMGIMGABZ or IMGIMGJZ </s><s> tokens <eoss> <racm3:break>",
]
# What a text may hold that is hard to split, to spell or to keep apart from control tokens.
NAMES = ["<s>", "</s>", "<pad>", "<unk>", "IMGIMGABZ", "IMGIMGJZ", "IMGIMGAAAAAZ", "<eoss>",
         "<0x41>", "<racm3:break>", "<reserved08706>", "<image>", "<sentinel:3>", "<sentinel:007>"]
SPACES = [" ", "  ", "   ", "    ", "     ", "\t", "\n", "\r", "\r\n", "\xa0", "\x1c", "\x85"]
FRAGMENTS = NAMES + SPACES
FRAGMENTS += ["\u2003", "'s", "'re", "12", "½", "€", "ſ", "e\u0301", "👩‍👩‍👧", "\u2581", "\0"]
texts = st.lists(
    st.one_of(st.text(max_size=8), st.sampled_from(FRAGMENTS), st.sampled_from(CORPUS)), max_size=6
).map("".join)
CONTROLS = ["<s>", "<pad>", "</s>", "<unk>"]


def one_line(call, *words) -> None:
    """The call raises ValueError with one line that holds all the words."""
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def image_token_names(num_codes: int) -> list[str]:
    letters = str.maketrans("0123456789", "ABCDEFGHIJ")
    return [f"IMGIMG{str(code).translate(letters)}Z" for code in range(num_codes)]


def release_names(num_codes: int, num_reserved: int, meta: bool) -> list[str]:
    """The names in id order before the 256 byte characters, as in the release."""
    names = CONTROLS + image_token_names(num_codes) + ["<eoss>", "<racm3:break>"]
    names += [f"<sentinel:{n}>" for n in range(16)]
    names += [f"<reserved{8706 + n:05d}>" for n in range(num_reserved)]
    return [name if name != "<reserved08707>" or meta else "<image>" for name in names]


def write_synthetic_tokenizer(
    folder: str | Path,
    num_codes: int = 64,
    num_merges: int = 400,
    shuffled_codes: bool = False,
    meta: bool = False,
    num_reserved: int = 6,
    list_merges: bool = True,
) -> Path:
    """Write a byte-level BPE file with the release's six splits, layout and names; -> its path.

    shuffled_codes permutes the ids of the IMGIMG names, so that id = code + 4 does not hold.
    meta writes text_tokenizer.json with <reserved08707>; else tokenizer.json with <image>.
    list_merges writes merges as ["a", "b"], else as "a b".
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    def isolated(pattern: str) -> pre_tokenizers.Split:
        return pre_tokenizers.Split(Regex(pattern), "isolated")

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            isolated("<sentinel:[0-9]+>"),
            isolated("(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z"),
            isolated("([\\t\\n]|    |  )"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=256 + num_merges,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    rng = random.Random(0)
    corpus = CORPUS + [" ".join(rng.choices(" ".join(CORPUS).split(), k=60)) for _ in range(40)]
    tokenizer.train_from_iterator(corpus, trainer)
    data = json.loads(tokenizer.to_str())

    names = release_names(num_codes, num_reserved, meta)
    if shuffled_codes:
        codes = names[4 : 4 + num_codes]
        rng.shuffle(codes)
        names[4 : 4 + num_codes] = codes
    text_names = sorted(data["model"]["vocab"], key=data["model"]["vocab"].get)
    data["model"]["vocab"] = {name: n for n, name in enumerate(names + text_names)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    data["added_tokens"] = [
        {"id": n, "content": name, "special": True, **flags} for n, name in enumerate(names)
    ]
    if not list_merges:
        data["model"]["merges"] = [" ".join(merge) for merge in data["model"]["merges"]]
    path = Path(folder) / ("text_tokenizer.json" if meta else "tokenizer.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    return path


def write_small_sentencepiece(folder: str | Path, num_codes: int = 64) -> Path:
    """Train a small tokenizer.model with the release's layout, as train.py does; -> its path."""
    import io

    import sentencepiece

    model = io.BytesIO()
    controls = image_token_names(num_codes)
    controls += ["<eoss>", "<racm3:break>", "<reserved08706>", "<image>"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS[:3] * 20), model_writer=model, model_type="bpe",
        vocab_size=4 + len(controls) + 256 + 120, hard_vocab_limit=False, byte_fallback=True,
        character_coverage=1.0, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=False, split_digits=True, allow_whitespace_only_pieces=True,
        bos_id=0, pad_id=1, eos_id=2, unk_id=3, control_symbols=controls, minloglevel=2,
    )
    path = Path(folder) / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


def png(width: int, height: int) -> bytes:
    """A png that claims a size; its data holds one row only."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        length, checksum = struct.pack(">I", len(data)), struct.pack(">I", zlib.crc32(kind + data))
        return length + kind + data + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * (1 + 3 * min(width, 1000)))
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks
