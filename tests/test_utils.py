"""The other files of utils/, and how configs/schema.py reads a mapping."""

import itertools
import json
import logging
import re

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from configs.loader import encoder_configs, read_yaml
from configs.schema import BEiT3Config, EfficientSAMConfig, SAM2Config, SAMConfig, from_mapping
from model.checkpoints.evf_sam import sections
from model.checkpoints.load import build_model
from model.checkpoints.rules import KeyMap, named_tensors
from model.registry import list_models, model_config
from tests.conftest import PICO, TOKENIZER
from utils.distributed import Ranks
from utils.errors import CheckpointError, ModelError, PromptError, TextSAMError, compress_names, nearest, run_main
from utils.files import atomic_path, write_json
from utils.masks import boxes_of_masks, decode_rle, encode_rle, save_mask
from utils.precision import choose_device, choose_dtype
from utils.tokenizer import PhraseTokenizer, find_tokenizer, semantic_phrase
from utils.visualize import PALETTE, colours, overlay, save_picture, with_legend


@pytest.fixture(scope="module")
def tokenizer():
    return PhraseTokenizer(TOKENIZER)


class TestTokenizer:
    @pytest.mark.parametrize("phrase", ["the zebra on the left", "dog", "[semantic] sky", "the  two   dogs", "The Dog"])
    def test_ids_are_pieces_shifted_by_one(self, tokenizer, phrase):
        pieces = tokenizer.pieces.encode(phrase)
        assert tokenizer.encode(phrase) == [0, *(piece + 1 if piece else 3 for piece in pieces), 2]

    def test_known_phrase_has_known_ids(self, tokenizer):
        zebra, dog = (tokenizer.pieces.piece_to_id(piece) for piece in ("▁zebra", "▁dog"))
        assert min(zebra, dog) > 2
        assert tokenizer.encode("zebra dog") == [0, zebra + 1, dog + 1, 2]

    def test_case_is_kept(self, tokenizer):
        assert tokenizer.encode("Dog") != tokenizer.encode("dog")

    @pytest.mark.parametrize("phrase", ["狗", "é"])
    def test_unknown_is_three(self, tokenizer, phrase):
        assert tokenizer.pieces.encode(phrase)[-1] == 0
        assert tokenizer.encode(phrase)[-2:] == [3, 2]

    @pytest.mark.parametrize("special", ["<s>", "</s>", "<pad>", "<mask>", "<unk>"])
    def test_special_tokens_in_a_phrase_stay_text(self, tokenizer, special):
        inner = tokenizer.encode(f"the {special} dog")[1:-1]
        assert not {0, 1, 2, tokenizer.vocab_size - 1} & set(inner)
        assert len(inner) > 3

    def test_vocabulary_has_room_for_the_shift_and_the_mask_token(self, tokenizer):
        assert tokenizer.vocab_size == tokenizer.pieces.get_piece_size() + 2

    def test_batch_is_padded_on_the_right(self, tokenizer):
        phrases = ["dog", "the zebra on the left", "a cat"]
        ids, padding = tokenizer(phrases)
        assert (ids.dtype, padding.dtype, ids.shape) == (torch.int64, torch.bool, padding.shape)
        for row, hidden, phrase in zip(ids, padding, phrases, strict=True):
            own = tokenizer.encode(phrase)
            assert row.tolist() == own + [1] * (ids.shape[1] - len(own))
            assert hidden.tolist() == [False] * len(own) + [True] * (ids.shape[1] - len(own))
        assert ids.shape[1] == max(len(tokenizer.encode(phrase)) for phrase in phrases)

    def test_one_phrase_has_no_padding(self, tokenizer):
        assert not tokenizer(["the zebra"])[1].any()

    def test_overlong_phrase_is_refused_with_its_length(self):
        short = PhraseTokenizer(TOKENIZER, max_length=5)
        assert len(short.encode("dog dog dog")) == 5
        with pytest.raises(PromptError, match=r"phrase of 6 tokens, allowed are 5: 'dog dog dog dog'.* Shorten it"):
            short.encode("dog dog dog dog")

    def test_overlong_phrase_is_cut_with_a_warning(self, caplog):
        short = PhraseTokenizer(TOKENIZER, max_length=5, overlong="truncate")
        assert short.encode("dog dog dog cat") == short.encode("dog dog dog")
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "6 tokens cut to 5" in caplog.text

    @pytest.mark.parametrize("phrase", ["", " ", "\t\n"])
    def test_empty_phrase_is_refused(self, tokenizer, phrase):
        with pytest.raises(PromptError, match=f"empty phrase {re.escape(repr(phrase))}. Describe the object"):
            tokenizer.encode(phrase)

    def test_phrase_that_is_not_unicode_is_refused(self, tokenizer):
        with pytest.raises(PromptError, match=r"phrase 'caf\\udce9' is not Unicode text"):
            tokenizer.encode("caf\udce9")

    @pytest.mark.parametrize("content", [b"", b"no sentencepiece model", b"\x00" * 64])
    def test_other_file_is_refused(self, tmp_path, content):
        path = tmp_path / "sentencepiece.bpe.model"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"sentencepiece\.bpe\.model is not a sentencepiece model"):
            PhraseTokenizer(tmp_path)

    def test_absent_file_is_refused(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"no tokenizer in .*sentencepiece\.bpe\.model, beit3\.spm"):
            PhraseTokenizer(tmp_path)

    @pytest.mark.parametrize("name", ["sentencepiece.bpe.model", "beit3.spm", "spiece.model"])
    def test_file_is_found_by_each_published_name(self, tmp_path, name):
        (tmp_path / name).touch()
        assert find_tokenizer(tmp_path) == find_tokenizer(tmp_path / name) == tmp_path / name

    def test_semantic_prefix_is_added_once(self):
        assert semantic_phrase("sky") == semantic_phrase(semantic_phrase("sky")) == "[semantic] sky"


