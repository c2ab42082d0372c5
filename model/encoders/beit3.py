"""BEiT-3, the early-fusion encoder (arXiv 2208.10442; torchscale 0.2.0): one attention over image and phrase tokens.

Every layer has two sets of weights, A for image tokens and B for text tokens; only the attention is joint. Each half
runs on its own tokens. The model reads a single vector, the image-side [CLS], so the last layer computes only that.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs.schema import BEiT3Config
from utils.errors import PromptError
from utils.image import ImageSpec

from ..attention import attend
from ..types import EncoderOutput

EPS = 1e-5
WORD_POSITION_STD = 0.05
IMAGE_POSITION_STD, SLOWEST, FASTEST = 0.2, 0.25, 2.5
"""How a table of image positions starts: waves of this deviation, from a quarter to two and a half over the image."""
FIT_BIAS = -2.0
"""Logit of a patch of which nothing is known yet, a chance of 0.12."""

POSITION_OFFSET = 2
"""Both position tables start at row 2, as fairseq's do."""


class Twin(nn.Module):
    """Two modules of one shape: `A` for image tokens, `B` for text tokens."""

    def __init__(self, a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.A, self.B = a, b

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Apply each to its own tokens: [N, V, D] and [N, T, D]."""
        return self.A(image), self.B(text)


def _norms(width: int) -> Twin:
    return Twin(nn.LayerNorm(width, eps=EPS), nn.LayerNorm(width, eps=EPS))


def _linears(width: int) -> Twin:
    return Twin(nn.Linear(width, width), nn.Linear(width, width))


class Attention(nn.Module):
    """Joint attention with an inner layer norm over the concatenated heads (sub-LN)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (_linears(width) for _ in range(4))
        self.inner_attn_ln = _norms(width)

    def _keys_values(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = (torch.cat(proj(image, text), dim=1) for proj in (self.k_proj, self.v_proj))
        return keys, values

    def forward(self, image: Tensor, text: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        """Let every token attend to every token that is not padding.

        Args:
            image: [N, V, D], text: [N, T, D]; padding: bool [N, V + T], True at padding, or None.
        """
        query = torch.cat(self.q_proj(image, text), dim=1)
        attended = attend(query, *self._keys_values(image, text), self.heads, padding)
        return self.out_proj(*self.inner_attn_ln(*attended.split([image.shape[1], text.shape[1]], dim=1)))

    def first_only(self, image: Tensor, text: Tensor, padding: Tensor | None) -> Tensor:
        """Return only the output of the first image token, [N, 1, D]."""
        query = self.q_proj.A(image[:, :1])
        attended = attend(query, *self._keys_values(image, text), self.heads, padding)
        return self.out_proj.A(self.inner_attn_ln.A(attended))


class FeedForward(nn.Module):
    """Linear, GELU (in float32), layer norm, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.ffn_layernorm = nn.LayerNorm(hidden, eps=EPS)

    def forward(self, tokens: Tensor) -> Tensor:
        """[N, T, D] to [N, T, D]."""
        hidden = self.fc1(tokens)
        return self.fc2(self.ffn_layernorm(F.gelu(hidden.float()).to(hidden.dtype)))


class Layer(nn.Module):
    """Pre-norm transformer layer with twin weights."""

    def __init__(self, config: BEiT3Config) -> None:
        super().__init__()
        self.self_attn_layer_norm = _norms(config.width)
        self.self_attn = Attention(config.width, config.heads)
        self.final_layer_norm = _norms(config.width)
        self.ffn = Twin(*(FeedForward(config.width, config.mlp_width) for _ in range(2)))

    def forward(
        self, image: Tensor, text: Tensor, padding: Tensor | None, first_only: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """[N, V, D], [N, T, D] to the same; with `first_only` to the first image token [N, 1, D] and None."""
        if first_only:
            return self._first_only(image, text, padding), None
        image_out, text_out = self.self_attn(*self.self_attn_layer_norm(image, text), padding)
        image, text = image + image_out, text + text_out
        image_out, text_out = self.ffn(*self.final_layer_norm(image, text))
        return image + image_out, text + text_out

    def _first_only(self, image: Tensor, text: Tensor, padding: Tensor | None) -> Tensor:
        first = image[:, :1] + self.self_attn.first_only(*self.self_attn_layer_norm(image, text), padding)
        return first + self.ffn.A(self.final_layer_norm.A(first))


class VisionEmbedding(nn.Module):
    """Patch embedding with a class token.

    `mask_token` is not used in inference; published checkpoints hold it. Training may mark patches with it.
    """

    def __init__(self, config: BEiT3Config) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.width))

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] to [B, 1 + (S/p)^2, D]."""
        patches = self.proj(pixels).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)


def _waves(side: int, width: int) -> Tensor:
    """Return sines and cosines of the places x and y of a grid, float [side * side, width]."""
    rates = 2 * math.pi * torch.linspace(SLOWEST, FASTEST, width // 4)
    phases = (torch.arange(side) + 0.5)[:, None] / side * rates
    line = torch.cat([phases.sin(), phases.cos()], dim=1)
    columns, rows = line.expand(side, -1, -1), line[:, None].expand(-1, side, -1)
    table = torch.cat([columns, rows], dim=2).flatten(0, 1) * IMAGE_POSITION_STD * math.sqrt(2)
    return F.pad(table, (0, width - table.shape[1]))


def pair(
    image: Tensor, text: Tensor, padding: Tensor | None, image_index: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Put each phrase beside its image: [B, V, D], [N, T, D] to [N, V, D], [N, T, D] and key padding [N, V + T]."""
    if image_index is not None:
        image = image.index_select(0, image_index)
    elif image.shape[0] != text.shape[0]:
        image = image.expand(text.shape[0], -1, -1)
    if padding is None:
        return image, text, None
    return image, text, torch.cat([padding.new_zeros(image.shape[:2]), padding], dim=1)


class BEiT3(nn.Module):
    """BEiT-3 base, large or any other size."""

    def __init__(self, config: BEiT3Config) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        """Whether training computes layers again in the backward pass instead of keeping what they made."""
        self.image_spec = ImageSpec(
            size=config.image_size, resize="square", filter="torch-bicubic", mean=(0.5,) * 3, std=(0.5,) * 3, scale=1.0
        )
        image_tokens = self.grid**2 + 1
        self.text_embed = nn.Embedding(config.vocab_size, config.width)
        self.vision_embed = VisionEmbedding(config)
        self.positions = Twin(
            nn.Embedding(image_tokens + POSITION_OFFSET, config.width),
            nn.Embedding(config.max_text_tokens + POSITION_OFFSET, config.width),
        )
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = _norms(config.width)

    def init_weights(self) -> None:
        """Initialise for training from scratch: linear layers as torchscale's modules do, positions in a way of ours.

        The published wrapper starts with smaller linear weights, made for its widths, and with position tables of
        deviation 1, fourteen times that of the words of a narrow encoder, which then hardly tells two phrases apart.
        Here words get a small table. Image patches get waves, from which their place can be read at once.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                is_read = any(part in name for part in ("q_proj", "k_proj", "v_proj"))
                nn.init.xavier_uniform_(module.weight, gain=math.sqrt(0.5) if is_read else 1.0)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.text_embed.weight, std=self.config.width**-0.5)
        nn.init.normal_(self.positions.B.weight, std=WORD_POSITION_STD)
        with torch.no_grad():
            self.positions.A.weight.zero_()
            self.positions.A.weight[POSITION_OFFSET + 1 :] = _waves(self.grid, self.config.width)

    @property
    def grid(self) -> int:
        """Patches on a side of the image."""
        return self.config.image_size // self.config.patch_size

    def embed_image(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] to tokens with their places, [B, V, D]."""
        image = self.vision_embed(pixels)
        return image + self.positions.A.weight[POSITION_OFFSET : POSITION_OFFSET + image.shape[1]]

    def embed_text(self, ids: Tensor, padding: Tensor | None) -> Tensor:
        """[N, T] to tokens with their places, [N, T, D], 0 at padding."""
        if ids.shape[1] > self.config.max_text_tokens:
            raise PromptError(f"phrase of {ids.shape[1]} tokens; the encoder takes {self.config.max_text_tokens}")
        text = self.text_embed(ids) + self.positions.B.weight[POSITION_OFFSET : POSITION_OFFSET + ids.shape[1]]
        return text if padding is None else text.masked_fill(padding[..., None], 0.0)

    def read_apart(self, pixels: Tensor, ids: Tensor, padding: Tensor | None, layers: int) -> tuple[Tensor, Tensor]:
        """Return image tokens [B, V, D] and text tokens [N, T, D] after so many layers, neither seeing the other."""
        image, text = self.embed_image(pixels), self.embed_text(ids, padding)
        no_image, no_text = image[:1, :0].expand(text.shape[0], -1, -1), text[:1, :0].expand(image.shape[0], -1, -1)
        for layer in self.layers[:layers]:
            image, _ = self._run(layer, image, no_text, None)
            _, text = self._run(layer, no_image, text, padding)
        return image, text

    def _run(self, layer: Layer, image: Tensor, text: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, image, text, padding, use_reentrant=False)
        return layer(image, text, padding)

    def forward(
        self,
        pixels: Tensor,
        ids: Tensor,
        padding: Tensor | None = None,
        image_index: Tensor | None = None,
        points: bool = False,
        apart: bool = False,
        fused: bool = True,
    ) -> EncoderOutput:
        """Fuse phrases with their images and return the [CLS] vector.

        Args:
            pixels: float [B, 3, S, S], made by `image_spec`.
            ids: int64 [N, T].
            padding: bool [N, T], True at padding; None where there is none.
            image_index: int64 [N], the image of each phrase; None where N = B or B = 1.
            points: whether to say also which patches of the image the tokens mark as meant.
            apart: whether to read images and phrases also apart from each other.
            fused: whether to read them together, which is what everything but training asks for.

        Raises:
            PromptError: the phrase has more tokens than the position table.
        """
        if not fused:
            return EncoderOutput(None, None, *self._pooled(*self._apart(pixels, ids, padding), padding))
        read = self.read_apart(pixels, ids, padding, self.config.apart_layers)
        image, text, key_padding = pair(*read, padding, image_index)
        for layer in self.layers[self.config.apart_layers : -1]:
            image, text = self._run(layer, image, text, key_padding)
        first, _ = self.layers[-1](image, text, key_padding, first_only=True)
        vector, fit = self.norm.A(first)[:, 0], None
        if points:
            patches = F.layer_norm(image[:, 1:], image.shape[-1:], eps=EPS)
            fit = (patches @ self.vision_embed.mask_token[0, 0] + FIT_BIAS).unflatten(1, (self.grid, self.grid))
        if not apart:
            return EncoderOutput(vector, fit)
        read = read if self.config.apart_layers else self._apart(pixels, ids, padding)
        return EncoderOutput(vector, fit, *self._pooled(*read, padding))

    def _apart(self, pixels: Tensor, ids: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the tokens of which `EncoderOutput.patches` and `EncoderOutput.words` are made."""
        return self.read_apart(pixels, ids, padding, self.config.apart_layers or len(self.layers) - 1)

    def _pooled(self, image: Tensor, text: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return normalised patches [B, V - 1, D] and the mean of the words of each phrase, [N, D]."""
        patches, text = (F.layer_norm(tokens, tokens.shape[-1:], eps=EPS) for tokens in (image[:, 1:], text))
        if padding is None:
            return patches, text.mean(1)
        keep = (~padding).to(text.dtype)[..., None]
        return patches, (text * keep).sum(1) / keep.sum(1)

    def forward_all(
        self, pixels: Tensor, ids: Tensor, padding: Tensor | None = None, image_index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the last layer's output of every token, [N, V, D] and [N, T, D]: the slow twin of `forward`."""
        read = self.read_apart(pixels, ids, padding, self.config.apart_layers)
        image, text, key_padding = pair(*read, padding, image_index)
        for layer in self.layers[self.config.apart_layers :]:
            image, text = layer(image, text, key_padding)
        return self.norm(image, text)
