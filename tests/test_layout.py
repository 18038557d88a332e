"""The files: what lies where, who imports whom, how long they are, and whose names they meet."""

import ast
import shutil
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = ["vqvae", "tokenizer", "chameleon", "processor", "generate"]  # each may import those before
ORDER = [*CORE, "train"]
FOLDERS = ["chameleon_extras", "tiny_world"]
SOURCES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path
           for folder in ("", *FOLDERS) for path in sorted((ROOT / folder).glob("*.py"))}

TOP = {f"{name}.py" for name in ORDER} | {
    *FOLDERS, "tests", "tiny", "examples", "README.md", "pyproject.toml", "LICENSE", "CITATION.cff"}
# What the core imports inside functions, so that a reader of the model meets no files and commands.
LATE = {
    **{(module, name): "chameleon_extras" for module in CORE
       for name in ("from_pretrained", "save_pretrained", "set_attn_implementation",
                    "resize_token_embeddings")},
    ("chameleon", "generate"): "generate chameleon_extras.pretrained",
    ("generate", "main"): "chameleon_extras.command",
    ("generate", "stream"): "chameleon_extras.decoding",
    ("generate", "decode_pictures"): "chameleon_extras.decoding",
}
LINES = {"chameleon.py": 909, "generate.py": 775, "README.md": 220}
ALL_LINES, ALL_FILES = 10_922, 29


def own_modules(node: ast.stmt) -> list[str]:
    """An import -> the files of this repository that it names."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:  # "from a import b": b is a file, or a name in the file a
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        names = [name if name in SOURCES else node.module for name in names]
    return [name for name in names if name in SOURCES or name in FOLDERS]


@cache
def imports(module: str) -> tuple[list[ast.stmt], list[tuple[str, ast.stmt]]]:
    """-> imports at module level, and (name of the function, import) of all others."""
    early, late = [], []

    def walk(node: ast.AST, function: str | None) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.Import, ast.ImportFrom)):
                late.append((function, child)) if function else early.append(child)
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
            walk(child, child.name if inside else function)

    walk(ast.parse(SOURCES[module].read_text(encoding="utf-8")), None)
    return early, late


GRAPH = {module: {name for node in imports(module)[0] for name in own_modules(node)}
         for module in SOURCES}


def test_the_repository_holds_these_names_and_no_others():
    git = shutil.which("git")
    listed = git and subprocess.run([git, "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if not listed or listed.returncode or not listed.stdout:
        pytest.skip("not a clone")
    names = {Path(line).parts[0] for line in listed.stdout.splitlines()}
    assert {name for name in names if not name.startswith(".")} == TOP


def test_no_file_imports_one_that_comes_after_it():
    try:
        list(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        pytest.fail(f"a cycle: {' imports '.join(reversed(error.args[1]))}")
    for place, module in enumerate(ORDER):
        own = {name for name in GRAPH[module] if name.split(".")[0] not in FOLDERS}
        assert own <= set(ORDER[:place]), module


def test_the_core_knows_nothing_of_what_stands_around_it():
    for module in CORE:
        assert not [name for name in GRAPH[module] if name.split(".")[0] in FOLDERS], module
        lines = SOURCES[module].read_text(encoding="utf-8").splitlines()
        for function, node in imports(module)[1]:
            for name in own_modules(node):
                allowed = LATE.get((module, function), "nothing").split()
                assert any(name == one or name.startswith(f"{one}.") for one in allowed), (
                    f"{module}.{function}")
                above = node.lineno - 2
                while lines[above].lstrip().startswith(("from ", "import ")):
                    above -= 1  # one comment for a group
                why = "#" in lines[node.end_lineno - 1] or lines[above].lstrip().startswith("#")
                assert why, f"{module}.{function} does not say why it imports {name} so late"


def test_the_small_world_is_imported_by_its_training_alone():
    users = {module for module in SOURCES for node in
             [*imports(module)[0], *(node for _, node in imports(module)[1])]
             if any(name.split(".")[0] == "tiny_world" for name in own_modules(node))}
    assert {module.split(".")[0] for module in users} == {"train", "tiny_world"}
    assert not [module for module in SOURCES if "train" in GRAPH[module]]


def test_what_is_not_required_is_never_imported_at_the_top():
    for module in SOURCES:
        named = {(alias.name if isinstance(node, ast.Import) else node.module).split(".")[0]
                 for node in imports(module)[0] for alias in node.names}
        assert not named & {"transformers", "tokenizers", "bitsandbytes", "peft",
                                "gradio"}, module


@pytest.mark.parametrize("name", LINES)
def test_what_is_read_first_is_short(name):
    lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
    assert lines <= LINES[name]


def test_all_of_it_can_be_read():
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES.values())
    assert lines <= ALL_LINES and len(SOURCES) <= ALL_FILES


@pytest.mark.parametrize("module", [name for name in SOURCES if name.startswith("chameleon_extras.")
                                    and not name.endswith("__init__")])
def test_every_extra_says_who_needs_it(module):
    docstring = ast.get_docstring(ast.parse(SOURCES[module].read_text(encoding="utf-8")))
    assert "Who needs it" in docstring


# A user's program, in a folder of the user's own modules, the repository behind it on sys.path.
PROGRAM = """
import sys
sys.path.append({root!r})
from PIL import Image
from chameleon import ChameleonForConditionalGeneration, ChameleonProcessor

model = ChameleonForConditionalGeneration.from_pretrained({tiny!r})
processor = ChameleonProcessor.from_pretrained({tiny!r})
inputs = processor("What do you see in this image?<image>", Image.open({picture!r}))
ids = model.generate(**inputs, max_new_tokens=50)
print(processor.batch_decode(ids[:, inputs["input_ids"].shape[1]:], True)[0])

from generate import decode_pictures, main
ids = model.generate(**processor("Draw a blue star."), mode="image")
S = model.config.vq_config.codes_per_image
print(decode_pictures(model, ids[:, -S - 1 : -1])[0].size)
model.save_pretrained("mine")
processor.save_pretrained("mine")
sys.exit(main(["--model", "mine", "--prompt", "Draw a star.", "--mode", "image", "--out", "a.png"]))
"""
THEIRS = ["config.py", "sampling.py", "modality.py", "image_processor.py", "utils.py", "train.py",
          "engine/__init__.py", "training/__init__.py"]


def test_a_users_own_modules_are_never_taken_for_ours(tmp_path):
    for name in THEIRS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"raise ImportError('{name} is the user\\'s')")
    program = PROGRAM.format(root=str(ROOT), tiny=str(ROOT / "tiny"),
                             picture=str(ROOT / "examples" / "shapes.png"))
    (tmp_path / "program.py").write_text(program)
    run = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, capture_output=True,
                         text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        "A small red circle above a large blue square on a white background.", "(36, 36)"]
    assert (tmp_path / "a.png").is_file()
