"""Tokenizers of Llama's, T5's and BERT's kind as published folders have them: ids, texts and streams as there."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import blip2c
from blip2c.tokenizer import Blip2Tokenizer
from helpers import CORPUS, random_checkpoint, reference_model, small_t5_tokenizer, small_tokenizer, word_tokenizer

SPACE = "\u2581"
TEXTS = [
    "a small red circle", " two  spaces ", "", " ", "na\u00efve caf\u00e9 \u65e5\u672c \U0001f600", "line\nbreak\ttab",
    f"{SPACE}under", "<s> in text </s>", "Two GREEN \ufb01", "Question: how many? Answer:",
]  # fmt: skip


def llama_backend() -> Tokenizer:
    """BPE over pieces with spaces, bytes for what has no piece, and Llama's older pipeline: a prepending normalizer."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=440, show_progress=False, special_tokens=special)
    trained.train_from_iterator(CORPUS * 4, trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=model["vocab"], merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def save_llama(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    llama_backend().save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "model_max_length": 2048, **names, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def compare(folder: Path) -> tuple[Any, Any]:
    """Both read the folder: the same ids of texts, the same texts of random ids, alone and as batches."""
    ours, theirs = Blip2Tokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        for special in (True, False):
            ids = ours(text, add_special_tokens=special)["input_ids"]
            assert ids == theirs(text, add_special_tokens=special)["input_ids"], text
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    if theirs.pad_token is not None:
        assert ours(TEXTS, padding=True)["input_ids"] == theirs(TEXTS, padding=True)["input_ids"]
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(len(theirs)) for _ in range(rng.randrange(1, 9))]
        skip = rng.random() < 0.5
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip), ids
    return ours, theirs


