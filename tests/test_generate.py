"""Each filter against its definition, the loop against transformers and itself; the grammar and
guidance for any logits and any batch, against separate forward passes.
"""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import (
    SIZES,
    VQ,
    S,
    V,
    batch_with_pictures,
    left_padded,
    scrambled_vocabulary,
    small_model,
)
from test_oracle import pair

from chameleon import ChameleonConfig, ChameleonForConditionalGeneration, KVCache
from chameleon_extras.decoding import Decoder, set_attention
from generate import (
    NO_ID,
    Grammar,
    choose,
    decode_pictures,
    generate,
    guidance_weights,
    ids_of_pictures,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    room_behind,
    sample,
    stop_ids,
    stream,
    until_ended,
)
from tokenizer import Tokenizer, image_token_name

MODEL = small_model()
logits_strategy = st.lists(st.floats(-20, 20), min_size=2, max_size=30)


# ---------------------------------------------------------------------------------------- filters


@settings(max_examples=200, deadline=None)
@given(logits=logits_strategy, p=st.floats(0.01, 1.0))
def test_top_p_keeps_the_smallest_sufficient_set(logits, p):
    logits = torch.tensor([logits], dtype=torch.float64)
    kept = keep_top_p(logits, p)[0].isfinite()
    probs = logits.softmax(-1)[0]
    mass = probs[kept].sum().item()
    assert kept.any() and mass >= p - 1e-9
    assert p == 1.0 or mass - probs[kept].min().item() < p + 1e-9  # without the least, too little
    if not kept.all():
        assert probs[kept].min() >= probs[~kept].max()


@settings(max_examples=100, deadline=None)
@given(logits=st.lists(st.floats(-20, 20), min_size=2, max_size=30, unique=True),
       k=st.integers(1, 40))
def test_top_k_keeps_the_k_highest(logits, k):
    kept = keep_top_k(torch.tensor([logits], dtype=torch.float64), k)[0].isfinite()
    highest = sorted(range(len(logits)), key=lambda i: -logits[i])[:k]
    assert kept.nonzero().flatten().tolist() == sorted(highest)


@settings(max_examples=100, deadline=None)
@given(logits=logits_strategy, penalty=st.floats(1.01, 3.0), data=st.data())
def test_the_penalty_lowers_what_was_seen_and_nothing_else(logits, penalty, data):
    ids = data.draw(st.lists(st.integers(0, len(logits) - 1), min_size=1, max_size=8))
    before = torch.tensor([logits], dtype=torch.float64)
    after = penalize_repetition(before, torch.tensor([ids]), penalty)[0]
    for i, x in enumerate(logits):
        expected = (x / penalty if x > 0 else x * penalty) if i in ids else x
        assert math.isclose(after[i].item(), expected, rel_tol=1e-12)


def test_draws_follow_the_distribution():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    generator = torch.Generator().manual_seed(0)
    drawn = sample(probs.log().repeat(20_000, 1), [generator] * 20_000)
    observed = torch.bincount(drawn, minlength=5) / 20_000
    assert (observed - probs).abs().max() < 0.015  # four standard deviations
    assert observed[4] == 0


def test_random_numbers_that_are_0_choose_no_impossible_id(monkeypatch):
    """Those of MPS may be; 0 / 0 is nan, which argmax takes for the highest."""
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda x, generator: x.zero_())
    logits = torch.tensor([[float("-inf"), 0.0, 1.0]])
    assert sample(logits, [torch.Generator()]).tolist() == [2]


# -------------------------------------------------------------------------------------- the loop


@pytest.mark.parametrize("changes", [{}, dict(num_key_value_heads=2, swin_norm=True)])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_ids_equal_transformers(changes, penalty):
    ours, theirs = pair(**changes)
    inputs = batch_with_pictures()
    marks = [70, 71, 72, 73]
    expected = theirs.generate(
        **inputs, max_new_tokens=12, do_sample=False, repetition_penalty=penalty,
        suppress_tokens=[i for i in marks if i != 72], eos_token_id=[2, 72], pad_token_id=1)
    ids = generate(ours, **inputs, max_new_tokens=12, do_sample=False, repetition_penalty=penalty)
    assert torch.equal(ids, expected)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), sample=st.booleans(), penalty=st.sampled_from([1.0, 1.2]),
       lengths=st.lists(st.integers(1, 8), min_size=2, max_size=4))
