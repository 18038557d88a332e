"""The benchmark runs, and gives no time to a row that is wrong."""

import re
import sys
from pathlib import Path

import benchmark
import measuring
import pytest
import torch

import generate
from chameleon_extras import decoding
from chameleon_extras.decoding import Decoder

TOY = ("--size", "toy", "--rounds", "1", "--tokens", "5", "--device", "cpu")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_it_prints_a_line_for_every_row(capsys):
    assert benchmark.main([*TOY, "--only", "transformers,ours,int8,int4,encode,decode"]) == 0
    out = capsys.readouterr().out
    assert "1 thread(s), process time; torch" in out and "memory reads" in out
    rows = re.findall(r"^\| ([a-z]\S*|VQ .*?) \|", out, re.M)
    assert [row for row in rows if row not in ("writing", "what")] == [
        "transformers", "ours", "int8", "int4",
        "VQ encode 32x32, transformers", "VQ encode 32x32",
        "VQ decode 32x32, plain NCHW", "VQ decode 32x32",
        "VQ decode 32x32, bf16", "VQ decode 32x32, as chosen"]


def test_it_prints_the_processor_and_every_measurement_of_a_form(capsys, monkeypatch):
    info = Path("/proc/cpuinfo")
    if info.exists() and "avx2" in info.read_text():
        assert " avx2" in measuring.machine(torch.device("cpu"), 1e9)
    monkeypatch.setattr(decoding, "READ", 2**20)
    monkeypatch.setattr(decoding, "LARGE", 1)
    monkeypatch.setattr(decoding, "OUTPUTS", 2**9)
    decoding.fastest.cache_clear()
    decoding.MEASUREMENTS.clear()
    assert benchmark.main([*TOY, "--only", "ours"]) == 0
    form = r"- \(1, 1024\) @ \(1024, 512\) of bfloat16, GB/s: (oneDNN \d+\.\d, )?torch \d+\.\d\n"
    assert re.search(form, capsys.readouterr().out)
    decoding.fastest.cache_clear()


def test_without_transformers_its_rows_are_left_out(capsys, monkeypatch):
    def version(name):
        raise measuring.PackageNotFoundError(name)

    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(measuring, "version", version)
    assert benchmark.main([*TOY, "--only", "transformers,ours,encode,decode"]) == 0
    out, err = capsys.readouterr()
    assert "transformers not installed" in out and "| ours |" in out and "VQ decode" in out
    assert "| transformers |" not in out and "VQ encode" not in out
    assert "transformers is left out: " in err and "encode is left out: " in err


def test_a_row_that_cannot_run_is_left_out_and_the_others_go_on(capsys, monkeypatch):
    def refuse(model, kind):
        raise ValueError(f"{kind} does not fit")

    monkeypatch.setattr(benchmark, "quantize_model", refuse)
    assert benchmark.main([*TOY, "--only", "int4,ours"]) == 0
    out, err = capsys.readouterr()
    assert "| ours |" in out and "| int4 |" not in out
    assert "int4 is left out: int4 does not fit" in err


@pytest.mark.parametrize("row", ["text", "codes"])
def test_a_wrong_row_gets_no_time(row, capsys, monkeypatch):
    if row == "text":  # another id at one of the steps
        def wrong(*arguments, **options):
            for n, ids in enumerate(generate.stream(*arguments, **options)):
                yield ids if n != 2 else ids + 1

        monkeypatch.setattr(benchmark, "stream", wrong)
        assert benchmark.main([*TOY, "--only", "ours"]) == 2
    else:
        real = benchmark.ChameleonVQVAE.encode
        monkeypatch.setattr(benchmark.ChameleonVQVAE, "encode",
                            lambda self, pixels: (real(self, pixels) + 1) % 64)
        assert benchmark.main([*TOY, "--only", "encode"]) == 2
    out, err = capsys.readouterr()
    assert "| ours |" not in out and "VQ encode" not in out
    assert ("computes something else" if row == "text" else "codes are wrong") in err


@pytest.mark.parametrize("options, message", [
    (("--only", "fast"), "none of transformers"),
    (("--rounds", "0"), "at least 1"),
    (("--tokens", "1"), "at least 2"),
    (("--size", "7b", "--device", "cpu"), "is for CUDA"),
])
def test_options_that_cannot_work_are_named(options, message, capsys):
    assert benchmark.main([*TOY, *options]) == 2
    assert message in capsys.readouterr().err


def test_equal_rows_are_the_same_computation():
    """What the judge lets pass: our loop with and without a Decoder writes the same ids."""
    model = benchmark.random_model(benchmark.make_config(benchmark.SIZES["toy"]),
                                   torch.device("cpu"))
    prompt = torch.randint(80, 500, (1, 20), generator=torch.Generator().manual_seed(0))
    one, other = (torch.cat(list(generate.stream(model, prompt, max_new_tokens=6, decoder=d)))
                  for d in (False, Decoder(model)))
    assert torch.equal(one, other)
