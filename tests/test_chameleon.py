"""The decoder: shapes, causality, caches, padding, positions, norms, labels, configs. Equality with
transformers is in test_oracle.py; files are in test_checkpoint.py."""

import copy
import re
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import SIZES, VQ, K, S, V, batch_with_pictures, randomize, scrambled_vocabulary

import chameleon
from chameleon import (
    IGNORE,
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    ChameleonModel,
    ChameleonRMSNorm,
    KVCache,
    rotary_table,
    rotate,
)
from chameleon_extras.decoding import set_attention
from chameleon_extras.quantize import quantize_model
from tokenizer import image_token_name

TEXT = 74  # ids from here on are text in the scrambled vocabulary


def small_model(**changes) -> ChameleonForConditionalGeneration:
    values = SIZES | dict(num_key_value_heads=2, vocabulary_map=scrambled_vocabulary()) | changes
    model = ChameleonForConditionalGeneration(ChameleonConfig(vq_config=VQ, **values)).eval()
    randomize(model)
    return model


MODEL = small_model()


def text_ids(B: int, T: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(TEXT, V, (B, T), generator=torch.Generator().manual_seed(seed))


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=3e-5, rtol=1e-4)


# ------------------------------------------------------------------------------- shapes and masks


@settings(max_examples=20, deadline=None)
@given(B=st.integers(1, 4), T=st.integers(1, 20), keep=st.integers(0, 20))
def test_shapes_hold_for_any_batch_and_length(B, T, keep):
    with torch.no_grad():
        out = MODEL(text_ids(B, T), output_hidden_states=True, output_attentions=True,
                    logits_to_keep=keep)
    assert out.logits.shape == (B, min(keep, T) or T, V)
    assert [h.shape for h in out.hidden_states] == [(B, T, 64)] * 4
    assert [a.shape for a in out.attentions] == [(B, 4, T, T)] * 3
    body = MODEL.model(text_ids(B, T), output_hidden_states=True)
    assert torch.equal(body.hidden_states[-1], body.last_hidden_state)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), T=st.integers(2, 16), data=st.data(),
       attention=st.sampled_from(["eager", "sdpa"]))
def test_no_logit_before_t_moves_when_id_t_changes(seed, T, data, attention):
    t = data.draw(st.integers(1, T - 1))
    set_attention(MODEL, attention)
    ids = text_ids(1, T, seed)
    other = ids.clone()
    other[0, t] = TEXT + (ids[0, t] - TEXT + 1) % (V - TEXT)
    with torch.no_grad():
        a, b = MODEL(ids).logits[0], MODEL(other).logits[0]
    set_attention(MODEL, "sdpa")
    assert torch.equal(a[:t], b[:t])
    assert not torch.equal(a[t:], b[t:])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), cuts=st.lists(st.integers(1, 6), min_size=1, max_size=6),
       attention=st.sampled_from(["eager", "sdpa"]))
def test_any_chunking_through_the_cache_equals_the_full_forward(seed, cuts, attention):
    set_attention(MODEL, attention)
    ids = text_ids(2, sum(cuts), seed)
    cache = KVCache(MODEL.config, 2, sum(cuts))
    with torch.no_grad():
        chunks = [MODEL(part, past_key_values=cache).logits for part in ids.split(cuts, dim=1)]
        close(torch.cat(chunks, 1), set_attention(MODEL, "sdpa")(ids).logits)
    assert cache.length == sum(cuts)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), lengths=st.lists(st.integers(1, 9), min_size=2, max_size=4),
       attention=st.sampled_from(["eager", "sdpa"]))
def test_a_left_padded_row_equals_the_row_alone(seed, lengths, attention):
    set_attention(MODEL, attention)
    T = max(lengths)
    rows = [text_ids(1, n, seed + n) for n in lengths]
    ids = torch.cat([torch.cat((torch.ones(1, T - r.shape[1]).long(), r), 1) for r in rows])
    mask = torch.tensor([[0] * (T - n) + [1] * n for n in lengths])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        batch = MODEL(ids, attention_mask=mask, position_ids=positions).logits
        for b, (row, n) in enumerate(zip(rows, lengths)):
            close(batch[b, T - n :], MODEL(row).logits[0])
    set_attention(MODEL, "sdpa")
    assert batch.isfinite().all()  # rows of pure padding are no NaN


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), pad=st.integers(1, 6), side=st.sampled_from(["left", "right"]))
def test_what_stands_on_padding_changes_nothing(seed, pad, side):
    ids, T = text_ids(1, 8 + pad, seed), 8 + pad
    mask = torch.ones(1, T, dtype=torch.long)
    hidden = slice(0, pad) if side == "left" else slice(T - pad, T)
    mask[:, hidden] = 0
    other = ids.clone()
    other[:, hidden] = text_ids(1, pad, seed + 1)
    real = mask.bool()
    with torch.no_grad():
        a, b = (MODEL(x, attention_mask=mask).logits[real] for x in (ids, other))
    assert torch.equal(a, b)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 6), m=st.integers(1, 6))
