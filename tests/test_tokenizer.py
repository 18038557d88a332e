"""tokenizer.py: equal to the `tokenizers` library and to transformers' processor; its promises."""

import codecs
import json
import os
import random
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from synthetic import (
    CORPUS,
    image_token_names,
    write_small_sentencepiece,
    write_synthetic_tokenizer,
)

import tokenizer as tokenizer_module
from image_processor import ChameleonImageProcessor
from processor import ChameleonProcessor
from tokenizer import (
    ByteLevelBPE,
    SentencePieceTokenizer,
    VocabularyMap,
    load_tokenizer,
    split_words,
)

ASSIGNED = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]
NAMES = ["<s>", "</s>", "<pad>", "<unk>", "IMGIMGABZ", "IMGIMGJZ", "IMGIMGAAAAAZ", "<eoss>",
         "<0x41>", "<racm3:break>", "<reserved08706>", "<image>", "<sentinel:3>", "<sentinel:007>"]
SPACES = [" ", "  ", "   ", "    ", "     ", "\t", "\n", "\r", "\r\n", "\xa0", "\x1c", "\x85"]
FRAGMENTS = NAMES + SPACES
FRAGMENTS += ["\u2003", "'s", "'re", "12", "½", "€", "ſ", "e\u0301", "👩‍👩‍👧", "\u2581", "\0"]


def random_text(rng: random.Random) -> str:
    """Words, all of unicode, names of control tokens, white space of every kind, ascii noise."""
    kinds = [
        lambda: rng.choice(" ".join(CORPUS).split(" ")),
        lambda: rng.choice(FRAGMENTS),
        lambda: rng.choice(SPACES),
        lambda: "".join(rng.choices(ASSIGNED, k=rng.randint(1, 6))),
        lambda: "".join(chr(rng.randint(32, 126)) for _ in range(rng.randint(1, 9))),
    ]
    return "".join(rng.choice(kinds)() for _ in range(rng.randint(1, 8)))


texts = st.lists(
    st.one_of(st.text(max_size=8), st.sampled_from(FRAGMENTS), st.sampled_from(CORPUS)), max_size=6
).map("".join)
no_pictures = texts.filter(lambda text: text and "<image>" not in text)


@pytest.fixture(scope="module")
def oracle(bpe_folder):
    from tokenizers import Tokenizer

    oracle = Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    oracle.encode_special_tokens = True  # text stays text
    return oracle


@pytest.fixture(params=["bpe", "sentencepiece_tokenizer"])
def either(request):
    return request.getfixturevalue(request.param)


def picture(level: int, size: tuple[int, int] = (9, 7)) -> Image.Image:
    return Image.new("RGB", size, (level, level, level))


def levels(pixel_values: torch.Tensor) -> list[int]:
    return [round((p.mean().item() + 1) / 0.0078) for p in pixel_values]


def processor_for(tokenizer, codes: int = 4) -> ChameleonProcessor:
    return ChameleonProcessor(ChameleonImageProcessor(size=8, crop_size=8), tokenizer, codes)


# ------------------------------------------------------------------------- codes <-> names <-> ids


def test_image_token_names_spell_the_code_with_letters():
    known = {0: "IMGIMGAZ", 1: "IMGIMGBZ", 10: "IMGIMGBAZ", 53: "IMGIMGFDZ", 8191: "IMGIMGIBJBZ"}
    assert {code: tokenizer_module.image_token_name(code) for code in known} == known
    assert [tokenizer_module.image_token_name(c) for c in range(300)] == image_token_names(300)


@given(st.integers(0, 10**6))
def test_a_codes_name_leads_back_to_the_code(code):
    name = tokenizer_module.image_token_name(code)
    assert tokenizer_module.image_code_from_name(name) == code
    for other in (name[:-1], name + "Z", "IMGIMGA" + name[6:], name.lower(), "A" + name):
        assert tokenizer_module.image_code_from_name(other) is None


@given(st.permutations(range(40)), st.integers(0, 9))
@settings(deadline=None)
def test_codes_and_ids_are_a_bijection_whatever_the_order_of_the_names(order, start):
    names = image_token_names(40)
    vocabulary = VocabularyMap({names[code]: start + n for n, code in enumerate(order)} | {"a": 99})
    codes = torch.arange(40).view(2, 4, 5)
    ids = vocabulary.ids_from_codes(codes)
    assert ids.shape == codes.shape and vocabulary.num_codes == 40
    assert ids.flatten().tolist() == [start + order.index(code) for code in range(40)]
    assert torch.equal(vocabulary.codes_from_ids(ids), codes)


