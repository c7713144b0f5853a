"""Evaluation: figures by hand and from published examples, datasets as they are published, the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import blip2c
from blip2c import cli
from blip2c.caption_metrics import caption_scores, normal_answer, tokenize_caption, vqa_accuracy
from blip2c.evaluate import DatasetError, evaluate_retrieval, read_captions, read_questions, recalls
from helpers import random_checkpoint


@pytest.mark.parametrize(
    ("text", "words"),
    [  # what Stanford's PTBTokenizer 3.4.1 gives, without what pycocoevalcap drops
        ('A man\'s dog isn\'t here, "quoted" (really) 10:30 p.m.',
         "a man 's dog is n't here quoted -lrb- really -rrb- 10:30 p.m."),
        ("A red fire-truck; two-story building/house.", "a red fire-truck two-story building/house"),
        ("Two dogs' toys lie ... it's 50% off!!", "two dogs ' toys lie it 's 50 % off !!"),
        ("A St. Bernard at 5th Ave. cannot see no. 5, no.", "a st. bernard at 5th ave. can not see no. 5 no"),
        ("rock 'n' roll in the '90s", "rock 'n' roll in the '90s"),
    ],
)  # fmt: skip
def test_words_of_a_caption(text: str, words: str) -> None:
    assert tokenize_caption(text) == [word for word in words.split() if word != "'"]


def test_bleu_of_the_paper() -> None:
    """Papineni et al. 2002, example 2: the clipped unigram precision of seven times "the" is 2/7."""
    scores = caption_scores(["the the the the the the the"], [["The cat is on the mat.", "There is a cat on the mat."]])
    assert scores.bleu[0] == pytest.approx(2 / 7)
    assert scores.bleu[1] < 1e-4
    # A short caption: brevity penalty exp(1 - 6/3), the closest reference is the shorter one.
    short = caption_scores(["the cat is"], [["the cat is on the mat", "the cat is on the mat now"]])
    assert short.bleu[0] == pytest.approx(math.exp(-1))


def test_cider_by_hand() -> None:
    same = caption_scores(["red dog runs fast", "blue cat sits down"], [["red dog runs fast"], ["blue cat sits down"]])
    assert same.cider == pytest.approx(10)
    assert same.bleu == pytest.approx((1, 1, 1, 1))
    other = caption_scores(["red dog", "blue cat"], [["red bird"], ["green frog"]])
    # Unigrams: one of two words agrees, all weigh log 2: cosine 1/2; bigrams disagree, 3 and 4 do not exist.
    assert other.ciders == pytest.approx([10 * 0.5 / 4, 0])
    # One bigram fewer than the reference: exp(-1/72).
    gap = caption_scores(["red dog", "blue cat"], [["red dog runs"], ["green frog"]])
    cosines = 2 / math.sqrt(2 * 3) + 1 / math.sqrt(2)
    assert gap.ciders[0] == pytest.approx(10 * cosines / 4 * math.exp(-1 / 72))


def test_vqa_accuracy_by_hand() -> None:
    people = ["yes"] * 3 + ["no"] * 7
    assert vqa_accuracy("Yes.", people) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert vqa_accuracy("no", people) == 1
    assert vqa_accuracy("maybe", people) == 0
    assert vqa_accuracy("yes", ["yes", *["no"] * 9]) == pytest.approx(9 * (1 / 3) / 10)
    # Where all wrote the very same, the published code compares as it stands.
    assert vqa_accuracy("Yes.", ["yes"] * 10) == 0
    assert vqa_accuracy(" yes\n", ["yes"] * 10) == 1
    for said, normal in [
        ("The two dogs!", "2 dogs"), ("dont know", "don't know"), ("10,000", "10000"), ("3.5 ft.", "3.5 ft"),
        ("none", "0"), ("yall'd've", "y'all'd've"), ("black/white", "black white"), ("a\nred, car", "red car"),
    ]:  # fmt: skip
        assert normal_answer(said) == normal


def test_recalls_count_the_first_of_equals() -> None:
    scores = np.array([[0.0, 1, 1, 0], [3, 2, 1, 0]])
    assert recalls(scores, [[1], [3]]) == {1: 0.5, 5: 1.0, 10: 1.0}
    assert recalls(scores, [[2], [1, 3]])[1] == 0


# -- datasets ---------------------------------------------------------------------------------------------------------

TEXTS = ["a small red circle", "two green triangles", "a photo of a cross", "there is a dog"]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    (tmp_path / "val2014").mkdir()
    for i in range(4):
        values = np.random.default_rng(i).integers(0, 256, (30, 40, 3), np.uint8)
        Image.fromarray(values).save(tmp_path / "val2014" / f"COCO_val2014_{i:012d}.jpg")
    return tmp_path


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def karpathy(folder: Path) -> Path:
    images = [
        {
            "filepath": "val2014", "filename": f"COCO_val2014_{i:012d}.jpg", "split": "test",
            "sentences": [{"raw": text}, {"raw": f"{text} and more"}],
        }
        for i, text in enumerate(TEXTS)
    ]  # fmt: skip
    return write(folder / "dataset.json", {"images": [*images, {**images[0], "split": "train"}]})


def vqa(folder: Path) -> tuple[Path, Path]:
    questions = [{"question_id": 10 + i, "image_id": i % 2, "question": f"how many {i}?"} for i in range(3)]
    answers = [{"question_id": q["question_id"], "answers": [{"answer": "two"}] * 10} for q in questions]
    return (
        write(folder / "questions.json", {"data_subtype": "val2014", "questions": questions}),
        write(folder / "annotations.json", {"annotations": answers}),
    )


def test_datasets_in_both_forms(pictures: Path) -> None:
    data = read_captions(karpathy(pictures), pictures)
    assert [d.texts[0] for d in data] == TEXTS
    rows = [{"image": str(Path(d.image).relative_to(pictures)), "caption": d.texts} for d in data]
    assert read_captions(write(pictures / "list.json", rows), pictures) == data
    questions = read_questions(*vqa(pictures), pictures)
    assert [(q.number, q.answers[0]) for q in questions] == [(10, "two"), (11, "two"), (12, "two")]
    assert all(Path(q.image).is_file() for q in questions)
    for wrong, message in [
        ({"images": 3}, "'images'"), ([{"image": "x.jpg"}], "entry 0"), ([], "no pictures"), ([3], "entry 0"),
        ({"images": [{"split": "test", "sentences": [{}]}]}, r"images\[0\]"),
        ({"images": [{"split": "test", "sentences": [], "filename": "x", "filepath": 3}]}, r"images\[0\].*filepath"),
    ]:  # fmt: skip
        with pytest.raises(DatasetError, match=message):
            read_captions(write(pictures / "wrong.json", wrong))
    for text in ("{", "[" * 100_000):
        (pictures / "wrong.json").write_text(text)
        with pytest.raises(DatasetError, match="no JSON"):
            read_captions(pictures / "wrong.json")


def test_captions_and_answers_on_the_command_line(pictures: Path, capfd: Any) -> None:
    folder = random_checkpoint(pictures / "model", 5, tokenizer=True)
    common = ["--images", str(pictures), "--model", str(folder), "--num-beams", "2", "--max-new-tokens", "4"]
    out = pictures / "out.json"
    assert cli.main(["eval", "captions", str(karpathy(pictures)), *common, "--json", "--out", str(out)]) == 0
    facts = json.loads(capfd.readouterr().out)
    data, model = read_captions(karpathy(pictures), pictures), blip2c.load(folder)
    said = [str(c) for c in model.caption([d.image for d in data], num_beams=2, max_new_tokens=4)]
    assert [row["caption"] for row in json.loads(out.read_text())] == said
    assert facts["cider"] == caption_scores(said, [d.texts for d in data]).cider
    assert cli.main(["eval", "vqa", *map(str, vqa(pictures)), *common, "--out", str(out)]) == 0
    assert "(3 questions)" in capfd.readouterr().out
    assert [row["question_id"] for row in json.loads(out.read_text())] == [10, 11, 12]
    assert cli.main(["eval", "retrieval", str(karpathy(pictures)), *common[:4]]) == 2


def test_retrieval_with_the_protocol_of_the_paper(pictures: Path, capfd: Any) -> None:
    folder = random_checkpoint(pictures / "model", 62, retrieval=True, tokenizer=True)
    data, model = read_captions(karpathy(pictures), pictures), blip2c.load(folder)
    texts = [text for d in data for text in d.texts]
    images = [d.image for d in data]
    cosines = model.similarity(model.embed(images), model.embed_text(texts))
    logits = np.array([[match.logit for match in model.match(image, texts)] for image in images])
    right_texts, right_images = [[2 * i, 2 * i + 1] for i in range(4)], [[j // 2] for j in range(8)]
    for k in (0, 3, 128):
        by_image, by_text = cosines, cosines.T
        if k:
            both = logits + cosines
            by_image = np.full_like(both, -100)
            by_text = by_image.T.copy()
            for scores, values, similar in ((by_image, both, cosines), (by_text, both.T, cosines.T)):
                for row, (value, near) in enumerate(zip(values, similar, strict=True)):
                    best = np.argsort(-near, kind="stable")[:k]
                    scores[row, best] = value[best]
        found = evaluate_retrieval(model, data, k_test=k)
        assert found.text_recall == recalls(by_image, right_texts)
        assert found.image_recall == recalls(by_text, right_images)
    command = ["eval", "retrieval", str(karpathy(pictures)), "--images", str(pictures), "--model", str(folder)]
    assert cli.main([*command, "--k-test", "3"]) == 0
    assert capfd.readouterr().out == f"{evaluate_retrieval(model, data, k_test=3)}\n"
