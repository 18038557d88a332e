"""The page of transformers' documentation on Chameleon: its code runs here with the import changed.

What is replaced is named in PLACES: the module, the model's folder, the device, and the download of
pictures. The oracle for what the calls give is transformers itself.
"""

import copy
import inspect
import json
import shutil
import types
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from small import V, batch_with_pictures, left_padded, small_model
from synthetic import one_line
from test_oracle import pair

import chameleon
from chameleon import (
    AutoTokenizer,
    BitsAndBytesConfig,
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    ChameleonModel,
    ChameleonProcessor,
    KVCache,
)
from chameleon_extras import pretrained
from chameleon_extras.decoding import ATTENTIONS, set_attention
from chameleon_extras.quantize import NF4Linear
from generate import generate, stream

pytestmark = pytest.mark.docs
ROOT = Path(__file__).resolve().parent.parent
PLACES = {"from transformers import": "from chameleon import", "facebook/chameleon-7b": "tiny",
          "meta/chameleon-7b": "tiny", '"cuda"': '"cpu"', ".to(0)": '.to("cpu")'}

ONE_PICTURE = '''
from transformers import ChameleonProcessor, ChameleonForConditionalGeneration
import torch
from PIL import Image
import requests

processor = ChameleonProcessor.from_pretrained("facebook/chameleon-7b")
model = ChameleonForConditionalGeneration.from_pretrained("facebook/chameleon-7b", torch_dtype=torch.bfloat16, device_map="cuda")

# prepare image and text prompt
url = 'http://images.cocodataset.org/val2017/000000039769.jpg'
image = Image.open(requests.get(url, stream=True).raw)
prompt = "What do you see in this image?<image>"

inputs = processor(prompt, image, return_tensors="pt").to(model.device, dtype=torch.bfloat16)

# autoregressively complete prompt
output = model.generate(**inputs, max_new_tokens=50)
print(processor.decode(output[0], skip_special_tokens=True))
'''  # noqa: E501
SEVERAL_PICTURES = '''
from transformers import ChameleonProcessor, ChameleonForConditionalGeneration
import torch
from PIL import Image
import requests

processor = ChameleonProcessor.from_pretrained("facebook/chameleon-7b")
model = ChameleonForConditionalGeneration.from_pretrained("facebook/chameleon-7b", torch_dtype=torch.bfloat16, device_map="cuda")

# Get three different images
url = "https://www.ilankelman.org/stopsigns/australia.jpg"
image_stop = Image.open(requests.get(url, stream=True).raw)
url = "http://images.cocodataset.org/val2017/000000039769.jpg"
image_cats = Image.open(requests.get(url, stream=True).raw)
url = "https://hugging-face.cn/microsoft/kosmos-2-patch14-224/resolve/main/snowman.jpg"
image_snowman = Image.open(requests.get(url, stream=True).raw)

# Prepare a batched prompt, where the first one is a multi-image prompt and the second is not
prompts = [
    "What do these images have in common?<image><image>",
    "<image>What is shown in this image?"
]

# We can simply feed images in the order they have to be used in the text prompt
# Each "<image>" token uses one image leaving the next for the subsequent "<image>" tokens
inputs = processor(text=prompts, images=[image_stop, image_cats, image_snowman], padding=True, return_tensors="pt").to(device="cuda", dtype=torch.bfloat16)

# Generate
generate_ids = model.generate(**inputs, max_new_tokens=50)
processor.batch_decode(generate_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
'''  # noqa: E501
FOUR_BITS = '''
import torch
from transformers import ChameleonForConditionalGeneration, BitsAndBytesConfig

# specify how to quantize the model
quantization_config = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_compute_dtype=torch.bfloat16,
)

model = ChameleonForConditionalGeneration.from_pretrained("facebook/chameleon-7b", quantization_config=quantization_config, device_map="cuda")
'''  # noqa: E501
FLASH = '''
import torch
from transformers import ChameleonForConditionalGeneration

model_id = "facebook/chameleon-7b"
model = ChameleonForConditionalGeneration.from_pretrained(
    model_id,
    torch_dtype=torch.bfloat16,
    low_cpu_mem_usage=True,
    attn_implementation="flash_attention_2"
).to(0)
'''
CONFIGURATION = '''
from transformers import ChameleonModel, ChameleonConfig

# Initializing a chameleon chameleon-7b style configuration
configuration = ChameleonConfig()

# Initializing a model from the chameleon-7b style configuration
model = ChameleonModel(configuration)

# Accessing the model configuration
configuration = model.config
'''
BARE_MODEL = '''
from transformers import AutoTokenizer, ChameleonModel
import torch

tokenizer = AutoTokenizer.from_pretrained("meta/chameleon-7b")
model = ChameleonModel.from_pretrained("meta/chameleon-7b")

inputs = tokenizer("Hello, my dog is cute", return_tensors="pt")
outputs = model(**inputs)

last_hidden_states = outputs.last_hidden_state
'''
CONSTELLATIONS = '''
from transformers import ChameleonProcessor, ChameleonForConditionalGeneration
import torch
import requests
from PIL import Image

model = ChameleonForConditionalGeneration.from_pretrained("facebook/chameleon-7b", torch_dtype=torch.bfloat16)
processor = ChameleonProcessor.from_pretrained("facebook/chameleon-7b")

prompt = "I used to know a lot about constellations when I was younger, but as I grew older, I forgot most of what I knew. These are the only two constellations that I really remember now.<image><image>I would like for you to tell me about 3 more constellations and give me a little bit of history about the constellation."
image = Image.open(requests.get("https://nineplanets.org/wp-content/uploads/2020/12/the-big-dipper-1.jpg", stream=True).raw)
image_2 = Image.open(requests.get("https://www.kxan.com/wp-content/uploads/sites/40/2020/10/ORION.jpg", stream=True).raw)

inputs = processor(prompt, images=[image, image_2], return_tensors="pt").to(model.device, torch.bfloat16)

generated_ids = model.generate(**inputs, max_new_tokens=100, do_sample=False)
processor.batch_decode(generated_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)[0]
'''  # noqa: E501


def run(code: str, monkeypatch) -> dict:
    """Executes a block of the page at the root of the repository -> its names."""
    for theirs, ours in PLACES.items():
        code = code.replace(theirs, ours)
    pictures = iter(["shapes.png", "star.png", "three.png"])
    requests = types.ModuleType("requests")
    requests.get = lambda url, stream: types.SimpleNamespace(
        raw=ROOT / "examples" / next(pictures))
    monkeypatch.setitem(__import__("sys").modules, "requests", requests)
    monkeypatch.chdir(ROOT)
    names = {}
    exec(code, names)
    return names


