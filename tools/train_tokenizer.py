"""Train a small sentencepiece tokenizer, on the phrases of data sets or on generated ones.

python -m tools.train_tokenizer --output assets/tokenizer
python -m tools.train_tokenizer --output runs/tokenizer --pieces 1200 --dataset_dir dataset --sets "grefcoco|unc|train"
"""

import io
import itertools
import random
from dataclasses import dataclass
from pathlib import Path

COLOURS = """
    red blue green yellow black white brown orange pink purple grey dark light striped spotted
""".split()  # noqa: SIM905
SIZES = """
    small big large tiny tall short biggest smallest largest
""".split()  # noqa: SIM905
NOUNS = """
    person man woman child boy girl player cat dog horse zebra cow sheep bird bear elephant giraffe car bus
    truck train bike motorcycle boat plane bench chair couch table bed desk lamp book bottle cup glass bowl
    plate fork knife spoon apple banana carrot pizza cake donut sandwich tree flower plant house window door
    wall umbrella bag backpack shirt jacket hat shoe tie ball bat kite board phone laptop keyboard mouse screen
    clock vase sink oven
""".split()  # noqa: SIM905
PLACES = (
    "left", "right", "top", "bottom", "middle", "top left", "top right", "bottom left", "bottom right", "on the left",
    "on the right", "in the middle", "in front", "in the back", "closest to us", "far away", "second from the left",
    "third from right",
)  # fmt: skip
RELATIONS = ("next to", "left of", "right of", "above", "below", "behind", "in front of", "on", "under", "holding")


def phrases(seed: int = 0, count: int = 20_000) -> list[str]:
    """Return phrases of every form."""
    draw = random.Random(seed)
    made = list(itertools.chain(NOUNS, PLACES, COLOURS, SIZES, ["[semantic] " + noun for noun in NOUNS]))
    for _ in range(count):
        noun, other = draw.sample(NOUNS, 2)
        made.append(
            draw.choice(
                (
                    f"{draw.choice(COLOURS)} {noun} {draw.choice(PLACES)}",
                    f"the {draw.choice(SIZES)} {noun} {draw.choice(RELATIONS)} the {other}",
                    f"{noun} {draw.choice(PLACES)}",
                    f"all the {noun}s",
                    f"the {noun} that is {draw.choice(COLOURS)}",
                )
            )
        )
    return made


@dataclass(frozen=True)
class Args:
    """Train a small sentencepiece tokenizer."""

    output: Path
    """Folder for sentencepiece.bpe.model."""
    pieces: int = 600
    """Largest vocabulary; fewer where the phrases have no more words."""
    seed: int = 0
    """Of the generated phrases."""
    sets: tuple[str, ...] = ()
    """Data sets whose phrases are learned from, such as "grefcoco|unc|train"; generated phrases where not given."""
    dataset_dir: str = "dataset"
    """Folder of the data sets, as published."""


def phrases_of(sets: tuple[str, ...], root: str) -> list[str]:
    """Return every phrase of some data sets.

    Raises:
        DataError: a set cannot be opened.
    """
    from datasets.catalog import open_dataset

    opened = [open_dataset(name, root) for name in sets]
    return [text for dataset in opened for index in range(len(dataset)) for text in dataset.phrases(index)]


def main() -> int:
    """Write the model."""
    from configs.cli import parse

    args = parse(Args, "tools/train_tokenizer.py")
    import sentencepiece

    from utils.files import atomic_path

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(phrases_of(args.sets, args.dataset_dir) if args.sets else phrases(args.seed)),
        model_writer=model,
        vocab_size=args.pieces,
        model_type="unigram",
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc_cf" if args.sets else "identity",  # cf: "The Cat" is "the cat"
        num_threads=1,
        minloglevel=2,
    )
    with atomic_path(args.output / "sentencepiece.bpe.model") as path:
        path.write_bytes(model.getvalue())
    made = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
    print(f"{path.parent / 'sentencepiece.bpe.model'}: {made} pieces")
    return 0


if __name__ == "__main__":
    from utils.errors import run_main

    run_main(main)
