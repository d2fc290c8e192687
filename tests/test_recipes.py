"""Every recipe under configs/, built without weights; and docs/methods.md against the code."""

import functools
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers_for_tests import bert_tokenizer, llama_tokenizer

from covft.config import CONFIG_ROOT, config_text, load_config, stage_configs
from covft.datasets.sampler import StepBatchSampler
from covft.engine import BF16AdamW, CosineWarmup
from covft.engine.data import build_dataloader
from covft.engine.loop import TrainLoop
from covft.engine.state_memory import training_memory
from covft.models import CLIP, MLLM, Phi3, Vicuna
from covft.models.abstract import abstract_model, parameter_counts
from covft.models.text_encoder import LLMEmbeddings
from covft.models.vision.tower import VisionTower
from covft.registry import VFT, check_arguments
from covft.vft import CoVFT, Full

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path.stem for path in CONFIG_ROOT.glob("*.py"))
LLAVA = [name for name in RECIPES if name.startswith("llava15_")]
INTERNVL = [name for name in RECIPES if name.startswith("internvl2_")]
GOLDEN = json.loads((ROOT / "tests" / "golden" / "parameters.json").read_text())
METHODS_PAGE = (ROOT / "docs" / "methods.md").read_text()
PROCESSES = 8

#: What each recipe asks of its method, beyond the class.
OPTIONS = {
    "covft_image_only": {"context": "image-only"},
    "covft_text_only": {"context": "text-only"},
    "covft_concat": {"context": "concat"},
    "covft_random2": {"routing": "random@2"},
    "covft_uniform": {"routing": "uniform"},
    "covft_sparse2": {"routing": "sparse@2"},
    "covft_blocks_0_22": {"first_block": 0, "last_block": 22},
    "covft_blocks_0_10": {"first_block": 0, "last_block": 10},
    "covft_blocks_15_22": {"first_block": 15, "last_block": 22},
    "covft_blocks_19_22": {"first_block": 19, "last_block": 22},
    "covft_2experts": {"num_experts": 2},
    "covft_8experts": {"num_experts": 8},
    "lora_r512": {"rank": 512, "alpha": 1024.0},
}
#: Labels of recipes that aren't their method's name.
LABELS = {"qa_vit": "QAViT", "q_moe": "QMoE", "lora_r512": "LoRA", "qlora": "Freeze"}


@functools.cache
def stages_of(recipe: str):
    return dict(stage_configs(load_config(recipe)))


_built: dict[str, MLLM] = {}


def model_of(recipe: str, stage: str) -> MLLM:
    """Build a stage's model, or take that of another recipe whose stage has the same."""
    cfg = stages_of(recipe)[stage].model
    key = repr(stages_of(recipe)[stage].to_dict()["model"])
    if key not in _built:
        _built[key] = abstract_model(cfg)
    return _built[key]


def method_name(recipe: str) -> str:
    label = re.sub(r"^(llava15_\d+b|internvl2|quickstart)_", "", recipe)
    label = re.sub(r"^(siglip|dinov3)_", "", label)
    label = LABELS.get(label, label.split("_")[0])
    return next(name for name in VFT.names() if name.lower() == label.lower())


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_stage_builds(recipe: str) -> None:
    assert list(stages_of(recipe)) == ["pretrain", "finetune"]
    first, last = model_of(recipe, "pretrain"), model_of(recipe, "finetune")
    trained = [name for name, p in first.named_parameters() if p.requires_grad]
    assert trained and all(name.startswith("projector.") for name in trained)
    assert type(last.vision.vft).__name__ == method_name(recipe)
    assert all(p.device.type == "meta" for p in last.parameters())
    tokens = {"llava15": 576, "internvl2": 256, "quickstart": 9}[recipe.split("_")[0]]
    assert first.num_image_tokens == last.num_image_tokens == tokens
    assert parameter_counts(last) == GOLDEN[recipe], (
        "if the change is meant: python tools/count_parameters.py --json "
        "tests/golden/parameters.json"
    )


def test_golden_counts_are_those_of_the_recipes() -> None:
    assert sorted(GOLDEN) == RECIPES


