"""Options of train.py: what a YAML file of `configs/experiment/` may say, and the command line may change.

Values marked "ours" were never published for EVF-SAM; the others are from its paper (arXiv 2406.20076, section 4.2).
"""

from dataclasses import dataclass, field, fields
from typing import Literal

from tyro.conf import FlagCreatePairsOff

from utils.errors import TrainingError

from .segmenter_training import DistillArgs, NameArgs, PromptArgs

MAX_SEED = 2**63
OUR_TERMS = ("pointing", "contrast", "prompt", "regions", "iou", "presence", "names")
CLIP_TERMS = {"bce", "dice", "iou", "presence"}
PROMPT_TERMS = {"bce", "dice", "iou"}
NAME_TERMS = ("bce", "dice", "names")
DISTILL_TERMS = {"mse": 1.0, "relative": 0.0, "cosine": 0.0}
"""What is reported of a distillation; the first is what is minimised."""

READ_WITHOUT_PHRASES = {
    "model": {"name", "checkpoint", "segmenter_checkpoint", "clip_checkpoint"},
    "data": {"root", "sets", "batch_size", "workers", "flip", "feature_cache", "held_out", "shard_index", "max_pixels"},
}
"""The options that a training without phrases knows."""

Kind = Literal["phrases", "clips", "distill", "prompts", "names"]


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise TrainingError(text)


@dataclass(frozen=True)
class ModelArgs:
    """What is trained."""

    name: str = "evf-sam2-hiera-tiny-base"
    """Name of the registry (python -m tools.list_models)."""
    checkpoint: str | None = None
    """Fine-tune this EVF-SAM checkpoint (folder, hub id or released name) instead of starting from parts."""
    segmenter_checkpoint: str | None = None
    """SAM .pth, SAM-2 .pt or EfficientSAM .pt file to start the segmenter from; without it, random weights."""
    encoder_checkpoint: str | None = None
    """BEiT-3 .pth file to start the encoder from (the plain pre-trained one, not ITC); without it, random weights."""
    clip_checkpoint: str | None = None
    """CLIP to build Open-Vocabulary SAM on: OpenAI's RN50x16.pt, or a state dict as open_clip has it. Never trained."""
    phrases_from: str | None = None
    """Take encoder, projector and the code of places from this checkpoint, whose segmenter may be another: what its
    phrases say of where things are, the new segmenter can learn to use. Ours."""
    tokenizer: str | None = None
    """Sentencepiece file or its folder (beit3.spm); by default that of the checkpoint."""
    max_length: int = 512
    """Longest phrase in tokens; longer ones are cut with a warning."""
    train_encoder: bool = True
    """Train BEiT-3. Without it, only the projector that follows it."""
    train_projector: bool = True
    """Train what turns a phrase into a prompt. Without it, and without the encoder, prompts stay as they are."""
    train_mask_decoder: bool | None = None
    """Train the mask decoder; by default for SAM and EfficientSAM, not for SAM-2, as published."""
    train_prompt_encoder: bool | None = None
    """Train the learned "no mask" prompt; by default as the mask decoder."""
    train_image_encoder: bool = False
    """Train the segmenter's image encoder too."""
    train_memory: bool | None = None
    """Train SAM 2's memory; by default where clips are trained on (data.clip_frames)."""
    memory_dropout: float = 0.1
    """Dropout of SAM 2's memory attention while it is trained (0 to 1, published 0.1). 0 is faster."""
    lora_rank: int = 0
    """Train low-rank updates of the encoder's linear layers (peft) instead of all its weights; 0 is off."""
    lora_alpha: float = 16.0
    """Scale of the low-rank updates, divided by their rank."""
    gradient_checkpointing: bool = False
    """Compute the encoder's layers again in the backward pass instead of keeping what they made."""

    def __post_init__(self) -> None:
        _require(self.lora_rank >= 0, f"model.lora_rank {self.lora_rank}: needed is 0 (off) or a rank such as 8")
        _require(self.max_length >= 3, f"model.max_length {self.max_length} leaves no room for a phrase. Default: 512")
        _require(
            0 <= self.memory_dropout < 1, f"model.memory_dropout {self.memory_dropout}: needed is at least 0, below 1"
        )
        if self.checkpoint and (self.segmenter_checkpoint or self.encoder_checkpoint or self.clip_checkpoint):
            raise TrainingError(
                "model.checkpoint holds a whole model; segmenter_checkpoint, encoder_checkpoint and clip_checkpoint "
                "hold parts of one. Give one or the other"
            )
        if self.phrases_from and self.encoder_checkpoint:
            raise TrainingError("model.phrases_from and model.encoder_checkpoint both hold an encoder. Give one")


