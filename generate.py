"""Sampling: the loop that turns a Chameleon into something that answers. Also the command line.

    ids (B,T) --prefill--> logits of the last place (B,V) --grammar, filters--> one id each (B,)
                                ^                                                   |
                                +----- one token through the cache (B,1) <----------+

    python generate.py --prompt "What do you see in this image?<image>" --image examples/shapes.png

The prompt goes through the model once, all tokens at a time, and fills the KV cache; then every
new token costs one step of one column. A step is four small pure functions on logits (B, V):
which ids the grammar allows, repetition penalty, temperature with top-k and top-p, and the draw.

Rows of a batch are independent: each has its own positions, its own end, its own random numbers,
and gives exactly what it would give alone.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from chameleon import ChameleonConfig, ChameleonForConditionalGeneration, KVCache
from tokenizer import VocabularyMap

TINY = Path(__file__).resolve().parent / "tiny"


# ---------------------------------------------------------------------------------------------
# From logits to an id. Each function is (B, V) -> (B, V) or, the last one, (B, V) -> (B,).


def picture_ids(vocabulary: VocabularyMap) -> list[int]:
    """All ids that belong to pictures: the codes, begin-image, end-image and <image>."""
    marks = (vocabulary.begin_image_id, vocabulary.end_image_id, vocabulary.image_token_id)
    return vocabulary.code_to_id.tolist() + [i for i in marks if i is not None]


def text_only(logits: Tensor, image_ids: Tensor) -> Tensor:
    """The modality grammar of text: none of `image_ids` (n,), those of `picture_ids`."""
    return logits.index_fill(-1, image_ids, float("-inf"))


def penalize_repetition(logits: Tensor, ids: Tensor, penalty: float) -> Tensor:
    """Makes every id of `ids` (B, T) less likely, prompt included (CTRL, arXiv 1909.05858).

        logit / penalty where positive, logit * penalty where negative
    """
    if penalty == 1.0:
        return logits
    seen = logits.gather(-1, ids)  # (B, T)
    seen = torch.where(seen > 0, seen / penalty, seen * penalty)
    return logits.scatter(-1, ids, seen)


def keep_top_k(logits: Tensor, k: int | None) -> Tensor:
    """Keeps the k highest logits of each row, and those equal to the k-th."""
    if not k or k >= logits.shape[-1]:
        return logits
    kth = logits.topk(k, dim=-1).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < kth, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keeps the smallest set of most likely ids whose probability reaches p; at least one."""
    if p >= 1.0:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    probs = ordered.softmax(-1)
    # An id falls out if those BEFORE it reach p already; so the one that crosses p stays.
    out = probs.cumsum(-1) - probs >= p
    return logits.masked_fill(out.scatter(-1, order, out), float("-inf"))


def draw(logits: Tensor, generators: list[torch.Generator]) -> Tensor:
    """One id for each row, distributed as softmax(logits).   (B, V) -> (B,)

    If e_i are independent and exponential, argmax_i p_i / e_i is i with probability p_i: no
    cumulative sum, no host synchronization, and every row keeps its own stream of numbers.
    """
    noise = torch.stack([
        torch.empty_like(row).exponential_(generator=g) for row, g in zip(logits, generators)
    ])  # (B, V)
    return (logits.softmax(-1) / noise).argmax(-1)  # (B,)


def choose(
    logits: Tensor, ids: Tensor, *, temperature: float, top_k: int | None, top_p: float,
    repetition_penalty: float, generators: list[torch.Generator] | None,
) -> Tensor:
    """logits (B, V), ids so far (B, T) -> next ids (B,). The order of transformers' processors.

    Without generators the most likely id; the penalty holds for it, too.
    """
    logits = penalize_repetition(logits.float(), ids, repetition_penalty)
    if generators is None:
        return logits.argmax(-1)  # (B,)
    logits = keep_top_p(keep_top_k(logits / temperature, top_k), top_p)
    return draw(logits, generators)


# ---------------------------------------------------------------------------------------------
# The loop


