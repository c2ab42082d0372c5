"""Every data set's layout, in miniature, through the real loaders: masks, phrases and ids are what was written."""

import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from datasets import index as index_module
from datasets.annotations import stream_json
from datasets.catalog import describe, expand, list_datasets, list_present, open_dataset
from datasets.regions import pack_counts, unpack_counts
from tests.dataset_layouts import (
    HEIGHT,
    REFER,
    WIDTH,
    box,
    box_mask,
    coco_images,
    quarter_labels,
    refer_content,
    rle,
    write_ade20k,
    write_everything,
    write_grefcoco,
    write_human_parsing,
    write_image,
    write_json,
    write_labels,
    write_lines,
    write_objects365,
    write_partimagenet,
    write_pascal_part,
    write_refer,
)
from tools.check_data import main
from utils.errors import DataError, run_main
from utils.masks import IGNORE


def masks_equal(sample, *expected):
    """Say whether the masks are these, pixel for pixel."""
    assert sample.masks.dtype == np.uint8
    assert sample.masks.flags.c_contiguous
    return np.array_equal(sample.masks, np.stack(expected))


@pytest.fixture
def scans(monkeypatch):
    """Count how often annotation files are scanned."""
    calls = []
    build = index_module._build
    monkeypatch.setattr(index_module, "_build", lambda source, path: calls.append(source.name) or build(source, path))
    return calls


@pytest.mark.parametrize(
    ("name", "by"),
    [("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd"), ("refclef", "unc"), ("refcoco", "google")],
)
def test_refer(tmp_path, name, by):
    _, instances = write_refer(tmp_path, name, by)
    dataset = open_dataset(f"{name}|{by}|train", tmp_path)
    assert (len(dataset), dataset.count_phrases(), dataset.count_untargeted()) == (1, 3, 0)
    file_name = instances["images"][0]["file_name"]
    assert dataset.image_path(0) == tmp_path / REFER[name] / file_name
    sample = dataset.load(0)
    assert sample.phrases == ("The Left One", "two boxes", "right one")
    assert sample.ids == ("0/0", "0/1", "1/10")
    assert sample.key == dataset.key(0) == f"{name}|{by}|train/{file_name}"
    assert (sample.index, sample.size) == (0, (HEIGHT, WIDTH))
    assert np.array_equal(sample.image, np.array(Image.open(dataset.image_path(0))))
    first = box_mask((5, 5, 10, 10), (10, 10, 10, 10))
    assert masks_equal(sample, first, first, box_mask((30, 5, 10, 10)))
    assert masks_equal(open_dataset(f"{name}|{by}|val", tmp_path)[0], box_mask((1, 2, 3, 4), (20, 2, 3, 4)))


def test_splits_match_as_published(tmp_path):
    refs, instances = refer_content()
    for i, split in enumerate(("train", "testA", "testBC", "minitest")):
        refs[i]["split"] = split
    write_refer(tmp_path, content=(refs, instances))
    ids = {}
    for split in ("train", "testA", "testB", "testC", "test"):
        dataset = open_dataset(f"refcoco|unc|{split}", tmp_path)
        ids[split] = [name for i in range(len(dataset)) for name in dataset.load(i).ids]
    assert ids == {
        "train": ["0/0", "0/1"], "testA": ["1/10"], "testB": ["2/20"], "testC": ["2/20"],
        "test": ["1/10", "2/20", "3/30"],
    }  # fmt: skip


def test_chosen_phrases_in_their_order(tmp_path):
    write_refer(tmp_path)
    sample = open_dataset("refcoco|unc|train", tmp_path).load(0, [2, 0])
    assert sample.phrases == ("right one", "The Left One")
    assert sample.ids == ("1/10", "0/0")
    assert masks_equal(sample, box_mask((30, 5, 10, 10)), box_mask((5, 5, 10, 10), (10, 10, 10, 10)))


