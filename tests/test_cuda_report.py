"""The report runs from its first part to its last, and goes on where one fails."""

import cuda_report
import pytest
import torch

from chameleon_extras import decoding

TOY = ["--size", "toy", "--device", "cpu"]


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    """torch.compile without the code it would write."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, options=None, **rest: compile_(
        function, backend=lambda graph, _: graph.forward, **rest))
    monkeypatch.setattr(decoding, "check_compile", lambda device: None)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_every_part_prints_its_lines(capsys, monkeypatch):
    monkeypatch.setattr(cuda_report, "KINDS", (None, "int8"))
    assert cuda_report.main([*TOY, "--only", "card,steps,pictures,vqvae,loading,transformers"]) == 0
    out = capsys.readouterr().out
    for line in ("CPU, torch", "reads memory at", "bf16, 1 row(s), plain: ", "% of the bandwidth",
                 "int8, 3 row(s), guided by text and image: ", "int8, 64 codes guided by text: ",
                 "encode 32x32: ", "as it is: ", "transformers, bf16, 1 row: "):
        assert line in out, line
    assert "ends here" not in out


def test_tiny_writes_the_same_ids_every_way(capsys, monkeypatch):
    monkeypatch.setattr(cuda_report, "KINDS", ("int8",))
    cases = cuda_report.tiny_cases()
    assert len(cases) == 5
    monkeypatch.setattr(cuda_report, "tiny_cases", lambda: [cases[0], cases[2]])
    assert cuda_report.main([*TOY, "--only", "tiny"]) == 0
    out = capsys.readouterr().out
    assert out.count("ids equal") == 4 and "DIFFERENT" not in out


def test_a_part_that_fails_or_is_late_is_one_line(capsys, monkeypatch):
    def wrong(self):
        yield "first"
        raise RuntimeError("no such kernel\nand more")

    def slow(self):
        while True:
            torch.ones(10**6).sum()
        yield

    monkeypatch.setattr(cuda_report.Report, "steps", wrong)
    monkeypatch.setattr(cuda_report.Report, "tiny", slow)
    monkeypatch.setitem(cuda_report.PARTS, "tiny", 0.1)
    assert cuda_report.main([*TOY, "--only", "steps,tiny,vqvae"]) == 1
    out = capsys.readouterr().out
    assert "steps ends here: RuntimeError: no such kernel and more\n" in out
    assert "tiny ends here: Late: not done after" in out and "encode 32x32" in out
