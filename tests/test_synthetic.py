"""The synthetic scenes: layout, determinism, masks, splits, and phrases read by a resolver of the test's own."""

import hashlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from datasets.instance_files import open_instances
from tools.make_synthetic import parse_size
from tools.synthetic import fetch as fetching
from tools.synthetic import generate as generating
from tools.synthetic.backgrounds import BACKGROUNDS, STRANGE, USUAL, open_photos
from tools.synthetic.choose import NONE_WEIGHTS, SEVERAL_WEIGHTS, SINGLE_WEIGHTS
from tools.synthetic.generate import Recipe, Studio, generate
from tools.synthetic.layout import ANNOTATIONS, GREFCOCO, IMAGES, LAYOUTS, REFCOCO, SCENES, SUMMARY, novel_names
from tools.synthetic.objects import GROUPS, Kind, list_kinds, pluralize
from tools.synthetic.phrases import vocabulary
from tools.synthetic.referring import Filter, Meaning, View
from tools.synthetic.scene import Placed, draw_scene
from tools.synthetic.sheet import write_sheet
from tools.synthetic.sprites import CANVAS, LEVELS, SpriteSet
from utils.errors import DataError

ROOT = Path(__file__).parent.parent
LISTS = ("names", "base", "novel")
NAMES = (
    "cat", "dog", "cow", "deer", "apple", "lemon", "bus", "car", "taxi", "guitar", "drum", "tv", "key", "house",
    "cup of coffee", "knife", "chair", "kite", "teddy bear", "box",
)  # fmt: skip
RECIPE = Recipe(seed=3, scenes=(110, 12, 10, 16), width=200, height=176)