def masks_of(*boxes, height=6, width=9):
    """Return bool [N, H, W] with a filled box x1 y1 x2 y2 each, None for an empty mask."""
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, box in zip(masks, boxes, strict=True):
        if box is not None:
            mask[box[1] : box[3], box[0] : box[2]] = True
    return masks


BOXES = [(2, 1, 7, 4), None, (3, 2, 4, 3), (0, 0, 1, 1), (8, 5, 9, 6), (0, 0, 9, 6), (4, 0, 5, 6)]


class TestMasks:
    def test_boxes_are_tight_and_zero_for_an_empty_mask(self):
        boxes = boxes_of_masks(masks_of(*BOXES))
        assert boxes.dtype == torch.float32
        assert boxes.tolist() == [list(box or (0, 0, 0, 0)) for box in BOXES]

    def test_box_spans_parts_that_do_not_touch(self):
        both = masks_of((1, 4, 2, 5)) | masks_of((6, 0, 8, 1))
        assert boxes_of_masks(both).tolist() == [[1, 0, 8, 5]]

    def test_no_masks(self):
        assert boxes_of_masks(masks_of()).shape == (0, 4)
        assert encode_rle(masks_of().numpy()) == []

    @pytest.mark.parametrize("dtype", [bool, np.uint8])
    def test_rle_round_trip(self, dtype):
        masks = np.concatenate([masks_of(*BOXES).numpy(), np.random.default_rng(0).random((3, 6, 9)) > 0.5])
        rles = json.loads(json.dumps(encode_rle(masks.astype(dtype))))
        assert [rle["size"] for rle in rles] == [[6, 9]] * len(masks)
        for rle, mask in zip(rles, masks, strict=True):
            decoded = decode_rle(rle)
            assert decoded.dtype == bool
            np.testing.assert_array_equal(decoded, mask)

    def test_rle_runs_down_the_columns(self):
        from pycocotools import mask as coco_mask

        rle = encode_rle(masks_of((1, 2, 2, 4)).numpy())[0]
        assert coco_mask.frPyObjects({"size": [6, 9], "counts": [8, 2, 44]}, 6, 9)["counts"] == rle["counts"].encode()

    def test_counts_may_be_bytes(self):
        rle = encode_rle(masks_of((2, 1, 7, 4)).numpy())[0]
        np.testing.assert_array_equal(decode_rle({**rle, "counts": rle["counts"].encode()}), decode_rle(rle))

    def test_saved_mask_is_eight_bit(self, tmp_path):
        mask = masks_of((2, 1, 7, 4))[0].numpy()
        save_mask(tmp_path / "mask.png", mask)
        with Image.open(tmp_path / "mask.png") as image:
            assert image.mode == "L"
            np.testing.assert_array_equal(np.array(image), mask * np.uint8(255))


