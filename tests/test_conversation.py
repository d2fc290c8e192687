import pytest
from tokenizers_for_tests import (
    bert_tokenizer,
    byte_level_tokenizer,
    llama_tokenizer,
    phi3_tokenizer,
    qwen_tokenizer,
)

from covft.conversation import (
    IGNORE_INDEX,
    IMAGE_TOKEN_ID,
    Template,
    context_text,
    decoded_spans,
    encode,
    encode_prompt,
    get_template,
)

V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
# Template, tokenizer, what the model produces before an answer, what it produces after it.
CASES = {
    "v1": ("v1", llama_tokenizer, " ", "</s>"),
    "phi3-chat": ("phi3-chat", phi3_tokenizer, "", "<|end|>"),
    "chatml": ("chatml", byte_level_tokenizer, "", "<|im_end|>"),
    "chatml-qwen": ("chatml", qwen_tokenizer, "", "<|im_end|>"),
    "qa-qwen": ("qa", qwen_tokenizer, " ", "<|im_end|>"),
    "qa-byte-level": ("qa", byte_level_tokenizer, " ", "<|im_end|>"),
    "qa-llama": ("qa", llama_tokenizer, " ", "</s>"),
}
DIALOGUES = {
    "one turn": ["what color is the shape?", "blue"],
    "three turns": ["what color?", "blue", "Is it red?", "no, it isn't.", "And a circle? ", "yes"],
    "chinese": ["图中有什么？", "一个蓝色的圆形。", "还有呢？", "没有了"],
    "emoji": ["is it 🙂?", "yes 👍🏽", "sure?", "🎉🎉 é"],
    "empty answers": ["what?", "", "and now?", "blue", "then?", ""],
    "spaces around": [" a \n", "\n b ", "x \n", " \n c", "d? \n", " e\n\n"],
    "lines, digits": ["count\nthem:\n- 1\n- 2", "1\n2\n\n  33", "again", "a  b\t c"],
}


def turns_of(texts, image=False):
    roles = ("human", "gpt")
    turns = [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]
    if image:
        turns[0]["value"] = "<image>\n" + turns[0]["value"]
    return turns


@pytest.fixture(params=CASES, ids=list(CASES))
def case(request):
    name, tokenizer, lead, end = CASES[request.param]
    return get_template(name), tokenizer(), lead, end


@pytest.mark.parametrize("texts", DIALOGUES.values(), ids=list(DIALOGUES))
@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
def test_answers_and_their_terminators_are_supervised_and_nothing_else(case, texts, image):
    template, tokenizer, lead, end = case
    encoded = encode(
        turns_of(texts, image), template=template, tokenizer=tokenizer, num_image_tokens=5
    )
    spans = decoded_spans(encoded.input_ids, encoded.labels, tokenizer=tokenizer)
    supervised = [span.text for span in spans if span.supervised]
    if template.strip:
        texts = [text.strip() for text in texts]
    expected = [(lead if answer else "") + answer + end for answer in texts[1::2]]
    # The sentencepiece decoder shows the space that its kind puts before each text.
    assert [text.lstrip(" ") for text in supervised] == [text.lstrip(" ") for text in expected]
    where = encoded.labels != IGNORE_INDEX
    assert (encoded.labels[where] == encoded.input_ids[where]).all()
    assert sum(span.num_image_tokens for span in spans) == (5 if image else 0)
    assert int((encoded.input_ids == IMAGE_TOKEN_ID).sum()) == (5 if image else 0)


@pytest.mark.parametrize("texts", DIALOGUES.values(), ids=list(DIALOGUES))
@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
def test_every_prompt_is_a_prefix_and_supervision_starts_right_behind_it(case, texts, image):
    template, tokenizer, *_ = case
    turns = turns_of(texts, image)
    arguments = {"template": template, "tokenizer": tokenizer, "num_image_tokens": 3}
    encoded = encode(turns, **arguments)
    ids, labels = encoded.input_ids.tolist(), encoded.labels.tolist()
    starts = [
        i
        for i in range(1, len(labels))
        if labels[i] != IGNORE_INDEX
        and (labels[i - 1] == IGNORE_INDEX or ids[i - 1] in template.stop_token_ids(tokenizer))
    ]
    prompts = [encode_prompt(turns[: n + 1], **arguments).tolist() for n in range(0, len(turns), 2)]
    assert [len(prompt) for prompt in prompts] == starts
    for prompt in prompts:
        assert ids[: len(prompt)] == prompt


@pytest.mark.parametrize("tokenizer", [llama_tokenizer(), byte_level_tokenizer()])
@pytest.mark.parametrize("caption", ["blue rectangle", "蓝色的圆形 🙂", ""])
def test_plain_is_the_image_and_its_caption(tokenizer, caption):
    turns = turns_of(["Describe the image.\n<image>", caption])
    arguments = {"template": get_template("plain"), "tokenizer": tokenizer, "num_image_tokens": 4}
    encoded = encode(turns, **arguments)
    bos = tokenizer("")["input_ids"]
    caption_ids = tokenizer(caption + "\n", add_special_tokens=False)["input_ids"]
    assert encoded.input_ids.tolist() == bos + [IMAGE_TOKEN_ID] * 4 + caption_ids
    assert encoded.labels.tolist() == [IGNORE_INDEX] * (len(bos) + 4) + caption_ids
    prompt = encode_prompt(turns[:1], **arguments)
    assert prompt.tolist() == bos + [IMAGE_TOKEN_ID] * 4


