"""The import layers, and the absence of what the project does not do: pickle and eval."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "sagerec"
LAYERS = [
    {"errors"},
    {"config", "files", "artifacts", "progress"},
    {"objectives"},
    {"catalogue"},
    {"actions"},
    {"policies"},
    {"decoding"},
    {"evaluation"},
    {"training"},
    {"run"},
    {"baselines"},
    {"study"},
    {"report"},
    {"recommend"},
    {"recif"},
    {"integrations"},
    {"serving"},
    {"__init__"},
    {"cli"},
]
"""Lowest first; a module imports from its own layer and lower ones. `docs/architecture.md` draws them."""
OBJECTIVES_MAY_IMPORT = {"torch", "sagerec"}


def layer_of(part: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if part in layer)


def imports(path: Path) -> list[str]:
    """Dotted names of all modules that a file imports, also inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "sagerec" else []
            found += names or [node.module]
    return found


def test_every_module_has_a_layer_and_imports_downwards_only() -> None:
    violations = []
    for path in SOURCE.rglob("*.py"):
        part = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        for name in imports(path):
            if name.startswith("sagerec."):
                other = name.split(".")[1]
                if layer_of(other) > layer_of(part):
                    violations.append(f"{path.relative_to(SOURCE)} imports {name}")
    assert violations == []


def test_objectives_import_torch_alone() -> None:
    standard = set(__import__("sys").stdlib_module_names)
    for path in (SOURCE / "objectives").glob("*.py"):
        packages = {name.split(".")[0] for name in imports(path)} - standard
        assert packages <= OBJECTIVES_MAY_IMPORT, f"{path.name} imports {packages - OBJECTIVES_MAY_IMPORT}"


def test_only_the_registry_knows_concrete_policies() -> None:
    """Outside policies/ the protocol, the registry, what policies and SASRec share, and who makes small models."""
    allowed = {f"sagerec.policies.{name}" for name in ("protocol", "registry", "layers", "softmax", "small_lm")}
    found = []
    for path in SOURCE.rglob("*.py"):
        if "policies" not in path.relative_to(SOURCE).parts:
            names = {name for name in imports(path) if name.startswith("sagerec.policies")}
            found += [f"{path.relative_to(SOURCE)} imports {name}" for name in sorted(names - allowed)]
    assert found == []


def test_only_the_registry_of_actions_knows_how_semantic_ids_are_made() -> None:
    """What decodes, trains and evaluates knows action spaces; Semantic IDs are one kind."""
    blind = ("policies", "decoding", "evaluation", "training", "study", "recommend.py", "serving")
    allowed = {"sagerec.actions.semantic_ids.embedders"}
    found = []
    for path in SOURCE.rglob("*.py"):
        if path.relative_to(SOURCE).parts[0] in blind:
            names = {name for name in imports(path) if name.startswith("sagerec.actions.semantic_ids")}
            found += [f"{path.relative_to(SOURCE)} imports {name}" for name in sorted(names - allowed)]
    assert found == []


def test_no_pickle_and_no_eval() -> None:
    for path in SOURCE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        assert not called & {"eval", "exec"}, path
        assert not {"pickle", "joblib", "dill"} & set(imports(path)), path
        assert "torch.load" not in path.read_text(encoding="utf-8"), path