class TestFiles:
    def test_success_replaces_and_leaves_nothing_else(self, tmp_path):
        path = tmp_path / "new" / "file.json"
        for value in ({"a": 1}, {"b": [2]}):
            write_json(path, value)
            assert json.loads(path.read_text()) == value
        assert list(path.parent.iterdir()) == [path]

    @pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
    @pytest.mark.parametrize("earlier", [None, "old"])
    def test_failure_keeps_the_old_file_and_no_temporary(self, tmp_path, error, earlier):
        path = tmp_path / "file.txt"
        if earlier:
            path.write_text(earlier)
        with pytest.raises(error), atomic_path(path) as temporary:
            temporary.write_text("half")
            assert not path.exists() or path.read_text() == earlier
            raise error
        assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == ([("file.txt", earlier)] if earlier else [])

    def test_unserialisable_value_leaves_the_old_file(self, tmp_path):
        write_json(tmp_path / "file.json", [1])
        with pytest.raises(TypeError):
            write_json(tmp_path / "file.json", [object()])
        assert [p.name for p in tmp_path.iterdir()] == ["file.json"]
        assert json.loads((tmp_path / "file.json").read_text()) == [1]

    def test_temporary_keeps_the_suffix_and_lies_beside(self, tmp_path):
        with atomic_path(tmp_path / "a.png") as temporary:
            assert (temporary.suffix, temporary.parent) == (".png", tmp_path)
            assert temporary.name.startswith(".")
            temporary.touch()

    @pytest.mark.parametrize("text", ["é 狗", "not utf-8: \udce9", "line\u2028end"])
    def test_any_text_can_be_read_back(self, tmp_path, text):
        write_json(tmp_path / "file.json", [text])
        assert json.loads((tmp_path / "file.json").read_text("utf-8")) == [text]


def expand(text):
    """Return the names that `compress_names` wrote, braces expanded as a shell does."""
    names = []
    for item in re.split(r", ", text):
        options = []
        for part in re.split(r"(\{[^}]*\})", item):
            if not part.startswith("{"):
                options.append([part])
            elif ".." in part:
                first, last = part[1:-1].split("..")
                options.append([str(n) for n in range(int(first), int(last) + 1)])
            else:
                options.append(part[1:-1].split(","))
        names += ["".join(choice) for choice in itertools.product(*options)]
    return names


def published_keys(family):
    """Return the tensor names of a published pico checkpoint."""
    with torch.device("meta"):
        model = build_model(model_config(PICO[family]))
    return list(KeyMap(named_tensors(model), sections(family)).ours)


