"""xtuner's LLaVA and InternVL configs, converted."""

import json
import runpy
import sys
from pathlib import Path

import check_xtuner_parity
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from tokenizers_for_tests import llama_tokenizer
from torch.optim import AdamW
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from xtuner_configs import PRETRAIN, QLORA, write

from covft.config import load_config, stage_configs
from covft.datasets import InstructDataset, InternVLDataset, MixtureDataset
from covft.engine import CosineWarmup
from covft.interop import import_xtuner
from covft.models import CLIP, MLLM, CausalLM, InternViT, MLPProjector, Phi3, SigLIP, Vicuna
from covft.models.projectors import PixelShuffleProjector
from covft.vft import Freeze, Full, LoRA

ROOT = Path(__file__).parents[2]


def imported(folder, *extra, **options):
    return import_xtuner(write(folder, "config", *extra), **options)


def assert_same(loaded, expected):
    if not isinstance(expected, dict):
        assert loaded == expected
        return
    assert list(loaded) == list(expected)
    for key, value in expected.items():
        assert_same(loaded[key], value)


def run_tool(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["import_config.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "tools/import_config.py"), run_name="__main__")


def test_llava_finetuning(tmp_path):
    config = imported(tmp_path).config
    assert config == {
        "model": {
            "type": MLLM,
            "vision": {
                "backbone": {
                    "type": CLIP,
                    "arch": "large-patch14-336",
                    "weights": "pretrained",
                    "checkpointing": True,
                },
                "vft": {"type": Freeze},
            },
            "projector": {"type": MLPProjector, "depth": 2},
            "llm": {
                "type": Vicuna,
                "arch": "7b",
                "weights": "pretrained",
                "checkpointing": True,
            },
            "template": "v1",
        },
        "train_dataset": {
            "type": InstructDataset,
            "annotations": "data/mix.json",
            "image_root": "data/images",
            "max_length": 2048,
            "resize": "pad",
        },
        "train_dataloader": {"batch_size": 16, "num_workers": 4, "group": "modality_length"},
        "train_cfg": {"max_epochs": 1, "accumulation": 2},
        "optim_wrapper": {
            "optimizer": {"type": AdamW, "lr": 2e-5, "betas": (0.9, 0.95), "weight_decay": 0},
            "clip_grad": {"max_norm": 1.0},
        },
        "param_scheduler": {"type": CosineWarmup, "warmup_ratio": 0.03},
        "checkpoint": {"interval": 250, "max_keep": 3},
        "logging": {"interval": 5, "preview_interval": 250},
        "seed": 0,
    }


def test_what_differs_is_listed_and_nothing_else(tmp_path):
    keys = [note.split(" = ")[0] for note in imported(tmp_path).notes]
    assert keys == [
        "template",
        "optim_wrapper.dtype",
        "param_scheduler[0].start_factor",
        "default_hooks.checkpoint.interval",
        "default_hooks.logger.interval",
        "custom_hooks[1].every_n_iters",
        "custom_hooks[1].evaluation_inputs",
        "the loss is the mean over all supervised tokens of a step; xtuner's of micro-batches",
    ]


def test_source_is_a_config_that_loads_as_the_same(tmp_path):
    result = imported(tmp_path, QLORA)
    path = tmp_path / "ours.py"
    path.write_text(result.source, encoding="utf-8")
    assert all(note[:40] in result.source for note in result.notes)
    assert_same(load_config(path), result.config)


def test_qlora(tmp_path):
    result = imported(tmp_path, QLORA)
    llm = result.config["model"]["llm"]
    assert llm["quantization"] == "nf4" and llm["dtype"] == "bfloat16"
    assert llm["lora"] == {"rank": 512, "alpha": 256.0, "dropout": 0.05} and "freeze" not in llm
    vft = result.config["model"]["vision"]["vft"]
    assert vft == {"type": LoRA, "rank": 64, "alpha": 16.0, "dropout": 0.05}
    assert result.config["load_from"] == "work_dirs/pretrain/iter_2181.pth"
    listed = "\n".join(result.notes)
    for part in ("compute_dtype = torch.float16: always bfloat16", "torch_dtype = 'float16'"):
        assert part in listed
    assert "visual_encoder_lora.target_modules = None: the four attention projections" in listed


def test_two_configs_become_stages(tmp_path):
    files = write(tmp_path, "pretrain", PRETRAIN), write(tmp_path, "finetune", QLORA)
    result = import_xtuner(*files)
    path = tmp_path / "ours.py"
    path.write_text(result.source, encoding="utf-8")
    (first, pretrain), (second, finetune) = stage_configs(load_config(path))
    assert (first, second) == ("pretrain", "finetune")
    assert pretrain.model.llm.freeze and "lora" not in pretrain.model.llm
    assert pretrain.train_dataset.annotations == "data/blip.json"
    assert "resize" not in pretrain.train_dataset and "group" not in pretrain.train_dataloader
    assert pretrain.optim_wrapper.optimizer.lr == 1e-3
    assert finetune.model.llm.lora.rank == 512 and "freeze" not in finetune.model.llm
    assert finetune.train_dataset.resize == "pad" and "load_from" not in finetune
    assert "finetune: starts from the stage before, not from work_dirs/pretrain/iter" in "\n".join(
        result.notes
    )
    with pytest.raises(ValueError, match="two are alike"):
        import_xtuner(files[0], files[0])


def test_other_models_and_settings(tmp_path):
    siglip = """
from transformers import SiglipVisionModel
model.update(
    freeze_visual_encoder=False,
    visual_select_layer=-1,
    projector_depth=3,
    use_activation_checkpointing=False,
    llm=dict(type=AutoModelForCausalLM.from_pretrained,
             pretrained_model_name_or_path="some/llm", torch_dtype=torch.bfloat16),
    visual_encoder=dict(type=SiglipVisionModel.from_pretrained,
                        pretrained_model_name_or_path="google/siglip-so400m-patch14-384"),
)
optim_wrapper.update(dtype="bfloat16")
param_scheduler = [dict(type=CosineAnnealingLR, eta_min=2e-6, T_max=100, by_epoch=False)]
train_cfg = dict(type="TrainLoop", max_iters=100)
randomness = dict(seed=7, deterministic=False)
visualizer = dict(type="Visualizer", vis_backends=[dict(type="TensorboardVisBackend")])
prompt_template = PROMPT_TEMPLATE.internlm2_chat
llava_dataset.update(
    template_map_fn=dict(type=template_map_fn_factory, template=prompt_template),
    max_length=1000,
)
"""
    result = imported(tmp_path, siglip)
    model = result.config["model"]
    backbone = {"type": SigLIP, "arch": "so400m-patch14-384", "weights": "pretrained"}
    assert model["vision"] == {"backbone": backbone, "vft": {"type": Full}, "select_layer": -1}
    assert model["projector"]["depth"] == 3
    assert model["llm"] == {"type": CausalLM, "weights": "some/llm", "dtype": "bfloat16"}
    assert model["template"] == {"type": "chatml", "system": ""}
    assert result.config["train_dataset"]["max_length"] == 1000 + 27**2
    assert result.config["optim_wrapper"]["precision"] == "bf16"
    curve = result.config["param_scheduler"]
    assert curve["warmup_ratio"] == 0 and curve["min_lr_ratio"] == pytest.approx(0.1)
    assert result.config["train_cfg"] == {"max_iters": 50, "accumulation": 2}
    assert result.config["seed"] == 7
    assert result.config["visualizer"] == {"vis_backends": [{"type": "TensorboardVisBackend"}]}
    assert any("xtuner 0.2.0 drops the first one" in note for note in result.notes)


ITERATIONS = """
optim_wrapper.update(accumulative_counts=16)
train_cfg = dict(type=TrainLoop, max_iters=1000)
param_scheduler = [
    dict(type=LinearLR, start_factor=1e-5, by_epoch=False, begin=0, end=100),
    dict(type=CosineAnnealingLR, eta_min=0.0, by_epoch=False, begin=100, end=1000),
]
"""


def test_iterations_become_optimizer_steps(tmp_path):
    result = imported(tmp_path, ITERATIONS)
    config = result.config
    assert config["train_cfg"] == {"max_iters": 63, "accumulation": 16}
    assert config["param_scheduler"] == {"type": CosineWarmup, "warmup_ratio": 0.1}
    assert config["checkpoint"]["interval"] == 32
    assert config["logging"] == {"interval": 1, "preview_interval": 32}
    for key, number, steps in (
        ("train_cfg.max_iters", 1000, 63),
        ("default_hooks.checkpoint.interval", 500, 32),
        ("default_hooks.logger.interval", 10, 1),
        ("custom_hooks[1].every_n_iters", 500, 32),
    ):
        assert f"{key} = {number}: micro-batches in xtuner: {steps} steps of 16" in "\n".join(
            result.notes
        )


def test_iterations_without_accumulation_stay(tmp_path):
    result = imported(tmp_path, ITERATIONS, "optim_wrapper.update(accumulative_counts=1)")
    assert result.config["train_cfg"] == {"max_iters": 1000, "accumulation": 1}
    assert result.config["checkpoint"]["interval"] == 500
    assert not any("micro-batches in xtuner:" in note for note in result.notes)


def test_intervals_that_count_no_iterations_stay(tmp_path):
    never = "default_hooks['checkpoint'].update(interval=-1)"
    assert imported(tmp_path, never).config["checkpoint"]["interval"] == -1
    epochs = "default_hooks['checkpoint'].update(by_epoch=True, interval=4)"
    result = imported(tmp_path, epochs)
    assert result.config["checkpoint"]["interval"] == 4
    assert any("by_epoch = True: 4 is taken as steps" in note for note in result.notes)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            "param_scheduler[0].update(by_epoch=False, end=100)",
            r"param_scheduler\[0\]\.by_epoch = False: train_cfg\.max_epochs counts epochs",
        ),
        (
            "param_scheduler[1].update(by_epoch=False, end=100)",
            r"param_scheduler\[1\]\.by_epoch = False: train_cfg\.max_epochs counts epochs",
        ),
        (
            "train_cfg = dict(type=TrainLoop, max_iters=1000)",
            r"param_scheduler\[0\]\.by_epoch = True: train_cfg\.max_iters counts iterations",
        ),
        (
            ITERATIONS + "del param_scheduler[0]['by_epoch']",  # mmengine's default is True
            r"param_scheduler\[0\]\.by_epoch = True: train_cfg\.max_iters counts iterations",
        ),
        (
            "param_scheduler[0].update(end=100)",
            r"param_scheduler\[0\]\.end = 100: the warm-up must end before the run \(1\)",
        ),
    ],
)
def test_a_curve_in_other_units_than_the_run_is_refused(tmp_path, extra, message):
    with pytest.raises(ValueError, match=message):
        imported(tmp_path, extra)