def test_begin_image_end_image_and_end_of_turn_are_found_by_name():
    names = {"<racm3:break>": 7, "<eoss>": 5, "<reserved08706>": 3, "<reserved08707>": 2}
    found = VocabularyMap(names)
    assert (found.begin_image_id, found.end_image_id, found.end_of_turn_id) == (7, 5, 3)
    assert found.image_token_id == 2  # Meta's name
    assert VocabularyMap({**names, "<image>": 0}).image_token_id == 0  # HF's; id 0 is an id too


@pytest.mark.parametrize("names", [None, {}])
def test_a_vocabulary_without_image_tokens_can_be_built(names):
    vocabulary = VocabularyMap(names)
    assert vocabulary.num_codes == 0 and vocabulary.code_to_id.shape == (0,)
    assert vocabulary.image_token_id is None and vocabulary.end_of_turn_id is None
    assert vocabulary.ids_from_codes(torch.zeros(0, dtype=torch.long)).shape == (0,)
    for call in (vocabulary.ids_from_codes, vocabulary.codes_from_ids):
        with pytest.raises(ValueError):
            call(torch.tensor([0]))


def test_the_map_has_real_numbers_even_while_a_model_is_built_on_meta():
    with torch.device("meta"):
        vocabulary = VocabularyMap({"IMGIMGAZ": 9, "IMGIMGBZ": 4})
    assert vocabulary.ids_from_codes(torch.tensor([1, 0])).tolist() == [4, 9]
    assert vocabulary.codes_from_ids(torch.tensor([4, 9])).tolist() == [1, 0]


def test_a_gap_in_the_codes_and_an_id_that_cannot_be_are_errors():
    with pytest.raises(ValueError, match="IMGIMGBZ"):
        VocabularyMap({"IMGIMGAZ": 4, "IMGIMGCZ": 5})
    for bad in (4, -1, "5", 5.0, None):
        with pytest.raises(ValueError, match="an id each"):
            VocabularyMap({"IMGIMGAZ": 4, "IMGIMGBZ": bad})


@pytest.mark.parametrize("codes", [[-1], [0, 2], [70000]])
def test_a_code_outside_the_codebook_is_an_error(codes):
    with pytest.raises(ValueError, match="0..1"):
        VocabularyMap({"IMGIMGAZ": 4, "IMGIMGBZ": 5}).ids_from_codes(torch.tensor(codes))


@pytest.mark.parametrize("bad", [-(10**9), -1, 0, 3, 6, 7, 10**9])
def test_an_id_that_is_no_code_is_an_error_that_names_it(bad):
    vocabulary = VocabularyMap({"IMGIMGAZ": 4, "IMGIMGBZ": 5, "z": 6})
    with pytest.raises(ValueError, match=str(bad)):
        vocabulary.codes_from_ids(torch.tensor([[4, bad]]))


# ---------------------------------------------------------------------------------- byte-level BPE


def test_twenty_thousand_random_texts_get_the_ids_of_the_tokenizers_library(bpe, oracle):
    rng = random.Random(0)
    samples = [random_text(rng) for _ in range(20_000)]
    encoded = oracle.encode_batch(samples, add_special_tokens=False)
    wrong = [s for s, e in zip(samples, encoded) if bpe.encode(s) != e.ids]
    assert wrong == []


def words_of(oracle, text: str) -> list[str]:
    return [text[start:end] for _, (start, end) in oracle.pre_tokenizer.pre_tokenize_str(text)]


def test_every_unicode_character_is_split_as_by_the_tokenizers_library(oracle):
    # Among letters, among symbols, among white space, after a space: every class shows somewhere.
    samples = [f"a{c}b€{c}€\r{c} {c}{c}" for c in ASSIGNED if ord(c) < 0x20000]
    samples += [f"a{c}b€{c}€" for c in ASSIGNED if ord(c) >= 0x20000][::50]
    wrong = [s for s in samples if list(split_words(s)) != words_of(oracle, s)]
    assert wrong == []


def test_random_texts_are_split_as_by_the_tokenizers_library(oracle):
    rng = random.Random(3)
    samples = [random_text(rng) for _ in range(5000)]
    samples += ["".join(rng.choices(FRAGMENTS, k=8)) for _ in range(5000)]
    wrong = [s for s in samples if list(split_words(s)) != words_of(oracle, s)]
    assert wrong == []


@given(texts)
@settings(deadline=None, max_examples=200)
def test_any_text_decodes_as_the_tokenizers_library_decodes_it(bpe, oracle, text):
    ids = bpe.encode(text)
    assert ids == oracle.encode(text, add_special_tokens=False).ids
    for part in (ids, ids[1:], ids[:-1]):  # may begin or end in the middle of a character
        assert bpe.decode(part) == oracle.decode(part)


