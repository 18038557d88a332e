"""README.md, tiny/README.md and tests/BENCHMARK.md: commands, their output, names and numbers.

`python tests/test_readme.py` prints the table of "One prompt, walked" anew."""

import ast
import contextlib
import io
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # when it is run as a script

import benchmark  # noqa: E402
import cuda_code  # noqa: E402
import cuda_report  # noqa: E402
import figures  # noqa: E402
import image_head  # noqa: E402

import generate as module  # noqa: E402
import train  # noqa: E402
from chameleon_extras import command, convert, explain  # noqa: E402
from processor import load_image  # noqa: E402
from tiny_world import evaluate, vqvae_stage  # noqa: E402
from tiny_world.documents import Corpus  # noqa: E402
from vqvae import ChameleonVQVAEConfig  # noqa: E402

pytestmark = pytest.mark.docs

PAGES = {name: (ROOT / name).read_text(encoding="utf-8")
         for name in ("README.md", "tiny/README.md", "tests/BENCHMARK.md")}  # fmt: skip
README, CARD, BENCHMARK = PAGES.values()
ALL = "\n".join(PAGES.values())
SOURCES = [path for folder in ("", "chameleon_extras", "tiny_world")
           for path in sorted((ROOT / folder).glob("*.py")) if path.name != "__init__.py"]


def section(title: str, page: str) -> str:
    return page.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(page: str) -> list[list[str]]:
    """The cells of all table rows of a page or section, heads included."""
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [row for row in cells if set("".join(row)) - set("-: ")]


def code_lines() -> list[str]:
    """What is set as code: each line of a bash or console block, and what stands in backticks."""
    blocks = re.findall(r"^```(?:bash|console)\n(.*?)^```", ALL, re.S | re.M)
    text = re.sub(r"^```.*?^```", "", ALL, flags=re.S | re.M)
    spans = re.findall(r"`([^`]+)`", re.sub(r"\n(?=[^\n])", " ", text))
    return [line for block in blocks for line in block.splitlines()] + spans


# ---------------------------------------------------------------------------------------------
# Commands and what they print


def transcripts() -> list[tuple[str, str]]:
    """(command, output): those of console blocks, and the first command of README.md."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", ALL, re.S):
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            line, _, output = part.partition("\n")
            found.append((line, output))
    first = re.search(r"```bash\npip install -e \. && (.*?)\n```\n```\n(.*?)```", README, re.S)
    return [*found, first.groups()]


@pytest.mark.parametrize("line, output", transcripts())
def test_a_command_prints_what_is_shown(line, output, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)
    assert words[:2] == ["python", "generate.py"] and "--out" not in words
    assert module.main([*words[2:], "--device", "cpu"]) == 0
    assert capsys.readouterr().out == output


def test_the_answer_quoted_in_a_table_is_that_of_a_transcript():
    compare = re.search(r'^\| `drawing\.png` \|.*\| "(.*?)" \|$', README, re.MULTILINE)
    assert compare[1] in {output.strip() for _, output in transcripts()}


def test_the_python_examples_run(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    generation, training = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(generation, "README.md", "exec"), {})
    assert "What do you see in this image?" in capsys.readouterr().out
    torch.manual_seed(0)
    exec(compile(training, "README.md", "exec"), space := {})
    model, processor = space["model"].eval(), space["processor"]
    picture = load_image(ROOT / "examples" / "star.png")
    assert space["loss"] < 0.5
    assert evaluate.answer(model, processor, [[["What is this?", picture]]]) == ["A zebra."]


PROGRAMS = {
    "generate.py": module.main, "train.py": train.main, "-m chameleon_extras.convert": convert.main,
    "tests/figures.py": figures.main, "tests/benchmark.py": benchmark.main,
    "tests/cuda_report.py": cuda_report.main, "tests/image_head.py": image_head.main,
    "tests/cuda_code.py": cuda_code.main,
}  # fmt: skip


def commands() -> list[tuple[str, list[str]]]:
    """(program, its arguments) of every command of the three pages."""
    pattern = r"(?:\bpython|torchrun --nproc-per-node \S+) (-m [\w.]+|[\w/]+\.py)(.*)"
    found = [re.search(pattern, line) for line in code_lines()]
    return [(m[1], shlex.split(m[2], comments=True)) for m in found if m]


def help_of(main) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        main(["--help"])
    return printed.getvalue()


def test_every_option_that_is_named_exists():
    known = {name: set(re.findall(r"--[a-z][a-z0-9-]*", help_of(main)))
             for name, main in PROGRAMS.items()}  # fmt: skip
    assert {program for program, _ in commands()} == set(PROGRAMS)
    for program, words in commands():
        assert {word for word in words if word.startswith("--")} <= known[program], words
    named = re.findall(r"--[a-z][a-z0-9-]*", " ".join(code_lines()))
    assert set(named) <= set.union(*known.values()) | {"--nproc-per-node"}


def test_the_commands_are_understood_by_their_parsers():
    for program, words in commands():
        if program == "generate.py" and words and "..." not in words:
            assert all((ROOT / path).is_file() for path in command.parse(words).image)
        if program == "train.py" and words:
            train.parse(words)
        if program == "tests/benchmark.py" and "7b" not in words:  # that one needs CUDA
            benchmark.parse(words)


def test_what_the_commands_write_is_ignored_by_git():
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    written = [f"{figures.OUT}/x"]
    for _, words in commands():
        out = words[words.index("--out") + 1] if "--out" in words else "FOLDER"
        if not out.isupper() and "evaluate" not in words:  # which reads --out
            written.append(out if Path(out).suffix else f"{out}/x")
    assert len(written) >= 7
    done = subprocess.run(["git", "check-ignore", *written], cwd=ROOT, capture_output=True,
                          text=True)
    assert set(done.stdout.split()) == set(written)


def test_ci_runs_exactly_the_readmes_test_line():
    line = 'pip install -e ".[test]" && pytest'
    assert f"```bash\n{line}\n```" in README
    last = (ROOT / ".ci" / "run").read_text().strip().splitlines()[-1]
    assert last.replace(" --quiet", "") == line


# ---------------------------------------------------------------------------------------------
# Files and names


def definitions(path: Path) -> set[str]:
    """Functions, classes and methods of a file: {"f", "Class", "Class.f"}."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{f.name}" for f in node.body if isinstance(f, ast.FunctionDef)}
    return found


