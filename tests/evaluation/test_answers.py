import pytest

from covft.evaluation.answers import (
    final_answer,
    final_letter,
    option_choice,
    option_letter,
    science_qa_letter,
    with_options,
)


def test_options_stand_below_the_question() -> None:
    assert with_options("What?", ["cat", "None"]) == "What?\nA. cat\nB. None"


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "a"),
        ("The answer is (C).", "c"),
        ("the answer is A, no, the answer is: b", ":"),
        ("Answer: B.", "b"),
        ("b. leaf", "b"),
        ("(B", "b"),
        ("carnivore", "c"),
        (" D ", "d"),
        ("", ""),
        ("(.)", "."),
        (" . ", ""),
    ],
)
def test_the_final_letter_is_the_first_character_whatever_it_is(text: str, letter: str) -> None:
    assert final_letter(text) == letter


def test_a_final_answer_is_whole() -> None:
    assert final_answer("Answer: (Closed),") == "closed"
    assert final_answer("Closed.)") == "closed."  # in this order
    assert final_answer("a. open.") == "a. open"


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"),
        (" B\n", "B"),
        ("B. leaf", "B"),
        ("B.", None),
        ("B. ", None),  # answers are stripped first
        ("b", None),
        ("(B)", None),
        ("The answer is B.", "B"),
        ("The answer is B, I think", "B"),  # the pattern's full stop is any character
        ("The answer is B", None),
        ("The answer is A. The answer is B.", None),
        ("F", None),
        ("", None),
        ("AB", None),
    ],
)
def test_science_qa_understands_what_llava_does(text: str, letter: str | None) -> None:
    assert science_qa_letter(text) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(b)", "B"),
        ("B. dog", "B"),
        ("B、狗", "B"),
        ("答案是B。", "B"),
        ("The answer is B", "B"),
        ("Option A, not another", "A"),
        ("A dog", None),
        ("A or B", None),
        ("D", None),
        ("AB", None),
        ("dog", None),
        ("", None),
        (".", None),
    ],
)
def test_option_letters(text: str, letter: str | None) -> None:
    assert option_letter(text, ["A", "B"]) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A. dog", "A"),  # the letter wins over the text
        ("The dog", "B"),
        ("A dog", "B"),
        ("DOG.", "B"),
        ("a hot dog", "C"),
        ("It is a hot dog", None),
        ("dogs", None),
        ("cat or dog", None),
        ("我看到了猫", None),
        ("vitamin C", "D"),
        ("The vitamin C.", "D"),
        ("A, B and C", None),
        ("A or (B)", None),
        ("", None),
    ],
)
def test_option_texts_are_whole_words_and_unique(text: str, letter: str | None) -> None:
    options = {"A": "cat", "B": "dog", "C": "a hot dog", "D": "vitamin C"}
    assert option_choice(text, options) == letter


def test_chinese_options_need_no_spaces() -> None:
    assert option_choice("图中是一只猫。", {"A": "狗", "B": "猫"}) == "B"
    assert option_choice("猫", {"A": "猫", "B": "猫"}) is None


@pytest.mark.parametrize(
    ("text", "options", "letter"),
    [
        ("D.C.", {"A": "D.C.", "B": "Iowa", "C": "Utah", "D": "Ohio"}, "A"),
        ("C. elegans", {"A": "C. elegans", "B": "E. coli", "C": "yeast"}, "A"),
        ("The vitamin C.", {"A": "vitamin C", "B": "iron", "C": "salt"}, "A"),
        ("A and B", {"A": "A", "B": "B", "C": "A and B"}, "C"),
        ("B", {"A": "B", "B": "A"}, "B"),  # a lone letter is a letter
        ("B. cat", {"A": "cat", "B": "dog"}, "B"),
    ],
)
def test_an_options_whole_text_wins_over_a_letter_in_it(
    text: str, options: dict[str, str], letter: str
) -> None:
    assert option_choice(text, options) == letter


def test_a_list_of_letters_names_none() -> None:
    assert option_letter("A, B and C", ["A", "B"]) is None
    assert option_letter("A, a dog", ["A", "B"]) == "A"
