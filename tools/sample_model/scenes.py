"""The little world that the sample model knows: emoji on plain backgrounds.

A scene is a picture (112 x 112 pixels, or a whole multiple of that) with

* one object,
* two different objects, side by side or one above the other, or
* two, three or four of the same object,

on a background of one of eight colours.  Its caption and its questions are
deterministic functions of what is in it (only the choice of the objects that the
yes/no questions ask about is drawn).  The objects are glyphs of the font
Noto Color Emoji, jittered in size, place and tilt.

Some *combinations* are held out: a hash of its name puts 10 % of the unordered
pairs of objects, 15 % of the (object, count) and 10 % of the (object, background)
combinations aside.  A scene of the split ``"train"`` contains none of these; a scene
of the split ``"heldout"`` contains nothing else: every combination in it (the pair, or
the object and its count, and each object with the background) is held out. A scene of the
split ``"unseen"`` contains at least one, so that training never drew it, either: there are
too few captions of the split ``"heldout"`` for a thousand scenes that all differ.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
import subprocess
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Split = Literal["train", "heldout", "unseen"]

SIZE = 112
PATCH = 14
GRID = SIZE // PATCH

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (200, 50, 50),
    "green": (60, 160, 70),
    "blue": (60, 90, 200),
    "yellow": (235, 210, 70),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
    "pink": (245, 160, 190),
    "gray": (130, 130, 130),
}

# glyph, name [, what one is called, what several are called]
_TABLE = """
🐶 dog|🐱 cat|🍎 apple|🚗 car|✈ airplane|🍌 banana|🚲 bicycle|🌳 tree|🏠 house|🐟 fish,a fish,fish
🐦 bird|🐴 horse|🐮 cow|🐷 pig|🐘 elephant|🦁 lion|🐯 tiger|🐵 monkey|🐰 rabbit|🐻 bear
🐸 frog|🐍 snake|🐢 turtle|🦋 butterfly,a butterfly,butterflies|🐝 bee|🕷 spider|🌹 rose|🌻 sunflower|🌷 tulip
🌵 cactus,a cactus,cacti|🍄 mushroom|🍋 lemon|🍊 orange|🍇 grapes,a bunch of grapes,bunches of grapes
🍓 strawberry,a strawberry,strawberries|🍒 cherries,a pair of cherries,pairs of cherries|🍍 pineapple
🍉 watermelon|🍑 peach,a peach,peaches|🍐 pear|🥕 carrot|🌽 corn,an ear of corn,ears of corn
🍞 bread,a loaf of bread,loaves of bread|🧀 cheese,a piece of cheese,pieces of cheese
🍕 pizza|🍔 hamburger|🍪 cookie|🍦 ice cream|☕ coffee,a cup of coffee,cups of coffee|🔑 key|📖 book
⏰ clock|☂ umbrella|🎸 guitar|🎻 violin|🥁 drum|🎺 trumpet|📷 camera|☎ telephone|📺 television
🚀 rocket|🚆 train|🚌 bus,a bus,buses|🚚 truck|⛵ boat|⚓ anchor|🔔 bell|🎈 balloon|🎁 gift|👑 crown
💍 ring|👓 glasses,a pair of glasses,pairs of glasses|👟 shoe|🎩 hat|✂ scissors,a pair of scissors,pairs of scissors
🔨 hammer|✏ pencil|✉ envelope|⭐ star|☀ sun|🌙 moon|☁ cloud|🌈 rainbow|⛄ snowman,a snowman,snowmen|🔥 fire
❤ heart|🏀 basketball|⚽ soccer ball|🎾 tennis racket|🏆 trophy,a trophy,trophies|🐧 penguin|🦉 owl|🦆 duck
🐔 chicken|🦀 crab|🐙 octopus,an octopus,octopuses|🐳 whale|🐬 dolphin|🦈 shark|🐌 snail
"""

COUNT_WORDS = {1: "one", 2: "two", 3: "three", 4: "four"}

#: What a scene can look like.  The auxiliary losses of the training use this list too.
LAYOUTS = ("single", "left-right", "above-below", "two", "three", "four")


@dataclass(frozen=True)
class Thing:
    """One kind of object: its glyph and what English calls it."""

    glyph: str
    name: str
    one: str
    several: str

    @property
    def plural(self) -> str:
        """The bare plural: "dogs", "cacti", but "scissors" and "bread"."""
        return self.several if " of " not in self.several else self.name


def _parse(entry: str) -> Thing:
    glyph, words = entry.strip().split(" ", 1)
    name, *forms = words.split(",")
    article = "an" if name[0] in "aeiou" else "a"
    one, several = forms or (f"{article} {name}", f"{name}s")
    return Thing(glyph, name, one, several)


THINGS: tuple[Thing, ...] = tuple(_parse(entry) for line in _TABLE.strip().splitlines() for entry in line.split("|"))
COLOUR_NAMES = tuple(COLOURS)
_INDEX = {thing.name: i for i, thing in enumerate(THINGS)}


@dataclass(frozen=True)
class Question:
    """A question, its kind (for the tables of results) and its one right answer."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Attributes:
    """What is in a scene.  ``first`` is the only, left or upper object."""

    layout: str
    background: str
    first: str
    second: str | None
    count: int

    @classmethod
    def from_indices(cls, layout: int, colour: int, first: int, second: int) -> Attributes:
        """The inverse of ``indices``."""
        name = LAYOUTS[layout]
        count = {"two": 2, "three": 3, "four": 4}.get(name, 1)
        other = None if second == len(THINGS) else THINGS[second].name
        return cls(name, COLOUR_NAMES[colour], THINGS[first].name, other, count)

    def indices(self) -> tuple[int, int, int, int]:
        """Layout, background, first and second object as class numbers."""
        second = len(THINGS) if self.second is None else _INDEX[self.second]
        layout, colour = LAYOUTS.index(self.layout), COLOUR_NAMES.index(self.background)
        return layout, colour, _INDEX[self.first], second


