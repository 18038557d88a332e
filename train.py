"""Trains the checkpoint in tiny/ from a seed: the recipe of Chameleon at a small size.

    stage      trains        on                                   what is in the loss
    vqvae      the VQ-VAE    pictures of coloured shapes          pixels, and distances to the codes
    tokenizer  BPE merges    about 40,000 sentences               no loss: pairs are counted
    pretrain   the decoder   statements, pictures, and both       every token
    sft        the decoder   prompts with answers                 the tokens of the answer

    python train.py all --out mine      the four stages in turn, then a table of results
    python train.py sft --out mine      one stage; run again, it continues from its last save

Loss: cross entropy plus z-loss, with a weight for each token (`decoder_loss`). In `pretrain` a text
token weighs 1 and a picture token IMAGE_WEIGHT. In `sft` only the answer has weight, be it text or
a drawn picture; the prompt and the pictures in it weigh 0. The last sentence of the answer to a
question weighs CONCLUSION_WEIGHT in total, at least 1 a token. In the last fifth of `pretrain`
every second batch is made and weighted as in `sft`.

Attention mask (`visible`): causal, and several documents packed into one row do not attend to each
other. Several questions about one picture share its tokens, but do not attend to each other, so
that an answer is read off the picture and not off an earlier answer.

Input: the targets themselves (teacher forcing). Pictures are codes, computed once by the VQ-VAE,
which stays fixed after its stage. In `sft` some codes of the input are corrupted; the targets stay
correct (`Corpus.drawn`, `Corpus.given`). During training the codes' rows of the embedding and of
the head are computed from the codebook (tiny_world/code_rows.py).

Names above that this file does not define are in tiny_world/documents.py. Letters: B rows, T tokens
of a row, N tokens with weight, V vocabulary, D width of the residual stream, H heads of width Dh.
Sections are those of the paper, https://arxiv.org/abs/2405.09818: 2.1 tokenizers, 2.2 pretraining
data in two stages, 2.3 stability and optimization, 3 alignment (here: sft).
"""

import argparse
import io
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from chameleon import ChameleonConfig, ChameleonDecoderLayer, ChameleonForConditionalGeneration
from chameleon_extras.decoding import check_compile
from chameleon_extras.files import OneLineParser, exit_code, fast_bf16, hold, write_atomically
from chameleon_extras.quantize import kind_of
from chameleon_extras.release import load_processor
from processor import ChameleonImageProcessor, ChameleonProcessor
from tiny_world import evaluate, language, world
from tiny_world.code_rows import add_code_rows, add_learned, bake
from tiny_world.documents import Corpus, OwnData, Pictures, Rows, Shares, Writer, read_examples
from tiny_world.run import Run, autocast, fingerprint, gathered, rate, shard
from tiny_world.vqvae_stage import VQ, train_vqvae
from tokenizer import BEGIN_IMAGE, END_IMAGE, END_OF_TURN, SentencePieceTokenizer, image_token_name
from vqvae import ChameleonVQVAE

# ---------------------------------------------------------------------------------------------
# The numbers: ours, and in the comment those of the paper's 7B model

SIZES: dict = dict(
    hidden_size=192,  # 4096
    intermediate_size=512,  # 11008
    num_hidden_layers=6,  # 32
    num_attention_heads=6,  # 32
    max_position_embeddings=1024,  # 4096
)
MERGES = 256  # 48896 in the release's tokenizer
BETAS, EPS = (0.9, 0.95), 1e-5  # the same: AdamW, section 2.3
MOMENTUM = 0.95  # of Muon, which the paper does not have
WEIGHT_DECAY = 0.1  # 0.1 (section 2.3), here on matrices only
CLIP = 1.0  # 1.0, the norm of the gradient over all parameters (section 2.3)
Z_LOSS = 1e-5  # 1e-5, the factor of log^2 Z (section 2.3)
DROPOUT = 0.0  # 0.1 (section 2.3); 0 here, because so small a model underfits
LEARNING_RATE = 3e-3  # 1e-4 in pretraining (section 2.3), 1e-5 in alignment (section 3)
OWN_RATE = {"all": 1e-5, "lora": 1e-4, "image-head": 1e-4}  # --data, at a width of 1024 or more
STEPS = {"pretrain": 900, "sft": 12_000}  # a step is 4,608 tokens; in the paper 2^23 (section 2.3)
# (end, shares): up to this part of sft's steps, these Shares: of practice, lists and places.
PRACTICE = ((0.5, Shares(0.40, 0.10)), (0.85, Shares(0.34, 0.06, 0.2)),
            (1.0, Shares(0.22, 0.04, 0.2)))