def test_every_source_file_has_its_place_in_the_reading_order():
    named = []
    for place, what in rows(section("Reading order", README))[1:]:
        place = place.strip("`")
        files = re.findall(r"`(\w+\.py)`", what)
        named += [place + file for file in files] if place.endswith("/") else [place]
    assert sorted(named) == sorted(path.relative_to(ROOT).as_posix() for path in SOURCES)


def test_every_file_and_link_is_there():
    for name in re.findall(r"(?<!\w)(?:examples|tests|tiny|tiny_world|chameleon_extras)/[\w./-]*\w",
                           ALL):
        assert (ROOT / name).exists(), name
    for page, text in PAGES.items():
        for link in re.findall(r'(?:\]\(|src=")([^)"#]+)', text):
            assert link.startswith("https://") or (ROOT / page).parent.joinpath(link).exists(), link


def test_every_function_is_in_the_file_it_is_named_with():
    pairs = re.findall(r"`([\w/]+\.py)`[,:]? `([A-Za-z_]\w*(?:\.[a-z_]\w*)?)`", ALL)
    pairs = [(file, name) for file, name in pairs if not name.endswith(".py")]
    pairs += [(file, name) for name, file in re.findall(
        r"`([A-Za-z]\w+)`\s+(?:in|of)\s+`([\w/]+\.py)`", ALL)]
    assert len(pairs) > 30
    for file, name in pairs:
        if name not in definitions(ROOT / file):
            source = (ROOT / file).read_text(encoding="utf-8")
            assert re.search(rf"^ *{name}\b.* = ", source, re.MULTILINE), f"{file} has no {name}"
    everywhere = set.union(*map(definitions, SOURCES))
    for name in re.findall(r"`([A-Z][a-z]\w+\.[a-z]\w+)`", ALL):  # Class.method without a file
        assert name in everywhere, name


def test_every_other_name_stands_somewhere_in_the_code():
    files = [*SOURCES, ROOT / "tests" / "benchmark.py"]
    words = set(re.findall(r"\w+", " ".join(path.read_text(encoding="utf-8") for path in files)))
    for name in re.findall(r"`([A-Za-z_]\w*)`", ALL):
        assert name in words or (ROOT / name).exists(), name


def test_every_test_that_is_named_exists():
    for file, name in re.findall(r"`(tests/\w+\.py)::(\w+)`", ALL):
        assert name in definitions(ROOT / file), f"{file}::{name}"


