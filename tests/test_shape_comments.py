"""Every shape comment at the end of a line is what the tensor there really has."""

import copy
import json
import textwrap
from pathlib import Path
from unittest import mock

import figures
import numpy as np
import pytest
import torch
from PIL import Image
from shapes import Shapes, statements
from small import SIZES, VQ, batch_with_pictures, randomize, scrambled_vocabulary

import generate
import train
from chameleon import ChameleonConfig, ChameleonForConditionalGeneration, KVCache
from chameleon_extras import decoding, demo, release
from chameleon_extras.chat import Conversation
from chameleon_extras.parallel import own_part
from chameleon_extras.quantize import quantize_model
from generate import stream
from processor import ChameleonImageProcessor, ChameleonProcessor
from tiny_world import documents, evaluate, vqvae_stage, world
from tiny_world.code_rows import add_code_rows, add_learned
from tiny_world.documents import Pictures
from vqvae import ChameleonVQVAE, ChameleonVQVAEConfig

pytestmark = pytest.mark.docs
ROOT = Path(__file__).resolve().parent.parent
SOURCES = [path for folder in ("", "chameleon_extras", "tiny_world")
           for path in sorted((ROOT / folder).glob("*.py"))] + [ROOT / "tests" / "figures.py"]


# ---------------------------------------------------------------------------------------------
# The checker finds what is wrong


def run(tmp_path, body: str, *arguments) -> Shapes:
    """Runs a function with this body under the checker."""
    path = tmp_path / "example.py"
    path.write_text("import torch\ndef f(*a):\n" + textwrap.indent(textwrap.dedent(body), "    "))
    space = {}
    exec(compile(path.read_text(), str(path), "exec"), space)
    with Shapes([path]) as shapes:
        space["f"](*arguments)
    return shapes


@pytest.mark.parametrize("body, wrong", [
    ("x = torch.zeros(2, 3)  # (B, T)", None),
    ("x = torch.zeros(2, 3)  # (B, T, D)", "3 dimensions"),
    ("x = torch.zeros(2, 3)  # (B, 4)", "4 is 4"),
    ("x = torch.zeros(2, 3)  # (B, T)\ny = x.T  # (B, T)", "B is 2"),
    ("x = torch.zeros(2, 3)  # (B, T)\ny = x.T  # (T, B)", None),
    ("B = 3\nx = torch.zeros(2, 3)  # (B, T)", "B is 3"),
    ("x = torch.zeros(2, 3)\nx[0] = 1  # (2, 3)", None),
    ("x = torch.zeros(2, 3)\nx[0] = 1  # (3,)", "1 dimensions"),
    ("x = {}\nx['a'] = torch.ones(3)  # (3,)", None),
    ("x = {}\nx['a'] = torch.ones(3)  # (3, 1)", "2 dimensions"),
    ("x = torch.zeros(2, 3)  # (B, T)\nreturn x.flatten()  # (B*T,)", None),
    ("x = torch.zeros(2, 3)  # (B, T)\nreturn x.flatten()  # (B + T,)", "B + T is 5"),
    ("x = torch.zeros(4, 3)  # (h, w)\ny = x[::2]  # (h/2, w)", None),
    ("x = torch.zeros(4, 3)  # (h, w)\ny = x[::2]  # (2h, w)", "2*h is 8"),
    ("x, y = torch.zeros(2, 3), torch.zeros(3)  # (B, T), (T,)", None),
    ("x, y = torch.zeros(2, 3), torch.zeros(2)  # (B, T), (T,)", "T is 3"),
    ("x, y = torch.zeros(4).chunk(2)  # each (n, 1)", "2 dimensions"),
    ("return torch.zeros(2, 3), None  # (B,)", "1 dimensions"),
    ("return {'a': torch.zeros(2, 3)}  # (B,)", "1 dimensions"),
    ("x = torch.zeros(1, 2, 3, 4)  # (1, ..., 4)", None),
    ("x = torch.zeros(1, 2, 3, 4)  # (..., 3)", "3 is 3"),
    ("with torch.no_grad():\n    return torch.zeros(2)  # (2, 1)", "2 dimensions"),
    ("for n in (1, 2):\n  x = torch.ones(n)  # (T,)\n  y = torch.ones(n + 1)  # (T + 1,)", None),
    ("for n in (1, 2):\n  x = torch.ones(n)  # (T,)\n  y = torch.ones(2)  # (T + 1,)", "T + 1 is"),
    ("x = torch.zeros(\n    2, 3\n)  # (B, T, D), of three lines", "3 dimensions"),
    ("x = torch.zeros(2, 3)  # (B or 2, T)\ny = x  # (B or 1, T)", None),
    ("x = torch.zeros(6)  # (A, B) -> (6,)", None),
    ("x = torch.zeros(6)  # in the end (6, 6)", "nothing to check"),
])
def test_a_wrong_comment_is_found_and_a_right_one_is_not(tmp_path, body, wrong):
    shapes = run(tmp_path, body)
    if wrong == "nothing to check":
        assert not statements(tmp_path / "example.py")
    else:
        assert shapes.unseen == []
        assert bool(shapes.wrong) == (wrong is not None) and (wrong or "") in str(shapes.wrong)


