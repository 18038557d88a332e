"""Equality with transformers, part by part, on random weights and every documented configuration.

The oracle is transformers' own Chameleon. Weights are drawn wide (std 0.1 and more) so that no
part is near the identity, where mistakes would hide.
"""

import pytest
import torch
import transformers
from small import SIZES, VQ, V, batch_with_pictures, randomize, scrambled_vocabulary

from chameleon import ChameleonConfig, ChameleonForConditionalGeneration, KVCache
from chameleon_extras.decoding import set_attention
from vqvae import ChameleonVQVAE, ChameleonVQVAEConfig


def pair(vq: dict | None = None, rope: dict | None = None, **changes):
    """The same weights in transformers' model and in ours, both fp32 and in eval mode."""
    values = SIZES | changes | {"vocabulary_map": scrambled_vocabulary()}
    vq_values = VQ | (vq or {})
    hf_values = dict(values)
    if rope:
        hf_values["rope_parameters"] = rope
        values["rope_theta"] = rope["rope_theta"]
        if rope["rope_type"] != "default":
            values["rope_scaling"] = {"type": rope["rope_type"], "factor": rope["factor"]}
    hf_config = transformers.ChameleonConfig(vq_config=vq_values, **hf_values)
    theirs = transformers.ChameleonForConditionalGeneration(hf_config).eval()
    randomize(theirs)
    ours = ChameleonForConditionalGeneration(ChameleonConfig(vq_config=vq_values, **values),
                                             with_vq_decoder=False).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


CONFIGS = {
    "mha": {},
    "gqa": dict(num_key_value_heads=2),
    "mqa": dict(num_key_value_heads=1),
    "swin": dict(swin_norm=True),
    "attention_bias": dict(attention_bias=True),
    "mlp_bias": dict(mlp_bias=True),
    "tied": dict(tie_word_embeddings=True),
    "gelu": dict(hidden_act="gelu"),
    "gelu_new": dict(hidden_act="gelu_new"),
    "eps": dict(rms_norm_eps=1e-2),
    "theta": dict(rope=dict(rope_type="default", rope_theta=500.0)),
    "linear": dict(rope=dict(rope_type="linear", rope_theta=10000.0, factor=3.0)),
    "dynamic": dict(rope=dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0),
                    max_position_embeddings=40),
    "34b": dict(num_key_value_heads=2, swin_norm=True, model_parallel_size=2),
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_states_and_attentions_equal_transformers(name, attention):
    ours, theirs = pair(**CONFIGS[name])
    set_attention(ours, attention)
    theirs.set_attn_implementation("eager")
    inputs = batch_with_pictures()
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        a = ours(**inputs, output_hidden_states=True, output_attentions=attention == "eager")
        b = theirs(**inputs, output_hidden_states=True, output_attentions=True)
    assert len(a.hidden_states) == len(b.hidden_states) == SIZES["num_hidden_layers"] + 1
    torch.testing.assert_close(a.logits[real], b.logits[real], atol=2e-5, rtol=2e-5)
    for x, y in zip(a.hidden_states, b.hidden_states):
        torch.testing.assert_close(x[real], y[real], atol=2e-5, rtol=2e-5)
    for x, y in zip(a.attentions or (), b.attentions):
        x, y = x.transpose(1, 2)[real], y.transpose(1, 2)[real]  # (real queries, H, L)
        torch.testing.assert_close(x, y, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["mha", "34b", "tied", "linear"])
def test_loss_equals_transformers_for_text_labels(name):
    ours, theirs = pair(**CONFIGS[name])
    inputs = batch_with_pictures()
    labels = inputs["input_ids"].clone()
    labels[labels < 74] = -100  # text only: image codes are masked in both
    with torch.no_grad():
        a, b = ours(**inputs, labels=labels).loss, theirs(**inputs, labels=labels).loss
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_plain_model_and_inputs_embeds_and_position_ids_equal_transformers():
    ours, theirs = pair()
    ids = torch.randint(74, V, (2, 11))
    positions = torch.arange(11).flip(0).expand(2, 11) * 3
    with torch.no_grad():
        embeds = theirs.model.embed_tokens(ids)
        a = ours.model(inputs_embeds=embeds, position_ids=positions).last_hidden_state
        b = theirs.model(inputs_embeds=embeds, position_ids=positions).last_hidden_state
    torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)
    packed = torch.tensor([[0, 1, 2, 0, 1, 5, 6, 7, 8, 9, 10], list(range(11))])
    for positions in (packed, packed[:1]):  # documents of 3, 2 and 6 tokens, and one of 11
        with torch.no_grad():
            a, b = (model(ids, position_ids=positions, use_cache=False).logits
                    for model in (ours, theirs))
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


