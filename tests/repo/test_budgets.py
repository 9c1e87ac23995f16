"""Short files, short functions, small weights."""

import ast

METHOD_LINES = 150
FILE_LINES = 400
FUNCTION_LINES = 60
WEIGHTS = {"emoji": 40 * 10**6, "fashion": 15 * 10**6}  # bytes, by shipped world
NOT_METHODS = {"__init__.py", "base.py"}


def sources(root):
    return sorted((root / "src").rglob("*.py"))


def functions(path):
    tree = ast.parse(path.read_text())
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def length(function):
    """Lines of a function, its docstring and decorators left out."""
    first = function.body[0]
    documented = ast.get_docstring(function, clean=False) is not None
    return function.end_lineno - function.lineno + 1 - (first.end_lineno - first.lineno + 1 if documented else 0)


def test_length_leaves_the_docstring_out():
    code = 'def f():\n    """One.\n\n    Two.\n    """\n    return 1\n'
    assert length(ast.parse(code).body[0]) == 2


def test_files_are_short(root):
    long = {str(p.relative_to(root)): n for p in sources(root) if (n := p.read_text().count("\n")) >= FILE_LINES}
    assert not long, f"files of {FILE_LINES} lines or more: {long}"


def test_method_files_are_short(root):
    methods = [p for p in (root / "src/expunge/methods").glob("*.py") if p.name not in NOT_METHODS]
    assert methods
    long = {p.name: n for p in methods if (n := p.read_text().count("\n")) >= METHOD_LINES}
    assert not long, f"method files of {METHOD_LINES} lines or more: {long}"


def test_functions_are_short(root):
    long = {
        f"{p.relative_to(root)}:{f.name}": n
        for p in sources(root)
        for f in functions(p)
        if (n := length(f)) > FUNCTION_LINES
    }
    assert not long, f"functions over {FUNCTION_LINES} lines: {long}"


def test_weights_fit_their_budget(root):
    zoo, size = root / "src/expunge/zoo", dict.fromkeys(WEIGHTS, 0)
    for path in (root / "src").rglob("*.safetensors"):
        size[path.relative_to(zoo).parts[0]] += path.stat().st_size
    assert all(0 < size[world] <= most for world, most in WEIGHTS.items()), size
