"""The models of the LAVIS spelling, with LAVIS's calls, defaults and results (salesforce-lavis 1.0.2).

Prompts stand behind the picture without ids of their own: penalties see only what was generated, lengths count only
that, and only that is returned. Where LAVIS cuts a text that is longer than the model's max_txt_len, so is it cut here,
with a warning; set model.max_txt_len to have more. Texts and pictures are torch tensors or NumPy arrays, and so is what
comes back.
"""

from __future__ import annotations

import string
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from blip2c._core import UnsupportedError
from blip2c.inputs import check_pixels, pack_texts
from blip2c.outputs import Like, ModelOutput

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "Blip2ITM", "Blip2OPT", "Blip2Qformer", "Blip2T5", "Blip2T5Instruct", "Blip2VicunaInstruct", "LavisModel",
]  # fmt: skip

_CANDIDATES = 128
_TOP_P = 0.9


class LavisModel:
    """What LAVIS's models have in common. `friendly` is what blip2c.load() gives, `model` its transformers-like part.

    prompt: what generate() begins with where samples have no prompt. max_txt_len: at how many tokens LAVIS cuts texts,
    None where it does not.
    """

    reads: ClassVar[str] = ""
    max_txt_len: int | None = 32

    def __init__(self, friendly: Any, prompt: str = "") -> None:
        self.friendly, self.model, self.prompt = friendly, friendly.model, prompt

    @property
    def image_size(self) -> int:
        """Side of the pictures that the model takes."""
        return int(self.model._core_config["vision"]["image_size"])

    @property
    def device(self) -> Any:
        """Where it is computed."""
        return self.model.device

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As torch's; see Blip2ForConditionalGeneration.to()."""
        self.model.to(*args, **kwargs)
        return self

    def eval(self) -> Self:
        """It always is."""
        return self

    def train(self, mode: bool = True) -> Self:
        """train(False) is eval(); True raises UnsupportedError."""
        self.model.train(mode)
        return self

    def float(self) -> Self:
        """to(float32)."""
        self.model.float()
        return self

    def half(self) -> Self:
        """to(float16)."""
        self.model.half()
        return self

    def __call__(self, samples: Mapping[str, Any], **options: Any) -> Any:
        """forward()."""
        return self.forward(samples, **options)

    def forward(self, samples: Mapping[str, Any]) -> Any:
        """Raises UnsupportedError: LAVIS's losses for training are not computed."""
        raise UnsupportedError(f"{type(self).__name__}.forward: losses for training are not computed")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model!r})"

    # -- inside ------------------------------------------------------------------------------------------------------

    def _pixels(self, samples: Mapping[str, Any]) -> NDArray[np.float32]:
        pixels: NDArray[np.float32] = check_pixels(_entry(samples, "image"), self.image_size)
        return pixels

    def _cut(self, ids: list[int], text: str) -> list[int]:
        """At most max_txt_len of a text's ids."""
        limit = self.max_txt_len
        if limit is None or len(ids) <= limit:
            return ids
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 2:
            raise ValueError(f"max_txt_len must be an integer of at least 2, or None, found {limit!r}")
        shown = text if len(text) <= 40 else f"{text[:37]}..."
        warnings.warn(
            f"text {shown!r} is {len(ids)} tokens long and is cut to {limit}, as LAVIS does: set max_txt_len",
            stacklevel=4,
        )
        return self._beginning(ids, limit)

    def _beginning(self, ids: list[int], limit: int) -> list[int]:
        """A Q-Former's text keeps its [SEP]."""
        return ids[: limit - 1] + ids[-1:]