def test_the_command_that_lists_the_differences_finds_those_that_are_named():
    line = re.search(r'`(grep .*? "DIFFERS" .*?)`', README)[1]
    found = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True).stdout
    files = {place.split(":")[0] for place in found.splitlines()}
    assert files == {path.relative_to(ROOT).as_posix() for path in SOURCES
                     if "DIFFERS" in path.read_text(encoding="utf-8")}
    named = re.findall(r"^- `(\w+\.py)`:", section("Equations and code", README), re.MULTILINE)
    assert len(named) == 5 and set(named) <= files


def test_the_file_to_copy_alone_needs_nothing_but_torch_and_two_functions_are_excepted():
    assert ("copy `vqvae.py` alone: it needs nothing but torch, except for `from_pretrained` and "
            "`save_pretrained`") in " ".join(README.split())
    excepted = ("from_pretrained", "save_pretrained")
    used, nodes = set(), [ast.parse((ROOT / "vqvae.py").read_text(encoding="utf-8"))]
    for node in nodes:
        if isinstance(node, ast.Import):
            used |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            used.add(node.module.split(".")[0])
        nodes += [n for n in ast.iter_child_nodes(node) if getattr(n, "name", "") not in excepted]
    assert used - sys.stdlib_module_names == {"torch"}


def test_version_licence_and_range_of_torch_are_the_packages():
    cited = dict(re.findall(r"^(\w+): (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cited["version"] == project["version"] and cited["license"] == project["license"]
    torch_range = re.match(r"torch>=2.(\d+),<2.(\d+);", project["dependencies"][0])
    oldest, end = map(int, torch_range.groups())
    assert f"torch 2.{oldest} to 2.{end - 1}." in README and f'"torch<2.{end}"' in README


# ---------------------------------------------------------------------------------------------
# Numbers


def test_a_newcomer_can_finish_the_readme():
    assert len(README.splitlines()) <= 220


def test_sizes_are_those_of_the_configs():
    c = ChameleonVQVAEConfig()
    assert f"Why is a picture {c.codes_per_image} tokens?" in README
    assert f"+ {train.Z_LOSS:.0e}".replace("e-0", "e-") + " log^2 Z" in README
    model, _ = evaluate.load(ROOT / "tiny")
    vq, c = model.model.vqmodel, model.config.vq_config
    sizes = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (model, vq)]
    files = sum(file.stat().st_size for file in (ROOT / "tiny").iterdir())
    said = (f"{sizes[0] - sizes[1]:.1f} M parameters of decoder, {sizes[1]:.1f} M of VQ-VAE; "
            f"{c.resolution}x{c.resolution} pictures of {c.codes_per_image} codes; "
            f"{files / 1e6:.0f} MB in bf16")
    assert said in " ".join(README.split()) and said in " ".join(CARD.split())


def test_the_measured_counts_are_those_of_the_tests():
    def length(file: str, name: str) -> int:
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        value = next(node.value for node in tree.body
                     if isinstance(node, ast.Assign) and node.targets[0].id == name)
        return len(value.keys if isinstance(value, ast.Dict) else value.elts)

    measured = section("Measured", README)
    assert len(rows(measured)) == 1 + 6
    assert f"{length('test_oracle.py', 'CONFIGS')} configurations" in measured
    assert f"{length('test_image_processor.py', 'MODES')} picture modes" in measured
    for number, written, file in (("20,000", "20_000", "tokenizer"), ("2e-5", "=2e-5", "oracle"),
                                  ("1e-5", "=1e-5", "convert")):  # fmt: skip
        assert number in measured and written in (
            ROOT / "tests" / f"test_{file}.py").read_text(encoding="utf-8")


def test_the_model_card_has_the_rows_of_the_evaluation_and_its_numbers_are_quoted_right():
    head = ["200 questions each (guided: 50)", "ordinary", "held-out"]
    after = rows(section("Results", CARD))
    after = after[after.index(head) + 1 :]
    drawings = [row + guided for row in evaluate.DRAWINGS for guided in ("", ", guided, best of 4")]
    names = ["codes: colour and shape survive", *evaluate.ROWS, *drawings]
    table = {name: numbers for name, *numbers in after[: len(names)]}
    assert list(table) == names

    quoted = re.findall(r"\d[\d.]* %", section("The tiny checkpoint", README))
    kinds = "caption of one thing", "drawing of one thing", "edit"
    assert [n.replace(" ", "") for n in quoted] == [n for kind in kinds for n in table[kind]]
    for kind in ("two pictures: which", "drawing of two", "edit"):
        for right in table[kind]:
            assert f"{100 - float(right.rstrip('%')):.1f} %" in section("Limits", CARD)


def test_the_recipe_is_the_training_programs():
    table = {row[0]: row[1] for row in rows(section("How to make it again", CARD))}
    assert table["VQ-VAE"] == f"{vqvae_stage.STEPS:,}"
    assert table["pretraining"] == f"{train.STEPS['pretrain']:,}"
    assert f"A step of the decoder reads {train.ROWS * Corpus.row_tokens:,} tokens" in CARD
    assert table["alignment"] == f"{train.STEPS['sft']:,}"
    assert f"{train.PICTURES:,} pictures" in CARD


def test_the_benchmarks_tables_are_those_that_it_prints():
    tables = rows(BENCHMARK)
    start = tables.index(benchmark.WRITING_HEAD)
    full = {row[0]: row for row in tables[start + 1 : start + 1 + len(benchmark.WRITERS)]}
    assert list(full) == list(benchmark.WRITERS)
    short = rows(section("Speed", README))[1:7]
    for name, *numbers in short:  # tokens/s, ratio, of bandwidth
        row = full[name.split(" ")[0]]
        assert numbers == [row[1], row[2], row[5]], name
    source = (ROOT / "tests" / "benchmark.py").read_text(encoding="utf-8")
    for name, *_ in rows(section("Loading, starting, pictures", BENCHMARK))[1:]:
        assert re.split(r" \d|, ", name)[0] in source, name  # sizes are filled in when it runs


# ---------------------------------------------------------------------------------------------
# The walk


def walk_table() -> str:
    """The table of "One prompt, walked", from a real run on tiny/."""
    picture, prompt = ROOT / "examples" / "shapes.png", "What do you see in this image?<image>"
    model, processor = evaluate.load(ROOT / "tiny")
    inputs = processor(text=prompt, images=load_image(picture), return_tensors="pt")
    pixels = inputs["pixel_values"]
    walk = explain.walk(model, processor.tokenizer, inputs["input_ids"], pixels)
    shape = {name.split(".")[-1]: size for name, _, size in reversed(walk.shapes)}
    _, first, end = walk.segments[1]
    tokens, layers, S = walk.tokens, model.config.num_hidden_layers, end - first
    T, texts = len(tokens), [token for token in tokens[:first] if token.kind == "text"]
    names = processor.tokenizer.vocabulary
    mark = {names.begin_image_id: "begin-image", names.end_image_id: "end-image",
            names.end_of_turn_id: "end of turn"}
    some = lambda items: " ".join(map(str, items)) + " ..."  # noqa: E731
    best = walk.best[0][0]
    steps = [
        ("text", "`tokenizer.py` `Tokenizer.encode`",
         " ".join(t.name for t in texts) + " = " + " ".join(str(t.id) for t in texts)),
        ("one row", "`processor.py` `ChameleonProcessor.prompt_ids`",
         f"(1, {T}): {tokens[0].name}, {len(texts)} of text, {mark[tokens[first - 1].id]}, {S} "
         f"times <image>, {mark[tokens[end].id]}, {mark[tokens[-1].id]}"),
        ("pixels", "`processor.py` `ChameleonImageProcessor.prepare`",
         f"{tuple(pixels.shape)}, {pixels.min():.3f} to {pixels.max():.3f}"),
        ("vectors before quantization", "`vqvae.py` `ChameleonVQVAE.encode`", shape["quant_conv"]),
        ("nearest codes", "`vqvae.py` `VectorQuantizer.nearest`",
         f"(1, {S}): {some(walk.codes[0].flatten()[:6].tolist())}"),
        ("their ids, by name", "`tokenizer.py` `VocabularyMap`",
         f"(1, {S}): {some(t.id for t in tokens[first:first + 6])}"),
        ("who sees whom", "`chameleon.py` `allowed_keys`",
         f"causal: {int(walk.allowed.sum())} of {T * T} pairs"),
        ("queries, normed", "`chameleon.py` `ChameleonLayerNorm.forward`", shape["q_norm"]),
        (f"after {layers} layers and the last norm", "`chameleon.py` `ChameleonModel.forward`",
         shape["norm"]),
        ("logits of the last place", "`generate.py` `Picker`", shape["lm_head"]),
        ("the most likely id", "`generate.py` `choose`",
         f"{best}, which is {processor.tokenizer.decode([best])!r}"),
    ]
    lines = ["| step | code | what it is here |", "|---|---|---|"]
    for step, code, what in steps:
        what = str(what).replace("<", "&lt;").replace(">", "&gt;")
        lines.append(f"| {step} | {code} | {what} |")
    return "\n".join(lines)


def test_the_walk_is_what_happens():
    assert walk_table() in README, "python tests/test_readme.py prints what it should be"


if __name__ == "__main__":
    print(walk_table())
