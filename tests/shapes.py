"""Checks shape comments by running the code: is `# (B, H, T, Dh)` what the tensor really has?

    with Shapes([Path("chameleon.py")]) as shapes:   sys.settrace watches functions of these files
        model(ids)
    shapes.wrong, shapes.unseen                      lines for a person to read

A comment belongs to the assignment or return whose last line it ends; it is read if it begins with
a shape (after "each" or a name): "# (B, T, D)", "# each (B, C, HW)", "# codes (B, S), and more".
Several shapes belong to the parts of a tuple, one by one; one shape belongs to all of them.

The number of dimensions must be right, and so must numbers. A letter must mean the same number
in all comments of one call, and as the local variable of that name, if there is one. Behind the
start of a loop's next round, letters begin anew. Sums and products of letters count where all
letters are known. In FREE are letters that stand for something else in each line.
"""

import ast
import io
import re
import sys
import tokenize
from functools import cache
from pathlib import Path
from types import CodeType, FrameType

SHAPE = re.compile(r"\(((?:[^(),]+,)+(?:[^(),]+)?)\)")
COMMENT = re.compile(rf"#\s*(?:\w+ )?({SHAPE.pattern}(?:(?:, | -> ){SHAPE.pattern})*)")
ITEM = re.compile(r"\s*(?:\.\.\.|[\w'*/+ -]+)\s*")
WORDS = re.compile(r"[a-z]{2,} [a-z]{2,}")  # prose, such as (left id, right id)
FREE = {"C", "rows", "n"}


class Statement:
    """An assignment or return with a shape comment."""

    def __init__(self, node: ast.stmt, comment: str) -> None:
        self.node, self.comment, self.seen = node, comment, False
        self.first, self.last = node.lineno, node.end_lineno
        said = comment.split(" -> ")[-1]  # "(B, E, h, w) -> (B*S, E)": what comes out
        self.shapes = [[item.strip() for item in items.split(",") if item.strip()]
                       for items in SHAPE.findall(said)]
        self.targets = []
        if isinstance(node, ast.Assign):
            targets = [name for target in node.targets for name in
                       (target.elts if isinstance(target, ast.Tuple) else [target])]
            # "x[where] = y  # (B, T)" tells the shape of the whole of x
            targets = [t.value if is_part(t) else t for t in targets]
            self.targets = [compile(ast.Expression(as_load(t)), "<target>", "eval")
                            for t in targets if not (isinstance(t, ast.Name) and t.id == "_")]

    def values(self, frame: FrameType) -> list:
        return [eval(target, frame.f_globals, frame.f_locals) for target in self.targets]


def is_shape(comment: str) -> bool:
    """"(B, T)", but not "(a picture, its codes)"."""
    items = [item for items in SHAPE.findall(comment) for item in items.split(",") if item.strip()]
    return all(ITEM.fullmatch(item) and not WORDS.search(item) for item in items)


def is_part(target: ast.expr) -> bool:
    """x[where], but not data["name"]."""
    return isinstance(target, ast.Subscript) and not (
        isinstance(target.slice, ast.Constant) and isinstance(target.slice.value, str))


def as_load(target: ast.expr) -> ast.expr:
    """An expression to assign to -> the same, to be read."""
    return ast.parse(ast.unparse(target), mode="eval").body


def statements(path: Path) -> list[Statement]:
    """All statements inside functions of a file that end in a shape comment."""
    source = path.read_text(encoding="utf-8")
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        match = token.type == tokenize.COMMENT and COMMENT.match(token.string)
        if match and is_shape(match[1]):
            comments[token.start[0]] = match[1]
    found = []
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                kind = isinstance(node, (ast.Assign, ast.Return)) and node.end_lineno in comments
                if kind and all(node.lineno != s.first for s in found):
                    found.append(Statement(node, comments[node.end_lineno]))
    return found


