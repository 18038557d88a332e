"""What the README says is so: commands and their output, files, names, counts, the walk's shapes.

`python tests/test_readme.py` prints the table of "One prompt, walked" anew."""

import ast
import contextlib
import io
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # when it is run as a script

import benchmark  # noqa: E402

import generate as module  # noqa: E402
import train  # noqa: E402
from chameleon_extras import command, convert, explain  # noqa: E402
from processor import load_image  # noqa: E402
from tiny_world import evaluate, figures  # noqa: E402
from vqvae import ChameleonVQVAEConfig  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = ("", "chameleon_extras", "tiny_world")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))
           if path.name != "__init__.py"]


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def table(title: str) -> list[list[str]]:
    """The cells of a section's table, row by row, without its head."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [row for row in rows[1:] if set(row[0]) - set("-")]


# ---------------------------------------------------------------------------------------------
# Commands and what they print


def transcripts() -> list[tuple[str, str]]:
    """The console blocks: each "$ python generate.py ..." line and what stands below it."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", README, re.S):
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            command, _, output = part.partition("\n")
            found.append((command, output))
    first = re.search(r"```bash\npip install -e \. && (.*?)\n```\n```\n(.*?)```", README, re.S)
    return [*found, first.groups()]


def test_there_are_transcripts():
    assert len(transcripts()) >= 5