def test_each_row_of_a_batch_equals_its_single_run(seed, sample, penalty, lengths):
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randint(74, V, (n,), generator=g).tolist() for n in lengths]
    stops = list(range(74, 84))  # often met, so rows end at different times
    options = dict(max_new_tokens=10, do_sample=sample, top_p=0.9, top_k=40, temperature=0.8,
                   repetition_penalty=penalty, eos_token_id=stops)
    batch = generate(MODEL, **left_padded(rows), seed=seed, **options)
    for b, row in enumerate(rows):
        # A pad id counts as seen by the repetition penalty, so pads must not leak into a row.
        single = generate(MODEL, torch.tensor([row]), seed=seed + b, **options)[0, len(row) :]
        answer = batch[b, max(lengths) :]
        assert torch.equal(answer[: len(single)], single)
        assert (answer[len(single) :] == 1).all()  # padded once it has ended


def test_pictures_in_a_batch_reach_their_own_rows():
    inputs = batch_with_pictures()
    ids = generate(MODEL, **inputs, max_new_tokens=6)
    for b in range(2):
        row = inputs["input_ids"][b][inputs["attention_mask"][b].bool()][None]
        single = generate(MODEL, row, pixel_values=inputs["pixel_values"][b : b + 1],
                          max_new_tokens=6)
        assert torch.equal(ids[b, -6:], single[0, -6:])


def test_temperature_towards_zero_is_greedy():
    prompt = torch.tensor([[0, 80, 81]])
    greedy = generate(MODEL, prompt, max_new_tokens=10)
    for t in (0.0, 1e-4):
        assert torch.equal(
            generate(MODEL, prompt, max_new_tokens=10, do_sample=True, temperature=t), greedy
        )


def test_a_seed_repeats_and_another_differs():
    run = lambda seed: generate(MODEL, torch.tensor([[0, 80]]), do_sample=True, seed=seed,  # noqa
                                temperature=3.0, max_new_tokens=20).tolist()
    assert run(1) == run(1) != run(2)


def test_an_answer_ends_at_end_of_sequence_or_end_of_turn():
    model = small_model()
    for stop in (2, 72):
        with torch.no_grad():
            model.lm_head.weight.zero_()
            model.lm_head.weight[stop] = model.lm_head.weight.new_ones(1)
            model.model.norm.weight.fill_(1.0)
        hidden_sign = model.model(torch.tensor([[0, 80]])).last_hidden_state[0, -1].sum().sign()
        with torch.no_grad():
            model.lm_head.weight[stop] *= hidden_sign
        assert generate(model, torch.tensor([[0, 80]]), max_new_tokens=5)[0, 2:].tolist() == [stop]


def test_the_context_ends_the_answer():
    model = small_model(max_position_embeddings=8)
    assert generate(model, torch.tensor([[0, 80, 81]]), eos_token_id=[]).shape == (1, 8)


def test_stream_yields_each_step_as_it_is_made():
    steps = stream(MODEL, torch.tensor([[0, 80]]), max_new_tokens=4, eos_token_id=[])
    first = next(steps)
    assert first.shape == (1,)
    rest = list(steps)
    expected = generate(MODEL, torch.tensor([[0, 80]]), max_new_tokens=4, eos_token_id=[])
    assert [int(i) for i in (first, *rest)] == expected[0, 2:].tolist()


PROMPT = torch.tensor([[0, 80]])


@pytest.mark.parametrize("ids, options, message", [
    (PROMPT, dict(temperature=-1.0), "temperature must be 0"),
    (PROMPT, dict(temperature=float("nan")), "temperature must be 0"),
    (PROMPT, dict(temperature=1e39, do_sample=True), "temperature must be 0 .* to 1e30"),
    (PROMPT, dict(top_p=0.0), "top_p must be above 0"),
    (PROMPT, dict(top_p=1.5), "top_p must be above 0"),
    (PROMPT, dict(top_k=-1), "top_k must be"),
    (PROMPT, dict(repetition_penalty=0.0), "repetition_penalty must be"),
    (PROMPT, dict(max_new_tokens=0), "max_new_tokens must be"),
    (PROMPT, dict(temperature=None), "temperature must be 0 .* got None"),
    (PROMPT, dict(seed=[1, 2]), r"or a list of 1, got \[1, 2\]"),
    (PROMPT, dict(seed="5"), "must be a whole number"), (PROMPT, dict(seed=2**64), "below 2\\^63"),
    (PROMPT, dict(eos_token_id=10**9), "eos_token_id is 1000000000"),
    (PROMPT, dict(max_new_tokens=-10**50), "max_new_tokens must be"),
    (torch.zeros(1, 0).long(), {}, "input_ids must be int64 .* not Tensor torch.int64 .*1, 0"),
    (PROMPT.tolist(), {}, "must be int64 .*, not list"),
    *((PROMPT.to(dtype), {}, f"must be int64 .* {dtype}") for dtype in (
        torch.uint16, torch.int8, torch.bool, torch.float32)),
    (torch.full((1, 300), 80), {}, "prompt has 300 tokens.*context holds 256"),
    (torch.tensor([[0] + [73] * S]), {}, "no pixel_values"),
    (PROMPT, dict(attention_mask=torch.tensor([[1, 0]])), "padding_side='left'"),
])
def test_what_cannot_work_is_one_clear_line(ids, options, message):
    with pytest.raises(ValueError, match=message):
        generate(MODEL, ids, **options)


