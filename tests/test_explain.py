"""chameleon_extras/explain.py: the numbers it shows are those a direct computation gives."""

import re

import pytest
import torch
from PIL import Image
from small import SIZES, VQ, closed, scrambled_vocabulary

from chameleon import ChameleonConfig, ChameleonForConditionalGeneration
from chameleon_extras import explain
from chameleon_extras.decoding import set_attention
from chameleon_extras.explain import WATCHED, heat, page, report, walk
from chameleon_extras.quantize import quantize_model
from processor import ChameleonProcessor

PROMPT = "What do you see?<image> And 日 here?<image>"


@pytest.fixture(scope="module")
def model(untrained_folder):
    return ChameleonForConditionalGeneration.from_pretrained(untrained_folder)


@pytest.fixture(scope="module")
def processor(untrained_folder):
    return ChameleonProcessor.from_pretrained(untrained_folder)


@pytest.fixture(scope="module")
def inputs(processor):
    pictures = [Image.radial_gradient("L"), Image.linear_gradient("L")]
    return processor(text=PROMPT, images=pictures, return_tensors="pt")


@pytest.fixture(scope="module")
def shown(model, processor, inputs):
    return walk(model, processor.tokenizer, inputs["input_ids"], inputs["pixel_values"])


@pytest.fixture(scope="module")
def direct(model, inputs):
    """One plain forward pass with everything it can give."""
    set_attention(model, "eager")
    with torch.no_grad():
        output = model(inputs["input_ids"], inputs["pixel_values"], output_attentions=True,
                       mask_image_logits=False)
    set_attention(model, "sdpa")
    return output


def test_ids_are_the_prompts_with_the_pictures_own_in_their_places(shown, model, inputs):
    ids = model.model.replace_image_placeholders(inputs["input_ids"], inputs["pixel_values"])
    assert [token.id for token in shown.tokens] == ids[0].tolist()
    codes = model.model.vqmodel.encode(inputs["pixel_values"])
    assert [grid.flatten().tolist() for grid in shown.codes] == codes.tolist()
    for n, (name, start, end) in enumerate(shown.segments[1::2]):
        assert name == f"picture {n + 1}" and end - start == codes.shape[1]
        assert ids[0, start:end].tolist() == model.model.vocabulary.code_to_id[codes[n]].tolist()
        assert {token.kind for token in shown.tokens[start:end]} == {"code"}
    assert [end for _, _, end in shown.segments[:-1]] == [s for _, s, _ in shown.segments[1:]]


def test_names_show_spaces_and_halves_of_characters(shown):
    names = [token.name for token in shown.tokens]
    assert names[0] == "<s>" and names[-1] == "<reserved08706>"
    assert [t.kind for t in shown.tokens[:2]] == ["control", "text"]
    assert shown.tokens[-1].kind == "control"
    assert any(name.startswith("·") for name in names)  # a space
    assert sum(name.startswith("\\x") for name in names) == 3  # the three bytes of 日


def test_surprise_and_entropy_are_those_of_the_full_logits(shown, direct):
    p = direct.logits[0].double().softmax(-1)
    for place, token in enumerate(shown.tokens):
        if place == 0:
            assert token.surprise != token.surprise and token.entropy != token.entropy
            continue
        before = p[place - 1]
        assert token.surprise == pytest.approx(-before[token.id].log2().item(), abs=1e-3)
        entropy = sum(-x * x.log2() for x in before if x > 0)
        assert token.entropy == pytest.approx(entropy.item(), abs=1e-3)


def test_how_many_places_are_looked_at_together_changes_nothing(
        shown, model, processor, inputs, monkeypatch):
    monkeypatch.setattr("chameleon_extras.explain.CHUNK", 7)
    again = walk(model, processor.tokenizer, inputs["input_ids"], inputs["pixel_values"])
    for a, b in zip(again.tokens[1:], shown.tokens[1:], strict=True):
        assert a[:3] == b[:3] and a[3:] == pytest.approx(b[3:], abs=1e-3)


def test_the_next_tokens_are_those_of_the_last_logits(shown, direct, model):
    p = direct.logits[0, -1].softmax(-1)
    torch.testing.assert_close(shown.probs, p, atol=1e-5, rtol=1e-4)
    assert [i for i, _, _ in shown.best] == p.argsort(descending=True)[: len(shown.best)].tolist()
    assert sum(shown.shares.values()) == pytest.approx(1, abs=1e-4)
    codes = p[model.model.vocabulary.code_to_id].sum().item()
    assert shown.shares["code"] == pytest.approx(codes, abs=1e-5)