def test_packed_documents_do_not_see_each_other(seed, n, m):
    a, b = text_ids(1, n, seed), text_ids(1, m, seed + 1)
    document = torch.tensor([0] * n + [1] * m)
    mask = (document[:, None] == document[None])[None]  # (1, T, T)
    positions = torch.cat((torch.arange(n), torch.arange(m)))[None]
    with torch.no_grad():
        ids = torch.cat((a, b), 1).repeat(2, 1)  # two rows, and one mask for both
        packed = MODEL(ids, attention_mask=mask, position_ids=positions).logits
        close(packed[:1, :n], MODEL(a).logits)
        close(packed[1:, n:], MODEL(b).logits)
        # Without a cache the positions alone tell where a document begins.
        unmasked = MODEL(ids, position_ids=positions, use_cache=False).logits
        assert torch.equal(unmasked, packed)
        with pytest.raises(ValueError, match="position_ids are"):
            MODEL(ids, position_ids=positions[0], use_cache=False)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), past=st.integers(0, 5), T=st.integers(1, 7),
       pad=st.integers(0, 3), heads=st.sampled_from([1, 2, 4]))
def test_eager_attention_equals_sdpa(seed, past, T, pad, heads):
    model = small_model(num_key_value_heads=heads)
    ids = text_ids(2, past + T, seed)
    mask = torch.ones(2, past + T, dtype=torch.long)
    mask[1, :pad] = 0
    logits = {}
    for name in ("eager", "sdpa"):
        set_attention(model, name)
        cache = KVCache(model.config, 2, past + T)
        with torch.no_grad():
            if past:
                model(ids[:, :past], attention_mask=mask[:, :past], past_key_values=cache)
            logits[name] = model(ids[:, past:], attention_mask=mask, past_key_values=cache).logits
    real = mask[:, past:].bool()
    close(logits["eager"][real], logits["sdpa"][real])


@pytest.mark.parametrize("size", [None, 16])
def test_a_cache_is_what_its_length_says(size):
    """Also after it was made shorter, and after a pass that was interrupted between two layers."""
    ids, cache = text_ids(1, 8), KVCache(MODEL.config, 1, size)

    def interrupt(*_):
        raise KeyboardInterrupt

    with torch.no_grad():
        full = MODEL(ids).logits
        MODEL(ids[:, :6], past_key_values=cache)
        cache.length = 4
        hook = MODEL.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            MODEL(ids[:, 4:], past_key_values=cache)
        hook.remove()
        torch.testing.assert_close(MODEL(ids[:, 4:], past_key_values=cache).logits, full[:, 4:],
                                   rtol=1e-4, atol=3e-5)


def test_labels_that_count_for_nothing_give_no_loss():
    ids = text_ids(1, 5)
    loss = MODEL(ids, labels=torch.full_like(ids, IGNORE)).loss
    loss.backward()
    assert loss == 0


@pytest.mark.parametrize("arguments, message", [
    (lambda ids: dict(input_ids=ids[0]), "must be an int64 tensor \\(B,T\\)"),
    (lambda ids: dict(input_ids=ids.tolist()), "must be an int64 tensor \\(B,T\\)"),
    (lambda ids: dict(input_ids=ids.to(torch.uint16)), "must be an int64 tensor"),
    (lambda ids: dict(input_ids=ids.to(torch.int16)), "must be an int64 tensor"),
    (lambda ids: dict(input_ids=ids + 10**6), "the ids of this model are 0 to"),
    (lambda ids: dict(input_ids=ids, labels=ids * 0 + MODEL.model.vocabulary.image_token_id),
     "hold <image>"),
    (lambda ids: dict(inputs_embeds=MODEL.get_input_embeddings()(ids),
                      labels=ids * 0 + MODEL.model.vocabulary.image_token_id), "hold <image>"),
])
def test_what_forward_cannot_take_is_one_clear_line(arguments, message):
    with pytest.raises(ValueError, match=message):
        MODEL(**arguments(text_ids(1, 5)))


