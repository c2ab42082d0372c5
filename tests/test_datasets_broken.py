"""Hostile and broken data gets an error that names file, id, what is allowed and the remedy."""

import io
import os
import pickle
import pickletools
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from datasets.catalog import open_dataset
from tests.dataset_layouts import (
    HEIGHT,
    REFER,
    WIDTH,
    annotation,
    box,
    box_mask,
    coco_images,
    grefcoco_content,
    parts_content,
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
    write_refer,
)
from utils.errors import DataError, ImageError
from utils.unpickle import load_plain_pickle

ROOT = Path(__file__).parent.parent
TRAIN = "refcoco|unc|train"


def refuses(root, name, pattern, **options):
    """Check that opening fails with one line that matches."""
    with pytest.raises(DataError, match=pattern) as caught:
        open_dataset(name, root, **options)
    assert "\n" not in str(caught.value)


class Runs:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_runs_code_does_not_run(tmp_path, protocol):
    path = tmp_path / "refs(unc).p"
    mark = tmp_path / "ran"
    path.write_bytes(pickle.dumps([{"ref_id": 1}, Runs(f"touch {mark}")], protocol))
    with pytest.raises(
        DataError, match=r"refs\(unc\)\.p asks for the global '(posix|nt)\.system', which may run code: "
    ):
        load_plain_pickle(path)
    assert not mark.exists()
    pickle.loads(path.read_bytes())  # the same file does run in an ordinary unpickler
    assert mark.exists()


@pytest.mark.parametrize(
    "value",
    [np.int64(3), np.zeros(2), Path("x"), complex(1, 2), bytearray(b"x"), io.BytesIO, print, type, ValueError()],
    ids=lambda value: type(value).__name__,
)
def test_only_plain_data(tmp_path, value):
    for protocol in (0, 2, 4):
        (tmp_path / "x.p").write_bytes(pickle.dumps([value], protocol))
        with pytest.raises(DataError, match=r"asks for the global '.*allowed are dict, list"):
            load_plain_pickle(tmp_path / "x.p")


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_comes_back(tmp_path, protocol):
    value = {
        "a": [1, -5, 2**70, 1.5, None, True, "é", b"", b"\xff\x00", (1, (2,)), {3, 4}, frozenset({5})],
        (1, 2): {}, 7: [],
    }  # fmt: skip
    (tmp_path / "x.p").write_bytes(pickle.dumps(value, protocol))
    assert load_plain_pickle(tmp_path / "x.p") == value


def python2_text(data):
    """Return a pickle of Python 2: a list with one 8-bit string."""
    return b"\x80\x02]q\x00U" + bytes([len(data)]) + data + b"q\x01a."


def test_text_of_python_2(tmp_path):
    path = tmp_path / "x.p"
    for data, text in ((b"left", "left"), ("café".encode(), "café"), (b"caf\xe9", "café")):
        path.write_bytes(python2_text(data))
        assert load_plain_pickle(path) == [text]
    path.write_bytes(b"(lp0\nS'left guy'\np1\naV\\u00e9\np2\naI1\na.")  # protocol 0
    assert load_plain_pickle(path) == ["left guy", "é", 1]


