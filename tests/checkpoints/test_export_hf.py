"""--to hf: folders that transformers loads with the code in them, without this package."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from export_runs import write_run
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from covft.checkpoints import load_run
from covft.checkpoints.export import export_run
from covft.checkpoints.export.bundle import COMMON, bundle, third_party_imports
from covft.checkpoints.export.probe import Probe, compare, float32_logits, probe_image
from covft.datasets.prompts import Prompt, collate_prompts, generate_answers
from covft.registry import VFT

METHODS: dict[str, dict] = {
    "covft": dict(type="CoVFT"),
    "covft_ablation": dict(type="CoVFT", context="concat", routing="sparse@2", first_block=0),
    "lora": dict(type="LoRA", rank=2),
    "svpt": dict(type="SVPT", num_prompts=2),
    "vpt": dict(type="VPT", num_prompts=2),
    "qa_vit": dict(type="QAViT"),
    "q_moe": dict(type="QMoE", dim=16, num_heads=2, num_queries=4),
}
QUESTIONS = ["what color is the shape?", "is there a circle on the right?"]

# Run where neither this package nor mmengine can be imported.
SCRIPT = """
import json, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("covft", "mmengine", "covft_configs"):
            raise ModuleNotFoundError(f"No module named '{name}' (blocked)", name=name)
sys.meta_path.insert(0, Blocker())
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor
from transformers import AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(1)
image = Image.open(sys.argv[1])
found = {}
for folder in sys.argv[3:]:
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(text=json.loads(sys.argv[2]), images=[image, [image, image]])
    with torch.no_grad():
        logits = model(**inputs).logits
    ids = model.generate(**inputs, max_new_tokens=6)
    found[folder] = dict(answers=processor.batch_decode(ids), logits=logits.double().tolist())