def test_several_data_sets(tmp_path):
    both = """
second = dict(llava_dataset, data_path="data/b.json")
train_dataloader.update(dataset=dict(type=ConcatDataset, datasets=[llava_dataset, second]))
"""
    data = imported(tmp_path, both).config["train_dataset"]
    assert data["annotations"] == ["data/mix.json", "data/b.json"]
    assert data["image_root"] == "data/images"
    data = imported(tmp_path, both, "second.update(image_folder='other')").config["train_dataset"]
    assert data["type"] is InternVLDataset and data["max_length"] == 2048
    assert data["meta"] == {
        "0_mix": {"root": "data/images", "annotation": "data/mix.json"},
        "1_b": {"root": "other", "annotation": "data/b.json"},
    }
    data = imported(tmp_path, both, "second.update(max_length=10)").config["train_dataset"]
    assert data["type"] is MixtureDataset and data["resize"] == "pad"
    assert data["datasets"]["1_b"] == {
        "type": InstructDataset,
        "annotations": "data/b.json",
        "image_root": "data/images",
        "max_length": 10 + 576,
    }
    with pytest.raises(ValueError, match="square in different ways"):
        imported(tmp_path, both, "second.update(pad_image_to_square=False)")


DEEPSPEED = """
from xtuner.engine import DeepSpeedStrategy
strategy = dict(
    type=DeepSpeedStrategy, gradient_accumulation_steps="auto", gradient_clipping="auto",
    train_micro_batch_size_per_gpu="auto", bf16=dict(enabled=True), fp16=dict(enabled=False),
    zero_optimization=dict(stage=3, overlap_comm=True, offload_param=dict(device="cpu")))
"""


