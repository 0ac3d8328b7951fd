"""A model's chat template in Jinja → a `ChatTemplate`, and the proof that both lay out conversations alike."""

import itertools
import json
import random
import re
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence

from tinysft_jax import chat
from tinysft_jax.bpe import FileBpe
from tinysft_jax.chat_template import ROLES, STRIPPED, ChatTemplate
from tinysft_jax.console import UserError, import_extra, shown
from tinysft_jax.conversion import render_template
from tinysft_jax.tokenizer import ChatTokenizer

Messages = list[dict[str, str]]
PROBES = 200
SECONDS = 2 * render_template.SECONDS  # for all renderings; the process limits its own time, too
# Of a structure's placeholders, and what they are padded with to see what the template strips.
_PLACEHOLDER, _PADS = "zq{}xq", ("\n", " ")
_WORDS = ("Hello", "a", "B2", "cat's", "don't", "3,141", "é", "ß", "🐱", "日本", "x=y", '"Hi"', "{{ a }}", "<b>", "…")
_WHITE = ("", "", " ", "\n", "\n\n", "\t", "  ", " \n")


def take_apart(source: str, variables: Mapping[str, str | None], added: Collection[str]) -> ChatTemplate:
    """The literals of a template, given in Jinja.

    `variables` are the model's special tokens by name (`eos_token`, …), `added` all tokens that text is split at.

    Raises: UserError, if the template fails, never ends, or does more than to put text between contents.
    """
    three_turns, with_system = _numbered(["user", "assistant"] * 3), _numbered(["system", *["user", "assistant"] * 3])
    structures = [three_turns, with_system, three_turns[:2], three_turns[:1]]
    padded = [_padded(three_turns, pad) for pad in _PADS] + [_padded(with_system, pad) for pad in _PADS]
    prompts = [False] * (len(structures) + len(padded)) + [True]
    texts = render(source, variables, [*structures, *padded, three_turns[:1]], prompts)
    plain = _gaps(texts[0], three_turns)
    begin, answer, next_question, answer_2, next_2, last_answer, end = plain
    system = None if isinstance(texts[1], UserError) else _gaps(texts[1], with_system)
    one_turn, (_, open_end) = _gaps(texts[2], three_turns[:2]), _gaps(texts[3], three_turns[:1])
    if (answer, next_question) != (answer_2, next_2) or one_turn != [begin, last_answer, end]:
        raise UserError("what it puts between messages depends on their number")
    if system and system[2:] != plain[1:]:
        raise UserError("what it puts between messages depends on the system message")
    if _gaps(texts[-1], three_turns[:1]) != [begin, last_answer]:
        raise UserError("add_generation_prompt gives something else than what it puts before an answer")
    stripped = _stripped(texts[4:6], three_turns, plain)
    if system:
        stripped |= {"system": _stripped(texts[6:8], with_system, system)["system"]}
    found = re.compile("|".join(re.escape(token) for token in sorted(added, key=len, reverse=True)) or r"(?!)")
    literals = [*plain, open_end, *(system or [])]
    return ChatTemplate(
        begin,
        system and system[0],
        system and system[1],
        answer,
        last_answer,
        next_question,
        end,
        open_end,
        controls=tuple(sorted({token for literal in literals for token in found.findall(literal)})),
        stripped=tuple(stripped.get(role, ("nothing", "nothing")) for role in ROLES),
    )


def prove(tokenizer: ChatTokenizer, source: str, variables: Mapping[str, str | None]) -> None:
    """Compares the ids of probe conversations with those of their rendered text, as transformers encodes it.

    An answer that begins with white space is encoded by itself, where the text's encoding may join this with what is
    before it; then the texts are compared.

    Raises: UserError, with the first conversation that differs.
    """
    template, bpe = tokenizer.template, tokenizer.bpe
    assert isinstance(template, ChatTemplate) and isinstance(bpe, FileBpe)
    probes = list(itertools.islice(_probes(template.takes_system()), PROBES))
    conversations = [*probes, *(messages[:-1] for messages in probes)]
    is_prompt = [False] * PROBES + [True] * PROBES
    for messages, prompt, text in zip(
        conversations, is_prompt, render(source, variables, conversations, is_prompt), strict=True
    ):
        if isinstance(text, UserError):
            raise text
        pieces = (chat.prompt_pieces if prompt else chat.chat_pieces)(messages, template)
        ids = tokenizer.encode_prompt(messages) if prompt else tokenizer.encode_chat(messages)[0]
        spaced = any(piece.answer and piece.text[:1].isspace() for piece in pieces)
        same_ids = ids.tolist() == bpe.encode_whole(text)
        if not same_ids and not (spaced and "".join(piece.text for piece in pieces) == text):
            raise UserError(f"taken apart it gives another text or other ids for the conversation {shown(messages)}")


