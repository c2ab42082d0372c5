"""tools.make_masks: masks from boxes, in a layout that the data sets read."""

import json

import numpy as np
import pytest
from PIL import Image

from datasets.catalog import open_dataset
from model.checkpoints.load import build_model, save_model
from model.registry import model_config
from tests.conftest import make_picture
from tools import make_masks
from utils.errors import DataError
from utils.masks import decode_rle


@pytest.fixture
def boxes(tmp_path):
    folder = tmp_path / "Object365/raw/Objects365_v1/2019-08-02"
    (folder / "train").mkdir(parents=True)
    records = [{"id": i, "file_name": f"{i}.png", "height": 120, "width": 160} for i in (7, 8)]
    for record in records:
        Image.fromarray(make_picture()).save(folder / "train" / record["file_name"])
    annotations = [
        {"id": k, "image_id": image, "category_id": category, "bbox": box}
        for k, (image, category, box) in enumerate(
            [(7, 1, [30, 20, 60, 40]), (7, 2, [100, 70, 50, 40]), (8, 1, [30, 20, 60, 40]), (8, 1, [100, 70, 50, 40])]
        )
    ]
    categories = [{"id": 1, "name": "Box"}, {"id": 2, "name": "Square"}]
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps({"images": records, "annotations": annotations, "categories": categories}))
    save_model(build_model(model_config("sam-vit-pico")), tmp_path / "sam")
    return tmp_path, folder, path


def run(monkeypatch, root, folder, path, *options):
    arguments = ["--checkpoint", root / "sam", "--annotations", path, "--images", folder / "train"]
    arguments += ["--output", folder / "o365_res_instances.json", "--device", "cpu", *options]
    monkeypatch.setattr("sys.argv", ["make_masks", *map(str, arguments)])
    return make_masks.main()


def test_boxes_become_objects365(boxes, monkeypatch):
    root, folder, path = boxes
    assert run(monkeypatch, root, folder, path, "--single_instance") == 0
    dataset = open_dataset("obj365", root)
    assert len(dataset) == 1 and dataset.phrases(0) == ["Box", "Square"]
    content = json.loads((folder / "o365_res_instances.json").read_text())
    assert [annotation["id"] for annotation in content["annotations"]] == [0, 1]
    sample = dataset.load(0)
    for annotation, mask in zip(content["annotations"], sample.masks, strict=True):
        assert np.array_equal(decode_rle(annotation["segmentation"][0]), mask == 1)
        assert annotation["area"] == mask.sum()


def test_a_stopped_run_goes_on(boxes, monkeypatch):
    root, folder, path = boxes
    real, seen = make_masks.segment, []

    def stop_at_second(predictor, image, annotations):
        seen.append(image.name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(predictor, image, annotations)

    monkeypatch.setattr(make_masks, "segment", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, root, folder, path)
    assert not (folder / "o365_res_instances.json").exists()
    with pytest.raises(DataError, match="another checkpoint, file or option"):
        run(monkeypatch, root, folder, path, "--single_instance")
    run(monkeypatch, root, folder, path)
    assert seen == ["7.png", "8.png", "8.png"]
    assert len(json.loads((folder / "o365_res_instances.json").read_text())["annotations"]) == 4
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"bbox": [1, 2, 0, 4]}, "both above 0"), ({"image_id": 99}, "not in 'images'"), ({"bbox": None}, "bbox is None")],
)
def test_bad_boxes(boxes, monkeypatch, change, message):
    root, folder, path = boxes
    content = json.loads(path.read_text())
    content["annotations"][0] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        run(monkeypatch, root, folder, path)