def test_one_picture(monkeypatch, capsys):
    run(ONE_PICTURE, monkeypatch)
    printed = capsys.readouterr().out
    assert "A small red circle above a large blue square on a white background." in printed


def test_several_pictures(monkeypatch):
    names = run(SEVERAL_PICTURES, monkeypatch)
    assert len(names["generate_ids"]) == 2


def test_four_bits(monkeypatch):
    model = run(FOUR_BITS, monkeypatch)["model"]
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "NF4Linear"


def test_flash_attention(monkeypatch):
    model = run(FLASH, monkeypatch)["model"]
    assert model.dtype == torch.bfloat16


def test_a_model_from_a_configuration(monkeypatch):
    with torch.device("meta"):  # 28 GB in memory
        model = run(CONFIGURATION, monkeypatch)["model"]
    assert model.num_parameters() == transformers_parameters()


def transformers_parameters() -> int:
    """Of transformers' model of the same configuration, which has no VQ-VAE decoder, plus ours."""
    with torch.device("meta"):
        theirs = transformers.ChameleonModel(transformers.ChameleonConfig(
            vocabulary_map={"<image>": 8711}))
        vq = chameleon.ChameleonVQVAE(chameleon.ChameleonVQVAEConfig())
    extra = [*vq.decoder.parameters()]
    return sum(p.numel() for p in [*theirs.parameters(), *extra])


def test_the_bare_model(monkeypatch):
    names = run(BARE_MODEL, monkeypatch)
    ids = names["inputs"]["input_ids"]
    assert names["last_hidden_states"].shape == (1, ids.shape[1], 192)


def test_the_example_of_forward(monkeypatch):
    assert run(CONSTELLATIONS, monkeypatch)["generated_ids"].shape[0] == 1


# ---------------------------------------------------------------------------------------------
# forward


def test_a_forward_pass_returns_a_cache_that_grows():
    """Against transformers, which is given no cache either."""
    ours, theirs = pair()
    ids = batch_with_pictures()["input_ids"].clamp(max=69)[:, :9]
    with torch.no_grad():
        for model in (ours, theirs):
            first = model(ids[:, :5])
            second = model(ids[:, 5:], past_key_values=first.past_key_values)
            whole = model(ids, use_cache=False)
            assert whole.past_key_values is None
            assert (second.logits - whole.logits[:, 5:]).abs().max() < 1e-4
        moved = [ours(ids, cache_position=torch.arange(0, 18, 2)).logits,
                 ours(ids, position_ids=torch.arange(0, 18, 2)[None]).logits, whole.logits]
    assert torch.equal(moved[0], moved[1]) and not torch.allclose(moved[1], moved[2])


PAGE = ["input_ids", "pixel_values", "attention_mask", "position_ids", "past_key_values",
        "inputs_embeds", "labels", "use_cache", "output_attentions", "output_hidden_states",
        "return_dict", "cache_position"]


@pytest.mark.parametrize("cls, names", [
    (ChameleonForConditionalGeneration, PAGE),
    (ChameleonModel, [name for name in PAGE if name != "labels"]),
])
def test_the_arguments_of_forward_stand_in_the_order_of_the_page(cls, names):
    assert [*inspect.signature(cls.forward).parameters][1 : len(names) + 1] == names


def test_the_fields_of_the_config_stand_in_the_order_of_the_page():
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "hidden_act", "max_position_embeddings",
        "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id",
        "eos_token_id", "tie_word_embeddings", "rope_theta", "rope_scaling", "attention_bias",
        "attention_dropout", "model_parallel_size", "swin_norm", "vq_config", "vocabulary_map",
        "mlp_bias")
    assert tuple(ChameleonConfig.__dataclass_fields__)[: len(names)] == names


def test_outputs_are_read_by_attribute_name_and_index():
    ours, theirs = pair()
    ids = torch.tensor([[0, 80, 81]])
    with torch.no_grad():
        a = ours(ids, labels=ids, output_hidden_states=True)
        b = theirs(ids, labels=ids, output_hidden_states=True)
        plain = ours(ids, labels=ids, return_dict=False)
    # The newest transformers calls it "cache"; the documentation does not.
    documented = [name.replace("cache", "past_key_values") for name in b]
    assert list(a.keys()) == documented == list(a)
    assert torch.equal(a["logits"], a.logits) and torch.equal(a[1], a.logits)
    assert len(a.to_tuple()) == len(b.to_tuple()) and a[0] is a.loss
    assert isinstance(plain, tuple) and torch.equal(plain[1], a.logits)
    assert list(dict(**a)) == documented and len(a) == len(b)
    assert "logits" in a and "attentions" not in a and a.get("attentions") is None
    assert [name for name, _ in a.items()] == documented


def test_the_config_sets_the_defaults_of_forward():
    model = small_model(output_hidden_states=True, return_dict=False, use_cache=False)
    set_attention(model, "eager")
    output = model(torch.tensor([[0, 80]]))
    assert isinstance(output, tuple) and len(output) == 2 and len(output[1]) == 4


def test_masks_of_four_dimensions_are_the_whole_rule():
    ours, theirs = pair()
    ids = torch.randint(74, 160, (2, 6), generator=torch.Generator().manual_seed(0))
    allowed = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    allowed[1, :, 2:, 0] = False
    allowed[0, :, 1, 4] = True  # a key that comes later
    additive = torch.zeros(2, 1, 6, 6).masked_fill(~allowed, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=additive).logits
        for mask in (allowed, additive):
            assert (ours(ids, attention_mask=mask).logits - expected).abs().max() < 1e-4


def test_embeddings_and_pictures_together():
    model, inputs = small_model(), batch_with_pictures()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    mask, pixels = inputs["attention_mask"], inputs["pixel_values"]
    with torch.no_grad():
        expected = model(**inputs).logits
        logits = model(inputs_embeds=embeds, attention_mask=mask, pixel_values=pixels).logits
    assert torch.equal(logits, expected)
    with pytest.raises(ValueError, match="no pixel_values"):
        model(inputs_embeds=embeds, attention_mask=mask)
    with pytest.raises(ValueError, match="1 pictures are 64 image tokens"):
        model(inputs_embeds=embeds, attention_mask=mask, pixel_values=pixels[:1])
    names = {n: i for n, i in model.config.vocabulary_map.items() if n != "<image>"}
    with pytest.raises(ValueError, match="no <image>"):
        small_model(vocabulary_map=names)(inputs_embeds=embeds, pixel_values=pixels)


def test_placeholders_without_pictures_and_a_cache_of_another_batch_are_errors():
    model = small_model()
    with pytest.raises(ValueError, match="no pixel_values"):
        model(torch.tensor([[0, 73, 80]]))
    with pytest.raises(ValueError, match="must be a KVCache"):
        model(torch.tensor([[0, 80]]), past_key_values=transformers.DynamicCache())
    with pytest.raises(ValueError, match="KV cache holds 2 rows, the input has 1"):
        model(torch.tensor([[0, 80]]), past_key_values=KVCache(model.config, 2, 8))


