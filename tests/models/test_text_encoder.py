import dataclasses

import pytest
import torch
from tokenizers_for_tests import bert_tokenizer, llama_tokenizer

from covft.checkpoints.trainable import trainable_state_dict
from covft.config import load_config, stage_configs
from covft.datasets import Collator, EasyVQADataset, InputSpec, InstructDataset
from covft.datasets.prompts import Prompt, collate_prompts
from covft.models.abstract import abstract_model
from covft.models.llm import CausalLM
from covft.models.text_encoder import LLMEmbeddings, TextEncoder, build_text_encoder
from covft.registry import MODELS

TINY_BERT = dict(
    model_type="bert",
    hidden_size=24,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    vocab_size=len(bert_tokenizer()),
)
TINY_LLAMA = dict(
    model_type="llama",
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    vocab_size=400,
)


@pytest.fixture
def llama_folder(tmp_path):
    llama_tokenizer().save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


def tiny_llm(tokenizer: str | None = None) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(arch=TINY_LLAMA, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("arch", "hub_id", "width", "count"),
    [
        # 109,482,240 and 22,713,216 are published, poolers of C (C + 1) parameters included.
        ("bert-base-uncased", "google-bert/bert-base-uncased", 768, 109_482_240 - 768 * 769),
        (
            "minilm-l6",
            "sentence-transformers/all-MiniLM-L6-v2",
            384,
            22_713_216 - 384 * 385,
        ),
    ],
)
def test_named_architectures(arch: str, hub_id: str, width: int, count: int) -> None:
    assert TextEncoder.variants[arch].hub_id == hub_id
    with torch.device("meta"):
        encoder = TextEncoder(arch=arch)
    assert encoder.hidden_dim == width and encoder.max_length == 512
    assert sum(p.numel() for p in encoder.parameters()) == count
    assert not any(p.requires_grad for p in encoder.parameters())
    assert encoder.weights_folder is None