@dataclass(frozen=True)
class DataArgs:
    """What it is trained on."""

    root: str = "dataset"
    """Folder of the data sets, as published (--dataset_dir)."""
    sets: tuple[str, ...] = ("refer_seg",)
    """Groups to mix: each is one set, or several with commas, each as likely: "refcoco|unc|train,refcoco+|unc|train".
    `refer_seg` stands for the four training sets of the RefCOCO family; a .json or .jsonl path is your own data."""
    rates: tuple[float, ...] = ()
    """How often each group is drawn, relative to the others; by default equally."""
    phrases_per_image: int = 3
    """Phrases drawn of an image, at most."""
    sampling: Literal["random", "shuffle"] = "random"
    """random: images are drawn with replacement, as published. shuffle: every image once before any comes again."""
    batch_size: int = 2
    """Images of one forward of one process."""
    workers: int = 4
    """Processes that read images, per rank; 0 reads in the training process."""
    clip_frames: int = 0
    """Train on clips of this many frames of video sets (ref_davis17|train), each phrase read on the first of them; 0
    trains on images. Ours."""
    clip_stride: int = 1
    """Largest distance between the frames of a clip."""
    clip_start: Literal["random", "first"] = "random"
    """Where in a video a clip begins; first, where phrases are true of the first frame alone."""
    clip_masks: float = 0.0
    """Share of the phrases whose first frame is remembered as it was drawn, not as it was found (0 to 1): the memory
    learns to carry a mask on exactly, and does not learn from objects that were mistaken at first. SAM 2's own training
    begins with masks half of the time (arXiv 2408.00714, section D)."""
    flip: float = 0.0
    """Chance of mirroring an image (0 to 1). Published: none. The authors advise 0.5 for SAM-2 and nothing stronger."""
    flip_words: Literal["swap", "skip"] = "swap"
    """What a mirrored image does to phrases with left and right: swap the words, or leave such images as they are."""
    stray_words: float = 0.0
    """Chance that a phrase gets one or two words of the tokenizer that no phrase of the data holds, or punctuation that
    it does not know (0 to 1): an encoder that starts from random weights learns to pass over them. Ours."""
    feature_cache: str | None = None
    """Folder that keeps the image features (bf16) of a frozen image encoder: later epochs read them."""
    held_out: float = 0.01
    """Share of the images that are measured instead of trained on, for training without phrases where no val.sets are
    given (0 to 0.5). Published: the last 1%."""
    shard_index: str | None = None
    """Folder that keeps where the files of .tar shards lie in them: a later start need not look. Ours."""
    skip_missing: bool = False
    """Leave out images whose files are absent, and say how many, instead of stopping."""
    max_pixels: int = 89_478_485
    """Refuse larger images, before they are decoded."""

    def __post_init__(self) -> None:
        _require(bool(self.sets), "data.sets is empty. Name at least one, for example refer_seg")
        _require(
            len(self.rates) in (0, len(self.sets)),
            f"data.rates has {len(self.rates)} numbers, data.sets {len(self.sets)} groups. Give one for each, or none",
        )
        _require(all(rate > 0 for rate in self.rates), f"data.rates {list(self.rates)}: needed are positive numbers")
        _require(0 <= self.flip <= 1, f"data.flip {self.flip}: needed is a chance from 0 to 1")
        _require(0 <= self.stray_words <= 1, f"data.stray_words {self.stray_words}: needed is a chance from 0 to 1")
        _require(
            self.clip_frames == 0 or self.clip_frames >= 2,
            f"data.clip_frames {self.clip_frames}: needed is 0 (images) or at least 2",
        )
        _require(0 <= self.held_out <= 0.5, f"data.held_out {self.held_out}: needed is a share from 0 to 0.5")
        _require(0 <= self.clip_masks <= 1, f"data.clip_masks {self.clip_masks}: needed is a share from 0 to 1")
        _require(self.clip_frames > 0 or not self.clip_masks, "data.clip_masks is for clips. Set data.clip_frames too")
        for name in ("phrases_per_image", "batch_size", "clip_stride"):
            value = getattr(self, name)
            _require(value >= 1, f"data.{name} {value}: needed is at least 1")
        _require(self.workers >= 0, f"data.workers {self.workers}: needed is 0 or more")