def test_the_highest_temperature_draws_any_id_that_is_allowed():
    ids = generate(MODEL, PROMPT, do_sample=True, temperature=1e30, max_new_tokens=40,
                   eos_token_id=[])
    assert len(ids.unique()) > 20


def test_a_model_that_computes_nan_does_not_answer():
    model = copy.deepcopy(MODEL)
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="inf or nan"):
        next(stream(model, PROMPT))


@pytest.mark.parametrize("mode", ["text", "image"])
def test_a_model_that_computes_nan_later_stops_there(mode):
    """Its ids so far are given; the row of the next one is nan, whichever id it is."""
    model = copy.deepcopy(MODEL)
    options = dict(mode=mode, max_new_tokens=80)
    ids = torch.cat(list(stream(model, PROMPT, **options)))
    later = next(i for i, id in enumerate(ids.tolist()) if i > 2 and id not in ids[:i])
    model.model.embed_tokens.weight.data[ids[later]] = float("nan")
    steps, given = stream(model, PROMPT, **options), []
    with pytest.raises(ValueError, match="inf or nan"):
        given.extend(steps)
    assert torch.cat(given).tolist() == ids[: later + 1].tolist()


def test_a_row_that_has_ended_cannot_stop_the_others():
    steps = torch.tensor([[80, 80], [2, 80], [NO_ID, 81], [82, 2], [83, 83]])
    given = list(until_ended(iter(steps), torch.arange(84) == 2, 1, (), []))
    assert torch.stack(given).tolist() == [[80, 80], [2, 80], [1, 81], [1, 2]]


def test_the_smallest_top_p_keeps_the_highest_logit():
    """fp32 has no number below 1e-45 but 0."""
    options = dict(do_sample=True, top_p=1e-46, image_top_p=1e-46)
    for mode in ("text", "image"):
        sampled = generate(MODEL, PROMPT, mode=mode, max_new_tokens=12, **options)
        greedy = generate(MODEL, PROMPT, mode=mode, max_new_tokens=12, image_temperature=0)
        assert torch.equal(sampled, greedy)


def test_rows_that_stop_strings_end_are_filled_with_the_pad_id_asked_for():
    class Letters(Tokenizer):
        def __init__(self):
            self.pad_token_id, self.special_ids = 1, frozenset()

        def token_bytes(self, token_id):
            return f"{token_id}.".encode()

    prompts, options = torch.tensor([[0, 80], [0, 90]]), dict(
        max_new_tokens=12, pad_token_id=5, eos_token_id=[])
    plain = generate(MODEL, prompts, **options)[:, 2:].tolist()
    word = next(f"{i}." for i in plain[0][1:] if i not in plain[1])
    ids = generate(MODEL, prompts, **options, stop_strings=word,
                   tokenizer=Letters())[:, 2:].tolist()
    end = plain[0].index(int(word[:-1])) + 1
    assert ids[0] == plain[0][:end] + [5] * (12 - end) and ids[1] == plain[1]
    # A row that ends by an id does not keep the others waiting.
    ids = generate(MODEL, prompts, max_new_tokens=12, pad_token_id=5, stop_strings=word,
                   eos_token_id=plain[1][0], tokenizer=Letters())
    assert ids.shape[1] - 2 == min(end, (plain[0] + [plain[1][0]]).index(plain[1][0]) + 1)
    with pytest.raises(ValueError, match="tokenizer=processor.tokenizer"):
        generate(MODEL, PROMPT, stop_strings=word, tokenizer="letters")


def test_padding_is_known_by_the_pad_token_id_that_is_asked_for():
    """The config's is None by default."""
    model = small_model(pad_token_id=None)
    inputs, options = left_padded([[0, 80, 81, 82, 90, 91], [0, 90]]), dict(max_new_tokens=4)
    expected = generate(model, **inputs, **options, pad_token_id=1)
    assert torch.equal(generate(model, inputs["input_ids"], **options, pad_token_id=1), expected)
    with pytest.raises(ValueError, match="must be int64 .* not list"):
        generate(model, [[0, 80]], max_length=9)
    for mask in (inputs["attention_mask"].tolist(), inputs["attention_mask"].numpy()):
        with pytest.raises(ValueError, match=r"attention_mask must be a tensor \(2, 6\)"):
            generate(model, inputs["input_ids"], mask)


