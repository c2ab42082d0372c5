"""Phrases through a video: together as alone, forwards as backwards, from a stream as from a list."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

from model.checkpoints.load import build_model
from model.registry import model_config
from model.segmenters import sam2_memory
from model.tracker import MAPS, NO_OBJECT, POINTERS, Tracker, fill_holes
from model.video import VideoPredictor
from tests.conftest import PICO, TOKENIZER, make_picture, pico_model
from utils.errors import ImageError, ModelError, PromptError
from utils.tokenizer import PhraseTokenizer

PHRASES = ["the red thing", "a box on the left", "everything"]


def make_model(version="2.0"):
    """Return random weights that see an object on most frames: those of a fresh decoder are near 0 everywhere."""
    config = model_config(PICO["sam2"])
    torch.manual_seed(0)
    model = build_model(replace(config, segmenter=replace(config.segmenter, version=version))).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.segmenter.named_parameters():
            if "memory" in name or "pointer" in name or "occlusion" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.segmenter.sam2.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(1.0)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def frames():
    picture = make_picture()
    return [np.ascontiguousarray(np.roll(picture, 9 * i, axis=1)) for i in range(6)]


def predictor(model, **options):
    return VideoPredictor(model, PhraseTokenizer(TOKENIZER, 30), **options)


def follow(model, frames, phrases=PHRASES, at=0, options=None, **how):
    video = predictor(model, **(options or {}))
    video.start(frames)
    video.add_phrases(phrases, at)
    return list(video.propagate(**how))


def assert_same(one, other):
    """Equal but for single pixels at the edge, which sums in another order may move."""
    assert one.ids == other.ids
    assert np.abs(one.scores - other.scores).max() < 1e-3
    assert (one.masks != other.masks).mean() < 1e-3


def test_together_as_alone(model, frames):
    together = follow(model, frames)
    assert [frame.index for frame in together] == list(range(6)) and together[0].ids == (1, 2, 3)
    assert any(frame.masks[0].any() and not frame.masks[0].all() for frame in together)
    for k, phrase in enumerate(PHRASES):
        for one, frame in zip(follow(model, frames, [phrase]), together, strict=True):
            assert abs(one.scores[0] - frame.scores[k]) < 1e-3
            assert (one.masks[0] != frame.masks[k]).mean() < 1e-3


def test_memory_matters(model, frames):
    """What is found on a frame depends on what came before: the tracker is not a detector."""
    there = follow(model, frames)[-1]
    without = follow(model, [frames[0], frames[-1]])[-1]
    assert (there.masks != without.masks).any()


def test_backwards_through_a_palindrome_equals_forwards(model, frames):
    palindrome = frames + frames[-2::-1]
    forwards = follow(model, palindrome)
    backwards = follow(model, palindrome, at=len(palindrome) - 1, reverse=True)
    assert [frame.index for frame in backwards] == list(range(len(palindrome)))[::-1]
    for one, other in zip(forwards, backwards, strict=True):
        assert_same(one, other)


def test_a_stream_equals_a_list(model, frames):
    video = predictor(model)
    video.start(iter(frames * 3))
    assert video.length is None and video.add_phrases(PHRASES) is None
    for one, other in zip(video.propagate(), follow(model, frames * 3), strict=True):
        assert_same(one, other)


def test_stopped_and_continued_equals_at_once(model, frames):
    video = predictor(model)
    video.start(frames)
    video.add_phrases(PHRASES)
    parts = [*video.propagate(stop=2), *video.propagate(start=3)]
    for one, other in zip(parts, follow(model, frames), strict=True):
        assert_same(one, other)


def test_offloaded_equals_kept(model, frames):
    for one, other in zip(follow(model, frames, options={"offload": True}), follow(model, frames), strict=True):
        assert_same(one, other)


def test_phrases_may_come_late(model, frames):
    """On its own frame a phrase is answered at once; objects that were there go on as before."""
    video = predictor(model)
    video.start(frames)
    video.add_phrase(PHRASES[0])
    answer = video.add_phrase(PHRASES[1], frame=3)
    assert answer.index == 3 and answer.ids == (2,)
    found = list(video.propagate())
    assert np.array_equal(found[3].masks[1], answer.masks[0])
    for one, other in zip(found, follow(model, frames, PHRASES[:1]), strict=True):
        assert (one.masks[0] != other.masks[0]).mean() < 1e-3
    stream = predictor(model)
    stream.start(iter(frames))
    stream.add_phrase(PHRASES[0])
    stream.add_phrase(PHRASES[1], frame=3)
    seen = list(stream.propagate())
    assert [frame.ids for frame in seen] == [(1,)] * 3 + [(1, 2)] * 3
    assert (seen[-1].masks[0] != found[-1].masks[0]).mean() < 1e-3


def test_what_is_kept_does_not_grow(model, frames):
    video = predictor(model)
    video.start(iter(frames * 7))
    video.add_phrases(PHRASES[:2])
    for _ in video.propagate():
        pass
    for target in video._targets.values():
        assert len(target.memory.prompted) == len(target.answers) == 1
        assert len(target.memory.tracked) == POINTERS - 1
        assert sum(kept.map is not None for kept in target.memory.tracked.values()) == MAPS - 1


def test_what_is_dropped_is_never_read(model, frames, monkeypatch):
    from model.tracker import ObjectMemory

    short = follow(model, frames * 4)
    monkeypatch.setattr(ObjectMemory, "keep", lambda self, frame, kept, step: self.tracked.update({frame: kept}))
    for one, other in zip(short, follow(model, frames * 4), strict=True):
        assert_same(one, other)


def test_lost_objects_are_looked_for_again(model, frames, monkeypatch):
    track = Tracker.track

    def lose(self, features, objects, frame, *rest):
        found = track(self, features, objects, frame, *rest)
        if 1 <= frame <= 4:
            found.object_scores.fill_(-1.0)
            found.logits.fill_(NO_OBJECT)
        return found

    monkeypatch.setattr(Tracker, "track", lose)
    never = follow(model, frames)
    assert [frame.masks.any() for frame in never[1:5]] == [False] * 4 and not never[2].scores.any()
    video = predictor(model, redetect=2)
    video.start(frames)
    video.add_phrases(PHRASES)
    again = list(video.propagate())
    assert [bool(frame.masks.any()) for frame in again[1:5]] == [False, True, False, True]
    read = predictor(model)
    read.start(frames)
    assert np.array_equal(read.add_phrases(PHRASES, 2).masks, again[2].masks)
    assert [sorted(target.memory.prompted) for target in video._targets.values()] == [[0, 4]] * 3


def library_masks(model, frames, prompt):
    """Follow one object with the library's own session and loop."""
    sam2, spec = model.segmenter.sam2, model.segmenter.image_spec.for_video()
    pixels = torch.stack([spec(frame) for frame in frames])
    session = Sam2VideoInferenceSession(pixels, *frames[0].shape[:2], dtype=torch.float32)
    index = session.obj_id_to_idx(1)
    if "mask" in prompt:
        session.add_mask_inputs(index, 0, torch.from_numpy(prompt["mask"])[None, None])
    else:
        scale = torch.tensor([spec.size / frames[0].shape[1], spec.size / frames[0].shape[0]])
        points = torch.tensor(prompt["points"]).float() * scale
        labels = torch.tensor(prompt["labels"], dtype=torch.int32)
        session.add_point_inputs(index, 0, {"point_coords": points[None, None], "point_labels": labels[None, None]})
    session.obj_with_new_inputs.append(1)
    with torch.inference_mode():
        sam2(session, frame_idx=0)
        logits = [found.pred_masks for found in sam2.propagate_in_video_iterator(session)]
    return [torch.nn.functional.interpolate(one.float(), frames[0].shape[:2], mode="bilinear")[0, 0] for one in logits]