ROWS = 18  # 2048, of 4096 tokens
TINY = Path(__file__).resolve().parent / "tiny"
OWN_ROWS, EPOCHS = 6, 3  # --data: examples a step; how often each is learned
PICTURES = 80_000  # 1.4 billion pairs of picture and text (section 2.2)


# ---------------------------------------------------------------------------------------------
# The tokenizer


def sentences(rng: np.random.Generator, n: int) -> list[str]:
    """About n sentences of all kinds that the decoder learns. The merges come from them."""
    lines = [line for pair in language.SMALL_TALK.items() for line in pair] * 20
    while len(lines) < n:
        scene = world.sample_scene(rng)
        turns = [ask(rng, scene) for ask in language.QUESTIONS.values()]
        pair, edit = world.sample_pair(rng), world.sample_edit(rng)
        turns += [ask(rng, *pair) for ask in (language.ask_common, language.ask_which,
                                              language.ask_both)]
        turns += [language.ask_difference(rng, *edit), (language.ask_edit(rng, *edit), "")]
        wanted = language.ask_drawing(rng, scene).text
        request = world.pick(rng, language.DRAW_PROMPTS).format(wanted)
        turns += [(request, language.state(rng, scene)), (world.pick(rng, language.THEN_SAY), "")]
        for question, answer in filter(None, turns):
            lines += [language.vary(rng, question), answer]
    return [line for line in lines if line]


def train_tokenizer(run: Run) -> None:
    """BPE by sentencepiece (section 2.1). Ids are in this order: specials, codes, marks, bytes,
    merges; the first two are as in the release.
    """
    import sentencepiece

    marks = [END_IMAGE, BEGIN_IMAGE, END_OF_TURN, "<image>"]
    codes = [image_token_name(code) for code in range(VQ.num_embeddings)]
    run.out.mkdir(parents=True, exist_ok=True)
    lines = sentences(np.random.default_rng(run.options.seed), 40_000)
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=file, model_type="bpe",
        vocab_size=4 + len(codes) + len(marks) + 256 + MERGES, control_symbols=codes + marks,
        bos_id=0, pad_id=1, eos_id=2, unk_id=3, byte_fallback=True, split_digits=True,
        # Decoding returns every text unchanged: no normalization, no spaces added or dropped.
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=False, allow_whitespace_only_pieces=True, character_coverage=1.0,
        minloglevel=2,
    )  # fmt: skip
    path = run.out / "tokenizer.model"
    if run.file("pretrain").exists() and path.is_file() and path.read_bytes() != file.getvalue():
        raise ValueError(f"{path} would change, and pretrain has used it: name another --out")
    write_atomically(path, lambda part: part.write_bytes(file.getvalue()))
    run.say(f"tokenizer: {trained_tokenizer(run).vocab_size} ids")


# ---------------------------------------------------------------------------------------------
# The decoder: one loop for pretrain and sft