def test_a_cache_of_a_model_with_other_heads_is_refused():
    other = KVCache(ChameleonConfig(**(SIZES | dict(num_key_value_heads=2))))
    with pytest.raises(ValueError, match="is no cache of this model"):
        generate(MODEL, PROMPT, past_key_values=other)


def test_a_cache_that_forward_has_filled_is_continued():
    """Its columns are not read again: with other keys and values the answer is another."""
    first = torch.tensor([[0, 80, 90, 100]])
    with torch.no_grad():
        cache = MODEL(first[:, :3]).past_key_values
    for column in cache.k + cache.v:
        column.add_(3.0)
    plain = generate(MODEL, first, max_new_tokens=8)
    assert not torch.equal(generate(MODEL, first, max_new_tokens=8, past_key_values=cache), plain)
    with torch.no_grad():
        cache = MODEL(first[:, :3]).past_key_values
    with pytest.raises(ValueError, match="holds 3 columns, the prompt has 1 ids: pass all ids"):
        generate(MODEL, first[:, 3:], past_key_values=cache)
    assert torch.equal(generate(MODEL, first, max_new_tokens=8, past_key_values=cache), plain)


def test_what_cannot_work_is_said_before_the_first_id_is_asked_for():
    with pytest.raises(ValueError, match="mode"):
        stream(MODEL, PROMPT, mode="video")


def test_sampling_in_training_leaves_the_model_in_training():
    model = small_model(attention_dropout=0.5).train()
    first = generate(model, PROMPT, max_new_tokens=5)
    assert model.training and torch.equal(generate(model, PROMPT, max_new_tokens=5), first)


def test_rope_scaling_lengthens_the_context():
    config = ChameleonConfig(**(SIZES | dict(rope_scaling={"type": "linear", "factor": 2.0})))
    assert room_behind(config, 400) == 112 and room_behind(config, 511) == 1


# ------------------------------------------------------------------- the grammar, and guidance


SMALL_S = 4  # codes of an 8x8 picture
BEGIN, END = 71, 70
DRAWER = small_model(vq_config=VQ | dict(resolution=8), max_position_embeddings=200)
CODES = set(DRAWER.model.vocabulary.code_to_id.tolist())


