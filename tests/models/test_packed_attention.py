import inspect
import re
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from covft.models import packed_attention
from covft.models.llm import CausalLM
from covft.models.packed_attention import set_attention
from covft.models.segment_attention import segment_attention

LLAMA = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PHI3 = {**LLAMA, "model_type": "phi3", "num_key_value_heads": 4, "pad_token_id": 0}
ARCHS = {
    "llama": LLAMA,
    "phi3": PHI3,
    "phi3, sliding window": {**PHI3, "sliding_window": 4},
    "mistral, sliding window": {**LLAMA, "model_type": "mistral", "sliding_window": 3},
}
LENGTHS = (7, 1, 12, 5)


def build(arch: dict, **options) -> CausalLM:
    torch.manual_seed(0)
    llm = CausalLM(arch=arch, **options)
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return llm


def bounds(lengths=LENGTHS) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def rows(lengths=LENGTHS, dtype=torch.float64, width: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, n, width, generator=generator).to(dtype) for n in lengths]


def run(llm: CausalLM, parts: list[Tensor], packed: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Return logits by sample, and gradients: the inputs' and then the parameters'."""
    parts = [part.clone().requires_grad_() for part in parts]
    if packed:
        lengths = [part.shape[1] for part in parts]
        states = llm.hidden_states(torch.cat(parts, 1), cu_seqlens=bounds(lengths))
        logits = list(llm.logits(states).split(lengths, dim=1))
    else:
        logits = [
            llm.logits(llm.hidden_states(part, torch.ones(part.shape[:2]).bool())) for part in parts
        ]
    weights = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x) for x in logits]
    loss = torch.stack([(x * w).sum() for x, w in zip(logits, weights, strict=True)]).sum()
    learnt = {n: p for n, p in llm.named_parameters() if "embed_tokens" not in n}
    return logits, list(torch.autograd.grad(loss, [*parts, *learnt.values()]))


def assert_equal(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    assert len(found) == len(expected)
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        error = (one - other).abs().max() / other.abs().max().clamp(min=1)
        assert error <= tolerance, f"tensor {index}: {error}"


@pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)
@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_packed_equals_separate(arch: dict, attention: str) -> None:
    llm = build(arch, attention=attention).double()
    assert llm.packing_obstacle is None
    separate, packed = run(llm, rows(), packed=False), run(llm, rows(), packed=True)
    assert_equal(packed[0], separate[0])
    assert_equal(packed[1], separate[1])


def test_the_window_matters_to_these_samples() -> None:
    llm = build(ARCHS["phi3, sliding window"]).double()
    wide = build({**PHI3, "sliding_window": 5}).double()
    with torch.no_grad():
        narrow, wider = (run_states(model) for model in (llm, wide))
    starts = bounds()[:-1].tolist()
    changed = (narrow - wider).abs().sum(-1)[0] > 1e-9
    assert changed.tolist() == [
        min(position - start for start in starts if start <= position) >= 4
        for position in range(sum(LENGTHS))
    ]


def run_states(llm: CausalLM) -> Tensor:
    return llm.hidden_states(torch.cat(rows(), 1), cu_seqlens=bounds())


def test_a_sample_sees_nothing_of_the_one_before() -> None:
    llm = build(LLAMA).double()
    parts = rows()
    changed = [parts[0] + 1, *parts[1:]]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]

    def ours(rows: list[Tensor]) -> Tensor:
        return llm.hidden_states(torch.cat(rows, 1), position_ids=positions, cu_seqlens=bounds())

    def naive(rows: list[Tensor]) -> Tensor:
        """Restarted positions and a mask of ones: it looks packed, and isn't."""
        return llm.model.model(
            inputs_embeds=torch.cat(rows, 1),
            position_ids=positions,
            attention_mask=torch.ones(1, sum(LENGTHS), dtype=torch.bool),
            use_cache=False,
        ).last_hidden_state

    with torch.no_grad():
        moved = (naive(changed) - naive(parts))[:, LENGTHS[0] :].abs().amax(-1)
        assert (moved > 1e-6).all(), "the trap isn't one: this test can't fail"
        assert ours(changed)[:, LENGTHS[0] :].equal(ours(parts)[:, LENGTHS[0] :])
        assert not ours(changed)[:, : LENGTHS[0]].equal(ours(parts)[:, : LENGTHS[0]])


def test_positions_are_counted_in_each_sample_unless_given() -> None:
    llm = build(LLAMA).double()
    embeds = torch.cat(rows(), 1)
    counted = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    with torch.no_grad():
        ours, given, other = (
            llm.hidden_states(embeds, position_ids=ids, cu_seqlens=bounds())
            for ids in (None, counted, 3 * counted)
        )
    assert ours.equal(given)
    assert not ours.allclose(other)


@pytest.mark.parametrize("left", [-1, 0, 2])
def test_gradients_of_the_operator(left: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(9, 4, 3, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(9, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    cu = bounds((4, 1, 4))
    torch.autograd.gradcheck(lambda *x: segment_attention(*x, cu, 0.7, left), (q, k, v))


@pytest.mark.parametrize("left", [-1, 3])
def test_gradients_of_the_operator_under_autocast_are_exact(left: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(40, 4, 16).bfloat16().requires_grad_()
    k, v = (torch.randn(40, 2, 16).bfloat16().requires_grad_() for _ in range(2))
    grad = torch.randn(40, 4, 16).bfloat16()
    cu = bounds((17, 1, 22))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = segment_attention(q, k, v, cu, 0.25, left)
        found = torch.autograd.grad(out, (q, k, v), grad)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(segment_attention(*exact, cu, 0.25, left), exact, grad.double())
    # Half a unit of bfloat16's last place, and what the rounded output leaves.
    assert_equal([x.double() for x in found], list(expected), tolerance=0.006)


def test_the_operator_is_declared_rightly() -> None:
    q = torch.randn(9, 4, 3, requires_grad=True)
    k = torch.randn(9, 2, 3, requires_grad=True)
    torch.library.opcheck(segment_attention, (q, k, k, bounds((4, 1, 4)), 0.7, 2))


def test_autocast_computes_as_sdpa_does() -> None:
    llm = build(LLAMA)
    found = []
    for packed in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, grads = run(llm, rows(dtype=torch.float32), packed)
        assert logits[0].dtype == torch.bfloat16
        found.append([*logits, *grads])
    assert_equal(found[1], found[0], tolerance=0.03)


def test_checkpointed_layers_keep_the_bounds() -> None:
    kept, recomputed = build(LLAMA).double(), build(LLAMA, checkpointing=True).double()
    for llm in (kept, recomputed):
        llm.train()
    calls: list[int] = []
    recomputed.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    (logits, grads), expected = run(recomputed, rows(), packed=True), run(kept, rows(), packed=True)
    assert len(calls) == 2
    assert_equal(logits, expected[0])
    assert_equal(grads, expected[1])


def test_compiled_layers_are_one_graph_for_all_lengths() -> None:
    torch._dynamo.reset()
    graphs: list[int] = []

    def backend(graph, inputs):
        graphs.append(1)
        return graph.forward

    plain, compiled = (build(ARCHS["mistral, sliding window"]).double() for _ in range(2))
    for layer in compiled.model.model.layers:
        layer.compile(backend=backend, fullgraph=True)
    counts = []
    for lengths in (LENGTHS, (3, 9), (8, 8, 2, 4, 6), (2, 30)):
        found, expected = (run(llm, rows(lengths), packed=True) for llm in (compiled, plain))
        assert_equal(found[0] + found[1], expected[0] + expected[1])
        counts.append(len(graphs))
    # The second batch shows which sizes change; after that there is nothing new.
    assert counts[0] > 0 and counts[1] == counts[-1], counts


def test_padded_batches_and_generation_are_those_of_sdpa() -> None:
    llm = build(PHI3)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    embeds = torch.randn(2, 4, 32)
    options = {"inputs_embeds": embeds.flip(1), "attention_mask": mask.flip(1).long()}
    found = []
    for implementation in (None, "sdpa"):
        if implementation:
            assert llm.model.config._attn_implementation != implementation
            llm.model.set_attn_implementation(implementation)
        with torch.no_grad():
            ids = llm.model.generate(**options, max_new_tokens=5, do_sample=False, pad_token_id=0)
            found.append((llm.hidden_states(embeds, mask), ids))
    assert found[0][0].equal(found[1][0])
    assert found[0][1].equal(found[1][1])


def test_no_config_names_our_kernels(tmp_path) -> None:
    llm = build(LLAMA)
    assert "covft" in llm.model.config._attn_implementation
    llm.model.save_pretrained(tmp_path)
    assert not re.search("covft|_attn_impl", (tmp_path / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"


def test_unknown_and_impossible_choices() -> None:
    with pytest.raises(ValueError, match=r"llm\.attention 'spda' is unknown; .*sdpa"):
        build(LLAMA, attention="spda")
    llm = build(LLAMA, attention="varlen")
    with pytest.raises(ValueError, match=r"'varlen' isn't possible: .*CUDA"):
        llm.hidden_states(rows(dtype=torch.float32)[0], cu_seqlens=bounds((7,)))


def test_flash_attention_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_attention.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install flash-attn"):
        build(LLAMA, attention="flash_attention_2")


MAMBA = {"model_type": "mamba", "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1}
UNPACKABLE = {
    "another interface": (
        {"model_type": "bloom", "vocab_size": 50, "hidden_size": 32, "n_layer": 1, "n_head": 4},
        "AttentionInterface",
    ),
    "recurrent": (MAMBA, "Mamba"),
    "convolutions": (
        {**LLAMA, "model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
        "Lfm2",
    ),
}


@pytest.mark.parametrize(("arch", "reason"), UNPACKABLE.values(), ids=UNPACKABLE)
def test_llms_that_would_mix_samples_are_refused(arch: dict, reason: str) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**arch))
    before = model.config._attn_implementation
    assert reason in (set_attention(model, "auto") or "")
    assert model.config._attn_implementation == before
    with pytest.raises(ValueError, match="isn't possible"):
        set_attention(model, "sdpa")
    llm = build(LLAMA)
    llm.packing_obstacle = set_attention(model, "auto")
    with pytest.raises(ValueError, match=r"train_dataloader\.pack=False"):
        llm.hidden_states(rows()[0], cu_seqlens=bounds((7,)))


def test_layers_that_forget_the_bounds_are_an_error() -> None:
    llm = build(LLAMA)
    layer = llm.model.model.layers[0].self_attn
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: (
            args,
            {name: value for name, value in kwargs.items() if "seq_lens" not in name},
        ),
        with_kwargs=True,
    )
    with pytest.raises(ValueError, match="wasn't told the bounds"):
        llm.hidden_states(rows(dtype=torch.float32)[0], cu_seqlens=bounds((7,)))


@pytest.mark.parametrize("extra", [{"attention_dropout": 0.1}, {"attn_logit_softcapping": 30.0}])
def test_what_packed_rows_lack_is_an_error(extra: dict) -> None:
    arch = {**LLAMA, **extra}
    if "attn_logit_softcapping" in extra:
        arch |= {"model_type": "gemma2", "final_logit_softcapping": None, "head_dim": 8}
    llm = build(arch).train()
    if llm.packing_obstacle is None:
        with pytest.raises(ValueError, match=r"dropout|softcap"):
            llm.hidden_states(rows(dtype=torch.float32)[0], cu_seqlens=bounds((7,)))
    else:  # then it isn't reached at all
        assert "eager" in llm.packing_obstacle


def documented_varlen(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa
) -> Tensor:
    """What torch's documentation says of varlen_attn, by dense masks."""
    assert cu_seq_q.dtype == torch.int32 and cu_seq_q is cu_seq_k
    assert max_q == max_k == int(cu_seq_q.diff().max())
    assert enable_gqa == (query.shape[1] != key.shape[1])
    left, right = window_size
    assert right == 0
    index = torch.arange(len(query))
    segment = torch.bucketize(index, cu_seq_q[1:-1].long(), right=True)
    behind = index[:, None] - index
    seen = (segment[:, None] == segment) & (behind >= 0) & ((behind <= left) | (left < 0))
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=enable_gqa)
    return out[0].transpose(0, 1)


@pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)
def test_what_the_gpu_kernel_is_asked_for(arch: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = build(arch).double()
    expected = run(llm, rows(), packed=True)
    calls: list[int] = []

    def kernel(*args, **kwargs) -> Tensor:
        calls.append(1)
        return documented_varlen(*args, **kwargs)

    monkeypatch.setattr(packed_attention, "_varlen_obstacle", lambda query: None)
    monkeypatch.setattr(packed_attention, "_varlen_attn", lambda: kernel)
    found = run(llm, rows(), packed=True)
    assert len(calls) == 2
    assert_equal(found[0] + found[1], expected[0] + expected[1])


def test_the_installed_torch_takes_these_arguments() -> None:
    query = torch.empty(9, 4, 8, device="meta", dtype=torch.bfloat16)
    key = torch.empty(9, 2, 8, device="meta", dtype=torch.bfloat16)
    cu = torch.empty(4, device="meta", dtype=torch.int32)
    for left in (-1, 3):
        out = packed_attention.varlen_attention(query, key, key, cu, 5, scale=0.3, left=left)
        assert out.shape == query.shape


@pytest.fixture
def pretend_gpu(monkeypatch: pytest.MonkeyPatch):
    """Return a function that sets the compute capability that PyTorch reports."""
    look_up = packed_attention._found_device_obstacle

    def pretend(capability: tuple[int, int]) -> None:
        look_up.cache_clear()

        def reported(index: int) -> tuple[int, int]:
            torch._dynamo.graph_break()  # which is why no compiled layer may ask
            return capability

        monkeypatch.setattr(torch.cuda, "get_device_capability", reported)

    yield pretend
    look_up.cache_clear()


def test_where_the_gpu_kernel_can_run(pretend_gpu) -> None:
    def obstacle(dtype=torch.bfloat16, head_dim: int = 64, capability=(9, 0)) -> str:
        pretend_gpu(capability)
        shape = torch.Size([5, 4, head_dim])
        device = torch.device("cuda", 0)
        query = types.SimpleNamespace(is_cuda=True, dtype=dtype, shape=shape, device=device)
        return packed_attention._varlen_obstacle(query) or ""

    assert obstacle() == obstacle(torch.float16, 96) == obstacle(head_dim=256) == ""
    assert "16 bits, not torch.float32" in obstacle(torch.float32)
    assert "not 20" in obstacle(head_dim=20) and "not 264" in obstacle(head_dim=264)
    assert "8.0, this GPU has (7, 5)" in obstacle(capability=(7, 5))
    assert "on 'cpu'" in (packed_attention._varlen_obstacle(torch.empty(5, 4, 8)) or "")


@pytest.mark.parametrize("lacking", ["scale", "window_size", "enable_gqa"])
def test_an_older_gpu_kernel_is_not_asked(lacking, pretend_gpu, monkeypatch) -> None:
    taken = [name for name in ("scale", "window_size", "enable_gqa") if name != lacking]

    def older() -> None:
        """Stands for a version whose signature lacks an option."""

    kind = inspect.Parameter.KEYWORD_ONLY
    older.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in taken])
    monkeypatch.setattr(packed_attention, "_varlen_attn", lambda: older)
    pretend_gpu((9, 0))
    assert f"varlen_attn has no {lacking}" in (packed_attention._device_obstacle(0) or "")


def test_the_gpu_kernel_compiles_without_graph_break(
    pretend_gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, as far as the kernel's own shapes go."""
    torch._dynamo.reset()
    pretend_gpu((9, 0))
    monkeypatch.setattr(
        packed_attention, "_varlen_obstacle", lambda query: packed_attention._device_obstacle(0)
    )
    monkeypatch.setattr(packed_attention, "_autocast", lambda states: states)  # meta has none
    graphs: list[int] = []

    def backend(graph, inputs):
        graphs.append(1)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True)
    def attend(query: Tensor, key: Tensor, cu: Tensor, longest: int) -> Tensor:
        options = {"kernel": "varlen", "cu_seq_lens_q": cu, "max_length_q": longest}
        return packed_attention._attend(torch.nn.Identity(), query, key, key, None, **options)[0]

    with torch.device("meta"):
        for length, samples, longest in ((9, 3, 5), (12, 4, 7), (31, 2, 16), (40, 6, 9)):
            query = torch.empty(1, 4, length, 8, dtype=torch.bfloat16, requires_grad=True)
            key = torch.empty(1, 2, length, 8, dtype=torch.bfloat16, requires_grad=True)
            cu = torch.empty(samples + 1, dtype=torch.int32)
            out = attend(query, key, cu, longest)
            assert out.shape == (1, length, 4, 8)
            out.sum().backward()
    assert len(graphs) == 2


def test_flash_attention_gets_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = build(LLAMA).double()
    expected = run(llm, rows(), packed=True)[0]

    def kernel(module, query, key, value, attention_mask, *, scaling, cu_seq_lens_q, **kwargs):
        """What transformers' FlashAttention reads of its arguments."""
        assert attention_mask is None
        assert kwargs["cu_seq_lens_k"] is cu_seq_lens_q
        assert kwargs["max_length_q"] == kwargs["max_length_k"] == max(LENGTHS)
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return segment_attention(q, k, v, cu_seq_lens_q, scaling, -1)[None], None

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", kernel)
    llm.model.config._attn_implementation = "flash_attention_2"
    assert_equal(run(llm, rows(), packed=True)[0], expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("left", [-1, 3])
def test_the_gpu_kernel_equals_sample_by_sample(left: int) -> None:
    torch.manual_seed(0)
    shapes, cu = [(25, 4, 64), (25, 2, 64), (25, 2, 64)], bounds()
    exact = [torch.randn(shape).bfloat16().double().requires_grad_() for shape in shapes]
    rounded = [x.detach().bfloat16().cuda().requires_grad_() for x in exact]
    assert packed_attention._varlen_obstacle(rounded[0]) is None
    expected = segment_attention(*exact, cu, 0.1, left)
    found = packed_attention.varlen_attention(*rounded, cu.cuda(), 12, scale=0.1, left=left)
    grad = torch.randn_like(expected)
    wanted = [expected, *torch.autograd.grad(expected, exact, grad)]
    given = [found, *torch.autograd.grad(found, rounded, grad.bfloat16().cuda())]
    assert_equal([x.double().cpu() for x in given], wanted, tolerance=0.02)
