"""Generated scenes. Their relations follow from the boxes and classes of the objects and the other objects nearby."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from sgalign.data.class_names import BACKGROUND
from sgalign.data.scene_graph import SceneGraph, SceneGraphDataset
from sgalign.data.splits import check_split
from sgalign.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

SIZES = {"train": 3000, "validation": 500, "test": 800}
WRONG_LABELS = 0.05
MISSING_RELATIONS = 0.3

# Height in units of the local scale (`_Place.scale`), ratio of width to height, and color in drawn images.
OBJECTS: dict[str, tuple[float, float, str]] = {
    "person": (0.50, 0.42, "salmon"),
    "dog": (0.20, 1.40, "sienna"),
    "horse": (0.45, 1.30, "saddlebrown"),
    "bird": (0.09, 1.30, "black"),
    "car": (0.33, 2.10, "firebrick"),
    "bicycle": (0.28, 1.60, "steelblue"),
    "wheel": (0.10, 1.00, "dimgray"),
    "tree": (0.85, 0.60, "darkgreen"),
    "building": (0.95, 0.90, "tan"),
    "road": (1.00, 1.00, "lightgray"),
    "grass": (1.00, 1.00, "yellowgreen"),
    "table": (0.28, 1.70, "peru"),
    "chair": (0.32, 0.80, "goldenrod"),
    "cup": (0.07, 0.90, "white"),
    "hat": (0.08, 1.50, "purple"),
    "umbrella": (0.30, 1.30, "crimson"),
}
OBJECT_NAMES = [BACKGROUND, *OBJECTS]
PREDICATE_NAMES = [
    BACKGROUND, "near", "on", "behind", "in front of", "above", "under", "standing on", "walking on", "wearing",
    "holding", "has", "part of", "riding", "sitting on", "parked on", "driving on", "walking", "drinking from",
    "carrying", "at",
]  # fmt: skip
# The wrong label that a hurried annotator would give for each predicate.
CONFUSABLE = {
    "near": "behind", "on": "standing on", "behind": "near", "in front of": "near", "above": "on", "under": "near",
    "standing on": "on", "walking on": "standing on", "wearing": "has", "holding": "has", "has": "near",
    "part of": "on", "riding": "on", "sitting on": "on", "parked on": "on", "driving on": "parked on",
    "walking": "near", "drinking from": "holding", "carrying": "under", "at": "near",
}  # fmt: skip

SURFACES = {"road", "grass"}
# For each setting, the class of its ground, and the odds of each group of objects.
SETTINGS: list[tuple[str, dict[str, float]]] = [
    ("road", {"pedestrian": 5, "car": 5, "bicycle": 3, "rider": 2, "dog walker": 1.5, "tree": 2, "building": 4,
              "dog": 1}),
    ("grass", {"pedestrian": 4, "horse": 3, "rider": 3, "dog": 2, "dog walker": 1, "tree": 4, "bird": 2, "bench": 2,
               "car": 1}),
    ("grass", {"dining": 5, "bench": 3, "pedestrian": 3, "dog": 2, "tree": 2, "bird": 1, "lost": 1}),
]  # fmt: skip


@dataclass(frozen=True)
class _Thing:
    """An object of a scene under construction, with coordinates in pixels."""

    name: str
    x1: float
    y1: float
    x2: float
    y2: float

    @property
    def width(self) -> float:
        return self.x2 - self.x1

    @property
    def height(self) -> float:
        return self.y2 - self.y1

    @property
    def x(self) -> float:
        return (self.x1 + self.x2) / 2

    def up(self, y: float) -> float:
        """Return the position of the line at `y` relative to the box: 0 is its lower edge, 1 its upper edge."""
        return (self.y2 - y) / self.height

    def off(self, other: _Thing) -> float:
        """Return the horizontal distance between the two centers, in widths of this box."""
        return abs(other.x - self.x) / self.width


class ScenesDataset(SceneGraphDataset):
    """Generated scenes of 4 to 12 objects, with 16 object classes and a long-tail distribution of 20 predicates.

    A scene depends only on (seed, split, index) and is the same on every machine. Rules (see `docs/data.md`) derive the
    relation between two objects from their boxes, their classes and the objects around them. The labels of "validation"
    and "test" are therefore complete and correct. "train" imitates an annotator. Each relation is missing with
    probability 0.3, and each remaining predicate is replaced with probability 0.05 by one that is easily confused with
    it. Scenes are generated on access, and drawn only when a graph's `image` is called.

    Args:
        split: "train", "validation" or "test". The three splits are independent.
        size: number of scenes. If None, 3000 for training, 500 for validation and 800 for test.
        seed: seed of the whole data set.

    Attributes:
        object_names: class names, `__background__` first.
        predicate_names: predicate names, `__background__` first.
    """

    def __init__(
        self, split: Literal["train", "validation", "test"], *, size: int | None = None, seed: int = 0
    ) -> None:
        check_split(split)
        if size is not None and size < 0:
            raise InputError(f"size must be at least 0, got {size}")
        self.split, self.seed = split, seed
        self.size = SIZES[split] if size is None else size
        self.object_names = list(OBJECT_NAMES)
        self.predicate_names = list(PREDICATE_NAMES)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> SceneGraph:
        if not -self.size <= index < self.size:
            raise IndexError(f"index must be from {-self.size} to {self.size - 1}, got {index}")
        image_id = f"{self.seed}/{self.split}/{index % self.size}"
        return _make_scene(image_id, annotated=self.split == "train")


def _make_scene(image_id: str, *, annotated: bool) -> SceneGraph:
    # Python guarantees the values of random() for a seed in every version. uniform() and choices() call random()
    # exactly once per value, so this code uses only these three.
    draw = random.Random(image_id)
    width, height = draw.choices([(400, 300), (300, 400), (480, 300), (360, 360)])[0]
    ground, odds = draw.choices(SETTINGS)[0]
    horizon = draw.uniform(0.35, 0.5) * height
    things = [_clip(_Thing(ground, 0, horizon, width, height), width, height)]
    count = int(draw.uniform(4, 13))
    while len(things) < count:
        group = draw.choices(list(odds), list(odds.values()))[0]
        foot = horizon + draw.uniform(0.08, 0.95) * (height - horizon)
        scale = min(width, height) * (0.4 + 0.6 * (foot - horizon) / (height - horizon))
        # `_clip` rounds the boxes before the rules apply, so the rules use the same boxes as a reader of the data.
        place = _Place(draw, draw.uniform(0.05, 0.95) * width, foot, scale)
        clipped = [_clip(thing, width, height) for thing in place.make(group)]
        things += [thing for thing in clipped if thing.width >= 4 and thing.height >= 4]
    things = things[:12]
    things.sort(key=lambda _: draw.random())
    relations = [(s, o, PREDICATE_NAMES.index(name)) for s, o, name in _relate(things)]
    if annotated:
        relations = [(s, o, _mistake(draw, p)) for s, o, p in relations if draw.random() >= MISSING_RELATIONS]
    boxes = torch.tensor([(t.x1, t.y1, t.x2, t.y2) for t in things], dtype=torch.float32)
    labels = torch.tensor([OBJECT_NAMES.index(thing.name) for thing in things])
    triplets = torch.tensor(relations, dtype=torch.int64).reshape(-1, 3)
    return SceneGraph(image_id, width, height, boxes, labels, triplets, partial(_draw, width, height, boxes, labels))


def _clip(thing: _Thing, width: int, height: int) -> _Thing:
    def inside(value: float, end: int) -> int:
        return min(max(round(value), 0), end - 1)

    return _Thing(
        thing.name, inside(thing.x1, width), inside(thing.y1, height), inside(thing.x2, width), inside(thing.y2, height)
    )


def _mistake(draw: random.Random, predicate: int) -> int:
    if draw.random() >= WRONG_LABELS:
        return predicate
    return PREDICATE_NAMES.index(CONFUSABLE[PREDICATE_NAMES[predicate]])


class _Place:
    """A point on the ground where a group of objects is assembled."""

    def __init__(self, draw: random.Random, x: float, foot: float, scale: float) -> None:
        self.draw, self.x, self.foot, self.scale = draw, x, foot, scale

    def thing(self, name: str, x: float, foot: float) -> _Thing:
        """Return an object that stands on (x, foot), with its usual size at this place and some random variation."""
        height, aspect, _ = OBJECTS[name]
        height *= self.scale * self.draw.uniform(0.8, 1.2)
        width = height * aspect * self.draw.uniform(0.85, 1.15)
        return _Thing(name, x - width / 2, foot - height, x + width / 2, foot)

    def chance(self, probability: float) -> bool:
        return self.draw.random() < probability

    def beside(self, thing: _Thing, widths: float) -> float:
        """Return an x coordinate left or right of an object's center, at a distance of `widths` times its width."""
        return thing.x + (widths if self.chance(0.5) else -widths) * thing.width

    def make(self, group: str) -> list[_Thing]:
        match group:
            case "pedestrian":
                return self.person(self.x, self.foot)
            case "dog walker":
                person, *rest = self.person(self.x, self.foot)
                return [person, self.thing("dog", self.beside(person, self.draw.uniform(0.9, 1.6)), self.foot), *rest]
            case "rider":
                mount = self.thing("horse" if self.chance(0.5) else "bicycle", self.x, self.foot)
                seat = mount.y2 - self.draw.uniform(0.4, 0.75) * mount.height
                return [mount, *self.person(self.x + self.draw.uniform(-0.15, 0.15) * mount.width, seat)]
            case "bench":
                chair = self.thing("chair", self.x, self.foot)
                if self.chance(0.4):
                    return [chair]
                seat = chair.y2 - self.draw.uniform(0.15, 0.5) * chair.height
                return [chair, *self.person(self.x + self.draw.uniform(-0.2, 0.2) * chair.width, seat)]
            case "dining":
                table = self.thing("table", self.x, self.foot)
                cups = [
                    self.thing("cup", table.x + self.draw.uniform(-0.4, 0.4) * table.width, table.y1 + 2)
                    for _ in range(int(self.draw.uniform(0, 2.5)))
                ]
                below = [self.thing("dog", table.x, self.foot)] if self.chance(0.2) else []
                guests = []
                if self.chance(0.7):
                    self.x = self.beside(table, self.draw.uniform(0.45, 0.7))
                    guests = self.make("bench")
                return [table, *cups, *below, *guests]
            case "car":
                car = self.thing("car", self.x, self.foot)
                # Most wheels are on the car, and some lie beside it.
                at = [self.draw.uniform(0.15, 0.4), -self.draw.uniform(0.15, 0.4), self.draw.uniform(0.7, 1.2)]
                keep = [self.chance(0.5), self.chance(0.5), self.chance(0.12)]
                places = [car.x + a * car.width for a, kept in zip(at, keep, strict=True) if kept]
                return [car, *(self.thing("wheel", x, self.foot) for x in places)]
            case "lost":
                name = self.draw.choices(["umbrella", "hat", "cup", "wheel"])[0]
                return [self.thing(name, self.x, self.foot)]
            case "bird":
                return [self.thing("bird", self.x, self.foot * self.draw.uniform(0.1, 1))]
            case "tree":
                tree = self.thing("tree", self.x, self.foot)
                perch = tree.y2 - self.draw.uniform(0.4, 0.9) * tree.height
                return [tree, self.thing("bird", self.x, perch)] if self.chance(0.25) else [tree]
        return [self.thing(group, self.x, self.foot)]

    def person(self, x: float, foot: float) -> list[_Thing]:
        """Return a person with the objects that they wear and carry."""
        person = self.thing("person", x, foot)
        things = [person]
        if self.chance(0.3):
            worn = self.chance(0.6)
            at = self.draw.uniform(0.82, 0.95) if worn else self.draw.uniform(0.35, 0.6)
            sideways = person.x if worn else self.beside(person, self.draw.uniform(0.3, 0.6))
            things.append(self.thing("hat", sideways, person.y2 - at * person.height))
        if self.chance(0.18):
            drinks = self.chance(0.15)
            at = self.draw.uniform(0.76, 0.9) if drinks else self.draw.uniform(0.35, 0.6)
            sideways = self.beside(person, self.draw.uniform(0, 0.5))
            things.append(self.thing("cup", sideways, person.y2 - at * person.height))
        if self.chance(0.15):
            at = self.draw.uniform(0.35, 0.65) if self.chance(0.7) else 0.0
            things.append(self.thing("umbrella", self.beside(person, 0.4), person.y2 - at * person.height))
        return things


