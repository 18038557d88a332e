"""tokenizer.py: equal to the `tokenizers` library; its promises."""

import codecs
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import (
    CORPUS,
    FRAGMENTS,
    NAMES,
    SPACES,
    image_token_names,
    one_line,
    texts,
    write_small_sentencepiece,
    write_synthetic_tokenizer,
)

import tokenizer as tokenizer_module
from tokenizer import (
    ByteLevelBPE,
    SentencePieceTokenizer,
    StreamDecoder,
    VocabularyMap,
    load_tokenizer,
    split_words,
)

ASSIGNED = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]
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


@pytest.fixture(scope="module")
def oracle(bpe_folder):
    from tokenizers import Tokenizer

    oracle = Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    oracle.encode_special_tokens = True  # text stays text
    return oracle


# ------------------------------------------------------------------------- codes <-> names <-> ids


def test_image_token_names_spell_the_code_with_letters():
    known = {0: "IMGIMGAZ", 1: "IMGIMGBZ", 10: "IMGIMGBAZ", 53: "IMGIMGFDZ", 8191: "IMGIMGIBJBZ"}
    assert {code: tokenizer_module.image_token_name(code) for code in known} == known
    assert [tokenizer_module.image_token_name(c) for c in range(300)] == image_token_names(300)


@given(st.integers(0, 10**6))
def test_only_what_names_a_code_is_an_image_token(code):
    name = tokenizer_module.image_token_name(code)
    assert tokenizer_module.IMAGE_TOKEN.fullmatch(name)
    others = (name[:-1], name + "Z", "IMGIMGA" + name[6:], name.lower(), "A" + name)
    assert VocabularyMap({other: n for n, other in enumerate(others)}).num_codes == 0


@given(st.permutations(range(40)), st.integers(0, 9))
@settings(deadline=None)
def test_codes_and_ids_are_a_bijection_whatever_the_order_of_the_names(order, start):
    names = image_token_names(40)
    vocabulary = VocabularyMap({names[code]: start + n for n, code in enumerate(order)} | {"a": 99})
    codes = torch.arange(40).view(2, 4, 5)
    ids = vocabulary.code_to_id[codes]
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
    with pytest.raises(ValueError):
        vocabulary.codes_from_ids(torch.tensor([0]))


def test_the_map_has_real_numbers_even_while_a_model_is_built_on_meta():
    with torch.device("meta"):
        vocabulary = VocabularyMap({"IMGIMGAZ": 9, "IMGIMGBZ": 4})
    assert vocabulary.code_to_id[torch.tensor([1, 0])].tolist() == [4, 9]
    assert vocabulary.codes_from_ids(torch.tensor([4, 9])).tolist() == [1, 0]


def test_a_gap_in_the_codes_and_an_id_that_cannot_be_are_errors():
    with pytest.raises(ValueError, match="IMGIMGBZ"):
        VocabularyMap({"IMGIMGAZ": 4, "IMGIMGCZ": 5})
    for bad in (4, -1, "5", 5.0, None):
        with pytest.raises(ValueError, match="an id of its own|ids are whole numbers"):
            VocabularyMap({"IMGIMGAZ": 4, "IMGIMGBZ": bad})
    with pytest.raises(ValueError, match="an id of its own"):
        VocabularyMap({"<racm3:break>": 5, "<eoss>": 5})


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
    wrong = [s for s, e in zip(samples, encoded) if bpe.text_ids(s) != e.ids]
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
    ids = bpe.text_ids(text)
    assert ids == oracle.encode(text, add_special_tokens=False).ids
    for part in (ids, ids[1:], ids[:-1]):  # may begin or end in the middle of a character
        assert bpe.decode(part, skip_special_tokens=True) == oracle.decode(part)


