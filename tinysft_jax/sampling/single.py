"""`sample.py --prompt` and `--test`: single answers, printed."""

import sys

from tinysft_jax.sampling.decode import Decoder
from tinysft_jax.sampling.filters import SamplingOptions
from tinysft_jax.sampling.text import AnswerStream, encode_request, text_options
from tinysft_jax.tokenizer import ChatTokenizer

_KITE = (
    "Mia had a red kite. One windy day the string broke, and the kite flew far over the hill. Mia was sad. Her friend "
    'Leo said, "Let us look for it together." They walked and walked, and at last they saw the kite in a small tree. '
    "Leo held Mia up, and she took it down. Mia was so happy that she let Leo fly the kite all afternoon."
)
_COOKIES = (
    "Tim saw a jar of cookies on the table. Mom said he could have one after dinner, but Tim did not want to wait. He "
    "ate five cookies, and then he told Mom that the dog did it. Soon his tummy hurt. Tim cried and told the truth. "
    'Mom hugged him and said, "Thank you for telling me." After that day Tim did not lie again.'
)
# What the model should have learnt, one request of each kind.
CAPABILITIES = {
    "summary": f"Please provide a brief summary of the following story: {_KITE}",
    "moral": f"What is the moral lesson of this story? {_COOKIES}",
    "use the words": "Write a short story that uses all of these words: boat, sing, brave",
    "main character": f"Based on this story, who is the main character? {_COOKIES}",
    "happy ending": f"Does this story have a happy ending? {_KITE}",
}


def print_answers(
    decoder: Decoder,
    tokenizer: ChatTokenizer,
    options: SamplingOptions,
    prompt: str,
    system: str | None = None,
    num_samples: int = 1,
) -> None:
    """Prints the answer to a prompt as it is made; several answers, made together, with numbers.

    A model without a chat template continues the prompt, which is printed before its continuation.

    Raises:
      UserError: if the prompt can't be answered.
    """
    options = text_options(options, tokenizer, decoder.config)
    ids = encode_request(tokenizer, prompt, system)
    opening = prompt if tokenizer.template is None else ""
    if num_samples == 1:
        pieces = AnswerStream(tokenizer, decoder.stream(ids, options))
        print(opening, end="")
        for text in pieces:
            print(text, end="", flush=True)
        print(flush=True)
        lengths = [len(ids) + pieces.n_tokens]
    else:
        answers = decoder.generate([ids] * num_samples, options)
        for number, answer in enumerate(answers, start=1):
            print(f"[{number}] {opening}{tokenizer.decode(answer)}")
        lengths = [len(ids) + len(answer) for answer in answers]
    if note := decoder.note_on_length(lengths, options):
        print(note, file=sys.stderr)


def print_capabilities(
    decoder: Decoder, tokenizer: ChatTokenizer, options: SamplingOptions, system: str | None = None
) -> None:
    """Prints a request of each kind that the model should have learnt, and its answer."""
    options = text_options(options, tokenizer, decoder.config)
    requests = {kind: encode_request(tokenizer, text, system) for kind, text in CAPABILITIES.items()}
    length = decoder.max_length(options)
    fitting = [kind for kind, ids in requests.items() if len(ids) < length]
    answers = decoder.generate([requests[kind] for kind in fitting], options)
    texts = dict(zip(fitting, map(tokenizer.decode, answers), strict=True))
    for kind, text in CAPABILITIES.items():
        too_long = f"({len(requests[kind])} tokens leave no room for an answer: {length} are the most)"
        print(f"--- {kind}\nUser: {text}\nAssistant: {texts.get(kind, too_long)}\n")
    lengths = [len(requests[kind]) + len(answer) for kind, answer in zip(fitting, answers, strict=True)]
    if note := decoder.note_on_length(lengths, options):
        print(note, file=sys.stderr)
