"""The grammar of conversations and the layout of the templates."""

import pytest

from tinysft_jax import chat
from tinysft_jax.console import UserError

SYSTEM = {"role": "system", "content": "S"}
USER = {"role": "user", "content": "U"}
ANSWER = {"role": "assistant", "content": "A"}


def laid_out(pieces: list[chat.Piece]) -> list[str]:
    """Pieces as text: control tokens in brackets, supervised pieces starred."""
    return [(f"[{p.text}]" if p.control else p.text) + "*" * p.supervised for p in pieces]


def test_control_template_has_single_tokens_between_messages():
    assert laid_out(chat.chat_pieces([SYSTEM, USER, ANSWER], "control")) == [
        *("[<|system|>]", "S", "[<|user|>]", "U", "[<|assistant|>]", "A*", "[<|endoftext|>]*")
    ]


def test_text_template_joins_everything_between_two_answers():
    assert laid_out(chat.chat_pieces([SYSTEM, USER, ANSWER, USER, ANSWER], "text")) == [
        *("<|system|>S<|user|>U<|assistant|>", "A*", "[<|endoftext|>]*"),
        *("<|user|>U<|assistant|>", "A*", "[<|endoftext|>]*"),
    ]


def test_default_system_message_comes_first_only_where_there_is_none():
    default = chat.Piece("You are a helpful assistant that answers questions about stories.", False, False)
    assert chat.chat_pieces([USER, ANSWER], "control")[1] == default
    assert default not in chat.chat_pieces([SYSTEM, USER, ANSWER], "control")


def test_prompt_ends_where_the_assistant_starts():
    assert laid_out(chat.prompt_pieces([SYSTEM, USER], "control"))[-2:] == ["U", "[<|assistant|>]"]
    assert laid_out(chat.prompt_pieces([SYSTEM, USER, ANSWER, USER], "text")) == [
        *("<|system|>S<|user|>U<|assistant|>", "A*", "[<|endoftext|>]*", "<|user|>U<|assistant|>")
    ]


def test_a_last_user_message_is_context_without_an_answer():
    assert laid_out(chat.chat_pieces([SYSTEM, USER, ANSWER, USER], "control"))[-2:] == ["[<|user|>]", "U"]


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "list of at least one"),
        ("Hi", "list of at least one"),
        ({"role": "user", "content": "U"}, "list of at least one"),
        (["Hi"], r'messages\[0\] must be an object with "role" and "content"'),
        ([USER, {"role": "assistant"}], r"messages\[1\] must be an object"),
        ([ANSWER], r"messages\[0\] has the role 'assistant' where 'system' or 'user' is due"),
        ([SYSTEM, ANSWER], r"messages\[1\] has the role 'assistant' where 'user' is due"),
        ([USER, USER], r"messages\[1\] has the role 'user' where 'assistant' is due"),
        ([USER, ANSWER, SYSTEM], r"messages\[2\] has the role 'system' where 'user' is due"),
        ([SYSTEM, SYSTEM], r"messages\[1\] has the role 'system'"),
        ([{"role": "human", "content": "U"}], r"messages\[0\] has the role 'human'"),
        ([{"role": ["user"], "content": "U"}], r"messages\[0\] has the role \['user'\]"),
        ([{"role": "system", "content": " \n"}, USER], r"messages\[0\].content is empty"),
        ([{"role": "user", "content": "\u200b\ufeff\u00ad\x00"}], r"messages\[0\].content is empty"),
        ([USER, {"role": "assistant", "content": ""}], r"messages\[1\].content is empty"),
        ([USER, {"role": "assistant", "content": "\n"}], r"messages\[1\].content is empty"),
        ([USER, {**ANSWER, "weight": 2}], r"messages\[1\].weight is 2; it must be 0 or 1 in .* 'assistant'"),
        ([USER, {**ANSWER, "weight": 0.5}], r"messages\[1\].weight is 0.5"),
        ([USER, {**ANSWER, "weight": True}], r"messages\[1\].weight is True"),
        ([USER, {**ANSWER, "weight": "1"}], r"messages\[1\].weight is '1'"),
        ([USER, {**ANSWER, "weight": [1]}], r"messages\[1\].weight is \[1\]"),
        ([{**USER, "weight": 1}, ANSWER], r"messages\[0\].weight is 1; it must be 0 in .* 'user'"),
        ([{"role": "user", "content": None}], r"messages\[0\].content must be a string, not NoneType"),
        ([{"role": "user", "content": "a\ud83d"}], r"messages\[0\].content .* lone surrogate at character 1"),
    ],
)
def test_grammar_errors_name_the_message_and_the_fault(messages, complaint):
    with pytest.raises(UserError, match=complaint):
        chat.check_messages(messages)


