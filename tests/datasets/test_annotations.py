import itertools
import random

import pytest

from covft.conversation import get_template
from covft.datasets.annotations import RecordCheck, check_record, image_paths
from covft.datasets.tiling import Tiles

TEXTS = ["", "<image>", "what?", "<ima", "ge>", "图 <image>", "<image> <image>", 3, None]
ROLES = ["human", "gpt", "system", None]


def random_records(count):
    rng = random.Random(0)
    for _ in range(count):
        turns = []
        for number in range(rng.randrange(6)):
            role = ["human", "gpt"][number % 2] if rng.random() < 0.95 else rng.choice(ROLES)
            turn = {"from": role, "value": rng.choice(TEXTS[:7] if rng.random() < 0.95 else TEXTS)}
            turns.append(turn if rng.random() < 0.97 else "turn")
        record = {"conversations": turns}
        if rng.random() < 0.7:
            record["image"] = rng.choice(["a.png", "a.png", "", ["a.png"], ["a", "b"], [], None, 3])
        if rng.random() < 0.05:
            record["video"] = "a.mp4"
        yield record


def slowly(record, template):
    check_record(record, template=template)
    text = "".join(turn["value"] for turn in record["conversations"])
    return len(text.encode()), len(image_paths(record)), len(image_paths(record))


@pytest.mark.parametrize("name", ["v1", "plain", "qa"])
def test_the_quick_look_decides_like_the_close_one(name):
    template = get_template(name)
    check = RecordCheck(template, "pad", 8)
    outcomes = {"good": 0, "bad": 0}
    for record in random_records(4000):
        try:
            expected = slowly(record, template)
        except ValueError as error:
            with pytest.raises(ValueError) as raised:
                check.measure(record)
            assert str(raised.value) == str(error)
            outcomes["bad"] += 1
        else:
            assert check.measure(record) == expected
            outcomes["good"] += 1
    assert min(outcomes.values()) > 100


def test_half_a_character_is_left_to_the_tokenizer(record):
    check = RecordCheck(get_template("v1"), None, 8)
    assert check.measure(record("x", texts=("\ud83d", "é")))[0] == 5


@pytest.mark.parametrize(("image", "sizes"), [("a", (16, 12)), (["a", "b"], (16, 12))])
def test_squares_are_counted_or_bounded(record, image, sizes):
    check = RecordCheck(get_template("v1"), Tiles(6), 8)
    unknown = record("x", image=image)
    count = len(image_paths(unknown))
    assert check.measure(unknown)[1:] == (count, {1: 7, 2: 2 * 4}[count])
    known = unknown | {"width_list": [sizes[0]] * count, "height_list": [sizes[1]] * count}
    assert check.measure(known)[1:] == (count, sum(check.squares([sizes] * count)))
    assert check.measure(known)[2] < check.measure(unknown)[2] or count == 1
    broken = known | {"width_list": list(itertools.repeat(-1, count))}
    assert check.measure(broken) == check.measure(unknown)