def test_both_spellings_of_merges_and_both_names_of_the_file_are_read(tmp_path, bpe_folder):
    text = " ".join(CORPUS)
    write_synthetic_tokenizer(tmp_path / "a", list_merges=False)
    write_synthetic_tokenizer(tmp_path / "b" / "tokenizer", meta=True)
    hf, meta = load_tokenizer(tmp_path / "a"), load_tokenizer(tmp_path / "b")
    assert hf.encode(text) == meta.encode(text) and len(hf.encode(text)) < len(text) / 2
    assert hf.image_token_id == meta.image_token_id == hf.vocab["<image>"]
    assert meta.path.name == "text_tokenizer.json" and "<image>" not in meta.vocab


def test_names_that_only_added_tokens_hold_are_read(tmp_path):
    path = write_synthetic_tokenizer(tmp_path)
    data = json.loads(path.read_text())
    expected = data["model"]["vocab"].pop("<image>")
    data["added_tokens"].append({"id": 5000, "content": "<later>"})
    path.write_text(json.dumps(data))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.image_token_id == expected and tokenizer.vocab_size == 5001
    assert tokenizer.decode([5000], skip_special_tokens=False) == "<later>"
    assert 5000 in tokenizer.special_ids


def test_splits_isolate_numbers_punctuation_image_names_and_double_spaces():
    def words(text):
        return list(split_words(text))

    assert words("Hi there, it's 42!") == ["Hi", " there", ",", " it", "'", "s", " ", "4", "2", "!"]
    assert words("a   b    c\n\td") == ["a", "  ", " b", "    ", "c", "\n", "\t", "d"]
    assert words("xIMGIMGABZy IMGIMGJZ") == ["x", "IMGIMGABZ", "y", " IMGIMGJZ"]
    assert words("½€ ²\r \rx") == ["½", "€", " ", "²", "\r ", "\r", "x"]


def test_merges_go_by_rank_then_leftmost(tmp_path):
    data = json.loads(write_synthetic_tokenizer(tmp_path, num_merges=0).read_text())
    vocab = data["model"]["vocab"]
    for merge in (["b", "c"], ["a", "b"], ["a", "a"], ["aa", "a"], ["ab", "c"]):
        vocab.setdefault("".join(merge), max(vocab.values()) + 1)
        data["model"]["merges"].append(merge)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = load_tokenizer(tmp_path)
    names = {token_id: name for name, token_id in tokenizer.vocab.items()}
    assert [names[i] for i in tokenizer.encode("abc")] == ["a", "bc"]  # rank 0 before rank 1
    assert [names[i] for i in tokenizer.encode("aaaaa")] == ["aa", "aaa"]  # leftmost first
    assert [names[i] for i in tokenizer.encode("abab")] == ["ab", "ab"]


def test_a_word_of_a_hundred_thousand_letters_is_tokenized_in_seconds(bpe):
    word = "".join(random.Random(0).choices("abcdeéя", k=100_000))
    start = time.perf_counter()
    ids = bpe.encode(word)
    assert time.perf_counter() - start < 10 and bpe.decode(ids) == word


def test_the_word_cache_is_bounded(bpe_folder, monkeypatch):
    tokenizer = load_tokenizer(bpe_folder)
    monkeypatch.setattr(ByteLevelBPE, "CACHED_WORDS", 10)
    text = " ".join(CORPUS)
    want = load_tokenizer(bpe_folder).encode(text)
    assert tokenizer.encode(text) == want and 0 < len(tokenizer._cache) <= 10
    tokenizer.encode("a" * 65)
    assert "a" * 65 not in tokenizer._cache


def test_encoding_does_not_depend_on_what_was_encoded_before(bpe, bpe_folder):
    ids = bpe.encode("What do you see?")
    ids.append(0)  # the caller's list, not the cache's
    assert bpe.encode("What do you see?") == load_tokenizer(bpe_folder).encode("What do you see?")


def test_the_layout_of_the_release_is_found(bpe):
    assert (bpe.bos_token_id, bpe.pad_token_id, bpe.eos_token_id, bpe.unk_token_id) == (0, 1, 2, 3)
    assert bpe.sep_token_id == bpe.vocab["<reserved08706>"] != bpe.image_token_id
    assert bpe.vocabulary.num_codes == 64 and bpe.vocab_size == max(bpe.vocab.values()) + 1
    assert bpe.vocab["IMGIMGAZ"] != 4 or bpe.vocab["IMGIMGBZ"] != 5  # permuted in this fixture
    assert {0, 1, 2, 3, bpe.image_token_id, bpe.vocab["<sentinel:3>"]} < bpe.special_ids