def build_model(tokenizer: SentencePieceTokenizer, vq: ChameleonVQVAE,
                options: argparse.Namespace) -> ChameleonForConditionalGeneration:
    """An untrained decoder around a trained VQ-VAE, which is frozen."""
    config = ChameleonConfig(
        **SIZES, vocab_size=tokenizer.vocab_size, vocabulary_map=tokenizer.vocab, vq_config=VQ,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, swin_norm=options.norm_order == "swin",
    )  # fmt: skip
    model = ChameleonForConditionalGeneration(config)
    model.model.vqmodel = vq.requires_grad_(False)
    for layer in model.model.layers:
        assert isinstance(layer, ChameleonDecoderLayer)
        # Each layer adds two terms to the residual stream. With std / sqrt(2 layers) their sum has
        # the variance of a single term, whatever the number of layers (GPT-2's initialization).
        for last in (layer.self_attn.o_proj, layer.mlp.down_proj):
            nn.init.normal_(last.weight, std=0.02 / math.sqrt(2 * config.num_hidden_layers))
    return model


def add_parts(model: ChameleonForConditionalGeneration, options: argparse.Namespace):
    """Adds what only training has -> peft's wrapper or None, see `add_learned`."""
    if not options.data:
        add_code_rows(model)
    adapter = add_learned(model, options.train)

    def drop(module: nn.Module, inputs: tuple, y: Tensor) -> Tensor:
        return F.dropout(y, options.dropout, module.training)

    for layer in model.model.layers:
        assert isinstance(layer, ChameleonDecoderLayer)
        if options.no_qk_norm:
            for name in ("q_norm", "k_norm"):
                setattr(layer.self_attn, name, nn.Identity())
        if options.dropout:  # on the outputs of attention and feed-forward (section 2.3, 7B only)
            for last in (layer.self_attn.o_proj, layer.mlp.down_proj):
                last.register_forward_hook(drop)
    return adapter


def make_optimizers(model: nn.Module, peak: float, kind: str) -> list[torch.optim.Optimizer]:
    """The optimizers of all weights that learn. Weight decay is for matrices only: it would pull
    the gains of norms to 0.

    adamw: AdamW for all, as in the paper (section 2.3).
    muon: Muon (https://kellerjordan.github.io/posts/muon) for the matrices of the layers. It makes
    all singular values of an update about 1. The factor of arXiv 2502.16982, section 2.2, gives the
    update the size of AdamW's. So both use one learning rate.
    """
    layers, matrices, others = [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.ndim < 2 or "norm" in name:  # QK-norm's gains have two dimensions (H, Dh)
            others.append(p)
        elif kind == "muon" and ".layers." in name:
            layers.append(p)
        else:
            matrices.append(p)
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY},
              {"params": others, "weight_decay": 0.0}]
    groups, optimizers = [group for group in groups if group["params"]], []
    if groups:
        optimizers += [torch.optim.AdamW(groups, lr=peak, betas=BETAS, eps=EPS, fused=True)]
    if layers:
        optimizers += [Muon(layers, {"lr": peak, "weight_decay": WEIGHT_DECAY})]
    return optimizers