def render(
    source: str, variables: Mapping[str, str | None], conversations: Sequence[Messages], prompts: Sequence[bool]
) -> list[str | UserError]:
    """The rendered conversations, or what the template said of each; `prompts`: which end where the assistant starts.

    Raises: UserError, if the template can't be compiled, or takes too much time or memory.
    """
    import_extra("jinja2", "hf", "a chat template")
    renders = [
        {"messages": messages, "add_generation_prompt": prompt, "tools": None, "documents": None}
        for messages, prompt in zip(conversations, prompts, strict=True)
    ]
    # Models that can think in silence first (Qwen3) are asked not to: an answer that is learned has no thoughts.
    given = {name: value for name, value in variables.items() if value is not None} | {"enable_thinking": False}
    try:
        done = subprocess.run(
            [sys.executable, "-I", render_template.__file__],
            input=json.dumps({"template": source, "variables": given, "renders": renders}).encode(),
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )
        results = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        results = {"error": f"it does not end within {SECONDS} s"}
    except ValueError:
        results = {"error": f"it does not end within {render_template.SECONDS} s, or takes too much memory"}
    if isinstance(results, dict):
        raise UserError(f"it can't be rendered: {results['error']}")
    return [r["text"] if "text" in r else UserError(f"it refuses a conversation: {r['error']}") for r in results]


def _numbered(roles: Sequence[str]) -> Messages:
    return [{"role": role, "content": _PLACEHOLDER.format(index)} for index, role in enumerate(roles)]


def _padded(messages: Messages, pad: str) -> Messages:
    return [message | {"content": f"{pad}{message['content']}{pad}"} for message in messages]


def _gaps(text: str | UserError, messages: Messages) -> list[str]:
    """The text before, between and after the placeholders; the last but one of a prompt is nothing's."""
    if isinstance(text, UserError):
        raise text
    contents = [message["content"].strip() for message in messages]
    if any(text.count(content) != 1 for content in contents):
        raise UserError("it leaves contents out, repeats them or changes them")
    gaps = re.split("|".join(map(re.escape, contents)), text)
    if [content for content in re.findall("|".join(map(re.escape, contents)), text)] != contents:
        raise UserError("it puts messages in another order")
    return gaps


def _stripped(texts: Sequence[str | UserError], messages: Messages, plain: list[str]) -> dict[str, tuple[str, str]]:
    """What each kind of message loses on the left and on the right, from renderings with each of `_PADS`."""
    kept = []  # for each pad, of each message: whether its left and its right end keep it
    for text, pad in zip(texts, _PADS, strict=True):
        ends = [[False, False] for _ in messages]
        for index, (gap, literal) in enumerate(zip(_gaps(text, messages), plain, strict=True)):
            choices = [(right, left) for right in (index > 0, False) for left in (index < len(messages), False)]
            fits = [c for c in choices if gap == pad * c[0] + literal + pad * c[1]]
            if not fits:
                raise UserError("it changes white space around contents")
            if index:
                ends[index - 1][1] = fits[0][0]
            if index < len(messages):
                ends[index][0] = fits[0][1]
        kept.append(ends)
    names = {(True, True): "nothing", (False, True): "newlines", (False, False): "whitespace"}
    result = {}
    for index, message in enumerate(messages):
        is_last = index == len(messages) - 1
        sides = [(kept[0][index][side], kept[1][index][side]) for side in (0, 1)]
        if any(side not in names for side in sides):
            raise UserError(f"it strips something else than {', '.join(STRIPPED)}")
        result["last_assistant" if is_last else message["role"]] = names[sides[0]], names[sides[1]]
    return result


def _probes(with_system: bool) -> Iterator[Messages]:
    """Conversations of one to three turns, with white space at the ends of contents, the same ones each time."""
    rng = random.Random(0)

    def content() -> str:
        words = " ".join(rng.choice(_WORDS) for _ in range(rng.randint(1, 6)))
        return rng.choice(_WHITE) + words.replace(" ", rng.choice((" ", " ", "\n", "  "))) + rng.choice(_WHITE)

    while True:
        roles = ["system"] * (with_system and rng.random() < 0.5) + ["user", "assistant"] * rng.randint(1, 3)
        yield [{"role": role, "content": content()} for role in roles]
