"""Sets of videos with phrases: three layouts, what is measured, and what is handed in where labels are hidden."""

import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.videos import is_video_set, list_video_sets, open_video_set
from model.checkpoints.load import save_published
from model.video import VideoPredictor
from tests.conftest import ROOT, TOKENIZER, make_picture, pico_model
from utils import video_evaluator
from utils.distributed import Ranks
from utils.errors import DataError, TrainingError
from utils.masks import encode_rle
from utils.tokenizer import PhraseTokenizer
from utils.video_evaluator import measure
from utils.video_metrics import contour_accuracy, region_similarity

FRAMES = 3
SETTINGS = {"checkpoint": "pico"}


def labels_of(frame):
    """Two things, 1 and 2, that move to the right; 2 leaves on the last frame."""
    labels = np.zeros((120, 160), np.uint8)
    labels[20:60, 10 + 9 * frame : 70 + 9 * frame] = 1
    if frame < FRAMES - 1:
        labels[70:110, 60 + 9 * frame : 120 + 9 * frame] = 2
    return labels


def write_frames(folder, clip):
    (folder / clip).mkdir(parents=True)
    for i in range(FRAMES):
        Image.fromarray(np.roll(make_picture(), 9 * i, axis=1)).save(folder / clip / f"{i:05d}.jpg")


def write_expressions(path, clips, key="obj_id", objects=("1", "2")):
    path.parent.mkdir(parents=True, exist_ok=True)
    said = {str(i): {"exp": f"thing {i}", key: meant} for i, meant in enumerate(objects)}
    videos = {clip: {"expressions": said, "frames": [f"{i:05d}" for i in range(FRAMES)]} for clip in clips}
    path.write_text(json.dumps({"videos": videos}))


@pytest.fixture
def root(tmp_path):
    davis = tmp_path / "ref_davis17"
    write_expressions(davis / "meta_expressions" / "valid" / "meta_expressions.json", ["dogs", "cats"])
    youtube = tmp_path / "rvos"
    write_expressions(youtube / "meta_expressions" / "valid" / "meta_expressions.json", ["a", "b"])
    write_expressions(youtube / "meta_expressions" / "test" / "meta_expressions.json", ["b"])
    mevis = tmp_path / "mevis" / "valid_u"
    write_expressions(mevis / "meta_expressions.json", ["m"], "anno_id", ([7], [7, 9]))
    pictures = [labels_of(i) for i in range(FRAMES)]
    masks = {
        str(number): [encode_rle((picture == label)[None])[0] if label in picture else None for picture in pictures]
        for number, label in ((7, 1), (9, 2))
    }
    (mevis / "mask_dict.json").write_text(json.dumps(masks))
    for folder, clips in ((davis / "valid", ["dogs", "cats"]), (youtube / "valid", ["a", "b"]), (mevis, ["m"])):
        for clip in clips:
            write_frames(folder / "JPEGImages", clip)
    for clip in ("dogs", "cats"):
        (davis / "valid" / "Annotations" / clip).mkdir(parents=True)
        for i in range(FRAMES):
            picture = Image.fromarray(labels_of(i), mode="P")
            picture.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0])
            picture.save(davis / "valid" / "Annotations" / clip / f"{i:05d}.png")
    return tmp_path


@pytest.fixture(scope="module")
def model():
    model = pico_model("sam2").eval()
    with torch.no_grad():
        model.segmenter.sam2.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(1.0)
    return model


@pytest.fixture
def predictor(model):
    return VideoPredictor(model, PhraseTokenizer(TOKENIZER, 30))


def test_names():
    assert {"ref_davis17", "ref_youtube_vos", "mevis", "mevis|valid_u"} <= set(list_video_sets())
    assert is_video_set("mevis|valid_u") and not is_video_set("refcoco|unc|val")


def test_masks_of_a_phrase(root):
    for name, label_sets in (("ref_davis17", ({1}, {2})), ("mevis|valid_u", ({1}, {1, 2}))):
        videos = open_video_set(name, root)
        clip = videos.clips[-1]
        assert [expression.text for expression in clip.expressions] == ["thing 0", "thing 1"]
        assert len(clip.frames) == FRAMES and clip.frames[1].shape == (120, 160, 3)
        for expression, labels in zip(clip.expressions, label_sets, strict=True):
            truth = videos.truth(clip, expression)
            for i in range(FRAMES):
                assert np.array_equal(truth(i), np.isin(labels_of(i), list(labels)))


def test_hidden_labels(root):
    videos = open_video_set("ref_youtube_vos", root)
    assert videos.truth is None and [clip.name for clip in videos.clips] == ["a"]  # b is of the test split


