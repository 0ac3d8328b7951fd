"""Text in, text out: single answers as they are made, and conversations that remember."""

import dataclasses
from collections.abc import Iterator

from tinysft_jax import chat
from tinysft_jax.errors import UserError
from tinysft_jax.model import GPTConfig
from tinysft_jax.sampling.decode import Decoder, Prompt
from tinysft_jax.sampling.options import SamplingOptions
from tinysft_jax.tokenizer import ChatTokenizer, StreamDecoder


def text_options(options: SamplingOptions, tokenizer: ChatTokenizer, config: GPTConfig) -> SamplingOptions:
    """The options with which only text comes out: end-of-text ends it; no control token, no id without a meaning."""
    unknown = range(tokenizer.vocab_size, config.vocab_size)
    forbidden = (*options.forbidden_ids, *tokenizer.control_ids.values(), *unknown)
    return dataclasses.replace(options, stop_ids=(tokenizer.eot_id,), forbidden_ids=forbidden)


def encode_request(tokenizer: ChatTokenizer, text: str, system: str | None = None) -> list[int]:
    """The ids that ask for an answer to `text`; with a model that has no chat template, for its continuation.

    Raises:
      UserError: if `text` can't be encoded, or there is a system message but no template to put it in.
    """
    if tokenizer.template is not None:
        return tokenizer.encode_prompt([*_system_message(system), {"role": "user", "content": text}]).tolist()
    if system is not None:
        raise UserError("this model has no chat template, so it takes no system message; leave out --system")
    return tokenizer.encode_text(text)


def stream_text(decoder: Decoder, tokenizer: ChatTokenizer, prompt: Prompt, options: SamplingOptions) -> Iterator[str]:
    """The answer's text as it is made, in whole characters.

    Args:
      decoder: the model.
      tokenizer: its tokenizer.
      prompt: token ids.
      options: of `text_options`.

    Raises:
      UserError: at once, if the prompt can't be continued.
    """
    return _whole_characters(tokenizer, decoder.stream(prompt, options))


def _whole_characters(tokenizer: ChatTokenizer, chunks: Iterator[list[int]]) -> Iterator[str]:
    characters = StreamDecoder(tokenizer)
    for ids in chunks:
        if text := characters.push(ids):
            yield text
    if text := characters.flush():
        yield text


class ChatSession:
    """A conversation with a model that has a chat template.

    Attributes:
      messages: what was said and is remembered, without the system message; user and assistant in turn.
      forgotten: how many exchanges had to be forgotten, because the context had no more room for them.
    """

    def __init__(self, decoder: Decoder, tokenizer: ChatTokenizer, options: SamplingOptions, system: str | None = None):
        self._decoder, self._tokenizer = decoder, tokenizer
        self._options = text_options(options, tokenizer, decoder.config)
        self._system = _system_message(system)
        self.reset()

    def reset(self) -> None:
        """Begins a new conversation."""
        self.messages: list[dict[str, str]] = []
        self.forgotten = 0

    def answer(self, text: str) -> Iterator[str]:
        """Says something to the model, and yields its answer as it is made.

        What was yielded is remembered, even if the answer is broken off (by closing the iterator). An exchange
        without any answer is not: no template has a place for it.

        Raises:
          UserError: at once, if the message can't be encoded or is too long on its own.
        """
        question = {"role": "user", "content": text}
        prompt = self._make_room(question)
        return self._remember(question, stream_text(self._decoder, self._tokenizer, prompt, self._options))

    def _make_room(self, question: dict[str, str]) -> Prompt:
        """Forgets the oldest exchanges if the context has no room for all, and encodes what remains."""
        context = self._decoder.config.max_seq_len
        # An answer of a quarter of the context is room enough; a message that leaves less may still stand alone.
        longest = context - min(self._options.max_new_tokens, context // 4)
        for start in range(0, len(self.messages) + 1, 2):
            kept = self.messages[start:]
            prompt = self._tokenizer.encode_prompt([*self._system, *kept, question])
            if len(prompt) <= longest or not kept:
                break
        if len(prompt) < context:
            self.messages, self.forgotten = kept, self.forgotten + start // 2
        return prompt  # if it is too long even so, the decoder says so

    def _remember(self, question: dict[str, str], pieces: Iterator[str]) -> Iterator[str]:
        answer = ""
        try:
            for text in pieces:
                answer += text
                yield text
        finally:
            if self._tokenizer.template == "text":
                # Markers are plain text there: what follows one would be taken for another turn.
                for marker in (*chat.ROLE_MARKERS.values(), chat.END_OF_TEXT):
                    answer = answer.partition(marker)[0]
            if answer:
                self.messages += [question, {"role": "assistant", "content": answer}]


def _system_message(system: str | None) -> list[dict[str, str]]:
    return [] if system is None else [{"role": "system", "content": system}]
