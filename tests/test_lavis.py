"""The LAVIS spelling: its scripts with the import changed, its computation against transformers, what it refuses."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import blip2c
from blip2c import UnsupportedError, lavis
from blip2c.lavis import load_model_and_preprocess, load_processor, model_zoo
from helpers import random_checkpoint, reference_model

KINDS: dict[str, dict[str, Any]] = {
    "blip2_opt": {},
    "blip2_t5": {"family": "t5", "image_token": False},
    "blip2_t5_instruct": {"family": "t5", "instruct": True},
    "blip2_vicuna_instruct": {"family": "llama", "instruct": True, "image_token": False},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {
        name: random_checkpoint(tmp_path_factory.mktemp(name), seed=91, tokenizer=True, **options)
        for name, options in KINDS.items()
    }
    made["retrieval"] = random_checkpoint(
        tmp_path_factory.mktemp("retrieval"), seed=81, retrieval=True, tokenizer=True,
        qformer={"max_position_embeddings": 64},
    )  # fmt: skip
    return made


def raw(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (50, 40, 3), dtype=np.uint8))


def loaded(folder: Path, name: str) -> tuple[Any, torch.Tensor]:
    """The model and two pictures as a script makes them."""
    model, vis_processors, _ = load_model_and_preprocess(name, folder, is_eval=True, device=torch.device("cpu"))
    images = [vis_processors["eval"](raw(seed)).unsqueeze(0).to(torch.device("cpu")) for seed in range(2)]
    return model, torch.cat(images)


# -- scripts ------------------------------------------------------------------------------------------------------

# What LAVIS's README and its examples for BLIP-2 do, with the names of a table replaced by folders.
GENERATION = """
import torch
from PIL import Image
from blip2c.lavis import load_model_and_preprocess
device = torch.device("cuda") if torch.cuda.is_available() else "cpu"
raw_image = Image.open(PICTURE).convert("RGB")
model, vis_processors, _ = load_model_and_preprocess(
    name="blip2_opt", model_type=FOLDER, is_eval=True, device=device
)
vis_processors.keys()
image = vis_processors["eval"](raw_image).unsqueeze(0).to(device)
said = [model.generate({"image": image})]
said.append(model.generate({"image": image}, use_nucleus_sampling=True, num_captions=3))
said.append(model.generate({"image": image, "prompt": "Question: how many cats? Answer:"}))
context = [("how many cats?", "two"), ("why?", "it has two cats")]
template = "Question: {} Answer: {}."
question = "a dog on the beach?"
prompt = " ".join([template.format(context[i][0], context[i][1]) for i in range(len(context))]) \\
    + " Question: " + question + " Answer:"
said.append(model.generate({"image": image, "prompt": prompt}, use_nucleus_sampling=False))
images = torch.cat([image, image], dim=0)
said.append(model.predict_answers({"image": images, "text_input": ["Question: a cat? Answer:", "NOTHING"]}))
"""

FEATURES = """
import torch
from PIL import Image
from blip2c.lavis import load_model_and_preprocess
raw_image = Image.open(PICTURE).convert("RGB")
caption = "a large fountain spewing water into the air"
device = torch.device("cuda") if torch.cuda.is_available() else "cpu"
model, vis_processors, txt_processors = load_model_and_preprocess(
    name="blip2_feature_extractor", model_type=FOLDER, is_eval=True, device=device)
image = vis_processors["eval"](raw_image).unsqueeze(0).to(device)
text_input = txt_processors["eval"](caption)
sample = {"image": image, "text_input": [text_input]}
features_multimodal = model.extract_features(sample)
features_image = model.extract_features(sample, mode="image")
features_text = model.extract_features(sample, mode="text")
similarity = (features_image.image_embeds_proj @ features_text.text_embeds_proj[:,0,:].t()).max()
"""

MATCHING = """
import torch
from PIL import Image
from blip2c.lavis import load_model_and_preprocess
from blip2c.lavis import load_processor
raw_image = Image.open(PICTURE).convert("RGB")
device = torch.device("cuda") if torch.cuda.is_available() else "cpu"
caption = "merlion in Singapore"
model, vis_processors, text_processors = load_model_and_preprocess(
    "blip2_image_text_matching", FOLDER, device=device, is_eval=True)