def _relate(things: list[_Thing]) -> Iterator[tuple[int, int, str]]:
    """Yield subject index, object index and predicate of each relation. Each ordered pair has at most one relation."""
    seats = {i: seat for i in range(len(things)) if (seat := _seat(things, i)) is not None}
    keepers = {i: keeper for i in range(len(things)) if (keeper := _keeper(things, i)) is not None}
    walkers = {i: dog for i in range(len(things)) if i not in seats and (dog := _dog(things, i)) is not None}
    for s, subject in enumerate(things):
        for o, object_ in enumerate(things):
            if s == o:
                continue
            names = {subject.name, object_.name}
            if seats.get(s) == o:
                yield s, o, "sitting on" if object_.name == "chair" else "riding"
            elif seats.get(o) == s:
                if subject.name == "horse":
                    yield s, o, "carrying"
            elif keepers.get(o, (None,))[0] == s:
                yield s, o, keepers[o][1]
            elif keepers.get(s, (None,))[0] == o:
                if subject.name == "wheel":
                    yield s, o, "part of"
            elif walkers.get(s) == o:
                yield s, o, "walking"
            elif walkers.get(o) == s:
                continue
            elif object_.name == "table" and s in seats and object_.off(subject) < 0.9:
                if things[seats[s]].name == "chair" and -0.2 < object_.up(things[seats[s]].y2) < 0.5:
                    yield s, o, "at"
            elif object_.name in SURFACES:
                # A seated person or an object with a keeper has no relation with the ground. Only the seat or the
                # keeper has one.
                if s not in seats and s not in keepers and subject.y2 > object_.y1:
                    if (name := _ground_relation(things, s, seats, walkers)) is not None:
                        yield s, o, name
            elif not names & SURFACES:
                # Attached objects have no relations with other objects.
                attached = s in seats or o in seats or s in keepers or o in keepers
                if not attached and (name := _loose_relation(subject, object_)) is not None:
                    yield s, o, name