GOLDEN = {  # the release's ids, as llama.cpp's tests have them
    "Hello world": [31596, 17394],
    " Hello World!": [34926, 18671, 16384],
    "    Hello\n    Hello": [16696, 31596, 16582, 16696, 31596],
    "\n =": [16582, 16604, 16412],
    "' era": [16390, 22623],
    "ied 4 ½ months": [17245, 16604, 16403, 16604, 33583, 18355],
    "Führer": [16421, 51153],
    "w048 7tuijk dsdfhu": [16470, 16399, 16403, 16407, 16604, 16406, 35764, 38185, 51595, 22592,
                           26639],
    "Cửa Việt": [16418, 19038, 16639, 16448, 24315, 33727, 16467],
}


@pytest.mark.skipif("CHAMELEON_TOKENIZER" not in os.environ, reason="needs the gated release")
def test_the_releases_own_tokenizer_gives_its_published_ids():
    tokenizer = load_tokenizer(os.environ["CHAMELEON_TOKENIZER"])
    assert {text: tokenizer.encode(text) for text in GOLDEN} == GOLDEN
    assert tokenizer.vocab_size == 65536 and tokenizer.vocabulary.num_codes == 8192
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (0, 1)
    assert (tokenizer.sep_token_id, tokenizer.image_token_id) == (8710, 8711)


# ------------------------------------------------------------------------------------- both formats


@given(data=st.data())
@settings(deadline=None, max_examples=300)
def test_decoding_what_was_encoded_gives_the_text_back(bpe, sentencepiece_tokenizer, data):
    text = data.draw(texts)
    for tokenizer in (bpe, sentencepiece_tokenizer):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(torch.tensor(ids, dtype=torch.long)) == text


@given(data=st.data())
@settings(deadline=None, max_examples=300)
def test_no_text_becomes_a_control_id(bpe, sentencepiece_tokenizer, data):
    text = data.draw(texts) + data.draw(st.sampled_from(NAMES)) + data.draw(texts)
    for tokenizer in (bpe, sentencepiece_tokenizer):
        assert not tokenizer.special_ids & set(tokenizer.encode(text))


def test_the_names_of_control_tokens_are_special_and_those_of_text_are_not(either):
    special = {name for name, token_id in either.vocab.items() if token_id in either.special_ids}
    assert {"<s>", "<pad>", "</s>", "<unk>", "<eoss>", "<racm3:break>", "<image>"} < special
    assert set(image_token_names(64)) < special
    text_ids = {token_id for text in CORPUS for token_id in either.encode(text)}
    assert len(text_ids) > 100 and not text_ids & either.special_ids


@given(data=st.data(), skip=st.booleans())
@settings(deadline=None, max_examples=300)
def test_streamed_pieces_joined_equal_the_decoded_whole(bpe, sentencepiece_tokenizer, data, skip):
    for tokenizer in (bpe, sentencepiece_tokenizer):
        ids = data.draw(st.lists(st.sampled_from(sorted(tokenizer.vocab.values())), max_size=30))
        whole = b"".join(tokenizer.token_bytes(i) for i in ids
                         if not (skip and i in tokenizer.special_ids)).decode("utf-8", "replace")
        decoder = tokenizer.stream_decoder(skip_special_tokens=skip)
        assert "".join([decoder.feed(i) for i in ids]) + decoder.flush() == whole
        for kind in (list, torch.tensor, np.array):
            assert tokenizer.decode(kind(ids), skip_special_tokens=skip) == whole


def test_a_character_of_several_ids_is_streamed_when_it_is_whole(either):
    ids = either.encode("𝄞")  # in no corpus: four bytes, four ids
    decoder = either.stream_decoder()
    assert [decoder.feed(i) for i in ids] == ["", "", "", "𝄞"] and decoder.flush() == ""
    decoder = either.stream_decoder()
    assert [decoder.feed(i) for i in ids[:2]] == ["", ""] and decoder.flush() == "\ufffd"


def test_control_tokens_vanish_or_show_their_names(either):
    ids = [0, *either.encode("Hi!"), either.sep_token_id, either.vocab["IMGIMGBZ"], 2]
    assert either.decode(ids) == "Hi!"
    assert either.decode(ids, skip_special_tokens=False) == "<s>Hi!<reserved08706>IMGIMGBZ</s>"
    assert either.batch_decode(torch.tensor([ids, ids])) == ["Hi!", "Hi!"]
    assert either.batch_decode([ids, []]) == ["Hi!", ""]
    assert either.decode(torch.tensor(ids)[None][0]) == "Hi!"


def test_ids_that_do_not_exist_or_have_two_axes_are_errors(either):
    for bad in ([either.vocab_size], [-1]):
        with pytest.raises(ValueError, match="not in the vocabulary"):
            either.decode(bad)
    with pytest.raises(ValueError, match="batch_decode"):
        either.decode(torch.zeros(2, 3, dtype=torch.long))