class _Generator(LavisModel):
    """generate() and predict_answers()."""

    _strips: ClassVar[bool] = True
    _answer_penalty: ClassVar[float] = 0.0

    def generate(
        self,
        samples: Mapping[str, Any],
        use_nucleus_sampling: bool = False,
        num_beams: int = 5,
        max_length: int = 30,
        min_length: int = 1,
        top_p: float = _TOP_P,
        repetition_penalty: float = 1.0,
        length_penalty: float = 1.0,
        num_captions: int = 1,
        temperature: float = 1,
    ) -> list[str]:
        """Texts [B * num_captions] for samples = {"image": [B, 3, S, S], "prompt": a string, or one each}.

        max_length, min_length: of what is generated. top_p, temperature: with use_nucleus_sampling (beams are then
        drawn, if num_beams is not 1). Raises as Blip2ForConditionalGeneration.generate() does.
        """
        pixels = self._pixels(samples)
        options: dict[str, Any] = {
            "num_beams": num_beams,
            "max_new_tokens": max_length,
            **self._least(min_length),
            "repetition_penalty": repetition_penalty,
            "length_penalty": length_penalty,
            "num_return_sequences": num_captions,
            "do_sample": use_nucleus_sampling,
        }
        if use_nucleus_sampling or top_p != _TOP_P:  # LAVIS's default alone is no reason for a warning
            options["top_p"] = top_p
        if use_nucleus_sampling or temperature != 1:
            options["temperature"] = float(temperature)
        return self._generate(pixels, self._prompts(samples, len(pixels)), options)

    def predict_answers(
        self,
        samples: Mapping[str, Any],
        num_beams: int = 5,
        inference_method: str = "generate",
        max_len: int = 10,
        min_len: int = 1,
        num_ans_candidates: int = _CANDIDATES,
        answer_list: Any = None,
        prompt: str = "",
        length_penalty: float | None = None,
    ) -> list[str]:
        """Answers [B] for samples = {"image": [B, 3, S, S], "text_input": a question, or one each}.

        prompt: how a question is put, with {} for it. length_penalty: None is the model's default, 0 over OPT and
        Vicuna, -1 over T5. inference_method "generate" is the only one; num_ans_candidates and answer_list, which
        belong to ranking, raise UnsupportedError for anything but their defaults, and so does
        samples["apply_lemmatizer"].
        """
        if inference_method != "generate" or answer_list is not None or num_ans_candidates != _CANDIDATES:
            raise UnsupportedError(
                f"predict_answers: answers are generated, not ranked (inference_method={inference_method!r},"
                f" num_ans_candidates={num_ans_candidates!r}, answer_list={'None' if answer_list is None else '...'})"
            )
        if samples.get("apply_lemmatizer"):
            raise UnsupportedError("predict_answers: apply_lemmatizer is not computed")
        asked = {**samples, "prompt": self._questions(samples, prompt)}
        penalty = self._answer_penalty if length_penalty is None else length_penalty
        return self.generate(asked, num_beams=num_beams, max_length=max_len, min_length=min_len, length_penalty=penalty)

    def predict_class(self, *_: Any, **__: Any) -> Any:
        """Raises UnsupportedError: candidates are not ranked."""
        raise UnsupportedError("predict_class: ranking of candidates is not computed; ask with generate()")

    # -- inside ------------------------------------------------------------------------------------------------------

    def _least(self, tokens: int) -> dict[str, int]:
        return {"min_new_tokens": tokens}

    def _prompts(self, samples: Mapping[str, Any], pictures: int) -> list[str]:
        prompt = samples.get("prompt", self.prompt)
        prompts = [prompt] * pictures if isinstance(prompt, str) else list(prompt)
        if len(prompts) != pictures:
            raise ValueError(f"prompt: {len(prompts)} for {pictures} pictures; pass one, or one each")
        for text in prompts:
            if not isinstance(text, str):
                raise TypeError(f"a prompt must be a string, found {type(text).__name__}")
        return prompts

    def _questions(self, samples: Mapping[str, Any], prompt: str) -> list[str]:
        return [_put(prompt, question) if prompt else question for question in _texts(samples)]

    def _ids(self, prompt: str) -> list[int]:
        return self._cut(list(self.friendly.processor.tokenizer(prompt)["input_ids"]), prompt)

    def _generate(self, pixels: NDArray[np.float32], prompts: list[str], options: dict[str, Any]) -> list[str]:
        model, rows = self.model, [self._ids(prompt) for prompt in prompts]
        queries = int(model._core_config["num_query_tokens"])
        image = [] if model._image_token is None else [model._image_token] * queries
        longest = max(map(len, rows))
        if not min(map(len, rows)):
            raise ValueError("a prompt is empty, and the tokenizer puts nothing in front of it")
        # An encoder counts distances over pads, so there they stand behind the prompt.
        behind = model.config.is_encoder_decoder
        ids = np.array([[*image, *_padded(row, longest, behind)] for row in rows], np.int32)
        seen = [[1] * len(image) + _padded([1] * len(row), longest, behind) for row in rows]
        mask = np.array(seen, np.uint8)
        embeds = model._core.embed(ids.reshape(-1)).reshape(*ids.shape, -1)
        beside = self._beside(prompts)
        out = model.generate(pixels, inputs_embeds=embeds, attention_mask=mask, **beside, **options)
        texts = self.friendly.processor.tokenizer.batch_decode(out, skip_special_tokens=True)
        return [text.strip() if self._strips else text for text in texts]

    def _beside(self, prompts: list[str]) -> dict[str, Any]:
        """What the Q-Former reads."""
        return {}