def test_engines(tmp_path):
    found = imported(tmp_path, DEEPSPEED)
    assert found.config["strategy"] == {"type": "zero3", "offload_param": "cpu"}
    (note,) = [note for note in found.notes if note.startswith("strategy")]
    assert note == "strategy.zero_optimization.overlap_comm = True: not carried over"
    assert "strategy" not in imported(tmp_path, 'strategy = dict(type="DDPStrategy")').config
    with pytest.raises(ValueError, match=r"zero_optimization\.stage = 1: stages 2 and 3"):
        imported(tmp_path, DEEPSPEED.replace("stage=3", "stage=1"))


def test_internvl2_4b(tmp_path):
    internvl = """
from xtuner.dataset import InternVL_V1_5_Dataset
from xtuner.model import InternVL_V1_5
path = "OpenGVLab/InternVL2-4B"
model = dict(type=InternVL_V1_5, model_path=path, freeze_llm=True, freeze_visual_encoder=True,
             quantization_llm=True, quantization_vit=False,
             llm_lora=dict(type=LoraConfig, r=128, lora_alpha=256, lora_dropout=0.05,
                           target_modules=None, task_type="CAUSAL_LM"))
train_dataloader.update(dataset=dict(
    type=InternVL_V1_5_Dataset, model_path=path, data_paths=data_path,
    image_folders=image_folder, template=PROMPT_TEMPLATE.phi3_chat, max_length=8192))
"""
    repeats = "train_dataloader['dataset'].update(repeat_times=2)"
    (member,) = imported(tmp_path, internvl, repeats).config["train_dataset"]["datasets"].values()
    assert member["weight"] == 2
    config = imported(tmp_path, internvl).config
    model = config["model"]
    assert model["vision"]["backbone"]["type"] is InternViT
    assert model["llm"]["type"] is Phi3 and model["llm"]["quantization"] == "nf4"
    assert model["llm"]["lora"] == {"rank": 128, "alpha": 256.0, "dropout": 0.05}
    assert model["projector"] == {"type": PixelShuffleProjector}
    assert config["load_from"] == "OpenGVLab/InternVL2-4B"
    data = config["train_dataset"]
    assert (data["resize"], data["max_tiles"], data["max_length"]) == ("tiles", 12, 8192)