json.dump(found, open(sys.argv[1] + ".json", "w"))
"""


@torch.no_grad()
def test_folders_of_all_methods_run_without_this_package(tiny_options, tmp_path: Path) -> None:
    image = probe_image()
    image.save(tmp_path / "image.png")
    expected = {}
    for name, vft in METHODS.items():
        options = {**tiny_options, "model.vision.vft": {"_delete_": True, **vft}}
        if name == "covft_ablation":
            text = {"_delete_": True, "type": "LLMEmbeddings", "pooling": "last"}
            options = {
                **{k: v for k, v in options.items() if "text_encoder" not in k},
                "model.text_encoder": text,
                "model.llm.arch": {**options["model.llm.arch"], "tie_word_embeddings": False},
                "train_dataset.resize": "pad",
            }
        root = write_run(tmp_path / f"run_{name}", options)
        out = tmp_path / f"out_{name}"
        assert export_run(root, out, to="hf") < 1e-6
        expected[str(out)] = _answers(root, image)
    arguments = [str(tmp_path / "image.png"), json.dumps(QUESTIONS), *expected]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["HF_HOME"] = str(tmp_path / "fresh")
    subprocess.run([sys.executable, "-c", SCRIPT, *arguments], env=environment, check=True)
    found = json.loads((tmp_path / "image.png.json").read_text())
    assert found.keys() == expected.keys()
    for out, (answers, logits) in expected.items():
        assert found[out]["answers"] == answers and any(answers)
        torch.testing.assert_close(torch.tensor(found[out]["logits"]), logits.float())


def _answers(root: Path, image: Image.Image) -> tuple[list[str], torch.Tensor]:
    run = load_run(root, device="cpu")
    prompts = [
        Prompt(str(n), [{"from": "human", "value": question}], [image] * (n + 1))
        for n, question in enumerate(QUESTIONS)
    ]
    batch = collate_prompts(prompts, run.spec, resize=run.resize)
    mask = batch.pop("attention_mask")
    logits = run.model.llm.logits(run.model.llm.hidden_states(run.model.embeddings(**batch), mask))
    answers = generate_answers(run.model, prompts, run.spec, max_new_tokens=6, resize=run.resize)
    return answers, logits


def test_half_the_size(tiny_options, tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", tiny_options)
    run = load_run(root)
    probe = Probe.of(run)
    for value in run.model.state_dict().values():
        value.copy_(value.bfloat16())
    moved = compare(probe.logits, float32_logits(run.model, probe.batch), loader="load_run")
    # In float32: this machine's 16-bit sums have no part in it.
    exported = export_run(root, tmp_path / "out", to="hf", dtype="bfloat16")
    assert exported == pytest.approx(moved, abs=1e-6) and moved > 1e-3
    assert load_file(tmp_path / "out" / "model.safetensors").popitem()[1].dtype == torch.bfloat16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_type_whose_range_is_too_small(tiny_options, tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", tiny_options)
    file = next(root.glob("**/weights.safetensors"))
    state = load_file(file)
    state["projector.layers.3.bias"][0] = 1e5  # float16 ends at 65,504
    save_file(state, file)
    with pytest.raises(ValueError, match=r"are no numbers; float16 ends"):
        export_run(root, tmp_path / "out", to="hf", dtype="float16")


def test_tiles(tiny_options, tmp_path: Path) -> None:
    tiles = {"train_dataset.resize": "tiles", "train_dataset.max_tiles": 2}
    run = write_run(tmp_path / "run", {**tiny_options, **tiles})
    assert export_run(run, tmp_path / "out", to="hf") < 1e-6
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    inputs = processor(text=QUESTIONS[0], images=Image.new("RGB", (60, 30)))
    assert inputs["pixel_values"].shape == (3, 3, 32, 32), "two tiles and the thumbnail"
    with pytest.raises(ValueError, match="2 questions, but images for 1"):
        processor(text=QUESTIONS, images=[Image.new("RGB", (60, 30))])


def test_a_damaged_export_is_kept_under_another_name(
    tiny_options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", tiny_options)
    write = "covft.checkpoints.export.hf.write_weights"

    def damaged(folder, state):
        from covft.checkpoints.export.folder import write_weights

        name = "mllm.projector.layers.3.weight"
        write_weights(folder, {**state, name: 2 * state[name]})

    monkeypatch.setattr(write, damaged)
    with pytest.raises(
        ValueError, match=r"doesn't give the run's logits.*kept in .*out-unverified"
    ):
        export_run(run, tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out-unverified" / "model.safetensors").is_file()


def test_a_folder_that_cannot_be_loaded_is_kept_too(
    tiny_options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", tiny_options)
    monkeypatch.setattr("covft.checkpoints.export.hf.code", lambda model: {})
    with pytest.raises(ValueError, match=r"can't be loaded: .*kept in .*out-unverified"):
        export_run(run, tmp_path / "out", to="hf")
    assert (tmp_path / "out-unverified" / "config.json").is_file()


def test_command(tiny_options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    run = write_run(tmp_path / "run", tiny_options)
    tool = str(Path(__file__).parents[2] / "tools" / "convert.py")
    arguments = [tool, str(run), "--to", "hf", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(tool, run_name="__main__")
    assert "its logits differ from the run's by" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"error: .*out exists, and nothing is overwritten"):
        runpy.run_path(tool, run_name="__main__")


def test_wrong_arguments(tiny_options, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'hf-llava'"):
        export_run(tmp_path, tmp_path / "out", to="hf_llava")
    with pytest.raises(ValueError, match="expected one of float32"):
        export_run(tmp_path, tmp_path / "out", to="hf", dtype="int8")
    with pytest.raises(FileNotFoundError, match="is no run"):
        export_run(tmp_path, tmp_path / "out", to="hf")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="nothing is overwritten"):
        export_run(tmp_path, tmp_path / "out", to="hf")
    assert [p.name for p in tmp_path.glob("out*")] == ["out"], "no leftovers"


def test_every_method_is_bundled_without_further_packages() -> None:
    methods = {kind.__module__ for kind in VFT.module_dict.values()}
    shipped = {
        f"covft.checkpoints.export.shipped.{name}_covft" for name in ("modeling", "processing")
    }
    files = bundle(sorted(methods | shipped | {"covft.models.vision.internvit"}))
    assert {"vft_covft.py", "models_mllm.py", "registry.py", "weights_stand_in.py"} <= files.keys()
    assert not any("checkpoints" in name for name in files)
    allowed = COMMON | set(sys.stdlib_module_names)
    for name, text in files.items():
        assert third_party_imports(text) <= allowed, name
        assert "import covft" not in text and "from covft" not in text, name
        compile(text, name, "exec")


def test_a_class_from_elsewhere_cannot_be_shipped() -> None:
    with pytest.raises(ValueError, match=r"'my\.methods' isn't part of covft"):
        bundle(["covft.models.mllm", "my.methods"])


def test_folders_of_one_name(tiny_options, tmp_path: Path) -> None:
    """Python keeps imported modules, and transformers names them after folders."""
    for name, vft in METHODS.items():
        if name in ("lora", "vpt"):
            options = {**tiny_options, "model.vision.vft": {"_delete_": True, **vft}}
            run = write_run(tmp_path / name, options)
            assert export_run(run, tmp_path / f"{name}_exports" / "hf", to="hf") < 1e-6