def with_any_logits(seed: int, scale: float, begin: float) -> ChameleonForConditionalGeneration:
    """Random logits at every step, those of begin-image raised so that pictures are frequent."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        DRAWER.lm_head.weight.copy_(torch.randn(DRAWER.lm_head.weight.shape, generator=g) * scale)
        hidden = DRAWER.model(torch.tensor([[0, 85]])).last_hidden_state[0, -1]
        DRAWER.lm_head.weight[BEGIN] += begin * hidden / hidden.norm()
    return DRAWER


def pictures_of(ids: list[int]) -> list[list[int]]:
    """The ids between each begin-image and the next end-image; fails on marks out of order."""
    pictures, inside = [], None
    for i in ids:
        if i == BEGIN:
            assert inside is None
            inside = []
        elif i == END:
            pictures.append(inside)
            inside = None
        elif inside is not None:
            inside.append(i)
        else:
            assert i not in CODES
    assert inside is None  # none is left unfinished
    return pictures


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), B=st.integers(1, 3), room=st.integers(1, 40),
       scale=st.floats(0.01, 3.0), begin=st.floats(0, 30), sample=st.booleans(),
       guidance=st.sampled_from([(1.0, 1.0), (3.0, 1.0), (2.0, 1.5)]))
def test_every_picture_has_exactly_s_codes_and_the_grammar_never_ends_dead(
        seed, B, room, scale, begin, sample, guidance):
    model = with_any_logits(seed, scale, begin)
    prompt = torch.tensor([[0, 80]] * B)
    ids = generate(model, prompt, mode="interleaved", max_new_tokens=room, do_sample=sample,
                   seed=seed, eos_token_id=[], guidance_text=guidance[0],
                   guidance_image=guidance[1])
    assert ids.shape == (B, 2 + room) and ids.min() >= 0 and ids.max() < V
    for row in ids[:, 2:].tolist():
        assert all(len(p) == SMALL_S and set(p) <= CODES for p in pictures_of(row))
        assert 73 not in row  # the placeholder is never made


def test_pictures_do_occur_and_need_room_for_all_their_codes():
    model = with_any_logits(0, 0.01, 1000.0)  # begins a picture whenever it may
    prompt = torch.tensor([[0, 85]])
    options = dict(mode="interleaved", eos_token_id=[])
    for room in range(1, 20):
        ids = generate(model, prompt, max_new_tokens=room, **options)[0, 2:].tolist()
        assert len(pictures_of(ids)) == room // (SMALL_S + 2)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), B=st.integers(1, 3))
def test_image_mode_draws_exactly_one_picture_at_once(seed, B):
    model = with_any_logits(seed, 1.0, 0.0)
    ids = generate(model, torch.tensor([[0, 80]] * B), mode="image", seed=seed)[:, 2:]
    assert ids.shape == (B, SMALL_S + 2)
    assert (ids[:, 0] == BEGIN).all() and (ids[:, -1] == END).all()
    assert all(len(pictures_of(row)) == 1 for row in ids.tolist())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), scales=st.tuples(st.floats(0, 5), st.floats(0, 5)),
       lengths=st.lists(st.integers(1, 6), min_size=2, max_size=3), sample=st.booleans())
def test_rows_in_text_and_rows_in_pictures_share_a_batch(seed, scales, lengths, sample):
    model = with_any_logits(seed, 0.3, 8.0)
    g = torch.Generator().manual_seed(seed)
    rows = [[0] + torch.randint(74, V, (n,), generator=g).tolist() for n in lengths]
    options = dict(
        mode="interleaved", max_new_tokens=18, do_sample=sample, temperature=1.5,
        image_temperature=float(sample), guidance_text=scales[0], guidance_image=scales[1],
        eos_token_id=[80, 90, 100])
    batch = generate(model, **left_padded(rows), seed=seed, **options)
    for b, row in enumerate(rows):
        single = generate(model, torch.tensor([row]), seed=seed + b, **options)[0, len(row) :]
        assert torch.equal(batch[b, max(lengths) + 1 :][: len(single)], single)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), image_first=st.booleans())
def test_the_cache_across_modality_switches_equals_the_full_forward(seed, image_first):
    """Each greedy id is the best allowed one of a forward pass over everything before it."""
    model = with_any_logits(seed, 0.3, 10.0)
    prompt = [0, 80] + ([BEGIN, *sorted(CODES)[:SMALL_S], END] if image_first else [])
    ids = generate(model, torch.tensor([prompt]), mode="interleaved", max_new_tokens=20,
                   image_temperature=0.0, eos_token_id=[])[0]
    grammar = Grammar(model, "interleaved")
    with torch.no_grad():
        logits = model(ids[None], mask_image_logits=False).logits[0]
    for t in range(len(prompt), len(ids)):
        missing = grammar.missing(ids[None, :t])
        allowed = grammar.allowed(missing, len(prompt) + 20 - t)[0]
        best = logits[t - 1].masked_fill(~allowed, float("-inf"))
        assert best.max() - best[ids[t]] < 1e-4


def reference_guidance(model, row: list[int], text: float, image: float) -> torch.Tensor:
    """Meta's three streams, each its own full forward pass, for the next code after `row`."""
    start = max(i for i, x in enumerate(row) if x == BEGIN)
    full = row
    pictures = [row[0]] + [i for i in row[1:] if i in CODES or i in (BEGIN, END)]
    nothing = [row[0]] + row[start:]
    with torch.no_grad():
        f, i, u = (model(torch.tensor([ids]), mask_image_logits=False).logits[0, -1]
                   for ids in (full, pictures, nothing))
    return u + image * (i - u) + text * (f - i)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), text=st.sampled_from([0.0, 1.0, 3.0]),
       image=st.sampled_from([0.0, 1.0, 1.2]), shown=st.booleans(),
       mode=st.sampled_from(["image", "interleaved", "begun"]))
def test_guidance_equals_three_separate_forward_passes(seed, text, image, shown, mode):
    model = with_any_logits(seed, 0.3, 12.0)
    prompt = [0, 80] + ([BEGIN, *sorted(CODES)[:SMALL_S], END, 81] if shown else [])
    if mode == "begun":  # the prompt itself ends inside a picture
        prompt, mode = prompt + [BEGIN, sorted(CODES)[0]], "interleaved"
    ids = generate(model, torch.tensor([prompt]), mode=mode, image_temperature=0.0,
                   guidance_text=text, guidance_image=image, eos_token_id=[],
                   max_new_tokens=20)[0].tolist()
    code_ids = sorted(CODES)
    for t in range(len(prompt), len(ids)):
        if ids[t] in CODES:
            logits = reference_guidance(model, ids[:t], text, image)[code_ids]
            assert logits.max() - logits[code_ids.index(ids[t])] < 1e-3