def test_overlaps_are_a_union_or_the_published_sum(tmp_path):
    write_refer(tmp_path)
    union = open_dataset("refcoco|unc|train", tmp_path).load(0).masks[0]
    total = open_dataset("refcoco|unc|train", tmp_path, overlaps="sum").load(0).masks[0]
    assert np.array_equal(total, box_mask((5, 5, 10, 10)) + box_mask((10, 10, 10, 10)))
    assert total.max() == 2
    assert np.array_equal(union, total > 0)


def test_lowercase_is_for_evaluation(tmp_path):
    write_refer(tmp_path)
    assert open_dataset("refcoco|unc|train", tmp_path, lowercase=True).phrases(0)[0] == "the left one"
    assert open_dataset("refcoco|unc|val", tmp_path).phrases(0) == ["encoded "]
    assert open_dataset("refcoco|unc|val", tmp_path, lowercase=True).phrases(0) == ["encoded"]


def test_forms_are_read_where_a_file_has_them(tmp_path):
    write_refer(tmp_path)
    path = tmp_path / "refer_seg" / "refcoco" / "refs(unc).p"
    refs = pickle.loads(path.read_bytes())
    refs[0]["sentences"][0]["form"], refs[1]["sentences"][0]["form"] = "order", 7
    path.write_bytes(pickle.dumps(refs))
    dataset = open_dataset("refcoco|unc|train", tmp_path)
    assert [dataset.form(0, place) for place in range(3)] == ["order", "", ""]


def test_a_sentence_that_cleaning_emptied_is_read_raw(tmp_path):
    refs, instances = refer_content()
    refs[1]["sentences"][0].update(sent=" ", raw="???")
    write_refer(tmp_path, content=(refs, instances))
    assert open_dataset("refcoco|unc|train", tmp_path).phrases(0)[2] == "???"


@pytest.mark.parametrize("suffix", [".json", ".p"])
def test_grefcoco(tmp_path, suffix):
    write_grefcoco(tmp_path, suffix)
    dataset = open_dataset("grefcoco|unc|val", tmp_path)
    assert (len(dataset), dataset.count_phrases(), dataset.count_untargeted()) == (2, 5, 2)
    one, two = box_mask((5, 5, 10, 10)), box_mask((30, 5, 10, 10))
    assert masks_equal(dataset[0], one, one | two, np.zeros_like(one), two)
    assert dataset[0].phrases == ("one", "both", "the unicorn", "with an empty one")
    assert not dataset[1].masks.any()
    assert open_dataset("grefcoco|unc|train", tmp_path).count_untargeted() == 1


def test_ade20k(tmp_path):
    written = write_ade20k(tmp_path)
    dataset = open_dataset("ade20k|training", tmp_path)
    assert len(dataset) == 2
    sample = dataset[0]
    labels = written["ADE_train_00000001"]
    assert sample.phrases == ("[semantic] wall", "[semantic] sky", "[semantic] class 149")
    assert sample.ids[0] == "ADE_train_00000001/wall"
    expected = [np.where(labels == 0, IGNORE, labels == value) for value in (1, 3, 150)]
    assert masks_equal(sample, *expected)
    assert dataset[1].phrases == ("[semantic] building",)
    write_ade20k(tmp_path, "validation")
    assert len(open_dataset("ade20k|validation", tmp_path)) == 2


def test_human_parsing_sides_are_the_viewers(tmp_path):
    labels = write_human_parsing(tmp_path)["1000_1"]
    sample = open_dataset("humanparsing", tmp_path)[0]
    assert sample.phrases == ("[semantic] background", "[semantic] right shoe", "[semantic] left arm")
    assert masks_equal(sample, *[np.where(labels == 255, IGNORE, labels == value) for value in (0, 9, 15)])