def assert_saved_as_it_is(tokenizer: Blip2Tokenizer, folder: Path) -> None:
    """What it saves is read by both as what it was."""
    tokenizer.save_pretrained(folder)
    again, _ = compare(folder)
    assert [again(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert again.padding_side == tokenizer.padding_side


@pytest.mark.parametrize(
    "config",
    [
        {}, {"legacy": True, "add_bos_token": False}, {"legacy": False, "tokenizer_class": "LlamaTokenizerFast"},
        {"add_prefix_space": False}, {"add_eos_token": True, "padding_side": "right"},
        {"tokenizer_class": "PreTrainedTokenizerFast"},
    ],
    ids=str,
)  # fmt: skip
def test_llama_s(config: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = compare(save_llama(tmp_path / "a", **config))
    assert ours.padding_side == theirs.padding_side
    assert_saved_as_it_is(ours, tmp_path / "b")


@pytest.mark.parametrize(
    "change", [{}, {"normalizer": {"type": "Lowercase"}}, {"pre_tokenizer": {"type": "Whitespace"}}]
)
def test_t5_s(change: dict[str, Any], tmp_path: Path) -> None:
    """What the class does not take from the file does not count, as there."""
    small_t5_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    ours, _ = compare(tmp_path)
    assert ours("Two GREEN")["input_ids"] != ours("two green")["input_ids"]
    assert_saved_as_it_is(ours, tmp_path / "b")


@pytest.mark.parametrize(
    "config", [{}, {"do_lower_case": False}, {"tokenizer_class": "PreTrainedTokenizerFast"}], ids=str
)
def test_bert_s(config: dict[str, Any], tmp_path: Path) -> None:
    word_tokenizer(120).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": "BertTokenizer", **config}))
    assert_saved_as_it_is(compare(tmp_path)[0], tmp_path / "b")


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("named_by", ["nobody", "config.json"])
def test_a_config_that_names_no_class(kind: str, named_by: str, tmp_path: Path) -> None:
    """config.json may name it, else the file is obeyed; what is saved is read as the same by both."""
    folder, names = tmp_path / "a", {"gpt2": "GPT2Tokenizer", "llama": "LlamaTokenizer", "t5": "T5Tokenizer"}
    if kind == "llama":
        save_llama(folder)
    else:
        (small_tokenizer() if kind == "gpt2" else small_t5_tokenizer()).save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = {k: v for k, v in json.loads(file.read_text()).items() if k != "tokenizer_class"}
    file.write_text(json.dumps(config))
    if named_by == "config.json":
        (folder / "config.json").write_text(json.dumps({"model_type": "blip-2", "tokenizer_class": names[kind]}))
    ours, theirs = compare(folder)
    assert ours.padding_side == theirs.padding_side
    assert_saved_as_it_is(ours, tmp_path / "b")


class Written:
    """transformers' TextStreamer over a tokenizer; what it says."""

    def __init__(self, tokenizer: Any) -> None:
        class Streamer(transformers.TextStreamer):
            def on_finalized_text(streamer, text: str, stream_end: bool = False) -> None:  # noqa: N805
                self.pieces.append(text)

        self.pieces: list[str] = []
        self.streamer = Streamer(tokenizer)

    def write(self, ids: list[int]) -> list[str]:
        for index in ids:
            self.streamer.put(np.array([index]))
        self.streamer.end()
        return self.pieces


def test_streams_hold_back_half_a_character(tmp_path: Path) -> None:
    """Token by token: the pieces of transformers' own tokenizer, no broken character, the spaces where they belong."""
    folder = save_llama(tmp_path / "llama")
    ours, theirs = Blip2Tokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("caf\u00e9 \u65e5\u672c\U0001f600 red circle", " two  spaces", "a\nb c"):
        ids = ours(text, add_special_tokens=False)["input_ids"]
        pieces = Written(ours).write(ids)
        assert pieces == Written(theirs).write(ids)
        assert "".join(pieces) == ours.decode(ids)
        assert "\ufffd" not in "".join(pieces)
    small_t5_tokenizer().save_pretrained(tmp_path / "t5")
    ours, theirs = [t.from_pretrained(tmp_path / "t5") for t in (Blip2Tokenizer, transformers.AutoTokenizer)]
    ids = ours("there is a dog on the beach , is it ?", add_special_tokens=False)["input_ids"]
    assert Written(ours).write(ids) == Written(theirs).write(ids)


@pytest.mark.filterwarnings("ignore")
def test_states_and_chats_of_an_instructblip_over_llama_s_tokenizer(tmp_path: Path) -> None:
    """Published Vicunas' pieces: pictures, states and chats give transformers' tokens."""
    size, room = 441, {"max_position_embeddings": 200}
    kind: dict[str, Any] = {"family": "llama", "instruct": True, "tokenizer": True, "gain": 1.6}
    folder = random_checkpoint(tmp_path / "model", 41, **kind, text={"vocab_size": size}, qformer=room)
    tokenizer = transformers.AutoTokenizer.from_pretrained(save_llama(tmp_path / "tokenizer"))
    processor = transformers.InstructBlipProcessor.from_pretrained(folder, backend="pil")
    tokenizer.add_tokens([f"<filler{index}>" for index in range(len(tokenizer), size - 1)])
    tokenizer.add_tokens([transformers.AddedToken("<image>", special=True)])
    again = transformers.InstructBlipProcessor(
        processor.image_processor, tokenizer, processor.qformer_tokenizer, num_query_tokens=4
    )
    again.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["image_token_index"] = tokenizer.convert_tokens_to_ids("<image>")
    (folder / "config.json").write_text(json.dumps(config))
    model, reference = blip2c.load(folder), reference_model(folder)
    theirs = transformers.InstructBlipProcessor.from_pretrained(folder, backend="pil")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    state, chat = model.encode(picture), model.chat(picture, "Q: {} A:", max_new_tokens=6)

    def expected(prompt: str) -> list[int]:
        inputs = theirs(images=picture, text=prompt, return_tensors="pt")
        return reference.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :].tolist()

    for question in (" what is it?", "caf\u00e9 \u65e5\u672c?", "how many?"):
        prompt = chat.prompt(question)
        want = expected(prompt)
        said = chat.ask(question)
        assert said.ids == want[: len(said.ids)]
        for given in (picture, state):
            assert model.ask(given, question, "Q: {} A:", max_new_tokens=6).ids == expected(f"Q: {question} A:")[:6]
    assert len(chat) == 3
