"""The command `python generate.py`: its options, the checks before any weight is read, its output.

    options --check_*--> prompts, pictures --load_model--> stream --pieces--> stdout, --out

Who needs it: whoever changes the command line. A program imports `generate` or `stream` from
generate.py instead. Answers go to stdout, everything else to stderr.
"""

import argparse
import importlib.metadata
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import count, islice
from pathlib import Path

import torch
from PIL import Image, ImageOps

from chameleon import ChameleonConfig, ChameleonForConditionalGeneration
from chameleon_extras.checkpoint import load_checkpoint, open_config
from chameleon_extras.decoding import (
    ATTENTIONS,
    Decoder,
    check_attention,
    check_compile,
    set_attention,
)
from chameleon_extras.files import (
    OneLineParser,
    exit_code,
    find_folder,
    hold,
    ignore_stops,
    own_rank,
    pick_device,
    ranks,
    say,
    write_atomically,
)
from chameleon_extras.parallel import check_ranks, join, shard
from chameleon_extras.quantize import KINDS
from chameleon_extras.release import load_processor
from chameleon_extras.sheets import (
    check_sheet,
    contact_sheet,
    parts_of,
    picture_format,
    save_picture,
    there_and_back,
    write_document,
)
from chameleon_extras.stats import Stats
from generate import MODES, Options, ids_of_pictures, pieces, room_behind, seeds_of, stream
from processor import ChameleonProcessor
from tokenizer import Tokenizer, check_ids

TINY = Path(__file__).resolve().parent.parent / "tiny"
DOCUMENT_FILE = re.compile(r"document\.(md|html)|\d+\.png")  # in the folder of a document
AMOUNTS = (("batch", "number of prompts", 1024), ("count", "number of pictures", 1000),
           ("scale", "whole factor", 64))  # from 1 to so many
MAX_STDIN = 10**6  # characters of --prompt -

# The options of text and of pictures have the names that they have in `stream`.
OF_TEXT = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty")
OF_PICTURES = ("image_temperature", "image_top_k", "image_top_p", "guidance_text", "guidance_image")
OF_WEIGHTS = ("model", "vqgan", "device", "dtype", "quantize", "attention")
OF_TALKS = (*OF_WEIGHTS, *OF_TEXT, *OF_PICTURES, "seed", "compile", "context")
OF_MODES = (*OF_WEIGHTS, "prompt", "image", "completion", "mode", "seed", "compile", "stats")
# Each command, and the options that it reads. Of several commands the first counts.
READ_BY = {
    "--mode text": (*OF_MODES, *OF_TEXT),
    "--mode image": (*OF_MODES, *OF_PICTURES, "out", "count", "scale"),
    "--mode interleaved": (*OF_MODES, *OF_TEXT, *OF_PICTURES, "out"),
    "--demo": OF_TALKS,
    "--chat": OF_TALKS,
    "--prompts": (*OF_WEIGHTS, *OF_TEXT, "seed", "compile", "batch", "completion", "out"),
    "--explain": (*OF_WEIGHTS, "prompt", "image", "completion", "out"),
    "--reconstruct": ("model", "vqgan", "device", "image", "out"),
}
DEFAULT_OUT = {"--mode image": Path("picture.png"), "--mode interleaved": Path("document"),
               "--reconstruct": Path("reconstruction.png")}
RECONSTRUCTED = 512  # pixels of a picture's longer side on the sheet of --reconstruct, at most
DRAWN = 144  # on a contact sheet, smaller pictures are enlarged to at most so many pixels
ASKS_TO_DRAW = re.compile(r"\s*(please\s+|can you\s+)*(draw|paint|sketch)\b", re.IGNORECASE)


# ---------------------------------------------------------------------------------------------
# Options and their checks


def version() -> str:
    """The version of the installed package. A clone that was never installed has none."""
    try:
        return importlib.metadata.version("chameleon-reference")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


