import pytest
import torch

from covft.models.sampling import Sampling

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])


def draws(sampling: Sampling, count: int) -> torch.Tensor:
    ids = torch.zeros(count, 1, dtype=torch.long)
    return sampling.processors("cpu")(ids, LOGITS.expand(count, -1).clone()).argmax(-1)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.7)])
def test_draws_have_the_softmax_distribution(temperature: float, top_p: float) -> None:
    count = 40_000
    found = draws(Sampling(temperature, top_p, seed=0), count).bincount(minlength=5) / count
    expected = (LOGITS / temperature).softmax(-1)
    before = expected.cumsum(-1) - expected  # the logits fall
    expected = expected.where(before < top_p, torch.zeros(()))
    expected = expected / expected.sum()
    # Four standard deviations.
    assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / count).sqrt()).all()
    assert (found[expected == 0] == 0).all()


def test_the_seed_alone_decides() -> None:
    state = torch.get_rng_state()
    first = draws(Sampling(seed=3), 50)
    torch.manual_seed(7)
    assert torch.equal(draws(Sampling(seed=3), 50), first)
    assert not torch.equal(draws(Sampling(seed=4), 50), first)
    assert not torch.equal(draws(Sampling(), 50), draws(Sampling(), 50))
    torch.set_rng_state(state)
    draws(Sampling(seed=3), 50)
    assert torch.equal(torch.get_rng_state(), state)  # the process's generator is left alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(temperature=0.0), "temperature must be positive"),
        (dict(temperature=float("nan")), "temperature must be positive"),
        (dict(top_p=0.0), "top_p must be in"),
        (dict(top_p=1.5), "top_p must be in"),
    ],
)
def test_wrong_numbers(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
