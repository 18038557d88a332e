"""A damaged checkpoint folder gives the right answer or one clear line, soon and in little memory.

Each example changes one value in one file of a valid folder, or one number of the weights.
"""

import json
import math
import shutil
import struct
import sys
import time

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small import K
from synthetic import write_synthetic_tokenizer

import generate
from chameleon import ChameleonConfig, ChameleonForConditionalGeneration, ChameleonProcessor
from chameleon_extras.files import load_pickle
from processor import ChameleonImageProcessor
from tokenizer import load_tokenizer

resource = pytest.importorskip("resource")  # not on Windows
SECONDS, BYTES = 10, 2 * 10**9
CONFIG, PICTURES, PROMPTS = "config.json", "preprocessor_config.json", "processor_config.json"
# Sensible values of these fields give other answers, and no file says which were meant.
FREE = {"rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "hidden_act", "swin_norm",
        "tie_word_embeddings", "eos_token_id", "attn_resolutions", "attn_type", "image_token",
        "vocabulary_map", *ChameleonImageProcessor().to_dict()}
FIRST = {CONFIG: ("return_dict",), PICTURES: ("do_resize",), PROMPTS: ("image_token",)}
DROPPED = object()
VALUES = st.one_of(
    st.just(DROPPED), st.none(), st.booleans(), st.integers(-2, 3),
    st.sampled_from([10**5, 10**6, 10**9, 2 * 10**19, 10**400, -(10**9), 0.5, 1e-300, 1e300,
                     math.nan, math.inf, -math.inf, "", "x", "10", "false", "no", [], [1], ["x"],
                     [math.nan] * 3, {}, {"type": "linear"}, {"height": 10**6, "width": 10**6}]))
FEW = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def picture(untrained_folder, tmp_path_factory):
    from PIL import Image

    path = tmp_path_factory.mktemp("picture") / "red.png"
    Image.linear_gradient("L").convert("RGB").save(path)
    return path


@pytest.fixture(scope="module")
def ask(untrained_folder, picture, tmp_path_factory):
    """(files to replace, mode) -> exit code, and the answer or the error message."""
    root = tmp_path_factory.mktemp("changed")

    def command(files: dict[str, bytes], capsys, *arguments: str) -> tuple[int, str]:
        folder = root / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(untrained_folder, folder)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        words = arguments or ("--prompt", "What?<image>", "--image", str(picture),
                              "--max-new-tokens", "3")
        code = generate.main(["--model", str(folder), "--device", "cpu", *words])
        out, err = capsys.readouterr()
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        grown *= 1 if sys.platform == "darwin" else 1024
        assert time.monotonic() - start < SECONDS and grown < BYTES
        if code:
            assert code == 2 and out == "" and err.count("\n") == 1 and len(err) < 1500, err
            assert err.startswith("generate.py: ")
        return code, err if code else out

    return command


def paths_of(values: dict, above: tuple = ()) -> list[tuple]:
    """Every place of a JSON object; of the vocabulary only some."""
    found = []
    for name in list(values)[:: 37 if above[-1:] == ("vocabulary_map",) else 1]:
        found.append((*above, name))
        if isinstance(values[name], dict):
            found += paths_of(values[name], (*above, name))
    return found


def changed(values: dict, path: tuple, value: object) -> dict:
    values = json.loads(json.dumps(values))
    inner = values
    for name in path[:-1]:
        inner = inner[name]
    if value is DROPPED:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return values


@pytest.mark.parametrize("file, examples", [(CONFIG, 120), (PICTURES, 60), (PROMPTS, 20)])
def test_a_changed_value_gives_the_answer_or_one_line(untrained_folder, ask, capsys, file,
                                                      examples):
    values = json.loads((untrained_folder / file).read_text())
    code, answer = ask({}, capsys)
    assert code == 0

    @settings(max_examples=examples, **FEW)
    @given(path=st.sampled_from(paths_of(values)), value=VALUES)
    @example(path=FIRST[file], value=False)
    def check(path, value):
        text = json.dumps(changed(values, path, value))
        code, said = ask({file: text.encode()}, capsys)
        assert code == 2 or said == answer or FREE & set(path), (path, value)

    check()


