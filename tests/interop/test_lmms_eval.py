"""covft as a model of lmms-eval: the real one where it is installed, else a stand-in of 0.7.3's."""

import importlib
import subprocess
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image
from quickstart_miniature import tiny_quickstart, write_easy_vqa
from untrained_run import untrained_run

from covft.datasets.prompts import Prompt, generate_answers
from covft.models import MLLM

ROOT = Path(__file__).parents[2]
MODULE = "covft.interop.lmms_eval"
GREEDY = {"max_new_tokens": 6, "until": ["\n\n"], "do_sample": False}


class StandInLMMS(ABC):
    """What lmms-eval's models inherit, and how its command line makes them."""

    is_simple = True

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}

    @classmethod
    def create_from_arg_string(cls, text, additional_config):
        pairs = dict(part.split("=", 1) for part in text.split(",") if part)
        typed = {key: int(v) if v.isnumeric() else v for key, v in pairs.items()}
        return cls(**typed, **{k: v for k, v in additional_config.items() if v is not None})

    @property
    def rank(self):
        return self._rank

    @abstractmethod
    def loglikelihood(self, requests): ...

    @abstractmethod
    def generate_until(self, requests): ...

    @abstractmethod
    def generate_until_multi_round(self, requests): ...

    def clean(self):
        for name in [name for name, v in vars(self).items() if isinstance(v, torch.nn.Module)]:
            delattr(self, name)


@dataclass(frozen=True)
class StandInManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class StandInRegistry:
    """Loads manifests from entry points, and the classes that they name."""

    def load_entrypoint_manifests(self):
        found = (entry.load()() for entry in entry_points(group="lmms_eval.models"))
        self.manifests = {manifest.model_id: manifest for manifest in found}

    def get_model_class(self, name):
        module, _, class_name = self.manifests[name].simple_class_path.rpartition(".")
        kind = getattr(importlib.import_module(module), class_name)
        assert issubclass(kind, sys.modules["lmms_eval.api.model"].lmms) and kind.is_simple
        return kind


@pytest.fixture
def registry(monkeypatch):
    """Return lmms-eval's registry of models."""
    if find_spec("lmms_eval") is None:
        members = {"api.model": dict(lmms=StandInLMMS)}
        members["models.registry_v2"] = dict(
            ModelManifest=StandInManifest, ModelRegistryV2=StandInRegistry
        )
        for name in ("lmms_eval", *(f"lmms_eval.{part}" for part in ("api", "models", *members))):
            module = ModuleType(name)
            vars(module).update(members.get(name.removeprefix("lmms_eval."), {}))
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield importlib.import_module("lmms_eval.models.registry_v2").ModelRegistryV2()
    sys.modules.pop(MODULE, None)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer_folders):
    root = tmp_path_factory.mktemp("lmms_eval")
    options = tiny_quickstart(tokenizer_folders, write_easy_vqa(root / "easy_vqa"))
    return untrained_run(root / "run", options)


@pytest.fixture
def kind(registry):
    return importlib.import_module(MODULE).LMMSEvalModel


@pytest.fixture
def model(kind, run):
    """Return a model with large random weights, whose answers differ from question to question."""
    made = kind.create_from_arg_string(f"run={run}", {"batch_size": "2", "device": "cpu"})
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in made._model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return made


def requests(model, rows, task="vqa", **generation):
    """Return a task's requests: (question, images) each, put where lmms-eval keeps records."""
    model.task_dict[task] = {"test": [{"shown": images} for _, images in rows]}
    options = {**GREEDY, **generation}
    return [
        SimpleNamespace(args=(question, dict(options), shown, number, task, "test"))
        for number, (question, _) in enumerate(rows)
    ]


def shown(record):
    return record["shown"]


def picture(seed, mode="RGB"):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (20, 30, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).convert(mode)


def test_lmms_eval_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval.api.model", None)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    with pytest.raises(ImportError, match="pip install lmms-eval"):
        importlib.import_module(MODULE)


def test_it_is_found_by_its_entry_point(registry, tmp_path, monkeypatch):
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    monkeypatch.syspath_prepend(tmp_path)
    registry.load_entrypoint_manifests()
    assert registry.get_model_class("covft") is importlib.import_module(MODULE).LMMSEvalModel


def test_answers_are_those_of_the_model(model, tmp_path):
    picture(3).save(tmp_path / "three.png")
    rows = [
        ("what is it?", [picture(1)]),
        ("what color is the left one?", [[picture(2, "RGBA"), picture(1, "P")]]),
        ("two and two?", []),
        ("is it red? and why?", str(tmp_path / "three.png")),
        ("before <image> and after <image>?", (picture(1), picture(2, "L"))),
    ]
    images = [
        [picture(1)],
        [picture(2), picture(1, "P").convert("RGB")],
        [],
        [picture(3)],
        [picture(1), picture(2, "L").convert("RGB")],
    ]
    found = model.generate_until(requests(model, rows))
    for (question, _), pictures, answer in zip(rows, images, found, strict=True):
        tags = "" if "<image>" in question else "<image>\n" * len(pictures)
        prompt = Prompt("one", [{"from": "human", "value": tags + question}], pictures)
        alone = generate_answers(model._model, [prompt], model._spec, max_new_tokens=6)
        assert alone == [answer]
    assert len(set(found)) == 5


