"""Masks from boxes and points: SA-1B in every layout, what is drawn, the step, and train.py as a user runs it."""

import importlib
import io
import json
import pickle
import sys
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from configs.nested import from_values
from configs.training import LossArgs, OptimArgs, TrainConfig
from datasets import sa1b
from datasets.mixture import Shares, training_steps
from datasets.prompts import PromptCollate, choose, distinct_ranks, draw_points, open_prompt_stream
from datasets.sa1b import MaskFolder, MaskShard, parse, scan
from model import load_predictor
from model.checkpoints.load import build_model, save_model
from model.losses import hypothesis_losses
from model.prompt_step import PromptStep, overlaps, prepare_prompted, prompt_inputs, published_names
from model.prompts import read_prompts, to_input
from model.registry import model_config
from model.training import optimizer_groups
from model.types import Prompts
from tests.sa1b_layouts import annotation, draw, write_flat, write_repository, write_shard
from tests.train_command import curve, records, train, train_processes
from utils.errors import DataError, ImageError, ModelError, TextSAMError, TrainingError
from utils.image import read_image
from utils.mask_validation import boundary_iou, mask_iou
from utils.run_folder import RunFolder

MODEL = "efficientvit-sam-pico"
TAKERS = ("efficientvit-sam-pico", "sam-vit-pico", "sam2-hiera-pico")
NUMBERS = range(1, 9)
LOSS = LossArgs(bce=20.0, dice=1.0, points=256)


