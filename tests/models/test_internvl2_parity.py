"""Our InternVL2 against transformers' InternVLForConditionalGeneration: image file to logits."""

import re

import numpy as np
import pytest
import torch
from miniature import ARCH
from PIL import Image
from tokenizers_for_tests import phi3_tokenizer
from transformers import GotOcr2ImageProcessorPil, InternVLConfig, InternVLForConditionalGeneration

from covft.conversation import IMAGE_TOKEN_ID
from covft.datasets import Collator, InputSpec, InstructDataset
from covft.models.vision.image_spec import IMAGENET_MEAN, IMAGENET_STD
from covft.registry import MODELS

SIZE, CONTEXT_ID, MAX_TILES = ARCH["image_size"], 419, 6
LLM = dict(
    hidden_size=24,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=420,
    pad_token_id=0,
    eos_token_id=2,
    tie_word_embeddings=False,
)
LLMS = {
    "phi3": dict(model_type="phi3", **LLM),
    "phi3-longrope": dict(
        model_type="phi3",
        max_position_embeddings=4096,
        original_max_position_embeddings=256,
        # Three frequencies of a head of 6.
        rope_scaling=dict(
            rope_type="longrope", short_factor=[1.0, 1.1, 1.3], long_factor=[2.0, 3.0, 5.0]
        ),
        **LLM,
    ),
    "llama": dict(model_type="llama", **LLM),
}
#: Our names, as patterns, and transformers'.
NAMES = {
    r"vision\.backbone\.cls_token": "model.vision_tower.embeddings.cls_token",
    r"vision\.backbone\.pos_embed": "model.vision_tower.embeddings.position_embeddings",
    r"vision\.backbone\.patch_embed\.(.*)": (
        r"model.vision_tower.embeddings.patch_embeddings.projection.\1"
    ),
    r"vision\.backbone\.blocks\.(\d+)\.attn\.([qkv])_proj\.(.*)": (
        r"model.vision_tower.encoder.layer.\1.attention.\2_proj.\3"
    ),
    r"vision\.backbone\.blocks\.(\d+)\.attn\.out_proj\.(.*)": (
        r"model.vision_tower.encoder.layer.\1.attention.projection_layer.\2"
    ),
    r"vision\.backbone\.blocks\.(\d+)\.mlp\.(.*)": r"model.vision_tower.encoder.layer.\1.mlp.\2",
    r"vision\.backbone\.blocks\.(\d+)\.ls([12])\.gamma": (
        r"model.vision_tower.encoder.layer.\1.lambda_\2"
    ),
    r"vision\.backbone\.blocks\.(\d+)\.norm1\.(.*)": (
        r"model.vision_tower.encoder.layer.\1.layernorm_before.\2"
    ),
    r"vision\.backbone\.blocks\.(\d+)\.norm2\.(.*)": (
        r"model.vision_tower.encoder.layer.\1.layernorm_after.\2"
    ),
    r"projector\.layers\.0\.(.*)": r"model.multi_modal_projector.layer_norm.\1",
    r"projector\.layers\.1\.(.*)": r"model.multi_modal_projector.linear_1.\1",
    r"projector\.layers\.3\.(.*)": r"model.multi_modal_projector.linear_2.\1",
    r"llm\.model\.model\.(.*)": r"model.language_model.\1",
    r"llm\.model\.lm_head\.(.*)": r"lm_head.\1",
}


def theirs_of(llm: dict) -> InternVLForConditionalGeneration:
    vision = dict(
        hidden_size=ARCH["hidden_dim"],
        num_hidden_layers=ARCH["depth"],
        num_attention_heads=ARCH["num_heads"],
        intermediate_size=ARCH["mlp_dim"],
        image_size=SIZE,
        patch_size=ARCH["patch_size"],
        attention_bias=True,
    )
    config = InternVLConfig(
        vision_config=vision,
        text_config=llm,
        image_token_id=CONTEXT_ID,
        tie_word_embeddings=False,
    )
    return InternVLForConditionalGeneration(config).eval()


def ours_of(llm: dict, folder: str):
    model = dict(
        type="MLLM",
        vision=dict(backbone=dict(type="InternViT", arch=ARCH), vft=dict(type="Full")),
        projector=dict(type="PixelShuffleProjector"),
        llm=dict(type="CausalLM", arch=llm, tokenizer=folder),
        template="phi3-chat",
    )
    return MODELS.build(model).eval()


def copy_weights(ours, theirs) -> None:
    """Randomise ours, norms and layer scales included, and give every weight to theirs."""
    targets = dict(theirs.named_parameters())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            matches = [re.sub(p, to, name) for p, to in NAMES.items() if re.fullmatch(p, name)]
            assert len(matches) == 1, name
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
            targets.pop(matches[0]).copy_(parameter)
    assert not targets


@pytest.fixture
def folder(tmp_path):
    phi3_tokenizer().save_pretrained(tmp_path / "tokenizer")
    rng = np.random.default_rng(0)
    for name, (width, height) in {"wide": (90, 30), "tall": (40, 60), "square": (25, 25)}.items():
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    return tmp_path


def their_pixels(paths: list, max_patches: int) -> torch.Tensor:
    processor = GotOcr2ImageProcessorPil(
        size={"height": SIZE, "width": SIZE},
        crop_to_patches=True,
        max_patches=max_patches,
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
    )
    images = [Image.open(path) for path in paths]
    return torch.as_tensor(np.stack(processor(images)["pixel_values"]), dtype=torch.float32)


@pytest.mark.parametrize("llm", LLMS)
@torch.no_grad()
def test_logits_equal_those_of_transformers(folder, llm: str) -> None:
    theirs = theirs_of(LLMS[llm])
    ours = ours_of(LLMS[llm], str(folder / "tokenizer"))
    copy_weights(ours, theirs)
    answer = {"from": "gpt", "value": "blue"}
    records = []
    for images in (["wide"], ["tall", "square"], []):
        question = "<image>\n" * len(images) + "what color is the shape?"
        turns = [{"from": "human", "value": question}, answer]
        paths = [f"{name}.png" for name in images]
        records.append({"id": "+".join(images), "image": paths, "conversations": turns})
    dataset = InstructDataset(
        records,
        spec=InputSpec.of(ours),
        image_root=str(folder),
        resize="tiles",
        max_tiles=MAX_TILES,
        on_bad="raise",
    )
    batch = Collator(dataset.spec)([dataset[index] for index in range(3)])
    assert batch["image_to_sample"].tolist() == [0] * 4 + [1] * 4

    arguments = (batch["input_ids"], batch["pixel_values"], batch["image_to_sample"])
    states = ours.llm.hidden_states(ours.embeddings(*arguments), batch["attention_mask"])
    found = ours.llm.logits(states)

    pixels = [
        their_pixels([folder / "wide.png"], MAX_TILES),
        their_pixels([folder / "tall.png", folder / "square.png"], MAX_TILES // 2),
    ]
    assert [len(rows) for rows in pixels] == [4, 4]
    ids = batch["input_ids"]
    expected = theirs(
        input_ids=ids.masked_fill(ids == IMAGE_TOKEN_ID, CONTEXT_ID),
        attention_mask=batch["attention_mask"].long(),
        pixel_values=torch.cat(pixels),
    ).logits
    real = batch["attention_mask"]
    assert not real.all() and expected[real].std() > 0.1
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=2e-5)