class Blip2OPT(_Generator):
    """BLIP-2 over OPT ("blip2_opt"): generate(), predict_answers()."""

    reads = "BLIP-2 over opt"

    def _beginning(self, ids: list[int], limit: int) -> list[int]:
        return ids[:limit]  # nothing stands behind a prompt


class Blip2T5(_Generator):
    """BLIP-2 over Flan-T5 ("blip2_t5"): generate(), predict_answers()."""

    reads = "BLIP-2 over t5"
    max_txt_len: int | None = None
    _strips = False
    _answer_penalty = -1.0

    def _least(self, tokens: int) -> dict[str, int]:
        return {"min_length": tokens}  # counts the decoder's first token


class Blip2Instruct(_Generator):
    """What InstructBLIPs have in common: other defaults, and the Q-Former reads the prompt (max_txt_len is for it)."""

    max_txt_len: int | None = 128

    def generate(
        self,
        samples: Mapping[str, Any],
        use_nucleus_sampling: bool = False,
        num_beams: int = 5,
        max_length: int = 256,
        min_length: int = 1,
        top_p: float = _TOP_P,
        repetition_penalty: float = 1.5,
        length_penalty: float = 1.0,
        num_captions: int = 1,
        temperature: float = 1,
    ) -> list[str]:
        """As Blip2OPT.generate(). samples may hold "ocr_tokens", words for the {} of each prompt."""
        return super().generate(
            samples, use_nucleus_sampling, num_beams, max_length, min_length, top_p, repetition_penalty,
            length_penalty, num_captions, temperature,
        )  # fmt: skip

    def _prompts(self, samples: Mapping[str, Any], pictures: int) -> list[str]:
        prompts = super()._prompts(samples, pictures)
        if "ocr_tokens" in samples and "{}" in prompts[0]:
            return [_put(p, _words(seen)) for p, seen in zip(prompts, samples["ocr_tokens"], strict=True)]
        return prompts

    def _questions(self, samples: Mapping[str, Any], prompt: str) -> list[str]:
        """A prompt with two {} takes what was read in the picture and the question, or the question and choices."""
        questions = _texts(samples)
        if prompt.count("{}") != 2:
            return super()._questions(samples, prompt)
        if "ocr_tokens" in samples:
            return [_put(prompt, _words(o), q) for q, o in zip(questions, samples["ocr_tokens"], strict=True)]
        if "choices" in samples:
            return [_put(prompt, q, _choices(c)) for q, c in zip(questions, samples["choices"], strict=True)]
        raise ValueError("prompt has two {}: samples must hold ocr_tokens or choices")

    def _ids(self, prompt: str) -> list[int]:
        return list(self.friendly.processor.tokenizer(prompt)["input_ids"])

    def _beside(self, prompts: list[str]) -> dict[str, Any]:
        tokenizer = self.friendly.processor.qformer_tokenizer
        rows = [self._cut(list(tokenizer(prompt)["input_ids"]), prompt) for prompt in prompts]
        longest = max(map(len, rows))
        ids = np.array([_padded(row, longest) for row in rows], np.int64)
        mask = np.array([_padded([1] * len(row), longest) for row in rows], np.uint8)
        return {"qformer_input_ids": ids, "qformer_attention_mask": mask}

    def _beginning(self, ids: list[int], limit: int) -> list[int]:
        return ids[:1] + ids[len(ids) - limit + 1 :]  # [CLS] and the end, where the question stands