@dataclass(frozen=True)
class LossArgs:
    """What is minimised: the mean over phrases of bce * BCE + dice * (1 - dice), and what of ours is asked for."""

    bce: float = 1.0
    dice: float = 1.0
    points: int = 0
    """Compute the loss at this many points of the low-resolution mask instead of every pixel of the image. Ours."""
    pointing: float = 0.0
    """Weight of a loss on the encoder alone: its tokens must mark the image patches of what is meant. An encoder that
    starts from random weights learns from it what the words are. Ours."""
    contrast: float = 0.0
    """Weight of a loss on the encoder alone: a phrase without its image must find the patches of what it means among
    those of all images of the batch, read without a phrase. Ours, for an encoder that starts from random weights."""
    prompt: float = 0.0
    """Weight of the squared distance between a phrase's prompt and the place of what it means, as the segmenter codes
    places: the encoder learns to say where without the segmenter. Ours."""
    regions: float = 0.0
    """Weight of bce and dice where that code is the prompt: the segmenter learns without the encoder. Ours."""
    presence: float = 0.0
    """Weight of the cross-entropy of whether an object is seen, on every frame of a clip. Ours."""
    iou: float = 0.0
    """Weight of the squared error of the predicted IoU, the score of a mask: 0 where nothing is meant. Ours."""
    names: float = 0.0
    """Weight of the cross-entropy of names, of Open-Vocabulary SAM (published: 2)."""

    def terms(self) -> dict[str, float]:
        """Return the weight of each term by name, in the order of a `TrainingStep`'s columns."""
        ours = {name: getattr(self, name) for name in OUR_TERMS}
        masks = {"bce": self.bce, "dice": self.dice} if self.needs_masks else {}
        return masks | {name: weight for name, weight in ours.items() if weight}

    def asked(self) -> dict[str, bool]:
        """Return what the encoder is to say beside the [CLS] vector, as `BEiT3.forward` takes it."""
        return {"points": self.pointing > 0, "apart": self.contrast > 0}

    @property
    def needs_masks(self) -> bool:
        """Whether masks of phrases are made; without them the encoder or the segmenter alone is trained."""
        return self.bce + self.dice + self.iou > 0

    @property
    def needs_fused(self) -> bool:
        """Whether the encoder reads phrases and images together."""
        return self.needs_masks or self.pointing + self.prompt > 0

    @property
    def needs_encoder(self) -> bool:
        """Whether the encoder runs at all."""
        return self.needs_fused or self.contrast > 0

    def __post_init__(self) -> None:
        for name in ("bce", "dice", *OUR_TERMS):
            _require(getattr(self, name) >= 0, f"loss.{name} {getattr(self, name)}: needed is 0 (off) or a weight")
        _require(any(self.terms().values()), "every weight of loss is 0. Give at least one, such as loss.bce 1")
        _require(self.points >= 0, f"loss.points {self.points}: needed is 0 (all pixels) or a count such as 12544")


