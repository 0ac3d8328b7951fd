"""A model's chat template in Jinja → a `ChatTemplate`, and the proof that both lay out conversations alike."""

import datetime
import itertools
import json
import random
import re
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence

from tinysft_jax import chat
from tinysft_jax.chat_template import ROLES, STRIPPED, ChatTemplate
from tinysft_jax.console import UserError, shown
from tinysft_jax.conversion import render_template
from tinysft_jax.tokenizer import ChatTokenizer

Messages = list[dict[str, str]]
PROBES = 200
_NOW = datetime.datetime.now().isoformat()  # the day that templates show
SECONDS = 2 * render_template.SECONDS  # for all renderings; the process limits its own time, too
_WORDS = ("Hello", "a", "B2", "cat's", "don't", "3,141", "é", "ß", "🐱", "日本", "x=y", '"Hi"', "{{ a }}", "<b>", "…")
_WHITE = ("", "", " ", "\n", "\n\n", "\t", "  ", " \n")


def take_apart(source: str, variables: Mapping[str, str], added: Collection[str]) -> ChatTemplate:
    """The literals of a template, given in Jinja.

    `variables` are the model's special tokens by name (`eos_token`, …), `added` all tokens that text is split at.

    Raises: UserError, if the template fails, never ends, or does more than to put text between contents.
    """
    turns, with_system = (_numbered([*first, *["user", "assistant"] * 3]) for first in ([], ["system"]))
    padded = _padded(turns) + _padded(with_system)
    chats = [(messages, False) for messages in (turns, with_system, turns[:2], turns[:1], *padded)]
    texts = render(source, variables, [*chats, (turns[:1], True)])
    begin, answer, next_question, *_, last_answer, end = plain = _gaps(texts[0], turns)
    system = [None] if isinstance(texts[1], UserError) else _gaps(texts[1], with_system)
    one_turn, (_, open_end) = _gaps(texts[2], turns[:2]), _gaps(texts[3], turns[:1])
    if one_turn != [begin, last_answer, end]:
        raise UserError("what it puts between messages depends on their number")
    if _gaps(texts[-1], turns[:1]) != [begin, last_answer]:
        raise UserError("add_generation_prompt gives something else than what it puts before an answer")
    stripped = {"system": ("nothing", "nothing")} if len(system) == 1 else _stripped(texts[8:12], with_system, system)
    stripped |= _stripped(texts[4:8], turns, plain)
    token = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or r"(?!)")
    literals = begin, system[0], (system * 2)[1], answer, last_answer, next_question, end, open_end
    controls = {found for literal in literals if literal for found in token.findall(literal)}
    return ChatTemplate(*literals, tuple(sorted(controls)), tuple(stripped[role] for role in ROLES))


def prove(tokenizer: ChatTokenizer, source: str, variables: Mapping[str, str]) -> None:
    """Compares the ids of probe conversations with those of their rendered text, as transformers encodes it.

    An answer that begins with white space is encoded by itself, where the text's encoding may join this with what is
    before it; then the texts are compared.

    Raises: UserError, with the first conversation that differs.
    """
    template, bpe = tokenizer.template, tokenizer.bpe
    probes = list(itertools.islice(probe_conversations(template.begin_system is not None), PROBES))
    conversations = [(messages, False) for messages in probes] + [(messages[:-1], True) for messages in probes]
    texts = render(source, variables, conversations)
    for (messages, prompt), text in zip(conversations, texts, strict=True):
        if isinstance(text, UserError):
            raise text
        pieces = (chat.prompt_pieces if prompt else chat.chat_pieces)(messages, template)
        ids = tokenizer.encode_prompt(messages) if prompt else tokenizer.encode_chat(messages)[0]
        spaced = any(piece.answer and piece.text[:1].isspace() for piece in pieces)
        same_ids = ids.tolist() == bpe.encode_whole(text)
        if not same_ids and not (spaced and "".join(piece.text for piece in pieces) == text):
            raise UserError(f"taken apart it gives another text or other ids for the answer {shown(messages[-1])}")