def test_a_placeholder_whose_id_is_0_is_found_among_embeddings():
    names = scrambled_vocabulary()
    names["<s>"], names["<image>"] = names["<image>"], names["<s>"]
    model = small_model(vocabulary_map=names)
    for ids, pictures in ([[73, 80, 81]], {}), (
            [[73, 71, *[0] * S, 70, 80]], dict(pixel_values=torch.rand(1, 3, 32, 32))):
        ids = torch.tensor(ids)
        with torch.no_grad():
            expected = model(ids, **pictures).logits
            logits = model(inputs_embeds=model.get_input_embeddings()(ids), **pictures).logits
        assert torch.equal(logits, expected)


def test_gradient_checkpointing_takes_no_cache():
    model = small_model().train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="past_key_values=None"):
        model(text_ids(1, 5), past_key_values=KVCache(model.config, 1))


def test_a_vocabulary_with_other_codes_than_the_codebook_is_refused():
    names = scrambled_vocabulary()
    del names[image_token_name(63)]
    with pytest.raises(ValueError, match="names 63 image codes, but vq_config has 64"):
        small_model(vocabulary_map=names)


def test_resizing_ties_what_the_config_says_is_tied():
    model = small_model(tie_word_embeddings=True)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    model.resize_token_embeddings(V + 8)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_resizing_keeps_frozen_what_is_frozen():
    model = small_model().requires_grad_(False)
    model.resize_token_embeddings(V + 8)
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="resize before quantizing"):
        quantize_model(small_model(), "int8").resize_token_embeddings(V + 8)


def test_a_mask_of_the_wrong_width_and_a_full_cache_are_refused():
    for mask in ([[0, 1, 1]], [[1, 1, 1]], [[[1] * 5] * 3], [[[[1] * 5] * 3]]):
        with pytest.raises(ValueError, match="attention_mask is"):
            MODEL(text_ids(1, 5), attention_mask=torch.tensor(mask))
    with pytest.raises(ValueError, match="holds 4 tokens, 5 are needed"):
        MODEL(text_ids(1, 5), past_key_values=KVCache(MODEL.config, 1, 4))


def test_a_cache_of_another_dtype_is_read_in_the_models():
    model, ids = copy.deepcopy(MODEL).bfloat16(), text_ids(1, 5)
    with torch.no_grad():
        cache = KVCache(model.config, 1, 16)
        model(ids[:, :3], past_key_values=cache)
        torch.testing.assert_close(model(ids[:, 3:], past_key_values=cache).logits,
                                   model(ids).logits[:, 3:], atol=0.3, rtol=0.1)


# --------------------------------------------------------------------------------- RoPE and norms


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), i=st.integers(0, 200), j=st.integers(0, 200),
       shift=st.integers(0, 500), kind=st.sampled_from([None, "linear"]))
def test_rope_scores_depend_on_the_distance_only(seed, i, j, shift, kind):
    scaling = {"type": kind, "factor": 2.5} if kind else None
    config = ChameleonConfig(**(SIZES | dict(rope_scaling=scaling)))
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, 1, 1, config.head_dim, generator=g) for _ in range(2))

    def score(i: int, j: int) -> torch.Tensor:
        a = rotate(q, *rotary_table(config, torch.tensor([[i]])))
        return (a * rotate(k, *rotary_table(config, torch.tensor([[j]])))).sum()

    torch.testing.assert_close(score(i, j), score(i + shift, j + shift), atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(rotate(q, *rotary_table(config, torch.tensor([[i]]))).norm(),
                               q.norm())


def test_dynamic_rope_forgets_a_long_call():
    model = small_model(rope_scaling={"type": "dynamic", "factor": 2.0},
                        max_position_embeddings=16)
    short, long = text_ids(1, 10), text_ids(1, 30)
    with torch.no_grad():
        before = model(short).logits
        model(long)
        assert torch.equal(model(short).logits, before)
        close(before, small_model()(short).logits)  # theta as it is
        assert not torch.equal(model(long).logits[:, :10], model(long[:, :10]).logits)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 100), scale=st.floats(0.1, 1000.0))
