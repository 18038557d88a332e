"""What `python generate.py` does: options, the checks before any weight is read, what is written.

    options --check--> prompts, pictures --load_model--> stream --pieces--> stdout, --out

Who needs it: whoever changes the command line. A library user imports `generate` and `stream` from
generate.py instead. Answers stream to stdout; everything else goes to stderr.
"""

import argparse
import importlib.metadata
import io
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

from chameleon import ChameleonForConditionalGeneration
from chameleon_extras.checkpoint import load_checkpoint, open_config, read_config
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
    pick_device,
    ranks,
    write_atomically,
    writes,
)
from chameleon_extras.parallel import check_ranks, join, shard
from chameleon_extras.quantize import CHOICES
from chameleon_extras.release import load_processor
from chameleon_extras.sheets import (
    contact_sheet,
    picture_format,
    save_picture,
    there_and_back,
    write_document,
)
from chameleon_extras.stats import Stats
from generate import MODES, check_options, check_room, check_seeds, pieces, stream
from processor import ChameleonProcessor, load_image
from tokenizer import Tokenizer

TINY = Path(__file__).resolve().parent.parent / "tiny"
OWN_FILE = re.compile(r"document\.(md|html)|\d+\.png")  # of an interleaved document


# ---------------------------------------------------------------------------------------------
# Options, and all that can be wrong with them


def version() -> str:
    """The installed package's; a clone that was never installed has none."""
    try:
        return importlib.metadata.version("chameleon-reference")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser("generate.py", description="Text and pictures, in and out.")
    add = parser.add_argument
    add("--version", action="version", version=f"chameleon-reference {version()}")
    add("--model", type=Path, default=TINY, help="folder with the weights (default: tiny/)")
    add("--vqgan", type=Path, metavar="FILE",
        help="vqgan.ckpt or safetensors: its VQ-VAE instead of the model's, for the decoder in it")
    add("--prompt", action="append", default=[], metavar="TEXT",
        help="<image> marks a picture's place; repeat the option for a batch")
    add("--image", action="append", default=[], metavar="FILE",
        help="in the order of <image>; without <image> in the prompt it goes in front")
    add("--mode", default="text", choices=MODES, help="what to make: text, a picture, or both")
    add("--out", type=Path, metavar="PATH",
        help="file for a picture, replaced if it is there; folder for an interleaved document")
    add("--count", type=int, default=1, help="so many pictures of each prompt, and a sheet of all")
    add("--reconstruct", action="store_true", help="only send --image through the VQ-VAE and back")
    add("--completion", action="store_true", help="continue the prompt instead of answering it")
    add("--explain", action="store_true",
        help="show the prompt's walk through the model; --out FILE.html draws it")
    add("--max-new-tokens", type=int,
        help="default: 256 of text, all that fits when interleaved; a picture is always whole")
    add("--temperature", type=float, default=0.0, help="of text; 0, the default, is greedy")
    add("--top-k", type=int, default=0, help="0 is no limit")
    add("--top-p", type=float, default=1.0)
    add("--repetition-penalty", type=float, default=1.0)
    add("--image-temperature", type=float, default=1.0, help="of pictures; 0 is greedy")
    add("--image-top-k", type=int, default=0)
    add("--image-top-p", type=float, default=0.9)
    add("--guidance-text", type=float, default=1.0, help="how much the words count; Meta uses 3")
    add("--guidance-image", type=float, default=1.0, help="how much pictures do; Meta uses 1.2")
    add("--seed", type=int, default=0, help="of all random draws; row b of a batch adds b")
    add("--device", default="auto", help="cpu, cuda, mps; auto takes the fastest there is")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="auto is float32 on a CPU, else bfloat16; 7B on a CPU wants bfloat16")
    add("--quantize", choices=CHOICES, help="weights in 8 or 4 bits, packed while they are read")
    add("--compile", action="store_true",
        help="faster steps, after some seconds of compiling: for long answers and large models")
    add("--attention", default="auto", choices=ATTENTIONS,
        help="the kernel: eager is the readable one, sdpa torch's, the others kinds of it")
    add("--stats", action="store_true", help="how fast it was, and how fast it could have been")
    options = parser.parse_args(arguments)
    options.given = [k for k, v in vars(options).items() if v != parser.get_default(k)]
    return options


