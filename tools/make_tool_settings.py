"""Make data/schemas/tool_settings.json: the names of settings that four tools know.

    python tools/make_tool_settings.py

These tools want a card, or other releases of our libraries than we use, so they are fetched from the package
index, unpacked without what they depend on, and read. What TensorRT-LLM knows is copied from its
documentation: its package cannot be unpacked without the maker's own index.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parents[1] / "data" / "schemas" / "tool_settings.json"
VERSIONS = {"axolotl": "0.19.0", "deepspeed": "0.19.8", "unsloth": "2026.10.9"}
TRTLLM = {
    "documentation": "https://nvidia.github.io/TensorRT-LLM/commands/trtllm-build.html",
    "trtllm-build": [
        *(
            "build_config",
            "checkpoint_dir",
            "gemm_plugin",
            "max_batch_size",
            "max_beam_width",
            "max_input_len",
        ),
        *("max_num_tokens", "max_seq_len", "model_config", "output_dir", "workers"),
    ],
    "run.py": ["engine_dir", "input_text", "max_input_length", "max_output_len", "tokenizer_dir"],
}


def fetch(folder: Path) -> None:
    """The three packages, unpacked side by side in a folder."""
    wanted = [f"{name}=={version}" for name, version in VERSIONS.items()]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    pip += ["--retries", "1", "--dest", str(folder)]
    subprocess.run([*pip, *wanted], check=True, capture_output=True, text=True)
    for wheel in folder.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(folder)
    for archive in folder.glob("*.tar.gz"):
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def fields(path: Path, name: str) -> list[str]:
    """The annotated fields of a class."""
    found = next(n for n in ast.walk(tree(path)) if isinstance(n, ast.ClassDef) and n.name == name)
    return sorted(n.target.id for n in found.body if isinstance(n, ast.AnnAssign))  # type: ignore[union-attr]


def arguments(path: Path, owner: str, name: str) -> list[str]:
    """The parameters of a method."""
    found = next(n for n in ast.walk(tree(path)) if isinstance(n, ast.ClassDef) and n.name == owner)
    method = next(n for n in found.body if isinstance(n, ast.FunctionDef) and n.name == name)
    return [a.arg for a in method.args.args]


def texts(path: Path) -> list[str]:
    """The lower-case names among the constants that a module gives in capitals."""
    values = [n.value for n in tree(path).body if isinstance(n, ast.Assign)]
    names = [v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)]
    return sorted({name for name in names if name.isidentifier() and name.islower()})


def axolotl(folder: Path) -> dict[str, Any]:
    """Axolotl's settings are spread over forty classes, so that its schema is asked itself."""
    code = (
        "import json; from axolotl.utils.schemas.config import AxolotlInputConfig as C; "
        "f = C.model_fields; print(json.dumps([sorted(x.alias or n for n, x in f.items()), "
        "sorted(n for n, x in f.items() if x.is_required())]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    names, required = json.loads(done.stdout.splitlines()[-1])
    return {"names": names, "required": required}


def described(folder: Path) -> dict[str, Any]:
    """What the unpacked packages say."""
    deepspeed = folder / f"deepspeed-{VERSIONS['deepspeed']}" / "deepspeed" / "runtime"
    zero, precision = deepspeed / "zero", deepspeed / "precision_config.py"
    unsloth, kernels = folder / "unsloth" / "models", folder / "unsloth" / "kernels"
    triton = [p for p in kernels.rglob("*.py") if "import triton" in p.read_text(encoding="utf-8")]
    found = {
        "axolotl": axolotl(folder),
        "deepspeed": {
            "names": sorted({*texts(deepspeed / "constants.py"), "zero_optimization", "fp16", "bf16"}),
            "zero_optimization": fields(zero / "config.py", "DeepSpeedZeroConfig"),
            "offload_optimizer": fields(zero / "offload_config.py", "DeepSpeedZeroOffloadOptimizerConfig"),
            "fp16": fields(precision, "DeepSpeedFP16Config"),
        },
        "unsloth": {
            "from_pretrained": arguments(unsloth / "loader.py", "FastLanguageModel", "from_pretrained"),
            "get_peft_model": arguments(unsloth / "llama.py", "FastLlamaModel", "get_peft_model"),
            "kernel_files_in_triton": len(triton),
            "cuda_files": len([*folder.joinpath("unsloth").rglob("*.cu")]),
        },
    }
    return {name: {"version": VERSIONS[name], **found[name]} for name in found} | {"tensorrt_llm": TRTLLM}


def text(folder: Path) -> str:
    return json.dumps(described(folder), indent=1) + "\n"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        fetch(Path(scratch))
        FILE.write_text(text(Path(scratch)), encoding="utf-8")
