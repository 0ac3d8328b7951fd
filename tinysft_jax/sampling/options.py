"""What a caller can choose about how tokens are drawn."""

import dataclasses
import math
import numbers

from tinysft_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How to draw an answer.

    Attributes:
      max_new_tokens: the answer's length at most; the end of the model's context can make it shorter.
      temperature: logits are divided by it; 0 always takes the most likely token.
      top_k: draw among the k most likely tokens; 0 switches the filter off.
      top_p: draw among the most likely tokens that together have this probability, after temperature and top-k; 0
        leaves the most likely token, 1 switches the filter off.
      min_p: draw only tokens that are at least this fraction as likely as the most likely one, after temperature; 0
        switches the filter off.
      repetition_penalty: logits of tokens that stand in the prompt or the answer so far are divided by it where they
        are positive and multiplied where they are negative (CTRL, https://arxiv.org/abs/1909.05858, section 4.1); 1
        switches it off. Stop ids are exempt: a chat is full of them.
      max_length: positions that prompt and answer may take together; None: the length that the model was trained to.
      seed: of the random numbers. Those of a row depend on the seed and the row's index only.
      stop_ids: tokens that end an answer and are not part of it.
      forbidden_ids: tokens that are never drawn.

    Raises:
      UserError: if a number is out of range.
    """

    max_new_tokens: int = 200
    temperature: float | int = 0.7
    top_k: int = 50
    top_p: float | int = 1.0
    min_p: float | int = 0.0
    repetition_penalty: float | int = 1.0
    max_length: int | None = None
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    forbidden_ids: tuple[int, ...] = ()

    def __post_init__(self):
        for name, highest in (("max_new_tokens", 2**31 - 1), ("top_k", 2**31 - 1), ("seed", 2**32 - 1)):
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral) or isinstance(value, bool) or not 0 <= value <= highest:
                raise UserError(f"{name} is {value!r}; it must be a whole number from 0 to {highest}")
        length = self.max_length
        if length is not None and (not isinstance(length, numbers.Integral) or isinstance(length, bool) or length < 1):
            raise UserError(f"max_length is {length!r}; it must be a positive whole number")
        ranges = {"temperature": (0, math.inf), "top_p": (0, 1), "min_p": (0, 1), "repetition_penalty": (0.01, 100)}
        for name, (lowest, highest) in ranges.items():
            value = getattr(self, name)
            is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            # Written so that NaN, which compares as false, fails it.
            if not (is_number and lowest <= value <= highest and math.isfinite(value)):
                wanted = f"from {lowest} to {highest}" if math.isfinite(highest) else "0 or more"
                raise UserError(f"{name} is {value!r}; it must be {wanted}")