def _seat(things: list[_Thing], i: int) -> int | None:
    """Return the index of the seat of person `i`, or None.

    It is the horizontally nearest horse, bicycle or chair that contains the person's lower edge.
    """
    person = things[i]
    if person.name != "person":
        return None
    below = [
        (seat.off(person), j)
        for j, seat in enumerate(things)
        if seat.name in ("horse", "bicycle", "chair") and seat.off(person) < 0.3 and 0.1 < seat.up(person.y2) < 0.9
    ]
    return min(below, default=(0.0, None))[1]


def _keeper(things: list[_Thing], i: int) -> tuple[int, str] | None:
    """Return the index of the keeper of object `i` and the predicate of the keeper's relation with it, or None.

    The keeper of a hat, cup or umbrella is a person, and the keeper of a wheel is a car. If several qualify, it is the
    horizontally nearest one.
    """
    thing = things[i]
    if thing.name == "wheel":
        cars = [
            (car.off(thing), j, "has")
            for j, car in enumerate(things)
            if car.name == "car" and car.off(thing) < 0.5 and -0.1 < car.up(thing.y2) < 0.4
        ]
        return min(cars)[1:] if cars else None
    if thing.name not in ("hat", "cup", "umbrella"):
        return None
    found = []
    for j, person in enumerate(things):
        if person.name != "person" or person.off(thing) > 0.75:
            continue
        at = person.up(thing.y2)
        if thing.name == "hat" and 0.75 < at < 1.05 and person.off(thing) < 0.3:
            found.append((person.off(thing), j, "wearing"))
        elif thing.name == "cup" and 0.7 < at < 0.95:
            found.append((person.off(thing), j, "drinking from"))
        elif 0.3 < at < 0.7:
            found.append((person.off(thing), j, "holding"))
    return min(found)[1:] if found else None