def test_v1_gives_the_ids_of_the_public_preprocessing():
    # LLaVA's text is written out here; it's cut at the image, each part tokenised by itself.
    tokenizer = llama_tokenizer()
    turns = turns_of(["what color is it?\n<image>", "blue", "sure?", "yes"])
    before = f"{V1_SYSTEM} USER: "
    after = "\nwhat color is it? ASSISTANT: blue</s>USER: sure? ASSISTANT: yes</s>"
    expected = tokenizer(before)["input_ids"] + [IMAGE_TOKEN_ID] * 2
    expected += tokenizer(after)["input_ids"][1:]
    encoded = encode(turns, template=get_template("v1"), tokenizer=tokenizer, num_image_tokens=[2])
    assert encoded.input_ids.tolist() == expected
    assert encoded.input_ids[0] == tokenizer.bos_token_id
    assert int((encoded.input_ids == tokenizer.bos_token_id).sum()) == 1


def test_phi3_chat_gives_the_ids_of_the_public_preprocessing():
    tokenizer = phi3_tokenizer()
    turns = turns_of(["what is it? <image>", " blue ", "sure?", "yes"])
    system = (
        "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
        "是一个有用无害的人工智能助手。"
    )
    before = f"<|system|>\n{system}<|end|><|user|>\nwhat is it? <img>"
    after = "</img><|end|><|assistant|>\nblue<|end|><|user|>\nsure?<|end|><|assistant|>\nyes<|end|>"
    expected = tokenizer(before)["input_ids"] + [IMAGE_TOKEN_ID] * 2
    expected += tokenizer(after)["input_ids"][1:]
    encoded = encode(
        turns, template=get_template("phi3-chat"), tokenizer=tokenizer, num_image_tokens=[2]
    )
    assert encoded.input_ids.tolist() == expected


def test_chatml_text():
    tokenizer = byte_level_tokenizer()
    text = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\nyes<|im_end|>\n"
    )
    template = get_template({"type": "chatml", "system": "Be brief."})
    encoded = encode(turns_of(["hi", "yes"]), template=template, tokenizer=tokenizer)
    assert tokenizer.decode(encoded.input_ids) == text
    # SmolLM2's kind names <|im_start|> as BOS; a second one at the start would be foreign to it.
    assert encoded.input_ids[:2].tolist() != [tokenizer.bos_token_id] * 2


def test_qa_text():
    tokenizer = byte_level_tokenizer()
    turns = turns_of(["what?\n<image>", "blue", "and?", "red"])
    encoded = encode(turns, template=get_template("qa"), tokenizer=tokenizer, num_image_tokens=2)
    assert encoded.input_ids[:2].tolist() == [IMAGE_TOKEN_ID] * 2
    text = tokenizer.decode(encoded.input_ids[2:])
    assert text == "what? blue<|im_end|>and? red<|im_end|>"


def test_several_images_keep_their_places_and_sizes():
    tokenizer = byte_level_tokenizer()
    turns = turns_of(["is <image> like <image>?", "no", "and <image>?", "yes"])
    encoded = encode(
        turns, template=get_template("qa"), tokenizer=tokenizer, num_image_tokens=[1, 2, 3]
    )
    spans = decoded_spans(encoded.input_ids, encoded.labels, tokenizer=tokenizer)
    assert [span.num_image_tokens or span.text for span in spans] == [
        *("is ", 1, " like ", 2, "?", " no<|im_end|>"),
        *("and ", 3, "?", " yes<|im_end|>"),
    ]


def test_images_without_a_tag_go_before_the_first_question():
    tokenizer = llama_tokenizer()
    arguments = {"template": get_template("v1"), "tokenizer": tokenizer, "num_image_tokens": [2, 3]}
    untagged = encode(turns_of(["same?", "no"]), **arguments)
    partly = encode(turns_of(["<image>\nsame?", "no"]), **arguments)
    tagged = encode(turns_of(["<image>\n<image>\nsame?", "no"]), **arguments)
    assert untagged.input_ids.tolist() == tagged.input_ids.tolist() == partly.input_ids.tolist()


def test_more_tags_than_images_names_sample_and_counts():
    turns = turns_of(["<image> or <image>?", "no"])
    with pytest.raises(ValueError, match=r"'s7' has 2 <image> tags but 1 images"):
        encode(
            turns,
            template=get_template("v1"),
            tokenizer=llama_tokenizer(),
            num_image_tokens=[4],
            sample_id="s7",
        )