def test_both_spellings_of_merges_and_both_names_of_the_file_are_read(tmp_path, bpe_folder):
    text = " ".join(CORPUS)
    write_synthetic_tokenizer(tmp_path / "a", list_merges=False)
    write_synthetic_tokenizer(tmp_path / "b" / "tokenizer", meta=True)
    hf, meta = load_tokenizer(tmp_path / "a"), load_tokenizer(tmp_path / "b")
    assert hf.text_ids(text) == meta.text_ids(text) and len(hf.text_ids(text)) < len(text) / 2
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


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(texts, st.sampled_from(["zebra", "zebras", "<sks>", "\u20ac\u20ac"]))))
def test_words_that_were_added_are_tokens_as_in_the_tokenizers_library(bpe_folder, parts):
    from tokenizers import Tokenizer

    oracle = Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    oracle.add_tokens(["zebra", "zebras", "<sks>", "\u20ac\u20ac"])
    oracle.encode_special_tokens = True
    with tempfile.TemporaryDirectory() as folder:
        oracle.save(f"{folder}/tokenizer.json")
        ours = load_tokenizer(folder)
    text = "".join(parts)
    ids = oracle.encode(text, add_special_tokens=False).ids
    assert ours.text_ids(text) == ids and ours.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("rule", ["single_word", "lstrip", "rstrip"])
def test_an_added_word_with_a_rule_is_refused(tmp_path, rule):
    path = write_synthetic_tokenizer(tmp_path)
    data = json.loads(path.read_text())
    word = {"id": 5000, "content": "zebra", "special": False, rule: True}
    path.write_text(json.dumps(data | {"added_tokens": [*data["added_tokens"], word]}))
    one_line(lambda: load_tokenizer(tmp_path), "single_word, lstrip or rstrip")


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
    assert [names[i] for i in tokenizer.text_ids("abc")] == ["a", "bc"]  # rank 0 before rank 1
    assert [names[i] for i in tokenizer.text_ids("aaaaa")] == ["aa", "aaa"]  # leftmost first
    assert [names[i] for i in tokenizer.text_ids("abab")] == ["ab", "ab"]


def test_a_word_of_a_hundred_thousand_letters_is_tokenized_in_seconds(bpe):
    word = "".join(random.Random(0).choices("abcdeéя", k=100_000))
    start = time.perf_counter()
    ids = bpe.text_ids(word)
    assert time.perf_counter() - start < 10 and bpe.decode(ids) == word


def test_the_word_cache_is_bounded(bpe_folder, monkeypatch):
    tokenizer = load_tokenizer(bpe_folder)
    monkeypatch.setattr(ByteLevelBPE, "CACHED_WORDS", 10)
    text = " ".join(CORPUS)
    want = load_tokenizer(bpe_folder).text_ids(text)
    assert tokenizer.text_ids(text) == want and 0 < len(tokenizer._cache) <= 10
    tokenizer.text_ids("a" * 65)
    assert "a" * 65 not in tokenizer._cache


def test_encoding_does_not_depend_on_what_was_encoded_before(bpe, bpe_folder):
    ids = bpe.text_ids("What do you see?")
    ids.append(0)  # the caller's list, not the cache's
    again = load_tokenizer(bpe_folder)
    assert bpe.text_ids("What do you see?") == again.text_ids("What do you see?")


def test_the_layout_of_the_release_is_found(bpe):
    assert (bpe.bos_token_id, bpe.pad_token_id, bpe.eos_token_id, bpe.unk_token_id) == (0, 1, 2, 3)
    assert bpe.sep_token_id == bpe.vocab["<reserved08706>"] != bpe.image_token_id
    assert bpe.vocabulary.num_codes == 64 and bpe.vocab_size == max(bpe.vocab.values()) + 1
    assert bpe.vocab["IMGIMGAZ"] != 4 or bpe.vocab["IMGIMGBZ"] != 5  # permuted in this fixture
    assert {0, 1, 2, 3, bpe.image_token_id, bpe.vocab["<sentinel:3>"]} < bpe.special_ids