def test_damaged_pickles(tmp_path):
    path = tmp_path / "x.p"
    whole = pickle.dumps(refer_content()[0], 2)
    generator = np.random.default_rng(0)
    cases = [b"", b"not a pickle", whole[:-1], whole[: len(whole) // 2], b"\x80\x02.", b"\x80\xff."]
    cases += [generator.bytes(200) for _ in range(200)]
    for data in cases:
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"x\.p (is not a pickle of plain data, or truncated|asks for)"):
            load_plain_pickle(path)
    with pytest.raises(DataError, match="over the bound of 10"):
        load_plain_pickle(path, max_bytes=10)
    with pytest.raises(DataError, match="cannot be read"):
        load_plain_pickle(tmp_path / "absent.p")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\x80\x02]r\xff\xff\xff\x0f.", "[]"),  # a memo of 2^28 places
        (b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".", "KeyError: instruction 150"),  # a bytearray of a terabyte
        (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b".", "truncated"),  # bytes of a terabyte
        (b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b".", "truncated"),  # a frame of a terabyte
        (b"\x80\x02c__builtin__\nbytes\nI1000000000000\n\x85R.", "asks for bytes with an argument"),
    ],
)
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux")
def test_a_pickle_does_not_fill_the_memory(tmp_path, data, expected):
    """The limit turns an attempt into a MemoryError, whose message is another one."""
    (tmp_path / "x.p").write_bytes(data)
    code = (
        "import resource, sys; from pathlib import Path; from utils.unpickle import load_plain_pickle\n"
        "from utils.errors import DataError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "try: print(load_plain_pickle(Path(sys.argv[1])))\n"
        "except DataError as error: print(error)\n"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "assert int(peak.split()[1]) < 100_000, peak"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "x.p")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
    assert "MemoryError" not in done.stdout


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02c__builtin__\nset\n]\x85R}b.",  # sets attributes
        b"\x80\x02c__builtin__\neval\nX\x03\x00\x00\x001+1\x85R.",
        b"(S'1'\ni__builtin__\neval\n.",
        b"\x80\x04\x8c\x08builtins\x8c\x0cset.__init__\x93.",
        b"P1\n.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02c__builtin__\nset\n]\x81.",
        b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x06\x00\x00\x00rot_13\x86R.",
    ],
)
def test_instructions_that_plain_data_never_needs(tmp_path, data):
    list(pickletools.genops(data))  # well-formed
    (tmp_path / "x.p").write_bytes(data)
    with pytest.raises(DataError):
        load_plain_pickle(tmp_path / "x.p")


def broken_refer(change):
    refs, instances = refer_content()
    change(refs, instances)
    return refs, instances


def set_segmentation(value):
    return lambda refs, instances: instances["annotations"][1].update(segmentation=value)


def append_copy(of, key, **changes):
    def change(refs, instances):
        records = refs if of == "refs" else instances[of]
        records.append({**records[1], **changes})

    return change


def pack(*runs):
    """Return compressed counts of any integers, up to three of them."""
    text = ""
    for run in runs:
        for i in range(6):
            text += chr(48 + ((run >> 5 * i) & 31 | (32 if i < 5 else 0)))
    return text