def test_cached_decoding_equals_transformers_full_forward():
    ours, theirs = pair(num_key_value_heads=2)
    inputs = batch_with_pictures()
    cache = KVCache(ours.config, batch_size=2, max_length=inputs["input_ids"].shape[1] + 1)
    more = torch.tensor([[80], [90]])
    full = dict(inputs, input_ids=torch.cat((inputs["input_ids"], more), 1),
                attention_mask=torch.cat((inputs["attention_mask"], torch.ones(2, 1).long()), 1))
    position = torch.full((2, 1), inputs["input_ids"].shape[1])
    with torch.no_grad():
        ours(**inputs, past_key_values=cache)
        a = ours(more, attention_mask=full["attention_mask"], position_ids=position,
                 past_key_values=cache).logits
        b = theirs(**full).logits[:, -1:]
    torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


VQ_CONFIGS = {
    "default": {},
    "attn_resolutions": dict(attn_resolutions=[16, 32]),
    "no attention": dict(attn_type="none"),
    "multipliers": dict(channel_multiplier=[1, 2, 3, 1], num_res_blocks=1),
    "one level": dict(channel_multiplier=[2], resolution=16),
    "codebook": dict(num_embeddings=32, embed_dim=8, latent_channels=8),
}


@pytest.mark.parametrize("name", VQ_CONFIGS)
def test_codes_and_quirk_loss_equal_transformers(name):
    values = VQ | VQ_CONFIGS[name]
    theirs = transformers.ChameleonVQVAE(transformers.ChameleonVQVAEConfig(**values)).eval()
    randomize(theirs)
    ours = ChameleonVQVAE(ChameleonVQVAEConfig(**values, beta_on_codebook=True)).eval()
    absent, unknown = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not unknown and all(key.startswith("decoder.") for key in absent)
    pixels = torch.rand(3, 3, values["resolution"], values["resolution"]) * 2 - 1
    with torch.no_grad():
        expected = theirs.encode(pixels, return_dict=True)
        _, losses = ours(pixels)
    codes = ours.encode(pixels)
    assert codes.unique().numel() > 5  # the weights really tell patches apart
    assert torch.equal(codes.flatten(), expected.image_tokens)
    torch.testing.assert_close(losses.total, expected.embedding_loss, atol=1e-6, rtol=1e-5)


def test_image_tokens_equal_transformers_for_scrambled_names():
    ours, theirs = pair()
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(ours.get_image_tokens(pixels), theirs.get_image_tokens(pixels).long())


@pytest.mark.slow
def test_the_released_width_and_the_released_vqvae_equal_transformers():
    """Two layers of 7B, all 65536 ids, one 512x512 picture: 1024 codes among 8192."""
    from tokenizer import image_token_name

    names = {image_token_name(code): code + 4 for code in range(8192)}
    names |= {"<eoss>": 8196, "<racm3:break>": 8197, "<reserved08706>": 8710, "<image>": 8711}
    config = transformers.ChameleonConfig(num_hidden_layers=2, vocabulary_map=names)
    theirs = transformers.ChameleonForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "embed" in name and "vqmodel" not in name:
                p.normal_()
            elif p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.2)
        theirs.model.vqmodel.quantize.embedding.weight.normal_(std=0.3)
    with torch.device("meta"):
        ours = ChameleonForConditionalGeneration(
            ChameleonConfig(num_hidden_layers=2, vocabulary_map=names), with_vq_decoder=False)
    ours.load_state_dict(theirs.state_dict(), assign=True)  # shares the 2.3 GB
    ours.eval()
    pixels = torch.rand(1, 3, 512, 512) * 2 - 1
    codes = ours.model.vqmodel.encode(pixels)
    with torch.no_grad():
        expected = theirs.model.vqmodel.encode(pixels, return_dict=True).image_tokens
    assert codes.unique().numel() > 20 and torch.equal(codes[0], expected)
    ids = torch.tensor([[0, 20000, 8197, *[8711] * 1024, 8196, 30000, 40000, 8710]])
    with torch.no_grad():
        a = ours(ids, pixel_values=pixels, logits_to_keep=5).logits
        b = theirs(ids, pixel_values=pixels, logits_to_keep=5).logits
    torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)
