"""A run as a model of lmms-eval: ``lmms-eval --model covft --model_args run=FOLDER --tasks ...``.

lmms-eval 0.7.3 finds :func:`manifest` by the entry point ``covft`` of its group
``lmms_eval.models``; nothing in covft imports this module. Prompts, limits and scores are then
lmms-eval's, not the paper's: docs/evaluation.md says where they differ.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL import Image

from covft.checkpoints.run import Run, load_run
from covft.conversation import IMAGE_TOKEN
from covft.datasets.prompts import Prompt, generate_answers
from covft.engine.evaluation import cast_weights, check_precision
from covft.engine.subject import config_and_checkpoint
from covft.evaluation.progress import InferenceProgress
from covft.images import load_image
from covft.models.vision.feature_cache import FeatureCache
from covft.registry import nearest

try:
    from lmms_eval.api.model import lmms
    from lmms_eval.models.registry_v2 import ModelManifest
except ImportError as error:
    raise ImportError(
        "covft.interop.lmms_eval is a plugin of lmms-eval 0.7.3, which isn't installed: "
        f"pip install lmms-eval==0.7.3 ({error})"
    ) from error

_ARGUMENTS = ("run", "config", "checkpoint", "precision", "batch_size", "device")
#: Of a task that sets no limit, as lmms-eval's LLaVA has it.
_MAX_NEW_TOKENS = 1024
#: Options that greedy generation has no use for, and how LLaVA's images become squares: a run's do
#: as in its training.
_WITHOUT_EFFECT = ("top_p", "top_k", "seed", "image_aspect_ratio")


@dataclass(frozen=True)
class _Generation:
    max_new_tokens: int
    until: tuple[str, ...]


def manifest() -> Any:
    """Return what lmms-eval registers: the model's name and its class."""
    return ModelManifest(model_id="covft", simple_class_path=f"{__name__}.{LMMSEvalModel.__name__}")