img = vis_processors["eval"](raw_image).unsqueeze(0).to(device)
txt = text_processors["eval"](caption)
itm_output = model({"image": img, "text_input": txt}, match_head="itm")
itm_scores = torch.nn.functional.softmax(itm_output, dim=1)
probability = itm_scores[:, 1].item()
itc_score = model({"image": img, "text_input": txt}, match_head='itc')
'The image feature and text feature has a cosine similarity of %.4f'%itc_score
"""


def run(script: str, folder: Path, tmp_path: Path) -> dict[str, Any]:
    picture = tmp_path / "merlion.png"
    raw().save(picture)
    names: dict[str, Any] = {"PICTURE": str(picture), "FOLDER": str(folder)}
    exec(script, names)
    return names


def test_the_scripts_of_lavis(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.warns(UserWarning, match="is cut to 32, as LAVIS does"):
        made = run(GENERATION, folders["blip2_opt"], tmp_path)
    said = made["said"]
    assert [len(texts) for texts in said] == [1, 3, 1, 1, 2]
    assert all(isinstance(text, str) for texts in said for text in texts)
    assert sum(map(len, said[0] + said[2] + said[3])) > 10
    made = run(FEATURES, folders["retrieval"], tmp_path)
    assert made["features_multimodal"].multimodal_embeds.shape == (1, 4, 16)
    assert made["features_multimodal"].image_embeds is None
    length = made["features_text"].text_embeds.shape[1]
    assert made["features_text"].text_embeds_proj.shape == (1, length, 12)
    found = run(MATCHING, folders["retrieval"], tmp_path)
    friendly = blip2c.load(folders["retrieval"])
    match = friendly.match(tmp_path / "merlion.png", "merlion in singapore")
    assert found["probability"] == pytest.approx(match.probability, abs=1e-5)
    assert found["itc_score"].shape == (1, 1)
    assert found["itc_score"].item() == pytest.approx(match.cosine, abs=1e-5)
    cosine = friendly.match(tmp_path / "merlion.png", made["caption"]).cosine
    assert made["similarity"].item() == pytest.approx(cosine, abs=1e-5)


# -- generation -----------------------------------------------------------------------------------------------------


def said_by_transformers(folder: Path, images: torch.Tensor, prompts: list[str], **options: Any) -> list[str]:
    """LAVIS's own way: projected queries and embedded prompt, padded, into the language model's generate()."""
    reference, processor = reference_model(folder), blip2c.AutoProcessor.from_pretrained(folder)
    encoder = reference.config.text_config.model_type == "t5"
    rows = [processor.tokenizer(prompt)["input_ids"] for prompt in prompts]
    longest = max(map(len, rows))
    pads = [[0] * (longest - len(row)) for row in rows]
    pairs = list(zip(rows, pads, strict=True))
    ids = torch.tensor([row + pad if encoder else pad + row for row, pad in pairs])
    mask = torch.tensor([[1] * len(row) + pad if encoder else pad + [1] * len(row) for row, pad in pairs])
    beside: dict[str, Any] = {}
    if isinstance(reference, transformers.InstructBlipForConditionalGeneration):
        words = [processor.qformer_tokenizer(prompt)["input_ids"] for prompt in prompts]
        wide = max(map(len, words))
        beside = {
            "qformer_input_ids": torch.tensor([row + [0] * (wide - len(row)) for row in words]),
            "qformer_attention_mask": torch.tensor([[1] * len(row) + [0] * (wide - len(row)) for row in words]),
        }
    with torch.no_grad():
        features = reference.get_image_features(images, **beside).pooler_output
        embeds = torch.cat([features, reference.get_input_embeddings()(ids)], 1)
        whole = torch.cat([torch.ones(features.shape[:2], dtype=torch.long), mask], 1)
        out = reference.language_model.generate(
            inputs_embeds=embeds,
            attention_mask=whole,
            pad_token_id=reference.config.text_config.pad_token_id,
            **options,
        )
    texts = processor.batch_decode(out, skip_special_tokens=True)
    return texts if encoder else [text.strip() for text in texts]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(KINDS))
def test_generation_is_that_of_lavis(folders: dict[str, Path], name: str) -> None:
    model, images = loaded(folders[name], name)
    encoder, instruct = "t5" in name, "instruct" in name
    prompts = ["a photo of", "Question: how many cats are there? Answer:"]

    def least(tokens: int) -> dict[str, int]:
        return {"min_length": tokens} if encoder else {"min_new_tokens": tokens}

    def expected(**options: Any) -> list[str]:
        return said_by_transformers(folders[name], images, prompts, **options)

    penalty = 1.5 if instruct else 1.0
    found = model.generate({"image": images, "prompt": prompts}, max_length=12)
    assert found == expected(num_beams=5, max_new_tokens=12, repetition_penalty=penalty, **least(1))
    found = model.generate(
        {"image": images, "prompt": prompts}, num_beams=3, max_length=9, min_length=7, repetition_penalty=1.7,
        length_penalty=-1.0, num_captions=2,
    )  # fmt: skip
    assert found == expected(
        num_beams=3, max_new_tokens=9, repetition_penalty=1.7, length_penalty=-1.0, num_return_sequences=2, **least(7)
    )
    answers = model.predict_answers(
        {"image": images, "text_input": ["how many cats are there?", "a dog"]}, prompt="Question: {} Answer:"
    )
    prompts = ["Question: how many cats are there? Answer:", "Question: a dog Answer:"]
    length_penalty = -1.0 if encoder else 0.0
    assert answers == expected(
        num_beams=5, max_new_tokens=10, length_penalty=length_penalty, repetition_penalty=penalty, **least(1)
    )
    # A batch says what each says alone.
    assert answers[1:] == model.predict_answers(
        {"image": images[1:], "text_input": "a dog"}, prompt="Question: {} Answer:"
    )
    assert model.generate({"image": images}, num_beams=1, max_length=4) == model.generate(
        {"image": images.numpy(), "prompt": ""}, num_beams=1, max_length=4
    )


@pytest.mark.parametrize("name", list(KINDS))
def test_the_defaults_of_lavis(folders: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What random models, which seldom end a text, do not show."""
    model, images = loaded(folders[name], name)
    least, seen = "min_length" if "t5" in name else "min_new_tokens", []

    def generate(*_: Any, **options: Any) -> Any:
        seen.append({key: value for key, value in options.items() if not key.endswith(("embeds", "mask", "ids"))})
        return np.zeros((2, 1), np.int64)

    monkeypatch.setattr(model.model, "generate", generate)
    model.generate({"image": images})
    model.predict_answers({"image": images, "text_input": ["a", "b"]})
    instruct = "instruct" in name
    common = {
        "num_beams": 5, least: 1, "num_return_sequences": 1, "do_sample": False,
        "repetition_penalty": 1.5 if instruct else 1.0,
    }  # fmt: skip
    assert seen[0] == {**common, "max_new_tokens": 256 if instruct else 30, "length_penalty": 1.0}
    assert seen[1] == {**common, "max_new_tokens": 10, "length_penalty": -1.0 if "t5" in name else 0.0}


