"""What the README says is so: commands and their output, files, counts, the test line of CI."""

import re
import shlex
from pathlib import Path

import pytest

import generate as module

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCES = [p for folder in ("", "engine", "training") for p in sorted((ROOT / folder).glob("*.py"))
           if p.name != "__init__.py"]  # fmt: skip


def transcripts() -> list[tuple[str, str]]:
    """The console blocks: each "$ python generate.py ..." line and what stands below it."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", README, re.S):
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            command, _, output = part.partition("\n")
            found.append((command, output))
    return found


def test_there_are_transcripts():
    assert len(transcripts()) >= 4


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


def test_the_python_example_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    exec(compile(code, "README.md", "exec"), {})
    assert "What do you see in this image?" in capsys.readouterr().out


def test_every_source_file_has_its_place_in_the_reading_order():
    table = README.split("## Reading order")[1].split("##")[0]
    named = set(re.findall(r"`([\w/]+\.py)`", table))
    assert named == {str(path.relative_to(ROOT)) for path in SOURCES}


def test_the_number_of_differences_is_counted():
    count = sum(p.read_text(encoding="utf-8").count("DIFFERS") for p in SOURCES)
    assert f"{count} places" in README


def test_ci_runs_exactly_the_readmes_test_line():
    line = 'pip install -e ".[test]" && pytest'
    assert f"```bash\n{line}\n```" in README
    last = (ROOT / ".ci" / "run").read_text().strip().splitlines()[-1]
    assert last.replace(" --quiet", "") == line


def test_every_picture_and_file_the_readme_names_is_there():
    for name in re.findall(r"\b(?:examples|tests|tiny)/[\w./-]+\w", README):
        assert (ROOT / name).exists(), name