WHERE = r"instances\.json, annotation 2: "
SMALL = rle(box_mask((1, 1, 2, 2), height=10, width=10))
TEXT = rle(box_mask((1, 1, 20, 20)))["counts"]


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (set_segmentation([]), WHERE + "the segmentation is empty"),
        (set_segmentation([[]]), WHERE + "a polygon has 0 numbers; allowed: .*at least 3 points"),
        (set_segmentation([[1, 2, 3, 4]]), WHERE + "a polygon has 4 numbers; allowed"),
        (set_segmentation([[1, 2, 3, 4, 5, 6, 7]]), WHERE + "a polygon has 7 numbers"),
        (set_segmentation([[1, 2, "3", 4, 5, "x"]]), WHERE + "a polygon holds something else than numbers"),
        (set_segmentation([[1, 2, 3, 4, 5, float("nan")]]), WHERE + "a polygon holds NaN or infinity"),
        (set_segmentation([box(70, 5, 10, 10)]), WHERE + r"the polygons lie outside the image \(box x 70 to 80.*60x40"),
        (set_segmentation([box(5, -20, 10, 10)]), WHERE + "the polygons lie outside the image"),
        (set_segmentation([box(5, 5, 1e9, 10)]), WHERE + "a polygon reaches far outside the image"),
        (set_segmentation("polygon"), WHERE + "segmentation is 'polygon'; needed is list or dict"),
        (set_segmentation({"size": [40, 60]}), WHERE + "segmentation has .*'size'.*; a run-length encoding has"),
        (set_segmentation([SMALL]), WHERE + r"the run-length .* is for size \[10, 10\], the image has \[40, 60\]"),
        (set_segmentation([{"size": [60, 40], "counts": TEXT}]), WHERE + r".* is for size \[60, 40\]"),
        (set_segmentation([{"size": [40, 60], "counts": [5, 10]}]), WHERE + "the runs .* add up to 15, .* 2400 pixels"),
        (set_segmentation([{"size": [40, 60], "counts": [2401, -1]}]), WHERE + "the counts .* neither text nor a list"),
        (set_segmentation([{"size": [40, 60], "counts": TEXT[:-2]}]), WHERE + "the (runs|counts) of the"),
        (set_segmentation([{"size": [40, 60], "counts": pack(2410, -10)}]), WHERE + "the runs .* add up"),
        (set_segmentation([{"size": [40, 60], "counts": "é"}]), WHERE + "the counts .* are damaged or cut off"),
        (set_segmentation([{"size": [40, 60], "counts": ""}]), WHERE + "the counts .* are damaged or cut off"),
        (set_segmentation([{"size": [40, 60], "counts": "o" * 20 + "0"}]), WHERE + ".* a run over 2"),
        (append_copy("refs", "ref_id"), r"refs\(unc\)\.p: ref ref_id 1 is there twice"),
        (append_copy("refs", "ref_id", ref_id=77), r"refs\(unc\)\.p, ref_id 77: sent_id 10 is there twice"),
        (append_copy("annotations", "id"), r"instances\.json: annotation id 2 is there twice"),
        (append_copy("images", "id"), r"instances\.json: image id 101 is there twice"),
        (lambda refs, _: refs[0].update(ann_id=99), r"refs\(unc\)\.p, ref_id 0: annotation 99 is not in the file"),
        (lambda refs, _: refs[0].update(image_id=99), r"refs\(unc\)\.p, ref_id 0: image 99 is not in the file"),
        (lambda refs, _: refs[0].update(ann_id=3), r"ref_id 0: annotation 3 is about image 101, the ref about 100"),
        (lambda refs, _: refs[0].update(ann_id=[1, 2]), r"ref_id 0: ann_id is \[1, 2\].*Several: grefcoco"),
        (lambda refs, _: refs[0].pop("split"), r"ref_id 0: no 'split' among ann_id"),
        (lambda refs, _: refs[0].update(sentences=3), r"ref_id 0: sentences is 3; needed is list"),
        (lambda refs, _: refs[0]["sentences"][1].update(sent="", raw=""), r"sent_id 1: the sentence is empty"),
        (lambda refs, _: refs.append("x"), r"str found where an object with 'ref_id' is needed"),
        (lambda _, i: i["images"][0].update(file_name="../../x.jpg"), r"image 100: file name .* leaves the"),
        (lambda _, i: i["images"][0].update(file_name="/etc/x.jpg"), r"image 100: file name .* leaves the"),
        (lambda _, i: i["images"][0].update(height=0), r"image 100: size 60x0"),
        (lambda _, i: i["images"][0].pop("width"), r"image 100: no 'width'"),
        (lambda _, i: i.pop("annotations"), r"instances\.json: no 'annotations' among"),
    ],
)  # fmt: skip
def test_broken_refer(tmp_path, change, pattern):
    write_refer(tmp_path, content=broken_refer(change), with_images=False)
    refuses(tmp_path, TRAIN, pattern)


@pytest.mark.parametrize(
    ("ann_id", "pattern"),
    [
        ([], r"ref_id 0: ann_id is \[\]; allowed: annotation ids, or \[-1\] for no target"),
        ([-1, 1], "allowed"),
        ([9], "9"),
    ],
)
def test_broken_grefcoco(tmp_path, ann_id, pattern):
    refs, instances = grefcoco_content()
    refs[0]["ann_id"] = ann_id
    write_grefcoco(tmp_path, content=(refs, instances))
    refuses(tmp_path, "grefcoco|unc|val", pattern)


