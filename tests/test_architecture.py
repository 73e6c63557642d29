"""The shape of the code base: who may import whom, what stays free of torch, and how large a piece may be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from moetrain.commands.schemas import SCHEMAS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "moetrain"

# Lowest first. A module imports only from lower layers; parts of one layer do not import each other.
LAYERS = [
    ["errors", "stage_files"],
    ["config_keys", "files", "interpreters", "options", "ranges", "runtime"],
    ["log"],
    ["kernels", "chat", "quant"],
    ["ops"],
    ["optim"],
    ["model", "data", "tools", "report"],
    ["tasks", "hf"],
    ["parallel", "inference"],
    ["checkpoint", "rollout", "plan", "serve"],
    ["train", "export"],
    ["upcycle", "rl", "eval", "terminal"],
    ["commands"],
    ["compose"],
    ["run", "verify", "bench"],
    ["cli"],
]
HEIGHT = {part: height for height, layer in enumerate(LAYERS) for part in layer}

# Heavy or peculiar libraries have few doors. A prefix ending in "/" is a folder of the package.
DOORS = {
    "deepspeed": ["parallel/", "bench/"],
    "hydra": ["compose.py"],
    "omegaconf": ["compose.py"],
    "wandb": ["log.py", "report/wandb_space.py"],
    "transformers": ["hf/", "verify/", "bench/"],
    "compressed_tensors": ["export/", "verify/", "bench/"],
    "vllm": ["bench/", "verify/vllm_worker.py"],
    "datasets": ["data/", "bench/"],
    "llguidance": ["inference/guided.py", "inference/grammar_program.py"],
    "starlette": ["serve/"],
    "uvicorn": ["serve/"],
    "prometheus_client": ["serve/"],
    "gguf": ["export/gguf_file.py"],
    "triton": ["kernels/gpu/triton_int4.py"],
    "llama_cpp": ["bench/", "verify/llama_worker.py"],
}
TORCH_FREE = [
    "errors.py",
    "files.py",
    "log.py",
    "options.py",
    "ranges.py",
    "stage_files.py",
    "config_keys.py",
    "commands/",
    "compose.py",
    "model/flops.py",
    "plan/",
]
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "misc", "base"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def python_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


@cache
def trees(folder: Path = PACKAGE) -> list[tuple[str, ast.Module]]:
    """Return (path inside the folder, syntax tree) of each file."""
    return [(path.relative_to(folder).as_posix(), ast.parse(path.read_text())) for path in python_files(folder)]


@cache
def imports(tree: ast.Module) -> list[tuple[str, int]]:
    """Return (module, line) of every import, those inside functions too."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            found.append((".", node.lineno))
        elif isinstance(node, ast.ImportFrom):
            assert node.module
            found.append((node.module, node.lineno))
            if node.module == "moetrain":
                found += [(f"moetrain.{alias.name}", node.lineno) for alias in node.names]
    return found


def module_of(path: str) -> str:
    name = path.removesuffix(".py").replace("/", ".")
    return "moetrain." + name.removesuffix(".__init__")


def is_at(path: str, places: list[str]) -> bool:
    return any(path.startswith(place) if place.endswith("/") else path == place for place in places)


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_every_part_of_the_package_has_a_layer() -> None:
    parts = {path.split("/")[0].removesuffix(".py") for path, _ in trees()} - {"__init__", "__main__"}
    assert parts <= HEIGHT.keys(), f"name the layer of {sorted(parts - HEIGHT.keys())} in LAYERS"