def _dog(things: list[_Thing], i: int) -> int | None:
    """Return the index of the nearest dog beside person `i` at about the same depth, or None."""
    person = things[i]
    if person.name != "person":
        return None
    dogs = [
        (person.off(dog), j)
        for j, dog in enumerate(things)
        if dog.name == "dog" and person.off(dog) < 2 and abs(dog.y2 - person.y2) < 0.15 * person.height
    ]
    return min(dogs, default=(0.0, None))[1]


def _ground_relation(things: list[_Thing], i: int, seats: dict[int, int], walkers: dict[int, int]) -> str | None:
    """Return the predicate between an object and the road or grass below it, given the objects around it."""
    thing = things[i]
    ridden, walked = i in seats.values(), i in walkers.values()
    match thing.name:
        case "person":
            # A person near another person, an animal, a vehicle or furniture stands. Otherwise the person walks.
            at_it = any(
                other.name in ("person", "horse", "car", "bicycle", "table", "chair")
                and j != i and thing.off(other) < 1.5 and abs(other.y2 - thing.y2) < 0.25 * thing.height
                for j, other in enumerate(things)
            )  # fmt: skip
            return "standing on" if at_it and i not in walkers else "walking on"
        case "dog" | "horse":
            return "walking on" if ridden or walked else "standing on"
        case "bicycle":
            return "driving on" if ridden else "parked on"
        case "car":
            # A car with someone beside it is parked.
            people = (other for j, other in enumerate(things) if other.name == "person" and j not in seats)
            at_it = any(thing.off(p) < 0.9 and abs(p.y2 - thing.y2) < 0.5 * thing.height for p in people)
            return "parked on" if at_it else "driving on"
        case "chair":
            return None if i in seats.values() else "on"
        case "bird" | "tree" | "building":
            # There is no relation. Boxes do not show whether a bird is flying, and the one of trees and buildings is
            # obvious.
            return None
    return "on"