@pytest.mark.parametrize("pictures", [False, True])
def test_the_model_traces_as_one_graph(pictures):
    model, inputs = small_model(), batch_with_pictures()
    if not pictures:
        inputs.pop("pixel_values")
        inputs["input_ids"] = inputs["input_ids"].clamp(max=69)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = model(**inputs).logits
        assert (compiled(**inputs).logits - expected).abs().max() < 1e-4


def test_a_new_model_has_small_weights_and_a_zero_row_for_padding():
    model = ChameleonModel(small_model(pad_token_id=1).config)
    weight = model.get_input_embeddings().weight
    assert (weight[1] == 0).all() and abs(weight[2:].std().item() - 0.02) < 0.002


def test_half_precision_leaves_the_vqvae_and_its_codes_as_they_were():
    model, pixels = small_model(), batch_with_pictures()["pixel_values"]
    ids = model.get_image_tokens(pixels)
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16()):
        model = cast(model)
        assert model.dtype != torch.float32
        assert torch.equal(model.get_image_tokens(pixels), ids)


# ---------------------------------------------------------------------------------------------
# Generic methods


def test_embeddings_are_resized_and_old_rows_stay():
    model = small_model()
    before, V = model.lm_head.weight.clone(), model.config.vocab_size
    ids = torch.tensor([[0, 80, 81]])
    expected = model(ids).logits
    model.resize_token_embeddings(V + 5)
    assert model.lm_head.weight.shape[0] == model.config.vocab_size == V + 5
    assert model.lm_head.out_features == model.get_input_embeddings().num_embeddings == V + 5
    assert torch.equal(model.lm_head.weight[:V], before)
    assert torch.equal(model(ids).logits[..., :V], expected)
    mean = before.mean(0)
    assert all(torch.allclose(row, mean, atol=1e-6) for row in model.lm_head.weight[V:])
    assert model.resize_token_embeddings().weight.shape[0] == V + 5
    assert model.resize_token_embeddings(V, pad_to_multiple_of=64).weight.shape[0] % 64 == 0
    model.resize_token_embeddings(V - 5)
    assert model(ids).logits.shape[-1] == V - 5


def test_resizing_keeps_the_parameters_that_an_optimizer_holds():
    for size in (V, V + 8):
        model = small_model().train()
        model.set_output_embeddings(torch.nn.Linear(64, V))  # with a bias
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(PROMPT, labels=PROMPT).loss.backward()
        mean = model.lm_head.bias.detach().mean()
        model.resize_token_embeddings(size)
        torch.testing.assert_close(model.lm_head.bias[V:], mean.expand(size - V))
        assert (model.lm_head.weight.grad is None) == (size != V)
        before = model.lm_head.weight.clone()
        model(torch.tensor([[0, 80, 81]]), labels=torch.tensor([[0, 80, 81]])).loss.backward()
        optimizer.step()
        assert before.shape[0] == size and not torch.equal(before, model.lm_head.weight)


def test_a_tied_model_with_another_head_is_not_saved(tmp_path):
    model = small_model(tie_word_embeddings=True)
    model.set_output_embeddings(torch.nn.Linear(64, V, bias=False))
    with pytest.raises(ValueError, match="config.tie_word_embeddings = False"):
        model.save_pretrained(tmp_path)


def test_a_tied_model_stays_tied():
    model = small_model(tie_word_embeddings=True)
    model.resize_token_embeddings(model.config.vocab_size + 1)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_gradient_checkpointing_changes_no_gradient():
    model, ids = small_model().train(), torch.tensor([[0, 80, 81, 82]])
    gradients = []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append(model.lm_head.weight.grad.clone())
        gradients.append(model.model.layers[0].mlp.up_proj.weight.grad.clone())
    assert torch.equal(gradients[0], gradients[2]) and torch.equal(gradients[1], gradients[3])


# ---------------------------------------------------------------------------------------------
# from_pretrained, save_pretrained


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    small_model(intermediate_size=128).save_pretrained(folder, max_shard_size="500KB")
    return folder


@pytest.mark.parametrize("options", [
    dict(torch_dtype=torch.bfloat16), dict(torch_dtype="bfloat16"), dict(dtype="bfloat16"),
    dict(dtype=torch.bfloat16, device_map={"": "cpu"}, low_cpu_mem_usage=True),
    dict(dtype="bfloat16", device_map="cpu", attn_implementation="eager"),
    dict(dtype="bfloat16", quantization_config=BitsAndBytesConfig()),  # of no bits
])
def test_the_options_of_the_page(folder, options):
    model = ChameleonForConditionalGeneration.from_pretrained(folder, **options)
    assert model.dtype == torch.bfloat16 and model.device.type == "cpu"
    assert vars(model)["name_or_path"] == str(folder)  # peft reads it there
    assert model.model.vqmodel.quant_conv.weight.dtype == torch.float32


@pytest.mark.parametrize("name, ours", [("eager", "eager"), ("sdpa", "auto")])
def test_attn_implementation_chooses_the_kernel(folder, name, ours):
    loaded = ChameleonForConditionalGeneration.from_pretrained(folder, attn_implementation=name)
    changed = set_attention(small_model(), "eager" if name == "sdpa" else "auto")
    changed.set_attn_implementation(name)
    for model in (loaded, changed):
        assert model.model.layers[-1].self_attn.attend is ATTENTIONS[ours]


def test_without_a_device_map_the_device_is_the_cpu(monkeypatch):
    monkeypatch.setattr(pretrained, "pick_device", str)
    assert [*map(pretrained.as_device, (None, "auto", 0))] == ["cpu", "auto", "cuda:0"]


@pytest.mark.parametrize("options, message", [
    (dict(device_map=7), "cuda:7 cannot be used here"),
    (dict(device="cuda:7"), "cuda:7 cannot be used here"),
    (dict(device_map={"a": "cpu", "b": "cuda"}), "several devices"),
    (dict(torch_dtype="float33"), "no dtype of torch"),
    (dict(attn_implementation="paged"), "none of eager, sdpa, flash_attention_2"),
    (dict(load_in_4bit=True), "has no option load_in_4bit"),
    (dict(quantization_config=BitsAndBytesConfig(load_in_4bit=True)), "fp4"),
    (dict(quantization_config={"quant_method": "gptq", "bits": 4}), "gptq.* is not offered"),
    (dict(quantization_config=8), "quantization_config 8 is not offered"),
    (dict(quantization_config=dict(load_in_8bit=True, load_in_4bit=True)), "not both"),
    (dict(quantization_config=dict(load_in_8bit="False")), "true or false"),
    (dict(quantization_config=dict(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])),
     "llm_int8_skip_modules is not offered"),
    (dict(quantization_config=BitsAndBytesConfig(False, True, "nf4", None, True)), "double_quant"),
    (dict(dtype="int32"), "no dtype of torch to compute in"),
    (dict(dtype="float8_e4m3fn"), "no dtype of torch to compute in"),
    (dict(use_safetensors=False), "holds some, which are read first"),
])
def test_options_that_are_not_offered_are_named(folder, options, message):
    with pytest.raises(ValueError, match=message):
        ChameleonForConditionalGeneration.from_pretrained(folder, **options)


