"""`generate.py --prompts FILE`: many prompts, answered in batches, each answer a line of JSON.

    FILE --read_prompts--> Line (prompt, images) --batches--> {"prompt", "images", "answer"} a line

Who needs it: whoever measures a model on questions of their own. The answers have the form that
`train.py sft --data` reads; pictures are relative to the folder of FILE. A run that was stopped
goes on where it stopped, if it gets the same --prompts and --out. Prompt n draws with --seed + n,
so an answer does not depend on its batch.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TextIO

from chameleon import ChameleonConfig
from chameleon_extras.command import load_model, place_images, sampling
from chameleon_extras.decoding import Decoder
from chameleon_extras.files import Line, hold, read_lines, say
from generate import generate, room_behind, seeds_of
from processor import ChameleonProcessor


def read_prompts(file: Path) -> list[Line]:
    """The prompts of a file, each picture at its <image>. ValueError names a line and its error."""
    if not file.is_file():
        raise ValueError(f"--prompts {file} is no file: write one prompt a line into it")
    if file.suffix.lower() == ".json":
        raise ValueError(f"--prompts {file}: write one JSON object a line, and name it .jsonl")
    asked = []
    for line in read_lines(file, "prompt"):
        line = line._replace(prompt=place_images([line.prompt], len(line.images))[0])
        if line.prompt.count("<image>") != len(line.images):
            raise ValueError(f"{line.where}: {line.prompt.count('<image>')} <image> but "
                             f"{len(line.images)} picture(s): name each in \"images\" of a .jsonl")
        asked.append(line)
    if not asked:
        raise ValueError(f"{file} is empty: write one prompt a line")
    return asked


def written(line: Line, answer: str, encoding: str = "utf-8") -> str:
    """A prompt and its answer as --out holds them; escaped if the encoding lacks a character."""
    images = {"images": line.images} if line.images else {}
    values = {"prompt": line.prompt, **images, "answer": answer}
    text = json.dumps(values, ensure_ascii=False)
    return text if text.encode(encoding, "ignore").decode(encoding) == text else json.dumps(values)


def answered(out: Path, asked: list[Line]) -> int:
    """How many of the prompts --out has answered already; a last line cut short is removed, and a
    whole one gets its end of line.

    ValueError for a file with anything else in it, which is left as it is.
    """
    def answers(n: int, line: bytes) -> bool:
        try:
            return written(asked[n], json.loads(line)["answer"]).encode() == line
        except (ValueError, LookupError, TypeError, RecursionError):
            return False

    lines, done = out.read_bytes().split(b"\n"), 0
    while done < len(lines) and answers(done, lines[done]):
        done += 1
    rest = b"\n".join(lines[done:])  # nothing, or the beginning of the next answer
    begin = written(asked[done], "")[:-2].encode() if done < len(asked) else b"\n"  # no rest
    if b"\n" in rest or not (rest.startswith(begin) or begin.startswith(rest)):
        raise ValueError(f"--out {out} line {done + 1} is not prompt {done + 1}, but something "
                         "else: name another file")
    with open(out, "rb+") as file:  # what it holds, without the rest
        file.writelines(line + b"\n" for line in lines[:done])
        file.truncate()
    return done


def inputs_of(lines: list[Line], options: argparse.Namespace,
              processor: ChameleonProcessor) -> dict:
    """Prompts -> what the model reads. ValueError for a prompt or a picture that it cannot read."""
    pictures = [options.prompts.parent / name for line in lines for name in line.images]
    return processor(text=[line.prompt for line in lines], images=pictures or None, padding=True,
                     padding_side="left", return_for_text_completion=options.completion)


def answer_all(options: argparse.Namespace, config: ChameleonConfig,
               processor: ChameleonProcessor) -> None:
    """--prompts. Checks all lines before the weights are read."""
    asked, rooms = read_prompts(options.prompts), []
    if options.out and options.out.exists() and options.out.samefile(options.prompts):
        raise ValueError(f"--out {options.out} is the file of the prompts: name another file")
    for line in asked:
        try:
            length = len(processor.prompt_ids(line.prompt, options.completion))
            rooms.append(room_behind(config, length))  # before its pictures are read: maybe many
            inputs_of([line], options, processor)
        except ValueError as error:
            raise ValueError(f"{line.where}: {error}") from None
    seeds_of(options.seed, len(asked))
    if min(rooms) < (options.max_new_tokens or 256) and options.batch > 1:
        options.batch = 1
        say("--batch 1: behind one of the prompts is less room than an answer may take")
    if not options.out:
        return answer_rest(options, processor, asked, 0, sys.stdout)
    options.out.touch()
    with hold(options.out), open(options.out, "a", encoding="utf-8", newline="\n") as file:
        done = answered(options.out, asked)
        if done < len(asked):
            answer_rest(options, processor, asked, done, file)
        before = f", {done} of them from before, with that run's options" if done else ""
        say(f"{options.out}: {len(asked)} answer(s){before}")


def answer_rest(options: argparse.Namespace, processor: ChameleonProcessor, asked: list[Line],
                done: int, file: TextIO) -> None:
    """Writes the answers after the first `done` to `file`."""
    from tqdm import tqdm

    model = load_model(options)
    decoder = Decoder(model, options.compile, options.attention)
    with tqdm(total=len(asked), initial=done, unit="prompt", disable=None) as bar:
        for start in range(done, len(asked), options.batch):
            lines = asked[start : start + options.batch]
            inputs = inputs_of(lines, options, processor).to(model.device)
            ids = generate(model, **inputs, **sampling(options), decoder=decoder,
                           seed=options.seed + start)  # row b adds b
            new = ids[:, inputs["input_ids"].shape[1] :]  # (B, new)
            for line, answer in zip(lines, processor.batch_decode(new, skip_special_tokens=True)):
                file.write(written(line, answer, file.encoding or "utf-8") + "\n")
            file.flush()
            bar.update(len(lines))
