"""A conversation with a model, which remembers what was said and keeps its keys and values on the device."""

from collections.abc import Iterator

from tinysft_jax import chat
from tinysft_jax.errors import UserError
from tinysft_jax.sampling.cache import KeptCache
from tinysft_jax.sampling.decode import Decoder
from tinysft_jax.sampling.options import SamplingOptions
from tinysft_jax.sampling.text import AnswerStream, Messages, encode_request, system_message, text_options
from tinysft_jax.tokenizer import ChatTokenizer


class Session:
    """Questions and answers; each prompt is a function of what was said, and only what is new in it is computed.

    A model without a chat template continues each text by itself.

    Attributes:
      options: how to draw the next answer; of `text_options`.
      messages: what was said, without the system message: user and assistant in turn.
      forgotten: how many exchanges, the oldest, did not fit into the last prompt.
      last: the last answer's stream; None before the first.
      opening: what to show before the last answer: without a chat template, the text that it continues.
    """

    def __init__(self, decoder: Decoder, tokenizer: ChatTokenizer, options: SamplingOptions, system: str | None = None):
        """Begins a conversation.

        Raises:
          UserError: if the system message can't be used.
        """
        self._decoder, self._tokenizer, self._kept = decoder, tokenizer, KeptCache()
        self.options = text_options(options, tokenizer, decoder.config)
        self.last: AnswerStream | None = None
        self._prompt_length = 0
        self.opening = ""
        self._system: str | None = None
        if system is not None:
            self.system = system
        self.reset()

    @property
    def is_chat(self) -> bool:
        """Whether the model has a chat template."""
        return self._tokenizer.template is not None

    @property
    def system(self) -> str | None:
        """The system message; None: the one that models are trained with. A new one holds for all that was said.

        Raises:
          UserError: when it is set, if the template can't take it.
        """
        return self._system

    @system.setter
    def system(self, text: str) -> None:
        if not self.is_chat:
            raise UserError("this model has no chat template, so it takes no system message")
        shortest = self._encode([*system_message(text), {"role": "user", "content": "a"}])
        self._decoder.check_prompt(shortest, "a question after this system message", self.options)
        self._system = text

    @property
    def note(self) -> str:
        """What the user should know of the last answer; see `Decoder.note_on_length`."""
        if self.last is None:
            return ""
        return self._decoder.note_on_length([self._prompt_length + self.last.n_tokens], self.options)

    @property
    def transcript(self) -> Messages:
        """The whole conversation, as chat-jsonl has it."""
        return [*system_message(self._system), *self.messages]

    def reset(self) -> None:
        """Begins anew, with the same system message."""
        self.messages: Messages = []
        self.forgotten = 0
        self._unanswered: str | None = None
        self._attempt = 0

    def resume(self, transcript: Messages) -> None:
        """Goes on with another conversation.

        Args:
          transcript: an optional system message, then user and assistant in turn; an answer comes last.

        Raises:
          UserError: if it is none; the present conversation stays.
        """
        if not self.is_chat:
            raise UserError("this model has no chat template, so it has no conversation to go on with")
        if transcript[-1]["role"] != "assistant":
            raise UserError("the conversation ends without an answer; only one that ends with an answer can go on")
        self._encode([*transcript, {"role": "user", "content": "a"}])  # refuses what the template can't lay out
        self.reset()
        self.messages, self._system = transcript, None
        if transcript[0]["role"] == "system":
            self.messages, self._system = transcript[1:], transcript[0]["content"]

    def ask(self, text: str) -> Iterator[str]:
        """Says something to the model, and yields its answer as it is made.

        What was yielded is remembered, even if the answer is broken off (by closing the iterator). An exchange
        without any answer is not: no template has a place for it.

        Raises:
          UserError: at once, if the message can't be encoded or is too long on its own.
        """
        return self._answer(text, self.messages, attempt=0)

    def retry(self) -> Iterator[str]:
        """Has the last question answered again, with other random numbers, in place of its answer.

        Raises:
          UserError: if there is none.
        """
        if self._unanswered is not None:
            return self._answer(self._unanswered, self.messages, self._attempt + 1)
        if not self.messages:
            raise UserError("there is no question yet to answer again")
        return self._answer(self.messages[-2]["content"], self.messages[:-2], self._attempt + 1)

    def undo(self) -> str:
        """Forgets the last question and its answer, and returns the question.

        Raises:
          UserError: if there is none.
        """
        question, self._unanswered, self._attempt = self._unanswered, None, 0
        if question is not None:
            return question
        if not self.messages:
            raise UserError("there is no question yet to take back")
        question, self.messages = self.messages[-2]["content"], self.messages[:-2]
        return question

    def _answer(self, text: str, history: Messages, attempt: int) -> Iterator[str]:
        prompt, forgotten = self._fit(history, {"role": "user", "content": text})
        stream = self._decoder.stream(prompt, self.options, self._kept, row=attempt)
        # From here on nothing is refused.
        self._prompt_length = len(prompt)
        self.last, self.messages, self.forgotten = AnswerStream(self._tokenizer, stream), history, forgotten
        self._unanswered, self._attempt, self.opening = text, attempt, "" if self.is_chat else text
        return self._remember(text, self.last)

    def _fit(self, history: Messages, question: dict[str, str]) -> tuple[list[int], int]:
        """Encodes what the context has room for: the question, and before it as much of the history as possible.

        Returns:
          The prompt, and how many exchanges had to be left out.
        """
        if not self.is_chat:
            return self._encode([question]), 0
        # An answer of a quarter of the room is enough; a message that leaves less may still stand alone.
        room = self._decoder.max_length(self.options)
        longest = room - min(self.options.max_new_tokens, room // 4)
        for start in range(0, len(history) + 1, 2):
            prompt = self._encode([*system_message(self._system), *history[start:], question])
            if len(prompt) <= longest:
                break
        return prompt, start // 2  # if it is too long even so, the decoder says so

    def _encode(self, messages: Messages) -> list[int]:
        if self.is_chat:
            return self._tokenizer.encode_prompt(messages).tolist()
        return encode_request(self._tokenizer, messages[-1]["content"])

    def _remember(self, question: str, pieces: AnswerStream) -> Iterator[str]:
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
            if not chat.is_blank(answer):
                exchange = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                self.messages, self._unanswered = self.messages + exchange, None
