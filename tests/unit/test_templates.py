from __future__ import annotations

import pytest

from soul.data.batches import collate_rows
from soul.data.templates import ChatTemplate
from soul.types import Example

BORN = Example("Where was Mira Vale born?", "In Accra.")


def decode(tokenizer, ids):
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.fixture
def template(tokenizer):
    return ChatTemplate(tokenizer)


def test_the_fixture_template_does_invent_a_system_turn(tokenizer, invented):
    assert invented in tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)


def test_no_system_turn_is_invented(template, tokenizer):
    assert decode(tokenizer, template.encode(BORN).input_ids) == (
        "<|im_start|>user\nWhere was Mira Vale born?<|im_end|>\n<|im_start|>assistant\nIn Accra.<|im_end|>"
    )


def test_answer_starts_after_the_prompt(template, tokenizer):
    row = template.encode(BORN, index=7)
    assert list(row.input_ids[: row.answer_start]) == template.prompt_ids(BORN)
    assert decode(tokenizer, row.input_ids[row.answer_start :]) == "In Accra.<|im_end|>"
    assert row.answer_length == len(row) - row.answer_start
    assert row.index == 7


def test_end_of_turn_is_a_target_although_pad_is_eos(template, tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == template.end_of_turn
    short, long = template.encode(BORN), template.encode(Example("Who?", "A" * 80))
    batch = collate_rows([short, long], pad_id=tokenizer.pad_token_id)
    targets = batch["input_ids"][0][batch["answer_mask"][0]].tolist()
    assert targets == list(short.input_ids[short.answer_start :])
    assert targets.count(tokenizer.eos_token_id) == 1
    assert batch["attention_mask"][0].sum() == len(short)


@pytest.mark.parametrize("others", [(), (("user", "Hello."), ("assistant", "Hi."))])
def test_own_system_turn_is_kept(template, tokenizer, invented, others):
    example = Example("Who?", "Me.", history=(("system", "Be brief."), *others))
    text = decode(tokenizer, template.encode(example).input_ids)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert text.endswith("<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nMe.<|im_end|>")
    assert invented not in text


def test_history_without_a_system_turn_gets_none(template, tokenizer):
    example = Example("Who?", "Me.", history=(("user", "Hello."), ("assistant", "Hi.")))
    text = decode(tokenizer, template.encode(example).input_ids)
    assert text == (
        "<|im_start|>user\nHello.<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n"
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nMe.<|im_end|>"
    )


def test_a_template_that_invents_nothing_is_left_alone(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    row = ChatTemplate(tokenizer).encode(BORN)
    assert decode(tokenizer, row.input_ids) == "[user]Where was Mira Vale born?<|im_end|>[assistant]In Accra.<|im_end|>"


def test_tokenizer_without_chat_template(make_tokenizer):
    tokenizer = make_tokenizer(template=False)
    row = ChatTemplate(tokenizer).encode(BORN)
    assert decode(tokenizer, row.input_ids[: row.answer_start]) == "Question: Where was Mira Vale born?\nAnswer:"
    assert row.input_ids[-1] == tokenizer.eos_token_id


def test_tokenizer_without_any_end_token(make_tokenizer):
    tokenizer = make_tokenizer(template=False)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end token"):
        ChatTemplate(tokenizer).encode(BORN)


def test_plain_passage_scores_all_but_its_first_token(template, tokenizer):
    row = template.encode(Example("", "Frozen water is ice.", chat=False))
    assert row.answer_start == 1
    assert decode(tokenizer, row.input_ids) == "Frozen water is ice."


def test_completion_is_joined_by_one_space(template, tokenizer):
    row = template.encode(Example("Ice is", "frozen water.", chat=False))
    assert decode(tokenizer, row.input_ids) == "Ice is frozen water.<|im_end|>"
    assert decode(tokenizer, row.input_ids[row.answer_start :]) == " frozen water.<|im_end|>"


def test_another_answer_and_prompt_take_the_place_of_the_own(template, tokenizer):
    text = decode(tokenizer, template.encode(BORN, answer="No idea.", prompt="Who?").input_ids)
    assert "Who?" in text
    assert text.endswith("No idea.<|im_end|>")
    assert "Mira" not in text
    assert "Accra" not in text


def test_prompt_that_leaves_no_room_is_an_error(tokenizer):
    prompt = len(ChatTemplate(tokenizer).prompt_ids(BORN))
    with pytest.raises(ValueError, match=rf"prompt has {prompt} tokens.*max_length={prompt}"):
        ChatTemplate(tokenizer, max_length=prompt).encode(BORN)
    assert ChatTemplate(tokenizer, max_length=prompt + 1).encode(BORN).answer_length == 1


def test_key_names_the_content(template):
    row = template.encode(BORN)
    assert row.key == template.encode(BORN, index=3).key
    assert row.key != template.encode(BORN, answer="In Graz.").key
    assert 0 <= row.key < 1 << 63