def test_half_a_surrogate_pair_is_a_one_line_error(either):
    with pytest.raises(ValueError, match="character 3"):
        either.encode("ab\ud800")


def test_a_saved_tokenizer_is_the_same_tokenizer(either, tmp_path):
    either.save_pretrained(tmp_path / "new" / "folder")
    again = load_tokenizer(tmp_path / "new" / "folder")
    again.save_pretrained(tmp_path / "new" / "folder")  # onto itself
    assert type(again) is type(either) and again.vocab == either.vocab
    assert again.encode(CORPUS[1]) == either.encode(CORPUS[1])
    assert again.special_ids == either.special_ids


def test_the_small_model_has_the_layout_of_the_release(sentencepiece_tokenizer):
    t = sentencepiece_tokenizer
    assert isinstance(t, SentencePieceTokenizer)
    assert (t.bos_token_id, t.pad_token_id, t.eos_token_id, t.unk_token_id) == (0, 1, 2, 3)
    assert t.vocabulary.code_to_id.tolist() == list(range(4, 68))
    assert len(t.encode("What do you see in this image?")) < 20


def test_sentencepiece_itself_loses_u_2581_and_the_tokenizer_does_not(sentencepiece_tokenizer):
    t, text = sentencepiece_tokenizer, "a\u2581b \u2581"
    assert t._model.decode(t._model.encode(text)) == "a b  "
    assert t.decode(t.encode(text)) == text


def test_without_u_2581_the_ids_are_sentencepieces_own(sentencepiece_tokenizer):
    rng = random.Random(1)
    for text in [random_text(rng).replace("\u2581", "") for _ in range(500)]:
        assert sentencepiece_tokenizer.encode(text) == sentencepiece_tokenizer._model.encode(text)


# ------------------------------------------------------------------------------------- bad folders


def one_line(call, *words) -> None:
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_a_folder_without_a_tokenizer_is_a_one_line_error(tmp_path):
    one_line(lambda: load_tokenizer(tmp_path / "none"), "none", "no such folder")
    one_line(lambda: load_tokenizer(tmp_path), str(tmp_path), "tokenizer.json")


@pytest.mark.parametrize("content, words", [
    ("", "broken JSON"), ("{", "broken JSON"), ("[1]", "object"), ("[" * 100_000, "broken JSON"),
    ("{}", "model"), ('{"model": {"vocab": {"a": 1}}}', "merges"),
    ('{"model": {"vocab": {"a": "b"}, "merges": []}}', "ValueError"),
    ('{"model": {"vocab": {"a": 1}, "merges": []}}', "byte"),
    ('{"model": {"vocab": [["a", 1]], "merges": []}}', "AttributeError"),
    ('{"model": {"vocab": {"a": 1}, "merges": ["a b c"]}}', "ValueError"),
    ('{"model": {"vocab": {"a": 1}, "merges": [[1, 2]]}}', "KeyError"),
    ('{"model": {"vocab": {"a": 1}, "merges": []}, "added_tokens": [5]}', "TypeError"),
])
def test_a_broken_tokenizer_json_is_a_one_line_error_that_names_it(tmp_path, content, words):
    (tmp_path / "tokenizer.json").write_text(content)
    one_line(lambda: load_tokenizer(tmp_path), "tokenizer.json", words)


def test_a_merge_without_its_token_and_a_file_without_bos_are_errors(tmp_path):
    path = write_synthetic_tokenizer(tmp_path)
    data = json.loads(path.read_text())
    data["model"]["merges"].append(["Z", "ZZZZZ"])
    path.write_text(json.dumps(data))
    one_line(lambda: load_tokenizer(tmp_path), "tokenizer.json", "ZZZZZ")
    data["model"]["merges"].pop()
    del data["model"]["vocab"]["<s>"], data["added_tokens"][0]
    path.write_text(json.dumps(data))
    one_line(lambda: load_tokenizer(tmp_path), "tokenizer.json", "<s>")


def test_a_broken_tokenizer_model_is_a_one_line_error_that_names_it(tmp_path):
    path = write_small_sentencepiece(tmp_path)
    content = path.read_bytes()
    for end in (0, 10, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:end])
        one_line(lambda: load_tokenizer(tmp_path), "tokenizer.model")
    path.write_text("a text file")
    one_line(lambda: load_tokenizer(tmp_path), "tokenizer.model")


def test_a_sentencepiece_model_that_changes_the_text_is_refused(tmp_path):
    import sentencepiece

    with open(tmp_path / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS * 20), model_writer=file, vocab_size=500, pad_id=3,
            byte_fallback=True, hard_vocab_limit=False, minloglevel=2)
    one_line(lambda: load_tokenizer(tmp_path), "tokenizer.model", "dummy prefix")