class Blip2T5Instruct(Blip2Instruct):
    """InstructBLIP over Flan-T5 ("blip2_t5_instruct")."""

    reads = "InstructBLIP over t5"
    _strips = False
    _answer_penalty = -1.0

    def _least(self, tokens: int) -> dict[str, int]:
        return {"min_length": tokens}  # counts the decoder's first token


class Blip2VicunaInstruct(Blip2Instruct):
    """InstructBLIP over Vicuna ("blip2_vicuna_instruct")."""

    reads = "InstructBLIP over llama"


class Blip2Qformer(LavisModel):
    """The first stage ("blip2", "blip2_feature_extractor"): extract_features()."""

    reads = "a retrieval checkpoint"

    def extract_features(self, samples: Mapping[str, Any], mode: str = "multimodal") -> ModelOutput:
        """Features of samples = {"image": [B, 3, S, S], "text_input": a text, or one each}, by `mode`:

        "image": image_embeds [B, Q, D_q] and image_embeds_proj [B, Q, P]; "text": text_embeds [B, T, D_q] and
        text_embeds_proj [B, T, P], rows padded to the longest, the first token standing for the text; "multimodal":
        multimodal_embeds [B, Q, D_q], the queries having read the text, too. Projections are of length 1.
        """
        if mode not in ("image", "text", "multimodal"):
            raise ValueError(f'mode must be "image", "text" or "multimodal", found {mode!r}')
        names = ("image_embeds", "image_embeds_proj", "text_embeds", "text_embeds_proj", "multimodal_embeds")
        found: dict[str, NDArray[np.float32]] = {}
        like = Like.loaded("float32") if mode == "text" else Like(samples.get("image"), "float32")
        core = self.model._core
        if mode == "image":
            stages = core.encode_stages(self._pixels(samples))
            found = {"image_embeds": stages["qformer"], "image_embeds_proj": stages["embeds"]}
        elif mode == "text":
            rows = self._padded(_texts(samples))
            read, shape = core.read_texts(rows), (len(rows[1]) - 1, -1)
            found = {"text_embeds": read["text"], "text_embeds_proj": read["embeds"]}
            found = {name: array.reshape(*shape, array.shape[-1]) for name, array in found.items()}
        else:
            pixels, texts = self._pixels(samples), _texts(samples)
            _check_pairs(len(texts), len(pixels))
            found = {"multimodal_embeds": core.encode_stages(pixels, text=self._padded(texts))["qformer"]}
        return ModelOutput(**{name: like.floats(found[name]) if name in found else None for name in names})

    def generate(self, *_: Any, **__: Any) -> Any:
        """Raises UnsupportedError: checkpoints on the Hub lack the head that the Q-Former writes with."""
        raise UnsupportedError(
            "generate: the Hub's checkpoints of the first stage hold no language head of the Q-Former; use blip2_opt"
            " or blip2_t5"
        )

    # -- inside ------------------------------------------------------------------------------------------------------

    def _padded(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.uint8]]:
        """Rows of one length, pads at the right, as the C part takes them."""
        rows = [self.friendly.token_ids(text) for text in texts]
        longest = max(map(len, rows))
        pad = int(self.friendly.processor.tokenizer.pad_token_id or 0)
        ids = np.array([_padded(row, longest, pad=pad) for row in rows], np.int32)
        mask = np.arange(longest) < np.array([[len(row)] for row in rows])
        offsets = np.arange(len(rows) + 1, dtype=np.int64) * longest
        return ids.reshape(-1), offsets, np.ascontiguousarray(mask.reshape(-1), np.uint8)