class Muon(torch.optim.Optimizer):
    """Equals torch.optim.Muon with adjust_lr_fn="match_rms_adamw", which computes in bf16 only. A
    CPU that emulates bf16 would spend three quarters of a training step on it.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # torch.distributed.checkpoint passes closure
        (group,) = self.param_groups
        for p in (p for p in group["params"] if p.grad is not None):
            mean = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            mean.lerp_(p.grad, 1 - MOMENTUM)
            x = p.grad.lerp(mean, MOMENTUM)  # Nesterov's momentum
            x = x.bfloat16() if fast_bf16(p.device) else x
            x = x / x.norm().clamp(min=1e-7)
            x = x.T if p.shape[0] > p.shape[1] else x
            for _ in range(5):  # Newton-Schulz: all singular values of x go to about 1
                A = x @ x.T
                # x <- 3.4445 x + (-4.7750 A + 2.0315 A^2) x
                x = torch.addmm(x, torch.addmm(A, A, A, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
            x = x.T if p.shape[0] > p.shape[1] else x
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(x, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)


def decoder_loss(model: ChameleonForConditionalGeneration, batch: dict[str, Tensor],
                 z_weight: float) -> tuple[Tensor, dict[str, float]]:
    """A batch as of `Rows.batch` -> the loss (scalar), and its parts for curves.csv (nats a token).

        loss = sum_t w_t (-log p(x_t | x_<t) + z_weight log^2 Z_t) / sum_t w_t

    Z_t = sum_v exp(logit_v) is the denominator of the softmax. Adding a constant to all logits
    changes Z but not p, so cross entropy lets the logits drift until bf16 cannot represent them.
    The z-loss pulls log Z towards 0 (section 2.3).
    """
    ids, weight = batch["ids"], batch["weight"][:, 1:]  # position t predicts token t + 1
    with autocast(ids.device):
        hidden = model.model(  # "read": the input ids, some codes corrupted; "ids": the targets
            batch["read"], attention_mask=batch["mask"], position_ids=batch["position"],
            use_cache=False, return_dict=True,
        ).last_hidden_state  # (B, T, D)
        counted = weight > 0
        logits = model.lm_head(hidden[:, :-1][counted]).float()  # (N, V), only where w > 0
    target, w = ids[:, 1:][counted], weight[counted]  # (N,)
    log_z = logits.logsumexp(-1)  # (N,)
    # -log p(x) = log Z - logit_x
    nll = log_z - logits.gather(-1, target[:, None])[:, 0]  # (N,)
    # Run.share adds "total": the sum of w over all ranks, divided by the number of ranks.
    loss = (w * (nll + z_weight * log_z.square())).sum() / batch.get("total", w.sum())
    with torch.no_grad():
        picture = torch.isin(target, model.model.vocabulary.code_to_id)
        parts = {"log_z": log_z, "z_loss": Z_LOSS * log_z.square(),  # with --no-z-loss, too
                 "text_loss": nll[~picture], "image_loss": nll[picture]}
        return loss, {name: part.mean().item() for name, part in parts.items() if len(part)}


class QueryNorm:
    """Mean |q| before QK-norm in the last layer: growing norms precede divergence (section 2.3)."""

    def __init__(self, model: ChameleonForConditionalGeneration) -> None:
        last, self.heads = model.model.layers[-1], model.config.num_attention_heads
        assert isinstance(last, ChameleonDecoderLayer)
        last.self_attn.q_proj.register_forward_hook(self.remember)

    def remember(self, module: nn.Module, inputs: tuple, q: Tensor) -> None:
        self.q = q.detach().unflatten(-1, (self.heads, -1))  # (B, T, H, Dh)

    def __call__(self) -> float:
        norms = self.q.float().norm(dim=-1)  # (B, T, H)
        return norms[norms > 0].mean().item()  # padding is 0 if its embedding is, as in tiny/


def train_decoder(stage: str, run: Run) -> None:
    """Runs pretrain or sft from its last saved step; each save also exports to --out."""
    options = run.options
    rng = np.random.default_rng((options.seed, list(STEPS).index(stage)))
    prepared = own_data(run) if options.data else toy_world(stage, run, rng)
    model, processor, steps, peak, batch_of = prepared
    first_weights = fingerprint(p.detach().flatten()[::997].float().cpu()  # some of each
                                for p in model.parameters())
    if run.device.type == "cpu" and fast_bf16(run.device):  # SDPA's kernel leaves bf16 units idle
        model.set_attn_implementation("eager")
    if run.world_size > 1:
        shard(model)
    peak = options.learning_rate or peak
    optimizers = make_optimizers(model, peak, options.optimizer)
    run.made_by |= {  # saved; `resume` raises ValueError if one of these has changed
        "--learning-rate": peak, "--optimizer": options.optimizer, "--dropout": options.dropout,
        "--norm-order": options.norm_order, "--no-qk-norm": options.no_qk_norm,
        "--no-z-loss": options.no_z_loss, "--train": options.train, "first weights": first_weights,
    }  # fmt: skip
    start = run.resume(stage, model, optimizers, rng)
    if start >= steps:
        run.say(f"{stage}: all {steps} steps are done, --steps makes more")
        export(model, processor, run)  # --out may have been removed
    query_norm = QueryNorm(model)
    if options.checkpointing:
        model.gradient_checkpointing_enable()
    if options.compile:
        dynamic = None if options.data else False  # None: as soon as a second length is seen
        # The layers are alike, so torch compiles one and reuses its code. That code runs no hook.
        # So the last layer, which has QueryNorm's hook, is not compiled.
        for layer in model.model.layers[:-1]:
            layer.forward = torch.compile(layer.forward, dynamic=dynamic)
    model.train()
    for step in run.progress(range(start, steps), stage):
        z_weight = 0.0 if options.no_z_loss else Z_LOSS
        loss, curves = decoder_loss(model, run.share(batch_of(step)), z_weight)
        model.zero_grad(set_to_none=True)
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        run.check_gradient(stage, step, grad_norm)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * rate(stage, step, steps)
            optimizer.step()
        if step % run.EVERY == 0 or step + 1 == steps:
            curves |= {"q_norm": query_norm(), "grad_norm": float(gathered(grad_norm))}
            run.log(stage, step, curves)
        if run.due(step, steps):
            run.save(stage, step + 1, model, optimizers, rng)
            export(model, processor, run)


def trained_vqvae(run: Run) -> ChameleonVQVAE:
    """The first stage's VQ-VAE, rounded to bf16 like the export, so that both give equal codes."""
    vq = ChameleonVQVAE(VQ)
    run.take_over("vqvae", vq)
    for weight in vq.parameters():
        weight.data = weight.data.bfloat16().float()
    return vq.eval()