VECTORS = {  # the release's ids, as llama.cpp's tests have them
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


def test_published_ids_never_cross_our_words_and_bytes_stand_in_order():
    """Each text as a regular expression: an id of a byte is that byte, any other id is two or more
    bytes, the same in all texts, and a word (they are parted by 0xff) ends only between ids.
    """
    order = sorted(range(256), key=tokenizer_module.byte_characters().__getitem__)  # from id 16384
    known, single = {16384 + i: bytes([b]) for i, b in enumerate(order)}, 0
    for text, ids in VECTORS.items():
        words, new = [word.encode() for word in split_words(text)], set()
        pattern = b""
        for i in ids:
            pattern += (re.escape(known[i]) if i in known else b"(?P=t%d)" % i if i in new
                        else b"(?P<t%d>[^\xff]{2,16})" % i) + b"\xff?"
            new |= {i} - known.keys()
        match = re.fullmatch(pattern, b"\xff".join(words))
        assert match, text
        known |= {int(name[1:]): found for name, found in match.groupdict().items()}
        single += len(words) == len(ids)
    assert len(known) == len(set(known.values())) == 256 + 18
    assert single == 6  # in so many texts each word is one id


@pytest.mark.skipif("CHAMELEON_TOKENIZER" not in os.environ, reason="needs the gated release")
def test_the_releases_own_tokenizer_gives_its_published_ids():
    tokenizer = load_tokenizer(os.environ["CHAMELEON_TOKENIZER"])
    assert {text: tokenizer.text_ids(text) for text in VECTORS} == VECTORS
    assert tokenizer.vocab_size == 65536 and tokenizer.vocabulary.num_codes == 8192
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (0, 1)
    assert (tokenizer.sep_token_id, tokenizer.image_token_id) == (8710, 8711)


# ------------------------------------------------------------------------------------- both formats


@given(data=st.data())
@settings(deadline=None, max_examples=300)
def test_decoding_what_was_encoded_gives_the_text_back(bpe, sentencepiece_tokenizer, data):
    text = data.draw(texts)
    for tokenizer in (bpe, sentencepiece_tokenizer):
        ids = tokenizer.text_ids(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(torch.tensor(ids, dtype=torch.long)) == text


@given(data=st.data())
@settings(deadline=None, max_examples=300)
def test_no_text_becomes_a_control_id(bpe, sentencepiece_tokenizer, data):
    text = data.draw(texts) + data.draw(st.sampled_from(NAMES)) + data.draw(texts)
    for tokenizer in (bpe, sentencepiece_tokenizer):
        assert not tokenizer.special_ids & set(tokenizer.text_ids(text))


def test_a_file_whose_texts_could_become_a_control_id_is_refused(tmp_path):
    """A merge that ends in the name of a code; a mark that sentencepiece finds in texts."""
    path = write_synthetic_tokenizer(tmp_path)
    data = json.loads(path.read_text(encoding="utf-8"))
    data["model"]["vocab"] |= {"IMGIMGB": data["model"]["vocab"]["<unk>"] + 10_000}
    data["model"]["merges"].append(["IMGIMGB", "Z"])
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ValueError, match="a text could become IMGIMGBZ"):
        ByteLevelBPE(path)
    path = write_small_sentencepiece(tmp_path)
    proto, piece = path.read_bytes(), b"\n\x06<eoss>"
    at = proto.index(piece) + len(piece) + 5  # behind the score, 5 bytes: the type, 3 for control
    assert proto[at : at + 2] == b"\x18\x03"
    path.write_bytes(proto[: at + 1] + b"\x04" + proto[at + 2 :])  # 4: user-defined
    with pytest.raises(ValueError, match="a text could become <eoss>"):
        SentencePieceTokenizer(path)


@pytest.mark.parametrize("name", ["<s>", "<pad>", "</s>", "<unk>"])
def test_a_merge_that_ends_in_a_control_token_is_refused(tmp_path, name):
    path = write_synthetic_tokenizer(tmp_path)
    data = json.loads(path.read_text(encoding="utf-8"))
    data["model"]["vocab"] |= {name[:-1]: 10_000}
    data["model"]["merges"].append([name[:-1], ">"])
    path.write_text(json.dumps(data), encoding="utf-8")
    one_line(lambda: ByteLevelBPE(path), f"a text could become {name}")


def test_ids_of_an_array_have_bos_only_if_asked_for(either):
    for bos in (False, True):
        row = either.encode("Hi", add_special_tokens=bos, return_tensors="np")[0].tolist()
        assert row == either.encode("Hi", add_special_tokens=bos) and (row[0] == 0) == bos


def test_an_empty_file_is_no_sentencepiece_model(tmp_path, capfd):
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path)
    assert capfd.readouterr().err == ""


def test_the_names_of_control_tokens_are_special_and_those_of_text_are_not(either):
    special = {name for name, token_id in either.vocab.items() if token_id in either.special_ids}
    assert {"<s>", "<pad>", "</s>", "<unk>", "<eoss>", "<racm3:break>", "<image>"} < special
    assert set(image_token_names(64)) < special
    text_ids = {token_id for text in CORPUS for token_id in either.text_ids(text)}
    assert len(text_ids) > 100 and not text_ids & either.special_ids
    assert either.convert_tokens_to_ids(["<s>", "no such name"]) == [0, either.unk_token_id]