def test_nucleus_sampling(folders: dict[str, Path]) -> None:
    model, images = loaded(folders["blip2_opt"], "blip2_opt")

    def draw(**options: Any) -> list[str]:
        torch.manual_seed(3)
        return model.generate({"image": images}, use_nucleus_sampling=True, num_beams=1, max_length=8, **options)

    sampled = draw(num_captions=4)
    assert len(sampled) == 8
    assert sampled == draw(num_captions=4)
    assert len(set(sampled)) > 2
    # So small a nucleus holds the likeliest token alone.
    assert draw(top_p=1e-6) == model.generate({"image": images}, num_beams=1, max_length=8)
    assert draw(temperature=50.0, num_captions=4) != sampled


def test_a_captioning_type_has_its_prompt(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def load(place: str, **options: Any) -> Any:
        seen.append((place, options))
        return blip2c.load(folders["blip2_opt"], **options)

    monkeypatch.setattr(lavis, "load", load)
    model, vis_processors, _ = load_model_and_preprocess("blip2_opt", "caption_coco_opt6.7b", local_files_only=True)
    assert seen == [("Salesforce/blip2-opt-6.7b-coco", {"device": "cpu", "local_files_only": True})]
    image = vis_processors["eval"](raw())[None]
    with_prompt = model.generate({"image": image, "prompt": "a photo of"})
    assert model.generate({"image": image}) == with_prompt
    assert lavis.load_model("blip2_opt", "pretrain_opt2.7b").prompt == ""
    assert seen[1][0] == "Salesforce/blip2-opt-2.7b"


def test_prompts_are_cut_as_lavis_cuts_them(folders: dict[str, Path]) -> None:
    model, images = loaded(folders["blip2_opt"], "blip2_opt")
    long = "two green triangles above a yellow star " * 5
    ids = blip2c.AutoProcessor.from_pretrained(folders["blip2_opt"]).tokenizer(long)["input_ids"]
    assert len(ids) > 40
    with pytest.warns(UserWarning, match="is cut to 32, as LAVIS does: set max_txt_len"):
        assert model._ids(long) == ids[:32]
    model.max_txt_len = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model._ids(long) == ids
    model.max_txt_len = 1
    with pytest.raises(ValueError, match="max_txt_len must be"):
        model.generate({"image": images, "prompt": long})
    # InstructBLIP cuts what the Q-Former reads, at its beginning, and only that.
    instruct, images = loaded(folders["blip2_t5_instruct"], "blip2_t5_instruct")
    instruct.max_txt_len = 8
    with pytest.warns(UserWarning, match="is cut to 8"):
        ids = instruct._beside([long[:100], "a dog"])["qformer_input_ids"]
    words = blip2c.AutoProcessor.from_pretrained(folders["blip2_t5_instruct"]).qformer_tokenizer(long[:100])
    assert ids[0].tolist() == words["input_ids"][:1] + words["input_ids"][-7:]


def test_choices_and_what_was_read_in_the_picture(folders: dict[str, Path]) -> None:
    model, images = loaded(folders["blip2_t5_instruct"], "blip2_t5_instruct")
    asked = {"image": images, "text_input": ["which?", "what?"], "choices": [["red", "blue"], ["two"]]}
    assert model._questions(asked, "{} Options: {}.") == [
        "which? Options: (a) red (b) blue.",
        "what? Options: (a) two.",
    ]
    read = {"image": images, "text_input": ["which?", "what?"], "ocr_tokens": [["EXIT", "A1"], ["x"] * 40]}
    assert model._questions(read, "OCR: {}. {}")[0] == "OCR: EXIT, A1. which?"
    assert model._questions(read, "OCR: {}. {}")[1].count("x") == 30
    assert model._prompts({**read, "prompt": "words {}"}, 2)[0] == "words EXIT, A1"
    with pytest.raises(ValueError, match="must hold ocr_tokens or choices"):
        model.predict_answers({"image": images, "text_input": ["a", "b"]}, prompt="{} {}")
    with pytest.raises(ValueError, match="letters for 26"):
        model._questions({**asked, "choices": [["x"] * 27, []]}, "{} {}")


# -- features -------------------------------------------------------------------------------------------------------


def test_features_are_those_of_transformers(folders: dict[str, Path]) -> None:
    """Every mode, with texts of unequal length, pads included."""
    folder = folders["retrieval"]
    model, images = loaded(folder, "blip2_feature_extractor")
    reference, texts = reference_model(folder), ["two cats", "there is a dog on the beach"]
    encoded = model.friendly.processor.tokenizer(texts, padding=True, return_tensors="pt")
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    assert int(mask.sum()) < mask.numel()
    with torch.no_grad():
        vision = reference.vision_model(images).last_hidden_state
        queries = reference.query_tokens.expand(2, -1, -1)
        looked = reference.qformer(queries, encoder_hidden_states=vision).last_hidden_state
        words = reference.embeddings(ids)
        read = reference.qformer(words, query_length=0, attention_mask=mask).last_hidden_state
        both = torch.cat([torch.ones(2, 4, dtype=torch.long), mask], 1)
        joined = reference.qformer(torch.cat([queries, words], 1), 4, both, vision).last_hidden_state[:, :4]
        want = {
            "image": {
                "image_embeds": looked,
                "image_embeds_proj": torch.nn.functional.normalize(reference.vision_projection(looked), dim=-1),
            },
            "text": {
                "text_embeds": read,
                "text_embeds_proj": torch.nn.functional.normalize(reference.text_projection(read), dim=-1),
            },
            "multimodal": {"multimodal_embeds": joined},
        }
    for mode, entries in want.items():
        found = model.extract_features({"image": images, "text_input": texts}, mode=mode)
        for name in ("image_embeds", "image_embeds_proj", "text_embeds", "text_embeds_proj", "multimodal_embeds"):
            if name in entries:
                torch.testing.assert_close(getattr(found, name), entries[name], atol=1e-4, rtol=0)
            else:
                assert getattr(found, name) is None
    arrays = model.extract_features({"image": images.numpy(), "text_input": texts})
    assert isinstance(arrays.multimodal_embeds, np.ndarray)


def test_matching_texts_of_unequal_length(folders: dict[str, Path]) -> None:
    """In one batch, where LAVIS fails: what each pair gives alone."""
    model, images = loaded(folders["retrieval"], "blip2_image_text_matching")
    reference, texts = reference_model(folders["retrieval"]), ["two cats", "there is a dog on the beach"]
    for head in ("itm", "itc"):
        found = model({"image": images, "text_input": texts}, match_head=head)
        for row, text in enumerate(texts):
            image = [reference.config.image_token_index] * 4
            ids = torch.tensor([image + model.friendly.token_ids(text)])
            with torch.no_grad():
                options = {"attention_mask": torch.ones_like(ids), "use_image_text_matching_head": head == "itm"}
                want = reference(images[row : row + 1], ids, **options)
            torch.testing.assert_close(found[row : row + 1], want.logits_per_image, atol=1e-4, rtol=0)
        assert found.shape == (2, 2 if head == "itm" else 1)
        assert isinstance(model.forward({"image": images.numpy(), "text_input": texts}, head), np.ndarray)
        # One picture and many texts; one text and many pictures.
        many = model({"image": images[:1], "text_input": texts}, match_head=head)
        assert torch.equal(many[:1], found[:1])
        one = model({"image": images, "text_input": texts[1]}, match_head=head)
        assert torch.equal(one[1:], found[1:])
        assert torch.equal(one[:1], many[1:])
    long = "a dog on the beach and " * 10
    words = model.friendly.all_ids(long)
    with pytest.warns(UserWarning, match="is cut to 32"):
        cut = model({"image": images[:1], "text_input": long})
    states = model.model._core.encode_stages(images[:1].numpy())["vision"]
    text = (np.array(words[:31] + words[-1:], np.int32), np.array([0, 32], np.int64), None)
    np.testing.assert_array_equal(cut, model.model._core.match(states, text, np.zeros(1, np.int32)))


# -- processors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "want"),
    [  # worked out by hand from LAVIS's rules
        ('A Dog!  On (the) "beach".', "a dog on the beach"),
        ("  two\t\tcats \n", "two cats"),
        ("one\ttab", "one\ttab"),
        ("it's 50% off; e.g. #1, really?", "it's 50% off e g 1, really?"),
        ("", ""),
        (" ".join(map(str, range(60))), " ".join(map(str, range(50)))),
    ],
)
def test_captions_are_simplified(text: str, want: str) -> None:
    assert load_processor("blip_caption")(text) == want
    assert load_processor("blip_caption", {"prompt": "a photo of ", "max_words": 2})(text).startswith("a photo of ")