def draw_sprites():
    """Return flat shapes, each kind in its own colour and form."""
    kinds = [kind for kind in list_kinds() if kind.name in NAMES]
    images = []
    for number in range(len(kinds)):
        picture = np.zeros((96, 96, 4), np.uint8)
        hue = np.array([[[number * 180 // len(kinds), 255, 255]]], np.uint8)
        colour = (*cv2.cvtColor(hue, cv2.COLOR_HSV2RGB)[0, 0].tolist(), 255)
        if number % 3 == 0:
            cv2.circle(picture, (48, 48), 40, colour, -1)
        elif number % 3 == 1:
            cv2.rectangle(picture, (8, 24), (88, 72), colour, -1)
        else:
            cv2.fillPoly(picture, [np.array([(48, 4), (92, 90), (4, 70)])], colour)
        images.append(picture)
    return SpriteSet.from_images(kinds, images)


@pytest.fixture(scope="module")
def sprites():
    return draw_sprites()


@pytest.fixture(scope="module")
def made(sprites, tmp_path_factory):
    out = tmp_path_factory.mktemp("synthetic")
    summary = generate(out, RECIPE, sprites)
    return out, summary


def read_records(out):
    return [json.loads(line) for line in (out / SCENES).read_text().splitlines()]


def read_masks(out):
    """Return annotation id -> bool [H, W], as a reader of the layout decodes them."""
    annotations = json.loads((out / REFCOCO / "instances.json").read_text())["annotations"]
    masks = {}
    for one in annotations:
        (rle,) = one["segmentation"]
        masks[one["id"]] = coco_mask.decode({**rle, "counts": rle["counts"].encode()}).astype(bool)
    return masks


def digest(out):
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and ".textsam_index" not in path.parts]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- the resolver of this test: reads words, looks only at masks, knows nothing of the generator's margins ---

RELATIONS = (
    ("left", r"(?:to|on) the left side of|(?:to|on|at) the left of|(?:just |directly )?left of|further left than"),
    ("right", r"(?:to|on) the right side of|(?:to|on|at) the right of|(?:just |directly )?right of|further right than"),
    ("above", r"(?:up|just|directly|somewhere) above|above|over|(?:up )?higher than"),
    ("below", r"(?:down|just|directly|somewhere) below|below|under|beneath|lower than|underneath"),
    ("beside", r"next to|side by side with|(?:just )?beside|alongside|at the side of|by"),
    ("nearest", r"(?:the )?closest to|nearest to|nearest|close to"),
)
NOT_A_THING = r"(?! (?:to )?(?:the )?(?:picture|image|row|top(?! hat)|bottom|two|three|four|five)\b)"
FILLERS = "that is|which is|that's|located|that lies|lying|that can be seen|placed|found"
RANKS = {"first": 1, "1st": 1, "second": 2, "2nd": 2, "third": 3, "3rd": 3, "fourth": 4, "4th": 4}
EXTREMES = (
    ("left", r"left ?most|(?:far|farthest|furthest)(?: to the)? left"),
    ("right", r"right ?most|(?:far|farthest|furthest)(?: to the)? right"),
    ("top", r"top ?most|highest|uppermost|very top|(?:closest|nearest) to the top"),
    ("bottom", r"bottom ?most|lowest|very bottom|(?:closest|nearest) to the bottom"),
)
PLACE_WORDS = {
    "left": r"\bleft", "right": r"\bright", "top": r"\b(?:top|upper)\b", "bottom": r"\b(?:bottom|lower)\b",
    "middle": r"\b(?:middle|center|central)\b",
}  # fmt: skip


class Reader:
    """Reads a phrase and points at things."""

    def __init__(self, kinds, things, masks, jitter=None):
        self.things = []
        height, width = masks[0].shape
        for number, (thing, mask) in enumerate(zip(things, masks, strict=True)):
            rows, columns = np.nonzero(mask)
            shift = jitter.uniform(-0.008, 0.008, 2) if jitter else (0, 0)
            grow = jitter.uniform(0.95, 1.05) if jitter else 1
            self.things.append({
                "number": number, "kind": thing["kind"], "group": kinds[thing["kind"]].group,
                "x": (columns.min() + columns.max() + 1) / 2 / width + shift[0],
                "y": (rows.min() + rows.max() + 1) / 2 / height + shift[1],
                "box": (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1),
                "size": float(mask.sum()) ** 0.5 * grow,
            })  # fmt: skip
        self.unit = min(height, width)
        self.nouns = {"everything": None, "thing": None, "things": None, "object": None, "objects": None}
        self.nouns |= {word: ("group", name) for name, plural in GROUPS.items() for word in (name, plural)}
        self.nouns |= {word: ("kind", kind.name) for kind in kinds.values() for word in (kind.name, kind.plural)}

    def read(self, text):
        """Return the set of things a phrase means."""
        text = re.sub(rf"\b(?:{FILLERS})\b ?", "", text)
        parts = re.split(r" and also | and | plus | as well as | together with ", text)
        if len(parts) == 2:
            return self.read_one(parts[0].removeprefix("both ")) | self.read_one(parts[1])
        return self.read_one(text)

    def read_one(self, text):
        found = [
            (match.start(), -match.end(), name, match)
            for name, pattern in RELATIONS
            for match in re.finditer(rf"(?<=\w) (?:{pattern})\b{NOT_A_THING}(?= )", text)
        ]
        if not found:
            return {thing["number"] for thing in self.noun_phrase(text)}
        _, _, name, match = min(found)
        heads = self.noun_phrase(text[: match.start()])
        anchors = self.noun_phrase(text[match.end() :])
        assert len(anchors) <= 1, f"{text!r} has an anchor that is not one thing"
        if not anchors:
            return set()
        (anchor,) = anchors
        heads = [thing for thing in heads if thing["number"] != anchor["number"]]
        if name == "nearest":
            return {min(heads, key=lambda thing: self.gap(thing, anchor))["number"]} if heads else set()
        return {thing["number"] for thing in heads if self.holds(name, thing, anchor)}

    def holds(self, name, thing, anchor):
        dx, dy = thing["x"] - anchor["x"], thing["y"] - anchor["y"]
        if name == "beside":
            return self.gap(thing, anchor) < 0.2
        return {"left": dx < -0.04, "right": dx > 0.04, "above": dy < -0.04, "below": dy > 0.04}[name]

    def gap(self, one, other):
        a, b = one["box"], other["box"]
        dx, dy = max(a[0] - b[2], b[0] - a[2], 0), max(a[1] - b[3], b[1] - a[3], 0)
        return float(np.hypot(dx, dy)) / self.unit

    def noun_phrase(self, text):
        at = [(len(noun), noun) for noun in self.nouns if noun in text and re.search(rf"\b{re.escape(noun)}\b", text)]
        assert at, f"{text!r} names nothing"
        noun = max(at)[1]
        rest = re.sub(rf"\b{re.escape(noun)}\b", " ", text, count=1)
        meant = self.nouns[noun]
        pool = [thing for thing in self.things if meant is None or thing[meant[0]] == meant[1]]
        rest = re.sub(r"\b(?:of|in) the (?:picture|image)\b", " ", rest)
        return self.narrow(pool, " ".join(rest.split()))

    def narrow(self, pool, rest):
        rank = re.search(rf"\b({'|'.join(RANKS)})\b.*\bfrom (?:the )?(left|right|top|bottom)", rest)
        if rank:
            order = sorted(pool, key=lambda thing: self.along(thing, rank[2]))
            return order[RANKS[rank[1]] - 1 : RANKS[rank[1]]]
        for side, pattern in EXTREMES:
            if re.search(rf"\b(?:{pattern})\b", rest):
                return sorted(pool, key=lambda thing: self.along(thing, side))[:1]
        kept = pool
        for name, pattern in PLACE_WORDS.items():
            if re.search(pattern, rest):
                kept = self.middle(kept) if name == "middle" else [t for t in kept if self.along(t, name) < 0.5]
        if re.search(r"\b(?:big|large|small|little|tiny)\b", rest):
            big = bool(re.search(r"\b(?:big|large)\b", rest))
            sizes = [thing["size"] for thing in pool] or [0]
            bound = (min(sizes) * max(sizes)) ** 0.5
            kept = [thing for thing in kept if (thing["size"] > bound) == big]
        for pattern, sign in (
            (r"\b(?:biggest|largest|bigger|larger)\b", -1),
            (r"\b(?:small|tini|littl)e(?:r|st)\b", 1),
        ):
            if re.search(pattern, rest):
                kept = sorted(kept, key=lambda thing, sign=sign: sign * thing["size"])[:1]
        return kept

    @staticmethod
    def along(thing, side):
        return {"left": thing["x"], "right": 1 - thing["x"], "top": thing["y"], "bottom": 1 - thing["y"]}[side]

    @staticmethod
    def middle(pool):
        central = [t for t in pool if max(abs(t["x"] - 0.5), abs(t["y"] - 0.5)) < 0.18]
        if len(pool) in (3, 5) and len(central) != 1:
            spread = [max(t[a] for t in pool) - min(t[a] for t in pool) for a in "xy"]
            return [sorted(pool, key=lambda t: t["x" if spread[0] > spread[1] else "y"])[len(pool) // 2]]
        return central


def check_phrases(out, kinds, jitter=None):
    """Read every phrase of a set; return how many of each form were read."""
    kinds = {kind.name: kind for kind in kinds}
    masks = read_masks(out)
    count = {}
    for record in read_records(out):
        reader = Reader(kinds, record["things"], [masks[t["ann_id"]] for t in record["things"]], jitter)
        for phrase in record["phrases"]:
            assert reader.read(phrase["text"]) == set(phrase["targets"]), (record["file_name"], phrase)
            count[phrase["form"]] = count.get(phrase["form"], 0) + 1
    return count


def test_every_phrase_is_read_as_meant(made, sprites):
    """A reader of words and masks, written apart from the generator, finds exactly the targets."""
    count = check_phrases(made[0], sprites.kinds)
    assert set(count) == {*SINGLE_WEIGHTS, *SEVERAL_WEIGHTS, *NONE_WEIGHTS}


def test_phrases_have_a_margin(made, sprites):
    """They are read the same where every place and size is a little off."""
    check_phrases(made[0], sprites.kinds, np.random.default_rng(0))


def test_reader_is_not_blind(made, sprites):
    """The reader disagrees where targets are exchanged."""
    kinds = {kind.name: kind for kind in sprites.kinds}
    masks = read_masks(made[0])
    wrong = total = 0
    for record in read_records(made[0])[:30]:
        reader = Reader(kinds, record["things"], [masks[t["ann_id"]] for t in record["things"]])
        for phrase in record["phrases"]:
            total += 1
            wrong += reader.read(phrase["text"]) != {(t + 1) % len(record["things"]) for t in phrase["targets"]}
    assert wrong > 0.8 * total


def test_held_out_paraphrases_and_strange_backgrounds(sprites, tmp_path, made):
    recipe = replace(RECIPE, scenes=(40, 1, 1, 1), paraphrases="held_out", backgrounds=STRANGE)
    generate(tmp_path, recipe, sprites)
    check_phrases(tmp_path, sprites.kinds)
    check_phrases(tmp_path, sprites.kinds, np.random.default_rng(0))
    strange, usual = read_records(tmp_path), read_records(made[0])
    assert {record["background"] for record in strange} <= set(STRANGE)
    assert not {record["background"] for record in usual} & set(STRANGE)
    said = {phrase["text"] for record in strange for phrase in record["phrases"]}
    words = {phrase["text"] for record in usual for phrase in record["phrases"]}
    assert len(said & words) < 0.35 * len(said)
    assert any("left-hand" in text or "right-hand" in text for text in said)
    assert not any("-hand" in text for text in words)


# --- the layout ---


def test_layout(made):
    out, summary = made
    instances = json.loads((out / REFCOCO / "instances.json").read_text())
    assert instances == json.loads((out / GREFCOCO / "instances.json").read_text())
    refs = pickle.loads((out / REFCOCO / "refs(unc).p").read_bytes())
    assert (out / REFCOCO / "refs(unc).p").read_bytes()[:2] == b"\x80\x02"
    grefs = json.loads((out / GREFCOCO / "grefs(unc).json").read_text())
    images = {image["id"]: image for image in instances["images"]}
    annotations = {one["id"]: one for one in instances["annotations"]}
    categories = {one["id"]: one["name"] for one in instances["categories"]}
    assert len(images) == sum(RECIPE.scenes)
    assert len({ref["ref_id"] for ref in refs}) == len(refs)
    masks = read_masks(out)
    for one in annotations.values():
        mask = masks[one["id"]]
        assert mask.shape == (RECIPE.height, RECIPE.width)
        assert mask.sum() == one["area"]
        x, y, w, h = one["bbox"]
        assert mask[y : y + h, x : x + w].sum() == one["area"]
        assert mask[y].any() or h == 0
        assert one["category_id"] in categories
    for ref in refs:
        image = images[ref["image_id"]]
        assert image["file_name"] == ref["file_name"]
        assert annotations[ref["ann_id"]]["image_id"] == ref["image_id"]
        assert annotations[ref["ann_id"]]["category_id"] == ref["category_id"]
        assert ref["sent_ids"] == [sentence["sent_id"] for sentence in ref["sentences"]]
        for sentence in ref["sentences"]:
            assert sentence["tokens"] == sentence["sent"].split()
            assert sentence["raw"]
    counts = {len(ref["ann_id"]) for ref in grefs}
    assert {1, 2, 3} <= counts
    nothing = [ref for ref in grefs if ref["ann_id"] == [-1]]
    assert nothing
    assert all(sentence["form"] in NONE_WEIGHTS for ref in nothing for sentence in ref["sentences"])
    for image in images.values():
        picture = cv2.imread(str(out / IMAGES / image["file_name"]))
        assert picture.shape == (image["height"], image["width"], 3)
    assert summary["splits"]["train"]["scenes"] == RECIPE.scenes[0]
    assert summary == json.loads((out / SUMMARY).read_text())


def test_the_loaders_read_it(made):
    catalog = pytest.importorskip("datasets.catalog")
    out, _ = made
    refs = pickle.loads((out / REFCOCO / "refs(unc).p").read_bytes())
    for name in ("refcoco|unc|train", "refcoco|unc|testB", "grefcoco|unc|val"):
        dataset = catalog.open_dataset(name, out)
        sample = dataset.load(0)
        assert sample.masks.shape[1:] == sample.image.shape[:2]
        if name.startswith("refcoco"):
            split = name.split("|")[2]
            assert dataset.count_phrases() == sum(len(ref["sentences"]) for ref in refs if ref["split"] == split)


def test_words(made, sprites):
    """The vocabulary holds every word of every phrase, and names no word twice."""
    words = vocabulary(sprites.kinds)
    assert len(words) == len(set(words))
    said = {w for record in read_records(made[0]) for phrase in record["phrases"] for w in phrase["text"].split()}
    assert said <= set(words)


def test_splits_are_disjoint_and_pairs_held_out(made):
    records = read_records(made[0])
    assert len({record["file_name"] for record in records}) == len(records)

    def pairs(meaning):
        found = set()
        if meaning["noun"] not in GROUPS and meaning["noun"] != "thing":
            found = {(meaning["noun"], one["name"]) for one in meaning.get("filters", [])}
            found |= {(meaning["noun"], meaning["selector"])} if "selector" in meaning else set()
        inner = [one["anchor"] for one in meaning.get("filters", []) if "anchor" in one]
        for one in (*inner, meaning.get("anchor"), meaning.get("also")):
            found |= pairs(one) if one else set()
        return found

    by_split = {"testB": [], "others": []}
    for record in records:
        split = "testB" if record["split"] == "testB" else "others"
        by_split[split] += [pairs(phrase["meaning"]) for phrase in record["phrases"]]
    seen = set().union(*by_split["others"])
    assert len(by_split["testB"]) > 20
    assert len(seen) > 100
    assert all(found - seen for found in by_split["testB"])


# --- scenes ---


def test_masks_are_what_is_seen(sprites):
    """Inside each visible mask the picture has the colour of that kind; hidden and outside parts are counted out."""
    photos = open_photos()
    hidden = checked = 0
    for seed in range(25):
        rng = np.random.default_rng(seed)
        scene = draw_scene(rng, sprites, range(len(sprites.kinds)), 176, 200, ("plain", "gradient"), photos)
        if scene is None:
            continue
        for number, thing in enumerate(scene.things):
            mask = scene.owner == number
            assert mask.sum() == thing.area <= thing.full_area * 1.02
            hidden += thing.visible < 0.95
            inner = cv2.erode(mask.astype(np.uint8), np.ones((5, 5))).astype(bool)
            if inner.sum() < 20:
                continue
            index = next(i for i, kind in enumerate(sprites.kinds) if kind.name == thing.kind.name)
            colour = sprites.levels[0][index, CANVAS // 2, CANVAS // 2, :3].astype(float)
            seen = scene.image[inner].astype(float)
            cosine = seen @ colour / np.linalg.norm(seen, axis=1) / np.linalg.norm(colour)
            assert np.quantile(cosine, 0.02) > 0.95, (seed, thing)
            checked += 1
    assert checked > 60
    assert hidden > 10


def test_most_scenes_have_things_of_one_kind_and_none_of_one_family(made, sprites):
    family = {kind.name: kind.family for kind in sprites.kinds}
    records = read_records(made[0])
    several = 0
    for record in records:
        names = [thing["kind"] for thing in record["things"]]
        assert 2 <= len(names) <= 8
        several += len(set(names)) < len(names)
        assert len({family[name] for name in names}) == len(set(names))
    assert several > 0.6 * len(records)


def test_hidden_things_are_not_referred_to(sprites):
    """Neither they nor what they could be mistaken for: not as a target, an anchor or a phrase without target."""
    kinds = {kind.name: kind for kind in sprites.kinds}

    def place(name, box, full_area):
        return Placed(kinds[name], box, 400, full_area, 0.0, 30.0, False)

    dog = place("dog", (150, 80, 170, 100), 400)
    for full_area, clear in ((400, True), (1200, False)):
        cat = place("cat", (20, 80, 40, 100), full_area)
        view = View.of([cat, dog], 200, 200)
        found = view.resolve(Meaning("cat"))
        assert (found is not None and [thing.index for thing in found] == [0]) == clear
        anchored = view.resolve(Meaning("dog", (Filter("right_of", Meaning("cat")),)))
        assert (anchored is not None) == clear
        assert (view.resolve(Meaning("thing", (Filter("left"),))) is not None) == clear
        assert view.resolve(Meaning("dog")) is not None


@pytest.mark.parametrize("name", [*BACKGROUNDS, "photo"])
def test_backgrounds(name):
    from tools.synthetic.backgrounds import draw_background

    photos = open_photos()
    for seed in range(4):
        picture, drawn = draw_background(np.random.default_rng(seed), 96, 130, (name,), photos)
        assert drawn == name
        assert picture.shape == (96, 130, 3)
        assert picture.dtype == np.uint8
    assert name in USUAL or name in STRANGE


# --- determinism, going on, never half ---


def test_same_seed_same_bytes_with_any_number_of_processes(made, sprites, tmp_path):
    folder = tmp_path / "sprites"
    sprites.save(folder)
    out = tmp_path / "out"
    generate(out, RECIPE, SpriteSet.load(folder), folder, workers=2)
    assert digest(out) == digest(made[0])
    assert not (out / generating.PARTS).exists()


def test_scenes_depend_on_their_number_alone(made, sprites, tmp_path):
    studio = Studio(RECIPE, sprites, tmp_path)
    for split, index in ((3, 5), (0, 40)):
        _, record = studio.draw(split, index)
        found = next(r for r in read_records(made[0]) if r["image_id"] == record["image_id"])
        assert [t["text"] for t in found["phrases"]] == [t["text"] for t in record["phrases"]]
    other = Studio(replace(RECIPE, seed=4), sprites, tmp_path)
    assert other.draw(0, 40)[1]["things"] != record["things"]


def test_a_stopped_run_goes_on(made, sprites, tmp_path, monkeypatch):
    draw = Studio.draw_part
    left = [2]

    def stop(self, part):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return draw(self, part)

    monkeypatch.setattr(Studio, "draw_part", stop)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path, RECIPE, sprites)
    assert not any((tmp_path / name).exists() for name in (*ANNOTATIONS, SUMMARY))
    with pytest.raises(DataError, match="other options"):
        generate(tmp_path, replace(RECIPE, seed=9), sprites)
    drawn = []
    monkeypatch.setattr(Studio, "draw_part", lambda self, part: drawn.append(part) or draw(self, part))
    generate(tmp_path, RECIPE, sprites)
    assert len(drawn) == len(generating.list_parts(RECIPE, tmp_path)) - 2
    assert digest(tmp_path) == digest(made[0])
    drawn.clear()
    generate(tmp_path, RECIPE, sprites)
    assert drawn == []


def test_other_options_need_overwrite(sprites, tmp_path):
    small = replace(RECIPE, scenes=(3, 1, 1, 1))
    generate(tmp_path, small, sprites)
    before = digest(tmp_path)
    other = replace(small, scenes=(2, 1, 1, 1))
    with pytest.raises(DataError, match="--overwrite"):
        generate(tmp_path, other, sprites)
    assert digest(tmp_path) == before
    generate(tmp_path, other, sprites, overwrite=True)
    assert len(list((tmp_path / IMAGES).iterdir())) == 5


def test_real_data_is_not_overwritten(sprites, tmp_path):
    path = tmp_path / REFCOCO / "refs(unc).p"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"real")
    for overwrite in (False, True):
        with pytest.raises(DataError, match="not from this tool"):
            generate(tmp_path, RECIPE, sprites, overwrite=overwrite)
    assert digest(tmp_path) == {str(REFCOCO / "refs(unc).p"): hashlib.sha256(b"real").hexdigest()}


def test_contact_sheet(made, tmp_path):
    write_sheet(made[0], tmp_path / "sheet.png")
    assert cv2.imread(str(tmp_path / "sheet.png")).shape[1] > 1000


def test_names_in_the_layout_of_coco(sprites, tmp_path):
    """The same scenes: images to the byte, masks, boxes and names; categories are what may appear."""
    recipe = replace(RECIPE, scenes=(4, 2, 0, 1), kinds=13)
    generate(tmp_path / "refer", recipe, sprites)
    coco = replace(recipe, format="coco")
    generate(tmp_path / "coco", coco, sprites)
    assert generate(tmp_path / "coco", coco, sprites)["recipe"]["format"] == "coco"  # finished: nothing is drawn again
    shown = [path.read_bytes() for path in sorted((tmp_path / "refer" / IMAGES).iterdir())]
    assert shown == [path.read_bytes() for path in sorted((tmp_path / "coco" / "images").rglob("*.jpg"))]
    whole = json.loads((tmp_path / "refer" / REFCOCO / "instances.json").read_text())
    expected = {one["id"]: one | {"segmentation": one["segmentation"][0]} for one in whole["annotations"]}
    found, counts = {}, []
    for split in ("train", "val", "testA", "testB"):
        content = json.loads((tmp_path / "coco" / "annotations" / f"instances_{split}.json").read_text())
        counts.append(len(content["images"]))
        ids = {image["id"] for image in content["images"]}
        assert {one["image_id"] for one in content["annotations"]} == ids
        found |= {one["id"]: one for one in content["annotations"]}
        assert len(content["categories"]) == 13
    assert found == expected and counts == [4, 2, 0, 1]
    names, base, novel = (tmp_path.joinpath("coco", f"{n}.txt").read_text().split("\n") for n in LISTS)
    assert names[:-1] == [category["name"] for category in content["categories"]]
    assert sorted(base + novel) == sorted(["", *names]) and len(novel[:-1]) == 3
    instances = open_instances("coco", tmp_path / "coco/annotations/instances_val.json", tmp_path / "coco/images")
    assert instances.load(0).masks.any()
    write_sheet(tmp_path / "coco", tmp_path / "sheet.png", "coco")
    assert cv2.imread(str(tmp_path / "sheet.png")).any()


def test_coco_is_not_mixed_with_what_is_there(sprites, tmp_path):
    path = tmp_path / "annotations" / "instances_train.json"
    path.parent.mkdir()
    path.write_bytes(b"real")
    with pytest.raises(DataError, match="not from this tool"):
        generate(tmp_path, replace(RECIPE, format="coco"), sprites, overwrite=True)
    assert path.read_bytes() == b"real" and path in [tmp_path / name for name in LAYOUTS["coco"].annotations]


def test_novel_names_are_as_many_as_of_coco():
    names = [kind.name for kind in list_kinds()]
    assert len(novel_names(names[:65])) == 17 and novel_names(names[:65]) == novel_names(names[64::-1])
    assert len(novel_names(names[:2])) == 1


@pytest.mark.parametrize(
    "wrong",
    [{"width": 20}, {"scenes": (0, 0, 0, 0)}, {"backgrounds": ("sky",)}, {"kinds": 3}, {"quality": 0}, {"seed": -1}],
)
def test_wrong_values(wrong, sprites, tmp_path):
    with pytest.raises(DataError, match="Cannot make"):
        generate(tmp_path, replace(RECIPE, **wrong), sprites)
    assert list(tmp_path.iterdir()) == []


def test_size_option():
    assert parse_size("320x240") == (320, 240)
    with pytest.raises(DataError, match="320x240"):
        parse_size("320")


# --- the list of objects and the packages ---


def test_objects():
    kinds = list_kinds()
    assert len(kinds) >= 150
    names = [kind.name for kind in kinds]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z -]+", kind.name + kind.plural) for kind in kinds)
    assert len({kind.unicode_name for kind in kinds}) == len(kinds)
    assert {"animal", "food", "vehicle", "tool", "furniture", "clothing", "plant", "instrument"} <= {
        kind.group for kind in kinds
    }
    family = {kind.name: kind.family for kind in kinds}
    for one in names:
        for other in names:
            if one != other and re.search(rf"\b{re.escape(one)}\b", other):
                assert family[one] == family[other], f"{one} and {other} can share a scene"


@pytest.mark.parametrize(
    ("name", "plural"), [("fox", "foxes"), ("cup of coffee", "cups of coffee"), ("loaf of bread", "loaves of bread"),
                         ("butterfly", "butterflies"), ("key", "keys"), ("wine glass", "wine glasses")],
)  # fmt: skip
def test_plurals(name, plural):
    assert pluralize(name) == plural


def test_sprites(sprites, tmp_path):
    assert [level.shape[1] for level in sprites.levels] == [CANVAS >> n for n in range(LEVELS)]
    colour, alpha = sprites.levels[0][..., :3], sprites.levels[0][..., 3:]
    assert (colour <= alpha).all()
    with pytest.raises(DataError, match="holds no sprites"):
        SpriteSet.load(tmp_path)
    kind = Kind("cat", "cats", "animal", "cat", "cat")
    with pytest.raises(DataError, match="empty"):
        SpriteSet.from_images([kind], [np.zeros((8, 8, 4), np.uint8)])


PACKAGE = fetching.Package("@some/pictures", "1.0.0", hashlib.sha256(b"right").hexdigest(), 100, 1000)


def test_a_wrong_hash_is_refused(tmp_path):
    with pytest.raises(DataError, match="SHA-256"):
        fetching.fetch(PACKAGE, tmp_path, lambda package, path: path.write_bytes(b"wrong"))
    assert list(tmp_path.iterdir()) == []
    path = fetching.fetch(PACKAGE, tmp_path, lambda package, path: path.write_bytes(b"right"))
    assert path.name == "some-pictures-1.0.0.tgz"
    path.write_bytes(b"changed")
    with pytest.raises(DataError, match="SHA-256"):
        fetching.fetch(PACKAGE, tmp_path)
    path.write_bytes(b"x" * 101)
    with pytest.raises(DataError, match="too large"):
        fetching.fetch(PACKAGE, tmp_path)


def write_tarball(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("../escape.webp", b"x", "leads out"),
        ("/etc/escape.webp", b"x", "leads out"),
        ("package/../../escape.webp", b"x", "leads out"),
        ("package\\..\\escape.webp", b"x", "leads out"),
        ("package/link.webp", None, "not a plain file"),
        ("package/large.webp", b"x" * 2000, "unpacks to more"),
    ],
)
def test_hostile_tarballs_are_refused(name, content, match, tmp_path):
    path = tmp_path / "some.tgz"
    write_tarball(path, [("package/fine.webp", b"fine"), (name, content)])
    with pytest.raises(DataError, match=match):
        fetching.read_members(path, lambda _: True, 1000)
    write_tarball(path, [("package/fine.webp", b"fine"), ("package/other.md", b"other")])
    assert fetching.read_members(path, lambda n: n.endswith("webp"), 1000) == {"package/fine.webp": b"fine"}
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match="cannot be read"):
        fetching.read_members(path, lambda _: True, 1000)


def test_without_network_one_line_and_nothing_written(tmp_path):
    """No npm, a registry that does not answer: exit status 2, one line with a remedy, no files."""
    environment = os.environ | {
        "PATH": "/nowhere",
        "npm_config_registry": "http://127.0.0.1:9",
        "NPM_CONFIG_REGISTRY": "http://127.0.0.1:9",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    command = [sys.executable, "-m", "tools.make_synthetic", "--out", str(tmp_path / "out"), "--scenes", "1"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "--sprites" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
