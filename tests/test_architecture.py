"""The rules of the house: who may import whom, and what no file may contain."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"model", "datasets", "utils", "configs", "tools", "benchmarks", "tests"}
OPTIONAL = {
    "deepspeed", "bitsandbytes", "onnx", "onnxruntime", "tensorrt", "gradio", "flash_attn", "torchcodec", "av",
}  # fmt: skip
MAY_IMPORT = {
    "utils": set(),
    "configs": {"utils"},
    "model": {"utils", "configs"},
    "datasets": {"utils", "configs"},
}
INSIDE_MODEL = {
    "encoders": {"attention", "types"},
    "segmenters": {"attention", "types"},
    "evf": {"attention", "types", "encoders", "segmenters"},
}
SOURCES = sorted(
    path for folder in (*MAY_IMPORT, "tools", "benchmarks") for path in (ROOT / folder).rglob("*.py")
) + sorted(ROOT.glob("*.py"))


def imports(path):
    """Yield (dotted name, is at module level) of every import; relative ones as `.name`."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), id(node) in top


def folder_of(path):
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else "script"


def violations(path, text=None):
    """Return what a file imports against the rules."""
    found = []
    folder = folder_of(path)
    for name, is_top in imports(path):
        package = name.split(".")[0]
        if not name.startswith(".") and package in OURS:
            if folder in MAY_IMPORT and package not in MAY_IMPORT[folder]:
                found.append(f"{folder} imports {name}")
            if package in ("tools", "benchmarks") and package != folder:
                found.append(f"nobody imports {name}")
        if package in OPTIONAL and is_top:
            found.append(f"optional package {name} imported at module level")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports(path):
    assert violations(path) == []


@pytest.mark.parametrize("path", sorted((ROOT / "model").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_order_inside_model(path):
    """encoders, segmenters <- evf <- everything else; no segmenter family imports another."""
    parts = path.relative_to(ROOT / "model").parts
    part = parts[0].removesuffix(".py")
    for name, _ in imports(path):
        match = re.match(r"^(\.+)(\w+)?(?:\.(\w+))?", name)
        if not match or part not in INSIDE_MODEL:
            continue
        dots, first, _ = match.groups()
        from_top = len(dots) == len(parts)
        if from_top and first not in INSIDE_MODEL[part] | {part}:
            pytest.fail(f"{path.name} imports {name}")
        if not from_top and part == "segmenters":
            assert first in ("base", "prompted", "sam_blocks", None), f"segmenter {path.name} imports {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_forbidden_text(path):
    text = path.read_text()
    forbidden = {
        r"\.cuda\(\)": "choose the device in utils/precision.py",
        r"strict\s*=\s*False(?!.*zip)": "checkpoints load strictly",
        r"\bsys\.path\b": "run from the repository root",
        r"trust_remote_code": "code from a hub is not run",
        r"empty_cache\(": "the allocator knows better",
        r"\bmodel_type\s*==": "families are told apart in the registry",
        r"weights_only\s*=\s*False": "pickles are hostile",
    }
    for pattern, reason in forbidden.items():
        assert not re.search(pattern, text), f"{pattern}: {reason}"


def test_no_print_outside_scripts():
    for path in SOURCES:
        if folder_of(path) not in ("tools", "benchmarks", "script"):
            calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
            assert not any(isinstance(c.func, ast.Name) and c.func.id == "print" for c in calls), path


def test_entry_scripts_are_thin():
    for path in ROOT.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 80, path


def test_the_rules_catch_a_breach():
    """The checks above fail on files that break them."""
    breach = ROOT / "utils" / "_breach.py"
    try:
        breach.write_text("from model.evf import EVFModel\nimport bitsandbytes\nimport tools.list_models\n")
        assert len(violations(breach)) == 4
    finally:
        breach.unlink()


def test_requirements_are_used():
    """Every runtime requirement is imported somewhere, and every third-party import is a requirement."""
    names = {"opencv-python": "cv2", "pillow": "PIL", "pyyaml": "yaml", "huggingface-hub": "huggingface_hub",
             "faster-coco-eval": "faster_coco_eval", "open_clip_torch": "open_clip"}  # fmt: skip
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {re.split(r"[<>=]", line)[0] for line in lines if line and not line.startswith("#")}
    required = {names.get(name, name) for name in required}
    used = {name.split(".")[0] for path in SOURCES for name, _ in imports(path) if not name.startswith(".")}
    through_others = {"torchvision", "tensorboard"}  # timm imports the one (listed: torch's twin), torch the other
    assert required - used - through_others == set()
    extra = {"psutil", "segment_anything", "sam2", "pytest"}  # benchmarks only
    assert used - required - OURS - OPTIONAL - extra - set(sys.stdlib_module_names) == set()


def run_python(code, **options):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False, **options)


def test_third_party_entry_points_survive_our_datasets_folder(tmp_path):
    """`datasets/` shadows Hugging Face datasets: what we use of others must import, with and without that package."""
    code = (
        "import datasets, transformers, timm, torchvision, huggingface_hub, safetensors, pycocotools.mask, cv2, tyro\n"
        "import faster_coco_eval\n"
        "import open_clip\n"
        "from transformers import SamModel, Sam2VideoModel\n"
        "from timm.models.vision_transformer import VisionTransformer\n"
        "print(datasets.__file__)"
    )
    fake = tmp_path / "datasets"
    fake.mkdir()
    (fake / "__init__.py").write_text("__version__ = '4.0.0'\n")
    (tmp_path / "datasets-4.0.0.dist-info").mkdir()
    (tmp_path / "datasets-4.0.0.dist-info" / "METADATA").write_text("Name: datasets\nVersion: 4.0.0\n")
    import os

    for extra in ({}, {"PYTHONPATH": str(tmp_path)}):
        done = run_python(code, env={**os.environ, **extra})
        assert done.returncode == 0, done.stderr
        assert Path(done.stdout.strip()).parent == ROOT / "datasets"


def test_no_work_at_import():
    """Listing models and reading options needs no torch."""
    code = (
        "import sys, model, configs.inference, configs.cli, utils.errors\n"
        "assert model.list_models('evf-sam2*')\n"
        "assert not {'torch', 'transformers', 'timm', 'cv2'} & sys.modules.keys(), 'heavy import'"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_the_bundled_model_needs_no_model_library():
    """transformers' and timm's modules cost two seconds and more at the start of every command."""
    code = (
        "import sys, numpy as np\n"
        "from model import load_predictor\n"
        "predictor = load_predictor('nano', 'cpu')\n"
        "predictor.set_image(np.zeros((64, 64, 3), np.uint8))\n"
        "predictor.predict(['a cat'])\n"
        "assert not {'transformers', 'timm', 'torchvision', 'torch._dynamo'} & sys.modules.keys(), 'heavy import'"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