def test_an_empty_segmentation_is_for_grefcoco_only(tmp_path):
    write_refer(tmp_path, content=broken_refer(set_segmentation([])), with_images=False)
    refuses(tmp_path, TRAIN, "segmentation is empty")


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("refcoco|unc|valid", r"unknown split 'valid'.*Known: train, val, test, testA.* Did you mean 'val'"),
        ("refcoco|umd|val", r"no such file: .*refs\(umd\)\.p\. In that folder: refs\(unc\)\.p"),
        ("refcoco|unc|testC", r"no ref in split 'testC'\. The file has: testAB, train, val"),
        ("refcoc|unc|val", r"unknown data set 'refcoc\|unc\|val'\. Known: .*Did you mean 'refcoco\|unc\|val'"),
        ("refcoco|val", r"unknown data set 'refcoco\|val'. Known: refcoco\|unc\|train"),
        ("ade20k|train", r"unknown data set 'ade20k\|train'. Known: ade20k\|training, ade20k\|validation"),
        ("ade20k|training", r"no such file: .*ade20k_classes\.json\. Put it there"),
        ("absent.jsonl", r"no such file: .*absent\.jsonl"),
        ("", "unknown data set ''"),
    ],
)
def test_names(tmp_path, name, pattern):
    write_refer(tmp_path, with_images=False)
    refuses(tmp_path, name, pattern)


def test_options(tmp_path):
    write_refer(tmp_path)
    refuses(tmp_path, TRAIN, "overlaps 'count': known are 'union' and 'sum'", overlaps="count")


@pytest.mark.parametrize("text", ["", "{", '{"images": [', "[]", "nonsense", "[" * 100_000, '{"images": 1}'])
def test_broken_json(tmp_path, text):
    write_everything(tmp_path)
    for name, path in (
        (TRAIN, "refer_seg/refcoco/instances.json"),
        ("obj365", "Object365/raw/Objects365_v1/2019-08-02/o365_res_instances.json"),
        ("partimagenet|train", "PartImageNet/annotations/train/train.json"),
    ):
        (tmp_path / path).write_text(text)
        refuses(tmp_path, name, Path(path).name)


def test_images(tmp_path):
    write_refer(tmp_path)
    dataset = open_dataset(TRAIN, tmp_path)
    path = dataset.image_path(0)
    assert path.parent == tmp_path / REFER["refcoco"]
    write_image(path, 0, WIDTH, HEIGHT)
    with pytest.raises(DataError, match=rf"{path} has 40x60 pixels upright, the annotations are for 60x40"):
        dataset.load(0)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ImageError, match=str(path)):
        dataset.load(0)
    path.write_bytes(b"not an image")
    with pytest.raises(ImageError, match=str(path)):
        dataset.load(0)
    path.unlink()
    with pytest.raises(DataError, match=rf"refcoco\|unc\|train, image 0: {path}: no such image"):
        dataset.load(0)
    write_image(path)
    with pytest.raises(ImageError, match="over the bound of 100"):
        open_dataset(TRAIN, tmp_path, max_pixels=100).load(0)
    with pytest.raises(IndexError):
        dataset.load(-1)


def test_one_image_under_two_ids(tmp_path):
    refs, instances = refer_content()
    instances["images"][1]["file_name"] = instances["images"][0]["file_name"]
    refs[2]["split"] = "train"
    write_refer(tmp_path, content=(refs, instances))
    refuses(tmp_path, TRAIN, r"image COCO_train2014_000000000100\.jpg is listed under two ids")