def test_eight_bits_by_transformers_own_config(folder):
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = ChameleonForConditionalGeneration.from_pretrained(folder, quantization_config=config)
    assert type(model.lm_head).__name__ == "Int8Linear"


def test_the_bare_model_saves_and_loads_and_reads_transformers_folder(folder, tmp_path):
    bare = ChameleonModel.from_pretrained(folder)
    ids = torch.tensor([[0, 80, 81]])
    expected = bare(ids).last_hidden_state
    bare.save_pretrained(tmp_path / "ours")
    again = ChameleonModel.from_pretrained(tmp_path / "ours")
    assert torch.equal(again(ids).last_hidden_state, expected)
    transformers.ChameleonModel.from_pretrained(folder).save_pretrained(tmp_path / "theirs")
    theirs = ChameleonModel.from_pretrained(tmp_path / "theirs")
    assert torch.equal(theirs(ids).last_hidden_state, expected)
    with pytest.raises(ValueError, match="missing lm_head.weight"):
        ChameleonForConditionalGeneration.from_pretrained(tmp_path / "ours")


def test_a_config_of_another_kind_is_refused(folder, tmp_path):
    model = ChameleonForConditionalGeneration.from_pretrained(folder)
    model.model.vqmodel.save_pretrained(tmp_path)
    config = model.config.vq_config
    assert chameleon.ChameleonVQVAEConfig.from_pretrained(tmp_path) == config
    assert chameleon.ChameleonVQVAEConfig.from_pretrained(folder) == config
    assert chameleon.ChameleonVQVAEConfig.from_pretrained(folder, rope_theta=1.0) == config
    assert ChameleonConfig.from_pretrained(folder.parent, subfolder=folder.name) == model.config
    assert ChameleonConfig.from_pretrained(folder, rms_norm_eps=0.5).rms_norm_eps == 0.5
    with pytest.raises(ValueError, match="describes a chameleon_vqgan, not a chameleon"):
        ChameleonConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a VQ-VAE has no quantization_config and no attn"):
        chameleon.ChameleonVQVAE.from_pretrained(tmp_path, attn_implementation="eager")


def test_a_change_replaces_what_a_config_of_transformers_5_says(folder, tmp_path):
    values = ChameleonConfig.from_pretrained(folder).to_dict()
    del values["rope_theta"], values["rope_scaling"]
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    (tmp_path / "config.json").write_text(json.dumps(values))
    dynamic = {"type": "dynamic", "factor": 2.0}
    config = ChameleonConfig.from_pretrained(tmp_path, rope_scaling=dynamic)
    assert (config.rope_theta, config.rope_scaling) == (5e5, dynamic)
    assert ChameleonConfig.from_pretrained(tmp_path, rope_theta=4e5).rope_theta == 4e5
    assert ChameleonConfig.from_pretrained(tmp_path).rope_theta == 5e5
    for name in ("rope_parameters", "rope_scaling"):
        for told, theta in (({}, 5e5), ({"rope_theta": 777.0}, 777.0)):  # or the file's theta
            config = ChameleonConfig.from_pretrained(tmp_path, **{name: dynamic | told})
            assert (config.rope_theta, config.rope_scaling) == (theta, dynamic)
    for changes, wanted in (
            (dict(rope_theta=4e5, rope_parameters=dynamic), (4e5, dynamic)),
            (dict(rope_parameters={}), (5e5, None)), (dict(rope_parameters=None), (5e5, None)),
            (dict(rope_parameters={"rope_type": "default"}), (5e5, None))):
        config = ChameleonConfig.from_pretrained(tmp_path, **changes)
        assert (config.rope_theta, config.rope_scaling) == wanted
    for told in ({"rope_type": "default"}, dynamic | {"factor": 9.0}):
        with pytest.raises(ValueError, match="contradict rope_theta or rope_scaling"):
            ChameleonConfig.from_pretrained(tmp_path, rope_parameters=told, rope_scaling=dynamic)
    config = ChameleonConfig.from_pretrained(
        tmp_path, rope_parameters=dynamic | {"rope_theta": 777.0})
    config.save_pretrained(tmp_path)  # as transformers 4 writes it
    assert ChameleonConfig.from_pretrained(tmp_path, rope_scaling=None).rope_theta == 777.0


def test_a_hub_id_is_read_from_the_librarys_cache(folder, tmp_path, monkeypatch):
    """A cache as huggingface_hub lays it out, and no network."""
    store = tmp_path / "models--org--small"
    (store / "refs").mkdir(parents=True)
    (store / "refs" / "main").write_text("0" * 40)
    (store / "snapshots").mkdir()
    (store / "snapshots" / ("0" * 40)).symlink_to(folder)
    options = dict(cache_dir=tmp_path, local_files_only=True)
    model = ChameleonForConditionalGeneration.from_pretrained("org/small", **options)
    assert model.config.hidden_size == 64
    (folder / "preprocessor_config.json").write_text('{"size": 36, "crop_size": 36}')
    processor = chameleon.ChameleonImageProcessor.from_pretrained("org/small", **options)
    assert processor.size == {"shortest_edge": 36}
    with pytest.raises(ValueError, match="org/other is no folder.*hf download org/other"):
        ChameleonForConditionalGeneration.from_pretrained("org/other", **options)
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r'pip install -e "\.\[hub\]"'):
        ChameleonForConditionalGeneration.from_pretrained("org/small")


# ---------------------------------------------------------------------------------------------
# generate


PROMPT = torch.tensor([[0, 80, 81]])
MODEL = small_model()


def test_generate_is_a_method_too():
    expected = generate(MODEL, PROMPT, max_new_tokens=5)
    assert torch.equal(MODEL.generate(PROMPT, max_new_tokens=5), expected)
    assert torch.equal(MODEL.generate(input_ids=PROMPT, max_length=8), expected)


def test_padding_is_recognized_by_its_id():
    ours, theirs = pair(pad_token_id=1)
    inputs = left_padded([[0, 80, 81, 82], [0, 90]])
    masked = ours.generate(**inputs, max_new_tokens=6)
    assert torch.equal(ours.generate(inputs["input_ids"], max_new_tokens=6), masked)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs.generate(inputs["input_ids"], max_new_tokens=6, do_sample=False,
                                   suppress_tokens=[70, 71, 73], eos_token_id=[2, 72])
    assert torch.equal(masked, expected)