BOX = [20, 30, 90, 80]


@pytest.mark.parametrize("kind", ["point", "points", "box", "mask"])
def test_points_boxes_and_masks_as_in_the_library(model, frames, kind):
    video = predictor(model, hole_area=0)
    video.start(frames)
    mask = np.zeros(frames[0].shape[:2], bool)
    mask[30:80, 20:90] = True
    if kind == "mask":
        prompt = {"mask": mask}
        video.add_mask(mask)
    elif kind == "box":
        prompt = {"points": [BOX[:2], BOX[2:]], "labels": [2, 3]}
        video.add_box(BOX)
    else:
        count = 1 if kind == "point" else 3
        prompt = {"points": [[40, 50], [60, 60], [5, 5]][:count], "labels": [1, 1, 0][:count]}
        video.add_points(prompt["points"], prompt["labels"])
    expected = library_masks(model, frames, prompt)
    for found, logits in zip(video.propagate(), expected, strict=True):
        assert (found.masks[0] != (logits > 0).numpy()).mean() < 2e-3
    assert any((one > 0).any() and (one < 0).any() for one in expected)


def library_memory(sam2, frame, places, memory, memory_places, pointers):
    """Return what the library's own forward makes of the same, with a copy of the frame for each object."""
    seen = sam2.memory_attention(
        current_vision_features=frame.expand(len(memory), -1, -1).transpose(0, 1),
        current_vision_position_embeddings=places.transpose(0, 1),
        memory=memory.transpose(0, 1),
        memory_posision_embeddings=memory_places[:, None],
        num_object_pointer_tokens=pointers,
    )
    return seen.reshape(len(memory), -1, seen.shape[-1])


