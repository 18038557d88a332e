"""processor.py: equal to transformers' processor; what it promises and refuses."""

import json

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from synthetic import CORPUS, one_line, texts, write_synthetic_tokenizer

from processor import ChameleonImageProcessor, ChameleonProcessor
from tokenizer import load_tokenizer

no_pictures = texts.filter(lambda text: text and "<image>" not in text)


def picture(level: int, size: tuple[int, int] = (9, 7)) -> Image.Image:
    return Image.new("RGB", size, (level, level, level))


def levels(pixel_values: torch.Tensor) -> list[int]:
    return [round((p.mean().item() + 1) / 0.0078) for p in pixel_values]


def processor_for(tokenizer, codes: int = 4) -> ChameleonProcessor:
    return ChameleonProcessor(ChameleonImageProcessor(size=8, crop_size=8), tokenizer, codes)


def test_a_prompt_is_bos_text_picture_text_end_of_turn(either):
    processor, t = processor_for(either, codes=3), either
    v = t.vocabulary
    block = [v.begin_image_id, *[v.image_token_id] * 3, v.end_image_id]
    batch = processor("What is<image> this?", picture(9))
    want = [0, *t.text_ids("What is"), *block, *t.text_ids(" this?")]
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
    stack = np.stack([np.asarray(image)] * 2)
    assert len(processor(["<image><image>"], [[stack]]).pixel_values) == 2
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
    assert not bpe.special_ids & set(ids[1:-1])
    assert bpe.decode(ids, skip_special_tokens=True) == text


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
    (dict(text="a<image>"), "1 <image> but 0 picture(s)"),
    (dict(text="a", images=picture(1)), "0 <image> but 1 picture(s)"),
    (dict(text="a<image>", images=[picture(1)] * 2), "1 <image> but 2 picture(s)"),
    (dict(text=["a<image>", "b<image><image>"], images=[picture(1)] * 2, padding=True),
     "text has 1 + 2 <image> but 2"),
    (dict(text=["a<image>", "b<image>"], images=[[picture(1)] * 2, []]), "prompt 1 has 1 <image>"),
    (dict(text=["a<image>", "b<image>"], images=[[picture(1)], None]), "prompt 2 has 1 <image>"),
    (dict(text=["a<image>", "b<image>"], images=[[picture(1)] * 2]), "or None among them, for 2"),
    (dict(text=["a<image>", "b<image>"], images=[[picture(1)], picture(2)]), "one list per prompt"),
    (dict(text="a<image>", images="picture.png"), "No such file"),
    (dict(text="a<image>", images="https://a.b/c.png"), "nothing is fetched"),
    (dict(text=["a", "a longer one"]), "padding=True"),
    (dict(text="a", padding="left"), "padding="),
    (dict(text="a", padding_side="up"), "padding_side"),
    (dict(text="a", max_length=5), "truncation"), (dict(text="a", truncation=True), "max_length"),
    (dict(text="a", truncation=True, max_length=0), "max_length"),
    (dict(text="a", truncation="yes"), "truncation="),
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


def test_turns_have_one_form(bpe):
    processor = processor_for(bpe)
    processor.chat_template = None
    with pytest.raises(ValueError, match="chat_template is always None"):
        processor.chat_template = "{{ messages }}"


@pytest.mark.parametrize("arguments", [(0,), ("64",), (64, ""), (64, None),
                                       (2**16 + 1,)])
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


@pytest.mark.parametrize("mark", ["begin_image_id", "end_image_id"])
def test_a_vocabulary_that_lacks_a_mark_says_so(bpe, monkeypatch, mark):
    monkeypatch.setattr(bpe.vocabulary, mark, None)
    one_line(lambda: processor_for(bpe)("a<image>", picture(1)), "image tokens")


def test_a_saved_processor_is_the_same_processor(either, tmp_path):
    processor = ChameleonProcessor(ChameleonImageProcessor(size=8, crop_size=8), either, 5, "[pic]")
    processor.save_pretrained(tmp_path)
    again = ChameleonProcessor.from_pretrained(tmp_path)
    assert (again.image_seq_length, again.image_token) == (5, "[pic]")
    assert again.image_token_id == either.image_token_id
    want, got = (p("a[pic]<image>", picture(77)) for p in (processor, again))
    assert all(torch.equal(got[name], want[name]) for name in want)
    ids = got.input_ids[0].tolist()
    assert again.decode(ids, True) == "a<image>" == again.batch_decode(got.input_ids, True)[0]
    assert ids.count(either.image_token_id) == 5  # "<image>" is text when another mark is chosen


def test_the_documented_sequence_length_is_1024(bpe, bpe_folder, tmp_path):
    bpe.save_pretrained(tmp_path)
    one_line(lambda: ChameleonProcessor.from_pretrained(tmp_path), "preprocessor_config.json")
    ChameleonImageProcessor().save_pretrained(tmp_path)
    processor = ChameleonProcessor.from_pretrained(tmp_path)
    ids = processor("<image>", picture(1)).input_ids
    assert (ids == bpe.image_token_id).sum() == 1024 and ids.shape == (1, 1 + 1026 + 1)