class Blip2ITM(Blip2Qformer):
    """Whether pictures and texts belong together ("blip2_image_text_matching"): forward(), extract_features()."""

    def forward(self, samples: Mapping[str, Any], match_head: str = "itm") -> Any:
        """Of samples = {"image": [B, 3, S, S], "text_input": one each}: with "itm" logits [B, 2] of no and yes, whose
        softmax is a probability; with "itc" cosines [B, 1] of each text with the query that is nearest to it.

        One text for several pictures, or several texts for one picture, are taken too (rows as many as the more).
        """
        if match_head not in ("itm", "itc"):
            raise ValueError(f'match_head must be "itm" or "itc", found {match_head!r}')
        pixels, texts = self._pixels(samples), _texts(samples)
        rows = [self.friendly.checked_ids(t, self._cut(self.friendly.all_ids(t), t)) for t in texts]
        pairs = max(len(pixels), len(rows))
        rows = rows * pairs if len(rows) == 1 else rows
        if len(pixels) != 1:
            _check_pairs(len(rows), len(pixels))
        picture_of = np.zeros(pairs, np.int32) if len(pixels) == 1 else np.arange(pairs, dtype=np.int32)
        core, packed = self.model._core, pack_texts(rows)
        stages = core.encode_stages(pixels)
        if match_head == "itm":
            found = core.match(stages["vision"], packed, picture_of)
        else:
            words = np.ascontiguousarray(core.read_texts(packed)["embeds"][packed[1][:-1]])
            found = core.similarity(stages["embeds"], words)[picture_of, np.arange(pairs)][:, None]
        return Like(samples["image"], "float32").floats(np.ascontiguousarray(found))


def _entry(samples: Mapping[str, Any], name: str) -> Any:
    if not isinstance(samples, Mapping):
        raise TypeError(f"samples must be a dictionary, found {type(samples).__name__}")
    if samples.get(name) is None:
        raise ValueError(f"samples has no {name!r}, only {', '.join(map(repr, samples)) or 'nothing'}")
    return samples[name]


def _texts(samples: Mapping[str, Any]) -> list[str]:
    given = _entry(samples, "text_input")
    texts = [given] if isinstance(given, str) else list(given)
    if not texts:
        raise ValueError("text_input is empty")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"a text must be a string, found {type(text).__name__}")
    return texts


def _check_pairs(texts: int, pictures: int) -> None:
    if texts != pictures:
        raise ValueError(f"text_input: {texts} texts for {pictures} pictures: expected one each")


def _padded(row: list[int], length: int, behind: bool = True, pad: int = 0) -> list[int]:
    pads = [pad] * (length - len(row))
    return row + pads if behind else pads + row


def _words(seen: Sequence[str]) -> str:
    return ", ".join(list(seen)[:30])


def _choices(choices: Sequence[str]) -> str:
    letters = string.ascii_lowercase
    if len(choices) > len(letters):
        raise ValueError(f"choices: {len(choices)} of them, there are letters for {len(letters)}")
    return " ".join(f"({letter}) {choice}" for letter, choice in zip(letters, choices, strict=False))


def _put(prompt: str, *values: str) -> str:
    try:
        return prompt.format(*values)
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"prompt {prompt!r} does not take {len(values)} texts: {error!r}") from None