def render(
    source: str, variables: Mapping[str, str], conversations: Sequence[tuple[Messages, bool]]
) -> list[str | UserError]:
    """The rendered conversations, or what the template said of each; a prompt (true) ends where the assistant starts.

    Raises: UserError, if the template can't be compiled, or takes too much time or memory.
    """
    # Models that can think in silence first (Qwen3) are asked not to: an answer that is learned has no thoughts.
    given = {**variables, "tools": None, "documents": None, "enable_thinking": False}
    renders = [{"messages": messages, "add_generation_prompt": prompt} for messages, prompt in conversations]
    request = json.dumps({"template": source, "variables": given, "renders": renders, "now": _NOW}).encode()
    command = [sys.executable, "-I", render_template.__file__]
    try:
        done = subprocess.run(command, input=request, capture_output=True, timeout=SECONDS, check=False)
        results = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        results = {"error": f"it does not end within {SECONDS} s"}
    except ValueError:
        results = {"error": f"it does not end within {render_template.SECONDS} s, or takes too much memory"}
    if isinstance(results, dict):
        raise UserError(f"it can't be rendered: {results['error']}")
    return [r["text"] if "text" in r else UserError(f"it refuses a conversation: {r['error']}") for r in results]


def _numbered(roles: Sequence[str]) -> Messages:
    return [{"role": role, "content": f"zq{index}xq"} for index, role in enumerate(roles)]


def _padded(messages: Messages) -> list[Messages]:
    """The conversation with a line break before each content, with one after each, and the same with a space."""
    pads = [(pad * (side == "left"), pad * (side == "right")) for pad in "\n " for side in ("left", "right")]
    return [[m | {"content": f"{left}{m['content']}{right}"} for m in messages] for left, right in pads]


def _gaps(text: str | UserError, messages: Messages) -> list[str]:
    """The text before, between and after the placeholders."""
    if isinstance(text, UserError):
        raise text
    contents = [message["content"].strip() for message in messages]
    if any(text.count(content) != 1 for content in contents):
        raise UserError("it leaves contents out, repeats them or changes them")
    if sorted(contents, key=text.index) != contents:
        raise UserError("it puts messages in another order")
    return re.split("|".join(map(re.escape, contents)), text)


def _stripped(texts: Sequence[str | UserError], messages: Messages, plain: list[str]) -> dict[str, tuple[str, str]]:
    """What each kind of message loses on the left and on the right, from renderings of `_padded`."""
    kept = [[gap != literal for gap, literal in zip(_gaps(text, messages), plain, strict=True)] for text in texts]
    # Whether a line break stays, and a space.
    names = {(True, True): "nothing", (False, True): "newlines", (False, False): "whitespace"}
    result = {}
    for index, message in enumerate(messages):
        sides = [(kept[side][index + side], kept[2 + side][index + side]) for side in (0, 1)]
        if not names.keys() >= set(sides):
            raise UserError(f"it strips something else than {', '.join(STRIPPED)}")
        role = "last_assistant" if index == len(messages) - 1 else message["role"]
        result[role] = names[sides[0]], names[sides[1]]
    return result


def probe_conversations(with_system: bool) -> Iterator[Messages]:
    """Conversations of one to three turns, with white space at the ends of contents, the same ones each time."""
    rng = random.Random(0)

    def content() -> str:
        words = " ".join(rng.choice(_WORDS) for _ in range(rng.randint(1, 6)))
        return rng.choice(_WHITE) + words.replace(" ", rng.choice((" ", " ", "\n", "  "))) + rng.choice(_WHITE)

    while True:
        roles = ["system"] * (with_system and rng.random() < 0.5) + ["user", "assistant"] * rng.randint(1, 3)
        yield [{"role": role, "content": content()} for role in roles]