# --- prompts with answers, to learn from


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_answer_is_labelled_and_its_prompt_and_the_padding_are_not(either, side):
    processor, t = processor_for(either, codes=3), either
    block = processor.picture_ids()
    batch = processor(["Hi", "What is<image> this?"], picture(9), answers=["Hello", "A star."],
                      padding=True, padding_side=side)
    ends = [[*t.text_ids(answer), t.eos_token_id] for answer in ("Hello", "A star.")]
    starts = [[0, *t.text_ids("Hi")], [0, *t.text_ids("What is"), *block, *t.text_ids(" this?")]]
    for n, (start, end) in enumerate(zip(starts, ends)):
        start.append(t.vocabulary.end_of_turn_id)
        here = batch.attention_mask[n].bool()
        assert batch.input_ids[n][here].tolist() == start + end
        assert batch.labels[n][here].tolist() == [-100] * len(start) + end
        assert (batch.labels[n][~here] == -100).all() and len(here) >= here.sum()
    assert batch.labels.shape == batch.input_ids.shape and not batch.attention_mask.all()


def test_pictures_of_answers_come_after_those_of_their_prompts(either):
    processor = processor_for(either, codes=3)
    mark, block = either.image_token_id, processor.picture_ids()
    batch = processor(text=["Draw <image> in blue.", "Draw a star."], images=list(map(picture, (
        1, 2, 3))), answers=["<image>", "Here: <image>"], padding=True)
    assert levels(batch.pixel_values) == [1, 2, 3]
    assert (batch.input_ids == mark).sum(1).tolist() == [6, 3]
    assert (batch.labels == mark).sum(1).tolist() == [3, 3]
    assert batch.labels[0][batch.labels[0] != -100].tolist() == [*block, either.eos_token_id]
    asked = len(processor("Draw a star.").input_ids[0])
    cut = processor("Draw a star.", answers="A long answer", truncation=True, max_length=asked + 2)
    assert cut.labels.shape == cut.input_ids.shape == (1, asked + 2)
    nested = processor("a", answers="b", return_tensors=None)
    assert len(nested["labels"][0]) == len(nested["input_ids"][0])


@pytest.mark.parametrize("answers, images, words", [
    (["a"], None, "2 prompt(s) need as many answers"), (["a", ""], None, "not empty"),
    (["a", 3], None, "each a text"), (["<image>", "a"], None, "text has 1 + 0"),
    (["<image>", "a"], [[], [picture(1)]], "prompt 1 has 1 <image> but 0"),
])
def test_answers_that_do_not_fit_their_prompts_are_named(bpe, answers, images, words):
    one_line(lambda: processor_for(bpe)(["x", "y"], images, answers=answers, padding=True), words)


def test_the_padding_side_is_saved_and_read(tmp_path, bpe):
    processor = processor_for(bpe)
    before, bpe.padding_side = bpe.padding_side, "right"
    try:
        processor.save_pretrained(tmp_path)
        want = processor(["a", "b c d"], padding=True).input_ids
    finally:
        bpe.padding_side = before
    for kind in (ChameleonProcessor, transformers.AutoTokenizer):
        loaded = kind.from_pretrained(tmp_path)
        assert getattr(loaded, "tokenizer", loaded).padding_side == "right"
    again = ChameleonProcessor.from_pretrained(tmp_path)(["a", "b c d"], padding=True).input_ids
    assert again.tolist() == want.tolist()


def test_an_answer_that_truncation_would_cut_off_whole_is_refused(bpe):
    both = dict(text="a b c d e f", answers="yes", truncation=True)
    one_line(lambda: processor_for(bpe)(**both, max_length=3), "leaves nothing of an answer")
    some = both | dict(text=["a", both["text"]], answers=["yes"] * 2, padding=True)
    one_line(lambda: processor_for(bpe)(**some, max_length=4), "leaves nothing of an answer")
    assert (processor_for(bpe)(**both, max_length=99).labels != -100).any()
    for without in (False, "do_not_truncate"):  # padding cuts nothing
        padded = processor_for(bpe)(**both | dict(truncation=without), padding="max_length",
                                    max_length=3)
        assert (padded.labels != -100).any()


def test_a_conversation_without_a_message_and_a_message_without_text_are_named(bpe):
    processor = processor_for(bpe)
    for wrong in ([], [[]], [[{"role": "user", "content": "a"}], []]):
        one_line(lambda wrong=wrong: processor.apply_chat_template(wrong, padding=True),
                 "conversation is")
    for part in ({"type": "text", "text": 3}, {"type": "video", "path": "a.png"}):
        turn = {"role": "user", "content": [part]}
        one_line(lambda turn=turn: processor.apply_chat_template([turn]), "a part of a message is")


def test_options_of_batches_and_of_pictures_pass_the_processor(bpe):
    processor = processor_for(bpe)
    batch = processor(["a", "b c d"], padding=True, pad_to_multiple_of=8,
                      return_attention_mask=False)
    assert batch["input_ids"].shape[1] % 8 == 0 and "attention_mask" not in batch
    picture = np.zeros((3, 9, 7), np.uint8)
    shown = processor("<image>", picture, input_data_format="channels_first",
                      data_format="channels_last")
    assert shown["pixel_values"].shape == (1, 8, 8, 3)
    ids = [bpe.bos_token_id, *bpe.text_ids("Hi"), bpe.eos_token_id]
    assert processor.post_process_image_text_to_text([ids], skip_special_tokens=False) == [
        "<s>Hi</s>"]


def test_an_answer_needs_an_end(bpe, monkeypatch):
    monkeypatch.setattr(bpe, "eos_token_id", None)
    one_line(lambda: processor_for(bpe)("a", answers="b"), "no </s> to end an answer")


def test_options_of_the_hub_reach_every_part_of_a_processor(untrained_folder, monkeypatch):
    given = []
    monkeypatch.setattr("chameleon_extras.files.find_folder", lambda name, weights, **options: (
        given.append(options), untrained_folder)[1])
    processor = ChameleonProcessor.from_pretrained("org/small", revision="a", image_seq_length=3)
    assert processor.image_seq_length == 3 and given[0] == {"revision": "a"}
