"""What holds the house up: the core needs torch alone, imports run downwards, and public names are where they say."""

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tethertune

torch.set_num_threads(1)

SOURCE = Path(tethertune.__file__).parent
# One line a storey, as in the design: a module imports from its own storey or from those above it in this list.
ORDER = [
    "errors",
    "rows",
    "sharding",
    "norms",
    "projections",
    "memory",
    "reference",
    "radii",
    "kernels",
    "optim",
    "attachment",
    "balls",
    "lazy",
    "adapters",
    "constraint",
    "penalty",
    "features",
    "measure",
    "theory",
    "integrations",
    "lab",
    "cli",
    "__main__",
]
CORE = ORDER[: ORDER.index("integrations")]
FILES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))


def storey(path):
    return path.parts[0].removesuffix(".py")


def module_name(path):
    parts = ["tethertune", *path.with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NEEDS_TRITON = Path("kernels/triton.py")  # which comes with PyTorch where that is built for CUDA
CORE_FILES = [path for path in FILES if (storey(path) in CORE and path != NEEDS_TRITON) or path == Path("__init__.py")]
ids = {"ids": str}


def imports(path):
    """The dotted names that a file imports at run time, wherever in it."""
    tree = ast.parse((SOURCE / path).read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_file_has_its_storey():
    assert {storey(path) for path in FILES} <= {*ORDER, "__init__"}


@pytest.mark.parametrize("path", FILES, **ids)
def test_imports_run_downwards(path):
    if path == Path("__init__.py"):
        return
    for name in imports(path):
        if name.startswith("tethertune.") and name != "tethertune.__version__":
            imported = name.split(".")[1]
            if imported in ORDER:
                assert ORDER.index(imported) <= ORDER.index(storey(path)), f"{path} imports {name}"
            else:  # a public name, for which the package looks in its home
                assert storey(path) not in CORE, f"{path} of the core imports {name} from the package itself"


@pytest.mark.parametrize("path", CORE_FILES, **ids)
def test_the_core_names_no_other_package(path):
    roots = {name.split(".")[0] for name in imports(path)}
    assert roots <= {*sys.stdlib_module_names, "torch", "safetensors", "tethertune"}


@pytest.mark.parametrize("path", [path for path in FILES if path.name != "__init__.py"], **ids)
def test_every_module_has_its_tests_at_the_same_place(path):
    stem = path.stem.strip("_")
    assert (Path(__file__).parent / path.parent / f"test_{stem}.py").is_file()


def test_triton_is_imported_by_its_module_alone_and_that_only_where_it_is_needed():
    for path in FILES:
        roots = {name.split(".")[0] for name in imports(path)}
        assert ("triton" in roots) == (path == NEEDS_TRITON)
        at_once = {
            f"{node.module}.{alias.name}"
            for node in ast.parse((SOURCE / path).read_text()).body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        assert not {name for name in at_once if name.startswith("tethertune.kernels.triton")}, path
    assert {name.split(".")[0] for name in imports(NEEDS_TRITON)} <= {
        *sys.stdlib_module_names,
        "torch",
        "triton",
        "tethertune",
    }


BLOCKED = """
import sys, importlib, importlib.abc
import torch, torch._dynamo  # with what they need themselves
import torch.distributed.tensor
loaded = {name.split(".")[0] for name in sys.modules}

class OnlyTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in {*sys.stdlib_module_names, "torch", "tethertune"}:
            raise ImportError(f"{name} is blocked: the core needs torch alone")

for name in loaded - {*sys.stdlib_module_names, "torch", "__main__"}:
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        if name in ("numpy", "timm", "torchvision", "safetensors", "PIL", "accelerate"):
            del sys.modules[module]
sys.meta_path.insert(0, OnlyTorch())
for name in sys.argv[1:]:
    importlib.import_module(name)

import tethertune as tt
from torch import nn
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
for norm in ("mars", "frobenius"):
    constraint = tt.Constraint(model, norm=norm, radius=0.1, head="3", head_radius=0.2)
    constraint.attach(optimizer)
    penalty = tt.Penalty(model, norm=norm, strength=0.1, head="3", head_strength=0.1)
    model(torch.ones(2, 3, 3, 3)).square().sum().add(penalty()).backward()
    optimizer.step()
    assert all(d.value <= d.radius for d in constraint.distances().values())
    constraint.load_state_dict(constraint.state_dict())
assert tt.distances(model, model)["0.weight"].mars == 0
import copy
wanted = tt.FeaturePenalty(copy.deepcopy(model), layers=["0"], strength=0.1, attention="none")
try:
    import numpy
except ImportError:
    print("worked with torch alone")
"""


def test_the_core_works_with_torch_alone():
    names = [module_name(path) for path in CORE_FILES]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BLOCKED, *names], capture_output=True, text=True, check=False
    )
    assert result.stdout.strip() == "worked with torch alone", result.stderr


def test_importing_the_package_does_not_import_torch():
    code = "import sys, tethertune; dir(tethertune); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_the_public_names_are_sorted_complete_and_at_home():
    assert tethertune.__all__ == sorted(tethertune.__all__)
    assert set(tethertune.__all__) == set(tethertune._HOMES)
    for name, home in tethertune._HOMES.items():
        module = importlib.import_module(f"tethertune.{home}")
        assert name in module.__all__
        assert getattr(tethertune, name) is getattr(module, name)
    assert set(tethertune.__all__) <= set(dir(tethertune))
    with pytest.raises(AttributeError, match="no attribute 'Constrain'"):
        _ = tethertune.Constrain


def test_type_checkers_see_the_same_names():
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {(alias.name, node.module) for node in guarded.body for alias in node.names}
    modules = {(name, "tethertune") for name in tethertune._MODULES}
    assert seen == modules | {(name, f"tethertune.{home}") for name, home in tethertune._HOMES.items()}


def in_order(name):
    """Constants, then classes, then the rest, as ruff sorts them."""
    return 0 if name.isupper() else 1 if name[0].isupper() else 2, name


@pytest.mark.parametrize("path", CORE_FILES, **ids)
def test_each_modules_public_names_are_sorted_and_exist(path):
    module = importlib.import_module(module_name(path))
    names = getattr(module, "__all__", [])
    assert list(names) == sorted(names, key=in_order)
    assert all(hasattr(module, name) for name in names)


@pytest.mark.parametrize("path", CORE_FILES, **ids)
def test_the_examples_in_docstrings_run(path):
    module = importlib.import_module(module_name(path))
    assert doctest.testmod(module).failed == 0


def test_the_core_has_examples():
    attempted = [doctest.testmod(importlib.import_module(module_name(path))).attempted for path in CORE_FILES]
    assert sum(attempted) > 20
