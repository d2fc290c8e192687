"""--to hf-llava: folders for transformers' own LLaVA."""

import json
from pathlib import Path

import pytest
import torch
from export_runs import llava_options, write_run
from miniature import ARCH
from PIL import Image
from tokenizers_for_tests import byte_level_tokenizer, llama_tokenizer, phi3_tokenizer
from transformers import AutoProcessor, CLIPVisionConfig, CLIPVisionModel

from covft.checkpoints import import_checkpoint, load_run
from covft.checkpoints.export import export_run
from covft.checkpoints.export.jinja import chat_template
from covft.checkpoints.export.probe import probe_image
from covft.conversation import encode_prompt, get_template
from covft.datasets.transforms import transform


@pytest.mark.parametrize(
    ("encoder", "vft"),
    [
        ("CLIP", dict(type="LoRA", rank=2)),
        ("CLIP", dict(type="BitFit")),
        ("SigLIP", dict(type="Full")),
        ("DINOv2", dict(type="Full")),
    ],
)
def test_plain_encoders(tiny_options, tmp_path: Path, encoder: str, vft: dict) -> None:
    options = llava_options(tiny_options, encoder=encoder, **vft)
    if vft["type"] == "LoRA":
        low_rank = dict(rank=2, alpha=4, dropout=0.0)
        options |= {"model.llm.lora": low_rank, "model.llm.freeze_embeddings": False}
        options |= {"stages.pretrain.model.llm.lora": None}
    run = write_run(tmp_path / "run", options, config="quickstart_full")
    assert export_run(run, tmp_path / "out", to="hf-llava") < 1e-5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vision_config"]["num_hidden_layers"] == config["vision_feature_layer"] == 3


def test_the_published_depth_is_kept(tiny_options, tmp_path: Path) -> None:
    published = CLIPVisionConfig(
        hidden_size=ARCH["hidden_dim"],
        intermediate_size=ARCH["mlp_dim"],
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    source = CLIPVisionModel(published)
    source.save_pretrained(tmp_path / "clip")
    options = {
        **llava_options(tiny_options),
        "model.vision.backbone.weights": str(tmp_path / "clip"),
        "model.vision.backbone.arch": None,
        "model.vision.backbone.select_layer": -2,
    }
    run = write_run(tmp_path / "run", options, config="quickstart_full")
    assert export_run(run, tmp_path / "out", to="hf-llava") < 1e-5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vision_config"]["num_hidden_layers"] == 3
    assert config["vision_feature_layer"] == -2
    from transformers import LlavaForConditionalGeneration

    found = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").model.vision_tower
    own, given = found.state_dict(), source.state_dict()
    last = [name for name in own if ".layers.2." in name or "post_layernorm" in name]
    assert len(last) > 10 and all(torch.equal(own[name], given[name]) for name in last)
    assert not torch.equal(*(s["encoder.layers.1.mlp.fc1.weight"] for s in (own, given)))


@pytest.mark.parametrize("legacy", [True, False])
def test_vicuna_like(tiny_options, tmp_path: Path, legacy: bool) -> None:
    tokenizer = llama_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "legacy": legacy}))
    options = {
        **llava_options(tiny_options, type="Full"),
        "model.llm.tokenizer": str(tmp_path / "tokenizer"),
        "model.template": "v1",
        "model.llm.arch": {
            **tiny_options["model.llm.arch"],
            "vocab_size": len(tokenizer),
            "tie_word_embeddings": False,
        },
    }
    run = write_run(tmp_path / "run", options)
    assert export_run(run, tmp_path / "out", to="hf-llava") < 1e-5
    assert export_run(run, tmp_path / "llava", to="llava") < 1e-6
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["image_token_index"] == len(tokenizer)
    assert config["text_config"]["vocab_size"] == len(tokenizer) + 1
    model = load_run(run, device="cpu").model
    again = import_checkpoint(model, tmp_path / "out")
    assert again.layout == "hf-llava" and not again.kept


@pytest.mark.parametrize("resize", ["crop", "pad", "stretch"])
def test_processor_pixels(tiny_options, tmp_path: Path, resize: str) -> None:
    options = {**llava_options(tiny_options), "train_dataset.resize": resize}
    run = write_run(tmp_path / "run", options, config="quickstart_freeze")
    export_run(run, tmp_path / "out", to="hf-llava")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    spec = load_run(run, device="cpu").spec.image
    for size in ((90, 41), (32, 200)):
        image = probe_image().resize(size, Image.Resampling.NEAREST)
        found = processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
        expected = transform(image, spec, resize=resize).float() / 255
        expected = (expected - torch.tensor(spec.mean)[:, None, None]) / torch.tensor(spec.std)[
            :, None, None
        ]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "tokenizer"),
    [("v1", llama_tokenizer), ("phi3-chat", phi3_tokenizer), ("chatml", byte_level_tokenizer)],
)
@pytest.mark.parametrize("count", [0, 1, 2])
def test_chat_template_writes_what_training_reads(name: str, tokenizer, count: int) -> None:
    tokenizer = tokenizer()
    template = get_template(name)
    questions, answer = [" what's \n'this'? 数", "and {{ that }}? "], "a circle"
    turns = [
        {"from": "human", "value": "<image>\n" * count + questions[0]},
        {"from": "gpt", "value": answer},
        {"from": "human", "value": questions[1]},
    ]
    images = [{"type": "image"}] * count
    messages = [
        {"role": "user", "content": [*images, {"type": "text", "text": questions[0]}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        {"role": "user", "content": questions[1]},
    ]
    text = tokenizer.apply_chat_template(
        messages, chat_template=chat_template(template, tokenizer), tokenize=False
    )
    expected = encode_prompt(
        turns, template=template, tokenizer=tokenizer, num_image_tokens=[1] * count
    )
    chunks = text.split("<image>")
    ids = tokenizer(chunks[0])["input_ids"]
    for chunk in chunks[1:]:
        ids = [*ids, -200, *tokenizer(chunk, add_special_tokens=False)["input_ids"]]
    assert ids == expected.tolist()
    with pytest.raises(Exception, match="one system prompt"):
        tokenizer.apply_chat_template(
            [{"role": "system", "content": "x"}],
            chat_template=chat_template(template, tokenizer),
            tokenize=False,
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.vision.vft": dict(_delete_=True, type="CoVFT")}, "CoVFT isn't a plain.*--to hf "),
        ({"model.projector": dict(type="PixelShuffleProjector")}, "MLPProjector of depth 2.*"),
        ({"model.projector.depth": 3}, "MLPProjector of depth 2.*--to hf,"),
        ({"model.vision.backbone.type": "DINOv3"}, "DINOv3 isn't one of CLIP.*--to hf"),
        ({"model.vision.backbone.final_norm": True}, "before the last norm.*--to hf"),
        (
            {"train_dataset.resize": "tiles", "train_dataset.max_tiles": 2},
            "LLaVA-1.5 in transformers doesn't.*--to hf",
        ),
    ],
)
def test_what_llava_cannot_hold(tiny_options, tmp_path: Path, change: dict, message: str) -> None:
    options = llava_options(tiny_options, type="Freeze")
    if "model.projector" in change:
        options.pop("model.projector")
    run = write_run(tmp_path / "run", {**options, **change})
    with pytest.raises(ValueError, match=f"--to hf-llava: .*{message}"):
        export_run(run, tmp_path / "out", to="hf-llava")
    assert [path.name for path in tmp_path.glob("out*")] == []