def test_several_sequences_are_several_seeds():
    ids = MODEL.generate(PROMPT, num_return_sequences=3, do_sample=True, seed=4, max_new_tokens=6)
    for n, row in enumerate(ids):
        one = MODEL.generate(PROMPT, do_sample=True, seed=4 + n, max_new_tokens=6)[0]
        assert torch.equal(row[: len(one)], one)


def test_a_text_does_not_end_too_early():
    stops = list(range(74, MODEL.config.vocab_size))  # nearly all ids
    for n in (0, 3):
        ids = MODEL.generate(PROMPT, eos_token_id=stops, min_new_tokens=n, max_new_tokens=9)[0, 3:]
        ends = [i for i, x in enumerate(ids.tolist()) if x in stops]
        assert not ends or ends[0] >= n
    assert ends == [3] or not ends


def test_transformers_streamers_work(untrained_folder, capsys):
    processor = ChameleonProcessor.from_pretrained(untrained_folder)
    model = ChameleonForConditionalGeneration.from_pretrained(untrained_folder)
    inputs = processor(text="Hello", return_tensors="pt")
    streamer = transformers.TextStreamer(processor.tokenizer, skip_prompt=True)
    ids = model.generate(**inputs, max_new_tokens=8, streamer=streamer)
    answer = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1]:])
    assert capsys.readouterr().out.strip() == answer.strip()


def test_an_answer_ends_with_a_stop_string():
    processor = ChameleonProcessor.from_pretrained(ROOT / "tiny")
    model = ChameleonForConditionalGeneration.from_pretrained(ROOT / "tiny", dtype=torch.float32)
    inputs = processor("What do you see in this image?<image>",
                       Image.open(ROOT / "examples" / "shapes.png"), return_tensors="pt")
    ids = model.generate(**inputs, stop_strings="above", tokenizer=processor.tokenizer)
    text = processor.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
    assert text == "A small red circle above"


def test_options_that_do_not_exist_are_named_and_idle_ones_warned_about():
    with pytest.raises(TypeError, match="no option 'num_beams'; it has mode, .* seed"):
        MODEL.generate(PROMPT, num_beams=4)
    with pytest.raises(TypeError, match="no option 'min_length'"):
        generate(MODEL, PROMPT, min_length=4)
    with pytest.warns(UserWarning, match="without do_sample=True"):
        MODEL.generate(PROMPT, temperature=0.5, max_new_tokens=2)
    with pytest.warns(UserWarning, match="num_return_sequences gives equal rows"):
        MODEL.generate(PROMPT, num_return_sequences=2, max_new_tokens=2)
    with pytest.raises(ValueError, match="min_new_tokens 5 is more than the 4 ids"):
        MODEL.generate(PROMPT, min_new_tokens=5, max_new_tokens=4)


def test_a_generation_config_holds_where_no_option_is_given():
    config = transformers.GenerationConfig(
        max_length=9, num_beams=1, use_cache=False, bos_token_id=0, eos_token_id=[])
    expected = MODEL.generate(PROMPT, max_length=9, eos_token_id=[])
    assert torch.equal(MODEL.generate(PROMPT, generation_config=config), expected)
    shorter = MODEL.generate(PROMPT, generation_config=config, max_new_tokens=2)
    assert torch.equal(shorter, expected[:, : PROMPT.shape[1] + 2])
    config.num_beams = 3
    with pytest.raises(TypeError, match="num_beams"):
        MODEL.generate(PROMPT, generation_config=config)
    for config in ({}, {"max_length": 9}):
        with pytest.raises(ValueError, match="must be a GenerationConfig, got a dict"):
            MODEL.generate(PROMPT, generation_config=config)
    with pytest.raises(ValueError, match="mode must be one of"):
        MODEL.generate(PROMPT, mode=["text"])


def test_a_models_own_generation_config_holds_and_none_changes_nothing():
    model = small_model()
    model.generation_config = transformers.GenerationConfig(max_new_tokens=3, eos_token_id=[])
    nothing = dict(temperature=None, top_p=None, top_k=None, logits_processor=None,
                   stopping_criteria=None, output_attentions=False, synced_gpus=False, num_beams=1,
                   early_stopping=False, length_penalty=1.0, no_repeat_ngram_size=0,
                   guidance_scale=1.0, encoder_repetition_penalty=1.0, epsilon_cutoff=0.0,
                   output_scores=False, output_logits=False, return_dict_in_generate=False)
    expected = MODEL.generate(PROMPT, max_new_tokens=3, eos_token_id=[])
    assert torch.equal(model.generate(PROMPT, **nothing), expected)
    assert torch.equal(model.generate(inputs=PROMPT), model.generate(input_ids=PROMPT))
    assert torch.equal(model.generate(inputs=PROMPT), expected)
    with pytest.raises(TypeError, match="multiple values"):
        model.generate(PROMPT, input_ids=PROMPT)
    assert torch.equal(model.generate(PROMPT.int()), expected)
    with pytest.raises(TypeError, match="multiple values"):
        model.generate(PROMPT, inputs=PROMPT + 1)
    with pytest.raises(ValueError, match="names of one argument"):
        model.generate(input_ids=PROMPT, inputs=PROMPT + 1)
    assert model.generate(PROMPT, max_new_tokens=2).shape[1] == PROMPT.shape[1] + 2
    assert torch.equal(model.generate(PROMPT, generation_config=None), expected)
    other = transformers.GenerationConfig(max_new_tokens=30)  # the rest is the model's own
    model.generation_config.repetition_penalty = 9.0
    options = dict(max_new_tokens=30, eos_token_id=[])
    penalized = MODEL.generate(PROMPT, **options, repetition_penalty=9.0)
    assert not torch.equal(penalized, MODEL.generate(PROMPT, **options))
    assert torch.equal(model.generate(PROMPT, generation_config=other), penalized)
    with pytest.warns(UserWarning, match="with mode='text', guidance_text changes nothing"):
        model.generate(PROMPT, guidance_text=3.0)
    with pytest.warns(UserWarning, match="with mode='image', max_new_tokens changes nothing"):
        model.generate(PROMPT, mode="image", max_new_tokens=3)


def test_head_and_cache_have_the_methods_of_the_page():
    model = small_model()
    head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features, bias=False)
    model.set_output_embeddings(head)
    assert model.get_output_embeddings() is head
    model.activation_checkpointing_enable(gradient_checkpointing_kwargs={})  # as Trainer does
    assert model.is_gradient_checkpointing and model.enable_input_require_grads() is None
    model.activation_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    cache = model(PROMPT).past_key_values
    assert cache.get_seq_length() == PROMPT.shape[1] and len(cache) == len(list(cache)) == 3
    for k, v in cache:
        assert k.shape == v.shape == (1, 4, PROMPT.shape[1], 16)