@dataclass(frozen=True)
class OptimArgs:
    """How: AdamW with a linear warm-up and decay."""

    lr: float = 1e-4
    encoder_lr_scale: float = 1.0
    """The encoder's learning rate relative to `lr`. Ours: some relatives of EVF-SAM halve it."""
    image_lr_scale: float = 1.0
    """The learning rate of the segmenter's image encoder relative to `lr`. Ours."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Ours."""
    weight_decay: float = 0.0
    """Ours; of matrices only, see `decay`."""
    decay: Literal["matrices", "names", "layers"] = "matrices"
    """What decays: matrices only; all but what the published checkpoint calls norm or bias, as EfficientViT-SAM; or all
    but torch's own norm layers, as Open-Vocabulary SAM."""
    warmup: int = 100
    """Steps over which the learning rate rises. Ours."""
    schedule: Literal["linear", "cosine", "constant", "drops"] = "linear"
    drops: tuple[int, ...] = ()
    """Steps from which on the learning rate is a tenth of what it was, for the schedule `drops`."""
    final: float = 0.0
    """Where the schedules `linear` and `cosine` end, relative to `lr` (0 to 1)."""
    steps: int = 15_000
    global_batch: int | None = None
    """Images of one optimizer step over all processes; by default batch_size times processes. More is accumulated."""
    clip: float = 1.0
    """Largest gradient norm; 0 leaves gradients as they are. Ours."""
    clip_value: float = 0.0
    """Largest value of any gradient, as EfficientViT-SAM clips; 0 leaves gradients as they are."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of the arithmetic; trained weights stay in fp32."""

    def __post_init__(self) -> None:
        _require(self.lr > 0, f"optim.lr {self.lr}: needed is a positive number such as 1e-4")
        for name in ("encoder_lr_scale", "image_lr_scale"):
            _require(getattr(self, name) > 0, f"optim.{name} {getattr(self, name)}: needed is a positive number")
        _require(all(0 <= beta < 1 for beta in self.betas), f"optim.betas {self.betas}: needed are two numbers below 1")
        _require(self.steps >= 1, f"optim.steps {self.steps}: needed is at least 1")
        _require(
            self.global_batch is None or self.global_batch >= 1,
            f"optim.global_batch {self.global_batch}: needed is at least 1",
        )
        for name in ("warmup", "weight_decay", "clip", "clip_value"):
            value = getattr(self, name)
            _require(value >= 0, f"optim.{name} {value}: needed is 0 or more")
        _require(0 <= self.final <= 1, f"optim.final {self.final}: needed is a share from 0 to 1")
        _require(
            bool(self.drops) == (self.schedule == "drops"),
            f"optim.drops {list(self.drops)} with optim.schedule {self.schedule}: each needs the other",
        )


@dataclass(frozen=True)
class ValidationArgs:
    """What it is measured on while it trains; the best by cIoU is kept."""

    sets: tuple[str, ...] = ()
    every: int = 500
    """Steps between evaluations; there is always one at the end."""
    batch_size: int = 4
    max_images: int | None = None
    """Measure only this many images of each set, evenly spread over it."""
    root: str | None = None
    """Folder of the validation sets, where it is another than data.root."""

    def __post_init__(self) -> None:
        for name in ("every", "batch_size", "max_images"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"val.{name} {value}: needed is at least 1")


