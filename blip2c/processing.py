"""`Blip2Processor`, `InstructBlipProcessor`: a BlipImageProcessor and tokenizers in one, as transformers 5.23 has them.

    rows of input_ids = [<image>] * num_query_tokens + [pads ...] + [bos, text ...]

The image ids are put in front of the text after it was padded, so with padding on the left the pads stand between.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from tokenizers import AddedToken

from blip2c._core import CheckpointError
from blip2c.batch import BatchFeature
from blip2c.image_processing import DEFAULTS, IGNORED, NEUTRAL, BlipImageProcessor
from blip2c.tokenizer import REFUSED, Blip2Tokenizer

IMAGE_TOKEN = "<image>"

TEXT_OPTIONS = frozenset(
    {"add_special_tokens", "padding", "truncation", "max_length", "pad_to_multiple_of", "padding_side",
     "return_attention_mask", "return_token_type_ids", "return_special_tokens_mask", "return_offsets_mapping",
     "return_length", "verbose"}
) | frozenset(REFUSED)  # fmt: skip
IMAGE_OPTIONS = frozenset(DEFAULTS) | frozenset(NEUTRAL) | (IGNORED - {"return_tensors"})


class Blip2Processor:
    """Pictures and texts to what `Blip2ForConditionalGeneration` takes (upstream: transformers' Blip2Processor).

    num_query_tokens None (checkpoints of before transformers 4.46): no image ids are put into input_ids.
    """

    def __init__(
        self,
        image_processor: BlipImageProcessor,
        tokenizer: Blip2Tokenizer,
        num_query_tokens: int | None = None,
        **_: Any,
    ) -> None:
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        if num_query_tokens is not None and (
            isinstance(num_query_tokens, bool) or not isinstance(num_query_tokens, int)
        ):
            raise CheckpointError(
                f"processor_config.json: num_query_tokens must be an integer, found {num_query_tokens!r}"
            )
        self.num_query_tokens = num_query_tokens
        # transformers adds the token where the vocabulary lacks it, so that its id is the next free one.
        self.image_token = AddedToken(IMAGE_TOKEN, normalized=False, special=True)
        tokenizer.add_tokens([self.image_token], special_tokens=True)

    @property
    def image_token_id(self) -> int:
        """The tokenizer's id of <image>."""
        return int(self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))

    @property
    def model_input_names(self) -> list[str]:
        """What a call may return."""
        return list(dict.fromkeys([*self.tokenizer.model_input_names, *self.image_processor.model_input_names]))

    def __call__(self, images: Any = None, text: Any = None, **options: Any) -> BatchFeature:
        """input_ids and attention_mask [B, T] of texts, pixel_values [B, 3, S, S] of pictures, whichever is given.

        Options of the tokenizer and of the image processor, by name or as text_kwargs= and images_kwargs=;
        return_tensors "np", "pt" or None (lists). max_length counts the image ids.
        """
        if images is None and text is None:
            raise ValueError("images or text must be given")
        return_tensors, text_options, image_options = _split(options)
        data: dict[str, Any] = {}
        if text is not None:
            data.update(self._text(text, images is not None, text_options))
        if images is not None:
            data.update(self.image_processor(images, **image_options).data)
        return BatchFeature(data, tensor_type=return_tensors)

    def _text(self, text: Any, with_images: bool, options: dict[str, Any]) -> dict[str, Any]:
        max_length = options.get("max_length")
        if max_length is not None:
            if self.num_query_tokens is None:
                raise ValueError("max_length needs num_query_tokens in the processor's configuration")
            options = {**options, "max_length": max_length - self.num_query_tokens}
        encoded = self.tokenizer(_texts(text), **options).data
        if not with_images or self.num_query_tokens is None:
            return encoded
        plain = {**options, "add_special_tokens": False, "padding": False, "truncation": False}
        prefix = self.tokenizer(IMAGE_TOKEN * self.num_query_tokens, **plain).data
        return {
            key: [(prefix[key] if isinstance(prefix[key], list) else [prefix[key]]) + row for row in rows]
            if key != "length"
            else rows
            for key, rows in encoded.items()
        }

    def batch_decode(self, *args: Any, **options: Any) -> list[str]:
        """See Blip2Tokenizer.batch_decode."""
        return self.tokenizer.batch_decode(*args, **options)

    def decode(self, *args: Any, **options: Any) -> Any:
        """See Blip2Tokenizer.decode."""
        return self.tokenizer.decode(*args, **options)

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **options: Any
    ) -> list[str]:
        """Texts of generated ids."""
        return self.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **options)

    @classmethod
    def from_pretrained(cls, path_or_id: str | os.PathLike[str], **options: Any) -> Self:
        """From a folder or Hub id. Other options override the image processor's, or the tokenizer's padding_side etc.

        Raises CheckpointError naming the file that is missing or damaged.
        """
        from blip2c.checkpoint import read_object
        from blip2c.hub import pop_hub_options, resolve

        folder = resolve(path_or_id, weights=False, **pop_hub_options(options))
        options.pop("use_fast", None)
        options.pop("trust_remote_code", None)
        file = folder / "processor_config.json"
        config: Mapping[str, Any] = read_object(file) if file.is_file() else {}
        queries = options.pop("num_query_tokens", config.get("num_query_tokens"))
        image_options = {key: options.pop(key) for key in list(options) if key in IMAGE_OPTIONS}
        image_processor = BlipImageProcessor.from_pretrained(folder, **image_options)
        tokenizer = Blip2Tokenizer.from_pretrained(folder, **options)
        return cls(image_processor, tokenizer, num_query_tokens=queries, **cls._further_parts(folder))

    @classmethod
    def _further_parts(cls, folder: Path) -> dict[str, Any]:
        """What else __init__ takes."""
        return {}

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write tokenizer.json, tokenizer_config.json and processor_config.json (with the image processor inside)."""
        folder = Path(directory)
        self.tokenizer.save_pretrained(folder)
        config: dict[str, Any] = {
            "processor_class": type(self).__name__,
            "image_processor": self.image_processor.to_dict(),
        }
        if self.num_query_tokens is not None:
            config["num_query_tokens"] = self.num_query_tokens
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (folder / "processor_config.json").write_text(text, encoding="utf-8")

    def __repr__(self) -> str:
        name = type(self).__name__
        return f"{name}(num_query_tokens={self.num_query_tokens}, {self.image_processor}, {self.tokenizer})"


QFORMER_TOKENIZER = "qformer_tokenizer"


class InstructBlipProcessor(Blip2Processor):
    """As Blip2Processor, with the instruction a second time in the Q-Former's words (upstream: InstructBlipProcessor).

    qformer_tokenizer lies in the folder of that name beside the other files.
    """

    def __init__(
        self,
        image_processor: BlipImageProcessor,
        tokenizer: Blip2Tokenizer,
        qformer_tokenizer: Blip2Tokenizer,
        num_query_tokens: int | None = None,
        **_: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, num_query_tokens)
        self.qformer_tokenizer = qformer_tokenizer

    @property
    def model_input_names(self) -> list[str]:
        """What a call may return."""
        return [*super().model_input_names, "qformer_input_ids", "qformer_attention_mask"]

    def _text(self, text: Any, with_images: bool, options: dict[str, Any]) -> dict[str, Any]:
        """Ids and mask of the texts, and the same by the Q-Former's tokenizer; max_length holds for each."""
        options = {"return_token_type_ids": False, **options}
        words = self.qformer_tokenizer(_texts(text), **options).data
        if "attention_mask" not in words:
            raise ValueError("return_attention_mask=False: the Q-Former needs to know what is padding")
        own = {"qformer_input_ids": words["input_ids"], "qformer_attention_mask": words["attention_mask"]}
        return {**own, **super()._text(text, with_images, options)}

    @classmethod
    def _further_parts(cls, folder: Path) -> dict[str, Any]:
        words = folder / QFORMER_TOKENIZER
        if not words.is_dir():
            raise FileNotFoundError(f"{words}: no such folder, so this is not an InstructBLIP processor")
        return {"qformer_tokenizer": Blip2Tokenizer.from_pretrained(words)}

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """As Blip2Processor, and the second tokenizer into the folder qformer_tokenizer."""
        super().save_pretrained(directory)
        self.qformer_tokenizer.save_pretrained(Path(directory) / QFORMER_TOKENIZER)