def test_pretrained_resolves_the_variants_hub_id(tmp_path, monkeypatch) -> None:
    asked = []
    source = TextEncoder(arch=TINY_BERT)
    source.model.save_pretrained(tmp_path / "bert")
    bert_tokenizer().save_pretrained(tmp_path / "bert")

    def resolve(name):
        asked.append(name)
        return tmp_path / "bert"

    monkeypatch.setattr("covft.models.text_encoder.resolve", resolve)
    encoder = TextEncoder(arch="minilm-l6", weights="pretrained", pooling="mean")
    assert set(asked) == {"sentence-transformers/all-MiniLM-L6-v2"}
    assert encoder.hidden_dim == 24 and encoder.weights_folder == tmp_path / "bert"
    assert encoder.tokenizer("is it red?")["input_ids"][0] == 2
    with pytest.raises(ValueError, match=r"hidden_size: arch 384, config\.json 24"):
        TextEncoder(arch="minilm-l6", weights=str(tmp_path / "bert"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(arch="bert-base"), "did you mean 'bert-base-uncased'"),
        (dict(weights="pretrained"), r"needs a named arch \(bert-base-uncased, minilm-l6\)"),
        (dict(arch=TINY_BERT, weights="pretrained"), "needs a named arch"),
        (dict(arch=TINY_BERT, weights="some/folder"), "either weights .* or arch"),
        (dict(), "either weights .* or arch"),
        (dict(arch="minilm-l6", pooling="last"), "'cls' or 'mean', got 'last'"),
    ],
)
def test_wrong_options_are_explained(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextEncoder(**arguments)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_padding_is_ignored(pooling: str) -> None:
    encoder = TextEncoder(arch=TINY_BERT, pooling=pooling).double()
    ids = torch.randint(4, 40, (2, 5))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    together = encoder(ids, mask).pooled
    alone = encoder(ids[:1, :3], mask[:1, :3]).pooled
    torch.testing.assert_close(together[:1], alone, rtol=1e-12, atol=1e-12)
    states = encoder(ids, mask).tokens
    expected = states[1, 0] if pooling == "cls" else states[1].mean(0)
    torch.testing.assert_close(together[1], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_llm_embeddings_equal_the_plain_formula(pooling: str, llama_folder: str) -> None:
    llm = tiny_llm(llama_folder).double()
    encoder = LLMEmbeddings(llm=llm, pooling=pooling)
    texts = ["is there a red circle?", "", "what color is the shape? blue, or red?"]
    batch = encoder.tokenizer(texts, padding=True, return_tensors="pt")
    mask = batch["attention_mask"].bool()
    assert not mask.all()
    context = encoder(batch["input_ids"], mask)
    table = llm.model.get_input_embeddings().weight
    for row, text in enumerate(texts):
        rows = table[llama_tokenizer()(text)["input_ids"]]
        expected = rows.mean(0) if pooling == "mean" else rows[-1]
        torch.testing.assert_close(context.pooled[row], expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(context.tokens[row][mask[row]], rows)
    assert encoder.hidden_dim == 16
    left = mask.flip(1)
    flipped = encoder(batch["input_ids"].flip(1), left)
    assert torch.equal(flipped.mask, left)
    if pooling == "mean":
        torch.testing.assert_close(flipped.pooled, context.pooled)


def test_a_text_without_tokens_gives_zeros() -> None:
    encoder = LLMEmbeddings(llm=tiny_llm(), pooling="last")
    nothing = encoder(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.bool))
    assert nothing.pooled.shape == (2, 16) and not nothing.pooled.any()
    none = encoder(torch.zeros(2, 0), torch.zeros(2, 0))
    assert none.pooled.shape == (2, 16) and none.tokens.shape == (2, 0, 16)


def test_half_precision_tables_are_pooled_in_float32() -> None:
    llm = tiny_llm().to(torch.bfloat16)
    context = LLMEmbeddings(llm=llm)(torch.arange(300)[None], torch.ones(1, 300))
    table = llm.model.get_input_embeddings().weight[:300].float()
    torch.testing.assert_close(context.pooled[0], table.mean(0))
    assert context.tokens.dtype == torch.float32


def test_llm_embeddings_options_are_explained() -> None:
    llm = tiny_llm()
    with pytest.raises(ValueError, match=r"pooling='cls' .* use 'mean' or 'last'"):
        LLMEmbeddings(llm=llm, pooling="cls")
    with pytest.raises(ValueError, match="'mean' or 'last', got 'max'"):
        LLMEmbeddings(llm=llm, pooling="max")
    with pytest.raises(ValueError, match=r"model\.text_encoder\.llm is given by the model"):
        build_text_encoder(dict(type=LLMEmbeddings, llm=dict(type=CausalLM)), llm=llm)
    assert isinstance(build_text_encoder(dict(type="LLMEmbeddings"), llm=llm), LLMEmbeddings)


def test_the_llms_tokenizer_stays_as_it_is(llama_folder: str) -> None:
    llm = tiny_llm(llama_folder)
    assert llm.tokenizer.pad_token is None
    encoder = LLMEmbeddings(llm=llm)
    assert encoder.tokenizer.pad_token == "</s>"
    assert llm.tokenizer.pad_token is None


@pytest.fixture
def embeddings_options(tiny_options):
    """The quickstart's miniature, with the LLM's embeddings as context."""
    kept = {k: v for k, v in tiny_options.items() if not k.startswith("model.text_encoder")}
    replaced = {"_delete_": True, "type": "LLMEmbeddings"}
    return {**kept, "model.text_encoder": replaced, "model.llm.freeze_embeddings": False}


def test_an_mllm_trains_with_the_llms_embeddings_as_context(embeddings_options) -> None:
    cfg = load_config("quickstart_covft", embeddings_options)
    model = MODELS.build(stage_configs(cfg)[-1][1].model).train()
    encoder, embeddings = model.text_encoder, model.llm.model.get_input_embeddings()
    assert isinstance(encoder, LLMEmbeddings)
    assert model.vision.context_dim == encoder.hidden_dim == 32
    names = list(trainable_state_dict(model))
    assert not any(name.startswith("text_encoder") for name in names)
    assert "llm.model.model.embed_tokens.weight" in names

    spec = InputSpec.of(model)
    dataset = EasyVQADataset(embeddings_options["train_dataset.root"], spec=spec)
    batch = Collator(spec)([dataset[i] for i in range(3)])
    batch.pop("bad_samples")
    text = spec.context_tokenizer.decode(batch["context_ids"][0], skip_special_tokens=True)
    assert dataset[0].context_text.strip() in text
    before = encoder(batch["context_ids"], batch["context_mask"]).pooled
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    table = embeddings.weight.detach().clone()
    model(**batch).loss_sum.backward()
    optimizer.step()
    assert not torch.equal(embeddings.weight, table)
    assert torch.equal(encoder.table, table)
    assert torch.equal(encoder(batch["context_ids"], batch["context_mask"]).pooled, before)
    assert not encoder.training and encoder.table.grad is None


def test_a_model_without_tokenizers_is_built_but_not_fed(tiny_options) -> None:
    cfg = load_config("quickstart_covft", {**tiny_options, "model.text_encoder.tokenizer": None})
    model = MODELS.build(stage_configs(cfg)[-1][1].model)
    with pytest.raises(ValueError, match=r"set model\.text_encoder\.tokenizer"):
        InputSpec.of(model)
    with pytest.raises(ValueError, match=r"set model\.llm\.tokenizer"):
        InputSpec.of(abstract_model(cfg.model))


def test_the_suffix_is_for_training_only(tiny_options) -> None:
    # CoVFT's public code trains with a literal "</s>" behind the questions, and evaluates without.
    options = {**tiny_options, "model.text_encoder.training_suffix": "</s>"}
    texts = {}
    for name, given in (("with", options), ("without", tiny_options)):
        model = MODELS.build(stage_configs(load_config("quickstart_covft", given))[-1][1].model)
        spec = InputSpec.of(model)
        sample = EasyVQADataset(tiny_options["train_dataset.root"], spec=spec)[0]
        texts[name] = sample.context_text
        turns = [{"from": "human", "value": "is it red?"}]
        ids = collate_prompts([Prompt("x", turns)], spec)["context_ids"][0].tolist()
        assert ids == spec.context_tokenizer("is it red?")["input_ids"]
    assert texts["with"] == texts["without"] + "</s>"

    record = {"id": "x", "conversations": [{"from": "human", "value": "why </s>"}]}
    record["conversations"].append({"from": "gpt", "value": "so"})
    spec = dataclasses.replace(spec, context_suffix="</s>")
    assert InstructDataset([record], spec=spec)[0].context_text == "why </s>"
