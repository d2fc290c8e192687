"""AdamW for bfloat16 weights: an exact master, resumable bit by bit, few bytes."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

import covft.engine.bf16_adamw as module
from covft.engine import BF16AdamW, build_optim_wrapper

MODES = [
    (master, moments) for master in ("low_half", "stochastic") for moments in ("float32", "8bit")
]
SHAPES = [(70, 100), (33,), (3, 5, 7), (1,), (0, 4)]
#: Of either sign: the payload all ones, all zeros but the last, what overflows when rounded.
NAN_BITS = [0x7FFFFFFF, -1, 0x7F800001, 0x7F800001 - 2**31, 0x7FFF8000, 0x7FC00000]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 2048)  # several a parameter, the last one partly filled


def needs(moments: str) -> None:
    if moments == "8bit":
        pytest.importorskip("bitsandbytes")


def parameters(dtype: torch.dtype = torch.bfloat16) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).bfloat16() for shape in SHAPES]
    return [nn.Parameter(value.to(dtype)) for value in values]


def give_gradients(found: list[nn.Parameter], step: int, *, skip: int | None = None) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for number, parameter in enumerate(found):
        grad = torch.randn(parameter.shape, generator=generator).bfloat16()
        parameter.grad = None if number == skip else grad.to(parameter.dtype)


def train(optimizer, found, steps, *, schedule: bool = True) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 / (step + 1) if schedule else 2e-5
        give_gradients(found, step, skip=1 if step == 2 else None)
        optimizer.step()


def masters(optimizer: BF16AdamW, found: list[nn.Parameter]) -> list[Tensor]:
    pairs = [(p.detach(), optimizer.state[p].get("low_half")) for p in found]
    return [module._join(weight, low) for weight, low in pairs]


def test_the_master_equals_float32_weights_bit_by_bit() -> None:
    here, there = parameters(), parameters(torch.float32)
    optimizer = BF16AdamW(here, lr=0.1, weight_decay=0.1, moments="float32")
    other = torch.optim.AdamW(there, lr=0.1, weight_decay=0.1, foreach=False)
    for step in range(20):
        train(optimizer, here, [step])
        train(other, there, [step])
        for weight, master, expected in zip(here, masters(optimizer, here), there, strict=True):
            assert torch.equal(master, expected)
            distance = (weight.float() - expected).abs()
            assert (distance <= (expected.bfloat16().float() - expected).abs()).all()  # nearest


def test_8_bit_moments_are_those_of_bitsandbytes() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    here, there = parameters()[:1], parameters(torch.float32)[:1]
    optimizer = BF16AdamW(here, lr=0.1, weight_decay=0.1)
    other = bitsandbytes.optim.AdamW8bit(there, lr=0.1, weight_decay=0.1)
    assert here[0].numel() > 3 * module.CHUNK
    for step in range(10):
        train(optimizer, here, [step])
        train(other, there, [step])
        assert torch.equal(masters(optimizer, here)[0], there[0])
    state = optimizer.state[here[0]]
    assert torch.equal(state["exp_avg"], other.state[there[0]]["state1"])
    assert torch.equal(state["exp_avg_sq_scale"], other.state[there[0]]["absmax2"])


def test_float32_parameters_are_updated_as_they_are() -> None:
    here, there = parameters(torch.float32), parameters(torch.float32)
    train(BF16AdamW(here, lr=0.1, moments="float32"), here, range(5))
    train(torch.optim.AdamW(there, lr=0.1, weight_decay=0, foreach=False), there, range(5))
    assert all(torch.equal(one, two) for one, two in zip(here, there, strict=True))


@pytest.mark.parametrize("master", ["low_half", "stochastic"])
def test_small_updates_are_not_lost(master: str) -> None:
    def moved(optimizer_class, dtype, **options) -> float:
        weight = nn.Parameter(torch.full((20_000,), 1.0, dtype=dtype))
        optimizer = optimizer_class([weight], lr=2e-5, weight_decay=0, **options)
        for _ in range(50):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        return float(1 - weight.detach().double().mean())

    wanted = moved(torch.optim.AdamW, torch.float32)
    assert moved(torch.optim.AdamW, torch.bfloat16) == 0  # all of it rounded away
    if master == "stochastic":
        found = moved(BF16AdamW, torch.bfloat16, master=master, moments="float32")
        assert found == pytest.approx(wanted, rel=0.05)
    else:
        weight = nn.Parameter(torch.full((4,), 1.0, dtype=torch.bfloat16))
        optimizer = BF16AdamW([weight], lr=2e-5, moments="float32")
        for _ in range(50):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        found = float(1 - masters(optimizer, [weight])[0].double().mean())
        assert found == pytest.approx(wanted)


def test_stochastic_rounding_has_the_right_mean_and_neighbours() -> None:
    master = torch.tensor([1.0 + 2**-9, -1.0 - 2**-9, 3.14159, -1e-30, 0.0]).repeat(50_000)
    weight = torch.empty_like(master, dtype=torch.bfloat16)
    noise = torch.randint(1 << 16, weight.shape, dtype=torch.int32)
    module._round(master.clone(), weight, noise)
    means = weight.double().view(-1, 5).mean(0)
    torch.testing.assert_close(means, master[:5].double(), rtol=1e-4, atol=0)
    lower = master[:1].view(torch.int32) >> 16 << 16
    assert weight.view(-1, 5)[:, 0].unique().tolist() == [1.0, 1.0 + 2**-7]
    assert lower.view(torch.float32) == 1.0


def test_halves_hold_every_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32)
    edges = [0, 1, 0x7FFF, 0x8000, 0x8001, 0x3F807FFF, 0x3F808000, 0x7F7FFFFF, 0x00008000]
    infinite = [0x7F800000, 0x7F800000 - 2**31]
    bits = torch.cat([bits, torch.tensor([*edges, *infinite, *NAN_BITS], dtype=torch.int32)])
    master = bits.view(torch.float32)
    weight = torch.empty_like(master, dtype=torch.bfloat16)
    low = torch.empty_like(master, dtype=torch.int16)
    module._split(master.clone(), weight, low)
    is_nan, joined = master.isnan(), module._join(weight, low)
    assert torch.equal(joined.view(torch.int32)[~is_nan], bits[~is_nan])
    assert torch.equal(weight[master.isinf()].float(), master[master.isinf()])
    # What is computed with is no number either: neither zero nor infinity.
    assert weight[is_nan].isnan().all() and joined[is_nan].isnan().all()


@pytest.mark.parametrize("noise", [0, 1, 0x8000, 0xFFFF])
def test_stochastic_rounding_keeps_what_is_no_number(noise: int) -> None:
    infinite = torch.tensor([float("inf"), -float("inf")])
    master = torch.cat([torch.tensor(NAN_BITS, dtype=torch.int32).view(torch.float32), infinite])
    weight = torch.empty_like(master, dtype=torch.bfloat16)
    module._round(master.clone(), weight, torch.full(master.shape, noise, dtype=torch.int32))
    assert weight[:-2].isnan().all()
    assert torch.equal(weight[-2:].float(), infinite)


@pytest.mark.parametrize(("master", "moments"), MODES)
def test_a_resumed_optimizer_goes_on_bit_by_bit(master: str, moments: str, tmp_path) -> None:
    needs(moments)
    options = {"lr": 1.0, "weight_decay": 0.1, "master": master, "moments": moments}
    whole, here = parameters(), parameters()
    uninterrupted = BF16AdamW(whole, **options)
    train(uninterrupted, whole, range(8))
    first = BF16AdamW(here, **options)
    train(first, here, range(4))
    torch.save({"weights": list(here), "optimizer": first.state_dict()}, tmp_path / "state.pth")
    saved = torch.load(tmp_path / "state.pth", weights_only=True)
    resumed = [nn.Parameter(weight) for weight in saved["weights"]]
    second = BF16AdamW(resumed, **options)
    second.load_state_dict(saved["optimizer"])
    train(second, resumed, range(4, 8))
    for one, two in zip(whole, resumed, strict=True):
        assert torch.equal(one, two)
        for name, value in uninterrupted.state[one].items():
            other = second.state[two][name]
            assert type(value) is type(other)
            if isinstance(value, Tensor):
                assert value.dtype == other.dtype, name
                if name == "low_half":
                    assert value.numel() < 4 or value.any()
                assert torch.equal(value, other), name
            else:
                assert value == other


def test_loading_copies() -> None:
    found = parameters()
    optimizer = BF16AdamW(found, lr=1.0, moments="float32")
    train(optimizer, found, range(2))
    state = optimizer.state_dict()
    other = BF16AdamW(copy.deepcopy(found), lr=1.0, moments="float32")
    other.load_state_dict(state)
    before = state["state"][0]["exp_avg"].clone()
    train(other, other.param_groups[0]["params"], range(2, 4))
    assert torch.equal(state["state"][0]["exp_avg"], before)


@pytest.mark.parametrize(("master", "moments"), MODES)
def test_bytes_of_state_are_as_stated(master: str, moments: str) -> None:
    needs(moments)
    for dtype in (torch.bfloat16, torch.float32):
        found = parameters(dtype)
        optimizer = BF16AdamW(found, lr=1.0, master=master, moments=moments)
        train(optimizer, found, range(1))
        for parameter in found:
            tensors = [v for v in optimizer.state[parameter].values() if isinstance(v, Tensor)]
            stated = optimizer.state_bytes(parameter.numel(), dtype)
            assert sum(tensor.nbytes for tensor in tensors) == sum(stated.values())
    per_parameter = sum(optimizer.state_bytes(2**24, torch.bfloat16).values()) / 2**24
    expected = {"8bit": 2 + 8 / 256, "float32": 8}[moments] + 2 * (master == "low_half")
    assert per_parameter == expected


def test_temporaries_are_no_larger_than_a_chunk() -> None:
    weight = nn.Parameter(torch.randn(300, 100).bfloat16())
    optimizer = BF16AdamW([weight], lr=1.0, moments="float32")
    train(optimizer, [weight], range(1))
    state = [value for value in optimizer.state[weight].values() if isinstance(value, Tensor)]
    lasting = {t.untyped_storage().data_ptr() for t in (weight, weight.grad, *state)}
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in lasting:
                sizes.append(out.untyped_storage().nbytes())
            return out

    with Watch():
        optimizer.step()
    assert 0 < max(sizes) <= 4 * module.CHUNK < weight.nbytes


def test_replicas_round_alike_and_parameters_differently() -> None:
    def run() -> list[nn.Parameter]:
        found = [nn.Parameter(torch.ones(5000, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = BF16AdamW(found, lr=1e-3, master="stochastic", moments="float32")
        for _ in range(3):
            for parameter in found:
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            torch.rand(7)  # the global generator plays no part
        return found

    one, two = run(), run()
    assert torch.equal(one[0], two[0]) and not torch.equal(one[0], one[1])
    assert not torch.equal(one[0][:2048], one[0][2048:4096])  # nor do chunks round alike


def test_compiled_kernels_give_the_same_and_are_not_compiled_for_every_rate() -> None:
    torch._dynamo.reset()
    here, there = parameters()[:2], parameters()[:2]
    plain = BF16AdamW(here, lr=1.0, weight_decay=0.1, moments="float32")
    compiled = BF16AdamW(there, lr=1.0, weight_decay=0.1, moments="float32")
    kernels = (torch.compile(k, dynamic=True, backend="aot_eager") for k in module._Kernels())
    compiled._kernels = module._Kernels(*kernels)
    train(plain, here, range(2))
    train(compiled, there, range(2))
    with torch.compiler.set_stance("fail_on_recompile"):
        train(compiled, there, range(2, 6))
    train(plain, here, range(2, 6))
    for one, two in zip(masters(plain, here), masters(compiled, there), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"master": "low"}, "low_half"),
        ({"moments": "bf16"}, "8bit"),
        ({"lr": -1.0}, "at least 0"),
        ({"betas": (0.9, 1.0)}, "betas"),
    ],
)
def test_wrong_options(options, words) -> None:
    with pytest.raises(ValueError, match=words):
        BF16AdamW(parameters(), **{"lr": 1.0, "moments": "float32", **options})


def test_wrong_parameters() -> None:
    with pytest.raises(ValueError, match="float16"):
        BF16AdamW([nn.Parameter(torch.ones(2).half())], lr=1.0, moments="float32")
    with pytest.raises(ValueError, match="contiguous"):
        BF16AdamW([nn.Parameter(torch.ones(2, 3).t())], lr=1.0, moments="float32")


def test_another_optimizers_state_is_refused() -> None:
    found = parameters(torch.float32)[:1]
    plain = torch.optim.AdamW(found, lr=1.0)
    give_gradients(found, 0)
    plain.step()
    optimizer = BF16AdamW(parameters()[:1], lr=1.0, moments="float32")
    with pytest.raises(ValueError, match="another optimizer"):
        optimizer.load_state_dict(plain.state_dict())
    assert not optimizer.state


@pytest.mark.parametrize(("saved", "own"), list(itertools.permutations(MODES, 2)))
def test_the_state_of_other_options_is_refused(saved, own) -> None:
    for _, moments in (saved, own):
        needs(moments)
    found = parameters()[:1]
    first = BF16AdamW(found, lr=1.0, master=saved[0], moments=saved[1])
    train(first, found, range(1))
    second = BF16AdamW(parameters()[:1], lr=1.0, master=own[0], moments=own[1])
    assert second.state_layout == {"master": own[0], "moments": own[1]} != first.state_layout
    with pytest.raises(ValueError, match=rf"other options .*'{own[0]}', 'moments': '{own[1]}'"):
        second.load_state_dict(first.state_dict())
    assert not second.state


def test_a_config_builds_it_by_name(capsys) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).bfloat16()
    cfg = {"type": "BF16AdamW", "lr": 1e-4, "weight_decay": 0.1, "moments": "float32"}
    wrapper = build_optim_wrapper(model, {"optimizer": cfg, "lr": {"1": 1e-3}, "precision": "bf16"})
    assert wrapper.learning_rates() == {"base": 1e-4, "1": 1e-3}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    wrapper.clip_gradients()
    wrapper.step()
    assert "rounds its updates" not in capsys.readouterr().out


@pytest.mark.parametrize(("dtype", "warned"), [(torch.bfloat16, True), (torch.float32, False)])
def test_lost_updates_are_warned_of(dtype, warned, monkeypatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("covft.engine.optimizer.print_log", lambda text, **_: said.append(text))
    model = nn.Linear(4, 4).to(dtype)
    build_optim_wrapper(model, {"optimizer": {"type": "AdamW", "lr": 1e-4}})
    assert any("BF16AdamW" in text and "20 weights" in text for text in said) is warned