# What --reconstruct and --explain read. And what only text, or only pictures, know.
WEIGHTS = ("model", "vqgan", "device", "dtype", "quantize", "attention", "image", "out")
RECONSTRUCT = {"reconstruct", *WEIGHTS}
EXPLAIN = {"explain", "prompt", "completion", *WEIGHTS}
OF_TEXT = {"temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens"}
OF_PICTURES = {"image_temperature", "image_top_k", "image_top_p", "guidance_text",
               "guidance_image"}


def check_unused(options: argparse.Namespace) -> None:
    """ValueError for an option that would be ignored without a word."""
    unused, why = set(), ""
    if options.explain:
        unused, why = set(options.given) - EXPLAIN, "--explain shows one step of one prompt"
    elif options.reconstruct:
        unused = set(options.given) - RECONSTRUCT
        why = "--reconstruct only sends pictures through the VQ-VAE"
    elif options.mode == "text":
        unused, why = OF_PICTURES, "--mode text draws nothing"
    elif options.mode == "image":
        unused, why = OF_TEXT, "--mode image writes no text"
    for name in options.given:
        option = "--" + name.replace("_", "-")
        if name in unused:
            raise ValueError(f"{why}: leave {option} out")
        prefix = name.removesuffix("top_k").removesuffix("top_p")
        if name.endswith(("top_k", "top_p")) and not vars(options)[prefix + "temperature"]:
            raise ValueError(f"{option} is for sampling, but temperature 0 takes the most likely "
                             f"token: add --{prefix.replace('_', '-')}temperature 1")


def sampling_options(options: argparse.Namespace) -> dict:
    """The command line's numbers under the names of `stream`."""
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "image_temperature",
             "image_top_k", "image_top_p", "guidance_text", "guidance_image")
    return {name: getattr(options, name) for name in names}


def place_images(prompts: list[str], count: int) -> list[str]:
    """Prompts without <image> get the pictures in front: all of them, or one for each prompt."""
    if not count or any("<image>" in prompt for prompt in prompts):
        return prompts
    if len(prompts) == 1:
        return ["<image>" * count + prompts[0]]
    if len(prompts) == count:
        return ["<image>" + prompt for prompt in prompts]
    raise ValueError(f"{count} pictures for {len(prompts)} prompts: mark their places by <image>")


def check_output(options: argparse.Namespace) -> None:
    """ValueError for an --out that could not be written, before anything is computed."""
    if options.explain:
        return check_page(options)
    if options.count < 1 or (options.count > 1 and options.mode != "image"):
        raise ValueError("--count is a number of pictures, for --mode image")
    if options.out is None:
        defaults = {"text": None, "image": "picture.png", "interleaved": "document"}
        name = "reconstruction.png" if options.reconstruct else defaults[options.mode]
        options.out = unused(Path(name)) if name else None
    elif options.mode == "text" and not options.reconstruct:
        raise ValueError("--out is for pictures: add --mode image or --mode interleaved")
    if options.mode == "interleaved":
        if len(options.prompt) > 1:
            raise ValueError("--mode interleaved writes one document: give one --prompt")
        if options.out.exists() and not options.out.is_dir():
            raise ValueError(f"--out {options.out} is a file: name a folder for the document")
        if options.out.is_dir() and any(map(OWN_FILE.fullmatch, os.listdir(options.out))):
            raise ValueError(f"--out {options.out} holds a document already: name another folder")
    elif options.out is not None:
        picture_format(options.out)
        others = [path for path in numbered_names(options) if os.path.lexists(path)]
        if others:
            raise ValueError(f"--out {options.out} would replace {others[0]}, too: name another "
                             "file")


def unused(path: Path) -> Path:
    """What has no name of its own takes a new one, so that nothing is lost: picture-2.png."""
    free, n = path, 1
    while os.path.lexists(free):
        n += 1
        free = path.with_stem(f"{path.stem}-{n}")
    return free


def numbered_names(options: argparse.Namespace) -> list[Path]:
    """The files beside a sheet: its pictures, one by one. None for a single picture."""
    count, path = options.count * len(options.prompt), options.out
    return [path.with_stem(f"{path.stem}-{n}") for n in range(1, count + 1)] if count > 1 else []