def segmenter(name=MODEL, seed=0):
    torch.manual_seed(seed)
    return build_model(model_config(name))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return a folder with the same eight images in every layout: flat, repo, sa_0.tar and sa_1.tar."""
    root = tmp_path_factory.mktemp("sa1b")
    flat = write_flat(root / "flat", NUMBERS)
    write_repository(root / "repo", flat, NUMBERS)
    write_shard(root / "sa_0.tar", flat, NUMBERS[:5])
    write_shard(root / "sa_1.tar", flat, NUMBERS[5:])
    return root


def config(data, sets, prompts=None, /, **options):
    values = {
        "data": {"root": str(data), "sets": sets, "workers": 0, "batch_size": 2, "held_out": 0.0},
        "prompts": {"masks": 4} | (prompts or {}),
        "loss": {"bce": 20, "dice": 1, "points": 256},
    }
    for group, changes in options.items():
        values[group] = values.get(group, {}) | changes
    return from_values(TrainConfig, values, "test")


# where images and masks are read from


def test_all_layouts_hold_the_same(data):
    flat, repo = MaskFolder("flat", data / "flat"), MaskFolder("repo", data / "repo")
    shards = [MaskShard(f"sa_{i}.tar", data / f"sa_{i}.tar") for i in range(2)]
    assert len(flat) == len(repo) == len(shards[0]) + len(shards[1]) == 8
    for number in range(8):
        image, masks = (
            read_image(data / "flat" / f"sa_{number + 1}.jpg"),
            draw(number + 1, 5, None or flat.load(number).image.shape[:2])[1],
        )
        shard, place = (shards[0], number) if number < 5 else (shards[1], number - 5)
        for item in (flat.load(number), repo.load(number), pickle.loads(pickle.dumps(shard)).load(place)):
            assert np.array_equal(item.image, image) and item.key.endswith(f"/sa_{number + 1}")
            assert np.array_equal(sa1b.decode_masks(item.rles, "x"), masks)
            x, y, w, h = item.boxes[2]
            assert masks[2, int(y) : int(y + h), int(x) : int(x + w)].sum() == masks[2].sum()


def test_the_index_of_a_shard_is_kept(data, tmp_path, monkeypatch):
    plain = MaskShard("s", data / "sa_0.tar").members
    assert MaskShard("s", data / "sa_0.tar", index_folder=str(tmp_path)).members == plain
    with monkeypatch.context() as patch:
        patch.setattr(sa1b, "scan", None)  # not looked through again
        assert MaskShard("s", data / "sa_0.tar", index_folder=str(tmp_path)).members == plain
    copy = tmp_path / "sa_0.tar"
    copy.write_bytes((data / "sa_1.tar").read_bytes())
    before = MaskShard("s", copy, index_folder=str(tmp_path)).members
    copy.write_bytes((data / "sa_0.tar").read_bytes())
    assert MaskShard("s", copy, index_folder=str(tmp_path)).members == plain != before


def add(archive, name, content=b"x", **changes):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in changes.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(content))


HOSTILE = {
    "absolute path": ("/etc/sa_9.jpg", {}, "leads out"),
    "path that leads up": ("a/../../sa_9.jpg", {}, "leads out"),
    "symbolic link": ("sa_9.jpg", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd", "size": 0}, "link"),
    "hard link": ("sa_9.json", {"type": tarfile.LNKTYPE, "linkname": "sa_1.json", "size": 0}, "link"),
    "device": ("sa_9.jpg", {"type": tarfile.CHRTYPE, "size": 0}, "device"),
    "lonely image": ("sa_9.jpg", {}, "sa_9 has no partner"),
    "the same name twice": ("sa_1.jpg", {}, "there twice"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_members_are_named(what, data, tmp_path):
    name, changes, text = HOSTILE[what]
    path = write_shard(tmp_path / "sa_0.tar", data / "flat", [1])
    with tarfile.open(path, "a") as archive:
        add(archive, name, **changes)
    with pytest.raises(DataError, match=text) as caught:
        scan(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_huge_members_are_refused_unread(data, tmp_path, monkeypatch):
    path = write_shard(tmp_path / "sa_0.tar", data / "flat", [1])
    monkeypatch.setattr(sa1b, "MAX_JSON_BYTES", 100)
    with pytest.raises(DataError, match=r"sa_1\.json' has .* over the bound of 100"):
        scan(path)
    with pytest.raises(DataError, match="over 0 MB"):
        MaskFolder("flat", data / "flat").load(0)
    monkeypatch.undo()
    with tarfile.open(path, "a") as archive:  # a header that asks for a terabyte
        header = tarfile.TarInfo("pax")
        header.type, header.size = tarfile.XHDTYPE, 1 << 33
        archive.fileobj.write(header.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(DataError, match="header of"):
        scan(path)


def test_damaged_shards(data, tmp_path):
    whole = (data / "sa_0.tar").read_bytes()
    path = tmp_path / "sa_0.tar"
    for content in (b"", b"no tar at all" * 100, whole[: len(whole) // 3]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"sa_0\.tar"):
            scan(path)
    members = scan(data / "sa_0.tar")
    third = members[2][1] - 512  # where the header of the third image is
    for content, text in (
        (whole[:third] + b"\xff" * 512 + whole[third + 512 :], "damaged after 2 images"),
        (whole[:third], "damaged after 2 images, or cut off"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=text):
            scan(path)
    path.write_bytes(whole)
    shard = MaskShard("s", path)
    path.write_bytes(whole[:4096])
    with pytest.raises(DataError, match="is cut off"):
        shard.load(4)
    path.write_bytes(whole[: members[0][1]] + b"\0" * members[0][2] + whole[members[0][1] + members[0][2] :])
    with pytest.raises(ImageError, match=r"sa_1\.jpg"):
        MaskShard("s", path).load(0)


def broken(change):
    image, masks = draw(1)
    content = annotation(image, masks, 1)
    change(content)
    return image, json.dumps(content).encode()


BROKEN = {
    "other size": (lambda c: c["annotations"][1]["segmentation"].update(size=[81, 112]), "mask 1 is no RLE"),
    "polygon": (lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3, 4, 5, 6]]), "mask 0 is no RLE"),
    "counts that are a list": (lambda c: c["annotations"][0]["segmentation"].update(counts=[5]), "mask 0 is no RLE"),
    "no box": (lambda c: c["annotations"][2].pop("bbox"), "'bbox' of mask 2 is None"),
    "endless box": (lambda c: c["annotations"][2].update(bbox=[0, 0, float("inf"), 3]), "'bbox' of mask 2"),
    "box that is a number": (lambda c: c["annotations"][0].update(bbox=3), "'bbox' of mask 0"),
    "no masks": (lambda c: c.update(annotations=[]), "no list of masks"),
    "mask that is text": (lambda c: c.update(annotations=["x"]), "mask 0 is no RLE"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_masks_are_named(what):
    change, text = BROKEN[what]
    image, content = broken(change)
    with pytest.raises(DataError, match=text) as caught:
        parse(content, image, "k", "there/sa_1.json", 0)
    assert str(caught.value).startswith("there/sa_1.json")


@pytest.mark.parametrize("content", [b"{", b"[1]", b"[" * 100_000, b"\xff\xfe{}", b"null"])
def test_what_is_no_json(content):
    with pytest.raises(DataError, match=r"sa_1\.json"):
        parse(content, draw(1)[0], "k", "sa_1.json", 0)


def test_runs_that_leave_the_image_are_not_decoded():
    """The decoder would write behind its memory."""
    image, content = broken(lambda c: c["annotations"][0]["segmentation"].update(counts="o" * 7 + "0" + "5" * 40))
    item = parse(content, image, "k", "sa_1.json", 0)
    with pytest.raises(DataError, match="encoding"):
        sa1b.decode_masks(item.rles, "sa_1")


def test_folders_that_cannot_be_used(data, tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        MaskFolder("x", tmp_path / "none")
    with pytest.raises(DataError, match="neither"):
        MaskFolder("x", tmp_path)
    (tmp_path / "sa_1.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match="have no partner, sa_1 among them"):
        MaskFolder("x", tmp_path)
    (tmp_path / "sa_images_ids.txt").write_text("1\n../../etc/passwd\n")
    with pytest.raises(DataError, match="is no id"):
        MaskFolder("x", tmp_path)
    (tmp_path / "sa_images_ids.txt").write_text("1\n")
    with pytest.raises(DataError, match=r"no such file of masks: .*masks/sa_1\.json"):
        MaskFolder("x", tmp_path).load(0)
    with pytest.raises(DataError, match=r"no \.tar fits"):
        open_prompt_stream(config(data, ["sb_*.tar"]))
    with pytest.raises(DataError, match=r"no such \.tar"):
        open_prompt_stream(config(data, ["sb_0.tar"]))


# what is drawn


def test_masks_are_repeated_only_where_there_are_too_few():
    rng = np.random.default_rng(0)
    assert len(set(choose(100, 64, rng).tolist())) == 64
    found = choose(5, 12, rng)
    counts = np.bincount(found, minlength=5)
    assert len(found) == 12 and set(counts) == {2, 3} and found[:10].tolist() == [0, 1, 2, 3, 4] * 2


def test_points_are_spread_over_the_mask_and_differ():
    counts = np.array([3, 5, 200])
    chances = np.random.default_rng(0).random((3, 3))
    for one, count in zip(distinct_ranks(counts, chances), counts, strict=True):
        assert len(set(one.tolist())) == 3 and one.min() >= 0 and one.max() < count
    many = distinct_ranks(np.full(30_000, 4), np.random.default_rng(1).random((30_000, 2)))
    pairs = np.bincount(many[:, 0] * 4 + many[:, 1], minlength=16).reshape(4, 4) / 30_000
    assert not np.diag(pairs).any() and np.abs(pairs[~np.eye(4, dtype=bool)] - 1 / 12).max() < 0.01
    masks = np.zeros((2, 6, 9), np.uint8)
    masks[0, 2:4, 3:8], masks[1, 5, 1:4] = 7, 1
    drawn = draw_points(masks, np.random.default_rng(2).random((2, 3)))
    for mask, points in zip(masks, drawn.astype(int), strict=True):
        assert all(mask[y, x] for x, y in points) and len({tuple(point) for point in points}) == 3
    by_hand = [np.argwhere(mask) for mask in masks]  # the slow way, of the same chances
    ranks = distinct_ranks(np.array([10, 3]), np.random.default_rng(2).random((2, 3)))
    for pixels, rank, points in zip(by_hand, ranks, drawn, strict=True):
        assert np.array_equal(pixels[rank][:, ::-1], points)
    assert draw_points(masks, np.zeros((2, 4))) is None


def batch_of(data, model, prompts=None, positions=(0, 1), /, **options):
    stream = open_prompt_stream(config(data, ["flat"], prompts, **options))
    spec = replace(model.segmenter.own_image_spec, filter="torch-antialias")
    collate = PromptCollate(spec, model.segmenter.prompt_spec(spec).size)
    return collate([stream[position] for position in positions])


def test_boxes_lie_around_their_masks_also_mirrored(data):
    model = segmenter()
    for mirror in (0.0, 1.0):
        batch = batch_of(data, model, {"boxes": 1.0}, data={"flip": mirror})
        assert batch.points is None and batch.phrases == ("box",) * 8
        masks = torch.cat(batch.masks)
        for box, mask in zip(batch.boxes / 2, masks, strict=True):  # the frame of prompts is twice as wide
            y, x = (mask > 127).nonzero().T
            around = torch.tensor([x.min(), y.min(), x.max() + 1, y.max() + 1])
            assert (box - around).abs().max() <= 1.01
    plain, mirrored = (batch_of(data, model, {"boxes": 1.0}, data={"flip": m}) for m in (0.0, 1.0))
    width = plain.sizes[0][1]
    assert torch.allclose(mirrored.pixels[0, :, :, :width], plain.pixels[0, :, :, :width].flip(-1), atol=1e-4)


def test_points_lie_in_their_masks(data):
    model = segmenter()
    batch = batch_of(data, model, {"boxes": 0.0, "points": 5})
    assert batch.boxes is None and batch.points.shape[:2] == (8, int(batch.phrases[0].split()[0]))
    for points, mask in zip((batch.points / 2).long(), torch.cat(batch.masks), strict=True):
        assert all(mask[y, x] > 0 for x, y in points)


def test_what_is_drawn_has_the_chances_that_were_asked_for(data):
    stream = open_prompt_stream(config(data, ["flat"], {"points": 3, "masks": 2}, data={"flip": 0.25}))
    drawn = [stream[i] for i in range(400)]
    points = np.bincount([one.points for one in drawn], minlength=4) / 400
    assert abs(points[0] - 0.5) < 0.08 and np.abs(points[1:] - 1 / 6).max() < 0.06
    assert abs(np.mean([one.is_multi for one in drawn]) - 0.5) < 0.08
    assert abs(np.mean([one.is_mirrored for one in drawn]) - 0.25) < 0.08
    assert len({one.seed for one in drawn}) == 400


def test_a_small_mask_gets_its_box(data):
    model = segmenter()
    stream = open_prompt_stream(config(data, ["flat"]))
    sample = replace(stream[0], points=9000, chances=np.random.default_rng(0).random((4, 9000)))
    spec = model.segmenter.own_image_spec
    assert PromptCollate(spec, 256)([sample, stream[1]]).boxes is not None


def test_shards_and_folders_give_the_same_batches(data):
    """In another order: a shard is read from its start to its end."""
    model = segmenter()
    folder = open_prompt_stream(config(data, ["flat"], {"val_masks": 2}))
    shards = open_prompt_stream(config(data, ["sa_*.tar"]))
    order = [shards[i].item.key for i in range(8)]
    assert [key.split("/")[1] for key in order] in (
        [f"sa_{n}" for n in (1, 2, 3, 4, 5, 6, 7, 8)],
        [f"sa_{n}" for n in (6, 7, 8, 1, 2, 3, 4, 5)],
    )
    by_key = {folder[i].item.key.split("/")[1]: folder[i].item for i in range(8)}
    collate = PromptCollate(model.segmenter.own_image_spec, 256)
    for position in range(8):
        sample = shards[position]
        twin = replace(sample, item=by_key[sample.item.key.split("/")[1]])
        mine, theirs = collate([sample]), collate([twin])
        assert torch.equal(mine.pixels, theirs.pixels) and torch.equal(mine.masks[0], theirs.masks[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_workers_share_a_shard_and_go_on_anywhere(workers, data):
    stream = open_prompt_stream(config(data, ["sa_*.tar"]))
    spec = segmenter().segmenter.own_image_spec
    collate = PromptCollate(spec, 256)
    alone = [b for step in training_steps(stream, collate, Shares(2, 1, 0, 1), 0, 6, 0) for b in step]
    later = [b for step in training_steps(stream, collate, Shares(2, 1, 0, 1), 3, 6, workers) for b in step]
    for one, other in zip(alone[3:], later, strict=True):
        assert one.keys == other.keys and torch.equal(one.pixels, other.pixels) and one.seeds == other.seeds
    two = [
        [b for step in training_steps(stream, collate, Shares(1, 1, rank, 2), 0, 6, workers) for b in step]
        for rank in range(2)
    ]
    for whole, *halves in zip(alone, *two, strict=True):
        assert whole.keys == halves[0].keys + halves[1].keys


# the step


def prompted(name=MODEL, loss=LOSS):
    model = segmenter(name)
    prepare_prompted(model, loss)
    return PromptStep(model.train(), loss)


def by_hand(logits, target, points, generator):
    """Return cross-entropy and dice of one mask [h, w], one point after the other."""
    candidates = torch.rand(1, 3 * points, 2, generator=generator)[0]
    anywhere = torch.rand(1, points - int(0.75 * points), 2, generator=generator)[0]

    def at(grid, point):
        side = torch.tensor([grid.shape[1], grid.shape[0]])
        x, y = (point * side - 0.5).tolist()
        total = 0.0
        for row in (int(np.floor(y)), int(np.floor(y)) + 1):
            for column in (int(np.floor(x)), int(np.floor(x)) + 1):
                if 0 <= row < grid.shape[0] and 0 <= column < grid.shape[1]:
                    total += float(grid[row, column]) * (1 - abs(y - row)) * (1 - abs(x - column))
        return total

    certain = sorted(candidates, key=lambda point: abs(at(logits, point)))
    chosen = [*certain[: int(0.75 * points)], *anywhere]
    entropy, overlap, area = 0.0, 0.0, 0.0
    for point in chosen:
        chance, truth = 1 / (1 + np.exp(-at(logits, point))), at(target, point)
        entropy -= truth * np.log(chance) + (1 - truth) * np.log(1 - chance)
        overlap, area = overlap + chance * truth, area + chance + truth
    return [entropy / points, 1 - (2 * overlap + 1) / (area + 1)]


def test_losses_at_points_are_those_of_a_slow_twin():
    torch.manual_seed(0)
    logits, target = torch.randn(1, 1, 8, 8) * 3, F.interpolate(torch.rand(1, 1, 4, 4), (16, 16), mode="bilinear")[0]
    found = hypothesis_losses(logits, target, 40, torch.Generator().manual_seed(5))
    expected = by_hand(logits[0, 0], target[0], 40, torch.Generator().manual_seed(5))
    assert np.allclose(found[0, 0].numpy(), expected, atol=1e-4)


def test_sampling_small_logits_is_as_good_as_resizing_them_first():
    torch.manual_seed(0)
    low = F.interpolate(torch.randn(3, 1, 6, 6) * 4, (32, 32), mode="bicubic")
    target = (F.interpolate(low, (128, 128), mode="bilinear") > 1)[:, 0].float()
    full = F.interpolate(low, (128, 128), mode="bilinear", align_corners=False)
    small = hypothesis_losses(low, target, 4000, torch.Generator().manual_seed(0))
    large = hypothesis_losses(full, target, 4000, torch.Generator().manual_seed(0))
    assert torch.allclose(small, large, rtol=0.03)


def test_the_best_of_three_or_the_single_mask_learns(data):
    step = prompted()
    batch = batch_of(data, step.model, {"boxes": 1.0})
    inputs = list(prompt_inputs(batch))
    with torch.no_grad():
        prediction = step.predict(*inputs[:4])
        for is_multi in (False, True):
            inputs[5] = (is_multi, is_multi)
            found = step(*inputs)
            hypotheses = range(1, 4) if is_multi else range(1)
            for image, rows in enumerate((slice(0, 4), slice(4, 8))):
                logits = prediction.logits[rows, hypotheses.start : hypotheses.stop]
                losses = step.mask_losses(logits, batch.masks[image], batch.seeds[image])
                for row, several in zip(found[rows], losses, strict=True):
                    least = min(several, key=lambda pair: 20 * pair[0] + pair[1])
                    assert torch.allclose(row, least, rtol=1e-4)


@pytest.mark.parametrize("name", TAKERS)
@pytest.mark.parametrize("boxes", [0.0, 1.0])
def test_what_is_trained_gets_a_gradient_whatever_the_prompt(name, boxes, data):
    """Processes whose batches have boxes meet others whose have points: none may wait for a gradient."""
    step = prompted(name)
    batch = batch_of(data, step.model, {"boxes": boxes})
    losses = step(*prompt_inputs(batch))
    assert losses.shape == (8, 2) and losses.isfinite().all()
    losses.sum().backward()
    for key, parameter in step.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key
    trained = {key for key, p in step.named_parameters() if p.requires_grad}
    assert not any("iou_prediction_head" in key for key in trained)
    assert any("image_encoder" in key or "vision_encoder" in key for key in trained)
    with_scores = prompted(name, replace(LOSS, iou=1.0))
    assert any("iou_prediction_head" in key for key, p in with_scores.named_parameters() if p.requires_grad)
    assert with_scores(*prompt_inputs(batch)).shape == (8, 3)


def test_all_images_together_are_what_they_are_alone(data):
    step = prompted()
    step.eval()  # batch norm looks at the whole batch while it trains
    both = batch_of(data, step.model, {"boxes": 1.0})
    with torch.no_grad():
        together = step(*prompt_inputs(both))
        alone = [step(*prompt_inputs(batch_of(data, step.model, {"boxes": 1.0}, (i,)))) for i in (0, 1)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-4)


def test_one_call_of_each_part(data, monkeypatch):
    step = prompted()
    batch = batch_of(data, step.model)
    calls = []
    for owner in ("image_encoder", "mask_decoder.transformer", "prompt_encoder"):
        module = step.model.segmenter.get_submodule(owner)
        module.register_forward_hook(lambda *_, owner=owner: calls.append(owner))
    step(*prompt_inputs(batch))
    assert sorted(calls) == ["image_encoder", "mask_decoder.transformer", "prompt_encoder"]


def test_a_prompt_is_what_the_predictor_makes_of_it(data, tmp_path):
    """Boxes on the frame of prompts, and the embedding that goes with them."""
    model = segmenter().eval()
    save_model(model, tmp_path)
    predictor = load_predictor(tmp_path, "cpu")
    item = MaskFolder("flat", data / "flat").load(0)
    x, y, w, h = item.boxes[0]
    size = item.image.shape[:2]
    given = read_prompts(size, None, None, [x, y, x + w, y + h], None, side=64)
    prompts = to_input(given, predictor.prompt_spec, size, model)
    stream = open_prompt_stream(config(data, ["flat"], {"boxes": 1.0}))
    sample = replace(stream[0], item=item, chosen=np.array([0]), is_mirrored=False)
    batch = PromptCollate(model.segmenter.own_image_spec, 256)([sample])
    assert torch.allclose(batch.boxes, prompts.boxes, atol=0.1)
    step = PromptStep(model, LOSS)
    with torch.no_grad():
        mine = step.predict(*prompt_inputs(batch)[:4])
        sparse, dense = model.segmenter.encode_prompts(Prompts(boxes=batch.boxes))
        theirs = model.segmenter.decode(model.segmenter.encode_image(batch.pixels), sparse, dense)
    assert torch.equal(mine.logits, theirs.logits)


def test_overlaps_are_of_the_masks():
    masks = torch.zeros(1, 8, 8, dtype=torch.uint8)
    masks[0, :4] = 255
    logits = -torch.ones(1, 2, 4, 4)
    logits[0, 0, :1], logits[0, 1, :2, :2] = 1, 1
    assert overlaps(logits, masks).tolist() == [[0.5, 0.5]]


def test_boundaries_count_alone():
    truth = torch.zeros(2, 100, 100, dtype=torch.bool)
    truth[:, 20:80, 20:80] = True
    found = truth.clone()
    found[0, 40:60, 40:60] = False  # a hole far inside: the outer boundary is still right
    assert mask_iou(found, truth)[0] == pytest.approx(0.8889, abs=1e-3) and boundary_iou(found, truth)[1] == 1
    ring = 60 * 60 - 54 * 54
    hole = 26 * 26 - 20 * 20
    assert boundary_iou(found, truth)[0] == pytest.approx(ring / (ring + hole))
    assert mask_iou(truth[:, :5, :5], truth[:, :5, :5]).tolist() == [1, 1]


def test_decay_goes_by_the_published_names():
    model = segmenter()
    prepare_prompted(model, LOSS)
    step = PromptStep(model, LOSS)
    names = published_names(model.segmenter, model.config.family)
    groups = optimizer_groups(step, OptimArgs(weight_decay=0.1, decay="names"), names)
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in model.segmenter.named_parameters():
        if parameter.requires_grad:
            theirs = names[name]
            assert decays[id(parameter)] == (0 if "norm" in theirs or "bias" in theirs else 0.1), theirs
    upscale = model.segmenter.mask_decoder.upscale_layer_norm.weight  # published: output_upscaling.1, without "norm"
    assert decays[id(upscale)] == 0.1 and decays[id(model.segmenter.image_encoder.norm.weight)] == 0


def test_it_can_be_learned(data):
    torch.manual_seed(0)
    step = prompted()
    batches = [prompt_inputs(batch_of(data, step.model, {"boxes": b}, data={"flip": 0.0})) for b in (1.0, 0.0)]
    optimizer = torch.optim.AdamW([p for p in step.parameters() if p.requires_grad], lr=1e-3)
    curve = []
    for i in range(24):
        optimizer.zero_grad()
        loss = (step(*batches[i % 2]) @ torch.tensor([20.0, 1.0])).mean()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    assert np.mean(curve[-4:]) < 0.5 * np.mean(curve[:4])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"distill": {"teacher": "x"}}, "ask for different trainings"),
        ({"loss": {"pointing": 1}}, r"loss\.pointing: boxes and points"),
        ({"loss": {"points": 0}}, r"loss\.points 0"),
        ({"data": {"feature_cache": "x"}}, "needs a frozen image encoder"),
        ({"data": {"sampling": "shuffle"}}, r"data\.sampling: not read where prompts\.masks"),
        ({"model": {"train_image_encoder": True}}, r"model\.train_image_encoder"),
        ({"prompts": {"masks": -1}}, r"prompts\.masks -1"),
        ({"prompts": {"masks": 1, "boxes": 2}}, r"prompts\.boxes 2"),
        ({"prompts": {"masks": 1, "points": 0}}, r"prompts\.points 0"),
    ],
)
def test_options_that_do_not_fit(change, text, data):
    with pytest.raises(TrainingError, match=text):
        config(data, ["flat"], **change) if "prompts" not in change else config(data, ["flat"], change["prompts"])


@pytest.mark.parametrize(
    ("name", "text"),
    [("efficient-sam-pico", "takes no points and no boxes"), ("evf-sam-vit-pico-pico", "--model.name")],
)
def test_models_that_cannot_be_prompted(name, text, data):
    from model.tasks import open_task

    with pytest.raises(ModelError, match=text):
        open_task(config(data, ["flat"], {"masks": 2, "from_scratch": True}, model={"name": name}), {}, None, {})


# train.py


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Return a folder of a segmenter that stands for a distilled one."""
    folder = tmp_path_factory.mktemp("start")
    save_model(segmenter(), folder)
    return folder