def test_questions_are_simplified() -> None:
    process = load_processor("blip_question")
    assert process("What's the (left) colour? ") == "what's the left colour?"
    assert process("a  b.c ") == "a  bc"
    with pytest.raises(TypeError, match="must be a string, found int"):
        process(3)
    with pytest.raises(ValueError, match="expected one of blip_caption"):
        load_processor("blip_image_train")


def test_pictures_are_what_torchvision_makes_of_them(folders: dict[str, Path]) -> None:
    """Resize to a square (bicubic), ToTensor, Normalize, worked out in torch."""
    _, vis_processors, txt_processors = load_model_and_preprocess("blip2_opt", folders["blip2_opt"], is_eval=True)
    found = vis_processors["eval"](raw())
    small = torch.from_numpy(np.array(raw().resize((28, 28), Image.Resampling.BICUBIC)))
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    want = (small.permute(2, 0, 1).float() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(found, want, atol=1e-6, rtol=0)
    assert list(vis_processors) == list(txt_processors) == ["train", "eval"]
    with pytest.raises(UnsupportedError, match="draws at random"):
        vis_processors["train"](raw())


# -- the zoo, and what is refused -------------------------------------------------------------------------------------


def test_the_zoo_prints_as_in_lavis() -> None:
    text = str(model_zoo)
    assert "blip2_opt                      pretrain_opt2.7b, pretrain_opt6.7b, caption_coco_opt2.7b" in text
    assert "vitL" not in text
    assert dict(model_zoo)["blip2_image_text_matching"] == ["pretrain", "coco"]
    assert len(model_zoo) == 17


@pytest.mark.parametrize(
    ("name", "kind", "error", "message"),
    [
        ("blip_caption", "base_coco", ValueError, "name: expected one of blip2_opt.*found 'blip_caption'"),
        ("blip2_opt", "pretrain_opt30b", ValueError, "expected one of pretrain_opt2.7b.*found 'pretrain_opt30b'"),
        ("blip2_t5", "pretrain_flant5xl_vitL", UnsupportedError, "pretrain_flant5xl_vitL: there is no checkpoint"),
        ("blip2", "pretrain_vitL", UnsupportedError, "blip2 pretrain_vitL: there is no checkpoint"),
    ],
)
def test_what_is_not_there_is_refused_by_name(name: str, kind: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_model_and_preprocess(name, kind)


def test_what_is_asked_wrongly_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    opt, images = loaded(folders["blip2_opt"], "blip2_opt")
    matcher, _ = loaded(folders["retrieval"], "blip2_image_text_matching")
    for name, folder, message in (
        ("blip2_t5", "blip2_opt", "blip2_t5 is over BLIP-2 over t5.*BLIP-2 over opt"),
        ("blip2_opt", "retrieval", "a retrieval checkpoint"),
        ("blip2", "blip2_opt", "over a retrieval checkpoint"),
        ("blip2_t5_instruct", "blip2_vicuna_instruct", "InstructBLIP over llama"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            load_model_and_preprocess(name, folders[folder])
    with pytest.raises(UnsupportedError, match="device 'mps'"):
        load_model_and_preprocess("blip2_opt", folders["blip2_opt"], device="mps")
    with pytest.raises(UnsupportedError, match=r"x\.pth: expected a folder"):
        lavis.load_model("blip2_opt", "pretrain_opt2.7b", checkpoint=tmp_path / "x.pth")
    assert isinstance(
        lavis.load_model("blip2_opt", "pretrain_opt2.7b", checkpoint=folders["blip2_opt"]), lavis.Blip2OPT
    )
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: opt.generate({"prompt": "a"}), ValueError, "samples has no 'image', only 'prompt'"),
        (lambda: opt.generate({"image": images[0]}), ValueError, "must be \\[batch, 3"),
        (lambda: opt.generate({"image": images, "prompt": ["a"]}), ValueError, "1 for 2 pictures"),
        (lambda: opt.generate({"image": images, "prompt": [1, 2]}), TypeError, "must be a string, found int"),
        (lambda: opt.generate({"image": images}, num_captions=9), ValueError, "num_return_sequences"),
        (lambda: opt.generate({"image": images}, beams=9), TypeError, "beams"),
        (lambda: opt.predict_answers({"image": images}), ValueError, "no 'text_input'"),
        (lambda: opt.predict_answers({"image": images, "text_input": ["a", "b"]}, inference_method="rank"),
         UnsupportedError, "rank"),
        (lambda: opt.predict_answers({"image": images, "text_input": ["a", "b"]}, answer_list=["a"]),
         UnsupportedError, "answer_list"),
        (lambda: opt.predict_answers({"image": images, "text_input": ["a", "b"], "apply_lemmatizer": True}),
         UnsupportedError, "apply_lemmatizer"),
        (lambda: opt.predict_answers({"image": images, "text_input": ["a", "b"]}, prompt="{} {}"), ValueError,
         "does not take 1 texts"),
        (lambda: opt({"image": images, "text_input": ["a", "b"]}), UnsupportedError, "losses for training"),
        (lambda: opt.predict_class({}, []), UnsupportedError, "predict_class"),
        (lambda: opt.train(), UnsupportedError, "train"),
        (lambda: matcher.generate({"image": images}), UnsupportedError, "no language head"),
        (lambda: matcher.extract_features({"image": images}, mode="picture"), ValueError, "mode must be"),
        (lambda: matcher.extract_features({"image": images}), ValueError, "no 'text_input'"),
        (lambda: matcher.extract_features({"image": images, "text_input": ["a"]}), ValueError, "1 texts for 2 pict"),
        (lambda: matcher.extract_features({"text_input": " "}, mode="text"), ValueError, "empty"),
        (lambda: matcher.extract_features({"text_input": "beach " * 40}, mode="text"), ValueError, "positions for 64"),
        (lambda: matcher({"image": images, "text_input": ["a", "b", "c"]}), ValueError, "3 texts for 2 pictures"),
        (lambda: matcher({"image": images, "text_input": []}), ValueError, "text_input is empty"),
        (lambda: matcher({"image": images, "text_input": "a"}, match_head="itg"), ValueError, "match_head must be"),
        (lambda: matcher([images]), TypeError, "samples must be a dictionary"),
    ]  # fmt: skip
    for ask, error, message in cases:
        with pytest.raises(error, match=message):
            ask()