def test_attention_is_the_last_row_of_every_layers_weights(shown, direct):
    rows = torch.stack([weights[0, :, -1].mean(0) for weights in direct.attentions])
    torch.testing.assert_close(shown.attention, rows, atol=1e-5, rtol=1e-4)
    name, start, end = shown.segments[3]
    assert name == "picture 2"
    torch.testing.assert_close(heat(shown, 1).flatten(), rows[:, start:end].mean(0),
                               atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("start", [1, 7, 30])
def test_a_glance_is_the_attention_of_the_place_before_each_token(
        shown, direct, model, processor, inputs, monkeypatch, start):
    monkeypatch.setattr(explain, "AT_ONCE", 5)
    ids = model.model.replace_image_placeholders(inputs["input_ids"], inputs["pixel_values"])
    tokens, looks = explain.glances(model, processor.tokenizer, ids, start)
    rows = torch.stack([weights[0].mean(0) for weights in direct.attentions]).mean(0)  # (T, T)
    torch.testing.assert_close(looks, rows[start - 1 : -1], atol=1e-5, rtol=1e-4)
    for token, known in zip(tokens, shown.tokens[start:], strict=True):
        assert token[:3] == known[:3] and abs(token.entropy - known.entropy) < 1e-3


def test_the_mask_is_causal_for_pictures_too(shown, direct):
    T = len(shown.tokens)
    assert torch.equal(shown.allowed, torch.ones(T, T).tril().bool())
    for weights in direct.attentions:  # and the model keeps to it
        assert (weights[0, :, ~shown.allowed] == 0).all()


@pytest.mark.parametrize("changes", [{}, {"swin_norm": True, "num_key_value_heads": 2}])
def test_true_shapes_are_what_their_letters_say(processor, changes):
    config = ChameleonConfig(**(SIZES | changes), vq_config=VQ,
                             vocabulary_map=scrambled_vocabulary())
    model = ChameleonForConditionalGeneration(config).eval()
    ids = torch.tensor([[0, 71, *[73] * 64, 70, 100]])
    shown = walk(model, processor.tokenizer, ids, torch.rand(1, 3, 32, 32) * 2 - 1)
    vq, c = config.vq_config, config
    letters = dict(N=1, B=1, T=ids.shape[1], D=c.hidden_size, H=c.num_attention_heads,
                   Hkv=c.num_key_value_heads, Dh=c.head_dim, F=c.intermediate_size, V=c.vocab_size,
                   latent_channels=vq.latent_channels, embed_dim=vq.embed_dim, h=8, w=8)
    assert {name for name, _, _ in shown.shapes} == set(WATCHED)
    for name, said, shape in shown.shapes:
        said = said.split("), ")[0].rstrip(")") + ")"
        if "encoder" in name:  # there H and W are a picture's, C is the level's width
            width = 64 if name.endswith("mid") else vq.base_channels
            letters = letters | dict(H=32, W=32, C=width)
        elif name.startswith("model.embed"):
            letters["H"] = c.num_attention_heads
        assert eval(said, {}, letters) == shape, name


def test_the_report_and_the_page_show_every_step(shown):
    lines, drawn = report(shown), page(shown, "a < b")
    for name, _, shape in shown.shapes:
        assert all(name in text and str(shape) in text for text in (lines, drawn))
    for codes in shown.codes:
        row = " ".join(f"{code:4}" for code in codes[0].tolist())
        assert row in lines
    for i, name, p in shown.best:
        assert re.search(rf"{i}  {re.escape(name)} .*{p:.1%}", lines)
    assert "a < b" not in drawn and drawn.count("data:image/png") == 3 * len(shown.codes)
    assert len(re.findall(r'class="t (?:text|code|control)"', drawn)) == len(shown.tokens)


def test_the_page_needs_nothing_beside_it_and_closes_what_it_opens(shown):
    drawn = page(shown, "walk")
    assert "prefers-color-scheme:dark" in drawn and not re.search(r'(src|href)="(?!data:)', drawn)
    assert "http" not in drawn and "<script" not in drawn
    assert closed(drawn)


def test_nothing_is_left_on_the_model(shown, model):
    assert not any(child._forward_hooks for child in model.modules())


def test_a_prompt_without_pictures_and_few_bits_can_be_walked(untrained_folder, processor):
    model = ChameleonForConditionalGeneration.from_pretrained(untrained_folder)
    ids = processor(text="abc", return_tensors="pt")["input_ids"]
    shown = walk(quantize_model(model, "int8"), processor.tokenizer, ids)
    assert shown.codes == [] and shown.segments == [("text", 0, ids.shape[1])]
    assert "picture 1" not in report(shown) and "Picture 1" not in page(shown, "walk")


def test_large_grids_and_long_texts_are_cut_on_a_terminal(shown, processor, model):
    ids = processor(text="word " * 60, return_tensors="pt")["input_ids"]
    lines = report(walk(model, processor.tokenizer, ids)).split("\n\n")[1].splitlines()
    assert len(lines) == 42 and "more)" in lines[21]


def test_a_large_grid_is_cut_in_its_numbers_and_whole_in_its_shades(shown, monkeypatch):
    monkeypatch.setattr(explain, "GRID", 3)
    lines = explain.picture_lines(shown, 0, shown.codes[0])[2:-1]  # 4 x 4
    rows = [" ".join(f"{code:4}" for code in row[:3].tolist()) for row in shown.codes[0][:3]]
    assert lines[:3] == [f"{row} ..." for row in rows]
    assert lines[3:] == [f"|{shade}|" for shade in explain.shades(heat(shown, 0))]
    assert explain.shades(torch.zeros(1, 2)) == ["    "]


def test_names_are_one_line_and_none_breaks_the_page(model, processor):
    assert explain.kind_and_name(processor.tokenizer, 10**6) == ("text", "(no token)")
    shown = walk(model, processor.tokenizer, processor(text='a\n"b"')["input_ids"])
    assert [token.name for token in shown.tokens].count("\\n") == 1
    shown.best[0] = (1, "<s>", 0.5)
    drawn = page(shown, "walk")
    assert drawn.count('title="&quot;: entropy') == 2 and "<s>" not in drawn and closed(drawn)


def test_the_mask_and_the_attention_are_drawn_the_right_way_round(shown):
    signs = [line.split()[-5:] for line in explain.mask_lines(shown)[2:]]
    assert signs == [["█"] * n + ["◣"] + ["·"] * (4 - n) for n in range(5)]
    T, drawn = len(shown.tokens), page(shown, "walk")
    points = re.search(f'viewBox="0 0 {T} {T}".*points="0,0 (.*) 0,{T}"', drawn)[1].split()
    assert points == [f"{t},{t}" for t in range(1, T + 1)]
    seen = explain.enlarge(shown.images[1], 320)
    assert explain.data_uri(explain.heat_on(seen, heat(shown, 1))) in drawn


def test_a_picture_costs_the_mean_of_its_codes(shown):
    _, start, end = shown.segments[1]
    surprise, entropy = (sum(x) / (end - start) for x in list(zip(*shown.tokens[start:end]))[3:])
    line = rf"picture 1: its codes +{surprise:.2f} +{entropy:.2f}   mean of"
    assert surprise != entropy and re.search(line, report(shown))


def test_a_model_in_bf16_is_walked_in_full_precision(untrained_folder, processor, inputs):
    model = ChameleonForConditionalGeneration.from_pretrained(untrained_folder, dtype="bfloat16")
    shown = walk(model, processor.tokenizer, inputs["input_ids"], inputs["pixel_values"])
    assert shown.probs.dtype == shown.attention.dtype == torch.float32
    assert shown.probs.double().sum() == pytest.approx(1, abs=1e-5)
    ids = model.model.replace_image_placeholders(inputs["input_ids"], inputs["pixel_values"])
    with torch.no_grad():
        logp = model(ids, mask_image_logits=False).logits[0, :-1].float().log_softmax(-1)
    for token, row in zip(shown.tokens[1:], logp):
        assert token.surprise == pytest.approx(-row[token.id].item() / 0.6931472, abs=1e-3)
    assert explain.glances(model, processor.tokenizer, ids, 1)[1].dtype == torch.float32


def test_the_command_prints_the_walk_and_writes_the_page(run, tmp_path):
    code, out, err = run("--explain", "--prompt", "Hi<image>", "--image", "red.png", "--out",
                         "walk.html")
    assert code == 0 and "16 codes" not in err and "next token:" in out
    assert (tmp_path / "walk.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert list(tmp_path.glob("*.part")) == []


@pytest.mark.parametrize("arguments, words", [
    (("--prompt", "a", "--prompt", "b"), "one --prompt"),
    (("--prompt", "a", "--mode", "image"), "leave --mode"),
    (("--prompt", "a", "--count", "2"), "--count"),
    (("--prompt", "a", "--out", "walk.png"), "walk.html"),
    (("--prompt", "a", "--out", "no/folder.html"), "folder"),
    (("--prompt", "a<image>"), "<image>"), ((), "--prompt"),
])
def test_what_cannot_be_walked_is_one_line(run, arguments, words, monkeypatch):
    monkeypatch.setattr("chameleon_extras.command.load_model", None)  # it must not come to that
    code, out, err = run("--explain", *arguments)
    assert code == 2 and out == "" and words in err and err.count("\n") == 1