def header_of(content: bytes) -> tuple[dict, bytes]:
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_header(header: dict, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@settings(max_examples=60, **FEW)
@given(data=st.data())
def test_a_changed_header_of_the_weights_is_one_line(untrained_folder, ask, capsys, data):
    header, numbers = header_of((untrained_folder / "model.safetensors").read_bytes())
    name = data.draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))
    key = data.draw(st.sampled_from(["shape", "dtype", "data_offsets"]))
    value = data.draw(st.one_of(VALUES, st.sampled_from([[10**9, 10**9], [0], [2**63, 2], "I32"])))
    path = (name, key) if data.draw(st.booleans()) else (name,)
    content = with_header(changed(header, path, value), numbers)
    assert ask({"model.safetensors": content}, capsys)[0] == 2


@settings(max_examples=25, **FEW)
@given(data=st.data())
def test_a_number_that_is_none_never_becomes_an_answer(untrained_folder, data):
    """One weight is nan or inf: then nothing that depends on it is said or drawn."""
    model = ChameleonForConditionalGeneration.from_pretrained(untrained_folder)
    inputs = ChameleonProcessor.from_pretrained(untrained_folder)(
        "What?<image>", torch.full((3, 16, 16), 7, dtype=torch.uint8))
    name, weight = data.draw(st.sampled_from(sorted(model.named_parameters())))
    place = data.draw(st.integers(0, weight.numel() - 1))

    def all_of_it() -> list:
        ids = generate.generate(model, **inputs, mode="image")
        return [*ids[0].tolist(), generate.decode_pictures(model, ids[:, -17:-1])[0].tobytes()]

    before = all_of_it()
    with torch.no_grad():
        weight.view(-1)[place] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    try:
        after = all_of_it()
    except ValueError as error:
        assert "inf or nan" in str(error) and "\n" not in str(error)
    else:
        assert after == before or "embed_tokens" in name


@pytest.mark.parametrize("pixels, message", [
    (torch.full((1, 3, 16, 16), math.nan), "inf or nan"),
    (torch.full((1, 3, 16, 16), math.inf), "inf or nan"),
    (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "pixel_values are torch.uint8"),
])
def test_pixels_that_are_none_are_refused(untrained_folder, pixels, message):
    model = ChameleonForConditionalGeneration.from_pretrained(untrained_folder)
    with pytest.raises(ValueError, match=message):
        model.get_image_tokens(pixels)


@pytest.mark.parametrize("ids, options, message", [
    ([0, 10**6], {}, "input_ids hold"), ([0, -1, 5], {}, "input_ids hold -1"),
    ([0, 5.5], {}, "must be int64"), ([0, 5], dict(pad_token_id=10**9), "pad_token_id is"),
    ([0, 5], dict(pad_token_id="x"), "pad_token_id is 'x'"),
    ([0, 5], dict(attention_mask=torch.ones(1, 3)), r"attention_mask must be .* got \(1, 3\)"),
    ([0, 5], dict(max_length="9"), "max_length must be .* got '9'"),
    ([0, 5], dict(max_length=2), "max_length must be a whole number above 2"),
    ([], {}, "must be int64"),
])
def test_ids_outside_the_model_are_refused(untrained_folder, ids, options, message):
    model = ChameleonForConditionalGeneration.from_pretrained(untrained_folder)
    with pytest.raises(ValueError, match=message):
        generate.generate(model, torch.tensor([ids]), **options)