@given(data=st.data(), skip=st.booleans())
@settings(deadline=None, max_examples=300)
def test_streamed_pieces_joined_equal_the_decoded_whole(bpe, sentencepiece_tokenizer, data, skip):
    for tokenizer in (bpe, sentencepiece_tokenizer):
        ids = data.draw(st.lists(st.sampled_from(sorted(tokenizer.vocab.values())), max_size=30))
        whole = b"".join(tokenizer.token_bytes(i) for i in ids
                         if not (skip and i in tokenizer.special_ids)).decode("utf-8", "replace")
        decoder = StreamDecoder(tokenizer, skip)
        assert "".join([decoder.feed(i) for i in ids]) + decoder.flush() == whole
        for kind in (list, torch.tensor, np.array):
            assert tokenizer.decode(kind(ids), skip_special_tokens=skip) == whole


def test_a_character_of_several_ids_is_streamed_when_it_is_whole(either):
    ids = either.text_ids("𝄞")  # in no corpus: four bytes, four ids
    decoder = StreamDecoder(either)
    assert [decoder.feed(i) for i in ids] == ["", "", "", "𝄞"] and decoder.flush() == ""
    decoder = StreamDecoder(either)
    assert [decoder.feed(i) for i in ids[:2]] == ["", ""] and decoder.flush() == "\ufffd"


def test_control_tokens_vanish_or_show_their_names(either):
    ids = [0, *either.text_ids("Hi!"), either.sep_token_id, either.vocab["IMGIMGBZ"], 2]
    assert either.decode(ids, skip_special_tokens=True) == "Hi!"
    assert either.decode(ids) == "<s>Hi!<reserved08706>IMGIMGBZ</s>"
    assert either.batch_decode(torch.tensor([ids, ids]), True) == ["Hi!", "Hi!"]
    assert either.batch_decode([ids, []], skip_special_tokens=True) == ["Hi!", ""]
    for row in (ids, torch.tensor(ids)):  # one text, as in transformers
        assert either.batch_decode(row, skip_special_tokens=True) == ["Hi!"]
    assert either.batch_decode([]) == []
    assert either.decode(torch.tensor(ids)[None][0], True) == "Hi!"


def test_ids_that_do_not_exist_or_have_two_axes_are_errors(either):
    for bad in ([either.vocab_size], [-1]):
        with pytest.raises(ValueError, match="not in the vocabulary"):
            either.decode(bad)
    for rows in (torch.zeros(2, 3, dtype=torch.long), [[0, 1], [2]], [torch.tensor([0, 1])]):
        with pytest.raises(ValueError, match="batch_decode"):
            either.decode(rows)


def test_half_a_surrogate_pair_is_a_one_line_error(either):
    with pytest.raises(ValueError, match="character 3"):
        either.text_ids("ab\ud800")


def test_a_saved_tokenizer_is_the_same_tokenizer(either, tmp_path):
    either.save_pretrained(tmp_path / "new" / "folder")
    again = load_tokenizer(tmp_path / "new" / "folder")
    again.save_pretrained(tmp_path / "new" / "folder")  # onto itself
    assert type(again) is type(either) and again.vocab == either.vocab
    assert again.text_ids(CORPUS[1]) == either.text_ids(CORPUS[1])
    assert again.special_ids == either.special_ids
    again.pad_token, again.padding_side = "</s>", "right"
    again.save_pretrained(tmp_path)
    last = load_tokenizer(tmp_path)
    assert (last.pad_token_id, last.padding_side) == (last.eos_token_id, "right")


def test_the_small_model_has_the_layout_of_the_release(sentencepiece_tokenizer):
    t = sentencepiece_tokenizer
    assert isinstance(t, SentencePieceTokenizer)
    assert (t.bos_token_id, t.pad_token_id, t.eos_token_id, t.unk_token_id) == (0, 1, 2, 3)
    assert t.vocabulary.code_to_id.tolist() == list(range(4, 68))
    assert len(t.text_ids("What do you see in this image?")) < 20


