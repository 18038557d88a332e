"""The files from which transformers' AutoProcessor gives the ids that processor.py gives.

    tokenizer.model (sentencepiece) ------------+
    text_tokenizer.json (Meta's release) -------+--> tokenizer.json, tokenizer_config.json

transformers reads byte-level BPE as it is, but for the name of <image> and for <s> in front. For
sentencepiece it would need the protobuf package; so tokenizer.json says the same in its own words:
a BPE whose merges are all the ways to put a piece together from two, the piece with the best score
first, and bytes for all that has no piece.

What it cannot say: in transformers the name of a control token that stands in a text, such as
"<s>", becomes that token. In tokenizer.py text never does.
"""

import json
from pathlib import Path

from image_processor import read_json, write_json
from tokenizer import (
    BEGIN_IMAGE,
    END_IMAGE,
    END_OF_TURN,
    IMAGE_PLACEHOLDERS,
    SentencePieceTokenizer,
)

SPACE = SentencePieceTokenizer.SPACE


def begin_with(bos_id: int) -> dict:
    """Meta's code puts <s> in front by itself; transformers' tokenizer is told to by its file."""
    begin = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing", "single": begin,
        "pair": [*begin, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [bos_id], "tokens": ["<s>"]}},
    }


def write_tokenizer(folder: Path, data: dict) -> None:
    """`data` is the contents of tokenizer.json but for its post_processor."""
    data["post_processor"] = begin_with(data["model"]["vocab"]["<s>"])
    text = json.dumps(data, ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    write_json(folder / "tokenizer_config.json", {
        # Named, since some versions of transformers take Llama's by default and lose all spaces.
        "tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "ChameleonProcessor",
        "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>",
        "sep_token": END_OF_TURN, "image_token": IMAGE_PLACEHOLDERS[0], "boi_token": BEGIN_IMAGE,
        "eoi_token": END_IMAGE, "padding_side": "left", "clean_up_tokenization_spaces": False,
    })


def write_release_tokenizer(folder: Path) -> None:
    """tokenizer.json, as Meta has it, gets transformers' name for the placeholder."""
    data, (ours, metas) = read_json(folder / "tokenizer.json"), IMAGE_PLACEHOLDERS
    vocab = data["model"]["vocab"]
    data["model"]["vocab"] = {ours if name == metas else name: vocab[name] for name in vocab}
    for token in data.get("added_tokens") or []:
        token["content"] = ours if token["content"] == metas else token["content"]
    write_tokenizer(folder, data)


def write_sentencepiece_tokenizer(folder: Path) -> None:
    """Beside tokenizer.model, the same as a tokenizer.json. ValueError if that file is broken."""
    from sentencepiece import SentencePieceProcessor

    path = folder / "tokenizer.model"
    vocab = SentencePieceTokenizer(path).vocab  # checked: it keeps a text as it is
    model = SentencePieceProcessor(model_proto=path.read_bytes())
    special = {name for name, id in vocab.items() if model.is_control(id) or model.is_unknown(id)}
    pieces = [name for name, id in vocab.items() if name not in special and not model.is_byte(id)]
    pieces.sort(key=lambda name: -model.get_score(vocab[name]))  # the order of training
    known = set(pieces)
    merges = [[piece[:k], piece[k:]] for piece in pieces for k in range(1, len(piece))
              if piece[:k] in known and piece[k:] in known]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    write_tokenizer(folder, {
        "version": "1.0",
        "added_tokens": [{"id": vocab[name], "content": name, "special": True, **flags}
                         for name in sorted(special, key=vocab.get)],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
        ]},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
                  "vocab": vocab, "merges": merges},
    })