@dataclass(frozen=True)
class RunArgs:
    """Where it runs and what it leaves."""

    out: str = "runs/evf"
    """Folder for weights, logs and pictures."""
    seed: int = 0
    device: str | None = None
    """cpu, cuda or mps; by default CUDA, then MPS, then the CPU."""
    strategy: str = "ddp"
    """ddp, fsdp, zero2, zero3, or the path of a YAML file like those in configs/strategy/."""
    resume: str = "auto"
    """auto goes on from the newest checkpoint in `out`, if any; never refuses a folder with one; or a checkpoint."""
    save_every: int = 500
    """Steps between checkpoints; there is always one at the end."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    log_every: int = 10

    def __post_init__(self) -> None:
        _require(0 <= self.seed < MAX_SEED, f"run.seed {self.seed}: needed is a whole number from 0")
        for name in ("save_every", "keep", "log_every"):
            value = getattr(self, name)
            _require(value >= 1, f"run.{name} {value}: needed is at least 1")


@dataclass(frozen=True)
class TrainConfig:
    """Train EVF-SAM: `train.py configs/experiment/NAME.yaml [--optim.lr 5e-5 ...]`."""

    model: ModelArgs = field(default_factory=ModelArgs)
    data: DataArgs = field(default_factory=DataArgs)
    loss: LossArgs = field(default_factory=LossArgs)
    optim: OptimArgs = field(default_factory=OptimArgs)
    val: ValidationArgs = field(default_factory=ValidationArgs)
    run: RunArgs = field(default_factory=RunArgs)
    distill: DistillArgs = field(default_factory=DistillArgs)
    prompts: PromptArgs = field(default_factory=PromptArgs)
    names: NameArgs = field(default_factory=NameArgs)
    dry_run: FlagCreatePairsOff[bool] = False
    """Build everything, print what trains and on what, and stop before the first step."""

    @property
    def kind(self) -> Kind:
        """What is trained on: phrases of images or clips, a teacher's embedding, masks of boxes and points, names."""
        if self.distill.is_on:
            return "distill"
        if self.names.vocabulary:
            return "names"
        return "prompts" if self.prompts.masks else "clips" if self.data.clip_frames else "phrases"

    def terms(self) -> dict[str, float]:
        """Return the weight of each column of what is minimised, by name; a weight of 0 is reported alone."""
        if self.kind == "names":
            return {name: getattr(self.loss, name) for name in NAME_TERMS}
        return DISTILL_TERMS if self.kind == "distill" else self.loss.terms()

    def __post_init__(self) -> None:
        terms, kind = set(self.loss.terms()), self.kind
        _require(
            kind == "clips" or "presence" not in terms,
            "loss.presence is for clips. Set data.clip_frames, or leave it out",
        )
        _require(
            kind == "distill" or not self.model.clip_checkpoint,
            "model.clip_checkpoint is read in the distillation of Open-Vocabulary SAM alone. Leave it out",
        )
        self._refuse_other_kinds()
        _require(kind == "names" or "names" not in terms, "loss.names needs names.vocabulary. Give it, or leave it out")
        if kind == "clips":
            wrong = sorted(terms - CLIP_TERMS)
            _require(not wrong, f"loss.{' and loss.'.join(wrong)}: clips know {', '.join(sorted(CLIP_TERMS))} alone")
            for name in ("flip", "stray_words", "feature_cache", "rates", "skip_missing"):
                _require(not getattr(self.data, name), f"data.{name} is for images. Leave it out, or data.clip_frames")
            _require(self.data.sampling == "random", "data.sampling is for images: clips are drawn at random")
        if kind == "prompts":
            wrong = sorted(terms - PROMPT_TERMS)
            _require(not wrong, f"loss.{' and loss.'.join(wrong)}: boxes and points know bce, dice and iou alone")
            _require(self.loss.needs_masks and self.loss.points > 0, "loss.points 0: boxes and points need 12544 or so")
            _require(not self.data.feature_cache, "data.feature_cache needs a frozen image encoder; prompts train it")
        if kind == "names":
            wrong = sorted(terms - set(NAME_TERMS))
            _require(not wrong, f"loss.{' and loss.'.join(wrong)}: names know {', '.join(NAME_TERMS)} alone")
            _require(self.loss.points > 0, "loss.points 0: names need 12544 or so")
            _require(not self.data.feature_cache, "data.feature_cache: each image of names is cut anew. Leave it out")

    def _refuse_other_kinds(self) -> None:
        """Refuse options that the kind of training would not read."""
        asked = {
            "distill.teacher": self.distill.is_on,
            "prompts.masks": self.prompts.masks > 0,
            "names.vocabulary": bool(self.names.vocabulary),
            "data.clip_frames": self.data.clip_frames > 0,
        }
        names = [name for name, is_set in asked.items() if is_set]
        _require(len(names) < 2, f"{' and '.join(names)} ask for different trainings. Give one of them")
        if self.kind not in ("distill", "prompts", "names"):
            return
        for group, read in READ_WITHOUT_PHRASES.items():
            options, default = getattr(self, group), type(getattr(self, group))()
            wrong = [f.name for f in fields(options) if getattr(options, f.name) != getattr(default, f.name)]
            wrong = [f"{group}.{name}" for name in wrong if name not in read]
            _require(
                not wrong, f"{' and '.join(wrong)}: not read where {names[0]} is given. Leave out one or the other"
            )
        if self.kind == "distill":
            _require(
                not (self.distill.features and (self.data.feature_cache or self.data.flip)),
                "distill.features knows images by name: data.feature_cache and data.flip do not go with it",
            )
            _require(
                self.loss == LossArgs(), "loss is of masks; a distillation minimises the squared error. Leave it out"
            )


def accumulation(data: DataArgs, optim: OptimArgs, world: int) -> int:
    """Return how many forwards each process adds up for one optimizer step.

    Raises:
        TrainingError: the global batch is not a multiple of what one forward of all processes takes.
    """
    at_once = data.batch_size * world
    total = optim.global_batch or at_once
    if total % at_once:
        raise TrainingError(
            f"optim.global_batch {total} is not a multiple of data.batch_size {data.batch_size} times {world} "
            f"processes. Nearest: {max(1, total // at_once) * at_once}; or change data.batch_size"
        )
    return total // at_once