@dataclass(frozen=True)
class Scene:
    """A picture and all that is said about it.

    ``patches`` is ``[8, 8]``: for each patch of 14 x 14 pixels (at 112 x 112) the
    number of the object that covers most of it, or ``len(THINGS)`` plus the number of
    the background's colour (8 on confetti, which only ``collage`` draws).
    """

    image: Image.Image
    caption: str
    questions: list[Question]
    attributes: Attributes
    patches: np.ndarray


# ---------------------------------------------------------------------------
# which combinations are held out


def _hashed_below(percent: int, *words: str) -> bool:
    digest = hashlib.sha256("/".join(words).encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < percent


@functools.cache
def held_pair(a: str, b: str) -> bool:
    """Whether this unordered pair of objects is held out."""
    return _hashed_below(10, "pair", *sorted((a, b)))


@functools.cache
def held_count(name: str, count: int) -> bool:
    """Whether this number of this object is held out (one is always allowed)."""
    return count > 1 and _hashed_below(15, "count", name, str(count))


@functools.cache
def held_background(name: str, colour: str) -> bool:
    """Whether this object on this background is held out."""
    return _hashed_below(10, "background", name, colour)


def combinations(attributes: Attributes) -> list[bool]:
    """For each combination in a scene, whether it is held out."""
    names = [n for n in (attributes.first, attributes.second) if n is not None]
    held = [held_background(name, attributes.background) for name in names]
    if attributes.second is not None:
        held.append(held_pair(attributes.first, attributes.second))
    if attributes.count > 1:
        held.append(held_count(attributes.first, attributes.count))
    return held


def belongs(attributes: Attributes, split: Split) -> bool:
    """Whether a scene may be drawn for this split."""
    held = combinations(attributes)
    if split == "train":
        return not any(held)
    return all(held) if split == "heldout" else any(held)


def distinct(rng: random.Random, number: int) -> list[Attributes]:
    """Scenes that training never drew, with ``number`` different captions, in random order.

    First all whose combinations are all held out, which are a few hundred; then others of
    the split "unseen", in the usual mixture of layouts.
    """
    every = itertools.product(range(len(LAYOUTS)), range(len(COLOURS)), range(len(THINGS)), range(len(THINGS) + 1))
    pairs = (LAYOUTS.index("left-right"), LAYOUTS.index("above-below"))
    whole = (
        Attributes.from_indices(*at) for at in every if (at[3] == len(THINGS)) != (at[0] in pairs) and at[2] != at[3]
    )
    found = dict.fromkeys(a for a in whole if belongs(a, "heldout"))
    found = dict.fromkeys(rng.sample(list(found), min(number, len(found))))
    while len(found) < number:
        found[draw_attributes(rng, "unseen")] = None
    return rng.sample(list(found), number)


@functools.cache
def _held_tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    names = [t.name for t in THINGS]
    pairs = np.array([[a != b and held_pair(a, b) for b in names] for a in names])
    counts = np.array([[held_count(a, k) for k in range(5)] for a in names])
    backgrounds = np.array([[held_background(a, c) for c in COLOURS] for a in names])
    return pairs, counts, backgrounds


def possible(attributes: Attributes | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which layouts ``[6]``, colours ``[8]`` and objects ``[100]`` training could draw here.

    That is: which could take the place of the scene's own without making a held-out
    combination.  The losses compare the truth with these only, for otherwise the model would
    learn that held-out combinations never occur, which nobody has told it.
    """
    layouts, colours, things = (np.ones(n, bool) for n in (len(LAYOUTS), len(COLOURS), len(THINGS)))
    if attributes is None:
        return layouts, colours, things
    pairs, counts, backgrounds = _held_tables()
    _, colour, first, second = attributes.indices()
    present = [i for i in (first, second) if i < len(THINGS)]
    things &= ~backgrounds[:, colour] & ~counts[:, attributes.count]
    for i in present:
        colours &= ~backgrounds[i]
        if len(present) == 2:
            things &= ~pairs[:, i]
    if len(present) == 1:
        layouts[3:] = ~counts[first, 2:]
    things[present] = True
    return layouts, colours, things


# ---------------------------------------------------------------------------
# what is in a scene


def _draw_attributes(rng: random.Random, layout: str) -> Attributes:
    colour = rng.choice(COLOUR_NAMES)
    if layout in ("left-right", "above-below"):
        first, second = rng.sample(THINGS, 2)
        return Attributes(layout, colour, first.name, second.name, 1)
    count = {"single": 1, "two": 2, "three": 3, "four": 4}[layout]
    return Attributes(layout, colour, rng.choice(THINGS).name, None, count)


_LAYOUT_WEIGHTS = (30, 20, 20, 10, 10, 10)


def draw_attributes(rng: random.Random, split: Split, layout: str | None = None) -> Attributes:
    """Draw what is in a scene of the split: 30 % single, 40 % pairs, 30 % several."""
    layout = layout or rng.choices(LAYOUTS, _LAYOUT_WEIGHTS)[0]
    while True:
        attributes = _draw_attributes(rng, layout)
        if belongs(attributes, split):
            return attributes


def _edited(attributes: Attributes, rng: random.Random) -> Attributes:
    """A scene with one thing changed: an object, the colour, the count, the order, or the layout of a pair."""
    layout, colour, first, second = attributes.indices()
    kind = rng.randrange(5 if attributes.second is not None else 3)
    if kind == 0:
        colour = rng.randrange(len(COLOURS))
    elif kind == 1:
        first = rng.randrange(len(THINGS))
    elif attributes.second is None:
        layout = rng.choice([LAYOUTS.index(name) for name in ("single", "two", "three", "four")])
    elif kind == 2:
        second = rng.randrange(len(THINGS))
    elif kind == 3:
        first, second = second, first
    else:
        layout = rng.choice([LAYOUTS.index(name) for name in ("left-right", "above-below")])
    return Attributes.from_indices(layout, colour, first, second)


def related(attributes: Attributes, rng: random.Random, split: Split | None, number: int) -> list[Attributes]:
    """The scene and ``number`` others (of a split) that differ from it in one thing each; no two alike.

    Fewer, where a hundred draws did not find that many.
    """
    found = [attributes]
    for _ in range(100):
        if len(found) > number:
            break
        other = _edited(attributes, rng)
        if other.first != other.second and other not in found and (split is None or belongs(other, split)):
            found.append(other)
    return found


def caption(attributes: Attributes) -> str:
    """The caption of a scene."""
    first = THINGS[_INDEX[attributes.first]]
    if attributes.second is not None:
        second = THINGS[_INDEX[attributes.second]]
        where = "to the left of" if attributes.layout == "left-right" else "above"
        what = f"{first.one} {where} {second.one}"
    elif attributes.count > 1:
        what = f"{COUNT_WORDS[attributes.count]} {first.several}"
    else:
        what = first.one
    return f"{what} on a {attributes.background} background"


def _content_questions(attributes: Attributes) -> list[Question]:
    first = THINGS[_INDEX[attributes.first]]
    if attributes.second is None:
        seen = first.name if attributes.count == 1 else first.plural
        many = f"how many {first.several} are there?"
        return [
            Question("what", "what is in the picture?", seen),
            Question("how many", many, COUNT_WORDS[attributes.count]),
        ]
    beside = attributes.layout == "left-right"
    places = ("on the left", "on the right") if beside else ("at the top", "at the bottom")
    answers = (attributes.first, attributes.second)
    return [Question("where", f"what is {p}?", a) for p, a in zip(places, answers, strict=True)]


def questions(attributes: Attributes, rng: random.Random) -> list[Question]:
    """All the questions about a scene; ``rng`` picks what the yes/no questions name."""
    present = [n for n in (attributes.first, attributes.second) if n is not None]
    anything = np.ones(len(THINGS), bool)
    askable = possible(attributes)[2] if belongs(attributes, "train") else anything
    absent = rng.choice([t for t, ok in zip(THINGS, askable, strict=True) if ok and t.name not in present])
    there = THINGS[_INDEX[rng.choice(present)]]
    return [
        *_content_questions(attributes),
        Question("color", "what color is the background?", attributes.background),
        Question("is there (yes)", f"is there {there.one}?", "yes"),
        Question("is there (no)", f"is there {absent.one}?", "no"),
    ]


# ---------------------------------------------------------------------------
# drawing


@functools.cache
def font_path() -> str:
    """Where fontconfig finds Noto Color Emoji."""
    command = ["fc-match", "-f", "%{file}", "Noto Color Emoji"]
    path = subprocess.check_output(command, text=True)
    if "emoji" not in path.lower():
        raise FileNotFoundError("the font Noto Color Emoji (fonts-noto-color-emoji) is missing")
    return path


@functools.cache
def _glyphs() -> dict[str, Image.Image]:
    """Every glyph as a bitmap with premultiplied alpha, cropped to what is drawn."""
    font = ImageFont.truetype(font_path(), 109)
    glyphs = {}
    for thing in THINGS:
        canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
        ImageDraw.Draw(canvas).text((0, 0), thing.glyph, font=font, embedded_color=True)
        box = canvas.getbbox()
        if box is None:
            raise ValueError(f"the font has no glyph for {thing.name!r}")
        glyphs[thing.name] = canvas.crop(box).convert("RGBa")
    return glyphs


@functools.cache
def _noise_bank() -> np.ndarray:
    return np.random.default_rng(7).normal(0, 4, 1 << 21).astype(np.int16)


Place = tuple[str, float, float, float]  # name, centre x and y, size (in 112ths)


def _places(attributes: Attributes, rng: random.Random) -> list[Place]:
    """Where the objects of a scene go."""
    first, second = attributes.first, attributes.second
    if attributes.layout == "single":
        return [(first, rng.uniform(38, 74), rng.uniform(38, 74), rng.uniform(40, 80))]
    if second is not None:
        spots = [(rng.uniform(27, 33), rng.uniform(38, 74)), (rng.uniform(79, 85), rng.uniform(38, 74))]
        if attributes.layout == "above-below":
            spots = [(y, x) for x, y in spots]
        pairs = zip((first, second), spots, strict=True)
        return [(name, x, y, rng.uniform(36, 48)) for name, (x, y) in pairs]
    corners = rng.sample([(30, 30), (82, 30), (30, 82), (82, 82)], attributes.count)
    return [(first, x + rng.uniform(-5, 5), y + rng.uniform(-5, 5), rng.uniform(34, 46)) for x, y in corners]


def _jittered(rng: random.Random, name: str, size: float) -> Image.Image:
    width, height = (max(8, int(size * rng.uniform(0.9, 1.1))) for _ in range(2))
    glyph = _glyphs()[name].resize((width, height), Image.Resampling.BICUBIC)
    return glyph.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC, expand=True)


def _paste(canvas: np.ndarray, glyph: np.ndarray, left: int, top: int) -> np.ndarray:
    """Lay a premultiplied glyph over the canvas; returns its coverage of the canvas."""
    side = canvas.shape[0]
    x0, y0 = max(0, left), max(0, top)
    x1, y1 = min(side, left + glyph.shape[1]), min(side, top + glyph.shape[0])
    part = glyph[y0 - top : y1 - top, x0 - left : x1 - left].astype(np.float32)
    under = canvas[y0:y1, x0:x1]
    canvas[y0:y1, x0:x1] = part[..., :3] + under * (1 - part[..., 3:] / 255)
    cover = np.zeros((side, side), np.float32)
    cover[y0:y1, x0:x1] = part[..., 3] > 100
    return cover


def _patch_cover(cover: np.ndarray) -> np.ndarray:
    step = cover.shape[0] // GRID
    return cover.reshape(GRID, step, GRID, step).mean((1, 3))


def _plain(rng: random.Random, side: int, colour: str) -> np.ndarray:
    canvas = np.empty((side, side, 3), np.float32)
    canvas[:] = [c + rng.gauss(0, 10) for c in COLOURS[colour]]
    return canvas


def _confetti(rng: random.Random, side: int) -> np.ndarray:
    cells = rng.choice((2, 4, 8))
    colours = np.frombuffer(rng.randbytes(cells * cells * 3), np.uint8).reshape(cells, cells, 3)
    step = side // cells
    return colours.astype(np.float32).repeat(step, 0).repeat(step, 1)


def render(
    rng: random.Random, colour: str | None, places: list[Place], scale: int = 1
) -> tuple[Image.Image, np.ndarray]:
    """Draw objects on a noisy background (None: confetti); returns picture and patch labels."""
    side = SIZE * scale
    canvas = _confetti(rng, side) if colour is None else _plain(rng, side, colour)
    number = len(COLOURS) if colour is None else COLOUR_NAMES.index(colour)
    patches = np.full((GRID, GRID), len(THINGS) + number, np.int64)
    most = np.full((GRID, GRID), 0.2)
    for name, x, y, size in places:
        glyph = np.asarray(_jittered(rng, name, size * scale))
        left, top = int(x * scale - glyph.shape[1] / 2), int(y * scale - glyph.shape[0] / 2)
        cover = _patch_cover(_paste(canvas, glyph, left, top))
        patches[cover > most] = _INDEX[name]
        most = np.maximum(most, cover)
    bank = _noise_bank()
    start = rng.randrange(bank.size - canvas.size)
    canvas += bank[start : start + canvas.size].reshape(canvas.shape)
    pixels = np.clip(canvas, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels), patches


def compose(attributes: Attributes, rng: random.Random, scale: int = 1) -> Scene:
    """Draw the scene that the attributes describe."""
    image, patches = render(rng, attributes.background, _places(attributes, rng), scale)
    return Scene(image, caption(attributes), questions(attributes, rng), attributes, patches)


def scene(rng: random.Random, split: Split, scale: int = 1, layout: str | None = None) -> Scene:
    """Draw a scene of a split: a picture of ``112 * scale`` pixels a side and its texts."""
    return compose(draw_attributes(rng, split, layout), rng, scale)


def collage(rng: random.Random) -> tuple[Image.Image, np.ndarray]:
    """A crowded picture for the vision encoder alone: up to five objects on confetti.

    It holds no held-out pair, and no background that has a name.
    """
    names: list[str] = []
    for name in rng.sample([t.name for t in THINGS], 8):
        if len(names) < 5 and not any(held_pair(name, other) for other in names):
            names.append(name)
    spots = [(29, 29), (83, 29), (29, 83), (83, 83), (56, 56)]
    spots = spots if rng.random() < 0.3 else spots[:4]
    places = [
        (name, x + rng.uniform(-9, 9), y + rng.uniform(-9, 9), rng.uniform(34, 52))
        for name, (x, y) in zip(names, spots, strict=False)
    ]
    return render(rng, None, places)


def heldout_census() -> dict[str, int]:
    """How many combinations of each sort are held out (for the report)."""
    names = [t.name for t in THINGS]
    return {
        "pairs": sum(held_pair(a, b) for a, b in itertools.combinations(names, 2)),
        "object-count": sum(held_count(n, k) for n in names for k in (2, 3, 4)),
        "object-background": sum(held_background(n, c) for n in names for c in COLOURS),
    }