def test_imports_go_down_the_layers() -> None:
    wrong = []
    for path, tree in trees():
        part = path.split("/")[0].removesuffix(".py")
        for module, line in imports(tree):
            if not module.startswith("moetrain."):
                continue
            other = module.split(".")[1]
            if other != part and HEIGHT[other] >= HEIGHT.get(part, len(LAYERS)):
                wrong.append(f"moetrain/{path}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_paths_that_users_type_are_expanded_in_one_place() -> None:
    """`Path.expanduser` raises for a user that does not exist; `files.user_path` leaves the path as it is."""
    assert [path for path, _ in trees() if "expanduser" in (PACKAGE / path).read_text()] == ["files.py"]


def test_imports_are_absolute() -> None:
    wrong = [f"moetrain/{path}:{line}" for path, tree in trees() for module, line in imports(tree) if module == "."]
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_in_a_circle() -> None:
    edges = {module_of(path): {module for module, _ in imports(tree)} for path, tree in trees()}
    finished: set[str] = set()

    def visit(module: str, trail: list[str]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module in finished:
            return
        for target in sorted(edges[module] & edges.keys()):
            visit(target, [*trail, module])
        finished.add(module)

    for module in edges:
        visit(module, [])


@pytest.mark.parametrize("library", sorted(DOORS))
def test_a_heavy_library_is_imported_only_at_its_door(library: str) -> None:
    wrong = [
        f"moetrain/{path}:{line} imports {module}"
        for path, tree in trees()
        for module, line in imports(tree)
        if module.split(".")[0] == library and not is_at(path, DOORS[library])
    ]
    assert not wrong, "\n".join(wrong)


def test_configs_and_plans_come_without_torch() -> None:
    names = [module_of(path) for path, _ in trees() if is_at(path, TORCH_FREE) or path.endswith("/config.py")]
    # Commands bring torch in only once their input is checked.
    names += ["moetrain.cli.main", *(f"moetrain.cli.{command.replace(' ', '_')}" for command in SCHEMAS)]
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, f'{name} brings torch in'\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_files_are_short() -> None:
    long = [
        f"{path.relative_to(ROOT)}: {lines} lines"
        for path in python_files(PACKAGE)
        if (lines := len(path.read_text().splitlines())) > MAX_FILE_LINES
    ]
    assert not long, "\n".join(long)


def test_functions_are_short() -> None:
    long = [
        f"moetrain/{path}:{node.lineno} {node.name}: {lines} lines"
        for path, tree in trees()
        for node in functions(tree)
        if (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert not long, "\n".join(long)


def test_public_functions_take_at_most_two_positional_arguments() -> None:
    """Signatures that torch's autograd, Triton and the language ask for are not ours."""
    foreign = ("forward", "backward", "_")
    wrong = []
    for path, tree in trees():
        for node in functions(tree):
            if any(ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list):
                continue
            own = [
                arg.arg for arg in [*node.args.posonlyargs, *node.args.args] if arg.arg not in ("self", "cls", "ctx")
            ]
            if len(own) > 2 and not node.name.startswith(foreign):
                wrong.append(f"moetrain/{path}:{node.lineno} {node.name}({', '.join(own)})")
    assert not wrong, "\n".join(wrong)


def test_no_module_has_a_name_that_says_nothing() -> None:
    vague = [path for path, _ in trees() if VAGUE_NAMES & set(Path(path).with_suffix("").parts)]
    assert not vague


def test_modules_say_what_they_are_for_and_packages_are_empty() -> None:
    silent = [path for path, tree in trees() if not path.endswith("__init__.py") and not ast.get_docstring(tree)]
    assert not silent, f"no module docstring: {silent}"
    filled = [path for path, tree in trees() if path.endswith("__init__.py") and tree.body]
    assert not filled, f"an __init__.py is empty: {filled}"


def test_attributes_are_never_guessed() -> None:
    """No hasattr and no getattr with a default: a field is there or it is an error."""
    wrong = []
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                guessed = node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) == 3)
                if guessed:
                    wrong.append(f"moetrain/{path}:{node.lineno}")
    assert not wrong, "\n".join(wrong)


def can_fail(test: ast.AST) -> bool:
    """Return whether a test asserts something that its code decides, expects an error, or calls a check by its name."""
    for node in ast.walk(test):
        if isinstance(node, ast.Assert) and _is_decided_by_code(node.test):
            return True
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).split(".")[-1]
            if name.startswith(("raises", "assert_", "check_")):
                return True
    return False


def _is_decided_by_code(condition: ast.expr) -> bool:
    if isinstance(condition, ast.BoolOp):
        parts = [_is_decided_by_code(part) for part in condition.values]
        return any(parts) if isinstance(condition.op, ast.And) else all(parts)
    if isinstance(condition, ast.UnaryOp):
        return _is_decided_by_code(condition.operand)
    if isinstance(condition, ast.Compare) and len(condition.comparators) == 1:
        both = [ast.unparse(condition.left), ast.unparse(condition.comparators[0])]
        if both[0] == both[1] and not any(isinstance(node, ast.Call) for node in ast.walk(condition)):
            return False
    return any(isinstance(node, ast.Name | ast.Attribute | ast.Call) for node in ast.walk(condition))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("assert found == 3", True),
        ("assert f(x) == f(x)", True),
        ("check_rows(rows)", True),
        ("with pytest.raises(ValueError): f()", True),
        ("f()", False),
        ("assert True", False),
        ("assert not 0", False),
        ("assert found or True", False),
        ("assert found == found", False),
        ("assert 'a non-empty text'", False),
        ("assert [1]", False),
    ],
)
def test_a_test_that_cannot_fail_is_recognised(body: str, expected: bool) -> None:
    assert can_fail(ast.parse(f"def test_x():\n    {body}")) is expected


def test_every_test_can_fail() -> None:
    """A test asserts, expects an error, or calls something of its own folder whose name says that it checks."""
    idle = [
        f"tests/{path}:{node.lineno} {node.name}"
        for path, tree in trees(ROOT / "tests")
        for node in functions(tree)
        if node.name.startswith("test_") and not can_fail(node)
    ]
    assert not idle, "\n".join(idle)


def test_files_of_json_are_written_by_one_function() -> None:
    """`json.dumps` writes NaN, which no other parser takes; `moetrain.files` writes null."""
    wrong = []
    for path, tree in trees():
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".write", ".write_text"))):
                continue
            wrong += [
                f"moetrain/{path}:{inner.lineno}"
                for inner in ast.walk(node)
                if isinstance(inner, ast.Call) and ast.unparse(inner.func) in ("json.dumps", "json.dump")
            ]
    assert not wrong, f"use moetrain.files.write_json or to_json: {wrong}"