def test_truncation_is_counted():
    arguments = {"template": get_template("qa"), "tokenizer": byte_level_tokenizer()}
    turns = turns_of(["what color?", "blue", "and?", "red"])
    whole = encode(turns, **arguments)
    length = len(whole.input_ids)
    assert whole.num_truncated == 0
    assert encode(turns, max_length=length, **arguments).num_truncated == 0
    cut = encode(turns, max_length=length - 2, **arguments)
    assert cut.num_truncated == 2
    assert cut.input_ids.tolist() == whole.input_ids[:-2].tolist()
    assert cut.labels.tolist() == whole.labels[:-2].tolist()


def test_truncation_neither_cuts_images_nor_leaves_nothing_to_learn():
    arguments = {
        "template": get_template("qa"),
        "tokenizer": byte_level_tokenizer(),
        "num_image_tokens": 8,
    }
    turns = turns_of(["<image>what color?", "blue"])
    prompt_length = len(encode_prompt(turns[:1], **arguments))
    with pytest.raises(ValueError, match="image would be cut"):
        encode(turns, max_length=7, **arguments)
    with pytest.raises(ValueError, match="nothing supervised"):
        encode(turns, max_length=prompt_length, **arguments)
    assert encode(turns, max_length=prompt_length + 1, **arguments).num_truncated > 0


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "no question"),
        ([{"from": "gpt", "value": "hello"}], "no question"),
        (turns_of(["only a question"]), "expected an answer"),
        ([{"from": "human", "value": "a"}, {"from": "human", "value": "b"}], "two turns in a row"),
        ([{"from": "system", "value": "a"}], "expected 'human' or 'gpt'"),
        ([{"from": "human"}], "no text"),
        ([{"from": "human", "value": None}], "no text"),
        (["what?"], "no text"),
        (turns_of(["what?", "see <image>"]), "an answer holds <image>"),
    ],
)
def test_malformed_turns(turns, message):
    with pytest.raises(ValueError, match=message):
        encode(turns, template=get_template("v1"), tokenizer=llama_tokenizer())


def test_a_leading_answer_is_left_out():
    arguments = {"template": get_template("v1"), "tokenizer": llama_tokenizer()}
    turns = turns_of(["what?", "blue"])
    led = encode([{"from": "gpt", "value": "cut off"}, *turns], **arguments)
    assert led.input_ids.tolist() == encode(turns, **arguments).input_ids.tolist()


def test_a_prompt_ends_by_a_question():
    with pytest.raises(ValueError, match="expected a question"):
        encode_prompt(
            turns_of(["what?", "blue"]), template=get_template("v1"), tokenizer=llama_tokenizer()
        )


def test_plain_refuses_dialogues():
    with pytest.raises(ValueError, match="single caption"):
        encode(
            turns_of(["a", "b", "c", "d"]),
            template=get_template("plain"),
            tokenizer=llama_tokenizer(),
        )


def test_context_is_the_questions_alone():
    turns = turns_of(
        ["<image>\nwhat color?", "blue", " is it <image> red? \n", "no", "<image>", "x"]
    )
    assert context_text(turns) == "what color? is it  red?"
    assert context_text(turns_of(["what?"])) == "what?"


def test_stop_tokens():
    smol = byte_level_tokenizer()
    end, newline = smol.convert_tokens_to_ids("<|im_end|>"), smol("\n")["input_ids"][0]
    assert get_template("chatml").stop_token_ids(smol) == [end]
    assert get_template("qa").stop_token_ids(smol) == [end]
    assert get_template("plain").stop_token_ids(smol) == [newline, end]
    phi = phi3_tokenizer()
    expected = [phi.convert_tokens_to_ids("<|end|>"), phi.eos_token_id]
    assert get_template("phi3-chat").stop_token_ids(phi) == expected


def test_a_template_that_does_not_fit_the_tokenizer():
    with pytest.raises(ValueError, match="no single token"):
        get_template("chatml").stop_token_ids(llama_tokenizer())
    with pytest.raises(ValueError, match="has none"):
        get_template("qa").stop_token_ids(bert_tokenizer())


def test_templates_by_name():
    assert get_template("phi3-chat").name == "phi3-chat"
    own = Template(name="own", terminator="</s>")
    assert get_template(own) is own
    with pytest.raises(ValueError, match="did you mean 'chatml'"):
        get_template("chat-ml")
    with pytest.raises(ValueError, match="takes no argument 'sistem'"):
        get_template({"type": "chatml", "sistem": ""})


def test_phi3_chat_without_what_internvl2_added():
    template = get_template({"type": "phi3-chat", "system": "", "image_marks": False})
    tokenizer = phi3_tokenizer()
    turns = [{"from": "human", "value": "<image>\nred?"}, {"from": "gpt", "value": "no"}]
    encoded = encode(turns, template=template, tokenizer=tokenizer, num_image_tokens=[1])
    ids = encoded.input_ids.tolist()
    text = tokenizer.decode([i for i in ids if i != IMAGE_TOKEN_ID])
    assert "<img>" not in text and "<|system|>" not in text
    assert text.replace(" ", "").endswith("red?<|end|><|assistant|>no<|end|>")
    assert template.added_tokens == ()
