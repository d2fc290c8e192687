"""Public checkpoints give our model the logits of transformers', whatever names they are under."""

import pytest
import torch
from public_models import (
    IMAGE_ID,
    hf_internvl,
    hf_llava,
    internvl_files,
    llava_files,
    our_internvl,
    our_llava,
    save,
)

from covft.checkpoints import import_checkpoint
from covft.checkpoints.layouts import LAYOUTS
from covft.conversation import IMAGE_TOKEN_ID

ROWS = (2, 0, 1)  # images of each row


def batch(tokens_per_image):
    """Return rows of different length as lists, with images at the start and in the middle."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for index, images in enumerate(ROWS):
        words = torch.randint(0, 80, (7 + 3 * index,), generator=generator).tolist()
        for image in range(images):
            at = 1 + 3 * image
            words[at:at] = [IMAGE_TOKEN_ID] * tokens_per_image
        rows.append(words)
    pixels = torch.randn(sum(ROWS), 3, 32, 32, generator=generator)
    return rows, pixels


def padded(rows, *, side, image_id=IMAGE_TOKEN_ID):
    width = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        blank = [0] * (width - len(row))
        row, real = [image_id if t == IMAGE_TOKEN_ID else t for t in row], [1] * len(row)
        ids.append(row + blank if side == "right" else blank + row)
        mask.append(real + blank if side == "right" else blank + real)
    return torch.tensor(ids), torch.tensor(mask)


@torch.no_grad()
def our_logits(model, rows, pixels):
    """Return the real tokens' logits of a right-padded batch."""
    ids, mask = padded(rows, side="right")
    image_to_sample = torch.arange(len(ROWS)).repeat_interleave(torch.tensor(ROWS))
    embeds = model.embeddings(ids, pixels, image_to_sample)
    return model.llm.logits(model.llm.hidden_states(embeds, mask.bool())[mask.bool()])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    ("reference", "make"), [(hf_llava, our_llava), (hf_internvl, our_internvl)]
)
def test_logits_are_those_of_transformers(reference, make, side, tmp_path):
    theirs = reference()
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = make()
    imported = import_checkpoint(ours, tmp_path)
    assert imported.layout == ("hf-llava" if make is our_llava else "hf-internvl")
    assert set(imported.names) == set(ours.state_dict()) and imported.kept == ()
    rows, pixels = batch(ours.num_image_tokens)
    ids, mask = padded(rows, side=side, image_id=IMAGE_ID)
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
    vocabulary = ours.llm.model.config.vocab_size
    torch.testing.assert_close(
        our_logits(ours, rows, pixels), expected[mask.bool()][:, :vocabulary], atol=2e-5, rtol=2e-5
    )


@pytest.mark.parametrize("name", ["llava", "hf-llava", "in-memory", "xtuner", "mm_projector"])
def test_llava_under_every_name(name, tmp_path):
    reference = our_llava()
    save(tmp_path / "hub", llava_files()["hf-llava"])
    import_checkpoint(reference, tmp_path / "hub")
    tensors = llava_files()[name]
    ours = our_llava(seed=1)
    if name == "xtuner":
        file = tmp_path / "iter_5.pth"
        torch.save({"state_dict": tensors, "meta": {"iter": 5}}, file)
        imported = import_checkpoint(ours, file)
    else:
        imported = import_checkpoint(ours, save(tmp_path / "x", tensors, name="pytorch_model.bin"))
    assert imported.layout == {"in-memory": "hf-llava"}.get(name, name)
    expected, found = reference.state_dict(), ours.state_dict()
    for key in imported.names:
        assert torch.equal(found[key], expected[key]), key
    if name == "mm_projector":
        assert imported.kept == ("llm", "vision")
        assert set(imported.names) == {k for k in found if k.startswith("projector.")}
    else:
        assert set(imported.names) == set(found)


@pytest.mark.parametrize("name", ["internvl2", "in-memory"])
def test_internvl_under_every_name(name, tmp_path):
    reference, ours = our_internvl(), our_internvl(seed=1)
    import_checkpoint(reference, save(tmp_path / "hub", internvl_files()["hf-internvl"]))
    imported = import_checkpoint(ours, save(tmp_path / "x", internvl_files()[name]))
    assert imported.layout == {"in-memory": "hf-internvl"}.get(name, name)
    expected, found = reference.state_dict(), ours.state_dict()
    assert set(imported.names) == set(found)
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_names_written_are_the_public_ones(tmp_path):
    """``from_ours`` gives the hand-made names, values and shapes, without the block never read."""
    for make, files in ((our_llava, llava_files()), (our_internvl, internvl_files())):
        for name, tensors in files.items():
            if name not in LAYOUTS:
                continue
            model = make()
            import_checkpoint(model, save(tmp_path / name, tensors))
            written = LAYOUTS[name].from_ours(None, model)
            unread = tensors.keys() - written.keys()
            assert written.keys() <= tensors.keys()
            assert all(".layers.2." in key or "post_layernorm" in key for key in unread), unread
            assert bool(unread) == (make is our_llava and name != "mm_projector")
            for key, value in written.items():
                assert torch.equal(value, tensors[key]), key