def test_label_pictures(tmp_path):
    write_ade20k(tmp_path)
    folder = tmp_path / "ade20k/annotations/training"
    path = folder / "ADE_train_00000002.png"
    write_labels(path, quarter_labels(1, 2, 3, 151))
    refuses(tmp_path, "ade20k|training", r"00000002\.png: label 151 has no name; allowed are 1 to 150, and 0")
    write_image(path)
    refuses(tmp_path, "ade20k|training", r"00000002\.png is not a label picture: needed is one number per pixel")
    path.write_bytes(b"\x89PNG\r\n\x1a\n")
    refuses(tmp_path, "ade20k|training", r"00000002\.png cannot be decoded")
    write_labels(path, quarter_labels(1, 2, 3, 4))
    dataset = open_dataset("ade20k|training", tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"no such mask picture: .*00000002\.png"):
        dataset.load(1)
    write_labels(path, quarter_labels(1, 2, 3, 4)[:30])
    with pytest.raises(DataError, match=r"00000002\.png has 60x30 pixels, the image has 60x40"):
        dataset.load(1)
    write_json(tmp_path / "ade20k/ade20k_classes.json", {"wall": 1})
    refuses(tmp_path, "ade20k|training", "needed is a list of class names")


def test_human_parsing_without_pictures(tmp_path):
    write_human_parsing(tmp_path)
    (tmp_path / "humanparsing/SegmentationClassAug/1000_1.png").unlink()
    refuses(tmp_path, "humanparsing", r"SegmentationClassAug holds no \.png")


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda c: c["annotations"].append(c["annotations"][0]), "annotation id 11 is there twice"),
        (lambda c: c["images"].append(c["images"][0]), "image id 100 is there twice"),
        (lambda c: c["annotations"][0].update(image_id=9), "annotation 11: image 9 is not in the file"),
        (lambda c: c["annotations"][0].update(category_id=9), "annotation 11: category 9 is not in the file"),
        (lambda c: c["annotations"][0].pop("segmentation"), "annotation 11: no 'segmentation' among"),
        (
            lambda c: c["annotations"][0].update(segmentation=[SMALL]),
            "annotation 11: the run-length encoding is for size",
        ),
    ],
)
def test_broken_objects365(tmp_path, change, pattern):
    content = write_objects365(tmp_path)
    change(content)
    write_json(tmp_path / "Object365/raw/Objects365_v1/2019-08-02/o365_res_instances.json", content)
    refuses(tmp_path, "obj365", r"o365_res_instances\.json.*" + pattern)


def test_broken_parts(tmp_path):
    content = parts_content(["head", "body"], "{}.jpg")
    path = tmp_path / "vlpart/pascal_part/train.json"
    for bad, pattern in (
        (annotation(1, content["images"][0], [box(1, 1, 2, 2)]), "annotation id 1 is there twice"),
        (annotation(9, {"id": 5}, [box(1, 1, 2, 2)]), "annotation 9: image 5 is not in the file"),
        (annotation(9, content["images"][0], [box(1, 1, 2, 2)], category=7), "annotation 9: category 7 is not"),
    ):
        write_json(path, {**content, "annotations": [*content["annotations"], bad]})
        refuses(tmp_path, "pascal_part|train", r"train\.json.*" + pattern)


GOOD = {"image": "1.png", "phrase": "cup", "segmentation": [box(1, 1, 5, 5)]}


