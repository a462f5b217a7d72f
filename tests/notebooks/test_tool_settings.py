"""Settings of tools that want a card, held against the tools' own released classes, without installing them.

Axolotl, DeepSpeed and Unsloth want other releases of our libraries than we use. They are fetched once,
unpacked without what they depend on, and asked. Without a package index these tests are skipped, and say so.
TensorRT-LLM cannot be fetched: its package asks its maker's own index.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from definitions import definitions

from tools import make_tool_settings

PRINTED = definitions("27_experiment_tools_at_scale", "definitions")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tools")
    try:
        make_tool_settings.fetch(folder)
    except subprocess.CalledProcessError as error:
        pytest.skip(
            f"no package index to fetch {', '.join(make_tool_settings.VERSIONS)} from: {error.stderr[-200:]}"
        )
    helpers = ["hjson", "py-cpuinfo", "einops", "msgpack"]  # what reading DeepSpeed's settings imports
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    subprocess.run([*pip, *helpers], check=True, capture_output=True)
    return folder


def test_the_names_are_those_of_the_released_packages(unpacked: Path) -> None:
    assert make_tool_settings.text(unpacked) == make_tool_settings.FILE.read_text(encoding="utf-8")


def ask(folder: Path, imports: str, accept: str, settings: list[dict]) -> list[str]:
    """What the tool's own class says of each of these settings: an error's first words, or what it took."""
    code = f"""
import json, sys
{imports}
for given in json.load(sys.stdin):
    try:
        said = {accept}
    except Exception as error:
        said = f"{{type(error).__name__}}: {{error}}"
    print("SAID", json.dumps(said))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, input=json.dumps(settings), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("SAID ")]
    return [json.loads(line.removeprefix("SAID ")) for line in lines]


def test_axolotl_refuses_the_printed_settings_and_drops_an_unknown_name_without_a_word(
    unpacked: Path,
) -> None:
    printed = yaml.safe_load(PRINTED.AXOLOTL)
    repaired = {name: value for name, value in printed.items() if name != "dataset"}
    repaired |= {"datasets": printed["dataset"]}
    imports = "from axolotl.utils.schemas.config import AxolotlInputConfig"
    said = ask(
        unpacked,
        imports,
        "sorted(set(given) - set(AxolotlInputConfig(**given).model_dump(by_alias=True)))",
        [
            printed,
            repaired,
            repaired | {"lorra_r": 8},
            repaired | {"lora_r": "eight"},
            repaired | {"adapter": "qlora", "load_in_4bit": False},
        ],
    )
    assert "either datasets or pretraining_dataset is required" in said[0]
    assert said[1] == []  # `adapter: lora` in 4 bits is taken, too
    assert said[2] == ["lorra_r"]  # dropped: neither an error nor a setting
    assert "lora_r" in said[3] and "valid integer" in said[3]
    assert "Require cfg.load_in_4bit to be True for qlora" in said[4]


def test_deepspeed_takes_a_misspelt_section_and_refuses_a_misspelt_name_inside_one(unpacked: Path) -> None:
    printed = {"train_batch_size": 32, "gradient_accumulation_steps": 1, "fp16": {"enabled": True}}
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    imports = (
        "import os; os.environ.update(DS_ACCELERATOR='cpu', RANK='0', WORLD_SIZE='1', LOCAL_RANK='0')\n"
        f"sys.path.insert(0, 'deepspeed-{make_tool_settings.VERSIONS['deepspeed']}')\n"
        "from deepspeed.runtime.config import DeepSpeedConfig"
    )
    said = ask(
        unpacked,
        imports,
        "int(DeepSpeedConfig(given).zero_config.stage)",
        [
            printed | {"zero_optimization": zero},
            printed | {"zero_optimisation": zero},
            printed | {"zero_optimization": zero | {"stages": 3}},
            printed | {"zero_optimization": zero, "bf16": {"enabled": True}},
        ],
    )
    assert said[:2] == [2, 0]  # the misspelt section is not read: nothing is sharded
    assert "Extra inputs are not permitted" in said[2]
    assert "cannot be simultaneously enabled" in said[3]
