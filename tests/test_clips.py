"""Clips: how they are drawn, read and learned from."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from configs.training import DataArgs, LossArgs, ModelArgs, OptimArgs, TrainConfig
from datasets.clips import ClipCollate, ClipMixture
from datasets.videos import open_video_set
from model.clip_step import ClipStep
from model.freeze import choose_trained, leave_out_idle
from model.tracker import Found
from model.training import ClipInputs, optimizer_groups, set_memory_dropout
from model.video import VideoPredictor
from tests.conftest import PICO, ROOT, TOKENIZER, pico_model
from tests.test_synthetic import draw_sprites
from tools.synthetic.clips import ROOT as CLIPS
from tools.synthetic.clips import ClipRecipe, ClipStudio, draw_clip, make_clips
from tools.synthetic.generate import Recipe
from utils.errors import DataError, ModelError, TrainingError
from utils.image import read_image
from utils.masks import IGNORE
from utils.tokenizer import PhraseTokenizer

RECIPE = ClipRecipe(Recipe(seed=5, width=128, height=112), (5, 2), 10)
LOSS = LossArgs(points=256, iou=0.5, presence=0.5)
CLIPS_OF_4 = DataArgs(clip_frames=4)


@pytest.fixture(scope="module")
def sprites():
    return draw_sprites()


@pytest.fixture(scope="module")
def made(sprites, tmp_path_factory):
    out = tmp_path_factory.mktemp("clips")
    make_clips(out, RECIPE, sprites)
    return out


def bytes_of(out):
    return {path.relative_to(out): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


# --- drawing ---


def test_a_clip_begins_as_its_scene_and_moves(sprites, tmp_path):
    studio = ClipStudio(RECIPE, sprites, tmp_path)
    scene, _, rng = studio.studio.compose(100, 3)
    images, owners = zip(*draw_clip(rng, sprites, scene, 10), strict=True)
    assert np.array_equal(images[0], scene.image)
    assert np.array_equal(owners[0], scene.owner)
    assert len(images) == 10
    assert all(image.shape == (112, 128, 3) and image.dtype == np.uint8 for image in images)
    assert any((owner != owners[0]).any() for owner in owners)
    assert set(np.unique(owners)) <= {-1, *range(len(scene.things))}


def test_things_leave_and_come_back(sprites, tmp_path):
    studio = ClipStudio(RECIPE, sprites, tmp_path)
    came_back = 0
    for index in range(12):
        scene, _, rng = studio.studio.compose(100, index)
        owners = np.stack([owner for _, owner in draw_clip(rng, sprites, scene, 24)])
        for number in range(len(scene.things)):
            seen = (owners == number).any((1, 2))
            gone = np.flatnonzero(~seen)
            came_back += bool(len(gone) and seen[gone[-1] :].any())
    assert came_back >= 2


def test_same_seed_same_bytes_and_a_stopped_run_goes_on(made, sprites, tmp_path):
    make_clips(tmp_path, RECIPE, sprites)
    assert bytes_of(tmp_path) == bytes_of(made)
    clip = tmp_path / CLIPS / "train/Annotations/clip_train_00002"
    (clip / "done.json").unlink()
    (clip / "00004.png").unlink()
    make_clips(tmp_path, RECIPE, sprites)
    assert bytes_of(tmp_path) == bytes_of(made)
    with pytest.raises(DataError, match="other options"):
        make_clips(tmp_path, replace(RECIPE, frames=11), sprites)


def test_somebody_elses_data_are_not_touched(sprites, tmp_path):
    (tmp_path / CLIPS).mkdir()
    with pytest.raises(DataError, match="not from this tool"):
        make_clips(tmp_path, RECIPE, sprites)
    assert not list((tmp_path / CLIPS).iterdir())


@pytest.mark.parametrize("change", [{"clips": (0, 0)}, {"clips": (-1, 2)}, {"frames": 1}])
def test_impossible_recipes(change, sprites, tmp_path):
    with pytest.raises(DataError, match="Cannot make"):
        make_clips(tmp_path, replace(RECIPE, **change), sprites)


def test_the_loader_of_ref_davis_reads_them(made):
    videos = open_video_set("ref_davis17|train", made)
    assert len(videos.clips) == 5
    for clip in videos.clips:
        assert len(clip.frames) == 10
        assert clip.expressions
        for expression in clip.expressions:
            truth = videos.truth(clip, expression)
            labels = np.array(Image.open(made / CLIPS / "train/Annotations" / clip.name / "00000.png"))
            assert np.array_equal(truth(0), labels == int(expression.objects[0]))
            assert truth(0).any()


# --- reading ---


def mixture(made, **options):
    return ClipMixture([open_video_set("ref_davis17|train", made)], **({"frames": 4, "phrases": 3} | options))


def test_a_position_is_always_the_same_sample(made):
    one, other = mixture(made, stride=3), mixture(made, stride=3)
    assert one.pass_length == 5
    keys = set()
    for position in range(10):
        a, b = one[position], other[position]
        assert (a.key, a.phrases, a.ids) == (b.key, b.phrases, b.ids)
        assert np.array_equal(a.frames, b.frames)
        assert np.array_equal(a.masks, b.masks)
        assert a.frames.shape == (4, 112, 128, 3)
        assert a.masks.shape == (len(a.phrases), 4, 112, 128)
        assert 1 <= len(a.phrases) <= 3
        keys.add(a.key.split("#")[0])
    assert len(keys) == 5  # every video once a pass
    assert mixture(made, seed=1)[0].key != one[0].key or mixture(made, seed=1)[1].key != one[1].key


def test_frames_and_masks_belong_together(made):
    videos = open_video_set("ref_davis17|train", made)
    clips = {clip.name: clip for clip in videos.clips}
    strides, firsts = set(), set()
    for position in range(30):
        sample = mixture(made, stride=3)[position]
        name, _, place = sample.key.partition("#")
        first, stride = map(int, place.split("+"))
        clip = clips[name.split("/")[-1]]
        for time in range(4):
            assert np.array_equal(sample.frames[time], clip.frames[first + stride * time])
            for number, which in enumerate(sample.ids):
                expression = next(e for e in clip.expressions if e.id == which.split("/")[1])
                assert np.array_equal(sample.masks[number, time], videos.truth(clip, expression)(first + stride * time))
        strides.add(stride)
        firsts.add(first)
        assert sample.masks[:, 0].any((1, 2)).all()  # what is asked for is seen at first
    assert strides == {1, 2, 3}
    assert len(firsts) > 3
    assert all(mixture(made, stride=3, start="first")[p].key.split("#")[1][0] == "0" for p in range(10))


def test_a_short_video_repeats_its_last_frame(made):
    sample = mixture(made, frames=13)[0]
    assert np.array_equal(sample.frames[9], sample.frames[12])
    assert np.array_equal(sample.masks[:, 9], sample.masks[:, 12])


def test_frames_that_nobody_labelled_do_not_count(made, tmp_path):
    shutil.copytree(made, tmp_path / "copy")
    for path in (tmp_path / "copy" / CLIPS / "train/Annotations").glob("*/00002.png"):
        path.unlink()
    sample = mixture(tmp_path / "copy", start="first")[0]
    assert (sample.masks[:, 2] == IGNORE).all()
    assert (sample.masks[:, 1] <= 1).all()


def test_hidden_labels_and_broken_frames(made, tmp_path):
    videos = open_video_set("ref_davis17|train", made)
    with pytest.raises(DataError, match="no masks to learn from"):
        ClipMixture([replace(videos, truth=None)], 4, 3)
    shutil.copytree(made, tmp_path / "copy")
    for path in (tmp_path / "copy" / CLIPS / "train/JPEGImages").glob("*/*.jpg"):
        path.write_bytes(b"nothing")
    assert isinstance(mixture(tmp_path / "copy")[0], Exception)  # a value: it must leave a worker whole


# --- learning ---


def make_step(loss=LOSS, model=None, data=CLIPS_OF_4, **trained):
    model = pico_model("sam2") if model is None else model
    choose_trained(model, ModelArgs(train_mask_decoder=True, **trained), data)
    leave_out_idle(model, loss, data)
    return ClipStep(model, loss, data.clip_masks)


def make_batch(made, step, positions=(0, 1)):
    words = PhraseTokenizer(TOKENIZER, 62)
    collate = ClipCollate(step.spec, step.model.encoder.image_spec, words)
    source = mixture(made, start="first", stride=2)
    return collate([source[position] for position in positions])


def test_columns_follow_the_loss(made):
    step = make_step()
    batch = make_batch(made, step)
    losses = step(*ClipInputs()(batch))
    assert losses.shape == (len(batch.phrases), len(LOSS.terms()))
    assert list(LOSS.terms()) == ["bce", "dice", "iou", "presence"]
    assert (losses >= 0).all() and torch.isfinite(losses).all()


def test_all_of_the_memory_learns(made):
    torch.manual_seed(0)
    step = make_step()
    losses = step(*ClipInputs()(make_batch(made, step)))
    (losses @ torch.tensor(list(LOSS.terms().values()))).sum().backward()
    reached = {name for name, p in step.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    asked = {name for name, p in step.named_parameters() if p.requires_grad}
    never_chosen = "output_hypernetworks_mlps.0."  # the mask of a clear prompt, which a phrase is not
    assert {name for name in asked - reached if not name.startswith("model.encoder.")} <= {
        name for name in asked if never_chosen in name
    }
    for part in ("memory_attention", "memory_encoder", "object_pointer_proj", "pred_obj_score_head"):
        assert any(part in name for name in reached)
    segmenter = step.model.segmenter
    memory = {name: p for name, p in segmenter.named_parameters() if segmenter.part_of(name) == "memory"}
    idle = [name for name, p in memory.items() if not p.requires_grad]
    assert all("no_memory_positional" in name or "mask_downsample" in name for name in idle)


def test_a_mask_can_begin_a_clip(made):
    """What is remembered of the first frame is then the mask itself, and all that reads masks learns."""
    step = make_step(data=DataArgs(clip_frames=4, clip_masks=1.0))
    batch, kept = make_batch(made, step), []
    remember = step.tracker.remember

    def listen(features, found, is_prompted):
        kept.append((found, is_prompted))
        return remember(features, found, is_prompted)

    step.tracker.remember = listen
    step(*ClipInputs()(batch)).sum().backward()
    (first, is_prompted), (second, _), *_ = kept
    assert is_prompted
    masks = torch.cat([part[:, 0] for part in batch.masks]).float()
    small = torch.nn.functional.interpolate(masks[:, None], first.logits.shape[-2:], mode="area")[:, 0]
    is_clear = (small < 0.05) | (small > 0.95)
    assert torch.equal((first.logits > 0)[is_clear], (small > 0.5)[is_clear])
    assert not torch.equal((second.logits > 0)[is_clear], (small > 0.5)[is_clear])
    assert step.model.segmenter.sam2.mask_downsample.weight.grad.abs().sum() > 0


def test_which_objects_begin_with_masks_is_drawn(made):
    step = make_step(data=DataArgs(clip_frames=4, clip_masks=0.5))
    batch, shares = ClipInputs()(make_batch(made, step)), []
    where = Found.where

    def listen(taken, choice, found):
        shares.append(choice.float().mean().item())
        return where(taken, choice, found)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(Found, "where", listen)
        for seed in range(20):
            torch.manual_seed(seed)
            step(*batch)
    assert 0.3 < np.mean(shares) < 0.7
    assert len(set(shares)) > 1


def test_memory_dropout(made):
    """Without it a training sees what an evaluation sees."""
    step = make_step()
    batch = ClipInputs()(make_batch(made, step))

    def difference(share):
        set_memory_dropout(step.model.segmenter.sam2, share)
        torch.manual_seed(0)
        with torch.no_grad():
            one = step.train()(*batch)
            torch.manual_seed(0)
            return (one - step.eval()(*batch)).abs().max().item()

    assert difference(0.0) < 1e-6
    assert difference(0.5) > 1e-4


def test_clips_do_not_depend_on_each_other(made):
    step = make_step(LossArgs(iou=0.5, presence=0.5))
    both, one, other = (make_batch(made, step, positions) for positions in ((0, 1), (0,), (1,)))
    with torch.no_grad():
        together = step(*ClipInputs()(both))
        alone = torch.cat([step(*ClipInputs()(batch)) for batch in (one, other)])
    assert torch.allclose(together, alone, atol=1e-4)


def test_it_sees_what_the_predictor_sees(made):
    """The masks that the loss is of are those that a video gives, where the object is on every frame."""
    model = pico_model("sam2")
    with torch.no_grad():
        model.segmenter.sam2.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(50.0)  # always there
    step = make_step(model=model.eval())
    sample = mixture(made, start="first")[2]
    step_masks = []
    settle = step.tracker.settle

    def listen(prediction, index, pointer_index, is_there):
        found = settle(prediction, index, pointer_index, torch.ones_like(is_there))
        step_masks.append(found.logits)
        return found

    step.tracker.settle = listen
    collate = ClipCollate(step.spec, model.encoder.image_spec, PhraseTokenizer(TOKENIZER, 62))
    with torch.no_grad():
        step(*ClipInputs()(collate([sample])))
    predictor = VideoPredictor(model, PhraseTokenizer(TOKENIZER, 62), hole_area=0)
    predictor.start(list(sample.frames))
    predictor.add_phrases(list(sample.phrases))
    for logits, frame in zip(step_masks, predictor.propagate(), strict=True):
        full = torch.nn.functional.interpolate(logits[:, None].float(), frame.image.shape[:2], mode="bilinear")[:, 0]
        assert ((full > 0).numpy() != frame.masks).mean() < 1e-3


def test_a_clip_can_be_learned(made):
    torch.manual_seed(0)
    step = make_step()
    collate = ClipCollate(step.spec, step.model.encoder.image_spec, PhraseTokenizer(TOKENIZER, 62))
    batch = ClipInputs()(collate([mixture(made, start="first", frames=3, phrases=1)[0]]))
    optimizer = torch.optim.AdamW([p for p in step.parameters() if p.requires_grad], lr=1e-3)
    weights = torch.tensor(list(LOSS.terms().values()))
    curve = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = (step(*batch) @ weights).mean()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    assert np.mean(curve[-3:]) < 0.9 * np.mean(curve[:3])


def test_frames_without_labels_give_no_loss(made):
    step = make_step()
    arguments = list(ClipInputs()(make_batch(made, step)))
    arguments[5] = tuple(torch.full_like(masks, IGNORE) for masks in arguments[5])
    assert float(step(*arguments).abs().sum()) == 0.0


def test_what_is_trained_by_default():
    model = pico_model("sam2")
    part = partial(map, lambda pair: model.segmenter.part_of(pair[0]))
    choose_trained(model, ModelArgs(), CLIPS_OF_4)
    trained = set(part([(n, p) for n, p in model.segmenter.named_parameters() if p.requires_grad]))
    assert trained == {"memory"}
    choose_trained(model, ModelArgs(train_encoder=False, train_projector=False))
    assert not any(p.requires_grad for p in model.parameters())


def test_image_encoder_has_its_own_rate():
    step = make_step(train_image_encoder=True)
    groups = optimizer_groups(step, OptimArgs(lr=1.0, image_lr_scale=0.25, encoder_lr_scale=0.5))
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    model = step.model
    for name, parameter in model.segmenter.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == (0.25 if model.segmenter.part_of(name) == "image_encoder" else 1.0)
    assert {rates[id(p)] for p in model.encoder.parameters() if p.requires_grad} == {0.5}


@pytest.mark.parametrize("family", ["sam", "efficient_sam"])
def test_families_without_memory(family):
    with pytest.raises(ModelError, match="no memory"):
        ClipStep(pico_model(family), LOSS)


@pytest.mark.parametrize(
    ("data", "loss", "text"),
    [
        ({}, {"presence": 1.0}, "loss.presence is for clips"),
        ({"clip_frames": 4}, {"pointing": 1.0}, "loss.pointing"),
        ({"clip_masks": 0.5}, {}, "data.clip_masks is for clips"),
        ({"clip_frames": 4, "clip_masks": 1.5}, {}, "data.clip_masks 1.5"),
        ({"clip_frames": 4, "flip": 0.5}, {}, "data.flip is for images"),
        ({"clip_frames": 4, "stray_words": 0.5}, {}, "data.stray_words is for images"),
        ({"clip_frames": 4, "feature_cache": "x"}, {}, "data.feature_cache is for images"),
        ({"clip_frames": 4, "rates": (1.0,)}, {}, "data.rates is for images"),
        ({"clip_frames": 4, "skip_missing": True}, {}, "data.skip_missing is for images"),
        ({"clip_frames": 4, "sampling": "shuffle"}, {}, "data.sampling is for images"),
    ],
)
def test_options_that_do_not_fit(data, loss, text):
    with pytest.raises(TrainingError, match=text):
        TrainConfig(data=DataArgs(**data), loss=LossArgs(**loss))


def test_one_frame_is_no_clip():
    with pytest.raises(TrainingError, match=r"data\.clip_frames 1"):
        DataArgs(clip_frames=1)


def test_train_and_measure_on_the_command_line(made, tmp_path):
    options = [
        "--model.name", PICO["sam2"], "--model.tokenizer", str(TOKENIZER), "--model.max_length", "62",
        "--data.root", str(made), "--data.sets", "ref_davis17|train", "--data.clip_frames", "3",
        "--data.batch_size", "2", "--data.workers", "0", "--loss.presence", "0.5", "--loss.points", "128",
        "--val.sets", "ref_davis17|valid", "--val.max_images", "1", "--optim.warmup", "1", "--run.device", "cpu",
        "--run.out", str(tmp_path / "run"), "--run.log_every", "1",
    ]  # fmt: skip
    for steps in ("2", "3"):  # the second goes on from the first
        done = subprocess.run(
            [sys.executable, "train.py", *options, "--optim.steps", steps], cwd=ROOT, capture_output=True, text=True,
            timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["group"] == "train"] == [1, 2, 3]
    measured = [r for r in records if r["group"] == "val"]
    assert all(0 <= r["j&f"] <= 1 and r["j&f"] == pytest.approx((r["j"] + r["f"]) / 2) for r in measured)
    assert (tmp_path / "run/best").exists()
    picture = read_image(tmp_path / "run/pictures/ref_davis17_valid/step_00000003.png")
    assert picture.shape[1] == 6 * 192