def test_what_did_not_run_is_told(tmp_path):
    shapes = run(tmp_path, "if a:\n    x = torch.zeros(1)  # (1,)")
    assert shapes.unseen == ["example.py:4: (1,)"]
    assert run(tmp_path, "if a:\n    x = torch.zeros(1)  # (1,)", True).unseen == []


# ---------------------------------------------------------------------------------------------
# The repository's own comments


def small_model(**changes) -> ChameleonForConditionalGeneration:
    sizes = SIZES | dict(num_key_value_heads=2, vq_config=VQ) | changes
    config = ChameleonConfig(**sizes, vocabulary_map=scrambled_vocabulary())
    model = ChameleonForConditionalGeneration(config)
    randomize(model)
    return model


def decoder() -> None:
    """Pictures and padding, both attentions, packed documents, a cache, labels, both RoPE rules."""
    batch = batch_with_pictures()
    T = batch["input_ids"].shape[1]
    for changes in ({}, {"rope_scaling": {"type": "linear", "factor": 2.0}},
                    {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "swin_norm": True}):
        model = small_model(**changes)
        for name in ("eager", "sdpa"):
            decoding.set_attention(model, name)
            model(**batch, labels=batch["input_ids"], mask_image_logits=False)
    ids = batch["input_ids"].masked_fill(batch["input_ids"] == 73, 80)  # without pictures
    model(ids, attention_mask=torch.ones(2, T, T), output_attentions=True)
    model(ids, position_ids=torch.arange(T)[None] % 9, use_cache=False)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    model(inputs_embeds=embeds, pixel_values=batch["pixel_values"])
    cache = KVCache(model.config, 2, T)
    for part in (ids[:, :9], ids[:, 9:]):
        model(part, past_key_values=cache)
    grown = model(ids[:1, :9]).past_key_values
    model(ids[:1, 9:], past_key_values=grown)


def writing() -> None:
    """Rows of different lengths, in text and in pictures, with and without guidance."""
    model = small_model(vq_config=dict(VQ, resolution=16)).eval()
    options = dict(max_new_tokens=20, do_sample=True, top_p=0.9, top_k=50, repetition_penalty=1.1,
                   image_top_p=0.9)
    prompts = torch.tensor([[0, 100, 71, *[73] * 16, 70, 101, 72], [1] * 18 + [0, 102, 103, 72]])
    batch = dict(attention_mask=(prompts != 1).long(), pixel_values=torch.rand(1, 3, 16, 16))
    for scales in ({}, {"guidance_text": 2.0, "guidance_image": 1.5}):
        list(stream(model, prompts, **batch, mode="image", **options, **scales))
    ids = torch.tensor([[0, 100, 71], [0, 100, 101]])  # the first row has begun a picture
    list(stream(model, ids, mode="interleaved", **options))
    cache = KVCache(model.config, 2)
    for turn in (ids, torch.cat((ids, ids + 3), dim=1)):
        list(stream(model, turn, past_key_values=cache))


def pictures() -> None:
    """Every kind of picture, there and back, and the VQ-VAE in training."""
    prepare = ChameleonImageProcessor(size=8, crop_size=8)
    grey, rgb = np.full((9, 7), 9, np.uint8), np.full((3, 9, 7), 0.5, np.float32)
    prepare([grey, Image.new("RGBA", (9, 7)), torch.zeros(12, 9, 4)], return_tensors="pt")
    pixels = prepare(rgb, do_rescale=False, return_tensors="pt")["pixel_values"]
    ChameleonImageProcessor.postprocess(pixels)
    vq = ChameleonVQVAE(ChameleonVQVAEConfig(**VQ))
    vq(torch.rand(2, 3, 32, 48))
    vq.decode(vq.encode(torch.rand(2, 3, 32, 48)), grid=(8, 12))
    world.read_scene(world.render(world.sample_scene(np.random.default_rng(0), 3), 96))


def weights() -> None:
    """Few bits, Meta's layout, parts of a model."""
    whole = small_model()
    for kind in ("int8", "int4", "nf4"):
        for dtype in (torch.float32, torch.bfloat16):
            model = quantize_model(copy.deepcopy(whole).to(dtype), kind)
            model.model(torch.ones(2, 30, dtype=torch.long))
            model.model(torch.ones(1, 1, dtype=torch.long))
            layer = model.model.layers[0].self_attn.q_proj
            layer.unpacked()
            layer.rows(torch.arange(16))(torch.ones(2, 64, dtype=dtype))
    parts = [torch.zeros(16, 64), torch.zeros(16, 64)]
    for join in (release.rows, release.columns):
        join(parts)
    release.mean([torch.ones(64)] * 2)
    release.halves(parts, 8)
    release.every_head([torch.ones(8)] * 2, 4)
    own_part(whole.model.layers[0].self_attn.q_norm, 0, 2, "cpu")