def test_label_pictures_in_processes(tmp_path, monkeypatch):
    write_ade20k(tmp_path)
    expected = open_dataset("ade20k|training", tmp_path)[0]
    monkeypatch.setattr("datasets.label_maps.WORTH_PROCESSES", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    for file in (tmp_path / ".textsam_index").iterdir():
        file.unlink()
    assert masks_equal(open_dataset("ade20k|training", tmp_path)[0], *expected.masks)


@pytest.mark.parametrize("order", [("images", "annotations", "categories"), ("categories", "annotations", "images")])
@pytest.mark.parametrize("chunk", [7, 1 << 24])
def test_objects365_keeps_categories_with_one_object(tmp_path, monkeypatch, order, chunk):
    monkeypatch.setattr("datasets.annotations._CHUNK", chunk)
    write_objects365(tmp_path, order)
    dataset = open_dataset("obj365", tmp_path)
    samples = {Path(sample.key).name: sample for sample in (dataset[i] for i in range(len(dataset)))}
    assert samples.keys() == {"obj365_train_000000000100.jpg", "obj365_train_000000000101.jpg"}
    assert samples["obj365_train_000000000100.jpg"].phrases == ("Person",)
    assert samples["obj365_train_000000000100.jpg"].ids == ("100/14",)
    assert masks_equal(samples["obj365_train_000000000100.jpg"], box_mask((30, 20, 5, 5)))
    assert masks_equal(samples["obj365_train_000000000101.jpg"], box_mask((1, 1, 5, 5)))


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_stream_json_is_json(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("datasets.annotations._CHUNK", chunk)
    value = {"a": [1, 22, {"b": [3, "], }"]}, [], 'é\\"'], "n": -12.5e3, "empty": [], "t": True, "o": {"x": [None]}}
    write_json(tmp_path / "x.json", value)
    seen = {}
    for key, item in stream_json(tmp_path / "x.json"):
        seen.setdefault(key, []).append(item)
    assert seen == {"a": value["a"], "n": [-12.5e3], "t": [True], "o": [{"x": [None]}]}


def test_parts_of_one_name_are_united(tmp_path):
    write_partimagenet(tmp_path, extra=([], [[1.0, 2.0, 3.0, 4.0]], None))
    dataset = open_dataset("partimagenet|train", tmp_path)
    assert dataset[0].phrases == ("[semantic] quadruped head", "[semantic] quadruped body")
    assert dataset[0].ids == ("100/quadruped head", "100/quadruped body")
    assert masks_equal(dataset[0], box_mask((5, 5, 10, 10), (10, 10, 10, 10)), box_mask((30, 5, 10, 10)))
    assert dataset.notes[0].startswith("3 of 7 annotations cannot be decoded and are left out; the first: ")
    assert "annotation 90" in dataset.notes[0]


def test_pascal_part(tmp_path):
    write_pascal_part(tmp_path)
    dataset = open_dataset("pascal_part|train", tmp_path)
    assert dataset[0].phrases == ("[semantic] dog head", "[semantic] dog left_paw")
    assert dataset[1].phrases == ("[semantic] dog left_paw",)
    assert dataset.notes == []


def own_lines(tmp_path, *records):
    write_image(tmp_path / "images/1.png", 1)
    write_image(tmp_path / "images/2.png", 2, 30, 20)
    return open_dataset(write_lines(tmp_path, *records), tmp_path)


def test_own_lines(tmp_path):
    mask = box_mask((3, 4, 5, 6))
    write_labels(tmp_path / "masks/1.png", mask * 255)
    Image.fromarray(np.stack([mask * 9, mask * 0, mask * 0], -1)).save(tmp_path / "masks/colour.png")
    Image.fromarray(mask.astype(bool)).save(tmp_path / "masks/bits.png")
    dataset = own_lines(
        tmp_path,
        {"image": "images/1.png", "phrase": "Polygon", "segmentation": [box(3, 4, 5, 6)]},
        {"image": "images/2.png", "phrase": "other image", "segmentation": box(1, 1, 2, 2)},
        {"image": "./images/1.png", "caption": ["picture", "same"], "segmentation": "masks/1.png", "id": "p"},
        "",
        {"image": "images/1.png", "phrase": "text", "segmentation": rle(mask)},
        {"image": "images/1.png", "phrase": "list", "segmentation": rle(mask, "list")},
        {"image": "images/1.png", "phrase": "nothing", "segmentation": None},
        {"image": "images/1.png", "phrase": "colour", "segmentation": "masks/colour.png"},
        {"image": "images/1.png", "phrase": "bits", "segmentation": "masks/bits.png"},
        {"image": "images/1.png", "phrase": "points", "segmentation": [[[3, 4], [3, 10], [8, 10], [8, 4]]]},
    )
    assert len(dataset) == 2
    sample = dataset[0]
    assert sample.phrases == ("Polygon", "picture", "same", "text", "list", "nothing", "colour", "bits", "points")
    assert sample.ids == ("1", "p/0", "p/1", "5", "6", "7", "8", "9", "10")
    assert masks_equal(sample, mask, mask, mask, mask, mask, mask * 0, mask, mask, mask)
    assert masks_equal(dataset[1], box_mask((1, 1, 2, 2), height=30, width=20))
    assert dataset.key(1) == "own.jsonl/images/2.png"


def test_own_coco(tmp_path):
    images = [{"id": "a", "file_name": "images/1.png"}, {"id": "b", "file_name": "2.png", "height": 40, "width": 60}]
    write_image(tmp_path / "my/images/1.png", 1)
    write_image(tmp_path / "my/2.png", 2)
    annotations = [
        {"id": 1, "image_id": "a", "phrase": "One", "segmentation": [box(1, 1, 5, 5)], "bbox": [1, 1, 5, 5]},
        {"id": 2, "image_id": "b", "caption": "two", "segmentation": rle(box_mask((2, 2, 5, 5)))},
        {"id": 3, "image_id": "a", "caption": "none", "segmentation": None},
    ]
    write_json(tmp_path / "my/own.json", {"images": images, "annotations": annotations})
    for name, root in (("my/own.json", tmp_path), (str(tmp_path / "my/own.json"), "elsewhere")):
        dataset = open_dataset(name, root)
        assert dataset.phrases(0) == ["One", "none"]
        assert masks_equal(dataset[0], box_mask((1, 1, 5, 5)), box_mask())
        assert masks_equal(dataset[1], box_mask((2, 2, 5, 5)))
        assert dataset[1].ids == ("2",)


def test_own_image_turned_by_its_camera(tmp_path):
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif)
    line = {"image": "turned.jpg", "phrase": "low", "segmentation": [box(10, 45, 10, 10)]}
    sample = open_dataset(write_lines(tmp_path, line), tmp_path)[0]
    assert sample.size == (WIDTH, HEIGHT)
    assert masks_equal(sample, box_mask((10, 45, 10, 10), height=WIDTH, width=HEIGHT))


def test_repeated_phrases_are_noted(tmp_path):
    record = {"image": "images/1.png", "phrase": "car", "segmentation": [box(1, 1, 5, 5)]}
    dataset = own_lines(tmp_path, record, record, {**record, "phrase": "bus"}, record)
    assert "'car' on images/1.png" in dataset.notes[0]
    assert dataset.phrases(0) == ["car", "car", "bus", "car"]


def test_coordinates_outside_are_clipped(tmp_path):
    record = {"image": "images/1.png", "phrase": "x", "segmentation": [box(50, 30, 40, 40)]}
    one_outside = {**record, "segmentation": [box(5, 5, 5, 5), box(70, 5, 5, 5)]}
    dataset = own_lines(tmp_path, record, one_outside)
    assert masks_equal(dataset[0], box_mask((50, 30, 10, 10)), box_mask((5, 5, 5, 5)))


@pytest.mark.parametrize("seed", range(20))
def test_counts_are_unpacked_as_pycocotools_packs_them(seed):
    generator = np.random.default_rng(seed)
    height, width = (int(n) for n in generator.integers(1, 700, 2))
    mask = (generator.random((height, width)) < generator.choice([0, 0.001, 0.5, 1])).astype(np.uint8)
    encoded = rle(mask, "bytes")
    runs = unpack_counts(encoded["counts"], "here")
    assert runs.sum() == mask.size
    assert runs.tolist() == rle(mask, "list")["counts"]
    assert pack_counts(runs, mask.shape) == encoded["counts"]


def test_the_index_is_used_again_until_a_file_changes(tmp_path, scans):
    refs, instances = write_refer(tmp_path)
    name = "refcoco|unc|train"
    open_dataset(name, tmp_path)
    assert open_dataset(name, tmp_path, lowercase=True, overlaps="sum").count_phrases() == 3
    assert scans == [name]
    refs[0]["sentences"][0]["sent"] = "changed text"
    write_refer(tmp_path, content=(refs, instances), with_images=False)
    assert open_dataset(name, tmp_path).phrases(0)[0] == "changed text"
    assert scans == [name] * 2
    assert len(list((tmp_path / ".textsam_index").glob("*.index"))) == 1


def test_a_changed_label_picture_is_scanned_again(tmp_path, scans):
    write_ade20k(tmp_path)
    assert len(open_dataset("ade20k|training", tmp_path).phrases(1)) == 1
    path = tmp_path / "ade20k/annotations/training/ADE_train_00000002.png"
    write_labels(path, quarter_labels(1, 2, 3, 4))
    os.utime(path, ns=(1, 1))
    assert len(open_dataset("ade20k|training", tmp_path).phrases(1)) == 4
    os.utime(path, ns=(2, 2))
    open_dataset("ade20k|training", tmp_path)
    assert len(scans) == 3


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b"x" + b[1:], lambda b: b[:100]])
def test_a_damaged_index_is_written_anew(tmp_path, scans, damage):
    write_refer(tmp_path)
    open_dataset("refcoco|unc|train", tmp_path)
    path = next((tmp_path / ".textsam_index").glob("*.index"))
    path.write_bytes(damage(path.read_bytes()))
    assert open_dataset("refcoco|unc|train", tmp_path).count_phrases() == 3
    assert len(scans) == 2