@pytest.mark.parametrize("pointers", [0, 12])
@pytest.mark.parametrize("objects", [1, 3])
def test_memory_attention_is_the_library_s(model, objects, pointers):
    """If this fails after an update, the library's layers changed: compare them with `segmenters/sam2_memory.py`."""
    sam2, side = model.segmenter.sam2, model.segmenter.config.image_size // 16
    torch.manual_seed(1)
    own, places = torch.randn(1, side**2, 256, requires_grad=True), torch.randn(1, side**2, 256)
    tokens = 3 * side**2 + pointers
    rest = torch.randn(objects, tokens, 64), torch.randn(tokens, 64), pointers
    expected = library_memory(sam2, own, places, *rest)
    found = sam2_memory.attend(sam2.memory_attention, own, places, *rest)
    assert (found - expected).abs().max() < 2e-5
    target = torch.randn_like(found)
    parameters = [own, *sam2.memory_attention.parameters()]
    pair = [torch.autograd.grad(((seen - target) ** 2).sum(), parameters) for seen in (found, expected)]
    for mine, its in zip(*pair, strict=True):
        assert (mine - its).abs().max() <= 1e-2 * its.abs().max() + 1e-5
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rough = sam2_memory.attend(sam2.memory_attention, own, places, *rest)
    assert (rough - expected).abs().mean() < 0.02 * expected.abs().mean()


def test_memory_encoder_is_the_library_s(model):
    encoder, side = model.segmenter.sam2.memory_encoder, model.segmenter.config.image_size // 16
    torch.manual_seed(1)
    image, masks = torch.randn(1, 256, side, side), torch.randn(3, 1, 16 * side, 16 * side) * 10
    with torch.no_grad():
        expected, _ = encoder(image.expand(3, -1, -1, -1), masks)
        assert (sam2_memory.remember(encoder, image, masks) - expected).abs().max() < 1e-5


def test_sam_2_1_as_in_the_library(frames):
    """Pointers carry their age and hidden objects leave a mark, which 2.0 does not know."""
    model = make_model("2.1")
    assert model.segmenter.sam2.occlusion_spatial_embedding_parameter is not None
    with torch.no_grad():  # on some frames the object is hidden
        model.segmenter.sam2.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(0.0)
    prompt = {"points": [[40, 50], [60, 60]], "labels": [1, 1]}
    for length in (3, 6):
        video = predictor(model, hole_area=0)
        video.start(frames[:length])
        video.add_points(prompt["points"], prompt["labels"])
        for found, logits in zip(video.propagate(), library_masks(model, frames[:length], prompt), strict=True):
            assert (found.masks[0] != (logits > 0).numpy()).mean() < 2e-3
    other = make_model()
    shared = {n: p for n, p in model.segmenter.state_dict().items() if n in other.segmenter.state_dict()}
    other.segmenter.load_state_dict(shared)
    one, two = (predictor(m, hole_area=0) for m in (model, other))
    for video in (one, two):
        video.start(frames)
        video.add_points(prompt["points"], prompt["labels"])
    scores = [[frame.scores[0] for frame in video.propagate()] for video in (one, two)]
    assert np.abs(np.subtract(*scores)).max() > 1e-6  # what 2.1 adds is used; else they would be the same numbers