def test_an_activation_may_be_a_function(tmp_path):
    named, own = small_model(hidden_act="gelu"), small_model(hidden_act=torch.nn.functional.gelu)
    assert torch.equal(named(PROMPT).logits, own(PROMPT).logits)
    with pytest.raises(ValueError, match="hidden_act is a function"):
        own.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_two_streams_of_a_model_in_training_do_not_disturb_each_other():
    model = small_model(attention_dropout=0.5)
    expected = generate(model, PROMPT, max_new_tokens=6, eos_token_id=[])[0, 3:]
    model.train()
    streams = [stream(model, PROMPT, max_new_tokens=6, eos_token_id=[]) for _ in range(2)]
    for i in expected:
        for steps in streams:
            assert next(steps) == i and model.training and model.model.layers[0].training


def test_a_config_keeps_keywords_that_are_no_fields(tmp_path):
    config = ChameleonConfig(65536, 64, num_attention_heads=2, note="mine",
                             vq_config={"resolution": 256, "why": "small"})
    config.save_pretrained(tmp_path)
    again = ChameleonConfig.from_pretrained(tmp_path)
    assert again == config and again.note == "mine" and again.vq_config.why == "small"
    assert transformers.ChameleonConfig.from_pretrained(tmp_path).note == "mine"


def test_every_documented_name_is_in_one_module():
    for name in ("ChameleonConfig", "ChameleonVQVAEConfig", "ChameleonVQVAE", "ChameleonModel",
                 "ChameleonForConditionalGeneration", "ChameleonProcessor", "BitsAndBytesConfig",
                 "ChameleonImageProcessor", "AutoTokenizer", "AutoConfig", "AutoModel",
                 "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor",
                 "ChameleonImageProcessorPil", "ChameleonImageProcessorFast"):
        assert isinstance(getattr(chameleon, name), type), name
    with pytest.raises(AttributeError, match="no attribute 'ChameleonTokenizer'"):
        _ = chameleon.ChameleonTokenizer
    assert ChameleonConfig().to_dict() and AutoTokenizer.from_pretrained(ROOT / "tiny")


# ---------------------------------------------------------------------------------------------
# 4 bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_is_bitsandbytes_bit_for_bit(dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 512, generator=g) * torch.logspace(-3, 1, 96)[:, None]
    weight[5], weight[6, 64:128] = 0.0, 0.0
    weight = weight.to(dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    expected = functional.dequantize_4bit(packed, state)
    layer = NF4Linear(512, 96)
    layer.weight, layer.scale = NF4Linear.pack(weight).values()
    assert torch.equal(layer.unpacked().to(dtype), expected)


def test_a_model_in_four_bits_saves_and_loads(folder, tmp_path):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = ChameleonForConditionalGeneration.from_pretrained(folder, quantization_config=config)
    plain = ChameleonForConditionalGeneration.from_pretrained(folder)
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)
    model.save_pretrained(tmp_path)
    again = ChameleonForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again(PROMPT).logits, model(PROMPT).logits)
    assert (model(PROMPT).logits - plain(PROMPT).logits).norm() < 0.3 * plain(PROMPT).logits.norm()


# ---------------------------------------------------------------------------------------------
# Tokenizer, processor


def test_the_tokenizer_is_called_as_transformers_fast_tokenizers_are(bpe, bpe_folder):
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(bpe_folder / "tokenizer.json"), bos_token="<s>", pad_token="<pad>",
        padding_side="left")
    texts = ["What is in this image?", "Hi"]
    for text, options in (
        (texts[0], {}), (texts, {}), (texts[0], dict(add_special_tokens=False)),
        (texts, dict(padding=True, return_tensors="pt")),
        (texts, dict(padding=True, padding_side="right", return_tensors="np")),
        (texts, dict(padding=True, pad_to_multiple_of=8)),
        (texts, dict(padding="max_length", max_length=40, truncation=True)),
        (texts, dict(truncation=True, max_length=3, return_attention_mask=False)),
    ):
        ours, expected = bpe(text, **options), theirs(text, return_token_type_ids=False, **options)
        assert ours.keys() == expected.keys(), options
        for name, value in expected.items():
            assert torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(value)) if (
                "return_tensors" in options) else ours[name] == value, options
    ids = bpe.encode(texts[0])
    assert ids == theirs.encode(texts[0]) == [0, *bpe.encode(texts[0], add_special_tokens=False)]
    assert bpe.tokenize(texts[0]) == theirs.tokenize(texts[0]) == bpe.convert_ids_to_tokens(ids[1:])
    assert bpe.convert_tokens_to_ids(bpe.tokenize(texts[0])) == ids[1:]
    assert bpe.decode(ids) == theirs.decode(ids) == "<s>" + texts[0]
    assert bpe.decode(ids[1]) == theirs.decode(ids[1])
    assert bpe.get_vocab() == theirs.get_vocab() and len(bpe) == len(theirs)
    assert (bpe.bos_token, bpe.pad_token, bpe.sep_token) == ("<s>", "<pad>", "<reserved08706>")
    with pytest.raises(ValueError, match="bos_token is always '<s>' here: leave it"):
        bpe.bos_token = "</s>"
    assert bpe.special_tokens_map.items() >= theirs.special_tokens_map.items()
    bpe = copy.copy(bpe)
    assert bpe("Hi", return_attention_mask=None).keys() == {"input_ids", "attention_mask"}
    bpe.pad_token = bpe.eos_token
    rows = bpe(["Hi", "Hi, you"], padding=True)["input_ids"]
    assert bpe.pad_token_id == bpe.eos_token_id == rows[0][0] == bpe.vocab["</s>"]
    with pytest.raises(ValueError, match="pad_token '<none>' is not in the vocabulary"):
        bpe.pad_token = "<none>"
    assert set(bpe.all_special_tokens) >= set(theirs.all_special_tokens)
    spaced = "Hello , it 's a   ' b ' . We do n't ! 've 're 'm"
    assert bpe.convert_tokens_to_string(bpe.tokenize(spaced)) == spaced
    cleaned = bpe.decode(bpe.encode(spaced), clean_up_tokenization_spaces=True)
    assert cleaned == theirs.decode(bpe.encode(spaced), clean_up_tokenization_spaces=True)
    for multiple in (0, -8, "8", 8.0):
        with pytest.raises(ValueError, match="pad_to_multiple_of"):
            bpe(texts, padding=True, pad_to_multiple_of=multiple)