def test_qk_norm_makes_logits_blind_to_the_scale_of_q_proj(seed, scale):
    model = small_model()
    ids = text_ids(1, 9, seed)
    with torch.no_grad():
        before = model(ids).logits
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= scale
            layer.self_attn.k_proj.weight *= scale
        after = model(ids).logits
    torch.testing.assert_close(before, after, atol=2e-2, rtol=1e-2)  # eps of the norm remains


def test_attention_dropout_acts_in_training_only():
    model = small_model(attention_dropout=0.5)
    ids = text_ids(1, 9)
    for attention in ("sdpa", "eager"):
        set_attention(model.eval(), attention)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, model(ids).logits)
            model.train()
            assert not torch.equal(model(ids).logits, model(ids).logits)


def test_tied_embeddings_are_one_matrix():
    model = small_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.set_input_embeddings(other := torch.nn.Embedding(V, model.config.hidden_size))
    assert model.get_input_embeddings() is other and model.lm_head.weight is other.weight


# ---------------------------------------------------------------------------- pictures and labels


def test_pictures_and_their_own_ids_are_the_same_input():
    inputs = batch_with_pictures()
    ids = MODEL.model.replace_image_placeholders(inputs["input_ids"], inputs["pixel_values"])
    with torch.no_grad():
        a = MODEL(**inputs).logits
        b = MODEL(ids, attention_mask=inputs["attention_mask"]).logits
    assert torch.equal(a, b)


@settings(max_examples=15, deadline=None)
@given(counts=st.lists(st.integers(0, 2), min_size=1, max_size=3).filter(any),
       seed=st.integers(0, 100))
def test_pictures_fill_placeholders_in_order_row_after_row(counts, seed):
    placeholder = MODEL.model.vocabulary.image_token_id
    T = max(counts) * (S + 1)
    rows = [([placeholder] * S + [80]) * n for n in counts]
    ids = torch.tensor([r + [81] * (T - len(r)) for r in rows])
    g = torch.Generator().manual_seed(seed)
    pixels = torch.rand(sum(counts), 3, 32, 32, generator=g) * 2 - 1
    filled = MODEL.model.replace_image_placeholders(ids, pixels)
    codes = MODEL.model.vqmodel.encode(pixels)
    assert torch.equal(filled[ids != placeholder], ids[ids != placeholder])
    image_ids = filled[ids == placeholder].view(-1, S)
    assert torch.equal(MODEL.model.vocabulary.codes_from_ids(image_ids), codes)


@pytest.mark.parametrize("pictures", [1, 3])
def test_too_few_and_too_many_pictures_are_refused(pictures):
    inputs = batch_with_pictures()
    with pytest.raises(ValueError, match=f"{pictures} pictures are .* {2 * S} <image>"):
        MODEL(inputs["input_ids"], pixel_values=torch.zeros(pictures, 3, 32, 32))


def test_image_logits_are_masked_unless_asked_for():
    ids = text_ids(1, 4)
    code_ids = MODEL.model.vocabulary.code_to_id
    with torch.no_grad():
        masked, open_ = MODEL(ids).logits, MODEL(ids, mask_image_logits=False).logits
    assert (masked[..., code_ids] == torch.finfo(torch.float32).min).all()
    keep = torch.ones(V, dtype=torch.bool).index_fill(0, code_ids, False)
    assert torch.equal(masked[..., keep], open_[..., keep])
    assert keep.sum() == V - K and open_[..., code_ids].abs().max() < 1e3


def test_labels_on_pictures_are_the_pictures_own_ids():
    inputs = batch_with_pictures()
    ids = MODEL.model.replace_image_placeholders(inputs["input_ids"], inputs["pixel_values"])
    with torch.no_grad():
        a = MODEL(**inputs, labels=inputs["input_ids"], mask_image_logits=False)
    real_logits = a.logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(real_logits, ids[:, 1:].flatten())
    torch.testing.assert_close(a.loss, expected)
    with pytest.raises(ValueError, match="mask_image_logits=False"):
        MODEL(**inputs, labels=inputs["input_ids"])


def test_ignored_labels_count_for_nothing():
    ids = text_ids(1, 6)
    labels = ids.clone()
    labels[0, :4] = -100
    with torch.no_grad():
        out = MODEL(ids, labels=labels)
    expected = -out.logits[0, 3:5].log_softmax(-1).gather(1, ids[0, 4:, None]).mean()
    torch.testing.assert_close(out.loss, expected)