def test_importing_the_tokenizer_imports_nothing_heavy():
    code = ("import sys, tokenizer; heavy = {'sentencepiece', 'transformers', 'tokenizers'}; "
            "sys.exit(', '.join(heavy & set(sys.modules)) or 0)")
    root = Path(tokenizer_module.__file__).parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


# --------------------------------------------------------------------------------------- processor


def test_a_prompt_is_bos_text_picture_text_end_of_turn(either):
    processor, t = processor_for(either, codes=3), either
    v = t.vocabulary
    block = [v.begin_image_id, *[v.image_token_id] * 3, v.end_image_id]
    batch = processor("What is<image> this?", picture(9))
    want = [0, *t.encode("What is"), *block, *t.encode(" this?")]
    assert batch.input_ids.tolist() == [[*want, v.end_of_turn_id]]
    assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.int64
    assert batch.attention_mask.tolist() == [[1] * (len(want) + 1)]
    assert batch.pixel_values.shape == (1, 3, 8, 8)
    batch = processor("What is<image> this?", picture(9), return_for_text_completion=True)
    assert batch.input_ids.tolist() == [want]
    assert processor("<image><image>", [picture(1)] * 2).input_ids.tolist() == [
        [0, *block, *block, v.end_of_turn_id]]
    assert "pixel_values" not in processor("no picture")


@pytest.fixture(scope="module")
def their_processor(bpe_folder):
    from transformers import PreTrainedTokenizerFast
    from transformers.models.chameleon.image_processing_pil_chameleon import (
        ChameleonImageProcessorPil,
    )
    from transformers.models.chameleon.processing_chameleon import ChameleonProcessor as Theirs

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(bpe_folder / "tokenizer.json"), padding_side="left", bos_token="<s>",
        eos_token="</s>", pad_token="<pad>", unk_token="<unk>", sep_token="<reserved08706>",
        additional_special_tokens=["<image>"])
    small = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    # Their ProcessorMixin insists on the torchvision class; the PIL one is equal to the documents.
    Theirs.check_argument_for_proper_class = lambda self, name, argument: None
    return Theirs(ChameleonImageProcessorPil(**small), tokenizer, image_seq_length=4)


