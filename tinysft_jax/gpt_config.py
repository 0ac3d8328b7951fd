"""The shape of a GPT: by default the PyTorch project's, and any of the Llama and Qwen families."""

import dataclasses
from typing import Literal, get_args, get_origin

from tinysft_jax.console import UserError, shown

# Rows of the embedding are padded to a multiple of this: any mesh divides them, and matmuls tile well.
VOCAB_MULTIPLE = 128
# Positions and ids are 32-bit integers.
LARGEST_SIZE = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretch of rotary positions to a longer context; see `rotary_steps`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int

    def __post_init__(self):
        _check_fields(self, "model.rope_scaling")
        if self.low_freq_factor >= self.high_freq_factor:
            raise UserError(
                f"model.rope_scaling.low_freq_factor {self.low_freq_factor} is not below high_freq_factor "
                f"{self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT; raises a UserError if no model has it.

    The fields after `rope_theta` are for models of other families, and their defaults are the PyTorch project's.
    `n_kv_heads` heads of keys and values are each shared by n_heads / n_kv_heads query heads (0: one each);
    `head_dim` 0 is dim / n_heads. Both are replaced by what they mean.
    """

    vocab_size: int = 50257
    dim: int = 768
    n_layers: int = 12
    n_heads: int = 12
    max_seq_len: int = 1024
    mlp_ratio: float = 4.0
    rope_theta: float = 10000.0
    n_kv_heads: int = 0
    head_dim: int = 0
    norm: Literal["layer", "rms"] = "layer"  # with a bias; without
    norm_epsilon: float = 1e-5
    qkv_bias: bool = False
    qk_norm: bool = False  # an RMS norm of each head's query and key
    tied_head: bool = True  # to the embedding
    rope_scaling: RopeScaling | None = None
    scalar_head: bool = False  # a reward model's, which scores a conversation, in place of the head over the vocabulary

    def __post_init__(self):
        _check_fields(self, "model")
        if not isinstance(self.rope_scaling, RopeScaling | None):
            raise UserError(f"model.rope_scaling is {shown(self.rope_scaling)}; it must be a RopeScaling or None")
        if not self.head_dim:
            if self.dim % self.n_heads:
                raise UserError(f"model.dim {self.dim} is not divisible by model.n_heads {self.n_heads}")
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        if self.head_dim % 2:
            raise UserError(f"head size {self.head_dim} (dim / n_heads) is odd; rotary positions need an even one")
        object.__setattr__(self, "n_kv_heads", self.n_kv_heads or self.n_heads)
        if self.n_heads % self.n_kv_heads:
            raise UserError(f"model.n_heads {self.n_heads} is not divisible by model.n_kv_heads {self.n_kv_heads}")
        if not 1 <= self.hidden_dim <= LARGEST_SIZE:
            raise UserError(f"model.mlp_ratio {self.mlp_ratio} makes {self.hidden_dim} hidden units at dim {self.dim}")

    @property
    def hidden_dim(self) -> int:
        return int(self.dim * self.mlp_ratio)

    @property
    def qkv_dims(self) -> tuple[int, int, int]:
        """Features of queries, keys and values, over all their heads."""
        return self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim, self.n_kv_heads * self.head_dim

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding in memory."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def _check_fields(shape: object, name: str) -> None:
    """Checks numbers, which are positive (or a default of 0), and choices; a float may be written as an int."""
    for field in dataclasses.fields(shape):
        value, kind, wanted = getattr(shape, field.name), field.type, ""
        if kind in (int, float):
            is_number = type(value) in (int, kind) and (0 < value <= LARGEST_SIZE or value == 0 == field.default)
            wanted = "" if is_number else f"a positive {kind.__name__} below 2^31"
        elif kind is bool and type(value) is not bool:
            wanted = "true or false"
        elif get_origin(kind) is Literal and value not in get_args(kind):
            wanted = f"one of {', '.join(get_args(kind))}"
        if wanted:
            raise UserError(f"{name}.{field.name} is {shown(value)}; it must be {wanted}")
        if kind is float:
            object.__setattr__(shape, field.name, float(value))
