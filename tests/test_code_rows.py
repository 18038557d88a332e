"""Rows of the codes computed from the codebook: what depends on what, and what is shipped."""

import torch
from small import K, V, small_model
from torch.nn.utils.parametrize import is_parametrized

from chameleon import ChameleonForConditionalGeneration
from tiny_world.code_rows import LORA, CodeRows, add_code_rows, add_learned, bake, standardize


def with_code_rows() -> ChameleonForConditionalGeneration:
    torch.manual_seed(0)
    model = small_model()
    add_code_rows(model)
    return model


def tables(model: ChameleonForConditionalGeneration) -> list[torch.Tensor]:
    return [model.model.embed_tokens.weight, model.lm_head.weight]


def test_words_keep_their_rows_and_codes_begin_as_rows_of_a_fresh_table():
    before, model = tables(small_model()), with_code_rows()
    codes = model.model.vocabulary.code_to_id
    words = torch.ones(V, dtype=torch.bool).index_fill(0, codes, False)
    for old, new in zip(before, tables(model)):
        assert torch.equal(old[words], new[words])
        assert not torch.isclose(old[codes], new[codes]).any(dim=1).all()
        assert 0.01 < new[codes].std() < 0.04
    assert not torch.equal(*(table[codes] for table in tables(model)))  # a map for each table


def test_codes_with_near_vectors_have_near_rows():
    torch.manual_seed(0)
    ids, codebook = torch.randperm(100)[:K], torch.randn(K, 16)
    codebook[1], codebook[2] = codebook[0], codebook[0] + 0.01 * torch.randn(16)
    rows = CodeRows(ids, codebook, 24)(torch.zeros(100, 24))[ids]  # (K, D)
    distance = torch.cdist(rows, rows)[0]
    assert distance[1] == 0 and distance[2] < 0.05 * distance[3:].min()


def test_codes_out_of_reach_do_not_set_the_measure():
    """The VQ-VAE stage moves duplicates to 100; the others keep their distances."""
    torch.manual_seed(0)
    codebook = torch.randn(K, 16) + 3
    x = standardize(codebook)
    assert 0.7 < x.std() < 1.4 and x.mean().abs() < 0.2
    codebook[:9] = 100.0
    moved = standardize(codebook)
    assert moved.isfinite().all() and moved.abs().max() == 8
    assert 0.6 < (moved[9:].std() / x[9:].std()) < 1.4


def test_gradients_of_codes_go_to_the_map_and_those_of_words_to_the_table():
    model = with_code_rows()
    codes = model.model.vocabulary.code_to_id
    ids = torch.cat((codes[:5], torch.tensor([80, 81])))[None]
    model(ids, mask_image_logits=False).logits.square().mean().backward()
    for table in (model.model.embed_tokens, model.lm_head):
        rows = table.parametrizations.weight
        assert not rows.original.grad[codes].any() and rows.original.grad[80].any()
        assert all(p.grad.any() for p in rows[0].parameters())


def test_plain_tables_say_the_same_and_load_without_the_map(tmp_path):
    model = with_code_rows()
    ids = torch.randint(0, V, (2, 9))
    ids[ids == model.model.vocabulary.image_token_id] = 80  # a placeholder is no id to read
    with torch.no_grad():
        wanted = model(ids, mask_image_logits=False).logits
        assert is_parametrized(model.lm_head)
        bake(model)
        assert not is_parametrized(model.lm_head)
        model.save_pretrained(tmp_path)
        plain = ChameleonForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
        assert torch.equal(plain(ids, mask_image_logits=False).logits, wanted)


def test_rows_that_learn_are_fp32_whatever_the_rest_is_and_lora_reaches_every_matrix():
    model = small_model().bfloat16()
    before = model.lm_head.weight.detach().clone()
    assert add_learned(model, "image-head") is None
    (rows,) = (p for p in model.parameters() if p.requires_grad)
    assert rows.dtype == torch.float32 and torch.equal(model.lm_head.weight, before)
    layer = model.model.layers[0]
    matrices = {name.split(".")[-1] for name, part in layer.named_modules()
                if isinstance(part, torch.nn.Linear)}
    assert matrices == set(LORA["target_modules"])


def test_a_codebook_of_equal_vectors_is_measured_too():
    assert not standardize(torch.ones(9, 4)).any()