def check_place(options: argparse.Namespace) -> None:
    """Tries to write where --out says, the last thing before the weights: OSError, ValueError."""
    out = options.out
    if out is None or not writes():
        return
    if options.mode == "interleaved":
        out.mkdir(parents=True, exist_ok=True)
        out = out / "document.html"
    elif not options.explain:
        kind = picture_format(out)
        try:
            Image.new("RGB", (1, 1)).save(io.BytesIO(), kind)
        except (OSError, ValueError, KeyError) as e:
            raise ValueError(f"--out {out}: pictures are not written as {kind} ({e}): name it "
                             ".png") from None
        out = [out, *numbered_names(options)][-1]
    try:
        write_atomically(out, lambda part: part.touch(), keep=False)
    except OSError as e:
        raise ValueError(f"--out {options.out} cannot be written: {e.strerror}") from None


def check_page(options: argparse.Namespace) -> None:
    """As `check_output`, for --explain."""
    if ranks() > 1:
        raise ValueError("--explain shows one prompt on one device: leave torchrun out")
    if len(options.prompt) > 1:
        raise ValueError("--explain walks one prompt: give one --prompt")
    if options.out is not None and options.out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--explain draws a page: name --out {options.out.with_suffix('.html')}")
    if options.out is not None and (options.out.is_dir() or not options.out.parent.is_dir()):
        raise ValueError(f"--out {options.out} cannot be written: name a file in a folder "
                         "that exists")


def load_model(options: argparse.Namespace) -> ChameleonForConditionalGeneration:
    device, dtype = pick_device(options.device), options.dtype
    if ranks() > 1:  # started by torchrun
        device = join(device)
        config, kind = open_config(options.model)
        check_ranks(config, ranks(), options.quantize or kind)
        if options.compile:
            raise ValueError("--compile is for one device: start without torchrun")
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    dtype = getattr(torch, dtype)
    check_attention(options.attention, device, dtype, options.compile)
    if options.compile:
        check_compile(device)
    where = "cpu" if ranks() > 1 else device  # as mapped files, of which each takes its part
    model = load_checkpoint(
        ChameleonForConditionalGeneration, options.model, dtype, where, options.vqgan,
        options.quantize)
    if ranks() > 1:
        shard(model, device)
    return set_attention(model, options.attention)


def answer(options: argparse.Namespace) -> None:
    """All that can be wrong with the input is found before the weights, the slow part, are read."""
    sampling = sampling_options(options)
    check_options(options.max_new_tokens, **sampling)
    check_seeds(options.seed, options.count * len(options.prompt))
    check_unused(options)
    check_output(options)
    if options.model == TINY and not TINY.is_dir():  # an install has the code alone
        raise ValueError("the checkpoint tiny/ comes with a clone of the repository, not with an "
                         "installed package: run this in a clone, or name a --model")
    config = read_config(options.model)
    processor = load_processor(options.model)
    images = [load_image(path) for path in options.image]
    if options.reconstruct:
        check_place(options)
        return reconstruct(options, processor, images)
    if not options.prompt:
        raise ValueError("give a --prompt (see --help)")
    prompts = place_images(options.prompt, len(images))
    inputs = processor(text=prompts, images=images or None, padding=True, return_tensors="pt",
                       return_for_text_completion=options.completion)
    check_room(config, inputs["input_ids"].shape[1], options.mode)
    check_place(options)
    model = load_model(options)
    inputs = inputs.to(model.device)
    if options.explain:
        return write_walk(options, model, processor.tokenizer, inputs)
    decoder = Decoder(model, options.compile, options.attention)
    steps = stream(model, **inputs, mode=options.mode, max_new_tokens=options.max_new_tokens,
                   do_sample=options.temperature > 0, seed=options.seed, decoder=decoder,
                   num_return_sequences=options.count, **sampling)
    stats = Stats(model)
    make = {"text": write_text, "image": write_pictures, "interleaved": write_interleaved}
    try:
        make[options.mode](options, model, processor.tokenizer, stats.watch(steps))
    finally:
        if options.stats:
            print(stats.report(decoder.cache), file=sys.stderr)


def write_text(options: argparse.Namespace, model, tokenizer: Tokenizer, steps) -> None:
    """One answer streams to stdout; those of a batch follow each other, when all are done."""
    if len(options.prompt) == 1:
        try:
            for piece in pieces(model, tokenizer, steps):
                print(piece.text, end="", flush=True)
        finally:
            print(flush=True)
        return
    for prompt, row in zip(options.prompt, torch.stack(list(steps), dim=1).tolist()):
        print(prompt, file=sys.stderr, flush=True)
        print(tokenizer.decode(row), flush=True)


