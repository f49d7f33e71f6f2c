# SPDX-License-Identifier: Apache-2.0
"""The package as a whole: public names, the direction of imports, documented settings."""

import ast
import inspect
import re
import subprocess
import sys
from dataclasses import MISSING, fields
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from transformers import TrainingArguments

import ipg_hf
from ipg_hf import IPGConfig
from ipg_hf.baselines import METHODS
from ipg_hf.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = list({method.config: None for method in METHODS.values()})


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in (ROOT / "ipg_hf").rglob("*.py")}


def imports(name):
    """The modules of the package that a module imports, and whether it does so within a function.

    A module is imported together with the packages that it lies in, so these are imported too, but for the packages
    that both lie in.
    """
    path = MODULES[name]
    tree = ast.parse(path.read_text())
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    within = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                module = ".".join([*base, alias.name])
                parts = (module if module in MODULES else ".".join(base)).split(".")
                for end in range(2, len(parts) + 1):
                    imported = ".".join(parts[:end])
                    if imported == ".".join(parts) or not f"{name}.".startswith(f"{imported}."):
                        yield imported, id(node) in within
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            absolute = {other.split(".")[0] for other in names} & {"ipg_hf", "recipes", "tests"}
            assert not absolute, f"{name} imports {absolute} by an absolute name"


def packages_of(name):
    """The other packages that a module imports."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)


GRAPH = {name: {*imports(name)} for name in MODULES}


def importers_of(door):
    """Modules outside a folder that import something in it, at any place."""
    inside = f"ipg_hf.{door}"
    return {
        name.removeprefix("ipg_hf.")
        for name, edges in GRAPH.items()
        for module, _ in edges
        if f"{module}.".startswith(f"{inside}.") and not f"{name}.".startswith(f"{inside}.")
    }


def test_imports_have_no_cycle():
    # `moved` belongs below the config, and makes the baselines' configs: it imports these when they are asked for;
    # `evaluate` takes seconds to import: its metrics are made when they are asked for; so does all that a command needs
    within = {(name, module) for name, edges in GRAPH.items() for module, in_function in edges if in_function}
    assert within == {
        ("ipg_hf.moved", "ipg_hf.baselines"), ("ipg_hf.metrics", "ipg_hf.evaluate_metrics"),
        ("ipg_hf.cli", "ipg_hf.commands"), ("ipg_hf.cli", "ipg_hf.recipe"),
    }  # fmt: skip
    order = TopologicalSorter({name: {module for module, inner in edges if not inner} for name, edges in GRAPH.items()})
    assert {*order.static_order()} == {*MODULES}  # raises CycleError, which names the cycle
    control = TopologicalSorter({name: {module for module, _ in edges} for name, edges in GRAPH.items()})
    with pytest.raises(ValueError, match="in a cycle"):
        control.prepare()


def test_the_library_imports_nothing_that_serves_comparisons():
    assert importers_of("baselines") == {"moved", "recipe", "run", "bench.suite"}
    assert importers_of("bench") == {"commands"}
    assert importers_of("audit") == {"commands"}
    assert importers_of("scan") == {"commands"}
    assert importers_of("cli") == set() and importers_of("commands") == {"cli"}
    assert importers_of("trainer") >= {"run", "baselines.dfr"}  # the question can be answered with yes


@pytest.mark.parametrize("name", ["guidance", "inference", "heads"])
def test_the_method_needs_torch_alone(name):
    def needed(module):
        found, waiting = {module}, [module]
        while waiting:
            new = {other for other, _ in GRAPH[waiting.pop()]} - found
            found, waiting = found | new, [*waiting, *new]
        return {package for part in found for package in packages_of(part)}

    assert needed(f"ipg_hf.{name}") - sys.stdlib_module_names == {"torch"}
    assert "transformers" in needed("ipg_hf.trainer")


def test_public_names():
    wanted = {"IPGTrainer", "IPGConfig", "ClassifierHead", "find_head", "load_image_classifier"}
    assert wanted == {*ipg_hf.__all__} == {*ipg_hf._HOMES}
    assert wanted <= {*dir(ipg_hf)} and not hasattr(ipg_hf, "IPGTrainers") and not hasattr(ipg_hf, "_metrics")
    code = (
        "import ipg_hf; print(ipg_hf.metrics.GroupMetrics.__name__); from ipg_hf import *; print(IPGTrainer.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["GroupMetrics", "IPGTrainer"]
    assert all(inspect.getdoc(getattr(ipg_hf, name)) for name in ipg_hf.__all__)
    assert (ROOT / "ipg_hf" / "py.typed").exists()


def own_fields(settings):
    """The fields of a class that the class above it lacks, or has with another default."""
    if settings is Recipe:
        return fields(Recipe)
    above = {field.name: field.default for field in fields(TrainingArguments if settings is IPGConfig else IPGConfig)}
    return [field for field in fields(settings) if above.get(field.name, MISSING) is not field.default]


@pytest.mark.parametrize("settings", [*CONFIGS, Recipe], ids=lambda settings: settings.__name__)
def test_every_setting_is_documented_with_its_real_default(settings):
    own = [field for field in own_fields(settings) if field.default is not MISSING or field.name == "strengths"]
    document = inspect.getdoc(settings)
    assert own
    for field in own:
        assert field.metadata["help"].endswith((".", ")")), field.name
        assert re.search(rf"^\s*`?{field.name}`?[ :]", document, re.M), field.name
        if settings is not Recipe:
            line = re.search(rf"^\s*{field.name} \(.*$", document, re.M).group()
            stated = re.search(r"defaults to `(.*)`\)", line)
            default = field.default if field.default is not MISSING else field.default_factory()
            assert ast.literal_eval(stated.group(1)) == default if stated else default is None, field.name


def test_the_config_has_what_a_user_of_the_method_sets():
    assert len(own_fields(IPGConfig)) <= 21
    for config in CONFIGS:
        assert config is IPGConfig or 1 <= len(own_fields(config)) <= 4


def test_the_import_is_that_of_trainer_and_little_more():
    """Packages that only some users need are imported where they are used: each costs seconds."""
    code = (
        "import sys; from transformers import Trainer; known = {*sys.modules}; from ipg_hf import IPGTrainer; "
        "print(*sorted({name.partition('.')[0] for name in {*sys.modules} - known}))"
    )
    new = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "ipg_hf" in new
    assert not {*new} & {"evaluate", "scipy", "sklearn", "matplotlib", "jinja2", "diffusers", "peft", "timm"}, new


AT_ONCE = {
    "--help": "usage: ipg",
    "bench --help": "usage: ipg bench",
    "scan FOLDER": "arguments are required: --data",
    "heads --models X": "unrecognized arguments: --models",
    "trian": "invalid choice: 'trian'",
    "train --config none.yaml": "ipg train: error: none.yaml: no such file.",
    "bench none.yaml": "ipg bench: error: none.yaml: no such file.",
}


@pytest.mark.parametrize(("given", "expected"), AT_ONCE.items(), ids=AT_ONCE)
def test_help_and_wrong_flags_wait_for_no_import(given, expected):
    code = (
        "import sys\nfrom ipg_hf.cli import main\ntry:\n    sys.exit(main(sys.argv[1:]))\nfinally:\n"
        "    print({*sys.modules} & {'torch', 'numpy', 'transformers', 'datasets', 'PIL', 'ipg_hf.commands'})"
    )
    done = subprocess.run([sys.executable, "-c", code, *given.split()], capture_output=True, text=True)
    assert done.returncode == (0 if "--help" in given else 2), done.stderr
    assert done.stdout.endswith("set()\n") and expected in done.stdout + done.stderr