def test_precision(kind, run):
    options = {"batch_size": "2", "device": "cpu"}
    made = kind.create_from_arg_string(f"run={run},precision=bf16", options)
    assert {p.dtype for p in made._model.parameters()} == {torch.bfloat16}
    (answer,) = made.generate_until(requests(made, [("what is it?", [picture(1)])]))
    assert isinstance(answer, str)
    with pytest.raises(ValueError, match=r"--model_args precision 'half' is unknown"):
        kind.create_from_arg_string(f"run={run},precision=half", options)


def test_the_question_is_the_context(model, monkeypatch):
    read = []
    generate = MLLM.generate

    def watched(self, **batch):
        read.extend(model._spec.context_tokenizer.batch_decode(batch["context_ids"]))
        return generate(self, **batch)

    monkeypatch.setattr(MLLM, "generate", watched)
    model.generate_until(requests(model, [("is it red?\nyes or no.", [picture(1)])]))
    expected = model._spec.context_tokenizer("is it red?\nyes or no.").input_ids
    assert read == [model._spec.context_tokenizer.decode(expected)]


def test_tasks_keep_their_limits_and_their_order(model):
    long = requests(model, [("what is it?", [picture(n)]) for n in range(3)], "long")
    short = requests(
        model, [("what is it?", [picture(n)]) for n in range(3)], "short", max_new_tokens=1
    )
    mixed = [long[0], short[0], short[1], long[1], long[2], short[2]]
    found = model.generate_until(mixed)
    assert [found[0], found[3], found[4]] == model.generate_until(long)
    assert [found[1], found[2], found[5]] == model.generate_until(short)
    assert len(found[0]) > len(found[1])


def test_an_answer_ends_where_the_task_says(model):
    ask = [("what is it?", [picture(1)])]
    (whole,) = model.generate_until(requests(model, ask, max_new_tokens=12))
    middle = whole[len(whole) // 2]
    stop = {"until": ["never said", "", middle], "max_new_tokens": 12}
    assert model.generate_until(requests(model, ask, **stop)) == [whole.split(middle)[0].rstrip()]
    stop["until"] = middle
    assert model.generate_until(requests(model, ask, **stop)) == [whole.split(middle)[0].rstrip()]
    assert model.generate_until(requests(model, ask, max_new_tokens=12, until=None)) == [whole]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0, "top_p": 1.0, "num_beams": 1},
        {"temperature": 0.0, "do_sample": True},
        {"temperature": 0.2, "do_sample": False},
        {"image_aspect_ratio": "original", "num_beams": None, "repetition_penalty": 1.0},
    ],
)
def test_greedy_options_are_taken(model, options):
    ask = [("what is it?", [picture(1)])]
    expected = model.generate_until(requests(model, ask))
    assert model.generate_until(requests(model, ask, **options)) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": True}, "task 'late' asks for do_sample=True"),
        ({"do_sample": True, "temperature": 0.7}, "do_sample=True"),
        ({"num_beams": 5}, "num_beams=5"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
        ({"visual_cot": True}, "visual_cot=True"),
    ],
)
def test_other_options_are_refused_before_anything_is_asked(model, monkeypatch, options, message):
    early = requests(model, [("what is it?", [picture(1)])], "early")
    late = requests(model, [("what is it?", [picture(1)])], "late", **options)
    monkeypatch.setattr(MLLM, "generate", None)
    with pytest.raises(ValueError, match=message):
        model.generate_until([*early, *late])


def test_a_temperature_alone_means_sampling(model):
    (request,) = requests(model, [("what is it?", [picture(1)])], temperature=0.2)
    del request.args[1]["do_sample"]
    with pytest.raises(ValueError, match="do_sample=True"):
        model.generate_until([request])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("film.mp4", "vqa/1: covft sees images only: image not found: film.mp4"),
        ({"array": [0.0], "sampling_rate": 16000}, "vqa/1: covft sees images only, found dict"),
    ],
)
def test_what_is_no_image_is_named(model, given, message):
    rows = [("what is it?", [picture(1)]), ("what is it?", [given])]
    with pytest.raises(ValueError, match=message):
        model.generate_until(requests(model, rows))


def test_only_generation_is_offered(model):
    with pytest.raises(NotImplementedError, match="output_type generate_until"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="output_type generate_until"):
        model.generate_until_multi_round([])


def test_its_memory_is_freed_when_lmms_eval_wants_it(model):
    held = next(iter(model._model.parameters()))
    model.clean()
    assert not hasattr(model, "_model") and model.device == held.device


def test_a_config_with_a_checkpoint(kind, run, tmp_path, monkeypatch):
    (tmp_path / "7").symlink_to(run)
    monkeypatch.chdir(tmp_path)  # where there is a folder that lmms-eval reads as a number
    arguments = f"config={run / 'config.py'},checkpoint=7"
    made = kind.create_from_arg_string(arguments, {"batch_size": 1, "device": "cpu"})
    expected = kind(run=run, device="cpu")._model.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in made._model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "run=FOLDER, or config=NAME,checkpoint=PATH, found none of them"),
        ({"run": "a", "config": "b"}, "found run, config"),
        ({"config": "b"}, "found config"),
        ({"run": "a", "checkpoint_path": "b"}, "'checkpoint_path'; did you mean 'checkpoint'"),
        ({"run": "a", "batch_size": "auto"}, "positive whole number for covft, got 'auto'"),
        ({"run": "a", "batch_size": 0}, "positive whole number"),
    ],
)
def test_wrong_arguments(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)
