# SPDX-License-Identifier: Apache-2.0
"""The package as a whole: public names, the direction of imports, documented settings, the pages' code."""

import ast
import inspect
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import TrainingArguments

import ipg_hf
from ipg_hf import IPGConfig
from ipg_hf.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ipg_hf"
# each module may import those before it, in the order in which they build on each other
ORDER = [
    "guidance",
    "search",
    "trial",
    "heads",
    "metrics",
    "last_layer",
    "layers",
    "norms",
    "models",
    "objectives",
    "config",
    "pairs",
    "progress",
    "checkpoints",
    "gradients",
    "correction",
    "launch",
    "guided",
    "inbatch",
    "task",
    "report",
    "record",
    "model_card",
    "publish",
    "trainer",
    "stages",
    "data",
    "survey",
    "audit_numbers",
    "audit_figures",
    "audit_page",
    "audit",
    "recipe",
    "runs",
    "suite",
    "comparison",
    "comparison_figures",
    "bench",
    "cli",
    "__init__",
]


def imported(path):
    """Modules of the package that a file imports, by their first name."""
    package = ["ipg_hf", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            for name in names:
                full = [*base, *name.split(".")]
                yield full[1]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(name.split(".")[0] in ("ipg_hf", "recipes", "tests") for name in names)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imported(path):
        assert name == own or ORDER.index(name) < ORDER.index(own), f"{own} imports {name}"
        assert (own, name) != ("trainer", "data")


@pytest.mark.parametrize("name", ["guidance", "trial", "heads"])
def test_the_method_needs_torch_alone(name):
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    roots = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0)
    }
    assert roots - sys.stdlib_module_names == {"torch"}


def test_public_names():
    assert {"IPGTrainer", "IPGConfig", "find_head", "load_image_classifier"} <= set(ipg_hf.__all__)
    assert all(inspect.getdoc(getattr(ipg_hf, name)) for name in ipg_hf.__all__)
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.parametrize(("settings", "inherited"), [(IPGConfig, TrainingArguments), (Recipe, object)])
def test_every_setting_is_documented_with_its_real_default(settings, inherited):
    known = {field.name for field in fields(inherited)} if inherited is not object else set()
    own = [field for field in fields(settings) if field.name not in known]
    document = inspect.getdoc(settings)
    assert own
    for field in own:
        assert field.metadata["help"].endswith((".", ")"))
        assert re.search(rf"^\s*`?{field.name}`?[ :]", document, re.M), field.name
        if settings is IPGConfig:
            line = re.search(rf"^\s*{field.name} \(.*$", document, re.M).group()
            stated = re.search(r"defaults to `(.*)`\)", line)
            assert ast.literal_eval(stated.group(1)) == field.default if stated else field.default is None


def test_no_file_is_too_long():
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 400, path


def python_blocks(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.S)


def test_the_readme_has_a_python_example():
    assert python_blocks(ROOT / "README.md")


@pytest.mark.parametrize("number", range(len(python_blocks(ROOT / "README.md"))))
def test_the_code_of_the_readme_runs(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # the reader's own model folder and a short run stand in for the names that the page uses
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16)
    config.patch_size = 8
    ViTForImageClassification(config).save_pretrained("my-checkpoint")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained("my-checkpoint")
    code = python_blocks(ROOT / "README.md")[number].replace('"google/vit-base-patch16-224"', '"my-checkpoint"')
    code = code.replace("num_train_epochs=3", "max_steps=2, use_cpu=True, report_to='none'")
    exec(compile(code, f"README.md block {number}", "exec"), {})