def test_a_folder_that_cannot_be_written_uses_the_cache(tmp_path, scans, monkeypatch):
    write_refer(tmp_path / "data")
    (tmp_path / "data/.textsam_index").write_text("in the way, as a folder without rights would be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for _ in range(2):
        assert open_dataset("refcoco|unc|train", tmp_path / "data").count_phrases() == 3
    assert len(scans) == 1
    assert list((tmp_path / "cache/textsam/index").glob("*/*.index"))
    (tmp_path / "cache2").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache2"))
    with pytest.raises(DataError, match=r"can be written neither to .* nor to .*XDG_CACHE_HOME"):
        open_dataset("refcoco|unc|train", tmp_path / "data")


def test_a_failed_scan_leaves_no_index(tmp_path):
    refs, instances = refer_content()
    instances["annotations"][1]["segmentation"] = []
    write_refer(tmp_path, content=(refs, instances))
    with pytest.raises(DataError):
        open_dataset("refcoco|unc|train", tmp_path)
    assert [path.suffix for path in (tmp_path / ".textsam_index").iterdir()] == [".lock"]


def identity(samples):
    return samples


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_the_same(tmp_path, method):
    write_ade20k(tmp_path)
    dataset = open_dataset("ade20k|training", tmp_path)
    loader = DataLoader(dataset, batch_size=1, num_workers=1, collate_fn=identity, multiprocessing_context=method)
    for here, (there,) in zip((dataset[i] for i in range(2)), loader, strict=True):
        assert here.phrases == there.phrases
        assert np.array_equal(here.masks, there.masks)
        assert np.array_equal(here.image, there.image)


def test_a_pickle_is_small_and_needs_the_index(tmp_path):
    write_refer(tmp_path)
    data = pickle.dumps(open_dataset("refcoco|unc|train", tmp_path))
    assert len(data) < 2000
    assert pickle.loads(data).phrases(0)[1] == "two boxes"
    next((tmp_path / ".textsam_index").glob("*.index")).unlink()
    with pytest.raises(DataError, match="Start again"):
        pickle.loads(data)


def test_catalog(tmp_path):
    assert expand("refer_seg") == ["refclef|unc|train", "refcoco|unc|train", "refcoco+|unc|train", "refcocog|umd|train"]
    assert len(expand("all")) == 8
    assert set(expand("all")) < set(list_datasets())
    assert expand("obj365") == ["obj365"]
    assert list_present(tmp_path) == []
    write_everything(tmp_path)
    present = list_present(tmp_path)
    assert {"refcoco|unc|val", "grefcoco|unc|val", "ade20k|training", "obj365", "humanparsing"} < set(present)
    assert "refcoco|google|train" not in present
    assert "ade20k|validation" not in present
    assert all(describe(name) != "your own data" for name in list_datasets())


def test_skip_missing(tmp_path, caplog):
    write_grefcoco(tmp_path)
    gone = tmp_path / REFER["refcoco"] / coco_images(1)[0]["file_name"]
    gone.unlink()
    whole = open_dataset("grefcoco|unc|val", tmp_path)
    assert (len(whole), whole.missing) == (2, [])
    with pytest.raises(DataError, match=rf"grefcoco\|unc\|val, image 0: {gone}: no such image.*skip_missing"):
        whole.load(0)
    dataset = open_dataset("grefcoco|unc|val", tmp_path, skip_missing=True)
    assert dataset.missing == [gone]
    assert "1 of 2 images are missing" in caplog.text
    assert (len(dataset), dataset.count_phrases(), dataset.count_untargeted()) == (1, 1, 1)
    assert dataset.load(0).phrases == ("nobody",)
    assert dataset.load(0).index == 0
    assert dataset.key(0).endswith("000101.jpg")
    assert len(pickle.loads(pickle.dumps(dataset))) == 1
    with pytest.raises(IndexError):
        dataset.load(1)
    (tmp_path / REFER["refcoco"] / coco_images(2)[1]["file_name"]).unlink()
    with pytest.raises(DataError, match="all 2 images are missing"):
        open_dataset("grefcoco|unc|val", tmp_path, skip_missing=True)


def test_the_index_survives_moving_the_root(tmp_path, scans):
    write_refer(tmp_path / "a")
    open_dataset("refcoco|unc|train", tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert open_dataset("refcoco|unc|train", tmp_path / "b")[0].masks.any()
    assert len(scans) == 1


def test_json_file_with_a_byte_order_mark(tmp_path):
    write_image(tmp_path / "1.png")
    text = json.dumps({"image": "1.png", "phrase": "été", "segmentation": [box(1, 1, 5, 5)]}, ensure_ascii=False)
    (tmp_path / "own.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n")
    assert open_dataset("own.jsonl", tmp_path).phrases(0) == ["été"]


@pytest.fixture
def check_data(monkeypatch, capsys):
    """Run `tools.check_data` and return exit status, stdout, stderr."""

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["check_data", *map(str, options)])
        with pytest.raises(SystemExit) as stop:
            run_main(main)
        return stop.value.code, *capsys.readouterr()

    return run


def test_check_data(tmp_path, check_data):
    root, out = tmp_path / "data", tmp_path / "out"
    write_grefcoco(root)
    write_partimagenet(root, extra=([],))
    status, text, _ = check_data("--root", root, "--out", out)
    assert status == 0
    rows = [line.split()[:6] for line in text.splitlines()]
    assert ["grefcoco|unc|val", "2", "5", "2.50", "2", "0"] in rows
    assert "testA" not in text  # the file has no such split, and nobody asked for it
    assert "partimagenet|train: note: 1 of 5 annotations cannot be decoded" in text
    assert np.array(Image.open(out / "grefcoco_unc_val.png")).shape[1] == 960

    gone, other = sorted((root / REFER["refcoco"]).iterdir())
    gone.unlink()
    status, text, _ = check_data("--root", root, "--out", out, "--names", "grefcoco|unc|val", "--all")
    assert status == 1
    assert f"grefcoco|unc|val: missing: {gone}" in text

    other.write_bytes(other.read_bytes()[:600])
    status, text, _ = check_data("--root", root, "--out", out, "--names", "grefcoco|unc|val", "partimagenet|trai")
    assert status == 2
    assert f"grefcoco|unc|val: problem: {other}" in text
    assert "partimagenet|trai: problem: unknown data set 'partimagenet|trai'" in text

    for root in (tmp_path / "absent", out):
        status, text, error = check_data("--root", root, "--out", out)
        assert (status, text) == (2, "")
        assert error.startswith("error: ")
        assert error.count("\n") == 1