class Shapes:
    def __init__(self, paths: list[Path]) -> None:
        self.wrong, self.statements = [], {}
        self.lines = {}  # file name -> {line: statement}
        for path in paths:
            found = statements(path)
            self.statements[path] = found
            self.lines[str(path)] = {n: s for s in found for n in range(s.first, s.last + 1)}

    @property
    def unseen(self) -> list[str]:
        return [f"{path.name}:{s.last}: {s.comment}" for path, found in self.statements.items()
                for s in found if not s.seen]

    def __enter__(self) -> "Shapes":
        self.before = sys.gettrace()
        sys.settrace(self.on_call)
        return self

    def __exit__(self, *error) -> None:
        sys.settrace(self.before)

    def on_call(self, frame: FrameType, event: str, argument):
        """Python calls this for every new frame; only those of our files are followed."""
        lines = self.lines.get(frame.f_code.co_filename)
        if not lines or frame.f_code.co_name.startswith("<"):
            return None
        letters, visited, running, returning = {}, set(), None, None

        def on_event(frame: FrameType, event: str, argument):
            nonlocal running, returning
            here = lines.get(frame.f_lineno)
            if running and (event == "return" or here is not running) and event != "exception":
                if running.last in visited:  # the next round of a loop
                    letters.clear()
                    visited.clear()
                visited.add(running.last)
                self.check(running, frame, running.values(frame), letters)
                running = None
            if event == "exception":
                running = returning = None
            elif event == "line" and here:
                if isinstance(here.node, ast.Return):
                    returning = here  # its value comes with the event "return"
                else:
                    running = here
            elif event == "return" and returning and argument is not None:
                self.check(returning, frame, [argument], letters)
            return on_event

        return on_event

    def check(self, statement: Statement, frame: FrameType, values: list, letters: dict) -> None:
        statement.seen = True
        if len(values) == 1:
            values = parts(values[0])
        said = statement.shapes
        if len(said) == 1:
            pairs = [(value, said[0]) for value in values]
        else:
            pairs = list(zip(values, said))
        for value, items in pairs:
            if hasattr(value, "shape"):
                problem = mismatch(tuple(value.shape), items, letters, frame.f_locals)
                if problem:
                    where = f"{Path(frame.f_code.co_filename).name}:{statement.last}"
                    self.wrong.append(f"{where}: {statement.comment} is {tuple(value.shape)}: "
                                      f"{problem}")


def parts(value) -> list:
    """A tuple, a list or a dict -> what is in it; anything else is alone."""
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, (tuple, list)) else [value]


def mismatch(shape: tuple[int, ...], items: list[str], letters: dict, variables: dict) -> str:
    """-> what is wrong with the comment, or "". Letters seen for the first time are bound."""
    if "..." in items:
        place = items.index("...")
        behind = len(items) - place - 1
        if len(shape) < len(items) - 1:
            return f"at least {len(items) - 1} dimensions are said"
        shape = shape[:place] + shape[len(shape) - behind :]
        items = items[:place] + items[place + 1 :]
    if len(shape) != len(items):
        return f"{len(items)} dimensions are said"
    for size, item in zip(shape, items):
        problem = item_mismatch(size, item, letters, variables)
        if problem:
            return problem
    return ""


def item_mismatch(size: int, item: str, letters: dict, variables: dict) -> str:
    if " or " in item:
        tried = [item_mismatch(size, one, dict(letters), variables) for one in item.split(" or ")]
        return "" if "" in tried else tried[0]
    item, names, code = expression(item)
    if code is None or names & FREE:
        return ""
    for name in names:
        if isinstance(variables.get(name), int) and name not in letters:
            letters[name] = variables[name]
    if item.isidentifier() and item not in letters:
        letters[item] = size
    if names - letters.keys():
        return ""
    value = eval(code, {}, letters)
    return "" if value == size else f"{item} is {value:g}"


@cache
def expression(item: str) -> tuple[str, set[str], CodeType | None]:
    """One number of a shape -> it as Python writes it, its letters, its code; None for words."""
    item = re.sub(r"(\d)([A-Za-z])", r"\1*\2", item.replace("'", "_"))  # 2h is 2*h
    item = re.sub(r"(\w) (\w)", r"\1*\2", item)  # H Dh is H*Dh
    try:
        tree = ast.parse(item, mode="eval")
    except SyntaxError:
        return item, set(), None
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return item, names, compile(tree, "<shape>", "eval")