def test_parts_of_another_kind_are_no_processor(bpe_folder):
    ours = AutoTokenizer.from_pretrained(ROOT / "tiny")
    pictures = chameleon.ChameleonImageProcessor()
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(bpe_folder / "tokenizer.json"))
    for parts in ((pictures, theirs), (ours, pictures), (None, ours)):
        with pytest.raises(ValueError, match="takes a ChameleonImageProcessor and a tokenizer"):
            ChameleonProcessor(*parts)


def test_options_of_the_processor_replace_those_of_its_file_and_others_are_named():
    processor = ChameleonProcessor.from_pretrained(ROOT / "tiny", image_seq_length=7)
    assert processor("<image>", Image.open(ROOT / "examples" / "star.png"))["input_ids"].eq(
        processor.tokenizer.image_token_id).sum() == 7
    for cls in (ChameleonProcessor, AutoTokenizer, chameleon.ChameleonImageProcessor):
        with pytest.raises((ValueError, TypeError), match="use_fast"):
            cls.from_pretrained(ROOT / "tiny", use_fast=True)


@pytest.mark.parametrize("order", ["text first", "picture first", "by name"])
def test_both_positional_orders_of_the_processor(order):
    processor = ChameleonProcessor.from_pretrained(ROOT / "tiny")
    picture, text = Image.open(ROOT / "examples" / "star.png"), "What?<image>"
    expected = processor(text=text, images=picture)
    given = {"text first": (text, picture), "picture first": (picture, text)}
    inputs = processor(*given.get(order, ()), **({} if order in given else
                                                 dict(images=picture, text=text)))
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)


def test_a_prompt_without_special_tokens_begins_with_its_text():
    processor = ChameleonProcessor.from_pretrained(ROOT / "tiny")
    ids = processor("A star.")["input_ids"]  # (1, T)
    without = processor("A star.", add_special_tokens=False)["input_ids"]
    assert torch.equal(without, ids[:, 1:])
    assert processor.model_input_names == [*processor.tokenizer.model_input_names, "pixel_values"]


def test_a_conversation_is_turns_with_an_end_of_turn_behind_each():
    processor = ChameleonProcessor.from_pretrained(ROOT / "tiny")
    picture = ROOT / "examples" / "star.png"
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "What is this? <image></s>"},
                                     {"type": "image", "image": None, "path": str(picture)}]},
        {"role": "assistant", "content": "A star.<reserved08706>"},
        {"role": "user", "content": [{"type": "text", "text": "Is it red?"}]},
    ]
    inputs = processor.apply_chat_template(turns)
    t, (ids,) = processor.tokenizer, inputs["input_ids"].tolist()
    eot, text = t.sep_token_id, t.text_ids
    assert ids == [0, *text("What is this? <image></s>"), *processor.picture_ids(), eot,
                   *text("A star.<reserved08706>"), eot, *text("Is it red?"), eot]
    assert inputs["pixel_values"].shape == (1, 3, 36, 36)
    assert ids.count(eot) == 3 and ids.count(t.image_token_id) == 81  # text injects none
    first = processor.apply_chat_template(turns[:1], return_tensors="pt")
    plain = processor(text="What is this? <", images=None)
    assert first["input_ids"].shape[1] < len(ids) and plain["input_ids"][0, -1] == eot
    batch = processor.apply_chat_template([turns, turns[2:]], padding=True)
    assert batch["input_ids"].shape == (2, len(ids)) and not batch["attention_mask"][1, 0]
    for wrong in ([{"role": "user"}], [{"content": [{"type": "video"}]}], ["text"]):
        with pytest.raises(ValueError, match="message"):
            processor.apply_chat_template(wrong)
    for name in ("tokenize", "return_dict", "add_generation_prompt"):
        with pytest.raises(ValueError, match="gives ids"):
            processor.apply_chat_template(turns, **{name: False})
    system = {"role": "system", "content": "Be brief."}
    for wrong in (turns[:2], turns[1:], [turns[0], turns[2]], [system, turns[2]], [system, *turns],
                  [turns[0]] * 3, [turns[0], system, turns[2]]):
        with pytest.raises(ValueError, match="roles must be user, assistant, user"):
            processor.apply_chat_template(wrong)


def test_tokens_that_were_set_are_saved(bpe_folder, tmp_path):
    names = {"pad_token": "</s>", "eos_token": "<eoss>", "sep_token": "<pad>", "unk_token": "<s>"}
    tokenizer = AutoTokenizer.from_pretrained(bpe_folder, padding_side="right")
    processor = ChameleonProcessor(chameleon.ChameleonImageProcessor(), tokenizer)
    for name, token in names.items():
        setattr(tokenizer, name, token)
    processor.save_pretrained(tmp_path / "ours")
    theirs = transformers.AutoProcessor.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again = ChameleonProcessor.from_pretrained(tmp_path / folder)
        for read in (again.tokenizer, theirs.tokenizer):
            assert {name: getattr(read, name) for name in names} == names
            assert read.padding_side == "right"
        assert again("a").input_ids.tolist() == theirs(text="a", return_tensors="pt"
                                                       ).input_ids.tolist()
    file = tmp_path / "ours" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"unk_token": "<not there>"}))
    left = ChameleonProcessor.from_pretrained(tmp_path / "ours", padding_side="left")
    assert left.tokenizer.unk_token == "<unk>"
    assert left.tokenizer.padding_side == "left" and left.image_token_id == theirs.image_token_id


def test_saving_keeps_the_chat_template_and_what_else_is_known_of_the_tokenizer(
        bpe_folder, tmp_path):
    shutil.copytree(bpe_folder, tmp_path / "a")
    ChameleonProcessor(chameleon.ChameleonImageProcessor(), AutoTokenizer.from_pretrained(
        tmp_path / "a")).save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 4096}))
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages }}")
    for folder in ("a", "b"):  # onto itself, and to another folder
        ChameleonProcessor.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / folder)
        theirs = transformers.AutoProcessor.from_pretrained(tmp_path / folder)
        assert theirs.tokenizer.chat_template == "{{ messages }}"
        assert theirs.tokenizer.model_max_length == 4096


def test_what_transformers_5_wrote_last_about_pictures_is_read(untrained_folder, tmp_path):
    ChameleonProcessor.from_pretrained(untrained_folder).save_pretrained(tmp_path)
    theirs = transformers.ChameleonProcessor.from_pretrained(tmp_path)
    theirs.image_processor.rescale_factor = 0.5
    theirs.save_pretrained(tmp_path)  # processor_config.json alone
    for kind in (ChameleonProcessor, transformers.ChameleonProcessor):
        assert kind.from_pretrained(tmp_path).image_processor.rescale_factor == 0.5
    own = chameleon.ChameleonImageProcessor.from_pretrained(tmp_path, rescale_factor=0.25)
    own.save_pretrained(save_directory=tmp_path)  # and what we wrote last, too
    for kind in (chameleon.ChameleonImageProcessor, transformers.AutoImageProcessor):
        assert kind.from_pretrained(tmp_path).rescale_factor == 0.25