@pytest.mark.parametrize("mode", ["image", "interleaved"])
def test_a_minimum_of_new_tokens_never_reaches_into_a_picture(mode):
    model, prompt = with_any_logits(0, 0.01, 1000.0), torch.tensor([[0, 85]])
    ids = generate(model, prompt, mode=mode, min_new_tokens=6, max_new_tokens=6,
                   eos_token_id=[2, END])[0, 2:]
    assert len(pictures_of(ids.tolist())[0]) == SMALL_S and ids[-1] == END


def test_scales_of_one_are_no_guidance_and_a_dropped_prompt_is_its_own():
    assert guidance_weights(1.0, 1.0, "interleaved", True) == {"full": 1.0}
    assert list(guidance_weights(2.0, 2.0, "interleaved", True)) == ["full", "nothing"]
    model = with_any_logits(3, 1.0, 0.0)
    empty = torch.tensor([[0]])
    plain = generate(model, empty, mode="image", seed=5)
    assert torch.equal(generate(model, empty, mode="image", seed=5, guidance_text=4.0), plain)


def test_the_repetition_penalty_never_acts_inside_a_picture():
    model = with_any_logits(1, 1.0, 0.0)
    prompt = torch.tensor([[0, 80]])
    plain = generate(model, prompt, mode="image", image_temperature=0.0)
    assert torch.equal(
        generate(model, prompt, mode="image", image_temperature=0.0, repetition_penalty=9.0), plain
    )


# -------------------------------------------------------------------------------- a conversation