def test_a_correction_replaces_what_was_followed(model, frames):
    video = predictor(model)
    video.start(frames)
    video.add_phrase(PHRASES[0])
    before = list(video.propagate(stop=3))
    mask = np.zeros(frames[0].shape[:2], bool)
    mask[30:80, 20:90] = True
    answer = video.add_mask(mask, frame=3, object_id=1)
    assert (answer.masks[0] != mask).mean() < 0.05 < (before[3].masks[0] != mask).mean()
    after = list(video.propagate(start=3))
    assert np.array_equal(after[0].masks, answer.masks) and len(video._targets) == 1
    assert (after[1].masks != follow(model, frames)[4].masks[:1]).any()


def test_holes():
    logits = torch.full((2, 9, 9), 3.0)
    logits[0, 0, 0] = logits[0, 4, 4] = logits[0, 5, 5] = -1  # two that touch at a corner are one hole
    logits[1, 2:5, 2:5] = -2
    logits[1, 8] = 0
    filled = fill_holes(logits, 8)
    assert (filled[0] > 0).all() and filled[0, 4, 4] == pytest.approx(0.1)
    assert torch.equal(filled[1], logits[1])  # nine pixels each
    assert torch.equal(fill_holes(logits, 0), logits)
    assert (fill_holes(logits, 1)[0] <= 0).sum() == 2
    assert (fill_holes(logits, 9)[1] > 0).all()


def test_what_cannot_be_done_is_said(model, frames):
    video = predictor(model)
    with pytest.raises(PromptError, match="start"):
        video.add_phrase("thing")
    with pytest.raises(ImageError, match="no frame"):
        video.start([])
    video.start(frames)
    with pytest.raises(PromptError, match="nothing to follow"):
        next(video.propagate())
    with pytest.raises(PromptError, match=r"frame 6: .* 0 to 5"):
        video.add_phrase("thing", frame=6)
    with pytest.raises(PromptError, match="empty phrase"):
        video.add_phrase(" ")
    with pytest.raises(PromptError, match="object ids"):
        video.add_phrases(["one", "two"], object_ids=[1, 1])
    for ask, says in (
        (lambda: video.add_points([[1, 2, 3]]), "points have shape"),
        (lambda: video.add_points([[1, 2]], [2]), "label 2: labels are"),
        (lambda: video.add_box([1, 2, 3]), "boxes have shape"),
        (lambda: video.add_mask(np.zeros((5, 5), bool)), r"mask of \[5, 5\]"),
        (lambda: video.add_mask(np.zeros((5, 5))), "mask is float64"),
    ):
        with pytest.raises(PromptError, match=says):
            ask()
    video.start(frames)
    video.add_phrase("thing")
    with pytest.raises(PromptError, match="stop 9"):
        next(video.propagate(stop=9))
    video.start([frames[0], frames[1][:50]])
    video.add_phrase("thing")
    with pytest.raises(ImageError, match=r"frame 1 is .*All must have one size"):
        list(video.propagate())
    video.start(iter(frames))
    video.add_phrase("thing")
    with pytest.raises(PromptError, match="stream"):
        next(video.propagate(reverse=True))
    next(video.propagate())
    with pytest.raises(PromptError, match="has passed"):
        video.add_phrase("thing", frame=0)
    mute = VideoPredictor(model)
    mute.start(frames)
    with pytest.raises(PromptError, match="no phrase encoder"):
        mute.add_phrase("thing")
    assert mute.add_box(BOX).ids == (1,)
    with pytest.raises(ModelError, match="no memory"):
        predictor(pico_model("efficient_sam"))
    with pytest.raises(ModelError, match="redetect 0"):
        predictor(model, redetect=0)