EXAMPLES = """\
three examples:
  python generate.py --prompt "What do you see in this image?<image>" --image examples/shapes.png
  python generate.py --prompt "Draw a star." --mode image --count 9 --out sheet.png
  python generate.py --chat
"""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """-> the options, and besides them the `command` of READ_BY that they ask for, and `given`, the
    names of those that differ from their defaults.
    """
    parser = OneLineParser("generate.py", description="Text and pictures, in and out.",
                           epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--version", action="version", version=f"chameleon-reference {version()}")
    add = parser.add_argument_group("what goes in").add_argument
    add("--prompt", action="append", default=[], metavar="TEXT",
        help="<image> marks a picture's place; repeat the option for a batch; - reads stdin")
    add("--image", action="extend", nargs="+", default=[], metavar="FILE",
        help="in the order of <image>; without <image> in the prompt it goes in front")
    add("--chat", action="store_true", help="a conversation: each line is a turn, /help helps")
    add("--demo", action="store_true", help="a conversation on a page, for a browser here")
    add("--prompts", type=Path, metavar="FILE",
        help="many prompts, one a line, or .jsonl with pictures; a JSON line for each answer goes "
        "to --out or stdout; started again, it goes on where it was stopped")
    add("--batch", type=int, default=8, metavar="N",
        help="prompts that are answered at a time (1 to 1024; default 8)")
    add("--context", choices=("whole", "last"),
        help="what a turn of --chat sees: all turns, or the last pictures (default: whole; last "
        "for tiny/, which has learned short conversations)")
    add = parser.add_argument_group("what comes out").add_argument
    add("--mode", default="text", choices=MODES, help="text (the default), a picture, or both")
    add("--out", type=Path, metavar="PATH",
        help="file for a picture, replaced if it is there (with --count, none of the pictures "
        "beside it may be there); folder for an interleaved document")
    add("--count", type=int, default=1, metavar="N",
        help="so many pictures of each prompt, and a sheet of all (default 1; 1 to 1000)")
    add("--scale", type=int, default=0, metavar="N",
        help="enlarge the picture or sheet at --out by a whole factor (1 to 64; default: 1; on a "
        f"sheet, up to {DRAWN} pixels); the pictures beside a sheet stay as drawn")
    add("--completion", action="store_true", help="continue the prompt instead of answering it")
    add("--reconstruct", action="store_true", help="only send --image through the VQ-VAE and back")
    add("--explain", action="store_true",
        help="show the prompt's walk through the model; --out FILE.html draws it")
    add("--stats", action="store_true", help="how fast it was, and how fast it could have been")
    add = parser.add_argument_group("how text is chosen").add_argument
    add("--max-new-tokens", type=int, metavar="N",
        help="1 or more (default: 256 of text, all that fits when interleaved; a picture is "
        "always whole)")
    add("--temperature", type=float, default=0.0, metavar="X",
        help="0, the default, takes the most likely token; else 0.0001 or more")
    add("--top-k", type=int, default=0, metavar="N", help="1 or more; 0: no limit (default)")
    add("--top-p", type=float, default=1.0, metavar="X", help="above 0, to 1 (default 1)")
    add("--repetition-penalty", type=float, default=1.0, metavar="X",
        help="0.01 to 100 (default 1: none)")
    add("--seed", default="0", metavar="N",
        help="of all random draws, a whole number (default 0) or the word random; row b of a batch "
        "adds b")
    add = parser.add_argument_group("how pictures are chosen").add_argument
    add("--image-temperature", type=float, default=1.0, metavar="X",
        help="default 1; 0 takes the most likely code; else 0.0001 or more")
    add("--image-top-k", type=int, default=0, metavar="N", help="as --top-k (default 0)")
    add("--image-top-p", type=float, default=0.9, metavar="X", help="as --top-p (default 0.9)")
    add("--guidance-text", type=float, default=1.0, metavar="X",
        help="how much the words count, 0 to 1000 (default 1; Meta uses 3)")
    add("--guidance-image", type=float, default=1.0, metavar="X",
        help="how much the pictures count, 0 to 1000 (default 1; Meta uses 1.2)")
    add = parser.add_argument_group("the model").add_argument
    add("--model", type=Path, default=TINY, metavar="FOLDER",
        help="of weights, or a hub id (default: tiny/)")
    add("--vqgan", type=Path, metavar="FILE",
        help="vqgan.ckpt or safetensors: its VQ-VAE instead of the model's, for the decoder in it")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto takes the fastest there is")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="auto is float32 for plain weights on a CPU, else bfloat16; 7B wants bfloat16")
    add("--quantize", choices=KINDS, help="weights in 8 or 4 bits, packed while they are read")
    add("--compile", action="store_true",
        help="faster steps, after some seconds of compiling: for long answers and large models")
    add("--attention", default="auto", choices=ATTENTIONS,
        help="auto: the fastest known kernel; eager: the readable one; sdpa: torch's choice; the "
        "others: that kernel alone")
    options = parser.parse_args(arguments)
    options.given = [k for k, v in vars(options).items() if v != parser.get_default(k)]
    asked = [command for command in READ_BY if command[2:] in options.given]
    options.command = asked[0] if asked else f"--mode {options.mode}"
    return options


def sampling(options: argparse.Namespace) -> dict:
    """The options of `stream` that the command has under the same names, and do_sample."""
    values = {name: getattr(options, name) for name in (*OF_TEXT, *OF_PICTURES)}
    return values | {"do_sample": options.temperature > 0}


def read_seed(text: str) -> int:
    """The value of --seed -> the seed."""
    if text == "random" and ranks() == 1:  # under torchrun, all ranks need the same
        value = int.from_bytes(os.urandom(4), "big")
        say(f"seed {value}")
        return value
    try:
        return int(text)
    except ValueError:
        words = "" if ranks() > 1 else ", or the word random"
        raise ValueError(f"seed {text[:40]!r}: give a whole number below 2^63{words}") from None


def check_unused(options: argparse.Namespace) -> None:
    """ValueError for an option that would have no effect, and for torchrun where it has none."""
    command = options.command
    for name in options.given:
        option = "--" + name.replace("_", "-")
        if ranks() > 1 and name in ("demo", "chat", "prompts", "explain", "compile"):
            raise ValueError(f"{option} is for one process: leave torchrun out")
        if name not in READ_BY[command] and option != command:
            readers = ", ".join(other for other, read in READ_BY.items() if name in read)
            wanted = f"is for {readers}, not for" if readers else "is not for"
            raise ValueError(f"{option} {wanted} {command}: leave {option} out")
        prefix = name.removesuffix("top_k").removesuffix("top_p")
        if prefix != name and not vars(options)[prefix + "temperature"]:
            raise ValueError(f"{option} is for sampling, but temperature 0 takes the most likely "
                             f"token: add --{prefix.replace('_', '-')}temperature 1")


def place_images(prompts: list[str], count: int) -> list[str]:
    """Puts <image> in front of prompts that have none: for all pictures, or one for each prompt."""
    if not count or any("<image>" in prompt for prompt in prompts):
        return prompts
    if len(prompts) == 1:
        return ["<image>" * count + prompts[0]]
    if len(prompts) == count:
        return ["<image>" + prompt for prompt in prompts]
    raise ValueError(f"{count} pictures for {len(prompts)} prompts: mark their places by <image>")


def check_output(options: argparse.Namespace) -> None:
    """ValueError for an amount or an --out that does not fit. Sets the default of --out."""
    out, command = options.out, options.command
    if len(options.prompt) > 1 and command in ("--explain", "--mode interleaved"):
        raise ValueError(f"{command} takes one prompt: give one --prompt")
    for name, what, most in AMOUNTS:
        if name in options.given and not 1 <= vars(options)[name] <= most:
            raise ValueError(f"--{name} is a {what}, 1 to {most}")
    if options.count > 1 and not options.image_temperature:
        raise ValueError("--image-temperature 0 draws one picture again and again: raise it, or "
                         "leave --count out")
    if out is None:
        options.out = DEFAULT_OUT.get(command)
    elif command == "--mode interleaved":
        check_folder(out)
    elif command == "--explain" and out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--explain draws a page: name --out {out.stem or 'walk'}.html")
    elif not out.parent.is_dir():
        raise ValueError(f"the folder {out.parent} of {out.name} does not exist: make it first")
    elif out.exists() and not out.is_file():
        raise ValueError(f"--out {out} is a folder or a device: name a file")
    elif command in ("--mode image", "--reconstruct"):
        picture_format(out)
        if others := [path for path in numbered_names(options) if os.path.lexists(path)]:
            raise ValueError(f"--out {out} would replace {others[0]}, too: name another file")


def check_folder(folder: Path) -> None:
    """ValueError for a folder that cannot take a document, because it holds one."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name a folder for the document")
    if folder.is_dir() and any(map(DOCUMENT_FILE.fullmatch, os.listdir(folder))):
        raise ValueError(f"{folder} holds a document already: name another folder")


def choose_name(options: argparse.Namespace) -> None:
    """Turns picture.png into picture-2.png, picture-3.png ... until no file would be replaced, and
    takes a file's name by an empty file: other processes may write, too. The file at a given --out
    is replaced, but not the pictures beside a sheet. Called just before a file or folder is made.
    """
    path = options.out
    for n in count(2):
        kept = numbered_names(options)
        if n > 2 or "out" not in options.given:  # a name that nobody gave
            kept.insert(0, options.out)
        if not any(map(os.path.lexists, kept)):
            with suppress(FileExistsError):  # another process was sooner
                if kept and kept[0].suffix and own_rank() == 0:  # a file, not a folder
                    kept[0].touch(exist_ok=False)
                return
        options.out = path.with_stem(f"{path.stem}-{n}")


def numbered_names(options: argparse.Namespace) -> list[Path]:
    """The files of the single pictures beside a contact sheet, none if one picture is all."""
    rows, path = options.count * len(options.prompt), options.out
    return [path.with_stem(f"{path.stem}-{n}") for n in range(1, rows + 1)] if rows > 1 else []


def check_writable(options: argparse.Namespace) -> None:
    """Tries to write at --out, as the last check before the weights are read. ValueError."""
    out = options.out
    if out is None or own_rank() > 0:
        return
    if options.mode == "interleaved":  # a folder that is made when there is something to write
        out = next(path for path in (out, *out.absolute().parents) if path.exists()) / "document.md"
    else:
        out = [out, *numbered_names(options)][-1]
    try:
        write_atomically(out, lambda part: None, keep=False)  # it makes the file by itself
    except OSError as e:
        raise ValueError(f"--out {options.out} cannot be written: {e.strerror}") from None


def check_pair(config: ChameleonConfig, processor: ChameleonProcessor, inputs: dict) -> None:
    """ValueError if tokenizer and pictures are not those of this model."""
    ours = config.vocabulary_map or {}
    check_ids(processor.tokenizer.vocab, config.vocab_size, "tokenizer and model do not belong "
              "together, take both from one folder: ")
    for name, i in processor.tokenizer.vocab.items():
        if ours.get(name, i) != i:
            raise ValueError(f"tokenizer and model do not belong together: {name} is {i} in the "
                             f"tokenizer and {ours[name]} in the config's vocabulary_map")
    if not set(ids_of_pictures(processor.tokenizer.vocabulary)) <= set(ours.values()):
        raise ValueError("the config's vocabulary_map lacks image tokens of the tokenizer: "
                         "take the config.json that came with the weights")
    vq, images = config.vq_config, processor.image_processor
    if "pixel_values" in inputs:
        channels, H, W = inputs["pixel_values"].shape[1:]
    elif images.do_center_crop and processor.tokenizer.vocabulary.num_codes:
        channels, H, W = 3, images.crop_size["height"], images.crop_size["width"]
    else:
        return
    h, w, side = H // vq.downsampling, W // vq.downsampling, vq.resolution // vq.downsampling
    if (h, w, h * w, channels) != (side, side, processor.image_seq_length, vq.in_channels):
        raise ValueError(f"pictures of {channels} x {H} x {W} pixels are {h} x {w} codes of this "
                         f"model, image_seq_length of the processor is "
                         f"{processor.image_seq_length}, and the model draws {side} x {side} codes "
                         f"from {vq.in_channels} channels: take config.json, preprocessor_config"
                         ".json and processor_config.json of one folder")


def load_model(options: argparse.Namespace) -> ChameleonForConditionalGeneration:
    """The model on its device; under torchrun, this rank's part of it."""
    device, dtype = pick_device(options.device), options.dtype
    config, kind = open_config(options.model)
    kind = options.quantize or kind
    if ranks() > 1:  # started by torchrun
        device = join(device)
        check_ranks(config, ranks(), kind)
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" and not kind else "bfloat16"
    dtype = getattr(torch, dtype)
    check_attention(options.attention, device, dtype, options.compile)
    if options.compile:
        check_compile(device)
    where = "cpu" if ranks() > 1 else device  # memory-mapped, until each rank takes its part
    model = load_checkpoint(
        ChameleonForConditionalGeneration, options.model, dtype, where, options.vqgan,
        options.quantize, options.reconstruct or options.mode != "text")
    if ranks() > 1:
        shard(model, device)
    return set_attention(model, options.attention)


def answer(options: argparse.Namespace) -> None:
    """Checks all input first, because reading the weights takes long. Then computes and writes."""
    options.seed = read_seed(options.seed)
    Options(**sampling(options))  # checks them
    check_unused(options)
    check_output(options)
    seeds_of(options.seed, options.count * len(options.prompt))
    if sys.stdout is None and options.out is None:
        raise ValueError("stdout is closed, and the answer goes there: leave >&- out")
    if options.model == TINY and not TINY.is_dir():
        raise ValueError("the checkpoint tiny/ comes with a clone of the repository, not with an "
                         "installed package: run this in a clone, or name a --model")
    options.model = find_folder(options.model)
    config, _ = open_config(options.model)
    processor = load_processor(options.model)
    if options.reconstruct:
        if not options.image:
            raise ValueError("--reconstruct needs an --image")
        return reconstruct(options, processor)
    check_pair(config, processor, {})
    if options.chat or options.demo:
        return converse(options, processor)
    if options.prompts:
        from chameleon_extras.prompts import answer_all  # which imports this file

        return answer_all(options, config, processor)
    if not options.prompt:
        raise ValueError("give a --prompt, or --chat for a conversation (see --help)")
    options.prompt = [read_stdin() if prompt == "-" else prompt for prompt in options.prompt]
    prompts = place_images(options.prompt, len(options.image))
    longest = max(len(processor.prompt_ids(prompt, options.completion)) for prompt in prompts)
    room = room_behind(config, longest, options.mode)  # before the pictures are read: maybe many
    inputs = processor(text=prompts, images=options.image or None, padding=True,
                       padding_side="left", return_for_text_completion=options.completion)
    check_pair(config, processor, inputs)
    if options.mode == "image":
        rows, side = options.count * len(prompts), config.vq_config.resolution
        options.scale = options.scale or (max(1, DRAWN // side) if rows > 1 else 1)
        check_sheet(options.out, rows, side * options.scale)
    check_writable(options)
    room, picture = min(room, options.max_new_tokens or room), processor.image_seq_length + 2
    if options.mode == "interleaved" and room < picture:
        say(f"no picture will come: it takes {picture} tokens, and only {room} may follow")
    if options.command == "--mode text" and any(map(ASKS_TO_DRAW.match, prompts)):
        say("--mode text answers in words: add --mode image for a drawing")
    model = load_model(options)
    inputs = inputs.to(model.device)
    if options.explain:
        return write_walk(options, model, processor.tokenizer, inputs)
    decoder = Decoder(model, options.compile, options.attention)
    stats = Stats(model)
    steps = stats.watch(stream(
        model, **inputs, mode=options.mode, seed=options.seed, decoder=decoder,
        num_return_sequences=options.count, **sampling(options)))
    write = {"text": write_text, "image": write_pictures, "interleaved": write_interleaved}
    try:
        if own_rank() > 0:  # all ranks compute the same ids, and rank 0 shows them
            for _ in steps:
                pass
        else:
            write[options.mode](options, pieces(model, processor.tokenizer, with_bar(steps, model)))
    finally:
        if options.stats:
            say(stats.report(decoder.cache))


def converse(options: argparse.Namespace, processor: ChameleonProcessor) -> None:
    """--chat and --demo"""
    # Only here, because these files import this one.
    from chameleon_extras.chat import Conversation, chat
    from chameleon_extras.demo import check_gradio, serve

    if options.demo:
        check_gradio()
    model = load_model(options)
    context = options.context or ("last" if options.model.resolve() == TINY else "whole")
    decoder = Decoder(model, options.compile, options.attention)
    start = partial(Conversation, model, processor, decoder, whole=context == "whole")
    if options.demo:
        return serve(start, options.seed, sampling(options))
    chat(start(), options.seed, sampling(options))


def read_stdin() -> str:
    """What `--prompt -` stands for. ValueError if it is no text."""
    try:
        return sys.stdin.read(MAX_STDIN).removesuffix("\n")
    except (UnicodeDecodeError, AttributeError):  # of a closed stdin, which is None
        raise ValueError("--prompt - reads standard input, which is closed or no text") from None


# ---------------------------------------------------------------------------------------------
# Output


def with_bar(steps: Iterator[torch.Tensor], model) -> Iterator[torch.Tensor]:
    """Passes the ids (B,) on. On a terminal, a bar shows how far the first row's picture is."""
    from tqdm import tqdm

    steps, rest = iter(steps), model.config.vq_config.codes_per_image + 1  # codes, end-image
    for ids in steps:
        yield ids
        if int(ids[0]) == model.model.vocabulary.begin_image_id:
            yield from tqdm(islice(steps, rest), desc="image tokens", total=rest, leave=False,
                            disable=None)


def write_text(options: argparse.Namespace, made: Iterator) -> None:
    """Streams one answer to stdout. The answers of a batch come in order, when all are done."""
    texts = [""] * len(options.prompt)
    try:
        for piece in made:
            texts[piece.row] += piece.text
            if len(texts) == 1:
                print(piece.text, end="", flush=True)
    except BaseException:  # also Ctrl-C: what is written is printed
        texts = texts if any(texts) else []
        raise
    finally:
        if len(options.prompt) == 1:
            print(flush=True)
        else:
            for prompt, text in zip(options.prompt, texts):
                say(prompt)
                print(text, flush=True)


def write_pictures(options: argparse.Namespace, made: Iterator) -> None:
    """One picture to --out. Of several, a contact sheet to --out and each picture beside it."""
    pictures = []
    try:
        for piece in made:
            pictures.append(piece.image)
    finally:  # after Ctrl-C, too: what is drawn is saved
        ignore_stops()
        if pictures:
            choose_name(options)
            singles = numbered_names(options)
            for path, picture in zip(singles, pictures):
                save_picture(picture, path)
            seen = [ImageOps.scale(picture, options.scale, Image.NEAREST) for picture in pictures]
            save_picture(contact_sheet(seen) if singles else seen[0], options.out)
            say(f"{options.out}: {len(pictures)} picture(s), seed {options.seed}")


def write_interleaved(options: argparse.Namespace, made: Iterator) -> None:
    """Streams text to stdout, with a line for each picture. Writes the document to --out."""
    kept, pictures, in_line = [], 0, False
    choose_name(options)
    options.out.mkdir(parents=True, exist_ok=True)  # at once: so other processes take others
    with hold(options.out):
        check_folder(options.out)
        try:
            for piece in made:
                kept.append(piece)
                if piece.image is not None:
                    pictures += 1
                    print("\n" * in_line + f"[{options.out / str(pictures)}.png]", flush=True)
                print(piece.text, end="", flush=True)
                in_line = piece.text[-1:] not in ("", "\n")
        finally:
            ignore_stops()
            try:
                if kept:
                    write_document(options.out, parts_of(kept))
            finally:
                with suppress(OSError):
                    options.out.rmdir()  # if nothing was written
                print(flush=True)  # fails if stdout is closed or full
            if kept:
                say(f"{options.out / 'document.html'}: seed {options.seed}")


def write_walk(options: argparse.Namespace, model, tokenizer: Tokenizer, inputs) -> None:
    """The prompt's way through the model, to stdout and as a page to --out."""
    from chameleon_extras.explain import page, report, walk

    shown = walk(model, tokenizer, inputs["input_ids"], inputs.get("pixel_values"))
    if options.out is not None:
        html_page = page(shown, options.prompt[0])
        write_atomically(options.out, lambda part: part.write_text(html_page, encoding="utf-8"))
        say(str(options.out))
    print(report(shown))


def reconstruct(options: argparse.Namespace, processor: ChameleonProcessor) -> None:
    """A sheet to --out: each picture as the model sees it, its codes, and their decoding."""
    check_sheet(options.out, 3 * len(options.image), RECONSTRUCTED, columns=3)
    pixels = processor.image_processor(options.image, return_tensors="pt").pixel_values
    check_writable(options)
    model = load_model(options)
    sheet, (h, w), psnr = there_and_back(model, pixels.to(model.device), RECONSTRUCTED)
    choose_name(options)
    save_picture(sheet, options.out)
    say(f"{options.out}: {len(pixels)} picture(s), {h} x {w} codes each, PSNR {psnr:.1f} dB")


def run(arguments: list[str] | None = None) -> int:
    """The words of the command line (None: those of this process) -> exit code, see `exit_code`."""
    options = parse(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: say(f"generate.py: {message}")
        return exit_code("generate.py", lambda: answer(options))