@st.composite
def turns(draw):
    """A conversation's turns as ids: text, and pictures of SMALL_S codes among it."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    text = lambda n: torch.randint(74, V, (n,), generator=g).tolist()  # noqa: E731
    order = torch.randperm(len(CODES), generator=g)[:SMALL_S].tolist()
    picture = [BEGIN, *(sorted(CODES)[i] for i in order), END]
    kinds = draw(st.lists(st.integers(0, 7), min_size=1, max_size=4))
    return [text(n % 4 + 1) + (picture if n > 3 else []) + text(1) for n in kinds]


@settings(max_examples=25, deadline=None)
@given(turns=turns(), mode=st.sampled_from(["text", "image", "interleaved"]), B=st.integers(1, 2),
       scale=st.sampled_from([1.0, 3.0]), kept=st.booleans(), early=st.booleans(),
       fast=st.booleans())
def test_any_split_into_turns_gives_the_ids_and_logits_of_one_prefill(
        turns, mode, B, scale, kept, early, fast):
    """Answers may stay in the conversation or not, and a call may be left before its end."""
    model = with_any_logits(1, 0.3, 8.0)
    cache, ids, reads = KVCache(model.config, B), torch.zeros(B, 1, dtype=torch.long), []
    options = dict(mode=mode, max_new_tokens=8, eos_token_id=[80, 90], image_temperature=0.0,
                   guidance_text=scale, decoder=fast and Decoder(model))
    set_attention(model, "sdpa")
    hook = model.model.embed_tokens.register_forward_hook(
        lambda _, ids, __: reads.append(ids[0].shape[1]))
    for turn in turns:
        other = [i if i < 74 else V - 1 - (i - 74) for i in turn]  # its pictures are the same
        new, start, before = torch.tensor([turn, other][:B]), len(reads), ids.shape[1]
        ids = torch.cat((ids, new), dim=1)
        steps = stream(model, ids, past_key_values=cache, **options)
        made = list(itertools.islice(steps, 3) if early else steps)
        steps.close()
        guided = mode != "text" and scale > 1
        if not guided:  # the turn and its last ids before; less if the answer began like the turn
            assert 0 < reads[start] <= len(turn) + (1 if before == 1 else 2)
        anew = list(stream(model, ids, **options))
        assert torch.equal(torch.stack(made), torch.stack(anew[: len(made)]))
        answer = torch.stack(made, dim=1)
        if kept and not (answer == 1).any():  # padding of a row that has ended
            ids = torch.cat((ids, answer), dim=1)
    hook.remove()
    cache.length = n = min(cache.length, ids.shape[1] - 1)
    cache.k, cache.v = ([x[:, :, :n] for x in xs] for xs in (cache.k, cache.v))
    with torch.no_grad():
        part = model(ids[:, cache.length :], past_key_values=cache, mask_image_logits=False)
        whole = model(ids, mask_image_logits=False)
    assert (part.logits[:, -1] - whole.logits[:, -1]).abs().max() < 1e-3


@pytest.mark.parametrize("past, ids, message", [
    ("a cache", PROMPT, "no cache of this model"),
    (KVCache(small_model(num_hidden_layers=2).config), PROMPT, "no cache of this model"),
    (KVCache(MODEL.config, 2, 8), PROMPT, "holds 2 rows, the input has 1"),
    (KVCache(MODEL.config), torch.tensor([[1, 80]]), "without padding"),
])
def test_a_cache_that_cannot_be_continued_is_one_clear_line(past, ids, message):
    with pytest.raises(ValueError, match=message):
        generate(MODEL, ids, past_key_values=past)


@pytest.mark.parametrize("model, options, message", [
    (DRAWER, dict(mode="video"), "mode must be one of text, image, interleaved, got 'video'"),
    (DRAWER, dict(mode="image", image_temperature=-1.0), "image_temperature must be"),
    (DRAWER, dict(mode="image", image_top_p=0.0), "image_top_p must be"),
    (DRAWER, dict(mode="image", guidance_text=-1.0), "guidance_text must be"),
    (small_model(vocabulary_map=None), dict(mode="image"), "no image tokens"),
    (small_model(max_position_embeddings=40), dict(mode="image"), "a picture takes 66"),
])
def test_drawing_that_cannot_work_is_one_clear_line(model, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, torch.tensor([[0, 80]]), **options)


def test_weights_without_vq_decoder_say_so_before_drawing():
    values = SIZES | dict(vocabulary_map=scrambled_vocabulary(), vq_config=VQ)
    model = ChameleonForConditionalGeneration(ChameleonConfig(**values), with_vq_decoder=False)
    with pytest.raises(ValueError, match="no VQ-VAE decoder"):
        generate(model, torch.tensor([[0, 80]]), mode="image")


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), temperature=st.floats(0.1, 5.0), sample=st.booleans())
def test_text_never_contains_a_pictures_id(seed, temperature, sample):
    forbidden = set(ids_of_pictures(DRAWER.model.vocabulary))
    assert len(forbidden) == VQ["num_embeddings"] + 3
    ids = generate(DRAWER, torch.tensor([[0, 80]]), max_new_tokens=20, do_sample=sample, seed=seed,
                   temperature=temperature, eos_token_id=[])
    assert not forbidden & set(ids[0, 2:].tolist()) and ids.shape == (1, 22)


@pytest.mark.slow
def test_a_picture_of_the_real_size_is_drawn_by_an_untrained_model():
    """1024 codes of 8192 and 512x512 pixels, behind a small decoder, with guidance."""
    names = {"<s>": 0, "<pad>": 1, "</s>": 2, "<eoss>": 8196, "<racm3:break>": 8197,
             "<reserved08706>": 8198, "<image>": 8199}
    names |= {image_token_name(code): code + 4 for code in range(8192)}
    config = ChameleonConfig(**(SIZES | dict(
        vocab_size=8300, vocabulary_map=names, max_position_embeddings=1100)))
    model = ChameleonForConditionalGeneration(config).eval()
    ids = generate(model, torch.tensor([[0, 8250, 8198]]), mode="image", guidance_text=3.0)
    assert ids.shape == (1, 3 + 1026) and ids[0, 3] == 8197 and ids[0, -1] == 8196
    picture = decode_pictures(model, ids[:, 4:-1])[0]
    assert picture.size == (512, 512)

def test_a_head_of_your_own_draws_as_it_writes():
    """With a bias, or a hook, or without a weight: logits of codes are those of the whole head."""
    ids, draw = torch.tensor([[0, 80]]), dict(mode="image", image_temperature=0)
    for change in ("bias", "hook", "no weight"):
        model = small_model()
        favourite = int(model.model.vocabulary.code_to_id[5])
        head = torch.nn.Linear(64, V, bias=change == "bias")
        head.weight.data.copy_(model.lm_head.weight)
        bias = torch.zeros(V)
        bias[favourite] = 1e3
        if change == "bias":
            head.bias.data.copy_(bias)
        else:
            head.register_forward_hook(lambda module, x, y, bias=bias: y + bias)
        model.set_output_embeddings(
            torch.nn.Sequential(head) if change == "no weight" else head)
        assert (generate(model, ids, **draw)[0, 3:-1] == favourite).all(), change
    hooked, negated = small_model(), small_model()
    hooked.lm_head.register_forward_pre_hook(lambda module, inputs: (-inputs[0],))
    negated.lm_head.weight.data.neg_()
    patched = small_model()
    patched.lm_head.forward = negated.lm_head.forward
    for model in (hooked, patched):
        assert torch.equal(generate(model, ids, **draw), generate(negated, ids, **draw))


def test_a_cache_that_was_cropped_and_written_again_forgets_its_ids():
    model, options = small_model(), dict(max_new_tokens=6, eos_token_id=[])
    first, cache = torch.tensor([[0, 80, 90, 100, 110, 120]]), KVCache(small_model().config)
    model.generate(first, past_key_values=cache, **options)
    cache.length = 2
    with torch.no_grad():
        model(torch.tensor([[81, 82, 83, 84]]), past_key_values=cache)
    again = model.generate(first, past_key_values=cache, **options)
    assert torch.equal(again, model.generate(first, **options))


def test_the_temperature_comes_before_the_filters():
    g = torch.Generator().manual_seed(0)  # top_p=0.9 would drop 0 of the logits as they are
    drawn = {int(choose(torch.tensor([[0.0, 1.0, 2.0]]), [g], 5.0, None, 0.9)) for _ in range(60)}
    assert drawn == {0, 1, 2}


@pytest.mark.parametrize("option", [dict(image_top_k=1), dict(image_top_p=1e-9)])
def test_pictures_have_filters_of_their_own(option):
    model = with_any_logits(2, 0.3, 0.0)
    drawn = generate(model, PROMPT, mode="image", **option)
    assert torch.equal(drawn, generate(model, PROMPT, mode="image", image_temperature=0.0))


def test_a_cache_is_read_up_to_the_first_other_id_and_serves_several_sequences():
    cache, other = KVCache(MODEL.config), torch.tensor([[0, 81, 90, 100, 110]])
    generate(MODEL, torch.tensor([[0, 80, 90, 100, 110]]), past_key_values=cache)
    again = generate(MODEL, other, past_key_values=cache, max_new_tokens=6)
    assert torch.equal(again, generate(MODEL, other, max_new_tokens=6))
    cache, options = KVCache(MODEL.config, 2, 64), dict(
        num_return_sequences=2, do_sample=True, max_new_tokens=4, eos_token_id=[])
    for _ in range(2):
        ids = generate(MODEL, PROMPT, past_key_values=cache, **options)
    assert torch.equal(ids, generate(MODEL, PROMPT, **options))
    with torch.no_grad():  # what generate leaves may grow
        MODEL(ids[:, cache.length :], past_key_values=cache)


def test_prompts_that_end_inside_a_picture():
    codes = sorted(CODES)[:1] * (SMALL_S + 3)
    assert Grammar(DRAWER, "interleaved").missing(torch.tensor([[0, BEGIN, *codes]])) == [1]
    ids = generate(DRAWER, torch.tensor([[0, BEGIN]]), max_new_tokens=4, eos_token_id=[])
    assert not CODES & set(ids[0, 2:].tolist())  # mode="text" finishes no picture


def test_each_submodule_stays_in_the_mode_it_was_in():
    model = small_model().train()
    model.lm_head.eval()
    generate(model, PROMPT, max_new_tokens=2)
    assert model.model.norm.training and not model.lm_head.training


def test_a_part_in_training_has_no_dropout_either():
    """As the adapter that peft adds to a model: it is in training, the model is not."""
    model = small_model(attention_dropout=0.5)
    model.model.layers.train()
    expected = generate(small_model(), PROMPT, max_new_tokens=6, eos_token_id=[])
    assert torch.equal(generate(model, PROMPT, max_new_tokens=6, eos_token_id=[]), expected)
    assert model.model.layers[0].training and not model.training


def test_torchs_default_device_changes_nothing():
    expected = generate(MODEL, PROMPT, max_new_tokens=6, eos_token_id=[])
    with torch.device("meta"):
        assert torch.equal(generate(MODEL, PROMPT, max_new_tokens=6, eos_token_id=[]), expected)


def test_ends_and_padding():
    assert stop_ids(MODEL, 2, "text") == [2] and stop_ids(MODEL, None, "text") == [2, 72]
    model, ids = small_model(pad_token_id=2), torch.tensor([[0, 80, 2, 81]])  # pad is </s>
    plain = generate(model, ids, torch.ones_like(ids), max_new_tokens=6, eos_token_id=[2])
    assert torch.equal(generate(model, ids, max_new_tokens=6, eos_token_id=[2]), plain)
    stops = list(range(74, V))
    rows = generate(MODEL, torch.tensor([[0, 80], [0, 90], [0, 91]]), max_new_tokens=9, seed=3,
                    do_sample=True, eos_token_id=stops[::2], pad_token_id=0)[:, 2:].tolist()
    ended = [row[i + 1 :] for row in rows for i in [next(
        (i for i, x in enumerate(row) if x in stops[::2]), 9)]]
    assert any(ended) and all(set(row) <= {0} for row in ended)


def test_several_sequences_of_several_prompts_stand_in_order():
    ids = generate(MODEL, torch.tensor([[0, 80], [0, 90]]), num_return_sequences=2, do_sample=True,
                   max_new_tokens=2)
    assert ids[:, 1].tolist() == [80, 80, 90, 90]
