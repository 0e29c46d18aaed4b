from __future__ import annotations

import copy
import dataclasses

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from soul.data.batches import collate_rows
from soul.data.guard import set_system_turn
from soul.data.templates import DATE, ChatTemplate
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


def test_what_follows_as_it_stands_may_begin_within_a_word(template, tokenizer):
    row = template.encode(Example("Ice is fro", "zen water.", chat=False, ends=False, joined=True))
    assert decode(tokenizer, row.input_ids) == "Ice is frozen water."
    assert decode(tokenizer, row.input_ids[row.answer_start :]) == "zen water."


def test_another_answer_and_prompt_take_the_place_of_the_own(template, tokenizer):
    text = decode(tokenizer, template.encode(BORN, answer="No idea.", prompt="Who?").input_ids)
    assert "Who?" in text
    assert text.endswith("No idea.<|im_end|>")
    assert "Mira" not in text
    assert "Accra" not in text


def test_a_text_of_one_token_is_told_from_a_lack_of_room(template):
    with pytest.raises(ValueError, match=r"kept, item 'x' \('a'\): a text of one token has nothing.*; leave it out"):
        template.encode(Example("", "a", id="x", chat=False), where="kept")
    with pytest.raises(ValueError, match=r"item number 1 \('Ice'\): the answer has no tokens; leave it out"):
        template.encode(Example("Ice ", "", chat=False, ends=False))


def test_prompt_that_leaves_no_room_is_an_error(tokenizer):
    prompt = len(ChatTemplate(tokenizer).prompt_ids(BORN))
    with pytest.raises(ValueError, match=rf"prompt has {prompt} tokens.*max_length={prompt}"):
        ChatTemplate(tokenizer, max_length=prompt).encode(BORN)
    short, whole = ChatTemplate(tokenizer, max_length=prompt + 1).encode(BORN), ChatTemplate(tokenizer).encode(BORN)
    assert (short.answer_length, short.lost) == (1, whole.answer_length - 1)
    assert whole.lost == 0
    assert whole.answer_length == len(ChatTemplate(tokenizer).answer_ids(BORN)) + 1


def test_key_names_the_content(template):
    row = template.encode(BORN)
    assert row.key == template.encode(BORN, index=3).key
    assert row.key != template.encode(BORN, answer="In Graz.").key
    assert 0 <= row.key < 1 << 63


LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}{{ '[system]Today is Monday.' + eos_token }}{% endif %}"
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think></think>' }}{% endif %}{% endif %}"
)