def test_a_conversation_to_learn_from_needs_an_answer():
    for messages in ([USER], [SYSTEM], [SYSTEM, USER]):
        with pytest.raises(UserError, match="nothing to learn"):
            chat.chat_pieces(messages, "control")


def test_an_answer_of_weight_0_is_laid_out_and_not_learned():
    messages = [SYSTEM, USER, {**ANSWER, "weight": 0}, {**USER, "weight": 0}, {**ANSWER, "weight": 1.0}]
    assert laid_out(chat.chat_pieces(messages, "control"))[4:] == [
        *("[<|assistant|>]", "A", "[<|endoftext|>]", "[<|user|>]", "U", "[<|assistant|>]", "A*", "[<|endoftext|>]*")
    ]
    assert laid_out(chat.chat_pieces(messages, "text")) == [
        *("<|system|>S<|user|>U<|assistant|>", "A", "[<|endoftext|>]", "<|user|>U<|assistant|>", "A*"),
        "[<|endoftext|>]*",
    ]
    with pytest.raises(UserError, match=r"nothing to learn: .* whose weight is not 0"):
        chat.chat_pieces(messages[:3], "control")
    chat.chat_pieces([USER, {**ANSWER, "weight": None}], "control")  # says nothing


def test_a_prompt_must_end_with_the_user():
    for messages in ([SYSTEM], [USER, ANSWER]):
        with pytest.raises(UserError, match="a prompt ends with a user message"):
            chat.prompt_pieces(messages, "control")


@pytest.mark.parametrize("marker", ["<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>"])
def test_text_template_refuses_forged_markers(marker):
    forged = [USER, {"role": "assistant", "content": f"a{marker}b"}]
    with pytest.raises(UserError, match=r"messages\[1\].content contains <\|"):
        chat.chat_pieces(forged, "text")
    with pytest.raises(UserError, match=r"messages\[0\].content contains <\|"):
        chat.prompt_pieces([{"role": "user", "content": marker}], "text")
    assert chat.chat_pieces(forged, "control")[-2].text == f"a{marker}b"


def test_parse_chat_reads_both_forms():
    pair = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]
    assert chat.parse_chat({"prompt": "U", "completion": "A", "id": 7}) == pair
    assert chat.parse_chat({"messages": [{**USER, "name": "Ann"}, ANSWER], "prompt": "U"}) == pair
    weighted = [USER, {**ANSWER, "weight": 0}, USER, ANSWER]
    assert chat.parse_chat({"messages": weighted}) == weighted


def test_text_parts_are_joined_with_nothing_between_them():
    parts = [{"type": "text", "text": text} for text in ("a\n", "", "b")]
    messages = [{**USER, "content": parts}, {**ANSWER, "content": parts[:1]}]
    assert chat.parse_chat({"messages": messages}) == [{**USER, "content": "a\nb"}, {**ANSWER, "content": "a\n"}]
    assert messages[0]["content"] is parts


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ([USER, ANSWER], "a line must be an object"),
        ({"prompt": "U"}, '"prompt" and "completion"'),
        ({"prompt": "", "completion": "A"}, "prompt is empty"),
        ({"prompt": "U", "completion": 3}, "completion must be a string, not int"),
        ({"messages": None}, "list of at least one"),
        ({"messages": [USER]}, "nothing to learn"),
    ],
)
def test_parse_chat_says_what_is_wrong(line, complaint):
    with pytest.raises(UserError, match=complaint):
        chat.parse_chat(line)
