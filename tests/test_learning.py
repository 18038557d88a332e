"""Fine-tuning without train.py: frozen VQ-VAE, DistributedDataParallel, transformers' Trainer."""

from pathlib import Path

import pytest
import torch
from small import batch_with_pictures, ended, needs_compiler, small_model, start_two

from chameleon import ChameleonForConditionalGeneration, ChameleonProcessor
from generate import generate

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("loaded", [False, True])
def test_no_gradient_reaches_the_vqvae_and_all_else_learns(tmp_path, loaded):
    model = small_model()
    if loaded:
        model.save_pretrained(tmp_path)
        model = ChameleonForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    batch = batch_with_pictures()
    model.train()(**batch, labels=batch["input_ids"], mask_image_logits=False).loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == (not p.requires_grad) == ("vqmodel" in name), name
    assert model.model.layers.training
    assert not any(module.training for module in model.model.vqmodel.modules())


def test_bf16_and_checkpointing_change_the_gradients_by_rounding_only():
    model, batch = small_model().train(), batch_with_pictures()
    grads = []
    for checkpoints in (False, True):
        (model.gradient_checkpointing_enable if checkpoints else
         model.gradient_checkpointing_disable)()
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=checkpoints):
            model(**batch, labels=batch["input_ids"], mask_image_logits=False).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.cosine_similarity(*grads, dim=0) > 0.95


DDP = """
import sys
sys.path[:0] = ["tests", "."]
import torch
from small import batch_with_pictures, small_model
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
model = torch.nn.parallel.DistributedDataParallel(small_model().train())
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
for step in range(3):
    batch = batch_with_pictures(seed=2 * step + rank)
    loss = model(**batch, labels=batch["input_ids"], mask_image_logits=False).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
torch.save(model.module.state_dict(), sys.argv[1] + str(rank))
"""


def test_two_processes_of_ddp_learn_the_mean_of_both(tmp_path):
    ended(start_two(DDP, tmp_path / "rank"))
    one, two = (torch.load(tmp_path / f"rank{rank}") for rank in "01")
    alone = small_model().train()
    optimizer = torch.optim.SGD([p for p in alone.parameters() if p.requires_grad], lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        for rank in (0, 1):
            batch = batch_with_pictures(seed=2 * step + rank)
            loss = alone(**batch, labels=batch["input_ids"], mask_image_logits=False).loss
            (loss / 2).backward()
        optimizer.step()
    for name, weight in alone.state_dict().items():
        assert torch.equal(one[name], two[name]), name
        torch.testing.assert_close(one[name], weight, rtol=1e-3, atol=1e-4)


def trained(folder, out, epochs: int = 3, **changes):
    """A model that transformers' Trainer has trained, its VQ-VAE before, and the losses."""
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = ChameleonForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    processor = ChameleonProcessor.from_pretrained(folder)
    picture = str(ROOT / "examples" / "star.png")
    data = [{"prompt": "What is it?<image>", "answer": "A star.", "images": [picture]},
            {"prompt": "Draw a star.", "answer": "<image>", "images": [picture]}] * 8

    def collate(lines: list[dict]) -> dict:
        text, answers, images = ([line[name] for line in lines] for name in (
            "prompt", "answer", "images"))
        batch = processor(text=text, answers=answers, images=images, padding=True)
        return {**batch, "mask_image_logits": False}

    arguments = transformers.TrainingArguments(
        **dict(output_dir=out, per_device_train_batch_size=4, num_train_epochs=epochs, report_to=[],
               learning_rate=1e-2, remove_unused_columns=False, logging_steps=1, use_cpu=True,
               gradient_checkpointing=True, disable_tqdm=True) | changes)
    before = model.model.vqmodel.quant_conv.weight.clone()
    trainer = transformers.Trainer(
        model, arguments, data_collator=collate, train_dataset=data,
        processing_class=transformers.AutoProcessor.from_pretrained(folder))
    trainer.train()
    assert torch.equal(model.model.vqmodel.quant_conv.weight, before)
    return model, [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("bf16", [False, True])
def test_transformers_trainer_trains_with_a_collator_of_a_few_lines(
        tmp_path, untrained_folder, bf16):
    _, losses = trained(untrained_folder, tmp_path, bf16=bf16)
    assert len(losses) == 12 and losses[-1] < losses[0] / 2


def test_the_trainer_divides_by_the_labels_that_count(tmp_path):
    transformers = pytest.importorskip("transformers")
    kinds = pytest.importorskip("transformers.loss.loss_utils").LOSS_MAPPING
    kind = kinds[small_model().loss_type]
    assert kind.__name__ == "ForCausalLMLoss"  # by this the Trainer knows what counts
    pytest.importorskip("accelerate")
    data = [{"input_ids": ids, "labels": ids} for ids in torch.tensor([[80, 81]] * 8)]
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path, per_device_train_batch_size=8, max_steps=1, learning_rate=0.0,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True)
    model = small_model()
    trainer = transformers.Trainer(model, arguments, train_dataset=data,
                                   data_collator=transformers.default_data_collator)
    ids = data[0]["labels"][None]
    assert trainer.train().training_loss == pytest.approx(model(ids, labels=ids).loss.item())


def test_accumulated_gradients_are_those_of_one_large_batch(tmp_path, untrained_folder):
    """An answer in words has fewer labels than one in a picture: a mean of means would differ."""
    (one, _), (two, _) = (
        trained(untrained_folder, tmp_path, epochs=1, per_device_train_batch_size=4 // n,
                gradient_accumulation_steps=n, optim="sgd") for n in (1, 4))
    for a, b in zip(one.parameters(), two.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@needs_compiler
def test_an_adapter_of_the_head_draws_before_it_is_merged():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(small_model(), peft.LoraConfig(target_modules=["lm_head"]))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    ids = torch.tensor([[0, 5, 6]])
    with pytest.raises(ValueError, match="merge_and_unload"):
        generate(model, ids, compile=True)
    plain = generate(small_model(), ids, mode="image", image_temperature=0)
    drawn = generate(model, ids, mode="image", image_temperature=0)
    merged = generate(model.merge_and_unload(), ids, mode="image", image_temperature=0)
    assert torch.equal(drawn, merged) and not torch.equal(drawn, plain)


def test_the_labels_of_a_drawn_picture_become_its_codes(untrained_folder):
    model = ChameleonForConditionalGeneration.from_pretrained(untrained_folder, dtype=torch.float32)
    batch = ChameleonProcessor.from_pretrained(untrained_folder)(
        "Draw a star.", str(ROOT / "examples" / "star.png"), answers="<image>")
    with torch.no_grad():
        loss = model(**batch, mask_image_logits=False).loss
        ids = model.model.replace_image_placeholders(batch.input_ids, batch.pixel_values)
        logp = model(ids, mask_image_logits=False).logits.log_softmax(-1)
    end = int((batch.labels != -100).sum())  # begin image, codes, end image, </s>
    assert end == model.config.vq_config.codes_per_image + 3
    wanted = -logp[0, -end - 1 : -1].gather(-1, ids[0, -end:, None]).mean()
    torch.testing.assert_close(loss, wanted)

def test_dropout_of_an_adapter_does_not_reach_generate():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        small_model(), peft.LoraConfig(target_modules=["lm_head"], lora_dropout=0.5))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    ids = [model.train(mode).generate(input_ids=torch.tensor([[0, 5, 6]]), max_new_tokens=8,
                                      eos_token_id=[]) for mode in (False, True, True)]
    assert torch.equal(ids[0], ids[1]) and torch.equal(ids[0], ids[2]) and model.training