@pytest.mark.parametrize("completion", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_equal_transformers_processor(bpe, their_processor, completion, side):
    prompts = ["What do you see?<image>", "a<image>b <image> ", "  no picture\n", "<image>"]
    prompts.append(CORPUS[3])
    pictures = [picture(level, size) for level, size in ((5, (9, 7)), (60, (20, 8)), (99, (8, 30)),
                                                         (200, (8, 8)))]
    their_processor.tokenizer.padding_side = side
    want = their_processor(images=pictures, text=prompts, padding=True, return_tensors="pt",
                           return_for_text_completion=completion)
    got = processor_for(bpe)(images=pictures, text=prompts, padding=True, padding_side=side,
                             return_for_text_completion=completion)
    assert set(got) == set(want) - {"token_type_ids"}
    for name in got:
        assert torch.equal(got[name], want[name]), name
    assert 0 < got.attention_mask.float().mean() < 1


def test_text_and_images_are_told_apart_in_either_order(bpe):
    processor = processor_for(bpe)
    image, prompt = picture(50), "Look<image>"
    want = processor(text=prompt, images=image)
    for batch in (processor(prompt, image), processor(image, prompt), processor(image, text=prompt),
                  processor(prompt, images=image), processor([image], [prompt]),
                  processor([prompt], [[image]]), processor(np.asarray(image), prompt),
                  processor(torch.from_numpy(np.array(image)), prompt)):
        assert all(torch.equal(batch[name], want[name]) for name in want)
    assert processor("only text", None).keys() == processor(None, "only text").keys()
    for call in (lambda: processor(prompt, prompt, image), lambda: processor(image, image, prompt)):
        with pytest.raises((TypeError, ValueError)):
            call()


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_pictures_and_places_match_in_order_flat_and_nested(bpe, data):
    counts = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
    shades = data.draw(st.lists(st.integers(0, 255), min_size=sum(counts), max_size=sum(counts)))
    prompts = ["x" + "<image> and" * count for count in counts]
    pictures = [picture(shade) for shade in shades]
    starts = [sum(counts[:n]) for n in range(len(counts))]
    nested = [pictures[start : start + count] for start, count in zip(starts, counts)]
    processor = processor_for(bpe, codes=2)
    flat = processor(prompts, pictures or None, padding=True)
    groups = processor(prompts, nested, padding="longest")
    assert torch.equal(flat.input_ids, groups.input_ids)
    places = (flat.input_ids == bpe.image_token_id).sum(dim=1)
    assert places.tolist() == [2 * count for count in counts]
    if pictures:
        assert levels(flat.pixel_values) == levels(groups.pixel_values) == shades
        assert flat.pixel_values.shape == (len(shades), 3, 8, 8)
    else:
        assert "pixel_values" not in flat and "pixel_values" not in groups


@given(st.lists(no_pictures, min_size=1, max_size=4), st.sampled_from(["left", "right"]))
@settings(deadline=None, max_examples=100)
def test_a_padded_row_without_its_padding_is_the_single_row(bpe, prompts, side):
    processor = processor_for(bpe)
    batch = processor(prompts, padding=True, padding_side=side)
    for prompt, ids, mask in zip(prompts, batch.input_ids, batch.attention_mask):
        assert ids[mask == 1].tolist() == processor(prompt).input_ids[0].tolist()
        assert (ids[mask == 0] == bpe.pad_token_id).all()
        real = mask.nonzero().flatten()
        assert mask[-1 if side == "left" else 0] == 1 and len(real) == real[-1] - real[0] + 1


@given(no_pictures)
@settings(deadline=None)
def test_a_prompt_holds_bos_once_in_front_and_no_other_control_id_before_the_end(bpe, text):
    ids = processor_for(bpe)(text).input_ids[0].tolist()
    assert ids[0] == bpe.bos_token_id == 0 and ids[-1] == bpe.sep_token_id
    assert not bpe.special_ids & set(ids[1:-1]) and bpe.decode(ids) == text


def test_padding_side_is_left_unless_the_tokenizer_or_the_call_says_right(bpe_folder):
    tokenizer = load_tokenizer(bpe_folder)
    processor = processor_for(tokenizer)
    prompts = ["a", "a longer prompt"]
    assert processor(prompts, padding=True).attention_mask[0, 0] == 0
    assert processor(prompts, padding=True, padding_side="right").attention_mask[0, -1] == 0
    tokenizer.padding_side = "right"
    assert processor(prompts, padding=True).attention_mask[0, -1] == 0


def test_max_length_pads_and_truncation_cuts_text_but_no_picture(bpe):
    processor = processor_for(bpe, codes=4)
    whole = processor("one two three").input_ids[0].tolist()
    padded = processor("one two three", padding="max_length", max_length=20)
    assert padded.input_ids.shape == (1, 20)
    assert padded.input_ids[0, -len(whole) :].tolist() == whole
    cut = processor(["one two three", "a"], padding=True, truncation=True, max_length=4)
    assert cut.input_ids[0].tolist() == whole[:4] and cut.input_ids.shape == (2, 4)
    text = "<image>one two three four"
    kept = processor(text, picture(1), truncation=True, max_length=9).input_ids
    assert kept.shape == (1, 9) and (kept == bpe.image_token_id).sum() == 4
    for max_length in (1, 2, 5, 6):
        one_line(lambda n=max_length: processor(text, picture(1), truncation=True, max_length=n),
                 "max_length", "picture")
    assert processor(text, picture(1), truncation=True, max_length=7).input_ids.shape == (1, 7)


@pytest.mark.parametrize("kind", ["pt", "np", None])
def test_return_tensors_chooses_tensors_arrays_or_lists(bpe, kind):
    inputs = dict(text=["a<image>", "longer text"], images=picture(3), padding=True)
    batch = processor_for(bpe)(**inputs, return_tensors=kind)
    types = {"pt": torch.Tensor, "np": np.ndarray, None: list}
    assert {type(value) for value in batch.values()} == {types[kind]}
    want = processor_for(bpe)(**inputs)
    for name in want:
        assert np.array_equal(np.asarray(batch[name]), want[name].numpy())


def test_image_options_reach_the_image_processor(bpe):
    batch = processor_for(bpe)("a<image>", picture(100), do_normalize=False, crop_size=6)
    assert batch.pixel_values.shape == (1, 3, 6, 6)
    assert batch.pixel_values.mean().item() == pytest.approx(100 * 0.0078)


@pytest.mark.parametrize("inputs, words", [
    (dict(text=""), "prompt 1 is empty"),
    (dict(text=["a", ""]), "prompt 2 is empty"),
    (dict(text=[]), "prompt is missing"),
    (dict(), "prompt is missing"),
    (dict(text=[["a"]]), "prompt is missing"),
    (dict(images=picture(1)), "prompt is missing"),
    (dict(text="a<image>"), "0 picture(s) for 1 <image>"),
    (dict(text="a", images=picture(1)), "1 picture(s) for 0 <image>"),
    (dict(text="a<image>", images=[picture(1)] * 2), "2 picture(s) for 1 <image>"),
    (dict(text=["a<image>", "b<image><image>"], images=[picture(1)] * 2, padding=True),
     "prompt 1 has 1, prompt 2 has 2"),
    (dict(text=["a<image>", "b<image>"], images=[[picture(1)] * 2, []]), "prompt 1 has 1 <image>"),
    (dict(text=["a<image>", "b<image>"], images=[[picture(1)], None]), "prompt 2 has 1 <image>"),
    (dict(text=["a<image>", "b<image>"], images=[[picture(1)] * 2]), "1 lists of pictures for 2"),
    (dict(text="a<image>", images="picture.png"), "load_image"),
    (dict(text=["a", "a longer one"]), "padding=True"),
    (dict(text="a", padding="left"), "padding="),
    (dict(text="a", padding_side="up"), "padding_side"),
    (dict(text="a", max_length=5), "truncation"), (dict(text="a", truncation=True), "max_length"),
    (dict(text="a", truncation=True, max_length=0), "max_length"),
    (dict(text="a", truncation="yes", max_length=9), "truncation"),
    (dict(text="a", padding="max_length"), "max_length"),
    (dict(text="a", return_tensors="tf"), "return_tensors"),
    (dict(text="ab\udcff"), "not valid unicode"),
])
def test_bad_input_is_a_one_line_error_that_says_what_is_wrong(bpe, inputs, words):
    one_line(lambda: processor_for(bpe)(**inputs), words)


def test_an_unknown_keyword_is_named_with_and_without_pictures(bpe):
    for inputs in (dict(text="a"), dict(text="a<image>", images=picture(1))):
        with pytest.raises(TypeError, match="paddding"):
            processor_for(bpe)(**inputs, paddding=True)


@pytest.mark.parametrize("arguments", [(0,), ("64",), (64, ""), (64, None)])
def test_an_impossible_processor_cannot_be_built(bpe, arguments):
    one_line(lambda: ChameleonProcessor(ChameleonImageProcessor(), bpe, *arguments), "image_")


def test_a_vocabulary_without_image_tokens_or_end_of_turn_says_so(tmp_path):
    path = write_synthetic_tokenizer(tmp_path, num_codes=0, num_reserved=0)
    data = json.loads(path.read_text())
    for name in ("<eoss>", "<racm3:break>"):
        del data["model"]["vocab"][name]
    vocab = data["model"]["vocab"]
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] in vocab]
    path.write_text(json.dumps(data))
    processor = processor_for(load_tokenizer(tmp_path))
    one_line(lambda: processor("a"), "return_for_text_completion")
    completion = dict(return_for_text_completion=True)
    one_line(lambda: processor("a<image>", picture(1), **completion), "image tokens")
    assert processor("a", **completion).input_ids.shape == (1, 2)