def test_training_reaches_every_parameter():
    model = small_model().train()
    inputs = batch_with_pictures()
    model(**inputs, labels=inputs["input_ids"], mask_image_logits=False).loss.backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None and "vqmodel" not in n]
    assert not dead


@pytest.mark.parametrize("arguments, message", [
    (dict(), "exactly one"),
    (dict(input_ids=torch.ones(1, 2).long(), inputs_embeds=torch.ones(1, 2, 64)), "exactly one"),
    (dict(input_ids=torch.ones(1, 2).long(), labels=torch.ones(1, 2).long(), logits_to_keep=1),
     "logits_to_keep"),
    (dict(inputs_embeds=torch.ones(1, 2, 64), pixel_values=torch.ones(1, 3, 32, 32)), "0 <image>"),
])
def test_inputs_that_do_not_fit_together_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MODEL(**arguments)


def test_an_unknown_attention_names_the_known_ones():
    with pytest.raises(ValueError, match="eager, sdpa"):
        set_attention(MODEL, "fast")


# --------------------------------------------------------------------------------------- configs


def test_the_sizes_at_the_top_are_the_published_ones():
    rows = re.findall(r"  (\d+) +(\d+) +(\w+)$", chameleon.__doc__, re.MULTILINE)
    smaller, larger = ({name: int(pair[n]) for *pair, name in rows} for n in (0, 1))

    def parameters(config: ChameleonConfig) -> float:
        with torch.device("meta"):
            model = ChameleonForConditionalGeneration(config, with_vq_decoder=False)
        return sum(p.numel() for n, p in model.named_parameters() if "vqmodel" not in n) / 1e9

    assert len(rows) == 6 and ChameleonConfig(**smaller) == ChameleonConfig()
    assert round(parameters(ChameleonConfig()), 2) == 7.01
    assert round(parameters(ChameleonConfig(**larger, swin_norm=True)), 2) == 34.29


def test_the_released_layout_has_548_tensors():
    with torch.device("meta"):
        model = ChameleonForConditionalGeneration(ChameleonConfig(), with_vq_decoder=False)
    assert len(model.state_dict()) == 548


def test_both_generations_of_config_are_read():
    old = ChameleonConfig.from_dict(dict(
        rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0}, torch_dtype="bfloat16"))
    new = ChameleonConfig.from_dict(dict(
        dtype="bfloat16", image_token_id=8711,
        rope_parameters=dict(rope_type="linear", rope_theta=5e5, factor=2.0)))
    assert old == new and (old.rope_type, old.rope_factor, old.rope_theta) == ("linear", 2.0, 5e5)
    assert ChameleonConfig(rope_parameters=dict(
        rope_type="linear", rope_theta=5e5, factor=2.0)).to_dict() == old.to_dict()
    short = dict(rope_parameters=dict(type="linear", rope_theta=5e5, factor=2.0))
    assert ChameleonConfig.from_dict(short) == old
    again = dict(rope_scaling=dict(type="linear", rope_theta=5e5, factor=2.0))  # transformers 5's
    assert ChameleonConfig.from_dict(again) == old
    plain = ChameleonConfig.from_dict(dict(rope_parameters=dict(rope_type="default")))
    assert plain == ChameleonConfig()
    plain.rope_parameters = dict(rope_type="linear", rope_theta=5e5, factor=2.0)  # set afterwards
    assert plain.to_dict() == old.to_dict()


def test_absent_values_mean_what_the_documentation_says():
    config = ChameleonConfig(num_attention_heads=16, hidden_size=64, num_key_value_heads=None,
                             vq_config=None, vocabulary_map=None)
    assert config.num_key_value_heads == 16
    assert config.vq_config.codes_per_image == 1024