def trained_tokenizer(run: Run) -> SentencePieceTokenizer:
    """The tokenizer of the second stage; ValueError if that has not been run."""
    if not (run.out / "tokenizer.model").is_file():
        raise ValueError(f"{run.out}/tokenizer.model is missing: run `train.py tokenizer` first")
    return SentencePieceTokenizer(run.out / "tokenizer.model")


# Model, processor, number of steps, peak of the learning rate, and step -> its batch.
Prepared = tuple[ChameleonForConditionalGeneration, ChameleonProcessor, int, float,
                 Callable[[int], dict[str, Tensor]]]


def toy_world(stage: str, run: Run, rng: np.random.Generator) -> Prepared:
    """The model as the stage before left it, and the documents about shapes."""
    options, steps = run.options, run.options.steps or STEPS[stage]
    tokenizer, vq = trained_tokenizer(run), trained_vqvae(run)
    model = build_model(tokenizer, vq, options)
    add_parts(model, options)
    model.to(run.device)
    if stage == "sft":
        made_by = run.take_over("pretrain", model).get("made_by", {})
        if (order := made_by.get("--norm-order", "pre")) != options.norm_order:
            raise ValueError(f"pretrain was run with --norm-order {order}: give it to sft, too")
    pictures = Pictures.sample(options.seed, min(PICTURES, 100 * steps))  # few for a smoke run
    pictures.encode(vq, run.state / f"codes-{run.rank}.int16", run.progress)
    corpus = Corpus(Writer(tokenizer, pictures.codes), pictures, rng)
    rows = run.extra = Rows(tokenizer.pad_token_id)  # extra: saved with the run's state

    def batch_of(step: int) -> dict[str, Tensor]:
        if stage == "sft":
            corpus.shares = next(shares for end, shares in PRACTICE if step < end * steps)
        # The last 20 % of pretraining: every second batch is of better data (section 2.2).
        aligned = stage == "sft" or (step >= 0.8 * steps and step % 2)
        return rows.batch(corpus.sft if aligned else corpus.pretrain, ROWS, corpus.row_tokens)

    images = ChameleonImageProcessor(size=VQ.resolution, crop_size=VQ.resolution)
    processor = ChameleonProcessor(images, tokenizer, VQ.codes_per_image)
    return model, processor, steps, LEARNING_RATE, batch_of


