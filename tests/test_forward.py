"""forward(): every output of every part, the loss, and the other ways in, against transformers in float32."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers

import blip2c
from blip2c import Blip2ForConditionalGeneration, Blip2Model, UnsupportedError
from blip2c.inputs import shift_right
from helpers import prompt_ids, random_checkpoint, random_pixels, reference_model
from output_helpers import assert_same

FAMILIES = ["opt", "llama", "t5"]
EVERYTHING = {"output_hidden_states": True, "output_attentions": True}
LOSS = 1e-5


class Family(NamedTuple):
    """One checkpoint in both libraries; transformers passes hidden states and attentions on in its Blip2Model only."""

    model: Any
    base: Any
    reference: Any
    reference_base: Any

    @property
    def has_decoder(self) -> bool:
        return bool(self.model.config.is_encoder_decoder)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    # transformers' own generate() breaks where a T5 decoder has more layers than the encoder.
    text = {"num_layers": 3, "num_decoder_layers": 2} if request.param == "t5" else None
    folder = random_checkpoint(tmp_path_factory.mktemp(request.param), 3, family=request.param, text=text)
    base = transformers.Blip2Model.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return Family(
        Blip2ForConditionalGeneration.from_pretrained(folder),
        Blip2Model.from_pretrained(folder),
        reference_model(folder),
        base,
    )


@pytest.fixture
def inputs(family: Family) -> dict[str, Any]:
    """Three rows; where there is a decoder, ids for it."""
    config = family.model.config
    given: dict[str, Any] = {
        "pixel_values": torch.from_numpy(random_pixels(config, 3)),
        "input_ids": torch.from_numpy(prompt_ids(config, 3, 6)),
    }
    if family.has_decoder:
        ids = torch.from_numpy(np.random.default_rng(5).integers(2, 300, (3, 5)))
        given["decoder_input_ids"] = torch.cat([torch.zeros(3, 1, dtype=torch.int64), ids], dim=1)
    return given


def labels_for(family: Family, length: int, seed: int = 1) -> torch.Tensor:
    """[3, length], some of them -100."""
    labels = np.random.default_rng(seed).integers(4, 300, (3, length))
    labels[0, :2], labels[2, -1] = -100, -100
    return torch.from_numpy(labels)


def without_cross_attention(qformer: Any) -> None:
    """Upstream's recorder takes "crossattention" for "attention" too: its `attentions` holds both, ours one a layer."""
    cross = {id(weights) for weights in qformer.cross_attentions}
    qformer.attentions = tuple(weights for weights in qformer.attentions if id(weights) not in cross)


def padded(inputs: dict[str, Any], side: str = "right") -> dict[str, Any]:
    """The same with pads: behind the image, inside, and at the end of a row; or in front of rows, as processors put
    them for generate()."""
    ids = inputs["input_ids"]
    mask = torch.ones_like(ids)
    if side == "right":
        mask[0, 4:6], mask[1, 7], mask[2, -2:] = 0, 0, 0
        return {**inputs, "attention_mask": mask}
    ids = ids.clone()
    for row, pads in ((0, 1), (2, 3)):
        ids[row, pads:], ids[row, :pads], mask[row, :pads] = ids[row, :-pads].clone(), 1, 0
    return {**inputs, "input_ids": ids, "attention_mask": mask}