@pytest.mark.parametrize(
    ("recipe", "trained_millions"),
    [
        ("llava15_7b_bitfit", 0.260096),
        ("llava15_7b_lora", 1.51),
        ("llava15_7b_vpt", 1.18),
        ("llava15_7b_covft", 521.9),
        ("llava15_7b_full", 290.9),
        # 96.5 M on top of LLM and projector, 6.759 B, are the 6.86 B of the paper's Table 7.
        ("llava15_7b_lora_r512", 96.5),
    ],
)
def test_counts_known_from_elsewhere(recipe: str, trained_millions: float) -> None:
    assert GOLDEN[recipe]["vision_trainable"] / 1e6 == pytest.approx(trained_millions, rel=4e-3)


def test_llm_and_encoder_of_each_family() -> None:
    for recipe in LLAVA:
        for stage in ("pretrain", "finetune"):
            model = model_of(recipe, stage)
            layers, width = (40, 5120) if "13b" in recipe else (32, 4096)
            assert isinstance(model.llm, Vicuna) and model.llm.hidden_dim == width
            assert model.llm.model.config.num_hidden_layers == layers
            encoder = next((e for e in ("SigLIP", "DINOv3") if e.lower() in recipe), "CLIP")
            assert type(model.vision.backbone).__name__ == encoder
            assert len(model.vision.backbone.blocks) == 23
            assert model.vision.backbone.checkpointing and model.llm.checkpointing
            assert model.template == ("plain" if stage == "pretrain" else "v1")


def test_internvl2_is_the_published_model() -> None:
    full, covft = (model_of(f"internvl2_{name}", "finetune") for name in ("full", "covft"))
    backbone = full.vision.backbone
    assert type(backbone).__name__ == "InternViT" and len(backbone.blocks) == 24
    assert [block.drop_path.rate for block in backbone.blocks[1:]] == pytest.approx(
        [0.1 * index / 23 for index in range(1, 24)]
    )
    assert isinstance(full.llm, Phi3) and full.template == "phi3-chat"
    assert full.llm.model.config.vocab_size == 32064 and full.llm.hidden_dim == 3072
    shapes = [tuple(p.shape) for p in full.projector.parameters()]
    assert shapes == [(4096,), (4096,), (3072, 4096), (3072,), (3072, 3072), (3072,)]
    experts = [type(block.mlp).__name__ == "CoMoE" for block in covft.vision.backbone.blocks]
    assert experts == [False] * 12 + [True] * 12
    assert covft.vision.backbone.checkpointing and covft.llm.checkpointing
    cfg, other = load_config("internvl2_covft"), load_config("internvl2_full")
    assert cfg.model.vision.pop("vft") == {"type": CoVFT}
    assert other.model.vision.pop("vft") == {"type": Full}
    assert config_text(cfg) == config_text(other)


def test_settings_are_those_of_internvl2() -> None:
    stages = stages_of("internvl2_full")
    llava = stages_of("llava15_7b_freeze")["pretrain"]
    for key in ("train_dataloader", "train_cfg", "optim_wrapper", "param_scheduler"):
        assert stages["pretrain"][key] == llava[key]
    last = stages["finetune"]
    optimizer = last.optim_wrapper.optimizer
    assert (optimizer.type.__name__, optimizer.lr, optimizer.betas) == ("AdamW", 4e-5, (0.9, 0.999))
    assert optimizer.weight_decay == 0.01 and "lr" not in last.optim_wrapper
    loader = last.train_dataloader
    assert loader.batch_size * last.train_cfg.accumulation * PROCESSES == 128
    assert loader.group == "length" and last.train_cfg.max_epochs == 1
    assert last.param_scheduler.warmup_ratio == 0.03
    for stage, length in (("pretrain", 2048), ("finetune", 4096)):
        data = stages[stage].train_dataset
        assert (data.resize, data.max_tiles, data.max_length) == ("tiles", 6, length)
        assert Path(data.annotations).name == (
            "blip_laion_cc_sbu_558k.json" if stage == "pretrain" else "llava_v1_5_mix665k.json"
        )


@pytest.mark.parametrize(
    "recipe", [name for name in LLAVA if name not in ("llava15_7b_qlora", "llava15_7b_covft_80gb")]
)
def test_recipes_differ_in_the_method_alone(recipe: str) -> None:
    label = re.sub(r"^llava15_\d+b_", "", recipe)
    encoder = next((e for e in ("siglip", "dinov3") if e in recipe), None)
    size = "13b" if "13b" in recipe else "7b"
    base = f"llava15_{size}_{encoder}_freeze" if encoder else f"llava15_{size}_freeze"
    cfg, other = load_config(recipe), load_config(base)
    vft = cfg.model.vision.pop("vft")
    other.model.vision.pop("vft")
    assert config_text(cfg) == config_text(other)
    assert vft.type.__name__ == method_name(recipe)
    assert {key: value for key, value in vft.items() if key != "type"} == OPTIONS.get(label, {})


