"""Converts a checkpoint of any layout to a folder that transformers reads, too.

    python -m chameleon_extras.convert SRC DST     SRC: Hugging Face's folder, Meta's or Anole's
                           --vqgan FILE            with the VQ-VAE of FILE, decoder included
                           --quantize int8         weights in 8 bits: half of the bytes

    tokenizer.model (sentencepiece) ------------+
    text_tokenizer.json (Meta's release) -------+--> tokenizer.json, tokenizer_config.json

Who needs it: whoever wants Meta's files, or quantized weights, on disk once and for all, or wants
transformers' AutoProcessor to read a folder. release.py lists the layouts.

Meta's text_tokenizer.json is byte-level BPE. transformers reads it after two changes: the name of
<image>, and <s> in front of a text. To read a sentencepiece model, transformers needs the protobuf
package. So this command writes a tokenizer.json, a BPE, that gives the same ids. Its merges are all
pairs of pieces that join to a third piece; those of the piece with the best score come first.
Characters without a piece become bytes.

One rule cannot be expressed there. In transformers, the name of a control token in a text, such as
"<s>", becomes that token. In tokenizer.py a text never becomes a control token.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from chameleon import ChameleonForConditionalGeneration
from chameleon_extras.checkpoint import byte_size, open_model, write_checkpoint
from chameleon_extras.files import OneLineParser, exit_code, find_folder, say
from chameleon_extras.quantize import KINDS, kind_of
from chameleon_extras.release import find_release, load_processor
from tokenizer import (
    BEGIN_IMAGE,
    END_IMAGE,
    END_OF_TURN,
    IMAGE_PLACEHOLDERS,
    TOKENIZER_FILES,
    SentencePieceTokenizer,
    load_tokenizer,
    read_json,
    write_json,
)

TOKENIZER_AND_PROCESSOR = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "preprocessor_config.json", "processor_config.json",
    "generation_config.json", "chat_template.json", "chat_template.jinja")
SPACE = SentencePieceTokenizer.SPACE

# ---------------------------------------------------------------------------------------------
# Tokenizer and processor


def write_for_transformers(folder: Path) -> None:
    """Beside tokenizer.model, or in place of Meta's tokenizer.json, writes the files from which
    AutoProcessor gives the same ids. ValueError if the tokenizer's own file is broken.
    """
    if (folder / "tokenizer.model").is_file():
        data = bpe_of_sentencepiece(folder / "tokenizer.model")
    else:
        (ours, metas), text = IMAGE_PLACEHOLDERS, json.dumps(read_json(folder / "tokenizer.json"))
        data = json.loads(text.replace(f'"{metas}"', f'"{ours}"'))
    begin = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    vocab = data["model"]["vocab"] | {t["content"]: t["id"] for t in data.get("added_tokens") or []}
    bos = {"id": "<s>", "ids": [vocab["<s>"]], "tokens": ["<s>"]}
    data["post_processor"] = {  # puts <s> in front, as Meta's code does
        "type": "TemplateProcessing", "single": begin,
        "pair": [*begin, {"Sequence": {"id": "B", "type_id": 0}}], "special_tokens": {"<s>": bos},
    }
    text = json.dumps(data, ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    file = folder / "tokenizer_config.json"
    tokens = {
        "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>",
        "sep_token": END_OF_TURN, "image_token": IMAGE_PLACEHOLDERS[0], "boi_token": BEGIN_IMAGE,
        "eoi_token": END_IMAGE}
    write_json(file, (read_json(file) if file.is_file() else {}) | {  # keeps a chat template
        # Without a class, some versions of transformers take Llama's tokenizer and lose all spaces.
        "tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "ChameleonProcessor",
        "padding_side": "left", "clean_up_tokenization_spaces": False,
    } | {role: name for role, name in tokens.items() if name in vocab})


def bpe_of_sentencepiece(path: Path) -> dict:
    """tokenizer.model -> what a tokenizer.json with the same ids holds. ValueError if broken."""
    tokenizer = SentencePieceTokenizer(path)
    vocab, model = tokenizer.vocab, tokenizer._model
    special = {i for i in tokenizer.special_ids if not model.is_unused(i)}
    pieces = [name for name, id in vocab.items() if id not in special and not model.is_byte(id)]
    pieces.sort(key=lambda name: -model.get_score(vocab[name]))  # in the order of training
    known = set(pieces)
    merges = [[piece[:k], piece[k:]] for piece in pieces for k in range(1, len(piece))
              if piece[:k] in known and piece[k:] in known]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [{"id": id, "content": tokenizer.name_of(id), "special": True, **flags}
                         for id in sorted(special)],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
        ]},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
                  "vocab": vocab, "merges": merges},
    }


def write_processor(source: Path, folder: Path) -> None:
    """Writes tokenizer and processor as transformers' AutoProcessor reads them."""
    release = find_release(source)
    if release:
        return load_processor(release).save_pretrained(folder)
    for name in TOKENIZER_AND_PROCESSOR:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    has_tokenizer = any((source / name).is_file() for name in TOKENIZER_FILES)
    if has_tokenizer and not (folder / "tokenizer.json").is_file():
        load_tokenizer(source).save_pretrained(folder)


