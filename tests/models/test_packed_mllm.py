import pytest
import torch
from PIL import Image
from quickstart_miniature import noisy_model

from covft.conversation import IGNORE_INDEX, IMAGE_TOKEN_ID
from covft.datasets import BadSample, Collator, InputSpec, InstructDataset
from covft.models import MLLM

PHI3 = {"model.llm.type": "Phi3", "model.llm.arch.model_type": "phi3"}
LLMS = {
    "llama": {},
    "phi3": {**PHI3, "model.llm.arch.pad_token_id": 0},
    "phi3, sliding window": {
        **PHI3,
        "model.llm.arch.pad_token_id": 0,
        "model.llm.arch.sliding_window": 6,
    },
}


def make_samples(model: MLLM, folder) -> list:
    """One image, text alone, and several images with a long answer."""
    for index, color in enumerate(("red", "blue", "green")):
        Image.new("RGB", (20 + index, 24), color).save(folder / f"{index}.png")

    def record(name: str, images: list[int], question: str, answer: str) -> dict:
        human = "<image>" * len(images) + question
        turns = [{"from": "human", "value": human}, {"from": "gpt", "value": answer}]
        found = {"id": name, "conversations": turns}
        return {**found, "image": [f"{i}.png" for i in images]} if images else found

    records = [
        record("one", [0], "what color is it?", "red"),
        record("text", [], "is there a circle?", "no, there is none"),
        record("two", [1, 2], "what is the same?", "they are both plain " * 3),
        record("last", [2], "which?", "green"),
    ]
    dataset = InstructDataset(records, spec=InputSpec.of(model), image_root=str(folder))
    samples = [dataset[index] for index in range(len(records))]
    assert not any(isinstance(sample, BadSample) for sample in samples)
    return samples


def collate(model: MLLM, samples: list, pack: bool) -> dict:
    batch = Collator(InputSpec.of(model), pack=pack)(samples)
    del batch["bad_samples"]
    return batch


def run(model: MLLM, *batches: dict) -> tuple[list[torch.Tensor], int]:
    """Return the summed loss and its gradients, and the number of tokens."""
    model.zero_grad()
    outputs = [model(**batch) for batch in batches]
    loss = torch.stack([output.loss_sum for output in outputs]).sum()
    loss.backward()
    learnt = {n: p for n, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, parameter in learnt.items() if parameter.grad is None]
    assert not missing, f"not in the graph: {missing}"
    grads = [p.grad.clone() for p in learnt.values() if p.grad is not None]
    return [loss.detach(), *grads], sum(output.num_tokens for output in outputs)


@pytest.mark.parametrize("llm", LLMS.values(), ids=LLMS)
def test_packed_equals_separate_and_padded(tiny_options, tmp_path, llm: dict) -> None:
    model = noisy_model({**tiny_options, **llm}).double().train()
    samples = make_samples(model, tmp_path)
    separate, count = run(model, *(collate(model, [sample], False) for sample in samples))
    for pack in (False, True):
        found, tokens = run(model, collate(model, samples, pack))
        assert tokens == count
        for one, other in zip(found, separate, strict=True):
            error = (one - other).abs().max() / other.abs().max().clamp(min=1)
            assert error <= 1e-12
    router = [n for n, p in model.named_parameters() if "gate" in n and p.requires_grad]
    assert router, "this model reads no context"


def test_each_image_is_seen_with_its_own_sample_s_instruction(tiny_options, tmp_path) -> None:
    model = noisy_model(tiny_options).double().eval()
    batch = collate(model, make_samples(model, tmp_path), pack=True)
    assert batch["image_to_sample"].tolist() == [0, 2, 2, 3]
    first = batch["cu_seqlens"][2]
    with torch.no_grad():
        names = ("input_ids", "pixel_values", "image_to_sample", "context_ids", "context_mask")
        arguments = {name: batch[name] for name in names}
        before = model.embeddings(**arguments, cu_seqlens=batch["cu_seqlens"])
        arguments["context_ids"] = batch["context_ids"].clone()
        arguments["context_ids"][2, 1:4] += 1
        after = model.embeddings(**arguments, cu_seqlens=batch["cu_seqlens"])
    changed = (before != after).any(-1)[0].nonzero().flatten()
    inside = range(int(first), int(batch["cu_seqlens"][3]))
    assert len(changed) == 2 * model.num_image_tokens
    assert all(int(position) in inside for position in changed)


@pytest.mark.parametrize("pack", [False, True])
def test_a_batch_without_good_samples_has_gradients_of_zero(tiny_options, pack: bool) -> None:
    model = noisy_model(tiny_options).train()
    batch = collate(model, [BadSample("x", "gone")], pack)
    (loss, *grads), tokens = run(model, batch)
    assert loss == 0 and tokens == 0
    assert not any(grad.any() for grad in grads)


def test_wrong_counts_name_the_sample(tiny_options, tmp_path) -> None:
    model = noisy_model(tiny_options)
    batch = collate(model, make_samples(model, tmp_path), pack=True)
    batch["pixel_values"] = batch["pixel_values"][:2]
    batch["image_to_sample"] = batch["image_to_sample"][:2]
    with pytest.raises(ValueError, match="sample 'two' has 1 images but 8 placeholders"):
        model(**batch)
    batch["image_to_sample"] = torch.tensor([0, 4])
    with pytest.raises(ValueError, match="names sample 4, but the batch holds 4 samples"):
        model(**batch)


def test_what_isn_t_padded_or_packed_is_explained(tiny_options, tmp_path) -> None:
    model = noisy_model(tiny_options)
    samples = make_samples(model, tmp_path)
    padded, packed = (collate(model, samples, pack) for pack in (False, True))
    bounds, length = packed["cu_seqlens"], packed["input_ids"].shape[1]
    last = torch.tensor([0, length - 1], dtype=torch.int32)
    learnt = packed["labels"].clone()
    learnt[0, bounds[2]] = 5
    assert learnt[0, bounds[2]] != IGNORE_INDEX
    wrong = [
        ({**packed, "attention_mask": padded["attention_mask"]}, "this one has both"),
        ({**packed, "cu_seqlens": None, "position_ids": None}, "this one has neither"),
        ({**padded, "position_ids": packed["position_ids"]}, "position_ids are a packed row's"),
        ({**packed, "cu_seqlens": bounds.long()}, "int32, got .* in torch.int64"),
        ({**packed, "cu_seqlens": last}, f"from 0 to the row's {length} tokens, got"),
        ({**packed, "cu_seqlens": bounds[[0, 2, 1, 3, 4]]}, "must ascend"),
        ({**packed, "cu_seqlens": bounds[1:]}, "must ascend from 0"),
        ({**packed, "labels": learnt}, "first label of sample 2 isn't ignored"),
        ({**packed, "input_ids": padded["input_ids"]}, "one row, got"),
    ]
    for batch, message in wrong:
        with pytest.raises(ValueError, match=message):
            model(**batch)


def test_placeholders_of_one_sample_can_t_make_up_for_another_s(tiny_options, tmp_path) -> None:
    model = noisy_model(tiny_options)
    batch = collate(model, make_samples(model, tmp_path), pack=True)
    batch["cu_seqlens"][1] = (batch["input_ids"][0] == IMAGE_TOKEN_ID).nonzero()[1, 0]
    batch["labels"][0, batch["cu_seqlens"][1]] = IGNORE_INDEX
    with pytest.raises(ValueError, match="sample 'one' has 1 images but 1 placeholders"):
        model(**batch)