class AutoProcessor:
    """Chooses between the two by what the folder holds."""

    @staticmethod
    def from_pretrained(path_or_id: str | os.PathLike[str], **options: Any) -> Blip2Processor:
        """An InstructBlipProcessor where there is a second tokenizer, else a Blip2Processor; options as theirs."""
        from blip2c.hub import pop_hub_options, resolve

        folder = resolve(path_or_id, weights=False, **pop_hub_options(options))
        kind = InstructBlipProcessor if (folder / QFORMER_TOKENIZER).is_dir() else Blip2Processor
        return kind.from_pretrained(folder, **options)


def _texts(text: Any) -> list[str] | tuple[str, ...]:
    """One or several texts as several. Raises ValueError."""
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(item, str) for item in texts):
        raise ValueError("text must be a string or a list of strings that is not empty")
    return texts


def _split(options: dict[str, Any]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A call's options to (return_tensors, tokenizer's, image processor's). Raises TypeError for a name of neither."""
    options = dict(options)
    common = options.pop("common_kwargs", None) or {}
    nested_text = dict(options.pop("text_kwargs", None) or {})
    nested_images = dict(options.pop("images_kwargs", None) or {})
    flat = {**common, **options}
    return_tensors = flat.pop("return_tensors", None)
    # The last one wins in transformers only by accident of order; they are to agree.
    for nested in (nested_text, nested_images):
        value = nested.pop("return_tensors", None)
        return_tensors = value if return_tensors is None else return_tensors
    twice = [key for key in flat if key in nested_text or key in nested_images]
    if twice:
        raise ValueError(
            f"option {', '.join(sorted(twice))} was given twice: by name and in text_kwargs or images_kwargs"
        )
    unknown = [key for key in flat if key not in TEXT_OPTIONS and key not in IMAGE_OPTIONS]
    if unknown:
        raise TypeError(f"processor has no option {', '.join(sorted(unknown))}")
    text = {key: value for key, value in flat.items() if key in TEXT_OPTIONS}
    images = {key: value for key, value in flat.items() if key in IMAGE_OPTIONS}
    return return_tensors, {**text, **nested_text}, {**images, **nested_images}