class LMMSEvalModel(lmms):
    """Answers the questions of lmms-eval's tasks, greedily; arguments are ``--model_args``.

    Context-aware methods read the question, all of it: lmms-eval has no other text. Several
    processes (``accelerate launch -m lmms_eval``) share a task's questions, a GPU each.

    Args:
        run: The folder of a finished run.
        config: Instead of a run, a config's name or file.
        checkpoint: The weights that go with ``config``, see
            :func:`covft.engine.subject.config_and_checkpoint`.
        precision: Of the weights, fp32, bf16 or fp16; None leaves them as they were loaded.
        batch_size: Questions answered at a time (``--batch_size``).
        device: Where the model is put (``--device``); default: a GPU if there is one.
        unknown: None are known.

    Raises:
        FileNotFoundError: If there is no such run, config or checkpoint.
        ValueError: If an argument is unknown, missing or has no such value.
    """

    def __init__(
        self,
        *,
        run: object = None,
        config: object = None,
        checkpoint: object = None,
        precision: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        **unknown: object,
    ) -> None:
        super().__init__()
        for name in unknown:
            raise ValueError(f"covft has no --model_args '{name}'; {nearest(name, _ARGUMENTS)}")
        self.batch_size = _checked_batch_size(batch_size)
        if precision is not None:
            check_precision(precision, where="--model_args precision")
        loaded = _loaded(run, config, checkpoint, device=_own_device(device))
        if precision is not None:
            cast_weights(loaded.model, precision)
        # As attributes of their own: lmms-eval frees modules among them when all is answered.
        self._model, self._spec, self._resize = loaded.model, loaded.spec, loaded.resize
        self.device = loaded.model.device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer questions about images.

        Args:
            requests: lmms-eval's instances, whose ``args`` are question, generation options, the
                function that returns a record's images, and the record's number, task and split.

        Raises:
            ValueError: If a task wants options that greedy generation hasn't, or gives something
                else than images.
        """
        wanted = [_generation(request.args[1], task=request.args[4]) for request in requests]
        cache, answers = FeatureCache(), list[str]()
        with InferenceProgress("lmms-eval", total=len(requests), shown=self.rank == 0) as progress:
            for generation, group in groupby(zip(wanted, requests, strict=True), itemgetter(0)):
                asked = [request for _, request in group]
                for start in range(0, len(asked), self.batch_size):
                    prompts = [self._prompt(r.args) for r in asked[start:][: self.batch_size]]
                    answers += self._answers(prompts, generation, cache)
                    progress.advance(len(prompts))
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        """Refuse: answers are generated.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "covft answers by generation; tasks of output_type loglikelihood or multiple_choice "
            "need a model that scores given answers. Choose tasks of output_type generate_until"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        """Refuse: a question is answered once.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "covft answers each question once; choose tasks of output_type generate_until"
        )

    def _prompt(self, arguments: Sequence[Any]) -> Prompt:
        question, _, images_of, number, task, split = arguments
        name = f"{task}/{number}"
        record = self.task_dict[task][split][number]
        images = [_image(one, name) for one in _flat(images_of(record))]
        tags = "" if IMAGE_TOKEN in question else f"{IMAGE_TOKEN}\n" * len(images)
        return Prompt(name, [{"from": "human", "value": tags + question}], images)

    def _answers(
        self, prompts: Sequence[Prompt], generation: _Generation, cache: FeatureCache
    ) -> list[str]:
        answers = generate_answers(
            self._model,
            prompts,
            self._spec,
            max_new_tokens=generation.max_new_tokens,
            resize=self._resize,
            feature_cache=cache,
        )
        return [_cut(answer, generation.until) for answer in answers]


def _loaded(run: object, config: object, checkpoint: object, *, device: str | None) -> Run:
    # lmms-eval reads numbers where it can: a folder may be called 7.
    if run is not None and config is None and checkpoint is None:
        return load_run(str(run), device=device)
    if run is None and config is not None and checkpoint is not None:
        return config_and_checkpoint(str(config), str(checkpoint), device=device).run
    given = dict(run=run, config=config, checkpoint=checkpoint)
    found = ", ".join(name for name, value in given.items() if value is not None) or "none of them"
    raise ValueError(
        f"--model_args wants run=FOLDER, or config=NAME,checkpoint=PATH, found {found}"
    )


def _own_device(device: str | None) -> str | None:
    """Return the GPU of this process where there are several of both."""
    if device in (None, "cuda") and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return device


def _checked_batch_size(value: int | str) -> int:
    if str(value).isdecimal() and int(value) > 0:
        return int(value)
    raise ValueError(f"--batch_size must be a positive whole number for covft, got '{value}'")


def _generation(options: Mapping[str, Any], *, task: str) -> _Generation:
    """Return what a task's ``generation_kwargs`` ask for.

    Raises:
        ValueError: If that is no greedy generation, or an option is unknown.
    """
    rest = {key: value for key, value in options.items() if key not in _WITHOUT_EFFECT}
    temperature = rest.pop("temperature", None)
    draws = rest.pop("do_sample", bool(temperature))
    refused = {"do_sample": True} if draws and temperature != 0 else {}
    for key in ("num_beams", "repetition_penalty"):
        if (value := rest.pop(key, None)) not in (None, 1):
            refused[key] = value
    until = rest.pop("until", None) or []
    stops = [until] if isinstance(until, str) else until
    limit = rest.pop("max_new_tokens", None)
    refused |= rest
    if refused:
        shown = ", ".join(f"{key}={value}" for key, value in refused.items())
        raise ValueError(
            f"task '{task}' asks for {shown}, but covft answers greedily, with max_new_tokens and "
            "until; change it, such as --gen_kwargs do_sample=false,temperature=0,num_beams=1, or "
            "leave the task out"
        )
    return _Generation(
        _MAX_NEW_TOKENS if limit is None else int(limit), tuple(stop for stop in stops if stop)
    )


def _flat(images: Any) -> list[Any]:
    """Return what a record shows as a list; tasks give one, a list, or a list in a list."""
    if images is None:
        return []
    if not isinstance(images, (list, tuple)):
        return [images]
    return [inner for one in images for inner in _flat(one)]


def _image(image: object, name: str) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if not isinstance(image, (str, Path)):
        raise ValueError(f"{name}: covft sees images only, found {type(image).__name__}")
    try:
        return load_image(image)
    except ValueError as error:
        raise ValueError(f"{name}: covft sees images only: {error}") from error


def _cut(answer: str, until: Sequence[str]) -> str:
    ends = [answer.find(stop) for stop in until if stop in answer]
    return answer[: min(ends, default=len(answer))].rstrip()