@pytest.mark.parametrize(
    ("line", "pattern"),
    [
        ("{", r"own\.jsonl, line 2 is not JSON .*Write one object per line"),
        ("[]", r"own\.jsonl, line 2: list found where an object with 'image' is needed"),
        ({"phrase": "x"}, r"line 2: no 'image' among phrase"),
        ({**GOOD, "phrase": " "}, r"line 2: the phrase ' ' is empty"),
        ({**GOOD, "phrase": []}, r"line 2: the phrase \[\] is empty"),
        ({**GOOD, "caption": "x"}, r"line 2: needed is 'phrase' or 'caption', found 'phrase' and 'caption'"),
        ({"image": "1.png", "segmentation": None}, r"line 2: needed is 'phrase' or 'caption', found only image, seg"),
        ({**GOOD, "segmentaton": 1}, r"line 2: nobody reads 'segmentaton'; known: .*Did you mean 'segmentation'"),
        ({"image": "1.png", "phrase": "x"}, r"line 2: no 'segmentation'. Give polygons, .*or null for no target"),
        ({**GOOD, "segmentation": []}, r"line 2: the segmentation is empty"),
        ({**GOOD, "segmentation": [box(90, 1, 5, 5)]}, r"line 2: the polygons lie outside the image"),
        ({**GOOD, "segmentation": SMALL}, r"line 2: the run-length encoding is for size \[10, 10\]"),
        ({**GOOD, "segmentation": 5}, r"line 2: segmentation is int; allowed"),
        ({**GOOD, "image": "a\0b"}, r"line 2: image 'a\\x00b'; needed is a path"),
        ({**GOOD, "id": "1"}, r"line 2: id '1' is there twice"),
    ],
)
def test_broken_lines(tmp_path, line, pattern):
    write_image(tmp_path / "1.png")
    write_lines(tmp_path, GOOD, line)
    refuses(tmp_path, "own.jsonl", pattern)


def test_own_files_that_are_empty_or_not_text(tmp_path):
    (tmp_path / "own.jsonl").write_text("\n")
    refuses(tmp_path, "own.jsonl", r"own\.jsonl: no phrase in .*Check that the file is complete")
    (tmp_path / "own.jsonl").write_bytes(b"\xff\xfe{")
    refuses(tmp_path, "own.jsonl", "cannot be read as UTF-8")


def test_own_masks_that_do_not_fit(tmp_path):
    write_image(tmp_path / "1.png")
    write_labels(tmp_path / "small.png", np.ones((10, 10)))
    lines = [{**GOOD, "segmentation": "small.png"}, {**GOOD, "segmentation": "absent.png", "phrase": "b"}]
    dataset = open_dataset(write_lines(tmp_path, *lines), tmp_path)
    with pytest.raises(DataError, match=r"small\.png has 10x10 pixels, the image has 60x40"):
        dataset.load(0, [0])
    with pytest.raises(DataError, match=r"no such mask picture: .*absent\.png"):
        dataset.load(0, [1])


def test_an_image_that_comes_later_is_still_compared(tmp_path):
    """Where the size is not known at scanning, regions are compared with the image when it is loaded."""
    lines = [{**GOOD, "segmentation": SMALL}, {**GOOD, "phrase": "far", "segmentation": [box(90, 1, 5, 5)]}]
    dataset = open_dataset(write_lines(tmp_path, *lines), tmp_path)
    write_image(tmp_path / "1.png")
    with pytest.raises(DataError, match="the runs of the encoding add up to 100"):
        dataset.load(0, [0])
    with pytest.raises(DataError, match="the polygons lie outside the image"):
        dataset.load(0, [1])


def test_own_coco_ids(tmp_path):
    write_image(tmp_path / "1.png")
    image = {"id": 1, "file_name": "1.png"}
    good = {"id": 1, "image_id": 1, "phrase": "x", "segmentation": [box(1, 1, 5, 5)]}
    for images, annotations, pattern in (
        ([image], [good, good], "annotation 1: id 1 is there twice"),
        ([image, image], [good], "image id 1 is there twice"),
        ([image, {**image, "id": 2}], [good], r"image 2: 1\.png has another id already"),
        ([image], [{**good, "image_id": 7}], "annotation 1: image 7 is not in the file"),
        ([image], [{**good, "phrase": None}], "annotation 1: phrase is None; needed is str or list"),
        (coco_images(1), [{**good, "image_id": 100, "segmentation": SMALL}], "annotation 1: the run-length encoding"),
    ):
        write_json(tmp_path / "own.json", {"images": images, "annotations": annotations})
        refuses(tmp_path, "own.json", r"own\.json.*" + pattern)