def test_qlora_tunes_a_quantised_llm_by_updates() -> None:
    first, last = (stages_of("llava15_7b_qlora")[name] for name in ("pretrain", "finetune"))
    assert last.model.llm.quantization == first.model.llm.quantization == "nf4"
    assert first.model.llm.lora is None and first.model.llm.freeze
    trained = {
        name
        for name, p in model_of("llava15_7b_qlora", "finetune").named_parameters()
        if p.requires_grad and not name.startswith("projector.")
    }
    assert len(trained) == 32 * 7 * 2 and all(".lora_" in name for name in trained)
    assert last.optim_wrapper.lr == {"llm": 2e-4, "vision": "method"}


def test_one_gpu_takes_the_steps_of_eight() -> None:
    """The recipe for 80 GB: samples of a step, method and rates as elsewhere; bytes as it says."""
    pytest.importorskip("bitsandbytes")
    one, eight = stages_of("llava15_7b_covft_80gb"), stages_of("llava15_7b_covft")
    for name in ("pretrain", "finetune"):
        here, there = one[name], eight[name]
        samples = here.train_dataloader.batch_size * here.train_cfg.accumulation
        assert samples == there.train_dataloader.batch_size * PROCESSES
        assert here.train_dataloader.pack and here.compile is True
        optimizer, other = dict(here.optim_wrapper.optimizer), there.optim_wrapper.optimizer
        assert optimizer.pop("type") is BF16AdamW and optimizer.pop("compile")
        assert optimizer == {key: value for key, value in other.items() if key != "type"}
        for key in ("train_dataset", "param_scheduler"):
            assert here[key] == there[key]
        assert here.model.vision.vft == there.model.vision.vft
    assert one["finetune"].optim_wrapper.lr == eight["finetune"].optim_wrapper.lr
    memory = training_memory(one["finetune"], tokens=8 * (576 + 308), images=8)
    kept = ("weights", "gradients", "low_half", "moments")
    page = (CONFIG_ROOT / "llava15_7b_covft_80gb.py").read_text()
    for key in (*kept, "activation_budget"):
        assert f" {memory[key] / 1e9:.2f}" in page, key
    assert f" {sum(memory[key] for key in kept) / 1e9:.2f}" in page
    assert f"would take {memory['block_inputs'] / 1e9:.1f}" in page
    # 81,559 MiB, of which the driver keeps some.
    left = 84e9 - sum(memory[key] for key in (*kept, "activation_budget"))
    assert left == pytest.approx(14e9, rel=0.05)
    first = training_memory(one["pretrain"], tokens=32 * (576 + 30), images=32)
    del first["block_inputs"]  # part of the budget
    assert sum(first.values()) < 60e9


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_the_recipe_for_one_gpu_trains_when_shrunk(
    tmp_path: Path, monkeypatch, backend: str
) -> None:
    from covft.engine.train import train

    loader = {"batch_size": 2, "num_workers": 0}
    optimizer = {"moments": "float32", "compile": False}
    cfg = load_config(
        "llava15_7b_covft_80gb",
        {
            "train_dataloader": loader,
            "train_cfg": {"accumulation": 2},
            "optim_wrapper.optimizer": optimizer,
            "stages.pretrain.train_dataloader": loader,
            "stages.pretrain.train_cfg": {"accumulation": 1},
            "stages.pretrain.optim_wrapper.optimizer": optimizer,
            "compile": {"_delete_": True, "backend": backend, "fullgraph": True},
        },
    )
    _shrink(cfg, tmp_path)
    monkeypatch.chdir(tmp_path)
    _write_llava_data(tmp_path / "data")
    train(cfg, work_dir=tmp_path / "run")
    for stage, steps in (("pretrain", 3), ("finetune", 2)):
        lines = (tmp_path / "run" / stage / "scalars.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in lines]
        assert len(losses) == steps and all(0 < loss < 10 for loss in losses)
        weights = load_file(tmp_path / "run" / stage / "weights.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_bases_differ_in_encoder_or_llm_alone() -> None:
    texts = set()
    for recipe in [name for name in LLAVA if name.endswith("_freeze")]:
        cfg = load_config(recipe)
        cfg.model.vision.pop("backbone"), cfg.model.pop("llm")
        texts.add(config_text(cfg))
    assert len(texts) == 1


def test_settings_are_those_of_llava15() -> None:
    expected = {
        "pretrain": dict(lr=1e-3, batch=256, file="blip_laion_cc_sbu_558k.json", resize=None),
        "finetune": dict(lr=2e-5, batch=128, file="llava_v1_5_mix665k.json", resize="pad"),
    }
    for name, stage in stages_of("llava15_7b_freeze").items():
        want = expected[name]
        loader = dict(stage.train_dataloader)
        group = loader.get("group", "none")
        assert group == ("none" if name == "pretrain" else "modality_length")
        sampler = StepBatchSampler(
            [1] * 1000,
            has_image=[True] * 1000,
            batch_size=loader["batch_size"],
            accumulation=stage.train_cfg.accumulation,
            world_size=PROCESSES,
            group=group,
        )
        assert sampler.step_size == want["batch"]
        assert stage.optim_wrapper.optimizer.lr == want["lr"]
        assert stage.optim_wrapper.optimizer.type.__name__ == "AdamW"
        assert stage.optim_wrapper.optimizer.weight_decay == 0
        assert stage.train_cfg.max_epochs == 1 and "max_iters" not in stage.train_cfg
        assert stage.param_scheduler.type is CosineWarmup
        assert stage.param_scheduler.warmup_ratio == 0.03
        data = stage.train_dataset
        assert Path(data.annotations).name == want["file"]
        assert data.get("resize") == want["resize"] and data.max_length == 2048
    assert "lr" not in stages_of("llava15_7b_freeze")["pretrain"].optim_wrapper
    assert stages_of("llava15_7b_freeze")["finetune"].optim_wrapper.lr == {"vision": "method"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_setting_is_one_that_exists(recipe: str) -> None:
    for stage in stages_of(recipe).values():
        data = {key: value for key, value in stage.train_dataset.items() if key != "type"}
        check_arguments(stage.train_dataset.type, {"spec": None, **data})
        given = {"dataset": None, "collate_fn": None}
        check_arguments(build_dataloader, {**given, **stage.train_dataloader})
        check_arguments(TrainLoop, {"runner": None, "dataloader": None, **stage.train_cfg})


@pytest.mark.parametrize("name", ["llava15_7b_covft", "llava15_7b_q_moe"])
def test_a_recipe_trains_when_shrunk(name: str, tmp_path: Path, monkeypatch) -> None:
    from covft.engine.train import train

    cfg = load_config(
        name,
        {
            "train_dataloader": dict(batch_size=2, num_workers=0),
            "stages.pretrain.train_dataloader": dict(batch_size=2, num_workers=0),
        },
    )
    _shrink(cfg, tmp_path)
    monkeypatch.chdir(tmp_path)
    _write_llava_data(tmp_path / "data")
    train(cfg, work_dir=tmp_path / "run")
    for stage in ("pretrain", "finetune"):
        lines = (tmp_path / "run" / stage / "scalars.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in lines]
        assert len(losses) == 3 and all(0 < loss < 10 for loss in losses)


def _shrink(cfg, folder: Path) -> None:
    """Put tiny random models in the place of the published ones."""
    llama_tokenizer().save_pretrained(folder / "llm")
    bert_tokenizer().save_pretrained(folder / "text")
    sizes = dict(num_hidden_layers=1, num_attention_heads=4)
    llm = dict(model_type="llama", hidden_size=32, intermediate_size=64, vocab_size=400, **sizes)
    text = dict(model_type="bert", hidden_size=24, intermediate_size=48, vocab_size=200, **sizes)
    vision = dict(hidden_dim=32, depth=4, num_heads=4, mlp_dim=64, patch_size=8, image_size=32)
    for part, arch, tokenizer in (
        (cfg.model.vision.backbone, vision, None),
        (cfg.model.llm, llm, str(folder / "llm")),
        (cfg.model.text_encoder, text, str(folder / "text")),
    ):
        part.weights = None
        part.arch = arch
        if tokenizer:
            part.tokenizer = tokenizer


def _write_llava_data(root: Path) -> None:
    """Write six samples for each stage in LLaVA's files and folders; two have no image."""
    for images in ("LLaVA-Pretrain/images/00000", "coco/train2017"):
        (root / images).mkdir(parents=True)
        for number in range(6):
            picture = Image.new("RGB", (40, 24), (40 * number, 0, 90))
            picture.save(root / images / f"{number}.jpg")
    captions, instructions = [], []
    for number in range(6):
        answer = {"from": "gpt", "value": "red"}
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, answer]
        caption = {"id": f"c{number}", "image": f"00000/{number}.jpg", "conversations": turns}
        captions.append(caption)
        instruction = {**caption, "image": f"coco/train2017/{number}.jpg"}
        if number > 3:
            question = {"from": "human", "value": "is there a circle?"}
            instruction = {"id": f"t{number}", "conversations": [question, answer]}
        instructions.append(instruction)
    file = root / "LLaVA-Pretrain" / "blip_laion_cc_sbu_558k.json"
    file.write_text(json.dumps(captions))
    (root / "llava_v1_5_mix665k.json").write_text(json.dumps(instructions))


def test_one_import_line_makes_the_llms_embeddings_the_context(tmp_path: Path) -> None:
    shutil.copytree(CONFIG_ROOT, tmp_path / "configs")
    base = tmp_path / "configs" / "llava15_7b_freeze.py"
    base.write_text(base.read_text().replace("text.bert_base", "text.llm_embeddings"))
    cfg = load_config(base.with_name("llava15_7b_covft.py"))
    model = abstract_model(stage_configs(cfg)[-1][1].model)
    assert isinstance(model.text_encoder, LLMEmbeddings) and model.vision.context_dim == 4096


def test_abstract_models_need_an_architecture() -> None:
    model = load_config("quickstart_covft").model
    before = config_text(model)
    abstract_model(model)
    assert config_text(model) == before
    model.vision.backbone = dict(type="CLIP", weights="openai/clip-vit-base-patch16")
    assert abstract_model(model).vision.hidden_dim == 768
    model.vision.backbone = dict(type=CLIP, weights="somewhere/else")
    with pytest.raises(ValueError, match="'somewhere/else' is known to its files alone"):
        abstract_model(model)


def test_the_tool_writes_the_golden_file(tmp_path: Path, monkeypatch, capsys) -> None:
    recipe, target = "quickstart_freeze", tmp_path / "counts.json"
    monkeypatch.setattr(sys, "argv", ["count_parameters.py", recipe, "--json", str(target)])
    runpy.run_path(str(ROOT / "tools" / "count_parameters.py"), run_name="__main__")
    assert json.loads(target.read_text()) == {recipe: GOLDEN[recipe]}
    assert f"{GOLDEN[recipe]['total']:,}" in capsys.readouterr().out


def page_rows(columns: int) -> list[list[str]]:
    """Return the cells of the page's tables of that width, code marks removed."""
    lines = [line for line in METHODS_PAGE.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if len(row) == columns]


def test_page_of_methods_equals_the_code() -> None:
    rows = {row[0].strip("`"): row for row in page_rows(7) if row[0] != "method"}
    kinds = {name: VFT.get(name) for name in VFT.names()}
    assert set(rows) == {kind.__name__ for kind in kinds.values()}
    for name, (_, _, _, trainable, rate, same, context) in rows.items():
        with torch.device("meta"):
            tower = VisionTower(backbone=dict(type=CLIP), vft=dict(type=name), context_dim=768)
        count = sum(p.numel() for p in tower.parameters() if p.requires_grad)
        assert trainable == f"{count:,}", name
        assert (float(rate) if rate else None) == (tower.vft.learning_rate if count else None), name
        assert same == ("yes" if tower.vft.identity_at_init else "no"), name
        assert context == ("yes" if tower.needs_context else "no"), name


def test_page_of_recipes_equals_the_recipes() -> None:
    listed = {}
    for recipe, _, mean, trainable in page_rows(4):
        listed[recipe.strip("`")] = (mean, trainable)
    for _, _, _, mean, recipe, trainable in page_rows(6):
        listed[recipe.strip("`")] = (mean, trainable)
    listed.pop("recipe")
    assert sorted(listed) == sorted(LLAVA + INTERNVL)
    for recipe, (mean, trainable) in listed.items():
        assert trainable == f"{GOLDEN[recipe]['vision_trainable']:,}", recipe
        text = (CONFIG_ROOT / f"{recipe}.py").read_text()
        quoted = "No row of the paper" if mean == "-" else f"(the paper's mean: {mean})"
        assert quoted in text, recipe