@settings(max_examples=150, **FEW)
@given(data=st.data())
def test_a_changed_tokenizer_json_encodes_or_is_one_line(bpe_folder, tmp_path, data):
    path = tmp_path / "tokenizer.json"
    values = json.loads((bpe_folder / "tokenizer.json").read_text())
    model = values["model"]
    part = data.draw(st.sampled_from([model["vocab"], values["added_tokens"][5], model, values]))
    name, value = data.draw(st.sampled_from(sorted(part))), data.draw(VALUES)
    part.pop(name) if value is DROPPED else part.update({name: value})
    path.write_text(json.dumps(values))
    try:
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.decode(tokenizer.text_ids("What is 12?")) == "What is 12?"
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 1500


def test_two_marks_with_one_id_and_a_larger_tokenizer_are_one_line(untrained_folder, ask, capsys,
                                                                   tmp_path):
    values = json.loads((untrained_folder / CONFIG).read_text())
    names = values["vocabulary_map"]
    text = json.dumps(values | {"vocabulary_map": names | {"<racm3:break>": names["<eoss>"]}})
    code, said = ask({CONFIG: text.encode()}, capsys)
    assert code == 2 and "<racm3:break>" in said
    with pytest.raises(ValueError, match="an id of its own"):
        ChameleonForConditionalGeneration(ChameleonConfig.from_dict(json.loads(text)))
    write_synthetic_tokenizer(tmp_path, num_codes=K, num_merges=900)
    (untrained_folder / "tokenizer.model").rename(tmp_path / "kept")
    try:
        content = (tmp_path / "tokenizer.json").read_bytes()
        code, said = ask({"tokenizer.json": content}, capsys)
    finally:
        (tmp_path / "kept").rename(untrained_folder / "tokenizer.model")
    assert code == 2 and "do not belong together" in said


# ---------------------------------------------------------------------------------------------
# Pickles


@pytest.mark.filterwarnings("ignore:Validating sparse")  # a line of torch 2.14's own
@pytest.mark.parametrize("content", [
    {0: torch.ones(2)}, {"a": torch.eye(2).to_sparse()}, {"a": torch.ones(2, device="meta")},
    {"a": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}, [torch.ones(2)],
    {str(i): i for i in range(500_000)},
], ids=["numbered", "sparse", "meta", "nested", "list", "long"])
def test_an_odd_pickle_is_one_line(untrained_folder, ask, capsys, tmp_path, content):
    path = tmp_path / "vqgan.ckpt"
    torch.save(content, path)
    code, said = ask({}, capsys, "--prompt", "a", "--vqgan", str(path))
    assert code == 2 and str(path) in said
    with pytest.raises(ValueError, match="plain tensor|no checkpoint|more than tensors"):
        load_pickle(path)


def test_a_plain_pickle_is_refused_unread(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(b"\x80\x02" + b"N" * 30_000_000 + b".")
    start = time.monotonic()
    with pytest.raises(ValueError, match="more than tensors"):
        load_pickle(tmp_path / "a.ckpt")
    assert time.monotonic() - start < 1
    torch.save({"a": torch.ones(2)}, tmp_path / "b.ckpt", _use_new_zipfile_serialization=False)
    assert load_pickle(tmp_path / "b.ckpt")["a"].tolist() == [1, 1]


def test_an_older_folder_with_a_pickle_loads(untrained_folder, tmp_path):
    folder = shutil.copytree(untrained_folder, tmp_path / "a")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    model = ChameleonForConditionalGeneration.from_pretrained(folder)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    save_file(tensors, folder / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"")  # safetensors come first
    ChameleonForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize("value", [5, None, ["a"], {}, ""])
def test_an_index_of_what_are_no_files_is_one_line(untrained_folder, tmp_path, value):
    folder = shutil.copytree(untrained_folder, tmp_path / "a")
    index = {"weight_map": {"lm_head.weight": value}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no readable weight_map|lacks") as error:
        ChameleonForConditionalGeneration.from_pretrained(folder)
    assert "\n" not in str(error.value)