def test_scores_are_means_over_phrases_of_means_over_frames(root, predictor, tmp_path, capsys):
    videos = open_video_set("ref_davis17", root)
    assert measure(predictor, [videos], Ranks(), str(tmp_path / "out"), SETTINGS) == 0
    expected = []
    for clip in videos.clips:
        predictor.start(clip.frames)
        predictor.add_phrases(["thing 0", "thing 1"])
        found = [frame.masks for frame in predictor.propagate()]
        for k in range(2):
            pair = np.stack([masks[k] for masks in found]), np.stack([labels_of(i) == k + 1 for i in range(FRAMES)])
            expected.append([region_similarity(*pair).mean(), contour_accuracy(*pair).mean()])
    j, f = np.mean(expected, axis=0)
    metrics = json.loads((tmp_path / "out" / "ref_davis17" / "metrics.json").read_text())
    assert (metrics["j"], metrics["f"], metrics["j&f"]) == pytest.approx((j, f, (j + f) / 2), abs=2e-3)
    assert 0 < j < 1 and metrics["phrases"] == 4 and metrics["frames"] == 4 * FRAMES
    assert f"J&F {metrics['j&f']:.4f}" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out" / "ref_davis17" / "phrases.json").read_text())) == 4


def test_frames_without_a_mask_do_not_count(root, predictor, tmp_path):
    (root / "ref_davis17" / "valid" / "Annotations" / "dogs" / "00001.png").unlink()
    measure(predictor, [open_video_set("ref_davis17", root)], Ranks(), str(tmp_path / "out"), SETTINGS)
    assert json.loads((tmp_path / "out" / "ref_davis17" / "metrics.json").read_text())["frames"] == 4 * FRAMES - 2


def test_a_stopped_run_goes_on_with_the_same_settings_alone(root, predictor, tmp_path, monkeypatch):
    videos, out = open_video_set("ref_davis17", root), str(tmp_path / "out")
    evaluate, seen = video_evaluator.evaluate_clip, []

    def counted(predictor, clip, *rest):
        if len(seen) == 1:
            raise KeyboardInterrupt
        seen.append(clip.name)
        return evaluate(predictor, clip, *rest)

    monkeypatch.setattr(video_evaluator, "evaluate_clip", counted)
    with pytest.raises(KeyboardInterrupt):
        measure(predictor, [videos], Ranks(), out, SETTINGS)
    later = []
    monkeypatch.setattr(
        video_evaluator, "evaluate_clip", lambda *given: (later.append(given[1].name), evaluate(*given))[1]
    )
    measure(predictor, [videos], Ranks(), out, SETTINGS)
    assert seen == ["cats"] and later == ["dogs"]
    measure(predictor, [videos], Ranks(), out, {"checkpoint": "another"})
    assert later == ["dogs", "cats", "dogs"]


def test_the_file_to_hand_in(root, predictor, tmp_path, capsys):
    videos = open_video_set("ref_youtube_vos", root)
    with pytest.raises(TrainingError, match=r"hidden.*--out"):
        measure(predictor, [videos], Ranks(), None, SETTINGS)
    measure(predictor, [videos], Ranks(), str(tmp_path / "out"), SETTINGS)
    with zipfile.ZipFile(tmp_path / "out" / "ref_youtube_vos" / "submission.zip") as archive:
        names = sorted(archive.namelist())
        assert names == [f"Annotations/a/{k}/{i:05d}.png" for k in range(2) for i in range(FRAMES)]
        with archive.open(names[0]) as file:
            picture = np.array(Image.open(file))
    assert picture.shape == (120, 160) and set(np.unique(picture)) <= {0, 255}
    assert "Hand in" in capsys.readouterr().out


def test_two_processes_measure_as_one(root, model, tmp_path):
    save_published(model, tmp_path / "model", TOKENIZER)
    numbers = []
    for count in (1, 2):
        out = tmp_path / f"out{count}"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if count == 2 else []
        words = ["--version", tmp_path / "model", "--dataset_dir", root, "--val_dataset", "ref_davis17", "--out", out]
        done = subprocess.run(
            [sys.executable, *launcher, "eval.py", *map(str, words), "--device", "cpu"],
            cwd=ROOT, capture_output=True, text=True, env=None,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("ref_davis17: J&F") == 1
        numbers.append(json.loads((out / "ref_davis17" / "metrics.json").read_text()))
    assert numbers[0]["j"] == pytest.approx(numbers[1]["j"], abs=2e-3) and numbers[0]["phrases"] == 4


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("mevis|vali", None, r"unknown video set 'mevis\|vali'"),
        ("mevis", None, "mevis/valid/meta_expressions.json"),
        ("ref_davis17", "ref_davis17/valid/JPEGImages/dogs/00001.jpg", r"no frame .*dogs/00001\.jpg"),
        ("ref_youtube_vos", "rvos/meta_expressions/valid/meta_expressions.json", "cannot be read"),
    ],
)
def test_what_is_missing_is_named(root, name, damage, says):
    if damage:
        (root / damage).unlink()
    with pytest.raises(DataError, match=says):
        open_video_set(name, root)
    with pytest.raises(DataError, match="no folder ref_davis17 or ref-davis"):
        open_video_set("ref_davis17", root / "nowhere")
