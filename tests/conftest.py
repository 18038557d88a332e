"""Fixtures that several test files share, and how many processes run the tests."""

import os
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from small import SIZES, VQ, randomize
from synthetic import write_small_sentencepiece, write_synthetic_tokenizer

from chameleon import ChameleonConfig, ChameleonForConditionalGeneration
from generate import main
from processor import ChameleonImageProcessor, ChameleonProcessor
from tokenizer import load_tokenizer

CORES = os.cpu_count() or 1
THREADS = max(1, CORES // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
torch.set_num_threads(THREADS)  # several processes share the cores
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))  # in subprocesses, too


# Files that take long begin first, so that no process is left alone with one at the end.
LONG = ("train", "decoding", "large", "cuda_report", "shape_comments", "parallel", "command",
        "chat", "mutations", "chameleon")


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # xdist would begin with the most tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}.py": n for n, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))


@pytest.hookimpl(optionalhook=True)  # there may be no xdist
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Whole folders of tests run in up to four processes, named files and tests in this one."""
    return min(4, CORES) if all(Path(name).is_dir() for name in config.args) else 0


@pytest.fixture
def signals():
    """Ctrl-C and SIGTERM as at the start of a program; a job in the background ignores Ctrl-C."""
    new = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in new.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory):
    """A folder with a small tokenizer.json of the release's pipeline and layout, codes permuted."""
    folder = tmp_path_factory.mktemp("bpe")
    write_synthetic_tokenizer(folder, num_codes=64, num_merges=400, shuffled_codes=True)
    return folder


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory):
    """A folder with a small tokenizer.model, trained as the project's own checkpoint's is."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    write_small_sentencepiece(folder)
    return folder


@pytest.fixture(scope="session")
def bpe(bpe_folder):
    return load_tokenizer(bpe_folder)


@pytest.fixture(scope="session")
def sentencepiece_tokenizer(sentencepiece_folder):
    return load_tokenizer(sentencepiece_folder)


@pytest.fixture(params=["bpe", "sentencepiece_tokenizer"])
def either(request):
    """Both formats of tokenizer, one after the other."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def untrained_folder(tmp_path_factory):
    """A whole checkpoint folder with random weights: 16x16 pictures of 16 codes, 64 codes."""
    folder = tmp_path_factory.mktemp("untrained")
    write_small_sentencepiece(folder)
    tokenizer = load_tokenizer(folder)
    torch.manual_seed(0)
    vq = dict(VQ, resolution=16)
    config = ChameleonConfig(**(SIZES | dict(
        vocab_size=tokenizer.vocab_size, vocabulary_map=tokenizer.vocab, vq_config=vq)))
    model = ChameleonForConditionalGeneration(config)
    randomize(model)
    model.save_pretrained(folder)
    pictures = ChameleonImageProcessor(size=16, crop_size=16)
    ChameleonProcessor(pictures, tokenizer, image_seq_length=16).save_pretrained(folder)
    return folder


@pytest.fixture
def run(untrained_folder, tmp_path, monkeypatch, capsys):
    """Runs the command in a folder with a picture -> exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (20, 30), "red").save(tmp_path / "red.png")

    def command(*arguments: str, model=untrained_folder):
        try:
            code = main(["--model", str(model), "--device", "cpu", *arguments])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return command