class TestErrors:
    @pytest.mark.parametrize("family", PICO)
    @pytest.mark.parametrize("step", [1, 2, 3, 7])
    def test_compressed_names_are_all_there(self, family, step):
        names = published_keys(family)[::step]
        text = compress_names(names)
        assert sorted(expand(text)) == sorted(names)
        assert "\n" not in text

    def test_compressed_names_are_much_shorter(self):
        names = published_keys("sam")
        assert len(compress_names(names)) < len(", ".join(names)) / 2

    @pytest.mark.parametrize(
        ("names", "expected"),
        [
            (["a.0.w", "a.1.w", "a.1.b"], "a.{0..1}.w, a.1.b"),
            (["a.0.w", "a.2.w", "a.3.w"], "a.{0,2,3}.w"),
            (["a.0.b.0", "a.0.b.1", "a.1.b.0", "a.1.b.1"], "a.{0..1}.b.{0..1}"),
            (["a.0.b.0", "a.1.b.1"], "a.0.b.0, a.1.b.1"),
            (["a.10.w", "a.9.w"], "a.{9..10}.w"),
            (["a.01.w", "a.1.w"], "a.01.w, a.1.w"),
            (["conv1.w", "conv2.w"], "conv1.w, conv2.w"),
            (["0", "w"], "0, w"),
            ([], ""),
        ],
    )
    def test_compressed_names(self, names, expected):
        assert compress_names(names) == expected
        assert not names or sorted(expand(expected)) == sorted(names)

    def test_nearest_name(self):
        assert nearest("evf-sam2-mulitask", list_models()).startswith(" Did you mean 'evf-sam2-multitask'")
        assert nearest("zzzzzz", list_models()) == ""
        assert nearest("ab", ["abc", "abd"]) in (" Did you mean 'abc' or 'abd'?", " Did you mean 'abd' or 'abc'?")

    def test_every_error_is_a_value_error(self):
        kinds = TextSAMError.__subclasses__()
        assert len(kinds) >= 5
        assert all(issubclass(kind, ValueError) for kind in kinds)

    @pytest.mark.parametrize(
        ("raised", "status", "shown"),
        [
            (PromptError("two\n lines"), 2, "error: two lines\n"),
            (KeyboardInterrupt(), 130, "interrupted: "),
            (None, 0, ""),
        ],
    )
    def test_script_ends_with_one_line_and_a_status(self, capsys, monkeypatch, raised, status, shown):
        monkeypatch.setattr(logging, "basicConfig", lambda **options: None)

        def main():
            if raised is not None:
                raise raised

        with pytest.raises(SystemExit) as stop:
            run_main(main)
        written = capsys.readouterr().err
        assert stop.value.code == status
        assert written.startswith(shown)
        assert written.count("\n") == (raised is not None)

    def test_status_of_main_is_the_status_of_the_script(self, monkeypatch):
        monkeypatch.setattr(logging, "basicConfig", lambda **options: None)
        with pytest.raises(SystemExit) as stop:
            run_main(lambda: 1)
        assert stop.value.code == 1

    def test_a_bug_keeps_its_traceback(self, monkeypatch):
        monkeypatch.setattr(logging, "basicConfig", lambda **options: None)
        with pytest.raises(ZeroDivisionError):
            run_main(lambda: 1 // 0)


class TestPrecision:
    @pytest.fixture
    def no_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)

    @pytest.fixture
    def two_gpus(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    @pytest.mark.parametrize("name", ["tpu", "", "cuda:x", "meta", "gpu"])
    def test_unknown_device(self, name):
        with pytest.raises(ModelError, match=f"device '{name}' ?.*Allowed: cpu, cuda, cuda:0 …, mps"):
            choose_device(name)

    @pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:3", "mps"])
    def test_absent_device(self, no_gpu, name):
        with pytest.raises(ModelError, match=f"device '{name}' is not available.*Use --device cpu"):
            choose_device(name)

    def test_cpu_where_there_is_nothing_else(self, no_gpu):
        assert choose_device() == choose_device("cpu") == torch.device("cpu")

    @pytest.mark.parametrize(
        ("name", "local_rank", "index"), [(None, 0, 0), (None, 1, 1), ("cuda", 3, 1), ("cuda:1", 0, 1)]
    )
    def test_gpu_by_local_rank_where_the_name_does_not_say(self, two_gpus, name, local_rank, index):
        assert choose_device(name, local_rank) == torch.device("cuda", index)

    def test_gpu_beyond_the_count(self, two_gpus):
        with pytest.raises(ModelError, match="'cuda:2' is not available: 2 CUDA devices here"):
            choose_device("cuda:2")

    def test_fp16_on_the_cpu_falls_back_with_a_warning(self, caplog):
        assert choose_dtype("fp16", torch.device("cpu")) == torch.float32
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "fp32" in caplog.text

    def test_bf16_where_the_gpu_has_none_falls_back_with_a_warning(self, caplog, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old GPU")
        assert choose_dtype("bf16", torch.device("cuda")) == torch.float16
        assert "an old GPU has no bf16" in caplog.text

    @pytest.mark.parametrize(
        ("precision", "device", "dtype"),
        [
            (None, "cpu", torch.float32),
            ("fp32", "cpu", torch.float32),
            ("bf16", "cpu", torch.bfloat16),
            (None, "cuda", torch.float16),
            ("fp16", "cuda", torch.float16),
            ("fp32", "cuda", torch.float32),
        ],
    )
    def test_precision_is_kept_where_the_device_can(self, caplog, precision, device, dtype):
        assert choose_dtype(precision, torch.device(device)) == dtype
        assert not caplog.records

    def test_unknown_precision(self):
        with pytest.raises(ModelError, match=r"unknown precision 'fp8'\. Allowed: fp32, bf16, fp16"):
            choose_dtype("fp8", torch.device("cpu"))


class TestRanks:
    @pytest.mark.parametrize(("count", "world"), [*itertools.product([0, 1, 2, 5, 16], [1, 2, 3, 8])])
    def test_every_item_is_shared_once(self, count, world):
        shares = [Ranks(rank, world).share(range(count)) for rank in range(world)]
        assert sorted(itertools.chain(*shares)) == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1

    def test_environment_of_torchrun(self, monkeypatch):
        for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
            monkeypatch.setenv(name, value)
        assert Ranks.from_environment(local_rank=3) == Ranks(5, 8, 1)
        assert not Ranks.from_environment().is_first

    def test_single_process_and_its_gpu(self, monkeypatch):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        assert Ranks.from_environment(local_rank=3) == Ranks(0, 1, 3)
        assert Ranks.from_environment().is_first
        Ranks.from_environment().wait_for_all()


class TestVisualize:
    def test_overlay_changes_the_mask_and_its_outline_only(self, picture):
        masks = masks_of((30, 20, 90, 60), height=120, width=160).numpy()
        before = picture.copy()
        shown = overlay(picture, masks)
        np.testing.assert_array_equal(picture, before)
        outline = cv2.morphologyEx(masks[0].astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((5, 5), np.uint8)).astype(
            bool
        )
        inside = masks[0] & ~outline
        np.testing.assert_array_equal(shown[~masks[0] & ~outline], picture[~masks[0] & ~outline])
        expected = (picture[inside].astype(float) + PALETTE[0]) / 2
        np.testing.assert_allclose(shown[inside], expected, atol=0.5)
        assert (np.abs(shown[20, 31:89] - PALETTE[0].astype(int)) < 20).all()

    @pytest.mark.parametrize("opacity", [0.0, 1.0])
    def test_opacity(self, picture, opacity):
        masks = masks_of((30, 20, 90, 60), height=120, width=160).numpy()
        inside = overlay(picture, masks, opacity)[25:55, 35:85]
        np.testing.assert_array_equal(inside, PALETTE[0] * np.ones_like(inside) if opacity else picture[25:55, 35:85])

    def test_later_masks_lie_on_top(self, picture):
        masks = masks_of((30, 20, 90, 60), (50, 30, 120, 100), height=120, width=160).numpy()
        assert (overlay(picture, masks, 1.0)[40, 70] == PALETTE[1]).all()
        assert (overlay(picture, masks, 1.0)[25, 40] == PALETTE[0]).all()

    @pytest.mark.parametrize("masks", [masks_of(height=120, width=160), masks_of(None, height=120, width=160)])
    def test_nothing_to_show_changes_nothing(self, picture, masks):
        np.testing.assert_array_equal(overlay(picture, masks.numpy()), picture)

    def test_colours_start_again(self):
        assert colours(0).shape == (0, 3)
        np.testing.assert_array_equal(colours(25)[20:], PALETTE[:5])

    @pytest.mark.parametrize("count", [1, 3])
    def test_legend_grows_the_picture_below(self, picture, count):
        made = with_legend(picture, [f"{k}: a dog" for k in range(count)])
        one = with_legend(picture, ["0: a dog"])
        np.testing.assert_array_equal(made[:120], picture)
        assert made.shape == (120 + (one.shape[0] - 120) * count, 160, 3)
        legend = made[120:].reshape(-1, 3)
        for colour in [*PALETTE[:count], (0, 0, 0), (255, 255, 255)]:
            assert (legend == colour).all(axis=1).any()

    def test_saved_picture_is_read_back(self, picture, tmp_path):
        save_picture(tmp_path / "new" / "a.png", picture)
        np.testing.assert_array_equal(np.array(Image.open(tmp_path / "new" / "a.png")), picture)


PICO_BEIT3 = {"width": 192, "layers": 4, "heads": 3, "mlp_width": 768}
SAM_VALUES = {"width": 96, "layers": 4, "heads": 3, "global_blocks": [1, 3]}


class TestFromMapping:
    def test_lists_become_tuples(self):
        config = from_mapping(SAMConfig, SAM_VALUES, "here")
        assert config == SAMConfig(96, 4, 3, (1, 3))
        assert hash(config)

    def test_unknown_key_is_named_with_the_nearest(self):
        with pytest.raises(ModelError, match=r"here: unknown key 'widht'. Known: width, .* Did you mean 'width'"):
            from_mapping(BEiT3Config, {**PICO_BEIT3, "widht": 1}, "here")

    def test_missing_keys_are_named(self):
        with pytest.raises(ModelError, match=r"here: missing key 'layers', 'mlp_width'"):
            from_mapping(BEiT3Config, {"width": 192, "heads": 3}, "here")

    @pytest.mark.parametrize("value", ["192", 192.0, True, None, 0, -3, [192]])
    def test_wrong_type_or_range_is_named(self, value):
        with pytest.raises(ModelError, match=r"here: width is .*, needed is a positive whole number"):
            from_mapping(BEiT3Config, {**PICO_BEIT3, "width": value}, "here")

    @pytest.mark.parametrize(
        ("kind", "values", "named"),
        [
            (BEiT3Config, {**PICO_BEIT3, "heads": 5}, "192 is not a multiple of 5 heads"),
            (BEiT3Config, {**PICO_BEIT3, "image_size": 225}, "225 is not a multiple of patch_size 16"),
            (SAMConfig, {**SAM_VALUES, "image_size": 1000}, "1000 is not a multiple of 16"),
            (EfficientSAMConfig, {"width": 100, "heads": 3}, "100 is not a multiple of 3 heads"),
            (SAM2Config, "version", "version '3.0': known are '2.0' and '2.1'"),
            (SAM2Config, "global_blocks", r"\[1\]: the first blocks of a stage \[1, 3, 10\] must have windows"),
        ],
    )
    def test_values_that_cannot_work_together(self, kind, values, named):
        if isinstance(values, str):
            tiny = read_yaml("model/sam2.yaml")["sam2-hiera-tiny"]
            values = {**tiny, values: {"version": "3.0", "global_blocks": [1]}[values]}
        with pytest.raises(ModelError, match=named):
            from_mapping(kind, values, "here")

    def test_published_scales_are_read(self):
        assert encoder_configs()["large"] == BEiT3Config(1024, 24, 16, 4096)
