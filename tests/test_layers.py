"""The direction of imports, read from the source: lower rooms never know the upper ones."""

import ast
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
ORDER = [
    {"types", "config"},
    {"ops", "geometry", "image", "robust", "rootsift", "prefetch"},
    {"models", "losses", "losses_dense", "supervision", "data", "viz"},
    {"weights", "matchers", "api", "export"},
    {"train", "eval", "tasks", "report", "web"},
    {"cli", "__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
CV2_ROOMS = {"image", "robust", "rootsift", "viz", "data", "data_prep"}
FLAX_ROOMS = {"models", "train"}


def imports(path: Path) -> set[tuple[str, bool]]:
    """(module, at the top level of the file?) of every import."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(alias.name, id(node) in top) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add((node.module, id(node) in top))
            found |= {(f"{node.module}.{alias.name}", id(node) in top) for alias in node.names}
    return found


def sources() -> list[Path]:
    return sorted(p for room in ("gim_jax", "data_prep") for p in (REPO / room).rglob("*.py"))


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(REPO)))
def test_imports_point_downwards(path):
    parts = path.relative_to(REPO).with_suffix("").parts
    room = parts[0] if parts[0] == "data_prep" else parts[1]
    for module, top in imports(path):
        names = module.split(".")
        assert names[0] not in {"configs", "tests", "benchmarks", "torch", "tensorflow"}, f"{module} imported"
        if names[0] == "cv2":
            assert room in CV2_ROOMS, f"cv2 imported in {room}"
        if names[0] == "flax":
            assert room in FLAX_ROOMS, f"flax imported in {room}"
        if room == "data":
            assert names[0] not in {"jax", "flax"}, "data/ must not touch JAX"
        if names[0] == "data_prep" and room != "data_prep":
            assert room == "cli" and not top, "only the command line reaches data_prep, inside functions"
        if names[0] == "gim_jax" and len(names) > 1 and room not in {"data_prep", "__init__"}:
            target = names[1]
            if target in LEVEL:
                same = target == room or (room, target, top) == ("types", "robust", False)  # Matches.fit
                assert same or LEVEL[target] <= LEVEL[room], f"{room} imports {module}"


def test_every_room_has_a_level():
    rooms = {p.stem for p in (REPO / "gim_jax").iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert rooms - {"__init__", "_configs"} <= set(LEVEL), "add the new room to ORDER"