def options(data, start, out, sets="flat", batch=2, steps=6):
    weights = ["--model.checkpoint", start] if start else ["--model.name", MODEL]
    return [
        *weights, "--data.root", data, "--data.sets", sets, "--data.held_out", "0.25", "--data.workers", "0",
        "--data.batch_size", batch, "--data.flip", "0.5", "--prompts.masks", 4, "--loss.bce", 20, "--loss.points", 256,
        "--optim.global_batch", 2, "--optim.steps", steps, "--optim.lr", "1e-3", "--optim.warmup", 0,
        "--optim.clip", 0, "--optim.clip_value", 2, "--optim.decay", "names", "--optim.weight_decay", "0.1",
        "--optim.schedule", "constant", "--run.out", out, "--run.log_every", 1, "--run.device", "cpu", "--val.every", 3,
    ]  # fmt: skip


def test_a_run_from_shards_measures_itself_and_can_be_prompted(data, start, tmp_path):
    out = tmp_path / "run"
    done = train_processes(*options(data, start, out, "sa_*.tar"))
    assert done.returncode == 0, done.stderr
    assert "measured" in done.stderr and "image_encoder" in done.stderr
    rows = records(out)
    assert rows[-1]["loss"] == pytest.approx(20 * rows[-1]["bce"] + rows[-1]["dice"])
    assert np.mean([row["loss"] for row in rows[3:]]) < np.mean([row["loss"] for row in rows[:3]])
    for row in records(out, "val"):
        assert 0 <= row["iou"] <= 1 and 0 <= row["boundary_iou"] <= 1 and row["loss"] > 0
    assert read_image(out / "pictures" / "held_out" / "step_00000006.png").shape == (2 * 256, 2 * 256, 3)
    predictor = load_predictor(out / "best", "cpu")
    predictor.set_image(data / "flat" / "sa_1.jpg")
    assert predictor.predict(points=[[20, 20]]).masks.shape[0] == 1


