"""inference_video.py as a user runs it: frames or a video file in, pictures, masks, a video and results.json out."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from configs.video import VideoArgs
from model import video_runner
from model.checkpoints.load import save_published
from model.video_runner import run
from tests.conftest import TOKENIZER, make_picture, pico_model
from utils.errors import ImageError, ModelError, PromptError
from utils.masks import decode_rle
from utils.video_io import FrameFolder, VideoFile, VideoWriter, natural_key

PHRASES = ("the red thing", "a box on the left")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = pico_model("sam2")
    with torch.no_grad():
        model.segmenter.sam2.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(1.0)
    folder = tmp_path_factory.mktemp("video_checkpoint")
    save_published(model, folder, TOKENIZER)
    return folder


@pytest.fixture
def frames(tmp_path):
    folder = tmp_path / "clip"
    folder.mkdir()
    for i in range(5):
        Image.fromarray(np.roll(make_picture(), 9 * i, axis=1)).save(folder / f"{i + 7}.png")
    return folder


@pytest.fixture
def options(checkpoint, frames, tmp_path):
    return VideoArgs(
        version=str(checkpoint),
        image_path=str(frames),
        prompt=PHRASES,
        vis_save_path=str(tmp_path / "out"),
        device="cpu",
    )


def read_results(options):
    folder = options.vis_save_path
    results = json.loads((video_runner.Path(folder) / "results.json").read_text())
    masks = [[decode_rle(found["segmentation"]) for found in frame["objects"]] for frame in results["frames"]]
    return results, masks


def test_what_is_written(options, tmp_path):
    assert run(options) == 0
    out = tmp_path / "out"
    results, masks = read_results(options)
    assert [frame["name"] for frame in results["frames"]] == ["7", "8", "9", "10", "11"]
    assert [found["phrase"] for found in results["frames"][0]["objects"]] == list(PHRASES)
    for frame, (one, other) in zip(results["frames"], masks, strict=True):
        labels = Image.open(out / "Annotations" / "clip" / f"{frame['name']}.png")
        assert labels.mode == "P" and np.array_equal(np.array(labels), np.where(other, 2, one.astype(int)))
        assert (out / f"{frame['name']}_vis.png").is_file()
        assert 0 <= frame["objects"][0]["score"] <= 1 and len(frame["objects"][0]["box"]) == 4
    video = VideoFile(out / "clip.mp4")
    assert len(video) == 5 and video.fps == 25
    picture = np.array(Image.open(out / "8_vis.png").convert("RGB"))[: video[1].shape[0], : video[1].shape[1]]
    small = [
        np.array(Image.fromarray(one).resize((10, 10), Image.Resampling.BOX)).astype(int) for one in (video[1], picture)
    ]
    assert np.abs(small[0] - small[1]).max() < 12  # H.264 halves the colours' resolution


def test_parts_of_a_video(options):
    run(dataclasses.replace(options, start=1, end=4, stride=3))
    results, _ = read_results(options)
    assert [frame["frame"] for frame in results["frames"]] == [1, 4]


def test_backwards_begins_at_the_end(options):
    run(dataclasses.replace(options, reverse=True))
    results, backwards = read_results(options)
    assert [frame["frame"] for frame in results["frames"]] == [0, 1, 2, 3, 4]
    run(dataclasses.replace(options, frame=4, start=4))
    assert np.array_equal(read_results(options)[1][0], backwards[-1])


def test_a_stopped_run_goes_on(options, monkeypatch, tmp_path):
    run(options)
    expected = read_results(options)[1]
    stopped = dataclasses.replace(options, vis_save_path=str(tmp_path / "stopped"))
    monkeypatch.setattr(video_runner, "SAVE_EVERY", 2)
    write, seen = video_runner._Job._write, []

    def write_three(self, frame):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(frame.index)
        write(self, frame)

    monkeypatch.setattr(video_runner._Job, "_write", write_three)
    with pytest.raises(KeyboardInterrupt):
        run(stopped)
    assert not (tmp_path / "stopped" / "results.json").exists()
    later = []
    monkeypatch.setattr(
        video_runner._Job, "_write", lambda self, frame: (later.append(frame.index), write(self, frame))
    )
    run(stopped)
    assert later == [2, 3, 4]
    for one, other in zip(read_results(stopped)[1], expected, strict=True):
        assert (np.array(one) != np.array(other)).mean() < 1e-3
    later.clear()
    run(stopped)
    assert later == []
    run(dataclasses.replace(stopped, prompt=PHRASES[:1]))
    assert later == [0, 1, 2, 3, 4]  # other phrases: begun anew


def test_video_file_as_frames(options, frames, tmp_path):
    path = tmp_path / "film.mp4"
    with VideoWriter(path, 30) as writer:
        for i in range(5):
            writer.write(np.array(Image.open(frames / f"{i + 7}.png")))
    film = VideoFile(path)
    assert len(film) == 5 and film.fps == 30
    pictures = [film[i] for i in range(5)]
    for order in ([4, 0, 3, 1], [2, 2, 1]):
        assert all(np.array_equal(film[i], pictures[i]) for i in order)
    assert not np.array_equal(pictures[0], pictures[1])
    run(dataclasses.replace(options, image_path=str(path)))
    results, _ = read_results(options)
    assert [frame["name"] for frame in results["frames"]] == [f"{i:05d}" for i in range(5)]
    assert VideoFile(tmp_path / "out" / "film.mp4").fps == 30


def test_names_are_sorted_as_people_do(frames, caplog):
    assert sorted(["b10", "b9", "a", "b9x"], key=natural_key) == ["a", "b9", "b9x", "b10"]
    assert FrameFolder(frames).names == ["7", "8", "9", "10", "11"]


def test_broken_frames(options, frames, capsys):
    (frames / "9.png").write_bytes(b"not a picture")
    with pytest.raises(ImageError, match=r"9\.png"):
        run(options)
    assert run(dataclasses.replace(options, skip_broken=True)) == 1
    assert "1 of 5 frames" in capsys.readouterr().err
    assert [frame["name"] for frame in read_results(options)[0]["frames"]] == ["7", "8", "10", "11"]


@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        ({"image_path": "nowhere"}, ImageError, "no such video or folder: nowhere"),
        ({"start": 3, "end": 2}, ImageError, "--start 3 --end 2"),
        ({"end": 5}, ImageError, "0 to 4"),
        ({"stride": 0}, ImageError, "--stride 0"),
        ({"frame": 5}, PromptError, "--frame 5"),
        ({"prompt": ("",)}, PromptError, "empty phrase"),
        ({"redetect": 0}, ModelError, "redetect 0"),
        ({"fps": 0.0}, ModelError, r"--fps 0\.0"),
        ({"fill_holes": -1}, ModelError, "--fill_holes -1"),
        ({"vis_save_path": __file__}, ModelError, "is a file"),
        ({"version": "nano", "model_type": "auto"}, ModelError, "no memory"),
    ],
)
def test_what_cannot_be_done_is_said(options, changes, kind, says):
    with pytest.raises(kind, match=says):
        run(dataclasses.replace(options, **changes))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_more_objects_than_memory_allows(options, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr(video_runner.VideoPredictor, "add_phrases", full)
    with pytest.raises(ModelError, match=r"2 objects do not fit into the memory of cpu\. Give fewer --prompt"):
        run(options)


def test_other_errors_are_not_taken_for_a_lack_of_memory(options, monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(video_runner.VideoPredictor, "add_phrases", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        run(options)


def test_files_that_are_no_video(tmp_path):
    text = tmp_path / "film.mp4"
    text.write_text("no film")
    with pytest.raises(ImageError, match=r"film\.mp4 cannot be decoded"):
        video_runner.open_frames(text)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="no frames in"):
        video_runner.open_frames(tmp_path / "empty")
    with pytest.raises(ImageError, match="is no video"):
        video_runner.open_frames(text.rename(tmp_path / "film.txt"))


def test_nothing_half_written(tmp_path):
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "film.mp4", 25) as writer:
        writer.write(make_picture())
        raise RuntimeError
    assert not list(tmp_path.iterdir())