def test_every_output_of_every_part(family: Family, inputs: dict[str, Any]) -> None:
    """Both classes give what transformers' Blip2Model gives; hidden_states[-1] is what follows the final norm."""
    with torch.no_grad():
        want = family.reference_base(**inputs, **EVERYTHING)
    without_cross_attention(want.qformer_outputs)
    for model in (family.model, family.base):
        count = assert_same(model(**inputs, **EVERYTHING), want)
        assert count > 25
    as_tuple = family.base(**inputs, **EVERYTHING, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == 4
    assert len(as_tuple[1]) == 4  # the vision encoder's last state, pooled, hidden states, attentions
    assert torch.equal(as_tuple[0], family.base(**inputs).logits)
    plain = family.model(**inputs)
    assert plain.vision_outputs.hidden_states is None
    assert plain.qformer_outputs.cross_attentions is None


def test_arrays_give_arrays(family: Family, inputs: dict[str, Any]) -> None:
    arrays = {name: value.numpy() for name, value in inputs.items()}
    labels = labels_for(family, 6).numpy()
    found = family.model(**arrays, labels=labels, **EVERYTHING)
    want = family.model(**inputs, labels=torch.from_numpy(labels), **EVERYTHING)
    assert isinstance(found.loss, np.float32)
    assert found.loss == want.loss.item()
    assert np.array_equal(found.logits, want.logits.numpy())
    assert found.vision_outputs.attentions[0].dtype == np.float32
    assert want.loss.dtype == torch.float32
    assert want.loss.shape == ()


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss(family: Family, inputs: dict[str, Any], side: str) -> None:
    """Of whole prompts with their pads."""
    inputs = padded(inputs, side)
    if family.has_decoder:
        inputs.pop("decoder_input_ids")  # made of the labels
    labels = labels_for(family, inputs["input_ids"].shape[1])
    if side == "left":  # pads in front see nothing: of transformers' attentions each makes something else of them
        labels[:, :4] = -100
    with torch.no_grad():
        want = family.reference(**inputs, labels=labels)
        tuples = family.reference(**inputs, labels=labels, return_dict=False)
    found = family.model(**inputs, labels=labels)
    assert found.logits.shape == want.logits.shape
    assert found.loss.item() == pytest.approx(want.loss.item(), rel=LOSS)
    as_tuple = family.model(**inputs, labels=labels, return_dict=False)
    assert as_tuple[0].item() == pytest.approx(tuples[0].item(), rel=LOSS)
    assert len(as_tuple) == len(tuples)
    assert torch.isnan(family.model(**inputs, labels=torch.full_like(labels, -100)).loss)
    if family.has_decoder:
        return
    with torch.no_grad():
        want = family.reference(**inputs, labels=labels, num_items_in_batch=7)
    found = family.model(**inputs, labels=labels, num_items_in_batch=7)
    assert found.loss.item() == pytest.approx(want.loss.item(), rel=LOSS)


def test_labels_of_the_last_places(family: Family, inputs: dict[str, Any]) -> None:
    """Labels that leave the image out. transformers can do it for one row only, so each is one there."""
    if family.has_decoder:
        inputs.pop("decoder_input_ids")
    labels = labels_for(family, 5)
    found = family.model(**inputs, labels=labels)
    rows = [{name: value[row : row + 1] for name, value in inputs.items()} for row in range(3)]
    with torch.no_grad():
        want = [family.reference(**row, labels=labels[i : i + 1]) for i, row in enumerate(rows)]
    assert torch.allclose(found.logits, torch.cat([w.logits for w in want]), rtol=1e-4, atol=1e-4)
    counts = (labels if family.has_decoder else labels[:, 1:]).ne(-100).sum(dim=1)
    mean = sum(w.loss * n for w, n in zip(want, counts, strict=True)) / counts.sum()
    assert found.loss.item() == pytest.approx(mean.item(), rel=LOSS)


@pytest.mark.parametrize("side", ["left", "right"])
def test_pads_leave_the_real_tokens_alone(family: Family, inputs: dict[str, Any], side: str) -> None:
    """Logits, hidden states and attentions of the language model where the mask shows a token."""
    inputs = padded(inputs, side)
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        want = family.reference_base(**inputs, **EVERYTHING).language_model_outputs
    found = family.base(**inputs, **EVERYTHING).language_model_outputs
    states, weights = (
        ("encoder_hidden_states", "encoder_attentions") if family.has_decoder else ("hidden_states", "attentions")
    )
    for ours, theirs in zip(found[states], want[states], strict=True):
        assert torch.allclose(ours[mask], theirs[mask], rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(found[weights], want[weights], strict=True):
        assert torch.allclose(ours.transpose(1, 2)[mask], theirs.transpose(1, 2)[mask], rtol=1e-4, atol=1e-4)
    if family.has_decoder:
        assert_same(found.cross_attentions, want.cross_attentions)
        assert_same(found.logits, want.logits)
    else:
        assert torch.allclose(found.logits[mask], want.logits[mask], rtol=1e-4, atol=1e-4)


def test_pads_in_front_that_see_nothing(family: Family, inputs: dict[str, Any]) -> None:
    """Their logits, too, are those of transformers' default attention."""
    inputs = padded(inputs, "left")
    reference = type(family.reference).from_pretrained(family.model.name_or_path, attn_implementation="sdpa").eval()
    with torch.no_grad():
        assert_same(family.model(**inputs).logits, reference(**inputs).logits)


def test_some_layers_only(family: Family, inputs: dict[str, Any]) -> None:
    found = family.base(**inputs, output_hidden_states=[0, -1]).vision_outputs.hidden_states
    with torch.no_grad():
        want = family.reference_base.vision_model(inputs["pixel_values"], output_hidden_states=[0, -1]).hidden_states
    assert_same(found, want)
    with pytest.raises(TypeError, match="output_hidden_states"):
        family.base(**inputs, output_hidden_states="all")


def test_logits_to_keep(family: Family, inputs: dict[str, Any]) -> None:
    if family.has_decoder:
        with pytest.raises(UnsupportedError, match="logits_to_keep"):
            family.model(**inputs, logits_to_keep=2)
        return
    whole = family.model(**inputs).logits
    assert torch.equal(family.model(**inputs, logits_to_keep=3).logits, whole[:, -3:])
    assert torch.equal(family.model(**inputs, logits_to_keep=torch.tensor([0, 5])).logits, whole[:, [0, 5]])
    assert torch.equal(family.model(**inputs, logits_to_keep=0).logits, whole)
    with pytest.raises(ValueError, match="logits_to_keep"):
        family.model(**inputs, logits_to_keep=-1)
    labels, inputs = labels_for(family, 3)[:1], {name: value[:1] for name, value in inputs.items()}
    labels[0] = torch.tensor([4, 5, 6])
    found = family.model(**inputs, logits_to_keep=4, labels=labels)
    with torch.no_grad():
        want = family.reference(**inputs, logits_to_keep=4, labels=labels)
    assert found.loss.item() == pytest.approx(want.loss.item(), rel=LOSS)
    assert found.language_model_outputs.logits.shape == want.language_model_outputs.logits.shape


def test_precomputed_pictures(family: Family, inputs: dict[str, Any]) -> None:
    """mm_encoder_outputs, ours and transformers', instead of pixels: the same logits and tokens."""
    pixels = inputs.pop("pixel_values")
    ours = family.model.get_image_features(pixels)
    with torch.no_grad():
        theirs = family.reference.get_image_features(pixels)
        want = family.reference(None, **inputs, mm_encoder_outputs={"image": theirs})
    direct = family.model(pixels, **inputs)
    found = family.model(None, **inputs, mm_encoder_outputs={"image": ours})
    assert_same(found, direct, 0.0)
    assert_same(found, want)
    assert_same(family.model(None, **inputs, mm_encoder_outputs={"image": theirs}), want)
    tokens = family.model.generate(pixels, inputs["input_ids"], max_new_tokens=4)
    again = family.model.generate(None, inputs["input_ids"], mm_encoder_outputs={"image": ours}, max_new_tokens=4)
    assert torch.equal(tokens, again)
    with pytest.raises(ValueError, match="found both"):
        family.model(pixels, **inputs, mm_encoder_outputs={"image": ours})
    with pytest.raises(ValueError, match="found both"):
        family.model.generate(pixels, inputs["input_ids"], mm_encoder_outputs={"image": ours})
    with pytest.raises(ValueError, match="get_image_features"):
        family.model(None, **inputs, mm_encoder_outputs={})
    ours["pooler_output"] = ours.pooler_output[:, 1:]
    with pytest.raises(ValueError, match="pooler_output must be"):
        family.model(None, **inputs, mm_encoder_outputs={"image": ours})


def test_prompts_as_embeddings(family: Family, inputs: dict[str, Any]) -> None:
    """inputs_embeds with and without input_ids beside them, in forward and generate."""
    embed, ids = family.reference.get_input_embeddings(), inputs["input_ids"]
    assert_same(family.model.get_input_embeddings()(ids), embed(ids).detach(), 1e-6)
    masked = padded(inputs)
    pixels, mask = masked.pop("pixel_values"), masked["attention_mask"]
    embeds = embed(ids).detach().clone()
    embeds[:, -1] += 0.25  # not the embedding of any token
    for given in ({"input_ids": ids}, {"input_ids": None}):
        more = {**masked, **given, "inputs_embeds": embeds}
        with torch.no_grad():
            want = family.reference(pixels, **more)
        shown = ... if family.has_decoder else mask.bool()
        assert torch.allclose(family.model(pixels, **more).logits[shown], want.logits[shown], rtol=1e-4, atol=1e-4)
        arguments = {"attention_mask": mask, "inputs_embeds": embeds, "max_new_tokens": 6, **given}
        expected = family.reference.generate(pixels, **arguments)
        assert torch.equal(family.model.generate(pixels, **arguments), expected)
    with pytest.raises(ValueError, match="image placeholders"):
        family.model(
            pixels, **{**masked, "input_ids": None, "attention_mask": mask[:, 1:]}, inputs_embeds=embeds[:, 1:]
        )
    with pytest.raises(ValueError, match="inputs_embeds must be"):
        family.model(pixels, **masked, inputs_embeds=embeds[..., 1:])
    with pytest.raises(ValueError, match="inputs_embeds are for"):
        family.model(pixels, **masked, inputs_embeds=embeds[:, 1:])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_without_an_image_token(name: str, tmp_path: Any) -> None:
    """The queries go in front; transformers can not, so it gets the token and the ids that stand for the same."""
    folder = random_checkpoint(tmp_path, 5, family=name, image_token=False)
    reference, model = reference_model(folder), Blip2ForConditionalGeneration.from_pretrained(folder)
    config = reference.config
    config.image_token_index = config.text_config.vocab_size - 1
    pixels, ids = torch.from_numpy(random_pixels(config, 2)), torch.from_numpy(prompt_ids(config, 2, 5))
    text = ids[:, config.num_query_tokens :]
    more = {"decoder_input_ids": ids[:, :3]} if config.is_encoder_decoder else {"labels": text}
    with torch.no_grad():
        want = [
            reference(pixels[i : i + 1], ids[i : i + 1], **{k: v[i : i + 1] for k, v in more.items()}) for i in (0, 1)
        ]
    found = model(pixels, text, **more)
    assert torch.allclose(found.logits, torch.cat([w.logits for w in want]), rtol=1e-4, atol=1e-4)
    if "labels" in more:
        assert found.loss.item() == pytest.approx((want[0].loss + want[1].loss).item() / 2, rel=LOSS)
    embeds = model.get_input_embeddings()(text)
    assert torch.equal(model(pixels, inputs_embeds=embeds, **more).logits, model(pixels, text, **more).logits)


def test_the_language_model_generates_alone(family: Family, inputs: dict[str, Any]) -> None:
    """As scripts do that put the picture's features in front themselves."""
    embeds = family.reference.get_input_embeddings()(inputs["input_ids"]).detach() + 0.1
    mask = torch.ones_like(inputs["input_ids"])
    options = {"max_new_tokens": 5, "num_beams": 2}
    want = family.reference.language_model.generate(inputs_embeds=embeds, attention_mask=mask, **options)
    found = family.model.language_model.generate(inputs_embeds=embeds, attention_mask=mask, **options)
    assert torch.equal(found, want)
    want = family.reference.language_model.generate(inputs["input_ids"], attention_mask=mask, **options)
    assert torch.equal(family.model.language_model.generate(inputs["input_ids"], attention_mask=mask, **options), want)
    with pytest.raises(ValueError, match="expected input_ids or inputs_embeds"):
        family.model.language_model.generate()
    with pytest.raises(UnsupportedError, match="Blip2Model does not generate"):
        family.base.language_model.generate(inputs_embeds=embeds)


def test_options_of_generate_in_the_text_config(family: Family, inputs: dict[str, Any]) -> None:
    text, pixels = family.model.config.text_config, inputs["pixel_values"]
    before = family.model.generate(pixels, inputs["input_ids"], max_new_tokens=3)
    text.num_beams = 4
    try:
        with pytest.raises(ValueError, match=r"text_config.num_beams was None .* pass num_beams to generate"):
            family.model.generate(pixels, inputs["input_ids"], max_new_tokens=3)
    finally:
        del text.num_beams
    assert torch.equal(family.model.generate(pixels, inputs["input_ids"], max_new_tokens=3), before)


def test_labels_that_do_not_fit(family: Family, inputs: dict[str, Any]) -> None:
    labels = labels_for(family, inputs["input_ids"].shape[1])
    wrong = labels.clone()
    wrong[1, 2] = 320
    refused = [
        (wrong, ValueError, r"labels\[1, 2\] is 320"),
        (labels.float(), TypeError, "labels must be integers"),
        (labels[0], ValueError, "labels must be"),
        (labels[:2], ValueError, "labels have shape|decoder_input_ids has 2 rows"),
    ]
    if not family.has_decoder:
        refused.append((torch.cat([labels, labels], dim=1), ValueError, "labels have shape"))
    else:
        inputs.pop("decoder_input_ids")
    for given, error, message in refused:
        with pytest.raises(error, match=message):
            family.model(**inputs, labels=given)
    assert torch.isfinite(family.model(**inputs, labels=labels).loss)


def test_options_refused_by_name(family: Family, inputs: dict[str, Any]) -> None:
    for option in ("past_key_values", "position_ids", "decoder_inputs_embeds", "encoder_outputs"):
        with pytest.raises(UnsupportedError, match=option):
            family.model(**inputs, **{option: torch.ones(1)})
    with pytest.raises(TypeError, match="no_such"):
        family.model(**inputs, no_such=1)
    with pytest.raises(ValueError, match="input_ids must be given"):
        family.model(inputs["pixel_values"])
    assert family.model(**inputs, use_cache=True).language_model_outputs.past_key_values is None
    pixels, ids = inputs["pixel_values"], inputs["input_ids"]
    if family.has_decoder:
        with pytest.raises(ValueError, match="decoder_input_ids must be given, or labels"):
            family.model(pixels, ids)
    else:
        with pytest.raises(ValueError, match="no decoder of its own"):
            family.model(pixels, ids, decoder_input_ids=ids)


def test_configuration_edits_are_refused_not_ignored(family: Family, inputs: dict[str, Any]) -> None:
    config = family.model.config
    for part, name in ((config, "num_query_tokens"), (config.vision_config, "layer_norm_eps")):
        before = getattr(part, name)
        setattr(part, name, before * 2)
        try:
            with pytest.raises(ValueError, match=name):
                family.model(**inputs)
        finally:
            setattr(part, name, before)
    config.output_hidden_states = True
    try:
        assert family.model(**inputs).vision_outputs.hidden_states is not None
        assert family.model(**inputs, output_hidden_states=False).vision_outputs.hidden_states is None
        config.return_dict = False
        assert isinstance(family.model(**inputs), tuple)
    finally:
        del config.output_hidden_states, config.return_dict
    assert family.model(**inputs).vision_outputs.hidden_states is None


def test_labels_of_a_half_precision_model(tmp_path: Any) -> None:
    """The loss is float32 whatever the logits are; Q-Former outputs stay float32 under float16, as in transformers."""
    folder = random_checkpoint(tmp_path, 8, dtype="float16")
    model = Blip2ForConditionalGeneration.from_pretrained(folder)
    pixels = torch.from_numpy(random_pixels(model.config, 1)).half()
    ids = torch.from_numpy(prompt_ids(model.config, 1, 4))
    found = model(pixels, ids, labels=ids, **EVERYTHING)
    assert found.loss.dtype == torch.float32
    assert found.logits.dtype == torch.float16
    assert found.qformer_outputs.hidden_states[0].dtype == torch.float32
    assert found.vision_outputs.attentions[0].dtype == torch.float16
    reference = reference_model(folder)
    with torch.no_grad():
        want = reference(pixels.float(), ids, labels=ids).loss
    assert found.loss.item() == pytest.approx(want.item(), rel=LOSS)


def test_labels_moved_to_the_right() -> None:
    labels = np.array([[5, -100, 7], [8, 9, 10]])
    assert np.array_equal(shift_right(labels, 1, 0), [[1, 5, 0], [1, 8, 9]])


def test_cross_entropy_kernel() -> None:
    rng = np.random.default_rng(0)
    logits = (30 * rng.normal(size=(7, 1000))).astype(np.float32)
    targets = rng.integers(0, 1000, 7)
    targets[3] = -100
    want = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits).double(), torch.from_numpy(targets), reduction="none"
    )
    np.testing.assert_allclose(blip2c.kernels.cross_entropy(logits, targets), want.numpy(), rtol=1e-6, atol=1e-5)
    with pytest.raises(IndexError, match="target 1000 at place 0"):
        blip2c.kernels.cross_entropy(logits, np.full(7, 1000))
    with pytest.raises(ValueError, match="targets: expected 7, found 6"):
        blip2c.kernels.cross_entropy(logits, targets[:6])