def test_without_a_distilled_checkpoint_nothing_begins(data, tmp_path):
    with pytest.raises(TrainingError, match=r"--model\.checkpoint runs/NAME/best.*--prompts\.from_scratch"):
        train(*options(data, None, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    assert train(*options(data, None, tmp_path / "run", steps=1), "--prompts.from_scratch") == 0


def test_it_goes_on_as_if_it_had_never_stopped(data, start, tmp_path):
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    for steps in (3, 6):
        assert train(*options(data, start, cut, "sa_*.tar", steps=steps)) == 0
    assert train(*options(data, start, whole, "sa_*.tar")) == 0
    assert np.array_equal(curve(cut), curve(whole))
    assert records(cut, "val")[-1]["iou"] == records(whole, "val")[-1]["iou"]
    assert RunFolder(cut).steps() == RunFolder(whole).steps() == [3, 6]


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(data, start, tmp_path):
    """Prompts and points are drawn by position, so it makes no difference which process takes an image."""
    alone, two = tmp_path / "alone", tmp_path / "two"
    assert train(*options(data, start, alone, batch=1)) == 0
    done = train_processes(*options(data, start, two, batch=1), ranks=2)
    assert done.returncode == 0, done.stderr
    assert np.abs(curve(two) - curve(alone)).max() < 1e-3 * np.abs(curve(alone)).max()


def test_a_broken_image_stops_the_run_in_one_line(data, start, tmp_path, capsys):
    from utils.errors import run_main

    flat = write_flat(tmp_path / "data" / "flat", range(1, 5))
    (flat / "sa_2.json").write_text("{")
    with pytest.MonkeyPatch.context() as patch:
        arguments = options(tmp_path / "data", start, tmp_path / "run")
        patch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            run_main(importlib.import_module("train").main)
    assert stop.value.code == 2
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ") and "sa_2.json" in line]
    assert issubclass(DataError, TextSAMError)