def write_pictures(options: argparse.Namespace, model, tokenizer: Tokenizer, steps) -> None:
    """One picture to --out; of several, a contact sheet to --out and each beside it, numbered."""
    from tqdm import tqdm

    rows = len(options.prompt) * options.count
    total = model.config.vq_config.codes_per_image + 2
    done = [None] * rows
    try:
        bar = tqdm(steps, total=total, desc="image tokens", disable=None, leave=False)
        for piece in pieces(model, tokenizer, bar):
            done[piece.row] = piece.image or done[piece.row]
    finally:  # also after Ctrl-C: what is drawn is saved
        pictures = [picture for picture in done if picture is not None]
        if pictures and rows == 1:
            save_picture(pictures[0], options.out)
        elif pictures:
            save_picture(contact_sheet(pictures), options.out)
            for path, picture in zip(numbered_names(options), pictures):
                save_picture(picture, path)
        if pictures:
            print(f"{options.out}: {len(pictures)} picture(s)", file=sys.stderr)


def with_bar(steps: Iterator[torch.Tensor], model) -> Iterator[torch.Tensor]:
    """Passes the ids of one row on; on a terminal, a bar shows how far a picture is drawn."""
    from tqdm import tqdm

    vocabulary, bar = model.model.vocabulary, None
    try:
        for ids in steps:
            if bar is not None:
                bar.update()
            if int(ids[0]) == vocabulary.begin_image_id:
                bar = tqdm(total=model.config.vq_config.codes_per_image + 1, desc="image tokens",
                           disable=None, leave=False)
            elif bar is not None and int(ids[0]) == vocabulary.end_image_id:
                bar.close()
                bar = None
            yield ids
    finally:
        if bar is not None:
            bar.close()


def write_interleaved(options: argparse.Namespace, model, tokenizer: Tokenizer, steps) -> None:
    """Text streams to stdout, a picture is a line with its file; --out gets the document."""
    parts, pictures = [], 0
    try:
        for piece in pieces(model, tokenizer, with_bar(steps, model)):
            if piece.image is not None:
                pictures += 1
                in_line = parts and isinstance(parts[-1], str) and not parts[-1].endswith("\n")
                new_line = "\n" if in_line else ""
                parts.append(piece.image)
                print(f"{new_line}[{options.out / str(pictures)}.png]", flush=True)
            elif parts and isinstance(parts[-1], str):
                parts[-1] += piece.text
            else:
                parts.append(piece.text)
            print(piece.text, end="", flush=True)
    finally:
        print(flush=True)
        if parts:
            write_document(options.out, parts)
            print(f"{options.out / 'document.html'}", file=sys.stderr)


def write_walk(options: argparse.Namespace, model, tokenizer: Tokenizer, inputs) -> None:
    """The prompt's walk through the model to stdout, and to --out as a page."""
    from chameleon_extras.explain import page, report, walk

    shown = walk(model, tokenizer, inputs["input_ids"], inputs.get("pixel_values"))
    print(report(shown))
    if options.out is not None:
        html_page = page(shown, options.prompt[0])
        write_atomically(options.out, lambda part: part.write_text(html_page, encoding="utf-8"))
        print(options.out, file=sys.stderr)


def reconstruct(options: argparse.Namespace, processor: ChameleonProcessor, images: list) -> None:
    """Each picture as the model sees it, its codes, and what the codes say, side by side."""
    if not images:
        raise ValueError("--reconstruct needs an --image")
    model = load_model(options)
    pixels = processor.image_processor(images, return_tensors="pt").pixel_values.to(model.device)
    sheet, side, psnr = there_and_back(model, pixels, 512)
    save_picture(sheet, options.out)
    print(f"{options.out}: {len(images)} picture(s), {side} x {side} codes each, "
          f"PSNR {psnr:.1f} dB", file=sys.stderr)


def run(arguments: list[str] | None = None) -> int:
    """The command line's words, those of this process by default -> exit code, see `exit_code`."""
    options = parse(arguments)
    return exit_code("generate.py", lambda: answer(options))