def test_transformers_reads_the_processor_that_is_saved_and_we_read_theirs(
        either, tmp_path, monkeypatch):
    processor = ChameleonProcessor(
        chameleon.ChameleonImageProcessor(size=32, crop_size=32), either, image_seq_length=16)
    processor.save_pretrained(tmp_path / "ours")
    theirs = transformers.AutoProcessor.from_pretrained(tmp_path / "ours")
    picture, text = Image.new("RGB", (40, 40), "red"), "  What is this?<image> 12"
    want = processor(text=text, images=picture, return_tensors="pt")
    got = theirs(text=text, images=picture, return_tensors="pt")
    assert torch.equal(got["input_ids"], want["input_ids"])
    theirs.save_pretrained(tmp_path / "theirs")
    if either.path.suffix == ".model":  # transformers does not keep it
        with pytest.raises(ValueError, match="put the tokenizer.model .* beside it"):
            ChameleonProcessor.from_pretrained(tmp_path / "theirs")
        (tmp_path / "theirs" / "tokenizer.model").write_bytes(either.path.read_bytes())
    again = ChameleonProcessor.from_pretrained(tmp_path / "theirs")
    assert torch.equal(again(text=text, images=picture)["input_ids"], want["input_ids"])


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_prompts_that_peft_has_learned_are_never_dropped(kind):
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=3,
                                 token_dim=64, num_attention_heads=4)
    model = peft.get_peft_model(small_model(), config)
    for write in (model.generate, lambda **inputs: generate(model, **inputs)):
        with pytest.raises(ValueError, match="use LoRA"):
            write(input_ids=PROMPT, max_new_tokens=2)


def test_a_config_of_transformers_own_class_is_named():
    config = transformers.ChameleonConfig(vocab_size=160, hidden_size=64)
    with pytest.raises(ValueError, match=r"ChameleonConfig of transformers.*\.from_dict"):
        ChameleonModel(config)
    assert ChameleonConfig.from_dict(config.to_dict()).hidden_size == 64


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_a_lora_model_learns_and_writes_before_and_after_merging(task):
    peft = pytest.importorskip("peft")
    model, inputs = small_model(), batch_with_pictures()
    plain = model.generate(**inputs, max_new_tokens=6)
    lora = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"],
                                                      task_type=task))
    for name, weight in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    ids = lora.generate(**inputs, max_new_tokens=6)
    assert torch.equal(generate(lora, **inputs, max_new_tokens=6), ids)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 73, -100)
    lora(**inputs, labels=labels).loss.backward()
    learned = {name for name, p in lora.named_parameters() if p.grad is not None}
    assert learned and all("lora_" in name for name in learned)
    merged = lora.merge_and_unload()
    assert torch.equal(merged.generate(**inputs, max_new_tokens=6), ids)
    assert not torch.equal(ids, plain) and not merged.model.embed_tokens._forward_hooks


def test_tokens_that_peft_trains_are_those_of_a_tied_head_too():
    peft = pytest.importorskip("peft")
    model = small_model(tie_word_embeddings=True)
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"],
                                                      trainable_token_indices=[80, 81]))
    for name, weight in lora.named_parameters():
        if "trainable_tokens_delta" in name:
            weight.data *= 1.5
    with torch.no_grad():
        before = lora(input_ids=PROMPT).logits
        assert torch.allclose(lora.merge_and_unload()(PROMPT).logits, before, atol=1e-5)


def test_names_of_transformers_5(untrained_folder):
    ours, theirs = (lib.ChameleonForConditionalGeneration.from_pretrained(
        untrained_folder, dtype=torch.float32).eval() for lib in (chameleon, transformers))
    pixels = torch.rand(2, 3, *[ours.config.vq_config.resolution] * 2) * 2 - 1
    with torch.no_grad():
        wanted = theirs.get_image_features(pixels).pooler_output
        for model in (ours, ours.model):
            torch.testing.assert_close(model.get_image_features(pixels), wanted)
    # Theirs has no decoder of the VQ-VAE.
    ours.model.vqmodel.decoder, ours.model.vqmodel.post_quant_conv = None, None
    assert abs(ours.get_memory_footprint() - theirs.get_memory_footprint()) < 2000
    cache, ids = KVCache(ours.config), torch.tensor([[0, 300, 301, 302]])
    whole = ours(ids)
    ours(ids[:, :2], cache=cache)
    output = ours.model(ids[:, 2:], cache=cache)
    assert output.cache is output.past_key_values is cache and cache.length == 4
    torch.testing.assert_close(ours.lm_head(output[0])[:, -1, -9:], whole.logits[:, -1, -9:])
    kept = KVCache(ours.config)
    assert torch.equal(ours.generate(ids, cache=kept, max_new_tokens=3),
                       ours.generate(ids, max_new_tokens=3)) and kept.length >= 4


def test_what_is_given_to_the_wrong_function_is_told_where_it_belongs(untrained_folder):
    processor = ChameleonProcessor.from_pretrained(untrained_folder)
    inputs = processor.apply_chat_template([{"role": "user", "content": "Hello"}])
    one_line(lambda: processor(text=inputs), "ids already: give them to model.generate")
    star = str(ROOT / "examples" / "star.png")
    turn = [{"role": "user", "content": [{"type": "image", "url": star}]}]
    assert "pixel_values" in processor.apply_chat_template(turn)
    turn[0]["content"][0]["url"] = "https://example.org/star.png"
    one_line(lambda: processor.apply_chat_template(turn), "nothing is fetched")
    model = chameleon.ChameleonForConditionalGeneration.from_pretrained(untrained_folder)
    one_line(lambda: model.set_attn_implementation({"": "sdpa"}), "is none of eager, sdpa")
    assert processor.post_process_image_text_to_text(inputs.input_ids) == ["Hello"]
    ids = processor.tokenizer.encode("Hello", return_tensors="pt")
    assert ids.tolist() == [processor.tokenizer.encode("Hello")]


def test_a_state_dict_that_was_gathered_elsewhere_is_saved(tmp_path):
    model = small_model()
    gathered = {name: x + 1 if x.is_floating_point() else x
                for name, x in model.state_dict().items()}
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    model.save_pretrained(tmp_path, is_main_process=True, save_function=torch.save,
                          state_dict=gathered, safe_serialization=True)
    again = chameleon.ChameleonForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight + 1)
    one_line(lambda: model.save_pretrained(tmp_path, state_dict={"a": torch.ones(1)}),
             "state_dict has other names")