def test_a_saved_processor_is_the_same_processor(either, tmp_path):
    processor = ChameleonProcessor(ChameleonImageProcessor(size=8, crop_size=8), either, 5, "[pic]")
    processor.save_pretrained(tmp_path)
    again = ChameleonProcessor.from_pretrained(tmp_path)
    assert (again.image_seq_length, again.image_token) == (5, "[pic]")
    want, got = (p("a[pic]<image>", picture(77)) for p in (processor, again))
    assert all(torch.equal(got[name], want[name]) for name in want)
    ids = got.input_ids[0].tolist()
    assert again.decode(ids) == "a<image>" == again.batch_decode(got.input_ids)[0]
    assert ids.count(either.image_token_id) == 5  # "<image>" is text when another mark is chosen


def test_the_documented_sequence_length_is_1024(bpe, bpe_folder, tmp_path):
    bpe.save_pretrained(tmp_path)
    one_line(lambda: ChameleonProcessor.from_pretrained(tmp_path), "preprocessor_config.json")
    ChameleonImageProcessor().save_pretrained(tmp_path)
    processor = ChameleonProcessor.from_pretrained(tmp_path)
    ids = processor("<image>", picture(1)).input_ids
    assert (ids == bpe.image_token_id).sum() == 1024 and ids.shape == (1, 1 + 1026 + 1)


def test_the_incremental_utf8_decoder_replaces_as_the_whole_decoder_does():
    rng = random.Random(2)
    for _ in range(2000):
        tricky = b"A\x80\xbf\xc3\xe2\x82\xac\xf0\x9f\xff\xed\xa0"
        data = bytes(rng.choices(tricky, k=rng.randint(0, 9)))
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        pieces = [decoder.decode(bytes([b])) for b in data] + [decoder.decode(b"", final=True)]
        assert "".join(pieces) == data.decode("utf-8", "replace")