def check_options(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float,
                  repetition_penalty: float) -> None:
    """ValueError, naming the option, if one is out of range."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 (greedy) or above, got {temperature}")
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k must be 1 or more, or 0 for no limit, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if not 0 < repetition_penalty < float("inf"):
        raise ValueError(f"repetition_penalty must be above 0, got {repetition_penalty}")


def check_room(config: ChameleonConfig, prompt_length: int) -> int:
    """-> how many tokens fit behind the prompt. ValueError if none does."""
    factor = config.rope_factor if config.rope_type != "default" else 1
    context = int(config.max_position_embeddings * factor)
    if prompt_length >= context:
        raise ValueError(f"the prompt has {prompt_length} tokens, pictures included, but the "
                         f"context holds {context}: shorten it or use fewer pictures")
    return context - prompt_length


def check_prompt(model: ChameleonForConditionalGeneration, input_ids: Tensor,
                 attention_mask: Tensor | None, pixel_values: Tensor | None) -> None:
    """ValueError for what would run and give a wrong answer."""
    if input_ids.ndim != 2 or not input_ids.numel():
        raise ValueError(f"input_ids must be (B, T) with T > 0, got {tuple(input_ids.shape)}")
    if attention_mask is not None and not attention_mask[:, -1].all():
        raise ValueError("the prompts are padded on the right, and the next token would follow "
                         "padding: use padding_side='left'")
    placeholder = model.model.vocabulary.image_token_id
    if pixel_values is None and placeholder is not None and (input_ids == placeholder).any():
        raise ValueError("the prompt has <image> placeholders but there are no pixel_values")


def stop_ids(model: ChameleonForConditionalGeneration, eos_token_id) -> list[int]:
    """Where an answer ends: the ids asked for, else end of sequence and end of turn."""
    if eos_token_id is None:
        end_of_turn = model.model.vocabulary.end_of_turn_id
        ids = model.config.eos_token_id
        ids = list(ids) if isinstance(ids, (list, tuple)) else [ids]
        return [i for i in (*ids, end_of_turn) if i is not None]
    return list(eos_token_id) if isinstance(eos_token_id, (list, tuple)) else [eos_token_id]


@torch.inference_mode()
def stream(
    model: ChameleonForConditionalGeneration,
    input_ids: Tensor,  # (B, T), padded on the left
    attention_mask: Tensor | None = None,  # (B, T), 0 on padding
    pixel_values: Tensor | None = None,  # (N, 3, H, W), for the <image> placeholders in order
    *,
    max_new_tokens: int = 256,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    eos_token_id: int | list[int] | None = None,
) -> Iterator[Tensor]:
    """Yields the next id of every row, (B,), until all have ended or the context is full.

    A row that has ended yields padding. `temperature` 0 is greedy. Row b draws with seed + b,
    so it can be repeated alone. Raises ValueError on options or prompts that cannot work.
    """
    check_options(max_new_tokens, temperature, top_k, top_p, repetition_penalty)
    check_prompt(model, input_ids, attention_mask, pixel_values)
    B, T = input_ids.shape
    steps = min(max_new_tokens, check_room(model.config, T))
    model.eval()
    if pixel_values is not None:
        input_ids = model.model.replace_image_placeholders(input_ids, pixel_values)
    seen = input_ids  # what the repetition penalty counts
    if attention_mask is None or attention_mask.all():
        attention_mask = None  # no padding: every step may use the fastest attention
        positions = torch.arange(T, device=input_ids.device).expand(B, T)
    else:
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)  # 0 at a row's first real token
        seen = torch.where(attention_mask.bool(), input_ids, input_ids[:, -1:])  # no padding
    generators = None
    if do_sample and temperature > 0:
        generators = [torch.Generator(input_ids.device).manual_seed(seed + b) for b in range(B)]
    vocabulary, stops = model.model.vocabulary, stop_ids(model, eos_token_id)
    image_ids = torch.tensor(picture_ids(vocabulary), dtype=torch.long, device=input_ids.device)
    stops = torch.tensor(stops, dtype=torch.long, device=input_ids.device)
    pad = model.config.pad_token_id
    pad = pad if pad is not None else int(stops[0]) if len(stops) else 0

    cache = KVCache(model.config, B, T + steps, model.dtype, input_ids.device)
    ended = torch.zeros(B, dtype=torch.bool, device=input_ids.device)
    new = input_ids
    for _ in range(steps):
        # Only the last place needs logits: all of them would be (T, V), 1 GiB at 4096 x 65536.
        logits = model(new, attention_mask=attention_mask, position_ids=positions,
                       past_key_values=cache, logits_to_keep=1, mask_image_logits=False).logits
        chosen = choose(text_only(logits[:, -1], image_ids), seen, temperature=temperature,
                        top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty,
                        generators=generators)  # (B,)
        chosen = torch.where(ended, pad, chosen)
        yield chosen
        ended = ended | torch.isin(chosen, stops)
        if ended.all():
            return
        new = chosen[:, None]  # (B, 1)
        seen = torch.cat((seen, new), dim=1)  # (B, T + 1)
        positions = positions[:, -1:] + 1  # (B, 1)
        if attention_mask is not None:
            attention_mask = torch.cat((attention_mask, torch.ones_like(new)), dim=1)


def generate(model: ChameleonForConditionalGeneration, input_ids: Tensor, attention_mask=None,
             pixel_values=None, **options) -> Tensor:
    """Prompt ids (B, T) -> prompt and answer (B, T + new), ended rows padded.

    Options are those of `stream`; greedy by default. Equals transformers' model.generate, where
    `model.generate(**inputs, ...)` is written `generate(model, **inputs, ...)`.
    DIFFERS: ends at end of turn, too; never yields begin-image or end-image (transformers
    masks the codes only); max_new_tokens defaults to 256, not 20, and top_k to none, not 50.
    """
    new = list(stream(model, input_ids, attention_mask, pixel_values, **options))
    return torch.cat((input_ids, torch.stack(new, dim=1)), dim=1)  # (B, T + new)


# ---------------------------------------------------------------------------------------------
# The command line


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog="generate.py", description="Text from text and pictures.")
    add = parser.add_argument
    add("--model", type=Path, default=TINY, help="folder with the weights (default: tiny/)")
    add("--prompt", action="append", required=True, metavar="TEXT",
        help="<image> marks a picture's place; repeat the option for a batch")
    add("--image", action="append", default=[], metavar="FILE",
        help="in the order of <image>; without <image> in the prompt it goes in front")
    add("--completion", action="store_true", help="continue the prompt instead of answering it")
    add("--max-new-tokens", type=int, default=256)
    add("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    add("--top-k", type=int, default=0, help="0 is no limit")
    add("--top-p", type=float, default=1.0)
    add("--repetition-penalty", type=float, default=1.0)
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="cpu, cuda, mps; auto takes the fastest there is")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="auto is float32 on a CPU, else bfloat16; 7B on a CPU wants bfloat16")
    add("--attention", default="sdpa", choices=["eager", "sdpa"])
    return parser.parse_args(arguments)


def place_images(prompts: list[str], count: int) -> list[str]:
    """Prompts without <image> get the pictures in front: all of them, or one for each prompt."""
    if not count or any("<image>" in prompt for prompt in prompts):
        return prompts
    if len(prompts) == 1:
        return ["<image>" * count + prompts[0]]
    if len(prompts) == count:
        return ["<image>" + prompt for prompt in prompts]
    raise ValueError(f"{count} pictures for {len(prompts)} prompts: mark their places by <image>")


def pick_device(name: str) -> torch.device:
    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used here: {reason}") from None


def answer(options: argparse.Namespace) -> None:
    """Answers to stdout, as they are made; everything else to stderr.

    All that can be wrong with the input is found before the weights, the slow part, are read.
    """
    from checkpoint import read_config
    from tokenizer import ChameleonProcessor, load_image

    sampling = dict(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
                    repetition_penalty=options.repetition_penalty)
    check_options(options.max_new_tokens, **sampling)
    config = read_config(options.model)
    processor = ChameleonProcessor.from_pretrained(options.model)
    images = [load_image(path) for path in options.image]
    prompts = place_images(options.prompt, len(images))
    inputs = processor(text=prompts, images=images or None, padding=True, return_tensors="pt",
                       return_for_text_completion=options.completion)
    check_room(config, inputs["input_ids"].shape[1])
    device = pick_device(options.device)
    dtype = options.dtype
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    dtype = getattr(torch, dtype)
    model = ChameleonForConditionalGeneration.from_pretrained(options.model, dtype, device)
    steps = stream(model.set_attention(options.attention), **inputs.to(device),
                   max_new_tokens=options.max_new_tokens, do_sample=options.temperature > 0,
                   seed=options.seed, **sampling)
    if len(prompts) == 1:
        decoder = processor.tokenizer.stream_decoder()
        for ids in steps:
            print(decoder.feed(int(ids[0])), end="", flush=True)
        print(decoder.flush())
    else:
        for prompt, row in zip(options.prompt, torch.stack(list(steps), dim=1).tolist()):
            print(prompt, file=sys.stderr, flush=True)
            print(processor.decode(row, skip_special_tokens=True), flush=True)


def main(arguments: list[str] | None = None) -> int:
    """-> exit code: 0, 2 for input that cannot work, 130 when interrupted."""
    options = parse(arguments)
    try:
        answer(options)
    except ValueError as e:
        print(f"generate.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