@pytest.mark.parametrize("command, output", transcripts())
def test_a_command_prints_what_the_readme_shows(command, output, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    assert words[:2] == ["python", "generate.py"]
    if "--out" in words:  # pictures go elsewhere, so that a test leaves no file behind
        place = words.index("--out") + 1
        words[place] = str(tmp_path / Path(words[place]).name)
    assert module.main([*words[2:], "--device", "cpu"]) == 0
    printed = capsys.readouterr().out.replace(str(tmp_path) + "/", "")
    assert printed == output


def test_answers_quoted_in_tables_are_those_of_the_transcripts():
    answers = {output.strip() for _, output in transcripts()}
    compare = re.search(r'^\| `circle\.png` \|.*\| "(.*?)" \|$', README, re.MULTILINE)
    assert compare[1] in answers


def test_the_python_example_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    exec(compile(code, "README.md", "exec"), {})
    assert "What do you see in this image?" in capsys.readouterr().out


def help_of(main) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        main(["--help"])
    return printed.getvalue()


PROGRAMS = {
    "generate.py": module.main, "train.py": train.main, "-m chameleon_extras.convert": convert.main,
    "-m tiny_world.figures": figures.main, "tests/benchmark.py": benchmark.main,
}  # fmt: skip


def commands() -> list[tuple[str, str]]:
    """(program, arguments) of all commands of the README, those inside sentences included."""
    text = re.sub(r"```(?:bash|console)\n(.*?)```", lambda b: b[1].replace("\n", "`\n`"), README,
                  flags=re.S)
    names = "|".join(re.escape(name) for name in PROGRAMS)
    return re.findall(rf"(?:python |nproc-per-node \S+ )({names})([^`\n]*)", text)


def test_every_option_that_is_named_exists():
    known = {name: help_of(main) for name, main in PROGRAMS.items()}
    assert {program for program, _ in commands()} == set(PROGRAMS)
    for program, arguments in commands():
        for option in re.findall(r"--[a-z][a-z-]*", arguments.split(" #")[0]):
            assert f"{option} " in known[program] or f"{option}\n" in known[program], option
    everywhere = "".join(known.values())
    for option in re.findall(r"`(--[a-z][a-z0-9-]*)[` ]", README):
        assert option in everywhere, option


def test_the_commands_of_generate_are_understood():
    """By the real parser: wrong values of options, too, would be refused."""
    for program, arguments in commands():
        words = shlex.split(arguments, comments=True)
        if program == "generate.py" and words and "..." not in words:
            options = command.parse(words)
            assert all((ROOT / path).is_file() for path in options.image)


# ---------------------------------------------------------------------------------------------
# Files and names


def test_every_source_file_has_its_place_in_the_reading_order():
    named = set(re.findall(r"`([\w/]+\.py)`", section("Reading order")))
    assert named == {str(path.relative_to(ROOT)) for path in SOURCES}


def test_every_picture_and_file_the_readme_names_is_there():
    for name in re.findall(r"\b(?:examples|tests|tiny|engine|training)/[\w./-]+\w", README):
        assert (ROOT / name).exists(), name


def definitions(path: Path) -> set[str]:
    """Functions, classes and methods of a file: {"f", "Class", "Class.f"}."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{f.name}" for f in node.body if isinstance(f, ast.FunctionDef)}
    return found


def test_every_function_that_is_named_with_its_file_is_in_that_file():
    pairs = re.findall(r"`([\w/]+\.py)`[,:]? `([A-Za-z_][\w.]*)`", README)
    pairs += [(file, name) for names, file in re.findall(
        r"`([A-Z]\w+)`\s+(?:in|of)\s+`([\w/]+\.py)`", README) for name in [names]]
    assert len(pairs) > 40
    for file, name in pairs:
        assert name in definitions(ROOT / file), f"{file} has no {name}"
    for name in re.findall(r"`([A-Z]\w+\.[a-z]\w+)`", README):  # Class.method without a file
        assert any(name in definitions(path) for path in SOURCES), name


def test_every_name_stands_somewhere_in_the_code():
    words = set(re.findall(r"\w+", " ".join(path.read_text(encoding="utf-8") for path in SOURCES)))
    for name in re.findall(r"`([A-Za-z_]\w*)`", README):
        assert name in words or (ROOT / name).exists(), name
    for module_name in re.findall(r", from `([\w.]+)`", README):
        assert (ROOT / f"{module_name.replace('.', '/')}.py").is_file(), module_name


def test_every_test_that_is_named_exists():
    for file, name in re.findall(r"`(tests/\w+\.py)::(\w+)`", README):
        assert name in definitions(ROOT / file), f"{file}::{name}"


def test_imports_that_are_named_work():
    for line in set(re.findall(r"`(from (?!transformers)[\w.]+ import [\w, ]+)`", README)):
        exec(line, {})


def test_differences_are_listed_one_by_one_and_counted():
    count = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("DIFFERS")
             for path in SOURCES}  # fmt: skip
    assert f"{sum(count.values())} places" in README
    listed = [file.strip("`") for file, _ in table("Where it differs")]
    assert {file: n for file, n in count.items() if n} == {f: listed.count(f) for f in listed}


def test_ci_runs_exactly_the_readmes_test_line():
    line = 'pip install -e ".[test]" && pytest'
    assert f"```bash\n{line}\n```" in README
    last = (ROOT / ".ci" / "run").read_text().strip().splitlines()[-1]
    assert last.replace(" --quiet", "") == line


def test_what_is_to_be_copied_alone_needs_only_what_is_said():
    for source, needs, use in table("To copy alone"):
        file, names = re.match(r"`([\w/]+\.py)`(?:: (.*))?", source).groups()
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        words = needs.replace("`", "").replace(".py", "")
        said = {*re.findall(r"\w+", words.replace("pillow", "PIL")), "torch"}
        if names:  # functions: alone with torch, they run
            kept = [node for node in tree.body if isinstance(node, ast.FunctionDef)
                    and node.name in re.findall(r"\w+", names)]
            source = "import torch\nimport torch.nn.functional as F\nfrom torch import Tensor\n"
            source += ast.unparse(ast.Module(kept, []))
        else:
            used = {name.split(".")[0] for node in ast.walk(tree) for name in imported(node)}
            assert used - sys.stdlib_module_names <= said, file
            source = f"import torch\nfrom PIL import Image\nfrom {Path(file).stem} import *"
        space = {}
        exec(source, space)
        assert eval(use.strip("`"), space) is not None


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [name.name for name in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) else []


# ---------------------------------------------------------------------------------------------
# Numbers


def test_the_released_sizes_are_those_of_the_config():
    c = ChameleonVQVAEConfig()
    said = f"a picture of {c.resolution} x {c.resolution} is {c.codes_per_image} codes of "
    assert said + str(c.num_embeddings) in README
    assert f"Why is a picture {c.codes_per_image} tokens?" in README
    assert f"+ {train.Z_LOSS:.0e}".replace("e-0", "e-") + " log^2 Z" in README


def test_the_tiny_checkpoint_is_as_large_as_is_said():
    model, _ = evaluate.load(ROOT / "tiny")
    vq, c = model.model.vqmodel, model.config.vq_config
    sizes = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (model, vq)]
    files = sum(file.stat().st_size for file in (ROOT / "tiny").iterdir())
    said = (f"{sizes[0] - sizes[1]:.1f} M parameters of decoder, {sizes[1]:.1f} M of VQ-VAE; "
            f"{c.resolution}x{c.resolution} pictures of {c.codes_per_image} codes; "
            f"{files / 1e6:.0f} MB in bf16")
    assert said in " ".join(README.split())


def walk_table() -> str:
    """The table of "One prompt, walked", from a real run on tiny/."""
    picture, prompt = ROOT / "examples" / "shapes.png", "What do you see in this image?<image>"
    model, processor = evaluate.load(ROOT / "tiny")
    inputs = processor(text=prompt, images=load_image(picture), return_tensors="pt")
    pixels = inputs["pixel_values"]
    walk = explain.walk(model, processor.tokenizer, inputs["input_ids"], pixels)
    shape = {name.split(".")[-1]: size for name, _, size in reversed(walk.shapes)}
    _, first, end = walk.segments[1]
    tokens, c, S = walk.tokens, model.config, end - first
    T, texts = len(tokens), [token for token in tokens[:first] if token.kind == "text"]
    some = lambda items: " ".join(map(str, items)) + " ..."  # noqa: E731
    rows = [
        ("text", "`tokenizer.py` `Tokenizer.encode`",
         " ".join(t.name for t in texts) + " = " + " ".join(str(t.id) for t in texts)),
        ("one row", "`processor.py` `ChameleonProcessor.layout`",
         f"(1, {T}): {tokens[0].name}, {len(texts)} of text, {tokens[first - 1].name}, {S} times "
         f"<image>, {tokens[end].name}, {tokens[-1].name}"),
        ("pixels", "`image_processor.py` `ChameleonImageProcessor.prepare`",
         f"{tuple(pixels.shape)}, {pixels.min():.3f} to {pixels.max():.3f}"),
        ("features", "`vqvae.py` `ChameleonVQVAE.encode`", shape["quant_conv"]),
        ("nearest codes", "`vqvae.py` `VectorQuantizer.nearest`",
         f"(1, {S}): {some(walk.codes[0].flatten()[:6].tolist())}"),
        ("their ids, by name", "`tokenizer.py` `VocabularyMap`",
         f"(1, {S}): {some(t.id for t in tokens[first:first + 6])}"),
        ("embeddings", "`chameleon.py` `ChameleonModel.forward`", shape["embed_tokens"]),
        ("angles", "`chameleon.py` `rotary_table`", (1, 1, T, c.head_dim)),
        ("who sees whom", "`chameleon.py` `allowed_keys`",
         f"causal: {int(walk.allowed.sum())} of {T * T} pairs"),
        ("queries, normed", "`chameleon.py` `ChameleonLayerNorm.forward`", shape["q_norm"]),
        ("what a layer's attention adds", "`chameleon.py` `ChameleonAttention.forward`",
         shape["o_proj"]),
        ("inside its feed-forward", "`chameleon.py` `ChameleonMLP.forward`", shape["gate_proj"]),
        (f"behind {c.num_hidden_layers} layers and the last norm",
         "`chameleon.py` `ChameleonModel.forward`", shape["norm"]),
        ("logits of the last place", "`sampling.py` `Picker`", shape["lm_head"]),
        ("the most likely id", "`sampling.py` `choose`",
         f"{walk.best[0][0]}, which is {walk.best[0][1]}"),
        ("back to text", "`tokenizer.py` `StreamDecoder.feed`",
         repr(processor.tokenizer.decode([walk.best[0][0]]))),
    ]
    lines = ["| step | code | what it is here |", "|---|---|---|"]
    for step, code, what in rows:
        what = str(what).replace("<", "&lt;").replace(">", "&gt;")
        lines.append(f"| {step} | {code} | {what} |")
    return "\n".join(lines)


def test_the_walk_is_what_happens():
    assert walk_table() in README, "python tests/test_readme.py prints what it should be"


# ---------------------------------------------------------------------------------------------
# Figures


def test_figures_are_small_and_can_be_read_on_light_and_dark():
    files = [path for path in (ROOT / "examples").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2 * 10**6
    for path in files:
        if path.suffix == ".svg":
            text = path.read_text(encoding="utf-8")
            assert "prefers-color-scheme:dark" in text or figures.GRAY in text, path.name


if __name__ == "__main__":
    print(walk_table())
