import pickle
from collections import Counter

import pytest
from PIL import Image

from covft.datasets import BadSample, InstructDataset, MixtureDataset, Sample
from covft.datasets.mixture import check_dataset
from covft.registry import DATASETS


@pytest.fixture
def members(record, image_root, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (9, 5), (1, 2, 3)).save(other / "a.png")
    return {
        "shapes": dict(
            type=InstructDataset,
            annotations=[record(str(i), image="a.png") for i in range(8)] + [record("x", texts=())],
            image_root=str(image_root),
        ),
        "chat": dict(
            type="InstructDataset",
            annotations=[
                *[record(str(i), texts=("why? " * i, "so")) for i in range(1, 10)],
                record("image", image="a.png"),
            ],
            image_root=str(other),
        ),
    }


def weighted(members, **weights):
    return {name: {**cfg, "weight": weights.get(name, 1)} for name, cfg in members.items()}


def ids(dataset):
    return [dataset.record(index)["id"] for index in range(len(dataset))]


def test_members_one_after_the_other(spec, members):
    mixture = MixtureDataset(members, spec=spec)
    assert len(mixture) == 18
    found = [mixture[i] for i in range(18)]
    assert all(isinstance(sample, Sample) for sample in found)
    assert [sample.id for sample in found] == ids(mixture)
    assert ids(mixture)[::9] == ["shapes/0", "chat/2"]
    assert mixture.has_images().tolist() == [True] * 8 + [False] * 9 + [True]
    assert mixture.sizes().squares.tolist() == [1] * 8 + [0] * 9 + [1]
    expected = [sizes for m in mixture.members.values() for sizes in m.lengths().tolist()]
    assert mixture.lengths().tolist() == expected
    assert [bad.id for bad in mixture.bad] == ["shapes/x"]
    assert mixture.describe(8).startswith("[chat/1] why?")


def test_images_are_the_members_own(spec, members):
    mixture = MixtureDataset(members, spec=spec, resize="stretch")
    assert mixture.record(17)["image"] == [str(mixture.members["chat"].image_root / "a.png")]
    assert mixture[17].pixel_values[0, :, 0, 0].tolist() == [1, 2, 3]
    assert "image" not in mixture.record(8)


def test_a_sample_that_cannot_be_loaded_is_named(spec, members):
    members["chat"]["image_root"] = "nowhere"
    sample = MixtureDataset(members, spec=spec)[17]
    assert isinstance(sample, BadSample)
    assert sample.id == "chat/image" and "not found" in sample.reason


@pytest.mark.parametrize(
    ("weight", "counts"), [(2, {2: 8}), (0.5, {1: 4}), (1.25, {1: 6, 2: 2}), (3.0, {3: 8})]
)
def test_weights_are_draws_in_an_epoch(spec, members, weight, counts):
    mixture = MixtureDataset(weighted(members, shapes=weight), spec=spec)
    drawn = Counter(name for name in ids(mixture) if name.startswith("shapes/"))
    assert Counter(drawn.values()) == counts
    assert sum(name.startswith("chat/") for name in ids(mixture)) == 10
    assert len(mixture.lengths()) == len(mixture)


@pytest.mark.parametrize(("weight", "count"), [(2.1, 17), (0.9999999, 8), (1.01, 8)])
def test_weights_are_rounded_to_whole_samples(spec, members, weight, count):
    mixture = MixtureDataset(weighted(members, shapes=weight), spec=spec)
    assert sum(name.startswith("shapes/") for name in ids(mixture)) == count


def test_a_weight_that_draws_nothing_is_refused(spec, members):
    with pytest.raises(ValueError, match=r"shapes.weight=0.05 of 8 samples rounds to none"):
        MixtureDataset(weighted(members, shapes=0.05), spec=spec)


def test_the_choice_depends_on_the_seed_alone(spec, members):
    halves = [
        ids(MixtureDataset(weighted(members, shapes=0.5, chat=0.5), spec=spec, seed=seed))
        for seed in (0, 0, 1)
    ]
    assert halves[0] == halves[1] != halves[2]


def test_a_fraction_of_the_mixture(spec, members):
    small = ids(MixtureDataset(members, spec=spec, fraction=0.25))
    large = ids(MixtureDataset(members, spec=spec, fraction=0.5))
    assert len(small) == 4 and len(large) == 9
    assert set(small) < set(large)


def test_shared_options_are_the_members_unless_they_say(spec, members):
    members["chat"]["max_length"] = 7
    mixture = MixtureDataset(members, spec=spec, max_length=6, resize="tiles", max_tiles=4)
    assert [member.max_length for member in mixture.members.values()] == [6, 7]
    assert all(member.resize == mixture.resize for member in mixture.members.values())
    assert mixture.lengths().max() == 7


def test_a_copy_in_a_worker(spec, members):
    mixture = MixtureDataset(weighted(members, shapes=1.5), spec=spec)
    assert ids(pickle.loads(pickle.dumps(mixture))) == ids(mixture)


def test_mixtures_may_be_members(spec, members):
    cfg = dict(
        type="MixtureDataset",
        datasets={"inner": dict(type="MixtureDataset", datasets=members, weight=2)},
    )
    check_dataset(cfg)
    mixture = DATASETS.build(cfg, default_args={"spec": spec})
    assert len(mixture) == 36 and ids(mixture)[0] == "inner/shapes/0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": 0}, "shapes.weight must be a positive number, got 0"),
        ({"weight": True}, "must be a positive number, got True"),
        ({"resize": "pad"}, "shapes: it makes images square by 'pad', the mixture by None"),
        ({"annotation": "x"}, "shapes: .* did you mean 'annotations'"),
        ({"type": "NoDataset"}, "shapes: 'NoDataset' is not a dataset"),
    ],
)
def test_wrong_members_are_found_without_building_them(members, change, message):
    members["shapes"] |= change
    cfg = dict(type=MixtureDataset, datasets=members)
    with pytest.raises(ValueError, match=message):
        check_dataset(cfg)
    assert "weight" in change or "weight" not in members["shapes"]


def test_no_members(spec):
    for datasets in ({}, []):
        with pytest.raises(ValueError, match="of at least one dataset"):
            MixtureDataset(datasets, spec=spec)


def test_a_member_that_cannot_be_built_is_named(spec, members):
    members["shapes"]["annotations"] = "none.json"
    with pytest.raises(ValueError, match=r"datasets.shapes: .*not found: none.json"):
        MixtureDataset(members, spec=spec)