def own_data(run: Run) -> Prepared:
    """The checkpoint in --model, and the user's documents in --data."""
    options = run.options
    examples = read_examples(options.data)  # first: it finds mistakes in seconds
    if options.train == "image-head" and not any("<image>" in line.answer for line in examples):
        raise ValueError("--train image-head learns from pictures, and no answer holds <image>")
    in_bf16 = options.train != "all" and fast_bf16(run.device)  # most weights do not learn then
    model = ChameleonForConditionalGeneration.from_pretrained(
        options.model, dtype=torch.bfloat16 if in_bf16 else torch.float32, device_map=run.device)
    if kind := kind_of(model):
        raise ValueError(f"--model {options.model} holds {kind} weights, which do not learn: give "
                         "the folder they were made from")
    processor = load_processor(options.model)
    corpus = OwnData(examples, model, processor, options.seed)
    run.made_by["--data"] = fingerprint(x for d in corpus.documents for x in (d.ids, d.weight))
    add_parts(model, options)
    epochs = options.epochs or EPOCHS
    steps = options.steps or math.ceil(epochs * len(corpus.documents) / OWN_ROWS)
    peak = own_rate(model.config.hidden_size, options.train)
    return model, processor, steps, peak, lambda step: corpus.batch(step, OWN_ROWS)


def own_rate(width: int, learned: str) -> float:
    """The peak learning rate of --data; a narrow model takes a higher one."""
    return OWN_RATE[learned] if width >= 1024 else 1e-3


@torch.random.fork_rng(devices=[])  # the twin's random weights do not change what training draws
def export(model: ChameleonForConditionalGeneration, processor: ChameleonProcessor,
           run: Run) -> None:
    """Writes the checkpoint --out in the HF layout: bf16 weights, config, tokenizer, processor."""
    weights, _ = run.whole_state(model)  # every rank sends its slices; only rank 0 writes
    if run.rank:
        return
    if run.options.no_qk_norm:
        return run.say(f"weights without QK-norm are not exported: see {run.state}/curves.csv")
    twin = ChameleonForConditionalGeneration(model.config, model.model.vqmodel.decoder is not None)
    adapter = add_parts(twin, run.options)  # so that the weights have the same names
    twin.load_state_dict(weights)
    if adapter is not None:
        adapter.save_pretrained(run.out / "adapter", save_embedding_layers=False)
        adapter.merge_and_unload()
    bake(twin)  # the computed rows of the codes become plain numbers
    twin.to(torch.bfloat16)
    for weight in twin.model.vqmodel.parameters():  # still fp32: see ChameleonVQVAE._apply
        rounded = weight.data.bfloat16()  # bf16 in the file, if that changes no weight
        weight.data = rounded if torch.equal(rounded.float(), weight.data) else weight.data
    twin.save_pretrained(run.out)
    processor.save_pretrained(run.out)


# ---------------------------------------------------------------------------------------------
# The command line