def test_what_is_not_read_is_listed(tmp_path):
    extra = """
optim_wraper = dict(type=AmpOptimWrapper)
model.update(novel=3)
model["llm"].update(attn_implementation="flash_attention_2")
optim_wrapper.update(paramwise_cfg=dict(custom_keys=dict(projector=dict(lr_mult=0.1))))
train_dataloader.update(batch_sampler=1)
custom_hooks.append(dict(type="MyHook"))
val_cfg = dict(type="ValLoop")
default_hooks["checkpoint"].update(save_optimizer=False)
"""
    listed = "\n".join(imported(tmp_path, extra).notes)
    for start in (
        "optim_wraper = {'type': mmengine.optim.AmpOptimWrapper}: not a section of a config",
        "model.novel = 3: not carried over",
        "model.llm.attn_implementation = 'flash_attention_2': not carried over",
        "optim_wrapper.paramwise_cfg = {'custom_keys'",
        "train_dataloader.batch_sampler = 1: not carried over",
        "custom_hooks[2].type = 'MyHook': not carried over",
        "val_cfg = {'type': 'ValLoop'}: evaluation comes after training",
        "default_hooks.checkpoint.save_optimizer = False",
    ):
        assert start in listed, start


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("model.update(type='LlavaModel')", "model.type = 'LlavaModel'.*did you mean 'LLaVAModel'"),
        ("optim_wrapper['optimizer'].update(type='AdanW')", "did you mean 'AdamW'"),
        ("train_dataloader.update(sampler=dict(type='X'))", "known: DefaultSampler, LengthGr"),
        ("model.update(token_merge_ratio=4)", "token_merge_ratio = 4 has no counterpart"),
        ("model['llm_lora'] = dict(type=LoraConfig, bias='all')", "bias = 'all'.*only 'none'"),
        ("del model['visual_encoder']", "model.visual_encoder is missing"),
        ("param_scheduler = dict(type='StepLR')", "known: CosineAnnealingLR, LinearLR"),
        ("param_scheduler = dict(type=LinearLR, end=1)", "only a LinearLR warm-up and"),
        (
            "llava_dataset['template_map_fn'].update(template=PROMPT_TEMPLATE.llama3_chat)",
            "llama3_chat has no counterpart.*by --template",
        ),
        ("del model", "no config of an xtuner training"),
        ("del train_dataloader", r"train_dataloader\.dataset is missing"),
    ],
)
def test_what_cannot_be_expressed_is_refused(tmp_path, extra, message):
    with pytest.raises(ValueError, match=message):
        imported(tmp_path, extra)