@pytest.mark.parametrize("change, name", [
    (dict(vocab_size=0), "vocab_size"),
    (dict(hidden_size=65), "hidden_size"),
    (dict(num_attention_heads=5), "hidden_size"),
    (dict(hidden_size=60), "hidden_size"),  # heads of 15 have no halves to rotate
    (dict(num_key_value_heads=3), "num_key_value_heads"),
    (dict(hidden_act="sulu"), "hidden_act"),
    (dict(attention_dropout=1.5), "attention_dropout"),
    (dict(rope_scaling=2.0), "rope_scaling"),
    (dict(rope_theta=-1.0), "rope_theta"), (dict(rope_theta=0.0), "rope_theta"),
    (dict(rope_scaling={"type": "yarn", "factor": 2.0}), "rope_scaling"),
    (dict(rope_scaling={"type": "linear"}), "rope_scaling"),
    (dict(rope_scaling={"factor": 2.0}), "rope_scaling type None"),
    (dict(rope_parameters={"rope_theta": "10"}), "rope_theta must be"),
    (dict(rope_parameters={"rope_theta": 5e5}, rope_theta=4e5), "rope_parameters contradict"),
    (dict(rope_parameters={"rope_theta": 5e5}, rope_scaling={"type": "linear", "factor": 2.0}),
     "rope_parameters contradict"),
    (dict(rope_scaling={"type": "dynamic", "factor": 2.0}, num_attention_heads=32), "head_dim"),
    (dict(vocabulary_map={"<image>": 160}), "vocabulary_map"),
    (dict(num_hidden_layers="3"), "num_hidden_layers"),
    (dict(vq_config=dict(base_channels=33)), "base_channels"),
    (dict(vq_config="released"), "vq_config"), (dict(vq_config=torch.ones(2, 2)), "vq_config"),
    (dict(tie_word_embeddings="false"), "tie_word_embeddings must be true or false"),
    (dict(swin_norm=1), "swin_norm"),
    (dict(vocab_size=True), "vocab_size"),
    (dict(vocab_size=2 * 10**19), "vocab_size must be a whole number from 1 to 1000000"),
    (dict(num_hidden_layers=10**5), "num_hidden_layers"),
    (dict(model_parallel_size=10**9), "model_parallel_size"),
    (dict(rope_theta="10"), "rope_theta"),
    (dict(rope_theta=float("inf")), "rope_theta"),
    (dict(rope_theta=10**400), "rope_theta"),
    (dict(rms_norm_eps=float("nan")), "rms_norm_eps"),
    (dict(rope_scaling="linear"), "rope_scaling"),
    (dict(rope_scaling={"type": "linear", "factor": float("inf")}), "rope_scaling"),
    (dict(hidden_act=["silu"]), "hidden_act"),
    (dict(pad_token_id="x"), "pad_token_id"), (dict(bos_token_id=[2]), r"bos_token_id is \[2\]"),
    (dict(pad_token_id=160), "pad_token_id is 160, but ids are whole numbers from 0 to 159"),
    (dict(eos_token_id=[160, 2]), "eos_token_id is 160"),
    (dict(bos_token_id=-1), "bos_token_id"),
    (dict(vocabulary_map={"a": "5"}), "vocabulary_map: a is '5'"),
])
def test_an_impossible_config_names_its_field(change, name):
    with pytest.raises(ValueError, match=name) as error:
        ChameleonConfig(**(SIZES | change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change, name", [
    (dict(rope_parameters={"rope_type": "yarn", "factor": 2.0}), "rope_scaling type 'yarn'"),
    (dict(rope_scaling={"type": "linear"}), "rope_scaling needs a factor"),
    (dict(hidden_act="sulu"), "hidden_act"), (dict(num_attention_heads=7), "hidden_size"),
])
def test_a_field_that_is_set_afterwards_is_checked_before_a_model_is_built(change, name):
    config = ChameleonConfig(**SIZES)
    vars(config).update(change)
    with pytest.raises(ValueError, match=name):
        ChameleonModel(config)


def test_what_a_subclass_makes_of_its_fields_it_makes_once():
    @dataclass
    class Longer(ChameleonConfig):
        def __post_init__(self):
            super().__post_init__()
            self.vocab_size += 8

    model = ChameleonForConditionalGeneration(Longer(**SIZES, vq_config=VQ))
    assert model.lm_head.out_features == model.config.to_dict()["vocab_size"] == V + 8


def test_a_field_that_is_set_afterwards_acts():
    config = ChameleonConfig(**SIZES)
    config.rope_parameters = {"rope_type": "linear", "rope_theta": 50.0, "factor": 8.0}
    config.vq_config = VQ  # a dict
    model = ChameleonModel(config)
    assert (model.config.rope_theta, model.config.rope_factor) == (50.0, 8.0)
    assert model.vqmodel.config.embed_dim == VQ["embed_dim"]