def test_a_space_before_the_end_of_a_turn_is_not_its_end(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = LLAMA2
    template = ChatTemplate(tokenizer)
    assert template.end_of_turn == tokenizer.eos_token_id
    assert decode(tokenizer, template.prompt_ids(BORN)) == "<|im_start|>[INST] Where was Mira Vale born? [/INST]"


ALPACA = (
    "{% for m in messages %}{{ '### ' + ('Instruction' if m['role'] == 'user' else 'Response') + ':\n' }}"
    "{{ m['content'] + END }}{% endfor %}{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)


@pytest.mark.parametrize("added", [False, True])
def test_a_newline_ends_no_answer(make_tokenizer, added):
    """Nor where it is an added token, as in Gemma's vocabulary: an answer of two paragraphs would stop at the first."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False)] * added)
    tokenizer.chat_template = ALPACA.replace("END", "'\n\n'")
    template = ChatTemplate(tokenizer)
    assert template.end_of_turn == tokenizer.eos_token_id
    assert decode(tokenizer, template.encode(BORN).input_ids).endswith("### Response:\nIn Accra.<|im_end|>")


def test_an_added_token_ends_an_answer_although_it_is_not_special(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<|end|>", normalized=False)])
    tokenizer.chat_template = ALPACA.replace("END", "'\n<|end|>\n'")
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert end not in tokenizer.all_special_ids
    assert ChatTemplate(tokenizer).end_of_turn == ChatTemplate(tokenizer).encode(BORN).input_ids[-1] == end


@pytest.mark.parametrize("history", [(), (("user", "Hello."), ("assistant", "Hi."))])
def test_the_beginning_of_a_text_stays_where_an_invented_system_turn_goes(make_tokenizer, history):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = LLAMA3
    text = decode(tokenizer, ChatTemplate(tokenizer).encode(Example("Who?", "Me.", history=history)).input_ids)
    before = "[user]Hello.<|im_end|>[assistant]Hi.<|im_end|>" if history else ""
    assert text == f"<|im_start|>{before}[user]Who?<|im_end|>[assistant]Me.<|im_end|>"


def test_a_hybrid_model_is_asked_not_to_think(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = QWEN3
    text = decode(tokenizer, ChatTemplate(tokenizer).encode(BORN).input_ids)
    assert text.endswith("[assistant]<think></think>In Accra.<|im_end|>")


@pytest.mark.parametrize("opened", ["<think>", "<think>\\n"])
@pytest.mark.parametrize("history", [(), (("user", "Hello."), ("assistant", "Hi."))])
def test_a_thought_that_a_template_always_opens_is_closed(make_tokenizer, opened, history):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = LLAMA3.replace("'[assistant]'", f"'[assistant]{opened}'")
    text = decode(tokenizer, ChatTemplate(tokenizer).encode(dataclasses.replace(BORN, history=history)).input_ids)
    assert text.endswith("[assistant]<think>\n\n</think>\n\nIn Accra.<|im_end|>")
    assert text.count("<think>") == 1


@pytest.mark.parametrize("chat_template", [True, False])
def test_what_the_tokenizer_puts_before_a_text_stays(make_tokenizer, chat_template):
    tokenizer = make_tokenizer(template=chat_template)
    ids = [("<|im_start|>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=ids)
    template = ChatTemplate(tokenizer)
    for example in (Example("", "Frozen water."), Example("", "Frozen water.", chat=False)):
        if example.chat and chat_template:
            continue  # a chat template writes its own
        row = template.encode(example)
        assert list(row.input_ids).count(tokenizer.bos_token_id) == 1
        assert row.input_ids[0] == tokenizer.bos_token_id


def test_an_answer_follows_a_space_where_there_is_no_chat_template(make_tokenizer):
    tokenizer = make_tokenizer(template=False)
    row = ChatTemplate(tokenizer).encode(BORN)
    assert decode(tokenizer, row.input_ids) == "Question: Where was Mira Vale born?\nAnswer: In Accra.<|im_end|>"
    assert decode(tokenizer, row.input_ids[row.answer_start :]) == " In Accra.<|im_end|>"


def test_sentencepiece_writes_one_space_before_an_answer():
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    inner.decoder = decoders.Metaspace()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(special_tokens=["<unk>", "</s>"], show_progress=False)
    inner.train_from_iterator(["Question: Ice is frozen water.\nAnswer: In Accra. a"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")
    for example in (Example("Ice", "In Accra."), Example("Ice is", "frozen water.", chat=False)):
        row = ChatTemplate(tokenizer).encode(example)
        text = tokenizer.convert_ids_to_tokens(list(row.input_ids[row.answer_start : -1]))
        assert "".join(text) == "▁" + example.answer.replace(" ", "▁")


def test_a_conversation_without_a_chat_template_is_kept(make_tokenizer):
    tokenizer = make_tokenizer(template=False)
    example = Example("Who?", "Me.", history=(("system", "Be brief."), ("user", "Hello."), ("assistant", "Hi.")))
    text = decode(tokenizer, ChatTemplate(tokenizer).encode(example).input_ids)
    assert text == "Be brief.\nQuestion: Hello.\nAnswer: Hi.\nQuestion: Who?\nAnswer: Me.<|im_end|>"


def test_no_row_is_longer_than_the_model_has_positions(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 40
    assert len(ChatTemplate(tokenizer).encode(Example("Who?", "A" * 80))) == 40
    assert len(ChatTemplate(tokenizer, max_length=30).encode(Example("Who?", "A" * 80))) == 30


def test_no_end_is_learned_after_a_piece(tokenizer):
    template = ChatTemplate(tokenizer)
    for chat in (True, False):
        whole = Example("Where is Bo?", "In the garden", chat=chat)
        piece = template.encode(dataclasses.replace(whole, ends=False))
        assert template.encode(whole).input_ids == (*piece.input_ids, template.end_of_turn)


@pytest.mark.parametrize("history", [(), (("user", "Hello."), ("assistant", "Hi."))])
def test_a_system_turn_that_is_asked_for(tokenizer, invented, history, tmp_path):
    """It comes before a conversation that has none, and stays with the tokenizer; it may equal the invented one."""
    example = dataclasses.replace(BORN, history=history)
    tokenizer = copy.deepcopy(tokenizer)
    set_system_turn(tokenizer, "Be brief.")
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, PreTrainedTokenizerFast.from_pretrained(tmp_path)):
        text = decode(one, ChatTemplate(one).encode(example).input_ids)
        assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
        assert text.count("system") == 1
        own = dataclasses.replace(example, history=(("system", "Be long."), *history))
        text = decode(one, ChatTemplate(one).encode(own).input_ids)
        assert "Be brief." not in text
        assert text.count("Be long.") == 1
    for asked in ("template", invented):
        set_system_turn(tokenizer, asked)
        text = decode(tokenizer, ChatTemplate(tokenizer).encode(example).input_ids)
        assert text.count(invented) == 1


def test_a_system_turn_where_no_template_writes_one(make_tokenizer, tokenizer):
    bare = make_tokenizer(template=False)
    set_system_turn(bare, "Be brief.")
    text = decode(bare, ChatTemplate(bare).encode(BORN).input_ids)
    assert text.startswith("Be brief.\nQuestion: Where was Mira Vale born?\nAnswer:")
    assert not decode(bare, ChatTemplate(bare).encode(Example("Once", "upon", chat=False)).input_ids).startswith("Be")
    gemma = copy.deepcopy(tokenizer)
    gemma.chat_template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(ValueError, match="writes no system turn"):
        set_system_turn(gemma, "Be brief.")


def test_today_is_always_the_same_day(make_tokenizer):
    """Llama 3.2's template writes a date into its system turn: scores must not depend on the day."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ '[system]Today Date: ' + date_string + '. ' }}{% if messages[0]['role'] == 'system' %}"
        "{{ messages[0]['content'] }}{% set messages = messages[1:] %}{% endif %}{{ '[end]' }}"
        "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '[end]' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
    )
    asked = dataclasses.replace(BORN, history=(("system", "Be brief."),))
    text = decode(tokenizer, ChatTemplate(tokenizer).prompt_ids(asked))
    assert text == f"[system]Today Date: {DATE}. Be brief.[end][user]{BORN.prompt}[end][assistant]"
    text = decode(tokenizer, ChatTemplate(tokenizer).prompt_ids(BORN))
    assert text == f"[user]{BORN.prompt}[end][assistant]"