def commands(folder: Path, out: Path) -> None:
    """The command, in all that it can do."""
    Image.new("RGB", (20, 30), "red").save(out / "red.png")
    picture = ["--image", str(out / "red.png")]
    image, page = ["--out", str(out / "out.png")], ["--out", str(out / "out.html")]
    (out / "asked.txt").write_text("a\nbc\n")
    for arguments in (["--prompts", str(out / "asked.txt")],
                      ["--prompt", "a", *picture, "--max-new-tokens", "3"],
                      ["--reconstruct", *picture, *image],
                      ["--prompt", "a", "--mode", "image", *image],
                      ["--explain", "--prompt", "a<image>", *picture, *page],
                      ["--prompt", "a", "--vqgan", str(folder / "model.safetensors")]):
        common = ["--model", str(folder), "--device", "cpu"]
        assert generate.main([*common, *arguments]) == 0
    talk = Conversation(ChameleonForConditionalGeneration.from_pretrained(folder),
                        ChameleonProcessor.from_pretrained(folder))
    for mode, pictures in (("text", [Image.open(out / "red.png")]), ("image", [])):
        list(talk.ask("a", pictures, mode, max_new_tokens=3))
        demo.walk(talk)


def first_stage() -> None:
    """The VQ-VAE's training, with more pictures of things than there are codes."""
    vq = ChameleonVQVAE(vqvae_stage.VQ)
    vqvae_stage.initialize(vq)
    codebook, rng = vqvae_stage.Codebook(vq), np.random.default_rng(0)
    codebook.start(*vqvae_stage.codebook_sample(vq, rng, 32))
    scenes = [world.sample_scene(rng, 3) for _ in range(2)]
    pixels = torch.from_numpy(world.render_pixels(scenes))
    for retire in (False, True):
        codebook.update(*vqvae_stage.vqvae_loss(vq, pixels, quantized=True)[2])
        codebook.revive(retire)


def training(folder: Path) -> None:
    """A batch of each kind, the user's own data, some questions and drawings."""
    model, processor = evaluate.load(ROOT / "tiny")
    rng, file = np.random.default_rng(0), folder / "codes"
    encode = model.model.vqmodel, file
    drawn = Pictures.sample(0, 24).encode(*encode)
    assert drawn.encode(*encode) is drawn and file.is_file()  # now from the file
    corpus = documents.Corpus(documents.Writer(processor.tokenizer, drawn.codes), drawn, rng)
    rows, norm = documents.Rows(processor.tokenizer.pad_token_id), train.QueryNorm(model)
    for draw in (corpus.pretrain, corpus.sft):
        train.decoder_loss(model, rows.batch(draw, 2, corpus.row_tokens), 1e-5)
    for _ in range(8):
        corpus.conversation()
    norm()
    add_code_rows(small_model())
    star = str(ROOT / "examples" / "star.png")
    line = {"prompt": "What?<image>", "images": [star], "answer": "A star."}
    (folder / "own.jsonl").write_text(json.dumps(line))
    documents.OwnData(documents.read_examples(folder), model, processor, 0)
    add_learned(evaluate.load(ROOT / "tiny")[0], "image-head")
    evaluate.accuracy(model, processor, "colour", 2)
    evaluate.drawn_right(model, processor, "edit", 2)
    evaluate.survival(model.model.vqmodel, 1)


def fast_steps() -> None:
    """The step that --compile compiles, here as plain Python."""
    model = small_model().eval()
    prompts = torch.tensor([[0, 100, 72], [1, 0, 72]])
    for rows in (prompts, prompts[:1]):
        options = dict(attention_mask=(rows != 1).long(), max_new_tokens=3)
        with mock.patch.object(decoding, "check_compile"):
            list(stream(model, rows, decoder=decoding.Decoder(model, compiled=True), **options))
    q, k = torch.rand(2, 4, 1, 16), torch.rand(2, 2, 8, 16)
    decoding.one_query_attention(q, k, k, None, 0.0, loops=True)  # of a compiler
    with mock.patch.object(decoding, "AVX512", False):  # int8 weights are read four at a time
        decoding.row_sums(torch.ones(6, 16, dtype=torch.int8), torch.rand(2, 16))
    (layer,) = quantize_model(torch.nn.Sequential(torch.nn.Linear(64, 6)), "int4")
    decoding.RowProduct(layer)(torch.rand(2, 64))
    decoding.StepCache(model.config, 2, 16, torch.float32, torch.device("cpu")).first(8)


def drawings() -> None:
    """What the figures show."""
    model, processor = evaluate.load(ROOT / "tiny")
    figures.token_stream(model, processor, "What?<image>", Image.new("RGB", (48, 48)))
    figures.reconstructions(model, 2)


def test_every_shape_comment_is_what_the_tensor_has(untrained_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "compile_step", lambda function, *_: function)
    with Shapes(SOURCES) as shapes:
        decoder()
        writing()
        pictures()
        weights()
        commands(untrained_folder, tmp_path)
        first_stage()
        training(tmp_path)
        fast_steps()
        drawings()
    assert shapes.wrong == []
    assert shapes.unseen == []
