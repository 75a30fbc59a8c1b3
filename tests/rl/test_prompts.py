"""Prompts: files read and refused, and the order of an epoch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from warp_fast.demo.sft import build_tokenizer
from warp_fast.rl.prompts import derive_seed, prompt_batch, read_prompts


def test_reads_json_lines_with_columns(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "the room", "answer": 3}\n\n{"prompt": "the bed"}\n')
    first, second = read_prompts(str(file), build_tokenizer(), 8)
    assert (first.text, first.columns, len(first.token_ids)) == ("the room", {"answer": 3}, 3)
    assert second.columns == {}


def test_renders_chat_messages(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} : {% endfor %}"
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": [{"role": "user", "content": "the room"}]}\n')
    assert read_prompts(str(file), tokenizer, 8)[0].text == "the room : "


@pytest.mark.parametrize("key", ["prompt", "messages"])
def test_chat_messages_get_the_special_tokens_of_their_template_alone(
    tmp_path: Path, key: str
) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    messages = [{"role": "user", "content": "the room"}]
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({key: messages}) + "\n" + json.dumps({"prompt": "the room"}))
    chat, plain = read_prompts(str(file), tokenizer, 8)
    assert chat.token_ids == plain.token_ids == tokenizer("the room")["input_ids"]
    assert chat.token_ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("break_", ["\u2028", "\x0b", "\u0085"])
def test_a_line_ends_where_it_does_in_json(tmp_path: Path, break_: str) -> None:
    file = tmp_path / "p.jsonl"
    row = {"prompt": "the room", "note": f"one{break_}two"}
    file.write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8")
    (prompt,) = read_prompts(str(file), build_tokenizer(), 8)
    assert prompt.columns == {"note": f"one{break_}two"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "at least one prompt"),
        ("\n  \n", "at least one prompt"),
        ("the room was good and the bed was good", "1 to 4 tokens"),
    ],
)
def test_refuses_text(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "p.txt"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(str(file), build_tokenizer(), 4)


@pytest.mark.parametrize("line", ["the room", '{"text": "a"}', "[1]", '{"prompt": 3}'])
def test_refuses_json_without_a_prompt_and_names_the_line(tmp_path: Path, line: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "good"}\n' + line + "\n")
    with pytest.raises(ValueError, match="line 2"):
        read_prompts(str(file), build_tokenizer(), 4)


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    line = "the room" if name == "p.txt" else '{"prompt": "the room"}'
    file.write_text(line, encoding="utf-8-sig")
    assert read_prompts(str(file), build_tokenizer(), 4)[0].text == "the room"


def test_refuses_another_encoding_and_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("café", encoding="latin-1")
    with pytest.raises(ValueError, match=r"p\.txt must be UTF-8 text; it is not: .*position 3"):
        read_prompts(str(file), build_tokenizer(), 4)


USER = {"role": "user", "content": "the room"}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "must not be empty"),
        (" ", "must not be empty"),
        ("good \ud800", "must be a text: .*surrogates not allowed"),
        ([], "must be objects"),
        (["the room"], "must be objects"),
        ([[USER]], "must be objects"),
        ([USER, {"role": "assistant", "content": "good"}], "must end before the answer"),
        ([{"role": "system", "content": "x"}, USER], "template takes: System role"),
        ([{"role": "user"}], "template takes"),
        ([{"role": "user", "content": None}], "template takes"),
    ],
)
def test_refuses_what_is_no_prompt_and_names_the_line(
    tmp_path: Path, prompt: object, message: str
) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{{ bos_token }}{% for m in messages %}{{ m['content'] + '' }}{% endfor %}"
    )
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "good"}\n' + json.dumps({"prompt": prompt}))
    with pytest.raises(ValueError, match=rf"p\.jsonl, line 2.*{message}"):
        read_prompts(str(file), tokenizer, 8)


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 100_000])
def test_refuses_json_that_python_cannot_read(tmp_path: Path, value: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(f'{{"prompt": "good", "x": {value}}}')
    with pytest.raises(ValueError, match=r"p\.jsonl, line 1 must be a JSON object"):
        read_prompts(str(file), build_tokenizer(), 8)


@pytest.mark.parametrize("name", ["p.json", "p.parquet", "p"])
def test_refuses_another_format(tmp_path: Path, name: str) -> None:
    """Its text would be trained on, braces and all."""
    (tmp_path / name).write_text('{"prompt": "the room was"}')
    with pytest.raises(ValueError, match=rf"a \.jsonl file.* got .*{name}: convert it"):
        read_prompts(str(tmp_path / name), build_tokenizer(), 40)


def test_refuses_a_missing_file() -> None:
    with pytest.raises(ValueError, match=r"there is none at nowhere\.txt"):
        read_prompts("nowhere.txt", build_tokenizer(), 4)


def test_every_epoch_holds_every_prompt_once() -> None:
    drawn = [i for step in range(15) for i in prompt_batch(10, 4, step, seed=7)]
    epochs = [drawn[k : k + 10] for k in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert prompt_batch(10, 4, 3, seed=7) == prompt_batch(10, 4, 3, seed=7)
    assert derive_seed(1, 2) != derive_seed(2, 1)