def test_quantisation_other_than_nf4_is_refused(tmp_path):
    with pytest.raises(ValueError, match="load_in_4bit = False: only True has a counterpart"):
        imported(tmp_path, QLORA, "quantization.update(load_in_4bit=False)")


def test_template_of_choice(tmp_path):
    result = imported(tmp_path, template="chatml")
    assert result.config["model"]["template"] == "chatml"
    assert "replaced by 'chatml', as asked for" in result.notes[0]
    with pytest.raises(ValueError, match="template 'chatlm': did you mean 'chatml'"):
        imported(tmp_path, template="chatlm")


@pytest.fixture
def tiny_xtuner_config(tmp_path):
    """A config whose models and data are in ``tmp_path``."""
    tokenizer = llama_tokenizer()
    llm = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    LlamaForCausalLM(llm).save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    CLIPVisionModel(vision).save_pretrained(tmp_path / "clip")
    records = []
    for index in range(4):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        turns = [
            {"from": "human", "value": "<image>\nwhat color is the shape?"},
            {"from": "gpt", "value": "blue"},
        ]
        records.append({"id": str(index), "image": f"{index}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(records))
    extra = f"""
model["llm"].update(pretrained_model_name_or_path={str(tmp_path / "llm")!r})
model["visual_encoder"].update(pretrained_model_name_or_path={str(tmp_path / "clip")!r})
model.update(llm_lora=dict(type=LoraConfig, r=4, lora_alpha=8), freeze_llm=True)
llava_dataset.update(data_path={str(tmp_path / "data.json")!r}, image_folder={str(tmp_path)!r})
train_dataloader.update(batch_size=1, num_workers=0)
"""
    return write(tmp_path, "tiny", extra)


def test_tool_leaves_no_half_written_config(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(28, "No space left on device")

    out = tmp_path / "ours.py"
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        run_tool(monkeypatch, write(tmp_path, "config"), "--out", out)
    assert [path.name for path in tmp_path.iterdir()] == ["config.py"]


def test_tool_writes_and_trains(tiny_xtuner_config, tmp_path, monkeypatch, capsys):
    out, work_dir = tmp_path / "ours.py", tmp_path / "run"
    run_tool(monkeypatch, tiny_xtuner_config)
    printed = capsys.readouterr().out
    run_tool(monkeypatch, tiny_xtuner_config, "--out", out, "--train", work_dir)
    assert printed == out.read_text() + "\n"
    listed = capsys.readouterr().out
    assert "not carried over, or different" in listed and "max_length = 1472: here" in listed
    weights = load_file(work_dir / "weights.safetensors")
    assert {name.split(".")[0] for name in weights} == {"llm", "projector"}
    assert all(".lora_" in name for name in weights if name.startswith("llm."))
    with pytest.raises(SystemExit, match=r"ours\.py exists; remove it"):
        run_tool(monkeypatch, tiny_xtuner_config, "--out", out)
    with pytest.raises(SystemExit):
        run_tool(monkeypatch, tiny_xtuner_config, "--train", work_dir)
    assert "--train needs --out" in capsys.readouterr().err


def test_parity_check_prepares_gradients_under_public_names(tmp_path):
    check_xtuner_parity.prepare(tmp_path)
    expected = load_file(tmp_path / "expected.safetensors")
    assert expected["loss"].isfinite() and expected["loss"] > 1
    found = {name.removeprefix("gradient.") for name in expected} - {"loss"}
    llm = LlamaForCausalLM(LlamaConfig(**check_xtuner_parity.LLM))
    names = {f"llm.{name}" for name, _ in llm.named_parameters()}
    names |= {f"projector.model.{index}.{leaf}" for index in (0, 2) for leaf in ("weight", "bias")}
    assert {name for name in found if not name.startswith("visual_encoder.")} == names
    # The last of three blocks isn't read.
    layers = {name.split(".")[4] for name in found if ".encoder.layers." in name}
    assert layers == {"0", "1"}
    assert all(value.isfinite().all() for value in expected.values())