def test_a_config_without_vocabulary_map_builds_and_reads_no_pictures():
    model = small_model(vocabulary_map=None)
    with torch.no_grad():
        model(text_ids(1, 3))
    with pytest.raises(ValueError, match="vocabulary_map"):
        model.get_image_tokens(torch.zeros(1, 3, 32, 32))


def test_a_vocabulary_without_placeholder_says_so():
    names = {name: id for name, id in scrambled_vocabulary().items() if name != "<image>"}
    model = small_model(vocabulary_map=names)
    with pytest.raises(ValueError, match="no <image>"):
        model(text_ids(1, 3), pixel_values=torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("inputs, message", [
    (dict(input_ids=torch.tensor([[0, V]])), f"input_ids hold 0..{V}"),
    (dict(input_ids=torch.tensor([[0, -1]])), "input_ids hold -1"),
    (dict(input_ids=torch.zeros(1, 3, dtype=torch.long),
          labels=torch.zeros(1, 2, dtype=torch.long)), r"labels are \(1, 2\)"),
    (dict(input_ids=torch.zeros(1, 3, dtype=torch.long),
          attention_mask=torch.ones(1, 1, 1, 1, 3)), "attention_mask is"),
])
def test_what_cannot_be_a_batch_is_one_line(inputs, message):
    with pytest.raises(ValueError, match=message):
        small_model()(**inputs)


def test_a_vocabulary_is_never_cut_below_its_pictures():
    model = small_model()
    with pytest.raises(ValueError, match="vocabulary_map: .* ids are whole numbers from 0 to 4"):
        model.resize_token_embeddings(5)
    assert model.config.vocab_size == len(model.lm_head.weight) == V


def test_positions_to_keep_may_be_listed():
    ids = text_ids(2, 9)
    logits = MODEL(ids).logits
    close(MODEL(ids, logits_to_keep=torch.tensor([1, 3])).logits, logits[:, [1, 3]])
    with pytest.raises(ValueError, match="labels need all logits"):
        MODEL(ids, labels=ids, logits_to_keep=torch.tensor([3]))


@pytest.mark.parametrize("positions", [
    torch.arange(7)[None], torch.zeros(2, 1, dtype=torch.long), torch.arange(7), torch.arange(1)])
def test_positions_that_are_not_those_of_the_new_tokens_are_refused(positions):
    """They would be broadcast, and one token would get the logits of seven."""
    ids = torch.tensor([[0, 80, 81, 82, 83, 84, 85]])
    with torch.no_grad():
        cache = MODEL(ids[:, :6]).past_key_values
        with pytest.raises(ValueError, match="one for each new token, none for cached"):
            MODEL(ids[:, 6:], past_key_values=cache, position_ids=positions)
        step = MODEL(ids[:, 6:], past_key_values=cache, position_ids=torch.tensor([[6]])).logits
        torch.testing.assert_close(step, MODEL(ids).logits[:, -1:], atol=1e-4, rtol=1e-4)


def test_compiled_code_refuses_what_would_give_a_wrong_answer():
    model = torch.compile(MODEL, backend="eager", fullgraph=True)
    ids = torch.tensor([[0, 80, *[73] * S, 81]])
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    code = scrambled_vocabulary()[image_token_name(3)]
    for arguments, message in (
        (dict(input_ids=ids), "there are no pixel_values"),
        (dict(input_ids=ids, pixel_values=pixels), "2 pictures are 128 image .* another number"),
        (dict(input_ids=ids[:, :2], labels=torch.tensor([[0, code]])), "labels contain image"),
        (dict(input_ids=ids[:, :2], labels=torch.tensor([[0, 73]])), "labels hold <image>"),
    ):
        with pytest.raises(RuntimeError, match=message), torch.no_grad():
            model(**arguments, use_cache=False)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, pixels[:1], use_cache=False).logits,
                                   MODEL(ids, pixels[:1]).logits)


def test_an_output_can_be_exported(tmp_path):
    ids = torch.tensor([[0, 80, 81, 82]])
    with torch.no_grad():
        program = torch.export.export(MODEL, (ids,), {"use_cache": False})
        torch.export.save(program, tmp_path / "model.pt2")
        exported = torch.export.load(tmp_path / "model.pt2").module()
        output = exported(ids, use_cache=False)
    assert type(output) is type(MODEL(ids))
    torch.testing.assert_close(output.logits, MODEL(ids).logits)


