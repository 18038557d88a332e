"""The shipped checkpoint: transformers agrees with it, and the documentation's examples run on it
with the import swapped, `model.generate(**inputs, ...)` being `generate(model, **inputs, ...)`.
How well it answers is in test_train.py."""

from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

from chameleon import ChameleonConfig, ChameleonForConditionalGeneration, ChameleonModel
from generate import generate
from processor import ChameleonProcessor
from tiny_world.vqvae_stage import VQ
from train import SIZES

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tiny"
PICTURES = [Image.open(path) for path in sorted((ROOT / "examples").glob("*.png"))[:3]]

DOCUMENTED = {  # prompts of the documentation, with their number of pictures
    "one picture": ("What do you see in this image?<image>", 1),
    "a batch of several": (["What do these images have in common?<image><image>",
                            "<image>What is shown in this image?"], 3),
    "the constellations": (
        "I used to know a lot about constellations when I was younger, but as I grew older, I "
        "forgot most of what I knew. These are the only two constellations that I really remember "
        "now.<image><image>I would like for you to tell me about 3 more constellations and give "
        "me a little bit of history about the constellation.", 2),
}


@pytest.fixture(scope="module")
def theirs():
    load = transformers.ChameleonForConditionalGeneration.from_pretrained
    return load(TINY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ours():
    return ChameleonForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_transformers_gives_the_same_logits_and_greedy_ids(ours, theirs, name):
    text, n = DOCUMENTED[name]
    processor = ChameleonProcessor.from_pretrained(TINY)
    inputs = processor(images=PICTURES[:n], text=text, padding=True, return_tensors="pt")
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        a, b = ours(**inputs).logits[real], theirs(**inputs).logits[real]
    torch.testing.assert_close(a, b, atol=5e-5, rtol=1e-4)
    vocabulary = processor.tokenizer.vocabulary
    marks = [vocabulary.begin_image_id, vocabulary.end_image_id, vocabulary.image_token_id]
    expected = theirs.generate(
        **inputs, max_new_tokens=20, do_sample=False, suppress_tokens=marks,
        eos_token_id=[2, vocabulary.end_of_turn_id], pad_token_id=1)
    assert torch.equal(generate(ours, **inputs, max_new_tokens=20, do_sample=False), expected)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_documentations_examples_run_with_the_import_swapped(name):
    text, n = DOCUMENTED[name]
    processor = ChameleonProcessor.from_pretrained(TINY)
    model = ChameleonForConditionalGeneration.from_pretrained(
        TINY, dtype=torch.bfloat16, device_map="cpu")
    inputs = processor(images=PICTURES[:n], text=text, padding=True, return_tensors="pt").to(
        model.device, dtype=torch.bfloat16)
    ids = generate(model, **inputs, max_new_tokens=50)
    answers = processor.batch_decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    prompts = [text] if isinstance(text, str) else text
    assert len(answers) == len(prompts)
    for answer, prompt in zip(answers, prompts):
        assert answer.startswith(prompt.replace("<image>", "")) and len(answer) > len(prompt) - 14


def test_a_plain_model_gives_hidden_states():
    model = ChameleonModel.from_pretrained(TINY)
    inputs = ChameleonProcessor.from_pretrained(TINY)(text="Hello", return_tensors="pt")
    with torch.no_grad():
        state = model(**inputs).last_hidden_state
    assert state.shape == (*inputs["input_ids"].shape, model.config.hidden_size)


def test_a_config_makes_a_model():
    with torch.device("meta"):  # the documentation's example allocates 28 GB
        model = ChameleonModel(ChameleonConfig())
    assert model.config.hidden_size == 4096


def test_the_checkpoint_is_small_and_has_the_sizes_of_its_training():
    assert sum(f.stat().st_size for f in TINY.iterdir()) <= 12 * 10**6
    config = ChameleonForConditionalGeneration.from_pretrained(TINY).config
    assert {name: getattr(config, name) for name in SIZES} == SIZES and config.vq_config == VQ