def test_sentencepiece_itself_loses_u_2581_and_the_tokenizer_does_not(sentencepiece_tokenizer):
    t, text = sentencepiece_tokenizer, "a\u2581b \u2581"
    assert t._model.decode(t._model.encode(text)) == "a b  "
    assert t.decode(t.text_ids(text)) == text


def test_without_u_2581_the_ids_are_sentencepieces_own(sentencepiece_tokenizer):
    rng = random.Random(1)
    for text in [random_text(rng).replace("\u2581", "") for _ in range(500)]:
        ids = sentencepiece_tokenizer.text_ids(text)
        assert ids == sentencepiece_tokenizer._model.encode(text)


# ------------------------------------------------------------------------------------- bad folders


def test_a_folder_without_a_tokenizer_is_a_one_line_error(tmp_path):
    one_line(lambda: load_tokenizer(tmp_path / "none"), "none", "no such folder")
    one_line(lambda: load_tokenizer(tmp_path), str(tmp_path), "tokenizer.json")


@pytest.mark.parametrize("content, words", [
    ("", "broken JSON"), ("{", "broken JSON"), ("[1]", "object"), ("[" * 100_000, "broken JSON"),
    ("{}", "model"), ('{"model": {"vocab": {"a": 1}}}', "merges"),
    ('{"model": {"vocab": {"a": "b"}, "merges": []}}', "ValueError"),
    ('{"model": {"vocab": {"a": 1}, "merges": []}}', "byte"),
    ('{"model": {"vocab": [["a", 1]], "merges": []}}', "AttributeError"),
    ('{"model": {"vocab": {"a": 1}, "merges": []}, "added_tokens": [5]}', "TypeError"),
])
def test_a_broken_tokenizer_json_is_a_one_line_error_that_names_it(tmp_path, content, words):
    (tmp_path / "tokenizer.json").write_text(content)
    one_line(lambda: load_tokenizer(tmp_path), "tokenizer.json", words)


def test_a_merge_without_its_token_and_a_file_without_bos_are_errors(tmp_path):
    path = write_synthetic_tokenizer(tmp_path)
    data = json.loads(path.read_text())
    for merge, words in ((["Z", "ZZZZZ"], "ZZZZZ"), ("a b c", "ValueError"), ([1, 2], "KeyError"),
                         (["", "a"], "KeyError")):
        data["model"]["merges"].append(merge)
        path.write_text(json.dumps(data))
        one_line(lambda words=words: load_tokenizer(tmp_path), "tokenizer.json", words)
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


def test_the_incremental_utf8_decoder_replaces_as_the_whole_decoder_does():
    rng = random.Random(2)
    for _ in range(2000):
        tricky = b"A\x80\xbf\xc3\xe2\x82\xac\xf0\x9f\xff\xed\xa0"
        data = bytes(rng.choices(tricky, k=rng.randint(0, 9)))
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        pieces = [decoder.decode(bytes([b])) for b in data] + [decoder.decode(b"", final=True)]
        assert "".join(pieces) == data.decode("utf-8", "replace")


@pytest.mark.parametrize("wrong", [-1, 10**6, 1.5, "a", None, torch.tensor(1.5)])
def test_what_is_no_id_has_no_name_and_no_text(either, wrong):
    for read in (either.convert_ids_to_tokens, either.decode):
        with pytest.raises(ValueError, match="not in the vocabulary"):
            read([wrong])


@pytest.mark.parametrize("name, other", [
    ("truncation_side", "left"), ("add_bos_token", False), ("add_eos_token", True)])
def test_what_cannot_be_changed_is_refused(either, name, other):
    setattr(either, name, getattr(either, name))
    with pytest.raises(ValueError, match=f"{name} is always"):
        setattr(either, name, other)


@pytest.mark.parametrize("wrong", [5, None, b"a", ["a", 5]])
def test_what_is_no_text_is_refused(either, wrong):
    with pytest.raises(ValueError, match="a text must be a string"):
        either(wrong)


def test_tokens_that_a_config_names_are_read(tmp_path):
    write_synthetic_tokenizer(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text('{"eos_token": {"content": "<unk>"}}')  # as transformers 4 writes them
    assert load_tokenizer(tmp_path).eos_token == "<unk>"
    file.write_text('{"pad_token": "none"}')
    one_line(lambda: load_tokenizer(tmp_path), "pad_token 'none' is not in the vocabulary")