STAGES = {
    "vqvae": train_vqvae, "tokenizer": train_tokenizer,
    "pretrain": lambda run: train_decoder("pretrain", run),
    "sft": lambda run: train_decoder("sft", run),
    "evaluate": lambda run: evaluate.table(run.out, run.options.questions, run.options.device),
}  # fmt: skip
NEW, OWN = {"pretrain", "sft", "all"}, {"sft --data"}  # on the toy world; on the user's data
READ_BY = {  # options that not every stage reads, and the stages that do
    "steps": {"vqvae", "evaluate", *NEW, *OWN}, "seed": {"vqvae", "tokenizer", *NEW, *OWN},
    "learning_rate": {"vqvae", *NEW, *OWN}, "questions": {"evaluate", "all"},
    "no_qk_norm": {"pretrain", "sft"},  # it makes curves and no checkpoint
    "norm_order": NEW, "epochs": OWN, "train": OWN, "model": OWN,
} | dict.fromkeys(("optimizer", "compile", "checkpointing", "no_z_loss", "dropout"), NEW | OWN)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options, checked: a wrong one exits with status 2 and one line that names it."""
    parser = OneLineParser(prog="train.py", description="Train a tiny Chameleon, or fine-tune.")
    add = parser.add_argument
    add("stage", choices=[*STAGES, "all"])
    add("--out", type=Path, required=True, help="checkpoint folder to write, or to evaluate; saved "
        "states and curves.csv are in OUT.train")
    length = parser.add_mutually_exclusive_group().add_argument
    length("--steps", type=int, help="of each stage; a small number makes a smoke run")
    length("--epochs", type=int, help=f"--data: how often each line is learned (default: {EPOCHS})")
    add("--data", type=Path, help="sft: a folder of your own, with a .jsonl file and pictures")
    add("--model", type=Path, default=TINY, help="--data: checkpoint to start from (default: tiny)")
    add("--train", choices=("all", "lora", "image-head"), default="all", help="--data: what learns")
    add("--checkpointing", action="store_true", help="less memory, a third more time")
    add("--optimizer", choices=("muon", "adamw"),
        help="default: muon, and with --data adamw, which is the paper's")
    add("--learning-rate", type=float, help="peak (default: by stage and width)")
    add("--seed", type=int, default=0)
    add("--device", default="cpu")
    add("--threads", type=int, help="CPU threads (default: torch's choice)")
    add("--compile", action="store_true", help="a quarter faster; needs a C++ compiler")
    add("--norm-order", choices=("pre", "swin"), default="pre", help="swin: norms as in the 34B")
    add("--no-qk-norm", action="store_true", help="see its use in the curves: makes no checkpoint")
    add("--no-z-loss", action="store_true", help="see what the z-loss is good for")
    add("--dropout", type=float, default=DROPOUT, help="after attention and feed-forward")
    add("--questions", type=int, help="of each kind in evaluate (default: 200, or --steps if less)")
    options = parser.parse_args(arguments)
    if options.data and options.stage != "sft":
        parser.error("--data belongs to the stage sft")
    if options.out.name in ("", ".."):
        parser.error("--out must be the name of a folder")
    if options.data and options.out.resolve() == options.model.resolve():
        parser.error(f"--out {options.out} would replace the --model: name another folder")
    for name, low, high in (("steps", 1, 10**9), ("threads", 1, 1024), ("epochs", 1, 10**6),
                            ("questions", 1, 10**6), ("seed", 0, 2**63 - 1),
                            ("dropout", 0, 0.99), ("learning_rate", 1e-9, 1)):
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} must be from {low} to {high}, got {value}")
    stage = "sft --data" if options.data else options.stage
    for name, stages in READ_BY.items():
        if getattr(options, name) != parser.get_default(name) and stage not in stages:
            parser.error(f"--{name.replace('_', '-')} is for {', '.join(sorted(stages))}, not for "
                         + stage)
    options.questions = options.questions or min(200, options.steps or 200)
    options.optimizer = options.optimizer or ("adamw" if options.data else "muon")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; arguments: those of the shell if None. Returns its exit status."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # CPUs compute with numbers below 1e-38 slowly
    stopped = "interrupted"
    if options.stage != "evaluate":
        stopped += (": the same command goes on from the last save, made every "
                    f"{Run.SAVE} steps or {Run.SAVE_AFTER // 60} minutes; without one, it begins "
                    "again")
    try:
        return exit_code("train.py", lambda: run_stages(options), stopped)
    finally:
        torch.set_flush_denormal(False)  # it is global, and main() may have a caller
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def run_stages(options: argparse.Namespace) -> None:
    """Runs one stage or all, in each rank. Meanwhile no other process may write to OUT.train."""
    run = Run(options)
    if options.compile:
        check_compile(run.device)
    if run.world_size > 1:
        torch.distributed.init_process_group()
    with nullcontext() if run.rank or options.stage == "evaluate" else hold(run.state):
        for stage in STAGES if options.stage == "all" else [options.stage]:
            torch.manual_seed(options.seed)
            # vqvae, tokenizer and evaluate run on rank 0 alone; the other ranks wait for the files.
            if run.rank == 0 or stage in STEPS:
                STAGES[stage](run)
            if run.world_size > 1:
                torch.distributed.barrier()


if __name__ == "__main__":
    sys.exit(main())