# ---------------------------------------------------------------------------------------------
# The command


def convert(source: Path, target: Path, vqgan: Path | None = None,
            max_shard_bytes: int = 5 * 10**9, quantize: str | None = None) -> None:
    """Writes the folder `target`, as a whole or not at all. ValueError if it cannot."""
    if os.path.lexists(target):  # a link to nowhere, too
        raise ValueError(f"{target} exists already: name a folder that does not")
    part = target.with_name(target.name + ".part")
    if part.exists():
        raise ValueError(f"{part} is what an interrupted conversion left: remove it first")
    if not target.absolute().parent.is_dir():
        raise ValueError(f"the folder {target.absolute().parent} does not exist: make it first")
    source = find_folder(source)  # of a hub id, after the checks: it may take hours
    model, tensors = open_model(ChameleonForConditionalGeneration, source, "cpu", vqgan, quantize)
    total = sum(tensor.nbytes for tensor in tensors.values())
    if total > (free := shutil.disk_usage(target.absolute().parent).free):
        raise ValueError(f"{target} takes {total / 1e9:.1f} GB, the disk has {free / 1e9:.1f} left")
    part.mkdir()
    try:
        write_processor(source, part)  # first: it may be refused, and the weights take minutes
        write_checkpoint(part, model.config, tensors, max_shard_bytes, kind_of(model), "converting")
        part.rename(target)
    except BaseException:  # also Ctrl-C: no half folder is left
        shutil.rmtree(part, ignore_errors=True)
        raise


def main(arguments: list[str] | None = None) -> int:
    """-> exit code, see `files.exit_code`."""
    parser = OneLineParser(
        "convert", description="Meta's, Anole's or Hugging Face's folder -> Hugging Face's.")
    parser.add_argument("source", type=Path, metavar="SRC", help="folder of weights, or a hub id")
    parser.add_argument("target", type=Path, metavar="DST", help="folder to write, not there yet")
    parser.add_argument("--vqgan", type=Path, metavar="FILE",
                        help="take the VQ-VAE, decoder included, of this vqgan.ckpt or safetensors")
    parser.add_argument("--shard-size", default="5GB", metavar="SIZE",
                        help="a file's tensors, and so the memory, unless one is larger (5GB)")
    parser.add_argument("--quantize", choices=KINDS, help="write weights in 8 or 4 bits")
    options = parser.parse_args(arguments)

    def run() -> None:
        convert(options.source, options.target, options.vqgan,
                byte_size(options.shard_size), options.quantize)
        say(f"{options.target}: written")

    return exit_code("convert", run)


if __name__ == "__main__":
    sys.exit(main())