def _loose_relation(subject: _Thing, object_: _Thing) -> str | None:
    """Return the spatial predicate between two unattached objects, or None.

    The subject is the smaller object for "on", "above", "under" and "near", the nearer object for "in front of", and
    the farther object for "behind".
    """
    overlap = min(subject.x2, object_.x2) - max(subject.x1, object_.x1)
    narrower, taller = min(subject.width, object_.width), max(subject.height, object_.height)
    smaller = (subject.width * subject.height, subject.x) < (object_.width * object_.height, object_.x)
    if overlap > 0.4 * narrower:
        if smaller and object_.name in ("table", "tree", "horse", "car") and subject.name in ("cup", "bird", "hat"):
            if 0.35 < object_.up(subject.y2) < 1.1:
                return "on"
        if smaller and subject.y2 < object_.y1:
            return "above"
        level = abs(subject.y2 - object_.y2) < 0.2 * object_.height
        if smaller and level and object_.name in ("table", "tree", "umbrella") and object_.y1 < subject.y1:
            return "under"
        # Objects lower in the image are nearer.
        lead = (subject.y2 - object_.y2) / taller
        if lead < -0.1 and subject.y2 > object_.y1:
            return "behind" if subject.name in ("tree", "building", "car") else None
        if lead > 0.1 and object_.y2 > subject.y1:
            return "in front of" if object_.name not in ("tree", "building", "car") else None
    gap = max(-overlap, subject.y1 - object_.y2, object_.y1 - subject.y2)
    return "near" if smaller and gap < 0.5 * narrower and abs(subject.y2 - object_.y2) < 0.5 * taller else None


def _draw(width: int, height: int, boxes: Tensor, labels: Tensor) -> Image.Image:
    """Draw the scene in flat colors: the ground first, then large objects from far to near, then small objects."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (width, height), "lightskyblue")
    pen = ImageDraw.Draw(image)
    names = [OBJECT_NAMES[label] for label in labels.tolist()]
    layer = dict.fromkeys(SURFACES, 0) | dict.fromkeys(("bird", "cup", "hat", "wheel"), 2)
    things = zip(boxes.tolist(), names, strict=True)
    for box, name in sorted(things, key=lambda thing: (layer.get(thing[1], 1), thing[0][3])):
        colour = OBJECTS[name][2]
        if name in ("person", "dog", "horse", "bird", "tree", "hat"):
            pen.ellipse(box, fill=colour, outline="black")
        elif name in ("bicycle", "wheel"):
            pen.ellipse(box, outline=colour, width=4)
        elif name == "umbrella":
            pen.pieslice((*box[:3], 2 * box[3] - box[1]), 180, 360, fill=colour)
        else:
            pen.rectangle(box, fill=colour, outline="black")
    return image
