import pytest
import torch
from tokenizers_for_tests import llama_tokenizer

from covft.models.llm import CausalLM, Phi3, Vicuna

TINY = dict(
    model_type="llama",
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    vocab_size=400,
)


@pytest.mark.parametrize(
    ("kind", "arch", "hub_id", "count", "template"),
    [
        # The counts that the hub shows for the checkpoints.
        (Vicuna, "7b", "lmsys/vicuna-7b-v1.5", 6_738_415_616, "v1"),
        (Vicuna, "13b", "lmsys/vicuna-13b-v1.5", 13_015_864_320, "v1"),
        (Phi3, "mini-4k", "microsoft/Phi-3-mini-4k-instruct", 3_821_079_552, "phi3-chat"),
        (Phi3, "mini-128k", "microsoft/Phi-3-mini-128k-instruct", 3_821_079_552, "phi3-chat"),
        (CausalLM, "smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008, "chatml"),
    ],
)
def test_named_architectures(kind, arch: str, hub_id: str, count: int, template: str) -> None:
    assert kind.variants[arch].hub_id == hub_id
    with torch.device("meta"):
        llm = kind(arch=arch)
    assert sum(p.numel() for p in llm.parameters()) == count
    assert llm.tokenizer is None and llm.weights_folder is None and llm.template == template
    # A field that transformers doesn't know would be kept without effect.
    untouched = type(llm.model.config)().to_dict()
    for name in kind.variants[arch].fields:
        assert name in untouched or name == "rope_theta", name


def test_rope_of_the_published_models() -> None:
    with torch.device("meta"):
        thetas = [
            kind(arch=arch).model.config.rope_parameters["rope_theta"]
            for kind, arch in ((Vicuna, "7b"), (Phi3, "mini-4k"), (CausalLM, "smollm2-135m"))
        ]
    assert thetas == [10_000.0, 10_000.0, 100_000.0]


def test_pretrained_resolves_the_variants_hub_id(tmp_path, monkeypatch) -> None:
    source = Vicuna(arch=TINY)
    source.model.save_pretrained(tmp_path)
    llama_tokenizer().save_pretrained(tmp_path)
    asked = []

    def resolve(name):
        asked.append(name)
        return tmp_path

    monkeypatch.setattr("covft.models.llm.resolve", resolve)
    llm = Vicuna(arch="13b", weights="pretrained")
    assert set(asked) == {"lmsys/vicuna-13b-v1.5"}
    assert llm.weights_folder == tmp_path and llm.hidden_dim == 16
    assert llm.tokenizer("is it red?")["input_ids"][0] == 1
    for (name, ours), theirs in zip(llm.named_parameters(), source.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_weights_of_another_architecture_are_refused(tmp_path) -> None:
    CausalLM(arch=TINY).model.save_pretrained(tmp_path)
    llama_tokenizer().save_pretrained(tmp_path)
    assert Vicuna(weights=str(tmp_path)).hidden_dim == 16
    message = r"hidden_size: arch 4096, config\.json 16.*leave out arch"
    with pytest.raises(ValueError, match=message):
        Vicuna(arch="7b", weights=str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Vicuna, dict(arch="7B"), "did you mean '7b'"),
        (Phi3, dict(arch="small"), "known: mini-128k, mini-4k"),
        (Vicuna, dict(weights="pretrained"), r"needs a named arch \(7b, 13b\)"),
        (Vicuna, dict(arch=TINY, weights="pretrained"), "needs a named arch"),
        (Vicuna, dict(arch=TINY, weights="some/folder"), "either weights .* or arch"),
        (Vicuna, dict(), r"either weights .* or a named arch \(7b, 13b\)"),
    ],
)
def test_wrong_options_are_explained(kind, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**arguments)
