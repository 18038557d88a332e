"""Sampling: each filter against its definition, the loop against transformers and itself."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import SIZES, S, V, batch_with_pictures, left_padded, small_model
from test_oracle import pair

from chameleon import ChameleonConfig
from sampling import (
    check_room,
    draw,
    generate,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    stream,
)

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
    drawn = draw(probs.log().repeat(20_000, 1), [generator] * 20_000)
    observed = torch.bincount(drawn, minlength=5) / 20_000
    assert (observed - probs).abs().max() < 0.015  # four standard deviations
    assert observed[4] == 0


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
    (PROMPT, dict(top_p=0.0), "top_p must be above 0"),
    (PROMPT, dict(top_p=1.5), "top_p must be above 0"),
    (PROMPT, dict(top_k=-1), "top_k must be"),
    (PROMPT, dict(repetition_penalty=0.0), "repetition_penalty must be"),
    (PROMPT, dict(max_new_tokens=0), "max_new_tokens must be"),
    (PROMPT, dict(temperature=None), "temperature is None"),
    (PROMPT, dict(seed=[1, 2]), "2 seeds for 1 rows"),
    (torch.zeros(1, 0).long(), {}, "input_ids must be"),
    (torch.full((1, 300), 80), {}, "prompt has 300 tokens.*context holds 256"),
    (torch.tensor([[0] + [73] * S]), {}, "no pixel_values"),
    (PROMPT, dict(attention_mask=torch.tensor([[1, 0]])), "padding_side='left'"),
])
def test_what_cannot_work_is_one_clear_line(ids, options, message):
    with pytest.raises(ValueError, match=message):
        generate(MODEL, ids, **options)


def test_a_model_that_computes_nan_does_not_answer():
    model = copy.deepcopy(MODEL)
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="inf or nan"):
        next(stream(model, PROMPT))


def test_what_cannot_work_is_said_before_the_first_id_is_asked_for():
    with pytest.raises(ValueError, match="mode"):
        stream(MODEL, PROMPT, mode="video")


def test_sampling_in_training_leaves_the_model_in_training():
    model = small_model(attention_dropout=0.5).train()
    first = generate(model, PROMPT, max_new_tokens=5)
    assert model.training and torch.equal(generate(model, PROMPT, max_new_tokens=5), first)


def test_rope_scaling_lengthens_the_context():
    config = ChameleonConfig(**(SIZES | dict(rope_scaling={"type": "linear", "factor": 2.0})))
    assert check_room(config, 400) == 112