def test_masks_and_pictures_that_do_not_fit_are_refused():
    ids, pixels = text_ids(3, 6), torch.zeros(1, 3, VQ["resolution"], VQ["resolution"])
    for rows in (1, 2):  # as transformers, which lets no single row of a 2-D mask serve all
        with pytest.raises(ValueError, match=rf"is \({rows}, 6\), but there are 3 rows of 6"):
            MODEL(ids, attention_mask=torch.ones(rows, 6))
    MODEL(ids, attention_mask=torch.ones(1, 6, 6))
    with pytest.raises(ValueError, match="this one is"):
        MODEL(ids, attention_mask=torch.full((3, 6, 6), -1e9).triu(1))
    causal = torch.full((1, 1, 6, 6), -1e4).triu(1)
    torch.testing.assert_close(MODEL(ids, attention_mask=causal).logits, MODEL(ids).logits)
    for biased in (causal - 0.5, causal / 20, torch.ones(1, 1, 6, 6).tril()):  # theirs adds
        with pytest.raises(ValueError, match="0 or at most -1000"):
            MODEL(ids, attention_mask=biased)
    with pytest.raises(ValueError, match="but the prompt has 0 <image>"):
        MODEL(ids[:, :1], pixel_values=pixels)


def test_libraries_may_build_an_output_anew_from_its_items():
    output = MODEL(text_ids(1, 4), labels=text_ids(1, 4))
    again = type(output)({name: value for name, value in output.items()})  # as accelerate does
    assert list(again) == list(output) and all(again[name] is output[name] for name in output)
    with pytest.raises(TypeError, match="torchrun"):  # as torch.nn.parallel.gather does
        type(output)(map(torch.stack, [(output.loss, output.loss)]))


def test_one_compiled_graph_serves_all_lengths_and_the_loss():
    model = torch.compile(MODEL, backend="eager", fullgraph=True)
    for T in (9, 5, 7):
        ids = text_ids(2, T)
        close(model(ids, labels=ids).loss, MODEL(ids, labels=ids).loss)
    torch._dynamo.reset()


def test_a_model_without_numbers_computes_shapes():
    with torch.device("meta"):
        model = ChameleonForConditionalGeneration(MODEL.config).to("meta")
    ids, mask = text_ids(2, 5).to("meta"), torch.ones(2, 5, device="meta")
    output = model(ids, attention_mask=mask, labels=ids)
    assert output.logits.shape == (2, 5, V) and output.loss.is_meta
    model.to_empty(device="cpu").load_state_dict(MODEL.state_dict())
    ids, pixels = text_ids(1, 4), torch.rand(1, 3, VQ["resolution"], VQ["resolution"]) * 2 - 1
    close(model.eval()(ids).logits, MODEL(ids).logits)
    assert torch.equal(model.get_image_tokens(pixels), MODEL.get_image_tokens(pixels))


def test_batch_and_length_may_vary_in_what_is_exported():
    B, T = torch.export.Dim("B", min=1, max=64), torch.export.Dim("T", min=2, max=200)
    exported = torch.export.export(
        MODEL, (text_ids(3, 11),), {"use_cache": False},
        dynamic_shapes={"input_ids": {0: B, 1: T}, "use_cache": None}).module()
    with torch.no_grad():
        close(exported(text_ids(5, 7), use_cache=False).logits, MODEL(text_ids(5, 7)).logits)


def test_an_additive_mask_of_two_dimensions_is_refused():
    mask = torch.zeros(2, 5)
    assert MODEL(text_ids(2, 5), attention_mask=mask + 1).logits.isfinite().all()
    mask[0, :2] = -1e9
    with pytest.raises(ValueError, match="an additive attention_mask is"):
        MODEL(text_ids(2, 5), attention_mask=mask)


def test_labels_may_be_of_32_bits():
    ids = text_ids(2, 5)
    assert torch.equal(MODEL(ids, labels=ids.int()).loss, MODEL(ids, labels=ids).loss)


def test_the_loss_of_a_model_in_bf16_is_fp32():
    model, ids = copy.deepcopy(MODEL).bfloat16(), text_ids(2, 9)
    out = model(ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)


def test_the_statistics_of_a_norm_are_fp32_and_its_weights_come_after_the_cast():
    norm = ChameleonRMSNorm(64, 1e-5).bfloat16()
    norm.weight.data.uniform_(0.5, 2)
    x = torch.randn(50, 64).bfloat16()
    x32 = x.float()
    expected = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(norm(x), norm.weight * expected.bfloat16())
